"""Images, boxes and masks: folders in COCO's layout, toy shapes that need no download, batches.

Boxes in pixels (xyxy) stay inside this file; what leaves it is cx, cy, w, h in [0, 1] of the
un-padded image. All randomness comes from a seed that travels with a sample's index: a run repeats
with any number of workers, and resumes within an epoch. Read `Images` first: how a sample is made.
"""
import json
import math
import os
import random
import re
import signal
from collections import Counter
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from pycocotools import mask as rle
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_convert
from torchvision.transforms.functional import pil_to_tensor

from scores import LISTS

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # ImageNet's (R, G, B), on which the
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)  # backbones were pretrained


class DataError(Exception):
    """The user's data is at fault: what is wrong where, and the remedy."""


# ======================================================================= one image, one sample

def read_image(path, size=None, head=False):
    """Any image file -> PIL image, RGB, upright (EXIF orientation applied), or unrotated, if only
    that matches `size`, the (w, h) in its annotations; head: only its size. Raises DataError."""
    try:
        with Image.open(path) as stored:
            if head:
                return stored.size[::-1 if stored.getexif().get(0x0112, 1) > 4 else 1]
            image = ImageOps.exif_transpose(stored)
            image = stored if stored.size == size != image.size else image
            if image.mode[0] == "I":  # gray of 16 bits, which convert() would clip at 255
                gray = (np.asarray(image) / 257).round().clip(0, 255)
                image = Image.fromarray(gray.astype(np.uint8))
            if image.has_transparency_data:  # convert() would forget alpha and show what it hides
                page = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(page, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, ...
        raise DataError(f"{path}: cannot be read as an image ({error}). Copy it again, or remove it"
                        " from the data.") from None


def normalised(image, out=None):
    """uint8 -> float32 [3,H,W] (in `out` if given); to_tensor and normalize to the last bit."""
    out = torch.empty(image.shape) if out is None else out
    return out.copy_(image).div_(255).sub_(MEAN).div_(STD)


class Images(Dataset):
    """What the data sets share. Subclasses provide `image_ids`, `sizes`, `transform`, `rows` and
    read(i) -> (PIL image, boxes float32 [n,4] xyxy in pixels, labels int64 [n])."""
    shapes, pngs = None, {}  # where masks are asked for: of all `rows`; files of panoptic maps
    lists, tree = {}, {}  # LVIS's fields of images, {id: {field: ids}}; V3Det's "ancestors"

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, key):
        """[(i, seed)] augments with random.Random(seed) and nothing else; plain [i] is [(i, 0)].
        Returns image uint8 [3,H,W], which `collate` normalises, and a dict: labels [n]; boxes [n,4]
        cxcywh in [0, 1]; image_id; orig_size and size [2], (h, w) as read and as returned; and
        masks [n,H,W] bool, if the data was opened with them."""
        index, seed = key if isinstance(key, tuple) else (key, 0)
        image, boxes, labels = self.read(index)
        target = dict(image_id=self.image_ids[index], orig_size=torch.tensor(image.size[::-1]))
        masks = [self.masks(index)] if self.shapes is not None else []
        if self.transform:
            image, boxes, labels, *masks = self.transform(
                image, boxes, labels, random.Random(seed), *masks)
        if masks:
            target["masks"] = masks[0]
        boxes = box_convert(torch.from_numpy(boxes), "xyxy", "cxcywh")
        target |= dict(boxes=boxes / torch.tensor(image.size * 2), labels=torch.from_numpy(labels))
        return pil_to_tensor(image), target | dict(size=torch.tensor(image.size[::-1]))

    def name_labels(self, categories, known, file):
        """COCO's categories, and `known` ones {id: name} if they count the labels -> category_ids
        and classes [C] by label; label_of {id: label} and categories {id: record} of the file."""
        names = {}
        for record in categories:  # on one line, without halves of surrogate pairs
            name = re.sub(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+", " ", str(record.get("name")))
            if names.setdefault(record["id"], name.strip()) != name.strip():
                raise DataError(f"{file}: category id {record['id']} has two names.")
        labels = known or dict(sorted(names.items()))
        for key, name in names.items():
            if labels.get(key) != name:  # the same ids may mean other things
                raise DataError(f"{file}: category {key} is {name!r}, {labels.get(key, 'unknown')} "
                                "in the training images or checkpoint: use the same categories")
        self.category_ids, self.classes = [*labels], [*labels.values()]
        self.label_of = {key: label for label, key in enumerate(labels) if key in names}
        self.categories = {record["id"]: record for record in categories}

    def ground_truth(self):
        """COCO's file of `rows` (crowds and boxes without area count too), or LVIS's or V3Det's."""
        images = [dict(id=key, width=int(w), height=int(h)) | self.lists.get(key, {})
                  for key, (w, h) in zip(self.image_ids, self.sizes)]
        boxes = [dict(id=n, image_id=self.image_ids[int(i)], bbox=box, iscrowd=int(crowd),
                      area=area, category_id=self.category_ids[int(label)])
                 for n, (i, label, crowd, area, *box) in enumerate(self.rows(), 1)]
        if self.shapes is not None and not self.pngs:
            for box, (i, *_), counts in zip(boxes, self.rows(), self.shapes):
                box["segmentation"] = dict(size=self.sizes[int(i)][::-1].tolist(), counts=counts)
        return dict(info={}, images=images, annotations=boxes, categories=[
            self.categories[key] | dict(name=self.classes[label])
            for key, label in self.label_of.items()]) | self.tree


def resized(w, h, size, max_size=None):
    """(h, w) after the published resize: short side `size`, long side at most `max_size` pixels, or
    with max_size 0 a square (LW-DETR).
    The rounding is part of the published numbers: 640x200 becomes 1334x417, above the cap."""
    if max_size == 0:
        return size, size
    short, long = min(w, h), max(w, h)
    if max_size is not None and long / short * size > max_size:
        size = max(1, round(max_size * short / long))
    return (int(size * h / w), size) if w < h else (size, int(size * w / h))


def _resize(image, boxes, masks, size, max_size, exact):
    (w, h), (new_h, new_w) = image.size, resized(*image.size, size, max_size)
    if exact:
        image = image.resize((new_w, new_h), Image.BILINEAR)  # antialiased, as AP needs it
    elif (new_w, new_h) != (w, h):  # the same filter in a third of the time, within 2/255
        pixels = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)  # as channels_last
        pixels = F.interpolate(pixels, (new_h, new_w), mode="bilinear", antialias=True)
        image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    boxes = boxes * np.float32([new_w / w, new_h / h] * 2)  # whole pixels: the ratios differ
    return image, boxes, [F.interpolate(one[None].byte(), (new_h, new_w))[0].bool()
                          for one in masks]


def _transform(image, boxes, labels, rng, *masks, size, max_size, flip=True, crop=True, exact=False,
               several=True):
    """DETR's training recipe for a sample: PIL image, boxes [n,4] xyxy, labels [n], masks [n,H,W]
    if it has them. Another `size` than 800 scales all but max_size. With max_size 0 (LW-DETR, at
    size 640) the last resize is to a square of {448, 512, ..., 896}; several=False: of `size`.
    exact: PIL's bytes. The order of the draws from `rng` is part of a seed's meaning."""
    low, high, *firsts = (round(side * size / 800) if max_size != 0 else side
                          for side in (384, 600, 400, 500, 600))
    if flip and rng.random() < 0.5:
        boxes = boxes[:, [2, 1, 0, 3]] * np.float32([-1, 1, -1, 1])
        boxes += np.float32([image.width, 0] * 2)
        image, masks = image.transpose(Image.FLIP_LEFT_RIGHT), [one.flip(2) for one in masks]
    if crop and rng.random() < 0.5:
        image, boxes, masks = _resize(image, boxes, masks, rng.choice(firsts), None, exact)
        w = rng.randint(low, min(image.width, high))  # both ends included
        h = rng.randint(low, min(image.height, high))
        left, top = rng.randint(0, image.width - w), rng.randint(0, image.height - h)
        image = image.crop((left, top, left + w, top + h))
        boxes = (boxes - np.float32([left, top] * 2)).clip(0, np.float32([w, h] * 2))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)  # maybe none, which teaches too
        boxes, labels = boxes[kept], labels[kept]
        masks = [one[torch.from_numpy(kept), top:top + h, left:left + w] for one in masks]
    if crop and several and max_size == 0:
        size = rng.choice([round(side * size / 640) for side in range(448, 897, 64)])
    elif crop and several:
        size = rng.choice([round(side * size / 800) for side in range(480, 801, 32)])
    image, boxes, masks = _resize(image, boxes, masks, size, max_size, exact)
    return image, boxes, labels, *masks


def train_transform(size=800, max_size=1333, **more):
    """f(image, boxes, labels, random.Random, masks if any), which returns them transformed: what a
    sample goes through in training. more: flip, crop, ... of `_transform`."""
    return partial(_transform, size=size, max_size=max_size, **more)


eval_transform = partial(train_transform, flip=False, crop=False, exact=True)  # only a resize


# ================================================================== folders of people's own boxes

# Words that --data knows, and what their annotation files are called.
PUBLISHED = {"coco": None, "lvis": "lvis_v1_{}.json", "v3det": "v3det_2023_v1_{}.json"}
NAMES = {"train": ("train2017", "train", "Train"),
         "val": ("val2017", "val", "valid", "validation", "Validation"),
         "both": ("default", "result", ".", "annotations")}  # CVAT's, Label Studio's, ...
FILES = ("annotations/instances_{}.json", "{}/_annotations.coco.json", "annotations/{}.json",
         "{}.json", "annotations/panoptic_{}.json",  # COCO's and CVAT's, Roboflow's, ...
         *(up + form for form in PUBLISHED.values() if form for up in ("annotations/", "")))


def find_annotations(root, split, given=None, share=None, held_out=()):
    """A split's annotation file, and whether it holds both splits. given: it, or a form of it."""
    forms = (given, f"annotations/{given}") if given else FILES
    train, val, both = (None, None, given) if given and "{}" not in str(given) else (
        next((path for name in names for form in forms
              if os.path.isfile(path := os.path.join(root, form.format(name)))), None)
        for names in NAMES.values())
    if val and share:
        raise DataError(f"--val-share {share}: {root} has a validation split, {val}. Omit it.")
    if val and split == "val" or train and split == "train" and not share:
        return val if split == "val" else train, False
    if not (train or both) or not os.path.isdir(root):
        raise DataError(what_is_it(Path(root)))
    if not share and not held_out and (train or share == 0):
        raise DataError(f"{root} has one annotation file, {train or both}, and no validation split:"
                        " --val-share 0.1 cuts one.")
    return train or both, True


def what_is_it(root):
    """A sentence on a folder without an annotation file in COCO's format."""
    if not root.is_dir():
        near = get_close_matches(root.name, [path.name for path in root.parent.glob("*")], 1)
        return (f"{root} is a file: unpack it, or give its folder, and a JSON as --annotations."
                if root.exists() else
                f"{root} is missing{f': do you mean {near[0]}?' if near else '.'}")
    text, xml = (sorted({path.parent for path in root.rglob(end)}) for end in ("*.txt", "*.xml"))
    yaml, code = next(iter(sorted(root.rglob("*.y*ml"))), root / "data.yaml"), []
    if (names := root / "classes.txt").exists() and not yaml.exists():  # Label Studio's
        code = [f"open('{yaml}', 'w').write('names: %s' % open('{names}').read().splitlines())"]
    yolo = [path for path in text if "labels" in path.relative_to(root).parts]
    for path in yolo or xml:
        split = [p for p in path.relative_to(root).parts if p not in ("labels", "Annotations")]
        images, out = str(path).replace("labels", "images"), Path(f"{root}-coco", *split[-1:])
        read = f"yolo('{images}', '{path}', '{yaml}')" if yolo else (
            f"pascal_voc('{images.replace('Annotations', 'JPEGImages')}', '{path}')")
        code.append(f"sv.DetectionDataset.from_{read}.as_coco('{out}', '{out}/{FILES[1][3:]}')")
    if yolo or xml:
        return (f"{root} is in {'YOLO' if yolo else 'Pascal VOC'} format. Convert it once and give "
                f"--data {root}-coco\n  pip install supervision && python -c \"import supervision "
                f'as sv; {"; ".join(code)}"')
    found = sorted(str(p.relative_to(root)) for p in (*root.glob("*.json"), *root.glob("*/*.json")))
    known = [form.format(name) for names in NAMES.values() for name in names for form in FILES]
    near = [f"{file} (nearest: {get_close_matches(file, known, 1, 0)[0]})" for file in found[:3]]
    return (f"{root}: which annotation file? It holds {', '.join(near or os.listdir(root)[:5])}. "
            "Give a COCO export of Roboflow, CVAT, ... as it was unpacked, or --annotations FILE.")


def _load_json(file, outlines):
    try:
        coco = json.loads(Path(file).read_bytes(), object_pairs_hook=None if outlines else (
            lambda pairs: {k: v for k, v in pairs if k != "segmentation"}))  # they take gigabytes
    except (ValueError, OSError) as error:
        raise DataError(f"{file}: cannot be read as JSON in UTF-8 ({error}). Write it again, or "
                        "save it as UTF-8 in an editor.") from None
    for key in ("images", "annotations", "categories"):
        found = coco.get(key) if isinstance(coco, dict) else None
        if not (found and isinstance(found, list) and all(isinstance(x, dict) for x in found)):
            raise DataError(f"{file}: '{key}' is no list of records, or empty. Export it in COCO's "
                            "format: https://cocodataset.org/#format-data.")
    return coco


def plain(value):
    """What a field means: a text that holds a number, truth value or list is that; 3.0 is 3."""
    try:
        value = json.loads(value.lower()) if isinstance(value, str) else value
    except ValueError:  # another text
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def segments(record):
    """A panoptic record of an image as records of its segments, with their ids for outlines. Boxes
    end at a segment's last column and row, as published, not behind them."""
    return [dict(part, image_id=record["image_id"], segmentation=str(part["id"]),
                 bbox=[x, y, w - 1, h - 1]) for part in record["segments_info"]
            for x, y, w, h in [part["bbox"]]]


def ancestors(file):
    """V3Det's category tree -> {category id: the ids of which it is a kind}."""
    tree = json.loads(Path(file).read_bytes())
    category = {node: int(key) for key, node in tree["categoryid2treeid"].items()}
    above = {key: [] for key in category.values()}
    for node, kinds in tree["ancestor2descendant"].items():
        for kind in {*kinds} & category.keys() if node in category else ():
            above[category[kind]].append(category[node])
    return above


class CocoFolder(Images):
    """A folder of images whose annotations are judged when it is opened: what has one meaning is
    kept, and counted in the summary where it is unusual; the rest is a DataError.
    known: {category id: name} by label, as of a checkpoint; None: the file's, sorted. Where one
    file has both splits, `share` of its images, drawn by `seed`, or those named in `held_out` are
    for "val". masks: samples have them. Attributes: image_ids, names [N], category_ids, classes
    [C], things (labels), pngs {image id: file of its panoptic map}, summary (a line)."""

    def __init__(self, root, split="train", transform=None, known=None, annotations=None,
                 share=None, seed=0, held_out=(), masks=False):
        self.root, self.transform, self.notes = os.path.abspath(root), transform, Counter()
        self.file, both = find_annotations(root, split, annotations, share, held_out)
        coco = _load_json(self.file, masks)
        if "segments_info" in coco["annotations"][0]:
            self.pngs = {a["image_id"]: a["file_name"] for a in coco["annotations"]}
            coco["annotations"] = [part for a in coco["annotations"] for part in segments(a)]
        for record in coco["categories"]:
            record["id"] = self.whole("category", record, "id")
        self.name_labels(coco["categories"], known, self.file)
        tree = Path(self.file).with_name("v3det_2023_v1_category_tree.json")
        self.tree = {"ancestors": ancestors(tree)} if tree.exists() else {}
        parts = NAMES[split] if not both else sorted(  # the file's own name first
            NAMES["train"] + NAMES["val"], key=lambda name: name not in os.path.basename(self.file))
        self.things = {label for key, label in self.label_of.items()
                       if self.categories[key].get("isthing", 1)}
        self.find_images(coco["images"], parts)
        self.judge(coco["annotations"])
        if masks:  # an array of text, of COCO's RLE or of segments' ids; why an array: see `judge`
            self.shapes = np.array([self.outline(record, int(i)) for record, i in zip(
                coco["annotations"], self.raw[:, 0])], np.dtypes.StringDType())
        names = self.names.tolist()
        if both and share:
            held_out = random.Random(f"val {seed}").sample(
                sorted(names), min(max(1, round(share * len(names))), len(names) - 1))
        val = {*held_out}.intersection(names if both else ())
        self.keep([i for i, name in enumerate(names)
                   if not val or (name in val) == (split == "val")])

    def refuse(self, kind, record, field, why):
        raise DataError(f"{self.file}: {kind} {record.get('id', record)}: {field} is "
                        f"{record.get(field)!r}, {why}.")

    def whole(self, kind, record, field):
        """A field that must be a whole number."""
        if type(value := plain(record.get(field))) is not int:
            self.refuse(kind, record, field, "it must be a whole number")
        self.notes[f"{field}s written as text"] += isinstance(record[field], str)
        return value

    def find_images(self, images, parts):
        """COCO's list of images -> image_ids [N], names [N] (paths below root), sizes [N,2]."""
        paths, sizes, self.lists, root = {}, {}, {}, os.path.join(self.root, "")
        folders = [os.path.dirname(os.path.abspath(self.file))] + [
            os.path.join(self.root, up, part) for part in (*parts, "default", "")
            for up in ("", "images")]
        # One listing of each: a stat for every image takes minutes over a network.
        listed = {folder: {*os.listdir(folder)} for folder in folders if os.path.isdir(folder)}
        for record in images:
            key = record.get("id") if record.get("id") and isinstance(record["id"], str) else (
                self.whole("image", record, "id"))
            if LISTS[0] in record:
                self.lists[key] = {field: record.get(field) for field in LISTS}
            # LVIS mixes COCO's halves, and tells an image's by its address alone.
            url = "/".join(str(record.get("coco_url") or "").split("/")[-2:])
            name = str(record.get("file_name") or url)
            slashed = name.replace("\\", "/")
            path = next((path for folder in listed for form in (name, slashed, url)
                         if (path := os.path.normpath(os.path.join(folder, form))).startswith(root)
                         and (form in listed[folder] or "/" in form and os.path.isfile(path))), "")
            if not path and (os.path.isabs(name) or ".." in slashed.split("/")):
                self.refuse("image", record, "file_name", f"which leaves the folder {self.root}")
            if not path:
                near = get_close_matches(name, {*sum(map(list, listed.values()), [])}, 1)
                raise DataError(f"{name} (image id {key}) is missing below {self.root}"
                                f"{''.join(f', nearest: {other}' for other in near)}. Add it, or "
                                f"remove it from {self.file}.")
            if paths.setdefault(key, path) != path:
                raise DataError(f"{self.file}: image id {key} is {paths[key]} and {path}.")
            sides = [0 if record.get(side) in (None, "") else self.whole("image", record, side)
                     for side in ("width", "height")]
            if min(sides) <= 0:  # VIA's -1
                self.notes["sizes read from the images"] += 1
                sides = read_image(path, head=True)
            sizes[key] = sides
        self.image_ids, self.sizes = [*paths], np.array([*sizes.values()])
        self.names = np.array([path.removeprefix(root) for path in paths.values()])

    def judge(self, annotations):
        """Every annotation -> a row of raw [A,8], as `rows` gives them. As an array: to read Python
        objects writes their reference counts, which copies them into each worker."""
        place = {key: i for i, key in enumerate(self.image_ids)}
        self.raw = np.empty((len(annotations), 8))
        for n, record in enumerate(annotations):
            box, crowd, area = (plain(record.get(key)) for key in ("bbox", "iscrowd", "area"))
            box = [v if type(v) is float else plain(v) for v in box] if type(box) is list else []
            if len(box) != 4 or not all(type(v) in (int, float) and abs(v) < 1e99 for v in box):
                self.refuse("annotation", record, "bbox", "it must be four finite numbers")
            if crowd not in (None, "", 0, 1):
                self.refuse("annotation", record, "iscrowd", "it must be 0 or 1")
            if type(area) not in (int, float) or not 0 <= area < 1e99:
                self.notes["areas recomputed"] += record.get("area") is not None
                area = box[2] * box[3]
            self.raw[n] = (self.listed(record, "image_id", place), self.listed(
                record, "category_id", self.label_of), crowd or 0, area, *box)

    def outline(self, record, i):
        """An annotation's polygons or RLE as COCO's compressed RLE; or a segment's id."""
        (w, h), shape = self.sizes[i].tolist(), record.get("segmentation")
        if self.pngs:
            return shape
        try:
            if isinstance(shape, list):  # pycocotools takes two corners for a box
                shape = rle.merge(rle.frPyObjects([line for line in shape if len(line) > 5], h, w))
            elif isinstance(shape["counts"], list):
                shape = rle.frPyObjects(shape, h, w)
            if [*shape["size"]] == [h, w]:
                return rle.merge([shape])["counts"].decode()
        except (TypeError, KeyError, ValueError, IndexError):  # absent, empty, another format
            pass
        self.refuse("annotation", record, "segmentation", f"it must be polygons or RLE of {w}x{h} "
                    "pixels: export outlines, or omit --masks")

    def listed(self, record, field, table):
        """What a table has for an id of an annotation, also where one is a text, one a number."""
        key = record.get(field)
        if type(key) not in (int, float, str) or key not in table:
            other = plain(key) if type(key) in (int, float, str) else None
            key = next((form for form in (other, str(other)) if form in table), None)
            if key is None:
                self.refuse("annotation", record, field, "it must be listed in the file")
            self.notes["ids written as text"] += 1
        return table[key]

    def keep(self, chosen):
        """Keep these images alone, and their boxes to learn from: i's are offsets[i] and on."""
        place = np.full(len(self), -1)
        place[chosen] = np.arange(len(chosen))
        self.image_ids = [self.image_ids[i] for i in chosen]
        self.names, self.sizes = self.names[chosen], self.sizes[chosen]
        self.raw[:, 0] = place[self.raw[:, 0].astype(np.int64)]
        rows = self.raw[:, 0] >= 0
        self.raw = raw = self.raw[rows]
        self.shapes = None if self.shapes is None else self.shapes[rows]
        (owner, labels), crowd = raw[:, :2].T.astype(np.int64), (raw[:, 2] > 0) & (not self.pngs)
        corners = np.hstack([raw[:, 4:6], raw[:, 4:6] + raw[:, 6:]])
        boxes = corners.clip(0, np.tile(self.sizes[owner], 2)).astype(np.float32)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1) & ~crowd  # COCO too has boxes without area
        beyond = abs(corners - boxes).max(1)  # pixels; under 0.01 is rounding, to two decimals
        order = np.flatnonzero(kept)[np.argsort(owner[kept], kind="stable")]
        self.boxes, self.labels, self.order = boxes[order], labels[order], order
        self.offsets = np.searchsorted(owner[order], np.arange(len(self) + 1))
        notes = [f", {count} {what}" for what, count in self.notes.items() if count]
        self.summary = (f"{len(self)} images, {len(order)} boxes ({(kept & (beyond > 0.01)).sum()} "
                        f"clipped to the image), {len(self.label_of)} classes; left out: "
                        f"{crowd.sum()} crowds, {(~kept & ~crowd).sum()} boxes without area inside "
                        f"it{''.join(notes)}")
        for bad, why in ((abs(raw[:, 4:]).max(initial=0) <= 1, "all boxes lie inside one pixel"),
                         ((beyond > 1).sum() > len(raw) / 2, "most boxes leave their image"),
                         (not len(order), "no box is left")):
            if bad:
                raise DataError(f"{self.file}: {why} ({self.summary}). A bbox is x, y, width and "
                                "height in pixels: not fractions (YOLO), not x0, y0, x1, y1 (VOC).")

    def path(self, i):
        return os.path.join(self.root, self.names[i])

    def read(self, i):
        w, h = self.sizes[i].tolist()
        image = read_image(self.path(i), (w, h))
        if image.size != (w, h):
            raise DataError(f"{self.path(i)} (image {self.image_ids[i]}) is {image.width}x"
                            f"{image.height}, but {w}x{h} in {self.file}. Correct one of them.")
        return image, *self.annotations(i)

    def annotations(self, i):
        """Boxes [n,4] xyxy inside the image and labels [n], as copies."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.boxes[span].copy(), self.labels[span].copy()

    def masks(self, i):
        """The masks of its boxes, bool [n,H,W]."""
        shapes = self.shapes[self.order[self.offsets[i]:self.offsets[i + 1]]].tolist()
        w, h = self.sizes[i].tolist()
        if self.pngs:
            seen = self.panoptic(i)[0]
            masks = [seen == int(one) for one in shapes]
        else:
            masks = [rle.decode(dict(size=(h, w), counts=one)) for one in shapes]
        return torch.from_numpy(np.array(masks, bool).reshape(-1, h, w))

    def panoptic(self, i):
        """Its segments' ids, int64 [H,W], from the PNG's colours; {id: (label, is it a crowd)}."""
        name, (folder, _) = self.pngs[self.image_ids[i]], os.path.splitext(self.file)
        paths = os.path.join(folder, name), os.path.join(self.root, os.path.basename(folder), name)
        png = read_image(next(filter(os.path.exists, paths), paths[0]))
        rows = self.raw[:, 0] == i
        ids = map(int, self.shapes[rows].tolist())
        return np.asarray(png).astype(np.int64) @ (1, 256, 256 ** 2), dict(
            zip(ids, map(tuple, self.raw[rows, 1:3].astype(int).tolist())))

    def rows(self):
        """Every annotation: image's index, label, is it a crowd, area, x, y, w, h."""
        return self.raw.tolist()


# ================================================================================== toy shapes

def _outline(corners, start, radii=(1.0,)):
    angle = math.radians(start) + np.arange(corners) * 2 * math.pi / corners
    return np.resize(radii, (corners, 1)) * np.stack([np.cos(angle), np.sin(angle)], 1)  # [k,2]


OUTLINES = {"circle": _outline(48, 0), "square": _outline(4, 45), "triangle": _outline(3, -90),
            "star": _outline(10, -90, (1.0, 0.45)), "ring": _outline(48, 0)}
PALETTE = [(r, g, b) for r in (30, 128, 225) for g in (30, 128, 225) for b in (30, 128, 225)]


def toy_scene(key, size):
    """1 to 6 shapes, partly behind each other, from `key` alone -> (random.Random to go on drawing
    with, list of (name, outline [k,2], tight box [x,y,w,h])), in pixels of a square of `size`."""
    rng, shapes, hidden = random.Random(key), [], []  # hidden: share of each box behind others
    for _ in range(rng.randint(1, 6)):
        name = rng.choice(list(OUTLINES))
        for _ in range(20):  # tries to find a place; in a full picture the shape is left out
            turn = rng.uniform(-0.3, 0.3)
            cos, sin = math.cos(turn), math.sin(turn)
            points = OUTLINES[name] @ np.array([[cos, sin], [-sin, cos]])
            points -= points.min(0)
            points *= size * rng.uniform(0.12, 0.5) / points.max()  # the box's longer side
            w, h = points.max(0).tolist()
            x, y = rng.uniform(0, size - w), rng.uniform(0, size - h)
            behind = [part + max(0, min(x + w, X + W) - max(x, X))
                      * max(0, min(y + h, Y + H) - max(y, Y)) / (W * H)
                      for part, (_, _, (X, Y, W, H)) in zip(hidden, shapes)]
            if max(behind, default=0) <= 0.3:  # about half of a shape stays in sight at worst
                shapes.append((name, points + [x, y], [x, y, w, h]))
                hidden = behind + [0]
                break
    return rng, shapes


def toy_picture(rng, shapes, size):
    """The scene as a PIL image: shapes, later ones on top, on a shaded and noisy ground."""
    ground, *colours = [tuple(level + rng.randint(-20, 20) for level in colour)
                        for colour in rng.sample(PALETTE, len(shapes) + 1)]
    part, across = rng.uniform(0, 1), np.linspace(-30, 30, size, dtype=np.float32)
    ramp = part * across[:, None] + (1 - part) * across  # [size,size]: lighter to one side
    noise = np.frombuffer(rng.randbytes(size ** 2 * 3), np.uint8).reshape(size, size, 3)
    pixels = np.float32(ground) + ramp[..., None] + (noise * np.float32(0.12) - 15)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    for (name, points, _), colour in zip(shapes, colours):
        # Drawn 4x as large, then averaged: PIL's edges lie on whole pixels.
        low, high = np.floor(points.min(0)).astype(int), np.ceil(points.max(0)).astype(int)
        mask, points = Image.new("L", tuple((4 * (high - low)).tolist())), (points - low) * 4
        ImageDraw.Draw(mask).polygon(points.ravel().tolist(), fill=255)
        if name == "ring":
            points = points * 0.55 + points.mean(0) * 0.45
            ImageDraw.Draw(mask).polygon(points.ravel().tolist(), fill=0)
        image.paste(colour, tuple(low.tolist()), mask.reduce(4))
    return image


class ToyShapes(Images):
    """`count` pictures, `size` pixels square; picture i is drawn from (seed, i) alone."""

    def __init__(self, count, size=128, seed=0, transform=None, known=None):
        self.size, self.seed, self.transform = size, seed, transform
        self.image_ids = list(range(1, count + 1))
        self.sizes, self.names = [(size, size)] * count, np.array([], str)  # no files
        self.name_labels([dict(id=i, name=name) for i, name in enumerate(OUTLINES, 1)],
                         known, "toy shapes")
        self.labels, self.offsets = np.zeros(0, int), np.zeros(count + 1, int)
        self.summary = f"{count} images of {size} pixels, drawn on the fly, {len(OUTLINES)} classes"

    def read(self, i):
        rng, shapes = toy_scene(f"toy {self.seed} {i}", self.size)
        labels = np.array([self.classes.index(name) for name, _, _ in shapes])
        boxes = np.float32([[x, y, x + w, y + h] for _, _, (x, y, w, h) in shapes])
        return toy_picture(rng, shapes, self.size), boxes, labels

    def rows(self):
        return [(i, self.classes.index(name), 0, w * h, x, y, w, h) for i in range(len(self))
                for name, _, (x, y, w, h) in toy_scene(f"toy {self.seed} {i}", self.size)[1]]


def open_data(data, data_root=None, split="train", transform=None, known=None, image_size=128,
              toy_count=None, masks=False, **where):
    """The data set that a command line names: "toy" (image_size, toy_count: its pictures'); "coco"
    (in data_root, $COCO_ROOT or data/coco), "lvis", "v3det"; or a folder (where: `CocoFolder`)."""
    if data_root is not None and data not in PUBLISHED:
        raise DataError(f"--data-root {data_root} is for --data coco, lvis or v3det: omit it.")
    if data == "toy":
        if masks:
            raise DataError("toy pictures have no masks: give --data a folder with outlines")
        count, seed = (2000, 0) if split == "train" else (200, 1)  # other seed, other pictures
        return ToyShapes(toy_count or count, image_size, seed, transform, known)
    if data in PUBLISHED:
        where["annotations"] = where.get("annotations") or PUBLISHED[data]
        data = data_root or os.environ.get(f"{data.upper()}_ROOT") or os.path.join("data", data)
    return CocoFolder(data, split, transform, known, masks=masks, **where)


# =========================================================================== order and batches

def repeat_factors(dataset, threshold):
    """How often an image comes in an epoch, on average [N] (LVIS, Gupta 2019, appendix B): the
    largest of max(1, sqrt(threshold / f)) over its classes, for the share f of images with it."""
    owner = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    image, label = np.unique(np.stack([owner, dataset.labels]), axis=1)
    share, factors = np.bincount(label) / len(dataset), np.ones(len(dataset))
    np.maximum.at(factors, image, np.sqrt(threshold / share[label]))
    return factors


def batch_order(n, batch_size, seed, epoch, start=0, factors=None):
    """The batches of one training epoch over n images: a list of lists of (index, sample seed).
    A run that resumes after `start` batches sees what it would have seen. A last, smaller batch is
    left out, but too few images are repeated to fill one. factors: [n] of `repeat_factors`."""
    rng, order = random.Random(f"order {seed} {epoch}"), list(range(n))
    if factors is not None:
        # Lengths along a ruler, on which evenly spaced marks, from a random start, pick the images:
        # i comes factors[i] times, up or down to a whole number by chance.
        ends, n = np.cumsum(factors), round(float(factors.sum()))
        marks = (np.arange(n) + rng.random()) * ends[-1] / n
        order = np.searchsorted(ends, marks, side="right").tolist()
    rng.shuffle(order)
    samples = [(order[place % n], random.Random(f"sample {seed} {epoch} {place}").getrandbits(32))
               for place in range(start * batch_size, max(n // batch_size, 1) * batch_size)]
    return [samples[i:i + batch_size] for i in range(0, len(samples), batch_size)]


def collate(batch):
    """List of samples -> images float32 [B,3,H,W] normalised, mask [B,H,W] bool (True = padding),
    targets. Padding lies right and bottom and is zero after normalisation: the mean colour."""
    h, w = (max(image.shape[side] for image, _ in batch) for side in (1, 2))
    images, mask = torch.zeros(len(batch), 3, h, w), torch.ones(len(batch), h, w).bool()
    for i, (image, _) in enumerate(batch):
        normalised(image, images[i, :, :image.shape[1], :image.shape[2]])
        mask[i, :image.shape[1], :image.shape[2]] = False
    return images, mask, [target for _, target in batch]


def loader(dataset, batches, workers=0, device="cpu"):
    """Iterate over (images, mask, targets) on the CPU, in pinned memory if `device` is a GPU.
    batches: a `batch_order`, or lists of plain indices. Raises DataError, for a dead worker too."""
    handler = signal.getsignal(signal.SIGCHLD) if workers and os.name == "posix" else None
    try:
        feed = iter(DataLoader(  # its own generator: a resumed run draws as if it went on
            dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
            pin_memory=str(device).startswith("cuda"), generator=torch.Generator()))
        if handler is not None:  # torch's would report a dead worker at any line of a step;
            signal.signal(signal.SIGCHLD, handler)  # this one: when the next batch is asked for
        yield from feed
    except DataError as error:  # from a worker it comes after a stack trace
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise DataError(f"A worker that loads images died, mostly for want of memory ({error}). Use"
                        " --workers 0, fewer of them, or smaller images or batches.") from None
