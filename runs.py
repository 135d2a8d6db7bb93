"""From a command line to a whole run: options, processes, checkpoints on disk, logs.

`parse` reads train.py's command line, `settle` makes a new run of it, `resumed` continues a stored
one. A run is (options, cfg, recipe): a dict of `Options`, and a row of each table of variants.py.
"""
import argparse
import contextlib
import io
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import variants
from data import PUBLISHED
from variants import Config, ConfigError, Recipe, option
from weights import WeightsError, read_checkpoint, read_meta


# ============================================================================= the command line

@dataclass(frozen=True)
class Options:
    """What a run is beside its model and its recipe, whose fields are options of train.py too.
    Stored with it: known, {category id: class} of --weights; masks_only, see train.py."""
    variant: str = option("diffu", f"one of {', '.join(variants.VARIANTS)} (default: diffu)")
    data: str = option("toy", "toy (default), coco, lvis, v3det, or a folder of images and boxes")
    annotations: str = option(None, "the annotation file (default: searched for in --data), or a "
                              "form for both splits, as annotations/panoptic_{}.json")
    val_share: float = option(0.0, "share of images to validate on, if no split exists", high=0.9)
    data_root: str = option(None, "where coco, lvis or v3det is (default: $COCO_ROOT or data/coco)")
    preset: str = option(
        "auto", "published: the paper's size and recipe (auto, on coco, lvis, v3det); small: one "
        "that learns from scratch on a CPU (auto, on other data)", "auto", "published", "small")
    recipe: str = option("auto", "DiffuDINO's steps and batches on lvis or v3det (auto: with that "
                         "--data at the published size)", "auto", *variants.LARGE)
    out: str = option(None, "the run's folder (default: out/<variant>-<data>)")
    weights: str = option(None, "start from this checkpoint, published or ours (fine-tuning)")
    overfit: int = option(0, "train and evaluate on the first N training images alone", low=0)
    freeze: str = option("", "comma-separated parts that are not trained, e.g. backbone,encoder")
    seed: int = option(0, "of weights, data order, augmentation and noise (default: 0)", low=0)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or cuda:1")
    workers: int = option(2, "processes that read images (default: 2, for toy 0)", low=0)
    amp: str = option("bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
                      else "none", "mixed precision (default: bf16 where a GPU has it; fp16 scales "
                      "the loss)", "none", "bf16", "fp16")
    compile: bool = option(False, "torch.compile the transformer's layers")
    checkpoint_activations: bool = option(False, "recompute layers in backward, for less memory")
    save_steps: int = option(500, "save last.pth every so many steps (default: 500), or 5 minutes")
    keep_every: int = option(0, "keep a checkpoint of every so many steps as step-N.pth", low=0)

    __post_init__ = variants.check


# May change when a run is resumed; everything else is what the run is.
FREE = {"resume", "data", "data_root", "annotations", "device", "workers", "epochs", "steps",
        "eval_every", "lr", "lr_backbone", "micro_batch", "save_steps", "clip_norm", "keep_every",
        "checkpoint_activations", "compile"}
# What --help tells beside Options; --help all tells every field.
USUAL = {"backbone", "num_queries", "epochs", "lr", "batch_size", "micro_batch", "image_size",
         "backbone_weights"}
LAST = ("last.pth", "last.prev.pth")  # a run's newest checkpoint, and the one before it


def add_field(parser, f, told=True):
    """A field of Options, Config or Recipe as an option of an argparse parser or group."""
    flags = ["--" + f.name.replace("_", "-")] + ["--queries"] * (f.name == "num_queries")
    words = f.metadata["choices"] or None
    kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
        type=f.type, choices=words, metavar=None if words else f.type.__name__.upper())
    parser.add_argument(*flags, help=f.metadata["help"] if told else argparse.SUPPRESS, **kind)


def parse_args(parser, argv, names=()):
    """parser.parse_args, but an unknown option is one line with the nearest name."""
    args, strange = parser.parse_known_args(argv)
    if strange:
        known = [f"--{name}".replace("_", "-") for name in (*names, *vars(args))]
        near = get_close_matches(strange[0], known, 1, 0)[0]
        parser.exit(2, f"error: no option {strange[0]}; do you mean {near}?\n")
    return args


def parse(argv, description):
    """train.py's command line as a dict of what was given; the defaults are `settle`'s."""
    argv = sys.argv[1:] if argv is None else argv
    everything = "--help" in argv and "all" in argv
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        epilog=None if everything else "--help all tells every option of model and recipe.")
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder; what may "
                        "change: " + ", ".join(sorted(FREE - {"resume"})))
    for title, table in (("the run", Options), ("the model (default: the variant's)", Config),
                         ("the recipe (default: the variant's or the preset's)", Recipe)):
        group = parser.add_argument_group(title)
        for f in fields(table):
            if f.name != "num_classes":  # which follows from the data
                add_field(group, f, everything or table is Options or f.name in USUAL)
    names = (*variants.FIELDS, *(f.name for f in fields(Options)))
    return vars(parse_args(parser, ["--help"] if everything else argv, names))


def settle(given):
    """A new run (options, cfg, recipe) of what was given; ConfigError where that contradicts.
    Precedence: the command line, the checkpoint of --weights, the preset, the published row."""
    options, in_cfg, in_recipe = ({f.name: given[f.name] for f in fields(t) if f.name in given}
                                  for t in (Options, Config, Recipe))
    toy, changes = given.get("data", "toy") == "toy", {}
    options = asdict(Options(**{"workers": 0 if toy else 2} | options))
    if options["weights"]:
        _, meta = read_meta(options["weights"])
        for name in ("variant", "preset", "backbone_weights"):
            if name in given and given[name] != meta.get(name):
                raise ConfigError(f"--weights {options['weights']} has its own {name}: omit yours")
        options |= {"variant": meta["variant"], "preset": "checkpoint",
                    "known": dict(zip(meta["category_ids"], meta["classes"]))}
        row = Config(**meta["config"])
        options["masks_only"] = in_cfg.get("masks", False) and not row.masks
        recipe = Recipe(**meta["recipe"]).but(**(
            variants.MASKS_RECIPE if options["masks_only"] else variants.FINE_TUNE_RECIPE))
    else:
        row, recipe = variants.variant(options["variant"]), variants.recipe(options["variant"])
        if options["preset"] == "auto":
            options["preset"] = "published" if options["data"] in PUBLISHED else "small"
        if options["preset"] == "small":
            small = variants.TOY_RECIPE if toy else variants.SMALL_RECIPE
            squares = {} if recipe.max_size else {"max_size": 0}  # stay so
            changes, recipe = variants.small(row.but(**in_cfg)), recipe.but(**small | squares)
        if in_recipe.get("backbone_weights", recipe.backbone_weights) == "none":
            changes["backbone_norm"] = "batch"  # frozen random statistics learn nothing
    if options["data"] in variants.LARGE:
        changes["detections"] = max(300, row.detections)  # as many count there
        if options["recipe"] == "auto" and options["preset"] == "published":
            options["recipe"] = options["data"]
    if options["recipe"] != "auto":
        recipe = recipe.but(**variants.LARGE[options["recipe"]])
        recipe = recipe.but(steps=0) if "epochs" in given else recipe
        if options["variant"].startswith("diffu_dino"):
            changes |= variants.LARGE_DIFFU_DINO.get(in_cfg.get("backbone", row.backbone), {})
    if options["overfit"]:
        ends = variants.OVERFIT_RECIPE if not {"steps", "epochs"} & {*given} else {}
        recipe = recipe.but(crop=False, **ends)
    if in_recipe.get("image_size", 0) > 0:  # or the other limit would hold it back in silence
        scale = given["image_size"] / recipe.image_size
        recipe = recipe.but(max_size=round(recipe.max_size * scale))
    cfg = row.but(**changes | in_cfg)
    if why := variants.idle(given, cfg):
        raise ConfigError(why)
    name = f"out/{options['variant']}-{Path(options['data']).resolve().name}"
    out = options["out"] = gather(options["out"] or numbered(name))[0]
    if any(Path(out, file).exists() for file in LAST):
        raise ConfigError(f"--out {out} already holds a run: --resume it, or choose another folder")
    return options, cfg, recipe.but(**in_recipe)


def numbered(path, inside=""):
    """The first of path, path-2, path-3, ... that does not exist, or lacks the file `inside`."""
    paths = (path, *(f"{path}-{i}" for i in range(2, 10 ** 5)))
    return next(path for path in paths if not os.path.exists(os.path.join(path, inside)))


def resumed(given):
    """The stored (options, cfg, recipe, checkpoint) of --resume, changed where FREE allows it."""
    path, checkpoint = read_last(Path(given["resume"]))
    if "run" not in checkpoint:
        raise ConfigError(f"--resume {path}: no run to continue: start from it with --weights")
    Options(**{f.name: given[f.name] for f in fields(Options) if f.name in given})  # in range?
    options = asdict(Options()) | checkpoint["run"]
    cfg, recipe = checkpoint["config"], checkpoint["recipe"]
    for name, value in given.items():
        table = next((t for t in (options, cfg, recipe) if name in t), {})
        if name not in FREE and table.get(name) != value:
            raise ConfigError(f"--{name.replace('_', '-')} {value} contradicts the run in {path}, "
                              f"which has {table.get(name)}: omit it, or start a new run")
        table[name] = value
    if "epochs" in given:
        recipe["steps"] = 0  # or it would still win over --epochs
    options["out"] = str(path.parent)
    return options, Config().but(**cfg), Recipe().but(**recipe), checkpoint


def describe(run):
    """Print what was chosen and what to expect of it; save it as run.json. run: train.py's Run."""
    options, recipe, cfg = run.options, run.recipe, run.model.cfg
    chosen = {"run": options, "config": asdict(cfg), "recipe": asdict(recipe)}
    (run.out / "run.json").write_text(json.dumps(chosen, indent=1))
    base, parameters = asdict(variants.variant(options["variant"])), run.model.parameters()
    changed = [f"{k}={v}" for k, v in chosen["config"].items() if v != base[k]]
    print(f"{options['variant']} ({options['preset']} size) on {options['device']}: "
          f"{sum(p.numel() for p in parameters):,} parameters\n"
          f"train: {run.train_set.summary}\nval:   {run.val_set.summary}\n"
          f"{run.total:,} steps ({run.per_epoch:,} an epoch), {run.step:,} done -> {run.out}\n"
          f"model, where it differs from the published one: {', '.join(changed) or '-'}\n"
          f"recipe: {', '.join(f'{k}={v}' for k, v in chosen['recipe'].items())}")
    side = recipe.image_size // (16 if cfg.dilation else 32)
    one = cfg.levels == 1 and cfg.backbone in variants.RESNETS and cfg.detector == "detr"
    if one and side ** 2 < 64 and not options["weights"]:
        print(f"expect little: this variant looks at C5 alone, here {side} x {side} tokens, and "
              "does not learn in so short a run: use --variant deformable")


# ================================================================================ the processes
#
# torchrun starts several. All must call `gather` alike: if one omits a call, the others hang.

def start():
    """Meet torchrun's other processes, if any; speak line by line, whatever the encoding."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def stop():
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """This process's number; 0 writes files and speaks to people."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device(name):
    """--device as a torch.device: of several processes each has its own GPU. Or a ConfigError."""
    if world() > 1 and name.startswith("cuda"):
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: {why}; write --device cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where code that names no GPU works
    return device


def gather(thing):
    """Any object of every process -> a list of them, on all: [0] is process 0's."""
    things = [thing] * world()
    if world() > 1:
        dist.all_gather_object(things, thing)
    return things


def progress(items, title, total, show=True, **options):
    """tqdm's bar over the items; where there is no terminal, a line every 10 seconds."""
    line = "{desc}: {n} of {total}{postfix}, {rate_fmt}, {remaining} left\n"
    options |= dict(leave=False, dynamic_ncols=True) if sys.stderr.isatty() else dict(
        mininterval=10, position=0, bar_format=line)
    return tqdm(items, title, total, disable=not show, **options)


@contextlib.contextmanager
def catch_signals():
    """Let Ctrl-C and SIGTERM wait for the step, evaluation or save in progress; a second signal
    stops immediately. Yields: the number of the one that came, to any process, or 0."""
    came = []

    def note(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda: max(gather(sum(came)))
    for number, handler in old.items():
        signal.signal(number, handler)


# ================================================================== checkpoints and logs on disk

def save(path, checkpoint, keep_previous=False):
    """Write a checkpoint whole or not at all: a crash or a full disk leaves the file from before,
    which `keep_previous` keeps as name.prev.pth in case the new one is damaged later."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name points to it
        if keep_previous and path.exists():
            os.replace(path, path.with_suffix(".prev.pth"))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise WeightsError(f"{path}: cannot be written ({error}); the one from before is kept: make"
                           " room, or choose another folder") from None


def read_last(path):
    """The newest whole checkpoint of a run's folder, or the named file -> (its path, its dict).
    Where last.pth is damaged, or a crash came between `save`'s two renames, it is last.prev.pth."""
    files = [path] if path.is_file() else [path / name for name in LAST if (path / name).exists()]
    for file in files:
        try:
            return file, read_checkpoint(file)
        except WeightsError as error:
            if file == files[-1]:
                raise
            print(f"{error}\nTaking the one before it: {files[-1]}")
    raise WeightsError(f"{path}: no last.pth to resume; a run saves it every --save-steps")


def cut_log(path, step):
    """Drop the lines after `step` from a log: of a run that died after its last checkpoint."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(True) if line.endswith("}\n")]
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def append_log(path, **line):
    """Write a line of numbers to a log, as a JSON object."""
    with open(path, "a") as file:
        file.write(json.dumps({k: round(v, 6) for k, v in line.items()}) + "\n")


def means(steps, batch_size, device):
    """What the log says of some steps, a list of dicts: their means (losses: summed over processes,
    which all must call this), speed and a GPU's peak memory."""
    line = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    shares = gather(line)
    line |= {k: sum(share[k] for share in shares) for k in line if k.startswith("loss")}
    if device.type == "cuda":
        line["memory_mb"] = torch.cuda.max_memory_allocated(device) / 2 ** 20
    return line | {"images_per_s": batch_size / (line["seconds_data"] + line["seconds_step"])}
