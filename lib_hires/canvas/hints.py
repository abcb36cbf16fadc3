"""A picture beside the canvas, such as a ControlNet's hint or an inpainting mask, cut like the canvas' latents."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor

from ..plan.route import Size
from ..plan.tiling import CanvasPlan
from .canvas import DILATED, LOCAL, Tile, turned
from .views import Cutter, View, grid_of


class Hint:
    """A picture (B or 1, C, f H, f W) for a canvas (H, W), made ready once for all its tiles.

    f is whole (8 for ControlNet's hints, 1 for what is concatenated to the latent). A dilated grid gets the picture sampled
    like its latents, in blocks of f x f pixels.
    """

    def __init__(self, picture: Tensor, canvas: Size, plan: CanvasPlan):
        self.plan, self.factor = plan, picture.shape[-1] // canvas[1]
        self._blocks = rearrange(picture, "n c (h f) (w g) -> n (c f g) h w", f=self.factor, g=self.factor)
        self._cutter = Cutter(plan.local, canvas, [0]) if plan.local else None
        self._padded = self._cutter.padded(self._blocks) if self._cutter else None

    def crop(self, tile: Tile, images: Iterable[int]) -> Tensor:
        """What belongs to a tile, one row for each image row: (len(images), C, f h, f w)."""
        images = tuple(images)
        found = {image: self._row(tile, image) for image in dict.fromkeys(images)}
        rows = torch.cat([found[image] for image in images])
        return rearrange(rows, "n (c f g) h w -> n c (h f) (w g)", f=self.factor, g=self.factor)

    def _row(self, tile: Tile, image: int) -> Tensor:
        own = slice(image % len(self._blocks), image % len(self._blocks) + 1)
        row = (self._padded if tile.kind == LOCAL else self._blocks)[own]
        row = turned(row, [tile.turns[image]]) if tile.turns else row  # along circles only, which are never padded
        if tile.kind == LOCAL:
            return self._cutter.cut(row, View(tile.index, tile.size, (tile.places[image],)))
        if tile.kind == DILATED:
            return grid_of(row, self.plan.dilated.dilation, tile.index, self.plan.published)
        return row
