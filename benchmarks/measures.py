"""What is measured in a picture, each a number that a render of the same scene can be asked for too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from lib_hires.plan.models import LATENT_FACTOR
from lib_hires.plan.tiling import starts

DIRECTIONS = 24
"""Principal directions of the true renders' features that a Frechet distance is taken in, at most half as many as there are
pictures. Few pictures make it too large all the same, so it is told beside that of other true renders."""
RESAMPLES = 1000
ALONG = 0.3
FAINTEST = 1.0
"""Lightness (of 100) that hardly shows; levels of 8 bits step by a third of it."""


def detail(picture: np.ndarray, scale: float) -> float:
    """Energy of what a picture of the native size cannot show: mean square of lightness above its finest frequencies."""
    light = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[..., 0]
    return float(np.square(light - cv2.GaussianBlur(light, (0, 0), 0.8 * scale)).mean())


def seams(picture: np.ndarray, view: int, overlap: float = 0.5) -> float:
    """How much rougher a picture is along the borders of views than between them; 1 is no seam.

    The borders of views of `view` pixels at `overlap`; roughness is the mean absolute second difference across the line
    over its smoothest `ALONG`, compared with lines 3 to 9 pixels away, which cross the same content: a seam runs along
    the whole line, an edge of the subject along a part of it.
    """
    light = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[..., 0]
    own, others = [], []
    for axis in (0, 1):
        steps = np.sort(np.abs(np.diff(light, 2, axis=axis)), axis=1 - axis).swapaxes(
            0, axis
        )  # entry k: about line k + 1
        rough = steps[:, : round(ALONG * steps.shape[1])].mean(axis=1)
        for line in borders(light.shape[axis], view, overlap):
            near = [line + side * far for side in (-1, 1) for far in range(3, 10)]
            own.append(rough[[line - 2, line - 1]].mean())
            others.append(rough[[place - 1 for place in near if 0 < place <= len(rough)]].mean())
    return float((np.mean(own) + FAINTEST) / (np.mean(others) + FAINTEST)) if own else 1.0


def borders(length: int, view: int, overlap: float) -> list[int]:
    """Where views begin and end inside a side, in pixels."""
    size = view // LATENT_FACTOR
    first = starts(length // LATENT_FACTOR, size, max(1, round(size * (1 - overlap))))
    edges = {start * LATENT_FACTOR for start in first} | {(start + size) * LATENT_FACTOR for start in first}
    return sorted(edge for edge in edges if 2 <= edge <= length - 2)


def drift(picture: np.ndarray, native: np.ndarray) -> float:
    """Lab distance between the mean colours of two pictures."""

    def mean(one: np.ndarray) -> np.ndarray:
        return cv2.cvtColor(one.astype(np.float32) / 255, cv2.COLOR_RGB2LAB).mean(axis=(0, 1))

    return float(np.linalg.norm(mean(picture) - mean(native)))


def frechet(ours: np.ndarray, true: np.ndarray) -> float:
    """Frechet distance of two sets of features (N, D), as Gaussians, in the true set's `DIRECTIONS` main directions.

    |m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2))   (Heusel et al. 2017, section 2), over the true set's total variance.
    """
    middle = true.mean(axis=0)
    _, _, ways = np.linalg.svd(true - middle, full_matrices=False)
    ways = ways[: min(DIRECTIONS, min(len(ours), len(true)) // 2)]
    ours, true = (ours - middle) @ ways.T, (true - middle) @ ways.T
    first, second = np.atleast_2d(np.cov(ours.T)), np.atleast_2d(np.cov(true.T))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    both = np.sqrt(np.clip(np.linalg.eigvalsh(root @ second @ root), 0, None)).sum()
    far = np.square(ours.mean(axis=0) - true.mean(axis=0)).sum()
    return float((far + np.trace(first) + np.trace(second) - 2 * both) / np.trace(second))


def interval(
    count: int, of: Callable[[np.ndarray], float], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The middle 95 % of a figure over resamples of `count` pictures; `of`: a figure of chosen indices."""
    generator = np.random.default_rng(seed)
    figures = [of(generator.integers(0, count, count)) for _ in range(resamples)]
    return float(np.quantile(figures, 0.025)), float(np.quantile(figures, 0.975))


def share_with_interval(values: Sequence[bool]) -> tuple[float, float, float]:
    """(share, low, high) of what is true, the interval Wilson's (1927) at 95 %: no certainty at none and at all."""
    count, share, z = len(values), float(np.mean(values)), 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return share, max(0.0, float(middle - half)), min(1.0, float(middle + half))


def mean_with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of numbers, the interval by resampling."""
    values = np.asarray(values, np.float64)
    low, high = interval(len(values), lambda chosen: values[chosen].mean())
    return float(values.mean()), low, high
