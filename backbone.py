"""What sees the image: a backbone gives maps, a neck makes of them the levels that are read.

    images [B, 3, H, W] -> ResNet, Swin -> C2 to C5, at strides 4 to 32 -> Neck -> [B, d, h, w]
                        -> ViT -> some blocks' outputs, at one stride -> Projector -> per level

DETR (Carion 2020) reads C5 alone; Deformable DETR (Zhu 2021) C3 to C5, and makes a fourth level;
DINO (Zhang 2023) also C2, and from Swins (Liu 2021). LW-DETR (Chen 2024) and RF-DETR (Robinson
2025) read several blocks of a plain ViT (Dosovitskiy 2021; RF: DINOv2, Oquab 2023), most of which
look into windows only.
"""
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.swin_transformer import (ShiftedWindowAttention, SwinTransformer,
                                                 SwinTransformerBlock)
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d, StochasticDepth

from variants import SWINS, VITS


def build_backbone(cfg):
    """The backbone of a Config and its neck; `backbone.divisor` divides the images' sides.

    A backbone is called with images and `run`, which calls a block and its input: so that what is
    kept for the backward pass is the caller's choice (model.py).
    """
    if cfg.backbone in VITS:
        return ViT(cfg), Projector(cfg).to(memory_format=torch.channels_last)
    body = (Swin if cfg.backbone in SWINS else ResNet)(cfg)
    return body, Neck(cfg, body.channels)


def called(block, x):
    """How a block is run if nobody asks for more."""
    return block(x)


def first_read(cfg):
    """The first of C2 to C5, from 0, that the neck reads."""
    return 3 if cfg.levels == 1 else 0 if cfg.levels == 5 else 1


# ==================================================================================== ResNets

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

    divisor = 1

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

    def forward(self, images, run=called):
        """Images [B, 3, H, W] -> C2 to C5, a list of four maps (C5 at stride 16 with dilation). Not
        for `run`: batch norm would count its statistics twice."""
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
        read = channels[first_read(cfg):]
        extra = [(channels[-1], 3)] * (cfg.levels - len(read))  # a strided convolution of raw C5
        super().__init__(nn.Sequential(
            nn.Conv2d(c, cfg.d_model, k, stride=1 + k // 2, padding=k // 2),
            nn.GroupNorm(32, cfg.d_model)) for c, k in [(c, 1) for c in read] + extra)

    def forward(self, maps):
        """C2 to C5 -> the levels, finest first: a list of [B, d, h, w]."""
        read = maps[{1: 3, 5: 0}.get(len(self), 1):]
        return [project(x) for project, x in zip(self, [*read, maps[-1]])]


# ====================================================================================== Swins

# Channels of the first stage, and blocks of the third.
SWIN_SIZES = {"swin_t": (96, 6), "swin_s": (96, 18), "swin_b": (128, 18), "swin_l": (192, 18)}


class WindowAttention(ShiftedWindowAttention):
    """torchvision's parameters, but shifted as published: also on a map one window wide, where the
    shift changes nothing but which tokens the mask keeps apart."""

    def forward(self, x):
        """x [B, H, W, c] -> the same shape."""
        (B, H, W, c), w, s = x.shape, self.window_size[0], self.shift_size[0]
        # Zeros make the windows whole; they are seen as tokens whose features are the bias's.
        x = F.pad(x, (0, 0, 0, -W % w, 0, -H % w)).roll((-s, -s), (1, 2))
        h, v = x.shape[1] // w, x.shape[2] // w  # windows
        qkv = self.qkv(x).view(B, h, w, v, w, 3, self.num_heads, -1)
        q, k, u = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(2, 4)  # [B, hvM, ww, c]
        bias = self.get_relative_position_bias()  # [1, M, ww, ww]
        if s:
            # The roll has put together, in the last row and column of windows, what lies at
            # opposite sides of the map: tokens see those of their own side.
            side = [(torch.arange(n * w, device=x.device) >= n * w - s).view(n, w) for n in (h, v)]
            part = (2 * side[0][:, None, :, None] + side[1][None, :, None]).view(h * v, 1, w * w)
            apart = (part[..., None] != part[..., None, :]).to(bias) * -100
            bias = bias + apart  # [hv, M, ww, ww]
        bias = bias.expand(h * v, -1, -1, -1).flatten(0, 1)[None].to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, u, bias.expand(B, -1, -1, -1))
        y = y.view(B, h, v, self.num_heads, w, w, -1).permute(0, 1, 4, 2, 5, 3, 6)
        return self.proj(y.reshape(B, h * w, v * w, c)).roll((s, s), (1, 2))[:, :H, :W]


class Swin(nn.Module):
    """torchvision's Swin (Liu 2021), nothing frozen, and a norm for each map that is read."""

    divisor = 1

    def __init__(self, cfg):
        super().__init__()
        c, depth = SWIN_SIZES[cfg.backbone]
        self.features = SwinTransformer(
            [4, 4], c, [2, 2, depth, 2], [c * 2 ** i // 32 for i in range(4)], [cfg.window] * 2,
            stochastic_depth_prob=cfg.drop_path,
            block=partial(SwinTransformerBlock, attn_layer=WindowAttention)).features
        self.channels = [c * 2 ** i for i in range(4)]
        for i in range(first_read(cfg), 4):
            self.add_module(f"norm{i}", nn.LayerNorm(self.channels[i]))

    def forward(self, images, run=called):
        """Images [B, 3, H, W] -> C2 to C5, a list of four maps, normed where they are read."""
        x = F.pad(images, (0, -images.shape[3] % 4, 0, -images.shape[2] % 4))  # whole patches
        embed, *parts = self.features
        x, maps = embed(x), []  # [B, h, w, c]
        for i, part in enumerate(parts):  # a stage, its downsampling, a stage, ...
            if i % 2:
                x = part(x)
                continue
            for block in part:
                x = run(block, x)
            norm = getattr(self, f"norm{i // 2}", nn.Identity())
            maps.append(norm(x).permute(0, 3, 1, 2))
        return maps


# ======================================================================================= ViTs

def attend(q, k, v, heads, allowed=None, dropout=0.0):
    """Scaled dot products in `heads` parts of the channels: q [B, Q, c], k [B, S, c], v [B, S, d]
    -> [B, Q, d]. allowed: bool, broadcast to [B, M, Q, S], or None."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
    return y.transpose(1, 2).flatten(2)


class ViTAttention(nn.Module):
    """Self-attention of tokens x [B, N, c]. LW-DETR's files have one matrix for queries, keys and
    values, and no bias for keys, which softmax does not see; DINOv2's have three of each."""

    def __init__(self, width, heads, fused):
        super().__init__()
        self.heads, self.fused, self.proj = heads, fused, nn.Linear(width, width)
        if fused:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        else:
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        if self.fused:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        else:
            q, k, v = self.query(x), self.key(x), self.value(x)
        return self.proj(attend(q, k, v, self.heads))


class Block(nn.Module):
    """x + gamma_1 attention(LN x), then x + gamma_2 MLP(LN x), of tokens x [B * windows, N, c].
    everywhere: attention sees all windows of an image, or else one."""

    def __init__(self, cfg, everywhere, drop_path):
        super().__init__()
        c, scale = cfg.vit_width, 0.1 if cfg.backbone == "vit" else 1.0
        self.windows = cfg.windows ** 2 if everywhere else 1
        self.norm1, self.norm2 = nn.LayerNorm(c, eps=1e-6), nn.LayerNorm(c, eps=1e-6)
        self.attn = ViTAttention(c, cfg.vit_heads, cfg.backbone == "vit")
        self.mlp = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((c,), scale)) for _ in range(2))
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x):
        seen = self.norm1(x).unflatten(0, (-1, self.windows)).flatten(1, 2)  # tokens seen together
        x = torch.addcmul(x, self.gamma_1, self.drop_path(self.attn(seen).view_as(x)))
        return torch.addcmul(x, self.gamma_2, self.drop_path(self.mlp(self.norm2(x))))


class ViT(nn.Module):
    """A plain vision transformer whose tokens stay sorted by windows from the first block to the
    last, so that only the few global blocks pay for attention to the whole image.

    "vit": LW-DETR's. "dinov2": RF-DETR's, in which every window has a copy of the class token,
    whose only work is attention, and all blocks that are read pass through one norm.
    """

    def __init__(self, cfg):
        super().__init__()
        c, self.dino, self.windows = cfg.vit_width, cfg.backbone == "dinov2", cfg.windows
        self.divisor, self.taps = cfg.patch * cfg.windows, [*map(int, cfg.taps.split())]
        self.grid = cfg.grid
        self.patch_embed = nn.Conv2d(3, c, cfg.patch, cfg.patch)
        # The first row is the class token's place, which "vit" lacks but its files hold.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + cfg.grid ** 2, c))
        self.blocks = nn.ModuleList(
            Block(cfg, str(i) in cfg.global_blocks.split(),
                  cfg.drop_path * i / max(cfg.vit_depth - 1, 1)) for i in range(cfg.vit_depth))
        if self.dino:
            self.cls_token, self.norm = nn.Parameter(torch.zeros(1, 1, c)), nn.LayerNorm(c, 1e-6)
            self.mask_token = nn.Parameter(torch.zeros(1, c), False)  # of DINOv2's training
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias) if module.bias is not None else None
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks[self.taps[-1] + 1:].requires_grad_(False)  # rf_base's last is never read

    def positions(self, h, w):
        """The learned grid's, resized as each paper does: [1, h, w, c]."""
        grid = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid))
        if grid.shape[1:3] == (h, w):
            return grid
        return F.interpolate(grid.permute(0, 3, 1, 2), (h, w), mode="bicubic",
                             antialias=self.dino).permute(0, 2, 3, 1)

    def forward(self, images, run=called):
        """Images [B, 3, H, W], sides divisible by `divisor` -> maps [B, c, h, w], one a tap."""
        x, n, maps = self.patch_embed(images).permute(0, 2, 3, 1), self.windows, []
        B, h, w, c = x.shape
        x = (x + self.positions(h, w)).view(B, n, h // n, n, w // n, c)
        x = x.transpose(2, 3).reshape(B * n * n, -1, c)  # window after window, row by row
        if self.dino:
            x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        for i, block in enumerate(self.blocks[:self.taps[-1] + 1]):
            x = run(block, x)
            if i in self.taps:
                y = self.norm(x[:, 1:]) if self.dino else x
                y = y.reshape(B, n, n, h // n, w // n, c).transpose(2, 3).reshape(B, h, w, c)
                maps.append(y.permute(0, 3, 1, 2))
        return maps


class ChannelNorm(nn.LayerNorm):
    """LayerNorm of every pixel's channels: [B, c, h, w]."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(Conv2dNormActivation):
    """torchvision's, whose batch norm is part of the convolution at inference."""

    def forward(self, x):
        if self.training or isinstance(self[1], ChannelNorm):
            return super().forward(x)
        return self[2](folded(self[0], self[1], x))


class C2f(nn.Module):
    """A convolutional block (YOLOv8's): two halves, and a chain of three that starts from the
    second, all concatenated. conv(in, out, kernel): a convolution, its norm and activation."""

    def __init__(self, channels, d, conv):
        super().__init__()
        self.cv1, self.cv2 = conv(channels, d, 1), conv(d // 2 * 5, d, 1)
        self.m = nn.ModuleList(nn.ModuleDict({
            name: conv(d // 2, d // 2, 3) for name in ("cv1", "cv2")}) for _ in range(3))

    def forward(self, x):
        parts = [*self.cv1(x).chunk(2, 1)]
        for part in self.m:
            parts.append(part["cv2"](part["cv1"](parts[-1])))
        return self.cv2(torch.cat(parts, 1))


class Projector(nn.Module):
    """LW-DETR's neck (section 3.1): a ViT's maps, of one stride, to one level at that stride, or to
    two, at half and twice of it, or to all three."""

    def __init__(self, cfg):
        super().__init__()
        c, taps, norm = cfg.vit_width, len(cfg.taps.split()), nn.BatchNorm2d
        if cfg.projector_norm == "layer":
            norm = partial(ChannelNorm, eps=1e-6)
        conv, relu = (partial(ConvNorm, norm_layer=norm, activation_layer=activation)
                      for activation in (nn.SiLU, nn.ReLU))
        half = c // 4 if c > 512 else c // 2  # channels at half the stride

        def finer():
            wide = [relu(c, c // 2, 1)] if c > 512 else []
            return [*wide, nn.ConvTranspose2d(2 * half, half, 2, 2)]

        ways = [(finer, half), (list, c), (lambda: [relu(c, c, 3, 2)], c)]
        ways = ways[1:2] if cfg.levels == 1 else ways[::2] if cfg.levels == 2 else ways
        self.stages_sampling = nn.ModuleList(nn.ModuleList(
            nn.Sequential(*make()) for _ in range(taps)) for make, _ in ways)
        self.stages = nn.ModuleList(nn.Sequential(
            C2f(taps * width, cfg.d_model, conv), ChannelNorm(cfg.d_model, eps=1e-6))
            for _, width in ways)

    def forward(self, maps):
        """Maps [B, c, h, w] -> the levels, finest first: a list of [B, d, h, w]."""
        return [stage(torch.cat([sample(x) for sample, x in zip(samples, maps)], 1))
                for samples, stage in zip(self.stages_sampling, self.stages)]
