"""The way of the feature map through the UNet in one call: every size, and what makes it.

A stock UNet halves (rounding up) at each down-sampler and doubles on the way back. Three edits change the way down:

    Dilate   a down-sampler strides 4 instead of 2          (HiDiffusion, RAU-Net)
    Pool     a pair's output is average-pooled, 2x2         (HiDiffusion, RAU-Net)
    Shrink   the input of an encoder step is resized        (Deep Shrink)

The way back follows from the skips: each decoder step has to end at the size of the next skip. So an up-sampler is told
that size; where no up-sampler closes a difference, the step's output is resized. Nothing relies on divisibility.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

from ..schedule import Gate, Level
from .structure import DOWN, Structure

Size = tuple[int, int]


@dataclass(frozen=True)
class Resize:
    """To this (height, width), by this interpolation mode."""

    size: Size
    mode: str


@dataclass(frozen=True)
class Dilate:
    """The down-sampler at encoder step `step` strides 4, dilated by 2: ceil(H/4)."""

    gate: Gate
    step: int


@dataclass(frozen=True)
class Pool:
    """The output of encoder step `step` is average-pooled 2x2, rounding up, before it becomes a skip."""

    gate: Gate
    step: int


@dataclass(frozen=True)
class Shrink:
    """The input of encoder step `step` is resized to `down` of its size; the decoder step that takes its skip enlarges.

    `up` None enlarges to exactly the unshrunk size; a number enlarges by it. `smooth` lets `down` drift to 1 over the
    gate. `early` enlarges at the decoder step of the same number instead of the mirrored one.
    """

    gate: Gate
    step: int
    down: float
    up: float | None = None
    mode: str = "bicubic"
    smooth: bool = False
    early: bool = False

    def factor(self, level: Level) -> float:
        """The shrinking factor at a level: (1 - down) q + down, q the share of the gate that is done."""
        return self.down + (1 - self.down) * self.gate.share(level) if self.smooth else self.down


Edit = Dilate | Pool | Shrink


@dataclass(frozen=True)
class EncoderWay:
    """What happens at an encoder step: resized on entering, stride 4, pooled; `out` is its skip's size."""

    out: Size
    enter: Resize | None = None
    dilated: bool = False
    pooled: bool = False


@dataclass(frozen=True)
class DecoderWay:
    """What happens at a decoder step: the concatenation resized, the up-sampler's target, the output resized."""

    out: Size
    enter: Resize | None = None
    upsample: Size | None = None
    leave: Resize | None = None


@dataclass(frozen=True)
class Route:
    """All sizes of one UNet call on a latent of `size`."""

    size: Size
    encoder: tuple[EncoderWay, ...]
    decoder: tuple[DecoderWay, ...]
    words: str = field(default="plain", compare=False)

    @property
    def middle(self) -> Size:
        """The size at the middle block."""
        return self.encoder[-1].out


def find_route(structure: Structure, size: Size, edits: tuple[Edit, ...], level: Level) -> Route | None:
    """The route at a noise level; None where no edit's gate is open, which means: leave the UNet alone."""
    states = tuple(
        (edit, edit.factor(level) if isinstance(edit, Shrink) else 0.0) for edit in edits if edit.gate.is_open(level)
    )
    return _route(structure, size, states) if states else None


def half(length: int) -> int:
    """Output length of a 3x3 stride-2 convolution, padding 1."""
    return -(-length // 2)


def _strided(size: Size, twice: bool) -> Size:
    return tuple(half(half(length)) if twice else half(length) for length in size)


@lru_cache(maxsize=256)
def _route(structure: Structure, size: Size, states: tuple[tuple[Edit, float], ...]) -> Route:
    dilated = {edit.step for edit, _ in states if isinstance(edit, Dilate)}
    pooled = {edit.step for edit, _ in states if isinstance(edit, Pool)}
    shrinks = {edit.step: (edit, factor) for edit, factor in states if isinstance(edit, Shrink)}
    encoder, enlarge, words = [], {}, []
    current = whole = size
    for index, step in enumerate(structure.encoder):
        enter = None
        if index in shrinks:
            edit, factor = shrinks[index]
            shrunk = tuple(max(1, math.floor(length * factor)) for length in current)
            whole, enter = current, None if shrunk == current else Resize(shrunk, edit.mode)
            current = shrunk
        if step.kind == DOWN:
            current, whole = (_strided(way, twice=index in dilated) for way in (current, whole))
        if index in shrinks:
            at = index if edit.early else len(structure.encoder) - 1 - index
            enlarge[at] = (edit, factor, whole)
            words.append(f"shrink {factor:.2f} at {index}")
        if index in dilated:
            words.append(f"stride 4 at {index}")
        if index in pooled:
            current = tuple(half(n) for n in current)
            words.append(f"pool at {index}")
        encoder.append(EncoderWay(current, enter, index in dilated, index in pooled))
    decoder = _way_back(structure, size, encoder, enlarge)
    return Route(size, tuple(encoder), decoder, ", ".join(words))


def _way_back(structure: Structure, size: Size, encoder: list[EncoderWay], enlarge: dict) -> tuple[DecoderWay, ...]:
    """Each decoder step: from its skip's size, enlarged where an edit says so, to the size of the next skip."""
    result = []
    for index, step in enumerate(structure.decoder):
        skip = structure.skip_of(index)
        current, enter, mode = encoder[skip].out, None, "bicubic" if encoder[skip].pooled else "nearest"
        target = encoder[skip - 1].out if skip else size
        if index in enlarge:
            edit, factor, whole = enlarge[index]
            enlarged = _enlarged(current, edit, factor, None if edit.early else whole)
            enter = None if enlarged == current else Resize(enlarged, edit.mode)
            current = enlarged
        leave = None if step.upsamples or current == target else Resize(target, mode)
        result.append(DecoderWay(target, enter, target if step.upsamples else None, leave))
    return tuple(result)


def _enlarged(current: Size, edit: Shrink, factor: float, whole: Size | None) -> Size:
    """Exactly the unshrunk size, or `up` times the present one, where `up` follows the smooth factor: up' = up down/down'."""
    if edit.up is None and whole is not None:
        return whole
    ratio = (1 / edit.down if edit.up is None else edit.up) * edit.down / factor
    return tuple(max(1, math.floor(length * ratio)) for length in current)


def sizes_in_words(route: Route) -> str:
    """The way down in words: `64x64 -s4-> 16x16 -> 8x8 -> 4x4`."""
    current, text = route.size, f"{route.size[1]}x{route.size[0]}"
    for way in route.encoder:
        arrow = "-s4->" if way.dilated else "-pool->" if way.pooled else "-shrink->" if way.enter else "->"
        if way.out != current or way.enter:
            text += f" {arrow} {way.out[1]}x{way.out[0]}"
        current = way.out
    return text
