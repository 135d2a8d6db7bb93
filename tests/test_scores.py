"""Tests of scores: cases by hand, the official evaluator; LVIS's and V3Det's files, recipes."""
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np

import data
import eval as evaluation
import runs
import scores
from tests.fixtures import HERE, coco_folder
from tests.test_eval import Oracle


def test_scores_coco_of_known_cases():
    """Crowds are no misses and take any number; sizes; nothing found; nothing there; processes."""
    def box(x, w, category=1, **more):
        return {"image_id": 1, "category_id": category, "bbox": [x, 0, w, w], **more}

    things = [box(0, 20), box(100, 50), box(300, 100), box(0, 200, category=2, iscrowd=1),
              box(0, 50) | {"image_id": 2}]
    truth = {"images": [{"id": 1}, {"id": 2}], "categories": [{"id": 2}, {"id": 1}],
             "annotations": [{"iscrowd": 0, "area": a["bbox"][2] ** 2} | a for a in things]}
    found = [box(0, 20, score=0.9), box(100, 50, score=0.8), box(500, 50, score=0.7),  # 1 is wrong
             box(10, 50, category=2, score=0.9), box(60, 40, category=2, score=0.8)]
    many = found + [box(900, 9, score=0.1 - n * 1e-7) for n in range(100_000)]
    with contextlib.redirect_stdout(io.StringIO()):
        metrics, shared, alone, nothing, bare = (
            scores.coco_metrics(truth | changed, answers, [1]) for changed, answers in (
                ({}, found), ({}, many), ({}, many[:120]), ({}, []), ({"annotations": []}, [])))
    # Of 3 objects 2 are found at precision 1: at 67 of the 101 recalls, 0 to 0.66.
    expected = dict(AP=67 / 101, AP_S=1, AP_M=1, AP_L=0, AR1=1 / 3, AR100=2 / 3)
    assert all(abs(metrics[key] - value) < 1e-9 for key, value in expected.items()), metrics
    assert shared == alone and nothing["AP"] == nothing["AR100"] == 0 and bare["AP"] == -1


def test_scores_panoptic_quality_is_that_of_cases_by_hand():
    """On a row of 12 pixels; true ids 5 to 9, 0 is void; labels 1 and 2 are things, 3 is stuff."""
    truth = np.array([[5, 5, 5, 5, 6, 6, 6, 0, 0, 9, 9, 9]])
    true = {5: (1, 0), 6: (2, 0), 9: (3, 1)}  # 9 is a crowd, which nobody must find
    for found, segments, *wanted in [  # IoU, matches, false alarms, misses
            ([0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3], {0: 1, 1: 2, 2: 1, 3: 3},
             (3 / 4, 1, 0, 0), (3 / 4, 1, 0, 0)),  # void excuses 2, its label's crowd 3
            ([0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2], {0: 1, 1: 1, 2: 2},
             (0, 0, 2, 1), (0, 0, 1, 1)),  # halves are no match; only void leaves 2's union
            ([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2], {0: 2, 1: 2, 2: 1},
             (0, 0, 1, 1), (1, 1, 1, 0))]:  # 0: the right place, the wrong label
        counts = scores.panoptic_counts(truth, true, np.array([found]), segments)
        for label, want in zip((1, 2, 3), (*wanted, (0, 0, 0, 0))):
            assert np.allclose(counts[label], want), (found, label, counts[label])
    counts = [{1: np.array([1.5, 2, 1, 0]), 3: np.array([0.8, 1, 0, 0])},
              {1: np.array([0, 0, 0, 1])}]
    quality = scores.panoptic_quality(counts, {1, 2})
    assert quality == dict(PQ=(0.5 + 0.8) / 2, PQ_things=0.5, PQ_stuff=0.8)


# V3Det's tree in its published form, for four of its categories (github.com/V3Det/V3Det, CC BY
# 4.0): umbrella, cocktail umbrella, transparent umbrella, cage. n98 and n99 are no categories.
TREE = {"categoryid2treeid": {"31": "n31", "32": "n32", "38": "n38", "41": "n41"},
        "ancestor2descendant": {"n31": ["n32", "n38", "n99"], "n98": ["n31", "n32", "n99"]}}


def scored(boxes, found, images=({}, {}), **more):
    """boxes: (image, class, x), 10 pixels square; found: (image, class, x, score)."""
    truth = dict(images=[dict(id=i, **fields) for i, fields in enumerate(images)], annotations=[
        dict(image_id=i, category_id=c, bbox=[x, 0, 10, 10], area=100, iscrowd=0)
        for i, c, x in boxes], categories=[dict(id=2, frequency="r"), dict(id=1, frequency="f")])
    rows = np.array([(i, c, score, x, 0, 10, 10) for i, c, x, score in found])
    found = scores.lvis_metrics(truth | more, rows, range(len(images)))
    return {name: round(value, 9) for name, value in found.items()}


def test_scores_rules_by_hand():
    """A detection above the right one halves the precision, unless a rule forgives it."""
    right, absent, partly = (0, 1, 0, 0.5), *({name: [1]} for name in scores.LISTS)
    for ap, wrong, images in ((1, (1, 1, 0, 0.9), ({}, {})), (0.5, (1, 1, 0, 0.9), ({}, absent)),
                              (1, (0, 1, 50, 0.9), (partly, {})), (0.5, (0, 1, 50, 0.9), ({}, {}))):
        found = scored([(0, 1, 0)], [wrong, right], images)
        assert found["AP"] == found["APf"] == ap and found["APr"] == found["APc"] == -1
    for count in (299, 300):  # of a class that nobody looked for, but they count
        found = scored([(0, 1, 0), (1, 2, 0)], [(0, 2, 0, 0.9)] * count + [right])
        assert [found[k] for k in ("AP", "APr", "APf")] == ([.5, 0, 1] if count < 300 else [0] * 3)
    # V3Det: class 2 is a kind of 1, whose box absorbs one detection of 2, not the reverse.
    wrong, mine = (0, 2, 0, 0.9), (0, 2, 50, 0.5)
    for ap, above, count in ((0.5, {2: [1]}, 1), (1 / 4, {2: [1]}, 2), (1 / 4, {}, 1),
                             (1 / 4, {1: [2]}, 1)):
        found = scored([(0, 1, 0), (0, 2, 50)], [wrong] * count + [mine], ancestors=above)
        assert found["AP"] == ap
    found = scored([(0, 2, 50)], [wrong] * 300 + [mine], ancestors={})  # 300 of a class there
    assert found["AR300"] == 0 and "APr" not in found


def test_scores_files_and_official_numbers():
    """Detections around the boxes of an excerpt of the real file; where it is there, lvis-api's."""
    text, g = (HERE / "tests/lvis_excerpt.json").read_text(), np.random.default_rng(0)
    excerpt = json.loads(text)
    kinds = [record["id"] for record in excerpt["categories"]]
    with tempfile.TemporaryDirectory() as root:
        for place in ["val2017/" + image["coco_url"][-16:] for image in excerpt["images"]] + [
                "annotations/instances_val2017.json", "annotations/lvis_v1_val.json"]:
            (file := Path(root, place)).parent.mkdir(exist_ok=True)
            file.write_text(text if "lvis" in place else "not to be read")
        folder = data.open_data("lvis", root, "val")
        truth, ids = folder.ground_truth(), folder.image_ids
        rows = np.array([(ids.index(a["image_id"]), g.choice([a["category_id"], g.choice(kinds)]),
                          g.integers(99) / 99, *np.abs(a["bbox"] + g.normal(0, 3, 4)))
                         for a in excerpt["annotations"] * 40])
        ours, plain = (scores.lvis_metrics(x, rows, ids) for x in (truth, truth | {"images": []}))
        found = [dict(image_id=ids[int(i)], category_id=int(c), score=s, bbox=box)
                 for i, c, s, *box in rows.tolist()]
        script = """if 1:
            import json, sys, numpy; sys.modules["cv2"], numpy.float = sys, float
            from lvis import LVIS, LVISEval, LVISResults
            truth = LVIS("annotations/lvis_v1_val.json")
            scorer = LVISEval(truth, LVISResults(truth, json.load(sys.stdin)), "bbox")
            scorer.run(), print(json.dumps([float(x) for x in scorer.results.values()]))"""
        official = subprocess.run(
            [sys.executable, "-c", script], input=json.dumps(found), text=True, cwd=root,
            capture_output=True)
    assert 0 < ours["APc"] < 1 and ours["AP"] != plain["AP"]
    if "No module named 'lvis'" in official.stderr:
        raise unittest.SkipTest("pip install lvis compares with it")
    names = "AP AP50 AP75 AP_S AP_M AP_L APr APc APf AR300 AR_S AR_M AR_L".split()
    assert [ours[name] for name in names] == json.loads(official.stdout.splitlines()[-1])


def test_scores_v3det_from_folder_to_score():
    with tempfile.TemporaryDirectory() as root:
        file = coco_folder(Path(root, "v")) / "annotations" / "instances_val2017.json"
        file.rename(file.with_name("v3det_2023_v1_val.json"))
        file.with_name("v3det_2023_v1_category_tree.json").write_text(json.dumps(TREE))
        folder = data.open_data("v3det", f"{root}/v", "val", data.eval_transform(64, 64))
        assert folder.ground_truth()["ancestors"] == {31: [], 32: [31], 38: [31], 41: []}
        metrics, found, _ = evaluation.evaluate(Oracle(folder), folder, progress=False, limit=5)
    assert metrics["AP"] > 0.999 and "AR300" in metrics and found[-1][0] == 4


def test_scores_published_recipes():
    for words, expected in (
            ("diffu_dino data=lvis", [300, 2, "none", 300, 75_000, 16, 0]),
            ("diffu_dino data=lvis backbone=resnet101", [100, 1, "stem", 300, 75_000, 16, 0]),
            ("diffu_dino data=v3det", [300, 2, "none", 300, 550_000, 8, 0.001]),
            ("dab data=v3det", [100, 1, "layer1", 300, 550_000, 8, 0.001]),
            ("detr data=lvis preset=small", [100, 1, "layer1", 300, 0, 16, 0])):
        _, cfg, recipe = runs.settle(dict(pair.split("=") for pair in f"variant={words}".split()))
        assert expected == [cfg.dn_queries, cfg.weight_class, cfg.frozen_stages, cfg.detections,
                            recipe.steps, recipe.batch_size, recipe.repeat_rare], words
    assert runs.settle(dict(data="lvis", epochs=3))[2].steps == 0
