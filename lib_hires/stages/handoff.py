"""From one stage to the next: enlarge the latents, keep each image's mean (and std, as published)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..canvas.views import match, statistics
from ..plan.route import Size
from ..plan.tiling import MEAN, MEAN_AND_STD, Stage

_KERNEL = 3
"""Latents beyond an edge that a bicubic enlargement reads, and one more."""


def enlarge(latents: Tensor, size: Size, stretch: bool = False, wrap: tuple[bool, bool] = (False, False)) -> Tensor:
    """Bicubic in latent space to `size` (height, width), equally in both directions; what is too much is cut at the middle.

    latents: (B, C, h, w). stretch: cut nothing, as published. wrap: (top to bottom, left to right) edges that meet; along
    such an axis the other edge goes on beyond the edge, and nothing is cut. Returns fp32. Source: DemoFusion, section 3.1.
    """
    given = latents.shape[-2:]
    ratio = max(size[axis] / given[axis] for axis in (0, 1))
    is_exact = [stretch or on for on in wrap]
    reached = [size[axis] if is_exact[axis] else max(size[axis], round(given[axis] * ratio)) for axis in (0, 1)]
    rims = [_rim(given[axis], reached[axis]) if wrap[axis] else (0, 0) for axis in (0, 1)]
    around = latents.float()
    for axis, (rim, _) in enumerate(rims):
        if rim:
            places = torch.arange(-rim, given[axis] + rim, device=latents.device) % given[axis]
            around = around.index_select(axis - 2, places)
    extent = [length + 2 * rim for length, (_, rim) in zip(reached, rims)]
    large = F.interpolate(around, size=extent, mode="bicubic", align_corners=False)
    top, left = (rims[axis][1] + (reached[axis] - size[axis]) // 2 for axis in (0, 1))
    return large[..., top : top + size[0], left : left + size[1]].contiguous()


def _rim(length: int, reached: int) -> tuple[int, int]:
    """How much of a circle of `length` is to be repeated at each end, and what that is enlarged: both whole numbers."""
    step = length // math.gcd(length, reached)
    rim = -(-_KERNEL // step) * step
    return rim, rim * reached // length


def anchored(latents: Tensor, stage: Stage, anchor: tuple[Tensor, Tensor], per_channel: bool = True) -> Tensor:
    """A stage's latents (B, C, H, W) with what they are to keep of the first stage's (mean, std), `anchor`.

    The published code gives them both. A sharper picture has a smaller std than the small one that it was made from: its
    edges and lines take up less of it. Stretching it back moves every colour away from the mean.
    """
    kept = stage.canvas.anchor if stage.canvas else MEAN
    if kept == MEAN_AND_STD:
        return match(latents, *anchor, per_channel)
    if kept == MEAN:
        return (latents.float() + (anchor[0] - statistics(latents, per_channel)[0])).to(latents.dtype)
    return latents
