"""From a picture's infotext back into the controls: one function for each control, generated from the schema.

A picture without `HL Method` switches Hires Lab off and leaves the rest. With it, the common settings and those of its
method, shared or its own, take the picture's values (what is not written is what it was before it could be, as `Request.from_infotext`
reads it); the settings of other methods stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..methods import find_method
from ..request import METHOD_KEY
from .arguments import ENABLED, METHOD, Control, controls, owners_of


def paste_functions() -> list[Callable[[Mapping[str, Any]], Any]]:
    """For each control, in order, a function: infotext keys -> value, or None to leave the control as it is."""
    return [_reader(control) for control in controls()]


def infotext_names() -> list[str]:
    """The infotext keys, without repetition, for a host's `paste_field_names`."""
    return [METHOD_KEY, *(c.setting.infotext for c in controls() if c.owner)]


def _reader(control: Control) -> Callable[[Mapping[str, Any]], Any]:
    def read(keys: Mapping[str, Any]) -> Any:
        method = find_method(keys[METHOD_KEY]) if METHOD_KEY in keys else None
        if control.key == ENABLED:
            return method is not None
        if method is None:
            return None
        if control.key == METHOD:
            return method.title
        if control.owner not in owners_of(method):
            return None
        return control.setting.check(keys.get(control.setting.infotext, control.setting.unwritten))

    return read
