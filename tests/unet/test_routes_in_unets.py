"""Routes in real networks: every size closes by our own resizing, and each operation is the published one."""

import pytest
import torch
from ldm.modules.diffusionmodules import openaimodel
from support import unets
from torch import nn
from torch.nn import functional as F

from lib_hires import DeepShrink, HiDiffusion, Session
from lib_hires.config import UnsupportedModel
from lib_hires.patches import UndoLog
from lib_hires.plan.route import Dilate, Pool, Shrink, find_route
from lib_hires.schedule import Gate, Level
from lib_hires.unet.blocks import install_route
from lib_hires.unet.layout import read_layout

OPEN, START = Gate(1.0), Level(0.0)
SIZES = [(16, 16), (15, 17), (21, 13), (13, 30), (33, 12)]
ALL = [*unets.KINDS, "forge"]
LDM = [kind for kind in ALL if not kind.startswith("diffusers")]
RAUNET = {
    "stride": HiDiffusion(window_attention=False, t1=1, t2=0, aggressive="off", min_scale=1),
    "pool": HiDiffusion(window_attention=False, t1=0, t2=1, aggressive="off", min_scale=1),
    "both": HiDiffusion(window_attention=False, t1=1, t2=1, aggressive="off", min_scale=1),
    "with windows": HiDiffusion(t1=1, t2=1, aggressive="off", min_scale=1),
}


@pytest.fixture(autouse=True)
def cat_that_repairs_nothing(monkeypatch):
    """A1111 puts a `cat` into ldm's namespace that resizes what does not fit; here every such case is an error."""

    class Namespace:
        calls = 0

        def __getattr__(self, name):
            return getattr(torch, name)

        def cat(self, tensors, *args, **kwargs):
            sizes = {tuple(tensor.shape[-2:]) for tensor in tensors}
            assert len(sizes) == 1, f"A1111's cat would resize {sizes}"
            self.calls += 1
            return torch.cat(tensors, *args, **kwargs)

    namespace = Namespace()
    monkeypatch.setattr(openaimodel, "th", namespace)
    return namespace


def decoder_inputs(unet):
    """A list that is filled with the size of what each decoder step is given, in order."""
    sizes = []
    for modules in read_layout(unet).decoder:
        modules.first.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[-2:])))
    return sizes


def run(unet, kind, method, size, timestep=990.0):
    values = unets.inputs(kind, size, batch=2)  # the group norms of so narrow a network refuse a single number
    with Session(unet, [method], unets.COMMON) as session:
        output = unets.call(unet, values, timestep)
    assert set(session.ran) - {"plain", "windows"}, "no route was on"
    assert output.shape == values["x"].shape and output.isfinite().all()
    return output


# Any size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RAUNET)
@pytest.mark.parametrize("kind", ALL)
def test_raunet_closes_at_any_size_and_the_repairing_cat_is_never_needed(kind, name, cat_that_repairs_nothing):
    unet = unets.build(kind)
    for size in SIZES:
        run(unet, kind, RAUNET[name], size)
    layers = 9 if kind.endswith("sdxl") else 12
    assert cat_that_repairs_nothing.calls == (layers * len(SIZES) if kind in LDM else 0)


@pytest.mark.parametrize("early", [False, True], ids=["mirrored", "early out"])
@pytest.mark.parametrize("kind", ALL)
def test_deep_shrink_closes_at_every_depth_and_at_odd_sizes(kind, early):
    unet = unets.build(kind)
    for depth in range(1, 10 if kind.endswith("sdxl") else 13):
        run(unet, kind, DeepShrink(depth1=depth, early_out=early), (15, 18), 980.0)


@pytest.mark.parametrize("scaler", ["bicubic", "bilinear", "nearest", "nearest-exact"])
@pytest.mark.parametrize("kind", ALL)
def test_deep_shrink_closes_with_every_factor_and_scaler(kind, scaler):
    unet = unets.build(kind)
    for down, up, depth in [(0.1, -1, 3), (0.35, 1.0, 4), (0.9, 3.1, 3), (0.5, 2.0, 4)]:
        run(unet, kind, DeepShrink(depth1=depth, downscale=down, upscale=up, scaler=scaler), (13, 22))


@pytest.mark.parametrize("kind", ["diffusers-sd15", "diffusers-sdxl"])
@pytest.mark.parametrize("method", [RAUNET["both"], DeepShrink(scaler="bilinear")], ids=["raunet", "deep shrink"])
def test_low_precision_is_kept(kind, method):
    unet = unets.build(kind).to(torch.bfloat16)
    values = {name: value.to(torch.bfloat16) for name, value in unets.inputs(kind, (15, 18)).items()}
    with Session(unet, [method], unets.COMMON):
        output = unets.call(unet, values)
    assert output.dtype == torch.bfloat16 and output.shape == values["x"].shape and output.isfinite().all()


# Which sizes the skips have -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "method", "wanted"),
    [
        # decoder steps take, in order: level 3 (3 steps), 2 (3), 1 (3), 0 (3)
        ("sd15", RAUNET["stride"], [2] * 3 + [4] * 3 + [8] * 3 + [32] * 3),
        ("sd15", RAUNET["pool"], [2] * 3 + [4] * 3 + [8] * 2 + [16] + [32] * 3),
        ("sd15", RAUNET["both"], [1] * 3 + [2] * 3 + [4] * 2 + [8] + [32] * 3),
        ("sdxl", RAUNET["stride"], [4] * 3 + [8] * 2 + [16] + [32] * 3),  # T1 is SDXL's pool
        ("sdxl", RAUNET["pool"], [4] * 3 + [16] * 3 + [32] * 3),  # T2 is SDXL's stride
        ("sdxl", RAUNET["both"], [2] * 3 + [8] * 2 + [16] + [32] * 3),
        ("sd15", DeepShrink(depth1=3), [2] * 3 + [4] * 3 + [8] * 3 + [16] + [32] * 2),
        ("sd15", DeepShrink(depth1=4), [2] * 3 + [4] * 3 + [8] * 3 + [32] * 3),
        ("sdxl", DeepShrink(depth1=7), [4] * 3 + [16] * 3 + [32] * 3),
    ],
)
@pytest.mark.parametrize("form", ["ldm", "diffusers"])
def test_every_decoder_step_is_given_maps_of_the_planned_size(form, kind, method, wanted):
    unet = unets.build(f"{form}-{kind}")
    sizes = decoder_inputs(unet)
    run(unet, f"{form}-{kind}", method, (32, 64), 999.0)
    assert sizes == [(n, 2 * n) for n in wanted]


@pytest.mark.parametrize("step", range(12))
@pytest.mark.parametrize("kind", ["ldm-sd15", "diffusers-sd15"])
def test_skips_above_a_shrink_are_full_and_the_mirrored_step_ends_full(kind, step):
    unet, plain = unets.build(kind), decoder_inputs(full := unets.build(kind))
    unets.call(full, unets.inputs(kind, (32, 32)))
    sizes = decoder_inputs(unet)
    with UndoLogOf(unet, (Shrink(OPEN, step, 0.5),), (32, 32)):
        unets.call(unet, unets.inputs(kind, (32, 32)))
    mirrored = 11 - step
    assert sizes[mirrored + 1 :] == plain[mirrored + 1 :]
    assert all(a == (b[0] // 2, b[1] // 2) for a, b in zip(sizes[: mirrored + 1], plain[: mirrored + 1]))


class UndoLogOf:
    """A route of these edits, installed while the block lasts."""

    def __init__(self, unet, edits, size):
        self.layout, self.log = read_layout(unet), UndoLog()
        self.route = find_route(self.layout.structure, size, edits, START)

    def __enter__(self):
        install_route(self.layout, self.route, self.log)
        return self.route

    def __exit__(self, *_):
        self.log.undo()


# What each operation does ---------------------------------------------------------------------------------------------


def captured(module):
    """A list that is filled with (input, output) of each call of a module; register it before a route is installed."""
    seen = []
    module.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    return seen


def conv_of(downsample):
    return getattr(downsample, "op", None) or downsample.conv


@pytest.mark.parametrize("kind", ALL)
def test_the_down_sampler_strides_four_with_its_own_weights(kind):
    unet = unets.build(kind)
    conv = conv_of(read_layout(unet).encoder[3].downsample)
    seen = captured(conv)
    with UndoLogOf(unet, (Dilate(OPEN, 3),), (21, 18)):
        unets.call(unet, unets.inputs(kind, (21, 18)))
    ((x, output),) = seen
    assert torch.equal(output, F.conv2d(x, conv.weight, conv.bias, stride=4, padding=2, dilation=2))
    assert (tuple(conv.stride), tuple(conv.padding), tuple(conv.dilation)) == ((2, 2), (1, 1), (1, 1))


@pytest.mark.parametrize("kind", ALL)
def test_the_up_sampler_goes_nearest_to_the_next_skip_and_then_convolves(kind):
    unet = unets.build(kind)
    layout = read_layout(unet)
    step = next(i for i, s in enumerate(layout.structure.decoder) if s.upsamples and s.level == 1)
    before, after = captured(layout.decoder[step].last), captured(layout.decoder[step].upsample.conv)
    with UndoLogOf(unet, (Dilate(OPEN, 3),), (21, 18)):
        unets.call(unet, unets.inputs(kind, (21, 18)))
    h = before[0][1] if isinstance(before[0][1], torch.Tensor) else before[0][1][0]
    assert tuple(h.shape[-2:]) == (6, 5)
    assert torch.equal(after[0][0], F.interpolate(h, size=(21, 18), mode="nearest"))


@pytest.mark.parametrize("kind", ["ldm-sd15", "ldm-sdxl"])
def test_a_pooled_pair_is_pooled_before_it_becomes_a_skip_and_enlarged_bicubic_before_the_next(
    kind, cat_that_repairs_nothing, monkeypatch
):
    unet = unets.build(kind)
    layout = read_layout(unet)
    pairs, joined = captured(layout.encoder[4].last), []
    step = len(layout.decoder) - 1 - 4
    ends = captured(layout.decoder[step].last)
    monkeypatch.setattr(
        cat_that_repairs_nothing,
        "cat",
        lambda tensors, dim: joined.append(tensors) or torch.cat(tensors, dim),
        raising=False,
    )
    with UndoLogOf(unet, (Pool(OPEN, 4),), (22, 18)):
        unets.call(unet, unets.inputs(kind, (22, 18)))
    assert torch.equal(joined[step][1], F.avg_pool2d(pairs[0][1], 2, ceil_mode=True))
    assert torch.equal(joined[step + 1][0], F.interpolate(ends[0][1], size=(11, 9), mode="bicubic"))
    assert tuple(joined[step + 1][1].shape[-2:]) == (11, 9)


@pytest.mark.parametrize("kind", ["ldm-sd15", "diffusers-sd15"])
def test_a_shrink_resizes_what_enters_its_block_and_the_concatenation_of_the_mirrored_one(kind):
    unet = unets.build(kind)
    layout = read_layout(unet)
    above, entered = captured(layout.encoder[4].last), []
    with UndoLogOf(unet, (Shrink(OPEN, 5, 0.5, mode="bilinear"),), (20, 36)):
        layout.encoder[5].first.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        layout.decoder[6].first.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        unets.call(unet, unets.inputs(kind, (20, 36)))
    h = above[0][1] if isinstance(above[0][1], torch.Tensor) else above[0][1][0]
    assert torch.equal(entered[0], F.interpolate(h, size=(5, 9), mode="bilinear"))
    assert tuple(entered[1].shape[-2:]) == (10, 18)


@pytest.mark.parametrize("kind", ALL)
def test_a_shrink_to_the_full_size_is_bit_equal_to_no_shrink(kind):
    unet, values = unets.build(kind), unets.inputs(kind)
    plain = unets.call(unet, values)
    for step in range(9):
        with UndoLogOf(unet, (Shrink(OPEN, step, 1.0),), (16, 16)) as route:
            assert route is not None
            assert torch.equal(unets.call(unet, values), plain)


def test_each_place_of_a_shrink_or_a_pool_changes_the_picture(kind, unet):
    values = unets.inputs(kind)
    plain = unets.call(unet, values)
    structure = read_layout(unet).structure
    for step in range(len(structure.encoder)):
        edits = [
            Shrink(OPEN, step, 0.5),
            Dilate(OPEN, step) if structure.encoder[step].kind == "down" else Pool(OPEN, step),
        ]
        for edit in edits:
            with UndoLogOf(unet, (edit,), (16, 16)):
                assert (unets.call(unet, values) - plain).abs().max() > 1e-4


def test_the_forge_form_and_the_ldm_form_give_the_same_picture():
    values = unets.inputs("forge", (16, 24))
    forge, ldm = unets.build("forge"), unets.build("ldm-sd15")
    ldm.load_state_dict(forge.state_dict())
    for method in (*RAUNET.values(), DeepShrink()):
        assert torch.equal(run(forge, "forge", method, (16, 24)), run(ldm, "ldm-sd15", method, (16, 24)))
    assert torch.equal(unets.call(forge, values), unets.call(ldm, values))


# Convolutions that others have changed --------------------------------------------------------------------------------


class LoraConv(nn.Module):
    """A convolution with an adapter beside it, as peft wraps it: the adapter's first convolution strides too."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Conv2d(base.in_channels, 2, 3, stride=2, padding=1, bias=False)
        self.lora_B = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("kind", ["ldm-sd15", "diffusers-sd15"])
def test_an_adapter_beside_the_convolution_strides_with_it(kind):
    unet = unets.build(kind)
    downsample = read_layout(unet).encoder[3].downsample
    name = "op" if kind.startswith("ldm") else "conv"
    setattr(downsample, name, LoraConv(getattr(downsample, name)))
    seen = captured(downsample)
    run(unet, kind, RAUNET["stride"], (16, 16))
    ((x, output),) = seen
    merged = getattr(downsample, name)
    weight = merged.base_layer.weight + torch.einsum(
        "or,rihw->oihw", merged.lora_B.weight[..., 0, 0], merged.lora_A.weight
    )
    assert torch.allclose(
        output, F.conv2d(x, weight, merged.base_layer.bias, stride=4, padding=2, dilation=2), atol=1e-5
    )


def test_a_forward_that_casts_weights_still_runs_around_the_stride():
    """Forge's and ldm_patched's convolutions cast in `forward` and call `_conv_forward`."""
    unet = unets.build("ldm-sd15")
    conv = conv_of(read_layout(unet).encoder[3].downsample)
    conv.forward = lambda x: conv._conv_forward(x, 2 * conv.weight, None)
    seen = captured(conv)
    run(unet, "ldm-sd15", RAUNET["stride"], (16, 16))
    assert torch.allclose(
        seen[0][1], F.conv2d(seen[0][0], 2 * conv.weight, None, stride=4, padding=2, dilation=2), atol=1e-6
    )


def test_a_convolution_that_ignores_its_stride_is_named_in_an_error_and_nothing_stays():
    unet = unets.build("ldm-sd15")
    conv = conv_of(read_layout(unet).encoder[3].downsample)
    conv.forward = lambda x: F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
    with pytest.raises(UnsupportedModel, match=r"gave \(8, 8\) where \(4, 4\) was planned: its convolution \(Conv2d\)"):
        run(unet, "ldm-sd15", RAUNET["stride"], (16, 16))
    assert "_conv_forward" not in vars(conv)
