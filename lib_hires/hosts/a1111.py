"""AUTOMATIC1111 1.10: a session around each wanted call of `p.sampler.sample` and `p.sampler.sample_img2img`.

    process                         arguments -> request -> infotext; wrong settings make `p.sample` raise
    process_before_every_sampling   wrap the sampler's two functions, on the instance, which the host throws away
      the wrapped function          open the session, register on_cfg_denoiser; close and remove both whatever happens
        on_cfg_denoiser             tell the session the noise level and the rows; reopen it if the model was changed
    post_sample                     if no pass was changed, say so and take the infotext back: this picture is plain

`modules` are imported in functions, so that `detect` can be asked anywhere.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from ..config.common import ABOVE, HIRES
from ..config.errors import Conflict, HiresError
from ..plan.models import LATENT_FACTOR
from ..request import Request
from ..schedule import NoiseSchedule
from ..unet.session import Session
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
        self.request, self.notes = asked.request, list(asked.notes)
        self.passes_seen = self.passes_changed = 0


class A1111:
    """The adapter; see the module's text for the order of things."""

    name = "AUTOMATIC1111"

    def __init__(self) -> None:
        self._runs: weakref.WeakSet[Run] = weakref.WeakSet()

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
        height, width = (length * LATENT_FACTOR for length in x.shape[-2:])
        if _wants(job.request, p, width, height):
            job.passes_changed += 1
            p.extra_generation_params.update(job.request.to_infotext())
            for name in _SAMPLER_FUNCTIONS:
                _wrap(p.sampler, name, lambda: Run(self._runs, p, job.request))

    def after_sampling(self, p: Any) -> None:
        """Where no pass was changed, say why; such a picture must not be labelled as ours."""
        job: Job | None = getattr(p, _JOB, None)
        if job is not None and not job.passes_changed:
            drop_infotext(p.extra_generation_params)
            _say(p, [_why_nothing(job)])


def _wants(request: Request, p: Any, width: int, height: int) -> bool:
    """`Common.wants_pass`; img2img has one pass only, which only the threshold can leave out."""
    if hasattr(p, "init_images") and request.common.passes != ABOVE:
        return True
    return request.common.wants_pass(bool(getattr(p, "is_hr_pass", False)), width, height)


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


def _wrap(sampler: Any, name: str, make_run: Callable[[], Run]) -> None:
    """Replace a sampler's function, on the instance, by one that opens a run around it. Twice is as good as once."""
    previous = getattr(sampler, name, None)
    if previous is None:
        return
    original = getattr(previous, "hires_lab_original", previous)

    @wraps(original)
    def sample(*args: Any, **kwargs: Any) -> Any:
        run = make_run()
        try:
            run.begin(sampler)
            return original(*args, **kwargs)
        except _Abort as abort:
            raise abort.error from None
        finally:
            run.end()

    sample.hires_lab_original = original
    setattr(sampler, name, sample)


class _Abort(BaseException):
    """Carries an error out of on_cfg_denoiser: the host swallows `Exception` there, and nothing else."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


class Run:
    """One call of a sampler: its session, and the callback that tells the session where the run is."""

    def __init__(self, runs: weakref.WeakSet[Run], p: Any, request: Request):
        self.p, self.request, self._runs = p, request, runs
        self.session: Session | None = None
        self._made_for: tuple[Any, Any] | None = None
        self._denoiser: Any = None

    def begin(self, sampler: Any) -> None:
        """Open the session and follow the sampler's steps. Raises `HiresError` where model and settings do not fit."""
        from modules import script_callbacks

        self._denoiser = sampler.model_wrap_cfg
        self._runs.add(self)
        self._open_session()
        script_callbacks.on_cfg_denoiser(self.follow)

    def end(self) -> None:
        """Take everything back; any number of times."""
        from modules import script_callbacks

        self._denoiser = None
        script_callbacks.remove_callbacks_for_function(self.follow)
        self.close_session()

    def close_session(self) -> None:
        """Undo the changes and pass the notes on."""
        session, self.session = self.session, None
        if session is not None:
            try:
                session.close()
            finally:
                _say(self.p, session.notes)

    def follow(self, params: Any) -> None:
        """on_cfg_denoiser, once a denoiser call: on the model that draws now, tell the level and the rows."""
        if params.denoiser is not self._denoiser:
            return
        try:
            if self.session is None or self._made_for != _current_model():
                self.close_session()
                self._open_session()
            self.session.at(
                **_level(params.denoiser, params.sigma),
                rows=_rows(params.denoiser, params.x.shape[0]),
                step=params.denoiser.step,
                steps=params.denoiser.total_steps,
            )
        except Exception as error:
            raise _Abort(error) from error

    def _open_session(self) -> None:
        from modules import sd_unet, shared

        if getattr(sd_unet, "current_unet", None) is not None:
            raise Conflict(
                f"the UNet is replaced by '{sd_unet.current_unet.option.label}', whose blocks cannot be changed. "
                "Set 'SD Unet' to 'None', or switch Hires Lab off."
            )
        model = shared.sd_model
        unet, checkpoint = _current_model()
        self.session = Session(
            unet,
            [self.request.method],
            self.request.common,
            seeds=self.p.seeds,
            schedule=NoiseSchedule(model.alphas_cumprod.tolist()),
            metadata=checkpoint.metadata,
            v_prediction=getattr(model, "parameterization", "eps") == "v",
            tokens_owned_by=_tokens_owner(self.p),
        ).open()
        self._made_for = unet, checkpoint


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


def _tokens_owner(p: Any) -> str | None:
    """Who else divides the attention's tokens in this pass."""
    from modules import shared

    is_hires = bool(getattr(p, "is_hr_pass", False))
    if getattr(shared.opts, "hypertile_enable_unet", False):
        return "Hypertile"
    if is_hires and getattr(shared.opts, "hypertile_enable_unet_secondpass", False):
        return "Hypertile"
    return "ToMe" if p.get_token_merging_ratio(for_hr=is_hires) > 0 else None


def _say(p: Any, notes: Sequence[str]) -> None:
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
