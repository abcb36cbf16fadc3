"""Tiny random checkpoints in the original single-file layout, written here from ldm's and sgm's constructors.

diffusers names -> original names, block by block (the other direction than the loader's, and none of its code), and an
open_clip text tower with open_clip's own names and arithmetic.
"""

import re

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

VOCABULARY = 49408

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

UNETS = {
    "sd1": {
        "block_out_channels": (32, 32, 64, 64),
        "attention_head_dim": 8,
        "cross_attention_dim": 64,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "sd2": {
        "block_out_channels": (64, 64, 128, 128),
        "attention_head_dim": (1, 1, 2, 2),
        "cross_attention_dim": 64,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (64, 64, 128),
        "attention_head_dim": (1, 1, 2),
        "cross_attention_dim": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 64 + 96,
    },
}


def tiny_unet(family: str, in_channels: int = 4) -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(in_channels=in_channels, layers_per_block=2, **UNETS[family]).eval()


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(32,) * 4,
        latent_channels=4,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()


def tiny_clip() -> CLIPTextModel:
    torch.manual_seed(3)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            eos_token_id=VOCABULARY - 1,
        )
    ).eval()


class OpenClipText(nn.Module):
    """open_clip's text tower (transformer.py: ResidualAttentionBlock, encode_text): pre-norm, causal, exact GELU."""

    class Block(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
            self.mlp = nn.Sequential()
            self.mlp.add_module("c_fc", nn.Linear(width, 2 * width))
            self.mlp.add_module("gelu", nn.GELU())
            self.mlp.add_module("c_proj", nn.Linear(2 * width, width))

        def forward(self, x, mask):
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            return x + self.mlp(self.ln_2(x))

    def __init__(self, width: int = 64, layers: int = 3, projection: int = 64):
        super().__init__()
        torch.manual_seed(4)
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.positional_embedding = nn.Parameter(torch.randn(77, width) * 0.1)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([self.Block(width) for _ in range(layers)])
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, projection) * 0.1)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, ids):
        """All layers' outputs [input, after block 0, ...] and the pooled projection at the end token."""
        mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
        states = [self.token_embedding(ids) + self.positional_embedding]
        for block in self.transformer.resblocks:
            states.append(block(states[-1], mask))
        rows = torch.arange(len(ids))
        return states, self.ln_final(states[-1])[rows, ids.argmax(-1)] @ self.text_projection


def original_unet(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    layers = unet.config.layers_per_block
    attended_up = [kind.startswith("CrossAttn") for kind in unet.config.up_block_types]
    return {
        f"model.diffusion_model.{_unet_name(name, layers, attended_up)}": value
        for name, value in unet.state_dict().items()
    }


def _unet_name(name: str, layers: int, attended_up: list[bool]) -> str:
    for new, old in TOP.items():
        if name.startswith(new + "."):
            return name.replace(new, old, 1)
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name):
        side, level, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        first = level * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0." + rest.replace("conv", "op", 1)
        if kind == "upsamplers":
            return f"output_blocks.{first + layers}.{2 if attended_up[level] else 1}.{rest}"
        block = f"input_blocks.{first + 1 + index}" if side == "down" else f"output_blocks.{first + index}"
        return f"{block}.0.{_resnet(rest)}" if kind == "resnets" else f"{block}.1.{rest}"
    found = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if found[1] == "attentions":
        return f"middle_block.1.{found[3]}"
    return f"middle_block.{2 * int(found[2])}.{_resnet(found[3])}"


def _resnet(rest: str) -> str:
    part, _, leaf = rest.rpartition(".")
    return f"{RESNET[part]}.{leaf}"


def original_vae(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    return {f"first_stage_model.{_vae_name(name)}": _as_conv(name, value) for name, value in vae.state_dict().items()}


def _as_conv(name: str, value: torch.Tensor) -> torch.Tensor:
    """The middle block's projections are 1x1 convolutions in the original."""
    return value[:, :, None, None] if "attentions" in name and value.ndim == 2 else value


def _vae_name(name: str) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{3 - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{3 - int(m[1])}.upsample.", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
    if "mid_block.attentions.0." in name:
        side, _, rest = name.partition(".mid_block.attentions.0.")
        part, _, leaf = rest.rpartition(".")
        return f"{side}.mid.attn_1.{VAE_ATTENTION[part]}.{leaf}"
    return name


def below(prefix: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in module.state_dict().items()}


def original_checkpoint(family: str, in_channels: int = 4) -> tuple[dict[str, torch.Tensor], dict[str, nn.Module]]:
    """(a single file's tensors, the modules that they were taken from)."""
    parts: dict[str, nn.Module] = {"unet": tiny_unet(family, in_channels), "vae": tiny_vae()}
    tensors = original_unet(parts["unet"]) | original_vae(parts["vae"])
    if family in ("sd1", "sdxl"):
        parts["clip"] = tiny_clip()
        prefix = "cond_stage_model.transformer." if family == "sd1" else "conditioner.embedders.0.transformer."
        tensors |= below(prefix, parts["clip"])
    if family in ("sd2", "sdxl"):
        parts["open_clip"] = OpenClipText().eval()
        prefix = "cond_stage_model.model." if family == "sd2" else "conditioner.embedders.1.model."
        tensors |= below(prefix, parts["open_clip"])
    return {name: value.detach().contiguous() for name, value in tensors.items()}, parts
