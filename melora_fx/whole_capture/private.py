"""What whole captures borrow of `torch.export` and its sizes: as in `torch_private.py`."""

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
    """The structure of (args, kwargs) that an exported module takes. torch 2.13."""
    return module._in_spec


def export_guards(program: ExportedProgram) -> list[str]:
    """What an export assumed of the sizes of its inputs beside single ranges, such as `L['x'].size()[1] % 4 == 0`.

    The module of the program checks them under `torch._assert`, with hooks that cannot be pickled. torch 2.13.
    """
    return list(program._guards_code)


def without_assuming_two() -> AbstractContextManager[None]:
    """In the block `torch.export` notes where it takes an axis to be larger than 1, and does not do so unasked.
    torch 2.13.
    """
    config: Any = symbolic_shapes_config
    patched: AbstractContextManager[None] = config.patch(backed_size_oblivious=True)
    return patched


class LargeConditionError(Exception):
    """A condition on the size `source`, such as `L['x'].size()[2]`, that has grown past a limit."""

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.source = source


@contextmanager
def conditions_up_to(operations: int) -> Iterator[None]:
    """In the block `torch.export` raises LargeConditionError before it looks at a condition of more operations: with
    those it is busy for minutes, and has no limit of its own. torch 2.13.
    """
    import sympy  # heavy: only where it is used
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
    """In the block regions of `torch.inference_mode` are regions of `torch.no_grad`, which stand in the graph of an
    export; those that it drops would be differentiated. Torch itself enters `torch.inference_mode(False)` outside of
    them. torch 2.13.
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
    """Whether what `node` gives may be the memory of an input, or it writes to one; no public name gives an operator's
    schema. torch 2.13.
    """
    if not is_operator(node.target):
        return True
    schema = node.target._schema
    return any(each.alias_info for each in (*schema.returns, *schema.arguments))


def clear_export_hooks(module: nn.Module) -> None:
    """Removes every forward hook: those of `ExportedProgram.module()` cannot be pickled, and it gives no handles to
    them. torch 2.13.
    """
    for hooks in (
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_always_called,
    ):
        hooks.clear()
