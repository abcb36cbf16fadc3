"""Stages: their sizes and scales, what is handed from one to the next, the skip residual, and what each of them costs."""

import itertools
import math
import random as python_random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import structures

from lib_hires.canvas.accdiffusion import AccDiffusion, AccDiffusionV2
from lib_hires.canvas.demofusion import DemoFusion
from lib_hires.config import Common
from lib_hires.config.errors import SettingError
from lib_hires.plan.models import FAMILIES, Model
from lib_hires.plan.tiling import MEAN, MEAN_AND_STD, NOTHING, CanvasPlan, Cosines, Stage, is_too_large, stage_scales
from lib_hires.schedule import Moment, NoiseSchedule
from lib_hires.stages.handoff import enlarge
from lib_hires.stages.progressive import Progressive, StageRun

SDXL, SD1 = (Model(structures.SDXL, FAMILIES["sdxl"], 1024), Model(structures.SD1, FAMILIES["sd1"], 512))
MODELS = {"sdxl": SDXL, "sd1": SD1}
lengths = st.integers(8, 640)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stages(method, model, size, **options):
    return method.stages(model, size, Common(), **options)


# Plans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_step", (1.2, 1.5, 2.0, 4.0))
@given(lengths, lengths)
def test_stages_reach_exactly_the_size_asked_for_in_steps_within_the_limit(name, max_step, height, width):
    plan = stages(DemoFusion(max_step=max_step), MODELS[name], (height, width))
    assert plan[-1].size == (height, width)
    assert (plan[0].canvas is None or is_too_large(plan[0].size, MODELS[name].native // 8)) and plan[0].scale == 1
    scales = [stage.scale for stage in plan]
    assert all(1 < b / a <= max_step * (1 + 1e-6) for a, b in itertools.pairwise(scales))
    assert all(stage.canvas for stage in plan[1:])
    for before, after in itertools.pairwise(plan):
        assert all(b >= a for a, b in zip(before.size, after.size)) or min(height, width) % 8
        for a, b in zip(before.size, after.size):
            assert b <= a * max_step + 8


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
@given(lengths, lengths)
def test_the_first_stage_is_about_native_and_fits_the_network(model, height, width):
    plan = stages(DemoFusion(), model, (height, width))
    native = model.native // 8
    if len(plan) == 1:
        return
    for length, whole in zip(plan[0].size, (height, width)):  # a multiple of 8 unless that is far too much
        exact = whole / plan[-1].scale
        assert exact - 1e-6 <= length <= max(1.08 * exact, exact + 1)
        assert length % 8 == 0 or -(-exact // 8) * 8 > 1.08 * exact
    longest, shortest = max(plan[0].size), min(plan[0].size)
    assert longest <= native * math.sqrt(1.5) + 8 or shortest <= native / 2 * math.sqrt(1.5) + 8


@given(st.floats(1.05, 12), st.floats(1.2, 4))
def test_scales_go_up_to_the_last_in_as_few_steps_as_the_limit_allows(ratio, max_step):
    scales = stage_scales(ratio, max_step)
    assert scales[-1] == ratio
    assert all(1 < b / a <= max_step * (1 + 1e-6) for a, b in itertools.pairwise((1.0, *scales)))
    assert len(scales) == max(1, math.ceil(math.log(ratio) / math.log(max_step) - 1e-6))


@pytest.mark.parametrize("method", (DemoFusion, AccDiffusion, AccDiffusionV2))
def test_published_stages_are_every_whole_scale_with_the_published_counts(method):
    plan = stages(method(published=True), SDXL, (512, 512))
    assert [stage.size for stage in plan] == [(128, 128), (256, 256), (384, 384), (512, 512)]
    assert [stage.evaluations() for stage in plan] == [1, 9 + 4, 25 + 9, 49 + 16]
    assert sum(stage.evaluations() for stage in plan) == 113
    local = plan[1].canvas.local
    assert (local.window, local.stride, local.jitter) == ((128, 128), (64, 64), 16)


def test_published_stages_refuse_what_the_published_code_does_not_reach():
    with pytest.raises(SettingError, match="whole multiples of 1024"):
        stages(DemoFusion(published=True), SDXL, (192, 192))


def test_published_portraits_keep_their_shape_to_a_latent():
    plan = stages(DemoFusion(published=True), SDXL, (384, 320))
    assert [stage.size for stage in plan] == [(128, 106), (256, 213), (384, 320)]


@pytest.mark.parametrize("size", ((256, 256), (512, 384), (384, 512)))
def test_later_stages_cost_at_most_half_of_the_published_schedule_by_default(size):
    def later(method):
        plan = stages(method, SDXL, size)
        return sum(round(stage.strength * 50) * stage.evaluations() for stage in plan[1:])

    assert later(DemoFusion()) <= later(DemoFusion(stage_strength=1.0)) / 2


def test_a_size_about_native_is_one_plain_stage_and_a_started_one_is_one_canvas():
    assert stages(DemoFusion(), SDXL, (128, 128)) == (Stage((128, 128)),)
    assert stages(DemoFusion(), SDXL, (64, 130)) == (Stage((64, 130)),)
    (only,) = stages(DemoFusion(), SDXL, (256, 256), started=True)
    assert only.canvas.dilated.dilation == 2 and only.scale == 2


# Hand-off -------------------------------------------------------------------------------------------------------------


@given(st.tuples(st.integers(4, 20), st.integers(4, 20)), st.tuples(st.integers(4, 60), st.integers(4, 60)))
def test_enlarging_reaches_any_size_and_keeps_what_is_constant(size, wanted):
    x = torch.full((2, 4, *size), 3.0)
    found = enlarge(x, wanted)
    assert tuple(found.shape) == (2, 4, *wanted) and found.is_contiguous()
    torch.testing.assert_close(found, torch.full_like(found, 3.0))


def test_enlarging_by_a_whole_factor_is_the_plain_bicubic_and_else_equal_in_both_directions():
    x = random(1, 4, 8, 12)
    plain = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="bicubic")
    assert torch.equal(enlarge(x, (16, 24)), plain)
    assert torch.equal(enlarge(x, (14, 24)), plain[..., 1:15, :])
    assert torch.equal(enlarge(x, (16, 20)), plain[..., 2:22])


def test_published_stages_stretch_where_the_sides_grow_differently():
    x = random(1, 4, 8, 5)
    wanted = torch.nn.functional.interpolate(x, size=(16, 11), mode="bicubic")
    assert torch.equal(enlarge(x, (16, 11), stretch=True), wanted)


# Skip residual --------------------------------------------------------------------------------------------------------


def residual(size=(6, 6), skip=3.0):
    return StageRun(
        Stage(size, canvas=CanvasPlan(skip_residual=True, cosines=Cosines(skip=skip))),
        1,
        reference=random(2, 4, *size, seed=1),
        noise=random(2, 4, *size, seed=2),
    )


@pytest.mark.parametrize("scaled", (False, True))
@pytest.mark.parametrize("timestep", (999.0, 489.3, 20.0))
def test_a_state_that_is_the_noised_reference_stays_as_it_is(scaled, timestep):
    run, moment = residual(), NoiseSchedule().moment(timestep=timestep)
    state = run.reference + moment.sigma * run.noise
    state = state / (moment.sigma**2 + 1) ** 0.5 if scaled else state
    torch.testing.assert_close(run.pull(state, moment, scaled), state)


@pytest.mark.parametrize("timestep, sigma", ((1000.0, 14.6), (500.0, 1.6), (0.0, 0.03)))
def test_the_pull_is_the_cosine_to_its_exponent(timestep, sigma):
    run, state = residual(skip=2.0), random(2, 4, 6, 6, seed=9)
    share = (0.5 * (1 + math.cos(math.pi * (1000 - timestep) / 1000))) ** 2
    wanted = (1 - share) * state + share * (run.reference + sigma * run.noise)
    torch.testing.assert_close(run.pull(state, Moment(timestep, sigma), False), wanted)


def test_the_cosine_falls_from_one_to_zero():
    cosines = [Moment(float(t), 1.0).cosine for t in range(1001)]
    assert cosines[1000] == 1 and cosines[0] == 0 and cosines == sorted(cosines)


def test_without_a_skip_residual_or_a_reference_the_state_is_the_same_object():
    run, state, moment = residual(), random(2, 4, 6, 6), Moment(500.0, 1.0)
    run.reference = None
    assert run.pull(state, moment, False) is state
    assert StageRun(Stage((6, 6)), 0).pull(state, moment, False) is state
    off = StageRun(Stage((6, 6), canvas=CanvasPlan()), 1, reference=state, noise=state)
    assert off.pull(state, moment, False) is state


# The runner -----------------------------------------------------------------------------------------------------------


class Sampler:
    """Answers each stage with noise of an odd mean and spread."""

    def __init__(self):
        self.runs = []

    def __call__(self, run):
        self.runs.append(run)
        return (run.number + 2) * random(2, 4, *run.size, seed=run.number) + run.number - 3


THREE = tuple(
    Stage(size, scale, canvas=CanvasPlan() if scale > 1 else None)
    for size, scale in (((8, 8), 1.0), ((16, 12), 2.0), ((24, 20), 3.0))
)


def test_after_each_stage_every_image_and_channel_has_the_first_one_s_mean_and_std():
    sampler = Sampler()
    held = tuple(Stage(s.size, s.scale, canvas=s.canvas and CanvasPlan(anchor=MEAN_AND_STD)) for s in THREE)
    final = Progressive(held, (0, 1)).run(sampler)
    first = 2 * random(2, 4, 8, 8) - 3
    for found, wanted in ((final.mean((2, 3)), first.mean((2, 3))), (final.std((2, 3)), first.std((2, 3)))):
        torch.testing.assert_close(found, wanted)
    matched = sampler.runs[2].reference
    assert (matched.mean((2, 3)) - first.mean((2, 3))).abs().max() < 0.2  # the second stage's, enlarged
    torch.testing.assert_close(sampler.runs[1].reference, enlarge(first, (16, 12)))


@pytest.mark.parametrize("anchor", [MEAN, NOTHING])
def test_a_looser_anchor_leaves_the_spread_to_the_stage(anchor):
    loose = tuple(Stage(s.size, s.scale, canvas=s.canvas and CanvasPlan(anchor=anchor)) for s in THREE)
    final, first, own = Progressive(loose, (0, 1)).run(Sampler()), 2 * random(2, 4, 8, 8) - 3, 4 * random(2, 4, 24, 20, seed=2)
    mean = first.mean((2, 3)) if anchor == MEAN else own.mean((2, 3)) - 1
    torch.testing.assert_close(final.mean((2, 3)), mean)
    torch.testing.assert_close(final.std((2, 3)), own.std((2, 3)))


def test_published_stages_keep_one_mean_and_std_over_all_channels():
    published = tuple(Stage(s.size, s.scale, canvas=s.canvas and CanvasPlan(anchor=MEAN_AND_STD, published=True)) for s in THREE)
    final, first = Progressive(published, (0, 1)).run(Sampler()), 2 * random(2, 4, 8, 8) - 3
    torch.testing.assert_close(final.mean((1, 2, 3)), first.mean((1, 2, 3)))
    torch.testing.assert_close(final.std((1, 2, 3)), first.std((1, 2, 3)))


def test_stage_noise_is_each_image_s_own_and_touches_no_global_generator():
    def states():
        return torch.random.get_rng_state().tolist(), python_random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    both, alone = Sampler(), Sampler()
    Progressive(THREE, (3, 4)).run(both)
    Progressive(THREE, (4,)).run(lambda run: alone(run)[:1])
    assert states() == before
    for stage in (1, 2):
        noise = both.runs[stage].noise
        assert torch.equal(noise[1:], alone.runs[stage].noise)
        assert not torch.equal(noise[0], noise[1])
        assert abs(float(noise.std()) - 1) < 0.1 and abs(float(noise.mean())) < 0.1
    assert not torch.equal(both.runs[1].noise[..., :12, :12], both.runs[2].noise[..., :12, :12])


def test_recorded_stage_noise_is_replayed():
    record = {("stage noise"): {(0, 1): torch.ones(4, 16, 12), (0, 2): torch.zeros(4, 24, 20)}}
    sampler = Sampler()
    Progressive(THREE, (0,), record).run(lambda run: sampler(run)[:1])
    assert (sampler.runs[1].noise == 1).all() and (sampler.runs[2].noise == 0).all()


def test_a_run_that_is_stopped_gives_back_the_stage_that_was_running_with_the_mean_of_the_first():
    sampler = Sampler()
    found = Progressive(THREE, (0, 1)).run(sampler, stopped=lambda: len(sampler.runs) == 2)
    assert len(sampler.runs) == 2 and found.shape[-2:] == (16, 12)
    first, second = 2 * random(2, 4, 8, 8) - 3, 3 * random(2, 4, 16, 12, seed=1) - 2
    torch.testing.assert_close(found.mean((2, 3)), first.mean((2, 3)))
    moved = found - second
    torch.testing.assert_close(moved, moved[..., :1, :1].expand_as(moved))


def test_a_run_that_is_stopped_in_its_first_stage_gives_that_back_as_it_is():
    found = Progressive(THREE, (0, 1)).run(Sampler(), stopped=lambda: True)
    assert torch.equal(found, 2 * random(2, 4, 8, 8) - 3)


@pytest.mark.parametrize("sigma, starts_over", [(0.1, False), (1.73, False), (1.74, True), (14.6, True), (math.inf, True)])
def test_a_stage_that_is_stopped_while_more_than_half_is_noise_has_the_picture_that_it_started_from(sigma, starts_over):
    run, estimate, moment = residual(), random(2, 4, 6, 6, seed=9), Moment(500.0, sigma)
    assert run.so_far(estimate, moment) is (run.reference if starts_over else estimate)
    run.reference = None
    assert run.so_far(estimate, moment) is estimate


def test_later_stages_are_prepared_before_they_run():
    prepared, sampler = [], Sampler()
    Progressive(THREE, (0, 1), prepare=lambda run: prepared.append((run.number, len(sampler.runs)))).run(sampler)
    assert prepared == [(1, 1), (2, 2)]


def test_published_stages_take_the_published_anchor_and_no_other():
    plans = [DemoFusion(**settings).stages(SDXL, (256, 256), Common())[-1].canvas for settings in ({}, {"published": True})]
    assert [plan.anchor for plan in plans] == [MEAN, MEAN_AND_STD]
    with pytest.raises(SettingError, match=r"'anchor' is 'mean', must be 'auto' or 'mean and std'"):
        DemoFusion(published=True, anchor=MEAN)


@pytest.mark.parametrize("anchor", ["mean", "mean and std"])
def test_a_stage_is_prepared_with_the_latents_that_the_one_before_handed_on(anchor):
    prepared, sampled = [], []
    canvas = CanvasPlan(anchor=anchor)
    stages = [Stage((8, 8)), *(Stage((8 * s, 8 * s), float(s), canvas=canvas) for s in (2, 4))]

    def sample(run):
        sampled.append(torch.randn(1, 4, *run.size, generator=torch.Generator().manual_seed(run.number)) * 3 + run.number)
        return sampled[-1]

    Progressive(stages, [7], prepare=prepared.append).run(sample)
    assert torch.equal(prepared[0].before, sampled[0])
    assert torch.allclose(prepared[1].before.mean((2, 3)), sampled[0].mean((2, 3)), atol=1e-4)
    assert not torch.allclose(sampled[1].mean((2, 3)), sampled[0].mean((2, 3)), atol=0.5)
