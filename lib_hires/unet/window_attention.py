"""MSW-MSA, modified shifted window multi-head self-attention: attention inside 2x2 windows that move from step to step.

    roll the map by -(k h_w/4, k w_w/4), cut it into 2x2 windows, attend in each, put it together, roll back;  k in 0..3

Rolling and cutting together are one permutation of the tokens, so that each way is one gather. A map of odd size is cut
into windows of unequal size (one group of equal windows a call): nothing is resized and no mask is needed.
Source: HiDiffusion (arXiv 2311.17528), section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..patches import UndoLog
from .layout import Layout

GRID = 2
SHIFTS = 4


def window_bounds(length: int, grid: int = GRID) -> list[tuple[int, int]]:
    """Cuts of an axis into at most `grid` windows, the first ones ceil(length/grid) long: [(0, 33), (33, 65)]."""
    size = -(-length // grid)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def window_groups(height: int, width: int, shift: int, grid: int = GRID) -> list[torch.Tensor]:
    """The windows of a map as token indices, grouped by size: a list of (windows, tokens a window) index tensors.

    Token (y, x) has index y * width + x. `shift` k moves the cuts by k quarters of a window, around the borders.
    Windows come row by row; every token is in exactly one of them.
    """
    rows, columns = window_bounds(height, grid), window_bounds(width, grid)
    step_y, step_x = shift * (rows[0][1] // SHIFTS), shift * (columns[0][1] // SHIFTS)
    index = torch.arange(height * width).view(height, width).roll((-step_y, -step_x), (0, 1))
    groups: dict[tuple[int, int], list[torch.Tensor]] = {}
    for top, bottom in rows:
        for left, right in columns:
            window = index[top:bottom, left:right].reshape(-1)
            groups.setdefault((bottom - top, right - left), []).append(window)
    return [torch.stack(windows) for windows in groups.values()]


@dataclass(frozen=True, eq=False)
class Partition:
    """One gather each way for a batch: `gathers` per group, over tokens of all rows; `inverse` over their outputs."""

    gathers: tuple[torch.Tensor, ...]
    windows: tuple[int, ...]
    inverse: torch.Tensor

    def again(self) -> Partition:
        """The same indices in tensor objects of their own: a graph may rely on two of its inputs being one."""
        return Partition(
            tuple(each.view_as(each) for each in self.gathers), self.windows, self.inverse.view_as(self.inverse)
        )

    def split(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """tokens: (B, N, C) -> per group (B * windows, N / windows, C), batch outermost."""
        flat = tokens.reshape(-1, tokens.shape[-1])
        rows = tokens.shape[0]
        return [
            flat.index_select(0, gather).view(rows * count, -1, flat.shape[-1])
            for gather, count in zip(self.gathers, self.windows)
        ]

    def join(self, groups: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
        """The inverse of `split`, for groups of any width."""
        width = groups[0].shape[-1]
        flat = groups[0].reshape(-1, width) if len(groups) == 1 else torch.cat([g.reshape(-1, width) for g in groups])
        return flat.index_select(0, self.inverse).view(rows, -1, width)


@dataclass(frozen=True, eq=False)
class Cut:
    """One map cut at one shift, on a device. All are (N,) int32 but the last.

    `order`: the tokens, group after group; `place`: where in `order` each token is; `base`, `size`: start and length of
    the group that each token is in; `groups`: (start, length, windows) of each group.
    """

    order: torch.Tensor
    place: torch.Tensor
    base: torch.Tensor
    size: torch.Tensor
    groups: tuple[tuple[int, int, int], ...]


def cut(height: int, width: int, shift: int, device: torch.device, grid: int = GRID) -> Cut:
    """A map cut into windows."""
    windows = window_groups(height, width, shift, grid)
    order = torch.cat([group.reshape(-1) for group in windows])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    groups, start = [], 0
    base, size = torch.empty_like(order), torch.empty_like(order)
    for group in windows:
        tokens = group.reshape(-1)
        base[tokens], size[tokens] = start, len(tokens)
        groups.append((start, len(tokens), len(group)))
        start += len(tokens)
    order, place, base, size = (index.int().to(device) for index in (order, place, base, size))
    return Cut(order, place, base, size, tuple(groups))


def partition(height: int, width: int, shifts: tuple[int, ...], device: torch.device, grid: int = GRID) -> Partition:
    """The partition of a batch of maps, row b shifted by `shifts[b]`."""
    return _partition({shift: cut(height, width, shift, device, grid) for shift in set(shifts)}, shifts)


def _partition(cuts: dict[int, Cut], shifts: tuple[int, ...]) -> Partition:
    """From the cuts of its rows; on the device, so that a new combination of shifts costs no transfer.

    In `join` group g of row r lies behind all rows of the groups before it: base_g B + size_g r + (place - base_g).
    """
    order, place, base, size = (
        torch.stack([getattr(cuts[shift], name) for shift in shifts]) for name in ("order", "place", "base", "size")
    )
    row = torch.arange(len(shifts), device=order.device, dtype=order.dtype)[:, None]
    tokens = order + row * order.shape[1]
    groups = cuts[shifts[0]].groups
    return Partition(
        tuple(tokens[:, start : start + length].reshape(-1) for start, length, _ in groups),
        tuple(windows for _, _, windows in groups),
        (base * (len(shifts) - 1) + size * row + place).reshape(-1),
    )


class Partitions:
    """Which partition each layer's tokens are cut by; lives as long as the windows are installed, and its indices with it.

    `shifts(layer, rows)` gives k for each row, `pass_by(why)` is told why a layer is left as it is.
    `asked`: layer -> what it was cut by, or why not, of every layer that asked since it was emptied. `prepared`: layer ->
    partition; while it is not None nothing else is looked for (in a compiled graph, which sees tensors alone).
    """

    def __init__(self, shifts: Callable[[int, int], tuple[int, ...]], pass_by: Callable[[str], None]):
        self._shifts, self._pass_by = shifts, pass_by
        self._cut = lru_cache(maxsize=2 * SHIFTS)(cut)
        self._find = lru_cache(maxsize=16)(self._make)
        self.asked: dict[int, Asked] = {}
        self.prepared: dict[int, Partition] | None = None

    def of(self, layer: int, size: tuple[int, int], x: torch.Tensor, args: tuple, kwargs: dict) -> Partition | None:
        """For a call of a layer's attention with tokens x: (B, N, C) of a map of `size`; None where it stays as it is."""
        told = _told(size, x, args, kwargs)
        if self.prepared is not None:
            parts = self.prepared.get(layer)
            if (parts is None) == isinstance(told, tuple):
                raise AskedOtherwise
            return parts
        if told is not None:
            self.asked[layer] = told
        return self._at(layer, told)

    def prepare(self, asked: Mapping[int, Asked]) -> dict[int, Partition]:
        """For the coming call, whose layers are cut as in a call before: what was `asked` then, shifted as is due now."""
        found = ((layer, self._at(layer, told)) for layer, told in asked.items())
        return {layer: parts.again() for layer, parts in found if parts is not None}

    def _at(self, layer: int, told: Asked | None) -> Partition | None:
        if isinstance(told, str):
            self._pass_by(told)
        if not isinstance(told, tuple):
            return None
        height, width, rows, device = told
        return self._find(height, width, self._shifts(layer, rows), device)

    def _make(self, height: int, width: int, shifts: tuple[int, ...], device: torch.device) -> Partition:
        return _partition({shift: self._cut(height, width, shift, device) for shift in set(shifts)}, shifts)


Asked = tuple[int, int, int, torch.device] | str
"""(height, width, rows, device) of the tokens that a layer cut, or why it was left as it is."""


class AskedOtherwise(Exception):
    """A layer attends now where nothing was prepared for it, or the other way round."""


def _told(size: tuple[int, int], x: torch.Tensor, args: tuple, kwargs: dict) -> Asked | None:
    """What tokens x: (B, N, C) are cut by; None for a map too small to cut."""
    if min(size) < GRID:
        return None
    if x.shape[1] != size[0] * size[1]:
        return "its tokens are merged or tiled by something else"
    if _reads_more(x, args, kwargs):
        return "its self-attention reads a second picture or a mask"
    return (*size, x.shape[0], x.device)


def attend_in_windows(
    attend: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, parts: Partition
) -> torch.Tensor:
    """`attend` inside each window. tokens: (B, h*w, C) of maps that `parts` cuts."""
    return parts.join([attend(group) for group in parts.split(tokens)], tokens.shape[0])


def install_windows(layout: Layout, level: int, partitions: Partitions, log: UndoLog) -> None:
    """Window attention in every self-attention of the transformers at `level`.

    Where tokens do not match the map (they were merged or tiled), or the attention reads more than the picture itself (a
    context, a mask), it is left as it is, and `partitions` says so.
    """
    layer = 0
    for transformer in layout.transformers(level):
        seen = _SeenSize()
        log.hook(transformer.register_forward_pre_hook(seen.note, with_kwargs=True))
        for block in transformer.transformer_blocks:
            log.override(block.attn1, "forward", _windowed(seen, layer, partitions))
            layer += 1


class _SeenSize:
    """The (height, width) that a spatial transformer was last called with."""

    size: tuple[int, int] = (0, 0)

    def note(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        self.size = tuple(x.shape[-2:])


def _windowed(seen: _SeenSize, layer: int, partitions: Partitions) -> Callable:
    def make(previous: Callable) -> Callable:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            def attend(group: torch.Tensor) -> torch.Tensor:
                own = [group if value is x else value for value in args]
                return previous(group, *own, **{k: group if v is x else v for k, v in kwargs.items()})

            parts = partitions.of(layer, seen.size, x, args, kwargs)
            return previous(x, *args, **kwargs) if parts is None else attend_in_windows(attend, x, parts)

        return forward

    return make


def _reads_more(x: torch.Tensor, args: tuple, kwargs: dict) -> bool:
    """Whether a context other than the tokens themselves, a mask, or extra tokens are given."""
    given = [*args, *kwargs.values()]
    return any(isinstance(value, torch.Tensor) and value is not x for value in given)
