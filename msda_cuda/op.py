"""torch.ops.mindetr.msda: deformable attention as one operator of torch's, with its checks, its gradient, and the choice
of who computes it: the CUDA kernel (cuda.py), C++ (cpu.py), or plain PyTorch (plain.py) where neither can be compiled.

All three take, with B images, S tokens, Q queries, M heads, D channels a head, L levels, P points,

    value      [B, S, M, D]          float16, bfloat16, float32 or float64
    offsets    [B, Q, M, L, P, 2]    in value's dtype, or in the one that is computed in: float64 for float64, else float32
    logits     [B, Q, M, L, P]       as offsets
    reference  [B, Q, L, 2 or 4]     in the dtype that is computed in
    shapes     the levels' (h, w)

and keep nothing else for backward: softmax and locations are computed again there. Whatever the dtypes, under autocast
or not, locations, softmax and sums are computed in float32 (float64 for float64), and so is the gradient of value, which
many queries add to.
"""
import functools
import os
import warnings
from typing import Sequence, Tuple                    # torch 2.6 reads these and not the built-in ones

import torch
from torch import Tensor

from msda_cuda import cpu, cuda, plain

# $MINDETR_MSDA: "fastest" compiles what this machine can run and falls back to plain PyTorch; "native" makes it an error
# when it cannot; "torch" is the definition in msda.py, everywhere.
BACKEND = os.environ.get("MINDETR_MSDA", "fastest")
if BACKEND not in ("fastest", "native", "torch"):
    raise SystemExit(f"error: MINDETR_MSDA={BACKEND}: it must be 'fastest', 'native' or 'torch'")


def check(value, shapes, offsets, logits, reference):
    """Raise ValueError, in one sentence, for arguments that do not fit together."""
    shapes = [tuple(s) for s in shapes]
    if not shapes or any(len(s) != 2 or min(s) < 1 for s in shapes):
        raise ValueError(f"shapes are {shapes}: they must be one (h, w) for each level, of at least 1 x 1")
    L, tokens = len(shapes), sum(h * w for h, w in shapes)
    if value.dim() != 4 or value.shape[1] != tokens or 0 in value.shape[2:]:
        raise ValueError(f"value is {tuple(value.shape)}: it must be [B, S, M, D] with S = {tokens}, the sum of h * w over "
                         f"the levels {shapes}")
    if tokens >= 2 ** 27:
        raise ValueError(f"value has {tokens} tokens: there must be fewer than {2 ** 27}")
    B, _, M, _ = value.shape
    if offsets.dim() != 6 or offsets.shape[0] != B or offsets.shape[2:4] != (M, L) or offsets.shape[4] < 1 \
            or offsets.shape[5] != 2:
        raise ValueError(f"offsets are {tuple(offsets.shape)}: they must be [B={B}, Q, M={M}, L={L}, P, 2]")
    if logits.shape != offsets.shape[:5]:
        raise ValueError(f"logits are {tuple(logits.shape)}: they must be {tuple(offsets.shape[:5])}, as offsets")
    Q = offsets.shape[1]
    if reference.shape[:-1] != (B, Q, L) or reference.shape[-1] not in (2, 4):
        raise ValueError(f"reference is {tuple(reference.shape)}: it must be [B={B}, Q={Q}, L={L}, 2], points, or "
                         f"[B={B}, Q={Q}, L={L}, 4], boxes")
    if value.dtype not in cuda.TYPES:
        raise ValueError(f"value is {value.dtype}: it must be one of {', '.join(map(str, cuda.TYPES))}")
    wide = torch.promote_types(value.dtype, torch.float32)
    if offsets.dtype not in (value.dtype, wide):
        raise ValueError(f"offsets are {offsets.dtype}: they must be {value.dtype}, as value, or {wide}")
    if logits.dtype != offsets.dtype:
        raise ValueError(f"logits are {logits.dtype}: they must be {offsets.dtype}, as offsets")
    if reference.dtype != wide:
        raise ValueError(f"reference is {reference.dtype}: it must be {wide} beside a value in {value.dtype}")
    for name, tensor in (("offsets", offsets), ("logits", logits), ("reference", reference)):
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}: it must be on {value.device}, as value")


def computer(value, offsets, reference):
    """The module that computes: cuda or cpu where they can be compiled, else plain."""
    module = {"cuda": cuda, "cpu": cpu}.get(value.device.type)
    if module is None or not native(module, value.device.index, cuda.config_of(value, offsets, reference)):
        return plain
    return module


@functools.cache
def native(module, device, config):
    """Whether a module's code runs here for a config; if it does not, one warning says why."""
    try:
        module.prepare(config, device)
        return True
    except OSError as error:
        if BACKEND == "native":
            raise
        warn_once(f"deformable attention runs in plain PyTorch, which is slower: {error}")
        return False


@functools.cache
def warn_once(message):
    warnings.warn(message, stacklevel=2)


def pairs(flat):
    return list(zip(flat[::2], flat[1::2]))


@torch.library.custom_op("mindetr::msda", mutates_args=())
def msda(value: Tensor, offsets: Tensor, logits: Tensor, reference: Tensor, shapes: Sequence[int]) -> Tensor:
    """out [B, Q, M*D], of value's dtype; `shapes` here is flat, h0, w0, h1, w1, ..."""
    check(value, pairs(shapes), offsets, logits, reference)
    with torch.autocast(value.device.type, enabled=False):                       # or it would reach plain.py's products
        return computer(value, offsets, reference).forward(value, pairs(shapes), offsets, logits, reference)


@msda.register_fake
def _(value, offsets, logits, reference, shapes):
    check(value, pairs(shapes), offsets, logits, reference)
    return value.new_empty(*offsets.shape[:2], value.shape[2] * value.shape[3])


@torch.library.custom_op("mindetr::msda_backward", mutates_args=())
def msda_backward(grad_out: Tensor, value: Tensor, offsets: Tensor, logits: Tensor, reference: Tensor,
                  shapes: Sequence[int], of_reference: bool) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of value, offsets, logits and reference; the last is empty unless it is asked for."""
    if grad_out.shape != (*offsets.shape[:2], value.shape[2] * value.shape[3]) or grad_out.dtype != value.dtype:
        raise ValueError(f"grad_out is {tuple(grad_out.shape)} in {grad_out.dtype}: it must be [B, Q, M*D] of the other "
                         f"arguments, in {value.dtype}")
    check(value, pairs(shapes), offsets, logits, reference)
    with torch.autocast(value.device.type, enabled=False):
        *grads, of = computer(value, offsets, reference).backward(grad_out, value, pairs(shapes), offsets, logits,
                                                                  reference, of_reference)
    return *grads, reference.new_empty(0) if of is None else of


@msda_backward.register_fake
def _(grad_out, value, offsets, logits, reference, shapes, of_reference):
    return (*(t.new_empty(t.shape) for t in (value, offsets, logits)),
            reference.new_empty(reference.shape if of_reference else 0))


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.shapes = inputs[4]


def gradient(ctx, grad_out):
    of_reference = ctx.needs_input_grad[3]
    *grads, grad_reference = torch.ops.mindetr.msda_backward(grad_out, *ctx.saved_tensors, ctx.shapes, of_reference)
    return *grads, grad_reference if of_reference else None, None


def refuse(ctx, *grads):
    raise RuntimeError("deformable attention has no second derivative: its first is not differentiable in the locations. "
                       "For double backward set MINDETR_MSDA=torch")


msda.register_autograd(gradient, setup_context=keep)
msda_backward.register_autograd(refuse)
