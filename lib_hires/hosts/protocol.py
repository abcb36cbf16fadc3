"""What an adapter to a WebUI does, and which one fits the WebUI we are in: told by its features, never by its name.

    register          once, when the script is loaded
    prepare           start of a job: read the arguments, write the infotext, clean up after a job that died
    before_sampling   a sampler is about to run: arrange that a session is open around it
    after_sampling    all passes of a picture are done: take the infotext back if nothing was changed
    after_decoding    its pictures are decoded: take back what decodes in tiles

Hosts swallow exceptions of script hooks. So what has to stop a job is raised from inside the functions that a host
calls to draw: never a picture that pretends.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..config.errors import HiresError
from ..request import METHOD_KEY, Request

OVERRIDE = "hires_lab_override"
"""The attribute of `p` that holds the values of an XYZ cell."""


@dataclass(frozen=True)
class Asked:
    """What a job asks for: a request, or None where Hires Lab is off; `notes`: what of it has no effect."""

    request: Request | None = None
    notes: tuple[str, ...] = ()


Reader = Callable[[Mapping[str, Any] | None], Asked]
"""Reads the script's arguments, given an XYZ cell's values. Raises `HiresError` where they are wrong."""


class Host(Protocol):
    """An adapter. `p` is the host's processing object, `x` the latent that the sampler starts from: (B, C, H, W)."""

    name: str

    def register(self) -> None:
        """Register what lives as long as the script."""

    def prepare(self, p: Any, read: Reader) -> None:
        """Start of a job; `read` gives what it asks for."""

    def before_sampling(self, p: Any, x: Any) -> None:
        """A sampling pass of the job is about to start."""

    def after_sampling(self, p: Any) -> None:
        """All passes of a batch are done, its infotext is not yet written."""

    def after_decoding(self, p: Any) -> None:
        """The pictures of a batch are decoded."""


class UnknownHost:
    """Stands in where no adapter fits: says so when it is switched on, and leaves everything alone otherwise."""

    name = "unknown"

    def register(self) -> None:
        """Nothing to register."""

    def prepare(self, p: Any, read: Reader) -> None:
        """Make an enabled job fail with our sentence."""
        try:
            wanted = read(getattr(p, OVERRIDE, None)).request is not None
        except HiresError as error:
            fail_when_sampled(p, error)
            return
        if wanted:
            fail_when_sampled(
                p, HiresError("this WebUI is not one that it can work in; AUTOMATIC1111 1.10 is. Switch Hires Lab off.")
            )

    def before_sampling(self, p: Any, x: Any) -> None:
        """Nothing to do."""

    def after_sampling(self, p: Any) -> None:
        """Nothing to do."""

    def after_decoding(self, p: Any) -> None:
        """Nothing to do."""


def find_host() -> Host:
    """The adapter that fits: each module of this package has a `detect()`, and a `make_host()` for when it is true.

    Packages whose names begin with `_` hold an adapter's further parts.
    """
    parent = importlib.import_module(__package__)
    for info in pkgutil.iter_modules(parent.__path__):
        if info.name != "protocol" and not info.name.startswith("_"):
            module = importlib.import_module(f"{__package__}.{info.name}")
            if module.detect():
                return module.make_host()
    return UnknownHost()


def fail_when_sampled(p: Any, error: HiresError) -> None:
    """Make the job fail with `error`: raised where the host draws, because it swallows what its hooks raise."""

    def sample(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    sample.hires_lab = True
    p.sample = sample


def forget_failure(p: Any) -> None:
    """Take back `fail_when_sampled`, for an object that is used for another job."""
    if getattr(vars(p).get("sample"), "hires_lab", False):
        del p.sample


def forget_package() -> None:
    """Forget our loaded modules, so that a reload of the scripts takes an updated extension as a whole."""
    package = __package__.partition(".")[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def drop_infotext(parameters: dict[str, Any]) -> None:
    """Remove every key of ours from a host's generation parameters: XYZ cells and loops share the dict."""
    prefix = METHOD_KEY.split()[0] + " "
    for key in [key for key in parameters if key.startswith(prefix)]:
        del parameters[key]
