"""`match`, the dry run: reports which linears `rewrite` would adapt, and why it would skip others. Changes nothing."""

from torch import nn
from torch.export import ExportedProgram

from melora_fx.config import MELoRAConfig
from melora_fx.whole_capture.dynamic_axes import DynamicAxes
from melora_fx.whole_capture.example_inputs import ExampleInputs

from .linears import describe, names_unused
from .plan import make_plan
from .report import MatchReport
from .targets import TargetSpec


def match(
    model: nn.Module | ExportedProgram,
    targets: TargetSpec,
    config: MELoRAConfig = MELoRAConfig(),
    *,
    example_inputs: ExampleInputs | None = None,
    dynamic_axes: DynamicAxes = "auto",
) -> MatchReport:
    """Returns what `rewrite` would do with the same arguments, without changing the model.

    Args:
        model: the module, graph or ExportedProgram that `rewrite` would receive.
        targets: as in `rewrite`.
        config: as in `rewrite`.
        example_inputs: as in `rewrite`: one example, to capture the whole model with `torch.export`.
        dynamic_axes: as in `rewrite`.

    Returns:
        the report, which shares no memory with the model.

    Raises:
        ValueError, TypeError: if an argument has no accepted form, if a target matches nothing, or if `dynamic_axes`
            does not fit the inputs.
        MELoRAError: if the model cannot be captured, or is already rewritten, compiled or wrapped for
            distributed training.
    """
    plan = make_plan(model, targets, config, example_inputs, dynamic_axes)
    unused = names_unused([*plan.sites, *plan.untargeted])
    return MatchReport(
        sites=tuple(describe(planned, is_used=planned.name not in unused) for planned in plan.sites),
        untargeted=tuple(describe(planned, is_used=planned.name not in unused) for planned in plan.untargeted),
        heads=plan.heads,
        skipped=tuple((plan.refused | plan.unsuitable | plan.misfits | plan.others).items()),
    )
