"""One table, many faces: a setting is a dataclass field with its metadata, declared once.

The accordion, the infotext keys, the API's names, the command line's flags and the documentation tables are all
derived from `schema(cls)`. Values are checked when the dataclass is made, so a `Settings` object is always valid.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from .errors import SettingError, UnknownSetting

AUTO = -1.0
"""The value of an `auto=True` number that leaves the choice to the plan."""


@dataclass(frozen=True)
class Setting:
    """What is known of one setting; `kind` is bool, int, float or str.

    since: the number of a setting that came later, larger than of all that were there before it: positional lists have
    such settings last, in this order, so that those before keep their places.
    before: what was done before the setting came, where that is not its default: pictures that do not tell it were drawn so.
    """

    name: str
    kind: type
    default: Any
    label: str
    help: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    auto: bool = False
    simple: bool = False
    since: int = 0
    before: Any = None

    @property
    def unwritten(self) -> Any:
        """The value in a picture that does not tell it."""
        return self.default if self.before is None else self.before

    @property
    def infotext(self) -> str:
        """The key under which the value is written into a picture: `HL ` and the label."""
        return f"HL {self.label}"

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        if self.kind is bool:
            return "true or false"
        if self.choices:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        whole = "a whole number " if self.kind is int else ""
        between = f"{whole}between {_short(self.low)} and {_short(self.high)}"
        return f"{between}, or {_short(AUTO)} for automatic" if self.auto else between

    def check(self, value: Any) -> Any:
        """`value` as this setting's type; texts are read as the infotext and the command line write them.

        Raises `SettingError` where it is not allowed.
        """
        read = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_str}[self.kind]
        result = read(value)
        if result is None:
            raise SettingError(self.name, value, self.allowed)
        if self.choices:
            return self._choice(result)
        if self.kind in (int, float) and not (self.auto and result == AUTO) and not self.low <= result <= self.high:
            raise SettingError(self.name, value, self.allowed, "Raise it." if result < self.low else "Lower it.")
        return result

    def _choice(self, text: str) -> str:
        for choice in self.choices:
            if choice.casefold() == text.casefold():
                return choice
        close = difflib.get_close_matches(text, self.choices, 1)
        raise SettingError(self.name, text, self.allowed, f"Did you mean {close[0]!r}?" if close else "")


def setting(default: Any, label: str, help: str, **limits: Any) -> Any:
    """A dataclass field that is a setting. `limits` are the other fields of `Setting`: low, high, step, choices, ..."""
    return dataclasses.field(default=default, metadata={"setting": {"label": label, "help": help, **limits}})


@cache
def schema(cls: type) -> tuple[Setting, ...]:
    """The settings of a dataclass, in the order of their declaration."""
    rows = []
    for field in dataclasses.fields(cls):
        if "setting" in field.metadata:
            rows.append(Setting(field.name, type(field.default), field.default, **field.metadata["setting"]))
    return tuple(rows)


@dataclass(frozen=True)
class Settings:
    """Base of every settings dataclass: checks its values when made."""

    title: ClassVar[str] = "settings"

    def __post_init__(self) -> None:
        for row in schema(type(self)):
            object.__setattr__(self, row.name, row.check(getattr(self, row.name)))
        self.validate()

    def validate(self) -> None:
        """Checks that concern several settings at once; raises `SettingError` or `Conflict`."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from names and values; what is not named keeps its default. Raises `UnknownSetting`."""
        names = [row.name for row in schema(cls)]
        for name, value in values.items():
            if name not in names:
                raise UnknownSetting(name, value, cls.title, names, difflib.get_close_matches(name, names, 1))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Names and values, in the order of the schema."""
        return {row.name: getattr(self, row.name) for row in schema(type(self))}


def _short(number: float | None) -> str:
    return "any" if number is None else f"{number:g}"


def _read_bool(value: Any) -> bool | None:
    if isinstance(value, str):
        return {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }.get(value.strip().casefold())
    return bool(value) if isinstance(value, (bool, int)) and value in (0, 1) else None


def _read_int(value: Any) -> int | None:
    number = _read_float(value)
    return int(number) if number is not None and number == int(number) else None


def _read_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    if isinstance(value, str) and value.strip().casefold() == "auto":
        return AUTO
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _read_str(value: Any) -> str | None:
    return value.strip() if isinstance(value, str) else None
