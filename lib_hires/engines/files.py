"""Reading checkpoint files: names, shapes and metadata first, each tensor when it is asked for.

A .safetensors file is mapped, not read, so that an fp16 file becomes an fp32 model without ever being whole in memory;
a .ckpt goes through `torch.load(weights_only=True, mmap=True)`, which refuses everything that is not a tensor.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..config.errors import HiresError

TENSOR_FILES = (".safetensors", ".ckpt", ".pt", ".bin")


class CheckpointError(HiresError, ValueError):
    """A checkpoint that cannot be loaded, and why."""


class MissingFile(HiresError, FileNotFoundError):
    """A path where there is nothing."""


class Tensors:
    """The tensors of one file by name, read when asked for.

    `name`: the file's; `shapes[tensor]`: its shape; `metadata`: the file's text metadata (empty for a .ckpt).
    """

    def __init__(self, name: str, shapes: dict[str, tuple[int, ...]], read, metadata: dict[str, str]):
        self.name, self.shapes, self.metadata, self._read = name, shapes, metadata, read

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the file's dtype."""
        return self._read(name)

    def below(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors whose name starts with `prefix`, by the rest of their name."""
        return {name[len(prefix) :]: shape for name, shape in self.shapes.items() if name.startswith(prefix)}

    def section(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose name starts with `prefix`, by their full name."""
        return {name: self.read(name) for name in self.shapes if name.startswith(prefix)}

    def with_part(self, other: Tensors, prefix: str) -> Tensors:
        """These, and those of `other` whose name starts with `prefix`."""
        theirs = {name: shape for name, shape in other.shapes.items() if name.startswith(prefix)}

        def read(name: str) -> torch.Tensor:
            return other.read(name) if name in theirs else self.read(name)

        return Tensors(self.name, self.shapes | theirs, read, self.metadata)


def open_tensors(path: Path) -> Tensors:
    """Open a checkpoint file.

    Raises `MissingFile`, or `CheckpointError` where it is no such file or is refused.
    """
    if not path.exists():
        raise MissingFile(f"there is no checkpoint at '{path}'. Check the path.")
    if path.suffix.lower() not in TENSOR_FILES:
        raise CheckpointError(
            f"'{path.name}' is no checkpoint file. Give a .safetensors or .ckpt file, or a folder in diffusers' layout."
        )
    return _open_safetensors(path) if path.suffix.lower() == ".safetensors" else _open_pickle(path)


def _open_safetensors(path: Path) -> Tensors:
    try:
        handle = safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"'{path.name}' cannot be read as safetensors ({error}). It may be cut off: fetch it again."
        ) from error
    shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    return Tensors(path.name, shapes, handle.get_tensor, dict(handle.metadata() or {}))


def _open_pickle(path: Path) -> Tensors:
    content = _load_pickle(path)
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    return Tensors(path.name, {name: tuple(value.shape) for name, value in tensors.items()}, tensors.__getitem__, {})


def _load_pickle(path: Path):
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: no zip file, cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{path.name}' was refused: it holds more than tensors, and unpickling that could run code. "
            "Use a .safetensors version of it."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"'{path.name}' cannot be read ({error}). It may be cut off: fetch it again.") from error
