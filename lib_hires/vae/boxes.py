"""Rectangles of a map, and a map kept in pieces.

A `Box` is a rectangle of pixels; a grid cuts a map into boxes without overlap; `Pieces` holds a map as one tensor a
box, on whatever device it was given, and reads any rectangle back, whichever boxes it crosses.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Key = tuple[int, int]


class Box(NamedTuple):
    """Rows [top, bottom) and columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def rows(self) -> int:
        """The height."""
        return self.bottom - self.top

    @property
    def columns(self) -> int:
        """The width."""
        return self.right - self.left

    def around(self, other: Box) -> Box:
        """The smallest box that holds both."""
        return Box(
            min(self.top, other.top),
            max(self.bottom, other.bottom),
            min(self.left, other.left),
            max(self.right, other.right),
        )

    def within(self, other: Box) -> tuple[slice, slice]:
        """The slices that cut this box out of a tensor holding `other`, where it lies in."""
        return (
            slice(self.top - other.top, self.bottom - other.top),
            slice(self.left - other.left, self.right - other.left),
        )


def cuts(length: int, parts: int, of: int) -> list[int]:
    """Bounds of `parts` almost equal parts of a length, made at `of` pixels and scaled to `length`.

    A map twice as large is cut at the same places, so that a tile finds its pixels in one piece.
    """
    return [(index * of // parts) * length // of for index in range(parts + 1)]


class Grid:
    """A map cut at `rows` and `columns` (bounds, with both ends)."""

    def __init__(self, rows: list[int], columns: list[int]):
        self.rows, self.columns = rows, columns

    def boxes(self) -> Iterator[tuple[Key, Box]]:
        """Every box that holds a pixel, row by row."""
        for i, (top, bottom) in enumerate(zip(self.rows, self.rows[1:])):
            for j, (left, right) in enumerate(zip(self.columns, self.columns[1:])):
                if top < bottom and left < right:
                    yield (i, j), Box(top, bottom, left, right)

    def crossed_by(self, box: Box) -> Iterator[tuple[Key, Box, Box]]:
        """(key, its box, what of `box` lies in it) of every box of the grid that `box` crosses."""
        for i, top, bottom in _crossed(self.rows, box.top, box.bottom):
            for j, left, right in _crossed(self.columns, box.left, box.right):
                whole = Box(top, bottom, left, right)
                part = max(top, box.top), min(bottom, box.bottom), max(left, box.left), min(right, box.right)
                yield (i, j), whole, Box(*part)


def _crossed(bounds: list[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(index, its bounds) of every part with a pixel in [start, stop)."""
    for index in range(bisect_right(bounds, start) - 1, len(bounds) - 1):
        if bounds[index] >= stop:
            break
        if bounds[index] < bounds[index + 1]:
            yield index, bounds[index], bounds[index + 1]


class Pieces(dict[Key, Tensor]):
    """A map (B, C, H, W) as one tensor (B, C, rows, columns) a box of a grid; pieces may be taken out when done with."""

    def __init__(self, grid: Grid, *args):
        super().__init__(*args)
        self.grid = grid

    @classmethod
    def of(cls, whole: Tensor) -> Pieces:
        """A map that is there in one piece; not copied."""
        return cls(Grid([0, whole.shape[-2]], [0, whole.shape[-1]]), {(0, 0): whole})

    def read(self, box: Box, device: torch.device) -> Tensor:
        """The box (B, C, rows, columns) on `device`: a view where it lies in one piece there, else a copy."""
        crossed = [(self[key], (..., *part.within(whole)), part) for key, whole, part in self.grid.crossed_by(box)]
        if len(crossed) == 1:
            piece, cut, _part = crossed[0]
            return piece[cut].to(device)
        first = crossed[0][0]
        out = torch.empty((*first.shape[:2], box.rows, box.columns), dtype=first.dtype, device=device)
        for piece, cut, part in crossed:
            out[(..., *part.within(box))].copy_(piece[cut])
        return out
