"""What sees the image: a backbone gives maps of strides 4 to 32, the neck takes what it reads.

    images [B, 3, H, W] -> ResNet -> C2 to C5, at strides 4 to 32 -> Neck -> [B, d, h, w] per level

DETR (Carion 2020) reads C5 alone; Deformable DETR (Zhu 2021) C3 to C5, and makes a fourth level.
"""
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d


def folded(conv, norm, x):
    """A convolution and the frozen norm after it as one: the weights take its scale and shift."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return F.conv2d(x, conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale,
                    conv.stride, conv.padding, conv.dilation)


def folded_block(block, x):
    """torchvision's BasicBlock or Bottleneck with frozen norms, which pass over no map."""
    y = folded(block.conv1, block.bn1, x)
    y = folded(block.conv2, block.bn2, F.relu(y, inplace=True))
    if hasattr(block, "conv3"):
        y = folded(block.conv3, block.bn3, F.relu(y, inplace=True))
    return F.relu(y + (folded(*block.downsample, x) if block.downsample else x), inplace=True)


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier.

    Frozen batch norm needs pretrained statistics: with random weights it learns nothing, so
    training from scratch takes backbone_norm="batch". With frozen norms, which first stages are not
    trained is cfg.frozen_stages. Weights come from weights.py.
    """

    def __init__(self, cfg):
        super().__init__()
        self.frozen = cfg.backbone_norm == "frozen"
        norm = FrozenBatchNorm2d if self.frozen else nn.BatchNorm2d
        # DC5: torchvision dilates layer4 from its second block on, as published.
        body = getattr(torchvision.models, cfg.backbone)(
            norm_layer=norm, replace_stride_with_dilation=[False, False, cfg.dilation])
        self.conv1, self.bn1 = body.conv1, body.bn1
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            body.layer1, body.layer2, body.layer3, body.layer4)
        self.channels = [stage[-1].conv1.in_channels for stage in self.stages()]
        if self.frozen and cfg.frozen_stages != "none":
            self.conv1.requires_grad_(False)
            self.layer1.requires_grad_(cfg.frozen_stages == "stem")

    def stages(self):
        return self.layer1, self.layer2, self.layer3, self.layer4

    def forward(self, images):
        """Images [B, 3, H, W] -> C2 to C5, a list of four maps (C5 at stride 16 with dilation)."""
        x = folded(self.conv1, self.bn1, images) if self.frozen else self.bn1(self.conv1(images))
        x, maps = F.max_pool2d(F.relu(x, inplace=True), 3, 2, 1), []
        for stage in self.stages():
            for block in stage:
                x = folded_block(block, x) if self.frozen else block(x)
            maps.append(x)
        return maps


class Neck(nn.ModuleList):
    """Projections of the maps that the transformer reads to d channels, one for each level."""

    def __init__(self, cfg, channels):
        if cfg.attention != "deformable":  # DETR: C5, without a norm
            super().__init__([nn.Conv2d(channels[-1], cfg.d_model, 1)])
            return
        read = channels[-1:] if cfg.levels == 1 else channels[1:]
        # One more level is a strided convolution of the raw C5; the next one reads that level.
        extra = [(c, 3) for c in [channels[-1], cfg.d_model][:cfg.levels - len(read)]]
        super().__init__(nn.Sequential(
            nn.Conv2d(c, cfg.d_model, k, stride=1 + k // 2, padding=k // 2),
            nn.GroupNorm(32, cfg.d_model)) for c, k in [(c, 1) for c in read] + extra)

    def forward(self, maps):
        """C2 to C5 -> the levels, finest first: a list of [B, d, h, w]."""
        read = maps[-1:] if len(self) == 1 else maps[1:]
        levels = [project(x) for project, x in zip(self, read)]
        for i in range(len(read), len(self)):
            levels.append(self[i](read[-1] if i == len(read) else levels[-1]))
        return levels
