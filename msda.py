"""Multi-scale deformable attention (Zhu et al. 2021, Eq. 3): every query reads a few points instead of all tokens.

    MSDA(z_q, p_q, x) = sum_m W_m [ sum_l sum_k A_mlqk * W'_m x^l( phi_l(p_q) + dp_mlqk ) ]

m counts heads, l feature levels, k points; x^l(...) reads level l bilinearly. Read `msda_grid_sample` first: it is the
definition, then `sampling`, which says where a query reads. `msda` is both as one operator, as fast as the machine can.
`MSDeformAttn` is the layer around it: projections in and out, offsets and weights from the query.

Shapes: B images, S tokens (all levels, level after level, rows first), Q queries, M heads, D channels a head, L levels,
P points. A location is (x, y) in [0, 1] of a level's whole map, padding included.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from msda_cuda import op


# ============================================================================================== the operator, plain

def msda_grid_sample(value, shapes, locations, weights):
    """The definition, by `F.grid_sample`, from locations and weights.

    Args: value [B, S, M, D], shapes the levels' (h, w), locations [B, Q, M, L, P, 2], weights [B, Q, M, L, P], all of one
    dtype. Returns [B, Q, M*D].
    """
    B, _, M, D = value.shape
    Q, P = locations.shape[1], locations.shape[4]
    out = 0
    for l, x in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        h, w = shapes[l]
        x = x.permute(0, 2, 3, 1).reshape(B * M, D, h, w)
        grid = 2 * locations[:, :, :, l].transpose(1, 2).reshape(B * M, Q, P, 2) - 1
        # align_corners=False: location x is pixel x * w - 0.5, so 0 and 1 are the map's edges, not cell centres.
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)  # [B*M, D, Q, P]
        out = out + (x * weights[:, :, :, l].transpose(1, 2).reshape(B * M, 1, Q, P)).sum(-1)
    return out.view(B, M * D, Q).transpose(1, 2)


def sampling(shapes, offsets, logits, reference):
    """Where a query reads and how much: locations and weights, as in `msda_grid_sample`; arguments as in `msda`."""
    weights = logits.flatten(-2).softmax(-1).view(logits.shape)
    centre = reference[:, :, None, :, None, :2]
    if reference.shape[-1] == 2:                                                    # an offset is counted in cells
        size = torch.tensor([(w, h) for h, w in shapes], device=offsets.device).to(offsets)
        return centre + offsets / size[:, None], weights
    # P offsets span half the box: offset / P * (w, h) / 2
    return centre + offsets / offsets.shape[4] * reference[:, :, None, :, None, 2:] * 0.5, weights


def msda(value, shapes, offsets, logits, reference):
    """Multi-scale deformable attention's core, from raw offsets and logits: softmax, bilinear reads, weighted sum.

    Locations, softmax and sums are computed in float32 (float64 for a float64 value), whatever precision comes in, and so
    under autocast too. Who computes it: see msda_cuda/op.py; $MINDETR_MSDA=torch forces the definition above.

    Args:
        value: [B, S, M, D], S the sum of h * w over the levels; float16, bfloat16, float32 or float64.
        shapes: the levels' sizes, a list of L pairs (h, w).
        offsets: [B, Q, M, L, P, 2], (x, y) from the reference; outside, the map reads as zero, and NaN is outside.
        logits: [B, Q, M, L, P], of the attention weights: a softmax over L and P together follows.
        reference: [B, Q, L, 2] points or [B, Q, L, 4] boxes (cx, cy, w, h), in [0, 1] of each level's whole map.

    Returns [B, Q, M*D] in value's dtype. Raises ValueError when the arguments do not fit together.
    """
    wide = torch.promote_types(value.dtype, torch.float32)
    reference = reference.to(wide)
    if offsets.dtype != value.dtype or logits.dtype != value.dtype:
        offsets, logits = offsets.to(wide), logits.to(wide)
    if op.BACKEND != "torch":
        return torch.ops.mindetr.msda(value, offsets, logits, reference, [n for shape in shapes for n in shape])
    op.check(value, shapes, offsets, logits, reference)
    locations, weights = sampling(shapes, offsets.to(wide), logits.to(wide), reference)
    return msda_grid_sample(value.to(wide), shapes, locations, weights).to(value.dtype)


# ============================================================================================== the layer around it

class MSDeformAttn(nn.Module):
    """Deformable attention's layer: offsets and weights are linear in the query (Zhu et al. 2021, section 4.1)."""

    def __init__(self, d_model, levels, heads, points):
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = nn.Linear(d_model, heads * levels * points * 2)    # laid out [head, level, point, (x, y)]
        self.attention_weights = nn.Linear(d_model, heads * levels * points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self):
        """At first head m looks in direction 2 pi m / M, point k at k + 1 cells, all points weighing the same."""
        M = self.heads
        angle = torch.arange(M) * (2 * math.pi / M)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)                            # on the unit square
        steps = torch.arange(1, self.points + 1).view(1, 1, -1, 1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            bias = direction.view(M, 1, 1, 2) * steps
            self.sampling_offsets.bias.copy_(bias.expand(M, self.levels, self.points, 2).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def project(self, tokens, mask):
        """Tokens [B, S, d] and padding mask [B, S] to values [B, S, M, D]; padding is zeroed after the projection."""
        value = self.value_proj(tokens).masked_fill(mask[..., None], 0)
        return value.unflatten(-1, (self.heads, -1))

    def forward(self, query, reference, value, shapes):
        """Attend around reference points or boxes.

        Args:
            query: [B, Q, d], position encoding included.
            reference: [B, Q, L, 2] points or [B, Q, L, 4] boxes (cx, cy, w, h), in [0, 1] of each level's whole map.
            value: [B, S, M, D] from `project`.
            shapes: the levels' (h, w).
        """
        B, Q, _ = query.shape
        M, L, P = self.heads, self.levels, self.points
        offsets = self.sampling_offsets(query).view(B, Q, M, L, P, 2)
        logits = self.attention_weights(query).view(B, Q, M, L, P)
        return self.output_proj(msda(value, shapes, offsets, logits, reference))
