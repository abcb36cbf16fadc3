"""Tiles in batches: as many in one network call as were asked for, or as fit into the free memory.

The order of the results, and of the sums made of them, never depends on the batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..memory import OUT_OF_MEMORY, free_bytes, peak_memory

ON_CPU, MOST = 1, 16
"""Automatic tiles a call: a CPU gains nothing from more; the published codes use 16."""
_SHARE = 0.7


class Batches:
    """Runs pieces in batches. `limit`: tiles a call at most; 0 starts from what the free memory allows.

    Where memory runs out all the same, the number is halved and the call repeated.
    """

    def __init__(self, limit: int = 0):
        self.limit = limit
        self.evaluations = 0
        self._found: dict[tuple, int] = {}

    @property
    def first(self) -> int:
        """Tiles at most in the first call of a size; without a limit it shows what one tile takes."""
        return self.limit or 1

    def grows(self, device: torch.device) -> bool:
        """Whether later calls take as many tiles as the free memory of the device allows."""
        return not self.limit and device.type == "cuda"

    def run(
        self,
        pieces: Iterable[tuple[Any, Tensor]],
        evaluate: Callable[[Tensor, list[Any]], Tensor],
    ) -> Iterator[tuple[Any, Tensor]]:
        """(tile, prediction (N, C, h, w)) of each piece (tile, input (N, C, h, w)) in order; all inputs have one size."""
        source = iter(pieces)
        waiting: list[tuple[Any, Tensor]] = []
        while True:
            if not waiting:
                first = next(source, None)
                if first is None:
                    return
                waiting = [first]
            key = tuple(waiting[0][1].shape)
            size = self._size(key)
            waiting += islice(source, size - len(waiting)) if size > len(waiting) else []
            batch, waiting = waiting[:size], waiting[size:]
            try:
                outputs = self._call(batch, evaluate, key)
            except OUT_OF_MEMORY:
                if len(batch) == 1:
                    raise
                self._found[key] = max(1, len(batch) // 2)
                waiting = batch + waiting
                torch.cuda.empty_cache()
                continue
            yield from zip((tile for tile, _ in batch), outputs)

    def _size(self, key: tuple) -> int:
        return self._found.get(key, self.first)

    def _call(self, batch: list[tuple[Any, Tensor]], evaluate: Callable, key: tuple) -> tuple[Tensor, ...]:
        inputs = [piece for _, piece in batch]
        joined = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
        measured = key not in self._found and self.grows(joined.device)
        with peak_memory(joined.device) if measured else contextlib.nullcontext() as peak:
            outputs = evaluate(joined, [tile for tile, _ in batch])
        self.evaluations += len(batch)
        if measured:
            taken = max(1, peak.growth)
            self._found[key] = int(min(MOST, max(1, _SHARE * free_bytes(joined.device) // taken)))
        elif not self.limit and key not in self._found:
            self._found[key] = ON_CPU
        return outputs.chunk(len(batch))
