"""msda.cu, compiled at first use and launched through CUDA's driver: no toolkit, no extension.

NVRTC, CUDA's run-time compiler, comes with torch's own packages. It takes seconds for a `Config`
and a GPU architecture; cpu.py's cache keeps the code. Whatever fails is an OSError or RuntimeError.
"""
import ctypes
import functools
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from msda_cuda.cpu import cached

TYPES = {torch.float32: "float", torch.float64: "double",
         torch.float16: "f16", torch.bfloat16: "bf16"}
SHARED_MEMORY = 48 * 1024  # bytes that a block may have on every GPU


class Config(NamedTuple):
    """What a kernel is compiled for: the constants of msda.cu."""
    value: torch.dtype
    query: torch.dtype  # of offsets and logits
    M: int
    D: int
    L: int
    P: int
    R: int

    @property
    def vec(self):
        """Channels that a lane moves at once: as many as fit in 16 bytes and divide D."""
        return math.gcd(self.D, 16 // self.value.itemsize)

    @property
    def group_bytes(self):
        """Shared memory of a group: its points, 4 numbers each, an odd number of them."""
        return (self.L * self.P | 1) * 4 * max(self.value.itemsize, 4)

    @property
    def lanes(self):
        """Lanes that share a query and head: one for vec channels, more if points need room."""
        return next((n for n in (1, 2, 4, 8, 16) if n * self.vec >= self.D
                     and 32 // n * self.group_bytes <= SHARED_MEMORY), 32)

    def header(self):
        """config.h, which msda.cu includes."""
        V, O = TYPES[self.value], TYPES[self.query]
        A = "float" if self.value.itemsize < 8 else "double"
        W = f"Two<{V}>" if self.value.itemsize == 2 and self.vec > 1 else V
        return (f"using V = {V}; using W = {W}; using O = {O}; using A = {A}; constexpr int "
                f"M = {self.M}, D = {self.D}, L = {self.L}, P = {self.P}, R = {self.R}, "
                f"VEC = {self.vec}, LANES = {self.lanes};\n")

    def grid(self, pairs, queries, processors):
        """Blocks, threads, shared memory. A block is consecutive queries of one (image, head): many
        for their common cache, not so many that processors stand idle."""
        threads = 256
        while threads > 32 and (threads // self.lanes * self.group_bytes > SHARED_MEMORY
                                or threads > 64 and pairs * -(-queries * self.lanes // threads)
                                < 2 * processors):
            threads //= 2
        groups = threads // self.lanes
        return pairs * -(-queries // groups), threads, groups * self.group_bytes


def forward(value, offsets, logits, reference, shapes):
    """out [B, Q, M*D]; arguments as in msda.py, but shapes are flat."""
    out = value.new_empty(*offsets.shape[:2], value.shape[2] * value.shape[3])
    launch("forward", shapes, value, offsets, logits, reference, out)
    return out


def backward(grad_out, value, offsets, logits, reference, shapes, of_reference):
    """The gradients of value, offsets, logits and, where it is asked for, reference: a list."""
    if torch.are_deterministic_algorithms_enabled():
        said = "deformable attention on a GPU adds in no fixed order: warn_only=True allows it"
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(said)
        warnings.warn(said)
    # Many queries add to one token: in half precision most of a sum would be lost.
    grad_value = reference.new_zeros(value.shape)
    grads = [t.new_empty(t.shape) for t in (offsets, logits)]
    of = reference.new_zeros(reference.shape) if of_reference else None
    launch("backward", shapes, value, offsets, logits, reference, grad_out, grad_value, *grads, of)
    return [grad_value.to(value.dtype), *grads, of][:3 + of_reference]


@functools.lru_cache(1024)
def plan(name, device, config, shapes, B, S, Q):
    """A launch's kernel, grid, addresses of struct Levels, S, Q and a head's blocks, and the array
    of these. Queries that are tokens, around points, are counted in whole tiles of 8 x 8."""
    h, w = shapes[::2], shapes[1::2]
    starts = [sum(a * b for a, b in zip(h[:l], w[:l])) for l in range(len(h))]
    tiles = sum(-(-a // 8) * -(-b // 8) for a, b in zip(h, w))
    count = 64 * tiles if config.R == 2 and Q == S else Q
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    grid = config.grid(B * config.M, count, processors)
    numbers = [*h, *w, *starts, S, Q, grid[0] // (B * config.M)]
    kept = (ctypes.c_int32 * len(numbers))(*numbers)
    addresses = [ctypes.addressof(kept) + 4 * i for i in (0, *range(3 * len(h), len(numbers)))]
    return kernels(config, device)[name], grid, addresses, kept


def launch(name, shapes, *tensors):
    """Run a kernel on `tensors`, in its order, on their device's stream; None is a null pointer."""
    value, offsets, _, reference = tensors[:4]
    (B, S, M, D), (_, Q, _, L, P, _), R = value.shape, offsets.shape, reference.shape[3]
    if B * Q == 0:
        return
    config, device = Config(value.dtype, offsets.dtype, M, D, L, P, R), value.device
    kept = [None if t is None else t.contiguous() for t in tensors]
    pointers = (ctypes.c_void_p * len(kept))(*(0 if t is None else t.data_ptr() for t in kept))
    first, n = ctypes.addressof(pointers), len(kept)  # the driver takes each argument's address
    with torch.cuda.device(device):
        call(driver, "cuCtxSetCurrent", context(device))
        run, (blocks, threads, shared), last, _ = plan(name, device, config, tuple(shapes), B, S, Q)
        arguments = (ctypes.c_void_p * (n + 4))(*range(first, first + 8 * n, 8), *last)
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        call(driver, "cuLaunchKernel", run, blocks, 1, 1, threads, 1, 1, shared, stream, arguments,
             None)


def prepare(config, device):
    """Build and load the kernels of a config for a device."""
    with torch.cuda.device(device):
        call(driver, "cuCtxSetCurrent", context(device))
        kernels(config, device)


@functools.cache
def context(device):
    """torch's context of a device, which a new thread has only from torch's own first call on."""
    handle = ctypes.c_void_p()
    call(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(handle), device.index)
    return handle


@functools.cache
def kernels(config, device):
    """The handles of a config's kernels, by name, on a device, which must be current."""
    module = ctypes.c_void_p()
    handles = {"forward": ctypes.c_void_p(), "backward": ctypes.c_void_p()}
    file = compiled(config, *torch.cuda.get_device_capability(device))
    call(driver, "cuModuleLoadData", ctypes.byref(module), file.read_bytes())
    for name, handle in handles.items():
        call(driver, "cuModuleGetFunction", ctypes.byref(handle), module, name.encode())
    return handles


def compiled(config, major, minor):
    """The file with a config's machine code for a GPU of compute capability major.minor."""
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17"]
    source = [Path(__file__).with_name(name).read_text() for name in ("msda.cu", "sampling.h")]
    made_of = source, config.header(), options, torch.version.cuda
    return cached("msda.cubin", made_of, lambda file: file.write_bytes(
        compile_source(config, source, options)[0]))


def compile_source(config, source, options):
    """NVRTC's (cubin, log) for a config; OSError with the log where it does not compile."""
    def read(what):
        size = ctypes.c_size_t()
        call(nvrtc, f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call(nvrtc, f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def strings(*texts):
        return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))

    program = ctypes.c_void_p()
    call(nvrtc, "nvrtcCreateProgram", ctypes.byref(program), source[0].encode(), b"msda.cu", 2,
         strings(source[1], config.header()), strings("sampling.h", "config.h"))
    failed = nvrtc().nvrtcCompileProgram(program, len(options), strings(*options))
    log = read("ProgramLog").rstrip(b"\0").decode(errors="replace")
    code = b"" if failed else read("CUBIN")
    call(nvrtc, "nvrtcDestroyProgram", ctypes.byref(program))
    if failed:
        raise OSError(f"NVRTC did not compile msda.cu ({' '.join(options)}): {log}")
    return code, log


@functools.cache
def nvrtc():
    """NVRTC of torch's CUDA version, from torch's packages or else where the linker finds it."""
    major, packages = (torch.version.cuda or "").split(".")[0], Path(torch.__file__).parents[1]
    shipped = packages.glob(f"nvidia/*/lib/libnvrtc.so.{major}*")
    return ctypes.CDLL(str(next(shipped, f"libnvrtc.so.{major}")))


@functools.cache
def driver():
    return ctypes.CDLL("libcuda.so.1")


def call(library, name, *arguments):
    status = getattr(library(), name)(*arguments)
    if status:  # an earlier kernel's error stays in the driver
        raise RuntimeError(f"{name} failed with code {status}, in this call or in a kernel before "
                           "it: find it with CUDA_LAUNCH_BLOCKING=1")
