"""`match`, the dry run: which linears of a model `rewrite` would adapt, and why not the others. Changes nothing."""

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
    """What `rewrite` with the same arguments would do, without doing it.

    Args:
        model, targets, config, example_inputs, dynamic_axes: as in `rewrite`.

    Raises:
        ValueError, TypeError: for `targets` that match nothing or have no accepted form.
        MELoRAError: where the model cannot be captured.
    """
    plan = make_plan(model, targets, config, example_inputs, dynamic_axes)
    unused = names_unused([*plan.sites, *plan.untargeted])
    return MatchReport(
        sites=tuple(describe(planned, is_used=planned.name not in unused) for planned in plan.sites),
        untargeted=tuple(describe(planned, is_used=planned.name not in unused) for planned in plan.untargeted),
        heads=plan.heads,
        skipped=tuple((plan.refused | plan.unsuitable | plan.misfits | plan.others).items()),
    )
