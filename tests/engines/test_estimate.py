"""What a job will cost: how many views of each size, what one call of them takes, and the line that says so."""

import re
import time
from dataclasses import replace

import pytest
import torch
from support import structures

from lib_hires.canvas.accdiffusion import AccDiffusion
from lib_hires.canvas.demofusion import DemoFusion
from lib_hires.canvas.multidiffusion import MultiDiffusion
from lib_hires.config import Common
from lib_hires.engines import estimate
from lib_hires.engines.runner import session_for, stages_of
from lib_hires.engines.standalone import Engine, Job
from lib_hires.plan.models import FAMILIES, Model
from lib_hires.plan.tiling import Stage, evaluations_of
from lib_hires.request import Request

SDXL = Model(structures.SDXL, FAMILIES["sdxl"], 1024)
MIB = 2**20


def planned(method, size, started=False):
    return method.stages(SDXL, size, Common(), started=started)


# Counting -------------------------------------------------------------------------------------------------------------


def test_plain_sampling_is_one_view_a_call():
    assert estimate.sizes_of((Stage((96, 64)),), [20]) == {((96, 64), 1): 20}


def test_views_of_one_canvas_are_counted_in_every_call():
    (stage,) = plan = planned(MultiDiffusion(overlap=0.5), (256, 256))
    assert estimate.sizes_of(plan, [10]) == {((128, 128), 1): 90}
    assert stage.evaluations() == 9


def test_three_stages_add_up_views_and_grids_of_the_size_of_the_first():
    plan = planned(DemoFusion(published=True), (384, 384))
    assert estimate.sizes_of(plan, [50, 20, 20]) == {((128, 128), 1): 50 + 20 * (9 + 4) + 20 * (25 + 9)}


def test_grids_of_another_size_than_views_are_counted_apart():
    plan = planned(DemoFusion(view_size=512), (256, 256))
    assert estimate.sizes_of(plan, [20, 8]) == {((128, 128), 1): 20 + 8 * 4, ((64, 64), 1): 8 * 49}


def test_looks_at_a_picture_that_is_given_are_counted_once_at_the_size_of_a_first_stage():
    plan = planned(AccDiffusion(view_size=512), (256, 256), started=True)
    counts = estimate.sizes_of(plan, [8])
    assert counts == {((64, 64), 1): 8 * 49, ((128, 128), 1): 4 + 8 * 4}
    assert sum(counts.values()) == evaluations_of(plan, [8])


@pytest.mark.parametrize(
    ("at_once", "wanted"),
    [
        (1, {((128, 128), 1): 20 + 104}),
        (3, {((128, 128), 1): 20, ((128, 128), 3): 104}),
        (6, {((128, 128), 1): 20, ((128, 128), 6): 72, ((128, 128), 4): 32}),
        (64, {((128, 128), 1): 20, ((128, 128), 9): 72, ((128, 128), 4): 32}),
    ],
)
def test_a_call_takes_as_many_views_as_are_asked_for_and_as_there_are(at_once, wanted):
    assert estimate.sizes_of(planned(DemoFusion(), (256, 256)), [20, 8], at_once) == wanted


# Measuring ------------------------------------------------------------------------------------------------------------


def test_seconds_are_those_of_a_view_times_their_number_and_memory_is_that_of_the_largest_call():
    asked = []

    def measure(size, views):
        asked.append((size, views))
        return {64: 0.5, 32: 0.25}[size[0]] * views, 10 * views

    counts = {((64, 64), 1): 20, ((32, 32), 6): 48, ((32, 32), 1): 4}
    assert estimate.summed(counts, measure) == (20 * 0.5 + 48 * 0.25 + 4 * 0.25, 60)
    assert asked == list(counts)
    twice = {key: 2 * count for key, count in counts.items()}
    assert estimate.summed(twice, measure) == (2 * 23.0, 60)


def test_the_second_of_two_calls_is_timed_and_its_memory_is_what_both_needed():
    shapes = []

    def evaluate(x):
        shapes.append(tuple(x.shape))
        time.sleep(0.3 if len(shapes) == 1 else 0.02)
        return torch.ones(16 * MIB)  # 64 MiB

    seconds, needed = estimate.measured(evaluate, (2, 4, 8, 8), torch.device("cpu"))
    assert shapes == [(2, 4, 8, 8)] * 2
    assert 0.02 <= seconds < 0.25
    assert 50 * MIB < needed < 200 * MIB


# The line of the plan -------------------------------------------------------------------------------------------------


def told(components, monkeypatch=None, measure=None, **settings):
    job = Job("a red star", width=128, height=128, steps=5, cfg=4.0)
    request = Request.from_dict({"method": "demofusion", "native_size": 64, **settings})
    session = session_for(components, request, job)
    if measure is not None:
        monkeypatch.setattr(estimate, "measured", measure)
    (line,) = Engine(components).estimate(job, session, stages_of(components, request, job, session))
    return line


def test_the_line_names_seconds_and_three_kinds_of_memory(components, monkeypatch):
    line = told(components, monkeypatch, lambda evaluate, shape, device: (0.5, 7 * MIB))
    assert line == (
        "estimated: 16 s in the network, 7 MiB for its calls, 80 MiB for decoding, 0.0 MiB of latents, "
        "beside the weights."
    )  # 5 + 2 x 13 evaluations of half a second


@pytest.mark.parametrize("tile_batch, views, words", [(0, 1, ""), (6, 6, " (6 views at once)"), (64, 9, " (9 views at once)")])
def test_memory_is_measured_with_the_views_that_go_into_one_call(components, monkeypatch, tile_batch, views, words):
    shapes = []

    def measure(evaluate, shape, device):
        shapes.append(shape)
        assert evaluate(torch.zeros(shape)).shape == shape  # the network is told as many rows
        return 0.1, shape[0] * MIB

    line = told(components, monkeypatch, measure, tile_batch=tile_batch)
    assert max(shape[0] for shape in shapes) == 2 * views  # with and without the prompt
    assert f", {2 * views} MiB for its calls{words}, " in line


def test_more_views_at_once_are_seen_to_take_more_memory(components):
    def needed(line):
        return int(re.search(r"(\d+) MiB for its calls", line)[1])

    wide = {"method": "multidiffusion", "view_size": 96, "overlap": 0.9, "inside": "window attention"}
    few, many = (needed(told(components, **wide, tile_batch=views)) for views in (1, 16))
    assert many > few + 15


def test_where_a_device_takes_what_memory_holds_one_view_is_said_to_be_the_least():
    counts = {((8, 8), 1): 20}
    assert estimate.views_in_words(counts, grows=True) == " (1 view at once, more where free memory holds them)"
    assert estimate.views_in_words(counts, grows=False) == ""


def test_an_inpainting_network_can_be_measured(tiny):
    from lib_hires.engines import checkpoint

    parts = checkpoint.load(tiny("sd1", 9)[0])
    assert told(replace(parts, native_resolution=64), tile_batch=4).startswith("estimated: ")
