"""The canvas: one prediction on a large latent, made of the UNet's predictions on views of native size.

    local    overlapping views, weighted mean                       MultiDiffusion, Mixture of Diffusers
    dilated  s x s interleaved grids from the filtered canvas       DemoFusion, section 3.4
    result   (1 - c2) local + c2 dilated                            c2 falls with the noise

All of it happens in the space of the network's output (eps or v), where a dilated grid's output, made from filtered
latents, is used as it is for the unfiltered ones: the correction D(gs) + c_skip (xs - gs) that a denoised value would
need is then nothing at all. Averages of eps, of v and of denoised values are the same (affine at equal x and sigma).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan.models import LATENT_FACTOR
from ..plan.route import Size
from ..plan.tiling import BY_CHANNEL, NO_SHUFFLE, ZEROS, CanvasPlan
from ..randomness import Records, Stream
from ..schedule import Moment
from . import draws
from .batches import Batches
from .views import Cutter, Place, View, filled_up, gaussian, join_grids, split_grids, views_of

LOCAL, DILATED, WHOLE = "local", "dilated", "whole"


@dataclass(frozen=True)
class Tile:
    """One network input: its kind, its number, its size in latents, and for each image of the batch where it lies.

    `places`: (top, left) in latents on the canvas; None for what covers the whole canvas (a dilated grid).
    `turns`: (down, right) latents by which the canvas was turned before this tile was cut from it; None where it was not.
    """

    kind: str
    index: int
    size: Size
    places: tuple[Place, ...] | None = None
    turns: tuple[Place, ...] | None = None


Evaluate = Callable[[Tensor, Sequence[Tile]], Tensor]
"""(k N, C, h, w) inputs, k tiles of one size stacked tile after tile, and the tiles -> the network's outputs alike."""


class Canvas:
    """Predictions for one stage. `size`: (height, width) in latents; `seeds`: of each image; `stage`: its number, for draws."""

    def __init__(
        self,
        plan: CanvasPlan,
        size: Size,
        seeds: Sequence[int],
        stage: int = 1,
        records: Records | None = None,
        batches: Batches | None = None,
    ):
        records = records or {}
        self.plan, self.size, self.seeds, self.stage = plan, size, tuple(seeds), stage
        self.batches = batches or Batches(plan.tile_batch)
        self._turns = Stream("canvas turn", records.get("canvas turn"))
        self._jitter = Stream("view jitter", records.get("view jitter"))
        self._fixed = Stream("window prompts", records.get("window prompts"))
        self._shuffles = Stream("window interaction", records.get("window interaction"))

    @property
    def covers_at_once(self) -> bool:
        """Whether one view is the whole canvas and nothing else is asked for: plain sampling, bit for bit.

        Not where its edges meet: the view then lies elsewhere at each noise level.
        """
        local, dilated = self.plan.local, self.plan.dilated
        if dilated is not None and dilated.dilation > 1:
            return False
        if local is not None and any(local.circles(self.size)):
            return False
        return local is None or (len(local.views(self.size)) == 1 and local.view_size(self.size) == self.size)

    def views(self, moment: Moment | None = None) -> list[View]:
        """The local views at a moment; for views that keep their places for a stage the moment is not needed."""
        local = self.plan.local
        if local is None:
            return []
        if local.jitter_once or moment is None:
            return views_of(local, self.size, self.seeds, self._fixed, self.stage)
        return views_of(local, self.size, self.seeds, self._jitter, self.stage, moment.key)

    def predict(
        self,
        x: Tensor,
        moment: Moment,
        images: Sequence[int],
        evaluate: Evaluate,
        guide: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The canvas' prediction, (N, C, H, W) like x.

        x: (N, C, H, W) network inputs; images: the image that each row belongs to; evaluate: the network;
        guide: changes the local rows before they meet the dilated ones (another guidance scale).
        """
        if self.covers_at_once:
            return evaluate(x, [Tile(WHOLE, 0, self.size, ((0, 0),) * len(self.seeds))])
        local, dilated = self.plan.local, self.plan.dilated
        share = moment.cosine**self.plan.cosines.dilated if dilated else 0.0
        result = None
        if local is not None:
            result = self._local(x, moment, images, evaluate)
            result = guide(result) if guide else result
        if dilated is not None:
            whole = self._dilated(x, moment, images, evaluate)
            result = whole if result is None else (1 - share) * result + share * whole
        return result.to(x.dtype)

    def _local(self, x: Tensor, moment: Moment, images: Sequence[int], evaluate: Evaluate) -> Tensor:
        """The weighted mean of all views.

        Along a circle that one view covers the canvas is turned by another draw at each noise level before the view is cut
        and turned back after, so that the view's ends have no fixed place.
        """
        turns = self._turned(moment, self.plan.local.circles(self.size))
        x = x if turns is None else turned(x, [turns[image] for image in images])
        cutter = Cutter(self.plan.local, self.size, images)
        padded, sums = cutter.padded(x), cutter.sums(x)
        views = self.views(moment)
        pieces = ((Tile(LOCAL, view.index, view.size, view.places, turns), cutter.cut(padded, view)) for view in views)
        for (_, prediction), view in zip(self.batches.run(pieces, evaluate), views):
            cutter.add(sums, view, prediction)
        return self._back(cutter.mean(sums), turns, images)

    def _dilated(self, x: Tensor, moment: Moment, images: Sequence[int], evaluate: Evaluate) -> Tensor:
        """Every grid reads filtered latents; with window interaction grids exchange latents before and back after.

        Grids end where the canvas does. Where its edges meet, it is turned by another draw at each step before grids are cut
        and turned back after, so that their ends have no fixed place.
        """
        plan, published = self.plan.dilated, self.plan.published
        turns = self._turned(moment, self.plan.local.wrap if self.plan.local else (False, False))
        x = x if turns is None else turned(x, [turns[image] for image in images])
        sigma = plan.filter_sigma * (0.99 * moment.cosine**self.plan.cosines.filter + 0.01)
        grids = self._filtered_grids(x, plan.dilation, sigma, published)
        exchange = self._exchange(grids, moment, images)
        inputs = grids if exchange is None else grids.gather(0, exchange)
        size = tuple(grids.shape[-2:])
        pieces = ((Tile(DILATED, index, size, None, turns), inputs[index].to(x.dtype)) for index in range(len(inputs)))
        outputs = torch.stack([output.float() for _, output in self.batches.run(pieces, evaluate)])
        if exchange is not None:
            outputs = torch.empty_like(outputs).scatter_(0, exchange, outputs)
        return self._back(join_grids(outputs, plan.dilation, self.size), turns, images)

    def _turned(self, moment: Moment, axes: tuple[bool, bool]) -> tuple[Place, ...] | None:
        """How far each image's canvas is turned along `axes` (down, across) at a moment; None where along none."""
        if not any(axes):
            return None
        return tuple(
            tuple(
                self._turns.integer(length, seed, self.stage, moment.key, axis) if on else 0
                for length, on, axis in zip(self.size, axes, ("down", "across"))
            )
            for seed in self.seeds
        )

    def _back(self, x: Tensor, turns: Sequence[Place] | None, images: Sequence[int]) -> Tensor:
        return x if turns is None else turned(x, [(-turns[image][0], -turns[image][1]) for image in images])

    def _filtered_grids(self, x: Tensor, dilation: int, sigma: float, published: bool) -> Tensor:
        """(s*s, N, C, h, w) fp32. As published the zeros that fill up the canvas are filtered along with it."""
        canvas = filled_up(x.float(), dilation, published) if published else x.float()
        return split_grids(gaussian(canvas, dilation, sigma, published), dilation, published)

    def _exchange(self, grids: Tensor, moment: Moment, images: Sequence[int]) -> Tensor | None:
        """(s*s, N, C, h, w): the grid that each grid reads each latent from; None without window interaction."""
        plan = self.plan.dilated
        count, _, channels, *size = grids.shape
        if plan.shuffle == NO_SHUFFLE or count == 1:
            return None
        depth = channels if plan.shuffle == BY_CHANNEL else 1
        group = plan.group or count
        rows = {image: self._bijections(image, count, group, (depth, *size), moment) for image in dict.fromkeys(images)}
        index = torch.stack([rows[image] for image in images], dim=1).to(grids.device)
        return index.expand(grids.shape)

    def _bijections(self, image: int, count: int, group: int, shape: Sequence[int], moment: Moment) -> Tensor:
        parts = []
        for first in range(0, count, group):
            size = min(group, count - first)
            place = (self.seeds[image], self.stage, moment.key, first // group)
            parts.append(first + draws.bijections(self._shuffles, size, shape, *place))
        return torch.cat(parts)


def turned(x: Tensor, turns: Sequence[Place]) -> Tensor:
    """(N, C, H, W) with each row's origin moved (down, right), around the edges."""
    return torch.stack([row.roll((-down, -right), (-2, -1)) for row, (down, right) in zip(x, turns)])


def crop_numbers(plan: CanvasPlan, tile: Tile, images: Iterable[int]) -> list[list[int]]:
    """[top, left] in pixels that SDXL is told for each image of a tile with places: never negative.

    As published views are told to lie too far down and right, by the width of their zero border.
    """
    published = plan.published and plan.local is not None and plan.local.edge == ZEROS
    more = plan.local.jitter if published else 0
    places = [tile.places[image] for image in images]
    return [[LATENT_FACTOR * (start + more if more else max(0, start)) for start in place] for place in places]
