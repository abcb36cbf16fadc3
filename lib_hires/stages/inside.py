"""The changes of the network that a request means: its method's, or those that a canvas method has inside its views."""

from __future__ import annotations

from ..canvas.method import RAUNET, SHRINK, WINDOWS, CanvasMethod
from ..plan.method import Method
from ..unet.deep_shrink import DeepShrink
from ..unet.hidiffusion import HiDiffusion

_INSIDE = {WINDOWS: HiDiffusion(raunet=False), RAUNET: HiDiffusion(), SHRINK: DeepShrink()}


def unet_methods(method: Method | None) -> list[Method]:
    """The methods for a `Session`: at most one, with its default settings where it is inside views."""
    if isinstance(method, CanvasMethod):
        return [_INSIDE[method.inside]] if method.inside in _INSIDE else []
    return [] if method is None else [method]
