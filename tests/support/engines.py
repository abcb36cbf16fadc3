"""The standalone engine without decoding, and its parts with a UNet of three small levels."""

from dataclasses import replace

import torch
from diffusers import UNet2DConditionModel

from lib_hires.engines.standalone import Engine
from support import unets

ATTENDED_AT_THE_TOP = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
ATTENDED_BELOW = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}


class Blind(Engine):
    """An engine that does not decode."""

    def decode(self, latents, wrap=(False, False)):
        return []


def with_small_unet(parts, **options):
    """The engine's parts with a random UNet of three small levels. options: its blocks, above, and what else it is told."""
    with torch.random.fork_rng(devices=[]):
        unet = UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32, 32),
            norm_num_groups=8,
            layers_per_block=1,
            cross_attention_dim=parts.unet.config.cross_attention_dim,
            attention_head_dim=2,
            **options,
        )
    unets.randomise(unet)
    return replace(parts, unet=unet.eval().requires_grad_(False))
