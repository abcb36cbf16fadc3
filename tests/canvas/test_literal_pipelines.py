"""DemoFusion and AccDiffusion in our engine, step by step beside a literal pipeline that shares no code with it."""

from dataclasses import replace

import pytest
from literal_pipelines import Pipeline, Published
from small_models import components, model
from support.engines import Blind

from lib_hires.canvas.accdiffusion import AccDiffusion
from lib_hires.canvas.demofusion import DemoFusion
from lib_hires.config import Common
from lib_hires.engines.standalone import Job

NEAR = 1e-4
"""Largest difference of two latents over their standard deviation, in fp32."""


def records(drawn, seed=7):
    """The literal pipeline's draws, as our engine asks for them."""
    step_of = {round(t * 16) / 16: step for step, t in enumerate(drawn.timesteps)}
    axes = {"across": 1, "down": 0}
    initial = [drawn.initial]
    return {
        "initial noise": lambda _, stage: initial.pop() if initial else None,
        "stage noise": lambda _, stage: drawn.noise[stage],
        "view jitter": lambda _, stage, t, view, axis: drawn.jitter[stage, step_of[t], view, axes[axis]],
        "window prompts": lambda _, stage, view, axis: drawn.fixed[stage, view, axes[axis]],
        "window interaction": lambda _, stage, t, group: drawn.permutations[stage, step_of[t], group],
    }


def replay(method, constants, height, width, window_texts=None, monkeypatch=None, group=None):
    """The largest difference after each step, over the latents' standard deviation, and after the last stage."""
    parts = components(prediction=constants.prediction)
    prompt, negative = "a red dragonfly, a blue house", "blur"
    literal = Pipeline(parts.unet, parts.tokenizers, parts.text_encoders, constants)
    drawn = literal(prompt, negative, height, width, window_texts)
    if window_texts:
        monkeypatch.setattr(
            "lib_hires.engines.staged.window_texts", lambda canvas, *_, **__: {0: window_texts[canvas.stage]}
        )
    if constants.word_share:
        assert len(set(drawn.texts[1])) > 1
    job = Job(prompt, negative, width, height, steps=constants.steps, cfg=constants.guidance, seed=7)
    stages = method.stages(model(constants.window), (height // 8, width // 8), Common())
    if group:
        stages = tuple(
            replace(each, canvas=replace(each.canvas, dilated=replace(each.canvas.dilated, group=group)))
            if each.canvas
            else each
            for each in stages
        )
    states = []
    result = Blind(parts).generate(
        job, stages=stages, records=records(drawn), on_latents=lambda stage, call, x: states.append((stage, x.clone()))
    )
    assert [stage for stage, _ in states] == [stage for stage, _ in drawn.states]
    apart = [float((ours - theirs).abs().max() / theirs.std()) for (_, ours), (_, theirs) in zip(states, drawn.states)]
    return [*apart, float((result.latents - drawn.final).abs().max() / drawn.final.std())]


SIZES = {
    "2x": (256, 256),
    "2x portrait": (256, 192),
    "3x": (384, 384),
    "3x landscape, rows that 3 does not divide": (320, 384),
}


@pytest.mark.parametrize("size", SIZES)
def test_demofusion_equals_the_literal_pipeline_after_every_step(size):
    method = DemoFusion(published=True, tile_batch=5)
    assert max(replay(method, Published(16, steps=3), *SIZES[size])) < NEAR


@pytest.mark.parametrize("cosines", ((1.0, 3.0, 2.0), (5.0, 0.5, 1.0)))
def test_demofusion_s_exponents_mean_what_the_literal_pipeline_means(cosines):
    method = DemoFusion(
        published=True,
        cosine_1=cosines[0],
        cosine_2=cosines[1],
        cosine_3=cosines[2],
        filter_sigma=1.5,
    )
    assert max(replay(method, Published(16, cosines=cosines, sigma=1.5), 256, 256)) < NEAR


@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction"))
def test_demofusion_equals_the_literal_pipeline_at_ten_steps_between_the_trained_timesteps(prediction):
    constants = Published(8, steps=12, spacing="linspace", prediction=prediction)
    assert max(replay(DemoFusion(published=True), constants, 128, 128)) < NEAR


@pytest.mark.parametrize("settings, interaction", (({}, "channel"), ({"interaction": "position"}, "position")))
def test_accdiffusion_with_given_window_prompts_equals_the_literal_pipeline(settings, interaction, monkeypatch):
    """As published by itself; and by position, where that is asked for."""
    texts = {1: ["red house", "", "a", "blue", "dragon", "house blue", "a red", "fly", "x"]}
    method = AccDiffusion(published=True, **settings, view_guidance=7.5, tile_batch=4)
    constants = Published(32, steps=3, word_share=0.3, view_guidance=7.5, interaction=interaction)
    assert max(replay(method, constants, 512, 512, texts, monkeypatch)) < NEAR


@pytest.mark.parametrize("share", (0.3, 0.6))
def test_accdiffusion_finds_the_literal_pipeline_s_window_prompts(share):
    method = AccDiffusion(published=True, word_share=share)
    constants = Published(32, steps=3, word_share=share, interaction="channel")
    assert max(replay(method, constants, 512, 512)) < NEAR


def test_more_grids_than_a_group_exchange_within_their_group():
    method = AccDiffusion(published=True, interaction="position", word_share=0.0)
    constants = Published(32, steps=2, interaction="position", view_batch=3, word_share=0.0)
    assert max(replay(method, constants, 512, 512, group=3)) < NEAR
