"""Tensors drawn from private streams: the same for an image alone and in any batch, on any device.

Noise is drawn on the CPU from a generator of its own, so that a GPU gives the same picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..randomness import Stream

_SEEDS = 2**63 - 1


def normal(stream: Stream, shape: Sequence[int], seed: int, *place: object) -> Tensor:
    """Unit noise of `shape`, fp32 on the CPU, for a seed and a place; what the stream's record holds is answered instead."""
    recorded = stream.recorded(seed, *place)
    if recorded is not None:
        return torch.as_tensor(recorded, dtype=torch.float32).reshape(tuple(shape))
    return torch.randn(tuple(shape), generator=_generator(stream, seed, *place))


def bijections(stream: Stream, count: int, shape: Sequence[int], seed: int, *place: object) -> Tensor:
    """(count, *shape) whole numbers: at each place of `shape` an independent uniform permutation of 0..count-1."""
    recorded = stream.recorded(seed, *place)
    if recorded is not None:
        return torch.as_tensor(recorded, dtype=torch.int64).reshape(count, *shape)
    return torch.rand((count, *shape), generator=_generator(stream, seed, *place)).argsort(0)


def _generator(stream: Stream, seed: int, *place: object) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(stream.bits(seed, *place) % _SEEDS)
