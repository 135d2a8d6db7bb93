"""The operator in plain PyTorch, for where nothing can be compiled: each output is a weighted sum of rows of the value.

A row is one token's D channels of one head; a (query, head) sums 4 * L * P of them, as `F.embedding_bag` does, which
needs neither the value laid out anew nor every sample in memory as `F.grid_sample` does. Backward, the same sum runs
from queries to tokens: of each head, sorted by token, the samples of a token are a bag of queries.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

CHUNK = 512              # queries at a time: enough for every core, few enough for a processor's cache
READ = 128               # of them at a time where backward copies the rows themselves, which are D times as much


class Samples(NamedTuple):
    """What n queries of an image read, K = L * P points each. [n, M, K] but for `token`, which is [n, M, K, 4]."""
    token: torch.Tensor                # of 0..S - 1, int32: upper left, upper right, lower left, lower right
    a: torch.Tensor                    # attention weights
    wx: tuple                          # linear weights of the left and right column, 0 where there is none
    wy: tuple                          # and of the upper and lower row
    x_exists: tuple                    # 1 where there is a left, a right column, else 0
    y_exists: tuple
    steps: tuple                       # [n, 1, K] or 1, for x and for y: pixels that an offset of 1 moves the point

    def rows(self):
        """[n, M, K, 4] of value.view(S * M, D)."""
        M = self.token.shape[1]
        head = torch.arange(M, device=self.token.device, dtype=torch.int32).view(M, 1, 1)
        return torch.add(head, self.token, alpha=M)

    def weights(self):
        """[n, M, K, 4] of the rows: bilinear times attention."""
        return torch.stack([self.a * y * x for y in self.wy for x in self.wx], -1)


def samples(shapes, offsets, logits, reference):
    """Where the queries look. Args: offsets [n, M, L, P, 2], logits [n, M, L, P], reference [n, L, 2 or 4]."""
    P = logits.shape[-1]
    levels = torch.tensor([(w, h, sum(a * b for a, b in shapes[:l])) for l, (h, w) in enumerate(shapes)],
                          device=logits.device).repeat_interleave(P, 0)                                    # [K, 3]
    reference = reference.repeat_interleave(P, 1)[:, None]                                          # [n, 1, K, 2 or 4]
    places, steps = [], []
    for axis in (0, 1):
        size = levels[:, axis]
        step = 1 if reference.shape[-1] == 2 else reference[..., 2 + axis] * size * (0.5 / P)
        places.append(reference[..., axis] * size + offsets[..., axis].flatten(2) * step - 0.5)
        steps.append(step)
    near = (places[0] > -1) & (places[1] > -1) & (places[0] < levels[:, 0]) & (places[1] < levels[:, 1])   # not NaN
    columns = []
    for axis in (0, 1):
        place = places[axis].where(near, 0)
        low, last = place.floor(), levels[:, axis] - 1
        exists = ((low >= 0) & near).to(place), ((low < last) & near).to(place)
        index = low.clamp(min=0).int(), torch.minimum(low + 1, last).int()
        columns.append((index, exists, ((1 - (place - low)) * exists[0], (place - low) * exists[1])))
    (x, x_exists, wx), (y, y_exists, wy) = columns
    w, start = levels[:, 0].int(), levels[:, 2].int()
    token = torch.stack([start + j * w + i for j in y for i in x], -1)
    return Samples(token, logits.flatten(2).softmax(-1), wx, wy, x_exists, y_exists, tuple(steps))


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
            s = samples(shapes, offsets[b, some], logits[b, some], reference[b, some])
            sums = F.embedding_bag(s.rows().flatten(0, 1).flatten(1), table, mode="sum",
                                   per_sample_weights=s.weights().flatten(0, 1).flatten(1))
            out[b, some] = sums.view(-1, M * D)
    return out


def backward(grad_out, value, shapes, offsets, logits, reference, of_reference):
    """The gradients of value, offsets, logits, and of reference or None; of each in its dtype."""
    dtypes = value.dtype, offsets.dtype, logits.dtype
    grad_out, value, offsets, logits, reference = widened(grad_out, value, offsets, logits, reference)
    (B, Q, M, L, P, _), (_, S, _, D) = offsets.shape, value.shape
    N = 4 * L * P                                                       # rows that a query reads for a head
    every_token = torch.arange(S, device=value.device, dtype=torch.int32)
    size = torch.tensor([(w, h) for h, w in shapes], device=value.device)[:, None]
    # Allocated once: fresh pages would cost more than what is written to them.
    tokens = torch.empty(M, Q, N, device=value.device, dtype=torch.int32)
    weights, scratch = value.new_empty(M, Q, N), value.new_empty(min(READ, Q) * M * N, D)
    grads = [torch.zeros_like(t) for t in (value, offsets, logits, reference)]
    for b in range(B if Q else 0):
        table, grad = value[b].flatten(0, 1), grad_out[b].reshape(Q, M, D)
        for q in range(0, Q, CHUNK):
            some = slice(q, q + CHUNK)
            s = samples(shapes, offsets[b, some], logits[b, some], reference[b, some])
            tokens[:, some] = s.token.flatten(2).transpose(0, 1)
            weights[:, some] = s.weights().flatten(2).transpose(0, 1)
            parts = []                                      # the gradient of a row's weight: the row times the output's
            for row, g in zip(s.rows().split(READ), grad[some].split(READ)):
                read = torch.index_select(table, 0, row.flatten(), out=scratch[:row.numel()]).view(-1, M, N, D)
                parts.append(read.mul_(g[:, :, None]).sum(-1))
            dot = torch.cat(parts).view(s.token.shape).unbind(-1)
            left, right = (dot[i] * s.wy[0] + dot[i + 2] * s.wy[1] for i in (0, 1))
            upper, lower = (dot[i] * s.wx[0] + dot[i + 1] * s.wx[1] for i in (0, 2))
            grad_a = left * s.wx[0] + right * s.wx[1]
            # To the right means less of the left corners and more of the right ones.
            grad_pixel = ((right * s.x_exists[1] - left * s.x_exists[0]) * s.a,
                          (lower * s.y_exists[1] - upper * s.y_exists[0]) * s.a)
            grads[2][b, some] = (s.a * (grad_a - (s.a * grad_a).sum(-1, keepdim=True))).view_as(grads[2][b, some])
            for axis, of_pixel in enumerate(grad_pixel):
                still = of_pixel == 0                      # sends nothing back, though its offset or reference be infinite
                of_offset = (of_pixel * s.steps[axis]).masked_fill(still, 0)
                grads[1][b, some, ..., axis] = of_offset.view(-1, M, L, P)
                if of_reference:
                    of_place = of_pixel.view(-1, M, L, P) * size[:, :, axis]
                    grads[3][b, some, :, axis] = of_place.sum((1, 3))
                    if reference.shape[-1] == 4:
                        of_size = of_place * offsets[b, some, ..., axis] * (0.5 / P)
                        grads[3][b, some, :, 2 + axis] = of_size.masked_fill(still.view_as(of_size), 0).sum((1, 3))
        for m in range(M):                                                 # a head's samples alone fit in the cache
            token, order = tokens[m].flatten().sort()
            first = torch.searchsorted(token, every_token, out_int32=True)
            weight = weights[m].flatten().index_select(0, order)
            grads[0][b, :, m] = F.embedding_bag(order.int() // N, grad[:, m].contiguous(), first, mode="sum",
                                                per_sample_weights=weight)
    return *(grad.to(dtype) for grad, dtype in zip(grads, dtypes)), grads[3] if of_reference else None
