"""Operations on whole maps that are put off, and worked out box by box when their values are asked for.

A node stands for one map. It knows which box of each input one of its boxes needs (`reads`: a 3x3 convolution one pixel
more on each side, zeros beyond the true border) and how to get the box from those (`compute`). A segment is a node with
what it hangs on down to maps that are there; a box of its last node takes one pass over it:

    stored --reads--> [norm] -> [silu] -> [conv 3x3] -> [+ stored] -> box of the result, kept on the storage device
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional

from ..config.errors import UnsupportedModel
from .boxes import Box, Grid, Key, Pieces, cuts


class Decode:
    """What the nodes of one decode share: z's size and device, the tile in z's pixels, where maps are kept."""

    def __init__(self, size: tuple[int, int], device: torch.device, tile: int, storage: torch.device):
        self.size, self.device, self.tile, self.storage = size, device, tile, storage

    def grid(self, size: tuple[int, int]) -> Grid:
        """The tiles' grid at a map of `size`."""
        return Grid(*(cuts(length, -(-z // self.tile), z) for length, z in zip(size, self.size)))


class Node:
    """A map (B, C, H, W), not yet worked out, or there in `pieces`. This class itself: a map that is there."""

    def __init__(self, decode: Decode, shape: Iterable[int], dtype: torch.dtype, inputs: tuple[Node, ...] = ()):
        self.decode, self.shape, self.dtype, self.inputs = decode, torch.Size(shape), dtype, inputs
        self.pieces: Pieces | None = None
        self.depth = 1 + max((node.depth for node in inputs), default=-1)
        self.handle: Callable[[], object] = lambda: None  # a weak reference to what the host's code holds of this map
        self.watched: list[tuple[Tensor, int]] = []
        self._consumers: list[weakref.ref[Node]] = []
        self._statistics: dict[int, tuple[Tensor, Tensor]] = {}
        for node in inputs:
            node._consumers.append(weakref.ref(self))

    @classmethod
    def given(cls, decode: Decode, whole: Tensor) -> Node:
        """A map that is there as a tensor."""
        node = cls(decode, whole.shape, whole.dtype)
        node.pieces = Pieces.of(whole)
        node.watch(whole)
        return node

    def watch(self, *tensors: Tensor | None) -> None:
        """Remember tensors that are somebody else's and must not be written to until the node is worked out."""
        # inference tensors count no versions
        self.watched += [(one, one._version) for one in tensors if one is not None and not one.is_inference()]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.shape[2], self.shape[3]

    def reads(self, box: Box) -> list[Box]:
        """The box of each input that `box` is made of, inside that input's borders."""
        return [box] * len(self.inputs)

    def compute(self, box: Box, values: list[Tensor]) -> Tensor:
        """The box's values from those of `reads(box)`. `values` may be emptied to free them early."""
        raise NotImplementedError  # this class stands for maps that are there: nothing is ever worked out for them

    def whole(self) -> Tensor:
        """The map as one tensor on the decode's device; not to be written to."""
        if self.pieces is not None and len(self.pieces) == 1:
            return next(iter(self.pieces.values())).to(self.decode.device)
        out = torch.empty(self.shape, dtype=self.dtype, device=self.decode.device)

        def put(_key: Key, box: Box, value: Tensor) -> None:
            out[:, :, box.top : box.bottom, box.left : box.right] = value

        _sweep(self, put, kept=False)
        return out

    def statistics(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance (B, groups) of the map, in double precision on the CPU. The map is worked out and kept.

        Each box's own mean and variance are joined exactly (Chan, Golub, LeVeque 1979): with n_i values in box i,
            mean = sum n_i mean_i / n        variance = sum n_i (variance_i + (mean_i - mean)^2) / n
        """
        if groups not in self._statistics:
            parts: list[tuple[int, Tensor]] = []
            kept = Pieces(self.decode.grid(self.size)) if self.pieces is None else None

            def put(key: Key, box: Box, value: Tensor) -> None:
                value = value.contiguous()
                parts.append((box.rows * box.columns, _moments(value, groups)))
                if kept is not None:
                    kept[key] = value.to(self.decode.storage)

            _sweep(self, put, kept=True)
            if kept is not None:
                self.pieces, self.inputs, self.depth = kept, (), 0
            counts = torch.tensor([count for count, _both in parts], dtype=torch.float64, device="cpu")[:, None, None]
            means, variances = torch.stack([both for _count, both in parts]).cpu().double().unbind(1)
            mean = (counts * means).sum(0) / counts.sum()
            variance = (counts * (variances + (means - mean) ** 2)).sum(0) / counts.sum()
            self._statistics[groups] = mean, variance
        return self._statistics[groups]


class Local(Node):
    """A pixel of the result needs that pixel of the inputs only: `call(values)`."""

    def __init__(self, decode, shape, dtype, inputs, call: Callable[[list[Tensor]], Tensor]):
        super().__init__(decode, shape, dtype, inputs)
        self.call = call

    def compute(self, box: Box, values: list[Tensor]) -> Tensor:
        """`call`, with the inputs' boxes."""
        return self.call(values)


class Affine(Node):
    """x * scale + shift, both (B, C, 1, 1) and more precise than x: what a normalisation is once its statistics are known."""

    def __init__(self, node: Node, scale: Tensor, shift: Tensor):
        super().__init__(node.decode, node.shape, node.dtype, (node,))
        self.scale, self.shift = scale, shift

    def compute(self, box: Box, values: list[Tensor]) -> Tensor:
        """In the precision of scale and shift, rounded once; a lower one is widened a few channels at a time."""
        (x,) = values
        if x.dtype is self.scale.dtype:
            return torch.addcmul(self.shift, x, self.scale)
        out, step = torch.empty_like(x), max(1, x.shape[1] // 8)
        for to, part, scale, shift in zip(*(each.split(step, 1) for each in (out, x, self.scale, self.shift))):
            to.copy_(torch.addcmul(shift, part.to(scale.dtype), scale))
        return out


class Convolution(Node):
    """A two-dimensional convolution; zeros stand beyond the map's true borders only."""

    def __init__(self, node: Node, weight, bias, stride, padding, dilation, groups):
        self.parameters = weight, bias
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:])]
        size = [(n + 2 * p - r) // s + 1 for n, p, r, s in zip(node.size, padding, self.reach, stride)]
        super().__init__(node.decode, (node.shape[0], weight.shape[0], *size), node.dtype, (node,))
        self.watch(weight, bias)

    def _wanted(self, box: Box) -> list[tuple[int, int]]:
        bounds = zip((box[:2], box[2:]), self.stride, self.padding, self.reach)
        return [(a * s - p, (b - 1) * s - p + reach) for (a, b), s, p, reach in bounds]

    def reads(self, box: Box) -> list[Box]:
        """What the kernel touches."""
        (top, bottom), (left, right) = self._wanted(box)
        height, width = self.inputs[0].size
        return [Box(max(top, 0), min(bottom, height), max(left, 0), min(right, width))]

    def compute(self, box: Box, values: list[Tensor]) -> Tensor:
        """The convolution of the padded box."""
        height, width = self.inputs[0].size
        (top, bottom), (left, right) = self._wanted(box)
        sides = [max(0, -left), max(0, right - width), max(0, -top), max(0, bottom - height)]
        padding = (0, 0)
        if any(sides):
            if sides == [self.padding[1]] * 2 + [self.padding[0]] * 2:
                padding = tuple(self.padding)
            else:
                values[0] = functional.pad(values[0], sides)
        return functional.conv2d(
            values.pop(), *self.parameters, tuple(self.stride), padding, tuple(self.dilation), self.groups
        )


class Nearest(Node):
    """Nearest-neighbour enlargement by whole factors (rows, columns)."""

    def __init__(self, node: Node, factors: tuple[int, int]):
        size = [length * factor for length, factor in zip(node.size, factors)]
        super().__init__(node.decode, (*node.shape[:2], *size), node.dtype, (node,))
        self.factors = factors

    def reads(self, box: Box) -> list[Box]:
        """Every pixel that shows in the box."""
        rows, columns = self.factors
        return [Box(box.top // rows, -(-box.bottom // rows), box.left // columns, -(-box.right // columns))]

    def compute(self, box: Box, values: list[Tensor]) -> Tensor:
        """Enlarged, then cut at both ends where the box does not begin or end with a pixel of the input."""
        rows, columns = self.factors
        (source,) = self.reads(box)
        large = functional.interpolate(values.pop(), scale_factor=(float(rows), float(columns)), mode="nearest")
        whole = Box(source.top * rows, source.bottom * rows, source.left * columns, source.right * columns)
        return large if whole == box else large[(..., *box.within(whole))].contiguous()


class Padded(Node):
    """A border of one value around the map; negative widths cut."""

    def __init__(self, node: Node, sides: tuple[int, int, int, int], value: float):
        self.left, self.right, self.top, self.bottom = sides
        self.value = value
        height, width = node.size
        size = height + self.top + self.bottom, width + self.left + self.right
        super().__init__(node.decode, (*node.shape[:2], *size), node.dtype, (node,))

    def reads(self, box: Box) -> list[Box]:
        """What lies in the map; at least one pixel, so that there is something to pad."""
        height, width = self.inputs[0].size
        top, left = min(max(box.top - self.top, 0), height - 1), min(max(box.left - self.left, 0), width - 1)
        bottom, right = min(box.bottom - self.top, height), min(box.right - self.left, width)
        return [Box(top, max(bottom, top + 1), left, max(right, left + 1))]

    def compute(self, box: Box, values: list[Tensor]) -> Tensor:
        """The border's part, or the cut."""
        (source,) = self.reads(box)
        sides = [
            source.left + self.left - box.left,
            box.right - source.right - self.left,
            source.top + self.top - box.top,
            box.bottom - source.bottom - self.top,
        ]
        return functional.pad(values.pop(), sides, value=self.value)


class Segment:
    """A node and what it hangs on, down to maps that are there; inputs first."""

    def __init__(self, target: Node):
        self.target = target
        self.order = _inputs_first(target)
        self.uses = dict.fromkeys(self.order, 0)
        for node in self.order:
            for source in node.inputs:
                self.uses[source] += 1
            if any(tensor._version != version for tensor, version in node.watched):
                raise UnsupportedModel(
                    "a layer of the autoencoder writes into a tensor that another one was given before; it cannot be "
                    "decoded in tiles. Decode it as a whole."
                )

    def needs(self, box: Box) -> dict[Node, Box]:
        """The one box of each node that everything reading it for the target's `box` finds in."""
        needed = {self.target: box}
        for node in reversed(self.order):
            if not node.inputs:
                continue
            for source, part in zip(node.inputs, node.reads(needed[node])):
                needed[source] = part.around(needed[source]) if source in needed else part
        return needed

    def run(self, needed: dict[Node, Box]) -> Tensor:
        """The target's box; every other value is freed with its last use."""
        values: dict[Node, Tensor] = {}
        left = dict(self.uses)
        for node in self.order:
            box = needed[node]
            if node.pieces is not None:
                values[node] = node.pieces.read(box, node.decode.device)
                continue
            operands = []
            for source, part in zip(node.inputs, node.reads(box)):
                left[source] -= 1
                value = values[source] if left[source] else values.pop(source)
                operands.append(value if part == needed[source] else value[(..., *part.within(needed[source]))])
            value = None
            values[node] = node.compute(box, operands)
            operands = None
        return values.pop(self.target)

    def private(self, kept: bool) -> list[Node]:
        """The stored maps that nobody can ask for once the target is done, and `kept` or never wanted again."""
        inner = {self.target} if kept else set()
        for node in reversed(self.order):
            consumers = [one for one in (ref() for ref in node._consumers) if one is not None and one.inputs]
            if node.handle() is None and all(one in inner for one in consumers):
                inner.add(node)
        return [node for node in self.order if node in inner and node.pieces is not None and node is not self.target]


def _inputs_first(target: Node) -> list[Node]:
    """In the order of work: of a node's inputs the deepest first, so that a map that is there is read when it is needed."""
    order, seen, stack = [], set(), [(target, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((source, False) for source in sorted(node.inputs, key=lambda source: source.depth))
    return order


def _sweep(target: Node, use: Callable[[Key, Box, Tensor], None], kept: bool) -> None:
    """Work out the node box by box. What only it still needs of other maps is let go as the sweep passes."""
    segment = Segment(target)
    boxes = list(target.decode.grid(target.size).boxes())
    plans = [segment.needs(box) for _key, box in boxes]
    last: dict[tuple[Node, Key], int] = {}
    for source in segment.private(kept):
        for index, needed in enumerate(plans):
            for key, _whole, _part in source.pieces.grid.crossed_by(needed[source]):
                last[source, key] = index
    done: dict[int, list[tuple[Node, Key]]] = {}
    for piece, index in last.items():
        done.setdefault(index, []).append(piece)
    for index, ((key, box), needed) in enumerate(zip(boxes, plans)):
        use(key, box, segment.run(needed))
        for source, piece in done.get(index, ()):
            del source.pieces[piece]


def _moments(value: Tensor, groups: int) -> Tensor:
    """Mean and variance (2, B, groups) of a box, at least in single precision."""
    grouped = value.reshape(value.shape[0], groups, -1)
    if value.device.type == "cpu":  # a group fits the cache: ten times faster than var_mean
        parts = [_two_passes(_widened(part)) for part in grouped.split(1, dim=1)]
    else:  # a few groups at a time, so that widening a half needs little memory
        step = groups if value.dtype is _widened(value[:0]).dtype else max(1, groups // 8)
        parts = [torch.var_mean(_widened(part), -1, correction=0)[::-1] for part in grouped.split(step, dim=1)]
    return torch.stack([torch.cat(part, dim=1) for part in zip(*parts)])


def _two_passes(values: Tensor) -> tuple[Tensor, Tensor]:
    mean = values.mean(-1, keepdim=True)
    return mean[..., 0], (values - mean).square_().mean(-1)


def _widened(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
