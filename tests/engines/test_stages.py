"""Canvases and stages in the standalone engine: what equals plain sampling, what views are told, what it costs."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import structures
from support.engines import ATTENDED_BELOW, Blind, with_small_unet
from torch.nn import functional as F

from lib_hires.canvas.accdiffusion import AccDiffusion
from lib_hires.canvas.demofusion import DemoFusion
from lib_hires.canvas.mixture import MixtureOfDiffusers
from lib_hires.canvas.multidiffusion import MultiDiffusion
from lib_hires.config import Common
from lib_hires.config.errors import SettingError
from lib_hires.engines import checkpoint, samplers
from lib_hires.engines.denoiser import clean
from lib_hires.engines.standalone import Job
from lib_hires.plan.models import FAMILIES, Model
from lib_hires.plan.tiling import CanvasPlan, Cosines, Stage
from lib_hires.stages.progressive import StageRun

STAGED = {"demofusion": DemoFusion(), "accdiffusion": AccDiffusion(interaction="channel")}
ON_ONE_CANVAS = {"multidiffusion": MultiDiffusion(overlap=0.5), "mixture": MixtureOfDiffusers()}
METHODS = STAGED | ON_ONE_CANVAS


def model(native):
    """A model of so many native latents."""
    return Model(structures.SDXL, FAMILIES["sdxl"], 8 * native)


def stages_of(method, size, native=8):
    return method.stages(model(native), size, Common())


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Network(torch.nn.Module):
    """A UNet in place of a real one: `change` of its input, and a note of what it was told."""

    dtype = torch.float32

    def __init__(self, change=torch.zeros_like, in_channels=4):
        super().__init__()
        self.change, self.config = change, SimpleNamespace(in_channels=in_channels)
        self.inputs, self.time_ids = [], []

    def forward(self, x, t, encoder_hidden_states, added_cond_kwargs=None, return_dict=False):
        self.inputs.append(x)
        self.time_ids.append(None if added_cond_kwargs is None else added_cond_kwargs["time_ids"])
        return (self.change(x[:, :4]),)


@pytest.fixture(scope="module")
def xl(tiny):
    """The tiny SDXL with a UNet that is smaller still."""
    parts = checkpoint.load(tiny("sdxl")[0])
    return with_small_unet(
        parts,
        **ATTENDED_BELOW,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=parts.unet.config.addition_time_embed_dim,
        projection_class_embeddings_input_dim=parts.unet.config.projection_class_embeddings_input_dim,
    )


@pytest.fixture
def around(components):
    """around(change) -> (an engine around a UNet of that function, the UNet)."""

    def make(change=torch.zeros_like, parts=components, in_channels=4):
        network = Network(change, in_channels)
        return Blind(replace(parts, unet=network)), network

    return make


def job_of(size, **values):
    return Job(
        "a red star", **{"width": 8 * size[1], "height": 8 * size[0], "steps": 4, "cfg": 4.0, "seed": 3} | values
    )


def draw(engine, method, size, native=8, **values):
    return engine.generate(job_of(size, **values), stages=stages_of(method, size, native))


# Equal to plain sampling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ("euler", "euler_a", "heun", "dpmpp_2m_karras", "dpmpp_2m_sde", "ddim", "unipc"))
@pytest.mark.parametrize("method", ON_ONE_CANVAS.values(), ids=list(ON_ONE_CANVAS))
def test_one_view_that_covers_the_canvas_is_plain_sampling_bit_for_bit(xl, method, sampler):
    job = job_of((8, 7), sampler=sampler, steps=3)
    plain = Blind(xl).generate(job)
    assert torch.equal(Blind(xl).generate(job, stages=stages_of(method, (8, 7))).latents, plain.latents)


@pytest.mark.parametrize("method", STAGED.values(), ids=list(STAGED))
def test_a_staged_method_at_native_size_is_plain_sampling_bit_for_bit(xl, method):
    plain = Blind(xl).generate(job_of((8, 8)))
    assert torch.equal(draw(Blind(xl), method, (8, 8)).latents, plain.latents)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_pointwise_network_draws_the_same_through_views_with_every_sampler(around, sampler):
    engine, _ = around(lambda x: (x * 1.5).tanh())
    job = job_of((16, 20), sampler=sampler)
    plain = engine.generate(job)
    viewed = engine.generate(job, stages=stages_of(MixtureOfDiffusers(jitter=0.5), (16, 20)))
    torch.testing.assert_close(viewed.latents, plain.latents, atol=1e-4, rtol=1e-4)


def test_uniform_weights_make_mixture_of_diffusers_multidiffusion(xl):
    mixture = MixtureOfDiffusers(overlap=0.5, spread=1.0)
    (stage,) = stages_of(mixture, (16, 16))
    uniform = replace(stage, canvas=replace(stage.canvas, local=replace(stage.canvas.local, weights="uniform")))
    wanted = draw(Blind(xl), ON_ONE_CANVAS["multidiffusion"], (16, 16), steps=2)
    found = Blind(xl).generate(job_of((16, 16), steps=2), stages=(uniform,))
    assert torch.equal(found.latents, wanted.latents)


def test_accdiffusion_without_its_two_changes_is_demofusion_whose_views_keep_their_places(xl):
    size, acc = (16, 16), AccDiffusion(word_share=0.0, interaction="none")
    fixed = [
        replace(stage, canvas=replace(stage.canvas, local=replace(stage.canvas.local, jitter_once=True, jitter_unit=4)))
        if stage.canvas
        else stage
        for stage in stages_of(DemoFusion(), size)
    ]
    wanted = Blind(xl).generate(job_of(size), stages=fixed)
    assert torch.equal(draw(Blind(xl), acc, size).latents, wanted.latents)


def test_window_prompts_that_are_all_the_prompt_are_accdiffusion_without_them(xl, monkeypatch):
    size = (16, 16)
    without = draw(Blind(xl), AccDiffusion(word_share=0.0), size)
    monkeypatch.setattr("lib_hires.engines.staged.window_texts", lambda *_, **__: {0: ["a red star"] * 9})
    found = draw(Blind(xl), AccDiffusion(), size)
    torch.testing.assert_close(found.latents, without.latents, atol=1e-4, rtol=1e-4)


# Reproducible ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ("euler", "euler_a"))
@pytest.mark.parametrize("name", METHODS)
def test_two_pictures_at_once_are_each_alone(xl, name, sampler):
    values = {"size": (16, 12), "steps": 3, "sampler": sampler}
    both = draw(Blind(xl), METHODS[name], **values, seed=5, batch=2)
    for index in range(2):
        alone = draw(Blind(xl), METHODS[name], **values, seed=5 + index)
        torch.testing.assert_close(both.latents[index], alone.latents[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_views_at_once_do_not_change_the_picture(xl, name):
    one, three, many = (
        draw(Blind(xl), replace(METHODS[name], tile_batch=count), (16, 16), steps=3).latents for count in (1, 3, 16)
    )
    torch.testing.assert_close(one, three, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(one, many, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_draws_the_same_and_global_generators_stay_as_they_are(xl, name):
    def states():
        return torch.random.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    first = draw(Blind(xl), METHODS[name], (16, 16), steps=2, sampler="euler_a")
    assert states() == before
    torch.manual_seed(99)
    random.seed(99)
    assert torch.equal(draw(Blind(xl), METHODS[name], (16, 16), steps=2, sampler="euler_a").latents, first.latents)
    other = draw(Blind(xl), METHODS[name], (16, 16), steps=2, sampler="euler_a", seed=4)
    assert (other.latents - first.latents).abs().max() > 0.1


def test_recorded_initial_noise_is_asked_for_the_first_stage_only(around):
    engine, asked = around()[0], []

    def record(seed, stage):
        asked.append((seed, stage))
        return torch.zeros(4, 8, 8)

    states = []
    engine.generate(
        job_of((16, 16)),
        stages=stages_of(DemoFusion(), (16, 16)),
        records={"initial noise": record},
        on_latents=lambda stage, call, latents: states.append((stage, latents)),
    )
    assert asked == [(3, 0)]
    assert all((latents == 0).all() for stage, latents in states if stage == 0)


@pytest.mark.parametrize("edge", ("mirror", "zeros"))
def test_ancestral_noise_is_drawn_once_for_the_whole_canvas(around, edge):
    """Its variance is sigma_up^2 whether one view or four cover a latent: nothing is averaged away."""
    size, states = (64, 64), []
    (stage,) = stages_of(MultiDiffusion(overlap=0.5), size, native=16)
    stage = replace(stage, canvas=replace(stage.canvas, local=replace(stage.canvas.local, edge=edge)))
    engine, _ = around()
    job = job_of(size, sampler="euler_a", steps=10, cfg=1)
    engine.generate(job, stages=(stage,), on_latents=lambda _, call, x: states.append(x.clone()))
    sigmas = samplers.make("euler_a", engine.components, 10).scheduler.sigmas
    counts = torch.zeros(size)
    for top, left in stage.canvas.local.views(size):
        counts[top : top + 16, left : left + 16] += 1
    for call in (1, 4):
        sigma, lower = float(sigmas[call]), float(sigmas[call + 1])
        up = (lower**2 * (sigma**2 - lower**2) / sigma**2) ** 0.5
        added = (states[call] - states[call - 1])[0]
        for count in (1, 2, 4):
            assert float(added[:, counts == count].std()) == pytest.approx(up, rel=0.05)


# The skip residual ----------------------------------------------------------------------------------------------------


KEEPING = [name for name, each in samplers.SAMPLERS.items() if each.keeps_state]
TO_ZERO = [name for name in KEEPING if name not in ("heun", "lms", "dpm2", "dpm2_a")]


@pytest.mark.parametrize("strength", (0.35, 0.5, 1.0))
@pytest.mark.parametrize("zero, sampler", [(False, name) for name in KEEPING] + [(True, name) for name in TO_ZERO])
def test_the_first_step_of_a_stage_is_unchanged_by_the_skip_residual(components, zero, sampler, strength):
    """Also of a model whose schedule ends at zero terminal SNR."""
    components = replace(components, zero_terminal_snr=zero, prediction_type="v_prediction" if zero else "epsilon")
    run = samplers.make(sampler, components, 20)
    first = run.begin(run.steps - round(strength * run.steps))
    plan = CanvasPlan(skip_residual=True, cosines=Cosines(skip=1.0))
    stage = StageRun(Stage((8, 8), canvas=plan), 1, reference=rand(1, 4, 8, 8), noise=rand(1, 4, 8, 8, seed=1))
    state = run.noised(stage.reference, stage.noise, first)
    moment = Blind(components).schedule().moment(timestep=run.timesteps[first])
    pulled = stage.pull(state, moment, run.initial_sigma == 1)
    assert (pulled - state).abs().max() < 2e-3 * state.abs().max()


@pytest.mark.parametrize("method", STAGED.values(), ids=list(STAGED))
def test_samplers_that_would_lose_the_skip_residual_are_refused_before_the_network_is_called(around, xl, method):
    calls = []
    hook = xl.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(SettingError, match=r"'sampler' is 'unipc'.*skip_residual"):
            draw(Blind(xl), method, (16, 16), sampler="unipc")
        assert not calls
        assert draw(Blind(xl), replace(method, skip_residual=False), (16, 16), sampler="unipc").latents.isfinite().all()
    finally:
        hook.remove()


def test_with_a_full_skip_residual_the_next_stage_keeps_the_picture(around):
    """A share near one at every noise level leaves the enlarged latents, whatever the network says."""
    engine, _ = around(torch.tanh)
    states = []
    plan = [
        replace(stage, canvas=replace(stage.canvas, cosines=replace(stage.canvas.cosines, skip=1e-9)))
        if stage.canvas
        else stage
        for stage in stages_of(DemoFusion(), (16, 16))
    ]
    engine.generate(
        job_of((16, 16), steps=30), stages=plan, on_latents=lambda stage, call, x: states.append((stage, x.clone()))
    )
    native = [x for stage, x in states if stage == 0][-1]
    large = [x for stage, x in states if stage == 1][-1]
    wanted = F.interpolate(native, scale_factor=2, mode="bicubic")
    assert (large - wanted).std() < 0.05 * wanted.std()


# What it costs --------------------------------------------------------------------------------------------------------


def test_the_published_settings_at_twice_native_take_fifty_times_one_and_thirteen_evaluations(around):
    engine, network = around()
    result = draw(engine, DemoFusion(published=True, stage_strength=1.0, tile_batch=16), (16, 16), steps=50)
    assert [stage["unet_evaluations"] for stage in result.stages] == [50, 50 * (9 + 4)]
    assert result.unet_calls == len(network.inputs) == 50 * (1 + 2)
    assert [(stage["width"], stage["height"]) for stage in result.stages] == [(64, 64), (128, 128)]


@pytest.mark.parametrize("method", STAGED.values(), ids=list(STAGED))
@pytest.mark.parametrize("size", ((16, 16), (24, 32)))
def test_later_stages_take_at_most_half_of_the_full_schedule_by_default(xl, around, method, size):
    method = replace(method, word_share=0.0) if isinstance(method, AccDiffusion) else method
    engine, _ = around()
    half, full = (
        draw(engine, replace(method, stage_strength=strength), size, steps=20)
        for strength in (method.stage_strength, 1.0)
    )
    later = [sum(stage["unet_evaluations"] for stage in result.stages[1:]) for result in (half, full)]
    assert 0 < later[0] <= later[1] / 2


@pytest.mark.parametrize("sampler", ("euler", "heun"))
@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize("size", ((16, 16), (20, 28)))
def test_progress_counts_the_views_that_the_network_was_given(around, method, size, sampler):
    method = replace(method, word_share=0.0) if isinstance(method, AccDiffusion) else method
    engine, network = around()
    done = []
    result = engine.generate(
        job_of(size, steps=10, sampler=sampler),
        stages=stages_of(method, size),
        on_step=lambda done_now, total: done.append((done_now, total, sum(len(x) for x in network.inputs) // 2)),
    )
    assert all(now == given for now, _, given in done)
    assert {total for _, total, _ in done} == {done[-1][0]}
    assert done[-1][0] == sum(stage["unet_evaluations"] for stage in result.stages)


def test_a_stage_s_share_of_the_bar_is_its_share_of_the_work(around):
    """20 of DemoFusion's 124 evaluations at twice the native size are the native picture's."""
    done = []
    around()[0].generate(
        job_of((16, 16), steps=20), stages=stages_of(DemoFusion(), (16, 16)), on_step=lambda now, total: done.append((now, total))
    )
    assert done[19] == (20, 124) and done[20] == (33, 124) and done[-1] == (124, 124) and len(done) == 28


# What views are told --------------------------------------------------------------------------------------------------


def test_sdxl_is_told_each_view_s_place_and_for_whole_pictures_the_final_size_without_a_crop(around, xl):
    engine, network = around(parts=xl)
    size = (16, 16)
    result = draw(engine, DemoFusion(stage_strength=1.0), size, steps=2, cfg=4.0)
    assert result.unet_calls == 2 * (1 + 13)
    told = [ids.tolist() for ids in network.time_ids]
    assert all(row[:2] == row[4:] == [128, 128] for rows in told for row in rows)
    assert all(rows[0] == rows[1] for rows in told)
    native, first = told[:2], told[2:15]
    assert all(rows[0][2:4] == [0, 0] for rows in native + first[9:])
    places = [tuple(rows[0][2:4]) for rows in first[:9]]
    for (top, left), (y, x) in zip(stages_of(DemoFusion(), size)[1].canvas.local.views(size), places):
        assert abs(y / 8 - top) <= 1 and abs(x / 8 - left) <= 1 and min(y, x) >= 0
    inputs = [x[0] for x in network.inputs[2:11]]
    assert all(x.shape == (4, 8, 8) for x in inputs)


def test_the_published_crops_carry_the_padding(around, xl):
    engine, network = around(parts=xl)
    size = (16, 16)
    moves = {"view jitter": lambda seed, stage, t, view, axis: 0}
    method = DemoFusion(published=True, stage_strength=1.0)
    engine.generate(job_of(size, steps=1), stages=stages_of(method, size), records=moves)
    crops = [tuple(ids[0, 2:4].tolist()) for ids in network.time_ids[1:10]]
    assert crops == [(8 * (top + 1), 8 * (left + 1)) for top in (0, 4, 8) for left in (0, 4, 8)]


@pytest.mark.parametrize("published", (False, True))
@pytest.mark.parametrize("batch", (1, 2))
def test_what_an_inpainting_network_takes_beside_the_latent_is_cut_as_the_latent(around, published, batch):
    """Each of the further channels counts the latents of the canvas: it says where a view was taken."""
    size = (16, 16)
    engine, network = around(in_channels=9)
    numbers = torch.arange(256.0).view(1, 1, *size) + 1
    engine._masked_picture = lambda job: numbers.repeat(1, 5, 1, 1)
    stages = stages_of(DemoFusion(stage_strength=1.0, published=published), size)[1:]
    moved = {"view jitter": lambda seed, stage, t, view, axis: 0}
    engine.generate(job_of(size, steps=1, batch=batch), stages=stages, records=moved)
    assert len(network.inputs) == 13
    views = stages[0].canvas.local.views(size)
    for x, (top, left) in zip(network.inputs, views):
        wanted = numbers[0, 0, top : top + 8, left : left + 8]
        assert x.shape[0] == 2 * batch and all(torch.equal(channel, wanted) for row in x for channel in row[4:])
    for index, x in enumerate(network.inputs[9:]):
        p, r = divmod(index, 2)
        assert all(torch.equal(channel, numbers[0, 0, p::2, r::2]) for row in x for channel in row[4:])


def test_the_guidance_of_views_may_differ_from_the_sampler_s(xl):
    size = (16, 16)
    same, other = (draw(Blind(xl), AccDiffusion(view_guidance=w, word_share=0.0), size, steps=2) for w in (4.0, 9.0))
    auto = draw(Blind(xl), AccDiffusion(word_share=0.0), size, steps=2)
    assert torch.equal(same.latents, auto.latents)
    assert (other.latents - auto.latents).abs().max() > 1e-3
    assert other.unet_calls == auto.unet_calls


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", ((19, 13), (8, 20), (6, 30)))
def test_odd_sizes_and_canvases_narrower_than_a_view_are_drawn(xl, name, size):
    result = draw(Blind(xl), METHODS[name], size, steps=2)
    assert result.latents.shape == (1, 4, *size) and result.latents.isfinite().all()


def test_memory_that_runs_out_halves_the_views_at_once_and_the_picture_is_the_same(around):
    def tight(x):
        if x.shape[0] > 6:
            raise torch.OutOfMemoryError("no more")
        return x.tanh()

    engine, network = around(tight)
    wanted = draw(around(torch.tanh)[0], DemoFusion(tile_batch=1), (16, 16))
    found = draw(engine, DemoFusion(tile_batch=16), (16, 16))
    assert torch.equal(found.latents, wanted.latents)
    assert max(x.shape[0] for x in network.inputs[-4:]) <= 6


# Stopping -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
def test_what_a_call_holds_for_the_picture_is_what_the_noise_was_added_to(kind, sigma):
    generator = torch.Generator().manual_seed(0)
    picture, noise = (torch.randn((1, 4, 8, 8), generator=generator, dtype=torch.float64) for _ in range(2))
    kept, noisy = (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5
    x = kept * picture + noisy * noise
    prediction = noise if kind == "epsilon" else kept * noise - noisy * picture
    assert torch.allclose(clean(x, prediction, sigma, kind), picture, atol=1e-10)


def test_at_infinite_sigma_a_v_prediction_is_the_picture_turned_round():
    v = torch.randn(1, 4, 8, 8)
    assert torch.equal(clean(torch.randn(1, 4, 8, 8), v, float("inf"), "v_prediction"), -v)


@pytest.mark.parametrize(
    ("at", "told", "size"), [(2, "stage 1 of 2, call 3 of 4", (8, 8)), (4, "stage 2 of 2, call 1 of 2", (16, 16))]
)
def test_a_stopped_run_gives_what_there_is_at_its_stages_size(around, at, told, size):
    engine, seen = around()[0], []
    result = engine.generate(
        job_of((16, 16), steps=4),
        stages=stages_of(DemoFusion(), (16, 16)),
        on_latents=lambda stage, call, latents: seen.append(stage),
        stopped=lambda: len(seen) == at,
    )
    assert result.interrupted == told and len(seen) == at
    assert tuple(result.latents.shape[-2:]) == size and torch.isfinite(result.latents).all()
    whole = engine.generate(job_of((16, 16), steps=4), stages=stages_of(DemoFusion(), (16, 16)))
    assert not whole.interrupted


def stopped_in_stage_two(engine, calls, **settings):
    """(the native latents, the latents of a run that was stopped after so many calls of its second stage)."""
    native, seen = [], []

    def note(stage, call, latents):
        seen.append(stage)
        if stage == 0:
            native[:] = [latents.clone()]

    result = engine.generate(
        job_of((16, 16), steps=10, batch=2),
        stages=stages_of(DemoFusion(stage_strength=1.0, **settings), (16, 16)),
        on_latents=note,
        stopped=lambda: len(seen) == 10 + calls,
    )
    assert result.interrupted == f"stage 2 of 2, call {calls + 1} of 10"
    return native[0], result.latents


@pytest.mark.parametrize("anchor", ["mean", "nothing"])
def test_stopped_where_a_stage_is_still_noise_it_gives_the_picture_before_it_enlarged(around, anchor):
    native, found = stopped_in_stage_two(around(lambda x: (x * 1.5).tanh())[0], 0, anchor=anchor)
    enlarged = F.interpolate(native, scale_factor=2, mode="bicubic")
    assert (found - enlarged).std() < 0.1 * enlarged.std()


def test_stopped_later_it_gives_the_stage_s_own_estimate_in_the_colours_of_the_native_picture(around):
    """A network that answers with noise of its own has pushed the mean away by then."""
    engine, _ = around(lambda x: (x * 1.5).tanh() + 0.1)
    native, found = stopped_in_stage_two(engine, 8)
    enlarged = F.interpolate(native, scale_factor=2, mode="bicubic")
    assert (found - enlarged).std() > 0.3 * enlarged.std()
    torch.testing.assert_close(found.mean((2, 3)), native.mean((2, 3)), atol=1e-4, rtol=1e-4)
    _, loose = stopped_in_stage_two(engine, 8, anchor="nothing")
    assert (loose.mean((2, 3)) - native.mean((2, 3))).abs().max() > 0.02
    moved = found - loose
    torch.testing.assert_close(moved, moved[..., :1, :1].expand_as(moved), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", (DemoFusion(), AccDiffusion(word_share=0.0)), ids=lambda method: method.name)
def test_without_the_skip_residual_a_full_stage_ends_in_a_picture_and_not_in_noise(around, method):
    engine, _ = around(lambda noisy: noisy)  # knows of a picture that its values are about 1
    rough = []
    for pulled in (True, False):
        full = replace(method, stage_strength=1.0, skip_residual=pulled, anchor="nothing")
        rough.append(draw(engine, full, (16, 16), steps=20).latents.diff(dim=-1).std().item())
    assert rough[1] < 1.1 * rough[0]  # 0.7; 1.4 where the filter acts without the skip residual
