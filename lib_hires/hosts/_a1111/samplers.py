"""Samplers of AUTOMATIC1111 under stages: which keep what is put into their state, how many steps a strength means.

A stage's skip residual is written into the tensor that a sampler hands to the model. docs/hosts.md has what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...plan.tiling import Stage
from ...schedule import TRAINED_STEPS
from ...stages.progressive import losing_sampler

LOSING = ("UniPC", "DPM adaptive")
"""UniPC corrects each step from its own memory of the one before; DPM adaptive chooses its steps by errors that the change
would enter, so that nobody knows how many there will be."""


def check(sampler: Any) -> None:
    """Raises `SettingError` for a sampler that would lose the skip residual of stages."""
    from modules import sd_samplers

    if not keeps_state(sampler):
        allowed = [each.name for each in sd_samplers.all_samplers if each.name not in LOSING]
        raise losing_sampler(sampler.config.name, allowed)


def keeps_state(sampler: Any) -> bool:
    """Whether a stage's skip residual stays in its state."""
    return sampler.config.name not in LOSING


def is_scaled(sampler: Any) -> bool:
    """Whether its state is x / sqrt(sigma^2 + 1): the timestep samplers'."""
    return not hasattr(sampler.model_wrap_cfg.inner_model, "sigmas")


def denoising_strength(stage: Stage, steps: int, scaled: bool) -> float:
    """The host's `denoising_strength` that runs exactly the stage's steps: it runs int(d steps) + 1, timestep samplers two less."""
    from modules import shared

    if getattr(shared.opts, "img2img_fix_steps", False):
        return stage.strength
    wanted = stage.steps_of(steps)
    encoded = min(wanted + 1, steps - 1) if scaled else wanted - 1
    return (encoded + 0.5) / steps


def calls_of(p: Any, sampler: Any, stages: Sequence[Stage], is_started: bool, steps: int | None = None) -> list[int]:
    """Denoiser calls of each stage of a pass, as the host foresees them: two a step for samplers of second order.

    is_started: the host begins with latents; steps: what it is told then, None where its `denoising_strength` decides.
    """
    from modules import shared

    scaled, asked = is_scaled(sampler), steps or p.steps
    if is_started:
        is_exact = steps is not None or getattr(shared.opts, "img2img_fix_steps", False)
        encoded = asked - 1 if is_exact else int(min(p.denoising_strength, 0.999) * asked)
        counts = [encoded - 1 if scaled else encoded + 1]
    else:
        first = len(range(0, TRAINED_STEPS, max(1, TRAINED_STEPS // asked))) - 1 if scaled else asked
        counts = [first, *(stage.steps_of(asked) for stage in stages[1:])]
    return [sampler.config.total_steps(max(1, count)) for count in counts]
