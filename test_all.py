"""Every test of minDETR: `python test_all.py`, `python test_all.py -k word`, or `pytest test_all.py`.

In the order of the house: variants, msda, matcher, diffusion, model, published weights, data, eval, train, distributed.
A test's name begins with what it tests. They need no network, no GPU and no data; what published code computed is here as
numbers, for weights that are made from their names.
"""
import argparse
import collections
import contextlib
import copy
import ctypes
import functools
import gc
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
import urllib.error
import warnings
import weakref
import zlib
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import optimize, special, stats
from torch import nn
from torchvision.ops import box_convert, box_iou
from torchvision.transforms import functional as TF

import ablate
import bench
import data
import diffusion
import distributed
import dropout
import eval as evaluation
import matcher
import msda
import options
import pictures
import scores
import toy
import train
import variants
import weights
from dropout import Dropout, MultiheadAttention
from model import DecoderLayer, Detector, build_model
from msda_cuda import build, cpu, cuda, emulate, op, plain
from order import BatchOrder, repeat_factors

HERE = Path(__file__).parent


# ================================================================================================== variants.py

SMALL = variants.SMALL | dict(backbone_norm="batch", num_classes=5, num_queries=20, decoder_layers=2, encoder_layers=1)
TRAINED = [name for name in variants.VARIANTS if name != "detr_dc5"]       # dilation needs a bottleneck backbone


def small(name, **overrides):
    """A small model of a variant, with weights that depend on the seed alone."""
    torch.manual_seed(0)
    return build_model(name, **SMALL | overrides)


def batch(counts=(3, 1), size=96, seed=0):
    """Two (or more) random photos of different size, padded, with so many boxes each."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(len(counts), 3, size, size, generator=g)
    mask = torch.zeros(len(counts), size, size, dtype=torch.bool)
    mask[1:, size * 3 // 4:] = True
    mask[1:, :, size * 2 // 3:] = True
    images[mask[:, None].expand_as(images)] = 0
    targets = []
    for n in counts:
        wh = torch.rand(n, 2, generator=g) * 0.3 + 0.1
        centre = torch.rand(n, 2, generator=g) * (1 - wh) + wh / 2
        targets.append({"labels": torch.randint(0, 5, (n,), generator=g), "boxes": torch.cat([centre, wh], 1)})
    return images, mask, targets


def error_of(function, *args, kind=Exception, **kwargs):
    """The message of the error that a call raises; fails when it raises none, or another kind."""
    try:
        function(*args, **kwargs)
    except kind as error:
        return str(error)
    raise AssertionError(f"{function.__name__} raised nothing")


def test_variants_parameters_are_the_published_counts():
    """To the last parameter, as the authors' code counts them."""
    published = {"detr": 41_524_768, "detr_dc5": 41_524_768, "deformable": 40_069_665, "deformable_single": 34_066_593,
                 "deformable_refine": 40_849_660, "deformable_two_stage": 41_181_529, "dn": 47_429_154,
                 "dino": 46_893_182}
    for name, count in published.items():
        with torch.device("meta"):
            built = build_model(name)
        assert sum(p.numel() for p in built.parameters()) == count, name


def test_variants_contradictions_say_what_to_write():
    for changes, word in [(dict(attention="deformabel"), "choose one of"), (dict(levels=4), "levels=1"),
                          (dict(two_stage=True), "attention=deformable"), (dict(heads=7), "heads"),
                          (dict(evaluations=101), "timesteps"), (dict(evaluations=0), "at least 1"),
                          (dict(signal_scale=0.0), "above 0"), (dict(querys=3), "unknown field"),
                          (dict(copies=2), "class_loss=focal"), (dict(pos_temperature=0.0), "above 0"),
                          (dict(schedule="quadratic"), "cosine"),
                          (dict(evaluations=2.5), "whole number"), (dict(signal_scale=math.nan), "above 0"),
                          (dict(ensemble_nms=7.0), "IoU"), (dict(logit_eps=-1.0), "above 0"), (dict(dropout=math.nan), "least 0"),
                          (dict(dilation=True, backbone="resnet18"), "bottleneck"), (dict(levels=2), "levels")]:
        assert word in error_of(variants.detr.but, kind=variants.ConfigError, **changes), changes
    assert "refine" in error_of(variants.deformable.but, two_stage=True, kind=variants.ConfigError)
    assert "diffu" in error_of(variants.variant, "detrr", kind=variants.ConfigError)


def test_options_that_a_variant_does_not_read_are_refused():
    for names, (field, values), example in options.READ_ONLY_WITH:
        idle = {"variant": next((n for n, row in variants.VARIANTS.items() if getattr(row, field) not in values), example)}
        if getattr(variants.variant(idle["variant"]), field) in values:                      # no variant has evaluations=1
            idle[field] = 1
        for name in names:
            row = next(row for row in (variants.variant(example), variants.recipe(example)) if hasattr(row, name))
            value = getattr(row, name)
            assert value in [getattr(table, name, None) for table in options.settle({"variant": example, name: value})[1:]]
            message = error_of(options.settle, idle | {name: value}, kind=variants.ConfigError)
            assert message.startswith("--" + name.replace("_", "-") + " ") and example in message, message
            assert "--" + field.replace("_", "-") + ("," if values[0] is True else f" {values[0]}") in message, message
    message = error_of(options.settle, {"variant": "dino", "dn_groups": 3}, kind=variants.ConfigError)
    assert "--denoising dn, as in --variant dn" in message
    assert "toy shapes" in error_of(options.settle, {"repeat_rare": 0.1}, kind=variants.ConfigError)


def test_variants_every_field_is_read_and_explained():
    """A field that nothing reads is a defect, and so is one that --help does not explain."""
    code = "".join((HERE / f).read_text() for f in ("model.py", "matcher.py", "diffusion.py", "eval.py"))
    for f in fields(variants.Config):
        assert f.metadata["help"], f.name
        assert re.search(rf"cfg\.{f.name}\b", code), f.name
    loop = (HERE / "train.py").read_text() + (HERE / "weights.py").read_text()
    for f in fields(variants.Recipe):
        assert re.search(rf"recipe\.{f.name}\b", loop), f.name


# ====================================================================================================== msda.py

def msda_inputs(B=2, Q=6, M=3, D=4, P=2, shapes=((5, 7), (3, 4), (1, 2)), R=2, dtype=torch.float64, seed=0):
    """Arguments of msda.msda; a third of the points lies outside, some of them far."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)
    L, wide = len(shapes), torch.promote_types(dtype, torch.float32)
    offsets = normal(B, Q, M, L, P, 2) * (2 if R == 2 else 2 * P)
    offsets.flatten()[::17] *= 1e3
    offsets.clamp_(-3e4, 3e4)                                                                    # as float16 can hold
    return (normal(B, sum(h * w for h, w in shapes), M, D).to(dtype), list(shapes), offsets.to(dtype),
            normal(B, Q, M, L, P).to(dtype), torch.rand(B, Q, L, R, generator=g, dtype=torch.float64).to(wide))


def msda_by_definition(value, shapes, offsets, logits, reference):
    return msda.msda_grid_sample(value, shapes, *msda.sampling(shapes, offsets, logits, reference))


def msda_by_hand(value, shapes, locations, weights_):
    """Equation 3 of Zhu et al. 2021, one point at a time."""
    B, _, M, D = value.shape
    _, Q, _, L, P, _ = locations.shape
    out = torch.zeros(B, Q, M, D, dtype=value.dtype)
    for b, q, m, l, p in itertools.product(*map(range, (B, Q, M, L, P))):
        h, w = shapes[l]
        start = sum(a * c for a, c in shapes[:l])
        x, y = (locations[b, q, m, l, p] * torch.tensor([w, h]) - 0.5).tolist()
        for cy, cx in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
            if 0 <= cy < h and 0 <= cx < w:
                scale = (1 - abs(y - cy)) * (1 - abs(x - cx)) * weights_[b, q, m, l, p]
                out[b, q, m] += scale * value[b, start + cy * w + cx, m]
    return out.flatten(2)


def msda_ways():
    """Every way to compute the operator that can be tried without a GPU: modules with forward and backward."""
    try:
        cpu.library()
        return [plain, cpu, cuda]                                       # cuda's kernels run on the CPU, see emulate.py
    except OSError as error:
        print(f"  (only the plain PyTorch path is tested: {error})")
        return [plain]


def test_msda_equals_its_definition():
    value, shapes, offsets, logits, _ = msda_inputs()
    for R in (2, 4):
        args = (value, shapes, offsets, logits, msda_inputs(R=R)[4])
        want = msda_by_hand(value, shapes, *msda.sampling(*args[1:]))
        for way in (msda_by_definition, msda.msda):
            assert torch.allclose(way(*args), want, atol=1e-12)


@mock.patch.multiple(plain, CHUNK=16, READ=6)                          # several chunks, the last one smaller
def test_msda_ways_agree_on_any_shape():
    """Output and all gradients against autograd through the definition in float64: any shape, dtype and threads.

    Among the ways is the CUDA kernel itself, every lane of it. A head is 1 to 264 channels: less than a lane's vector,
    odd, a lane alone, a whole warp and more.
    """
    tiny = [(3, 5), (2, 2)]
    for B, Q, M, D, P, shapes, R in [
            (1, 1, 1, 1, 1, [(1, 1)], 2), (2, 0, 8, 16, 4, [(3, 5)], 4), (3, 11, 5, 7, 3, [(1, 9), (8, 1)], 4),
            (2, 20, 8, 32, 4, [(9, 7), (5, 4), (3, 2), (1, 1)], 2), (2, 9, 2, 32, 4, tiny, 4), (1, 70, 1, 4, 40, tiny, 4),
            (1, 5, 2, 264, 3, tiny, 2), (0, 5, 2, 8, 3, tiny, 2)]:
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            value, _, offsets, logits, reference = msda_inputs(B, Q, M, D, P, shapes, R, dtype)
            # What lies before and after the value must not be read, nor what padding may hold: here it is NaN.
            value = F.pad(value.flatten(), (64, 64), value=torch.nan)[64:64 + value.numel()].view(value.shape)
            args = (value, shapes, offsets, logits, reference)
            inputs = [t.detach().double().requires_grad_() for t in (value, offsets, logits, reference)]
            want = msda_by_definition(inputs[0], shapes, *inputs[1:])
            grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
            want = [want.detach(), *torch.autograd.grad(want, inputs, grad.double())]
            limit = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
            # The kernel is compiled anew for each shape and dtype, in a second or two: in float32 all, of the others some.
            ways = [w for w in msda_ways() if w is not cuda or dtype == torch.float32 or D == 7 or D == 32 and dtype.itemsize == 2]
            for way, threads in itertools.product(ways, (1, 3)):
                before = torch.get_num_threads()
                with emulate.gpu() if way is cuda else contextlib.nullcontext():
                    try:
                        torch.set_num_threads(threads)
                        got = [way.forward(*args), *way.backward(grad, *args, True)]
                    finally:
                        torch.set_num_threads(before)
                for a, b, like in zip(got, want, [grad, value, offsets, logits, reference]):
                    assert a.dtype == like.dtype and a.shape == like.shape and a.isfinite().all()
                    error = (a.double() - b).norm() / b.norm().clamp(min=1e-12)
                    assert error < limit, (way.__name__, B, Q, M, D, P, shapes, R, dtype, error.item())
                if way is cuda and threads == 1:
                    with emulate.gpu():
                        assert way.backward(grad, *args, False)[3] is None
                        assert torch.equal(way.forward(*args), got[0])
                if way is cuda:
                    break                                                 # which does not know how many threads torch has


def test_msda_border_and_nan():
    """On borders and centres the value is the definition's; NaN and infinity lie outside; another image is never read."""
    value, shapes, offsets, logits, reference = msda_inputs(Q=40)
    g = torch.Generator().manual_seed(0)
    reference.zero_()
    offsets = torch.tensor([-1e9, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.5, 4.0, 7.5])[
        torch.randint(0, 10, offsets.shape, generator=g)].double()
    want = msda_by_hand(value, shapes, *msda.sampling(shapes, offsets, logits, reference))
    value[1] = torch.nan
    outside = offsets.clone()
    outside[0, ::2, 0, 0, 0, 0], outside[0, ::3, 1, 1, 1, 1], outside[0, ::4, 2, 2, 0, 1] = torch.nan, torch.inf, -torch.inf
    far = torch.where(outside.isfinite(), outside, -1e9)
    for way in msda_ways():
        with emulate.gpu() if way is cuda else contextlib.nullcontext():
            assert torch.allclose(way.forward(value, shapes, offsets, logits, reference)[0], want[0], atol=1e-12)
            out = way.forward(value, shapes, outside, logits, reference)[0]
            assert out.isfinite().all() and torch.equal(out, way.forward(value, shapes, far, logits, reference)[0])
            grads = way.backward(torch.ones_like(want), value, shapes, outside, logits, reference, True)
            assert all(t[0].isfinite().all() for t in grads)
            boxes = torch.rand(2, 40, 3, 4).double()
            grads = way.backward(torch.ones_like(want), value, shapes, outside, logits, boxes, True)
            assert all(t[0].isfinite().all() for t in grads)


def test_msda_is_an_operator_of_torch():
    """Registered so that gradients, fake tensors, torch.compile, torch.export and autocast work; two kinds of reference."""
    for R in (2, 4):
        value, shapes, offsets, logits, reference = msda_inputs(Q=3, P=1, R=R)
        offsets.clamp_(-4, 4)
        args = [t.requires_grad_() for t in (value, offsets, logits, reference)]
        flat = [n for shape in shapes for n in shape]
        assert torch.autograd.gradcheck(lambda v, o, a, r: msda.msda(v, shapes, o, a, r), args)
        torch.library.opcheck(torch.ops.mindetr.msda.default, (*args, flat))
        args = [t.detach() for t in args]
        torch.library.opcheck(torch.ops.mindetr.msda_backward.default,
                              (torch.ones(2, 3, 12, dtype=torch.float64), *args, flat, R == 4))
    args[0].requires_grad_()
    (first,) = torch.autograd.grad(msda.msda(args[0], shapes, *args[1:]).square().sum(), args[0], create_graph=True)
    assert "second derivative" in error_of(torch.autograd.grad, first.sum(), args[0], kind=RuntimeError)

    layer = msda.MSDeformAttn(32, levels=2, heads=4, points=2)
    nn.init.normal_(layer.sampling_offsets.weight)
    inputs = torch.randn(2, 5, 32), torch.rand(2, 5, 2, 4), torch.randn(2, 16, 4, 8), [(3, 4), (2, 2)]
    want = layer(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
        exported = torch.export.export(layer, inputs).module()(*inputs)
    assert torch.allclose(compiled, want, atol=1e-6) and torch.allclose(exported, want, atol=1e-6)
    parameters = list(layer.parameters())[:4]
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), parameters) for out in (compiled, want))):
        assert torch.allclose(a, b, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):                # the value is half, the reference stays float32
        half = layer(inputs[0], inputs[1], inputs[2].bfloat16(), inputs[3])
        half.square().sum().backward()
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), want, atol=0.1)


@contextlib.contextmanager
def without_compiler(*caches, compiler="/no/such/compiler"):
    """Within, C++ cannot be compiled, or by `compiler` only, and nothing has been; caches of functions start and end empty.
    Yields the warnings."""
    with tempfile.TemporaryDirectory() as folder, \
            mock.patch.dict(os.environ, {"CXX": compiler}), mock.patch.object(build, "folder", lambda: Path(folder)), \
            warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for cache in (build.cpp, *caches):
            cache.cache_clear()
        try:
            yield said
        finally:
            for cache in (build.cpp, *caches):
                cache.cache_clear()


def test_msda_needs_no_compiler():
    """Where nothing can be compiled one warning says why, and plain PyTorch serves; MINDETR_MSDA can forbid that."""
    args = msda_inputs()
    want = msda_by_definition(*args)
    with without_compiler(op.native, op.warn_once) as said:
        assert torch.allclose(msda.msda(*args), want, atol=1e-12)
        assert torch.allclose(msda.msda(*msda_inputs(D=8)), msda_by_definition(*msda_inputs(D=8)), atol=1e-12)
        op.native.cache_clear()
        with mock.patch.object(op, "BACKEND", "native"):
            assert "compiler" in error_of(msda.msda, *args, kind=OSError)
        with mock.patch.object(op, "BACKEND", "torch"):
            assert torch.allclose(msda.msda(*args), want, atol=1e-12)
            half = msda.msda(*msda_inputs(dtype=torch.bfloat16))
            assert half.dtype == torch.bfloat16
    assert len(said) == 1 and "plain PyTorch" in str(said[0].message) and "compiler" in str(said[0].message)
    with mock.patch.object(ctypes, "CDLL", side_effect=OSError):
        cuda.nvrtc.cache_clear()
        assert "NVRTC is not installed: pip install" in error_of(cuda.nvrtc, kind=OSError)


def test_msda_needs_no_openmp():
    """A compiler without OpenMP makes the same functions, for one thread, and a warning says so."""
    if cpu not in msda_ways() or b"GOMP" not in Path(cpu.library()._name).read_bytes():
        raise unittest.SkipTest("needs g++ with OpenMP")
    with tempfile.TemporaryDirectory() as folder:
        compiler = Path(folder) / "compiler"
        compiler.write_text(f'#!/bin/sh\nfor flag; do [ "$flag" != -fopenmp ] || exit 1; done\n{build.compiler()[0]} "$@"\n')
        compiler.chmod(0o755)
        args = msda_inputs()
        with without_compiler(op.native, op.warn_once, compiler=str(compiler)) as said:
            assert torch.allclose(msda.msda(*args), msda_by_definition(*args), atol=1e-12)
            assert b"GOMP" not in Path(cpu.library()._name).read_bytes()
        assert len(said) == 1 and "cpu.cpp runs in one thread" in str(said[0].message)


def test_msda_kernel_is_compiled_by_nvrtc():
    """For every generation of GPUs, by the NVRTC of torch's packages; the second time it comes from the cache."""
    try:
        cuda.nvrtc()
    except OSError as error:
        raise unittest.SkipTest(str(error)) from None
    config = cuda.Config(torch.bfloat16, torch.float32, 32, 4, 4, 4)
    for major, minor in ((7, 5), (8, 0), (9, 0), (12, 7)):
        file = cuda.compiled(config, major, minor)
        assert file.stat().st_size > 1000 and file.suffix == (".ptx" if minor == 7 else ".cubin")
        with mock.patch.object(cuda, "compile_source", side_effect=AssertionError):
            assert cuda.compiled(config, major, minor) == file
    assert "no GPU as old" in error_of(cuda.compiled, config, 1, 0, kind=OSError)
    broken = {"msda.cu": "int x = y;", "sampling.h": ""}
    assert '"y" is undefined' in error_of(cuda.compile_source, config, broken, ["--gpu-architecture=sm_90"], kind=OSError)


def test_msda_kernel_fits_every_config():
    """Lanes, threads and shared memory stay within a GPU's limits for whatever a Config may ask."""
    for dtype, D, LP, Q in itertools.product(cuda.TYPES, (1, 2, 3, 8, 32, 33, 256, 1024), (1, 3, 16, 150, 384), (1, 22223)):
        config = cuda.Config(dtype, dtype, D, 1, LP, 2)
        threads = config.threads(8, Q, 132)
        blocks, shared = cuda.grid(config, (1, Q, 8), threads)
        assert D % config.vec == 0 and config.vec * dtype.itemsize <= 16 and 32 % config.lanes == 0
        assert threads in (32, 64, 128, 256) and shared <= cuda.SHARED_MEMORY and blocks * threads >= 8 * Q * config.lanes
    assert "points" in error_of(cuda.Config(torch.float64, torch.float64, 32, 4, 500, 2).header, kind=OSError)


def test_msda_failed_launch_is_raised_with_its_shapes():
    class Failing(emulate.Driver):
        @staticmethod
        def cuLaunchKernel(*args):
            return 701

    value, shapes, offsets, logits, reference = msda_inputs()
    with emulate.gpu(Failing), mock.patch.object(cuda, "kernel"):
        said = error_of(cuda.forward, value, shapes, offsets, logits, reference, kind=RuntimeError)
    for word in ("forward kernel", "code 701", "B=2, Q=6, M=3, S=49", "(5, 7)", "D=4"):
        assert word in said, said


def test_msda_wrong_arguments_are_named():
    value, shapes, offsets, logits, reference = msda_inputs()
    for args, word in [((value[:, 1:], shapes, offsets, logits, reference), "S = 49"),
                       ((value[..., 0], shapes, offsets, logits, reference), "value is (2, 49, 3)"),
                       ((value, shapes[:2], offsets, logits, reference), "value"),
                       ((value, [(49, 0), (7, 7)], offsets, logits, reference), "at least 1 x 1"),
                       ((value, shapes, offsets[..., :1], logits, reference), "offsets"),
                       ((value, shapes, offsets[:, :, :2], logits, reference), "offsets"),
                       ((value, shapes, offsets[:, :, :, :, :0], logits, reference), "offsets"),
                       ((value, shapes, offsets, logits[:, 1:], reference), "logits"),
                       ((value, shapes, offsets, logits, reference[..., :1]), "reference"),
                       ((value, shapes, offsets, logits, reference[:, :1]), "reference"),
                       ((value.int(), shapes, offsets, logits, reference), "value is torch.int32"),
                       ((value, shapes, offsets.to("meta"), logits, reference), "offsets is on meta"),
                       ((value, shapes, offsets, logits, reference.to("meta")), "reference is on meta")]:
        for backend in ("fastest", "torch"):
            with mock.patch.object(op, "BACKEND", backend):
                assert word in error_of(msda.msda, *args, kind=ValueError), word
    flat = [n for shape in shapes for n in shape]
    for change, word in [({1: offsets.float()}, "offsets are torch.float32"),
                         ({2: logits.half()}, "logits are torch.float16"),
                         ({3: reference.float()}, "reference is torch.float32")]:
        args = [change.get(i, t) for i, t in enumerate((value, offsets, logits, reference))]
        assert word in error_of(torch.ops.mindetr.msda, *args, flat, kind=ValueError)
    grad = torch.ones(2, 6, 11, dtype=torch.float64)
    assert "grad_out is (2, 6, 11)" in error_of(torch.ops.mindetr.msda_backward, grad, value, offsets, logits, reference,
                                                flat, False, kind=ValueError)


def test_msda_kernel_refuses_memory_it_would_misread():
    """What reaches a launch must be whole and aligned; views that are not are copied before."""
    whole = torch.randn(4, 8)
    for tensor, word in [(whole.t(), "strides (1, 8)"), (whole.flatten()[1:], "multiple of 16"),
                         (whole.to("meta"), "on meta")]:
        assert word in error_of(cuda.check_memory, "forward", [whole, None, tensor], whole.device, kind=ValueError)
        if tensor.device == whole.device:
            cuda.check_memory("forward", [cuda.aligned(tensor)], whole.device)
            assert torch.equal(cuda.aligned(tensor), tensor)


def test_msda_layer_starts_by_looking_around():
    """At initialisation head m looks in direction 2 pi m / M, point k at k + 1 cells, whatever the query."""
    layer = msda.MSDeformAttn(32, levels=2, heads=8, points=4)
    offset = layer.sampling_offsets(torch.randn(1, 3, 32)).view(3, 8, 2, 4, 2)
    assert torch.allclose(offset[:, 0, :, 2], torch.tensor([3.0, 0.0]), atol=1e-5)
    assert torch.allclose(offset[:, 3, :, 1], torch.tensor([-2.0, 2.0]), atol=1e-5)
    assert layer.attention_weights(torch.randn(3, 32)).abs().max() == 0


def test_msda_padding_is_never_read():
    layer = msda.MSDeformAttn(32, levels=1, heads=4, points=2)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[:, 8:] = True
    a = torch.randn(1, 12, 32)
    b = a.clone()
    b[:, 8:] = 99.0
    reference = torch.rand(1, 5, 1, 4)
    q = torch.randn(1, 5, 32)
    assert torch.equal(layer(q, reference, layer.project(a, mask), [(3, 4)]),
                       layer(q, reference, layer.project(b, mask), [(3, 4)]))


# =================================================================================================== matcher.py

def predictions(L=3, counts=(3, 1), Q=7, C=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    boxes = torch.rand(L, len(counts), Q, 4, generator=g, dtype=torch.float64) * 0.4 + 0.2
    return torch.randn(L, len(counts), Q, C, generator=g, dtype=torch.float64), boxes


def test_matcher_giou_equals_torchvision():
    _, boxes = predictions()
    a, b = boxes[0, 0], boxes[1, 1]
    xyxy = torchvision.ops.box_convert
    want = torchvision.ops.generalized_box_iou(xyxy(a, "cxcywh", "xyxy"), xyxy(b, "cxcywh", "xyxy"))
    assert torch.allclose(matcher.overlaps(a[:, None], b)[1], want, atol=1e-12)


def test_matcher_finds_the_cheapest_assignment():
    """Against every permutation, written from the paper's formula, for both kinds of cost."""
    for name in ("detr", "dino"):
        cfg = variants.VARIANTS[name].but(num_classes=5, num_queries=4)
        logits, boxes = predictions(Q=4, C=cfg.logits)
        targets = [{k: v.double() if k == "boxes" else v for k, v in t.items()} for t in batch()[2]]
        (index,) = matcher.match([(logits, boxes, targets)], cfg)
        index = list(zip(*(i.tolist() for i in index)))
        for layer, image in itertools.product(range(3), range(2)):
            t = targets[image]
            cost = torch.zeros(4, len(t["labels"]), dtype=torch.float64)
            for q, g in itertools.product(range(4), range(len(t["labels"]))):
                x, box = logits[layer, image, q], boxes[layer, image, q]
                if cfg.class_loss == "ce":
                    c = -x.softmax(-1)[t["labels"][g]]
                else:
                    p = x.sigmoid()[t["labels"][g]]
                    c = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p ** 2 * -(1 - p + 1e-8).log()
                cost[q, g] = cfg.cost_class * c + 5 * (box - t["boxes"][g]).abs().sum() \
                    - 2 * matcher.overlaps(box, t["boxes"][g], cfg.giou_eps)[1]
            n = len(t["labels"])
            best = min(sum(cost[q, g] for g, q in enumerate(p)) for p in itertools.permutations(range(4), n))
            got = [(q, g) for l, b, q, g in index if (l, b) == (layer, image)]
            assert sorted(g for _, g in got) == list(range(n))
            assert abs(sum(cost[q, g] for q, g in got) - best) < 1e-12


def test_matcher_align_ranks_a_targets_queries():
    """Align-DETR's IA-BCE, pair by pair and query by query: two queries a target in all layers but the last, losses by rank,
    and the gradient, which reaches the negatives' p^2 and not the score to reach."""
    cfg = variants.align.but(num_classes=5, num_queries=9)
    logits, boxes = (x.requires_grad_() for x in predictions(Q=9, C=5))
    targets = [{k: v.double() if k == "boxes" else v for k, v in t.items()} for t in batch((3, 1))[2]]
    losses = matcher.Criterion(cfg)({"logits": logits, "boxes": boxes, "enc": {"logits": logits[0], "boxes": boxes[0]}}, targets)
    cost = matcher.match_cost(logits, boxes, targets, cfg)
    for layer, (suffix, k) in enumerate((("_0", 2), ("_1", 2), ("", 1))):
        want = dict.fromkeys(("class", "bbox", "giou"), 0)
        for b, t in enumerate(targets):
            n, p = len(t["labels"]), logits[layer, b].sigmoid()
            positive = torch.zeros_like(p, dtype=torch.bool)
            query, column = optimize.linear_sum_assignment(torch.cat([cost[layer, b, :, :n]] * k, 1))
            for g in range(n):
                own = [int(q) for q, c in zip(query, column) if c % n == g]
                assert len(own) == k
                pairs = {q: matcher.overlaps(boxes[layer, b, q], t["boxes"][g], cfg.giou_eps) for q in own}
                score = {q: max(0.01, (p[q, t["labels"][g]] ** 0.25 * pairs[q][0] ** 0.75).item()) for q in own}
                for rank, q in enumerate(sorted(own, key=lambda q: -score[q])):
                    w, x = math.exp(-rank / 1.5), p[q, t["labels"][g]]
                    want["class"] -= score[q] * w * x.log() + (1 - score[q] * w) * (1 - x).log()
                    want["bbox"] += w * (boxes[layer, b, q] - t["boxes"][g]).abs().sum()
                    want["giou"] += w * (1 - pairs[q][1])
                    positive[q, t["labels"][g]] = True
            want["class"] -= (p ** 2 * (1 - p).log())[~positive].sum()
        for name, value in want.items():
            got, value = losses[f"loss_{name}{suffix}"], value / 4
            assert torch.allclose(got, value, atol=1e-10), (layer, name)
            for tensor in (logits, boxes):
                a, b = (torch.autograd.grad(x, tensor, retain_graph=True, allow_unused=True)[0] for x in (got, value))
                assert a is None and b is None or torch.allclose(*(x if x is not None else torch.zeros(()) for x in (a, b)))
    assert torch.allclose(losses["loss_class_enc"], losses["loss_class_0"])          # real labels, two queries a target


def test_matcher_align_serves_every_target():
    """Two queries a target where they go round; with fewer than that one each, so that no target is left out."""
    for counts, layers in (((4, 3), (8, 6, 4, 3)), ((5, 2), (5, 4, 5, 2)), ((9, 1), (7, 2, 7, 1))):        # 8, 7, 7 queries
        cfg = variants.align.but(num_classes=5, num_queries=8)
        logits, boxes = predictions(L=2, Q=8 if counts == (4, 3) else 7, C=5)
        targets = [{k: v.double() if k == "boxes" else v for k, v in t.items()} for t in batch(counts)[2]]
        ((layer, image, query, target),) = matcher.match([(logits, boxes, targets)], cfg, [[2, 1]])
        assert tuple(int(((layer == l) & (image == b)).sum()) for l in range(2) for b in range(2)) == layers
        for l, (b, n) in itertools.product(range(2), enumerate(counts)):
            own = target[(layer == l) & (image == b)]
            assert len(own.unique()) == min(n, 7), (counts, l, b)
        assert torch.isfinite(matcher.Criterion(cfg)({"logits": logits, "boxes": boxes}, targets)["total"])


def test_matcher_align_denoising_pairs_all_weigh_one():
    """CDN's groups hold a target many times, and are no rivals: IA-BCE's rank weight is for matched queries alone."""
    cfg = variants.align.but(num_classes=5, dn_queries=6, num_queries=4)
    targets = [{k: v.double() if k == "boxes" else v for k, v in t.items()} for t in batch((2, 1))[2]]
    d = diffusion.denoising_queries(targets, cfg, 4)
    logits, boxes = predictions(L=1, Q=d.labels.shape[1], C=5)
    matched = predictions(L=1, counts=(2, 1), Q=4, C=5, seed=1)
    losses = matcher.Criterion(cfg)({"logits": matched[0], "boxes": matched[1],
                                     "dn": {"logits": logits, "boxes": boxes, "queries": d}}, targets)
    assert d.groups == 3 and len(d.pairs[0]) == 9
    wanted, pairs = 0, set()
    for b, slot, g in zip(*(x.tolist() for x in d.pairs)):
        box, label = targets[b]["boxes"][g], int(targets[b]["labels"][g])
        p = logits[0, b, slot, label].sigmoid()
        score = max(0.01, (p ** 0.25 * matcher.overlaps(boxes[0, b, slot], box, cfg.giou_eps)[0] ** 0.75).item())
        wanted -= score * p.log() + (1 - score) * (1 - p).log()
        pairs.add((b, slot, label))
    for b, slot, label in itertools.product(*map(range, logits.shape[1:])):
        p = logits[0, b, slot, label].sigmoid()
        wanted -= p ** 2 * (1 - p).log() * ((b, slot, label) not in pairs)
    assert torch.allclose(losses["loss_class_dn"], wanted / 9)
    l1 = sum((boxes[0, b, s] - targets[b]["boxes"][g]).abs().sum() for b, s, g in zip(*(x.tolist() for x in d.pairs)))
    assert torch.allclose(losses["loss_bbox_dn"], l1 / 9)


def test_matcher_one_transfer_to_the_host():
    """All layers, all images and the encoder's proposals come over in one go."""
    built = small("deformable_two_stage")
    images, mask, targets = batch()
    outputs = built(images, mask)
    calls = []
    original = torch.Tensor.cpu
    with mock.patch.object(torch.Tensor, "cpu", lambda t, *a: calls.append(1) or original(t, *a)):
        matcher.Criterion(built.cfg)(outputs, targets)
    assert len(calls) == 1


def test_matcher_no_boxes_and_more_boxes_than_queries():
    for name in TRAINED:
        built = small(name)
        for counts in ((0, 2), (0, 0), (30, 25)):                                               # 20 queries
            images, mask, targets = batch(counts)
            losses = matcher.Criterion(built.cfg)(built(images, mask, targets), targets)
            losses["total"].backward()
            assert all(torch.isfinite(v) for v in losses.values()), (name, counts)
            # Every parameter takes part whatever the targets, or processes would wait for each other's gradients.
            assert not [n for n, p in built.named_parameters() if p.grad is None], (name, counts)
            built.zero_grad()


def test_matcher_micro_batches_add_up_to_the_step():
    """A step of two micro-batches has the loss and gradients of one batch (no denoising, whose groups depend on it)."""
    for name in ("detr", "deformable_two_stage"):
        built = small(name, backbone_norm="frozen").double()
        images, mask, targets = batch((3, 1))
        images = images.double()
        targets = [t | {"boxes": t["boxes"].double()} for t in targets]
        criterion = matcher.Criterion(built.cfg)
        whole = criterion(built(images, mask), targets)["total"]
        parts = sum(criterion(built(images[i:i + 1], mask[i:i + 1]), targets[i:i + 1], [len(t["labels"]) for t in targets])["total"]
                    for i in range(2))
        assert abs(whole - parts) < 1e-9 * abs(whole), name


def test_matcher_a_diverged_model_is_told_apart():
    logits, boxes = predictions()
    logits[1, 0, 2] = float("nan")
    assert "layer 1, image 0" in error_of(matcher.match, [(logits, boxes, [
        {"labels": t["labels"], "boxes": t["boxes"].double()} for t in batch()[2]])], variants.dino, kind=FloatingPointError)


# ================================================================================================= diffusion.py

def test_denoising_groups_hold_what_they_should():
    """DN: a group is every target once, in order. CDN: near copies first, then as many far ones."""
    _, _, targets = batch((3, 1))
    for name, per_group in (("dn", 3), ("dino", 6)):
        cfg = variants.VARIANTS[name].but(num_classes=5, num_queries=7, dn_queries=6, dn_groups=2, label_noise=0.0)
        d = diffusion.denoising_queries(targets, cfg, 7)
        assert d.groups == 2 and d.labels.shape == (2, 2 * per_group)
        image, slot, target = d.pairs
        assert len(slot) == 2 * 4
        for b, s, g in zip(image.tolist(), slot.tolist(), target.tolist()):
            assert s % per_group == g                                             # positives are a group's first slots
            assert d.labels[b, s] == targets[b]["labels"][g]
        assert d.used.sum().item() == 8 * (2 if name == "dino" else 1)
        assert (d.boxes[~d.used] == 0.5).all()


def test_denoising_noise_stays_in_its_range():
    """DN moves centres by at most 0.4 of half the size; DINO's positives stay inside, negatives lie outside one half."""
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.1]]).repeat(4000, 1)
    moved = diffusion.move_centre_and_size(boxes, 0.4)
    reach = torch.tensor([0.1, 0.05, 0.2, 0.1]) * 0.4
    shift = (moved - boxes).abs() / reach
    assert shift.max() <= 1 + 1e-5 and shift.mean().sub(0.5).abs() < 0.02
    for negative in (False, True):
        moved = diffusion.move_corners(boxes, torch.full((4000,), negative), 1.0)
        corner = torch.cat([moved[:, :2] - moved[:, 2:] / 2, moved[:, :2] + moved[:, 2:] / 2], 1)
        part = (corner - torch.tensor([0.4, 0.45, 0.6, 0.55])).abs() / torch.tensor([0.1, 0.05, 0.1, 0.05])
        assert part.min() >= negative - 1e-4 and part.max() <= 1 + negative + 1e-4, negative
        assert abs(part.mean() - 0.5 - float(negative)) < 0.02


def test_denoising_label_noise_has_its_share():
    targets = [{"labels": torch.zeros(2000, dtype=torch.long), "boxes": torch.rand(2000, 4)}]
    cfg = variants.dn.but(num_classes=5, label_noise=0.5, dn_groups=1)
    d = diffusion.denoising_queries(targets, cfg, 9, torch.Generator().manual_seed(0))
    assert abs((d.labels != 0).float().mean().item() - 0.5 * 4 / 5) < 0.03          # a random class may be the true one


def test_denoising_never_leaks():
    """Changing the targets, and so the denoising queries, never changes a matching query's output."""
    for name in ("dn", "dino"):
        built = small(name, backbone_norm="frozen")
        images, mask, targets = batch((3, 2))
        other = batch((3, 2), seed=1)[2]
        with torch.no_grad():
            a, b = (built(images, mask, t)["logits"] for t in (targets, other))
            assert torch.allclose(a, b, atol=1e-6), name
            built.eval()
            assert torch.allclose(a, built(images, mask)["logits"], atol=1e-5), name


def test_denoising_groups_are_independent_in_the_model():
    """Changing one group, its unused slots included, changes no other group and no matching query."""
    for name in ("dn", "dino", "diffu_dino"):
        built = small(name, backbone_norm="frozen", dn_groups=3, dn_queries=9)
        images, mask, targets = batch((3, 1))
        real, changed = diffusion.denoising_queries, None

        def other_group(*args):
            d = real(*args)
            size = d.boxes.shape[1] // d.groups
            if changed is not None:
                d.boxes[:, changed * size:(changed + 1) * size] = 0.3
                d.labels[:, changed * size:(changed + 1) * size] = 1
            return d

        with torch.no_grad(), mock.patch.object(diffusion, "denoising_queries", other_group):
            def run():
                outputs = built(images, mask, targets, generator=torch.Generator().manual_seed(0))
                return outputs["logits"], outputs["dn"]["logits"].unflatten(2, (3, -1))
            (match, groups), changed = run(), 1
            match_after, groups_after = run()
        assert torch.allclose(match, match_after, atol=1e-6), name
        assert torch.allclose(groups[:, :, [0, 2]], groups_after[:, :, [0, 2]], atol=1e-6), name
        assert not torch.allclose(groups[:, :, 1], groups_after[:, :, 1], atol=1e-3), name


def test_denoising_without_boxes_and_with_900():
    """No box in the batch: no denoising query, and all losses are there. 900: one group, whatever dn_queries says."""
    images, mask, nothing = batch((0, 0))
    for name in ("dn", "dino", "diffu_dino"):
        built = small(name)
        outputs = built(images, mask, nothing)
        assert outputs["dn"]["logits"].shape[2] == 0
        losses = matcher.Criterion(built.cfg)(outputs, nothing)
        assert losses["loss_bbox_dn"] == 0 and torch.isfinite(losses["total"]), name
    _, _, many = batch((900, 2))
    for name, groups, size in (("dn", 5, 900), ("dino", 1, 1800)):
        cfg = variants.VARIANTS[name].but(num_classes=5)
        d = diffusion.denoising_queries(many, cfg, 10)
        assert (d.groups, d.labels.shape, d.blocked.shape[0]) == (groups, (2, groups * size), groups * size + 10), name
        assert d.used[0].all() and d.used[1].sum() == 2 * groups * (size // 900)
        assert ((d.boxes >= 0) & (d.boxes <= 1)).all() or name == "dino"                # a far corner may turn a box over


def test_denoising_groups_do_not_see_each_other():
    blocked = diffusion.group_mask(groups=3, group_size=2, num_queries=4)
    want = torch.zeros(10, 10, dtype=torch.bool)
    for i, j in itertools.product(range(10), range(10)):
        if i < 6 and j < 6:
            want[i, j] = i // 2 != j // 2
        elif j < 6:
            want[i, j] = True
    assert torch.equal(blocked, want)


def test_diffusion_cosine_schedule_is_the_published_one():
    rates = diffusion.signal_rates("cosine", 100)
    assert abs(rates[0] - 0.99937) < 1e-5 and abs(rates[99] / 2.43e-7 - 1) < 1e-2
    assert abs(diffusion.signal_rates("linear", 100)[99] - 0.485) < 1e-3
    assert (rates[1:] < rates[:-1]).all()


LAWS = ("gaussian", "sigmoid_gaussian", "beta")


def test_diffusion_noise_laws_are_what_they_say():
    """Each is drawn from its own distribution (Kolmogorov-Smirnov), has mean 0 and variance 1, and repeats by seed."""
    beta, logistic = stats.beta(1, 1), lambda x: stats.norm.cdf(special.logit(np.clip(x, 0, 1)))
    exact = {"gaussian": stats.norm.cdf, "beta": lambda x: beta.cdf(x * beta.std() + 0.5),
             "sigmoid_gaussian": lambda x: logistic(x * 0.20827634 + 0.5)}
    # The variance of sigmoid(z), by quadrature over z: what sigmoid_gaussian divides by.
    z = np.linspace(-12, 12, 200_001)
    variance = np.trapezoid((1 / (1 + np.exp(-z)) - 0.5) ** 2 * stats.norm.pdf(z), z)
    assert abs(variance ** 0.5 - 0.20827634) < 1e-7
    for law in LAWS:
        a, b = (diffusion.draw_noise(law, 50_000, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
                for _ in range(2))
        assert torch.equal(a, b) and a.shape == (50_000, 4) and a.dtype == torch.float64
        assert abs(a.mean()) < 0.01 and abs(a.var() - 1) < 0.02, law
        assert stats.kstest(a.flatten().numpy(), exact[law]).pvalue > 0.01, law
        assert all(stats.kstest(a.flatten().numpy(), exact[other]).pvalue < 1e-4 for other in LAWS if other != law), law


def test_diffusion_forward_noise_at_every_t():
    """x_t has mean sqrt(a) x_0 and variance 1 - a, at each of the T times of each schedule, under each law."""
    x0 = diffusion.to_signal(torch.tensor([0.5, 0.2, 0.1, 0.9], dtype=torch.float64), 2.0)
    for law, schedule in itertools.product(LAWS, ("cosine", "linear", "sqrt")):
        rates = diffusion.signal_rates(schedule, 100)[:, None, None]
        noise = diffusion.draw_noise(law, 100, 3000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = diffusion.add_noise(x0, noise, rates)
        assert x.shape == (100, 3000, 4)
        off = (x.mean(1) - rates[:, 0].sqrt() * x0) / ((1 - rates[:, 0]) / 3000).sqrt()            # in standard errors
        assert off.abs().max() < 4.5, (law, schedule)
        assert (x.var(1) / (1 - rates[:, 0]) - 1).abs().max() < 0.15, (law, schedule)


def test_diffusion_terminal_snr_is_reported():
    """Only the schedule whose x_T still shows the boxes warns."""
    for schedule, snr in (("cosine", 2.43e-7), ("linear", 0.485 / 0.515), ("sqrt", 4.6e-5)):
        cfg = variants.VARIANTS["diffu"].but(**SMALL | dict(schedule=schedule))
        assert abs(diffusion.terminal_snr(cfg) / snr - 1) < 0.02, schedule
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Detector(cfg)
        assert ["pure noise" in str(w.message) for w in caught] == [True] * (schedule == "linear"), schedule


def test_diffusion_forward_noise_has_the_right_mean_and_variance():
    """x_t = sqrt(a) x_0 + sqrt(1 - a) noise, at several t, measured where nothing is clamped."""
    cfg = variants.diffu.but(num_queries=4000, signal_scale=2.0)
    box = torch.tensor([[0.5, 0.5, 0.45, 0.55]], dtype=torch.float64)
    targets = [{"labels": torch.zeros(4000, dtype=torch.long), "boxes": box.repeat(4000, 1)}]
    for t in (0, 20, 40):
        with mock.patch.object(diffusion.torch, "randint", lambda *a, **k: torch.tensor([t])):
            references, got = diffusion.noised_references(targets, cfg, torch.Generator().manual_seed(t))
        assert got.tolist() == [t] and references.shape == (1, 4000, 4)
        x = diffusion.to_signal(references[0], 2.0)
        rate = diffusion.signal_rates("cosine", 100)[t]
        assert (x.mean(0) - rate.sqrt() * diffusion.to_signal(box[0], 2.0)).abs().max() < 0.04
        assert (x.std(0) / (1 - rate).sqrt() - 1).abs().max() < 0.05


def test_diffusion_every_photo_draws_its_own_time():
    """t is uniform over 0..T-1, photo by photo (chi-square), with and without targets."""
    cfg = variants.diffu.but(num_queries=1, timesteps=20)
    targets = [{"labels": torch.zeros(n % 2, dtype=torch.long), "boxes": torch.rand(n % 2, 4)} for n in range(4000)]
    _, t = diffusion.noised_references(targets, cfg, torch.Generator().manual_seed(0))
    counts = torch.bincount(t, minlength=20)
    assert len(counts) == 20 and stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_diffusion_references_say_nothing_by_their_place():
    """The target's reference is at every place equally often: learned content belongs to a place. Of more targets than
    queries, every one is as likely to be used, and none twice."""
    def places(boxes, num_queries):
        """[photos, queries]: which box each reference is at t = 0, where noise moves it by little; -1: none."""
        targets = [{"labels": torch.zeros(len(boxes), dtype=torch.long), "boxes": boxes}] * 2000
        cfg = variants.diffu.but(num_queries=num_queries)
        with mock.patch.object(diffusion.torch, "randint", lambda *a, **k: torch.zeros(2000, dtype=torch.long)):
            references, _ = diffusion.noised_references(targets, cfg, torch.Generator().manual_seed(0))
        far = (references[:, :, None] - boxes).abs().amax(-1)
        return far.argmin(-1).where(far.amin(-1) < 0.1, -1)

    found = places(torch.tensor([[0.1, 0.9, 0.02, 0.98]]), 8) == 0                   # where padding hardly ever is
    assert (found.sum(1) == 1).all() and stats.chisquare(found.sum(0).numpy()).pvalue > 1e-3
    grid = torch.cartesian_prod(torch.tensor([0.2, 0.8]), torch.tensor([0.2, 0.5, 0.8]))
    used = places(torch.cat([grid, torch.full((6, 2), 0.3)], 1), 4)
    assert (used.sort(1).values.diff() > 0).all() and (used >= 0).all()
    assert stats.chisquare(torch.bincount(used.flatten(), minlength=6).numpy()).pvalue > 1e-3


def test_diffusion_fewer_and_more_targets_than_queries():
    """Also boxes that reach out of the photo, which are clamped, and, end to end, 900 boxes."""
    for law, n in itertools.product(LAWS, (0, 7, 8, 20)):
        cfg = variants.diffu.but(num_queries=8, noise=law)
        targets = [{"labels": torch.zeros(n, dtype=torch.long), "boxes": torch.rand(n, 4) * 3 - 1}]
        references, _ = diffusion.noised_references(targets, cfg)
        assert references.shape == (1, 8, 4) and references.min() >= 0 and references.max() <= 1
    clamped, wild = ([{"labels": torch.zeros(2, dtype=torch.long), "boxes": boxes}]
                     for boxes in (torch.tensor([[0.0, 1, 1, 0.5]] * 2), torch.tensor([[-0.4, 1.3, 7, 0.5]] * 2)))
    a, b = (diffusion.noised_references(t, cfg, torch.Generator().manual_seed(0))[0] for t in (clamped, wild))
    assert torch.equal(a, b)
    images, mask, targets = batch((900, 1), size=64)
    for name in ("dn", "dino", "diffu", "diffu_dino"):
        built = small(name, dn_groups=1)
        losses = matcher.Criterion(built.cfg)(built(images, mask, targets), targets)
        losses["total"].backward()
        assert torch.isfinite(losses["total"]), name


def test_diffusion_all_padding_is_an_empty_photo():
    images, mask, targets = batch((2, 0))
    mask[1], images[1] = True, 0
    for name in ("deformable", "dn", "dino", "diffu", "diffu_dino"):
        built = small(name)
        losses = matcher.Criterion(built.cfg)(built(images, mask, targets), targets)
        losses["total"].backward()
        with torch.no_grad():
            outputs = built.eval()(images, mask)
            alone = built(images[:1], mask[:1])
        assert torch.isfinite(losses["total"]) and torch.isfinite(outputs["boxes"]).all(), name
        assert torch.allclose(outputs["boxes"][:, :1], alone["boxes"], atol=1e-4), name


def test_diffusion_an_oracle_decoder_gives_the_true_boxes():
    """If every evaluation predicts the truth, DDIM carries exactly the first noise down to t = 0: for any S, schedule and
    scale, the last state is the truth and that noise, mixed by alpha-bar_0; renewal leaves confident queries alone."""
    truth = torch.rand(2, 6, 4, dtype=torch.float64) * 0.6 + 0.2
    cases = itertools.product((1, 3, 10, 50), ("cosine", "linear", "sqrt"), (1.0, 2.0), (True, False), LAWS)
    for S, schedule, scale, renewal, law in cases:
        cfg = variants.diffu.but(num_queries=6, evaluations=S, schedule=schedule, signal_scale=scale, renewal=renewal,
                                 noise=law)
        rates = diffusion.signal_rates(schedule, 100)
        seen, states = [], []

        def oracle(reference, t, rows):
            seen.append(reference)
            return torch.full((1, 2, 6, 3), 9.0, dtype=torch.float64), truth[None]

        with mock.patch.object(diffusion, "ddim_step",
                               lambda *a, step=diffusion.ddim_step: states.append((a[0], step(*a))) or states[-1][1]):
            (_, boxes), evaluations = diffusion.sample(oracle, 2, cfg, "cpu", torch.float64)
        assert torch.equal(boxes[-1], truth) and len(seen) == S and len(evaluations) == S
        signal_, first = diffusion.to_signal(truth, scale), states[0][0]
        noise = (first - rates[99].sqrt() * signal_) / (1 - rates[99]).sqrt()
        want = rates[0].sqrt() * signal_ + (1 - rates[0]).sqrt() * noise
        assert torch.allclose(states[-1][1], want, atol=1e-7), (S, schedule, scale, renewal, law)
        assert torch.equal(seen[0], diffusion.to_boxes(first, scale))
        if renewal:                         # hopeless queries start again from fresh noise, confident ones never do
            with mock.patch.object(diffusion, "ddim_step", lambda *a: torch.full_like(a[0], 7.0)):
                for score, kept in ((9.0, True), (-9.0, False)):
                    references = []

                    def decode(reference, t, rows):
                        references.append(reference)
                        return torch.full((1, 2, 6, 3), score, dtype=torch.float64), truth[None]
                    diffusion.sample(decode, 2, cfg, "cpu", torch.float64)
                    assert all(bool((r == 1).all()) == kept for r in references[1:])


def test_diffusion_eta_one_has_the_posteriors_variance():
    """DDIM with eta = 1 is DDPM: mean and variance of q(x_s | x_t, x_0) for neighbouring times (Ho et al. 2020, Eq. 7)."""
    rates = diffusion.signal_rates("cosine", 100)
    t, s, n = 40, 39, 200_000
    x, x0 = torch.full((n,), 0.7, dtype=torch.float64), torch.full((n,), -0.4, dtype=torch.float64)
    got = diffusion.ddim_step(x, x0, rates[t], rates[s], 1.0, torch.randn(n, dtype=torch.float64))
    beta = 1 - rates[t] / rates[s]
    mean = (rates[s].sqrt() * beta * x0[0] + (1 - beta).sqrt() * (1 - rates[s]) * x[0]) / (1 - rates[t])
    deviation = (beta * (1 - rates[s]) / (1 - rates[t])).sqrt()
    assert abs(got.mean() - mean) < 0.01 * deviation and abs(got.std() / deviation - 1) < 0.01


def test_diffusion_sampler_takes_eta_and_draws_fresh_noise():
    """The sampler's states for eta = 0, 0.5 and 1, by Song et al.'s Eq. 12 and 16 written out, from the noise of its seed."""
    rates, truth = diffusion.signal_rates("cosine", 100), torch.rand(1, 5, 4, dtype=torch.float64)
    for eta in (0.0, 0.5, 1.0):
        cfg, seen = variants.diffu.but(num_queries=5, eta=eta, renewal=False, signal_scale=1.5), []
        diffusion.sample(lambda reference, t, rows: (torch.zeros(1, 1, 5, 3), truth[None]), 1, cfg, "cpu", torch.float64,
                         watch=lambda step: seen.append(step["references"]))
        g = torch.Generator().manual_seed(0)
        x, x0 = torch.randn(5, 4, generator=g, dtype=torch.float64), (truth[0] * 2 - 1) * 1.5
        for references, (t, s) in zip(seen, ((99, 66), (66, 33), (33, 0))):
            assert torch.allclose(references[0], (x.clamp(-1.5, 1.5) / 1.5 + 1) / 2), (eta, t)
            sigma = eta * ((1 - rates[s]) / (1 - rates[t])).sqrt() * (1 - rates[t] / rates[s]).sqrt()
            direction = (x - rates[t].sqrt() * x0) / (1 - rates[t]).sqrt()
            fresh = torch.randn(5, 4, generator=g, dtype=torch.float64)
            x = rates[s].sqrt() * x0 + (1 - rates[s] - sigma ** 2).sqrt() * direction + sigma * fresh


def test_diffusion_ddim_recovers_the_noise_it_was_given():
    """Noise a box to t, predict it perfectly, step to t': the state is the same box and noise at t'."""
    rates = diffusion.signal_rates("cosine", 100)
    x0, noise = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    for t, t_next in diffusion.times(100, 4):
        x = rates[t].sqrt() * x0 + (1 - rates[t]).sqrt() * noise
        want = rates[t_next].sqrt() * x0 + (1 - rates[t_next]).sqrt() * noise
        got = diffusion.ddim_step(x, x0, rates[t], rates[t_next], 0.0, torch.zeros_like(x))
        assert torch.allclose(got, want, atol=1e-9)


def test_diffusion_visits_the_published_times():
    assert diffusion.times(100, 3) == [(99, 66), (66, 33), (33, 0)]
    assert diffusion.times(100, 1) == [(99, 0)]


def test_diffusion_is_repeatable_and_independent_of_the_batch():
    """For a seed, eta = 0 gives the same; a photo's boxes depend neither on the batch's size nor on the other photos,
    nor on their generators; the ensemble of a batch is that of its photos one by one."""
    sizes = torch.tensor([[96, 96], [72, 64]])
    for name in ("diffu", "diffu_dino", "diffu_dino_published"):
        built = small(name, num_classes=5).double().eval()
        images, mask, _ = batch()
        images = images.double()
        with torch.no_grad():
            a, b = built(images, mask), built(images, mask)
            assert torch.equal(a["boxes"], b["boxes"])
            first = built(images[:1], mask[:1])
            assert torch.allclose(first["boxes"], a["boxes"][:, :1], atol=1e-9)
            changed = built(torch.cat([images[:1], images[1:] * 2 + mask[1:, None]]), mask,
                            generator=[torch.Generator().manual_seed(s) for s in (0, 9)])
            assert torch.allclose(changed["boxes"][:, :1], first["boxes"], atol=1e-9)
            assert not torch.allclose(changed["boxes"][:, 1:], a["boxes"][:, 1:], atol=1e-3)
            other = built(images[:1], mask[:1], generator=[torch.Generator().manual_seed(5)])
            assert not torch.allclose(other["boxes"], first["boxes"], atol=1e-3)
            for i, answer in enumerate(evaluation.postprocess(a, sizes, built.cfg)):
                alone = evaluation.postprocess(built(images[i:i + 1], mask[i:i + 1]), sizes[i:i + 1], built.cfg)[0]
                assert torch.equal(answer["labels"], alone["labels"]), name
                assert torch.allclose(answer["boxes"], alone["boxes"], atol=1e-6), name


def test_diffusion_noise_is_an_images_own():
    """x_T and all fresh noise of an image come from its own generator."""
    seen = []

    def decode(reference, t, rows):
        seen.append(reference)
        return torch.full((1, 2, 6, 3), -9.0), reference[None]

    cfg = variants.diffu.but(num_queries=6)
    for seeds in ((1, 2), (1, 3)):
        diffusion.sample(decode, 2, cfg, "cpu", torch.float32, [torch.Generator().manual_seed(s) for s in seeds])
    for a, b in zip(seen[:3], seen[3:]):
        assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])
    assert not torch.equal(seen[0], seen[1])
    assert all("one per image" in error_of(diffusion.sample, decode, 2, cfg, "cpu", torch.float32, wrong)
               for wrong in ([torch.Generator()], torch.Generator()))


def test_diffusion_renewal_for_any_t():
    """A query is kept if its score is above t_next / T, whatever T is."""
    steps = []

    def decode(reference, t, rows):
        return torch.tensor([0.44, 0.46]).logit().expand(1, 1, 1, 2).transpose(2, 3), reference[None]

    for timesteps, want in ((20, [False, True]), (100, [False, False]), (1000, [False, False])):
        cfg = variants.diffu.but(num_queries=2, timesteps=timesteps, evaluations=2)
        diffusion.sample(decode, 1, cfg, "cpu", torch.float32, watch=steps.append)
        assert steps[-2]["keep"].tolist() == [want] and steps[-1]["keep"].all(), timesteps


def test_diffusion_survivors_keep_their_queries():
    """Later evaluations see the best share only, each with its own reference; the others' answers stay in the ensemble."""
    score = torch.tensor([[3.0, 9, 5, 8, 2, 7, 1, 6], [9, 8, 7, 6, 5, 4, 3, 2]])
    calls, steps = [], []

    def decode(reference, t, rows):
        calls.append((reference, rows))
        return (score.gather(1, rows)[None, ..., None] - 20 * (t[0] < 99)).expand(-1, -1, -1, 3), reference[None]

    cfg = variants.diffu.but(num_queries=8, survivors=0.5, renewal=False, detections=24)
    (logits, boxes), best = diffusion.sample(decode, 2, cfg, "cpu", torch.float32, watch=steps.append)
    assert [r.tolist() for _, r in calls[1:]] == [[[1, 3, 5, 7], [0, 1, 2, 3]]] * 2
    assert logits.shape == (1, 2, 4, 3) and [b["scores"].shape[1] for b in best] == [24, 12, 12]
    assert [len(s["keep"][0]) for s in steps] == [8, 4, 4]
    # With the reference as the answer, DDIM only takes noise away: a survivor stays on its own line from x_T.
    x_T = calls[0][0].gather(1, calls[1][1][..., None].expand(-1, -1, 4))
    inside = ((x_T > 0) & (x_T < 1)).all(-1)
    assert inside.any() and ((calls[1][0] - 0.5)[inside] * (x_T - 0.5)[inside] >= 0).all()
    everyone = diffusion.sample(decode, 2, cfg.but(survivors=1.0), "cpu", torch.float32)[0]
    assert everyone[1].shape == (1, 2, 8, 4)
    for share in (0.0, -1.0, 1.5):
        assert "survivors" in error_of(variants.diffu.but, survivors=share, kind=variants.ConfigError)


def test_diffusion_survivors_keep_their_content():
    """In the model: every evaluation's decoder begins with the learned content of the queries that are still asked."""
    built, asked, steps = small("diffu", survivors=0.4).eval(), [], []
    built.decoder[0].register_forward_pre_hook(lambda module, inputs: asked.append(inputs[0]))
    images, mask, _ = batch()
    with torch.no_grad():
        built(images, mask, watch=steps.append)
        content = built.first_queries(built.encode(images, mask), None)[0]
    assert [len(s["rows"][0]) for s in steps] == [20, 8, 8] and not torch.equal(steps[1]["rows"][0], torch.arange(8))
    for x, step in zip(asked, steps, strict=True):
        for b in range(2):
            assert torch.equal(x[b], content[b, step["rows"][b]])


def test_diffusion_memory_does_not_grow_with_evaluations():
    """Of an evaluation that is over, neither its logits nor its boxes are still held: only the best pairs."""
    held, alive = [], []

    def decode(reference, t, rows):
        logits = torch.randn(2, 1, 50, 100)
        held.append(weakref.ref(logits))
        alive.append(sum(r() is not None for r in held))
        return logits, reference[None].expand(2, -1, -1, -1)

    cfg = variants.diffu.but(num_queries=50, evaluations=20)
    _, best = diffusion.sample(decode, 1, cfg, "cpu", torch.float32)
    assert max(alive) <= 2 and len(best) == 20 and best[0]["scores"].shape == (1, 100)                       # the new one and the one before


def test_diffusion_backbone_and_encoder_run_once():
    """So do the decoder's projections of the memory; projecting it in every evaluation gives the same, as a check."""
    built = small("diffu", evaluations=4).eval()
    calls, layer = collections.Counter(), built.decoder[0]
    parts = dict(backbone=built.backbone, encoder=built.encoder[0], decoder=layer, values=layer.cross_attn.value_proj)
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
    images, mask, _ = batch()
    with torch.no_grad():
        outputs = built(images, mask)
        assert calls == {"backbone": 1, "encoder": 1, "decoder": 4, "values": 1}
        anew = bench.Unreused(built.cfg).eval()
        anew.load_state_dict(built.state_dict())
        assert all(torch.equal(anew(images, mask)[key], outputs[key]) for key in ("logits", "boxes"))
    assert [e["boxes"].shape for e in outputs["evaluations"]] == [(2, 100, 4)] * 4     # the best of 20 queries x 5 classes


# ===================================================================================================== model.py

def test_model_outputs_have_their_shapes_and_every_parameter_learns():
    for name in TRAINED:
        built = small(name)
        images, mask, targets = batch()
        outputs = built(images, mask, targets)
        C = built.cfg.logits
        assert outputs["logits"].shape == (2, 2, 20, C) and outputs["boxes"].shape == (2, 2, 20, 4), name
        assert ("enc" in outputs) == built.cfg.two_stage and ("dn" in outputs) == (built.cfg.denoising != "none"), name
        losses = matcher.Criterion(built.cfg)(outputs, targets)
        losses["total"].backward()
        assert not [n for n, p in built.named_parameters() if p.grad is None], name
        layers = {n.replace("loss_class", "") for n in losses if n.startswith("loss_class")}
        assert layers == {"", "_0"} | ({"_enc"} if "enc" in outputs else set()) \
            | ({"_dn", "_dn_0"} if "dn" in outputs else set()), name


def test_model_time_is_added_between_self_attention_and_cross_attention():
    """DiffuDETR's FFN(MSDA(SA(q) + t, r_t, O_enc)), a layer by hand."""
    layer = DecoderLayer(variants.diffu.but(**SMALL)).double().eval()
    d = layer.norm1.normalized_shape[0]
    x, pos, t = (torch.randn(2, *size, dtype=torch.float64) for size in ((5, d), (5, d), (4 * d,)))
    looked = torch.randn(2, 5, d, dtype=torch.float64)
    asked = []
    with torch.no_grad():
        got = layer(x, pos, lambda cross_attn, query: asked.append(query) or looked, None, t)
        told = layer.norm1(x + layer.self_attn(x + pos, x + pos, x)) + layer.time[0](t)[:, None]
        after = layer.norm2(told + looked)
        want = layer.norm3(after + layer.linear2(layer.linear1(after).relu()))
    assert torch.allclose(asked[0], told + pos, atol=1e-12) and torch.allclose(got, want, atol=1e-12)


def test_model_every_photo_is_told_its_time():
    """Another t for the second photo changes what its queries say, and nothing of the first's, in either way of telling."""
    for changes in (dict(time="add"), dict(time="scale_shift")):
        built = small("diffu", **changes).double().eval()
        images, mask, _ = batch()
        with torch.no_grad():
            memory = built.encode(images.double(), mask)
            content, pos, _ = built.first_queries(memory, None)
            values = built.project_values(memory)
            reference = torch.rand(2, 20, 4, dtype=torch.float64)
            a, b = (built.decode(memory, values, content, pos, reference, t=torch.tensor([30, t]))[0] for t in (30, 31))
        assert torch.equal(a[:, 0], b[:, 0]) and (a[:, 1] - b[:, 1]).abs().amax((1, 2)).min() > 1e-4, changes


def test_model_an_image_does_not_depend_on_its_batch():
    """The second photo alone gives what it gives beside a larger one, padding and all."""
    for name in TRAINED:
        built = small(name).eval()
        images, mask, _ = batch()
        with torch.no_grad():
            both, alone = built(images, mask), built(images[1:], mask[1:])
        assert torch.allclose(both["boxes"][:, 1], alone["boxes"][:, 0], atol=1e-4), name


def test_model_double_works_everywhere():
    for name in TRAINED:
        built = small(name).double()
        images, mask, targets = batch()
        targets = [t | {"boxes": t["boxes"].double()} for t in targets]
        for mode in (built.train(), built.eval()):
            outputs = mode(images.double(), mask, targets)
            assert outputs["logits"].dtype == outputs["boxes"].dtype == torch.float64, name


def test_model_boxes_stay_float32_under_autocast():
    for name in TRAINED:
        built = small(name)
        images, mask, targets = batch()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = built(images, mask, targets)
        assert outputs["boxes"].dtype == outputs["logits"].dtype == torch.float32, name
        matcher.Criterion(built.cfg)(outputs, targets)["total"].backward()


def test_model_ideas_combine():
    """Combinations that no paper tried build, train and detect."""
    images, mask, targets = batch()
    for name, changes in [("deformable_refine", dict(look_forward_twice=True)), ("dn", dict(decoder_norm=True)),
                          ("deformable", dict(levels=5)), ("diffu", dict(denoising="cdn", look_forward_twice=True)),
                          ("dino", dict(content="memory")), ("diffu", dict(time="scale_shift", content="memory")),
                          ("dn", dict(queries="noise")), ("dino", dict(class_loss="vfl", denoising="dn")),
                          ("dn", dict(decoder_layers=1)), ("dino", dict(encoder_layers=0))]:
        built = small(name, **changes)
        losses = matcher.Criterion(built.cfg)(built(images, mask, targets), targets)
        losses["total"].backward()
        assert torch.isfinite(losses["total"]), (name, changes)
        unused = [n for n, p in built.named_parameters() if p.requires_grad and p.grad is None]
        assert not unused, (name, changes, unused)                      # or DistributedDataParallel would wait for them
        with torch.no_grad():
            assert built.eval()(images, mask)["boxes"].shape[-1] == 4


def test_model_first_boxes_start_at_their_size_in_every_layer():
    """Learned points and anchors: 12% of a side with a head for each layer, and not smaller with every layer with one."""
    images, mask, targets = batch()
    for name in ("deformable_refine", "dn"):
        for shared in (False, True):
            widths = small(name, shared_heads=shared, decoder_layers=4)(images, mask, targets)["boxes"][..., 2:].flatten(1)
            assert (widths.median(1).values > 0.08).all(), (name, shared, widths.median(1).values)


def test_model_dropout_drops_its_share():
    """Each element on its own with probability p, the others scaled to keep the mean; the gradient takes the same ones."""
    for p, shape in ((0.1, (1001, 1003)), (0.5, (999_999,)), (0.9, (10, 100, 1001))):
        x = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 1).requires_grad_()
        torch.manual_seed(3)
        y = Dropout(p)(x)
        kept = y != 0
        n, deviations = kept.numel(), 5 * math.sqrt(p * (1 - p))
        assert abs(kept.double().mean() - (1 - p)) < deviations / math.sqrt(n), p
        for apart in (1, 2, 4096):                                            # neighbours are independent, and so are blocks
            both = kept.flatten()[apart:] & kept.flatten()[:-apart]
            assert abs(both.double().mean() - (1 - p) ** 2) < deviations / math.sqrt(n), (p, apart)
        assert torch.allclose(y[kept], x[kept] / (1 - p))
        y.sum().backward()
        assert torch.allclose(x.grad, kept / (1 - p))
        torch.manual_seed(3)
        assert torch.equal(Dropout(p)(x), y) and not torch.equal(Dropout(p)(x), y)
        if dropout.library():                                                 # heads take seeds in a row
            both = (dropout.drop(x.detach(), p, 6) != 0) & (dropout.drop(x.detach(), p, 7) != 0)
            assert abs(both.double().mean() - (1 - p) ** 2) < deviations / math.sqrt(n), p
    x = torch.rand(3, 5)
    assert Dropout(0.5).eval()(x) is x and torch.equal(Dropout(0.0)(x), x)
    half = Dropout(0.5)(x.bfloat16()[:, ::2])
    assert half.dtype == torch.bfloat16 and half.shape == (3, 3) and Dropout(0.5)(x[:0]).shape == (0, 5)
    assert not Dropout(1.0)(x).any()


def test_model_dropout_after_relu():
    """The same draws as ReLU and dropout one after the other, the same gradient, and the input is left as it was."""
    x = torch.randn(301, 77, generator=torch.Generator().manual_seed(0)).requires_grad_()
    given, upstream = x.detach().clone(), torch.randn(301, 77, generator=torch.Generator().manual_seed(1))
    for p in (0.0, 0.3):
        results = []
        for relu in (lambda: Dropout(p)(x, relu=True), lambda: Dropout(p)(x.relu())):
            torch.manual_seed(3)
            y = relu()
            results.append((y, *torch.autograd.grad(y, x, upstream)))
        assert all(torch.equal(a, b) for a, b in zip(*results)) and torch.equal(x, given), p
        nan = x.detach()[0].index_fill(0, torch.tensor([3]), math.nan).expand(50, -1)
        assert Dropout(p)(nan.requires_grad_(), relu=True)[:, 3].isnan().any(), p
        assert results[0][1].any() and torch.equal(Dropout(p).eval()(x, relu=True), given.relu())


def test_model_dropout_in_attention():
    """Head by head: nn.MultiheadAttention's numbers where nothing is dropped, their mean where something is."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 16, generator=g, dtype=torch.float64).requires_grad_() for n in (5, 7, 7))
    padded, blocked = torch.arange(7) >= torch.tensor([[7], [4]]), torch.rand(5, 7, generator=g) < 0.3
    blocked[:, 0] = False
    nothing = 1e-10                                                                     # rounds to 0 in 32 bits
    for masks in ({}, {"key_padding_mask": padded}, {"attn_mask": blocked},
                  {"key_padding_mask": padded, "attn_mask": blocked}):
        torch.manual_seed(0)
        ours = MultiheadAttention(16, 4, nothing).double()
        theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True).double()
        ours.load_state_dict(theirs.state_dict())
        a, b = ours(q, k, v, **masks), theirs(q, k, v, need_weights=False, **masks)[0]
        with torch.autocast("cpu", torch.bfloat16):
            half = copy.deepcopy(ours).float()(q.float(), k.float(), v.float(), **masks)
        assert half.dtype == torch.bfloat16 and torch.allclose(half.double(), b, atol=0.03), masks
        assert torch.allclose(a, b, atol=1e-8) and torch.allclose(ours.eval()(q, k, v, **masks), b), masks
        wanted = torch.autograd.grad(b.sin().sum(), [q, k, v, *theirs.parameters()])
        for x, y in zip(torch.autograd.grad(a.sin().sum(), [q, k, v, *ours.parameters()]), wanted):
            assert torch.allclose(x, y, atol=1e-7), masks
        ours.train().dropout = 0.5
        again = {name: mask.repeat(500, 1) if name == "key_padding_mask" else mask for name, mask in masks.items()}
        many = ours(*(x.detach().repeat(500, 1, 1) for x in (q, k, v)), **again).detach().unflatten(0, (500, 2))
        off = (many.mean(0) - b) / (many.std(0) / 500 ** 0.5)
        assert off.abs().max() < 5 and many.std(0).min() > 0, off.abs().max()


def test_model_dropout_in_attention_by_definition():
    """The output and its gradients are those of the definition with the same weights dropped, in bfloat16 as well; which
    are dropped does not depend on the threads."""
    g = torch.Generator().manual_seed(0)
    B, Q, S, M, D, p = 2, 50, 100, 3, 8, 0.3
    q, k, v, upstream = (torch.randn(B, n, M, D, generator=g, dtype=torch.float64) for n in (Q, S, S, Q))
    bias = torch.where(torch.rand(B, Q, S, generator=g) < 0.3, -math.inf, 0.0).double()
    if not dropout.library():
        raise unittest.SkipTest("needs a C++ compiler")

    def run(function, dtype=torch.float64):
        torch.manual_seed(3)
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*inputs, bias.to(dtype))
        return [out, *torch.autograd.grad(out, inputs, upstream.to(dtype))]

    def definition(q, k, v, bias):
        seed, out = dropout.new_seed(), []
        for head in range(M):
            kept = dropout.drop(torch.ones(B, Q, S, dtype=torch.float64), p, seed + head)
            weights = (q[:, :, head] @ k[:, :, head].mT / math.sqrt(D) + bias).softmax(-1) * kept
            out.append(weights @ v[:, :, head])
        return torch.stack(out, 2)

    def fast(*args):
        return dropout.Attended.apply(*args, p)

    wanted, got = run(definition), run(fast)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, wanted))
    for a, b in zip(run(fast, torch.bfloat16), wanted):
        assert a.dtype == torch.bfloat16 and torch.allclose(a.double(), b, atol=0.1) and not torch.equal(a.double(), b)
    x = torch.ones(4, requires_grad=True)
    twice, = torch.autograd.grad(dropout.Dropped.apply(x, p, False).square().sum(), x, create_graph=True)
    assert "once_differentiable" in error_of(twice.sum().backward, kind=RuntimeError)
    threads, x, drawn = torch.get_num_threads(), torch.ones(100_001), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            drawn.append(dropout.drop(x, p, 7))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*drawn)


def test_model_dropout_needs_no_compiler():
    """Where dropout.cpp cannot be compiled one warning says why and torch's own serves, as it does under torch.compile."""
    x = torch.ones(2, 50, 16)
    torch.manual_seed(0)
    attention, alone = MultiheadAttention(16, 4, 0.5), Dropout(0.5)

    def serves_torchs():
        for module, arguments, theirs in ((alone, (x,), lambda: torch.nn.functional.dropout(x, 0.5)),
                                          (attention, (x, x, x), lambda: torch.nn.MultiheadAttention.forward(
                                              attention, x, x, x, need_weights=False)[0])):
            torch.manual_seed(3)
            y = module(*arguments)
            torch.manual_seed(3)
            assert torch.equal(y, theirs())

    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        serves_torchs()
    torch.compile(attention, fullgraph=True, backend="eager")(x, x, x)
    torch.compile(alone, fullgraph=True, backend="eager")(x, relu=True)
    with without_compiler(dropout.library) as said:
        serves_torchs()
    assert len(said) == 1 and "dropout" in str(said[0].message) and "compiler" in str(said[0].message)


def test_model_wrong_use_is_said():
    images, mask, _ = batch()
    assert "targets" in error_of(small("dn"), images, mask, kind=ValueError)
    assert "mask" in error_of(small("detr"), images, mask[:, 1:], kind=ValueError)


def test_model_a_photo_with_fewer_tokens_than_queries():
    """Two-stage variants then answer with fewer boxes, or (noise) with all of them; nothing stops."""
    images, mask, targets = batch(size=32)
    for name, changes in [("dino", {}), ("deformable_two_stage", {}), ("diffu", {}), ("diffu_dino_published", {})]:
        built = small(name, num_queries=60, **changes)
        losses = matcher.Criterion(built.cfg)(built(images, mask, targets), targets)
        losses["total"].backward()
        with torch.no_grad():
            boxes = built.eval()(images, mask)["boxes"]
        assert boxes.shape[2] == (60 if built.cfg.queries == "noise" else 22) and torch.isfinite(boxes).all(), name


# =========================================================================================================== weights.py

# The published state dicts: how many names there are, and the CRC-32 of the sorted lines "name shape".
PUBLISHED_KEYS = {
    "detr": (458, 1865247027), "deformable": (561, 2429200660), "deformable_two_stage": (630, 78817132),
    "dn": (605, 2443757799), "dino": (626, 945108721), "diffu_dino_published": (685, 3976764642)}

# Factors on some filled tensors, so that queries and boxes spread out as in a trained model.
FILL_SCALE = {
    "detr": {r"encoder\.layers\.\d\.(self_attn\.out_proj|linear2)\.weight": 0.5,
             r"decoder\.layers\.\d\.self_attn\.out_proj\.weight": 0.25, r"decoder\.layers\.\d\.linear2\.weight": 0.5,
             r"multihead_attn\.in_proj_weight": 2.0, r"query_embed": 16.0},
    "deformable": {r"query_embed": 20.0},
    "deformable_two_stage": {r"class_embed\.6\.weight": -1.0},
    "dn": {r"^(tgt_embed|label_enc)": 16.0, r"refpoint_embed": 3.0},
    "dino": {r"tgt_embed|label_enc": 16.0},
    "diffu_dino_published": {}}
DETR_INPUT_PROJ_BIAS = """
-3259 -1067 -193 365 1684 1444 -2071 -2444 3102 -895 974 -1467 2367 1241 951 664 -2097 -3172 1617 -178 -167 1045
3395 -2776 946 -1896 70 -1620 241 -1611 1261 585 -1018 1834 -1365 2845 1675 2967 -1796 -996 -1647 507 -2648 847 4274
2082 348 -325 -5614 438 301 -485 1171 1324 3177 344 -994 -1560 2959 -507 -819 -3379 -2144 2939 -374 16 2050 1205
-2382 1171 -3119 3816 1012 -852 734 901 -308 -1266 -329 3267 -76 -949 907 -565 1569 2099 -127 -677 262 1474 -580 583
3941 1207 -1196 1741 -568 -1905 2370 -106 179 -1215 744 2379 2255 -2433 -2131 3094 4671 2552 2241 865 2219 -1751
2494 2433 574 -1707 -698 4446 1096 864 -2563 -1215 -1797 -2751 1661 3533 -119 712 457 -1147 -558 -223 783 3380 -338
404 -2523 4594 2805 -128 -2301 71 525 2280 -486 5204 3213 -2139 -3398 2029 2118 -994 205 2799 1130 1350 -720 441
1456 1056 2240 -541 1089 2470 -3834 73 -437 -5296 -1400 -594 -350 2654 4167 -243 1306 1182 98 -2044 475 310 1317
2638 4645 -3150 1319 -2857 1777 -4168 -3266 377 -442 1287 -1498 -126 861 5584 3022 -203 3212 -24 -2857 655 762 -4242
-1889 -3386 3647 116 -3734 -1644 -2632 2342 1113 -3423 3684 1069 -30 -1947 2505 1949 -858 -1758 4112 -1199 -327
-2289 -3820 -484 -737 3626 -1556 -1582 1059 3239 -1152 -273 611 2606 -2480 3516 469 -703 -501 -475 -355 1705 1742
-10 -102 1723 927 2681 2039 422"""                                                                     # thousandths

# matches: queries of image 0 and their targets, then image 1's; "post": labels and places of the first four detections.
EXPECTED = {
    "detr": dict(
        logits=[-1.3231908142, -1.0119599394, -0.80017545628, -1.5624969914, 0.4978276207, 2.5390619805, -1.2915166993,
                -0.017635209833],
        boxes=[0.62428973911, 0.5390288881, 0.75568344377, 0.31027951191, 0.54944561101, 0.59142648378, 0.79319110685,
               0.36868911433],
        total=56.97624763139089, matches=[[17, 28, 53, 76, 81], [0, 2, 1, 4, 3], [32, 67, 92], [0, 2, 1]],
        post=[[17, 17, 17, 13], [17, 17, 17, 17]], places=[145.68163548, 339.57293599, 598.85140805, 160.2600682]),
    "deformable": dict(
        logits=[1.1182626721, 0.056672150548, -0.85731797137, 1.652124494, 0.1771290078, 2.1115508959, 0.80583551393,
                2.2922455376],
        boxes=[0.34748378868, 0.31921202509, 0.49385043328, 0.56584213757, 0.83575837495, 0.35370567275, 0.50168869931,
               0.32770004178],
        total=20140.07289249081, matches=[[3, 15, 105, 232, 261], [2, 0, 1, 3, 4], [22, 75, 146], [0, 2, 1]],
        post=[[32, 63, 32, 63], [32, 32, 63, 32]], places=[89.749026649, 501.7838591, 448.59691315, 35.108582323]),
    "deformable_two_stage": dict(
        logits=[3.0233635946, 0.075030010125, -0.73034197173, 1.4189708463, -0.17754764195, 2.4241180563, 1.4439417723,
                1.7028422855],
        boxes=[0.99847670736, 0.031328359255, 0.074759341902, 0.74023323401, 0.98916001719, 0.031650569231,
               0.099339110214, 0.78208934458],
        total=53045.10688885475, matches=[[34, 53, 157, 171, 182], [3, 2, 1, 4, 0], [48, 147, 238], [2, 1, 0]],
        post=[[0, 0, 0, 0], [0, 0, 0, 0]], places=[604.45691733, 27.416567339, 666.15403537, 0.053110093787]),
    "dn": dict(
        logits=[-0.010161391542, 0.33386233824, -0.72177177814, -0.13119124471, 0.63428612722, 0.49633855526,
                0.39911899075, 0.45252081134],
        boxes=[0.16746894217, 0.13272254237, 0.79988704687, 0.76084391584, 0.64408755214, 0.79058121498, 0.78673022878,
               0.47996156137],
        total=11156.867545128638, matches=[[90, 138, 179, 224, 268], [3, 2, 1, 4, 0], [156, 203, 268], [2, 1, 0]],
        post=[[64, 64, 64, 64], [64, 64, 64, 64]], places=[-128.00605362, 241.06967364, 299.42979582, -119.13475171]),
    "dino": dict(
        logits=[-0.43625626587, -0.26353372119, 0.51873954917, -1.3836817566, 1.4447723098, -0.71698907171,
                0.52523079979, -1.1455013489],
        boxes=[0.85484396775, 0.93883021295, 0.17668946751, 0.0056553480202, 0.92249777991, 0.08663269048,
               0.19195576962, 0.022395941423],
        total=37726.3517371003, matches=[[141, 475, 478, 610, 775], [2, 1, 3, 4, 0], [320, 385, 662], [2, 1, 0]],
        post=[[64, 64, 9, 9], [64, 64, 64, 64]], places=[524.97831963, 481.15423214, 672.49274652, 383.14928522])}


def fill(key, shape):
    """A float64 tensor from its name and shape: unit variance out for unit variance in."""
    g, shape = name_rng(key), tuple(shape)
    if key.endswith("running_var"):
        return g.uniform(0.5, 1.5, shape)
    if key.endswith("running_mean"):
        return g.uniform(-0.2, 0.2, shape)
    if key.endswith("sampling_offsets.bias"):
        return g.uniform(-2.0, 2.0, shape)
    if len(shape) >= 2:
        bound = (3.0 / int(np.prod(shape[1:]))) ** 0.5
        return g.uniform(-bound, bound, shape)
    return g.uniform(0.8, 1.2, shape) if key.endswith("weight") else g.uniform(-0.1, 0.1, shape)


def name_rng(name):
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def fill_batch(num_classes):
    """Two images of different sizes, padded to [2, 3, 320, 480], their mask, and five and three targets."""
    images, targets = torch.zeros(2, 3, 320, 480, dtype=torch.float64), []
    mask = torch.ones(2, 320, 480, dtype=torch.bool)
    for i, (h, w, count) in enumerate([(320, 416, 5), (256, 480, 3)]):
        g = name_rng(f"image{i}")
        y, x = np.mgrid[0:h, 0:w] / 64.0
        waves = [np.sin(g.uniform(0.5, 2, 1) * x + g.uniform(0.5, 2, 1) * y + g.uniform(0, 6, 1)) for _ in range(3)]
        images[i, :, :h, :w] = torch.from_numpy(np.stack(waves) + 0.3 * g.standard_normal((3, h, w)))
        mask[i, :h, :w] = False
        g = name_rng(f"target{i}")
        labels = torch.from_numpy(g.integers(0, num_classes, count))
        wh = torch.from_numpy(g.uniform(0.05, 0.4, (count, 2)))
        centre = torch.from_numpy(g.uniform(0.0, 1.0, (count, 2))) * (1 - wh) + wh / 2
        targets.append({"labels": labels, "boxes": torch.cat([centre, wh], 1)})
    return images, mask, targets


def published_names(model):
    """{the authors' name: (our name, the name it is filled by)} of a model's tensors, with clones and second names."""
    cfg, names = model.cfg, {}
    detrex, dino_like = cfg.content == "memory", cfg.denoising == "cdn"
    for own in model.state_dict():
        if own.endswith("num_batches_tracked"):
            continue
        kind = own.split(".")[0]
        mlp = re.sub(r"\.(\d+)\.(weight|bias)$", lambda m: f".layers.{int(m[1]) // 2}.{m[2]}", own)
        if kind in ("class_embed", "bbox_embed", "enc_class_embed", "enc_bbox_embed"):
            short = kind.removeprefix("enc_")
            rest = (mlp if "bbox" in kind else own).removeprefix(kind + ".")
            if kind.startswith("enc_"):
                indices = [cfg.decoder_layers] if detrex or not dino_like else [None]
            else:
                index, rest = rest.split(".", 1)
                indices = range(cfg.decoder_layers) if cfg.shared_heads else [int(index)]
            for i in indices:
                if i is None:
                    name = f"transformer.enc_out_{short}.{rest}"
                    names[name] = own, name
                    continue
                name = f"{short}.{i}.{rest}" if cfg.attention == "deformable" else f"{short}.{rest}"
                one_of_many = cfg.shared_heads and cfg.attention == "deformable"                 # the last one is used
                winner = f"{short}.{cfg.decoder_layers - 1}.{rest}" if one_of_many else name
                names[name] = own, winner
                if cfg.refine and (short == "bbox_embed" or cfg.two_stage):
                    names[f"transformer.decoder.{name}"] = own, winner
            continue
        if kind == "backbone":
            name = own.replace("backbone.", "backbone.0.body.", 1)
        elif kind in ("encoder", "decoder"):
            name = re.sub(r"^(\w+)\.", r"transformer.\1.layers.", own)
            if cfg.attention == "dense":
                name = name.replace("cross_attn", "multihead_attn")
            elif kind == "decoder" and not detrex:
                name = name.replace("norm1", "norm0").replace("norm2", "norm1").replace("norm0", "norm2")
        elif kind == "decoder_norm":
            name = own.replace("decoder_norm", "transformer.decoder.norm")
        elif kind in ("ref_point_head", "query_scale"):
            name = "transformer.decoder." + mlp
        elif kind in ("level_embed", "reference_points", "enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm",
                      "time_embed") or (kind == "tgt_embed" and dino_like):
            name = "transformer." + own
        else:
            name = own
        for pattern, to in DETREX if detrex else ():
            name = re.sub(pattern, to, name)
        names[name] = own, name
    if detrex:
        for name in SCHEDULE:
            names[name] = None, name
    return names


DETREX = [
    (r"^backbone\.0\.body\.(conv1|bn1)", r"backbone.stem.\1"), (r"^backbone\.0\.body\.", "backbone."),
    (r"layer(\d)", lambda m: f"res{int(m[1]) + 1}"), (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
    (r"\.bn(\d)\.", r".conv\1.norm."), (r"^input_proj\.3\.", "neck.extra_convs.0."), (r"^input_proj\.", "neck.convs."),
    (r"^(neck\.\w+\.\d)\.0", r"\1.conv"), (r"^(neck\.\w+\.\d)\.1", r"\1.norm"), ("level_embed", "level_embeds"),
    (r"(encoder.*)self_attn", r"\1attentions.0"), (r"(decoder.*)self_attn", r"\1attentions.0.attn"),
    ("cross_attn", "attentions.1"), (r"\.linear1\.", ".ffns.0.layers.0.0."), (r"\.linear2\.", ".ffns.0.layers.1."),
    (r"\.norm(\d)\.", lambda m: f".norms.{int(m[1]) - 1}."), (r"\.time\.(\d)\.", r".time_step_embeds.\1.emb_layers.")]
SCHEDULE = ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
            "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"]


def published_state(model, filled=None, add=None):
    """The published state dict of a model's shapes: zeros without memory, or filled, with the factors of `filled`."""
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    state = {}
    for name, (own, source) in published_names(model).items():
        shape = shapes[own] if own else torch.Size([100])
        if filled is None or own is None:
            state[name] = torch.zeros(1).expand(shape)
            continue
        value = fill(source, shape)
        for pattern, factor in filled.items():
            if re.search(pattern, source):
                value = value * factor
        state[name] = torch.from_numpy(value + (add or {}).get(source, 0.0))
    if filled is FILL_SCALE["detr"]:
        bias = [int(n) / 1000 for n in DETR_INPUT_PROJ_BIAS.split()]
        state["input_proj.bias"] = torch.tensor(bias, dtype=torch.float64)
    return state


def published_model(name, add=None, scale=None, **changes):
    model = build_model(name, **changes).double().eval()
    weights.load_weights(model, published_state(model, scale or FILL_SCALE[name], add))
    return model


@contextlib.contextmanager
def pinned_draws(**draws):
    """torch.rand, randn, randint, ... give the listed tensors, in order."""
    with contextlib.ExitStack() as stack:
        for name, values in draws.items():
            stack.enter_context(mock.patch(f"torch.{name}", side_effect=list(values)))
        yield


def picked(x, count=8):
    """`count` entries spread over a tensor, from its first on."""
    x = x.detach().flatten()
    return x[torch.arange(count) * (len(x) // (count + 1) | 1)].tolist()


def close(ours, published, tolerance=1e-8):
    ours, published = np.asarray(ours), np.asarray(published)
    assert np.abs(ours - published).max() <= tolerance * max(1.0, np.abs(published).max()), (ours, published)


def check_published(name, train=False, draws=None, gradients=None, **changes):
    """A model with the authors' weights gives the authors' numbers: outputs, matches, total loss, detections and, for
    `gradients` {parameter: norm}, the total's gradients."""
    expected, model = EXPECTED[name], published_model(name, **changes)
    images, mask, targets = fill_batch(91)
    with torch.set_grad_enabled(gradients is not None), pinned_draws(**(draws or {})):
        outputs = model.train(train)(images, mask, targets) if train else model(images, mask)
        losses = matcher.Criterion(model.cfg)(outputs, targets)
    # Ten digits are written above.
    close(picked(outputs["logits"][-1]), expected["logits"], 1e-9)
    close(picked(outputs["boxes"][-1]), expected["boxes"], 1e-9)
    close(losses["total"].item(), expected["total"], 1e-11)
    _, image, query, target = matcher.match([(outputs["logits"][-1:], outputs["boxes"][-1:], targets)], model.cfg)[0]
    assert [t[image == i].tolist() for i in (0, 1) for t in (query, target)] == expected["matches"]
    answers = evaluation.postprocess(outputs, torch.tensor([[480, 640], [384, 720]]), model.cfg)
    assert [a["labels"][:4].tolist() for a in answers] == expected["post"]
    close(picked(torch.stack([a["boxes"][:4] for a in answers]), 4), expected["places"], 1e-9)
    if gradients:
        found = torch.autograd.grad(losses["total"], [model.get_parameter(name) for name in gradients])
        close([g.norm().item() for g in found], list(gradients.values()), 1e-11)


def cdn_draws(rows):
    sign = torch.from_numpy(name_rng("cdn_sign").integers(0, 2, (rows, 4)))
    part = torch.from_numpy(name_rng("cdn_part").uniform(0, 1, (rows, 4)))
    return dict(rand=[torch.ones(rows), part], randint=[torch.zeros(rows, dtype=torch.long), sign])


# ----------------------------------------------------------------------------------- the models, against published code

def test_parity_detr():
    check_published("detr")


def test_parity_deformable():
    check_published("deformable", gradients={
        "level_embed": 373.6833101350091,
        "encoder.0.self_attn.sampling_offsets.weight": 973.8882286198134,
        "reference_points.weight": 565.7784308406964,
        "bbox_embed.0.4.weight": 53.58618896034537})


def test_parity_two_stage():
    check_published("deformable_two_stage")


def test_parity_dn():
    """In training, with its denoising queries without noise: matching queries give what they give in evaluation."""
    draws = dict(rand=[torch.ones(40), torch.full((40, 4), 0.5)], randint=[torch.zeros(40, dtype=torch.long)])
    check_published("dn", train=True, draws=draws, box_noise=0.0)


def test_parity_dino():
    check_published("dino", train=True, draws=cdn_draws(320))


def test_parity_diffu_dino_decoder():
    """One evaluation at t = 99 from stored noise."""
    model = published_model("diffu_dino_published", evaluations=1)
    images, mask, _ = fill_batch(80)
    noise = [n for k in (0, 1) for n in torch.from_numpy(name_rng(f"noise{k}").standard_normal((2, 900, 4)))]
    with torch.no_grad(), pinned_draws(randn=noise):
        outputs = model(images, mask)
    close(picked(outputs["logits"][-1, :, :20]), [
        -1.2112954492, -0.06468552106, -0.67499283024, 0.2164640545, -0.81610386027, -0.78829002584, 1.0620758018,
        -0.23759040589], 1e-9)
    close(picked(outputs["boxes"][-1]), [
        0.39168894976, 0.80081330921, 0.39002493399, 0.55183959657, 0.69998865649, 0.47633710935, 0.54830406641,
        0.51794064556], 1e-9)


def test_parity_diffu_dino_sampling():
    """Three evaluations, renewal and ensemble. The authors' schedule is rounded to float32, ours is not."""
    model = published_model("diffu_dino_published", {"class_embed.5.bias": -18.6}, {r"class_embed\.5\.weight": 8.0})
    images, mask, _ = fill_batch(80)
    noise = [torch.from_numpy(name_rng(f"noise{k}").standard_normal((1, 900, 4)))[0] for k in range(4)]
    steps = []
    with torch.no_grad(), pinned_draws(randn=noise):
        outputs = model(images[:1, :, :, :416], mask[:1, :, :416], watch=steps.append)
    assert [step["keep"].sum().item() for step in steps[:2]] == [101, 873]                        # what renewal keeps
    answer = evaluation.postprocess(outputs, torch.tensor([[320, 416]]), model.cfg)[0]
    assert len(answer["scores"]) == 300
    assert answer["labels"][:8].tolist() == [1, 1, 55, 55, 55, 1, 1, 1]
    close(answer["scores"][:8], [0.979921274, 0.977948116, 0.97640097, 0.976328854, 0.975253073, 0.974435563,
                                 0.97442978, 0.972972318], 1e-6)
    close(picked(answer["boxes"][:8]), [101.82997632, 233.16581476, 396.62169767, 145.05487403, 206.01417266,
                                        266.77462753, 416.0, 160.56501517], 1e-6)


def test_parity_diffu_dino_training():
    """Noised references, denoising queries and all losses."""
    model = published_model("diffu_dino_published").train()
    images, mask, targets = fill_batch(80)
    draws = cdn_draws(960)
    draws["randint"] = [torch.tensor([30, 70]), *draws["randint"]]
    draws["randn"] = [torch.from_numpy(name_rng(f"{key}{i}").standard_normal((rows, 4))) for i, n in enumerate((5, 3))
                      for key, rows in (("pad", 900 - n), ("q", 900))]
    with torch.no_grad(), pinned_draws(**draws, randperm=[torch.arange(900)] * 2):
        outputs = model(images, mask, targets)
        total = matcher.Criterion(model.cfg)(outputs, targets)["total"].item()
    close(picked(outputs["boxes"][-1]), [
        0.67065216163, 0.21987562731, 0.82409372204, 0.54488958661, 0.71671052889, 0.48242190595, 0.99921458503,
        0.0013067781781], 1e-5)
    close(total, 69526.37884923526, 1e-6)


def test_parity_msda():
    """The published numbers are of locations and weights: an offset from the corner in cells, and a logarithm."""
    shapes = [(12, 16), (6, 8), (3, 4), (2, 2)]
    size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    value = torch.from_numpy(name_rng("msda_value").standard_normal((2, 256, 8, 32))).requires_grad_()
    locations = torch.from_numpy(name_rng("msda_loc").uniform(-0.2, 1.2, (2, 50, 8, 4, 4, 2))).requires_grad_()
    attention = torch.from_numpy(name_rng("msda_attn").standard_normal((2, 50, 8, 16))).softmax(-1)
    attention = attention.view(2, 50, 8, 4, 4).requires_grad_()
    grad = torch.from_numpy(name_rng("msda_grad").standard_normal((2, 50, 256)))
    out = msda.msda(value, shapes, locations * size, attention.log(), torch.zeros(2, 50, 4, 2, dtype=torch.float64))
    of_value, of_locations, of_weights = torch.autograd.grad(out, (value, locations, attention), grad)
    close(picked(out, 4), [0.15840885643, 0.09650539657, 0.17882717442, 0.017678043499], 1e-9)
    close(picked(of_value, 4), [0.0007511216715, -1.0742236012e-05, 0.18522217964, 0.084644974896], 1e-9)
    close(picked(of_locations, 4), [-0.26125806638, -0.47652863885, 2.1711630027, 0.0], 1e-9)
    msda.msda_grid_sample(value, shapes, locations, attention).backward(grad)
    close(picked(attention.grad, 4), [0.13170110342, -4.8038421524, 0.0, 5.1468127785], 1e-9)
    mean = (attention * attention.grad).sum((-1, -2), keepdim=True)        # a softmax's input does not see what is common
    close(of_weights, (attention.grad - mean).detach(), 1e-9)


# ------------------------------------------------------------------------------------------------ names and recognition

def test_weights_published_names():
    """The rebuilt names and shapes are the released files', to the last one."""
    for name, facts in PUBLISHED_KEYS.items():
        state = published_state(build_model(name))
        lines = "\n".join(sorted(f"{k} {list(v.shape)}" for k, v in state.items()))
        assert (len(state), zlib.crc32(lines.encode())) == facts, name


def test_weights_siblings():
    """Every published member: recognised, loaded strictly, with its published number of parameters."""
    for name, changes, file, parameters in [
            ("detr", {}, "detr-r50-e632da11.pth", 41_524_768),
            ("detr_dc5", {}, "detr-r50-dc5-f0fb7ef5.pth", 41_524_768),
            ("detr", dict(backbone="resnet101"), "detr-r101-2c7b67e5.pth", None),
            ("detr_dc5", dict(backbone="resnet101"), "detr-r101-dc5-a2e86def.pth", None),
            ("deformable", {}, "r50_deformable_detr-checkpoint.pth", 40_069_665),
            ("deformable_single", {}, "r50_deformable_detr_single_scale-checkpoint.pth", 34.07e6),
            ("deformable_single", dict(dilation=True), "r50_deformable_detr_single_scale_dc5-checkpoint.pth", 34.07e6),
            ("deformable_refine", {}, "r50_deformable_detr_plus_iterative_bbox_refinement-checkpoint.pth", 40.85e6),
            ("deformable_two_stage", {}, "r50_deformable_detr_plus_two_stage-checkpoint.pth", 41_181_529),
            ("dn", {}, "checkpoint.pth", 47_429_154),
            ("dino", {}, "checkpoint0011_4scale.pth", 46_893_182),
            ("dino", dict(num_classes=7, num_queries=30, ffn=1024, encoder_layers=3), "mine.pth", None),
            ("diffu_dino_published", {}, "model_final.pth", None),
            ("diffu_dino_published", dict(num_classes=1203), "lvis.pth", None),
            ("align", {}, "align_detr_r50_24e.pth", None), ("diffu_align_published", {}, "diffu_align_detr_r50.pth", None)]:
        model = build_model(name, **changes)
        state = published_state(model)
        assert weights.detect(state, file) == (name, changes), (file, weights.detect(state, file))
        assert weights.load_weights(model, state) == sum("num_batches" not in k for k in model.state_dict())
        count = sum(p.numel() for p in model.parameters())
        assert parameters is None or count == parameters or round(count / 1e6, 2) == parameters / 1e6, (file, count)


def test_weights_forms():
    """The wrappings of released files: prefixes, counters, averages, second names only."""
    model = build_model("deformable_two_stage", encoder_layers=1, decoder_layers=2, num_queries=10)
    state = {k: v.clone() for k, v in published_state(model).items()}
    state["bbox_embed.1.layers.0.weight"] += 1
    extra = {"transformer.encoder.layers.0.linear1.total_params": torch.ones(1), "total_ops": torch.zeros(1),
             "backbone.0.body.bn1.num_batches_tracked": torch.tensor(3)}
    average = {k: v + 2 for k, v in state.items() if not k.startswith(("class_embed", "bbox_embed"))}
    for source, value in [
            ({"model": state | extra, "epoch": 49}, 1.0), ({"module." + k: v for k, v in state.items()}, 1.0),
            ({"model": state, "ema_state": average}, 2.0), ({"model": state, "ema_state": {}}, 1.0)]:
        weights.load_weights(model, source)
        assert (model.bbox_embed[1][0].weight == value).all()


def test_weights_shared_head_winner():
    """Where a shared head's copies disagree, the top level's last one is loaded last by the authors' code, too."""
    model = build_model("dino", encoder_layers=1, decoder_layers=3, num_queries=10)
    state = {k: v.clone() for k, v in published_state(model).items()}
    for i in range(3):
        state[f"class_embed.{i}.bias"] += i
        state[f"transformer.decoder.class_embed.{i}.bias"] += 10
    weights.load_weights(model, dict(reversed(state.items())))
    assert (model.class_embed[0].bias == 2).all()


def test_weights_own_state_dicts():
    """Our own bare state dicts are recognised as well. (A checkpoint carries its variant's name; a row that somebody adds
    may have a relative's very names and shapes, and is not asked for here.)"""
    for name in ("detr", "detr_dc5", "deformable", "deformable_single", "deformable_refine", "deformable_two_stage", "dn",
                 "dino", "diffu", "diffu_dino", "diffu_dino_published"):
        changes = dict(num_classes=3, d_model=64, ffn=128, encoder_layers=1, decoder_layers=2, backbone_norm="batch")
        if not variants.VARIANTS[name].dilation:
            changes["backbone"] = "resnet18"
        model = build_model(name, **changes)
        found, overrides = weights.detect(model.state_dict(), name)
        assert (found, overrides) == (name, changes), (found, overrides)


# ------------------------------------------------------------------------------------------------------------ bad input

def weights_error(call, *words):
    """Calling raises a WeightsError that holds all words; returns its text."""
    try:
        call()
    except weights.WeightsError as error:
        missing = [w for w in words if w not in str(error)]
        assert not missing, f"{missing} not in: {error}"
        return str(error)
    raise AssertionError("no WeightsError")


def test_weights_wrong_variant():
    """Every file in every other model: an error that names the right variant, and an untouched model."""
    names = ("detr", "deformable", "deformable_refine", "deformable_two_stage", "dino", "diffu_dino_published")
    models = {name: build_model(name, encoder_layers=1, decoder_layers=2) for name in names}
    states = {name: published_state(model) for name, model in models.items()}
    for name, model in models.items():
        before = {k: v.clone() for k, v in model.state_dict().items()}
        for other in names:
            if other != name:
                text = weights_error(lambda: weights.load_weights(model, states[other]), f"--variant {other} ")
                assert "nothing was loaded" in text and (" missing: " in text or " unused: " in text)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_weights_wrong_names_and_shapes():
    model = build_model("dino", encoder_layers=1, decoder_layers=2, num_queries=10, num_classes=4)
    state = published_state(model)
    renamed = {k.replace("enc_output_norm.weight", "enc_output_nrom.weight"): v for k, v in state.items()}
    weights_error(lambda: weights.load_weights(model, renamed), "1 missing: enc_output_norm.weight",
                  "1 unused: transformer.enc_output_nrom.weight")
    other = build_model("dino", encoder_layers=1, decoder_layers=2, num_queries=20, num_classes=3)
    weights_error(lambda: weights.load_weights(other, state), "of another shape", "[4, 256], the model's is [3, 256]",
                  "--num-queries 10", "num_classes=4")
    weights_error(lambda: weights.fine_tune(other, state, False), "1 of another shape: transformer.tgt_embed.weight [10, 256]")
    weights_error(lambda: weights.load_weights(model, {}), "no state dict")
    weights_error(lambda: weights.load_weights(model, {"epoch": 3}), "'epoch'")
    weights_error(lambda: weights.detect({"decoder.layers.0.sa_qcontent_proj.weight": torch.ones(1)}), "not built yet")
    weights_error(lambda: weights.detect({"conv1.weight": torch.ones(1)}), "conv1.weight", "dino")


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, ("this-directory-must-not-appear",)


def test_weights_bad_files():
    model = build_model("detr", encoder_layers=1, decoder_layers=1, backbone="resnet18")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1e-4, names=["a"])}, path)
        loaded, meta = weights.load_checkpoint(path)
        assert meta["variant"] == "detr" and not loaded.training
        whole = path.read_bytes()
        for content in (whole[:len(whole) // 2], b"", b"hello world\n" * 100, b"<!DOCTYPE html>\n<title>404</title>\n",
                        b"version https://git-lfs.github.com/spec/v1\n"):
            path.write_bytes(content)
            weights_error(lambda: weights.load_checkpoint(path), str(path), "cut short")
        torch.save({"model": _RunsCode()}, path)
        weights_error(lambda: weights.load_checkpoint(path), str(path), "refused", "could run code", "torch.save(")
        torch.save(model, path)
        weights_error(lambda: weights.load_checkpoint(path), str(path), "refused")
        torch.save({"format": "minDETR", "variant": "detr"}, path)
        weights_error(lambda: weights.load_checkpoint(path), str(path), "without config, recipe")
        torch.save([1, 2], path)
        weights_error(lambda: weights.load_checkpoint(path), "list")
        weights_error(lambda: weights.load_checkpoint(Path(folder) / "none.pth"), "none.pth", "no such file")
        weights_error(lambda: weights.load_checkpoint(folder), folder, "cannot be read")
    assert not Path("this-directory-must-not-appear").exists()


# -------------------------------------------------------------------------------------------- checkpoints and backbones

TINY = dict(backbone="resnet18", backbone_norm="batch", d_model=64, ffn=64, encoder_layers=1, decoder_layers=2,
            num_queries=9)


def own_checkpoint(name="diffu_dino", num_classes=3):
    model = build_model(name, num_classes=num_classes, dropout=0.0, **TINY)
    return model, {
        "format": "minDETR", "variant": name, "config": asdict(model.cfg),
        "recipe": asdict(variants.recipe(name).but(image_size=128, max_size=128)), "classes": ["a", "b", "c"],
        "category_ids": [1, 5, 7], "model": {k: v * 0 for k, v in model.state_dict().items()},
        "ema": model.state_dict()}


def test_weights_own_checkpoint():
    """A round trip through a file: the average is preferred, overrides and meta arrive."""
    model, checkpoint = own_checkpoint()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.pth"
        weights.save(path, checkpoint)
        loaded, meta = weights.load_checkpoint(path, evaluations=5)
        assert loaded.cfg == model.cfg.but(evaluations=5) and not loaded.training
        assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
        assert meta["classes"] == ["a", "b", "c"] and meta["category_ids"] == [1, 5, 7]
        assert meta["variant"] == "diffu_dino" and meta["config"]["d_model"] == 64
        assert meta["recipe"]["image_size"] == 128
        weights_error(lambda: weights.load_checkpoint(path, num_queries=10), "tgt_embed.weight [9, 64]", str(path))
        try:
            weights.load_checkpoint(path, evaluatoins=5)
        except variants.ConfigError as error:
            assert "evaluatoins" in str(error)
        else:
            raise AssertionError("an unknown field was accepted")


def test_weights_published_classes():
    for num_classes, first, last in ((91, ("N/A", 0), ("toothbrush", 90)), (80, ("person", 1), ("toothbrush", 90)),
                                     (3, ("class 0", 0), ("class 2", 2))):
        names, ids = weights.coco_classes(num_classes)
        assert len(names) == len(ids) == num_classes
        assert (names[0], ids[0]) == first and (names[-1], ids[-1]) == last
        assert num_classes == 3 or dict(zip(ids, names))[44] == "bottle"


def test_weights_fine_tune():
    """Another number of classes: heads and label embeddings stay fresh, the rest arrives, and the line says so."""
    source, checkpoint = own_checkpoint()
    model = build_model("diffu_dino", num_classes=5, dropout=0.0, **TINY)
    fresh = model.class_embed[0].weight.clone()
    line = weights.fine_tune(model, checkpoint, same_classes=False)
    assert "new, for 5 classes: class_embed.0, enc_class_embed, label_enc" in line and "\n" not in line
    assert torch.equal(model.class_embed[0].weight, fresh)
    assert torch.equal(model.bbox_embed[0][0].weight, source.bbox_embed[0][0].weight)
    same = build_model("diffu_dino", num_classes=3, dropout=0.0, **TINY)
    assert "none new" in weights.fine_tune(same, checkpoint, same_classes=True)
    # As many classes that mean something else need a new head as well.
    assert "new, for 3 classes: class_embed.0" in weights.fine_tune(same, checkpoint, same_classes=False)


def test_weights_save_fails():
    """A full disk leaves the old file, no other, and an error that names it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.pth"
        weights.save(path, {"a": torch.ones(1)})
        with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
            weights_error(lambda: weights.save(path, {"a": torch.zeros(1)}), str(path), "No space left on device")
        assert torch.load(path, weights_only=True)["a"] == 1 and os.listdir(folder) == ["last.pth"]
        for wrong in (Path(folder) / "none" / "last.pth", path / "last.pth"):
            weights_error(lambda: weights.save(wrong, {}), str(wrong), "cannot be written")


def test_weights_backbone():
    """Torchvision's state dict by path; another ResNet, frozen random weights and no network are errors."""
    resnet = torchvision.models.resnet18(weights=None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet18.pth"
        torch.save(resnet.state_dict(), path)
        for norm in ("frozen", "batch"):
            model = build_model("deformable", **(TINY | dict(backbone_norm=norm)))
            weights.load_backbone(model, str(path))
            assert torch.equal(model.backbone.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)
        source, checkpoint = own_checkpoint()
        weights.load_backbone(model, checkpoint)                                     # a detector's works, too
        assert torch.equal(model.backbone.conv1.weight, source.backbone.conv1.weight)
        other = build_model("detr", backbone="resnet34", encoder_layers=1, decoder_layers=1)
        weights_error(lambda: weights.load_backbone(other, str(path)), "missing", "resnet34")
        weights_error(lambda: weights.load_backbone(other, "none"), "--backbone-norm batch")
        weights.load_backbone(model, "none")
        with mock.patch("torch.hub.get_dir", return_value=folder), \
                mock.patch("torch.hub.urlopen", side_effect=urllib.error.URLError("no network")):
            weights_error(lambda: weights.load_backbone(other, "default"), "no network", "resnet34-", folder,
                          "--backbone-weights none")


# ============================================================================================================== data.py

# The published resize, as facts: rows w, h, short side, h out, w out. Positive: long side to 1333; negative: no cap.
_SIZES = """640 480 800 800 1066,640 480 480 480 640,640 480 608 608 810,640 480 736 736 981,480 640 800 1066 800,
480 640 480 640 480,480 640 608 810 608,480 640 736 981 736,640 426 800 800 1201,640 426 480 480 721,
640 426 608 608 913,640 426 736 736 1105,426 640 800 1201 800,426 640 480 721 480,426 640 608 913 608,
426 640 736 1105 736,640 640 800 800 800,640 640 480 480 480,640 640 608 608 608,640 640 736 736 736,
500 375 800 800 1066,500 375 480 480 640,500 375 608 608 810,500 375 736 736 981,640 427 800 800 1199,
640 427 480 480 719,640 427 608 608 911,640 427 736 736 1103,640 361 800 752 1333,640 361 480 480 850,
640 361 608 608 1077,640 361 736 736 1304,1333 800 800 800 1333,1333 800 480 480 799,1333 800 608 608 1013,
1333 800 736 736 1226,800 1333 800 1333 800,800 1333 480 799 480,800 1333 608 1013 608,800 1333 736 1226 736,
2000 600 800 400 1333,2000 600 480 400 1333,2000 600 608 400 1333,2000 600 736 400 1333,640 200 800 417 1334,
640 200 480 417 1334,640 200 608 417 1334,640 200 736 417 1334,200 640 800 1334 417,200 640 480 1334 417,
200 640 608 1334 417,200 640 736 1334 417,1334 800 800 799 1332,1334 800 480 480 800,1334 800 608 608 1013,
1334 800 736 736 1227,333 500 800 1201 800,333 500 480 720 480,333 500 608 912 608,333 500 736 1105 736,
512 512 800 800 800,512 512 480 480 480,512 512 608 608 608,512 512 736 736 736,800 800 800 800 800,
800 800 480 480 480,800 800 608 608 608,800 800 736 736 736,1024 683 800 800 1199,1024 683 480 480 719,
1024 683 608 608 911,1024 683 736 736 1103,300 900 800 1332 444,300 900 480 1332 444,300 900 608 1332 444,
300 900 736 1332 444,640 384 800 800 1333,640 384 480 480 800,640 384 608 608 1013,640 384 736 736 1226,
640 480 -400 400 533,640 480 -500 500 666,640 480 -600 600 800,640 426 -400 400 600,640 426 -500 500 751,
640 426 -600 600 901,427 640 -400 599 400,427 640 -500 749 500,427 640 -600 899 600"""


# ---- helpers: a tiny folder in COCO's layout, and what a bad one must answer

@contextlib.contextmanager
def _coco_folder(photos=3, edit=None, text=None):
    """Root of a folder with `photos` 60x40 pictures and one box each; edit(coco, train folder) may spoil it."""
    with tempfile.TemporaryDirectory() as root:
        folder = os.path.join(root, "train2017")
        os.makedirs(folder), os.makedirs(os.path.join(root, "annotations"))
        coco = dict(categories=[dict(id=7, name="cat"), dict(id=3, name="dog")],
                    images=[dict(id=10 + i, file_name=f"{i}.png", width=60, height=40) for i in range(photos)],
                    annotations=[dict(id=1 + i, image_id=10 + i, category_id=(7, 3)[i % 2], bbox=[10, 10, 20, 10],
                                      area=200, iscrowd=0) for i in range(photos)])
        for i in range(photos):
            Image.new("RGB", (60, 40), (40 * i, 90, 200)).save(os.path.join(folder, f"{i}.png"))
        if edit:
            edit(coco, folder)
        with open(os.path.join(root, "annotations", "instances_train2017.json"), "w") as file:
            file.write(json.dumps(coco) if text is None else text)
        yield root


def _refused(make, *words):
    """make() must raise (or return) a DataError whose message holds all the words."""
    try:
        answer = make()
    except data.DataError as error:
        answer = error
    assert isinstance(answer, data.DataError), f"accepted: {answer!r}"
    missing = [word for word in words if word.lower() not in str(answer).lower()]
    assert not missing, f"{missing} not in: {answer}"


def _refused_folder(edit, *words, text=None):
    with _coco_folder(edit=edit, text=text) as root:
        _refused(lambda: data.CocoFolder(root), "instances_train2017.json" if text is not None else "", *words)


# ---- photos

def test_data_photo_modes():
    """Every mode of picture becomes the RGB that a viewer shows."""
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(8, 0)
    gray = Image.fromarray(ramp)
    expected = np.repeat(ramp[..., None], 3, 2).astype(int)
    palette = gray.convert("P")
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    ints = Image.fromarray(ramp.astype(np.int32) * 257)
    long = Image.fromarray(ramp.astype(np.int32) * 257 * 1000)           # more than 16 bits: scaled to its own range
    floats = Image.fromarray(ramp.astype(np.float32) / 255)
    cases = {"L.png": gray, "RGB.png": gray.convert("RGB"), "P.png": palette, "16.png": deep, "16.tiff": deep,
             "I.tiff": ints, "I32.tiff": long, "F.tiff": floats, "LA.png": gray.convert("LA"),
             "RGBA.png": gray.convert("RGBA"), "CMYK.tiff": gray.convert("RGB").convert("CMYK"),
             "1.png": gray.convert("1")}
    with tempfile.TemporaryDirectory() as folder:
        for name, image in cases.items():
            path = os.path.join(folder, name)
            image.save(path)
            photo = data.read_photo(path)
            assert photo.mode == "RGB" and photo.size == (256, 8), name
            if name != "1.png":
                worst = np.abs(np.asarray(photo).astype(int) - expected).max()
                assert worst <= 1, f"{name}: off by {worst}"
        # transparent pixels show the white page, not the colour that is hidden under them
        clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
        clear.putpixel((0, 0), (0, 0, 255, 255))
        clear.save(os.path.join(folder, "clear.png"))
        hidden = Image.new("P", (4, 4), 0)
        hidden.putpalette([255, 0, 0, 0, 0, 255])
        hidden.putpixel((0, 0), 1)
        hidden.save(os.path.join(folder, "hidden.png"), transparency=0)
        for name in ("clear.png", "hidden.png"):
            photo = data.read_photo(os.path.join(folder, name))
            assert photo.getpixel((3, 3)) == (255, 255, 255) and photo.getpixel((0, 0)) == (0, 0, 255), name


def test_data_photo_exif():
    """All eight orientations show the same upright picture; annotations of the stored pixels get the stored pixels."""
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 16, 16))                                       # top left
    upright.paste("blue", (32, 0, 48, 16))                                     # top right
    turns = {1: None, 2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
             6: Image.ROTATE_90, 7: Image.TRANSVERSE, 8: Image.ROTATE_270}     # how the camera stored it
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "photo.jpg")
        for orientation, turn in turns.items():
            exif = Image.Exif()
            exif[0x0112] = orientation
            (upright if turn is None else upright.transpose(turn)).save(path, exif=exif, quality=95)
            photo = data.read_photo(path)
            (r, _, b), (r2, _, b2) = photo.getpixel((4, 4)), photo.getpixel((44, 4))
            assert photo.size == (48, 32) and r > 200 > b and b2 > 200 > r2, f"orientation {orientation}"
            if orientation >= 5:
                assert data.read_photo(path, (48, 32)).size == (48, 32)
                assert data.read_photo(path, (32, 48)).size == (32, 48), f"stored pixels, orientation {orientation}"


def test_data_photo_bad():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "bad.jpg")
        _refused(lambda: data.read_photo(path), "bad.jpg")
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
            Image.fromarray(noise).save(path, kind)
            with open(path, "rb") as file:
                content = file.read()
            for kept in (0, 3, 40, len(content) // 2):
                with open(path, "wb") as file:
                    file.write(content[:kept])
                _refused(lambda: data.read_photo(path), "bad.jpg")
        with open(path, "w") as file:
            file.write("<html>404 not found</html>")
        _refused(lambda: data.read_photo(path), "bad.jpg")
        _refused(lambda: data.read_photo(folder), folder)


def test_data_normalise_and_back():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8))
    tensor = data.normalised(data.to_bytes(image))
    theirs = TF.normalize(TF.to_tensor(image), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert torch.equal(tensor, theirs) and tensor.is_contiguous()
    assert np.array_equal(np.asarray(data.to_pil(tensor)), np.asarray(image))


# ---- transforms

def test_data_resize_rule():
    """The published rounding on 89 sizes."""
    rows = [list(map(int, row.split())) for row in _SIZES.split(",")]
    assert len(rows) == 89
    for w, h, size, out_h, out_w in rows:
        assert data.resized(w, h, abs(size), 1333 if size > 0 else None) == (out_h, out_w), (w, h, size)
    assert min(data.resized(20000, 1, 800, 1333)) >= 1


def test_data_eval_transform():
    """PIL's antialiased bilinear; boxes scaled by the true ratios; an image of the right size untouched."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (426, 640, 3), dtype=np.uint8))
    boxes = np.float32([[10, 20, 110, 220], [300, 100, 640, 426]])
    out, moved, labels = data.eval_transform(200, 1333)(image, boxes, np.array([1, 2]), None)
    assert out.size == (300, 200) and labels.tolist() == [1, 2]
    assert np.array_equal(np.asarray(out), np.asarray(image.resize((300, 200), Image.BILINEAR)))
    assert np.allclose(moved, boxes * np.tile([300 / 640, 200 / 426], 2))
    same, _, _ = data.eval_transform(426, 1333)(image, boxes, labels, None)
    assert np.array_equal(np.asarray(same), np.asarray(image))


class _Recorder:
    """Stands for a photo in a transform: keeps its size and what was done to it, and costs no pixels."""

    def __init__(self, size, done=()):
        self.size, self.done = size, done
        self.width, self.height = size

    def resize(self, size, filter):
        assert filter == Image.BILINEAR
        return _Recorder(size, self.done + (("resize", size),))

    def crop(self, box):
        return _Recorder((box[2] - box[0], box[3] - box[1]), self.done + (("crop", box),))

    def transpose(self, how):
        assert how == Image.FLIP_LEFT_RIGHT
        return _Recorder(self.size, self.done + (("flip", None),))


def test_data_train_recipe():
    """The recipe as published: which sizes, which crops, how often; and the same in proportion for another size."""
    for size, w, h in ((800, 640, 480), (800, 427, 640), (400, 640, 480)):
        part, draws, flips, crops = size / 800, 1500, 0, 0
        shorts, firsts, sides, touched = set(), set(), [], set()
        for seed in range(draws):
            image, _, _ = data.train_transform(size, 1333, exact=True)(
                _Recorder((w, h)), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), random.Random(seed))
            done = [kind for kind, _ in image.done]
            flips += "flip" in done
            if "crop" in done:
                crops += 1
                at = done.index("crop")
                before = image.done[at - 1][1] if at and image.done[at - 1][0] == "resize" else (w, h)
                x1, y1, x2, y2 = image.done[at][1]
                firsts.add(min(before))
                assert 0 <= x1 and 0 <= y1 and x2 <= before[0] and y2 <= before[1]
                sides.append((x2 - x1, y2 - y1))
                for side, limit in ((x2 - x1, before[0]), (y2 - y1, before[1])):
                    assert 384 * part <= side <= min(limit, 600 * part)
                touched |= {"left"} if x1 == 0 else set()
                touched |= {"bottom"} if y2 == before[1] else set()
                crop_w, crop_h = x2 - x1, y2 - y1
                assert any(image.size[::-1] == data.resized(crop_w, crop_h, round(s * part), 1333)
                           for s in range(480, 801, 32))
            else:
                shorts.add(min(image.size))
        assert shorts == {round(s * part) for s in range(480, 801, 32)}
        assert firsts == {round(s * part) for s in (400, 500, 600)}
        assert abs(flips / draws - 0.5) < 0.05 and abs(crops / draws - 0.5) < 0.05
        for side, short in zip(zip(*sides), (w < h, h < w)):                   # the ends of the range are drawn, too
            assert max(side) >= 590 * part and (min(side) == 384 * part or not short and min(side) < 394 * part)
        assert touched == {"left", "bottom"}


def test_data_plain_flip():
    """crop=False: flip only, one scale; flip=False too: nothing random."""
    sizes, flips = set(), 0
    for seed in range(300):
        image, boxes, _ = data.train_transform(96, 160, crop=False, exact=True)(
            _Recorder((60, 40)), np.float32([[10, 0, 30, 20]]), np.array([0]), random.Random(seed))
        sizes.add(image.size)
        flipped = ("flip", None) in image.done
        flips += flipped
        assert np.allclose(boxes * 40 / 96, [[30, 0, 50, 20]] if flipped else [[10, 0, 30, 20]])
    assert sizes == {(144, 96)} and abs(flips / 300 - 0.5) < 0.1
    fixed = {data.train_transform(96, 160, flip=False, crop=False, exact=True)(
        _Recorder((60, 40)), np.zeros((0, 4), np.float32), np.zeros(0), random.Random(s))[0].done for s in range(20)}
    assert len(fixed) == 1


def test_data_fast_resize():
    """Training's resize gives PIL's bytes but for a few, which differ by 1 or 2; sizes and boxes are the same."""
    differ, count, boxes = 0, 0, np.float32([[10, 20, 200, 180]])
    for seed in range(20):
        _, shapes = toy.scene(f"resize {seed}", 300)
        photo = toy.picture(random.Random(seed), shapes, 300).crop((0, 0, 300, 200))
        exact, fast = (functools.partial(data.train_transform((120, 400)[seed % 2], 1333, exact=exact), photo, boxes, np.array([0]))
                       for exact in (True, False))
        exact = exact(random.Random(seed))
        with mock.patch.object(Image.Image, "resize", side_effect=AssertionError("slow")):
            fast = fast(random.Random(seed))
        assert fast[0].size == exact[0].size and np.array_equal(fast[1], exact[1]) and np.array_equal(fast[2], exact[2])
        apart = abs(np.asarray(fast[0], int) - np.asarray(exact[0], int))
        assert apart.max() <= 2
        differ, count = differ + (apart > 0).sum(), count + apart.size
    assert differ < 0.01 * count


def test_data_only_the_list_of_annotations_counts():
    """Other lists, and fields of an annotation, may hold what looks like one."""
    with _coco_folder() as root:
        path = os.path.join(root, "annotations", "instances_train2017.json")
        before = data.CocoFolder(root)
        with open(path, encoding="utf-8") as file:
            coco = json.load(file)
        extra = dict(coco["annotations"][0], id=999, bbox=[0, 0, 5, 5])
        coco = {"rejected": [extra, dict(extra, category_id=None)], **coco}
        coco["annotations"][-1]["parent"] = extra
        with open(path, "w", encoding="utf-8") as file:
            json.dump(coco, file)
        after = data.CocoFolder(root)
        assert before.summary == after.summary and np.array_equal(before.boxes, after.boxes)
        assert np.array_equal(before.labels, after.labels) and np.array_equal(before.offsets, after.offsets)


def test_data_boxes_follow_pixels():
    """Flip, crop and resize move the boxes with what they hold: every coloured block is found where its box is."""
    image = Image.new("RGB", (400, 300), "black")
    boxes = np.float32([[20, 30, 120, 90], [200, 150, 390, 290], [300, 10, 380, 60]])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    for box, colour in zip(boxes.astype(int), colours):
        image.paste(tuple(colour.tolist()), tuple(box.tolist()))
    transform, lost = data.train_transform(160, 10000), 0
    for seed in range(60):
        out, moved, labels = transform(image, boxes, np.arange(3), random.Random(seed))
        pixels = np.asarray(out).astype(int)
        assert (moved >= 0).all() and (moved <= np.tile(out.size, 2) + 1e-3).all()
        assert (moved[:, 2:] > moved[:, :2]).all()
        for label in range(3):
            rows, columns = np.nonzero(pixels[..., label] > 127)
            if label not in labels:
                lost += 1
                assert len(rows) == 0, "a dropped box still shows"
                continue
            if (moved[labels == label][0, 2:] - moved[labels == label][0, :2]).min() < 2:
                continue                                                       # a sliver may cover no pixel's half
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(found - moved[labels == label][0]).max() <= 1.5
    assert lost > 5, "crops that lose a box were not met"


# ---- folders in COCO's layout

def test_data_coco_items():
    """Labels, boxes, ids and sizes of a small folder; the summary; ground truth that pycocotools reads."""
    def edit(coco, folder):
        boxes = [[50, 30, 30, 30], [-5, 5, 10, 10], [5, 5, 0, 9], [5, 5, 9, -1], [70, 5, 9, 9]]     # 2 clipped, 3 empty
        for number, box in enumerate(boxes, 100):
            coco["annotations"].append(dict(id=number, image_id=11, category_id=3, bbox=box))
        coco["annotations"].insert(0, dict(id=200, image_id=12, category_id=7, bbox=[0, 0, 60, 40], iscrowd=1, area=9))
        coco["images"].append(dict(id=99, file_name="none.png", width=60, height=40))
        Image.new("RGB", (60, 40)).save(os.path.join(folder, "none.png"))

    with _coco_folder(edit=edit) as root:
        folder = data.CocoFolder(root)
        assert folder.category_ids == [3, 7] and folder.classes == ["dog", "cat"] and len(folder) == 4
        assert folder.image_ids == [10, 11, 12, 99] and os.path.basename(folder.path(1)) == "1.png"
        assert folder.summary == ("4 images, 5 boxes, 2 classes (3 boxes of no area dropped, 2 boxes clipped to the "
                                  "photo, 1 crowds left out)"), folder.summary
        image, target = folder[1]
        assert image.shape == (3, 40, 60) and image.dtype == torch.uint8
        pixels = box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor([60., 40., 60., 40.])
        assert torch.allclose(pixels, torch.tensor([[10., 10, 30, 20], [50, 30, 60, 40], [0, 5, 5, 15]]), atol=1e-4)
        assert target["labels"].tolist() == [0, 0, 0] and target["labels"].dtype == torch.int64
        assert target["image_id"] == 11 and target["orig_size"].tolist() == target["size"].tolist() == [40, 60]
        assert folder[0][1]["labels"].tolist() == [1]
        empty = folder[3][1]
        assert empty["boxes"].shape == (0, 4) and empty["boxes"].dtype == torch.float32 and len(empty["labels"]) == 0
        folder.transform = data.eval_transform(80, 1333)
        target = folder[1][1]
        assert target["orig_size"].tolist() == [40, 60] and target["size"].tolist() == [80, 120]

        published = data.CocoFolder(root, category_ids=range(91))              # the label is the category id
        assert published[0][1]["labels"].tolist() == [7]
        assert published.classes[7] == "cat" and len(published.classes) == 91
        _refused(lambda: data.CocoFolder(root, category_ids=[7]), "3", "trained")

        truth = folder.ground_truth()
        assert len(truth["annotations"]) == 9 and len(truth["images"]) == 4
        crowd, first, *_ = truth["annotations"]
        assert crowd["iscrowd"] == 1 and crowd["area"] == 9 and first["iscrowd"] == 0 and first["area"] == 200
        beyond = truth["annotations"][4]
        assert beyond["bbox"] == [50, 30, 30, 30] and beyond["area"] == 900    # not clipped; the area added
        from pycocotools.coco import COCO
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = truth
            coco.createIndex()
            coco.loadRes([dict(image_id=10, category_id=7, bbox=[10, 10, 20, 10], score=1.0)])
        assert len(coco.getAnnIds()) == 9
        assert len(pickle.dumps(folder)) < 5000 and pickle.loads(pickle.dumps(folder))[1][1]["image_id"] == 11


def test_data_coco_layout():
    with tempfile.TemporaryDirectory() as root:
        _refused(lambda: data.CocoFolder(root), root, "train2017", "val2017", "annotations", "instances_train2017.json")
        _refused(lambda: data.CocoFolder(os.path.join(root, "coco")), "https://cocodataset.org/#download")
    with _coco_folder() as root:
        _refused(lambda: data.CocoFolder(root, "val2017"), "instances_val2017.json")
        for name in os.listdir(os.path.join(root, "train2017")):
            os.remove(os.path.join(root, "train2017", name))
        os.rmdir(os.path.join(root, "train2017"))
        _refused(lambda: data.CocoFolder(root), os.path.join(root, "train2017") + " is missing")


def test_data_coco_not_coco():
    for text in ("", "{", '{"images": [{"id": 1', "\x00\x01", "[" * 100000):
        _refused_folder(None, "not JSON", text=text)
    _refused_folder(None, "not in COCO's format", "images", text="[1, 2]")
    for key in ("images", "annotations", "categories"):
        _refused_folder(lambda coco, _: coco.pop(key), "not in COCO's format", f"'{key}'")
        _refused_folder(lambda coco, _: coco.update({key: {"a": 1}}), "not in COCO's format", f"'{key}'")
        if key != "annotations":
            _refused_folder(lambda coco, _: coco.update({key: []}), f"'{key}'", "instances_train2017.json")
        for record in (3, None, {}, []):
            _refused_folder(lambda coco, _: coco[key].append(record), "instances_train2017.json")
    with _coco_folder() as root:                                                # a byte order mark is no error
        path = os.path.join(root, "annotations", "instances_train2017.json")
        with open(path, encoding="utf-8") as file:
            text = file.read()
        with open(path, "w", encoding="utf-8-sig") as file:
            file.write(text)
        assert len(data.CocoFolder(root)) == 3


def test_data_coco_bad_records():
    def annotation(**change):
        return lambda coco, _: coco["annotations"][1].update(change)

    _refused_folder(lambda coco, _: coco.update(images=[], annotations=[]), "empty")
    _refused_folder(annotation(category_id=5), "annotation 2", "category_id 5")
    _refused_folder(annotation(image_id=55), "annotation 2", "image_id 55")
    _refused_folder(annotation(category_id=None), "annotation 2", "category_id")
    _refused_folder(annotation(image_id="11"), "annotation 2", "image_id")
    nan, inf = float("nan"), float("inf")
    for box in (None, [], [1, 2, 3], [1, 2, 3, "4"], "1234", {"x": 1}, [1, 2, nan, 4], [1, 2, inf, 4]):
        _refused_folder(annotation(bbox=box), "annotation 2", "bbox")
    _refused_folder(lambda coco, _: coco["annotations"][1].pop("bbox"), "annotation 2", "bbox")
    _refused_folder(lambda coco, _: coco["images"][1].update(id=10), "image id 10", "0.png", "1.png")
    _refused_folder(lambda coco, _: coco["images"][1].update(id=None), "image", "'id'")
    _refused_folder(lambda coco, _: coco["images"][1].update(id=True), "image", "'id'")
    _refused_folder(lambda coco, _: coco["images"][1].pop("file_name"), "image 11", "file_name")
    _refused_folder(lambda coco, _: coco["images"][1].update(width="sixty"), "image 11", "width")
    _refused_folder(lambda coco, _: coco["categories"][1].update(id=7), "categor", "same id")
    _refused_folder(lambda coco, folder: os.remove(os.path.join(folder, "1.png")), "1.png", "image id 11", "missing")
    _refused_folder(lambda coco, _: coco["images"][1].update(file_name="sub/1.png"), "sub/1.png", "missing")


def test_data_coco_repairs():
    """What is harmless is repaired and said: repeated images and annotation ids, missing sizes, areas, subfolders."""
    def edit(coco, folder):
        coco["annotations"][1]["id"] = 1
        del coco["annotations"][2]["area"], coco["annotations"][2]["iscrowd"], coco["images"][1]["width"]
        os.makedirs(os.path.join(folder, "sub"))
        os.rename(os.path.join(folder, "2.png"), os.path.join(folder, "sub", "2.png"))
        coco["images"][2]["file_name"] = "sub/2.png"
        coco["images"].insert(1, dict(coco["images"][0]))

    with _coco_folder(edit=edit) as root:
        folder = data.CocoFolder(root)
        assert folder.summary == ("3 images, 3 boxes, 2 classes (1 repeated images merged, "
                                  "1 repeated annotation ids renumbered)")
        assert [folder[i][1]["image_id"] for i in range(3)] == [10, 11, 12]
        assert [os.path.basename(folder.path(i)) for i in range(3)] == ["0.png", "1.png", "2.png"]
        truth = folder.ground_truth()
        assert sorted(a["id"] for a in truth["annotations"]) == [1, 2, 3] and len(truth["images"]) == 3
        assert truth["annotations"][2]["area"] == 200 and truth["annotations"][2]["iscrowd"] == 0
        assert truth["images"][1]["width"] == 60
    with _coco_folder(edit=lambda coco, _: coco["annotations"][0].update(id=0)) as root:
        assert min(a["id"] for a in data.CocoFolder(root).ground_truth()["annotations"]) > 0, "0 means 'no match' there"


def test_data_coco_rotated_photos():
    """A photo with an EXIF quarter turn is taken as its annotations understand it; any other size is refused."""
    def edit(coco, folder):
        exif = Image.Exif()
        exif[0x0112] = 6
        for i in range(3):                                                     # stored 60x40, shown upright 40x60
            Image.new("RGB", (60, 40)).save(os.path.join(folder, f"{i}.jpg"), exif=exif)
            coco["images"][i]["file_name"] = f"{i}.jpg"
        coco["images"][1].update(width=40, height=60)
        del coco["images"][2]["width"], coco["images"][2]["height"]
        Image.new("RGB", (50, 50)).save(os.path.join(folder, "3.jpg"))
        Image.new("RGB", (40, 60)).save(os.path.join(folder, "4.jpg"))         # turned, but no EXIF says so
        coco["images"] += [dict(id=13, file_name="3.jpg", width=60, height=40),
                           dict(id=14, file_name="4.jpg", width=60, height=40)]

    with _coco_folder(edit=edit) as root:
        folder = data.CocoFolder(root)
        assert [folder[i][1]["orig_size"].tolist() for i in range(3)] == [[40, 60], [60, 40], [60, 40]]
        _refused(lambda: folder[3], "3.jpg", "50x50", "60x40", "image 13")
        _refused(lambda: folder[4], "4.jpg", "40x60")


def test_data_bad_photo_is_returned_then_raised():
    """A broken photo comes back from [i] as a value, and out of the loader as one DataError, also from a worker."""
    def edit(coco, folder):
        with open(os.path.join(folder, "1.png"), "r+b") as file:
            file.truncate(60)

    with _coco_folder(edit=edit) as root:
        folder = data.CocoFolder(root)
        assert isinstance(folder[1], data.DataError) and isinstance(folder[1, 5], data.DataError)
        for workers in (0, 1):
            _refused(lambda: list(data.loader(folder, [[0, 1], [2]], workers)), "1.png")
        assert len(list(data.loader(folder, [[0, 2]], 0))) == 1


def test_data_repeatable():
    """(i, seed) says all: the same with any number of workers, whatever the global generators hold."""
    toys = data.ToyShapes(12, 64, transform=data.train_transform(64, 107))
    first = toys[3, 77]
    random.seed(1), torch.manual_seed(1), np.random.seed(1)
    again = toys[3, 77]
    assert torch.equal(first[0], again[0]) and torch.equal(first[1]["boxes"], again[1]["boxes"])
    assert len({toys[3, seed][0].shape for seed in range(20)}) > 3, "seeds do not matter"
    assert torch.equal(toys[3][0], toys[3, 0][0])
    order = BatchOrder(12, 4, seed=0, epoch=2)
    alone, helped = (list(data.loader(toys, order, workers)) for workers in (0, 2))
    assert len(alone) == len(helped) == 3
    for (a, am, at), (b, bm, bt) in zip(alone, helped):
        assert torch.equal(a, b) and torch.equal(am, bm) and [t["image_id"] for t in at] == [t["image_id"] for t in bt]


# ---- toy shapes

def test_data_toy_boxes_are_tight():
    """Drawn alone, every shape, turned or not, fills its box to the pixel; none is hidden; boxes lie in the picture."""
    toys, classes, sides, counts, shifts = data.ToyShapes(150), set(), [], set(), []
    for i in range(len(toys)):
        image, boxes, labels = toys.read(i)
        shapes = toy.scene(f"toy 0 {i}", 128)[1]
        counts.add(len(shapes))
        assert image.size == (128, 128) and boxes.dtype == np.float32 and (boxes >= 0).all() and (boxes <= 128).all()
        sides += (boxes[:, 2:] - boxes[:, :2]).max(1).tolist()
        seen = np.zeros((128, 128), int)
        areas = []
        for number, ((name, points, _), box, label) in enumerate(zip(shapes, boxes, labels), 1):
            assert toys.classes[label] == name
            classes.add(name)
            mask, corner = toy.shape_mask(name, points)
            canvas = Image.new("L", (128, 128))
            canvas.paste(mask, corner)
            cover = np.asarray(canvas) / 255
            outer = np.flatnonzero(cover.max(0) > 0), np.flatnonzero(cover.max(1) > 0)
            for axis in (0, 1):
                assert outer[axis][0] >= np.floor(box[axis]) and outer[axis][-1] + 1 <= np.ceil(box[axis + 2])
                assert outer[axis][0] <= box[axis] + 1.01 and outer[axis][-1] + 1 >= box[axis + 2] - 1.01
            if name in ("circle", "square"):
                centre = [np.average(np.arange(128) + 0.5, weights=cover.sum(axis)) for axis in (0, 1)]
                shifts.append(centre - (box[:2] + box[2:]) / 2)
            seen[cover >= 0.5] = number
            areas.append((cover >= 0.5).sum())
        for number, area in enumerate(areas, 1):
            assert (seen == number).sum() >= 0.35 * area, f"picture {i}: shape {number} is hidden"
    assert np.abs(shifts).max() < 0.2 and np.abs(np.mean(shifts, 0)).max() < 0.02, "drawn beside the box"
    assert classes == set(toys.classes) and len(toys.classes) == 5 and counts == {1, 2, 3, 4, 5, 6}
    assert 0.12 * 128 - 0.1 <= min(sides) < 18 and 55 < max(sides) <= 64.1


def test_data_toy_deterministic():
    a, b, other = data.ToyShapes(5), data.ToyShapes(50), data.ToyShapes(5, seed=1)
    assert torch.equal(a[2][0], b[2][0]) and not torch.equal(a[2][0], a[3][0]) and not torch.equal(a[2][0], other[2][0])
    assert a[2][1]["image_id"] == a.image_ids[2] and a.category_ids == [1, 2, 3, 4, 5] and "5 images" in a.summary
    truth = a.ground_truth()
    for i, image_id in enumerate(a.image_ids):
        mine = [x for x in truth["annotations"] if x["image_id"] == image_id]
        boxes = box_convert(a[i][1]["boxes"], "cxcywh", "xywh") * 128
        assert torch.allclose(torch.tensor([x["bbox"] for x in mine]), boxes, atol=1e-3)
        assert [a.category_ids[label] for label in a[i][1]["labels"]] == [x["category_id"] for x in mine]
    _refused(lambda: data.ToyShapes(5, category_ids=[1, 2]), "trained")


# ---- batches

def test_data_order():
    order = BatchOrder(10, 3, seed=5, epoch=1)
    batches = list(order)
    assert len(order) == len(batches) == 3 and all(len(batch) == 3 for batch in batches)
    indices = [index for batch in batches for index, _ in batch]
    assert len(set(indices)) == 9 and set(indices) < set(range(10))
    assert len({seed for batch in batches for _, seed in batch}) == 9
    assert batches == list(BatchOrder(10, 3, 5, 1)), "not repeatable"
    for start in range(5):
        rest = BatchOrder(10, 3, 5, 1, start=start)
        assert list(rest) == batches[start:] and len(rest) == len(batches[start:])
    later = [seed for batch in BatchOrder(10, 3, 5, 2) for _, seed in batch]
    assert not set(later) & {seed for batch in batches for _, seed in batch}, "every epoch augments alike"
    assert list(BatchOrder(10, 3, 5, 2)) != batches != list(BatchOrder(10, 3, 6, 1))
    (few,) = BatchOrder(8, 16, 0, 0)
    assert len(few) == 16 and sorted(index for index, _ in few) == sorted(list(range(8)) * 2)
    assert len({seed for _, seed in few}) == 16
    assert {index for batch in BatchOrder(6, 3, 0, 0) for index, _ in batch} == set(range(6))


def test_data_collate():
    samples = [(torch.full((3, h, w), v, dtype=torch.uint8), dict(image_id=v))
               for v, (h, w) in enumerate([(4, 7), (6, 5)], 1)]
    images, mask, targets = data.collate(samples)
    assert images.shape == (2, 3, 6, 7) and mask.shape == (2, 6, 7) and mask.dtype == torch.bool
    assert [t["image_id"] for t in targets] == [1, 2]
    for image, blank, v, (h, w) in zip(images, mask, (1, 2), [(4, 7), (6, 5)]):
        assert torch.equal(image[:, :h, :w], ((v / 255 - data.MEAN) / data.STD).expand(3, h, w)) and not blank[:h, :w].any()
        assert image[:, blank].eq(0).all() and (~blank).sum() == h * w, "padding is not right and bottom"
    error = data.DataError("broken")
    assert data.collate([samples[0], error]) is error


def test_data_order_by_shape_and_by_rarity():
    """Buckets: the same photos, neighbours alike. Repeat factors: by hand; every epoch has as many as they say."""
    shapes = np.random.default_rng(0).permutation(np.arange(43) / 20)
    plain, sorted_ = (list(BatchOrder(43, 4, 0, 1, shapes=shapes, buckets=b)) for b in (0, 5))
    chosen = [[index for index, _ in batch] for batch in sorted_]
    assert sorted(i for b in chosen[:5] for i in b) == sorted(i for batch in plain[:5] for i, _ in batch)
    spread = [np.mean([np.ptp(shapes[[i for i, _ in batch]]) for batch in order]) for order in (plain, sorted_)]
    assert spread[1] < spread[0] / 2 and len(sorted_) == 10 and len({i for b in chosen for i in b}) == 40
    assert sorted_[3:] == list(BatchOrder(43, 4, 0, 1, start=3, shapes=shapes, buckets=5))
    # Ten photos: class 0 in all, class 1 in the last alone, whose factor is sqrt(0.4 / 0.1) = 2.
    few = data.ToyShapes(10)
    few.offsets, few.labels = np.array([*range(10), 11]), np.array([0] * 10 + [1])
    factors = repeat_factors(few, 0.4)
    assert factors.tolist() == [1] * 9 + [2]
    factors[0] = 1.5
    seen = collections.Counter(index for epoch in range(400) for batch in BatchOrder(10, 1, 0, epoch, factors=factors)
                               for index, _ in batch)
    assert sum(seen.values()) == 400 * round(factors.sum()) and set(seen) == set(range(10))
    assert all(abs(seen[i] / 400 / (factors[i] * 12 / 11.5) - 1) < 0.06 for i in range(10)), seen


def test_data_lvis_and_v3det_paths():
    """A path from coco_url, of either half of COCO, and nested names below the split's folder or the root."""
    def edit(coco, folder):
        for nested in (os.path.join(folder, "a", "b"), os.path.join(folder, "..", "images", "n1"),
                       os.path.join(folder, "..", "val2017")):
            os.makedirs(nested)
        os.rename(os.path.join(folder, "1.png"), os.path.join(folder, "..", "val2017", "1.png"))
        os.rename(os.path.join(folder, "2.png"), os.path.join(folder, "a", "b", "2.png"))
        os.rename(os.path.join(folder, "3.png"), os.path.join(folder, "..", "images", "n1", "3.png"))
        for i, name in ((0, "train2017/0.png"), (1, "val2017/1.png")):
            del coco["images"][i]["file_name"]
            coco["images"][i]["coco_url"] = f"http://images.cocodataset.org/{name}"
        coco["images"][2]["file_name"], coco["images"][3]["file_name"] = "a/b/2.png", "images/n1/3.png"

    with _coco_folder(4, edit=edit) as root:
        folder = data.CocoFolder(root)
        assert [folder[i][0][0, 0, 0].item() for i in range(4)] == [0, 40, 80, 120]
        assert folder.ground_truth()["images"][1]["id"] == 11
        os.remove(folder.path(3))
        _refused(lambda: data.CocoFolder(root), "3.png", "missing")


class _Killed(torch.utils.data.Dataset):
    """A data set whose worker dies as the out-of-memory killer makes it die."""

    def __getitem__(self, index):
        os.kill(os.getpid(), 9)


class _Broken(torch.utils.data.Dataset):
    def __getitem__(self, index):
        raise RuntimeError("a bug, not bad data")


def test_data_loader_dead_worker():
    gc.collect()                     # an old iterator, collected in a forked worker, would complain on stderr
    _refused(lambda: list(data.loader(_Killed(), [[0]], workers=1)), "--workers 0", "memory")
    gc.collect()
    batches = data.loader(data.ToyShapes(8, 32), [[i] for i in range(8)], workers=1)
    next(batches)
    handler = signal.getsignal(signal.SIGCHLD)                                 # torch's would strike at any line
    assert "torch" not in str(getattr(handler, "__module__", "")), "a dead worker could stop the training step anywhere"
    batches.close()
    for workers in (0, 1):                                                     # other errors are not dressed up
        try:
            list(data.loader(_Broken(), [[0]], workers))
        except RuntimeError as error:
            assert "a bug, not bad data" in str(error)
        else:
            raise AssertionError("a bug was swallowed")


def test_data_open():
    train, val = data.open_data("toy"), data.open_data("toy", split="val", image_size=64)
    assert len(train) == 2000 and len(val) == 200 and train.size == 128 and val.size == 64
    assert not torch.equal(train[0][0], data.open_data("toy", split="val")[0][0]), "the test pictures were trained on"
    assert len(data.open_data("toy", toy_count=7)) == 7
    before = os.environ.pop("COCO_ROOT", None)
    try:
        with _coco_folder() as root:
            assert len(data.open_data(root)) == len(data.open_data("coco", root, "train2017")) == 3
            _refused(lambda: data.open_data(root, data_root=root), "data_root")
            _refused(lambda: data.open_data("toy", data_root=root), "data_root")
            _refused(lambda: data.open_data(root, split="test"), "test", "val")
            os.environ["COCO_ROOT"] = root
            assert len(data.open_data("coco")) == 3
            os.environ["COCO_ROOT"] = os.path.join(root, "nowhere-coco")
            _refused(lambda: data.open_data("coco"), "https://cocodataset.org/#download", "nowhere-coco")
            _refused(lambda: data.open_data(os.path.join(root, "nowhere")), "nowhere", "toy", "coco", "train2017")
    finally:
        os.environ.pop("COCO_ROOT", None)
        if before is not None:
            os.environ["COCO_ROOT"] = before


# ============================================================================================================== eval.py

FOCAL = SimpleNamespace(class_loss="focal", detections=40, ensemble_nms=0.5, queries="learned")
SOFTMAX = SimpleNamespace(class_loss="ce", detections=100, ensemble_nms=0.8, queries="learned")


def _random_heads(first, B=3, Q=20, C=7, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    boxes = torch.rand(first, B, Q, 4, generator=g, dtype=dtype) * torch.tensor([1, 1, .6, .6], dtype=dtype)
    return dict(logits=torch.randn(first, B, Q, C, generator=g, dtype=dtype), boxes=boxes)


def _slow_box(box, size):
    (cx, cy, w, h), (height, width) = box.tolist(), size.tolist()
    return [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]


def _slow_top(logits, boxes, size, cfg):
    """One image, one evaluation, by loops: list of (score, label, box), best first."""
    rows = []
    for q in range(len(logits)):
        if cfg.class_loss == "ce":
            p = (logits[q].exp() / logits[q].exp().sum())[:-1].tolist()
            rows.append((max(p), p.index(max(p)), _slow_box(boxes[q], size)))
        else:
            rows += [(1 / (1 + np.exp(-logits[q, c].item())), c, _slow_box(boxes[q], size))
                     for c in range(logits.shape[1])]
    rows.sort(key=lambda row: -row[0])
    return rows if cfg.class_loss == "ce" else rows[:cfg.detections]


def _same(found, rows, tolerance=1e-9):
    assert len(found["scores"]) == len(rows)
    assert found["labels"].tolist() == [label for _, label, _ in rows]
    np.testing.assert_allclose(found["scores"].numpy(), [score for score, _, _ in rows], rtol=0, atol=tolerance)
    np.testing.assert_allclose(found["boxes"].numpy(), [box for _, _, box in rows], rtol=0, atol=tolerance * 1000)


class _Oracle(nn.Module):
    """Knows the answers: the photo's upper left pixel value tells which, so that any order and batch will do."""

    def __init__(self, dataset, cfg=FOCAL, empty=False):
        super().__init__()
        self.device_of = nn.Parameter(torch.zeros(1))
        self.cfg, self.calls, self.empty = cfg, 0, empty
        classes = len(dataset.category_ids)
        self.answers = {}
        for i in range(len(dataset)):
            image, target = dataset[i]
            logits = torch.full((8, classes + (cfg.class_loss == "ce")), -20.0)
            boxes = torch.full((8, 4), 0.5)
            n = 0 if empty else len(target["labels"])
            logits[torch.arange(n), target["labels"][:n]] = 10.0
            boxes[:n] = target["boxes"][:n]
            if cfg.class_loss == "ce":
                logits[n:, -1] = 10.0
            self.answers[self.key(data.normalised(image))] = logits, boxes

    @staticmethod
    def key(image):
        return tuple(image[:, :8, :8].flatten().tolist())

    def forward(self, images, mask, targets=None, watch=None):
        assert not self.training and not torch.is_grad_enabled() and targets is None
        assert mask.dtype == torch.bool and mask.shape == images[:, 0].shape
        self.calls += 1
        logits, boxes = zip(*(self.answers[self.key(image)] for image in images))
        logits, boxes = torch.stack(logits)[None], torch.stack(boxes)[None]
        # The first layer is wrong: only the last one may be read.
        return dict(logits=torch.cat([-logits, logits]), boxes=torch.cat([1 - boxes, boxes]))


def _toy(count=6, category_ids=None, size=64):
    return data.open_data("toy", split="val", transform=data.eval_transform(size, size), image_size=size, toy_count=count,
                          category_ids=category_ids)


def _meta(dataset):
    return dict(classes=dataset.classes, category_ids=dataset.category_ids, variant="oracle",
                recipe=dict(image_size=64, max_size=64), config={})


def _command(*arguments, checkpoint=None):
    """Run the command line in-process -> (exit code, what it printed, what it complained about)."""
    out, err, kept = io.StringIO(), io.StringIO(), getattr(weights, "load_checkpoint", None)
    if checkpoint is not None:
        weights.load_checkpoint = lambda path, **overrides: checkpoint
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            evaluation.main([str(a) for a in arguments])
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        if checkpoint is not None:
            weights.load_checkpoint = kept
    return code or 0, out.getvalue(), err.getvalue()


# ------------------------------------------------------------------------------------------------------ postprocess

def test_eval_postprocess_sigmoid_and_softmax():
    sizes = torch.tensor([[480, 640], [100, 50], [333, 500]])
    for cfg in (FOCAL, SOFTMAX):
        outputs = _random_heads(2)
        found = evaluation.postprocess(outputs, sizes, cfg)
        assert len(found) == 3
        for i in range(3):
            assert found[i]["scores"].dtype == found[i]["boxes"].dtype == torch.float64
            _same(found[i], _slow_top(outputs["logits"][-1, i], outputs["boxes"][-1, i], sizes[i], cfg))
    beyond = dict(logits=torch.zeros(1, 1, 1, 2), boxes=torch.tensor([[[[0.0, 0.0, 1.0, 1.0]]]]))
    assert evaluation.postprocess(beyond, sizes[:1], FOCAL)[0]["boxes"][0].tolist() == [-320, -240, 320, 240]
    assert len(evaluation.postprocess(beyond, sizes[:1], FOCAL)[0]["scores"]) == 2       # fewer than cfg.detections


def test_eval_postprocess_ensemble():
    sizes = torch.tensor([[480, 640], [100, 50], [333, 500]])
    for dtype in (torch.float64, torch.float32):
        outputs = _random_heads(3, seed=1, dtype=dtype)
        best = [diffusion.best_pairs(*pair, FOCAL.detections) for pair in zip(outputs["logits"], outputs["boxes"])]
        found = evaluation.postprocess(dict(evaluations=best, logits=None, boxes=None), sizes, FOCAL)
        removed = 0
        for i in range(3):
            rows = sum((_slow_top(outputs["logits"][s, i], outputs["boxes"][s, i], sizes[i], FOCAL) for s in range(3)), [])
            rows.sort(key=lambda row: -row[0])
            kept = []
            for row in rows:
                if all(row[1] != other[1] or box_iou(torch.tensor([row[2]], dtype=torch.float64),
                                                     torch.tensor([other[2]], dtype=torch.float64)) <= 0.5
                       for other in kept):
                    kept.append(row)
            removed += len(rows) - len(kept)
            height, width = sizes[i].tolist()
            rows = [(s, c, np.clip(box, 0, [width, height, width, height]).tolist()) for s, c, box in kept[:40]]
            _same(found[i], rows, 1e-9 if dtype == torch.float64 else 1e-6)
            assert found[i]["boxes"].dtype == found[i]["scores"].dtype == dtype
            single = [{key: value[i:i + 1] for key, value in answer.items()} for answer in best]
            alone = evaluation.postprocess(dict(evaluations=single), sizes[i:i + 1], FOCAL)[0]
            assert all(torch.equal(alone[key], found[i][key]) for key in alone)
        assert removed > 0                                                               # or the test tests nothing
    one = {key: value[-1:] for key, value in outputs.items()}
    plain, sampled = (evaluation.postprocess(o, sizes, FOCAL) for o in (one, dict(evaluations=best[-1:])))
    for a, b in zip(plain, sampled):                     # one evaluation: no NMS
        assert torch.equal(a["scores"], b["scores"]) and torch.equal(a["labels"], b["labels"])


# --------------------------------------------------------------------------------------------------------- evaluate

def test_eval_evaluate_oracle_and_nothing():
    dataset = _toy()
    for cfg in (FOCAL, SOFTMAX):
        model = _Oracle(dataset, cfg).train()
        metrics, detections = evaluation.evaluate(model, dataset, batch_size=4, progress=False)
        assert tuple(metrics) == scores.METRICS and model.training and model.calls == 2
        assert abs(metrics["AP"] - 1) < 1e-6 and abs(metrics["AR100"] - 1) < 1e-6
        assert set(detections[0]) == {"image_id", "category_id", "bbox", "score"} and json.dumps(detections)
    nothing, _ = evaluation.evaluate(_Oracle(dataset, empty=True).eval(), dataset, progress=False)
    assert nothing["AP"] == 0
    empty = scores.coco_metrics(dataset.ground_truth(), [], dataset.image_ids)
    assert empty["AP"] == 0 and empty["AR100"] == 0
    bare = dataset.ground_truth() | dict(annotations=[])
    assert scores.coco_metrics(bare, [], dataset.image_ids)["AP"] == -1


def _doubtful(dataset):
    """A model that is right, or shifted, or has the wrong name."""
    model = _Oracle(dataset)
    g = torch.Generator().manual_seed(0)
    for logits, boxes in model.answers.values():
        logits += 3 * torch.randn(logits.shape, generator=g)
        boxes += 0.03 * torch.randn(boxes.shape, generator=g)
    return model


def test_eval_metrics_are_pycocotools():
    dataset = _toy(12)
    model = _doubtful(dataset)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        metrics, detections = evaluation.evaluate(model, dataset, batch_size=5, progress=False)
    assert printed.getvalue() == "" and 0.05 < metrics["AP"] < 0.95
    with contextlib.redirect_stdout(printed):
        truth = COCO()
        truth.dataset = dataset.ground_truth()
        truth.createIndex()
        scorer = COCOeval(truth, truth.loadRes([dict(d) for d in detections]), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    assert list(metrics.values()) == scorer.stats.tolist()
    with contextlib.redirect_stdout(io.StringIO()) as table:
        again = scores.coco_metrics(dataset.ground_truth(), detections, dataset.image_ids, table=True)
    assert table.getvalue().splitlines() == printed.getvalue().splitlines()[-12:] and again == metrics


def test_eval_scores_are_pycocotools_on_crowds_and_many_detections():
    """Random truth with crowds, up to 250 detections an image of which a class keeps 100, all sizes: digit for digit."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert bench.bench_score(25, 250) is False, printed.getvalue()
    assert "numbers are equal" in printed.getvalue() and "AP 0." in printed.getvalue()


def test_eval_limit_and_unused_labels():
    dataset = _toy(6, category_ids=[0, *range(1, 6), 9])              # slots 0 and 6 have no category
    model = _Oracle(dataset)
    for logits, _ in model.answers.values():
        logits[:, [0, 6]] = 15.0                                     # the best scores, and to be dropped
    metrics, detections = evaluation.evaluate(model, dataset, batch_size=2, limit=3, progress=False)
    assert {d["image_id"] for d in detections} == set(dataset.image_ids[:3]) and model.calls == 2
    assert {d["category_id"] for d in detections} <= set(range(1, 6))
    assert abs(metrics["AP"] - 1) < 1e-6                             # the other three images are not misses
    missed = scores.coco_metrics(dataset.ground_truth(), detections, dataset.image_ids)
    assert missed["AP"] < 1


# --------------------------------------------------------------------------------------------------------- pictures

def test_eval_draw():
    photo = Image.new("RGB", (640, 480), "gray")
    drawn = pictures.draw(photo, [[100, 100, 300, 200], [-50, 300, 9999, 9999]], [0, 1], ["cat", "dog"], [0.9, 0.4])
    assert drawn.size == photo.size and photo.getcolors() == [(640 * 480, (128, 128, 128))]      # the input is untouched
    changed = np.asarray(drawn) != 128
    assert changed[100, 100:300].any(-1).all() and changed[100:200, 300].any(-1).all()
    assert not changed[130:180, 120:280].any() and not changed[:70].any()
    assert tuple(drawn.getpixel((200, 200))) != tuple(drawn.getpixel((200, 300)))                # a colour per class
    assert pictures.draw(Image.new("L", (128, 96)), [], [], []).size == (512, 384)             # small: enlarged


def test_eval_picture_grid():
    dataset = _toy(5)
    model = _Oracle(dataset).train()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "predictions.png")
        evaluation.picture_grid(model, dataset, path, count=3)
        with Image.open(path) as sheet:
            assert sheet.width > 4 * 448 and sheet.height > 2 * 448
    assert model.training and model.calls == 3


def test_eval_plot_curves():
    with tempfile.TemporaryDirectory() as folder:
        log, out = os.path.join(folder, "log.jsonl"), os.path.join(folder, "curves.png")
        training = [json.dumps(dict(step=i, epoch=0, lr=1e-4, loss=9 / i, loss_class=3 / i, loss_bbox=2 / i, loss_giou=1 / i,
                                    loss_class_dn=1 / i)) for i in range(1, 90)]
        tests = [json.dumps(dict(step=50, AP=-1.0, AP50=-1.0)), json.dumps(dict(step=90, AP=0.2, AP50=0.4))]
        for text in ("\n".join(training + tests) + '\n{"step": 91, "lo', training[0], "\n".join(tests), ""):
            with open(log, "w") as file:
                file.write(text)
            pictures.plot_curves(log, out)
            with Image.open(out) as picture:
                assert picture.width > 1000
            os.remove(out)


# ----------------------------------------------------------------------------------------------------- command line

def test_eval_compare_names_a_folder_without_a_run():
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            evaluation.main(["--compare", f"{folder}/gone", "--out", f"{folder}/both.png"])
            raise AssertionError("accepted")
        except SystemExit as stop:
            assert stop.code == 2 and f"--compare {folder}/gone: no log.jsonl" in said.getvalue()


def test_eval_compare_finds_the_crossings():
    """Two runs with known curves: where one passes the other's floor, that the other never does, and a picture."""
    with tempfile.TemporaryDirectory() as folder:
        for name, floor in (("detr", 0.5), ("dn", 0.1)):
            os.makedirs(f"{folder}/{name}")
            Path(folder, name, "run.json").write_text(json.dumps({"config": {"class_loss": "ce" if name == "detr" else "focal"}}))
            with open(f"{folder}/{name}/log.jsonl", "w") as log:
                for step in range(10, 210, 10):
                    log.write(json.dumps(dict(step=step, loss_class=floor + 100 / step ** 2)) + "\n")
                log.write(json.dumps(dict(step=200, AP=0.3)) + "\n" + '{"step": 210, "lo')
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                evaluation.main(["--compare", f"{folder}/detr", f"{folder}/dn", "--out", f"{folder}/both.png"])
            except SystemExit as stop:
                assert stop.code == 0
        lines = out.getvalue().splitlines()                       # 100 / step^2 < 0.4025 from step 16 on: logged at 20
        assert lines[0] == "detr never passes the class loss floor of dn (0.1025); they are not the same loss: ce, focal", lines
        assert "at step 20;" in lines[1], lines
        with Image.open(f"{folder}/both.png") as picture:
            assert picture.width > 1000
        shutil.copytree(f"{folder}/dn", f"{folder}/again/dn")                      # the last name alone would not tell
        same = pictures.compare_runs([f"{folder}/dn", f"{folder}/again/dn"], f"{folder}/same.svg")
        assert same[0] == f"{folder}/dn never passes the class loss floor of {folder}/again/dn (0.1025)", same
        assert _command("--compare", f"{folder}/dn", "--out", f"{folder}/v1.2")[0] == 0
        assert os.path.exists(f"{folder}/v1.2/compare.png")
        for wrong, word in (["--compare", folder], "log.jsonl"), (["--compare", folder, "--weights", "x"], "leave --weights"), \
                (["--compare", folder, "--eta", "1"], "leave --eta"), (["--compare", folder, "--device", "cpu"], "--device"), \
                (["--images", "a", "--weights", "x", "--out", "x.json"], "it is a folder"), \
                (["--data", "toy", "--weights", "x", "--lim", "3"], "unrecognized arguments: --lim"), \
                (["--data", "toy"], "--weights is missing"), (["--images", "a", "--weights", "x", "--score", "50"], "--score 50"):
            with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
                evaluation.main(wrong)
            assert word in said.getvalue() and "Traceback" not in said.getvalue()


def test_eval_predict():
    dataset = _toy(3)
    model, meta = _Oracle(dataset), _meta(dataset)
    with tempfile.TemporaryDirectory() as folder:
        photos, out = os.path.join(folder, "photos"), os.path.join(folder, "out")
        for name in ("a", "b"):
            os.makedirs(os.path.join(photos, name))
            dataset.read(0)[0].save(os.path.join(photos, name, "1.png"))             # the same name in two folders
        with open(os.path.join(photos, "b", "broken.jpg"), "wb") as file:
            file.write(b"not a photo")
        code, said, complained = _command(
            "--weights", os.path.join(folder, "x.pth"), "--images", os.path.join(photos, "a"), os.path.join(photos, "b"),
            "--out", out, "--device", "cpu", checkpoint=(model, meta))
        assert code == 1 and "broken.jpg" in complained and "2 of 3" in said
        with open(os.path.join(out, "predictions.json")) as file:
            first, second, broken = json.load(file)
        assert "broken.jpg" in broken["error"] and "detections" not in broken
        assert first["detections"] == second["detections"] and first["picture"] != second["picture"]
        assert os.path.exists(first["picture"]) and os.path.exists(second["picture"])
        named = [os.path.join(photos, name) for name in ("a/2.png", "b/2.png", "a/2-2.png", "b/2-2-3.png")]
        for path in named:
            dataset.read(0)[0].save(path)
        made = [result["picture"] for result in evaluation.predict(model, meta, named, folder=out)]
        assert len({*made}) == 4 and all(map(os.path.exists, made)), made                  # none is written over another
        _, target = dataset[0]
        best = {d["label"] for d in first["detections"]}
        assert best == {dataset.classes[c] for c in target["labels"]} and len(first["detections"]) == len(target["labels"])
        cx, cy, w, h = (64 * target["boxes"]).T
        expected = sorted(torch.stack([cx - w / 2, cy - h / 2, w, h], 1).tolist())
        np.testing.assert_allclose(sorted(d["bbox"] for d in first["detections"]), expected, atol=1e-3)
        code, _, complained = _command("--weights", "x.pth", "--images", os.path.join(photos, "a"), "--device", "cpu",
                                       "--out", os.path.join(photos, "a"), checkpoint=(model, meta))
        assert code == 2 and "overwrite" in complained


def test_eval_trajectory():
    """From noise to detections: one strip with a panel for each state, one film with every evaluation in it."""
    dataset = _toy(1, size=96)
    built = small("diffu", evaluations=2).eval()
    for head in built.bbox_embed:                                     # untrained heads would leave every box where it is
        nn.init.normal_(head[-1].weight)
    meta = _meta(dataset) | dict(variant="diffu", recipe=dict(image_size=96, max_size=96))
    with tempfile.TemporaryDirectory() as folder:
        dataset.read(0)[0].save(os.path.join(folder, "shapes.png"))
        arguments = "--weights", os.path.join(folder, "x.pth"), "--images", os.path.join(folder, "shapes.png"), "--device", "cpu"
        code, _, complained = _command(*arguments, "--trajectory", "--score", 0, checkpoint=(built, meta))
        assert code == 0, complained
        made = os.path.join(folder, "predictions", "shapes-trajectory")
        with Image.open(made + ".png") as strip, Image.open(made + ".webp") as film:
            assert strip.width > 4 * 360 and strip.height < 2 * 360                    # noise, two evaluations, detections
            assert film.n_frames == 2 * 8 + 1 and film.size == (480, 480)
            panels = [strip.crop((12 + i * 372, 60, 360 + i * 372, 400)).tobytes() for i in range(4)]
        assert len(set(panels)) == 4
        code, _, complained = _command("--weights", "x.pth", "--data", "toy", "--trajectory", "--device", "cpu",
                                       checkpoint=(built, meta))
        assert code == 2 and "--images" in complained


def test_eval_command_scores_data():
    dataset = data.open_data("toy", split="val", transform=data.eval_transform(64, 64), image_size=64)
    meta, model = _meta(dataset), _Oracle(_toy(4))
    with tempfile.TemporaryDirectory() as folder:
        code, said, complained = _command("--weights", os.path.join(folder, "x.pth"), "--data", "toy", "--limit", 4,
                                          "--workers", 0, "--device", "cpu", checkpoint=(model, meta))
        assert code == 0, complained
        assert said.count("Average Precision") == said.count("Average Recall") == 6 and "= 1.000" in said
        assert "on the first 4 of 200 images" in said
        with open(os.path.join(folder, "results-4.json")) as file:
            assert json.load(file)[0].keys() == {"image_id", "category_id", "bbox", "score"}
        other = meta | dict(classes=["cat", *dataset.classes[1:]])
        code, _, complained = _command("--weights", "x.pth", "--data", "toy", "--device", "cpu", checkpoint=(model, other))
        assert code == 2 and "'cat'" in complained and f"'{dataset.classes[0]}'" in complained


def test_eval_command_errors():
    model = SimpleNamespace(cfg=FOCAL, to=lambda device: None)
    checkpoint = model, _meta(_toy(1))
    with tempfile.TemporaryDirectory() as folder:
        for arguments, hint in (
                ((), "--data"), (("--data", "toy", "--images", "a.jpg"), "--images"),
                (("--data", "toy", "--limit", "0"), "--limit"), (("--images", folder), "no photos"),
                (("--data", "toy", "--evaluations", "3"), "diffusion"), (("--images", "a.jpg", "--trajectory"), "diffusion"),
                (("--data", "toy", "--no-renewal"), "--renewal is for diffusion"), (("--data", "toy", "--score", "0.1"), "--images"),
                (("--images", "a.jpg", "--limit", "1"), "--limit belongs to --data"), (("--data", folder + "/no"), "no")):
            code, _, complained = _command("--weights", folder + "/x.pth", "--device", "cpu", *arguments,
                                           checkpoint=checkpoint)
            assert code == 2 and "error: " in complained and hint in complained and "Traceback" not in complained, arguments


def test_eval_sampler_options_reach_the_model():
    """Every option of the sampler, from the command line to the model that is scored."""
    model, checkpoint = own_checkpoint()
    given = dict(evaluations=5, eta=0.5, renewal=False, survivors=0.25, sampler="ddim", ensemble_nms=0.6)
    assert set(given) == set(options.SAMPLING)
    scored = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), \
            mock.patch.object(evaluation, "evaluate", lambda model, *a, **k: scored.append(model.cfg) or ({}, [])), \
            mock.patch.object(evaluation, "same_names", lambda *a: None), mock.patch.object(data, "open_data", lambda *a: [0]):
        weights.save(Path(folder) / "last.pth", checkpoint)
        words = [w for k, v in given.items() for w in ([f"--no-{k}"] if v is False else [f"--{k.replace('_', '-')}", str(v)])]
        with contextlib.suppress(SystemExit):
            evaluation.main(["--weights", f"{folder}/last.pth", "--data", "toy", "--device", "cpu", *words])
        with contextlib.suppress(SystemExit):
            evaluation.main(["--weights", f"{folder}/last.pth", "--data", "toy", "--device", "cpu", "--sampler", "published"])
        code, _, complained = _command("--weights", f"{folder}/last.pth", "--data", "toy", "--evaluations", 1, "--eta", 1)
    assert scored == [model.cfg.but(**given), model.cfg.but(sampler="published")]
    assert code == 2 and "--eta is read only with --evaluations 2 or more" in complained


# ===================================================================================================== train.py

TINY_RUN = ["--image-size", "64", "--max-size", "64", "--queries", "10", "--d-model", "64", "--ffn", "64", "--heads", "4",
        "--encoder-layers", "1", "--decoder-layers", "2", "--batch-size", "4", "--micro-batch", "4", "--workers", "0"]


def coco_folder(folder, photos=6):
    """A small data set of toy shapes in COCO's layout, with category ids 7, 9, ..."""
    shapes = data.ToyShapes(photos, size=64)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir(parents=True)
        truth = copy.deepcopy(shapes.ground_truth())
        for i, image in enumerate(truth["images"]):
            shapes.read(i)[0].save(folder / split / f"{image['id']}.png")
            image["file_name"] = f"{image['id']}.png"
        for thing in truth["categories"]:
            thing["id"] = 7 + 2 * thing["id"]
        for box in truth["annotations"]:
            box["category_id"] = 7 + 2 * box["category_id"]
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(truth))
    return folder


def run_quietly(argv):
    """train.main's exit code and what it said on stderr and stdout."""
    said, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(out):
        try:
            code = train.main(argv)
        except SystemExit as stop:                                                              # argparse's own errors
            code = stop.code
    return code, said.getvalue() + out.getvalue()


def test_train_wrong_commands_are_one_clear_line():
    with tempfile.TemporaryDirectory() as folder:
        for argv, word in [(["--variant", "detrr"], "there are detr"), (["--learning-rate", "1"], "unrecognized"),
                           (["--data", folder + "/none"], "not a folder"), (["--data-root", folder], "--data coco"),
                           (["--overfit", "-1"], "at least 0"), (["--workers", "-1"], "at least 0"),
                           (["--save-steps", "0"], "at least 1"), (["--lr", "-1"], "at least 0"),
                           (["--steps", "-5"], "at least 0"), (["--dropout", "1"], "below 1"), (["--ema", "1"], "below 1"),
                           (["--content", "zero"], "content"), (["--class-loss", "ce"], "focal"),
                           (["--device", "nonsense"], "leave --device away"), (["--num-classes", "3"], "unrecognized"),
                           (["--queries", "5", "--num-queries", "6"], "give one"),
                           (["--steps", "5", "--epochs", "6"], "give one"), (["--overfit", "4", "--crop"], "leave --crop"),
                           (["--resume", folder], "last.pth"), (["--resume", folder, "--weights", "x"], "choose one"),
                           (["--weights", folder + "/x.pth"], "x.pth"), (["--epochs", "0"], "at least 1"),
                           (["--freeze", "backbone, neck", "--out", folder], "--freeze neck: this model has backbone, input_proj"),
                           (["--queries", "sound"], "sound"),
                           (["--backbone-weights", "none", "--backbone-norm", "frozen", "--out", folder], "frozen batch norm")] \
                + ([] if torch.cuda.is_available() else [(["--device", "cuda"], "leave --device away")]):
            code, said = run_quietly(argv)
            assert code == 2 and word in said and "Traceback" not in said, (argv, said)


def test_train_every_variant_has_a_small_and_a_published_size():
    """Every row of the table can be asked for on any data; a row that names no recipe gets one."""
    for name in variants.VARIANTS:
        for data_name in ("toy", "coco", "some/folder"):
            run, cfg, recipe = options.settle({"variant": name, "data": data_name, "backbone_weights": "none"})
            assert cfg.backbone_norm == "batch" and run["preset"] == ("published" if data_name == "coco" else "small")
            assert recipe == variants.recipe(name).but(backbone_weights="none") or data_name != "coco"
    with mock.patch.dict(variants.VARIANTS, {"diffu_dn": variants.dn.but(queries="noise")}):
        assert options.settle({"variant": "diffu_dn"})[1].queries == "noise"
    assert options.settle({"variant": "diffu"})[1].dn_queries == 100                 # nothing reads it: it is not changed
    assert options.settle({"variant": "diffu", "denoising": "cdn"})[1].dn_queries == variants.SMALL["dn_queries"]
    assert [variants.recipe(name).epochs for name in ("align", "diffu_align", "diffu_align_published", "diffu")] == [24] * 3 + [50]
    for given, backbone in (({"variant": "deformable_single", "dilation": True}, "resnet50"), ({"variant": "detr_dc5"}, "resnet50"),
                            ({"variant": "detr_dc5", "dilation": False}, "resnet18")):
        assert options.settle(given)[1].backbone == backbone
    assert options.settle({"overfit": 8})[2].steps == variants.OVERFIT_RECIPE["steps"]
    assert options.settle({"overfit": 8, "epochs": 3})[2].steps == 0
    assert not options.settle({"overfit": 8, "data": "coco", "backbone_weights": "none"})[2].crop
    # A larger photo is not held back by the other default; a number that is given stands.
    assert options.settle({"image_size": 256})[2].max_size == 256
    assert options.settle({"data": "coco", "image_size": 400})[2].max_size == 666
    assert options.settle({"data": "coco", "image_size": 400, "max_size": 500})[2].max_size == 500


def test_train_whole_path_on_a_folder_with_its_own_classes():
    """Photos and boxes in; checkpoints, log, curves and pictures out; class names and ids travel with the weights."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        where = str(coco_folder(Path(folder) / "boxes"))
        code, said = run_quietly(["--variant", "dino", "--data", where, "--backbone-weights", "none", "--steps", "3",
                                  "--eval-every", "1", "--out", str(out), *TINY_RUN])
        assert code == 0, said
        assert {"last.pth", "best.pth", "log.jsonl", "curves.png", "predictions.png", "run.json"} \
            <= {p.name for p in out.iterdir()}
        lines = [json.loads(line) for line in open(out / "log.jsonl")]
        assert any("loss" in line for line in lines) and any("AP" in line for line in lines)
        built, meta = weights.load_checkpoint(out / "best.pth")
        assert meta["category_ids"] == [7 + 2 * i for i in data.ToyShapes(1).category_ids]
        assert meta["classes"] == data.ToyShapes(1).classes and not built.training
        code, said = run_quietly(["--data", where, "--out", str(out), "--backbone-weights", "none", *TINY_RUN])
        assert code == 2 and "already holds a run" in said


@contextlib.contextmanager
def signal_in_pass(number, which):
    """This process gets a signal as train.py's n-th forward pass begins; gives the list that counts them."""
    original, calls = train.forward_backward, []

    def counted(*args):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), which)
        return original(*args)

    with mock.patch.object(train, "forward_backward", counted):
        yield calls


def test_train_resume_continues_as_if_never_stopped():
    """Stop by SIGTERM in the middle of an epoch, cut the last checkpoint short, resume from the one before: the last
    weights equal the uninterrupted run's, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        common = ["--variant", "diffu_dino", "--data", str(coco_folder(Path(folder) / "boxes", photos=9)), "--steps", "5",
                  "--backbone-weights", "none", "--dropout", "0.1", "--ema", "0.9", *TINY_RUN]
        whole, cut = str(Path(folder) / "whole"), str(Path(folder) / "cut")
        assert run_quietly(common + ["--out", whole])[0] == 0
        with signal_in_pass(3, signal.SIGTERM) as calls:
            code, said = run_quietly(common + ["--save-steps", "1", "--keep-every", "2", "--out", cut])
        assert code == 0 and len(calls) == 3 and f"--resume {cut}" in said
        assert run_quietly(["--resume", cut, "--variant", "detr"])[0] == 2
        os.truncate(cut + "/last.pth", 10000)
        whole_ones = []

        def look(*args, **kwargs):
            """There is a whole checkpoint to fall back to, before and after each save."""
            whole_ones.append(weights.read_checkpoint(cut + "/last.prev.pth")["step"])
            saved(*args, **kwargs)
            whole_ones.append(weights.read_checkpoint(cut + "/last.prev.pth")["step"])

        saved = weights.save
        with mock.patch.object(weights, "save", look):
            code, said = run_quietly(["--resume", cut])
        assert code == 0 and "cut/last.pth: " in said and "last.prev.pth, step 2" in said, said
        assert whole_ones[:2] == [2, 2] and whole_ones[-1] > 2, whole_ones
        steps = [weights.read_checkpoint(p)["step"] for p in sorted(Path(cut).glob("step-*.pth"))]
        assert steps == [2, 4] and run_quietly(["--resume", cut + "/step-4.pth", "--amp", "bf16"])[0] == 2
        a, b = (weights.read_checkpoint(Path(p) / "last.pth") for p in (whole, cut))
        assert a["step"] == b["step"] == 5
        for part in ("model", "ema"):
            assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part


def test_train_ctrl_c_saves_the_step_it_was_in():
    """The first Ctrl-C ends the step, saves, and says how to go on."""
    with tempfile.TemporaryDirectory() as out:
        with signal_in_pass(2, signal.SIGINT) as calls:
            code, said = run_quietly(["--data", "toy", "--steps", "5", "--out", out, *TINY_RUN])
        assert code == 0 and len(calls) == 2 and f"--resume {out}" in said
        assert weights.read_checkpoint(out + "/last.pth")["step"] == 2


def test_train_fine_tunes_and_keeps_a_head_that_fits():
    """Other classes get a new head and label embedding, everything else is kept; the same classes keep all of it."""
    with tempfile.TemporaryDirectory() as folder:
        first, where = folder + "/first", str(coco_folder(Path(folder) / "boxes"))
        assert run_quietly(["--variant", "dino", "--steps", "1", "--out", first, *TINY_RUN])[0] == 0
        start = ["--weights", first + "/last.pth", "--steps", "1", "--batch-size", "4", "--workers", "0"]
        code, said = run_quietly([*start, "--data", where, "--freeze", "backbone,encoder", "--image-size", "64",
                                  "--out", folder + "/other"])
        assert code == 0 and "new, for 5 classes" in said and "class_embed" in said and "label_enc" in said, said
        assert "crop=True" in said                                            # as photos need, unlike the toy's pictures
        a, b = (weights.read_checkpoint(f"{folder}/{run}/last.pth") for run in ("first", "other"))
        assert b["category_ids"] != a["category_ids"] and b["variant"] == "dino"
        for name in ("backbone.layer4.0.conv1.weight", "encoder.0.linear1.weight", "backbone.bn1.running_mean"):
            assert torch.equal(a["ema"][name], b["model"][name]), name                                       # frozen
        assert not torch.equal(a["ema"]["decoder.0.linear1.weight"], b["model"]["decoder.0.linear1.weight"])
        code, said = run_quietly([*start, "--data", "toy", "--out", folder + "/same"])
        assert code == 0 and "none new" in said
        code, said = run_quietly([*start, "--variant", "detr"])
        assert code == 2 and "leave it away" in said
        assert options.settle({"weights": first + "/last.pth", "data": where})[2].image_size == 320
        # A checkpoint of photos keeps their size, and after --overfit they are cropped again.
        for split in ("train2017", "val2017"):
            names = Path(where, "annotations", f"instances_{split}.json")
            names.write_text(names.read_text().replace('"circle"', '"ball"'))
        assert run_quietly(["--variant", "detr", "--data", where, "--backbone-weights", "none", "--overfit", "2", *TINY_RUN,
                            "--steps", "1", "--out", folder + "/few"])[0] == 0
        recipe = options.settle({"weights": folder + "/few/last.pth", "data": where})[2]
        assert (recipe.image_size, recipe.crop) == (64, True)


def test_train_a_loss_that_is_not_finite_names_the_images():
    """Whether the matching costs or only the loss stop being numbers, the batch's image ids are named."""
    with tempfile.TemporaryDirectory() as folder:
        where = str(coco_folder(Path(folder) / "boxes"))
        common = ["--data", where, "--backbone-weights", "none", "--steps", "9", "--warmup", "0", *TINY_RUN]
        code, said = run_quietly([*common, "--lr", "1e12", "--out", folder + "/diverged"])
        assert code == 2 and "image ids [" in said and "not finite" in said and "Traceback" not in said, said
        original = train.forward_backward
        with mock.patch.object(train, "forward_backward", lambda *a: original(*a) | {"total": float("nan")}):
            code, said = run_quietly([*common, "--out", folder + "/nan"])
        assert code == 2 and "image ids [" in said and "step 0" in said and "last.pth" not in said
        # A lower rate may be given when the run is resumed; what the run is may not change.
        code, said = run_quietly([*common, "--variant", "detr", "--save-steps", "2", "--out", folder + "/good"])
        assert code == 0, said
        assert run_quietly(["--resume", folder + "/good", "--lr", "1e-5", "--steps", "10", "--micro-batch", "0"])[0] == 2
        assert run_quietly(["--resume", folder + "/good", "--lr", "1e-5", "--steps", "10"])[0] == 0
        assert run_quietly(["--resume", folder + "/good", "--ffn", "7"])[0] == 2


def test_train_a_run_that_dies_in_its_evaluation_catches_up():
    with tempfile.TemporaryDirectory() as folder:
        out = folder + "/run"
        with mock.patch.object(evaluation, "evaluate", side_effect=MemoryError):
            with contextlib.suppress(MemoryError):
                run_quietly(["--steps", "2", "--out", out, *TINY_RUN])
        assert not os.path.exists(out + "/best.pth")
        code, said = run_quietly(["--resume", out])
        assert code == 0 and os.path.exists(out + "/best.pth") and os.path.exists(out + "/predictions.png"), said
        steps = [json.loads(line)["step"] for line in open(out + "/log.jsonl")]
        assert steps == [2, 2]                                                     # its one training line, its one test


def test_train_overfits_the_first_photos_alone():
    """--overfit N learns the first N photos of the training split and is scored on them: no other one is ever opened."""
    with tempfile.TemporaryDirectory() as folder:
        where = coco_folder(Path(folder) / "boxes", photos=4)
        for image in json.loads((where / "annotations" / "instances_train2017.json").read_text())["images"][2:]:
            (where / "train2017" / image["file_name"]).write_bytes(b"not a photo")
        start = ["--variant", "detr", "--data", str(where), "--backbone-weights", "none", *TINY_RUN, "--batch-size", "2",
                 "--steps", "3", "--overfit"]
        code, said = run_quietly([*start, "2", "--out", folder + "/run"])
        assert code == 0 and any("AP50" in line for line in open(folder + "/run/log.jsonl")), said
        code, said = run_quietly([*start, "3", "--out", folder + "/other"])
        assert code == 2 and ".png" in said and "--resume" in said, said                          # the third is broken


def test_train_disk_photos_and_workers_that_fail():
    """Each ends a run with one sentence; the steps until then are saved, and the run goes on when it is mended."""
    with tempfile.TemporaryDirectory() as folder:
        where, out = coco_folder(Path(folder) / "boxes"), folder + "/run"
        start = ["--variant", "detr", "--data", str(where), "--backbone-weights", "none", *TINY_RUN, "--batch-size", "2",
                 "--save-steps", "2"]
        with mock.patch("os.access", return_value=False):
            code, said = run_quietly([*start, "--out", out])
        assert code == 2 and "read-only" in said and "--out" in said and not os.path.exists(out)
        assert "not a folder" in run_quietly([*start, "--out", str(where / "val2017" / "1.png" / "run")])[1]

        original, calls = train.forward_backward, []

        def go_on(at, trouble, *arguments):
            """Run train.py; before the gradients of the at-th step something happens. Returns its code and words."""
            def step(*args):
                calls.append(1)
                if len(calls) == at:
                    trouble()
                return original(*args)
            with mock.patch.object(train, "forward_backward", step):
                return run_quietly(list(arguments))

        photo = where / "train2017" / "3.png"
        whole = photo.read_bytes()
        code, said = go_on(4, lambda: photo.write_bytes(whole[:50]), *start, "--steps", "8", "--out", out)
        assert code == 2 and "3.png" in said and f"--resume {out}" in said and "Traceback" not in said, said
        stopped = weights.read_checkpoint(out + "/last.pth")["step"]
        assert stopped == len(calls) >= 4                                           # in its second epoch, and kept
        photo.write_bytes(whole)
        with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
            code, said = run_quietly(["--resume", out])
        assert code == 2 and "No space left" in said and "is kept" in said and "Traceback" not in said
        assert weights.read_checkpoint(out + "/last.pth")["step"] == stopped and not list(Path(out).glob("*.tmp"))

        read = data.read_photo

        def die(*args):
            return os.kill(os.getpid(), 9) if torch.utils.data.get_worker_info() else read(*args)

        with mock.patch.object(data, "read_photo", die):
            code, said = run_quietly(["--resume", out, "--workers", "1"])
        assert code == 2 and "worker process" in said and "--workers 0" in said and f"--resume {out}" in said, said
        assert run_quietly(["--resume", out, "--workers", "0"])[0] == 0
        assert weights.read_checkpoint(out + "/last.pth")["step"] == 8


def test_train_fits_in_less():
    """Activations computed again give the same gradients in every variant; fp16's loss scale travels with the run."""
    for name in TRAINED:
        images, mask, targets = batch(size=64)
        built, results = small(name, dropout=0.1), []
        for again in (False, True):
            if again:
                train.compute_again(built)
            torch.manual_seed(1)
            built.zero_grad()
            matcher.Criterion(built.cfg)(built(images, mask, targets), targets)["total"].backward()
            results.append([p.grad.clone() for p in built.parameters() if p.requires_grad])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*results)), name
    with tempfile.TemporaryDirectory() as folder:
        out = folder + "/half"
        start = ["--variant", "dino", "--overfit", "2", "--out", out, *TINY_RUN, "--batch-size", "2", "--amp", "fp16",
                 "--checkpoint-activations"]
        with mock.patch.object(evaluation, "evaluate", return_value=({"AP": 0.0, "AP50": 0.0}, [])):   # slow on a CPU
            assert run_quietly([*start, "--steps", "1", "--warmup", "0"])[0] == 0
            first = weights.read_checkpoint(out + "/last.pth")
            assert first["scaler"]["scale"] > 1
            assert run_quietly(["--resume", out, "--steps", "2"])[0] == 0
        second = weights.read_checkpoint(out + "/last.pth")
        assert second["scaler"]["_growth_tracker"] + (second["scaler"]["scale"] < first["scaler"]["scale"]) > 0
        assert all(torch.isfinite(v).all() for v in second["model"].values())


def test_train_other_names_in_validation_are_refused():
    with tempfile.TemporaryDirectory() as folder:
        where = coco_folder(Path(folder) / "boxes")
        file = where / "annotations" / "instances_val2017.json"
        truth = json.loads(file.read_text())
        truth["categories"][0]["name"] = "zebra"
        file.write_text(json.dumps(truth))
        code, said = run_quietly(["--data", str(where), "--backbone-weights", "none", "--out", folder + "/o", *TINY_RUN])
        assert code == 2 and "zebra" in said


def test_train_rate_groups_and_schedule():
    recipe = variants.RECIPES["deformable"]
    built = build_model("deformable", backbone="resnet18", encoder_layers=1, decoder_layers=1)
    groups = train.parameter_groups(built, recipe)
    assert sorted({g["lr"] for g in groups}) == [2e-5, 2e-4]
    size = {id(p): g["lr"] for g in groups for p in g["params"]}
    for name, p in built.named_parameters():
        slow = name.startswith("backbone") or "sampling_offsets" in name or "reference_points" in name
        assert not p.requires_grad or size[id(p)] == (2e-5 if slow else 2e-4), name
    assert [train.rate_factor(s, 50, recipe) for s in (0, 39, 40, 49)] == [1, 1, 0.1, 0.1]
    assert train.rate_factor(10, 12, variants.RECIPES["dino"]) == 1 and \
        train.rate_factor(11, 12, variants.RECIPES["dino"]) == 0.1
    assert train.rate_factor(4, 500, recipe.but(warmup=10)) == 0.5 and train.rate_factor(4, 50, recipe.but(warmup=10)) == 1


def test_train_learns():
    """A few dozen steps on four pictures must lower the loss by a good part, for each of the five."""
    for name in ("detr", "deformable", "dn", "dino", "diffu"):
        built = small(name)
        dataset = data.ToyShapes(4, size=64)
        images, mask, targets = data.collate([dataset[i] for i in range(4)])
        criterion = matcher.Criterion(built.cfg)
        optimizer = torch.optim.AdamW(built.parameters(), 5e-4)
        history = []
        for _ in range(40):
            loss = criterion(built(images, mask, targets), targets)["total"]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(built.parameters(), 0.1)
            optimizer.step()
            history.append(loss.item())
        assert sum(history[-5:]) < 0.75 * sum(history[:5]), (name, history[:5], history[-5:])

# ==================================================================================================== distributed.py

def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def noise_by_image(targets, cfg, generator=None, original=diffusion.noised_references):
    """DiffuDETR's noise from the image's own boxes, so that it does not depend on which process draws it."""
    drawn = [original([t], cfg, torch.Generator().manual_seed(int(1e9 * t["boxes"].sum()))) for t in targets]
    return tuple(torch.cat(parts) for parts in zip(*drawn))


def gradients_of(name, counts, mine, parallel):
    """Losses and gradients of one variant on four images with so many boxes, of which this process has `mine`."""
    size = dict(dilation=True, backbone="resnet50") if name == "detr_dc5" else {}
    built = small(name, backbone_norm="frozen", label_noise=0.0, box_noise=0.0, d_model=64, ffn=64, **size).double()
    images, mask, targets = batch(counts, size=64)
    targets = [t | {"boxes": t["boxes"].double()} for t in targets]
    chunks = [(images[i].double(), mask[i], [targets[k] for k in i]) for i in mine]
    model = torch.nn.parallel.DistributedDataParallel(built) if parallel else built
    with mock.patch.object(diffusion, "noised_references", noise_by_image):
        losses = train.forward_backward(model, matcher.Criterion(built.cfg), chunks, torch.device("cpu"),
                                        contextlib.nullcontext, torch.amp.GradScaler("cpu", enabled=False), lambda name: 0)
    absent = [n for n, p in built.named_parameters() if p.requires_grad and p.grad is None]
    assert not absent, (name, counts, absent)
    return distributed.sums(losses), {n: p.grad for n, p in built.named_parameters() if p.requires_grad}


def one_of_two(rank, port):
    """A process of two: every variant on half of the images; process 0 compares with all of them on its own."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for name, counts in PARALLEL_CASES:
        mine = [[2 * rank, 2 * rank + 1]] if sum(counts) else [[2 * rank], [2 * rank + 1]]      # or two micro-batches
        losses, gradients = gradients_of(name, counts, mine, parallel=True)
        if rank:
            continue
        with mock.patch.object(distributed, "world", lambda: 1):
            one_losses, one_gradients = gradients_of(name, counts, [[0, 1, 2, 3]], parallel=False)
        for key, value in one_losses.items():
            assert abs(losses[key] - value) <= 1e-9 * max(1, abs(value)), (name, counts, key)
        size = max(g.abs().max() for g in one_gradients.values())
        for key, value in one_gradients.items():
            assert (gradients[key] - value).abs().max() <= 1e-9 * size, (name, counts, key)
    assert distributed.everyone([rank, 5]) == [0, 5, 1, 5] and distributed.broadcast(rank) == 0
    assert distributed.gather("ab"[rank]) == (None if rank else ["a", "b"])
    assert "write --device cuda" in error_of(distributed.own_device, "cuda:1", kind=variants.ConfigError)
    _, cfg, recipe = options.settle({"variant": "detr"})
    run = dict(data="toy", data_root=None, overfit=0, workers=0, save_steps=1, keep_every=0, device="cpu")
    assert "choose a multiple" in error_of(options.check, run, recipe.but(batch_size=5), kind=variants.ConfigError)
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(8, 3, generator=torch.Generator().manual_seed(rank)))
    mine, first = norm.running_mean.tolist(), distributed.everyone(norm.running_mean.tolist())[:3]
    distributed.share_buffers(norm)
    assert norm.running_mean.tolist() == first and (mine == first) == (rank == 0)
    shared, _ = evaluation.evaluate(_doubtful(_toy(7)), _toy(7), batch_size=2, progress=False)
    distributed.stop()
    assert shared == evaluation.evaluate(_doubtful(_toy(7)), _toy(7), progress=False)[0]


# DINO's number of groups and its padding follow the fullest image of a process, which is the same one in both here.
PARALLEL_CASES = [(name, (3, 1, 2, 3)) for name in variants.VARIANTS] + [
    (name, counts) for name in ("detr", "diffu") for counts in ((0, 0, 2, 1), (0, 0, 0, 0))]
PARALLEL_CASES += [("dino", (0, 0, 0, 0)), ("dn", (0, 0, 0, 0))]


def test_distributed_two_processes_equal_one():
    """Losses and gradients of every variant; a process without boxes; no boxes at all; every parameter takes part."""
    torch.multiprocessing.spawn(one_of_two, (free_port(),), nprocs=2)


def torchrun(processes, *arguments):
    """What `torchrun train.py` says, and its exit code."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
                           "--master_port", str(free_port()), "train.py", *arguments], cwd=HERE, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_distributed_torchrun_trains_scores_and_resumes():
    """Two processes write one run, which one process can continue; an image without boxes stops nobody."""
    with tempfile.TemporaryDirectory() as folder:
        where = coco_folder(Path(folder) / "boxes", photos=5)
        file = where / "annotations" / "instances_train2017.json"
        truth = json.loads(file.read_text())
        truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] > 2]
        file.write_text(json.dumps(truth))
        out = folder + "/run"
        code, said = torchrun(2, "--variant", "diffu_dino", "--data", str(where), "--backbone-weights", "none", "--steps",
                              "2", "--out", out, *TINY_RUN, "--micro-batch", "1", "--dropout", "0.1")
        assert code == 0 and said.count("done at step 2") == 1 and said.count("parameters,") == 1, said
        assert run_quietly(["--resume", out, "--steps", "3"])[0] == 0                      # with one process
        tests = [line for line in map(json.loads, open(out + "/log.jsonl")) if "AP" in line]
        assert [line["step"] for line in tests] == [2, 3]
        assert weights.read_checkpoint(out + "/last.pth")["step"] == 3


def test_distributed_orphans_keep_their_folder():
    """Processes that outlive their torchrun go on writing: nobody else may, until they end."""
    with tempfile.TemporaryDirectory() as folder:
        program = "import sys, weights; kept = weights.claim(sys.argv[1]); print('claimed', flush=True); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", program, folder], cwd=HERE, text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as orphan:
            assert orphan.stdout.readline() == "claimed\n"
            code, said = run_quietly(["--variant", "dino", "--out", folder, *TINY_RUN])
            assert code == 2 and "another process is writing this run" in said, said
            orphan.kill()
        weights.claim(folder).close()


def test_distributed_photo_that_fails_in_the_second_process():
    """Its error names the photo and the process, both processes end, and the steps until then can be resumed."""
    with tempfile.TemporaryDirectory() as folder:
        where = coco_folder(Path(folder) / "boxes", photos=4)
        index, _ = list(BatchOrder(4, 2, 0, 0))[1][1]                              # the second step's second photo
        os.truncate(where / "train2017" / f"{index + 1}.png", 100)
        code, said = torchrun(2, "--variant", "deformable", "--data", str(where), "--backbone-weights", "none", "--steps", "4",
                              "--out", folder + "/run", *TINY_RUN, "--batch-size", "2", "--micro-batch", "1")
        assert code and "error (process 1)" in said and f"{index + 1}.png" in said and "another process" in said, said
        assert said.count("Traceback (most recent call last)") == 1, said                            # torchrun's own
        assert weights.read_checkpoint(folder + "/run/last.pth")["step"] == 1


# ==================================================================================================== ablate.py

def test_ablate_resumes_and_never_repeats():
    """A choice trains once, its samplings share the weights, and every score is kept."""
    seen, base = [], {"data": "toy", "amp": "none"}

    def scored(model, dataset, **kwargs):
        seen.append(model.cfg)
        return {"AP": 0.25, "AP50": 0.5}, []

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), \
            mock.patch.object(evaluation, "evaluate", scored), mock.patch.object(evaluation, "picture_grid"), \
            mock.patch.object(train, "train", wraps=train.train) as trained:
        out = Path(folder)
        for _ in range(2):
            assert ablate.score_of(out, {"noise": "beta"}, {}, 16, 3, base) == 0.25
            assert ablate.score_of(out, {"noise": "beta"}, {"evaluations": 5}, 16, 3, base) == 0.25
        assert trained.call_count == 1 and (out / "toy-16-none" / "noise=beta-seed=3" / "last.pth").exists()
        assert [(c.noise, c.evaluations) for c in seen] == [("beta", 3)] * 2 + [("beta", 5)]     # the first: in training
        # Stopped early, it says so. On other data it is the small model too; folders of the same name are kept apart.
        stopped = []
        with mock.patch.object(train, "train", lambda *given: stopped.append(given)), \
                mock.patch.object(weights, "read_checkpoint", lambda path: {"step": 0}):
            for where in ("coco", folder + "/a/boxes", folder + "/b/boxes"):
                given = base | {"data": where, "backbone_weights": "none"}
                assert "goes on" in error_of(ablate.score_of, out, {}, {}, 16, 3, given, kind=SystemExit)
        assert {(run["preset"], cfg.backbone, recipe.backbone_weights) for run, cfg, recipe, _ in stopped} \
            == {("small", "resnet18", "none")} and len({run["out"] for run, *_ in stopped}) == 3


# ==================================================================================================== the runner

def run_all(word):
    """Run the tests whose name holds `word`; returns the exit code. The last line counts them."""
    tests = {name: f for name, f in globals().items() if name.startswith("test_") and word in name}
    counts = collections.Counter(passed=0, failed=0, skipped=0)
    for name, test in tests.items():
        started = time.time()
        try:
            test()
            result = "passed"
        except unittest.SkipTest as why:
            result = "skipped"
            name += f" ({why})"
        except Exception:
            result = "failed"
            traceback.print_exc()
        counts[result] += 1
        print(f"{result:8} {time.time() - started:6.1f} s  {name}", flush=True)
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    print(f"{counts['passed']} passed, {counts['failed']} failed{skipped}")
    return 1 if counts["failed"] or not tests else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run minDETR's tests.")
    parser.add_argument("-k", default="", metavar="WORD", help="only tests whose name contains WORD")
    sys.exit(run_all(parser.parse_args().k))
