"""Pictures on disk: written with their parameters as PNG text, and read back as a job."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ..config.codecs import from_argv
from ..config.errors import HiresError, SettingError
from ..config.infotext import PNG_KEY, read_parameters, write_parameters
from ..plan.models import LATENT_FACTOR
from ..request import Request
from . import samplers

INTERRUPTED_KEY, STARTED_KEY, DENOISE_KEY = "HL Interrupted", "HL Started from", "Denoising strength"
ORIENTATION, SIDEWAYS = 0x0112, 5
"""EXIF's tag, and the first of its values that swap width and height."""
UNREADABLE = (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError)
_KEYS = {"steps": "Steps", "sampler": "Sampler", "cfg": "CFG scale", "seed": "Seed"}


def parameters_of(
    job: Mapping[str, Any], request: Request, index: int, model: str, version: str, interrupted: str = ""
) -> str:
    """The infotext of picture `index` of a job: alone it repeats that picture, as a whole where it was `interrupted`."""
    keys = {label: job[name] for name, label in _KEYS.items()}
    keys["Seed"] = job["seed"] + index
    keys |= {"Size": f"{job['width']}x{job['height']}", "Model": model, **request.to_infotext()}
    keys |= {INTERRUPTED_KEY: interrupted} if interrupted else {}
    if job.get("init_image"):
        keys |= {DENOISE_KEY: job["denoise"], STARTED_KEY: Path(job["init_image"]).name}
    return write_parameters(job["prompt"], job["negative"], {**keys, "Version": f"Hires Lab {version}"})


def save(picture: Image.Image, path: Path, parameters: str) -> None:
    """Write a PNG, as a whole or not at all. Raises `HiresError` where it cannot be written."""
    text = PngInfo()
    text.add_text(PNG_KEY, parameters)
    with whole_file(path) as part:
        picture.save(part, format="PNG", pnginfo=text)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` after the block; a failure leaves what was there. Raises `HiresError`."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, ValueError) as error:
        raise HiresError(f"'{path}' cannot be written: {error}.") from error
    finally:
        with suppress(OSError, ValueError):
            part.unlink(missing_ok=True)


def init_picture(path: str) -> Image.Image:
    """The picture that a job starts from, upright. Raises `SettingError` where it cannot be read."""
    with _opened(path) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as picture:
            yield picture
    except UNREADABLE as error:
        raise SettingError("init_image", path, "a picture that can be read", f"{error}.") from error


def size_like(path: str, width: int | None, height: int | None) -> tuple[int, int]:
    """Width and height in pixels: those given, the others by the picture's own or by its proportion, in whole latents.

    Raises `SettingError` where the picture cannot be read.
    """
    with _opened(path) as picture:
        own = picture.size if picture.getexif().get(ORIENTATION, 1) < SIDEWAYS else picture.size[::-1]
    times = width / own[0] if width else height / own[1] if height else 1.0
    fitted = [max(1, round(length * times / LATENT_FACTOR)) * LATENT_FACTOR for length in own]
    return width or fitted[0], height or fitted[1]


def job_of_picture(path: Path) -> dict[str, Any]:
    """The job in a picture's infotext. Raises `HiresError` where there is none."""
    try:
        with Image.open(path) as picture:
            text = picture.info.get(PNG_KEY, "")
    except UNREADABLE as error:
        raise HiresError(f"'{path}' cannot be read as a picture: {error}.") from error
    prompt, negative, keys = read_parameters(text)
    if "Size" not in keys or "Seed" not in keys:
        raise HiresError(f"'{path}' holds no generation parameters (PNG text '{PNG_KEY}'). Give the flags instead.")
    request = Request.from_infotext(keys)
    width, _, height = keys["Size"].partition("x")
    job = {"prompt": prompt, "negative": negative, "model": keys.get("Model", "")}
    job |= {"width": _number("Size", width, int), "height": _number("Size", height, int)}
    job |= {"method": request.method.name if request.method else "none", "set": from_argv(request.to_argv())}
    for name, kind in (("steps", int), ("cfg", float), ("seed", int)):
        if _KEYS[name] in keys:
            job[name] = _number(_KEYS[name], keys[_KEYS[name]], kind)
    if STARTED_KEY in keys:
        job |= {"started_from": keys[STARTED_KEY], "denoise": _number(DENOISE_KEY, keys.get(DENOISE_KEY, ""), float)}
    if _KEYS["sampler"] in keys:
        job["sampler"] = samplers.name_of(keys[_KEYS["sampler"]], keys.get("Schedule type", ""))
    return job


def _number(key: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise SettingError(
            key,
            text[:40],
            "a whole number" if kind is int else "a number",
            "The picture's parameters are broken: give the flags instead.",
        ) from None
