"""The controls in their order, and what a WebUI or its API passes for them, as a request. No gradio, no host.

positional   [enabled, method, each common setting, each setting of the first method, of the second, ...]
named        [{"method": "hidiffusion", "strength": 1.2}]          what follows the dict is ignored
override     {"method": "deep_shrink", "deep_shrink.stop2": 0.4}   an XYZ cell's values, by the controls' keys
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..config.codecs import format_default
from ..config.common import Common
from ..config.errors import SettingError
from ..config.settings import Setting, schema
from ..hosts.protocol import Asked
from ..methods import NONE, find_method, methods
from ..request import Request

ENABLED, METHOD, COMMON = "enabled", "method", "common"


@dataclass(frozen=True)
class Control:
    """One control. `owner`: whose setting it is (`common`, a method's name, empty for the two above them)."""

    key: str
    owner: str
    setting: Setting

    @property
    def elem_id(self) -> str:
        """The end of the HTML id: `hidiffusion_t1`. What stands before it (tab and script) is the host's."""
        return self.key.replace(".", "_")


@cache
def controls() -> tuple[Control, ...]:
    """All controls in the order of the positional arguments."""
    titles = tuple(cls.title for cls in methods().values())
    first = next(iter(methods().values())).title
    usual = "HiDiffusion" if "HiDiffusion" in titles else first
    top = (
        Control(ENABLED, "", Setting(ENABLED, bool, False, "Enable Hires Lab", "Draw by the method below.")),
        Control(
            METHOD,
            "",
            Setting(
                METHOD,
                str,
                usual,
                "Method",
                "How the picture is kept coherent above the size that the model was trained at.",
                choices=titles,
            ),
        ),
    )
    owners = ((COMMON, Common), *methods().items())
    return top + tuple(Control(f"{owner}.{row.name}", owner, row) for owner, cls in owners for row in schema(cls))


def settings_of(owner: str) -> tuple[Control, ...]:
    """The controls of one owner, in order."""
    return tuple(control for control in controls() if control.owner == owner)


def describe_arguments() -> str:
    """The positional arguments as a Markdown table, for the API's documentation."""
    lines = ["| position | setting | of | default | allowed |", "|---|---|---|---|---|"]
    for position, control in enumerate(controls()):
        row = control.setting
        owner = methods()[control.owner].title if control.owner in methods() else control.owner or "the script"
        lines.append(f"| {position} | `{row.name}` | {owner} | {format_default(row)} | {row.allowed} |")
    return "\n".join(lines)


def read_arguments(args: Sequence[Any], override: Mapping[str, Any] | None = None) -> Asked:
    """What `args` and an XYZ cell's `override` ask for. Raises `SettingError` for a wrong value or name.

    Arguments that are missing at the end keep their defaults. Any override switches Hires Lab on. While it is off,
    values are not looked at.
    """
    override = dict(override or {})
    read = _read_named if args and isinstance(args[0], Mapping) else _read_positional
    enabled, method_name, values = read(args, override.pop(METHOD, None), on=bool(override))
    method = find_method(method_name) if enabled else None
    if method is None:
        return Asked()
    notes = []
    for key, value in override.items():
        owner, _, name = key.partition(".")
        if owner in (COMMON, method.name):
            values[name] = value
        else:
            notes.append(f"'{name}' of {methods()[owner].title} has no effect: the method is {method.title}.")
    return Asked(Request.from_dict({**values, METHOD: method.name}), tuple(notes))


def _read_named(args: Sequence[Any], method: str | None, on: bool) -> tuple[bool, str, dict[str, Any]]:
    values = dict(args[0])
    enabled = _as_bool(values.pop(ENABLED, True)) or on or method is not None
    named = values.pop(METHOD, None)
    if enabled and named is None and method is None:
        allowed = "one of " + ", ".join(repr(name) for name in (NONE, *methods()))
        raise SettingError(METHOD, None, allowed, 'Name it: {"method": "hidiffusion"}.')
    return enabled, named if method is None else method, values


def _read_positional(args: Sequence[Any], method: str | None, on: bool) -> tuple[bool, str, dict[str, Any]]:
    given = {control.key: value for control, value in zip(controls(), args)}
    enabled = _as_bool(given.get(ENABLED, False)) or on or method is not None
    method = given.get(METHOD, controls()[1].setting.default) if method is None else method
    if not enabled:
        return False, NONE, {}
    found = find_method(method)
    owners = (COMMON, found.name) if found else (COMMON,)
    values = {c.setting.name: given[c.key] for c in controls() if c.owner in owners and c.key in given}
    return True, method, values


def _as_bool(value: Any) -> bool:
    return controls()[0].setting.check(value)
