"""A single checkpoint file in the original layout, with the yaml that WebUIs want beside it.

diffusers' names -> ldm's names, by the two layouts' tables:

    down_blocks.i.resnets.j -> input_blocks.(1 + 3i + j).0      up_blocks.i.resnets.j -> output_blocks.(3i + j).0
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from lib_hires.engines import structure
from lib_hires.engines.checkpoint import AUTOENCODER_DIGEST, AUTOENCODER_OF, digest_of
from lib_hires.engines.components import BETAS

from . import networks

TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.group_norm.": "mid.attn_1.norm.",
    "mid_block.attentions.0.to_q.": "mid.attn_1.q.",
    "mid_block.attentions.0.to_k.": "mid.attn_1.k.",
    "mid_block.attentions.0.to_v.": "mid.attn_1.v.",
    "mid_block.attentions.0.to_out.0.": "mid.attn_1.proj_out.",
    "conv_norm_out.": "norm_out.",
    "conv_shortcut.": "nin_shortcut.",
    "downsamplers.0.": "downsample.",
    "upsamplers.0.": "upsample.",
}


OPEN_CLIP = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "self_attn.out_proj.": "attn.out_proj.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
}
ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}


def save(path: Path, layout: networks.Layout, unet, vae, text_encoders, description: str, lender: str = "") -> None:
    """Write `path` (.safetensors, half precision) and its yaml.

    `lender`: name of a file beside it that has the same autoencoder, which is then left out of this one.
    """
    tensors = {structure.UNET + name: value for name, value in unet_tensors(unet).items()}
    own = {structure.VAE + name: value for name, value in vae_tensors(vae).items()}
    if not lender:
        tensors |= own
    prefix = structure.SDXL_CLIP if layout.family == "sdxl" else structure.HF_CLIP
    tensors |= {
        prefix + name: value
        for name, value in text_encoders[0].state_dict().items()
        if not name.endswith("position_ids")
    }
    for tower in text_encoders[1:]:
        tensors |= {structure.SDXL_OPEN_CLIP + name: value for name, value in open_clip_tensors(tower).items()}
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES[layout.family],
        "modelspec.title": path.stem,
        "modelspec.description": description,
        "modelspec.resolution": f"{networks.NATIVE}x{networks.NATIVE}",
        **({AUTOENCODER_OF: lender, AUTOENCODER_DIGEST: digest_of(own)} if lender else {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().half().contiguous() for name, value in tensors.items()}, path, metadata)
    described = _sgm_yaml() if layout.family == "sdxl" else _ldm_yaml(layout, vae)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")


def unet_tensors(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A UNet's weights under ldm's names (without prefix)."""
    attended = ["Attn" in kind for kind in unet.config["up_block_types"]]
    return {_unet_name(name, attended): value for name, value in unet.state_dict().items()}


def _unet_name(name: str, attended: list[bool]) -> str:
    for theirs, ours in TOP.items():
        if name.startswith(theirs + "."):
            return f"{ours}.{_resnet(name[len(theirs) + 1 :])}"
    side, level, kind, index, rest = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+?)\.(\d+)\.(.+)", name).groups()
    level, index = int(level), int(index)
    if kind == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * level + 2}.{2 if attended[level] else 1}.{rest}"
    block = f"input_blocks.{1 + 3 * level + index}" if side == "down" else f"output_blocks.{3 * level + index}"
    return f"{block}.{'1' if kind == 'attentions' else '0'}.{_resnet(rest)}"


def _resnet(rest: str) -> str:
    head, _, tail = rest.partition(".")
    return f"{RESNET.get(head, head)}.{tail}" if tail else rest


def vae_tensors(vae: torch.nn.Module) -> dict[str, torch.Tensor]:
    """An autoencoder's weights under ldm's names (without prefix); attention's projections are 1x1 convolutions there."""
    levels = len(vae.config["block_out_channels"])
    named = {}
    for name, value in vae.state_dict().items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        new = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", new)
        up = re.search(r"up_blocks\.(\d+)\.", new)
        if up:
            new = new.replace(up.group(0), f"up.{levels - 1 - int(up.group(1))}.")
            new = re.sub(r"resnets\.(\d+)", r"block.\1", new)
        for theirs, ours in VAE.items():
            new = new.replace(theirs, ours)
        named[new] = value[..., None, None] if ".attn_1." in new and value.ndim == 2 else value
    return named


def open_clip_tensors(tower: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A text tower's weights under open_clip's names (without prefix): query, key and value are one matrix there."""
    named, weights = {}, tower.state_dict()
    for name, value in weights.items():
        if name.endswith("position_ids") or ".k_proj." in name or ".v_proj." in name:
            continue
        new = name
        if ".q_proj." in name:
            value = torch.cat([weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            new = name.replace("self_attn.q_proj.", "attn.in_proj_")
        for theirs, ours in OPEN_CLIP.items():
            new = new.replace(theirs, ours)
        named[new] = value
    named["text_projection"] = named.pop("text_projection.weight").T
    return named


def _sgm_yaml() -> dict:
    """What shapes do not tell. No host reads it: they build SDXL's text encoders at their full size only."""
    scaling = {"target": "sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling"}
    return {
        "model": {
            "target": "sgm.models.diffusion.DiffusionEngine",
            "params": {
                "scale_factor": 1.0,
                "denoiser_config": {"params": {"scaling_config": scaling}},
                "network_config": {"params": {"num_head_channels": networks.HEAD}},
            },
        }
    }


def _ldm_yaml(layout: networks.Layout, vae) -> dict:
    widths = vae.config["block_out_channels"]
    return {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": BETAS[0],
                "linear_end": BETAS[1],
                "num_timesteps_cond": 1,
                "timesteps": 1000,
                "first_stage_key": "jpg",
                "cond_stage_key": "txt",
                "image_size": networks.LATENTS,
                "channels": 4,
                "cond_stage_trainable": False,
                "conditioning_key": "crossattn",
                "scale_factor": 1.0,
                "use_ema": False,
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": {
                        "image_size": networks.LATENTS,
                        "in_channels": 4,
                        "out_channels": 4,
                        "model_channels": layout.channels[0],
                        "attention_resolutions": [2**level for level, on in enumerate(layout.attended) if on][::-1],
                        "num_res_blocks": 2,
                        "channel_mult": [width // layout.channels[0] for width in layout.channels],
                        "num_heads": -1,
                        "num_head_channels": networks.HEAD,
                        "use_spatial_transformer": True,
                        "transformer_depth": 1,
                        "context_dim": layout.context,
                        "use_checkpoint": False,
                        "legacy": False,
                    },
                },
                "first_stage_config": {
                    "target": "ldm.models.autoencoder.AutoencoderKL",
                    "params": {
                        "embed_dim": 4,
                        "ddconfig": {
                            "double_z": True,
                            "z_channels": 4,
                            "resolution": networks.NATIVE,
                            "in_channels": 3,
                            "out_ch": 3,
                            "ch": widths[0],
                            "ch_mult": [width // widths[0] for width in widths],
                            "num_res_blocks": vae.config["layers_per_block"],
                            "attn_resolutions": [],
                            "dropout": 0.0,
                        },
                        "lossconfig": {"target": "torch.nn.Identity"},
                    },
                },
                "cond_stage_config": {
                    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                    "params": {"version": "CLIP_FOLDER", "device": "cpu"},
                },
            },
        }
    }
