"""Who owns which ground truth (assignment), and what a prediction then costs (the set loss).

DETR (Carion 2020), section 3.1, in two steps: 1) find the one-to-one assignment of predictions to targets of least
cost, for every decoder layer on its own; 2) supervise each pair in class and box, everything else as "no object".
Focal costs and losses are Deformable DETR's, the proposals' loss is two-stage's, denoising needs no assignment (DN).
Align-DETR (Cai 2023) gives a target to several queries and asks each for a score as high as its box is good.

Read `overlaps`, `match`, then `Criterion`. Shapes: L layers, B images, Q queries, C classes, G targets of an image.
"""
import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, sigmoid_focal_loss

ALPHA, GAMMA = 0.25, 2.0        # of the focal loss (Lin et al. 2017), in all papers of the family


def overlaps(a, b, eps=0.0):
    """IoU and generalised IoU (Rezatofighi et al. 2019) of boxes cxcywh [..., 4], broadcast against each other.

    `eps` is added to the union and to the hull: 1e-6 in the DAB line of the family, 0 in DETR's. torchvision's has
    another eps and pairs only flat lists.
    """
    a, b = box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy")
    inter = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter + eps
    hull = hull + eps
    return inter / union, inter / union - (hull - union) / hull


# ============================================================================================================ assignment

@torch.no_grad()
def match_cost(logits, boxes, targets, cfg):
    """The cost [L, B, Q, G] of giving each target to each query; G is the batch's largest count, the rest is padding.

    DETR, Eq. 1: class + L1 + GIoU. The class costs -p (softmax), or the focal loss it would change (sigmoid).
    """
    labels = pad_sequence([t["labels"] for t in targets], batch_first=True)                                       # [B, G]
    wanted = pad_sequence([t["boxes"] for t in targets], batch_first=True)[None]                           # [1, B, G, 4]
    column = labels[None, :, None].expand(*logits.shape[:3], -1)
    if cfg.class_loss == "ce":
        cost = -logits.softmax(-1).gather(-1, column)
    else:
        p = logits.gather(-1, column).sigmoid()
        cost = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log() - (1 - ALPHA) * p ** GAMMA * -(1 - p + 1e-8).log()
    l1 = torch.cdist(boxes, wanted.expand(len(boxes), -1, -1, -1), p=1)
    _, giou = overlaps(boxes[..., None, :], wanted[:, :, None], cfg.giou_eps)
    return cfg.cost_class * cost + cfg.weight_bbox * l1 - cfg.weight_giou * giou


def share(copies, targets, queries):
    """How many queries each of an image's targets gets: `copies`, or as many as go round; with too few for all, one."""
    return min(copies, max(1, queries // max(targets, 1)))


def match(stacks, cfg, copies=None):
    """The assignment of least cost, for every layer and image of every stack, with one transfer to the host.

    Args:
        stacks: list of (logits [L, B, Q, C], boxes [L, B, Q, 4], targets); a stack's targets are a list of B dicts with
            labels [G] and boxes [G, 4], and may differ from another stack's in their labels only.
        copies: per stack and layer, the queries that each target gets (default: 1), where there are enough: see `share`.

    Returns, per stack, four index tensors [K]: layer, image, query, and target within its image. With more targets
    than queries, the Q cheapest to serve are assigned. Raises FloatingPointError on costs that are not finite.
    """
    costs = [match_cost(logits, boxes, t, cfg) for logits, boxes, t in stacks]
    host = torch.cat([c.flatten() for c in costs]).cpu().split([c.numel() for c in costs])     # the step's one transfer
    counts, result = [len(t["labels"]) for t in stacks[0][2]], []
    for stack, cost in enumerate(costs):
        rows, block = [], host[stack].view(cost.shape).numpy()
        for layer in range(block.shape[0]):
            for image, n in enumerate(counts):
                k = share(copies[stack][layer], n, block.shape[2]) if copies else 1
                try:
                    query, target = linear_sum_assignment(np.tile(block[layer, image, :, :n], k))
                except ValueError:
                    raise FloatingPointError(f"the matching cost of layer {layer}, image {image} of the batch is not "
                                             "finite: the model diverged, or a box of the data is not finite") from None
                rows += [(layer, image, q, g % n) for q, g in zip(query.tolist(), target.tolist())]
        index = torch.tensor(rows, dtype=torch.long, device=cost.device).view(-1, 4)
        result.append(index.unbind(1))
    return result


# ============================================================================================================== the loss

class LayerByLayer(torch.autograd.Function):
    """Apply function(logits[l], l) -> scalar to every layer of [L, ...] -> [L], with scratch for one layer at a time.

    Focal loss needs ten arrays of its input's size. With a vocabulary of thousands they would be most of the memory of a
    training step, six layers deep: so each layer's are dropped, and made again where its gradient is needed.
    """

    @staticmethod
    def forward(ctx, function, logits):
        ctx.function = function
        ctx.save_for_backward(logits)
        return torch.stack([function(x, layer) for layer, x in enumerate(logits)])

    @staticmethod
    def backward(ctx, gradient):
        (logits,) = ctx.saved_tensors
        result = torch.empty_like(logits)
        for layer, x in enumerate(logits):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                result[layer] = torch.autograd.grad(ctx.function(x, layer), x, gradient[layer])[0]
        return None, result


def align_quality(p, iou, layer, target):
    """Align-DETR's score to reach, t = p^0.25 IoU^0.75, of the K pairs, and how much each pair weighs, both [K].

    A target's pairs (same layer, same target [K]) are ranked by t; the best weighs 1, rank r exp(-r / 1.5).
    """
    quality = (p ** 0.25 * iou.clamp(min=0) ** 0.75).clamp(min=0.01)
    _, group = torch.stack([layer, target]).unique(dim=1, return_inverse=True)
    order = quality.argsort(descending=True, stable=True)                      # the best first, of equals the earlier; then
    order = order[group[order].argsort(stable=True)]                           # by target
    group = group[order]
    rank = torch.empty_like(order).index_put((order,), torch.arange(len(order)).to(order) - torch.searchsorted(group, group))
    return quality, (-rank / 1.5).exp().to(quality)


def class_loss(logits, index, labels, overlap, cfg, weight_sum, sizes, counted=None):
    """Sum of the class loss per layer [L], divided by `weight_sum` for the softmax's weighted mean.

    Args: logits [L, B, Q, C]; index (layer, image, query), each [K], the queries that own a target, layer after layer;
    labels [K]; overlap [K], the score that vfl and ia ask of them; sizes [L], how many of the K are each layer's, numbers;
    counted [B, Q], the queries that count (default: all).
    """
    C = logits.shape[-1]
    if cfg.class_loss == "ce":                                                     # DETR: the last class is "no object"
        wanted = torch.full(logits.shape[:3], C - 1, device=logits.device)
        wanted[index] = labels
        weight = torch.ones(C, device=logits.device, dtype=logits.dtype)
        weight[-1] = cfg.no_object
        loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight, reduction="none")
        return loss.view(len(logits), -1).sum(1) / weight_sum
    pairs = [x.split(sizes) for x in (index[1], index[2], labels, overlap.detach())]

    def one_layer(x, layer):                                                                                # [B, Q, C]
        *there, q = (part[layer] for part in pairs)                      # no mask: finding its rows would stop a GPU
        if cfg.class_loss == "focal":
            loss = sigmoid_focal_loss(x, torch.zeros_like(x).index_put(there, x.new_ones(())), ALPHA, GAMMA)
        elif cfg.class_loss == "ia":                # Align-DETR's IA-BCE; the negatives' p^2 has a gradient, unlike VFL's
            weight = (x.sigmoid() ** GAMMA).index_put(there, x.new_ones(()))
            loss = weight * F.binary_cross_entropy_with_logits(x, torch.zeros_like(x).index_put(there, q), reduction="none")
        else:  # VariFocal (Zhang 2021) on GIoU, as DiffuDINO's code has it: the overlap may be negative, and is not clamped
            weight = ((1 - ALPHA) * x.detach().sigmoid() ** GAMMA).index_put(there, q)
            loss = F.binary_cross_entropy_with_logits(x, torch.zeros_like(x).index_put(there, q), weight, reduction="none")
        return (loss if counted is None else loss * counted[..., None]).sum()

    return LayerByLayer.apply(one_layer, logits)


class Criterion:
    """The family's set loss: call it with a model's outputs and the targets.

    It returns a dict of scalars: "total", the weighted sum to minimise, and every part before weighting, by name:
    `loss_class`, `loss_bbox` (L1 on cxcywh) and `loss_giou`, each with a suffix for whom it supervises:

        (none)     the last decoder layer              _0, _1, ...        the earlier ones, first to last
        _enc       the encoder's proposals             _dn, _dn_0, ...    the denoising queries
    """

    def __init__(self, cfg):
        self.cfg = cfg

    def __call__(self, outputs, targets, step_counts=None):
        """
        Args:
            outputs: the model's.
            targets: list of B dicts with labels [G] and boxes [G, 4].
            step_counts: numbers of boxes of all images of the step, when these are one micro-batch of it: losses are
                divided by the step's number of boxes, so that all micro-batches' losses, of all processes, add up to
                the step's.
        """
        cfg = self.cfg
        counts = step_counts or [len(t["labels"]) for t in targets]
        self.num_boxes = max(sum(counts), 1)
        Q = outputs["logits"].shape[2]
        owned = sum(min(n, Q) for n in counts)
        self.weight_sum = owned + cfg.no_object * (len(counts) * Q - owned)            # of all queries' class weights

        stacks = [(outputs["logits"], outputs["boxes"], targets)]
        if "enc" in outputs:
            enc = outputs["enc"]
            if cfg.proposal_labels == "binary":
                targets = [t | {"labels": torch.zeros_like(t["labels"])} for t in targets]
            stacks.append((enc["logits"][None], enc["boxes"][None], targets))

        losses = {}
        copies = [[cfg.copies] * (len(outputs["logits"]) - 1) + [1], [cfg.copies]]            # the last layer is one-to-one
        for kind, (logits, boxes, wanted), index, each in zip(("", "_enc"), stacks, match(stacks, cfg, copies), copies):
            P, here = logits.shape[2], [len(t["labels"]) for t in targets]                       # P queries, or proposals
            sizes = [sum(min(share(k, n, P) * n, P) for n in here) for k in each]
            self.supervise(losses, kind, logits, boxes, wanted, index, sizes)
        if "dn" in outputs:
            self.denoise(losses, stacks[0][2], **outputs["dn"])
        losses["total"] = sum(self.weight(name) * value for name, value in losses.items())
        return losses

    def supervise(self, losses, kind, logits, boxes, targets, index, sizes, groups=1, counted=None):
        """Add the three losses of every layer, given who owns what (index: layer, image, query, target, each [K])."""
        index, target = tuple(index[:3]), index[3]
        offset = torch.tensor([0] + [len(t["labels"]) for t in targets], device=target.device).cumsum(0)
        target = offset[index[1]] + target
        labels, wanted = torch.cat([t["labels"] for t in targets])[target], torch.cat([t["boxes"] for t in targets])[target]
        own = boxes[index]                                                                                      # [K, 4]
        iou, giou = overlaps(own, wanted, self.cfg.giou_eps)
        score, weight = giou, torch.ones_like(giou)
        if self.cfg.class_loss == "ia":
            score, rank_weight = align_quality(logits.detach()[index + (labels,)].sigmoid(), iou.detach(), index[0], target)
            weight = rank_weight if kind != "_dn" else weight                     # whose pairs are fixed, one to a target
            score = score * weight
        zero = boxes.new_zeros(len(boxes))
        parts = {
            "class": class_loss(logits, index, labels, score, self.cfg, self.weight_sum, sizes, counted),
            "bbox": zero.index_add(0, index[0], weight * (own - wanted).abs().sum(-1)),
            "giou": zero.index_add(0, index[0], weight * (1 - giou)),
        }
        for name, loss in parts.items():                                                                     # each [L]
            if name != "class" or self.cfg.class_loss != "ce":            # the softmax's mean was taken in class_loss
                loss = loss / (self.num_boxes * groups)
            for layer, value in enumerate(loss):
                suffix = "" if layer == len(loss) - 1 else f"_{layer}"
                losses[f"loss_{name}{kind}{suffix}"] = value

    def denoise(self, losses, targets, logits, boxes, queries):
        """Denoising queries know their targets: nothing is matched. logits [L, B, P, C], boxes [L, B, P, 4]."""
        L, K = len(logits), len(queries.pairs[0])
        layer = torch.arange(L, device=logits.device).repeat_interleave(K)
        index = (layer, *(i.repeat(L) for i in queries.pairs))
        # DN supervises only the slots in use; in CDN every other slot must learn to say "no object".
        counted = None if queries.contrastive else queries.used
        self.supervise(losses, "_dn", logits, boxes, targets, index, [K] * L, queries.groups, counted)

    def weight(self, name):
        """The weight of a part in the total."""
        if name.startswith("loss_class"):
            return self.cfg.weight_class_dn if "_dn" in name else self.cfg.weight_class
        return self.cfg.weight_bbox if name.startswith("loss_bbox") else self.cfg.weight_giou
