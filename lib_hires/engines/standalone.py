"""The standalone engine: text to pictures with diffusers' parts, one visible loop, one seam.

    noise -> [ scale -> denoiser(x, t) -> guidance -> scheduler step ] x steps -> autoencoder -> pictures

The denoiser is the only thing that calls the UNet; methods wrap it or change the UNet inside a session, which is opened
around the loop and told before each call where the run is. Image k of a batch uses its own generators (seed + k), so it
equals the same image alone; the global generators are neither read nor advanced.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..config.errors import HiresError, SettingError
from ..plan.route import Size
from ..plan.tiling import Stage
from ..randomness import Record, Records, Stream
from ..schedule import NoiseSchedule, scaled_linear
from ..stages.progressive import Progressive, StageRun
from ..unet.attention_maps import AttentionMaps
from ..vae import needs_tiles, plain_bytes, tile_for, tiled, tiled_bytes
from . import estimate, prompts, samplers
from .components import Components
from .memory import peak_memory
from .prompts import Conditioning
from .staged import CanvasDenoiser, edges_of, encode_windows

MAX_SEED = 2**63 - 1
LATENT_COPIES = 8
"""Latents of the last size that are held at once: state, reference, noise, sums, grids."""
CPU_WHOLE, CPU_TILE = 64, 32
"""On a CPU latents above this side are decoded in tiles of this one: it is as fast and takes a third less memory."""
NO_CONTROL = "the edges of AccDiffusion v2 are left out (this is v1): no ControlNet is loaded. Add --controlnet FOLDER."


@dataclass(frozen=True)
class Job:
    """One request. `width`, `height`: pixels; `batch` pictures have the seeds `seed`, `seed` + 1, ...

    Raises `SettingError` for a value outside its range.
    """

    prompt: str
    negative: str = ""
    width: int = 512
    height: int = 512
    steps: int = 20
    cfg: float = 7.0
    sampler: str = "euler"
    seed: int = 0
    batch: int = 1

    def __post_init__(self):
        for name, low, high in (
            ("width", 8, 16384),
            ("height", 8, 16384),
            ("steps", 1, 1000),
            ("cfg", 0, 100),
            ("batch", 1, 1024),
            ("seed", 0, MAX_SEED),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise SettingError(
                    name, value, f"between {low} and {high}", "Raise it." if value < low else "Lower it."
                )
        if self.sampler not in samplers.SAMPLERS:
            raise SettingError("sampler", self.sampler, "one of " + ", ".join(samplers.SAMPLERS))

    @property
    def seeds(self) -> list[int]:
        """The seed of each picture."""
        return [(self.seed + index) % MAX_SEED for index in range(self.batch)]


@dataclass
class Result:
    """What came out. `images`: B PIL pictures; `latents`: (B, 4, h, w) fp32 on the CPU, as the autoencoder's scaled latents;

    `stages`: for each sampling run its width, height, unet_calls and seconds; `seconds`: everything, text and decoding
    included; `peak_memory`: bytes (see `memory.peak_memory`).
    """

    images: list[Image.Image]
    latents: torch.Tensor
    stages: list[dict] = field(default_factory=list)
    unet_calls: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    notes: list[str] = field(default_factory=list)


class Denoiser:
    """The UNet with what it is told: `denoiser(x, t)` is its prediction. This is the seam that methods wrap.

    `conditioning`: N rows; `extra`: (1, C, h, w) further input channels (inpainting), or None.
    """

    def __init__(self, unet, conditioning: Conditioning, extra: torch.Tensor | None = None):
        self.unet, self.conditioning, self.extra = unet, conditioning, extra

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x: (k N, 4, h, w) scaled latents, k views stacked as [view 0 of all N rows, view 1 of all N rows, ...];

        t: timestep, a scalar tensor. Returns the prediction (eps or v), shape and dtype of x.
        """
        return self.evaluate(x, t, self.conditioning.repeat(x.shape[0] // len(self.conditioning)), self.extra)

    def evaluate(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        told: Conditioning,
        extra: torch.Tensor | None = None,
        residuals: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """The UNet's prediction for rows that are told `told`; `residuals`: a ControlNet's, as keyword arguments."""
        added = None if told.pooled is None else {"text_embeds": told.pooled, "time_ids": told.time_ids}
        inputs = x.to(self.unet.dtype)
        if extra is not None:
            inputs = torch.cat([inputs, extra.to(inputs).expand(x.shape[0], -1, -1, -1)], dim=1)
        answer = self.unet(
            inputs,
            t,
            encoder_hidden_states=told.context,
            added_cond_kwargs=added,
            return_dict=False,
            **(residuals or {}),
        )
        return answer[0].to(x.dtype)


class NoSession(contextlib.nullcontext):
    """The session of a plain run: changes nothing."""

    def at(self, timestep: float, step: int, steps: int) -> None:
        """Nothing to do."""

    def rows(self, rows: Sequence[int]) -> None:
        """Nothing to do."""


class Engine:
    """Draws pictures with a checkpoint's parts."""

    def __init__(self, components: Components, control: Any = None, decode_bytes: int | None = None):
        """control: a Canny ControlNet (diffusers' ControlNetModel) for AccDiffusion v2, or None.

        decode_bytes: memory that decoding may take on the model's device beside the weights; None is what is free.
        """
        self.components, self.control, self.decode_bytes = components, control, decode_bytes

    def generate(
        self,
        job: Job,
        session=None,
        on_step: Callable[[int, int], None] | None = None,
        stages: Sequence[Stage] | None = None,
        records: Records | None = None,
        on_latents: Callable[[int, int, torch.Tensor], None] | None = None,
    ) -> Result:
        """Draw a job's pictures.

        `session`: a context manager opened around each sampling loop, whose `at(timestep=, step=, steps=)` is called
        just before each call of the denoiser; `on_step(i, n)`: called after the i-th of n steps of all stages (1-based);
        `stages`: sampling runs up to the job's size (plain sampling without); `records`: draws to replay, by purpose (see
        `randomness.PURPOSES`); `on_latents(stage, call, latents)`: called after each call with the sampler's state.
        Raises `SettingError` for a size that is no multiple of the autoencoder's factor.
        """
        started = time.perf_counter()
        factor = self.components.factor
        stages = tuple(stages or (Stage((job.height // factor, job.width // factor)),))
        with peak_memory(self.components.device) as peak, torch.no_grad():
            self.check(job)
            run = _Run(self, job, session, on_step, stages, records or {}, on_latents)
            latents = run.draw()
            images = self.decode(latents)
        return Result(
            images=images,
            latents=latents.float().cpu(),
            stages=run.reports,
            unet_calls=sum(stage["unet_calls"] for stage in run.reports),
            seconds=time.perf_counter() - started,
            peak_memory=peak.bytes,
            notes=run.notes,
        )

    def calls(self, job: Job, stages: Sequence[Stage]) -> list[int]:
        """Denoiser calls of each stage."""
        starts = [stage_sampler(job, self.components, stage, number) for number, stage in enumerate(stages)]
        return [len(run.timesteps) - first for run, first, _ in starts]

    @torch.no_grad()
    def estimate(self, job: Job, session, stages: Sequence[Stage]) -> list[str]:
        """A line with the time and the memory that a job will take, from calls of the network that are made now."""
        denoiser, seconds, most = self.denoiser(job), 0.0, 0
        t = torch.tensor(500.0, device=self.components.device)
        with NoSession() if session is None else session:
            for size, count in estimate.sizes_of(stages, self.calls(job, stages)).items():
                shape = (len(denoiser.conditioning), self.components.latent_channels, *size)
                (session or NoSession()).at(timestep=500.0, step=0, steps=job.steps)
                took, needed = estimate.measured(lambda x: _whole(denoiser, x, t), shape, self.components.device)
                seconds, most = seconds + took * count, max(most, needed)
        shape = (1, self.components.latent_channels, *stages[-1].size)
        tiles = self.decode_tiles(shape)
        number = torch.finfo(self.components.vae.dtype).bits // 8
        whole = shape[-1] * shape[-2] <= tiles["above"] ** 2
        decoding = plain_bytes(shape, number) if whole else tiled_bytes(shape, tiles["tile"], number)
        latents = 4 * job.batch * self.components.latent_channels * shape[-1] * shape[-2] * LATENT_COPIES
        return [estimate.in_words(seconds, most, decoding, latents)]

    def check(self, job: Job) -> None:
        """Raise what is wrong with a job for this model."""
        factor = self.components.factor
        for name in ("width", "height"):
            value = getattr(job, name)
            below = value - value % factor
            if value != below:
                fit = f"{below} or {below + factor}" if below else factor
                raise SettingError(name, value, f"a multiple of {factor} (pixels per latent)", f"Use {fit}.")
        channels = self.components.unet.config.in_channels
        if channels != self.components.latent_channels and not self.components.is_inpainting:
            raise HiresError(
                f"this UNet takes {channels} channels: it needs a picture beside the text. Use another checkpoint."
            )

    def denoiser(self, job: Job) -> Denoiser:
        """The UNet told [negative x B, positive x B], or only the positive where `cfg` is 1."""
        pair = prompts.with_size(prompts.encode_pair(self.components, job.negative, job.prompt), job.width, job.height)
        told = (pair if _guided(job) else pair[1:]).repeat_each(job.batch)
        return Denoiser(self.components.unet, told, self._masked_picture(job))

    def noise(
        self, job: Job, size: Size | None = None, record: Record | None = None
    ) -> tuple[torch.Tensor, list[torch.Generator]]:
        """Unit noise (B, 4, h, w) in fp32 on the device, and the generators (on the CPU) that go on from it.

        size: of the latents, the job's by default; record: noise to replay, by (seed, 0).
        """
        seeds = job.seeds
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        factor = self.components.factor
        shape = (1, self.components.latent_channels, *(size or (job.height // factor, job.width // factor)))
        noise = [torch.randn(shape, generator=generator) for generator in generators]
        stream = Stream("initial noise", record)
        for index, seed in enumerate(seeds):
            recorded = stream.recorded(seed, 0)
            if recorded is not None:
                noise[index] = torch.as_tensor(recorded, dtype=torch.float32).reshape(shape)
        return torch.cat(noise).to(self.components.device), generators

    def schedule(self) -> NoiseSchedule:
        """The noise schedule that the model was trained with."""
        return NoiseSchedule(scaled_linear(self.components.beta_start, self.components.beta_end))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Latents (B, 4, h, w) to B pictures of (8w, 8h) pixels, one at a time; in exact tiles where memory asks for it."""
        vae = self.components.vae
        scaled = (latents / self.components.scaling_factor).to(device=self.components.device, dtype=vae.dtype)
        with tiled(vae.decoder, **self.decode_tiles(scaled.shape)):
            return [to_image(vae.decode(each[None], return_dict=False)[0][0]) for each in scaled]

    def decode_tiles(self, shape: Sequence[int]) -> dict[str, int]:
        """Arguments of `vae.tiled` for latents (B, C, h, w): above which size tiles are taken, and how large they are.

        Raises `SettingError` where the memory limit is too small for the smallest tile.
        """
        vae, limit = self.components.vae, self.decode_bytes
        number = torch.finfo(vae.dtype).bits // 8
        if limit is None and vae.device.type == "cuda":
            limit = torch.cuda.mem_get_info(vae.device)[0]
        if limit is None:
            return {"above": CPU_WHOLE, "tile": CPU_TILE}
        one = (1, *shape[1:])
        if not needs_tiles(one, limit, number):
            return {"above": max(shape[-2:]), "tile": CPU_TILE}
        return {"above": 0, "tile": tile_for(limit, number, one)}

    def _masked_picture(self, job: Job) -> torch.Tensor | None:
        """An inpainting UNet's further channels for drawing everything anew: a mask of ones and a grey picture's latent."""
        if not self.components.is_inpainting:
            return None
        vae = self.components.vae
        grey = torch.zeros(1, 3, job.height, job.width, device=vae.device, dtype=vae.dtype)
        latent = vae.encode(grey).latent_dist.mode() * self.components.scaling_factor
        return torch.cat([torch.ones_like(latent[:, :1]), latent], dim=1)


class _Run:
    """One job while it is drawn: its stages, the attention maps that later stages need, the reports."""

    def __init__(self, engine: Engine, job: Job, session, on_step, stages, records: Records, on_latents):
        self.engine, self.job, self.stages, self.records = engine, job, stages, records
        self.session = NoSession() if session is None else session
        self.on_step, self.on_latents = on_step, on_latents
        self.denoiser = engine.denoiser(job)
        self.images = tuple(range(job.batch)) * (2 if _guided(job) else 1)
        self.reports: list[dict] = []
        self.notes: list[str] = []
        self.done = 0
        self.total = sum(self.sampler(stage, number)[2] for number, stage in enumerate(stages))
        wanted = [stage.canvas for stage in stages[1:] if stage.canvas]
        self.maps = AttentionMaps(engine.components.unet) if any(c.window_prompts for c in wanted) else None
        if any(c.edges for c in wanted) and engine.control is None:
            self.notes.append(NO_CONTROL)
        if any(c.skip_residual for c in wanted):
            samplers.check_stages(job.sampler)

    def sampler(self, stage: Stage, number: int) -> tuple[samplers.Run, int, int]:
        """`stage_sampler` of this job."""
        return stage_sampler(self.job, self.engine.components, stage, number)

    def draw(self) -> torch.Tensor:
        return Progressive(self.stages, self.job.seeds, self.records, self.prepare).run(self.sample)

    def prepare(self, stage_run: StageRun) -> None:
        """Window prompts from the first stage's attention maps, edges from the picture of the stage before."""
        plan = stage_run.stage.canvas
        if plan and plan.window_prompts:
            stage_run.prompts = encode_windows(
                self.engine.components, self.job.prompt, self.maps, stage_run, self.job.batch
            )
        if plan and plan.edges and self.engine.control is not None:
            stage_run.hint = edges_of(self.engine.decode(self.latents), stage_run, self.engine.components.device)

    def sample(self, stage_run: StageRun) -> torch.Tensor:
        """One stage: latents (B, 4, h, w) fp32 on the device."""
        started = time.perf_counter()
        run, first, _ = self.sampler(stage_run.stage, stage_run.number)
        noise, generators = self.engine.noise(self.job, stage_run.size, self.records.get("initial noise"))
        latents = noise * run.initial_sigma
        if stage_run.reference is not None:
            latents = run.noised(stage_run.reference, stage_run.noise, first)
        gathering = self.maps if stage_run.number == 0 and self.maps is not None else contextlib.nullcontext()
        with count_calls(self.engine.components.unet) as calls, self.session, gathering:
            latents = self.loop(stage_run, run, first, latents, generators)
        self.latents = latents
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
        denoiser = self.denoiser
        if stage_run.canvas is not None:
            denoiser = CanvasDenoiser(denoiser, self.images, job.cfg, stage_run, self.session, self.engine.control)
        for call in range(first, len(run.timesteps)):
            moment = schedule.moment(timestep=run.timesteps[call])
            step = run.positions[call] - run.positions[first]
            self.session.at(timestep=moment.timestep, step=run.positions[call], steps=run.steps)
            if self.maps is not None and self.maps.is_open:
                self.maps.rows([None] * (len(self.images) - job.batch) + list(range(job.batch)))
            if stage_run.canvas is not None:
                denoiser.at(moment, step, run.steps - run.positions[first])
                latents = stage_run.pull(latents, moment, run.initial_sigma == 1)
            prediction = _predict(denoiser, run.scaled(latents, call), timesteps[call], job)
            latents = run.step(prediction, latents, call, generators)
            if self.on_latents:
                self.on_latents(stage_run.number, call, latents)
            if run.completed[call] > (run.completed[call - 1] if call else 0):
                self.done += 1
                if self.on_step:
                    self.on_step(self.done, self.total)
        return latents


def stage_sampler(job: Job, components: Components, stage: Stage, number: int) -> tuple[samplers.Run, int, int]:
    """(the sampler set to its steps, the first call that a stage runs, the steps that it runs)."""
    run = samplers.make(job.sampler, components, job.steps)
    if not number:
        return run, 0, run.steps
    steps = max(1, round(stage.strength * run.steps))
    return run, run.begin(run.steps - steps), steps


def _whole(denoiser: Denoiser, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The denoiser on noise of any size; what an inpainting UNet takes beside it is left blank."""
    extra = denoiser.extra
    blank = None if extra is None else torch.zeros(1, extra.shape[1], *x.shape[-2:], device=x.device)
    return denoiser.evaluate(x, t, denoiser.conditioning, blank)


def _guided(job: Job) -> bool:
    return job.cfg != 1


def _predict(denoiser, x: torch.Tensor, t: torch.Tensor, job: Job) -> torch.Tensor:
    """negative + cfg (positive - negative), classifier-free guidance (Ho and Salimans 2022, eq. 6 with w = cfg - 1)."""
    if not _guided(job):
        return denoiser(x, t)
    negative, positive = denoiser(torch.cat([x, x]), t).chunk(2)
    return negative + job.cfg * (positive - negative)


@dataclass
class Calls:
    """How often a module was called."""

    total: int = 0
    rows: int = 0


@contextlib.contextmanager
def count_calls(module: torch.nn.Module):
    """Count a module's calls during the block, by a hook that is removed after it."""
    calls = Calls()

    def note(_module, inputs):
        calls.total += 1
        calls.rows += inputs[0].shape[0]

    hook = module.register_forward_pre_hook(note)
    try:
        yield calls
    finally:
        hook.remove()


def to_image(pixels: torch.Tensor) -> Image.Image:
    """pixels: (3, H, W) in -1..1. Returns an RGB picture."""
    levels = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().byte().permute(1, 2, 0).cpu().numpy().astype(np.uint8))
