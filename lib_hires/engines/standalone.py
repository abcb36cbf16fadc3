"""The standalone engine: text to pictures with diffusers' parts, one visible loop, one seam.

    noise -> [ scale -> denoiser(x, t) -> guidance -> scheduler step ] x steps -> autoencoder -> pictures

The denoiser is the only thing that calls the UNet; methods wrap it or change the UNet inside a session, which is opened
around the loop and told before each call where the run is. Image k of a batch uses its own generators (seed + k), so it
equals the same image alone; the global generators are neither read nor advanced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from ..config.errors import HiresError, SettingError
from ..memory import free_bytes, peak_memory
from ..plan.route import Size
from ..plan.tiling import Stage
from ..randomness import Record, Records, Stream
from ..schedule import NoiseSchedule, scaled_linear, to_zero_snr
from ..stages.progressive import Progressive
from ..vae import MIN_TILE, WRAP_MARGIN, needs_tiles, plain_bytes, tile_for, tiled, tiled_bytes, wrapped
from . import estimate, prompts
from .components import Components
from .denoiser import Denoiser, NoSession, on_noise
from .drawing import Drawing, check_stages, stage_sampler
from .job import Job, Result

__all__ = ["Engine", "Job", "Result", "to_image"]

LATENT_COPIES = 8
"""Latents of the last size that are held at once: state, reference, noise, sums, grids."""
CPU_WHOLE, CPU_TILE = 64, 32
"""On a CPU latents above this side are decoded in tiles of this one: it is as fast and takes a third less memory."""


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
        stopped: Callable[[], bool] = lambda: False,
    ) -> Result:
        """Draw a job's pictures.

        `session`: a context manager opened around each sampling loop, whose `at(timestep=, step=, steps=)` is called
        just before each call of the denoiser; `on_step(done, total)`: called after each of these calls, and each look at a
        picture, with the work of all stages in UNet evaluations of one view (a plain call is one, a call on a canvas as many
        as it has views and grids); after the last call `done` is `total`;
        `stages`: sampling runs up to the job's size (plain sampling without); `records`: draws to replay, by purpose (see
        `randomness.PURPOSES`); `on_latents(stage, call, latents)`: called after each call with the sampler's state;
        `stopped()`: asked in each call; where it is true the picture is what that call holds for it, at its stage's size, or
        while that is noise what the stage started from (`StageRun.so_far`).
        Raises `SettingError` for a size that is no multiple of the autoencoder's factor.
        """
        started = time.perf_counter()
        factor = self.components.factor
        stages = tuple(stages or (Stage((job.height // factor, job.width // factor)),))
        with peak_memory(self.components.device) as peak, torch.no_grad():
            self.check(job, stages)
            run = Drawing(self, job, session, on_step, stages, records or {}, on_latents, stopped=stopped)
            latents = run.draw()
            images = self.decode(latents, stages[-1].wrap)
        return Result(
            images=images,
            latents=latents.float().cpu(),
            stages=run.reports,
            unet_calls=sum(stage["unet_calls"] for stage in run.reports),
            seconds=time.perf_counter() - started,
            peak_memory=peak.bytes,
            notes=run.notes,
            interrupted=run.interrupted,
        )

    def sample(self, job: Job, denoiser, session=None, on_step=None) -> tuple[torch.Tensor, dict]:
        """One sampling run with a denoiser of your own: (latents (B, 4, h, w) fp32 on the device, its report)."""
        factor = self.components.factor
        stage = Stage((job.height // factor, job.width // factor))
        drawing = Drawing(self, job, session, on_step, (stage,), {}, denoiser=denoiser)
        return drawing.draw(), drawing.reports[0]

    def calls(self, job: Job, stages: Sequence[Stage]) -> list[int]:
        """Denoiser calls of each stage."""
        starts = [stage_sampler(job, self.components, stage, number) for number, stage in enumerate(stages)]
        return [len(run.timesteps) - first for run, first in starts]

    @torch.no_grad()
    def estimate(self, job: Job, session, stages: Sequence[Stage]) -> list[str]:
        """A line with the time and the memory that a job will take, from calls of the network that are made now."""
        denoiser, device = self.denoiser(job), self.components.device
        session = NoSession() if session is None else session
        t = torch.tensor(500.0, device=device)

        def measure(size: Size, views: int) -> tuple[float, int]:
            shape = (views * len(denoiser.conditioning), self.components.latent_channels, *size)
            session.at(timestep=500.0, step=0, steps=job.steps)
            return estimate.measured(lambda x: on_noise(denoiser, x, t), shape, device)

        batches = Progressive(stages, job.seeds).batches
        counts = estimate.sizes_of(stages, self.calls(job, stages), batches.first)
        with session:
            seconds, most = estimate.summed(counts, measure)
        at_once = estimate.views_in_words(counts, grows=batches.grows(device) and any(stage.canvas for stage in stages))
        shape = (1, self.components.latent_channels, *stages[-1].size)
        tiles = self.decode_tiles(shape)
        number = torch.finfo(self.components.vae.dtype).bits // 8
        whole = shape[-1] * shape[-2] <= tiles["above"] ** 2
        decoding = plain_bytes(shape, number) if whole else tiled_bytes(shape, tiles["tile"], number)
        latents = 4 * job.batch * self.components.latent_channels * shape[-1] * shape[-2] * LATENT_COPIES
        return [estimate.in_words(seconds, most, at_once, decoding, latents)]

    def check(self, job: Job, stages: Sequence[Stage] = ()) -> None:
        """Raise what is wrong with a job, drawn in these stages, for this model."""
        check_stages(job, stages)
        factor = self.components.factor
        for name in ("width", "height"):
            value = getattr(job, name)
            below = value - value % factor
            if value != below:
                fit = f"{below} or {below + factor}" if below else factor
                raise SettingError(name, value, f"a multiple of {factor} (pixels per latent)", f"Use {fit}.")
        self.decode_tiles((1, self.components.latent_channels, job.height // factor, job.width // factor))
        channels = self.components.unet.config.in_channels
        if channels != self.components.latent_channels and not self.components.is_inpainting:
            raise HiresError(
                f"this UNet takes {channels} channels: it needs a picture beside the text. Use another checkpoint."
            )

    def denoiser(self, job: Job) -> Denoiser:
        """The UNet told [negative x B, positive x B], or only the positive where `cfg` is 1."""
        pair = prompts.with_size(prompts.encode_pair(self.components, job.negative, job.prompt), job.width, job.height)
        told = (pair if job.guided else pair[1:]).repeat_each(job.batch)
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
        products = scaled_linear(self.components.beta_start, self.components.beta_end)
        return NoiseSchedule(to_zero_snr(products) if self.components.zero_terminal_snr else products)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, wrap: tuple[bool, bool] = (False, False)) -> list[Image.Image]:
        """Latents (B, 4, h, w) to B pictures of (8w, 8h) pixels, one at a time; in exact tiles where memory asks for it.

        wrap: (top to bottom, left to right) edges that meet.
        """
        vae = self.components.vae
        scaled = (latents / self.components.scaling_factor).to(device=self.components.device, dtype=vae.dtype)
        with tiled(vae.decoder, **self.decode_tiles(scaled.shape)), wrapped(vae.decoder, wrap):
            return [to_image(vae.decode(each[None], return_dict=False)[0][0]) for each in scaled]

    @torch.no_grad()
    def encode(self, picture: Image.Image, size: Size, wrap: tuple[bool, bool] = (False, False)) -> torch.Tensor:
        """A picture, enlarged and cropped to `size` (height, width in latents), as a latent (1, 4, h, w) fp32 on the device.

        wrap: (top to bottom, left to right) edges that meet. In exact tiles where decoding that size takes them.
        """
        factor = self.components.factor
        fitted = ImageOps.fit(picture.convert("RGB"), (size[1] * factor, size[0] * factor), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].float() / 127.5 - 1
        down, across = (min(WRAP_MARGIN, size[axis]) if wrap[axis] else 0 for axis in (0, 1))
        pixels = F.pad(pixels, [factor * more for more in (across, across, down, down)], mode="circular")
        latents = self._encoded(pixels).float() * self.components.scaling_factor
        return latents[..., down : down + size[0], across : across + size[1]]

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        """The latent that is likeliest for pixels (1, 3, H, W) in -1..1."""
        vae, factor = self.components.vae, self.components.factor
        shape = (1, self.components.latent_channels, *(length // factor for length in pixels.shape[-2:]))
        tiles = {name: length * factor for name, length in self.decode_tiles(shape).items()}
        with tiled(vae.encoder, **tiles):
            return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()

    def decode_tiles(self, shape: Sequence[int]) -> dict[str, int]:
        """Arguments of `vae.tiled` for latents (B, C, h, w): above which size tiles are taken, and how large they are.

        Raises `SettingError` where the memory limit is too small for the smallest tile.
        """
        vae, limit = self.components.vae, self.decode_bytes
        number = torch.finfo(vae.dtype).bits // 8
        limit = free_bytes(vae.device) if limit is None else limit
        if limit is None:
            return {"above": CPU_WHOLE, "tile": CPU_TILE}
        one = (1, *shape[1:])
        if not needs_tiles(one, limit, number):
            return {"above": max(shape[-2:]), "tile": CPU_TILE}
        try:
            return {"above": 0, "tile": tile_for(limit, number, one)}
        except SettingError as error:
            least = f"at least {-(-tiled_bytes(one, MIN_TILE, number) // 2**20)} (MiB) for this size"
            raise SettingError("decode_memory", limit // 2**20, least, "Raise it or free memory.") from error

    def _masked_picture(self, job: Job) -> torch.Tensor | None:
        """An inpainting UNet's further channels for drawing everything anew: a mask of ones and a grey picture's latent."""
        if not self.components.is_inpainting:
            return None
        latent = self._encoded(torch.zeros(1, 3, job.height, job.width)) * self.components.scaling_factor
        return torch.cat([torch.ones_like(latent[:, :1]), latent], dim=1)


def to_image(pixels: torch.Tensor) -> Image.Image:
    """pixels: (3, H, W) in -1..1. Returns an RGB picture."""
    levels = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().byte().permute(1, 2, 0).cpu().numpy().astype(np.uint8))
