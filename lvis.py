"""Scores of large vocabularies, LVIS's (Gupta 2019) and V3Det's (Wang 2023), by pycocotools alone.

Both are their official evaluators' to the last bit. Boxes are rows, image, label, crowd, area, x,
y, w, h, and so are detections: image, label, score, x, y, w, h, in pixels. As dicts V3Det's 29,821
images of 300 detections would fill the memory. Read `lvis_rules`, then `metrics`.
"""
import contextlib
import io
import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

LISTS = "neg_category_ids", "not_exhaustive_category_ids"  # of an image in LVIS's file
MOST = 300  # detections that count: LVIS's of an image, V3Det's of a class in an image


def category_curves(image_ids, category, truth, detections, most=(1, 10, 100), kind="bbox"):
    """pycocotools' precision [T,R,1,A,M] and recall [T,1,A,M] of one category's records."""
    def area(record):
        return float(rle.area(record["segmentation"])) if kind == "segm" else (
            record["bbox"][2] * record["bbox"][3])

    sides = COCO(), COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        for side, records in zip(sides, (truth, detections)):
            records = [{"area": area(record)} | record | {"id": n}
                       for n, record in enumerate(records, 1)]  # id 0 means "no match"
            images = [dict(id=key, height=0, width=0) for key in image_ids if kind == "segm"]
            side.dataset = {"images": images, "categories": [], "annotations": records}
            side.createIndex()
        scorer = COCOeval(*sides, kind)
        scorer.params.imgIds, scorer.params.catIds = list(image_ids), [category]
        scorer.params.maxDets = list(most)
        scorer.evaluate()
        scorer.accumulate()
    return scorer.eval["precision"], scorer.eval["recall"]


def row_curves(boxes, found):
    """The same of one category's rows, `found` in the order of images -> [T,R,A] and [T,A].
    Neighbouring images without a box are one image here, to save time: pycocotools sorts scores
    within an image, then over all, both stably, so that only the order of images counts."""
    images, records = np.unique(boxes[:, 0]), []
    for rows, names in (boxes, ("iscrowd", "area")), (found, ("score",)):
        places = sum(np.searchsorted(images, rows[:, 0], side) for side in ("left", "right"))
        records.append([dict(zip(names, row[2:-4]), image_id=place, category_id=0, bbox=row[-4:])
                        for row, place in zip(rows.tolist(), places.tolist())])
    precision, recall = category_curves(range(2 * len(images) + 1), 0, *records, [len(found) + 1])
    return precision[:, :, 0, :, 0], recall[:, 0, :, 0]


def best(found, groups):
    """The MOST best rows of every group (a number a row), in their order."""
    order = np.lexsort((-found[:, 2], groups))  # stable: of equal scores the first
    groups = groups[order]
    return found[np.sort(order[np.arange(len(order)) - np.searchsorted(groups, groups) < MOST])]


def lvis_rules(boxes, found, absent, partly, K):
    """LVIS judges an image by the classes that were looked for in it. absent, partly [n,2]: images
    and labels that were checked to be absent, or of which only some are annotated."""
    boxes = boxes[boxes[:, 3] > 0]  # the official code loses what has no area
    found = best(found, found[:, 0])  # of all classes together, before any is dropped
    known = np.concatenate([boxes[:, :2], absent]) @ [K, 1]  # a pair as one number
    found = found[np.isin(found[:, :2] @ [K, 1], known) & (found[:, 5] * found[:, 6] > 0)]
    # Partly: what matches no box is ignored, as by a crowd larger than any image, whose IoU is the
    # share of a detection that lies inside it.
    crowds = np.tile([0, 0, 1, 0, -1e6, -1e6, 3e6, 3e6], (len(partly), 1))
    crowds[:, :2] = partly
    return np.concatenate([boxes, crowds]), found


def ancestors(file):
    """V3Det's category tree -> {category id: the ids of which it is a kind}."""
    tree = json.loads(Path(file).read_bytes())
    category = {node: int(key) for key, node in tree["categoryid2treeid"].items()}
    above = {key: [] for key in category.values()}
    for node, kinds in tree["ancestor2descendant"].items():
        for kind in {*kinds} & category.keys() if node in category else ():
            above[category[kind]].append(category[node])
    return above


def metrics(truth, found, image_ids, table=False):
    """LVIS's or V3Det's scores -> dict of AP, AP50, ..., 0..1; -1: nothing to find. table: print.
    truth: as in COCO's file, its images with LVIS's LISTS and its categories with a frequency, or
    with V3Det's {"ancestors": ...}; found: rows [D,7], but with the index into image_ids, which are
    scored, for image, and the category's id for label."""
    categories = sorted(truth["categories"], key=lambda record: record["id"])
    K, label = len(categories), {record["id"]: k for k, record in enumerate(categories)}
    rank = np.unique(image_ids, return_inverse=True)[1]  # pycocotools takes images in this order
    place = dict(zip(image_ids, rank.tolist()))
    found = np.column_stack([rank[found[:, 0].astype(int)],
                             np.searchsorted([*label], found[:, 1]), found[:, 2:]])
    boxes = [(place[box["image_id"]], label[box["category_id"]], box["iscrowd"], box["area"],
              *box["bbox"]) for box in truth["annotations"] if box["image_id"] in place]
    boxes = np.array(boxes, float).reshape(-1, 8)
    if (above := truth.get("ancestors")) is None:
        lists = [[(place[image["id"]], label[key]) for image in truth["images"] if image["id"]
                  in place for key in image.get(name) or () if key in label] for name in LISTS]
        boxes, found = lvis_rules(boxes, found, *(np.reshape(x, (-1, 2)) for x in lists), K)
    else:
        found = best(found, found[:, :2] @ [K, 1])
    found = found[np.lexsort((found[:, 0], found[:, 1]))]
    found = np.split(found, np.searchsorted(found[:, 1], range(1, K)))  # by label
    order = np.argsort(boxes[:, 1], kind="stable")
    rows = np.split(order, np.searchsorted(boxes[order, 1], range(1, K)))
    chosen = [k for k in range(K) if (boxes[rows[k], 2] == 0).any()]  # others have no AP

    def with_copies(k):
        """V3Det: an ancestor's box absorbs a detection of the class in its image: an area above
        pycocotools' largest makes it ignored among all, small, medium and large boxes."""
        kin = [rows[label[a]] for a in (above or {}).get(categories[k]["id"], ()) if a in label]
        copies = boxes[np.sort(np.concatenate([rows[k][:0], *kin]))]  # in the file's order
        copies = copies[np.isin(copies[:, 0], found[k][:, 0])]
        copies[:, 3] = 1e11
        return np.concatenate([boxes[rows[k]], copies])

    precision, recall = -np.ones((10, 101, K, 4)), -np.ones((10, K, 4))  # IoU, recall, class, area
    with ProcessPoolExecutor(min(os.cpu_count(), 4)) as pool:  # starts none until it is used
        spread = partial(pool.map, chunksize=16) if sum(map(len, found)) > 100_000 else map
        jobs = map(with_copies, chosen), (found[k] for k in chosen)
        for k, curves in zip(chosen, spread(row_curves, *jobs)):
            precision[:, :, k], recall[:, k] = curves
    parts = {"AP": precision[..., 0], "AP50": precision[0, ..., 0], "AP75": precision[5, ..., 0]}
    letters = np.array([record.get("frequency", "") for record in categories])
    parts |= {f"AP{x}": precision[:, :, letters == x, 0] for x in "rcf" if above is None}
    parts |= {f"AP_{size}": precision[..., n] for n, size in enumerate("SML", 1)}
    parts |= {f"AR{MOST}": recall[..., 0]}
    parts |= {f"AR_{size}": recall[..., n] for n, size in enumerate("SML", 1)}
    scores = {name: float(part[part > -1].mean()) if (part > -1).any() else -1.0
              for name, part in parts.items()}
    if table:
        print(*(f" {name:6} {score:.3f}" for name, score in scores.items()), sep="\n")
    return scores
