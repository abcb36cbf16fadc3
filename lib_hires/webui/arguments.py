"""The controls in their order, and what a WebUI or its API passes for them, as a request. No gradio, no host.

positional   [enabled, method, each common setting, those of each method, those that methods share, group by group, and at the
             end what came later (`Setting.since`)]
named        [{"method": "hidiffusion", "strength": 1.2}]          what follows the dict is ignored
override     {"method": "deep_shrink", "deep_shrink.stop2": 0.4}   an XYZ cell's values, by the controls' keys

A setting that methods share has one control, of its group: `views.overlap`.
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
from ..plan.method import Method, owned_rows, owners
from ..request import Request

ENABLED, METHOD, COMMON = "enabled", "method", "common"


@dataclass(frozen=True)
class Control:
    """One control. `owner`: whose setting it is (`common`, a method's name, a group's, empty for the two above them)."""

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
    top = (
        Control(ENABLED, "", Setting(ENABLED, bool, False, "Enable Hires Lab", "Draw by the method below.")),
        Control(
            METHOD,
            "",
            Setting(
                METHOD,
                str,
                titles[0],
                "Method",
                "How the picture is kept coherent above the size that the model was trained at.",
                choices=titles,
            ),
        ),
    )
    rows = {(COMMON, row.name): row for row in schema(Common)}
    for owner in all_owners():
        rows |= {
            (owner, row.name): row for cls in methods().values() for whose, row in owned_rows(cls) if whose == owner
        }
    found = [Control(f"{owner}.{name}", owner, row) for (owner, name), row in rows.items()]
    return top + tuple(sorted(found, key=lambda control: control.setting.since))


@cache
def all_owners() -> tuple[str, ...]:
    """Whose settings there are beside the common ones: the methods that have some of their own, then the groups."""
    found = dict.fromkeys(owner for cls in methods().values() for owner in owners(cls))
    return tuple(sorted(found, key=lambda owner: owner not in methods()))


def owners_of(method: type[Method] | None) -> tuple[str, ...]:
    """The owners of all that counts for a method, the common settings among them."""
    return (COMMON, *owners(method)) if method else (COMMON,)


def owner_title(owner: str) -> str:
    """A method's title, or a group's name as a heading."""
    return methods()[owner].title if owner in methods() else owner.capitalize()


def settings_of(owner: str) -> tuple[Control, ...]:
    """The controls of one owner, in order."""
    return tuple(control for control in controls() if control.owner == owner)


def describe_arguments() -> str:
    """The positional arguments as a Markdown table, for the API's documentation."""
    lines = ["| position | setting | of | default | allowed |", "|---|---|---|---|---|"]
    for position, control in enumerate(controls()):
        row = control.setting
        owner = owner_title(control.owner) or "The script"
        lines.append(f"| {position} | `{row.name}` | {owner} | {format_default(row)} | {row.allowed} |")
    return "\n".join(lines)


def read_arguments(args: Sequence[Any], override: Mapping[str, Any] | None = None) -> Asked:
    """What `args` and an XYZ cell's `override` ask for. Raises `SettingError` for a wrong value or name.

    Arguments that are missing at the end keep their defaults. Any override switches Hires Lab on, and a setting of one method
    takes the place of an automatic one. While it is off, values are not looked at.
    """
    override = dict(override or {})
    read = _read_named if args and isinstance(args[0], Mapping) else _read_positional
    chosen = override.pop(METHOD, None)
    enabled, method_name, values = read(args, chosen, on=bool(override))
    method = find_method(method_name) if enabled else None
    if method is None:
        return Asked()
    meant = {key.partition(".")[0] for key in override} & methods().keys() - {method.name}
    if method.automatic and chosen is None and len(meant) == 1:
        replaced = {row.name for row in schema(method)}
        method = methods()[meant.pop()]
        _, _, values = read(args, method.name, on=True)
        values = {name: value for name, value in values.items() if name not in replaced}
    notes = []
    for key, value in override.items():
        owner, _, name = key.partition(".")
        if owner in owners_of(method):
            values[name] = value
        else:
            notes.append(f"'{name}' of {owner_title(owner)} has no effect: the method is {method.title}.")
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
    wanted = owners_of(find_method(method))
    values = {c.setting.name: given[c.key] for c in controls() if c.owner in wanted and c.key in given}
    return True, method, values


def _as_bool(value: Any) -> bool:
    return controls()[0].setting.check(value)
