"""Multi-scale deformable attention (Zhu et al. 2021, Eq. 3): every query reads a few points instead of all tokens.

    MSDA(z_q, p_q, x) = sum_m W_m [ sum_l sum_k A_mlqk * W'_m x^l( phi_l(p_q) + dp_mlqk ) ]

m counts heads, l feature levels, k points; x^l(...) reads level l bilinearly. Read `msda_grid_sample` first: it is the
definition. `msda` checks its arguments and chooses who computes it. `MSDeformAttn` is the layer around it: projections
in and out, offsets and weights from the query.

Shapes: B images, S tokens (all levels, level after level, rows first), Q queries, M heads, D channels a head, L levels,
P points. A location is (x, y) in [0, 1] of a level's whole map, padding included.
"""
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

from msda_cuda import cpu

# $MINDETR_MSDA=torch forces plain PyTorch; otherwise the fastest that this machine can run is used.
BACKEND = os.environ.get("MINDETR_MSDA", "fastest")
if BACKEND not in ("fastest", "torch"):
    raise SystemExit(f"error: MINDETR_MSDA={BACKEND}: it must be 'torch' or 'fastest'")


# ============================================================================================== the operator, plain

def msda_grid_sample(value, shapes, locations, weights):
    """The definition, by `F.grid_sample`. Arguments and result as in `msda`."""
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


def msda(value, shapes, locations, weights):
    """Multi-scale deformable attention's core: bilinear reads, weighted and summed over levels and points.

    Args:
        value: [B, S, M, D], S the sum of h * w over the levels.
        shapes: the levels' sizes, a list of L pairs (h, w).
        locations: [B, Q, M, L, P, 2], (x, y) in [0, 1]; outside, the map reads as zero.
        weights: [B, Q, M, L, P], summing to 1 over L and P.

    Returns [B, Q, M*D]. Raises ValueError when the shapes do not fit together.
    """
    tokens = sum(h * w for h, w in shapes)
    if value.dim() != 4 or value.shape[1] != tokens:
        raise ValueError(f"value is {tuple(value.shape)}: it must be [B, S, M, D] with S = {tokens}, the sum of h * w "
                         f"over the levels {list(shapes)}")
    B, _, M, _ = value.shape
    if locations.dim() != 6 or locations.shape[0] != B or locations.shape[2:4] != (M, len(shapes)) \
            or locations.shape[5] != 2:
        raise ValueError(f"locations are {tuple(locations.shape)}: they must be [B={B}, Q, M={M}, L={len(shapes)}, P, 2]")
    if weights.shape != locations.shape[:5]:
        raise ValueError(f"weights are {tuple(weights.shape)}: they must be {tuple(locations.shape[:5])}, as locations")
    if value.device.type == "cpu" and BACKEND != "torch" and cpu.library():
        dtype = torch.promote_types(value.dtype, torch.float32)       # half precision is computed in float32
        return cpu.MSDA.apply(value.to(dtype), shapes, locations.to(dtype), weights.to(dtype)).to(value.dtype)
    return msda_grid_sample(value, shapes, locations, weights)


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
        offset = self.sampling_offsets(query).view(B, Q, M, L, P, 2)
        weights = self.attention_weights(query).view(B, Q, M, L * P).softmax(-1).view(B, Q, M, L, P)
        centre = reference[:, :, None, :, None, :2]
        if reference.shape[-1] == 2:                                                # an offset is counted in cells
            size = torch.tensor([(w, h) for h, w in shapes], device=query.device).to(offset)
            locations = centre + offset / size[:, None]
        else:                                                     # P offsets span half the box: offset / P * (w, h) / 2
            locations = centre + offset / P * reference[:, :, None, :, None, 2:] * 0.5
        return self.output_proj(msda(value, shapes, locations, weights))
