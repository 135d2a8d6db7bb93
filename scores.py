"""Scores by pycocotools alone: COCO's, LVIS's (Gupta 2019), V3Det's (Wang 2023), panoptic quality.

Boxes' scores are the official evaluators' to the last bit. Detections are rows [D, 7]: index of the
image, category id, score, x, y, w, h in pixels; as dicts V3Det's 29,821 images of 300 would fill
the memory. Read `metrics`, then what it chooses from.
"""
import contextlib
import io
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

METRICS = "AP AP50 AP75 AP_S AP_M AP_L AR1 AR10 AR100 AR_S AR_M AR_L".split()
LISTS = "neg_category_ids", "not_exhaustive_category_ids"  # of an image in LVIS's file
MOST = 300  # detections that count: LVIS's of an image, V3Det's of a class in an image


def metrics(truth, found, image_ids, drawn=(), table=False):
    """Scores of detections `found` (rows) and their masks `drawn` (RLE, if any) on these images ->
    {name: 0..1}; -1: nothing to find. truth: COCO's file as a dict, judged by the rules of LVIS or
    V3Det where it has their fields, else by COCO's. table: print."""
    if "ancestors" in truth or LISTS[0] in truth["images"][0]:
        return lvis_metrics(truth, found, image_ids, table)
    results, kinds = [*records(found, image_ids, drawn)], {"": "bbox"}
    if "segmentation" in truth["annotations"][0]:
        kinds["segm_"] = "segm"
    return {prefix + name: value for prefix, kind in kinds.items() for name, value in
            coco_metrics(truth, results, image_ids, table, kind).items()}


def records(found, image_ids, drawn=()):
    """Rows of detections and their masks -> pycocotools' results format, one after another."""
    for n, (i, key, sure, *box) in enumerate(map(np.ndarray.tolist, found)):
        yield {"image_id": image_ids[int(i)], "category_id": int(key), "bbox": box,
               "score": sure} | ({"segmentation": drawn[n]} if drawn else {})


def spread(function, detections, jobs, chunksize=1):
    """map(function, *jobs); of many detections, which take minutes, by up to four processes."""
    if detections <= 100_000:
        yield from map(function, *jobs)
        return
    with ProcessPoolExecutor(min(os.cpu_count(), 4)) as pool:
        yield from pool.map(function, *jobs, chunksize=chunksize)


# ========================================================================================== COCO

def coco_metrics(truth, detections, image_ids, table=False, kind="bbox"):
    """pycocotools' scores of detections in its results format, as `metrics` does -> {METRICS:
    0..1}. kind: "bbox", or "segm" for masks."""
    categories = sorted(category["id"] for category in truth["categories"])
    sides, chosen = [{category: [] for category in categories} for _ in range(2)], {*image_ids}
    boxes = [record for record in truth["annotations"] if record["image_id"] in chosen]
    for side, records in zip(sides, (boxes, detections)):
        for record in records:
            side[record["category_id"]].append(record)
    jobs = categories, *(side.values() for side in sides)
    curves = spread(partial(category_curves, image_ids, kind=kind), len(detections), jobs)
    precision, recall = zip(*curves)
    scorer = COCOeval(iouType=kind)
    scorer.eval = {"precision": np.concatenate(precision, 2), "recall": np.concatenate(recall, 1)}
    with contextlib.nullcontext() if table else contextlib.redirect_stdout(io.StringIO()):
        scorer.summarize()
        names = {record["id"]: record.get("name", "") for record in truth["categories"]}
        for category, curve, boxes in zip(categories, precision, sides[0].values()):
            curve = curve[:, :, 0, 0, -1]  # all sizes, 100 detections
            ap = f"{curve.mean():.3f}" if curve.size and curve.min() > -1 else "  -  "
            print(f" AP {ap} of {names[category]} ({len(boxes)} boxes)")
    return dict(zip(METRICS, scorer.stats.tolist()))


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


# =============================================================================== LVIS and V3Det

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


def lvis_metrics(truth, found, image_ids, table=False):
    """LVIS's or V3Det's scores, as `metrics`. truth: its images have LVIS's LISTS and its
    categories a frequency, or it has V3Det's "ancestors", {category id: ids it is a kind of}. In
    here boxes are rows too: image (in pycocotools' order), label, crowd, area, x, y, w, h."""
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
    jobs = map(with_copies, chosen), (found[k] for k in chosen)
    for k, curves in zip(chosen, spread(row_curves, sum(map(len, found)), jobs, chunksize=16)):
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


# ============================================================================ panoptic quality

def panoptic_counts(truth, true, found, segments):
    """An image's part of panoptic quality -> {label: [sum of matches' IoU, matches, false alarms,
    misses]}. Segments of one label match at an IoU above 0.5: each has one match at most.

    truth, found: maps [H, W]; true {number: (label, is it a crowd)}, other numbers are void;
    segments {number: label}. As in panopticapi, void is in no union, crowds need not be found, and
    what lies in void and its label's (last) crowd by more than half is no false alarm.
    """
    labels = {label for label, _ in true.values()} | {*segments.values()}
    counts, hit, right = {label: np.zeros(4) for label in labels}, set(), set()
    truth, base = np.where(np.isin(truth, [*true]), truth, 0).astype(np.int64), int(found.max()) + 1
    true_area, area, both = (Counter(x.ravel().tolist())  # in pixels; both: of truth and found
                             for x in (truth, found, truth * base + found))
    for pair, n in both.items():
        t, f = divmod(pair, base)
        if t and f in segments and true[t] == (segments[f], 0):
            if (iou := n / (true_area[t] + area[f] - n - both[f])) > 0.5:  # both[f]: with void
                counts[segments[f]] += (iou, 1, 0, 0)
                hit.add(t)
                right.add(f)
    crowds = {label: t for t, (label, crowd) in true.items() if crowd}
    for t, (label, crowd) in true.items():
        counts[label][3] += not crowd and t not in hit
    for f, label in segments.items():
        ignored = both[f] + (both[crowds[label] * base + f] if label in crowds else 0)
        counts[label][2] += f not in right and ignored <= area[f] / 2
    return counts


def panoptic_quality(counts, things, table=False):
    """PQ = sum of IoU / (TP + FP / 2 + FN / 2), the mean over labels that occur: all, things, stuff
    (-1: none). counts: of images, a list. table: print."""
    sums = {label: sum(image[label] for image in counts if label in image)
            for label in {label for image in counts for label in image}}
    each = {label: iou / (hit + (false + missed) / 2)
            for label, (iou, hit, false, missed) in sums.items() if hit + false + missed}
    groups = dict(PQ=each, PQ_things={*each} & {*things}, PQ_stuff={*each} - {*things})
    quality = {name: sum(each[label] for label in of) / len(of) if of else -1.0
               for name, of in groups.items()}
    if table:
        print(*(f"{name} {value:.3f}" for name, value in quality.items()), sep=", ")
    return quality
