"""Hires Lab: coherent pictures far above a Stable Diffusion model's native size.

    import lib_hires
    from lib_hires import HiDiffusion

    with lib_hires.patched(pipe.unet, HiDiffusion(), seeds=[7]):
        image = pipe(prompt, width=1024, height=1024, generator=torch.Generator().manual_seed(7)).images[0]

`apply` and `remove` are the same without a `with`. Importing this needs torch, numpy and einops only.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.2.0"
__all__ = [
    "AccDiffusion",
    "AccDiffusionV2",
    "Auto",
    "Common",
    "DeepShrink",
    "DemoFusion",
    "HiDiffusion",
    "HiresError",
    "MixtureOfDiffusers",
    "MultiDiffusion",
    "Request",
    "Session",
    "apply",
    "methods",
    "patched",
    "remove",
]

OPTIONS = ("seeds", "schedule", "metadata", "v_prediction", "tokens_owned_by", "record")
"""Arguments of `patched` beside the common settings: those of `Session`."""

_HOMES = {
    "Common": "config",
    "HiresError": "config",
    "Request": "request",
    "Session": "unet.session",
    "methods": "methods",
    "Auto": "plan.auto",
    "HiDiffusion": "unet.hidiffusion",
    "DeepShrink": "unet.deep_shrink",
    "MultiDiffusion": "canvas.multidiffusion",
    "MixtureOfDiffusers": "canvas.mixture",
    "DemoFusion": "canvas.demofusion",
    "AccDiffusion": "canvas.accdiffusion",
    "AccDiffusionV2": "canvas.accdiffusion",
}


def patched(unet: Any, *methods: Any, **options: Any) -> Any:
    """A session on `unet` for a `with` block: inside it the UNet draws by `methods`, after it it is what it was.

    methods: settings objects such as `HiDiffusion()` or `DeepShrink(window_attention=True)`; not those of methods that draw
    on a canvas, such as `DemoFusion()`, which are no change of a UNet.
    options: `native_size`, `family`, `clock` (see `lib_hires.Common`), `seeds` (one for each image), and the other
    arguments of `lib_hires.Session`. Raises `HiresError` with the setting, its value and what is allowed.
    """
    from difflib import get_close_matches

    from .canvas.method import CanvasMethod
    from .config import Common, HiresError, UnknownSetting, schema
    from .unet.session import Session

    for method in methods:
        if isinstance(method, CanvasMethod):
            raise HiresError(
                f"{method.title} draws on a canvas larger than the model; it is no change of a UNet, so that `patched` and "
                f"`apply` cannot do it. Run it by the command line, --method {method.name}, or with a "
                f"lib_hires.Request({type(method).__name__}()) by lib_hires.engines."
            )
    names = {row.name for row in schema(Common)}
    allowed = [*names, *OPTIONS]
    for name in options:
        if name not in allowed:
            raise UnknownSetting(name, options[name], "patched()", sorted(allowed), get_close_matches(name, allowed, 1))
    common = Common.from_dict({name: options.pop(name) for name in list(options) if name in names})
    return Session(unet, methods, common, **options)


def apply(unet: Any, *methods: Any, **options: Any) -> Any:
    """`patched`, opened at once; returns the session. Undo it with `remove(unet)` or `session.close()`."""
    return patched(unet, *methods, **options).open()


def remove(unet: Any) -> None:
    """Close every session on `unet`, the innermost first. Does nothing where there is none."""
    from .unet.session import sessions_on

    for session in sessions_on(unet):
        session.close()


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
