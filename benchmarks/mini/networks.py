"""The small models' networks, in diffusers' and transformers' classes: SD's layouts at the least width that keeps colour.

64 channels, not 32: with ldm's 32 groups a group of one channel is an instance norm, which takes every channel's mean
away, and with it the picture's overall colour.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lib_hires.engines.structure import TIME_IDS
from lib_hires.plan.models import LATENT_FACTOR

NATIVE = 256  # pixels
LATENTS = NATIVE // LATENT_FACTOR
HEAD = 32
LOUD = 4.0
TOKENS = 77
"""Length of a text chunk."""


@dataclass(frozen=True)
class Layout:
    """What sets a family's UNet and text encoders apart.

    `family`: the loader's word for it; `channels`: of each level; `attended`: levels with attention; `towers`: widths of the
    text encoders, joined they are the context; `layers`: of each text encoder; `linear`: whether attention's projections are
    linear layers; `vector`: width of each embedded number of SDXL's size conditioning.
    """

    family: str
    channels: tuple[int, ...]
    attended: tuple[bool, ...]
    towers: tuple[int, ...]
    layers: int
    linear: bool = False
    vector: int = 0

    @property
    def context(self) -> int:
        """Width of a token's embedding."""
        return sum(self.towers)


LAYOUTS = {
    "sd15": Layout("sd1", (64, 64, 128, 128), (True, True, True, False), towers=(64,), layers=2),
    "sdxl": Layout("sdxl", (64, 64, 96), (False, True, True), towers=(32, 32), layers=3, linear=True, vector=16),
}


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


def text_encoders(layout: Layout, vocabulary: int) -> list[CLIPTextModel]:
    """CLIP's tower; for SDXL another of open_clip's form, whose pooled text goes into the vector. The last token is the end."""
    kinds = (CLIPTextModel, "quick_gelu"), (CLIPTextModelWithProjection, "gelu")
    return [
        kind(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layout.layers,
                num_attention_heads=4 if layout.family == "sd1" else 1,
                max_position_embeddings=TOKENS,
                hidden_act=activation,
                bos_token_id=vocabulary - 2,
                eos_token_id=vocabulary - 1,
                pad_token_id=vocabulary - 1,
                projection_dim=width,
            )
        )
        for width, (kind, activation) in zip(layout.towers, kinds)
    ]


def unet(layout: Layout) -> UNet2DConditionModel:
    """`layout`'s blocks; SDXL's takes the pooled text and six numbers of sizes besides."""
    vector = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": layout.vector,
        "projection_class_embeddings_input_dim": layout.towers[-1] + TIME_IDS * layout.vector,
    }
    return UNet2DConditionModel(
        block_out_channels=layout.channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if on else "DownBlock2D" for on in layout.attended),
        up_block_types=tuple("CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(layout.attended)),
        cross_attention_dim=layout.context,
        use_linear_projection=layout.linear,
        attention_head_dim=tuple(width // HEAD for width in layout.channels),
        sample_size=LATENTS,
        **(vector if layout.vector else {}),
    )
