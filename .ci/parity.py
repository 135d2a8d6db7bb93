"""The models against the published code: outputs, losses, matches, gradients, denoising, sampling, in float64.

    python .ci/parity.py FOLDER                    every model, a table, exit code 1 if one deviates
    python .ci/parity.py FOLDER dino-4scale-r50    one of them

FOLDER holds one folder per published model: `keys.json` (names and shapes of its state dict), `meta.json`, and `.npz`
files with what the authors' code gives; its `fill.py` makes weights, images and targets from names alone. One check reads
a photo beside it, ../data/coco_tiny/val2017/000000532481.jpg. Weights go through
`weights.load_weights`, so the translation of names is tested too.

Every check returns {what: largest deviation}. Outputs deviate absolutely, losses and gradients relatively; matches,
masks and indices count their differences. The tolerance is 1e-8; 1e-6 where the arrays were stored in float32; 1e-4
(logits) and 1e-5 (boxes) where the authors' code computed in float32.
"""
import contextlib
import functools
import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import diffusion
import eval as evaluation
import matcher
import msda as msda_module
import weights
from model import build_model, inverse_sigmoid
from variants import variant

ORIGINAL_SIZES = torch.tensor([[480, 640], [384, 720]])             # (h, w) that the stored detections are scaled to
# By the words in a row's name. The authors' code in float32 is itself up to 2.4e-5 (logits), 1.8e-6 (boxes) off.
TOLERANCE = {"in float32: logits": 1e-4, "in float32: boxes": 1e-5, "float32": 1e-6, "": 1e-8}


# ================================================================================================== inputs and weights

@functools.cache
def load_fill(shared):
    """The folder's fill.py as a module."""
    spec = importlib.util.spec_from_file_location("fill", Path(shared) / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(shared, case, name="out.npz"):
    return np.load(Path(shared) / case / name)


def published_state(shared, case, overrides=None):
    """The published state dict of a folder, rebuilt from names: {key: float64 tensor}."""
    fill, folder = load_fill(shared), Path(shared) / case
    meta = json.loads((folder / "meta.json").read_text())
    rule = meta.get("fill", meta["weights"] if isinstance(meta.get("weights"), dict) else meta)
    if overrides is None:
        overrides = rule.get("overrides", {})
    state = {}
    for key, shape in json.loads((folder / "keys.json").read_text()):
        if key in rule.get("not_filled", ()):
            state[key] = torch.from_numpy(read(shared, case, "schedule.npz")[key])
            continue
        name = rule["aliases"].get(key, key)
        for alias, source in rule["aliases"].items():
            if alias.endswith(".") and key.startswith(alias):
                name = source + key[len(alias):]
        change = overrides.get(name, {})
        value = fill.fill(name, shape) * change.get("scale", 1) + change.get("add", 0)
        state[key] = torch.from_numpy(np.asarray(change.get("set", value), dtype=np.float64))
    return state


def published_model(shared, case, variant, overrides=None, **changes):
    model = build_model(variant, **changes).double().eval()
    weights.load_weights(model, published_state(shared, case, overrides))
    return model


def batch(shared):
    """Two images of different sizes, padded: images [2, 3, 320, 480] and mask."""
    fill = load_fill(shared)
    images, mask = torch.zeros(2, 3, 320, 480, dtype=torch.float64), torch.ones(2, 320, 480, dtype=torch.bool)
    for i, (h, w) in enumerate(fill.SIZES):
        images[i, :, :h, :w] = torch.from_numpy(fill.image(f"image{i}", h, w))
        mask[i, :h, :w] = False
    return images, mask


def targets(shared, num_classes=91):
    fill = load_fill(shared)
    both = [fill.targets(f"target{i}", n, num_classes) for i, n in enumerate(fill.COUNTS)]
    return [{"labels": torch.from_numpy(labels), "boxes": torch.from_numpy(boxes)} for labels, boxes in both]


@contextlib.contextmanager
def draws(rand=(), randn=(), randint=(), randperm=None):
    """Random draws come from these tensors, in order; a draw of another shape than the next tensor is an error."""
    def following(name, values, shape_of):
        values = iter(values)

        def draw(*args, **kwargs):
            value, shape = next(values), shape_of(*args)
            assert tuple(value.shape) == tuple(shape), f"{name} drew {tuple(shape)}, {tuple(value.shape)} was next"
            return value
        return draw

    def sizes(*args):
        return args[0] if len(args) == 1 else args
    with mock.patch("torch.rand", following("rand", rand, sizes)), \
            mock.patch("torch.randn", following("randn", randn, sizes)), \
            mock.patch("torch.randint", following("randint", randint, lambda low, high, shape: shape)), \
            mock.patch("torch.randperm", randperm or torch.randperm):
        yield


def contrastive_noise(shared, rows):
    """What CDN draws: no flipped label (a draw of 1 is never below the share), then the stored signs and parts."""
    fill = load_fill(shared)
    sign = torch.from_numpy(fill.rng("cdn_sign").integers(0, 2, (rows, 4)))
    part = torch.from_numpy(fill.rng("cdn_part").uniform(0, 1, (rows, 4)))
    return {"rand": [torch.ones(rows), part], "randint": [torch.zeros(rows, dtype=torch.long), sign]}


# ========================================================================================================= comparisons

def apart(stored, ours):
    """Largest absolute difference."""
    ours = ours.detach() if torch.is_tensor(ours) else torch.as_tensor(np.asarray(ours))
    stored = torch.as_tensor(np.asarray(stored))
    assert stored.shape == ours.shape, f"stored {tuple(stored.shape)}, ours {tuple(ours.shape)}"
    return float((stored.double() - ours.double()).abs().max()) if stored.numel() else 0.0


def relative(stored, ours):
    ours = ours.item() if torch.is_tensor(ours) else ours
    return abs(float(stored) - ours) / max(abs(float(stored)), 1e-12)


def different(stored, ours):
    """How many entries differ; an extra or missing entry makes all of them differ."""
    stored, ours = torch.as_tensor(np.asarray(stored)), torch.as_tensor(np.asarray(ours))
    return float((stored != ours).sum()) if stored.shape == ours.shape else float(max(stored.numel(), 1))


def probes(spy):
    """What the model's decoder was called with: content, reference, blocked, memory."""
    memory, _, content, _, reference, *rest = spy.call_args.args
    return memory, content, reference, rest[0] if rest else None


def compare_losses(found, stored, losses):
    """Against {"unweighted": {published name: value}, "weighted_total": value}; log entries without weight are left."""
    worst = 0.0
    for name, value in stored["unweighted"].items():
        if name not in stored["weights"]:
            continue
        match = re.fullmatch(r"(tgt_)?loss_(ce|class|bbox|giou)(_dn|_interm|_enc)?(_\d)?", name)
        kind = "_dn" if match[1] else (match[3] or "").replace("interm", "enc")
        ours = f"loss_{match[2].replace('ce', 'class')}{kind}{match[4] or ''}"
        if "_dn" in ours and ours not in losses:
            assert value == 0, name                       # published code logs zeros for the absent denoising queries
        else:
            worst = max(worst, relative(value, losses[ours]))
    found["losses"] = max(found.get("losses", 0.0), worst, relative(stored["weighted_total"], losses["total"]))


def compare_matches(found, out, wanted, outputs, goals, cfg):
    """The last and first layer's assignment, and the proposals', against match_*src*, match_*tgt*."""
    stacks = [(outputs["logits"], outputs["boxes"], goals)]
    if "enc" in outputs:
        binary = cfg.proposal_labels == "binary"
        enc_goals = [g | {"labels": torch.zeros_like(g["labels"])} if binary else g for g in goals]
        stacks.append((outputs["enc"]["logits"][None], outputs["enc"]["boxes"][None], enc_goals))
    found.setdefault("matches", 0.0)
    results = matcher.match(stacks, cfg)
    for prefix, stack, which in wanted:
        layer, image, query, target = results[stack]
        for i in range(len(goals)):
            mine = (layer == which) & (image == i)
            order = query[mine].argsort()
            found["matches"] += different(out[f"{prefix}src{i}"], query[mine][order])
            found["matches"] += different(out[f"{prefix}tgt{i}"], target[mine][order])


def compare_gradients(found, model, total, stored, shared, case):
    """Norm, and product with a random direction, of every parameter's gradient, relative to its norm.

    Some gradients are zero in exact arithmetic (a key's bias under softmax): below 1e-7 of all gradients' norm, where
    rounding is all there is, they are compared to that.
    """
    keys = [key for key, _ in json.loads((Path(shared) / case / "keys.json").read_text())]
    names = {ours: name for name, ours in weights.own_names(keys, model.cfg).items() if name in stored}
    parameters = dict(model.named_parameters())
    assert len(names) == len(stored) and set(names) <= {k for k, p in parameters.items() if p.requires_grad}
    gradients = dict(zip(names, torch.autograd.grad(total, [parameters[k] for k in names])))
    floor = 1e-7 * sum(float(g.norm()) ** 2 for g in gradients.values()) ** 0.5
    worst = 0.0
    for ours, name in names.items():
        g, want = gradients[ours], stored[name]
        norm, product = want if isinstance(want, list) else (want, None)
        scale = max(norm, floor)
        worst = max(worst, abs(norm - float(g.norm())) / scale)
        if product is not None:
            direction = torch.from_numpy(load_fill(shared).rng("grad:" + name).standard_normal(tuple(g.shape)))
            worst = max(worst, abs(product - float((g * direction).sum())) / scale)
    found["gradients"] = worst


def compare_float32(found, out, model, shared):
    """The same model and images in float32. (Not for DINO: among 1800 proposals two trade places in float32.)"""
    images, mask = batch(shared)
    with torch.no_grad():
        outputs = model.eval().float()(images.float(), mask)
    for key in ("logits", "boxes"):
        found[f"in float32: {key}"] = apart(out[f"pred_{key}"], outputs[key][-1])


def compare_detections(found, out, outputs, cfg):
    answer = evaluation.postprocess(outputs, ORIGINAL_SIZES, cfg)
    for key in ("scores", "labels", "boxes"):
        ours = torch.stack([a[key][:20] for a in answer])
        check = different if key == "labels" else apart
        found[f"post_{key}"] = check(out[f"post_{key}"], ours)


# ============================================================================================================== models

def check_msda(shared):
    """The operator and its gradients. The numbers are of locations and attention weights: those are an offset from the
    corner, in cells, and a logarithm; a softmax hands back of a gradient what is not common to all weights."""
    fill, out, meta = load_fill(shared), read(shared, "msda"), json.loads((Path(shared) / "msda/meta.json").read_text())
    shapes = [tuple(s) for s in meta["levels_h_w"]]
    size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    value = torch.from_numpy(fill.rng("msda_value").standard_normal((2, 256, 8, 32))).requires_grad_()
    locations = torch.from_numpy(fill.rng("msda_loc").uniform(-0.2, 1.2, (2, 50, 8, 4, 4, 2))).requires_grad_()
    attention = torch.from_numpy(fill.rng("msda_attn").standard_normal((2, 50, 8, 16))).softmax(-1).view(2, 50, 8, 4, 4)
    logits, attention = attention.log().requires_grad_(), attention.requires_grad_()
    grad = torch.from_numpy(fill.rng("msda_grad").standard_normal((2, 50, 256)))
    reference = torch.zeros(2, 50, 4, 2, dtype=torch.float64)
    plain = msda_module.msda_grid_sample(value, shapes, locations, attention)
    of_attention = torch.autograd.grad(plain, (value, locations, attention), grad)[2]
    fused = msda_module.msda(value, shapes, locations * size, logits, reference)
    of_value, of_locations, of_logits = torch.autograd.grad(fused, (value, locations, logits), grad)
    stored = torch.from_numpy(out["grad_attention_weights"])
    weights = attention.detach()
    wanted = weights * (stored - (weights * stored).sum((-1, -2), keepdim=True))
    return {"output": apart(out["output"], fused), "output of the definition": apart(out["output"], plain),
            "grad_value": apart(out["grad_value"], of_value),
            "grad_locations": apart(out["grad_sampling_locations"], of_locations),
            "grad_logits": apart(wanted, of_logits), "grad_weights of the definition": apart(stored, of_attention)}


def check_detr(shared):
    case, found = "detr-r50", {}
    out, model, goals = read(shared, case), published_model(shared, case, "detr"), targets(shared)
    found["parameters"] = different(41_524_768, sum(p.numel() for p in model.parameters()))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found["trained parameters"] = different(41_302_368, trained)
    with mock.patch.object(model, "decode", wraps=model.decode) as spy:
        outputs = model(*batch(shared))
    memory = probes(spy)[0]
    found["memory"] = apart(out["memory_probe"], memory.tokens[0, :50, :16])
    found["position"] = apart(out["pos_probe"], memory.pos[1, :50, ::8])
    found["mask"] = different(out["padding_mask"], memory.mask.view(2, 10, 15))
    found["logits"] = apart(out["pred_logits"], outputs["logits"][-1])
    found["boxes"] = apart(out["pred_boxes"], outputs["boxes"][-1])
    found["first layer"] = max(apart(out["aux_logits_first"], outputs["logits"][0, :, :20]),
                               apart(out["aux_boxes_first"], outputs["boxes"][0, :, :20]))
    layer, image, query, target = matcher.match([(outputs["logits"], outputs["boxes"], goals)], model.cfg)[0]
    found["matches"] = different(out["match_layers"], torch.stack([image, query, target], -1).view(6, 8, 3))
    pairs = [torch.from_numpy(out[f"unit_giou_boxes{i}"]) for i in (1, 2)]
    found["giou"] = apart(out["unit_giou"], matcher.overlaps(pairs[0][:, None], pairs[1])[1])
    losses = matcher.Criterion(model.cfg)(outputs, goals)
    compare_losses(found, json.loads(str(out["losses"])), losses)
    norms = json.loads(str(out["grad_norms"]))["eval"]
    compare_gradients(found, model, losses["total"], norms, shared, case)
    compare_detections(found, out, outputs, model.cfg)
    compare_float32(found, out, model, shared)
    return found


def check_deformable(shared, case, variant, parameters, drawn=None, **quiet):
    """One of the deformable family; `drawn` (denoising): what training draws; `quiet`: its noise's overrides."""
    found = {}
    out, model, goals = read(shared, case), published_model(shared, case, variant, **quiet), targets(shared)
    cfg = model.cfg
    found["parameters"] = different(parameters, sum(p.numel() for p in model.parameters()))
    grads = json.loads(str(out["grads"]))
    with mock.patch.object(model, "decode", wraps=model.decode) as spy, torch.set_grad_enabled(drawn is None):
        outputs = model(*batch(shared))
    memory, _, reference, _ = probes(spy)
    found["memory"] = apart(out["memory_probe"], memory.tokens[0, :50, :16])
    found["valid_ratio"] = apart(out["probe_valid_ratios"], memory.valid)
    if "probe_init_reference" in out:
        found["reference"] = apart(out["probe_init_reference"], reference[:, :20])
    found["logits"] = apart(out["pred_logits"], outputs["logits"][-1])
    found["boxes"] = apart(out["pred_boxes"], outputs["boxes"][-1])
    found["first layer"] = max(apart(out["aux_logits_first"], outputs["logits"][0, :, :20]),
                               apart(out["aux_boxes_first"], outputs["boxes"][0, :, :20]))
    wanted = [("match_", 0, cfg.decoder_layers - 1), ("match_aux0_", 0, 0)]
    if "enc" in outputs:
        wanted.append(("match_enc_", 1, 0))
        enc = {key: outputs["enc"][key] for key in ("logits", "boxes")}
        if cfg.proposal_loss == "all":                        # the stored ones are the best 20 of all tokens, by index
            index = torch.from_numpy(out["enc_top_index"])[..., None]
            order = enc["logits"][..., 0].topk(cfg.num_queries).indices
            found["selection"] = different(out["enc_topk_index"], order)
            enc = {key: value.gather(1, index.expand(-1, -1, value.shape[-1])) for key, value in enc.items()}
        found["proposals"] = max(apart(out["enc_top_logits"], enc["logits"][:, :20]),
                                 apart(out["enc_top_boxes"], enc["boxes"][:, :20]))
    compare_matches(found, out, wanted, outputs, goals, cfg)
    losses = matcher.Criterion(cfg)(outputs, goals)
    compare_losses(found, json.loads(str(out["losses"])), losses)
    compare_detections(found, out, outputs, cfg)
    if drawn is not None:
        model.train()
        with mock.patch.object(model, "decode", wraps=model.decode) as spy, draws(**drawn):
            outputs = model(*batch(shared), goals)
        _, content, _, blocked = probes(spy)
        dn, P = outputs["dn"], len(blocked) - cfg.num_queries
        boxes = inverse_sigmoid(dn["queries"].boxes, cfg.logit_eps)
        found["dn queries"] = max(apart(out["dn_query_boxes_unsigmoid"], boxes),
                                  apart(out["dn_query_content_probe"], content[:, :P, [0, 1, 2, 3, 255]]))
        found["dn mask"] = different(out["attn_mask_packed"], np.packbits(blocked.numpy())) \
            + different(out["attn_mask_shape"], blocked.shape)
        found["dn outputs"] = max(
            apart(out[f"dn_{key}{which}"], dn[key][layer, :, :20])
            for key in ("logits", "boxes") for which, layer in (("", -1), ("_first", 0)))
        losses = matcher.Criterion(cfg)(outputs, goals)
        compare_losses(found, json.loads(str(out["train_losses"])), losses)
    compare_gradients(found, model, losses["total"], grads["params"], shared, case)
    if variant != "dino":
        compare_float32(found, out, model, shared)
    return found


def check_deformable_plain(shared):
    return check_deformable(shared, "deformable-r50", "deformable", 40_069_665)


def check_deformable_two_stage(shared):
    return check_deformable(shared, "deformable-two-stage-r50", "deformable_two_stage", 41_181_529)


def check_dn_deformable(shared):
    rows = 5 * 8                                                # groups x targets; no noise: the middle of the range
    drawn = {"rand": [torch.ones(rows), torch.full((rows, 4), 0.5)], "randint": [torch.zeros(rows, dtype=torch.long)]}
    return check_deformable(shared, "dn-deformable-r50", "dn", 47_429_154, drawn, box_noise=0.0)


def check_dino(shared):
    return check_deformable(shared, "dino-4scale-r50", "dino", 46_893_182, contrastive_noise(shared, 20 * 2 * 8))


# =========================================================================================================== DiffuDINO

class Rounded:
    """alpha-bar as the published code holds it: every function of it is a buffer of its own, rounded to float32."""

    def __init__(self, buffers, index=None):
        self.buffers, self.index = buffers, index

    def to(self, *_):
        return self

    def __getitem__(self, index):
        return Rounded(self.buffers, index)

    def __iter__(self):
        return (Rounded(self.buffers, i) for i in self.index)

    def take(self, name):
        return self.buffers[name][self.index]

    def sqrt(self):
        return self.take("sqrt_alphas_cumprod")

    def __rsub__(self, one):                                                                             # 1 - alpha-bar
        return mock.Mock(sqrt=lambda: self.take("sqrt_one_minus_alphas_cumprod"))

    def __rtruediv__(self, one):                                                                         # 1 / alpha-bar
        less = mock.Mock(sqrt=lambda: self.take("sqrt_recipm1_alphas_cumprod"))
        return mock.MagicMock(sqrt=lambda: self.take("sqrt_recip_alphas_cumprod"), __sub__=lambda _, one: less)


def check_diffu_dino(shared):
    found = {}
    check_schedule(shared, found)
    check_evaluation(shared, found)
    check_sampling(shared, found)
    check_vfl(shared, found)
    check_diffusion_training(shared, found)
    return found


def check_schedule(shared, found):
    out = read(shared, "diffu-dino-r50", "schedule.npz")
    for name in ("cosine", "linear", "sqrt"):
        found[f"schedule {name}"] = apart(out[f"alphas_cumprod_{name}"], diffusion.signal_rates(name, 100))
    found["times"] = sum(different(out[f"pairs_S{n}"], diffusion.times(100, n))
                         for n in (1, 2, 3, 4, 5, 8, 10, 25, 50, 100))


def noises(shared, count, images):
    """Standard normal states for `images` images, in the order in which the sampler draws them."""
    fill = load_fill(shared)
    return [row for k in range(count)
            for row in torch.from_numpy(fill.rng(f"noise{k}").standard_normal((images, 900, 4)))]


def check_evaluation(shared, found):
    """One evaluation of the decoder at t = 99."""
    case = "diffu-dino-r50"
    out = read(shared, case, "decoder.npz")
    model = published_model(shared, case, "diffu_dino_published", {}, evaluations=1)
    with mock.patch.object(model, "decode", wraps=model.decode) as spy, torch.no_grad(), \
            draws(randn=noises(shared, 2, 2)):
        outputs = model(*batch(shared))
    memory, content, reference, _ = probes(spy)
    found["memory"] = max(apart(out["memory_probe"], memory.tokens[0, :50, :16]),
                          apart(out["memory_probe_image1"], memory.tokens[1, :50, :16]))
    found["valid_ratio"] = apart(out["valid_ratios"], memory.valid)
    found["mask"] = sum(different(out[f"mask_{level}"].reshape(2, -1), mask) for level, mask in
                        enumerate(memory.mask.split([h * w for h, w in memory.shapes], 1)))
    found["reference"] = apart(out["reference_first20"], reference[:, :20])
    found["content"] = apart(out["content_first20"], content[:, :20, :16])
    found["proposals"] = max(apart(out["topk_boxes_first20"], outputs["enc"]["boxes"][:, :20]),
                             apart(out["topk_scores"], outputs["enc"]["logits"].amax(-1)))
    found["boxes"] = apart(out["boxes"], outputs["boxes"][-1])
    found["logits"] = apart(out["logits_first20_f64"], outputs["logits"][-1, :, :20])
    found["all logits (float32)"] = apart(out["logits"], outputs["logits"][-1])
    with torch.no_grad():                                      # again, as the sampler asks for the last layer only
        logits, boxes = model.decode(*spy.call_args.args, t=spy.call_args.kwargs["t"])
    found["first layer"] = max(apart(out["layer0_logits_first20"], logits[0, :, :20]),
                               apart(out["layer0_boxes_first20"], boxes[0, :, :20]))
    sizes = torch.tensor(load_fill(shared).SIZES)
    answers = evaluation.postprocess(outputs, sizes, model.cfg)
    found["detections"] = 0.0
    for i, answer in enumerate(answers):
        compare_answer(found, out, f"det{i}", answer)


def compare_answer(found, out, prefix, answer):
    found["detections"] = max(
        found["detections"], apart(out[prefix + "_scores"], answer["scores"][:50]),
        apart(out[prefix + "_boxes"], answer["boxes"][:50]), different(out[prefix + "_labels"], answer["labels"][:50]),
        different(out[prefix + "_count"], len(answer["scores"])))


def check_sampling(shared, found):
    """Three evaluations and one, renewal included: every reference, every box, the ensemble."""
    case, fill = "diffu-dino-r50", load_fill(shared)
    out, schedule = read(shared, case, "sample.npz"), read(shared, case, "schedule.npz")
    buffers = {name: torch.from_numpy(schedule[name]).double() for name in schedule if name.endswith("alphas_cumprod")}
    # The update's target time takes the square root of the rounded alpha-bar, unlike the noising in training.
    buffers["sqrt_alphas_cumprod"] = buffers["alphas_cumprod"].sqrt()
    buffers["sqrt_one_minus_alphas_cumprod"] = (1 - buffers["alphas_cumprod"]).sqrt()
    overrides = json.loads((Path(shared) / case / "meta.json").read_text())["overrides"]["sample.npz"]
    h, w = fill.SIZES[0]
    image, mask = torch.from_numpy(fill.image("image0", h, w))[None], torch.zeros(1, h, w, dtype=torch.bool)
    sizes = torch.tensor([[h, w]])
    found["sampling"] = found["renewal"] = 0.0
    for S in (3, 1):
        model = published_model(shared, case, "diffu_dino_published", overrides, evaluations=S)
        seen = []
        with torch.no_grad(), draws(randn=noises(shared, S + 1, 1)), \
                mock.patch("diffusion.signal_rates", lambda *_: Rounded(buffers)):
            outputs = model(image, mask, watch=seen.append)
        for k, step in enumerate(seen):
            prefix = f"S{S}_e{k}_"
            found["sampling"] = max(found["sampling"], apart(out[prefix + "ref"], step["references"][0]),
                                    apart(out[prefix + "box"], step["boxes"][0]),
                                    apart(out[prefix + "logits_first20"], step["logits"][0, :20]),
                                    apart(out[prefix + "maxscore"], step["logits"][0].sigmoid().amax(-1)))
            found["renewal"] += different(out[prefix + "keep"], step["keep"][0])
        answers = {"ens_nms": (outputs, model.cfg)} if S == 3 else {"final": (outputs, model.cfg)}
        if S == 3:
            answers["ens_nonms"] = outputs, model.cfg.but(ensemble_nms=1.0)
            answers["noens"] = outputs | {"evaluations": outputs["evaluations"][-1:]}, model.cfg
        for name, (o, cfg) in answers.items():
            compare_answer(found, out, f"S{S}_{name}", evaluation.postprocess(o, sizes, cfg)[0])


def check_vfl(shared, found):
    """The criterion alone: few and many targets, none in one image, and pairs whose GIoU is negative."""
    out = read(shared, "diffu-dino-r50", "loss.npz")
    criterion = matcher.Criterion(variant("diffu_dino_published"))
    found["vfl"] = found["vfl matches"] = 0.0
    for case in ("a", "carry", "none", "empty"):
        logits, boxes = (torch.from_numpy(out[f"{case}_{key}"])[None].requires_grad_() for key in ("logits", "boxes"))
        goals = [{"labels": torch.from_numpy(out[f"{case}_labels{i}"]),
                  "boxes": torch.from_numpy(out[f"{case}_target{i}"])} for i in (0, 1)]
        losses = criterion({"logits": logits, "boxes": boxes}, goals)
        total = losses["loss_class"] + 5 * losses["loss_bbox"] + 2 * losses["loss_giou"]
        gradients = torch.autograd.grad(total, (logits, boxes))
        _, image, query, target = matcher.match([(logits, boxes, goals)], criterion.cfg)[0]
        for i in (0, 1):
            order = query[image == i].argsort()
            found["vfl matches"] += different(out[f"{case}_src{i}"], query[image == i][order])
            found["vfl matches"] += different(out[f"{case}_tgt{i}"], target[image == i][order])
        found["vfl"] = max(found["vfl"], *(relative(out[f"{case}_loss_{k}"], losses[f"loss_{k}"])
                                           for k in ("class", "bbox", "giou")),
                           apart(out[f"{case}_grad_logits"], gradients[0][0]),
                           apart(out[f"{case}_grad_boxes"], gradients[1][0]))
    # Fixed pairs far apart: query 20 + g has target g, in both images, and every GIoU is negative.
    given = {key: torch.from_numpy(out[f"a_{key}"])[None] for key in ("logits", "boxes")}
    goals = [{"labels": torch.from_numpy(out[f"a_labels{i}"]), "boxes": torch.from_numpy(out[f"a_target{i}"])}
             for i in (0, 1)]
    image = torch.tensor([0] * len(goals[0]["labels"]) + [1] * len(goals[1]["labels"]))
    target = torch.cat([torch.arange(len(g["labels"])) for g in goals])
    criterion.num_boxes, losses = len(image), {}
    criterion.supervise(losses, "", given["logits"], given["boxes"], goals, (image * 0, image, 20 + target, target),
                        [len(image)])
    found["vfl"] = max(found["vfl"], *(relative(out[f"a_given_loss_{k}"], losses[f"loss_{k}"])
                                       for k in ("class", "bbox", "giou")))


def check_diffusion_training(shared, found):
    """Training: noised references, denoising queries, losses, matches, gradients of every parameter."""
    case, fill = "diffu-dino-r50", load_fill(shared)
    out, schedule = read(shared, case, "train.npz"), read(shared, case, "schedule.npz")
    buffers = {name: torch.from_numpy(schedule[name]).double() for name in schedule if name.endswith("alphas_cumprod")}
    model = published_model(shared, case, "diffu_dino_published", {}).train()
    for p in model.parameters():
        p.requires_grad_(True)                                                    # its authors train the stem as well
    goals = [{"labels": torch.from_numpy(out[f"target{i}_labels"]), "boxes": torch.from_numpy(out[f"target{i}_boxes"])}
             for i in (0, 1)]
    drawn = contrastive_noise(shared, 8 * 2 * 60)
    drawn["randint"] = [torch.tensor([30, 70]), *drawn["randint"]]
    drawn["randn"] = [torch.from_numpy(fill.rng(f"{key}{i}").standard_normal((rows, 4)))
                      for i, n in enumerate(fill.COUNTS) for key, rows in (("pad", 900 - n), ("q", 900))]
    with mock.patch.object(model, "decode", wraps=model.decode) as spy, \
            draws(**drawn, randperm=lambda n, **_: torch.arange(n)), \
            mock.patch("diffusion.signal_rates", lambda *_: Rounded(buffers)):
        outputs = model(*batch(shared), goals)
    _, content, reference, blocked = probes(spy)
    dn, P = outputs["dn"], len(blocked) - 900
    found["training references"] = max(apart(out["reference_diffusion"], reference[:, P:]),
                                       apart(out["reference_dn_first20"], reference[:, :20]))
    found["training content"] = max(apart(out["query_dn_first20"], content[:, :20, :16]),
                                    apart(out["query_diffusion_first20"], content[:, P:P + 20, :16]))
    found["training mask"] = different(out["attn_mask_rowsum"], blocked.sum(1)) \
        + different(out["attn_mask_colsum"], blocked.sum(0)) + different(out["attn_mask_shape"], blocked.shape)
    found["training outputs"] = max(
        apart(out["boxes"], outputs["boxes"][-1]), apart(out["logits_first20"], outputs["logits"][-1, :, :20]),
        apart(out["layer0_logits_first20"], outputs["logits"][0, :, :20]),
        apart(out["layer0_boxes_first20"], outputs["boxes"][0, :, :20]),
        apart(out["enc_logits_first20"], outputs["enc"]["logits"][:, :20]),
        apart(out["enc_boxes_first20"], outputs["enc"]["boxes"][:, :20]),
        apart(out["dn_logits_first20"], dn["logits"][-1, :, :20]),
        apart(out["dn_boxes_first20"], dn["boxes"][-1, :, :20]))
    wanted = [("match_last_", 0, 5), ("match_enc_", 1, 0)] + [(f"match_{i}_", 0, i) for i in range(5)]
    compare_matches(found, out, wanted, outputs, goals, model.cfg)
    losses = matcher.Criterion(model.cfg)(outputs, goals)
    names = [str(name) for name in out["loss_names"]]
    compare_losses(found, {"unweighted": dict(zip(names, out["loss_values"])), "weights": names,
                           "weighted_total": out["loss_total"]}, losses)
    norms = dict(zip((str(name) for name in out["grad_names"]), out["grad_norms"].tolist()))
    compare_gradients(found, model, losses["total"], norms, shared, case)


# ========================================================================================================= transforms

class Scripted(random.Random):
    """Draws what it is told to, in order."""

    def __init__(self, **answers):
        super().__init__()
        for kind, values in answers.items():
            setattr(self, kind, lambda *_, values=list(values): values.pop(0))


def check_transforms(shared):
    """Preprocessing on a real photo, which lies beside the numbers: sizes and boxes exactly, pixels to 1e-6."""
    truth = read(shared, "transforms")
    for w, h, size, out_h, out_w in truth["size_table"].tolist():
        assert data.resized(w, h, abs(size), 1333 if size > 0 else None) == (out_h, out_w), (w, h, size)
    assert data.resized(640, 480, 800, 1333) == tuple(truth["resized_hw_640x480"])

    # evaluation, through a data set so that boxes take the whole way
    photo = data.read_photo(Path(shared).parent / "data/coco_tiny/val2017/000000532481.jpg")
    assert photo.size == tuple(truth["original_hw"][::-1])
    boxes, labels = truth["boxes_in_xyxy"], np.array([1, 2])
    sample = data.ToyShapes(1, transform=data.eval_transform())
    sample.read = lambda i: (photo, boxes, labels)
    image, target = sample[0]
    image = data.normalised(image)
    assert image.shape[1:] == tuple(truth["resized_hw"])
    assert target["orig_size"].tolist() == truth["original_hw"].tolist()
    assert target["size"].tolist() == truth["size_out"].tolist()
    assert torch.allclose(target["boxes"], torch.tensor(truth["boxes_out_cxcywh"]), rtol=0, atol=1e-6)
    area = target["boxes"][:, 2:].prod(1) * target["size"].prod()
    assert np.allclose(area, truth["area_out"], rtol=1e-5)
    decoded = np.asarray(photo)
    same_decoder = decoded.sum((0, 1)).tolist() == truth["decoded_sum"].tolist()  # JPEG decoders may differ
    assert np.abs(decoded[:16, :16].astype(int) - truth["decoded_patch_uint8"]).max() <= 1
    patches = {"patch": image[:, :16, :16], "patch_bottom_right": image[:, -16:, -16:],
               "patch_centre": image[:, 400:416, 600:616]}
    worst = max(np.abs(patch.numpy() - truth[name]).max() for name, patch in patches.items())
    assert worst <= (1e-6 if same_decoder else 0.05), worst
    statistics = torch.stack([image.double().mean((1, 2)), image.double().std((1, 2))], 1)
    assert np.allclose(statistics, truth["mean_std"], atol=1e-5 if same_decoder else 1e-2)

    # flip alone, at a scale that leaves the photo as it is
    _, flipped, _ = data.train_transform(426, 1333, crop=False)(photo, boxes, labels, Scripted(random=[0.0]))
    assert np.allclose(flipped, truth["hflip_boxes"], rtol=0, atol=1e-4)

    # crop alone: no flip, and the two resizes are to the size that the photo and the crop already have
    top, left, height, width = truth["crop_region_top_left_h_w"].tolist()
    draws = Scripted(random=[0.9, 0.0], choice=[min(photo.size), min(width, height)],
                     randint=[width, height, left, top])
    cut, moved, kept = data.train_transform()(photo, boxes, labels, draws)
    inside = decoded[top:top + height, left:left + width]  # the published crop reaches below the photo
    assert cut.size == (width, height) and np.array_equal(np.asarray(cut)[:len(inside)], inside)
    assert kept.tolist() == truth["crop_labels"].tolist()
    assert np.allclose(moved, truth["crop_boxes"], rtol=0, atol=1e-4)
    assert np.allclose((moved[:, 2:] - moved[:, :2]).prod(1), truth["crop_area"], rtol=1e-5)
    return {"patches, float32": float(worst)}


CHECKS = {
    "transforms": check_transforms, "msda": check_msda, "detr-r50": check_detr, "deformable-r50": check_deformable_plain,
    "deformable-two-stage-r50": check_deformable_two_stage, "dn-deformable-r50": check_dn_deformable,
    "dino-4scale-r50": check_dino, "diffu-dino-r50": check_diffu_dino,
}


def main(shared, *cases):
    failed = False
    for case in cases or CHECKS:
        found = CHECKS[case](shared)
        for name, deviation in found.items():
            good = deviation <= next(limit for words, limit in TOLERANCE.items() if words in name)
            failed |= not good
            print(f"{case:26} {name:24} {deviation:9.1e}" + ("" if good else "   DEVIATES"), flush=True)
        largest = max(value for name, value in found.items() if "in float32" not in name)
        print(f"{case:26} {'LARGEST in float64':24} {largest:9.1e}", flush=True)
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
