"""Train a detector: the whole story, from top to bottom.

    python train.py                                            toy shapes, DiffuDETR, minutes on two CPU cores
    python train.py --variant dino --data coco                 the published recipe on COCO (data/coco or $COCO_ROOT)
    python train.py --variant dino --data my/boxes             any folder in COCO's layout, with its own classes
    python train.py --resume out/diffu-toy                     continue a run that was stopped

A run leaves in its folder: last.pth and best.pth, log.jsonl (one JSON object a line), curves.png, predictions.png and
run.json (all that was chosen). Read `main`, then `train`; the rest serves them.
"""
import argparse
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
import diffusion
import eval as evaluation
import pictures
import variants
import weights
from matcher import Criterion
from model import Detector
from variants import Config, ConfigError, Recipe

# May change when a run is resumed; everything else is what the run is.
FREE = {"resume", "device", "workers", "data_root", "epochs", "steps", "eval_every", "micro_batch", "save_steps", "lr",
        "lr_backbone", "clip_norm"}


# ========================================================================================================= the command

def parse(argv):
    """The command line as a dict of what was given, plus defaults of the run's own options under `options`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
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
    run.add_argument("--overfit", type=int, metavar="N", help="train and evaluate on the first N training photos")
    run.add_argument("--freeze", help="comma-separated parts that are not trained, e.g. backbone,encoder")
    run.add_argument("--seed", type=int, help="of weights, data order, augmentation and noise (default: 0)")
    run.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    run.add_argument("--workers", type=int, help="processes that read photos (default: 2, for toy 0)")
    run.add_argument("--amp", choices=("none", "bf16"), help="bf16: autocast; boxes stay float32 (default: none)")
    run.add_argument("--save-steps", type=int, help="save last.pth every so many steps (default: 500), or 5 minutes")
    for title, table in (("the model (Config; defaults are the variant's)", Config),
                         ("the recipe (Recipe; defaults are the variant's or the preset's)", Recipe)):
        group = parser.add_argument_group(title)
        for f in fields(table):
            if f.name == "num_classes":                                                       # follows from the data
                continue
            flag = "--" + f.name.replace("_", "-")
            if f.type in (bool, "bool"):
                group.add_argument(flag, action=argparse.BooleanOptionalAction, help=f.metadata["help"])
            elif f.name == "queries":
                group.add_argument(flag, metavar="SOURCE|N", help=f.metadata["help"] + "; a number sets --num-queries")
            else:
                group.add_argument(flag, type=f.type, choices=f.metadata["choices"], help=f.metadata["help"],
                                   metavar=None if f.metadata["choices"] else f.type.__name__.upper())
    given = vars(parser.parse_args(argv))
    if given.get("queries", "").isdigit():
        if "num_queries" in given:
            parser.error("--queries N and --num-queries N are the same: give one")
        given["num_queries"] = int(given.pop("queries"))
    return given


def settle(given):
    """From what was given to a whole run: (run, cfg, recipe), where run holds the options outside both tables.

    Precedence: the command line, then the checkpoint of --weights, then the preset, then the variant's published row.
    Raises ConfigError on contradictions.
    """
    run = dict(variant="diffu", data="toy", data_root=None, preset=None, out=None, weights=None, overfit=0, freeze="",
               seed=0, device="cuda" if torch.cuda.is_available() else "cpu", workers=None, amp="none", save_steps=500)
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
        if run["data"] != "toy" and not recipe.crop:                       # toy pictures' size does not suit photos
            recipe = recipe.but(crop=True, **{k: variants.SMALL_RECIPE[k] for k in ("image_size", "max_size")})
    else:
        run["preset"] = run["preset"] or ("published" if run["data"] == "coco" else "small")
        row, changes, recipe = variants.variant(run["variant"]), {}, variants.recipe(run["variant"])
        if run["preset"] == "small":
            changes |= variants.SMALL | ({"backbone": "resnet50"} if row.dilation else {})   # which a resnet18 cannot
            recipe = recipe.but(**(variants.TOY_RECIPE if run["data"] == "toy" else variants.SMALL_RECIPE))
        if given.get("backbone_weights", recipe.backbone_weights) == "none":
            changes["backbone_norm"] = "batch"                        # frozen random statistics learn nothing
    if run["overfit"] and not {"steps", "epochs"} & set(given):
        recipe = recipe.but(**variants.OVERFIT_RECIPE)
    if "image_size" in given:                                         # or the other cap would hold it back in silence
        recipe = recipe.but(max_size=round(given["image_size"] * recipe.max_size / recipe.image_size))
    recipe = recipe.but(**{f.name: given[f.name] for f in fields(Recipe) if f.name in given})
    cfg = row.but(**(changes | {f.name: given[f.name] for f in fields(Config) if f.name in given}))
    check(run)
    return run, cfg, recipe


def check(run):
    """Raise ConfigError for options of the run that cannot be."""
    if run["data_root"] and run["data"] != "coco":
        raise ConfigError("--data-root says where COCO is: write --data coco, or --data DIR alone")
    for name, least in (("overfit", 0), ("workers", 0), ("save_steps", 1)):
        if run[name] < least:
            raise ConfigError(f"--{name.replace('_', '-')} {run[name]}: it must be at least {least}")
    evaluation.device_named(run["device"])


def resumed(given):
    """The stored run, cfg, recipe and checkpoint of --resume, with the given options that may change."""
    folder = Path(given["resume"])
    path = folder if folder.is_file() else folder / "last.pth"
    if given.get("weights"):
        raise ConfigError("--resume continues a run and --weights starts one: choose one")
    if not path.exists():
        raise ConfigError(f"--resume {given['resume']}: there is no {path}; a run saves it every --save-steps")
    checkpoint = weights.read_checkpoint(path)
    if checkpoint.get("format") != "minDETR" or "run" not in checkpoint:
        raise ConfigError(f"--resume {path}: it holds a model but no run (best.pth and published files do not): resume "
                          "last.pth, or start from it with --weights")
    run, cfg, recipe = checkpoint["run"], checkpoint["config"], checkpoint["recipe"]
    for name, value in given.items():
        table = next((t for t in (run, cfg, recipe) if name in t), {})
        if name not in FREE and table.get(name) != value:
            raise ConfigError(f"--{name.replace('_', '-')} {value} contradicts the run in {path}, which has "
                              f"{table.get(name)}: leave it away, or start a new run")
        table[name] = value
    if "epochs" in given and "steps" not in given:
        recipe["steps"] = 0                                         # or it would still win over --epochs
    run["out"] = str(path.parent)
    check(run)
    return run, Config(**cfg), Recipe(**recipe), checkpoint


# ====================================================================================================== what it trains

def parameter_groups(model, recipe):
    """AdamW's groups: the backbone and the sampling points have rates of their own (Deformable DETR, section 5)."""
    kinds = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.BatchNorm2d)
    norms = {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
    groups = {}                                  # by role, not by rate: a resumed run may have another rate
    for name, p in model.named_parameters():
        rate = recipe.lr_backbone if name.startswith("backbone.") else recipe.lr
        points = "sampling_offsets" in name or "reference_points" in name
        decay = recipe.weight_decay if recipe.decay_norms or id(p) not in norms else 0.0
        group = {"params": [], "lr": recipe.lr * recipe.lr_points if points else rate, "weight_decay": decay}
        if p.requires_grad:
            groups.setdefault((name.startswith("backbone."), points, id(p) in norms), group)["params"].append(p)
    return list(groups.values())


def rate_factor(step, total, recipe):
    """The rates' factor: a linear rise over `warmup`, or a tenth of the run if that is less; a tenth from `lr_drop` on."""
    rise = min(1.0, (step + 1) / max(1, min(recipe.warmup, total // 10)))
    return rise * (0.1 if step >= round(recipe.lr_drop * total) else 1.0)


def warm_ema(decay):
    """An exponential average whose decay rises to `decay`: early on, 0.999 would still be mostly the initial weights."""
    return lambda averages, values, n: get_ema_multi_avg_fn(min(decay, (1 + n.item()) / (10 + n.item())))(
        averages, values, n)


def freeze(model, names):
    """Stop training the named parts; returns them, to be kept in evaluation mode (their norms must not drift)."""
    parts, frozen = dict(model.named_children()), []
    for name in names:
        if name not in parts:
            raise ConfigError(f"--freeze {name}: this model has {', '.join(parts)}")
        frozen.append(parts[name].requires_grad_(False))
    return frozen


# ============================================================================================================ the story

def train(run, cfg, recipe, checkpoint=None):
    """Train from `checkpoint` (None: from the start) to the end, or until interrupted; returns the last metrics."""
    torch.manual_seed(run["seed"])
    device = torch.device(run["device"])

    # Data. Labels count the data's categories; a checkpoint's own label map is kept where it knows all of them.
    plain = data.eval_transform(recipe.image_size, recipe.max_size)
    augment = plain if run["overfit"] else data.train_transform(recipe.image_size, recipe.max_size, crop=recipe.crop)

    def opened(split, transform, category_ids):
        return data.open_data(run["data"], run["data_root"], split, transform, category_ids, recipe.image_size)

    known = run.get("known") or {}
    train_set = opened("train", augment, checkpoint["category_ids"] if checkpoint else None)
    classes = checkpoint["classes"] if checkpoint else train_set.classes
    same_classes = bool(known) and all(known.get(i) == n for i, n in zip(train_set.category_ids, classes))
    if same_classes and not checkpoint:
        train_set, classes = opened("train", augment, list(known)), list(known.values())
    val_set = opened("train" if run["overfit"] else "val", plain, train_set.category_ids)
    evaluation.same_names(val_set, classes, f"the training photos of {run['data']}")
    photos = min(run["overfit"] or len(train_set), len(train_set))

    # Model.
    if not checkpoint:
        cfg = cfg.but(num_classes=len(classes))
    model = Detector(cfg)
    if run["weights"] and not checkpoint:
        print(weights.fine_tune(model, run["weights"], same_classes))
    elif not checkpoint:
        weights.load_backbone(model, recipe.backbone_weights)
    frozen = freeze(model, filter(None, run["freeze"].split(",")))
    model.to(device)
    average = AveragedModel(model, multi_avg_fn=warm_ema(recipe.ema), use_buffers=True) if recipe.ema else None
    criterion = Criterion(cfg)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe))
    rates = [g["lr"] for g in optimizer.param_groups]

    # Where we are.
    per_epoch = len(data.BatchOrder(photos, recipe.batch_size, run["seed"], 0))
    total = recipe.steps or recipe.epochs * per_epoch
    step, best, tested, saved = 0, -1.0, 0, time.time()
    out = Path(run["out"])
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if average:
            average.load_state_dict(checkpoint["average"])
        step, best, tested = checkpoint["step"], checkpoint["best"], checkpoint["tested"]
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], device)
    out.mkdir(parents=True, exist_ok=True)
    describe(run, cfg, recipe, model, train_set, val_set, per_epoch, total, out)
    log = open_log(out / "log.jsonl", step)

    def save(name, whole=True):
        """Write a checkpoint; `whole` ones can be resumed."""
        nonlocal saved
        saved = time.time()
        content = {"format": "minDETR", "variant": run["variant"], "config": asdict(cfg), "recipe": asdict(recipe),
                   "classes": classes, "category_ids": train_set.category_ids, "step": step,
                   "model": model.state_dict(), "ema": average.module.state_dict() if average else None}
        if whole:
            content |= {"run": run, "optimizer": optimizer.state_dict(), "best": best, "tested": tested,
                        "rng": torch.get_rng_state(), "average": average.state_dict() if average else None,
                        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}
        weights.save(out / name, content)

    def test():
        """Evaluate, and keep what is worth keeping. The average of the weights is what counts, where there is one."""
        nonlocal best, tested
        started, model_now = time.time(), average.module if average else model
        with torch.autocast(device.type, torch.bfloat16, enabled=run["amp"] == "bf16"):
            metrics, _ = evaluation.evaluate(model_now, val_set, batch_size=recipe.micro_batch, device=device,
                                             workers=run["workers"], limit=run["overfit"] or None)
        log.write(json.dumps({"step": step, "epoch": step // per_epoch, "seconds": round(time.time() - started, 1),
                              **{k: round(v, 5) for k, v in metrics.items()}}) + "\n")
        bar.write(f"step {step}: AP {metrics['AP']:.3f} AP50 {metrics['AP50']:.3f}")
        if metrics["AP"] > best or not (out / "best.pth").exists():
            best = metrics["AP"]
            save("best.pth", whole=False)
            evaluation.picture_grid(model_now, val_set, out / "predictions.png", score=0.3)
        tested = step
        save("last.pth")
        pictures.plot_curves(out / "log.jsonl", out / "curves.png")
        return metrics

    def due():
        """Whether this step's weights are to be tested: at the end of every `eval_every`th epoch and of the run."""
        return step > tested and (step >= total or step % (per_epoch * recipe.eval_every) == 0)

    interrupted, restore_signals = catch_signals()
    bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, disable=None)
    metrics = test() if due() else {}                                   # a run that died in its evaluation catches up
    while step < total:
        epoch, clock, seen = step // per_epoch, time.time(), 0
        order = data.BatchOrder(photos, recipe.batch_size, run["seed"], epoch, start=step % per_epoch)
        model.train()
        for part in frozen:
            part.eval()
        for batch in steps_of(train_set, order, recipe.micro_batch, run["workers"], device):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * rate_factor(step, total, recipe)
            try:
                losses = forward_backward(model, criterion, batch, device, run["amp"])
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm or math.inf)
                if not math.isfinite(losses["total"]) or not math.isfinite(norm):
                    raise FloatingPointError(f"the loss is {losses['total']}, the gradient's norm {norm}")
            except FloatingPointError as error:
                ids = [t["image_id"] for _, _, targets in batch for t in targets]
                where = f"; the last good state is in {out / 'last.pth'}" if (out / "last.pth").exists() else ""
                raise FloatingPointError(f"step {step}, image ids {ids}: {error}{where}. Look at these images' boxes, or "
                                         "try a lower --lr") from None
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average:
                average.update_parameters(model)
            step += 1
            seen += recipe.batch_size
            bar.update()
            if step % 10 == 0 or step == total:
                speed = seen / (time.time() - clock)
                clock, seen = time.time(), 0
                lr = max(g["lr"] for g in optimizer.param_groups)
                bar.set_postfix_str(f"loss {losses['total']:.3f} lr {lr:.1e} {speed:.1f} images/s")
                if bar.disable and step % 50 == 0:                                           # not a terminal
                    print(f"step {step}/{total}: loss {losses['total']:.3f}, {speed:.1f} images/s", flush=True)
                line = {"step": step, "epoch": epoch, "lr": lr, "loss": losses.pop("total"), **losses,
                        "grad_norm": float(norm), "images_per_s": speed, "memory_mb": memory(device)}
                log.write(json.dumps({k: round(v, 6) for k, v in line.items()}) + "\n")
            if interrupted():
                save("last.pth")
                bar.close()
                restore_signals()
                print(f"stopped at step {step}; continue with: python train.py --resume {out}")
                return metrics
            if step == total or step % run["save_steps"] == 0 or time.time() - saved > 300:
                save("last.pth")
            if step == total:
                break
        if due():
            metrics = test()
    restore_signals()
    bar.close()
    print(f"done at step {step}: best AP {best:.3f}; checkpoints, log, curves and predictions are in {out}")
    return metrics


def steps_of(dataset, order, micro, workers, device):
    """The photos of one step at a time: a list of micro-batches (images, mask, targets), each padded on its own."""
    chunks = [[batch[i:i + micro] for i in range(0, len(batch), micro)] for batch in order]
    batches = iter(data.loader(dataset, [c for step in chunks for c in step], workers, device))
    for step in chunks:
        yield [next(batches) for _ in step]


def forward_backward(model, criterion, batch, device, amp):
    """Add up the gradients of one step, micro-batch by micro-batch; returns the step's losses as floats."""
    everything = [t for _, _, targets in batch for t in targets]
    total = {}
    for images, mask, targets in batch:
        images, mask = images.to(device, non_blocking=True), mask.to(device, non_blocking=True)
        targets = [{k: t[k].to(device, non_blocking=True) for k in ("labels", "boxes")} for t in targets]
        with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
            outputs = model(images, mask, targets)
        losses = criterion(outputs, targets, step_targets=everything)
        losses["total"].backward()
        for name, value in losses.items():
            total[name] = total.get(name, 0) + value.detach()
    return dict(zip(total, torch.stack(list(total.values())).tolist()))


def memory(device):
    """Peak memory so far in MB: the GPU's, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource
    except ImportError:                                                                              # not on Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def catch_signals():
    """Let Ctrl-C and SIGTERM wait for the step in progress; a second one stops at once.

    Returns a function that says whether one came, and one that puts the old handlers back.
    """
    came = []

    def note(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)

    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    return lambda: bool(came), lambda: [signal.signal(s, handler) for s, handler in old.items()]


def open_log(path, step):
    """log.jsonl, to be appended to; lines after `step`, of a run that died after its last checkpoint, are dropped."""
    if path.exists():
        lines = path.read_text().splitlines()
        path.write_text("".join(f"{line}\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= step))
    return open(path, "a", buffering=1)


def describe(run, cfg, recipe, model, train_set, val_set, per_epoch, total, out):
    """Print what was chosen, and save it as run.json."""
    size, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or not only) for only in (0, 1))
    print(f"{run['variant']} ({run['preset']} size): {size:,} parameters, {trained:,} trained, on {run['device']}")
    print(f"train: {train_set.summary}\nval:   {val_set.summary}")
    print(f"{total:,} steps of {recipe.batch_size} photos ({per_epoch:,} an epoch) -> {out}")
    base = variants.variant(run["variant"])
    differs = {f.name: getattr(cfg, f.name) for f in fields(Config) if getattr(cfg, f.name) != getattr(base, f.name)}
    print("model, where it differs from the published one: " + (", ".join(f"{k}={v}" for k, v in differs.items()) or "-"))
    if cfg.queries == "noise":
        print(f"diffusion: T = {cfg.timesteps}, {cfg.schedule}, terminal signal-to-noise {diffusion.terminal_snr(cfg):.1e}")
    print("recipe: " + ", ".join(f"{k}={v}" for k, v in asdict(recipe).items()))
    (out / "run.json").write_text(json.dumps({"run": run, "config": asdict(cfg), "recipe": asdict(recipe)}, indent=1))


def free_folder(run):
    """out/<variant>-<data>, with a number if that is taken; a folder named by --out must not hold a run already."""
    if run["out"]:
        if (Path(run["out"]) / "last.pth").exists():
            raise ConfigError(f"--out {run['out']} already holds a run: --resume it, or choose another folder")
        return run["out"]
    name = f"out/{run['variant']}-{Path(run['data']).name}"
    return next(p for p in [name, *(f"{name}-{i}" for i in range(2, 10 ** 6))] if not os.path.exists(p))


def main(argv=None):
    """Returns the exit code: 0 done or stopped on request, 2 with one clear line when something is wrong."""
    try:
        given = parse(argv)
        if given.get("resume"):
            train(*resumed(given))
        else:
            run, cfg, recipe = settle(given)
            run["out"] = free_folder(run)
            train(run, cfg, recipe)
        return 0
    except (ConfigError, data.DataError, weights.WeightsError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
