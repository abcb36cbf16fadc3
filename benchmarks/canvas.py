"""Canvas methods end to end against plain sampling at the same size: UNet evaluations, seconds, peak memory of sampling.

Everything runs in one process on the bundled checkpoint (or `--checkpoint`), the variants of a round one after another, in
an order that changes from round to round; ratios are to plain sampling in the same round. Decoding is left out.

    python -m benchmarks.canvas --scales 2 3 4 --rounds 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from lib_hires.canvas.method import CanvasMethod, StagedMethod
from lib_hires.cli import JOB_DEFAULTS
from lib_hires.config.errors import SettingError
from lib_hires.engines.runner import Runner
from lib_hires.memory import peak_memory
from lib_hires.methods import methods

from .prepared import Prepared, native_of
from .report import about, add_options, command_of, finish, markdown_table

VARIANTS = {
    "plain": {"method": "none"},
    "HiDiffusion": {"method": "hidiffusion"},
    "MultiDiffusion, overlap 0.5": {"method": "multidiffusion", "overlap": 0.5},
    "Mixture of Diffusers": {"method": "mixture_of_diffusers"},
    "DemoFusion": {"method": "demofusion"},
    "DemoFusion, windows inside": {"method": "demofusion", "inside": "window attention"},
    "DemoFusion, full stages": {"method": "demofusion", "stage_strength": 1.0},
    "AccDiffusion": {"method": "accdiffusion"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns an exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.canvas", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scales", type=float, nargs="+", default=[2.0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    add_options(parser, "out/canvas.json", "benchmarks.md", "canvas")
    options = parser.parse_args(arguments)
    job = {**JOB_DEFAULTS, "prompt": "a striped red star on a blue background", "checkpoint": options.checkpoint}
    job |= {"device": options.device, "steps": options.steps, "seed": 11, "cfg": 4.0}
    components = Runner(quiet=True).load(job)
    head = {**about(components.device, components.dtype), "model": components.path.stem, "steps": options.steps}
    head |= {"sampler": job["sampler"], "CFG": job["cfg"], "rounds": options.rounds}
    rows = [row for scale in options.scales for row in measure(job, scale, options.rounds)]
    finish(options, command_of("benchmarks.canvas", arguments), head, {"rows": rows}, table(rows))
    return 0


def measure(job: dict, scale: float, rounds: int) -> list[dict]:
    """One row for each variant at a scale."""
    runner = Runner(quiet=True)
    components = runner.load(job)
    side = round(native_of(components, job) * scale / 8) * 8
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    found: dict[str, dict] = {}
    names = list(VARIANTS)
    Prepared.of(components, job, VARIANTS["plain"], side, side).latents()  # warms up
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            prepared = Prepared.of(components, job, VARIANTS[name], side, side)
            started = time.perf_counter()
            with torch.no_grad(), peak_memory(components.device) as peak:
                reports = prepared.latents()
            seconds[name].append(time.perf_counter() - started)
            found[name] = {
                "unet_evaluations": sum(report["unet_evaluations"] for report in reports),
                "published": published_evaluations(components, job, VARIANTS[name], side),
                "stages": len(prepared.stages),
                "peak_growth": max(peak.growth, found.get(name, {}).get("peak_growth", 0)),
            }
    return [
        {
            "variant": name,
            "width": side,
            "height": side,
            **found[name],
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(own / plain for own, plain in zip(seconds[name], seconds["plain"])),
        }
        for name in VARIANTS
    ]


def published_evaluations(components, job: dict, settings: dict, side: int) -> int | None:
    """What the published code takes at its own settings; None for methods that do not change the number, and for sizes
    that the published code does not reach."""
    cls = methods().get(settings["method"])
    if cls is None or not issubclass(cls, CanvasMethod):
        return None
    own = {"method": settings["method"]}
    own |= {"published": True, "stage_strength": 1.0} if issubclass(cls, StagedMethod) else {}
    try:
        return Prepared.of(components, job, own, side, side).evaluations()
    except SettingError:
        return None


def table(rows: Sequence[dict]) -> str:
    """A Markdown table."""
    columns = "size", "method", "stages", "UNet evaluations", "as published", "seconds", "/ plain", "peak growth, MiB"
    lines = [
        (
            f"{row['width']}x{row['height']}",
            row["variant"],
            row["stages"],
            row["unet_evaluations"],
            row["published"] or "",
            f"{row['seconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['peak_growth'] / 2**20:.0f}",
        )
        for row in rows
    ]
    return markdown_table(columns, lines)


if __name__ == "__main__":
    raise SystemExit(main())
