"""cpu.cpp, compiled at first use where there is a C++ compiler.

Nothing depends on it: without a compiler `library` raises OSError, and op.py serves plain PyTorch with one warning.
"""
import ctypes
import functools
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from msda_cuda import build

HERE = Path(__file__).parent
FLAGS = ["-O3", "-march=native", "-fopenmp-simd", "-std=c++17", "-shared", "-fPIC"]


def compiler():
    """The C++ compiler's path, and what it says of its version; OSError where there is none."""
    path = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not path:
        raise OSError("no C++ compiler found: install g++, or set CXX to one")
    try:
        return path, subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise OSError(f"the C++ compiler does not run ({error}): install g++, or set CXX to one") from error


@functools.cache
def library():
    """cpu.cpp's functions, compiled if the cache has them not."""
    path, version = compiler()
    cpu = Path("/proc/cpuinfo")
    flags = [line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))][:1] \
        if cpu.exists() else platform.processor()                         # -march=native means these
    source = [(HERE / name).read_text() for name in ("cpu.cpp", "sampling.h")]

    def make(built):
        try:
            subprocess.run([path, *FLAGS, str(HERE / "cpu.cpp"), "-o", str(built)], capture_output=True, text=True,
                           check=True)
        except subprocess.CalledProcessError as error:
            raise OSError(f"cpu.cpp could not be compiled ({error.stderr})") from error
    return ctypes.CDLL(str(build.cached("msda", ".so", (source, FLAGS, version, flags), make)))


def prepare(config, device):
    """Compile and load, the same for every config; OSError where that is impossible."""
    library()


@functools.cache
def pool(threads):
    return ThreadPoolExecutor(threads)


def call(name, tensors, shapes, S, queries, D, P, R):
    """Run a function of the library over all (image, head) pairs, in as many threads as torch uses."""
    B, Q, M = queries
    function = getattr(library(), f"{name}_{str(tensors[0].dtype).removeprefix('torch.')}_{R}")
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    levels = (ctypes.c_int64 * (2 * len(shapes)))(*(n for shape in shapes for n in shape))
    sizes = [ctypes.c_int64(s) for s in (S, M, D, Q, len(shapes), P)]
    pairs = B * M
    threads = min(torch.get_num_threads(), pairs)
    cuts = [pairs * i // max(threads, 1) for i in range(threads + 1)]

    def run(first, last):
        function(*pointers, levels, *sizes, ctypes.c_int64(first), ctypes.c_int64(last))

    if threads <= 1:
        run(0, pairs)
    else:
        list(pool(threads).map(run, cuts[:-1], cuts[1:]))


def widened(*tensors):
    """Contiguous, and half precision in float32, which is what it is computed in."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)).contiguous() for t in tensors]


def forward(value, shapes, offsets, logits, reference):
    """out [B, Q, M*D], by cpu.cpp; arguments as in op.py."""
    tensors = widened(value, offsets, logits, reference)
    _, S, M, D = value.shape
    out = tensors[0].new_empty(*offsets.shape[:2], M * D)
    call("forward", [*tensors, out], shapes, S, offsets.shape[:3], D, offsets.shape[4], reference.shape[3])
    return out.to(value.dtype)


def backward(grad_out, value, shapes, offsets, logits, reference, of_reference):
    """The gradients of value, offsets, logits, and of reference or None, by cpu.cpp."""
    tensors = widened(grad_out, value, offsets, logits, reference)
    _, S, M, D = value.shape
    grads = torch.zeros_like(tensors[1]), torch.empty_like(tensors[2]), torch.empty_like(tensors[3])
    # Heads run side by side: each has a gradient of the reference to itself.
    B, Q, L, R = reference.shape
    grad_reference = tensors[4].new_zeros(B, M, Q, L, R) if of_reference else None
    call("backward", [*tensors, *grads, grad_reference], shapes, S, offsets.shape[:3], D, offsets.shape[4], R)
    return grads[0].to(value.dtype), grads[1].to(offsets.dtype), grads[2].to(logits.dtype), \
        grad_reference.sum(1) if of_reference else None
