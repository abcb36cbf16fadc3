"""AccDiffusion: DemoFusion whose views are told only what they show, and whose grids talk to each other.

    window prompts       a view keeps a word if enough of it lies where the word's cross-attention was high in the first stage
    window interaction   dilated grids exchange latents by a bijection at each position before the network, and back after it
    v2                   a Canny ControlNet holds each view to the edges of the stage before

Sources: arXiv 2407.10738 (ECCV 2024), sections 3.2 and 3.3; v2: arXiv 2412.02099.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..config.errors import SettingError
from ..config.settings import AUTO, setting
from ..plan.models import Model
from ..plan.route import Size
from ..plan.tiling import BY_CHANNEL, BY_POSITION, NO_SHUFFLE, CanvasPlan, Edges, Stage
from .method import AS_FITS, StagedMethod

NO_WORDS = "words are not looked for, every view has the whole prompt: this picture is too long to be seen as a whole."
NO_CIRCLE = (
    "the first stage does not know that edges meet, since words are looked for in it: 'word_share' 0 draws it so."
)
_MAP = 4
"""Latents a cell of the attention maps: published views move by whole cells."""


@dataclass(frozen=True)
class AccDiffusion(StagedMethod):
    """Settings of AccDiffusion v1."""

    name: ClassVar[str] = "accdiffusion"
    group: ClassVar[str] = "windows"
    title: ClassVar[str] = "AccDiffusion"
    summary: ClassVar[str] = "DemoFusion with a prompt of its own for each view and grids that exchange latents"
    use_when: ClassVar[str] = "as DemoFusion, where small copies of the subject still appear"
    source: ClassVar[str] = "arXiv 2407.10738"

    word_share: float = setting(
        0.3,
        "Word share",
        "A view keeps a word if this fraction of the view lies where the word was drawn in the first stage; 0 gives "
        "every view the whole prompt.",
        low=0.0,
        high=1.0,
        step=0.05,
        simple=True,
    )
    interaction: str = setting(
        AS_FITS,
        "Window interaction",
        "How the dilated grids exchange latents: by position (the paper), by channel and position (the published code), "
        "or not. 'auto' is by position, with 'As published' by channel.",
        choices=(AS_FITS, BY_POSITION, BY_CHANNEL, NO_SHUFFLE),
    )
    view_guidance: float = setting(
        AUTO,
        "View guidance",
        "CFG scale inside views; -1 takes the sampler's, as it does where the sampler has none (CFG 1).",
        low=1.0,
        high=30.0,
        step=0.5,
        auto=True,
    )

    def canvas(self, model: Model, size: Size, scale: float) -> CanvasPlan:
        """DemoFusion's canvas with window prompts and interaction."""
        plan = super().canvas(model, size, scale)
        shuffle = self.interaction
        if shuffle == AS_FITS:
            shuffle = BY_CHANNEL if self.published else BY_POSITION
        dilated = plan.dilated and replace(plan.dilated, shuffle=shuffle, group=16 if self.published else 0)
        return replace(
            plan,
            dilated=dilated,
            window_prompts=self.word_share,
            guidance=0.0 if self.view_guidance == AUTO else self.view_guidance,
        )

    def left_out(self, model: Model, stages: Sequence[Stage], started: bool = False) -> tuple[str, ...]:
        """The words of a long panorama; edges that meet in a first stage."""
        left = super().left_out(model, stages, started)
        if self.word_share and self.is_long(model, stages[-1].size) and (started or len(stages) > 1):
            return (*left, NO_WORDS)
        is_plain_first = len(stages) > 1 and stages[0].canvas is None
        return (*left, NO_CIRCLE) if is_plain_first and (self.wrap_x or self.wrap_y) else left

    def view_options(self) -> dict[str, Any]:
        """Views keep their places for a stage, since their prompts belong to these places."""
        return {"jitter_once": True, "jitter_unit": _MAP}


@dataclass(frozen=True)
class AccDiffusionV2(AccDiffusion):
    """Settings of AccDiffusion v2: v1 with a Canny ControlNet on the views."""

    name: ClassVar[str] = "accdiffusion_v2"
    group: ClassVar[str] = ""
    title: ClassVar[str] = "AccDiffusion v2"
    summary: ClassVar[str] = "AccDiffusion whose views are held to the edges of the stage before by a ControlNet"
    use_when: ClassVar[str] = "as AccDiffusion, where views distort limbs and lines; needs a Canny ControlNet"
    source: ClassVar[str] = "arXiv 2412.02099"

    edge_strength: float = setting(
        0.6, "Edge strength", "How much the ControlNet's residuals count.", low=0.0, high=2.0, step=0.05, simple=True
    )
    canny_sigma: float = setting(
        0.3,
        "Canny sigma",
        "Canny's thresholds lie this fraction below and above the picture's median.",
        low=0.0,
        high=1.0,
        step=0.05,
    )
    edge_start: float = setting(
        0.0, "Edge start", "Start of the ControlNet, as a fraction of a stage.", low=0.0, high=1.0, step=0.05
    )
    edge_end: float = setting(
        1.0, "Edge end", "End of the ControlNet, as a fraction of a stage.", low=0.0, high=1.0, step=0.05
    )

    def validate(self) -> None:
        """The ControlNet has to start before it ends."""
        super().validate()
        if self.edge_start >= self.edge_end:
            raise SettingError(
                "edge_start", self.edge_start, f"below 'edge_end', which is {self.edge_end:g}", "Lower it."
            )

    def canvas(self, model: Model, size: Size, scale: float) -> CanvasPlan:
        """v1's canvas with edges."""
        return replace(
            super().canvas(model, size, scale),
            edges=Edges(self.edge_strength, self.canny_sigma, self.edge_start, self.edge_end),
        )
