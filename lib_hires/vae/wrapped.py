"""Decoding of a canvas whose opposite edges meet: the decoder sees beyond an edge what stands at the other one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..patches import UndoLog

WRAP_MARGIN = 20
"""Latents that are looked at beyond an edge: a decoder's convolutions reach 17, an encoder's less."""


class wrapped:
    """Inside it `decoder(z)` joins top and bottom, left and right, as `wrap` (down, across) says; taken back on exit.

    z: (B, C, h, w); the picture keeps its size of (f h, f w) pixels. Without any wrap nothing is changed.
    """

    def __init__(self, decoder: nn.Module, wrap: tuple[bool, bool]):
        self.decoder, self.wrap = decoder, tuple(wrap)
        self._log = UndoLog()

    def __enter__(self) -> wrapped:
        self._log = UndoLog()
        if any(self.wrap):
            self._log.override(self.decoder, "forward", self._make)
        return self

    def __exit__(self, *_failure: object) -> None:
        self._log.undo()

    def _make(self, previous: Callable[..., Any]) -> Callable[..., Any]:
        def forward(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            down, across = (min(WRAP_MARGIN, z.shape[axis - 2]) if self.wrap[axis] else 0 for axis in (0, 1))
            picture = previous(F.pad(z, (across, across, down, down), mode="circular"), *args, **kwargs)
            factor = picture.shape[-1] // (z.shape[-1] + 2 * across)
            top, left = down * factor, across * factor
            return picture[..., top : top + z.shape[-2] * factor, left : left + z.shape[-1] * factor]

        return forward
