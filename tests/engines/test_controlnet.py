"""AccDiffusion v2 with a diffusers ControlNet beside the tiny model: its edges are cropped per view and count."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

from lib_hires import Request
from lib_hires.cli import JOB_DEFAULTS
from lib_hires.config import HiresError, SettingError
from lib_hires.engines.drawing import NO_CONTROL, UNUSED_CONTROL
from lib_hires.engines.runner import Runner, load_control, session_for, stages_of
from lib_hires.engines.standalone import Engine, Job

JOB = Job("a red star", width=128, height=128, steps=3, cfg=3.0, seed=4)
SETTINGS = {"stage_strength": 0.7, "word_share": 0.3, "native_size": 64}


@pytest.fixture(scope="module")
def control(components):
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(components.unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    with torch.no_grad():  # a fresh ControlNet ends in zeros: nothing would depend on it
        for block in [*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out]:
            torch.nn.init.normal_(block.weight, std=0.05)
    return net.eval()


def drawn(components, control, method="accdiffusion_v2", job=JOB, **settings):
    request = Request.from_dict({"method": method, **SETTINGS, **settings})
    session = session_for(components, request, job)
    stages = stages_of(components, request, job, session)
    return Engine(components, control).generate(job, session, stages=stages)


def test_edges_change_the_picture_and_strength_zero_is_v1(components, control):
    v1 = drawn(components, control, "accdiffusion")
    off = drawn(components, control, edge_strength=0.0)
    on = drawn(components, control, edge_strength=1.0)
    assert torch.equal(off.latents, v1.latents)
    assert (on.latents - v1.latents).abs().max() > 1e-3
    assert on.notes == []


def test_without_a_controlnet_v1_is_drawn_and_a_note_says_so(components):
    result = drawn(components, None)
    assert torch.equal(result.latents, drawn(components, None, "accdiffusion").latents)
    assert result.notes == [NO_CONTROL]


def test_only_local_views_see_edges_and_each_sees_its_own(components, control):
    seen = []
    handle = control.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append((args[0].shape, kwargs["controlnet_cond"].clone())), with_kwargs=True
    )
    try:
        result = drawn(components, control)
    finally:
        handle.remove()
    assert len(seen) == 2 * 9  # two of three steps, nine views; the four grids have no edges
    assert {tuple(shape[-2:]) for shape, _ in seen} == {(8, 8)}
    assert {tuple(hint.shape[-3:]) for _, hint in seen} == {(3, 64, 64)}
    assert all(hint.min() >= 0 and hint.max() <= 1 for _, hint in seen)
    assert result.stages[1]["unet_evaluations"] == 2 * 13


def test_edges_can_start_late(components, control):
    calls = []
    handle = control.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        drawn(components, control, edge_start=0.5)
    finally:
        handle.remove()
    assert len(calls) == 9


def test_a_batch_equals_its_pictures_alone(components, control):
    both = drawn(components, control, job=replace(JOB, batch=2)).latents
    alone = [drawn(components, control, job=replace(JOB, seed=JOB.seed + index)).latents for index in (0, 1)]
    np.testing.assert_allclose(both.numpy(), torch.cat(alone).numpy(), atol=2e-4)


def test_a_controlnet_is_read_from_a_folder_and_a_wrong_one_is_refused(components, control, tmp_path):
    control.save_pretrained(tmp_path / "net")
    loaded = load_control(str(tmp_path / "net"), components)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in control.parameters())
    with pytest.raises(HiresError, match="controlnet"):
        load_control(str(tmp_path / "absent"), components)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HiresError, match="cannot be read"):
        load_control(str(tmp_path / "empty"), components)


# Jobs, planned and drawn ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["plan", "draw"])
def lines(request, tmp_path):
    """lines(**job) -> what planning a job prints, or the notes of drawing it."""
    runner = Runner(quiet=True)

    def ask(**job):
        job = {**JOB_DEFAULTS, "prompt": "a red star", "width": 128, "height": 128, "steps": 3, "out": str(tmp_path / "x.png"), **job}
        job["set"] = {"native_size": 64, **job["set"]}
        return runner.plan(job) if request.param == "plan" else runner.draw(job)["notes"]

    return ask


@pytest.mark.parametrize("init", [False, True])
def test_without_a_controlnet_it_is_said_that_v1_is_drawn(lines, init, tmp_path):
    Image.new("RGB", (128, 128), "navy").save(tmp_path / "start.png")
    start = {"init_image": str(tmp_path / "start.png")} if init else {}
    assert NO_CONTROL in lines(method="accdiffusion_v2", **start)
    assert NO_CONTROL not in lines(method="accdiffusion", **start)


@pytest.mark.parametrize(
    ("job", "is_used"),
    [
        ({"method": "accdiffusion_v2"}, True),
        ({"method": "accdiffusion_v2", "set": {"native_size": 128}}, False),
        ({"method": "demofusion"}, False),
        ({"method": "none"}, False),
    ],
    ids=str,
)
def test_a_controlnet_that_has_no_effect_is_named_with_the_method_that_uses_one(lines, control, tmp_path, job, is_used):
    control.save_pretrained(tmp_path / "net")
    told = lines(controlnet=str(tmp_path / "net"), **job)
    assert (UNUSED_CONTROL in told) != is_used and NO_CONTROL not in told
    assert UNUSED_CONTROL not in lines(**job)


@pytest.mark.parametrize("method", ["accdiffusion_v2", "demofusion"])
def test_a_controlnet_that_is_not_there_or_of_another_family_is_refused(lines, components, tmp_path, method):
    with pytest.raises(SettingError, match="'controlnet' is 'nowhere'"):
        lines(method=method, controlnet="nowhere")
    wide = ControlNetModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        norm_num_groups=8,
        layers_per_block=1,
        cross_attention_dim=2 * components.unet.config.cross_attention_dim,
        conditioning_embedding_out_channels=(8, 8, 16, 16),
    )
    wide.save_pretrained(tmp_path / "net")
    with pytest.raises(HiresError, match="belongs to another family of models"):
        lines(method=method, controlnet=str(tmp_path / "net"))


def test_a_negative_prompt_longer_than_the_prompt_fits_beside_window_prompts(components):
    job = replace(JOB, negative="blurred " * 90)
    assert torch.isfinite(drawn(components, None, "accdiffusion", job).latents).all()


def test_a_memory_limit_below_the_smallest_tile_is_refused_before_anything_is_drawn(components):
    calls = []
    handle = components.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(SettingError, match="'decode_memory' is 1, must be at least"):
            Engine(components, decode_bytes=2**20).generate(JOB)
    finally:
        handle.remove()
    assert calls == []
