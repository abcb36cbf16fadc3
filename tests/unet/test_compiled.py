"""Compiled networks while they are patched: one graph for each state, kept from session to session, and the same pictures.

The backend here runs what Dynamo traced as it is, so that outputs can be compared bit for bit, and counts.
"""

from __future__ import annotations

import copy
import gc
import logging
import weakref

import pytest
import torch
from support import unets
from support.snapshots import differences, of_tree

from lib_hires import DeepShrink, HiDiffusion
from lib_hires.unet.attention_maps import AttentionMaps
from lib_hires.unet.session import Session, sessions_on

EARLY, LATE = 900.0, 100.0
BOTH_FORMS = pytest.mark.parametrize(("kind", "in_place"), [("diffusers-small", False), ("ldm-small", True)])


class Backend:
    """Counts the graphs that it is given and their runs."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, _inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph(*args)

        return run


@pytest.fixture(autouse=True)
def fresh_dynamo(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # a record for each line of every frame
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_(unet, in_place, backend):
    if not in_place:
        return torch.compile(unet, backend=backend, dynamic=False)
    unet.compile(backend=backend, dynamic=False)
    return unet


def drawn(unet, method, values, levels, seeds=(0,)):
    with Session(unet, [method], unets.COMMON, seeds=seeds) as session:
        outputs = []
        for level in levels:
            session.at(timestep=level)
            outputs.append(unets.call(unet, values, timestep=level))
    return outputs, session


@BOTH_FORMS
def test_each_state_has_one_graph_that_is_kept_and_draws_the_same(kind, in_place):
    unet, backend = unets.build(kind), Backend()
    values, levels = unets.inputs(kind, (32, 32), batch=2), [EARLY, EARLY - 50, LATE, LATE - 50]
    plain = unets.call(unet, values)
    wanted = {seed: drawn(unet, HiDiffusion(), values, levels, (seed,))[0] for seed in range(3)}
    unet = compile_(unet, in_place, backend)
    before = of_tree(unet)
    for seed in range(3):
        outputs, session = drawn(unet, HiDiffusion(), values, levels, (seed,))
        assert all(map(torch.equal, outputs, wanted[seed])) and not session.notes
        assert len(session.ran) == 2
        assert backend.graphs == 2 and backend.runs == 2 + 4 * seed  # the first call of a state runs uncompiled
    assert not differences(before, of_tree(unet))
    assert torch.equal(unets.call(unet, values), plain) and backend.graphs == 3


@BOTH_FORMS
def test_other_sizes_batches_and_rows_of_other_images_come_out_right(kind, in_place):
    unet, backend = unets.build(kind), Backend()
    odd = (33, 19)  # which ldm's up-sampling does not know without a route
    calls = [
        unets.inputs(kind, size, batch=batch)
        for size, batch in ((odd if kind.startswith("diffusers") else (40, 24), 1), ((24, 40), 3))
    ]
    levels = [LATE, LATE - 50]
    wanted = [drawn(unet, HiDiffusion(), values, levels, (1, 2))[0] for values in calls]
    unet = compile_(unet, in_place, backend)
    for values, outputs in zip(calls, wanted):
        again, session = drawn(unet, HiDiffusion(), values, levels, (1, 2))
        assert all(map(torch.equal, again, outputs)) and not session.notes
    assert backend.runs == len(calls)


def masked(_attention, args, kwargs):
    return args, {**kwargs, "attention_mask": args[0].new_zeros(args[0].shape[0], 1, args[0].shape[1])}


def test_what_windows_pass_by_is_said_in_every_session():
    unet, values = unets.build("diffusers-small"), unets.inputs("diffusers-small", (32, 32))
    for module in unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.attn1.register_forward_pre_hook(masked, with_kwargs=True)
    wanted, eager = drawn(unet, HiDiffusion(), values, [LATE] * 2)
    unet = compile_(unet, False, Backend())
    for _ in range(2):
        outputs, session = drawn(unet, HiDiffusion(), values, [LATE] * 2)
        assert all(map(torch.equal, outputs, wanted)) and session.notes == eager.notes != []


def test_sizes_that_change_from_step_to_step_run_uncompiled_and_that_is_said():
    unet, backend = unets.build("diffusers-small"), Backend()
    method, values = DeepShrink(), unets.inputs("diffusers-small", (32, 32))
    levels = [EARLY, EARLY, EARLY - 50, EARLY - 50]
    wanted, _ = drawn(unet, method, values, levels)
    outputs, session = drawn(compile_(unet, False, backend), method, values, levels)
    assert all(map(torch.equal, outputs, wanted)) and not backend.graphs
    assert session.notes == [
        "torch.compile is bypassed while the network is patched: sizes change from step to step ('smooth_scaling')."
    ]


@BOTH_FORMS
def test_what_does_not_compile_runs_uncompiled_and_that_is_said(kind, in_place):
    def broken(_graph, _inputs):
        raise RuntimeError("no compiler here")

    unet, values = unets.build(kind), unets.inputs(kind, (32, 32))
    wanted, _ = drawn(unet, HiDiffusion(), values, [EARLY] * 3)
    outputs, session = drawn(compile_(unet, in_place, broken), HiDiffusion(), values, [EARLY] * 3)
    assert all(map(torch.equal, outputs, wanted))
    assert len(session.notes) == 1 and "no compiler here" in session.notes[0]


@BOTH_FORMS
def test_a_network_that_breaks_into_several_graphs_runs_uncompiled_while_it_is_patched(kind, in_place):
    """What follows a break is looked up by code that all states share, and hooks are no part of what is compared."""
    unet, backend, values = unets.build(kind), Backend(), unets.inputs(kind, (32, 32))
    embed = unet.time_embedding if kind.startswith("diffusers") else unet.time_embed
    embed.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    method = DeepShrink(smooth_scaling=False)
    plain, (wanted, _) = unets.call(unet, values), drawn(unet, method, values, [EARLY] * 3)
    unet = compile_(unet, in_place, backend)
    for _ in range(2):
        outputs, session = drawn(unet, method, values, [EARLY] * 3)
        assert all(map(torch.equal, outputs, wanted)) and "it does not compile so" in session.notes[0]
        assert torch.equal(unets.call(unet, values), plain)


def test_a_call_that_fails_by_itself_leaves_the_network_compiled():
    unet, backend, values = unets.build("diffusers-small"), Backend(), unets.inputs("diffusers-small", (32, 32))
    unet = compile_(unet, False, backend)
    with pytest.raises(RuntimeError, match="same dtype"):
        drawn(unet, HiDiffusion(), values | {"context": values["context"].double()}, [EARLY] * 2)
    _, session = drawn(unet, HiDiffusion(), values, [EARLY] * 3)
    assert backend.runs == 2 and not session.notes


def test_tokens_that_are_tiled_in_the_middle_of_a_run_are_passed_by():
    def tile(module):
        forward = module.forward
        module.forward = lambda x, *args, **kwargs: forward(x.reshape(4, -1, x.shape[-1]), *args, **kwargs).view_as(x)

    def run(unet):
        attention = [module for name, module in unet.named_modules() if name.endswith("attn1") and "mid" not in name]
        with Session(unet, [HiDiffusion(raunet=False)], unets.COMMON) as session:
            outputs = [unets.call(unet, values, timestep=EARLY) for _ in range(2)]
            found = [vars(module)["forward"] for module in attention]
            for module in attention:
                tile(module)
            outputs += [unets.call(unet, values, timestep=EARLY) for _ in range(2)]
            for module, forward in zip(attention, found):
                module.forward = forward
            return [*outputs, unets.call(unet, values, timestep=EARLY)], session.notes

    unet, values = unets.build("diffusers-small"), unets.inputs("diffusers-small", (32, 32))
    wanted, said = run(unet)
    outputs, notes = run(compile_(unet, False, Backend()))
    assert all(map(torch.equal, outputs, wanted)) and notes == said != []


def test_sessions_and_maps_that_are_closed_in_the_order_they_were_opened_leave_nothing():
    unet = compile_(unets.build("diffusers-small"), True, Backend())
    before = of_tree(unet)
    for first, second in (
        (Session(unet, [HiDiffusion()], unets.COMMON), AttentionMaps(unet)),
        (AttentionMaps(unet), Session(unet, [HiDiffusion()], unets.COMMON)),
    ):
        first.__enter__()
        second.__enter__()
        first.__exit__()
        second.__exit__()
        assert not differences(before, of_tree(unet))


def test_a_deep_copy_inside_a_session_leaves_the_session_where_it_was():
    unet = compile_(unets.build("diffusers-small"), False, Backend())
    session = Session(unet, [HiDiffusion()], unets.COMMON).open()
    copy.deepcopy(unet)
    assert sessions_on(unet) == [session]
    session.close()
    assert not sessions_on(unet) and not sessions_on(unet._orig_mod)


def test_a_network_that_does_not_tell_how_it_was_compiled_runs_uncompiled_and_that_is_said():
    unet, values = unets.build("diffusers-small"), unets.inputs("diffusers-small", (32, 32))
    wanted, _ = drawn(unet, HiDiffusion(), values, [EARLY] * 2)
    unet._compiled_call_impl = len
    outputs, session = drawn(unet, HiDiffusion(), values, [EARLY] * 2)
    assert all(map(torch.equal, outputs, wanted)) and unet._compiled_call_impl is len
    assert session.notes == [
        "torch.compile is bypassed while the network is patched: it does not tell how it was compiled."
    ]


@BOTH_FORMS
@pytest.mark.parametrize("maps_first", [False, True])
def test_maps_are_gathered_beside_patches(kind, in_place, maps_first):
    def gathered(unet):
        session, maps = Session(unet, [HiDiffusion()], unets.COMMON), AttentionMaps(unet)
        outer, inner = (maps, session) if maps_first else (session, maps)
        with outer, inner:
            for level in (EARLY, EARLY - 50):
                session.at(timestep=level)
                maps.rows([0])
                output = unets.call(unet, values, timestep=level)
        return output, maps.result()

    unet, backend, values = unets.build(kind), Backend(), unets.inputs(kind, (32, 32))
    wanted = gathered(unet)
    unet = compile_(unet, in_place, backend)
    before = of_tree(unet)
    assert all(map(torch.equal, gathered(unet), wanted)) and not backend.graphs
    assert not differences(before, of_tree(unet))
    drawn(unet, HiDiffusion(), values, [EARLY] * 2)
    assert backend.runs == 1  # rested no longer than the maps were open


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_that_is_forgotten_can_be_collected(in_place):
    backend = Backend()
    unet = compile_(unets.build("diffusers-small"), in_place, backend)
    seen = weakref.ref(getattr(unet, "_orig_mod", unet))
    drawn(unet, HiDiffusion(), unets.inputs("diffusers-small", (32, 32)), [EARLY] * 2)
    assert backend.runs == 1
    del unet
    gc.collect()
    assert seen() is None


def test_attention_compiled_block_by_block_attends_in_windows():
    """Regional compilation (diffusers' `compile_repeated_blocks`): blocks are compiled, the network is not."""
    unet, backend, values = unets.build("diffusers-small"), Backend(), unets.inputs("diffusers-small", (32, 32))
    wanted, _ = drawn(unet, HiDiffusion(), values, [EARLY, LATE])
    plain = unets.call(unet, values, timestep=LATE)
    for module in unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.compile(backend=backend)
    assert torch.equal(unets.call(unet, values, timestep=LATE), plain) and backend.graphs
    outputs, _ = drawn(unet, HiDiffusion(), values, [EARLY, LATE])
    assert all(map(torch.equal, outputs, wanted))
    assert torch.equal(unets.call(unet, values, timestep=LATE), plain)
