"""Edges for the ControlNet of AccDiffusion v2, from the pictures of the stage before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..canvas.edges import edge_map, enlarged
from ..plan.models import LATENT_FACTOR
from .progressive import StageRun


def edge_hint(pictures: Sequence[np.ndarray], run: StageRun) -> Tensor:
    """(B, 3, 8 H, 8 W) edges in 0..1 for a stage of (H, W) latents. pictures: (h, w, 3) uint8, RGB.

    Found on the enlarged pictures; as published on the small ones, the map being enlarged.
    """
    plan = run.stage.canvas
    height, width = (length * LATENT_FACTOR for length in run.size)
    found = []
    for pixels in pictures:
        if plan.published:
            found.append(enlarged(edge_map(pixels, plan.edges.sigma, True), width, height))
        else:
            found.append(edge_map(enlarged(pixels, width, height), plan.edges.sigma))
    return torch.from_numpy(np.stack(found)).float()[:, None].expand(-1, 3, -1, -1) / 255
