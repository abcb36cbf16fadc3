"""Hand-offs on a circle: enlarged latents go on across edges that meet."""

import math

import pytest
import torch
from torch.nn import functional as F

from lib_hires.plan.tiling import CanvasPlan, Local, Stage
from lib_hires.stages.handoff import enlarge
from lib_hires.stages.progressive import Progressive

SIZES = (((8, 12), (16, 24)), ((8, 12), (17, 31)), ((7, 9), (23, 40)), ((16, 16), (24, 40)), ((16, 5), (16, 11)), ((2, 3), (5, 7)))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size, wanted", SIZES)
def test_enlarging_a_circle_is_enlarging_many_turns_of_it_and_taking_one_inside(size, wanted):
    x, turns = random(2, 4, *size), 5
    many = F.interpolate(
        x.repeat(1, 1, turns, turns), size=[turns * length for length in wanted], mode="bicubic", align_corners=False
    )
    found = enlarge(x, wanted, wrap=(True, True))
    assert found.is_contiguous()
    middle = many[..., 2 * wanted[0] : 3 * wanted[0], 2 * wanted[1] : 3 * wanted[1]]
    torch.testing.assert_close(found, middle, rtol=0, atol=1e-4)


@pytest.mark.parametrize("axis", (0, 1))
@pytest.mark.parametrize("size, wanted", (((16, 16), (32, 32)), ((16, 16), (37, 41)), ((16, 20), (40, 44))))
def test_a_wave_around_a_circle_has_no_step_where_it_closes_nor_anything_cut_off(size, wanted, axis):
    """Also where sides grow differently: cutting would open the circle."""
    phase = torch.arange(size[axis]) * 2 * math.pi / size[axis]
    wave = phase.cos()[:, None] if axis == 0 else phase.cos()
    x = wave.expand(1, 1, *size)
    large = enlarge(x, wanted, wrap=(axis == 0, axis == 1)).mean((0, 1, 3 - axis))
    places = (torch.arange(wanted[axis]) + 0.5) / wanted[axis] * size[axis] - 0.5
    torch.testing.assert_close(large, (places * 2 * math.pi / size[axis]).cos(), rtol=0, atol=0.03)
    closing = (large[0] - large[-1]).abs()
    assert closing <= large.diff().abs().max() * 1.05


@pytest.mark.parametrize("wrap, shift", (((True, False), (4, 0)), ((False, True), (0, 6)), ((True, True), (8, 2))))
def test_enlarging_a_turned_circle_is_turning_the_enlarged_one(wrap, shift):
    x = random(1, 4, 12, 16)
    turned = enlarge(x.roll(shift, (-2, -1)), (24, 32), wrap=wrap)
    torch.testing.assert_close(turned, enlarge(x, (24, 32), wrap=wrap).roll([2 * n for n in shift], (-2, -1)), rtol=0, atol=1e-5)
    open_ended = enlarge(x.roll(shift, (-2, -1)), (24, 32))
    assert (open_ended - enlarge(x, (24, 32)).roll([2 * n for n in shift], (-2, -1))).abs().max() > 0.05


def test_an_axis_that_is_no_circle_is_cut_as_before():
    x = random(1, 4, 8, 12)
    found = enlarge(x, (14, 24), wrap=(False, True))
    plain = F.interpolate(x, scale_factor=2.0, mode="bicubic")[..., 1:15, :]
    assert found.shape == plain.shape
    torch.testing.assert_close(found[..., 6:-6], plain[..., 6:-6], rtol=0, atol=1e-5)
    assert (found[..., 0] - plain[..., 0]).abs().max() > 0.01


@pytest.mark.parametrize("wrap", ((False, True), (True, False)))
def test_a_stage_is_handed_latents_that_are_enlarged_on_its_own_circle(wrap):
    later = Stage((16, 24), 2.0, canvas=CanvasPlan(local=Local((8, 8), (4, 4), wrap=wrap)))
    before = random(1, 4, 8, 12)
    run = Progressive((Stage((8, 12)), later), (0,)).later(later, 1, before)
    assert torch.equal(run.reference, enlarge(before, (16, 24), wrap=wrap))
    assert not torch.equal(run.reference, enlarge(before, (16, 24)))
