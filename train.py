"""Train a detector: the whole story, from top to bottom.

    python train.py                                            toy shapes, DiffuDETR, minutes on two CPU cores
    python train.py --variant dino --data coco                 the published recipe on COCO (data/coco or $COCO_ROOT)
    python train.py --variant dino --data my/boxes             any folder in COCO's layout, with its own classes
    python train.py --resume out/diffu-toy                     continue a run that was stopped
    torchrun --nproc_per_node 4 train.py ...                   four processes share every step (four GPUs, say)

A run leaves in its folder: last.pth (and last.prev.pth, the one before) and best.pth, log.jsonl (one JSON object a
line), curves.png, predictions.png and run.json (all that was chosen). Read `main`, then `train`; the rest serves them.
"""
import contextlib
import json
import math
import random
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint as checkpointed
from tqdm import tqdm

import data
import distributed
import eval as evaluation
import options
import pictures
import weights
from matcher import Criterion
from model import Detector
from order import BatchOrder, repeat_factors
from variants import ConfigError

AMP = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def compute_again(model):
    """Let every transformer layer forget its activations, and compute them again in the backward pass (Chen 2016)."""
    for layer in [*model.encoder, *model.decoder]:
        layer.forward = partial(checkpointed, layer.forward, use_reentrant=False)


# ============================================================================================================ the story

def train(run, cfg, recipe, checkpoint=None):
    """Train from `checkpoint` (None: from the start) to the end, or until interrupted; returns the last metrics."""
    torch.manual_seed(run["seed"])
    device, first = distributed.own_device(run["device"]), distributed.rank() == 0
    autocast = partial(torch.autocast, device.type, AMP[run["amp"]], enabled=run["amp"] != "none")

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
    count = min(run["overfit"] or len(train_set), len(train_set))

    # Model.
    if not checkpoint:
        cfg = cfg.but(num_classes=len(classes))
    model = Detector(cfg)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    elif first and run["weights"]:                              # DistributedDataParallel hands process 0's weights to all
        print(weights.fine_tune(model, run["weights"], same_classes))
    elif first:
        weights.load_backbone(model, recipe.backbone_weights)
    frozen = freeze(model, filter(None, map(str.strip, run["freeze"].split(","))))
    model.to(device)
    parallel = model
    if distributed.world() > 1:
        parallel = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    average = AveragedModel(model, multi_avg_fn=warm_ema(recipe.ema), use_buffers=True) if recipe.ema else None
    if run["checkpoint_activations"]:
        compute_again(model)
    criterion = Criterion(cfg)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=run["amp"] == "fp16")
    rates = [g["lr"] for g in optimizer.param_groups]

    # Where we are.
    shapes = train_set.sizes[:, 0] / train_set.sizes[:, 1]
    factors = repeat_factors(train_set, recipe.repeat_rare)[:count] if recipe.repeat_rare else None
    order_of = partial(BatchOrder, count, recipe.batch_size, run["seed"], factors=factors, shapes=shapes,
                       buckets=recipe.buckets)
    per_epoch = len(order_of(0))
    total = recipe.steps or recipe.epochs * per_epoch
    step, best, tested, saved, wrote = 0, -1.0, 0, time.time(), False
    out = Path(run["out"])
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint.get("scaler", {}))
        if average:
            average.load_state_dict(checkpoint["average"])
        step, best, tested = checkpoint["step"], checkpoint["best"], checkpoint["tested"]
    if first:
        claim = weights.claim(out)                                       # held until this function returns
        options.describe(run, cfg, recipe, model, train_set, val_set, per_epoch, total, out)
        if checkpoint:
            print(f"resumed after step {step:,}")
        log = open_log(out / "log.jsonl", step)

    def save(name, whole=True):
        """Write a checkpoint; `whole` ones can be resumed."""
        nonlocal saved, wrote
        keep = name == "last.pth" and wrote                        # a last.pth that was there may be damaged: no successor
        if name == "last.pth":
            saved, wrote = time.time(), True
        if not first:
            return
        content = {"format": "minDETR", "variant": run["variant"], "config": asdict(cfg), "recipe": asdict(recipe),
                   "classes": classes, "category_ids": train_set.category_ids, "step": step,
                   "model": model.state_dict(), "ema": average.module.state_dict() if average else None}
        if whole:
            content |= {"run": run, "optimizer": optimizer.state_dict(), "best": best, "tested": tested,
                        "scaler": scaler.state_dict(), "average": average.state_dict() if average else None}
        weights.save(out / name, content, keep_previous=keep)

    def test():
        """Evaluate, and keep what is worth keeping. The average of the weights is what counts, where there is one."""
        nonlocal best, tested
        save("last.pth")                                             # an evaluation may take long, or fail
        started, model_now, limit = time.time(), average.module if average else model, run["overfit"] or None
        distributed.share_buffers(model_now)                         # evaluation is shared, and process 0's are saved
        with autocast():
            metrics, _ = evaluation.evaluate(model_now, val_set, batch_size=recipe.micro_batch, device=device,
                                             workers=run["workers"], limit=limit, progress=first)
        tested = step
        if first:
            log.write(json.dumps({"step": step, "epoch": step // per_epoch, "seconds": round(time.time() - started, 1),
                                  **{k: round(v, 5) for k, v in metrics.items()}}) + "\n")
            bar.write(f"step {step}: AP {metrics['AP']:.3f} AP50 {metrics['AP50']:.3f}")
            if metrics["AP"] > best or not (out / "best.pth").exists():
                best = metrics["AP"]
                save("best.pth", whole=False)
                evaluation.picture_grid(model_now, val_set, out / "predictions.png", score=0.3, limit=limit)
            save("last.pth")
            pictures.plot_curves(out / "log.jsonl", out / "curves.png")
        return metrics

    def due():
        """Whether this step's weights are to be tested: at the end of every `eval_every`th epoch and of the run."""
        return step > tested and (step >= total or step % (per_epoch * recipe.eval_every) == 0)

    def photos(order):
        """This process's share of every step. When a photo or a worker fails, what was learned until then is kept."""
        try:
            yield from steps_of(train_set, order, recipe.micro_batch, run["workers"], device)
        except data.DataError as error:
            save("last.pth")
            raise data.DataError(f"{error} The {step} steps until then are saved: python train.py --resume {out}") from None

    interrupted, restore_signals = distributed.catch_signals()
    bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, disable=None if first else True)
    seconds, lap = stopwatch()
    metrics = test() if due() else {}                                   # a run that died in its evaluation catches up
    while step < total:
        epoch, begun = step // per_epoch, step
        model.train()
        for part in frozen:
            part.eval()
        lap("between epochs")
        seconds.clear()
        for batch in photos(order_of(epoch, start=step % per_epoch)):
            lap("data")
            # Noise and dropout of a step come from its number and the process's: a resumed run draws what it would have.
            torch.manual_seed(random.Random(f"noise {run['seed']} {step} {distributed.rank()}").getrandbits(63))
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * rate_factor(step, total, recipe)
            try:
                losses = forward_backward(parallel, criterion, batch, device, autocast, scaler, lap)
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm or math.inf)
                # In fp16 gradients may overflow: such a step is left out and the scale halved, until it says no more.
                overflow = scaler.is_enabled() and scaler.get_scale() > 1
                if not math.isfinite(losses["total"]) or not (overflow or math.isfinite(norm)):
                    raise FloatingPointError(f"the loss is {losses['total']}, the gradient's norm {norm}")
            except FloatingPointError as error:
                ids = [t["image_id"] for _, _, targets in batch for t in targets]
                where = f"; the last good state is in {out / 'last.pth'}" if (out / "last.pth").exists() else ""
                raise FloatingPointError(f"step {step}, image ids {ids}: {error}{where}. Look at these images' boxes, or "
                                         "try a lower --lr") from None
            except RuntimeError as error:
                if distributed.left_alone(error):                         # another process could not go on: keep the steps
                    save("last.pth")
                raise
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if average:
                average.update_parameters(model)
            lap("update")
            step += 1
            bar.update()
            if step % 10 == 0 or step == total:
                losses, steps = distributed.sums(losses), step - begun
                speed = recipe.batch_size * steps / sum(seconds.values())
                lr = max(g["lr"] for g in optimizer.param_groups)
                bar.set_postfix_str(f"loss {losses['total']:.3f} lr {lr:.1e} {speed:.1f} images/s")
                if first and bar.disable and step % 50 == 0:                                 # not a terminal
                    print(f"step {step}/{total}: loss {losses['total']:.3f}, {speed:.1f} images/s", flush=True)
                line = {"step": step, "epoch": epoch, "lr": lr, "loss": losses.pop("total"), **losses,
                        "grad_norm": float(norm), "images_per_s": speed, "memory_mb": memory(device)}
                line |= {f"seconds_{name}": spent / steps for name, spent in seconds.items()}
                if first:
                    log.write(json.dumps({k: round(v, 6) for k, v in line.items()}) + "\n")
                begun = step
                seconds.clear()
            if run["keep_every"] and step % run["keep_every"] == 0:
                save(f"step-{step}.pth")
            if interrupted():
                save("last.pth")
                bar.close()
                restore_signals()
                if first:
                    print(f"stopped at step {step}; continue with: python train.py --resume {out}")
                return metrics
            if step % run["save_steps"] == 0 or time.time() - saved > 300:
                save("last.pth")
            lap("saving")
            if step == total:
                break
        if due():
            metrics = test()
    restore_signals()
    bar.close()
    if first:
        print(f"done at step {step}: best AP {best:.3f}; checkpoints, log, curves and predictions are in {out}")
    return metrics


def steps_of(dataset, order, micro, workers, device):
    """This process's photos of one step at a time: a list of micro-batches (images, mask, targets), each padded on its
    own. Processes take neighbours, which the order may have sorted by shape."""
    rank, world = distributed.rank(), distributed.world()
    shares = [batch[len(batch) * rank // world:len(batch) * (rank + 1) // world] for batch in order]
    chunks = [[share[i:i + micro] for i in range(0, len(share), micro)] for share in shares]
    batches = iter(data.loader(dataset, [c for step in chunks for c in step], workers, device))
    for step in chunks:
        yield [next(batches) for _ in step]


def forward_backward(model, criterion, batch, device, autocast, scaler, lap):
    """Add up the gradients of one step, micro-batch by micro-batch and over all processes.

    Returns the losses as floats: this process's share of the step's, which are the sums of all shares.
    """
    # The losses are divided by the step's number of boxes, wherever these are: a share depends on all other shares.
    counts = distributed.everyone([len(t["labels"]) for _, _, targets in batch for t in targets])
    total = {}
    for i, (images, mask, targets) in enumerate(batch, 1):
        images, mask = images.to(device, non_blocking=True), mask.to(device, non_blocking=True)
        targets = [{k: t[k].to(device, non_blocking=True) for k in ("labels", "boxes")} for t in targets]
        alone = i < len(batch) and isinstance(model, DistributedDataParallel)      # the last one brings the sum to all
        with model.no_sync() if alone else contextlib.nullcontext():
            with autocast():
                outputs = model(images, mask, targets)
            lap("forward")
            losses = criterion(outputs, targets, counts)
            lap("loss")
            scaler.scale(losses["total"] * distributed.world()).backward()   # DistributedDataParallel takes the mean
        for name, value in losses.items():
            total[name] = total.get(name, 0) + value.detach()
        lap("backward")
    return dict(zip(total, torch.stack(list(total.values())).tolist()))


def stopwatch():
    """({name: seconds}, lap), where lap(name) books the time since the last lap under a name.

    A GPU works on its own: its time is booked where the program next waits for it, mostly in the matching.
    """
    seconds, last = {}, time.perf_counter()

    def lap(name):
        nonlocal last
        now = time.perf_counter()
        seconds[name], last = seconds.get(name, 0) + now - last, now

    return seconds, lap


def memory(device):
    """Peak memory so far in MB: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource
    except ImportError:                                                                              # not on Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def open_log(path, step):
    """log.jsonl, to be appended to; lines after `step`, of a run that died after its last checkpoint, are dropped."""
    if path.exists():
        lines, kept = path.read_text().splitlines(), path.with_suffix(".kept")
        kept.write_text("".join(f"{line}\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= step))
        kept.replace(path)                                                        # whole, whenever this process is killed
    return open(path, "a", buffering=1)


def main(argv=None):
    """Returns the exit code: 0 done or stopped on request, 2 with one clear line when something is wrong."""
    try:
        given = options.parse(argv, __doc__)
        distributed.start()
        if given.get("resume"):
            run, *rest = options.resumed(given)
        else:
            run, *rest = options.settle(given)
            run["out"] = distributed.broadcast(options.free_folder(run))
        weights.check_folder(run["out"])
        train(run, *rest)
        distributed.stop()
        return 0
    except (ConfigError, data.DataError, weights.WeightsError, FloatingPointError, OSError) as error:
        process = f" (process {distributed.rank()})" if distributed.rank() else ""
        print(f"error{process}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not distributed.left_alone(error):
            raise
        print(f"process {distributed.rank()}: another process of this run has ended, see what it says", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
