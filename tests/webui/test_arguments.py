"""The order of the controls, and arguments in both forms."""

import pytest

from lib_hires.config import Common, SettingError, UnknownSetting, schema
from lib_hires.methods import methods
from lib_hires.plan.method import owned_rows, owners
from lib_hires.webui.arguments import all_owners, controls, describe_arguments, owners_of, read_arguments, settings_of


def values(**changed):
    """A full positional list of defaults, with some controls changed by key (`__` for the dot)."""
    changed = {key.replace("__", "."): value for key, value in changed.items()}
    return [changed.get(control.key, control.setting.default) for control in controls()]


def test_controls_are_enabled_method_common_then_each_methods_own_and_then_what_methods_share():
    keys = [control.key for control in controls()]
    own = [f"{name}.{row.name}" for name, cls in methods().items() for owner, row in owned_rows(cls) if owner == name and not row.since]
    first = ["enabled", "method", *(f"common.{row.name}" for row in schema(Common)), *own]
    assert keys[: len(first)] == first
    assert keys[-3:] == ["auto.aim", "stages.anchor", "mixture_of_diffusers.published"]
    assert list(dict.fromkeys(key.split(".")[0] for key in keys[len(first) : -3])) == ["windows", "stages", "views"]


def test_settings_that_came_later_have_numbers_of_their_own_and_stand_last_in_their_order():
    since = [control.setting.since for control in controls()]
    later = [number for number in since if number]
    assert since == sorted(since) and len(set(later)) == len(later)
    assert all(control.setting.since for control in controls() if control.setting.before is not None)


def test_a_list_from_before_a_setting_keeps_the_places_of_all_others():
    found = read_arguments(values(enabled=True, method="DemoFusion", views__overlap=0.25)[:-3]).request.method
    assert (found.overlap, found.anchor) == (0.25, "auto")


@pytest.mark.parametrize("name", list(methods()))
def test_every_setting_of_a_method_has_exactly_one_control_among_those_of_its_owners(name):
    found = [control.setting for owner in owners(methods()[name]) for control in settings_of(owner)]
    assert sorted(row.name for row in found) == sorted(row.name for row in schema(methods()[name]))
    assert set(found) == set(schema(methods()[name]))


def test_a_shared_setting_has_one_control():
    assert [control.key for control in controls() if control.setting.name == "overlap"] == ["views.overlap"]
    assert len({control.key for control in controls()}) == len(controls())
    assert all_owners()[-3:] == ("windows", "stages", "views")
    assert owners_of(methods()["demofusion"]) == ("common", "stages", "views") and owners_of(None) == ("common",)


def test_labels_infotext_keys_and_elem_ids_are_unique():
    for names in (
        [c.setting.label for c in controls()],
        [c.setting.infotext for c in controls()],
        [c.elem_id for c in controls()],
    ):
        assert len(set(names)) == len(names)


def test_the_description_has_one_row_for_each_position():
    lines = describe_arguments().splitlines()[2:]
    assert [int(line.split("|")[1]) for line in lines] == list(range(len(controls())))
    assert all(f"`{control.setting.name}`" in line for control, line in zip(controls(), lines))
    of = {control.key: line.split("|")[3].strip() for control, line in zip(controls(), lines)}
    assert (of["views.overlap"], of["stages.max_step"], of["hidiffusion.t1"]) == ("Views", "Stages", "HiDiffusion")


@pytest.mark.parametrize(
    "args",
    [
        [],
        [False],
        [False, "HiDiffusion"],
        [{"enabled": False}],
        [{"method": "none"}],
        [True, "none"],
        [{"enabled": False, "method": "hidiffusion", "t1": 99}],
    ],
)
def test_off_is_no_request(args):
    assert read_arguments(args).request is None


def test_the_defaults_are_off():
    assert read_arguments(values()).request is None


def test_a_full_list_takes_the_settings_of_the_chosen_method_only():
    args = values(
        enabled=True,
        method="Deep Shrink",
        common__passes="first pass",
        deep_shrink__stop2=0.4,
        hidiffusion__strength=99,
        hidiffusion__t1="nonsense",
    )
    request = read_arguments(args).request
    assert request.method == methods()["deep_shrink"](stop2=0.4)
    assert request.common == Common(passes="first pass")


def test_a_full_list_takes_shared_settings_for_every_method_that_has_them():
    args = values(enabled=True, method="DemoFusion", views__overlap=0.75, stages__max_step=1.5, windows__word_share=99)
    assert read_arguments(args).request.method == methods()["demofusion"](overlap=0.75, max_step=1.5)
    args[1] = "MultiDiffusion"
    assert read_arguments(args).request.method == methods()["multidiffusion"](overlap=0.75)
    args[1] = "HiDiffusion"
    assert read_arguments(args).request.method == methods()["hidiffusion"]()
    args[1] = "AccDiffusion v2"
    with pytest.raises(SettingError, match="'word_share' is 99"):
        read_arguments(args)


def test_a_short_list_keeps_the_defaults_of_what_is_missing():
    assert read_arguments([True]).request.method == methods()["auto"]()
    assert read_arguments([True, "hidiffusion", "hires pass"]).request.common.passes == "hires pass"


def test_a_dict_names_settings_and_what_follows_is_ignored():
    request = read_arguments(
        [{"method": "HiDiffusion", "strength": "1.2", "passes": "first pass"}, "rubbish", None]
    ).request
    assert request.method == methods()["hidiffusion"](strength=1.2)
    assert request.common.passes == "first pass"


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        (["perhaps"], SettingError, "'enabled' is 'perhaps', must be true or false"),
        ([None, "HiDiffusion"], SettingError, "'enabled' is None"),
        ([True, "hidifusion"], SettingError, "Did you mean 'hidiffusion'"),
        ([{"strength": 1}], SettingError, "'method' is None, must be one of 'none'"),
        ([{"method": "hidiffusion", "stop1": 0.1}], UnknownSetting, "'stop1'"),
        ([{"method": "hidiffusion", "t1": 1.5}], SettingError, "'t1' is 1.5, must be between 0 and 1"),
        (values(enabled=True, method="HiDiffusion", hidiffusion__t1=None), SettingError, "'t1' is None"),
    ],
)
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


def test_a_grid_cell_of_one_methods_setting_takes_the_place_of_auto_only():
    assert read_arguments(values(enabled=True), {"deep_shrink.stop2": 0.7}).request.method.stop2 == 0.7
    assert read_arguments(values(enabled=True), {"auto.aim": "speed"}).request.method == methods()["auto"](aim="speed")
    assert read_arguments(values(enabled=True), {"views.overlap": 0.7}).request.method == methods()["auto"]()
    both = read_arguments(values(enabled=True), {"deep_shrink.stop2": 0.7, "hidiffusion.t1": 0.2})
    assert both.request.method == methods()["auto"]() and len(both.notes) == 2
    named = read_arguments(values(enabled=True), {"method": "auto", "deep_shrink.stop2": 0.7})
    assert named.request.method == methods()["auto"]() and len(named.notes) == 1
    over = read_arguments([{"method": "auto", "aim": "speed", "passes": "hires pass"}], {"deep_shrink.stop2": 0.7})
    assert over.request.method.stop2 == 0.7 and over.request.common.passes == "hires pass"
    other = read_arguments(values(enabled=True, method="HiDiffusion"), {"deep_shrink.stop2": 0.7})
    assert other.request.method == methods()["hidiffusion"]() and len(other.notes) == 1


def test_a_grid_cell_with_method_none_is_off():
    assert read_arguments(values(enabled=True), {"method": "none", "hidiffusion.t1": 0.2}).request is None


def test_a_grid_value_of_another_method_is_left_out_in_words():
    asked = read_arguments(values(), {"method": "Deep Shrink", "hidiffusion.t1": 0.2})
    assert asked.request.method == methods()["deep_shrink"]()
    assert asked.notes == ("'t1' of HiDiffusion has no effect: the method is Deep Shrink.",)


def test_a_grid_value_that_methods_share_counts_for_those_that_have_it():
    asked = read_arguments(values(), {"method": "AccDiffusion v2", "views.overlap": 0.6, "windows.word_share": 0.5})
    assert (asked.request.method.overlap, asked.request.method.word_share, asked.notes) == (0.6, 0.5, ())
    asked = read_arguments(values(), {"method": "MultiDiffusion", "views.overlap": 0.6, "stages.max_step": 1.5})
    assert asked.request.method == methods()["multidiffusion"](overlap=0.6)
    assert asked.notes == ("'max_step' of Stages has no effect: the method is MultiDiffusion.",)
