"""Memory: what is free on a device, what running out of it raises, and the peak of a piece of work.

    with peak_memory(device) as peak: ...
    peak.bytes

On CUDA the most memory that torch had allocated, weights included. Elsewhere the process's largest resident size during
the block: Linux resets its own high-water mark (proc(5), /proc/pid/clear_refs, value 5); where that is not allowed a
thread samples it, and without /proc the mark of the whole process is given. Blocks may be nested.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

SAMPLING_SECONDS = 0.005
OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
"""What torch raises where a device's memory is spent (torch before 2.5 knows CUDA's only)."""
_open: list[Peak] = []


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a CUDA device has left, torch's own cache counted as free; None for another device."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


class Peak:
    """`bytes`: the peak so far (final after the block); `start`: what was in use at its beginning; `source`: how it was read."""

    def __init__(self, device: torch.device, start: int, source: str):
        self.device, self.start, self.bytes, self.source = device, start, start, source

    @property
    def growth(self) -> int:
        """Bytes above `start`."""
        return max(0, self.bytes - self.start)

    def raise_to(self, value: int) -> None:
        """Note that `value` bytes were in use."""
        self.bytes = max(self.bytes, value)


@contextlib.contextmanager
def peak_memory(device: str | torch.device = "cpu") -> Iterator[Peak]:
    """Measure the peak memory of the block on a device, in bytes."""
    device = torch.device(device)
    meter = _cuda_meter(device) if device.type == "cuda" else _process_meter()
    peak = Peak(device, meter.now(), meter.source)
    _fold(device, meter)  # a mark that is reset must not be lost to the blocks around this one
    meter.reset()
    _open.append(peak)
    meter.begin()
    try:
        yield peak
    finally:
        meter.end()
        _fold(device, meter)
        _open.remove(peak)


def _fold(device: torch.device, meter: _Meter) -> None:
    """Give the mark to every open block on this device."""
    mark = meter.mark()
    for peak in _open:
        if peak.device == device:
            peak.raise_to(mark)


class _Meter:
    """`now`: bytes in use; `mark`: the largest since `reset`. `begin` and `end` bracket the work."""

    def __init__(self, source: str, now, mark, reset=lambda: None):
        self.source, self.now, self.mark, self.reset = source, now, mark, reset

    def begin(self) -> None:
        """The work starts."""

    def end(self) -> None:
        """The work is over."""


class _SamplingMeter(_Meter):
    """Asks for the bytes in use again and again, in a thread."""

    def __init__(self, source: str, now):
        super().__init__(source, now, lambda: self._largest)
        self._largest, self._stop = now(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLING_SECONDS):
            self._largest = max(self._largest, self.now())

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._stop.set()
        self._thread.join()
        self._largest = max(self._largest, self.now())


def _cuda_meter(device: torch.device) -> _Meter:
    return _Meter(
        "torch.cuda.max_memory_allocated",
        lambda: torch.cuda.memory_allocated(device),
        lambda: torch.cuda.max_memory_allocated(device),
        lambda: torch.cuda.reset_peak_memory_stats(device),
    )


def _process_meter() -> _Meter:
    if not Path("/proc/self/status").exists():
        return _Meter("ru_maxrss of the whole process", _largest_ever, _largest_ever)
    _give_back()
    if _can_reset():
        return _Meter("VmHWM", lambda: _status("VmRSS"), lambda: _status("VmHWM"), _reset_high_water)
    return _SamplingMeter("sampled VmRSS", lambda: _status("VmRSS"))


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)


def _reset_high_water() -> None:
    """Set VmHWM to the present size."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@functools.cache
def _can_reset() -> bool:
    """Whether this system lets a process reset its mark, and does it (tried once, before any block is open)."""
    try:
        _reset_high_water()
    except OSError:
        return False
    return 0 < _status("VmHWM") <= 1.25 * _status("VmRSS")


def _give_back() -> None:
    """Have glibc return what earlier work has freed, so that it does not count for this block."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _largest_ever() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
