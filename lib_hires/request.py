"""A request: a method's settings and the common ones, in one object with every written form.

dict       {"method": "hidiffusion", "passes": "both passes", "t1": 0.5}      API, jobs files
infotext   {"HL Method": "HiDiffusion", "HL T1": "0.5", ...}                   in the picture
argv       --method hidiffusion --set t1=0.5                                   command line
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .config.codecs import from_argv, from_infotext, to_argv, to_infotext
from .config.common import Common
from .config.errors import UnknownSetting
from .config.settings import schema
from .methods import NONE, find_method
from .plan.method import Method, Wanted
from .plan.models import Model

METHOD_KEY, CHOSEN_KEY = "HL Method", "HL Chosen"


@dataclass(frozen=True)
class Request:
    """What is asked for; `method` None is plain sampling.

    `asked`, `reason`: where an automatic method was resolved, that method, and why it chose this one. Written forms are of
    what was asked.
    """

    method: Method | None = None
    common: Common = field(default_factory=Common)
    asked: Method | None = None
    reason: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """Names and values in one flat dict. Raises `SettingError` (a value) or `UnknownSetting` (a name)."""
        values = dict(values)
        method = find_method(values.pop("method", NONE))
        common_names = [row.name for row in schema(Common)]
        method_names = [row.name for row in schema(method)] if method else []
        for name, value in values.items():
            if name not in common_names and name not in method_names:
                names = ["method", *common_names, *method_names]
                owner = method.title if method else "method 'none'"
                raise UnknownSetting(name, value, owner, names, difflib.get_close_matches(name, names, 1))
        common = Common.from_dict({k: v for k, v in values.items() if k in common_names})
        own = {k: v for k, v in values.items() if k in method_names}
        return cls(method.from_dict(own) if method else None, common)

    @classmethod
    def from_argv(cls, method: str, pairs: Iterable[str]) -> Request:
        """The command line's `--method` and `--set` pieces."""
        return cls.from_dict({"method": method, **from_argv(pairs)})

    @classmethod
    def from_infotext(cls, keys: Mapping[str, str]) -> Request:
        """The request that made a picture, from its `HL` keys; plain sampling where there are none."""
        method = find_method(keys.get(METHOD_KEY, NONE))
        return cls(from_infotext(method, keys) if method else None, from_infotext(Common, keys))

    def resolved(self, model: Model, wanted: Wanted) -> Request:
        """This request, an automatic method replaced by the one that it chooses for a pass."""
        choice = self.method.choice(model, wanted) if self.method else None
        if choice is None:
            return self
        chosen = find_method(choice.method)
        return Request(chosen() if chosen else None, self.common, self.method, choice.reason)

    @property
    def is_automatic(self) -> bool:
        """Whether a method is still to be chosen."""
        return self.method is not None and self.method.automatic

    @property
    def written(self) -> Method | None:
        """The method that was asked for."""
        return self.asked or self.method

    @property
    def chosen(self) -> str:
        """The title of the method that an automatic one chose; empty where none did."""
        return (self.method.title if self.method else NONE) if self.asked else ""

    @property
    def note(self) -> str:
        """What was chosen and why; empty where nothing was."""
        if not self.asked:
            return ""
        return f"{self.asked.title} chose {self.chosen if self.method else 'plain sampling'}: {self.reason}."

    def to_dict(self) -> dict[str, Any]:
        """The flat dict that `from_dict` reads."""
        own = self.written.to_dict() if self.written else {}
        return {"method": self.written.name if self.written else NONE, **self.common.to_dict(), **own}

    def to_infotext(self) -> dict[str, str]:
        """`HL` keys; none for plain sampling."""
        if self.written is None:
            return {}
        keys = {METHOD_KEY: self.written.title, **to_infotext(self.common), **to_infotext(self.written)}
        return keys | ({CHOSEN_KEY: self.chosen} if self.chosen else {})

    def to_argv(self) -> list[str]:
        """`name=value` pieces of what differs from the defaults."""
        return to_argv(self.common) + (to_argv(self.written) if self.written else [])
