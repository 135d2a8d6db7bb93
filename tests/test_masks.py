"""Masks: outlines through transforms, panoptic maps and quality, the second stage by command."""
import json
import random
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as rle

import data
import eval as evaluation
import masks
import weights
from tests.fixtures import TINY_RUN, coco_folder, refused, run_quietly, small


def test_masks_of_a_batch_are_those_of_each_image_alone():
    """Of 34x50 and 45x27 pixels, padded to 45x50; labels 0, 1: things, 7: stuff, joined."""
    logits = torch.randn(2, 5, 12, 13, generator=torch.Generator().manual_seed(0))
    logits, labels = F.avg_pool2d(logits, 5, 1, 2) * 9, torch.tensor([0, 7, 1, 7, 0])
    for padded, own, size in zip(logits, ((34, 50), (45, 27)), ((68, 100), (90, 54))):
        alone = padded[:, :-(-own[0] // 4), :-(-own[1] // 4)]
        here, segments = masks.merge(labels, padded, own, size, {0, 1})
        there, others = masks.merge(labels, alone, own, size, {0, 1})
        assert here.shape == size and (here == there).all() and segments == others
        assert [*segments.values()].count(7) == 1 and {*np.unique(here)} == {*segments}
        drawn = (masks.instance_masks(x, own, size) for x in (padded, alone))
        for one, other, x in zip(*drawn, alone):
            assert one == other and one["size"] == [*size]
            up = F.interpolate(x[None, None], own, mode="bilinear")[0, 0] > 0
            assert (rle.decode(one)[::2, ::2] == up.numpy()).all()
    speck = torch.stack([torch.zeros(3, 3), 10 * (torch.arange(9.) < 1).view(3, 3) - 5])
    for side, wanted in ((2, {}), (6, {0: 0}), (12, {0: 0, 1: 7})):  # 4 pixels or less go
        assert masks.merge(labels[:2], speck, (12, 12), (side, side), {0})[1] == wanted


def test_masks_go_with_the_image_through_flip_crop_and_resize():
    shape = np.zeros((90, 120), np.uint8)
    shape[10:60, 15:40] = shape[40:60, 40:100] = 1  # an L
    image, box = Image.fromarray(shape * 255).convert("RGB"), np.float32([[15, 10, 100, 60]])
    shapes = torch.from_numpy(shape)[None].bool()
    for seed in range(20):
        out, boxes, _, moved = data.train_transform(160, seed % 2 * 200)(
            image, box, np.zeros(1), random.Random(seed), shapes)
        seen = torch.from_numpy(np.array(out)[..., 0] > 127)
        assert moved.shape == (len(boxes), *seen.shape) and moved.dtype == torch.bool
        assert not len(boxes) or (moved[0] != seen).float().mean() < 0.03, seed


def test_masks_outlines_are_read_from_polygons_and_rle_and_else_refused():
    with tempfile.TemporaryDirectory() as folder:
        root = coco_folder(Path(folder) / "set", 2)
        file = root / "annotations/instances_train2017.json"
        plain, coco = data.open_data(str(root), masks=True), json.loads(file.read_text())
        for n, record in enumerate(coco["annotations"]):
            polygons = record["segmentation"]
            one = rle.merge(rle.frPyObjects(polygons, 64, 64))
            edges = np.flatnonzero(np.diff(rle.decode(one).ravel("F"), prepend=0, append=2))
            record["segmentation"] = [one | {"counts": one["counts"].decode()}, {
                "size": [64, 64], "counts": np.diff(edges, prepend=0).tolist()}][n % 2]
        file.write_text(json.dumps(coco))
        coded = data.open_data(str(root), masks=True)
        assert plain.ground_truth() == coded.ground_truth()
        assert "masks" not in data.open_data(str(root))[0][1] and plain[0][1]["masks"].any()
        for bad in ([], [[1, 2, 3, 4]], None, {"size": [9, 9], "counts": [81]}):
            coco["annotations"][3]["segmentation"] = bad
            file.write_text(json.dumps(coco))
            refused("annotation 4|segmentation|--masks", data.open_data, str(root), masks=True)


def test_masks_second_stage_trains_a_head_on_a_detector_that_stays_as_it_is():
    with tempfile.TemporaryDirectory() as folder:
        root, one, two = (str(Path(folder) / name) for name in ("set", "one", "two"))
        coco_folder(Path(root))
        given = ["--data", root, "--steps", "2", *TINY_RUN]
        code, said = run_quietly(["--variant", "detr", "--backbone-weights", "none", "--dropout",
                                  "0.1", "--out", one, *given])
        assert code == 0, said
        given += ["--weights", one + "/best.pth", "--masks", "--ema", "0", "--out", two]
        code, said = run_quietly(given)
        assert code == 0 and "new, for 5 classes: mask_head" in said and "lr_drop=0.6" in said, said
        old, new = (weights.read_checkpoint(f"{run}/best.pth")["model"] for run in (one, two))
        assert all(torch.equal(x, new[k]) for k, x in old.items() if "num_batches" not in k)
        line = [json.loads(x) for x in Path(two, "log.jsonl").read_text().splitlines()]
        assert line[0]["loss_mask"] > 0 and line[0]["loss_bbox_0"] > 0 and "segm_AP50" in line[1]
        best = weights.read_checkpoint(f"{two}/last.pth")["best"]  # of masks: boxes stay
        assert abs(best - line[1]["segm_AP"]) < 1e-5

        eval_of = ["--weights", two + "/best.pth", "--score", "0", "--workers", "0"]
        code, said = run_quietly([*eval_of, "--data", root], evaluation.main)
        results = json.loads(Path(two, "results.json").read_text())
        assert code == 0 and rle.decode(results[0]["segmentation"]).shape == (64, 64), said
        code, said = run_quietly([*eval_of, "--images", root + "/val2017"], evaluation.main)
        (found, *_) = json.loads(Path(two, "predictions/predictions.json").read_text())
        assert code == 0 and rle.decode(found["detections"][0]["segmentation"]).shape == (64, 64)
        for file in Path(root).glob("annotations/*"):
            file.write_text(file.read_text().replace('"star"', '"sun"'))
        assert "fine-tune it" in run_quietly([*given[:-1], folder + "/three"])[1]


def test_masks_panoptic_folder_is_read_and_scored():
    """Segments as records with raw ids; boxes end at the last pixel; crowds are kept."""
    with tempfile.TemporaryDirectory() as folder:
        root, form = coco_folder(Path(folder)), "annotations/panoptic_{}.json"
        maps = np.kron([[0, 0, 5, 5], [70000, 0, 5, 0], [0] * 4, [0] * 4], np.ones((16, 16), int))
        colours = np.stack([maps % 256, maps // 256 % 256, maps // 65536], -1).astype(np.uint8)
        parts = [dict(id=5, category_id=11, bbox=[32, 0, 32, 32], iscrowd=0),
                 dict(id=70000, category_id=9, bbox=[0, 16, 16, 16], iscrowd=1)]
        for split in ("train2017", "val2017"):
            (folder_of := root / f"annotations/panoptic_{split}").mkdir()
            coco = json.loads((root / f"annotations/instances_{split}.json").read_text())
            coco["categories"][1]["isthing"], coco["annotations"] = 0, []
            for image in coco["images"]:
                Image.fromarray(colours).save(folder_of / image["file_name"])
                coco["annotations"].append(dict(
                    image_id=image["id"], file_name=image["file_name"], segments_info=parts))
            (root / f"annotations/panoptic_{split}.json").write_text(json.dumps(coco))
        panoptic = data.open_data(str(root), masks=True, annotations=form)
        _, boxes, labels = panoptic.read(1)
        assert boxes.tolist() == [[32, 0, 63, 31], [0, 16, 15, 31]] and labels.tolist() == [1, 0]
        assert (panoptic.masks(1).numpy() == np.stack([maps == 5, maps == 70000])).all()
        # Segment 0 covers void and the crowd of another label: void is more than half of it.
        found = {"panoptic": (np.where(maps == 5, 1, 0), {0: 3, 1: 1})}
        answers = [[found | dict(scores=[], labels=[], boxes=[], masks=[])] for _ in range(6)]
        with mock.patch.object(evaluation, "answer", side_effect=answers):
            metrics, *_ = evaluation.evaluate(small("detr", masks=True), panoptic, 1)
        assert [metrics[k] for k in ("PQ", "PQ_things", "PQ_stuff")] == [1, -1, 1]
        (root / "annotations/instances_train2017.json").unlink()
        assert data.open_data(str(root)).file.endswith("panoptic_train2017.json")
