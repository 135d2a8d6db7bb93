"""From a command line to a whole run: what was asked for, what follows from it, and what cannot be.

`parse` reads train.py's command line, `settle` makes a new run of it, `resumed` goes on with a stored one. A run is (run,
cfg, recipe): a dict of the options outside both tables of variants.py, and the two tables' rows. `parse_eval` reads eval.py's.
"""
import argparse
import json
import os
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import torch

import diffusion
import distributed
import toy
import variants
import weights
from variants import Config, ConfigError, Recipe

# May change when a run is resumed; everything else is what the run is.
FREE = {"resume", "device", "workers", "data_root", "epochs", "steps", "eval_every", "micro_batch", "save_steps", "lr",
        "lr_backbone", "clip_norm", "keep_every", "checkpoint_activations"}


# The fields of Config that are easily given to a variant that does not read them: (fields, (the field that decides, its
# values under which they are read), a variant where it has one of these).
READ_ONLY_WITH = [
    (("timesteps", "schedule", "noise", "signal_scale", "evaluations", "eta", "renewal", "survivors", "time", "sampler",
      "ensemble_nms"), ("queries", ("noise",)), "diffu"),
    (("dn_queries",), ("denoising", ("cdn",)), "dino"),
    (("dn_groups",), ("denoising", ("dn",)), "dn"),
    (("label_noise", "box_noise"), ("denoising", ("dn", "cdn")), "dino"),
    (("points",), ("attention", ("deformable",)), "deformable"),
    (("no_object",), ("class_loss", ("ce",)), "detr"),
    (("lr_points", "logit_eps"), ("attention", ("deformable",)), "deformable"),
    (("proposal_score", "proposal_labels", "proposal_loss"), ("two_stage", (True,)), "dino"),
    (("weight_class_dn",), ("denoising", ("dn", "cdn")), "dino"),
    (("eta",), ("sampler", ("ddim",)), "diffu"),
    (("eta", "renewal", "survivors", "sampler", "ensemble_nms"), ("evaluations", range(2, 10 ** 9)), "diffu"),
]
# How a diffusion model is sampled: may be chosen anew for a trained one.
SAMPLING = ("evaluations", "eta", "renewal", "survivors", "sampler", "ensemble_nms")


def add_field(parser, f):
    """A field of Config or Recipe as an option."""
    flag = "--" + f.name.replace("_", "-")
    if f.type is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=f.metadata["help"])
    elif f.name == "queries":
        parser.add_argument(flag, metavar="SOURCE|N", help=f.metadata["help"] + "; a number sets --num-queries")
    else:
        parser.add_argument(flag, type=f.type, choices=f.metadata["choices"], help=f.metadata["help"],
                            metavar=None if f.metadata["choices"] else f.type.__name__.upper())


def idle(names, cfg):
    """Of these options, the first that this model does not read, with the reason; None if it reads all."""
    for affected, (field, values), example in READ_ONLY_WITH:
        for name in names:
            if name in affected and getattr(cfg, field) not in values:
                words = "" if values == (True,) else " 2 or more" if type(values) is range else f" {' or '.join(values)}"
                condition = f"--{field.replace('_', '-')}{words}"
                return (f"--{name.replace('_', '-')} is read only with {condition}, as in --variant {example}: leave it "
                        "away, or write that too")
    return None


def parse(argv, description):
    """The command line as a dict of what was given; defaults are `settle`'s."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS)
    run = parser.add_argument_group("the run")
    run.add_argument("--variant", metavar="V", help="one of " + ", ".join(variants.VARIANTS) + " (default: diffu)")
    run.add_argument("--data", help="toy, coco, or a folder in COCO's layout (default: toy)")
    run.add_argument("--data-root", help="where COCO is (default: $COCO_ROOT, else data/coco)")
    run.add_argument("--preset", choices=("published", "small"), help="the paper's size and recipe (default on coco), or "
                     "one that learns from scratch on a CPU (default on other data)")
    run.add_argument("--out", help="the run's folder (default: out/<variant>-<data>)")
    run.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    run.add_argument("--weights", metavar="FILE", help="start from this checkpoint, published or ours (fine-tuning)")
    run.add_argument("--overfit", type=int, metavar="N", help="train and evaluate on the first N training photos, "
                     "without augmentation")
    run.add_argument("--freeze", help="comma-separated parts that are not trained, e.g. backbone,encoder")
    run.add_argument("--seed", type=int, help="of weights, data order, augmentation and noise (default: 0)")
    run.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    run.add_argument("--workers", type=int, help="processes that read photos (default: 2, for toy 0)")
    run.add_argument("--amp", choices=("none", "bf16", "fp16"), help="autocast to bf16, or to fp16 with scaled losses; "
                     "boxes stay float32 (default: none)")
    run.add_argument("--checkpoint-activations", action="store_true", help="compute each transformer layer again in the "
                     "backward pass instead of keeping its activations: less memory, a fifth more time")
    run.add_argument("--save-steps", type=int, help="save last.pth every so many steps (default: 500), or 5 minutes")
    run.add_argument("--keep-every", type=int, metavar="N", help="keep a checkpoint of every so many steps as step-N.pth")
    for title, table in (("the model (Config; defaults are the variant's)", Config),
                         ("the recipe (Recipe; defaults are the variant's or the preset's)", Recipe)):
        group = parser.add_argument_group(title)
        for f in fields(table):
            if f.name == "num_classes":                                                       # follows from the data
                continue
            add_field(group, f)
    given = vars(parser.parse_args(argv))
    if given.get("queries", "").isdigit():
        if "num_queries" in given:
            parser.error("--queries N and --num-queries N are the same: give one")
        given["num_queries"] = int(given.pop("queries"))
    if "steps" in given and "epochs" in given:
        parser.error("--steps and --epochs both say when to stop: give one")
    return given


def settle(given):
    """From what was given to a whole run: (run, cfg, recipe), where run holds the options outside both tables.

    Precedence: the command line, then the checkpoint of --weights, then the preset, then the variant's published row.
    Raises ConfigError on contradictions.
    """
    run = dict(variant="diffu", data="toy", data_root=None, preset=None, out=None, weights=None, overfit=0, freeze="",
               seed=0, device="cuda" if torch.cuda.is_available() else "cpu", workers=None, amp="none", save_steps=500,
               keep_every=0, checkpoint_activations=False)
    run |= {k: v for k, v in given.items() if k in run}
    run["workers"] = run["workers"] if run["workers"] is not None else 2 * (run["data"] != "toy")
    if run["weights"]:
        _, meta = weights.load_checkpoint(run["weights"])
        for name, why in (("variant", f"which is {meta['variant']}"), ("preset", "which has its own"),
                          ("backbone_weights", "which brings the backbone along")):
            if given.get(name) not in (None, meta.get(name)):
                raise ConfigError(f"--{name.replace('_', '-')} {given[name]} contradicts --weights {run['weights']}, "
                                  f"{why}: leave it away")
        known = dict(zip(meta["category_ids"], meta["classes"]))
        run |= {"variant": meta["variant"], "preset": "checkpoint", "known": known}
        row, changes = Config(**meta["config"]), {}
        recipe = Recipe(**meta["recipe"]).but(**variants.FINE_TUNE_RECIPE)
        if run["data"] != "toy":
            recipe = recipe.but(crop=True)                                    # off in a run on toy pictures or --overfit
            if meta["classes"] == [*toy.OUTLINES]:                            # toy pictures' size does not suit photos
                recipe = recipe.but(**{k: variants.SMALL_RECIPE[k] for k in ("image_size", "max_size")})
    else:
        run["preset"] = run["preset"] or ("published" if run["data"] == "coco" else "small")
        row, changes, recipe = variants.variant(run["variant"]), {}, variants.recipe(run["variant"])
        if run["preset"] == "small":
            asked = row.but(**{f.name: given[f.name] for f in fields(Config) if f.name in given})
            changes |= {k: v for k, v in variants.SMALL.items() if not idle([k], asked)}
            changes |= {"backbone": "resnet50"} if asked.dilation else {}                      # which a resnet18 cannot
            recipe = recipe.but(**(variants.TOY_RECIPE if run["data"] == "toy" else variants.SMALL_RECIPE))
        if given.get("backbone_weights", recipe.backbone_weights) == "none":
            changes["backbone_norm"] = "batch"                        # frozen random statistics learn nothing
    if run["overfit"]:
        if given.get("crop"):
            raise ConfigError("--overfit learns photos as they are, never cropped or flipped: leave --crop away")
        recipe = recipe.but(crop=False, **({} if {"steps", "epochs"} & set(given) else variants.OVERFIT_RECIPE))
    if "image_size" in given:                                         # or the other cap would hold it back in silence
        variants.at_least(argparse.Namespace(**given), 1, "image_size")
        recipe = recipe.but(max_size=round(given["image_size"] * recipe.max_size / recipe.image_size))
    recipe = recipe.but(**{f.name: given[f.name] for f in fields(Recipe) if f.name in given})
    cfg = row.but(**(changes | {f.name: given[f.name] for f in fields(Config) if f.name in given}))
    if why := idle(given, cfg):
        raise ConfigError(why)
    check(run, recipe)
    return run, cfg, recipe


def check(run, recipe):
    """Raise ConfigError for options of the run that cannot be."""
    if run["data_root"] and run["data"] != "coco":
        raise ConfigError("--data-root says where COCO is: write --data coco, or --data DIR alone")
    if recipe.repeat_rare and run["data"] == "toy":
        raise ConfigError("--repeat-rare: toy shapes have no rare class: leave it away")
    for name, least in (("overfit", 0), ("workers", 0), ("save_steps", 1), ("keep_every", 0)):
        if run[name] < least:
            raise ConfigError(f"--{name.replace('_', '-')} {run[name]}: it must be at least {least}")
    if recipe.batch_size % distributed.world():
        raise ConfigError(f"--batch-size {recipe.batch_size} is of all processes together, and {distributed.world()} "
                          "cannot share it: choose a multiple")
    if distributed.own_device(run["device"]).type == "cpu" and run["amp"] == "fp16":
        warnings.warn("--amp fp16 on a CPU is very slow: --amp bf16 or none is faster", stacklevel=2)


def resumed(given):
    """The stored run, cfg, recipe and checkpoint of --resume, with the given options that may change."""
    if given.get("weights"):
        raise ConfigError("--resume continues a run and --weights starts one: choose one")
    path, checkpoint = weights.read_last(Path(given["resume"]))
    if checkpoint.get("format") != "minDETR" or "run" not in checkpoint:
        raise ConfigError(f"--resume {path}: it holds a model but no run (best.pth and published files do not): resume "
                          "last.pth, or start from it with --weights")
    run, cfg, recipe = checkpoint["run"], checkpoint["config"], checkpoint["recipe"]
    run = dict(keep_every=0, checkpoint_activations=False) | run
    for name, value in given.items():
        table = next((t for t in (run, cfg, recipe) if name in t), {})
        if name not in FREE and table.get(name) != value:
            raise ConfigError(f"--{name.replace('_', '-')} {value} contradicts the run in {path}, which has "
                              f"{table.get(name)}: leave it away, or start a new run")
        table[name] = value
    if "epochs" in given:
        recipe["steps"] = 0                                         # or it would still win over --epochs
    run["out"], recipe = str(path.parent), Recipe(**recipe)
    check(run, recipe)
    return run, Config(**cfg), recipe, checkpoint


def free_folder(run):
    """out/<variant>-<data>, with a number if that is taken; a folder named by --out must not hold a run already."""
    if run["out"]:
        if any((Path(run["out"]) / name).exists() for name in ("last.pth", "last.prev.pth")):
            raise ConfigError(f"--out {run['out']} already holds a run: --resume it, or choose another folder")
        return run["out"]
    name = f"out/{run['variant']}-{Path(run['data']).name}"
    return next(p for p in [name, *(f"{name}-{i}" for i in range(2, 10 ** 6))] if not os.path.exists(p))


def describe(run, cfg, recipe, model, train_set, val_set, per_epoch, total, out):
    """Print what was chosen, and save it as run.json."""
    size, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or not only) for only in (0, 1))
    print(f"{run['variant']} ({run['preset']} size): {size:,} parameters, {trained:,} trained, on {run['device']}")
    part = f"; the first {min(run['overfit'], len(train_set))} photos are used" if run["overfit"] else ""
    print(f"train: {train_set.summary}{part}\nval:   {val_set.summary}{part}")
    print(f"{total:,} steps of {recipe.batch_size} photos ({per_epoch:,} an epoch) -> {out}")
    base = variants.variant(run["variant"])
    differs = {k: v for k, v in asdict(cfg).items() if v != getattr(base, k)}
    print("model, where it differs from the published one: " + (", ".join(f"{k}={v}" for k, v in differs.items()) or "-"))
    if cfg.queries == "noise":
        print(f"diffusion: T = {cfg.timesteps}, {cfg.schedule}, terminal signal-to-noise {diffusion.terminal_snr(cfg):.1e}")
    print("recipe: " + ", ".join(f"{k}={v}" for k, v in asdict(recipe).items()))
    (out / "run.json").write_text(json.dumps({"run": run, "config": asdict(cfg), "recipe": asdict(recipe)}, indent=1))


def parse_eval(argv):
    """eval.py's command line, as a namespace; `sampling` in it is a dict of the fields of SAMPLING that were given."""
    parser = argparse.ArgumentParser(description="Score a checkpoint on a data set, or find objects in photos.",
                                     allow_abbrev=False)
    parser.add_argument("--weights", type=Path, help="a checkpoint: of train.py, or a published one")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    parser.add_argument("--image-size", type=int, help="short side in pixels (default: the checkpoint's)")
    parser.add_argument("--max-size", type=int, help="long side at most (default: the checkpoint's, scaled as "
                        "--image-size is)")
    parser.add_argument("--out", type=Path, help="a folder, or a .json file for --data (default: beside the weights); or "
                        "--compare's picture (default: out/compare.png)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="score a data set: coco, toy, or a folder in COCO layout")
    what.add_argument("--images", nargs="+", help="find objects in photos, or in folders of photos")
    what.add_argument("--compare", nargs="+", metavar="RUN", help="draw the curves of these runs' folders together")
    images, scored = parser.add_argument_group("with --images"), parser.add_argument_group("with --data")
    images.add_argument("--score", type=float, help="leave out detections below this (default: 0.5)")
    images.add_argument("--trajectory", action="store_true", default=None, help="diffusion models: also draw every "
                        "evaluation, from noise to detections (.png and animated .webp)")
    scored.add_argument("--data-root", help="where COCO lies")
    scored.add_argument("--batch-size", type=int, help="images at a time (default: 4)")
    scored.add_argument("--workers", type=int, help="processes that load photos (default: 2)")
    scored.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    sampling = parser.add_argument_group("how a diffusion model is sampled (defaults are the checkpoint's)")
    for f in fields(Config):
        if f.name in SAMPLING:
            add_field(sampling, f)
    args = parser.parse_args(argv)
    for name, least in (("image_size", 1), ("max_size", 1), ("batch_size", 1), ("limit", 1), ("workers", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    for mode, names in (("images", ("score", "trajectory")), ("data", ("data_root", "batch_size", "workers", "limit"))):
        if idle := [name for name in names if getattr(args, name) is not None and not getattr(args, mode)]:
            parser.error(f"--{idle[0].replace('_', '-')} belongs to --{mode}")
    args.sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if args.compare:
        idle = [name for name in ("weights", "device", "image_size", "max_size", *SAMPLING) if getattr(args, name) is not None]
        if idle:
            parser.error(f"--compare reads logs alone: leave --{idle[0].replace('_', '-')} away")
    elif not args.weights:
        parser.error("--weights is missing: which checkpoint?")
    if args.images and args.out and args.out.suffix == ".json":
        parser.error(f"--out {args.out}: with --images it is a folder, for pictures and predictions.json")
    if args.score is not None and not 0 <= args.score <= 1:
        parser.error(f"--score {args.score:g}: scores are between 0 and 1")
    for name, value in dict(score=0.5, trajectory=False, batch_size=4, workers=2,
                            device="cuda" if torch.cuda.is_available() else "cpu").items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args
