"""Where each word is in the picture, and which words a view keeps.

    mask(word)    opening(mean of its columns' maps > its own mean)             grid of the attention maps
    kept(view)    words whose mask covers at least the part c of the view

Latent y of a canvas H high lies in row floor(y * grid height / H) of the grid. How many latents of a view lie in each cell
is a product of counts along the axes, so that no mask is ever enlarged to the canvas.
Source: AccDiffusion (arXiv 2407.10738), patch-content-aware prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from .words import Word

CELLS_A_STEP = 16
"""One 3x3 erosion and dilation for so many cells of the grid's shorter side."""


def word_masks(maps: torch.Tensor, words: Sequence[Word]) -> torch.Tensor:
    """Where each word is: bool (words, height, width).

    maps: (height, width, tokens), a mean attention map for each column. A word is where the mean of its columns is
    strictly above its own mean over the picture, without parts that are too thin: on a map without highs and lows, nowhere.
    A word none of whose columns is in the maps is everywhere: nothing is known of it.
    """
    height, width, tokens = maps.shape
    masks = torch.ones(len(words), height, width, dtype=torch.bool, device=maps.device)
    for index, word in enumerate(words):
        columns = [column for column in word.columns if 0 <= column < tokens]
        if columns:
            found = maps[..., columns].double().mean(-1)
            found = found - found.min()  # so that the mean of a constant map is exactly its value
            masks[index] = found > found.mean()
    return opened(masks, min(height, width) // CELLS_A_STEP)


def opened(masks: torch.Tensor, iterations: int) -> torch.Tensor:
    """Erosion, then dilation of bool (words, height, width), each 3x3 and so many times; beyond the border nothing counts.

    n times 3x3 is once 2n+1 wide, as both take the minimum or maximum over a square.
    """
    if iterations < 1 or not masks.numel():
        return masks
    side, values = 2 * iterations + 1, masks.float()
    eroded = -F.max_pool2d(-values, side, stride=1, padding=iterations)
    return F.max_pool2d(eroded, side, stride=1, padding=iterations) > 0


def kept_words(
    masks: torch.Tensor,
    views: Sequence[tuple[int, int, int, int]],
    canvas: tuple[int, int],
    c: float,
    wrap: tuple[bool, bool] = (False, False),
    outside: bool = False,
) -> list[list[int]]:
    """For each view the indices of the words that it keeps: those whose mask covers at least the part `c` of it.

    masks: bool (words, height, width) of the whole canvas. views: (top, left, height, width) in latents. canvas: its
    (height, width) in latents. What of a view lies outside the canvas does not count, unless that axis wraps around;
    outside: it counts as not covered, as published. c = 0 keeps every word, above 1 none.
    """
    kept = covered(masks, views, canvas, wrap, outside) >= c
    return [row.nonzero().flatten().tolist() for row in kept]


def covered(
    masks: torch.Tensor,
    views: Sequence[tuple[int, int, int, int]],
    canvas: tuple[int, int],
    wrap: tuple[bool, bool] = (False, False),
    outside: bool = False,
) -> torch.Tensor:
    """The part of each view that each mask covers: (views, words), fp64 on the CPU, exact up to one division.

    Arguments as in `kept_words`. Of a view that lies outside the canvas nothing is covered.
    """
    masks = masks.cpu().double()
    corners = torch.tensor([list(map(int, view)) for view in views], dtype=torch.long).reshape(len(views), 4)
    rows, columns = (
        _latents_in_cells(corners[:, axis], corners[:, axis + 2], masks.shape[axis + 1], canvas[axis], wrap[axis])
        for axis in (0, 1)
    )
    latents = torch.einsum("vi,wij,vj->vw", rows, masks, columns)
    area = corners[:, 2] * corners[:, 3] if outside else rows.sum(1) * columns.sum(1)
    return latents / area.clamp(min=1)[:, None]


def _latents_in_cells(start: torch.Tensor, length: torch.Tensor, cells: int, total: int, wrap: bool) -> torch.Tensor:
    """How many latents of each view lie in each cell of an axis: fp64 (views, cells).

    Cell i holds the latents y with floor(y * cells / total) = i, that is from ceil(i * total / cells) on.
    """
    edges = torch.tensor([-(-index * total // cells) for index in range(cells + 1)])
    counts = torch.zeros(len(start), cells, dtype=torch.float64)
    for turn in (-total, 0, total) if wrap else (0,):
        first = torch.maximum(start[:, None] + turn, edges[None, :-1])
        end = torch.minimum((start + length)[:, None] + turn, edges[None, 1:])
        counts += (end - first).clamp(min=0)
    return counts
