"""From a trained model to scores, boxes and images with boxes drawn on them.

    python eval.py --weights best.pth --data my/boxes                 COCO's numbers, results.json
    python eval.py --weights best.pth --images cat.jpg holiday/       boxes drawn, predictions.json
    python eval.py --weights diffu.pth --images toy --trajectory      and the way there from noise
    python eval.py --weights best.pth --export model.onnx             for other programs
    python eval.py --compare out/dn-toy out/dino-toy                  runs' curves, while they train
    python eval.py --queries out/detr-toy                             where each query looks
"""
import argparse
import json
import os
import sys
from array import array
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools import mask as rle
from scipy.ndimage import uniform_filter1d
from torchvision.ops import batched_nms, box_convert
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks
from tqdm import tqdm

import data
import diffusion
import masks
import matcher
import msda
import runs
import scores
import variants
import weights

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
RESULTS = "predictions.json"
SCORE = 0.3  # what is shown, if nothing else is asked for
COLOURS = [f"hsv({222.5 * i % 360:.0f}, 70%, 100%)" for i in range(1000)]  # neighbours differ


# ========================================================================================= scores

def postprocess(outputs, sizes, cfg):
    """What the model says about B images of sizes [B,2] (height, width in pixels) -> a list of B
    dicts: "scores" [K] in 0..1, best first, "labels" [K] and "boxes" [K,4] (x0, y0, x1, y1 in the
    images' pixels), "query" [K]. DETR ("ce"): each query's best class but the last, "no object".
    After it: the best query-class pairs. Diffusion: those of all steps after NMS, clipped."""
    if "sampled" in outputs:
        answers = outputs["sampled"]
    elif cfg.class_loss == "ce":
        logits, boxes = outputs["logits"][-1], outputs["boxes"][-1]
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)  # [B,Q]
        scores, query = scores.topk(min(cfg.detections, scores.shape[1]))
        answers = [{"scores": scores, "labels": labels.gather(1, query), "query": query,
                    "boxes": boxes.gather(1, query[..., None].expand(-1, -1, 4))}]
    else:
        logits, boxes = outputs["logits"][-1], outputs["boxes"][-1]
        answers = [diffusion.best_pairs(logits, boxes, cfg.detections)]
    scores, labels, boxes, queries = (torch.cat([answer[key] for answer in answers], 1)
                                      for key in ("scores", "labels", "boxes", "query"))
    limits = sizes.to(boxes).flip(-1).repeat(1, 2)  # [B,4]: w, h, w, h
    boxes = box_convert(boxes, "cxcywh", "xyxy") * limits[:, None]  # [B,K,4], K of all steps
    found = []
    for s, c, b, q, limit in zip(scores, labels, boxes, queries, limits):
        if len(answers) > 1:
            # batched_nms shifts boxes by label * size: that costs float32 a hundredth of a pixel.
            keep = batched_nms(b.double(), s.double(), c, cfg.ensemble_nms)[:cfg.detections]
            s, c, b, q = s[keep], c[keep], b[keep], q[keep]
        b = b.clamp(min=0).minimum(limit) if "sampled" in outputs else b
        found.append({"scores": s, "labels": c, "boxes": b, "query": q})
    return found


@torch.no_grad()  # not inference_mode: what a model caches could not be trained with
def answer(model, images, mask, sizes, score=0, watch=None, things=None):
    """`postprocess` of a batch, from `score` on, as lists, with masks as RLE if the model draws
    them; it is left in eval mode. things: their labels, if a panoptic map is wanted."""
    device, answers = next(model.eval().parameters()).device, []
    outputs = model(images.to(device, non_blocking=True), mask.to(device), watch=watch)
    inside = torch.stack([(~mask[:, :, 0]).sum(1), (~mask[:, 0]).sum(1)], 1).tolist()  # h, w
    for i, found in enumerate(postprocess(outputs, sizes, model.cfg)):
        own, size, query = inside[i], sizes[i].tolist(), found.pop("query")
        kept = found["scores"] >= score
        answers.append({key: value[kept].tolist() for key, value in found.items()})
        if model.cfg.masks:
            drawn = outputs["masks"](torch.full_like(query[kept], i), query[kept])
            answers[i]["masks"] = masks.instance_masks(drawn, own, size)
            if things is not None:  # in the queries' order, as published
                order = query[kept].argsort()
                order = order[found["scores"][kept][order] > masks.SURE]
                answers[i]["panoptic"] = masks.merge(found["labels"][kept][order], drawn[order],
                                                     own, size, things)
    return answers


def evaluate(model, dataset, batch_size=4, workers=0, limit=None, progress=True, table=False):
    """Run the model over a data set of data.py, or its first `limit` images -> its scores, by
    `scores.metrics` and, on panoptic maps, `panoptic_quality`; the detections as rows [D,7], as
    scores.py has them; and their masks, a list. Processes share the images; all get all of it."""
    image_ids, counts, drawn = list(dataset.image_ids)[:limit], [], []
    things = dataset.things if dataset.pngs else None
    mine = range(runs.rank(), len(image_ids), runs.world())
    batches = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
    found, indices = array("d"), iter(mine)
    loader = data.loader(dataset, batches, workers, next(model.parameters()).device)
    show = progress and runs.rank() == 0
    for images, mask, targets in runs.progress(loader, "evaluating", len(batches), show):
        sizes = torch.stack([target["orig_size"] for target in targets])
        for one, i in zip(answer(model, images, mask, sizes, things=things), indices):
            if "panoptic" in one:
                counts.append(scores.panoptic_counts(*dataset.panoptic(i), *one.pop("panoptic")))
            for sure, label, (x0, y0, x1, y1), *mask_of in zip(*one.values()):
                # A head may have labels without a category in this data (11 of COCO's 91).
                if (key := dataset.category_ids[label]) in dataset.label_of:
                    found.extend((i, key, sure, x0, y0, x1 - x0, y1 - y0))
                    drawn += mask_of
    found = np.concatenate([np.reshape(share, (-1, 7)) for share in runs.gather(found)])
    drawn, counts = (sum(runs.gather(part), []) for part in (drawn, counts))
    metrics = None
    if runs.rank() == 0:
        metrics = scores.metrics(dataset.ground_truth(), found, image_ids, drawn, table)
        metrics |= scores.panoptic_quality(counts, dataset.things, table) if counts else {}
    return runs.gather(metrics)[0], found, drawn


# ============================================================= images with boxes drawn, and curves

class Finder:
    """A trained model that takes images as people have them; `load` gives one."""

    def __init__(self, model, meta, image_size=None):
        recipe, self.model, self.meta = meta["recipe"], model, meta
        self.size = image_size or recipe["image_size"]  # short side; the long side's is in scale
        self.longest = round(self.size * recipe["max_size"] / recipe["image_size"])  # 0: squares
        self.transform = data.eval_transform(self.size, self.longest)

    def __call__(self, images, score=SCORE, batch_size=4, watch=None):
        """Objects in a path, a PIL image or an array [H,W,3] (uint8, RGB) -> a dict of lists, best
        first: scores, labels, names, boxes (x0, y0, x1, y1 in pixels). Of a list: a list."""
        if not isinstance(images, (list, tuple)):
            return self([images], score, batch_size, watch)[0]
        found = []
        for start in range(0, len(images), batch_size):
            batch = [data.read_image(image) if isinstance(image, (str, os.PathLike)) else
                     image if isinstance(image, Image.Image) else Image.fromarray(np.array(image))
                     for image in images[start:start + batch_size]]
            none = np.zeros((0, 4), np.float32), np.zeros(0), None  # boxes, labels, randomness
            resized = [self.transform(image.convert("RGB"), *none)[0] for image in batch]
            pixels, mask, _ = data.collate([(data.pil_to_tensor(image), {}) for image in resized])
            sizes = torch.tensor([image.size[::-1] for image in batch])
            found += answer(self.model, pixels, mask, sizes, score, watch)
        return [one | {"names": [self.meta["classes"][c] for c in one["labels"]]} for one in found]

    def open(self, name, root=None, split="val", annotations=None):
        """The data set of that name, for this model and by its labels: `data.open_data`."""
        labels = dict(zip(self.meta["category_ids"], self.meta["classes"]))
        return data.open_data(
            name, root, split, self.transform, labels, self.size, annotations=annotations,
            held_out=self.meta["held_out"], masks=self.model.cfg.masks)


def load(weights_file, device=None, image_size=None, **changes):
    """A detector from anybody's checkpoint: load("best.pth")("a.jpg"). changes: Config's fields."""
    model, meta = weights.load_checkpoint(weights_file, **changes)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Finder(model.to(runs.own_device(device)), meta, image_size)


def files_of(images):
    """The image files in files and folders, all the way down but in folders of earlier predictions,
    and the names of the other files."""
    taken, left = [], []
    for path in map(Path, images):
        if not path.exists():
            raise data.DataError(f"--images {path}: there is no such file or folder")
        for file in sorted(filter(Path.is_file, path.rglob("*"))) if path.is_dir() else [path]:
            fits = file == path or file.suffix.lower() in IMAGE_ENDINGS and not (
                file.name.startswith("._") or (file.parent / RESULTS).exists())  # ._: macOS' own
            (taken if fits else left).append(file)
    return taken, [file.name for file in left]


def predict(finder, images, folder, score=SCORE, trajectory=False, batch_size=4):
    """Find objects in image files, folders or ["toy"] -> a dict per file, as in predictions.json:
    "file", "picture" (drawn) and "detections", best first, bbox in pixels; or "file", "error"."""
    results, classes, ids = [], finder.meta["classes"], finder.meta["category_ids"]
    if images == ["toy"]:
        toys = data.open_data("toy", split="val", image_size=finder.size, toy_count=8)
        sources, left = [(Path(f"toy-{i}"), toys.read(i)[0]) for i in range(8)], []
    else:
        files, left = files_of(images)
        sources = [(file, None) for file in files]
    if folder.resolve() in (path.resolve().parent for path, _ in sources):
        raise data.DataError(f"--out {folder} holds images of --images: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    size = 1 if trajectory else batch_size
    batches = [sources[i:i + size] for i in range(0, len(sources), size)]
    for chunk in runs.progress(batches, "predicting", len(batches)):
        batch, steps = [], []
        for path, image in chunk:
            results.append(result := {"file": str(path)})
            try:
                batch.append((result, image or data.read_image(path)))
            except data.DataError as error:
                result["error"] = str(error)
                tqdm.write(f"error: {error}", file=sys.stderr)
        found = finder([image for _, image in batch], score, size, steps.append)
        for (result, image), one in zip(batch, found):
            result["detections"] = [
                {"label": classes[c], "category_id": ids[c], "score": sure,
                 "bbox": [x0, y0, x1 - x0, y1 - y0]}
                for sure, c, (x0, y0, x1, y1) in zip(one["scores"], one["labels"], one["boxes"])]
            for detection, mask in zip(result["detections"], one.get("masks", ())):
                detection["segmentation"] = mask
            name = Path(result["file"]).stem
            while (picture := folder / f"{name}.jpg").exists():  # a/1.jpg and b/1.jpg
                name += "-2"
            result["picture"] = str(picture)
            drawn = draw(image, classes, one)
            drawn.save(picture, quality=92)
            if trajectory:
                steps[-1]["keep"] = steps[-1]["logits"].amax(-1).sigmoid() >= score
                draw_trajectory(image, steps, drawn, folder / f"{name}-trajectory.png")
    (folder / RESULTS).write_text(json.dumps(results, indent=1))
    if left:
        print(f"left out: {len(left)} files ({', '.join(left[:5] + ['...'] * (len(left) > 5))})")
    return results


def picture_grid(model, dataset, path, chosen, score=SCORE):
    """Write one sheet: the images of these indices, truth beside predictions."""
    panels = []
    for i in chosen:
        image, target = dataset[i]
        pixels, mask, _ = data.collate([(image, target)])
        image = to_pil_image(image)
        image.thumbnail((640, 640))
        truth = box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor(image.size * 2)
        truth = {"boxes": truth.tolist(), "labels": target["labels"].tolist()}
        (found,) = answer(model, pixels, mask, torch.tensor([image.size[::-1]]), score)
        panels += [("ground truth", draw(image, dataset.classes, truth)),
                   (f"score {score:g} or more", draw(image, dataset.classes, found))]
    sheet(panels, 4).save(path)


def draw(image, classes, found):
    """A copy of a PIL image, enlarged if small, with what is in it: a dict of boxes [K, 4] (xyxy in
    pixels, best first), labels and, where there are some, scores and masks (RLE). Names in the way
    of better ones are smaller or absent."""
    image, labels, sure = image.convert("RGB"), found["labels"], found.get("scores")
    colours = [COLOURS[label % 1000] for label in labels]
    if found.get("masks"):
        shapes = torch.from_numpy(rle.decode(found["masks"])).permute(2, 0, 1).bool()
        image = to_pil_image(draw_segmentation_masks(pil_to_tensor(image), shapes, 0.5, colours))
    zoom = max(1, round(480 / max(image.size)))
    image = ImageOps.scale(image, zoom)
    (width, height), longest, pen = image.size, max(image.size), ImageDraw.Draw(image)
    boxes = [np.clip(np.multiply(box, zoom), 0, (width - 1, height - 1) * 2)
             for box in found["boxes"]]
    for box, colour in zip(boxes, colours):
        pen.rectangle([*box], outline=colour, width=max(3, longest // 250))
    texts = []  # their places: x0, y0, x1, y1
    for n, (x0, y0, _, _) in enumerate(boxes):
        text = classes[labels[n]][:40] + (f" {sure[n]:.2f}" if sure else "")
        for share in (1, 0.7):
            font = ImageFont.load_default(share * max(13, longest / 45))
            w, h = pen.textlength(text, font) + 6, font.size * 1.3
            x, y = max(min(x0, width - w), 0), max(y0 - h, 0)  # above the box, inside the image
            if all(x + w <= a or c <= x or y + h <= b or d <= y for a, b, c, d in texts):
                texts.append((x, y, x + w, y + h))
                pen.rectangle(texts[-1], fill=colours[n])
                pen.text((x + 3, y + h / 2), text, "black", font, anchor="lm")
                break
    return image


def draw_trajectory(image, steps, detections, path):
    """From noise to detections (an image), side by side, as `watch` saw the steps. A query that
    starts again from noise, or is no detection, is thin."""
    image, last = (ImageOps.contain(x, (480, 480)) for x in (image, detections))
    panels = []
    for n, step in enumerate([steps[0] | {"boxes": steps[0]["references"]}, *steps]):
        boxes = box_convert(step["boxes"][0], "cxcywh", "xyxy").cpu().clamp(0, 1)
        pen = ImageDraw.Draw(panel := image.copy())
        for query, (kept, box) in enumerate(zip(step["keep"][0].tolist(), boxes)):
            pen.rectangle((box * torch.tensor(image.size * 2)).tolist(),
                          outline=COLOURS[query % 1000], width=3 if kept else 1)
        title = f"step {n}: {step['keep'].sum()} of {step['keep'].numel()} kept" if n else "noise"
        panels.append((f"{title}, t = {step['t']}", panel))
    sheet([*panels, ("detections", last)], len(panels) + 1).save(path)


def sheet(panels, columns):
    """(title, PIL image) pairs in rows of so many columns -> one white page."""
    w, h = (max(sides) + 12 for sides in zip(*(image.size for _, image in panels)))
    page = Image.new("RGB", (columns * w, -(-len(panels) // columns) * (h + 32)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(20)
    for n, (title, image) in enumerate(panels):
        x, y = n % columns * w + w // 2, n // columns * (h + 32) + 32
        page.paste(image, (x - image.width // 2, y + (h - image.height) // 2))
        pen.text((x, y - 12), title, "black", font, anchor="mm")
    return page


def read_log(path):
    """log.jsonl -> a function of a key, whose steps and values it returns [2,N]."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in lines if line.endswith("}")]  # half a line: killed
    return lambda key: np.array([(line["step"], line[key]) for line in lines
                                 if line.get(key, -1) >= 0]).reshape(-1, 2).T  # AP -1: no value


def smoothed(values):
    """The mean over a thirtieth of the run around each value."""
    return uniform_filter1d(values, max(1, len(values) // 30), mode="nearest")


def plot(charts, out):
    """A chart of every {title: {label: (steps, values)}}, the values smoothed."""
    from matplotlib.figure import Figure  # not pyplot: no display; here: slow to import
    figure = Figure(figsize=(13, 5), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(1, len(charts)), charts.items()):
        for n, (label, (steps, values)) in enumerate(curves.items()):
            if len(steps):
                axis.plot(steps, smoothed(values), f"C{n}", label=f"{label}: {values[-1]:.3g}",
                          marker="." if len(steps) < 50 else "")
                axis.legend()
        axis.set(title=title, xlabel="step")
        axis.set(**{"yscale": "log"} if "loss" in title else {"ylim": (0, None)})
        axis.grid(alpha=0.3, which="both")
    figure.savefig(out, dpi=130)


def plot_curves(log, out):
    """Draw a run's log.jsonl: losses and COCO AP over steps -> an image file."""
    series, losses = read_log(log), ("loss", "loss_class", "loss_bbox", "loss_giou")
    plot({"training loss": {key: series(key) for key in losses},
          "AP": {key: series(key) for key in ("AP", "AP50")}}, out)


def compare_runs(folders, out):
    """Draw runs' class losses (with their kind, as "ce") and APs together -> a line for every pair
    of runs: when one beats the other's lowest (smoothed) class loss."""
    losses, scores, found = {}, {}, []
    for folder in map(Path, folders):
        kind = json.loads((folder / "run.json").read_text())["config"]["class_loss"]
        series, run = read_log(folder / "log.jsonl"), f"{folder} ({kind})"
        losses[run], scores[run] = series("loss_class"), series("AP")
    for mine, other in permutations([run for run in losses if losses[run].size], 2):
        (steps, values), lowest = losses[mine], smoothed(losses[other][1]).min()
        below = steps[smoothed(values) < lowest]
        found.append(f"{mine} {'beats' if len(below) else 'never beats'} the lowest class loss of "
                     f"{other}, {lowest:.4g}" + (f", at step {below[0]:.0f}" if len(below) else ""))
    plot({"class loss": losses, "AP": scores}, out)
    return found


@torch.no_grad()
def query_habits(model, dataset, batch_size=4, workers=0, limit=None):
    """What each query does over a data set's images -> (centres [N, Q, 2] of its boxes in [0, 1],
    scores [K] of near misses: boxes whose best IoU with an object is 0.3 to 0.5)."""
    device, centres, near = next(model.eval().parameters()).device, [], []
    count = min(limit or len(dataset), len(dataset))
    batches = [range(count)[i:i + batch_size] for i in range(0, count, batch_size)]
    for images, mask, targets in data.loader(dataset, batches, workers, device):
        outputs = model(images.to(device), mask.to(device))
        boxes, logits = outputs["boxes"][-1].cpu(), outputs["logits"][-1].cpu()
        softmax = model.cfg.class_loss == "ce"
        scores = (logits.softmax(-1)[..., :-1] if softmax else logits.sigmoid()).amax(-1)
        centres.append(boxes[..., :2])
        for box, score, target in zip(boxes, scores, targets):
            if len(target["boxes"]):
                iou = matcher.overlaps(box[:, None], target["boxes"])[0].amax(1)
                near.append(score[(iou >= 0.3) & (iou < 0.5)])
    least = min(batch.shape[1] for batch in centres)  # proposals of a small image may be fewer
    return torch.cat([batch[:, :least] for batch in centres]), torch.cat([torch.zeros(0), *near])


def draw_queries(folders, out, batch_size=4, workers=0, limit=None, device=None):
    """Query specialization (DETR, section 4.3): a panel for every run of each query's mean centre
    over the images that the run is scored on, coloured by how far it strays from there -> a line a
    run: that, and how many near misses score above 0.5 (DINO's contrast should reject them). Where
    queries start from proposals or noise, a query is a rank or a draw, and only the last counts."""
    from matplotlib.figure import Figure
    figure, lines = Figure(figsize=(5.5 * len(folders), 5), layout="constrained"), []
    for axis, folder in zip(figure.subplots(1, len(folders), squeeze=False)[0], folders):
        finder = load(Path(folder) / "best.pth", device)
        if finder.model.cfg.detector != "detr":
            raise variants.ConfigError(f"--queries {folder}: faster_rcnn has none")
        run = json.loads((Path(folder) / "run.json").read_text())["run"]
        split, count = ("train", run["overfit"]) if run["overfit"] else ("val", limit)
        dataset = finder.open(run["data"], run["data_root"], split, run.get("annotations"))
        centres, near = query_habits(finder.model, dataset, batch_size, workers, count)
        x, y = centres.mean(0).T
        strays = (centres - centres.mean(0)).norm(dim=-1).mean(0)
        points = axis.scatter(x, y, c=strays, vmin=0, cmap="viridis")
        figure.colorbar(points, label="mean distance from there, in image sides")
        axis.set(title=f"{folder}: {len(x)} queries", xlim=(0, 1), ylim=(1, 0), aspect="equal")
        lines.append(f"{folder}: a query strays {strays.mean():.3f} of a side from its mean centre;"
                     f" {(near > 0.5).sum()} of {len(near)} near misses score above 0.5")
    figure.savefig(out, dpi=130)
    return lines


# ============================================================================= for other programs

class Exported(torch.nn.Module):
    """images [B,3,H,W], mask [B,H,W] and, of a diffusion model, noise [S+1,B,Q,4] -> logits [B,Q,C]
    and boxes [B,Q,4] of the last layer: what `postprocess` reads."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, mask, noise=None):
        outputs = self.model(images, mask, generator=noise)
        return outputs["logits"][-1], outputs["boxes"][-1]


def export(model, size, path):
    """Write the model for square images of `size` pixels, any number at a time: .onnx or .pt2."""
    images, cfg, batch = torch.randn(2, 3, size, size), model.cfg, torch.export.Dim("batch")
    inputs, shapes = (images, images[:, 0] > 9), ({0: batch}, {0: batch})
    if cfg.reference == "noise":
        inputs += (torch.randn(cfg.sampling_steps + 1, 2, cfg.num_queries, 4),)
        shapes += ({1: batch},)
    before, msda.BACKEND = msda.BACKEND, "torch"  # grid_sample, which others know
    try:
        model = torch.export.export(Exported(model.cpu().eval()), inputs, dynamic_shapes=shapes)
        if path.suffix == ".pt2":
            torch.export.save(model, path)
        else:  # its optimizer leaves graphs that onnxruntime refuses
            torch.onnx.export(
                model, f=path, dynamo=True, optimize=False, dynamic_shapes=shapes, verbose=False,
                external_data=False, input_names=["images", "mask", "noise"],
                output_names=["logits", "boxes"])
    except ImportError as error:
        raise variants.ConfigError(f"--export: {error}: pip install onnx onnxscript") from None
    finally:
        msda.BACKEND = before


# =================================================================================== command line

def run(argv):
    """Do what the command line asks for -> the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    what, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    what.add_argument("--data", help="score a data set: coco, lvis, v3det, toy, or a folder")
    what.add_argument("--images", nargs="+", help="find objects in images, folders of them, or toy")
    what.add_argument("--export", type=Path, help="write the model as a file .onnx or .pt2")
    what.add_argument("--compare", nargs="+", metavar="RUN", help="draw the curves of these runs")
    what.add_argument("--queries", nargs="+", metavar="RUN", help="draw where their queries look")
    add("--out", type=Path, help="a folder; with --data, a .json file; with --compare, an image")
    add("--weights", type=Path, help="a checkpoint: of train.py, or a published one")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--image-size", type=int, help="short side in pixels, with --export the square's (default: "
        "the checkpoint's)")
    add("--annotations", help="with --data: the annotation file (default: searched for)")
    add("--data-root", help="with --data coco, lvis or v3det: where it is")
    add("--batch-size", type=int, default=4, help="images at a time")
    add("--workers", type=int, default=2, help="with --data: processes that read them")
    add("--limit", type=int, help="with --data: only the first so many images")
    add("--score", type=float, default=SCORE, help=f"the least to show (default: {SCORE})")
    add("--trajectory", action="store_true", help="with --images: from noise to boxes")
    for name in variants.SAMPLING:
        runs.add_field(parser, variants.FIELDS[name])
    args = runs.parse_args(parser, argv)
    if not (args.compare or args.queries or args.weights):
        parser.error("--weights is missing: which checkpoint?")
    for name, least in dict(image_size=1, batch_size=1, limit=1, workers=0, score=0).items():
        if not least <= (least if getattr(args, name) is None else getattr(args, name)):
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    runs.start()
    if args.compare or args.queries:
        out = args.out or Path("out/compare.png" if args.compare else "out/queries.png")
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = compare_runs(args.compare, out) if args.compare else draw_queries(
            args.queries, out, args.batch_size, args.workers, args.limit, args.device)
        print(*lines, f"picture: {out}", sep="\n")
        return 0
    sampling = {k: v for k in variants.SAMPLING if (v := getattr(args, k)) is not None}
    finder = load(args.weights, args.device, args.image_size, **sampling)
    model, why = finder.model, variants.idle(sampling, finder.model.cfg)
    if args.trajectory and model.cfg.reference != "noise":
        why = "--trajectory is for diffusion models: omit it"
    if args.export and model.cfg.detector != "detr":
        why = "--export is for the DETR family, not for faster_rcnn"
    if why:
        raise variants.ConfigError(why)
    if args.export:
        side = args.image_size or finder.longest or finder.size  # holds any image, padded
        export(model, side, args.export)
        print(f"images of {side} x {side} pixels: {args.export}")
        return 0
    if args.images:
        out = runs.numbered(args.out or args.weights.parent / "predictions", RESULTS)
        results = predict(finder, args.images, Path(out), args.score, args.trajectory,
                          args.batch_size)
        failed = sum("error" in result for result in results)
        print(f"{len(results) - failed} of {len(results)} photos: {out}")
        return int(failed > 0 or not results)
    dataset = finder.open(args.data, args.data_root, annotations=args.annotations)
    out = args.out or args.weights.parent
    if out.suffix != ".json":
        out /= f"results-{args.limit}.json" if args.limit else "results.json"
    out.parent.mkdir(parents=True, exist_ok=True)  # before the long run, not after it
    _, found, drawn = evaluate(model, dataset, args.batch_size, args.workers, args.limit,
                                table=True)
    if runs.rank() == 0:
        lines = map(json.dumps, scores.records(found, dataset.image_ids, drawn))
        out.write_text("[" + ",\n".join(lines) + "]")
        count = len(dataset.image_ids[:args.limit])
        picture_grid(model, dataset, out.with_suffix(".png"), range(min(8, count)), args.score)
        print(f"{count} of {len(dataset)} images: {out}, and {out.stem}.png of the first of them")
    runs.stop()
    return 0


def main(argv=None):
    """The command line -> exit code: 2 after wrong input, 1 if an image is unreadable."""
    try:
        return run(argv)
    except (data.DataError, weights.WeightsError, variants.ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
