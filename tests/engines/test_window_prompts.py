"""Window prompts in the standalone engine: which rows are told which words, how often text is encoded; weights that change."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import structures
from support.engines import ATTENDED_AT_THE_TOP, Blind, with_small_unet

from lib_hires.canvas.accdiffusion import AccDiffusion
from lib_hires.canvas.demofusion import DemoFusion
from lib_hires.canvas.multidiffusion import MultiDiffusion
from lib_hires.config import Common
from lib_hires.engines import prompts
from lib_hires.engines.standalone import Job
from lib_hires.plan.models import FAMILIES, Model

SIZE, VIEWS, GRIDS = (16, 16), 9, 4
WORDS = ("a red star", "a blue moon", "grass", "", "a house")
JOB = Job("a red star over a blue moon", "blur", width=128, height=128, steps=2, cfg=1.0, seed=3, batch=2)


class Network(torch.nn.Module):
    """In place of a UNet: notes the context of each call. Attention maps are not gathered of it."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.config, self.contexts = SimpleNamespace(in_channels=4), []

    def forward(self, x, t, encoder_hidden_states, added_cond_kwargs=None, return_dict=False):
        self.contexts.append(encoder_hidden_states)
        return (0.5 * x,)


class NoMaps:
    """In place of `AttentionMaps`."""

    is_open = False

    def __init__(self, unet):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def result(self, image):
        return None


def text_of(image, view, stage=1):
    return WORDS[(3 * image + view + stage) % len(WORDS)]


@pytest.fixture
def told(monkeypatch):
    """Each image's views are told the words of `text_of`, another for the next view, image and stage."""

    def texts(canvas, maps, *_, **__):
        return {image: [text_of(image, view, canvas.stage) for view in range(len(canvas.views()))] for image in maps}

    monkeypatch.setattr("lib_hires.engines.staged.window_texts", texts)
    monkeypatch.setattr("lib_hires.engines.drawing.AttentionMaps", NoMaps)


def stages_of(method, size=SIZE):
    return method.stages(Model(structures.SD1, FAMILIES["sd1"], 64), size, Common())


def contexts(components, texts):
    return prompts.encode(components, list(texts)).context


@pytest.mark.parametrize("cfg", (1.0, 3.0))
@pytest.mark.parametrize("tile_batch", (1, 4))
def test_each_image_s_rows_of_a_view_are_told_its_window_prompt_and_the_others_are_not(components, told, cfg, tile_batch):
    """Without guidance there are no negative rows; with it they keep the negative prompt. Grids have the whole prompt."""
    network = Network()
    method = AccDiffusion(stage_strength=1.0, tile_batch=tile_batch)
    job = replace(JOB, cfg=cfg)
    Blind(replace(components, unet=network)).generate(job, stages=stages_of(method))
    negative, whole = contexts(components, [JOB.negative, JOB.prompt])
    known = dict(zip(WORDS, contexts(components, WORDS)))
    before = [] if cfg == 1 else [negative] * 2
    later = torch.cat(network.contexts[job.steps :])
    rows = len(before) + 2
    assert len(later) == job.steps * (VIEWS + GRIDS) * rows
    for step in later.split((VIEWS + GRIDS) * rows):
        tiles = step.split(rows)
        for view, tile in enumerate(tiles[:VIEWS]):
            wanted = torch.stack([*before, *(known[text_of(image, view)] for image in (0, 1))])
            torch.testing.assert_close(tile, wanted, atol=1e-5, rtol=1e-4)
        for tile in tiles[VIEWS:]:
            torch.testing.assert_close(tile, torch.stack([*before, whole, whole]), atol=1e-5, rtol=1e-4)
    apart = [(known[one] - known[other]).abs().max() for one in WORDS for other in WORDS if one != other]
    assert min(apart) > 1e-2  # the words can be told from each other


@pytest.mark.parametrize("steps", (1, 4))
def test_each_text_of_a_stage_is_encoded_once_however_many_steps_and_views_there_are(components, told, steps):
    calls, (encoder,) = [], components.text_encoders
    hook = encoder.register_forward_pre_hook(lambda _module, args, kwargs: calls.append((args or [*kwargs.values()])[0]), with_kwargs=True)
    try:
        method = AccDiffusion(stage_strength=1.0, max_step=1.5)
        stages = stages_of(method)
        Blind(replace(components, unet=Network())).generate(replace(JOB, steps=steps), stages=stages)
    finally:
        hook.remove()
    assert len(stages) == 3 and len(calls) == 1 + 2  # the prompts, then once for each later stage
    assert len(calls[0]) == 2
    for number, ids in enumerate(calls[1:], start=1):
        views = len(stages[number].canvas.local.views(stages[number].size))
        texts = {text_of(image, view, number) for image in (0, 1) for view in range(views)}
        assert len(ids) == 2 + len(texts) < 2 + 2 * views
        assert len({tuple(row) for row in ids[2:].tolist()}) == len(texts)


def test_without_window_prompts_nothing_more_is_encoded(components):
    calls, (encoder,) = [], components.text_encoders
    hook = encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        Blind(replace(components, unet=Network())).generate(JOB, stages=stages_of(AccDiffusion(word_share=0.0)))
    finally:
        hook.remove()
    assert calls == [1]


# Weights that change --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(components):
    """The bundled model's parts with a tiny UNet."""
    return with_small_unet(components, **ATTENDED_AT_THE_TOP)


def add_low_rank(unet, rank=2, strength=2.0):
    """W <- W + B A in place on a cross-attention layer, as LoRAs are applied to weights; returns the weight."""
    weight = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_v.weight
    generator = torch.Generator().manual_seed(6)
    up, down = (torch.randn(*shape, generator=generator) for shape in ((len(weight), rank), (rank, weight.shape[1])))
    weight.add_(strength * up @ down / weight.shape[1] ** 0.5)
    return weight


@pytest.mark.parametrize(
    "method",
    (MultiDiffusion(overlap=0.5), DemoFusion(stage_strength=1.0), AccDiffusion(stage_strength=1.0)),
    ids=("multidiffusion", "demofusion", "accdiffusion"),
)
def test_views_are_drawn_with_weights_that_were_changed_in_place_and_leave_them_as_they_were(small, method):
    job, stages = replace(JOB, cfg=3.0, batch=1), stages_of(method)
    engine = Blind(replace(small, unet=copy.deepcopy(small.unet)))
    before = engine.generate(job, stages=stages).latents
    other = Blind(replace(small, unet=copy.deepcopy(small.unet)))
    add_low_rank(other.components.unet)
    weight = add_low_rank(engine.components.unet)
    held = {name: value.clone() for name, value in engine.components.unet.state_dict().items()}
    changed = engine.generate(job, stages=stages).latents
    assert (changed - before).abs().max() > 1e-3
    assert torch.equal(other.generate(job, stages=stages).latents, changed)  # nothing was kept of the first picture
    found = engine.components.unet.state_dict()
    assert list(found) == list(held) and all(torch.equal(found[name], value) for name, value in held.items())
    weight.copy_(small.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_v.weight)
    assert torch.equal(engine.generate(job, stages=stages).latents, before)
