"""Train a detector: the whole story, from top to bottom.

    python train.py                                 toy shapes, DiffuDETR, minutes on two CPU cores
    python train.py --variant dino --data coco      the published recipe (data/coco or $COCO_ROOT)
    python train.py --variant dino --data my/boxes  your own boxes, as a tool exported them (COCO)
    python train.py --resume out/diffu-toy          continue a run that was stopped
    torchrun --nproc_per_node 4 train.py ...        four processes share every step
"""
import math
import random
import re
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
import eval as evaluation
import matcher
import runs
import weights
from model import DecoderLayer, EncoderLayer, build_model
from variants import ConfigError


class Run:
    """A run's state, from what `runs.settle` or `runs.resumed` gives."""

    def __init__(self, options, cfg, recipe, checkpoint=None):
        if recipe.batch_size % runs.world():
            raise ConfigError(f"--batch-size {recipe.batch_size}: not a multiple of {runs.world()}")
        torch.manual_seed(options["seed"])
        self.options, self.recipe, self.out = options, recipe, Path(options["out"])
        self.device, self.first = runs.own_device(options["device"]), runs.rank() == 0
        speak = tqdm.write if sys.stderr.isatty() else print  # the first: above the bar
        self.say = speak if self.first else lambda text: None
        self.again = f"python train.py --resume {self.out}"
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options["amp"])
        self.autocast = partial(torch.autocast, self.device.type, half, half is not None)

        # Data. Labels count its categories; a checkpoint's are kept where it knows all of them.
        size, overfit = (recipe.image_size, recipe.max_size), options["overfit"]
        plain = data.eval_transform(*size)
        augment = plain if overfit else data.train_transform(
            *size, crop=recipe.crop, several=recipe.sizes == "image")
        opened = partial(data.open_data, options["data"], options["data_root"], image_size=size[0],
                         annotations=options["annotations"], seed=options["seed"],
                         share=None if overfit else options["val_share"], masks=cfg.masks)
        labels = checkpoint and dict(zip(checkpoint["category_ids"], checkpoint["classes"]))
        self.train_set = opened("train", augment, labels)
        labels = dict(zip(self.train_set.category_ids, self.train_set.classes))
        known = options.get("known") or {}
        same = known.items() >= labels.items()
        if same and not checkpoint:
            self.train_set, labels = opened("train", augment, known), known
        self.val_set = opened("train" if overfit else "val", plain, labels)
        count = min(overfit or len(self.train_set), len(self.train_set))
        rare = recipe.repeat_rare and data.repeat_factors(self.train_set, recipe.repeat_rare)
        self.order_of = partial(data.batch_order, count, recipe.batch_size, options["seed"],
                                factors=rare[:count] if recipe.repeat_rare else None)
        self.per_epoch = len(self.order_of(0))
        self.total = recipe.steps or recipe.epochs * self.per_epoch

        # Model. DistributedDataParallel hands process 0's weights to all.
        self.model = model = build_model(
            options["variant"], **asdict(cfg) | {"num_classes": len(labels)})
        model.checkpoint_activations = options["checkpoint_activations"]
        if self.first and options["weights"] and not checkpoint:
            print(weights.fine_tune(model, options["weights"], same))
        elif self.first and not checkpoint:
            weights.load_backbone(model, recipe.backbone_weights)
        parts, names = dict(model.named_children()), options["freeze"].replace(" ", "").split(",")
        if wrong := {*names} - {*parts, ""}:
            raise ConfigError(f"--freeze {wrong.pop()}: this model has {', '.join(parts)}")
        self.frozen = [parts[name].requires_grad_(False) for name in names if name]
        if options.get("masks_only"):  # the rest stays as it is, but with dropout, as published
            if not (same or checkpoint):
                raise ConfigError(f"--masks: the boxes of {options['weights']} are of other classes"
                                  ": fine-tune it on this data without --masks first")
            model.requires_grad_(False).mask_head.requires_grad_(True)
            self.frozen += [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        self.parallel = model.to(self.device)
        self.criterion = getattr(model, "criterion", None) or matcher.Criterion(model.cfg)
        if runs.world() > 1:
            self.parallel = DistributedDataParallel(model)
        self.average = AveragedModel(model, use_buffers=True) if recipe.ema else None
        self.evaluated = self.average.module if self.average else model
        for part in model.modules() if options["compile"] else ():
            if isinstance(part, (EncoderLayer, DecoderLayer)):
                part.compile()
        self.optimizer = torch.optim.AdamW(parameter_groups(model, recipe), fused=True)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options["amp"] == "fp16")

        self.step, self.best, self.tested = 0, -1.0, 0
        self.saved, self.wrote, self.log = time.time(), False, self.out / "log.jsonl"
        if checkpoint:
            self.step, self.best, self.tested = map(checkpoint.get, ("step", "best", "tested"))
            for name in ("model", "optimizer", "scaler"):
                getattr(self, name).load_state_dict(checkpoint[name])
            if self.average:
                self.evaluated.load_state_dict(checkpoint["ema"])
                self.average.n_averaged.fill_(self.step)
        if self.first:
            self.out.mkdir(parents=True, exist_ok=True)
            runs.cut_log(self.log, self.step)
            runs.describe(self)

    def save(self, name="last.pth"):
        """Write a checkpoint to be resumed; best.pth has nothing but what is evaluated."""
        last, whole = name == "last.pth", dict(
            run=self.options, best=self.best, tested=self.tested, model=self.model.state_dict(),
            ema=self.average and self.evaluated.state_dict(),
            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())
        if self.first:  # an earlier process's last.pth may be damaged: it is not kept
            runs.save(self.out / name, dict(
                format="minDETR", variant=self.options["variant"], step=self.step,
                config=asdict(self.model.cfg), recipe=asdict(self.recipe),
                category_ids=self.train_set.category_ids, classes=self.train_set.classes,
                held_out=self.val_set.names.tolist() if self.options["val_share"] else [],
                **dict(model=self.evaluated.state_dict()) if name == "best.pth" else whole),
                keep_previous=last and self.wrote)
        if last:
            self.saved, self.wrote = time.time(), True

    def test_if_due(self):
        """At the end of an `eval_every`th epoch and of the run: evaluate, and keep the best."""
        between = self.step < self.total and self.step % (self.per_epoch * self.recipe.eval_every)
        if self.step <= self.tested or between:
            return
        self.save()  # an evaluation may take long, or fail
        model, limit = self.evaluated, self.options["overfit"] or None
        for buffer in model.buffers() if runs.world() > 1 else ():  # batch norm's statistics are
            torch.distributed.broadcast(buffer, 0)  # each process's own; process 0's are saved
        with self.autocast():
            metrics, *_ = evaluation.evaluate(
                model, self.val_set, self.recipe.micro_batch, self.options["workers"], limit,
                progress=self.first)
        self.tested = self.step
        if not self.first:
            return
        runs.append_log(self.log, step=self.step, epoch=self.step // self.per_epoch, **metrics)
        self.say("step {}: ".format(self.step) + ", ".join(
            f"{k} {metrics[k]:.3f}" for k in metrics if re.search("(AP|AP50|PQ)$", k)))
        score = metrics.get("PQ", metrics.get("segm_AP", metrics["AP"]))  # masks', if there are any
        if score > self.best or not (self.out / "best.pth").exists():
            self.best = score
            self.save("best.pth")
            evaluation.picture_grid(model, self.val_set, self.out / "predictions.png",
                                    range(min(8, limit or 8, len(self.val_set))))
        self.save()
        evaluation.plot_curves(self.log, self.out / "curves.png")


# ==================================================================================== the story

def train(run):
    """Train to the end, or until a signal, whose number it returns (0: none)."""
    bar = runs.progress(None, "steps", run.total, run.first, initial=run.step, unit="step")
    steps = []  # since the log's last line
    with runs.catch_signals() as interrupted, bar:
        run.test_if_due()  # it may have died in its evaluation
        while run.step < run.total:
            epoch = run.step // run.per_epoch
            run.model.train()
            for part in run.frozen:
                part.eval()
            ended = time.perf_counter()  # what was between the epochs is not counted
            order = run.order_of(epoch, start=run.step % run.per_epoch)
            for batch in steps_of(run, order[:run.total - run.step]):
                started = time.perf_counter()
                # Noise and dropout come from the step's number: a resumed run draws the same.
                noise = random.Random(f"noise {run.options['seed']} {run.step} {runs.rank()}")
                torch.manual_seed(noise.getrandbits(63))
                for group, rate in zip(run.optimizer.param_groups, run.rates):
                    group["lr"] = rate * rate_factor(run.step, run.total, run.recipe)
                values = update(run, batch) | {"seconds_data": started - ended}
                ended = time.perf_counter()
                steps.append(values | {"seconds_step": ended - started})
                run.step += 1
                bar.update()
                if run.step % 10 == 0 or run.step == run.total:
                    line, steps = runs.means(steps, run.recipe.batch_size, run.device), []
                    if run.first:
                        lr = max(group["lr"] for group in run.optimizer.param_groups)
                        runs.append_log(run.log, step=run.step, epoch=epoch, lr=lr, **line)
                    bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
                if run.options["keep_every"] and run.step % run.options["keep_every"] == 0:
                    run.save(f"step-{run.step}.pth")
                if number := interrupted():
                    run.save()
                    run.say(f"stopped at step {run.step}; continue: {run.again}")
                    return number
                if run.step % run.options["save_steps"] == 0 or time.time() - run.saved > 300:
                    run.save()
            run.test_if_due()
        run.say(f"done at step {run.step}: best {run.best:.3f}; all of it is in {run.out}")
        return interrupted()  # in the last evaluation


# ===================================================================================== one step

def steps_of(run, order):
    """This process's share of each step: a list of micro-batches (images, mask, targets)."""
    rank, world, size = runs.rank(), runs.world(), run.recipe.micro_batch
    shares = [batch[len(batch) * rank // world:len(batch) * (rank + 1) // world] for batch in order]
    steps = [[share[i:i + size] for i in range(0, len(share), size)] for share in shares]
    batches = iter(data.loader(run.train_set, [chunk for step in steps for chunk in step],
                               run.options["workers"], run.device))
    for step in steps:
        yield [next(batches) for _ in step]


def update(run, batch):
    """One step of the optimizer -> this process's share of the losses, and the gradient's norm.
    FloatingPointError names the images of a loss that is not finite."""
    try:
        losses = forward_backward(run, batch)
        run.scaler.unscale_(run.optimizer)
        limit = run.recipe.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), limit)
        # The step's last transfer to the host, of all its numbers together.
        *numbers, norm = torch.stack([*losses.values(), norm]).tolist()
        losses = dict(zip(losses, numbers))
        # In fp16 gradients may overflow: such a step is omitted and the scale halved, down to 1.
        overflow = run.scaler.is_enabled() and run.scaler.get_scale() > 1
        if not math.isfinite(losses["loss"]) or not (overflow or math.isfinite(norm)):
            raise FloatingPointError(f"the loss is {losses['loss']}, the gradient's norm {norm}")
    except FloatingPointError as error:
        ids = [t["image_id"] for *_, targets in batch for t in targets]
        raise FloatingPointError(f"step {run.step}, image ids {ids}: {error}. Look at these images'"
                                 " boxes, or try a lower --lr") from None
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.average:
        # The decay rises: early, 0.999 would mostly keep the initial weights.
        decay = min(run.recipe.ema, (1 + run.step) / (10 + run.step))
        if run.recipe.ema_tau:
            decay = run.recipe.ema * (1 - math.exp(-(1 + run.step) / run.recipe.ema_tau))
        run.average.multi_avg_fn = get_ema_multi_avg_fn(decay)
        run.average.update_parameters(run.model)
    return losses | {"grad_norm": norm if math.isfinite(norm) else 0.0}


def forward_backward(run, batch):
    """Add up the gradients of one step, micro-batch by micro-batch and over all processes -> the
    losses as tensors: this process's share; the step's are the sums of all shares."""
    # Losses are divided by the step's number of boxes, wherever these are: a share needs them all.
    counts = sum(runs.gather([len(t["labels"]) for *_, targets in batch for t in targets]), [])
    sums, to = {}, dict(device=run.device, non_blocking=True)
    for i, (images, mask, targets) in enumerate(batch, 1):
        targets = [{k: t[k].to(**to) for k in ("labels", "boxes", "masks") if k in t}
                   for t in targets]
        images, mask = resampled(run, images.to(**to), mask.to(**to))
        run.parallel.require_backward_grad_sync = i == len(batch)  # the last brings the sum to all
        with run.autocast():
            outputs = run.parallel(images, mask, targets)
        total, losses = run.criterion(outputs, targets, counts)
        run.scaler.scale(total * runs.world()).backward()  # DistributedDataParallel takes the mean
        for name, value in {"loss": total, **matcher.named(losses)}.items():
            sums[name] = sums.get(name, 0) + value.detach()
    return sums


def resampled(run, images, mask):
    """RF-DETR's sizes: one a batch, up to five of its windows' patches more or less a side."""
    if run.recipe.sizes == "batch" and run.recipe.crop:
        unit = run.model.backbone.divisor
        side = unit * max(1, run.recipe.image_size // unit + torch.randint(-5, 6, ()).item())
        images = F.interpolate(images, (side, side), mode="bilinear")
        mask = F.interpolate(mask[:, None].float(), (side, side))[:, 0].bool()
    return images, mask


def parameter_groups(model, recipe):
    """AdamW's groups: backbone and sampling points have their own rates (Deformable DETR, 5). Of a
    ViT, a block's rate falls with every block above it, and vectors and places do not decay."""
    kinds = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.BatchNorm2d)
    norms = {p for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
    taps, groups = getattr(model.backbone, "taps", None), {}
    for name, p in model.named_parameters():
        part, inner, block, *_ = [*name.split("."), "", ""]
        backbone, norm, above = part == "backbone", p in norms, 0
        points = "sampling_offsets" in name or "reference_points" in name
        decoder = recipe.lr_component_decay < 1 and part in ("decoder", "decoder_norm",
                                                             "ref_point_head")
        if backbone and taps and inner != "norm":
            above = taps[-1] + 1 + model.backbone.dino  # RF-DETR's code counts one block more
            above += -int(block) if inner == "blocks" else 1  # embeddings lie below all blocks
            norm = norm or p.dim() == 1 or inner in ("pos_embed", "cls_token")
        rate = recipe.lr_backbone if backbone else recipe.lr * (recipe.lr_points if points else 1)
        rate *= recipe.lr_component_decay ** (2 * backbone + decoder)
        decays = not norm or recipe.decay_norms and not (backbone and taps)
        role = backbone, points, norm, above, decoder  # not the rate: a resumed run's may differ
        if p.requires_grad:
            groups.setdefault(role, dict(params=[], lr=rate * recipe.lr_layer_decay ** above,
                                         weight_decay=recipe.weight_decay * decays))
            groups[role]["params"].append(p)
    return [*groups.values()]


def rate_factor(step, total, recipe):
    """A linear rise over `warmup`, a tenth of the run at most; a tenth from `lr_drop` on."""
    rise = min(1.0, (step + 1) / max(1, min(recipe.warmup, total // 10)))
    return rise * (0.1 if step >= round(recipe.lr_drop * total) else 1.0)


def main(argv=None):
    """Exit code: 0 done, 2 after one clear line on what is wrong, 128 + a signal's number."""
    given, run = runs.parse(argv, __doc__), None
    try:
        runs.start()
        run = Run(*(runs.resumed if "resume" in given else runs.settle)(given))
        number = train(run)
        runs.stop()
        return number and 128 + number
    except (ConfigError, data.DataError, weights.WeightsError, FloatingPointError, OSError) as what:
        why = what
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("by peer", "Broken pipe")):
            raise
        why = "another process of this run has ended: see its error."
    if run and isinstance(why, (data.DataError, str)):  # what was learned until then is kept
        run.save()
        why = f"{why} The {run.step} steps until then are saved: {run.again}"
    process = f" (process {runs.rank()})" if runs.rank() else ""
    print(f"error{process}: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
