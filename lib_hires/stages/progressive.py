"""The progressive runner: native size first, then stage after stage up to the size asked for, on anybody's sampler.

stage 0     sample from noise                                     (attention maps are gathered here if wanted)
stage k     z = enlarge(the latents before); sample from z + sigma n, the canvas making each prediction
            afterwards each image gets back the mean of its first stage (`anchored`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..canvas import draws
from ..canvas.batches import Batches
from ..canvas.canvas import Canvas
from ..canvas.views import statistics
from ..config.errors import SettingError
from ..plan.route import Size
from ..plan.tiling import Stage
from ..randomness import Records, Stream
from ..schedule import Moment
from .handoff import anchored, enlarge

LEAST_SIGNAL = 0.5
"""Share of the signal in a sampler's state from which on a stage's own estimate is better than the picture before it."""


def losing_sampler(name: str, allowed: Sequence[str]) -> SettingError:
    """The error for a sampler that would lose the skip residual; `allowed`: the names of those that keep it."""
    return SettingError(
        "sampler",
        name,
        f"one of {', '.join(allowed)} where stages have a skip residual",
        "It corrects each step from its own memory of the one before. Use another, or switch 'skip_residual' off.",
    )


@dataclass
class StageRun:
    """One stage while it runs.

    number: counted from 0. canvas: None for plain sampling. reference: (B, C, H, W) the clean latents that it starts from
    and noise: unit noise of that shape; both None for the first. before: the latents that the stage before handed on, at its
    own size. prompts: for each image and view the window prompt. hint: (B, 3, 8 H, 8 W) edges in 0..1.
    """

    stage: Stage
    number: int
    canvas: Canvas | None = None
    reference: Tensor | None = None
    noise: Tensor | None = None
    before: Tensor | None = None
    prompts: Any = None
    hint: Tensor | None = None

    @property
    def size(self) -> Size:
        """Height and width in latents."""
        return self.stage.size

    def pull(self, state: Tensor, moment: Moment, scaled: bool) -> Tensor:
        """The sampler's state after the skip residual: (1 - c1) x + c1 q, c1 = c^3, q the noised reference.

        state: (B, C, H, W). scaled: the state is x / sqrt(sigma^2 + 1), as DDIM's; otherwise z + sigma n.
        Source: DemoFusion, eq. 4.
        """
        plan = self.stage.canvas
        if plan is None or not plan.skip_residual or self.reference is None:
            return state
        share = moment.cosine**plan.cosines.skip
        target = self.reference + moment.sigma * self.noise
        if scaled:
            target = target / (moment.sigma**2 + 1) ** 0.5
        return (1 - share) * state + share * target.to(state)

    def so_far(self, estimate: Tensor, moment: Moment) -> Tensor:
        """The best picture of a stage that is stopped at a moment: the call's estimate of the clean latents (B, C, H, W).

        While less than half of the state is signal, sqrt(a) = 1 / sqrt(sigma^2 + 1) < 1/2, the estimate has no detail, or is
        noise where the network is small; a stage that started from a picture then still has that one.
        """
        if self.reference is not None and (moment.sigma**2 + 1) ** -0.5 < LEAST_SIGNAL:
            return self.reference
        return estimate


@dataclass
class Progressive:
    """What a run of stages needs beside a sampler. `seeds`: of each image; `records`: draws to replay."""

    stages: Sequence[Stage]
    seeds: Sequence[int]
    records: Records = field(default_factory=dict)
    prepare: Callable[[StageRun], None] = lambda run: None
    """Called before each stage after the first: puts window prompts and hints into it."""

    def __post_init__(self) -> None:
        limit = next((stage.canvas.tile_batch for stage in self.stages if stage.canvas), 0)
        self.batches = Batches(limit)

    def run(self, sample: Callable[[StageRun], Tensor], stopped: Callable[[], bool] = lambda: False) -> Tensor:
        """The latents (B, C, H, W) of the last stage; of the one that was running where `stopped()` became true.

        These keep of the first stage's colours what a finished stage's do.
        """
        latents, anchor = None, None
        per_channel = not any(stage.canvas and stage.canvas.published for stage in self.stages)
        for number, stage in enumerate(self.stages):
            run = self.first(stage) if latents is None else self.later(stage, number, latents)
            if number:
                self.prepare(run)
            latents = sample(run)
            if number:
                latents = anchored(latents, stage, anchor, per_channel)
            elif len(self.stages) > 1:
                anchor = statistics(latents, per_channel)
            if stopped():
                break
        return latents

    def first(self, stage: Stage) -> StageRun:
        """The run of a stage that starts from noise; it may have a canvas (MultiDiffusion)."""
        return StageRun(stage, 0, self.canvas(stage, 0))

    def later(self, stage: Stage, number: int, latents: Tensor) -> StageRun:
        """The run of a stage that starts from the `latents` before it."""
        stretch = stage.canvas is not None and stage.canvas.published
        reference = enlarge(latents, stage.size, stretch, stage.wrap)
        noise = self.noise(stage, number, reference)
        return StageRun(stage, number, self.canvas(stage, number), reference, noise, before=latents)

    def started(self, stage: Stage, number: int, reference: Tensor, noise: Tensor) -> StageRun:
        """The run of a stage from latents and noise of its own size."""
        return StageRun(stage, number, self.canvas(stage, number), reference, noise, before=reference)

    def canvas(self, stage: Stage, number: int) -> Canvas | None:
        """The stage's canvas."""
        if stage.canvas is None:
            return None
        return Canvas(stage.canvas, stage.size, self.seeds, number, self.records, self.batches)

    def noise(self, stage: Stage, number: int, like: Tensor) -> Tensor:
        """Unit noise for a stage: each image's own, from its seed and the stage's number."""
        stream = Stream("stage noise", self.records.get("stage noise"))
        shape = (like.shape[1], *stage.size)
        return torch.stack([draws.normal(stream, shape, seed, number) for seed in self.seeds]).to(like)
