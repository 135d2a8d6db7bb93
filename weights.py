"""Published checkpoints' names and shapes, translated to this model's; and every file's loading.

`RULES` is the whole translation, `SIGNS` recognises a file. Nothing is loaded in part. Read
`RULES`, `own_names`, `put`, `detect`; then `load_checkpoint`, which opens any file.
"""
import argparse
import re
import socket
from dataclasses import asdict
from pathlib import Path

import torch
from torchvision.models import get_model_weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

import variants
from backbone import SWIN_SIZES
from model import build_model


class WeightsError(Exception):
    """A file or state dict that cannot be used: what is wrong with which, and what to do."""


# From the authors' names to ours. All rules are tried on every name, in this order.
RULES = [(re.compile(pattern), to) for pattern, to in [
    # Swins (Microsoft's, DINO's, detectron2's, mmdetection's) to torchvision's
    (r"^features\.", "backbone.features."),
    (r"^(backbone\.(0\.)?)?patch_embed\.(proj|norm)(ection)?\.",
     lambda m: f"backbone.features.0.{2 * (m[3] == 'norm')}."),
    (r"^(backbone\.(0\.)?)?(layers|stages)\.(\d)\.(blocks|downsample)\.",
     lambda m: "backbone.features." + (f"{2 * int(m[4]) + 1}." if m[5] == "blocks" else
                                       f"{2 * int(m[4]) + 2}.")),
    (r"^(backbone\.features.*)\.w_msa\.", r"\1."),
    (r"^(backbone\.features.*)\.(mlp\.fc1|ffn\.layers\.0\.0)\.", r"\1.mlp.0."),
    (r"^(backbone\.features.*)\.(mlp\.fc2|ffn\.layers\.1)\.", r"\1.mlp.3."),
    (r"^backbone\.0\.(norm\d)\.", r"backbone.\1."),
    # mmdetection's DINO
    (r"^(encoder|decoder)\.(layers|norm|ref_point_head)\.", r"transformer.\1.\2."),
    (r"^bbox_head\.cls_branches\.", "class_embed."),
    (r"^bbox_head\.reg_branches\.", "bbox_embed."),
    (r"^memory_trans_fc\.", "enc_output."),
    (r"^memory_trans_norm\.", "enc_output_norm."),
    (r"^query_embedding\.", "tgt_embed."),
    (r"^dn_query_generator\.label_embedding\.", "label_enc."),
    # detectron2's and detrex's names (DiffuDINO) to those of torchvision and the original projects
    (r"^backbone\.stem\.", "backbone."),
    (r"^backbone\.res(\d)\.", lambda m: f"backbone.layer{int(m[1]) - 1}."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"^neck\.convs\.(\d)\.", r"input_proj.\1."),
    (r"\.level_embeds$", ".level_embed"),
    (r"\.(self_attn|attentions\.0)\.(attn\.)?", ".self_attn."),  # and mmdetection's
    (r"\.attentions\.1\.", ".cross_attn."),
    (r"\.ffns?(\.0)?\.layers\.0\.0\.", ".linear1."),
    (r"\.ffns?(\.0)?\.layers\.1\.", ".linear2."),
    (r"\.norms\.(\d)\.", lambda m: f".norm{1 + int(m[1])}."),
    (r"\.time_step_embeds\.(\d)\.emb_layers\.", r".time.\1."),
    # LW-DETR's and RF-DETR's
    (r"^backbone\.0\.projector\.", "input_proj."),
    (r"^backbone\.0\.(encoder\.)+(embeddings\.)?", "backbone."),
    (r"^(backbone\.patch_embed)\w*\.proj\w*\.", r"\1."),
    (r"^backbone\.position_embeddings$", "backbone.pos_embed"),
    (r"^backbone\.layer\.", "backbone.blocks."),
    (r"^backbone\.layernorm\.", "backbone.norm."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.layer_scale(\d)\.lambda1$", r".gamma_\1"),
    (r"\.mlp\.fc(\d)\.", lambda m: f".mlp.{2 * int(m[1]) - 2}."),
    (r"^(input_proj\..*)\.conv\.", r"\1.0."),  # detrex's, too
    (r"^(input_proj\..*)\.(norm|bn|gn)\.", r"\1.1."),
    (r"^query_feat\.", "tgt_embed."),
    # DETR's masks
    (r"^bbox_attention\.", "mask_head."),
    (r"^mask_head\.(lay|gn|adapter)(\d)\.", lambda m: f"mask_head.{m[1]}.{int(m[2]) - 1}."),
    # everyone's
    (r"^backbone\.0\.body\.", "backbone."),
    (r"^input_proj\.(weight|bias)$", r"input_proj.0.\1"),  # DETR's only level
    (r"^transformer\.(encoder|decoder)\.layers\.", r"\1."),
    (r"^transformer\.encoder\.query_scale\.", "encoder_scale."),
    (r"^transformer\.decoder\.norm\.", "decoder_norm."),
    (r"^transformer\.(decoder\.)?", ""),  # the decoder's MLPs; and its second names of the heads
    (r"^enc_out_(class|bbox)_embed\.", r"enc_\1_embed."),
    (r"\.multihead_attn\.", ".cross_attn."),
    (r"\.sa_(\w+)_proj\.", r".self_attn.\1."),  # Conditional DETR's
    (r"\.ca_(\w+)_proj\.", r".cross_attn.\1."),
    (r"^(class_embed|bbox_embed)\.(weight|bias|layers)\b", r"\1.0.\2"),  # DETR's only head
    (r"\.layers\.(\d)\.", lambda m: f".{2 * int(m[1])}."),  # an MLP's layers, ReLUs between
]]

# Not weights: what a profiler or batch norm counts, the noise schedule, indices of Swins' windows.
IGNORED = re.compile(r"(total_params|total_ops|num_batches_tracked)$|^betas$|^posterior_|"
                     r"alphas_cumprod(_prev)?$|attn\.(w_msa\.)?relative_position_index$|attn_mask$")

# What a model is, by our names of its tensors ("-": it lacks this one); the first row that fits.
# Of several the one from which the file differs in the fewest fields.
SIGNS = [(tuple(names.split()), variant) for names, variant in [
    ("backbone.pos_embed time_embed.0.weight", "diffu_lw"),
    ("backbone.cls_token", "rf_nano rf_small rf_medium rf_large rf_base"),
    ("backbone.pos_embed", "lw_tiny lw_small lw_medium lw_large lw_xlarge"),
    ("decoder.0.self_attn.qpos.weight time_embed.0.weight", "diffu_dab"),
    ("decoder.0.self_attn.qpos.weight label_enc.weight", "dn_dab"),
    ("decoder.0.self_attn.qpos.weight refpoint_embed.weight", "dab"),
    ("decoder.0.self_attn.qpos.weight", "conditional"),
    ("time_embed.0.weight -tgt_embed.weight", "diffu_dino_published"),
    ("time_embed.0.weight label_enc.weight", "diffu_dino"),
    ("time_embed.0.weight", "diffu"),
    ("refpoint_embed.weight", "dn"),
    ("pos_trans.weight", "deformable_two_stage"),
    ("enc_output.weight tgt_embed.weight", "dino"),
    ("reference_points.weight bbox_embed.1.0.weight", "deformable_refine"),
    ("reference_points.weight input_proj.1.0.weight", "deformable"),
    ("reference_points.weight", "deformable_single"),
    ("input_proj.0.weight", "detr detr_dc5 detr_panoptic detr_panoptic_dc5"),
]]
# COCO's stuff, by its ids.
STUFF = """92 banner 93 blanket 95 bridge 100 cardboard 107 counter 109 curtain 112 door-stuff
    118 floor-wood 119 flower 122 fruit 125 gravel 128 house 130 light 133 mirror-stuff 138 net
    141 pillow 144 platform 145 playingfield 147 railroad 148 river 149 road 151 roof 154 sand
    155 sea 156 shelf 159 snow 161 stairs 166 tent 168 towel 171 wall-brick 175 wall-stone
    176 wall-tile 177 wall-wood 178 water-other 180 window-blind 181 window-other 184 tree-merged
    185 fence-merged 186 ceiling-merged 187 sky-other-merged 188 cabinet-merged 189 table-merged
    190 floor-other-merged 191 pavement-merged 192 mountain-merged 193 grass-merged 194 dirt-merged
    195 paper-merged 196 food-other-merged 197 building-other-merged 198 rock-merged
    199 wall-other-merged 200 rug-merged"""
# ResNets by the number of blocks in layer3, and of convolutions in a block.
RESNETS = {(2, 2): "resnet18", (6, 2): "resnet34", (6, 3): "resnet50", (23, 3): "resnet101"}
SWINS = {size: name for name, size in SWIN_SIZES.items()}
# What no key of ours begins with, and some key of every other detector or Swin.
OTHERS = ("transformer.", "bbox_head.", "features.", "layers.", "backbone.0.", "backbone.layers.",
          "backbone.stages.")


def own_names(keys, cfg=None):
    """Our name of every key of a state dict, {key: name}, but for what is not a weight. Published
    files call layer l's heads `class_embed.l` and, where boxes are refined, again
    `transformer.decoder.class_embed.l`; whether these are one or many, only `cfg` can tell (without
    second names: one). The index after the last layer is the encoder's."""
    keys = [k for k in keys if not IGNORED.search(k)]
    if not any(k.startswith(OTHERS) for k in keys):
        return {key: key for key in keys}
    layers = len({m[1] for m in map(re.compile(
        r"(?:transformer\.)?decoder\.layers\.(\d+)\.").match, keys) if m})
    refined = any(k.startswith(("transformer.decoder.bbox_embed.", "bbox_head.")) for k in keys)
    maps = 4 if any(k.startswith("neck.convs.3.") for k in keys) else 3  # of the backbone
    one_head = not refined or (cfg is not None and cfg.shared_heads)
    # Deformable DETR's decoder counts the norm after cross-attention, its second part, as norm1.
    swapped = "query_feat.weight" not in keys and any(  # LW-DETR's as norm2
        k.endswith("transformer.decoder.layers.0.cross_attn.sampling_offsets.weight") for k in keys)
    names = {}
    for key in keys:
        name = re.sub(r"^neck\.extra_convs\.(\d)", lambda m: f"input_proj.{maps + int(m[1])}", key)
        for pattern, to in RULES:
            name = pattern.sub(to, name)
        if swapped:
            name = re.sub(r"^(decoder\.\d+\.norm)([12])\b", lambda m: m[1] + "021"[int(m[2])], name)
        if head := re.match(r"(class|bbox)_embed\.(\d+)\.(.*)", name):
            kind, index, rest = head[1], int(head[2]), head[3]
            name = (f"enc_{kind}_embed.{rest}" if index == layers else
                    f"{kind}_embed.{0 if one_head else index}.{rest}")
            if refined and cfg is not None and not cfg.refine:
                name = key  # a file that refines is not for a model that does not
        names[key] = name
    return names


def put(module, state, names, label, advice, replaceable="(?!)", replace_all=False):
    """Load a state dict under our names (`own_names`) into a module -> (names loaded, names kept).
    Every tensor must fit, or a WeightsError says what does not, `advice()` last. But where a name
    matches `replaceable` and its tensor is absent or does not fit, or with `replace_all` in any
    case, the module keeps its values."""
    wanted = {k: v.shape for k, v in module.state_dict().items() if not IGNORED.search(k)}
    found, unequal = {}, []
    for key, name in names.items():  # where several share a name, they must be copies
        first = found.setdefault(name, key)
        if first != key and not torch.equal(state[first], state[key]):
            unequal.append(f"{first}, {key}")
    other = {k for k in found if wanted.get(k, state[found[k]].shape) != state[found[k]].shape}
    absent = {k for k in wanted if k not in found}
    kept = {k for k in absent | ({*found} if replace_all else other) if re.match(replaceable, k)}
    problems = {
        "missing": [k for k in wanted if k in absent - kept],
        "unused": [key for key, name in names.items() if name not in wanted],
        "unequal where this model has one (shared_heads=False?)": unequal,
        "of another shape": [f"{found[k]} {[*state[found[k]].shape]}, the model's is {[*wanted[k]]}"
                             for k in found if k in other - kept]}
    lines = [f"  {len(those)} {what}: " + "; ".join(those[:4]) + "; ..." * (len(those) > 4)
             for what, those in problems.items() if those]
    if lines:
        raise WeightsError("\n".join([f"{label} does not fit this model; nothing was loaded.",
                                      *lines, f"  {advice()}"]))
    loaded = {k: state[key] for k, key in found.items() if k not in kept}
    module.load_state_dict(loaded, strict=False)  # not in it: what is kept, num_batches_tracked
    return list(loaded), sorted(kept)


def read_checkpoint(path):
    """The dict in a file, on the CPU. WeightsError if it is absent, damaged, or runs code."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # authors keep their arguments
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(checkpoint, dict):
            return checkpoint
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception:  # damaged files raise RuntimeError, EOFError, KeyError, ...
        pass
    raise WeightsError(f"{path}: not a checkpoint, cut short, or one whose loading could run code: "
                       "copy it again, or write it by torch.save(model.state_dict(), path)")


def state_of(checkpoint, label):
    """The state dict in anybody's checkpoint, {name: tensor}: the average of the weights where
    there is one, as its authors evaluate that (DiffuDINO's is "ema_state", DINO's "ema_model")."""
    inner = [checkpoint[key] for key in ("ema", "ema_state", "ema_model", "model", "state_dict")
             if isinstance(checkpoint.get(key), dict) and checkpoint[key]]
    state = {str(k).removeprefix("module.").removeprefix("detr."): v
             for k, v in (inner or [checkpoint])[0].items()}
    if not state or not all(map(torch.is_tensor, state.values())):
        raise WeightsError(f"{label}: no state dict found in it, only {[*checkpoint][:6]}")
    if any(".w_msa." in key for key in state):
        # mmdetection merges four patches as [c, row, column], the original as [column, row, c].
        state |= {key: x.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)
                  for key, x in state.items() if ".downsample." in key}
    return state


def opened(source, label="the state dict"):
    """A path or dict -> (the checkpoint's dict, what to call it in messages)."""
    return (source, label) if isinstance(source, dict) else (read_checkpoint(source), str(source))


def detect(state, name=""):
    """What model a state dict belongs to, by its names (published or ours) and shapes -> (variant,
    overrides). Dilation and Align-DETR's loss leave no trace: "dc5" and "align" in `name`, the
    file's and its folder's, tell. Heads, and the queries of content=memory, are the variant's."""
    shape = {own: tuple(state[key].shape) for key, own in own_names(state).items()}
    variant = next((variant for names, variant in SIGNS if all(
        (n.strip("-") in shape) != n.startswith("-") for n in names)), None)
    if variant is None:
        raise WeightsError(f"{name or 'the state dict'}: not one of {', '.join(variants.VARIANTS)}:"
                           f" it has {', '.join([*state][:3])}")

    def size(*names, side=0):
        return next((shape[n][side] for n in names if n in shape), None)

    def count(pattern):
        return len({m[1] for m in map(re.compile(pattern).match, shape) if m})

    outputs, labels = size("class_embed.0.weight"), size("label_enc.weight")
    # mmdetection's DINO is the original's but for its heads; detrex's differs in more, and is known
    # by its backbone's names, or as Align-DETR's by labels without a row for no label.
    mm = any(k.startswith("bbox_head.") for k in state)
    detrex = not mm and (labels and labels == outputs or any(
        k.startswith(("backbone.res", "backbone.patch_embed.proj.")) for k in state))
    if "align" in name.lower():  # whose model is DINO's
        variant = variant.replace("dino", "align_published" if detrex and variant == "dino"
                                  else "align")
    levels = count(r"input_proj\.(?:stages\.)?(\d+)\.")
    groups = count(r"enc_output\.(\d+)\.")  # LW-DETR's
    queries = size("query_embed.weight", "tgt_embed.weight", "refpoint_embed.weight")
    offsets = size("decoder.0.cross_attn.sampling_offsets.weight")
    found = dict(
        num_classes=outputs and outputs - (variant[:4] == "detr"), query_groups=groups or None,
        num_queries=queries and queries // max(1, groups),
        d_model=size("decoder.0.linear2.weight"), ffn=size("decoder.0.linear1.weight"),
        encoder_layers=count(r"encoder\.(\d+)\."), decoder_layers=count(r"decoder\.(\d+)\."),
        dilation="dc5" in name.lower() or None, levels=levels,
        masks="mask_head.out_lay.weight" in shape,
        backbone=RESNETS.get((count(r"backbone\.layer3\.(\d+)\."),
                              count(r"backbone\.layer1\.0\.conv(\d)\."))))
    if table := size("backbone.features.1.0.attn.relative_position_bias_table"):  # (2w - 1)^2 rows
        found |= dict(window=round((table ** 0.5 + 1) / 2), backbone=SWINS.get((
            size("backbone.features.0.0.weight"), count(r"backbone\.features\.5\.(\d+)\."))))
    if grid := size("backbone.pos_embed", side=1):
        found |= dict(vit_width=size("backbone.pos_embed", side=2), grid=round((grid - 1) ** 0.5),
                      vit_depth=count(r"backbone\.blocks\.(\d+)\."),
                      patch=size("backbone.patch_embed.weight", side=2))
    if "query_feat.weight" in state:  # the heads of LW-DETR's members are always so wide
        found |= dict(heads=found["d_model"] // 32, cross_heads=found["d_model"] // 16,
                      vit_heads=found["vit_width"] // 64 if "backbone.cls_token" in shape else None)
    if mm or detrex:
        found |= dict(shared_heads=False, no_label_row=labels != outputs)
    if detrex:
        found |= dict(pos_offset=-0.5, pos_temperature=10000.0)
    if "backbone.bn1.weight" in state:  # our names tell more
        found |= dict(shared_heads="bbox_embed.1.0.weight" not in shape, backbone_norm="batch"
                      if "backbone.bn1.num_batches_tracked" in state else "frozen")

    def compared(name):
        row = variants.VARIANTS[name]
        heads = found.get("cross_heads") or row.cross_heads or row.heads
        whole = found | {"points": offsets and offsets // (heads * levels * 2)}
        return name, {k: v for k, v in whole.items() if v is not None and v != getattr(row, k)}

    return min(map(compared, variant.split()), key=lambda pair: len(pair[1]))


def identify(checkpoint, label):
    """(variant, overrides) of a checkpoint: as it says itself (ours), or as `detect` finds."""
    if checkpoint.get("format") != "minDETR":
        return detect(state_of(checkpoint, label), "/".join(Path(label).parts[-2:]))
    row = asdict(variants.variant(checkpoint["variant"]))
    return checkpoint["variant"], {k: v for k, v in checkpoint["config"].items() if row.get(k) != v}


def likely(checkpoint, label):
    """A sentence on what the checkpoint looks like, for an error message."""
    try:
        variant, overrides = identify(checkpoint, label)
    except WeightsError as error:
        return str(error)
    code = "".join(f", {key}={value!r}" for key, value in overrides.items())
    return f"It looks like: build_model({variant!r}{code}), or --variant {variant}"


def coco_classes(num_classes):
    """(names, category ids) of a head: COCO's 80, its 91 or, with stuff, 250 raw ids; numbers."""
    names = ["N/A", *FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]]
    if num_classes == 80:
        return [n for n in names if n != "N/A"], [i for i, n in enumerate(names) if n != "N/A"]
    if num_classes == 250:
        stuff = {int(i): name for i, name in re.findall(r"(\d+) (\S+)", STUFF)}
        names += [stuff.get(i, "N/A") for i in range(91, 250)]
    return (names if num_classes in (91, 250) else [f"class {i}" for i in range(num_classes)],
            list(range(num_classes)))


def load_weights(model, source):
    """Load a path, a checkpoint or a state dict -> how many tensors. WeightsError as `put`."""
    return len(_load(model, *opened(source))[0])


def fine_tune(model, source, same_classes):
    """Start from a checkpoint that was trained on something else -> a line on what is new: class
    heads and label embeddings, where the file lacks them, and unless the labels mean the same
    (`same_classes`) and their number fits. Everything else must fit."""
    checkpoint, label = opened(source)
    state = state_of(checkpoint, label)
    heads = r"(class_embed\.\d+|enc_class_embed|label_enc|roi_heads\.box_predictor%s)\." % (
        "" if any("mask_head." in key for key in state) else "|mask_head")
    loaded, fresh = _load(model, checkpoint, label, heads, not same_classes)
    old = state.get("label_enc.weight")
    if model.cfg.content == "label" and old is not None:  # its last row is no class, but content
        model.label_enc.weight.data[-1] = old[-1]
    modules = ", ".join(dict.fromkeys(name.split(".")[0] for name in fresh))
    return f"{label}: {len(loaded)} tensors kept; " + (
        f"new, for {model.cfg.num_classes} classes: {modules}" if fresh else "none new")


def _load(model, checkpoint, label, *replace):
    state = state_of(checkpoint, label)
    return put(model, state, own_names(state, model.cfg), label,
               lambda: likely(checkpoint, label), *replace)


def read_meta(path, **overrides):
    """What anybody's file holds, with `Config` overridden -> (its dict, meta): variant, config and
    recipe as dicts, classes and category_ids by label, held_out (what --val-share kept apart)."""
    checkpoint = read_checkpoint(path)
    variant, found = identify(checkpoint, str(path))
    cfg = variants.variant(variant).but(**found | overrides)
    classes, ids = coco_classes(cfg.num_classes)
    meta = dict(recipe=asdict(variants.recipe(variant)), classes=classes, category_ids=ids,
                held_out=[])
    if checkpoint.get("format") == "minDETR":  # it says so itself
        meta |= {key: checkpoint[key] for key in meta if key in checkpoint}
    return checkpoint, meta | dict(variant=variant, config=asdict(cfg))


def load_checkpoint(path, device="cpu", **overrides):
    """A model from a file -> (the model in evaluation mode on `device`, meta) as `read_meta`."""
    checkpoint, meta = read_meta(path, **overrides)
    model = build_model(meta["variant"], **meta["config"])
    _load(model, checkpoint, str(path))
    return model.to(device).eval(), meta


def load_backbone(model, which):
    """Weights of the backbone alone. which: "default", torchvision's IMAGENET1K_V1 (for V2, better
    on ImageNet, no learning rate was found); "none", random; or a path to those of any detector."""
    if which == "none":
        return
    if which != "default":
        checkpoint, label = opened(which)
        state = state_of(checkpoint, label)
    elif model.cfg.backbone in ("swin_l", *variants.VITS):
        raise WeightsError(f"torchvision has no weights of {model.cfg.backbone}: start from a "
                           "published detector (--weights PATH), the file that README.md names "
                           "(--backbone-weights PATH), or nothing (--backbone-weights none)")
    else:
        weights = get_model_weights(model.cfg.backbone)["IMAGENET1K_V1"]
        label = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
        socket.setdefaulttimeout(10)  # offline, fail in seconds rather than minutes
        try:
            state = weights.get_state_dict(check_hash=True)
        except Exception as error:  # no network, no room, a file cut short or of another hash
            raise WeightsError(f"{weights.url} cannot be downloaded ({error}): put it at {label}, "
                               "give --backbone-weights PATH, or --backbone-weights none, which "
                               "needs no network, but many more images or epochs") from None
        finally:
            socket.setdefaulttimeout(None)
    names = own_names(state)
    part = "backbone." if any(n.startswith("backbone.") for n in names.values()) else ""
    names = {k: name.removeprefix(part) for k, name in names.items()
             if name.startswith(part) and not name.startswith("fc.")}  # ImageNet's classifier
    put(model.backbone, state, names, label, lambda: f"See --backbone: it is {model.cfg.backbone}",
        r"norm\d\.")  # a Swin's, which ImageNet's lack
