"""What decoding costs: the estimates against counted allocations."""

import pytest
import torch
from live_memory import Counter, two_devices
from tiny_decoders import KINDS, build, latents

from lib_hires.config.errors import SettingError
from lib_hires.vae.cost import MARGIN, needs_tiles, plain_bytes, stored_bytes, tile_for, tiled_bytes
from lib_hires.vae.tiled_decode import decode_tiled

EIGHTH = (16, 32, 64, 64)
"""Stable Diffusion's 128, 256, 512, 512 channels, divided by 8: so are all maps, and the estimates but for the picture."""
GIB = 2**30


@pytest.fixture(params=KINDS)
def decoder(request):
    return build(request.param, widths=EIGHTH, groups=4, attention=False)


def test_the_estimate_of_a_plain_decode_is_above_what_is_counted_and_not_far(decoder):
    z = latents(1, 4, 24, 32)
    with Counter() as counter:
        decoder(z)
    assert counter.peak < plain_bytes(z.shape, 4) / 8 < 2 * counter.peak


@pytest.mark.parametrize("size", ((24, 24), (40, 32)))
def test_the_accelerator_holds_one_tile_whatever_the_size(decoder, size):
    z, tile = latents(1, 4, *size), 8
    with two_devices() as counter:
        result = decode_tiled(decoder, z, tile=tile)
    picture = result.numel() * 4
    assert counter.peak - picture < tile * tile * 64 * (768 / 8 + 6) * 4
    assert counter.stored_peak < stored_bytes(z.shape, 4) / 8 * 1.15  # and the pieces that a tile's rim still needs
    assert counter.stored == 0


def test_what_is_stored_is_let_go_while_it_is_read(decoder):
    """Not the sum of all maps, nor of the input and the output of a block: what is behind the tile is gone."""
    z = latents(1, 4, 48, 8)
    with two_devices() as counter:
        decode_tiled(decoder, z, tile=8)
    assert counter.stored_peak < 64 * 48 * 8 * (530 / 8 + 4) * 4


def test_attention_is_counted():
    decoder = build("diffusers", widths=EIGHTH, groups=4)
    z = latents(1, 4, 32, 64)
    with two_devices() as counter:
        decode_tiled(decoder, z, tile=8)
    attention = 32 * 64 * 3584 / 8 * 4  # more than a tile and the picture
    assert 0.8 * attention < counter.peak < attention


def test_a_picture_that_fits_needs_no_tiles_and_one_that_does_not_does():
    assert not needs_tiles((1, 4, 64, 64), 4 * GIB)
    assert needs_tiles((1, 4, 256, 256), 4 * GIB)
    assert needs_tiles((1, 4, 128, 128), 4 * GIB, 4)
    assert not needs_tiles((1, 4, 128, 128), 4 * GIB, 2)
    assert needs_tiles((4, 4, 64, 64), GIB) and not needs_tiles((1, 4, 64, 64), GIB)
    assert needs_tiles((1, 4, 256, 256), 16 * GIB, quadratic_attention=True)
    assert not needs_tiles((1, 4, 256, 256), 16 * GIB)


@pytest.mark.parametrize("dtype_bytes", (2, 4))
@pytest.mark.parametrize("free", (GIB // 8, GIB // 2, GIB, 4 * GIB, 64 * GIB))
def test_a_tile_is_the_largest_that_fits(free, dtype_bytes):
    tile = tile_for(free, dtype_bytes)
    assert tile % 8 == 0 and 8 <= tile <= 256
    assert tiled_bytes((1, 4, 1024, 1024), tile, dtype_bytes) > MARGIN * tile * tile * 64 * 768 * dtype_bytes
    assert tile * tile * 64 * 768 * dtype_bytes < free
    assert tile == 256 or (tile + 8) ** 2 * 64 * 774 * dtype_bytes * MARGIN > free


def test_the_tile_for_a_size_leaves_room_for_its_attention_and_its_picture():
    shape = (1, 4, 512, 512)
    assert tiled_bytes(shape, tile_for(4 * GIB, 2, shape)) <= 4 * GIB
    with pytest.raises(SettingError, match="Free memory"):
        tile_for(GIB, 2, shape)
    with pytest.raises(SettingError, match="'free_bytes' is"):
        tile_for(1_000_000)


def test_nothing_is_counted_where_nothing_is_decoded():
    with Counter() as counter:
        torch.empty(0)
    assert counter.peak == 0
