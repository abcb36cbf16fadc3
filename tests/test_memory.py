"""Peak memory: a passing allocation is seen, also through nested blocks, and earlier ones do not count."""

import time

import numpy as np
import pytest

from lib_hires import memory

SIZE = 120 * 2**20


def allocate(size=SIZE):
    block = np.ones(size, dtype=np.uint8)
    time.sleep(0.03)  # long enough for a sampling thread
    return int(block[::4096].sum())


@pytest.fixture(params=["high-water mark", "sampled"])
def way(request, monkeypatch):
    if request.param == "sampled":
        monkeypatch.setattr(memory, "_can_reset", lambda: False)
    elif not memory._can_reset():
        pytest.skip("this system does not reset VmHWM")


def test_an_allocation_that_is_gone_again_is_seen(way):
    with memory.peak_memory("cpu") as peak:
        allocate()
    assert 0.9 * SIZE < peak.growth < 1.5 * SIZE
    assert peak.bytes == peak.start + peak.growth


def test_an_earlier_peak_does_not_count(way):
    allocate()
    with memory.peak_memory("cpu") as peak:
        pass
    assert peak.growth < SIZE / 4


def test_an_inner_block_does_not_hide_the_outer_ones_peak(way):
    with memory.peak_memory("cpu") as outer:
        allocate(2 * SIZE)
        with memory.peak_memory("cpu") as inner:
            allocate()
    assert outer.growth > 1.8 * SIZE
    assert inner.growth < 1.5 * SIZE


def test_a_failed_block_still_tells_and_closes(way):
    with pytest.raises(ValueError), memory.peak_memory("cpu") as peak:
        allocate()
        raise ValueError
    assert peak.growth > 0.9 * SIZE
    assert not memory._open
