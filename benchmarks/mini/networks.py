"""The small models' networks, in diffusers' and transformers' classes: SD's layouts at the least width that keeps colour.

64 channels, not 32: with ldm's 32 groups a group of one channel is an instance norm, which takes every channel's mean
away, and with it the picture's overall colour.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from transformers import CLIPTextConfig, CLIPTextModel

from lib_hires.plan.models import LATENT_FACTOR

NATIVE = 256  # pixels
LATENTS = NATIVE // LATENT_FACTOR
CHANNELS = {"sd15": (64, 64, 128, 128)}
"""Widths of each layout's UNet."""
CONTEXT = 64
HEAD = 32
LOUD = 4.0
TOKENS = 77
"""Length of a text chunk."""


def autoencoder() -> AutoencoderKL:
    """f8, 4 latent channels.

    It starts nearly linear: residual branches add nothing yet, and constants in some channels of each last norm's groups
    outweigh what the others carry, so that the norm's statistics hardly depend on the picture. Tried over the first 150 steps
    only, where it learned faster; a whole training with and without it was not compared.
    """
    vae = AutoencoderKL(
        block_out_channels=(64, 64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        scaling_factor=1.0,
        sample_size=NATIVE,
    )
    for block in (module for module in vae.modules() if isinstance(module, ResnetBlock2D)):
        torch.nn.init.zeros_(block.conv2.weight)
        torch.nn.init.zeros_(block.conv2.bias)
    for side in (vae.encoder, vae.decoder):
        torch.nn.init.zeros_(side.mid_block.attentions[0].to_out[0].weight)
    with torch.no_grad():
        vae.encoder.mid_block.resnets[-1].conv2.bias[0::4] = LOUD
        vae.encoder.mid_block.resnets[-1].conv2.bias[1::4] = -LOUD
        vae.decoder.up_blocks[-1].resnets[-1].conv2.bias[0::2] = LOUD
    return vae


def text_encoder(vocabulary: int, end: int) -> CLIPTextModel:
    """CLIP's text tower, two layers of 64; `vocabulary`: its tokens, `end`: the end token."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=CONTEXT,
            intermediate_size=2 * CONTEXT,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def unet(layout: str) -> UNet2DConditionModel:
    """`layout`: "sd15": 12 blocks a side, attention on the upper three levels."""
    channels = CHANNELS[layout]
    return UNet2DConditionModel(
        block_out_channels=channels,
        cross_attention_dim=CONTEXT,
        attention_head_dim=tuple(width // HEAD for width in channels),
        sample_size=LATENTS,
    )
