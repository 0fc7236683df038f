"""Raises the errors for uses of an adapted weight that no adapter can follow: the site, who reads, and the remedy."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import torch

from melora_fx.adapter.site import SiteRecord
from melora_fx.capture.expert_layers import IN_PLACE_REMEDY
from melora_fx.errors import MELoRAError
from melora_fx.torch_private import is_experts_layer

from .reader import OURS, frames_from, is_of

LEAVE_OUT = "leave this linear out of `targets`"
REMEDY = "pass `example_inputs=` to `rewrite`, or leave this linear out of `targets`"


def refuse_use(owner: Any, parameter: str, operation: str) -> NoReturn:
    """Raises MELoRAError for an operation that would see a weight that a fold changes."""
    remedy = IN_PLACE_REMEDY if is_experts_layer(owner) else LEAVE_OUT
    raise MELoRAError(
        f"`{_site(owner, parameter)}`: {reader()} uses its weight in `{operation}`, which an adapter cannot follow and "
        f"a fold would change: {remedy}"
    )


def refuse_in_function(owner: Any, parameter: str) -> NoReturn:
    """Raises MELoRAError for a product in the forward of an `autograd.Function`."""
    raise MELoRAError(
        f"`{_site(owner, parameter)}`: {reader()} multiplies by its weight inside an `autograd.Function`, or inside "
        f"reentrant checkpointing to which it passes the weight, so its adapter would get no gradient: {LEAVE_OUT}"
    )


_texts: ContextVar[list[str] | None] = ContextVar("texts", default=None)


@contextmanager
def hidden_refusals() -> Iterator[list[str]]:
    """Yields a list of the texts that `refuse_unasked` raises in the block: TorchScript replaces the errors and drops
    their texts.
    """
    texts: list[str] = []
    token = _texts.set(texts)
    try:
        yield texts
    finally:
        _texts.reset(token)


def refuse_unasked(owner: Any, parameter: str, operation: str) -> NoReturn:
    """Raises MELoRAError for an operation of code that does not call `__torch_function__`; keeps its text for
    `hidden_refusals`.
    """
    try:
        refuse_use(owner, parameter, operation)
    except MELoRAError as refusal:
        texts = _texts.get()
        if texts is not None:
            texts.append(str(refusal))
        raise


def refuse_keeping(owner: Any, parameter: str) -> NoReturn:
    """Raises MELoRAError for a forward that stores the weight on a module, which registers it as a parameter."""
    raise MELoRAError(
        f"`{_site(owner, parameter)}`: {reader()} keeps its weight as a parameter of a module (`self.… = weight`), "
        f"which would have no adapter: {LEAVE_OUT}"
    )


def _site(owner: Any, parameter: str) -> str:
    """Returns the name of the site in the model that was passed to `rewrite`."""
    return record_of(owner, parameter).site_name(owner.melora_mark.path)


def record_of(owner: Any, parameter: str) -> SiteRecord:
    """Returns the record of the site whose weight has this name on `owner`."""
    return next(record for record in owner.melora_mark.records if record.parameter == parameter)


def reader() -> str:
    """Returns the function of the user's that runs now, with file and line, for an error text."""
    if torch.compiler.is_dynamo_compiling():
        return "compiled code"
    frame = next((each for each in frames_from(sys._getframe(1)) if not is_of(each, *OURS, "torch")), None)
    if frame is None:
        return "something"
    code = frame.f_code
    return f"`{code.co_qualname}` ({code.co_filename}:{frame.f_lineno})"
