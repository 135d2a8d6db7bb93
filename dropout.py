"""Dropout whose random numbers cost a CPU a quarter of torch's."""
import torch
from torch import nn


class Dropout(nn.Dropout):
    """`nn.Dropout`; on a CPU, where torch draws 64 random bits an element, one after the other, and keeps a float of each
    for the backward pass, 16 bits are drawn and a bool is kept. p is then rounded to a multiple of 2^-16."""

    def forward(self, x):
        """x of any shape and floating dtype -> the same, each element dropped with probability p, the others / (1 - p)."""
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None)
        kept = words.view(torch.int16)[:x.numel()].view(x.shape) >= round(self.p * 2 ** 16) - 2 ** 15
        return torch.where(kept, x, 0).mul_(1 / (1 - self.p))
