"""Infotext back into the controls."""

import pytest

from lib_hires.config import SettingError
from lib_hires.methods import methods
from lib_hires.request import Request
from lib_hires.webui.arguments import controls, read_arguments
from lib_hires.webui.paste import infotext_names, paste_functions


def paste(keys, before=None):
    """The controls' values after `keys` were pasted over `before` (the defaults)."""
    before = [control.setting.default for control in controls()] if before is None else before
    found = [function(keys) for function in paste_functions()]
    return [old if new is None else new for old, new in zip(before, found)]


REQUESTS = [
    {
        "method": "hidiffusion",
        "strength": 1.35,
        "t1": 0.45,
        "window_end": 0.7,
        "aggressive": "off",
        "passes": "hires pass",
    },
    {"method": "deep_shrink", "stop1": 0.05, "depth2": 7, "upscale": 1.5, "smooth_scaling": False, "native_size": 640},
    {"method": "hidiffusion", "raunet": False},
    {"method": "multidiffusion", "overlap": 0.5, "wrap_x": True, "inside": "window attention"},
    {
        "method": "accdiffusion_v2",
        "edge_end": 0.7,
        "word_share": 0.45,
        "interaction": "channel",
        "max_step": 1.5,
        "jitter": 0.1,
    },
]


@pytest.mark.parametrize("asked", REQUESTS)
def test_what_was_written_comes_back_into_the_controls(asked):
    request = Request.from_dict(asked)
    assert read_arguments(paste({"Steps": "20", **request.to_infotext()})).request == request


@pytest.mark.parametrize("asked", REQUESTS)
def test_values_come_back_in_the_type_of_their_control(asked):
    values = paste(Request.from_dict(asked).to_infotext())
    assert [type(value) for value in values] == [control.setting.kind for control in controls()]


def test_a_picture_without_our_keys_switches_off_and_leaves_the_rest():
    found = [function({"Steps": "20"}) for function in paste_functions()]
    assert found == [False] + [None] * (len(controls()) - 1)


def test_settings_of_other_methods_keep_their_values():
    keys = Request.from_dict({"method": "hidiffusion", "t1": 0.3}).to_infotext()
    found = dict(zip([control.key for control in controls()], [function(keys) for function in paste_functions()]))
    assert found["hidiffusion.t1"] == 0.3
    assert all(value is None for key, value in found.items() if key.startswith("deep_shrink."))


def test_shared_settings_are_pasted_where_the_pictures_method_has_them():
    keys = Request.from_dict({"method": "multidiffusion", "overlap": 0.5}).to_infotext()
    found = dict(zip([control.key for control in controls()], [function(keys) for function in paste_functions()]))
    assert found["views.overlap"] == 0.5 and found["views.view_size"] == 0
    assert all(value is None for key, value in found.items() if key.startswith(("stages.", "windows.", "hidiffusion.")))
    keys = Request.from_dict({"method": "hidiffusion"}).to_infotext()
    found = dict(zip([control.key for control in controls()], [function(keys) for function in paste_functions()]))
    assert all(value is None for key, value in found.items() if key.startswith("views."))


def test_a_picture_from_before_a_setting_was_there_is_pasted_as_it_was_drawn():
    keys = Request.from_dict({"method": "demofusion"}).to_infotext()
    del keys["HL Colour anchor"]
    assert read_arguments(paste(keys)).request.method == methods()["demofusion"](anchor="mean and std")


def test_a_key_that_is_not_written_and_always_was_takes_its_default():
    before = paste(Request.from_dict({"method": "hidiffusion", "t1": 0.3}).to_infotext())
    after = read_arguments(paste({"HL Method": "HiDiffusion", "HL Strength": "1.5"}, before)).request
    assert after.method == methods()["hidiffusion"](strength=1.5)


def test_a_wrong_value_is_refused_in_words():
    keys = {**Request.from_dict({"method": "hidiffusion"}).to_infotext(), "HL T1": "7"}
    with pytest.raises(SettingError, match="'t1' is '7', must be between 0 and 1"):
        paste(keys)


def test_every_key_that_is_written_is_a_paste_field_name():
    written = {key for asked in REQUESTS for key in Request.from_dict(asked).to_infotext()}
    assert written <= set(infotext_names())
    assert len(set(infotext_names())) == len(infotext_names())
