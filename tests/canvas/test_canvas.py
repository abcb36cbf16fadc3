"""Canvases around models whose answer is known: what averaging, filtering and exchanging may and may not change."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lib_hires.canvas import draws
from lib_hires.canvas.batches import Batches
from lib_hires.canvas.canvas import DILATED, LOCAL, WHOLE, Canvas
from lib_hires.canvas.hints import Hint
from lib_hires.canvas.views import gaussian
from lib_hires.plan.tiling import (
    BY_CHANNEL,
    BY_POSITION,
    GAUSSIAN,
    MIRROR,
    NO_SHUFFLE,
    ZEROS,
    CanvasPlan,
    Cosines,
    Dilated,
    Local,
)
from lib_hires.randomness import Stream
from lib_hires.schedule import Moment, NoiseSchedule

WINDOW = Local((16, 16), (8, 8), jitter=2)
SIZES = ((32, 32), (32, 24), (35, 41), (16, 33), (12, 40), (40, 9))
PLANS = {
    "views": CanvasPlan(WINDOW),
    "gaussian views": CanvasPlan(replace(WINDOW, weights=GAUSSIAN, jitter=0)),
    "views with zeros": CanvasPlan(replace(WINDOW, edge=ZEROS), published=True),
    "circle": CanvasPlan(replace(WINDOW, wrap=(True, True))),
    "circle and grids": CanvasPlan(replace(WINDOW, wrap=(True, True)), Dilated(2, 0.0)),
    "grids": CanvasPlan(None, Dilated(2, 0.0)),
    "views and grids": CanvasPlan(WINDOW, Dilated(3, 0.0)),
    "exchange by position": CanvasPlan(WINDOW, Dilated(2, 0.0, BY_POSITION)),
    "exchange by channel": CanvasPlan(WINDOW, Dilated(3, 0.0, BY_CHANNEL, group=4)),
}
MIDDLE = NoiseSchedule().moment(timestep=500.0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pointwise(x):
    """Another value at each latent, and none of its neighbours."""
    return (1.7 * x).tanh() - 0.1 * x


def seeing(x):
    """A model that sees its neighbours, with zeros beyond the edge."""
    kernel = random(x.shape[1], x.shape[1], 3, 3, seed=3).to(x) / 6
    return F.conv2d(x, kernel, padding=1).tanh() + 0.2 * x


class Network:
    """An `Evaluate` that notes its calls."""

    def __init__(self, change):
        self.change, self.tiles, self.rows = change, [], []

    def __call__(self, x, tiles):
        self.tiles.append([(tile.kind, tile.index) for tile in tiles])
        self.rows.append(x.shape[0])
        return self.change(x)


def predict(plan, x, change, seeds=(0,), moment=MIDDLE, stage=1):
    images = tuple(range(len(seeds))) * (x.shape[0] // len(seeds))
    return Canvas(plan, tuple(x.shape[-2:]), seeds, stage).predict(x, moment, images, Network(change))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("size", SIZES)
def test_a_model_that_sees_no_neighbours_does_not_notice_the_canvas(name, size):
    x = random(2, 4, *size)
    torch.testing.assert_close(predict(PLANS[name], x, pointwise), pointwise(x), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("shuffle", (BY_POSITION, BY_CHANNEL))
def test_exchanging_latents_is_undone_for_a_pointwise_model_even_of_filtered_latents(shuffle):
    plan, x = CanvasPlan(None, Dilated(4, 0.8, shuffle)), random(1, 4, 32, 32)
    plain = CanvasPlan(None, Dilated(4, 0.8, NO_SHUFFLE))
    torch.testing.assert_close(predict(plan, x, pointwise), predict(plain, x, pointwise))
    assert (predict(plan, x, seeing) - predict(plain, x, seeing)).abs().max() > 0.1


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("change, tolerance", ((pointwise, 0), (seeing, 1e-5)))
def test_views_at_once_do_not_change_the_result(name, change, tolerance):
    x = random(2, 4, 32, 40)
    one, three, many, automatic = (
        predict(replace(PLANS[name], tile_batch=count), x, change) for count in (1, 3, 16, 0)
    )
    for other in (three, many, automatic):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", PLANS)
def test_two_images_together_are_each_alone(name):
    x = random(4, 4, 32, 40)
    both = predict(PLANS[name], x, seeing, seeds=(5, 6))
    for image in (0, 1):
        alone = predict(PLANS[name], x[image::2], seeing, seeds=(5 + image,))
        torch.testing.assert_close(both[image::2], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PLANS)
def test_half_precision_in_gives_half_precision_out_that_is_near(name):
    x = random(1, 4, 32, 24)
    found = predict(PLANS[name], x.half(), pointwise)
    assert found.dtype is torch.float16
    torch.testing.assert_close(found.float(), pointwise(x), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("size", ((16, 16), (12, 16), (9, 7)))
@pytest.mark.parametrize("local", (WINDOW, replace(WINDOW, weights=GAUSSIAN), replace(WINDOW, edge=ZEROS), None))
@pytest.mark.parametrize("dilated", (None, Dilated(1, 0.8, BY_POSITION)))
def test_one_view_that_covers_all_is_the_model_bit_for_bit(size, local, dilated):
    x, network = random(2, 4, *size), Network(seeing)
    canvas = Canvas(CanvasPlan(local, dilated), size, (0,))
    assert torch.equal(canvas.predict(x, MIDDLE, (0, 0), network), seeing(x))
    assert network.tiles == [[(WHOLE, 0)]]


def test_the_grids_predict_for_the_latents_what_the_model_says_of_filtered_ones():
    """eps of the filtered grid, used for the unfiltered latents: D = D(gs) + (xs - gs) without ever computing it."""
    x = random(1, 4, 24, 24)
    plan = CanvasPlan(None, Dilated(2, 0.8))
    width = 0.8 * (0.99 * MIDDLE.cosine + 0.01)
    filtered = gaussian(x, 2, width)
    eps = predict(plan, x, pointwise)
    torch.testing.assert_close(eps, pointwise(filtered), atol=1e-5, rtol=1e-5)
    sigma = 3.0
    denoised_filtered = filtered - sigma * pointwise(filtered)
    torch.testing.assert_close(x - sigma * eps, denoised_filtered + (x - filtered), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("timestep", (999.0, 500.0, 1.0))
def test_views_and_grids_are_mixed_by_the_cosine(timestep):
    moment, x = NoiseSchedule().moment(timestep=timestep), random(1, 4, 32, 32)
    plan = CanvasPlan(WINDOW, Dilated(2, 0.8), cosines=Cosines(dilated=2.0))
    local = predict(replace(plan, dilated=None), x, seeing, moment=moment)
    whole = predict(replace(plan, local=None), x, seeing, moment=moment)
    share = moment.cosine**2
    torch.testing.assert_close(
        predict(plan, x, seeing, moment=moment), (1 - share) * local + share * whole, atol=1e-5, rtol=1e-5
    )


def test_every_view_and_every_grid_is_asked_for_once():
    plan = CanvasPlan(WINDOW, Dilated(2), tile_batch=4)
    network = Network(pointwise)
    Canvas(plan, (32, 32), (0,)).predict(random(2, 4, 32, 32), MIDDLE, (0, 0), network)
    asked = [tile for call in network.tiles for tile in call]
    assert asked == [(LOCAL, index) for index in range(9)] + [(DILATED, index) for index in range(4)]
    assert len(asked) == plan.evaluations((32, 32))
    assert network.rows == [8, 8, 2, 8]


def test_an_interior_far_from_edges_is_the_whole_model():
    """Where views overlap by more than the model sees, a stationary model cannot tell (Gaussian weights hide the rims)."""
    local = Local((16, 16), (4, 4), GAUSSIAN, 0.05, 1e-30)
    x = random(1, 4, 40, 40)
    torch.testing.assert_close(
        predict(CanvasPlan(local), x, seeing)[..., 4:-4, 4:-4], seeing(x)[..., 4:-4, 4:-4], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    "local",
    (WINDOW, replace(WINDOW, edge=ZEROS), replace(WINDOW, wrap=(False, True)), replace(WINDOW, weights=GAUSSIAN)),
)
def test_averaging_predictions_then_an_euler_step_is_averaging_stepped_views(local):
    x, sigma, lower = 5 * random(1, 4, 32, 40), 5.0, 3.5
    plan = CanvasPlan(local)
    predictions_averaged = x + (lower - sigma) * predict(plan, x, seeing)
    stepped_averaged = predict(plan, x, lambda view: view + (lower - sigma) * seeing(view))
    torch.testing.assert_close(predictions_averaged, stepped_averaged, atol=1e-5, rtol=1e-5)


# Draws ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", (1, 2, 4, 9, 16, 64))
def test_bijections_are_undone_by_scatter(count):
    order = draws.bijections(Stream("window interaction"), count, (3, 4, 5), 1)
    x = random(count, 3, 4, 5)
    there = x.gather(0, order)
    assert torch.equal(torch.empty_like(x).scatter_(0, order, there), x)
    assert (count == 1) == torch.equal(there, x)


def test_bijections_are_uniform_and_independent_at_each_place():
    order = draws.bijections(Stream("window interaction"), 3, (100, 100), 0)
    codes = (order * torch.tensor([9, 3, 1]).view(3, 1, 1)).sum(0)
    shares = codes.flatten().bincount()[codes.unique()] / 1e4
    assert len(shares) == 6 and (shares - 1 / 6).abs().max() < 0.015
    same = (codes[:, 1:] == codes[:, :-1]).float().mean()
    assert abs(float(same) - 1 / 6) < 0.015


@pytest.mark.parametrize("name", ("views and grids", "exchange by channel", "views"))
def test_the_same_seeds_draw_the_same_and_others_do_not(name):
    x = random(1, 4, 32, 32)
    first = predict(PLANS[name], x, seeing, seeds=(1,))
    assert torch.equal(first, predict(PLANS[name], x, seeing, seeds=(1,)))
    assert not torch.equal(first, predict(PLANS[name], x, seeing, seeds=(2,)))
    assert not torch.equal(first, predict(PLANS[name], x, seeing, seeds=(1,), stage=2))


def test_views_that_keep_their_places_move_from_stage_to_stage_only():
    local = replace(WINDOW, jitter_once=True, edge=MIRROR)
    canvases = [Canvas(CanvasPlan(local), (64, 64), (0,), stage) for stage in (1, 1, 2)]
    places = [canvas.views(Moment(t, 1.0)) for canvas, t in zip(canvases, (900.0, 100.0, 100.0))]
    assert places[0] == places[1] == canvases[0].views() != places[2]


# Memory ---------------------------------------------------------------------------------------------------------------


class Small:
    """A device that holds `most` rows."""

    def __init__(self, most):
        self.most, self.tried = most, []

    def __call__(self, x, tiles):
        self.tried.append(len(tiles))
        if x.shape[0] > self.most:
            raise torch.OutOfMemoryError("no more")
        return pointwise(x)


@pytest.mark.parametrize("limit, most, tried", (
    (16, 4, [16, 8, 4, 4, 4, 4, 1]),
    (5, 3, [5, 2, 2, 2, 2, 2, 2, 2, 2, 1]),
    (3, 1, [3] + [1] * 17),
))  # fmt: skip
def test_a_batch_that_does_not_fit_is_halved_and_repeated_and_the_number_is_kept(limit, most, tried):
    pieces = [(index, random(1, 4, 8, 8, seed=index)) for index in range(17)]
    network, batches = Small(most), Batches(limit)
    found = list(batches.run(iter(pieces), network))
    assert network.tried == tried
    assert [index for index, _ in found] == list(range(17)) and batches.evaluations == 17
    for (_, output), (_, piece) in zip(found, pieces):
        assert torch.equal(output, pointwise(piece))
    network.tried.clear()
    list(batches.run(iter(pieces), network))
    assert max(network.tried) <= most


def test_a_single_view_that_does_not_fit_says_so():
    with pytest.raises(torch.OutOfMemoryError):
        list(Batches(4).run([(0, random(2, 4, 8, 8))], Small(1)))


@pytest.mark.parametrize("size", ((32, 24), (35, 41)))
@pytest.mark.parametrize("wrap", ((False, True), (True, True), (False, False)))
def test_hints_are_cut_like_the_latents_of_turned_grids(size, wrap):
    plan = CanvasPlan(replace(WINDOW, wrap=wrap, jitter=0), Dilated(2, 0.0))
    x, images, compared = random(2, 3, *size), (0, 1), []
    hint = Hint(x, size, plan)

    def evaluate(rows, tiles):
        for part, tile in zip(rows.chunk(len(tiles)), tiles):
            if tile.kind == DILATED:
                compared.append(tile.turns)
                torch.testing.assert_close(part, hint.crop(tile, images), rtol=0, atol=1e-6)
        return rows

    Canvas(plan, size, (4, 9)).predict(x, MIDDLE, images, evaluate)
    assert len(compared) == 4
    if not any(wrap):
        assert compared == [None] * 4
    else:
        assert compared[0][0] != compared[0][1] and all(turn[0] == 0 or wrap[0] for turn in compared[0])


def test_the_ends_of_grids_lie_elsewhere_at_each_step_where_edges_meet():
    plan = CanvasPlan(replace(WINDOW, wrap=(False, True)), Dilated(2, 0.0))
    x, found = torch.zeros(1, 1, 32, 48), []

    def falling(rows, tiles):
        return torch.linspace(1, 0, rows.shape[-1]).expand(rows.shape) * (tiles[0].kind == DILATED)

    for timestep in range(100, 900, 100):
        moment = NoiseSchedule().moment(timestep=float(timestep))
        row = Canvas(plan, (32, 48), (0,)).predict(x, moment, (0,), falling)[0, 0, 0]
        found.append(int(row.diff().argmax()))  # the step from a grid's last column to its first
    assert len(set(found)) > 4
