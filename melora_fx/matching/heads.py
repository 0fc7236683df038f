"""Finds the linears that are heads. "all-linear" leaves them out: a head is often new, and an adapter would silently
train alongside a frozen head of random numbers.

A linear is a head if its name says so, which is all that an exported graph and a model written by hand have. It is a
head too if it shares its weight with one of these:

1. an embedding, or the model's output embeddings;
2. a matrix that a class adds to a base model of transformers (`BertForSequenceClassification` to `BertModel`), if the
   class has no output embeddings, and is user-defined or has a task in its name. A class with output embeddings may
   also add pretrained layers, which are no heads (`cls.predictions.transform.dense` of a `BertForMaskedLM`, projections
   between encoders);
3. a matrix of another class with a task in its name, with as many rows as the configuration has labels (or one more, as
   in detectors), or as another head size in it (`_OUTPUT_SIZES`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from melora_fx.names import get_attribute, join_path, site_of, without_wrappers
from melora_fx.shared_memory import span_of

_FIRST = {"classifier", "score", "qa_outputs", "classification_head", "logits_proj", "bbox_attention"}
"""Names of top-level modules that are heads, with everything below them."""

_OF_DETECTORS = re.compile("(class|bbox|score)_(embed|head)$")
"""The endings of the names of detector heads, at any depth and with everything below them."""

_LAST = {"lm_head", "output_projection", "seq_relationship", "final_layer"}
"""Names of linears that are heads at any depth."""

_TASK = re.compile("For[A-Z]|Heads?Model")
"""The pattern in the names of transformers' classes with a head."""

_OUTPUT_SIZES = ("vocab_size", "classifier_proj_size")
"""Names of the sizes of heads in configurations, in addition to the number of labels."""


def find_heads(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Returns those of the linears `names` of `model` that are heads."""
    spans = {span_of(weight) for weight in _head_weights(model)}
    return frozenset(name for name in names if _is_named_so(name) or _is_at(spans, get_attribute(model, name)))


def _is_named_so(name: str) -> bool:
    parts = name.split(".")
    return parts[0] in _FIRST or parts[-1] in _LAST or any(map(_OF_DETECTORS.search, parts))


def _is_at(spans: set[tuple[int, int, int]], linear: Any) -> bool:
    weight = getattr(linear, "weight", None) if isinstance(linear, nn.Module) else linear
    return isinstance(weight, nn.Parameter) and span_of(weight) in spans


def _head_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        vocabulary = module if isinstance(module, nn.Embedding) else _output_embeddings(module)
        if vocabulary is not None:  # several linears in models with several streams
            yield from vocabulary.parameters()
    pretrained = _pretrained_models(model)
    for name, parameter in model.named_parameters(remove_duplicate=False) if pretrained else ():
        if parameter.dim() == 2 and _is_added(site_of(without_wrappers(name)), len(parameter), pretrained):
            yield parameter


def _output_embeddings(module: nn.Module) -> nn.Module | None:
    get_output_embeddings = getattr(module, "get_output_embeddings", None)
    found = get_output_embeddings() if callable(get_output_embeddings) else None
    return found if isinstance(found, nn.Module) else None


def _pretrained_models(model: nn.Module) -> dict[str, Any]:
    """Returns path → model of a class of transformers, or → None for a base model of another class."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if hasattr(type(module), "base_model_prefix"):
            found[without_wrappers(path)] = module
            if _base_model(module) is not module:
                found[join_path(without_wrappers(path), module.base_model_prefix)] = None
    return found


def _base_model(module: Any) -> nn.Module:
    return getattr(module, module.base_model_prefix, module)


def _is_added(name: str, out_features: int, pretrained: Mapping[str, Any]) -> bool:
    """Returns whether a model of transformers adds the linear as a head."""
    around = [path for path in pretrained if not path or name.startswith(f"{path}.")]
    models = [pretrained[path] for path in sorted(around, key=len)]
    if not models or models[-1] is None:
        return False
    model = models[-1]
    if _base_model(model) is not model and _output_embeddings(model) is None:
        return _has_task(model) or not type(model).__module__.startswith("transformers.")
    return _has_task(model) and out_features in _output_sizes(model.config)


def _has_task(model: Any) -> bool:
    return _TASK.search(type(model).__name__) is not None


def _output_sizes(config: Any) -> set[int]:
    """Returns the number of labels, that number plus 1 for the "no object" of detectors, and the other head sizes."""
    num_labels = getattr(config, "num_labels", None)
    sizes = (getattr(config, name, None) for name in _OUTPUT_SIZES)
    return ({num_labels, num_labels + 1} if num_labels else set()) | {size for size in sizes if size}
