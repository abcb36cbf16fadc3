"""A tensor that stands for a whole map and puts the work on it off: what a decoder is given in place of z.

Foreign modules call torch as ever; each operation arrives at `LazyMap.__torch_dispatch__` below autograd and autocast:

    convolution, nearest enlargement, padding, everything pointwise   put off: a node (nodes.py)
    group_norm      the whole map's statistics are wanted: its input is worked out tile by tile, summed up and stored
    anything else   (attention's matrices) runs as it is on the assembled map: right for any module, bounded for the above

One thing is not as in torch: a view of a map is a copy, so writing into the view leaves the map as it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .nodes import Affine, Convolution, Decode, Local, Nearest, Node, Padded

aten = torch.ops.aten
RULES: dict[Any, Callable] = {}


class _Handle:
    """Dies with the last reference to its LazyMap; the node knows by that whether it can be asked for again."""

    def __init__(self, node: Node):
        self.node = node
        node.handle = weakref.ref(self)


class LazyMap(Tensor):
    """Looks like a contiguous tensor of its node's shape, type and device; has no memory of its own."""

    @staticmethod
    def __new__(cls, node: Node):
        """A tensor that stands for `node`."""
        self = torch.Tensor._make_wrapper_subclass(
            cls, node.shape, dtype=node.dtype, device=node.decode.device, requires_grad=False
        )
        self.handle = _Handle(node)
        return self

    @property
    def node(self) -> Node:
        """What it stands for now (an operation in place changes it)."""
        return self.handle.node

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"LazyMap({tuple(self.shape)}, {self.dtype}, {type(self.node).__name__})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Put the operation off, take it apart, or do it on the assembled maps."""
        kwargs = kwargs or {}
        with _no_autocast():
            rule = RULES.get(func, _pointwise if torch.Tag.pointwise in func.tags else None)
            result = rule(func, *args, **kwargs) if rule else NotImplemented
        if result is NotImplemented:
            result = func.decompose(*args, **kwargs)  # composite ones come whole in inference mode
        return _assembled(func, args, kwargs) if result is NotImplemented else result


def lazy(whole: Tensor, tile: int, storage: torch.device) -> LazyMap:
    """z (B, C, h, w) as a LazyMap; results are worked out in tiles of `tile` pixels of z, maps kept on `storage`."""
    return LazyMap(Node.given(Decode(tuple(whole.shape[-2:]), whole.device, tile, storage), whole))


def assembled(value: Any) -> Any:
    """Anything a module returned, with every LazyMap in it worked out. The caller should hold no reference to `value`."""
    leaves, form = tree_flatten(value)
    nodes = [leaf.node if isinstance(leaf, LazyMap) else leaf for leaf in leaves]
    del value, leaves  # so that stored maps can be let go on the way
    with _no_autocast():
        return tree_unflatten([node.whole() if isinstance(node, Node) else node for node in nodes], form)


def _rule(*functions):
    def register(rule: Callable) -> Callable:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


@_rule(aten.convolution.default)
def _convolution(_func, x, weight, bias, stride, padding, dilation, transposed, _output_padding, groups):
    if transposed or not isinstance(x, LazyMap) or isinstance(weight, LazyMap):
        return NotImplemented
    stride, padding, dilation = (list(each) * (2 // len(each)) for each in (stride, padding, dilation))
    return LazyMap(Convolution(x.node, weight, bias, stride, padding, dilation, groups))


@_rule(aten.native_group_norm.default)
def _group_norm(_func, x, weight, bias, batch, channels, _pixels, groups, eps):
    if not isinstance(x, LazyMap):
        return NotImplemented
    mean, variance = x.node.statistics(groups)
    kind = torch.promote_types(x.dtype, torch.float32)
    place = {"device": x.device, "dtype": kind}
    mean, deviation = mean.to(**place), (variance + eps).rsqrt().to(**place)
    scale, shift = (part.repeat_interleave(channels // groups, 1) for part in (deviation, -mean * deviation))
    if weight is not None:
        scale, shift = scale * weight.to(kind), shift * weight.to(kind)
    if bias is not None:
        shift = shift + bias.to(kind)
    node = Affine(x.node, scale[:, :, None, None], shift[:, :, None, None])
    return LazyMap(node), mean, deviation


@_rule(aten.upsample_nearest2d.default, aten._upsample_nearest_exact2d.default)
def _nearest(_func, x, output_size, scale_rows=None, scale_columns=None):
    factors = [to // length for to, length in zip(output_size, x.shape[2:])]
    exact = [length * factor for length, factor in zip(x.shape[2:], factors)] == list(output_size)
    told = all(scale in (None, factor) for scale, factor in zip((scale_rows, scale_columns), factors))
    return LazyMap(Nearest(x.node, tuple(factors))) if exact and told else NotImplemented


@_rule(aten.upsample_nearest2d.vec, aten._upsample_nearest_exact2d.vec)
def _nearest_by_factor(func, x, output_size, scale_factors):
    scales = (None, None) if scale_factors is None else scale_factors
    size = output_size or [int(length * scale) for length, scale in zip(x.shape[2:], scales)]
    return _nearest(func, x, size, *scales)


@_rule(aten.constant_pad_nd.default)
def _pad(_func, x, sides, value=0):
    sides = [*sides, 0, 0, 0, 0]
    return NotImplemented if any(sides[4:]) else LazyMap(Padded(x.node, tuple(sides[:4]), value))


@_rule(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _same(_func, x):
    return x


@_rule(aten.clone.default)
def _clone(func, x, **_memory_format):
    return _pointwise(func, x)


@_rule(aten._to_copy.default)
def _cast(func, x, *, dtype=None, device=None, **_how):
    if device is not None and torch.device(device) != x.device:
        return NotImplemented
    return _pointwise(func, x, dtype=dtype or x.dtype)


@_rule(aten.cat.default)
def _cat(func, tensors, dim=0):
    return _pointwise(func, tensors, dim) if dim in (1, -3) else NotImplemented


class _Operand:
    """The place of an operation's argument that is worked out tile by tile."""

    def __init__(self, index: int):
        self.index = index


def _pointwise(func, *args, **kwargs):
    """An operation that looks at one pixel at a time (over all channels), with maps of one size and constants."""
    leaves, form = tree_flatten((args, kwargs))
    maps = [leaf for leaf in leaves if isinstance(leaf, LazyMap)]
    size, decode = maps[0].node.size, maps[0].node.decode
    inputs, places, shadows = [], [], []
    for leaf in leaves:
        place = shadow = leaf
        if isinstance(leaf, Tensor):
            alike = leaf.dim() == 4 and tuple(leaf.shape[2:]) == size
            if alike:
                place = _Operand(len(inputs))
                inputs.append(leaf.node if isinstance(leaf, LazyMap) else Node.given(decode, leaf))
            elif isinstance(leaf, LazyMap) or not _is_constant(leaf):
                return NotImplemented
            if alike or leaf.dim():
                shadow = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        places.append(place)
        shadows.append(shadow)
    written = _written(func, args, kwargs)
    if torch.Tag.nondeterministic_seeded in func.tags or len(written) > 1 or "out" in kwargs:
        return NotImplemented
    shadow_args, shadow_kwargs = tree_unflatten(shadows, form)
    outline = func(*shadow_args, **shadow_kwargs)
    if not isinstance(outline, Tensor) or outline.dim() != 4 or tuple(outline.shape[2:]) != size:
        return NotImplemented

    def call(values: list[Tensor]) -> Tensor:
        filled = [values[place.index] if isinstance(place, _Operand) else place for place in places]
        if written:
            filled[0] = filled[0].clone()
        real_args, real_kwargs = tree_unflatten(filled, form)
        return func(*real_args, **real_kwargs)

    node = Local(decode, outline.shape, outline.dtype, tuple(inputs), call)
    node.watch(*(place for place in places if isinstance(place, Tensor)))
    if not written:
        return LazyMap(node)
    if written[0] is not leaves[0] or not isinstance(written[0], LazyMap):
        return NotImplemented
    written[0].handle = _Handle(node)
    return written[0]


def _is_constant(tensor: Tensor) -> bool:
    """Whether it is the same at every pixel: a number, or a value a channel (.., 1, 1)."""
    return tensor.numel() == 1 or (tensor.dim() in (3, 4) and tuple(tensor.shape[-2:]) == (1, 1))


def _written(func, args: tuple, kwargs: dict) -> list:
    """The arguments that the operation writes to."""
    named = {**dict(zip((argument.name for argument in func._schema.arguments), args)), **kwargs}
    wrote = [
        argument.name for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write
    ]
    return [named[name] for name in wrote if name in named]


def _assembled(func, args: tuple, kwargs: dict):
    """Do it on whole maps. A map that comes of it at a multiple of z's size is taken up again."""
    decode = next(leaf.node.decode for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, LazyMap))
    written = [leaf for leaf in tree_flatten(_written(func, args, kwargs))[0] if isinstance(leaf, LazyMap)]
    real: dict[int, Tensor] = {}

    def whole(leaf):
        if not isinstance(leaf, LazyMap):
            return leaf
        if id(leaf) not in real:
            with _no_autocast():
                value = leaf.node.whole()
            real[id(leaf)] = value.clone() if any(leaf is one for one in written) else value
        return real[id(leaf)]

    result = func(*tree_map(whole, args), **tree_map(whole, kwargs))
    for leaf in written:
        leaf.handle = _Handle(Node.given(decode, real[id(leaf)]))
    back = {id(real[id(leaf)]): leaf for leaf in written}
    return tree_map(lambda value: back.get(id(value), _taken_up(decode, value)), result)


def _taken_up(decode: Decode, value):
    """A map again, where its sides are the same multiple of z's; anything else as it is."""
    if not isinstance(value, Tensor) or isinstance(value, LazyMap) or value.dim() != 4:
        return value
    times = value.shape[2] // decode.size[0]
    alike = times and tuple(value.shape[2:]) == tuple(length * times for length in decode.size)
    return LazyMap(Node.given(decode, value)) if alike and value.is_floating_point() else value


def _no_autocast():
    """Operations were cast when they were called; working them out later must not cast again."""
    return torch._C._DisableAutocast()
