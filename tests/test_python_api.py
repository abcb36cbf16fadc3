"""The two verbs on a real diffusers pipeline, and on compiled networks."""

import copy
import gc
import weakref

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from support import unets
from support.snapshots import differences, of_tree

import lib_hires
from lib_hires import DeepShrink, HiDiffusion
from lib_hires.config import Conflict, HiresError, UnsupportedModel
from lib_hires.engines import checkpoint


@pytest.fixture(scope="module")
def pipe():
    parts = checkpoint.load()
    result = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoders[0],
        tokenizer=parts.tokenizers[0],
        unet=parts.unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    result.set_progress_bar_config(disable=True)
    return result


def draw(pipe, width=256, height=192):
    return pipe(
        "a red star on a blue background",
        width=width,
        height=height,
        num_inference_steps=3,
        output_type="latent",
        generator=torch.Generator().manual_seed(7),
    ).images


def test_a_pipeline_draws_otherwise_inside_the_block_and_as_before_after_it(pipe):
    before, state = draw(pipe), of_tree(pipe.unet)
    with lib_hires.patched(pipe.unet, HiDiffusion(), seeds=[7], native_size=128) as session:
        inside = draw(pipe)
    assert not torch.equal(inside, before)
    assert any("stride 4" in name for name in session.ran) and sum(session.ran.values()) == 3
    assert torch.equal(draw(pipe), before) and not differences(state, of_tree(pipe.unet))


def test_apply_and_remove_are_the_same_without_a_block(pipe):
    with lib_hires.patched(pipe.unet, DeepShrink(), seeds=[7], native_size=128):
        inside = draw(pipe)
    session = lib_hires.apply(pipe.unet, DeepShrink(), seeds=[7], native_size=128)
    assert session.is_open and torch.equal(draw(pipe), inside)
    lib_hires.remove(pipe.unet)
    lib_hires.remove(pipe.unet)
    assert not session.is_open


def test_remove_closes_nested_sessions(pipe):
    state = of_tree(pipe.unet)
    sessions = [lib_hires.apply(pipe.unet, method, native_size=128) for method in (HiDiffusion(), DeepShrink())]
    lib_hires.remove(pipe.unet)
    assert not any(session.is_open for session in sessions) and not differences(state, of_tree(pipe.unet))


def test_window_attention_can_be_had_beside_deep_shrink_but_not_two_shrinks(pipe):
    with lib_hires.patched(pipe.unet, DeepShrink(), HiDiffusion(raunet=False), native_size=128) as session:
        draw(pipe)
    assert any("shrink" in name and "windows" in name for name in session.ran)
    with pytest.raises(Conflict, match="only one can"):
        lib_hires.patched(pipe.unet, DeepShrink(), HiDiffusion())
    with pytest.raises(Conflict, match="asked for twice"):
        lib_hires.patched(pipe.unet, DeepShrink(window_attention=True), HiDiffusion(raunet=False))


def test_a_pipeline_given_for_its_unet_is_told_so(pipe):
    with pytest.raises(UnsupportedModel, match=r"Pass `\.unet`"):
        lib_hires.patched(pipe, HiDiffusion())


def test_a_deep_copy_made_inside_a_session_is_a_clean_network_of_its_own():
    unet = unets.build("diffusers-sd15")
    values = unets.inputs("diffusers-sd15", (16, 24))
    plain = unets.call(unet, values)
    with lib_hires.patched(unet, HiDiffusion(), native_size=64):
        inside = unets.call(unet, values)
        clone = copy.deepcopy(unet)
        assert torch.equal(unets.call(unet, values), inside)
    assert torch.equal(unets.call(clone, values), plain)
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in clone.modules())
    clone.conv_in.weight.zero_()
    assert torch.equal(unets.call(unet, values), plain) and not torch.equal(unets.call(clone, values), plain)


def test_a_network_that_is_forgotten_while_patched_can_be_collected():
    unet = unets.build("diffusers-sd15")
    seen = weakref.ref(unet)
    lib_hires.apply(unet, HiDiffusion(), native_size=64)
    unets.call(unet, unets.inputs("diffusers-sd15", (16, 24)))
    del unet
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda unet: lib_hires.patched(unet, "hidiffusion"), "settings of methods"),
        (lambda unet: lib_hires.patched(unet, HiDiffusion), "settings of methods"),
        (lambda unet: lib_hires.patched(unet, HiDiffusion(), seeds=7), "one for each image"),
        (lambda unet: lib_hires.patched(unet, HiDiffusion(), native=64), "Did you mean 'native_size'"),
        (lambda unet: lib_hires.patched(unet, HiDiffusion()).at(timestep=float("nan")), "finite"),
        (lambda unet: lib_hires.patched(None, HiDiffusion()), "not a UNet"),
        (
            lambda unet: lib_hires.patched(unet, HiDiffusion(), lib_hires.DemoFusion()),
            "DemoFusion .* no change of a UNet",
        ),
        (lambda unet: lib_hires.apply(unet, lib_hires.MultiDiffusion()), "--method multidiffusion"),
        (lambda unet: lib_hires.apply(unet, lib_hires.Auto()), "'methods' is 'Auto'.* a whole picture"),
    ],
)
def test_wrong_arguments_are_sentences(call, words):
    with pytest.raises(HiresError, match=words):
        call(unets.build("diffusers-sd15"))
    lib_hires.remove(None)
