"""Mixture of Diffusers: overlapping views whose predictions are blended by Gaussian weights, one step on the canvas.

The weights fade towards a view's edge, so that seams vanish at less overlap than MultiDiffusion needs.
Source: arXiv 2302.02412, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..config.common import Common
from ..config.settings import setting
from ..plan.models import LATENT_FACTOR, Model
from ..plan.route import Size
from ..plan.tiling import GAUSSIAN, Local, Stage
from .method import CanvasMethod

_FLOOR = 1e-30
"""No floor, as far as single precision goes: a corner's weight must not become nothing."""


@dataclass(frozen=True)
class MixtureOfDiffusers(CanvasMethod):
    """Settings of Mixture of Diffusers; the numbers are the published ones."""

    name: ClassVar[str] = "mixture_of_diffusers"
    group: ClassVar[str] = ""
    title: ClassVar[str] = "Mixture of Diffusers"
    summary: ClassVar[str] = "blends overlapping views by Gaussian weights"
    use_when: ClassVar[str] = "like MultiDiffusion, at a fraction of its cost; not for one large subject"
    source: ClassVar[str] = "arXiv 2302.02412"

    spread: float = setting(
        0.1, "Gaussian spread", "Std of a view's weights, as a fraction of its side.", low=0.02, high=1.0, step=0.01
    )

    published: bool = setting(
        False,
        "Published Gaussian",
        "The published code's own weights: without a floor, and centred half a latent too far down. Only for sizes that "
        "its views fill without one being moved.",
        since=3,
    )

    def validate(self) -> None:
        """The published views know no circles."""
        self.refuse_published_circles()

    def stages(self, model: Model, size: Size, common: Common, started: bool = False) -> tuple[Stage, ...]:
        """One sampling run. Raises `SettingError` for sizes that the published views do not fill."""
        local = self.local(model)
        if self.published and not local.fills(size):
            window, step = (LATENT_FACTOR * lengths[0] for lengths in (local.window, local.stride))
            raise self.not_published_at(size, f"Published views fill sides of {window} and any number of {step} more.")
        return super().stages(model, size, common, started)

    def local(self, model: Model) -> Local:
        """The views, with Gaussian weights."""
        local = replace(super().local(model), weights=GAUSSIAN, spread=self.spread)
        return replace(local, floor=_FLOOR, below=0.5) if self.published else local
