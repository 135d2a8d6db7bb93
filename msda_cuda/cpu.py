"""cpu.cpp, compiled at first use where there is a C++ compiler, and wrapped for autograd.

Nothing depends on it: without a compiler `library` warns once and returns None, and msda.py uses plain PyTorch.
The library is cached by its source, compiler and processor in $XDG_CACHE_HOME/mindetr (default ~/.cache/mindetr).
"""
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ["-O3", "-march=native", "-fopenmp-simd", "-std=c++17", "-shared", "-fPIC"]


@functools.cache
def library():
    """The compiled library, built if the cache has none; None, with one warning, where it cannot be built."""
    try:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if not compiler:
            raise OSError("no C++ compiler found (g++, clang++ or $CXX)")
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        cpu = Path("/proc/cpuinfo")
        flags = [line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))][:1] \
            if cpu.exists() else platform.processor()                     # -march=native means these
        key = hashlib.sha256(repr((SOURCE.read_text(), FLAGS, version, flags)).encode()).hexdigest()[:16]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindetr"
        target = folder / f"msda-{key}.so"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:         # renamed whole: two processes may build at once
                built = Path(scratch) / target.name
                subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(built)], capture_output=True, text=True, check=True)
                os.replace(built, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(f"deformable attention runs in plain PyTorch, which is slower, as cpu.cpp could not be compiled "
                      f"({reason}): install g++, or set CXX to a C++ compiler", stacklevel=2)
        return None


@functools.cache
def pool(threads):
    return ThreadPoolExecutor(threads)


def call(name, tensors, sizes, pairs):
    """Run a function of the library over all (image, head) pairs, in as many threads as torch uses."""
    function = getattr(library(), f"{name}_{str(tensors[0].dtype).removeprefix('torch.')}")
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    sizes = [ctypes.c_int64(s) for s in sizes]
    threads = min(torch.get_num_threads(), pairs)
    cuts = [pairs * i // max(threads, 1) for i in range(threads + 1)]

    def run(first, last):
        function(*pointers, *sizes, ctypes.c_int64(first), ctypes.c_int64(last))

    if threads <= 1:
        run(0, pairs)
    else:
        list(pool(threads).map(run, cuts[:-1], cuts[1:]))


class MSDA(torch.autograd.Function):
    """The operator and its gradients; arguments and shapes as in msda.msda, float32 or float64."""

    @staticmethod
    def forward(ctx, value, shapes, locations, weights):
        value, locations, weights = (t.contiguous() for t in (value, locations, weights))
        ctx.shapes = torch.tensor(shapes)
        ctx.save_for_backward(value, locations, weights)
        B, S, M, D = value.shape
        Q, L, P = locations.shape[1], *locations.shape[3:5]
        out = value.new_empty(B, Q, M * D)
        call("forward", (value, ctx.shapes, locations, weights, out), (S, M, D, Q, L, P), B * M)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        value, locations, weights = ctx.saved_tensors
        B, S, M, D = value.shape
        Q, L, P = locations.shape[1], *locations.shape[3:5]
        grads = torch.zeros_like(value), torch.empty_like(locations), torch.empty_like(weights)
        call("backward", (value, ctx.shapes, locations, weights, grad_out.contiguous(), *grads), (S, M, D, Q, L, P), B * M)
        return grads[0], None, *grads[1:]
