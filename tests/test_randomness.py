"""Private streams: a draw is a function of its key and of nothing else."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from support import snapshots

from lib_hires.randomness import Stream


@given(st.integers(0, 2**63), st.integers(0, 2**20), st.integers(0, 200))
def test_a_draw_depends_on_its_key_only_and_not_on_earlier_draws(seed, place, layer):
    fresh, used = Stream("window shift"), Stream("window shift")
    for other in range(5):
        used.integer(4, other, place, layer)
    assert used.integer(4, seed, place, layer) == fresh.integer(4, seed, place, layer)


def test_draws_differ_between_purposes_seeds_and_places():
    draws = {
        Stream(purpose).bits(seed, *place)
        for purpose in ("a", "b")
        for seed in (1, 2)
        for place in ((1, 2), (2, 1), (12,))
    }
    assert len(draws) == 12


@pytest.mark.parametrize("below", [2, 3, 4])
def test_draws_are_uniform_over_keys(below):
    counts = Counter(Stream("window shift").integer(below, seed, key, 3) for seed in range(40) for key in range(100))
    assert set(counts) == set(range(below))
    assert chisquare(list(counts.values())).pvalue > 1e-4


def test_a_record_is_answered_first_and_everything_else_drawn():
    stream = Stream("window shift", {(7, 100, 2): 3})
    plain = Stream("window shift")
    keys = [(7, 100, 2), (7, 100, 1), (8, 100, 2)]
    assert [stream.integer(4, *key) for key in keys] == [3, *(plain.integer(4, *key) for key in keys[1:])]


def test_a_known_draw_stays_the_same_in_every_version():
    assert [Stream("window shift").integer(4, 7, key, 0) for key in range(16)] == [
        0,
        1,
        3,
        0,
        2,
        2,
        0,
        3,
        1,
        0,
        1,
        3,
        1,
        2,
        0,
        3,
    ]


def test_the_global_generators_are_neither_read_nor_advanced():
    before = snapshots.of_generators()
    draws = [Stream("window shift").integer(4, 1, key) for key in range(50)]
    assert snapshots.of_generators() == before
    random.seed(99)
    assert [Stream("window shift").integer(4, 1, key) for key in range(50)] == draws


def test_a_record_may_be_a_function_that_leaves_some_keys_to_be_drawn():
    stream = Stream("window shift", lambda seed, place: 0 if place == 5 else None)
    plain = Stream("window shift")
    assert [stream.integer(4, 1, place) for place in range(10)] == [
        0 if p == 5 else plain.integer(4, 1, p) for p in range(10)
    ]
    assert Stream("window shift", {(1, 5): 0}).integer(4, 1, 5) == 0
