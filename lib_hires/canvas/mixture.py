"""Mixture of Diffusers: overlapping views whose predictions are blended by Gaussian weights, one step on the canvas.

The weights fade towards a view's edge, so that seams vanish at less overlap than MultiDiffusion needs.
Source: arXiv 2302.02412, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..config.settings import setting
from ..plan.models import Model
from ..plan.tiling import GAUSSIAN, Local
from .method import CanvasMethod


@dataclass(frozen=True)
class MixtureOfDiffusers(CanvasMethod):
    """Settings of Mixture of Diffusers; the defaults are the published ones."""

    name: ClassVar[str] = "mixture_of_diffusers"
    group: ClassVar[str] = ""
    title: ClassVar[str] = "Mixture of Diffusers"
    summary: ClassVar[str] = "blends overlapping views by Gaussian weights"
    use_when: ClassVar[str] = "like MultiDiffusion, at a fraction of its cost; not for one large subject"
    source: ClassVar[str] = "arXiv 2302.02412"

    spread: float = setting(
        0.1, "Gaussian spread", "Std of a view's weights, as a fraction of its side.", low=0.02, high=1.0, step=0.01
    )

    def local(self, model: Model) -> Local:
        """The views, with Gaussian weights."""
        return replace(super().local(model), weights=GAUSSIAN, spread=self.spread)
