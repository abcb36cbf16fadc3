"""The autoencoder's decoder in tiles, from the end of a sampling run until the host has decoded its result."""

from __future__ import annotations

import math

import torch

from ...config.errors import HiresError
from ...memory import free_bytes
from ...vae import needs_tiles, tile_for, tiled, wrapped

NOTE = (
    "the picture is decoded in tiles of {tile} latents, which changes nothing in it: as a whole it needs more memory."
)


class Decoding:
    """What is open now; `close` may be called any number of times."""

    def __init__(self) -> None:
        self._open: list[tiled | wrapped] = []

    def open(self, latents: torch.Tensor, wrap: tuple[bool, bool] = (False, False)) -> str | None:
        """Decode pictures of this size in tiles where the whole would not fit. Returns a note if so.

        latents: (B, C, h, w). wrap: (top to bottom, left to right) edges that meet.
        """
        from modules import shared

        self.close()
        decoder = getattr(getattr(shared.sd_model, "first_stage_model", None), "decoder", None)
        if not isinstance(decoder, torch.nn.Module) or getattr(shared.opts, "sd_vae_decode_method", "Full") != "Full":
            return None
        note = self._open_tiles(decoder, latents)
        if any(wrap):
            self._enter(wrapped(decoder, wrap))
        return note

    def _open_tiles(self, decoder: torch.nn.Module, latents: torch.Tensor) -> str | None:
        from modules import devices

        shape, bytes_each = (1, *latents.shape[1:]), torch.finfo(devices.dtype_vae).bits // 8
        free = _free_bytes(latents.device)
        if not needs_tiles(shape, free, bytes_each):
            return None
        try:
            tile = tile_for(free, bytes_each, shape)
        except HiresError:
            return None  # not even tiles fit: the host's own error tells
        self._enter(tiled(decoder, tile=tile, above=math.isqrt(shape[2] * shape[3] - 1)))
        return NOTE.format(tile=tile)

    def _enter(self, context: tiled | wrapped) -> None:
        context.__enter__()
        self._open.append(context)

    def close(self) -> None:
        """Take it back."""
        while self._open:
            self._open.pop().__exit__()


def _free_bytes(device: torch.device) -> int:
    """Free memory of the device that decodes; the machine's where that is its CPU."""
    import psutil

    free = free_bytes(device)
    return psutil.virtual_memory().available if free is None else free
