"""Removes what exporters and passes leave in a graph, and hides what they print."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from .export import Export

_LOGGERS = ("torch.onnx", "transformers.exporters", "onnxscript", "onnx_ir")


def drop_traces(export: Export) -> None:
    """Removes the exporters' metadata from nodes and values: source lines and paths of the exporting machine."""
    ClearMetadataAndDocStringPass()(export.graph_model)
    for graph in export.graph_model.graphs():
        outputs = (output for node in graph for output in node.outputs)
        for value in [*graph.inputs, *graph.initializers.values(), *outputs]:
            value.metadata_props.clear()


def drop_inferred(export: Export) -> None:
    """Removes the types and shapes of values inside the graph if a pass has left stale ones: runtimes infer them.
    Initializers get the types and shapes of their tensors.
    """
    if not export.has_stale_types:
        return
    for graph in export.graph_model.graphs():
        for node in graph:
            for output in node.outputs:
                if not output.is_graph_output():
                    output.type = None
                    output.shape = None
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and not value.is_graph_input():
                value.type = onnx_ir.TensorType(tensor.dtype)
                value.shape = onnx_ir.Shape(tensor.shape.numpy())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides the progress, notices and deprecations of exporters and graph passes inside the block; errors are still
    raised.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
