"""The schema of every settings class and the checks of its values."""

import math
import re
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.config import AUTO, Common, HiresError, SettingError, Settings, UnknownSetting, schema, setting
from lib_hires.methods import methods
from lib_hires.plan.method import owned_rows

CLASSES = [Common, *methods().values()]
ROWS = [(cls, row) for cls in CLASSES for row in schema(cls)]
NUMBERS = [(cls, row) for cls, row in ROWS if row.kind in (int, float)]


def named(pair):
    return f"{pair[0].__name__}.{pair[1].name}"


@dataclass(frozen=True)
class Sample(Settings):
    """One setting of each kind."""

    title = "the sample"
    amount: float = setting(0.5, "Amount", "A number.", low=0.0, high=2.0)
    chosen: float = setting(AUTO, "Chosen", "A number or automatic.", low=0.0, high=2.0, auto=True)
    count: int = setting(4, "Count", "A whole number.", low=1, high=1000)
    switch: bool = setting(True, "Switch", "A switch.")
    mode: str = setting("slow", "Mode", "A choice.", choices=("slow", "very fast"))


@pytest.mark.parametrize("pair", ROWS, ids=named)
def test_every_setting_has_a_label_and_a_sentence_of_help(pair):
    _, row = pair
    assert re.fullmatch(r"[A-Z]\w[\w \-/]*", row.label)
    assert re.fullmatch(r"[A-Z'].{15,}\.", row.help)


def test_infotext_keys_are_unique_over_all_methods_and_can_be_read_by_the_webui():
    owned = {(owner, row.name): row for cls in methods().values() for owner, row in owned_rows(cls)}
    keys = [row.infotext for row in (*schema(Common), *owned.values())]
    assert len(keys) == len(set(keys))
    assert [key for key in keys if not re.fullmatch(r"\w[\w \-/]+", key)] == []


def test_no_method_has_a_setting_of_the_same_name_as_a_common_one():
    common = {row.name for row in schema(Common)} | {"method"}
    assert [named(pair) for pair in ROWS if pair[0] is not Common and pair[1].name in common] == []


@pytest.mark.parametrize("pair", NUMBERS, ids=named)
def test_every_number_has_a_range_that_holds_its_default_and_a_step(pair):
    _, row = pair
    assert row.low < row.high and 0 < row.step <= row.high - row.low
    assert row.low <= row.default <= row.high or (row.auto and row.default == AUTO)


@pytest.mark.parametrize("pair", NUMBERS, ids=named)
def test_a_number_beyond_its_range_is_refused_with_name_value_range_and_advice(pair):
    cls, row = pair
    for value, advice in ((row.low - 7, "Raise it."), (row.high + 7, "Lower it.")):
        with pytest.raises(SettingError) as caught:
            cls.from_dict({row.name: value})
        text = str(caught.value)
        assert text.startswith(f"Hires Lab: '{row.name}' is {value}, must be ") and text.endswith(advice)
        assert f"{row.low:g}" in text and f"{row.high:g}" in text
        assert (caught.value.setting, caught.value.value) == (row.name, value)


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        "nan",
        "inf",
        "-inf",
        pytest.param(10**400, id="huge"),
        "",
        "x",
        None,
        [],
        True,
        1j,
    ],
)
@pytest.mark.parametrize("name", ["amount", "chosen", "count"])
def test_what_is_no_finite_number_is_refused_for_a_number(name, value):
    with pytest.raises(SettingError, match=f"'{name}' is"):
        Sample.from_dict({name: value})


@pytest.mark.parametrize("value", [2.5, "2.5", "2,5"])
def test_a_fraction_is_refused_for_a_whole_number(value):
    with pytest.raises(SettingError, match="must be a whole number between 1 and 1000"):
        Sample(count=value)


@pytest.mark.parametrize("value", [2, -1, 0.0, "maybe", None, [], "2"])
def test_what_is_neither_true_nor_false_is_refused_for_a_switch(value):
    with pytest.raises(SettingError, match=r"'switch' is .* must be true or false"):
        Sample(switch=value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("amount", "1.25", 1.25),
        ("amount", " 1e-2 ", 0.01),
        ("amount", 1, 1.0),
        ("count", "12", 12),
        ("count", 12.0, 12),
        ("chosen", "auto", AUTO),
        ("chosen", "Auto", AUTO),
        ("chosen", "-1", AUTO),
        ("switch", "ON", True),
        ("switch", "no", False),
        ("switch", 0, False),
        ("mode", " Very Fast ", "very fast"),
    ],
)
def test_texts_are_read_as_people_write_them(name, text, value):
    read = getattr(Sample.from_dict({name: text}), name)
    assert read == value and type(read) is type(value)


def test_automatic_is_refused_for_a_number_that_has_no_automatic_value():
    for value in ("auto", AUTO):
        with pytest.raises(SettingError, match="'amount' is"):
            Sample(amount=value)


def test_a_wrong_choice_names_the_choices_and_suggests_the_nearest():
    with pytest.raises(
        SettingError, match=r"'mode' is 'very fats', must be one of 'slow', 'very fast'\. Did you mean 'very fast'\?"
    ):
        Sample(mode="very fats")
    with pytest.raises(SettingError) as caught:
        Sample(mode="#")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("pair", ROWS, ids=named)
def test_a_name_that_is_no_setting_is_refused_and_the_nearest_name_suggested(pair):
    cls, row = pair
    with pytest.raises(UnknownSetting) as caught:
        cls.from_dict({row.name + "z": 1})
    text = str(caught.value)
    assert f"'{row.name}z' (given as 1) is not a setting of {cls.title}. Did you mean '{row.name}'?" in text
    assert all(other.name in text for other in schema(cls))


def test_settings_cannot_be_changed_after_they_were_checked():
    with pytest.raises(AttributeError):
        Sample().amount = 5.0


def test_every_error_is_a_hires_error_and_says_so_once():
    error = SettingError("a", 1, "more")
    assert isinstance(error, HiresError) and isinstance(error, ValueError)
    assert str(HiresError(str(error))) == str(error) == "Hires Lab: 'a' is 1, must be more."


@given(st.floats(allow_nan=True, allow_infinity=True) | st.integers() | st.text() | st.booleans() | st.none())
def test_any_value_is_either_refused_or_within_the_range(value):
    try:
        amount = Sample(amount=value).amount
    except SettingError:
        return
    assert type(amount) is float and 0 <= amount <= 2


@pytest.mark.parametrize(
    ("passes", "is_hires", "size", "wanted"),
    [
        ("first pass", False, (512, 512), True),
        ("first pass", True, (512, 512), False),
        ("hires pass", False, (512, 512), False),
        ("hires pass", True, (512, 512), True),
        ("both passes", False, (64, 64), True),
        ("both passes", True, (64, 64), True),
        ("above threshold", False, (1000, 1000), True),
        ("above threshold", True, (1000, 999), False),
    ],
)
def test_passes_says_which_pass_is_changed(passes, is_hires, size, wanted):
    assert Common(passes=passes, threshold=1.0).wants_pass(is_hires, *size) is wanted
