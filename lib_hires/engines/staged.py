"""Stages and canvases in the standalone engine: what each view is told, window prompts, edges, a ControlNet.

Progressive (stages/) asks for one sampling run after another
  -> CanvasDenoiser   x, t -> Canvas.predict -> tiles -> the UNet, each told its place, its words and its edges
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..canvas.canvas import LOCAL, WHOLE, Tile, crop_numbers
from ..canvas.hints import Hint
from ..canvas.words import chunk_columns, words_of_tokens
from ..schedule import Moment
from ..stages.progressive import StageRun
from ..stages.window_prompts import window_texts
from . import prompts
from .components import Components
from .prompts import Conditioning


class CanvasDenoiser:
    """`denoiser(x, t)` for one stage: predictions on its canvas.

    plain: the `Denoiser` of whole pictures; images: of each of its rows; run: the stage; session: told each call's rows.
    control: a diffusers ControlNetModel or None. `at(moment, step, steps)` is to be called before each call.
    """

    def __init__(self, plain, images: Sequence[int], cfg: float, run: StageRun, session=None, control=None):
        self.plain, self.images, self.cfg, self.run = plain, tuple(images), cfg, run
        self.session, self.control = session, control
        self.moment, self.share = Moment(999.0, 1.0), 0.0
        size, plan = run.size, run.stage.canvas
        self.extra = None if plain.extra is None else Hint(plain.extra, size, plan)
        self.hint = None if control is None or run.hint is None else Hint(run.hint, size, plan)

    def at(self, moment: Moment, step: int, steps: int) -> None:
        """Where the sampler is."""
        self.moment = moment
        edges = self.run.stage.canvas.edges
        self.share = edges.share(step, steps) if edges else 0.0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x: (N, C, H, W) scaled latents; returns the prediction alike."""
        return self.run.canvas.predict(x, self.moment, self.images, lambda *call: self._evaluate(*call, t), self._guide)

    def _guide(self, rows: Tensor) -> Tensor:
        """Rows such that the sampler's guidance scale gives the views' own: u, u + (w_view / w) (c - u)."""
        own = self.run.stage.canvas.guidance
        if not own or self.cfg in (0, 1, own):
            return rows
        negative, positive = rows.chunk(2)
        return torch.cat([negative, negative + (own / self.cfg) * (positive - negative)])

    def _evaluate(self, x: Tensor, tiles: Sequence[Tile], t: Tensor) -> Tensor:
        told = _joined([self.told(tile) for tile in tiles])
        extra = None
        if self.extra is not None:
            extra = torch.cat([self.extra.crop(tile, self.images) for tile in tiles])
        residuals = {}
        if self.hint is not None and self.share > 0 and tiles[0].kind == LOCAL:
            hint = torch.cat([self.hint.crop(tile, self.images) for tile in tiles])
            residuals = control_residuals(self.control, x, t, told, hint, self.share)
        if self.session is not None:
            self.session.rows(self.images * len(tiles))
        return self.plain.evaluate(x, t, told, extra, residuals)

    def told(self, tile: Tile) -> Conditioning:
        """What the rows of one tile are told: the window prompt of a view, and where the view lies (SDXL)."""
        told = self.plain.conditioning
        if tile.kind == WHOLE:
            return told
        if tile.kind == LOCAL and self.run.prompts is not None:
            told = _replaced(told, self.run.prompts[tile.index], len(self.images) // len(self.run.canvas.seeds))
        if told.time_ids is None or tile.places is None:
            return told
        crops = crop_numbers(self.run.stage.canvas, tile, self.images)
        ids = told.time_ids.clone()
        ids[:, 2:4] = torch.tensor(crops, dtype=ids.dtype, device=ids.device)
        return replace(told, time_ids=ids)


def _replaced(told: Conditioning, positive: Conditioning, groups: int) -> Conditioning:
    """[negative x B, positive x B] or [positive x B] with other positive rows."""
    if groups == 1:
        return replace(positive, time_ids=told.time_ids)
    negative = told[: len(told) // 2]
    return replace(_joined([replace(negative, time_ids=None), positive]), time_ids=told.time_ids)


def _joined(parts: Sequence[Conditioning]) -> Conditioning:
    """The rows of several, one after another."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Conditioning(
        torch.cat([part.context for part in parts]),
        None if first.pooled is None else torch.cat([part.pooled for part in parts]),
        None if first.time_ids is None else torch.cat([part.time_ids for part in parts]),
    )


def control_residuals(control, x: Tensor, t: Tensor, told: Conditioning, hint: Tensor, share: float) -> dict:
    """A diffusers ControlNet's residuals as keyword arguments of the UNet. hint: (rows, 3, 8 h, 8 w) in 0..1."""
    down, middle = control(
        x.to(control.dtype),
        t,
        encoder_hidden_states=told.context.to(control.dtype),
        controlnet_cond=hint.to(control.dtype),
        conditioning_scale=share,
        added_cond_kwargs=told.added,
        return_dict=False,
    )
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def encode_windows(
    components: Components, negative: str, prompt: str, maps, run: StageRun, images: int
) -> list[Conditioning]:
    """For each view of a stage the conditioning of its window prompts, one row for each image; each text is encoded once.

    maps: the first stage's `AttentionMaps`.
    """
    pieces = components.tokenizers[0].tokenize(prompt)
    words = words_of_tokens(pieces, chunk_columns(len(pieces)), per_token=run.stage.canvas.published)
    everyone = range(images)
    texts = window_texts(
        run.canvas,
        {image: maps.result(image) for image in everyone},
        dict.fromkeys(everyone, words),
        {image: image for image in everyone},
        emphasis=False,
    )
    unique = list(dict.fromkeys(text for image in everyone for text in texts[image]))
    encoded = prompts.encode(components, [negative, prompt, *unique])  # beside these two: as many chunks as they have
    row_of = {text: row for row, text in enumerate(unique, start=2)}
    return [encoded[[row_of[texts[image][view]] for image in everyone]] for view in range(len(texts[0]))]
