"""Installs a route (plan/route.py) into a UNet: what happens to the feature map before, in and after each step.

Everything is a forward hook or an instance attribute, so that state_dict keys, module types and identities stay:

    resize on entering   forward pre-hook of the step's first module
    pool, resize after   forward hook of its last module
    stride 4             `_conv_forward` of the strided convolution, and its numbers for a `forward` that passes that by (Forge's);
                         LoRA and dtype casts, which live in `forward`, still run
    sized up-sampling    the target size is handed to the up-sampler, or its `forward` is overridden where it takes none
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config.errors import UnsupportedModel
from ..patches import UndoLog
from ..plan.route import Route
from .layout import Layout, strided_convolutions
from .raunet import DILATED, dilated_conv, pool, resize


def install_route(layout: Layout, route: Route, log: UndoLog) -> None:
    """Make the UNet's next calls take `route`. Every change goes through `log`."""
    for modules, way in zip(layout.encoder, route.encoder):
        if way.enter:
            _before(modules.first, partial(resize, size=way.enter.size, mode=way.enter.mode), log)
        if way.dilated:
            _dilate(modules.downsample, way.out, log)
        if way.pooled:
            _after(modules.last, pool, log)
    for modules, way in zip(layout.decoder, route.decoder):
        if way.enter:
            _before(modules.first, partial(resize, size=way.enter.size, mode=way.enter.mode), log)
        if way.leave:
            _after(modules.last, partial(resize, size=way.leave.size, mode=way.leave.mode), log)
        if way.upsample:
            _size_upsampler(modules.upsample, way.upsample, log)


def _before(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], log: UndoLog) -> None:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: change(kwargs[name])}

    log.hook(module.register_forward_pre_hook(hook, with_kwargs=True))


def _after(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], log: UndoLog) -> None:
    def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        if isinstance(output, torch.Tensor):
            return change(output)
        output.sample = change(output.sample)  # a diffusers output object
        return output

    log.hook(module.register_forward_hook(hook))


def _dilate(downsample: nn.Module, out: tuple[int, int], log: UndoLog) -> None:
    for conv in strided_convolutions(downsample):
        log.override(conv, "_conv_forward", lambda _previous, conv=conv: partial(dilated_conv, conv))
        for name, value in DILATED.items():
            log.set(conv, name, value)

    def check(_module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
        if tuple(output.shape[-2:]) != out:
            raise UnsupportedModel(
                f"the down-sampler gave {tuple(output.shape[-2:])} where {out} was planned: its convolution "
                f"({type(strided_convolutions(downsample)[0]).__name__}) does not let its stride be changed. "
                "Switch 'raunet' off or use Deep Shrink."
            )

    log.hook(downsample.register_forward_hook(check))


def _size_upsampler(upsample: nn.Module, target: tuple[int, int], log: UndoLog) -> None:
    """Nearest to `target`, then the up-sampler's own convolution."""
    takes = inspect.signature(type(upsample).forward).parameters
    if "output_size" in takes:  # diffusers
        log.hook(upsample.register_forward_pre_hook(_with_keyword("output_size", lambda x: target), with_kwargs=True))
    elif "output_shape" in takes:  # Forge, ldm_patched: a whole shape
        shape = _with_keyword("output_shape", lambda x: [*x.shape[:2], *target])
        log.hook(upsample.register_forward_pre_hook(shape, with_kwargs=True))
    else:
        log.override(upsample, "forward", lambda _previous: partial(_upsample, upsample, target))


def _with_keyword(name: str, value: Callable[[torch.Tensor], Any]) -> Callable:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args[:1], {**kwargs, name: value(args[0])}

    return hook


def _upsample(module: nn.Module, target: tuple[int, int], x: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    x = resize(x, target, "nearest")
    return module.conv(x) if module.use_conv else x
