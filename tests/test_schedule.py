"""Noise levels: our tables against k-diffusion's, gates against the published step counts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.sampling import Model, external, sampling

from lib_hires.config import HiresError
from lib_hires.config.common import STEP_FRACTION
from lib_hires.schedule import Gate, Level, NoiseSchedule, scaled_linear, steps_of

SCHEDULE = NoiseSchedule()
DENOISERS = {"eps": external.CompVisDenoiser(Model(None)), "v": external.CompVisVDenoiser(Model(None))}
fractions = st.floats(0, 1)
WHOLE = [
    (steps, percent / 100)
    for steps in (10, 20, 25, 40, 50, 100)
    for percent in (16, 20, 30, 40, 50, 70)
    if steps * percent % 100 == 0
]
"""(steps, fraction) where the published count of steps is a whole number."""


def level_of_step(step, steps):
    """The level of a run's step on DDIM's "leading" timesteps with offset 1, as diffusers and the published code take them."""
    timestep = (steps - 1 - step) * (1000 // steps) + 1
    return Level(SCHEDULE.progress(timestep), step, steps)


def open_steps(gate, steps):
    return [step for step in range(steps) if gate.is_open(level_of_step(step, steps))]


# sigma and timestep ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_timesteps_of_sigmas_are_those_of_k_diffusion(prediction):
    denoiser = DENOISERS[prediction]
    sigmas = torch.exp(torch.linspace(math.log(0.02), math.log(20), 400))
    wanted = denoiser.sigma_to_t(sigmas)
    found = torch.tensor([SCHEDULE.timestep(float(sigma)) for sigma in sigmas])
    assert (found - wanted).abs().max() < 2e-2  # k-diffusion's table is fp32


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_sigmas_of_timesteps_are_those_of_k_diffusion(prediction):
    timesteps = torch.linspace(0, 999, 777)
    wanted = DENOISERS[prediction].t_to_sigma(timesteps)
    found = torch.tensor([SCHEDULE.sigma(float(t)) for t in timesteps])
    assert ((found - wanted) / wanted).abs().max() < 1e-4


def test_the_schedule_is_the_one_of_the_models_own_buffer():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    wanted = torch.cumprod(1 - betas, 0)
    assert torch.allclose(torch.tensor(scaled_linear(), dtype=torch.float64), wanted, rtol=1e-12)
    ours = NoiseSchedule(wanted.tolist())
    assert [ours.sigma(t) for t in (0, 500, 999)] == pytest.approx([SCHEDULE.sigma(t) for t in (0, 500, 999)])


@pytest.mark.parametrize(
    ("fraction", "sigma"),
    [
        (0.15, 6.448),
        (0.16, 6.142),
        (0.20, 5.092),
        (0.30, 3.325),
        (0.35, 2.739),
        (0.40, 2.280),
        (0.45, 1.913),
        (0.50, 1.616),
        (0.60, 1.163),
        (0.70, 0.832),
        (0.0, 14.6146),
        (1.0, 0.0292),
    ],
)
def test_the_table_of_sigmas_of_step_fractions_holds(fraction, sigma):
    assert SCHEDULE.sigma(999 * (1 - fraction)) == pytest.approx(sigma, abs=6e-4)
    assert SCHEDULE.progress(SCHEDULE.timestep(sigma)) == pytest.approx(fraction, abs=1e-3)


@given(st.floats(0, 999))
def test_a_timestep_comes_back_from_its_sigma(timestep):
    assert SCHEDULE.timestep(SCHEDULE.sigma(timestep)) == pytest.approx(timestep, abs=1e-6)


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_more_noise_is_never_an_earlier_timestep(first, second):
    low, high = sorted((first, second))
    assert 0 <= SCHEDULE.timestep(low) <= SCHEDULE.timestep(high) <= 999


def test_a_model_with_pure_noise_at_its_end_has_a_last_timestep():
    products = [*scaled_linear()[:-1], 0.0]
    schedule = NoiseSchedule(products)
    assert schedule.sigma(999) == math.inf
    assert 998 <= schedule.timestep(1e9) <= 999 and schedule.timestep(math.inf) == 999
    assert schedule.timestep(schedule.sigma(500)) == pytest.approx(500)


# Gates ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "fraction"), WHOLE)
def test_the_noise_level_opens_the_published_steps_where_they_are_whole(steps, fraction):
    assert open_steps(Gate(fraction), steps) == list(range(round(steps * fraction)))


@given(st.integers(3, 250), fractions)
def test_the_noise_level_and_the_published_floors_differ_by_at_most_one_step(steps, fraction):
    by_noise = len(open_steps(Gate(fraction), steps))
    spread = 1 + math.ceil(steps * (1000 - steps * (1000 // steps)) / 1000)  # leading timesteps start below 999
    assert -spread <= by_noise - int(steps * fraction) <= 1


@given(st.integers(1, 250), fractions, fractions)
def test_the_step_fraction_opens_the_published_floors(steps, start, end):
    wanted = list(range(int(steps * start), int(steps * end)))
    assert open_steps(Gate(end, start, STEP_FRACTION), steps) == wanted


@given(fractions, fractions, st.integers(1, 100))
def test_a_gate_that_starts_where_another_ends_leaves_no_step_out_and_none_twice(first, second, steps):
    middle, end = sorted((first, second))
    for clock in ("noise level", STEP_FRACTION):
        early, late, whole = Gate(middle, 0.0, clock), Gate(end, middle, clock), Gate(end, 0.0, clock)
        assert open_steps(early, steps) + open_steps(late, steps) == open_steps(whole, steps)


@given(fractions)
def test_a_gate_to_the_end_is_never_closed_and_one_of_no_length_never_open(progress):
    assert Gate(1.0).is_open(Level(progress))
    assert not Gate(0.0).is_open(Level(progress)) and not Gate(progress, progress).is_open(Level(progress))
    assert Gate(1.0).ever_open and not Gate(0.0).ever_open and not Gate(0.4, 0.4).ever_open


def test_a_gate_to_the_end_holds_the_last_step_of_the_sampler():
    assert Gate(1.0).is_open(Level(SCHEDULE.progress(SCHEDULE.timestep(0.0))))


@given(st.lists(st.floats(0.001, 100), min_size=2, max_size=8), fractions, fractions)
def test_a_gate_answers_the_same_for_a_level_in_whatever_order_it_is_asked(sigmas, start, end):
    gate = Gate(end, start)
    levels = [Level(SCHEDULE.progress(SCHEDULE.timestep(sigma))) for sigma in sigmas]
    forward = [gate.is_open(level) for level in levels]
    assert [gate.is_open(level) for level in reversed(levels)] == forward[::-1]


def test_img2img_at_low_noise_is_beyond_the_gate_though_its_first_step_is_the_first():
    sigmas = sampling.get_sigmas_karras(20, 0.0292, 14.6146)[15:-1]
    assert not any(Gate(0.4).is_open(Level(SCHEDULE.progress(SCHEDULE.timestep(float(s))), 0, 5)) for s in sigmas)


@given(fractions, st.floats(0.01, 1))
def test_the_share_of_a_gate_rises_from_none_to_all_with_the_noise_level(progress, end):
    gate = Gate(end)
    assert gate.share(Level(0.0)) == 0 and gate.share(Level(end)) == 1 and gate.share(Level(1.0)) == 1
    assert 0 <= gate.share(Level(progress)) <= gate.share(Level(min(1.0, progress + 0.1))) <= 1


def test_a_step_fraction_that_nobody_told_is_an_error_with_advice():
    for level in (Level(0.5), Level(0.5, 3, None), Level(0.5, None, 20), Level(0.5, 3, 0)):
        with pytest.raises(
            HiresError, match=r"'clock' is 'step fraction', but nobody told .* set clock to 'noise level'"
        ):
            steps_of(level)
        with pytest.raises(HiresError):
            Gate(0.5, 0.0, STEP_FRACTION).is_open(level)


def test_a_gate_in_words_names_its_part_of_the_run():
    assert str(Gate(0.4, 0.16)) == "16%-40% of the noise level range"
    assert str(Gate(0.0)) == "never"
