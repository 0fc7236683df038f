"""Tracers and exporters see the plain nodes."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import onnx
import pytest
import torch
from support.lowered import (
    CONFIG,
    DROPOUT,
    FEW,
    JIT_IS_DEPRECATED,
    MANY,
    assert_close,
    linear,
    lowered,
    targets,
)
from support.models import (
    IN,
    assert_near,
    dense_copy,
    output_of,
    randn,
    tower,
)
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import melora_fx
from exporters import export_onnx
from melora_fx import MELoRAConfig

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@JIT_IS_DEPRECATED
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_jit_trace_sees_plain_nodes(config):
    x = randn(*MANY, IN)
    code = []
    for lowering in ("auto", "plain"):
        traced = torch.jit.trace(lowered(tower, lowering, config), (x,))
        code.append([node.kind() for node in traced.inlined_graph.nodes()])
        assert_close(traced(randn(3, 7, IN)), lowered(tower, "plain", config)(randn(3, 7, IN)))
    assert code[0] == code[1]
    assert "aten::bmm" in code[0]


@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_symbolic_trace_sees_plain_nodes(config):
    graphs = [fx.symbolic_trace(lowered(tower, lowering, config)).graph for lowering in ("auto", "plain")]
    assert str(graphs[0]) == str(graphs[1])
    assert any("bmm" in target for target in targets(graphs[0]))


@pytest.mark.default_cases("no_dropout-not_strict-eval", "dropout-not_strict-train", "dropout-strict-eval")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("strict", [False, True], ids=["not_strict", "strict"])
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
@pytest.mark.slow
def test_export_sees_plain_nodes(config, strict, training):
    x = randn(*MANY, IN)
    programs = [
        torch.export.export(lowered(tower, lowering, config).train(training), (x,), strict=strict)
        for lowering in ("auto", "plain")
    ]
    assert targets(programs[0].graph) == targets(programs[1].graph)
    assert not any("melora" in target for target in targets(programs[0].graph))
    if not training:
        assert_near(output_of(programs[0].module(), x), output_of(tower_oracle(config), x.double()))


def tower_oracle(config: MELoRAConfig) -> nn.Module:
    return dense_copy(lowered(tower, "plain", config), tower())


@pytest.mark.slow
def test_onnx_graph_is_that_of_the_plain_nodes(tmp_path):
    graphs = []
    for lowering in ("auto", "plain"):
        path = tmp_path / lowering / "model.onnx"
        model = lowered(tower, lowering)
        report = export_onnx(model, {"x": randn(*FEW, IN)}, path.parent, adapter="keep", verify=False)
        graphs.append((report.op_counts, onnx.load(path).graph))
    assert graphs[0][0] == graphs[1][0]
    assert [node.SerializeToString() for node in graphs[0][1].node] == [
        node.SerializeToString() for node in graphs[1][1].node
    ]


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_make_fx_of_outputs_and_of_gradients(config, mode):
    model = linear(config).eval()
    x = randn(*MANY, IN)
    parameters = dict(model.named_parameters())

    def gradients(parameters: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        output = torch.func.functional_call(model, parameters, (x,))
        return [
            output,
            *torch.autograd.grad(output.square().mean(), [p for p in parameters.values() if p.requires_grad]),
        ]

    traced = make_fx(gradients, tracing_mode=mode, _allow_non_fake_inputs=True)(parameters, x)
    other = randn(*MANY, IN, seed=8)
    assert_close(traced(parameters, other), gradients(parameters, other))


def test_make_fx_of_dropout_draws_anew():
    model = linear(DROPOUT).train()
    x = randn(*MANY, IN)
    traced = make_fx(model)(x)
    assert not torch.equal(traced(x), traced(x))


@contextlib.contextmanager
def fake() -> Iterator[None]:
    with torch._subclasses.FakeTensorMode():
        yield


@contextlib.contextmanager
def meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


@pytest.mark.default_cases("auto-*-many-fake", "auto-*-few-meta", "plain-dropout-many-meta")
@pytest.mark.parametrize("context", [fake, meta])
@pytest.mark.parametrize("leading", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("lowering", ["auto", "plain"])
def test_tensors_without_memory_go_forward_and_backward(lowering, config, leading, context):
    with context():
        model = melora_fx.rewrite(tower(), "all-linear", replace(config, lowering=lowering)).train()
        x = torch.empty(*leading, IN).requires_grad_()
        output = model(x)
        assert output.shape == (*leading, 6)
        output.sum().backward()
        assert x.grad.shape == x.shape
        for parameter in melora_fx.adapter_parameters(model).values():
            assert parameter.grad.shape == parameter.shape
