"""What every bench does with its figures: where they come from in a line, a JSON file, a table, and a page of docs/.

A page's figures lie between marks, `<!-- quality -->` and `<!-- /quality -->`; `--publish` puts a run's table there, under
a line that names its date, device, commit and command. What such marks enclose is never written by hand.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).parent.parent / "docs"


def add_options(parser: argparse.ArgumentParser, out: str, page: str, section: str) -> None:
    """`--out` and `--publish`: into `section` of `page`, or the one that is named; with "-gpu" behind it where it was no CPU."""
    parser.add_argument("--out", type=Path, default=Path(out), help=f"where the figures go (default {out})")
    parser.add_argument(
        "--publish", nargs="?", const=True, metavar="SECTION", help=f"put the table into docs/{page}, between its marks"
    )
    parser.set_defaults(page=page, section=section)


def about(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """When, where and with what something was measured."""
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "changed": bool(_git("status", "--porcelain", "--", "../lib_hires", "../benchmarks")),
        "threads": torch.get_num_threads(),
    }


def finish(
    options: argparse.Namespace, command: Sequence[str], head: Mapping[str, Any], data: Mapping[str, Any], text: str
) -> None:
    """Write `data` under `head` as JSON and `text` as Markdown beside it, print that, and publish it where that was asked for.

    `command`: the bench's module and its arguments; `options.out`: the JSON file. `head`: `about`, asked before measuring, and
    whatever else the figures hang on, under names that can be read.
    """
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": dict(head), **data}, indent=2), encoding="utf-8")
    text = f"{in_words(head, command)}\n\n{text}"
    options.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if options.publish:
        section = options.section if options.publish is True else options.publish
        publish(DOCS / options.page, section + ("" if _is_cpu(head) else "-gpu"), text)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table of `columns` and, under each, what `rows` hold."""
    lines = [columns, *rows]
    written = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return "\n".join([written[0], "|" + "---|" * len(columns), *written[1:]])


def in_words(head: Mapping[str, Any], command: Sequence[str]) -> str:
    """One line: when, where, with what and how."""
    known = ("date", "device", "threads", "dtype", "torch", "commit", "changed")
    threads = f" with {head['threads']} threads" if _is_cpu(head) else ""
    commit = f"{head['commit']}{' with changes' if head['changed'] else ''}"
    more = "".join(f", {name} {value}" for name, value in head.items() if name not in known)
    return (
        f"{head['date']}, {head['device']}{threads}, {head['dtype']}, torch {head['torch']}, commit {commit}{more}; "
        f"`python -m {shlex.join(command)}`."
    )


def _is_cpu(head: Mapping[str, Any]) -> bool:
    return str(head["device"]).startswith("CPU")


def command_of(module: str, arguments: Sequence[str] | None) -> list[str]:
    """How a bench was called, without what only says where its figures go."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    kept = []
    while given:
        word = given.pop(0)
        if word == "--out" or (word == "--publish" and given and not given[0].startswith("--")):
            del given[:1]
        elif word != "--publish" and not word.startswith(("--out=", "--publish=")):
            kept.append(word)
    return [module, *kept]


def publish(page: Path, section: str, text: str) -> None:
    """Replace what a page has between a section's marks. Raises `SystemExit` naming the sections that there are."""
    written = page.read_text(encoding="utf-8")
    marks = f"<!-- {section} -->\n", f"<!-- /{section} -->"
    if any(written.count(mark) != 1 for mark in marks):
        there = ", ".join(re.findall(r"<!-- (?!/)(.+?) -->\n", written)) or "none"
        raise SystemExit(f"Hires Lab: {page.name} has no marks for '{section}'; it has them for {there}.")
    before, _, rest = written.partition(marks[0])
    page.write_text(f"{before}{marks[0]}{text}\n{marks[1]}{rest.partition(marks[1])[2]}", encoding="utf-8")


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=DOCS).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
