"""Masks of words and what views keep, against OpenCV, against masks enlarged latent by latent, and on drawn maps."""

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.canvas.masks import covered, kept_words, opened, word_masks
from lib_hires.canvas.words import Word

sides = st.integers(1, 40)
seeds = st.integers(0, 2**31)
grids = st.tuples(st.integers(1, 20), st.integers(1, 20))
sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))
boxes = st.tuples(st.integers(-20, 100), st.integers(-20, 100), st.integers(1, 60), st.integers(1, 60))


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def word(*columns):
    return Word("x", columns)


def enlarged(masks, canvas):
    """Nearest, latent by latent: latent (y, x) lies in the cell (floor(y gh / H), floor(x gw / W))."""
    rows, columns = (
        [math.floor(y * cells / length) for y in range(length)] for cells, length in zip(masks.shape[1:], canvas)
    )
    return masks[:, rows][:, :, columns]


def covered_latent_by_latent(masks, views, canvas):
    large, found = enlarged(masks, canvas).double(), []
    for top, left, height, width in views:
        window = large[:, max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
        found.append(window.mean((1, 2)) if window[0].numel() else torch.zeros(len(masks), dtype=torch.float64))
    return torch.stack(found)


# Masks ----------------------------------------------------------------------------------------------------------------


@given(sides, sides, st.integers(0, 4), seeds)
def test_opening_is_opencv_s(height, width, iterations, seed):
    masks = random(2, height, width, seed=seed) < 0.8
    kernel = np.ones((3, 3), np.uint8)
    for got, mask in zip(opened(masks, iterations), masks.numpy().astype(np.uint8)):
        wanted = cv2.dilate(cv2.erode(mask, kernel, iterations=iterations), kernel, iterations=iterations)
        assert np.array_equal(got.numpy(), wanted.astype(bool))


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (16, 32), (40, 24), (12, 12)])
def test_a_mask_is_the_mean_above_its_own_mean_and_opened(size):
    maps = random(*size, 9)
    maps = torch.nn.functional.avg_pool2d(maps.permute(2, 0, 1), 5, 1, 2).permute(1, 2, 0)
    words = [word(1), word(2, 5, 7)]
    kernel, times = np.ones((3, 3), np.uint8), min(size) // 16
    for got, each in zip(word_masks(maps, words), words):
        mean = maps.numpy().astype(np.float64)[..., list(each.columns)].mean(-1)
        mask = (mean > mean.mean()).astype(np.uint8)
        if times:
            mask = cv2.dilate(cv2.erode(mask, kernel, iterations=times), kernel, iterations=times)
        assert np.array_equal(got.numpy(), mask.astype(bool)) and got.any() and not got.all()


@given(st.floats(1e-8, 1), grids)
def test_on_a_constant_map_a_word_is_nowhere(value, grid):
    maps = torch.full((*grid, 3), value, dtype=torch.float32)
    maps[..., 1] *= 0.3
    masks = word_masks(maps, [word(0), word(0, 1, 2)])
    assert not masks.any()
    assert kept_words(masks, [(0, 0, 8, 8)], (32, 32), 1e-9) == [[]]


def test_small_specks_are_opened_away_and_large_parts_stay():
    maps = torch.zeros(32, 32, 1)
    maps[3:6, 3:6] = 1
    maps[10:22, 12:26] = 1
    (mask,) = word_masks(maps, [word(0)])
    assert not mask[:8].any() and mask[10:22, 12:26].all() and mask.sum() == 12 * 14


def test_columns_outside_the_maps_count_for_nothing():
    maps = random(16, 16, 4)
    masks = word_masks(maps, [word(2), word(2, 4, 99), word(100)])
    assert torch.equal(masks[0], masks[1]) and masks[2].all()


def test_no_words_have_no_masks():
    masks = word_masks(random(16, 16, 4), [])
    assert masks.shape == (0, 16, 16)
    assert kept_words(masks, [(0, 0, 4, 4)] * 2, (16, 16), 0.3) == [[], []]


# Views ----------------------------------------------------------------------------------------------------------------


@given(grids, sizes, st.lists(boxes, min_size=1, max_size=4), seeds)
def test_what_a_view_covers_is_what_the_mask_enlarged_latent_by_latent_covers(grid, canvas, views, seed):
    masks = random(3, *grid, seed=seed) < 0.5
    torch.testing.assert_close(
        covered(masks, views, canvas), covered_latent_by_latent(masks, views, canvas), rtol=0, atol=1e-12
    )


@given(grids, sizes, st.lists(boxes, min_size=1, max_size=4), seeds)
def test_around_a_border_a_view_goes_on_at_the_other_side(grid, canvas, views, seed):
    masks = random(2, *grid, seed=seed) < 0.5
    height, width = canvas
    views = [
        (top % height, left % width - width, min(down, height), min(across, width)) for top, left, down, across in views
    ]
    large = enlarged(masks, canvas).double().repeat(1, 2, 3)
    wanted = torch.stack(
        [large[:, top : top + down, left + width :][..., :across].mean((1, 2)) for top, left, down, across in views]
    )
    torch.testing.assert_close(covered(masks, views, canvas, wrap=(True, True)), wanted, rtol=0, atol=1e-12)


@given(grids, sizes, st.lists(boxes, min_size=1, max_size=3), seeds)
def test_at_0_every_view_keeps_every_word_and_above_1_none(grid, canvas, views, seed):
    masks = random(4, *grid, seed=seed) < 0.5
    assert kept_words(masks, views, canvas, 0) == [[0, 1, 2, 3]] * len(views)
    assert kept_words(masks, views, canvas, 1.0001) == [[]] * len(views)


@given(st.floats(0, 1), st.floats(0, 1), seeds)
def test_a_higher_part_keeps_no_more_words(one, other, seed):
    masks, views = random(5, 8, 8, seed=seed) < 0.5, [(0, 0, 9, 7), (5, 11, 20, 20)]
    many, few = (kept_words(masks, views, (31, 33), c) for c in (min(one, other), max(one, other)))
    assert all(set(less) <= set(more) for less, more in zip(few, many))


@pytest.mark.parametrize("tenths", range(11))
def test_the_part_itself_is_enough(tenths):
    masks = torch.zeros(1, 10, 10, dtype=torch.bool)
    masks[:, :, :tenths] = True
    assert kept_words(masks, [(0, 0, 30, 30)], (30, 30), tenths / 10) == [[0]]
    assert kept_words(masks, [(0, 0, 30, 30)], (30, 30), tenths / 10 + 1e-9) == [[]]


def views_of(canvas, window, stride):
    return [
        (top, left, window, window)
        for top in range(0, canvas[0] - window + 1, stride)
        for left in range(0, canvas[1] - window + 1, stride)
    ]


def test_a_word_in_the_left_half_is_kept_by_the_views_of_the_left_half_only():
    """A landscape grid of 12 x 20 on a canvas of 96 x 160."""
    maps, canvas = torch.zeros(12, 20, 2), (96, 160)
    maps[:, :10, 0] = 1
    maps[:6, :, 1] = 1
    views = views_of(canvas, 32, 16)
    masks = word_masks(maps, [word(0), word(1)])
    for (top, left, _, _), kept in zip(views, kept_words(masks, views, canvas, 0.3)):
        assert (0 in kept) == (max(0, min(1, (80 - left) / 32)) >= 0.3)
        assert (1 in kept) == (max(0, min(1, (48 - top) / 32)) >= 0.3)
    assert {0 in kept for kept in kept_words(masks, views, canvas, 0.3)} == {True, False}


def test_a_word_in_a_disc_is_kept_by_the_views_that_meet_enough_of_it():
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(48.0), indexing="ij")
    maps = (-((y - 10) ** 2 + (x - 30) ** 2) / 60).exp()[..., None]
    canvas, c = (64 * 4, 96 * 4), 0.3
    masks = word_masks(maps, [word(0)])
    views = views_of(canvas, 64, 32)
    kept = kept_words(masks, views, canvas, c)
    large = enlarged(masks, canvas)[0].double()
    for (top, left, height, width), words in zip(views, kept):
        assert (words == [0]) == (large[top : top + height, left : left + width].mean() >= c)
    assert 0 < sum(map(bool, kept)) < len(views) / 2


def test_many_views_of_a_large_canvas_take_no_time_or_memory():
    masks = random(75, 32, 32) < 0.5
    views = views_of((1024, 1024), 128, 32)
    assert covered(masks, views, (1024, 1024)).shape == (len(views), 75) and len(views) == 841
