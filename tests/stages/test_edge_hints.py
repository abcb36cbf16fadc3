"""Hints of edges: from the pictures of the stage before to each view's own part, through a stand-in for a ControlNet."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange

from lib_hires.canvas.accdiffusion import AccDiffusionV2
from lib_hires.canvas.canvas import DILATED, LOCAL, Canvas, Tile
from lib_hires.canvas.edges import edge_map, enlarged
from lib_hires.canvas.hints import Hint
from lib_hires.config import Common
from lib_hires.engines import checkpoint
from lib_hires.engines.denoiser import Denoiser
from lib_hires.engines.prompts import Conditioning
from lib_hires.engines.staged import CanvasDenoiser
from lib_hires.engines.standalone import Engine, Job
from lib_hires.plan.models import FAMILIES, Model
from lib_hires.plan.structure import Structure
from lib_hires.plan.tiling import GAUSSIAN, ZEROS, CanvasPlan, Dilated, Edges, Local, Stage
from lib_hires.schedule import NoiseSchedule
from lib_hires.stages.edge_hints import edge_hint
from lib_hires.stages.progressive import StageRun

FACTOR = 8
SIZE = (18, 24)
MOMENT = NoiseSchedule().moment(timestep=600.0)
LOCALS = {
    "still": Local((8, 8), (4, 4)),
    "mirror": Local((8, 8), (4, 4), jitter=2),
    "zeros": Local((8, 8), (4, 4), jitter=2, edge=ZEROS),
    "bells": Local((8, 8), (5, 4), weights=GAUSSIAN, jitter=1),
    "kept places": Local((16, 16), (8, 8), jitter=4, jitter_unit=4, jitter_once=True),
    "circle": Local((8, 8), (4, 4), jitter=2, wrap=(False, True)),
    "circles": Local((8, 8), (4, 4), jitter=2, wrap=(True, True)),
}
SEEDS = (5, 9)


def places_in(size, factor=1):
    """(2, 3, f H, f W): for each of two images the row, the column and the image's number at each place, from 1."""
    rows, columns = torch.meshgrid(torch.arange(factor * size[0]), torch.arange(factor * size[1]), indexing="ij")
    return torch.stack([torch.stack([rows, columns, torch.full_like(rows, image)]) for image in (0, 1)]).float() + 1


# From pictures --------------------------------------------------------------------------------------------------------


def run_of(published=False, size=SIZE, sigma=0.3):
    return StageRun(Stage(size, canvas=CanvasPlan(LOCALS["still"], edges=Edges(0.6, sigma), published=published)), 1)


def picture(column, height=72, width=96, low=90, high=200):
    """A picture that is brighter from a column on."""
    pixels = np.full((height, width, 3), low, np.uint8)
    pixels[:, column:] = high
    return pixels


@pytest.mark.parametrize("published", (False, True))
def test_a_hint_has_three_equal_channels_of_the_stage_s_pixels_for_each_picture(published):
    hint = edge_hint([picture(60), picture(70)], run_of(published))
    assert hint.shape == (2, 3, FACTOR * SIZE[0], FACTOR * SIZE[1]) and hint.dtype is torch.float32
    assert hint.min() == 0 and 0.8 < hint.max() <= 1
    assert torch.equal(hint[:, 0], hint[:, 1]) and torch.equal(hint[:, 0], hint[:, 2])
    for found, column in zip(hint[:, 0], (60, 70)):
        lit = found.mean(0).nonzero().flatten()
        assert abs(float(lit.float().mean()) - 2 * column) <= 2  # twice as wide


def test_edges_are_found_on_the_large_picture_and_as_published_the_small_map_is_enlarged():
    default, published = (edge_hint([picture(60)], run_of(each))[0, 0] for each in (False, True))
    assert set(default.unique().tolist()) == {0.0, 1.0}
    assert len(published.unique()) > 2  # soft
    thickness = [int((hint[50] > 0.3).sum()) for hint in (default, published)]
    assert thickness[0] == 1 and thickness[1] >= 2


@pytest.mark.parametrize("sigma", (0.3, 0.6))
def test_a_hint_is_the_edge_map_in_both_forms(sigma):
    shown = np.random.default_rng(1).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    shown = enlarged(shown, 96, 72)
    pixels = FACTOR * SIZE[1], FACTOR * SIZE[0]
    default, published = (edge_hint([shown], run_of(each, sigma=sigma))[0, 0] for each in (False, True))
    np.testing.assert_array_equal(default.numpy() * 255, edge_map(enlarged(shown, *pixels), sigma))
    wanted = enlarged(edge_map(shown, sigma, published=True), *pixels)
    np.testing.assert_allclose(published.numpy() * 255, wanted, atol=1e-4)
    assert default.any() and published.any() and not torch.equal(default, published)


def test_a_dark_picture_s_noise_is_no_hint_but_as_published():
    noise = np.zeros((72, 96, 3), np.uint8)
    noise[::6, ::6] = 2
    default, published = (edge_hint([noise], run_of(each)) for each in (False, True))
    assert not default.any() and published.mean() > 0.05


# Cut for views --------------------------------------------------------------------------------------------------------


def canvas_of(local, size=SIZE):
    plan = CanvasPlan(local)
    return plan, Canvas(plan, size, SEEDS).views(MOMENT)


@pytest.mark.parametrize("name", LOCALS)
@pytest.mark.parametrize("size", (SIZE, (17, 21)))
def test_the_parts_of_a_hint_put_together_at_their_views_places_are_the_hint(name, size):
    local = LOCALS[name]
    plan, views = canvas_of(local, size)
    whole = torch.rand(2, 3, FACTOR * size[0], FACTOR * size[1], generator=torch.Generator().manual_seed(2))
    hint, total, count = Hint(whole, size, plan), torch.zeros_like(whole), torch.zeros_like(whole)
    for view in views:
        parts = hint.crop(Tile(LOCAL, view.index, view.size, view.places), (0, 1))
        assert parts.shape == (2, 3, FACTOR * view.size[0], FACTOR * view.size[1])
        for image in (0, 1):
            rows, columns = (
                torch.arange(FACTOR * start, FACTOR * (start + length))
                for start, length in zip(view.places[image], view.size)
            )
            inside = []
            for axis, at in enumerate((rows, columns)):
                on = torch.ones_like(at, dtype=torch.bool) if local.wrap[axis] else (at >= 0) & (at < whole.shape[2 + axis])
                inside.append((on, at[on] % whole.shape[2 + axis]))
            (rows_on, rows), (columns_on, columns) = inside
            part = parts[image][:, rows_on][:, :, columns_on]
            total[image][:, rows[:, None], columns[None, :]] += part
            count[image][:, rows[:, None], columns[None, :]] += 1
    assert count.min() >= 1
    torch.testing.assert_close(total / count, whole, atol=1e-6, rtol=0)
    if local.jitter:
        assert any(view.place is None for view in views)  # the images' views lie at different places


@pytest.mark.parametrize("name", LOCALS)
def test_each_view_sees_the_part_of_its_own_place_and_image(name):
    """The hint counts its pixels: inside the canvas a crop begins at eight times its view's place."""
    plan, views = canvas_of(LOCALS[name])
    hint, reached_out = Hint(places_in(SIZE, FACTOR), SIZE, plan), 0
    for view in views:
        parts = hint.crop(Tile(LOCAL, view.index, view.size, view.places), (1, 0, 1))
        for part, image in zip(parts, (1, 0, 1)):
            for axis in (0, 1):
                place, extent = view.places[image][axis], FACTOR * SIZE[axis]
                wanted = FACTOR * place + torch.arange(FACTOR * view.size[axis]) + 1.0
                found = part[axis].movedim(axis, 0)
                inside = (wanted >= 1) & (wanted <= extent)
                if LOCALS[name].wrap[axis]:
                    wanted, inside = (wanted - 1) % extent + 1, torch.ones_like(inside)
                reached_out += int((~inside).sum())
                shown = found[inside]
                lit = shown != 0  # beyond the other axis' edge there may be zeros
                assert lit.any() and torch.equal(shown[lit], wanted[inside][:, None].expand_as(shown)[lit])
                if LOCALS[name].edge == ZEROS:
                    assert not found[~inside].any()
            assert set(part[2].unique().tolist()) <= {image + 1.0, 0.0}
    assert (reached_out > 0) == (LOCALS[name].jitter > 0 and not all(LOCALS[name].wrap))


# Through the denoiser -------------------------------------------------------------------------------------------------


class Control(torch.nn.Module):
    """In place of a ControlNet: what it is called with, and residuals that are the hint's mean in each latent."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, encoder_hidden_states, controlnet_cond, conditioning_scale, added_cond_kwargs, return_dict):
        self.calls.append(SimpleNamespace(x=x, words=encoder_hidden_states, hint=controlnet_cond, scale=conditioning_scale))
        mean = rearrange(controlnet_cond, "n c (h f) (w g) -> n h w (c f g)", f=FACTOR, g=FACTOR).mean(-1)
        return [conditioning_scale * mean[:, None]], conditioning_scale * mean[:, None]


class Network(torch.nn.Module):
    """In place of a UNet: a little of its input and of its residuals."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.config, self.calls = SimpleNamespace(in_channels=4), []

    def forward(self, x, t, encoder_hidden_states, added_cond_kwargs=None, return_dict=False, **residuals):
        self.calls.append((x, residuals))
        more = sum(part.expand_as(x) for part in residuals.get("down_block_additional_residuals", ()))
        return ((0.5 * x + more + encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1)).tanh(),)


def denoiser_of(local, tile_batch, guided=True, hint=None):
    """(denoiser, network, control) for two images of a stage whose hint counts its pixels."""
    plan = CanvasPlan(local, Dilated(2, 0.0), edges=Edges(0.5), tile_batch=tile_batch)
    hint = places_in(SIZE, FACTOR) if hint is None else hint
    run = StageRun(Stage(SIZE, canvas=plan), 1, Canvas(plan, SIZE, SEEDS), hint=hint)
    rows = 4 if guided else 2
    told = Conditioning(torch.arange(float(rows)).view(rows, 1, 1).expand(rows, 3, 5))
    network, control = Network(), Control()
    plain = Denoiser(network, told)
    denoiser = CanvasDenoiser(plain, (0, 1) * (rows // 2), 3.0 if guided else 1.0, run, control=control)
    denoiser.at(MOMENT, 3, 10)
    return denoiser, network, control


@pytest.mark.parametrize("guided", (True, False))
@pytest.mark.parametrize("tile_batch", (1, 4, 16))
@pytest.mark.parametrize("name", LOCALS)
def test_every_row_of_a_call_has_the_edges_of_its_own_latents(name, tile_batch, guided):
    """Hint and latents both count their places: pixel 8 k of a crop belongs to latent k, of the same image."""
    denoiser, _, control = denoiser_of(LOCALS[name], tile_batch, guided)
    latents = places_in(SIZE)
    x = torch.cat([latents, latents]) if guided else latents
    denoiser(torch.cat([x, torch.zeros_like(x[:, :1])], dim=1), torch.tensor(600.0))
    views = len(LOCALS[name].views(SIZE))
    assert sum(len(call.x) for call in control.calls) == views * len(x)
    assert len(control.calls) == -(-views // tile_batch)
    for call in control.calls:
        corners = call.hint[:, :, ::FACTOR, ::FACTOR].clone()
        inside = corners[:, :2] != 0
        blocks = (corners[:, :2] - 1).div(FACTOR, rounding_mode="floor") + 1
        torch.testing.assert_close(blocks * inside, call.x[:, :2], rtol=0, atol=0)
        assert torch.equal(corners[:, 2], call.x[:, 2])
        assert call.scale == 0.5


@pytest.mark.parametrize("tile_batch", (1, 4))
def test_the_words_of_a_control_s_rows_are_those_of_the_network_s(tile_batch):
    denoiser, _, control = denoiser_of(LOCALS["mirror"], tile_batch)
    denoiser(torch.rand(4, 4, *SIZE), torch.tensor(600.0))
    for call in control.calls:
        assert call.words[:, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0] * (len(call.x) // 4)


def test_grids_have_no_edges_and_their_answer_does_not_hang_on_the_hint():
    found = []
    for hint in (torch.zeros(2, 3, 144, 192), torch.ones(2, 3, 144, 192)):
        denoiser, network, _ = denoiser_of(None, 4, hint=hint)
        found.append(denoiser(torch.full((4, 4, *SIZE), 0.3), torch.tensor(600.0)))
        assert all(not residuals for _, residuals in network.calls)
    assert torch.equal(*found)


@pytest.mark.parametrize("tile_batch", (1, 4))
def test_views_have_residuals_and_grids_have_none(tile_batch):
    denoiser, network, control = denoiser_of(LOCALS["mirror"], tile_batch)
    denoiser(torch.rand(4, 4, *SIZE), torch.tensor(600.0))
    with_edges = [bool(residuals) for _, residuals in network.calls]
    assert with_edges == [True] * len(control.calls) + [False] * -(-4 // tile_batch)


def test_a_share_of_nothing_calls_no_control():
    denoiser, network, control = denoiser_of(LOCALS["mirror"], 4)
    denoiser.share = 0.0
    denoiser(torch.rand(4, 4, *SIZE), torch.tensor(600.0))
    assert not control.calls and all(not residuals for _, residuals in network.calls)


@pytest.mark.parametrize("wrap", ((False, False), (False, True)))
def test_a_hint_s_part_for_a_grid_is_not_that_of_a_view(wrap):
    """Every second latent's block, in order: what a ControlNet on grids would have to be shown."""
    plan = CanvasPlan(replace(LOCALS["mirror"], wrap=wrap), Dilated(2, 0.0))
    hint = Hint(places_in(SIZE, FACTOR), SIZE, plan)
    part = hint.crop(Tile(DILATED, 3, (9, 12)), (0,))[0]
    assert part.shape == (3, 72, 96)
    assert part[0, ::FACTOR, 0].tolist() == [FACTOR * row + 1.0 for row in range(1, 18, 2)]


# A whole run ----------------------------------------------------------------------------------------------------------


class Pictured(Engine):
    """An engine whose pictures are simply made of the latents' first channels."""

    def decode(self, latents, wrap=(False, False)):
        values = latents[:, :3].mul(40).add(128).clamp(0, 255).byte()
        return [
            np.repeat(np.repeat(each.permute(1, 2, 0).numpy(), FACTOR, 0), FACTOR, 1) for each in values
        ]


@pytest.fixture(scope="module")
def components():
    return checkpoint.load()


def drawn(components, tile_batch, published=False, **values):
    control = Control()
    method = AccDiffusionV2(word_share=0.0, stage_strength=1.0, tile_batch=tile_batch, published=published, **values)
    model = Model(Structure((), ()), FAMILIES["sd1"], 64)
    job = Job("a red star", width=128, height=128, steps=4, cfg=3.0, seed=3, batch=2)
    engine = Pictured(replace(components, unet=Network()), control)
    return engine.generate(job, stages=method.stages(model, (16, 16), Common())), control.calls


@pytest.mark.parametrize("published", (False, True))
def test_a_staged_run_with_several_views_a_call_is_the_run_with_one(components, published):
    one, calls = drawn(components, 1, published)
    four, fewer = drawn(components, 4, published)
    assert len(calls) == 4 * 9 and len(fewer) == 4 * 3
    torch.testing.assert_close(four.latents, one.latents, atol=1e-5, rtol=1e-5)
    hints = [torch.cat([call.hint for call in each]) for each in (calls, fewer)]
    assert torch.equal(*hints) and 0.005 < hints[0].mean() < 0.9
    off, none = drawn(components, 4, published, edge_strength=0.0)
    assert not none and (off.latents - one.latents).abs().max() > 0.01
    assert one.notes == []


def test_edges_count_in_the_steps_of_their_share_only(components):
    _, calls = drawn(components, 16, edge_start=0.25, edge_end=0.75)
    assert len(calls) == 2
    assert {call.scale for call in calls} == {0.6}
