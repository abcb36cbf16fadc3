"""Loading a Stable Diffusion checkpoint into diffusers and transformers modules, without asking any hub.

    path -> tensors (files) -> family and configs (structure, sidecar) -> empty modules -> weights, one tensor at a time

Single files are in the original ldm/sgm layout; their keys go through diffusers' own converters
(`diffusers.loaders.single_file_utils`). The tokenizer is CLIP's, which SD1, SD2 and SDXL share;
the small models of this project have a part of it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ..plan.models import trained_size
from . import folder, sidecar, structure
from .components import BETAS, Components, tokenizers, vae_dtype
from .files import CheckpointError, MissingFile, Tensors, open_tensors

BUNDLED = Path(__file__).parent.parent / "assets" / "scenes-sd15.safetensors"
AUTOENCODER_OF, AUTOENCODER_DIGEST = "hires_lab.autoencoder_of", "hires_lab.autoencoder_digest"
"""Metadata keys of a file without an autoencoder: the file beside it whose autoencoder it was trained with, and that one's
`digest_of`."""
SCALING_FACTORS = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: str | Path | dict | None = None,
) -> Components:
    """Load a checkpoint: a single file in the original layout, a diffusers folder, or (None) the bundled one.

    `config`: a yaml (or its content) that overrides the one beside a single file.
    Raises `MissingFile`, or `CheckpointError` saying what the file is or lacks.
    """
    path, device = Path(path or BUNDLED), torch.device(device)
    if device.type == "cpu" and dtype is torch.float16:
        dtype = torch.float32  # half-precision arithmetic on a CPU is slow and incomplete
    if path.is_dir():
        return folder.load(path, device, dtype)
    return _load_file(path, device, dtype, config)


def _load_file(path: Path, device: torch.device, dtype: torch.dtype, config) -> Components:
    tensors = open_tensors(path)
    if tensors.metadata.get(AUTOENCODER_OF) and not tensors.below(structure.VAE):
        tensors = _with_autoencoder(tensors, path)
    family = structure.family_of(tensors.shapes, path.name)
    notes = sidecar.read(config, path)
    scaling_factor = SCALING_FACTORS[family] if notes.scale_factor is None else float(notes.scale_factor)
    text_encoders = _text_encoders(tensors, family, notes, device, dtype)
    unet = _unet(tensors, family, notes, text_encoders, device, dtype)
    return Components(
        unet=unet,
        vae=_vae(tensors, scaling_factor, device, vae_dtype(family, dtype)),
        tokenizers=tokenizers(family, text_encoders[0].config.vocab_size),
        text_encoders=text_encoders,
        family=family,
        prediction_type=_prediction_type(tensors, family, notes, unet),
        scaling_factor=scaling_factor,
        beta_start=BETAS[0] if notes.beta_start is None else float(notes.beta_start),
        beta_end=BETAS[1] if notes.beta_end is None else float(notes.beta_end),
        native_resolution=trained_size(tensors.metadata),
        path=path,
        device=device,
        dtype=dtype,
        zero_terminal_snr="ztsnr" in tensors,
        metadata=tensors.metadata,
    )


def _with_autoencoder(tensors: Tensors, path: Path) -> Tensors:
    """The tensors with the autoencoder of the file beside it. Raises where that is not there or another."""
    lender = path.with_name(Path(tensors.metadata[AUTOENCODER_OF]).name)
    if not lender.exists():
        raise MissingFile(
            f"'{path.name}' has no autoencoder of its own and takes that of '{lender.name}', which is not beside it. "
            "Put both files into one folder."
        )
    lent = open_tensors(lender)
    if digest_of(lent.section(structure.VAE)) != tensors.metadata.get(AUTOENCODER_DIGEST):
        raise CheckpointError(
            f"'{path.name}' was trained with another autoencoder than that of '{lender.name}' beside it. Use the two files "
            "that were made together."
        )
    return tensors.with_part(lent, structure.VAE)


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """16 letters for the names and values of tensors, in half precision."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].detach().half().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def fill(
    module: torch.nn.Module, weights: dict[str, torch.Tensor], device, dtype, part: str, file: str
) -> torch.nn.Module:
    """Give a module built on the meta device its weights, converted one at a time; `weights` is emptied.

    Raises `CheckpointError` naming the first missing, unexpected or misshapen weights.
    """
    wanted = {name: value.shape for name, value in module.state_dict().items()}
    problems = [f"missing {name}" for name in wanted if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in wanted]
    problems += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(shape)}"
        for name, shape in wanted.items()
        if name in weights and weights[name].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"the {part} of '{file}' does not fit: {'; '.join(problems[:3])}{more}.")
    ready = {name: weights.pop(name).to(device=device, dtype=dtype, copy=True) for name in wanted}
    module.load_state_dict(ready, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def _unet(tensors: Tensors, family, notes, text_encoders, device, dtype) -> UNet2DConditionModel:
    pooled = text_encoders[-1].config.projection_dim if family == "sdxl" else 0
    config = structure.unet_config(tensors.below(structure.UNET), family, notes.heads, pooled)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    weights = convert_ldm_unet_checkpoint(tensors.section(structure.UNET), config)
    return fill(unet, weights, device, dtype, "UNet", tensors.name)


def _vae(tensors: Tensors, scaling_factor, device, dtype) -> AutoencoderKL:
    config = structure.vae_config(tensors.below(structure.VAE), scaling_factor)
    with torch.device("meta"):
        vae = AutoencoderKL(**config)
    known = re.compile(r"first_stage_model\.(encoder|decoder|quant_conv|post_quant_conv)\.")
    source = {name: value for name, value in tensors.section(structure.VAE).items() if known.match(name)}
    return fill(vae, convert_ldm_vae_checkpoint(source, config), device, dtype, "autoencoder", tensors.name)


def _text_encoders(tensors: Tensors, family, notes, device, dtype) -> list:
    if family == "sd1":
        return [_clip(tensors, structure.HF_CLIP, notes, device, dtype)]
    if family == "sd2":
        return [_open_clip(tensors, structure.OPEN_CLIP, CLIPTextModel, device, dtype)]
    return [
        _clip(tensors, structure.SDXL_CLIP, notes, device, dtype),
        _open_clip(tensors, structure.SDXL_OPEN_CLIP, CLIPTextModelWithProjection, device, dtype),
    ]


def _clip(tensors: Tensors, prefix: str, notes, device, dtype) -> CLIPTextModel:
    """OpenAI's CLIP; some merged files leave 'text_model.' out of its names."""
    weights = {}
    for name, value in tensors.section(prefix).items():
        rest = name[len(prefix) :]
        if not rest.endswith("position_ids"):
            weights[rest if rest.startswith("text_model.") else f"text_model.{rest}"] = value
    config = structure.clip_config(_shapes_of(weights), notes.clip)
    return _text_model(CLIPTextModel, config, weights, device, dtype, tensors.name)


def _open_clip(tensors: Tensors, prefix: str, kind, device, dtype):
    """open_clip's tower. SD2 reads the last layer but one through the final norm: its last layer is left out."""
    source = {
        name: value
        for name, value in tensors.section(prefix).items()
        if not name.endswith(("logit_scale", "attn_mask"))
    }
    config = structure.open_clip_config({name[len(prefix) :]: tuple(value.shape) for name, value in source.items()})
    if kind is CLIPTextModel:
        config["num_hidden_layers"] -= 1
        last = f"{prefix}transformer.resblocks.{config['num_hidden_layers']}."
        source = {name: value for name, value in source.items() if not name.startswith(last)}
    with torch.device("meta"):
        empty = kind(CLIPTextConfig(**config))
    weights = convert_open_clip_checkpoint(empty, source, prefix=prefix)
    if kind is CLIPTextModel:
        weights.pop("text_projection.weight", None)
    return _text_model(kind, config, weights, device, dtype, tensors.name)


def _text_model(kind, config: dict, weights: dict, device, dtype, file: str):
    with torch.device("meta"):
        model = kind(CLIPTextConfig(**config))
    fill(model, weights, device, dtype, "text encoder", file)
    embeddings = model.text_model.embeddings  # position_ids is no weight, so nothing has filled it
    embeddings.position_ids = torch.arange(config["max_position_embeddings"], device=device)[None]
    return model


def _prediction_type(tensors: Tensors, family: str, notes, unet) -> str:
    """The yaml's word, else the metadata's, else the marker key of v models; an SD2 file without any is tried out."""
    if notes.prediction_type:
        return notes.prediction_type
    said = tensors.metadata.get("modelspec.prediction_type")
    if said:
        return sidecar.prediction_of(said, "'modelspec.prediction_type'")
    if "v_pred" in tensors:
        return "v_prediction"
    return probe_prediction(unet) if family == "sd2" else "epsilon"


@torch.no_grad()
def probe_prediction(unet: UNet2DConditionModel) -> str:
    """Tell an SD2 eps model from a v model by one call on pure noise at the last timestep.

    There x = eps, and an eps model answers with its input, a v model with -x0, which is unlike it:
    correlation near 1 or near 0. Works for a trained model; others count as v models, as diffusers assumes for SD2.
    """
    place = {"device": unet.device, "dtype": unet.dtype}
    noise = torch.randn(1, unet.config.in_channels, 32, 32, generator=torch.Generator().manual_seed(0)).to(**place)
    context = torch.zeros(1, 77, unet.config.cross_attention_dim, **place)
    answer = unet(noise, 999, encoder_hidden_states=context).sample
    channels = answer.shape[1]
    likeness = torch.cosine_similarity(noise[:, :channels].flatten().float(), answer.flatten().float(), dim=0)
    return "epsilon" if likeness > 0.5 else "v_prediction"


def _shapes_of(weights: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}
