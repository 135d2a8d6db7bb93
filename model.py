"""The detector: image in, set of boxes out.

    backbone -> neck -> tokens -> encoder -> memory -> queries -> decoder -> heads

One class, `Detector`, is the whole family (DETR, Carion 2020; Conditional DETR, Meng 2021;
DAB-DETR, Liu 2022; Deformable DETR, Zhu 2021; DN-DETR, Li 2022; DINO, Zhang 2023; LW-DETR, Chen
2024; DiffuDETR, ICLR 2026); a field of `Config` (variants.py) switches each idea on. Read first
`Detector.forward`, which tells the story in order, then `encode`, `proposals`, `first_queries` and
`decode`.

Shapes: B images, S tokens (all levels), Q queries, L decoder layers, C classes, d channels, M
heads.
"""
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import diffusion
import variants
from backbone import attend, build_backbone
from baseline import FasterRCNN
from masks import MaskHead
from msda import MSDeformAttn
from variants import BOXES, VITS


def build_model(variant, **overrides):
    """A variant's `Detector` or `FasterRCNN`, with fields overridden: ("dino", num_classes=3)."""
    cfg = variants.variant(variant, **overrides)
    return FasterRCNN(cfg) if cfg.detector == "faster_rcnn" else Detector(cfg)


# =========================================================== references, positions, small parts

def inverse_sigmoid(x, eps):
    """log(x / (1 - x)): x is clamped to [0, 1], as noise may have turned a box inside out, then x
    and 1 - x separately to at least eps."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def correct(delta, reference, cfg, eps=None):
    """The box codec, what a box head's output means: r' = sigmoid(f(o) + logit(r)), or, relative
    (LW-DETR), r' = (x + f_x w, y + f_y h, w exp f_w, h exp f_h), which may leave [0, 1].

    delta [..., 4]; reference [..., 4] in [0, 1], or [..., 2], a point, which has no logit for w and
    h, or None (DETR: the head alone gives the box). Boxes are float32 even under autocast.
    """
    delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
    if cfg.box_codec == "relative":
        centre, size = reference.split(2, -1)
        if cfg.reference == "noise":  # an empty box could never grow
            size = size.clamp(min=0.01)
        return torch.cat([centre + delta[..., :2] * size, size * delta[..., 2:].exp()], -1)
    if reference is not None:
        logit = inverse_sigmoid(reference, cfg.logit_eps if eps is None else eps)
        delta = delta + F.pad(logit, (0, 4 - reference.shape[-1]))
    return delta.sigmoid()


def sine(x, features, temperature):
    """Sine encoding of x in [0, 1]: [...] -> [..., features] (Vaswani 2017, section 3.5)."""
    i = torch.arange(features, device=x.device, dtype=x.dtype)
    x = x[..., None] * 2 * math.pi / temperature ** (2 * (i // 2) / features)
    return torch.where(i % 2 == 0, x.sin(), x.cos())


class MLP(nn.Sequential):
    """Linear layers with ReLU between: `sizes` are the channels in, between and out."""

    def __init__(self, *sizes):
        layers = [nn.Linear(sizes[0], sizes[1])]
        for a, b in zip(sizes[1:], sizes[2:]):
            layers += [nn.ReLU(), nn.Linear(a, b)]
        super().__init__(*layers)


class Memory(NamedTuple):
    """What backbone and encoder know of a batch: computed once, read by every evaluation."""
    tokens: torch.Tensor  # [B, S, d], level after level, rows first
    mask: torch.Tensor  # [B, S] True = padding; padded tokens stay in the sequence
    pos: torch.Tensor  # [B, S, d] position encoding, with the level's embedding; None: not read
    shapes: list  # (h, w) of every level
    valid: torch.Tensor  # [B, levels, 2] share (w, h) of each level's map that is not padding
    centres: torch.Tensor  # [B, S, 2] the tokens' centres (x, y) in [0, 1] of the un-padded image
    maps: list = None  # what masks are drawn from: C2, C3, C4 and the projected C5


# ========================================================================= transformer layers

# Attention to the image has one protocol, and three classes have it, DenseAttention,
# ConditionalAttention and msda.MSDeformAttn: `read(memory)` computes what a layer reads of the
# memory, once for all evaluations (nn.MultiheadAttention alone cannot); then `attn(x, pos, around,
# read)` answers queries x [B, Q, d] with positions pos [B, Q, d]. `around` is where they look:
# nothing (dense), the sine of the reference [B, Q, d] (conditional), or the reference itself in
# every level's map [B, Q, levels, 2 or 4] (deformable).

class DenseAttention(nn.MultiheadAttention):
    """Attention to all tokens (Vaswani 2017, as DETR has it): content and position are summed."""

    def project(self, x, part):
        """x [B, N, d] to queries (part 0), keys (1) or values (2)."""
        return F.linear(x, self.in_proj_weight.chunk(3)[part], self.in_proj_bias.chunk(3)[part])

    def read(self, memory):
        """Keys (with position) and values (without) [B, S, d], and what is real [B, 1, 1, S]."""
        return (self.project(memory.tokens + memory.pos, 1), self.project(memory.tokens, 2),
                ~memory.mask[:, None, None])

    def forward(self, x, pos, around, read):
        keys, values, real = read
        return self.out_proj(attend(self.project(x + pos, 0), keys, values, self.num_heads, real,
                                    self.dropout * self.training))


class ConditionalAttention(nn.Module):
    """Conditional DETR's cross-attention (Meng 2021, section 3.3).

    Content and position are projected apart and concatenated in every head, so that a score is
    content . content + position . position, and position alone can point to a place: a query's is
    the sine of its reference. In the first layer, whose content knows nothing yet, position is also
    added to content: `pos` to queries, and to keys the image's, which then counts twice.
    """

    def __init__(self, d, heads, dropout, first):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qcontent, self.qpos_sine, self.kcontent, self.kpos, self.v, self.out_proj = (
            nn.Linear(d, d) for _ in range(6))
        self.qpos = nn.Linear(d, d) if first else None
        nn.init.zeros_(self.out_proj.bias)

    def joined(self, content, position):
        """Two [B, N, d] to one [B, N, 2d], head by head: [content 0, position 0, content 1, ...]"""
        parts = [x.unflatten(-1, (self.heads, -1)) for x in (content, position)]
        return torch.cat(parts, -1).flatten(2)

    def read(self, memory):
        content, position = self.kcontent(memory.tokens), self.kpos(memory.pos)
        if self.qpos is not None:
            content = content + position
        return self.joined(content, position), self.v(memory.tokens), ~memory.mask[:, None, None]

    def forward(self, x, pos, around, read):
        content, (keys, values, real) = self.qcontent(x), read
        if self.qpos is not None:
            content = content + self.qpos(pos)
        query = self.joined(content, self.qpos_sine(around))
        return self.out_proj(attend(query, keys, values, self.heads, real,
                                    self.dropout * self.training))


class SelfAttention(nn.MultiheadAttention):
    """Queries x [B, Q, d] look at each other. pos [B, Q, d] is added to queries and keys, never to
    values; blocked [Q, Q] bool, True = may not attend, or None."""

    def forward(self, x, pos, blocked):
        q = x + pos
        return super().forward(q, q, x, attn_mask=blocked, need_weights=False)[0]


class ConditionalSelfAttention(nn.Module):
    """The same with projections of its own for position (Conditional DETR)."""

    def __init__(self, d, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qcontent, self.qpos, self.kcontent, self.kpos, self.v, self.out_proj = (
            nn.Linear(d, d) for _ in range(6))
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, pos, blocked):
        q, k = self.qcontent(x) + self.qpos(pos), self.kcontent(x) + self.kpos(pos)
        allowed = None if blocked is None else ~blocked
        return self.out_proj(attend(q, k, self.v(x), self.heads, allowed,
                                    self.dropout * self.training))


def image_attention(cfg, heads):
    """The layer with which tokens look at the image, and queries, unless conditionally."""
    if cfg.attention == "deformable":
        return MSDeformAttn(cfg.d_model, cfg.levels, heads, cfg.points)
    return DenseAttention(cfg.d_model, heads, cfg.dropout)


def activation(cfg):
    """Of the feed-forward blocks; PReLU's slope below zero is learned (DAB-DETR)."""
    return nn.PReLU() if cfg.activation == "prelu" else nn.ReLU()


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward block, each with a residual and a norm after it."""

    def __init__(self, cfg):
        super().__init__()
        d = cfg.d_model
        self.self_attn = image_attention(cfg, cfg.heads)
        self.linear1, self.linear2 = nn.Linear(d, cfg.ffn), nn.Linear(cfg.ffn, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.activation, self.dropout = activation(cfg), nn.Dropout(cfg.dropout)

    def forward(self, x, memory):
        """x [B, S, d] tokens so far; memory: the Memory that they will become."""
        read = self.self_attn.read(memory._replace(tokens=x))
        # Each token looks around its own centre, in [0, 1] of every level's map, padding included.
        reference = memory.centres[:, :, None] * memory.valid[:, None]  # [B, S, levels, 2]
        x = self.norm1(x + self.dropout(self.self_attn(x, memory.pos, reference, read)))
        y = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return self.norm2(x + self.dropout(y))


class DecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to the memory, feed-forward; post-norm each.
    first: it is the decoder's first."""

    def __init__(self, cfg, first=False):
        super().__init__()
        d, cross_heads = cfg.d_model, cfg.cross_heads or cfg.heads
        if cfg.attention == "conditional":
            self.self_attn = ConditionalSelfAttention(d, cfg.heads, cfg.dropout)
            self.cross_attn = ConditionalAttention(d, cross_heads, cfg.dropout, first)
        else:
            self.self_attn = SelfAttention(d, cfg.heads, cfg.dropout, batch_first=True)
            self.cross_attn = image_attention(cfg, cross_heads)
        self.linear1, self.linear2 = nn.Linear(d, cfg.ffn), nn.Linear(cfg.ffn, d)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.activation, self.dropout = activation(cfg), nn.Dropout(cfg.dropout)
        self.time = None
        if cfg.reference == "noise":  # "add": one shift; "scale_shift": a pair for each sublayer
            blocks, width = (1, d) if cfg.time == "add" else (3, 2 * d)
            self.time = nn.ModuleList(
                nn.Sequential(nn.SiLU(), nn.Linear(4 * d, width)) for _ in range(blocks))

    def modulate(self, x, t, block):
        """Tell x the time t [B, 4d] by scale and shift, as DiffuDINO's code: 3 times a layer."""
        if self.time is None or len(self.time) == 1:
            return x
        scale, shift = self.time[block](t)[:, None].chunk(2, -1)
        return x + x * (1 + scale) + shift  # x twice, as in the checkpoints' code; DiT has it once

    def forward(self, x, pos, around, read, blocked, t, groups=1):
        """x [B, Q, d] content; pos [B, Q, d] position; around, read, blocked: as the attentions
        take them; t [B, 4d], of the time, or None; groups: parts of Q that do not see each other"""
        x = self.modulate(x, t, 0)
        parts = (y.unflatten(1, (groups, -1)).flatten(0, 1) for y in (x, pos))  # [B * groups, ...]
        y = self.self_attn(*parts, blocked).unflatten(0, (-1, groups)).flatten(1, 2)
        x = self.norm1(x + self.dropout(y))
        if self.time is not None and len(self.time) == 1:
            x = x + self.time[0](t)[:, None]  # DiffuDETR: FFN(MSDA(SA(q) + t, r_t, O_enc))
        x = self.modulate(x, t, 1)
        x = self.norm2(x + self.dropout(self.cross_attn(x, pos, around, read)))
        x = self.modulate(x, t, 2)
        y = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return self.norm3(x + self.dropout(y))


# =============================================================================== the detector

class Detector(nn.Module):
    """Image in, set of boxes out. `cfg` is the model's `Config`."""

    checkpoint_activations = False  # True: recompute layers in the backward pass, for less memory

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        d, queries = cfg.d_model, cfg.query_groups * cfg.num_queries
        mark = int(cfg.denoising == "dn")  # the last channel of content says: a denoising query
        self.backbone, self.input_proj = build_backbone(cfg)
        self.backbone.to(memory_format=torch.channels_last)
        if cfg.attention == "deformable" and cfg.encoder_layers:
            self.level_embed = nn.Parameter(torch.empty(cfg.levels, d))
        self.encoder = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.encoder_layers))
        if cfg.encoder_scale:
            self.encoder_scale = MLP(d, d, d)
        self.decoder = nn.ModuleList(DecoderLayer(cfg, l == 0) for l in range(cfg.decoder_layers))
        self.decoder_norm = nn.LayerNorm(d) if cfg.decoder_norm else nn.Identity()

        # Heads: one for all layers, or one each.
        heads = 1 if cfg.shared_heads else cfg.decoder_layers
        self.class_embed = nn.ModuleList(nn.Linear(d, cfg.logits) for _ in range(heads))
        self.bbox_embed = nn.ModuleList(MLP(d, d, d, 4) for _ in range(heads))

        # Where queries start.
        if cfg.reference in BOXES and cfg.content != "split":
            self.ref_point_head = MLP(2 * d, d, d)  # a position from a box
        if cfg.reference == "points" and cfg.attention == "conditional":
            self.ref_point_head = MLP(d, d, 2)  # a point from a position
        elif cfg.reference == "points":
            self.reference_points = nn.Linear(d, 2)
        if cfg.query_scale and cfg.decoder_layers > 1:
            self.query_scale = MLP(d, d, d)
        if cfg.size_modulation:
            self.ref_anchor_head = MLP(d, d, 2)
        if cfg.reference not in BOXES:
            self.query_embed = nn.Embedding(queries, 2 * d if cfg.content == "split" else d)
        if cfg.reference == "anchors" or cfg.reference == "proposals" and cfg.proposal_offsets:
            self.refpoint_embed = nn.Embedding(queries, 4)
        if cfg.content == "learned":
            self.tgt_embed = nn.Embedding(queries, d - mark)
        if cfg.two_stage:
            def made(kind, *sizes):  # one, or one for each query group (LW-DETR)
                each = [kind(*sizes) for _ in range(cfg.query_groups if cfg.group_proposals else 1)]
                return nn.ModuleList(each) if cfg.group_proposals else each[0]

            self.enc_output, self.enc_output_norm = made(nn.Linear, d, d), made(nn.LayerNorm, d)
            self.enc_class_embed = made(nn.Linear, d, cfg.logits)
            self.enc_bbox_embed = made(MLP, d, d, d, 4)
        if cfg.content == "split" and cfg.reference == "proposals":
            self.pos_trans, self.pos_trans_norm = nn.Linear(2 * d, 2 * d), nn.LayerNorm(2 * d)
        if cfg.denoising != "none":
            self.label_enc = nn.Embedding(cfg.num_classes + cfg.no_label_row, d - mark)
        if cfg.reference == "noise":
            self.time_embed = nn.Sequential(nn.Linear(d, 4 * d), nn.SiLU(), nn.Linear(4 * d, 4 * d))
        self.reset_parameters()
        if cfg.masks:
            self.mask_head = MaskHead(cfg, self.backbone.channels)

    def reset_parameters(self):
        """All initialisation that is not torch's default or an attention's own, in one place."""
        cfg = self.cfg
        for name in ("encoder", "decoder", "enc_output", "pos_trans", "reference_points",
                     "ref_point_head", "query_scale", "time_embed", "encoder_scale",
                     "ref_anchor_head"):
            for p in getattr(self, name).parameters() if hasattr(self, name) else ():
                if p.dim() > 1:
                    nn.init.xavier_uniform_(p)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):  # its own, which Xavier has just overwritten
                module.reset_parameters()
        class_heads, box_heads = [*self.class_embed], [*self.bbox_embed]
        for _, _, class_head, box_head in self.proposal_heads() if cfg.two_stage else ():
            class_heads.append(class_head)
            box_heads.append(box_head)
        for head in class_heads if cfg.class_loss != "ce" else []:
            # A prior of 1%, or the many negatives swamp the first steps (Lin et al. 2017, 3.3).
            nn.init.constant_(head.bias, -math.log(99))
        if cfg.attention == "deformable" and cfg.backbone not in VITS:
            for projection in self.input_proj:
                nn.init.xavier_uniform_(projection[0].weight)
                nn.init.zeros_(projection[0].bias)
        if hasattr(self, "level_embed"):
            nn.init.normal_(self.level_embed)
        if cfg.reference == "none":  # DETR's heads correct no box: they are an MLP as any
            box_heads = box_heads[len(self.bbox_embed):]
        for head in box_heads:
            head.load_state_dict(self.bbox_embed[0].state_dict())
            nn.init.zeros_(head[-1].weight)  # the first boxes are the references
            nn.init.zeros_(head[-1].bias)
        for head in class_heads:  # the published heads are clones of one
            head.load_state_dict(self.class_embed[0].state_dict())
        # Deformable DETR's first boxes are 12% of a side; a head that refines would shrink more.
        if (cfg.attention == "deformable" and cfg.reference in ("points", "anchors")
                and not (cfg.refine and cfg.shared_heads)):
            for head in box_heads[:1] if cfg.refine else box_heads:
                nn.init.constant_(head[-1].bias[2:], -2)
        if hasattr(self, "reference_points"):
            nn.init.zeros_(self.reference_points.bias)
        if cfg.reference == "proposals" and cfg.proposal_offsets:
            nn.init.zeros_(self.refpoint_embed.weight)
        if cfg.two_stage and cfg.content == "learned":
            nn.init.xavier_uniform_(self.tgt_embed.weight)  # DINO's effective initialisation

    def forward(self, images, mask, targets=None, generator=None, watch=None):
        """Detect.

        Args:
            images: [B, 3, H, W] normalised, zero-padded at the right and bottom.
            mask: [B, H, W] bool, True = padding.
            targets: list of B dicts with labels [G] and boxes [G, 4] (cxcywh in [0, 1] of the
                un-padded image). Needed in training by denoising and diffusion.
            generator: in training, the torch.Generator of the noise, on the images' device; in
                evaluation of a diffusion model a list, see `diffusion.sample`. watch: see there.

        Returns a dict: logits [L, B, Q, C], boxes [L, B, Q, 4] and states [L, B, Q, d] of all
        decoder layers, of which the last is the answer; "enc" (proposals): logits, boxes; "dn"
        (in training): logits, boxes and queries, a `diffusion.Denoising`; "query_groups", if Q
        holds several; "sampled" (diffusion, in evaluation): `best_pairs` of every step, L is 1;
        "masks": a function of image [K] and query [K] that draws their masks, logits [K, h, w] at
        stride 4, so that none is drawn in vain.
        """
        cfg = self.cfg
        if images.shape[0] != mask.shape[0] or images.shape[2:] != mask.shape[1:]:
            raise ValueError(f"images {tuple(images.shape)}, mask {tuple(mask.shape)}: they must "
                             "be [B, 3, H, W] and [B, H, W]")
        denoising, diffuses = cfg.denoising != "none" and self.training, cfg.reference == "noise"
        if self.training and targets is None and (denoising or diffuses):
            raise ValueError("training noises the targets: call model(images, mask, targets)")
        right, bottom = (-n % self.backbone.divisor for n in images.shape[:1:-1])
        if right or bottom:  # a ViT's windows are whole
            images = F.pad(images, (0, right, 0, bottom))
            mask = F.pad(mask, (0, right, 0, bottom), value=True)
        memory = self.encode(images, mask)
        outputs, chosen = {}, None
        # Where noise and learned content start the queries, inference needs no proposals.
        if cfg.two_stage and (self.training or cfg.reference == "proposals"
                              or cfg.content == "memory"):
            outputs["enc"], chosen = self.proposals(memory)
        content, pos, reference = self.first_queries(memory, chosen)
        read = [layer.cross_attn.read(memory) for layer in self.decoder]  # once for all evaluations

        names = "logits", "boxes", "states"
        if diffuses and not self.training:  # DiffuDETR, inference
            def decode(reference, t):
                return self.decode(memory, read, content, pos, reference, t=t, every_layer=False)
            answer, outputs["sampled"] = diffusion.sample(
                decode, images.shape[0], cfg, images.device, memory.centres.dtype, generator, watch)
            return outputs | dict(zip(names, answer))

        t, blocked, P, groups = None, None, 0, cfg.query_groups if self.training else 1
        if diffuses:  # DiffuDETR, training
            reference, t = diffusion.noised_references(targets, cfg, generator)
        if groups > 1:
            outputs["query_groups"] = groups
        if denoising:  # DN, DINO: put before the rest
            noised, Q = diffusion.denoising_queries(targets, cfg, generator), content.shape[1]
            matching = torch.arange(Q, device=images.device) // (Q // groups)  # [Q] group ids
            P, blocked = len(noised.group), diffusion.attention_mask(noised.group, matching)
            groups = 1  # for the mask keeps them apart
            extra = self.mark(self.label_enc(noised.labels), 1) * noised.used[..., None]
            content = torch.cat([extra.to(content), content], 1)
            # Through the logit and back, as published: boxes at the border end 1e-3 inside.
            boxes = inverse_sigmoid(noised.boxes, cfg.logit_eps).sigmoid()
            reference = torch.cat([boxes, reference], 1)
        parts = self.decode(memory, read, content, pos, reference, blocked, t, groups)
        if denoising:
            logits, boxes, _ = (x[:, :, :P] for x in parts)
            outputs["dn"] = {"logits": logits, "boxes": boxes, "queries": noised}
        outputs |= {name: x[:, :, P:] for name, x in zip(names, parts)}
        if cfg.masks:
            outputs["masks"] = partial(self.mask_head, outputs["states"][-1], memory)
        return outputs

    def run(self, layer, *inputs):
        """A layer or a block of the backbone, whose activations may be recomputed in backward."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    # ------------------------------------------------------------------------ image to memory

    def encode(self, images, mask):
        """Images [B, 3, H, W] and mask [B, H, W] to the encoder's `Memory`."""
        cfg = self.cfg
        images = images.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
        seen = self.backbone(images, self.run)
        maps = self.input_proj(seen)
        wide = torch.promote_types(maps[0].dtype, torch.float32)  # coordinates are never in half
        masks, positions, valids, centres = [], [], [], []
        for level, x in enumerate(maps):
            h, w = x.shape[2:]
            m = F.interpolate(mask[:, None].float(), size=(h, w))[:, 0].bool()  # floor(i * H / h)
            valid = torch.stack([(~m[:, 0]).sum(1), (~m[:, :, 0]).sum(1)], -1).to(wide)  # w, h
            if cfg.encoder_layers or cfg.attention != "deformable":  # or nobody looks at it
                pos = self.position(m, wide).to(x).flatten(1, 2)
                if cfg.attention == "deformable":
                    pos = pos + self.level_embed[level]
                positions.append(pos)
            sides = (torch.arange(n, device=x.device, dtype=wide) for n in (h, w))
            row, column = torch.meshgrid(*sides, indexing="ij")
            cells = torch.stack([column, row], -1).view(1, h * w, 2) + 0.5
            masks.append(m.flatten(1))
            centres.append(cells / valid[:, None].clamp(min=1))
            valids.append(torch.stack([valid[:, 0] / w, valid[:, 1] / h], -1))
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        memory = Memory(tokens, torch.cat(masks, 1), torch.cat(positions, 1) if positions else None,
                        [tuple(x.shape[2:]) for x in maps], torch.stack(valids, 1),
                        torch.cat(centres, 1), [*seen[:3], *maps] if cfg.masks else None)
        for layer in self.encoder:
            # DAB-DETR: what a token has seen scales its position.
            pos = memory.pos * self.encoder_scale(tokens) if cfg.encoder_scale else memory.pos
            tokens = self.run(layer, tokens, memory._replace(pos=pos))
        return memory._replace(tokens=tokens)

    def position(self, mask, dtype):
        """Sine encoding [B, h, w, d] of the cells' places: y in the first half, then x."""
        cfg, axes = self.cfg, []
        for axis in (1, 2):
            count = (~mask).cumsum(axis).to(dtype)
            last = count.narrow(axis, count.shape[axis] - 1, 1)
            axes.append(sine((count + cfg.pos_offset) / (last + 1e-6), cfg.d_model // 2,
                             cfg.pos_temperature))
        return torch.cat(axes, -1)

    # ---------------------------------------------------------------------- memory to queries

    def proposals(self, memory):
        """Two-stage (Zhu et al. 2021, appendix A.4): every token proposes a box around its cell.

        Returns the proposals to supervise, {"logits": [B, S or Q, C], "boxes"}, and the Q
        best: (their memory [B, Q, d], their boxes [B, Q, 4]), detached. In training Q counts all
        query groups, and so does what is supervised if these have their own heads.
        """
        cfg, groups = self.cfg, self.cfg.query_groups if self.training else 1
        side = torch.cat([memory.centres.new_full((h * w,), 0.05 * 2.0 ** level)
                          for level, (h, w) in enumerate(memory.shapes)])
        B = memory.mask.shape[0]
        grid = torch.cat([memory.centres, side[None, :, None].expand(B, -1, 2)], -1)
        good = (((grid > 0.01) & (grid < 0.99)).all(-1) & ~memory.mask)[..., None]  # [B, S, 1]
        # No delta moves these: the logit of 1 is infinite, a box of size 0 stays it.
        grid = torch.where(good, grid, int(cfg.box_codec == "logit"))
        tokens, heads = memory.tokens * good, self.proposal_heads()[:groups]
        parts = zip(*(self.propose(tokens, grid, *own) for own in heads))
        logits, boxes, *best = (torch.cat(part, 1) for part in parts)
        return {"logits": logits, "boxes": boxes}, tuple(
            x.detach().repeat(1, groups // len(heads), 1) for x in best)

    def proposal_heads(self):
        """The modules that propose: one set, or one for each query group (LW-DETR)."""
        heads = self.enc_output, self.enc_output_norm, self.enc_class_embed, self.enc_bbox_embed
        return [*zip(*heads)] if self.cfg.group_proposals else [heads]

    def propose(self, tokens, grid, output, norm, class_embed, bbox_embed):
        """One set's logits and boxes to supervise, and the best proposals' memory and boxes."""
        cfg, tokens = self.cfg, norm(output(tokens))
        logits = class_embed(tokens).to(grid)
        score = logits[..., 0] if cfg.proposal_score == "first" else logits.amax(-1)
        Q = min(cfg.num_queries, score.shape[1])  # a very small image has fewer tokens than queries
        best = score.topk(Q, dim=1).indices[..., None]  # [B, Q, 1]

        def pick(x):
            return x.gather(1, best.expand(-1, -1, x.shape[-1]))

        content = pick(tokens)
        if cfg.proposal_loss == "selected":  # the other tokens' boxes are not needed
            boxes = correct(bbox_embed(content), pick(grid), cfg, 0)
            return pick(logits), boxes, content, boxes
        boxes = correct(bbox_embed(tokens), grid, cfg, 0)
        return logits, boxes, content, pick(boxes)

    def first_queries(self, memory, chosen):
        """Where queries start -> content [B, Q, d], position [B, Q, d] or None (made in every layer
        from the reference box), and reference points [B, Q, 2] or boxes [B, Q, 4] in [0, 1], or
        None (DETR has none, noise comes later). In training Q counts all query groups.
        """
        cfg, B = self.cfg, memory.tokens.shape[0]
        groups = cfg.query_groups if self.training else 1
        Q = chosen[1].shape[1] // groups if cfg.reference == "proposals" else cfg.num_queries
        pos = reference = None

        def learned(embedding):  # row i of a group belongs to its proposal of rank i
            rows = embedding.weight[:groups * cfg.num_queries].unflatten(0, (groups, -1))[:, :Q]
            return rows.flatten(0, 1).expand(B, -1, -1)

        # Where: the reference. (A point is made from its position, below.)
        if cfg.reference == "anchors":
            reference = learned(self.refpoint_embed).sigmoid()
        elif cfg.reference == "proposals":
            reference = chosen[1]
            if cfg.proposal_offsets:
                reference = correct(learned(self.refpoint_embed), reference, cfg)

        # Position: learned, or made once from the proposals' boxes (x, y, w, h here, as published);
        # "split" holds content as well.
        if cfg.reference not in BOXES:
            pos = learned(self.query_embed)
        elif cfg.content == "split":
            pos = sine(reference, cfg.d_model // 2, 10000).flatten(2)
            pos = self.pos_trans_norm(self.pos_trans(pos))
        if cfg.content == "split":
            pos, content = (half.contiguous() for half in pos.chunk(2, -1))  # or export fails
        if cfg.reference == "points":
            conditional = cfg.attention == "conditional"
            to_point = self.ref_point_head if conditional else self.reference_points
            reference = to_point(pos).to(memory.centres).sigmoid()  # coordinates: never in half

        # Content. With proposals, learned content is DINO's mixed query selection (section 3.4):
        # boxes come from the encoder, content does not.
        if cfg.content == "learned":
            content = self.mark(learned(self.tgt_embed), 0)
        elif cfg.content == "memory":  # with fewer tokens than queries they are repeated
            content = chosen[0].unflatten(1, (groups, -1))
            rank = torch.arange(Q, device=content.device) % content.shape[2]
            content = content[:, :, rank].flatten(1, 2)
        elif cfg.content == "label":  # DN-DETR: all alike, the embedding of "no label yet"
            content = self.mark(self.label_enc.weight[-1:], 0).expand(B, groups * Q, -1)
        elif cfg.content == "zero":
            content = memory.tokens.new_zeros(B, groups * Q, cfg.d_model)
        return content, pos, reference

    def mark(self, content, indicator):
        """DN-DETR's indicator: a last channel, 1 in denoising queries, 0 in others."""
        return F.pad(content, (0, 1), value=indicator) if self.cfg.denoising == "dn" else content

    # ----------------------------------------------------------------------- queries to boxes

    def decode(self, memory, read, content, pos, reference, blocked=None, t=None, groups=1,
               every_layer=True):
        """One evaluation of the decoder.

        Args: read, what each layer's cross-attention reads of the memory; content, pos, reference
        as from `first_queries`; blocked [Q, Q], self-attention's mask, or None; t [B], diffusion
        time, or None; groups, of queries that do not see each other; every_layer, False: only the
        last layer answers (L is 1).

        Returns logits [L, B, Q, C], boxes [L, B, Q, 4] and states [L, B, Q, d].
        """
        cfg = self.cfg
        if t is not None:  # [cos, sin] of t at d/2 frequencies, then an MLP
            i = torch.arange(cfg.d_model // 2, device=t.device, dtype=memory.centres.dtype)
            angle = t[:, None] * 10000 ** (-2 * i / cfg.d_model)
            t = self.time_embed(torch.cat([angle.cos(), angle.sin()], -1))
        # reference: where a layer looks, detached. base: what its box is predicted from.
        # place: what its position is made of.
        x, base, states, bases, around = content, reference, [], [], None
        for l, layer in enumerate(self.decoder):
            # Conditional DETR (section 3.3): p = lambda * p_s, what a query has seen so far scales
            # its position, and so what it looks for. Before the first layer it has seen nothing.
            scale = self.query_scale(x) if cfg.query_scale and l > 0 else 1
            place = reference
            if cfg.attention == "deformable":  # from [0, 1] of the image to that of the whole maps
                valid = memory.valid.repeat(1, 1, reference.shape[-1] // 2)
                around = reference[:, :, None] * valid[:, None]  # [B, Q, levels, 2 or 4]
                place = around[:, :, 0]
            if cfg.reference in BOXES and cfg.content != "split" and (cfg.refine or l == 0):
                pos = sine(place[..., [1, 0, 2, 3]], cfg.d_model // 2, 10000).flatten(2)
                pos = self.ref_point_head(pos)  # DAB-DETR: MLP(sine(y, x, w, h))
            if cfg.attention == "conditional":
                around = self.positional_query(x, reference) * scale
            scaled = pos * scale if cfg.query_scale and cfg.attention != "conditional" else pos
            x = self.run(layer, x, scaled, around, read[l], blocked, t, groups)
            states.append(x)
            bases.append(base)
            if cfg.refine and l + 1 < len(self.decoder):
                # Iterative refinement (Zhu 2021, A.4): r_{l+1} = sigmoid(f(o_l) + logit(r_l)), and
                # no gradient flows through r. Look forward twice (DINO, section 3.5): layer l+1
                # predicts from r_{l+1} undetached, so that its loss reaches f(o_l) too. Here x is
                # without decoder_norm, in predictions it is with it (DAB-DETR).
                corrected = correct(self.head(self.bbox_embed, l)(x), reference, cfg)
                reference = corrected.detach()
                base = corrected if cfg.look_forward_twice else reference
        logits, boxes, first = [], [], 0 if every_layer else len(states) - 1
        states = [self.decoder_norm(x) for x in states[first:]]
        for l, (h, base) in enumerate(zip(states, bases[first:]), first):
            logits.append(self.head(self.class_embed, l)(h))
            boxes.append(correct(self.head(self.bbox_embed, l)(h), base, cfg))
        return torch.stack(logits).to(memory.centres), torch.stack(boxes), torch.stack(states)

    def positional_query(self, x, reference):
        """The sine of the reference's centre [B, Q, d], y before x: what conditional attention
        looks for. DAB-DETR (section 4.4) divides its x part by the box's width and its y part by
        the height, so that the attention is as wide and as high as the object."""
        yx = sine(reference[..., [1, 0]], self.cfg.d_model // 2, 10000)  # [B, Q, 2, d / 2]
        if self.cfg.size_modulation:
            # The authors divide by sizes as they are. Noise may be an empty box, and 1 / least
            # must fit in half precision.
            least = 1e-3 if self.cfg.reference == "noise" else 2e-5
            size = reference[..., 2:].clamp(min=least)
            wanted = self.ref_anchor_head(x).sigmoid()  # a width and a height
            yx = yx * (wanted / size)[..., [1, 0], None]
        return yx.flatten(2)

    def head(self, heads, layer):
        """The head of a layer: its own, or the one for all."""
        return heads[min(layer, len(heads) - 1)]
