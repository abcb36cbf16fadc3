"""Canvases and stages in a real A1111, through its API: the bundled model draws 256 px, the pictures are twice that."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from live_a1111 import Refused, difference
from PIL import Image

from lib_hires.canvas.canvas import Canvas
from lib_hires.hosts._a1111.views import Views
from lib_hires.plan.tiling import CanvasPlan, Dilated, Local, Stage
from lib_hires.schedule import Moment
from lib_hires.stages.progressive import StageRun

TWICE = {"width": 512, "height": 512, "steps": 4}
METHODS = ["multidiffusion", "mixture_of_diffusers", "demofusion", "accdiffusion", "accdiffusion_v2"]
STAGED = METHODS[2:]
FEW_VIEWS = {"multidiffusion": {"overlap": 0.5}}


def args(method, **settings):
    return [{"method": method, **FEW_VIEWS.get(method, {}), **settings}]


def evaluations(sessions):
    return [sum(session["ran"].values()) for session in sessions]


@pytest.fixture(scope="module")
def plain_twice(a1111):
    return a1111.txt2img(**TWICE).picture


@pytest.mark.parametrize("method", METHODS)
def test_each_method_draws_twice_the_native_size_and_says_so(a1111, plain_twice, method):
    drawn = a1111.txt2img(args(method), **TWICE)
    sessions = a1111.probe()["sessions"]
    assert drawn.picture.shape == (512, 512, 3)
    assert difference(drawn.picture, plain_twice) > 1
    assert ("HL Stages: \"256x256, 512x512\"" in drawn.infotexts[0]) == (method in STAGED)
    assert len(sessions) == (2 if method in STAGED else 1)


def test_the_infotext_of_a_staged_picture_draws_it_again_to_the_bit(a1111):
    drawn = a1111.txt2img(args("demofusion", cosine_1=2.5, stage_strength=0.6), **TWICE)
    again = a1111.again(drawn.infotexts[0])
    assert again.infotexts == drawn.infotexts
    assert (again.picture == drawn.picture).all()


def test_three_times_the_native_size_takes_the_stages_that_were_planned(a1111):
    drawn = a1111.txt2img(args("demofusion"), width=768, height=768, steps=2)
    assert drawn.picture.shape == (768, 768, 3)
    assert "HL Stages" in drawn.infotexts[0] and "768x768" in drawn.infotexts[0]


@pytest.mark.parametrize(("sampler", "strength", "steps"), [("Euler", 0.5, 3), ("Euler", 1.0, 6), ("DDIM", 0.5, 3)])
def test_a_stage_runs_the_steps_that_its_strength_means(a1111, sampler, strength, steps):
    a1111.probe()
    a1111.txt2img(args("demofusion", stage_strength=strength, overlap=0.5, jitter=0), **{**TWICE, "steps": 6}, sampler_name=sampler)
    views, grids = 9, 4
    assert evaluations(a1111.probe()["sessions"])[1] == steps * (views + grids)


def test_a_size_that_one_view_covers_is_plain_to_the_bit(a1111):
    fields = {"width": 256, "height": 256, "steps": 2}
    plain = a1111.txt2img(**fields).picture
    for method in METHODS:
        assert (a1111.txt2img(args(method), **fields).picture == plain).all()


@pytest.mark.parametrize("method", ["demofusion", "multidiffusion", "accdiffusion"])
def test_the_hires_pass_is_drawn_on_a_canvas(a1111, method):
    fields = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.7, "width": 256,
              "height": 256, "steps": 4}
    plain = a1111.txt2img(**fields).picture
    a1111.probe()
    drawn = a1111.txt2img(args(method, passes="hires pass"), **fields)
    assert drawn.picture.shape == (512, 512, 3)
    assert len(a1111.probe()["sessions"]) == 1
    assert difference(drawn.picture, plain) > 0.5


def test_stages_and_then_a_hires_pass(a1111):
    fields = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Lanczos", "denoising_strength": 0.4, "width": 384,
              "height": 384, "steps": 4}
    first = a1111.txt2img(args("demofusion", passes="first pass"), **fields)
    both = a1111.txt2img(args("demofusion"), **fields)
    assert first.picture.shape == both.picture.shape == (576, 576, 3)
    assert difference(first.picture, both.picture) > 0.1


@pytest.mark.parametrize("method", ["mixture_of_diffusers", "demofusion", "accdiffusion"])
def test_img2img_keeps_to_the_picture(a1111, plain_twice, method):
    drawn = a1111.img2img(plain_twice, args(method), **TWICE, denoising_strength=0.5).picture
    far = a1111.txt2img(**TWICE, seed=99).picture
    assert 0.1 < difference(drawn, plain_twice) < difference(drawn, far)


def test_inpainting_keeps_what_is_not_masked(a1111, plain_twice):
    from live_a1111 import encode

    mask = np.zeros((512, 512, 3), np.uint8)
    mask[:, 256:] = 255
    drawn = a1111.img2img(plain_twice, args("demofusion"), **TWICE, mask=encode(mask), inpaint_full_res=False, mask_blur=0,
                          denoising_strength=0.8).picture
    assert difference(drawn[:, :200], plain_twice[:, :200]) < 0.5 < difference(drawn[:, 300:], plain_twice[:, 300:])


@pytest.mark.parametrize("method", ["mixture_of_diffusers", "demofusion", "accdiffusion"])
@pytest.mark.parametrize("sampler", ["Euler a", "DDIM"])
def test_a_batch_of_two_is_two_singles(a1111, method, sampler):
    fields = {**TWICE, "sampler_name": sampler}
    batch = a1111.txt2img(args(method), **fields, batch_size=2, seed=7)
    assert len(batch.pictures) == 2
    for index, picture in enumerate(batch.pictures):
        single = a1111.txt2img(args(method), **fields, seed=7 + index).picture
        assert difference(picture, single) < 0.2


@pytest.mark.parametrize("fields", [
    {"prompt": "a striped red star AND a blue background :0.6"},
    {"prompt": "a (red:1.3) star on a blue background, " + "high quality, detailed, " * 25},
    {"prompt": "a [red:green:0.5] star"},
    {"cfg_scale": 1}, {"sampler_name": "DDIM"}, {"sampler_name": "PLMS"}, {"sampler_name": "LCM", "cfg_scale": 1.5},
    {"override_settings": {"batch_cond_uncond": False}}, {"override_settings": {"pad_cond_uncond": True}},
    {"width": 440, "height": 296}, {"s_min_uncond": 3.0}, {"tiling": True},
], ids=lambda fields: str(fields)[:40])
def test_accdiffusion_draws_whatever_the_host_sends(a1111, fields):
    drawn = a1111.txt2img(args("accdiffusion", view_guidance=6), **{**TWICE, **fields})
    assert drawn.picture.std() > 5


def test_separate_calls_for_cond_and_uncond_draw_the_same(a1111):
    together = a1111.txt2img(args("accdiffusion"), **TWICE).picture
    apart = a1111.txt2img(args("accdiffusion"), **TWICE, override_settings={"batch_cond_uncond": False}).picture
    assert difference(together, apart) < 0.2


def test_a_sampler_that_loses_the_skip_residual_is_refused(a1111):
    for sampler in ("UniPC", "DPM adaptive"):
        with pytest.raises(Refused, match="'sampler' is '" + sampler):
            a1111.txt2img(args("demofusion"), **TWICE, sampler_name=sampler)
    assert a1111.txt2img(args("demofusion", skip_residual=False), **TWICE, sampler_name="UniPC").picture.std() > 5
    assert a1111.txt2img(args("mixture_of_diffusers"), **TWICE, sampler_name="UniPC").picture.std() > 5


def while_drawing(a1111, job, look):
    """Call `look(progress)` again and again while `job` runs in a thread; returns the job's result."""
    result = []
    thread = threading.Thread(target=lambda: result.append(job()))
    thread.start()
    while thread.is_alive():
        look(a1111.get("/sdapi/v1/progress?skip_current_image=true"))
        time.sleep(0.05)
    return result[0]


@pytest.mark.parametrize("verb", ["interrupt", "skip"])
def test_a_stop_in_the_second_stage_returns_what_is_there(a1111, verb):
    told = []

    def look(progress):
        state = progress["state"]
        if progress["progress"] > 0.3 and state["sampling_step"] >= 1 and not told:  # the first stage is 7 % of the work
            told.append(1)
            a1111.post(f"/sdapi/v1/{verb}", {})

    fields = {**TWICE, "steps": 12}
    drawn = while_drawing(a1111, lambda: a1111.txt2img(args("demofusion", stage_strength=1.0), **fields), look)
    assert told and drawn.picture.shape == (512, 512, 3) and drawn.picture.std() > 5


@pytest.mark.parametrize("more", [{}, {"n_iter": 2}, {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent",
                                                       "hr_second_pass_steps": 4, "denoising_strength": 0.7}],
                         ids=["one", "two batches", "a hires pass"])
def test_progress_is_the_share_of_the_work_and_only_grows(a1111, more):
    seen, began = [], time.time()
    fields = {"width": 384, "height": 384, "steps": 8, **more} if "hr_scale" in more else {**TWICE, "steps": 8, **more}
    while_drawing(a1111, lambda: a1111.txt2img(args("demofusion", stage_strength=1.0), **fields),
                  lambda progress: seen.append((time.time() - began, round(progress["progress"], 6))))
    sampled = [(when, share) for when, share in seen if share > 0.02]
    shares = [share for _, share in sampled]
    assert shares == sorted(shares) and shares[-1] <= 1
    first, last = sampled[0], next(each for each in reversed(sampled) if each[1] < 1)
    for when, share in sampled:  # the bar goes with the clock
        expected = first[1] + (last[1] - first[1]) * (when - first[0]) / (last[0] - first[0])
        assert abs(share - expected) < 0.25


def test_a_stage_is_held_to_the_first_picture_by_the_skip_residual(a1111):
    """cosine_1 = 0.1 pulls with nearly the whole weight at all noise levels."""
    fields = {**TWICE, "steps": 8}
    first = a1111.txt2img(width=256, height=256, steps=8).picture
    enlarged = np.asarray(Image.fromarray(first).resize((512, 512), Image.Resampling.BICUBIC))
    held, free = (a1111.txt2img(args("demofusion", stage_strength=1.0, anchor="nothing", **settings), **fields).picture
                  for settings in ({"cosine_1": 0.1}, {"skip_residual": False}))
    assert difference(held, enlarged) < 0.4 * difference(free, enlarged)


def test_an_error_in_a_view_leaves_nothing_behind(a1111):
    before = a1111.txt2img(**TWICE).picture
    a1111.post("/hires-lab-probe/fail", {"call": 12})
    with pytest.raises(Refused, match="a view failed on purpose"):
        a1111.txt2img(args("accdiffusion"), **TWICE)
    left = a1111.probe()
    assert (left["hooks"], left["overrides"], left["callbacks"]) == (0, [], [])
    assert (a1111.txt2img(**TWICE).picture == before).all()


# Without a host --------------------------------------------------------------------------------------------------------


def views_of(plan, size, notes=None):
    stage = Stage(size, 2.0, canvas=plan)
    run = StageRun(stage, 1, Canvas(plan, size, [3, 4]), torch.zeros(2, 4, *size), torch.zeros(2, 4, *size))
    views = Views(run, (notes if notes is not None else []).append)
    views.at(Moment(500.0, 1.0), [(0, 0), (1, 1), (0, None), (1, None)], 5.0, SimpleNamespace(rows=lambda rows: None))
    return views


def test_sdxl_is_told_where_each_view_lies():
    from ldm.modules.diffusionmodules.util import timestep_embedding

    views = views_of(CanvasPlan(Local((8, 8), (4, 4))), (16, 16))
    vector, seen = torch.rand(4, 2816), []

    def network(x, t, cond):
        seen.append(cond["vector"])
        return x

    views.over(network)(torch.rand(4, 4, 16, 16), torch.ones(4), {"crossattn": torch.rand(4, 77, 8), "vector": vector})
    last = seen[-1]
    assert torch.equal(last[:, :1792], vector[:, :1792]) and torch.equal(last[:, 2304:], vector[:, 2304:])
    expected = timestep_embedding(torch.tensor([64.0, 64.0]), 256).flatten()
    assert torch.allclose(last[0, 1792:2304], expected, atol=1e-5)


def test_an_inpainting_models_picture_is_cut_like_the_latents():
    views = views_of(CanvasPlan(Local((8, 8), (4, 4)), Dilated(2)), (16, 16))
    x = torch.rand(4, 4, 16, 16)
    pairs = []

    def network(inputs, t, cond):
        pairs.append((inputs, cond["c_concat"][0], cond["c_crossattn"][0].shape[0], len(t)))
        return inputs

    views.over(network)(x, torch.ones(4), {"c_concat": [x.clone()], "c_crossattn": [torch.rand(4, 77, 8)]})
    assert all(len(inputs) == texts == times for inputs, _, texts, times in pairs)
    assert all(torch.equal(inputs, picture) for inputs, picture, _, _ in pairs if inputs.shape[-1] == 8 and len(pairs) <= 9)
    assert all(inputs.shape[-2:] == picture.shape[-2:] for inputs, picture, _, _ in pairs)


def test_a_guidance_of_views_is_what_the_sampler_makes_of_the_rows():
    notes = []
    views = views_of(CanvasPlan(Local((8, 8), (8, 8)), guidance=3.0), (16, 16), notes)
    answers = torch.tensor([2.0, 4.0, 1.0, 1.0]).view(4, 1, 1, 1)
    result = views.over(lambda x, t, cond: answers.expand_as(x))(torch.zeros(4, 4, 16, 16), torch.ones(4), {})
    cond, uncond = result.chunk(2)
    guided = uncond + 5.0 * (cond - uncond)
    assert torch.allclose(guided[:, 0, 0, 0], torch.tensor([4.0, 10.0]))
    views.at(Moment(500.0, 1.0), [(0, 0), (1, 1)], 5.0, views.session)
    views.over(lambda x, t, cond: x)(torch.zeros(2, 4, 16, 16), torch.ones(2), {})
    assert notes and len(set(notes)) == 1
