"""Counts the bytes of the tensors that are alive, as an accelerator's allocator would; stored maps are counted apart.

On a CPU there is no second device: `TwoDevices` takes what is put into `Pieces` as being elsewhere, and what is read from
there as copied.
"""

import contextlib
import weakref
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lib_hires.vae.boxes import Pieces
from lib_hires.vae.lazy import LazyMap


class Counter(TorchDispatchMode):
    """`peak`: the most bytes that operations' results held at once; `stored_peak`: of maps that wait elsewhere."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.stored = self.stored_peak = 0
        self._sizes, self._away = {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, LazyMap) for kind in types):
            return NotImplemented  # has no memory; what it does comes by here again
        result = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._add(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage):
        place = storage.data_ptr()
        if place and place not in self._sizes:
            self._sizes[place] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, place)

    def _drop(self, place):
        size = self._sizes.pop(place)
        if place in self._away:
            self._away.discard(place)
            self.stored -= size
        else:
            self.now -= size

    def move_away(self, tensor):
        """Take a tensor as being on the storage device."""
        place = tensor.untyped_storage().data_ptr()
        if place in self._sizes and place not in self._away:
            self._away.add(place)
            self.now -= self._sizes[place]
            self.stored += self._sizes[place]
            self.stored_peak = max(self.stored_peak, self.stored)


@contextlib.contextmanager
def two_devices():
    """A counter for a decode whose storage is taken as another device."""
    counter, read = Counter(), Pieces.read

    def put(pieces, key, value):
        dict.__setitem__(pieces, key, value)
        counter.move_away(value)

    with (
        mock.patch.object(Pieces, "__setitem__", put, create=True),
        mock.patch.object(Pieces, "read", lambda pieces, box, device: read(pieces, box, device).clone()),
        counter,
    ):
        yield counter
