"""Attention maps against the probabilities that the networks' own, explicit attention computes; and no trace left."""

import contextlib
import copy

import ldm.modules.attention as ldm_attention
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from support import snapshots, unets
from torch.nn import functional as F

from lib_hires import HiDiffusion, Session
from lib_hires.config.errors import HiresError, UnsupportedModel
from lib_hires.unet import attention_maps
from lib_hires.unet.attention_maps import AttentionMaps, fit_map, mean_over_heads

READ = {
    "ldm-sd15": ["input_blocks.7.1", "input_blocks.8.1", "output_blocks.3.1", "output_blocks.4.1", "output_blocks.5.1"],
    "ldm-sdxl": ["input_blocks.7.1", "input_blocks.8.1", "output_blocks.0.1", "output_blocks.1.1", "output_blocks.2.1"],
    "diffusers-sd15": [
        f"{block}.attentions.{i}" for block, n in (("down_blocks.2", 2), ("up_blocks.1", 3)) for i in range(n)
    ],
    "diffusers-sdxl": [
        f"{block}.attentions.{i}" for block, n in (("down_blocks.2", 2), ("up_blocks.0", 3)) for i in range(n)
    ],
}
READ["forge"] = READ["ldm-sd15"]
"""The transformers at 1/4 of the latents' size, as the specification lists them."""
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


@contextlib.contextmanager
def probabilities(unet, kind):
    """Collects what the explicit attention of the layers in `READ` computes: [(module name, (rows, heads, h*w, tokens))]."""
    found, running, handles = [], [], []
    for name, module in unet.named_modules():
        if name.endswith(".attn2") and any(name.startswith(f"{place}.transformer_blocks.") for place in READ[kind]):
            handles.append(
                module.register_forward_pre_hook(lambda module, args, name=name: running.append((name, module)))
            )
            handles.append(module.register_forward_hook(lambda module, args, out: running.clear()))

    def keep(values):
        if running:
            name, module = running[-1]
            found.append((name, values.detach().clone().unflatten(0, (-1, module.heads))))

    with pytest.MonkeyPatch.context() as patch:
        if not kind.startswith("diffusers"):
            einsum = ldm_attention.einsum

            def spying(equation, left, right):
                if equation == "b i j, b j d -> b i d":
                    keep(left)
                return einsum(equation, left, right)

            patch.setattr(ldm_attention, "einsum", spying)
        else:
            unet.set_attn_processor(AttnProcessor())
            scores = Attention.get_attention_scores

            def spying(*args, **kwargs):
                values = scores(*args, **kwargs)
                keep(values)
                return values

            patch.setattr(Attention, "get_attention_scores", spying)
        yield found
    for handle in handles:
        handle.remove()


def quarter(size):
    return tuple((length + 3) // 4 for length in size)


def wanted(found, row, size):
    """The mean map of a row: over layers, heads and calls."""
    maps = torch.stack([values[row].mean(0) for _, values in found])
    return maps.mean(0).unflatten(0, quarter(size))


def reference(kind, calls, size):
    """The explicit probabilities of UNet calls [(values, timestep)] in a network of its own."""
    unet = unets.build(kind)
    with probabilities(unet, kind) as found:
        for values, timestep in calls:
            unets.call(unet, values, timestep)
    return found


def gathered(unet, images, calls, **options):
    """Maps after UNet calls whose rows are all told of before each."""
    with AttentionMaps(unet, **options) as maps:
        for values, timestep in calls:
            maps.rows(images)
            unets.call(unet, values, timestep)
    return maps


# The maps themselves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *((kind, size) for kind in unets.KINDS for size in ((16, 16), (16, 32))),
        *((kind, size) for kind in ("forge", "diffusers-sd15", "diffusers-sdxl") for size in ((22, 13), (12, 29))),
    ],
)
def test_a_map_is_the_mean_over_layers_heads_and_calls_of_the_networks_own_probabilities(unet, kind, size):
    calls = [(unets.inputs(kind, size, seed=seed), 900.0 - 300 * seed) for seed in (0, 1)]
    found = reference(kind, calls, size)
    depth = unets.DEPTHS[2] if kind.endswith("sdxl") else 1
    assert len(found) == len(calls) * len(READ[kind]) * depth
    maps = gathered(unet, [0], calls)
    result = maps.result()
    assert result.shape == (*quarter(size), unets.TOKENS) and result.dtype == torch.float32
    torch.testing.assert_close(result, wanted(found, 0, size), **CLOSE)
    assert maps.calls() == 2 and maps.level == 2 and maps.grid == quarter(size) and maps.notes == []


def test_tokens_lie_row_by_row_on_a_picture_that_is_not_square(unet, kind):
    size, values = (16, 24), unets.inputs(kind, (16, 24))
    turned = {**values, "x": values["x"].clone()}
    turned["x"][..., 12:] += 3
    change = gathered(unet, [0], [(turned, 900.0)]).result() - gathered(unet, [0], [(values, 900.0)]).result()
    torch.testing.assert_close(
        change,
        wanted(reference(kind, [(turned, 900.0)], size), 0, size)
        - wanted(reference(kind, [(values, 900.0)], size), 0, size),
        rtol=1e-3,
        atol=1e-6,
    )
    assert change.shape[:2] == (4, 6) and change.abs().max() > 1e-3


def test_each_image_of_a_batch_has_its_own_map_and_unconditional_rows_have_none(unet, kind):
    size, values = (16, 24), unets.inputs(kind, (16, 24), batch=4)
    found = reference(kind, [(values, 700.0)], size)
    maps = gathered(unet, [None, 1, None, 0], [(values, 700.0)])
    for image, row in ((1, 1), (0, 3)):
        torch.testing.assert_close(maps.result(image), wanted(found, row, size), **CLOSE)
    assert (maps.result(0) - maps.result(1)).abs().max() > 1e-3
    with pytest.raises(HiresError, match="image 2"):
        maps.result(2)


def test_rows_may_come_in_one_call_or_in_several(unet, kind):
    values = unets.inputs(kind, batch=4)
    together = gathered(unet, [None, None, 0, 1], [(values, 700.0)])
    with AttentionMaps(unet) as maps:
        maps.rows([None, None, 0, 1])
        for rows in ((0, 1), (2,), (3,)):
            unets.call(unet, unets.rows(values, *rows), 700.0)
    for image in (0, 1):
        torch.testing.assert_close(maps.result(image), together.result(image), **CLOSE)
        assert maps.calls(image) == together.calls(image) == 1


def test_rows_with_the_same_prompt_share_its_mean(unet, kind):
    size, values = (16, 16), unets.inputs(kind, batch=2)
    found = reference(kind, [(values, 700.0)], size)
    mean = (wanted(found, 0, size) + wanted(found, 1, size)) / 2
    maps = gathered(unet, [5, 5], [(values, 700.0)])
    torch.testing.assert_close(maps.result(5), mean, **CLOSE)
    assert maps.calls(5) == 2


def test_each_prompt_has_the_mean_of_its_own_calls(unet, kind):
    first, second = (unets.inputs(kind, batch=2, seed=seed) for seed in (0, 1))
    with AttentionMaps(unet) as maps:
        maps.rows([0, 1])
        unets.call(unet, first, 800.0)
        maps.rows([None, 0])
        unets.call(unet, second, 600.0)
    found = [reference(kind, [call], (16, 16)) for call in ((first, 800.0), (second, 600.0))]
    mean = (wanted(found[0], 0, (16, 16)) + wanted(found[1], 1, (16, 16))) / 2
    torch.testing.assert_close(maps.result(0), mean, **CLOSE)
    torch.testing.assert_close(maps.result(1), wanted(found[0], 1, (16, 16)), **CLOSE)


def test_at_every_place_the_tokens_share_one(unet, kind):
    result = gathered(unet, [0], [(unets.inputs(kind), 900.0)]).result()
    torch.testing.assert_close(result.sum(-1), torch.ones(4, 4))


def test_leading_tokens_are_dropped_when_asked(unet, kind):
    calls = [(unets.inputs(kind), 900.0)]
    whole, rest = gathered(unet, [0], calls).result(), gathered(unet, [0], calls, skip_tokens=2).result()
    assert torch.equal(rest, whole[..., 2:]) and rest.shape[-1] == unets.TOKENS - 2


def test_contexts_of_other_lengths_keep_their_columns(unet, kind):
    short = unets.inputs(kind)
    long = {**short, "context": torch.cat([short["context"], short["context"][:, :3]], 1)}
    with AttentionMaps(unet) as maps:
        for values in (short, long):
            maps.rows([0])
            unets.call(unet, values)
    first, second = (gathered(unet, [0], [(values, 900.0)]).result() for values in (short, long))
    torch.testing.assert_close(maps.result(), (F.pad(first, (0, 3)) + second) / 2, **CLOSE)


def test_few_heads_at_a_time_give_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(2, tokens, 6 * 8, generator=generator) for tokens in (12, 7))
    whole = mean_over_heads(queries, keys, 6)
    by_head = zip(queries.split(8, -1), keys.split(8, -1))
    mean = torch.stack([torch.softmax(q @ k.transpose(1, 2) / 8**0.5, -1) for q, k in by_head]).mean(0)
    torch.testing.assert_close(whole, mean)
    monkeypatch.setattr(attention_maps, "_ELEMENTS", 2 * 12 * 7 * 4)
    torch.testing.assert_close(mean_over_heads(queries, keys, 6), whole)
    monkeypatch.setattr(attention_maps, "_ELEMENTS", 1)
    torch.testing.assert_close(mean_over_heads(queries, keys, 6), whole)


@pytest.mark.parametrize("kind", ["ldm-sd15", "diffusers-sdxl"])
def test_probabilities_are_computed_in_fp32_under_autocast_and_for_half_precision(unet, kind):
    values = unets.inputs(kind)
    plain = gathered(unet, [0], [(values, 900.0)]).result()
    with torch.autocast("cpu", torch.bfloat16):
        cast = gathered(unet, [0], [(values, 900.0)]).result()
        queries = torch.full((1, 1, 4), 1.0, dtype=torch.bfloat16)
        keys = torch.tensor([[[1.0, 1, 1, 1], [1, 1, 1, 1.0078125]]], dtype=torch.bfloat16)
        exact = torch.softmax(torch.tensor([4.0, 4.0078125]), 0)
        torch.testing.assert_close(mean_over_heads(queries, keys, 1, 1.0)[0, 0], exact, rtol=0, atol=1e-7)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=0.2, atol=0.02)
    torch.testing.assert_close(cast.sum(-1), torch.ones(4, 4))


def test_results_can_be_used_after_a_run_in_inference_mode(unet, kind):
    with torch.inference_mode():
        maps = gathered(unet, [0], [(unets.inputs(kind), 900.0)])
    result = maps.result()
    result += 1
    assert not result.is_inference()


# With a session -------------------------------------------------------------------------------------------------------


def test_maps_of_changing_size_are_brought_to_the_native_grid(unet, kind):
    """RAU-Net halves the maps at high noise, but not at low: the mean is of maps of two sizes."""
    method, values = HiDiffusion(t1=0.5, t2=0, aggressive="off"), unets.inputs(kind)
    spied = unets.build(kind)
    with probabilities(spied, kind) as found, Session(spied, [method], unets.COMMON):
        for timestep in (900.0, 100.0):
            unets.call(spied, values, timestep)
    each = [probability[0].mean(0).unflatten(0, (int(probability.shape[2] ** 0.5),) * 2) for _, probability in found]
    sizes = {map.shape[0] for map in each}
    assert len(sizes) == 2 and 4 in sizes
    for inner, outer in ((AttentionMaps, Session), (Session, AttentionMaps)):
        with contextlib.ExitStack() as stack:
            opened = [
                stack.enter_context(
                    AttentionMaps(unet) if cls is AttentionMaps else Session(unet, [method], unets.COMMON)
                )
                for cls in (outer, inner)
            ]
            maps = next(each for each in opened if isinstance(each, AttentionMaps))
            for timestep in (900.0, 100.0):
                maps.rows([0])
                unets.call(unet, values, timestep)
        mean = torch.stack([fit_map(map, (4, 4)) for map in each]).mean(0)
        torch.testing.assert_close(maps.result(), mean, **CLOSE)


@pytest.mark.parametrize(
    ("size", "target"), [((8, 8), (4, 4)), ((2, 3), (4, 6)), ((8, 2), (4, 4)), ((5, 7), (5, 7)), ((2, 8), (4, 4))]
)
def test_a_map_at_another_size_keeps_its_mean_and_its_sums(size, target):
    values = torch.softmax(torch.randn(*size, 5, generator=torch.Generator().manual_seed(1)), -1)
    fitted = fit_map(values, target)
    assert tuple(fitted.shape) == (*target, 5)
    torch.testing.assert_close(fitted.sum(-1), torch.ones(target))
    torch.testing.assert_close(fitted.mean((0, 1)), values.mean((0, 1)))


def test_a_map_that_shrinks_is_the_mean_of_its_cells():
    values = torch.arange(32.0).view(4, 8, 1)
    assert torch.equal(fit_map(values, (2, 4)), values.unfold(0, 2, 2).unfold(1, 2, 2).mean((-1, -2)))


def test_the_grid_can_be_given(unet, kind):
    values = unets.inputs(kind, (16, 24))
    maps = gathered(unet, [0], [(values, 900.0)], size=(32, 24))
    plain = gathered(unet, [0], [(values, 900.0)]).result()
    torch.testing.assert_close(maps.result(), fit_map(plain, (8, 6)), **CLOSE)


# No trace -------------------------------------------------------------------------------------------------------------


def test_the_output_keeps_every_bit_and_the_network_its_state(unet, kind):
    values = unets.inputs(kind, (16, 24), batch=2)
    plain = unets.call(unet, values, 900.0)
    keys, generators = list(unet.state_dict()), snapshots.of_generators()
    with AttentionMaps(unet) as maps:
        maps.rows([None, 0])
        assert torch.equal(unets.call(unet, values, 900.0), plain)
        assert list(unet.state_dict()) == keys
    assert snapshots.of_generators() == generators
    assert torch.equal(unets.call(unet, values, 900.0), plain)
    assert maps.result().isfinite().all()


class Interrupted(BaseException):
    """A1111's interrupt is no `Exception` either."""


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
def test_after_a_failure_the_network_is_as_it_was(unet, kind, error):
    values, before = unets.inputs(kind), snapshots.of_tree(unet)

    def fail(module, args):
        raise error

    handle = unet.get_submodule(READ[kind][-1]).register_forward_pre_hook(fail)
    with pytest.raises(error), AttentionMaps(unet) as maps:
        maps.rows([0])
        unets.call(unet, values)
    handle.remove()
    assert not snapshots.differences(before, snapshots.of_tree(unet))
    assert torch.equal(unets.call(unet, values), unets.call(unets.build(kind), values))


def test_a_failure_while_installing_takes_everything_back(unet, kind, monkeypatch):
    before = snapshots.of_tree(unet)
    maps = AttentionMaps(unet)
    last = unet.get_submodule(READ[kind][-1]).transformer_blocks[-1].attn2
    monkeypatch.setattr(type(last), "register_forward_pre_hook", None)
    with pytest.raises(TypeError), maps:
        pytest.fail("was opened")
    assert not maps.is_open and not snapshots.differences(before, snapshots.of_tree(unet))


def test_without_rows_nothing_is_read_and_the_result_says_why(unet, kind):
    with AttentionMaps(unet) as maps:
        unets.call(unet, unets.inputs(kind, batch=2))
    with pytest.raises(HiresError, match="a UNet call of 2 rows was not read"):
        maps.result()


def test_rows_are_told_anew_at_each_level_and_used_once(unet, kind):
    values = unets.inputs(kind, batch=2)
    with AttentionMaps(unet) as maps:
        maps.rows([0, None])
        unets.call(unet, values)
        unets.call(unet, values)
        maps.rows([None, 0])
        unets.call(unet, values)
    assert maps.calls(0) == 2 and len(maps.notes) == 1


def test_maps_can_be_gathered_again_but_not_twice_at_once(unet, kind):
    values = unets.inputs(kind)
    maps = gathered(unet, [0], [(values, 900.0)])
    first = maps.result()
    with maps:
        with pytest.raises(HiresError), maps:
            pytest.fail("was opened twice")
        maps.rows([0])
        unets.call(unet, values, 900.0)
    assert torch.equal(maps.result(), first) and maps.calls() == 1


def test_a_copy_of_the_network_gathers_nothing(unet, kind):
    values = unets.inputs(kind)
    with AttentionMaps(unet) as maps:
        maps.rows([0])
        copied = copy.deepcopy(unet)
        output = unets.call(copied, values)
        assert maps.calls() == 0
        unets.call(unet, values)
        assert maps.calls() == 1
    assert torch.equal(output, unets.call(unet, values))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_is_read_too(unet, kind, in_place):
    compiled = unet if in_place else torch.compile(unet, backend="eager")
    if in_place:
        unet.compile(backend="eager")
    values, plain = unets.inputs(kind), gathered(unets.build(kind), [0], [(unets.inputs(kind), 900.0)])
    implementation, forward = unet._compiled_call_impl, vars(compiled).get("forward")
    maps = gathered(compiled, [0], [(values, 900.0)])
    assert torch.equal(maps.result(), plain.result())
    assert any("torch.compile" in note for note in maps.notes)
    assert unet._compiled_call_impl is implementation and vars(compiled).get("forward") is forward


# Other networks -------------------------------------------------------------------------------------------------------


def test_the_nearest_level_is_read_where_that_one_has_no_cross_attention():
    unet = unets.build("ldm-sd15")
    for block in (*unet.input_blocks[7:], *unet.output_blocks[:6]):
        for index in reversed(range(len(block))):
            if hasattr(block[index], "transformer_blocks"):
                del block[index]
    maps = gathered(unet, [0], [(unets.inputs("ldm-sd15", (16, 24)), 900.0)])
    assert maps.level == 1 and maps.result().shape == (8, 12, unets.TOKENS)
    assert "1/2 is read" in maps.notes[0]


def test_a_network_without_cross_attention_is_refused():
    unet = unets.build("ldm-sd15")
    for block in (*unet.input_blocks, *unet.output_blocks):
        for index in reversed(range(len(block))):
            if hasattr(block[index], "transformer_blocks"):
                del block[index]
    with pytest.raises(UnsupportedModel, match="no cross-attention"):
        AttentionMaps(unet)


def test_forge_s_form_is_read_as_ldm_s():
    values = unets.inputs("ldm-sd15")
    forge, ldm = (gathered(unets.build(kind), [0], [(values, 900.0)]).result() for kind in ("forge", "ldm-sd15"))
    torch.testing.assert_close(forge, ldm, **CLOSE)


def test_layers_whose_tokens_are_no_map_are_left_out_and_named(unet, kind):
    def merged(module, args, kwargs):
        return (args[0][:, ::2], *args[1:]), kwargs

    def enlarged(module, args, kwargs, output):
        return output.repeat_interleave(2, 1)

    values, places = unets.inputs(kind), READ[kind]
    for block in unet.get_submodule(places[0]).transformer_blocks:
        block.attn2.register_forward_pre_hook(merged, with_kwargs=True)
        block.attn2.register_forward_hook(enlarged, with_kwargs=True)
    maps = gathered(unet, [0], [(values, 900.0)])
    assert any("merged or tiled" in note for note in maps.notes)
    torch.testing.assert_close(maps.result().sum(-1), torch.ones(4, 4))


def test_of_a_prompt_with_pictures_beside_it_the_text_is_read():
    """diffusers hands (text, [pictures]) to the layers when an IP-Adapter is loaded."""
    unet, values = unets.build("diffusers-sd15"), unets.inputs("diffusers-sd15")
    attention = unet.down_blocks[2].attentions[0].transformer_blocks[0].attn2
    context = values["context"]
    plain = gathered(unet, [0], [(values, 900.0)]).result()

    def text_only(module, args, kwargs):
        return args, {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"][0]}

    def with_pictures(module, args, kwargs):
        return args, {**kwargs, "encoder_hidden_states": (kwargs["encoder_hidden_states"], [context])}

    attention.register_forward_pre_hook(with_pictures, with_kwargs=True)
    with AttentionMaps(unet) as maps:
        attention.register_forward_pre_hook(text_only, with_kwargs=True)
        maps.rows([0])
        unets.call(unet, values, 900.0)
    assert torch.equal(maps.result(), plain)
