"""Private randomness: streams derived from (image seed, purpose, place), never from a global generator.

A draw is a pure function of its key, so that it does not matter how often, in which order, or in which batch the
network is called: image k of a batch equals the same image alone. This is also the point of injection: a `Stream`
with a `record` asks that first, so that a recorded run can be replayed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

Record = Mapping[tuple, Any] | Callable[..., Any]
"""What was drawn once: a mapping from (seed, *place), or a function of them that may answer None for "draw".

The answers are whole numbers or tensors, whatever the purpose draws.
"""
Records = Mapping[str, Record]
"""A record for each purpose; a purpose that is absent is drawn."""

PURPOSES = {
    "window shift": "(seed, timestep, layer) -> k, the shift of MSW-MSA's windows",
    "initial noise": "(seed, stage) -> (C, h, w) unit noise that the first stage starts from; stage is 0",
    "stage noise": "(seed, stage) -> (C, h, w) unit noise of a later stage, counted from 1",
    "view jitter": "(seed, stage, timestep, view, axis) -> moves of a view in latents; axis 'across', then 'down'",
    "canvas turn": "(seed, stage, timestep, axis) -> latents that a canvas with joined edges is turned by; 'down', 'across'",
    "window interaction": "(seed, stage, timestep, group) -> (k, C or 1, h, w) whole numbers: grid that each grid reads",
    "window prompts": "(seed, stage, view, axis) -> moves of views that keep their place for a stage, in cells of 4 latents",
}
"""Every purpose that numbers are drawn for, with its key and what is drawn."""


class Stream:
    """The draws of one purpose, such as "window shift"; what `record` holds is answered instead of a draw."""

    def __init__(self, purpose: str, record: Record | None = None):
        self.purpose = purpose
        self._recorded = record if callable(record) else lambda *key: (record or {}).get(key)

    def recorded(self, seed: int, *place: object) -> Any:
        """What the record holds for this seed and place, or None."""
        return self._recorded(seed, *place)

    def bits(self, seed: int, *place: object) -> int:
        """64 bits for this seed and place."""
        key = repr((self.purpose, int(seed), *place)).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")

    def integer(self, below: int, seed: int, *place: object) -> int:
        """A whole number in 0..below-1, uniform over keys."""
        recorded = self._recorded(seed, *place)
        return self.bits(seed, *place) % below if recorded is None else recorded
