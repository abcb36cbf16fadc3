"""Whatever goes wrong, and wherever, the network comes back as it was; and other extensions' changes stay."""

import functools
import itertools

import pytest
import torch
from support import snapshots, unets
from torch import nn

from lib_hires import DeepShrink, HiDiffusion, Session
from lib_hires.patches import UndoLog
from lib_hires.unet.layout import read_layout
from lib_hires.unet.session import sessions_on

EVERYTHING = HiDiffusion(t1=1, t2=1, aggressive="off")
METHODS = [EVERYTHING, DeepShrink(window_attention=True)]
NAMES = ["hidiffusion", "deep shrink"]


class Interrupted(BaseException):
    """A1111's interrupt is no `Exception` either."""


def blocks(unet):
    """The modules of every step, and the parts of every transformer that is cut."""
    layout, found = read_layout(unet), [unet]
    for modules in (*layout.encoder, *layout.decoder):
        found += [m for m in vars(modules).values() if m is not None]
    for transformer in layout.transformers(layout.structure.top_attention_level):
        block = transformer.transformer_blocks[-1]
        found += [block, block.attn1, block.attn1.to_q, block.attn2, block.ff]
    names = {module: name for name, module in unet.named_modules()}
    return {names[module] or "the network": module for module in found}


def inputs(kind):
    """Two images: the group norms of so narrow a network refuse a single number, which is what is left of one."""
    return unets.inputs(kind, batch=2)


def failing(error):
    def hook(module, args):
        raise error

    return hook


@pytest.mark.parametrize(("kind", "method"), list(zip(unets.KINDS, [*METHODS, *METHODS[::-1]])))
def test_a_failure_or_an_interrupt_in_any_block_leaves_the_network_as_it_was(unet, kind, method):
    before, values, failed = snapshots.of_tree(unet), inputs(kind), []
    errors = itertools.cycle([RuntimeError("out of memory"), KeyboardInterrupt(), Interrupted()])
    for (name, module), error in zip(blocks(unet).items(), errors):
        opened = Session(unet, [method], unets.COMMON)
        handle = module.register_forward_pre_hook(failing(error))
        with pytest.raises(type(error)), opened:
            unets.call(unet, values, 990.0)
        handle.remove()
        if snapshots.differences(before, snapshots.of_tree(unet)) or opened.is_open:
            failed.append(name)
    assert failed == []


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_a_session_goes_on_after_a_failed_call(unet, kind, method):
    values = inputs(kind)
    module = read_layout(unet).decoder[3].first
    with Session(unet, [method], unets.COMMON):
        wanted = unets.call(unet, values, 990.0)
        handle = module.register_forward_pre_hook(failing(RuntimeError("once")))
        with pytest.raises(RuntimeError, match="once"):
            unets.call(unet, values, 900.0)
        handle.remove()
        assert torch.equal(unets.call(unet, values, 990.0), wanted)


class Limit:
    """Lets the n-th change of any module fail: every way in which the library changes one."""

    def __init__(self, monkeypatch):
        self.left = None
        for owner, name in (
            (nn.Module, "register_forward_pre_hook"),
            (nn.Module, "register_forward_hook"),
            (UndoLog, "set"),
        ):
            monkeypatch.setattr(owner, name, self.limited(getattr(owner, name)))

    def limited(self, change):
        @functools.wraps(change)
        def wrapper(*args, **kwargs):
            if self.left is not None:
                if self.left == 0:
                    self.left = None
                    raise MemoryError("no more")
                self.left -= 1
            return change(*args, **kwargs)

        return wrapper


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_an_installation_that_fails_at_any_change_leaves_nothing_behind(unet, kind, method, monkeypatch):
    values, before = inputs(kind), snapshots.of_tree(unet)
    limit, changes = Limit(monkeypatch), 0
    with Session(unet, [method], unets.COMMON):
        wanted = unets.call(unet, values, 990.0)
    while True:
        opened = Session(unet, [method], unets.COMMON)
        limit.left = changes
        try:
            with opened:
                unets.call(unet, values, 990.0)
        except MemoryError:
            assert snapshots.differences(before, snapshots.of_tree(unet)) == [], f"change {changes}"
            assert sessions_on(unet) == [] and not opened.is_open
            changes += 1
        else:
            break
    limit.left = None
    assert changes > 10
    with Session(unet, [method], unets.COMMON):
        assert torch.equal(unets.call(unet, values, 990.0), wanted)


def test_an_installation_that_fails_does_not_end_the_session(unet, kind, monkeypatch):
    values, limit = inputs(kind), Limit(monkeypatch)
    with Session(unet, [EVERYTHING], unets.COMMON) as opened:
        entered = snapshots.of_tree(unet)
        limit.left = 2
        with pytest.raises(MemoryError):
            unets.call(unet, values, 990.0)
        assert snapshots.differences(entered, snapshots.of_tree(unet)) == [] and opened.is_open
        with_all = unets.call(unet, values, 990.0)
    assert not torch.equal(with_all, unets.call(unet, values, 990.0))


def test_a_session_that_cannot_be_opened_gives_the_outer_one_back(unet, kind, monkeypatch):
    values, limit = inputs(kind), Limit(monkeypatch)
    with Session(unet, [EVERYTHING], unets.COMMON) as outer:
        wanted = unets.call(unet, values)
        inner = Session(unet, METHODS[1:], unets.COMMON)
        limit.left = 0
        with pytest.raises(MemoryError):
            inner.open()
        assert sessions_on(unet) == [outer] and not inner.is_open
        assert torch.equal(unets.call(unet, values), wanted)


# Living with others ---------------------------------------------------------------------------------------------------


class Extension:
    """Another extension: an instance `forward` on every self-attention that calls what it found."""

    def __init__(self, unet, gain=1.0):
        self.modules = [m for name, m in unet.named_modules() if name.endswith("attn1")]
        self.found, self.had = {}, {}
        for module in self.modules:
            self.had[module] = "forward" in vars(module)
            self.found[module] = module.forward
            module.forward = functools.partial(self.run, module, gain)

    def run(self, module, gain, *args, **kwargs):
        return gain * self.found[module](*args, **kwargs)

    def leave(self, keep=False):
        """Puts back what was found, or, as a careful extension does, deletes what it had added."""
        for module in self.modules:
            if self.had[module] or keep:
                module.forward = self.found[module]
            else:
                del module.forward


def test_another_extension_that_comes_and_goes_during_the_session_leaves_no_trace(unet, kind):
    values, before = inputs(kind), snapshots.of_tree(unet)
    with Session(unet, [EVERYTHING], unets.COMMON):
        wanted = unets.call(unet, values)
        other = Extension(unet, gain=2.0)
        assert not torch.equal(unets.call(unet, values), wanted)
        other.leave()
        assert torch.equal(unets.call(unet, values), wanted)
    assert snapshots.differences(before, snapshots.of_tree(unet)) == []


def test_another_extension_that_stays_longer_than_the_session_keeps_its_override_and_ours_is_inert(unet, kind):
    values = inputs(kind)
    plain = unets.call(unet, values)
    doubled = Extension(unet, gain=2.0)
    theirs = unets.call(unet, values)
    doubled.leave()
    with Session(unet, [EVERYTHING], unets.COMMON):
        unets.call(unet, values)
        other = Extension(unet, gain=2.0)
        both = unets.call(unet, values)
    assert not torch.equal(both, theirs)
    assert all(vars(module)["forward"].func == other.run for module in other.modules)
    assert torch.equal(unets.call(unet, values), theirs)
    other.leave()  # it puts back what it found, which was ours
    assert torch.equal(unets.call(unet, values), plain)


def test_an_extension_that_was_there_first_is_there_afterwards(unet, kind):
    values = inputs(kind)
    other = Extension(unet, gain=2.0)
    theirs, before = unets.call(unet, values), snapshots.of_tree(unet)
    with Session(unet, [EVERYTHING], unets.COMMON):
        assert not torch.equal(unets.call(unet, values), theirs)
    assert snapshots.differences(before, snapshots.of_tree(unet)) == []
    assert torch.equal(unets.call(unet, values), theirs)
    other.leave()


def test_an_extension_that_leaves_while_ours_is_on_top_is_not_brought_back(unet, kind):
    values = inputs(kind)
    plain, other = unets.call(unet, values), Extension(unet, gain=2.0)
    with Session(unet, [EVERYTHING], unets.COMMON):
        unets.call(unet, values)
        other.leave(keep=True)  # writes over ours
        unets.call(unet, values)
    assert torch.equal(unets.call(unet, values), plain)


class Accelerate:
    """accelerate's `add_hook_to_module` and `remove_hook_from_module`, by what they do to a module's attributes."""

    @staticmethod
    def add(module):
        module._old_forward = module.forward
        module.forward = functools.partial(lambda self, *args, **kwargs: self._old_forward(*args, **kwargs), module)

    @staticmethod
    def remove(module):
        module.forward = module._old_forward
        del module._old_forward


def test_offload_hooks_put_on_and_taken_off_around_the_end_of_a_session_restore_the_class_s_forward(unet, kind):
    values = inputs(kind)
    plain = unets.call(unet, values)
    modules = [
        m for name, m in unet.named_modules() if name.endswith("attn1") or type(m).__name__.startswith("Upsample")
    ]
    with Session(unet, [EVERYTHING], unets.COMMON):
        wanted = unets.call(unet, values)
        for module in modules:
            Accelerate.add(module)
        assert torch.equal(unets.call(unet, values), wanted)
    assert torch.equal(unets.call(unet, values), plain)
    for module in modules:
        Accelerate.remove(module)
        assert not hasattr(module.forward, "hires_lab")
    assert torch.equal(unets.call(unet, values), plain)


def test_offload_hooks_that_were_there_first_still_run(unet, kind):
    values, before_hooks = inputs(kind), unets.build(kind)
    with Session(before_hooks, [EVERYTHING], unets.COMMON):
        wanted = unets.call(before_hooks, values)
    for module in unet.modules():
        if module is not unet and list(module.parameters(recurse=False)):
            Accelerate.add(module)
    before = snapshots.of_tree(unet)
    with Session(unet, [EVERYTHING], unets.COMMON):
        assert torch.equal(unets.call(unet, values), wanted)
    assert snapshots.differences(before, snapshots.of_tree(unet)) == []


def test_a_convolution_override_that_another_extension_keeps_is_inert_after_the_session():
    """Asymmetric tiling sets `_conv_forward` on the instance and puts back what it found."""
    unet, values = unets.build("ldm-sd15"), inputs("ldm-sd15")
    plain, conv = unets.call(unet, values), read_layout(unet).encoder[3].downsample.op
    with Session(unet, [EVERYTHING], unets.COMMON):
        unets.call(unet, values)
        found = conv._conv_forward
        conv._conv_forward = lambda *args: found(*args)
    conv._conv_forward = found
    assert torch.equal(unets.call(unet, values), plain)


@pytest.mark.parametrize("kind", ["ldm-sd15", "ldm-sdxl"])
def test_an_upsampler_override_that_another_extension_keeps_is_inert_after_the_session(kind):
    unet, values = unets.build(kind), inputs(kind)
    plain, upsample = unets.call(unet, values), next(m.upsample for m in read_layout(unet).decoder if m.upsample)
    with Session(unet, [EVERYTHING], unets.COMMON):
        unets.call(unet, values)
        found = upsample.forward
        upsample.forward = lambda *args, **kwargs: found(*args, **kwargs)
    upsample.forward = found
    assert torch.equal(unets.call(unet, values), plain)
