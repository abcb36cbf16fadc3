"""Layers as some hosts have them: convolutions that pass `_conv_forward` by, linear layers of another class, control lists."""

import pytest
import torch
from support import snapshots, unets
from torch import nn

from lib_hires import HiDiffusion, Session
from lib_hires.unet.control import fit_residuals
from lib_hires.unet.layout import read_layout

STRIDING = HiDiffusion(window_attention=False, t1=1, t2=0, aggressive="off")


class PassingBy(nn.Conv2d):
    """A convolution that calls the class's `_conv_forward`, as Forge's does where no cast is needed."""

    def forward(self, x):
        return super()._conv_forward(x, self.weight, self.bias)


class HostLinear(nn.Module):
    """A linear layer that is no `nn.Linear`."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.weight, self.bias = linear.in_features, linear.weight, linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_a_convolution_that_passes_the_override_by_strides_all_the_same(padding_mode):
    values = unets.inputs("ldm-sd15", (16, 24))
    usual, passing = unets.build("ldm-sd15"), unets.build("ldm-sd15")
    for unet in (usual, passing):
        conv = read_layout(unet).encoder[3].downsample.op
        conv.padding_mode = padding_mode
    conv.__class__ = PassingBy
    before = snapshots.of_tree(passing)
    with Session(usual, [STRIDING], unets.COMMON), Session(passing, [STRIDING], unets.COMMON) as session:
        wanted, got = unets.call(usual, values), unets.call(passing, values)
    assert any("stride 4" in name for name in session.ran)
    assert torch.equal(got, wanted)
    assert not snapshots.differences(before, snapshots.of_tree(passing))


def test_a_session_made_while_another_strides_finds_the_same_layout():
    unet, values = unets.build("ldm-sd15"), unets.inputs("ldm-sd15", (16, 24))
    with Session(unet, [STRIDING], unets.COMMON):
        wanted = unets.call(unet, values)
        with Session(unet, [STRIDING], unets.COMMON):
            assert torch.equal(unets.call(unet, values), wanted)
        assert torch.equal(unets.call(unet, values), wanted)


def test_the_vector_width_is_read_from_any_linear_layer():
    unet = unets.build("ldm-sdxl")
    width = read_layout(unet).structure.vector_width
    for parent in list(unet.label_emb.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, HostLinear(child))
    assert width > 0 and read_layout(unet).structure.vector_width == width


def test_control_lists_are_fitted_in_the_order_in_which_they_are_popped():
    unet = unets.build("ldm-sd15")
    with Session(unet, [STRIDING], unets.COMMON) as session:
        unets.call(unet, unets.inputs("ldm-sd15", (16, 24)))
        route = session._route
    maps = [torch.full((1, 2, 16, 24), float(index)) for index in range(len(route.encoder))]
    control = {"input": maps[::-1], "middle": [torch.ones(1, 2, 16, 24)], "output": [None, *maps[1:]], "other": 5}
    fitted = fit_residuals({"control": control, "y": 1}, route, session.layout.structure)
    inputs = fitted["control"]["input"][::-1]
    assert [tuple(each.shape[-2:]) for each in inputs] == [way.out for way in route.encoder]
    assert [each.mean().item() for each in inputs] == pytest.approx([float(index) for index in range(len(maps))])
    assert tuple(fitted["control"]["middle"][0].shape[-2:]) == route.middle
    outputs = fitted["control"]["output"][::-1]
    assert outputs[-1] is None
    assert [tuple(each.shape[-2:]) for each in outputs[:-1]] == [way.out for way in route.encoder[::-1]][: len(outputs) - 1]
    assert fitted["control"]["other"] == 5 and fitted["y"] == 1
    assert all(tuple(each.shape[-2:]) == (16, 24) for each in maps)
