"""ControlNet (the extension sd-webui-controlnet) on a canvas: every view gets its own part of each unit's hint.

    its script in p.scripts -> latest_network (the hook on the UNet) -> control_params, one for each unit that is on
      Hints          hints at the stage's size while a stage runs; before each call of the network the parts of its tiles
        views        cut out as their latents are
        grids        sampled as their latents are
      a Canny unit   under AccDiffusion v2 the edges of the stage before, on local views only (`edge_param`, `edges_of`)

Nothing is imported from the extension; without it nothing is found, and nothing is done. Everything is put back when a stage
ends or fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...canvas.canvas import LOCAL, Tile
from ...canvas.hints import Hint
from ...plan.models import LATENT_FACTOR
from ...stages.edge_hints import edge_hint
from ...stages.progressive import StageRun
from .decoding import Decoding

NO_UNIT = (
    "the edges of AccDiffusion v2 are left out (this is v1): no ControlNet unit with a Canny model is on. "
    "Switch one on in the ControlNet extension."
)
NOT_PLACED = ("AttentionInjection", "ReVision", "T2I_StyleAdapter", "IPAdapter", "Controlllite")
"""Kinds of units whose hints do not lie on the picture: what they show holds for every view."""
MARK = 1024
"""The extension puts a token of +MARK (cond) or -MARK (uncond) before each context, and takes it off in the UNet."""
_CHANGED = ("hint_cond", "hr_hint_cond", "weight", "advanced_weighting", "guidance_stopped", "effective_region_mask")
_KEPT_BYTES = 2**29


def params_of(p: Any) -> list[tuple[Any, str]]:
    """(control param, name of its model) of each ControlNet unit that acts on this job; [] without the extension."""
    for script in getattr(getattr(p, "scripts", None), "alwayson_scripts", None) or ():
        params = getattr(getattr(script, "latest_network", None), "control_params", None)
        if params:
            units = list(getattr(script, "enabled_units", None) or ())
            names = [str(getattr(unit, "model", None) or "") for unit in units]
            return list(zip(params, names if len(names) == len(params) else [""] * len(params)))
    return []


def edge_param(p: Any) -> Any:
    """The first unit with a Canny model or preprocessor, which AccDiffusion v2 takes over; None where there is none."""
    for param, model in params_of(p):
        preprocessor = getattr(param, "preprocessor", None) or {}
        if _is_placed(param) and "canny" in f"{preprocessor.get('name', '')} {model}".lower():
            return param
    return None


def is_marked(context: Tensor) -> bool:
    """Whether a row's context (T, C) begins with the extension's own token."""
    return bool(((context[0].float().abs() - MARK).abs().mean() < 1e-3).item())


class Hints:
    """The hints of all units during one run of a sampler: `with Hints(...):`.

    run: the stage; sampler: the host's, for its step; takes_edges: the job is AccDiffusion v2's.
    """

    def __init__(self, p: Any, run: StageRun, sampler: Any, takes_edges: bool = False):
        self.p, self.run, self.sampler, self.takes_edges = p, run, sampler, takes_edges
        self.is_hires = bool(getattr(p, "is_hr_pass", False))
        self._params: list[Any] = []
        self._before: list[tuple[Any, dict[str, Any]]] = []
        self._taken: Any = None
        self._full: dict[tuple[int, str], Tensor] = {}
        self._ready: dict[tuple[int, str], Hint] = {}
        self._crops: dict[tuple, Tensor] = {}
        self._kept = self._rows = 0

    def __enter__(self) -> Hints:
        self._params = [param for param, _ in params_of(self.p)]
        self._taken = edge_param(self.p) if self.takes_edges else None
        self._before = [
            (param, {name: getattr(param, name) for name in _CHANGED if hasattr(param, name)}) for param in self._params
        ]
        try:
            for number, param in enumerate(self._params):
                self._measure(number, param)
            self.whole()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Put everything back; any number of times."""
        while self._before:
            param, values = self._before.pop()
            for name, value in values.items():
                setattr(param, name, value)
            _forget(param)
        self._params, self._taken = [], None
        self._full.clear()
        self._ready.clear()
        self._crops.clear()

    def _measure(self, number: int, param: Any) -> None:
        """Find what lies on the picture, and bring it to the stage's size."""
        if not _is_placed(param):
            return
        hint = _own_hint(param, self.is_hires)
        if param is self._taken and self.run.hint is not None:
            hint = self.run.hint.to(hint)
        size = tuple(length * LATENT_FACTOR for length in self.run.size)
        self._full[number, "hint"] = _sized(hint, size, "bicubic")
        mask = getattr(param, "effective_region_mask", None)
        if isinstance(mask, Tensor) and mask.dim() == 4:
            self._full[number, "mask"] = _sized(mask, size, "bilinear")

    # Before each call --------------------------------------------------------------------------------------------------

    def whole(self) -> None:
        """The next call of the network is one for the whole picture."""
        self._forget_rows(0)
        for number, param in enumerate(self._params):
            if (number, "hint") in self._full:
                self._put(number, param, [None], ())
        self._as_set()

    def show(self, tiles: Sequence[Tile], images: Sequence[int]) -> None:
        """The next call is one for tiles of one kind. images: of each row of one tile."""
        images = tuple(images)
        alone = len(tiles) == 1 and len(set(images)) == 1
        self._forget_rows(len(tiles) * len(images))
        for number, param in enumerate(self._params):
            if (number, "hint") in self._full:
                self._put(number, param, tiles, images[:1] if alone else images)
        if self.run.stage.canvas.edges is None:
            self._as_set()
        elif self._taken is not None:
            self._weigh(tiles[0])

    def _as_set(self) -> None:
        """The unit whose edges are taken acts by its own settings, but not by a black picture, and not where it has edges."""
        if self._taken is not None and (self.run.hint is not None or not bool(self._taken.hint_cond.any())):
            self._taken.guidance_stopped = True

    def _forget_rows(self, rows: int) -> None:
        """A reference's latents are repeated for the rows of a call and kept: another number needs them anew."""
        before, self._rows = self._rows, rows
        if rows == before:
            return
        for number, param in enumerate(self._params):
            if (number, "hint") not in self._full and hasattr(param, "hint_cond"):
                param.hint_cond = param.hint_cond

    def _weigh(self, tile: Tile) -> None:
        """The edges' share at this step; none outside of local views."""
        denoiser, edges = self.sampler.model_wrap_cfg, self.run.stage.canvas.edges
        is_wanted = edges is not None and self.run.hint is not None and tile.kind == LOCAL
        share = edges.share(denoiser.step, denoiser.total_steps) if is_wanted else 0.0
        self._taken.weight, self._taken.advanced_weighting = share, None
        self._taken.guidance_stopped = share == 0

    def _put(self, number: int, param: Any, tiles: Sequence[Tile | None], images: tuple[int, ...]) -> None:
        hint = torch.cat([self._part(number, "hint", tile, images) for tile in tiles])
        has_two = self.is_hires and isinstance(param.hr_hint_cond, Tensor)
        param.hint_cond = hint
        param.hr_hint_cond = hint if has_two else None  # else the extension would choose between the two by size
        if (number, "mask") in self._full:
            param.effective_region_mask = torch.cat([self._part(number, "mask", tile, images) for tile in tiles])
        _forget(param)

    def _part(self, number: int, name: str, tile: Tile | None, images: tuple[int, ...]) -> Tensor:
        """What belongs to a tile, (len(images), C, h, w); kept for the stage as far as memory allows."""
        full = self._full[number, name]
        if tile is None:
            return full
        key = (number, name, tile.kind, tile.index, tile.places, tile.turns, images)
        found = self._crops.get(key)
        if found is None:
            if (number, name) not in self._ready:
                self._ready[number, name] = Hint(full, self.run.size, self.run.stage.canvas)
            found = self._ready[number, name].crop(tile, images)
            size = found.element_size() * found.nelement()
            if self._comes_again(tile) and self._kept + size <= _KEPT_BYTES:
                self._crops[key] = found
                self._kept += size
        return found

    def _comes_again(self, tile: Tile) -> bool:
        """Whether a tile lies at the same place at the next step too."""
        local = self.run.stage.canvas.local
        return tile.turns is None and (tile.kind != LOCAL or local.jitter == 0 or local.jitter_once)


class Silent:
    """No unit acts: `with Silent(p):`, for looks at other sizes than the job's."""

    def __init__(self, p: Any):
        self.p = p
        self._before: list[tuple[Any, bool]] = []

    def __enter__(self) -> Silent:
        self._before = [(param, param.guidance_stopped) for param, _ in params_of(self.p)]
        for param, _ in self._before:
            param.guidance_stopped = True
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            param, stopped = self._before.pop()
            param.guidance_stopped = stopped


def _is_placed(param: Any) -> bool:
    """Whether a unit's hint is a picture that lies on the picture."""
    hint = getattr(param, "hint_cond", None)
    kind = getattr(getattr(param, "control_model_type", None), "name", "")
    return isinstance(hint, Tensor) and hint.dim() == 4 and kind not in NOT_PLACED


def _own_hint(param: Any, is_hires: bool) -> Tensor:
    """The hint of this pass: the hires pass has one of its own."""
    other = getattr(param, "hr_hint_cond", None)
    return other if is_hires and isinstance(other, Tensor) and other.dim() == 4 else param.hint_cond


def _sized(hint: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """A picture (B, C, H, W) at another size, in its range."""
    if tuple(hint.shape[-2:]) == size:
        return hint
    resized = F.interpolate(hint.float(), size=size, mode=mode, antialias=True)
    return resized.clamp(float(hint.min()), float(hint.max())).to(hint)


def _forget(param: Any) -> None:
    """A T2I-Adapter keeps what it made of its hint."""
    model = getattr(param, "control_model", None)
    if hasattr(model, "control") and hasattr(model, "reset"):
        model.reset()


# Edges -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def edges_of(latents: Tensor, run: StageRun) -> Tensor:
    """(B, 3, 8 H, 8 W) edges in 0..1 for a stage. latents: (B, C, h, w) of the stage before, or of the picture given.

    See `edge_hint`.
    """
    return edge_hint(_decoded(latents), run)


def _decoded(latents: Tensor) -> list[np.ndarray]:
    """RGB pictures, (H, W, 3) bytes each, as the host decodes them; in tiles where memory asks for it."""
    from modules import sd_samplers_common, shared

    decoding, pictures = Decoding(), []
    decoding.open(latents)
    try:
        for latent in latents:
            picture = sd_samplers_common.decode_first_stage(shared.sd_model, latent[None])[0].float().nan_to_num()
            levels = ((picture + 1) * 127.5).round().clamp(0, 255).byte()
            pictures.append(np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy()))
    finally:
        decoding.close()
    return pictures
