"""UNets with random weights for measuring speed and memory: the layouts of SD1.5 and SDXL, at full or reduced width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


@dataclass(frozen=True)
class Network:
    """A layout at a width; `native`: latents a side that it counts as trained for."""

    layout: str
    channels: tuple[int, ...]
    context: int
    head_width: int
    native: int

    def build(self, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
        """The UNet, made on its device from a fixed seed."""
        options = {
            "block_out_channels": self.channels,
            "cross_attention_dim": self.context,
            "norm_num_groups": min(32, self.channels[0] // 2),
        }
        if self.layout == "sd15":
            options |= {"attention_head_dim": self.head_width}
        else:
            options |= {
                "down_block_types": (PLAIN, CROSS, CROSS),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10),
                "use_linear_projection": True,
                "attention_head_dim": tuple(max(1, width // self.head_width) for width in self.channels),
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 1280 + 6 * 256,
            }
        with torch.device(device):
            torch.manual_seed(0)
            return UNet2DConditionModel(**options).to(dtype).eval().requires_grad_(False)

    def inputs(
        self, size: tuple[int, int], batch: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, dict]:
        """(latents, keyword arguments) of a call at `size` (height, width) in latents."""
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        kwargs = {"encoder_hidden_states": normal(batch, 77, self.context), "return_dict": False}
        if self.layout == "sdxl":
            kwargs["added_cond_kwargs"] = {"text_embeds": normal(batch, 1280), "time_ids": normal(batch, 6)}
        return normal(batch, 4, *size), kwargs


FULL = {
    "sd15": Network("sd15", (320, 640, 1280, 1280), 768, 8, 64),
    "sdxl": Network("sdxl", (320, 640, 1280), 2048, 64, 128),
}
REDUCED = {
    "sd15": Network("sd15", (32, 64, 128, 128), 64, 2, 32),
    "sdxl": Network("sdxl", (32, 64, 128), 64, 16, 32),
}
