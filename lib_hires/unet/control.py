"""ControlNet and T2I-Adapter residuals on a shrunk feature map: each is resized, bicubic, to the skip that it is added to.

Source: HiDiffusion's SDXL ControlNet pipeline, which resizes residuals to the current feature size.
"""

from __future__ import annotations

from typing import Any

import torch

from ..plan.route import Route, Size
from ..plan.structure import PAIR, Structure
from .raunet import resize

SKIPS, MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"
ADAPTER = "down_intrablock_additional_residuals"


def fit_residuals(kwargs: dict[str, Any], route: Route, structure: Structure) -> dict[str, Any]:
    """A UNet's keyword arguments with the residuals resized to `route`: those of diffusers, or Forge's `control`."""
    skips, middle = kwargs.get(SKIPS), kwargs.get(MIDDLE)
    fitted = dict(kwargs)
    if skips is not None and len(skips) == len(route.encoder):
        fitted[SKIPS] = tuple(resize(residual, way.out, "bicubic") for residual, way in zip(skips, route.encoder))
    if isinstance(middle, torch.Tensor) and middle.dim() == 4:
        fitted[MIDDLE] = resize(middle, route.middle, "bicubic")
    if kwargs.get(ADAPTER) is not None:
        sizes = (route.encoder[index].out for index in _adapter_steps(structure))
        fitted[ADAPTER] = [resize(residual, size, "bicubic") for residual, size in zip(kwargs[ADAPTER], sizes)]
    if isinstance(kwargs.get("control"), dict):
        fitted["control"] = _fit_lists(kwargs["control"], route)
    return fitted


def _adapter_steps(structure: Structure) -> list[int]:
    """After which encoder step diffusers adds a T2I-Adapter's residual of each level: the last pair where the level has
    transformers, else the last step, down-sampler included."""
    steps = []
    for level in range(structure.levels):
        last = max(i for i, step in enumerate(structure.encoder) if step.kind == PAIR and step.level == level)
        down = structure.downsampler(level)
        steps.append(last if structure.encoder[last].depth or down is None else down)
    return steps


def _fit_lists(control: dict[str, Any], route: Route) -> dict[str, Any]:
    """Forge's and ldm_patched's residuals: lists that the UNet pops from the end, one at each block in the order it runs."""
    skips = [way.out for way in route.encoder]
    sizes = {"input": skips, "middle": [route.middle], "output": skips[::-1]}
    fitted = {
        name: [_fit(residual, size) for residual, size in zip(reversed(control[name]), order)][::-1]
        for name, order in sizes.items()
        if control.get(name)
    }
    return {**control, **fitted}


def _fit(residual: Any, size: Size) -> Any:
    is_map = isinstance(residual, torch.Tensor) and residual.dim() == 4
    return resize(residual, size, "bicubic") if is_map else residual
