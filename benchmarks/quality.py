"""`make bench-quality`: are the pictures right? Every method, scale and aspect on the bundled model, against true renders.

    caption, seed -> native picture, plain picture, each method's picture -> measures -> one row a picture (rows.jsonl)
    rows -> one line a cell (quality.md, quality.json), one contact sheet a cell

On a CPU `--processes` draws as many scenes at a time, with one thread each: small networks gain little from more.

A picture is *right* when it shows exactly one subject of the asked kind, colour and look on the asked ground (a face: with
its parts in their places); *asked* asks for one subject, its kind and its colour only. Rows are kept: a stopped run goes on, a later one adds to it.

    python -m benchmarks.quality --quick                      about ten minutes on a CPU
    python -m benchmarks.quality --seeds 64 --scales 1.5 2 3 4 --aspects 1:1 2:3 3:2 1:3 --device cuda
    python -m benchmarks.quality --methods native --seeds 256     the model alone
    python -m benchmarks.quality --ablations --scales 2
    python -m benchmarks.quality --denoise 0.6 --scales 2     from the native picture, enlarged, as a hires pass does
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from lib_hires import Request
from lib_hires.cli import JOB_DEFAULTS
from lib_hires.engines.checkpoint import BUNDLED
from lib_hires.engines.runner import Runner
from lib_hires.engines.standalone import Engine

from . import measures
from .contact_sheet import contact_sheet, save_sheet
from .demo import size_of
from .mini import judge, scenes, words
from .mini.autoencoder import to_tensor
from .prepared import Prepared, native_of
from .quality_table import cell_of, table
from .report import about, add_options, command_of, finish
from .subjects import find_subjects

PLAIN, NATIVE, RENDER = "plain", "native", "render"
OTHER = "render, other scenes"
"""True renders of the same captions, drawn anew: what a perfect model would score."""
THROUGH = "render, encoded and decoded"
"""True renders through the model's autoencoder: the shares and the detail that a perfect UNet would have on its latents. Their
Frechet distance is from renders of the very same scenes, lower than drawn pictures can have."""
METHODS = {
    PLAIN: {"method": "none"},
    "HiDiffusion": {"method": "hidiffusion"},
    "Deep Shrink": {"method": "deep_shrink"},
    "Mixture of Diffusers": {"method": "mixture_of_diffusers"},
    "MultiDiffusion, overlap 0.5": {"method": "multidiffusion", "overlap": 0.5},
    "DemoFusion": {"method": "demofusion"},
    "AccDiffusion": {"method": "accdiffusion"},
}
QUICK = (PLAIN, "HiDiffusion", "Deep Shrink", "DemoFusion", "AccDiffusion")
ABLATIONS = {
    PLAIN: METHODS[PLAIN],
    "DemoFusion": {"method": "demofusion"},
    "DemoFusion, strength 1": {"method": "demofusion", "stage_strength": 1.0},
    "DemoFusion, strength 1, no skip residual": {
        "method": "demofusion",
        "stage_strength": 1.0,
        "skip_residual": False,
    },
    "DemoFusion, strength 1, no dilated sampling": {
        "method": "demofusion",
        "stage_strength": 1.0,
        "dilated_sampling": False,
    },
    "DemoFusion, strength 1, no filter": {"method": "demofusion", "stage_strength": 1.0, "filter_sigma": 0.0},
    "DemoFusion, strength 0.6": {"method": "demofusion", "stage_strength": 0.6},
    "DemoFusion, strength 0.25": {"method": "demofusion", "stage_strength": 0.25},
    "DemoFusion, no skip residual": {"method": "demofusion", "skip_residual": False},
    "DemoFusion, no dilated sampling": {"method": "demofusion", "dilated_sampling": False},
    "DemoFusion, no filter": {"method": "demofusion", "filter_sigma": 0.0},
    "DemoFusion, anchor mean and std": {"method": "demofusion", "anchor": "mean and std"},
    "DemoFusion, no anchor": {"method": "demofusion", "anchor": "nothing"},
    "DemoFusion, windows inside": {"method": "demofusion", "inside": "window attention"},
    "AccDiffusion": {"method": "accdiffusion"},
    "AccDiffusion, no interaction": {"method": "accdiffusion", "interaction": "none"},
    "AccDiffusion, word share 0.5": {"method": "accdiffusion", "word_share": 0.5},
    "AccDiffusion, whole prompt in every view": {"method": "accdiffusion", "word_share": 0.0},
    "HiDiffusion": {"method": "hidiffusion"},
    "HiDiffusion, RAU-Net only": {"method": "hidiffusion", "window_attention": False},
    "HiDiffusion, windows only": {"method": "hidiffusion", "raunet": False},
    "HiDiffusion, windows do not move": {"method": "hidiffusion", "window_shift": False},
    "HiDiffusion, strength 2": {"method": "hidiffusion", "strength": 2.0},
    "HiDiffusion, no aggressive stage": {"method": "hidiffusion", "aggressive": "off"},
    "Deep Shrink": {"method": "deep_shrink"},
    "Deep Shrink, windows": {"method": "deep_shrink", "window_attention": True},
    "Deep Shrink, strength 2": {"method": "deep_shrink", "strength": 2.0},
    "Deep Shrink, depths 2 and 3": {"method": "deep_shrink", "depth1": 2, "depth2": 3},
    "Deep Shrink, depths 4 and 5": {"method": "deep_shrink", "depth1": 4, "depth2": 5},
    "Deep Shrink, ends at once": {"method": "deep_shrink", "smooth_scaling": False},
}
SEEDS, QUICK_SEEDS = 64, 6
STEPS, CFG, SAMPLER = 20, 4.0, "euler"
SAMPLING = {"steps": STEPS, "cfg": CFG, "sampler": SAMPLER}
SAMPLING_IN_WORDS = f"{SAMPLER}, {STEPS} steps, CFG {CFG:g}"
CROPS = 4
"""Native-size crops of a picture for the second Frechet distance."""
SHOWN = 8
"""Pictures of a cell on its contact sheet."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what is missing, measure it, write the tables; returns an exit status."""
    options = _parser().parse_args(arguments)
    variants = ABLATIONS if options.ablations else METHODS
    chosen = options.methods or list(QUICK if options.quick and not options.ablations else variants)
    count = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    unknown = [name for name in chosen if name not in (*variants, NATIVE)]
    if unknown:
        raise SystemExit(f"Hires Lab: '--methods' is '{unknown[0]}', must be among: {', '.join(variants)}.")
    if options.processes > 1:
        torch.set_num_threads(1)
    told = (options.checkpoint, options.device, options.out, options.denoise)
    bench = Bench(*told)
    cells = [(scale, aspect) for aspect in options.aspects for scale in options.scales]
    seeds = range(options.first_seed, options.first_seed + count)
    settings = {name: variants[name] for name in chosen if name != NATIVE}  # which every cell has
    missing = () if options.tables else seeds
    tasks = [(seed, options.scales, aspect, settings) for aspect in options.aspects for seed in missing]
    if options.processes > 1:
        bench.about["processes"] = options.processes
        if tasks:
            _draw_together(options.processes, told, tasks)
            bench.gather()
    else:
        for task in tqdm(tasks, unit="scene", desc="drawing"):
            bench.draw(*task)
    report = bench.report(cells, seeds, settings)
    bench.sheets(cells, seeds, settings)
    folder, options.out = options.out, options.out / "quality.json"
    text = f"{_head(report)}\n\n{table(report['cells'])}"
    options.section = "ablations" if options.ablations else "refining" if options.denoise else "quality"
    if options.ablations and options.scales != [2.0]:
        options.section += "".join(f"-{scale:g}x" for scale in options.scales)
    if bench.components.family != "sd1":
        options.section += f"-{bench.components.family}"
    drawn = {"drawn by commits": ", ".join(report["commits"])} if report["commits"] != [bench.commit] else {}
    finish(options, command_of("benchmarks.quality", arguments), {**bench.about, **drawn}, report, text)
    print(f"\nRows, tables, pictures and a contact sheet for each cell are in {folder}/")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="another small model than the bundled one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, help=f"scenes a cell (default {SEEDS}, quick {QUICK_SEEDS})")
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--scales", type=float, nargs="+", default=[2.0])
    parser.add_argument("--aspects", nargs="+", default=["1:1"], help="width:height")
    parser.add_argument("--methods", nargs="+", help="names from the table, or native for nothing more; default: all")
    parser.add_argument("--ablations", action="store_true", help="parts of the methods instead of the methods")
    parser.add_argument(
        "--denoise", type=float, help="start from the native picture, enlarged, and run this share of the steps"
    )
    parser.add_argument("--quick", action="store_true", help="six scenes, 2x, square, five methods")
    parser.add_argument(
        "--processes", type=int, default=1, help="scenes drawn at a time, with one thread each (default 1)"
    )
    parser.add_argument("--tables", action="store_true", help="draw nothing more, write the tables of what there is")
    add_options(parser, "out/quality", "quality.md", "quality")
    return parser


_bench: Bench | None = None
"""Of a process that draws for another."""


def _draw_together(processes: int, told: tuple, tasks: Sequence[tuple]) -> None:
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_open, initargs=told) as pool:
        running = [pool.submit(_draw, task) for task in tasks]
        try:
            for done in tqdm(as_completed(running), total=len(running), unit="scene", desc="drawing"):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _open(*told) -> None:
    global _bench
    torch.set_num_threads(1)
    _bench = Bench(*told, file=f"rows-{os.getpid()}.jsonl")


def _draw(task: tuple) -> None:
    _bench.draw(*task)


class Bench:
    """Draws and measures; keeps a row for each picture in `out`/rows.jsonl.

    file: another name for that, in a process that draws for another, which gathers what such processes kept.
    denoise: the share of the steps that pictures run from the native one of their scene; None where they start from noise.
    """

    def __init__(
        self, checkpoint: str | None, device: str, out: Path, denoise: float | None = None, file: str = "rows.jsonl"
    ):
        self.denoise = denoise
        self.runner = Runner(quiet=True)
        self.first = {**JOB_DEFAULTS, "checkpoint": checkpoint, "device": device}
        self.components = self.runner.load(self.first)
        self.native = native_of(self.components, {**self.first, "prompt": ""})
        self.judge = judge.load()
        self.out = out
        self.model = file_digest(Path(checkpoint or BUNDLED))
        self.about = about(self.components.device, self.components.dtype)
        self.commit = self.about["commit"] + ("+" if self.about["changed"] else "")
        self.circumstances = f"{self.model} {file_digest(judge.WEIGHTS)} {self.about['device']} {self.about['dtype']}"
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        self.file = out / file
        self.rows = {row["key"]: row for path in sorted(out.glob("rows*.jsonl")) for row in _read(path)}

    def gather(self) -> None:
        """Take over the rows that other processes kept in files of their own, and what another run has written meanwhile."""
        self.rows |= {row["key"]: row for row in _read(self.file)}
        for path in sorted(self.out.glob("rows-*.jsonl")):
            for row in _read(path):
                self._keep(row)
            path.unlink()

    def draw(self, seed: int, scales: Iterable[float], aspect: str, variants: dict[str, dict]) -> None:
        """The scene of a seed: rendered, drawn at its native size and by each variant; what has a row is not drawn again."""
        for scale in scales:
            self._draw_at(seed, scale, aspect, variants)

    def _draw_at(self, seed: int, scale: float, aspect: str, variants: dict[str, dict]) -> None:
        scene, native, start = scene_of(seed, ratio_of(aspect)), None, {}
        for name, times, size, settings in self._jobs(scale, aspect, variants):
            key = self._key(name, times, aspect, seed, settings)
            path = self._path(key)
            if name == NATIVE and self.denoise is not None:
                start = {"init_image": str(path), "denoise": self.denoise}
            if key in self.rows and path.exists():
                native = np.asarray(Image.open(path)) if name == NATIVE else native
                continue
            shown = scenes.of_caption(scene.caption, np.random.default_rng([3, seed])) if name == OTHER else scene
            truth = scenes.render(replace(shown, radius=scene.radius), size)
            asked = {"prompt": scene.caption, "seed": seed, **({} if name == NATIVE else start)}
            picture, spent = (truth, {}) if settings is None else self._drawn(asked, size, settings)
            picture = self._through_autoencoder(picture) if name == THROUGH else picture
            Image.fromarray(picture).save(path)
            native = picture if name == NATIVE else native
            measured = self._measured(picture, scene, times, native if settings else None)
            measured["detail_true"] = measures.detail(truth, times)
            row = {"key": key, "method": name, "scale": times, "aspect": aspect, "seed": seed, "caption": scene.caption}
            self._keep({**row, "commit": self.commit, "width": size[0], "height": size[1], **measured, **spent})

    def _jobs(self, scale: float, aspect: str, variants: dict[str, dict]) -> list[tuple]:
        """(name, scale, size in pixels, settings or None for a render): a cell's pictures, the native ones first."""
        ratio = ratio_of(aspect)
        small, large = size_of(self.native, ratio), size_of(self.native * scale, ratio)
        sizes = {1.0: small, scale: large}
        jobs = [(name, times, size, None) for times, size in sizes.items() for name in (RENDER, OTHER, THROUGH)]
        jobs.append((NATIVE, 1.0, small, METHODS[PLAIN]))
        return jobs + [(name, scale, large, settings) for name, settings in variants.items()]

    def _through_autoencoder(self, picture: np.ndarray) -> np.ndarray:
        engine, factor = Engine(self.components), self.components.factor
        latent = engine.encode(Image.fromarray(picture), (picture.shape[0] // factor, picture.shape[1] // factor))
        return np.asarray(engine.decode(latent)[0])

    def _drawn(self, asked: dict, size: tuple[int, int], settings: dict) -> tuple[np.ndarray, dict]:
        job = {**self.first, **asked, **SAMPLING}
        prepared = Prepared.of(self.components, job, settings, *size)
        started = time.perf_counter()
        result = prepared.picture()
        evaluations = sum(stage["unet_evaluations"] for stage in result.stages)
        spent = {"seconds": time.perf_counter() - started, "evaluations": evaluations}
        return np.asarray(result.images[0]), spent

    def _measured(self, picture: np.ndarray, scene: scenes.Scene, scale: float, native: np.ndarray | None) -> dict:
        masks = find_subjects(picture)
        seen = judge.verdicts(self.judge, [judge.crop_around(picture, masks[0])]) if masks else []
        right = {name: bool(seen and getattr(seen[0], name) == value) for name, value in words.told(scene).items()}
        face = bool(seen and right["kind"] and seen[0].face_is_right) if scene.is_face else None
        return {
            "subjects": len(masks),
            **right,
            "face": face,
            "right": len(masks) == 1 and all(right.values()) and face is not False,
            "detail": measures.detail(picture, scale),
            "seams": measures.seams(picture, self.native),
            "drift": None if native is None else measures.drift(picture, native),
            "whole": self._features([_short_side(picture)]),
            "crops": self._features(_crops(picture, self.native)),
        }

    def _features(self, pictures: list[np.ndarray]) -> list[list[float]]:
        with torch.no_grad():
            found = self.judge.features(torch.stack([to_tensor(picture) for picture in pictures]))
        return [[round(value, 4) for value in one] for one in found.tolist()]

    def _key(self, name: str, scale: float, aspect: str, seed: int, settings: dict | None) -> str:
        # A default that changes draws anew, but not what an automatic value means.
        whole = None if settings is None else Request.from_dict(settings).to_dict()
        told = "" if whole is None else json.dumps(whole, sort_keys=True)
        if whole is not None and name != NATIVE and self.denoise is not None:
            told += f" from native {self.denoise:g}"
        return f"{self.circumstances} | {name} {scale:g} {aspect} {seed} | {STEPS} {CFG} {SAMPLER} {told}"

    def _path(self, key: str) -> Path:
        """The picture of a row: its cell in words, and a digest of everything it depends on."""
        cell = "".join(letter if letter.isalnum() else "-" for letter in key.split(" | ")[1].lower())
        return self.out / "pictures" / f"{cell}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.png"

    def _keep(self, row: dict) -> None:
        self.rows[row["key"]] = row
        with self.file.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(row))  # the end of the line before, which may be cut off

    def report(self, cells: Iterable[tuple[float, str]], seeds: Iterable[int], variants: dict[str, dict]) -> dict:
        """The cells of these scales and aspects over these seeds, and where they were measured.

        A cell's methods are compared over the scenes that all of them have drawn; one that has drawn none is left out.
        """
        lines, commits = {}, set()
        for scale, aspect in cells:
            jobs = self._jobs(scale, aspect, variants)
            found = {(name, times): self._rows(name, times, aspect, seeds, told) for name, times, _, told in jobs}
            found = {place: rows for place, rows in found.items() if rows}
            shared = set.intersection(*(set(rows) for rows in found.values())) if found else set()
            for (name, times), rows in found.items():
                same = [rows[seed] for seed in sorted(shared)]
                commits |= {row["commit"] for row in same}
                kept = lines.get((aspect, times, name), {"pictures": 0})
                if len(same) > kept["pictures"]:  # the native size belongs to every scale's cell
                    true = [found[RENDER, times][seed] for seed in sorted(shared)]
                    lines[aspect, times, name] = cell_of(same, true)
        return {
            "model": self.model,
            "commits": sorted(commits),
            "sampling": SAMPLING_IN_WORDS,
            "judge": judge.accuracy(self.judge),
            "cells": [lines[place] for place in sorted(lines, key=lambda place: place[:2])],
        }

    def _rows(
        self, name: str, scale: float, aspect: str, seeds: Iterable[int], settings: dict | None
    ) -> dict[int, dict]:
        keys = {seed: self._key(name, scale, aspect, seed, settings) for seed in seeds}
        return {seed: self.rows[key] for seed, key in keys.items() if key in self.rows}

    def sheets(self, cells: Iterable[tuple[float, str]], seeds: Iterable[int], variants: dict[str, dict]) -> None:
        """One contact sheet a cell: the native picture beside each variant's, a row for each of the first seeds."""
        for scale, aspect in cells:
            jobs = [job for job in self._jobs(scale, aspect, variants) if job[3] is not None]
            rows = []
            for seed in list(seeds)[:SHOWN]:
                paths = [self._path(self._key(name, times, aspect, seed, told)) for name, times, _, told in jobs]
                if all(path.exists() for path in paths):
                    rows.append((f"seed {seed}", [Image.open(path) for path in paths]))
            if rows:
                sheet = contact_sheet(rows, [name for name, *_ in jobs])
                save_sheet(sheet, self.out / f"sheet-{scale:g}x-{aspect.replace(':', 'to')}.png")


def file_digest(path: Path) -> str:
    """Twelve letters for a file's content, or for the names, sizes and dates in a folder."""
    found = hashlib.sha256()
    if path.is_dir():
        for each in sorted(each for each in path.rglob("*") if each.is_file()):
            found.update(f"{each.relative_to(path)} {each.stat().st_size} {each.stat().st_mtime_ns}".encode())
    else:
        with path.open("rb") as file:
            while block := file.read(2**24):
                found.update(block)
    return found.hexdigest()[:12]


def _read(file: Path) -> list[dict]:
    """The rows of a file; a line that a stop cut off is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def ratio_of(aspect: str) -> tuple[int, int]:
    """(width, height) of "2:3". Raises `SystemExit` for anything else."""
    try:
        width, height = (int(part) for part in aspect.split(":"))
        if min(width, height) < 1:
            raise ValueError
    except ValueError:
        raise SystemExit(f"Hires Lab: '--aspects' is '{aspect}', must be width:height, such as 2:3.") from None
    return width, height


def scene_of(seed: int, ratio: tuple[int, int]) -> scenes.Scene:
    """The scene of a seed; its radius is that of a square picture with the same area."""
    scene = scenes.draw_scene(np.random.default_rng([2, seed]))
    wider = (max(ratio) / min(ratio)) ** 0.5
    return replace(scene, radius=min(0.42, scene.radius * wider))


def _head(report: dict) -> str:
    told = ", ".join(f"{name} {value:.3f}" for name, value in report["judge"].items())
    return f"Model {report['model']}, {report['sampling']}. The judge's own accuracy on unseen renders: {told}."


def _short_side(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    times = judge.SIDE / min(image.size)
    return np.asarray(image.resize((round(image.width * times), round(image.height * times)), Image.Resampling.BOX))


def _crops(picture: np.ndarray, native: int) -> list[np.ndarray]:
    """Crops of the native size, or of the whole short side where that is less; places by the picture's size alone."""
    generator = np.random.default_rng(picture.shape[:2])
    side = min(native, *picture.shape[:2])
    crops = []
    for _ in range(CROPS):
        top, left = (int(generator.integers(0, length - side + 1)) for length in picture.shape[:2])
        crops.append(_short_side(picture[top : top + side, left : left + side]))
    return crops


if __name__ == "__main__":
    raise SystemExit(main())
