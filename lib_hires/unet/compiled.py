"""A compiled UNet that is patched stays compiled: one graph for each state of the patches and kind of call.

Once Dynamo has a graph it does not look for new hooks, so the graph of the network as it is must not run while patches are
in. Each state (a route, windows) gets functions of its own, compiled as the network was and traced while the patches of
that state are in; they are kept from session to session. They may not break into several graphs: what follows a break is
looked up by the network's own code, the same in every state. What differs from call to call within a state is where
windows lie: they go in as index tensors (`Partitions.prepared`). Which layers are cut, and into what, the first call of a
kind tells, which therefore runs uncompiled.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..patches import UndoLog
from ..plan.route import Route
from .window_attention import Asked, AskedOtherwise, Partitions

MOST = 64
"""Graphs that are kept for a network; the one unused for longest goes first."""

State = tuple[Route | None, int | None]
"""The route, and the level of the windows."""


@dataclass(eq=False)
class Graph:
    """The compiled function of a state and kind of call.

    asked: what its layers were cut into. again: how often that has been another than before. failure: why it runs uncompiled.
    """

    run: Callable[[Callable, tuple, dict], Any]
    asked: dict[int, Asked]
    again: int = 0
    failure: str = ""


@dataclass(eq=False)
class Graphs:
    """What is kept for a compiled network.

    compiler: compiles a function as the network was compiled. bypassed: why nothing is compiled for it, "" where it is.
    resting: how many of those who look into the network want it uncompiled now.
    """

    compiler: Callable[[Callable], Callable] | None
    bypassed: str = ""
    resting: int = 0
    _kept: OrderedDict[tuple, Graph] = field(default_factory=OrderedDict)

    def call(
        self,
        network: Callable,
        state: State,
        partitions: Partitions,
        args: tuple,
        kwargs: dict,
        note: Callable[[str], None],
    ) -> Any:
        """The network's output: compiled from the second call of a kind on, unless `note` is told why not."""
        if self.resting or self.bypassed:
            if self.bypassed:
                note(self.bypassed)
            return network(*args, **kwargs)
        key = (state, _kind(args, kwargs))
        graph, failure = self._kept.get(key), ""
        if graph is not None and not graph.failure:
            self._kept.move_to_end(key)
            try:
                return _in_one_graph(graph, partitions, network, args, kwargs)
            except Exception as error:
                if not isinstance(error, AskedOtherwise) and not type(error).__module__.startswith("torch._dynamo"):
                    raise
                failure = f"it does not compile so ({_brief(error)})"
        partitions.asked = {}
        output = network(*args, **kwargs)  # which fails too where not the compiler, but the call is at fault
        if graph is None or (failure and partitions.asked != graph.asked and graph.again < 3):
            again = 0 if graph is None else graph.again + 1
            self._kept[key] = Graph(self.compiler(_copy_of(_run)), partitions.asked, again)
            if len(self._kept) > MOST:
                self._kept.popitem(last=False)
        elif failure or graph.failure:
            graph.failure = graph.failure or failure
            note(graph.failure)
        return output

    def remove(self) -> None:
        """End one rest."""
        self.resting -= 1


def _in_one_graph(graph: Graph, partitions: Partitions, network: Callable, args: tuple, kwargs: dict) -> Any:
    partitions.prepared = partitions.prepare(graph.asked)
    try:
        with torch._dynamo.error_on_graph_break(True):
            return graph.run(network, args, kwargs)
    finally:
        partitions.prepared = None


def _brief(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:2]).strip()[:200]  # of a backend's failure the second line says what


@dataclass(frozen=True, eq=False)
class Uncompiled:
    """Stands where `Module.compile` puts the compiled call: the network itself, its hooks and its present `forward`."""

    network: nn.Module
    graphs: Graphs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.network._call_impl(*args, **kwargs)


_kept: WeakKeyDictionary[nn.Module, Graphs] = WeakKeyDictionary()


def graphs_of(unet: nn.Module) -> Graphs | None:
    """What is kept for a network compiled by `torch.compile(unet)` or `unet.compile()`; None for one that is not."""
    compiled = getattr(unet, "_compiled_call_impl", None)
    if isinstance(compiled, Uncompiled):
        return compiled.graphs
    if _is_wrapped(unet):
        compiler = getattr(unet, "dynamo_ctx", None)
    elif compiled is not None:
        compiler = _compiler_in(compiled)
    else:
        return None
    kept = _kept.get(unet)
    if kept is None or kept.compiler is not compiler:
        why = "" if compiler else "it does not tell how it was compiled"
        if not hasattr(torch._dynamo, "error_on_graph_break"):
            why = f"torch {torch.__version__} cannot be kept from breaking graphs"
        kept = _kept[unet] = Graphs(compiler, why)
    return kept


def take_over(unet: nn.Module, network: nn.Module, call: Callable, log: UndoLog) -> None:
    """Make a compiled network call `call(graphs, whole, network, *args, **kwargs)` in place of its forward.

    network: what `unet` is or, where `torch.compile` was called with it, wraps. `whole` is compiled for the network without
    patches, None where there is no such function (`Module.compile` compiles the hooks too, ours as well).
    """
    graphs = graphs_of(unet)
    if graphs is not None and _is_wrapped(unet):
        log.override(unet, "forward", lambda whole: partial(call, graphs, whole, network))
    elif graphs is not None:
        _uncompile(unet, graphs, log)
        log.override(unet, "forward", lambda forward: partial(call, graphs, None, forward))


def let_rest(unet: nn.Module, network: nn.Module, log: UndoLog) -> bool:
    """Run a compiled network uncompiled until `log` is undone; returns whether it is compiled."""
    graphs = graphs_of(unet)
    if graphs is None:
        return False
    graphs.resting += 1
    log.hook(graphs)
    if _is_wrapped(unet):
        log.override(unet, "forward", lambda _whole: network)
    else:
        _uncompile(unet, graphs, log)
    return True


def _uncompile(unet: nn.Module, graphs: Graphs, log: UndoLog) -> None:
    if not isinstance(unet._compiled_call_impl, Uncompiled):  # whoever did it first puts back what was there
        log.set(unet, "_compiled_call_impl", Uncompiled(unet, graphs))


def _is_wrapped(unet: nn.Module) -> bool:
    return hasattr(unet, "_orig_mod")


def _compiler_in(compiled: Callable) -> Callable | None:
    """The context that made a compiled function, which `Module.compile` leaves in the function only."""
    try:
        compiler = inspect.getclosurevars(compiled).nonlocals.get("self")
    except TypeError:
        return None
    return compiler if callable(compiler) else None


def _run(network: Callable, args: tuple, kwargs: dict) -> Any:
    return network(*args, **kwargs)


def _copy_of(function: FunctionType) -> FunctionType:
    """With a code object of its own: by that Dynamo keeps graphs, and counts them."""
    code = function.__code__.replace(co_varnames=function.__code__.co_varnames)
    return FunctionType(code, function.__globals__, function.__name__)


def _kind(args: tuple, kwargs: dict) -> tuple:
    """What a call has to have in common with another one for the same layers to be cut alike."""
    return tuple(map(_shape, args)), tuple((name, _shape(value)) for name, value in sorted(kwargs.items()))


def _shape(value: Any) -> Any:
    return (value.shape, value.dtype, value.device) if isinstance(value, torch.Tensor) else value is None
