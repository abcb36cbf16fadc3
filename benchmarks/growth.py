"""How cost grows with the picture: seconds and memory of sampling against megapixels, with the exponent of each.

One step of sampling for each size (every stage of the staged methods takes one), decoding left out, doubling the pixels
until `--limit` seconds are reached; then log(cost) is fitted against log(pixels): 1 is linear, 2 quadratic.

    python -m benchmarks.growth                    the bundled model on the CPU
    python -m benchmarks.growth --device cuda --checkpoint model.safetensors --most 64
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch

from lib_hires.cli import JOB_DEFAULTS
from lib_hires.engines.runner import Runner
from lib_hires.memory import OUT_OF_MEMORY, peak_memory

from .demo import size_of
from .prepared import Prepared
from .report import about, add_options, command_of, finish, markdown_table

VARIANTS = {
    "plain": {"method": "none"},
    "HiDiffusion": {"method": "hidiffusion"},
    "Mixture of Diffusers": {"method": "mixture_of_diffusers"},
    "DemoFusion": {"method": "demofusion"},
}
MEGAPIXEL = 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; returns an exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--least", type=float, default=1.0, help="megapixels to begin with")
    parser.add_argument("--most", type=float, default=64.0, help="megapixels to end with")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds; a variant that took longer is not enlarged")
    parser.add_argument("--methods", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    add_options(parser, "out/growth.json", "benchmarks.md", "growth")
    options = parser.parse_args(arguments)
    runner = Runner(quiet=True)
    first = {**JOB_DEFAULTS, "prompt": "a red star on a blue background", "checkpoint": options.checkpoint}
    first |= {"device": options.device, "steps": 1, "cfg": 4.0}
    components = runner.load(first)
    head = {**about(components.device, components.dtype), "model": components.path.stem}
    rows = []
    for name in options.methods:
        megapixels = options.least
        measure(components, first, name, megapixels)  # warms up
        while megapixels <= options.most:
            try:
                rows.append(measure(components, first, name, megapixels))
            except (MemoryError, OUT_OF_MEMORY):
                print(f"{name}: out of memory at {megapixels:g} megapixels")
                break
            if rows[-1]["seconds"] > options.limit:
                break
            megapixels *= 2
    found = exponents(rows)
    data = {"rows": rows, "exponents": found}
    finish(options, command_of("benchmarks.growth", arguments), head, data, table(rows, found))
    return 0


@torch.no_grad()
def measure(components, first: dict, name: str, megapixels: float) -> dict:
    """One size of one variant."""
    width, height = size_of((megapixels * MEGAPIXEL) ** 0.5, (1, 1))
    prepared = Prepared.of(components, first, VARIANTS[name], width, height)
    with peak_memory(components.device) as peak:
        started = time.perf_counter()
        reports = prepared.latents()
        seconds = time.perf_counter() - started
    return {
        "method": name,
        "width": width,
        "height": height,
        "megapixels": width * height / MEGAPIXEL,
        "evaluations": sum(report["unet_evaluations"] for report in reports),
        "seconds": seconds,
        "peak_growth": peak.growth,
    }


def exponents(rows: Sequence[dict]) -> dict[str, dict[str, float | None]]:
    """For each method the power of the pixels that seconds and memory follow; None below three sizes."""
    found = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        found[name] = {
            key: exponent([(row["megapixels"], row[key]) for row in own]) for key in ("seconds", "peak_growth")
        }
    return found


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """b of y = a x^b by least squares of the logarithms, over what is above nought; None for fewer than three points."""
    points = [point for point in points if min(point) > 0]
    if len(points) < 3:
        return None
    x, y = np.log(np.array(points, np.float64)).T
    return float(np.polyfit(x, y, 1)[0])


def table(rows: Sequence[dict], found: dict) -> str:
    """Markdown: the measurements, then the exponents."""
    columns = "method", "size", "megapixels", "UNet evaluations", "seconds a step", "peak growth, MiB"
    measured = [
        (
            row["method"],
            f"{row['width']}x{row['height']}",
            f"{row['megapixels']:.1f}",
            row["evaluations"],
            f"{row['seconds']:.2f}",
            f"{row['peak_growth'] / 2**20:.0f}",
        )
        for row in rows
    ]
    powers = [
        (name, *("too few sizes" if power is None else f"{power:.2f}" for power in own.values()))
        for name, own in found.items()
    ]
    fitted = markdown_table(("method", "seconds grow with pixels to the power", "memory"), powers)
    return f"{markdown_table(columns, measured)}\n\n{fitted}"


if __name__ == "__main__":
    raise SystemExit(main())
