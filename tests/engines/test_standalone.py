"""The loop: reproducible, private in its randomness, any size, open to sessions, clean after failures."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from lib_hires.config.errors import HiresError, SettingError
from lib_hires.engines import checkpoint, samplers
from lib_hires.engines.denoiser import Denoiser, count_calls
from lib_hires.engines.standalone import Engine, Job

SMALL = {"width": 64, "height": 64, "steps": 3, "cfg": 4.0}
ADDING_NOISE = ("euler_a", "dpm2_a", "dpmpp_2m_sde", "ddim_eta1", "lcm")


class Watch:
    """A session that notes what it is told, and how often the UNet had been called by then."""

    def __init__(self, unet):
        self.seen, self.entered, self.left = [], 0, 0
        self._unet, self._counter = unet, None

    def __enter__(self):
        self.entered += 1
        self._counter = count_calls(self._unet)
        self._calls = self._counter.__enter__()
        return self

    def __exit__(self, *error):
        self._counter.__exit__(None, None, None)
        self.left += 1

    def at(self, timestep, step, steps):
        self.seen.append((timestep, step, steps, self._calls.total))


def pixels(image):
    return np.asarray(image).astype(int)


def test_a_native_picture_shows_something_and_is_reproducible(engine):
    job = Job("a yellow star on a blue background", width=256, height=256, steps=8, cfg=4, seed=3)
    first, second = engine.generate(job), engine.generate(job)
    assert torch.equal(first.latents, second.latents)
    assert first.images[0].tobytes() == second.images[0].tobytes()
    assert first.images[0].size == (256, 256)
    shown = pixels(first.images[0])
    middle, edge = shown[64:192, 64:192].reshape(-1, 3), shown[16:48, 16:48].reshape(-1, 3)
    assert middle.std(0).max() > 2 * edge.std(0).max()  # a subject in the middle, plain ground in the corner


def test_other_seeds_give_other_pictures(engine):
    a, b = (engine.generate(Job("a star", seed=seed, **SMALL)).latents for seed in (1, 2))
    assert (a - b).abs().mean() > 0.1


@pytest.fixture(scope="module")
def exact():
    """The bundled model with its UNet in double precision, so that rounding hides nothing: a sharp model makes 1e-7 to 3e-4."""
    components = checkpoint.load()

    def widened(_unet, args, kwargs):
        return tree_map(lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x, (args, kwargs))

    components.unet.double().register_forward_pre_hook(widened, with_kwargs=True)
    return Engine(components)


@pytest.mark.parametrize("sampler", ("euler", *ADDING_NOISE))
def test_image_k_of_a_batch_equals_the_same_image_alone(exact, sampler):
    batch = exact.generate(Job("a star", seed=5, batch=3, sampler=sampler, **SMALL))
    for index in range(3):
        alone = exact.generate(Job("a star", seed=5 + index, sampler=sampler, **SMALL))
        torch.testing.assert_close(batch.latents[index], alone.latents[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampler", ("euler", *ADDING_NOISE))
def test_global_generators_are_neither_read_nor_advanced(engine, sampler):
    def states():
        return torch.random.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    job = Job("a star", sampler=sampler, **SMALL)
    torch.manual_seed(1)
    before = states()
    first = engine.generate(job)
    assert states() == before
    torch.manual_seed(2)
    assert torch.equal(engine.generate(job).latents, first.latents)


@pytest.mark.parametrize("steps", (1, 2, 12))
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_every_sampler_makes_its_steps_from_noise_to_a_finite_picture(engine, sampler, steps):
    done, watch = [], Watch(engine.components.unet)
    job = Job("a star", width=32, height=32, steps=steps, cfg=1, sampler=sampler)
    result = engine.generate(job, watch, on_step=lambda i, n: done.append((i, n)))
    assert result.latents.isfinite().all() and result.latents.std() < 7  # the noise it starts from has 14.6
    assert done == [(i + 1, result.unet_calls) for i in range(result.unet_calls)]
    calls = samplers.SAMPLERS[sampler].calls
    assert result.unet_calls == (calls - 1) * (steps - 1) + steps
    timesteps, positions, totals, counted = zip(*watch.seen)
    assert counted == tuple(range(result.unet_calls))  # told just before each call
    assert timesteps[0] > 900 and all(b < a + 0.01 for a, b in itertools.pairwise(timesteps))
    assert positions[0] == 0 and positions[-1] == steps - 1 and list(positions) == sorted(positions)
    assert set(totals) == {steps}


class GaussianDenoiser:
    """The exact prediction for data drawn from N(0, spread^2): x = a x0 + s e gives E[e|x] = s x / (a^2 spread^2 + s^2)."""

    def __init__(self, spread, predicts):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas, self.spread, self.predicts = (1 - betas).cumprod(0), spread, predicts

    def __call__(self, x, t):
        low, share = int(t), float(t) - int(t)
        abar = self.alphas[low].lerp(self.alphas[min(low + 1, 999)], share).item()
        a, s = abar**0.5, (1 - abar) ** 0.5
        eps = s * x / (a**2 * self.spread**2 + s**2)
        return eps if self.predicts == "epsilon" else a * eps - s * (x - s * eps) / a


@pytest.mark.parametrize("predicts", ("epsilon", "v_prediction"))
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_every_sampler_solves_a_problem_whose_answer_is_known(components, sampler, predicts):
    """For Gaussian data the ODE only scales its start: it ends at spread * noise. Samplers that add noise keep its spread."""
    engine = Engine(replace(components, prediction_type=predicts))
    job = Job("", width=256, height=256, steps=100, cfg=1, sampler=sampler, seed=11)
    end, _ = engine.sample(job, GaussianDenoiser(0.5, predicts))
    if sampler == "lcm":  # each step draws x0 given x: for wide data this is narrower than the data
        assert 0.2 < end.std() < 0.55
    elif sampler.removesuffix("_karras") in ADDING_NOISE:
        assert abs(end.std() - 0.5) < 0.05
    else:
        noise = engine.noise(job)[0]
        assert (end - 0.5 * noise).std() < 0.06 * 0.5


@pytest.mark.parametrize("width, height", ((8, 8), (72, 40), (200, 136)))
def test_odd_latent_sizes_work(engine, width, height):
    result = engine.generate(Job("a star", width=width, height=height, steps=2, cfg=4))
    assert result.images[0].size == (width, height)
    assert result.latents.shape == (1, 4, height // 8, width // 8)


def test_cfg_1_asks_for_the_positive_prompt_only_and_equals_full_guidance_of_one(engine):
    rows = []
    hook = engine.components.unet.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    try:
        alone = engine.generate(Job("a star", width=64, height=64, steps=2, cfg=1))
        almost = engine.generate(Job("a star", width=64, height=64, steps=2, cfg=1 + 1e-7, negative="blur"))
    finally:
        hook.remove()
    assert rows == [1, 1, 2, 2]
    torch.testing.assert_close(alone.latents, almost.latents, atol=1e-4, rtol=1e-3)


def test_the_report_counts_what_ran(engine):
    result = engine.generate(Job("a star", sampler="heun", **SMALL))
    assert result.stages == [
        {"width": 64, "height": 64, "unet_calls": 5, "unet_evaluations": 5, "seconds": result.stages[0]["seconds"]}
    ]
    assert 0 < result.stages[0]["seconds"] < result.seconds
    assert result.peak_memory > 50e6
    assert result.latents.dtype is torch.float32 and result.latents.device.type == "cpu"


@pytest.mark.parametrize("error", (KeyboardInterrupt, RuntimeError))
def test_an_interrupt_passes_through_and_leaves_nothing_behind(engine, error):
    unet, watch = engine.components.unet, Watch(engine.components.unet)
    wanted = engine.generate(Job("a star", **SMALL)).latents
    hooks = dict(unet._forward_pre_hooks)

    def stop(i, n):
        raise error

    with torch.enable_grad():
        with pytest.raises(error):
            engine.generate(Job("a star", **SMALL), watch, on_step=stop)
        assert torch.is_grad_enabled()
    assert (watch.entered, watch.left) == (1, 1)
    assert dict(unet._forward_pre_hooks) == hooks
    assert torch.equal(engine.generate(Job("a star", **SMALL)).latents, wanted)


def test_the_denoiser_takes_several_views_of_the_batch_at_once(engine):
    denoiser = engine.denoiser(Job("a star", width=64, height=64))
    x, t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500.0)
    with torch.no_grad():
        together, apart = denoiser(x, t), torch.cat([denoiser(x[:2], t), denoiser(x[2:], t)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


def test_what_wraps_the_denoiser_is_what_the_loop_calls(components):
    class Wrapping(Engine):
        def denoiser(self, job):
            inner = super().denoiser(job)
            return lambda x, t: inner(x, t) * 0

    result = Wrapping(components).generate(Job("a star", **SMALL))
    plain = Engine(components).generate(Job("a star", **SMALL))
    assert (result.latents - plain.latents).abs().max() > 1
    assert isinstance(Engine(components).denoiser(Job("a star")), Denoiser)


@pytest.mark.parametrize("family, channels", (("sd1", 4), ("sd1", 9), ("sd2", 4), ("sdxl", 4)))
def test_every_family_draws(tiny, family, channels):
    engine = Engine(checkpoint.load(tiny(family, channels)[0]))
    job = Job("a star", width=72, height=64, steps=2, batch=2, sampler="ddim", negative="blur " * 80)
    result = engine.generate(job)
    assert result.latents.shape == (2, 4, 8, 9) and result.latents.isfinite().all()


def test_a_zero_terminal_snr_model_starts_from_pure_noise_and_refuses_samplers_that_cannot(tiny):
    loaded = checkpoint.load(tiny("sdxl")[0])
    loaded.zero_terminal_snr, loaded.prediction_type = True, "v_prediction"
    result = Engine(loaded).generate(Job("a star", width=64, height=64, steps=2))
    assert result.latents.isfinite().all()
    with pytest.raises(HiresError, match="cannot run a zero-terminal-SNR model"):
        Engine(loaded).generate(Job("a star", width=64, height=64, steps=2, sampler="heun"))


def test_a_unet_that_needs_a_picture_is_refused(tiny):
    with pytest.raises(HiresError, match="takes 5 channels"):
        Engine(checkpoint.load(tiny("sd1", 5)[0])).generate(Job("a star", **SMALL))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"width": 100}, "'width' is 100, must be a multiple of 8 (pixels per latent). Use 96 or 104."),
        ({"height": 12}, "'height' is 12, must be a multiple of 8 (pixels per latent). Use 8 or 16."),
        ({"steps": 0}, "'steps' is 0, must be between 1 and 1000. Raise it."),
        ({"batch": 0}, "'batch' is 0, must be between 1 and 1024. Raise it."),
        ({"cfg": 101}, "'cfg' is 101, must be between 0 and 100. Lower it."),
        ({"seed": -1}, "'seed' is -1, must be between"),
        ({"sampler": "plms"}, "'sampler' is 'plms', must be one of euler, "),
    ],
)
def test_errors_name_the_setting_its_value_and_what_to_do(engine, values, words):
    with pytest.raises(SettingError) as caught:
        engine.generate(Job("a star", **{"width": 64, "height": 64, **values}))
    assert str(caught.value).startswith("Hires Lab: " + words)
