"""Routes: the published sizes, and the closing of every size by the skips alone."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.structures import REFINER, SD1, SDXL

from lib_hires.config import Common
from lib_hires.methods import find_method
from lib_hires.plan.models import read_model
from lib_hires.plan.route import Dilate, Pool, Shrink, find_route, sizes_in_words
from lib_hires.plan.structure import DOWN
from lib_hires.schedule import Gate, Level

OPEN, START = Gate(1.0), Level(0.0)
HiDiffusion = find_method("hidiffusion")
MODES = ("bicubic", "bilinear", "nearest", "nearest-exact")
lengths = st.integers(8, 300)
sizes = st.tuples(lengths, lengths)


def deep_sizes(route):
    """The distinct heights on the way down, in order."""
    heights = [route.size[0], *(way.out[0] for way in route.encoder)]
    return [height for height, _ in itertools.groupby(heights)]


def follow(structure, route):
    """Walk through a UNet by a route's instructions only; the size at the end. Fails where two maps do not match.

    Knows what the network does: a stride halves rounding up, an up-sampler doubles unless it is told a size.
    """
    size, skips = route.size, []
    for step, way in zip(structure.encoder, route.encoder, strict=True):
        size = way.enter.size if way.enter else size
        if step.kind == DOWN:
            size = tuple(-(-n // (4 if way.dilated else 2)) for n in size)
        else:
            assert not way.dilated
        size = tuple(-(-n // 2) for n in size) if way.pooled else size
        assert size == way.out
        skips.append(size)
    assert route.middle == size
    for step, way in zip(structure.decoder, route.decoder, strict=True):
        assert skips.pop() == size, "the concatenation's maps differ"
        size = way.enter.size if way.enter else size
        size = way.leave.size if way.leave else size
        if step.upsamples:
            size = way.upsample or tuple(2 * n for n in size)
        else:
            assert way.upsample is None
        assert size == way.out
    assert not skips
    return size


# The published sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "latent", "fraction", "sizes"),
    [
        ("sd1", 128, 0.0, [128, 32, 16, 8]),
        ("sd1", 128, 0.39, [128, 32, 16, 8]),
        ("sd1", 128, 0.41, None),
        ("sd1", 256, 0.0, [256, 64, 32, 16, 8]),
        ("sd1", 256, 0.31, [256, 64, 32, 16]),
        ("sd1", 256, 0.71, None),
        ("sdxl", 256, 0.0, [256, 128, 32]),
        ("sdxl", 256, 0.17, [256, 128, 64, 32]),
        ("sdxl", 256, 0.41, None),
        ("sdxl", 512, 0.0, [512, 256, 128, 32]),
        ("sdxl", 512, 0.31, [512, 256, 128, 64]),
        ("sdxl", 512, 0.71, None),
        ("sdxl_turbo", 128, 0.0, [128, 64, 32, 16]),
        ("sdxl_turbo", 128, 0.49, [128, 64, 32, 16]),
        ("sdxl_turbo", 128, 0.51, None),
    ],
)
def test_the_map_has_the_published_sizes(family, latent, fraction, sizes):
    common = Common(family=family)
    model = read_model(SD1 if family == "sd1" else SDXL, common)
    plan = HiDiffusion().plan(model, (latent, latent), common)
    route = find_route(model.structure, (latent, latent), plan.edits, Level(fraction))
    assert (route and deep_sizes(route)) == sizes


def test_the_way_down_in_words_names_each_operation():
    edits = (Dilate(OPEN, 3), Pool(OPEN, 4))
    route = find_route(SD1, (256, 128), edits, START)
    assert sizes_in_words(route) == "128x256 -s4-> 32x64 -pool-> 16x32 -> 8x16 -> 4x8"
    assert route.words == "stride 4 at 3, pool at 4"


def test_no_open_gate_is_no_route():
    assert find_route(SD1, (64, 64), (), START) is None
    assert find_route(SD1, (64, 64), (Dilate(Gate(0.4), 3), Pool(Gate(0.0), 4)), Level(0.4)) is None


# Closing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [SD1, SDXL, REFINER], ids=["sd1", "sdxl", "refiner"])
def test_every_size_closes_with_stride_4_with_pooling_and_with_both(structure):
    dilate, pool = Dilate(OPEN, structure.downsampler(0)), Pool(OPEN, structure.first_pair(1))
    deep = Dilate(OPEN, structure.downsampler(1))
    for height, edits in itertools.product(range(8, 301), ((dilate,), (pool,), (dilate, pool), (deep,), (deep, pool))):
        size = (height, 96 + height % 65)
        assert follow(structure, find_route(structure, size, edits, START)) == size


@pytest.mark.parametrize("structure", [SD1, SDXL], ids=["sd1", "sdxl"])
@given(size=sizes, data=st.data())
def test_any_size_closes_with_a_stride_and_a_pool_at_any_place(structure, size, data):
    downs = [i for i, step in enumerate(structure.encoder) if step.kind == DOWN]
    others = [i for i in range(len(structure.encoder)) if i not in downs]
    edits = (Dilate(OPEN, data.draw(st.sampled_from(downs))), Pool(OPEN, data.draw(st.sampled_from(others))))
    assert follow(structure, find_route(structure, size, edits, START)) == size


@pytest.mark.parametrize("structure", [SD1, SDXL], ids=["sd1", "sdxl"])
@given(
    data=st.data(),
    size=sizes,
    down=st.floats(0.1, 1),
    up=st.none() | st.floats(1, 4),
    mode=st.sampled_from(MODES),
    smooth=st.booleans(),
    early=st.booleans(),
    progress=st.floats(0, 0.99),
)
def test_any_size_closes_with_deep_shrink_at_every_depth_and_option(
    structure, data, size, down, up, mode, smooth, early, progress
):
    step = data.draw(st.integers(0, len(structure.encoder) - 1))
    route = find_route(structure, size, (Shrink(OPEN, step, down, up, mode, smooth, early),), Level(progress))
    assert follow(structure, route) == size


@given(size=sizes, step=st.integers(0, 11), down=st.floats(0.1, 0.9))
def test_a_shrink_leaves_the_skips_above_it_alone_and_enlarges_to_exactly_the_size_before(size, step, down):
    route = find_route(SD1, size, (Shrink(OPEN, step, down),), START)
    plain = plain_sizes(SD1, size)
    assert [way.out for way in route.encoder[:step]] == plain[:step]
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip([way.out for way in route.encoder[step:]], plain[step:]))
    mirrored = route.decoder[11 - step]
    assert (mirrored.enter.size if mirrored.enter else route.encoder[step].out) == plain[step]
    assert all(way.leave is None for way in route.decoder[11 - step :])


@given(size=sizes, step=st.integers(0, 11))
def test_a_shrink_to_the_same_size_resizes_nothing(size, step):
    route = find_route(SD1, size, (Shrink(OPEN, step, 1.0),), START)
    assert [way.enter for way in (*route.encoder, *route.decoder)] == [None] * 24
    assert [way.leave for way in route.decoder] == [None] * 12


@given(size=st.tuples(st.integers(1, 75), st.integers(1, 75)), step=st.integers(0, 11))
def test_exact_enlargement_equals_the_factor_two_where_sizes_divide(size, step):
    size = tuple(16 * n for n in size)
    exact, factor = (find_route(SD1, size, (Shrink(OPEN, step, 0.5, up),), START) for up in (None, 2.0))
    assert exact == factor


@given(size=sizes)
def test_pooling_makes_its_own_skip_small_and_leaves_the_one_above_full(size):
    route = find_route(SD1, size, (Pool(OPEN, 4),), START)
    plain = plain_sizes(SD1, size)
    assert route.encoder[3].out == plain[3]
    assert route.encoder[4].out == tuple(-(-n // 2) for n in plain[4])
    assert route.decoder[7].leave.size == plain[3] and route.decoder[7].leave.mode == "bicubic"
    assert [way.leave for index, way in enumerate(route.decoder) if index != 7] == [None] * 11


def test_a_map_of_one_pixel_is_not_shrunk_away():
    route = find_route(SD1, (8, 8), (Shrink(OPEN, 11, 0.1),), START)
    assert route.middle == (1, 1)


def plain_sizes(structure, size):
    """The skips' sizes without any edit."""
    result = []
    for step in structure.encoder:
        size = tuple(-(-n // 2) for n in size) if step.kind == DOWN else size
        result.append(size)
    return result


# Deep Shrink's factors ------------------------------------------------------------------------------------------------


def test_the_smooth_factor_of_twenty_steps_is_the_published_one():
    early, late = Shrink(Gate(0.15), 2, 0.5, smooth=True), Shrink(Gate(0.30, 0.15), 3, 0.5, smooth=True)
    found = []
    for step in range(20):
        level = Level(step / 20)
        active = [edit for edit in (early, late) if edit.gate.is_open(level)]
        assert len(active) <= 1
        found.append((active[0].step + 1, round(active[0].factor(level), 3)) if active else None)
    assert found == [(3, 0.5), (3, 0.667), (3, 0.833), (4, 0.75), (4, 0.833), (4, 0.917)] + [None] * 14


@given(st.floats(0, 1), st.floats(0.1, 1))
def test_a_fade_rises_from_its_factor_to_one_and_an_abrupt_shrink_stays(progress, down):
    fading, abrupt = Shrink(Gate(0.5), 2, down, smooth=True), Shrink(Gate(0.5), 2, down)
    assert fading.factor(Level(0.0)) == down and fading.factor(Level(0.5)) == pytest.approx(1)
    assert down <= fading.factor(Level(progress)) <= 1 + 1e-12
    assert abrupt.factor(Level(progress)) == down


@given(size=sizes, progress=st.floats(0, 0.49), down=st.floats(0.25, 0.9))
def test_a_chosen_enlargement_follows_the_fade_so_that_both_cancel(size, progress, down):
    shrink = Shrink(Gate(0.5), 3, down, 1 / down, smooth=True)
    route = find_route(SD1, size, (shrink,), Level(progress))
    mirrored = route.decoder[8]
    reached = mirrored.enter.size if mirrored.enter else route.encoder[3].out
    allowed = 3 / shrink.factor(Level(progress))  # two floors and one rounding
    assert all(abs(a - b) <= allowed for a, b in zip(reached, plain_sizes(SD1, size)[3]))
