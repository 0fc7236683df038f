"""Checks whether a case is correct, or refused as expected.

A correct model has, at B = 0 and inside `disabled`, the plain model's output bits, attributes and random numbers. With
random adapters it has the output, gradients and attributes of the plain model whose weight is W + Δ. After `fold` it
has the same output, and its modules have their original types.

The oracle is the case's own code: W + Δ is written into its weight, and the gradients of A and B follow from the
gradient of that weight through Δ(A, B).
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

import melora_fx
from melora_fx import AdapterSite, MELoRAConfig, MELoRAError
from support.hand_written.case import AT_REWRITE, EITHER, IN_FORWARD, LIMIT, REFUSED, RIGHT, WITH_GRADIENTS, Case, Run
from support.hand_written.compared import assert_same, assert_same_state, leaves, loss_of, random_state
from support.models import adapted_weight, as_stored, dense_update, fill
from support.recorded_state import assert_recorded, recorded_state

CONFIG = MELoRAConfig(rank=2, num_blocks=3, alpha=5.0)


@dataclass(frozen=True)
class Verdict:
    """The outcome (RIGHT, AT_REWRITE, IN_FORWARD, WITH_GRADIENTS or LIMIT) and the text of the refusal."""

    outcome: str
    text: str = ""


@dataclass(frozen=True)
class Ran:
    """The results of all calls of a case: the leaves of their outputs, their inputs, and the final random state."""

    output: dict[str, Any]
    inputs: list[torch.Tensor]
    random_state: dict[str, Any]


def run(
    case: Case,
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    *,
    gradients: bool = True,
    calls: Sequence[Run] = (),
) -> Ran:
    """Runs the calls of the case, or `calls` instead, always with the same inputs and random numbers."""
    inputs = [case.input(number, dtype) for number in range(len(case.calls))]
    torch.default_generator.manual_seed(7)
    random.seed(7)
    with torch.set_grad_enabled(gradients):
        outputs = [use(model, x) for use, x in zip(calls or case.calls, inputs, strict=True)]
    return Ran(dict(leaves(outputs)), inputs, random_state())


def types_of(model: nn.Module) -> dict[str, type | str]:
    """Returns the class of each module, or the class name of traced modules: torch creates a class for each of them."""
    modules = model.named_modules(remove_duplicate=False)
    return {
        name: type(module).__qualname__ if isinstance(module, fx.GraphModule) else type(module)
        for name, module in modules
    }


def assert_outcome(case: Case, *, training: bool) -> Verdict:
    """Runs the case and returns its verdict.

    Raises:
        AssertionError: if the outcome is not the one that the case expects.
    """
    if case.outcome == LIMIT:
        with pytest.raises(AssertionError):  # otherwise it is no longer a limit
            verdict(case, training=training)
        return Verdict(LIMIT)
    found = verdict(case, training=training)
    if case.outcome == WITH_GRADIENTS and training and found.outcome == IN_FORWARD:
        found = Verdict(WITH_GRADIENTS, found.text)
    said = f"{case.id} is {found.outcome}, not {case.outcome}: {found.text}"
    assert case.outcome in (found.outcome, EITHER) or (case.outcome == REFUSED and found.outcome != RIGHT), said
    if found.outcome != RIGHT:
        expected = case.match or "|".join(f"[`']{re.escape(name)}(\\.weight)?[`']" for name in case.targets)
        assert re.search(expected, found.text), f"{case.id}: {expected!r} is not in {found.text!r}"
    return found


def verdict(case: Case, *, training: bool) -> Verdict:
    """Runs the case in train or eval mode and returns its verdict.

    Raises:
        AssertionError: if it is neither correct nor refused cleanly.
    """
    model = case.made().train(training)
    types = types_of(model)
    before = None if any(is_lazy(parameter) for parameter in model.parameters()) else recorded_state(model)
    try:
        melora_fx.rewrite(model, list(case.targets), CONFIG)
    except (MELoRAError, ValueError, TypeError) as error:
        if before is not None:
            assert_recorded(before, recorded_state(model))
        if isinstance(error, MELoRAError):
            _assert_skipped(case)
        return Verdict(AT_REWRITE, str(error))
    assert set(melora_fx.sites(model)) == set(case.targets), "the sites are not the targets"
    try:
        ran = run(case, model, gradients=training)
    except MELoRAError as error:
        _assert_recovers(case, model, types)
        return Verdict(IN_FORWARD, str(error))
    _assert_base(case, model, ran, training)
    try:
        _assert_adapted(case, training)
    except MELoRAError as error:
        return Verdict(WITH_GRADIENTS, str(error))
    return Verdict(RIGHT)


def _assert_skipped(case: Case) -> None:
    """Checks that the dry run skips a target without raising, except for a model that is refused as a whole."""
    if case.id == "lazy":
        return
    skipped = dict(melora_fx.match(case.made(), "all-linear", CONFIG).skipped)
    assert skipped.keys() & set(case.targets), f"no target is among the skipped: {skipped}"


def _assert_base(case: Case, model: nn.Module, ran: Ran, training: bool) -> None:
    """Checks that at B = 0 (`ran`) and inside `disabled` the model is the frozen plain model, bit for bit."""
    plain = case.made().train(training).requires_grad_(False)
    for what in ("B = 0", "disabled"):
        if what == "disabled":
            with melora_fx.disabled(fill(model)):
                ran = run(case, model, gradients=training)
        expected = run(case, plain, gradients=training)
        assert_same(ran.output, expected.output, f"{what}: output", case.base_tolerance or None)
        if not case.keeps:
            assert_same_state(model, plain, what, None)
        assert_same(ran.random_state, expected.random_state, f"{what}: random numbers", None)


def _assert_adapted(case: Case, training: bool) -> None:
    """Checks that random adapters compute what W + Δ computes, before and after `fold`."""
    model = case.made().train(training)
    types = types_of(model)
    fill(melora_fx.rewrite(model, list(case.targets), CONFIG))
    dense = case.made(case.oracle).to(case.dtype).train(training)
    weights = write_updates(model, dense)
    ran, expected = run(case, model), run(case, dense, case.dtype)
    assert_near(case, model, ran, dense, expected, "adapted")
    assert_gradients(case, model, ran, weights, expected)
    if not training:
        ran, expected = run(case, model, gradients=False), run(case, dense, case.dtype, gradients=False)
        assert_near(case, model, ran, dense, expected, "adapted, without gradients")
    try:
        melora_fx.fold(model, untie=case.untie)
    except MELoRAError as error:
        if case.shared and "untie=True" in str(error):
            return
        raise
    ran, expected = run(case, model, gradients=False), run(case, dense, case.dtype, gradients=False)
    assert_near(case, model, ran, dense, expected, "folded")
    plain = case.made().train(training)
    run(case, plain)
    _assert_given_back(model, plain, types)


def write_updates(model: nn.Module, dense: nn.Module) -> dict[str, nn.Parameter]:
    """Writes W + Δ of each site of `model` into `dense`; returns these weights, the only ones to require gradients."""
    parameters = dict(dense.requires_grad_(False).named_parameters(remove_duplicate=False))
    weights = {}
    for name, site in melora_fx.sites(model).items():
        weight = parameters[name if name in parameters else f"{name}.weight"]
        with torch.no_grad():
            weight.copy_(as_stored(site, adapted_weight(site)))
        weights[name] = weight.requires_grad_()
    return weights


def assert_near(case: Case, model: nn.Module, ran: Ran, dense: nn.Module, expected: Ran, what: str) -> None:
    """Checks that output and state are the oracle's."""
    assert_same(ran.output, expected.output, f"{what}: output", case.tolerance)
    if not case.keeps:
        assert_same_state(model, dense, what, case.tolerance)


def assert_gradients(case: Case, model: nn.Module, ran: Ran, weights: dict[str, nn.Parameter], expected: Ran) -> None:
    """Checks that A, B and the inputs get the gradients that they have through W + Δ."""
    for output in (ran.output, expected.output):
        loss = loss_of(output)
        if loss is not None:
            loss.backward()
    for number, (x, wanted) in enumerate(zip(ran.inputs, expected.inputs, strict=True)):
        _assert_gradient(case, x, wanted.grad, f"input {number}")
    for name, site in melora_fx.sites(model).items():
        for factor, gradient, what in zip((site.lora_a, site.lora_b), _through(site, weights[name]), "AB", strict=True):
            _assert_gradient(case, factor, gradient, f"{what} of `{name}`")


def _through(site: AdapterSite, weight: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of A and B that follow from the gradient of W + Δ."""
    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
    factors = [factor.detach().double().requires_grad_() for factor in (site.lora_a, site.lora_b)]
    update = dense_update(site.config, *factors)
    return torch.autograd.grad(as_stored(site, update), factors, gradient.double())


def _assert_gradient(case: Case, tensor: torch.Tensor, expected: torch.Tensor | None, what: str) -> None:
    wanted = torch.zeros_like(tensor) if expected is None else expected
    found = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    scale = max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(
        found.double() / scale,
        wanted.double() / scale,
        rtol=case.tolerance,
        atol=case.tolerance,
        msg=lambda text: f"gradient of {what}: {text}",
    )


def _assert_recovers(case: Case, model: nn.Module, types: dict[str, type | str]) -> None:
    """Checks that `fold` restores the plain model after a refused forward: B is zero."""
    melora_fx.fold(model, untie=case.untie or case.shared)
    plain = case.made().train(model.training)
    state, expected = dict(model.named_parameters()), dict(plain.named_parameters())
    assert_same(state, expected, "after the refusal: parameters", None)
    run(case, model, gradients=model.training)
    run(case, plain, gradients=model.training)
    _assert_given_back(model, plain, types)


def _assert_given_back(model: nn.Module, plain: nn.Module, types: dict[str, type | str]) -> None:
    """Checks that types, attributes, names and flags are as before."""
    now = types_of(model)
    assert {name: now[name] for name in types} == types, "after `fold`: types"
    assert _of_modules(model) == _of_modules(plain), "after `fold`"


def _of_modules(model: nn.Module) -> dict[str, Any]:
    modules = list(model.named_modules(remove_duplicate=False))
    parameters = model.named_parameters(remove_duplicate=False)
    return {
        "attributes": {name: set(vars(module)) for name, module in modules},
        "training": {name: module.training for name, module in modules},
        "requires_grad": {name: parameter.requires_grad for name, parameter in parameters},
        "names of the state": list(model.state_dict()),
    }
