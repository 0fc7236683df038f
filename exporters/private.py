"""Undocumented parts of torch, transformers, accelerate, onnxscript and ONNX Runtime that the exporters use.

Each has one function here. An upgrade that removes a part breaks this file and `tests/test_private.py`, which calls
every function. Each docstring says why the documented way is not enough, and the version with which the function was
first seen to work.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.export import ExportedProgram

if TYPE_CHECKING:
    import onnx_ir
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def name_scopes(node: onnx_ir.Node) -> list[str]:
    """Returns the paths of the modules whose forward computed a node of torch's exporter, outermost first. The
    exporter loses the names of parameters that it folds. torch 2.13.
    """
    return [str(scope) for scope in ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))]


def export_by_transformers(
    model: PreTrainedModel, inputs: dict[str, Any], shapes: Any, opset: int | None
) -> tuple[Any, ExportedProgram]:
    """Returns the `onnx_ir.Model` of a Hugging Face model, and the exported program that it was translated from.

    The exporter returns only the graph: a class between the exporter and its base keeps the program. The exporter
    leaves its replacement of `forward` on the instance, so the instance's attributes are restored. transformers 5.23.
    """
    from transformers.exporters import DynamoExporter, OnnxConfig, OnnxExporter  # slow to import, so only here

    programs = []

    class Keeping(DynamoExporter):
        def export_program(self, *args: Any, **kwargs: Any) -> Any:
            program, metadata = super().export_program(*args, **kwargs)
            programs.append(program)
            return program, metadata

    class Exporter(OnnxExporter, Keeping):
        pass

    config = OnnxConfig(dynamic_shapes=shapes, opset_version=opset)
    attributes = dict(vars(model))
    try:
        return Exporter().export(model, dict(inputs), config).program, programs[0]
    finally:
        model.__dict__.clear()
        model.__dict__.update(attributes)


def cache_argument(model: nn.Module) -> str | None:
    """Returns the name of the argument of a model's forward that accepts a key-value cache, None if there is none.
    transformers 5.24 renamed it from `past_key_values` to `cache`.
    """
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def returned_cache(outputs: Any) -> Any:
    """Returns the key-value cache in a model's outputs, None if there is none. It was renamed like the argument
    (`cache_argument`); reading it under the old name logs a deprecation if the new name exists.
    """
    return getattr(outputs, "cache" if hasattr(outputs, "cache") else "past_key_values", None)


def dynamic_cache(tensors: Sequence[torch.Tensor]) -> Any:
    """Returns a cache of these tensors, the keys and values of each layer in turn, without copying them; an empty
    cache for no tensors. The constructor would concatenate them to empty tensors, and a graph would keep these nodes.
    transformers 5.23.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer  # slow to import, so only here

    cache: Any = DynamicCache()
    for keys, values in zip(tensors[::2], tensors[1::2], strict=True):
        layer: Any = DynamicLayer()
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        cache.layers.append(layer)
    return cache


def cache_of_both(own: Sequence[torch.Tensor], cross: Sequence[torch.Tensor]) -> Any:
    """Returns the cache of an encoder-decoder model: a `dynamic_cache` for the decoder's own tokens, and one for the
    encoder's, which does not grow.
    """
    from transformers.cache_utils import EncoderDecoderCache  # slow to import, so only here

    return EncoderDecoderCache(dynamic_cache(own), dynamic_cache(cross))


def is_plain_cache(cache: Any, length: int) -> bool:
    """Returns whether a cache contains nothing but keys and values of each layer for `length` tokens, (batch, heads,
    length, head_dim). transformers 5.23.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer  # slow to import

    if type(cache) is not DynamicCache or not cache.layers:
        return False
    layers: list[Any] = cache.layers
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        and layer.is_initialized
        and all(states.dim() == 4 and states.size(2) == length for states in (layer.keys, layer.values))
        for layer in layers
    )


def grouped_translations() -> dict[Any, Any]:
    """Returns transformers' ONNX translations of the `grouped_mm` operators, products of rows sorted by expert: torch's
    exporter has none. transformers 5.23.
    """
    from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE  # slow to import, so only here

    return {target: write for target, write in _ONNX_TRANSLATION_TABLE.items() if "grouped_mm" in str(target)}


def fuse_for_onnxruntime(graph_model: onnx_ir.Model, provider: str, *, has_cache: bool) -> None:
    """Applies transformers' fusions into ONNX Runtime's own operators, in place. transformers' exporter runs them only
    on graphs that it has just built, before weights have names. `provider`: "cpu" or "cuda". transformers 5.23.
    """
    from transformers.exporters import onnxruntime_fusions  # slow to import, so only here

    of_batches = _attentions_of_batches(onnxruntime_fusions) if has_cache else contextlib.nullcontext()
    with _pairs_apart(onnxruntime_fusions), of_batches:
        onnxruntime_fusions.fuse_for_onnxruntime(graph_model, provider)


@contextlib.contextmanager
def _pairs_apart(fusions: Any) -> Iterator[None]:
    """Inside the block, products that share an input are packed only if they are three or more, such as q, k and v.

    The products of an MLP's gate and up are equally fast unpacked for one token. For many tokens, the `Split` after a
    packed product copies its whole result: 1 % of the time of 512 tokens of SmolLM2-135M. transformers 5.24.
    """
    steps, constant, pack = fusions._STEPS, fusions._constant, fusions._pack_sibling_matmuls

    def pack_threes(graph_model: onnx_ir.Model) -> None:
        fusions._constant = lambda value: None if _is_of_pair(value) else constant(value)
        try:
            pack(graph_model)
        finally:
            fusions._constant = constant

    fusions._STEPS = tuple((pack_threes if step is pack else step, *rest) for step, *rest in steps)
    try:
        yield
    finally:
        fusions._STEPS = steps


def _is_of_pair(weight: onnx_ir.Value) -> bool:
    """Returns whether exactly one other weight is multiplied by the same input."""
    products = [node for node, index in weight.uses() if node.op_type == "MatMul" and index == 1]
    values = {node.inputs[0] for node in products}
    users = [user for value in values if value is not None for user, index in value.uses() if index == 0]
    weights = [user.inputs[1] for user in users if user.op_type == "MatMul"]
    return sum(each is not None and each.const_value is not None for each in weights) == 2


@contextlib.contextmanager
def _attentions_of_batches(fusions: Any) -> Iterator[None]:
    """Inside the block, attentions over a cache are fused for any number of texts, without their rotary embeddings.

    transformers fuses them only for a batch of one, because after a past ONNX Runtime accepts several tokens only of a
    single text; the caller must add this condition to the graph's. A fused embedding would rotate all texts of a first
    step by the positions of the first text, which is incorrect if one is padded. transformers 5.24.
    """
    static_dim, shared_rotation = fusions._static_dim, fusions._shared_rotation
    fusions._static_dim = lambda value, axis: 1 if axis == 0 else static_dim(value, axis)
    fusions._shared_rotation = lambda *_: None
    try:
        yield
    finally:
        fusions._static_dim, fusions._shared_rotation = static_dim, shared_rotation


@contextlib.contextmanager
def quick_matching() -> Iterator[None]:
    """Inside the block, onnxscript tries rules with several outputs only at nodes with their first output's operator.

    Otherwise its matcher lists the whole graph at every node before it compares that operator: a third of the time
    that the graph of SmolLM2-135M takes. onnxscript 0.7.1.
    """
    from onnxscript.rewriter import MatchResult, _matcher  # slow to import, so only here

    matcher: Any = _matcher.SimplePatternMatcher
    match = matcher.match

    def match_quickly(self: Any, model: Any, graph: Any, node: onnx_ir.Node, **options: Any) -> Any:
        pattern = self.pattern
        first = None if pattern.has_single_output_node else pattern.output_nodes[0].op_identifier()
        if first not in (None, node.op_identifier()):
            return MatchResult().fail("another operator")
        return match(self, model, graph, node, **options)

    matcher.match = match_quickly
    try:
        yield
    finally:
        matcher.match = match


def folder_of(config: PretrainedConfig) -> Path | None:
    """Returns where a model's configuration was loaded from, a local folder or a name on a hub; None if it was created
    in memory. transformers 5.23.
    """
    return Path(config._name_or_path) if config._name_or_path else None


def runs_under_accelerate(model: nn.Module) -> bool:
    """Returns whether accelerate, or a Trainer, runs the model's forward under autocast. accelerate 1.3."""
    return "_original_forward" in vars(model)


def float16_converter() -> Any:
    """Returns ONNX Runtime's module that converts graphs to half precision; it is part of the package, but not of the
    documented API. onnxruntime 1.24.
    """
    return importlib.import_module("onnxruntime.transformers.float16")


def provider_library(ort: Any, name: str) -> Path:
    """Returns the path of the shared library of a GPU provider, "cuda" or "tensorrt", in the package's folder. Loading
    it raises an error that names a missing library; ONNX Runtime only writes a line to its log. onnxruntime 1.24.
    """
    return Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{name}.so"


def is_nameless_axis(axis: str | None) -> bool:
    """Returns whether an axis of a session's input is nameless; ONNX Runtime invents a name then. onnxruntime 1.24."""
    return not axis or axis.startswith("unk__")


def node_counts(session: Any) -> dict[str, int]:
    """Returns the number of nodes that a session has assigned to each of its providers. The session must have been
    created with `session.record_ep_graph_assignment_info`. onnxruntime 1.24.
    """
    counts = dict.fromkeys(session.get_providers(), 0)
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts
