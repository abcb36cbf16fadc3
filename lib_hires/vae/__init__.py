"""The autoencoder at any size: exact decoding in tiles (tiled_decode.py), and what it costs (cost.py)."""

from .cost import needs_tiles, plain_bytes, stored_bytes, tile_for, tiled_bytes
from .tiled_decode import MIN_TILE, decode_tiled, tiled
from .wrapped import WRAP_MARGIN, wrapped

__all__ = [
    "MIN_TILE",
    "WRAP_MARGIN",
    "decode_tiled",
    "needs_tiles",
    "plain_bytes",
    "stored_bytes",
    "tile_for",
    "tiled",
    "tiled_bytes",
    "wrapped",
]
