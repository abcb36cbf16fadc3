"""Views on a canvas: what they cut out, and how their predictions are put together again.

    canvas = sum_v w_v o place_v(view_v) / sum_v w_v o place_v(1)       (MultiDiffusion, eq. 5; Mixture of Diffusers, eq. 7)

Each row of a batch has its own places, since its image draws its own jitter. Sums are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ..plan.route import Size
from ..plan.tiling import GAUSSIAN, ZEROS, Local
from ..randomness import Stream

Place = tuple[int, int]
"""(top, left) of a view in latents; below 0 or beyond the canvas where it reaches into zeros or around the edge."""


@dataclass(frozen=True)
class View:
    """One view: its number, its size, and for each image of the batch where it lies."""

    index: int
    size: Size
    places: tuple[Place, ...]

    @property
    def place(self) -> Place | None:
        """Where it lies if that is the same for all images."""
        return self.places[0] if len(set(self.places)) == 1 else None


def views_of(local: Local, size: Size, seeds: Sequence[int], draws: Stream, *when: object) -> list[View]:
    """The views on a canvas of `size`, moved by each image's draws for the place `when` (stage, noise level)."""
    window, plain = local.view_size(size), local.views(size)
    moved = [_moved(local, size, window, plain, seed, draws, *when) for seed in seeds]
    return [View(index, window, tuple(places[index] for places in moved)) for index in range(len(plain))]


def _moved(
    local: Local, size: Size, window: Size, plain: Sequence[Place], seed: int, draws: Stream, *when: object
) -> list[Place]:
    if not local.jitter:
        return list(plain)
    places = []
    for index, place in enumerate(plain):
        down, across = (
            _draw(draws, *_reach(local, axis, place, size, window), seed, *when, index, name) * local.jitter_unit
            for axis, name in ((0, "down"), (1, "across"))
        )
        places.append((place[0] + down, place[1] + across))
    return places


def _reach(local: Local, axis: int, place: Place, size: Size, window: Size) -> tuple[int, int]:
    """How far a view may move along one axis, in units: both ways inside, outwards at an edge, not where it covers all."""
    reach, last = local.jitter // local.jitter_unit, size[axis] - window[axis]
    if last == 0:
        return 0, 0
    if local.wrap[axis]:
        return -reach, reach
    return 0 if place[axis] == last else -reach, 0 if place[axis] == 0 else reach


def _draw(draws: Stream, low: int, high: int, seed: int, *place: object) -> int:
    recorded = draws.recorded(seed, *place)
    return low + draws.bits(seed, *place) % (high - low + 1) if recorded is None else int(recorded)


class Cutter:
    """Cuts views out of a canvas (N, C, H, W) and puts predictions together; `images`: the image of each row."""

    def __init__(self, local: Local, size: Size, images: Sequence[int]):
        self.local, self.size, self.images = local, size, tuple(images)
        self.pads = tuple(0 if local.wrap[axis] else local.jitter for axis in (0, 1))

    def padded(self, canvas: Tensor) -> Tensor:
        """The canvas as views read it: continued where edge views may reach out, mirrored or as published by zeros."""
        down, across = self.pads
        if not (down or across):
            return canvas
        pad = (across, across, down, down)
        if self.local.edge == ZEROS:
            return F.pad(canvas, pad)
        small = min(canvas.shape[-2] - 1 - down, canvas.shape[-1] - 1 - across) < 0
        return F.pad(canvas, pad, mode="replicate" if small else "reflect")

    def cut(self, padded: Tensor, view: View) -> Tensor:
        """(N, C, h, w): the view of every row of `padded(canvas)`."""
        if view.place is not None:
            return self._cut(padded, view.place, view.size)
        return torch.stack([self._cut(row, view.places[image], view.size) for row, image in zip(padded, self.images)])

    def _cut(self, canvas: Tensor, place: Place, size: Size) -> Tensor:
        for axis in (0, 1):
            canvas = self._along(canvas, axis, place[axis] + self.pads[axis], size[axis])
        return canvas

    def _along(self, canvas: Tensor, axis: int, start: int, length: int) -> Tensor:
        dim = axis - 2
        extent = canvas.shape[dim]
        if start >= 0 and start + length <= extent:
            return canvas.narrow(dim, start, length)
        return canvas.index_select(dim, torch.arange(start, start + length, device=canvas.device) % extent)

    def sums(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Empty (weighted predictions (N, C, H, W), weights (N, 1, H, W)) to `add` to."""
        rows, channels = like.shape[:2]
        extent = [length + 2 * pad for length, pad in zip(self.size, self.pads)]
        empty = torch.zeros(rows, channels + 1, *extent, device=like.device, dtype=torch.float32)
        return empty[:, :channels], empty[:, channels:]

    def add(self, sums: tuple[Tensor, Tensor], view: View, prediction: Tensor) -> None:
        """Add a view's prediction (N, C, h, w), weighted."""
        weight = view_weights(self.local, view.size, str(prediction.device))
        weighted = prediction.float() * weight
        if view.place is not None:
            self._add(sums[0], view.place, view.size, weighted)
            self._add(sums[1], view.place, view.size, weight)
            return
        for row, image in enumerate(self.images):
            self._add(sums[0][row], view.places[image], view.size, weighted[row])
            self._add(sums[1][row], view.places[image], view.size, weight)

    def _add(self, total: Tensor, place: Place, size: Size, value: Tensor) -> None:
        """total[view] += value, around the edge where the axes are circles."""
        top, left = (start + pad for start, pad in zip(place, self.pads))
        height, width = total.shape[-2:]
        if 0 <= top <= height - size[0] and 0 <= left <= width - size[1]:
            total[..., top : top + size[0], left : left + size[1]] += value
            return
        rows = torch.arange(top, top + size[0], device=total.device) % height
        columns = torch.arange(left, left + size[1], device=total.device) % width
        total[..., rows[:, None], columns[None, :]] += value

    def mean(self, sums: tuple[Tensor, Tensor]) -> Tensor:
        """(N, C, H, W) fp32: the weighted mean, without what lies outside of the canvas."""
        result = sums[0] / sums[1].clamp_min(torch.finfo(torch.float32).tiny)
        (down, across), (height, width) = self.pads, self.size
        return result[..., down : down + height, across : across + width]


@lru_cache(maxsize=32)
def view_weights(local: Local, size: Size, device: str = "cpu") -> Tensor:
    """(1, h, w) fp32 weights of a view's latents: ones, or a separable Gaussian centred on the view, or `below` its middle.

    gx(i) = exp(-(i - (w-1)/2)^2 / (2 (spread w)^2)), its peak 1, not below `floor` (in half precision the published
    weights vanish at a corner). Source: Mixture of Diffusers, arXiv 2302.02412, section 3.
    """
    if local.weights != GAUSSIAN:
        return torch.ones(1, *size, device=device)
    down, across = (_bell(length, local.spread, below) for length, below in zip(size, (local.below, 0.0)))
    return (down[:, None] * across[None, :]).clamp_min(local.floor).float()[None].to(device)


def _bell(length: int, spread: float, beyond: float) -> Tensor:
    offsets = torch.arange(length, dtype=torch.float64) - (length - 1) / 2 - beyond
    bell = torch.exp(-(offsets**2) / (2 * (spread * length) ** 2))
    return bell / bell.max()


# Dilated grids -------------------------------------------------------------------------------------------------------


def filled_up(canvas: Tensor, dilation: int, published: bool = False) -> Tensor:
    """A canvas with sides that s divides: enlarged at the top and at the left, by its edge (published: by zeros)."""
    down, across = (-length % dilation for length in canvas.shape[-2:])
    if not (down or across):
        return canvas
    return F.pad(canvas, (across, 0, down, 0), mode="constant" if published else "replicate")


def split_grids(canvas: Tensor, dilation: int, published: bool = False) -> Tensor:
    """(N, C, H, W) to (s*s, N, C, h, w): grid (p, r) of the canvas filled up has every s-th latent from (p, r) on."""
    canvas = filled_up(canvas, dilation, published)
    return rearrange(canvas, "n c (h p) (w r) -> (p r) n c h w", p=dilation, r=dilation)


def grid_of(canvas: Tensor, dilation: int, index: int, published: bool = False) -> Tensor:
    """(N, C, h, w): one of `split_grids`."""
    down, across = divmod(index, dilation)
    return filled_up(canvas, dilation, published)[..., down::dilation, across::dilation]


def join_grids(grids: Tensor, dilation: int, size: Size) -> Tensor:
    """(s*s, N, C, h, w) back to (N, C, H, W), what was added cut off."""
    canvas = rearrange(grids, "(p r) n c h w -> n c (h p) (w r)", p=dilation, r=dilation)
    return canvas[..., canvas.shape[-2] - size[0] :, canvas.shape[-1] - size[1] :]


def gaussian(canvas: Tensor, dilation: int, sigma: float, published: bool = False) -> Tensor:
    """Gaussian filter of 2s-1 latents, brought back to the mean and std of each image (DemoFusion, section 3.4).

    canvas: (N, C, H, W) fp32. The edge is continued (published: zeros, which darkens it). One latent wide for s = 1.
    """
    if dilation == 1 or sigma <= 0:
        return canvas
    offsets = torch.arange(1 - dilation, dilation, device=canvas.device, dtype=torch.float32)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    reach, channels = dilation - 1, canvas.shape[1]
    padded = F.pad(canvas, (reach,) * 4) if published else F.pad(canvas, (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, kernel.expand(channels, 1, 1, -1), groups=channels)
    filtered = F.conv2d(across, kernel[:, None].expand(channels, 1, -1, 1), groups=channels)
    return match(filtered, *statistics(canvas, per_channel=False), per_channel=False)


def statistics(latents: Tensor, per_channel: bool = True) -> tuple[Tensor, Tensor]:
    """(mean, std) of each image, fp32, (N, C, 1, 1) for each channel or (N, 1, 1, 1) over all."""
    over = (-2, -1) if per_channel else (-3, -2, -1)
    values = latents.float()
    return values.mean(over, keepdim=True), values.std(over, keepdim=True)


def match(latents: Tensor, mean: Tensor, std: Tensor, per_channel: bool = True) -> Tensor:
    """`latents` with this mean and std; a constant one gets the mean only."""
    own_mean, own_std = statistics(latents, per_channel)
    scale = torch.where(own_std > 1e-6, std / own_std.clamp_min(1e-6), torch.ones_like(own_std))
    return ((latents.float() - own_mean) * scale + mean).to(latents.dtype)
