"""The yaml beside a checkpoint: what tensor shapes cannot tell.

Read from ldm's layout (`model.params.{unet_config, parameterization, scale_factor, linear_start, linear_end}`) and from
sgm's (`model.params.{network_config, denoiser_config}`); everything else in it is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .files import CheckpointError, MissingFile

CLIP_FOLDER = Path(__file__).parent.parent / "assets" / "clip"
SMALL_FOLDER = CLIP_FOLDER.with_name("clip-scenes")
"""CLIP's vocabulary cut down to the words of the drawn world (benchmarks/mini/vocabulary.py)."""
PREDICTIONS = {"eps": "epsilon", "epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


@dataclass(frozen=True)
class Sidecar:
    """What a yaml says; None and empty where it is silent."""

    heads: Mapping[str, int] = field(default_factory=dict)
    prediction_type: str | None = None
    scale_factor: float | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    clip: Mapping = field(default_factory=dict)


def read(config: str | Path | Mapping | None, checkpoint: Path) -> Sidecar:
    """`config`: a yaml's path or its content; None takes the yaml of the checkpoint's name, if there is one.

    Raises `MissingFile` or `CheckpointError` where it is missing or no such yaml.
    """
    if config is None:
        config = checkpoint.with_suffix(".yaml")
        if not config.exists():
            return Sidecar(clip=_clip_folder(None))
    name = "config" if isinstance(config, Mapping) else Path(config).name
    content = config if isinstance(config, Mapping) else _load(Path(config))
    params = _walk(content, "model", "params")
    if not isinstance(params, Mapping):
        raise CheckpointError(
            f"'{name}' has no 'model: params:'. Use the yaml that belongs to the checkpoint, or none."
        )
    unet = _walk(params, "unet_config", "params") or _walk(params, "network_config", "params") or {}
    return Sidecar(
        heads={key: int(unet[key]) for key in ("num_heads", "num_head_channels") if unet.get(key) is not None},
        prediction_type=_prediction(params, name),
        scale_factor=params.get("scale_factor"),
        beta_start=params.get("linear_start"),
        beta_end=params.get("linear_end"),
        clip=_clip_folder(_walk(params, "cond_stage_config", "params", "version")),
    )


def vocabulary(known: int) -> Path:
    """The folder of the vocabulary for text encoders that know so many tokens (0: CLIP's).

    Raises `CheckpointError` where there is none: ids beyond an embedding's rows are no words.
    """
    small, whole = (vocabulary_size(folder) for folder in (SMALL_FOLDER, CLIP_FOLDER))
    if known == small:
        return SMALL_FOLDER
    if 0 < known < whole:
        raise CheckpointError(
            f"the text encoder knows {known} tokens, CLIP's vocabulary has {whole} and that of the small models {small}. "
            "If it is a small model, train it anew, or use the release that it was made with."
        )
    return CLIP_FOLDER


def prediction_of(word: str, source: str) -> str:
    """diffusers' name of a prediction type. Raises `CheckpointError` for an unknown one."""
    if word not in PREDICTIONS:
        raise CheckpointError(
            f"{source} asks for the prediction type '{word}', must be one of {', '.join(PREDICTIONS)}."
        )
    return PREDICTIONS[word]


def _load(path: Path):
    if not path.exists():
        raise MissingFile(f"there is no config at '{path}'. Check the path.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise CheckpointError(f"'{path.name}' is no valid yaml ({error}).") from error


def _prediction(params: Mapping, name: str) -> str | None:
    if params.get("parameterization"):
        return prediction_of(params["parameterization"], f"'{name}'")
    scaling = str(_walk(params, "denoiser_config", "params", "scaling_config", "target") or "")
    return {"VScaling": "v_prediction", "EpsScaling": "epsilon"}.get(scaling.rpartition(".")[2])


def _clip_folder(version: str | None) -> dict:
    """The config.json of the CLIP folder that a yaml names; the bundled one's if it names none that is here."""
    return _config(Path(version) if version and (Path(version) / "config.json").exists() else CLIP_FOLDER)


def vocabulary_size(folder: Path) -> int:
    """Tokens in a vocabulary's folder."""
    return _config(folder)["vocab_size"]


def _config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _walk(content, *names: str):
    for name in names:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content
