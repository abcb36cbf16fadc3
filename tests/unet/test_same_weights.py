"""The same weights in ldm's layout and in diffusers' give the same picture through our patches, in every stage."""

import pytest
import torch
from support import conversion, unets

from lib_hires import DeepShrink, HiDiffusion, Session

STAGES = {
    "plain": ((), 900.0),
    "published": ((HiDiffusion(),), 950.0),
    "published, later": ((HiDiffusion(),), 780.0),
    "published, at the end": ((HiDiffusion(),), 100.0),
    "stride": ((HiDiffusion(window_attention=False, t1=1, t2=0, aggressive="off"),), 900.0),
    "pool": ((HiDiffusion(window_attention=False, t1=0, t2=1, aggressive="off"),), 900.0),
    "both": ((HiDiffusion(window_attention=False, t1=1, t2=1, aggressive="off"),), 900.0),
    "windows": ((HiDiffusion(raunet=False),), 500.0),
    "windows, fixed": ((HiDiffusion(raunet=False, window_shift=False),), 500.0),
    "deep shrink, stage 1": ((DeepShrink(),), 930.0),
    "deep shrink, stage 2": ((DeepShrink(),), 800.0),
    "deep shrink, factors": ((DeepShrink(downscale=0.4, upscale=2.0, scaler="bilinear"),), 930.0),
    "deep shrink, early out": ((DeepShrink(early_out=True, depth1=4),), 930.0),
    "deep shrink with windows": ((DeepShrink(window_attention=True),), 930.0),
}


def pair_of(family):
    ldm, diffusers = unets.build(f"ldm-{family}"), unets.build(f"diffusers-{family}")
    diffusers.load_state_dict(conversion.to_diffusers(ldm.state_dict()))
    return ldm, diffusers


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_both_layouts_give_the_same_picture(family, stage):
    methods, timestep = STAGES[stage]
    values, outputs, ways = unets.inputs(family, (16, 24), batch=2), [], []
    for unet in pair_of(family):
        with Session(unet, methods, unets.COMMON, seeds=[1, 2]) as session:
            outputs.append(unets.call(unet, values, timestep))
        ways.append(session.ran)
    ldm, diffusers = outputs
    assert (ldm - diffusers).abs().max() / ldm.abs().max() < 1e-4
    assert ways[0] == ways[1]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_each_stage_gives_another_picture(family):
    """So that the comparison above can see what a stage does."""
    unet, outputs = unets.build(f"ldm-{family}"), {}
    for name in ("plain", "stride", "pool", "both", "deep shrink, stage 1", "deep shrink, factors"):
        with Session(unet, STAGES[name][0], unets.COMMON):
            outputs[name] = unets.call(unet, unets.inputs(family, (16, 24), batch=2), 930.0)
    names = list(outputs)
    close = [
        (a, b)
        for i, a in enumerate(names)
        for b in names[:i]
        if (outputs[a] - outputs[b]).abs().max() < 0.02 * outputs[a].abs().max()
    ]
    assert close == []


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_conversion_uses_every_weight_once(family):
    ldm, diffusers = unets.build(f"ldm-{family}").state_dict(), unets.build(f"diffusers-{family}").state_dict()
    converted = conversion.to_diffusers(ldm)
    assert converted.keys() == diffusers.keys() and len(converted) == len(ldm)
    assert all(converted[name].shape == diffusers[name].shape for name in converted)
    assert not torch.equal(converted["conv_in.weight"], torch.zeros(1))
