"""Loading a checkpoint folder in diffusers' layout: unet/, vae/, text_encoder/ (text_encoder_2/), scheduler/."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from .components import BETAS, Components, tokenizers, vae_dtype
from .files import CheckpointError


def load(path: Path, device: torch.device, dtype: torch.dtype) -> Components:
    """Load a folder. Raises `CheckpointError` where a part is missing or it is no Stable Diffusion model."""
    for part in ("unet", "vae", "text_encoder"):
        if not (path / part / "config.json").exists():
            raise CheckpointError(
                f"the folder '{path.name}' has no '{part}/config.json'. Give a complete diffusers folder."
            )
    settings = _json(path / "scheduler" / "scheduler_config.json")
    family = _family(path)
    vae = _model(AutoencoderKL, path / "vae", device, vae_dtype(family, dtype))
    unet = _model(UNet2DConditionModel, path / "unet", device, dtype)
    text_encoders = _text_encoders(path, family, device, dtype)
    return Components(
        unet=unet,
        vae=vae,
        tokenizers=tokenizers(family, text_encoders[0].config.vocab_size),
        text_encoders=text_encoders,
        family=family,
        prediction_type=settings.get("prediction_type", "epsilon"),
        scaling_factor=vae.config.scaling_factor,
        beta_start=settings.get("beta_start", BETAS[0]),
        beta_end=settings.get("beta_end", BETAS[1]),
        native_resolution=_native_resolution(unet, vae),
        path=path,
        device=device,
        dtype=dtype,
        zero_terminal_snr=bool(settings.get("rescale_betas_zero_snr", False)),
    )


def _family(path: Path) -> str:
    kind = _json(path / "unet" / "config.json").get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise CheckpointError(f"the folder '{path.name}' holds a {kind}, not a Stable Diffusion UNet.")
    if (path / "text_encoder_2").exists():
        return "sdxl"
    return "sd2" if _json(path / "text_encoder" / "config.json").get("hidden_act") == "gelu" else "sd1"


def _text_encoders(path: Path, family: str, device: torch.device, dtype: torch.dtype) -> list:
    encoders = [_model(CLIPTextModel, path / "text_encoder", device, dtype)]
    if family == "sdxl":
        encoders.append(_model(CLIPTextModelWithProjection, path / "text_encoder_2", device, dtype))
    return encoders


def _model(kind, folder: Path, device: torch.device, dtype: torch.dtype):
    """One part from disk, in its own file's variant (some folders hold fp16 files only)."""
    names = [file.name for file in folder.iterdir()]
    plain = any(name.endswith((".safetensors", ".bin")) and ".fp16." not in name for name in names)
    try:
        model = kind.from_pretrained(
            str(folder),
            local_files_only=True,
            torch_dtype=dtype,
            variant=None if plain else "fp16",
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{folder}' cannot be loaded ({error}).") from error
    return model.to(device).eval().requires_grad_(False)


def _native_resolution(unet, vae) -> int | None:
    size = unet.config.sample_size
    return size * 2 ** (len(vae.config.block_out_channels) - 1) if isinstance(size, int) else None


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
