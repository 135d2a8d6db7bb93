"""The speed of each part beside a peer, in one run: ratios, because a machine's speed drifts and seconds do not travel.

    python bench.py msda          deformable attention: see bench_msda.py
    python bench.py flops         DiffuDETR's operations and time by decoder evaluations, with and without reused values
"""
import argparse
import platform
import statistics
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

import bench_msda
import msda
import variants
from model import Detector

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
            seconds = bench_msda.alternate({"with": lambda: reused(image, mask), "without": lambda: unreused(image, mask)}, runs)
            for name, work in (("without", without), ("with", with_reuse)):
                first.setdefault(name, work)
                step = "" if S == 1 else f"   +{(work - first[name]) / (S - 1) / first[name]:.2%} an evaluation"
                print(f"S = {S:2}, {name:7} reuse: {work / 1e9:7.1f} G multiply-adds, "
                      f"{statistics.median(seconds[name]):6.2f} s{step}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["msda", "flops"], help="msda has options of its own: python bench.py msda --help")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each way")
    parser.add_argument("--variant", default="diffu_dino", help="flops: a diffusion variant")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("H", "W"), help="flops: pixels")
    if sys.argv[1:2] == ["msda"]:
        sys.exit(bench_msda.main(sys.argv[2:]))
    args = parser.parse_args()
    bench_flops(args.runs, args.variant, *args.size)
