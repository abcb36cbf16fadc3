"""MultiDiffusion: at each step the mean of the predictions on many overlapping views, all of the same weight.

The least-squares agreement of all views; seamless pictures of any size in the memory of one view, without a plan for the
whole: subjects repeat. One step is done on the whole canvas, so that every sampler fits, and ancestral noise is drawn
once. Source: arXiv 2302.08113 (ICML 2023), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .method import CanvasMethod


@dataclass(frozen=True)
class MultiDiffusion(CanvasMethod):
    """Settings of MultiDiffusion; by default views start every eighth of their side, as published."""

    name: ClassVar[str] = "multidiffusion"
    group: ClassVar[str] = ""
    title: ClassVar[str] = "MultiDiffusion"
    summary: ClassVar[str] = "averages overlapping views of the native size"
    use_when: ClassVar[str] = "panoramas, textures and img2img at any size in little memory; not for one large subject"
    source: ClassVar[str] = "arXiv 2302.08113"
    published_overlap: ClassVar[float] = 0.875
