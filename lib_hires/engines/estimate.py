"""What a job will cost, before it runs: denoiser calls, and seconds and memory from network calls that are measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from ..memory import peak_memory
from ..plan.route import Size
from ..plan.tiling import Stage

_MIB = 2**20
Inputs = tuple[Size, int]
"""What one network call takes: views of a size (height, width in latents), and how many of them."""


def measured(
    evaluate: Callable[[torch.Tensor], object], shape: Sequence[int], device: torch.device
) -> tuple[float, int]:
    """(seconds, bytes beyond what is there) of one network call on noise of `shape`; the second of two calls counts."""
    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(device)
    with peak_memory(device) as peak:
        evaluate(x)
        _wait(device)
        started = time.perf_counter()
        evaluate(x)
        _wait(device)
    return time.perf_counter() - started, peak.growth


def sizes_of(stages: Sequence[Stage], calls: Sequence[int], at_once: int = 1) -> dict[Inputs, int]:
    """How many views the network is given in a run, by their size and by how many of them go into one call.

    calls: denoiser calls of each stage; at_once: views in one call at most.
    """
    counts: dict[Inputs, int] = {}
    for stage, count in zip(stages, calls):
        asked = [(size, number, number * count) for size, number in stage.inputs()]
        if stage.looks:
            asked.append((stage.first_size, 1, len(stage.looks)))
        for size, number, views in asked:
            key = (size, min(at_once, number))
            counts[key] = counts.get(key, 0) + views
    return counts


def summed(counts: Mapping[Inputs, int], measure: Callable[[Size, int], tuple[float, int]]) -> tuple[float, int]:
    """(seconds of all calls, bytes of the largest). counts: from `sizes_of`; measure(size, views): of one call, as `measured`."""
    seconds, most = 0.0, 0
    for (size, views), count in counts.items():
        took, needed = measure(size, views)
        seconds, most = seconds + took * count / views, max(most, needed)
    return seconds, most


def in_words(seconds: float, network: int, at_once: str, decoding: int, latents: int) -> str:
    """The line of the plan. network, decoding, latents: in bytes; at_once: how many views a call takes."""
    return (
        f"estimated: {seconds:.0f} s in the network, {network / _MIB:.0f} MiB for its calls{at_once}, "
        f"{decoding / _MIB:.0f} MiB for decoding, {latents / _MIB:.1f} MiB of latents, beside the weights."
    )


def views_in_words(counts: Mapping[Inputs, int], grows: bool) -> str:
    """How many views of a canvas the largest call takes; nothing where there is one and it stays so."""
    most = max(views for _, views in counts)
    if grows:
        return f" ({most} view at once, more where free memory holds them)"
    return f" ({most} views at once)" if most > 1 else ""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
