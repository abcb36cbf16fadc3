"""Decoding in tiles gives what decoding as a whole gives: any size, any tile, both decoders, and it leaves nothing behind."""

import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import snapshots
from tiny_decoders import KINDS, build, encoder, latents, plain, roughened, shared
from torch import nn
from torch.nn import functional

from lib_hires.config.errors import SettingError, UnsupportedModel
from lib_hires.vae import nodes
from lib_hires.vae.lazy import LazyMap
from lib_hires.vae.tiled_decode import decode_tiled, tiled

SIZES = ((33, 21), (13, 30), (70, 5), (8, 8))


@pytest.fixture(params=KINDS)
def form(request):
    return request.param


@pytest.fixture
def decoder(form):
    """A decoder of one's own."""
    return build(form, groups=8)


def error(result, expected):
    assert result.shape == expected.shape
    return float((result.detach().double() - expected.detach().double()).abs().max())


# The same picture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tile", (8, 16, 64))
def test_a_picture_is_the_whole_decoders(form, size, tile):
    z = latents(1, 4, *size)
    assert error(decode_tiled(shared(form), z, tile=tile), plain(form, tuple(z.shape))) < 4e-5


@pytest.mark.parametrize("tile", (8, 11))
def test_the_difference_is_rounding_only_in_double_precision_it_is_gone(form, tile):
    z = latents(1, 4, 19, 14, dtype=torch.float64)
    assert error(decode_tiled(shared(form, torch.float64), z, tile=tile), plain(form, z.shape, torch.float64)) < 1e-12


@settings(max_examples=20)
@given(st.sampled_from(KINDS), st.integers(1, 30), st.integers(1, 30), st.integers(8, 40))
def test_any_size_and_any_tile(form, height, width, tile):
    decoder = build(form, widths=(4, 4, 8, 8), groups=2).double()
    z = latents(1, 4, height, width, dtype=torch.float64)
    assert error(decode_tiled(decoder, z, tile=tile), decoder(z)) < 1e-12


def test_attention_on_the_way_up_sees_the_whole_map():
    decoder = build("ldm", groups=8, up_attention=True).double()
    z = latents(1, 4, 13, 10, dtype=torch.float64)
    assert error(decode_tiled(decoder, z, tile=8), decoder(z)) < 1e-12


def test_each_picture_of_a_batch_has_its_own_statistics(form):
    z = latents(2, 4, 17, 12) * torch.tensor([1.0, 3.0])[:, None, None, None]
    both = decode_tiled(shared(form), z, tile=8)
    assert error(both, shared(form)(z)) < 4e-5
    assert torch.equal(both[1:], decode_tiled(shared(form), z[1:], tile=8))


def test_two_runs_are_the_same_to_the_bit_and_draw_no_random_numbers(form):
    z, before = latents(1, 4, 20, 20), snapshots.of_generators()
    assert torch.equal(decode_tiled(shared(form), z, tile=8), decode_tiled(shared(form), z, tile=8))
    assert snapshots.of_generators() == before


def test_an_encoder_is_no_different():
    module, x = encoder(), latents(1, 3, 136, 200)
    assert error(decode_tiled(module, x, tile=64), module(x)) < 1e-5


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_stays_and_is_as_near_to_the_truth_as_the_whole_decoder(form, dtype):
    z, decoder = latents(1, 4, 10, 9).to(dtype), build(form, widths=(16, 16, 32, 32), groups=8).to(dtype)
    whole, result = decoder(z), decode_tiled(decoder, z, tile=8)
    true = decoder.double()(z.double())
    assert result.dtype is dtype
    assert (result.double() - true).std() < 1.2 * (whole.double() - true).std()


def test_memory_in_channels_last_order_is_fine(form):
    decoder = build(form, groups=8).to(memory_format=torch.channels_last)
    z = latents(1, 4, 17, 12).to(memory_format=torch.channels_last)
    assert error(decode_tiled(decoder, z, tile=8), plain(form, (1, 4, 17, 12))) < 4e-5


# The state of the calling thread --------------------------------------------------------------------------------------


def test_inference_mode_is_kept(form):
    with torch.inference_mode():
        result = decode_tiled(shared(form), latents(1, 4, 17, 12), tile=8)
    assert error(result, plain(form, (1, 4, 17, 12))) < 4e-5


def test_autocast_casts_each_operation_as_it_does_in_the_whole_decoder(form):
    z, decoder = latents(1, 4, 10, 9), build(form, widths=(16, 16, 32, 32), groups=8)
    exact = decoder(z)
    with torch.autocast("cpu", torch.bfloat16):
        whole, result = decoder(z), decode_tiled(decoder, z, tile=8)
    assert result.dtype is whole.dtype is torch.bfloat16
    assert 1e-3 < (result - exact).std() < 1.2 * (whole - exact).std()


def test_no_gradients_are_recorded_and_a_call_that_wants_them_is_left_alone(form):
    z = latents(1, 4, 9, 8).requires_grad_()
    with torch.enable_grad():
        assert not decode_tiled(shared(form), z, tile=8).requires_grad
        with tiled(shared(form), tile=8, above=0):
            assert shared(form)(z).requires_grad


def test_no_thread_is_started(form, decoder):
    seen, before = [], threading.active_count()
    decoder.conv_out.register_forward_hook(lambda *_: seen.append(threading.active_count()))
    decode_tiled(decoder, latents(1, 4, 17, 12), tile=8)
    assert seen == [before]


# Others' changes of the decoder -----------------------------------------------------------------------------------------


def test_hooks_of_others_run_once_a_picture_and_see_the_whole_map(form, decoder):
    seen, z = [], latents(1, 4, 17, 12)

    def hook(_module, args, output):
        seen.append((tuple(args[0].shape[2:]), tuple(output.shape[2:]), float(output.mean())))
        return output + 1

    decoder.conv_out.register_forward_hook(hook)
    whole, result = decoder(z), decode_tiled(decoder, z, tile=8)
    assert error(result, whole) < 4e-5
    assert [each[:2] for each in seen] == [((136, 96), (136, 96))] * 2
    assert seen[0][2] == pytest.approx(seen[1][2], abs=1e-5)


def test_a_forward_that_another_extension_has_put_in_is_called(form, decoder):
    norm = next(part for part in decoder.modules() if isinstance(part, nn.GroupNorm))
    theirs = norm.forward = lambda x: functional.group_norm(x, norm.num_groups, norm.weight * 2, norm.bias) ** 2
    z = latents(1, 4, 17, 12)
    assert error(decode_tiled(decoder, z, tile=8), decoder(z)) < 1e-4
    assert norm.forward is theirs


def test_activations_in_place(form):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1)

        def forward(self, z):
            h = self.conv(z)
            h += 1
            kept = h * 1
            h = functional.silu(self.norm(h), inplace=True).mul_(2)
            return self.last(h + kept)

    module, z = roughened(InPlace()), latents(1, 4, 17, 12)
    assert error(decode_tiled(module, z, tile=8), module(z)) < 1e-5


def test_what_hooks_kept_of_a_map_can_still_be_read_after_the_decode(decoder):
    kept, z = [], latents(1, 4, 17, 12)
    decoder.conv_in.register_forward_hook(lambda _module, _args, output: kept.append(output))
    decode_tiled(decoder, z, tile=8)
    assert error(kept[0] * 2, decoder.conv_in(z) * 2) < 1e-5


def test_a_stand_in_answers_what_a_tensor_is_asked():
    class Asks(nn.Conv2d):
        def forward(self, z):
            x = super().forward(z)
            assert (x.shape, x.ndim, len(x), x.numel()) == ((1, 3, 17, 12), 4, 1, 612)
            assert x.is_contiguous() and x.dtype is torch.float32 and not x.is_cuda and not x.requires_grad
            assert isinstance(x, torch.Tensor) and "LazyMap(" in repr(x)
            first, *_others = x[0]
            assert x.amax() == first.amax().maximum(x[:, 1:].max()) and x.isfinite().all()
            return x.data + x.cpu() - x.detach().to(z)

    module, z = Asks(4, 3, 3, padding=1), latents(1, 4, 17, 12)
    assert error(decode_tiled(module, z, tile=8), nn.Conv2d.forward(module, z)) < 1e-5


OTHERS = {
    "transposed convolution": lambda: nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1),
    "bilinear enlargement": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "pixel shuffle": lambda: nn.Sequential(nn.Conv2d(4, 16, 1), nn.PixelShuffle(2)),
    "average": lambda: nn.AvgPool2d(3, stride=1, padding=1),
    "reflecting border": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "dilation, groups, stride, even kernel": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=(2, 4), dilation=(2, 3), groups=2), nn.Conv2d(4, 4, (2, 5), stride=(2, 3), padding=1)
    ),
    "asymmetric padding": lambda: nn.ZeroPad2d((0, 3, -1, 2)),
    "nearest to three times": lambda: nn.Upsample(scale_factor=3.0),
    "nearest by no whole factor": lambda: nn.Upsample(scale_factor=1.5),
    "norm over channels": lambda: nn.LocalResponseNorm(2),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "no affine": lambda: nn.GroupNorm(2, 4, affine=False),
    "instance norm": lambda: nn.InstanceNorm2d(4),
    "pixel by pixel": lambda: nn.Sequential(nn.GELU(), nn.Hardtanh(-1, 1), nn.PReLU(4), nn.Dropout()),
    "softmax over channels": lambda: nn.Softmax2d(),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("inference", (False, True))
def test_layers_that_no_decoder_has_come_out_right_too(name, inference):
    first, last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
    module = nn.Sequential(first, OTHERS[name](), nn.SiLU(), last).eval()
    z = latents(1, 4, 25, 22)
    with torch.inference_mode(inference):
        assert error(decode_tiled(module, z, tile=8), module(z)) < 1e-5


def test_a_decoder_without_norms_is_worked_out_through_all_its_layers():
    block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block, self.last = nn.Conv2d(4, 6, 3, padding=1), block, nn.Conv2d(6, 3, 3, padding=1)

        def forward(self, z):
            x = self.first(z)
            for _ in range(12):
                x = functional.interpolate(x + self.block(x), scale_factor=2.0) if _ == 5 else x + self.block(x)
            return self.last(x)

    module, z = Chain().eval(), latents(1, 4, 33, 20)
    assert error(decode_tiled(module, z, tile=8), module(z)) < 1e-4


def test_constants_with_and_without_pixels_may_meet_a_map():
    picture, channel = latents(1, 4, 20, 9, seed=2), latents(4, 1, 1, seed=3)

    class Mixed(nn.Module):
        def forward(self, z):
            x = torch.where(z > 0, z, channel) + picture - torch.tensor(0.5)
            return torch.cat([x, picture, 2 - x], dim=1).clamp(max=1).clone()

    z = latents(1, 4, 20, 9)
    assert torch.equal(decode_tiled(Mixed(), z, tile=8), Mixed()(z))


@pytest.mark.parametrize("size", ((16, 9), (1, 1)))
def test_a_layer_that_writes_into_what_another_was_given_is_told_so(size):
    class Writes(nn.Module):
        def forward(self, z):
            other = torch.ones(1, 4, *size)
            result = z + other
            other.zero_()
            return result

    with pytest.raises(UnsupportedModel, match="Decode it as a whole"):
        decode_tiled(Writes(), latents(1, 4, 16, 9), tile=8)


def test_a_compiled_decoder_runs_as_what_it_was_compiled_from(form):
    compiled, z = torch.compile(shared(form), backend="eager"), latents(1, 4, 17, 12)
    assert error(decode_tiled(compiled, z, tile=8), plain(form, (1, 4, 17, 12))) < 4e-5
    with tiled(compiled, tile=8, above=0):
        assert error(compiled(z), plain(form, (1, 4, 17, 12))) < 4e-5


# The context ----------------------------------------------------------------------------------------------------------


class Calls:
    """Counts the maps that were summed up for a norm: none in a plain decode."""

    def __init__(self, monkeypatch):
        self.count, original = 0, nodes.Node.statistics

        def statistics(node, groups):
            self.count += 1
            return original(node, groups)

        monkeypatch.setattr(nodes.Node, "statistics", statistics)


def test_only_latents_above_the_limit_are_decoded_in_tiles(form, monkeypatch):
    calls, decoder = Calls(monkeypatch), shared(form)
    with tiled(decoder, tile=8, above=12):
        assert torch.equal(decoder(latents(1, 4, 16, 9)), plain(form, (1, 4, 16, 9)))  # 144 = 12 squared
        assert calls.count == 0
        assert error(decoder(latents(1, 4, 17, 9)), plain(form, (1, 4, 17, 9))) < 4e-5
        assert calls.count > 20


def test_nothing_is_left_after_the_block_and_a_plain_call_is_the_same_to_the_bit(form, decoder):
    before, z = snapshots.of_tree(decoder), latents(1, 4, 17, 12)
    with tiled(decoder, tile=8, above=0):
        assert snapshots.differences(before, snapshots.of_tree(decoder)) == [": forward"]
        decoder(z)
    differing = snapshots.differences(before, snapshots.of_tree(decoder))
    assert [place for place in differing if "last_z_shape" not in place] == []  # ldm notes the size at every call
    assert torch.equal(decoder(z), plain(form, (1, 4, 17, 12)))


def test_blocks_nest_and_one_object_is_entered_again(form, decoder, monkeypatch):
    calls, z, context = Calls(monkeypatch), latents(1, 4, 17, 12), tiled(decoder, tile=8, above=0)
    once = decode_tiled(decoder, z, tile=8)
    each = calls.count
    with context, tiled(decoder, tile=8, above=0), context:
        assert torch.equal(decoder(z), once)
    assert calls.count == 2 * each
    with context:
        assert torch.equal(decoder(z), once)
    assert calls.count == 3 * each
    assert "forward" not in vars(decoder)


def test_an_override_of_another_below_and_on_top_is_called_and_kept(form, decoder):
    below = decoder.forward = lambda z: type(decoder).forward(decoder, z) * 2
    z, expected = latents(1, 4, 17, 12), plain(form, (1, 4, 17, 12)) * 2
    with tiled(decoder, tile=8, above=0):
        assert error(decoder(z), expected) < 8e-5
        ours = decoder.forward
        top = decoder.forward = lambda z: ours(z) + 1
        assert error(decoder(z), expected + 1) < 8e-5
    assert decoder.forward is top
    assert torch.equal(decoder(z), expected + 1)
    decoder.forward = below


class Interrupt(BaseException):
    """As a host's interrupt or Ctrl-C."""


@pytest.mark.parametrize("kind_of_error", (ValueError, KeyboardInterrupt, Interrupt, torch.cuda.OutOfMemoryError))
def test_an_error_in_the_middle_of_a_tile_reaches_the_caller_and_restores(form, decoder, monkeypatch, kind_of_error):
    before, z, count, threads = snapshots.of_tree(decoder), latents(1, 4, 17, 12), 0, threading.enumerate()

    def fails(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 100:
            raise kind_of_error("in a tile")
        return functional.conv2d(*args, **kwargs)

    with (
        monkeypatch.context() as patch,
        pytest.raises(kind_of_error, match="in a tile"),
        tiled(decoder, tile=8, above=0),
    ):
        patch.setattr(nodes, "functional", SimpleNamespace(**{**vars(functional), "conv2d": fails}))
        decoder(z)
    left = snapshots.differences(before, snapshots.of_tree(decoder))
    assert [place for place in left if "last_z_shape" not in place] == []
    assert threading.enumerate() == threads
    assert torch.equal(decoder(z), plain(form, (1, 4, 17, 12)))


def test_other_arguments_go_through_and_what_is_no_latent_is_left_alone():
    class Scaled(nn.Conv2d):
        def forward(self, z, by, plus=0):
            return super().forward(z) * by + plus

    module, z = Scaled(4, 3, 3, padding=1), latents(1, 4, 17, 12)
    expected, flat = module(z, 2, plus=1), module(z[0], 2, plus=1)
    with tiled(module, tile=8, above=0):
        assert error(module(z, 2, plus=1), expected) < 1e-5
        assert torch.equal(module(z[0], 2, plus=1), flat)


def test_run_is_called_in_place_of_the_decoder(form):
    given = []

    def run(z):
        given.append(type(z))
        return shared(form)(z) * 3

    z = latents(1, 4, 9, 12)
    assert error(decode_tiled(shared(form), z, tile=8, run=run), shared(form)(z) * 3) < 1e-4
    assert given == [LazyMap]


def test_an_empty_batch_is_an_empty_batch():
    assert decode_tiled(nn.Conv2d(4, 3, 3, padding=1), latents(0, 4, 9, 12), tile=8).shape == (0, 3, 9, 12)


@pytest.mark.parametrize(
    "values, setting",
    (
        ({"tile": 4}, "tile"),
        ({"tile": 16.0}, "tile"),
        ({"tile": True}, "tile"),
        ({"storage": "nowhere"}, "storage"),
        ({"above": -1}, "above"),
        ({"above": 1.5}, "above"),
    ),
)
def test_a_wrong_setting_is_named(values, setting):
    with pytest.raises(SettingError, match=f"'{setting}' is"):
        tiled(nn.Identity(), **values)


def test_z_must_be_latents():
    with pytest.raises(SettingError, match="'z' is"):
        decode_tiled(nn.Identity(), latents(4, 9, 12))
