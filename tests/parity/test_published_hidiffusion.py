"""Our HiDiffusion against recordings of the published one: same weights, same inputs, same shifts, same output.

The calls are made in reverse order of the recorded run: nothing is counted, so the order cannot matter. Of the runs on
large maps, which take minutes, the first recorded call is made.
"""

import math

import pytest
import reference
from reference import CASES

from lib_hires import HiDiffusion, Session
from lib_hires.config import Common
from lib_hires.config.common import NOISE_LEVEL, STEP_FRACTION

TOLERANCE = 2e-5
"""Of the output's maximum; fp32 rounding of the published code is at most 2e-6, and every part moves it by 1e-2."""
PATCHED = [case for case in CASES if case.raunet or case.window_attention]
LARGE = [case for case in PATCHED if case.calls is not None]
RUNS = [
    *((case, clock) for case in PATCHED if case not in LARGE for clock in (STEP_FRACTION, NOISE_LEVEL)),
    *((case, STEP_FRACTION) for case in LARGE),
]


def common_of(case, clock):
    """The family by the name that the published code reads. It shrinks at any size, we from a scale of `min_scale` on;
    so small recordings are taken for twice the native size."""
    height, width = case.latent_size
    real = 128 if case.layout.startswith("sdxl") else 64
    native = 0 if math.sqrt(height * width) >= 1.25 * real else 4 * round(math.sqrt(height * width))
    return Common(
        family="sdxl_turbo" if case.name_or_path == reference.TURBO_NAME else "auto", native_size=native, clock=clock
    )


def settings_of(case):
    playground = case.name_or_path == reference.PLAYGROUND_NAME
    return HiDiffusion(
        raunet=case.raunet,
        window_attention=case.window_attention,
        min_scale=1,
        aggressive="off" if playground else "auto",
    )


@pytest.mark.parametrize(("case", "clock"), RUNS, ids=lambda value: getattr(value, "name", value))
def test_every_recorded_call_of_the_published_code_is_reproduced(case, clock):
    unet, recorded, errors, asked = reference.build_unet(case.layout), reference.load_outputs(case), {}, set()

    def shift(_seed, timestep, layer):
        asked.add(layer)
        return case.shift_index(case.timesteps.index(timestep), layer)

    with Session(unet, [settings_of(case)], common_of(case, clock), record=shift) as session:
        for step in sorted(case.recorded[:1] if case in LARGE else case.recorded, reverse=True):
            if clock == STEP_FRACTION:
                session.at(timestep=case.timesteps[step], step=step, steps=case.num_steps)
            output = reference.call_unet(unet, case.inputs(step))
            errors[step] = reference.relative_error(case.pick(output), recorded[step])
    assert max(errors.values()) < TOLERANCE, errors
    entry = reference.manifest()["cases"][case.name]
    assert len(asked) == len(entry["seen"]["window_attention_blocks"])


@pytest.mark.parametrize("case", [case for case in PATCHED if case not in LARGE], ids=lambda case: case.name)
def test_the_operations_act_in_the_calls_in_which_they_were_seen_to_act(case):
    unet, seen = reference.build_unet(case.layout), reference.manifest()["cases"][case.name]["seen"]
    common = common_of(case, STEP_FRACTION)
    session, acting = Session(unet, [settings_of(case)], common), {"stride": [], "pool": []}
    for step in range(case.num_steps):
        session.at(timestep=case.timesteps[step], step=step, steps=case.num_steps)
        for edit in session.plan_for(case.latent_size).edits:
            if edit.gate.is_open(session._told):
                acting["pool" if type(edit).__name__ == "Pool" else "stride"].append(step)
    assert acting == {"stride": seen["dconv_active"], "pool": seen["pool_active"]}
    assert session.notes == []


@pytest.mark.parametrize("case", [case for case in CASES if case not in PATCHED], ids=lambda case: case.name)
def test_the_unpatched_networks_are_those_of_the_recording(case):
    unet, recorded = reference.build_unet(case.layout), reference.load_outputs(case)
    assert reference.weights_digest(unet) == reference.manifest()["layouts"][case.layout]["weights_sha256"]
    for step in case.recorded:
        assert (
            reference.relative_error(case.pick(reference.call_unet(unet, case.inputs(step))), recorded[step])
            < TOLERANCE
        )
