"""Views: every latent is covered, weights add up to one, edges and circles, the same draws for the same seeds."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import model

from lib_hires.canvas.mixture import MixtureOfDiffusers
from lib_hires.canvas.views import Cutter, gaussian, grid_of, join_grids, split_grids, view_weights, views_of
from lib_hires.config import Common, SettingError
from lib_hires.plan.tiling import GAUSSIAN, MIRROR, UNIFORM, ZEROS, Local, starts
from lib_hires.randomness import Stream

windows = st.integers(4, 24)
shares = st.floats(0.1, 1.0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def locals_and_sizes(draw):
    """Any views on any canvas, jittered by up to half of their overlap."""
    window = draw(windows), draw(windows)
    stride = tuple(max(1, math.ceil(length * draw(shares))) for length in window)
    size = tuple(draw(st.integers(1, 70)) for _ in window)
    jitter = draw(st.integers(0, min(length - step for length, step in zip(window, stride)) // 2))
    wrap = draw(st.booleans()), draw(st.booleans())
    edge = draw(st.sampled_from((MIRROR, ZEROS)))
    weights = draw(st.sampled_from((UNIFORM, GAUSSIAN)))
    unit = draw(st.sampled_from((1, 2, 4)))
    return Local(window, stride, weights, 0.2, 1e-4, wrap, jitter, unit, False, edge), size


def views(local, size, seeds=(0,), when=(1, 500.0)):
    return views_of(local, size, seeds, Stream("view jitter"), *when)


def put_together(local, size, x, change=lambda crop: crop, images=(0,), seeds=(0,)):
    cutter = Cutter(local, size, images)
    padded, sums = cutter.padded(x), cutter.sums(x)
    for view in views(local, size, seeds):
        cutter.add(sums, view, change(cutter.cut(padded, view)))
    pad = [slice(pad, pad + length) for pad, length in zip(cutter.pads, size)]
    return cutter.mean(sums), sums[1][..., pad[0], pad[1]]


@given(locals_and_sizes(), st.integers(0, 2**40))
def test_crops_put_together_are_the_canvas_again_and_every_latent_is_covered(both, seed):
    local, size = both
    x = random(1, 3, *size)
    again, weights = put_together(local, size, x, seeds=(seed,))
    torch.testing.assert_close(again, x, atol=2e-6, rtol=2e-6)
    assert weights.min() >= (1 if local.weights == UNIFORM else local.floor)


@pytest.mark.parametrize("edge", (MIRROR, ZEROS))
@pytest.mark.parametrize("length", range(128, 521, 28))
def test_the_published_views_cover_every_latent_whatever_the_jitter(length, edge):
    local = Local((128, 128), (64, 64), jitter=16, edge=edge)
    for draw in range(40):
        covered = torch.zeros(length, dtype=torch.int)
        for view in views(local, (length, 128), seeds=(draw,)):
            top = view.places[0][0]
            covered[max(0, top) : top + 128] += 1
            assert -16 <= top <= length - 128 + 16
        assert covered.min() >= 1


@given(st.integers(1, 300), windows, st.integers(1, 24), st.booleans())
def test_starts_cover_an_axis_with_as_few_views_as_the_stride_allows(length, window, stride, wrap):
    stride = min(stride, window)
    found = starts(length, window, stride, wrap)
    if length <= window:
        assert found == (0,)
        return
    covered = {at % length if wrap else at for start in found for at in range(start, start + window)}
    assert covered == set(range(length))
    gaps = [b - a for a, b in itertools.pairwise(found)] + ([length - found[-1]] if wrap else [])
    assert all(0 < gap <= stride for gap in gaps)
    assert len(found) == (math.ceil(length / stride) if wrap else math.ceil((length - window) / stride) + 1)


@pytest.mark.parametrize("length", range(64, 400, 8))
def test_views_are_multidiffusion_s_where_its_stride_fits(length):
    assert list(starts(length, 64, 8)) == [index * 8 for index in range((length - 64) // 8 + 1)]


@pytest.mark.parametrize("size, count", (((256, 256), 9), ((384, 384), 25), ((512, 512), 49)))
def test_there_are_as_many_views_as_demofusion_counts(size, count):
    assert len(Local((128, 128), (64, 64)).views(size)) == count


@given(locals_and_sizes(), st.integers(0, 2**40))
def test_the_same_seed_has_the_same_views_alone_and_in_a_batch(both, seed):
    local, size = both
    alone, batch = views(local, size, (seed,)), views(local, size, (seed + 1, seed))
    assert [view.places[0] for view in alone] == [view.places[1] for view in batch]


def test_views_move_differently_at_each_noise_level_and_for_each_seed_and_over_their_whole_reach():
    local = Local((128, 128), (64, 64), jitter=16)
    first = views(local, (384, 384))
    assert views(local, (384, 384)) == first
    assert views(local, (384, 384), when=(1, 480.0)) != first
    assert views(local, (384, 384), when=(2, 500.0)) != first
    assert views(local, (384, 384), seeds=(1,)) != first
    moves = {view.places[0][0] - 128 for t in range(400) for view in views(local, (384, 384), when=(1, t))[12:13]}
    assert moves == set(range(-16, 17))


def test_edge_views_move_outwards_only_and_a_view_that_covers_an_axis_stays():
    local = Local((16, 16), (8, 8), jitter=2)
    for t in range(60):
        for (top, left), view in zip(local.views((16, 40)), views(local, (16, 40), when=(1, t))):
            down, across = view.places[0][0] - top, view.places[0][1] - left
            assert down == 0
            assert across <= 0 if left == 0 else across >= 0 if left == 24 else abs(across) <= 2


def test_jitter_in_units_moves_by_whole_units():
    local = Local((32, 32), (16, 16), jitter=4, jitter_unit=4)
    moves = {view.places[0][0] - 16 for t in range(40) for view in views(local, (64, 64), when=(t,))[4:5]}
    assert moves == {-4, 0, 4}


@pytest.mark.parametrize("edge", (MIRROR, ZEROS))
def test_what_lies_beyond_the_edge_is_the_mirrored_canvas_or_zeros(edge):
    local = Local((4, 4), (2, 2), jitter=1, edge=edge)
    x = random(1, 1, 8, 8)
    cutter = Cutter(local, (8, 8), [0])
    view = replace(views(local, (8, 8))[0], places=((-1, -1),))
    found = cutter.cut(cutter.padded(x), view)[0, 0]
    assert torch.equal(found[1:, 1:], x[0, 0, :3, :3])
    assert torch.equal(found[0, 1:], x[0, 0, 1, :3] if edge == MIRROR else torch.zeros(3))


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ((16, 16), (17, 64), (256, 24), (5, 5)))
@pytest.mark.parametrize("spread", (0.02, 0.1, 0.5))
def test_gaussian_weights_are_symmetric_separable_and_never_vanish(size, spread):
    local = Local(size, size, GAUSSIAN, spread)
    (weights,) = view_weights(local, size)
    assert torch.equal(weights, weights.flip(0)) and torch.equal(weights, weights.flip(1))
    assert weights.max() == 1 and weights.min() >= 1e-4
    assert weights.half().min() > 0
    outer = weights.amax(1)[:, None] * weights.amax(0)[None]
    torch.testing.assert_close(weights, outer.clamp_min(1e-4), atol=1e-6, rtol=1e-5)


def test_gaussian_weights_are_the_published_formula_above_their_floor():
    (weights,) = view_weights(Local((64, 64), (32, 32), GAUSSIAN, 0.1), (64, 64))
    for y, x in ((31, 31), (20, 40), (32, 12), (22, 22)):
        exponent = ((y - 31.5) ** 2 + (x - 31.5) ** 2) / (64**2 * 2 * 0.01)
        peak = 2 * 0.25 / (64**2 * 2 * 0.01)
        assert float(weights[y, x]) == pytest.approx(max(1e-4, math.exp(peak - exponent)), rel=1e-5)


def test_the_published_gaussian_is_centred_half_a_latent_too_far_down_and_has_no_floor():
    local = MixtureOfDiffusers(published=True).local(model(64))
    (weights,) = view_weights(local, (64, 64))
    exact = [
        [math.exp(-((x - 31.5) ** 2) / (64**2 * 0.02)) * math.exp(-((y - 32) ** 2) / (64**2 * 0.02)) for x in range(64)]
        for y in range(64)
    ]
    exact = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(weights.double(), exact / exact.max(), rtol=1e-5, atol=0)
    assert 0 < weights.min() < 1e-10


def test_published_mixtures_refuse_what_their_views_do_not_fill_and_circles():
    method = MixtureOfDiffusers(published=True)
    for size in ((64, 64), (64, 96), (160, 128)):
        assert method.stages(model(64), size, Common())[0].canvas.local.fills(size)
    for size in ((64, 100), (32, 64), (128, 72)):
        with pytest.raises(SettingError, match=r"sides of 512 and any number of 256 more"):
            method.stages(model(64), size, Common())
        assert MixtureOfDiffusers().stages(model(64), size, Common())
    with pytest.raises(SettingError, match="'published' is True"):
        MixtureOfDiffusers(published=True, wrap_y=True)


@pytest.mark.parametrize("spread", (0.02, 0.1, 1.0))
def test_published_weights_still_put_a_canvas_together(spread):
    local = MixtureOfDiffusers(published=True, spread=spread).local(model(16))
    x = random(1, 3, 24, 40)
    again, _ = put_together(local, (24, 40), x)
    torch.testing.assert_close(again, x, atol=2e-6, rtol=2e-6)


def test_gaussian_weights_of_twice_the_size_have_the_same_shape():
    small, large = (view_weights(Local((n, n), (n, n), GAUSSIAN, 0.25), (n, n))[0] for n in (32, 64))
    sampled = torch.nn.functional.avg_pool2d(large[None, None], 2)[0, 0]
    torch.testing.assert_close(sampled / sampled.max(), small, atol=5e-3, rtol=0)


@given(locals_and_sizes())
def test_half_precision_crops_stay_finite_and_near(both):
    local, size = both
    x = random(1, 4, *size).half()
    again, _ = put_together(local, size, x)
    torch.testing.assert_close(again, x.float(), atol=2e-3, rtol=2e-3)


# Circles --------------------------------------------------------------------------------------------------------------


def circular(x):
    """A model that sees neighbours, as a UNet does inside one view."""
    kernel = random(1, 1, 3, 3, seed=5).expand(x.shape[1], 1, 3, 3)
    return torch.nn.functional.conv2d(x, kernel, padding=1, groups=x.shape[1]).tanh()


@pytest.mark.parametrize("wrap", ((True, True), (False, True), (True, False)))
@pytest.mark.parametrize("weights", (UNIFORM, GAUSSIAN))
def test_rolling_a_circle_by_a_stride_and_back_is_the_same(wrap, weights):
    local, size = Local((16, 16), (8, 8), weights, wrap=wrap), (32, 40)
    x = random(1, 4, *size)
    shift = [8 if each else 0 for each in wrap]
    rolled = put_together(local, size, x.roll(shift, (-2, -1)), circular)[0].roll([-each for each in shift], (-2, -1))
    torch.testing.assert_close(rolled, put_together(local, size, x, circular)[0], atol=1e-6, rtol=1e-6)


def test_a_circle_has_no_seam():
    """Where views see further than the model, the whole is the model on a circle."""
    size = (16, 48)
    local = Local((16, 16), (4, 4), GAUSSIAN, 0.05, 1e-30, wrap=(False, True))
    x = random(1, 1, *size)
    around = torch.nn.functional.pad(x, (8, 8, 0, 0), mode="circular")
    wanted = circular(around)[..., 8:-8]
    torch.testing.assert_close(put_together(local, size, x, circular)[0], wanted, atol=1e-4, rtol=0)


# Grids ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("published", (False, True))
@pytest.mark.parametrize("dilation", range(1, 9))
@given(st.integers(1, 40), st.integers(1, 40))
def test_grids_put_together_are_the_canvas_again(dilation, published, height, width):
    x = random(2, 3, height, width)
    grids = split_grids(x, dilation, published)
    assert grids.shape == (dilation**2, 2, 3, -(-height // dilation), -(-width // dilation))
    assert torch.equal(join_grids(grids, dilation, (height, width)), x)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(2, 5))
def test_a_grid_holds_every_s_th_latent(rows, columns, dilation):
    x = random(1, 2, rows * dilation, columns * dilation)
    for index, grid in enumerate(split_grids(x, dilation)):
        p, r = divmod(index, dilation)
        assert torch.equal(grid, x[..., p::dilation, r::dilation])


@pytest.mark.parametrize("dilation, sigma", ((1, 5.0), (3, 0.0)))
def test_a_filter_one_latent_wide_or_without_width_changes_nothing(dilation, sigma):
    x = random(2, 4, 12, 15)
    assert torch.equal(gaussian(x, dilation, sigma), x)


@pytest.mark.parametrize("published", (False, True))
def test_the_filter_keeps_each_image_s_mean_and_std_and_scales_with_it(published):
    x = random(2, 4, 24, 24) * torch.tensor([1.0, 7.0]).view(2, 1, 1, 1) + 3
    filtered = gaussian(x, 3, 0.8, published)
    torch.testing.assert_close(filtered.mean((1, 2, 3)), x.mean((1, 2, 3)))
    torch.testing.assert_close(filtered.std((1, 2, 3)), x.std((1, 2, 3)))
    torch.testing.assert_close(filtered[1:], gaussian(x[1:], 3, 0.8, published))
    torch.testing.assert_close(gaussian(10 * x, 3, 0.8, published), 10 * filtered, atol=1e-4, rtol=1e-4)


def test_the_continued_edge_is_not_darkened():
    x = torch.ones(1, 4, 16, 16) + 0.01 * random(1, 4, 16, 16)
    inside = gaussian(x, 4, 2.0)
    assert (inside[..., :2, :].mean() - 1).abs() < 0.02
    assert gaussian(x, 4, 2.0, published=True)[..., :2, :].mean() < 0.99


@pytest.mark.parametrize("published", (False, True))
def test_one_grid_is_that_of_all_grids(published):
    x = torch.randn(2, 3, 13, 17)
    grids = split_grids(x, 3, published)
    for index in range(9):
        assert torch.equal(grid_of(x, 3, index, published), grids[index])
