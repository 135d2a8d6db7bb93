"""Who owns which ground truth (assignment), and what a prediction then costs (the set loss).

DETR (Carion 2020), section 3.1, in two steps: 1) find the one-to-one assignment of predictions to
targets of least cost, for every decoder layer on its own; 2) supervise each pair in class and box,
everything else as "no object". Focal costs and losses are Deformable DETR's; denoising needs no
assignment (DN). Align-DETR (Cai 2023) gives a target to several queries and asks each for a score
as high as its box is good.

Read `overlaps`, `match`, then `Criterion`. Shapes: L layers, B images, Q queries, C classes, G
targets of an image, K pairs of a query and its target.
"""
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torchvision.ops import box_convert, sigmoid_focal_loss

from masks import mask_losses

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (Lin et al. 2017), in all papers of the family


def overlaps(a, b, eps=0.0):
    """IoU and generalised IoU (Rezatofighi et al. 2019) of boxes cxcywh [..., 4], broadcast.

    `eps` is added to the union and to the hull: 1e-6 in the DAB line of the family, 0 in DETR's.
    torchvision's has another eps and pairs only flat lists.
    """
    a, b = box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy")
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1) + eps
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter + eps
    return inter / union, inter / union - (hull - union) / hull


# ================================================================================ assignment

@torch.no_grad()
def match_cost(logits, boxes, targets, cfg):
    """The cost [L, B, Q, G] of giving each target to each query; G is the batch's largest count.

    DETR, Eq. 1: class + L1 + GIoU. The class costs -p (softmax) or the change of focal loss.
    """
    labels = pad_sequence([t["labels"] for t in targets], batch_first=True)  # [B, G]
    wanted = pad_sequence([t["boxes"] for t in targets], batch_first=True)[None]  # [1, B, G, 4]
    column = labels[None, :, None].expand(*logits.shape[:3], -1)
    if cfg.class_loss == "ce":
        cost = -logits.softmax(-1).gather(-1, column)
    else:
        p = logits.gather(-1, column).sigmoid()
        cost = (ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log()
                - (1 - ALPHA) * p ** GAMMA * -(1 - p + 1e-8).log())
    l1 = torch.cdist(boxes, wanted.expand(len(boxes), -1, -1, -1), p=1)
    _, giou = overlaps(boxes[..., None, :], wanted[:, :, None], cfg.giou_eps)
    return cfg.cost_class * cost + cfg.weight_bbox * l1 - cfg.weight_giou * giou


def shares(copies, counts, queries, rule="fair"):
    """How many queries each target gets, by image: `copies`, or (fair) as many as go round.

    counts: targets of each image. "published" is Align-DETR's code: half of an image's queries at
    most, and what one image lowers stays lowered for the batch's next ones, down to none at all.
    """
    if rule == "fair":
        return [min(copies, max(1, queries // max(n, 1))) for n in counts]
    return [*itertools.accumulate(counts, lambda k, n: min(k, queries // (2 * n)) if n else k,
                                  initial=copies)][1:]


def match(stacks, cfg, copies=None):
    """The assignment of least cost, for every layer and image of every stack.

    Args:
        stacks: list of (logits [L, B, Q, C], boxes [L, B, Q, 4], targets), where targets are B
            dicts with labels [G] and boxes [G, 4], and may differ in their labels only.
        copies: per stack and layer, the queries that each target gets (default: 1): see `shares`.

    Returns, per stack, four index tensors [K]: layer, image, query, and target within its image.
    With more targets than queries, the cheapest to serve are assigned. Raises FloatingPointError
    on costs that are not finite.
    """
    costs = [match_cost(logits, boxes, t, cfg) for logits, boxes, t in stacks]
    host = torch.cat([c.flatten() for c in costs]).cpu()  # the step's one transfer to the host
    counts, result = [len(t["labels"]) for t in stacks[0][2]], []
    for stack, (cost, block) in enumerate(zip(costs, host.split([c.numel() for c in costs]))):
        rows, block = [], block.view(cost.shape).numpy()
        for layer in range(len(block)):
            each = copies[stack][layer] if copies else 1
            for image, k in enumerate(shares(each, counts, block.shape[2], cfg.copies_rule)):
                n = counts[image]
                try:
                    query, target = linear_sum_assignment(np.tile(block[layer, image, :, :n], k))
                except ValueError:
                    raise FloatingPointError(
                        f"the matching cost of layer {layer}, image {image} of the batch is not "
                        "finite: the model diverged, or a box of the data is not finite") from None
                rows += [(layer, image, q, g % n) for q, g in zip(query.tolist(), target.tolist())]
        index = torch.tensor(rows, dtype=torch.long, device=cost.device).view(-1, 4)
        result.append(index.unbind(1))
    return result


# ================================================================================== the loss

def align_quality(p, iou, owner):
    """Align-DETR's score to reach, t = p^0.25 IoU^0.75, of the K pairs, and each pair's weight.

    The pairs of a target in a layer, which share their number in owner [K], are ranked by t; the
    best weighs 1, rank r exp(-r / 1.5).
    """
    quality = (p ** 0.25 * iou.clamp(min=0) ** 0.75).clamp(min=0.01)
    order = quality.argsort(descending=True, stable=True)  # the best first, ties in order,
    order = order[owner[order].argsort(stable=True)]  # then by owner
    owner = owner[order]
    place = torch.arange(len(order), device=order.device) - torch.searchsorted(owner, owner)
    rank = torch.empty_like(order).index_put((order,), place)
    return quality, (-rank / 1.5).exp().to(quality)


def softmax_loss(logits, index, labels, cfg):
    """DETR's class loss per layer [L], arguments as below; the last class is "no object"."""
    wanted = torch.full(logits.shape[:3], logits.shape[-1] - 1, device=logits.device)
    wanted[index] = labels
    weight = torch.ones(logits.shape[-1], device=logits.device, dtype=logits.dtype)
    weight[-1] = cfg.no_object
    loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight, reduction="none")
    return loss.view(len(logits), -1).sum(1)


def sigmoid_loss(logits, index, labels, score, cfg, sizes, counted):
    """The class loss per query and class, summed per layer [L].

    Args: logits [L, B, Q, C]; index (layer, image, query), each [K], the queries that own a target,
    layer after layer; labels [K]; score [K], what vfl and ia ask of them; sizes [L], how many of
    the K are each layer's; counted [B, Q], the queries that count (None: all).
    """
    pairs = [x.split(sizes) for x in (index[1], index[2], labels, score.detach())]
    bce = F.binary_cross_entropy_with_logits

    def one_layer(x, layer):  # [B, Q, C]
        *own, q = (part[layer] for part in pairs)  # no mask: finding its rows would stop a GPU
        if cfg.class_loss == "focal":
            wanted = torch.zeros_like(x).index_put(own, x.new_ones(()))
            loss = sigmoid_focal_loss(x, wanted, ALPHA, GAMMA)
        else:
            wanted = torch.zeros_like(x).index_put(own, q)
            # Align-DETR's IA-BCE: the negatives' p^2 has a gradient. VariFocal (Zhang 2021) on
            # GIoU, as DiffuDINO's code has it: none, and a negative overlap is not clamped.
            if cfg.class_loss == "ia":
                weight = (x.sigmoid() ** GAMMA).index_put(own, x.new_ones(()))
            else:
                weight = ((1 - ALPHA) * x.detach().sigmoid() ** GAMMA).index_put(own, q)
            loss = weight * bce(x, wanted, reduction="none")
        return (loss if counted is None else loss * counted[..., None]).sum()

    # Focal loss needs ten arrays of its input's size. With a vocabulary of thousands they would be
    # most of a step's memory: so each layer's are dropped, and recomputed in the backward pass.
    again = dict(use_reentrant=False, preserve_rng_state=False)
    return torch.stack([checkpoint(one_layer, x, l, **again) for l, x in enumerate(logits)])


class Criterion:
    """The family's set loss: call it with a model's outputs and the targets.

    It returns (total, losses): the weighted sum to minimise, and losses[kind][loss] [L] before
    weighting. Kinds: "main" (decoder layers), "enc" (proposals), "dn" (denoising queries). Losses:
    "class", "bbox" (L1 on cxcywh), "giou"; of the last layer "mask", "dice". `named` makes flat
    names for logs.
    """

    def __init__(self, cfg):
        self.cfg = cfg
        own = {"class": cfg.weight_class, "bbox": cfg.weight_bbox, "giou": cfg.weight_giou}
        self.weights = {"main": own | {"mask": cfg.weight_mask, "dice": cfg.weight_dice},
                        "enc": own, "dn": own | {"class": cfg.weight_class_dn}}

    def __call__(self, outputs, targets, step_counts=None):
        """
        Args:
            outputs: the model's. targets: list of B dicts with labels [G] and boxes [G, 4], and,
                where the model draws them, masks [G, H, W] bool of the un-padded images.
            step_counts: number of boxes in every image of the whole step, where these are one
                micro-batch of it: the micro-batches' losses then sum to the step's.
        """
        cfg, groups = self.cfg, outputs.get("query_groups", 1)
        counts = step_counts or [len(t["labels"]) for t in targets]

        def folded(x):  # [L, B, groups * Q, C] -> [L * groups, B, Q, C]: matched group by group
            return x.unflatten(2, (groups, -1)).movedim(2, 1).flatten(0, 1)

        L = len(outputs["logits"])
        stacks = {"main": (folded(outputs["logits"]), folded(outputs["boxes"]), targets)}
        copies = [[cfg.copies] * groups * (L - 1) + [1] * groups]  # the last layer is one-to-one
        if "enc" in outputs:
            wanted, parts = targets, [outputs["enc"][key][None] for key in ("logits", "boxes")]
            if cfg.proposal_labels == "binary":  # object or not
                wanted = [t | {"labels": torch.zeros_like(t["labels"])} for t in targets]
            parts = map(folded, parts) if cfg.group_proposals else parts
            stacks["enc"] = *parts, wanted
            copies.append([cfg.copies] * len(stacks["enc"][0]))
        losses = {}
        for kind, index, each in zip(stacks, match([*stacks.values()], cfg, copies), copies):
            Q, here = stacks[kind][0].shape[2], [len(t["labels"]) for t in targets]
            sizes = [sum(min(share * n, Q) for n, share in zip(
                here, shares(k, here, Q, cfg.copies_rule))) for k in each]
            losses[kind] = self.supervise(kind, *stacks[kind], index, sizes, counts)
            if kind == "main":
                last = [x.split(sizes)[-1] for x in index]  # the last layer's pairs: masks'
        for kind, layers in ("main", L), ("enc", 1):  # the mean of the groups
            if kind in losses:
                losses[kind] = {key: x.unflatten(0, (layers, -1)).mean(1)
                                for key, x in losses[kind].items()}
        if "masks" in outputs:
            losses["main"] |= mask_losses(outputs["masks"], targets, *last[1:], max(sum(counts), 1))
        if "dn" in outputs:
            losses["dn"] = self.denoise(targets, counts, **outputs["dn"])
        total = sum(self.weights[kind][loss] * value.sum()
                    for kind, of in losses.items() for loss, value in of.items())
        return total, losses

    def supervise(self, kind, logits, boxes, targets, index, sizes, counts, groups=1, counted=None):
        """The three losses [L]; index: layer, image, query, target [K], who owns what."""
        cfg, (*index, target) = self.cfg, index
        index, here = tuple(index), [len(t["labels"]) for t in targets]
        offset = torch.tensor([0, *here]).cumsum(0).to(target.device, non_blocking=True)
        target = offset[index[1]] + target
        labels = torch.cat([t["labels"] for t in targets])[target]
        wanted = torch.cat([t["boxes"] for t in targets])[target]
        own = boxes[index]  # [K, 4]
        iou, giou = overlaps(own, wanted, cfg.giou_eps)
        score, weight = giou, torch.ones_like(giou)
        if cfg.class_loss == "ia":
            p = logits.detach()[index + (labels,)].sigmoid()
            score, rank_weight = align_quality(p, iou.detach(), index[0] * sum(here) + target)
            weight = rank_weight if kind != "dn" else weight  # whose pairs are fixed: no rivals
            score = score * weight
        count = max(sum(counts), 1) * groups
        if cfg.class_loss == "ce":  # the mean by the sum of all queries' class weights
            Q = logits.shape[2]
            owned = sum(min(n, Q) for n in counts)
            weight_sum = owned + cfg.no_object * (len(counts) * Q - owned)
            class_loss = softmax_loss(logits, index, labels, cfg) / weight_sum
        else:
            class_loss = sigmoid_loss(logits, index, labels, score, cfg, sizes, counted) / count
        zero = boxes.new_zeros(len(boxes))
        l1 = zero.index_add(0, index[0], weight * (own - wanted).abs().sum(-1))
        giou = zero.index_add(0, index[0], weight * (1 - giou))
        return {"class": class_loss, "bbox": l1 / count, "giou": giou / count}

    def denoise(self, targets, counts, logits, boxes, queries):
        """Denoising queries know their targets: nothing is matched. logits [L, B, P, C]. (DN-DETR's
        code divides by the targets of one process alone.)"""
        L, K = len(logits), len(queries.pairs[0])
        layer = torch.arange(L, device=logits.device).repeat_interleave(K)
        index = (layer, *(i.repeat(L) for i in queries.pairs))
        # DN supervises only the slots in use; in CDN every other slot must say "no object".
        counted = None if queries.contrastive else queries.used
        return self.supervise("dn", logits, boxes, targets, index, [K] * L, counts, queries.groups,
                              counted)


def named(losses):
    """A criterion's losses by kind -> {name: scalar} for logs.

    loss_class, loss_bbox, loss_giou, each with a suffix: _enc (proposals), _dn (denoising queries),
    and _0, _1, ... for all layers but the last.
    """
    return {f"loss_{loss}" + ("" if kind == "main" else f"_{kind}")
            + ("" if layer == len(values) - 1 else f"_{layer}"): value
            for kind, of in losses.items() for loss, values in of.items()
            for layer, value in enumerate(values)}
