"""Decoding latents of any size in tiles, without seams and without a difference.

The decoder is called once, with a stand-in for z (lazy.py) on which work is put off. GroupNorm is the only operation that
looks at all pixels at once (attention aside, which runs on the assembled map, small at latent size): at each one the map
before it is worked out tile by tile, from stored maps whose tiles are read with the few pixels around them that the
convolution since touches. So statistics are the whole map's, no tile has a border of its own, no convolution is worked
out twice:

    stored map -> tile + 1 pixel -> norm, silu, conv -> tile, summed up for the next norm -> stored map

The accelerator holds one tile at a time; the maps between wait on the storage device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config.errors import SettingError
from ..patches import UndoLog
from .lazy import LazyMap, assembled, lazy

MIN_TILE = 8


def decode_tiled(
    decoder: nn.Module,
    z: Tensor,
    *,
    tile: int = 64,
    storage: str | torch.device | None = None,
    run: Callable[..., Tensor] | None = None,
) -> Tensor:
    """What `decoder(z)` returns, (B, 3, 8h, 8w) for z (B, C, h, w), worked out in tiles; equal up to rounding.

    tile: the longest side of a tile, in latents.
    storage: where maps wait between tiles; None: "cpu". z's own device spares the way there and back where it can hold
        `stored_bytes` (cost.py).
    run: called in place of `decoder`.
    Pictures of a batch are decoded one after another, without gradients. Works for any module of convolutions, nearest
    enlargements, norms and pointwise operations, an encoder too (tile then in pixels); others run as they are, in full.
    Raises `SettingError` for a tile below 8, an unknown storage, or a z without four dimensions; `UnsupportedModel` for
    a decoder that writes into tensors used before.
    """
    tile, storage = _checked_tile(tile), _checked_storage(storage)
    if z.dim() != 4:
        raise SettingError("z", tuple(z.shape), "latents (B, C, h, w)")
    run = run or getattr(decoder, "_orig_mod", decoder)
    if not z.shape[0]:
        return run(z)
    with torch.no_grad():
        pictures = [assembled(run(lazy(picture, tile, storage))) for picture in z.split(1)]
    return pictures[0] if len(pictures) == 1 else torch.cat(pictures)


class tiled:
    """Inside the block `decoder(z)` decodes in tiles whenever h * w is more than `above` squared.

        with tiled(vae.decoder, tile=64, above=128):
            vae.decode(z)

    An override of the instance's `forward`, taken back on leaving for whatever reason; blocks nest, and one object may
    be entered again. Calls with anything but a four-dimensional z, or with gradients, go through as they are.
    """

    def __init__(
        self, decoder: nn.Module, *, tile: int = 64, above: int = 128, storage: str | torch.device | None = None
    ):
        self.decoder, self.tile, self.above = decoder, _checked_tile(tile), above
        self.storage = _checked_storage(storage)
        if not isinstance(above, int) or isinstance(above, bool) or above < 0:
            raise SettingError("above", above, "a whole number of latents, 0 or more")
        self._logs: list[UndoLog] = []

    def __enter__(self) -> tiled:
        log = UndoLog()
        log.override(self.decoder, "forward", self._make)
        self._logs.append(log)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._logs.pop().undo()

    def _make(self, previous: Callable[..., Any]) -> Callable[..., Any]:
        def forward(z: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._wants(z):
                return previous(z, *args, **kwargs)
            # a compiled module cannot be given a stand-in; what it was compiled from can
            run = getattr(self.decoder, "_orig_mod", previous)
            return decode_tiled(
                self.decoder,
                z,
                tile=self.tile,
                storage=self.storage,
                run=lambda picture: run(picture, *args, **kwargs),
            )

        return forward

    def _wants(self, z: Any) -> bool:
        if not isinstance(z, Tensor) or isinstance(z, LazyMap) or z.dim() != 4:
            return False
        return z.shape[2] * z.shape[3] > self.above**2 and not (torch.is_grad_enabled() and z.requires_grad)


def _checked_tile(tile: int) -> int:
    if not isinstance(tile, int) or isinstance(tile, bool) or tile < MIN_TILE:
        raise SettingError("tile", tile, f"a whole number of latents, at least {MIN_TILE}")
    return tile


def _checked_storage(storage: str | torch.device | None) -> torch.device:
    try:
        return torch.device("cpu" if storage is None else storage)
    except (RuntimeError, TypeError):
        raise SettingError("storage", str(storage), "a torch device: 'cpu', 'cuda', ...") from None
