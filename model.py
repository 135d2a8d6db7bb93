"""The detector: image in, set of boxes out.

    backbone -> neck -> tokens -> encoder -> memory -> queries -> decoder -> heads

One class, `Detector`, is the whole family; a field of `Config` (variants.py) switches each paper's idea on. Read
`Detector.forward` first: it tells the story in order. Then `memory_of`, `proposals`, `first_queries`, `decode`.

    DETR             Carion 2020    dense attention, learned queries
    Deformable DETR  Zhu 2021       attention="deformable", refine, two_stage
    DN-DETR          Li 2022        queries="anchors", denoising="dn"
    DINO             Zhang 2023     denoising="cdn", content="learned" with two_stage, look_forward_twice
    DiffuDETR        ICLR 2026      queries="noise": the reference boxes are denoised, see diffusion.py

Shapes: B images, S tokens (all levels), Q queries, L decoder layers, C classes, d channels, M heads, D channels a head.
"""
import math
import operator
import warnings
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

import diffusion
import variants
from dropout import Dropout, MultiheadAttention
from msda import MSDeformAttn


def build_model(variant, **overrides):
    """A `Detector` by the name of a variant, with `Config` fields overridden: build_model("dino", num_classes=3)."""
    return Detector(variants.variant(variant, **overrides))


def inverse_sigmoid(x, eps):
    """log(x / (1 - x)), with x clamped to [0, 1], then x and 1 - x to at least eps, each on its own.

    The first clamp matters: noise may turn a denoising box inside out, and its width is then negative.
    """
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def sine(x, features, temperature, scale=2 * math.pi):
    """Sine encoding of coordinates: [...] -> [..., features], sin on even i, cos on odd (Vaswani 2017, section 3.5)."""
    i = torch.arange(features, device=x.device, dtype=x.dtype)
    x = x[..., None] * scale / temperature ** (2 * (i // 2) / features)
    return torch.where(i % 2 == 0, x.sin(), x.cos())


class MLP(nn.Sequential):
    """Linear layers with ReLU between: `sizes` are the channels in, between and out."""

    def __init__(self, *sizes):
        layers = [nn.Linear(sizes[0], sizes[1])]
        for a, b in zip(sizes[1:], sizes[2:]):
            layers += [nn.ReLU(), nn.Linear(a, b)]
        super().__init__(*layers)


# ============================================================================================================= backbone

def folded(conv, norm, x):
    """A convolution with the frozen batch norm after it: a scale and a shift per channel, which its weights can take."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return conv._conv_forward(x, conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale)


def build_backbone(cfg):
    """torchvision's ResNet up to the last stage, giving the stages that the neck reads, and their channels.

    Frozen batch norm needs pretrained statistics: with random weights it learns nothing, so training from scratch
    takes backbone_norm="batch". Weights are loaded by weights.py; nothing is downloaded here.
    """
    norm = FrozenBatchNorm2d if cfg.backbone_norm == "frozen" else nn.BatchNorm2d
    dilation = {"replace_stride_with_dilation": [False, False, True]} if cfg.dilation else {}
    body = getattr(torchvision.models, cfg.backbone)(weights=None, norm_layer=norm, **dilation)
    stages = ["layer4"] if cfg.levels == 1 else ["layer2", "layer3", "layer4"]
    channels = [getattr(body, s)[-1].conv1.in_channels for s in stages]
    if cfg.backbone_norm == "frozen":                                     # the published models never train the stem
        for p in [*body.conv1.parameters(), *body.layer1.parameters()]:
            p.requires_grad_(False)
        modules = dict(body.named_modules())
        for name, norm in modules.items():
            if isinstance(norm, FrozenBatchNorm2d):              # bn1 follows conv1, downsample.1 follows downsample.0
                conv = modules[name.replace("bn", "conv") if "bn" in name else name[:-1] + "0"]
                conv.forward, norm.forward = partial(folded, conv, norm), operator.pos         # +x is x, and can be pickled
    return IntermediateLayerGetter(body, {s: str(i) for i, s in enumerate(stages)}), channels


# =================================================================================================== transformer layers

class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward block, each with a residual and a norm after it (post-norm)."""

    def __init__(self, cfg):
        super().__init__()
        d = cfg.d_model
        if cfg.attention == "dense":
            self.self_attn = MultiheadAttention(d, cfg.heads, cfg.dropout)
        else:
            self.self_attn = MSDeformAttn(d, cfg.levels, cfg.heads, cfg.points)
        self.linear1, self.linear2 = nn.Linear(d, cfg.ffn), nn.Linear(cfg.ffn, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout = Dropout(cfg.dropout)

    def forward(self, x, m):
        """x [B, S, d] tokens so far; m, the Memory they will become (positions, mask, shapes, references)."""
        q = x + m.pos                                           # position goes to queries and keys, never to values
        if isinstance(self.self_attn, MSDeformAttn):
            y = self.self_attn(q, m.reference, self.self_attn.project(x, m.mask), m.shapes)
        else:
            y = self.self_attn(q, q, x, key_padding_mask=m.mask)
        x = self.norm1(x + self.dropout(y))
        y = self.linear2(self.dropout(self.linear1(x), relu=True))
        return self.norm2(x + self.dropout(y))


class DecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to the memory, feed-forward; residual and norm after each."""

    def __init__(self, cfg):
        super().__init__()
        d = cfg.d_model
        self.self_attn = MultiheadAttention(d, cfg.heads, cfg.dropout)
        if cfg.attention == "dense":
            self.cross_attn = MultiheadAttention(d, cfg.heads, cfg.dropout)
        else:
            self.cross_attn = MSDeformAttn(d, cfg.levels, cfg.heads, cfg.points)
        self.linear1, self.linear2 = nn.Linear(d, cfg.ffn), nn.Linear(cfg.ffn, d)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout = Dropout(cfg.dropout)
        self.time = None
        if cfg.queries == "noise":          # "add" makes one shift; "scale_shift" a scale and a shift for each sublayer
            blocks, width = (1, d) if cfg.time == "add" else (3, 2 * d)
            self.time = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(4 * d, width)) for _ in range(blocks))

    def modulate(self, x, t, block):
        """Tell x the time t [B, 4d] by scale and shift, as the published DiffuDINO does before each sublayer."""
        if self.time is None or len(self.time) == 1:
            return x
        scale, shift = self.time[block](t)[:, None].chunk(2, -1)
        return x + x * (1 + scale) + shift                      # x twice, as in the checkpoints' code; DiT has it once

    def forward(self, x, pos, attend, blocked, t):
        """
        Args:
            x: [B, Q, d] content. pos: [B, Q, d], added to queries and keys, never to values.
            attend: function (cross_attn, query [B, Q, d]) -> [B, Q, d], the look at the memory.
            blocked: [Q, Q] bool, True = may not attend, or None. t: [B, 4d] time embedding, or None.
        """
        x = self.modulate(x, t, 0)
        q = x + pos
        x = self.norm1(x + self.dropout(self.self_attn(q, q, x, attn_mask=blocked)))
        if self.time is not None and len(self.time) == 1:               # DiffuDETR: FFN(MSDA(SA(q) + t, r_t, O_enc))
            x = x + self.time[0](t)[:, None]
        x = self.modulate(x, t, 1)
        x = self.norm2(x + self.dropout(attend(self.cross_attn, x + pos)))
        x = self.modulate(x, t, 2)
        y = self.linear2(self.dropout(self.linear1(x), relu=True))
        return self.norm3(x + self.dropout(y))


class Memory(NamedTuple):
    """What backbone and encoder know of a batch: computed once, read by every decoder evaluation."""
    tokens: torch.Tensor          # [B, S, d], level after level, rows first
    mask: torch.Tensor            # [B, S] True = padding; padded tokens stay in the sequence
    pos: torch.Tensor             # [B, S, d] position encoding, with the level's embedding
    shapes: list                  # (h, w) of every level
    valid: torch.Tensor           # [B, levels, 2] share (w, h) of each level's map that is photo, not padding
    centres: torch.Tensor         # [B, S, 2] the tokens' centres (x, y) in [0, 1] of the un-padded photo

    @property
    def reference(self):
        """[B, S, levels, 2]: each token's centre, in [0, 1] of every level's whole map: where the encoder looks."""
        return self.centres[:, :, None] * self.valid[:, None]


# ========================================================================================================= the detector

class Detector(nn.Module):
    """Image in, set of boxes out. `cfg` is the model's `Config`."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        d, C = cfg.d_model, cfg.num_classes
        self.backbone, channels = build_backbone(cfg)
        self.backbone.to(memory_format=torch.channels_last)
        if cfg.attention == "dense":
            self.input_proj = nn.Conv2d(channels[0], d, 1)
        else:
            # One more level is a strided convolution of the raw C5; the next one would read that level's output.
            extra = [(channels[-1] if i == 0 else d, 3) for i in range(cfg.levels - len(channels))]
            self.input_proj = nn.ModuleList(
                nn.Sequential(nn.Conv2d(c, d, k, stride=1 + k // 2, padding=k // 2), nn.GroupNorm(32, d))
                for c, k in [(c, 1) for c in channels] + extra)
            self.level_embed = nn.Parameter(torch.empty(cfg.levels, d), cfg.encoder_layers > 0)        # the encoder's alone
        self.encoder = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.decoder_layers))
        self.decoder_norm = nn.LayerNorm(d) if cfg.decoder_norm else nn.Identity()

        # Heads: one for all layers, or one each.
        heads = 1 if cfg.shared_heads else cfg.decoder_layers
        self.class_embed = nn.ModuleList(nn.Linear(d, cfg.logits) for _ in range(heads))
        self.bbox_embed = nn.ModuleList(MLP(d, d, d, 4) for _ in range(heads))

        # Where queries start.
        if cfg.query_position == "reference":
            self.ref_point_head = MLP(2 * d, d, d)
            if cfg.query_scale and cfg.decoder_layers > 1:
                self.query_scale = MLP(d, d, d)
        elif not cfg.two_stage:
            self.query_embed = nn.Embedding(cfg.num_queries, 2 * d if cfg.content == "split" else d)
        if cfg.queries == "anchors":
            self.refpoint_embed = nn.Embedding(cfg.num_queries, 4)
        elif cfg.attention == "deformable" and not cfg.has_boxes:
            self.reference_points = nn.Linear(d, 2)
        if cfg.content == "learned":
            # In DN-DETR's content the last channel says whether a query is a denoising one.
            self.tgt_embed = nn.Embedding(cfg.num_queries, d - (cfg.denoising == "dn"))
        if cfg.two_stage:
            self.enc_output, self.enc_output_norm = nn.Linear(d, d), nn.LayerNorm(d)
            self.enc_class_embed, self.enc_bbox_embed = nn.Linear(d, cfg.logits), MLP(d, d, d, 4)
            if cfg.content == "split":
                self.pos_trans, self.pos_trans_norm = nn.Linear(2 * d, 2 * d), nn.LayerNorm(2 * d)
        if cfg.denoising != "none":
            self.label_enc = nn.Embedding(C + 1, d - (cfg.denoising == "dn"))
        if cfg.queries == "noise":
            self.time_embed = nn.Sequential(nn.Linear(d, 4 * d), nn.SiLU(), nn.Linear(4 * d, 4 * d))
            if (snr := diffusion.terminal_snr(cfg)) > 1e-2:
                warnings.warn(f"schedule={cfg.schedule} with timesteps={cfg.timesteps} ends at a signal-to-noise ratio of "
                              f"{snr:.2g}, but inference starts from pure noise, which training will not show: cosine, or "
                              "more timesteps, end near 0", stacklevel=2)
        self.reset_parameters()

    def reset_parameters(self):
        """All initialisation that is not torch's default, in one place."""
        cfg = self.cfg
        names = ("encoder", "decoder", "enc_output", "pos_trans", "reference_points", "ref_point_head", "query_scale",
                 "time_embed")
        transformer = [getattr(self, name) for name in names if hasattr(self, name)]
        for p in (p for module in transformer for p in module.parameters() if p.dim() > 1):
            nn.init.xavier_uniform_(p)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        class_heads = [*self.class_embed] + ([self.enc_class_embed] if cfg.two_stage else [])
        box_heads = [*self.bbox_embed] + ([self.enc_bbox_embed] if cfg.two_stage else [])
        for head in class_heads if cfg.class_loss != "ce" else []:
            # A prior of 1% for every class, or the many negatives swamp the first steps (Lin et al. 2017, section 3.3).
            nn.init.constant_(head.bias, -math.log(99))
        if cfg.attention == "dense":
            return
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        nn.init.normal_(self.level_embed)
        for head in box_heads:                                              # the first boxes are the references
            head.load_state_dict(self.bbox_embed[0].state_dict())
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)
        for head in class_heads:                                            # the published heads are clones of one
            head.load_state_dict(self.class_embed[0].state_dict())
        if not (cfg.two_stage or cfg.queries == "noise" or cfg.refine and cfg.shared_heads):  # every layer would shrink it
            nn.init.constant_(self.bbox_embed[0][-1].bias[2:], -2)      # learned points, anchors: 12% of a side at first
        if not cfg.has_boxes:
            nn.init.zeros_(self.reference_points.bias)
        if cfg.two_stage and cfg.content == "learned":
            nn.init.xavier_uniform_(self.tgt_embed.weight)                             # DINO's effective initialisation

    def forward(self, images, mask, targets=None, generator=None, watch=None):
        """Detect.

        Args:
            images: [B, 3, H, W] normalised, zero-padded at the right and bottom. mask: [B, H, W] bool, True = padding.
            targets: list of B dicts with labels [G] and boxes [G, 4] (cxcywh in [0, 1] of the un-padded photo). Needed
                in training by denoising and diffusion, which learn from noised targets; otherwise unused.
            generator: in training, the torch.Generator (on the images' device) that noise is drawn from. In
                evaluation of a diffusion model, a list of B CPU generators; default: the same seed for every image.
            watch: in evaluation of a diffusion model, called after each decoder evaluation: see `diffusion.sample`.

        Returns a dict: logits [L, B, Q, C] and boxes [L, B, Q, 4] of all decoder layers, the last is the answer; "enc"
        (two_stage; not where inference can do without, see below): logits, boxes of the proposals; "dn" (denoising, in
        training): logits, boxes and queries, a `diffusion.Denoising`; "evaluations" (diffusion, in evaluation, where L is 1:
        the last evaluation's last layer): a list with `diffusion.best_pairs` of each.
        """
        cfg = self.cfg
        if images.shape[0] != mask.shape[0] or images.shape[2:] != mask.shape[1:]:
            raise ValueError(f"images are {tuple(images.shape)} and mask {tuple(mask.shape)}: they must be [B, 3, H, W] "
                             "and [B, H, W]")
        if self.training and targets is None and (cfg.denoising != "none" or cfg.queries == "noise"):
            raise ValueError("training this variant noises the targets: call model(images, mask, targets)")
        memory = self.encode(images, mask)
        outputs, chosen = {}, None
        # Proposals place the first boxes, or lend their features; where noise and learned content do both, the proposals
        # only teach the encoder, and inference leaves them away (2% of the operations).
        if cfg.two_stage and (self.training or cfg.queries != "noise" or cfg.content == "memory"):
            outputs["enc"], chosen = self.proposals(memory)
        content, pos, reference = self.first_queries(memory, chosen)
        values = self.project_values(memory)

        if cfg.queries == "noise" and not self.training:                                         # DiffuDETR, inference
            def decode(reference, t, rows):
                own = content.gather(1, rows[..., None].expand(-1, -1, cfg.d_model))
                return self.decode(memory, values, own, None, reference, t=t, every_layer=False)
            (logits, boxes), evaluations = diffusion.sample(
                decode, len(images), cfg, images.device, memory.centres.dtype, generator, watch)
            return outputs | {"logits": logits, "boxes": boxes, "evaluations": evaluations}

        t = blocked = denoising = None
        if cfg.queries == "noise":                                                                # DiffuDETR, training
            reference, t = diffusion.noised_references(targets, cfg, generator)
        if cfg.denoising != "none" and self.training:                                     # DN, DINO: put before the rest
            denoising = diffusion.denoising_queries(targets, cfg, content.shape[1], generator)
            extra = self.mark(self.label_enc(denoising.labels), 1) * denoising.used[..., None]
            content = torch.cat([extra.to(content), content], 1)
            # Through the logit and back, as published: boxes at the border end 1e-3 inside.
            boxes = inverse_sigmoid(denoising.boxes, cfg.logit_eps).sigmoid()
            reference = torch.cat([boxes, reference], 1)
            blocked = denoising.blocked
        logits, boxes = self.decode(memory, values, content, pos, reference, blocked, t)
        if denoising is not None:
            P = denoising.labels.shape[1]
            outputs["dn"] = {"logits": logits[:, :, :P], "boxes": boxes[:, :, :P], "queries": denoising}
            logits, boxes = logits[:, :, P:], boxes[:, :, P:]
        return outputs | {"logits": logits, "boxes": boxes}

    # ------------------------------------------------------------------------------------------------ image to memory

    def encode(self, images, mask):
        """Images [B, 3, H, W] and mask [B, H, W] to the encoder's `Memory`."""
        cfg = self.cfg
        images = images.contiguous(memory_format=torch.channels_last)           # twice as fast on a CPU
        features = list(self.backbone(images).values())
        if cfg.attention == "dense":
            maps = [self.input_proj(features[0])]
        else:
            maps = [proj(f) for proj, f in zip(self.input_proj, features)]
            for proj in self.input_proj[len(features):]:
                maps.append(proj(features[-1] if len(maps) == len(features) else maps[-1]))
        tokens, masks, positions, valids, centres = [], [], [], [], []
        for level, x in enumerate(maps):
            h, w = x.shape[2:]
            m = F.interpolate(mask[:, None].float(), size=(h, w))[:, 0].bool()           # legacy nearest: floor(i * H / h)
            valid = torch.stack([(~m[:, 0]).sum(1), (~m[:, :, 0]).sum(1)], -1)                           # [B, 2] (w, h)
            pos = self.position(m, x).flatten(1, 2)
            if cfg.attention == "deformable":
                pos = pos + self.level_embed[level]
            y, z = torch.meshgrid(torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing="ij")
            cells = torch.stack([z, y], -1).view(1, h * w, 2).to(box_dtype(x)) + 0.5
            tokens.append(x.flatten(2).transpose(1, 2))
            masks.append(m.flatten(1))
            positions.append(pos)
            centres.append(cells / valid[:, None].clamp(min=1))
            valids.append(valid / torch.tensor([w, h], device=x.device).to(cells))
        memory = Memory(torch.cat(tokens, 1), torch.cat(masks, 1), torch.cat(positions, 1),
                        [tuple(x.shape[2:]) for x in maps], torch.stack(valids, 1), torch.cat(centres, 1))
        x = memory.tokens
        for layer in self.encoder:
            x = layer(x, memory)
        return memory._replace(tokens=x)

    def position(self, mask, like):
        """Sine encoding [B, h, w, d] of the cells' places in the photo: y in the first half of the channels, then x."""
        cfg = self.cfg
        axes = []
        for axis in (1, 2):
            count = (~mask).cumsum(axis).to(box_dtype(like))
            last = count.narrow(axis, count.shape[axis] - 1, 1)
            axes.append(sine((count + cfg.pos_offset) / (last + 1e-6), cfg.d_model // 2, cfg.pos_temperature))
        return torch.cat(axes, -1).to(like)

    # ---------------------------------------------------------------------------------------------- memory to queries

    def proposals(self, memory):
        """Two-stage (Zhu et al. 2021, appendix A.4): every token proposes a box around its own cell.

        Returns the proposals to supervise, {"logits": [B, N, C], "boxes": [B, N, 4]}, and the Q best ones:
        (their memory [B, Q, d], their boxes before the sigmoid [B, Q, 4]), detached.
        """
        cfg = self.cfg
        side = torch.cat([memory.centres.new_full((h * w,), 0.05 * 2.0 ** level)
                          for level, (h, w) in enumerate(memory.shapes)])
        side = side[None, :, None].expand(len(memory.mask), -1, 2)
        grid = torch.cat([memory.centres, side], -1)                                                          # [B, S, 4]
        good = ((grid > 0.01) & (grid < 0.99)).all(-1) & ~memory.mask
        grid = torch.where(good[..., None], (grid / (1 - grid)).log(), torch.inf)
        tokens = self.enc_output_norm(self.enc_output(memory.tokens * good[..., None]))
        logits = self.enc_class_embed(tokens).to(grid)
        score = logits[..., 0] if cfg.proposal_score == "first" else logits.amax(-1)
        Q = min(cfg.num_queries, score.shape[1])            # a very small photo has fewer tokens than queries
        best = score.topk(Q, dim=1).indices[..., None]                                                       # [B, Q, 1]

        def pick(x):
            return x.gather(1, best.expand(-1, -1, x.shape[-1]))

        content = pick(tokens)
        if cfg.proposal_loss == "selected":             # then nobody asks for the other tokens' boxes: 1% of the operations
            logits, grid = pick(logits), pick(grid)
            boxes = chosen = self.enc_bbox_embed(content).to(grid) + grid
        else:
            boxes = self.enc_bbox_embed(tokens).to(grid) + grid
            chosen = pick(boxes)
        return {"logits": logits, "boxes": boxes.sigmoid()}, (content.detach(), chosen.detach())

    def first_queries(self, memory, chosen):
        """Where the Q queries start: content [B, Q, d], position [B, Q, d] or None (computed per layer from the
        reference), and reference points [B, Q, 2] or boxes [B, Q, 4] in [0, 1] (None: DETR has none, noise comes later)."""
        cfg = self.cfg
        B, pos, reference = len(memory.tokens), None, None
        if cfg.queries == "anchors":
            reference = self.refpoint_embed.weight.sigmoid().expand(B, -1, -1)
        elif cfg.two_stage and cfg.queries != "noise":
            reference = chosen[1].sigmoid()
        if cfg.query_position == "learned":
            if cfg.two_stage:                                  # Deformable's two halves, made of the proposals' boxes
                pos = self.pos_trans_norm(self.pos_trans(sine(reference, cfg.d_model // 2, 10000).flatten(2)))
            else:
                pos = self.query_embed.weight.expand(B, -1, -1)
        if cfg.content == "split":
            pos, content = pos.chunk(2, -1)
        elif cfg.content == "learned":
            content = self.mark(self.tgt_embed.weight, 0).expand(B, -1, -1)
            if reference is not None:                               # row i belongs to the proposal of rank i
                content = content[:, :reference.shape[1]]
        elif cfg.content == "memory":
            content = chosen[0]
            if cfg.queries == "noise" and content.shape[1] < cfg.num_queries:         # fewer tokens than queries: again
                content = content[:, torch.arange(cfg.num_queries) % content.shape[1]]
        else:
            content = torch.zeros_like(pos)
        if cfg.attention == "deformable" and not cfg.has_boxes:
            reference = self.reference_points(pos).sigmoid()
        return content, pos, reference

    def mark(self, content, indicator):
        """DN-DETR's indicator: a last channel that is 1 in denoising queries and 0 in matching ones."""
        return F.pad(content, (0, 1), value=indicator) if self.cfg.denoising == "dn" else content

    # ---------------------------------------------------------------------------------------------- queries to boxes

    def project_values(self, memory):
        """What every decoder layer reads of the memory: computed once, however often the decoder is evaluated."""
        if self.cfg.attention == "dense":
            return [memory.tokens] * len(self.decoder)
        return [layer.cross_attn.project(memory.tokens, memory.mask) for layer in self.decoder]

    def decode(self, memory, values, content, pos, reference, blocked=None, t=None, every_layer=True):
        """One evaluation of the decoder.

        Args:
            content [B, Q, d], pos [B, Q, d] or None, reference [B, Q, 2 or 4] or None: as from `first_queries`.
            blocked: [Q, Q] self-attention mask or None. t: [B] diffusion time or None.
            every_layer: False: only the last layer answers (L is 1), which saves the heads of the others.

        Returns logits [L, B, Q, C] and boxes [L, B, Q, 4].
        """
        cfg = self.cfg
        x, base = content, reference
        if t is not None:                                                 # [cos, sin] of t at d/2 frequencies, then an MLP
            i = torch.arange(cfg.d_model // 2, device=t.device, dtype=memory.centres.dtype)
            angle = t[:, None] * 10000 ** (-2 * i / cfg.d_model)
            t = self.time_embed(torch.cat([angle.cos(), angle.sin()], -1))
        logits, boxes = [], []
        for l, layer in enumerate(self.decoder):
            padded = None
            if reference is not None:          # the photo's [0, 1] to that of every level's padded map: [B, Q, levels, 2|4]
                scale = memory.valid.repeat(1, 1, reference.shape[-1] // 2)
                padded = reference[:, :, None] * scale[:, None]
            if cfg.query_position == "reference":                            # DAB-DETR: MLP(sine(y, x, w, h))
                pos = self.ref_point_head(sine(padded[:, :, 0, [1, 0, 2, 3]], cfg.d_model // 2, 10000).flatten(2))
                if cfg.query_scale and l > 0:
                    pos = pos * self.query_scale(x)

            def attend(attention, query, padded=padded, value=values[l]):         # theirs now: a layer may run again
                if cfg.attention == "deformable":
                    return attention(query, padded, value, memory.shapes)
                return attention(query, memory.tokens + memory.pos, memory.tokens, key_padding_mask=memory.mask)

            x = layer(x, pos, attend, blocked, t)
            h = self.decoder_norm(x)
            head = min(l, len(self.bbox_embed) - 1)
            last = l == len(self.decoder) - 1
            if every_layer or last or not cfg.look_forward_twice:
                delta = self.bbox_embed[head](h).to(memory.centres)               # boxes stay float32 under autocast
                box = (delta + self.logit_of(base)).sigmoid()
            if every_layer or last:
                logits.append(self.class_embed[head](h))
                boxes.append(box)
            if last:
                break
            if cfg.look_forward_twice:        # DINO, section 3.5: the next layer's loss reaches this layer's box once more
                delta = self.bbox_embed[head](x).to(memory.centres)
                base = (delta + self.logit_of(reference)).sigmoid()
                reference = base.detach()
            elif cfg.refine:                                         # Deformable DETR, appendix A.4: iterative refinement
                base = reference = box.detach()
        return torch.stack(logits).to(memory.centres), torch.stack(boxes)

    def logit_of(self, reference):
        """What a box head's output is added to: the reference's logit; a point gives none for w, h; DETR has nothing."""
        if reference is None:
            return 0
        return F.pad(inverse_sigmoid(reference, self.cfg.logit_eps), (0, 4 - reference.shape[-1]))


def box_dtype(x):
    """The dtype of coordinates beside activations x: float32, or float64 in a float64 model; never half precision."""
    return torch.promote_types(x.dtype, torch.float32)
