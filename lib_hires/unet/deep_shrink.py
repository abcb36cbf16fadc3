"""Deep Shrink ("Kohya Hires.fix"): the input of one encoder block is shrunk for the first part of a run.

Everything below that block works near the native size and lays out one composition; the mirrored decoder block enlarges
again. Two stages can use two depths. Skips above the block keep their full size. Source: kohya-ss's Deep Shrink; the
parameters are those of the public WebUI extension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config.common import Common
from ..config.errors import SettingError
from ..config.settings import AUTO, setting
from ..plan.method import Method, UNetPlan, Windows
from ..plan.models import LEAST_SCALE, Model
from ..plan.route import Shrink, Size
from ..schedule import Gate


@dataclass(frozen=True)
class DeepShrink(Method):
    """Settings of Deep Shrink; the defaults are those of the public extension."""

    name: ClassVar[str] = "deep_shrink"
    title: ClassVar[str] = "Deep Shrink"
    summary: ClassVar[str] = "shrinks what enters one encoder block early on"
    use_when: ClassVar[str] = "1.5x to 2.5x the native size, where the picture should keep its fine structure"
    source: ClassVar[str] = "kohya-ss, Deep Shrink (Hires.fix)"

    strength: float = setting(
        1.0,
        "Shrink strength",
        "How long both stages last, relative to their stops.",
        low=0.25,
        high=2.0,
        step=0.05,
        simple=True,
    )
    stop1: float = setting(0.15, "Stop 1", "End of stage 1, as a fraction of the run.", low=0.0, high=1.0, step=0.01)
    depth1: int = setting(
        3, "Depth 1", "Encoder block that is shrunk in stage 1, counted from 1.", low=1, high=12, step=1
    )
    stop2: float = setting(0.30, "Stop 2", "End of stage 2, as a fraction of the run.", low=0.0, high=1.0, step=0.01)
    depth2: int = setting(
        4, "Depth 2", "Encoder block that is shrunk in stage 2, counted from 1.", low=1, high=12, step=1
    )
    scaler: str = setting(
        "bicubic",
        "Scaler",
        "Interpolation in both directions.",
        choices=("bicubic", "bilinear", "nearest", "nearest-exact"),
    )
    downscale: float = setting(0.5, "Downscale", "What the block's input is shrunk to.", low=0.1, high=1.0, step=0.05)
    upscale: float = setting(
        AUTO,
        "Upscale",
        "What the mirrored block's input is enlarged by; -1 goes back to exactly the size before.",
        low=1.0,
        high=4.0,
        step=0.05,
        auto=True,
    )
    smooth_scaling: bool = setting(
        True, "Smooth scaling", "Let the shrink fade out over its stage instead of ending at once."
    )
    early_out: bool = setting(
        False, "Early out", "Enlarge at the decoder block of the same number instead of the mirrored one."
    )
    window_attention: bool = setting(
        False,
        "Shrink windows",
        "HiDiffusion's window attention beside the shrink: faster, nearly the same picture.",
    )
    min_scale: float = setting(
        LEAST_SCALE,
        "Shrink minimum scale",
        "Deep Shrink stays off below this scale over the native size.",
        low=1.0,
        high=8.0,
        step=0.05,
    )

    def validate(self) -> None:
        """Stage 2 follows stage 1."""
        if self.stop1 > self.stop2:
            raise SettingError(
                "stop1",
                self.stop1,
                f"at most 'stop2', which is {self.stop2:g}",
                "Lower it, or raise 'stop2': stage 2 follows stage 1.",
            )

    def plan(self, model: Model, size: Size, common: Common) -> UNetPlan:
        """The two shrinks, stage 2 from the end of stage 1. Raises `SettingError` for a depth the network does not have."""
        deepest = len(model.structure.encoder)
        for name in ("depth1", "depth2"):
            if getattr(self, name) > deepest:
                raise SettingError(
                    name, getattr(self, name), f"between 1 and {deepest} for {model.family.title}", "Lower it."
                )
        windows = None
        if self.window_attention and model.structure.top_attention_level is not None:
            windows = Windows(Gate(1.0, 0.0, common.clock), model.structure.top_attention_level)
        scale = model.scale(*size)
        if scale < self.min_scale:
            note = (
                f"Deep Shrink is off: {size[1] * 8}x{size[0] * 8} is {scale:.2f} times the native size {model.native}, "
                f"below 'min_scale' {self.min_scale:g}."
            )
            return UNetPlan((), windows, (note,))
        end1, end2 = (min(1.0, stop * self.strength) for stop in (self.stop1, self.stop2))
        stages = (self._shrink(self.depth1, 0.0, end1, common), self._shrink(self.depth2, end1, end2, common))
        return UNetPlan(tuple(stage for stage in stages if stage.gate.ever_open), windows)

    def _shrink(self, depth: int, start: float, end: float, common: Common) -> Shrink:
        up = None if self.upscale == AUTO else self.upscale
        return Shrink(
            Gate(end, start, common.clock, floors=False),
            depth - 1,
            self.downscale,
            up,
            self.scaler,
            self.smooth_scaling,
            self.early_out,
        )
