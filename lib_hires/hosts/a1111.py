"""AUTOMATIC1111 1.10: a session around each wanted call of `p.sampler.sample` and `p.sampler.sample_img2img`.

    process                         arguments -> request -> infotext; wrong settings make `p.sample` raise
    process_before_every_sampling   wrap the sampler's two functions, on the instance, which the host throws away; the host's
                                    bar goes by the work of passes and stages until postprocess_batch (_a1111/progress.py)
      the wrapped function          what Auto chooses; a run, or several of methods with stages (_a1111/passes.py)
        a run                       open the session, register on_cfg_denoiser; close and remove both whatever happens
          on_cfg_denoiser           tell the session the noise level and the rows; reopen it if the model was changed
      after it                      decode in tiles where the memory asks for it (_a1111/decoding.py)
    post_sample                     if no pass was wanted, say so and take the infotext back: this picture is plain
    postprocess_batch               no longer decode in tiles

`modules` are imported in functions, so that `detect` can be asked anywhere.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch

from ..canvas.method import CanvasMethod
from ..config.common import ABOVE, HIRES
from ..config.errors import Conflict, HiresError
from ..patches import UndoLog
from ..plan.method import Wanted
from ..plan.models import Model
from ..plan.route import Size
from ..request import CHOSEN_KEY, Request
from ..schedule import NoiseSchedule
from ..stages.inside import unet_methods
from ..stages.progressive import StageRun
from ..unet.attention_maps import AttentionMaps
from ..unet.session import Session
from ._a1111 import foreseen
from ._a1111.decoding import Decoding
from ._a1111.passes import Pass
from ._a1111.progress import Progress
from ._a1111.samplers import keeps_state
from ._a1111.views import Views
from .protocol import OVERRIDE, Asked, Reader, drop_infotext, fail_when_sampled, forget_failure, forget_package

_JOB = "hires_lab_job"
_SAMPLER_FUNCTIONS = ("sample", "sample_img2img")


def detect() -> bool:
    """Whether this is A1111 or built like it: its own denoiser module, and none of the Forge family's backends."""
    return (
        _exists("modules.sd_samplers_cfg_denoiser")
        and _exists("modules.sd_hijack_unet")
        and not (_exists("modules_forge") or _exists("ldm_patched"))
    )


def make_host() -> A1111:
    """The adapter."""
    return A1111()


class Job:
    """What is known of one job (one call of `process_images`)."""

    def __init__(self, asked: Asked):
        self.request = asked.request
        self.passes_seen = 0
        self.is_changed = self.is_resolved = False  # whether a pass was changed; whether Auto chose for one
        self.works: list[list[int]] | None = None  # of each stage of each pass of a picture
        self._told: set[str] = set()

    def tell(self, text: str) -> None:
        """A sentence for the console, once."""
        if text not in self._told:
            self._told.add(text)
            print(f"Hires Lab: {text}")


class A1111:
    """The adapter; see the module's text for the order of things."""

    name = "AUTOMATIC1111"

    def __init__(self) -> None:
        self._runs: weakref.WeakSet[Run] = weakref.WeakSet()
        self._decoding = Decoding()
        self._progress = Progress()

    def register(self) -> None:
        """Sweep when the script is unloaded, suspend when a model is loaded."""
        from modules import script_callbacks

        script_callbacks.on_model_loaded(lambda _model: self.suspend())
        script_callbacks.on_script_unloaded(self.unload)

    def sweep(self) -> None:
        """End every run that is still there: none should be, but a host may have died in the middle of one."""
        for run in list(self._runs):
            run.end()
            self._runs.discard(run)
        self._decoding.close()
        self._progress.close()

    def unload(self) -> None:
        """The scripts are about to be loaded again: leave nothing behind, our modules neither."""
        self.sweep()
        forget_package()

    def suspend(self) -> None:
        """Undo the changes of all runs; those that go on reopen at their next step. For a model that is exchanged."""
        for run in list(self._runs):
            run.close_session()

    def prepare(self, p: Any, read: Reader) -> None:
        """Read what is asked for; where it is wrong, the job will fail with its sentence."""
        self.sweep()
        forget_failure(p)
        drop_infotext(p.extra_generation_params)
        setattr(p, _JOB, None)
        try:
            asked = read(getattr(p, OVERRIDE, None))
        except HiresError as error:
            fail_when_sampled(p, error)
            return
        if asked.request is not None:
            setattr(p, _JOB, Job(asked))
            p.extra_generation_params.update(asked.request.to_infotext())
            _say(p, asked.notes)

    def before_sampling(self, p: Any, x: Any) -> None:
        """Wrap the sampler of this pass if the request wants the pass. x: (B, C, H, W)."""
        job: Job | None = getattr(p, _JOB, None)
        if job is None:
            return
        job.passes_seen += 1
        size = tuple(x.shape[-2:])
        hires = foreseen.is_hires(p)
        if foreseen.wants(job.request, p, size, hires):
            job.is_changed = job.is_changed or not job.request.is_automatic
            p.extra_generation_params.update(job.request.to_infotext())
            for name in _SAMPLER_FUNCTIONS:
                _wrap(p.sampler, name, lambda *call: self._draw(p, job, size, *call))
        if job.works is None:
            job.works = foreseen.works(p, job.request, size, lambda: self._model(p, job.request))
        self._progress.begin(job.works, int(hires))

    def _model(self, p: Any, request: Request) -> Model:
        """What the host's model is, whatever the request's method."""
        return Run(self._runs, p, Request(common=request.common)).make_session().model

    def _draw(
        self, p: Any, job: Job, size: Size, sampler: Any, name: str, original: Callable, args: tuple, kwargs: dict
    ) -> Any:
        """What a wrapped sampler function does."""
        self._decoding.close()
        request = job.request
        if request.is_automatic:
            request = self._resolved(p, request, Wanted(size, p.steps, keeps_state(sampler)))
            job.is_resolved = True
        if request.method is None:
            return original(*args, **kwargs)
        job.is_changed = True

        def make_run(stage: StageRun | None = None, maps: AttentionMaps | None = None) -> Run:
            return Run(self._runs, p, request, stage, maps)

        if isinstance(request.method, CanvasMethod):
            model = make_run().make_session().model
            note = lambda text: _say(p, [text])  # noqa: E731 - a name for what it does
            call = sampler, name, original, (args, kwargs)
            latents = Pass(p, request, model, *call, make_run, note, job.tell, self._progress).draw()
        else:
            run = make_run()
            try:
                run.begin(sampler)
                latents = original(*args, **kwargs)
            finally:
                run.end()
        if isinstance(latents, torch.Tensor):
            wrap = (getattr(request.method, "wrap_y", False), getattr(request.method, "wrap_x", False))
            _say(p, filter(None, [self._decoding.open(latents, wrap)]))
        return latents

    def _resolved(self, p: Any, request: Request, wanted: Wanted) -> Request:
        """An automatic request with what it chooses for a pass: said, and written down beside what it chose for others."""
        request = request.resolved(self._model(p, request), wanted)
        before = p.extra_generation_params.get(CHOSEN_KEY, "").split(", ")
        chosen = dict.fromkeys(filter(None, [*before, request.chosen]))
        p.extra_generation_params[CHOSEN_KEY] = ", ".join(chosen)
        _say(p, [request.note])
        return request

    def after_decoding(self, p: Any) -> None:
        """The pictures are decoded, and the host has counted them."""
        self._decoding.close()
        self._progress.close()

    def after_sampling(self, p: Any) -> None:
        """Where no pass was changed, say why; such a picture must not be labelled as ours."""
        job: Job | None = getattr(p, _JOB, None)
        if job is not None and not (job.is_changed or job.is_resolved):
            drop_infotext(p.extra_generation_params)
            _say(p, [_why_nothing(job)])


def _why_nothing(job: Job) -> str:
    if not job.passes_seen:
        return (
            "nothing was changed: the script that drew this does its own sampling, "
            "which does not tell extensions when it starts."
        )
    common = job.request.common
    if common.passes == ABOVE:
        return f"nothing was changed: no pass reached 'threshold', {common.threshold:g} megapixels."
    advice = " Switch Hires. fix on, or choose 'both passes'." if common.passes == HIRES else ""
    return f"nothing was changed: 'passes' is '{common.passes}', and there was none.{advice}"


def _wrap(sampler: Any, name: str, draw: Callable[[Any, str, Callable, tuple, dict], Any]) -> None:
    """Replace a sampler's function, on the instance, by one of ours. Twice is as good as once."""
    previous = getattr(sampler, name, None)
    if previous is None:
        return
    original = getattr(previous, "hires_lab_original", previous)

    @wraps(original)
    def sample(*args: Any, **kwargs: Any) -> Any:
        try:
            return draw(sampler, name, original, args, kwargs)
        except _Abort as abort:
            raise abort.error from None

    sample.hires_lab_original = original
    setattr(sampler, name, sample)


class _Abort(BaseException):
    """Carries an error out of on_cfg_denoiser: the host swallows `Exception` there, and nothing else."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


class Run:
    """One call of a sampler: its session, its canvas, and the callback that tells both where the run is.

    stage: what is drawn on a canvas, or None; maps: attention maps that are gathered while they are open, or None.
    """

    def __init__(
        self,
        runs: weakref.WeakSet[Run],
        p: Any,
        request: Request,
        stage: StageRun | None = None,
        maps: AttentionMaps | None = None,
    ):
        self.p, self.request, self.maps, self._runs = p, request, maps, runs
        self._is_stage = stage is not None and not hasattr(p, "init_images") and not foreseen.is_hires(p)
        self.views = Views(stage, lambda text: _say(p, [text])) if stage is not None else None
        self.session: Session | None = None
        self._made_for: tuple[Any, Any] | None = None
        self._denoiser: Any = None
        self._sampler_log, self._model_log = UndoLog(), UndoLog()

    def begin(self, sampler: Any) -> None:
        """Open the session and follow the sampler's steps. Raises `HiresError` where model and settings do not fit."""
        from modules import script_callbacks

        self._denoiser = sampler.model_wrap_cfg
        self._runs.add(self)
        self._open_session()
        if self.views is not None:
            self._sampler_log.override(self._denoiser, "forward", self._pulled)
        script_callbacks.on_cfg_denoiser(self.follow)

    def end(self) -> None:
        """Take everything back; any number of times."""
        from modules import script_callbacks

        self._denoiser = None
        script_callbacks.remove_callbacks_for_function(self.follow)
        try:
            self._sampler_log.undo()
        finally:
            self.close_session()

    def close_session(self) -> None:
        """Undo the changes and pass the notes on."""
        session, self.session = self.session, None
        try:
            self._model_log.undo()
        finally:
            if session is not None:
                try:
                    session.close()
                finally:
                    _say(self.p, session.notes)

    def _pulled(self, previous: Callable) -> Callable:
        """The sampler's denoiser, told its state after the skip residual; in place, so that the sampler goes on from it."""

        def forward(x: Any, sigma: Any, *args: Any, **kwargs: Any) -> Any:
            level = _level(self._denoiser, sigma)
            self.views.pull(x, self._schedule.moment(**level), "timestep" in level, begin=self._is_stage)
            return previous(x, sigma, *args, **kwargs)

        return forward

    def follow(self, params: Any) -> None:
        """on_cfg_denoiser, once a denoiser call: on the model that draws now, tell the level and the rows."""
        if params.denoiser is not self._denoiser:
            return
        try:
            if self.session is None or self._made_for != _current_model():
                self.close_session()
                self._open_session()
            level, images = _level(params.denoiser, params.sigma), _rows(params.denoiser, params.x.shape[0])
            self.session.at(**level, rows=images, step=params.denoiser.step, steps=params.denoiser.total_steps)
            prompts = _prompts(params.denoiser, len(images))
            if self.maps is not None and self.maps.is_open:
                self.maps.rows(prompts)
            if self.views is not None:
                _refuse_other_views(params.denoiser)
                scale = params.denoiser.sampler.sampler_extra_args["cond_scale"] * params.denoiser.cond_scale_miltiplier
                self.views.at(self._schedule.moment(**level), list(zip(images, prompts)), scale, self.session)
        except Exception as error:
            raise _Abort(error) from error

    def _open_session(self) -> None:
        from modules import shared

        self.session = self.make_session().open()
        self._schedule, self._made_for = self.session.schedule, _current_model()
        if self.views is not None:
            self._model_log = UndoLog()
            self._model_log.override(shared.sd_model, "apply_model", self.views.over)

    def make_session(self) -> Session:
        """The session for the model that draws now, not yet open."""
        from modules import sd_unet, shared

        if getattr(sd_unet, "current_unet", None) is not None:
            raise Conflict(
                f"the UNet is replaced by '{sd_unet.current_unet.option.label}', whose blocks cannot be changed. "
                "Set 'SD Unet' to 'None', or switch Hires Lab off."
            )
        model = shared.sd_model
        unet, checkpoint = _current_model()
        return Session(
            unet,
            unet_methods(self.request.method),
            self.request.common,
            seeds=self.p.seeds,
            schedule=NoiseSchedule(model.alphas_cumprod.tolist()),
            metadata=checkpoint.metadata,
            v_prediction=getattr(model, "parameterization", "eps") == "v",
            tokens_owned_by=_tokens_owner(self.p),
        )


def _current_model() -> tuple[Any, Any]:
    """(UNet, checkpoint) that the host draws with now; either may change in the middle of a run (refiner)."""
    from modules import shared

    network = getattr(shared.sd_model.model, "diffusion_model", None)
    if network is None:
        network = shared.sd_model.model
    return network, shared.sd_model.sd_checkpoint_info


def _level(denoiser: Any, sigma: Any) -> dict[str, float]:
    """The noise level of a call: k-diffusion samplers give sigmas, the timestep samplers' `sigma` is a timestep."""
    value = float(sigma.flatten()[0])
    return {"sigma": value} if hasattr(denoiser.inner_model, "sigmas") else {"timestep": value}


def _rows(denoiser: Any, count: int) -> list[int]:
    """The image of each row: every AND part of image 0, of image 1, ..., then the uncond rows, image after image."""
    batch = denoiser.sampler.sampler_extra_args["cond"].batch
    rows = [image for image, parts in enumerate(batch) for _ in parts]
    rest = max(count - len(rows), 0)
    return rows + [row % len(batch) for row in range(rest)]


def _prompts(denoiser: Any, count: int) -> list[int | None]:
    """The number of each row's prompt, AND parts counted one by one; None for uncond rows."""
    parts = sum(len(each) for each in denoiser.sampler.sampler_extra_args["cond"].batch)
    return [row if row < parts else None for row in range(count)]


def _refuse_other_views(denoiser: Any) -> None:
    """Tiled Diffusion, and what is made like it, puts views of its own in the same place."""
    if "forward" in vars(denoiser.inner_model):
        raise Conflict(
            "another extension (Tiled Diffusion, for instance) divides the picture into views already. Switch one of them off."
        )


def _tokens_owner(p: Any) -> str | None:
    """Who else divides the attention's tokens in this pass."""
    from modules import shared

    is_hires = foreseen.is_hires(p)
    if getattr(shared.opts, "hypertile_enable_unet", False):
        return "Hypertile"
    if is_hires and getattr(shared.opts, "hypertile_enable_unet_secondpass", False):
        return "Hypertile"
    return "ToMe" if p.get_token_merging_ratio(for_hr=is_hires) > 0 else None


def _say(p: Any, notes: Iterable[str]) -> None:
    """Each note once in a job: on the console, and below the picture."""
    for note in notes:
        text = f"Hires Lab: {note}"
        if text not in p.comments:
            print(text)
            p.comment(text)


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
