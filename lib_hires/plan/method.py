"""What a method is: settings with a title, and a plan for a model and a size.

A method that changes the UNet is one file: a `Method` subclass with its settings and `plan`. Discovery finds it
(lib_hires/methods.py); every face (accordion, API, infotext, command line, tables) follows from its schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from ..config.common import Common
from ..config.settings import Setting, Settings, schema
from ..schedule import Gate
from .models import Model
from .route import Edit, Shrink, Size
from .tiling import Stage


@dataclass(frozen=True)
class Windows:
    """Window attention (MSW-MSA) in the transformers of one level while the gate is open; `shifted` moves the windows."""

    gate: Gate
    level: int
    shifted: bool = True


@dataclass(frozen=True)
class UNetPlan:
    """What is to be done to a UNet for latents of one size. `notes`: what was left out and why, one sentence each."""

    edits: tuple[Edit, ...] = ()
    windows: Windows | None = None
    notes: tuple[str, ...] = ()

    @property
    def does_nothing(self) -> bool:
        """Whether the UNet stays as it is at every noise level."""
        return not any(edit.gate.ever_open for edit in self.edits) and not (
            self.windows and self.windows.gate.ever_open
        )

    @property
    def drifts(self) -> bool:
        """Whether sizes inside the UNet change from step to step, not at a gate alone."""
        return any(isinstance(edit, Shrink) and edit.smooth for edit in self.edits)

    def __add__(self, other: UNetPlan) -> UNetPlan:
        return UNetPlan(self.edits + other.edits, self.windows or other.windows, self.notes + other.notes)


@dataclass(frozen=True)
class Wanted:
    """A pass that is about to be drawn: latents of `size` (height, width) in so many `steps`.

    `stages`: the sampler can be run in stages.
    """

    size: Size
    steps: int
    stages: bool = True


@dataclass(frozen=True)
class Choice:
    """The name of the method to draw with, "none" for plain sampling, and why in a few words."""

    method: str
    reason: str


@dataclass(frozen=True)
class Method(Settings):
    """Base of every method's settings.

    Class attributes: `name` as the API and the command line write it, `title` as the papers do, `summary` and
    `use_when` for tables, `source` the paper; `group`: a name for the settings that a base class shares out; `automatic`:
    whether it draws nothing itself and makes a `choice`.
    """

    group: ClassVar[str] = ""
    automatic: ClassVar[bool] = False
    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    use_when: ClassVar[str] = ""
    source: ClassVar[str] = ""

    def choice(self, model: Model, wanted: Wanted) -> Choice | None:
        """Which other method draws this pass in its place; None: it draws by itself."""
        return None

    def plan(self, model: Model, size: Size, common: Common) -> UNetPlan:
        """The changes for latents of `size` (height, width). Raises `HiresError` where settings and model do not fit."""
        return UNetPlan()

    def stages(self, model: Model, size: Size, common: Common, started: bool = False) -> tuple[Stage, ...]:
        """The sampling runs that lead to latents of `size`. started: the host begins with latents of its own (img2img).

        Raises `HiresError` where settings and size do not fit.
        """
        return (Stage(size),)

    def left_out(self, model: Model, stages: Sequence[Stage], started: bool = False) -> tuple[str, ...]:
        """What is asked for and these stages (from `stages`) do without, one sentence each."""
        return ()


@cache
def owned_rows(cls: type[Method]) -> tuple[tuple[str, Setting], ...]:
    """(owner, setting) in the order of the schema.

    The owner is the class that declares the setting: by its own `group` what it shares out, otherwise by its `name`.
    """
    return tuple((_owner(_declaring(cls, row.name)), row) for row in schema(cls))


@cache
def owners(cls: type[Method]) -> tuple[str, ...]:
    """The owners of a method's settings: the method itself, if it has some of its own, and its groups, nearest first."""
    having = {owner for owner, _ in owned_rows(cls)}
    found = (_owner(base) for base in cls.__mro__ if issubclass(base, Method))
    return tuple(dict.fromkeys(owner for owner in found if owner in having))


def _owner(cls: type[Method]) -> str:
    own = vars(cls)  # a group is not inherited: it is the name of what this class declares
    return own.get("group") or own.get("name", "")


def _declaring(cls: type[Method], name: str) -> type[Method]:
    """The nearest class that declares a field: those that inherit it have the same object."""
    fields = ((base, vars(base).get("__dataclass_fields__", {}).get(name)) for base in cls.__mro__)
    nearest = cls.__dataclass_fields__[name]
    return [base for base, field in fields if field is nearest][-1]
