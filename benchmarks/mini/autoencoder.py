"""Training the autoencoder: on crops of scenes first, then on whole ones, then its decoder alone.

Crops of 48 pixels: a latent's receptive field is about that large, and edges, which are all there is to learn, are
sought: of several crops the liveliest are taken. Group norms take their statistics from what they are shown, so an
autoencoder that has seen crops only gets the colours of whole pictures wrong: these come after.

Pictures alone do not make good latents. Nine colours fit on a line, and so they were put: all four channels said the same,
red lay beside cyan and green beside black, and a slight error of the UNet, or of a stage's mean and std, turned one into the
other. So the channels are held apart (unit covariance), a linear layer must read each latent's colour from them, and the
decoder is trained through noise that the UNet's errors are small against.

The encoder is good long before the decoder: after both's training the latents tell thin lines and faint textures that no
picture shows yet. So the decoder goes on alone, and the latents, and what a UNet has learned of them, stay as they are.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional

from lib_hires.engines.checkpoint import digest_of
from lib_hires.plan.models import LATENT_FACTOR

from . import networks, scenes

POOL, SOUGHT = 600, 3
CROPPED = ((48, 12),)
WHOLE = ((networks.NATIVE // 2, 2), (networks.NATIVE, 1))
"""(side, batch) of the two parts of the training; sizes take turns. The decoder alone is shown those of the second."""
NOISE, LATER_NOISE = 0.1, 0.05
"""Standard deviations of what is added to latents before they are decoded, where theirs is 1; the later one for the decoder
alone, where what is faint in the latents must not drown."""
APART, READ = 0.1, 0.5
"""Weights of the latents' distance from mean 0 and unit covariance, and of the error of the colours read from them."""
RECENT = 0.05
"""Share of a batch in the running mean and covariance: a picture has too few colours to be judged alone."""


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


class Read(nn.Module):
    """An autoencoder with what it is trained by, thrown away after: a linear layer that reads each latent's mean colour, and
    the running mean and covariance of the latents.
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae, channels = vae, vae.config.latent_channels
        self.colours = nn.Conv2d(channels, 3, 1)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("covariance", torch.eye(channels))

    def recent(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The running moments with these (B, C, H, W) in them."""
        mean = self.mean.lerp(moments(latents)[0], RECENT)
        covariance = self.covariance.lerp(moments(latents, about=mean)[1], RECENT)
        if self.training:
            self.mean, self.covariance = mean.detach(), covariance.detach()
        return mean, covariance


def loss_of(read: Read, pictures: torch.Tensor, step: int) -> torch.Tensor:
    """Difference of colours and of their steps, of the latents' covariance from unit, and of the colours read from them.

    The noise before the decoder is the step's own.
    """
    latents = read.vae.encode(pictures).latent_dist.mean
    loss = _difference(read.vae, latents, pictures, NOISE, step)
    mean, covariance = read.recent(latents)
    apart = ((covariance - torch.eye(len(mean)).to(mean)).square().mean() + mean.square().mean()) / RECENT
    seen = functional.avg_pool2d(pictures, LATENT_FACTOR)
    return loss + APART * apart + READ * (read.colours(latents) - seen).square().mean()


def decoder_loss_of(vae: AutoencoderKL, pictures: torch.Tensor, step: int) -> torch.Tensor:
    """Difference of colours and of their steps, for the decoder alone; the noise before it is the step's own."""
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mean
    return _difference(vae, latents, pictures, LATER_NOISE, step)


def encoder_digest(vae: AutoencoderKL) -> str:
    """Names what latents depend on: all but the decoder."""
    return digest_of({**vae.encoder.state_dict(), **{f"quant.{k}": v for k, v in vae.quant_conv.state_dict().items()}})


def _difference(vae, latents: torch.Tensor, pictures: torch.Tensor, noise: float, step: int) -> torch.Tensor:
    added = noise * torch.randn(latents.shape, generator=torch.Generator().manual_seed(step))
    drawn = vae.decode(latents + added.to(latents.device)).sample
    loss = (drawn - pictures).abs().mean() + 0.5 * (drawn - pictures).square().mean()
    for axis in (2, 3):
        loss = loss + (drawn.diff(dim=axis) - pictures.diff(dim=axis)).abs().mean()
    return loss


def moments(latents: torch.Tensor, about: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (C,) and covariance (C, C) of the channels of (B, C, H, W); the covariance `about` another mean than their own."""
    values = latents.transpose(0, 1).flatten(1)
    mean = values.mean(dim=1)
    apart = values - (mean if about is None else about)[:, None]
    return mean, apart @ apart.T / values.shape[1]


@torch.no_grad()
def standardise(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Give the latents of `pictures` mean 0 and unit covariance over the channels, by the 1x1 convolutions around them.

    Of all such changes, the one that moves latents least (ZCA).
    """
    mean, covariance = moments(vae.encode(pictures).latent_dist.mean)
    spread, axes = torch.linalg.eigh(covariance)
    spread = spread.clamp_min(1e-8).sqrt()
    whiten, back = (axes * spread.reciprocal()) @ axes.T, (axes * spread) @ axes.T
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[..., 0, 0] @ mean
    post.weight.copy_((post.weight[..., 0, 0] @ back)[..., None, None])
    quant.bias[:channels] = whiten @ (quant.bias[:channels] - mean)
    quant.weight[:channels] = (whiten @ quant.weight[:channels, :, 0, 0])[..., None, None]
    quant.weight[channels:] = 0  # a fixed, small variance
    quant.bias[channels:] = -12.0


@torch.no_grad()
def fidelity(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of the round trip, dB."""
    drawn = torch.cat([vae.decode(vae.encode(one).latent_dist.mean).sample for one in pictures.split(1)])
    return float(-10 * torch.log10(((drawn - pictures).clamp(-2, 2) / 2).square().mean()))
