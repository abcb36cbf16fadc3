"""DemoFusion: draw at the native size, then enlarge and denoise again, each stage held together from three sides.

    skip residual     x <- (1 - c1) x + c1 (z + sigma n)     the stage before, at the same noise level
    local views       overlapping, jittered: the detail
    dilated sampling  s x s interleaved grids: the whole      (1 - c2) local + c2 dilated

c1, c2 and the filter's width fall from 1 to 0 with the noise. Source: arXiv 2311.16973 (CVPR 2024), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .method import StagedMethod


@dataclass(frozen=True)
class DemoFusion(StagedMethod):
    """Settings of DemoFusion."""

    name: ClassVar[str] = "demofusion"
    group: ClassVar[str] = ""
    title: ClassVar[str] = "DemoFusion"
    summary: ClassVar[str] = "draws at the native size, then enlarges and refines in stages"
    use_when: ClassVar[str] = "2x to 4x and beyond, where one subject should stay one and gain detail"
    source: ClassVar[str] = "arXiv 2311.16973"
