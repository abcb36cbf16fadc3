"""What HiDiffusion and Deep Shrink plan: the published regimes and clocks, and the combinations that are refused."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.structures import REFINER, SD1, SDXL

from lib_hires import DeepShrink, HiDiffusion
from lib_hires.config import Common, Conflict, SettingError
from lib_hires.config.common import NOISE_LEVEL, STEP_FRACTION
from lib_hires.plan.method import UNetPlan
from lib_hires.plan.models import read_model
from lib_hires.plan.route import Dilate, Pool
from lib_hires.schedule import Level
from lib_hires.unet.session import combine

INPAINTING = replace(SDXL, in_channels=9)
CLOCKS = (NOISE_LEVEL, STEP_FRACTION)


def model_of(structure, family="auto", native=0):
    return read_model(structure, Common(family=family, native_size=native))


def steps_on(plan, steps, structure=None):
    """{operation: steps during which its gate is open}, on DDIM's timesteps."""
    levels = [Level(1 - ((steps - 1 - i) * (1000 // steps) + 1) / 999, i, steps) for i in range(steps)]
    return {
        (type(edit).__name__, edit.step): [level.step for level in levels if edit.gate.is_open(level)]
        for edit in plan.edits
    }


# HiDiffusion ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize(
    ("structure", "family", "latent", "steps", "wanted"),
    [
        (SDXL, "auto", 256, 50, {("Dilate", 6): range(8), ("Pool", 4): range(8, 20)}),
        (SDXL, "auto", 512, 50, {("Dilate", 6): range(15), ("Pool", 4): range(35)}),
        (SD1, "auto", 128, 50, {("Dilate", 3): range(20)}),
        (SD1, "auto", 256, 50, {("Dilate", 3): range(35), ("Pool", 4): range(15)}),
        (SDXL, "sdxl_turbo", 128, 4, {("Pool", 4): range(2)}),
        (INPAINTING, "auto", 256, 50, {("Pool", 4): range(20)}),
        (INPAINTING, "auto", 512, 50, {("Dilate", 6): range(15), ("Pool", 4): range(35)}),
    ],
)
def test_the_published_clocks_hold_for_every_family_and_size(structure, family, latent, steps, wanted, clock):
    common = Common(family=family, clock=clock)
    plan = HiDiffusion().plan(read_model(structure, common), (latent, latent), common)
    assert steps_on(plan, steps) == {name: list(open_at) for name, open_at in wanted.items()}


def test_a_plan_does_not_depend_on_the_runs_before_it():
    model, common = model_of(SDXL), Common()
    first = HiDiffusion().plan(model, (256, 256), common)
    large = HiDiffusion().plan(model, (512, 512), common)
    assert HiDiffusion().plan(model, (256, 256), common) == first != large
    assert HiDiffusion().plan(model, (512, 512), common) == large


@pytest.mark.parametrize("native", [256, 512, 768, 1024])
@pytest.mark.parametrize("structure", [SD1, SDXL], ids=["sd1", "sdxl"])
def test_the_second_regime_begins_at_four_times_native_on_both_sides(structure, native):
    model, four = model_of(structure, native=native), native // 2
    ends = {
        size: max(edit.gate.end for edit in HiDiffusion().plan(model, size, Common()).edits)
        for size in ((four, four), (four - 1, four), (four, four - 1), (four, 4 * four), (four - 1, 4 * four))
    }
    assert [ends[size] for size in ends] == [0.7, 0.4, 0.4, 0.7, 0.4]


@pytest.mark.parametrize("native", [256, 512, 1024])
def test_raunet_stays_off_below_its_minimum_scale_and_says_so(native):
    model = model_of(SD1, native=native)
    latent = native // 8
    plan = HiDiffusion().plan(model, (latent, latent), Common())
    assert plan.edits == () and plan.windows is not None
    assert plan.notes == (
        f"RAU-Net is off: {native}x{native} is 1.00 times the native size {native}, below 'min_scale' 1.25.",
    )
    assert HiDiffusion(min_scale=1.0).plan(model, (latent, latent), Common()).edits
    assert HiDiffusion().plan(model, (2 * latent, latent), Common()).edits  # 1.41 by area


@given(st.floats(1.0, 8.0), st.integers(8, 256), st.integers(8, 256))
def test_the_minimum_scale_is_where_the_shrink_begins(min_scale, height, width):
    model = model_of(SD1)
    plan = HiDiffusion(min_scale=min_scale).plan(model, (height, width), Common())
    assert bool(plan.edits) == (model.scale(height, width) >= min_scale)


@given(st.floats(0.25, 2.0))
def test_strength_lengthens_every_published_time_and_never_beyond_the_run(strength):
    for structure, latent in ((SD1, 256), (SDXL, 256), (SDXL, 512)):
        plain = HiDiffusion().plan(model_of(structure), (latent, latent), Common()).edits
        strong = HiDiffusion(strength=strength).plan(model_of(structure), (latent, latent), Common()).edits
        assert [edit.gate.end for edit in strong] == [min(1.0, strength * edit.gate.end) for edit in plain]


def test_a_chosen_time_is_taken_as_it_is_whatever_the_strength():
    edits = HiDiffusion(t1=0.25, t2=0.1, strength=2).plan(model_of(SD1), (128, 128), Common()).edits
    assert [(type(edit), edit.step, edit.gate.end) for edit in edits] == [(Dilate, 3, 0.25), (Pool, 4, 0.1)]


@pytest.mark.parametrize(
    ("aggressive", "structure", "latent", "first"),
    [("on", INPAINTING, 256, True), ("off", SDXL, 256, False), ("on", SDXL, 512, True), ("auto", SDXL, 512, False)],
)
def test_aggressive_can_be_forced_either_way(aggressive, structure, latent, first):
    edits = HiDiffusion(aggressive=aggressive).plan(model_of(structure), (latent, latent), Common()).edits
    ends = {type(edit): (edit.gate.start, edit.gate.end) for edit in edits}
    if first:
        assert ends[Dilate] == (0.0, 0.16) and ends[Pool][0] == 0.16
    else:
        assert ends[Pool][0] == 0.0


@given(
    steps=st.integers(1, 100),
    t1=st.floats(0, 1),
    end=st.floats(0, 1),
    strength=st.floats(0.25, 2),
    clock=st.sampled_from(CLOCKS),
)
def test_the_aggressive_stage_and_the_pool_never_act_together(steps, t1, end, strength, clock):
    common = Common(clock=clock)
    method = HiDiffusion(t1=t1, aggressive_end=end, strength=strength)
    found = steps_on(method.plan(model_of(SDXL), (256, 256), common), steps)
    assert not {*found.get(("Dilate", 6), ())} & {*found.get(("Pool", 4), ())}


@pytest.mark.parametrize(
    ("structure", "family", "level"),
    [(SD1, "auto", 0), (SDXL, "auto", 1), (SDXL, "sdxl_turbo", 1), (REFINER, "auto", 1)],
)
def test_windows_are_at_the_highest_level_that_attends(structure, family, level):
    windows = HiDiffusion().plan(model_of(structure, family), (128, 128), Common()).windows
    assert windows.level == level and windows.shifted
    assert windows.gate.is_open(Level(0.0)) and windows.gate.is_open(Level(1.0))


def test_the_parts_are_switched_apart():
    model = model_of(SD1)
    only_windows = HiDiffusion(raunet=False).plan(model, (128, 128), Common())
    only_raunet = HiDiffusion(window_attention=False).plan(model, (128, 128), Common())
    assert only_windows.edits == () and only_windows.windows and only_windows.notes == ()
    assert only_raunet.edits and only_raunet.windows is None


def test_windows_follow_their_own_start_end_and_shift():
    windows = (
        HiDiffusion(window_start=0.2, window_end=0.8, window_shift=False)
        .plan(model_of(SD1), (64, 64), Common())
        .windows
    )
    assert [windows.gate.is_open(Level(p)) for p in (0.19, 0.2, 0.79, 0.8)] == [False, True, True, False]
    assert not windows.shifted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"raunet": False, "window_attention": False},
            "'raunet' is False, must be true where 'window_attention' is false",
        ),
        (
            {"window_start": 0.6, "window_end": 0.5},
            "'window_start' is 0.6, must be below 'window_end', which is 0.5. Lower it.",
        ),
        (
            {"window_start": 1, "window_end": 1},
            "'window_start' is 1.0, must be below 'window_end', which is 1. Lower it.",
        ),
        ({"t1": 1.2}, "'t1' is 1.2, must be between 0 and 1, or -1 for automatic. Lower it."),
        ({"min_scale": 0.5}, "'min_scale' is 0.5, must be between 1 and 8. Raise it."),
        ({"aggressive": "of"}, "'aggressive' is 'of', must be one of 'auto', 'on', 'off'. Did you mean 'off'?"),
    ],
)
def test_hidiffusion_settings_that_do_not_fit_are_refused(values, message):
    with pytest.raises(SettingError) as caught:
        HiDiffusion(**values)
    assert str(caught.value).startswith("Hires Lab: " + message)


def test_windows_that_are_off_may_start_anywhere():
    assert HiDiffusion(window_attention=False, window_start=1, window_end=0).raunet


# Deep Shrink ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clock", CLOCKS)
def test_the_two_stages_follow_each_other_as_published(clock):
    common = Common(clock=clock)
    plan = DeepShrink().plan(read_model(SD1, common), (128, 128), common)
    levels = [Level(i / 20, i, 20) for i in range(20)]
    found = [
        [(edit.step + 1, round(edit.factor(level), 3)) for edit in plan.edits if edit.gate.is_open(level)]
        for level in levels
    ]
    assert found == [[(3, 0.5)], [(3, 0.667)], [(3, 0.833)], [(4, 0.75)], [(4, 0.833)], [(4, 0.917)]] + [[]] * 14


@pytest.mark.parametrize("steps", [7, 10, 15, 20, 25, 30, 33, 50])
def test_the_step_fraction_counts_as_the_published_extension_does(steps):
    common = Common(clock=STEP_FRACTION)
    plan = DeepShrink().plan(read_model(SD1, common), (128, 128), common)
    found = [
        next((edit.step + 1 for edit in plan.edits if edit.gate.is_open(Level(0, n, steps))), None)
        for n in range(steps)
    ]
    assert found == [3 if n < steps * 0.15 else 4 if n < steps * 0.3 else None for n in range(steps)]


def test_a_stage_of_no_length_is_left_out():
    plan = DeepShrink(stop1=0.3, stop2=0.3).plan(model_of(SD1), (128, 128), Common())
    assert [edit.step for edit in plan.edits] == [2]
    assert DeepShrink(stop1=0, stop2=0).plan(model_of(SD1), (128, 128), Common()).does_nothing


@given(st.floats(0.25, 2), st.floats(0, 1), st.floats(0, 1))
def test_strength_moves_both_stops_and_never_beyond_the_run(strength, first, second):
    stop1, stop2 = sorted((first, second))
    plan = DeepShrink(strength=strength, stop1=stop1, stop2=stop2).plan(model_of(SD1), (128, 128), Common())
    ends = [(edit.gate.start, edit.gate.end) for edit in plan.edits]
    wanted = [(0.0, min(1.0, stop1 * strength)), (min(1.0, stop1 * strength), min(1.0, stop2 * strength))]
    assert ends == [pair for pair in wanted if pair[1] > pair[0]]


@pytest.mark.parametrize(("structure", "deepest"), [(SD1, 12), (SDXL, 9)])
@pytest.mark.parametrize("name", ["depth1", "depth2"])
def test_every_depth_of_the_network_is_allowed_and_none_beyond(structure, deepest, name):
    model = model_of(structure)
    for depth in range(1, deepest + 1):
        assert depth - 1 in [edit.step for edit in DeepShrink(**{name: depth}).plan(model, (128, 256), Common()).edits]
    if deepest < 12:
        with pytest.raises(SettingError, match=f"'{name}' is 10, must be between 1 and 9 for SDXL. Lower it."):
            DeepShrink(**{name: 10}).plan(model, (128, 128), Common())


def test_deep_shrink_stays_off_below_its_minimum_scale_and_says_so():
    plan = DeepShrink(window_attention=True).plan(model_of(SDXL), (128, 128), Common())
    assert plan.edits == () and plan.windows.level == 1
    assert plan.notes == ("Deep Shrink is off: 1024x1024 is 1.00 times the native size 1024, below 'min_scale' 1.25.",)


def test_stage_two_cannot_end_before_stage_one():
    with pytest.raises(
        SettingError, match=r"'stop1' is 0.5, must be at most 'stop2', which is 0.3. Lower it, or raise 'stop2'"
    ):
        DeepShrink(stop1=0.5)


def test_the_options_of_a_shrink_reach_it():
    method = DeepShrink(downscale=0.4, upscale=2.5, scaler="nearest", smooth_scaling=False, early_out=True, depth1=5)
    edit = method.plan(model_of(SD1), (128, 128), Common()).edits[0]
    assert (edit.step, edit.down, edit.up, edit.mode, edit.smooth, edit.early) == (4, 0.4, 2.5, "nearest", False, True)
    assert DeepShrink().plan(model_of(SD1), (128, 128), Common()).edits[0].up is None


# Together -------------------------------------------------------------------------------------------------------------


def plans(*methods, size=(128, 128)):
    return combine(method.plan(model_of(SD1), size, Common()) for method in methods)


def test_two_methods_that_shrink_are_refused():
    with pytest.raises(
        Conflict, match=r"RAU-Net and Deep Shrink both shrink the feature map; only one can. Switch 'raunet' off"
    ):
        plans(HiDiffusion(), DeepShrink())


def test_two_window_attentions_are_refused():
    with pytest.raises(Conflict, match=r"window attention is asked for twice. Switch 'window_attention' off in one"):
        plans(HiDiffusion(raunet=False), DeepShrink(window_attention=True))


def test_deep_shrink_and_windows_are_one_plan():
    plan = plans(HiDiffusion(raunet=False), DeepShrink())
    assert len(plan.edits) == 2 and plan.windows.level == 0


def test_no_method_is_a_plan_that_does_nothing():
    assert combine([]) == UNetPlan() and UNetPlan().does_nothing
    assert not plans(HiDiffusion()).does_nothing
