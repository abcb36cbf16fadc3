"""Window prompts in AUTOMATIC1111: the words of its prompts as it tokenizes them, and the views' texts as it encodes them.

    prompt part -> chunks of 77 tokens with weights -> words and their columns -> kept words of each view -> text -> cond

Each AND part of each image is a prompt of its own, numbered as the rows of the host's batch are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ...canvas.words import CHUNK_COLUMNS, END, Word, words_of_tokens
from ...config.errors import HiresError
from ...stages.progressive import StageRun
from ...stages.window_prompts import window_texts
from ...unet.attention_maps import AttentionMaps

SCHEDULED = (
    "each view has the whole prompt: prompts that change during a run ([a:b:0.5], [a|b]) have no words of their own."
)
_TEXTS_AT_ONCE = 8


class Prompts:
    """The positive prompts of a pass. `note`: takes a sentence where views have to have the whole prompt."""

    def __init__(self, p: Any, note: Callable[[str], None]):
        from modules import prompt_parser

        self.p, self.note = p, note
        self.is_hires = bool(getattr(p, "is_hr_pass", False))
        prompts = prompt_parser.SdConditioning(p.hr_prompts if self.is_hires else p.prompts)
        parts, texts, _ = prompt_parser.get_multicond_prompt_list(prompts)
        numbered = [(image, texts[index]) for image, each in enumerate(parts) for index, _ in each]
        self.images = {number: image for number, (image, _) in enumerate(numbered)}
        self._texts = [text for _, text in numbered]

    def texts(self) -> list[str] | None:
        """The text of each prompt; None, and a note, where one changes during the run."""
        from modules import prompt_parser

        schedules = prompt_parser.get_learned_conditioning_prompt_schedules(self._texts, self.p.steps)
        if any(len(schedule) > 1 for schedule in schedules):
            self.note(SCHEDULED)
            return None
        return [schedule[-1][1] for schedule in schedules]

    def for_views(self, run: StageRun, maps: AttentionMaps | None) -> dict[int, list[Any]] | None:
        """For each prompt the cond of each view of a stage: a row of the context, or a dict of rows (SDXL).

        None, and a note, where views have to have the whole prompt.
        """
        texts = self.texts()
        if texts is None or maps is None:
            return None
        try:
            found = {number: maps.result(number) for number in self.images}
        except HiresError as error:
            self.note(f"each view has the whole prompt: {str(error).removeprefix('Hires Lab: ')}")
            return None
        per_token = run.stage.canvas.published
        words = {number: words_of_prompt(texts[number], per_token) for number in self.images}
        kept = window_texts(run.canvas, found, words, self.images, emphasis=reads_emphasis())
        return self._encoded(texts, kept)

    def _encoded(self, whole: Sequence[str], kept: dict[int, list[str]]) -> dict[int, list[Any]]:
        """Each text is encoded once, in batches beside the whole prompts: as many chunks as they have."""
        from modules import devices, prompt_parser, shared

        p = self.p
        size = (p.hr_upscale_to_x, p.hr_upscale_to_y) if self.is_hires else (p.width, p.height)
        unique = list(dict.fromkeys(text for texts in kept.values() for text in texts))
        beside = list(dict.fromkeys(whole))
        conds: dict[str, Any] = {}
        for first in range(0, len(unique), _TEXTS_AT_ONCE):
            batch = unique[first : first + _TEXTS_AT_ONCE]
            told = prompt_parser.SdConditioning([*beside, *batch], width=size[0], height=size[1])
            with devices.autocast():
                encoded = shared.sd_model.get_learned_conditioning(told)
            for row, text in enumerate(batch, start=len(beside)):
                conds[text] = _row(encoded, row)
        return {number: [conds[text] for text in texts] for number, texts in kept.items()}


def _row(encoded: Any, row: int) -> Any:
    return encoded[row] if isinstance(encoded, Tensor) else {key: value[row] for key, value in encoded.items()}


def reads_emphasis() -> bool:
    """Whether `(word:1.2)` means anything to the host now."""
    from modules import shared

    return getattr(shared.opts, "emphasis", "Original") != "None"


def words_of_prompt(text: str, per_token: bool = False) -> list[Word]:
    """The words of a prompt's text, with the columns of the context that they have here."""
    embedder = text_embedder()
    chunks, _ = embedder.tokenize_line(text)
    pieces: list[str | None] = []
    weights: list[float] = []
    for chunk in chunks:
        pieces += pieces_of_chunk(embedder, chunk)
        weights += chunk.multipliers
    columns = [CHUNK_COLUMNS * number + place for number in range(len(chunks)) for place in range(CHUNK_COLUMNS)]
    return words_of_tokens(pieces, columns, weights, per_token)


def pieces_of_chunk(embedder: Any, chunk: Any) -> list[str | None]:
    """The vocabulary's piece of each of a chunk's 77 tokens; None for start, end and padding; an embedding is its name."""
    ends = {embedder.id_start, embedder.id_end, embedder.id_pad}
    pieces = [None if token in ends else piece_of(embedder, token) for token in chunk.tokens]
    for offset, embedding in chunk.fixes:
        first, count = offset + 1, int(embedding.vectors)
        pieces[first : first + count] = [""] * count
        pieces[first] = embedding.name
        pieces[first + count - 1] += END
    return pieces


def piece_of(embedder: Any, token: int) -> str:
    """A token's piece: CLIP's tokenizer of transformers, or open_clip's."""
    tokenizer = getattr(embedder, "tokenizer", None)
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return tokenizer.convert_ids_to_tokens(token)
    from modules import sd_hijack_open_clip

    return sd_hijack_open_clip.tokenizer.decoder[token]


def text_embedder() -> Any:
    """The host's text encoder, the first of SDXL's two. Raises `HiresError` where there is none like it."""
    from modules import shared

    model = shared.sd_model.cond_stage_model
    for embedder in (model, *getattr(model, "embedders", ())):
        if hasattr(embedder, "tokenize_line"):
            return embedder
    raise HiresError(
        "this model's text encoder has no words that could be told apart. Use DemoFusion, or set 'word_share' to 0."
    )
