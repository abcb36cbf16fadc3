"""What decoding costs in memory, for a Stable Diffusion decoder (128, 256, 512, 512 channels; SD1, SD2, SDXL, SD3, Flux).

Counted in numbers (times bytes a number) by following every allocation of both decoder forms, latents (h, w):

    plain       64 h w * 1024    ldm (x * sigmoid(x) at 256 channels and full size: four maps); diffusers 772
    one tile    64 t^2 * 768     t: the tile; ldm 763, diffusers 523, and 640 where a tile comes from another device
    attention   h w * 3584       memory-efficient kernels, seven maps of 512 channels; the plain product adds 2 (h w)^2
    stored      64 h w * 512     ldm 388, diffusers 526 with its tile's rim; kept on the storage device
    picture     64 h w * 3       the result

Estimates add a quarter for what convolutions use beside (counted by the resident size on a CPU: up to 963 instead of 772).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..config.errors import SettingError
from .tiled_decode import MIN_TILE

PIXELS = 64
PLAIN, TILE, ATTENTION, STORED, PICTURE = 1024, 768, 3584, 512, 3
MARGIN = 1.25
MAX_TILE = 256
"""Larger ones gain nothing: no convolution is worked out twice, whatever the tile."""


def plain_bytes(z_shape: Sequence[int], dtype_bytes: int = 2, *, quadratic_attention: bool = False) -> int:
    """Peak memory of `decoder(z)` beyond the weights, for the whole batch at once."""
    batch, _channels, height, width = z_shape
    full = max(PIXELS * PLAIN, _attention(height * width, quadratic_attention))
    return math.ceil(MARGIN * batch * height * width * full * dtype_bytes)


def tiled_bytes(
    z_shape: Sequence[int], tile: int = 64, dtype_bytes: int = 2, *, quadratic_attention: bool = False
) -> int:
    """Peak memory of `decode_tiled(decoder, z, tile=tile)` on z's device, with storage on another one."""
    batch, _channels, height, width = z_shape
    area = min(tile, height) * min(tile, width)
    tile_or_attention = max(area * PIXELS * TILE, height * width * _attention(height * width, quadratic_attention))
    return math.ceil((MARGIN * tile_or_attention + 2 * batch * height * width * PIXELS * PICTURE) * dtype_bytes)


def stored_bytes(z_shape: Sequence[int], dtype_bytes: int = 2) -> int:
    """Memory of the maps that wait on the storage device (a batch is decoded one picture after another)."""
    return z_shape[2] * z_shape[3] * PIXELS * STORED * dtype_bytes


def needs_tiles(
    z_shape: Sequence[int], free_bytes: int, dtype_bytes: int = 2, *, quadratic_attention: bool = False
) -> bool:
    """Whether decoding z (B, C, h, w) as a whole needs more than the free memory of the model's device.

    dtype_bytes: of the autoencoder's numbers, 2 for fp16 and bf16, 4 for fp32. quadratic_attention: for the ldm
    attention as it was published, which holds the (h w, h w) matrix; hosts replace it by a memory-efficient one.
    """
    return plain_bytes(z_shape, dtype_bytes, quadratic_attention=quadratic_attention) > free_bytes


def tile_for(
    free_bytes: int,
    dtype_bytes: int = 2,
    z_shape: Sequence[int] | None = None,
    *,
    quadratic_attention: bool = False,
) -> int:
    """The largest tile (a multiple of 8, at most 256) with which decoding stays within `free_bytes` on the model's device.

    z_shape: where given, the attention and the picture of that size are counted too.
    Raises `SettingError` where not even the smallest tile fits.
    """
    for tile in range(MAX_TILE, MIN_TILE - 1, -8):
        needed = tiled_bytes(z_shape or (1, 4, tile, tile), tile, dtype_bytes, quadratic_attention=quadratic_attention)
        if needed <= free_bytes:
            return tile
    raise SettingError(
        "free_bytes", free_bytes, f"at least {needed} to decode this size in tiles", "Free memory or decode on the CPU."
    )


def _attention(pixels: int, quadratic: bool) -> int:
    """Numbers a latent."""
    return ATTENTION + (2 * pixels if quadratic else 0)
