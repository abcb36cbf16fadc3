"""Words of a prompt and where they stand among its tokens; the prompt that a window's kept words make.

    pieces   a</w>  dragon  fly</w>  ,</w>  blue</w>        columns  1  2  3  4  5
    words    a (1)  dragonfly, (2 3)  blue (5)

A word is what CLIP's byte-pair encoding ends with `</w>`, never one of its pieces (AccDiffusion's published code takes the
pieces apart: `per_token` does so too). CLIP's tokens do not depend on spaces or case between words, so that joining all
words gives the prompt's own tokens again. Source: AccDiffusion (arXiv 2407.10738), patch-content-aware prompts.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

END = "</w>"
CHUNK, CHUNK_COLUMNS = 75, 77
"""Tokens of the prompt in a chunk, and columns of the context that it takes: start, tokens, end."""
_CLITICS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_WORDLIKE = ("L", "N", "So")
"""Unicode categories that make a word: letters, numbers, pictures (an emoji is no punctuation)."""
_DIGITS = 4


@dataclass(frozen=True)
class Word:
    """A word as it is written in a prompt, with the punctuation behind it.

    columns: the context's tokens whose maps say where the word is. weight: its emphasis. chunk: the one it begins in.
    """

    text: str
    columns: tuple[int, ...]
    weight: float = 1.0
    chunk: int = 0


def chunk_columns(count: int) -> list[int]:
    """The context's columns of `count` tokens in chunks of 75: 1..75, 78..152, ... (column 0 is the start token)."""
    return [CHUNK_COLUMNS * (index // CHUNK) + 1 + index % CHUNK for index in range(count)]


def words_of_tokens(
    pieces: Sequence[str | None],
    columns: Sequence[int],
    weights: Sequence[float] | None = None,
    per_token: bool = False,
) -> list[Word]:
    """The words of a prompt, in order.

    pieces: the tokenizer's pieces of CLIP's vocabulary, None for start, end and padding. columns, weights: of each piece.
    A word goes on over a None (chunks cut words). An embedding stands as its name, empty pieces and a last `</w>`.

    A word's weight is that of its first piece. Punctuation and endings ("'s") belong to the word before them (at the
    beginning of a prompt to the word behind) and to its weight; their own columns say nothing about where it is. Of
    punctuation alone one word is made.
    A word that is repeated stays where it is each time, with the columns of all its places: they share one mask, and all
    are kept or none. per_token: each piece is a word of its own, as published.
    Raises `ValueError` where the numbers of pieces, columns and weights differ.
    """
    weights = [1.0] * len(pieces) if weights is None else weights
    tokens = [each for each in zip(pieces, columns, weights, strict=True) if each[0] is not None]
    if per_token:
        return [_word([token]) for token in tokens]
    return _share_columns(_whole_words(tokens))


def join(words: Iterable[Word], emphasis: bool = True) -> str:
    """The prompt of these words: separated by spaces, `(two words:1.2)` where a weight is not 1, BREAK before each chunk but
    the first, so that words stay in the chunk that they were in.

    Parentheses, brackets and backslashes are escaped, as the WebUIs ask; with emphasis=False none of this is done.
    """
    words = list(words)
    if not emphasis:
        return " ".join(word.text for word in words)
    parts: list[str] = []
    for (chunk, weight), group in groupby(words, key=lambda word: (word.chunk, round(word.weight, _DIGITS))):
        parts += ["BREAK"] * (chunk - parts.count("BREAK"))
        parts.append(_emphasised(" ".join(_escaped(word.text) for word in group), weight))
    return " ".join(parts)


# Words out of pieces --------------------------------------------------------------------------------------------------


def _whole_words(tokens: Iterable[tuple[str, int, float]]) -> list[tuple[str, Word]]:
    """(the word alone, the word with its punctuation) in order."""
    words: list[tuple[str, Word]] = []
    leading: list[Word] = []
    for found in _ended(tokens):
        if _is_word(found.text):
            text = " ".join([*(each.text for each in leading), found.text])
            words.append((found.text, replace(found, text=text)))
            leading = []
        elif words:
            alone, word = words[-1]
            gap = "" if word.text[-1].isalnum() else " "
            words[-1] = alone, replace(word, text=word.text + gap + found.text)
        else:
            leading.append(found)
    if leading:
        text = " ".join(each.text for each in leading)
        columns = tuple(column for each in leading for column in each.columns)
        words.append((text, replace(leading[0], text=text, columns=columns)))
    return words


def _ended(tokens: Iterable[tuple[str, int, float]]) -> Iterator[Word]:
    """Pieces put together up to each `</w>`, and what is left at the end."""
    pieces: list[tuple[str, int, float]] = []
    for token in tokens:
        pieces.append(token)
        if token[0].endswith(END):
            yield _word(pieces)
            pieces = []
    if pieces:
        yield _word(pieces)


def _word(pieces: Sequence[tuple[str, int, float]]) -> Word:
    _, first, weight = pieces[0]
    columns = tuple(column for _, column, _ in pieces)
    return Word(_text([piece for piece, _, _ in pieces]), columns, weight, first // CHUNK_COLUMNS)


def _share_columns(words: Sequence[tuple[str, Word]]) -> list[Word]:
    places: dict[str, set[int]] = {}
    for alone, word in words:
        places.setdefault(alone.casefold(), set()).update(word.columns)
    return [replace(word, columns=tuple(sorted(places[alone.casefold()]))) for alone, word in words]


def _is_word(text: str) -> bool:
    return text not in _CLITICS and any(unicodedata.category(letter).startswith(_WORDLIKE) for letter in text)


# Text out of pieces ---------------------------------------------------------------------------------------------------


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in CLIP's vocabulary: itself where it can be seen, else one from 256 up."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTES = _byte_letters()


def _text(pieces: Sequence[str]) -> str:
    """The text of pieces; what is not written in the vocabulary's letters (an embedding's name) stays as it is."""
    letters = "".join(piece.removesuffix(END) for piece in pieces)
    try:
        return bytes(_BYTES[letter] for letter in letters).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return letters


# Emphasis -------------------------------------------------------------------------------------------------------------


def _escaped(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "\\()[]" else letter for letter in text)


def _emphasised(text: str, weight: float) -> str:
    if weight == 1:
        return text
    number = f"{weight:.{_DIGITS}f}".rstrip("0").rstrip(".")
    return f"({text}:{number})"
