"""What a canvas method does to the network inside its views: which methods it means, and that views are drawn with them."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from support import snapshots
from support.engines import ATTENDED_AT_THE_TOP, Blind, with_small_unet

from lib_hires import DeepShrink, HiDiffusion, Request
from lib_hires.canvas.accdiffusion import AccDiffusion, AccDiffusionV2
from lib_hires.canvas.demofusion import DemoFusion
from lib_hires.canvas.method import CanvasMethod
from lib_hires.canvas.mixture import MixtureOfDiffusers
from lib_hires.canvas.multidiffusion import MultiDiffusion
from lib_hires.config.settings import schema
from lib_hires.engines import checkpoint
from lib_hires.engines.denoiser import NoSession
from lib_hires.engines.runner import session_for, stages_of
from lib_hires.engines.standalone import Job
from lib_hires.stages.inside import unet_methods

CANVAS = (MultiDiffusion, MixtureOfDiffusers, DemoFusion, AccDiffusion, AccDiffusionV2)
MEANT = {
    "none": [],
    "window attention": [HiDiffusion(raunet=False)],
    "HiDiffusion": [HiDiffusion()],
    "Deep Shrink": [DeepShrink()],
}
NATIVE = 64
LARGE_VIEWS = {"view_size": 2 * NATIVE, "overlap": 0.5, "native_size": NATIVE}
"""Views of twice the native size, where RAU-Net and Deep Shrink have something to do."""
JOB = Job("a red star", width=192, height=128, steps=4, cfg=3.0, seed=4)


# Which methods --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CANVAS)
@pytest.mark.parametrize("inside", MEANT)
def test_each_value_means_its_method_with_default_settings(method, inside):
    assert unet_methods(method(inside=inside)) == MEANT[inside]


def test_every_choice_that_is_offered_is_one_of_these_and_none_is_the_default():
    (setting,) = [each for each in schema(CanvasMethod) if each.name == "inside"]
    assert set(setting.choices) == set(MEANT)
    assert all(unet_methods(method()) == [] for method in CANVAS)


@pytest.mark.parametrize("method", (HiDiffusion(t1=0.3), DeepShrink(depth1=2)))
def test_a_method_that_changes_the_network_is_its_own_and_nothing_is_none(method):
    assert unet_methods(method) == [method]
    assert unet_methods(None) == []


# On the engine --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts():
    """The bundled model with a tiny UNet of three levels, attended at the top."""
    return with_small_unet(checkpoint.load(), **ATTENDED_AT_THE_TOP)


@pytest.fixture(scope="module")
def draw(parts):
    """draw(method, **settings) -> (the result, its session), each made once."""

    @cache
    def drawn(method, job, settings):
        request = Request.from_dict({"method": method, **dict(settings)})
        session = session_for(parts, request, job)
        with torch.no_grad():
            return Blind(parts).generate(job, session, stages=stages_of(parts, request, job, session)), session

    return lambda method="multidiffusion", job=JOB, **settings: drawn(
        method, job, tuple({**LARGE_VIEWS, **settings}.items())
    )


RAN = {
    "none": {"plain"},
    "window attention": {"windows"},
    "HiDiffusion": {"stride 4 at 4, windows", "pool at 3, windows", "windows"},
    "Deep Shrink": {"shrink 0.50 at 2", "shrink 0.92 at 3", "plain"},
}


@pytest.mark.parametrize("inside", MEANT)
def test_views_are_drawn_with_the_method_inside(draw, inside):
    result, session = draw(inside=inside)
    assert set(session.ran) == RAN[inside]
    assert sum(session.ran.values()) == result.unet_calls == 2 * JOB.steps  # two views
    assert session.notes == []


@pytest.mark.parametrize("method", ("multidiffusion", "demofusion"))
@pytest.mark.parametrize("inside", [inside for inside in MEANT if inside != "none"])
def test_the_picture_is_another_than_without(draw, inside, method):
    options = {"stage_strength": 1.0} if method == "demofusion" else {}
    plain, changed = (draw(method, inside=each, **options)[0].latents for each in ("none", inside))
    assert changed.isfinite().all() and (changed - plain).abs().max() > 0.01


@pytest.mark.parametrize("inside", ("HiDiffusion", "Deep Shrink"))
def test_views_of_the_native_size_are_not_shrunk_and_a_note_says_so(draw, inside):
    result, session = draw(inside=inside, view_size=0, overlap=0.0)
    assert set(session.ran) == ({"windows"} if inside == "HiDiffusion" else {"plain"})
    assert len(session.notes) == 1 and "is off: 64x64 is 1.00 times the native size" in session.notes[0]
    other = "window attention" if inside == "HiDiffusion" else "none"
    assert torch.equal(result.latents, draw(inside=other, view_size=0, overlap=0.0)[0].latents)


def test_in_stages_views_and_grids_run_with_windows_and_so_does_the_first_stage(draw):
    result, session = draw("demofusion", inside="window attention", view_size=0)
    assert dict(session.ran) == {"windows": result.unet_calls}
    assert len(result.stages) == 3 and result.unet_calls == sum(stage["unet_calls"] for stage in result.stages)


@pytest.mark.parametrize("inside", MEANT)
def test_the_network_is_afterwards_as_it_was(parts, draw, inside):
    before = snapshots.of_tree(parts.unet)
    draw(inside=inside, tile_batch=3)
    assert snapshots.differences(before, snapshots.of_tree(parts.unet)) == []


# Whose rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ("multidiffusion", "demofusion"))
@pytest.mark.parametrize("inside", [inside for inside in MEANT if inside != "none"])
def test_views_at_once_with_a_method_inside_draw_the_same_picture(draw, inside, method):
    job = replace(JOB, batch=2)
    one, four = (draw(method, job, inside=inside, tile_batch=count)[0].latents for count in (1, 4))
    torch.testing.assert_close(four, one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("inside", [inside for inside in MEANT if inside != "none"])
@pytest.mark.parametrize("tile_batch", (1, 4))
def test_each_image_of_a_batch_has_its_own_window_shifts(draw, inside, tile_batch):
    both = draw("multidiffusion", replace(JOB, batch=2), inside=inside, tile_batch=tile_batch)[0].latents
    for index in (0, 1):
        job = replace(JOB, seed=JOB.seed + index)
        alone = draw("multidiffusion", job, inside=inside, tile_batch=tile_batch)[0].latents
        torch.testing.assert_close(both[index : index + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cfg", (1.0, 3.0))
@pytest.mark.parametrize("tile_batch", (1, 2, 4))
def test_before_each_call_the_session_is_told_the_image_of_each_of_its_rows(parts, cfg, tile_batch):
    class Told(NoSession):
        told, calls = (), []

        def rows(self, rows):
            Told.told = tuple(rows)

    Told.calls = []
    job = replace(JOB, batch=3, cfg=cfg, steps=2)
    request = Request.from_dict({"method": "multidiffusion", **LARGE_VIEWS, "view_size": 0, "tile_batch": tile_batch})
    stages = stages_of(parts, request, job, session_for(parts, request, job))
    states = []

    def called(_unet, inputs):
        Told.calls.append((Told.told, inputs[0].shape[0]))
        states.append(inputs[0])

    hook = parts.unet.register_forward_pre_hook(called)
    try:
        Blind(parts).generate(job, Told(), stages=stages)
    finally:
        hook.remove()
    images = (0, 1, 2) if cfg == 1 else (0, 1, 2, 0, 1, 2)
    assert len(Told.calls) == 2 * -(-15 // tile_batch)
    for (told, rows), inputs in zip(Told.calls, states):
        assert len(told) == rows and told == images * (rows // len(images))
        parts_of_images = [inputs[[row for row, image in enumerate(told) if image == each]] for each in (0, 1, 2)]
        views = [part.reshape(rows // len(images), -1, *inputs.shape[1:]) for part in parts_of_images]
        assert all(torch.equal(view[0], row) for part in views for view in part for row in view)  # cond as uncond
