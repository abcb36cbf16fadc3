"""Families by structure, native sizes, and which skip joins which."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.structures import REFINER, SD1, SDXL

from lib_hires.config import Common, SettingError
from lib_hires.plan.models import FAMILIES, family_of, read_model

SD2 = replace(SD1, context_width=1024)


def test_every_decoder_step_takes_the_skip_of_the_mirrored_encoder_step():
    assert [SD1.skip_of(step) for step in range(12)] == [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert [SDXL.skip_of(step) for step in (3, 4, 5, 6)] == [5, 4, 3, 2]


def test_parts_are_found_at_the_published_blocks():
    assert (SD1.downsampler(0), SD1.downsampler(1), SD1.first_pair(1), SD1.top_attention_level) == (3, 6, 4, 0)
    assert (SDXL.downsampler(0), SDXL.downsampler(1), SDXL.first_pair(1), SDXL.top_attention_level) == (3, 6, 4, 1)
    assert (SD1.levels, SDXL.levels, SDXL.downsampler(2)) == (4, 3, None)


@pytest.mark.parametrize(
    ("structure", "key", "native"),
    [(SD1, "sd1", 512), (SD2, "sd2", 512), (SDXL, "sdxl", 1024), (REFINER, "sdxl_refiner", 1024)],
)
def test_the_family_is_read_from_the_structure(structure, key, native):
    model = read_model(structure)
    assert (model.family.key, model.native) == (key, native)
    assert family_of(structure) is FAMILIES[key]


def test_an_inpainting_model_is_told_by_its_nine_channels():
    assert read_model(replace(SDXL, in_channels=9)).inpainting and not read_model(SDXL).inpainting


def test_the_native_size_is_the_users_else_the_checkpoints_else_the_familys():
    metadata = {"modelspec.resolution": "768x768"}
    assert read_model(SD1, Common(native_size=640), metadata).native == 640
    assert read_model(SD1, Common(), metadata).native == 768
    assert read_model(SD1, Common(), {}).native == 512


@pytest.mark.parametrize(
    ("text", "native"),
    [("1024x1024", 1024), (" 1152X896 ", 1016), ("1024", 1024), ("1024x", 512), ("0x0", 512), ("", 512), ("axb", 512)],
)
def test_the_checkpoints_resolution_counts_by_area_and_is_ignored_where_it_is_none(text, native):
    assert read_model(SD1, metadata={"modelspec.resolution": text}).native == native


def test_sd2_with_v_prediction_is_the_768_model():
    assert (read_model(SD2, v_prediction=True).native, read_model(SD1, v_prediction=True).native) == (768, 512)


@pytest.mark.parametrize(
    ("structure", "family", "fits"),
    [
        (SD1, "sd2", True),
        (SD2, "sd1", True),
        (SDXL, "sdxl_turbo", True),
        (SDXL, "sdxl", True),
        (SD1, "sdxl", False),
        (SD1, "sdxl_turbo", False),
        (SDXL, "sd1", False),
        (SDXL, "sdxl_refiner", False),
        (REFINER, "sd1", False),
        (REFINER, "sdxl_refiner", True),
    ],
)
def test_a_chosen_family_has_to_be_built_like_the_loaded_network(structure, family, fits):
    if fits:
        assert read_model(structure, Common(family=family)).family.key == family
    else:
        with pytest.raises(
            SettingError, match=f"'family' is '{family}', must be 'auto' or a family built like .* is built like"
        ):
            read_model(structure, Common(family=family))


@given(st.integers(8, 512), st.integers(8, 512))
def test_the_scale_is_by_area_and_the_smallest_scale_by_the_shorter_side(height, width):
    model = read_model(SD1)
    assert model.scale(height, width) == pytest.approx((height * width) ** 0.5 / 64)
    assert model.smallest_scale(height, width) == min(height, width) / 64 <= model.scale(height, width)
    assert model.scale(64, 64) == model.smallest_scale(64, 64) == 1
