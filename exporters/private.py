"""What the exporters borrow of torch, transformers, accelerate and ONNX Runtime that they do not document.

One function or name for each; an upgrade that takes one away breaks this file, and `tests/test_private.py`, which calls
every one. Each says why the documented way does not do, and the version that it was first seen to work with.
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
    """Paths of the modules in whose forward a node of torch's exporter stood, outermost first; the names of their
    parameters are lost where it folds them. torch 2.13.
    """
    return [str(scope) for scope in ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))]


def export_by_transformers(
    model: PreTrainedModel, inputs: dict[str, Any], shapes: Any, opset: int | None
) -> tuple[Any, ExportedProgram]:
    """The `onnx_ir.Model` of a Hugging Face model, and the program that it was made of.

    The exporter gives only the first: a class between it and its base keeps the second. It leaves its replacement of
    `forward` on the instance: the instance's attributes are put back. transformers 5.23.
    """
    from transformers.exporters import DynamoExporter, OnnxConfig, OnnxExporter  # heavy: only where it is used

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
    """The argument of a model's forward that takes a key-value cache, which transformers 5.24 has given another name;
    None where there is none.
    """
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def returned_cache(outputs: Any) -> Any:
    """The key-value cache in a model's outputs, None where there is none: as `cache_argument`. It logs a deprecation
    where it is asked for by the old name beside the new one.
    """
    return getattr(outputs, "cache" if hasattr(outputs, "cache") else "past_key_values", None)


def dynamic_cache(tensors: Sequence[torch.Tensor]) -> Any:
    """A cache of these keys and values, of each layer in turn, without a copy; an empty one for none. Whatever is
    passed to its constructor gets concatenated to an empty tensor, which a graph would keep. transformers 5.23.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer  # heavy: only where it is used

    cache: Any = DynamicCache()
    for keys, values in zip(tensors[::2], tensors[1::2], strict=True):
        layer: Any = DynamicLayer()
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        cache.layers.append(layer)
    return cache


def cache_of_both(own: Sequence[torch.Tensor], cross: Sequence[torch.Tensor]) -> Any:
    """A decoder's cache beside an encoder: as `dynamic_cache` of its own tokens and of the encoder's, which stay."""
    from transformers.cache_utils import EncoderDecoderCache  # heavy: only where it is used

    return EncoderDecoderCache(dynamic_cache(own), dynamic_cache(cross))


def is_plain_cache(cache: Any, length: int) -> bool:
    """Whether a cache holds keys and values of each layer for so many tokens, (batch, heads, length, head_dim), and
    nothing else. transformers 5.23.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer  # heavy

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
    """How transformers writes products of rows that are sorted by expert in ONNX: torch's exporter has no translation
    of their operators. transformers 5.23.
    """
    from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE  # heavy: only where it is used

    return {target: write for target, write in _ONNX_TRANSLATION_TABLE.items() if "grouped_mm" in str(target)}


def fuse_for_onnxruntime(graph_model: onnx_ir.Model, provider: str, *, has_cache: bool) -> None:
    """transformers' fusions into ONNX Runtime's own operators, in place; its exporter runs them only on graphs that it
    has just made, before weights have names. `provider`: "cpu" or "cuda". transformers 5.23.
    """
    from transformers.exporters import onnxruntime_fusions  # heavy: only where it is used

    of_batches = _attentions_of_batches(onnxruntime_fusions) if has_cache else contextlib.nullcontext()
    with _pairs_apart(onnxruntime_fusions), of_batches:
        onnxruntime_fusions.fuse_for_onnxruntime(graph_model, provider)


@contextlib.contextmanager
def _pairs_apart(fusions: Any) -> Iterator[None]:
    """Packs products that share an input if they are three or more, as q, k and v; two stay apart.

    An MLP's gate and up are as fast apart for one token. For many, the `Split` behind one packed product copies all of
    its result: 1 % of what 512 tokens of SmolLM2-135M cost. transformers 5.24.
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
    """Whether exactly one other weight is multiplied by the same input."""
    products = [node for node, index in weight.uses() if node.op_type == "MatMul" and index == 1]
    values = {node.inputs[0] for node in products}
    users = [user for value in values if value is not None for user, index in value.uses() if index == 0]
    weights = [user.inputs[1] for user in users if user.op_type == "MatMul"]
    return sum(each is not None and each.const_value is not None for each in weights) == 2


@contextlib.contextmanager
def _attentions_of_batches(fusions: Any) -> Iterator[None]:
    """Attentions over a cache are fused for any number of texts, and their rotary embeddings stay outside.

    transformers fuses them for a batch of one alone: after a past ONNX Runtime takes several tokens of one text only.
    Who calls this says so of the graph. An embedding inside would rotate all texts of a first step by the positions of
    the first of them, wrong where one is padded. transformers 5.24.
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
    """Rules of onnxscript whose pattern has several outputs are tried at the nodes of their first one's operator alone.

    Its matcher lists the whole graph at every node before it looks at that operator: a third of the time that the graph
    of SmolLM2-135M takes. onnxscript 0.7.1.
    """
    from onnxscript.rewriter import MatchResult, _matcher  # heavy: only where it is used

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
    """Where a model's configuration was loaded from, a local folder or a name on a hub; None for one that was made.
    transformers 5.23.
    """
    return Path(config._name_or_path) if config._name_or_path else None


def runs_under_accelerate(model: nn.Module) -> bool:
    """Whether accelerate, or a Trainer, has put the model's forward under autocast. accelerate 1.3."""
    return "_original_forward" in vars(model)


def float16_converter() -> Any:
    """ONNX Runtime's module that converts graphs to half precision, which ships with the package outside of its
    documented API. onnxruntime 1.24.
    """
    return importlib.import_module("onnxruntime.transformers.float16")


def provider_library(ort: Any, name: str) -> Path:
    """The shared library of a GPU provider, "cuda" or "tensorrt", in the package's folder: loading it says what it
    lacks, where ONNX Runtime writes a line to its log. onnxruntime 1.24.
    """
    return Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{name}.so"


def is_nameless_axis(axis: str | None) -> bool:
    """Whether a session's input has no name for an axis: ONNX Runtime makes one up. onnxruntime 1.24."""
    return not axis or axis.startswith("unk__")


def node_counts(session: Any) -> dict[str, int]:
    """How many nodes each provider of a session has been given. The session must have been made with
    `session.record_ep_graph_assignment_info`. onnxruntime 1.24.
    """
    counts = dict.fromkeys(session.get_providers(), 0)
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts
