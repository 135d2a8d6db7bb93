"""cpu.cpp, compiled at first use where there is a C++ compiler.

Nothing depends on it: without a compiler `library` raises OSError, and op.py serves plain PyTorch with one warning.
"""
import ctypes
from pathlib import Path

import torch

from msda_cuda import build


def library():
    """cpu.cpp's functions; OSError where they cannot be compiled."""
    return build.cpp(*(Path(__file__).with_name(name) for name in ("cpu.cpp", "sampling.h")))


def prepare(config, device):
    """Compile and load, the same for every config; OSError where that is impossible."""
    library()


def call(name, tensors, shapes, S, queries, D, P, R):
    """Run a function of the library over all (image, head) pairs."""
    B, Q, M = queries
    function = getattr(library(), f"{name}_{str(tensors[0].dtype).removeprefix('torch.')}_{R}")
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    levels = (ctypes.c_int64 * (2 * len(shapes)))(*(n for shape in shapes for n in shape))
    function(*pointers, levels, *(ctypes.c_int64(n) for n in (B, S, M, D, Q, len(shapes), P)))


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
