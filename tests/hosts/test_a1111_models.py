"""Other kinds of model in a real A1111: inpainting, v-prediction, SDXL, and a refiner inside stages."""

import numpy as np
import pytest
from live_a1111 import CHECKPOINT, TWIN, difference, encode
from live_models import INPAINTING, SDXL, V_PREDICTION

TWICE = {"width": 512, "height": 512, "steps": 4}
STAGED = ["demofusion", "accdiffusion"]


def by(checkpoint, **fields):
    return {**fields, "override_settings": {"sd_model_checkpoint": checkpoint}}


@pytest.fixture(scope="module", autouse=True)
def the_usual_model_comes_back(a1111):
    yield
    a1111.txt2img(**by(CHECKPOINT, width=64, height=64, steps=1))


@pytest.mark.parametrize("method", [None, "hidiffusion", "mixture_of_diffusers", *STAGED])
def test_an_inpainting_model_whose_channels_weigh_nothing_draws_what_its_parent_draws(a1111, method):
    hires = method and [{"method": method}]
    parent = a1111.txt2img(hires, **TWICE).picture
    drawn = a1111.txt2img(hires, **by(INPAINTING, **TWICE))
    assert ("HL Method" in drawn.infotexts[0]) == bool(method)
    assert difference(drawn.picture, parent) < 0.2


@pytest.mark.parametrize("method", ["mixture_of_diffusers", "demofusion"])
def test_an_inpainting_model_paints_the_masked_half_only(a1111, method):
    picture = a1111.txt2img(**TWICE).picture
    mask = np.zeros((512, 512, 3), np.uint8)
    mask[:, 256:] = 255
    fields = {**TWICE, "mask": encode(mask), "inpaint_full_res": False, "mask_blur": 0, "denoising_strength": 0.8}
    drawn = a1111.img2img(picture, [{"method": method}], **by(INPAINTING, **fields)).picture
    assert difference(drawn[:, :200], picture[:, :200]) < 0.5 < difference(drawn[:, 300:], picture[:, 300:])


@pytest.mark.parametrize("checkpoint", [V_PREDICTION, SDXL])
def test_a_size_that_one_view_covers_is_plain_to_the_bit(a1111, checkpoint):
    fields = by(checkpoint, width=256, height=256, steps=2)
    plain = a1111.txt2img(**fields).picture
    for method in ("mixture_of_diffusers", *STAGED):
        assert (a1111.txt2img([{"method": method}], **fields).picture == plain).all()


@pytest.mark.parametrize("checkpoint", [V_PREDICTION, SDXL])
@pytest.mark.parametrize("method", ["hidiffusion", "deep_shrink", "mixture_of_diffusers", *STAGED])
def test_each_method_draws_and_draws_the_same_again_and_leaves_nothing(a1111, checkpoint, method):
    fields = by(checkpoint, **{**TWICE, "steps": 3})
    plain = a1111.txt2img(**fields).picture
    a1111.probe()
    drawn = a1111.txt2img([{"method": method}], **fields)
    assert len(a1111.probe()["sessions"]) == (2 if method in STAGED else 1)
    assert difference(drawn.picture, plain) > 0.2
    assert (a1111.txt2img([{"method": method}], **fields).picture == drawn.picture).all()
    assert (a1111.txt2img(**fields).picture == plain).all()


@pytest.mark.parametrize("method", STAGED)
def test_img2img_with_sdxl_keeps_to_the_picture(a1111, method):
    picture = a1111.txt2img(**TWICE).picture
    fields = by(SDXL, **{**TWICE, "steps": 4})
    drawn = [
        a1111.img2img(picture, [{"method": method}], **fields, denoising_strength=strength).picture
        for strength in (0.3, 0.9)
    ]
    assert 0.1 < difference(drawn[0], picture) < difference(drawn[1], picture)


def test_sdxl_in_a_batch_is_its_pictures_alone(a1111):
    fields = by(SDXL, **{**TWICE, "steps": 3}, seed=7)
    hires = [{"method": "accdiffusion"}]
    batch = a1111.txt2img(hires, **fields, batch_size=2)
    for index, picture in enumerate(batch.pictures):
        assert difference(picture, a1111.txt2img(hires, **{**fields, "seed": 7 + index}).picture) < 0.3


@pytest.mark.parametrize("method", STAGED)
@pytest.mark.parametrize("limit", [1, 2], ids=["one model kept", "two models kept"])
def test_a_refiner_of_the_same_weights_inside_stages_draws_the_same_picture(a1111, method, limit):
    """With every word in every view: where words lie is found in the first model's steps only, which are fewer."""
    fields = {**TWICE, "steps": 6, "override_settings": {"sd_checkpoints_limit": limit}}
    words = {"word_share": 0} if method == "accdiffusion" else {}
    hires = [{"method": method, "stage_strength": 0.7, **words}]
    alone = a1111.txt2img(hires, **fields).picture
    a1111.probe()
    refined = a1111.txt2img(hires, refiner_checkpoint=TWIN, refiner_switch_at=0.5, **fields)
    assert "Refiner: scenes-twin" in refined.infotexts[0]
    assert len(a1111.probe()["sessions"]) == 4  # two models in each of two stages
    assert (refined.picture == alone).all()
