"""Auto: the method that the measurements speak for at a model, a size and a kind of pass (docs/quality.md says why)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config.settings import setting
from .method import Choice, Method, Wanted
from .models import LATENT_FACTOR, Model

QUALITY, SPEED = "quality", "speed"
ALONE = 1.25
"""Up to this scale over the native size models draw by themselves."""
STAGED = 1.75
"""Linear scale from which stages are worth their time."""


@dataclass(frozen=True)
class Auto(Method):
    """Settings of Auto."""

    name: ClassVar[str] = "auto"
    title: ClassVar[str] = "Auto"
    summary: ClassVar[str] = "chooses one of the methods below by the model, the size and the pass"
    use_when: ClassVar[str] = "everyday use: it says below the picture what it chose, and leaves small pictures alone"
    source: ClassVar[str] = "docs/quality.md"
    automatic: ClassVar[bool] = True

    aim: str = setting(
        QUALITY,
        "Aim",
        "'quality' takes stages where they draw the better picture; 'speed' what is never slower than plain sampling.",
        choices=(QUALITY, SPEED),
        simple=True,
    )

    def choice(self, model: Model, wanted: Wanted) -> Choice:
        """What to draw a pass with."""
        height, width = wanted.size
        scale = model.scale(height, width)
        size = f"{width * LATENT_FACTOR}x{height * LATENT_FACTOR} is {scale:.2f} times the native size {model.native}"
        if scale <= ALONE:
            return Choice("none", f"{size}, which the model draws by itself")
        if self.aim == SPEED:
            return Choice("hidiffusion", f"{size}, and the aim is speed")
        if scale < STAGED:
            return Choice("hidiffusion", f"{size}, too little for stages")
        if wanted.started:
            return Choice("hidiffusion", f"{size}, and the layout is there already")
        if model.family.few_step or not wanted.stages:
            why = "Turbo and LCM models have too few steps" if model.family.few_step else "this sampler is not made"
            return Choice("hidiffusion", f"{size}; {why} for stages")
        return Choice("demofusion", size)
