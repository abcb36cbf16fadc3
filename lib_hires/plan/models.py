"""Which model this is, and its native size: every size regime is a scale over that.

Family from structure; native size from the user's setting, else the checkpoint's `modelspec.resolution`, else the family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..config.common import Common
from ..config.errors import SettingError
from .structure import Structure

LEAST_SCALE = 1.25
"""Below this scale over the native size models draw by themselves, and nothing is changed."""
LATENT_FACTOR = 8
"""Pixels a latent, of every Stable Diffusion autoencoder."""


@dataclass(frozen=True)
class Family:
    """A model family; `native` in pixels. `few_step`: Turbo and LCM models, made for a handful of steps."""

    key: str
    title: str
    native: int
    few_step: bool = False

    @property
    def is_xl(self) -> bool:
        """Three levels, no attention on the first."""
        return self.key in ("sdxl", "sdxl_turbo")


FAMILIES = {
    family.key: family
    for family in (
        Family("sd1", "SD1.x", 512),
        Family("sd2", "SD2.x", 512),
        Family("sdxl", "SDXL", 1024),
        Family("sdxl_turbo", "SDXL Turbo or LCM", 512, few_step=True),
        Family("sdxl_refiner", "SDXL refiner", 1024),
    )
}
SD2_V_NATIVE = 768


@dataclass(frozen=True)
class Model:
    """What planning needs to know of a model: `native` is its trained size in pixels."""

    structure: Structure
    family: Family
    native: int

    @property
    def inpainting(self) -> bool:
        """Whether this is an inpainting model (9 input channels)."""
        return self.structure.inpainting

    def scale(self, height: int, width: int) -> float:
        """Linear scale of a latent of `height` x `width` over the native size, by area."""
        return math.sqrt(height * width) * LATENT_FACTOR / self.native

    def smallest_scale(self, height: int, width: int) -> float:
        """Scale of the shorter side."""
        return min(height, width) * LATENT_FACTOR / self.native


def read_model(
    structure: Structure,
    common: Common | None = None,
    metadata: Mapping[str, str] | None = None,
    v_prediction: bool = False,
) -> Model:
    """The model of a structure, under the user's `family` and `native_size`. Raises `SettingError` where they cannot be."""
    common = common or Common()
    found = family_of(structure)
    family = found if common.family == "auto" else FAMILIES[common.family]
    if (family.is_xl, family.key == "sdxl_refiner") != (found.is_xl, found.key == "sdxl_refiner"):
        raise SettingError(
            "family",
            common.family,
            f"'auto' or a family built like {found.title}",
            f"The loaded network is built like {found.title}.",
        )
    default = SD2_V_NATIVE if family.key == "sd2" and v_prediction else family.native
    return Model(structure, family, common.native_size or trained_size(metadata) or default)


def family_of(structure: Structure) -> Family:
    """The family that is built like this."""
    if structure.levels == 3:
        return FAMILIES["sdxl"]
    if structure.vector_width and structure.top_attention_level:
        return FAMILIES["sdxl_refiner"]
    return FAMILIES["sd2" if structure.context_width == 1024 else "sd1"]


def trained_size(metadata: Mapping[str, str] | None) -> int | None:
    """The side of the square of equal area, in pixels, from the ModelSpec key `modelspec.resolution`: "1024x1024", "512"."""
    found = re.fullmatch(r"\s*(\d+)(?:\s*[xX]\s*(\d+))?\s*", str((metadata or {}).get("modelspec.resolution", "")))
    return round(math.sqrt(int(found[1]) * int(found[2] or found[1]))) or None if found else None
