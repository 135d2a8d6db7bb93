"""Dropout that costs a CPU less than torch's: alone, after a ReLU, and inside of attention."""
import math

import torch
import torch.nn.functional as F
from torch import nn


class Dropped(torch.autograd.Function):
    """Each element of x dropped with probability p, the others / (1 - p), on a CPU; with `relu`, after a ReLU.

    torch draws 64 random bits an element there, one after the other, and keeps a float of each for the backward pass. Here
    16 bits are drawn (p is rounded to a multiple of 2^-16) and a bool is kept. After a ReLU nothing is kept but the output,
    which the next layer keeps anyway: gradients pass where it is above 0.
    """

    @staticmethod
    def forward(ctx, x, p, relu):
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None)
        kept = words.view(torch.int16)[:x.numel()].view(x.shape) >= round(p * 2 ** 16) - 2 ** 15
        ctx.scale, ctx.relu = 1 / (1 - p), relu
        y = torch.where(kept, x, 0).mul_(ctx.scale)
        ctx.save_for_backward(y.relu_() if relu else kept)
        return y

    @staticmethod
    def backward(ctx, grad):
        passed, = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, passed, 0) if ctx.relu else torch.where(passed, grad, 0)
        return grad.mul_(ctx.scale), None, None


class Dropout(nn.Dropout):
    """`nn.Dropout`, of x or of relu(x)."""

    def forward(self, x, relu=False):
        """x of any shape and floating dtype -> the same, relu(x) if asked for, with dropout in training. The ReLU overwrites x
        where no gradient is asked for."""
        if self.training and 0 < self.p < 1 and x.device.type == "cpu":
            return Dropped.apply(x, self.p, relu)
        return super().forward(F.relu(x, inplace=not x.requires_grad) if relu else x)


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention`, batch first, that returns no weights. Where dropout keeps a CPU from torch's fast attention,
    head comes after head: one head's scores stay in the cache, and the next head uses their memory again."""

    def __init__(self, d, heads, dropout):
        super().__init__(d, heads, dropout, batch_first=True)

    def forward(self, query, key, value, key_padding_mask=None, attn_mask=None):
        """query [B, Q, d], key and value [B, S, d] -> [B, Q, d]. key_padding_mask [B, S], attn_mask [Q, S]: bool, True =
        not attended to."""
        if not (self.training and 0 < self.dropout < 1 and query.device.type == "cpu"):
            return super().forward(query, key, value, key_padding_mask, need_weights=False, attn_mask=attn_mask)[0]
        bias = query.new_zeros(1, 1, 1)
        if key_padding_mask is not None:
            bias = bias.masked_fill(key_padding_mask[:, None], -math.inf)
        if attn_mask is not None:
            bias = bias.masked_fill(attn_mask, -math.inf)
        projected = (F.linear(x, w, b).unflatten(-1, (self.num_heads, -1)).unbind(2) for x, w, b in zip(
            (query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)))
        heads = (Dropped.apply(torch.baddbmm(bias, q, k.mT, alpha=self.head_dim ** -0.5).softmax(-1), self.dropout, False) @ v
                 for q, k, v in zip(*projected))
        return self.out_proj(torch.cat(list(heads), -1))
