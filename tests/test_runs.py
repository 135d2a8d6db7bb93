"""Tests of runs.py and train.py: command lines, whole runs and what fails in them, processes."""
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import unittest
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import data
import diffusion
import eval as evaluation
import matcher
import runs
import train
import variants
import weights
from tests.fixtures import (HERE, TINY_RUN, TRAINED, batch, coco_folder, error_of, run_quietly,
                            small)

SCRATCH = ["--backbone-weights", "none", "--ema", "0", "--eval-every", "100", *TINY_RUN]


def boxes(folder, images=6):
    """Options of a run on a small folder in COCO's layout."""
    return ["--data", str(coco_folder(Path(folder) / "boxes", images)), *SCRATCH]


def says(argv, code, *words):
    """Run train.py, which ends with this exit code and says these words -> all it said."""
    found, said = run_quietly(argv)
    assert found == code and all(word in said for word in words), said
    return said


def stored(folder, name="last.pth"):
    return weights.read_checkpoint(Path(folder) / name)


def before_step(number, trouble):
    """Something happens before train.py's n-th step."""
    original, calls = train.forward_backward, []
    return mock.patch.object(train, "forward_backward", lambda *args: (
        calls.append(1), len(calls) == number and trouble(), original(*args))[-1])


def test_runs_options_that_a_variant_does_not_read_are_refused():
    for name, f in variants.FIELDS.items():
        for variant in ("detr", "dino", "diffu", "rf_nano"):
            row = variants.VARIANTS[variant]
            # On toy shapes no backbone is frozen.
            given = {"variant": variant, "data": "coco" if name == "frozen_stages" else "toy",
                     name: getattr(row, name, f.default)}
            if variants.idle([name], row):
                why = error_of(runs.settle, given, kind=variants.ConfigError)
                assert why.startswith(f"--{name.replace('_', '-')} is read only with --"), why
            else:
                assert getattr(runs.settle(given)[1 + (name not in vars(row))], name) == given[name]


def test_runs_wrong_commands_are_one_clear_line():
    with tempfile.TemporaryDirectory() as folder:
        for line, word in [
                ("--variant detrr", "do you mean detr?"), ("--bach-size 1", "mean --batch-size?"),
                (f"--data {folder}/none", "none"), ("--save-steps 0", "at least 1"),
                ("--queries x", "'x'"), ("--content split", "content=learned"),
                ("--device nonsense", "write --device cpu"), (f"--resume {folder}", "no last.pth"),
                (f"--freeze encoder,wheel --out {folder}", "--freeze wheel: this model has back")]:
            says(line.split(), 2, word)


def test_runs_presets_and_precedence():
    for name in variants.VARIANTS:
        assert runs.settle(dict(variant=name, data="coco"))[2] == variants.recipe(name)
    for table, field, expected, given in [
            (0, "preset", "small", dict(data="a/folder")), (1, "d_model", 128, dict(data="toy")),
            (1, "dn_queries", 100, dict(variant="diffu")),  # nothing reads it: it is not changed
            (1, "dn_queries", 20, dict(variant="diffu", denoising="cdn")),
            (1, "backbone", "resnet50", dict(variant="detr_dc5")),
            (1, "backbone_norm", "batch", dict(data="coco", backbone_weights="none")),
            (2, "steps", 500, dict(overfit=8)), (2, "steps", 0, dict(overfit=8, epochs=3)),
            (2, "max_size", 666, dict(data="coco", image_size=400))]:  # does not hold that back
        settled = runs.settle(given)[table]
        assert (settled if table == 0 else vars(settled))[field] == expected, given
    assert runs.parse(["--queries", "7", "--no-renewal"], "") == dict(num_queries=7, renewal=False)
    usual, everything = (run_quietly(["--help", *more])[1] for more in ([], ["all"]))
    assert "--val-share" in usual and "--eta" not in usual and "--eta" in everything


def test_train_whole_path_and_fine_tuning():
    """A whole run's files; then the same classes keep their heads, others do not."""
    with tempfile.TemporaryDirectory() as folder:
        out, start = f"{folder}/run", boxes(folder)
        says(["--variant", "dino", *start, "--steps", "12", "--eval-every", "7", "--out", out],
             0, "done at step 12")
        assert {"curves.png", "predictions.png", "run.json"} <= {*os.listdir(out)}
        lines = [json.loads(line) for line in open(f"{out}/log.jsonl")]
        assert [(line["step"], "AP" in line) for line in lines] == [
            (7, True), (10, False), (12, False), (12, True)]
        assert {"loss", "loss_giou_enc", "loss_bbox_dn_0", "grad_norm"} <= {*lines[1]}
        meta = weights.load_checkpoint(f"{out}/best.pth")[1]
        assert meta["category_ids"] == [7 + 2 * i for i in data.ToyShapes(1).category_ids]
        says([*start, "--out", out], 2, "already holds a run")

        more = ["--weights", f"{out}/best.pth", *start[:2], "--steps", "1", "--workers", "0",
                "--batch-size", "2", "--out"]
        cut = ["--data", f"{start[1]}/train2017", "--annotations",
               f"{start[1]}/annotations/instances_train2017.json"]
        says([*more, f"{folder}/same", "--image-size", "64", *cut, "--val-share", "0.3"], 0,
             "none new", "crop=True", "train: 4 images", "val:   2 images")
        code, said = run_quietly(["--weights", f"{folder}/same/best.pth", *cut], evaluation.main)
        assert code == 0 and "2 of 2 images" in said, said
        for split in ("val", "train"):
            file = Path(start[1], "annotations", f"instances_{split}2017.json")
            file.write_text(file.read_text().replace('"circle"', '"zebra"'))
        says([*more, f"{folder}/other", "--freeze", "backbone, encoder"], 0, "new, for 5 classes")
        a, b = stored(out, "best.pth")["model"], stored(f"{folder}/other")["model"]
        for name in ("backbone.bn1.running_mean", "decoder.0.linear1.weight"):
            assert torch.equal(a[name], b[name]) == (not name.startswith("decoder")), name


def test_train_resume_continues_as_if_never_stopped():
    """Stop by SIGTERM in the middle of an epoch, cut the last checkpoint short, resume from the one
    before: the last weights equal the uninterrupted run's, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        common = ["--variant", "diffu_dino", *boxes(folder, 9), "--steps", "5", "--dropout", "0.1",
                  "--ema", "0.9", "--out"]
        whole, cut = f"{folder}/whole", f"{folder}/cut"
        says([*common, whole], 0)
        with before_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            says([*common, cut, "--save-steps", "1", "--keep-every", "2"], 128 + signal.SIGTERM,
                 "stopped at step 3", f"--resume {cut}", "0 of 5, ", " left")
        os.truncate(f"{cut}/last.pth", 10000)
        says(["--resume", cut], 0, "cut/last.pth: ", "last.prev.pth", "2 done")
        assert [stored(cut, f"step-{i}.pth")["step"] for i in (2, 4)] == [2, 4]
        a, b = stored(whole), stored(cut)
        assert a["step"] == b["step"] == 5
        for part in ("model", "ema"):
            assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part
    with runs.catch_signals() as came:
        os.kill(os.getpid(), signal.SIGTERM)
        assert came() == signal.SIGTERM  # and a second one stops immediately
        error_of(os.kill, os.getpid(), signal.SIGINT, kind=KeyboardInterrupt)


def test_train_overfits_the_first_images_alone():
    """And opens no other; fp16's scale is saved; a loss that is no number names the images."""
    with tempfile.TemporaryDirectory() as folder:
        start, out = [*boxes(folder, 4), "--batch-size", "2", "--warmup", "0"], f"{folder}/run"
        for broken in sorted(Path(folder, "boxes", "train2017").iterdir())[2:]:
            broken.write_bytes(b"not an image")
        start += ["--overfit", "2", "--steps"]
        says([*start, "1", "--variant", "dino", "--amp", "fp16", "--checkpoint-activations",
              "--out", out], 0)
        first, more = stored(out), ["--resume", out, "--steps", "2"]
        says([*more, "--ffn", "7"], 2, "contradicts")
        says([*more, "--lr", "1e-5"], 0)
        assert stored(out)["scaler"] != first["scaler"] and stored(out)["scaler"]["scale"] > 1
        losses = {"loss": torch.tensor(math.nan)}
        with mock.patch.object(train, "forward_backward", return_value=losses):
            says([*start, "9", "--out", f"{folder}/nan"], 2, "step 0, image ids [")


def test_train_goes_on_after_what_failed_is_mended():
    """An image, the disk, a worker: the steps until then are saved."""
    with tempfile.TemporaryDirectory() as folder:
        start, out = ["--variant", "detr", *boxes(folder), "--batch-size", "2"], f"{folder}/run"
        image, more = Path(folder) / "boxes" / "train2017" / "3.png", ["--resume", out]
        whole = image.read_bytes()
        with before_step(4, lambda: image.write_bytes(whole[:50])):
            says([*start, "--steps", "8", "--save-steps", "2", "--out", out], 2, "3.png",
                 f"--resume {out}", "2 x 2 tokens", "--variant deformable")  # too few for dense
        stopped = stored(out)["step"]
        assert stopped >= 4  # in its second epoch
        image.write_bytes(whole)
        with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
            says(more, 2, "No space left", "is kept")
        assert stored(out)["step"] == stopped and not [*Path(out).glob("*.tmp")]
        read = data.read_image
        torch.multiprocessing.set_start_method("fork", force=True)  # workers that see the patch
        with mock.patch.object(data, "read_image", lambda *args: os.kill(os.getpid(), 9)
                               if torch.utils.data.get_worker_info() else read(*args)):
            says([*more, "--workers", "1"], 2, "worker", f"--resume {out}")
        with open(f"{out}/log.jsonl", "a") as log:  # of steps after its last checkpoint
            log.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
        says([*more, "--workers", "0"], 0, "done at step 8")
        assert Path(out, "log.jsonl").read_text().count('"step"') == 2  # its line, its test


def test_train_waits_for_a_gpu_once_a_step():
    """In the matcher; else the host would idle while the GPU catches up."""
    if not torch.cuda.is_available():
        raise unittest.SkipTest("needs a GPU")
    built, criterion = small("dino").cuda(), matcher.Criterion(small("dino").cfg)
    images, mask, targets = batch()
    targets = [{key: value.cuda() for key, value in target.items()} for target in targets]
    for mode in "default", "warn":  # the first step compiles and chooses kernels
        torch.cuda.set_sync_debug_mode(mode)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            criterion(built(images.cuda(), mask.cuda(), targets), targets)[0].backward()
    torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in said if "synchroniz" in str(one.message)]
    assert len(waits) <= 1, waits


def test_train_rate_groups_and_schedule():
    """A parameter's rate over its own (1e-4; backbone's 1.5e-4, DETR's 1e-5), and its decay."""
    recipe = variants.RECIPES["deformable"].but(warmup=10)
    assert [train.rate_factor(s, 50, recipe) for s in (3, 39, 40)] == [0.8, 1, 0.1]
    decoder = {"decoder.0.norm1.weight": (0.7, 1), "decoder_norm.bias": (0.7, 1),
               "ref_point_head.0.weight": (0.7, 1), "input_proj.stages.0.1.bias": (1, 1),
               "bbox_embed.0.0.bias": (1, 1), "refpoint_embed.weight": (1, 1)}
    for name, wanted in dict(
            deformable={"backbone.layer2.0.conv1.weight": (2 / 15, 1), "level_embed": (2, 1),
                        "encoder.0.self_attn.sampling_offsets.weight": (0.2, 1),
                        "reference_points.weight": (0.2, 1)},
            diffu={"decoder.0.norm1.weight": (1, 0), "decoder.0.linear1.weight": (1, 1)},
            lw_tiny=decoder | {"backbone.blocks.3.attn.qkv.weight": (0.8 * 0.49, 1),
                               "backbone.blocks.0.gamma_1": (0.8 ** 4 * 0.49, 0),
                               "backbone.pos_embed": (0.8 ** 5 * 0.49, 0),
                               "backbone.patch_embed.weight": (0.8 ** 5 * 0.49, 1)},
            rf_nano=decoder | {"backbone.blocks.3.attn.query.weight": (0.8 ** 2 * 0.49, 1),
                               "backbone.norm.weight": (0.49, 0),
                               "backbone.cls_token": (0.8 ** 6 * 0.49, 0)}).items():
        built, found = small(name), {}
        for group in train.parameter_groups(built, variants.recipe(name)):
            found |= {p: (group["lr"], group["weight_decay"]) for p in group["params"]}
        for key, (rate, decays) in wanted.items():
            own = 1.5e-4 if key.startswith("backbone") else 1e-4
            got = found[built.get_parameter(key)]
            assert np.allclose(got, (own * rate, 1e-4 * decays)), (name, key, got)


def test_train_sizes_per_batch():
    """RF-DETR: squares of 11 sizes, drawn from the step's seed, in which places stay."""
    run, sides = mock.Mock(recipe=variants.recipe("rf_nano")), set()
    run.model.backbone.divisor = 32
    images, mask = torch.rand(2, 3, 384, 384), torch.zeros(2, 384, 384).bool()
    images[:, :, 100:200] = 0.5
    for seed in range(80):
        torch.manual_seed(seed)
        a, b = train.resampled(run, images, mask)
        assert a.shape[2:] == b.shape[1:]
        assert torch.allclose(a[:, :, int(0.4 * a.shape[2])], torch.tensor(0.5))
        sides.add(a.shape[2:])
    assert sides == {(side, side) for side in range(224, 545, 32)}


CASES = [(name, (3, 1, 2, 3)) for name in TRAINED] + [("detr", (0, 0, 2, 1)), (
    "diffu", (0, 0, 2, 1))] + [(name, (0, 0, 0, 0)) for name in ("detr", "diffu", "dino", "dn")]


def noise_by_image(targets, cfg, generator=None, original=diffusion.noised_references):
    """DiffuDETR's noise from the image's own boxes: the same, whichever process draws it."""
    drawn = [original([t], cfg, torch.Generator().manual_seed(int(1e9 * t["boxes"].sum())))
             for t in targets]
    return tuple(torch.cat(parts) for parts in zip(*drawn))


def gradients_of(name, counts, mine, wrap=lambda model: model):
    """Losses and gradients on four images with so many boxes; this process's micro-batches."""
    built = small(name, backbone_norm="frozen", projector_norm="layer", label_noise=0.0,
                  box_noise=0.0, d_model=64, ffn=64).double()
    built.backbone.requires_grad_(name == "detr")  # once: it is large, and the same for all
    images, mask, targets = batch(counts, size=64)
    targets = [t | {"boxes": t["boxes"].double()} for t in targets]
    run = mock.Mock(parallel=wrap(built), criterion=matcher.Criterion(built.cfg),
                    device="cpu", autocast=contextlib.nullcontext,
                    scaler=torch.amp.GradScaler("cpu", enabled=False))
    with mock.patch.object(diffusion, "noised_references", noise_by_image):
        losses = train.forward_backward(
            run, [(images[i].double(), mask[i], [targets[k] for k in i]) for i in mine])
    gradients = {n: p.grad for n, p in built.named_parameters() if p.requires_grad}
    shares = runs.gather({key: value.item() for key, value in losses.items()})
    return {key: sum(share[key] for share in shares) for key in losses}, gradients


def one_of_two(rank, folder):
    """A process of two, each with half of the images; process 0 repeats it with all, alone."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    for name, counts in CASES:
        two = [[2 * rank, 2 * rank + 1]] if sum(counts) else [[2 * rank], [2 * rank + 1]]
        losses, gradients = gradients_of(name, counts, two, train.DistributedDataParallel)
        if rank:
            continue
        with mock.patch.object(runs, "world", lambda: 1):
            alone, expected = gradients_of(name, counts, [[0, 1, 2, 3]])
        for key, value in alone.items():
            assert abs(losses[key] - value) <= 1e-9 * max(1, abs(value)), (name, counts, key)
        size = max(g.abs().max() for g in expected.values())
        for key, value in expected.items():
            assert (gradients[key] - value).abs().max() <= 1e-9 * size, (name, counts, key)
    says(["--batch-size", "5", "--out", f"{folder}/odd"], 2, "not a multiple of 2")
    built, toy = small("dino"), data.ToyShapes(7, 64, transform=data.eval_transform(64, 64))
    shared = evaluation.evaluate(built, toy, batch_size=1, progress=False)
    said = says(["--variant", "diffu_dino", "--data", f"{folder}/boxes", *SCRATCH, "--steps", "2",
                 "--micro-batch", "1", "--out", f"{folder}/run"], 0)
    assert ("done at step 2" in said) == (" parameters" in said) == (rank == 0), said
    alone = evaluation.evaluate(built, toy, batch_size=1, progress=False)  # the group is gone
    assert shared[0] == alone[0] and (rank or len(shared[1]) == len(alone[1]) > 0)


def test_distributed_two_processes_equal_one():
    """Every variant; without boxes in one or in all; scores; one continues what two wrote."""
    with tempfile.TemporaryDirectory() as folder:
        boxes(folder, 5)
        torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
        says(["--resume", f"{folder}/run", "--steps", "3"], 0)
        assert Path(folder, "run", "log.jsonl").read_text().count('"AP"') == 2


def test_distributed_failures_of_one_process():
    """The second process's error names the image, both end, what they learned is saved."""
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2".split()
    with tempfile.TemporaryDirectory() as folder:
        start, out = boxes(folder, 4), f"{folder}/run"
        index, _ = data.batch_order(4, 2, 0, 0)[1][1]  # the second step's second image
        os.truncate(Path(folder, "boxes", "train2017", f"{index + 1}.png"), 100)
        done = subprocess.run(
            [*torchrun, "train.py", "--variant", "deformable", *start, "--steps", "4",
             "--batch-size", "2", "--micro-batch", "1", "--out", out], text=True, cwd=HERE,
            capture_output=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
        said = done.stdout + done.stderr
        assert done.returncode and "error (process 1)" in said and f"{index + 1}.png" in said, said
        assert "another process" in said and said.count("Traceback (most") == 1, said  # torchrun's
        assert stored(out)["step"] == 1
