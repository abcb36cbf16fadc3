"""Edges for a ControlNet: Canny's thresholds by the median, pictures that are dark, and from which step to which they count."""

from fractions import Fraction

import numpy as np
import pytest

from lib_hires.canvas.edges import edge_map, enlarged, thresholds
from lib_hires.plan.tiling import Edges

SOBEL = 4
"""What Canny's gradient makes of a straight step: four times its height."""


def grey(value, side=48):
    return np.full((side, side, 3), value, np.uint8)


def stepped(ground, height, side=48):
    """A brighter right third: the median stays the ground's."""
    picture = grey(ground, side)
    picture[:, 2 * side // 3 :] = ground + height
    return picture


# Thresholds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "median, narrow, wide",
    (
        (0, (0, 0), (0, 0)),
        (64, (44, 83), (25, 102)),
        (128, (89, 166), (51, 204)),
        (255, (178, 255), (102, 255)),
    ),
)
def test_thresholds_lie_around_the_median_by_the_published_rule(median, narrow, wide):
    assert thresholds(median, 0.3) == narrow
    assert thresholds(median, 0.6) == wide


@pytest.mark.parametrize("published", (False, True))
@pytest.mark.parametrize("sigma", (0.3, 0.6))
@pytest.mark.parametrize("ground", (64, 128))
def test_a_step_is_an_edge_if_its_gradient_is_above_the_upper_threshold(ground, sigma, published):
    _, high = thresholds(ground, sigma)
    least = high // SOBEL + 1
    assert edge_map(stepped(ground, least), sigma, published).any()
    assert not edge_map(stepped(ground, least - 1), sigma, published).any()


def test_an_edge_goes_on_where_it_weakens_down_to_the_lower_threshold():
    """128: the thresholds are 89 and 166, a step of 43 is strong, 23 goes on from it, 21 does not."""
    for weaker, goes_on in ((23, True), (21, False)):
        picture = stepped(128, 43)
        picture[24:, 32:] = 128 + weaker
        found = edge_map(picture, 0.3)
        assert found[:20].any() and found[30:].any() == goes_on
        picture[:24, 32:] = 128 + weaker
        assert not edge_map(picture, 0.3).any()


def test_the_median_is_that_of_all_values_of_all_channels():
    picture = grey(64)
    picture[..., 0] = 255  # a third of the values; the brightness would be 121 and its upper threshold 157
    for height, found in ((22, True), (20, False)):
        lit = picture.copy()
        lit[:, 40:, 1:] += height
        assert np.median(lit) == 64
        assert edge_map(lit, 0.3).any() == found


def test_a_map_is_black_and_white_where_the_step_is_and_the_picture_stays_as_it_was():
    picture = stepped(100, 100)
    before = picture.copy()
    found = edge_map(picture, 0.3)
    assert found.shape == (48, 48) and found.dtype == np.uint8 and set(np.unique(found)) == {0, 255}
    assert all(set(np.flatnonzero(row)) <= {31, 32} and row.any() for row in found)
    assert np.array_equal(picture, before)


# Dark pictures --------------------------------------------------------------------------------------------------------


def night(speck, side=64):
    """A black picture with noise of so many levels."""
    noise = np.random.default_rng(0).integers(0, speck + 1, (side, side, 1))
    noise[: side // 2 + 4] = 0
    return np.repeat(noise, 3, axis=2).astype(np.uint8)


def test_noise_in_the_dark_is_an_edge_everywhere_as_published_and_nowhere_otherwise():
    picture = night(3)
    assert np.median(picture) == 0
    noisy = edge_map(picture, 0.3, published=True)[40:]
    assert (noisy > 0).mean() > 0.2
    assert not edge_map(picture, 0.3).any()


def test_what_is_lit_at_night_keeps_its_edges():
    picture = night(2)
    picture[8:24, 8:24] = 60
    found = edge_map(picture, 0.3)
    rows, columns = np.nonzero(found)
    assert 7 <= rows.min() <= 8 and 23 <= rows.max() <= 24 and 7 <= columns.min() <= 8 and 23 <= columns.max() <= 24
    assert not found[10:22, 10:22].any() and not found[28:].any()


@pytest.mark.parametrize("height", (7, 8, 40))
def test_pictures_darker_than_the_darkest_are_taken_as_that_dark(height):
    found = [edge_map(stepped(ground, height), 0.3).any() for ground in (0, 10, 23, 24)]
    assert found == [SOBEL * height > thresholds(24, 0.3)[1]] * 4


def test_a_picture_of_one_colour_has_no_edges():
    for value in (0, 7, 128, 255):
        assert not edge_map(grey(value), 0.3).any()


# Enlarging ------------------------------------------------------------------------------------------------------------


def test_enlarging_takes_width_and_height_and_stays_within_the_range():
    picture = stepped(0, 255)[:, :, 0]
    found = enlarged(picture, 96, 192)
    assert found.shape == (192, 96) and found.dtype == np.uint8
    assert found[:, :56].max() == 0 and found[:, 72:].min() == 255  # what bicubic overshoots is cut, not turned round


# Steps ----------------------------------------------------------------------------------------------------------------


def test_edges_from_two_to_five_tenths_of_fifty_steps_count_in_steps_ten_to_twenty_four():
    edges = Edges(0.6, start=0.2, end=0.5)
    shares = [edges.share(step, 50) for step in range(50)]
    assert [step for step, share in enumerate(shares) if share] == list(range(10, 25))
    assert set(shares) == {0.0, 0.6}


@pytest.mark.parametrize("steps", (1, 3, 20, 50))
def test_by_default_edges_count_in_all_steps_with_their_strength(steps):
    assert [Edges(0.45).share(step, steps) for step in range(steps)] == [0.45] * steps


@pytest.mark.parametrize("steps", (7, 12, 20, 30, 50, 60))
def test_no_step_is_lost_to_rounding_at_the_ends(steps):
    twentieths = [Fraction(n, 20) for n in range(21)]
    for start in twentieths:
        for end in twentieths:
            edges = Edges(1.0, start=float(start), end=float(end))
            kept = [step for step in range(steps) if edges.share(step, steps)]
            assert kept == [s for s in range(steps) if Fraction(s, steps) >= start and Fraction(s + 1, steps) <= end]
