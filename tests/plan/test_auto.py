"""Auto: what it chooses follows from the model, the size and the pass, and what was asked for is what is written."""

import pytest
from support import structures

from lib_hires.canvas.demofusion import DemoFusion
from lib_hires.config.common import Common
from lib_hires.methods import methods
from lib_hires.plan.auto import LEAST_STEPS, QUALITY, SPEED, Auto
from lib_hires.plan.method import Wanted
from lib_hires.plan.models import FAMILIES, Model
from lib_hires.plan.tiling import WHOLE_FROM
from lib_hires.request import Request
from lib_hires.unet.hidiffusion import HiDiffusion

SD1 = Model(structures.SD1, FAMILIES["sd1"], 512)
TURBO = Model(structures.sdxl(), FAMILIES["sdxl_turbo"], 512)


def square(model, scale):
    side = round(model.native * scale) // 8
    return side, side


def chosen(model=SD1, aim=QUALITY, scale=2.0, **wanted):
    return Auto(aim=aim).choice(model, Wanted(square(model, scale), **{"steps": 20, **wanted}))


@pytest.mark.parametrize("aim", [QUALITY, SPEED])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.2])
def test_sizes_that_the_model_draws_by_itself_are_left_alone(aim, scale):
    assert chosen(aim=aim, scale=scale).method == "none"


def test_stages_are_taken_where_they_are_worth_their_time():
    assert chosen(scale=WHOLE_FROM + 0.05).method == "demofusion"
    assert chosen(scale=WHOLE_FROM - 0.05).method == "hidiffusion"
    assert chosen(scale=1.5).reason == "768x768 is 1.50 times the native size 512, too little for stages"


@pytest.mark.parametrize("scale", [1.5, 2.0, 3.0, 4.0])
def test_speed_never_takes_stages(scale):
    assert chosen(aim=SPEED, scale=scale).method == "hidiffusion"


def test_stages_are_not_taken_where_they_cannot_be():
    assert chosen(stages=False).method == "hidiffusion"
    assert chosen(model=TURBO).method == "hidiffusion"
    assert chosen(steps=LEAST_STEPS - 1).method == "hidiffusion"
    assert chosen(steps=LEAST_STEPS).method == "demofusion"


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("wanted", [{}, {"stages": False}])
def test_what_is_chosen_exists_and_its_reason_names_both_sizes(scale, wanted):
    choice = chosen(scale=scale, **wanted)
    assert choice.method in {"none", *methods()} and choice.method != "auto"
    assert "native size 512" in choice.reason and f"{int(512 * scale)}x{int(512 * scale)}" in choice.reason


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ((96, 43), "none"),
        ((192, 86), "demofusion"),
        ((32, 512), "hidiffusion"),
        ((64, 512), "demofusion"),
        ((40, 384), "hidiffusion"),
    ],
)
def test_whether_something_is_changed_goes_by_the_area_and_stages_by_the_shorter_side_too(size, name):
    """768x344 has the native area; 4096x256 twice it, but its first stage would be itself."""
    wanted = Wanted(size, 20)
    assert Auto().choice(SD1, wanted).method == name
    if name == "demofusion":
        stages = DemoFusion().stages(SD1, size, Common())
        assert len(stages) > 1 and stages[-1].size == size


def test_what_hidiffusion_is_chosen_for_it_changes():
    """Auto and the methods know one and the same scale from which something is to be done."""
    for scale in (1.2, 1.25, 1.3, 1.5):
        size = square(SD1, scale)
        does_nothing = HiDiffusion(window_attention=False).plan(SD1, size, Common()).does_nothing
        assert (chosen(scale=scale).method == "none") == does_nothing


def test_a_resolved_request_draws_by_what_was_chosen_and_writes_what_was_asked():
    asked = Request.from_dict({"method": "auto", "aim": "speed", "passes": "hires pass"})
    resolved = asked.resolved(SD1, Wanted(square(SD1, 2), 20))
    assert resolved.method.name == "hidiffusion" and resolved.common == asked.common
    assert resolved.to_dict() == asked.to_dict()
    assert resolved.to_argv() == asked.to_argv()
    keys = resolved.to_infotext()
    assert keys["HL Method"] == "Auto" and keys["HL Chosen"] == "HiDiffusion" and keys["HL Aim"] == "speed"
    assert Request.from_infotext(keys) == asked
    assert resolved.note.startswith("Auto chose HiDiffusion: 1024x1024 is 2.00 times the native size 512")


def test_plain_sampling_can_be_chosen_and_is_said():
    resolved = Request.from_dict({"method": "auto"}).resolved(SD1, Wanted(square(SD1, 1), 20))
    assert resolved.method is None and resolved.chosen == "none"
    assert resolved.note.startswith("Auto chose plain sampling: 512x512 is 1.00")
    assert resolved.to_infotext()["HL Method"] == "Auto"


def test_a_method_that_was_named_stays():
    asked = Request.from_dict({"method": "deep_shrink"})
    assert asked.resolved(SD1, Wanted(square(SD1, 2), 20)) is asked
    assert not asked.note and not asked.chosen and not asked.is_automatic
