"""Weights in and out: published checkpoints' names translated to ours; our own checkpoints; ImageNet backbones.

The authors' files hold the same tensors as our models under other names, some of them twice. `RULES` is the whole
translation. Nothing is ever loaded in part: a name or shape that does not fit is a WeightsError that says which, and
which variant the file looks like.

Read `RULES`, `own_names`, `put`; then `detect`, which recognises a file. The rest reads and writes files.

    load_checkpoint(path)        -> model, meta       any file, whoever wrote it
    load_weights(model, source)                       into a model that exists; everything must fit
    fine_tune(model, source)                          the same, except for another number of classes
    load_backbone(model, which)                       ImageNet weights for training from scratch
    save(path, checkpoint)                            whole, or not at all
    read_last(folder)            -> path, checkpoint  the newest whole one of a run

torch.load is only ever called with weights_only=True: a pickle that wants to run code is refused.
"""
import argparse
import contextlib
import http.client
import os
import pickle
import re
import socket
from dataclasses import asdict
from pathlib import Path

import torch
from torchvision.models import get_model_weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

import variants
from model import build_model


class WeightsError(Exception):
    """A file or state dict that cannot be used; the message says what is wrong with which, and what to do."""


# ============================================================================================================ the names

# From the authors' names to ours. All rules are tried on every name, in this order.
RULES = [(re.compile(pattern), to) for pattern, to in [
    # detectron2's and detrex's names (DiffuDINO) to those of torchvision and of the original projects
    (r"^backbone\.stem\.", "backbone."),
    (r"^backbone\.res(\d)\.", lambda m: f"backbone.layer{int(m[1]) - 1}."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"^neck\.convs\.(\d)\.", r"input_proj.\1."),
    (r"^neck\.extra_convs\.(\d)\.", lambda m: f"input_proj.{3 + int(m[1])}."),                  # after C3, C4, C5
    (r"^(input_proj\.\d)\.conv\.", r"\1.0."),
    (r"^(input_proj\.\d)\.norm\.", r"\1.1."),
    (r"\.level_embeds$", ".level_embed"),
    (r"\.attentions\.0(\.attn)?\.", ".self_attn."),
    (r"\.attentions\.1\.", ".cross_attn."),
    (r"\.ffns\.0\.layers\.0\.0\.", ".linear1."),
    (r"\.ffns\.0\.layers\.1\.", ".linear2."),
    (r"\.norms\.(\d)\.", lambda m: f".norm{1 + int(m[1])}."),
    (r"\.time_step_embeds\.(\d)\.emb_layers\.", r".time.\1."),
    # everyone's
    (r"^backbone\.0\.body\.", "backbone."),
    (r"^transformer\.(encoder|decoder)\.layers\.", r"\1."),
    (r"^transformer\.decoder\.norm\.", "decoder_norm."),
    (r"^transformer\.decoder\.", ""),               # its MLPs; and its second names of the heads, see `own_names`
    (r"^transformer\.", ""),
    (r"^enc_out_(class|bbox)_embed\.", r"enc_\1_embed."),
    (r"\.multihead_attn\.", ".cross_attn."),
    (r"^(class_embed|bbox_embed)\.(weight|bias|layers)\b", r"\1.0.\2"),                          # DETR's only head
    (r"\.layers\.(\d)\.", lambda m: f".{2 * int(m[1])}."),                         # an MLP's layers, ReLUs between
]]

# Not weights: what a profiler or batch norm counts, and the noise schedule, which diffusion.py computes.
IGNORED = re.compile(r"(total_params|total_ops|num_batches_tracked)$"
                     r"|^(betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|posterior_\w+)$")

# Names of the family's members that have no variant here yet.
FOREIGN = {"mask_head.": "DETR with a mask head", "sa_qcontent_proj": "Conditional DETR, DAB-DETR or DN-DAB-DETR",
           "backbone.0.patch_embed": "a Swin backbone", "patterns_embed": "DN-DETR with query patterns"}


def own_names(keys, cfg=None):
    """Our name of every key of a state dict, {key: name}; where keys share a name, the last one is to be used.

    Published files name the heads of layer l `class_embed.l` and, where boxes are refined, once more
    `transformer.decoder.bbox_embed.l`. PyTorch loads names in the order of registration, so the top level beats the
    decoder's and layer 5 beats layer 0: the order here does the same. A file without the decoder's second names holds
    one head under many names; with them it may too (DINO), which only `cfg` can tell. The index after the last layer is
    the encoder's head. Our own names stay as they are.
    """
    keys = [k for k in keys if not IGNORED.search(k)]
    if not any(k.startswith("transformer.") for k in keys):                               # ours have no `transformer`
        return {key: key for key in keys}
    keys.sort(key=lambda k: (not k.startswith("transformer."), [int(n) for n in re.findall(r"\d+", k)]))
    layers = len({m[0] for m in map(re.compile(r"transformer\.decoder\.layers\.\d+\.").match, keys) if m})
    refined = any(k.startswith("transformer.decoder.bbox_embed.") for k in keys)
    one_head = not refined or (cfg is not None and cfg.shared_heads)
    # Deformable DETR's decoder counts the norm after cross-attention, its second sublayer, as norm1.
    swapped = any(k.endswith("decoder.layers.0.cross_attn.sampling_offsets.weight") for k in keys)
    names = {}
    for key in keys:
        name = key
        for pattern, to in RULES:
            name = pattern.sub(to, name)
        if swapped:
            name = re.sub(r"^(decoder\.\d+\.norm)([12])\b", lambda m: m[1] + "21"[int(m[2]) - 1], name)
        if head := re.match(r"(class|bbox)_embed\.(\d+)\.(.*)", name):
            kind, index, rest = head[1], int(head[2]), head[3]
            name = f"enc_{kind}_embed.{rest}" if index == layers else f"{kind}_embed.{0 if one_head else index}.{rest}"
            if refined and cfg is not None and not cfg.refine:
                name = key                                         # a refining file is not for a model that does not
        names[key] = name
    return names


def put(module, state, names, label, advice, replaceable=None, replace_all=False):
    """Load a state dict under our names (`own_names`) into a module; every tensor must fit.

    Tensors of another shape whose names match `replaceable`, or all that match, keep the module's values. Returns (names
    loaded, names kept). Raises WeightsError, with the module untouched; `advice` makes its last line.
    """
    wanted = {k: v for k, v in module.state_dict().items() if not IGNORED.search(k)}
    found = {name: state[key] for key, name in names.items()}
    other = {k for k in found if k in wanted and found[k].shape != wanted[k].shape}
    kept = {k for k in (found if replace_all else other) if replaceable and re.match(replaceable, k)}
    problems = {
        "missing": [k for k in wanted if k not in found],
        "unused": [key for key, name in names.items() if name not in wanted],
        "of another shape": [f"{key} {list(state[key].shape)}, the model's is {list(wanted[name].shape)}"
                             for key, name in names.items() if name in other - kept]}
    if any(problems.values()):
        raise WeightsError("\n".join([f"{label} does not fit this model; nothing was loaded."] + [
            f"  {len(names)} {what}: " + "; ".join(names[:4]) + ("; ..." if len(names) > 4 else "")
            for what, names in problems.items() if names] + [f"  {advice()}"]))
    loaded = {k: v for k, v in found.items() if k not in kept}
    module.load_state_dict(loaded, strict=False)             # what it does not find is kept, or num_batches_tracked
    return list(loaded), sorted(kept)


# ============================================================================================================= the file

def read_checkpoint(path):
    """The dict in a checkpoint file, on the CPU. Raises WeightsError if it is absent, damaged, or wants to run code."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):         # the authors' files keep their arguments
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{path}: there is no such file") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:                  # damaged files raise RuntimeError, EOFError, KeyError, ...
        if what := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise WeightsError(f"{path}: refused, as it is a pickle of more than tensors ({what[1]}) and loading it could "
                               "run code. Save the state dict alone where it was made: torch.save(model.state_dict(), "
                               "path)") from None
        size = os.path.getsize(path)
        raise WeightsError(f"{path}: not a checkpoint, or cut short ({size:,} bytes): copy or download it again") from None
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint or state dict")
    return checkpoint


def state_of(checkpoint, label):
    """The state dict in a checkpoint, whoever wrote it: {name: tensor}.

    The exponential average of the weights is preferred where there is one (ours: "ema"; DiffuDINO's: "ema_state";
    DINO's: "ema_model"), because that is what its authors evaluate; otherwise "model", or the dict itself.
    """
    for key in ("ema", "ema_state", "ema_model", "model", "state_dict"):
        if isinstance(checkpoint.get(key), dict) and checkpoint[key]:
            checkpoint = checkpoint[key]
            break
    state = {str(k).removeprefix("module."): v for k, v in checkpoint.items()}
    strange = [k for k, v in state.items() if not torch.is_tensor(v)]
    if strange or not state:
        raise WeightsError(f"{label}: no state dict found in it, only " + ", ".join(map(repr, [*checkpoint][:6])))
    return state


def opened(source):
    """A path or dict -> (the checkpoint's dict, what to call it in messages)."""
    return (source, "the state dict") if isinstance(source, dict) else (read_checkpoint(source), str(source))


# ======================================================================================================== what is it?

def detect(state, name=""):
    """What model a state dict belongs to, by its names and shapes -> (variant, overrides).

    Works on published names and on ours. Dilation and Align-DETR's loss leave no trace in either: they are recognised only
    by "dc5" and "align" in `name`, the file's name; otherwise say `dilation=True`, or build that variant and load the file
    into it. The number of heads leaves none either (the variant's is assumed), nor does the number of queries where they
    start as proposals' features.
    Raises WeightsError for models that are not built here.
    """
    label, there = name or "the state dict", "there are " + ", ".join(variants.VARIANTS)
    for sign, what in FOREIGN.items():
        if any(sign in k for k in state):
            raise WeightsError(f"{label}: {what} is not built yet (a name holds {sign!r}); {there}")
    shape = {own: tuple(state[key].shape) for key, own in own_names(state).items()}
    separate, levels = "bbox_embed.1.0.weight" in shape, shape.get("level_embed", (1,))[0]
    if "time_embed.0.weight" in shape:
        variant = "diffu_dino_published" if "tgt_embed.weight" not in shape else \
            "diffu_dino" if "label_enc.weight" in shape else "diffu"
    elif "refpoint_embed.weight" in shape:
        variant = "dn"
    elif "pos_trans.weight" in shape:
        variant = "deformable_two_stage"
    elif "enc_output.weight" in shape and "tgt_embed.weight" in shape:
        variant = "dino"
    elif "reference_points.weight" in shape:
        variant = "deformable_refine" if separate else "deformable" if levels > 1 else "deformable_single"
    elif "query_embed.weight" in shape or "input_proj.weight" in shape:
        variant = "detr"
    else:
        raise WeightsError(f"{label}: not a detector of this family, or not built yet: names such as "
                           f"{', '.join([*state][:3])} fit no variant; {there}")
    if "align" in name.lower():                                                                   # DINO's model
        variant = {"dino": "align"}.get(variant, variant.replace("diffu_dino", "diffu_align"))
    row = variants.VARIANTS[variant]

    def size(axis, *names):
        return next((shape[n][axis] for n in names if n in shape), None)

    def count(pattern):
        return len({m[1] for m in map(re.compile(pattern).match, shape) if m})

    blocks, bottleneck = count(r"backbone\.layer3\.(\d+)\."), "backbone.layer1.0.conv3.weight" in shape
    outputs, offsets = size(0, "class_embed.0.weight"), size(0, "decoder.0.cross_attn.sampling_offsets.weight")
    found = dict(
        num_classes=outputs and outputs - (row.class_loss == "ce"),
        num_queries=size(0, "query_embed.weight", "tgt_embed.weight", "refpoint_embed.weight"),
        d_model=size(0, "decoder.0.linear2.weight"), ffn=size(0, "decoder.0.linear1.weight"),
        encoder_layers=count(r"encoder\.(\d+)\."), decoder_layers=count(r"decoder\.(\d+)\."), levels=levels,
        points=offsets and offsets // (row.heads * levels * 2),
        backbone={(2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50", (23, True): "resnet101"}.get(
            (blocks, bottleneck)))
    if "backbone.bn1.weight" in state:                                                     # our names tell more
        found["shared_heads"] = not separate
        found["backbone_norm"] = "batch" if "backbone.bn1.num_batches_tracked" in state else "frozen"
    if "dc5" in name.lower():
        found["dilation"] = True
        variant = "detr_dc5" if variant == "detr" else variant
    row = variants.VARIANTS[variant]
    return variant, {k: v for k, v in found.items() if v is not None and v != getattr(row, k)}


def identify(checkpoint, label):
    """(variant, overrides) of a checkpoint: as it says itself (ours), or as `detect` finds."""
    if checkpoint.get("format") == "minDETR":
        absent = [k for k in ("variant", "config", "recipe", "classes", "category_ids", "model") if k not in checkpoint]
        if absent:
            raise WeightsError(f"{label}: a minDETR checkpoint without {', '.join(absent)}: save it anew")
        row = asdict(variants.variant(checkpoint["variant"]))
        config = checkpoint["config"].items()
        return checkpoint["variant"], {k: v for k, v in config if k not in row or row[k] != v}
    return detect(state_of(checkpoint, label), Path(label).name)


def likely(checkpoint, label, more=""):
    """A sentence on what the checkpoint looks like, with `more` to advise, for an error message."""
    try:
        variant, overrides = identify(checkpoint, label)
    except WeightsError as error:
        return str(error)
    code = "".join(f", {k}={v!r}" for k, v in overrides.items())
    flags = "".join(f" --{'no-' * (v is False)}{k.replace('_', '-')}" + f" {v}" * (type(v) is not bool)
                    for k, v in overrides.items() if k != "num_classes")                 # train.py has it from the data
    return f"It looks like: build_model({variant!r}{code}), or --variant {variant}{flags}{more}"


def coco_classes(num_classes):
    """(class names, category ids) of a published head: COCO's 91 raw ids, its 80 used ones, or just numbers."""
    names = ["N/A", *FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]]
    if num_classes == 91:
        return names, list(range(91))
    if num_classes == 80:
        return [n for n in names if n != "N/A"], [i for i, n in enumerate(names) if n != "N/A"]
    return [f"class {i}" for i in range(num_classes)], list(range(num_classes))


# ================================================================================================================== use

def load_weights(model, source):
    """Load a checkpoint into a model that exists; every tensor must fit.

    Args: model: a `Detector`. source: a path, a checkpoint's dict or a state dict, published or ours.

    Returns how many tensors were loaded. Raises WeightsError, with the model untouched, naming what is missing, unused
    or of another shape, and the variant that would fit.
    """
    return len(_load(model, *opened(source))[0])


def fine_tune(model, source, same_classes):
    """Start from a checkpoint that was trained on something else.

    Class heads and label embeddings keep the model's fresh values, unless the labels mean the same (`same_classes`) and
    their number fits; everything else must fit.

    Returns one line on what was kept and what is new. Raises WeightsError as `load_weights`.
    """
    checkpoint, label = opened(source)
    loaded, fresh = _load(model, checkpoint, label, r"(class_embed\.\d+|enc_class_embed|label_enc)\.", not same_classes)
    modules = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in fresh))
    new = f"new, for {model.cfg.num_classes} classes: {modules}" if fresh else "none new, the classes are the same"
    return f"{label}: {len(loaded)} tensors kept; {new}"


def _load(model, checkpoint, label, replaceable=None, replace_all=False):
    state = state_of(checkpoint, label)
    more = "" if replaceable else "; for another number of classes, start from it with fine_tune"
    return put(model, state, own_names(state, model.cfg), label, lambda: likely(checkpoint, label, more), replaceable,
               replace_all)


def load_checkpoint(path, device="cpu", **overrides):
    """A model from a file, whoever wrote it.

    Args: path: our checkpoint or a published one. overrides: `Config` fields to change, e.g. evaluations=5.

    Returns (the model in evaluation mode on `device`, meta), where meta holds `variant`, `config` and `recipe` (dicts;
    the recipe's image_size and max_size are the photos' size), `classes` (names) and `category_ids`, both by label.
    Raises WeightsError for the file, ConfigError for the overrides.
    """
    checkpoint = read_checkpoint(path)
    variant, found = identify(checkpoint, str(path))
    model = build_model(variant, **(found | overrides))
    _load(model, checkpoint, str(path))
    meta = dict(variant=variant, config=asdict(model.cfg))
    if checkpoint.get("format") == "minDETR":
        meta |= {k: checkpoint[k] for k in ("recipe", "classes", "category_ids")}
    else:
        classes, category_ids = coco_classes(model.cfg.num_classes)
        meta |= dict(recipe=asdict(variants.recipe(variant)), classes=classes, category_ids=category_ids)
    return model.to(device).eval(), meta


def load_backbone(model, which):
    """Weights for the backbone of a model that is trained from scratch otherwise.

    which: "default", torchvision's ImageNet weights: IMAGENET1K_V1, which every published DETR starts from (V2 is
    better on ImageNet, but its recipe's features and statistics are not the ones the learning rates were found for).
    "none": random. Or a path to torchvision's state dict or a checkpoint of a detector.

    Raises WeightsError when the weights cannot be had or do not fit, or "none" meets a frozen norm.
    """
    cfg = model.cfg
    if which == "none":
        if cfg.backbone_norm == "frozen":
            raise WeightsError("a backbone without weights cannot learn under frozen batch norm: write --backbone-norm "
                               "batch, or give it weights (--backbone-weights default or PATH)")
        return
    if which == "default":
        weights, timeout = get_model_weights(cfg.backbone)["IMAGENET1K_V1"], socket.getdefaulttimeout()
        cache = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
        socket.setdefaulttimeout(10)                                # offline, fail in seconds rather than minutes
        try:
            state = weights.get_state_dict(progress=True, check_hash=True)
        except (OSError, http.client.HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise WeightsError(f"{cfg.backbone}'s ImageNet weights cannot be had from {weights.url} ({error}): put "
                               f"that file at {cache}, or give --backbone-weights PATH, or train without them: "
                               "--backbone-weights none") from None
        finally:
            socket.setdefaulttimeout(timeout)
        label = str(cache)
    else:
        checkpoint, label = opened(which)
        state = state_of(checkpoint, label)
    names = own_names(state)
    if any(name.startswith("backbone.") for name in names.values()):                              # a whole detector's
        names = {k: name.removeprefix("backbone.") for k, name in names.items() if name.startswith("backbone.")}
    names = {k: name for k, name in names.items() if not name.startswith("fc.")}               # ImageNet's classifier
    put(model.backbone, state, names, label, lambda: f"The model's backbone is {cfg.backbone}: see --backbone")


def save(path, checkpoint, keep_previous=False):
    """Write a checkpoint whole or not at all: a crash or a full disk leaves the file that was there.

    keep_previous: keep that file as name.prev.pth, in case the new one is damaged later. Raises WeightsError naming the
    path.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())               # on the disk before the name points to it
        if keep_previous and path.exists():
            os.replace(path, path.with_suffix(".prev.pth"))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{path}: cannot be written ({error}); the checkpoint from before is kept. Make room, or "
                           "choose another folder") from None
    finally:
        with contextlib.suppress(OSError):                           # gone after the rename, or never there
            temporary.unlink()


def read_last(path):
    """The newest whole checkpoint of a run's folder, or the named file -> (its path, its dict).

    Where last.pth is damaged (or a crash came between `save`'s two renames), the one before is taken, and said so.
    Raises WeightsError.
    """
    if path.is_file():
        return path, read_checkpoint(path)
    path, before = path / "last.pth", path / "last.prev.pth"
    if not path.exists() and not before.exists():
        raise WeightsError(f"{path.parent}: there is no last.pth to resume; a run saves it every --save-steps")
    try:
        return path, read_checkpoint(path)
    except WeightsError as error:
        if not before.exists():
            raise
        checkpoint = read_checkpoint(before)
        print(f"{error}\nTaking the checkpoint before it: {before}, step {checkpoint.get('step')}")
        return before, checkpoint


def check_folder(folder):
    """Raise WeightsError if a run could not write here: better now than at its first checkpoint."""
    there = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise WeightsError(f"{folder}: a run cannot be written there ({there} is "
                           f"{'read-only' if there.is_dir() else 'not a folder'}): choose another --out")


def claim(folder):
    """Make a run's folder this process's own while it lives, however it ends; WeightsError if another process has it.

    Returns the file that holds the claim; it must stay open. A record lock, which forked workers do not inherit.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder) / ".lock", "w")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise WeightsError(f"{folder}: another process is writing this run: stop it first (when torchrun is killed with -9, "
                           "its processes go on)") from None
    except (ImportError, OSError):                               # on Windows, and on file systems that have no locks
        pass
    return file
