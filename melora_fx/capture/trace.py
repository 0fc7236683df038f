"""Traces the forward of one module to find the products with its weights.

The module continues to run its own forward. A trace runs the user's Python on proxies, which take one way at each
branch and give some answer to each question about them. So it only shows products, up to the point that it reaches. It
runs a double of the module, and anything that it may have changed elsewhere is restored.
"""

import gc
import inspect
import itertools
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from .double import double_of, holders
from .graphs import Capture
from .lenient_tracer import LenientTracer
from .model_settings import own_attributes, same_random_state


class UntraceableError(Exception):
    """A module cannot be traced on its own; the text says why."""


Proxies = list["weakref.ref[fx.Proxy]"]


@dataclass(frozen=True)
class Traces:
    """The traces of a module. `graphs`: the different graphs that they have shown. `failure`: the first error that
    ended a trace early, or None. `proxies`: weak references to the proxies of all traces.
    """

    graphs: list[fx.Graph]
    failure: str | None
    proxies: Proxies


def trace_module(module: nn.Module) -> Traces:
    """Traces the module's own forward in train and eval mode, with its optional arguments and without, and both ways at
    branches. Children are calls. Changes nothing.

    Raises:
        UntraceableError: if the forward was replaced on the instance, or if a trace changes attributes of the module.
    """
    refuse_replaced_forward(module)
    graphs: dict[str, fx.Graph] = {}
    failures: list[str] = []
    proxies: Proxies = []
    for training, defaults in itertools.product((module.training, not module.training), _choices_of_defaults(module)):
        for trace in _of_both_branches(module, training, defaults):
            graphs.setdefault(str(trace.graph), trace.graph)
            failures += [trace.failure] if trace.failure else []
            proxies += trace.proxies
    return Traces(list(graphs.values()), failures[0] if failures else None, proxies)


def _of_both_branches(module: nn.Module, training: bool, defaults: dict[str, Any]) -> Iterator["_Trace"]:
    for branch in (True, False):
        trace = _trace(module, training, defaults, LenientTracer(branch))
        yield trace
        if not trace.has_branched:
            return


def refuse_replaced_forward(module: nn.Module) -> None:
    """Raises UntraceableError if the module's forward is not that of its class."""
    if "forward" in vars(module):
        raise UntraceableError(
            "its `forward` was replaced on the instance, as dispatch and offload hooks do, which would bypass the "
            "adapter: restore the forward of the class first"
        )


def _choices_of_defaults(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Yields arguments to leave at their defaults in a trace: first all that have a default, then none."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]  # without `self`
    defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    if defaults:
        yield defaults
    yield {}


@dataclass(frozen=True)
class _Trace:
    """One trace. `has_branched`: whether the forward has asked for the truth value of a tensor."""

    graph: fx.Graph
    failure: str | None
    has_branched: bool
    proxies: Proxies


def _trace(module: nn.Module, training: bool, defaults: dict[str, Any], tracer: LenientTracer) -> _Trace:
    """Traces a double of the module once."""
    before = [dict(holder) for holder in holders(module)]
    with warnings.catch_warnings(), own_attributes(module), same_random_state(module):
        warnings.simplefilter("ignore")
        trace = _traced(tracer, double_of(module, training), defaults)
        changed = _changed(holders(module), before)
    if changed:
        raise UntraceableError(f"its forward changes {', '.join(map(repr, changed))}, {_AS_A_TRACE_WOULD}")
    return trace


_AS_A_TRACE_WOULD = "which a trace would do too: pass `example_inputs=`"
KEEPS = f"its forward keeps tensors outside of its module, {_AS_A_TRACE_WOULD}"


def _traced(tracer: LenientTracer, double: nn.Module, defaults: dict[str, Any]) -> _Trace:
    failure: str | None = None
    try:
        tracer.trace(double, concrete_args=defaults or None)
    except Exception as error:  # a forward may raise anything for proxies
        failure = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    trace = _Trace(tracer.graph, failure, tracer.num_branches > 0, tracer.proxies)
    vars(tracer).clear()  # it refers to itself, and would keep the double alive
    return trace


def _changed(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[str]:
    """Returns the names in `now` that are new or refer to another object."""
    return [
        name
        for holder, old in zip(now, before, strict=True)
        for name in holder
        if name not in old or holder[name] is not old[name]
    ]


def keeping(traced: list[tuple[Capture, Proxies]]) -> list[Capture]:
    """Returns the captures with a proxy that is still alive, in a list, set or dict of the user's, and removes the
    proxy from there.
    """
    for generation in range(3):  # frames of an exception, or reference cycles, may keep some alive
        if not any(_alive(proxies) for _, proxies in traced):
            return []
        gc.collect(generation)
    found = [capture for capture, proxies in traced if _alive(proxies)]
    for proxy in [proxy for _, proxies in traced for proxy in _alive(proxies)]:
        for holder in gc.get_referrers(proxy):
            _take_out(holder, proxy)
    return found


def _alive(proxies: Proxies) -> list[fx.Proxy]:
    """Returns the proxies that are still alive, except those of weights, which FX keeps temporarily."""
    found = [proxy for reference in proxies if (proxy := reference()) is not None]
    return [proxy for proxy in found if proxy.node.op != "get_attr"]


def _take_out(holder: Any, proxy: Any) -> None:
    if isinstance(holder, list):
        holder[:] = [item for item in holder if item is not proxy]
    elif isinstance(holder, set):
        holder.discard(proxy)
    elif isinstance(holder, dict):
        for key in [key for key, value in holder.items() if key is proxy or value is proxy]:
            del holder[key]
