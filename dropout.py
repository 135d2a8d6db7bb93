"""Dropout that costs a CPU less than torch's: alone, after a ReLU, and inside of attention.

torch draws 64 random bits an element there, in one thread, and keeps what it drew for the backward pass; and its fast
attention knows no dropout. Here dropout.cpp draws, from a seed and an element's place, and draws again in the backward pass.
Where it cannot be compiled, and on GPUs, torch's own dropout and attention serve.
"""
import ctypes
import functools
import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from msda_cuda import build


@functools.cache
def library():
    """dropout.cpp's functions, or None, with a warning, where they cannot be compiled."""
    try:
        return build.cpp(Path(__file__).with_name("dropout.cpp"))
    except OSError as error:
        warnings.warn(f"dropout runs in plain PyTorch, which is slower: {error}", stacklevel=2)


def drops_natively(module, p, x):
    """Whether dropout.cpp serves a module that drops x with probability p."""
    return module.training and 0 < p < 1 and x.device.type == "cpu" and not torch.compiler.is_compiling() \
        and library() is not None


def new_seed():
    """From torch's generator, so that `torch.manual_seed` gives the same run again."""
    return int(torch.randint(2 ** 63 - 1, (), device="cpu"))


def drop(x, p, seed, gate=None, overwrite=False):
    """x where it stays, / (1 - p), else 0: the same elements for the same seed. With `gate`, of x's shape, only where it is
    above 0. `overwrite`: x may be written to. Half precision is computed in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, dtype = x.to(wide).contiguous(), x.dtype
    gate = None if gate is None else gate.to(wide).contiguous()
    y = x if overwrite else torch.empty_like(x)
    pointers = (ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (x, gate, y))
    getattr(library(), f"drop_{str(wide).removeprefix('torch.')}")(
        *pointers, ctypes.c_int64(x.numel()), ctypes.c_uint64(seed), ctypes.c_uint32(min(round(p * 2 ** 32), 2 ** 32 - 1)),
        ctypes.c_double(1 / (1 - p)))
    return y.to(dtype)


class Dropped(torch.autograd.Function):
    """Each element of x dropped with probability p; with `relu`, of relu(x). Then the output is kept, which the next layer
    keeps anyway, and gradients pass where it is above 0."""

    @staticmethod
    def forward(ctx, x, p, relu):
        ctx.p, ctx.seed = p, new_seed()
        y = drop(x, p, ctx.seed, gate=x if relu else None)
        ctx.save_for_backward(y if relu else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return drop(grad, ctx.p, ctx.seed, gate=ctx.saved_tensors[0]), None, None


class Attended(torch.autograd.Function):
    """dropout(softmax(q k^T / sqrt(D) + bias)) v, of q [B, Q, M, D], k and v [B, S, M, D] and bias [1 or B, 1 or Q, S].

    Head comes after head: one head's scores stay in the cache, and the next head uses their memory again. None are kept for
    the backward pass, which computes them from q and k again, as FlashAttention does (Dao et al. 2022, Algorithm 4).
    """

    @staticmethod
    def attention(q, k, bias):
        """One head's softmax [B, Q, S], in float32 where the scores are in half precision."""
        scores = torch.baddbmm(bias, q, k.mT, alpha=q.shape[-1] ** -0.5)
        return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))

    @staticmethod
    def forward(ctx, q, k, v, bias, p):
        ctx.p, ctx.seed = p, new_seed()
        ctx.save_for_backward(q, k, v, bias)
        out = torch.empty_like(q)
        for head in range(q.shape[2]):
            q_, k_, v_ = (x[:, :, head] for x in (q, k, v))
            weights = drop(Attended.attention(q_, k_, bias), p, ctx.seed + head, overwrite=True)
            out[:, :, head] = weights.to(v.dtype) @ v_
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *qkv, bias = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in qkv]
        for head in range(grad.shape[2]):
            q, k, v, g = (x[:, :, head] for x in (*qkv, grad))
            weights = Attended.attention(q, k, bias)
            grads[2][:, :, head] = drop(weights, ctx.p, ctx.seed + head).to(g.dtype).mT @ g
            flow = drop((g @ v.mT).to(weights.dtype), ctx.p, ctx.seed + head, overwrite=True)
            # Softmax, backwards: dL/dscore_k = a_k (dL/da_k - sum_j a_j dL/da_j).
            flow = torch.ops.aten._softmax_backward_data(flow, weights, -1, weights.dtype).to(q.dtype)
            grads[0][:, :, head] = flow @ k
            grads[1][:, :, head] = flow.mT @ q
        for of in grads[:2]:
            of *= of.shape[-1] ** -0.5
        return *grads, None, None


class Dropout(nn.Dropout):
    """`nn.Dropout`, of x or of relu(x)."""

    def forward(self, x, relu=False):
        """x of any shape and floating dtype -> the same, relu(x) if asked for, with dropout in training. The ReLU overwrites x
        where no gradient is asked for."""
        if drops_natively(self, self.p, x):
            return Dropped.apply(x, self.p, relu)
        return super().forward(F.relu(x, inplace=not x.requires_grad) if relu else x)


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention`, batch first, that returns no weights."""

    def __init__(self, d, heads, dropout):
        super().__init__(d, heads, dropout, batch_first=True)

    def forward(self, query, key, value, key_padding_mask=None, attn_mask=None):
        """query [B, Q, d], key and value [B, S, d] -> [B, Q, d]. key_padding_mask [B, S], attn_mask [Q, S]: bool, True =
        not attended to; something must be left for each query."""
        if not drops_natively(self, self.dropout, query):
            return super().forward(query, key, value, key_padding_mask, need_weights=False, attn_mask=attn_mask)[0]
        q, k, v = (F.linear(x, w, b).unflatten(-1, (self.num_heads, -1)) for x, w, b in zip(
            (query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)))
        bias = q.new_zeros(1, 1, 1)
        if key_padding_mask is not None:
            bias = bias.masked_fill(key_padding_mask[:, None], -math.inf)
        if attn_mask is not None:
            bias = bias.masked_fill(attn_mask, -math.inf)
        return self.out_proj(Attended.apply(q, k, v, bias, self.dropout).flatten(2))
