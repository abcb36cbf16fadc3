"""A method's settings and a size, as what the engine draws: shared by the benches that draw whole pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lib_hires import Request
from lib_hires.engines.components import Components
from lib_hires.engines.drawing import Drawing
from lib_hires.engines.job import Job, Result
from lib_hires.engines.runner import engine_job_of, resolved, session_for, stages_of
from lib_hires.engines.standalone import Engine
from lib_hires.plan.tiling import Stage, evaluations_of
from lib_hires.unet.session import Session

from .speed import wait


def native_of(components: Components, first: Mapping[str, Any]) -> int:
    """The native size in pixels that methods go by."""
    return Prepared.of(components, first, {"method": "hidiffusion"}, 512, 512).session.model.native


@dataclass
class Prepared:
    """A job ready to be drawn, once or more often."""

    engine: Engine
    job: Job
    session: Session | None
    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, components: Components, first: Mapping[str, Any], settings: Mapping[str, Any], width: int, height: int):
        """`first`: a job's other fields; `settings`: a method and its settings, as `Request.from_dict` takes them."""
        job = engine_job_of({**first, "width": width, "height": height})
        request = resolved(components, Request.from_dict(settings), job)
        session = session_for(components, request, job)
        return cls(Engine(components), job, session, stages_of(components, request, job, session))

    def latents(self) -> list[dict]:
        """Sample without decoding; the reports of the stages."""
        drawing = Drawing(self.engine, self.job, self.session, None, self.stages, {})
        drawing.draw()
        wait(self.engine.components.device)
        return drawing.reports

    def picture(self) -> Result:
        """Sample and decode."""
        return self.engine.generate(self.job, self.session, stages=self.stages)

    def evaluations(self) -> int:
        """UNet evaluations (with and without text count as one) that this will take, from its plan."""
        return evaluations_of(self.stages, self.engine.calls(self.job, self.stages))
