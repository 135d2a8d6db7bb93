"""The operator in plain PyTorch, for where nothing can be compiled: each output is a weighted sum of rows of the value.

A row is one token's D channels of one head; a (query, head) sums 4 * L * P of them, as `F.embedding_bag` does, which
needs neither the value laid out anew nor every sample in memory as `F.grid_sample` does. Backward, the same sum runs
from queries to tokens: sorted by row, the samples of a token are a bag of queries.
"""
import torch
import torch.nn.functional as F

CHUNK = 1024                                      # queries at a time: what they need stays in a processor's cache


def samples(shapes, offsets, logits, reference):
    """Rows and weights of an image's queries.

    Args: offsets [Q, M, L, P, 2], logits [Q, M, L, P], reference [Q, L, 2 or 4].

    Returns row [Q, M, L, P, 2, 2] of value.view(S * M, D), int32 (the last two: upper or lower, left or right corner);
    a [Q, M, L, P] attention weights; wy, wx [Q, M, L, P, 2], linear weights of upper and lower, left and right; near
    [Q, M, L, P, 2], y and x: 1 where a corner may exist, else 0; step [Q, L, P, 2], pixels that an offset of 1 moves.
    """
    M, L, P = offsets.shape[1:4]
    size = torch.tensor([(w, h) for h, w in shapes], device=offsets.device)[:, None]                       # [L, 1, 2]
    start = torch.tensor([sum(h * w for h, w in shapes[:l]) for l in range(L)], device=offsets.device).view(L, 1)
    a = logits.flatten(2).softmax(-1).view(logits.shape)
    centre = reference[:, None, :, None]
    step = torch.ones_like(centre[..., :2]) if centre.shape[-1] == 2 else centre[..., 2:] * size * (0.5 / P)
    xy = centre[..., :2] * size + offsets * step - 0.5
    near = ((xy > -1) & (xy < size)).all(-1, keepdim=True)                                       # NaN is not near
    xy = torch.where(near, xy, 0)
    low = xy.floor()
    fraction = xy - low
    corner = torch.stack([low, low + 1], -1)                                                     # [Q, M, L, P, (x, y), 2]
    exists = (corner >= 0) & (corner < size[..., None]) & near[..., None]
    wx, wy = (torch.stack([1 - fraction, fraction], -1) * exists).unbind(-2)
    x, y = torch.minimum(corner.clamp(min=0), size[..., None] - 1).int().unbind(-2)
    token = (start.int()[..., None] + y * size[..., :1].int())[..., None] + x[..., None, :]
    row = token * M + torch.arange(M, device=token.device, dtype=torch.int32).view(M, 1, 1, 1, 1)
    return row, a, wy, wx, exists.to(a), step


def widened(*tensors):
    """Half precision is computed in float32."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def forward(value, shapes, offsets, logits, reference):
    """out [B, Q, M*D], by `F.embedding_bag`; arguments as in op.py."""
    M, D = value.shape[2:]
    out = value.new_empty(*offsets.shape[:2], M * D)
    value, offsets, logits, reference = widened(value, offsets, logits, reference)
    for b, table in enumerate(value.flatten(1, 2)):
        for q in range(0, offsets.shape[1], CHUNK):
            some = slice(q, q + CHUNK)
            row, a, wy, wx, _, _ = samples(shapes, offsets[b, some], logits[b, some], reference[b, some])
            weight = (a[..., None] * wy)[..., None] * wx[..., None, :]
            sums = F.embedding_bag(row.flatten(0, 1).flatten(1), table, per_sample_weights=weight.flatten(0, 1).flatten(1),
                                   mode="sum")
            out[b, some] = sums.view(-1, M * D)
    return out


def backward(grad_out, value, shapes, offsets, logits, reference, of_reference):
    """The gradients of value, offsets, logits, and of reference or None; of each in its dtype."""
    dtypes = value.dtype, offsets.dtype, logits.dtype
    grad_out, value, offsets, logits, reference = widened(grad_out, value, offsets, logits, reference)
    (B, Q, M, L, P, _), D = offsets.shape, value.shape[3]
    K = 4 * L * P
    size = torch.tensor([(w, h) for h, w in shapes], device=value.device)[:, None]
    grads = [torch.zeros_like(t) for t in (value, offsets, logits, reference)]
    for b in range(B if Q else 0):
        table, g = value[b].flatten(0, 1), grad_out[b].reshape(Q * M, D)
        rows, weights = [], []
        for q in range(0, Q, CHUNK // 8):
            some = slice(q, q + CHUNK // 8)
            row, a, wy, wx, exists, step = samples(shapes, offsets[b, some], logits[b, some], reference[b, some])
            rows.append(row.view(-1, K))
            bilinear = wy[..., None] * wx[..., None, :]
            weights.append((a[..., None, None] * bilinear).view(-1, K))
            read = table.index_select(0, rows[-1].flatten()).view(-1, K, D)
            dot = torch.bmm(read, g.view(Q, M, D)[some].reshape(-1, D, 1)).view(bilinear.shape)
            # dL/da, and dL/dpixel: to the right means less of the left corners and more of the right ones.
            grad_a = (dot * bilinear).sum((-1, -2))
            slope = torch.tensor([-1.0, 1.0], device=value.device).to(dot)
            grad_x = (dot * wy[..., None] * (slope * exists[..., 0, :])[..., None, :]).sum((-1, -2))
            grad_y = (dot * (slope * exists[..., 1, :])[..., None] * wx[..., None, :]).sum((-1, -2))
            grad_pixel = torch.stack([grad_x, grad_y], -1) * a[..., None]
            still = grad_pixel == 0                       # sends nothing back, though its offset or reference be infinite
            grads[1][b, some] = (grad_pixel * step).masked_fill(still, 0)
            mean = (a * grad_a).sum((-1, -2), keepdim=True)
            grads[2][b, some] = a * (grad_a - mean)
            if of_reference:
                grads[3][b, some, :, :2] = (grad_pixel * size).sum((1, 3))
                if reference.shape[-1] == 4:
                    grad_size = grad_pixel * offsets[b, some] * size * (0.5 / P)
                    grads[3][b, some, :, 2:] = grad_size.masked_fill(still, 0).sum((1, 3))
        row, order = torch.cat(rows).flatten().sort()
        first = torch.searchsorted(row, torch.arange(len(table), device=row.device, dtype=torch.int32), out_int32=True)
        weight = torch.cat(weights).flatten()[order]
        sums = F.embedding_bag((order // K).int(), g, first, per_sample_weights=weight, mode="sum")
        grads[0][b] = sums.view(value[b].shape)
    return *(grad.to(dtype) for grad, dtype in zip(grads, dtypes)), grads[3] if of_reference else None
