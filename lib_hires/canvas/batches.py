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
        if key in self._found:
            return self._found[key]
        if self.limit:
            return self.limit
        return 1  # the first call of a size shows what one tile takes

    def _call(self, batch: list[tuple[Any, Tensor]], evaluate: Callable, key: tuple) -> tuple[Tensor, ...]:
        inputs = [piece for _, piece in batch]
        joined = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
        measured = not self.limit and key not in self._found and joined.is_cuda
        with peak_memory(joined.device) if measured else contextlib.nullcontext() as peak:
            outputs = evaluate(joined, [tile for tile, _ in batch])
        self.evaluations += len(batch)
        if measured:
            taken = max(1, peak.growth)
            self._found[key] = int(min(MOST, max(1, _SHARE * free_bytes(joined.device) // taken)))
        elif not self.limit and key not in self._found:
            self._found[key] = ON_CPU
        return outputs.chunk(len(batch))
