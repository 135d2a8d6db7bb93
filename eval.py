"""From a trained model to scores, boxes and pictures.

    python eval.py --weights best.pth --data coco --data-root ...      COCO's twelve numbers, and results.json
    python eval.py --weights best.pth --images cat.jpg holiday/        pictures with boxes, and predictions.json
    python eval.py --compare out/dn-toy out/dino-toy                   runs' curves together, also while they train
    python eval.py --weights diffu.pth --images cat.jpg --trajectory   and how DiffuDETR got there, from noise on

In reading order: `postprocess` (the heads' outputs become boxes in pixels: DETR, Deformable DETR and DiffuDETR),
`evaluate` (COCO metrics), `predict` (any photos), `picture_grid` (truth beside predictions), command line.
"""
import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import batched_nms, box_convert
from tqdm import tqdm

import data
import distributed
import diffusion
import options
import pictures
import variants
import weights
from scores import coco_metrics

PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")


# ==================================================================================== from the heads to boxes in pixels

def postprocess(outputs, sizes, cfg):
    """What the model says about B images -> a list of B dicts, each sorted by score, best first.

    outputs: the model's dict; read is the last layer of "logits" [L,B,Q,C] and "boxes" [L,B,Q,4] (cx, cy, w, h in 0..1)
    or, where a diffusion model gives them, its "evaluations". sizes: [B,2], height and width of the original photos in
    pixels. cfg: its class_loss, detections and ensemble_nms are read.
    Each dict: "scores" [K] in 0..1, "labels" [K], "boxes" [K,4] as x0, y0, x1, y1 in pixels, in the outputs' dtype.

    "ce" (DETR): one detection per query, its best class; the last class is "no object" and never wins. Otherwise
    (Deformable DETR and after) the best of all query-class pairs, so one query may answer twice. Neither clips.
    Diffusion (DiffuDETR's released code): every evaluation's answer, NMS per class over all, the best of it; clipped.
    """
    sampled = "evaluations" in outputs
    if sampled:
        answers = outputs["evaluations"]
    elif cfg.class_loss == "ce":
        scores, labels = outputs["logits"][-1].softmax(-1)[..., :-1].max(-1)                     # [B,Q]
        scores, query = scores.sort(dim=-1, descending=True, stable=True)
        scores, query = scores[..., :cfg.detections], query[..., :cfg.detections]
        answers = [{"scores": scores, "labels": labels.gather(-1, query),
                    "boxes": outputs["boxes"][-1].gather(1, query[..., None].expand(-1, -1, 4))}]
    else:
        answers = [diffusion.best_pairs(outputs["logits"][-1], outputs["boxes"][-1], cfg.detections)]
    scores, labels, boxes = (torch.cat([answer[key] for answer in answers], 1) for key in ("scores", "labels", "boxes"))
    limits = sizes.to(boxes).flip(-1).repeat(1, 2)                                               # [B,4]: w, h, w, h
    boxes = box_convert(boxes, "cxcywh", "xyxy") * limits[:, None]                               # [B,K,4], K of all S
    found = []
    for s, c, b, limit in zip(scores, labels, boxes, limits):
        if len(answers) > 1:
            # batched_nms shifts boxes by label * size: a hundredth of a pixel is lost in float32, none in float64.
            keep = batched_nms(b.double(), s.double(), c, cfg.ensemble_nms)[:cfg.detections]
            s, c, b = s[keep], c[keep], b[keep]
        found.append(dict(scores=s, labels=c, boxes=b.clamp(min=0).minimum(limit) if sampled else b))
    return found


@contextlib.contextmanager
def answering(model):
    """Eval mode and no gradients, then each module as it was (some may be frozen). Yields the model's device."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():        # not inference_mode: what a model caches in there could not be trained with later
            yield next(model.eval().parameters()).device
    finally:
        for module, mode in modes:
            module.training = mode


# ====================================================================================================== COCO metrics

def evaluate(model, dataset, batch_size=4, device=None, workers=0, limit=None, progress=True, table=False):
    """Run the model over a data set of data.py -> (metrics, detections).

    metrics: dict of the twelve names in scores.METRICS, 0..1; -1 where there is nothing to find (no small objects, say).
    detections: COCO's results format, [{image_id, category_id, bbox [x, y, w, h] in pixels, score}].
    device: where the images go; by default the model's. limit: only the first so many images are run and scored.
    table: print pycocotools' twelve lines. Of several processes each takes its share of the images; all get the metrics,
    and process 0 all the detections.
    """
    image_ids = list(dataset.image_ids)[:limit]
    mine = range(distributed.rank(), len(image_ids), distributed.world())
    batches = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
    detections = []
    # A head may have labels that the data set has no category for (11 of COCO's 91): their detections are dropped.
    exists = {key for key, name in zip(dataset.category_ids, dataset.classes) if name != "N/A"}
    with answering(model) as home:
        device = device or home
        for images, mask, targets in tqdm(data.loader(dataset, batches, workers, device), "evaluating", len(batches),
                                          leave=False, disable=None if progress else True):  # None: no bar in log files
            sizes = torch.stack([target["orig_size"] for target in targets])
            found = postprocess(model(images.to(device, non_blocking=True), mask.to(device)), sizes, model.cfg)
            for target, image in zip(targets, found):
                image["boxes"] = box_convert(image["boxes"], "xyxy", "xywh")
                for score, label, box in zip(*(image[key].tolist() for key in ("scores", "labels", "boxes"))):
                    key = dataset.category_ids[label]
                    if key in exists:
                        detections.append(dict(image_id=target["image_id"], category_id=key, bbox=box, score=score))
    if distributed.rank():
        distributed.gather(detections)
        return distributed.broadcast(None), []
    detections = sum(distributed.gather(detections), [])
    return distributed.broadcast(coco_metrics(dataset.ground_truth(), detections, image_ids, table)), detections


def same_names(dataset, classes, source):
    """Raise DataError if a category of the data set has another name in `classes` (by label), which `source` brought."""
    for category, theirs, ours in zip(dataset.category_ids, dataset.classes, classes):
        if theirs not in ("N/A", ours):                  # the same ids may mean other things
            raise data.DataError(f"category {category} is {theirs!r} in this data, {ours!r} in {source}: give data and "
                                 "weights with the same categories (predicting with --images needs no categories)")


# ================================================================================================ photos and pictures

def detect(model, image, size, score, watch=None):
    """Objects in one image [3,H,W] of at least `score` -> postprocess' dict, as lists; size: the photo's (w, h)."""
    with answering(model) as device:
        images = image[None].to(device)
        outputs = model(images, torch.zeros_like(images[:, 0], dtype=torch.bool), watch=watch)
        found = postprocess(outputs, torch.tensor([size[::-1]]), model.cfg)[0]
    return {key: value[found["scores"] >= score].tolist() for key, value in found.items()}


def predict(model, meta, paths, score=0.5, transform=None, folder=None, trajectory=False):
    """Find objects in photos, one by one -> a list with one dict per path.

    Each is {"file", "detections": [{"label", "category_id", "score", "bbox" [x, y, w, h] in pixels}]}, best first, from
    `score` on; or {"file", "error"} for a photo that cannot be read: the others are still done. transform:
    `data.eval_transform` of another size than the checkpoint's. folder: where to write each photo with its boxes drawn;
    trajectory: and, for a diffusion model, its boxes at every evaluation, as a strip (.png) and an animation (.webp).
    """
    transform = transform or data.eval_transform(meta["recipe"]["image_size"], meta["recipe"]["max_size"])
    classes, results, taken = meta["classes"], [], set()
    for path in map(Path, tqdm(paths, desc="predicting", leave=False, disable=None)):
        results.append(result := dict(file=str(path)))
        try:
            photo = data.read_photo(path)
        except data.DataError as error:
            result["error"] = str(error)
            continue
        image, _, _ = transform(photo, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), None)
        steps = []
        found = detect(model, data.normalised(data.to_bytes(image)), photo.size, score,
                       steps.append if trajectory else None)
        result["detections"] = [
            dict(label=classes[c], category_id=meta["category_ids"][c], score=s, bbox=[x0, y0, x1 - x0, y1 - y0])
            for s, c, (x0, y0, x1, y1) in zip(*found.values())]
        if folder is not None:
            name = path.stem
            while name in taken:                                                                    # a/1.jpg and b/1.jpg
                name += f"-{len(results)}"
            taken.add(name)
            result["picture"] = str(Path(folder) / f"{name}.jpg")
            drawn = pictures.draw(photo, found["boxes"], found["labels"], classes, found["scores"])
            drawn.save(result["picture"], quality=92)
            if trajectory:
                steps[-1]["keep"] = steps[-1]["logits"].amax(-1).sigmoid() >= score
                steps = [{k: v if k == "t" else v[0].cpu() for k, v in step.items()} for step in steps]         # of image 0
                pictures.strip(photo, steps, drawn).save(Path(folder) / f"{name}-trajectory.png")
                pictures.film(photo, steps, drawn, Path(folder) / f"{name}-trajectory.webp")
    return results


def picture_grid(model, dataset, path, count=8, score=0.5, limit=None):
    """Write one picture: `count` of the data set's photos (of the first `limit`), truth beside predictions from `score` on."""
    drawn = []
    chosen = np.unique(np.linspace(0, min(limit or len(dataset), len(dataset)) - 1, count).round()).astype(int).tolist()
    for (image,), _, (target,) in data.loader(dataset, [[i] for i in chosen]):
        photo = data.to_pil(image)
        photo.thumbnail((640, 640))
        found = {key: value[:20] for key, value in detect(model, image, photo.size, score).items()}    # the best ones
        truth = box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor(photo.size * 2)
        drawn += [pictures.draw(photo, truth.tolist(), target["labels"].tolist(), dataset.classes),
                  pictures.draw(photo, found["boxes"], found["labels"], dataset.classes, found["scores"])]
    pictures.sheet(drawn, ("ground truth", f"prediction (score {score:g} or more)") * 2).save(path)


# ======================================================================================================== command line

def main(argv=None):
    """The command line; see --help. Exits with 2 on wrong input, with 1 if a photo could not be read."""
    args = options.parse_eval(argv)
    try:
        distributed.start()
        failed = run(args)
        distributed.stop()
        sys.exit(1 if failed else 0)
    except (data.DataError, weights.WeightsError, variants.ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(args):
    """Do what the command line asks for -> how many photos could not be read."""
    if args.compare:
        out = args.out or Path("out")
        out = out if out.suffix in (".png", ".pdf", ".svg") else out / "compare.png"
        out.parent.mkdir(parents=True, exist_ok=True)
        print(*pictures.compare_runs(args.compare, out), f"curves in {out}", sep="\n")
        return 0
    if args.images and distributed.world() > 1:
        raise variants.ConfigError("several processes share the scoring of --data; --images is for one: start it without "
                                   "torchrun")
    model, meta = weights.load_checkpoint(args.weights, **args.sampling)
    if (args.trajectory or args.sampling) and model.cfg.queries != "noise":
        name = "trajectory" if args.trajectory else next(iter(args.sampling)).replace("_", "-")
        raise variants.ConfigError(f"--{name} is for diffusion models, and {args.weights} holds {meta['variant']}")
    if why := options.idle(args.sampling, model.cfg):
        raise variants.ConfigError(why)
    model.to(distributed.own_device(args.device))
    size = args.image_size or meta["recipe"]["image_size"]
    longest = round(size * meta["recipe"]["max_size"] / meta["recipe"]["image_size"])
    transform = data.eval_transform(size, args.max_size or longest)
    if args.data:
        dataset = data.open_data(args.data, args.data_root, "val", transform, meta["category_ids"], size)
        same_names(dataset, meta["classes"], str(args.weights))
        out = args.out or args.weights.parent
        out = out if out.suffix == ".json" else out / (f"results-{args.limit}.json" if args.limit else "results.json")
        out.parent.mkdir(parents=True, exist_ok=True)    # before the long run, not after it
        _, detections = evaluate(model, dataset, args.batch_size, workers=args.workers, limit=args.limit, table=True)
        if distributed.rank():
            return 0
        out.write_text(json.dumps(detections))
        part = f"on the first {args.limit} of " if args.limit and args.limit < len(dataset) else ""
        print(f"{meta['variant']}, {args.data}, {part}{len(dataset)} images: {len(detections)} detections in {out}")
        return 0
    paths, folder = [], args.out or args.weights.parent / "predictions"
    for path in map(Path, args.images):
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PHOTO_ENDINGS) if path.is_dir() else [path]
        if not inside:
            raise data.DataError(f"{path}: no photos in this folder (looked for {', '.join(PHOTO_ENDINGS)})")
        paths += inside
    if any(path.resolve().parent == folder.resolve() for path in paths):
        raise data.DataError(f"--out {folder} holds photos of --images, which it would overwrite: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    results = predict(model, meta, paths, args.score, transform, folder, args.trajectory)
    errors = [result["error"] for result in results if "error" in result]
    if len(errors) < len(results):
        (folder / "predictions.json").write_text(json.dumps(results, indent=1))
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    objects = sum(len(result.get("detections", ())) for result in results)
    where = f": pictures and predictions.json in {folder}" if len(errors) < len(results) else ""
    print(f"{len(results) - len(errors)} of {len(results)} photos, {objects} objects of score {args.score:g} or more{where}")
    return len(errors)


if __name__ == "__main__":
    main()
