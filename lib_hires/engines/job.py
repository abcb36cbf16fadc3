"""A job for the standalone engine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from PIL import Image

from ..config.errors import SettingError
from . import samplers

MAX_SEED = 2**63 - 1
MAX_BATCH = 1024


@dataclass(frozen=True)
class Job:
    """One request. `width`, `height`: pixels; `batch` pictures have the seeds `seed`, `seed` + 1, ...

    `init`: a picture to start from (img2img), which is enlarged and cropped to the size; `denoise`: the share of the steps that
    are then run.

    Raises `SettingError` for a value outside its range.
    """

    prompt: str
    negative: str = ""
    width: int = 512
    height: int = 512
    steps: int = 20
    cfg: float = 7.0
    sampler: str = "euler"
    seed: int = 0
    batch: int = 1
    init: Image.Image | None = None
    denoise: float = 0.5

    def __post_init__(self):
        for name, low, high in (
            ("width", 8, 16384),
            ("height", 8, 16384),
            ("steps", 1, 1000),
            ("cfg", 0, 100),
            ("batch", 1, MAX_BATCH),
            ("seed", 0, MAX_SEED),
            ("denoise", 0.01, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise SettingError(
                    name, value, f"between {low} and {high}", "Raise it." if value < low else "Lower it."
                )
        if self.sampler not in samplers.SAMPLERS:
            raise SettingError("sampler", self.sampler, "one of " + ", ".join(samplers.SAMPLERS))

    @property
    def seeds(self) -> list[int]:
        """The seed of each picture."""
        return [(self.seed + index) % MAX_SEED for index in range(self.batch)]

    @property
    def started(self) -> bool:
        """Whether it begins with a picture (img2img)."""
        return self.init is not None

    @property
    def guided(self) -> bool:
        """Whether there are negative rows beside the positive."""
        return self.cfg != 1


@dataclass
class Result:
    """What came out. `images`: B PIL pictures; `latents`: (B, 4, h, w) fp32 on the CPU, as the autoencoder's scaled latents;

    `stages`: for each sampling run its width, height, unet_calls and seconds; `seconds`: everything, text and decoding
    included; `peak_memory`: bytes (see `memory.peak_memory`); `interrupted`: where it was stopped, empty where it was not.
    """

    images: list[Image.Image]
    latents: torch.Tensor
    stages: list[dict] = field(default_factory=list)
    unet_calls: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    notes: list[str] = field(default_factory=list)
    interrupted: str = ""
