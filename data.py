"""Images and boxes: folders in COCO's layout, toy shapes that need no download, batches.

    image + boxes in pixels  ->  images [B,3,H,W], mask [B,H,W] (True = padding), targets: [dict]

Boxes in pixels (xyxy) stay inside this file; what leaves it is cx, cy, w, h in [0, 1] of the
un-padded image. All randomness comes from a seed that travels with a sample's index: a run repeats
with any number of workers, and resumes within an epoch. Read `Images` first: how a sample is made.
"""
import gc
import json
import math
import os
import random
import signal
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_convert
from torchvision.transforms.functional import to_pil_image

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # ImageNet's (R, G, B), on which the
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)  # backbones were pretrained


class DataError(Exception):
    """The user's data is at fault. The message names the file, image id or key, and the remedy."""


# ======================================================================= one image, one sample

def read_image(path, size=None):
    """Any image file -> PIL image, RGB, upright (EXIF orientation applied), or unrotated, if only
    that matches `size`, the (w, h) in its annotations. Raises DataError."""
    try:
        with Image.open(path) as stored:
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
        raise DataError(f"{path}: cannot be read as an image ({error}). Copy it again or remove it "
                        "from the data.") from None


def to_bytes(image):
    """PIL image, RGB -> uint8 [3,H,W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalised(image, out=None):
    """uint8 -> float32 [3,H,W] (in `out` if given); to_tensor and normalize to the last bit."""
    out = torch.empty(image.shape) if out is None else out
    return out.copy_(image).div_(255).sub_(MEAN).div_(STD)


def to_pil(image):
    """Normalised float tensor [3,H,W] -> PIL image, for people to look at."""
    return to_pil_image(((image.cpu().float() * STD + MEAN) * 255).round().clamp(0, 255).byte())


class Images(Dataset):
    """What the data sets share. Subclasses provide `image_ids`, `transform` and
    read(i) -> (PIL image, boxes float32 [n,4] xyxy in pixels, labels int64 [n])."""

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, key):
        """[(i, seed)] augments with random.Random(seed) and nothing else; plain [i] is [(i, 0)].
        Returns image uint8 [3,H,W], which `collate` normalises, and a dict: labels [n]; boxes [n,4]
        cxcywh in [0, 1]; image_id; orig_size and size [2], (h, w) as read and as returned."""
        index, seed = key if isinstance(key, tuple) else (key, 0)
        image, boxes, labels = self.read(index)
        target = dict(image_id=self.image_ids[index], orig_size=torch.tensor(image.size[::-1]))
        if self.transform:
            image, boxes, labels = self.transform(image, boxes, labels, random.Random(seed))
        boxes = box_convert(torch.from_numpy(boxes), "xyxy", "cxcywh")
        target |= dict(boxes=boxes / torch.tensor(image.size * 2), labels=torch.from_numpy(labels))
        return to_bytes(image), target | dict(size=torch.tensor(image.size[::-1]))

    def name_labels(self, categories, category_ids, file):
        """COCO's categories -> category_ids [C] (by label), classes [C], label_of {id: label}."""
        names = {record["id"]: str(record.get("name", "?")) for record in categories}
        self.category_ids = ids = sorted(names) if category_ids is None else list(category_ids)
        if strange := sorted(set(names) - set(ids)):
            raise DataError(f"{file}: category ids {strange} are not among {ids}, those of the "
                            "training images or of the checkpoint. Use data with these.")
        self.classes = [names.get(key, "N/A") for key in ids]
        self.label_of = {key: label for label, key in enumerate(ids) if key in names}


def resized(w, h, size, max_size=None):
    """(h, w) after the published resize: short side `size`, long side at most `max_size` pixels;
    with max_size 0 a square (LW-DETR).
    The rounding is part of the published numbers: the cap rounds the short side (half to even) and
    the long side is truncated, so that 640x200 becomes 1334x417, one pixel above the cap."""
    if max_size == 0:
        return size, size
    short, long = min(w, h), max(w, h)
    if max_size is not None and long / short * size > max_size:
        size = max(1, round(max_size * short / long))
    return (int(size * h / w), size) if w < h else (size, int(size * w / h))


def _resize(image, boxes, size, max_size, exact):
    (w, h), (new_h, new_w) = image.size, resized(*image.size, size, max_size)
    if exact:
        image = image.resize((new_w, new_h), Image.BILINEAR)  # antialiased, as AP needs it
    elif (new_w, new_h) != (w, h):  # the same filter in a third of the time, within 2/255
        pixels = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)  # as channels_last
        pixels = F.interpolate(pixels, (new_h, new_w), mode="bilinear", antialias=True)
        image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    return image, boxes * np.float32([new_w / w, new_h / h] * 2)  # whole pixels: the ratios differ


def _transform(image, boxes, labels, rng, size, max_size, flip, crop, exact, several):
    """One sample through `train_transform`. The order of the draws is part of a seed's meaning."""
    low, high, *firsts = (round(side * size / 800) if max_size != 0 else side
                          for side in (384, 600, 400, 500, 600))
    if flip and rng.random() < 0.5:
        boxes = boxes[:, [2, 1, 0, 3]] * np.float32([-1, 1, -1, 1])
        boxes += np.float32([image.width, 0] * 2)
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    if crop and rng.random() < 0.5:
        image, boxes = _resize(image, boxes, rng.choice(firsts), None, exact)
        w = rng.randint(low, min(image.width, high))  # both ends included
        h = rng.randint(low, min(image.height, high))
        left, top = rng.randint(0, image.width - w), rng.randint(0, image.height - h)
        image = image.crop((left, top, left + w, top + h))
        boxes = (boxes - np.float32([left, top] * 2)).clip(0, np.float32([w, h] * 2))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)  # maybe none, which teaches too
        boxes, labels = boxes[kept], labels[kept]
    if crop and several and max_size == 0:
        size = rng.choice([round(side * size / 640) for side in range(448, 897, 64)])
    elif crop and several:
        size = rng.choice([round(side * size / 800) for side in range(480, 801, 32)])
    return *_resize(image, boxes, size, max_size, exact), labels


def train_transform(size=800, max_size=1333, flip=True, crop=True, exact=False, several=True):
    """DETR's training recipe, as published at size 800: flip 0.5; then with 0.5 a resize to one of
    {480, 512, ..., 800}, long side at most max_size; else a resize to {400, 500, 600}, a random
    crop with sides from 384 to min(side, 600), then the first resize. Another `size` scales all but
    max_size. With max_size 0 (LW-DETR, at size 640) the last resize is to a square of {448, 512,
    ..., 896}, and the first ones and the crop are the same at every size. crop=False: flip, one
    scale. exact: PIL's bytes. several=False: the last resize is to `size`.
    Returns f(PIL image, boxes [n,4] xyxy, labels [n], random.Random) -> (image, boxes, labels)."""
    return partial(_transform, size=size, max_size=max_size, flip=flip, crop=crop, exact=exact,
                   several=several)


eval_transform = partial(train_transform, flip=False, crop=False, exact=True)  # only a resize


# ==================================================================== folders in COCO's layout

def _load_json(file):
    try:
        with open(file, encoding="utf-8-sig") as stream:  # with a byte order mark or without
            coco = json.load(stream, object_pairs_hook=lambda pairs: {  # outlines take gigabytes
                key: value for key, value in pairs if key != "segmentation"})
    except (ValueError, OSError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}). Write it again.") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco, dict) or not coco.get(key) or not isinstance(coco[key], list):
            raise DataError(f"{file}: '{key}' is no list, or empty. The format is explained at "
                            "https://cocodataset.org/#format-data.")
    for record in (*coco["images"], *coco["categories"]):
        if not isinstance(record, dict) or type(record.get("id")) is not int:
            raise DataError(f"{file}: {record}: its 'id' must be a whole number.")
    return coco


class CocoFolder(Images):
    """A folder in COCO's layout, whose annotations are checked when it is opened.
    category_ids: label -> category id, as a checkpoint has it; None: the file's, sorted.
    Attributes: image_ids [N], category_ids and classes [C] (names; "N/A": not in the file), summary
    (one line). Raises DataError."""

    def __init__(self, root, split="train2017", transform=None, category_ids=None):
        self.root, self.split, self.transform = root, split, transform
        self.file = os.path.join(root, "annotations", f"instances_{split}.json")
        for what in (self.file, os.path.join(root, split)):
            if not os.path.exists(what):
                raise DataError(f"{what} is missing. A folder needs train2017/, val2017/ (images) "
                                "and annotations/instances_{train2017,val2017}.json, like COCO: "
                                "https://cocodataset.org/#download. Or use 'toy'.")
        coco = _load_json(self.file)
        self.name_labels(coco["categories"], category_ids, self.file)
        self.find_images(coco["images"])
        self.take_boxes(coco["annotations"])

    def find_images(self, images):
        """COCO's list of images -> image_ids [N], names [N] (paths below root), sizes [N,2]."""
        names, sizes, folder = {}, {}, os.path.join(self.root, self.split)
        present = set(os.listdir(folder))  # one listing: a stat each takes minutes over a network
        for record in images:
            key, w, h = record["id"], record.get("width"), record.get("height")
            # LVIS mixes COCO's halves, and names an image's by its address alone.
            name = str(record.get("file_name") or "/".join(
                str(record.get("coco_url")).split("/")[-2:]))
            path = os.path.join(self.split, name)
            if name not in present and not os.path.exists(os.path.join(self.root, path)):
                path = name  # LVIS and V3Det count from the root
                if not os.path.exists(os.path.join(self.root, path)):
                    raise DataError(f"{os.path.join(folder, name)} (image id {key}) is missing. "
                                    f"Add it, or remove it from {self.file}.")
            if names.setdefault(key, path) != path:
                raise DataError(f"{self.file}: image id {key} is {names[key]} and {path}.")
            known = type(w) is type(h) is int and min(w, h) > 0
            sizes[key] = (w, h) if known else read_image(os.path.join(self.root, path)).size
        self.image_ids, self.names = list(names), np.array(list(names.values()))
        self.sizes = np.array(list(sizes.values()))

    def take_boxes(self, annotations):
        """Keep the boxes to learn from; image i's are at offsets[i] : offsets[i + 1]. As arrays:
        to read Python objects writes their reference counts, which copies them into each worker."""
        place = {key: i for i, key in enumerate(self.image_ids)}
        rows = np.empty((len(annotations), 7))
        for n, record in enumerate(annotations):
            try:
                x, y, w, h = record["bbox"]
                if not math.isfinite(x + y + w + h):
                    raise ValueError
                rows[n] = (place[record["image_id"]], self.label_of[record["category_id"]],
                           bool(record.get("iscrowd")), x, y, x + w, y + h)
            except (KeyError, TypeError, ValueError):
                raise DataError(f"{self.file}: annotation {record}: image_id and category_id must "
                                "be listed in the file, bbox four finite numbers.") from None
        (owner, labels), crowd, raw = rows[:, :2].T.astype(np.int64), rows[:, 2] > 0, rows[:, 3:]
        boxes = raw.clip(0, np.tile(self.sizes[owner], 2)).astype(np.float32)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1) & ~crowd  # COCO too has boxes without area
        clipped = kept & (abs(raw - boxes) > 0.01).any(1)  # less is rounding, to two decimals
        order = np.flatnonzero(kept)[np.argsort(owner[kept], kind="stable")]
        self.boxes, self.labels = boxes[order], labels[order]
        if not kept.any() or raw.max() <= 1:  # YOLO's boxes are shares of the image
            raise DataError(f"{self.file}: no bbox is x, y, width, height in pixels of its image.")
        self.offsets = np.searchsorted(owner[order], np.arange(len(self) + 1))
        self.summary = (f"{len(self)} images, {len(order)} boxes ({clipped.sum()} clipped to the "
                        f"image), {len(self.label_of)} classes; left out: {crowd.sum()} crowds, "
                        f"{(~kept & ~crowd).sum()} boxes without area inside it")

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

    def ground_truth(self):
        """The file as pycocotools wants it, with crowds and boxes of no area, which count there."""
        coco = _load_json(self.file)  # again: it is big, and rarely needed
        for n, record in enumerate(coco["annotations"], 1):
            # pycocotools takes annotation id 0 for "no match", and keeps one of two equal ids.
            record.update(id=n, iscrowd=int(bool(record.get("iscrowd"))))
            if record.get("area") is None:
                record["area"] = record["bbox"][2] * record["bbox"][3]
        return {"info": {}} | coco


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
    # Two colours of a picture differ by at least 57 levels (97 - 2 * 20) in some channel.
    ground, *colours = [tuple(level + rng.randint(-20, 20) for level in colour)
                        for colour in rng.sample(PALETTE, len(shapes) + 1)]
    part, across = rng.uniform(0, 1), np.linspace(-30, 30, size, dtype=np.float32)
    ramp = part * across[:, None] + (1 - part) * across  # [size,size]: lighter to one side
    noise = np.frombuffer(rng.randbytes(size ** 2 * 3), np.uint8).reshape(size, size, 3)
    pixels = np.float32(ground) + ramp[..., None] + (noise * np.float32(0.12) - 15)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    for (name, points, _), colour in zip(shapes, colours):
        # Drawn 4x as large, then averaged: PIL draws in whole pixels, and so the edges lie within
        # an eighth of a pixel of `points`, whose extremes are the box.
        low, high = np.floor(points.min(0)).astype(int), np.ceil(points.max(0)).astype(int)
        mask, points = Image.new("L", tuple((4 * (high - low)).tolist())), (points - low) * 4
        ImageDraw.Draw(mask).polygon(points.ravel().tolist(), fill=255)
        if name == "ring":
            points = points * 0.55 + points.mean(0) * 0.45
            ImageDraw.Draw(mask).polygon(points.ravel().tolist(), fill=0)
        image.paste(colour, tuple(low.tolist()), mask.reduce(4))
    return image


class ToyShapes(Images):
    """`count` pictures, `size` pixels square, drawn on the fly; picture i is from (seed, i) alone.
    What cannot learn this in minutes will not learn COCO. Attributes as in `CocoFolder`."""

    def __init__(self, count, size=128, seed=0, transform=None, category_ids=None):
        self.size, self.seed, self.transform = size, seed, transform
        self.image_ids = list(range(1, count + 1))
        self.id_of = {name: i for i, name in enumerate(OUTLINES, 1)}
        self.categories = [dict(id=i, name=name) for name, i in self.id_of.items()]
        self.name_labels(self.categories, category_ids, "toy shapes")
        self.labels, self.offsets = np.zeros(0, int), np.zeros(count + 1, int)
        self.summary = f"{count} images of {size} pixels, drawn on the fly, {len(OUTLINES)} classes"

    def read(self, i):
        rng, shapes = toy_scene(f"toy {self.seed} {i}", self.size)
        labels = np.array([self.label_of[self.id_of[name]] for name, _, _ in shapes])
        boxes = np.float32([[x, y, x + w, y + h] for _, _, (x, y, w, h) in shapes])
        return toy_picture(rng, shapes, self.size), boxes, labels

    def ground_truth(self):
        images = [dict(id=key, width=self.size, height=self.size) for key in self.image_ids]
        shapes = [(key, *shape) for i, key in enumerate(self.image_ids)
                  for shape in toy_scene(f"toy {self.seed} {i}", self.size)[1]]
        boxes = [dict(id=n, image_id=key, category_id=self.id_of[name], bbox=box, iscrowd=0,
                      area=box[2] * box[3]) for n, (key, name, _, box) in enumerate(shapes, 1)]
        return dict(info={}, images=images, annotations=boxes, categories=self.categories)


def open_data(data, data_root=None, split="train", transform=None, category_ids=None,
              image_size=128, toy_count=None):
    """The data set that a command line names: "toy", "coco" (in data_root, $COCO_ROOT or data/coco)
    or a folder; split: "train" or "val". image_size (pixels), toy_count: of the toy pictures."""
    if data_root is not None and data != "coco":
        raise DataError(f"data_root '{data_root}' is for data 'coco', not '{data}'. Omit one.")
    if data == "toy":
        count, seed = (2000, 0) if split == "train" else (200, 1)  # other seed, other pictures
        return ToyShapes(toy_count or count, image_size, seed, transform, category_ids)
    if data == "coco":
        data = data_root or os.environ.get("COCO_ROOT") or os.path.join("data", "coco")
    return CocoFolder(data, f"{split}2017", transform, category_ids)


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
    All depends on (seed, epoch) and the place in the order alone: a run that resumes after `start`
    batches sees what it would have seen. A last, smaller batch is left out, but fewer images than
    batch_size are repeated to fill one. factors: [n] of `repeat_factors`."""
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


def keep_shared(worker):
    """The garbage collector writes into all objects: a forked worker would copy its parent's."""
    gc.freeze()


def loader(dataset, batches, workers=0, device="cpu"):
    """Iterate over (images, mask, targets) on the CPU, in pinned memory if `device` is a GPU.
    batches: a `batch_order`, or lists of plain indices. Raises DataError, for a dead worker too."""
    handler = signal.getsignal(signal.SIGCHLD) if workers and os.name == "posix" else None
    try:
        feed = iter(DataLoader(  # its own generator: a resumed run draws as if it went on
            dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
            worker_init_fn=keep_shared, pin_memory=str(device).startswith("cuda"),
            generator=torch.Generator()))
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
