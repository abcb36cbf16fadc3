"""Training the UNet: noise prediction on latents of scenes, first at half the native size, then at it.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,   loss = min(1 + 1 / SNR, cap) |e_hat - e|^2

The weight is v-prediction's: without it a small network never learns the overall colours, which are decided at the
highest noise levels, where an error in e counts 14 times in x_0.

A pool holds latents of canvases a little larger than the picture, and each step cuts pictures out of them at random.
Parts of scenes (`zoomed`: much ground, pieces of subjects) are shown at the lower noise levels only: the network learns
what to leave alone when it sees a view of a larger picture, but from pure noise it only ever draws whole scenes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from lib_hires.engines.components import BETAS
from lib_hires.plan.models import LATENT_FACTOR

from . import autoencoder, scenes, words

ZOOMED = 0.15
"""Share of parts of scenes in a pool."""
BELOW = 650
"""Highest timestep at which they are shown."""
EMPTY = 0.12
"""Share of empty prompts."""
MARGIN = 4  # latents by which a canvas is larger than a picture
CAP = 25.0
OFFSET = 0.2
"""Standard deviation of a constant that each channel's noise has besides ("offset noise"). White noise of 32 x 32 latents has
a mean of 1/32; at the last timestep the picture's own mean still shines through with 0.07, twice that. A network reads the
ground's colour there instead of from the prompt, and from true noise, which holds none, draws any."""
CHUNK = 250


@dataclass
class Pool:
    """Latents (N, 4, S, S) in half precision, what is on them, and which are parts of scenes.

    `side`: of the pictures to cut from them, in latents.
    """

    latents: torch.Tensor
    told: list[scenes.Scene]
    zoomed: torch.Tensor
    side: int

    def cut(self, index: int, generator: np.random.Generator) -> torch.Tensor:
        """(4, side, side): a picture out of a canvas."""
        y, x = generator.integers(0, self.latents.shape[-1] - self.side + 1, 2)
        return self.latents[index, :, y : y + self.side, x : x + self.side].float()


def make_pool(
    vae: AutoencoderKL, folder: Path, side: int, count: int, log: Callable[[str], None] = print, share: float = ZOOMED
) -> Pool:
    """Encode `count` scenes at `side` latents, in chunks that are kept in `folder`: a later start goes on."""
    chunks = []
    for number in range(-(-count // CHUNK)):
        path = folder / f"latents-{side}-{number:03d}.pt"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(_chunk(vae, side, number, share), path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
            log(f"latents of {(number + 1) * CHUNK} of {count} scenes at {side}x{side}")
        chunks.append(torch.load(path, weights_only=True))
    return Pool(
        latents=torch.cat([chunk["latents"] for chunk in chunks]),
        told=[scenes.Scene(**fields) for chunk in chunks for fields in chunk["scenes"]],
        zoomed=torch.cat([chunk["zoomed"] for chunk in chunks]),
        side=side,
    )


@torch.no_grad()
def _chunk(vae: AutoencoderKL, side: int, number: int, share: float) -> dict:
    generator = np.random.default_rng([7, side, number])
    size = ((side + MARGIN) * LATENT_FACTOR,) * 2
    found = {"latents": [], "scenes": [], "zoomed": []}
    for _ in range(CHUNK):
        scene = scenes.draw_scene(generator)
        zoomed = generator.random() < share
        box = autoencoder.zoom(generator, 1.0) if zoomed else _whole(side)
        picture = autoencoder.to_tensor(scenes.render(scene, size, box))[None]
        picture = picture.to(vae.device, memory_format=torch.channels_last)
        found["latents"].append(vae.encode(picture).latent_dist.mean.half().cpu())
        found["scenes"].append(vars(scene))
        found["zoomed"].append(bool(zoomed))
    return {
        "latents": torch.cat(found["latents"]).contiguous(),
        "scenes": found["scenes"],
        "zoomed": torch.tensor(found["zoomed"]),
    }


def _whole(side: int) -> tuple[float, float, float, float]:
    """A box around the scene that the margin fills, so that cutting moves the subject about its place."""
    more = MARGIN / side / 2
    return -more, -more, 1 + more, 1 + more


class Contexts:
    """Text conditioning by sentence, each encoded once."""

    def __init__(self, encoder, tokenizer):
        self.encoder, self.tokenizer, self.known = encoder, tokenizer, {}

    @torch.no_grad()
    def of(self, texts: list[str]) -> torch.Tensor:
        """(N, 77, 64)."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self.known]
        if fresh:
            hidden = self.encoder(words.ids_of(self.tokenizer, fresh)).last_hidden_state
            self.known.update(zip(fresh, hidden.half()))
        return torch.stack([self.known[text] for text in texts]).float()


class Lessons:
    """Batches of noisy latents and their loss."""

    def __init__(self, pool: Pool, contexts: Contexts, batch: int, seed: int = 0):
        self.pool, self.contexts, self.batch, self.seed = pool, contexts, batch, seed
        scheduler = DDPMScheduler(beta_start=BETAS[0], beta_end=BETAS[1], beta_schedule="scaled_linear")
        self.kept = scheduler.alphas_cumprod
        snr = self.kept / (1 - self.kept)
        weights = (1 + 1 / snr).clamp(max=CAP)
        self.weights = weights / weights.mean()

    def loss_of(self, unet: UNet2DConditionModel, step: int) -> torch.Tensor:
        """The weighted loss of a batch; the same for the same step."""
        generator = np.random.default_rng([11, self.seed, step])
        chosen = generator.integers(0, len(self.pool.told), self.batch)
        clean = torch.stack([self.pool.cut(index, generator) for index in chosen])
        texts = [self._text(self.pool.told[index], generator) for index in chosen]
        highest = np.where(self.pool.zoomed[chosen].numpy(), BELOW, 1000)
        times = torch.from_numpy((generator.random(self.batch) * highest).astype(np.int64))
        noise = generator.standard_normal(clean.shape, np.float32)
        noise = torch.from_numpy(noise + OFFSET * generator.standard_normal((*clean.shape[:2], 1, 1), np.float32))
        kept = self.kept[times][:, None, None, None]
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        noisy = noisy.to(unet.device, memory_format=torch.channels_last)
        context = self.contexts.of(texts).to(unet.device)
        told = unet(noisy, times.to(unet.device), encoder_hidden_states=context, return_dict=False)[0]
        errors = (told - noise.to(unet.device)).square().mean(dim=(1, 2, 3))
        return (self.weights[times].to(unet.device) * errors).mean()

    @staticmethod
    def _text(scene: scenes.Scene, generator: np.random.Generator) -> str:
        return "" if generator.random() < EMPTY else words.sentence(scene, generator, loose=0.15)[0]
