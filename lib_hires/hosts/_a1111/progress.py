"""The host's progress over the passes and stages of a picture: each has the part of the bar that its work has.

    the host   job_no / job_count + step / steps / job_count, each pass a job as long as any other
    a stage    from a to a + b of the whole: job_no = a / b, job_count = 1 / b

The host only divides these numbers, so they need not be whole while a sampler runs; `nextjob()` after it leads to a + b, and
`close` gives the host its own whole numbers back.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from ...plan.tiling import Stage


def work_of(stage: Stage, calls: int) -> int:
    """What a stage asks of the network, in latents: its UNet evaluations, each as large as what it is given."""
    looked = len(stage.looks) * stage.first_size[0] * stage.first_size[1]
    return looked + calls * sum(count * height * width for (height, width), count in stage.inputs())


class Progress:
    """The bar of one picture after another. Nothing is changed where there is one pass of one stage."""

    def __init__(self) -> None:
        self._host: tuple[int, int] | None = None
        self._written = (0.0, 0.0)
        self._works: Sequence[Sequence[int]] = ()
        self._pass = 0

    def begin(self, works: Sequence[Sequence[int]], number: int) -> None:
        """A pass is about to be drawn. works: of each stage of each pass of a picture; number: of this pass, from 0."""
        from modules import shared

        self.close()
        self._works, self._pass = works, number
        if sum(map(len, works)) > 1 and shared.state.job_count > 0:
            self._host = shared.state.job_no, shared.state.job_count
            self._show(0)

    def next_stage(self, number: int) -> None:
        """This stage of the pass, counted from 0, is about to be drawn after another."""
        from modules import shared

        shared.state.nextjob()
        if self._host is not None:
            self._show(number)

    def _show(self, number: int) -> None:
        from modules import shared

        stages, passes, whole = self._works[self._pass], len(self._works), sum(chain(*self._works))
        part, before = stages[number] / whole, sum(chain(*self._works[: self._pass], stages[:number])) / whole
        job_no, job_count = self._host
        self._written = (job_no // passes + before) / part, job_count / passes / part
        shared.state.job_no, shared.state.job_count = self._written

    def close(self) -> None:
        """The host's own numbers, with the passes that it has finished since; any number of times."""
        from modules import shared

        host, self._host = self._host, None
        job_no, job_count = self._written
        if host is not None and shared.state.job_count is job_count:  # else the host has begun something else
            shared.state.job_no, shared.state.job_count = host[0] + round(shared.state.job_no - job_no), host[1]

    def lengthen(self, steps: int, each: int) -> None:
        """The console's bar over all jobs counts steps: `steps` more than the host knows of, which counts `each` a job."""
        from modules import shared

        bar = getattr(shared.total_tqdm, "_tqdm", None)
        jobs = self._host[1] if self._host is not None else shared.state.job_count
        shared.total_tqdm.updateTotal((jobs * each if bar is None else bar.total) + steps)


def duration(seconds: float) -> str:
    """As "34 s" or "5 min"."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
