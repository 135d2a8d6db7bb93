"""DiffuDETR's ablations at the small size, beside the paper's: what each choice of the diffusion is worth.

    python ablate.py                       toy shapes, two seeds, an hour or so on two CPU cores
    python ablate.py --pictures 100000     the same for hours, on a GPU

Every choice is trained and scored one at a time from the default, for every seed; those of the sampler share the
default's training. Stop it at will: the same command goes on where it was.
"""
import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import data
import eval as evaluation
import options
import train
import variants
import weights

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


def ablate(pictures, seeds, base, out):
    """Train and score every choice of ABLATIONS, one at a time from the default; tables of mean and spread over seeds.

    `base` are the options of train.py that all trainings share, among them `data`. Everything is kept in `out`: a run
    that was stopped goes on where it was, and a score is never computed twice.
    """
    scores = defaultdict(list)
    for seed in range(seeds):
        for axis, values in ABLATIONS.items():
            for place, value in enumerate(values):
                change = {axis: value} if place else {}
                trained = {} if axis in options.SAMPLING else change               # a sampler needs no training
                scores[axis, value].append(score_of(out, trained, {} if trained else change, pictures, seed, base))
                print(f"seed {seed}: {axis}={value}: AP {scores[axis, value][-1]:.4f}", flush=True)
    print(f"\ndiffu, small, {base['data']}, {pictures} training pictures, {seeds} seeds: AP in points, mean and spread "
          "(highest - lowest); difference to the default, mean over seeds of the same seed's, and its own spread")
    print(f"{'':30} {'ours':>14} {'- default':>16} {'paper':>7} {'- default':>10}")
    for axis, values in ABLATIONS.items():
        default = next(iter(values))
        for value, paper in values.items():
            ours = [100 * s for s in scores[axis, value]]
            apart = [a - 100 * b for a, b in zip(ours, scores[axis, default])]
            theirs = f"{paper:7.1f} {paper - values[default]:+10.1f}" if paper else f"{'-':>7} {'':10}"
            print(f"{axis + ' = ' + str(value):30} {statistics.mean(ours):6.1f} ({max(ours) - min(ours):4.1f}) "
                  f"{statistics.mean(apart):+8.1f} ({max(apart) - min(apart):4.1f}) {theirs}")


def score_of(out, trained, sampling, pictures, seed, base):
    """AP of a model trained with the changes `trained`, sampled with the changes `sampling`; from `out` if it is there."""
    dataset = base["data"]                                       # of a folder the whole path: others may have its last name
    place = dataset if dataset in ("toy", "coco") else str(Path(dataset).resolve()).strip("/")
    study = "-".join(str(x).replace("/", "_") for x in (place, pictures, *(v for k, v in base.items() if k != "data")))
    folder = out / study / "-".join([*(f"{k}={v}" for k, v in trained.items()), f"seed={seed}"])
    kept, name = folder / "scores.json", json.dumps(sampling)
    scores = json.loads(kept.read_text()) if kept.exists() else {}
    if name not in scores:
        if any((folder / file).exists() for file in ("last.pth", "last.prev.pth")):
            run, cfg, recipe, checkpoint = options.resumed({"resume": str(folder)})
        else:
            run, cfg, recipe = options.settle(base | trained | {
                "variant": "diffu", "preset": "small", "seed": seed, "out": str(folder), "eval_every": 10 ** 6, "steps": 1})
            recipe, checkpoint = recipe.but(steps=max(1, pictures // recipe.batch_size)), None
        if checkpoint is None or checkpoint["step"] < recipe.steps:
            train.train(run, cfg, recipe, checkpoint)
            if weights.read_checkpoint(folder / "last.pth")["step"] < recipe.steps:
                sys.exit("stopped; the same command goes on")
        model, meta = weights.load_checkpoint(weights.read_last(folder)[0], **sampling)
        transform = data.eval_transform(meta["recipe"]["image_size"], meta["recipe"]["max_size"])
        photos = data.open_data(dataset, split="val", transform=transform, category_ids=meta["category_ids"],
                                image_size=meta["recipe"]["image_size"], toy_count=500)
        scores[name] = evaluation.evaluate(model, photos, batch_size=8, progress=False)[0]["AP"]
        kept.with_suffix(".tmp").write_text(json.dumps(scores))
        kept.with_suffix(".tmp").replace(kept)                                        # whole or not at all
    return scores[name]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--pictures", type=int, default=4800, help="pictures that each training sees")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each choice")
    parser.add_argument("--data", default="toy", help="toy, coco, or a folder in COCO's layout")
    parser.add_argument("--amp", choices=("none", "bf16"), default="none", help="bf16: train under autocast")
    parser.add_argument("--backbone-weights", help="default, none or a file, as for train.py (toy shapes: none)")
    parser.add_argument("--out", type=Path, default="out/ablate", help="where runs and scores are kept")
    args = parser.parse_args()
    if min(args.pictures, args.seeds) < 1:
        parser.error("--pictures and --seeds must be at least 1")
    base = {"data": args.data, "amp": args.amp}
    if args.backbone_weights:
        base["backbone_weights"] = args.backbone_weights
    try:
        ablate(args.pictures, args.seeds, base, args.out)
    except (data.DataError, weights.WeightsError, variants.ConfigError, FloatingPointError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
