"""Window attention: the partition as mathematics, then inside real transformers."""

import itertools

import pytest
import tomesd
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from ldm.modules.attention import CrossAttention
from support import unets

from lib_hires import HiDiffusion, Session
from lib_hires.unet.layout import read_layout
from lib_hires.unet.window_attention import SHIFTS, attend_in_windows, partition, window_bounds, window_groups

CPU = torch.device("cpu")
lengths = st.integers(2, 40)
halves = st.integers(1, 16)
quarters = st.integers(0, SHIFTS - 1)
WINDOWS = HiDiffusion(raunet=False)


def tokens(batch, height, width, channels=3, seed=0):
    return torch.randn(batch, height * width, channels, generator=torch.Generator().manual_seed(seed))


def self_attention(x):
    return torch.softmax(x @ x.transpose(1, 2), -1) @ x


def published(x, height, width, k):
    """MSW-MSA as the specification writes it, for even sizes: roll, reshape into 2 x 2 windows, attend, and back."""
    shift = (k * (height // 2 // 4), k * (width // 2 // 4))
    x = rearrange(x, "b (h w) c -> b h w c", h=height).roll((-shift[0], -shift[1]), (1, 2))
    x = self_attention(rearrange(x, "b (gy h) (gx w) c -> (b gy gx) (h w) c", gy=2, gx=2))
    x = rearrange(x, "(b gy gx) (h w) c -> b (gy h) (gx w) c", gy=2, gx=2, h=height // 2)
    return rearrange(x.roll(shift, (1, 2)), "b h w c -> b (h w) c")


# The partition --------------------------------------------------------------------------------------------------------


@given(lengths, lengths, quarters)
def test_every_token_is_in_exactly_one_window(height, width, k):
    groups = window_groups(height, width, k)
    assert sorted(torch.cat([group.flatten() for group in groups]).tolist()) == list(range(height * width))
    assert sum(len(group) for group in groups) == 4


@given(lengths, lengths, st.lists(quarters, min_size=1, max_size=4))
def test_splitting_and_joining_is_the_identity(height, width, rows):
    x = tokens(len(rows), height, width)
    parts = partition(height, width, tuple(rows), CPU)
    assert torch.equal(parts.join(parts.split(x), len(rows)), x)


@given(lengths, lengths)
def test_windows_are_half_the_map_rounded_up(height, width):
    for length in (height, width):
        bounds = window_bounds(length)
        assert bounds[0] == (0, -(-length // 2)) and bounds[1] == (-(-length // 2), length)


def windowed(attend, x, size, shifts, grid=2):
    return attend_in_windows(attend, x, partition(*size, shifts, CPU, grid))


def test_windows_of_equal_size_form_one_group_and_a_map_of_odd_size_up_to_four():
    assert [tuple(group.shape) for group in window_groups(6, 8, 1)] == [(4, 12)]
    assert [tuple(group.shape) for group in window_groups(5, 7, 0)] == [(1, 12), (1, 9), (1, 8), (1, 6)]
    assert [tuple(group.shape) for group in window_groups(5, 8, 0)] == [(2, 12), (2, 8)]


@given(halves, halves, quarters)
def test_even_maps_are_cut_rolled_and_put_together_as_published(half_height, half_width, k):
    height, width = 2 * half_height, 2 * half_width
    x = tokens(2, height, width)
    ours = windowed(self_attention, x, (height, width), (k, k))
    assert torch.allclose(ours, published(x, height, width, k), atol=1e-6)


@given(st.integers(2, 12), st.integers(2, 12), quarters)
def test_each_token_hears_the_tokens_of_its_window_and_no_others(height, width, k):
    x = torch.eye(height * width)[None]
    heard = windowed(lambda group: group.mean(1, keepdim=True).expand_as(group), x, (height, width), (k,))[0] > 0
    assert torch.equal(heard, heard.T) and heard.diagonal().all()
    assert len({tuple(row.nonzero().flatten().tolist()) for row in heard}) == 4


@given(lengths, lengths)
def test_one_window_is_full_attention(height, width):
    x = tokens(2, height, width)
    assert torch.allclose(windowed(self_attention, x, (height, width), (0, 0), grid=1), self_attention(x), atol=1e-6)


@given(lengths, lengths, quarters)
def test_attention_that_does_nothing_leaves_the_tokens_as_they_are(height, width, k):
    x = tokens(2, height, width)
    assert torch.equal(windowed(lambda group: group, x, (height, width), (k, k)), x)


@given(halves, halves, quarters)
def test_rolling_the_map_by_a_window_rolls_the_result(half_height, half_width, k):
    size = (2 * half_height, 2 * half_width)
    x = rearrange(tokens(1, *size), "b (h w) c -> b h w c", h=size[0])
    for roll in ((half_height, 0), (0, half_width), (half_height, half_width)):
        rolled = rearrange(x.roll(roll, (1, 2)), "b h w c -> b (h w) c")
        whole = rearrange(x, "b h w c -> b (h w) c")
        plain = rearrange(windowed(self_attention, whole, size, (k,)), "b (h w) c -> b h w c", h=size[0])
        wanted = rearrange(plain.roll(roll, (1, 2)), "b h w c -> b (h w) c")
        assert torch.allclose(windowed(self_attention, rolled, size, (k,)), wanted, atol=1e-6)


@given(lengths, lengths, st.lists(quarters, min_size=2, max_size=5))
def test_each_row_is_cut_by_its_own_shift_as_if_it_were_alone(height, width, rows):
    x = tokens(len(rows), height, width)
    together = windowed(self_attention, x, (height, width), tuple(rows))
    for row, k in enumerate(rows):
        assert torch.allclose(
            together[row : row + 1],
            windowed(self_attention, x[row : row + 1], (height, width), (k,)),
            atol=1e-6,
        )


def test_a_map_of_one_row_or_column_is_cut_into_two():
    assert [len(group) for group in window_groups(1, 6, 3)] == [2] and [
        len(group) for group in window_groups(7, 1, 3)
    ] == [1, 1]


# In real transformers -------------------------------------------------------------------------------------------------


def attentions(unet):
    """The self-attentions that are cut, in order."""
    layout = read_layout(unet)
    return [
        block.attn1 for t in layout.transformers(layout.structure.top_attention_level) for block in t.transformer_blocks
    ]


def token_counts(unet):
    """A list that is filled with the (rows, tokens) that each cut self-attention really computes on."""
    seen = []
    for attention in attentions(unet):
        attention.to_q.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    return seen


@pytest.mark.parametrize(
    ("kind", "size"),
    [*itertools.product(unets.KINDS, [(16, 16), (16, 24)]), ("diffusers-sd15", (15, 17)), ("diffusers-sdxl", (15, 17))],
)
def test_all_self_attentions_of_the_level_work_in_windows(unet, kind, size):
    seen = token_counts(unet)
    with Session(unet, [WINDOWS], unets.COMMON):
        unets.call(unet, unets.inputs(kind, size))
    layers = len(attentions(unet))
    assert layers == (10 if kind.endswith("sdxl") else 5)
    top = size if kind.endswith("sd15") else tuple(-(-n // 2) for n in size)
    largest = -(-top[0] // 2) * -(-top[1] // 2)
    assert max(count for _, count in seen) == largest
    assert sum(rows * count for rows, count in seen) == layers * top[0] * top[1]


def test_windows_change_the_picture_a_little_and_quarterschange_it_too(unet, kind):
    values = unets.inputs(kind)
    plain = unets.call(unet, values)
    outputs = []
    for k in range(4):
        with Session(unet, [WINDOWS], unets.COMMON, record=lambda *key, k=k: k):
            outputs.append(unets.call(unet, values))
    for one, other in itertools.combinations([plain, *outputs], 2):
        assert (one - other).abs().max() > 0.02


@pytest.mark.parametrize("kind", ["ldm-sd15", "ldm-sdxl"])
def test_attention_functions_are_called_without_masks(unet, kind, monkeypatch):
    """xformers ignores masks and sub-quadratic attention refuses them."""
    calls, original = [], CrossAttention.forward

    def without_masks(self, x, context=None, mask=None):
        assert mask is None
        calls.append(context is None or context is x)
        return original(self, x, context)

    monkeypatch.setattr(CrossAttention, "forward", without_masks)
    with Session(unet, [WINDOWS], unets.COMMON):
        unets.call(unet, unets.inputs(kind))
    assert sum(calls) >= len(attentions(unet))


def test_an_attention_function_chosen_during_the_session_is_used(monkeypatch):
    unet, values = unets.build("ldm-sd15"), unets.inputs("ldm-sd15")
    original = CrossAttention.forward
    with Session(unet, [WINDOWS], unets.COMMON) as session:
        before = unets.call(unet, values)
        called = []
        monkeypatch.setattr(
            CrossAttention, "forward", lambda self, *a, **k: called.append(self) or original(self, *a, **k)
        )
        assert torch.equal(unets.call(unet, values), before)
        assert set(attentions(unet)) <= set(called)
        assert session.is_open
    monkeypatch.undo()


def test_an_override_that_was_there_before_runs_inside_the_windows(unet, kind):
    """Hypertile and accelerate leave an instance `forward` on each attention."""
    seen, forwards = [], {}
    for attention in attentions(unet):

        def forward(x, *args, _previous=attention.forward, **kwargs):
            seen.append(x.shape[1])
            return _previous(x, *args, **kwargs)

        attention.forward = forwards[attention] = forward
    values = unets.inputs(kind)
    with Session(unet, [WINDOWS], unets.COMMON):
        patched = unets.call(unet, values)
    assert len(seen) == len(forwards) and max(seen) * 4 == (256 if kind.endswith("sd15") else 64)
    assert all(vars(attention)["forward"] is forward for attention, forward in forwards.items())
    fresh = unets.build(kind)
    with Session(fresh, [WINDOWS], unets.COMMON):
        assert torch.equal(unets.call(fresh, values), patched)


def test_a_linear_layer_replaced_during_the_session_is_used(unet, kind):
    with Session(unet, [WINDOWS], unets.COMMON):
        before = unets.call(unet, unets.inputs(kind))
        layer = attentions(unet)[0].to_q
        layer.forward = lambda x: 3 * torch.nn.functional.linear(x, layer.weight)  # as a LoRA does
        assert not torch.equal(unets.call(unet, unets.inputs(kind)), before)


# Where it has to keep out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ldm-sd15", "diffusers-sd15"])
def test_merged_tokens_are_left_alone_and_it_is_said(kind):
    unet, values = unets.build(kind), unets.inputs(kind, (32, 32))
    session = Session(unet, [WINDOWS], unets.COMMON)
    tomesd.apply_patch(unet_holder(unet), ratio=0.5, use_rand=False)
    try:
        merged = unets.call(unet, values)
        with session:
            assert torch.equal(unets.call(unet, values), merged)
        assert session.notes == [
            "Window attention is off in a layer: its tokens are merged or tiled by something else."
        ]
    finally:
        tomesd.remove_patch(unet_holder(unet))


@pytest.mark.parametrize("kind", ["ldm-sd15", "diffusers-sd15"])
def test_token_merging_that_is_on_already_switches_windows_off_with_one_note(kind):
    unet, values = unets.build(kind), unets.inputs(kind, (32, 32))
    tomesd.apply_patch(unet_holder(unet), ratio=0.5, use_rand=False)
    try:
        merged = unets.call(unet, values)
        with Session(unet, [WINDOWS], unets.COMMON) as session:
            assert torch.equal(unets.call(unet, values), merged)
            assert torch.equal(unets.call(unet, values), merged)
        assert session.notes == ["Window attention is off: ToMe divides the tokens already."]
    finally:
        tomesd.remove_patch(unet_holder(unet))


def unet_holder(unet):
    """What tomesd wants: a pipeline's `unet`, or an ldm model's `model.diffusion_model`."""
    holder = torch.nn.Module()
    if "down_blocks" in dict(unet.named_children()):
        return unet
    holder.model = torch.nn.Module()
    holder.model.diffusion_model = unet
    return holder


def test_whoever_owns_the_tokens_is_named(unet, kind):
    values = unets.inputs(kind)
    plain = unets.call(unet, values)
    with Session(unet, [WINDOWS], unets.COMMON, tokens_owned_by="Hypertile") as session:
        assert torch.equal(unets.call(unet, values), plain)
    assert session.notes == ["Window attention is off: Hypertile divides the tokens already."]


@pytest.mark.parametrize("given", ["context", "mask"])
def test_self_attention_that_reads_a_second_picture_or_a_mask_is_left_alone(given):
    """ControlNet's reference mode gives a longer context; regional prompts give masks."""
    unet, values = unets.build("ldm-sd15"), unets.inputs("ldm-sd15")
    with Session(unet, [WINDOWS], unets.COMMON) as session:
        unets.call(unet, values)
        attention = attentions(unet)[0]
        x = torch.randn(1, 256, 32)
        extra = (
            {"context": torch.cat([x, x], 1)} if given == "context" else {"mask": torch.ones(1, 256, dtype=torch.bool)}
        )
        assert torch.equal(attention(x, **extra), CrossAttention.forward(attention, x, **extra))
        assert session.notes == [
            "Window attention is off in a layer: its self-attention reads a second picture or a mask."
        ]
        assert not torch.allclose(attention(x, context=x), CrossAttention.forward(attention, x))


@pytest.mark.parametrize("kind", ["diffusers-sd15", "diffusers-sdxl"])
def test_a_map_too_small_for_windows_is_attended_whole(unet, kind):
    values = unets.inputs(kind, (1, 16))
    plain = unets.call(unet, values)
    with Session(unet, [WINDOWS], unets.COMMON):
        assert torch.equal(unets.call(unet, values), plain)


# Shifts ---------------------------------------------------------------------------------------------------------------


def test_image_k_of_a_batch_equals_the_same_image_alone(unet, kind):
    seeds, values = (11, 22, 33), unets.inputs(kind, batch=3)
    with Session(unet, [WINDOWS], unets.COMMON, seeds=seeds):
        together = unets.call(unet, values)
    for image, seed in enumerate(seeds):
        with Session(unet, [WINDOWS], unets.COMMON, seeds=[seed]):
            alone = unets.call(unet, unets.rows(values, image))
        assert (together[image : image + 1] - alone).abs().max() < 1e-4


def test_a_record_tells_the_shift_of_each_image_noise_level_and_layer(unet, kind):
    """Image 1 at timestep 700, layer 2 gets shift 3 in one run by a mapping, in the other by a function."""
    asked, values = [], unets.inputs(kind, batch=2)

    def function(seed, timestep, layer):
        asked.append((seed, timestep, layer))
        return 3 if (seed, timestep, layer) == (8, 700.0, 2) else None

    outputs = []
    for record in ({(8, 700.0, 2): 3}, function, None):
        with Session(unet, [WINDOWS], unets.COMMON, seeds=(7, 8), record=record):
            outputs.append(unets.call(unet, values, 700.01))
    assert asked == [(seed, 700.0, layer) for layer in range(len(attentions(unet))) for seed in (7, 8)]
    assert torch.equal(outputs[0], outputs[1])
    assert (outputs[0][0] - outputs[2][0]).abs().max() < 1e-4


def test_another_seed_moves_the_windows_otherwise(unet, kind):
    values, outputs = unets.inputs(kind), []
    for seed in range(4):
        with Session(unet, [WINDOWS], unets.COMMON, seeds=[seed]):
            outputs.append(unets.call(unet, values))
    assert max((output - outputs[0]).abs().max() for output in outputs[1:]) > 1e-4


def test_windows_that_are_not_shifted_are_the_same_at_every_noise_level_and_seed():
    unet, values = unets.build("ldm-sd15"), unets.inputs("ldm-sd15")
    fixed = HiDiffusion(raunet=False, window_shift=False)
    with Session(unet, [fixed], unets.COMMON, seeds=[1]):
        first = unets.call(unet, values)
    with Session(unet, [fixed], unets.COMMON, seeds=[2]) as session:
        session.at(timestep=3.0)
        assert torch.equal(unets.call(unet, values), first)


def test_the_same_call_twice_gives_the_same_picture_whatever_ran_between(unet, kind):
    values = unets.inputs(kind)
    with Session(unet, [HiDiffusion(min_scale=1)], unets.COMMON, seeds=[5]):
        first = unets.call(unet, values, 700.0)
        for timestep in (900.0, 10.0, 300.0):
            unets.call(unet, unets.inputs(kind, (24, 16), batch=2, seed=9), timestep)
        assert torch.equal(unets.call(unet, values, 700.0), first)
