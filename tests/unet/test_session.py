"""A session: what is changed while it is open, and that nothing is changed otherwise."""

import gc
import weakref

import pytest
import torch
from support import snapshots, unets

import lib_hires
from lib_hires import DeepShrink, HiDiffusion, Session
from lib_hires.config import Common, Conflict, HiresError, SettingError, UnsupportedModel
from lib_hires.schedule import NoiseSchedule, scaled_linear
from lib_hires.unet.session import sessions_on

EARLY, LATE = 950.0, 50.0
METHODS = {
    "hidiffusion": HiDiffusion(),
    "raunet": HiDiffusion(window_attention=False),
    "windows": HiDiffusion(raunet=False),
    "deep shrink": DeepShrink(),
    "deep shrink and windows": DeepShrink(window_attention=True),
}


@pytest.fixture(params=["hidiffusion", "deep shrink and windows"])
def method(request):
    return METHODS[request.param]


def session(unet, *methods, **options):
    return Session(unet, methods, options.pop("common", unets.COMMON), **options)


# Off means off --------------------------------------------------------------------------------------------------------


def test_after_a_session_the_network_is_what_it_was(unet, kind, method):
    values = unets.inputs(kind)
    before, plain = snapshots.of_tree(unet), unets.call(unet, values)
    with session(unet, method):
        assert not torch.equal(unets.call(unet, values, EARLY), unets.call(unet, values, LATE))
        assert snapshots.differences(before, snapshots.of_tree(unet)) != []
    assert snapshots.differences(before, snapshots.of_tree(unet)) == []
    assert torch.equal(unets.call(unet, values), plain)


@pytest.mark.parametrize("name", ["raunet", "deep shrink"])
def test_beyond_its_gate_a_method_is_bit_equal_to_none_and_has_nothing_installed(unet, kind, name):
    values = unets.inputs(kind)
    plain = unets.call(unet, values, LATE)
    with session(unet, METHODS[name]) as opened:
        entered = snapshots.of_tree(unet)
        unets.call(unet, values, EARLY)
        assert torch.equal(unets.call(unet, values, LATE), plain)
        assert snapshots.differences(entered, snapshots.of_tree(unet)) == []
    assert opened.ran["plain"] == 1 and opened.ran.total() == 2


@pytest.mark.parametrize(
    "methods", [(), (HiDiffusion(window_attention=False),), (DeepShrink(),)], ids=["none", "raunet", "deep shrink"]
)
def test_where_a_plan_does_nothing_the_picture_is_bit_equal_and_only_the_watching_hook_is_there(unet, kind, methods):
    values = unets.inputs(kind, (8, 8), batch=2)  # the native size
    plain, before = unets.call(unet, values), snapshots.of_tree(unet)
    with session(unet, *methods) as opened:
        assert torch.equal(unets.call(unet, values), plain)
        changed = snapshots.differences(before, snapshots.of_tree(unet))
    assert {place.split("[")[0] for place in changed} <= {
                ": _forward_pre_hooks", ": _forward_pre_hooks_with_kwargs", ": __deepcopy__", ": _hires_lab_sessions",
            }
    assert len(opened.notes) == len(methods)


def test_window_attention_ends_with_its_gate(unet, kind):
    values = unets.inputs(kind)
    plain = unets.call(unet, values, LATE)
    with session(unet, HiDiffusion(raunet=False, window_end=0.5)):
        assert not torch.equal(unets.call(unet, values, EARLY), unets.call(unets.build(kind), values, EARLY))
        assert torch.equal(unets.call(unet, values, LATE), plain)


# No state in names ----------------------------------------------------------------------------------------------------


def test_names_parameters_modules_and_types_are_the_same_while_patched(unet, kind, method):
    names = list(unet.state_dict())
    parameters = [(name, id(value)) for name, value in unet.named_parameters()]
    modules = [(name, id(module), type(module)) for name, module in unet.named_modules()]
    with session(unet, method) as opened:
        unets.call(unet, unets.inputs(kind), EARLY)
        assert "plain" not in opened.ran
        assert list(unet.state_dict()) == names
        assert [(name, id(value)) for name, value in unet.named_parameters()] == parameters
        assert [(name, id(module), type(module)) for name, module in unet.named_modules()] == modules


def test_weights_that_are_loaded_while_patched_are_used(unet, kind, method):
    values, other = unets.inputs(kind), unets.build(kind)
    unets.randomise(other, seed=3)
    with session(other, method):
        wanted = unets.call(other, values, EARLY)
    with session(unet, method):
        assert not torch.equal(unets.call(unet, values, EARLY), wanted)
        unet.load_state_dict(other.state_dict())
        assert torch.equal(unets.call(unet, values, EARLY), wanted)
    assert torch.equal(unets.call(unet, values), unets.call(other, values))


# Randomness -----------------------------------------------------------------------------------------------------------


def test_the_global_generators_are_neither_read_nor_advanced(unet, kind, method):
    values = unets.inputs(kind)
    torch.manual_seed(1)
    before = snapshots.of_generators()
    with session(unet, method, seeds=[4]):
        first = unets.call(unet, values, EARLY)
    assert snapshots.of_generators() == before
    torch.manual_seed(2)
    with session(unet, method, seeds=[4]):
        assert torch.equal(unets.call(unet, values, EARLY), first)


def test_image_k_of_a_batch_equals_the_same_image_alone(unet, kind, method):
    seeds, values = (7, 8), unets.inputs(kind, batch=2)
    with session(unet, method, seeds=seeds):
        together = unets.call(unet, values, EARLY)
    for image, seed in enumerate(seeds):
        with session(unet, method, seeds=[seed]):
            alone = unets.call(unet, unets.rows(values, image), EARLY)
        assert (together[image : image + 1] - alone).abs().max() < 1e-4


# Telling where the run is ---------------------------------------------------------------------------------------------


def test_a_told_timestep_rules_over_the_networks_own_argument(unet, kind):
    values = unets.inputs(kind)
    with session(unet, HiDiffusion()) as opened:
        unets.call(unet, values, LATE)
        assert list(opened.ran) == ["windows"]
        opened.at(timestep=EARLY)
        unets.call(unet, values, LATE)
        assert any("at" in words for words in opened.ran)


def test_a_told_sigma_is_the_timestep_of_the_models_own_schedule():
    unet, values = unets.build("ldm-sd15"), unets.inputs("ldm-sd15")
    cleaner = NoiseSchedule(scaled_linear(0.0004, 0.009))
    for schedule, wanted in ((None, "plain"), (cleaner, "stride 4 at 3")):
        with session(unet, METHODS["raunet"], schedule=schedule) as opened:
            opened.at(sigma=2.0)
            unets.call(unet, values)
        assert list(opened.ran) == [wanted]


def test_the_step_fraction_counts_told_steps_and_nothing_else(unet, kind):
    common, values = Common(native_size=unets.NATIVE, clock="step fraction"), unets.inputs(kind)
    with session(unet, METHODS["raunet"], common=common) as opened:
        was_on = []
        for step in range(10):
            opened.at(timestep=EARLY, step=step, steps=10)
            for _ in range(1 + step % 2):  # a sampler may call twice a step
                opened.ran.clear()
                unets.call(unet, values)
            was_on.append("plain" not in opened.ran)
    assert was_on == [True] * 4 + [False] * 6


def test_an_untold_step_is_an_error_with_advice_and_the_network_is_restored():
    unet, common = unets.build("ldm-sd15"), Common(native_size=unets.NATIVE, clock="step fraction")
    before = snapshots.of_tree(unet)
    with (
        pytest.raises(HiresError, match=r"nobody told which step this is. Call session.at\(step=..., steps=...\)"),
        session(unet, METHODS["raunet"], common=common) as opened,
    ):
        opened.at(timestep=EARLY)
        unets.call(unet, unets.inputs("ldm-sd15"))
    assert snapshots.differences(before, snapshots.of_tree(unet)) == []


def test_telling_neither_timestep_nor_sigma_is_refused():
    with pytest.raises(HiresError, match="needs a timestep or a sigma"):
        session(unets.build("ldm-sd15"), HiDiffusion()).at(step=3, steps=10)


def test_told_rows_say_which_image_each_row_is_over_all_calls_of_a_level(unet, kind):
    seeds, values = (7, 8, 9), unets.inputs(kind, batch=3)
    order = [2, 0, 1, 1, 0, 2]
    with session(unet, METHODS["windows"], seeds=seeds) as opened:
        straight = unets.call(unet, values)
        opened.at(timestep=900.0, rows=order)
        first = unets.call(unet, unets.rows(values, *order[:4]))
        second = unets.call(unet, unets.rows(values, *order[4:]))
    assert (torch.cat([first, second]) - straight[order]).abs().max() < 1e-4


def test_two_rows_for_each_image_are_taken_for_the_images_in_turn(unet, kind):
    seeds, values = (7, 8), unets.inputs(kind, batch=2)
    with session(unet, METHODS["windows"], seeds=seeds):
        straight = unets.call(unet, values)
        doubled = unets.call(unet, unets.rows(values, 0, 1, 0, 1))
    assert (doubled - straight.repeat(2, 1, 1, 1)).abs().max() < 1e-4


def test_levels_in_any_order_give_the_same_pictures(unet, kind):
    values, levels = unets.inputs(kind), (950.0, 800.0, 500.0, 50.0)
    with session(unet, HiDiffusion(), seeds=[3]):
        down = [unets.call(unet, values, level) for level in levels]
        up = [unets.call(unet, values, level) for level in reversed(levels)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(down, up))


def test_calls_at_other_sizes_in_between_leave_no_trace(unet, kind):
    values, tile = unets.inputs(kind, (16, 24)), unets.inputs(kind, (8, 8), batch=2)
    with session(unet, METHODS["raunet"]) as opened:
        first = unets.call(unet, values, EARLY)
        small = unets.call(unet, tile, EARLY)
        assert torch.equal(unets.call(unet, values, EARLY), first)
    assert torch.equal(unets.call(unet, tile, EARLY), small)
    assert opened.ran["plain"] == 1


# Several sessions -----------------------------------------------------------------------------------------------------


def test_the_innermost_session_rules_and_the_outer_one_comes_back(unet, kind):
    values, before = unets.inputs(kind), snapshots.of_tree(unet)
    with session(unet, METHODS["raunet"]):
        alone = unets.call(unet, values, EARLY)
    with session(unet, METHODS["deep shrink"]):
        shrunk = unets.call(unet, values, EARLY)
    with session(unet, METHODS["raunet"]) as outer:
        assert torch.equal(unets.call(unet, values, EARLY), alone)
        with session(unet, METHODS["deep shrink"]) as inner:
            assert sessions_on(unet) == [inner, outer]
            assert torch.equal(unets.call(unet, values, EARLY), shrunk)
        assert torch.equal(unets.call(unet, values, EARLY), alone)
    assert snapshots.differences(before, snapshots.of_tree(unet)) == [] and sessions_on(unet) == []


def test_sessions_may_be_closed_in_any_order(unet, kind):
    values, before = unets.inputs(kind), snapshots.of_tree(unet)
    for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1), (0, 2, 1)):
        opened = [session(unet, METHODS[name]).open() for name in ("raunet", "deep shrink", "windows")]
        unets.call(unet, values, EARLY)
        for index in order:
            opened[index].close()
            left = [s for s in reversed(opened) if s.is_open]
            assert sessions_on(unet) == left
            unets.call(unet, values, EARLY)
            assert not left or left[0].ran.total() > 0
        assert snapshots.differences(before, snapshots.of_tree(unet)) == []


def test_sessions_on_two_networks_do_not_meet():
    values, first, second = unets.inputs("ldm-sd15"), unets.build("ldm-sd15"), unets.build("ldm-sd15")
    plain, before = unets.call(first, values), snapshots.of_tree(second)
    one = session(first, METHODS["raunet"]).open()
    assert snapshots.differences(before, snapshots.of_tree(second)) == []
    assert torch.equal(unets.call(second, values), plain)
    with session(second, METHODS["deep shrink"]) as two:
        unets.call(first, values)
        unets.call(second, values)
        assert (one.ran.total(), two.ran.total()) == (1, 1)
        one.close()
        assert torch.equal(unets.call(first, values), plain) and not torch.equal(unets.call(second, values), plain)
    assert snapshots.differences(before, snapshots.of_tree(second)) == []


def test_a_session_can_be_closed_twice_and_opened_again(unet, kind):
    values, before = unets.inputs(kind), snapshots.of_tree(unet)
    opened = session(unet, HiDiffusion()).open()
    first = unets.call(unet, values)
    opened.close()
    opened.close()
    assert snapshots.differences(before, snapshots.of_tree(unet)) == []
    with opened:
        assert torch.equal(unets.call(unet, values), first)
    assert snapshots.differences(before, snapshots.of_tree(unet)) == []


def test_an_open_session_is_not_opened_again(unet):
    with session(unet, HiDiffusion()) as opened, pytest.raises(HiresError, match="open already"):
        opened.open()
    assert sessions_on(unet) == []


def test_a_closed_session_keeps_no_network_alive():
    unet = unets.build("ldm-sd15")
    with session(unet, HiDiffusion()):
        unets.call(unet, unets.inputs("ldm-sd15"))
    watched = weakref.ref(unet)
    del unet
    gc.collect()
    assert watched() is None


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "kind", "error", "message"),
    [
        ([HiDiffusion(), DeepShrink()], "ldm-sd15", Conflict, "both shrink the feature map"),
        ([HiDiffusion(raunet=False), DeepShrink(window_attention=True)], "ldm-sd15", Conflict, "asked for twice"),
        ([DeepShrink(depth2=10)], "ldm-sdxl", SettingError, "'depth2' is 10, must be between 1 and 9 for SDXL"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_session_is_made(methods, kind, error, message):
    unet = unets.build(kind)
    before = snapshots.of_tree(unet)
    with pytest.raises(error, match=message):
        session(unet, *methods)
    assert snapshots.differences(before, snapshots.of_tree(unet)) == []


def test_a_network_that_is_no_unet_is_refused_when_the_session_is_made():
    with pytest.raises(UnsupportedModel):
        session(torch.nn.Linear(1, 1), HiDiffusion())


# The short form -------------------------------------------------------------------------------------------------------


def test_apply_and_remove_are_the_same_without_a_with(unet, kind):
    values, before, plain = unets.inputs(kind), snapshots.of_tree(unet), unets.call(unet, unets.inputs(kind))
    opened = lib_hires.apply(unet, HiDiffusion(), native_size=unets.NATIVE, seeds=[1])
    patched = unets.call(unet, values)
    with session(unets.build(kind), HiDiffusion(), seeds=[1]) as other:
        assert torch.equal(unets.call(other.unet, values), patched)
    assert opened.common.native_size == unets.NATIVE and not torch.equal(patched, plain)
    lib_hires.remove(unet)
    assert torch.equal(unets.call(unet, values), plain) and not opened.is_open
    lib_hires.remove(unet)
    assert snapshots.differences(before, snapshots.of_tree(unet)) == []


def test_remove_closes_every_session_on_a_network(unet):
    before = snapshots.of_tree(unet)
    opened = [lib_hires.apply(unet, HiDiffusion()) for _ in range(3)]
    lib_hires.remove(unet)
    assert not any(s.is_open for s in opened)
    assert snapshots.differences(before, snapshots.of_tree(unet)) == []


def test_patched_takes_the_common_settings_by_name_and_refuses_other_names():
    unet = unets.build("ldm-sdxl")
    with lib_hires.patched(unet, HiDiffusion(), family="sdxl_turbo", clock="step fraction") as opened:
        assert (opened.common.family, opened.common.clock, opened.model.native) == ("sdxl_turbo", "step fraction", 512)
    with pytest.raises(SettingError, match=r"'natve_size'.*Did you mean 'native_size'"):
        lib_hires.patched(unet, HiDiffusion(), natve_size=512)
    with pytest.raises(SettingError, match="'native_size' is -8"):
        lib_hires.patched(unet, HiDiffusion(), native_size=-8)


def test_every_public_name_exists_and_no_other():
    for name in lib_hires.__all__:
        assert getattr(lib_hires, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'hidiffusion_'"):
        _ = lib_hires.hidiffusion_
