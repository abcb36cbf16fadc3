"""RAU-Net's operations on feature maps, apart from any network."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lib_hires.unet.raunet import dilated_conv, pool, resize

MODES = ["bicubic", "bilinear", "nearest", "nearest-exact"]
lengths = st.integers(8, 70)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("groups", [1, 2])
@given(height=lengths, width=lengths)
def test_the_dilated_convolution_is_the_published_one(groups, height, width):
    conv, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups), random(2, 4, height, width)
    wanted = F.conv2d(x, conv.weight, conv.bias, stride=4, padding=2, dilation=2, groups=groups)
    assert torch.equal(dilated_conv(conv, x, conv.weight, conv.bias), wanted)


def test_the_dilated_convolution_quarters_every_size_rounding_up():
    conv = nn.Conv2d(1, 1, 3, stride=2, padding=1)
    for height in range(8, 301):
        assert dilated_conv(conv, torch.zeros(1, 1, height, 9), conv.weight, conv.bias).shape[-2:] == (
            -(-height // 4),
            3,
        )


def test_the_dilated_convolution_keeps_circular_padding():
    conv, x = nn.Conv2d(2, 2, 3, stride=2, padding=1, padding_mode="circular"), random(1, 2, 16, 16)
    ours = dilated_conv(conv, x, conv.weight, conv.bias)
    zeros = F.conv2d(x, conv.weight, conv.bias, stride=4, padding=2, dilation=2)
    assert not torch.allclose(ours, zeros)
    rolled = dilated_conv(conv, x.roll((4, 8), (2, 3)), conv.weight, conv.bias)
    assert torch.allclose(rolled, ours.roll((1, 2), (2, 3)), atol=1e-6)


def test_the_dilated_convolution_takes_the_weights_it_is_given():
    conv, x = nn.Conv2d(2, 2, 3, stride=2, padding=1), random(1, 2, 8, 8)
    assert torch.equal(dilated_conv(conv, x, torch.zeros(2, 2, 3, 3), None), torch.zeros(1, 2, 2, 2))


@given(lengths, lengths)
def test_pooling_halves_every_size_rounding_up(height, width):
    assert pool(torch.zeros(1, 1, height, width)).shape[-2:] == (-(-height // 2), -(-width // 2))


@given(lengths, lengths, st.floats(-5, 5, width=32))
def test_pooling_and_going_back_keeps_a_constant_map(height, width, value):
    x = torch.full((1, 2, height, width), value)
    back = resize(pool(x), (height, width), "bicubic")
    assert back.shape == x.shape and torch.allclose(back, x, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@given(height=lengths, width=lengths, shrink=st.floats(0.1, 1), value=st.floats(-5, 5, width=32))
def test_shrinking_and_enlarging_keeps_a_constant_map_in_every_mode(mode, height, width, shrink, value):
    x = torch.full((1, 2, height, width), value)
    small = resize(x, (max(1, int(height * shrink)), max(1, int(width * shrink))), mode)
    assert torch.allclose(resize(small, (height, width), mode), x, atol=1e-5)


@given(st.integers(4, 30), st.integers(4, 30))
def test_nearest_shrinking_by_half_gives_each_cell_its_top_left_input(half_height, half_width):
    x = random(1, 2, 2 * half_height, 2 * half_width)
    back = resize(resize(x, (half_height, half_width), "nearest"), tuple(x.shape[-2:]), "nearest")
    assert torch.equal(back, x[..., ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("mode", MODES)
def test_resizing_to_the_same_size_gives_the_same_map(mode):
    x = random(1, 2, 9, 7)
    assert resize(x, (9, 7), mode) is x
    assert torch.equal(F.interpolate(x, size=(9, 7), mode=mode), x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_resizing_keeps_the_number_format_and_agrees_with_fp32(mode, dtype):
    x = random(1, 2, 9, 7).to(dtype)
    small = resize(x, (5, 4), mode)
    assert small.dtype == dtype and small.shape[-2:] == (5, 4)
    assert torch.equal(small, F.interpolate(x.float(), size=(5, 4), mode=mode).to(dtype))


def test_average_pooling_averages_what_there_is_at_a_border():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    assert pool(x).flatten().tolist() == [2.0, 3.5, 6.5, 8.0]
