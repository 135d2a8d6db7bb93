"""Tests of eval.py: from the heads to boxes, COCO's numbers, drawings, the command line."""
import contextlib
import json
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.ops import box_convert

import data
import eval as evaluation
import variants
import weights
from tests.fixtures import refused, run_quietly, small

FOCAL = variants.deformable.but(detections=40, ensemble_nms=0.3)


class Oracle(nn.Module):
    """Knows the answers by the image's upper left pixels, so that any order and batch will do."""

    def __init__(self, dataset):
        super().__init__()
        self.device_of, self.cfg, self.answers = nn.Parameter(torch.zeros(1)), FOCAL, {}
        for image, target in (dataset[i] for i in range(len(dataset))):
            n = len(target["labels"])
            logits = torch.full((8, len(dataset.category_ids)), -20.0)
            logits[range(n), target["labels"]] = 10.0
            boxes = torch.cat([target["boxes"], torch.full((8 - n, 4), 0.5)])
            self.answers[str(data.normalised(image)[:, :8, :8])] = logits, boxes

    def forward(self, images, mask, watch=None):
        answers = zip(*(self.answers[str(image[:, :8, :8])] for image in images))
        logits, boxes = (torch.stack(x)[None] for x in answers)
        return {"logits": logits, "boxes": boxes}


def toy(count=6, known=None, size=64):
    return data.open_data("toy", None, "val", data.eval_transform(size, size), known, size, count)


def command(words, *checkpoint):
    """Run the command line in-process -> (exit code, all that it said)."""
    load = mock.Mock(return_value=checkpoint) if checkpoint else weights.load_checkpoint
    with mock.patch.object(weights, "load_checkpoint", load):
        return run_quietly(words.split(), evaluation.main)


def meta(dataset, size=64):
    return dict(classes=dataset.classes, category_ids=dataset.category_ids, held_out=[],
                recipe=dict(image_size=size, max_size=size))


def test_eval_scores_data():
    known = dict(enumerate(["N/A", *data.OUTLINES])) | {9: "N/A"}  # two labels without a category
    model = Oracle(dataset := toy(4, known))
    for logits, _ in model.answers.values():
        logits[:, [0, 6]] = 15.0  # the best scores, and to be dropped
    with tempfile.TemporaryDirectory() as folder:
        words = f"--weights {folder}/x.pth --data toy --limit 4 --device cpu --workers 0"
        code, said = command(words, model, meta(dataset))  # the other 196 are not misses
        assert code == 0 and "= 1.000" in said and "AP 1.000 of circle (" in said, said
        assert Image.open(f"{folder}/results-4.png").width == 4 * 524
        found = json.loads(Path(folder, "results-4.json").read_text())
        assert found[0].keys() == {"image_id", "category_id", "bbox", "score"}
        assert {d["category_id"] for d in found} <= {*range(1, 6)}


def test_eval_compare():
    """Which run's class loss comes below another's lowest, and at which step."""
    with tempfile.TemporaryDirectory() as folder:
        for run, floor in (("a", 0.5), ("b", 0.1)):
            Path(folder, run).mkdir()
            Path(folder, run, "run.json").write_text('{"config": {"class_loss": "ce"}}')
            lines = [dict(step=n, loss_class=floor + 100 / n ** 2) for n in range(10, 210, 10)]
            Path(folder, run, "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"st')
        code, said = command(f"--compare {folder}/a {folder}/b --out {folder}/c.png")
        assert code == 0 and "a (ce) never beats" in said  # 100 / step^2 < 0.4025 from 16 on
        assert "0.5025, at step 20\n" in said and Path(folder, "c.png").exists()


def test_eval_queries():
    """Where a query looks on average and how far it strays; near misses, sure ones and others."""
    model = Oracle(toy(2))
    for _, boxes in model.answers.values():
        boxes[0, 0] += boxes[0, 2] / 2  # half beside its object: IoU 1/3
        boxes[7] = boxes[0]  # the same with a low score
    first, second = (boxes[:, :2] for _, boxes in model.answers.values())
    strays = ((first - second).norm(dim=-1) / 2).mean()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "run.json").write_text(
            '{"run": {"data": "toy", "data_root": null, "overfit": 0}}')
        _, said = command(f"--queries {folder} --out {folder}/q.png --limit 2 --workers 0",
                          model, meta(toy(2)))
        assert Path(folder, "q.png").exists()
    assert f"strays {strays:.3f} of" in said and "2 of 4 near misses" in said, said


def test_eval_predict():
    """Folders, a damaged file, equal names, boxes in pixels; nothing is written over."""
    model = Oracle(dataset := toy(1))
    with tempfile.TemporaryDirectory() as folder:
        for path in (Path(folder, name) for name in ("a/1.png", "a/1-3.png", "b/c/1.png")):
            path.parent.mkdir(exist_ok=True, parents=True)
            dataset.read(0)[0].save(path)
        for name in ("b/c/broken.jpg", "b/._1.png", "b/notes.txt"):
            Path(folder, name).write_bytes(b"not an image")
        words = f"--weights x.pth --device cpu --images {folder}/a {folder}/b --out {folder}/"
        code, said = command(words + "out --batch-size 3", model, meta(dataset))
        assert code == 1 and "broken.jpg" in said and "3 of 4 photos" in said, said
        assert f"{folder}/out-2" in command(words + "out", model, meta(dataset))[1]
        first = json.loads(Path(folder, "out/predictions.json").read_text())[0]
        assert len([*Path(folder, "out").glob("*.jpg")]) == 3
        expected = box_convert(64 * dataset[0][1]["boxes"], "cxcywh", "xywh").tolist()
        boxes = [found["bbox"] for found in first["detections"]]
        np.testing.assert_allclose(sorted(boxes), sorted(expected), atol=1e-3)
        assert "name another folder" in command(words + "a", model, meta(dataset))[1]
        finder, image = evaluation.Finder(model, meta(dataset)), dataset.read(0)[0]
        one, *rest = finder([f"{folder}/a/1.png", image, np.array(image)], batch_size=2)
        assert rest == [one, one] and finder(Path(folder, "a/1.png")) == one


def test_eval_export():
    """Equal to PyTorch's outputs, for another number of images than it was traced with."""
    torch.manual_seed(0)
    model = small("diffu", sampling_steps=2, d_model=64, ffn=64, decoder_layers=1).eval()
    inputs = [torch.randn(3, 3, 64, 64), torch.zeros(3, 64, 64) > 0, torch.randn(3, 3, 20, 4)]
    inputs[1][2, 40:] = True
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected, found = evaluation.Exported(model)(*inputs), []
        evaluation.export(model, 64, path := Path(folder, "model.pt2"))
        found += torch.export.load(path).module()(*inputs)
        path = path.with_suffix(".onnx")
        with mock.patch.dict("sys.modules", onnxscript=None):
            refused("pip install onnx", evaluation.export, model, 64, path)
        with contextlib.suppress(ImportError):  # packages that only this needs
            import onnxruntime
            evaluation.export(model, 64, path)
            session = onnxruntime.InferenceSession(path)
            names = (each.name for each in session.get_inputs())
            found += map(torch.tensor, session.run(
                None, {name: x.numpy() for name, x in zip(names, inputs)}))
    for got, want in zip(found, [*expected] * 2):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_eval_trajectory():
    dataset, model = toy(1, size=96), small("diffu", sampling_steps=2)
    nn.init.normal_(model.bbox_embed[-1][-1].weight)  # or no box would leave its place
    with tempfile.TemporaryDirectory() as folder:
        dataset.read(0)[0].save(f"{folder}/a.png")
        words = f"--weights {folder}/x --images {folder}/a.png --device cpu --trajectory --score 0"
        assert command(words, model, meta(dataset, 96))[0] == 0
        strip = Image.open(f"{folder}/predictions/a-trajectory.png")
        assert strip.size == (4 * 492, 524)  # noise, two steps, detections


def test_eval_wrong_commands_and_sampler_options():
    """Errors are one clear line; every option of the sampler reaches the checkpoint's model."""
    def checkpoint(cfg):
        model = mock.Mock(cfg=cfg)
        model.to.return_value = model
        return model, meta(toy(1))

    for words, hint in (("--weights x", "--data"), ("--data toy", "--weights is missing"),
                        ("--weights x --images a --trajectory", "diffusion"),
                        ("--compare nowhere", "nowhere")):
        code, said = command(words, *checkpoint(FOCAL))
        assert code == 2 and "error: " in said and hint in said, (words, said)
    given = dict(sampling_steps=1, eta=0.5, renewal=False, sampler="ddim", ensemble_nms=0.6)
    one_step = checkpoint(variants.diffu.but(sampling_steps=1))
    with mock.patch.object(weights, "load_checkpoint", return_value=one_step) as load:
        _, said = command("--weights x --data toy --sampling-steps 1 --eta 0.5 --no-renewal "
                          "--sampler ddim --ensemble-nms 0.6")
    load.assert_called_once_with(Path("x"), **given)
    assert {*given} == {*variants.SAMPLING} and "is read only with --sampling-steps 2" in said


