"""msda.cu, compiled by NVRTC at first use, and launched through CUDA's driver: no toolkit, no compiler, no extension.

NVRTC, CUDA's run-time compiler, comes with torch's own packages. A kernel is compiled for one `Config` and one GPU
architecture, which takes a second or two, and kept (build.py). Read `forward` and `backward`, then `launch`, then how a
kernel comes to be: `kernel`, `compiled`, `nvrtc`.

Whatever keeps a kernel from being built or loaded is an OSError that says why; op.py then serves plain PyTorch.
"""
import ctypes
import functools
import site
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

from msda_cuda import build

HERE = Path(__file__).parent
TYPES = {torch.float32: "float", torch.float64: "double", torch.float16: "f16", torch.bfloat16: "bf16"}
SHARED_MEMORY = 48 * 1024                                          # bytes that a block may have on every GPU


class Config(NamedTuple):
    """What a kernel is compiled for: the constants of msda.cu."""
    value: torch.dtype
    query: torch.dtype              # of offsets and logits
    D: int
    L: int
    P: int
    R: int

    @property
    def accumulate(self):
        return torch.promote_types(self.value, torch.float32)

    @property
    def vec(self):
        """Channels that a lane moves at once: as many as fit in 16 bytes and divide D."""
        vec = 16 // self.value.itemsize
        while self.D % vec:
            vec //= 2
        return vec

    @property
    def group_bytes(self):
        """Shared memory of a group: its points, 4 numbers each, an odd number of them."""
        return (self.L * self.P | 1) * 4 * self.accumulate.itemsize

    @property
    def lanes(self):
        """Lanes that share a query and head: one for each vec channels, or more where their points need the room."""
        lanes = 1
        while lanes < 32 and (lanes * self.vec < self.D or 32 // lanes * self.group_bytes > SHARED_MEMORY):
            lanes *= 2
        return lanes

    def header(self):
        """config.h; OSError for more points than a block's shared memory holds."""
        if 32 // self.lanes * self.group_bytes > SHARED_MEMORY:
            raise OSError(f"{self.L} levels of {self.P} points are {self.L * self.P} points a query and head: there "
                          f"must be fewer than {SHARED_MEMORY // 4 // self.accumulate.itemsize} in {self.accumulate}")
        V, O, A = (TYPES[t] for t in (self.value, self.query, self.accumulate))
        return (f"using V = {V};\nusing O = {O};\nusing A = {A};\nconstexpr int D = {self.D}, L = {self.L}, "
                f"P = {self.P}, R = {self.R}, VEC = {self.vec}, LANES = {self.lanes};\n")

    def threads(self, pairs, queries, processors):
        """Threads of a block: many, for their common cache, but not so many that processors stand idle."""
        threads = 256
        while threads > 32 and (threads // self.lanes * self.group_bytes > SHARED_MEMORY
                                or threads > 64 and pairs * -(-queries * self.lanes // threads) < 2 * processors):
            threads //= 2
        return threads


def config_of(value, offsets, reference):
    return Config(value.dtype, offsets.dtype, value.shape[3], offsets.shape[3], offsets.shape[4], reference.shape[3])


# ================================================================================================= the two kernels' calls

def forward(value, shapes, offsets, logits, reference):
    """out [B, Q, M*D], by the kernel; arguments as in op.py."""
    value, offsets, logits, reference = (aligned(t) for t in (value, offsets, logits, reference))
    out = value.new_empty(*offsets.shape[:2], value.shape[2] * value.shape[3])
    launch("forward", config_of(value, offsets, reference), shapes, value.shape[1], offsets.shape[:3],
           [value, offsets, logits, reference, out])
    return out


def backward(grad_out, value, shapes, offsets, logits, reference, of_reference):
    """The gradients of value, offsets, logits, and of reference or None, by the kernel."""
    grad_out, value, offsets, logits, reference = (aligned(t) for t in (grad_out, value, offsets, logits, reference))
    config = config_of(value, offsets, reference)
    # Many queries add to one token: in half precision most of a sum would be lost.
    grad_value = torch.zeros_like(value, dtype=config.accumulate)
    grad_offsets, grad_logits = torch.empty_like(offsets), torch.empty_like(logits)
    grad_reference = torch.zeros_like(reference) if of_reference else None
    launch("backward", config, shapes, value.shape[1], offsets.shape[:3],
           [grad_out, value, offsets, logits, reference, grad_value, grad_offsets, grad_logits, grad_reference])
    return grad_value.to(value.dtype), grad_offsets, grad_logits, grad_reference


def aligned(tensor):
    """The tensor as the kernel reads it: contiguous, and on a 16-byte boundary, where a slice of another may not lie."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def launch(name, config, shapes, S, queries, tensors):
    """Run a kernel over all (image, query, head), on the current stream of the tensors' device.

    Args:
        queries: (B, Q, M). tensors: what the kernel takes, in its order; None is a null pointer.

    Raises RuntimeError with the shapes in it when the launch fails; ValueError for a tensor the kernel would misread.
    """
    B, Q, M = queries
    device = tensors[0].device
    check_memory(name, tensors, device)
    if B * Q * M == 0:
        return
    with torch.cuda.device(device):
        make_current(device.index)
        function = kernel(name, config, device.index)
        threads = config.threads(B * M, Q, torch.cuda.get_device_properties(device).multi_processor_count)
        arguments = kernel_arguments(tensors, shapes, (S, M, Q))
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        blocks, shared = grid(config, queries, threads)
        status = driver().cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared,
                                         ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream), pointers, None)
    if status:
        raise RuntimeError(f"deformable attention's {name} kernel could not be launched ({driver_error(status)}): {blocks} "
                           f"blocks of {threads} threads, {shared} bytes of shared memory, B={B}, Q={Q}, M={M}, S={S}, "
                           f"levels {list(shapes)}, {config}")


def check_memory(name, tensors, device):
    """A kernel gets bare addresses: what lies there must be whole, in order, on its device, on a 16-byte boundary."""
    for i, t in enumerate(t for t in tensors if t is not None):
        what = f"argument {i} of deformable attention's {name} kernel, {tuple(t.shape)},"
        if t.device != device:
            raise ValueError(f"{what} is on {t.device}: it must be on {device}, as the first")
        if not t.is_contiguous():
            raise ValueError(f"{what} has strides {t.stride()}: it must be contiguous")
        if t.data_ptr() % 16:
            raise ValueError(f"{what} starts at address {t.data_ptr():#x}: it must start at a multiple of 16")


def grid(config, queries, threads):
    """Blocks, and the shared memory of each: consecutive queries of one head of one image make a block."""
    B, Q, M = queries
    groups = threads // config.lanes
    return B * M * -(-Q // groups), groups * config.group_bytes


def kernel_arguments(tensors, shapes, sizes):
    """The kernel's parameters as ctypes objects: addresses, struct Levels, then int32 sizes."""
    starts = [sum(h * w for h, w in shapes[:l]) for l in range(len(shapes))]
    levels = [*(h for h, _ in shapes), *(w for _, w in shapes), *starts]
    return [*(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors),
            (ctypes.c_int32 * len(levels))(*levels), *(ctypes.c_int32(n) for n in sizes)]


# ================================================================================================= how a kernel comes to be

def prepare(config, device):
    """Build and load both kernels of a config for a device (its number); OSError where that is impossible."""
    with torch.cuda.device(device):
        make_current(device)
        for name in ("forward", "backward"):
            kernel(name, config, device)


@functools.cache
def context(device):
    """The context that torch has for a device (its number)."""
    handle = ctypes.c_void_p()
    check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(handle), device))
    return handle


def make_current(device):
    """A thread that has not yet worked on the device, such as autograd's, has no context, and torch makes one only at its
    own first call."""
    check(driver().cuCtxSetCurrent(context(device)))


@functools.cache
def kernel(name, config, device):
    """A kernel's handle on a device (its number), which must be current."""
    function = ctypes.c_void_p()
    check(driver().cuModuleGetFunction(ctypes.byref(function), module(config, device), name.encode()))
    return function


@functools.cache
def module(config, device):
    handle = ctypes.c_void_p()
    image = compiled(config, *torch.cuda.get_device_capability(device)).read_bytes()
    check(driver().cuModuleLoadData(ctypes.byref(handle), image))
    return handle


def compiled(config, major, minor):
    """The file with a config's machine code for a GPU of compute capability major.minor."""
    version = nvrtc_version()
    supported = nvrtc_architectures()
    arch, target = major * 10 + minor, "sm"
    if arch not in supported:                                         # a GPU newer than NVRTC: the driver translates
        arch, target = max((a for a in supported if a < arch), default=0), "compute"
        if not arch:
            raise OSError(f"NVRTC {version} compiles for no GPU as old as compute capability {major}.{minor}")
    options = [f"--gpu-architecture={target}_{arch}", "--std=c++17"]
    source = {name: (HERE / name).read_text() for name in ("msda.cu", "sampling.h")}
    return build.cached("msda", ".cubin" if target == "sm" else ".ptx", (source, config.header(), options, version),
                        lambda path: path.write_bytes(compile_source(config, source, options)[0]))


def compile_source(config, source, options):
    """NVRTC's (cubin or PTX, log) for a config; OSError with the log where it does not compile."""
    lib = nvrtc()
    headers = {"sampling.h": source["sampling.h"], "config.h": config.header()}
    texts, names = ((ctypes.c_char_p * len(headers))(*(s.encode() for s in some))
                    for some in (headers.values(), headers.keys()))
    program = ctypes.c_void_p()
    nvrtc_check(lib.nvrtcCreateProgram(ctypes.byref(program), source["msda.cu"].encode(), b"msda.cu", len(headers),
                                       texts, names))
    try:
        flags = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        failed = lib.nvrtcCompileProgram(program, len(options), flags)
        log = nvrtc_read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if failed:
            raise OSError(f"NVRTC did not compile msda.cu ({' '.join(options)}): {log}")
        return nvrtc_read(program, "CUBIN" if "=sm_" in options[0] else "PTX"), log
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def nvrtc_read(program, what):
    """One of a program's results: nvrtcGet<what>Size, then nvrtcGet<what>."""
    size = ctypes.c_size_t()
    nvrtc_check(getattr(nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    nvrtc_check(getattr(nvrtc(), f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


@functools.cache
def nvrtc():
    """NVRTC's library: the one beside torch's CUDA, then any other of its major version, then the system's."""
    if sys.platform == "win32":
        pattern, places = "nvrtc64_*.dll", ["torch/lib", "nvidia/*/bin", "nvidia/*/bin/*"]
    else:
        pattern, places = "libnvrtc.so*", ["nvidia/*/lib", "torch/lib"]
    roots = {Path(torch.__file__).parents[1], Path(sysconfig.get_paths()["platlib"]), *map(Path, site.getsitepackages())}
    found = [f for root in roots for place in places for f in root.glob(f"{place}/{pattern}") if "alt" not in f.name]
    major = (torch.version.cuda or "").split(".")[0]
    found = sorted(map(str, found), key=lambda f: ("cu" + major not in f and f".so.{major}" not in f, f))
    for name in [*found, f"libnvrtc.so.{major}", "libnvrtc.so", "/usr/local/cuda/lib64/libnvrtc.so"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"NVRTC is not installed: pip install nvidia-cuda-nvrtc{'-cu12' if major == '12' else ''} "
                  f"(torch is built for CUDA {torch.version.cuda})")


def nvrtc_check(status):
    if status:
        describe = nvrtc().nvrtcGetErrorString
        describe.restype = ctypes.c_char_p
        raise OSError(f"NVRTC failed: {describe(status).decode()}")


def nvrtc_version():
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc_check(nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def nvrtc_architectures():
    count = ctypes.c_int()
    nvrtc_check(nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    architectures = (ctypes.c_int * count.value)()
    nvrtc_check(nvrtc().nvrtcGetSupportedArchs(architectures))
    return list(architectures)


@functools.cache
def driver():
    """CUDA's driver, which torch has already started when there is a CUDA tensor."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def driver_error(status):
    text = ctypes.c_char_p()
    driver().cuGetErrorString(status, ctypes.byref(text))
    return (text.value or b"unknown error").decode() + f", code {status}"


def check(status):
    if status:
        raise OSError(f"CUDA's driver did not load the kernel: {driver_error(status)}")
