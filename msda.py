"""Multi-scale deformable attention (Zhu et al. 2021, Eq. 3): a query reads a few points, not all.

    MSDA(z_q, p_q, x) = sum_m W_m [ sum_l sum_k A_mlqk * W'_m x^l( phi_l(p_q) + dp_mlqk ) ]

x^l(...) reads level l bilinearly: `msda_grid_sample`, at the places that `sampling` finds; `msda`
is both as one fast operator. Shapes: B images, S tokens (level after level, rows first), Q queries,
M heads, D channels a head, L levels, P points. A location is (x, y) in [0, 1] of a level's map.
"""
import functools
import math
import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from msda_cuda import cpu, cuda

# fastest: compiled code where available; native: compiled code or an error; torch: the definition.
BACKEND = os.environ.get("MINDETR_MSDA", "fastest")
if BACKEND not in ("fastest", "native", "torch"):
    raise SystemExit(f"error: MINDETR_MSDA={BACKEND}: it must be 'fastest', 'native' or 'torch'")


def msda_grid_sample(value, shapes, locations, weights):
    """The definition, from locations [B, Q, M, L, P, 2] and weights [B, Q, M, L, P]; see `msda`."""
    (B, _, M, D), (_, Q, _, _, P, _) = value.shape, locations.shape
    out = 0
    for l, x in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        x = x.permute(0, 2, 3, 1).reshape(B * M, D, *shapes[l])
        grid = 2 * locations[:, :, :, l].transpose(1, 2).reshape(B * M, Q, P, 2) - 1
        # align_corners=False: location x is pixel x * w - 0.5; 0 and 1 are edges, not centres.
        x = F.grid_sample(x, grid, align_corners=False)  # bilinear, zero outside: [B*M, D, Q, P]
        out = out + (x * weights[:, :, :, l].transpose(1, 2).reshape(B * M, 1, Q, P)).sum(-1)
    return out.view(B, M * D, Q).transpose(1, 2)


def sampling(shapes, offsets, logits, reference):
    """Where a query reads and how much: locations and weights, from `msda`'s arguments."""
    weights = logits.flatten(-2).softmax(-1).view(logits.shape)
    centre = reference[:, :, None, :, None, :2]
    if reference.shape[-1] == 2:  # an offset counts cells; torch.tensor(shapes) would synchronise
        size = torch.stack([offsets.new_full((), n) for h, w in shapes for n in (w, h)])
        return centre + offsets / size.view(-1, 1, 2), weights
    # an offset of P reaches the box's edge
    return centre + offsets / offsets.shape[4] * reference[:, :, None, :, None, 2:] * 0.5, weights


def msda(value, shapes, offsets, logits, reference):
    """Softmax, bilinear reads, weighted sum: in float32 (float64 for float64), under autocast too.

    value: [B, S, M, D], S the sum of h * w over the levels, float16, bfloat16, float32 or 64.
    shapes: the levels' sizes, a list of L pairs (h, w).
    offsets: [B, Q, M, L, P, 2], (x, y) from the reference; outside reads zero.
    logits: [B, Q, M, L, P], of the attention weights: a softmax over L and P together follows.
    reference: [B, Q, L, 2] points or [B, Q, L, 4] boxes (cx, cy, w, h), in [0, 1] of the maps.
    Returns [B, Q, M*D] in value's dtype. Raises ValueError where shapes do not fit together.
    """
    wide = torch.promote_types(value.dtype, torch.float32)
    reference = reference.to(wide)
    if offsets.dtype != value.dtype or logits.dtype != value.dtype:
        offsets, logits = offsets.to(wide), logits.to(wide)
    if BACKEND != "torch":
        inputs = value, offsets, logits, reference, tuple(n for shape in shapes for n in shape)
        # torch.compile, export and fake tensors need an operator of torch's; a Function is faster.
        if torch.compiler.is_compiling() or type(value) is not torch.Tensor or value.is_meta:
            return torch.ops.mindetr.msda(*inputs)
        way = computer(BACKEND, *inputs)
        if way:
            return Function.apply(*inputs, way)
    where = sampling(shapes, offsets.to(wide), logits.to(wide), reference)
    return msda_grid_sample(value.to(wide), shapes, *where).to(value.dtype)


def computer(backend, *inputs):
    """The module that computes msda, or None: the definition."""
    return chosen(backend, tuple(inputs[4]), *[(t.shape, t.dtype, t.device) for t in inputs[:4]])


@functools.lru_cache(1024)
def chosen(backend, shapes, *tensors):
    """`computer`, from (shape, dtype, device) of its tensors: checked and built once for each."""
    ((B, _, M, D), dtype, device), ((_, Q, _, _, P, _), dtype_o, _), _, ((*_, R), _, _) = tensors
    S, L = sum(h * w for h, w in zip(shapes[::2], shapes[1::2])), len(shapes) // 2
    must = {"value": (B, S, M, D), "offsets": (B, Q, M, L, P, 2), "logits": (B, Q, M, L, P),
            "reference": (B, Q, L, 2 if R == 2 else 4)}
    for (name, fits), (size, _, place) in zip(must.items(), tensors):
        if size != fits or place != device:  # the kernels would read what is not theirs
            raise ValueError(f"{name} is {tuple(size)} on {place}: it must be {fits} on {device}")
    try:
        way = {"cuda": cuda, "cpu": cpu}[device.type]
        way.prepare(cuda.Config(dtype, dtype_o, M, D, L, P, R), device)
        return way
    except (KeyError, OSError, RuntimeError) as error:  # KeyError: another device
        if backend == "native":
            raise OSError(f"{error}; MINDETR_MSDA=torch needs nothing compiled") from error
        warnings.warn(f"deformable attention runs by grid_sample, which is slower: {error}")


# For torch.compile, torch.export and fake tensors. `shapes` is flat: h0, w0, h1, w1, ...
INPUTS = "Tensor value, Tensor offsets, Tensor logits, Tensor reference, SymInt[] shapes"
operator = torch.library.custom_op(
    "mindetr::msda", lambda *inputs: computer("native", *inputs).forward(*inputs),
    mutates_args=(), schema=f"({INPUTS}) -> Tensor")
operator_backward = torch.library.custom_op(
    "mindetr::msda_backward", lambda g, *inputs: computer("native", *inputs).backward(g, *inputs),
    mutates_args=(), schema=f"(Tensor grad_out, {INPUTS}, bool of_reference) -> Tensor[]")
operator.register_fake(lambda value, offsets, *_: value.new_empty(
    *offsets.shape[:2], value.shape[2] * value.shape[3]))
operator_backward.register_fake(lambda g, *inputs: [
    t.new_empty(t.shape) for t in inputs[:3 + inputs[-1]]])


class Function(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return inputs[5].forward(*inputs[:5])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.shapes, *ctx.way = inputs[4:]

    @staticmethod
    def backward(ctx, grad_out):
        # With create_graph=True, too, the operator: it refuses a second derivative.
        traced = not ctx.way or torch.is_grad_enabled()
        backward = operator_backward if traced else ctx.way[0].backward
        grads = backward(grad_out, *ctx.saved_tensors, ctx.shapes, ctx.needs_input_grad[3])
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


operator.register_autograd(Function.backward, setup_context=Function.setup_context)


class MSDeformAttn(nn.Module):
    """Deformable attention's layer: offsets and weights are linear in the query (section 4.1)."""

    def __init__(self, d_model, levels, heads, points):
        super().__init__()
        self.laid_out = heads, levels, points
        self.sampling_offsets = nn.Linear(d_model, heads * levels * points * 2)
        self.attention_weights = nn.Linear(d_model, heads * levels * points)
        self.value_proj, self.output_proj = (nn.Linear(d_model, d_model) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self):
        """Initially, head m looks in direction 2 pi m / M, point k at k + 1 cells, all alike."""
        M, L, P = self.laid_out
        angle = torch.arange(M) * (2 * math.pi / M)
        square = F.normalize(torch.stack([angle.cos(), angle.sin()], -1), p=math.inf, dim=-1)
        offsets = square.view(M, 1, 1, 2) * torch.arange(1, P + 1).view(P, 1)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)
        for linear in self.children():
            nn.init.zeros_(linear.bias)
        self.sampling_offsets.bias.detach().view(M, L, P, 2).copy_(offsets)

    def read(self, memory):
        """(value [B, S, M, D], the levels' (h, w)); padding is zeroed after the projection."""
        value = self.value_proj(memory.tokens).masked_fill(memory.mask[..., None], 0)
        return value.unflatten(-1, (self.laid_out[0], -1)), memory.shapes

    def forward(self, x, pos, reference, read):
        """x and pos [B, Q, d] around reference [B, Q, L, 2 or 4] (as in `msda`) to [B, Q, d]."""
        query = x + pos
        offsets = self.sampling_offsets(query).unflatten(-1, (*self.laid_out, 2))
        logits = self.attention_weights(query).unflatten(-1, self.laid_out)
        return self.output_proj(msda(*read, offsets, logits, reference))
