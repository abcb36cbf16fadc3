"""From one stage to the next: enlarge the latents, keep each image's mean and std."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..plan.route import Size


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
