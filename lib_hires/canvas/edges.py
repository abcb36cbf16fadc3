"""Canny edges of a picture, with thresholds around its median (AccDiffusion v2, section 3)."""

from __future__ import annotations

import numpy as np

_DARKEST = 24
"""A median below this counts as this: around 0 both thresholds are 0 and every speck of noise is an edge."""


def thresholds(median: float, sigma: float) -> tuple[int, int]:
    """(low, high) of Canny: max(0, (1 - sigma) median) and min(255, (1 + sigma) median)."""
    return int(max(0, (1 - sigma) * median)), int(min(255, (1 + sigma) * median))


def edge_map(picture: np.ndarray, sigma: float, published: bool = False) -> np.ndarray:
    """Edges of an RGB picture, (H, W, 3) uint8: (H, W) uint8, 0 or 255. `published`: also of a black picture's noise."""
    import cv2

    median = float(np.median(picture))
    return cv2.Canny(picture, *thresholds(median if published else max(median, _DARKEST), sigma))


def enlarged(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """A picture or a map at (width, height) pixels, bicubic, clipped to its range."""
    import cv2

    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC)
