"""Converts graphs to bytes and back, for the pickles of rewritten modules."""

import io
import pickle
import warnings
from typing import Any

import torch
from torch import fx

from melora_fx.adapter.site import SITE_TAG
from melora_fx.capture.graphs import copy_graph
from melora_fx.torch_private import is_operator, operator_key


class _GraphPickler(pickle.Pickler):
    """Pickles registered operators by name, since torch does not pickle them."""

    def reducer_override(self, obj: Any) -> Any:
        if is_operator(obj):
            return _resolve_operator, operator_key(obj)
        return NotImplemented


def _resolve_operator(name: str, overload: str) -> Any:
    namespace, _, packet = name.partition("::")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def dump_graph(graph: fx.Graph) -> bytes:
    """Returns the pickled graph. The metadata of its nodes is dropped, except the tags of sites."""
    graph = copy_graph(graph)
    for node in graph.nodes:  # example values and stack traces of the export cannot all be pickled
        node.meta = {SITE_TAG: node.meta[SITE_TAG]} if SITE_TAG in node.meta else {}
    buffer = io.BytesIO()
    _GraphPickler(buffer).dump(graph)
    return buffer.getvalue()


def load_graph(dumped: bytes) -> fx.Graph:
    """The inverse of `dump_graph`."""
    with warnings.catch_warnings():  # restoring a tree specification makes torch warn of its own deprecated class
        warnings.simplefilter("ignore", FutureWarning)
        return pickle.loads(dumped)
