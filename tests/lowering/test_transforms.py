"""`torch.func`, forward mode and second derivatives of lowered models."""

import copy
from collections.abc import Callable

import pytest
import torch
from support.lowered import (
    CONFIG,
    DROPOUT,
    JIT_IS_DEPRECATED,
    MANY,
    assert_close,
    compiled,
    linear,
    lowered,
    seeded,
    trained,
)
from support.models import (
    IN,
    adapted_weight,
    fill,
    randn,
    tower,
)
from torch import Tensor, nn
from torch.autograd import forward_ad

import melora_fx

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def loss_of(model: nn.Module) -> Callable[..., Tensor]:
    return lambda parameters, x: torch.func.functional_call(model, parameters, (x,)).square().mean()


MODES = {"eager": lambda function: function, "compiled": compiled}


@pytest.mark.default_cases("*-eager")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_func_grad(config, mode):
    model = lowered(tower, config=config)
    x = randn(*MANY, IN)
    found = mode(torch.func.grad(loss_of(model)))(trained(model), x)
    expected = torch.autograd.grad(loss_of(model)(trained(model), x), list(trained(model).values()))
    assert_close(list(found.values()), list(expected))


@pytest.mark.default_cases("eager")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_func_vmap_over_inputs_and_over_adapters(mode):
    model = lowered(tower)
    x = randn(*MANY, IN)
    assert_close(mode(torch.func.vmap(lambda x: model(x)))(x), model(x))
    others = [{name: p.detach() * scale for name, p in trained(model).items()} for scale in (1.0, 1.2)]
    stacked = {name: torch.stack([other[name] for other in others]) for name in others[0]}
    found = mode(torch.func.vmap(lambda p: torch.func.functional_call(model, p, (x,))))(stacked)
    assert_close(list(found), [torch.func.functional_call(model, other, (x,)) for other in others])


def test_func_per_sample_gradients():
    model = lowered(tower)
    x = randn(*MANY, IN)
    found = torch.func.vmap(torch.func.grad(loss_of(model)), in_dims=(None, 0))(trained(model), x)
    for index, sample in enumerate(x):
        expected = torch.autograd.grad(loss_of(model)(trained(model), sample), list(trained(model).values()))
        assert_close([gradient[index] for gradient in found.values()], list(expected))


@JIT_IS_DEPRECATED
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_func_jvp(mode):
    model = linear()
    x = randn(*MANY, IN)
    tangent = randn(*MANY, IN, seed=5)
    found = mode(lambda x, tangent: torch.func.jvp(model, (x,), (tangent,))[1])(x, tangent)
    assert_close(found.detach().double(), tangent.double() @ adapted_weight(melora_fx.sites(model)["inner"]).T)


@JIT_IS_DEPRECATED
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_forward_mode(mode):
    model = linear()
    x = randn(*MANY, IN)
    tangent = randn(*MANY, IN, seed=5)

    def derivative(x: Tensor, tangent: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent

    run = torch.compile(derivative, backend="aot_eager") if mode == "compiled" else derivative
    found = run(x, tangent)
    assert_close(found.detach().double(), tangent.double() @ adapted_weight(melora_fx.sites(model)["inner"]).T)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_functional_call(mode, calls):
    model = lowered(tower)
    x = randn(*MANY, IN)
    other = fill(copy.deepcopy(model), seed=8)
    found = mode(lambda p, x: torch.func.functional_call(model, p, (x,)))(dict(other.named_parameters()), x)
    assert_close(found, other(x))
    assert calls


@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_hessian_vector_products(config):
    found = []
    for lowering in ("auto", "plain"):
        model = lowered(tower, lowering, config)
        x = randn(*MANY, IN).requires_grad_()
        (first,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
        found.append(torch.autograd.grad((first * randn(*MANY, IN, seed=5)).sum(), list(trained(model).values())))
    assert_close(*found)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("config", [CONFIG, DROPOUT], ids=["no_dropout", "dropout"])
def test_vectorized_jacobian(config, training):
    """Batches the backward pass of an ordinary forward."""
    model = linear(config).train(training)
    x = randn(3, IN)
    if config.dropout and training:  # drawn again in the backward pass, which `vmap` forbids
        with pytest.raises(RuntimeError, match="random operations inside of vmap"):
            torch.autograd.functional.jacobian(lambda x: seeded(model, x), x, vectorize=True)
        return
    columns = torch.autograd.functional.jacobian(lambda x: seeded(model, x), x)
    assert_close(torch.autograd.functional.jacobian(lambda x: seeded(model, x), x, vectorize=True), columns)
