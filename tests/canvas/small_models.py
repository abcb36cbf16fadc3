"""A tiny SDXL with random weights as the engine's parts, and models of any native size for planning."""

from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from support import structures, unets
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lib_hires.engines.components import BETAS, Components, tokenizers
from lib_hires.plan.models import FAMILIES, Model

WIDTH = unets.CONTEXT // 2


def model(native_latents, family="sdxl"):
    """What planning knows of a model of this native size in latents."""
    return Model(structures.SDXL if family == "sdxl" else structures.SD1, FAMILIES[family], 8 * native_latents)


def components(family="sdxl", in_channels=4, prediction="epsilon"):
    """Parts that are the same each time; the UNet is shared by those of a kind."""
    vae, encoders = _parts()
    return Components(
        unet=_unet(family, in_channels),
        vae=vae,
        tokenizers=tokenizers(family),
        text_encoders=list(encoders) if family == "sdxl" else [_wide()],
        family=family,
        prediction_type=prediction,
        scaling_factor=0.18,
        beta_start=BETAS[0],
        beta_end=BETAS[1],
        native_resolution=None,
        path=Path("tiny"),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@cache
def _unet(family, in_channels):
    """Smaller than those of `tests/support`: one ResNet block a level, one transformer block a pair."""
    across = family == "sdxl"
    attended = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    vector = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": unets.TIME_ID,
        "projection_class_embeddings_input_dim": unets.VECTOR,
    }
    with torch.random.fork_rng(devices=[]):
        unet = UNet2DConditionModel(
            in_channels=in_channels,
            out_channels=4,
            block_out_channels=(16, 32, 32),
            norm_num_groups=8,
            layers_per_block=1,
            down_block_types=attended if across else ("CrossAttnDownBlock2D",) * 3,
            up_block_types=tuple(name.replace("Down", "Up") for name in attended[::-1])
            if across
            else ("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=unets.CONTEXT,
            attention_head_dim=2,
            use_linear_projection=across,
            **(vector if across else {}),
        )
    unets.randomise(unet)
    return unet.eval().requires_grad_(False)


@cache
def _parts():
    with torch.random.fork_rng(devices=[]):
        vae = AutoencoderKL(
            block_out_channels=(8,) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        encoders = CLIPTextModel(_clip(WIDTH)), CLIPTextModelWithProjection(_clip(WIDTH))
    for part in (vae, *encoders):
        unets.randomise(part)
        part.eval().requires_grad_(False)
    return vae, encoders


@cache
def _wide():
    with torch.random.fork_rng(devices=[]):
        encoder = CLIPTextModel(_clip(unets.CONTEXT))
    unets.randomise(encoder)
    return encoder.eval().requires_grad_(False)


def _clip(width):
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=unets.POOLED,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=49407,
    )
