"""Measures the properties that every architecture must have, one function each. `measure` returns a table row."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

import melora_fx
from melora_fx import MELoRAConfig
from melora_fx.matching.plan import make_plan
from support.models import dense_copy, fill, scalings
from support.zoo import ZOO, build

CONFIG = MELoRAConfig(rank=2, num_blocks=2, alpha=3.0)


@dataclass(frozen=True)
class Row:
    """`modules`: linears in the model's module tree. `effective`: (in place, whole) sites that change outputs.

    `gradient_error`, `fold_error`: the worst of both captures, relative to the largest value. `graphs`: an
    ExportedProgram and a GraphModule of the model have the same sites and outputs.
    """

    modules: int
    in_place: int
    whole: int
    refused: int
    starts_equal: bool
    effective: tuple[int, int]
    gradient_error: float
    fold_error: float
    restored: bool
    exports: bool
    graphs: bool


def outputs(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Returns the floating-point outputs, without the cache."""
    with melora_fx.capture.model_settings.without_cache(model):
        result = model(**inputs)
    leaves = pytree.tree_leaves(dict(result) if isinstance(result, Mapping) else result)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def is_graph(model: nn.Module) -> bool:
    return isinstance(model, torch.fx.GraphModule)


def rewritten(name: str, *, whole: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns the entry's model with an adapter on every linear that can have one."""
    model, inputs = build(name)
    model.to(dtype)
    if not whole and not melora_fx.match(model, "all-linear", CONFIG).sites:
        return model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`rewrite` leaves")
        return melora_fx.rewrite(model, "all-linear", CONFIG, example_inputs=_cast(inputs, dtype) if whole else None)


def _cast(inputs: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def measure(name: str) -> Row:
    """Measures all properties except compilation."""
    plain, inputs = build(name)
    with torch.no_grad():
        base = outputs(plain, inputs)
    models = [rewritten(name, whole=whole) for whole in (False, True)]
    with torch.no_grad():
        equal = all(equals(outputs(model, inputs), base, name) for model in models)
    adapted = [model for model in models if melora_fx.sites(model)]
    effective = tuple(num_effective(model, inputs) for model in models)
    for model in adapted:
        fill(model)
    plan = make_plan(build(name)[0], "all-linear", CONFIG, inputs)
    return Row(
        modules=sum(isinstance(module, nn.Linear | Conv1D) for module in plain.modules()),
        in_place=len(melora_fx.sites(models[0])),
        whole=len(melora_fx.sites(models[1])),
        refused=len(plan.refused) + len(plan.unsuitable),
        starts_equal=equal,
        effective=(effective[0], effective[1]),
        gradient_error=max(gradient_error(name, whole=whole) for whole in (False, True)),
        exports=all(exports(model, inputs) for model in adapted),
        graphs=graphs_agree(name, set(melora_fx.sites(models[1]))),
        fold_error=max(fold_error(model, inputs) for model in adapted),
        restored=all(is_restored(model, plain) for model in adapted),
    )


def equals(actual: list[torch.Tensor], expected: list[torch.Tensor], name: str) -> bool:
    """Compares bit for bit, but torch's own attention within 1e-5: its fused path in eval mode rounds differently."""
    if name.startswith("nn."):
        return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(actual, expected, strict=True))
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def graphs_agree(name: str, sites: set[str]) -> bool:
    """Returns whether an export of the model, as a program and as a module, is rewritten like the model itself."""
    plain, inputs = build(name)
    plain.requires_grad_(False)  # torch computes a product with a strided input differently if the weight is trained
    plain.train(name.startswith("nn."))  # in eval mode torch's own attention is one fused operator without linears
    with torch.no_grad():
        program = _export(plain, inputs)
        base = outputs(program.module(check_guards=False), inputs)
        for graph in (program, program.module()):
            model = melora_fx.rewrite(graph, [f"re:{re.escape(site)}" for site in sites], CONFIG)
            if set(melora_fx.sites(model)) != sites or not all(
                torch.equal(a, b) for a, b in zip(outputs(model.eval(), inputs), base, strict=True)
            ):
                return False
    return True


def _export(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.export.ExportedProgram:
    with melora_fx.capture.model_settings.without_cache(model):
        return torch.export.export(model, (), dict(inputs), strict=False)


def num_effective(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> int:
    """Returns how many sites change an output if only their adapter is filled."""
    count = 0
    with torch.no_grad():
        base = outputs(model, inputs)
        for site in melora_fx.sites(model).values():
            site.lora_b.normal_(std=0.5)
            changed = outputs(model, inputs)
            count += any(not torch.allclose(a, b, atol=1e-6) for a, b in zip(changed, base, strict=True))
            site.lora_b.zero_()
    return count


def gradient_error(name: str, *, whole: bool) -> float:
    """Returns the error of the adapters' gradients against a dense float64 model with W + Δ; only adapters have any."""
    plain, inputs = build(name)
    inputs = _cast(inputs, torch.float64)
    model = rewritten(name, whole=whole, dtype=torch.float64)
    if not melora_fx.sites(model):
        return 0.0
    dense = dense_copy(fill(model), plain)
    for each in (model, dense):
        values = outputs(each, inputs)
        sum((value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum() for value in values).backward()
    with_gradient = {id(p) for p in model.parameters() if p.grad is not None}
    assert with_gradient <= {id(p) for p in melora_fx.adapter_parameters(model).values()}
    weights = dict(dense.named_parameters(remove_duplicate=False))
    worst = 0.0
    for name, site in melora_fx.sites(model).items():
        weight = weights[name] if site.record.parameter_name != "weight" else weights[f"{name}.weight"]
        gradient = weight.grad.mT if site.weight_is_transposed else weight.grad
        num_blocks = site.config.num_blocks
        for block, scaling in enumerate(scalings(site.config) * site.num_experts):
            own = block % num_blocks
            of_expert = gradient.reshape(-1, *gradient.shape[-2:])[block // num_blocks]
            part = of_expert.chunk(num_blocks, 0)[own].chunk(num_blocks, 1)[own]
            expected = (scaling * site.lora_b[block].t() @ part, scaling * part @ site.lora_a[block].t())
            for actual, want in zip((site.lora_a.grad[block], site.lora_b.grad[block]), expected, strict=True):
                worst = max(worst, float((actual - want).detach().abs().max() / gradient.abs().max().clamp(min=1e-12)))
    return worst


def fold_error(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> float:
    """Returns the error of the folded against the unfolded model; `model` is folded afterwards."""
    with torch.no_grad():
        before = outputs(model, inputs)
        after = outputs(melora_fx.fold(model), inputs)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(after, before, strict=True))


def is_restored(model: nn.Module, plain: nn.Module) -> bool:
    """Returns whether the folded model has the plain model's keys and, in place, its module types."""
    types = [{name: type(module) for name, module in each.named_modules()} for each in (model, plain)]
    return set(model.state_dict()) == set(plain.state_dict()) and (is_graph(model) or types[0] == types[1])


def exports(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Returns whether `torch.export` exports the rewritten model and the program computes the same."""
    with torch.no_grad():
        program = _export(model, inputs)
        pairs = zip(outputs(program.module(check_guards=False), inputs), outputs(model, inputs), strict=True)
        return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)


def num_compilations(model: nn.Module, inputs: Mapping[str, torch.Tensor], backend: str) -> tuple[int, float]:
    """Returns the compilations over ten training steps with changing values, and the worst error against eager mode."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None))}.values():
        config.use_cache = False  # `outputs` switches it, which a compiled model would notice
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    worst = 0.0
    for step in range(10):
        varied = {name: value + 1e-2 * step if value.is_floating_point() else value for name, value in inputs.items()}
        actual = outputs(compiled, varied)
        if step in (0, 9):
            with torch.no_grad():
                expected = outputs(model, varied)
            pairs = zip(actual, expected, strict=True)
            worst = max(worst, *(float((a.detach() - b).abs().max() / b.abs().max()) for a, b in pairs))
        sum(output.square().mean() for output in actual).backward()
        optimizer.step()
        optimizer.zero_grad()
    return counter.frame_count, worst


if __name__ == "__main__":
    for entry in ZOO:
        print(entry, measure(entry))
