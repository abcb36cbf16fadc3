"""Training the UNet: noise prediction on latents of scenes, first at half the native size, then at it.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,   loss = min(1 + 1 / SNR, cap) |e_hat - e|^2

The weight is v-prediction's: without it a small network never learns the overall colours, which are decided at the
highest noise levels, where an error in e counts 14 times in x_0.

A pool holds latents of canvases a little larger than the picture, and each step cuts pictures out of them at random.
Parts of scenes (`zoomed`: much ground, pieces of subjects) are shown at the lower noise levels only: the network learns
what to leave alone when it sees a view of a larger picture, but from pure noise it only ever draws whole scenes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from lib_hires.engines.components import BETAS
from lib_hires.engines.prompts import Conditioning, encode
from lib_hires.plan.models import LATENT_FACTOR

from . import autoencoder, scenes, together, words
from .training import keep

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


@dataclass(frozen=True)
class Sight:
    """What a canvas of a pool shows: a scene, or a part of one. `box`: (left, top, right, bottom) of it in scenes' sides."""

    scene: scenes.Scene
    zoomed: bool
    box: tuple[float, float, float, float]

    def sizes(self, side: int, y: int, x: int) -> list[float]:
        """SDXL's six numbers for a picture of `side` latents that is cut out at (y, x) latents, in pixels.

        A part of a scene is a cut out of a larger picture; that a whole scene does not lie in the middle is left untold.
        """
        target = float(side * LATENT_FACTOR)
        if not self.zoomed:
            return [target, target, 0, 0, target, target]
        across = (side + MARGIN) * LATENT_FACTOR / (self.box[2] - self.box[0])
        top, left = (start * across + cut * LATENT_FACTOR for start, cut in ((self.box[1], y), (self.box[0], x)))
        return [across, across, top, left, target, target]


@dataclass
class Pool:
    """Latents (N, 4, S, S) in half precision and what is on them. `side`: of the pictures to cut from them, in latents."""

    latents: torch.Tensor
    sights: list[Sight]
    side: int

    def cut(self, index: int, y: int, x: int) -> torch.Tensor:
        """(4, side, side): a picture out of a canvas."""
        return self.latents[index, :, y : y + self.side, x : x + self.side].float()


def make_pool(
    vae: AutoencoderKL, folder: Path, side: int, count: int, log: Callable[[str], None] = print, share: float = ZOOMED
) -> Pool:
    """Encode `count` scenes at `side` latents, in chunks that are kept in `folder`: a later start goes on.

    A chunk that another encoder or other scenes made is made anew; of several processes each makes its share.
    """
    encoder, numbers = autoencoder.encoder_digest(vae), range(-(-count // CHUNK))
    rank, processes = together.place()
    paths = [folder / f"latents-{side}-{number:03d}.pt" for number in numbers]
    seen = [_sights(side, number, share) for number in numbers]
    latents = {}
    for number in numbers[rank::processes]:
        made_from = f"{encoder} {hashlib.sha256(repr(seen[number]).encode()).hexdigest()[:16]}"
        kept = torch.load(paths[number], weights_only=True) if paths[number].exists() else {}
        if kept.get("made_from") != made_from:
            kept = {"latents": _encode(vae, seen[number], side), "made_from": made_from}
            keep(kept, paths[number])
            log(f"latents {number + 1} of {len(numbers)}, {CHUNK} scenes each, at {side}x{side}")
        latents[number] = kept["latents"]
    together.wait()
    for number in numbers:
        if number not in latents:
            latents[number] = torch.load(paths[number], weights_only=True)["latents"]
    return Pool(torch.cat([latents[number] for number in numbers]), [sight for chunk in seen for sight in chunk], side)


def _sights(side: int, number: int, share: float) -> list[Sight]:
    """What a chunk shows; always the same for the same chunk."""
    generator = np.random.default_rng([7, side, number])
    seen = []
    for _ in range(CHUNK):
        scene, zoomed = scenes.draw_scene(generator), bool(generator.random() < share)
        seen.append(Sight(scene, zoomed, autoencoder.zoom(generator, 1.0) if zoomed else _whole(side)))
    return seen


@torch.no_grad()
def _encode(vae: AutoencoderKL, seen: list[Sight], side: int) -> torch.Tensor:
    size = ((side + MARGIN) * LATENT_FACTOR,) * 2
    found = []
    for sight in seen:
        picture = autoencoder.to_tensor(scenes.render(sight.scene, size, sight.box))[None]
        picture = picture.to(vae.device, memory_format=torch.channels_last)
        found.append(vae.encode(picture).latent_dist.mean.half().cpu())
    return torch.cat(found).contiguous()


def _whole(side: int) -> tuple[float, float, float, float]:
    """A box around the scene that the margin fills, so that cutting moves the subject about its place."""
    more = MARGIN / side / 2
    return -more, -more, 1 + more, 1 + more


class Contexts:
    """Text conditioning by sentence, each encoded once."""

    def __init__(self, towers: words.Towers):
        self.towers, self.known = towers, {}

    def of(self, texts: list[str]) -> Conditioning:
        """Of N sentences, as a job encodes them; an empty one is what a negative prompt is."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self.known]
        if fresh:
            encoded = encode(self.towers, fresh, zero_empty=[True] * len(fresh))
            self.known.update((text, encoded[row : row + 1]) for row, text in enumerate(fresh))
        found = [self.known[text] for text in texts]
        pooled = None if found[0].pooled is None else torch.cat([one.pooled for one in found])
        return Conditioning(torch.cat([one.context for one in found]), pooled)


class Lessons:
    """Batches of noisy latents and their loss. `bf16`: the UNet computes in bfloat16; weights and loss stay as they are."""

    def __init__(self, pool: Pool, contexts: Contexts, batch: int, seed: int = 0, bf16: bool = False):
        self.pool, self.contexts, self.batch, self.seed, self.bf16 = pool, contexts, batch, seed, bf16
        scheduler = DDPMScheduler(beta_start=BETAS[0], beta_end=BETAS[1], beta_schedule="scaled_linear")
        self.kept = scheduler.alphas_cumprod
        snr = self.kept / (1 - self.kept)
        weights = (1 + 1 / snr).clamp(max=CAP)
        self.weights = weights / weights.mean()

    def loss_of(self, unet: UNet2DConditionModel, step: int) -> torch.Tensor:
        """The weighted loss of a batch; the same for the same step. Of several processes each takes its rows of the batch."""
        generator = np.random.default_rng([11, self.seed, step])
        chosen = generator.integers(0, len(self.pool.sights), self.batch)
        cuts = generator.integers(0, MARGIN + 1, (self.batch, 2))
        clean = torch.stack([self.pool.cut(index, *cut) for index, cut in zip(chosen, cuts)])
        seen = [self.pool.sights[index] for index in chosen]
        texts = [self._text(sight.scene, generator) for sight in seen]
        highest = np.where([sight.zoomed for sight in seen], BELOW, 1000)
        times = torch.from_numpy((generator.random(self.batch) * highest).astype(np.int64))
        noise = generator.standard_normal(clean.shape, np.float32)
        noise = torch.from_numpy(noise + OFFSET * generator.standard_normal((*clean.shape[:2], 1, 1), np.float32))
        rank, processes = together.place()
        clean, times, noise, seen, texts, cuts = (
            rows[rank::processes] for rows in (clean, times, noise, seen, texts, cuts)
        )
        told = self.contexts.of(texts)
        told = replace(told, time_ids=torch.tensor([s.sizes(self.pool.side, *cut) for s, cut in zip(seen, cuts)]))
        kept = self.kept[times][:, None, None, None]
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        noisy = noisy.to(unet.device, memory_format=torch.channels_last)
        told = told.to(unet.device)
        with torch.autocast(unet.device.type, torch.bfloat16, enabled=self.bf16):
            guess = unet(
                noisy,
                times.to(unet.device),
                encoder_hidden_states=told.context,
                added_cond_kwargs=told.added,
                return_dict=False,
            )[0]
        errors = (guess - noise.to(unet.device)).square().mean(dim=(1, 2, 3))
        return (self.weights[times].to(unet.device) * errors).mean()

    @staticmethod
    def _text(scene: scenes.Scene, generator: np.random.Generator) -> str:
        return "" if generator.random() < EMPTY else words.sentence(scene, generator, loose=0.15)[0]
