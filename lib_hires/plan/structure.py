"""What a UNet looks like, as pure data: encoder steps, decoder steps, and which skip joins which.

    encoder step   0 conv, then per level: pairs (residual block, transformer or none), and a down-sampler between levels
    decoder step   pairs only; the last of a level also up-samples; step k takes the skip of encoder step n-1-k

The same count holds for every layout: 12 + 1 + 12 for SD1.x and SD2.x, 9 + 1 + 9 for SDXL (LDM's block numbers).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

CONV, PAIR, DOWN = "conv", "pair", "down"


@dataclass(frozen=True)
class EncoderStep:
    """One encoder step; `level` is the number of halvings of its output, `depth` its transformer blocks."""

    kind: str
    level: int
    depth: int = 0


@dataclass(frozen=True)
class DecoderStep:
    """One decoder step; `level` is that of its pair, before it up-samples."""

    level: int
    depth: int = 0
    upsamples: bool = False


@dataclass(frozen=True)
class Structure:
    """A whole UNet. `context_width` is that of the text tokens, `vector_width` of the pooled vector (0: none)."""

    encoder: tuple[EncoderStep, ...]
    decoder: tuple[DecoderStep, ...]
    in_channels: int = 4
    context_width: int = 768
    vector_width: int = 0

    @property
    def levels(self) -> int:
        """The number of resolutions."""
        return 1 + max(step.level for step in self.encoder)

    @property
    def inpainting(self) -> bool:
        """Whether the UNet takes a mask and a masked picture beside the latent."""
        return self.in_channels == 9

    def skip_of(self, decoder_step: int) -> int:
        """The encoder step whose output the decoder step takes."""
        return len(self.encoder) - 1 - decoder_step

    def first_pair(self, level: int) -> int | None:
        """The first encoder pair of a level."""
        return next(self._encoder(PAIR, level), None)

    def downsampler(self, level: int) -> int | None:
        """The encoder step that leaves `level` for the next."""
        return next(self._encoder(DOWN, level + 1), None)

    @property
    def top_attention_level(self) -> int | None:
        """The level of highest resolution that has transformer blocks."""
        return min((step.level for step in self.encoder if step.depth), default=None)

    def _encoder(self, kind: str, level: int) -> Iterator[int]:
        return (index for index, step in enumerate(self.encoder) if step.kind == kind and step.level == level)
