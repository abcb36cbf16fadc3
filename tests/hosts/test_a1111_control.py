"""ControlNet's hints on a canvas, against a stand-in for the extension's hook; docs/hosts.md has what was run on the real one."""

from dataclasses import replace
from enum import Enum
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from lib_hires.canvas.canvas import DILATED, LOCAL, Canvas, Tile
from lib_hires.hosts._a1111 import control
from lib_hires.hosts._a1111.control import Hints, Silent, edge_param, is_marked, params_of
from lib_hires.hosts._a1111.views import Views
from lib_hires.plan.tiling import CanvasPlan, Dilated, Edges, Local, Stage
from lib_hires.schedule import NoiseSchedule
from lib_hires.stages.progressive import StageRun

SIZE = (16, 24)
PLAN = CanvasPlan(Local((8, 8), (8, 8)), Dilated(2, 0.0))
V2 = CanvasPlan(Local((8, 8), (8, 8)), Dilated(2, 0.0), edges=Edges(0.6, end=0.5))
MOMENT = NoiseSchedule().moment(timestep=500.0)


class Kind(Enum):
    """Some of the extension's `ControlModelType`."""

    ControlNet = 1
    AttentionInjection = 2


class Param:
    """`ControlParams`: setting the hint forgets what was made of it."""

    def __init__(self, hint, name="none", kind=Kind.ControlNet, **more):
        self._hint_cond, self.hr_hint_cond = hint, None
        self.preprocessor, self.control_model_type, self.control_model = {"name": name}, kind, None
        self.weight, self.advanced_weighting, self.guidance_stopped, self.effective_region_mask = 1.0, None, False, None
        self.used_hint_cond = None
        vars(self).update(more)

    @property
    def hint_cond(self):
        return self._hint_cond

    @hint_cond.setter
    def hint_cond(self, hint):
        self._hint_cond, self.used_hint_cond = hint, None

    def used(self, height):
        """The hint that a call for latents of this height uses, and whether it counts as the hires pass."""
        first, second = (
            8 * height - getattr(hint, "shape", (0, 0, 0))[2] for hint in (self.hint_cond, self.hr_hint_cond)
        )
        if isinstance(self.hr_hint_cond, Tensor) and not abs(first) < abs(second):
            return self.hr_hint_cond, True
        self.used_hint_cond = self.hint_cond if self.used_hint_cond is None else self.used_hint_cond
        return self.used_hint_cond, False

    def state(self):
        return {name: value for name, value in vars(self).items() if name != "used_hint_cond"}


def job(*params, models=(), **fields):
    script = SimpleNamespace(
        latest_network=SimpleNamespace(control_params=list(params)),
        enabled_units=[SimpleNamespace(model=model) for model in models],
    )
    other = SimpleNamespace(name="another script")
    return SimpleNamespace(scripts=SimpleNamespace(alwayson_scripts=[other, script]), **fields)


def places(size=SIZE, rows=1):
    """A hint that tells where each pixel lies: channels x, y, and the row of the batch."""
    y, x = torch.meshgrid(torch.arange(8.0 * size[0]), torch.arange(8.0 * size[1]), indexing="ij")
    return torch.stack([torch.stack([x, y, torch.full_like(x, float(row))]) for row in range(rows)])


def stage(plan=PLAN, seeds=(1,), hint=None):
    return StageRun(Stage(SIZE, canvas=plan), 1, Canvas(plan, SIZE, seeds, 1), hint=hint)


def sampler(step=0, steps=8):
    return SimpleNamespace(model_wrap_cfg=SimpleNamespace(step=step, total_steps=steps))


def local(*corners, index=0):
    return Tile(LOCAL, index, (8, 8), corners)


def test_without_the_extension_there_is_nothing():
    for p in (
        SimpleNamespace(),
        SimpleNamespace(scripts=None),
        SimpleNamespace(scripts=SimpleNamespace(alwayson_scripts=[])),
    ):
        assert params_of(p) == [] and edge_param(p) is None
        with Hints(p, stage(), sampler(), takes_edges=True) as hints, Silent(p):
            hints.whole()
            hints.show([local((0, 0))], [0, 0])


def test_each_view_gets_its_own_part_and_one_row_serves_all_rows():
    param, full = Param(places()), places()
    with Hints(job(param), stage(), sampler()) as hints:
        for top, left in ((0, 0), (8, 16), (4, 5)):
            hints.show([local((top, left), index=top + left)], [0, 0])
            used, is_hires = param.used(8)
            assert not is_hires
            assert torch.equal(used, full[..., 8 * top : 8 * top + 64, 8 * left : 8 * left + 64])
    assert torch.equal(param.hint_cond, full)


def test_a_grid_gets_the_hint_sampled_as_its_latents_are():
    param = Param(places())
    with Hints(job(param), stage(), sampler()) as hints:
        hints.show([Tile(DILATED, 3, (8, 12))], [0])
        corners = param.used(8)[0][0, :2, ::8, ::8] / 8
    assert corners[0, 0].tolist() == [1 + 2 * column for column in range(12)]
    assert corners[1, :, 0].tolist() == [1 + 2 * row for row in range(8)]


def test_rows_are_tile_after_tile_and_each_image_has_its_own_place():
    param = Param(places(rows=2))
    tiles = [local((0, 0), (8, 16)), local((0, 8), (8, 0), index=1)]
    with Hints(job(param), stage(seeds=(1, 2)), sampler()) as hints:
        hints.show(tiles, [0, 1, 0, 1])
        used = param.used(8)[0]
    corners = [(int(row[1, 0, 0]) // 8, int(row[0, 0, 0]) // 8, int(row[2, 0, 0])) for row in used]
    assert corners == [(0, 0, 0), (8, 16, 1)] * 2 + [(0, 8, 0), (8, 0, 1)] * 2


@pytest.mark.parametrize("factor", [0.5, 2])
def test_a_hint_of_another_size_is_brought_to_the_stages(factor):
    small = places(tuple(int(factor * length) for length in SIZE))
    param = Param(small)
    with Hints(job(param), stage(), sampler()) as hints:
        assert tuple(param.hint_cond.shape[-2:]) == (128, 192)
        assert small.min() <= param.hint_cond.min() and param.hint_cond.max() <= small.max()
        hints.show([local((8, 8))], [0])
        middle = param.used(8)[0][0, :2, 32, 32] / factor
        assert torch.allclose(middle, torch.tensor([96.0, 96.0]), atol=1.5)
    assert param.hint_cond is small


def test_the_hires_pass_uses_its_own_hint_and_the_first_pass_never_does():
    first, second = torch.zeros(1, 3, 64, 96), places()
    param = Param(first, hr_hint_cond=second)
    with Hints(job(param, is_hr_pass=True), stage(), sampler()) as hints:
        hints.show([local((8, 0))], [0])
        used, is_hires = param.used(8)
        assert is_hires and torch.equal(used, second[..., 64:, :64])
    param.hint_cond, param.hr_hint_cond = second, first
    with Hints(job(param, is_hr_pass=False), stage(), sampler()) as hints:
        hints.show([local((8, 0))], [0])
        used, is_hires = param.used(8)
        assert not is_hires and torch.equal(used, second[..., 64:, :64])
    assert param.hint_cond is second and param.hr_hint_cond is first


def test_a_region_mask_is_cut_as_the_hint_is():
    mask = places()[:, :1] / 200
    param = Param(places(), effective_region_mask=mask)
    with Hints(job(param), stage(), sampler()) as hints:
        hints.show([local((0, 16))], [0])
        assert torch.equal(param.effective_region_mask, mask[..., :64, 128:])
    assert param.effective_region_mask is mask


def test_other_hints_are_left_alone_but_a_reference_is_read_again_for_another_number_of_rows():
    words, reference = {"image_embeds": 1}, places()
    params = Param(words), Param(torch.zeros(1, 1280)), Param(reference, kind=Kind.AttentionInjection)
    with Hints(job(*params), stage(), sampler()) as hints:
        for count, forgets in ((1, True), (1, False), (2, True), (1, True)):
            params[2].used_hint_cond = "kept"
            hints.show([local((0, 0))] * count, [0])
            assert (params[2].used_hint_cond is None) == forgets
        assert params[0].hint_cond is words and params[2].hint_cond is reference


def test_everything_is_put_back_where_a_stage_fails():
    params = [Param(places(), "canny", weight=0.8, advanced_weighting=[1.0], hr_hint_cond=places()), Param(places())]
    before = [param.state() for param in params]
    run = stage(V2, hint=torch.ones(1, 3, 128, 192))
    with pytest.raises(RuntimeError), Hints(job(*params), run, sampler(), takes_edges=True) as hints:
        hints.show([local((0, 0))], [0])
        assert params[0].weight == 0.6
        raise RuntimeError
    for param, old in zip(params, before):
        assert all(param.state()[name] is value or param.state()[name] == value for name, value in old.items())


def test_silence_ends():
    param = Param(places())
    with Silent(job(param)):
        assert param.guidance_stopped
    assert not param.guidance_stopped


def test_a_canny_unit_is_known_by_its_model_or_its_preprocessor():
    plain, canny = Param(places()), Param(places(), "canny")
    assert edge_param(job(plain, canny)) is canny
    assert edge_param(job(plain, canny, models=["control_v11p_sd15_canny [1]", "x"])) is plain
    assert edge_param(job(plain, models=["depth"])) is None
    assert edge_param(job(Param({}, "canny"))) is None


def test_edges_are_for_local_views_only_and_for_their_part_of_the_stage():
    param, edges = Param(torch.rand(1, 3, 128, 192), "canny", weight=2.0, advanced_weighting=[3.0]), places() / 200
    run = stage(V2, hint=edges)
    for step, acts in ((0, True), (3, True), (4, False)):
        with Hints(job(param), run, sampler(step), takes_edges=True) as hints:
            hints.show([local((8, 8))], [0])
            assert param.guidance_stopped is not acts
            if acts:
                assert param.weight == 0.6 and param.advanced_weighting is None
                assert torch.equal(param.used(8)[0], edges[..., 64:, 64:128])
            hints.show([Tile(DILATED, 0, (8, 12))], [0])
            assert param.guidance_stopped
            hints.whole()
            assert param.guidance_stopped
    assert param.weight == 2.0


@pytest.mark.parametrize("is_blank", [True, False])
def test_before_there_are_edges_the_unit_acts_with_its_own_picture_if_there_is_anything_on_it(is_blank):
    param = Param(torch.zeros(1, 3, 128, 192) if is_blank else places(), "canny")
    run = StageRun(Stage(SIZE), 0)
    with Hints(job(param), run, sampler(), takes_edges=True) as hints:
        hints.whole()
        assert param.guidance_stopped is is_blank
    assert not param.guidance_stopped


@pytest.mark.parametrize("is_blank", [True, False])
def test_in_the_views_of_a_first_stage_the_unit_acts_as_it_is_set_too(is_blank):
    param = Param(torch.zeros(1, 3, 128, 192) if is_blank else places(), "canny", weight=2.0)
    with Hints(job(param), stage(replace(V2, edges=None)), sampler(7), takes_edges=True) as hints:
        hints.show([local((8, 8))], [0])
        assert param.guidance_stopped is is_blank and param.weight == 2.0


def test_edges_are_found_on_the_enlarged_picture(monkeypatch):
    picture = np.full((64, 96, 3), 60, np.uint8)
    picture[:, 48:] = 200
    monkeypatch.setattr(control, "_decoded", lambda latents: [picture] * len(latents))
    edges = control.edges_of(torch.zeros(2, 4, 8, 12), stage(V2))
    assert edges.shape == (2, 3, 128, 192) and set(edges.unique().tolist()) == {0.0, 1.0}
    columns = edges[0, 0].any(dim=0).nonzero().flatten()
    assert len(columns) <= 2 and all(abs(int(column) - 96) <= 2 for column in columns)


def test_the_networks_calls_are_told_their_hints_and_marked_words_keep_their_mark(monkeypatch):
    param, run, seen = Param(places()), stage(), []

    def network(x, t, cond):
        used, _ = param.used(x.shape[-2])
        assert used.shape[-2:] == (8 * x.shape[-2], 8 * x.shape[-1]) and used.shape[0] in (1, x.shape[0])
        seen.append(cond["c_crossattn"][0])
        return x

    monkeypatch.setattr("lib_hires.hosts._a1111.views.fitted", lambda text, like: text[: len(like)])
    marks = torch.tensor([1024.0, -1024.0])[:, None, None].expand(2, 1, 5)
    context = torch.cat([marks, torch.zeros(2, 7, 5)], dim=1)
    run.prompts = {0: [torch.full((7, 5), 1.0 + view) for view in range(6)]}
    views = Views(run, lambda text: None)
    with Hints(job(param), run, sampler()) as views.hints:
        views.at(MOMENT, [(0, 0), (0, None)], 5.0, SimpleNamespace(rows=lambda rows: None))
        views.over(network)(torch.randn(2, 4, *SIZE), torch.zeros(2), {"c_crossattn": [context]})
    assert len(seen) == 6 + 4
    assert [text[0, 1, 0].item() for text in seen] == [1, 2, 3, 4, 5, 6, 0, 0, 0, 0]
    assert all(is_marked(text[0]) and is_marked(text[1]) and not text[1, 1:].any() for text in seen)
    assert not is_marked(context[0, 1:])
