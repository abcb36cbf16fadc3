"""The order of the controls, and arguments in both forms."""

import pytest

from lib_hires.config import Common, SettingError, UnknownSetting, schema
from lib_hires.methods import methods
from lib_hires.webui.arguments import controls, describe_arguments, read_arguments


def values(**changed):
    """A full positional list of defaults, with some controls changed by key (`__` for the dot)."""
    changed = {key.replace("__", "."): value for key, value in changed.items()}
    return [changed.get(control.key, control.setting.default) for control in controls()]


def test_controls_are_enabled_method_common_and_then_each_method_in_the_order_of_methods():
    owners = [("common", Common), *methods().items()]
    expected = ["enabled", "method"] + [f"{owner}.{row.name}" for owner, cls in owners for row in schema(cls)]
    assert [control.key for control in controls()] == expected


def test_labels_infotext_keys_and_elem_ids_are_unique():
    for names in ([c.setting.label for c in controls()], [c.setting.infotext for c in controls()], [c.elem_id for c in controls()]):
        assert len(set(names)) == len(names)


def test_the_description_has_one_row_for_each_position():
    lines = describe_arguments().splitlines()[2:]
    assert [int(line.split("|")[1]) for line in lines] == list(range(len(controls())))
    assert all(f"`{control.setting.name}`" in line for control, line in zip(controls(), lines))


@pytest.mark.parametrize("args", [[], [False], [False, "HiDiffusion"], [{"enabled": False}], [{"method": "none"}], [True, "none"],
                                  [{"enabled": False, "method": "hidiffusion", "t1": 99}]])
def test_off_is_no_request(args):
    assert read_arguments(args).request is None


def test_the_defaults_are_off():
    assert read_arguments(values()).request is None


def test_a_full_list_takes_the_settings_of_the_chosen_method_only():
    args = values(enabled=True, method="Deep Shrink", common__passes="first pass", deep_shrink__stop2=0.4,
                  hidiffusion__strength=99, hidiffusion__t1="nonsense")
    request = read_arguments(args).request
    assert request.method == methods()["deep_shrink"](stop2=0.4)
    assert request.common == Common(passes="first pass")


def test_a_short_list_keeps_the_defaults_of_what_is_missing():
    assert read_arguments([True]).request.method == methods()["hidiffusion"]()
    assert read_arguments([True, "hidiffusion", "hires pass"]).request.common.passes == "hires pass"


def test_a_dict_names_settings_and_what_follows_is_ignored():
    request = read_arguments([{"method": "HiDiffusion", "strength": "1.2", "passes": "first pass"}, "rubbish", None]).request
    assert request.method == methods()["hidiffusion"](strength=1.2)
    assert request.common.passes == "first pass"


@pytest.mark.parametrize(("args", "error", "words"), [
    (["perhaps"], SettingError, "'enabled' is 'perhaps', must be true or false"),
    ([None, "HiDiffusion"], SettingError, "'enabled' is None"),
    ([True, "hidifusion"], SettingError, "Did you mean 'hidiffusion'"),
    ([{"strength": 1}], SettingError, "'method' is None, must be one of 'none'"),
    ([{"method": "hidiffusion", "stop1": 0.1}], UnknownSetting, "'stop1'"),
    ([{"method": "hidiffusion", "t1": 1.5}], SettingError, "'t1' is 1.5, must be between 0 and 1"),
    (values(enabled=True, method="HiDiffusion", hidiffusion__t1=None), SettingError, "'t1' is None"),
])
def test_wrong_arguments_are_refused_in_words(args, error, words):
    with pytest.raises(error, match="Hires Lab: ") as refused:
        read_arguments(args)
    assert words in str(refused.value)


def test_a_grid_cell_wins_over_the_controls_and_switches_on():
    asked = read_arguments(values(), {"method": "deep_shrink", "deep_shrink.stop2": 0.7, "common.passes": "hires pass"})
    assert asked.request.method == methods()["deep_shrink"](stop2=0.7)
    assert asked.request.common.passes == "hires pass"
    assert asked.notes == ()
    assert read_arguments(values(), {"hidiffusion.t1": 0.2}).request.method.t1 == 0.2
    assert read_arguments([{"method": "hidiffusion", "t1": 0.3}], {"hidiffusion.t1": 0.2}).request.method.t1 == 0.2


def test_a_grid_cell_with_method_none_is_off():
    assert read_arguments(values(enabled=True), {"method": "none", "hidiffusion.t1": 0.2}).request is None


def test_a_grid_value_of_another_method_is_left_out_in_words():
    asked = read_arguments(values(), {"method": "Deep Shrink", "hidiffusion.t1": 0.2})
    assert asked.request.method == methods()["deep_shrink"]()
    assert asked.notes == ("'t1' of HiDiffusion has no effect: the method is Deep Shrink.",)
