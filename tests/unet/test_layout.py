"""The layout reader: both forms of a UNet become the same numbered steps, anything else one clear sentence."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from support import unets
from support.structures import SD1, sdxl
from torch import nn

from lib_hires.config import Common, HiresError, UnsupportedModel
from lib_hires.plan.models import read_model
from lib_hires.unet.layout import read_layout

SDXL = sdxl(unets.DEPTHS[1], unets.DEPTHS[2])


def steps_of(structure):
    return structure.encoder, structure.decoder


@pytest.mark.parametrize("kind", ["ldm-sd15", "diffusers-sd15", "forge"])
def test_an_sd1_unet_has_the_twelve_and_twelve_steps_of_the_table(kind):
    assert steps_of(read_layout(unets.build(kind)).structure) == steps_of(SD1)


@pytest.mark.parametrize("kind", ["ldm-sdxl", "diffusers-sdxl"])
def test_an_sdxl_unet_has_the_nine_and_nine_steps_of_the_table(kind):
    assert steps_of(read_layout(unets.build(kind)).structure) == steps_of(SDXL)


@pytest.mark.parametrize(
    ("kind", "vector", "family"),
    [
        ("ldm-sd15", 0, "sd1"),
        ("diffusers-sd15", 0, "sd1"),
        ("forge", 0, "sd1"),
        ("ldm-sdxl", unets.VECTOR, "sdxl"),
        ("diffusers-sdxl", unets.VECTOR, "sdxl"),
    ],
)
def test_widths_channels_and_family_are_read_from_the_network(kind, vector, family):
    structure = read_layout(unets.build(kind)).structure
    assert (structure.context_width, structure.vector_width, structure.in_channels) == (unets.CONTEXT, vector, 4)
    assert read_model(structure).family.key == family


@pytest.mark.parametrize("kind", [*unets.KINDS, "forge"])
def test_nine_input_channels_are_an_inpainting_model(kind):
    assert read_layout(unets.build(kind, in_channels=9)).structure.inpainting


LDM_PLACES = {  # step: (first, last) module of the table
    "ldm-sd15": {
        0: ("input_blocks.0.0", "input_blocks.0.0"),
        1: ("input_blocks.1.0", "input_blocks.1.1"),
        3: ("input_blocks.3.0", "input_blocks.3.0"),
        4: ("input_blocks.4.0", "input_blocks.4.1"),
        11: ("input_blocks.11.0", "input_blocks.11.0"),
    },
    "diffusers-sd15": {
        0: ("conv_in", "conv_in"),
        1: ("down_blocks.0.resnets.0", "down_blocks.0.attentions.0"),
        3: ("down_blocks.0.downsamplers.0", "down_blocks.0.downsamplers.0"),
        4: ("down_blocks.1.resnets.0", "down_blocks.1.attentions.0"),
        11: ("down_blocks.3.resnets.1", "down_blocks.3.resnets.1"),
    },
    "ldm-sdxl": {
        1: ("input_blocks.1.0", "input_blocks.1.0"),
        5: ("input_blocks.5.0", "input_blocks.5.1"),
        6: ("input_blocks.6.0", "input_blocks.6.0"),
        8: ("input_blocks.8.0", "input_blocks.8.1"),
    },
    "diffusers-sdxl": {
        1: ("down_blocks.0.resnets.0", "down_blocks.0.resnets.0"),
        5: ("down_blocks.1.resnets.1", "down_blocks.1.attentions.1"),
        6: ("down_blocks.1.downsamplers.0", "down_blocks.1.downsamplers.0"),
        8: ("down_blocks.2.resnets.1", "down_blocks.2.attentions.1"),
    },
}
DECODER_PLACES = {  # step: (first, last before the up-sampler, up-sampler)
    "ldm-sd15": {
        2: ("output_blocks.2.0", "output_blocks.2.0", "output_blocks.2.1"),
        7: ("output_blocks.7.0", "output_blocks.7.1", None),
        8: ("output_blocks.8.0", "output_blocks.8.1", "output_blocks.8.2"),
        11: ("output_blocks.11.0", "output_blocks.11.1", None),
    },
    "diffusers-sd15": {
        2: ("up_blocks.0.resnets.2", "up_blocks.0.resnets.2", "up_blocks.0.upsamplers.0"),
        7: ("up_blocks.2.resnets.1", "up_blocks.2.attentions.1", None),
        8: ("up_blocks.2.resnets.2", "up_blocks.2.attentions.2", "up_blocks.2.upsamplers.0"),
        11: ("up_blocks.3.resnets.2", "up_blocks.3.attentions.2", None),
    },
    "ldm-sdxl": {
        2: ("output_blocks.2.0", "output_blocks.2.1", "output_blocks.2.2"),
        4: ("output_blocks.4.0", "output_blocks.4.1", None),
        5: ("output_blocks.5.0", "output_blocks.5.1", "output_blocks.5.2"),
        8: ("output_blocks.8.0", "output_blocks.8.0", None),
    },
    "diffusers-sdxl": {
        2: ("up_blocks.0.resnets.2", "up_blocks.0.attentions.2", "up_blocks.0.upsamplers.0"),
        4: ("up_blocks.1.resnets.1", "up_blocks.1.attentions.1", None),
        5: ("up_blocks.1.resnets.2", "up_blocks.1.attentions.2", "up_blocks.1.upsamplers.0"),
        8: ("up_blocks.2.resnets.2", "up_blocks.2.resnets.2", None),
    },
}


def test_every_step_holds_the_modules_of_the_table(kind, unet):
    layout = read_layout(unet)
    for step, (first, last) in LDM_PLACES[kind].items():
        modules = layout.encoder[step]
        assert (modules.first, modules.last) == (unet.get_submodule(first), unet.get_submodule(last))
    for step, (first, last, upsample) in DECODER_PLACES[kind].items():
        modules = layout.decoder[step]
        assert (modules.first, modules.last) == (unet.get_submodule(first), unet.get_submodule(last))
        assert modules.upsample is (upsample and unet.get_submodule(upsample))


def test_down_samplers_and_up_samplers_stand_where_the_structure_says(unet):
    layout = read_layout(unet)
    assert [m.downsample is not None for m in layout.encoder] == [s.kind == "down" for s in layout.structure.encoder]
    assert [m.upsample is not None for m in layout.decoder] == [s.upsamples for s in layout.structure.decoder]


@pytest.mark.parametrize(
    ("kind", "level", "names"),
    [
        ("ldm-sd15", 0, ["input_blocks.1.1", "input_blocks.2.1", *(f"output_blocks.{i}.1" for i in (9, 10, 11))]),
        ("ldm-sdxl", 1, ["input_blocks.4.1", "input_blocks.5.1", *(f"output_blocks.{i}.1" for i in (3, 4, 5))]),
        (
            "diffusers-sd15",
            0,
            [*(f"down_blocks.0.attentions.{i}" for i in (0, 1)), *(f"up_blocks.3.attentions.{i}" for i in (0, 1, 2))],
        ),
        (
            "diffusers-sdxl",
            1,
            [*(f"down_blocks.1.attentions.{i}" for i in (0, 1)), *(f"up_blocks.1.attentions.{i}" for i in (0, 1, 2))],
        ),
    ],
)
def test_the_transformers_of_a_level_come_in_the_order_in_which_they_run(kind, level, names):
    unet = unets.build(kind)
    assert read_layout(unet).transformers(level) == [unet.get_submodule(name) for name in names]


def test_fewer_pairs_in_a_level_are_read_too():
    unet = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=32,
        channel_mult=(1, 1, 2),
        num_res_blocks=1,
        attention_resolutions=[2, 4],
        num_heads=2,
        context_dim=8,
        use_spatial_transformer=True,
    )
    structure = read_layout(unet).structure
    assert [(s.kind, s.level) for s in structure.encoder] == [
        ("conv", 0),
        ("pair", 0),
        ("down", 1),
        ("pair", 1),
        ("down", 2),
        ("pair", 2),
    ]


def test_a_compiled_network_is_read_through(unet):
    assert read_layout(torch.compile(unet, backend="eager")).unet is unet


# What is no such UNet -------------------------------------------------------------------------------------------------


def one_sentence(error):
    text = str(error.value)
    assert text.startswith("Hires Lab: ") and text.endswith(".") and "\n" not in text and len(text) < 260
    return text


def test_a_transformer_network_is_refused_by_its_name():
    dit = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=4)
    with pytest.raises(UnsupportedModel) as caught:
        read_layout(dit)
    assert "is a DiTTransformer2DModel, not a UNet" in one_sentence(caught)
    assert isinstance(caught.value, HiresError) and isinstance(caught.value, TypeError)


def test_a_pipeline_given_for_its_unet_is_told_so():
    with pytest.raises(UnsupportedModel, match=r"SimpleNamespace was given where its UNet is needed\. Pass `\.unet`\."):
        read_layout(SimpleNamespace(unet=unets.build("ldm-sd15")))


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), None, 3, "unet"])
def test_what_is_no_network_is_refused(thing):
    with pytest.raises(UnsupportedModel) as caught:
        read_layout(thing)
    assert "not a UNet" in one_sentence(caught)


def test_a_unet_whose_steps_do_not_pair_is_refused():
    unet = unets.build("ldm-sd15")
    del unet.output_blocks[0]
    with pytest.raises(UnsupportedModel) as caught:
        read_layout(unet)
    assert "12 encoder steps but 11 decoder steps" in one_sentence(caught)


def test_a_unet_whose_skips_differ_in_size_is_refused():
    unet = unets.build("ldm-sd15")
    del unet.output_blocks[2][1]
    with pytest.raises(UnsupportedModel) as caught:
        read_layout(unet)
    assert "decoder step 3 and its skip differ in resolution" in one_sentence(caught)


def test_a_down_sampler_without_weights_is_refused():
    unet = unets.build("ldm-sd15")
    unet.input_blocks[3][0].op = nn.AvgPool2d(2)
    with pytest.raises(UnsupportedModel) as caught:
        read_layout(unet)
    assert "a down-sampler without a strided convolution" in one_sentence(caught)


def test_a_unet_that_resamples_inside_its_residual_blocks_is_refused():
    with pytest.raises(UnsupportedModel) as caught:
        read_layout(
            UNetModel(
                image_size=32,
                in_channels=4,
                out_channels=4,
                model_channels=32,
                channel_mult=(1, 1, 2),
                num_res_blocks=2,
                attention_resolutions=[2, 4],
                num_heads=2,
                context_dim=8,
                use_spatial_transformer=True,
                resblock_updown=True,
            )
        )
    assert "1 resolution(s) instead of 3 or 4" in one_sentence(caught)
    with pytest.raises(UnsupportedModel, match=r"instead of 3 or 4|without a strided convolution"):
        read_layout(
            UNet2DConditionModel(
                block_out_channels=(32, 32),
                down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"),
                layers_per_block=1,
                mid_block_type=None,
            )
        )


def test_a_wrong_family_choice_is_refused_against_the_real_network(unet, kind):
    wrong = "sd1" if kind.endswith("sdxl") else "sdxl"
    with pytest.raises(HiresError, match=f"'family' is '{wrong}'"):
        read_model(read_layout(unet).structure, Common(family=wrong))
