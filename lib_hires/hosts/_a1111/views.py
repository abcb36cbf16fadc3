"""A canvas in one sampling run of AUTOMATIC1111: the model's `apply_model` is asked for views instead of the whole.

    sampler -> CFGDenoiser.forward   first the state is pulled to the stage before (in place: the sampler goes on from it)
      -> denoiser -> apply_model(x, t, cond)   x scaled for the network, the result eps or v: where canvases work
           -> Canvas.predict -> apply_model of tiles, each told its words, its place (SDXL) and its part of a picture

`apply_model` is the one function below every sampler's own scalings, so nothing has to be converted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...canvas.canvas import LOCAL, Tile, crop_numbers
from ...canvas.hints import Hint
from ...schedule import Moment
from ...stages.progressive import StageRun
from .control import Hints, is_marked

TEXTS = ("c_crossattn", "crossattn")
XL_VECTOR, XL_CROPS, XL_WIDTH = 2816, 1792, 256
"""SDXL's vector: 1280 of the text, then six numbers of 256 columns each: size, crop (top, left), target size."""
SEPARATE = (
    "'view_guidance' has no effect where cond and uncond are drawn in separate calls: the sampler's scale is used."
)


class Views:
    """The network's answers on the canvas of one stage. `note`: takes a sentence for the user.

    `at(...)` is to be told before each call of the sampler's denoiser; it may call the network several times.
    """

    def __init__(self, run: StageRun, note: Callable[[str], None]):
        self.run, self.note = run, note
        self.session: Any = None
        self.hints: Hints | None = None
        self._moment = Moment(999.0, 1.0)
        self._rows: tuple[tuple[int, int | None], ...] = ()
        self._scale = 1.0
        self._cursor = 0
        self._started = False

    def at(self, moment: Moment, rows: Sequence[tuple[int, int | None]], scale: float, session: Any) -> None:
        """Where the run is. rows: (image, number of its prompt or None for uncond) of each row to come; scale: of CFG."""
        self._moment, self._rows, self._scale, self._cursor = moment, tuple(rows), scale, 0
        self.session = session

    def pull(self, state: Tensor, moment: Moment, scaled: bool, begin: bool) -> None:
        """Change the sampler's state (B, C, H, W) in place by the skip residual.

        scaled: the state is x / sqrt(sigma^2 + 1). begin: where this is the first call, start exactly at its noise level (the
        host's timestep samplers begin img2img one level below that of their noise).
        """
        run = self.run
        if run.reference is None or tuple(state.shape) != tuple(run.reference.shape):
            return
        if begin and scaled and not self._started:
            state.copy_((run.reference + moment.sigma * run.noise) / math.sqrt(moment.sigma**2 + 1))
        self._started = True
        if run.stage.canvas is not None and run.stage.canvas.skip_residual:
            state.copy_(run.pull(state, moment, scaled))

    def over(self, previous: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`apply_model` on the canvas; calls of other sizes or of unknown rows go through as they are."""

        def apply_model(x: Tensor, t: Tensor, cond: Any = None, *args: Any, **kwargs: Any) -> Tensor:
            rows = self._take(x.shape[0])
            canvas = self.run.canvas
            if not rows or canvas is None or canvas.covers_at_once or tuple(x.shape[-2:]) != tuple(self.run.size):
                if self.hints is not None:
                    self.hints.whole()
                return previous(x, t, cond, *args, **kwargs)
            images = tuple(image for image, _ in rows)

            def evaluate(inputs: Tensor, tiles: Sequence[Tile]) -> Tensor:
                self.session.rows(images * len(tiles))
                if self.hints is not None:
                    self.hints.show(tiles, images)
                told = joined([self.told(cond, tile, rows) for tile in tiles])
                return previous(inputs, t.repeat(len(tiles)), told, *args, **kwargs)

            return canvas.predict(x, self._moment, images, evaluate, lambda values: self._guided(values, rows))

        return apply_model

    def _take(self, count: int) -> tuple[tuple[int, int | None], ...]:
        rows = self._rows[self._cursor : self._cursor + count]
        if len(rows) < count:
            return ()
        self._cursor += count
        return rows

    def _guided(self, values: Tensor, rows: Sequence[tuple[int, int | None]]) -> Tensor:
        """Rows such that the sampler's guidance scale gives the views' own: c <- u + (w_view / w) (c - u)."""
        own = self.run.stage.canvas.guidance
        if not own or self._scale in (0, 1, own):
            return values
        uncond = {image: values[index] for index, (image, prompt) in enumerate(rows) if prompt is None}
        values = values.clone()
        for index, (image, prompt) in enumerate(rows):
            if prompt is None:
                continue
            if image not in uncond:
                self.note(SEPARATE)
                continue
            values[index] = uncond[image] + (own / self._scale) * (values[index] - uncond[image])
        return values

    # What a tile is told -----------------------------------------------------------------------------------------------

    def told(self, cond: dict[str, Any], tile: Tile, rows: Sequence[tuple[int, int | None]]) -> dict[str, Any]:
        """The conditioning of the rows of one tile. cond: what the host tells the whole picture, as lists and tensors."""

        def part(key: str, value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [part(key, each) for each in value]
            if not isinstance(value, Tensor):
                return value
            if key in TEXTS or key == "vector":
                value = self._with_window_prompts(key, value, tile, rows)
            if key == "vector":
                return self._with_crops(value, tile, rows)
            if key == "c_concat" and value.dim() == 4 and tuple(value.shape[-2:]) == tuple(self.run.size):
                return self._cropped(value, tile, rows)
            return value

        return {key: part(key, value) for key, value in cond.items()}

    def _with_window_prompts(self, key: str, value: Tensor, tile: Tile, rows: Sequence) -> Tensor:
        prompts = self.run.prompts
        if tile.kind != LOCAL or not prompts:
            return value
        value = value.clone()
        for index, (_, prompt) in enumerate(rows):
            if prompt in prompts:
                told = prompts[prompt][tile.index]
                found = told[key] if isinstance(told, dict) else told
                first = int(key in TEXTS and is_marked(value[index]))  # ControlNet's own token stays
                value[index, first:] = fitted(found, value[index, first:]) if key in TEXTS else found.to(value)
        return value

    def _with_crops(self, vector: Tensor, tile: Tile, rows: Sequence) -> Tensor:
        """SDXL is told where the view lies, as if it were a crop of a larger picture."""
        if vector.shape[-1] != XL_VECTOR or tile.places is None:
            return vector
        crops = torch.tensor(crop_numbers(self.run.stage.canvas, tile, [image for image, _ in rows]))
        vector = vector.clone()
        columns = slice(XL_CROPS, XL_CROPS + 2 * XL_WIDTH)
        vector[:, columns] = sinusoids(crops, XL_WIDTH).flatten(1).to(vector)
        return vector

    def _cropped(self, picture: Tensor, tile: Tile, rows: Sequence[tuple[int, int | None]]) -> Tensor:
        """Each row's own part of what is concatenated to its latent. picture: (N, c, H, W)."""
        plan, size = self.run.stage.canvas, self.run.size
        cut = [Hint(picture[row : row + 1], size, plan).crop(tile, [image]) for row, (image, _) in enumerate(rows)]
        return torch.cat(cut)


def sinusoids(numbers: Tensor, width: int) -> Tensor:
    """(..., width) embeddings cos | sin of numbers (...), as SDXL embeds sizes."""
    half = width // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = numbers[..., None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def fitted(text: Tensor, like: Tensor) -> Tensor:
    """A text's context (T, C) at the length of another; what is missing is the empty prompt, as the host pads."""
    from modules import shared

    missing = like.shape[0] - text.shape[0]
    if missing > 0:
        empty = shared.sd_model.cond_stage_model_empty_prompt[0].to(text)
        text = torch.cat([text, *[empty] * -(-missing // len(empty))])
    return text[: like.shape[0]].to(like)


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows of several tiles, tile after tile."""
    if len(parts) == 1:
        return parts[0]

    def join(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.cat(list(values))
        if isinstance(values[0], list):
            return [join(each) for each in zip(*values)]
        return values[0]

    return {key: join([part[key] for part in parts]) for key in parts[0]}
