"""The extension in a real A1111, through its API."""

import re
import threading
import time

import numpy as np
import pytest
from live_a1111 import BAKED, LORA, TWIN, Refused, difference, encode

from lib_hires.webui.arguments import controls

HIDIFFUSION = [{"method": "hidiffusion"}]
DEEP_SHRINK = [{"method": "deep_shrink"}]
SAMPLERS = ["Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "DPM++ 3M SDE", "DPM++ SDE", "DPM++ 2S a", "Heun", "DPM2", "LMS",
            "Restart", "LCM", "DDIM", "DDIM CFG++", "PLMS", "UniPC"]


def calls(sessions, word):
    """How many UNet calls of the sessions ran with `word`."""
    return sum(count for session in sessions for words, count in session["ran"].items() if word in words)


def test_without_arguments_and_with_enabled_false_the_picture_is_the_same(a1111, plain):
    assert (a1111.txt2img([]).picture == plain).all()
    assert (a1111.txt2img([False, "HiDiffusion"]).picture == plain).all()
    off = a1111.txt2img([{"enabled": False, "method": "hidiffusion"}])
    assert (off.picture == plain).all() and "HL " not in off.infotexts[0]
    assert a1111.probe()["sessions"] == []


@pytest.mark.parametrize("hires", [HIDIFFUSION, DEEP_SHRINK], ids=["HiDiffusion", "Deep Shrink"])
def test_a_method_changes_the_picture_and_is_written_into_it(a1111, plain, hires):
    drawn = a1111.txt2img(hires)
    assert difference(drawn.picture, plain) > 1
    assert f"HL Method: {'HiDiffusion' if hires is HIDIFFUSION else 'Deep Shrink'}" in drawn.infotexts[0]
    assert (a1111.txt2img(hires).picture == drawn.picture).all()


def test_a_positional_list_draws_what_the_named_settings_draw(a1111):
    values = {"enabled": True, "method": "Deep Shrink", "deep_shrink.strength": 1.5, "deep_shrink.stop1": 0.2}
    positional = a1111.txt2img([values.get(control.key, control.setting.default) for control in controls()])
    named = a1111.txt2img([{"method": "deep_shrink", "strength": 1.5, "stop1": 0.2}])
    assert (positional.picture == named.picture).all()


def test_the_infotext_of_a_picture_draws_it_again_to_the_bit(a1111):
    for settings in ({"method": "hidiffusion", "strength": 1.3, "t1": 0.55, "window_end": 0.8},
                     {"method": "deep_shrink", "stop1": 0.1, "stop2": 0.5, "scaler": "bilinear", "smooth_scaling": False}):
        drawn = a1111.txt2img([settings], steps=5)
        again = a1111.again(drawn.infotexts[0])
        assert again.infotexts == drawn.infotexts
        assert (again.picture == drawn.picture).all()


def test_the_infotext_of_a_plain_picture_leaves_it_plain(a1111):
    drawn = a1111.txt2img()
    assert (a1111.again(drawn.infotexts[0]).picture == drawn.picture).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_gives_the_shrink_its_share_of_the_run(a1111, sampler):
    a1111.txt2img([{"method": "hidiffusion", "t1": 0.4, "window_attention": False}], sampler_name=sampler, steps=10)
    sessions = a1111.probe()["sessions"]
    share = calls(sessions, "stride 4") / (calls(sessions, "stride 4") + calls(sessions, "plain"))
    assert 0.2 <= share <= 0.6


@pytest.mark.parametrize("upscaler", ["Latent", "Lanczos", "None"])
def test_the_chosen_passes_of_hires_fix_are_changed(a1111, upscaler):
    fields = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": upscaler, "denoising_strength": 0.9, "width": 256,
              "height": 256, "hr_second_pass_steps": 5}
    plain = a1111.txt2img(**fields).picture
    a1111.probe()
    expected = {"first pass": [4], "hires pass": [4], "both passes": [4, 4]}
    for passes, sessions in expected.items():
        drawn = a1111.txt2img([{"method": "hidiffusion", "passes": passes}], **fields)
        ran = a1111.probe()["sessions"]
        assert drawn.picture.shape == (384, 384, 3)
        assert len(ran) == len(sessions)
        assert difference(drawn.picture, plain) > 0.1
        assert ("stride 4" in str(ran)) == (passes != "first pass")  # 256 is the native size: windows only


def test_the_threshold_chooses_by_size(a1111):
    fields = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "width": 256, "height": 256, "denoising_strength": 0.9}
    a1111.txt2img([{"method": "hidiffusion", "passes": "above threshold", "threshold": 0.1}], **fields)
    ran = a1111.probe()["sessions"]
    assert len(ran) == 1 and "stride 4" in str(ran)


def test_a_picture_of_which_no_pass_was_changed_is_plain_and_not_labelled(a1111, plain):
    for settings in ({"passes": "hires pass"}, {"passes": "above threshold", "threshold": 1}):
        drawn = a1111.txt2img([{"method": "hidiffusion", **settings}])
        assert (drawn.picture == plain).all()
        assert "HL " not in drawn.infotexts[0]


def test_auto_draws_what_it_chooses_and_leaves_the_native_size_alone(a1111):
    auto = [{"method": "auto"}]
    drawn, named = a1111.txt2img(auto), a1111.txt2img(HIDIFFUSION)  # 384 is 1.5 times the native size
    assert (drawn.picture == named.picture).all()
    assert "HL Method: Auto" in drawn.infotexts[0] and "HL Chosen: HiDiffusion" in drawn.infotexts[0]
    assert "Auto chose HiDiffusion: 384x384 is 1.50 times" in a1111.log.read_text()
    again = a1111.again(drawn.infotexts[0])
    assert again.infotexts == drawn.infotexts and (again.picture == drawn.picture).all()
    small = {"width": 256, "height": 256}
    left = a1111.txt2img(auto, **small)
    assert (left.picture == a1111.txt2img(**small).picture).all() and "HL Chosen: none" in left.infotexts[0]
    staged = a1111.txt2img(auto, width=512, height=512, steps=10)
    assert "HL Chosen: DemoFusion" in staged.infotexts[0] and "HL Stages" in staged.infotexts[0]
    hires = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.7, "steps": 4}
    both = a1111.txt2img(auto, **small, **hires)
    assert 'HL Chosen: "none, HiDiffusion"' in both.infotexts[0]
    staged = a1111.txt2img(auto, **small, **hires | {"steps": 10})
    assert 'HL Chosen: "none, DemoFusion"' in staged.infotexts[0]
    named = a1111.txt2img([{"method": "demofusion", "passes": "hires pass"}], **small, **hires | {"steps": 10})
    assert (staged.picture == named.picture).all()


def test_a_script_that_samples_on_its_own_is_not_labelled(a1111, plain):
    alternative = {"script_name": "img2img alternative test",
                   "script_args": ["", True, True, "a star", "", True, 6, True, 1, 0, False]}
    drawn = a1111.img2img(plain, HIDIFFUSION, **alternative)
    assert "HL " not in drawn.infotexts[0]
    assert "does its own sampling" in a1111.log.read_text()


def test_img2img_is_changed_at_the_noise_levels_that_it_starts_from(a1111, plain):
    before = a1111.img2img(plain, denoising_strength=0.4).picture
    a1111.probe()
    drawn = a1111.img2img(plain, HIDIFFUSION, denoising_strength=0.4)
    ran = a1111.probe()["sessions"]
    assert difference(drawn.picture, before) > 0.5
    assert "stride 4" not in str(ran) and "windows" in str(ran)  # starts at progress 0.5, T1 ends at 0.4
    a1111.img2img(plain, [{"method": "hidiffusion", "passes": "hires pass"}], denoising_strength=0.95)
    assert "stride 4" in str(a1111.probe()["sessions"])


def test_inpainting_keeps_what_is_not_masked(a1111, plain):
    mask = np.zeros_like(plain)
    mask[96:288, 96:288] = 255
    fields = {"mask": encode(mask), "inpainting_fill": 1, "mask_blur": 0, "denoising_strength": 0.9, "inpaint_full_res": False}
    before = a1111.img2img(plain, **fields).picture
    drawn = a1111.img2img(plain, HIDIFFUSION, **fields).picture
    assert difference(drawn[120:264, 120:264], before[120:264, 120:264]) > 0.5
    assert difference(drawn[:64], plain[:64]) < 1


@pytest.mark.parametrize("prompt", ["a striped red star on a blue background", "a red star AND a blue circle :0.7"])
def test_an_image_of_a_batch_equals_the_same_image_alone(a1111, prompt):
    fields = {"prompt": prompt, "steps": 4}
    for hires in (None, HIDIFFUSION):
        both = a1111.txt2img(hires, batch_size=2, **fields).pictures
        count = a1111.txt2img(hires, n_iter=2, **fields).pictures
        alone = [a1111.txt2img(hires, **{**fields, "seed": seed}).picture for seed in (7, 8)]
        for k in (0, 1):
            assert difference(both[k], alone[k]) < 0.05  # what the host itself shows for other batch sizes is as large
            assert (count[k] == alone[k]).all()


@pytest.mark.parametrize("fields", [
    {"prompt": "a red star AND a blue circle :0.7"},
    {"prompt": "star, " * 60, "negative_prompt": "grey"},
    {"prompt": "a red star AND " + "a blue circle, " * 40, "batch_size": 2},
    {"override_settings": {"batch_cond_uncond": False}, "negative_prompt": "grey"},
    {"override_settings": {"pad_cond_uncond": True}, "prompt": "star, " * 60},
    {"s_min_uncond": 3.0},
    {"width": 440, "height": 296},
    {"prompt": "a [red:blue:0.5] star"},
], ids=["AND", "long", "AND long batch", "unbatched", "padded", "skipped uncond", "odd size", "scheduled"])
def test_prompts_and_batches_of_every_shape_are_drawn(a1111, fields):
    plain = a1111.txt2img(**fields).picture
    assert difference(a1111.txt2img(HIDIFFUSION, **fields).picture, plain) > 0.5
    assert difference(a1111.txt2img(DEEP_SHRINK, **fields).picture, plain) > 0.5


def test_shifts_do_not_depend_on_how_cond_and_uncond_are_batched(a1111):
    fields = {"negative_prompt": "grey", "batch_size": 2, "prompt": "a red star AND a blue circle"}
    one = a1111.txt2img(HIDIFFUSION, **fields).pictures
    two = a1111.txt2img(HIDIFFUSION, **fields, override_settings={"batch_cond_uncond": False}).pictures
    assert all(difference(a, b) < 0.05 for a, b in zip(one, two))


@pytest.mark.parametrize(("hires", "words"), [
    ([{"method": "hidiffusion", "t1": 3}], "'t1' is 3, must be between 0 and 1, or -1 for automatic"),
    ([{"method": "hidifusion"}], "'method' is 'hidifusion', must be one of"),
    ([{"method": "hidiffusion", "strenth": 1}], "Did you mean 'strength'?"),
    ([{"strength": 1}], "'method' is None, must be one of"),
    ([True, "Deep Shrink", "second pass"], "'passes' is 'second pass', must be one of 'first pass'"),
    (["perhaps"], "'enabled' is 'perhaps', must be true or false"),
    ([{"method": "deep_shrink", "stop1": 0.9}], "'stop1' is 0.9, must be at most 'stop2'"),
    ([{"method": "deep_shrink", "depth1": 12, "family": "sdxl"}], "'family' is 'sdxl', must be 'auto' or a family built like SD1.x"),
])
def test_a_wrong_setting_fails_the_request_with_its_name_value_and_range(a1111, hires, words):
    with pytest.raises(Refused) as refused:
        a1111.txt2img(hires)
    assert refused.value.status == 500
    assert words in refused.value.body["errors"]
    with pytest.raises(Refused, match="Hires Lab"):
        a1111.txt2img(hires, enable_hr=True, hr_upscaler="Latent")


def test_an_interrupt_ends_the_run_and_leaves_nothing(a1111):
    stopper = threading.Thread(target=lambda: (time.sleep(3), a1111.post("/sdapi/v1/interrupt", {})))
    stopper.start()
    began = time.time()
    drawn = a1111.txt2img(HIDIFFUSION, steps=100)
    stopper.join()
    assert time.time() - began < 15
    assert drawn.picture.shape == (384, 384, 3)


def test_a_skip_goes_on_with_the_next_image(a1111):
    stopper = threading.Thread(target=lambda: (time.sleep(2), a1111.post("/sdapi/v1/skip", {})))
    stopper.start()
    drawn = a1111.txt2img(HIDIFFUSION, steps=20, n_iter=2)
    stopper.join()
    assert len(drawn.pictures) == 2


@pytest.mark.parametrize("limit", [1, 2], ids=["same module reloaded", "two modules"])
def test_a_refiner_with_the_same_weights_draws_the_same_picture(a1111, limit):
    """The session has to survive the exchange of the model in the middle of a run."""
    hires = [{"method": "hidiffusion", "t1": 1.0}]
    fields = {"steps": 8, "override_settings": {"sd_checkpoints_limit": limit}}
    alone = a1111.txt2img(hires, **fields).picture
    a1111.probe()
    refined = a1111.txt2img(hires, refiner_checkpoint=TWIN, refiner_switch_at=0.5, **fields)
    ran = a1111.probe()["sessions"]
    assert "Refiner: scenes-twin" in refined.infotexts[0]
    assert len(ran) == 2 and all("stride 4" in str(session["ran"]) for session in ran)
    assert (refined.picture == alone).all()


def test_a_hires_checkpoint_with_the_same_weights_draws_the_same_picture(a1111):
    fields = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.9, "width": 256, "height": 256}
    alone = a1111.txt2img(HIDIFFUSION, **fields).picture
    switched = a1111.txt2img(HIDIFFUSION, hr_checkpoint_name=TWIN, **fields)
    assert "Hires checkpoint" in switched.infotexts[0]
    assert (switched.picture == alone).all()


def test_a_lora_on_the_dilated_convolution_does_what_its_weights_do(a1111):
    hires = [{"method": "hidiffusion", "t1": 1.0}]
    prompt = a1111.usual["prompt"]
    without = a1111.txt2img(hires).picture
    lora = a1111.txt2img(hires, prompt=f"{prompt}<lora:{LORA}:1>").picture
    baked = a1111.txt2img(hires, override_settings={"sd_model_checkpoint": BAKED}).picture
    assert "stride 4" in str(a1111.probe()["sessions"])
    assert difference(lora, without) > 1
    assert difference(lora, baked) < 0.05


def test_hypertile_and_token_merging_switch_window_attention_off_in_words(a1111):
    for settings, name in (({"hypertile_enable_unet": True}, "Hypertile"), ({"token_merging_ratio": 0.4}, "ToMe")):
        a1111.txt2img(HIDIFFUSION, override_settings=settings)
        ran = a1111.probe()["sessions"]
        assert "windows" not in str(ran[0]["ran"]) and "stride 4" in str(ran[0]["ran"])
        assert f"Window attention is off: {name} divides the tokens already." in ran[0]["notes"]
        a1111.txt2img(DEEP_SHRINK, override_settings=settings)
        assert "shrink" in str(a1111.probe()["sessions"])


def test_live_previews_do_not_change_the_picture(a1111):
    still = a1111.txt2img(HIDIFFUSION).picture
    settings = {"live_previews_enable": True, "show_progress_type": "Full", "show_progress_every_n_steps": 1}
    assert (a1111.txt2img(HIDIFFUSION, override_settings=settings).picture == still).all()


def test_an_xyz_grid_goes_over_methods_and_settings(a1111):
    def grid(x, x_values, y="Nothing", y_values=""):
        axes = _axes(a1111)
        cells = [axes.index(x), x_values, [], axes.index(y), y_values, [], 0, "", []]
        return a1111.txt2img(
            [], steps=3, script_name="x/y/z plot", script_args=[*cells, False, True, False, False, False, False, False, 0, True],
        )

    drawn = grid("[Hires Lab] Method", "none, HiDiffusion, Deep Shrink")
    assert [re.findall("HL Method: ([^,]*)", text) for text in drawn.infotexts] == [[], ["HiDiffusion"], ["Deep Shrink"]]
    drawn = grid("[Hires Lab] T1", "0.2,0.9")
    assert [re.findall("HL T1: ([^,]*)", text) for text in drawn.infotexts] == [["0.2"], ["0.9"]]
    assert difference(*drawn.pictures) > 0.5
    with pytest.raises(Refused, match=r"'t1' is 7\.0, must be between 0 and 1"):
        grid("[Hires Lab] T1", "0.2,7")


def _axes(a1111):
    """Labels of the XYZ script's axes on txt2img, by the API."""
    return [name for script in a1111.get("/sdapi/v1/script-info") if script["name"] == "x/y/z plot" and not script["is_img2img"]
            for name in script["args"][0]["choices"]]
