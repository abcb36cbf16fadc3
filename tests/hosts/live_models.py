"""Other kinds of model for the live host, made from the bundled one: an inpainting model, a v-prediction model, and SDXL.

The inpainting model's five further channels weigh nothing, so it must draw what the bundled model draws. The v-prediction
model has the bundled weights, which were not trained for it, and SDXL is random: what they draw is noise, but the same noise
each time, through the host's own code for such models.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1] / "engines"))

from original_layout import original_unet

INPAINTING, V_PREDICTION, SDXL = "scenes-inpainting", "scenes-v", "random-sdxl"
FURTHER = 5
"""Channels of an inpainting model's input beside the latents: the mask, and the masked picture's latents."""
OPEN_CLIP, WIDTH, LAYERS, TOKENS, VOCABULARY = "ViT-S-32-alt", 256, 10, 77, 49408
"""open_clip's smallest text tower, by its name there."""
CLIP_WIDTH, NUMBER = 64, 256
"""Width of the bundled text encoder; of each embedded number of SDXL's size conditioning."""
CHANNELS, HEAD = (32, 64, 64), 32


def write(folder: Path, bundled: Path, clip: Path) -> None:
    """Write every kind with its yaml into `folder`. `bundled`: the bundled file; `clip`: the folder of its tokenizer."""
    with safe_open(bundled, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    config = yaml.safe_load(bundled.with_suffix(".yaml").read_text().replace("CLIP_FOLDER", str(clip)))
    for name, make in ((INPAINTING, _inpainting), (V_PREDICTION, _v_prediction), (SDXL, _sdxl)):
        with torch.random.fork_rng():
            torch.manual_seed(6)
            tensors, told = make(dict(weights), config)
        save_file(tensors, folder / f"{name}.safetensors", metadata)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"model": told}))


def _inpainting(weights: dict, config: dict) -> tuple[dict, dict]:
    first = "model.diffusion_model.input_blocks.0.0.weight"
    weights[first] = torch.nn.functional.pad(weights[first], (0, 0, 0, 0, 0, FURTHER))
    params = config["model"]["params"]
    unet = {**params["unet_config"], "params": {**params["unet_config"]["params"], "in_channels": weights[first].shape[1]}}
    told = {**params, "unet_config": unet, "conditioning_key": "hybrid", "finetune_keys": None}
    return weights, {"target": "ldm.models.diffusion.ddpm.LatentInpaintDiffusion", "params": told}


def _v_prediction(weights: dict, config: dict) -> tuple[dict, dict]:
    model = config["model"]
    return weights, {**model, "params": {**model["params"], "parameterization": "v"}}


def _sdxl(weights: dict, config: dict) -> tuple[dict, dict]:
    vector = WIDTH + 6 * NUMBER
    unet = UNet2DConditionModel(
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=tuple(width // HEAD for width in CHANNELS),
        cross_attention_dim=CLIP_WIDTH + WIDTH,
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=NUMBER,
        projection_class_embeddings_input_dim=vector,
    )
    towers = {
        key.replace("cond_stage_model.", "conditioner.embedders.0.", 1): value
        for key, value in weights.items()
        if key.startswith("cond_stage_model.")
    }
    first_stage = {key: value for key, value in weights.items() if key.startswith("first_stage_model.")}
    tensors = {**original_unet(unet), **first_stage, **towers, **_open_clip()}
    tensors = {key: value.half().contiguous() for key, value in tensors.items()}
    text = config["model"]["params"]["cond_stage_config"]["params"]["version"]
    return tensors, _sdxl_config(vector, text, config["model"]["params"]["first_stage_config"]["params"])


def _open_clip() -> dict[str, torch.Tensor]:
    """Random weights of a text tower, by open_clip's names."""
    block = {
        "ln_1.weight": (WIDTH,), "ln_1.bias": (WIDTH,), "ln_2.weight": (WIDTH,), "ln_2.bias": (WIDTH,),
        "attn.in_proj_weight": (3 * WIDTH, WIDTH), "attn.in_proj_bias": (3 * WIDTH,),
        "attn.out_proj.weight": (WIDTH, WIDTH), "attn.out_proj.bias": (WIDTH,),
        "mlp.c_fc.weight": (4 * WIDTH, WIDTH), "mlp.c_fc.bias": (4 * WIDTH,),
        "mlp.c_proj.weight": (WIDTH, 4 * WIDTH), "mlp.c_proj.bias": (WIDTH,),
    }  # fmt: skip
    shapes = {f"transformer.resblocks.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in block.items()}
    shapes |= {"token_embedding.weight": (VOCABULARY, WIDTH), "positional_embedding": (TOKENS, WIDTH),
               "ln_final.weight": (WIDTH,), "ln_final.bias": (WIDTH,), "text_projection": (WIDTH, WIDTH), "logit_scale": ()}  # fmt: skip
    return {f"conditioner.embedders.1.model.{name}": _value(name, shape) for name, shape in shapes.items()}


def _value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if "ln_" in name:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    return torch.zeros(shape) if name.endswith("bias") else 0.05 * torch.randn(shape)


def _sdxl_config(vector: int, text: str, first_stage: dict) -> dict:
    diffusion, encoders = "sgm.modules.diffusionmodules", "sgm.modules.encoders.modules"
    numbers = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    embedders = [
        _embedder("txt", f"{encoders}.FrozenCLIPEmbedder", version=text, device="cpu", layer="hidden", layer_idx=1),
        _embedder("txt", f"{encoders}.FrozenOpenCLIPEmbedder2", arch=OPEN_CLIP, version=None, device="cpu", freeze=True,
                  layer="penultimate", always_return_pooled=True, legacy=False),
        *(_embedder(key, f"{encoders}.ConcatTimestepEmbedderND", outdim=NUMBER) for key in numbers),
    ]  # fmt: skip
    network = {
        "adm_in_channels": vector, "num_classes": "sequential", "use_checkpoint": False, "in_channels": 4, "out_channels": 4,
        "model_channels": CHANNELS[0], "attention_resolutions": [4, 2], "num_res_blocks": 2,
        "channel_mult": [width // CHANNELS[0] for width in CHANNELS], "num_head_channels": HEAD,
        "use_spatial_transformer": True, "use_linear_in_transformer": True, "transformer_depth": [1, 1, 2],
        "context_dim": CLIP_WIDTH + WIDTH, "spatial_transformer_attn_type": "softmax", "legacy": False,
    }  # fmt: skip
    denoiser = {
        "num_idx": 1000,
        "weighting_config": {"target": f"{diffusion}.denoiser_weighting.EpsWeighting"},
        "scaling_config": {"target": f"{diffusion}.denoiser_scaling.EpsScaling"},
        "discretization_config": {"target": f"{diffusion}.discretizer.LegacyDDPMDiscretization"},
    }
    ddconfig = {**first_stage["ddconfig"], "attn_type": "vanilla"}
    return {
        "target": "sgm.models.diffusion.DiffusionEngine",
        "params": {
            "scale_factor": 1.0,
            "disable_first_stage_autocast": True,
            "denoiser_config": {"target": f"{diffusion}.denoiser.DiscreteDenoiser", "params": denoiser},
            "network_config": {"target": f"{diffusion}.openaimodel.UNetModel", "params": network},
            "conditioner_config": {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": embedders}},
            "first_stage_config": {
                "target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
                "params": {**first_stage, "ddconfig": ddconfig},
            },
        },
    }


def _embedder(key: str, target: str, **params: object) -> dict:
    return {"is_trainable": False, "input_key": key, "target": target, "params": params}
