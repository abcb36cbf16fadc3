"""Several processes of one thread train one network: small networks gain little from a process of many threads.

Each process computes its rows of every batch, and the gradients' mean makes the step: what one process would do with the
whole batch, up to rounding.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def place() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait() -> None:
    """Until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def average(parameters: list[torch.nn.Parameter], *numbers: float) -> list[float]:
    """Put the mean of all processes' gradients into `parameters`; returns the means of `numbers`, the same everywhere."""
    if not dist.is_initialized():
        return list(numbers)
    graded = [parameter for parameter in parameters if parameter.grad is not None]
    flat = torch.cat(
        [parameter.grad.reshape(-1) for parameter in graded] + [torch.tensor(numbers, dtype=torch.float32)]
    )
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    sizes = [parameter.numel() for parameter in graded]
    for parameter, mean in zip(graded, flat[: sum(sizes)].split(sizes)):
        parameter.grad.copy_(mean.view_as(parameter))
    return flat[sum(sizes) :].tolist()


def run(work: Callable[..., None], processes: int, *arguments) -> None:
    """Call `work(*arguments)` in `processes` processes of one thread each, and wait for them.

    `work` must be a module's function. An error in one of them ends all and is raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder, "meeting").as_uri()
        torch.multiprocessing.spawn(_begin, (work, processes, meeting, arguments), nprocs=processes)


def _begin(rank: int, work: Callable[..., None], processes: int, meeting: str, arguments: tuple) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    try:
        work(*arguments)
    finally:
        dist.destroy_process_group()
