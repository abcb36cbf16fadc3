"""`python -m benchmarks.samples`: what the bundled models draw at their native size, one sheet: a row a caption, no picture chosen."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from lib_hires.cli import JOB_DEFAULTS
from lib_hires.engines.checkpoint import BUNDLED
from lib_hires.engines.runner import Runner

from .contact_sheet import contact_sheet, save_sheet
from .prepared import Prepared, native_of
from .quality import METHODS, NATIVE, PLAIN, SAMPLING, SAMPLING_IN_WORDS, scene_of

MODELS = {"SD1.5 layout": BUNDLED, "SDXL layout": BUNDLED.with_name("scenes-sdxl.safetensors")}
FIRST_SEED = 3000


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the sheet; returns an exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samples", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--captions", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3, help="pictures of each caption by each model")
    parser.add_argument("--out", type=Path, default=Path(f"out/{NATIVE}-samples.png"))
    options = parser.parse_args(arguments)
    captions = [scene_of(FIRST_SEED + number, (1, 1)).caption for number in range(options.captions)]
    rows: list[list[Image.Image]] = [[] for _ in captions]
    with tqdm(total=len(MODELS) * len(captions) * options.seeds, unit="picture", desc="drawing") as bar:
        for path in MODELS.values():
            first = {**JOB_DEFAULTS, "checkpoint": str(path), "device": options.device, "prompt": "", **SAMPLING}
            components = Runner(quiet=True).load(first)
            side = native_of(components, first)
            for row, caption in zip(rows, captions):
                for seed in range(options.seeds):
                    asked = {**first, "prompt": caption, "seed": seed}
                    row += Prepared.of(components, asked, METHODS[PLAIN], side, side).picture().images
                    bar.update()
    titles = [f"{name}, seed {seed}" for name in MODELS for seed in range(options.seeds)]
    labelled = [(_folded(caption), row) for caption, row in zip(captions, rows)]
    save_sheet(contact_sheet(labelled, titles, cell=144), options.out)
    print(f"{options.out} is written: {SAMPLING_IN_WORDS}")
    return 0


def _folded(caption: str) -> str:
    """In three lines, each short enough for a label."""
    subject, _, ground = caption.removesuffix(" background").partition(" on a ")
    look, _, kind = subject.rpartition(" ")
    return f"{look}\n{kind}\non {ground}"


if __name__ == "__main__":
    raise SystemExit(main())
