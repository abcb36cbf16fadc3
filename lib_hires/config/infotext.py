"""The generation parameters that WebUIs write into a picture's PNG text `parameters`, written and read.

    prompt, any number of lines
    Negative prompt: text
    Steps: 20, Sampler: euler, CFG scale: 7, Seed: 1, Size: 512x512, HL Method: HiDiffusion, ...

A value with a comma, a colon, a line break or a quotation mark at its start is quoted as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

PNG_KEY = "parameters"
_NEGATIVE = "Negative prompt: "
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_FEWEST_PAIRS = 3


def write_parameters(prompt: str, negative: str, keys: Mapping[str, object]) -> str:
    """The text block of a picture."""
    lines = [prompt] + ([_NEGATIVE + negative] if negative else [])
    return "\n".join([*lines, ", ".join(f"{key}: {_quote(str(value))}" for key, value in keys.items())])


def read_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """(prompt, negative prompt, keys) of a text block; keys are empty where the last line holds none."""
    *lines, last = text.strip().split("\n")
    pairs = _pairs(last)
    if len(pairs) < _FEWEST_PAIRS:
        lines, pairs = [*lines, last], []
    starts = [index for index, line in enumerate(lines) if line.startswith(_NEGATIVE)]
    start = starts[-1] if starts else len(lines)
    negative = "\n".join(lines[start:])[len(_NEGATIVE) :]
    return "\n".join(lines[:start]).strip(), negative.strip(), {key: _unquote(value) for key, value in pairs}


def _pairs(line: str) -> list[tuple[str, str]]:
    """The `key: value` pairs of a line, in one pass over it."""
    found, place = [], 0
    while place < len(line):
        match = _PAIR.match(line, place)
        if match:
            found.append(match.groups())
        comma = line.find(",", place)
        place = match.end() if match else comma + 1 or len(line)
    return found


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n]|^"', value) else value


def _unquote(value: str) -> str:
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value
