"""The speed of each part beside a peer, in one run: ratios, because a machine's speed drifts and seconds do not travel.

    python bench.py msda          deformable attention: every way this machine can compute it, beside plain grid_sample
    python bench.py flops         DiffuDETR's operations and time by decoder evaluations, with and without reused values
"""
import argparse
import platform
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

import msda
import variants
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["msda", "flops"])
    parser.add_argument("--runs", type=int, default=5, help="msda, flops: timed runs of each way")
    parser.add_argument("--variant", default="diffu_dino", help="flops: a diffusion variant")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("H", "W"), help="flops: pixels")
    args = parser.parse_args()
    if args.what == "msda":
        bench_msda(args.runs)
    else:
        bench_flops(args.runs, args.variant, *args.size)
