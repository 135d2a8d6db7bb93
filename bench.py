"""The speed of each part beside a peer, in one run: ratios, because a machine's speed drifts and seconds do not travel.

    python bench.py msda          deformable attention: every way this machine can compute it, beside plain grid_sample
    python bench.py flops         DiffuDETR's operations and time by decoder evaluations, with and without reused values
    python bench.py ablate        DiffuDETR's ablations at the small size, beside the paper's; stop and restart it at will
"""
import argparse
import json
import platform
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import eval as evaluation
import msda
import train
import variants
import weights
from model import Detector
from msda_cuda import cpu

# (h, w) of the four levels of an 800 x 1066 photo, and of a 128 x 128 toy picture.
PHOTO = [(100, 134), (50, 67), (25, 34), (13, 17)]
TOY = [(16, 16), (8, 8), (4, 4), (2, 2)]


def alternate(ways, runs):
    """Seconds of every way, {name: [runs]}: after one warm-up each, in turn, so that drift hits all of them alike."""
    seconds = {name: [] for name in ways}
    for round_ in range(runs + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def bench_msda(runs):
    """Forward, and forward with backward, at encoder and decoder shapes."""
    ways = {"grid_sample": msda.msda_grid_sample} | ({"cpu.cpp": cpu.MSDA.apply} if cpu.library() else {})
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, median of {runs}")
    for title, shapes, B, Q, M, D in [
            ("encoder, 800 x 1066 photo, batch 1", PHOTO, 1, None, 8, 32),
            ("decoder, 300 queries, batch 1", PHOTO, 1, 300, 8, 32), ("encoder, toy, batch 16", TOY, 16, None, 8, 16)]:
        S = sum(h * w for h, w in shapes)
        Q = Q or S
        value = torch.randn(B, S, M, D, requires_grad=True)
        # Around a point of the query's own, as attention looks; a part falls outside.
        locations = (torch.rand(B, Q, 1, 1, 1, 2) + 0.1 * torch.randn(B, Q, M, 4, 4, 2)).requires_grad_()
        weights = torch.rand(B, Q, M, 16).softmax(-1).view(B, Q, M, 4, 4).requires_grad_()

        def forward(op):
            with torch.no_grad():
                op(value, shapes, locations, weights)

        def both(op):
            op(value, shapes, locations, weights).sum().backward()

        for what, work in (("forward", forward), ("forward + backward", both)):
            seconds = alternate({name: (lambda op=op: work(op)) for name, op in ways.items()}, runs)
            for name, taken in seconds.items():
                ratio = statistics.median(a / b for a, b in zip(seconds["grid_sample"], taken))
                print(f"{title:36} {what:20} {name:12} {1e3 * statistics.median(taken):8.1f} ms   {ratio:5.2f} x")


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
            seconds = alternate({"with": lambda: reused(image, mask), "without": lambda: unreused(image, mask)}, runs)
            for name, work in (("without", without), ("with", with_reuse)):
                first.setdefault(name, work)
                step = "" if S == 1 else f"   +{(work - first[name]) / (S - 1) / first[name]:.2%} an evaluation"
                print(f"S = {S:2}, {name:7} reuse: {work / 1e9:7.1f} G multiply-adds, "
                      f"{statistics.median(seconds[name]):6.2f} s{step}", flush=True)


# =================================================================================================== the paper's ablations

# The paper's AP of every choice (DiffuDINO, COCO); None where it gives none. The first of each axis is the default.
ABLATIONS = {
    "noise": {"gaussian": 51.9, "sigmoid_gaussian": 50.4, "beta": 49.5},
    "schedule": {"cosine": 51.9, "linear": 51.6, "sqrt": 51.4},
    "content": {"learned": None, "memory": None},
    "time": {"add": None, "scale_shift": None},
    "evaluations": {3: 51.9, 1: 51.6, 5: 51.8, 10: 51.4},
    "sampler": {"ddim": None, "published": None},
    "eta": {0.0: None, 1.0: None},
    "renewal": {True: None, False: None},
    "survivors": {1.0: None, 0.5: None, 0.25: None},
}
SAMPLING = ("evaluations", "sampler", "eta", "renewal", "survivors")              # need no training of their own


def bench_ablate(pictures, seeds, dataset, amp, out):
    """Train and score every choice of ABLATIONS, one at a time from the default; tables of mean and spread over seeds.

    Everything is kept in `out`: a run that was stopped goes on where it was, and a score is never computed twice.
    """
    scores = defaultdict(list)
    for seed in range(seeds):
        for axis, values in ABLATIONS.items():
            for place, value in enumerate(values):
                change = {axis: value} if place else {}
                trained = {} if axis in SAMPLING else change
                scores[axis, value].append(score_of(out, trained, {} if trained else change, pictures, seed, dataset,
                                                    amp))
                print(f"seed {seed}: {axis}={value}: AP {scores[axis, value][-1]:.4f}", flush=True)
    print(f"\ndiffu, small, {dataset}, {pictures} training pictures, {seeds} seeds: AP in points, mean and spread (highest "
          "- lowest); difference to the default, mean over seeds of the same seed's, and its own spread")
    print(f"{'':30} {'ours':>14} {'- default':>16} {'paper':>7} {'- default':>10}")
    for axis, values in ABLATIONS.items():
        default = next(iter(values))
        for value, paper in values.items():
            ours = [100 * s for s in scores[axis, value]]
            apart = [a - 100 * b for a, b in zip(ours, scores[axis, default])]
            theirs = f"{paper:7.1f} {paper - values[default]:+10.1f}" if paper else f"{'-':>7} {'':10}"
            print(f"{axis + ' = ' + str(value):30} {statistics.mean(ours):6.1f} ({max(ours) - min(ours):4.1f}) "
                  f"{statistics.mean(apart):+8.1f} ({max(apart) - min(apart):4.1f}) {theirs}")


def score_of(out, trained, sampling, pictures, seed, dataset, amp):
    """AP of a model trained with the changes `trained`, sampled with the changes `sampling`; from `out` if it is there."""
    folder = out / "-".join([*(f"{k}={v}" for k, v in trained.items()), f"seed={seed}"])
    kept, name = folder / "scores.json", json.dumps(sampling)
    scores = json.loads(kept.read_text()) if kept.exists() else {}
    if name not in scores:
        if (folder / "last.pth").exists():
            run, cfg, recipe, checkpoint = train.resumed({"resume": str(folder)})
        else:
            run, cfg, recipe = train.settle(trained | {
                "variant": "diffu", "data": dataset, "seed": seed, "out": str(folder), "eval_every": 10 ** 6, "steps": 1,
                "amp": amp})
            recipe, checkpoint = recipe.but(steps=max(1, pictures // recipe.batch_size)), None
        if checkpoint is None or checkpoint["step"] < recipe.steps:
            train.train(run, cfg, recipe, checkpoint)
            if weights.read_checkpoint(folder / "last.pth")["step"] < recipe.steps:
                sys.exit("stopped; the same command goes on")
        model, meta = weights.load_checkpoint(folder / "last.pth", **sampling)
        transform = data.eval_transform(meta["recipe"]["image_size"], meta["recipe"]["max_size"])
        photos = data.open_data(dataset, split="val", transform=transform, category_ids=meta["category_ids"],
                                image_size=meta["recipe"]["image_size"], toy_count=500)
        scores[name] = evaluation.evaluate(model, photos, batch_size=8, progress=False)[0]["AP"]
        kept.write_text(json.dumps(scores))
    return scores[name]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["msda", "flops", "ablate"])
    parser.add_argument("--runs", type=int, default=5, help="msda, flops: timed runs of each way")
    parser.add_argument("--variant", default="diffu_dino", help="flops: a diffusion variant")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("H", "W"), help="flops: pixels")
    parser.add_argument("--pictures", type=int, default=4800, help="ablate: pictures a training sees; minutes to hours")
    parser.add_argument("--seeds", type=int, default=2, help="ablate: trainings of each choice")
    parser.add_argument("--data", default="toy", help="ablate: toy, coco, or a folder in COCO's layout")
    parser.add_argument("--amp", choices=("none", "bf16"), default="none", help="ablate: bf16 trains under autocast")
    parser.add_argument("--out", type=Path, default="out/ablate", help="ablate: where runs and scores are kept")
    args = parser.parse_args()
    if args.what == "msda":
        bench_msda(args.runs)
    elif args.what == "flops":
        bench_flops(args.runs, args.variant, *args.size)
    else:
        bench_ablate(args.pictures, args.seeds, args.data, args.amp, args.out)
