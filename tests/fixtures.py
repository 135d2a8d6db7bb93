"""What several files of tests share: small models, random batches, data on disk, tiny runs."""
import contextlib
import io
import json
from pathlib import Path

import torch

import data
import train
import variants
import weights
from model import build_model

HERE = Path(__file__).parent.parent
TINY = dict(backbone_norm="batch", num_classes=5, num_queries=20, decoder_layers=2)
SMALL = variants.SMALL | TINY | dict(encoder_layers=1)
VIT = variants.SMALL_VIT | dict(vit_width=48, vit_heads=4, vit_depth=4, taps="1 3", drop_path=0.0,
                                global_blocks="1 3", d_model=96, query_groups=3)


def shrunk(name):
    """The fields that make a variant small."""
    row = variants.VARIANTS[name]
    return variants.small(row) | TINY | dict(encoder_layers=min(1, row.encoder_layers)) | (
        VIT if row.backbone in variants.VITS else {})


# Rows that differ when they are small, each once; but DC5 needs bottlenecks.
TRAINED = [*{variants.variant(name, **shrunk(name)): name for name in reversed(variants.VARIANTS)
             if not name.endswith("dc5") and name != "faster_rcnn"}.values()][::-1]

# Options of train.py that make a run of seconds.
TINY_RUN = """--image-size 64 --max-size 64 --queries 10 --d-model 64 --ffn 64 --heads 4
    --encoder-layers 1 --decoder-layers 2 --batch-size 4 --micro-batch 4 --workers 0
    --device cpu --amp none""".split()


def small(name, **overrides):
    """A small model of a variant, with weights that depend on the seed alone."""
    torch.manual_seed(0)
    return build_model(name, **shrunk(name) | overrides)


def batch(counts=(3, 1), size=96, dtype=torch.float32):
    """Random images, all but the first smaller and padded, with so many boxes each."""
    g, B = torch.Generator().manual_seed(0), len(counts)
    images, mask = torch.randn(B, 3, size, size, generator=g), torch.zeros(B, size, size).bool()
    mask[1:, size * 3 // 4:] = mask[1:, :, size * 2 // 3:] = True
    images[mask[:, None].expand_as(images)] = 0
    least = torch.tensor([0.35, 0.35, 0.1, 0.1])
    targets = [{"labels": torch.randint(0, 5, (n,), generator=g),
                "boxes": (torch.rand(n, 4, generator=g) * 0.3 + least).to(dtype)} for n in counts]
    for target, n in zip(targets, counts):
        target["masks"] = torch.rand(n, size, size, generator=g) > 0.5
    return images.to(dtype), mask, targets


def error_of(function, *args, kind=Exception, **kwargs):
    """The message of the error that a call raises; fails when it raises none, or another kind."""
    try:
        function(*args, **kwargs)
    except kind as error:
        return str(error)
    raise AssertionError(f"{function} raised nothing")


def refused(words, function, *args, **kwargs):
    """The call raises an error for users whose message holds all the words (divided by |)."""
    kinds = data.DataError, weights.WeightsError, variants.ConfigError
    message = error_of(function, *args, kind=kinds, **kwargs)
    assert all(word in message for word in words.split("|")), f"not {words}: {message}"


def coco_folder(folder, images=6):
    """A small data set of toy shapes in COCO's layout, with category ids 7, 9, ..."""
    shapes = data.ToyShapes(images, size=64)
    truth = shapes.ground_truth()
    truth["categories"] = [thing | {"id": 7 + 2 * thing["id"]} for thing in truth["categories"]]
    outlines = [points.ravel().tolist() for i in range(images)
                for _, points, _ in data.toy_scene(f"toy 0 {i}", 64)[1]]
    for box, points in zip(truth["annotations"], outlines):
        box |= {"category_id": 7 + 2 * box["category_id"], "segmentation": [points]}
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        for i, image in enumerate(truth["images"]):
            image["file_name"] = f"{image['id']}.png"
            shapes.read(i)[0].save(folder / split / image["file_name"])
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(truth))
    return folder


def run_quietly(argv, main=train.main):
    """A command line's exit code, and what it said on stderr and stdout."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
        try:
            code = main(argv)
        except SystemExit as stop:  # argparse's own errors
            code = stop.code
    return code, said.getvalue()
