"""`make demo`: the main job, seen. Draws at native size, then at twice that: plain, and by the quicker methods.

Square, portrait and landscape; writes the pictures and one labelled sheet to out/, prints what each cost and how many
subjects it shows. Without flags it uses the small bundled checkpoint; `--checkpoint` takes any other.

    make demo ARGS=--all       every method at 2x, 3x and 4x, square, portrait and panorama, one prompt (about an hour on a CPU)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from lib_hires.cli import JOB_DEFAULTS
from lib_hires.engines.runner import Runner
from lib_hires.methods import NONE, methods

from .contact_sheet import contact_sheet, save_sheet
from .prepared import native_of
from .subjects import count_subjects

PROMPTS = {
    "a striped orange heart on a purple background": 11,
    "a cyan ring on a yellow background": 22,
    "a green triangle on a white background": 11,
}
"""Prompt -> seed."""
ASPECTS = {"square": (1, 1), "portrait": (2, 3), "landscape": (3, 2)}
ALL_ASPECTS = {"square": (1, 1), "portrait": (2, 3), "panorama": (3, 1)}
STEPS, CFG = 20, 4.0
SLOW = {"multidiffusion": {"overlap": 0.5}}
"""Settings that make a method affordable here: nine views at 2x instead of the published 81."""
NEEDS_MORE = {"accdiffusion_v2": "a ControlNet"}
QUICK = ("hidiffusion", "deep_shrink", "demofusion")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns an exit status."""
    options = _parser().parse_args(arguments)
    runner = Runner(quiet=True)
    first = {**JOB_DEFAULTS, "checkpoint": options.checkpoint, "device": options.device}
    native = options.native or native_of(runner.load(first), {**first, "prompt": ""})
    jobs = list(_jobs(first, native, options))
    with tqdm(total=sum(job["steps"] for job in jobs), unit="step", desc="drawing") as bar:
        rows = [_draw(runner, job, bar) for job in jobs]
    _write_sheet(rows, options.out)
    cells = _cells(rows)
    (options.out / "demo.json").write_text(json.dumps(cells, indent=2), encoding="utf-8")
    print(_table(cells))
    print(f"\nPictures and contact-sheet.png are in {options.out}/")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="another checkpoint than the bundled one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--native", type=int, help="the checkpoint's native size, where it does not tell")
    parser.add_argument("--prompt", action="append", help="instead of the demo's own; may be repeated")
    parser.add_argument("--scale", type=float, action="append", help="size over the native size (default 2)")
    parser.add_argument("--method", action="append", help="only this method; may be repeated")
    parser.add_argument("--all", action="store_true", help="every method at 2x, 3x, 4x, also a panorama, one prompt")
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser


def _jobs(first: dict[str, Any], native: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One job a picture: every prompt, native and scaled, in every aspect and by every method."""
    known = [name for name, cls in methods().items() if name not in NEEDS_MORE and not cls.automatic]
    names = options.method or (known if options.all else [name for name in QUICK if name in known])
    prompts = {text: 1 + index for index, text in enumerate(options.prompt)} if options.prompt else PROMPTS
    if options.all and not options.prompt:
        prompts = dict([next(iter(PROMPTS.items()))])
    scales = options.scale or ([2.0, 3.0, 4.0] if options.all else [2.0])
    for aspect, ratio in (ALL_ASPECTS if options.all else ASPECTS).items():
        for scale, kinds in ((1.0, [NONE]), *((scale, [NONE, *names]) for scale in scales)):
            width, height = size_of(native * scale, ratio)
            for name in kinds:
                for index, (prompt, seed) in enumerate(prompts.items()):
                    job = {
                        **first,
                        "prompt": prompt,
                        "width": width,
                        "height": height,
                        "method": name,
                        "set": SLOW.get(name, {}),
                        "steps": STEPS,
                        "cfg": CFG,
                        "seed": seed,
                    }
                    kind = "native" if scale == 1.0 else "plain" if name == NONE else name
                    out = options.out / f"{aspect}-{scale:g}x-{kind}-{index + 1}.png"
                    yield {**job, "out": str(out), "kind": kind, "aspect": aspect, "scale": scale}


def size_of(side: float, ratio: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a ratio with the area of a square of `side`, in multiples of 8."""
    root = (ratio[0] / ratio[1]) ** 0.5
    return round(side * root / 8) * 8, round(side / root / 8) * 8


def _draw(runner: Runner, job: dict[str, Any], bar: tqdm) -> dict[str, Any]:
    bar.set_postfix_str(f"{job['kind']} {job['width']}x{job['height']}")
    report = runner.draw(job, on_step=lambda _done, _steps: None)
    bar.update(job["steps"])
    with Image.open(job["out"]) as picture:
        return {**job, "report": report, "subjects": count_subjects(picture)}


def _cells(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pictures of the same kind and size together: means of cost, the subjects of each."""
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        cells.setdefault((row["kind"], row["width"], row["height"]), []).append(row)
    return [
        {
            "method": kind,
            "width": width,
            "height": height,
            "unet_calls": same[0]["report"]["unet_calls"],
            "unet_evaluations": sum(stage["unet_evaluations"] for stage in same[0]["report"]["stages"]),
            "seconds": sum(row["report"]["seconds"] for row in same) / len(same),
            "peak_memory": max(row["report"]["peak_memory"] for row in same),
            "subjects": [row["subjects"] for row in same],
        }
        for (kind, width, height), same in cells.items()
    ]


def _table(cells: list[dict[str, Any]]) -> str:
    lines = [f"{'method':<22}{'size':>10}{'UNet evaluations':>18}{'seconds':>9}{'peak MiB':>10}   subjects counted"]
    for cell in cells:
        subjects = ", ".join(str(count) for count in cell["subjects"])
        lines.append(
            f"{cell['method']:<22}{cell['width']:>5}x{cell['height']:<4}{cell['unet_evaluations']:>18}{cell['seconds']:>9.1f}"
            f"{cell['peak_memory'] / 2**20:>10.0f}   {subjects}"
        )
    return "\n".join(lines)


def _write_sheet(rows: list[dict[str, Any]], out: Path) -> None:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    sheet_rows = []
    for aspect, prompt in dict.fromkeys((row["aspect"], row["prompt"]) for row in rows):
        same = [row for row in rows if (row["aspect"], row["prompt"]) == (aspect, prompt)]
        for scale in dict.fromkeys(row["scale"] for row in same if row["kind"] != "native"):
            shown = {row["kind"]: row for row in same if row["kind"] == "native" or row["scale"] == scale}
            big = shown[kinds[-1]]
            label = f"{aspect} {scale:g}x\n{big['width']}x{big['height']}\nseed {big['seed']}"
            sheet_rows.append((label, [Image.open(shown[kind]["out"]) for kind in kinds]))
    titles = {"plain": "plain", "native": "native"} | {cls.name: cls.title for cls in methods().values()}
    save_sheet(contact_sheet(sheet_rows, [titles[kind] for kind in kinds]), out / "contact-sheet.png")


if __name__ == "__main__":
    raise SystemExit(main())
