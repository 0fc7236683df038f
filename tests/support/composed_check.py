"""What must hold of any hand-written model that `rewrite` is given: it is right, or it is refused by name.

The oracle is the model's own code in float64 on W + Δ; its gradients of W, taken through Δ, are those of A and B.
"""

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError
from support.composed_modules import NARROW, ComposedModel
from support.models import adapted_weight, assert_equal, fill, randn, site_update
from support.recorded_state import assert_recorded, recorded_state

Make = Callable[[], nn.Module]

RIGHT = "right"
PARTLY = "right, but for linears that a warning names"
REFUSED = "refused by `rewrite`"
REFUSED_IN_A_CALL = "refused in a call"


class _RefusedError(Exception):
    """The model was refused as it should be."""


@dataclass(frozen=True)
class _Call:
    """An input of so many positions and what decides branches: the sign of its sum, the mode, the modules' `flag`."""

    length: int
    sign: int
    training: bool
    flag: bool

    def run(self, model: nn.Module, autocast: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Input, (2, S, 12), and output; the same random numbers each time. In training the input wants a gradient."""
        model.train(self.training)
        for module in model.modules():
            if "flag" in vars(module):
                module.flag = self.flag
        x = self.sign * (randn(2, self.length, NARROW, seed=self.length).abs() - 0.4)
        x = x.to(next(model.parameters()).dtype).requires_grad_(self.training)
        torch.manual_seed(5)
        random.seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return x, model(x)


_CALLS = (_Call(5, 1, False, True), _Call(3, -1, True, False), _Call(5, -1, True, True))


def check_composed(composed: ComposedModel, config: MELoRAConfig, *, by_name: bool) -> str:
    """Rewrites the model, with its matrices as targets each by its name or as "all-linear"; the outcome.

    Raises:
        AssertionError: where the model is neither right nor refused.
    """
    with composed.maker() as make:
        targets = _matrices(make()) if by_name else "all-linear"
        try:
            _check_untrained(make, targets, config, composed.is_for_autocast)
            return _check_adapted(make, targets, config, composed.is_for_autocast)
        except _RefusedError as refusal:
            return str(refusal)


def _check_untrained(make: Make, targets: Any, config: MELoRAConfig, autocast: bool) -> None:
    """Where B = 0: bits, state and random numbers are those of the model itself."""
    plain = make().requires_grad_(False)  # torch computes a product otherwise when the weight is trained
    model = _rewritten(make(), targets, config)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for call in _CALLS:
            with mode():
                _, expected = call.run(plain, autocast)
                drawn = torch.get_rng_state(), random.getstate()
                with _refusals_by_name(model):
                    _, actual = call.run(model, autocast)
            assert_equal(actual, expected)
            assert torch.equal(torch.get_rng_state(), drawn[0])
            assert random.getstate() == drawn[1]
            _assert_same_state(model, plain)


def _check_adapted(make: Make, targets: Any, config: MELoRAConfig, autocast: bool) -> str:
    """Where A and B are filled: outputs, gradients and state are the oracle's, and outputs are when it is folded."""
    model = fill(_rewritten(make(), targets, config))
    sites = dict(melora_fx.sites(model))
    oracle, weights = _oracle(make(), sites)
    bound = 0.2 if autocast else 1e-4  # of the largest value: some roundings in a row; a wrong Δ is off by far more
    for call in _CALLS:
        wanted = call.run(oracle)
        with _refusals_by_name(model):
            got = call.run(model, autocast)
            _assert_near(got[1], wanted[1], bound)
            assert got[1].requires_grad == wanted[1].requires_grad
            if wanted[1].requires_grad:
                expected = _gradients(*wanted, weights.values())
                actual = _gradients(*got, [factor for site in sites.values() for factor in (site.lora_a, site.lora_b)])
                for got_each, wanted_each in zip(actual, _through_update(expected, sites), strict=True):
                    _assert_near(got_each, wanted_each, bound)
        _assert_same_state(model, oracle, bound)
    names = set(_matrices(model))
    melora_fx.fold(model, untie=True)
    for call in _CALLS:
        _assert_near(call.run(model, autocast)[1], call.run(oracle)[1], bound)
        _assert_same_state(model, oracle, bound)
    return RIGHT if names == set(sites) else PARTLY


def _matrices(model: nn.Module) -> list[str]:
    """The names of the sites that `model` would have if each of its matrices were one."""
    return [
        path if name == "weight" else f"{path}.{name}"
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 2
    ]


def _rewritten(model: nn.Module, targets: Any, config: MELoRAConfig) -> nn.Module:
    """The model, of which each matrix has an adapter or is named in a warning; unchanged where it is refused."""
    names = _matrices(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="`rewrite` leaves")
        before = recorded_state(model)
        try:
            melora_fx.rewrite(model, targets, config)
        except (MELoRAError, ValueError) as error:
            assert_recorded(before, recorded_state(model))
            _assert_named(names, error)
            raise _RefusedError(REFUSED) from error
    told = "\n".join(str(warning.message) for warning in caught)
    silent = set(names) - set(melora_fx.sites(model)) - _named(names, told)
    assert not silent, f"neither adapted nor refused: {silent}"
    return model


@contextmanager
def _refusals_by_name(model: nn.Module) -> Iterator[None]:
    """An error of a call must name a site."""
    try:
        yield
    except MELoRAError as error:
        _assert_named(melora_fx.sites(model), error)
        raise _RefusedError(REFUSED_IN_A_CALL) from error


def _assert_named(names: Iterable[str], error: Exception) -> None:
    assert _named(names, str(error)), f"names none of {list(names)}: {error}"


def _named(names: Iterable[str], text: str) -> set[str]:
    return {name for name in names if f"`{name}`" in text or f"'{name}'" in text}


def _oracle(model: nn.Module, sites: Mapping[str, Any]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """`model` in float64 with W + Δ, and these weights by site; tied ones are untied, as their adapters differ."""
    model.double().requires_grad_(False)
    weights: dict[str, nn.Parameter] = {}
    for name, site in sites.items():
        value = adapted_weight(site)
        own = site.record.parameter_name
        owner = model.get_submodule(name if own == "weight" else name.rpartition(".")[0])
        parameter = getattr(owner, own)
        if any(parameter is weight for weight in weights.values()):
            parameter = nn.Parameter(parameter.clone())
            setattr(owner, own, parameter)
        parameter.data.copy_(value.mT if site.weight_is_transposed else value)
        weights[name] = parameter.requires_grad_()
    return model, weights


def _gradients(x: torch.Tensor, y: torch.Tensor, parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Of a weighted sum of `y`; zeros for what it does not depend on. The input's comes last, if it has one."""
    wanted = [*parameters, *([x] if x.requires_grad else [])]
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


def _through_update(gradients: list[torch.Tensor], sites: Mapping[str, Any]) -> list[torch.Tensor]:
    """The oracle's gradients with those of A and B in the place of each weight's."""
    factors: list[torch.Tensor] = []
    for site, gradient in zip(sites.values(), gradients, strict=False):
        of_update = gradient.mT if site.weight_is_transposed else gradient
        factors += torch.autograd.grad(site_update(site), (site.lora_a, site.lora_b), of_update)
    return [*factors, *gradients[len(sites) :]]


def _assert_near(actual: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    """Equal up to `bound` of the largest value, or of 0.01 if all are smaller: a mean of what cancels."""
    assert type(actual) is torch.Tensor
    assert actual.shape == expected.shape
    error = (actual.detach().double() - expected.detach().double()).abs().max()
    scale = float(expected.detach().abs().max())
    assert error <= bound * max(scale, 0.01), f"off by {error} of {scale}"


def _assert_same_state(model: nn.Module, plain: nn.Module, bound: float | None = None) -> None:
    """What the forwards of `plain` keep, `model` keeps too: the bits, or up to `bound`."""
    for path, module in plain.named_modules():
        other = model.get_submodule(path)
        kept = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        for name, value in (kept | dict(module.named_buffers(recurse=False))).items():
            _assert_same(getattr(other, name), value, bound, f"{path}.{name}")


def _assert_same(actual: Any, expected: Any, bound: float | None, where: str) -> None:
    if isinstance(expected, nn.Parameter):
        return
    if isinstance(expected, torch.Tensor):
        if bound is None:
            assert_equal(actual, expected)
        else:
            _assert_near(actual, expected, bound)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key, value in expected.items():
            _assert_same(actual[key], value, bound, where)
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for got, want in zip(actual, expected, strict=True):
            _assert_same(got, want, bound, where)
    else:
        assert actual == expected, where
