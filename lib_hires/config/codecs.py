"""A settings object in its three written forms: infotext, command line, and the rows of a documentation table.

Infotext is flat: one `HL <label>` key for each setting, values as `format_value` writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .errors import HiresError
from .settings import AUTO, Setting, Settings, schema


def format_value(value: Any) -> str:
    """A value as it is written into infotext and shown in tables: `True`, `0.4`, `bicubic`."""
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def format_default(row: Setting) -> str:
    """A setting's default as tables show it: `auto` where the plan chooses."""
    return "auto" if row.auto and row.default == AUTO else format_value(row.default)


def to_infotext(settings: Settings) -> dict[str, str]:
    """Every setting under its `HL` key. Defaults are written too, so that a later change of them changes no old picture."""
    return {row.infotext: format_value(getattr(settings, row.name)) for row in schema(type(settings))}


def from_infotext(cls: type[Settings], keys: Mapping[str, str]) -> Settings:
    """The settings that `keys` names; one that is absent is what it was before it came. Raises `SettingError`."""
    return cls.from_dict({row.name: keys.get(row.infotext, row.unwritten) for row in schema(cls)})


def from_argv(pairs: Iterable[str]) -> dict[str, str]:
    """`["t1=0.5", "raunet=off"]` as a dict of texts. Raises `HiresError` for a piece without `=`."""
    result = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise HiresError(f"'--set {pair}' has no 'name=value' form. Write for example --set strength=1.2.")
        result[name.strip()] = value.strip()
    return result


def to_argv(settings: Settings) -> list[str]:
    """The `name=value` pieces that `from_argv` reads back, for the settings that differ from their defaults."""
    return [
        f"{row.name}={format_value(getattr(settings, row.name))}"
        for row in schema(type(settings))
        if getattr(settings, row.name) != row.default
    ]


def table(cls: type[Settings]) -> str:
    """The schema as a Markdown table, for the documentation."""
    lines = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for row in schema(cls):
        lines.append(f"| `{row.name}` | {format_default(row)} | {row.allowed} | {row.help} |")
    return "\n".join(lines)
