"""RAU-Net's three operations on feature maps, apart from any network.

    down      the same 3x3 weights, stride 4, padding 2, dilation 2: ceil(H/4)
    pool      2x2 average, rounding the size up
    resize    back to an explicit size: nearest before an up-sampler's convolution, bicubic after a pooled pair

Source: HiDiffusion (arXiv 2311.17528), section 3.2; resizing also serves Deep Shrink.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

DILATED = {"stride": (4, 4), "padding": (2, 2), "dilation": (2, 2), "_reversed_padding_repeated_twice": (2, 2, 2, 2)}
"""The stride 4 of `dilated_conv` as attributes of a `Conv2d`."""

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def dilated_conv(conv: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`conv` with stride 4, padding 2 and dilation 2. x: (B, C, H, W) -> (B, C', ceil(H/4), ceil(W/4)).

    `weight` and `bias` are given apart, so that a host can cast or adapt them first; `conv` tells groups and padding mode.
    """
    padding = 2
    if conv.padding_mode != "zeros":
        x, padding = F.pad(x, (2, 2, 2, 2), mode=conv.padding_mode), 0
    return F.conv2d(x, weight, bias, stride=4, padding=padding, dilation=2, groups=conv.groups)


def pool(x: torch.Tensor) -> torch.Tensor:
    """2x2 average pooling. x: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)); border cells average what there is."""
    return F.avg_pool2d(x, kernel_size=2, ceil_mode=True)


def resize(x: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """x: (B, C, H, W) to `size` (height, width); modes of `torch.nn.functional.interpolate`, no antialiasing."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if x.dtype in _LOW_PRECISION and x.device.type == "cpu":
        return F.interpolate(x.float(), size=size, mode=mode).to(x.dtype)
    return F.interpolate(x, size=size, mode=mode)
