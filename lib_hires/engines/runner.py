"""Runs jobs as the command line writes them: loads a checkpoint once, opens a session, draws, saves, reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import __version__
from ..config.errors import HiresError, SettingError
from ..memory import OUT_OF_MEMORY
from ..plan.describe import describe_plan, describe_stages, run_in_words
from ..plan.method import Method, Wanted
from ..plan.tiling import Stage, evaluations_of
from ..request import Request
from ..schedule import Level, NoiseSchedule
from ..stages.inside import unet_methods
from ..unet.session import Session
from . import samplers
from .checkpoint import load
from .components import Components
from .drawing import control_notes, stage_sampler
from .pictures import init_picture, parameters_of, save, whole_file
from .standalone import Engine, Job, Result

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEVICES = ("cpu", "cuda")
PLAIN = "Plain sampling"
_JOB_FIELDS = ("prompt", "negative", "width", "height", "steps", "cfg", "sampler", "seed", "batch", "denoise")


@dataclass
class Prepared:
    """A job that can be drawn: everything was read and checked. `calls`: denoiser calls of each stage."""

    engine: Engine
    request: Request
    job: Job
    session: Session | None
    stages: tuple[Stage, ...]
    calls: list[int]

    @property
    def in_words(self) -> str:
        """One line: the method, the sizes, the work."""
        title = self.request.method.title if self.session else PLAIN
        return run_in_words(title, self.stages, self.calls)


class Runner:
    """Draws jobs one after the other; the checkpoint of the last one stays loaded."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._loaded: tuple[Any, Components] | None = None

    def plan(self, job: Mapping[str, Any]) -> list[str]:
        """What drawing a job would do, in words. Raises `HiresError` as drawing would."""
        ready = self._prepare(job)
        written, drawn, engine = ready.request.written, ready.job, ready.engine
        head = f"{written.title if written else PLAIN}, {engine.components.path.name}, {drawn.sampler}, {drawn.steps} steps"
        return [
            f"{head}, batch of {drawn.batch}:",
            *notes_of(ready.request, ready.session),
            *_plan_lines(ready),
            *control_notes(drawn, ready.stages, engine.control),
            *engine.estimate(drawn, ready.session, ready.stages),
        ]

    def draw(
        self,
        job: Mapping[str, Any],
        on_step: Callable[[int, int], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Draw a job's pictures, write them and its report, and return the report.

        `on_step(done, total)` is told of the work in UNet evaluations (see `Engine.generate`); without it one line with the
        plan and a progress bar are shown on stderr unless `quiet`. Where `stopped()` becomes true the pictures so far are written.
        """
        ready = self._prepare(job)
        engine, engine_job, request, session = ready.engine, ready.job, ready.request, ready.session
        components, is_silent = engine.components, self.quiet or on_step is not None
        if not is_silent:
            print(ready.in_words, file=sys.stderr, flush=True)
        total = evaluations_of(ready.stages, ready.calls)
        with tqdm(total=total, disable=is_silent, unit="evaluation", leave=False) as bar:
            result = _generate(ready, on_step or _advance(bar), stopped)
        texts = [
            parameters_of(job, request, i, components.path.stem, __version__, result.interrupted)
            for i in range(engine_job.batch)
        ]
        files = [str(name) for name in picture_names(Path(job["out"]), engine_job.batch)]
        for picture, name, text in zip(result.images, files, texts):
            save(picture, Path(name), text)
        report = report_of(components, request, session, engine_job, result) | {"files": files, "infotext": texts[0]}
        if job["report"]:
            with whole_file(Path(job["report"])) as part:
                part.write_text(json.dumps(report, indent=2), encoding="utf-8")
        return report

    def load(self, job: Mapping[str, Any]) -> Components:
        """The job's checkpoint on its device."""
        device, dtype = device_and_dtype(job["device"], job["dtype"])
        key = (job["checkpoint"], device, dtype)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            self._loaded = (key, load(job["checkpoint"], device=device, dtype=dtype))
        return self._loaded[1]

    def _prepare(self, job: Mapping[str, Any]) -> Prepared:
        """What planning and drawing begin with. Raises `HiresError` for what is wrong with the job."""
        request = Request.from_dict({"method": job["method"], **job["set"]})
        components = self.load(job)
        _check_model(job, components)
        engine_job = engine_job_of(job)
        request = resolved(components, request, engine_job)
        session = session_for(components, request, engine_job)
        stages = stages_of(components, request, engine_job, session)
        if session is not None:
            session.notes += request.method.left_out(session.model, stages, engine_job.started)
        engine = Engine(components, load_control(job.get("controlnet"), components), decode_bytes_of(job))
        engine.check(engine_job, stages)
        return Prepared(engine, request, engine_job, session, stages, engine.calls(engine_job, stages))


def _plan_lines(ready: Prepared) -> list[str]:
    """What each UNet call or stage is, in words."""
    session, stages = ready.session, ready.stages
    if session is None:
        return [f"{sum(ready.calls)} denoiser calls, the UNet unchanged."]
    if len(stages) > 1 or stages[0].canvas:
        return describe_stages(stages, ready.calls) + [f"inside views: {method.title}" for method in session.methods]
    run, first = stage_sampler(ready.job, ready.engine.components, stages[0], 0)
    schedule = ready.engine.schedule()
    calls, begun = range(first, len(run.timesteps)), run.positions[first]
    levels = [
        Level(schedule.progress(run.timesteps[call]), run.positions[call] - begun, run.steps - begun) for call in calls
    ]
    return describe_plan(session.model, stages[0].size, session.plan_for(stages[0].size), levels)


def decode_bytes_of(job: Mapping[str, Any]) -> int | None:
    """The job's limit for decoding, from MiB; None for what is free. Raises `SettingError`."""
    limit = job.get("decode_memory") or 0
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise SettingError("decode_memory", limit, "a whole number of MiB, or 0 for what is free")
    return limit * 2**20 or None


def _check_model(job: Mapping[str, Any], components: Components) -> None:
    """Raises `HiresError` where a picture is to be repeated that another model drew, and none was chosen."""
    drawn_by = job.get("model") or components.path.stem
    if job["checkpoint"] is None and drawn_by != components.path.stem:
        raise HiresError(
            f"'from_image' was drawn by the model '{drawn_by}'. Add --checkpoint FILE, its own or another."
        )


def _generate(ready: Prepared, on_step: Callable[[int, int], None], stopped: Callable[[], bool]) -> Result:
    """`Engine.generate`, with a sentence for the likeliest failure of all."""
    job = ready.job
    try:
        return ready.engine.generate(job, ready.session, on_step, ready.stages, stopped=stopped)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, OUT_OF_MEMORY)) and "allocate memory" not in str(error):
            raise
        raise HiresError(
            f"out of memory at {job.width}x{job.height}, batch of {job.batch}. Lower 'batch', 'width' or 'height'."
        ) from error


def session_for(components: Components, request: Request, job: Job) -> Session | None:
    """The session of a job; None for plain sampling, and where the request is for a pass that this is not."""
    if request.method is None or not _wants(request, job):
        return None
    return _session(components, request, job, unet_methods(request.method))


def resolved(components: Components, request: Request, job: Job) -> Request:
    """The request, an automatic method replaced by the one that it chooses for this model and size."""
    if not (request.is_automatic and _wants(request, job)):
        return request
    model = _session(components, request, job, ()).model
    size = (job.height // components.factor, job.width // components.factor)
    return request.resolved(model, Wanted(size, job.steps, samplers.keeps_state(job.sampler)))


def _wants(request: Request, job: Job) -> bool:
    return request.common.wants_pass(False, job.width, job.height, only=job.started)


def _session(components: Components, request: Request, job: Job, methods: Sequence[Method]) -> Session:
    size = components.native_resolution
    return Session(
        components.unet,
        methods,
        request.common,
        seeds=job.seeds,
        schedule=schedule_of(components),
        metadata={"modelspec.resolution": f"{size}x{size}"} if size else None,
        v_prediction=components.prediction_type == "v_prediction",
    )


def stages_of(components: Components, request: Request, job: Job, session: Session | None) -> tuple[Stage, ...]:
    """The sampling runs that lead to a job's size."""
    size = (job.height // components.factor, job.width // components.factor)
    if session is None:
        return (Stage(size),)
    return request.method.stages(session.model, size, request.common, started=job.started)


def schedule_of(components: Components) -> NoiseSchedule:
    """The noise schedule that the model was trained with."""
    return Engine(components).schedule()


def load_control(folder: str | None, components: Components) -> Any:
    """A ControlNet from a diffusers folder or a single file, on the model's device; None without one."""
    if not folder:
        return None
    from diffusers import ControlNetModel

    path = Path(folder)
    if not path.exists():
        raise SettingError("controlnet", folder, "a folder or a file that exists", "Check the path.")
    try:
        if path.is_dir():  # never from pickles
            options = {"use_safetensors": True, "low_cpu_mem_usage": False}
            control = ControlNetModel.from_pretrained(str(path), torch_dtype=components.dtype, **options)
        else:
            control = ControlNetModel.from_single_file(str(path), torch_dtype=components.dtype)
    except Exception as error:
        raise HiresError(f"the ControlNet '{folder}' cannot be read: {error}") from error
    if control.config.cross_attention_dim != components.unet.config.cross_attention_dim:
        raise HiresError(f"the ControlNet '{folder}' belongs to another family of models than {components.path.name}.")
    return control.to(components.device).eval()


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What `auto` means here: the GPU in half precision where there is one, else the CPU in single precision."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in DEVICES:
        raise SettingError("device", device, "one of 'auto', 'cpu', 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise HiresError(
            "'device' is 'cuda', but torch finds no CUDA device. Use 'cpu', or install a CUDA build of torch."
        )
    if dtype == "auto":
        dtype = "fp16" if device == "cuda" else "fp32"
    if dtype not in DTYPES:
        raise SettingError("dtype", dtype, "one of 'auto', 'fp32', 'fp16', 'bf16'")
    return torch.device(device), DTYPES[dtype]


def engine_job_of(job: Mapping[str, Any]) -> Job:
    """The part of a job that the engine draws. Raises `SettingError` for a value of the wrong kind."""
    values = {name: job[name] for name in _JOB_FIELDS}
    for name in ("width", "height", "steps", "seed", "batch"):
        if isinstance(values[name], bool) or not isinstance(values[name], int):
            raise SettingError(name, values[name], "a whole number")
    for name in ("cfg", "denoise"):
        if isinstance(job[name], bool) or not isinstance(job[name], (int, float)):
            raise SettingError(name, job[name], "a number")
    return Job(**values, init=init_picture(job["init_image"]) if job.get("init_image") else None)


def picture_names(out: Path, batch: int) -> list[Path]:
    """`FILE.png`, or `FILE-1.png`, `FILE-2.png`, ... for a batch."""
    if batch == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{index}{out.suffix}") for index in range(1, batch + 1)]


def report_of(
    components: Components, request: Request, session: Session | None, job: Job, result: Result
) -> dict[str, Any]:
    """What ran, as plain data."""
    settings = request.to_dict()
    device = torch.cuda.get_device_name(components.device) if components.device.type == "cuda" else "cpu"
    return {
        "method": settings.pop("method"),
        "settings": settings if request.written else {},
        "chosen": request.chosen,
        "seed": job.seed,
        "batch": job.batch,
        "device": device,
        "dtype": str(components.dtype).removeprefix("torch."),
        "checkpoint": components.path.name,
        "stages": result.stages,
        "unet_calls": result.unet_calls,
        "seconds": result.seconds,
        "peak_memory": result.peak_memory,
        "routes": dict(session.ran) if session else {},
        "interrupted": result.interrupted,
        "notes": notes_of(request, session) + result.notes + _interrupted_in_words(result),
    }


def notes_of(request: Request, session: Session | None) -> list[str]:
    """What was left out and why."""
    notes = [request.note] if request.note else []
    if session is not None:
        return notes + session.notes
    if request.method is not None:
        return [f"{request.method.title} is off: 'passes' is '{request.common.passes}', which does not want this pass."]
    return notes


def _interrupted_in_words(result: Result) -> list[str]:
    if not result.interrupted:
        return []
    width, height = result.images[0].size
    return [f"interrupted in {result.interrupted}: the picture is what there was by then, {width}x{height}."]


def _advance(bar: tqdm) -> Callable[[int, int], None]:
    return lambda done, _total: bar.update(done - bar.n)
