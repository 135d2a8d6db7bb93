"""Masks: DETR's head that draws each query's object, its losses, and what becomes of its answers.

A query's attention to the memory says roughly where its object is; convolutions that read ever
finer maps of the backbone sharpen that to stride 4 (Carion 2020, section 4.4). `instance_masks` are
the answer for things; `merge` makes one panoptic map of things and stuff (grass, sky; Kirillov
2019), which scores.py judges. Shapes: B images, Q queries, K masks, h x w cells.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as rle
from torch import nn
from torchvision.ops import sigmoid_focal_loss

SURE, SPECK = 0.85, 4  # of a panoptic map: the least score, and the largest area to drop, in pixels


class MaskHead(nn.Module):
    """Draws what a query has found. channels: of the backbone's maps C2 to C5."""

    def __init__(self, cfg, channels):
        super().__init__()
        d, self.heads = cfg.d_model, cfg.heads
        widths = [d + cfg.heads, d // 2, d // 4, d // 8, d // 16]
        self.q_linear, self.k_linear = nn.Linear(d, d), nn.Linear(d, d)
        self.lay = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1)
                                 for a, b in zip([widths[0], *widths], widths))
        self.gn = nn.ModuleList(nn.GroupNorm(math.gcd(8, width), width) for width in widths)
        self.adapter = nn.ModuleList(nn.Conv2d(a, b, 1)  # of C4, C3 and C2
                                     for a, b in zip(channels[2::-1], widths[1:]))
        self.out_lay = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for name, p in self.named_parameters():
            if p.dim() == 4:
                nn.init.kaiming_uniform_(p, a=1)
            elif "gn" not in name:
                nn.init.xavier_uniform_(p) if p.dim() == 2 else nn.init.zeros_(p)

    def forward(self, states, memory, image, query):
        """The last layer's states [B, Q, d] -> mask logits [K, h, w] of the padded images, for K
        pairs of image [K] and query [K]: training needs only those that own a target. Whatever
        autocast has made half is float32 here."""
        tokens, *fine, projected = (x.to(self.out_lay.weight)
                                    for x in (memory.tokens, *memory.maps))
        (_, d, h, w), heads = projected.shape, self.heads
        q, k = (x.unflatten(-1, (heads, -1)) for x in (
            self.q_linear(states[image, query].to(tokens)), self.k_linear(tokens)[image]))
        scores = torch.einsum("kmc,ksmc->kms", q * (d // heads) ** -0.5, k)
        scores = scores.masked_fill(memory.mask[image][:, None], torch.finfo(scores.dtype).min)
        # One softmax over heads and pixels together, as published.
        seen = scores.flatten(1).softmax(-1).view(-1, heads, h, w)
        # The first convolution reads C5 and attention, concatenated. Its sum over channels is cut
        # in two, as C5 is the same for all queries of an image: 8 channels a query, not 264.
        first = self.lay[0]
        x = F.conv2d(projected, first.weight[:, :d], first.bias, padding=1)[image]
        x = self.lay[1](F.relu(self.gn[0](x + F.conv2d(seen, first.weight[:, d:], padding=1))))
        for i, adapter in enumerate(self.adapter):
            finer, x = adapter(fine[2 - i])[image], F.relu(self.gn[1 + i](x))
            x = self.lay[2 + i](finer + F.interpolate(x, finer.shape[2:]))
        return self.out_lay(F.relu(self.gn[-1](x)))[:, 0]


def mask_losses(draw, targets, image, query, target, count):
    """Focal loss, the mean over pixels, and dice loss (Milletari 2016), summed over K pairs, by
    `count` -> {"mask": [1], "dice": [1]}. image, query, target [K]: who owns which of the targets'
    masks [G, H, W]. draw(image, query) is enlarged to the padded images; padding is background."""
    H, W = (max(t["masks"].shape[side] for t in targets) for side in (1, 2))
    wanted = [F.pad(m, (0, W - m.shape[2], 0, H - m.shape[1])) for m in (
        t["masks"] for t in targets)]
    offset = torch.tensor([0, *map(len, wanted)], device=target.device).cumsum(0)
    x = F.interpolate(draw(image, query)[:, None], (H, W), mode="bilinear").flatten(1)
    wanted = torch.cat(wanted)[offset[image] + target].to(x).flatten(1)
    p = x.sigmoid()
    dice = 1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)
    focal = sigmoid_focal_loss(x, wanted, 0.25, 2).mean(1)
    return {"mask": focal.sum()[None] / count, "dice": dice.sum()[None] / count}


# ==================================================================================== answers

def enlarged(logits, own):
    """Logits [K, h, w] of an image in a batch -> [K, *own], its (h, w) there. Padding is cut off
    before: the published code, which squeezes it in, is right for one image at a time."""
    h, w = (-(-side // 4) for side in own)
    return F.interpolate(logits[:, None, :h, :w], own, mode="bilinear")[:, 0]


def instance_masks(logits, own, size):
    """Logits [K, h, w] -> K masks of the original image's `size` (h, w) as COCO's RLE."""
    inside = F.interpolate((enlarged(logits, own) > 0)[:, None].to(torch.uint8), size)[:, 0]
    coded = rle.encode(np.asfortranarray(inside.permute(1, 2, 0).cpu().numpy()))
    return [one | {"counts": one["counts"].decode()} for one in coded]


def merge(labels, logits, own, size, things):
    """Every pixel to the largest of the logits [K, h, w] -> a map int32 of `size` and {its number:
    label}. labels [K]; of those not among `things`, stuff, an image has one segment each."""
    labels, logits, first = labels.tolist(), enlarged(logits, own), {}
    to = [k if label in things else first.setdefault(label, k) for k, label in enumerate(labels)]
    while labels:
        best = torch.tensor(to, device=logits.device)[logits.argmax(0)].int().cpu().numpy()
        best = np.asarray(Image.fromarray(best).resize(size[::-1], Image.NEAREST))
        kept = np.bincount(best.ravel(), minlength=len(labels)) > SPECK
        if kept.all():
            return best, dict(enumerate(labels))
        labels, logits = [x for x, k in zip(labels, kept) if k], logits[torch.from_numpy(kept)]
        to = range(len(labels))  # joined once, as published: the joined have no area left
    return np.zeros(size, np.int32), {}
