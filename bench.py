"""python bench.py WHAT: speed and cost of a part beside a peer in the same run (seconds drift):
    msda          deformable attention beside its definition by grid_sample
    infer, train  detection, a training step, beside transformers' (pip install transformers)
    memory        a training step's peak: recomputed activations; 80, 1,203 and 13,204 classes
    data, score   loading beside DETR's steps; a COCO-size annotation file; COCO metrics' seconds,
                  or (--only v3det, --size PERCENT of it) V3Det's, with memory
    kill, soak    a run killed at 20 random moments beside an undisturbed one; 2,000 steps' memory
    flops         DiffuDETR's sampling steps, reading the memory once or in every step
    ablate        DiffuDETR's choices, each trained and scored at the small size
    gpu           a GPU's figures in one call of at most nine minutes (without one: a rehearsal)
"""
import argparse
import contextlib
import copy
import importlib.util
import io
import itertools
import json
import multiprocessing
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import functional as TF

import data
import eval as evaluation
import msda
import runs
import scores
import train
import weights
from matcher import Criterion
from model import build_model
from msda_cuda import cuda
from variants import SAMPLING, VARIANTS, recipe


def alternate(title, ways, rounds):
    """Time two ways in turn after a warm-up, so that drift hits both; print medians and ratio."""
    seconds = np.zeros((1 + rounds, 2))
    for taken in seconds:
        for i, way in enumerate(ways.values()):
            started = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken[i] = time.perf_counter() - started
    ratio = np.median(seconds[1:, 0] / seconds[1:, 1])
    times = ", ".join(f"{k} {s:.4f} s" for k, s in zip(ways, np.median(seconds[1:], 0)))
    print(f"{title}: {times}, {ratio:.2f} x", flush=True)


def apart(work, seconds=None):
    """(MB at the peak beyond its start, CPU seconds) of work() in a process; NaN if killed."""
    def child(pipe):
        torch.set_num_threads(1)
        sys.stdout = io.StringIO()
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        work()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send(((peak - before) / 1024, time.process_time() - started))

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -9), "the process failed"
    return here.recv() if process.exitcode == 0 else (np.nan, np.nan)


def operator_inputs(shapes, B, Q, D):
    """value, offsets, logits, reference of Q random queries or, None, of an encoder's tokens."""
    torch.manual_seed(0)
    centre = torch.rand(Q, 2) if Q else torch.cat([
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
        for h, w in shapes])
    Q, S = len(centre), sum(h * w for h, w in shapes)
    return [torch.randn(B, S, 8, D), 3 * torch.randn(B, Q, 8, 4, 4, 2),
            torch.randn(B, Q, 8, 4, 4), centre[None, :, None].repeat(B, 1, 4, 1)]


def bench_msda(args):
    """Whether the operator is right, then its speed: on the GPU if there is one."""
    def both(way, *tensors):
        out = way(*tensors)
        return out, *torch.autograd.grad(out.sum(), tensors[:3])

    msda.BACKEND = "native"
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    large, toy = [(100, 134), (50, 67), (25, 34), (13, 17)], [(16, 16), (8, 8), (4, 4), (2, 2)]
    for title, shapes, B, Q, D in (("encoder, 800 x 1066", large, 1, None, 32),
                                   ("decoder, 300 queries", large, 1, 300, 32),
                                   ("encoder, toy, batch 16", toy, 16, None, 16)):
        ways = {"grid_sample": lambda value, *where: msda.msda_grid_sample(
                    value, shapes, *msda.sampling(shapes, *where)),
                "minDETR": lambda value, *where: msda.msda(value, shapes, *where)}
        tensors = operator_inputs(shapes, B, Q, D)
        wide = [a.double().requires_grad_() for a in tensors]
        tensors[:3] = [a.requires_grad_() for a in tensors[:3]]
        # Mean errors: where a point hits a pixel's centre, rounding chooses one of two slopes.
        errors = [((a - b).abs().mean() / b.abs().mean()).item() for a, b in zip(
            both(ways["minDETR"], *tensors), both(ways["grid_sample"], *wide))]
        assert all(error < 1e-4 for error in errors), f"{title}: wrong by {errors}"
        with torch.no_grad():
            alternate(f"{title}, forward", {
                name: partial(way, *tensors) for name, way in ways.items()}, args.runs)
        alternate(f"{title}, forward + backward", {
            name: partial(both, way, *tensors) for name, way in ways.items()}, args.runs)


@cache
def built(side, name, device="cpu", **options):
    """A model of one side with random weights, and its optimizer."""
    if side == "minDETR":
        model = build_model(name, **options)
    elif name[:3] in ("lw_", "rf_"):
        model = vit_of_transformers(name)
    else:
        import transformers as hf
        kind, config, stages, more = {
            "detr": (hf.DetrForObjectDetection, hf.DetrConfig, [4], {}),
            "deformable_two_stage": (hf.DeformableDetrForObjectDetection, hf.DeformableDetrConfig,
                                     [2, 3, 4], dict(two_stage=True, with_box_refine=True))}[name]
        resnet = hf.ResNetConfig(out_features=[f"stage{i}" for i in stages])
        model = kind(config(backbone_config=resnet, num_labels=91, auxiliary_loss=True, dropout=0.1,
                            attention_dropout=0.1, activation_dropout=0.1, **more))  # as published
        # They freeze this backbone whole ("stage.1" is in no name, "stages.1" is); ours less.
        for parameter_name, parameter in model.named_parameters():
            if ".encoder.stages." in parameter_name:
                parameter.requires_grad_(".stages.0." not in parameter_name)
    return model.to(device), torch.optim.AdamW(model.parameters(), 1e-5, fused=True)


def vit_of_transformers(name):
    """Their LW-DETR or RF-DETR with a row's sizes; they count the blocks that are read from 1."""
    import transformers as hf
    row = VARIANTS[name]
    vit = dict(hidden_size=row.vit_width, num_hidden_layers=row.vit_depth, patch_size=row.patch,
               num_attention_heads=row.vit_heads, image_size=recipe(name).image_size,
               out_indices=[int(i) + 1 for i in row.taps.split()])
    rest = dict(num_labels=row.num_classes, num_queries=row.num_queries, dropout=0.0,
                group_detr=row.query_groups, decoder_layers=row.decoder_layers,
                decoder_n_points=row.points)
    if row.backbone == "dinov2":
        vit = hf.RfDetrDinov2Config(num_windows=row.windows, **vit)
        return hf.RfDetrForObjectDetection(hf.RfDetrConfig(backbone_config=vit, **rest))
    blocks = {*range(row.vit_depth)} - {*map(int, row.global_blocks.split())}
    vit = hf.LwDetrViTConfig(window_block_indices=sorted(blocks), **vit)
    return hf.LwDetrForObjectDetection(hf.LwDetrConfig(
        backbone_config=vit, projector_scale_factors=[1.0], **rest))


@cache
def image_batch(size, count, square=False, device="cpu"):
    """Random 4:3 images with so many pixels on the short side, or squares, and seven random boxes
    in each."""
    torch.manual_seed(0)
    wide = size if square else size * 4 // 3
    images, labels, boxes = (t.to(device) for t in (
        torch.randn(count, 3, size, wide), torch.randint(80, (7,)), torch.rand(7, 4) * 0.3 + 0.2))
    targets = [dict(labels=labels, class_labels=labels, boxes=boxes)] * count
    return images, torch.zeros_like(images[:, 0], dtype=torch.bool), targets


def work(side, what, name, size, count=1, again=False, device="cpu", half=False, **options):
    """Detect in images, or take a training step on them (half: in bf16); returns the number of
    parameters."""
    (model, optimizer), training = built(side, name, device, **options), what == "train"
    images, mask, targets = image_batch(size, count, recipe(name).max_size == 0, device)
    model.train(training).checkpoint_activations = again
    with torch.set_grad_enabled(training), torch.autocast(device, torch.bfloat16, half):
        if side == "minDETR":
            outputs = model(images, mask, targets)
            loss = training and Criterion(model.cfg)(outputs, targets)[0]
        else:
            loss = model(images, (~mask).long(), labels=targets if training else None).loss
    if training:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return sum(p.numel() for p in model.parameters())


def bench_infer(args):
    """Each side in a process of its own: what one leaves in memory would speed up the other."""
    spawn, names = multiprocessing.get_context("spawn"), ["detr", "deformable_two_stage"]
    names += ["lw_tiny", "lw_medium", "rf_nano", "rf_medium"] * (args.what == "infer")
    for name in args.only.split() or names:
        size = args.size or recipe(name).image_size
        with ProcessPoolExecutor(1, spawn) as first, ProcessPoolExecutor(1, spawn) as second:
            ways = {side: lambda pool=pool, side=side: pool.submit(
                        work, side, args.what, name, size).result()
                    for side, pool in (("transformers", first), ("minDETR", second))}
            assert len({way() for way in ways.values()}) == 1, f"{name}: parameters differ"
            alternate(f"{name}, {args.what}, short side {size}", ways, args.runs)


def bench_memory(args):
    small = dict(backbone="resnet18", backbone_norm="batch")
    for name, size, options in [
            *((name, args.size or 400, dict(again=again)) for again in (False, True)
              for name in ("detr", "deformable_two_stage", "dino")),
            *(("diffu_dino", 128, small | dict(num_classes=n)) for n in (80, 1203, 13204))]:
        peak, _ = apart(lambda: work("minDETR", "train", name, size, 2, **options))
        print(f"{name}, 2 images, short side {size}, {options}: {peak:.0f} MB", flush=True)


def make_folder(root, count, boxes):
    """A folder in COCO's layout: so many images of 640 x 480, empty files, and boxes."""
    folder, xywh = Path(root, "train2017"), np.random.default_rng(0).random((boxes, 4)) * 200 + 2
    url, names = "http://images.cocodataset.org/train2017/", [f"{i:012}.jpg" for i in range(count)]
    folder.mkdir(), Path(root, "annotations").mkdir()
    for name in names:
        Path(folder, name).touch()
    Path(root, "annotations", "instances_train2017.json").write_text(json.dumps(dict(
        images=[dict(id=i, file_name=name, width=640, height=480, license=1, coco_url=url + name)
                for i, name in enumerate(names)],
        annotations=[dict(id=n, image_id=n % count, category_id=n % 80, iscrowd=0, bbox=box,
                          area=box[2] * box[3]) for n, box in enumerate(xywh.round(2).tolist())],
        categories=[dict(id=i, name=f"thing {i}") for i in range(80)])))
    return data.CocoFolder(root, transform=data.train_transform())


def bench_data(args):
    """DETR's steps are as published, with the same draws, but for the padding mask."""
    def recipe(i, seed):
        image = Image.open(images.path(i)).convert("RGB")
        image, *_ = exact(image, *images.annotations(i), random.Random(seed))
        return TF.normalize(TF.to_tensor(image), pad.image_mean, pad.image_std)

    torch.set_num_threads(1)
    pad = GeneralizedRCNNTransform(800, 1333, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with tempfile.TemporaryDirectory() as root:
        images, exact = make_folder(root, 40, 300), data.train_transform(exact=True)
        for i in range(40):
            drawn = data.toy_picture(*data.toy_scene(i, 640), 640).crop((0, 0, 640, 480))
            drawn.save(images.path(i), quality=90)
        order, rounds = data.batch_order(40, 2, 0, 0), args.runs
        alternate("40 images through the training recipe, one core", {
            "DETR": lambda: [pad.batch_images([recipe(*k) for k in keys], 1) for keys in order],
            "minDETR": lambda: [data.collate([images[k] for k in keys]) for keys in order]}, rounds)
    with tempfile.TemporaryDirectory() as root:
        apart(lambda: make_folder(root, 118_287, 860_001))  # or its memory would be used again
        peak, seconds = apart(lambda: data.CocoFolder(root))
    print(f"118,287 images and 860,001 boxes: {seconds:.1f} s of a core, {peak:.0f} MB at most")


def bench_score(args, images=5000, detections=300):
    """Toy truth under 80 labels; detections near its boxes, half of them with the right label."""
    if args.only == "v3det":
        truth, found, ids = like_v3det((args.size or 100) / 100)
        started, who = time.perf_counter(), (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ap = scores.metrics(truth, found, ids)["AP"]
        used = [resource.getrusage(one) for one in who]
        return print(f"{len(found)} detections: {time.perf_counter() - started:.0f} s, AP {ap:.4f};"
                     f" {sum(one.ru_utime + one.ru_stime for one in used):.0f} s of a core; MB at "
                     f"most, here and in a helper: {[one.ru_maxrss // 1024 for one in used]}")
    rng, truth = random.Random(0), data.ToyShapes(images).ground_truth()
    truth["categories"] = [dict(id=k, name=str(k)) for k in range(80)]
    for n, box in enumerate(truth["annotations"]):
        box.update(category_id=n % 80, iscrowd=int(n % 100 == 0))
    found = [dict(image_id=box["image_id"], score=rng.random(),
                  category_id=rng.choice((box["category_id"], rng.randrange(80))),
                  bbox=[abs(v + rng.gauss(0, 4)) for v in box["bbox"]])
             for box in rng.choices(truth["annotations"], k=images * detections)]
    started = time.perf_counter()
    ap = scores.coco_metrics(truth, found, [image["id"] for image in truth["images"]])["AP"]
    print(f"{images} x {detections} detections: {time.perf_counter() - started:.1f} s, AP {ap:.4f}")


def like_v3det(share, K=13_204, most=300):
    """As much as V3Det's validation set, or a share of its images: `most` detections around an
    image's boxes, half of them with a right label, in a random tree -> `scores.metrics`' input."""
    g, images, count = np.random.default_rng(0), int(29_821 * share), int(220_429 * share)
    owner, label = np.sort(g.integers(images, size=count)), g.integers(1, K + 1, count)
    boxes = np.hstack([g.uniform(0, 400, (count, 2)), g.uniform(8, 240, (count, 2))])
    image = np.repeat(np.arange(images), most)
    like = np.minimum(np.searchsorted(owner, image) + g.integers(8, size=len(image)), count - 1)
    guess = np.where(g.random(len(image)) < 0.5, label[like], g.integers(1, K + 1, len(image)))
    found = np.column_stack([image, guess, g.random(len(image), np.float32),
                             np.abs(boxes[like] + g.normal(0, 4, (len(image), 4)))])
    above = {1: []}
    for k in range(2, K + 1):
        parent = int(g.integers(1, k))
        above[k] = [parent, *above[parent]]
    truth = dict(images=[], categories=[dict(id=k) for k in range(1, K + 1)], ancestors=above)
    truth["annotations"] = [
        dict(image_id=i, category_id=c, iscrowd=0, area=box[2] * box[3], bbox=box)
        for i, c, box in zip(owner.tolist(), label.tolist(), boxes.tolist())]
    return truth, found, range(images)


def bench_kill(args):
    """A run of seconds: its memory must not grow with its steps (soak, --steps 200 and 2000);
    killed and resumed, it ends in the same bits."""
    kills, steps = (20, args.steps or 100) if args.what == "kill" else (0, args.steps or 2000)
    new = f"""--variant diffu_dino --overfit 8 --batch-size 4 --micro-batch 2 --eval-every 10
        --ema 0.9 --image-size 64 --max-size 64 --queries 10 --d-model 64 --ffn 64 --heads 4
        --encoder-layers 1 --decoder-layers 2 --dropout 0.1 --workers 0 --device cpu
        --steps {steps} --save-steps {1 if kills else 100} --out""".split()
    with tempfile.TemporaryDirectory() as root:
        whole, cut, rng, stops = Path(root, "whole"), Path(root, "cut"), random.Random(0), []
        peak, spell = apart(lambda: train.main([*new, str(whole)]))
        print(f"{steps} steps: {peak:.0f} MB at the peak")
        for left in range(kills, -1, -1) if kills else ():  # the last life ends by itself
            saved = any(cut.glob("last*.pth"))
            stops.append(runs.read_last(cut)[1]["step"] if saved else 0)
            given = ["--resume", str(cut)] if saved else [*new, str(cut)]
            seconds = rng.uniform(0, 1.5 * spell / kills) if left else None
            killed = np.isnan(apart(lambda: train.main(given), seconds)[0])
            assert killed == (left > 0), "it ended before its last kill: raise --steps"
        ends = [runs.read_last(run)[1] for run in (whole, cut if kills else whole)]
    same = all(map(torch.equal, *([*end["model"].values(), *end["ema"].values(), *(
        x for s in end["optimizer"]["state"].values() for x in s.values())] for end in ends)))
    if kills:
        print(f"killed at steps {stops[1:]}: " + ("equal bit for bit" if same else "DIFFERENT"))
    return not same


def bench_flops(args, **options):
    """Multiply-adds and times by sampling steps, with equal outputs."""
    def decode_again(memory, read, *rest, **given):  # as published; the first step has just read
        again, last[0] = read is last[0], read
        read = [layer.cross_attn.read(memory) for layer in every.decoder] if again else read
        return decode(memory, read, *rest, **given)

    once = build_model("diffu_dino", **dict(num_classes=80) | options).eval().requires_grad_(False)
    every, inputs = copy.deepcopy(once), image_batch(args.size or 800, 1)[:2]
    decode, last, every.decode = every.decode, [None], decode_again
    for module in (*every.modules(), *once.modules()):
        if isinstance(module, msda.MSDeformAttn):  # a channel of a point: 4 corners and a weight
            module.register_forward_hook(lambda _, __, out: sampled.append(
                5 * out.numel() * once.cfg.levels * once.cfg.points))
    for steps in (1, 3, 5, 10):
        outputs, cost = [], []
        for model in (every, once):
            sampled, model.cfg = [], model.cfg.but(sampling_steps=steps)
            with FlopCounterMode(display=False) as counter:
                outputs.append(model(*inputs))
            cost.append((counter.get_total_flops() / 2 + sum(sampled)) / 1e9)
        assert all(torch.equal(*(out[key] for out in outputs)) for key in ("logits", "boxes"))
        alternate(f"{steps} sampling steps, {cost[0]:.5g} or {cost[1]:.5g} G multiply-adds", {
            "every": lambda: every(*inputs), "once": lambda: once(*inputs)}, args.runs)


# The paper's AP of each choice (DiffuDINO, COCO; None: not given); the first is the default.
ABLATIONS = {
    "noise": {"gaussian": 51.9, "sigmoid_gaussian": 50.4, "beta": 49.5},
    "schedule": {"cosine": 51.9, "linear": 51.6, "sqrt": 51.4}, "eta": {0.0: None, 1.0: None},
    "content": {"learned": None, "memory": None}, "time": {"add": None, "scale_shift": None},
    "sampling_steps": {3: 51.9, 1: 51.6, 5: 51.8, 10: 51.4}, "renewal": {True: None, False: None},
    "sampler": {"ddim": None, "published": None}}


def score_of(args, seed, trained, sampling):
    """AP of a training and a sampling with these changes, once computed; samplings share one."""
    folder = Path(args.out, f"{args.data}-{args.pictures}-{args.amp}".replace("/", "_"),
                  "-".join(f"{k}={v}" for k, v in {**trained, "seed": seed}.items()))
    kept, steps = folder / f"ap{json.dumps(sampling)}", max(1, args.pictures // 16)
    if not kept.exists():
        options = dict(variant="diffu", preset="small", data=args.data, amp=args.amp, seed=seed,
                       batch_size=16, steps=steps, eval_every=10 ** 6, out=folder) | trained
        done = runs.read_last(folder)[1]["step"] if any(folder.glob("last*.pth")) else -1
        if done < steps and (train.main([f"--resume={folder}"] if done >= 0 else [
                f"--{k.replace('_', '-')}={v}" for k, v in options.items()])
                or runs.read_last(folder)[1]["step"] < steps):
            sys.exit("stopped; the same command goes on")
        model, meta = weights.load_checkpoint(runs.read_last(folder)[0], **sampling)
        size, longest = (meta["recipe"][k] for k in ("image_size", "max_size"))
        images = data.open_data(args.data, None, "val", data.eval_transform(size, longest),
                                dict(zip(meta["category_ids"], meta["classes"])), size, 500)
        kept.write_text(str(evaluation.evaluate(model, images, 8, progress=False)[0]["AP"]))
    return float(kept.read_text())


def bench_ablate(args):
    """Train and score every choice, one at a time from the default; then a table over the seeds."""
    points = {(axis, value): [] for axis, values in ABLATIONS.items() for value in values}
    for seed in range(args.seeds):
        for axis, value in points:
            change = {} if value == next(iter(ABLATIONS[axis])) else {axis: value}
            changes = ({}, change) if axis in SAMPLING else (change, {})
            points[axis, value].append(100 * score_of(args, seed, *changes))
    print("the paper's AP; ours in points, and less the default's: means (spreads) over seeds")
    for (axis, value), ours in points.items():
        apart_by = np.subtract(ours, points[axis, next(iter(ABLATIONS[axis]))])
        print(f"{axis} = {value}".ljust(28), ABLATIONS[axis][value] or "  - ", *(
            f"{np.mean(x):+7.1f} ({np.ptp(x):.1f})" for x in (ours, apart_by)))


# =================================================================================== a GPU's day

# Seconds at most of each section: first whether it is right, last what may be refused.
SECTIONS = {"right": 100, "operator": 100, "train": 120, "infer": 100, "steps": 40, "profile": 30,
            "sanitizer": 50}
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def bench_gpu(args):
    """Every section in a process of its own, so that none spoils another, each line as it comes;
    then all figures again. Without a GPU: small, on the CPU, with the kernel emulated."""
    if args.only:
        from tests import emulate
        with contextlib.nullcontext() if GPU else emulate.gpu():
            return globals()[f"gpu_{args.only}"](args)
    begun, table = time.time(), [torch.cuda.get_device_name() if GPU else "rehearsal on a CPU"]
    for name, limit in SECTIONS.items():
        command = [sys.executable, "-u", __file__, "gpu", "--only", name, "--runs", str(args.runs),
                   "--peers", args.peers]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, errors="replace")
        timer = threading.Timer(max(1, min(limit, begun + 530 - time.time())), process.kill)
        timer.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            table += [line.rstrip()] * line.startswith(f"{name}: ")
        timer.cancel()
        if code := process.wait():
            table.append(f"{name}: " + ("cut off at its limit" if code < 0 else f"FAILED ({code})"))
    print("-" * 79, *table, f"{time.time() - begun:.0f} s in all", sep="\n", flush=True)


def clocked(way, rounds, graph=False):
    """Median seconds of way(); graph: of its CUDA graph's replays."""
    for _ in range(3):  # compiles, and sets up what a capture must not
        way()
    if GPU and graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            way()
        way = captured.replay
    if not GPU:  # a rehearsal
        started = time.perf_counter()
        way()
        return time.perf_counter() - started
    seconds, (first, last) = [], (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3 * rounds):  # by the GPU's clock, without the host's launch and wait
        first.record()
        way()
        last.record()
        last.synchronize()
        seconds.append(first.elapsed_time(last) / 1e3)
    return float(np.median(seconds))


def gpu_right(args):
    done = subprocess.run([sys.executable, "test_all.py", "-k", "msda"], capture_output=True,
                          text=True)
    print(done.stdout[-3000:], done.stderr[-1000:] * (done.returncode > 0))
    print(f"right: {done.stdout.strip().rpartition(chr(10))[2]} (test_all.py -k msda)")
    return done.returncode


def peers(args):
    """{name: module} of --peers' Python files, which build and call other people's kernels:
    forward(value, shapes, locations, weights) and backward(grad_out, the same)."""
    found = {}
    for path in map(Path, args.peers.split()):
        try:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
            found[path.stem] = module
        except Exception as error:  # another's build must not cost our figures
            print(f"operator: {path.stem}: not built: {error}")
    return found


def gpu_operator(args):
    """Replays, forward and with backward, beside grid_sample and --peers, and the least that must
    be read and written as a share of the speed at which the GPU copies."""
    big, others = torch.ones(2 ** 28 if GPU else 2 ** 20, device=DEVICE), peers(args)
    speed = 8 * len(big) / clocked(big.clone, args.runs, True)  # bytes a second, both ways
    print(f"operator: copies {speed / 1e12:.2f} TB/s")
    large, square = ([(a >> l, b >> l) for l in range(4)] for a, b in ((100, 136), (128, 128)))
    cases = [("encoder, 800 x 1088", large, 2, None), ("decoder, 900 queries", large, 2, 900),
             ("encoder, 1024 x 1024", square, 2, None)]  # FlashDeformAttn's blocks are full
    for (title, shapes, *sizes), dtype in itertools.product(
            cases if GPU else [("tiny", [(4, 4), (2, 2), (1, 1), (1, 1)], 1, None)],
            (torch.float32, torch.float16, torch.bfloat16)):
        value, *rest, reference = (t.to(DEVICE) for t in operator_inputs(shapes, *sizes, 32))
        where = [t.to(dtype) for t in msda.sampling(shapes, *rest, reference)]
        value, *rest = (t.to(dtype) for t in (value, *rest))
        inputs = value, *rest, reference, tuple(n for pair in shapes for n in pair)
        out = cuda.forward(*inputs)
        grad = torch.randn_like(out)
        ways = {"minDETR": (lambda: cuda.forward(*inputs),
                            lambda: cuda.backward(grad, *inputs, False))}
        for name, peer in ({"grid_sample": Definition} | others).items():
            ways[name] = (lambda peer=peer: peer.forward(value, shapes, *where),
                          lambda peer=peer: peer.backward(grad, value, shapes, *where))
        least = sum(t.nbytes for t in (*inputs[:4], out))
        least = least, 2 * least + 4 * value.numel() + sum(t.nbytes for t in rest)
        ours = None
        for name, (forward, backward) in ways.items():
            with attempt(f"operator: {name}"):
                off = (forward().double() - out.double()).abs().mean() / out.double().abs().mean()
                seconds = [clocked(way, args.runs, True)
                           for way in (forward, lambda: (forward(), backward()))]
                ours = ours or seconds
                print(f"operator: {title}, {str(dtype)[6:]}, {name}: " + ", ".join(
                    f"{what} {s * 1e6:.1f} us ({n / s / speed:.0%} of copying; {s / o:.2f} x ours)"
                    for what, s, n, o in zip(("forward", "both"), seconds, least, ours))
                    + f"; apart from ours by {off:.1e}")


class Definition:
    """grid_sample as one of `peers`."""
    forward = staticmethod(msda.msda_grid_sample)

    @staticmethod
    def backward(grad, value, shapes, locations, weights):
        leaves = [t.detach().requires_grad_() for t in (value, locations, weights)]
        out = msda.msda_grid_sample(leaves[0], shapes, *leaves[1:])
        return torch.autograd.grad(out, leaves, grad)


@contextlib.contextmanager
def attempt(what):
    """Print what fails within, and go on."""
    try:
        yield
    except Exception as error:
        print(f"{what}: FAILED: {type(error).__name__}: {str(error)[:300]}")


def gpu_train(args):
    """A step in bf16 at 800 x 1066: images a second, and the peak of the GPU's memory."""
    for count, (side, name) in itertools.product((2, 8) if GPU else (1,), (
            ("transformers", "deformable_two_stage"), ("minDETR", "deformable_two_stage"),
            ("minDETR", "dino"), ("minDETR", "diffu_dino"))):
        with attempt(f"train: {side}, {name}, batch {count}"):
            built.cache_clear()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats() if GPU else None
            s = clocked(lambda: work(side, "train", name, 800 if GPU else 64, count, device=DEVICE,
                                     half=True), args.runs)
            peak = torch.cuda.max_memory_allocated() / 1e9 if GPU else 0
            print(f"train: {side}, {name}, batch {count}: {count / s:.2f} images/s, {peak:.1f} GB")


@torch.no_grad()
def gpu_infer(args):
    """One image: eager in float32 and bf16, compiled, and as a CUDA graph."""
    for name in ("deformable_two_stage", "diffu_dino", "lw_tiny"):
        model, size = built("minDETR", name, DEVICE)[0].eval(), 800 if GPU else 64
        images, mask, _ = image_batch(size, 1, recipe(name).max_size == 0, DEVICE)
        compiled = torch.compile(model, backend="inductor" if GPU else "eager")
        for title, way, half, graph in (
                ("float32", model, False, False), ("bf16", model, True, False),
                ("bf16, CUDA graph", model, True, True), ("bf16, compiled", compiled, True, False)):
            with attempt(f"infer: {name}, {title}"), torch.autocast(DEVICE, torch.bfloat16, half):
                s = clocked(lambda: way(images, mask), args.runs, graph)
                print(f"infer: {name}, {title}: {1 / s:.1f} images/s")


@torch.no_grad()
def gpu_steps(args):
    """What another DDIM evaluation costs, beside the whole answer with one."""
    model, (images, mask, _) = built("minDETR", "diffu_dino", DEVICE)[0].eval(), image_batch(
        800 if GPU else 64, 1, device=DEVICE)
    seconds = []
    for n in (1, 5):
        model.cfg = model.cfg.but(sampling_steps=n)
        seconds.append(clocked(lambda: model(images, mask), args.runs))
    one, more = seconds[0], (seconds[1] - seconds[0]) / 4
    print(f"steps: one {one * 1e3:.1f} ms; each further {more * 1e3:.2f} ms, {more / one:.1%}")


def gpu_profile(args):
    kinds = torch.profiler.ProfilerActivity
    step = partial(work, "minDETR", "train", "dino", 800 if GPU else 64, 2, device=DEVICE,
                   half=True)
    step()
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA][:1 + GPU]) as seen:
        step()
    print(seen.key_averages().table(sort_by=f"self_{DEVICE}_time_total", row_limit=12,
                                    max_name_column_width=60))


def gpu_sanitizer(args):
    """Does a kernel touch memory that is not its own? Not run where that is not allowed."""
    tool = shutil.which("compute-sanitizer") if GPU else None
    done = tool and subprocess.run([tool, sys.executable, "test_all.py", "-k", "msda_ways"],
                                   capture_output=True, text=True)
    print("sanitizer: " + (done.stdout.splitlines()[-1] if done else "not run"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    bench_train, bench_soak = bench_infer, bench_kill
    parser.add_argument("what", choices=[name[6:] for name in globals() if name[:6] == "bench_"])
    for name, default, text in (
            ("runs", 5, "timed rounds"), ("size", 0, "images' short side (800; of memory: 400)"),
            ("steps", 0, "of the runs of kill (100) or soak (2,000)"), ("data", "toy", "of ablate"),
            ("pictures", 4800, "in each training of ablate"), ("seeds", 2, "of ablate"),
            ("only", "", "variants of infer and train; a section of gpu"),
            ("peers", "", "of gpu: Python files that call other kernels (see `peers`)"),
            ("amp", "none", "of ablate"),
            ("out", "out/ablate", "of ablate: its folder")):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    sys.exit(globals()[f"bench_{args.what}"](args))
