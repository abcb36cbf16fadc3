"""The settings that every method shares: which model this is, which pass is meant, which clock gates follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .settings import Settings, setting

FAMILIES = ("auto", "sd1", "sd2", "sdxl", "sdxl_turbo", "sdxl_refiner")
NOISE_LEVEL, STEP_FRACTION = "noise level", "step fraction"
FIRST, HIRES, BOTH, ABOVE = "first pass", "hires pass", "both passes", "above threshold"


@dataclass(frozen=True)
class Common(Settings):
    """Settings beside the method's own."""

    title: ClassVar[str] = "Hires Lab"

    passes: str = setting(
        BOTH,
        "Passes",
        "Which pass is changed: the first, the hires pass, both, or any pass above the megapixel threshold.",
        choices=(FIRST, HIRES, BOTH, ABOVE),
        simple=True,
    )
    threshold: float = setting(
        1.0,
        "Threshold",
        "Megapixels from which 'above threshold' applies.",
        low=0.0,
        high=64.0,
        step=0.05,
    )
    native_size: int = setting(
        0,
        "Native size",
        "The size in pixels that the model was trained at; 0 asks the checkpoint, then its family.",
        low=0,
        high=4096,
        step=8,
    )
    family: str = setting(
        "auto",
        "Family",
        "The model's family; 'auto' reads it from the network. Turbo and LCM models look like their "
        "parents, so 'sdxl_turbo' has to be chosen.",
        choices=FAMILIES,
    )
    clock: str = setting(
        NOISE_LEVEL,
        "Clock",
        "What gates follow: the noise level (the same for every sampler and in img2img), or the "
        "fraction of steps done (as the published code counts).",
        choices=(NOISE_LEVEL, STEP_FRACTION),
    )

    def wants_pass(self, is_hires: bool, width: int, height: int, only: bool = False) -> bool:
        """Whether a pass at `width` x `height` pixels is to be changed. only: there is no other (img2img)."""
        if self.passes == ABOVE:
            return width * height >= self.threshold * 1e6
        return only or self.passes == BOTH or (self.passes == HIRES) == is_hires
