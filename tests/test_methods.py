"""Methods are found by looking, under every way to write their names."""

import pytest

from lib_hires.config import SettingError
from lib_hires.methods import find_method, methods


def test_both_methods_are_found_and_named_by_their_classes():
    assert {"deep_shrink", "hidiffusion"} <= set(methods())
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
