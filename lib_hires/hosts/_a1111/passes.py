"""A sampling pass of AUTOMATIC1111 by a method with a canvas: one run with views, or stages.

sample          MultiDiffusion and the like: the host's call, on a canvas
                stages: the host's call at the native size; then for each later stage a new sampler of the same kind,
                random numbers of the stage's size, and `sample_img2img` on the enlarged latents
sample_img2img  the hires pass and img2img: the host's call on one canvas, from the host's latents and noise
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...config.errors import Conflict
from ...plan.describe import run_in_words, stage_sizes
from ...plan.models import LATENT_FACTOR, Model
from ...plan.route import Size
from ...request import Request
from ...schedule import NoiseSchedule
from ...stages.progressive import Progressive, StageRun
from ...stages.window_prompts import looks
from ...unet.attention_maps import AttentionMaps
from . import control, samplers
from .progress import Progress, duration, work_of
from .window_words import Prompts

STAGES_KEY = "HL Stages"


class Pass:
    """One call of a sampler's function.

    name: `sample` or `sample_img2img`; arguments: of that call, by name; open_run: makes the `Run` of a stage, given it and
    the attention maps to gather; model: what is drawn with; note: takes a sentence for the user; tell: one for the console,
    once a job; progress: the host's bar, which is at the first stage.
    """

    def __init__(
        self,
        p: Any,
        request: Request,
        model: Model,
        sampler: Any,
        name: str,
        original: Callable[..., Tensor],
        arguments: tuple[tuple, dict],
        open_run: Callable[[StageRun, AttentionMaps | None], Any],
        note: Callable[[str], None],
        tell: Callable[[str], None],
        progress: Progress,
    ):
        self.title, self.tell, self.progress = request.method.title, tell, progress
        self.p, self.sampler, self.original, self.open_run, self.note = p, sampler, original, open_run, note
        self.model, self.is_started = model, name == "sample_img2img"
        self.bound = inspect.signature(original).bind(*arguments[0], **arguments[1])
        self.bound.apply_defaults()
        self.told = self.bound.arguments
        size = tuple(self.told["x"].shape[-2:])
        self.stages = request.method.stages(model, size, request.common, started=self.is_started)
        for text in request.method.left_out(model, self.stages, self.is_started):
            self.note(text)
        self._refuse()
        later = self.stages if self.is_started else self.stages[1:]
        self._wants_words = any(stage.canvas and stage.canvas.window_prompts for stage in later)
        self.checkpoint = p.sd_model.sd_checkpoint_info
        self.maps: AttentionMaps | None = None
        self.prompts: Prompts | None = None

    def _refuse(self) -> None:
        """Raise what cannot be done; note what is left out."""
        if len(self.stages) > 1 and getattr(self.p, "mask", None) is not None:
            raise Conflict(
                "stages of other sizes cannot be drawn under a mask. Draw without it, and inpaint with img2img afterwards."
            )
        later = self.stages if self.is_started else self.stages[1:]
        if any(stage.canvas and stage.canvas.skip_residual for stage in later):
            samplers.check(self.sampler)
        self._takes_edges = any(stage.canvas and stage.canvas.edges for stage in later)
        if self._takes_edges and control.edge_param(self.p) is None:
            self._takes_edges = False
            self.note(control.NO_UNIT)

    def draw(self) -> Tensor:
        """What the sampler's function returns: latents (B, C, H, W)."""
        from modules import shared

        if self._wants_words:
            self.prompts = Prompts(self.p, self.note)
            if self.prompts.texts() is not None:
                self.maps = AttentionMaps(shared.sd_model.model.diffusion_model)
        self.tell(f"{run_in_words(self.title, self.stages, self._calls())}.")
        progressive = Progressive(self.stages, self.p.seeds, prepare=self._prepare)
        if self.is_started:
            run = progressive.started(self.stages[0], 1, self.told["x"], self.told["noise"])
            if self.maps is not None:
                self._look()
            self._prepare(run)
            return self._sampled(run, self.sampler, self._as_asked)
        if len(self.stages) == 1:
            return self._sampled(progressive.first(self.stages[0]), self.sampler, self._as_asked)
        return self._draw_stages(progressive)

    def _calls(self) -> list[int]:
        return samplers.calls_of(self.p, self.sampler, self.stages, self.is_started, self.told.get("steps"))

    def _as_asked(self) -> Tensor:
        return self.original(*self.bound.args, **self.bound.kwargs)

    def _sampled(self, run: StageRun, sampler: Any, call: Callable[[], Tensor], gather: bool = False) -> Tensor:
        opened = self.open_run(run, self.maps if gather else None)
        hints = opened.views.hints = control.Hints(self.p, run, sampler, self._takes_edges)
        try:
            opened.begin(sampler)
            with hints, self.maps if gather and self.maps is not None else contextlib.nullcontext():
                return call()
        finally:
            opened.end()

    def _prepare(self, run: StageRun) -> None:
        """Before a stage that starts from latents: its model, and the words of its views."""
        if not self.is_started:
            self._reload()
        if self.prompts is not None and run.stage.canvas is not None and run.stage.canvas.window_prompts:
            run.prompts = self.prompts.for_views(run, self.maps)
        if self._takes_edges and run.stage.canvas is not None and run.stage.canvas.edges:
            run.hint = control.edges_of(run.before, run)

    # Stages ------------------------------------------------------------------------------------------------------------

    def _draw_stages(self, progressive: Progressive) -> Tensor:
        """The native size, then larger and larger. What is changed of the host's job is put back whatever happens."""
        p = self.p
        names = ("rng", "denoising_strength", "sampler")
        before = {name: getattr(p, name, None) for name in names}
        is_first_batch = getattr(p, "iteration", 0) == 0
        if is_first_batch:
            self.progress.lengthen(p.n_iter * sum(stage.steps_of(p.steps) for stage in self.stages[1:]), p.steps)
        p.extra_generation_params[STAGES_KEY] = stage_sizes(self.stages)

        def sample(run: StageRun) -> Tensor:
            if run.number:
                return self._later(run)
            began = time.perf_counter()
            latents = self._first(run)
            if is_first_batch and not _is_stopped():
                self._tell_rest(time.perf_counter() - began)
            return latents

        try:
            return progressive.run(sample, _is_stopped)
        finally:
            for name, value in before.items():
                setattr(p, name, value)

    def _first(self, run: StageRun) -> Tensor:
        """From the noise that the host would start from at this size."""
        self.p.rng = self._rng(run.size)
        self.told["x"] = self.p.rng.next()
        self.told["image_conditioning"] = self._picture(run.size, self.told["x"])
        return self._sampled(run, self.sampler, self._as_asked, gather=True)

    def _later(self, run: StageRun) -> Tensor:
        """From the stage before."""
        from modules import devices, sd_samplers, shared

        p = self.p
        self.progress.next_stage(run.number)
        devices.torch_gc()
        p.rng = self._rng(run.size)
        sampler = p.sampler = sd_samplers.create_sampler(self.sampler.config.name, shared.sd_model)
        scaled = samplers.is_scaled(sampler)
        p.denoising_strength = samplers.denoising_strength(run.stage, p.steps, scaled)

        def call() -> Tensor:
            return sampler.sample_img2img(
                p,
                run.reference,
                run.noise,
                self.told["conditioning"],
                self.told["unconditional_conditioning"],
                image_conditioning=self._picture(run.size, run.reference),
            )

        return self._sampled(run, sampler, call)

    def _rng(self, size: Size) -> Any:
        from modules import rng

        p, channels = self.p, self.told["x"].shape[1]
        return rng.ImageRNG(
            (channels, *size),
            p.seeds,
            subseeds=p.subseeds,
            subseed_strength=p.subseed_strength,
            seed_resize_from_h=p.seed_resize_from_h,
            seed_resize_from_w=p.seed_resize_from_w,
        )

    def _picture(self, size: Size, like: Tensor) -> Tensor:
        """What an inpainting model gets beside the latents when nothing is given."""
        height, width = (length * LATENT_FACTOR for length in size)
        return self.p.txt2img_image_conditioning(like, width=width, height=height)

    def _reload(self) -> None:
        """A refiner has drawn the end of the stage before: this one begins with the first model again."""
        from modules import sd_models, shared

        if shared.sd_model.sd_checkpoint_info == self.checkpoint:
            return
        with sd_models.SkipWritingToConfig():
            sd_models.reload_model_weights(info=self.checkpoint)
        self.p.setup_conds()
        self.told["conditioning"], self.told["unconditional_conditioning"] = self.p.get_conds()

    def _tell_rest(self, seconds: float) -> None:
        """How long the later stages will take, by the `seconds` of the first."""
        first, *later = (work_of(stage, calls) for stage, calls in zip(self.stages, self._calls()))
        rest = seconds * sum(later) / first
        if rest >= 1:
            self.tell(f"about {duration(rest)} to go in this pass.")

    # Looking at a picture ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _look(self) -> None:
        """Attention maps of latents that are given: a few noised looks at the native size."""
        from modules import prompt_parser, shared

        stage = self.stages[0]
        size = stage.first_size
        parts, context = prompt_parser.reconstruct_multicond_batch(self.told["conditioning"], 0)
        rows = [image for image, each in enumerate(parts) for _ in each]
        clean = self.told["x"].float()[rows]
        noise = self._noise(size).to(clean)[rows]
        picture = self.told["image_conditioning"]
        if picture is not None and tuple(picture.shape[-2:]) == tuple(self.told["x"].shape[-2:]):
            picture = F.interpolate(picture.float(), size=size, mode="bilinear", antialias=True).to(picture)
        told = self._conditioning(context, None if picture is None else picture[rows])
        schedule = NoiseSchedule(shared.sd_model.alphas_cumprod.tolist())
        with control.Silent(self.p), self.maps:
            for timestep, state in looks(clean, stage, noise, schedule):
                self.maps.rows(range(len(rows)))
                when = torch.full((len(rows),), float(timestep), device=clean.device)
                shared.sd_model.apply_model(state.to(self.told["x"]), when, told)

    def _noise(self, size: Size) -> Tensor:
        """A corner of the pass's own noise, or of several of it side by side where a stage is longer than the pass."""
        noise = self.told["noise"]
        again = [-(-size[axis] // noise.shape[axis - 2]) for axis in (0, 1)]
        return noise.repeat(1, 1, *again)[..., : size[0], : size[1]]

    def _conditioning(self, context: Any, picture: Tensor | None) -> dict[str, Any]:
        """What the host's denoiser tells its model."""
        from modules import shared

        if shared.sd_model.model.conditioning_key == "crossattn-adm":
            return {"c_crossattn": [context], "c_adm": picture}
        beside = {"c_concat": [picture]}
        return {**context, **beside} if isinstance(context, dict) else {"c_crossattn": [context], **beside}


def _is_stopped() -> bool:
    """Interrupt or skip; "interrupt after the current image" lets this one be finished."""
    from modules import shared

    return bool(shared.state.interrupted or shared.state.skipped)
