"""A session: opened for one sampling run, it owns every change of the UNet and undoes them all.

Once before each UNet call (a forward pre-hook of the UNet) it asks where the run is, finds the route of that noise level
and swaps it in or out; window attention stays for the run. Nothing is counted, so separate cond and uncond calls,
two-evaluation samplers, img2img and other sizes in between all come out right.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn

from ..config.common import Common
from ..config.errors import Conflict, HiresError, SettingError
from ..patches import UndoLog
from ..plan.method import Method, UNetPlan, Windows
from ..plan.models import Model, read_model
from ..plan.route import Route, Size, find_route
from ..randomness import Record, Stream
from ..schedule import Level, NoiseSchedule
from .blocks import install_route
from .compiled import Graphs, take_over
from .control import fit_residuals
from .layout import Layout, read_layout
from .window_attention import SHIFTS, Partitions, install_windows

_STACK = "_hires_lab_sessions"
"""The attribute of a UNet that holds its open sessions, the innermost last; there only while one is open."""
_KEYS_A_TIMESTEP = 16
"""Noise levels are told apart to this part of a timestep when a shift is drawn."""


class Session:
    """The changes of one UNet during one sampling run; a context manager, or `open()` and `close()`.

    unet: the network (see `read_layout`). methods: settings of methods; at most one may resize features. common: the
    settings beside them. seeds: the seed of each image of the batch; rows of a UNet call are taken for the images in
    turn, unless `at(rows=...)` says otherwise. schedule: the model's noise schedule. metadata: of the checkpoint.
    tokens_owned_by: who else divides the tokens ("Hypertile"), which switches window attention off.
    record: shifts k to answer instead of drawing, as {(seed, timestep, layer): k} or a function of these three; timesteps are
    told apart to 1/16, layers are counted in the order in which they run.

    Sessions on the same UNet nest: the innermost rules, the outer one is suspended until it is closed.
    Raises `UnsupportedModel`, `SettingError` or `Conflict` when made.
    """

    def __init__(
        self,
        unet: nn.Module,
        methods: Sequence[Method],
        common: Common | None = None,
        *,
        seeds: Sequence[int] = (0,),
        schedule: NoiseSchedule | None = None,
        metadata: Mapping[str, str] | None = None,
        v_prediction: bool = False,
        tokens_owned_by: str | None = None,
        record: Record | None = None,
    ):
        _check_arguments(methods, seeds)
        self.unet = unet
        self.layout: Layout = read_layout(unet)
        self.methods, self.common = tuple(methods), common or Common()
        self.model: Model = read_model(self.layout.structure, self.common, metadata, v_prediction)
        self.seeds = tuple(int(seed) for seed in seeds) or (0,)
        self.schedule = schedule or NoiseSchedule()
        self.notes: list[str] = []
        self.ran: Counter[str] = Counter()
        self._tokens_owned_by = tokens_owned_by or _token_merging(self.layout)
        self._shifts = Stream("window shift", record)
        self._plans: dict[Size, UNetPlan] = {}
        self._told: Level | None = None
        self._rows: tuple[int, ...] = ()
        self._cursor = 0
        self._level = Level(0.0)
        self._seeds_now: tuple[int, ...] = self.seeds
        self._route: Route | None = None
        self._windows: Windows | None = None
        self._partitions = self._no_partitions()
        self._plan = UNetPlan()
        self._root_log, self._route_log, self._windows_log = UndoLog(), UndoLog(), UndoLog()
        self.is_open = False
        self._make_plan((self.model.native // 4,) * 2)  # settings that do not fit fail here, not in the first step

    # Opening and closing ---------------------------------------------------------------------------------------------

    def open(self) -> Session:
        """Install. Raises `HiresError` if it is open already."""
        if self.is_open:
            raise HiresError("this session is open already. Close it, or make another one.")
        stack = vars(self.unet).setdefault(_STACK, [])
        if stack:
            stack[-1]._suspend()
        stack.append(self)
        self.is_open = True
        try:
            self._resume()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Take everything back; any number of times."""
        if not self.is_open:
            return
        self.is_open = False
        stack = vars(self.unet).get(_STACK, [])
        was_on_top = bool(stack) and stack[-1] is self
        try:
            self._suspend()
        finally:
            if self in stack:
                stack.remove(self)
            if not stack:
                vars(self.unet).pop(_STACK, None)
            if was_on_top and stack:
                stack[-1]._resume()

    def __enter__(self) -> Session:
        return self.open()

    def __exit__(self, *_failure: object) -> None:
        self.close()

    def _resume(self) -> None:
        self._root_log = UndoLog()
        self._root_log.set(self.unet, "__deepcopy__", self._copy_unpatched)
        take_over(self.unet, self.layout.unet, self._call_compiled, self._root_log)
        self._root_log.hook(self.unet.register_forward_pre_hook(self._before_call, with_kwargs=True))

    def _suspend(self) -> None:
        self._route = self._windows = None
        try:
            self._windows_log.undo()
        finally:
            try:
                self._route_log.undo()
            finally:
                self._root_log.undo()

    def _copy_unpatched(self, memo: dict) -> nn.Module:
        """A deep copy of the UNet as it is without us: our overrides would go on using the original's modules."""
        self._suspend()
        stack = vars(self.unet).pop(_STACK)
        try:
            return copy.deepcopy(self.unet, memo)
        finally:
            vars(self.unet)[_STACK] = stack  # setattr on what torch.compile returned would set it on the network inside
            self._resume()

    def _call_compiled(
        self, graphs: Graphs, whole: Callable | None, network: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        """A call of a compiled network (see `take_over`): by its graph without patches, or by that of the patches."""
        state = (self._route, self._windows and self._windows.level)
        if whole is not None and state == (None, None):
            return whole(*args, **kwargs)
        if self._plan.drifts and self._route is not None:
            self._note_uncompiled("sizes change from step to step ('smooth_scaling')")
            return network(*args, **kwargs)
        return graphs.call(network, state, self._partitions, args, kwargs, self._note_uncompiled)

    def _note_uncompiled(self, why: str) -> None:
        self._note(f"torch.compile is bypassed while the network is patched: {why}.")

    # Telling where the run is ----------------------------------------------------------------------------------------

    def at(
        self,
        *,
        timestep: float | None = None,
        sigma: float | None = None,
        step: int | None = None,
        steps: int | None = None,
        rows: Sequence[int] = (),
    ) -> None:
        """Say where the run is, before a denoiser call: a timestep or a sigma, and the sampler's step of steps.

        rows: the image that each row of the coming UNet calls belongs to, in order, over all calls of this one level.
        Without this the timestep is read from the UNet's own arguments, which costs one transfer on a GPU.
        """
        if timestep is None and sigma is None:
            raise HiresError("session.at() needs a timestep or a sigma. Pass one.")
        if not math.isfinite(timestep if sigma is None else sigma):
            raise HiresError(f"session.at() was given {timestep if sigma is None else sigma}. Pass a finite number.")
        timestep = self.schedule.timestep(float(sigma)) if timestep is None else float(timestep)
        self._told = Level(self.schedule.progress(timestep), step, steps)
        self._rows, self._cursor = tuple(rows), 0

    def rows(self, rows: Sequence[int]) -> None:
        """Say whose the rows of the coming UNet call are, at the level told last: for views, which are many calls a level."""
        self._rows, self._cursor = tuple(rows), 0

    # One call --------------------------------------------------------------------------------------------------------

    def plan_for(self, size: Size) -> UNetPlan:
        """What is done to latents of `size` (height, width). Raises `SettingError` or `Conflict`."""
        if size not in self._plans:
            self._plans[size] = self._make_plan(size)
            for note in self._plans[size].notes:
                self._note(note)
        return self._plans[size]

    def _make_plan(self, size: Size) -> UNetPlan:
        return combine(method.plan(self.model, size, self.common) for method in self.methods)

    def _before_call(self, _unet: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        x, timestep = _first_two(args, kwargs)
        self._plan = plan = self.plan_for(tuple(x.shape[-2:]))
        if plan.does_nothing:
            self._swap(None, None)
            self.ran["plain"] += 1
            return None
        self._level = self._told or Level(self.schedule.progress(_as_float(timestep)))
        self._seeds_now = self._seeds_of(x.shape[0])
        route = find_route(self.layout.structure, tuple(x.shape[-2:]), plan.edits, self._level)
        windows = plan.windows if plan.windows and plan.windows.gate.is_open(self._level) else None
        self._swap(route, windows)
        self.ran[", ".join(filter(None, (route and route.words, self._windows and "windows"))) or "plain"] += 1
        return None if route is None else (args, fit_residuals(kwargs, route, self.layout.structure))

    def _swap(self, route: Route | None, windows: Windows | None) -> None:
        """Install what is wanted now, take back what is not."""
        if windows is not None and self._tokens_owned_by:
            self._note(f"Window attention is off: {self._tokens_owned_by} divides the tokens already.")
            windows = None
        if route != self._route:
            self._route_log.undo()
            self._route, self._route_log = None, UndoLog()
            if route is not None:
                self._guarded(self._route_log, lambda: install_route(self.layout, route, self._route_log))
            self._route = route
        if windows != self._windows:
            self._windows_log.undo()
            self._windows, self._windows_log = None, UndoLog()
            self._partitions = self._no_partitions()
            if windows is not None:
                self._guarded(
                    self._windows_log,
                    lambda: install_windows(self.layout, windows.level, self._partitions, self._windows_log),
                )
            self._windows = windows

    @staticmethod
    def _guarded(log: UndoLog, install: Any) -> None:
        try:
            install()
        except BaseException:
            log.undo()
            raise

    def _shifts_of(self, layer: int, rows: int) -> tuple[int, ...]:
        """k of each row: a function of the image's seed, the noise level and the layer."""
        if self._windows is None or not self._windows.shifted:
            return (0,) * rows
        timestep = (1 - self._level.progress) * (len(self.schedule) - 1)
        key = round(timestep * _KEYS_A_TIMESTEP) / _KEYS_A_TIMESTEP
        seeds = self._seeds_now if len(self._seeds_now) == rows else self._seeds_in_turn(range(rows))
        return tuple(self._shifts.integer(SHIFTS, seed, key, layer) for seed in seeds)

    def _seeds_of(self, rows: int) -> tuple[int, ...]:
        told = self._rows[self._cursor : self._cursor + rows]
        if len(told) == rows:
            self._cursor += rows
            return self._seeds_in_turn(told)
        return self._seeds_in_turn(range(rows))

    def _seeds_in_turn(self, images: Iterable[int]) -> tuple[int, ...]:
        return tuple(self.seeds[image % len(self.seeds)] for image in images)

    def _no_partitions(self) -> Partitions:
        return Partitions(self._shifts_of, self._windows_passed_by)

    def _windows_passed_by(self, why: str) -> None:
        self._note(f"Window attention is off in a layer: {why}.")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def sessions_on(unet: nn.Module) -> list[Session]:
    """The open sessions on a UNet, the innermost first."""
    return list(reversed(vars(unet).get(_STACK, []))) if isinstance(unet, nn.Module) else []


def combine(plans: Any) -> UNetPlan:
    """Several methods' plans as one. Raises `Conflict` where two of them resize features or divide attention."""
    total = UNetPlan()
    for plan in plans:
        if total.edits and plan.edits:
            raise Conflict(
                "RAU-Net and Deep Shrink both shrink the feature map; only one can. Switch 'raunet' off, or Deep Shrink."
            )
        if total.windows and plan.windows:
            raise Conflict("window attention is asked for twice. Switch 'window_attention' off in one of the methods.")
        total = total + plan
    return total


def _check_arguments(methods: Any, seeds: Any) -> None:
    """Raises `SettingError` for what is no sequence of methods' settings or of seeds."""
    if isinstance(methods, str) or not all(isinstance(method, Method) for method in methods):
        raise SettingError("methods", methods, "settings of methods", "Pass objects such as HiDiffusion().")
    for method in methods:
        if method.automatic:
            raise SettingError(
                "methods",
                method.title,
                "methods that draw",
                "It chooses for a whole picture, which a session does not see.",
            )
    if isinstance(seeds, (str, int)) or seeds is None or not all(isinstance(seed, Integral) for seed in seeds):
        raise SettingError("seeds", seeds, "a list of whole numbers, one for each image", "Write seeds=[7].")


def _first_two(args: tuple, kwargs: dict) -> tuple[torch.Tensor, Any]:
    """(x, timestep) of a UNet call, by position or by the names that ldm and diffusers use."""
    x = args[0] if args else next(kwargs[name] for name in ("x", "sample") if name in kwargs)
    timestep = (
        args[1] if len(args) > 1 else next((kwargs[name] for name in ("timesteps", "timestep") if name in kwargs), 0.0)
    )
    return x, timestep


def _as_float(timestep: Any) -> float:
    return float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)


def _token_merging(layout: Layout) -> str | None:
    """ToMe swaps the class of each transformer block; its tokens no longer form the map."""
    names = {type(module).__name__ for module in layout.unet.modules()}
    return "ToMe" if "ToMeBlock" in names else None
