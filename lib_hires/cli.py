"""The command line: a checkpoint file in, a picture out.

python -m lib_hires generate --prompt TEXT --width W --height H --method NAME --out FILE.png [...]
python -m lib_hires generate --from-image FILE.png --out AGAIN.png
python -m lib_hires generate --jobs FILE.jsonl
python -m lib_hires methods [--json | --markdown]
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config.codecs import format_value, from_argv, table
from .config.common import Common
from .config.errors import PREFIX, HiresError, SettingError, UnknownSetting
from .config.settings import Settings, schema
from .methods import NONE, methods
from .plan.method import Method, owned_rows, owners

SIDES = ("width", "height")
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells count it."""
JOB_DEFAULTS: dict[str, Any] = {
    "prompt": None, "negative": "", "width": 512, "height": 512, "method": NONE, "set": {}, "steps": 20, "cfg": 7.0,
    "sampler": "euler", "seed": 0, "batch": 1, "checkpoint": None, "device": "auto", "dtype": "auto", "out": None,
    "report": None, "from_image": None, "init_image": None, "denoise": 0.5, "controlnet": None, "decode_memory": 0,
}  # fmt: skip
HELP = {
    "prompt": "what to draw",
    "negative": "what not to draw",
    "width": "in pixels, a multiple of 8",
    "height": "in pixels, a multiple of 8",
    "method": "none, " + ", ".join(methods()),
    "set": "a setting of the method, NAME=VALUE; may be repeated (see the command `methods`)",
    "steps": "sampling steps",
    "cfg": "classifier-free guidance scale; 1 is without",
    "sampler": "euler, euler_a, dpmpp_2m_karras, ddim, ...",
    "seed": "of the first picture; the next ones have the next seeds",
    "batch": "pictures at once",
    "checkpoint": "a .safetensors or .ckpt file or a diffusers folder; without it the small bundled model",
    "device": "auto, cpu or cuda",
    "dtype": "auto, fp32, fp16 or bf16",
    "out": "the picture to write (PNG); -1, -2, ... are added to the name in a batch",
    "report": "a JSON report to write",
    "controlnet": "a Canny ControlNet for AccDiffusion v2: a diffusers folder or a file",
    "decode_memory": "MiB that decoding may take beside the weights, 0 for what is free: larger pictures come in exact tiles",
    "init_image": "a picture to start from, enlarged and cropped to width and height; a side that is not given follows it",
    "denoise": "with --init-image: the share of the steps that are run",
    "from_image": "repeat the picture of this file from the infotext in it; other flags override",
}


def run(arguments: list[str]) -> int:
    """Run one command; returns an exit status. Raises `HiresError` for what the user can mend."""
    options = parser().parse_args(arguments)
    if options.command == "methods":
        print(methods_as_json() if options.json else methods_as_markdown() if options.markdown else methods_as_text())
        return 0
    return generate(options)


def parser() -> argparse.ArgumentParser:
    """The flags; `generate`'s are made from `JOB_DEFAULTS`, which also names the keys of a jobs file."""
    result = argparse.ArgumentParser(
        prog="python -m lib_hires", description="Pictures far above a model's native size."
    )
    commands = result.add_subparsers(dest="command", required=True)
    draw = commands.add_parser("generate", help="draw pictures")
    for name, default in JOB_DEFAULTS.items():
        kind = type(default) if isinstance(default, (int, float)) else str
        extra = {"action": "append"} if name == "set" else {"type": kind}
        shown = "" if default in (None, "", {}) else f" (default {format_value(default)})"
        draw.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=HELP[name] + shown, **extra)
    draw.add_argument("--jobs", help="a file with one JSON object a line, with the names of these flags")
    draw.add_argument("--dry-run", action="store_true", help="print what would be done and stop")
    draw.add_argument("--quiet", action="store_true", help="no line of the plan and no progress bar")
    listing = commands.add_parser("methods", help="list the methods and their settings")
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.add_argument("--markdown", action="store_true", help="as the tables of docs/methods.md")
    return result


def generate(options: argparse.Namespace) -> int:
    """Draw what the flags or the jobs file ask for, in one process."""
    from .engines.runner import Runner

    given = {name: value for name, value in vars(options).items() if name in JOB_DEFAULTS}
    runner = Runner(quiet=options.quiet)
    lines = read_jobs(options.jobs) if options.jobs else [{}]
    jobs = []
    for number, line in enumerate(lines, start=1):
        with _naming_the_job(number, len(lines)):
            jobs.append(complete(given, line))
    if options.dry_run:
        made: set[Path] = set()
        for number, job in enumerate(jobs, start=1):
            start = Path(job["init_image"]).absolute() if job["init_image"] else None
            if start in made and not start.exists():
                print(f"'{job['init_image']}' is drawn by an earlier job: plan this one when it is there.")
            else:
                with _naming_the_job(number, len(jobs)):
                    print("\n".join(runner.plan(job)))
            made.update(_files_of(job, "out"))
        return 0
    _check_outputs(jobs)
    interrupt = Interrupt()
    for number, job in enumerate(jobs, start=1):
        with _naming_the_job(number, len(jobs)), interrupt:
            report = runner.draw(job, stopped=interrupt)
        print(
            f"[{number}/{len(jobs)}] " + ", ".join(report["files"]) + f": {report['seconds']:.1f} s, "
            f"{report['unet_calls']} UNet calls, {report['peak_memory'] / 2**20:.0f} MiB"
        )
        for note in report["notes"]:
            print("  " + note)
        if interrupt():
            left = len(jobs) - number
            print(
                f"Hires Lab: stopped, {left} of {len(jobs)} jobs are left." if left else "Hires Lab: stopped.",
                file=sys.stderr,
            )
            return INTERRUPTED
    return 0


@contextlib.contextmanager
def _naming_the_job(number: int, count: int) -> Iterator[None]:
    """An error that is meant for the user says which of several jobs it is about."""
    try:
        yield
    except HiresError as error:
        if count > 1:
            error.args = (f"{PREFIX}job {number} of {count}: {str(error).removeprefix(PREFIX)}",)
        raise


class Interrupt:
    """Ctrl-C while a picture is drawn: the first asks for the picture so far, the second raises `KeyboardInterrupt`.

    A context manager around drawing; called, it says whether it was asked. Before it is first called, once for each prediction,
    there is no picture yet, and the first Ctrl-C raises too. Where SIGINT is ignored or handled by others it is left to them.
    """

    def __init__(self) -> None:
        self._asked = self._drawing = self._installed = False

    def __call__(self) -> bool:
        self._drawing = True
        return self._asked

    def __enter__(self) -> Interrupt:
        is_main, self._drawing = threading.current_thread() is threading.main_thread(), False
        self._installed = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._installed:
            signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, *_error: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _stop(self, *_call: object) -> None:
        if self._asked or not self._drawing:
            raise KeyboardInterrupt
        self._asked = True
        told = "\nHires Lab: the pictures so far will be written; once more stops at once.\n"
        os.write(2, told.encode())  # a handler may come in the middle of another print


def complete(flags: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    """One job: a line of the jobs file over the flags over a picture's own parameters over the defaults."""
    given = {**flags, **line}
    given["set"] = {**_settings_of(flags), **_settings_of(line)}
    _check_kinds(given)
    repeated = {}
    if given.get("from_image"):
        from .engines.pictures import job_of_picture

        repeated = job_of_picture(Path(given["from_image"]))
    base = JOB_DEFAULTS | repeated
    job = {**base, **given}
    kept = base["set"] if job["method"] == base["method"] else {}
    job["set"] = {**kept, **given["set"]}
    if not job["prompt"]:
        raise HiresError("'prompt' is missing. Add --prompt TEXT or --from-image FILE.png.")
    if job.get("started_from") and not job["init_image"]:
        raise HiresError(f"'from_image' was drawn from the picture '{job['started_from']}'. Add --init-image FILE.")
    sides = {"width", "height"} & {*given, *repeated}
    if job["init_image"] and len(sides) < 2:
        from .engines.pictures import size_like

        job["width"], job["height"] = size_like(job["init_image"], *(job[n] if n in sides else None for n in SIDES))
    return job


def _settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """The `set` of a job as a dict. Raises `SettingError` for anything else, and for a method in it."""
    value = given.get("set", {})
    if isinstance(value, list) and all(isinstance(piece, str) for piece in value):
        value = from_argv(value)
    if not isinstance(value, dict):
        raise SettingError("set", value, "an object of names and values, or a list of 'name=value' texts")
    if "method" in value:
        raise SettingError("set", f"method={value['method']}", "settings of the method", "Choose it by 'method'.")
    return value


def _check_kinds(given: dict[str, Any]) -> None:
    """Raises `UnknownSetting` or `SettingError` for names that a job does not have and texts that are none."""
    for name, value in given.items():
        if name not in JOB_DEFAULTS:
            close = difflib.get_close_matches(name, JOB_DEFAULTS, 1)
            raise UnknownSetting(name, value, "a job", list(JOB_DEFAULTS), close)
        default = JOB_DEFAULTS[name]
        is_text = default is None or isinstance(default, str)
        if is_text and not isinstance(value, str) and (value is not None or default is not None):
            raise SettingError(name, value, "a text")
        if isinstance(value, str):
            _check_text(name, value)


def _check_text(name: str, value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise SettingError(
            name, value[:40].encode("ascii", "backslashreplace").decode(), "valid Unicode text"
        ) from None
    if "\0" in value:
        raise SettingError(name, value[:40], "a text without NUL characters")


def _check_outputs(jobs: list[dict[str, Any]]) -> None:
    """Raises `HiresError` where a picture or report would go nowhere, into a folder's name, or over another one, and where
    a job starts from a picture that will not be there or that it would write over."""
    taken: set[Path] = set()
    for job in jobs:
        if not job["out"]:
            raise HiresError("'out' is missing: where should the picture go? Add --out FILE.png.")
        for name in ("out", "report"):
            if not job[name]:
                continue
            if Path(job[name]).is_dir():
                raise SettingError(name, job[name], "a file's name", "It is a folder.")
            for path in _files_of(job, name):
                if path.is_dir():
                    raise SettingError(name, job[name], "a file's name", "It is a folder.")
                if path in taken:
                    raise SettingError(
                        name, job[name], "a name of its own", f"Another picture or report goes to {path.name} already."
                    )
                taken.add(path)
        _check_start(job, taken)


def _files_of(job: dict[str, Any], name: str) -> list[Path]:
    """The files that a job's `out` or `report` means; none where it is not given."""
    from .engines.job import MAX_BATCH
    from .engines.runner import picture_names

    batch = job["batch"] if name == "out" and isinstance(job["batch"], int) else 1
    return picture_names(Path(job[name]).absolute(), min(batch, MAX_BATCH)) if job[name] else []


def _check_start(job: dict[str, Any], taken: set[Path]) -> None:
    if not job["init_image"]:
        return
    path, out = Path(job["init_image"]).absolute(), Path(job["out"]).absolute()
    if path == out:
        raise SettingError("out", job["out"], "another file than 'init_image'", "The start would be lost.")
    if not path.exists() and path not in taken:
        raise SettingError("init_image", job["init_image"], "a picture that can be read", "There is no such file.")


def read_jobs(path: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; blank lines are skipped. Raises `HiresError` naming the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise HiresError(f"the jobs file '{path}' cannot be read: {error}.") from error
    jobs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            job = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise HiresError(f"line {number} of '{path}' is not JSON: {error}.") from error
        if not isinstance(job, dict):
            raise HiresError(f"line {number} of '{path}' is not an object. Write {{\"prompt\": ...}}.")
        jobs.append(job)
    return jobs


def methods_as_json() -> str:
    """Every method with its settings, from the schema."""
    listing = {
        name: {
            "title": cls.title,
            "summary": cls.summary,
            "use_when": cls.use_when,
            "source": cls.source,
            "settings": _schema_rows(cls),
        }
        for name, cls in methods().items()
    }
    return json.dumps({"methods": listing, "common": _schema_rows(Common)}, indent=2)


def methods_as_markdown() -> str:
    """The tables of docs/methods.md: each method's own settings, then once those that methods share."""
    parts, sharing = [], {}
    for name, cls in methods().items():
        shared = [owner for owner in owners(cls) if owner != name]
        for group in shared:
            sharing.setdefault(group, []).append(cls)
        links = ", ".join(f"*{group.capitalize()}*" for group in shared)
        pieces = [_own_table(cls, name) if name in owners(cls) else "", f"Shared settings: {links}." if shared else ""]
        parts.append("\n\n".join([f"### {cls.title} (`{name}`)", *filter(None, pieces)]))
    for group, classes in sharing.items():
        titles = ", ".join(cls.title for cls in classes)
        parts.append(f"### {group.capitalize()}, shared by {titles}\n\n{_own_table(classes[0], group)}")
    return "\n\n".join([*parts, f"### With every method\n\n{table(Common)}"])


def _own_table(cls: type[Method], owner: str) -> str:
    """The method's table without the lines of other owners."""
    head, rule, *lines = table(cls).splitlines()
    own = [line for line, (whose, _) in zip(lines, owned_rows(cls)) if whose == owner]
    return "\n".join([head, rule, *own])


def methods_as_text() -> str:
    """The same for reading in a terminal."""
    lines = []
    for name, cls in methods().items():
        lines += [
            f"{name}: {cls.summary}.",
            f"  use it when: {cls.use_when}",
            f"  source: {cls.source}",
            *_settings_as_text(cls),
        ]
    return "\n".join([*lines, "with every method:", *_settings_as_text(Common)])


def _settings_as_text(cls: type[Settings]) -> list[str]:
    return [f"    {row.name} = {format_value(row.default)}  ({row.allowed})  {row.help}" for row in schema(cls)]


def _schema_rows(cls: type[Settings]) -> list[dict[str, Any]]:
    return [
        {
            "name": row.name,
            "type": row.kind.__name__,
            "default": row.default,
            "allowed": row.allowed,
            "low": row.low,
            "high": row.high,
            "choices": list(row.choices),
            "auto": row.auto,
            "label": row.label,
            "infotext": row.infotext,
            "help": row.help,
        }
        for row in schema(cls)
    ]
