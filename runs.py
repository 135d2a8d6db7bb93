"""From a command line to a whole run: options, processes, checkpoints on disk, logs.

`parse` reads train.py's command line, `settle` makes a new run of it, `resumed` continues a stored
one. A run is (options, cfg, recipe): a dict of `Options`, and a row of each table of variants.py.
"""
import argparse
import contextlib
import json
import os
import resource
import signal
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist

import data
import variants
from variants import Config, ConfigError, Recipe, option
from weights import WeightsError, load_checkpoint, read_checkpoint


# ============================================================================= the command line

@dataclass(frozen=True)
class Options:
    """What a run is beside its model and its recipe, whose fields are options of train.py too."""
    variant: str = option("diffu", f"one of {', '.join(variants.VARIANTS)} (default: diffu)")
    data: str = option("toy", "toy, coco, or a folder in COCO's layout (default: toy)")
    data_root: str = option(None, "where COCO is (default: $COCO_ROOT, else data/coco)")
    preset: str = option(None, "the paper's size and recipe (default on coco), or one that learns "
                         "from scratch on a CPU (default on other data)", "published", "small")
    out: str = option(None, "the run's folder (default: out/<variant>-<data>)")
    weights: str = option(None, "start from this checkpoint, published or ours (fine-tuning)")
    overfit: int = option(0, "train and evaluate on the first N training images, as they are")
    freeze: str = option("", "comma-separated parts that are not trained, e.g. backbone,encoder")
    seed: int = option(0, "of weights, data order, augmentation and noise (default: 0)")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or cuda:1")
    workers: int = option(2, "processes that read images (default: 2, for toy 0)")
    amp: str = option("none", "mixed precision (fp16 scales the loss)", "none", "bf16", "fp16")
    checkpoint_activations: bool = option(False, "recompute layers in backward, for less memory")
    save_steps: int = option(500, "save last.pth every so many steps (default: 500), or 5 minutes")
    keep_every: int = option(0, "keep a checkpoint of every so many steps as step-N.pth")


# May change when a run is resumed; everything else is what the run is.
FREE = {"resume", "data", "data_root", "device", "workers", "epochs", "steps", "eval_every", "lr",
        "lr_backbone", "micro_batch", "save_steps", "clip_norm", "keep_every",
        "checkpoint_activations"}
LAST = ("last.pth", "last.prev.pth")  # a run's newest checkpoint, and the one before it


def add_field(parser, f):
    """A field of Options, Config or Recipe as an option of an argparse parser or group."""
    flags = ["--" + f.name.replace("_", "-")] + ["--queries"] * (f.name == "num_queries")
    words = f.metadata["choices"] or None
    kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
        type=f.type, choices=words, metavar=None if words else f.type.__name__.upper())
    parser.add_argument(*flags, help=f.metadata["help"], **kind)


def parse(argv, description):
    """train.py's command line as a dict of what was given; the defaults are `settle`'s."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder; what may "
                        "change: " + ", ".join(sorted(FREE - {"resume"})))
    for table, title in ((Options, "the run"), (Config, "the model (defaults: the variant's)"),
                         (Recipe, "the recipe (defaults: the variant's or the preset's)")):
        group = parser.add_argument_group(title)
        for f in fields(table):
            if f.name != "num_classes":  # which follows from the data
                add_field(group, f)
    return vars(parser.parse_args(argv))


def settle(given):
    """A new run (options, cfg, recipe) of what was given; ConfigError where that contradicts.
    Precedence: the command line, the checkpoint of --weights, the preset, the published row."""
    options, in_cfg, in_recipe = ({f.name: given[f.name] for f in fields(t) if f.name in given}
                                  for t in (Options, Config, Recipe))
    toy, changes = given.get("data", "toy") == "toy", {}
    options = asdict(Options()) | {"workers": 0 if toy else 2} | options
    if options["weights"]:
        _, meta = load_checkpoint(options["weights"])
        for name in ("variant", "preset", "backbone_weights"):
            if name in given and given[name] != meta.get(name):
                raise ConfigError(f"--weights {options['weights']} has its own {name}: omit yours")
        options |= {"variant": meta["variant"], "preset": "checkpoint",
                    "known": dict(zip(meta["category_ids"], meta["classes"]))}
        row, recipe = Config(**meta["config"]), Recipe(**meta["recipe"])
        if not toy and meta["classes"] == [*data.OUTLINES]:  # toy pictures' size suits no images
            recipe = recipe.but(**variants.SMALL_RECIPE, crop=True)
        recipe = recipe.but(**variants.FINE_TUNE_RECIPE)
    else:
        options["preset"] = options["preset"] or (
            "published" if options["data"] == "coco" else "small")
        row, recipe = variants.variant(options["variant"]), variants.recipe(options["variant"])
        if options["preset"] == "small":
            asked = row.but(**in_cfg)
            changes = {k: v for k, v in variants.small(asked).items()
                       if not variants.idle([k], asked)}
            changes |= {"backbone": "resnet50"} if asked.dilation else {}  # a resnet18 cannot
            recipe = recipe.but(**(variants.TOY_RECIPE if toy else variants.SMALL_RECIPE) | (
                {} if recipe.max_size else {"max_size": 0}))  # squares stay squares
        if in_recipe.get("backbone_weights", recipe.backbone_weights) == "none":
            changes["backbone_norm"] = "batch"  # frozen random statistics learn nothing
    if options["overfit"]:
        ends = {"steps", "epochs"} & {*given}
        recipe = recipe.but(crop=False, **{} if ends else variants.OVERFIT_RECIPE)
    if in_recipe.get("image_size", 0) > 0:  # or the other limit would hold it back in silence
        scale = given["image_size"] / recipe.image_size
        recipe = recipe.but(max_size=round(recipe.max_size * scale))
    recipe, cfg = recipe.but(**in_recipe), row.but(**changes | in_cfg)
    if why := variants.idle(given, cfg):
        raise ConfigError(why)
    check(options, recipe)
    options["out"] = broadcast(free_folder(options))
    return options, cfg, recipe


def check(options, recipe):
    """Raise ConfigError for options of a run that cannot be."""
    if recipe.repeat_rare and options["data"] == "toy":
        raise ConfigError("--repeat-rare: toy shapes have no rare class: omit it")
    for name, least in dict(overfit=0, workers=0, keep_every=0, save_steps=1).items():
        if options[name] < least:
            option_ = "--" + name.replace("_", "-")
            raise ConfigError(f"{option_} {options[name]}: it must be at least {least}")
    if recipe.batch_size % world():
        raise ConfigError(f"--batch-size {recipe.batch_size}: choose a multiple of {world()}")


def free_folder(options):
    """--out, which must not hold a run; or out/<variant>-<data>, numbered where that is taken."""
    name = f"out/{options['variant']}-{Path(options['data']).name}"
    names = [name, *(f"{name}-{i}" for i in range(2, 10 ** 4))]
    out = options["out"] or next(name for name in names if not os.path.exists(name))
    if any((Path(out) / name).exists() for name in LAST):
        raise ConfigError(f"--out {out} already holds a run: --resume it, or choose another folder")
    return out


def resumed(given):
    """The stored (options, cfg, recipe, checkpoint) of --resume, changed where FREE allows it."""
    path, checkpoint = read_last(Path(given["resume"]))
    if "run" not in checkpoint:
        raise ConfigError(f"--resume {path}: no run to continue: start from it with --weights")
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
    options["out"], recipe = str(path.parent), Recipe().but(**recipe)
    check(options, recipe)
    return options, Config().but(**cfg), recipe, checkpoint


def describe(run):
    """Print what was chosen and what to expect of it; save it as run.json. run: train.py's Run."""
    options, recipe, cfg = run.options, run.recipe, run.model.cfg
    chosen = {"run": options, "config": asdict(cfg), "recipe": asdict(recipe)}
    (run.out / "run.json").write_text(json.dumps(chosen, indent=1))
    base = asdict(variants.variant(options["variant"]))
    changed = [f"{k}={v}" for k, v in chosen["config"].items() if v != base[k]]
    print(f"{options['variant']} ({options['preset']} size) on {options['device']}: "
          f"{sum(p.numel() for p in run.model.parameters()):,} parameters\n"
          f"train: {run.train_set.summary}\nval:   {run.val_set.summary}\n"
          f"{run.total:,} steps of {recipe.batch_size} images ({run.per_epoch:,} an epoch), "
          f"{run.step:,} done -> {run.out}\n"
          f"model, where it differs from the published one: {', '.join(changed) or '-'}\n"
          f"recipe: {', '.join(f'{k}={v}' for k, v in chosen['recipe'].items())}")
    side = recipe.image_size // (16 if cfg.dilation else 32)
    if cfg.attention == "dense" and side ** 2 < 64:
        print(f"expect little: DETR looks at C5 alone, here {side} x {side} tokens, and does not "
              "learn in so short a run: use --variant deformable")


# ================================================================================ the processes
#
# torchrun starts several. What they tell each other here goes between CPUs: no GPU waits for it.
# All must call `gather` and `broadcast` alike: if one process omits a call, the others hang.

def start():
    """Meet the other processes that torchrun started, if it did."""
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
        raise ConfigError(f"--device {name}: torch cannot use it ({str(error).splitlines()[0]}); "
                          "write --device cpu, or install a torch that fits your driver") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where code that names no GPU works
    return device


def gather(thing):
    """Any object of every process -> a list of them, on all."""
    things = [thing] * world()
    if world() > 1:
        dist.all_gather_object(things, thing)
    return things


def broadcast(thing):
    """Process 0's object, on all."""
    return gather(thing)[0]


@contextlib.contextmanager
def catch_signals():
    """Let Ctrl-C and SIGTERM wait for the step, evaluation or save in progress; a second signal
    stops immediately. Yields: did one come, to any process?"""
    came = []

    def note(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda: any(gather(bool(came)))
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
        kept = path.with_suffix(".kept")  # renamed whole, whenever this process is killed
        kept.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        kept.replace(path)


def append_log(path, **line):
    """Write a line of numbers to a log, as a JSON object."""
    with open(path, "a") as file:
        file.write(json.dumps({k: round(v, 6) for k, v in line.items()}) + "\n")


def means(steps, batch_size, device):
    """What the log says of some steps, a list of dicts: their means (losses: summed over processes,
    which all must call this), speed and peak memory."""
    line = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    shares = gather(line)
    line |= {k: sum(share[k] for share in shares) for k in line if k.startswith("loss")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # bytes
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    spent = line["seconds_data"] + line["seconds_step"]
    return line | dict(images_per_s=batch_size / spent, memory_mb=peak / 2 ** 20)
