"""Tests of weights.py: names, recognition, loading; what is said of a file that does not fit."""
import argparse
import itertools
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
import torchvision

import variants
import weights
from model import build_model
from tests.fixtures import refused
from tests.test_parity import PUBLISHED, read

FILES = [  # variant, overrides, filename, and the folder of parity's that has such names
    ("detr", {}, "detr-r50-e632da11.pth", "detr-r50"),
    ("conditional", {}, "ConditionalDETR_r50_epoch50.pth", "conditional-r50"),
    ("dab", {}, "R50/checkpoint.pth", "dab-r50"),
    ("deformable", {}, "r50_deformable_detr-checkpoint.pth", "deformable-r50"),
    ("deformable_refine", {}, "plus_iterative.pth", "deformable-two-stage-r50"),
    ("deformable_two_stage", {}, "plus_two_stage.pth", "deformable-two-stage-r50"),
    ("dn", {}, "checkpoint.pth", "dn-deformable-r50"),
    ("dino", {}, "checkpoint0011_4scale.pth", "dino-4scale-r50"),
    ("diffu_dino_published", {}, "model_final.pth", "diffu-dino-r50"),
    ("dino", dict(num_classes=7, num_queries=30), "my.pth", "dino-4scale-r50"),
    ("detr_dc5", {}, "detr-r50-dc5-f0fb7ef5.pth", "detr-r50"),
    ("detr_panoptic", {}, "detr-r50-panoptic-00ce5173.pth", "detr-panoptic-r50"),
    ("detr_panoptic_dc5", {}, "detr-r50-dc5-panoptic-da08f1b1.pth", "detr-panoptic-r50"),
    ("detr", dict(masks=True), "instances.pth", "detr-panoptic-r50"),
    ("deformable_single", dict(dilation=True), "single_scale_dc5.pth", "deformable-r50"),
    ("dab", dict(dilation=True), "R50_DC5/checkpoint.pth", "dab-r50"),
    ("dn_dab", {}, "checkpoint_optimized_44.7ap.pth", "dab-r50"),
    ("align", {}, "align.pth", "dino-4scale-r50"),
    ("align_published", {}, "align_detr_r50_24e.pth", "diffu-dino-r50"),
    ("diffu_align_published", {}, "diffu_align_detr_r50.pth", "diffu-dino-r50"),
    ("lw_tiny", {}, "LWDETR_tiny_60e_coco.pth", "lwdetr-tiny"),
    ("lw_medium", {}, "LWDETR_medium_60e_coco.pth", "lwdetr-tiny"),
    ("lw_xlarge", {}, "LWDETR_xlarge_60e_coco.pth", "lwdetr-tiny"),
    ("rf_nano", {}, "rf-detr-nano.pth", "rfdetr-nano"),
    ("rf_base", {}, "rf-detr-base.pth", "rfdetr-nano"),
    ("rf_base", dict(vit_width=768, vit_heads=12, d_model=384, heads=12, cross_heads=24, levels=2,
                     points=4), "rf-detr-large.pth", "rfdetr-nano")]
TINY = dict(backbone="resnet18", backbone_norm="batch", d_model=64, ffn=64, decoder_layers=2)


def again(keys, part, others):
    """The keys that hold a part, with others in its place."""
    return [k.replace(part, other) for k in keys if part in k for other in others]


def published(name, changes, file, case):
    """A model, and zeros of its shapes under the names of a published state dict."""
    with torch.device("meta"):
        model = build_model(name, **changes)
    keys = [key.removeprefix("detr.") for key, _ in read(PUBLISHED, case, "keys")]
    absent, more = {
        "deformable_refine": (r"enc_out|pos_tr|_embed\.6|decoder\.class", [
            "query_embed.weight", "transformer.reference_points.weight",
            "transformer.reference_points.bias"]),
        "dn_dab": (None, ["label_enc.weight"]),
        "align_published": ("time_|betas|alphas|posterior", ["transformer.tgt_embed.weight"]),
        "deformable_single": (r"^input_proj\.[123]", []),
    }.get(name, (None, []))
    keys = [k for k in keys if not (absent and re.search(absent, k))] + more
    keys += again(keys, "blocks.5.", [f"blocks.{i}." for i in range(6, model.cfg.vit_depth)])
    if name == "rf_base":
        keys += again(keys, "decoder.layers.1.", ["decoder.layers.2."])
    if model.cfg.levels == 2:  # LW-DETR's two levels, each from four maps
        keys += again(keys, "stages.0.", ["stages.1."])
        layer = [k.partition("cv1.")[2] for k in keys if "stages.0.0.cv1." in k]
        for level, norm in ((0, ["1.weight", "1.bias"]), (1, [])):
            keys += [f"backbone.0.projector.stages_sampling.{level}.{i}.{k}" for i in range(4)
                     for k in [f"0.{k}" for k in layer] + norm]
    names, own = weights.own_names(keys, model.cfg), model.state_dict()
    return model, {k: torch.zeros(own[names[k]].shape if k in names else 100) for k in keys}


def test_weights_published_and_own_names():
    """Every published member, and our own bare state dicts: recognised, loaded strictly."""
    for name, changes, file, case in FILES:
        model, state = published(name, changes, file, case)
        own = [k for k in model.state_dict() if not k.endswith("num_batches_tracked")]
        assert weights.load_weights(model.to_empty(device="cpu"), state) == len(own)
        assert weights.detect(state, file) == (name, changes), (file, weights.detect(state, file))
    own = {k: v for k, v in variants.VARIANTS.items() if v.detector == "detr"}
    for name, row in own.items():
        changes = TINY | dict(num_classes=3, backbone="resnet101")
        if row.backbone in variants.VITS:
            changes = dict(num_classes=3, d_model=96, ffn=64, decoder_layers=1, query_groups=2)
        with torch.device("meta"):
            found = weights.detect(build_model(name, **changes).state_dict(), name)
        assert found == (name, changes), found


def test_weights_forms_and_unequal_copies():
    """Released files' wrappings; and heads of which the model has one, which must be equal."""
    model, one = (build_model("dino", shared_heads=shared) for shared in (False, True))
    state = published(*FILES[7])[1]
    for first in ("", "transformer.decoder."):
        state[first + "class_embed.5.bias"] = torch.ones(91)
    average = {k: v + 2 for k, v in state.items()}
    for source, value in [
            ({"model": state | {"linear1.total_params": torch.ones(1)}, "ema_state": {}}, 1),
            ({f"module.{k}": v for k, v in state.items()}, 1),
            ({"model": state, "ema_state": average}, 3)]:
        weights.load_weights(model, source)
        assert [h.bias.mean().item() for h in model.class_embed] == [value - 1] * 5 + [value]
    refused("class_embed.0.bias, class_embed.5.bias|shared", weights.load_weights, one, state)


def test_weights_wrong_variant_names_and_shapes():
    """The error names what does not fit and the right variant; the model is left as it was."""
    pairs = {row[0]: published(*row) for row in FILES[:9]}
    (dino, state), (other, strange) = pairs["dino"], published(*FILES[9])
    renamed = {k.replace("output_norm.weight", "output_nrom.weight"): v for k, v in state.items()}
    with mock.patch("torch.nn.Module.load_state_dict") as loads:
        for name, another in itertools.permutations(pairs, 2):
            refused(f"--variant {another}|nothing was loaded", weights.load_weights,
                    pairs[name][0], pairs[another][1])
        for words, source in (
                ("1 missing: enc_output_norm.weight|1 unused: transformer.enc_output_n", renamed),
                ("[7, 256], the model's is [91, 256]|num_queries=30", strange),
                ("'epoch'", {"epoch": 3})):
            refused(words, weights.load_weights, dino, source)
        refused("transformer.tgt_embed.weight [900, 256]", weights.fine_tune, other, state, False)
    assert not loads.called
    refused("dino|mask_head", weights.detect, {"mask_head.lay1.weight": torch.ones(1)})


def test_weights_files():
    """Ours keep their average and meta, other classes make heads fresh, bad files are refused."""
    model, other, same = (build_model("diffu_dino", num_classes=n, **TINY) for n in (3, 5, 3))
    state, recipe = model.state_dict(), variants.recipe("diffu_dino").but(image_size=128)
    saved = dict(variant="diffu_dino", config=asdict(model.cfg.but(sampling_steps=5)),
                 recipe=asdict(recipe), classes=["a", "b", "c"], category_ids=[1, 5, 7])
    more = dict(format="minDETR", ema=state, model={k: v * 0 for k, v in state.items()})
    with tempfile.TemporaryDirectory() as folder:
        torch.save(saved | more, path := Path(folder, "model.pth"))
        loaded, meta = weights.load_checkpoint(path, sampling_steps=5)
        assert meta == saved | {"held_out": []} and not loaded.training
        assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in state.items())
        for target, same_classes, said in (
                (other, False, "new, for 5 classes: class_embed, enc_class_embed, label_enc"),
                (same, True, "none new"), (same, False, "for 3 classes: class")):
            assert said in weights.fine_tune(target, path, same_classes)
        torch.save({"model": state, "args": argparse.Namespace(lr=1e-4)}, path)  # like the authors'
        assert weights.load_checkpoint(path)[1]["classes"] == ["class 0", "class 1", "class 2"]
        torch.save(model, path)
        refused(f"{path}|could run code", weights.load_checkpoint, path)
        for content in (path.read_bytes()[:300], b""):
            path.write_bytes(content)
            refused(f"{path}|cut short", weights.load_checkpoint, path)
        refused("no.pth|No such file", weights.load_checkpoint, f"{folder}/no.pth")
    assert [weights.coco_classes(n)[1][-1] for n in (80, 91)] == [90, 90]


def test_weights_backbone():
    """torchvision's state dict by path; another ResNet, no weights and no network are errors."""
    resnet, detector = torchvision.models.resnet18(weights=None), build_model("detr", **TINY)
    model, other = build_model("deformable", **TINY), build_model("detr", backbone="resnet34")
    vit, another = (build_model("lw_tiny", vit_width=24, decoder_layers=1) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(
            "torch.hub", get_dir=lambda: folder, urlopen=mock.Mock(side_effect=OSError("no net"))):
        torch.save(resnet.state_dict(), path := f"{folder}/resnet18.pth")
        for source, expected in ((path, resnet), (detector.state_dict(), detector.backbone)):
            weights.load_backbone(model, source)
            assert torch.equal(model.backbone.conv1.weight, expected.conv1.weight)
        for built, which, words in [
                (other, path, "missing|resnet34"),
                (other, "default", f"no net|resnet34-|{folder}|--backbone-weights none, which"),
                (vit, "default", "published detector|--weights PATH|none")]:
            refused(words, weights.load_backbone, built, which)
    weights.load_backbone(vit, another.state_dict())
    assert torch.equal(*(m.backbone.blocks[5].mlp[0].weight for m in (vit, another)))


def swin_key(key, layers="layers", proj="proj", attn="attn", fc1="mlp.fc1", fc2="mlp.fc2"):
    """A Swin's key as the original code has it, or mmdetection's, from torchvision's."""
    part, n, rest = re.fullmatch(r"(features)?\.?(\d?)\.?(.*)", key).groups()
    if not part:
        return key
    if n == "0":
        return f"patch_embed.{proj if rest[0] == '0' else 'norm'}{rest[1:]}"
    if int(n) % 2 == 0:
        return f"{layers}.{int(n) // 2 - 1}.downsample.{rest}"
    rest = rest.replace("mlp.0", fc1).replace("mlp.3", fc2).replace("attn", attn)
    return f"{layers}.{int(n) // 2}.blocks.{rest}"


def test_weights_swins():
    """Microsoft's, DINO's, detrex's and mmdetection's names of Swins; the merging's other order."""
    model = build_model("dino", backbone="swin_t", levels=5, decoder_layers=1, encoder_layers=1)
    source = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    bare = torchvision.models.swin_t(weights=None).state_dict()
    mm = dict(layers="stages", proj="projection", attn="attn.w_msa", fc1="ffn.layers.0.0",
              fc2="ffn.layers.1")
    for prefix, style, state in [
            ("", {}, {k: v for k, v in source.items() if "norm" != k[:4]}), ("", None, bare),
            ("backbone.0.", {}, source), ("backbone.", {}, source), ("backbone.", mm, source)]:
        for p in model.backbone.parameters():
            p.data.zero_()
        theirs = {prefix + (k if style is None else swin_key(k, **style)): v
                  for k, v in state.items()}
        for k in [k for k in theirs if "downsample" in k and style == mm]:  # as published, by hand
            x = theirs[k].unflatten(-1, (4, -1))
            theirs[k] = x[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2)
        weights.load_backbone(model, theirs)
        for k, v in model.backbone.state_dict().items():
            assert torch.equal(v, state.get(k, torch.zeros(()).expand_as(v))), (prefix, style, k)
    for key, name in dict(line.split() for line in """
        backbone.stages.2.blocks.3.ffn.layers.1.bias       backbone.features.5.3.mlp.3.bias
        neck.convs.0.gn.bias                               input_proj.0.1.bias
        neck.extra_convs.0.conv.bias                       input_proj.3.0.bias
        encoder.layers.4.self_attn.value_proj.bias         encoder.4.self_attn.value_proj.bias
        encoder.layers.4.ffn.layers.0.0.bias               encoder.4.linear1.bias
        decoder.layers.0.self_attn.attn.in_proj_bias       decoder.0.self_attn.in_proj_bias
        decoder.layers.0.cross_attn.value_proj.bias        decoder.0.cross_attn.value_proj.bias
        decoder.layers.0.norms.1.bias                      decoder.0.norm2.bias
        decoder.norm.bias                                  decoder_norm.bias
        decoder.ref_point_head.layers.1.bias               ref_point_head.2.bias
        bbox_head.cls_branches.1.bias                      enc_class_embed.bias
        bbox_head.reg_branches.0.4.bias                    bbox_embed.0.4.bias
        dn_query_generator.label_embedding.weight          label_enc.weight
        memory_trans_fc.bias                               enc_output.bias
        query_embedding.weight                             tgt_embed.weight""".strip().splitlines()
            ).items():
        assert weights.own_names([key, "bbox_head.", "decoder.layers.0."],
                                 variants.dino.but(shared_heads=False))[key] == name
    refused("torchvision has no weights of swin_l", weights.load_backbone,
            mock.Mock(cfg=variants.dino.but(backbone="swin_l")), "default")
