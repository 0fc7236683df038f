"""Compares cases that are compiled, exported, copied or under gradient checkpointing with the same model in eager mode.

If the plain model itself fails such a comparison, the rewritten model is not tested with it.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import melora_fx
from melora_fx import MELoRAError
from support.hand_written.case import Case, Run
from support.hand_written.checks import CONFIG, Ran, run
from support.hand_written.compared import assert_same, leaves, loss_of, state_of
from support.models import fill

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


class NotAskedError(Exception):
    """The plain model cannot do this either, or the case is refused earlier."""


def plain(case: Case, training: bool) -> nn.Module:
    """Returns the plain model, frozen except for the weights of the targets."""
    model = case.made().train(training).requires_grad_(False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in case.targets:
        (parameters.get(name) if name in parameters else parameters[f"{name}.weight"]).requires_grad_()
    return model


def adapted(case: Case, training: bool, seed: int = 0) -> nn.Module:
    """Returns the model with random adapters.

    Raises:
        NotAskedError: if it is refused.
    """
    try:
        return fill(melora_fx.rewrite(case.made().train(training), list(case.targets), CONFIG), seed=seed)
    except (MELoRAError, ValueError, TypeError) as error:
        raise NotAskedError(f"refused: {error}") from error


def eager(case: Case, training: bool, seed: int = 0, calls: tuple[Run, ...] = ()) -> tuple[nn.Module, Ran]:
    """Returns an adapted model and its results in eager mode, after a backward pass.

    Raises:
        NotAskedError: if it is refused.
    """
    model = adapted(case, training, seed)
    try:
        ran = run(case, model, gradients=training, calls=calls)
    except MELoRAError as error:
        raise NotAskedError(f"refused: {error}") from error
    backward(ran)
    return model, ran


def backward(ran: Ran) -> None:
    loss = loss_of(ran.output)
    if loss is not None:
        loss.backward()


def gradients(model: nn.Module, ran: Ran) -> dict[str, Any]:
    """Returns the gradients of the inputs and of everything that is trained; zeros if there is none."""
    named = [(f"input {number}", x) for number, x in enumerate(ran.inputs)]
    named += [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in named}


def asked(what: str, attempt: Callable[[], None]) -> None:
    """Returns if the attempt on the plain model succeeds.

    Raises:
        NotAskedError: if it fails.
    """
    try:
        attempt()
    except Exception as error:
        raise NotAskedError(f"the plain model {what}: {type(error).__name__}") from error


def assert_alike(case: Case, model: nn.Module, ran: Ran, reference: nn.Module, expected: Ran, what: str) -> None:
    """Checks that outputs, gradients and the state that the plain model has too are equal within rounding."""
    assert_same(ran.output, expected.output, f"{what}: output", case.tolerance)
    found, wanted = gradients(model, ran), gradients(reference, expected)
    for name, gradient in wanted.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert_same({name: found[name] / scale}, {name: gradient / scale}, f"{what}: gradient of", case.tolerance)
    known = plain(case, True)
    run(case, known)
    paths = () if case.keeps else state_of(known).keys()
    wanted = {path: leaf for path, leaf in state_of(reference).items() if path in paths}
    assert_same(state_of(model), wanted, f"{what}: state", case.tolerance)


def _compiled(case: Case, model: nn.Module, fullgraph: bool) -> Ran:
    torch._dynamo.reset()
    ran = run(case, torch.compile(model, backend="eager", fullgraph=fullgraph))
    backward(ran)
    return ran


def assert_compiles(case: Case) -> None:
    """Checks the compiled model, as one graph if the plain model is one."""

    def attempt(fullgraph: bool) -> None:
        model, reference = plain(case, True), plain(case, True)
        expected = run(case, reference)
        backward(expected)
        assert_alike(case, model, _compiled(case, model, fullgraph), reference, expected, "plain")

    if case.compiled:
        raise NotAskedError(case.compiled)
    reference, expected = eager(case, True)
    try:
        asked("is not a single graph", lambda: attempt(True))
        fullgraph = not case.breaks_graph
    except NotAskedError:
        asked("does not compile", lambda: attempt(False))
        fullgraph = False
    model = adapted(case, True)
    assert_alike(case, model, _compiled(case, model, fullgraph), reference, expected, "compiled")


def assert_refused_compiled(case: Case) -> None:
    """Checks that a forward refused in eager mode is also refused when it is compiled."""
    if case.compiled:
        raise NotAskedError(case.compiled)
    asked("does not compile", lambda: _compiled(case, plain(case, True), False) and None)
    model = adapted(case, True)
    try:
        _compiled(case, model, False)
    except Exception as error:
        names = [f"`{name}`" for name in case.targets]
        assert any(name in str(error) for name in names), f"none of {names} is in {error}"  # noqa: PT017
    else:
        raise AssertionError("it is not refused when it is compiled")


def assert_exports(case: Case, strict: bool) -> None:
    """Checks the model exported with `torch.export`, in eval mode."""

    def exported(model: nn.Module) -> dict[str, Any]:
        x = case.input(0, torch.float32).detach()
        with torch.no_grad():
            return dict(leaves([torch.export.export(model, (x,), strict=strict).module()(x)]))

    def attempt() -> None:
        expected = run(case, plain(case, False), gradients=False)
        assert_same(exported(plain(case, False)), expected.output, "plain", case.tolerance)

    if case.exported:
        raise NotAskedError(case.exported)
    if strict and case.breaks_graph:
        raise NotAskedError("breaks the graph")
    _, expected = eager(case, False)
    asked("does not export", attempt)
    assert_same(exported(adapted(case, False)), expected.output, "exported", case.tolerance)


def assert_copies(case: Case, way: str) -> None:
    """Checks that a copy has the same bits and its own adapters, and folds."""
    make = COPIES[way]

    def attempt() -> None:
        expected = run(case, plain(case, False), gradients=False)
        assert_same(run(case, make(plain(case, False)), gradients=False).output, expected.output, "plain", None)

    _, expected = eager(case, False)
    asked("cannot be copied", attempt)
    model = adapted(case, False)
    assert_same(run(case, make(model), gradients=False).output, expected.output, "copied: output", None)
    other = fill(make(model), seed=9)
    assert list(melora_fx.sites(other)) == list(melora_fx.sites(model))
    if case.copies:
        assert_same(run(case, model, gradients=False).output, expected.output, "after a copy was changed: output", None)
        _, expected = eager(case, False, seed=9)
        assert_same(run(case, other, gradients=False).output, expected.output, "the changed copy: output", None)
        melora_fx.fold(make(model), untie=case.untie or case.shared)


def assert_checkpoints(case: Case, use_reentrant: bool) -> None:
    """Checks gradient checkpointing around the whole model."""

    def tensors(use: Run) -> Run:
        return lambda model, x: tuple(leaf for _, leaf in leaves(use(model, x)) if isinstance(leaf, torch.Tensor))

    def under(use: Run) -> Run:
        return lambda model, x: checkpoint(lambda x: tensors(use)(model, x), x, use_reentrant=use_reentrant)

    def checkpointed(model: nn.Module) -> Ran:
        ran = run(case, model, calls=[under(use) for use in case.calls])
        backward(ran)
        return ran

    def assert_like(model: nn.Module, ran: Ran, reference: nn.Module, expected: Ran) -> None:
        assert_same(ran.output, expected.output, "checkpointed: output", case.tolerance)
        assert_same(gradients(model, ran), gradients(reference, expected), "checkpointed: gradient of", 1e-3)

    plain_calls = tuple(tensors(use) for use in case.calls)

    def attempt() -> None:
        model, reference = plain(case, True), plain(case, True)
        expected = run(case, reference, calls=plain_calls)
        backward(expected)
        assert_like(model, checkpointed(model), reference, expected)

    reference, expected = eager(case, True, calls=plain_calls)
    asked("cannot be checkpointed", attempt)
    model = adapted(case, True)
    assert_like(model, checkpointed(model), reference, expected)
