"""Stages on k-diffusion's own samplers: what they end on, what they go on from, what they draw, what they keep."""

import math
from dataclasses import replace

import pytest
import torch
from support import structures
from support.sampling import Model as Discrete
from support.sampling import external, sampling
from torch.nn import functional as F

from lib_hires.canvas.canvas import WHOLE, Tile
from lib_hires.canvas.demofusion import DemoFusion
from lib_hires.canvas.hints import Hint
from lib_hires.config import Common
from lib_hires.plan.models import FAMILIES, Model
from lib_hires.plan.tiling import CanvasPlan, Dilated, Local, Stage
from lib_hires.schedule import NoiseSchedule
from lib_hires.stages.progressive import Progressive

SCHEDULE, STEPS, SEEDS = NoiseSchedule(), 8, (3, 4)
LARGEST, SMALLEST = SCHEDULE.sigma(999), SCHEDULE.sigma(0)


def dpm_fast(model, x, sigmas, **options):
    return sampling.sample_dpm_fast(model, x, float(sigmas[-2]), float(sigmas[0]), len(sigmas) - 1, **options)


SAMPLERS = {
    "euler": sampling.sample_euler,
    "euler_ancestral": sampling.sample_euler_ancestral,
    "heun": sampling.sample_heun,
    "dpm_2": sampling.sample_dpm_2,
    "dpm_2_ancestral": sampling.sample_dpm_2_ancestral,
    "lms": sampling.sample_lms,
    "dpm_fast": dpm_fast,
    "dpmpp_2s_ancestral": sampling.sample_dpmpp_2s_ancestral,
    "dpmpp_sde": sampling.sample_dpmpp_sde,
    "dpmpp_2m": sampling.sample_dpmpp_2m,
    "dpmpp_2m_sde": sampling.sample_dpmpp_2m_sde,
    "dpmpp_3m_sde": sampling.sample_dpmpp_3m_sde,
}
ANCESTRAL = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral")
SDE = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
NOISY = (*ANCESTRAL, *SDE, "dpm_fast")
MULTISTEP = ("lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde")
LOOSE_END = {"lms": 0.2, "dpm_fast": 0.5}
"""LMS weighs older calls with the last one; DPM fast ends above zero noise, with a step whose middle was pulled."""
VIEWS = CanvasPlan(Local((8, 8), (4, 4), jitter=1), Dilated(2, 0.0))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def karras(steps=STEPS):
    return sampling.get_sigmas_karras(steps, SMALLEST, LARGEST)


def stages(size=(20, 16), **settings):
    """DemoFusion's three stages for a model whose native side is 8 latents."""
    model = Model(structures.SDXL, FAMILIES["sdxl"], 64)
    found = DemoFusion(**settings).stages(model, size, Common())
    assert len(found) == 3
    return found


class Denoiser:
    """denoiser(x, sigma) of one stage, as a host makes it: the state is pulled in place, the canvas predicts eps.

    network(x, tiles, sigma): eps of scaled latents. `before`: the states that the sampler handed over.
    """

    def __init__(self, run, network, images):
        self.run, self.network, self.images = run, network, images
        self.before, self.sigmas = [], []

    def __call__(self, x, sigma):
        level = float(sigma[0])
        moment = SCHEDULE.moment(sigma=level)
        self.before.append(x.clone())
        self.sigmas.append(level)
        x.copy_(self.run.pull(x, moment, scaled=False))
        scaled = x / (level**2 + 1) ** 0.5

        def evaluate(rows, tiles):
            return self.network(rows, tiles, level)

        if self.run.canvas is None:
            eps = evaluate(scaled, [Tile(WHOLE, 0, self.run.size, ((0, 0),) * len(self.images))])
        else:
            eps = self.run.canvas.predict(scaled, moment, self.images, evaluate)
        return x - level * eps


class Noise:
    """A noise sampler that counts: row k of what it gives is image k's, by its own seed."""

    def __init__(self, shape, seeds):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.drawn = shape, []

    def __call__(self, sigma, sigma_next):
        rows = [torch.randn(1, *self.shape[1:], generator=generator) for generator in self.generators]
        self.drawn.append(torch.cat(rows))
        return self.drawn[-1]


class Sampling:
    """sample(stage_run) by one of k-diffusion's samplers. network(run) makes the network of a stage.

    `runs`, `results`, `denoisers`, `noises`, `called` (the callback's values after each step's first call): of each stage.
    """

    def __init__(self, name, network, seeds=SEEDS, steps=STEPS, **options):
        self.name, self.network, self.seeds, self.steps, self.options = name, network, seeds, steps, options
        self.runs, self.results, self.denoisers, self.noises, self.called = [], [], [], [], []

    def __call__(self, run):
        sigmas, shape = karras(self.steps), (len(self.seeds), 4, *run.size)
        if run.reference is None:
            x = torch.cat([random(1, *shape[1:], seed=seed) for seed in self.seeds]) * sigmas[0]
        else:
            sigmas = sigmas[-1 - run.stage.steps_of(self.steps) :]
            x = run.reference + sigmas[0] * run.noise
        denoiser, called = Denoiser(run, self.network(run), range(len(self.seeds))), []
        noise = Noise(shape, [1000 * run.number + seed for seed in self.seeds])
        options = {"noise_sampler": noise, **self.options} if self.name in NOISY else {}
        result = SAMPLERS[self.name](
            denoiser,
            x,
            sigmas,
            disable=True,
            callback=lambda values: called.append({**values, "call": len(denoiser.before) - 1}),
            **options,
        )
        for held, value in zip(
            (self.runs, self.results, self.denoisers, self.noises, self.called),
            (run, result.clone(), denoiser, noise, called),
        ):
            held.append(value)
        return result


def knowing(picture):
    """A network that knows the picture (B, C, H, W) of each size: eps = (x - picture) / sigma, wherever a tile was cut."""

    def network_of(run):
        shown = picture(run)
        hint = Hint(shown, run.size, run.stage.canvas or CanvasPlan())

        def network(rows, tiles, sigma):
            parts = rows.chunk(len(tiles))
            known = [hint.crop(tile, range(len(part))) for part, tile in zip(parts, tiles)]
            return (rows * (sigma**2 + 1) ** 0.5 - torch.cat(known)) / sigma

        return network

    return network_of


def its_own(run):
    """Another picture for each image and stage."""
    return 2 * random(len(SEEDS), 4, *run.size, seed=run.number)


def seeing(run):
    """A small network that sees its neighbours and the noise level, never more than a few times what it is given."""
    kernel = random(4, 4, 3, 3, seed=8) / 6

    def network(rows, tiles, sigma):
        return (F.conv2d(rows, kernel, padding=1) + 0.1 * math.log(sigma)).tanh()

    return network


def pointwise(run):
    """A network that sees no neighbours."""
    return lambda rows, tiles, sigma: (1.5 * rows).tanh() * (1 - 0.1 * math.tanh(sigma))


# What a sampler ends on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", (0.5, 1.0))
@pytest.mark.parametrize("name", SAMPLERS)
def test_where_the_network_knows_the_picture_every_stage_ends_on_it(name, strength):
    """With filtered grids and the skip residual too: both are over before the last call."""
    sample = Sampling(name, knowing(its_own))
    final = Progressive(stages(stage_strength=strength), SEEDS).run(sample)
    assert [run.number for run in sample.runs] == [0, 1, 2]
    for run, found in zip(sample.runs, sample.results):
        assert (found - its_own(run)).abs().max() < LOOSE_END.get(name, 1e-4)
    means = [found.mean((2, 3), keepdim=True) for found in (its_own(sample.runs[0]), its_own(sample.runs[2]))]
    if name not in LOOSE_END:
        torch.testing.assert_close(final, its_own(sample.runs[2]) - means[1] + means[0], atol=1e-4, rtol=0)


# Equal to plain sampling ----------------------------------------------------------------------------------------------


def one_stage(plan, name, network, size=(20, 16), **options):
    sample = Sampling(name, network, **options)
    Progressive((Stage(size, canvas=plan),), SEEDS).run(sample)
    return sample


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_pointwise_network_is_sampled_the_same_through_views_step_for_step(name):
    plain, viewed = (one_stage(plan, name, pointwise) for plan in (None, VIEWS))
    assert plain.denoisers[0].sigmas == viewed.denoisers[0].sigmas
    for one, other in zip(plain.denoisers[0].before, viewed.denoisers[0].before):
        torch.testing.assert_close(other, one, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(viewed.results[0], plain.results[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_view_that_covers_all_is_the_plain_sampler_bit_for_bit(name):
    covering = CanvasPlan(Local((20, 16), (10, 8), jitter=2), Dilated(1, 0.8))
    plain, viewed = (one_stage(plan, name, seeing) for plan in (None, covering))
    for one, other in zip(plain.called[0], viewed.called[0], strict=True):
        assert torch.equal(one["x"], other["x"]) and torch.equal(one["denoised"], other["denoised"])
    assert torch.equal(viewed.results[0], plain.results[0])
    assert not torch.equal(one_stage(VIEWS, name, seeing).results[0], plain.results[0])


# Hand-offs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_later_stage_is_the_same_stage_alone_from_its_reference_and_noise(name):
    """No history of a multistep sampler goes over a hand-off, and no draw depends on what was drawn before."""
    plan = stages(stage_strength=0.7)
    whole = Sampling(name, seeing)
    Progressive(plan, SEEDS).run(whole)
    for number in (2, 1):
        before, alone = whole.runs[number], Sampling(name, seeing)
        progressive = Progressive(plan, SEEDS)
        alone(progressive.started(before.stage, number, before.reference.clone(), before.noise.clone()))
        assert torch.equal(alone.results[0], whole.results[number])
    assert name not in MULTISTEP or len(whole.called[2]) >= 4  # long enough for every order


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_multistep_sampler_begins_each_stage_at_the_first_order(name):
    """Its first step is the one of a run of one step: nothing but the state and the first call counts."""
    sample = Sampling(name, seeing)
    Progressive(stages(stage_strength=0.7), SEEDS).run(sample)
    for number in (1, 2):
        run, called = sample.runs[number], sample.called[number]
        sigmas = karras()[-1 - run.stage.steps_of(STEPS) :]
        noise = Noise(called[0]["x"].shape, [1000 * number + seed for seed in SEEDS])
        options = {"noise_sampler": noise} if name in NOISY else {}
        stepped = SAMPLERS[name](
            lambda x, sigma, denoised=called[0]["denoised"]: denoised,
            called[0]["x"].clone(),
            sigmas[:2],
            disable=True,
            **options,
        )
        torch.testing.assert_close(stepped, sample.denoisers[number].before[1], atol=1e-5, rtol=1e-5)


# The skip residual ----------------------------------------------------------------------------------------------------


def share_of(sigma, exponent=3.0):
    """c1 of DemoFusion, eq. 4, by k-diffusion's own timestep."""
    t = float(external.CompVisDenoiser(Discrete(None)).sigma_to_t(torch.tensor([sigma])))
    return (0.5 * (1 + math.cos(math.pi * (1000 - t) / 1000))) ** exponent


@pytest.mark.parametrize("name", SAMPLERS)
def test_at_each_step_the_sampler_goes_on_from_its_state_pulled_to_the_stage_before(name):
    sample = Sampling(name, seeing)
    Progressive(stages(stage_strength=1.0), SEEDS).run(sample)
    for number in (1, 2):
        run, denoiser = sample.runs[number], sample.denoisers[number]
        assert len(sample.called[number]) >= 2
        moved = []
        for values in sample.called[number]:
            sigma, before = denoiser.sigmas[values["call"]], denoiser.before[values["call"]]
            c1 = share_of(sigma)
            wanted = (1 - c1) * before + c1 * (run.reference + sigma * run.noise)
            torch.testing.assert_close(values["x"], wanted, atol=1e-4, rtol=1e-4)
            moved.append(float((wanted - before).abs().max()))
        assert max(moved) > 0.05  # it does pull


ONE_FROM_ANOTHER = (
    "euler",
    "euler_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
)


@pytest.mark.parametrize("name", (*ONE_FROM_ANOTHER, "heun", "dpm_2", "dpm_2_ancestral"))
def test_the_noise_in_the_state_is_mixed_with_the_stage_s_by_the_cosine(name):
    """The network knows the stage before, z: a state z + sigma m without added noise keeps m, and the skip residual makes it

    (1 - c1) m + c1 n; two-evaluation samplers are pulled once more, at the noise level of their second call.
    """
    plan = CanvasPlan(VIEWS.local, VIEWS.dilated, skip_residual=True)
    stage, z, n, m = Stage((20, 16), canvas=plan), *(random(2, 4, 20, 16, seed=seed) for seed in (1, 2, 3))
    run = Progressive((stage,), SEEDS).started(stage, 1, z, n)
    denoiser, called, sigmas = Denoiser(run, knowing(lambda run: z)(run), range(2)), [], karras()
    options = {"noise_sampler": Noise(z.shape, SEEDS), "eta": 0.0} if name in NOISY else {}
    SAMPLERS[name](
        denoiser,
        z + sigmas[0] * m,
        sigmas,
        disable=True,
        callback=lambda values: called.append(values["x"].clone()),
        **options,
    )

    def pulled(m, sigma):
        c1 = share_of(float(sigma))
        return (1 - c1) * m + c1 * n

    for sigma, lower, x in zip(sigmas, sigmas[1:], called, strict=True):
        m = pulled(m, sigma)
        torch.testing.assert_close((x - z) / sigma, m, atol=3e-4, rtol=1e-3)
        if lower == 0:
            break
        if name == "heun":
            m = (m + pulled(m, lower)) / 2
        elif name.startswith("dpm_2"):
            m = pulled(m, (sigma * lower) ** 0.5)


# Draws ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOISY)
def test_noise_is_drawn_for_the_whole_canvas_as_often_as_without_views(name):
    plain, viewed = (one_stage(plan, name, seeing).noises[0] for plan in (None, VIEWS))
    times = {"dpmpp_sde": 2 * (STEPS - 1), "dpm_fast": STEPS // 3 + 1}.get(name, STEPS - 1)
    assert len(viewed.drawn) == len(plain.drawn) == times
    assert all(torch.equal(one, other) for one, other in zip(plain.drawn, viewed.drawn))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in SDE])
def test_the_global_generator_is_used_as_by_the_plain_sampler_and_views_take_nothing_of_it(name, monkeypatch):
    """k-diffusion's own noise: one draw a step of the canvas' shape, the same numbers with views as without."""
    shapes, randn_like = [], torch.randn_like

    def drawn(x):
        shapes.append(tuple(x.shape))
        return randn_like(x)

    monkeypatch.setattr(torch, "randn_like", drawn)
    found = []
    with torch.random.fork_rng(devices=[]):
        for plan in (None, VIEWS):
            torch.manual_seed(5)
            sample = one_stage(plan, name, pointwise, **({"noise_sampler": None} if name in NOISY else {}))
            found.append((sample.results[0], list(shapes), torch.get_rng_state()))
            shapes.clear()
    (plain, plain_shapes, plain_state), (viewed, viewed_shapes, viewed_state) = found
    assert viewed_shapes == plain_shapes and set(viewed_shapes) <= {(2, 4, 20, 16)}
    assert torch.equal(viewed_state, plain_state)
    torch.testing.assert_close(viewed, plain, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seeds_repeat_a_run_bit_for_bit_and_others_do_not(name):
    def run(seeds):
        return Progressive(stages(), seeds).run(Sampling(name, seeing, seeds))

    first = run(SEEDS)
    assert torch.equal(run(SEEDS), first) and first.isfinite().all()
    assert not torch.allclose(run((5, 6)), first, atol=0.1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_image_of_a_batch_is_that_image_alone(name):
    both = Progressive(stages(), SEEDS).run(Sampling(name, seeing))
    for index, seed in enumerate(SEEDS):
        alone = Progressive(stages(), (seed,)).run(Sampling(name, seeing, (seed,)))
        torch.testing.assert_close(both[index : index + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SDE)
def test_brownian_noise_of_each_image_s_seed_is_the_same_alone_and_through_views(name):
    pytest.importorskip("torchsde")

    def drawn(seeds, plan):
        x = torch.empty(len(seeds), 4, 20, 16)
        tree = sampling.BrownianTreeNoiseSampler(x, 0.9 * SMALLEST, 1.1 * LARGEST, seed=[1000 + seed for seed in seeds])
        sample = Sampling(name, pointwise, seeds, noise_sampler=tree)
        return Progressive((Stage((20, 16), canvas=plan),), seeds).run(sample)

    both = drawn(SEEDS, VIEWS)
    torch.testing.assert_close(both, drawn(SEEDS, None), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(both[1:], drawn(SEEDS[1:], VIEWS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ("euler", "dpmpp_2m", "dpmpp_3m_sde"))
def test_views_at_once_do_not_change_a_staged_run(name):
    def run(count):
        plan = [s if s.canvas is None else replace(s, canvas=replace(s.canvas, tile_batch=count)) for s in stages()]
        return Progressive(plan, SEEDS).run(Sampling(name, seeing))

    torch.testing.assert_close(run(4), run(1), atol=1e-4, rtol=1e-4)
