"""All methods, found by looking: each `Method` subclass in the packages that hold some. Nobody lists them by hand."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache

from .config.errors import SettingError
from .plan.method import Method

PACKAGES = ("plan", "unet", "canvas")
NONE = "none"


@cache
def methods() -> dict[str, type[Method]]:
    """Name -> class: what chooses by itself first, the others in alphabetical order of their titles."""
    found = []
    for package in PACKAGES:
        parent = importlib.import_module(f"{__package__}.{package}")
        for info in pkgutil.iter_modules(parent.__path__):
            module = importlib.import_module(f"{parent.__name__}.{info.name}")
            found += [
                value
                for value in vars(module).values()
                if isinstance(value, type)
                and issubclass(value, Method)
                and value.__module__ == module.__name__
                and value.name
            ]
    return {cls.name: cls for cls in sorted(found, key=lambda cls: (not cls.automatic, cls.title))}


def find_method(name: str) -> type[Method] | None:
    """The method of a name or title, in any case and with spaces, `-` or `_`; None for 'none'. Raises `SettingError`."""
    key = _plain(name) if isinstance(name, str) else ""
    if key == NONE:
        return None
    known = {_plain(text): cls for cls in methods().values() for text in (cls.name, cls.title)}
    if key in known:
        return known[key]
    names = [NONE, *methods()]
    close = difflib.get_close_matches(key, [_plain(n) for n in names], 1)
    advice = f"Did you mean '{names[[_plain(n) for n in names].index(close[0])]}'?" if close else ""
    raise SettingError("method", name, "one of " + ", ".join(repr(n) for n in names), advice)


def _plain(name: str) -> str:
    return name.strip().casefold().replace(" ", "").replace("-", "").replace("_", "")
