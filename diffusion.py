"""Boxes to noisy queries and back: one idea, from one step of noise to a hundred.

Training a decoder to turn a noised ground-truth box back into the box was first a training aid, then the detector:

    DN-DETR (Li 2022)       one small step of noise, in groups of extra queries that inference drops
    DINO (Zhang 2023)       the same with contrast: a second, farther copy of every box must be rejected (CDN)
    DiffuDETR (ICLR 2026)   T = 100 steps, down to pure noise: the references of *all* queries are the noised boxes, and
                            inference starts from noise and walks back with DDIM in a few decoder evaluations

Read in that order: denoising queries, the schedule, forward noising, the sampler.

Boxes are cx, cy, w, h in [0, 1]. Shapes: B images, Q queries, P denoising slots, T timesteps, S evaluations.
"""
import math
from typing import NamedTuple

import torch

from variants import ConfigError


# ===================================================================================== DN and CDN: one step of noise

class Denoising(NamedTuple):
    """Denoising queries of a batch, and what they should become."""
    labels: torch.Tensor      # [B, P] noised labels
    boxes: torch.Tensor       # [B, P, 4] noised boxes; 0.5 in unused slots
    used: torch.Tensor        # [B, P] bool: the slot holds a noised target
    pairs: tuple              # (image [K], slot [K], target [K]): slots to reconstruct; target counts within its image
    blocked: torch.Tensor     # [P + Q, P + Q] bool: True = may not attend
    groups: int
    contrastive: bool         # False: only the pairs are supervised. True: all other slots must say "no object"


def denoising_queries(targets, cfg, num_queries, generator=None):
    """DN-DETR's noised groups (section 4) or, for cfg.denoising == "cdn", DINO's contrastive ones (section 3.3).

    A group holds every target of an image once (dn), or twice: slots [0, G) near the target and to be reconstructed,
    slots [G, 2G) farther away and to be rejected (cdn), where G is the most targets of any image in the batch.
    num_queries matching queries follow them. Without any target P is 0, and all downstream is empty but well-formed.
    """
    device = targets[0]["boxes"].device
    counts = [len(t["labels"]) for t in targets]
    labels, boxes = torch.cat([t["labels"] for t in targets]), torch.cat([t["boxes"] for t in targets])     # [N], [N, 4]
    image = torch.cat([torch.full((n,), b) for b, n in enumerate(counts)]).to(device)                       # [N]
    position = torch.cat([torch.arange(n) for n in counts]).to(device)
    most = max(counts)
    contrastive = cfg.denoising == "cdn"
    groups = max(1, cfg.dn_queries // max(most, 1)) if contrastive else cfg.dn_groups

    copies = groups * (1 + contrastive)                          # copy = group, or 2 * group + (1 if negative else 0)
    copy = torch.arange(copies, device=device)
    image, target = image.repeat(copies), position.repeat(copies)                                           # [copies*N]
    slot = (copy[:, None] * most + position).flatten()
    negative = (contrastive & (copy[:, None] % 2 == 1)).expand(-1, len(labels)).flatten()

    labels, boxes = labels.repeat(copies), boxes.repeat(copies, 1)
    flip = torch.rand(labels.shape, generator=generator, device=device) < cfg.label_noise
    random = torch.randint(0, cfg.num_classes, labels.shape, generator=generator, device=device)
    labels = torch.where(flip, random, labels)
    if contrastive:
        boxes = move_corners(boxes, negative, cfg.box_noise, generator)
    else:
        boxes = move_centre_and_size(boxes, cfg.box_noise, generator)

    B, P = len(targets), copies * most
    slot_labels = labels.new_zeros(B, P)
    slot_labels[image, slot] = labels
    slot_boxes = boxes.new_full((B, P, 4), 0.5)
    slot_boxes[image, slot] = boxes
    used = torch.zeros(B, P, dtype=torch.bool, device=device)
    used[image, slot] = True
    pairs = (image[~negative], slot[~negative], target[~negative])
    return Denoising(slot_labels, slot_boxes, used, pairs, group_mask(groups, P // groups, num_queries, device),
                     groups, contrastive)


def move_centre_and_size(boxes, scale, generator=None):
    """DN-DETR's box noise: centre and size move by up to scale * (w/2, h/2, w, h). Boxes [N, 4]; clamped to [0, 1]."""
    reach = torch.cat([boxes[:, 2:] / 2, boxes[:, 2:]], -1)
    shift = torch.rand(boxes.shape, generator=generator, device=boxes.device, dtype=boxes.dtype) * 2 - 1
    return (boxes + shift * reach * scale).clamp(0, 1)


def move_corners(boxes, negative, scale, generator=None):
    """DINO's box noise: corners move by +- part * scale * (w/2, h/2), part in [0, 1), or [1, 2) for negatives.

    Boxes [N, 4] and negative [N]; corners are clamped to [0, 1].
    """
    sign = torch.randint(0, 2, boxes.shape, generator=generator, device=boxes.device) * 2 - 1
    part = torch.rand(boxes.shape, generator=generator, device=boxes.device, dtype=boxes.dtype)
    half = boxes[:, 2:].repeat(1, 2) / 2
    corners = torch.cat([boxes[:, :2] - half[:, :2], boxes[:, :2] + half[:, :2]], -1)
    corners = (corners + sign * (part + negative[:, None]) * half * scale).clamp(0, 1)
    return torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], -1)


def group_mask(groups, group_size, num_queries, device=None):
    """Self-attention's mask [P + Q, P + Q], True = may not attend, denoising slots first (DN-DETR, Eq. 8).

    Matching queries must not see denoising ones, or the answer would leak; groups must not see each other. Denoising
    queries do see the matching ones: those know nothing about the targets.
    """
    P = groups * group_size
    group = torch.arange(P, device=device) // max(group_size, 1)
    blocked = torch.zeros(P + num_queries, P + num_queries, dtype=torch.bool, device=device)
    blocked[:P, :P] = group[:, None] != group
    blocked[P:, :P] = True
    return blocked


# ======================================================================================== DiffuDETR: the noise schedule

def signal_rates(schedule, timesteps):
    """alpha-bar [T] in float64: x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) noise (Ho et al. 2020, Eq. 4).

    cosine: Nichol & Dhariwal 2021, s = 0.008, betas at most 0.999; ends at 2.4e-7 for T = 100.
    linear: sqrt(beta) evenly spaced from 1e-2 to 1.41e-1; ends at 0.485, so that pure noise is not what x_T looks like.
    sqrt:   beta = sqrt of evenly spaced 1e-4 to 2e-2; ends at 4.6e-5.
    linear and sqrt are the published code's, which calls them so. Raises ConfigError on another name.
    """
    if schedule == "cosine":
        f = torch.cos((torch.linspace(0, 1, timesteps + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    elif schedule == "linear":
        betas = torch.linspace(1e-4 ** 0.5, 2e-2 ** 0.5, timesteps, dtype=torch.float64) ** 2
    elif schedule == "sqrt":
        betas = torch.linspace(1e-4, 2e-2, timesteps, dtype=torch.float64) ** 0.5
    else:
        raise ConfigError(f"schedule={schedule!r}: choose cosine, linear or sqrt")
    return (1 - betas).cumprod(0)


def to_signal(boxes, scale):
    """Boxes in [0, 1] to the diffusion's variable in [-scale, scale]."""
    return (boxes * 2 - 1) * scale


def to_boxes(x, scale):
    """The diffusion's variable to boxes in [0, 1]; what noise carried beyond the range is clamped."""
    return (x.clamp(-scale, scale) / scale + 1) / 2


# ==================================================================================== DiffuDETR, training: forward noise

def noised_references(targets, cfg, generator=None):
    """The references of all Q queries in training: the targets' boxes, padded with random ones, noised to time t.

    One t ~ U{0..T-1} per image. The order is shuffled, because learned content belongs to a slot and must not tell
    which references began as targets. With more than Q targets a random Q of them are used.

    Returns references [B, Q, 4] in [0, 1] and t [B].
    """
    device, dtype = targets[0]["boxes"].device, targets[0]["boxes"].dtype
    Q = cfg.num_queries
    t = torch.randint(0, cfg.timesteps, (len(targets),), generator=generator, device=device)
    rates = signal_rates(cfg.schedule, cfg.timesteps).to(device, dtype)[t]                                          # [B]
    references = []
    for target, rate in zip(targets, rates):
        boxes = target["boxes"]
        if len(boxes) > Q:
            boxes = boxes[torch.randperm(len(boxes), generator=generator, device=device)[:Q]]
        padding = torch.randn(Q - len(boxes), 4, generator=generator, device=device, dtype=dtype).sigmoid()
        x0 = to_signal(torch.cat([boxes, padding]), cfg.signal_scale)
        noise = torch.randn(Q, 4, generator=generator, device=device, dtype=dtype)
        xt = rate.sqrt() * x0 + (1 - rate).sqrt() * noise
        order = torch.randperm(Q, generator=generator, device=device)
        references.append(to_boxes(xt, cfg.signal_scale)[order])
    return torch.stack(references), t


# ===================================================================================== DiffuDETR, inference: the sampler

def times(timesteps, evaluations):
    """The S pairs (t, t_next) that the sampler visits, e.g. (99, 66), (66, 33), (33, 0) for S = 3 of T = 100."""
    t = torch.linspace(0, timesteps - 1, evaluations + 1).int().tolist()[::-1]
    return list(zip(t[:-1], t[1:]))


def ddim_step(x, x0, rate, next_rate, eta, noise):
    """One step of DDIM (Song et al. 2021, Eq. 12) from x_t and the predicted x_0; eta = 0 uses no fresh noise."""
    epsilon = (x - rate.sqrt() * x0) / (1 - rate).sqrt()
    sigma = eta * ((1 - next_rate) / (1 - rate) * (1 - rate / next_rate)).clamp(min=0).sqrt()
    return next_rate.sqrt() * x0 + (1 - next_rate - sigma ** 2).clamp(min=0).sqrt() * epsilon + sigma * noise


def sample(decode, batch_size, cfg, device, dtype, generators=None):
    """Denoise Gaussian noise into detections: x_T ~ N(0, I) per query, then S evaluations of the decoder alone.

    Args:
        decode: function of references [B, Q, 4] in [0, 1] and t [B], giving logits [L, B, Q, C], boxes [L, B, Q, 4].
        generators: B CPU generators, one per image, so that an image's boxes depend neither on its batch nor on the
            device; by default each is seeded with 0.

    Returns the last evaluation's (logits, boxes), and all evaluations' last layers (logits [S, B, Q, C], boxes
    [S, B, Q, 4]) for the ensemble.
    """
    generators = generators or [torch.Generator().manual_seed(0) for _ in range(batch_size)]
    if len(generators) != batch_size:
        raise ValueError(f"{len(generators)} generators for {batch_size} images: give one per image")

    def noise():
        return torch.stack([torch.randn(cfg.num_queries, 4, generator=g, dtype=dtype) for g in generators]).to(device)

    rates = signal_rates(cfg.schedule, cfg.timesteps).to(device, dtype)
    x = noise()
    evaluations = []
    for t, t_next in times(cfg.timesteps, cfg.evaluations):
        logits, boxes = decode(to_boxes(x, cfg.signal_scale), torch.full((batch_size,), t, device=device))
        evaluations.append((logits[-1], boxes[-1]))
        x0 = to_signal(boxes[-1].to(dtype), cfg.signal_scale).clamp(-cfg.signal_scale, cfg.signal_scale)
        fresh = noise()
        if cfg.sampler == "published":               # the unscaled box where DDIM has x0; epsilon still comes from x0
            rate, next_rate = rates[t], rates[t_next]
            epsilon = ((1 / rate).sqrt() * x - x0) / (1 / rate - 1).sqrt()
            x = boxes[-1] * next_rate.sqrt() + (1 - next_rate).sqrt() * epsilon
        else:
            x = ddim_step(x, x0, rates[t], rates[t_next], cfg.eta, fresh)
        if cfg.renewal:
            # A query must earn its place: the closer to t = 0, the lower the score that keeps it.
            keep = logits[-1].sigmoid().amax(-1, keepdim=True) > t_next / cfg.timesteps
            x = torch.where(keep, x, fresh)
    return (logits, boxes), tuple(torch.stack(e) for e in zip(*evaluations))
