"""The models against the published code, in float64: every number that a paper's authors compute.

    python tests/test_parity.py FOLDER [case ...]   prints case, what, deviation; exit code 1 if any
    python tests/test_parity.py FOLDER --sample     writes published.npz, which the tests here read

FOLDER holds the names and shapes of published state dicts, and what the authors' code gives for
weights and inputs made from names. Numbers may deviate by 1e-8, or 1e-6 of the largest if stored in
float32. A new case is a row of CASES, and a new number a line of `run`.
"""
import json
import re
import sys
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torchvision.ops import box_convert

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import diffusion
import eval as evaluation
import matcher
import msda
import weights
from model import build_model, inverse_sigmoid
from variants import variant

PUBLISHED = Path(__file__).with_name("published.npz")
SIZES, COUNTS = [(320, 416), (256, 480)], [5, 3]  # (h, w) and number of targets of the two images
# The published noise schedule holds its roots in float32; nothing else here takes any.
ROUNDED = mock.patch.object(torch.Tensor, "sqrt", lambda x: torch.sqrt(x).float().double())


def read(source, case, file):
    """What a folder or published.npz stores: {name: tensor or text}, or a JSON file's content."""
    if source.is_file():
        packed, start = np.load(source), f"{case}/{file}/"
        found = {key[len(start):]: packed[key] for key in packed if key.startswith(start)}
    else:
        path, = (source / case).glob(f"{file}.*")
        found = np.load(path) if path.suffix == ".npz" else {"": np.array(path.read_text())}
    return json.loads(found[""].item()) if "" in found else {
        k: a.tolist() if a.dtype.kind == "U" else torch.from_numpy(a) for k, a in found.items()}


def sample(folder):
    """Write published.npz: of arrays of more than 450 entries about 150, elsewhere NaN."""
    kept = {}
    for file in (file for case in CASES for file in sorted((folder / case).iterdir())):
        arrays = np.load(file) if file.suffix == ".npz" else {"": np.array(file.read_text())}
        for name, a in arrays.items():
            if a.size > 450 and not re.fullmatch("(a|carry|none|empty)_logits", name):  # inputs
                a = np.where(rng(name).random(a.shape) < 150 / a.size, a, np.nan)
            kept[f"{file.parent.name}/{file.stem}/{name}"] = a
    np.savez_compressed(PUBLISHED, **kept)


def rng(name):
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def normal(name, *shape):
    return torch.from_numpy(rng(name).standard_normal(shape))


def fill(key, shape):
    """A tensor from its name and shape: unit variance out for unit variance in."""
    low, high = (0.8, 1.2) if key.endswith("weight") else (-0.1, 0.1)
    if len(shape) >= 2:
        high = (3.0 / int(np.prod(shape[1:]))) ** 0.5
        low = -high
    for end, *limits in (("running_var", 0.5, 1.5), ("running_mean", -0.2, 0.2),
                         ("sampling_offsets.bias", -2.0, 2.0)):
        low, high = limits if key.endswith(end) else (low, high)
    return torch.from_numpy(rng(key).uniform(low, high, shape))


def batch(num_classes=91, sizes=SIZES, name="image"):
    """Two images of different size, padded to [2, 3, 320, 480], their mask, and their targets."""
    padded, targets = np.max(sizes, 0).tolist(), []
    images, mask = torch.zeros(2, 3, *padded).double(), torch.ones(2, *padded).bool()
    for i, ((h, w), count) in enumerate(zip(sizes, COUNTS)):
        g, (y, x) = rng(f"{name}{i}"), np.mgrid[0:h, 0:w] / 64.0
        waves = np.stack([np.sin(g.uniform(0.5, 2, 1) * x + g.uniform(0.5, 2, 1) * y
                                 + g.uniform(0, 6, 1)) for _ in range(3)])
        images[i, :, :h, :w] = torch.from_numpy(waves + 0.3 * g.standard_normal((3, h, w)))
        mask[i, :h, :w] = False
        g = rng(f"target{i}")
        labels, wh = g.integers(0, num_classes, count), g.uniform(0.05, 0.4, (count, 2))
        boxes = np.concatenate([g.uniform(0.0, 1.0, (count, 2)) * (1 - wh) + wh / 2, wh], 1)
        targets.append({"labels": torch.from_numpy(labels), "boxes": torch.from_numpy(boxes)})
    return images, mask, targets


def state_dict(source, case, file="out"):
    """A published state dict, rebuilt from its names and shapes."""
    meta, state = read(source, case, "meta"), {}
    rule = next((meta[key] for key in ("fill", "weights") if type(meta.get(key)) is dict), meta)
    overrides = rule.get("overrides") or meta["overrides"].get(f"{file}.npz", {})
    for key, shape in read(source, case, "keys"):
        name = next((new + key[len(old):] for old, new in rule["aliases"].items()
                     if key == old or old.endswith(".") and key.startswith(old)), key)
        change = overrides.get(name, {})
        value = fill(name, shape) * change.get("scale", 1) + change.get("add", 0)
        state[key] = torch.as_tensor(change.get("set", value), dtype=torch.float64)
    return state


def pinned(draws):
    """torch.rand, randn, ... give the listed tensors, in order."""
    return mock.patch.multiple(torch, **{name: mock.Mock(side_effect=draws.get(name, []))
                                         for name in ("rand", "randn", "randint", "randperm")})


def contrastive(rows, *before):
    """What CDN draws: no flipped label (a draw of 1 is never below the share), signs and parts."""
    signs = torch.from_numpy(rng("cdn_sign").integers(0, 2, (rows, 4)))
    return dict(rand=[torch.ones(rows), torch.from_numpy(rng("cdn_part").random((rows, 4)))],
                randint=[*before, torch.zeros(rows).long(), signs])


# ================================ what is compared: (names in the file, ours[, it should be])

def owned(index, layer, groups=1, queries=0):
    """Which queries of a layer own which targets, in the queries' order, by image. Of several
    groups with so many queries each, they are counted through."""
    found = {}
    for i in (0, 1):
        part, _, query, target = torch.stack(index)[
            :, (index[0] // groups == layer) & (index[1] == i)]
        query = part % groups * queries + query
        found |= {f"src{i}": query[query.argsort()], f"tgt{i}": target[query.argsort()]}
    return found


def compared(total, losses, said):
    """Losses by size, as every project has its own names, as parts of theirs, of which some are 0:
    authors log absent denoising queries."""
    theirs = torch.tensor([x for x in said if x], dtype=torch.float64).sort().values
    ours = torch.stack([total, *matcher.named(losses).values()]).sort().values
    return ours / theirs, torch.ones_like(ours)


def gradients(wanted, state, model, total):
    """Every parameter's gradient: norm and product with a random direction, as parts of its norm,
    or of 1e-7 of all gradients' norm: below, as in a key's bias under softmax, all is rounding."""
    names = {key: own for key, own in weights.own_names(state, model.cfg).items() if key in wanted}
    assert len(set(names.values())) == len(wanted)
    found = torch.autograd.grad(total, [model.get_parameter(own) for own in names.values()])
    floor = 1e-7 * torch.stack([g.norm() for g in found]).norm()
    for key, g in zip(names, found):
        want = torch.tensor(wanted[key], dtype=torch.float64).view(-1)
        ours = torch.stack([g.norm(), (g * normal("grad:" + key, *g.shape)).sum()])
        yield "gradients", ours / want[0].clamp(floor), want / want[0].clamp(floor)


def forward(model, images, mask, targets):
    """-> outputs, total, losses, how decode() was called, and the assignments."""
    with mock.patch.object(model, "decode", wraps=model.decode) as decode, \
            mock.patch("matcher.match", wraps=matcher.match) as match:
        outputs = model(images, mask, targets)
        total, losses = matcher.Criterion(model.cfg)(outputs, targets)
    return outputs, total, losses, decode.call_args, matcher.match(*match.call_args.args)


def said_losses(total, losses, said):
    return "losses", *compared(total, losses, [
        said["weighted_total"], *map(said["unweighted"].get, said["weights"])])


def run(source, case, file, name, also="", changes={}, draws={}):
    """A model's run, also: train, gradients (from published.npz two models', for time)."""
    stored, state = read(source, case, file), state_dict(source, case, file)
    grad = "gradients" in also and (source.is_dir() or name in ("deformable", "dino"))
    model = build_model(name, **changes).double().train("train" in also).requires_grad_()
    weights.load_weights(model, state)
    cfg, (images, mask, targets) = model.cfg, batch(model.cfg.num_classes)
    for target, (h, w) in zip(targets if cfg.masks else (), SIZES):  # each box, filled
        x0, y0, x1, y1 = (box_convert(target["boxes"], "cxcywh", "xyxy")
                          * torch.tensor([w, h, w, h])).T[..., None]
        x, y = torch.arange(w), torch.arange(h)
        target["masks"] = ((y > y0 - 1) & (y < y1))[..., None] & ((x > x0 - 1) & (x < x1))[:, None]
    with pinned(draws), ROUNDED, torch.set_grad_enabled(grad):
        outputs, total, losses, call, pairs = forward(model, images, mask, targets)
    *_, reference, blocked = (*call.args, None)[:6]
    logits, boxes, enc, dn = map(outputs.get, ("logits", "boxes", "enc", "dn"))
    if "sampled" in outputs:  # the sampler asks for the last layer only
        logits, boxes, _ = model.decode(*call.args, t=call.kwargs["t"])
    if enc and cfg.proposal_loss == "all":  # stored: the best 20 of all tokens
        enc = {key: x[[[0], [1]], stored["enc_top_index"]] for key, x in enc.items()}
    P = dn["logits"].shape[2] if dn else 0
    if reference is not None:
        yield "probe_init_reference reference_first20 reference_diffusion", reference[:, P:]
    for key, x in (("logits", logits), ("boxes", boxes)):
        yield f"pred_{key} {key} {key}_first20_f64", x[-1]
        yield f"aux_{key}_first layer0_{key}_first20", x[0]
        if enc:
            yield f"enc_top_{key} enc_{key}_first20 topk_{key}_first20", enc[key]
        if dn:
            yield f"dn_{key} dn_{key}_first20", dn[key][-1]
    if cfg.masks:
        drawn = outputs["masks"](torch.arange(2).repeat_interleave(5), torch.arange(5).repeat(2))
        yield "pred_masks", drawn.unflatten(0, (2, 5))[..., ::4, ::4]
    if dn:
        yield "dn_query_boxes_unsigmoid", inverse_sigmoid(dn["queries"].boxes, cfg.logit_eps)
        yield "reference_dn_first20", reference
        yield "attn_mask_packed", np.packbits(blocked.numpy())
    yield "match_layers", torch.stack(pairs[0][1:], -1).view(len(outputs["logits"]), -1, 3)
    yield "match_0_* match_aux0_*", owned(pairs[0], 0)
    yield "match_* match_last_*", owned(pairs[0], len(logits) - 1)
    yield "match_enc_*", owned(pairs[-1], 0)
    post = evaluation.postprocess(outputs, torch.tensor([(480, 640), (384, 720)]), cfg)
    yield "post_*", {key: torch.stack([x[key] for x in post]) for key in post[0]}
    if "loss_total" in stored:
        yield "losses", *compared(total, losses, [stored["loss_total"], *stored["loss_values"]])
    elif said := json.loads(stored.get("train_losses" if "train" in also else "losses", "null")):
        yield said_losses(total, losses, said)
    if not grad:
        return
    if "grad_names" in stored:
        wanted = dict(zip(stored["grad_names"], stored["grad_norms"].tolist()))
    else:
        said = json.loads(stored.get("grads") or stored["grad_norms"])
        wanted = said.get("params") or said["eval"]
    yield from gradients(wanted, state, model, total)
    if name == "deformable" and source.is_dir():
        logits = model.float()(images.float(), mask)["logits"]
        yield "pred_logits_in_float32", logits[-1] / 1e3, stored["pred_logits"] / 1e3  # to 1e-5


def watched(model):
    """What the parts of a model with a ViT compute, {name: tensor}, once it has run."""
    stage, seen = model.input_proj.stages[0], {}
    parts = dict(patch=model.backbone.patch_embed, stage0_cv1=stage[0].cv1, stage0_c2f=stage[0],
                 proj0=stage)
    parts |= {f"block{i}": block for i, block in enumerate(model.backbone.blocks)}
    for i, layer in enumerate(model.decoder):
        parts |= {f"dec{i}": layer, f"dec{i}_sa": layer.self_attn, f"dec{i}_ca": layer.cross_attn}
    for name, part in parts.items():
        part.register_forward_hook(lambda *given, name=name: seen.update({name: given[2]}))
    for names, part in ((["embeddings"], model.backbone.blocks[0]),
                        (["init_content", "query_pos"], model.decoder[0])):
        part.register_forward_pre_hook(lambda _, x, names=names: seen.update(zip(names, x)))
    model.backbone.register_forward_hook(
        lambda _, __, maps: seen.update({f"c{i}": x for i, x in enumerate(maps)}))
    return seen


def vit(source, case, file, name, also=""):
    """LW-DETR's and RF-DETR's run on squares. also: alt, another size; train, the form with 13
    groups, whose batch norm takes running statistics, or "statistics", the batch's; gradients."""
    meta, stored, state = (*(read(source, case, f) for f in ("meta", file)),
                           state_dict(source, case))
    training, chosen = "train" in also, []

    def topk(x, count, dim):
        chosen.append(torch.topk(x, count, dim).indices)
        return torch.topk(x, count, dim)

    model = build_model(name).double().train(training).requires_grad_()
    seen = watched(model)
    weights.load_weights(model, state)
    if "statistics" not in also:
        model.input_proj.eval()
    side = meta["checks"]["alt_resolution"] if also == "alt" else meta["resolution"]
    images, mask, targets = batch(91, [(side, side)] * 2, "alt" if also == "alt" else "image")
    grad = "gradients" in also and (source.is_dir() or name == "lw_tiny")
    with mock.patch.object(torch.Tensor, "topk", topk), torch.set_grad_enabled(grad):
        outputs, total, losses, call, pairs = forward(model, images, mask, targets)
    said = json.loads(stored["losses" if training else "eval_losses"])
    if "statistics" in also:
        said = json.loads(stored["losses_bn_batch_statistics"])
        yield "bn_running_after", model.input_proj.stages[0][0].cv1[1].running_mean
    if also != "alt":
        yield said_losses(total, losses, said)
    if "statistics" in also:
        return
    if grad:
        yield from gradients(json.loads(stored["grads"])["params"], state, model, total)

    logits, boxes, enc = outputs["logits"][-1], outputs["boxes"][-1], outputs["enc"]
    prefix = {"": "", "alt": "alt_"}.get(also, "train_")
    sums = {"pred_logits": logits, "pred_boxes": boxes}
    if training:
        sums |= {f"enc_pred_{key}": x for key, x in enc.items()}
    if not also:
        sums |= seen | {"patch": seen["patch"].permute(0, 2, 3, 1)}
    for key, want in json.loads(stored[prefix + "sums"]).items():
        ours = (sums[key] * normal(f"probe:{prefix}{key}", *sums[key].shape)).sum()
        yield f"{prefix}sums", ours / want, torch.ones(())
    if also == "alt":
        yield "alt_*", dict(logits=logits, boxes=boxes, c0=seen["c0"])
        return
    groups, Q, L = outputs.get("query_groups", 1), model.cfg.num_queries, len(outputs["logits"])
    if training:
        yield "train_enc_topk_index", torch.stack(chosen)
        yield "train_*_first_of_group", {  # of the first three queries
            key: outputs[key][-1].unflatten(1, (groups, Q)) for key in ("logits", "boxes")}
        for l in range(L):
            yield f"match_{f'aux{l}_' * (l < L - 1)}*", owned(pairs[0], l, groups, Q)
        yield "match_enc_*", owned(pairs[1], 0, groups, Q)
        return
    yield "match_eval_*", owned(pairs[0], L - 1)
    yield "enc_topk_index enc_top_index", chosen[0]
    yield "probe_*", seen | {"init_reference": call.args[4],
                             "hs_first": outputs["states"][0], "hs_last": outputs["states"][-1]}
    yield "memory_probe", seen["proj0"][0].flatten(1).T
    for key, x in (("logits", logits), ("boxes", boxes)):
        yield f"pred_{key}", x
        yield f"aux_{key}_first", outputs[key][0]
        yield f"enc_top_{key}", enc[key]
    post = evaluation.postprocess(outputs, torch.tensor([(480, 640), (500, 375)]), model.cfg)
    yield "post_*", {key: torch.stack([x[key] for x in post]) for key in post[0]}


def schedule(source, case, file):
    yield "alphas_cumprod_*", {
        name: diffusion.signal_rates(name, 100) for name in ("cosine", "linear", "sqrt")}
    yield "pairs_S*", {str(n): diffusion.times(100, n) for n in (1, 2, 3, 4, 5, 8, 10, 25, 50, 100)}


def sampling(source, case, file):
    """Three sampling steps, renewal included: every reference and box, and the ensemble."""
    model, (images, mask, _) = build_model("diffu_dino_published").double().eval(), batch()
    weights.load_weights(model, state_dict(source, case, file))
    model.cfg, steps = model.cfg.but(sampling_steps=3), []
    def add_noise(x0, noise, rate):  # the published sampler rounds alpha-bar, not its roots
        rate = rate.float().double()
        return torch.sqrt(rate) * x0 + torch.sqrt(1 - rate) * noise
    draws = dict(randn=[normal(f"noise{k}", 900, 4) for k in range(4)])
    with torch.no_grad(), pinned(draws), ROUNDED, mock.patch("diffusion.add_noise", add_noise):
        outputs = model(images[:1, :, :, :416], mask[:1, :, :416], watch=steps.append)
    for k, step in enumerate(steps):
        yield f"S3_e{k}_*", dict(ref=step["references"][0], box=step["boxes"][0],
                                 keep=step["keep"][0], logits_first20=step["logits"][0])
    answer, = evaluation.postprocess(outputs, torch.tensor(SIZES[:1]), model.cfg)
    yield "S3_ens_nms_*", answer


def vfl(source, case, file):
    """The criterion alone: few and many targets, none in one image, pairs of negative GIoU."""
    stored, criterion = read(source, case, file), matcher.Criterion(variant("diffu_dino_published"))
    for part in ("a", "carry", "none", "empty"):
        outputs = {key: stored[f"{part}_{key}"][None] for key in ("logits", "boxes")}
        targets = [{"labels": stored[f"{part}_labels{i}"], "boxes": stored[f"{part}_target{i}"]}
                   for i in (0, 1)]
        losses = criterion(outputs, targets)[1]["main"]
        yield f"{part}_loss_*", {key: x[0] for key, x in losses.items()}


def operator(source, case, file):
    """Deformable attention's definition, with which test_msda.py compares the rest."""
    places = torch.from_numpy(rng("msda_loc").uniform(-0.2, 1.2, (2, 50, 8, 4, 4, 2)))
    share = normal("msda_attn", 2, 50, 8, 16).softmax(-1).view(2, 50, 8, 4, 4)
    yield "output", msda.msda_grid_sample(
        normal("msda_value", 2, 256, 8, 32), [(12, 16), (6, 8), (3, 4), (2, 2)], places, share)


def transforms(source, case, file):
    """Evaluation's sizes; and the pixels of an image where there is one, which FOLDER lacks."""
    stored = read(source, case, file)
    yield "size_table", [(w, h, size, *data.resized(w, h, abs(size), 1333 if size > 0 else None))
                         for w, h, size, *_ in stored["size_table"].tolist()]
    file = source.parent / "data/coco_tiny/val2017/000000532481.jpg"
    if file.exists():
        image, *_ = data.eval_transform()(data.read_image(file), np.zeros((0, 4)), None, None)
        x = data.normalised(data.pil_to_tensor(image))
        yield "patch", x
        yield "patch_bottom_right", x[:, -16:, -16:]


CASES = {  # [(what is compared, with which file, a run's variant, options, changes and draws)]
    "transforms": [(transforms, "out")],
    "msda": [(operator, "out")],
    "detr-r50": [(run, "out", "detr", "gradients")],
    "detr-panoptic-r50": [(run, "out", "detr_panoptic")],
    "conditional-r50": [(run, "out", "conditional", "gradients")],
    "dab-r50": [(run, "out", "dab", "gradients")],
    "deformable-r50": [(run, "out", "deformable", "gradients")],
    "deformable-two-stage-r50": [(run, "out", "deformable_two_stage", "gradients")],
    "dn-deformable-r50": [(run, "out", "dn"), (
        run, "out", "dn", "train gradients", dict(box_noise=0.0), dict(
            rand=[torch.ones(40), torch.full((40, 4), 0.5)], randint=[torch.zeros(40).long()]))],
    "dino-4scale-r50": [(run, "out", "dino"), (
        run, "out", "dino", "train gradients", {}, contrastive(320))],
    "lwdetr-tiny": [
        (vit, "out", "lw_tiny"), (vit, "out", "lw_tiny", "alt"),
        (vit, "out", "lw_tiny", "train gradients"), (vit, "out", "lw_tiny", "train statistics")],
    "rfdetr-nano": [(vit, "out", "rf_nano"), (vit, "out", "rf_nano", "alt"),
                    (vit, "out", "rf_nano", "train gradients")],
    "diffu-dino-r50": [
        (schedule, "schedule"), (vfl, "loss"), (sampling, "sample"),
        (run, "decoder", "diffu_dino_published", "", dict(sampling_steps=1),
         dict(randn=[x for k in (0, 1) for x in normal(f"noise{k}", 2, 900, 4)])),
        (run, "train", "diffu_dino_published", "train gradients", {}, contrastive(
            960, torch.tensor([30, 70])) | dict(randperm=[torch.arange(900)] * 2, randn=[
                normal(f"{key}{i}", rows, 4) for i, n in enumerate(COUNTS)
                for key, rows in (("pad", 900 - n), ("q", 900))]))],
}


def deviations(source, case):
    """{what: (largest deviation, its limit)}; names that differ in numbers only are one."""
    found = {}
    for check, file, *row in CASES[case]:
        stored = read(source, case, file)
        for names, ours, *given in check(source, case, file, *row):
            wanted = {names: given[0]} if given else stored
            ours = ours if isinstance(ours, dict) else {"": ours}
            pairs = [(n.replace("*", key), x) for key, x in ours.items() for n in names.split()]
            for name, x in pairs:
                if name not in wanted:
                    continue
                want = torch.as_tensor(wanted[name])
                have = torch.as_tensor(x).detach().double()
                if not re.search("(src|tgt)[01]$", name):  # one match too many must show
                    have = have[tuple(map(slice, want.shape))]  # stored are the first few
                assert have.shape == want.shape, f"{case} {name}: {have.shape}, not {want.shape}"
                gap = (have - want.double()).abs()[~want.isnan()].nan_to_num(np.inf).max().item()
                rounded = want.dtype == torch.float32
                limit = 1e-6 * max(1, want.nan_to_num().abs().max().item()) if rounded else 1e-8
                what = f"{file} {re.sub('[0-9]+', '#', name)}"
                found[what] = max(found.get(what, (0, 0)), (gap, limit))
    return found


def main(folder, *chosen):
    if "--sample" in chosen:
        return sample(Path(folder))
    failed = 0
    for case in chosen or CASES:
        for what, (deviation, limit) in deviations(Path(folder), case).items():
            failed |= int(deviation > limit)
            print(f"{case:25} {what:36} {deviation:9.1e}", "DEVIATES" * (deviation > limit))
    return failed


def compare(case):
    wrong = {k: v for k, v in deviations(PUBLISHED, case).items() if v[0] > v[1]}
    assert not wrong, wrong


for case in CASES:
    globals()["test_parity_" + case.replace("-", "_")] = lambda case=case: compare(case)

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 1 else __doc__)
