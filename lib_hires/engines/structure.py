"""What a single file's tensor shapes say about its networks: configs for diffusers and transformers.

Everything here is a pure function of names and shapes (ldm's and sgm's layout, as their constructors build it:
`openaimodel.py` UNetModel, `model.py` Encoder/Decoder, open_clip's text tower). Head counts cannot be read from shapes:
SD1 has 8 heads at every level, SD2 and SDXL heads of 64 channels, and a yaml beside the file may say otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .files import CheckpointError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
HF_CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
SDXL_CLIP, SDXL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
REFINER_CLIP = "conditioner.embedders.0.model."
TIME_IDS = 6  # SDXL's original size, crop corner and target size, two numbers each

Shapes = Mapping[str, tuple[int, ...]]

TRANSFORMER_MARKS = ("double_blocks.", "joint_blocks.", "single_blocks.", "transformer_blocks.0.attn.add_q_proj")
LORA_MARKS = ("lora_unet_", "lora_te", "lora_down", "lora_up", "lora_A.", "lora_B.", "hada_w1", "lokr_w1")


def family_of(shapes: Shapes, name: str) -> str:
    """'sd1', 'sd2' or 'sdxl', from which text encoder the file has and whether the UNet takes a vector.

    Raises `CheckpointError` naming what the file is instead, or which part it lacks.
    """
    _refuse_other_kinds(shapes, name)
    if not any(key.startswith(f"{VAE}decoder.") for key in shapes):
        raise CheckpointError(
            f"'{name}' has no autoencoder (no '{VAE}decoder.*' keys). Use a checkpoint with its VAE baked in."
        )
    if any(key.startswith(SDXL_OPEN_CLIP) for key in shapes):
        return "sdxl"
    if any(key.startswith(REFINER_CLIP) for key in shapes):
        raise CheckpointError(f"'{name}' is an SDXL refiner, which cannot draw alone. Use an SDXL base checkpoint.")
    if any(key.startswith(OPEN_CLIP) for key in shapes):
        return "sd2"
    if any(key.startswith(HF_CLIP) for key in shapes):
        return "sd1"
    raise CheckpointError(
        f"'{name}' has no text encoder (no '{HF_CLIP}*', '{OPEN_CLIP}*' or 'conditioner.embedders.*' keys). "
        "Use a complete checkpoint."
    )


def _refuse_other_kinds(shapes: Shapes, name: str) -> None:
    if f"{UNET}input_blocks.0.0.weight" in shapes and f"{UNET}out.2.weight" in shapes:
        if "edm_mean" in shapes:
            raise CheckpointError(f"'{name}' is an EDM model (Playground 2.5), whose noise levels are not supported.")
        return
    if any(mark in key for key in shapes for mark in LORA_MARKS):
        raise CheckpointError(f"'{name}' is a LoRA, not a checkpoint. Load the checkpoint that it belongs to.")
    if any(mark in key for key in shapes for mark in TRANSFORMER_MARKS):
        raise CheckpointError(
            f"'{name}' is a diffusion transformer (such as Flux or SD3), which has no UNet. Use an SD1, SD2 or SDXL checkpoint."
        )
    raise CheckpointError(
        f"'{name}' is not a Stable Diffusion checkpoint (no '{UNET}input_blocks.*' keys). "
        "Use a single file in the original layout."
    )


@dataclass
class Level:
    """One resolution of the UNet: its channels, its residual blocks, transformer depth of each block (0 = none)."""

    channels: int
    depths: list[int] = field(default_factory=list)


def unet_levels(shapes: Shapes) -> list[Level]:
    """The input side's levels. `shapes`: the UNet's, without prefix."""
    levels = [Level(shapes["input_blocks.0.0.weight"][0])]
    for index in range(1, _count(shapes, r"input_blocks\.(\d+)\.")):
        block = f"input_blocks.{index}."
        if f"{block}0.op.weight" in shapes:
            levels.append(Level(levels[-1].channels))
            continue
        levels[-1].channels = shapes[f"{block}0.out_layers.3.weight"][0]
        levels[-1].depths.append(_count(shapes, re.escape(block) + r"1\.transformer_blocks\.(\d+)\."))
    return levels


def unet_config(shapes: Shapes, family: str, heads: Mapping[str, int], pooled_width: int = 0) -> dict:
    """Arguments of diffusers' `UNet2DConditionModel`.

    `shapes`: the UNet's, without prefix; `heads`: `num_heads` or `num_head_channels` where a yaml gives one;
    `pooled_width`: of the SDXL text embedding. Raises `CheckpointError` for a structure that diffusers cannot build.
    """
    levels = unet_levels(shapes)
    middle_depth = _count(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    context = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), None)
    if context is None or not middle_depth or len({len(level.depths) for level in levels}) > 1:
        raise CheckpointError("this UNet's blocks are not laid out like SD1's, SD2's or SDXL's. Use one of these.")
    attended = [bool(max(level.depths)) for level in levels]
    channels = [level.channels for level in levels]
    config = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": tuple(channels),
        "layers_per_block": len(levels[0].depths),
        "down_block_types": tuple("CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attended),
        "up_block_types": tuple("CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attended)),
        "transformer_layers_per_block": _depths(levels, middle_depth),
        "cross_attention_dim": context,
        "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
        "attention_head_dim": _heads(channels, family, heads),  # diffusers' name for the number of heads
        "upcast_attention": family == "sd2",
    }
    return config | _vector_config(shapes, family, pooled_width)


def _depths(levels: list[Level], middle_depth: int) -> tuple[int, ...]:
    """Transformer depth by level; diffusers gives the last one to the middle block too."""
    if any(len(set(level.depths)) > 1 for level in levels) or levels[-1].depths[0] not in (0, middle_depth):
        raise CheckpointError(
            "this UNet's transformer depth changes within a level (a pruned SDXL?). Use an SDXL base."
        )
    return (*(level.depths[0] or 1 for level in levels[:-1]), middle_depth)


def _heads(channels: list[int], family: str, heads: Mapping[str, int]) -> tuple[int, ...]:
    fixed, width = heads.get("num_heads", -1), heads.get("num_head_channels", -1)
    if fixed == -1 and width == -1:
        fixed, width = (8, -1) if family == "sd1" else (-1, 64)
    if any(count % (fixed if width == -1 else width) for count in channels):
        raise CheckpointError(
            f"the UNet's channels {tuple(channels)} do not divide into {f'{fixed} heads' if width == -1 else f'heads of {width}'}. "
            "Put a yaml with 'num_heads' or 'num_head_channels' beside the checkpoint."
        )
    return tuple(fixed if width == -1 else count // width for count in channels)


def _vector_config(shapes: Shapes, family: str, pooled_width: int) -> dict:
    """SDXL's vector: pooled text beside six size numbers, each embedded in the same width (sgm `ConcatTimestepEmbedderND`)."""
    if "label_emb.0.0.weight" not in shapes:
        if family == "sdxl":
            raise CheckpointError("this SDXL UNet takes no size conditioning ('label_emb' keys are missing).")
        return {}
    width = shapes["label_emb.0.0.weight"][1]
    if family != "sdxl" or (width - pooled_width) <= 0 or (width - pooled_width) % TIME_IDS:
        raise CheckpointError(
            f"this UNet takes a vector of {width} numbers that is not SDXL's (an unCLIP or upscaling model?)."
        )
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (width - pooled_width) // TIME_IDS,
        "projection_class_embeddings_input_dim": width,
    }


def vae_config(shapes: Shapes, scaling_factor: float) -> dict:
    """Arguments of diffusers' `AutoencoderKL`. `shapes`: the autoencoder's, without prefix."""
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    channels = tuple(shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels))
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "scaling_factor": scaling_factor,
    }


def clip_config(shapes: Shapes, overrides: Mapping) -> dict:
    """Arguments of `CLIPTextConfig` for OpenAI's CLIP in transformers' naming. `shapes`: from 'text_model.' on."""
    width = shapes["text_model.embeddings.token_embedding.weight"][1]
    return _text_config(
        width,
        vocabulary=shapes["text_model.embeddings.token_embedding.weight"][0],
        positions=shapes["text_model.embeddings.position_embedding.weight"][0],
        layers=_count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        inner=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        activation="quick_gelu",
    ) | _text_overrides(overrides, width)


def open_clip_config(shapes: Shapes) -> dict:
    """Arguments of `CLIPTextConfig` for an open_clip text tower. `shapes`: without prefix."""
    vocabulary, width = shapes["token_embedding.weight"]
    projection = shapes.get("text_projection", (width, width))
    return _text_config(
        width,
        vocabulary=vocabulary,
        positions=shapes["positional_embedding"][0],
        layers=_count(shapes, r"transformer\.resblocks\.(\d+)\."),
        inner=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        activation="gelu",
    ) | {"projection_dim": projection[1]}


def _text_config(width: int, vocabulary: int, positions: int, layers: int, inner: int, activation: str) -> dict:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": positions,
        "hidden_act": activation,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
        "projection_dim": width,
    }


def _text_overrides(overrides: Mapping, width: int) -> dict:
    """From a CLIP folder's config.json: what shapes cannot tell, if it is the config of a tower this wide."""
    if overrides.get("hidden_size") != width:
        return {}
    return {
        name: overrides[name] for name in ("num_attention_heads", "hidden_act", "layer_norm_eps") if name in overrides
    }


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers the pattern's group takes among the names."""
    return len({match.group(1) for key in shapes if (match := re.match(pattern, key))})
