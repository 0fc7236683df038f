"""Modules whose graphs only look like those that the rewrites are for: each equals torch at other sizes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from support.models import fill, randn
from torch import nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

import melora_fx
from exporters import OrtRunner, export_onnx, fold_onnx
from melora_fx import MELoRAConfig

IN, OUT = 12, 20
SIZES = ((2, 2), (1, 7), (4, 9))
CONFIG = MELoRAConfig(rank=2, num_blocks=2)

Function = Callable[..., Any]


class Case(nn.Module):
    """A function of its layers and inputs; `x` is first, and `y`, if any, is equally long only in the example."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.first = nn.Linear(IN, OUT)
        self.second = nn.Linear(OUT, IN)
        self.third = nn.Linear(OUT, 16)
        self.square = nn.Linear(IN, IN)
        self.norm = nn.LayerNorm(IN)
        self.attention = nn.MultiheadAttention(IN, 3, batch_first=True)
        self.register_buffer("row", randn(1, OUT))
        self.register_buffer("table", randn(10, OUT))
        self.register_buffer("matrix", randn(IN, OUT))


class OfOne(Case):
    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


class OfTwo(Case):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.function(self, x, y)


def _mlp(m: Case, x: torch.Tensor) -> torch.Tensor:
    hidden = m.first(x)
    return m.second(F.relu(hidden) + hidden)


def _by_hand(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)


def _attend(m: Case, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    scores = m.square(x) @ m.square(y).transpose(1, 2)
    return m.norm(m.second(scores.softmax(-1) @ m.first(y)) + x)


RIGHT: dict[str, Function] = {
    "the first token": lambda m, x: _mlp(m, x)[:, 0],
    "the last token": lambda m, x: _mlp(m, x)[:, -1],
    "a token by a list": lambda m, x: _mlp(m, x)[:, [0]],
    "two tokens": lambda m, x: (lambda y: y[:, 0] + y[:, -1])(_mlp(m, x)),
    "a token twice": lambda m, x: (lambda y: y[:, 0] + y[:, 0].relu())(_mlp(m, x)),
    "a token and all": lambda m, x: (lambda y: (y[:, 0], y))(_mlp(m, x)),
    "a token and a sum": lambda m, x: (lambda y: (y[:, 0], y.sum(1)))(_mlp(m, x)),
    "a token's slice": lambda m, x: _mlp(m, x)[:, :1],
    "a mean of tokens": lambda m, x: _mlp(m, x).mean(1),
    "rows as output": lambda m, x: m.first(x).flatten(0, 1),
    "a text": lambda m, x: _mlp(m, x)[0],
    "residual of the input": lambda m, x: (x + _mlp(m, x))[:, 0],
    "gate of a half": lambda m, x: (lambda y: y[0] * torch.sigmoid(y[1]))(m.first(x).chunk(2, -1))[:, 0],
    "one bias of all": lambda m, x: (x @ m.matrix + m.row[0, :1]) * 2,
    "bias with two axes": lambda m, x: ((x @ m.matrix + m.row) * 2)[:, 0],
    "bias of the input": lambda m, x: (m.first(x) @ m.matrix.t() + x.mean((0, 1))).relu()[:, 0],
    "bias of each text": lambda m, x: (m.square(x) + x.mean(1, keepdim=True)).relu()[:, 0],
    "softmax of tokens": lambda m, x: m.second(m.first(x).softmax(1))[:, 0],
    "softmax of a row": lambda m, x: m.second(m.first(x).softmax(-1))[:, 0],
    "mean of two axes": lambda m, x: m.second(m.first(x) - m.first(x).mean((1, 2), keepdim=True)) * 2,
    "product with itself": lambda m, x: (m.square(x) @ m.square(x).transpose(1, 2)).softmax(-1) @ m.first(x),
    "texts are exchanged": lambda m, x: m.first(x.transpose(0, 1))[:, 0],
    "texts are exchanged later": lambda m, x: m.second(m.first(x).transpose(0, 1))[:, 0],
    "norm by hand": lambda m, x: m.third(_by_hand(m.first(x)))[:, 0],
    "sum behind a mixture": lambda m, x: m.norm(m.square(x.cumsum(1)) + x)[:, 0],
    "sum behind an attention": lambda m, x: m.first(m.norm(m.attention(x, x, x, need_weights=False)[0] + x))[:, 0],
    "gate of one row": lambda m, x: (m.first(x.flatten(0, 1)) * m.first(x.mean((0, 1))[None])).view(x.size(0), -1, OUT)[
        :, 0
    ],
    "attention": lambda m, x: m.norm(m.attention(x, x, x, need_weights=False)[0] + x),
}
TWO: dict[str, Function] = {
    "tokens side by side": lambda m, x, y: m.second(torch.cat([m.first(x).relu(), m.first(y).relu()], 1)) * 2,
    "attention to others": _attend,
}


def _near(found: Any, expected: Any) -> None:
    expected = expected if isinstance(expected, tuple) else (expected,)
    for own, torch_own in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(own), torch_own, rtol=1e-4, atol=1e-4)


def _compare(path: Path, model: nn.Module, inputs: Iterator[tuple[torch.Tensor, ...]]) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    for tensors in inputs:
        with torch.no_grad():
            expected = model(*tensors)
        _near(session.run(None, {name: t.numpy() for name, t in zip(names, tensors, strict=True)}), expected)


@pytest.mark.slow_cases("*-ort-cpu")
@pytest.mark.default_cases("sum behind an attention-portable", "two tokens-portable", "norm by hand-portable")
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("function", RIGHT.values(), ids=RIGHT)
def test_graph_is_right_at_other_sizes(function: Function, target: str, tmp_path: Path) -> None:
    model = OfOne(function).eval()
    export_onnx(model, {"x": randn(2, 5, IN)}, tmp_path / "model.onnx", target=target)
    _compare(tmp_path / "model.onnx", model, ((randn(*sizes, IN),) for sizes in SIZES))


@pytest.mark.default_cases("tokens side by side-ort-cpu")
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("function", TWO.values(), ids=TWO)
def test_inputs_as_long_in_the_example_alone(function: Function, target: str, tmp_path: Path) -> None:
    model = OfTwo(function).eval()
    export_onnx(model, {"x": randn(2, 5, IN), "y": randn(2, 5, IN, seed=2)}, tmp_path / "model.onnx", target=target)
    _compare(tmp_path / "model.onnx", model, ((randn(2, a, IN), randn(2, b, IN, seed=2)) for a, b in ((3, 7), (6, 1))))


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda m, x: m.first(x.view(2, 5, IN))[:, 0], id="the input is rows"),
        pytest.param(lambda m, x: (m.first(x) + m.table).view(2, 5, OUT)[:, 0], id="a constant of all rows"),
    ],
)
def test_static_rows(function: Function, tmp_path: Path) -> None:
    model = OfOne(function).eval()
    export_onnx(model, {"x": randn(10, IN)}, tmp_path / "model.onnx", dynamic_axes={})
    _compare(tmp_path / "model.onnx", model, iter([(randn(10, IN, seed=3),)]))


@pytest.mark.slow
def test_weight_that_is_computed(tmp_path: Path) -> None:
    model = OfTwo(lambda m, x, y: F.linear(x, (y * 2).sin(), m.first.bias)[:, 0]).eval()
    inputs = {"x": randn(2, 5, IN), "y": randn(OUT, IN)}
    export_onnx(model, inputs, tmp_path / "model.onnx", dynamic_axes={"x": {0: "batch", 1: "sequence"}})
    _compare(tmp_path / "model.onnx", model, iter([(randn(3, 4, IN), randn(OUT, IN, seed=5))]))


def test_integers(tmp_path: Path) -> None:
    class Integers(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (x @ w + b) * 2

    x, w, b = torch.randint(9, (5, 3)), torch.randint(9, (3, 4)), torch.randint(9, (4,))
    export_onnx(Integers(), {"x": x, "w": w, "b": b}, tmp_path / "model.onnx", dynamic_axes={})
    _compare(tmp_path / "model.onnx", Integers(), iter([(x, w, b)]))


@pytest.mark.default_cases("two sites")
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda m, x: m.second(F.gelu(m.first(x.cumsum(1)))), id="two sites"),
        pytest.param(lambda m, x: m.first(x) * m.third(m.first(x)).sum(), id="a site twice"),
        pytest.param(lambda m, x: (m.first(x), m.square(x)), id="sites as outputs"),
        pytest.param(lambda m, x: m.third(F.gelu(m.first(x.cumsum(1))))[:, 0], id="a token"),
        pytest.param(
            lambda m, x: F.linear(x, m.first.weight, F.linear(x.mean((0, 1)).exp(), m.matrix.t())).relu(),
            id="a computed bias",
        ),
    ],
)
def test_swappable_adapters(function: Function, tmp_path: Path) -> None:
    model = OfOne(function).eval()
    sites = ["first", "second", "third", "square"]
    model = fill(melora_fx.rewrite(model, [name for name in sites if _is_used(name, function)], CONFIG))
    path, adapter = tmp_path / "model.onnx", tmp_path / "adapter"
    export_onnx(model, {"x": randn(2, 5, IN)}, path, adapter="swap")
    melora_fx.save_adapter(model, adapter)
    runner = OrtRunner(path)
    for sizes in ((1, 1), *SIZES):
        x = randn(*sizes, IN)
        with torch.no_grad():
            _near(runner.run({"x": x}, adapter=adapter).values(), model(x))
            with melora_fx.disabled(model):
                _near(runner.run({"x": x}).values(), model(x))


def _is_used(name: str, function: Function) -> bool:
    return name in function.__code__.co_names


def test_a_fold_into_the_graph_of_a_module_that_is_called_twice(tmp_path: Path) -> None:
    """Its weight is in the graph once, so a fold changes all of its products."""

    def twice(m: Case, x: torch.Tensor) -> torch.Tensor:
        return m.second(F.gelu(m.first(x)) + m.first(x + 1))

    inputs = {"x": randn(2, 5, IN)}
    model = OfOne(twice).eval()
    export_onnx(model, inputs, tmp_path / "base.onnx")
    model = fill(melora_fx.rewrite(model, ["first", "second"], CONFIG))
    melora_fx.save_adapter(model, tmp_path / "adapter")
    fold_onnx(tmp_path / "base.onnx", tmp_path / "adapter", tmp_path / "folded.onnx")
    _compare(tmp_path / "folded.onnx", model, iter([(randn(3, 4, IN),)]))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_a_decoder_as_long_as_its_encoder_in_the_example_alone(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 3}
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()

    def inputs(encoder: int, decoder: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(3, 43).repeat(2, 1)
        return {"input_ids": ids[:, :encoder], "decoder_input_ids": ids[:, 3 : 3 + decoder]}

    report = export_onnx(model, inputs(5, 5), tmp_path / "model.onnx", target=target, use_cache=False)
    assert report.inputs["decoder_input_ids"] == ("batch", "decoder_sequence")
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    for encoder, decoder in ((3, 7), (9, 2)):
        tensors = inputs(encoder, decoder)
        with torch.no_grad():
            expected = model(**tensors, use_cache=False).logits
        found = session.run(["logits"], {name: value.numpy() for name, value in tensors.items()})
        torch.testing.assert_close(torch.as_tensor(found[0]), expected, rtol=1e-4, atol=1e-4)
