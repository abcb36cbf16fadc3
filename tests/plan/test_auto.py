"""Auto: what it chooses follows from the model, the size and the pass, and what was asked for is what is written."""

import pytest
from support import structures

from lib_hires.methods import methods
from lib_hires.plan.auto import ALONE, QUALITY, SPEED, STAGED, Auto
from lib_hires.plan.method import Wanted
from lib_hires.plan.models import FAMILIES, Model
from lib_hires.request import Request

SD1 = Model(structures.SD1, FAMILIES["sd1"], 512)
TURBO = Model(structures.sdxl(), FAMILIES["sdxl_turbo"], 512)


def square(model, scale):
    side = round(model.native * scale) // 8
    return side, side


def chosen(model=SD1, aim=QUALITY, scale=2.0, **wanted):
    return Auto(aim=aim).choice(model, Wanted(square(model, scale), **wanted))


@pytest.mark.parametrize("aim", [QUALITY, SPEED])
@pytest.mark.parametrize("scale", [0.5, 1.0, ALONE])
def test_sizes_that_the_model_draws_by_itself_are_left_alone(aim, scale):
    assert chosen(aim=aim, scale=scale).method == "none"


def test_stages_are_taken_where_they_are_worth_their_time():
    assert chosen(scale=STAGED + 0.05).method == "demofusion"
    assert chosen(scale=STAGED - 0.05).method == "hidiffusion"


@pytest.mark.parametrize("scale", [1.5, 2.0, 3.0, 4.0])
def test_speed_never_takes_stages(scale):
    assert chosen(aim=SPEED, scale=scale).method == "hidiffusion"


def test_stages_are_not_taken_where_they_cannot_be():
    assert chosen(stages=False).method == "hidiffusion"
    assert chosen(model=TURBO).method == "hidiffusion"
    assert chosen(started=True).method == "hidiffusion"


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("wanted", [{}, {"started": True}, {"stages": False}])
def test_what_is_chosen_exists_and_its_reason_names_both_sizes(scale, wanted):
    choice = chosen(scale=scale, **wanted)
    assert choice.method in {"none", *methods()} and choice.method != "auto"
    assert "native size 512" in choice.reason and f"{int(512 * scale)}x{int(512 * scale)}" in choice.reason


def test_a_portrait_is_judged_by_its_area():
    assert chosen_size((96, 43)).method == "none"  # 768x344 has 1.00 of the native area
    assert chosen_size((192, 86)).method == "demofusion"


def chosen_size(size):
    return Auto().choice(SD1, Wanted(size))


def test_a_resolved_request_draws_by_what_was_chosen_and_writes_what_was_asked():
    asked = Request.from_dict({"method": "auto", "aim": "speed", "passes": "hires pass"})
    resolved = asked.resolved(SD1, Wanted(square(SD1, 2)))
    assert resolved.method.name == "hidiffusion" and resolved.common == asked.common
    assert resolved.to_dict() == asked.to_dict()
    assert resolved.to_argv() == asked.to_argv()
    keys = resolved.to_infotext()
    assert keys["HL Method"] == "Auto" and keys["HL Chosen"] == "HiDiffusion" and keys["HL Aim"] == "speed"
    assert Request.from_infotext(keys) == asked
    assert resolved.note.startswith("Auto chose HiDiffusion: 1024x1024 is 2.00 times the native size 512")


def test_plain_sampling_can_be_chosen_and_is_said():
    resolved = Request.from_dict({"method": "auto"}).resolved(SD1, Wanted(square(SD1, 1)))
    assert resolved.method is None and resolved.chosen == "none"
    assert resolved.note.startswith("Auto chose plain sampling: 512x512 is 1.00")
    assert resolved.to_infotext()["HL Method"] == "Auto"


def test_a_method_that_was_named_stays():
    asked = Request.from_dict({"method": "deep_shrink"})
    assert asked.resolved(SD1, Wanted(square(SD1, 2))) is asked
    assert not asked.note and not asked.chosen and not asked.is_automatic
