"""Every test of minDETR: `python test_all.py`, `python test_all.py -k word`, or `pytest`.

Here are the runner and the papers' tests (variants, matcher, diffusion, model); tests/ has the
rest. A test's name begins with what it tests. They need no network, no GPU and no data; what
published code computed is in tests/published.npz, for weights that are made from their names.
"""
import argparse
import collections
import importlib
import itertools
import math
import multiprocessing
import re
import sys
import time
import traceback
import unittest
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from unittest import mock

import numpy as np
import torch
from scipy import optimize, special, stats
from torch import nn
from torch.nn import functional as F
from torchvision.ops import box_convert

import data
import diffusion
import eval as evaluation
import matcher
import variants
from backbone import Swin, WindowAttention
from model import DecoderLayer, build_model, correct
from tests.fixtures import HERE, SMALL, TRAINED, VIT, batch, error_of, small

PINNED = mock.patch.object
LAWS = ("gaussian", "sigmoid_gaussian", "beta")


# ============================================================================== variants.py

def test_variants_parameters_are_the_published_counts():
    """To the last parameter, as the authors' code counts them, or in millions, as their tables."""
    def count(name, trained=False, **changes):
        with torch.device("meta"):
            parameters = build_model(name, **changes).parameters()
        return sum(p.numel() for p in parameters if p.requires_grad or not trained)

    for name, published in dict(
            detr=41_524_768, detr_dc5=41_524_768, conditional=43_418_401, dab=43_671_517,
            dn_dab=43_694_977, deformable=40_069_665, deformable_single=34_066_593,
            deformable_refine=40_849_660, deformable_two_stage=41_181_529, dn=47_429_154,
            dino=46_893_182, lw_medium=28_237_378, rf_nano=30_467_298,
            detr_panoptic=42_899_288).items():
        assert count(name) == published, name
    for name, alone in dict(lw_tiny=9_072_366, lw_medium=24_633_742, rf_nano=26_863_662).items():
        assert count(name, query_groups=1) == alone, name
    for name, millions in dict(lw_small=14.6, lw_large=46.8, lw_xlarge=118.0, rf_small=32.1,
                               rf_medium=33.7, rf_large=33.9).items():
        assert round(count(name) / 1e6, 1) == millions, name
    for swin, window, published in (("swin_t", 7, 27_520_506), ("swin_b", 12, 86_880_120)):
        with torch.device("meta"):
            built = build_model("dino", backbone=swin, window=window).backbone
        trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
        assert trained == published, swin
    for stages, fixed in dict(layer1=222_400, stem=9_408, none=0).items():
        assert count("dab", True, frozen_stages=stages) == 43_671_517 - fixed, stages


def test_variants_contradictions_say_what_to_write():
    for row, changes, word in [
            ("detr", dict(attention="deformabel"), "choose one of"),
            ("detr", dict(querys=3), "unknown field"), ("detr", dict(heads=2.5), "whole"),
            ("detr", dict(heads=7), "heads"), ("detr", dict(dropout=math.nan), "at least 0"),
            ("detr", dict(levels=2), "1, 3"), ("detr", dict(levels=4), "levels=1"),
            ("detr", dict(dilation=True, backbone="resnet18"), "dilation=False"),
            ("detr", dict(attention="conditional"), "reference=points"),
            ("detr", dict(box_codec="relative"), "reference=anchors"),
            ("detr", dict(copies=2), "class_loss=focal"),
            ("lw_tiny", dict(levels=4), "1, 2 or 3"), ("lw_tiny", dict(taps="1 6"), "vit_depth=6"),
            ("dab", dict(content="label"), "denoising=dn"),
            ("deformable", dict(reference="proposals"), "two_stage=True"),
            ("deformable", dict(denoising="dn"), "reference=anchors"),
            ("deformable", dict(look_forward_twice=True), "refine=True"),
            ("deformable_two_stage", dict(query_groups=2), "content=learned"),
            ("diffu", dict(sampling_steps=101), "timesteps")]:
        said = error_of(variants.variant, row, kind=variants.ConfigError, **changes)
        assert word in said, (changes, said)


def test_variants_every_field_is_read_and_explained():
    """A field that nothing reads is a defect, and so is one that --help does not explain."""
    for of, name, files in ((variants.Config, "cfg", "model backbone matcher diffusion eval"),
                            (variants.Recipe, "recipe", "train weights runs")):
        code = "".join((HERE / f"{file}.py").read_text() for file in files.split())
        for f in fields(of):
            assert f.metadata["help"] and re.search(rf"{name}\.{f.name}\b", code), f.name


# =============================================================================== matcher.py

def predictions(L=3, counts=(3, 1), Q=7, C=5, seed=0):
    """Random logits [L, B, Q, C] and boxes [L, B, Q, 4], and targets, all in float64."""
    g = torch.Generator().manual_seed(seed)
    boxes = torch.rand(L, len(counts), Q, 4, generator=g, dtype=torch.float64) * 0.4 + 0.2
    logits = torch.randn(L, len(counts), Q, C, generator=g, dtype=torch.float64)
    return logits, boxes, batch(counts, dtype=torch.float64)[2]


def ia_losses(logits, boxes, targets, owners, eps):
    """IA-BCE, pair by pair, from the paper: class, L1 and GIoU, summed over a layer's images.

    owners: (image, target, the queries that own it and that are ranked), of all targets.
    """
    p, sums = logits.sigmoid(), [0, 0, 0]
    negative = torch.ones_like(p, dtype=torch.bool)
    for b, g, queries in owners:
        label, wanted = targets[b]["labels"][g], targets[b]["boxes"][g]
        negative[b, queries, label] = False
        iou, giou = matcher.overlaps(boxes[b, queries], wanted, eps)
        score = (p[b, queries, label] ** 0.25 * iou ** 0.75).clamp(min=0.01).detach()
        for rank, i in enumerate(score.argsort(descending=True)):
            w, x = math.exp(-rank / 1.5), p[b, queries[i], label]
            sums[0] = sums[0] - score[i] * w * x.log() - (1 - score[i] * w) * (1 - x).log()
            sums[1] = sums[1] + w * (boxes[b, queries[i]] - wanted).abs().sum()
            sums[2] = sums[2] + w * (1 - giou[i])
    sums[0] = sums[0] - (p ** 2 * (1 - p).log())[negative].sum()
    return dict(zip(("class", "bbox", "giou"), sums))


def test_matcher_align_shares():
    """As many queries a target as go round; Align-DETR's code: half of them at most, and what one
    image lowers stays lowered for the next ones."""
    for rule, counts, Q, want in [
            ("fair", (4, 3), 8, [2, 2]), ("fair", (5, 2), 7, [1, 2]), ("fair", (9, 0), 7, [1, 2]),
            ("published", (5, 3), 30, [2, 2]), ("published", (10, 3), 30, [1, 1]),
            ("published", (3, 20, 3), 30, [2, 0, 0]), ("published", (0, 4), 30, [2, 2])]:
        assert matcher.shares(2, counts, Q, rule) == want, (rule, counts)


def test_matcher_align_ranks_a_targets_queries():
    """Two queries a target in all layers but the last, losses by rank; and the gradient, which
    reaches the negatives' p^2 and not the score to reach. Denoising queries are no rivals."""
    for counts, rule in [((3, 1), "fair"), ((5, 2), "fair"), ((12, 1), "fair"),
                         ((3, 5), "published")]:
        cfg = variants.align.but(num_classes=5, num_queries=9, copies_rule=rule, dn_queries=12)
        logits, boxes, targets = predictions(counts=counts, Q=9)
        d = diffusion.denoising_queries(targets, cfg)
        parts = {"enc": {"logits": logits.requires_grad_()[0], "boxes": boxes.requires_grad_()[0]},
                 "dn": dict(zip(("logits", "boxes"), predictions(1, counts, Q=d.boxes.shape[1])))}
        parts["dn"]["queries"] = d
        _, losses = matcher.Criterion(cfg)({"logits": logits, "boxes": boxes} | parts, targets)
        cost = matcher.match_cost(logits, boxes, targets, cfg)
        for layer, copies in enumerate((2, 2, 1)):
            owners = []
            for b, k in enumerate(matcher.shares(copies, counts, 9, rule)):
                n = counts[b]
                query, column = optimize.linear_sum_assignment(cost[layer, b, :, :n].repeat(1, k))
                owners += [(b, g, query[column % n == g]) for g in range(n)]
            want = ia_losses(logits[layer], boxes[layer], targets, owners, cfg.giou_eps)
            for name, value in want.items():
                got, value = losses["main"][name][layer], value / sum(counts)
                assert torch.allclose(got, value, atol=1e-10), (counts, layer, name)
                for x in (logits, boxes):
                    a, b = (torch.autograd.grad(y, x, retain_graph=True, allow_unused=True,
                                                materialize_grads=True)[0] for y in (got, value))
                    assert torch.allclose(a, b), (counts, layer, name)
        # Proposals have real labels, and two queries a target.
        assert torch.allclose(losses["enc"]["class"][0], losses["main"]["class"][0])
        alone = [(b, g, [slot]) for b, slot, g in zip(*d.pairs)]
        want = ia_losses(parts["dn"]["logits"][0], parts["dn"]["boxes"][0], targets, alone,
                         cfg.giou_eps)
        for name, value in want.items():
            assert torch.allclose(losses["dn"][name][0], value / sum(counts) / d.groups), name


# ============================================================================= diffusion.py

def test_denoising_draws_uniformly():
    """DN moves centres by up to 0.4 of half the size and sizes by 0.4; CDN corners by up to 0.4 of
    half the size, of negatives by 0.4 more. Labels change by their share."""
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.1]]).repeat(4000, 1)
    targets = [{"labels": torch.zeros(4000, dtype=torch.long), "boxes": boxes}]
    for name in ("dn", "dino"):
        cfg = variants.VARIANTS[name].but(num_classes=5, label_noise=0.5, box_noise=0.4,
                                          dn_groups=1)
        d = diffusion.denoising_queries(targets, cfg, torch.Generator().manual_seed(0))
        part = (d.boxes[0, :4000] - boxes) / (torch.tensor([0.1, 0.05, 0.2, 0.1]) * 0.4)
        if d.contrastive:
            a, b = (box_convert(x, "cxcywh", "xyxy") for x in (d.boxes[0], boxes.repeat(2, 1)))
            part = (a - b) / (torch.tensor([0.1, 0.05, 0.1, 0.05]) * 0.4)
            part[4000:] -= part[4000:].sign()
        assert (stats.kstest(part.numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3).all(), name
        assert abs((d.labels != 0).float().mean() - 0.5 * 4 / 5) < 0.03  # a random one may be 0


def test_diffusion_noise_laws_are_what_they_say():
    """Each is drawn from its own distribution (Kolmogorov-Smirnov), has mean 0 and variance 1."""
    beta = stats.beta(1, 1)
    for law, exact in dict(
            gaussian=stats.norm.cdf, beta=lambda x: beta.cdf(x * beta.std() + 0.5),
            sigmoid_gaussian=lambda x: stats.norm.cdf(
                special.logit(np.clip(x * 0.20827634 + 0.5, 0, 1)))).items():
        x = diffusion.draw_noise(law, 100_000, generator=torch.Generator().manual_seed(3))
        assert stats.kstest(x.double().numpy(), exact).pvalue > 0.01, law
        assert abs(x.mean()) < 0.01 and abs(x.var() - 1) < 0.02, law


def test_diffusion_references_say_nothing_by_their_place():
    """The target's reference is at every place equally often: learned content belongs to a place.
    Of more targets than queries, every one is as likely to be used, and none twice. And every
    image draws its own t, uniformly."""
    def uniform(counts):
        return stats.chisquare(counts.numpy()).pvalue > 1e-3

    def places(boxes, num_queries):
        """[images, queries]: which box each reference is, or -1, at noise that moves it little."""
        targets = [{"labels": torch.zeros(len(boxes), dtype=torch.long), "boxes": boxes}] * 2000
        cfg = variants.diffu.but(num_queries=num_queries, timesteps=4, schedule="linear",
                                 signal_scale=8.0)
        references, t = diffusion.noised_references(targets, cfg, torch.Generator().manual_seed(0))
        assert uniform(torch.bincount(t, minlength=4))
        far = (references[:, :, None] - boxes).abs().amax(-1)
        return far.argmin(-1).where(far.amin(-1) < 0.1, -1)

    found = places(torch.tensor([[0.1, 0.9, 0.02, 0.98]]), 8) == 0  # where padding is rare
    assert (found.sum(1) == 1).all() and uniform(found.sum(0))
    grid = torch.cartesian_prod(torch.tensor([0.2, 0.8]), torch.tensor([0.2, 0.5, 0.8]))
    used = places(torch.cat([grid, torch.full((6, 2), 0.3)], 1), 4)
    assert (used.sort(1).values.diff() > 0).all() and (used >= 0).all()
    assert uniform(torch.bincount(used.flatten(), minlength=6))


def test_diffusion_renewal():
    """A query is kept if its score is above t_next / T, whatever T is, or without renewal."""
    score, steps = torch.tensor([0.44, 0.46]).logit().view(1, 1, 2, 1), []
    for renewal in (True, False):
        cfg = variants.diffu.but(num_queries=2, timesteps=20, sampling_steps=2, renewal=renewal)
        diffusion.sample(lambda x, t: (score, x[None]), 1, cfg, "cpu", torch.float32,
                         watch=steps.append)
    assert [step["keep"].tolist() for step in steps] == [[[False, True]]] + [[[True, True]]] * 3


def test_diffusion_sampler_is_ddim():
    """Every state, by Song et al.'s Eq. 12 and 16, if every evaluation predicts the truth. eta = 1
    is DDPM, whose posterior has this variance (Ho et al. 2020, Eq. 7)."""
    truth = torch.rand(1, 5, 4, dtype=torch.float64) * 0.6 + 0.2
    answer = torch.full((1, 1, 5, 3), 9.0, dtype=torch.float64), truth[None]
    for S, schedule, scale, law, eta in itertools.product(
            (1, 3, 10, 50), ("cosine", "linear", "sqrt"), (1.0, 1.5), LAWS, (0.0, 0.5, 1.0)):
        cfg = variants.diffu.but(num_queries=5, sampling_steps=S, schedule=schedule, eta=eta,
                                 signal_scale=scale, noise=law)
        seen, rates = [], diffusion.signal_rates(schedule, 100)
        diffusion.sample(lambda *_: answer, 1, cfg, "cpu", torch.float64, watch=seen.append)
        kind = dict(generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x, x0 = diffusion.draw_noise(law, 5, 4, **kind), (truth[0] * 2 - 1) * scale
        for saw, (t, s) in zip(seen, diffusion.times(100, S), strict=True):
            references = (x.clamp(-scale, scale) / scale + 1) / 2
            assert saw["t"] == t and torch.allclose(saw["references"][0], references), (cfg, t)
            a, b = rates[t], rates[s]
            variance = eta ** 2 * (1 - a / b) * (1 - b) / (1 - a)
            direction = (x - a.sqrt() * x0) / (1 - a).sqrt()
            fresh = diffusion.draw_noise(law, 5, 4, **kind)
            x = b.sqrt() * x0 + (1 - b - variance).sqrt() * direction + variance.sqrt() * fresh


def test_diffusion_is_independent_of_the_batch():
    """An image's boxes depend on its own generator, not on the other images or theirs (nor on how
    many these are: check_alone); the ensemble of a batch is that of its images."""
    def seeds(*numbers):
        return [torch.Generator().manual_seed(n) for n in numbers]

    sizes = torch.tensor([[96, 96], [72, 64]])
    images, mask, _ = batch(dtype=torch.float64)
    for name in ("diffu", "diffu_dino", "diffu_dino_published"):
        built = small(name).double().eval()
        with torch.no_grad():
            both = built(images, mask)
            changed = built(images * 2, mask, generator=seeds(5, 0))["boxes"]
            other = built(images * 2, mask, generator=seeds(5, 9))["boxes"]
            alone = [built(images[i:i + 1], mask[i:i + 1]) for i in range(2)]
        assert torch.allclose(changed[:, 0], other[:, 0], atol=1e-9)
        assert not torch.allclose(changed[:, 1], other[:, 1], atol=1e-3)
        for i, answer in enumerate(evaluation.postprocess(both, sizes, built.cfg)):
            (own,) = evaluation.postprocess(alone[i], sizes[i:i + 1], built.cfg)
            assert torch.equal(answer["labels"], own["labels"]), name
            assert torch.allclose(answer["boxes"], own["boxes"], atol=1e-6), name


@torch.no_grad()
def test_diffusion_image_is_seen_once():
    """Backbone, encoder and the decoder's projections of the memory run once; of a sampling step
    that is over, only the best pairs are held."""
    built, calls = small("diffu", sampling_steps=4).eval(), collections.Counter()
    parts = dict(backbone=built.backbone, encoder=built.encoder[0], decoder=built.decoder[0],
                 values=built.decoder[0].cross_attn.value_proj)
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
    outputs = built(*batch()[:2])
    assert calls == {"backbone": 1, "encoder": 1, "decoder": 4, "values": 1}
    assert [e["boxes"].shape for e in outputs["sampled"]] == [(2, 100, 4)] * 4


# ================================================================================= model.py

def losses_of(built, images, mask, targets):
    outputs = built(images, mask, targets)
    return outputs, *matcher.Criterion(built.cfg)(outputs, targets)


def check_shapes(built, images, mask, targets):
    """And all layers, images and proposals come to the host in one transfer."""
    cfg, outputs = built.cfg, built(images, mask, targets)
    calls, real = [], torch.Tensor.cpu
    with PINNED(torch.Tensor, "cpu", lambda x: calls.append(x) or real(x)):
        _, losses = matcher.Criterion(cfg)(outputs, targets)
    assert ("enc" in losses) == cfg.two_stage and ("dn" in losses) == (cfg.denoising != "none")
    L, Q = cfg.decoder_layers, cfg.num_queries * cfg.query_groups
    assert len(calls) == 1 and outputs["logits"].shape == (L, 2, Q, cfg.logits)
    assert outputs["boxes"].shape == (L, 2, Q, 4) and outputs["states"].shape[:3] == (L, 2, Q)


def check_gradients(built, images, mask, targets):
    """Every parameter takes part whatever the targets, or processes would wait for each other's."""
    for counts in ((3, 1), (0, 2), (0, 0), (30, 25)):  # of 20 queries
        targets = batch(counts)[2]
        _, total, losses = losses_of(built, images, mask, targets)
        total.backward()
        assert all(torch.isfinite(v) for v in matcher.named(losses).values()), counts
        assert not [n for n, p in built.named_parameters() if p.requires_grad and p.grad is None]
        built.zero_grad()


def check_recomputed(built, images, mask, targets):
    """checkpoint_activations gives the same gradients, dropout included."""
    results = []
    for built.checkpoint_activations in (False, True):
        torch.manual_seed(1)
        built.zero_grad()
        losses_of(built, images, mask, targets)[1].backward()
        results.append([p.grad.clone() for p in built.parameters() if p.requires_grad])
    built.checkpoint_activations = False
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*results))


def check_autocast(built, images, mask, targets):
    """Boxes and logits stay float32."""
    with torch.autocast("cpu", torch.bfloat16), \
            PINNED(built, "decode", wraps=built.decode) as decode:
        outputs, total, _ = losses_of(built, images, mask, targets)
    reference = decode.call_args.args[4]
    assert reference is None or reference.dtype == torch.float32
    assert outputs["boxes"].dtype == outputs["logits"].dtype == torch.float32
    total.backward()


def check_alone(built, images, mask, targets):
    """An image gives what it gives beside another one, padding and all; also beside one of padding
    alone, which is an empty image."""
    built.eval()
    with torch.no_grad():
        both, *alone = (built(images[i], mask[i])["boxes"] for i in ([0, 1], [0], [1]))
    assert torch.allclose(both, torch.cat(alone, 1), atol=1e-4)
    images[1], mask[1] = 0, True
    with torch.no_grad():
        both = built(images, mask)["boxes"]
    assert torch.allclose(both[:, :1], alone[0], atol=1e-4) and torch.isfinite(both).all()
    assert torch.isfinite(losses_of(built.train(), images, mask, targets)[1])


def test_model_every_row():
    """Every row of VARIANTS, and combinations that no paper tried, through every check."""
    checks = check_shapes, check_gradients, check_recomputed, check_autocast, check_alone
    for name, changes in [
            *((name, dict(dropout=0.1)) for name in TRAINED),
            ("deformable_refine", dict(look_forward_twice=True)), ("dn", dict(decoder_norm=True)),
            ("deformable", dict(levels=5)), ("dn", dict(reference="noise")),
            ("dino", dict(backbone="swin_t", levels=5)),
            ("deformable", dict(content="zero")), ("detr", dict(reference="anchors", refine=True)),
            ("diffu", dict(denoising="cdn", look_forward_twice=True)),
            ("diffu", dict(time="scale_shift", content="memory")),
            ("conditional", dict(refine=True, content="split")), ("dn", dict(content="label")),
            ("detr", dict(class_loss="focal", two_stage=True, reference="proposals",
                          num_queries=9)),
            ("dab", dict(reference="proposals", two_stage=True, denoising="cdn", num_queries=9)),
            ("dino", dict(class_loss="vfl", denoising="dn", content="memory", encoder_layers=0)),
            ("dino", dict(refine=False, look_forward_twice=False, decoder_layers=1)),
            ("dn", dict(two_stage=True, content="zero", denoising="none")),
            ("lw_tiny", dict(levels=3, encoder_layers=1, denoising="cdn")),
            ("lw_tiny", dict(content="memory", refine=True, look_forward_twice=True)),
            ("rf_nano", dict(proposal_loss="all", proposal_score="first", copies=2)),
            ("dino", dict(group_proposals=True, query_groups=2, proposal_offsets=True)),
            ("dab", dict(box_codec="relative", cross_heads=4, query_groups=2)),
            ("detr", VIT | dict(backbone="vit")), ("diffu_lw", dict(refine=True))]:
        built = small(name, **changes)
        for check in checks:
            try:
                check(built, *batch())
            except Exception as error:
                raise AssertionError(f"{name} {changes}: {check.__name__}") from error


def test_model_query_groups():
    """Group DETR: groups do not see each other or denoising queries, inference uses the first,
    losses are their mean."""
    args = batch(dtype=torch.float64)
    for name in ("detr", "deformable", "dn", "dino", "lw_tiny", "dn_dab"):
        built = small(name, query_groups=3, box_noise=0.0, backbone_norm="frozen",
                      projector_norm="layer").double()
        outputs, _, losses = losses_of(built, *args)
        criterion = matcher.Criterion(built.cfg)
        alone = [criterion({k: outputs[k][:, :, 20 * g:20 * g + 20] for k in ("logits", "boxes")},
                           args[2])[1]["main"] for g in range(3)]
        for loss, value in losses["main"].items():
            assert torch.allclose(value, sum(each[loss] for each in alone) / 3), (name, loss)
        names = dict(detr="query_embed", deformable="query_embed", dn_dab="refpoint_embed")
        getattr(built, names.get(name, "tgt_embed")).weight.data[40:] += 1  # of the third group
        change = (outputs["logits"] - built(*args)["logits"]).abs()
        assert change[:, :, :40].max() < 1e-9 and change[:, :, 40:].max() > 1e-3, name
        boxes = built.eval()(*args[:2])["boxes"]
        assert torch.allclose(boxes, outputs["boxes"][:, :, :20], atol=1e-9), name


def test_model_relative_boxes_of_noise():
    """LW-DETR's codec: noise may be an empty box, which must be able to grow."""
    delta, box = torch.tensor([0.5, -1.0, 0.0, math.log(2)]), torch.tensor([0.5, 0.5, 0.0, 0.0])
    assert torch.equal(correct(delta, box, variants.lw_tiny), box)
    assert (correct(delta, box, variants.diffu_lw)[2:] > 0.005).all()


def test_model_drop_path():
    """Later blocks are skipped more often, in training alone, whole windows at a time."""
    built = small("lw_tiny", drop_path=0.6).train()
    assert np.allclose([b.drop_path.p for b in built.backbone.blocks], [0, 0.2, 0.4, 0.6])
    block, x = built.backbone.blocks[3], torch.randn(64, 5, 48)
    same = (block(x) == x).flatten(1).all(1)
    assert 5 < same.sum() < 50 and not (block.eval()(x) == x).flatten(1).all(1).any()


def test_model_swin_windows():
    """Shifted windows pair by pair, on padded maps and on one that is one window wide: tokens of a
    window see each other, unless the shift alone brought them together."""
    g, w = torch.Generator().manual_seed(0), 4
    for (H, W), s in itertools.product([(3, 5), (9, 8), (4, 4)], (0, 2)):
        attn = WindowAttention(6, [w, w], [s, s], 2).double()
        attn.relative_position_bias_table.data.normal_(generator=g)
        x = torch.randn(2, H, W, 6, generator=g, dtype=torch.float64)
        h, v = -(-H // w) * w, -(-W // w) * w
        q, k, u = attn.qkv(F.pad(x, (0, 0, 0, v - W, 0, h - H))).view(2, h * v, 3, 2, 3).unbind(2)
        at = [((r - s) % h, (c - s) % v) for r in range(h) for c in range(v)]  # after the shift
        seen = [(r // w, c // w, r >= h - s, c >= v - s) for r, c in at]
        allowed = torch.tensor([[a == b for b in seen] for a in seen])
        places = torch.tensor([[((r - i) + w - 1) * (2 * w - 1) + (c - j) + w - 1 for i, j in at]
                               for r, c in at])
        bias = attn.relative_position_bias_table[places.clamp(0, (2 * w - 1) ** 2 - 1)]
        logits = torch.einsum("bqmd,bkmd->bqkm", q, k) / 3 ** 0.5 + bias
        y = torch.einsum("bqkm,bkmd->bqmd", logits.masked_fill(
            ~allowed[..., None], -math.inf).softmax(2), u).reshape(2, h, v, 6)[:, :H, :W]
        assert torch.allclose(attn(x), attn.proj(y), atol=1e-12), (H, W, s)
    swin, images = Swin(variants.dino.but(backbone="swin_t")).eval(), batch(size=41)[0]
    with torch.no_grad():
        padded = swin(F.pad(images, (0, 3, 0, 3)))
        assert all(map(torch.equal, swin(images), padded)) and padded[0].shape[2:] == (11, 11)


def test_model_faster_rcnn():
    """The baseline: torchvision's count, losses that fall, and boxes of each image's own size."""
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model("faster_rcnn", num_classes=90).parameters()) == (
            41_755_286)
    torch.manual_seed(0)
    built, (images, mask, targets) = small("faster_rcnn", d_model=32).train(), batch((2, 1))
    optimizer, totals = torch.optim.AdamW(built.parameters(), 1e-3), []
    for _ in range(12):
        total, losses = built.criterion(built(images, mask, targets), targets)
        half = built.criterion({"losses": {f"loss_{k}": torch.ones(()) for k in (
            "classifier", "box_reg", "objectness", "rpn_box_reg")}}, targets[:1], [2, 1])[0]
        assert half == 2 and matcher.named(losses).keys() == {
            "loss_class", "loss_bbox", "loss_class_enc", "loss_bbox_enc"}
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert sum(totals[-3:]) < 0.7 * sum(totals[:3]), totals
    assert all(p.grad is not None for p in built.parameters())
    found = [box_convert(t["boxes"], "cxcywh", "xyxy") * size for t, size in zip(
        targets, torch.tensor([[96.0, 96, 96, 96], [64, 72, 64, 72]]))]
    for p in built.roi_heads.box_predictor.parameters():
        nn.init.zeros_(p)  # boxes are the proposals, here the true ones in pixels
    with torch.no_grad(), PINNED(built.rpn, "forward", lambda *_: (found, {})):
        answers = evaluation.postprocess(
            built.eval()(images, mask), torch.tensor([[192, 192], [144, 128]]), built.cfg)
    for answer, boxes in zip(answers, found):
        own = answer["boxes"][answer["scores"] >= 0]
        assert len(own) and (torch.cdist(own, 2 * boxes).amin(1) < 1e-3).all()


def test_model_pads_to_whole_windows():
    """Sides that no window divides: more padding, and the boxes are still the image's own."""
    built, (images, mask, _) = small("rf_nano").eval(), batch()
    images, mask, more = images[:, :, :90, :50], mask[:, :90, :50], (0, 14, 0, 6)  # to 64 x 96
    with torch.no_grad():
        padded = built(F.pad(images, more), F.pad(mask, more, value=True))["boxes"]
        assert torch.equal(built(images, mask)["boxes"], padded)


def test_model_compiles_and_exports():
    """The inference form, without a break in the graph, gives what it gives uncompiled."""
    for name in ("lw_tiny", "lw_large", "rf_nano", "dino"):
        built, (images, mask, _) = small(name).eval(), batch(size=64)
        with torch.no_grad():
            want = built(images, mask)["boxes"]
            ways = (torch.compile(built, backend="aot_eager", fullgraph=True),
                    torch.export.export(built, (images, mask)).module())
            for way in ways:
                assert torch.allclose(way(images, mask)["boxes"], want, atol=1e-5), name


def test_model_time_is_added_between_self_attention_and_cross_attention():
    """DiffuDETR's FFN(MSDA(SA(q) + t, r_t, O_enc)), a layer by hand."""
    layer = DecoderLayer(variants.diffu.but(**SMALL)).double().eval()
    d = layer.norm1.normalized_shape[0]
    x, pos, t = (torch.randn(2, *n, dtype=torch.float64) for n in ((5, d), (5, d), (4 * d,)))
    looked, asked = torch.randn(2, 5, d, dtype=torch.float64), []
    with torch.no_grad(), PINNED(type(layer.cross_attn), "forward",
                                 lambda *a: asked.append(a[1]) or looked):
        got = layer(x, pos, None, None, None, t)
        y = layer.self_attn(x, pos, None)
        told = layer.norm1(x + y) + layer.time[0](t)[:, None]
        after = layer.norm2(told + looked)
        want = layer.norm3(after + layer.linear2(layer.linear1(after).relu()))
    assert torch.allclose(asked[0], told) and torch.allclose(got, want, atol=1e-12)


def test_model_first_boxes_start_at_their_size_in_every_layer():
    """Learned points and anchors: 12% of a side, and not smaller with every layer."""
    for name, shared in itertools.product(("deformable_refine", "dn"), (False, True)):
        built = small(name, shared_heads=shared, decoder_layers=4)
        widths = built(*batch())["boxes"][..., 2:].flatten(1).median(1).values
        assert (widths > 0.08).all(), (name, shared, widths)


def test_model_wrong_use_and_a_diverged_model_are_told():
    images, mask, _ = batch()
    assert "targets" in error_of(small("dn"), images, mask, kind=ValueError)
    assert "mask" in error_of(small("detr"), images, mask[:, 1:], kind=ValueError)
    logits, boxes, targets = predictions()
    logits[1, 0, 2] = math.nan
    said = error_of(matcher.match, [(logits, boxes, targets)], variants.dino,
                    kind=FloatingPointError)
    assert "layer 1, image 0" in said


def test_model_an_image_with_fewer_tokens_than_queries():
    """Two-stage variants then answer with fewer boxes, or (noise) with all of them."""
    images, mask, targets = batch(size=32)
    for name, count in dict(dino=22, deformable_two_stage=22, diffu=60,
                            diffu_dino_published=60).items():
        built = small(name, num_queries=60)
        losses_of(built, images, mask, targets)[1].backward()
        with torch.no_grad():
            boxes = built.eval()(images, mask)["boxes"]
        assert boxes.shape[2] == count and torch.isfinite(boxes).all(), name


def test_model_learns():
    """A few dozen steps on four images must lower the loss by a good part."""
    for name in ("detr", "deformable", "dn", "dino", "diffu", "lw_tiny", "rf_nano"):
        built, dataset, history = small(name), data.ToyShapes(4, size=64), []
        images, mask, targets = data.collate([dataset[i] for i in range(4)])
        optimizer = torch.optim.AdamW(built.parameters(), 5e-4)
        for _ in range(40):
            _, total, _ = losses_of(built, images, mask, targets)
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(built.parameters(), 0.1)
            optimizer.step()
            history.append(total.item())
        assert sum(history[-5:]) < 0.75 * sum(history[:5]), (name, history[:5], history[-5:])


# =============================================================================== the runner

for _file in sorted((HERE / "tests").glob("test_*.py")):
    _module = importlib.import_module(f"tests.{_file.stem}")
    globals().update({k: v for k, v in vars(_module).items() if k.startswith("test_")})
TESTS = {name: f for name, f in globals().items() if name.startswith("test_")}


def outcome(name):
    """Run a test -> what became of it, and a line that says so."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # workers see what a test patches
    started, result, why = time.time(), "passed", ""
    try:
        TESTS[name]()
    except unittest.SkipTest as reason:
        result, why = "skipped", f" ({reason})"
    except Exception:
        result, why = "failed", "\n" + traceback.format_exc()
    return result, f"{result:8} {time.time() - started:6.1f} s  {name}{why}"


def run_all(word, processes):
    """Run the tests whose name holds `word`; returns the exit code. The last line counts them."""
    names = [name for name in TESTS if word in name]
    slow = "test_(parity|distributed|model_learns|model_every|msda_ways)"
    names.sort(key=lambda name: not re.match(slow, name))  # these first
    counts = collections.Counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn) as pool:  # a Pool's processes may start no others
        for done in as_completed([pool.submit(outcome, name) for name in names]):
            result, line = done.result()
            counts[result] += 1
            print(line, flush=True)
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    print(f"{counts['passed']} passed, {counts['failed']} failed{skipped}")
    return int(counts["failed"] > 0 or not names)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run minDETR's tests.")
    parser.add_argument("-k", default="", metavar="WORD", help="only tests whose name holds WORD")
    parser.add_argument("-j", type=int, default=2, metavar="N", help="processes (default: 2)")
    args = parser.parse_args()
    sys.exit(run_all(args.k, args.j))
