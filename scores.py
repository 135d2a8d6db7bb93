"""COCO's twelve numbers: what pycocotools computes, digit for digit, in a tenth of its time.

pycocotools matches detections in Python, one (image, category, size range, IoU threshold) after the other. Here the
40 combinations of range and threshold, and many (image, category) pairs at a time, advance together through their
ranked detections; pairs without ground truth, most of them, need no matching at all. Its IoU, its thresholds and its
summary are used as they are. Read `matched`, then `coco_metrics`.

Shapes: N pairs of image and category, D detections, G ground truths, A size ranges, T IoU thresholds, R recalls.
"""
import contextlib
import io

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

METRICS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L")
MISS, HIT, IGNORED = 0, 1, 2        # what a detection matched: nothing, an object, one that does not count


def matched(iou, ranked, ignored, crowd, thresholds):
    """COCO's greedy matching of N pairs at a time -> [N, A, T, D] of MISS, HIT, IGNORED.

    iou [N, D, G], best detection first, -1 where a pair has fewer; ranked [N], its detections, in falling order;
    ignored [N, A, G] and crowd [N, G] bool. A detection takes the free object it overlaps most, from the threshold on
    (the last of equals); only if there is none, one that is ignored. Crowds are never used up.
    """
    N, D, G = iou.shape
    found = np.zeros((N, ignored.shape[1], len(thresholds), D), np.int8)
    free = np.ones((*found.shape[:3], G), bool)
    for d in range(D):
        n = np.count_nonzero(ranked > d)
        overlap = iou[:n, d, None, None]                                                                # [n, 1, 1, G]
        able = free[:n] & (overlap >= thresholds[:, None])                                              # [n, A, T, G]
        counted = able & ~ignored[:n, :, None]
        able = np.where(counted.any(-1, keepdims=True), counted, able)
        best = G - 1 - np.where(able, overlap, -1)[..., ::-1].argmax(-1)[..., None]                     # [n, A, T, 1]
        some = able.any(-1)
        kind = np.take_along_axis(np.broadcast_to(ignored[:n, :, None], able.shape), best, -1)[..., 0]
        found[:n, :, :, d] = some * np.where(kind, IGNORED, HIT)
        stays = np.take_along_axis(np.broadcast_to(crowd[:n, None, None], able.shape), best, -1)[..., 0] | ~some
        np.put_along_axis(free[:n], best, np.take_along_axis(free[:n], best, -1) & stays[..., None], -1)
    return found


def columns(records, image_ids, category_ids):
    """Annotations or results as arrays, of these images and categories: image and category index, bbox [n,4], records."""
    image, category = (np.array([r[key] for r in records], np.int64) for key in ("image_id", "category_id"))
    kept = np.flatnonzero(np.isin(image, image_ids) & np.isin(category, category_ids))
    boxes = np.array([r["bbox"] for r in records], np.float64).reshape(-1, 4)
    return np.searchsorted(image_ids, image[kept]), np.searchsorted(category_ids, category[kept]), boxes[kept], kept


def coco_metrics(truth, detections, image_ids, table=False):
    """Score detections on some images of a data set -> dict of METRICS, 0..1; -1 where there is nothing to find.

    truth: COCO's dict of a data set. detections: its results format, [{image_id, category_id, bbox, score}]. image_ids:
    the images that count. table: print pycocotools' twelve lines.
    """
    scorer = COCOeval(iouType="bbox")
    p = scorer.params
    limits, most = np.array(p.areaRng, float), p.maxDets[-1]
    thresholds = np.minimum(p.iouThrs, 1 - 1e-10)
    image_ids, category_ids = np.unique(image_ids), np.unique([c["id"] for c in truth["categories"]])
    I, K, A, T = len(image_ids), len(category_ids), len(limits), len(thresholds)

    def outside(area):                                                                                      # [A, n]
        return (area < limits[:, :1]) | (area > limits[:, 1:])

    # Ground truths, by pair of category and image, as in the file.
    image, category, gt_boxes, kept = columns(truth["annotations"], image_ids, category_ids)
    order = np.argsort(category * I + image, kind="stable")
    gt_pair, gt_boxes = (category * I + image)[order], gt_boxes[order]
    records = [truth["annotations"][i] for i in kept[order]]
    crowd = np.array([bool(r.get("iscrowd")) for r in records], bool)
    ignored = outside(np.array([r["area"] for r in records], float)) | crowd                                 # [A, n]

    # Detections, by pair, best first, at most 100 a pair.
    image, category, boxes, kept = columns(detections, image_ids, category_ids)
    scores = np.array([d["score"] for d in detections], np.float64)[kept]
    order = np.lexsort((-scores, image, category))
    pair, boxes, scores = (category * I + image)[order], boxes[order], scores[order]
    rank = np.arange(len(pair)) - np.searchsorted(pair, pair)
    pair, boxes, scores, rank = (x[rank < most] for x in (pair, boxes, scores, rank))
    beyond = outside(boxes[:, 2] * boxes[:, 3])                                                             # [A, n]

    # Match the pairs that have both, those with about as many ground truths together.
    found = np.full((A, T, len(pair)), MISS, np.int8)
    both = np.intersect1d(pair, gt_pair)
    (first, last), (gt_first, gt_last) = ([np.searchsorted(p, both, s) for s in ("left", "right")] for p in (pair, gt_pair))
    D, G = last - first, gt_last - gt_first
    size = np.ceil(np.log2(np.maximum(G, 1))).astype(int)
    for s in np.unique(size):
        alike = np.flatnonzero(size == s)
        alike = alike[np.argsort(-D[alike], kind="stable")]
        for chunk in np.split(alike, range(0, len(alike), max(1, 4096 >> s))[1:]):
            iou = np.full((len(chunk), D[chunk].max(), G[chunk].max()), -1.0)
            ignore, crowds = np.zeros((len(chunk), A, iou.shape[2]), bool), np.zeros((len(chunk), iou.shape[2]), bool)
            for n, c in enumerate(chunk):
                here = slice(gt_first[c], gt_last[c])
                iou[n, :D[c], :G[c]] = coco_mask.iou(boxes[first[c]:last[c]], gt_boxes[here], crowd[here].astype(np.uint8))
                ignore[n, :, :G[c]], crowds[n, :G[c]] = ignored[:, here], crowd[here]
            result = matched(iou, D[chunk], ignore, crowds, thresholds)
            for n, c in enumerate(chunk):
                found[:, :, first[c]:last[c]] = result[n, :, :, :D[c]]

    # Precision and recall. Only what the summary reads: precision at 100 detections, recall at 1, 10 and 100.
    precision = np.full((T, len(p.recThrs), K, A, len(p.maxDets)), -1.0)
    recall = np.full((T, K, A, len(p.maxDets)), -1.0)
    edges, gt_edges = (np.searchsorted(x, np.arange(K + 1) * I) for x in (pair, gt_pair))
    for k in range(K):
        here = slice(edges[k], edges[k + 1])
        sort = np.argsort(-scores[here], kind="stable")
        for a in range(A):
            positives = np.count_nonzero(~ignored[a, gt_edges[k]:gt_edges[k + 1]])
            if positives == 0:
                continue
            hits = found[a, :, here] == HIT                                                                 # [T, n]
            misses = (found[a, :, here] == MISS) & ~beyond[a, here]
            for m, allowed in enumerate(p.maxDets):
                recall[:, k, a, m] = (hits & (rank[here] < allowed)).sum(1) / positives
            for t in range(T):
                true, false = hits[t, sort].cumsum().astype(float), misses[t, sort].cumsum().astype(float)
                envelope = np.maximum.accumulate((true / (false + true + np.spacing(1)))[::-1])[::-1]
                reached = np.searchsorted(true / positives, p.recThrs, side="left")
                precision[t, :, k, a, -1] = np.append(envelope, 0)[reached]
    scorer.eval = dict(precision=precision, recall=recall)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        scorer.summarize()
    if table:
        print(printed.getvalue(), end="")
    return dict(zip(METRICS, scorer.stats.tolist()))
