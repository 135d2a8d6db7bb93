"""The family tree: every paper is a row, written as its parent plus what it changes.

Holds `Config` (what a model is), `Recipe` (how its authors trained it) and the two tables `VARIANTS` and `RECIPES`.
Every field is one idea, never one paper: model.py asks `cfg.queries == "noise"`, not `variant == "diffu"`, so ideas
combine freely and a new variant is one line. Read the fields of `Config` first, then the table at the end.

Papers: DETR (Carion 2020), Deformable DETR (Zhu 2021), DN-DETR (Li 2022), DINO (Zhang 2023), DiffuDETR (ICLR 2026).
"""
from dataclasses import dataclass, field, fields, replace


def option(default, text, choices=None):
    """One field: its default, the sentence `--help` prints, and the words it accepts (None: any value of the type)."""
    return field(default=default, metadata={"help": text, "choices": choices})


class ConfigError(ValueError):
    """A variant, field or combination that does not exist; the message says what to write instead."""


def at_least(table, least, *names):
    for name in names:
        if not least <= getattr(table, name) < float("inf"):                                                  # nor NaN
            raise ConfigError(f"{name}={getattr(table, name)}: it must be at least {least}")


def changed(table, **changes):
    """A copy with some fields changed: how every variant is written. Raises ConfigError on an unknown field."""
    unknown = sorted(set(changes) - {f.name for f in fields(table)})
    if unknown:
        raise ConfigError(f"unknown field{'s' * (len(unknown) > 1)} {', '.join(unknown)}; {type(table).__name__} has "
                          + ", ".join(f.name for f in fields(table)))
    return replace(table, **changes)


@dataclass(frozen=True)
class Config:
    """What a model is. The defaults are DETR's; lengths are in channels, counts per image."""
    # ---- size
    num_classes: int = option(91, "classes the head scores (91: COCO's raw category ids 0..90)")
    num_queries: int = option(100, "object queries Q (also: --queries N)")
    d_model: int = option(256, "channels d of every token and query")
    heads: int = option(8, "attention heads M")
    ffn: int = option(2048, "hidden channels of the feed-forward blocks")
    encoder_layers: int = option(6, "encoder layers")
    decoder_layers: int = option(6, "decoder layers L; each one predicts and is supervised")
    dropout: float = option(0.1, "dropout in the transformer")
    # ---- what sees the image
    backbone: str = option("resnet50", "torchvision ResNet", ("resnet18", "resnet34", "resnet50", "resnet101"))
    dilation: bool = option(False, "DC5: the last stage keeps stride 16 and dilates its 3x3 kernels instead")
    backbone_norm: str = option("frozen", "frozen, as published; batch: trainable, for scratch", ("frozen", "batch"))
    levels: int = option(1, "feature levels: 1 = C5 alone, 4 = C3, C4, C5 and a 3x3 stride-2 convolution on C5")
    pos_temperature: float = option(10000.0, "T of the sine position encoding of the image")
    pos_offset: float = option(0.0, "added to the cell count before it is normalised (-0.5: the cells' centres)")
    # ---- attention
    attention: str = option("dense", "dense: all tokens; deformable: a few points per head", ("dense", "deformable"))
    points: int = option(4, "sampling points P per head and level")
    # ---- where a query starts
    queries: str = option("learned", "what places a query: learned embedding, learned 4-D anchors (DAB, DN), or "
                          "noise (DiffuDETR: the boxes are a diffusion variable)", ("learned", "anchors", "noise"))
    two_stage: bool = option(False, "the encoder proposes the first reference boxes (noise: it is only supervised)")
    content: str = option("zero", "zero (DETR), split (Deformable: half of the position's vector), learned (DINO), or memory "
                          "(the best proposals' features: published DiffuDINO)", ("zero", "split", "learned", "memory"))
    query_position: str = option("learned", "learned, or in every layer from the reference box", ("learned", "reference"))
    query_scale: bool = option(False, "scale that position by an MLP of the previous layer's output (DAB, DN)")
    # ---- how boxes improve from layer to layer
    refine: bool = option(False, "each layer starts from the previous layer's boxes (iterative refinement)")
    look_forward_twice: bool = option(False, "a layer's loss also reaches the box of the layer before it (DINO)")
    shared_heads: bool = option(True, "one class and box head for all layers, or one each")
    decoder_norm: bool = option(True, "LayerNorm on every layer's output before the heads")
    # ---- what the encoder's proposals are (read when two_stage)
    proposal_score: str = option("max", "rank by class 0 alone (Deformable) or by the best class", ("first", "max"))
    proposal_labels: str = option("true", "true labels (DINO), or all class 0: object or not", ("true", "binary"))
    proposal_loss: str = option("selected", "supervise the selected ones (DINO) or all tokens", ("selected", "all"))
    # ---- denoising queries, training only (diffusion.py)
    denoising: str = option("none", "dn: reconstruct noised boxes; cdn: and reject far ones", ("none", "dn", "cdn"))
    dn_queries: int = option(100, "cdn: positive denoising queries in all; as many groups as fit, at least 1")
    dn_groups: int = option(5, "dn: groups; each holds every target once")
    label_noise: float = option(0.2, "share of denoising labels replaced by a random class")
    box_noise: float = option(0.4, "noise of denoising boxes: dn moves centre and size by up to this times (w/2, h/2, w, h), "
                              "cdn corners by up to this times (w/2, h/2), negatives up to twice that")
    # ---- the diffusion of reference boxes (diffusion.py; read when queries are noise)
    timesteps: int = option(100, "T, the steps of the forward process")
    schedule: str = option("cosine", "noise schedule", ("cosine", "linear", "sqrt"))
    noise: str = option("gaussian", "law of the noise; each has mean 0 and variance 1",
                        ("gaussian", "sigmoid_gaussian", "beta"))
    signal_scale: float = option(2.0, "box coordinates become (2c - 1) * scale before noise is added")
    evaluations: int = option(3, "S: decoder evaluations at inference; backbone and encoder run once")
    eta: float = option(0.0, "DDIM's eta: 0 deterministic, 1 as much fresh noise as DDPM")
    renewal: bool = option(True, "between evaluations, replace hopeless boxes by fresh noise")
    survivors: float = option(1.0, "share of the queries, the best first, that the later evaluations run on (1: all)")
    time: str = option("add", "how a decoder layer is told t: added after self-attention (paper), or scale and shift "
                       "before every sublayer (published code)", ("add", "scale_shift"))
    sampler: str = option("ddim", "ddim, or the published code's, for its checkpoints only", ("ddim", "published"))
    ensemble_nms: float = option(0.8, "IoU of the NMS over all evaluations' boxes")
    # ---- assignment and loss (matcher.py)
    class_loss: str = option("ce", "ce: softmax with no-object; focal; vfl and ia: IoU-aware, as in DiffuDINO's code and "
                             "in Align-DETR", ("ce", "focal", "vfl", "ia"))
    copies: int = option(1, "queries a target, where there are enough, in all but the last decoder layer (Align-DETR: 2)")
    weight_class: float = option(1.0, "weight of the class loss")
    weight_bbox: float = option(5.0, "weight of the L1 loss of cx, cy, w, h")
    weight_giou: float = option(2.0, "weight of the GIoU loss")
    weight_class_dn: float = option(1.0, "weight of the class loss of denoising queries")
    cost_class: float = option(1.0, "weight of the class in the matching cost (boxes cost as much as they weigh)")
    no_object: float = option(0.1, "weight of the no-object class (ce)")
    logit_eps: float = option(1e-5, "clamp of the inverse sigmoid")
    giou_eps: float = option(0.0, "added to GIoU's denominators")
    detections: int = option(100, "the most detections kept per image")

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ConfigError(f"{f.name}={value!r}: choose one of {', '.join(choices)}")
            if f.type is int and value != int(value):
                raise ConfigError(f"{f.name}={value}: it must be a whole number")
        at_least(self, 1, "num_classes", "num_queries", "d_model", "heads", "ffn", "decoder_layers", "levels", "points",
                 "timesteps", "evaluations", "detections", "dn_queries", "dn_groups", "copies")
        at_least(self, 0, "encoder_layers", "dropout", "label_noise", "box_noise", "eta", "weight_class", "weight_bbox",
                 "weight_giou", "weight_class_dn", "cost_class", "no_object", "giou_eps")
        wrong = [
            *((getattr(self, name) > 1, f"{name}={getattr(self, name)}: it must be at most 1")
              for name in ("label_noise", "eta")),
            (self.dropout >= 1, f"dropout={self.dropout}: it must be below 1"),
            (self.d_model % (4 if self.attention == "dense" else 32) or self.d_model % self.heads,
             f"d_model={self.d_model}: it must be divisible by heads={self.heads}, by 4 for the sine encoding and, "
             "with deformable attention, by 32 for the neck's GroupNorm"),
            (self.attention == "dense" and self.levels > 1,
             "dense attention reads one feature level: write levels=1 or attention=deformable"),
            (self.attention == "dense" and (self.two_stage or self.refine or self.queries != "learned"),
             "two_stage, refine, anchors and noise need reference boxes: write attention=deformable"),
            (self.dilation and self.backbone in ("resnet18", "resnet34"),
             f"dilation needs bottleneck blocks, which {self.backbone} has not: write backbone=resnet50 or resnet101"),
            (self.levels not in (1, 3, 4, 5), f"levels={self.levels}: 1 (C5), 3 (C3 to C5), 4 or 5"),
            (self.content == "zero" and self.attention == "deformable",
             "content=zero with deformable attention: choose content=split, learned or memory"),
            (self.two_stage and self.queries == "anchors",
             "two_stage and queries=anchors both place the first boxes: drop one"),
            (self.two_stage and self.queries == "learned" and not self.refine,
             "two_stage hands boxes to the decoder: write refine=True as well"),
            (self.content == "memory" and not self.two_stage,
             "content=memory takes the best proposals' features: write two_stage=True"),
            (self.content == "split" and self.query_position != "learned",
             "content=split is one half of a learned position: write query_position=learned or content=learned"),
            (self.query_position == "reference" and not self.has_boxes,
             "query_position=reference needs reference boxes: two_stage, queries=anchors or queries=noise"),
            (self.has_boxes and self.query_position == "learned" and self.content != "split",
             "reference boxes need query_position=reference (or Deformable's content=split)"),
            (self.queries == "noise" and (self.content == "split" or not self.refine),
             "queries=noise needs refine=True and content=learned or memory"),
            (self.denoising != "none" and not self.has_boxes,
             "denoising queries are boxes: they need two_stage, queries=anchors or queries=noise"),
            (self.denoising != "none" and self.content == "split",
             "denoising needs content=learned or memory, so that a label can stand in for it"),
            (self.look_forward_twice and not self.refine, "look_forward_twice needs refine=True"),
            (self.query_scale and self.query_position != "reference", "query_scale needs query_position=reference"),
            (self.evaluations > self.timesteps,
             f"evaluations={self.evaluations}: at most timesteps={self.timesteps}"),
            (not 0 < self.signal_scale < float("inf"), f"signal_scale={self.signal_scale}: it must be above 0"),
            (not 0 < self.logit_eps < 0.5, f"logit_eps={self.logit_eps}: it must be above 0, below 0.5"),
            (not 0 <= self.ensemble_nms <= 1, f"ensemble_nms={self.ensemble_nms}: an IoU, 0 to 1"),
            (not 0 < self.survivors <= 1, f"survivors={self.survivors}: a share above 0, at most 1"),
            (self.class_loss == "ce" and (self.denoising != "none" or self.two_stage or self.queries == "noise"),
             "denoising, two_stage and noise need class_loss=focal, vfl or ia: ce has no score per class"),
            (self.class_loss == "ce" and self.copies > 1,
             f"copies={self.copies} needs class_loss=focal, vfl or ia: ce's mean counts one query a target"),
            (not 0 < self.pos_temperature < float("inf"), f"pos_temperature={self.pos_temperature}: it must be above 0"),
        ]
        for bad, message in wrong:
            if bad:
                raise ConfigError(message)

    @property
    def has_boxes(self):
        """Whether the decoder's references are 4-D boxes from its first layer on (otherwise points, or nothing)."""
        return self.queries != "learned" or self.two_stage

    @property
    def logits(self):
        """Outputs of the class head: the softmax of "ce" has one more, for no object, as its last."""
        return self.num_classes + (self.class_loss == "ce")

    but = changed


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The defaults are Conditional/DAB/DN's: AdamW, 50 epochs, one drop of the rate."""
    epochs: int = option(50, "passes over the training photos")
    steps: int = option(0, "stop after this many steps instead of after --epochs (0: by epochs)")
    lr: float = option(1e-4, "learning rate")
    lr_backbone: float = option(1e-5, "learning rate of the backbone")
    lr_points: float = option(1.0, "factor on the rate of sampling_offsets and reference_points (Deformable: 0.1)")
    lr_drop: float = option(0.8, "multiply the rate by 0.1 after this share of the run")
    warmup: int = option(0, "steps in which the rate rises from 0, a tenth of the run at most")
    weight_decay: float = option(1e-4, "AdamW's decay")
    decay_norms: bool = option(True, "apply the decay to normalisation layers too")
    clip_norm: float = option(0.1, "clip the gradient's norm (0: do not)")
    ema: float = option(0.0, "decay of an exponential average of the weights, which is then evaluated (0: none)")
    batch_size: int = option(16, "photos a step, of all processes together")
    micro_batch: int = option(2, "photos per forward pass of a process; a step adds up the gradients of all")
    image_size: int = option(800, "short side in pixels")
    max_size: int = option(1333, "long side at most")
    buckets: int = option(0, "sort the photos of so many batches by shape before cutting them, for less padding (0: no)")
    repeat_rare: float = option(0.0, "repeat photos of classes that fewer than this share of photos have (LVIS: 0.001)")
    crop: bool = option(True, "DETR's multi-scale resizing and random crops; off: flips only")
    backbone_weights: str = option("default", "default: torchvision's ImageNet weights; none; or a path")
    eval_every: int = option(1, "evaluate every so many epochs (and at the end)")

    def __post_init__(self):
        at_least(self, 1, "epochs", "batch_size", "micro_batch", "image_size", "max_size", "eval_every")
        at_least(self, 0, "steps", "buckets", "repeat_rare", "lr", "lr_backbone", "lr_points", "lr_drop", "warmup",
                 "weight_decay", "clip_norm", "ema")
        if self.ema >= 1 or self.lr_drop > 1:
            raise ConfigError(f"ema={self.ema}, lr_drop={self.lr_drop}: shares, below 1 and at most 1")

    but = changed


# ======================================================================================================== the family

# DETR: a set of boxes from learned queries, dense attention, softmax with "no object". Carion et al. 2020.
detr = Config()
detr_dc5 = detr.but(dilation=True)

# Deformable DETR: attend to a few points around a reference, on four feature levels. Zhu et al. 2021.
deformable = detr.but(
    attention="deformable", levels=4, pos_offset=-0.5, ffn=1024, num_queries=300, content="split",
    decoder_norm=False, class_loss="focal", weight_class=2.0, cost_class=2.0)
deformable_single = deformable.but(levels=1)
deformable_refine = deformable.but(refine=True, shared_heads=False)                         # "+ iterative refinement"
deformable_two_stage = deformable_refine.but(                                                      # "++ two-stage"
    two_stage=True, proposal_score="first", proposal_labels="binary", proposal_loss="all")

# DN-DETR on Deformable: learned anchor boxes, and groups of noised ground truth to reconstruct. Li et al. 2022.
dn = deformable_refine.but(
    queries="anchors", content="learned", query_position="reference", query_scale=True, denoising="dn", ffn=2048,
    dropout=0.0, weight_class=1.0, logit_eps=1e-3, giou_eps=1e-6)

# DINO: contrastive denoising, mixed query selection, look forward twice. Zhang et al. 2023.
dino = dn.but(
    queries="learned", two_stage=True, query_scale=False, denoising="cdn", label_noise=0.25, box_noise=1.0,
    look_forward_twice=True, shared_heads=True, decoder_norm=True, num_queries=900, detections=300,
    pos_offset=0.0, pos_temperature=20.0)

# Align-DETR: scores that say how good the box is (IA-BCE), and two queries a target in all but the last layer. Cai et al. 2023.
align = dino.but(class_loss="ia", copies=2)

# DiffuDETR: the reference boxes are a diffusion variable, denoised in a few decoder evaluations. ICLR 2026.
diffu = deformable_two_stage.but(queries="noise", content="learned", query_position="reference")
diffu_dino = dino.but(queries="noise")
diffu_dino_published = diffu_dino.but(                                   # the code of the authors' checkpoints
    num_classes=80, content="memory", time="scale_shift", sampler="published", class_loss="vfl", weight_class=2.0,
    shared_heads=False, proposal_labels="binary", dn_queries=300, pos_offset=-0.5, pos_temperature=10000.0)
diffu_align = align.but(queries="noise")
diffu_align_published = diffu_dino_published.but(class_loss="ia", copies=2, proposal_labels="true", weight_class=1.0)

VARIANTS = {name: row for name, row in globals().items() if isinstance(row, Config)}

# How their authors trained them.
_detr = Recipe(epochs=500, batch_size=64)
_deformable = Recipe(lr=2e-4, lr_backbone=2e-5, lr_points=0.1, batch_size=32)
_diffu = Recipe(decay_norms=False, ema=0.999)
_diffu_align = _diffu.but(epochs=24, lr_drop=20 / 24)               # norms without decay is DiffuDINO's, and assumed here
RECIPES = {
    "detr": _detr, "detr_dc5": _detr,
    **dict.fromkeys(("deformable", "deformable_single", "deformable_refine", "deformable_two_stage"), _deformable),
    "dino": Recipe(epochs=12, lr_drop=11 / 12), "align": Recipe(epochs=24, lr_drop=20 / 24),
    "diffu_align": _diffu_align, "diffu_align_published": _diffu_align,
}


def recipe(name):
    """The Recipe of a variant: its own, or for a row that names none, DiffuDETR's where queries are noise, else DN's."""
    return RECIPES.get(name, _diffu if VARIANTS[name].queries == "noise" else Recipe())


# Defaults for data that is not COCO: a model that learns from scratch on two CPU cores in minutes.
SMALL = dict(backbone="resnet18", d_model=128, ffn=512, encoder_layers=2, decoder_layers=3, num_queries=60, dropout=0.0,
             dn_queries=20, detections=100)
SMALL_RECIPE = dict(epochs=50, lr=5e-4, lr_backbone=5e-4, lr_points=0.3, lr_drop=0.8, warmup=100, decay_norms=False,
                    ema=0.999, batch_size=16, micro_batch=16, image_size=320, max_size=533, eval_every=5)
TOY_RECIPE = SMALL_RECIPE | dict(epochs=8, image_size=128, max_size=128, crop=False, backbone_weights="none",
                                 eval_every=2)
# Changes to a checkpoint's own recipe when training goes on from it, and to any recipe for --overfit.
FINE_TUNE_RECIPE = dict(epochs=12, steps=0, batch_size=16, warmup=100, lr_drop=0.8, backbone_weights="none")
OVERFIT_RECIPE = dict(steps=500, warmup=50, eval_every=100)


def variant(name, **overrides):
    """The Config of a variant by name, with fields overridden. Raises ConfigError naming what exists."""
    if name not in VARIANTS:
        raise ConfigError(f"unknown variant {name!r}; there are {', '.join(VARIANTS)}")
    return VARIANTS[name].but(**overrides)
