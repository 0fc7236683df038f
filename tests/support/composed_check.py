"""Checks that `rewrite` adapts a hand-written model correctly or refuses it with an error that names the cause.

In place, the error names a site, or a warning names its linear. A whole capture is refused by `rewrite`, or in calls
that differ from its example, with an error that names an argument.

The oracle is the model's own code in float64 on W + Δ; its gradients of W, taken through Δ, are those of A and B.
"""

import random
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.names import get_attribute
from support.composed_calls import IN_PLACE, OF_GRAPHS, Call
from support.composed_modules import ComposedModel
from support.models import adapted_weight, assert_equal, fill, site_update
from support.recorded_state import assert_recorded, recorded_state

Make = Callable[[], nn.Module]

RIGHT = "correct"
PARTLY = "correct, except for linears that a warning names"
REFUSED = "refused by `rewrite`"
REFUSED_IN_A_CALL = "refused in a call"


class _RefusedError(Exception):
    """The model was refused as expected."""


@dataclass(frozen=True)
class _Rewrite:
    """How a model is rewritten: with these targets, in place or as the graph that is captured with the call `example`.

    A graph that, as a warning says, can be captured in eval mode only is not called in training.
    """

    composed: ComposedModel
    targets: Any
    config: MELoRAConfig
    example: Call | None

    def rewritten(self, model: nn.Module) -> tuple[nn.Module, tuple[Call, ...]]:
        """Returns the rewritten model, in which each matrix has an adapter or is named in a warning, and its calls.

        Checks that `model` is unchanged if it is refused.
        """
        names = _matrices(model)
        options = {"example_inputs": self.example.arguments(self.composed)} if self.example else {}
        with warnings.catch_warnings(record=True) as caught:
            for start in ("`rewrite` leaves", f".*{_EVALUATION_ONLY}"):
                warnings.filterwarnings("always", message=start)
            before = recorded_state(model)
            try:
                rewritten = melora_fx.rewrite(model, self.targets, self.config, **options)
            except (MELoRAError, ValueError) as error:
                assert_recorded(before, recorded_state(model))
                if not (self.example and re.search(f"cannot be captured|torch.export cannot|{_NOTHING}", str(error))):
                    _assert_named(names, error)
                raise _RefusedError(REFUSED) from error
        told = "\n".join(str(warning.message) for warning in caught)
        silent = set(names) - set(melora_fx.sites(rewritten)) - _named(names, told)
        assert not silent, f"neither adapted nor refused: {silent}"
        if not self.example:
            return rewritten, IN_PLACE
        modes = (True, False) if _EVALUATION_ONLY not in told else (False,)
        of_example = [replace(self.example, training=mode) for mode in modes]
        seconds = [replace(of_example[0], has_second=not self.example.has_second)]
        return rewritten, (*of_example, *seconds, *[call for call in OF_GRAPHS if call.training in modes])

    def answer(self, call: Call, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns input and output; None if a graph refuses a call that is not its example's and names an argument."""
        try:
            return call.run(model, self.composed)
        except MELoRAError as error:
            if not self.example:
                _assert_named(melora_fx.sites(model), error)
                raise _RefusedError(REFUSED_IN_A_CALL) from error
            _assert_named(("x", self.composed.second), error)
            is_example = replace(call, training=self.example.training, sign=self.example.sign) == self.example
            if is_example and call.batch > 1:  # a batch of one is doubled
                raise AssertionError("the capture refuses its own example") from error
            return None


_EVALUATION_ONLY = "can be captured in eval mode only"
_NOTHING = "'all-linear' matches nothing"


def check_composed(composed: ComposedModel, config: MELoRAConfig, *, by_name: bool, example: Call | None = None) -> str:
    """Rewrites and checks the model, in place or captured whole with the call `example`, and returns the outcome.

    The targets are the names of its matrices, or "all-linear". A graph that is refused in a call answers its other
    calls correctly.

    Raises:
        AssertionError: if the model is neither correct nor refused.
    """
    with composed.maker() as make:
        rewrite = _Rewrite(composed, _matrices(make()) if by_name else "all-linear", config, example)
        try:
            _check_untrained(make, rewrite)
            return _check_adapted(make, rewrite)
        except _RefusedError as refusal:
            return str(refusal)


def _check_untrained(make: Make, rewrite: _Rewrite) -> None:
    """Checks at B = 0 that output bits, state and random numbers are those of the plain model."""
    plain = make().requires_grad_(False)  # torch computes a product differently if the weight is trained
    model, calls = rewrite.rewritten(make())
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for call in calls:
            with mode():
                actual = rewrite.answer(call, model)
                if actual is None:
                    continue
                drawn = torch.get_rng_state(), random.getstate()
                expected = call.run(plain, rewrite.composed)
            assert_equal(actual[1], expected[1])
            assert torch.equal(torch.get_rng_state(), drawn[0])
            assert random.getstate() == drawn[1]
            _assert_same_state(model, plain)


def _check_adapted(make: Make, rewrite: _Rewrite) -> str:
    """Checks filled A and B: outputs, gradients and state are the oracle's, and after `fold` outputs and state."""
    model, calls = rewrite.rewritten(make())
    sites = dict(melora_fx.sites(fill(model)))
    oracle, weights = _oracle(make(), sites)
    bound = (
        0.2 if rewrite.composed.is_for_autocast else 1e-4
    )  # of the largest value: several roundings in a row; an incorrect Δ is off by far more
    answered = []
    for call in calls:
        got = rewrite.answer(call, model)
        if got is None:
            continue
        answered.append(call)
        wanted = call.run(oracle, rewrite.composed)
        _assert_near(got[1], wanted[1], bound)
        assert got[1].requires_grad == wanted[1].requires_grad
        if wanted[1].requires_grad:
            expected = _gradients(*wanted, weights.values())
            actual = _gradients(*got, [factor for site in sites.values() for factor in (site.lora_a, site.lora_b)])
            for got_each, wanted_each in zip(actual, _through_update(expected, sites), strict=True):
                _assert_near(got_each, wanted_each, bound)
        _assert_same_state(model, oracle, bound)
    melora_fx.fold(model, untie=True)
    for call in answered:
        _assert_near(call.run(model, rewrite.composed)[1], call.run(oracle, rewrite.composed)[1], bound)
        _assert_same_state(model, oracle, bound)
    if len(answered) < len(calls):
        return REFUSED_IN_A_CALL
    return RIGHT if set(_matrices(make())) == set(sites) else PARTLY


def _matrices(model: nn.Module) -> list[str]:
    """Returns the names of the sites that `model` would have if each of its matrices were one."""
    return [
        path if name == "weight" else f"{path}.{name}"
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 2
    ]


def _assert_named(names: Iterable[str], error: Exception) -> None:
    assert _named(names, str(error)), f"names none of {list(names)}: {error}"


def _named(names: Iterable[str], text: str) -> set[str]:
    """Returns those of `names` that are in `text`; an argument may be there as `scale=1.0` or with its shape."""
    return {name for name in names if re.search(rf"[`']{re.escape(name)}[`'=]|\b{re.escape(name)}\.shape\[", text)}


def _oracle(model: nn.Module, sites: Mapping[str, Any]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Returns `model` in float64 with W + Δ, and these weights by site; tied ones are untied: their adapters differ."""
    model.double().requires_grad_(False)
    weights: dict[str, nn.Parameter] = {}
    for name, site in sites.items():
        value = adapted_weight(site)
        own = site.record.parameter_name
        owner = model.get_submodule(name if own == "weight" else name.rpartition(".")[0])
        parameter = nn.Parameter(getattr(owner, own).clone())
        setattr(owner, own, parameter)
        parameter.data.copy_(value.mT if site.weight_is_transposed else value)
        weights[name] = parameter.requires_grad_()
    return model, weights


def _gradients(x: torch.Tensor, y: torch.Tensor, parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the gradients of a weighted sum of `y`, zeros for none; the input's comes last, if it requires one."""
    wanted = [*parameters, *([x] if x.requires_grad else [])]
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


def _through_update(gradients: list[torch.Tensor], sites: Mapping[str, Any]) -> list[torch.Tensor]:
    """Returns the oracle's gradients, with those of A and B in place of each weight's."""
    factors: list[torch.Tensor] = []
    for site, gradient in zip(sites.values(), gradients, strict=False):
        of_update = gradient.mT if site.weight_is_transposed else gradient
        factors += torch.autograd.grad(site_update(site), (site.lora_a, site.lora_b), of_update)
    return [*factors, *gradients[len(sites) :]]


def _assert_near(actual: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    """Checks equality up to `bound` times the largest value, or times 0.01 if that is larger: a mean may cancel out."""
    assert type(actual) is torch.Tensor
    assert actual.shape == expected.shape
    error = (actual.detach().double() - expected.detach().double()).abs().max()
    scale = float(expected.detach().abs().max())
    assert error <= bound * max(scale, 0.01), f"off by {error} of {scale}"


def _assert_same_state(model: nn.Module, plain: nn.Module, bound: float | None = None) -> None:
    """Checks that `model` keeps the state that `plain` keeps (graphs only the buffers): its bits, or up to `bound`."""
    for path, module in plain.named_modules():
        kept = dict(module.named_buffers(recurse=False))
        if not isinstance(model, fx.GraphModule):
            kept |= {name: value for name, value in vars(module).items() if not name.startswith("_")}
        for name, value in kept.items():
            where = f"{path}.{name}".removeprefix(".")
            _assert_same(get_attribute(model, where), value, bound, where)


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
