"""Parameters that take part in products and are no linears: reports list them, `targets` never selects them.

They are kernels of convolutions, tables of embeddings that a forward multiplies by, inputs of linears, and factors of
attention.
"""

from torch import nn

from melora_fx.capture.graphs import Capture
from melora_fx.names import get_attribute, site_name, without_wrappers
from melora_fx.patterns.node import operator_name
from melora_fx.patterns.products import CONVOLUTIONS
from melora_fx.torch_private import is_convolution

from .candidates import Candidates
from .linears import name_in_model
from .unmatched import Unmatched


def find_other_products(candidates: Candidates) -> dict[str, str]:
    """Returns name → the parameter's products and the remedy, also for some parameters that have obstacles."""
    reasons = _convolutions(candidates)
    for name, used in candidates.unmatched.items():
        reasons.setdefault(name, _reason(used))
    return reasons


def _convolutions(candidates: Candidates) -> dict[str, str]:
    if not isinstance(candidates.model, nn.Module) or candidates.captured is not candidates.model:
        return {}
    return {
        site_name(without_wrappers(path), "weight"): _of_kernel(tuple(module.weight.shape))
        for path, module in candidates.model.named_modules()
        if is_convolution(module)
    }


def _of_kernel(shape: tuple[int, ...]) -> str:
    remedy = ": use an `nn.Linear` over the channels, which can be adapted" if set(shape[2:]) == {1} else ""
    return f"the kernel {shape} of a convolution, which cannot be adapted{remedy}"


def _reason(used: Unmatched) -> str:
    shape = tuple(used.parameter.shape)
    if isinstance(used.owner, nn.Embedding) and (used.products or used.linears):
        return _of_table(used)
    if used.linears and not used.others:
        names = _listed([name_in_model(used.capture, path) for path in used.inputs_of])
        return f"a parameter {shape} that is an input of {names}, not a weight that can be adapted"
    if used.others and used.others[0].node.op == "call_module":
        names = _listed([str(each.node.target) for each in used.others if each.node.op == "call_module"])
        return f"its module passes it to {names}, which may multiply by it: pass `example_inputs=` to find out"
    products = [*used.others, *used.products]
    if any(operator_name(product.node) in CONVOLUTIONS for product in products):
        return _of_kernel(shape)
    return f"a parameter {shape} in `{'; '.join(dict.fromkeys(each.text for each in products))}`, which is no linear"


def _of_table(used: Unmatched) -> str:
    """Returns the reason for the table of an embedding that a forward multiplies by."""
    if _is_called(used.capture, used.owner):
        return (
            f"`{used.reader}` multiplies by the table of an embedding and looks it up too, which a fold would change: "
            "use a separate matrix for the product, which can be adapted"
        )
    return f"`{used.reader}` multiplies by the table of an embedding: pass `example_inputs=`"


def _is_called(capture: Capture, module: nn.Module) -> bool:
    calls = [node for graph in capture.graphs for node in graph.find_nodes(op="call_module")]
    return any(get_attribute(capture.module, str(call.target)) is module for call in calls)


def _listed(names: list[str]) -> str:
    different = list(dict.fromkeys(names))
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    return ", ".join(f"`{name}`" for name in different[:3]) + more
