"""The speed of each part beside a peer, in one run: ratios, because a machine's speed drifts and seconds do not travel.

    python bench.py msda          deformable attention: every way this machine can compute it, beside plain grid_sample
"""
import argparse
import platform
import statistics
import time

import torch

import msda
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["msda"])
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each way")
    args = parser.parse_args()
    bench_msda(args.runs)
