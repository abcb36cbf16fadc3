"""Auto: a method for each pass, chosen by the model, the size and the sampler. docs/quality.md has what speaks for the choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config.settings import setting
from .method import Choice, Method, Wanted
from .models import LATENT_FACTOR, LEAST_SCALE, Model
from .tiling import WHOLE_FROM, first_size

QUALITY, SPEED = "quality", "speed"
LEAST_STEPS = 10
"""Below so many steps a stage that runs a part of them has hardly any."""


@dataclass(frozen=True)
class Auto(Method):
    """Settings of Auto."""

    name: ClassVar[str] = "auto"
    title: ClassVar[str] = "Auto"
    summary: ClassVar[str] = "chooses a method by the model, the size and the pass"
    use_when: ClassVar[str] = "everyday use: it says below the picture what it chose, and leaves small pictures alone"
    source: ClassVar[str] = "docs/quality.md"
    automatic: ClassVar[bool] = True

    aim: str = setting(
        QUALITY,
        "Aim",
        "'quality' draws in stages where that can be done; 'speed' takes HiDiffusion at every size.",
        choices=(QUALITY, SPEED),
        simple=True,
        since=1,
    )

    def choice(self, model: Model, wanted: Wanted) -> Choice:
        """What to draw a pass with."""
        height, width = wanted.size
        scale = model.scale(height, width)
        size = f"{width * LATENT_FACTOR}x{height * LATENT_FACTOR} is {scale:.2f} times the native size {model.native}"
        if scale < LEAST_SCALE:
            return Choice("none", f"{size}, too little to change anything")
        against = self._against_stages(model, wanted)
        return Choice("hidiffusion", f"{size}, {against}") if against else Choice("demofusion", size)

    def _against_stages(self, model: Model, wanted: Wanted) -> str:
        """Why stages are not taken; empty where they are."""
        if self.aim == SPEED:
            return "and the aim is speed"
        if first_size(wanted.size, model.native // LATENT_FACTOR)[1] < WHOLE_FROM:
            return "too little for stages"
        if not wanted.stages:
            return "and this sampler is not made for stages"
        if model.family.few_step or wanted.steps < LEAST_STEPS:
            return "and there are too few steps for stages"
        return ""
