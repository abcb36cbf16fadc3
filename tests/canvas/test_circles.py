"""Edges that meet on an axis that one view covers: the view's ends have no fixed place, and nothing else knows of it."""

from dataclasses import replace

import pytest
import torch
from small_models import components
from small_models import model as small_model
from support.engines import Blind
from torch.nn import functional as F

from lib_hires.canvas.accdiffusion import AccDiffusion
from lib_hires.canvas.canvas import DILATED, LOCAL, WHOLE, Canvas, crop_numbers
from lib_hires.canvas.demofusion import DemoFusion
from lib_hires.canvas.hints import Hint
from lib_hires.canvas.masks import kept_words
from lib_hires.canvas.mixture import MixtureOfDiffusers
from lib_hires.canvas.multidiffusion import MultiDiffusion
from lib_hires.config import Common
from lib_hires.engines.standalone import Job
from lib_hires.plan.tiling import CanvasPlan, Dilated, Local
from lib_hires.randomness import Stream
from lib_hires.schedule import NoiseSchedule

LEVELS = [NoiseSchedule().moment(timestep=float(t)) for t in range(20, 1000, 20)]
MIDDLE = LEVELS[len(LEVELS) // 2]
LOCAL_VIEWS = Local((16, 16), (8, 8))
BOTH = replace(LOCAL_VIEWS, wrap=(True, True))
NATIVE = small_model(16)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeing(x):
    """A model that sees its neighbours, with zeros beyond the edge."""
    kernel = random(x.shape[1], x.shape[1], 3, 3, seed=3).to(x) / 6
    return F.conv2d(x, kernel, padding=1).tanh() + 0.2 * x


def sloping(axis):
    """A model whose answer falls from 1 at the beginning of its input to 0 at the end, along an axis (0: down)."""

    def change(x, tiles):
        ramp = torch.linspace(1, 0, x.shape[axis - 2])
        return (ramp[:, None] if axis == 0 else ramp).expand(x.shape).clone()

    return change


def predict(canvas, x, moment=MIDDLE, change=seeing):
    images = tuple(range(len(canvas.seeds))) * (x.shape[0] // len(canvas.seeds))
    return canvas.predict(x, moment, images, lambda rows, tiles: change(rows))


def asked_of(canvas, x, moment=MIDDLE):
    """The tiles of one call."""
    asked = []
    images = tuple(range(len(canvas.seeds)))
    canvas.predict(x, moment, images, lambda rows, tiles: asked.extend(tiles) or rows)
    return asked


METHODS = {"multidiffusion": MultiDiffusion, "mixture": MixtureOfDiffusers, "demofusion": DemoFusion}


@pytest.mark.parametrize("size", ((16, 16), (16, 40), (40, 16), (9, 40)))
@pytest.mark.parametrize("wrapped", ("wrap_y", "wrap_x"))
@pytest.mark.parametrize("name", METHODS)
def test_over_many_noise_levels_the_ends_of_a_view_lie_at_many_places_of_a_wrapped_axis_and_only_there(
    name, wrapped, size
):
    """A model that knows where it is in its input: its answers' jumps are seams."""
    axis = 0 if wrapped == "wrap_y" else 1
    stage = METHODS[name](**{wrapped: True}, overlap=0.5, jitter=0).stages(NATIVE, size, Common(), started=True)[-1]
    canvas = Canvas(replace(stage.canvas, dilated=None), size, (5,))
    for along in (0, 1):
        if size[along] > 16:
            continue
        found = [canvas.predict(torch.zeros(1, 4, *size), moment, (0,), sloping(along)) for moment in LEVELS]
        lines = torch.stack([each.mean((0, 1, 3 - along)) for each in found])
        places = (lines - lines.roll(1, -1)).argmax(-1)  # where a line begins anew
        mean = lines.mean(0)
        if along == axis:
            assert len(places.unique()) > size[along] / 2
            assert (mean - mean.roll(1)).abs().max() < 0.3
        else:
            assert places.unique().tolist() == [0] and mean[0] - mean[-1] > 0.9


@pytest.mark.parametrize("dilated", (None, Dilated(2, 0.8)))
@pytest.mark.parametrize(
    "size, wrap, shift",
    (
        ((16, 16), (True, True), (5, 11)),
        ((16, 16), (False, True), (0, 7)),
        ((16, 40), (True, False), (3, 0)),
        ((40, 12), (True, True), (0, 5)),
    ),
)
def test_the_prediction_of_a_turned_circle_is_the_prediction_turned(size, wrap, shift, dilated):
    """Where the draws turn along: the network then sees the very same inputs."""
    drawn, x = Stream("canvas turn"), random(4, 4, *size)
    lengths, more = dict(zip(("down", "across"), size)), dict(zip(("down", "across"), shift))

    def turning(seed, stage, key, axis):
        return (drawn.integer(lengths[axis], seed, stage, key, axis) + more[axis]) % lengths[axis]

    plan = CanvasPlan(replace(LOCAL_VIEWS, wrap=wrap, jitter=2), dilated)
    plain = predict(Canvas(plan, size, (1, 2)), x)
    rolled = predict(Canvas(plan, size, (1, 2), records={"canvas turn": turning}), x.roll(shift, (-2, -1)))
    torch.testing.assert_close(rolled.roll([-each for each in shift], (-2, -1)), plain, rtol=0, atol=1e-5)
    unmoved = predict(Canvas(plan, size, (1, 2)), x.roll(shift, (-2, -1))).roll([-each for each in shift], (-2, -1))
    assert (unmoved - plain).abs().max() > 1e-2


@pytest.mark.parametrize("size", ((16, 16), (16, 40), (8, 40)))
def test_a_network_that_sees_no_neighbours_does_not_notice_turns(size):
    x = random(2, 4, *size)
    found = predict(Canvas(CanvasPlan(BOTH), size, (3, 4)), x, change=torch.tanh)
    torch.testing.assert_close(found, x.tanh(), rtol=0, atol=2e-6)


def test_a_circle_is_not_covered_at_once_and_each_image_is_turned_by_itself():
    x = random(2, 4, 16, 16)
    canvas = Canvas(CanvasPlan(BOTH), (16, 16), (3, 4))
    (tile,) = asked_of(canvas, x)
    assert not canvas.covers_at_once and tile.kind == LOCAL
    assert tile.turns[0] != tile.turns[1] and tile.places == ((0, 0), (0, 0))
    for image in (0, 1):
        alone = Canvas(CanvasPlan(BOTH), (16, 16), (3 + image,))
        torch.testing.assert_close(predict(canvas, x)[image : image + 1], predict(alone, x[image : image + 1]))


@pytest.mark.parametrize("wrap, size", (((False, False), (16, 16)), ((False, True), (16, 40)), ((True, False), (40, 16))))
def test_nothing_is_turned_where_no_view_covers_a_circle(wrap, size):
    canvas = Canvas(CanvasPlan(replace(LOCAL_VIEWS, wrap=wrap)), size, (3,))
    assert all(tile.turns is None for tile in asked_of(canvas, random(1, 4, *size)))
    assert canvas.covers_at_once == (not any(wrap))
    if not any(wrap):
        assert asked_of(canvas, random(1, 4, *size))[0].kind == WHOLE


def test_views_that_keep_their_places_for_a_stage_turn_all_the_same_and_keep_their_words():
    local = replace(LOCAL_VIEWS, wrap=(True, False), jitter=4, jitter_unit=4, jitter_once=True)
    canvas, x = Canvas(CanvasPlan(local), (16, 48), (3,)), random(1, 4, 16, 48)
    early, late = asked_of(canvas, x, LEVELS[3]), asked_of(canvas, x, LEVELS[30])
    assert [tile.index for tile in early] == [tile.index for tile in late] == list(range(5))
    assert [tile.places for tile in early] == [tile.places for tile in late] == [v.places for v in canvas.views()]
    assert early[0].turns != late[0].turns and early[0].turns[0][1] == 0
    masks = torch.rand(6, 4, 12, generator=torch.Generator().manual_seed(1)) > 0.5
    for tile in early:
        (top, left), (down, _) = tile.places[0], tile.turns[0]
        kept = [kept_words(masks, [(start, left, 16, 16)], (16, 48), 0.5, local.wrap) for start in (top, down)]
        assert kept[0] == kept[1]


@pytest.mark.parametrize("wrap", ((True, True), (False, True), (True, False)))
@pytest.mark.parametrize("size", ((16, 16), (16, 40), (40, 16)))
def test_hints_are_cut_like_the_latents_of_turned_views(size, wrap):
    plan = CanvasPlan(replace(LOCAL_VIEWS, wrap=wrap, jitter=2), Dilated(2, 0.0))
    x, images, compared = random(2, 3, *size), (0, 1), []
    hint = Hint(x, size, plan)

    def evaluate(rows, tiles):
        for part, tile in zip(rows.chunk(len(tiles)), tiles):
            compared.append(tile.kind)
            torch.testing.assert_close(part, hint.crop(tile, images), rtol=0, atol=1e-6)
        return rows

    Canvas(plan, size, (4, 9)).predict(x, MIDDLE, images, evaluate)
    assert set(compared) == {LOCAL, DILATED}


def test_a_view_that_is_turned_is_told_to_be_no_crop_along_its_circle():
    plan = CanvasPlan(BOTH)
    for tile in asked_of(Canvas(plan, (16, 40), (3,)), random(1, 4, 16, 40)):
        ((top, left),) = crop_numbers(plan, tile, [0])
        assert top == 0 and left == 8 * tile.places[0][1] and tile.turns[0][0] != 0


# Stages -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ((16, 16), (32, 32), (24, 48)))
@pytest.mark.parametrize("wrapped, axes", (("wrap_x", (False, True)), ("wrap_y", (True, False))))
@pytest.mark.parametrize("method", (DemoFusion, AccDiffusion))
def test_the_first_stage_is_one_view_on_the_same_circle_unless_words_are_looked_for_in_it(method, wrapped, axes, size):
    first, *later = method(**{wrapped: True}).stages(NATIVE, size, Common())
    assert all(stage.wrap == axes for stage in later)
    if method is AccDiffusion and later:
        assert first.canvas is None
        first, *_ = method(**{wrapped: True}, word_share=0.0).stages(NATIVE, size, Common())
    assert first.wrap == first.canvas.local.circles(first.size) == axes and first.inputs() == [(first.size, 1)]
    assert method().stages(NATIVE, size, Common())[0].canvas is None


def test_a_first_stage_that_is_larger_than_a_view_is_still_one_view():
    first, *_ = DemoFusion(wrap_x=True).stages(NATIVE, (36, 36), Common())
    assert first.size == (18, 18) and first.inputs() == [((18, 18), 1)]


@pytest.mark.parametrize("method", (DemoFusion, AccDiffusion, MultiDiffusion), ids=lambda cls: cls.name)
def test_pictures_are_drawn_on_circles_that_a_view_covers(method):
    size = (16, 32)
    stages = method(wrap_x=True, wrap_y=True, overlap=0.5).stages(NATIVE, size, Common())
    job = Job("a red star", width=8 * size[1], height=8 * size[0], steps=3, cfg=3.0, seed=2)
    states = []
    result = Blind(components()).generate(
        job, stages=stages, on_latents=lambda stage, call, x: states.append((stage, call))
    )
    assert torch.isfinite(result.latents).all() and len(states) >= 3
