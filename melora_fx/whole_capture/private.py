"""Wraps the undocumented parts of `torch.export` and its sizes that whole captures use, as `torch_private.py` does."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes_config

from melora_fx.torch_private import is_operator


def input_structure(module: fx.GraphModule) -> Any:
    """Returns the structure of (args, kwargs) that an exported module takes. torch 2.13."""
    return module._in_spec


def export_guards(program: ExportedProgram) -> list[str]:
    """Returns the conditions on input sizes that an export assumed, besides single ranges: `L['x'].size()[1] % 4 == 0`.

    The module of the program checks them with `torch._assert`, in hooks that cannot be pickled. torch 2.13.
    """
    return list(program._guards_code)


def without_assuming_two() -> AbstractContextManager[None]:
    """Makes `torch.export` record each assumption that an axis is larger than 1, instead of making it silently.
    torch 2.13.
    """
    config: Any = symbolic_shapes_config
    patched: AbstractContextManager[None] = config.patch(backed_size_oblivious=True)
    return patched


class LargeConditionError(Exception):
    """A condition on the size `source`, such as `L['x'].size()[2]`, has grown past a limit."""

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.source = source


@contextmanager
def conditions_up_to(operations: int) -> Iterator[None]:
    """Makes `torch.export` raise LargeConditionError instead of evaluating a condition with more operations. Such
    conditions keep it busy for minutes, and it has no limit of its own. torch 2.13.
    """
    import sympy  # slow to import, so only here
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    evaluate = ShapeEnv.evaluate_expr

    def evaluate_small(env: Any, condition: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(condition, sympy.Basic) and condition.count_ops() > operations:
            uses = Counter(part for part in sympy.preorder_traversal(condition) if part in env.var_to_sources)
            raise LargeConditionError(env.var_to_sources[max(uses, key=uses.__getitem__)][0].name)
        return evaluate(env, condition, *args, **kwargs)

    setattr(ShapeEnv, "evaluate_expr", evaluate_small)  # noqa: B010, mypy refuses the assignment
    try:
        yield
    finally:
        setattr(ShapeEnv, "evaluate_expr", evaluate)  # noqa: B010


@contextmanager
def inference_mode_as_no_grad() -> Iterator[None]:
    """Turns regions of `torch.inference_mode` in the block into regions of `torch.no_grad`. An export keeps the latter
    in its graph and drops the former, whose contents would be differentiated. Leaves `torch.inference_mode(False)`
    outside such regions unchanged, as torch itself enters it. torch 2.13.
    """
    region: Any = torch.inference_mode
    enter, leave = region.__enter__, region.__exit__
    entered: list[Any] = []

    def enter_grad_mode(self: Any) -> None:
        if not self.mode and not entered:
            enter(self)
            return
        entered.append(self)
        self.grad_mode = torch.set_grad_enabled(not self.mode)

    def leave_grad_mode(self: Any, *error: Any) -> None:
        if self not in entered:
            leave(self, *error)
            return
        entered.remove(self)
        self.grad_mode.__exit__(*error)

    region.__enter__, region.__exit__ = enter_grad_mode, leave_grad_mode
    try:
        yield
    finally:
        region.__enter__, region.__exit__ = enter, leave


def may_alias(node: fx.Node) -> bool:
    """Returns whether the result of `node` may share memory with an input, or `node` may write to one. The schema of an
    operator has no public name. torch 2.13.
    """
    if not is_operator(node.target):
        return True
    schema = node.target._schema
    return any(each.alias_info for each in (*schema.returns, *schema.arguments))


def clear_export_hooks(module: nn.Module) -> None:
    """Removes every forward hook: those of `ExportedProgram.module()` cannot be pickled, and there are no handles to
    remove them. torch 2.13.
    """
    for hooks in (
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_always_called,
    ):
        hooks.clear()
