"""Training the autoencoder: on crops of scenes first, then on whole ones.

Crops of 48 pixels: a latent's receptive field is about that large, and edges, which are all there is to learn, are
sought: of several crops the liveliest are taken. Group norms take their statistics from what they are shown, so an
autoencoder that has seen crops only gets the colours of whole pictures wrong: these come after.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL

from . import networks, scenes

POOL, SOUGHT = 600, 3
CROPPED = ((48, 12),)
WHOLE = ((networks.NATIVE // 2, 2), (networks.NATIVE, 1))
"""(side, batch) of the two parts of the training; sizes take turns."""
PRIOR = 1e-5  # weight of the latents' distance from a unit Gaussian


class Crops:
    """Batches of crops from a pool of pictures, native and enlarged scenes."""

    def __init__(self, seed: int = 1, count: int = POOL):
        self.seed, self.generator = seed, np.random.default_rng(seed)
        self.pictures = [self._picture() for _ in range(count)]

    def _picture(self) -> np.ndarray:
        scene = scenes.draw_scene(self.generator)
        return scenes.render(scene, (networks.NATIVE,) * 2, zoom(self.generator, 0.4))

    def batch(self, step: int, sizes: tuple[tuple[int, int], ...] = CROPPED) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1], S and B as it is that step's turn; the same for the same step."""
        self.generator = np.random.default_rng([self.seed, step])
        side, count = sizes[step % len(sizes)]
        return torch.stack([to_tensor(self._crop(side)) for _ in range(count)])

    def _crop(self, side: int) -> np.ndarray:
        found = []
        for _ in range(SOUGHT if self.generator.random() < 0.8 else 1):
            picture = self.pictures[self.generator.integers(len(self.pictures))]
            x, y = self.generator.integers(0, networks.NATIVE - side + 1, 2)
            crop = picture[y : y + side, x : x + side]
            crop = crop[:, ::-1] if self.generator.random() < 0.5 else crop
            found.append((crop[::4, ::4].astype(np.float32).var(axis=(0, 1)).sum(), crop))
        return max(found, key=lambda pair: pair[0])[1]


def zoom(generator: np.random.Generator, share: float) -> tuple[float, float, float, float]:
    """A box of a scene: the whole, or, for a share of the calls, a part of it 1.4 to 4 times enlarged."""
    if generator.random() >= share:
        return 0.0, 0.0, 1.0, 1.0
    side = 1 / generator.uniform(1.4, 4.0)
    left, top = generator.uniform(0, 1 - side, 2)
    return left, top, left + side, top + side


def to_tensor(picture: np.ndarray) -> torch.Tensor:
    """(3, H, W) in [-1, 1] of (H, W, 3) bytes."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def loss_of(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Absolute difference of colours and of their steps, and the prior on the latents."""
    latents = vae.encode(pictures).latent_dist
    moved = latents.mean + 0.05 * torch.randn_like(latents.mean)
    drawn = vae.decode(moved).sample
    loss = (drawn - pictures).abs().mean() + 0.5 * (drawn - pictures).square().mean()
    for axis in (2, 3):
        loss = loss + (drawn.diff(dim=axis) - pictures.diff(dim=axis)).abs().mean()
    return loss + PRIOR * latents.mean.square().mean()


@torch.no_grad()
def standardise(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Give the latents of `pictures` mean 0 and standard deviation 1 in each channel, by the 1x1 convolutions around them."""
    latents = vae.encode(pictures).latent_dist.mean
    mean, spread = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight[..., 0, 0] * mean).sum(dim=1)
    post.weight *= spread[None, :, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / spread
    quant.weight[:channels] /= spread[:, None, None, None]
    quant.weight[channels:] = 0  # a fixed, small variance
    quant.bias[channels:] = -12.0


@torch.no_grad()
def fidelity(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of the round trip, dB."""
    drawn = torch.cat([vae.decode(vae.encode(one).latent_dist.mean).sample for one in pictures.split(1)])
    return float(-10 * torch.log10(((drawn - pictures).clamp(-2, 2) / 2).square().mean()))
