"""Noise levels: sigma <-> timestep of the discrete schedule, and the gates that open over a part of it.

Stable Diffusion is trained on t = 0..999 with sigma(t) = sqrt((1 - abar_t) / abar_t). How far a run has come is
`progress` = 1 - t/999: 0 at the most noisy end, 1 at the clean end. "The first r of uniform steps" is progress < r,
whatever the sampler (Karras or not, one or two evaluations a step) and wherever img2img starts.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .config.common import NOISE_LEVEL, STEP_FRACTION
from .config.errors import HiresError

TRAINED_STEPS = 1000
_KEYS_A_TIMESTEP = 16


def scaled_linear(beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = TRAINED_STEPS) -> list[float]:
    """abar_t of Stable Diffusion's schedule: betas linear in their square roots (latent-diffusion, `scaled_linear`)."""
    low, high = math.sqrt(beta_start), math.sqrt(beta_end)
    products, product = [], 1.0
    for index in range(steps):
        product *= 1.0 - (low + (high - low) * index / (steps - 1)) ** 2
        products.append(product)
    return products


def to_zero_snr(products: Sequence[float]) -> list[float]:
    """abar_t stretched so that the last one is 0, or 2^-24 as samplers in sigma need it (Lin et al. 2023, algorithm 1)."""
    roots = [product**0.5 for product in products]
    stretch = roots[0] / (roots[0] - roots[-1])
    return [((root - roots[-1]) * stretch) ** 2 for root in roots[:-1]] + [2.0**-24]


class NoiseSchedule:
    """sigma <-> timestep for one model; the same for eps and v models, which differ in what they predict only.

    `alphas_cumprod`: abar_t for t = 0..T-1, as a model's buffer holds it (any sequence of floats).
    """

    def __init__(self, alphas_cumprod: Sequence[float] | None = None):
        products = scaled_linear() if alphas_cumprod is None else [float(a) for a in alphas_cumprod]
        # A zero-terminal-SNR model has abar = 0 at the end: its sigma is infinite and stays the largest.
        self._log_sigmas = [0.5 * math.log((1 - a) / a) if a > 0 else math.inf for a in products]

    def __len__(self) -> int:
        return len(self._log_sigmas)

    def timestep(self, sigma: float) -> float:
        """The (fractional) timestep of `sigma`, linear in log sigma between the trained ones and clamped to them."""
        table = self._log_sigmas
        wanted = math.log(sigma) if sigma > 0 else -math.inf
        if wanted <= table[0]:
            return 0.0
        if wanted >= table[-1]:
            return float(len(table) - 1)
        above = bisect.bisect_right(table, wanted)
        low, high = table[above - 1], table[above]
        return above - 1 + ((wanted - low) / (high - low) if math.isfinite(high) else 0.0)

    def sigma(self, timestep: float) -> float:
        """sigma of a (fractional) timestep in 0..T-1."""
        table = self._log_sigmas
        timestep = min(max(timestep, 0.0), len(table) - 1.0)
        low = int(timestep)
        high = min(low + 1, len(table) - 1)
        share = timestep - low
        return math.exp(table[low] if share == 0 else table[low] * (1 - share) + table[high] * share)

    def moment(self, *, timestep: float | None = None, sigma: float | None = None) -> Moment:
        """The moment of a timestep or of a sigma."""
        if timestep is None:
            return Moment(self.timestep(sigma), sigma)
        return Moment(timestep, self.sigma(timestep))

    def progress(self, timestep: float) -> float:
        """1 - t/(T-1)."""
        return 1.0 - timestep / (len(self) - 1)


@dataclass(frozen=True)
class Level:
    """Where a run is: its progress by noise, and the sampler's step (None where nobody said)."""

    progress: float
    step: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Gate:
    """Open from `start` to `end` of a run (fractions of it, start included, end excluded; an end of 1 is never reached).

    By noise level: start <= progress < end. By step fraction, as the published codes count: int(N start) <= i < int(N end)
    (HiDiffusion), or without the `floors` N start <= i < N end (Deep Shrink).
    """

    end: float
    start: float = 0.0
    clock: str = NOISE_LEVEL
    floors: bool = True

    @property
    def ever_open(self) -> bool:
        """Whether there is a level at which the gate is open."""
        return self.end > self.start

    def is_open(self, level: Level) -> bool:
        """Whether the gate is open at `level`. Raises `HiresError` where its clock is not known."""
        if self.clock == STEP_FRACTION:
            step, steps = steps_of(level)
            first, last = steps * self.start, steps * self.end
            return int(first) <= step < int(last) if self.floors else first <= step < last
        after_start = self.start <= 0 or level.progress >= self.start
        return self.ever_open and after_start and (self.end >= 1 or level.progress < self.end)

    def share(self, level: Level) -> float:
        """How much of 0..`end` is done at `level`, between 0 and 1 (the published smooth scaling starts at 0, not at `start`)."""
        if self.clock == STEP_FRACTION:
            step, steps = steps_of(level)
            done = step / steps
        else:
            done = level.progress
        return min(max(done / self.end, 0.0), 1.0) if self.end > 0 else 1.0

    def __str__(self) -> str:
        return f"{self.start:.0%}-{self.end:.0%} of the {self.clock} range" if self.ever_open else "never"


def steps_of(level: Level) -> tuple[int, int]:
    """(step, steps) of a level. Raises `HiresError` where the sampler's step is not known."""
    if level.step is None or not level.steps:
        raise HiresError(
            f"'clock' is '{STEP_FRACTION}', but nobody told which step this is. "
            f"Call session.at(step=..., steps=...) before each UNet call, or set clock to '{NOISE_LEVEL}'."
        )
    return level.step, level.steps


@dataclass(frozen=True)
class Moment:
    """Where one denoiser call is: its timestep (0..999, fractional) and sigma. One for all images of a batch."""

    timestep: float
    sigma: float

    @property
    def key(self) -> float:
        """The timestep to 1/16, for draws: what is drawn for a noise level does not hang on a call's last bits."""
        return round(self.timestep * _KEYS_A_TIMESTEP) / _KEYS_A_TIMESTEP

    @property
    def cosine(self) -> float:
        """c = (1 + cos(pi (1000 - t) / 1000)) / 2: 1 at pure noise, 0 at the clean end (DemoFusion, section 3.2)."""
        return 0.5 * (1 + math.cos(math.pi * (TRAINED_STEPS - self.timestep) / TRAINED_STEPS))
