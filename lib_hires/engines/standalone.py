"""The standalone engine: text to pictures with diffusers' parts, one visible loop, one seam.

    noise -> [ scale -> denoiser(x, t) -> guidance -> scheduler step ] x steps -> autoencoder -> pictures

The denoiser is the only thing that calls the UNet; methods wrap it or change the UNet inside a session, which is opened
around the loop and told before each call where the run is. Image k of a batch uses its own generators (seed + k), so it
equals the same image alone; the global generators are neither read nor advanced.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from ..config.errors import HiresError, SettingError
from . import prompts, samplers
from .components import Components
from .memory import peak_memory
from .prompts import Conditioning

MAX_SEED = 2**63 - 1


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
        told = self.conditioning.repeat(x.shape[0] // len(self.conditioning))
        added = None if told.pooled is None else {"text_embeds": told.pooled, "time_ids": told.time_ids}
        inputs = x.to(self.unet.dtype)
        if self.extra is not None:
            inputs = torch.cat([inputs, self.extra.to(inputs).expand(x.shape[0], -1, -1, -1)], dim=1)
        answer = self.unet(inputs, t, encoder_hidden_states=told.context, added_cond_kwargs=added, return_dict=False)[0]
        return answer.to(x.dtype)


class NoSession(contextlib.nullcontext):
    """The session of a plain run: changes nothing."""

    def at(self, timestep: float, step: int, steps: int) -> None:
        """Nothing to do."""


class Engine:
    """Draws pictures with a checkpoint's parts."""

    def __init__(self, components: Components):
        self.components = components

    def generate(self, job: Job, session=None, on_step: Callable[[int, int], None] | None = None) -> Result:
        """Draw a job's pictures.

        `session`: a context manager opened around the sampling loop, whose `at(timestep=, step=, steps=)` is called
        just before each call of the denoiser; `on_step(i, n)`: called after the i-th of n steps (1-based).
        Raises `SettingError` for a size that is no multiple of the autoencoder's factor.
        """
        started = time.perf_counter()
        with peak_memory(self.components.device) as peak, torch.no_grad():
            self.check(job)
            denoiser = self.denoiser(job)
            latents, stage = self.sample(job, denoiser, session, on_step)
            images = self.decode(latents)
        return Result(
            images=images,
            latents=latents.float().cpu(),
            stages=[stage],
            unet_calls=stage["unet_calls"],
            seconds=time.perf_counter() - started,
            peak_memory=peak.bytes,
        )

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

    def noise(self, job: Job) -> tuple[torch.Tensor, list[torch.Generator]]:
        """Unit noise (B, 4, h, w) in fp32 on the device, and the generators (on the CPU) that go on from it."""
        generators = [torch.Generator("cpu").manual_seed((job.seed + index) % MAX_SEED) for index in range(job.batch)]
        factor = self.components.factor
        shape = (1, self.components.latent_channels, job.height // factor, job.width // factor)
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        return noise.to(self.components.device), generators

    def sample(self, job: Job, denoiser, session=None, on_step=None) -> tuple[torch.Tensor, dict]:
        """One sampling run: (latents (B, 4, h, w) fp32 on the device, {width, height, unet_calls, seconds})."""
        started = time.perf_counter()
        session = NoSession() if session is None else session
        run = samplers.make(job.sampler, self.components, job.steps)
        noise, generators = self.noise(job)
        latents = noise * run.initial_sigma
        timesteps = torch.tensor(run.timesteps, device=self.components.device)
        with count_calls(self.components.unet) as calls, session:
            for call, timestep in enumerate(run.timesteps):
                step = run.positions[call]
                session.at(timestep=timestep, step=step, steps=run.steps)
                prediction = _predict(denoiser, run.scaled(latents, call), timesteps[call], job)
                latents = run.step(prediction, latents, call, generators)
                if on_step and run.completed[call] > (run.completed[call - 1] if call else 0):
                    on_step(run.completed[call], run.steps)
        seconds = time.perf_counter() - started
        return latents, {"width": job.width, "height": job.height, "unet_calls": calls.total, "seconds": seconds}

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Latents (B, 4, h, w) to B pictures of (8w, 8h) pixels, one at a time."""
        vae = self.components.vae
        scaled = (latents / self.components.scaling_factor).to(device=self.components.device, dtype=vae.dtype)
        return [to_image(vae.decode(each[None], return_dict=False)[0][0]) for each in scaled]

    def _masked_picture(self, job: Job) -> torch.Tensor | None:
        """An inpainting UNet's further channels for drawing everything anew: a mask of ones and a grey picture's latent."""
        if not self.components.is_inpainting:
            return None
        vae = self.components.vae
        grey = torch.zeros(1, 3, job.height, job.width, device=vae.device, dtype=vae.dtype)
        latent = vae.encode(grey).latent_dist.mode() * self.components.scaling_factor
        return torch.cat([torch.ones_like(latent[:, :1]), latent], dim=1)


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


@contextlib.contextmanager
def count_calls(module: torch.nn.Module):
    """Count a module's calls during the block, by a hook that is removed after it."""
    calls = Calls()

    def note(*_):
        calls.total += 1

    hook = module.register_forward_pre_hook(note)
    try:
        yield calls
    finally:
        hook.remove()


def to_image(pixels: torch.Tensor) -> Image.Image:
    """pixels: (3, H, W) in -1..1. Returns an RGB picture."""
    levels = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().byte().permute(1, 2, 0).cpu().numpy().astype(np.uint8))
