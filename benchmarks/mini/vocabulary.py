"""CLIP's vocabulary cut down to the words of the drawn world: an embedding of some hundred rows instead of 49,408.

Byte pair encoding joins pieces in the order of its merges. A table of every merge that some words go through, in the
same order, cuts these words as the whole table does; all other text falls to smaller pieces, down to single bytes.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from lib_hires.engines.sidecar import CLIP_FOLDER, SMALL_FOLDER, vocabulary_size

BYTES = 512  # CLIP's vocabulary starts with every byte, inside a word and at its end
END_OF_WORD = "</w>"
SPECIAL = ("<|startoftext|>", "<|endoftext|>")

Pair = tuple[str, str]


def size() -> int:
    """Tokens in the bundled small vocabulary."""
    return vocabulary_size(SMALL_FOLDER)


def save(folder: Path, words: list[str]) -> None:
    """Write a tokenizer's folder (as transformers reads it, with a text encoder's config) that cuts `words` as CLIP does."""
    head, *lines = (CLIP_FOLDER / "merges.txt").read_text(encoding="utf-8").splitlines()
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    merges = sorted({pair for word in words for pair in merges_of(word, ranks)}, key=ranks.get)
    whole = json.loads((CLIP_FOLDER / "vocab.json").read_text(encoding="utf-8"))
    tokens = [*list(whole)[:BYTES], *map("".join, merges), *SPECIAL]
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).write_bytes((CLIP_FOLDER / name).read_bytes())
    config = json.loads((CLIP_FOLDER / "config.json").read_text(encoding="utf-8"))
    config |= {"vocab_size": len(tokens), "bos_token_id": len(tokens) - 2}
    config |= dict.fromkeys(("eos_token_id", "pad_token_id"), len(tokens) - 1)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(
        json.dumps(dict(zip(tokens, range(len(tokens)))), ensure_ascii=False), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("\n".join([head, *map(" ".join, merges)]) + "\n", encoding="utf-8")


def merges_of(word: str, ranks: dict[Pair, int]) -> list[Pair]:
    """The merges that an ASCII word goes through, the lowest rank first, until none applies."""
    pieces, found = [*word[:-1], word[-1] + END_OF_WORD], []
    while pairs := [pair for pair in itertools.pairwise(pieces) if pair in ranks]:
        found.append(min(pairs, key=ranks.get))
        pieces = _joined(pieces, found[-1])
    return found


def _joined(pieces: list[str], pair: Pair) -> list[str]:
    joined = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] = joined[-1] + piece
        else:
            joined.append(piece)
    return joined
