"""Boxes to noisy queries and back: one idea, from one step of noise to a hundred.

Training a decoder to turn a noised ground-truth box back into the box was first a training aid, then the detector:

    DN-DETR (Li 2022)       one small step of noise, in groups of extra queries that inference drops
    DINO (Zhang 2023)       the same with contrast: a second, farther copy of every box must be rejected (CDN)
    DiffuDETR (ICLR 2026)   T = 100 steps, down to pure noise: the references of *all* queries are the noised boxes, and
                            inference starts from noise and walks back with DDIM in a few decoder evaluations

Read in that order: denoising queries, the schedule and the noise, forward noising, the sampler.

Boxes are cx, cy, w, h in [0, 1]. Shapes: B images, Q queries, T timesteps; in this file P is denoising slots and S
evaluations.
"""
import functools
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
    # Every copy, or every other one, by its place: a mask would make a GPU wait until the host knows how many they are.
    pairs = tuple(x.view(copies, -1)[::1 + contrastive].flatten() for x in (image, slot, target))
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
    """Self-attention's mask [P + Q, P + Q], True = may not attend, denoising slots first (DN-DETR's attention mask).

    Matching queries must not see denoising ones, or the answer would leak; groups must not see each other. Denoising
    queries do see the matching ones, which know no target or, in DiffuDINO as published, begin as the targets at noise t.
    """
    P = groups * group_size
    group = torch.arange(P, device=device) // max(group_size, 1)
    blocked = torch.zeros(P + num_queries, P + num_queries, dtype=torch.bool, device=device)
    blocked[:P, :P] = group[:, None] != group
    blocked[P:, :P] = True
    return blocked


# ============================================================================== DiffuDETR: the schedule and the noise

@functools.cache
def signal_rates(schedule, timesteps):
    """alpha-bar [T] in float64, on the CPU: x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) noise (Ho et al. 2020, Eq. 4).

    cosine: Nichol & Dhariwal 2021, s = 0.008, betas at most 0.999; ends at 2.4e-7 for T = 100.
    linear: sqrt(beta) evenly spaced from 1e-2 to 1.41e-1; ends at 0.485, so that pure noise is not what x_T looks like.
    sqrt:   beta = sqrt of evenly spaced 1e-4 to 2e-2; ends at 4.6e-5.
    linear and sqrt are the published code's, which calls them so. Raises ConfigError on another name.
    """
    evenly = functools.partial(torch.linspace, dtype=torch.float64, device="cpu")    # a model may be built on "meta"
    if schedule == "cosine":
        f = torch.cos((evenly(0, 1, timesteps + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    elif schedule == "linear":
        betas = evenly(1e-4 ** 0.5, 2e-2 ** 0.5, timesteps) ** 2
    elif schedule == "sqrt":
        betas = evenly(1e-4, 2e-2, timesteps) ** 0.5
    else:
        raise ConfigError(f"schedule={schedule!r}: choose cosine, linear or sqrt")
    return (1 - betas).cumprod(0)


def terminal_snr(cfg):
    """Signal-to-noise ratio of x_T, alpha-bar_T / (1 - alpha-bar_T), at whose place inference puts pure noise.

    At T = 100: cosine 2.4e-7, sqrt 4.6e-5, linear 0.94: there, training never shows the decoder what the sampler begins
    with (Lin et al. 2023, "Common diffusion noise schedules and sample steps are flawed"), and a `Detector` warns.
    """
    rate = signal_rates(cfg.schedule, cfg.timesteps)[-1].item()
    return rate / (1 - rate)


def draw_noise(law, *shape, generator=None, dtype=torch.float32, device=None):
    """Noise of mean 0 and variance 1 in every coordinate, so that a schedule means the same whatever the law.

    gaussian:         N(0, 1), as published; the only unbounded one, so references are clamped.
    sigmoid_gaussian: sigmoid(z) - 1/2 with z ~ N(0, 1), over its standard deviation; within +-2.40.
    beta:             b - 1/2 with b ~ Beta(1, 1), over its standard deviation: uniform, within +-1.73. (The bell of
                      Beta(2, 2) would hardly differ from sigmoid_gaussian.)

    The forward process is x_t = sqrt(a) x_0 + sqrt(1 - a) noise under each; DDIM with eta = 0 carries a draw along and
    never asks for its law. The paper names the three and gives no formula: these are this project's choice.
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
    """The diffusion's variable to boxes in [0, 1]; what noise carried beyond the range is clamped."""
    return (x.clamp(-scale, scale) / scale + 1) / 2


# ==================================================================================== DiffuDETR, training: forward noise

def noised_references(targets, cfg, generator=None):
    """The references of all Q queries in training: the targets' boxes, padded with random ones, noised to time t.

    One t ~ U{0..T-1} per image. The order is shuffled, because learned content belongs to a slot and must not tell
    which references began as targets. With more than Q targets a random Q of them are used (the published code fails
    from 899 of 900 on). Padding is sigmoid(N(0, 1)) per coordinate, as published: what starts there belongs to no target,
    and the matcher decides what each query must learn, as for all.

    Returns references [B, Q, 4] in [0, 1] and t [B].
    """
    device, dtype = targets[0]["boxes"].device, targets[0]["boxes"].dtype
    Q = cfg.num_queries
    t = torch.randint(0, cfg.timesteps, (len(targets),), generator=generator, device=device)
    rates = signal_rates(cfg.schedule, cfg.timesteps).to(device, dtype)[t]                                          # [B]
    references = []
    for target, rate in zip(targets, rates):
        boxes = target["boxes"].clamp(0, 1)
        if len(boxes) > Q:
            boxes = boxes[torch.randperm(len(boxes), generator=generator, device=device)[:Q]]
        padding = torch.randn(Q - len(boxes), 4, generator=generator, device=device, dtype=dtype).sigmoid()
        x0 = to_signal(torch.cat([boxes, padding]), cfg.signal_scale)
        xt = add_noise(x0, draw_noise(cfg.noise, Q, 4, generator=generator, device=device, dtype=dtype), rate)
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


def best_pairs(logits, boxes, count):
    """The `count` best query-class pairs of each image; one query may answer twice (Deformable DETR's post-processing).

    logits [..., Q, C] and boxes [..., Q, 4] -> dict of scores [..., K] in 0..1, labels [..., K] and boxes [..., K, 4],
    best first; K is `count`, or Q * C if that is less.
    """
    # The sigmoid keeps the order, so it is enough to take it of the few that are kept.
    scores, pair = logits.flatten(-2).topk(min(count, logits.shape[-2] * logits.shape[-1]))
    query = pair // logits.shape[-1]
    return {"scores": scores.sigmoid(), "labels": pair % logits.shape[-1],
            "boxes": boxes.gather(-2, query[..., None].expand(*query.shape, 4))}


def sample(decode, batch_size, cfg, device, dtype, generators=None, watch=None):
    """Denoise noise into detections: one x_T per query, then S evaluations of the decoder alone.

    Args:
        decode: function of references [B, Q', 4] in [0, 1], t [B] and rows [B, Q'] (which of the Q queries they are),
            giving logits [L, B, Q', C], boxes [L, B, Q', 4]. Q' is Q, or after the first evaluation its survivors.
        generators: B CPU generators, one per image, so that an image's boxes depend neither on its batch nor on the
            device; by default each is seeded with 0.
        watch: called after every evaluation with a dict of what it saw: t, references, rows, logits and boxes of the last
            layer, keep [B, Q'] (False: the query starts again from fresh noise).

    Returns the last evaluation's (logits, boxes), and a list of every evaluation's `best_pairs` for the ensemble: what is
    kept of an evaluation is a few kilobytes, so that memory does not grow with S.
    """
    generators = generators or [torch.Generator().manual_seed(0) for _ in range(batch_size)]
    if isinstance(generators, torch.Generator) or len(generators) != batch_size:
        raise ValueError(f"generators must be a list of {batch_size} CPU generators, one per image")

    def noise():
        return torch.stack([draw_noise(cfg.noise, cfg.num_queries, 4, generator=g, dtype=dtype)
                            for g in generators]).to(device)

    rates = signal_rates(cfg.schedule, cfg.timesteps).to(device, dtype)
    x, rows = noise(), torch.arange(cfg.num_queries, device=device).expand(batch_size, -1)
    evaluations = []
    for t, t_next in times(cfg.timesteps, cfg.evaluations):
        references = to_boxes(x, cfg.signal_scale)
        logits, boxes = decode(references, torch.full((batch_size,), t, device=device), rows)
        evaluations.append(best_pairs(logits[-1], boxes[-1], cfg.detections))
        score = logits[-1].amax(-1).sigmoid()
        # A query must earn its place. t_next / T is the published code's rule: while there is much to come, only sure ones
        # stay, and after the last evaluation (t_next = 0) all do.
        keep = score > t_next / cfg.timesteps if cfg.renewal else torch.ones_like(score, dtype=torch.bool)
        if watch:
            watch(dict(t=t, references=references, rows=rows, logits=logits[-1], boxes=boxes[-1], keep=keep))
        x0 = to_signal(boxes[-1].to(dtype), cfg.signal_scale).clamp(-cfg.signal_scale, cfg.signal_scale)
        fresh = noise().gather(1, rows[..., None].expand(-1, -1, 4))
        if cfg.sampler == "published":      # the unscaled box where DDIM has x0; epsilon is DDIM's, in the code's own form
            rate, next_rate = rates[t], rates[t_next]
            epsilon = ((1 / rate).sqrt() * x - x0) / (1 / rate - 1).sqrt()
            x = add_noise(boxes[-1], epsilon, next_rate)
        else:
            x = ddim_step(x, x0, rates[t], rates[t_next], cfg.eta, fresh)
        x = torch.where(keep[..., None], x, fresh)
        if cfg.survivors < 1 and len(evaluations) == 1:            # the others had their chance: their answers are kept
            best = score.topk(math.ceil(cfg.survivors * cfg.num_queries), 1).indices
            x, rows = x.gather(1, best[..., None].expand(-1, -1, 4)), rows.gather(1, best)
    return (logits, boxes), evaluations
