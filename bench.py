"""The speed and cost of each part, beside a peer in one run: ratios, because seconds drift and do not travel.

    python bench.py msda          deformable attention: every way this machine can compute it, beside plain grid_sample
    python bench.py kill          a run killed at 20 random moments and resumed, beside one that was left alone
    python bench.py soak          the memory of a run of 2,000 steps
"""
import argparse
import contextlib
import io
import json
import multiprocessing
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import msda
import train
import weights
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
        print(f"{kills} kills in a run of {steps} steps, at steps {', '.join(map(str, done))}: weights, average and optimizer "
              + ("equal the uninterrupted run's bit for bit" if same else "DIFFER from the uninterrupted run's"))
        return same


def bench_soak(steps):
    """Memory must not grow with the steps."""
    with tempfile.TemporaryDirectory() as folder:
        life([*TINY_RUN, "--eval-every", "100", "--steps", str(steps), "--save-steps", "100", "--out", folder + "/run"])
        lines = [json.loads(line) for line in open(folder + "/run/log.jsonl")]
        peak = {line["step"]: line["memory_mb"] for line in lines if "memory_mb" in line}
        print("peak memory of the process, MB: " + ", ".join(
            f"{peak[s]:.0f} after {s} steps" for s in (10, steps // 10, steps // 2, steps)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["msda", "kill", "soak"])
    parser.add_argument("--runs", type=int, help="timed runs of each way (default: 5); kills (20)")
    parser.add_argument("--steps", type=int, help="steps of the runs of kill (default: 150) and soak (2,000)")
    args = parser.parse_args()
    if args.what == "msda":
        bench_msda(args.runs or 5)
    elif args.what == "kill":
        sys.exit(not bench_kill(args.runs or 20, args.steps or 150))
    elif args.what == "soak":
        bench_soak(args.steps or 2000)
