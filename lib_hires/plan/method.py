"""What a method is: settings with a title, and a plan for a model and a size.

A method that changes the UNet is one file: a `Method` subclass with its settings and `plan`. Discovery finds it
(lib_hires/methods.py); every face (accordion, API, infotext, command line, tables) follows from its schema.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config.common import Common
from ..config.settings import Settings
from ..schedule import Gate
from .models import Model
from .route import Edit, Size
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

    def __add__(self, other: UNetPlan) -> UNetPlan:
        return UNetPlan(self.edits + other.edits, self.windows or other.windows, self.notes + other.notes)


@dataclass(frozen=True)
class Method(Settings):
    """Base of every method's settings.

    Class attributes: `name` as the API and the command line write it, `title` as the papers do, `summary` and
    `use_when` for tables, `source` the paper; `group`: a name for the settings that a base class shares out.
    """

    group: ClassVar[str] = ""
    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    use_when: ClassVar[str] = ""
    source: ClassVar[str] = ""

    def plan(self, model: Model, size: Size, common: Common) -> UNetPlan:
        """The changes for latents of `size` (height, width). Raises `HiresError` where settings and model do not fit."""
        return UNetPlan()

    def stages(self, model: Model, size: Size, common: Common, started: bool = False) -> tuple[Stage, ...]:
        """The sampling runs that lead to latents of `size`. started: the host begins with latents of its own (img2img).

        Raises `HiresError` where settings and size do not fit.
        """
        return (Stage(size),)
