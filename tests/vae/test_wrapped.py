"""Pictures whose edges meet."""

import pytest
import torch
from tiny_decoders import KINDS, build

from lib_hires.vae import tiled, wrapped


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [(False, True), (True, False), (True, True)])
def test_a_canvas_that_repeats_gives_a_picture_that_repeats_across_the_edge(kind, wrap):
    decoder = build(kind)
    z = torch.randn(1, 4, 12 if wrap[0] else 9, 12 if wrap[1] else 9, generator=torch.Generator().manual_seed(1))
    z = z.repeat(1, 1, 2 if wrap[0] else 1, 2 if wrap[1] else 1)
    with torch.no_grad(), wrapped(decoder, wrap):
        picture = decoder(z)
    with torch.no_grad():
        plain = decoder(z)
    assert picture.shape == plain.shape
    for axis in (0, 1):
        if wrap[axis]:
            half = picture.shape[axis - 2] // 2
            torch.testing.assert_close(picture.roll(half, axis - 2), picture, atol=1e-4, rtol=1e-3)
            assert (plain.roll(half, axis - 2) - plain).abs().max() > 0.05


def test_tiles_and_joined_edges_go_together_and_both_are_taken_back():
    decoder = build("diffusers")
    before = dict(vars(decoder))
    z = torch.randn(1, 4, 11, 30, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        with wrapped(decoder, (False, True)):
            whole = decoder(z)
        with tiled(decoder, tile=16, above=8), wrapped(decoder, (False, True)):
            in_tiles = decoder(z)
    torch.testing.assert_close(in_tiles, whole, atol=1e-4, rtol=1e-3)
    assert vars(decoder) == before


def test_without_a_wrap_nothing_is_installed():
    decoder = build("diffusers")
    with wrapped(decoder, (False, False)):
        assert "forward" not in vars(decoder)
