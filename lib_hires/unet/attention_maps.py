"""Cross-attention maps: where in the picture each token of the prompt was looked for, gathered while a run samples.

    M[y, x, token] = mean over layers, heads and calls of softmax(q k^T scale),  conditional rows only
    layers: attn2 of the transformers at 1/4 of the latents' size, encoder and decoder, not the middle block

Hooks read what goes into those layers and compute the maps beside them, in fp32: the layers' own, fused attention runs as
ever and the network's output keeps every bit. Source: AccDiffusion (arXiv 2407.10738).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ..config.errors import HiresError, UnsupportedModel
from ..patches import UndoLog
from .compiled import let_rest
from .layout import Layout, read_layout

LEVEL = 2
"""Halvings of the latents at the layers that are read: 32x32 tokens for SDXL at 1024 pixels, 16x16 for SD1.5 at 512."""
_ELEMENTS = 2**23
"""Attention probabilities that are held at once: 32 MiB."""
_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu")


@dataclass(frozen=True)
class _Kind:
    """What sums may be added: the images of the rows, the map's size, the number of tokens, where it lies."""

    images: tuple[int, ...]
    size: tuple[int, int]
    tokens: int
    device: torch.device


class AttentionMaps:
    """Gathers the cross-attention maps of one sampling run: `with maps: ...`, then `maps.result(image)`.

    unet: the network (see `read_layout`). size: (height, width) of the latents whose 1/4 is the grid of the results; by
    default those of the first call. skip_tokens: leading tokens of the context that are not the prompt's.
    `maps.rows(...)` must be told before each denoiser call. Opening again starts anew. `level` says at which halving of the
    latents the layers are: 2, or the nearest that has any. `notes` says what could not be read, in words.
    Raises `UnsupportedModel` when made for a network without cross-attention.
    """

    def __init__(self, unet: nn.Module, *, size: tuple[int, int] | None = None, skip_tokens: int = 0):
        self.unet = unet
        self.layout: Layout = read_layout(unet)
        self.level, self._transformers = _readable(self.layout)
        self.skip_tokens = skip_tokens
        self.notes: list[str] = []
        self.is_open = False
        self._given_size = size
        self._log = UndoLog()
        self._forget()
        if self.level != LEVEL:
            self._note(
                f"the network has no cross-attention at 1/{2**LEVEL} of the latents' size; 1/{2**self.level} is read."
            )

    def _forget(self) -> None:
        self._size = self._given_size
        self._told: tuple[int | None, ...] = ()
        self._cursor = 0
        self._now: tuple[int | None, ...] = ()
        self._calls: Counter[int] = Counter()
        self._sums: dict[_Kind, torch.Tensor] = {}
        self._counts: Counter[_Kind] = Counter()

    # Opening and closing ---------------------------------------------------------------------------------------------

    def __enter__(self) -> AttentionMaps:
        if self.is_open:
            raise HiresError("these attention maps are being gathered already. Close them, or make others.")
        self._forget()
        self._log = UndoLog()
        self.is_open = True
        try:
            self._install()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_failure: object) -> None:
        self.is_open = False
        self._log.undo()

    def __deepcopy__(self, _memo: dict) -> AttentionMaps:
        """A copy of the network copies our hooks with it: over there they do nothing."""
        copied = object.__new__(type(self))
        vars(copied).update(vars(self), is_open=False, _log=UndoLog())
        return copied

    def _install(self) -> None:
        if let_rest(self.unet, self.layout.unet, self._log):  # a compiled graph runs no hooks that came after it
            self._note("torch.compile is bypassed while attention maps are gathered.")
        self._log.hook(self.layout.unet.register_forward_pre_hook(self._before_call, with_kwargs=True))
        for transformer in self._transformers:
            seen: list[tuple[int, int]] = []
            self._log.hook(transformer.register_forward_pre_hook(partial(_note_size, seen), with_kwargs=True))
            for attention in _cross_attentions(transformer):
                hook = partial(self._before_attention, seen)
                self._log.hook(attention.register_forward_pre_hook(hook, with_kwargs=True))

    # Gathering -------------------------------------------------------------------------------------------------------

    def rows(self, images: Sequence[int | None]) -> None:
        """Say, before a denoiser call, whose the rows of the coming UNet calls are, in order over all of these calls.

        images: for each row the image whose prompt it has (the number that `result` takes), None for an unconditional
        row. Rows of calls for which nothing was told are not read.
        """
        self._told, self._cursor = tuple(images), 0

    def _before_call(self, _unet: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.is_open:
            return
        x = _argument(args, kwargs, 0, "x", "sample")
        count = x.shape[0]
        told = self._told[self._cursor : self._cursor + count]
        if len(told) < count:
            self._now = ()
            self._note(f"a UNet call of {count} rows was not read: maps.rows() had told of {len(told)}.")
            return
        self._cursor += count
        self._now = told
        self._size = self._size or tuple(x.shape[-2:])
        self._calls.update(image for image in told if image is not None)

    @torch.no_grad()
    def _before_attention(self, seen: list[tuple[int, int]], attention: nn.Module, args: tuple, kwargs: dict) -> None:
        wanted = [row for row, image in enumerate(self._now) if image is not None]
        if not self.is_open or not wanted:
            return
        x = _argument(args, kwargs, 0, "x", "hidden_states")
        context = _argument(args, kwargs, 1, "context", "encoder_hidden_states")
        if isinstance(context, tuple):  # diffusers with an IP-Adapter: the text, then pictures
            context = context[0]
        if context is None:
            return self._note("a layer was not read: it was given no prompt.")
        size = seen[-1] if seen else (0, 0)
        if x.shape[0] != len(self._now) or context.shape[0] != len(self._now) or x.shape[1] != size[0] * size[1]:
            return self._note("a layer was not read: its tokens are merged or tiled by something else.")
        kind = _Kind(tuple(self._now[row] for row in wanted), size, context.shape[1], x.device)
        queries = attention.to_q(_pick(x, wanted))
        keys = attention.to_k(_pick(context, wanted))
        found = mean_over_heads(queries, keys, attention.heads, getattr(attention, "scale", None))
        self._sums[kind] = self._sums[kind] + found if kind in self._sums else found
        self._counts[kind] += 1

    # What was found --------------------------------------------------------------------------------------------------

    @property
    def grid(self) -> tuple[int, int] | None:
        """(height, width) of the results; None before the first call where no size was given."""
        if self._size is None:
            return None
        return tuple(-(-length // 2**self.level) for length in self._size)

    def calls(self, image: int = 0) -> int:
        """How many rows of UNet calls had this image's prompt."""
        return self._calls[image]

    def result(self, image: int = 0) -> torch.Tensor:
        """The mean map of an image: (height, width, tokens) of `grid`, fp32 on the CPU.

        Maps of other sizes (RAU-Net changes them from step to step) are brought to the grid; where the context's length
        changed during the run, tokens that a call did not have count as zero in it.
        Raises `HiresError` if nothing was gathered for this image.
        """
        kinds = [kind for kind in self._sums if image in kind.images]
        if not kinds:
            why = " ".join(self.notes) or "The layers that are read were not called; an extension may replace them."
            raise HiresError(f"no attention map was gathered for image {image}. {why}")
        tokens = max(kind.tokens for kind in kinds)
        total, count = torch.zeros(*self.grid, tokens, dtype=torch.float64), 0
        for kind in kinds:
            rows = [row for row, other in enumerate(kind.images) if other == image]
            summed = self._sums[kind].cpu().double()[rows].sum(0)
            total[..., : kind.tokens] += fit_map(summed.view(*kind.size, kind.tokens), self.grid)
            count += len(rows) * self._counts[kind]
        return (total / count).float()[..., self.skip_tokens :]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


# The mathematics ------------------------------------------------------------------------------------------------------


def mean_over_heads(queries: torch.Tensor, keys: torch.Tensor, heads: int, scale: float | None = None) -> torch.Tensor:
    """softmax(q k^T scale), mean over heads, in fp32, a few heads at a time.

    queries: (B, N, heads * D); keys: (B, T, heads * D); scale: 1/sqrt(D) if None. Returns (B, N, T).
    """
    queries, keys = (rearrange(each, "b n (h d) -> b h n d", h=heads).float() for each in (queries, keys))
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    at_once = max(1, _ELEMENTS // (queries.shape[0] * queries.shape[2] * keys.shape[2]))
    with _full_precision(queries.device.type):
        total = sum(
            torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1).sum(1)
            for q, k in zip(queries.split(at_once, 1), keys.split(at_once, 1))
        )
    return total / heads


def fit_map(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A map (h, w, T) at another size: means of areas along what shrinks, linear along what grows."""
    values = rearrange(values, "h w t -> 1 t h w")
    shrunk = tuple(min(have, want) for have, want in zip(values.shape[-2:], size))
    if shrunk != tuple(values.shape[-2:]):
        values = F.interpolate(values, size=shrunk, mode="area")
    if shrunk != size:
        values = F.interpolate(values, size=size, mode="bilinear", align_corners=False)
    return rearrange(values, "1 t h w -> h w t")


def _full_precision(device: str) -> contextlib.AbstractContextManager:
    """Autocast off: it would multiply in half precision."""
    return torch.autocast(device, enabled=False) if device in _AUTOCAST_DEVICES else contextlib.nullcontext()


# Finding things -------------------------------------------------------------------------------------------------------


def _readable(layout: Layout) -> tuple[int, list[nn.Module]]:
    """The level nearest to `LEVEL` whose transformers read the prompt (of two as near the finer), and these."""
    for level in sorted(range(layout.structure.levels), key=lambda level: (abs(level - LEVEL), level)):
        transformers = [each for each in layout.transformers(level) if _cross_attentions(each)]
        if transformers:
            return level, transformers
    raise UnsupportedModel(
        f"this {type(layout.unet).__name__} has no cross-attention outside its middle block, so no attention maps. "
        "Choose a method that needs none, such as DemoFusion."
    )


def _cross_attentions(transformer: nn.Module) -> list[nn.Module]:
    found = (getattr(block, "attn2", None) for block in transformer.transformer_blocks)
    return [each for each in found if all(hasattr(each, name) for name in ("to_q", "to_k", "heads"))]


def _argument(args: tuple, kwargs: dict, index: int, *names: str) -> Any:
    """An argument by position, else by the first of these names that was given; None without."""
    return args[index] if len(args) > index else next((kwargs[name] for name in names if name in kwargs), None)


def _note_size(seen: list[tuple[int, int]], _transformer: nn.Module, args: tuple, kwargs: dict) -> None:
    seen[:] = [tuple(_argument(args, kwargs, 0, "x", "hidden_states").shape[-2:])]


def _pick(values: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """These rows; without a transfer of indices to the device."""
    return values if len(rows) == values.shape[0] else torch.stack([values[row] for row in rows])
