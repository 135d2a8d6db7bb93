"""Deformable attention by every way to compute it, CUDA's kernel among them: see emulate.py."""
import functools
import itertools
import os
import re
import tempfile
import unittest
import warnings
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn

import msda
from msda_cuda import cpu, cuda
from tests import emulate
from tests.fixtures import error_of

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def inputs(B=2, Q=6, M=3, D=4, P=2, shapes=((5, 7), (3, 4), (1, 2)), R=2, dtype=F64):
    """Arguments of msda.msda; a third of the points lies outside, some of them far."""
    g, L = torch.Generator().manual_seed(0), len(shapes)
    normal = functools.partial(torch.randn, generator=g, dtype=F64)
    value, logits = normal(B, sum(h * w for h, w in shapes), M, D), normal(B, Q, M, L, P)
    offsets = normal(B, Q, M, L, P, 2) * (2 if R == 2 else 2 * P)
    offsets.flatten()[::17] *= 1e3
    reference = torch.rand(B, Q, L, R, generator=g, dtype=F64).to(torch.promote_types(dtype, F32))
    return value.to(dtype), shapes, offsets.clamp(-3e4, 3e4).to(dtype), logits.to(dtype), reference


def flat(value, shapes, *rest):  # as the operator takes them
    return value, *rest, tuple(n for shape in shapes for n in shape)


def definition(value, shapes, *rest):
    return msda.msda_grid_sample(value, shapes, *msda.sampling(shapes, *rest))


def on_gpu(name):
    """cuda.py's forward or backward, from tensors on the CPU to such."""
    def call(*args):
        out = getattr(cuda, name)(*(a.cuda() if torch.is_tensor(a) else a for a in args))
        return out.cpu() if torch.is_tensor(out) else [t.cpu() for t in out]
    return call


def ways():
    """cpu.py, cuda.py on a GPU if there is one, and then, within an emulated GPU, cuda.py."""
    if msda.computer("fastest", *flat(*inputs())) is None:
        raise unittest.SkipTest("needs a C++ compiler")
    yield cpu
    if torch.cuda.is_available():
        yield SimpleNamespace(forward=on_gpu("forward"), backward=on_gpu("backward"))
    with emulate.gpu():
        yield cuda


def test_msda_ways_agree_on_any_shape():
    """Output and gradients against autograd in float64: no query; an odd head; the published size;
    many points, few channels; more channels than a warp holds at once."""
    tiny = (3, 5), (2, 2)
    for (B, Q, M, D, P, shapes, R), dtype in itertools.product([
            (2, 0, 8, 16, 4, tiny, 4), (3, 11, 5, 7, 3, [(1, 9), (8, 1)], 4),
            (2, 20, 8, 32, 4, [(5, 7), (3, 4), (1, 2), (1, 1)], 2), (1, 70, 1, 4, 40, tiny, 4),
            (2, 118, 2, 8, 2, [(9, 11), (8, 1), (1, 11)], 2),  # queries are tokens
            (1, 5, 2, 264, 3, tiny, 2)], (F64, F32, F16, BF16)):
        args = flat(*inputs(B, Q, M, D, P, shapes, R, dtype))
        wide = [t.double().requires_grad_() for t in args[:4]]
        want = definition(wide[0], shapes, *wide[1:])
        grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        want = [want.detach(), *torch.autograd.grad(want, wide, grad.double())]
        limit = {F64: 1e-13, F32: 2e-6, F16: 1e-3, BF16: 8e-3}[dtype]
        for way in ways():
            # The emulated kernel is compiled for each shape and dtype, for a second or two.
            if way is cuda and not (dtype == F32 or D == 7 or D == 32 and dtype.itemsize == 2):
                continue
            got = [way.forward(*args), *way.backward(grad, *args, True)]
            for a, b, like in zip(got, want, [grad, *args]):
                assert a.dtype == like.dtype and a.shape == like.shape and a.isfinite().all()
                error = (a.double() - b).norm() / b.norm().clamp(min=1e-12)
                assert error < limit, (way, B, Q, M, D, P, shapes, R, dtype, error)
            assert len(got) == 5 and len(way.backward(grad, *args, False)) == 3


def test_msda_equals_its_definition_at_borders_and_nan():
    """On borders and centres, too; NaN and infinity lie outside; another image is never read."""
    value, shapes, offsets, logits, reference = inputs(Q=40)
    places = torch.tensor([-1e9, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.5, 4.0, 7.5], dtype=F64)
    at = places[torch.randint(0, 10, offsets.shape, generator=torch.Generator().manual_seed(0))]
    want = definition(value, shapes, at, logits, reference.zero_())
    out = at.clone()
    out[0, ::2, 0, 0, 0, 0], out[0, ::3, 1, 1, 1, 1] = torch.nan, torch.inf
    value[1] = torch.nan
    for way in ways():
        got, odd, far = (way.forward(*flat(value, shapes, o, logits, reference))[0]
                         for o in (at, out, out.where(out.isfinite(), -1e9)))
        assert torch.allclose(got, want[0], atol=1e-12) and torch.equal(odd, far)
        for box in (reference, torch.rand(2, 40, 3, 4, dtype=F64)):
            args = flat(value, shapes, out, logits, box)
            grads = way.backward(torch.ones_like(want), *args, True)
            assert all(t[0].isfinite().all() for t in (odd, *grads))


def test_msda_is_an_operator_of_torch():
    """Gradients, fake tensors, compile and export; a second derivative is refused."""
    for R in (2, 4):
        value, shapes, offsets, *rest = inputs(Q=3, P=1, R=R)
        *tensors, sizes = flat(value, shapes, offsets.clamp(-4, 4), *rest)
        tensors, call = [t.requires_grad_() for t in tensors], torch.ops.mindetr.msda.default
        assert torch.autograd.gradcheck(lambda v, *rest: msda.msda(v, shapes, *rest), tensors)
        loss = msda.msda(tensors[0], shapes, *tensors[1:]).square().sum()
        first = torch.autograd.grad(loss, tensors[0], create_graph=True)[0].sum()
        error_of(torch.autograd.grad, first, tensors[0], kind=RuntimeError)
        torch.library.opcheck(call, (*tensors, sizes))

    layer = msda.MSDeformAttn(32, levels=2, heads=4, points=2)
    nn.init.normal_(layer.sampling_offsets.weight)
    value, x, pos = torch.randn(2, 16, 4, 8), *torch.randn(2, 2, 5, 32)
    args = x, pos, torch.rand(2, 5, 2, 4), (value, [(3, 4), (2, 2)])
    exported = torch.export.export(layer, args)
    assert any("mindetr.msda" in str(node.target) for node in exported.graph.nodes)
    for way in (torch.compile(layer, fullgraph=True, backend="aot_eager"), exported.module()):
        assert torch.allclose(way(*args), layer(*args), atol=1e-6)


def test_msda_needs_no_compiler():
    """Without one grid_sample serves, and one warning says so; MINDETR_MSDA can forbid that."""
    args = inputs()
    fresh = (functools.cache(f.__wrapped__) for f in (cpu.library, msda.chosen))
    with mock.patch.dict(os.environ, CXX="/no/such/compiler"), \
            mock.patch.object(cpu, "library", next(fresh)), \
            mock.patch.object(msda, "chosen", next(fresh)), \
            warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        assert all(torch.allclose(msda.msda(*args), definition(*args)) for _ in range(2))
        with mock.patch.object(msda, "BACKEND", "native"):
            assert "compiler" in error_of(msda.msda, *args, kind=OSError)
    assert len(said) == 1 and "compiler" in str(said[0].message)
    with mock.patch.multiple(msda, BACKEND="torch", Function=None):
        assert torch.allclose(msda.msda(*args), definition(*args))


def test_msda_kernel_is_compiled_by_nvrtc():
    """For every generation of GPUs that torch's NVRTC knows, without spills; and kept."""
    try:
        cuda.nvrtc()
    except OSError as error:
        raise unittest.SkipTest(str(error)) from None
    source = [(emulate.KERNELS / name).read_text() for name in ("msda.cu", "sampling.h")]
    for types, arch in itertools.product([(BF16, F32), (F16, F16), (F32, F32)], (75, 80, 90)):
        config = cuda.Config(*types, 8, 32, 4, 4, 4)
        options = [f"--gpu-architecture=sm_{arch}", "--std=c++17", "--ptxas-options=-v"]
        log = cuda.compile_source(config, source, options)[1]
        costs = re.findall(r"(\d+) bytes spill stores.*?Used (\d+) registers", log, re.S)
        assert len(costs) == 2 and all(int(a) <= 32 and int(b) <= 80 for a, b in costs), log
    with tempfile.TemporaryDirectory() as tmp, mock.patch.dict(os.environ, XDG_CACHE_HOME=tmp):
        file = cuda.compiled(config, 9, 0)
        with mock.patch.object(cuda, "compile_source", side_effect=AssertionError):
            assert cuda.compiled(config, 9, 0) == file


def test_msda_refuses_to_be_deterministic_on_a_gpu():
    args = torch.ones(2, 6, 12, dtype=F64), *flat(*inputs()), True
    with mock.patch.object(torch, "are_deterministic_algorithms_enabled", lambda: True):
        assert "fixed order" in error_of(cuda.backward, *args, kind=RuntimeError)


def test_msda_layer_looks_around():
    """At first head m looks in direction 2 pi m / M, point k at k + 1 cells, whatever the query."""
    layer, x = msda.MSDeformAttn(32, levels=1, heads=8, points=4), torch.randn(1, 12, 32)
    offset = layer.sampling_offsets(x[:, :3]).view(3, 8, 4, 2)
    assert torch.allclose(offset[:, 0, 2], torch.tensor([3.0, 0.0]), atol=1e-5)
    assert torch.allclose(offset[:, 3, 1], torch.tensor([-2.0, 2.0]), atol=1e-5)
    assert layer.attention_weights(x).abs().max() == 0
