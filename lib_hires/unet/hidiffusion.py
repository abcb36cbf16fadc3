"""HiDiffusion: RAU-Net shrinks the deep features for the noisy part of a run, MSW-MSA attends in windows.

Above its native size a UNet's deep blocks see a larger map than they were trained on and draw the subject again. RAU-Net
brings them back to the native size while the layout is decided; window attention makes the top level about four times
cheaper. No weights change. Source: arXiv 2311.17528 (ECCV 2024), sections 3.2 and 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config.common import Common
from ..config.errors import SettingError
from ..config.settings import AUTO, setting
from ..plan.method import Method, UNetPlan, Windows
from ..plan.models import LEAST_SCALE, Model
from ..plan.route import Dilate, Edit, Pool, Size
from ..schedule import Gate

LARGE_SCALE = 4.0
"""From this scale on both sides the published second regime holds (2048 px for SD1.5, 4096 px for SDXL)."""
AGGRESSIVE_END = 8 / 50


@dataclass(frozen=True)
class Ratios:
    """Ends of the two clocks as fractions of a run; `t1` is the main one. The published values."""

    t1: float
    t2: float


def published_ratios(model: Model, size: Size) -> Ratios:
    """T1 and T2 by family and size regime (the published tables; few-step models by the SDXL-Turbo row)."""
    if model.family.few_step:
        return Ratios(0.5, 0.0)
    return Ratios(0.7, 0.3) if model.smallest_scale(*size) >= LARGE_SCALE else Ratios(0.4, 0.0)


@dataclass(frozen=True)
class HiDiffusion(Method):
    """Settings of HiDiffusion; the defaults are the published ones."""

    name: ClassVar[str] = "hidiffusion"
    title: ClassVar[str] = "HiDiffusion"
    summary: ClassVar[str] = "shrinks the deep features early on and attends in windows"
    use_when: ClassVar[str] = "1.5x to 4x the native size, where speed matters: faster than plain sampling"
    source: ClassVar[str] = "arXiv 2311.17528"

    strength: float = setting(
        1.0,
        "Strength",
        "How long RAU-Net stays on, relative to the published time for this model and size. More keeps "
        "the layout more coherent, less leaves more steps for detail.",
        low=0.25,
        high=2.0,
        step=0.05,
        simple=True,
    )
    raunet: bool = setting(
        True, "RAU-Net", "Shrink the deep features during the first part of a run: one subject, not several."
    )
    window_attention: bool = setting(
        True,
        "Window attention",
        "Attend inside four moving windows at the top level: much faster, nearly the same picture.",
    )
    t1: float = setting(
        AUTO,
        "T1",
        "End of the main shrink, as a fraction of the run; -1 takes the published value times the strength.",
        low=0.0,
        high=1.0,
        step=0.01,
        auto=True,
    )
    t2: float = setting(
        AUTO,
        "T2",
        "End of the second shrink (at 4x native and above); -1 takes the published value times the strength.",
        low=0.0,
        high=1.0,
        step=0.01,
        auto=True,
    )
    aggressive: str = setting(
        "auto",
        "Aggressive",
        "SDXL below 4x native: stride 4 first, pooling after. 'auto' leaves it out for inpainting models.",
        choices=("auto", "on", "off"),
    )
    aggressive_end: float = setting(
        AGGRESSIVE_END,
        "Aggressive end",
        "End of the aggressive stage, as a fraction of the run.",
        low=0.0,
        high=1.0,
        step=0.01,
    )
    window_end: float = setting(
        1.0,
        "Window end",
        "End of window attention, as a fraction of the run.",
        low=0.0,
        high=1.0,
        step=0.01,
    )
    window_start: float = setting(
        0.0,
        "Window start",
        "Start of window attention, as a fraction of the run.",
        low=0.0,
        high=1.0,
        step=0.01,
    )
    window_shift: bool = setting(
        True,
        "Window shift",
        "Move the windows from step to step, by the image's seed, so that no border stays in one place.",
    )
    min_scale: float = setting(
        LEAST_SCALE,
        "Minimum scale",
        "RAU-Net stays off below this scale over the native size: at the native size there is nothing to shrink.",
        low=1.0,
        high=8.0,
        step=0.05,
    )

    def validate(self) -> None:
        """One part has to be on, and windows have to start before they end."""
        if not (self.raunet or self.window_attention):
            raise SettingError(
                "raunet",
                False,
                "true where 'window_attention' is false",
                "Switch one of the two parts on, or choose method 'none'.",
            )
        if self.window_attention and self.window_start >= self.window_end:
            raise SettingError(
                "window_start", self.window_start, f"below 'window_end', which is {self.window_end:g}", "Lower it."
            )

    def plan(self, model: Model, size: Size, common: Common) -> UNetPlan:
        """RAU-Net's edits and the window level for latents of `size` (height, width)."""
        notes = []
        edits: tuple[Edit, ...] = ()
        if self.raunet:
            scale = model.scale(*size)
            if scale >= self.min_scale:
                edits = self._edits(model, size, common.clock)
            else:
                notes.append(
                    f"RAU-Net is off: {size[1] * 8}x{size[0] * 8} is {scale:.2f} times the native size {model.native}, "
                    f"below 'min_scale' {self.min_scale:g}."
                )
        return UNetPlan(edits, self._windows(model, common.clock), tuple(notes))

    def _edits(self, model: Model, size: Size, clock: str) -> tuple[Edit, ...]:
        """Which of the two shrinks follows which clock: SD1.x and SD2.x stride by T1 and pool by T2, SDXL the other way."""
        structure, few = model.structure, model.family.few_step
        published = published_ratios(model, size)
        t1 = Gate(self._end(self.t1, published.t1), 0.0, clock)
        t2 = Gate(self._end(self.t2, published.t2), 0.0, clock)
        pool_at = structure.first_pair(1)
        if model.family.key == "sdxl_refiner" or structure.levels > 3:
            dilate, pool = Dilate(t1, structure.downsampler(0)), Pool(t2, pool_at)
        elif few:
            return (Pool(t1, pool_at),)
        elif self._is_aggressive(model, size):
            stage = Gate(min(self._end(AUTO, self.aggressive_end), t1.end), 0.0, clock)
            dilate, pool = Dilate(stage, structure.downsampler(1)), Pool(Gate(t1.end, stage.end, clock), pool_at)
        else:
            dilate, pool = Dilate(t2, structure.downsampler(1)), Pool(t1, pool_at)
        return tuple(edit for edit in (dilate, pool) if edit.gate.ever_open)

    def _end(self, chosen: float, published: float) -> float:
        return min(1.0, published * self.strength) if chosen == AUTO else chosen

    def _is_aggressive(self, model: Model, size: Size) -> bool:
        if self.aggressive != "auto":
            return self.aggressive == "on"
        return model.smallest_scale(*size) < LARGE_SCALE and not model.inpainting

    def _windows(self, model: Model, clock: str) -> Windows | None:
        level = model.structure.top_attention_level
        if not self.window_attention or level is None:
            return None
        return Windows(Gate(self.window_end, self.window_start, clock), level, self.window_shift)
