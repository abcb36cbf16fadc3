"""The written forms of settings: each is read back as exactly what was written."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lib_hires.config import AUTO, Common, HiresError, SettingError, schema
from lib_hires.config.codecs import format_value, from_argv, from_infotext, table, to_argv, to_infotext
from lib_hires.methods import find_method, methods
from lib_hires.request import Request

CLASSES = [Common, *methods().values()]
WEBUI_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""A1111's grammar of infotext: `key: value`, separated by commas."""


def values_of(row):
    """Any allowed value of a setting."""
    if row.kind is bool:
        return st.booleans()
    if row.choices:
        return st.sampled_from(row.choices)
    numbers = st.integers(row.low, row.high) if row.kind is int else st.floats(row.low, row.high)
    return numbers | st.just(AUTO) if row.auto else numbers


def settings_of(cls):
    """Any valid settings of a class; what its rules refuse in combination is left out."""

    def make(values):
        try:
            return cls.from_dict(values)
        except SettingError:
            assume(False)

    return st.fixed_dictionaries({row.name: values_of(row) for row in schema(cls)}).map(make)


requests = st.builds(Request, st.one_of(*(settings_of(cls) for cls in methods().values())), settings_of(Common))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@given(data=st.data())
def test_settings_are_the_same_after_every_round_trip(cls, data):
    settings = data.draw(settings_of(cls))
    assert cls.from_dict(settings.to_dict()) == settings
    assert from_infotext(cls, to_infotext(settings)) == settings
    assert cls.from_dict(from_argv(to_argv(settings))) == settings


@given(requests)
def test_a_request_is_the_same_after_every_round_trip(request):
    assert Request.from_dict(request.to_dict()) == request
    assert Request.from_infotext(request.to_infotext()) == request
    assert Request.from_argv(request.method.name, request.to_argv()) == request


@given(requests)
def test_a_request_survives_the_webuis_infotext_grammar(request):
    line = ", ".join(
        ["Steps: 20", *(f"{key}: {value}" for key, value in request.to_infotext().items()), "Size: 512x512"]
    )
    keys = dict(WEBUI_PARAMETER.findall(line))
    assert keys["Steps"] == "20" and keys["Size"] == "512x512"
    assert Request.from_infotext(keys) == request


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_written_number_is_read_as_the_same_number(value):
    assert float(format_value(value)) == value


def test_numbers_are_written_short():
    assert [format_value(v) for v in (1.0, 0.4, 1.25, 8 / 50, True, 3, "bicubic")] == [
        "1",
        "0.4",
        "1.25",
        "0.16",
        "True",
        "3",
        "bicubic",
    ]


def test_infotext_holds_every_setting_so_that_a_later_default_changes_no_old_picture():
    for cls in CLASSES:
        assert list(to_infotext(cls())) == [row.infotext for row in schema(cls)]


def test_an_absent_infotext_key_that_always_was_leaves_its_default():
    assert from_infotext(Common, {"HL Threshold": "2.5", "Steps": "20"}) == Common(threshold=2.5)


def test_a_picture_from_before_a_setting_was_there_is_read_as_it_was_drawn():
    old = {key: value for key, value in to_infotext(find_method("demofusion")()).items() if key != "HL Colour anchor"}
    assert from_infotext(find_method("demofusion"), old).anchor == "mean and std"
    assert find_method("demofusion")().anchor == "auto"


def test_plain_sampling_writes_nothing_and_is_read_from_nothing():
    assert Request().to_infotext() == {}
    assert Request.from_infotext({"Steps": "20"}) == Request()
    assert Request.from_dict({}) == Request.from_dict({"method": "none"}) == Request()


def test_the_command_line_writes_what_differs_from_the_defaults_only():
    cls = find_method("hidiffusion")
    assert to_argv(cls()) == []
    assert to_argv(cls(t1=0.5, window_attention=False)) == ["window_attention=False", "t1=0.5"]


@pytest.mark.parametrize("piece", ["t1", "", "=5", " =5"])
def test_a_piece_without_name_and_value_is_refused_with_an_example(piece):
    with pytest.raises(HiresError, match=r"has no 'name=value' form. Write for example --set strength=1.2"):
        from_argv([piece])


def test_a_value_may_hold_an_equals_sign():
    assert from_argv(["a = b=c "]) == {"a": "b=c"}


def test_a_request_refuses_the_settings_of_another_method_by_name():
    with pytest.raises(HiresError, match=r"'depth1' .* is not a setting of HiDiffusion"):
        Request.from_dict({"method": "hidiffusion", "depth1": 3})
    with pytest.raises(HiresError, match=r"'t1' .* is not a setting of method 'none'"):
        Request.from_dict({"t1": 0.5})


def test_the_documentation_table_has_a_row_for_each_setting():
    for cls in CLASSES:
        rows = table(cls).splitlines()[2:]
        assert [row.split("|")[1].strip() for row in rows] == [f"`{row.name}`" for row in schema(cls)]
        assert all(row.count("|") == 5 for row in rows)
