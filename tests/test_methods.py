"""Methods are found by looking, under every way to write their names."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
from support import structures

import lib_hires
from lib_hires.config import Common, SettingError, schema, setting
from lib_hires.methods import find_method, methods
from lib_hires.plan.method import Method, owned_rows, owners
from lib_hires.plan.models import FAMILIES, Model

CANVAS = {"multidiffusion", "mixture_of_diffusers", "demofusion", "accdiffusion", "accdiffusion_v2"}


def test_all_methods_are_found_and_named_by_their_classes():
    assert set(methods()) == {"auto", "deep_shrink", "hidiffusion", *CANVAS}
    assert all(cls.name == name for name, cls in methods().items())


@pytest.mark.parametrize("text", ["hidiffusion", "HiDiffusion", " hi-diffusion ", "HI_DIFFUSION"])
def test_a_method_is_found_in_any_writing(text):
    assert find_method(text).name == "hidiffusion"


@pytest.mark.parametrize("text", ["Deep Shrink", "deep_shrink", "deepshrink", "DEEP-SHRINK"])
def test_titles_are_understood_as_well_as_names(text):
    assert find_method(text).name == "deep_shrink"


@pytest.mark.parametrize("text", ["none", "None", " NONE"])
def test_none_is_plain_sampling(text):
    assert find_method(text) is None


def test_an_unknown_method_names_the_known_ones_and_the_nearest():
    with pytest.raises(SettingError) as caught:
        find_method("hidifusion")
    assert "'method' is 'hidifusion', must be one of 'none', " in str(caught.value)
    assert str(caught.value).endswith("Did you mean 'hidiffusion'?")


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_says_what_it_does_when_to_use_it_and_where_it_comes_from(name):
    cls = methods()[name]
    assert cls.title and cls.summary and cls.use_when and cls.source and cls.__doc__


def test_every_method_can_be_had_from_the_package():
    for cls in methods().values():
        assert getattr(lib_hires, cls.__name__) is cls and cls.__name__ in lib_hires.__all__


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hidiffusion", ("hidiffusion",)),
        ("multidiffusion", ("views",)),
        ("mixture_of_diffusers", ("mixture_of_diffusers", "views")),
        ("demofusion", ("stages", "views")),
        ("accdiffusion", ("windows", "stages", "views")),
        ("accdiffusion_v2", ("accdiffusion_v2", "windows", "stages", "views")),
    ],
)
def test_the_owners_of_settings_are_the_method_and_the_groups_that_it_shares_nearest_first(name, expected):
    assert owners(methods()[name]) == expected


def test_a_setting_belongs_to_the_class_that_declares_it():
    found = {row.name: owner for owner, row in owned_rows(methods()["accdiffusion_v2"])}
    assert (found["overlap"], found["max_step"], found["word_share"], found["edge_end"]) == (
        "views",
        "stages",
        "windows",
        "accdiffusion_v2",
    )
    assert [row for _, row in owned_rows(methods()["accdiffusion_v2"])] == list(schema(methods()["accdiffusion_v2"]))


def test_a_setting_that_is_declared_anew_belongs_to_its_nearest_class_and_a_group_is_not_inherited():
    @dataclass(frozen=True)
    class Base(Method):
        group: ClassVar[str] = "base"
        kept: float = setting(0.5, "Kept", "Stays with the base class.", low=0.0, high=1.0)
        changed: float = setting(0.5, "Changed", "Is declared by both.", low=0.0, high=1.0)

    @dataclass(frozen=True)
    class Nearest(Base):
        name: ClassVar[str] = "nearest"
        changed: float = setting(0.7, "Changed here", "Is declared by both.", low=0.0, high=1.0)

    assert [(owner, row.name) for owner, row in owned_rows(Nearest)] == [("base", "kept"), ("nearest", "changed")]
    assert owners(Nearest) == ("nearest", "base")


def test_a_group_is_the_same_for_every_method_and_has_a_name_of_its_own():
    shared = {}
    for name, cls in methods().items():
        for group in owners(cls):
            assert group == name or group not in {*methods(), "common", ""}
            rows = [row for owner, row in owned_rows(cls) if owner == group]
            assert shared.setdefault(group, rows) == rows


@pytest.mark.parametrize(
    ("name", "scale", "evaluations"),
    [
        ("multidiffusion", 2, 81),
        ("mixture_of_diffusers", 2, 9),
        ("demofusion", 2, 9 + 4),
        ("demofusion", 3, 25 + 9),
        ("demofusion", 4, 49 + 16),
        ("accdiffusion", 2, 9 + 4),
        ("accdiffusion_v2", 2, 9 + 4),
    ],
)
def test_a_step_takes_as_many_evaluations_as_the_documentation_says(name, scale, evaluations):
    model = Model(structures.SD1, FAMILIES["sd1"], 512)
    assert methods()[name]().stages(model, (64 * scale, 64 * scale), Common())[-1].evaluations() == evaluations
