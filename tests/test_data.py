"""Tests of data.py: images, transforms, folders in COCO's layout, toy shapes, order and loading."""
import contextlib
import json
import random
import shutil
import signal
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_convert
from torchvision.transforms import functional as TF

import data
from tests.fixtures import coco_folder, error_of, refused


@contextlib.contextmanager
def folder(edit=lambda coco: None):
    """Three toy pictures of 64 pixels in COCO's layout, ids 1 to 3. edit(its lists) -> new text."""
    with tempfile.TemporaryDirectory() as root:
        file = coco_folder(Path(root), 3) / "annotations" / "instances_train2017.json"
        coco = json.loads(file.read_text())
        text = edit(coco) or json.dumps(coco)
        file.write_text(text, "utf-8-sig")  # a byte order mark is no error
        yield root


def test_data_image_files():
    """All become the RGB that a viewer shows, on a white page, upright; damage is named."""
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(8, 0)
    files = [Image.fromarray(ramp).convert(mode) for mode in ("L", "LA", "RGBA", "P")]
    upright = data.ToyShapes(1).read(0)[0].crop((0, 0, 48, 32))
    with tempfile.TemporaryDirectory() as root:
        path, exif = Path(root, "a.png"), Image.Exif()
        for image in (*files, Image.fromarray(ramp * np.uint16(257))):
            image.save(path)
            assert abs(np.int32(data.read_image(path)) - ramp[..., None]).max() <= 1, image
        Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(path)
        assert data.read_image(path).getextrema() == ((255, 255),) * 3
        stored, exif[0x0112] = upright.transpose(Image.ROTATE_90), 6  # to be turned by 90 degrees
        stored.save(path, exif=exif)
        assert np.array_equal(data.read_image(path, (48, 32)), upright)
        assert np.array_equal(data.read_image(path, (32, 48)), stored)  # as it was annotated
        path.write_bytes(path.read_bytes()[:40])
        refused("a.png|again", data.read_image, path)


def test_data_train_recipe():
    """As published: half are cropped to sides of 384 to 600, the short side then has one of 11
    sizes, or less where the long side would exceed its most; in proportion at another size."""
    image, box = Image.new("RGB", (1600, 400)), np.float32([[0, 0, 1400, 40]])

    def made(transform):
        return [transform(image, box, np.zeros(1), random.Random(i))[:2] for i in range(150)]

    for size in (800, 400):
        pairs = made(data.train_transform(size))
        sides = [sorted(cut.size) for cut, _ in pairs if cut.width < 2 * cut.height]
        assert 60 < len(sides) < 90 and max(long / short for short, long in sides) < 1.58
        assert {short for short, _ in sides} == {side * size // 800 for side in range(480, 801, 32)}
        flips = [boxes[0, 0] > 0 for cut, boxes in pairs if cut.width > 2 * cut.height]
        assert 0.4 < np.mean(flips) < 0.6
    for several, sizes in ((True, range(448, 897, 64)), (False, [640])):  # LW-DETR's, RF-DETR's
        squares = {cut.size for cut, _ in made(data.train_transform(640, 0, several=several))}
        assert squares == {(size, size) for size in sizes}


def test_data_pixels():
    """Training's resize is within 2 of 255 of evaluation's, PIL's; pixels are torchvision's."""
    image, boxes, labels = data.ToyShapes(1, 300).read(0)
    for size in (117, 389):
        exact, scaled, _ = data.eval_transform(size)(image, boxes, labels, None)
        fast, *_ = data.train_transform(size, flip=False, crop=False)(image, boxes, labels, None)
        apart = abs(np.int32(fast) - np.int32(exact))
        assert apart.max() <= 2 and np.mean(apart > 0) < 0.01
        theirs = TF.normalize(TF.to_tensor(exact), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        assert torch.equal(data.normalised(TF.pil_to_tensor(exact)), theirs)


def test_data_boxes_follow_pixels():
    """Every coloured block is found where its box went; a dropped box no longer shows."""
    image, lost = Image.new("RGB", (400, 300)), 0
    boxes = np.float32([[20, 30, 120, 90], [200, 150, 390, 290], [300, 10, 380, 60]])
    for box, colour in zip(boxes.astype(int).tolist(), ("#f00", "#0f0", "#00f")):
        image.paste(colour, tuple(box))
    for seed in range(60):
        transform = data.train_transform(160, (1333, 0)[seed % 2])
        out, moved, labels = transform(image, boxes, np.arange(3), random.Random(seed))
        for label, pixels in enumerate(np.moveaxis(np.asarray(out), 2, 0) > 127):
            lost += label not in labels
            assert label in labels or not pixels.any()
            for box in moved[labels == label]:
                if (box[2:] - box[:2]).min() >= 2:  # a sliver may cover no pixel's half
                    y, x = np.nonzero(pixels)
                    assert abs([x.min(), y.min(), x.max() + 1, y.max() + 1] - box).max() <= 1.5
    assert lost > 5, "crops that lose a box were not met"


def test_data_coco():
    """Labels, boxes, ids, sizes; what is harmless is repaired; what has one meaning, however it is
    written, is kept, and counted where it is unusual."""
    def edit(coco):
        (a, b, c), one = coco["images"], dict(id=0, image_id=2, category_id=9)
        coco["annotations"] = [dict(one, **changes) for changes in (
            dict(bbox=[10, 10, 20, 10], image_id="im 3", category_id=11.0, area="large"),
            dict(bbox=["10", "10.0", 20, 10.0], image_id="2", iscrowd="False"),
            dict(bbox="[50, 30, 30, 30]"), dict(bbox=[-5, 5, 10, 10], iscrowd="0"),
            dict(bbox=[5, 5, 0, 9]), dict(bbox=[70, 5, 9, 9], area=None),
            dict(bbox=[10, 10, 20, 10], iscrowd=1, area=9))]
        c.update(id="im 3", file_name="val2017\\3.png", width="64", height=64.0)
        coco["images"] += [dict(a), dict(a, id=99, width=-1)]
        coco["categories"][2:], coco["categories"][1]["name"] = [], "red\n\x1b[31m cell \ud800"
        del b["width"], b["file_name"]
        b["coco_url"] = "http://cocodataset.org/val2017/2.png"

    with folder(edit) as root:
        coco = data.CocoFolder(root, transform=data.eval_transform(128))
        assert coco.category_ids == [9, 11] and coco.classes == ["circle", "red [31m cell"]
        assert coco.image_ids == [1, 2, "im 3", 99]
        for words in ("4 boxes (2 clipped", "1 crowds, 2 boxes without area", "1 widths written",
                      "2 sizes read", "1 ids written", "1 areas recomputed"):
            assert words in coco.summary, coco.summary
        _, target = coco[1]
        boxes = box_convert(target["boxes"], "cxcywh", "xyxy") * 64
        assert np.allclose(boxes, [[10, 10, 30, 20], [50, 30, 64, 60], [0, 5, 5, 15]], atol=1e-4)
        assert [target[key].tolist() for key in ("labels", "orig_size", "size")] == [
            [0, 0, 0], [64, 64], [128, 128]] and target["image_id"] == 2
        assert coco[2][1]["labels"].tolist() == [1] and coco[3][1]["boxes"].shape == (0, 4)
        known = dict.fromkeys(range(91), "N/A") | dict(zip((9, 11), coco.classes))
        assert data.CocoFolder(root, known=known)[2][1]["labels"].item() == 11
        refused("11 is 'red|training", data.CocoFolder, root, known=known | {11: "cat"})
        truth = coco.ground_truth()["annotations"]
        assert [(box["id"], box["area"], box["iscrowd"]) for box in truth] == [  # none clipped
            (n, area, n == 7) for n, area in enumerate((200, 200, 900, 100, 0, 81, 9), 1)]


def test_data_coco_faults():
    """Each is refused with its place and what is wrong, as it is from a worker."""
    def second(key, **fault):
        return lambda coco: coco[key][1].update(fault)

    def moved(change):
        return lambda coco: [box.update(bbox=change(*box["bbox"])) for box in coco["annotations"]
                             ] and None

    for words, edit in [
            ("annotation 2|bbox is None", second("annotations", bbox=None)),
            ("annotation 2|bbox|'four'", second("annotations", bbox=[1, 2, 3, "four"])),
            ("annotation 2|bbox|nan", second("annotations", bbox=[1, 2, float("nan"), 4])),
            ("annotation 2|image_id is 55|listed", second("annotations", image_id=55)),
            ("annotation 2|category_id", second("annotations", category_id=None)),
            ("annotation 2|iscrowd", second("annotations", iscrowd="maybe")),
            ("image None|whole number", second("images", id=None)),
            ("category 1.5|whole number", second("categories", id=1.5)),
            ("image 2|width", second("images", width="wide")),
            ("image id 1|/1.png|/2.png", second("images", id=1)),
            ("category id 9 has two names", second("categories", id=9)),
            ("2.pnq (image id 2)|nearest: 2.png", second("images", file_name="2.pnq")),
            ("image 2|leaves the folder", second("images", file_name="../../x.png")),
            ("'annotations' is no list", lambda coco: coco.update(annotations=[1])),
            ("inside one pixel", moved(lambda *box: [v / 64 for v in box])),
            ("leave their image", moved(lambda x, y, w, h: [x + 40, y, x + w + 40, y + h])),
            ("no box is left", moved(lambda x, y, w, h: [x, y, 0, h])),
            ("JSON", lambda coco: '{"images": [{"id": 1'), ("no list", lambda coco: "[1, 2]")]:
        with folder(edit) as root:
            refused(f"{root}|{words}", data.CocoFolder, root)
    with folder() as root:
        coco, images = data.CocoFolder(root), Path(root, "train2017")
        Image.new("RGB", (50, 50)).save(images / "2.png")
        (images / "3.png").write_bytes((images / "3.png").read_bytes()[:60])
        refused("2.png|50x50|64x64|image 2", coco.__getitem__, (1, 5))
        message = error_of(list, data.loader(coco, [[0], [0, 2]], workers=1), kind=data.DataError)
        assert message.startswith(str(images / "3.png")) and message.endswith("the data.")


def test_data_layouts():
    """Exports as they are unpacked, one file for both splits, and folders that are no COCO."""
    with folder() as root:
        file, images = Path(root, "annotations/instances_train2017.json"), Path(root, "train2017")
        for annotations, pictures in [
                ("train/_annotations.coco.json", "train"), ("result.json", "images"),
                ("annotations/instances_default.json", "images/default"),
                ("annotations/instances_Train.json", "images/Train")]:
            with tempfile.TemporaryDirectory() as other:
                shutil.copytree(images, Path(other, pictures), dirs_exist_ok=True)
                Path(other, annotations).parent.mkdir(exist_ok=True, parents=True)
                shutil.copy(file, Path(other, annotations))
                opened = partial(data.open_data, other, seed=3)
                train, val = (opened(split=split, share=0.3) for split in ("train", "val"))
                assert (len(train), len(val)) == (2, 1) and {*train.names}.isdisjoint(val.names)
                held_out = train.names.tolist()
                assert opened(split="val", held_out=held_out).names.tolist() == held_out
                refused("one annotation file|--val-share", opened, split="val", share=0)
        assert len(data.open_data(images, split="val", annotations=file)) == 3
        other = data.open_data(root, annotations=str(file).replace("train", "val"))
        assert other.names.tolist() == [f"val2017/{i}.png" for i in (1, 2, 3)]
        refused("has a validation split", data.open_data, root, share=0.1)
        refused(f"{root}s is missing|mean {Path(root).name}", data.open_data, root + "s")
        shutil.move(file, Path(root, "annotations", "instances_tain.json"))
        refused("nearest: annotations/instances_train.json", data.open_data, root)
    for made, words in [("train/labels/1.txt", "YOLO format|/train/images', '"),
                        ("labels/1.txt", "YOLO format|classes.txt"), ("no.png", "no.png"),
                        ("Annotations/1.xml", "VOC format|/JPEGImages', '|-coco/_annotations")]:
        with tempfile.TemporaryDirectory() as root:
            Path(root, made).parent.mkdir(parents=True, exist_ok=True)
            Path(root, made).touch(), Path(root, "classes.txt").touch()
            refused(words, data.open_data, root)


def test_data_toy():
    """Drawn alone, a shape fills its box to the pixel; all is from (seed, i) alone."""
    flat = mock.Mock(uniform=min, randint=lambda low, high: 0, randbytes=bytes)
    flat.sample.return_value = [(0, 0, 0), (255, 255, 255)]
    for i in range(30):
        for name, points, (x, y, w, h) in data.toy_scene(f"toy 0 {i}", 128)[1]:
            image = np.asarray(data.toy_picture(flat, [(name, points, None)], 128))
            rows, columns = np.nonzero(image[..., 0] > 30)
            found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert abs(np.subtract(found, (x, y, x + w, y + h))).max() < 1.3
    train, again, val = data.ToyShapes(5), data.open_data("toy"), data.open_data("toy", split="val")
    assert torch.equal(train[2][0], again[2][0]) and not torch.equal(again[2][0], val[2][0])


def test_data_order():
    """Repeatable, resumable, every image as often as it should come, by rarity too."""
    order, later, other = (np.array(data.batch_order(10, 3, seed, epoch))  # [batch, sample, 2]
                           for seed, epoch in ((5, 1), (5, 2), (6, 1)))
    assert order.shape == (3, 3, 2) and len(set(order[..., 0].flat)) == 9
    assert np.array_equal(data.batch_order(10, 3, 5, 1, start=1), order[1:])
    assert len({*order[..., 1].flat, *later[..., 1].flat}) == 18
    assert all((order != different)[..., 0].any() for different in (later, other))
    few = np.array(data.batch_order(8, 16, 0, 0))[0]
    assert sorted(few[:, 0]) == sorted([*range(8)] * 2) and len(set(few[:, 1])) == 16
    few = data.ToyShapes(10)  # class 0 in all, class 1 in the last alone: sqrt(0.4 / 0.1) times
    few.offsets, few.labels = np.array([*range(10), 11]), np.array([0] * 10 + [1])
    factors = data.repeat_factors(few, 0.4)
    assert factors.tolist() == [1] * 9 + [2]
    factors[0] = 1.5
    epochs = [data.batch_order(10, 1, 0, epoch, factors=factors) for epoch in range(400)]
    seen = np.bincount(np.array(epochs)[..., 0].ravel())
    assert np.allclose(seen / 400, factors * 12 / 11.5, rtol=0.06), seen


def test_data_batches():
    """Padding is the mean colour, right and bottom; workers and torch's seed change nothing."""
    toys = data.ToyShapes(12, 64, transform=data.train_transform(64, 107))
    order = data.batch_order(12, 4, 0, 2)
    alone = list(data.loader(toys, order))
    torch.manual_seed(1)
    helped = data.loader(toys, order, workers=2)
    for keys, (images, mask, targets), (others, *_) in zip(order, alone, helped, strict=True):
        assert torch.equal(images, others) and images.movedim(1, 3)[mask].eq(0).all()
        for key, image, padding, target in zip(keys, images, mask, targets):
            h, w = target["size"]
            assert torch.equal(image[:, :h, :w], data.normalised(toys[key][0]))
            assert not padding[:h, :w].any() and (~padding).sum() == h * w
    assert len({toys[3, seed][0].shape for seed in range(20)}) > 3, "seeds do not matter"
    # torch's handler could stop a step at any line; a bug is not dressed up as bad data.
    assert "torch" not in str(getattr(signal.getsignal(signal.SIGCHLD), "__module__", ""))
    with mock.patch.object(data.ToyShapes, "read", lambda *_: {}["a bug"]):
        assert "a bug" in error_of(next, data.loader(toys, order, workers=1), kind=KeyError)
