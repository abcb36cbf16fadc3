"""The undo log: every change of a module goes through it, and is taken back exactly, last first.

A change is an instance attribute (usually `forward`) or a hook. Undoing restores only what is still ours: where another
extension has put its own override on top, ours stays below it; it is inert from then on, and calls what it found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_MISSING = object()
_is_compiling = getattr(getattr(torch, "compiler", None), "is_compiling", lambda: False)  # not in torch 2.0


class UndoLog:
    """Changes of modules, in the order made. `undo()` may be called any number of times."""

    def __init__(self) -> None:
        self._undos: list[Callable[[], None]] = []
        self.active = True

    def __len__(self) -> int:
        return len(self._undos)

    def set(self, owner: object, name: str, value: Any) -> Any:
        """Set an instance attribute; returns what was there before, or None."""
        before = vars(owner).get(name, _MISSING)
        object.__setattr__(owner, name, value)
        self._undos.append(lambda: _put_back(owner, name, value, before))
        return None if before is _MISSING else before

    def override(self, module: nn.Module, name: str, make: Callable[[Callable], Callable]) -> None:
        """Override a method on the instance by `make(previous)`.

        `previous` is an earlier instance override, else the class's method, looked up at each call so that a host's
        later choice of attention function is honoured. Once undone, an override that another one still holds calls it.
        """
        earlier, found = vars(module).get(name), getattr(type(module), name, None)

        def of_class(*args: Any, **kwargs: Any) -> Any:
            method = found if _is_compiling() else getattr(type(module), name)  # Dynamo follows no classes
            return method(module, *args, **kwargs)

        previous = of_class if earlier is None else earlier
        ours = make(previous)

        def override(*args: Any, **kwargs: Any) -> Any:
            return ours(*args, **kwargs) if self.active else previous(*args, **kwargs)

        self.set(module, name, override)

    def hook(self, handle: Any) -> None:
        """Remember a hook's handle for removal."""
        self._undos.append(handle.remove)

    def undo(self) -> None:
        """Take everything back, last first; a failure on one does not keep the others."""
        self.active = False
        failure = None
        while self._undos:
            try:
                self._undos.pop()()
            except Exception as error:  # one broken foreign object must not leave the rest patched
                failure = failure or error
        if failure is not None:
            raise failure


def _put_back(owner: object, name: str, ours: Any, before: Any) -> None:
    slots = vars(owner)
    if slots.get(name, _MISSING) is ours:
        if before is _MISSING:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, before)
    elif name == "forward" and slots.get("_old_forward") is ours:
        # accelerate's hooks keep the forward they found in `_old_forward`; what they found was ours.
        found = getattr(type(owner), name).__get__(owner) if before is _MISSING else before
        object.__setattr__(owner, "_old_forward", found)
