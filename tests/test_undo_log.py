"""The undo log: changes are taken back exactly, last first, and only where they are still ours."""

import pytest
import torch
from support import snapshots
from torch import nn

from lib_hires.patches import UndoLog

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


class Layer(nn.Linear):
    """A module whose class's forward a test may change."""


@pytest.fixture
def layer():
    return Layer(3, 3)


def doubled(previous):
    return lambda *args, **kwargs: 2 * previous(*args, **kwargs)


def plain(layer):
    return nn.functional.linear(X, layer.weight, layer.bias)


def test_an_override_acts_and_is_gone_after_undo(layer):
    before, log = snapshots.of_tree(layer), UndoLog()
    log.override(layer, "forward", doubled)
    assert torch.equal(layer(X), 2 * plain(layer))
    log.undo()
    assert torch.equal(layer(X), plain(layer))
    assert snapshots.differences(before, snapshots.of_tree(layer)) == []


def test_an_override_calls_an_earlier_one_and_puts_it_back(layer):
    layer.forward = theirs = lambda x: plain(layer) + 1
    log = UndoLog()
    log.override(layer, "forward", doubled)
    assert torch.equal(layer(X), 2 * (plain(layer) + 1))
    log.undo()
    assert layer.forward is theirs


def test_an_override_follows_a_later_change_of_the_class(layer, monkeypatch):
    log = UndoLog()
    log.override(layer, "forward", doubled)
    monkeypatch.setattr(Layer, "forward", lambda self, x: x + 5, raising=False)
    assert torch.equal(layer(X), 2 * (X + 5))
    log.undo()


def test_two_logs_nest_and_are_undone_in_either_order(layer):
    for first_out in (0, 1):
        before, logs = snapshots.of_tree(layer), [UndoLog(), UndoLog()]
        for log in logs:
            log.override(layer, "forward", doubled)
        assert torch.equal(layer(X), 4 * plain(layer))
        logs[first_out].undo()
        assert torch.equal(layer(X), 2 * plain(layer))
        logs[1 - first_out].undo()
        assert torch.equal(layer(X), plain(layer))
        if first_out == 1:  # the last one out first: nothing is left at all
            assert snapshots.differences(before, snapshots.of_tree(layer)) == []
        vars(layer).pop("forward", None)


def test_an_override_beneath_another_extensions_is_left_and_does_nothing(layer):
    log = UndoLog()
    log.override(layer, "forward", doubled)
    ours = layer.forward
    layer.forward = theirs = lambda x: ours(x) + 1
    log.undo()
    assert layer.forward is theirs
    assert torch.equal(layer(X), plain(layer) + 1)
    layer.forward = ours  # the other extension goes away and puts back what it had found
    assert torch.equal(layer(X), plain(layer))


def test_an_override_that_another_extension_deleted_is_not_brought_back(layer):
    layer.forward = lambda x: plain(layer) + 1
    log = UndoLog()
    log.override(layer, "forward", doubled)
    del layer.forward
    log.undo()
    assert "forward" not in vars(layer)


def test_the_forward_that_accelerate_set_aside_is_repaired(layer):
    log = UndoLog()
    log.override(layer, "forward", doubled)
    layer._old_forward = layer.forward  # accelerate.hooks.add_hook_to_module
    layer.forward = lambda x: layer._old_forward(x)
    log.undo()
    assert torch.equal(layer(X), plain(layer))
    layer.forward = layer._old_forward  # accelerate.hooks.remove_hook_from_module
    assert layer.forward == Layer.forward.__get__(layer) and not hasattr(layer.forward, "hires_lab")


def test_hooks_are_removed_and_others_stay(layer):
    theirs = layer.register_forward_hook(lambda module, args, output: output + 1)
    before, log = snapshots.of_tree(layer), UndoLog()
    log.hook(layer.register_forward_hook(lambda module, args, output: 2 * output))
    log.hook(layer.register_forward_pre_hook(lambda module, args: (args[0] * 3,)))
    assert len(log) == 2
    log.undo()
    assert snapshots.differences(before, snapshots.of_tree(layer)) == []
    assert torch.equal(layer(X), plain(layer) + 1)
    theirs.remove()


def test_an_attribute_is_put_back_or_deleted(layer):
    layer.there, log = 1, UndoLog()
    assert log.set(layer, "there", 2) == 1
    assert log.set(layer, "new", 3) is None
    log.undo()
    assert layer.there == 1 and "new" not in vars(layer)


def test_changes_of_one_attribute_are_taken_back_last_first(layer):
    log = UndoLog()
    for value in (1, 2, 3):
        log.set(layer, "attribute", value)
    log.undo()
    assert "attribute" not in vars(layer)


def test_undo_may_be_called_again_and_takes_nothing_of_others(layer):
    log = UndoLog()
    log.set(layer, "attribute", 1)
    log.undo()
    layer.attribute = 1
    log.undo()
    assert layer.attribute == 1 and len(log) == 0


def test_one_change_that_cannot_be_taken_back_does_not_keep_the_others(layer):
    class Broken:
        def remove(self):
            raise RuntimeError("the hook is gone")

    before, log = snapshots.of_tree(layer), UndoLog()
    log.override(layer, "forward", doubled)
    log.hook(Broken())
    log.set(layer, "attribute", 1)
    with pytest.raises(RuntimeError, match="the hook is gone"):
        log.undo()
    assert snapshots.differences(before, snapshots.of_tree(layer)) == []
