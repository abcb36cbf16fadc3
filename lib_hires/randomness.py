"""Private randomness: streams derived from (image seed, purpose, place), never from a global generator.

A draw is a pure function of its key, so that it does not matter how often, in which order, or in which batch the
network is called: image k of a batch equals the same image alone. This is also the point of injection: a `Stream`
with a `record` answers from it first, so that a recorded run can be replayed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


class Stream:
    """The draws of one purpose, such as "window shift".

    `record` maps keys (seed, *place) to values that are answered instead of a draw.
    """

    def __init__(self, purpose: str, record: Mapping[tuple, int] | None = None):
        self.purpose = purpose
        self.record = dict(record or {})

    def bits(self, seed: int, *place: object) -> int:
        """64 bits for this seed and place."""
        key = repr((self.purpose, int(seed), *place)).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")

    def integer(self, below: int, seed: int, *place: object) -> int:
        """A whole number in 0..below-1, uniform over keys."""
        recorded = self.record.get((seed, *place))
        return self.bits(seed, *place) % below if recorded is None else recorded
