"""The baseline that the family replaces: Faster R-CNN (Ren 2015) on a feature pyramid (Lin 2017).

    images -> ResNet -> FPN -> RPN: boxes that may hold an object -> per box: class, corrected box

Anchors, two stages of sampling and NMS instead of a set: torchvision's, with its own losses, on our
data, backbone, training loop and scores.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection import FasterRCNN as Torchvision
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from backbone import ResNet


class FasterRCNN(nn.Module):
    """torchvision's parts without its transform, as images come resized and normalised (data.py).
    `cfg` is the model's `Config`, of which it reads what `variants.RCNN` lists."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.backbone = cfg, ResNet(cfg)
        self.fpn = FeaturePyramidNetwork(self.backbone.channels, cfg.d_model, LastLevelMaxPool())
        self.fpn.out_channels = cfg.d_model  # which torchvision asks a backbone for
        whole = Torchvision(self.fpn, 1 + cfg.num_classes, box_detections_per_img=cfg.detections)
        self.rpn, self.roi_heads = whole.rpn, whole.roi_heads

    def forward(self, images, mask, targets=None, generator=None, watch=None):
        """Arguments as `model.Detector.forward` takes them -> in training "losses", torchvision's;
        else "sampled": one answer as of `diffusion.best_pairs`, whose empty places score -1."""
        valid = torch.stack([(~mask[:, :, 0]).sum(1), (~mask[:, 0]).sum(1)], 1)  # [B, 2] h, w
        sizes = [*map(tuple, valid.tolist())]
        scale = valid.flip(1).repeat(1, 2).float()  # [B, 4] w, h, w, h
        images = F.pad(images, (0, -images.shape[3] % 32, 0, -images.shape[2] % 32))
        images = images.contiguous(memory_format=torch.channels_last)
        features = self.fpn({str(i): x for i, x in enumerate(self.backbone(images))})
        if self.training:  # label 0 is the background
            targets = [{"labels": t["labels"] + 1,
                        "boxes": box_convert(t["boxes"], "cxcywh", "xyxy") * size}
                       for t, size in zip(targets, scale)]
        proposals, losses = self.rpn(ImageList(images, sizes), features, targets)
        found, more = self.roi_heads(features, proposals, sizes, targets)
        if self.training:
            return {"losses": losses | more}
        scores, labels, boxes = (
            pad_sequence([one[key] for one in found], batch_first=True, padding_value=-1)
            for key in ("scores", "labels", "boxes"))
        query = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
        boxes = box_convert(boxes / scale[:, None], "xyxy", "cxcywh")
        return {"sampled": [
            {"scores": scores, "labels": labels - 1, "boxes": boxes, "query": query}]}

    @staticmethod
    def criterion(outputs, targets, step_counts=None):
        """As `matcher.Criterion`: torchvision's losses under its names; "enc" is the RPN's. They
        are means over what was sampled, so a micro-batch counts by its share of the images."""
        of = {key: value[None] * len(targets) / len(step_counts or targets)
              for key, value in outputs["losses"].items()}
        losses = {"main": {"class": of["loss_classifier"], "bbox": of["loss_box_reg"]},
                  "enc": {"class": of["loss_objectness"], "bbox": of["loss_rpn_box_reg"]}}
        return sum(of.values()).sum(), losses
