"""Boxes to noisy queries and back: one idea, from one step of noise to a hundred.

    DN-DETR (Li 2022)       one small step of noise, in groups of extra queries that inference drops
    DINO (Zhang 2023)       the same with contrast: a second, farther copy must be rejected (CDN)
    DiffuDETR (ICLR 2026)   T = 100 steps, down to pure noise: the references of *all* queries are
                            noised boxes, and inference walks back from noise with DDIM

Read in that order: denoising queries, the schedule and the noise, forward noising, the sampler.
Boxes are cx, cy, w, h in [0, 1]. Shapes: B images, Q queries, T timesteps; in this file P is
denoising slots and S sampling steps.
"""
import functools
import math
from typing import NamedTuple

import torch
from torchvision.ops import box_convert


# ============================================================== DN and CDN: one step of noise

class Denoising(NamedTuple):
    """Denoising queries of a batch, and what they should become."""
    labels: torch.Tensor  # [B, P] noised labels
    boxes: torch.Tensor  # [B, P, 4] noised boxes; 0.5 in unused slots
    used: torch.Tensor  # [B, P] bool: the slot holds a noised target
    pairs: tuple  # (image [K], slot [K], target [K]): slots to reconstruct; target within its image
    group: torch.Tensor  # [P] int: the group of a slot, 0, 1, ...
    groups: int
    contrastive: bool  # False: only the pairs are supervised. True: all others say "no object"


def denoising_queries(targets, cfg, generator=None):
    """DN-DETR's noised groups (section 4) or, for cfg.denoising == "cdn", DINO's (section 3.3).

    A group holds every target of an image once (dn), or twice: slots [0, G) near the target and to
    be reconstructed, slots [G, 2G) farther away and to be rejected (cdn), where G is the most
    targets of any image in the batch. Without any target P is 0.
    """
    device = targets[0]["boxes"].device
    counts = [len(t["labels"]) for t in targets]
    labels, boxes = (torch.cat([t[key] for t in targets]) for key in ("labels", "boxes"))  # [N]
    image = torch.cat([torch.full((n,), b) for b, n in enumerate(counts)])  # [N]
    place = torch.cat([torch.arange(n) for n in counts])
    image, place = image.to(device, non_blocking=True), place.to(device, non_blocking=True)
    most, contrastive = max(counts), cfg.denoising == "cdn"
    groups = max(1, cfg.dn_queries // max(most, 1)) if contrastive else cfg.dn_groups

    copies = groups * (1 + contrastive)  # copy = group, or 2 * group + (1 if negative else 0)
    copy = torch.arange(copies, device=device)
    image, target = image.repeat(copies), place.repeat(copies)  # [copies * N]
    slot = (copy[:, None] * most + place).flatten()
    negative = (contrastive & (copy[:, None] % 2 == 1)).expand(-1, len(labels)).flatten()

    labels, boxes = labels.repeat(copies), boxes.repeat(copies, 1)
    flip = torch.rand(labels.shape, generator=generator, device=device) < cfg.label_noise
    other = torch.randint(0, cfg.num_classes, labels.shape, generator=generator, device=device)
    labels = torch.where(flip, other, labels)
    if contrastive:
        boxes = move_corners(boxes, negative, cfg.box_noise, generator)
    else:
        boxes = move_centre_and_size(boxes, cfg.box_noise, generator)

    B, P = len(targets), copies * most
    slots = [labels.new_zeros(B, P), boxes.new_full((B, P, 4), 0.5),
             torch.zeros(B, P, dtype=torch.bool, device=device)]
    for held, values in zip(slots, (labels, boxes, True)):
        held[image, slot] = values
    # Every copy, or every other one, by its place: a mask would make a GPU wait for its count.
    pairs = tuple(x.view(copies, -1)[::1 + contrastive].flatten() for x in (image, slot, target))
    group = torch.arange(P, device=device) // max(P // groups, 1)
    return Denoising(*slots, pairs, group, groups, contrastive)


def move_centre_and_size(boxes, scale, generator=None):
    """DN-DETR's: centres of boxes [N, 4] move by up to scale * (w/2, h/2), sizes by (w, h)."""
    reach = torch.cat([boxes[:, 2:] / 2, boxes[:, 2:]], -1)
    part = torch.rand(boxes.shape, generator=generator, device=boxes.device, dtype=boxes.dtype)
    return (boxes + (part * 2 - 1) * reach * scale).clamp(0, 1)


def move_corners(boxes, negative, scale, generator=None):
    """DINO's: corners of boxes [N, 4] move by +- part * scale * (w/2, h/2), with part in [0, 1), or
    [1, 2) for negatives [N]."""
    sign = torch.randint(0, 2, boxes.shape, generator=generator, device=boxes.device) * 2 - 1
    part = torch.rand(boxes.shape, generator=generator, device=boxes.device, dtype=boxes.dtype)
    reach = boxes[:, 2:].repeat(1, 2) / 2 * scale
    corners = box_convert(boxes, "cxcywh", "xyxy") + sign * (part + negative[:, None]) * reach
    return box_convert(corners.clamp(0, 1), "xyxy", "cxcywh")


def attention_mask(denoising, matching):
    """Self-attention's mask [N, N] between queries, True = may not attend, from everybody's group.

    denoising: [P] groups of denoising slots, matching: [Q] groups of the queries after them. This
    is DN-DETR's attention mask, for three groups and one of matching queries (. = may attend):

                 g0 g1 g2 matching           Denoising groups must not see each other, and
        g0        .  x  x  .                 matching queries must not see denoising ones, or
        g1        x  .  x  .                 the answer would leak. Denoising queries do see
        g2        x  x  .  .                 the matching ones, which know no target or, in
        matching  x  x  x  .                 DiffuDETR, begin as the targets at noise t.

    Several matching groups (Group DETR, LW-DETR) do not see each other either.
    """
    group = torch.cat([-1 - denoising, matching])  # negative: of denoising
    return (group[:, None] != group) & ~((group[:, None] < 0) & (group >= 0))


# ======================================================= DiffuDETR: the schedule and the noise

@functools.cache
def signal_rates(schedule, timesteps):
    """alpha-bar [T] in float64 on the CPU, of x_t = sqrt(alpha-bar) x_0 + sqrt(1 - alpha-bar) noise
    (Ho et al. 2020, Eq. 4).

    `linear` and `sqrt` are the published code's, and so are their names.
    cosine: Nichol & Dhariwal 2021, s = 0.008, betas at most 0.999; ends at 2.4e-7 for T = 100.
    linear: sqrt(beta) evenly spaced from 1e-2 to 1.41e-1; ends at 0.485: training never shows the
            pure noise with which inference begins (Lin et al. 2023, "Common diffusion noise
            schedules and sample steps are flawed").
    sqrt:   beta = sqrt of evenly spaced 1e-4 to 2e-2; ends at 4.6e-5.
    """
    evenly = functools.partial(torch.linspace, dtype=torch.float64, device="cpu")  # not "meta"
    if schedule == "cosine":
        f = torch.cos((evenly(0, 1, timesteps + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    elif schedule == "linear":
        betas = evenly(1e-4 ** 0.5, 2e-2 ** 0.5, timesteps) ** 2
    else:
        betas = evenly(1e-4, 2e-2, timesteps) ** 0.5
    return (1 - betas).cumprod(0)


def draw_noise(law, *shape, generator=None, dtype=torch.float32, device=None):
    """Noise of mean 0 and variance 1, so that a schedule means the same whatever the law.

    gaussian: N(0, 1), unbounded, so references are clamped. sigmoid_gaussian: sigmoid(N(0, 1)), and
    beta: Beta(1, 1), that is uniform, both less 1/2 and over their standard deviations: the paper
    names the three and gives no formula.
    """
    kind = dict(generator=generator, dtype=dtype, device=device)
    if law == "gaussian":
        return torch.randn(*shape, **kind)
    if law == "sigmoid_gaussian":
        return (torch.randn(*shape, **kind).sigmoid() - 0.5) / 0.20827634
    return (torch.rand(*shape, **kind) - 0.5) * 12 ** 0.5


def add_noise(x0, noise, rate):
    """The forward process: x_t at alpha-bar = `rate` (Ho et al. 2020, Eq. 4)."""
    return rate.sqrt() * x0 + (1 - rate).sqrt() * noise


def to_signal(boxes, scale):
    """Boxes in [0, 1] to the diffusion's variable in [-scale, scale]."""
    return (boxes * 2 - 1) * scale


def to_boxes(x, scale):
    """The diffusion's variable to boxes in [0, 1]; what noise carried beyond is clamped."""
    return (x.clamp(-scale, scale) / scale + 1) / 2


# ============================================================= DiffuDETR, training: forward noise

def noised_references(targets, cfg, generator=None):
    """The references of all queries in training: the targets' boxes, padded, noised to time t.

    One t ~ U{0..T-1} per image. Padding is sigmoid(N(0, 1)) per coordinate, as published. The order
    is shuffled, because learned content belongs to a slot and must not tell which references began
    as targets. With more targets than queries a random choice of them is used. Every query group
    gets its own noise.

    Returns references [B, query_groups * Q, 4] in [0, 1] and t [B].
    """
    device, dtype = targets[0]["boxes"].device, targets[0]["boxes"].dtype
    kind, Q = dict(generator=generator, device=device), cfg.num_queries
    t = torch.randint(0, cfg.timesteps, (len(targets),), **kind)
    rates = signal_rates(cfg.schedule, cfg.timesteps).to(device, dtype, non_blocking=True)[t]  # [B]
    references = []
    for target, rate in zip(targets, rates):
        boxes = target["boxes"].clamp(0, 1)
        for _ in range(cfg.query_groups):
            own = boxes
            if len(own) > Q:
                own = own[torch.randperm(len(own), **kind)[:Q]]
            padding = torch.randn(Q - len(own), 4, dtype=dtype, **kind).sigmoid()
            x0 = to_signal(torch.cat([own, padding]), cfg.signal_scale)
            xt = add_noise(x0, draw_noise(cfg.noise, Q, 4, dtype=dtype, **kind), rate)
            references.append(to_boxes(xt, cfg.signal_scale)[torch.randperm(Q, **kind)])
    return torch.stack(references).view(len(targets), -1, 4), t


# ============================================================== DiffuDETR, inference: the sampler

def times(timesteps, sampling_steps):
    """The S pairs (t, t_next) that the sampler visits: (99, 66), (66, 33), (33, 0) for 3 of 100."""
    t = torch.linspace(0, timesteps - 1, sampling_steps + 1).int().tolist()[::-1]
    return list(zip(t[:-1], t[1:]))


def ddim_step(x, x0, rate, next_rate, eta, noise):
    """One step of DDIM (Song et al. 2021, Eq. 12) from x_t and the predicted x_0; a is alpha-bar:

        x_s = sqrt(a_s) x_0 + sqrt(1 - a_s - sigma^2) epsilon + sigma noise,
        epsilon = (x_t - sqrt(a_t) x_0) / sqrt(1 - a_t), sigma from Eq. 16: eta = 0 makes it 0.
    """
    epsilon = (x - rate.sqrt() * x0) / (1 - rate).sqrt()
    sigma = eta * ((1 - next_rate) / (1 - rate) * (1 - rate / next_rate)).clamp(min=0).sqrt()
    return (next_rate.sqrt() * x0 + (1 - next_rate - sigma ** 2).clamp(min=0).sqrt() * epsilon
            + sigma * noise)


def best_pairs(logits, boxes, count):
    """The `count` best query-class pairs of each image (Deformable DETR's post-processing).

    logits [..., Q, C] and boxes [..., Q, 4] -> dict of scores [..., K] in 0..1, labels and query
    [..., K], boxes [..., K, 4], best first; K is `count` at most. A query may answer twice.
    """
    scores, pair = logits.flatten(-2).topk(min(count, logits.shape[-2] * logits.shape[-1]))
    query = pair // logits.shape[-1]
    return {"scores": scores.sigmoid(), "labels": pair % logits.shape[-1], "query": query,
            "boxes": boxes.gather(-2, query[..., None].expand(*pair.shape, 4))}


def sample(decode, batch_size, cfg, device, dtype, generators=None, watch=None):
    """Denoise noise into detections: one x_T per query, then S evaluations of the decoder alone.

    Args:
        decode: function of references [B, Q, 4] in [0, 1] and t [B], giving a tuple that
            starts with logits [L, B, Q, C] and boxes [L, B, Q, 4].
        generators: B CPU generators, so that an image's boxes depend neither on its batch nor on
            the device; by default each is seeded with 0. Or the noise itself, [S + 1, B, Q, 4].
        watch: called after every evaluation with a dict of what it saw: t, references, the last
            layer's logits and boxes, keep [B, Q] (False: it starts again from fresh noise).

    Renewal, the ensemble and the signal's scale are DiffusionDet's (Chen 2022). Returns the last
    decode(), and a list of every evaluation's `best_pairs` for the ensemble: kilobytes each.
    """
    drawn = iter(generators) if torch.is_tensor(generators) else None  # an exported model's input
    generators = generators if drawn or generators else [
        torch.Generator().manual_seed(0) for _ in range(batch_size)]

    def noise():
        if drawn:
            return next(drawn)
        return torch.stack([draw_noise(cfg.noise, cfg.num_queries, 4, generator=g, dtype=dtype)
                            for g in generators]).to(device)

    rates, scale = signal_rates(cfg.schedule, cfg.timesteps).to(device, dtype), cfg.signal_scale
    x, sampled = noise(), []
    for t, t_next in times(cfg.timesteps, cfg.sampling_steps):
        references = to_boxes(x, scale)
        answer = decode(references, torch.full((batch_size,), t, device=device))
        logits, boxes = answer[0][-1], answer[1][-1]
        sampled.append(best_pairs(logits, boxes, cfg.detections))
        # Renewal: a query must earn its place. t_next / T is the published rule: while much is to
        # come, only sure ones stay, and after the last evaluation (t_next = 0) all do.
        score = logits.amax(-1).sigmoid()
        keep = score > t_next / cfg.timesteps if cfg.renewal else torch.ones_like(score) > 0
        if watch:
            watch(dict(t=t, references=references, logits=logits, boxes=boxes, keep=keep))
        x0 = to_signal(boxes.to(dtype), scale).clamp(-scale, scale)
        rate, fresh = rates[t], noise()
        if cfg.sampler == "published":  # the unscaled box where DDIM has x0; epsilon is DDIM's
            epsilon = ((1 / rate).sqrt() * x - x0) / (1 / rate - 1).sqrt()
            x = add_noise(boxes, epsilon, rates[t_next])
        else:
            x = ddim_step(x, x0, rate, rates[t_next], cfg.eta, fresh)
        x = torch.where(keep[..., None], x, fresh)
    return answer, sampled
