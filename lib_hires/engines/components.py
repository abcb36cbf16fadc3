"""The parts of a checkpoint, and what a family's parts have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from . import sidecar

BETAS = (0.00085, 0.012)
"""Ends of the scaled-linear schedule that all Stable Diffusion models were trained with."""


@dataclass
class Components:
    """A checkpoint's parts, in evaluation mode on `device`.

    `family`: "sd1", "sd2" or "sdxl", from structure; `prediction_type`: "epsilon" or "v_prediction";
    `native_resolution`: pixels, None where the checkpoint does not tell; `beta_start`, `beta_end`: the ends of the
    scaled-linear schedule; `dtype`: of the UNet's weights (fp32 on a CPU, whatever was asked for).
    `tokenizers` and `text_encoders` go in pairs (SDXL has two).
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    tokenizers: list[CLIPTokenizer]
    text_encoders: list[CLIPTextModel | CLIPTextModelWithProjection]
    family: str
    prediction_type: str
    scaling_factor: float
    beta_start: float
    beta_end: float
    native_resolution: int | None
    path: Path
    device: torch.device
    dtype: torch.dtype
    zero_terminal_snr: bool = False
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def factor(self) -> int:
        """Pixels per latent (8)."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent (4)."""
        return self.vae.config.latent_channels

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet takes a mask and a masked picture beside the latent."""
        return self.unet.config.in_channels == 2 * self.latent_channels + 1


def vae_dtype(family: str, dtype: torch.dtype) -> torch.dtype:
    """SDXL's autoencoder overflows in fp16 (its diffusers config says `force_upcast`)."""
    return torch.float32 if family == "sdxl" and dtype is torch.float16 else dtype


def tokenizers(family: str, known: int = 0) -> list[CLIPTokenizer]:
    """A vocabulary once per text encoder: OpenAI's CLIP pads with the end token, open_clip with token 0 ('!').

    `known`: tokens that the text encoders know; as many as the small models' vocabulary has get that one, else it is CLIP's.
    """
    pads = {"sd1": ["<|endoftext|>"], "sd2": ["!"], "sdxl": ["<|endoftext|>", "!"]}[family]
    folder = sidecar.vocabulary(known)
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return [CLIPTokenizer(*files, pad_token=pad, model_max_length=77) for pad in pads]
