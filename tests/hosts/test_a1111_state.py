"""The skip residual in a sampler's state: real loops through the adapter, against the formula x' = (1 - c1) x + c1 q."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from stand_ins import LoopSampler, job, staged
from support.sampling import sampling as k_diffusion

from lib_hires.hosts.a1111 import A1111, Run
from lib_hires.plan.tiling import CanvasPlan, Cosines, Stage
from lib_hires.request import Request
from lib_hires.schedule import NoiseSchedule
from lib_hires.stages.progressive import StageRun

STEPS, POWER = 6, 0.7
SCHEDULE = NoiseSchedule()


def request(**settings):
    return Request.from_dict({"method": "demofusion", "native_size": 64, "dilated_sampling": False, "jitter": 0,
                              "cosine_1": POWER, **settings})


def latents(seed, rows=2, size=(16, 16)):
    return torch.randn(rows, 4, *size, generator=torch.Generator().manual_seed(seed))


def drawn(host, name, z, n, **settings):
    """What the adapter makes of img2img on z from noise n, and the sampler that ran."""
    sampler = LoopSampler(host, name)
    p = job(A1111(), sampler, request(**settings), steps=STEPS, denoising_strength=0.999, init_images=[0],
            sd_model=host.shared.sd_model)
    return sampler.sample_img2img(p, z, n, None, None), sampler


def share_of(timestep):
    return (0.5 * (1 + math.cos(math.pi * (1000 - timestep) / 1000))) ** POWER


def answer(host, x, sigma):
    """The denoised value: z + sigma n is what k-diffusion's samplers see."""
    scaled, t = x / (sigma**2 + 1) ** 0.5, SCHEDULE.timestep(float(sigma))
    return x - sigma * torch.tanh(scaled) * (0.4 + t / 2000)


def test_eulers_way_is_the_formulas(host):
    z, n = latents(1), latents(2)
    result, sampler = drawn(host, "Euler", z, n)
    sigmas = sampler.levels(STEPS)
    x, seen = z + sigmas[0] * n, []
    for sigma, then in pairwise(sigmas):
        c = share_of(SCHEDULE.timestep(float(sigma)))
        x = (1 - c) * x + c * (z + sigma * n)
        seen.append(x)
        x = x + (x - answer(host, x, sigma)) / sigma * (then - sigma)
    assert len(sampler.model_wrap_cfg.states) == len(seen)
    for (_, state), expected in zip(sampler.model_wrap_cfg.states, seen):
        assert torch.allclose(state, expected, rtol=1e-3, atol=1e-3)
    assert torch.allclose(result, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["Euler", "Heun", "DPM++ 2M", "LMS"])
def test_each_sampler_goes_on_from_the_changed_state(host, name):
    z, n = latents(1), latents(2)
    result, sampler = drawn(host, name, z, n)
    without, _ = drawn(host, name, z, n, skip_residual=False)
    sigmas = sampler.levels(STEPS)

    def model(x, sigma):
        c = share_of(SCHEDULE.timestep(float(sigma[0])))
        x.copy_((1 - c) * x + c * (z + sigma[0] * n))
        return answer(host, x, sigma[0])

    loop = {"Euler": "sample_euler", "Heun": "sample_heun", "DPM++ 2M": "sample_dpmpp_2m", "LMS": "sample_lms"}[name]
    expected = getattr(k_diffusion, loop)(model, z + sigmas[0] * n, sigmas, disable=True)
    assert torch.allclose(result, expected, rtol=1e-3, atol=1e-3)
    assert (result - without).abs().mean() > 0.1


def test_ddims_way_is_the_formulas_scaled(host):
    z, n = latents(1), latents(2)
    result, sampler = drawn(host, "DDIM", z, n)
    alphas, times = host.shared.sd_model.alphas_cumprod, sampler.levels(STEPS)
    first = alphas[times[STEPS - 1]]
    x, times = first.sqrt() * z + (1 - first).sqrt() * n, times[: STEPS - 1].flip(0)
    for index in range(len(times) - 1):
        sigma = ((1 - alphas[times[index]]) / alphas[times[index]]).sqrt()
        c = share_of(float(times[index]))
        x = (1 - c) * x + c * (z + sigma * n) / (sigma**2 + 1).sqrt()
        assert torch.allclose(sampler.model_wrap_cfg.states[index][1], x, atol=1e-4)
        eps = torch.tanh(x) * (0.4 + times[index] / 2000)
        denoised = (x - sigma / (sigma**2 + 1).sqrt() * eps) * (sigma**2 + 1).sqrt()
        then = alphas[times[index + 1]]
        x = then.sqrt() * denoised + (1 - then).sqrt() * eps
    assert len(sampler.model_wrap_cfg.states) == len(times) - 1
    assert torch.allclose(result, x, atol=1e-4)


def stage_run(plan, z, n):
    return StageRun(Stage(tuple(z.shape[-2:]), 2.0, canvas=plan), 1, None, z, n)


def opened(host, run, name="Euler", **fields):
    """A run of the adapter around a stage, and its sampler, whose denoiser may be called at will."""
    p = SimpleNamespace(seeds=[3, 4], comments={}, comment=print, get_token_merging_ratio=lambda for_hr=False: 0, **fields)
    sampler = LoopSampler(host, name)
    sampler.sampler_extra_args = {"cond": SimpleNamespace(batch=[[0], [0]]), "cond_scale": 2.0}
    made = Run(A1111()._runs, p, request(), run)
    made.begin(sampler)
    return made, sampler


def called(sampler, x, level):
    sampler.model_wrap_cfg(x, torch.full((len(x),), float(level)), **sampler.sampler_extra_args)


def test_the_very_tensor_of_the_sampler_is_changed_at_every_call(host):
    z, n = latents(1), latents(2)
    made, sampler = opened(host, stage_run(CanvasPlan(skip_residual=True, cosines=Cosines(POWER)), z, n))
    for number, sigma in enumerate((14.0, 5.0, 1.0)):
        x = latents(10 + number)
        before = x.clone()
        called(sampler, x, sigma)
        handed, seen = sampler.model_wrap_cfg.states[-1]
        c = share_of(SCHEDULE.timestep(sigma))
        assert handed is x and torch.equal(seen, x)
        assert torch.allclose(x, (1 - c) * before + c * (z + sigma * n), atol=1e-4)
        assert not torch.equal(x, before)
    made.end()
    x = latents(10)
    called(sampler, x, 5.0)
    assert torch.equal(x, latents(10))


@pytest.mark.parametrize("pulls", [True, False])
def test_the_first_call_of_a_timestep_sampler_in_a_stage_begins_exactly_at_its_noise_level(host, pulls):
    z, n = latents(1), latents(2)
    plan = CanvasPlan(skip_residual=pulls, cosines=Cosines(POWER))
    _, sampler = opened(host, stage_run(plan, z, n), "DDIM")
    x, alpha = latents(10), host.shared.sd_model.alphas_cumprod[501]
    called(sampler, x, 501)
    assert torch.allclose(x, alpha.sqrt() * z + (1 - alpha).sqrt() * n, atol=1e-5)
    x, alpha = latents(11), host.shared.sd_model.alphas_cumprod[301]
    called(sampler, x, 301)
    c = share_of(301) if pulls else 0
    assert torch.allclose(x, (1 - c) * latents(11) + c * (alpha.sqrt() * z + (1 - alpha).sqrt() * n), atol=1e-5)


@pytest.mark.parametrize(("name", "fields"), [("Euler", {}), ("DDIM", {"init_images": [0]}), ("DDIM", {"is_hr_pass": True})],
                         ids=["a k-diffusion sampler", "img2img", "the hires pass"])
def test_others_begin_where_the_host_does(host, name, fields):
    _, sampler = opened(host, stage_run(CanvasPlan(), latents(1), latents(2)), name, **fields)
    x = latents(10)
    called(sampler, x, 5)
    assert torch.equal(x, latents(10))


def test_a_state_of_another_size_is_left_alone(host):
    _, sampler = opened(host, stage_run(CanvasPlan(skip_residual=True), latents(1), latents(2)))
    x = latents(10, size=(8, 8))
    called(sampler, x, 5.0)
    assert torch.equal(x, latents(10, size=(8, 8)))


@pytest.mark.parametrize("name", ["Euler", "DDIM"])
def test_a_later_stage_of_txt2img_is_held_to_the_enlarged_first_picture(host, name):
    def result(**settings):
        sampler = LoopSampler(host, name)
        p = job(A1111(), sampler, request(stage_strength=1.0, anchor="nothing", **settings), steps=12, **staged(host))
        x = latents(3)
        drawn = sampler.sample(p, x, None, None, image_conditioning=None)
        return drawn, references[-1]

    references = []
    original = StageRun.pull

    def watched(self, state, moment, scaled):
        references.append(self.reference)
        return original(self, state, moment, scaled)

    StageRun.pull = watched
    try:
        near, reference = result(cosine_1=0.1)
        free, _ = result(skip_residual=False)
    finally:
        StageRun.pull = original
    distance = [float((each - reference).abs().mean() / reference.abs().mean()) for each in (near, free)]
    assert distance[0] < 0.5 * distance[1]
