"""Photos and boxes: folders in COCO's layout, toy shapes that need no download, transforms, batches.

    photo + boxes in pixels  ->  images [B,3,H,W], mask [B,H,W] (True = padding), targets: list of dicts

Boxes in pixels (xyxy) stay inside this file; what leaves it is cx, cy, w, h in [0, 1] of the un-padded image. All
randomness comes from a seed that travels with a sample's index: a run repeats with any number of workers, and resumes
in the middle of an epoch. What is wrong with somebody's files becomes a `DataError` that says what to do about it.
Read in this order: `Photos` (how a sample is made), the transforms (DETR, Carion 2020), the two data sets, the batches.
"""
import gc
import json
import os
import random
import signal
from array import array
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_convert
from torchvision.transforms.functional import to_pil_image

import toy

# ImageNet's mean and deviation (R, G, B), with which the pretrained backbones were fed; [3,1,1]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

class DataError(Exception):
    """Something is wrong with the user's data. The message names the file, image id or key, and what to do next."""

# ============================================================================================ one photo, one sample
def read_photo(path, size=None):
    """Any picture file -> PIL image, mode RGB, upright (EXIF orientation applied). Raises DataError naming the file.
    size: the (w, h) in its annotations. Most tools annotate the upright photo, some the pixels as stored: where only
    those have this size, they are returned. (Half turns and square photos fit both ways; they are taken upright.)"""
    try:
        with Image.open(path) as stored:
            photo = ImageOps.exif_transpose(stored)
            photo = stored if stored.size == size != photo.size else photo
            if photo.mode == "F" or photo.mode.startswith("I"):  # gray of 16 or 32 bits: convert() would clip it at 255
                gray = np.nan_to_num(np.asarray(photo, np.float64)).clip(0)
                # "I" mostly holds 16 bits; beyond them, and for floats, there is no agreed white: the brightest pixel
                white = 65535 if photo.mode != "F" and gray.max() <= 65535 else max(gray.max(), 1e-12)
                photo = Image.fromarray((gray * (255 / white)).round().astype(np.uint8))
            if photo.has_transparency_data:  # convert() would forget alpha and show what lies under it. White is the
                white = Image.new("RGBA", photo.size, "white")  # page on which cut-outs and diagrams are drawn.
                photo = Image.alpha_composite(white, photo.convert("RGBA"))
            return photo.convert("RGB")
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise DataError(f"{path}: cannot be read as a photo ({error}). Check the path; if the file is damaged or cut "
                        f"short, copy or download it again, or remove it from the data.") from None

def to_bytes(image):
    """PIL image, RGB -> uint8 [3,H,W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

def normalised(image, out=None):
    """uint8 [3,H,W] -> float32 [3,H,W] (written to `out`, a part of a batch): torchvision's to_tensor and normalize to the
    last bit, but with the bytes turned and made float in one pass and the rest in place."""
    out = torch.empty(image.shape) if out is None else out
    return out.copy_(image).div_(255).sub_(MEAN).div_(STD)

def to_pil(image):
    """Normalised float tensor [3,H,W] -> PIL image, for people to look at."""
    return to_pil_image(((image.cpu().float() * STD + MEAN) * 255).round().clamp(0, 255).byte())

class Photos(Dataset):
    """What both data sets share. They bring `image_ids`, `transform` and read(i) -> (PIL image, boxes xyxy, labels)."""
    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, key):
        """[(i, seed)] augments with random.Random(seed) and nothing else; plain [i] is [(i, 0)].
        Returns image uint8 [3,H,W], which `collate` normalises, and a dict: labels int64 [n]; boxes float32 [n,4] cxcywh in
        [0, 1] of this image; image_id int; orig_size and size int64 [2], (h, w) of the photo and of this image.
        A DataError is returned, not raised: raised in a worker it would end in a stack trace. `loader` raises it."""
        index, seed = key if isinstance(key, tuple) else (key, 0)
        try:
            image, boxes, labels = self.read(index)
        except DataError as error:
            return error
        orig_size = torch.tensor(image.size[::-1])
        if self.transform:
            image, boxes, labels = self.transform(image, boxes, labels, random.Random(seed))
        boxes = box_convert(torch.from_numpy(boxes), "xyxy", "cxcywh") / torch.tensor(image.size * 2)
        return to_bytes(image), dict(labels=torch.from_numpy(labels), boxes=boxes, image_id=self.image_ids[index],
                                     orig_size=orig_size, size=torch.tensor(image.size[::-1]))

# ============================================================================================ transforms
def resized(w, h, size, max_size=None):
    """(h, w) after the published resize: short side `size`, long side at most `max_size` (None: no cap) pixels.
    The rounding is part of the published numbers: the cap rounds the short side (half to even) and the long side is
    truncated, so that 640x200 becomes 1334x417, one pixel above the cap."""
    short, long = min(w, h), max(w, h)
    if max_size is not None and long / short * size > max_size:
        size = max(1, round(max_size * short / long))
    if short == size:
        return h, w
    return (int(size * h / w), size) if w < h else (size, int(size * w / h))

def _resize(image, boxes, size, max_size, exact):
    (w, h), (new_h, new_w) = image.size, resized(*image.size, size, max_size)
    if (new_w, new_h) != (w, h):  # the kernel widens when it reduces (antialias); without that, AP is lost
        if exact:
            image = image.resize((new_w, new_h), Image.BILINEAR)
        else:  # the same filter, coarser weights, a third of the time; a byte of 1,600 differs by 1 of 255
            rows = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)              # and stays so in memory
            rows = F.interpolate(rows, (new_h, new_w), mode="bilinear", antialias=True).permute(0, 2, 3, 1)
            image = Image.fromarray(rows[0].numpy())
    return image, boxes * np.float32([new_w / w, new_h / h] * 2)  # true ratios: whole pixels make them differ a little

def _transform(image, boxes, labels, rng, size, max_size, flip, crop, exact):
    """One sample through `train_transform`. The order of the draws is part of what a seed means."""
    scaled = lambda pixels: round(pixels * size / 800)
    if flip and rng.random() < 0.5:
        boxes = np.float32([image.width, 0, image.width, 0]) + boxes[:, [2, 1, 0, 3]] * np.float32([-1, 1, -1, 1])
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    if crop and rng.random() < 0.5:
        image, boxes = _resize(image, boxes, scaled(rng.choice((400, 500, 600))), None, exact)
        w = rng.randint(scaled(384), min(image.width, scaled(600)))  # both ends included
        h = rng.randint(scaled(384), min(image.height, scaled(600)))
        left, top = rng.randint(0, image.width - w), rng.randint(0, image.height - h)
        image = image.crop((left, top, left + w, top + h))
        boxes = (boxes - np.float32([left, top] * 2)).clip(0, np.float32([w, h] * 2))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)  # possibly none: an image without boxes teaches too
        boxes, labels = boxes[kept], labels[kept]
    if crop:
        size = scaled(rng.choice(range(480, 801, 32)))
    return *_resize(image, boxes, size, max_size, exact), labels

def train_transform(size=800, max_size=1333, flip=True, crop=True, exact=False):
    """The DETR family's training recipe (datasets/coco.py of DETR), as published when size is 800.
    Flip 0.5; then with 0.5 a resize to one of {480, 512, ..., 800}, long side at most max_size; otherwise a resize to
    {400, 500, 600}, a random crop with sides from 384 to min(side, 600), then the first resize. For another `size` all
    these numbers are multiplied by size/800 and rounded; max_size stays. crop=False: only the flip and one scale.
    exact: PIL's bytes, where torch's are within 2/255.
    Returns f(PIL image, boxes float32 [n,4] xyxy pixels, labels [n], random.Random) -> (image, boxes, labels); not a
    closure, because workers that are not forked (macOS, Windows) get it by pickle."""
    return partial(_transform, size=size, max_size=max_size, flip=flip, crop=crop, exact=exact)

def eval_transform(size=800, max_size=1333):
    """The published evaluation, a resize and nothing random. Same kind of callable as `train_transform`."""
    return train_transform(size, max_size, flip=False, crop=False, exact=True)

# ============================================================================================ COCO's layout
TREE = """{root}: {what} is missing. The folder must look like this:
    train2017/   val2017/                                                             photos to learn from, to test on
    annotations/instances_train2017.json   annotations/instances_val2017.json         their boxes, in COCO's format"""
DOWNLOAD = "\nCOCO is at https://cocodataset.org/#download: 2017 Train images, Val images, Train/Val annotations."

def _load_json(file, hook=None):
    try:
        with open(file, "rb") as stream:  # bytes: json finds the encoding itself, also after a byte order mark
            coco = json.load(stream, object_hook=hook)
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{file}: not JSON ({error}). If it was cut short, write or download it again.") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco, dict) or not isinstance(coco.get(key), list) or key == "categories" and not coco[key]:
            raise DataError(f"{file}: not in COCO's format (https://cocodataset.org/#format-data): no '{key}' listed.")
    return coco

def _field(record, key, kind, who):
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{who}: '{key}' is {value!r}, not {'a whole number' if kind is int else 'text'}. Correct it.")
    return value

def _label_map(categories, category_ids, where):
    """COCO's categories -> (label -> category id, label -> name, {category id: label}); see `CocoFolder`."""
    names = {_field(record, "id", int, f"{where}: a category"): str(record.get("name", "?")) for record in categories}
    ids = sorted(names) if category_ids is None else list(category_ids)  # ids may have gaps (COCO's do), labels not
    if len(names) < len(categories):
        raise DataError(f"{where}: two categories have the same id. Give each its own.")
    if strange := sorted(set(names) - set(ids)):
        raise DataError(f"{where}: category ids {strange} are not among those that the model was trained on ({ids}). "
                        f"Use data with these, or train a new head.")
    return ids, [names.get(key, "N/A") for key in ids], {key: label for label, key in enumerate(ids)}

class _Taken(int):
    """Stands for an annotation whose numbers were taken; no file can contain one."""
    __slots__ = ()

class CocoFolder(Photos):
    """A folder in COCO's layout (TREE), checked when it is opened so that no run stops in its third hour.
    category_ids: label -> category id. None: the file's ids, sorted. A checkpoint's list, to keep its labels: the
    published heads' label IS the category id, so theirs is range(91).
    Attributes: image_ids [N], category_ids [C], classes [C] (names; "N/A" where the file has none), summary (one line,
    with what was repaired). Raises DataError for what cannot be repaired.
    Annotations leave only their numbers while the file is parsed (COCO's outlines take gigabytes), in a few arrays: Python
    objects would be copied into every forked worker, page by page, because reading one writes its reference count."""
    def __init__(self, root, split="train2017", transform=None, category_ids=None):
        self.root, self.transform, folder = root, transform, os.path.join(root, split)
        self.file = file = os.path.join(root, "annotations", f"instances_{split}.json")
        if not os.path.isfile(file) or not os.path.isdir(folder):
            what, is_coco = folder if os.path.isfile(file) else file, "coco" in os.path.abspath(root).lower()
            raise DataError(TREE.format(root=root, what=what) + DOWNLOAD * is_coco)
        ids, owner, kind, crowd, xywh = [], [], [], [], array("d")  # of the annotations

        def take(record):
            """A sound annotation leaves its numbers there and becomes its place among them; other records stay."""
            box, image, category = (record.get(key) for key in ("bbox", "image_id", "category_id"))
            if not (type(image) is type(category) is int and isinstance(box, list) and len(box) == 4
                    and all(isinstance(v, (int, float)) and abs(v) < 1e300 for v in box)):            # nor NaN
                return record
            ids.append(record.get("id")), owner.append(image), kind.append(category), xywh.extend(box)
            crowd.append(bool(record.get("iscrowd")))
            return _Taken(len(ids) - 1)

        coco = _load_json(file, take)
        for record in (record for record in coco["annotations"] if type(record) is not _Taken):
            who = f"{file}: annotation {record.get('id') if isinstance(record, dict) else record!r}"
            _field(record, "image_id", int, who), _field(record, "category_id", int, who)
            raise DataError(f"{who}: bbox {record.get('bbox')!r} is not four finite numbers (x, y, w, h). Correct it.")
        mine = np.array(coco["annotations"], np.int64)                       # other lists may hold the like
        ids, owner, kind, crowd = ([column[i] for i in mine] for column in (ids, owner, kind, crowd))
        self.category_ids, self.classes, label_of = _label_map(coco["categories"], category_ids, file)
        known = {record["id"] for record in coco["categories"]}

        images = {}  # id -> record
        for record in coco["images"]:
            key = _field(record, "id", int, f"{file}: an image")
            if record.get("coco_url") and "file_name" not in record:  # LVIS, whose halves mix those of COCO
                record["file_name"] = os.path.join(*record["coco_url"].split("/")[-2:])
            name = _field(record, "file_name", str, f"{file}: image {key}")
            if images.setdefault(key, record)["file_name"] != name:
                raise DataError(f"{file}: image id {key} is {images[key]['file_name']} and {name}. Give each its own.")
        if not images:
            raise DataError(f"{file}: 'images' is empty: nothing to learn from or to test on. Add photos.")
        self.image_ids, names = list(images), [record["file_name"] for record in images.values()]
        present = set(os.listdir(folder))  # one listing: a stat per photo takes minutes on a network disk
        # Names with a subfolder are not in it: they count from the split's folder or (LVIS, V3Det) from the root.
        nested = {name for name in names if name not in present and not os.path.exists(os.path.join(folder, name))
                  and os.path.exists(os.path.join(root, name))}
        self.names = np.array([name if name in nested else os.path.join(split, name) for name in names])
        absent = [i for i, name in enumerate(names)
                  if name not in present and name not in nested and not os.path.exists(self.path(i))]
        if absent:
            raise DataError(f"{self.path(absent[0])} (image id {self.image_ids[absent[0]]}) is missing, as are "
                            f"{len(absent) - 1} other photos. Add them, or remove them from {file}.")
        self.sizes = np.array([  # [N, 2], the w, h that the boxes refer to; without them, the photo's
            [_field(record, side, int, f"{file}: image {key}") for side in ("width", "height")]
            if record.get("width") and record.get("height") else read_photo(self.path(i)).size
            for i, (key, record) in enumerate(images.items())])

        place = {key: i for i, key in enumerate(images)}
        for who, image, category in zip(ids, owner, kind):
            if image not in place or category not in known:
                key = f"image_id {image}" if image not in place else f"category_id {category}"
                raise DataError(f"{file}: annotation {who}: {key} is not listed in the file. Correct the annotation or "
                                f"remove it.")
        owner = np.array([place[key] for key in owner], np.int64)
        labels = np.array([label_of[key] for key in kind], np.int64)
        raw = np.array(xywh).reshape(-1, 4)[mine]
        raw[:, 2:] += raw[:, :2]
        boxes = raw.clip(0, np.tile(self.sizes[owner], 2)).astype(np.float32)
        single = ~np.array(crowd, bool)  # a crowd is no single object to learn, and COCO's metric ignores hits on it
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1) & single  # COCO too has boxes without area; their GIoU is 0/0
        clipped = kept & (abs(raw - boxes) > 0.01).any(1)  # less is rounding: COCO writes two decimals
        order = np.flatnonzero(kept)[np.argsort(owner[kept], kind="stable")]
        self.boxes, self.labels = boxes[order], labels[order]  # of all photos; those of photo i are
        self.offsets = np.searchsorted(owner[order], np.arange(len(images) + 1))   # offsets[i] : offsets[i + 1]

        notes = {"boxes of no area dropped": (single & ~kept).sum(), "boxes clipped to the photo": clipped.sum(),
                 "crowds left out": (~single).sum(), "repeated images merged": len(coco["images"]) - len(images),
                 "repeated annotation ids renumbered": len(ids) - len(set(map(str, ids)))}
        notes = ", ".join(f"{count} {what}" for what, count in notes.items() if count)
        self.summary = f"{len(images)} images, {len(order)} boxes, {len(known)} classes" + f" ({notes})" * bool(notes)

    def path(self, i):
        return os.path.join(self.root, self.names[i])

    def read(self, i):
        """PIL image, boxes float32 [n,4] xyxy pixels inside it, labels int64 [n]. Raises DataError."""
        w, h = self.sizes[i].tolist()
        image = read_photo(self.path(i), (w, h))
        if image.size != (w, h):
            raise DataError(f"{self.path(i)}: the photo is {image.width}x{image.height}, but its boxes are for {w}x{h} "
                            f"(image {self.image_ids[i]} in {self.file}). Restore the photo or correct the file.")
        return image, *self.annotations(i)

    def annotations(self, i):
        """Boxes [n,4] and labels [n] of a photo, as copies."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.boxes[span].copy(), self.labels[span].copy()

    def ground_truth(self):
        """The file as pycocotools wants it, with crowds and boxes of no area, since published numbers count them. It is
        read from disk again: only evaluation needs it, and it is the one big structure of Python objects."""
        coco = _load_json(self.file)
        for number, record in enumerate(coco["annotations"], 1):
            area = record["bbox"][2] * record["bbox"][3] if record.get("area") is None else record["area"]
            # Numbered anew: pycocotools takes annotation id 0 for "no match", and keeps only one of two equal ids.
            record.update(id=number, area=area, iscrowd=int(bool(record.get("iscrowd"))))
        images = [dict(id=key, file_name=name, width=w, height=h)
                  for key, name, (w, h) in zip(self.image_ids, self.names.tolist(), self.sizes.tolist())]
        return coco | dict(info={}, images=images)

# ============================================================================================ toy shapes
class ToyShapes(Photos):
    """`count` pictures of toy.py, `size` pixels square; picture i depends on (seed, i) alone.
    Attributes, items and ground_truth() as in `CocoFolder`: what cannot learn this will not learn COCO either."""
    def __init__(self, count, size=128, seed=0, transform=None, category_ids=None):
        self.size, self.seed, self.transform, self.image_ids = size, seed, transform, list(range(1, count + 1))
        self.categories = [dict(id=i, name=name) for i, name in enumerate(toy.OUTLINES, 1)]
        self.category_ids, self.classes, self.label_of = _label_map(self.categories, category_ids, "toy shapes")
        self.id_of = {category["name"]: category["id"] for category in self.categories}
        self.sizes, self.labels, self.offsets = np.full((count, 2), size), np.zeros(0, int), np.zeros(count + 1, int)
        self.summary = f"{count} images of {size} pixels, drawn on the fly, {len(toy.OUTLINES)} classes"

    def read(self, i):
        """PIL image, boxes float32 [n,4] xyxy pixels, labels int64 [n]; later shapes lie on top."""
        rng, shapes = toy.scene(f"toy {self.seed} {i}", self.size)
        labels = np.array([self.label_of[self.id_of[name]] for name, _, _ in shapes])
        boxes = np.float32([[x, y, x + w, y + h] for _, _, (x, y, w, h) in shapes])
        return toy.picture(rng, shapes, self.size), boxes, labels

    def ground_truth(self):
        images = [dict(id=key, width=self.size, height=self.size) for key in self.image_ids]
        boxes = [(key, name, box) for i, key in enumerate(self.image_ids)
                 for name, _, box in toy.scene(f"toy {self.seed} {i}", self.size)[1]]
        annotations = [dict(id=n, image_id=key, category_id=self.id_of[name], bbox=[x, y, w, h], area=w * h, iscrowd=0)
                       for n, (key, name, (x, y, w, h)) in enumerate(boxes, 1)]
        return dict(info={}, images=images, annotations=annotations, categories=self.categories)

def open_data(data, data_root=None, split="train", transform=None, category_ids=None, image_size=128, toy_count=None):
    """The data set that a command line names. data: "toy", "coco" (in data_root, $COCO_ROOT or data/coco) or a folder.
    split: "train" or "val". image_size, toy_count: pixels and number of toy pictures (2000 to train, 200 to test)."""
    split = split.removesuffix("2017")
    if split not in ("train", "val"):
        raise DataError(f"split '{split}' does not exist: train or val.")
    if data_root is not None and data != "coco":
        raise DataError(f"data_root '{data_root}' says where COCO is, but data is '{data}'. Use one of them.")
    if data == "toy":
        count, seed = (2000, 0) if split == "train" else (200, 1)  # other seed, other pictures
        return ToyShapes(toy_count or count, image_size, seed, transform, category_ids)
    if data == "coco":
        data = data_root or os.environ.get("COCO_ROOT") or os.path.join("data", "coco")
    elif not os.path.isdir(data):
        raise DataError(f"data '{data}' is not a folder. Accepted: 'toy' (built in), 'coco', or a folder with "
                        "train2017/, val2017/ and annotations/instances_{train2017,val2017}.json.")
    return CocoFolder(data, f"{split}2017", transform, category_ids)

# ============================================================================================ batches
def collate(batch):
    """List of samples -> images float32 [B,3,H,W] normalised, mask [B,H,W] bool (True = padding), targets. A DataError
    among them: that. Padding lies right and bottom and is zero after normalisation, that is, of the mean colour."""
    for error in batch:
        if isinstance(error, DataError):
            return error
    h, w = (max(image.shape[side] for image, _ in batch) for side in (1, 2))
    images, mask = torch.zeros(len(batch), 3, h, w), torch.ones(len(batch), h, w, dtype=torch.bool)
    for i, (image, _) in enumerate(batch):
        normalised(image, images[i, :, :image.shape[1], :image.shape[2]])
        mask[i, :image.shape[1], :image.shape[2]] = False
    return images, mask, [target for _, target in batch]

def _start_worker(number):
    """A forked worker shares its parent's memory until one writes, and the garbage collector writes into all objects."""
    gc.freeze()

def loader(dataset, batches, workers=0, device="cpu"):
    """Iterate over (images, mask, targets) on the CPU, in pinned memory if `device` is a GPU. batches: of order.py, or
    for evaluation lists of plain indices. Raises DataError for a photo that cannot be used and a worker that died."""
    try:
        watched = workers and hasattr(signal, "SIGCHLD")  # (not on Windows)
        handler = watched and signal.getsignal(signal.SIGCHLD)
        # Its own generator: an iterator draws a number when it is made, and a resumed run makes one more.
        feed = iter(DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                               worker_init_fn=_start_worker, pin_memory=str(device).startswith("cuda"),
                               generator=torch.Generator()))
        if watched:  # torch reports a dead worker from a signal handler, at any line of the training step. Without the
            signal.signal(signal.SIGCHLD, handler)  # handler it reports when the next batch is asked for: here.
        for batch in feed:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise DataError(f"A worker process that loads photos died, mostly because memory ran out ({error}). Run with "
                        f"--workers 0 or fewer workers, or with smaller images or batches.") from None
