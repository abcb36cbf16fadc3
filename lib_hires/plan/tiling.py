"""Where views lie on a canvas, as plain numbers; what a canvas does to latents of one size.

A view is a window of the model's native size on a larger latent. Along one axis of length L, views of length w start every
`stride` latents; the last one is moved back so that it ends at L (the published code of MultiDiffusion leaves what is
left over uncovered). With jitter every view moves by a seeded draw, edge views outwards only.

No network input is much larger than the model's native size (`MOST_AREA`), however long the canvas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .route import Size

UNIFORM, GAUSSIAN = "uniform", "gaussian"
MIRROR, ZEROS = "mirror", "zeros"
MOST_EXCESS = 1.08
MOST_AREA = 1.5
"""Native areas that one network input may have: a network that is asked for more repeats, and its memory grows."""
NO_SHUFFLE, BY_POSITION, BY_CHANNEL = "none", "position", "channel"


def starts(length: int, window: int, stride: int, wrap: bool = False) -> tuple[int, ...]:
    """Starts of the views along one axis: every latent is in at least one.

    One view where the axis is no longer than the window. `wrap`: the axis is a circle, views are spread evenly over it.
    """
    if length <= window:
        return (0,)
    if wrap:
        count = math.ceil(length / stride)
        return tuple(index * length // count for index in range(count))
    count = math.ceil((length - window) / stride) + 1
    return tuple(min(index * stride, length - window) for index in range(count))


@dataclass(frozen=True)
class Local:
    """Overlapping views of `window` (height, width) latents, every `stride` (down, across) latents.

    weights: of a view's latents in the mean, `uniform` or `gaussian` (std `spread` of the view's side, not below `floor` of
    its peak, centred so many latents `below` the view's middle). wrap: (top to bottom, left to right). jitter: each view moves
    by up to so many latents, in steps of `jitter_unit`, drawn anew at each noise level, or once a stage where `jitter_once`.
    edge: what an edge view meets that moves outwards: the canvas mirrored, or `zeros` as published.
    """

    window: Size
    stride: Size
    weights: str = UNIFORM
    spread: float = 0.1
    floor: float = 1e-4
    wrap: tuple[bool, bool] = (False, False)
    jitter: int = 0
    jitter_unit: int = 1
    jitter_once: bool = False
    edge: str = MIRROR
    below: float = 0.0

    def views(self, size: Size) -> tuple[tuple[int, int], ...]:
        """(top, left) of every view on a canvas of `size`, without jitter, row by row."""
        tops, lefts = (starts(size[a], self.window[a], self.stride[a], self.wrap[a]) for a in (0, 1))
        return tuple((top, left) for top in tops for left in lefts)

    def view_size(self, size: Size) -> Size:
        """Height and width of the views on a canvas of `size`: the window, or the canvas where that is smaller."""
        return min(self.window[0], size[0]), min(self.window[1], size[1])

    def fills(self, size: Size) -> bool:
        """Whether views fill a canvas of `size` without the last one being moved back."""
        steps = [length - window for length, window in zip(size, self.window)]
        return all(step >= 0 and step % stride == 0 for step, stride in zip(steps, self.stride))

    def circles(self, size: Size) -> tuple[bool, bool]:
        """(down, across): the axes of a canvas of `size` that are a circle and covered by one view."""
        return tuple(on and length <= window for on, length, window in zip(self.wrap, size, self.window))


@dataclass(frozen=True)
class Dilated:
    """Dilated sampling (DemoFusion, section 3.4): every s-th latent down and across, s x s grids that cover the canvas.

    filter_sigma: of the Gaussian filter of 2s-1 latents that a grid's values come from, times the falling share c3.
    shuffle: window interaction (AccDiffusion, section 3.3): grids exchange latents by a seeded bijection at each position,
    shared by the channels (the paper's) or for each channel (the published code's). group: at most so many grids exchange.
    """

    dilation: int
    filter_sigma: float = 1.0
    shuffle: str = NO_SHUFFLE
    group: int = 0

    def grid_size(self, size: Size) -> Size:
        """Height and width of each grid."""
        return -(-size[0] // self.dilation), -(-size[1] // self.dilation)


@dataclass(frozen=True)
class Cosines:
    """Exponents of c = (1 + cos(pi (1000 - t) / 1000)) / 2: skip residual, share of dilated sampling, filter width."""

    skip: float = 3.0
    dilated: float = 1.0
    filter: float = 1.0


@dataclass(frozen=True)
class Edges:
    """A Canny ControlNet on local views (AccDiffusion v2): strength of its residuals, and from where to where in a stage.

    sigma: Canny's thresholds lie this fraction below and above the picture's median.
    """

    strength: float
    sigma: float = 0.3
    start: float = 0.0
    end: float = 1.0

    def share(self, step: int, steps: int) -> float:
        """The residuals' share at a step (from 0) of a stage: the strength, or 0 outside of start..end."""
        return 0.0 if step / steps < self.start or (step + 1) / steps > self.end else self.strength


MEAN_AND_STD, MEAN, NOTHING = "mean and std", "mean", "nothing"
"""What a stage's latents keep of the first stage's."""
LOOKS = (800, 600, 400, 200)
"""Timesteps at which a picture that is given is looked at for attention maps."""


@dataclass(frozen=True)
class CanvasPlan:
    """How one prediction on a canvas is made of the UNet's predictions.

    skip_residual: pull the sampler's state to the noised result of the stage before. guidance: CFG scale of local views; 0
    is the sampler's. tile_batch: views in one call at most (0: as memory allows). window_prompts: the share of a view that
    a word has to cover, None where every view has the whole prompt. anchor: what a stage's latents keep of the first
    stage's. published: the published code's choices.
    """

    local: Local | None = None
    dilated: Dilated | None = None
    skip_residual: bool = False
    cosines: Cosines = Cosines()
    guidance: float = 0.0
    tile_batch: int = 0
    window_prompts: float | None = None
    edges: Edges | None = None
    anchor: str = MEAN
    published: bool = False

    def inputs(self, size: Size) -> list[tuple[Size, int]]:
        """What one denoiser call asks the network on a canvas of `size`: (size of the inputs, how many of them)."""
        parts = []
        if self.local is not None:
            parts.append((self.local.view_size(size), len(self.local.views(size))))
        if self.dilated is not None:
            parts.append((self.dilated.grid_size(size), self.dilated.dilation**2))
        return parts or [(size, 1)]

    def evaluations(self, size: Size) -> int:
        """UNet evaluations (of one view, for all rows) of one denoiser call on a canvas of `size`."""
        return sum(count for _, count in self.inputs(size))


@dataclass(frozen=True)
class Stage:
    """One sampling run at one size (height, width in latents).

    scale: of this stage over the first one. strength: the share of the sampler's steps that is run (1: all of them); a
    first stage that starts from noise runs all. canvas: None for plain sampling. looks: timesteps at which a picture that is
    given is looked at, at the first stage's size, before the stage begins.
    """

    size: Size
    scale: float = 1.0
    strength: float = 1.0
    canvas: CanvasPlan | None = None
    looks: tuple[int, ...] = ()

    @property
    def wrap(self) -> tuple[bool, bool]:
        """(top to bottom, left to right): the edges that meet."""
        return self.canvas.local.wrap if self.canvas and self.canvas.local else (False, False)

    @property
    def first_size(self) -> Size:
        """Of a stage that begins with a picture that is given: the size that the first stage would have had."""
        return _divided(self.size, self.scale)

    def given(self) -> Stage:
        """This stage where it begins with a picture that is given, which has to be looked at for where its words lie."""
        return replace(self, looks=LOOKS if self.canvas and self.canvas.window_prompts else ())

    def inputs(self) -> list[tuple[Size, int]]:
        """What one denoiser call asks the network: (size of the inputs, how many of them)."""
        return self.canvas.inputs(self.size) if self.canvas else [(self.size, 1)]

    def evaluations(self) -> int:
        """UNet evaluations of one denoiser call."""
        return sum(count for _, count in self.inputs())

    def steps_of(self, steps: int) -> int:
        """How many of a sampler's steps the stage's strength means."""
        return max(1, round(self.strength * steps))


def evaluations_of(stages: Sequence[Stage], calls: Sequence[int]) -> int:
    """UNet evaluations of a run with this many denoiser calls in each stage."""
    return sum(len(stage.looks) + count * stage.evaluations() for stage, count in zip(stages, calls))


def nearest_factor(ratio: float) -> int:
    """The whole number s >= 1 that is nearest to `ratio` by proportion: 1 below sqrt(2), 2 below sqrt(6), ..."""
    lower = max(1, math.floor(ratio))
    return lower + 1 if ratio / lower > (lower + 1) / ratio else lower


def stage_scales(ratio: float, max_step: float) -> tuple[float, ...]:
    """Scales of the stages after the first one, up to `ratio`, in steps of at most `max_step`, whole where they can be."""
    count = max(1, math.ceil(math.log(ratio) / math.log(max_step) - 1e-6))
    scales: list[float] = []
    for index in range(1, count):
        last = scales[-1] if scales else 1.0
        even = last * (ratio / last) ** (1 / (count - index + 1))
        whole = float(round(even))
        fits = last < whole <= last * max_step and whole < ratio <= whole * max_step ** (count - index)
        scales.append(whole if fits else even)
    return (*scales, ratio)


WHOLE_FROM = 1.75
"""Scale from which stages end at a whole multiple of the first one."""


def is_too_large(size: Size, native: int) -> bool:
    """Whether a network of `native` latents is not to be asked for `size` at once."""
    return size[0] * size[1] > MOST_AREA * native**2


def whole_factor(ratio: float, size: Size, native: int) -> int:
    """`nearest_factor`; the next one where rounding `ratio` down leaves too much of `size` for a network of `native` latents."""
    factor = nearest_factor(ratio)
    return factor + 1 if 1 < factor < ratio and is_too_large(_divided(size, factor), native) else factor


def first_size(size: Size, native: int) -> tuple[Size, float]:
    """(latents of the first stage, scale of `size` over it) for a model of `native` latents.

    The longer side is native, as published; the shorter is about half of it or more: a long panorama's first stage is too
    large for the network (`is_too_large`). From `WHOLE_FROM` on the scale is rounded to a whole number, so that dilated
    grids are exactly as large as the first stage.
    """
    longest, shortest = max(size), min(size)
    ratio = max(1.0, min(longest / native, shortest / (native / 2)))
    if ratio >= WHOLE_FROM:
        ratio = float(whole_factor(ratio, size, native))
    return _divided(size, ratio), ratio


def _divided(size: Size, ratio: float) -> Size:
    return fitting(size[0] / ratio), fitting(size[1] / ratio)


def fitting(length: float) -> int:
    """A side near `length` that UNets like, rounded up; hand-offs cut what is too much.

    A multiple of 8 latents, so that no map is odd; of 4, 2 or 1 where that would be more than 8 % too much.
    """
    for multiple in (8, 4, 2, 1):
        reached = max(multiple, math.ceil(length / multiple - 1e-6) * multiple)
        if reached <= MOST_EXCESS * length:
            break
    return reached
