"""Long canvases: no network input grows with them, whichever method draws them."""

from dataclasses import replace

import pytest
import torch
from small_models import components
from small_models import model as small_model
from support import structures
from support.engines import Blind

from lib_hires.canvas.accdiffusion import AccDiffusion, AccDiffusionV2
from lib_hires.canvas.demofusion import DemoFusion
from lib_hires.canvas.method import CanvasMethod, StagedMethod
from lib_hires.config import Common
from lib_hires.engines.standalone import Job
from lib_hires.methods import methods
from lib_hires.plan.models import FAMILIES, Model
from lib_hires.plan.tiling import MOST_AREA, CanvasPlan, first_size, is_too_large

MODELS = {"sdxl": Model(structures.SDXL, FAMILIES["sdxl"], 1024), "sd1": Model(structures.SD1, FAMILIES["sd1"], 512)}
CANVAS = {name: cls for name, cls in methods().items() if issubclass(cls, CanvasMethod)}
STAGED = {name: cls for name, cls in CANVAS.items() if issubclass(cls, StagedMethod)}
ASPECTS = (1, 1.2, 1.5, 16 / 9, 2, 3, 4, 5, 5.9, 6.1, 7, 8, 10, 13, 16)
LENGTHS = [round(64 * 1.15**step) for step in range(25)] + [1024, 1536, 2048]
"""Latents of the longer side, 512 to 16384 pixels."""


def sizes():
    for long in LENGTHS:
        for aspect in ASPECTS:
            short = max(8, round(long / aspect))
            yield from {(long, short), (short, long)}


def stages(method, model, size, started=False):
    return method.stages(model, size, Common(), started=started)


@pytest.mark.parametrize("started", (False, True))
@pytest.mark.parametrize("settings", ({}, {"max_step": 1.3, "wrap_x": True}), ids=str)
@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("name", CANVAS)
def test_no_network_input_is_larger_than_the_bound_whatever_the_canvas(name, model, settings, started):
    known = {key: value for key, value in settings.items() if key in CANVAS[name].__dataclass_fields__}
    method, most = CANVAS[name](**known), MOST_AREA * (model.native // 8) ** 2
    for size in sizes():
        for stage in stages(method, model, size, started):
            looked = [stage.first_size] if stage.looks else []
            for height, width in [*looked, *(each for each, _ in stage.inputs())]:
                assert height * width <= most, (size, stage)


def test_larger_views_are_as_large_as_asked():
    (stage,) = stages(CANVAS["multidiffusion"](view_size=2048), MODELS["sdxl"], (256, 1024))
    assert {size for size, _ in stage.inputs()} == {(256, 256)}


@pytest.mark.parametrize("size", ((64, 1024), (128, 2048), (2048, 128)))
@pytest.mark.parametrize("name", STAGED)
def test_the_first_stage_of_a_long_panorama_is_drawn_through_the_method_s_own_views_and_nothing_else(name, size):
    method, model = STAGED[name](tile_batch=3, overlap=0.25), MODELS["sdxl"]
    first, *later = stages(method, model, size)
    assert first.canvas == CanvasPlan(local=method.local(model), tile_batch=3)
    assert first.canvas.local.window == (128, 128) and first.canvas.local.stride == (96, 96)
    assert all(each.canvas.dilated is None and each.canvas.skip_residual for each in later)
    assert bool(later) == (max(size) > 1024)


@pytest.mark.parametrize("size", ((128, 2048), (64, 1024)))
def test_words_are_not_looked_for_in_a_first_stage_of_many_views(size):
    (started,) = stages(AccDiffusion(), MODELS["sdxl"], size, started=True)
    for stage in (*stages(AccDiffusion(), MODELS["sdxl"], size), started):
        assert stage.looks == () and (stage.canvas is None or stage.canvas.window_prompts is None)
    (short,) = stages(AccDiffusion(), MODELS["sdxl"], (256, 512), started=True)
    assert short.looks and short.canvas.window_prompts == 0.3


@pytest.mark.parametrize("size", ((256, 256), (256, 512), (384, 512), (192, 768), (160, 160)))
@pytest.mark.parametrize("name", STAGED)
def test_what_is_not_so_long_is_drawn_at_once_first_and_with_grids_after(name, size):
    first, *later = stages(STAGED[name](), MODELS["sdxl"], size)
    assert first.canvas is None
    if later[-1].scale >= 2:
        assert later[-1].canvas.dilated.grid_size(size) == first.size
    if "acc" in name:
        assert all(each.canvas.window_prompts for each in later)


def test_a_scale_is_rounded_up_where_rounding_it_down_leaves_too_large_a_first_stage():
    assert first_size((312, 312), 128) == ((104, 104), 3.0)  # 2.44 times; its half is 1.5 native areas and more
    assert first_size((304, 304), 128) == ((152, 152), 2.0)
    assert first_size((1024, 128), 128) == ((512, 64), 2.0)  # twice exactly: nothing was rounded
    assert stages(DemoFusion(), MODELS["sdxl"], (176, 176))[-1].canvas.dilated is None  # 1.4 times is once, not twice
    assert is_too_large((512, 64), 128) and not is_too_large((152, 152), 128)


@pytest.mark.parametrize("name", ("demofusion", "accdiffusion"))
def test_a_panorama_of_ten_to_one_is_drawn_in_bounded_calls(name):
    method, size, native = STAGED[name](tile_batch=4), (16, 160), 16
    parts, seen = components(), []
    hook = parts.unet.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[-2:])))
    try:
        plan = stages(method, small_model(native), size)
        job = Job("a red star", width=8 * size[1], height=8 * size[0], steps=5, cfg=3.0, seed=2)
        result = Blind(parts).generate(job, stages=plan)
    finally:
        hook.remove()
    assert len(plan) == 2 and tuple(result.latents.shape[-2:]) == size and torch.isfinite(result.latents).all()
    assert {(stage["height"], stage["width"]) for stage in result.stages} == {(64, 640), (128, 1280)}
    assert set(seen) == {(8, 16), (16, 16)}


def test_a_stage_that_is_bounded_costs_what_its_plan_says():
    plan = stages(DemoFusion(), small_model(16), (16, 160))
    job = Job("a red star", width=1280, height=128, steps=5, cfg=1.0, seed=2)
    result = Blind(components()).generate(job, stages=plan)
    assert [stage["unet_evaluations"] for stage in result.stages] == [5 * 9, 2 * 19]
    assert [stage.evaluations() for stage in plan] == [9, 19]


@pytest.mark.parametrize("method", [AccDiffusion(), AccDiffusionV2()], ids=lambda method: method.name)
@pytest.mark.parametrize("wrap", [False, True])
def test_a_picture_that_one_view_covers_is_given_the_whole_prompt_and_is_not_looked_at(method, wrap):
    method = replace(method, wrap_x=wrap)
    (stage,) = method.stages(small_model(32), (32, 32), Common(), started=True)
    assert stage.canvas.window_prompts is None and stage.looks == ()
    assert (stage.canvas.edges is None) == (not wrap or method.name == "accdiffusion")
    (larger,) = method.stages(small_model(32), (64, 64), Common(), started=True)
    assert larger.canvas.window_prompts and larger.looks


def left_out(method, size, started=False):
    native = small_model(32)
    return method.left_out(native, stages(method, native, size, started), started)


def test_what_long_pictures_and_circles_do_without_is_said():
    long, short, flat = (64, 640), (64, 96), (16, 224)
    native = small_model(32)
    assert left_out(DemoFusion(), short) == left_out(AccDiffusion(), short) == ()
    (grids,) = left_out(DemoFusion(), long)
    assert "dilated sampling is left out" in grids
    assert left_out(DemoFusion(dilated_sampling=False), long) == ()
    assert left_out(DemoFusion(view_size=1280), long) == ()
    assert DemoFusion(view_size=1280).stages(native, long, Common())[-1].canvas.dilated
    first, words = left_out(AccDiffusion(), long)
    assert first == grids and "words are not looked for" in words
    assert left_out(AccDiffusion(word_share=0.0), long) == (grids,)
    for method in (DemoFusion(), AccDiffusion()):
        (alone,) = left_out(method, flat)
        assert "no stages" in alone and len(stages(method, native, flat)) == 1
    (circle,) = left_out(AccDiffusion(wrap_x=True), short)
    assert "edges meet" in circle
    for settings, started in (({"word_share": 0.0}, False), ({}, True), ({"view_size": 1024}, False)):
        assert left_out(AccDiffusion(wrap_x=True, **settings), short, started) == ()
