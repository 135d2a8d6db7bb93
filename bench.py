"""The speed and cost of each part, beside a peer in one run: ratios, because seconds drift and do not travel.

    python bench.py msda          deformable attention (bench_msda.py; it has options of its own)
    python bench.py infer         seconds an image beside Hugging Face transformers (pip install it): DETR, Deformable DETR
    python bench.py train         seconds a training step beside theirs, and where ours go
    python bench.py memory        a training step's peak memory: checkpointed activations; 80, 1,203 and 13,204 classes
    python bench.py data          photos a second beside the DETR recipe's; padding; annotations of COCO's size
    python bench.py score         5,000 images x 300 detections, beside pycocotools
    python bench.py kill          a run killed at 20 random moments and resumed, beside one that was left alone
    python bench.py soak          the memory of a run of 2,000 steps
    python bench.py flops         DiffuDETR's operations and time by decoder evaluations, with and without reused values
"""
import argparse
import contextlib
import functools
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF

import bench_msda
import data
import matcher
import msda
import scores
import toy
import train
import variants
import weights
from model import Detector, build_model
from order import BatchOrder


def machine(runs):
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, median of {runs}"


def photo_batch(size, boxes=7):
    """One random 4:3 photo of so many pixels on its short side, and random boxes."""
    g = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, size, size * 4 // 3, generator=g)
    target = dict(labels=torch.randint(1, 91, (boxes,), generator=g), boxes=torch.rand(boxes, 4, generator=g) * 0.3 + 0.2)
    return images, torch.zeros(1, *images.shape[2:], dtype=torch.bool), [target]


def theirs(name):
    """transformers' model of the same size as ours, random weights."""
    import transformers as hf
    stages = ["stage4"] if name == "detr" else ["stage2", "stage3", "stage4"]
    same = dict(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_labels=91, auxiliary_loss=True,
                backbone_config=hf.ResNetConfig(out_features=stages),
                dropout=0.1, attention_dropout=0.1, activation_dropout=0.1)           # published; theirs has the first alone
    if name == "detr":
        model = hf.DetrForObjectDetection(hf.DetrConfig(**same))
    else:
        model = hf.DeformableDetrForObjectDetection(hf.DeformableDetrConfig(
            two_stage=True, with_box_refine=True, encoder_ffn_dim=1024, decoder_ffn_dim=1024, num_queries=300, **same))
    # They freeze this backbone whole (looking for "stage.1" in names that say "stages.1"): train what ours trains.
    for parameter_name, parameter in model.named_parameters():
        if ".encoder.stages." in parameter_name:
            parameter.requires_grad_(".stages.0." not in parameter_name)
    return model


def inference(side, name, size):
    """A function that detects in one image, by "minDETR" or "transformers"."""
    model, (images, mask, _) = (build_model if side == "minDETR" else theirs)(name).eval(), photo_batch(size)

    def detect():
        with torch.no_grad():
            model(images, mask) if side == "minDETR" else model(images, pixel_mask=(~mask).long())

    return model, detect


def training(side, name, size):
    """A function that takes one step on one image: forward, matching and loss, backward, clipping and AdamW. Ours returns
    the seconds of its parts."""
    model, (images, mask, targets) = (build_model if side == "minDETR" else theirs)(name), photo_batch(size)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, **({"fused": True} if side == "minDETR" else {}))

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def their_step():
        labels = [dict(class_labels=t["labels"], boxes=t["boxes"]) for t in targets]
        model(images, pixel_mask=(~mask).long(), labels=labels).loss.backward()
        update()

    def our_step():
        parts, lap = train.stopwatch()
        hooks = [module.register_forward_hook(lambda *a, part=part: lap(part))
                 for part, module in (("backbone", model.backbone), ("encoder, with neck", model.encoder[-1]))]
        outputs = model(images, mask, targets)
        lap("decoder, with proposals")
        with timed(matcher, "match") as matching:
            loss = matcher.Criterion(model.cfg)(outputs, targets)["total"]
        lap("loss, with matching")
        loss.backward()
        lap("backward")
        update()
        lap("clip, AdamW")
        for hook in hooks:
            hook.remove()
        return parts | {"matching": matching[0]}

    return model, our_step if side == "minDETR" else their_step


def stand_by(pipe, prepare, *what):
    """A process's whole life: work and say how long it took, whenever it is asked to."""
    model, work = prepare(*what)
    pipe.send(sum(p.numel() for p in model.parameters()))
    with contextlib.suppress(EOFError):                                                    # nobody is there to ask any more
        while pipe.recv():
            started = time.perf_counter()
            parts = work()
            pipe.send((time.perf_counter() - started, parts))


def answer(pipe, side):
    """What a process says; where it has died, say so and stop."""
    try:
        return pipe.recv()
    except EOFError:
        sys.exit(f"{side}'s process has ended: see above; if nothing is said there, memory ran out: try a smaller --size")


def beside_transformers(prepare, runs, size):
    """Each in a process of its own, since what one leaves in memory speeds up the other; in turn, so that drift hits both.
    Prints the medians, and the median of the ratios."""
    if importlib.util.find_spec("transformers") is None:
        sys.exit("the peer is not there: pip install transformers")
    print(machine(runs))
    spawn = multiprocessing.get_context("spawn")
    for name in ("detr", "deformable_two_stage"):
        pipes, counts, taken, parts = {}, set(), {}, {}
        for side in ("minDETR", "transformers"):
            pipes[side], there = spawn.Pipe()
            spawn.Process(target=stand_by, args=(there, prepare, side, name, size), daemon=True).start()
            there.close()                                                          # or its end would not be noticed here
            counts.add(answer(pipes[side], side))
        if len(counts) > 1:
            sys.exit(f"{name}: {counts} parameters are not the same model")
        for round_ in range(runs + 1):                                                         # the first one warms up
            for side, pipe in pipes.items():
                pipe.send(True)
                seconds, split = answer(pipe, side)
                taken.setdefault(side, []).append(seconds)
                for part, s in (split or {}).items():
                    parts.setdefault(part, []).append(s)
        for pipe in pipes.values():
            pipe.send(False)
        for process in multiprocessing.active_children():
            process.join()
        own, peer = (taken[side][1:] for side in ("minDETR", "transformers"))
        print(f"{name}, {prepare.__name__}, short side {size}: transformers {statistics.median(peer):.2f} s, minDETR "
              f"{statistics.median(own):.2f} s, {statistics.median(a / b for a, b in zip(peer, own)):.2f} x", flush=True)
        if parts:
            print("    " + ", ".join(f"{part} {statistics.median(s[1:]) / statistics.median(own):.0%}"
                                     for part, s in parts.items()), flush=True)


@contextlib.contextmanager
def timed(module, name):
    """Yield a list in which the seconds of every call of a module's function appear."""
    function, seconds = getattr(module, name), []

    def wrapped(*args):
        started = time.perf_counter()
        result = function(*args)
        seconds.append(time.perf_counter() - started)
        return result

    setattr(module, name, wrapped)
    try:
        yield seconds
    finally:
        setattr(module, name, function)


# ============================================================================================================== memory

def peak_of(work):
    """Peak memory in MB that a fresh process uses beyond its start."""
    def child(pipe):
        torch.set_num_threads(1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
    process.start()
    process.join()
    return here.recv() if here.poll() else float("nan")


def one_step(name, size, again=False, **config):
    """A training step on two images."""
    model = build_model(name, **config)
    if again:
        train.compute_again(model)
    optimizer, criterion = torch.optim.AdamW(model.parameters(), 1e-4, fused=True), matcher.Criterion(model.cfg)
    images, mask, (target,) = photo_batch(size)
    target["labels"] = target["labels"] % model.cfg.num_classes
    criterion(model(images.expand(2, -1, -1, -1), mask.expand(2, -1, -1), [target] * 2), [target] * 2)["total"].backward()
    optimizer.step()


def bench_memory(size):
    for name in ("detr", "deformable_two_stage", "dino"):
        kept, again = (peak_of(lambda: one_step(name, size, again)) for again in (False, True))
        print(f"{name:22} 2 images of {size} x {size * 4 // 3}, ResNet-50, float32: {kept:6.0f} MB; layers computed again "
              f"{again:6.0f} MB", flush=True)
    for classes in (80, 1203, 13204):
        peak = peak_of(lambda: one_step("diffu_dino", 128, num_classes=classes, backbone="resnet18", backbone_norm="batch"))
        print(f"diffu_dino, 900 queries, 2 images of 128 x 170, ResNet-18, {classes:6} classes: {peak:6.0f} MB", flush=True)


# ================================================================================================================ data

# Sizes of COCO's photos: the most frequent, about as often.
SHAPES = [(640, 480)] * 10 + [(640, 427)] * 5 + [(480, 640)] * 3 + [(427, 640)] * 2 + [(640, 360), (500, 375), (612, 612)]


class Blank:
    """Stands for a photo where only its size matters."""

    def __init__(self, width, height):
        self.width, self.height, self.size = width, height, (width, height)

    def resize(self, size, _):
        return Blank(*size)

    def crop(self, box):
        return Blank(box[2] - box[0], box[3] - box[1])

    def transpose(self, _):
        return self


def make_photos(root, count, boxes, one_file=False):
    """A folder in COCO's layout with so many photos and boxes; toy pictures, or one tiny file under all names."""
    rng, folder = random.Random(0), Path(root) / "train2017"
    folder.mkdir(), (Path(root) / "annotations").mkdir()
    sizes = [(64, 48) if one_file else rng.choice(SHAPES) for _ in range(count)]
    for i, (w, h) in enumerate(sizes):
        path = folder / f"{i:012}.jpg"
        if not one_file or i == 0:
            generator, shapes = toy.scene(i, 640)
            toy.picture(generator, shapes, 640).resize((w, h)).save(path, quality=90)
        else:
            path.symlink_to(folder / f"{0:012}.jpg")
    images = [dict(id=10 * i + 9, file_name=f"{i:012}.jpg", width=w, height=h, license=1, date_captured="2013-11-14",
                   coco_url=f"http://images.cocodataset.org/train2017/{i:012}.jpg") for i, (w, h) in enumerate(sizes)]
    annotations = []
    for n in range(boxes):
        w, h = sizes[owner := rng.randrange(count)]
        bw, bh = rng.uniform(2, w / 2), rng.uniform(2, h / 2)
        annotations.append(dict(id=n + 1, image_id=10 * owner + 9, category_id=rng.randint(1, 80), iscrowd=0, area=bw * bh,
                                bbox=[round(v, 2) for v in (rng.uniform(0, w - bw), rng.uniform(0, h - bh), bw, bh)]))
    (Path(root) / "annotations" / "instances_train2017.json").write_text(json.dumps(dict(
        images=images, annotations=annotations, categories=[dict(id=i, name=f"thing {i}") for i in range(1, 81)])))


def recipes_batch(dataset, transform, keys):
    """DETR's published steps in their order, with the same draws: PIL, to_tensor, normalize, then padding."""
    tensors = []
    for index, seed in keys:
        photo = Image.open(dataset.path(index)).convert("RGB")
        photo, _, _ = transform(photo, *dataset.annotations(index), random.Random(seed))
        tensors.append(TF.normalize(TF.to_tensor(photo), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    h, w = (max(t.shape[side] for t in tensors) for side in (1, 2))
    images, mask = torch.zeros(len(tensors), 3, h, w), torch.ones(len(tensors), h, w, dtype=torch.bool)
    for image, blank, t in zip(images, mask, tensors):
        image[:, :t.shape[1], :t.shape[2]].copy_(t)
        blank[:t.shape[1], :t.shape[2]] = False
    return images, mask


def private_memory(pid):
    """MB of a process that it shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def bench_data(runs, photos):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        if photos == "toy":
            make_photos(root, 40, 300)
        dataset = data.CocoFolder(root if photos == "toy" else photos, transform=data.train_transform())
        order = list(BatchOrder(40, 2, 0, 0))
        recipe = functools.partial(recipes_batch, dataset, data.train_transform(exact=True))
        apart = max(((recipe(keys)[0] - data.collate([dataset[k] for k in keys])[0]) * data.STD * 255).abs().max().item()
                    for keys in order)
        seconds = bench_msda.alternate({
            "recipe": lambda: [recipe(keys) for keys in order],
            "ours": lambda: [data.collate([dataset[k] for k in keys]) for keys in order]}, runs)
        ratio = statistics.median(a / b for a, b in zip(seconds["recipe"], seconds["ours"]))
        print(f"one core, training recipe, batches of 2: recipe {40 / statistics.median(seconds['recipe']):.1f}, ours "
              f"{40 / statistics.median(seconds['ours']):.1f} images/s, {ratio:.2f} x; pixels differ by up to "
              f"{apart:.1f} of 255", flush=True)
    sizes = np.array([random.Random(i).choice(SHAPES) for i in range(4000)])
    for buckets in (0, 1, 16):
        padded = total = 0
        for batch in BatchOrder(4000, 16, 0, 0, shapes=sizes[:, 0] / sizes[:, 1], buckets=buckets):
            for micro in (batch[:2], batch[2:4]):
                photos = [data.train_transform(exact=True)(Blank(*sizes[i].tolist()), np.zeros((0, 4), np.float32), np.zeros(0, int),
                                                 random.Random(seed))[0] for i, seed in micro]
                area = len(photos) * max(p.width for p in photos) * max(p.height for p in photos)
                total, padded = total + area, padded + area - sum(p.width * p.height for p in photos)
        print(f"padded share of the pixels, 2 photos a forward pass, --buckets {buckets}: {padded / total:.1%}", flush=True)
    with tempfile.TemporaryDirectory() as root:
        peak_of(lambda: make_photos(root, 118_287, 860_001, one_file=True))     # in a process of its own, whose memory goes
        peak = peak_of(lambda: data.CocoFolder(root))
        before, started = private_memory(os.getpid()), time.process_time()
        dataset = data.CocoFolder(root)
        print(f"{dataset.summary}: loaded in {time.process_time() - started:.1f} s of a core, {peak:.0f} MB while loading, "
              f"{private_memory(os.getpid()) - before:.0f} MB kept", flush=True)
        blank, early = Image.new("RGB", (64, 48)), None
        data.read_photo = lambda path, size: blank                 # what is measured is the annotations, not the photos
        for n, _ in enumerate(data.loader(dataset, BatchOrder(len(dataset), 64, 0, 0), workers=8)):
            if n in (100, len(dataset) // 64 - 30):
                workers = [child.pid for child in multiprocessing.active_children()]
                now = [private_memory(pid) for pid in workers]
                early = early or now
        print(f"8 workers' own memory, MB each: {statistics.mean(early):.0f} after 100 batches, {statistics.mean(now):.0f} "
              f"30 before the end of an epoch ({len(dataset) // 64} batches of 64)", flush=True)


def bench_score(images, detections):
    """Random truth and detections, about half of them near an object, with crowds."""
    rng, truth, found = np.random.default_rng(0), [], []
    for i in range(images):
        count = rng.poisson(7.3)
        xy, wh, label = rng.random((count, 2)) * 400, rng.random((count, 2)) ** 2 * 200 + 5, rng.integers(0, 80, 3)
        label = rng.choice(label, count)
        boxes = np.concatenate([xy, wh], 1)
        truth += [dict(id=len(truth) + k, image_id=i, category_id=int(label[k]), bbox=boxes[k].tolist(),
                       area=float(wh[k].prod()), iscrowd=int(rng.random() < 0.01)) for k in range(count)]
        near = rng.integers(0, count, detections) if count else np.zeros(detections, int)
        guess = (boxes[near] if count else np.full((detections, 4), 50.0)) + rng.normal(size=(detections, 4)) * 8
        guess[:, 2:] = guess[:, 2:].clip(1)
        right = (rng.random(detections) < 0.5) & (count > 0)
        named = np.where(right, label[near] if count else 0, rng.integers(0, 80, detections))
        score = rng.random(detections).astype(np.float32)
        found += [dict(image_id=i, category_id=int(c), bbox=b, score=float(s))
                  for c, b, s in zip(named, guess.tolist(), score)]
    truth = dict(info={}, images=[dict(id=i, width=640, height=480) for i in range(images)],
                 annotations=[t | dict(id=n) for n, t in enumerate(truth, 1)],
                 categories=[dict(id=k, name=str(k)) for k in range(80)])
    started = time.time()
    ours = scores.coco_metrics(truth, found, list(range(images)))
    print(f"{images} images x {detections} detections: ours {time.time() - started:.1f} s", flush=True)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = truth
        gt.createIndex()
        started = time.time()
        scorer = COCOeval(gt, gt.loadRes(found), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    same = list(ours.values()) == scorer.stats.tolist()
    print(f"pycocotools {time.time() - started:.1f} s; the twelve numbers are {'equal' if same else 'NOT equal'}: "
          f"AP {ours['AP']}")
    return not same


# ================================================================================================ what a run survives

# A run of seconds that uses all that could be lost: noise, dropout, an average of the weights, evaluations.
TINY_RUN = """--variant diffu_dino --overfit 8 --batch-size 4 --micro-batch 2 --eval-every 10 --image-size 64 --max-size 64
    --queries 10 --d-model 64 --ffn 64 --heads 4 --encoder-layers 1 --decoder-layers 2 --dropout 0.1 --ema 0.9
    --workers 0 --device cpu""".split()


def quiet_run(arguments):
    """A child's whole life: `train.py` with these arguments."""
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        sys.exit(train.main(arguments))


def life(arguments, seconds=None):
    """Run train.py in a process of its own, killed (SIGKILL) after so many seconds; returns whether it was killed."""
    child = multiprocessing.get_context("fork").Process(target=quiet_run, args=(arguments,))
    child.start()
    child.join(seconds)
    killed = child.exitcode is None
    child.kill()
    child.join()
    if not killed and child.exitcode:
        sys.exit(f"a run ended with exit code {child.exitcode}")
    return killed


def bench_kill(kills, steps):
    """Every resume must start from a whole checkpoint, and the last weights equal the uninterrupted run's bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        arguments, started = [*TINY_RUN, "--steps", str(steps), "--save-steps", "1", "--out"], time.time()
        life([*arguments, str(whole)])
        whole_life, moments, done = time.time() - started, random.Random(0), []

        def go_on():
            return ["--resume", str(cut)] if list(cut.glob("last*.pth")) else [*arguments, str(cut)]

        while len(done) < kills:
            if not life(go_on(), moments.uniform(0, 1.5 * whole_life / kills)):
                sys.exit(f"the run ended after {len(done)} kills: raise --steps")
            done.append(weights.read_last(cut)[1]["step"] if cut.exists() and list(cut.glob("last*.pth")) else "start")
        life(go_on())
        a, b = (weights.read_last(run)[1] for run in (whole, cut))
        same = all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part])
        same = same and all(torch.equal(x, b["optimizer"]["state"][i][k]) for i, state in a["optimizer"]["state"].items()
                            for k, x in state.items())
        print(f"{kills} kills in a run of {steps} steps, at steps {', '.join(map(str, done))}: weights, average, optimizer "
              + ("equal the uninterrupted run's bit for bit" if same else "DIFFER from the uninterrupted run's"))
        return not same


def bench_soak(steps):
    """Memory must not grow with the steps, once the first few of the evaluations (one in 100 steps) have been."""
    with tempfile.TemporaryDirectory() as folder:
        life([*TINY_RUN, "--batch-size", "2", "--micro-batch", "1", "--eval-every", "25", "--steps", str(steps),
              "--save-steps", "100", "--out", folder + "/run"])
        lines = [json.loads(line) for line in open(folder + "/run/log.jsonl")]
        peak = {line["step"]: line["memory_mb"] for line in lines if "memory_mb" in line}
        print("peak memory of the process, MB: " + ", ".join(
            f"{peak[s]:.0f} after {s} steps" for s in (10, steps // 4, steps // 2, steps)))


# ===================================================================================== what an evaluation costs (DiffuDETR)

class Unreused(Detector):
    """The decoder as published: every evaluation projects the memory anew in every layer."""

    def project_values(self, memory):
        return None

    def decode(self, memory, values, *args, **kwargs):
        return super().decode(memory, super().project_values(memory), *args, **kwargs)


def bench_flops(runs, variant, height, width):
    """Multiply-adds (as published counts have them) and seconds at S = 1, 3, 5, 10, with equal outputs."""
    torch.manual_seed(0)
    cfg = variants.variant(variant, num_classes=80)
    reused, unreused = (kind(cfg).eval() for kind in (Detector, Unreused))
    unreused.load_state_dict(reused.state_dict())
    image, mask = torch.randn(1, 3, height, width), torch.zeros(1, height, width, dtype=torch.bool)
    sampled = 0

    def count_attention(module, inputs, output):               # grid_sample and our kernels are not in torch's table
        nonlocal sampled
        query, _, value, _ = inputs                            # per point and channel: 4 corners and the point's weight
        sampled += query.shape[0] * query.shape[1] * module.levels * module.points * value.shape[2] * value.shape[3] * 5

    def operations(model):
        nonlocal sampled
        sampled = 0
        hooks = [m.register_forward_hook(count_attention) for m in model.modules() if isinstance(m, msda.MSDeformAttn)]
        with FlopCounterMode(display=False) as counter:
            outputs = model(image, mask)
        for hook in hooks:
            hook.remove()
        return outputs, counter.get_total_flops() / 2 + sampled

    print(f"{variant}, {cfg.num_queries} queries, {height} x {width}, batch 1, float32; {platform.machine()}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}; seconds: median of {runs}")
    first = {}
    with torch.no_grad():
        for S in (1, 3, 5, 10):
            for model in (reused, unreused):
                model.cfg = cfg.but(evaluations=S)
            (a, with_reuse), (b, without) = operations(reused), operations(unreused)
            assert all(torch.equal(a[key], b[key]) for key in ("logits", "boxes"))
            seconds = bench_msda.alternate(
                {"with": lambda: reused(image, mask), "without": lambda: unreused(image, mask)}, runs)
            for name, work in (("without", without), ("with", with_reuse)):
                first.setdefault(name, work)
                step = "" if S == 1 else f"   +{(work - first[name]) / (S - 1) / first[name]:.2%} an evaluation"
                print(f"S = {S:2}, {name:7} reuse: {work / 1e9:7.1f} G multiply-adds, "
                      f"{statistics.median(seconds[name]):6.2f} s{step}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("what", choices=["msda", "infer", "train", "memory", "data", "score", "kill", "soak", "flops"])
    parser.add_argument("--runs", type=int, help="timed runs of each way (default: 5); kills (20)")
    parser.add_argument("--steps", type=int, help="steps of the runs of kill (default: 100) and soak (2,000)")
    parser.add_argument("--size", type=int, help="short side of infer, train, flops (default: 800), memory (400)")
    parser.add_argument("--images", type=int, default=5000, help="score: photos")
    parser.add_argument("--variant", default="diffu_dino", help="flops: a diffusion variant")
    parser.add_argument("--data", default="toy", help="data: toy, or a folder in COCO's layout")
    if sys.argv[1:2] == ["msda"]:
        sys.exit(bench_msda.main(sys.argv[2:]))
    args = parser.parse_args()
    runs, size = args.runs or 5, args.size or 800
    sys.exit({"infer": lambda: beside_transformers(inference, runs, size),
              "train": lambda: beside_transformers(training, runs, size), "memory": lambda: bench_memory(args.size or 400),
              "data": lambda: bench_data(runs, args.data), "score": lambda: bench_score(args.images, 300),
              "kill": lambda: bench_kill(args.runs or 20, args.steps or 100),
              "soak": lambda: bench_soak(args.steps or 2000),
              "flops": lambda: bench_flops(runs, args.variant, size, size * 1066 // 800)}[args.what]())
