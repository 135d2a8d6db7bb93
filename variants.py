"""The family tree: every paper is a row, written as its parent plus what it changes.

`Config` is what a model is, `Recipe` how its authors trained it; `VARIANTS` and `RECIPES` are the
two tables. A field is one idea, never one paper: model.py asks `cfg.reference == "noise"`, not
`variant == "diffu"`, so ideas combine freely and a new variant is one line. Read `Config`'s fields,
then the table at the end.

Papers: DETR (Carion 2020), Conditional DETR (Meng 2021), DAB-DETR (Liu 2022), Deformable DETR (Zhu
2021), DN-DETR (Li 2022), DINO (Zhang 2023), Align-DETR (Cai 2023), Group DETR (Chen 2023:
query_groups), LW-DETR (Chen 2024), RF-DETR (Robinson 2025), DiffuDETR (ICLR 2026); Swin (Liu 2021);
to compare with, Faster R-CNN (Ren 2015).
"""
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches


def option(default, text, *choices, low=None, high=1e30, when=None):
    """One field: its default, what `--help` prints, and the words it accepts (none: any). low,
    high: its range (default: from 1, fractions from 0). when: the {field: values} that read it."""
    low = {int: 1, float: 0}.get(type(default)) if low is None else low
    return field(default=default, metadata=dict(
        help=text, choices=choices, low=low, high=high, when=when or {}))


class ConfigError(ValueError):
    """A variant, field or combination that does not exist; the message says what to write."""


def check(table):
    """Raise ConfigError for a word that is no choice and a number out of its range."""
    for f in fields(table):
        value, choices = getattr(table, f.name), f.metadata["choices"]
        low, high = f.metadata["low"], f.metadata["high"]
        if choices and value not in choices:
            raise ConfigError(f"{f.name}={value!r}: choose one of {', '.join(map(str, choices))}")
        if f.type is int and value != int(value):
            raise ConfigError(f"{f.name}={value}: it must be a whole number")
        if low is not None and not low <= value <= high:  # nor NaN
            most = f", at most {high:g}" if high < 1e30 else ""
            raise ConfigError(f"{f.name}={value}: it must be at least {low:g}{most}")


def changed(table, **changes):
    """A copy with some fields changed: how every variant is written. ConfigError: no such field."""
    if unknown := {*changes} - {f.name for f in fields(table)}:
        raise ConfigError(f"unknown field {unknown.pop()}: see python train.py --help all")
    if changes.get("backbone") != getattr(table, "backbone", None):
        changes = SWINS.get(changes.get("backbone"), {}) | changes
    return replace(table, **changes)


def unmet(row, needs):
    """The first of {field: values} that a row lacks, as what to write; or None."""
    for name, values in needs.items():
        if getattr(row, name) not in values:
            words = [f"{values[0]} or more"] if isinstance(values, range) else map(str, values)
            return f"{name}=" + " or ".join(", ".join(words).rsplit(", ", 1))


BOXES = ("anchors", "proposals", "noise")  # references that are 4-D boxes from the first layer on
RESNETS, VITS = ("resnet18", "resnet34", "resnet50", "resnet101"), ("vit", "dinov2")
# What a Swin brings along: torchvision's window (of swin_l: ImageNet-22k's), detrex's drop path.
SWINS = {"swin_t": dict(window=7, drop_path=0.1), "swin_s": dict(window=7, drop_path=0.2),
         "swin_b": dict(window=7, drop_path=0.2), "swin_l": dict(window=12, drop_path=0.2)}
RESNET, VIT, SWIN = ({"backbone": names} for names in (RESNETS, VITS, (*SWINS,)))
PROPOSES, NOISE = {"two_stage": (True,)}, {"reference": ("noise",)}
DEFORMABLE, MASKED = {"attention": ("deformable",)}, {"masks": (True,)}
DENOISES, CDN = {"denoising": ("dn", "cdn")}, {"denoising": ("cdn",)}
SEVERAL = NOISE | {"sampling_steps": range(2, 10 ** 9)}


@dataclass(frozen=True)
class Config:
    """What a model is. The defaults are DETR's; lengths are in channels, counts per image."""
    detector: str = option("detr", "detr: this family; faster_rcnn: its baseline (baseline.py)",
                           "detr", "faster_rcnn")
    # ---- size
    num_classes: int = option(91, "classes the head scores (91: COCO's raw category ids 0..90)")
    num_queries: int = option(100, "object queries Q (also: --queries N)")
    d_model: int = option(256, "channels d of every token and query")
    heads: int = option(8, "attention heads M")
    ffn: int = option(2048, "hidden channels of the feed-forward blocks")
    encoder_layers: int = option(6, "encoder layers", low=0)
    decoder_layers: int = option(6, "decoder layers L; each predicts and is supervised")
    dropout: float = option(0.1, "dropout in the transformer", high=0.99)
    # ---- what sees the image
    backbone: str = option("resnet50", "ResNet, Swin, the ViT of LW-DETR, or DINOv2's of RF-DETR",
                           *RESNETS, *SWINS, *VITS)
    dilation: bool = option(False, "DC5: the last stage keeps stride 16, dilated", when=RESNET)
    backbone_norm: str = option("frozen", "batch norm: frozen, as published; batch: trained, for "
                                "training from scratch", "frozen", "batch", when=RESNET)
    frozen_stages: str = option(
        "layer1", "what is not trained: the stem and layer1 (DETR), the stem (Align-DETR), or none "
        "(DiffuDINO)", "layer1", "stem", "none", when=RESNET | {"backbone_norm": ("frozen",)})
    vit_width: int = option(192, "channels of the ViT", when=VIT)
    vit_heads: int = option(12, "its attention heads", when=VIT)
    vit_depth: int = option(6, "its blocks", when=VIT)
    patch: int = option(16, "side of a token's patch in pixels", when=VIT)
    grid: int = option(14, "its learned positions a side, resized to the tokens'", when=VIT)
    windows: int = option(4, "its windows a side: most blocks look into one each", when=VIT)
    global_blocks: str = option("1 3 5", "its blocks, from 0, that look at all windows", when=VIT)
    taps: str = option("1 3 5", "its blocks whose outputs are read", when=VIT)
    window: int = option(7, "tokens a side of a Swin's window (swin_l, files for 384 pixels: 12)",
                         when=SWIN)
    drop_path: float = option(
        0.0, "chance to skip the last block in training, falling to 0 in the first (swin_t: 0.1, "
        "larger Swins: 0.2)", high=0.99, when={"backbone": (*SWINS, *VITS)})
    projector_norm: str = option("batch", "norm in a ViT's neck: batch (LW-DETR), layer (RF-DETR)",
                                 "batch", "layer", when=VIT)
    levels: int = option(
        1, "feature levels: 1 is C5; 3: C3 to C5; 4: also a stride-2 convolution of C5; 5: also C2 "
        "(DINO); of a ViT 1: its stride; 2: half and twice; 3: all three", 1, 2, 3, 4, 5)
    pos_temperature: float = option(10000.0, "T of the image's sine position encoding", low=1)
    pos_offset: float = option(0.0, "added to the cells' count (-0.5: their centres)", low=-1)
    activation: str = option("relu", "in feed-forward blocks (prelu: DAB-DETR)", "relu", "prelu")
    encoder_scale: bool = option(False, "an MLP of the tokens scales their positions (DAB-DETR)")
    # ---- attention to the image
    attention: str = option(
        "dense", "how queries look at it: dense: at all tokens, content and position summed; "
        "conditional: concatenated per head (Conditional DETR); deformable: at a few points",
        "dense", "conditional", "deformable")
    cross_heads: int = option(0, "heads of queries' attention to the image (0: as --heads)", low=0)
    points: int = option(4, "sampling points P per head and level", when=DEFORMABLE)
    masks: bool = option(False, "DETR's mask head draws each query's mask", when=RESNET)
    # ---- where a query starts
    reference: str = option(
        "none", "a query's reference: none (DETR), learned points (Deformable DETR) or 4-D anchors "
        "(DAB, DN), the encoder's proposals (two-stage, DINO), or noise (DiffuDETR)",
        "none", "points", *BOXES)
    two_stage: bool = option(False, "the encoder proposes boxes and is supervised")
    group_proposals: bool = option(False, "each query group has its own proposals (LW-DETR)",
                                   when=PROPOSES)
    proposal_offsets: bool = option(False, "queries add learned offsets to proposals (LW-DETR)",
                                    when={"reference": ("proposals",)})
    content: str = option(
        "zero", "zero (DETR), split (Deformable: half of the position's vector), learned (DINO's "
        "mixed query selection), label (DN-DAB: the embedding of no label) or memory (the best "
        "proposals' features: published DiffuDINO)", "zero", "split", "learned", "label", "memory")
    query_scale: bool = option(False, "scale a position made from the reference by an MLP of the "
                               "previous layer's output (Conditional, DAB, DN)")
    size_modulation: bool = option(False, "scale it by the reference's width and height (DAB-DETR)")
    query_groups: int = option(1, "groups of queries in training, each matched on its own; "
                               "inference uses the first (Group DETR, LW-DETR)")
    # ---- how boxes improve from layer to layer
    refine: bool = option(False, "each layer starts from the previous layer's boxes")
    box_codec: str = option(
        "logit", "what a box head says: logit: the change of the reference's inverse sigmoid; "
        "relative: shifts and log scales in its width and height (LW-DETR)", "logit", "relative")
    look_forward_twice: bool = option(False, "a layer's loss also reaches the previous layer's box")
    shared_heads: bool = option(True, "one class and box head for all layers, or one each")
    decoder_norm: bool = option(True, "LayerNorm on every layer's output before the heads")
    # ---- what the encoder's proposals are
    proposal_score: str = option("max", "rank by class 0 alone (Deformable) or by the best class",
                                 "first", "max", when=PROPOSES)
    proposal_labels: str = option("true", "true labels (DINO), or all class 0: object or not",
                                  "true", "binary", when=PROPOSES)
    proposal_loss: str = option("selected", "supervise the selected ones (DINO) or all tokens",
                                "selected", "all", when=PROPOSES)
    # ---- denoising queries, training only (diffusion.py)
    denoising: str = option("none", "dn: reconstruct noised boxes; cdn: and reject far ones",
                            "none", "dn", "cdn")
    no_label_row: bool = option(True, "their label embedding ends with a row for no label, which "
                                "only content=label reads, but most files hold", when=DENOISES)
    dn_queries: int = option(100, "cdn: positive queries, in as many groups as fit", when=CDN)
    dn_groups: int = option(5, "dn: groups of all targets", when={"denoising": ("dn",)})
    label_noise: float = option(0.2, "share of their labels that are random", high=1, when=DENOISES)
    box_noise: float = option(0.4, "how far denoising boxes move: diffusion.py", when=DENOISES)
    # ---- the diffusion of reference boxes (diffusion.py)
    timesteps: int = option(100, "T, the steps of the forward process", when=NOISE)
    schedule: str = option("cosine", "noise schedule (linear never reaches pure noise)",
                           "cosine", "linear", "sqrt", when=NOISE)
    noise: str = option("gaussian", "law of the noise; each has mean 0 and variance 1",
                        "gaussian", "sigmoid_gaussian", "beta", when=NOISE)
    signal_scale: float = option(2.0, "boxes are noised as (2c - 1) * scale", low=0.01, when=NOISE)
    time: str = option(
        "add", "how a decoder layer is told t: added after self-attention (paper), or scale and "
        "shift before every sublayer (published code)", "add", "scale_shift", when=NOISE)
    sampling_steps: int = option(3, "S: decoder evaluations at inference", when=NOISE)
    sampler: str = option("ddim", "ddim, or the published code's, for its checkpoints only",
                          "ddim", "published", when=SEVERAL)
    eta: float = option(0.0, "DDIM's eta: 0 deterministic, 1 as much fresh noise as DDPM", high=1,
                        when=SEVERAL | {"sampler": ("ddim",)})
    renewal: bool = option(True, "between sampling steps, replace hopeless boxes by fresh noise",
                           when=SEVERAL)
    ensemble_nms: float = option(0.8, "IoU of the NMS over all steps' boxes", high=1, when=SEVERAL)
    # ---- assignment and loss (matcher.py)
    class_loss: str = option("ce", "ce: softmax with no-object; focal; IoU-aware vfl (DiffuDINO's "
                             "code) and ia (Align-DETR)", "ce", "focal", "vfl", "ia")
    copies: int = option(1, "queries a target in all but the last layer (Align-DETR: 2)")
    copies_rule: str = option(
        "fair", "where queries are too few: fair: every target keeps one; published (Align-DETR's "
        "code): some get none", "fair", "published", when={"copies": range(2, 10 ** 9)})
    weight_class: float = option(1.0, "weight of the class loss")
    weight_bbox: float = option(5.0, "weight of the L1 loss of cx, cy, w, h")
    weight_giou: float = option(2.0, "weight of the GIoU loss")
    weight_class_dn: float = option(1.0, "weight of denoising's class loss", when=DENOISES)
    cost_class: float = option(1.0, "weight of the class in the matching cost")
    weight_mask: float = option(1.0, "weight of the masks' focal loss", when=MASKED)
    weight_dice: float = option(1.0, "weight of the masks' dice loss", when=MASKED)
    no_object: float = option(0.1, "weight of no-object", when={"class_loss": ("ce",)})
    logit_eps: float = option(1e-5, "clamp of the inverse sigmoid", low=1e-9, high=0.4)
    giou_eps: float = option(0.0, "added to GIoU's denominators")
    detections: int = option(100, "the most detections kept per image")

    def __post_init__(self):
        check(self)
        for name, values, needs in NEEDS:
            if getattr(self, name) in values and (missing := unmet(self, needs)):
                raise ConfigError(f"{name}={getattr(self, name)} needs {missing}")
        even = 32 if self.attention == "deformable" else 4  # GroupNorm's groups; sines and cosines
        for bad, message in [
            (self.d_model % even or self.d_model % self.heads,
             f"d_model={self.d_model}: it must be divisible by {even} and by heads={self.heads}"),
            (max(map(int, f"{self.taps} {self.global_blocks}".split())) >= self.vit_depth,
             f"taps and global_blocks must lie below vit_depth={self.vit_depth}"),
            (self.query_scale and self.attention != "conditional" and self.reference not in BOXES,
             "query_scale needs reference=anchors, or attention=conditional"),
            (self.query_groups > 1 and self.reference == "proposals" and self.content != "learned"
             and not self.group_proposals, "query_groups would be copies: write content=learned"),
            (self.sampling_steps > self.timesteps, f"sampling_steps > timesteps={self.timesteps}"),
        ]:
            if bad:
                raise ConfigError(message)

    @property
    def logits(self):
        """Outputs of the class head: the softmax of "ce" has one more at the end, no object."""
        return self.num_classes + (self.class_loss == "ce")

    but = changed


# Which ideas need which: a field, some of its values, and what these need of other fields.
SCORES, VECTORS = ("focal", "vfl", "ia"), ("learned", "zero", "label", "memory")
NEEDS = [
    ("detector", ("faster_rcnn",), RESNET),
    ("backbone", (*RESNETS, *SWINS), {"levels": (1, 3, 4, 5)}),
    ("backbone", VITS, {"levels": (1, 2, 3)}),
    ("backbone", ("resnet18", "resnet34"), {"dilation": (False,)}),  # they have no bottlenecks
    ("attention", ("dense", "conditional"), {"levels": (1,)}),
    ("attention", ("conditional", "deformable"), {"reference": ("points", *BOXES)}),
    ("reference", ("proposals",), PROPOSES),
    ("reference", ("anchors", "noise"), {"content": VECTORS}),  # they have no vector to split
    ("reference", ("noise",), {"class_loss": SCORES}),  # "ce" has no score per class
    ("two_stage", (True,), {"class_loss": SCORES}),
    ("denoising", ("dn", "cdn"), {"reference": BOXES, "content": VECTORS, "class_loss": SCORES}),
    ("content", ("memory",), PROPOSES),
    ("content", ("label",), DENOISES | {"no_label_row": (True,)}),
    ("size_modulation", (True,), {"attention": ("conditional",), "reference": BOXES}),
    ("encoder_scale", (True,), {"encoder_layers": range(1, 10 ** 9)}),
    ("box_codec", ("relative",), {"reference": BOXES}),
    ("masks", (True,), RESNET | {"attention": ("dense", "conditional"), "query_groups": (1,),
                                 "reference": ("none", "points", "anchors", "proposals")}),
    ("look_forward_twice", (True,), {"refine": (True,)}),
    ("copies", range(2, 10 ** 9), {"class_loss": SCORES}),  # "ce" counts one query a target
]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The defaults are Conditional/DAB/DN's: AdamW, 50 epochs, one drop."""
    epochs: int = option(50, "passes over the training images")
    steps: int = option(0, "stop after this many steps instead of --epochs (0: by epochs)", low=0)
    lr: float = option(1e-4, "learning rate")
    lr_backbone: float = option(1e-5, "learning rate of the backbone")
    lr_points: float = option(1.0, "factor for sampling_offsets, reference_points (Deformable: .1)")
    lr_layer_decay: float = option(1.0, "factor per ViT block above it (LW-DETR)", high=1, when=VIT)
    lr_component_decay: float = option(1.0, "factor: the decoder; squared: the backbone", high=1)
    lr_drop: float = option(0.8, "multiply the rate by 0.1 after this share of the run", high=1)
    warmup: int = option(0, "steps in which the rate rises, a tenth of the run at most", low=0)
    weight_decay: float = option(1e-4, "AdamW's decay")
    decay_norms: bool = option(True, "apply the decay to normalisation layers too")
    clip_norm: float = option(0.1, "clip the gradient's norm (0: do not)")
    ema: float = option(0.0, "decay of an average of the weights, to be evaluated", high=0.99999)
    ema_tau: int = option(0, "it rises as 1 - exp(-step/tau) (0: (1 + step)/(10 + step))", low=0)
    batch_size: int = option(16, "images a step, of all processes together")
    micro_batch: int = option(2, "images per forward pass of a process; gradients are added up")
    image_size: int = option(800, "short side in pixels")
    max_size: int = option(1333, "long side at most; 0: images are squashed to squares", low=0)
    sizes: str = option("image", "sizes are drawn per image, or per batch", "image", "batch")
    repeat_rare: float = option(0.0, "repeat classes in a smaller share of images (LVIS: 0.001)")
    crop: bool = option(True, "DETR's random sizes and crops; off: flips only")
    backbone_weights: str = option("default", "default: torchvision's of ImageNet; none; a path")
    eval_every: int = option(1, "evaluate every so many epochs (and at the end)")

    __post_init__ = check
    but = changed


FIELDS = {f.name: f for table in (Config, Recipe) for f in fields(table)}
RCNN = ("detector", "num_classes", "d_model", "backbone", "backbone_norm", "frozen_stages",
        "detections")  # what the baseline reads
SAMPLING = "sampling_steps", "sampler", "eta", "renewal", "ensemble_nms"  # eval.py's too


def idle(names, cfg):
    """The sentence that refuses the first of these options that nothing reads, or None."""
    for name in names:
        if cfg.detector != "detr" and name in Config.__dataclass_fields__ and name not in RCNN:
            return f"--{name} is read only with --detector detr: omit it".replace("_", "-")
        if name in FIELDS and (missing := unmet(cfg, FIELDS[name].metadata["when"])):
            key, _, value = missing.partition("=")
            needed = f"--{name} is read only with --{key}".replace("_", "-")
            return needed + f" {value}" * (value != "True") + ": omit it"


# =============================================================================== the family

# DETR: a set of boxes from learned queries, dense attention, softmax with "no object". Carion 2020.
detr = Config()
detr_dc5 = detr.but(dilation=True)
# With a mask head, on COCO's raw ids of things (to 90) and stuff (92 to 200).
detr_panoptic = detr.but(masks=True, num_classes=250)
detr_panoptic_dc5 = detr_panoptic.but(dilation=True)

# Conditional DETR: position apart from content in attention, looked for around a point. Meng 2021.
conditional = detr.but(
    attention="conditional", reference="points", query_scale=True, num_queries=300,
    class_loss="focal", weight_class=2.0, cost_class=2.0)

# DAB-DETR: queries are anchor boxes, corrected layer by layer, whose size says how widely to look.
# Liu 2022. (Its code predicts by what DINO later called look forward twice.)
dab = conditional.but(
    reference="anchors", refine=True, look_forward_twice=True, size_modulation=True,
    encoder_scale=True, activation="prelu", dropout=0.0, weight_class=1.0, detections=300,
    pos_temperature=20.0, logit_eps=1e-3, giou_eps=1e-6)

# DN-DETR: groups of noised ground truth to reconstruct, which need no matching. Li 2022.
dn_dab = dab.but(denoising="dn", content="label")

# Deformable DETR: attend to a few points around a reference, on four feature levels. Zhu 2021.
deformable = detr.but(
    attention="deformable", reference="points", content="split", levels=4, pos_offset=-0.5,
    ffn=1024, num_queries=300, decoder_norm=False, class_loss="focal", weight_class=2.0,
    cost_class=2.0)
deformable_single = deformable.but(levels=1)
deformable_refine = deformable.but(refine=True, shared_heads=False)  # "+ iterative refinement"
deformable_two_stage = deformable_refine.but(                        # "++ two-stage"
    reference="proposals", two_stage=True, proposal_score="first", proposal_labels="binary",
    proposal_loss="all")

# DN-DETR on Deformable DETR, with DAB-DETR's anchors. Li 2022.
dn = deformable_refine.but(
    reference="anchors", content="learned", query_scale=True, denoising="dn", ffn=2048, dropout=0.0,
    weight_class=1.0, logit_eps=1e-3, giou_eps=1e-6)

# DINO: contrastive denoising, mixed query selection, look forward twice. Zhang 2023.
dino = dn.but(
    reference="proposals", two_stage=True, query_scale=False, denoising="cdn", label_noise=0.25,
    box_noise=1.0, look_forward_twice=True, shared_heads=True, decoder_norm=True, num_queries=900,
    detections=300, pos_offset=0.0, pos_temperature=20.0)

# Align-DETR's idea on DINO: scores that say how good the box is (IA-BCE), and two queries a target
# in all but the last layer. Cai 2023, whose own model is the second row.
align = dino.but(class_loss="ia", copies=2)
align_published = align.but(
    num_classes=80, shared_heads=False, frozen_stages="stem", copies_rule="published",
    no_label_row=False, pos_offset=-0.5, pos_temperature=10000.0)

# LW-DETR: a plain ViT in place of ResNet and encoder, 13 query groups, each with its own proposals,
# which learned offsets correct once; boxes in units of their reference. Chen 2024.
lw_tiny = deformable.but(
    backbone="vit", levels=1, encoder_layers=0, decoder_layers=3, ffn=2048, dropout=0.0, points=2,
    cross_heads=16, reference="proposals", two_stage=True, group_proposals=True,
    proposal_offsets=True, content="learned", query_groups=13, box_codec="relative",
    decoder_norm=True, class_loss="ia", weight_class=1.0, num_queries=100)
lw_small = lw_tiny.but(vit_depth=10, global_blocks="2 4 5 8", taps="2 4 5 9", num_queries=300,
                       detections=300)
lw_medium = lw_small.but(vit_width=384)
lw_large = lw_medium.but(levels=2, d_model=384, heads=12, cross_heads=24, points=4, drop_path=0.1)
lw_xlarge = lw_large.but(vit_width=768)

# RF-DETR: LW-DETR on DINOv2. Robinson 2025.
rf_nano = lw_medium.but(
    backbone="dinov2", vit_heads=6, vit_depth=12, windows=2, grid=24, global_blocks="3 6 9",
    taps="2 5 8 11", projector_norm="layer", decoder_layers=2)
rf_small = rf_nano.but(grid=32, decoder_layers=3)
rf_medium = rf_nano.but(grid=36, decoder_layers=4)
rf_large = rf_medium.but(grid=44)
rf_base = rf_nano.but(patch=14, grid=37, windows=4, global_blocks="2 5 8 11", taps="1 4 7 10",
                      decoder_layers=3)

# DiffuDETR: reference boxes start from noise, denoised in a few decoder evaluations. ICLR 2026.
diffu = deformable_two_stage.but(reference="noise", content="learned")
diffu_dab = dab.but(reference="noise", content="learned")
diffu_dino = dino.but(reference="noise")
diffu_dino_published = diffu_dino.but(  # the code of the authors' checkpoints
    num_classes=80, content="memory", time="scale_shift", sampler="published", class_loss="vfl",
    weight_class=2.0, shared_heads=False, proposal_labels="binary", dn_queries=300,
    frozen_stages="none", pos_offset=-0.5, pos_temperature=10000.0)
diffu_lw = lw_tiny.but(reference="noise")
diffu_align = align.but(reference="noise")
diffu_align_published = diffu_dino_published.but(
    class_loss="ia", copies=2, copies_rule="published", proposal_labels="true", weight_class=1.0,
    dn_queries=100, frozen_stages="stem")

# What the family is compared with: torchvision's Faster R-CNN on a feature pyramid. Ren 2015.
faster_rcnn = Config(detector="faster_rcnn")

VARIANTS = {name: row for name, row in globals().items() if isinstance(row, Config)}

# How their authors trained them.
_detr = Recipe(epochs=500, batch_size=64)
_deformable = Recipe(lr=2e-4, lr_backbone=2e-5, lr_points=0.1, batch_size=32)
_diffu = Recipe(decay_norms=False, ema=0.999)
_align = Recipe(epochs=24, lr_drop=20 / 24, decay_norms=False)
_lw = Recipe(epochs=60, lr_backbone=1.5e-4, lr_layer_decay=0.8, lr_component_decay=0.7, lr_drop=1.0,
             ema=0.9997, batch_size=32, image_size=640, max_size=0)
_rf = _lw.but(epochs=100, batch_size=16, ema=0.993, ema_tau=100, sizes="batch")
RECIPES = {
    **{name: _detr for name in VARIANTS if name.startswith("detr")},
    **{name: _deformable for name in VARIANTS if name.startswith("deformable")},
    "dino": Recipe(epochs=12, lr_drop=11 / 12), "align": _align, "align_published": _align,
    "lw_tiny": _lw, "lw_small": _lw, "diffu_lw": _lw,
    "lw_medium": _lw.but(batch_size=16, lr_layer_decay=0.7),
    "lw_large": _lw.but(batch_size=16, lr_layer_decay=0.7, lr_component_decay=0.5),
    "lw_xlarge": _lw.but(batch_size=16, lr_layer_decay=0.75, lr_component_decay=0.5,
                         weight_decay=1e-3),
    **{f"rf_{size}": _rf.but(image_size=side) for size, side in dict(
        nano=384, small=512, medium=576, large=704, base=560).items()},
    "diffu_align": _align.but(ema=0.999), "diffu_align_published": _align.but(ema=0.999),
}

# --recipe lvis, v3det: how DiffuDINO was trained on them (12 and 24 epochs; the steps are for any
# variant). Unpublished: when their rates drop, the crops, and LVIS's sampler, here none.
LARGE = {"lvis": dict(steps=75_000, batch_size=16),
         "v3det": dict(steps=550_000, batch_size=8, repeat_rare=0.001)}
LARGE_DIFFU_DINO = {  # its own fields there, by backbone: ResNet-101 is LVIS's, Swin-B V3Det's
    "resnet50": dict(dn_queries=300, weight_class=2.0, frozen_stages="none"),
    "resnet101": dict(dn_queries=100, weight_class=1.0, frozen_stages="stem"),
    "swin_b": dict(dn_queries=100, weight_class=1.0, window=12)}


def recipe(name):
    """The Recipe of a variant: its own, or for a row that names none, DiffuDETR's or DN's."""
    return RECIPES.get(name, _diffu if VARIANTS[name].reference == "noise" else Recipe())


# Defaults for data that is not COCO: a model that learns from scratch on two CPU cores in minutes.
SMALL = dict(backbone="resnet18", d_model=128, ffn=512, encoder_layers=2, decoder_layers=3,
             num_queries=60, dropout=0.0, dn_queries=20, detections=100)
SMALL_VIT = dict(vit_width=192, vit_heads=6, patch=8, windows=2, grid=16, d_model=192, heads=8,
                 cross_heads=8, query_groups=5)
SMALL_RECIPE = dict(epochs=50, lr=5e-4, lr_backbone=5e-4, lr_points=0.3, lr_layer_decay=1.0,
                    lr_component_decay=1.0, lr_drop=0.8, warmup=100, decay_norms=False, ema=0.999,
                    batch_size=16, micro_batch=16, image_size=320, max_size=533, eval_every=5)
TOY_RECIPE = SMALL_RECIPE | dict(epochs=8, image_size=128, max_size=128, crop=False,
                                 backbone_weights="none", eval_every=2)
# Changes to a checkpoint's own recipe when training goes on from it, and to any for --overfit.
FINE_TUNE_RECIPE = dict(epochs=12, steps=0, batch_size=16, warmup=100, lr_drop=0.8,
                        backbone_weights="none")
OVERFIT_RECIPE = dict(steps=500, warmup=50, eval_every=100)
# And when it gives a trained detector, which stays as it is, a mask head.
MASKS_RECIPE = FINE_TUNE_RECIPE | dict(epochs=25, lr=1e-4, lr_drop=15 / 25, warmup=0)


def small(row):
    """The fields that make a row small, of those that something reads in it."""
    vit = SMALL_VIT | {"backbone": row.backbone} if row.backbone in VITS else {}
    large = {"backbone": "resnet50"} if row.dilation else {}  # a resnet18 cannot dilate
    every = SMALL | {"encoder_layers": min(2, row.encoder_layers)} | vit | large
    return {name: value for name, value in every.items() if not idle([name], row)}


def variant(name, **overrides):
    """The Config of a variant, with fields overridden. ConfigError naming the nearest."""
    if name not in VARIANTS:
        near = get_close_matches(name, VARIANTS, 1, 0)[0]
        raise ConfigError(f"there is no variant {name}: do you mean {near}?")
    return VARIANTS[name].but(**overrides)
