"""ControlNet residuals on a shrunk feature map: each is resized, bicubic, to the skip that it is added to.

Source: HiDiffusion's SDXL ControlNet pipeline, which resizes residuals to the current feature size.
"""

from __future__ import annotations

from typing import Any

import torch

from ..plan.route import Route
from .raunet import resize

SKIPS, MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"


def fit_residuals(kwargs: dict[str, Any], route: Route) -> dict[str, Any]:
    """diffusers' UNet keyword arguments with the residuals resized to `route`; the same dict where there are none."""
    skips, middle = kwargs.get(SKIPS), kwargs.get(MIDDLE)
    fitted = dict(kwargs)
    if skips is not None and len(skips) == len(route.encoder):
        fitted[SKIPS] = tuple(resize(residual, way.out, "bicubic") for residual, way in zip(skips, route.encoder))
    if isinstance(middle, torch.Tensor) and middle.dim() == 4:
        fitted[MIDDLE] = resize(middle, route.middle, "bicubic")
    return fitted
