"""cpu.cpp, compiled at first use where there is a C++ compiler, and the cache of compiled code:
$XDG_CACHE_HOME/mindetr, by default ~/.cache/mindetr. What keeps it from being built is an OSError.
"""
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

# Sums in any order: in the written one, a dot product's vector would be added up lane by lane.
FLAGS = ["-O3", "-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math",
         "-std=c++17", "-shared", "-fPIC", "-fopenmp"]


def cached(name, made_of, make):
    """The file that make(file) writes, unless it did with the same sources and options before."""
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindetr"
    target = folder / f"{key}-{name}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Renamed whole: two processes may build at once.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            make(Path(scratch) / target.name)
            os.replace(Path(scratch) / target.name, target)
    return target


def compile_cpp(*arguments):
    """Run the C++ compiler, and return what it prints."""
    path = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "g++"
    try:
        command = [path, *FLAGS, *arguments]
        return subprocess.check_output(command, stderr=subprocess.STDOUT, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise OSError(f"no C++ compiler with OpenMP works: install g++, or set CXX ({error} "
                      f"{getattr(error, 'output', '')})") from None


@functools.cache
def library():
    """cpu.cpp's functions. Where torch too uses GNU's OpenMP they run in its own threads."""
    here = Path(__file__).parent
    texts = [(here / name).read_text() for name in ("cpu.cpp", "sampling.h")]
    macros = compile_cpp("-dM", "-E", "-x", "c++", os.devnull)  # tell its version and the processor
    return ctypes.CDLL(cached("cpu.so", (texts, FLAGS, macros), lambda file: compile_cpp(
        here / "cpu.cpp", "-o", file)))


def prepare(config, device):
    """Compile and load, the same for every config."""
    library()


def call(name, shapes, value, offsets, logits, reference, *rest):
    """Run a function of the library over all (image, head) pairs."""
    tensors = value, offsets, logits, reference, *rest
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    sizes = *value.shape, offsets.shape[1], *offsets.shape[3:5]
    dtype = "double" if value.dtype == torch.float64 else "float"
    getattr(library(), f"{name}_{dtype}_{reference.shape[3]}")(
        (ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_int64 * len(shapes))(*shapes),
        (ctypes.c_int64 * len(sizes))(*sizes))


def widened(*tensors):
    """Contiguous, and half precision in float32, which is what it is computed in."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return [t.to(wide).contiguous() for t in tensors]


def forward(value, offsets, logits, reference, shapes):
    inputs = widened(value, offsets, logits, reference)
    out = inputs[0].new_empty(*offsets.shape[:2], value.shape[2] * value.shape[3])
    call("forward", shapes, *inputs, out)
    return out.to(value.dtype)


def backward(grad_out, value, offsets, logits, reference, shapes, of_reference):
    *inputs, grad_out = widened(value, offsets, logits, reference, grad_out)
    grads = [torch.zeros_like(inputs[0]), *map(torch.empty_like, inputs[1:3])]
    # Heads run side by side: each has a gradient of the reference to itself.
    (B, *rest), M = reference.shape, value.shape[2]
    of = inputs[3].new_zeros(B, M, *rest) if of_reference else None
    call("backward", shapes, *inputs, grad_out, *grads, of)
    grads = [g.to(t.dtype) for g, t in zip(grads, (value, offsets, logits))]
    return grads + ([of.sum(1)] if of_reference else [])
