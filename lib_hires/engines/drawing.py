"""A job while it is drawn: one sampling loop for each stage, and what later stages need of earlier ones."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from ..canvas.accdiffusion import AccDiffusionV2
from ..plan.route import Size
from ..plan.tiling import CanvasPlan, Stage, evaluations_of
from ..randomness import Records
from ..stages.edge_hints import edge_hint
from ..stages.progressive import Progressive, StageRun
from ..stages.window_prompts import looks
from ..unet.attention_maps import AttentionMaps
from . import samplers
from .components import Components
from .denoiser import Denoiser, NoSession, clean, count_calls, predict
from .job import Job
from .staged import CanvasDenoiser, encode_windows

NO_CONTROL = (
    f"the edges of {AccDiffusionV2.title} are left out (this is v1): no ControlNet is loaded. Add --controlnet FOLDER."
)
UNUSED_CONTROL = f"the ControlNet has no effect: no stage here asks for edges, as those of {AccDiffusionV2.title} do."


def started_canvases(job: Job, stages: Sequence[Stage]) -> list[CanvasPlan]:
    """The canvases of the stages that start from a picture: all but a first one that starts from noise."""
    return [stage.canvas for number, stage in enumerate(stages) if stage.canvas and (number or job.started)]


def check_stages(job: Job, stages: Sequence[Stage]) -> None:
    """Raises `SettingError` where the job's sampler would lose the stages' skip residual."""
    if any(canvas.skip_residual for canvas in started_canvases(job, stages)):
        samplers.check_stages(job.sampler)


def control_notes(job: Job, stages: Sequence[Stage], control) -> list[str]:
    """What is left out of the stages for want of a ControlNet, or what one that is there is not asked for."""
    wanted = any(canvas.edges for canvas in started_canvases(job, stages))
    if wanted == (control is not None):
        return []
    return [NO_CONTROL if wanted else UNUSED_CONTROL]


class Drawing:
    """One job while it is drawn: its stages, the attention maps that later stages need, the reports.

    `interrupted`: in words, where it was stopped before its end; empty otherwise.
    """

    def __init__(
        self,
        engine,
        job: Job,
        session,
        on_step,
        stages,
        records: Records,
        on_latents=None,
        denoiser=None,
        stopped: Callable[[], bool] = lambda: False,
    ):
        self.stopped, self.interrupted = stopped, ""
        stages = (stages[-1].given(),) if job.started else stages
        self.engine, self.job, self.stages, self.records = engine, job, stages, records
        self.session = NoSession() if session is None else session
        self.on_step, self.on_latents = on_step, on_latents
        self.number = 1 if job.started else 0  # of the first stage here: the picture that is given was stage 0
        self.denoiser = engine.denoiser(job) if denoiser is None else denoiser
        self.images = tuple(range(job.batch)) * (2 if job.guided else 1)
        self.reports: list[dict] = []
        self.notes = control_notes(job, stages, engine.control)
        self.done, self.total = 0, evaluations_of(stages, engine.calls(job, stages))
        has_words = any(canvas.window_prompts for canvas in started_canvases(job, stages))
        self.maps = AttentionMaps(engine.components.unet) if has_words else None

    def advance(self, evaluations: int) -> None:
        """Tell `on_step` of work that is done: UNet evaluations of one view."""
        self.done += evaluations
        if self.on_step:
            self.on_step(self.done, self.total)

    def draw(self) -> torch.Tensor:
        """Run all stages: latents (B, 4, h, w) fp32 on the device."""
        progressive = Progressive(self.stages, self.job.seeds, self.records, self.prepare)
        if self.job.started:
            return self.refine(progressive)
        return progressive.run(self.sample, lambda: bool(self.interrupted))

    def refine(self, progressive: Progressive) -> torch.Tensor:
        """One stage, from the latents of the job's picture."""
        (stage,) = self.stages
        given = self.engine.encode(self.job.init, stage.size, stage.wrap).expand(self.job.batch, -1, -1, -1)
        with count_calls(self.engine.components.unet) as looked:
            if self.maps is not None:
                self.look(given, stage)
        run = progressive.started(stage, self.number, given, progressive.noise(stage, self.number, given))
        self.prepare(run)
        latents = self.sample(run)
        self.reports[-1]["unet_calls"] += looked.total
        self.reports[-1]["unet_evaluations"] += looked.rows // len(self.images)
        return latents

    def look(self, latents: torch.Tensor, stage: Stage) -> None:
        """Gather attention maps of a picture that no stage here has drawn."""
        noise, _ = self.engine.noise(self.job, stage.first_size)
        denoiser, device = _fitted(self.denoiser, stage.first_size), latents.device
        with self.maps:
            for timestep, state in looks(latents, stage, noise, self.engine.schedule()):
                if self.stopped():
                    return
                self.gather()
                predict(denoiser, state, torch.tensor(float(timestep), device=device), self.job)
                self.advance(1)

    def gather(self) -> None:
        """Tell open attention maps whose the rows of the next call are."""
        if self.maps is not None and self.maps.is_open:
            self.maps.rows([None] * (len(self.images) - self.job.batch) + list(range(self.job.batch)))

    def prepare(self, stage_run: StageRun) -> None:
        """Window prompts from the first stage's attention maps, edges from the picture of the stage before."""
        plan = stage_run.stage.canvas
        if not plan or not (plan.window_prompts or plan.edges) or self.stopped():  # the first call will be the last
            return
        if plan.window_prompts:
            stage_run.prompts = encode_windows(
                self.engine.components, self.job.negative, self.job.prompt, self.maps, stage_run, self.job.batch
            )
        if plan.edges and self.engine.control is not None:
            pictures = self.engine.decode(stage_run.before, stage_run.stage.wrap)
            hint = edge_hint([np.asarray(picture) for picture in pictures], stage_run)
            stage_run.hint = hint.to(self.engine.components.device)

    def sample(self, stage_run: StageRun) -> torch.Tensor:
        """One stage: latents (B, 4, h, w) fp32 on the device."""
        started = time.perf_counter()
        run, first = stage_sampler(self.job, self.engine.components, stage_run.stage, stage_run.number)
        record = self.records.get("initial noise") if stage_run.reference is None else None
        noise, generators = self.engine.noise(self.job, stage_run.size, record)
        latents = noise * run.initial_sigma
        if stage_run.reference is not None:
            latents = run.noised(stage_run.reference, stage_run.noise, first)
        gathering = self.maps if stage_run.number == 0 and self.maps is not None else contextlib.nullcontext()
        with count_calls(self.engine.components.unet) as calls, self.session, gathering:
            latents = self.loop(stage_run, run, first, latents, generators)
        factor = self.engine.components.factor
        self.reports.append(
            {
                "width": stage_run.size[1] * factor,
                "height": stage_run.size[0] * factor,
                "unet_calls": calls.total,
                "unet_evaluations": calls.rows // len(self.images),
                "seconds": time.perf_counter() - started,
            }
        )
        return latents

    def loop(self, stage_run: StageRun, run: samplers.Run, first: int, latents: torch.Tensor, generators):
        """The sampling loop from the call `first` on."""
        schedule, job = self.engine.schedule(), self.job
        timesteps = torch.tensor(run.timesteps, device=self.engine.components.device)
        denoiser = _fitted(self.denoiser, stage_run.size)
        if stage_run.canvas is not None:
            denoiser = CanvasDenoiser(denoiser, self.images, job.cfg, stage_run, self.session, self.engine.control)
        begun = run.positions[first]
        steps = run.steps - begun
        for call in range(first, len(run.timesteps)):
            moment = schedule.moment(timestep=run.timesteps[call])
            step = run.positions[call] - begun
            self.session.at(timestep=moment.timestep, step=step, steps=steps)
            self.gather()
            if stage_run.canvas is not None:
                denoiser.at(moment, step, steps)
                latents = stage_run.pull(latents, moment, run.initial_sigma == 1)
            scaled = run.scaled(latents, call)
            prediction = predict(denoiser, scaled, timesteps[call], job)
            if self.stopped():
                place = f"call {call + 1 - first} of {len(run.timesteps) - first}"
                self.interrupted = f"stage {stage_run.number - self.number + 1} of {len(self.stages)}, {place}"
                estimate = clean(scaled, prediction, moment.sigma, self.engine.components.prediction_type)
                return stage_run.so_far(estimate, moment)
            latents = run.step(prediction, latents, call, generators)
            if self.on_latents:
                self.on_latents(stage_run.number, call, latents)
            self.advance(stage_run.stage.evaluations())
        return latents


def _fitted(denoiser, size: Size):
    """The denoiser with what an inpainting UNet takes beside the latents (nothing is kept, all grey) at a stage's size."""
    extra = getattr(denoiser, "extra", None)
    if extra is None or tuple(extra.shape[-2:]) == tuple(size):
        return denoiser
    return Denoiser(denoiser.unet, denoiser.conditioning, F.interpolate(extra, size=tuple(size), mode="nearest"))


def stage_sampler(job: Job, components: Components, stage: Stage, number: int) -> tuple[samplers.Run, int]:
    """(the sampler set to its steps, the first call that a stage runs)."""
    run = samplers.make(job.sampler, components, job.steps)
    if not number and not job.started:
        return run, 0
    steps = (replace(stage, strength=job.denoise) if job.started else stage).steps_of(run.steps)
    return run, run.begin(run.steps - steps)
