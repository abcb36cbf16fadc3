"""A plan in words, for the dry run and the report: which steps take which route through the network."""

from __future__ import annotations

from collections.abc import Sequence

from ..schedule import Level
from .method import UNetPlan
from .models import LATENT_FACTOR, Model
from .route import Size, find_route, sizes_in_words
from .tiling import Stage, evaluations_of


def describe_plan(model: Model, size: Size, plan: UNetPlan, levels: Sequence[Level]) -> list[str]:
    """Lines for latents of `size` (height, width) and the noise levels of the UNet calls, equal neighbours together."""
    scale = model.scale(*size)
    lines = [f"{_pixels(size)} is {scale:.2f} times the native size {model.native} of this {model.family.title} model."]
    lines += plan.notes
    spans: list[tuple[str, int, int]] = []
    for call, level in enumerate(levels, start=1):
        words = _call_in_words(model, size, plan, level)
        if spans and spans[-1][0] == words:
            spans[-1] = (words, spans[-1][1], call)
        else:
            spans.append((words, call, call))
    lines += [f"call {first:>3} to {last:>3}: {words}" for words, first, last in spans]
    return [*lines, f"{len(levels)} denoiser calls."]


def _call_in_words(model: Model, size: Size, plan: UNetPlan, level: Level) -> str:
    route = find_route(model.structure, size, plan.edits, level)
    windows = plan.windows is not None and plan.windows.gate.is_open(level)
    way = "plain" if route is None else f"{route.words}: {sizes_in_words(route)}"
    return f"{way}, attention in windows at level {plan.windows.level}" if windows else way


def describe_stages(stages: Sequence[Stage], calls: Sequence[int]) -> list[str]:
    """Lines for the stages of a run; `calls`: denoiser calls of each."""
    lines = []
    for number, (stage, count) in enumerate(zip(stages, calls), start=1):
        if stage.looks:
            lines.append(
                f"before it: {len(stage.looks)} looks at the picture at {_pixels(stage.first_size)}, to find where its words lie"
            )
        lines.append(
            f"stage {number}: {_pixels(stage.size)}, {count} denoiser calls, {count * stage.evaluations()} UNet evaluations "
            f"({_canvas_in_words(stage)})"
        )
    total = evaluations_of(stages, calls)
    return [*lines, f"{len(stages)} stage(s), {sum(calls)} denoiser calls, {total} UNet evaluations."]


def run_in_words(title: str, stages: Sequence[Stage], calls: Sequence[int]) -> str:
    """One line for what is about to run: "DemoFusion: 256x256, 512x512; 124 UNet evaluations"."""
    total = evaluations_of(stages, calls)
    return f"{title}: {stage_sizes(stages)}; {total} UNet evaluation{'s' * (total != 1)}"


def stage_sizes(stages: Sequence[Stage]) -> str:
    """The stages' sizes in pixels: "256x256, 512x512"."""
    return ", ".join(_pixels(stage.size) for stage in stages)


def _pixels(size: Size) -> str:
    return f"{size[1] * LATENT_FACTOR}x{size[0] * LATENT_FACTOR}"


def _canvas_in_words(stage: Stage) -> str:
    plan = stage.canvas
    if plan is None:
        return "the whole picture at once"
    parts = []
    if plan.local is not None:
        height, width = (length * LATENT_FACTOR for length in plan.local.view_size(stage.size))
        parts.append(f"{len(plan.local.views(stage.size))} views of {width}x{height}")
    if plan.dilated is not None:
        parts.append(f"{plan.dilated.dilation**2} dilated grids")
    return " and ".join(parts) + " a call"
