"""From one stage to the next: enlarge the latents, keep each image's mean (and std, as published)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..canvas.views import match, statistics
from ..plan.route import Size
from ..plan.tiling import MEAN, MEAN_AND_STD, Stage


def enlarge(latents: Tensor, size: Size, stretch: bool = False) -> Tensor:
    """Bicubic in latent space to `size` (height, width), equally in both directions; what is too much is cut at the middle.

    latents: (B, C, h, w). stretch: cut nothing, as published. Returns fp32. Source: DemoFusion, section 3.1.
    """
    if stretch:
        return F.interpolate(latents.float(), size=size, mode="bicubic", align_corners=False)
    ratio = max(size[axis] / latents.shape[axis - 2] for axis in (0, 1))
    reached = [max(size[axis], round(latents.shape[axis - 2] * ratio)) for axis in (0, 1)]
    large = F.interpolate(latents.float(), size=reached, mode="bicubic", align_corners=False)
    top, left = ((reached[axis] - size[axis]) // 2 for axis in (0, 1))
    return large[..., top : top + size[0], left : left + size[1]].contiguous()


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
