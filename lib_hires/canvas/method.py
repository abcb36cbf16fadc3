"""What the methods that denoise a canvas larger than the model have in common: views, and stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..config.common import Common
from ..config.errors import SettingError
from ..config.settings import AUTO, setting
from ..plan.method import Method
from ..plan.models import LATENT_FACTOR, Model
from ..plan.route import Size
from ..plan.tiling import (
    MEAN,
    MEAN_AND_STD,
    MIRROR,
    NOTHING,
    ZEROS,
    CanvasPlan,
    Cosines,
    Dilated,
    Local,
    Stage,
    first_size,
    fitting,
    is_too_large,
    stage_scales,
    whole_factor,
)

AS_FITS = "auto"
PLAIN, WINDOWS, RAUNET, SHRINK = "none", "window attention", "HiDiffusion", "Deep Shrink"
NO_GRIDS = "dilated sampling is left out: this picture is too long for the network to see it as a whole, so subjects may repeat."
NO_STAGES = "there are no stages: this picture is too short on one side for them. It is drawn through views, as by MultiDiffusion."
LEAST_RATIO = 1.05
"""Below this scale over the native size there is no second stage."""
STRENGTH = 0.4
"""The share of the sampler's steps that later stages run, where nothing else is asked for."""


@dataclass(frozen=True)
class CanvasMethod(Method):
    """Base of the methods that look at a canvas through views. `published_overlap`, `published_jitter`: shares of a view
    and of the overlap that the published code uses."""

    group: ClassVar[str] = "views"
    published_overlap: ClassVar[float] = 0.5
    published_jitter: ClassVar[float] = 0.0

    view_size: int = setting(
        0,
        "View size",
        "Side of a view in pixels; 0 takes the model's native size.",
        low=0,
        high=4096,
        step=8,
    )
    overlap: float = setting(
        AUTO,
        "View overlap",
        "How much neighbouring views share, as a fraction of their side; more is smoother and slower. -1 takes what was "
        "published for the method.",
        low=0.0,
        high=0.95,
        step=0.025,
        auto=True,
    )
    jitter: float = setting(
        AUTO,
        "View jitter",
        "How far views move at each step, as a fraction of the overlap, by the image's seed; -1 takes what was published.",
        low=0.0,
        high=0.5,
        step=0.05,
        auto=True,
    )
    wrap_x: bool = setting(
        False, "Wrap left to right", "Join the left and right edge, for panoramas and textures that repeat."
    )
    wrap_y: bool = setting(False, "Wrap top to bottom", "Join the top and bottom edge.")
    tile_batch: int = setting(
        0,
        "Views at once",
        "Views in one call of the network; 0 takes as many as the free memory holds. The picture does not change.",
        low=0,
        high=64,
        step=1,
    )
    inside: str = setting(
        PLAIN,
        "Inside views",
        "A change of the network while it draws views: attention in windows is faster; the other two matter for views "
        "larger than the native size.",
        choices=(PLAIN, WINDOWS, RAUNET, SHRINK),
    )

    def stages(self, model: Model, size: Size, common: Common, started: bool = False) -> tuple[Stage, ...]:
        """One sampling run with views on the whole canvas."""
        return (Stage(size, canvas=CanvasPlan(local=self.local(model), tile_batch=self.tile_batch)),)

    def refuse_published_circles(self) -> None:
        """Raises `SettingError` where edges are to meet as published: for methods that have `published`."""
        if self.published and (self.wrap_x or self.wrap_y):
            raise SettingError("published", True, "false where 'wrap_x' or 'wrap_y' is true", "Switch one of them off.")

    def not_published_at(self, size: Size, way: str) -> SettingError:
        """The error of a `published` that is not for pictures of `size`; `way`: which it is for, in a sentence."""
        height, width = (length * LATENT_FACTOR for length in size)
        return SettingError("published", True, f"false for {width}x{height}", way)

    def local(self, model: Model) -> Local:
        """The views. Raises `SettingError` where they leave gaps."""
        window = max(1, (self.view_size or model.native) // LATENT_FACTOR)
        share = self.published_overlap if self.overlap == AUTO else self.overlap
        stride = max(1, round(window * (1 - share)))
        loose = self.published_jitter if self.jitter == AUTO else self.jitter
        return Local(
            (window, window), (stride, stride), wrap=(self.wrap_y, self.wrap_x), jitter=int((window - stride) * loose)
        )


@dataclass(frozen=True)
class StagedMethod(CanvasMethod):
    """Base of the methods that draw at the native size first, then in stages up to the size asked for."""

    group: ClassVar[str] = "stages"
    published_jitter: ClassVar[float] = 0.25
    shuffle: ClassVar[str] = "none"

    stage_strength: float = setting(
        STRENGTH,
        "Stage strength",
        "How much of the sampler's steps each stage after the first runs: 1 is the published full schedule, less starts "
        "each stage at a lower noise level, stays closer to the first picture and is as much faster. 'As published' takes 1 "
        f"where this is {STRENGTH:g}.",
        low=0.05,
        high=1.0,
        step=0.05,
        simple=True,
    )
    max_step: float = setting(
        2.0, "Largest step", "Most that a stage enlarges the one before.", low=1.2, high=4.0, step=0.1
    )
    skip_residual: bool = setting(
        True, "Skip residual", "Pull each stage to the stage before while the layout is decided."
    )
    dilated_sampling: bool = setting(
        True, "Dilated sampling", "Denoise interleaved grids too, each of which sees the whole picture."
    )
    cosine_1: float = setting(
        3.0, "Cosine 1", "Exponent of the skip residual's share; more lets go earlier.", low=0.1, high=20.0, step=0.1
    )
    cosine_2: float = setting(
        1.0, "Cosine 2", "Exponent of the dilated grids' share; more lets go earlier.", low=0.1, high=20.0, step=0.1
    )
    cosine_3: float = setting(
        1.0, "Cosine 3", "Exponent of the filter's width; more narrows it earlier.", low=0.1, high=20.0, step=0.1
    )
    filter_sigma: float = setting(
        0.8,
        "Filter sigma",
        "Width in latents of the Gaussian filter before the grids. Acts only with the skip residual, which takes away the "
        "noise that it leaves.",
        low=0.0,
        high=8.0,
        step=0.1,
    )
    anchor: str = setting(
        AS_FITS,
        "Colour anchor",
        "What each stage keeps of the native picture's colours: their mean; mean and std, as published, which can tint a "
        "subject on a plain ground and outline it; or nothing. 'auto' is the mean, with 'As published' both.",
        choices=(AS_FITS, MEAN, MEAN_AND_STD, NOTHING),
        since=2,
        before=MEAN_AND_STD,
    )
    published: bool = setting(
        False,
        "As published",
        "Repeat the published code's own choices: every whole scale as a stage, run in full, zeros around edge views, one "
        "mean and std over all channels as anchor. What is set to automatic follows. Only for sizes that are whole "
        "multiples of the native size.",
    )

    def validate(self) -> None:
        """The published choices know no circles."""
        self.refuse_published_circles()
        if self.published and self.anchor in (MEAN, NOTHING):
            raise SettingError("anchor", self.anchor, f"{AS_FITS!r} or {MEAN_AND_STD!r} where 'published' is true")

    def stages(self, model: Model, size: Size, common: Common, started: bool = False) -> tuple[Stage, ...]:
        """The native stage and those after it; where the host `started` (img2img), one stage on its latents."""
        native = model.native // LATENT_FACTOR
        first, ratio = first_size(size, native)
        is_long = self.is_long(model, size)

        def later(reached: Size, scale: float) -> CanvasPlan:
            plan = self.canvas(model, reached, scale)
            is_one_view = len(plan.local.views(reached)) == 1
            if is_long or is_one_view:  # nothing to choose words by, or nothing to choose them for
                plan = replace(plan, window_prompts=None)
            if is_one_view and plan.dilated is None and not any(plan.local.circles(reached)):  # plain sampling
                plan = replace(plan, edges=None)
            return plan

        published = self._published_stages(model, size, native) if self.published else ()
        if started:
            return (Stage(size, ratio, canvas=later(size, ratio)).given(),)
        if published:
            return published
        if ratio < LEAST_RATIO:
            return (Stage(size, canvas=self.first_canvas(model, size)),)
        result = []
        for scale in stage_scales(ratio, self.max_step):
            reached = size if scale == ratio else tuple(fitting(length * scale / ratio) for length in size)
            result.append(Stage(reached, scale, self.strength, later(reached, scale)))
        gathers = any(stage.canvas.window_prompts for stage in result)
        return (Stage(first, canvas=None if gathers else self.first_canvas(model, first)), *result)

    def left_out(self, model: Model, stages: Sequence[Stage], started: bool = False) -> tuple[str, ...]:
        """Stages or dilated sampling of a long panorama."""
        if not self.is_long(model, stages[-1].size):
            return ()
        if len(stages) == 1 and not started:
            return (NO_STAGES,)
        return (NO_GRIDS,) if self.dilated_sampling else ()

    def is_long(self, model: Model, size: Size) -> bool:
        """Whether even the first stage of a picture of `size` is too large for the network to be drawn at once."""
        native = model.native // LATENT_FACTOR
        return not self.published and is_too_large(first_size(size, native)[0], self.largest(model))

    def largest(self, model: Model) -> int:
        """Side in latents of what the network may be asked for at once: the native size, or larger views."""
        return max(model.native, self.view_size) // LATENT_FACTOR

    @property
    def strength(self) -> float:
        """The share of the sampler's steps that each stage after the first runs."""
        return 1.0 if self.published and self.stage_strength == STRENGTH else self.stage_strength

    def first_canvas(self, model: Model, size: Size) -> CanvasPlan | None:
        """The canvas of a first stage: views where it is too large for the network, else none.

        Where edges meet one view as large as the stage, which is turned.
        """
        local = self.local(model)
        if not is_too_large(size, self.largest(model)):
            if not any(local.wrap):
                return None
            local = Local(size, size, wrap=local.wrap)
        return CanvasPlan(local=local, tile_batch=self.tile_batch)

    def canvas(self, model: Model, size: Size, scale: float) -> CanvasPlan:
        """The canvas of a stage that is `scale` times the first."""
        local = self.local(model)
        return CanvasPlan(
            local=Local(**{**vars(local), "edge": ZEROS if self.published else MIRROR, **self.view_options()}),
            dilated=self.dilated(model, size, scale),
            skip_residual=self.skip_residual,
            cosines=Cosines(self.cosine_1, self.cosine_2, self.cosine_3),
            tile_batch=self.tile_batch,
            anchor=(MEAN_AND_STD if self.published else MEAN) if self.anchor == AS_FITS else self.anchor,
            published=self.published,
        )

    def dilated(self, model: Model, size: Size, scale: float) -> Dilated | None:
        """The grids of a stage; None where each would be too large for the network, or all there is."""
        native = model.native // LATENT_FACTOR
        # Grids step what they saw filtered: the noise that the filter hid stays, unless the skip residual replaces the state.
        sigma = self.filter_sigma if self.skip_residual else 0.0
        found = Dilated(whole_factor(scale, size, native), sigma, self.shuffle)
        is_fitting = found.dilation > 1 and not is_too_large(found.grid_size(size), self.largest(model))
        return found if self.dilated_sampling and is_fitting else None

    def view_options(self) -> dict:
        """Further fields of the views."""
        return {}

    def _published_stages(self, model: Model, size: Size, native: int) -> tuple[Stage, ...]:
        longest = max(size)
        if longest % native:
            way = f"The published stages reach whole multiples of {model.native} on the longer side only."
            raise self.not_published_at(size, way)
        count = longest // native
        result = [Stage(tuple(length // count for length in size))]
        for scale in range(2, count + 1):
            reached = size if scale == count else tuple(length * scale // count for length in size)
            result.append(Stage(reached, float(scale), self.strength, self.canvas(model, reached, scale)))
        return tuple(result)
