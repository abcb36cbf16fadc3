"""What a job will cost, before it runs: denoiser calls, and seconds and memory from network calls that are measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from ..memory import peak_memory
from ..plan.tiling import Stage

_MIB = 2**20


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


def sizes_of(stages: Sequence[Stage], calls: Sequence[int]) -> dict[tuple[int, int], int]:
    """How often the network is called at each size (height, width in latents) in a run."""
    counts: dict[tuple[int, int], int] = {}
    for stage, count in zip(stages, calls):
        looked = [(stage.first_size, len(stage.looks))] if stage.looks else []
        for size, number in [*looked, *((size, number * count) for size, number in stage.inputs())]:
            counts[size] = counts.get(size, 0) + number
    return counts


def in_words(seconds: float, network: int, decoding: int, latents: int) -> str:
    """The line of the plan."""
    return (
        f"estimated: {seconds:.0f} s in the network, {network / _MIB:.0f} MiB for its calls, "
        f"{decoding / _MIB:.0f} MiB for decoding, {latents / _MIB:.1f} MiB of latents, beside the weights."
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
