"""What the passes of a picture will be, before the first one is drawn: which are to be changed, their stages, their work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...canvas.method import CanvasMethod
from ...config.errors import HiresError
from ...plan.method import Wanted
from ...plan.models import LATENT_FACTOR, Model
from ...plan.route import Size
from ...plan.tiling import Stage
from ...request import Request
from .progress import work_of
from .samplers import calls_of, keeps_state


def is_hires(p: Any) -> bool:
    """Whether the pass that is about to be drawn is the hires pass."""
    return bool(getattr(p, "is_hr_pass", False))


def wants(request: Request, p: Any, size: Size, hires: bool) -> bool:
    """Whether a pass of a job is to be changed. size: (height, width) in latents; hires: whether it is the hires pass."""
    height, width = (length * LATENT_FACTOR for length in size)
    return request.common.wants_pass(hires, width, height, only=hasattr(p, "init_images"))


def works(p: Any, request: Request, size: Size, model_of: Callable[[], Model]) -> list[list[int]]:
    """The work of each stage of each pass of a picture; [] where no pass has a canvas: the host's own jobs will do.

    size: of the first pass, (height, width) in latents; model_of: what the host draws with.
    """
    if hasattr(p, "init_images") or not (request.is_automatic or isinstance(request.method, CanvasMethod)):
        return []
    passes = [(size, None)]
    if getattr(p, "enable_hr", False):
        first, last = (p.height, p.width), (p.hr_upscale_to_y, p.hr_upscale_to_x)
        first, last = (tuple(length // LATENT_FACTOR for length in sides) for sides in (first, last))
        last = last[0] - p.truncate_y, last[1] - p.truncate_x
        passes = [(first, None), (last, p.hr_second_pass_steps or p.steps)]
    try:
        model = model_of()
        stages = [_stages(p, request, model, each, bool(number)) for number, (each, _) in enumerate(passes)]
    except HiresError:  # the sampler's function will raise it again
        return []
    if not any(stage.canvas for each in stages for stage in each):
        return []
    if getattr(p, "firstpass_image", None) is not None:
        stages[0] = ()
    samplers = (p.sampler, _hires_sampler(p) if len(passes) > 1 else None)
    calls = [calls_of(p, samplers[number], each, bool(number), passes[number][1]) for number, each in enumerate(stages)]
    return [[work_of(*pair) for pair in zip(*pairs)] for pairs in zip(stages, calls)]


def _hires_sampler(p: Any) -> Any:
    """The sampler of the hires pass, which the host has not made yet where it is another."""
    name = getattr(p, "hr_sampler_name", None)
    if not name or name == p.sampler_name:
        return p.sampler
    from modules import sd_samplers, shared

    return sd_samplers.create_sampler(name, shared.sd_model)


def _stages(p: Any, request: Request, model: Model, size: Size, hires: bool) -> Sequence[Stage]:
    """How a pass of txt2img will be drawn; one stage where it is left alone or has no canvas."""
    if wants(request, p, size, hires):
        request = request.resolved(model, Wanted(size, p.steps, keeps_state(p.sampler)))
        if isinstance(request.method, CanvasMethod):
            return request.method.stages(model, size, request.common, started=hires)
    return (Stage(size),)
