"""Stages with every sampler of the standalone engine: reproducible, and nothing but the hand-off goes from one to the next."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from support import structures
from support.engines import Blind
from torch.nn import functional as F

from lib_hires.canvas.accdiffusion import AccDiffusion
from lib_hires.canvas.demofusion import DemoFusion
from lib_hires.config import Common
from lib_hires.engines import samplers
from lib_hires.engines.drawing import Drawing
from lib_hires.engines.standalone import Job
from lib_hires.plan.models import FAMILIES, Model
from lib_hires.stages.progressive import Progressive

KEEPING = [name for name, each in samplers.SAMPLERS.items() if each.keeps_state]
DEMOFUSION = DemoFusion(stage_strength=0.7, max_step=1.5)
ACCDIFFUSION = AccDiffusion(stage_strength=0.7, word_share=0.0)
SIZE = (16, 12)
JOB = Job("a red star", width=8 * SIZE[1], height=8 * SIZE[0], steps=6, cfg=3.0, seed=3, batch=2)


class Seeing(torch.nn.Module):
    """A UNet in place of a real one that sees its neighbours, the timestep and its words."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(in_channels=4)
        self.kernel = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) / 6

    def forward(self, x, t, encoder_hidden_states, added_cond_kwargs=None, return_dict=False):
        words = encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1)
        return ((F.conv2d(x, self.kernel, padding=1) + words + t / 2000).tanh(),)


def stages_of(method):
    return method.stages(Model(structures.SD1, FAMILIES["sd1"], 64), SIZE, Common())


class Watched(Drawing):
    """A drawing that keeps (stage run, its latents before the anchor) of each stage."""

    def __init__(self, *args, **values):
        super().__init__(*args, **values)
        self.sampled = []

    def sample(self, run):
        latents = super().sample(run)
        self.sampled.append((run, latents.clone()))
        return latents


@torch.no_grad()
def drawn(engine, job, records=None):
    """(the last latents, what was sampled in each stage)."""
    drawing = Watched(engine, job, None, None, stages_of(DEMOFUSION), records or {})
    return drawing.draw(), drawing.sampled


@pytest.fixture(scope="module")
def seeing(components):
    return Blind(replace(components, unet=Seeing()))


@pytest.fixture(scope="module")
def once(seeing):
    """once(sampler): `drawn` of the job, made once."""
    return cache(lambda sampler: drawn(seeing, replace(JOB, sampler=sampler)))


@pytest.mark.parametrize("sampler", KEEPING)
def test_every_sampler_that_is_not_refused_draws_stages_that_can_be_repeated(seeing, once, sampler):
    first, sampled = once(sampler)
    assert [run.number for run, _ in sampled] == [0, 1, 2]
    assert first.shape == (2, 4, *SIZE) and first.isfinite().all() and first.std() > 0.1
    again = seeing.generate(replace(JOB, sampler=sampler), stages=stages_of(DEMOFUSION))
    assert torch.equal(again.latents, first)


@pytest.mark.parametrize("sampler", ("euler_a", "heun", "dpmpp_2m_sde", "ddim_eta1"))
def test_grids_that_exchange_latents_are_repeated_too(seeing, sampler):
    job, stages = replace(JOB, sampler=sampler), stages_of(ACCDIFFUSION)
    first, again = (seeing.generate(job, stages=stages).latents for _ in range(2))
    assert first.isfinite().all() and torch.equal(again, first)
    assert not torch.equal(seeing.generate(replace(job, seed=30), stages=stages).latents, first)


@pytest.mark.parametrize("sampler", KEEPING)
def test_a_later_stage_of_a_run_is_that_stage_alone_from_its_reference_and_noise(seeing, once, sampler):
    """No scheduler's memory and no generator goes over a hand-off."""
    _, sampled = once(sampler)
    for number in (2, 1):
        run, latents = sampled[number]
        alone = Drawing(seeing, replace(JOB, sampler=sampler), None, None, stages_of(DEMOFUSION), {})
        canvas = Progressive(alone.stages, JOB.seeds).canvas(run.stage, number)
        with torch.no_grad():
            again = alone.sample(replace(run, canvas=canvas))
        assert torch.equal(again, latents)


@pytest.mark.parametrize("sampler", KEEPING)
def test_recorded_noise_repeats_the_stages_and_another_for_one_changes_that_one_only(seeing, once, sampler):
    _, sampled = once(sampler)
    noise = {(seed, n): sampled[n][0].noise[index] for n in (1, 2) for index, seed in enumerate(JOB.seeds)}
    changed = noise | {(JOB.seed, 2): -noise[JOB.seed, 2]}
    _, found = drawn(seeing, replace(JOB, sampler=sampler), {"stage noise": changed})
    assert all(torch.equal(found[number][1], sampled[number][1]) for number in (0, 1))
    assert torch.equal(found[2][1][1], sampled[2][1][1])  # the other image
    assert (found[2][1][0] - sampled[2][1][0]).abs().max() > 0.05


@pytest.mark.parametrize("sampler", KEEPING)
def test_an_image_of_a_batch_drawn_in_stages_is_that_image_alone(seeing, once, sampler):
    alone, _ = drawn(seeing, replace(JOB, sampler=sampler, seed=JOB.seed + 1, batch=1))
    torch.testing.assert_close(once(sampler)[0][1:], alone, atol=1e-4, rtol=1e-4)
