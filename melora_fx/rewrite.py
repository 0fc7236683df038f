"""Rewrites the linear nodes of a model into frozen base + MELoRA subgraphs.

    y = x Wᵀ + b  ⟶  y = x Wᵀ + b + concat_i( x_i A_iᵀ (s_i B_i)ᵀ )

x_i is the i-th of N equal slices of the input, A_i (R, I/N), B_i (O/N, R). All blocks are one batched product: x as
(N, T, I/N), A as (N, R, I/N), B as (N, O/N, R). With `split` into P parts, A is (N, P·R, I/N), part p uses its own R
rows of it, and B's rows of one block are the rows of the parts in turn.

I in_features, O out_features, N num_blocks, R the largest rank of a block, T tokens, P parts.
"""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from .blocks import new_adapter, scaling_tensor
from .capture import Capture
from .config import MELoRAConfig
from .errors import MELoRAError
from .match import ExampleInputs, Plan, PlannedSite, make_plan
from .patterns import LinearNode
from .quantized import device_of
from .rewritten import install
from .site import SITE_TAG, TENSORS, SiteRecord
from .stale_optimizer import watch_optimizers
from .targets import ALL_LINEAR, TargetSpec, name_matches, nearest
from .whole_model import is_exported, make_trainable

aten = torch.ops.aten

STATE = "melora_state"
"""Attribute of a rewritten model's root: what `fold` and `save_adapter` must know beside the sites."""


HAS_ADAPTERS = "_hf_peft_config_loaded"
"""Attribute of a Hugging Face model that has adapters to train."""


@dataclass
class RewriteState:
    """`requires_grad`: of every base parameter before `rewrite`. `kept`: names of the modules kept trainable."""

    requires_grad: dict[str, bool]
    kept: tuple[str, ...]


def rewrite(
    model: nn.Module | ExportedProgram,
    targets: TargetSpec,
    config: MELoRAConfig = MELoRAConfig(),
    *,
    example_inputs: ExampleInputs | None = None,
    keep_trainable: str | Sequence[str] = (),
) -> nn.Module:
    """The model with an adapter beside each linear that `targets` names, and everything else frozen.

    The output is at first that of the base, bit for bit. Errors come before anything is changed.

    Args:
        model: an nn.Module is changed in place and returned; an ExportedProgram gives a GraphModule.
        targets: a name or list of names; an ordered mapping of name to MELoRAConfig, or to None to leave a linear
            alone (first match wins); or a callable (name, module) -> bool. A name matches a site when equal to it or
            to its dotted suffix; with `* ? [` it is a glob on the whole name; after `re:` a regular expression for the
            whole name; "all-linear" is every linear but output embeddings and classification heads.
        config: the adapter's configuration, where `targets` gives none of its own.
        example_inputs: captures the whole model by `torch.export` and returns a GraphModule that shares the model's
            parameters: a dict of keyword arguments or a tuple of positional ones; batch and sequence stay dynamic.
        keep_trainable: names, as in `targets`, of modules that stay trainable and are saved with the adapter.

    Raises:
        ValueError, TypeError: for a name that matches nothing, or features that the blocks do not divide.
        MELoRAError: for a model already rewritten or compiled, one that cannot be captured, or a named linear that
            cannot be adapted.
    """
    plan = make_plan(model, targets, config, example_inputs)
    rewritten, kept = plan.model, _kept_modules(plan.model, keep_trainable)
    _refuse(plan, kept)
    if plan.unsuitable and not _only_named(targets):
        names = ", ".join(f"`{name}` ({reason})" for name, reason in plan.unsuitable.items())
        warnings.warn(f"`rewrite` leaves {len(plan.unsuitable)} linears alone: {names}", stacklevel=2)
    if is_exported(plan.model):  # the user's own, planned as it is so that errors come before any change
        assert isinstance(plan.model, fx.GraphModule)
        plan = make_plan(make_trainable(plan.model), targets, config, None)
    parameters = rewritten.named_parameters(remove_duplicate=False)
    state = RewriteState({name: parameter.requires_grad for name, parameter in parameters}, kept)
    rewritten.requires_grad_(False)
    for name in kept:
        rewritten.get_submodule(name).requires_grad_(True)
    for capture, sites in _by_capture(plan.sites):
        install(capture.module, capture.graph, _insert_sites(capture.graph, sites))
    rewritten.__dict__[STATE] = state
    warn_on_save_pretrained(rewritten)
    _declare_adapters(rewritten)
    watch_optimizers(rewritten)
    return rewritten


def warn_on_save_pretrained(model: nn.Module) -> None:
    """From here on `save_pretrained` of a Hugging Face model says what it does not save as one would think."""
    if hasattr(type(model), "save_pretrained"):
        vars(model)["save_pretrained"] = functools.partial(_save_pretrained, model)


def _declare_adapters(model: nn.Module) -> None:
    """Says of a quantised Hugging Face model that it has adapters, without which a Trainer refuses to train it.

    The attribute is PEFT's; `_save_pretrained` hides it, since PEFT's format would be written.
    """
    if getattr(model, "is_quantized", False):
        vars(model)[HAS_ADAPTERS] = True


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained` of a model that is rewritten and not folded."""
    warnings.warn(
        "`save_pretrained` of a rewritten model writes base and adapter under names that `from_pretrained` drops: use "
        "`melora_fx.save_adapter`, or `melora_fx.fold` first; for a Trainer's checkpoints, `AdapterCheckpointCallback`",
        stacklevel=2,
    )
    declared = vars(model).pop(HAS_ADAPTERS, None)
    try:
        return type(model).save_pretrained(model, *args, **kwargs)
    finally:
        if declared:
            _declare_adapters(model)


def _refuse(plan: Plan, kept: tuple[str, ...]) -> None:
    """Raises for what was asked for and cannot be done; all offenders at once."""
    if plan.misfits:
        raise ValueError("\n".join(f"`{name}`: {reason}" for name, reason in plan.misfits.items()))
    if plan.refused:
        raise MELoRAError("\n".join(f"`{name}` cannot be adapted: {reason}" for name, reason in plan.refused.items()))
    if not plan.sites:
        raise MELoRAError("no linear can be adapted:\n" + "\n".join(f"`{n}`: {r}" for n, r in plan.unsuitable.items()))
    taken = [
        f"`{site.name}`: its module already has `{attribute}`"
        for site in plan.sites
        for attribute in (SiteRecord.attribute_of(site.parameter, kind) for kind in TENSORS)
        if hasattr(site.owner, attribute)
    ]
    if taken:
        raise MELoRAError("\n".join(taken) + "\nrename it: the adapter needs that name")
    both = [site.name for site in plan.sites if any(_is_within(site.name, name) for name in kept)]
    if both:
        raise ValueError(
            f"`keep_trainable` and `targets` both name {', '.join(map(repr, both))}: train or adapt it; "
            f"a mapping leaves it out, `targets={{{both[0]!r}: None, …}}`"
        )


def _only_named(targets: TargetSpec) -> bool:
    """Whether every target is a name, a glob or an expression: then linears that none of them names are not missed."""
    return not callable(targets) and ALL_LINEAR not in ([targets] if isinstance(targets, str) else targets)


def _is_within(name: str, module: str) -> bool:
    """Whether `name` is the module's or below it."""
    return name == module or name.startswith(f"{module}.")


def _by_capture(sites: list[PlannedSite]) -> list[tuple[Capture, list[PlannedSite]]]:
    groups: dict[int, tuple[Capture, list[PlannedSite]]] = {}
    for site in sites:
        groups.setdefault(id(site.capture), (site.capture, []))[1].append(site)
    return list(groups.values())


def _kept_modules(model: nn.Module, patterns: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(patterns, str | Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"`keep_trainable` must be a name or a list of names, got {patterns!r}")
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    kept: dict[str, None] = {}
    for pattern in patterns:
        hits = [name for name in names if name_matches(pattern, name)]
        if not hits:
            raise ValueError(f"`keep_trainable`: {pattern!r} matches no module; nearest: {nearest(pattern, names)}")
        kept.update(dict.fromkeys(hits))
    for name in kept:
        parameters = model.get_submodule(name).parameters()
        if any(type(value.detach()) is not torch.Tensor or not value.is_floating_point() for value in parameters):
            raise ValueError(
                f"`keep_trainable`: {name!r} is quantised and cannot be trained: leave it out of the quantisation "
                "(`modules_to_not_convert`, `llm_int8_skip_modules`), or adapt it"
            )
    return tuple(name for name in kept if not any(name != other and _is_within(name, other) for other in kept))


def _insert_sites(graph: fx.Graph, sites: list[PlannedSite]) -> list[SiteRecord]:
    """Adds the adapters' tensors to the weights' owners and their nodes to the graph.

    Last node first: where one linear feeds another, the later adapter's input is still the plain output then, and
    becomes the adapted one with all its other users.
    """
    records, insertions = [], []
    for site in sites:
        pattern, is_transposed = site.describe().pattern, site.nodes[0].weight_is_transposed
        record = SiteRecord(site.parameter, site.config, pattern, is_transposed, site.lowering)
        _add_tensors(site, record)
        records.append(record)
        insertions += [(linear, record, site) for linear in site.nodes]
    position = {node: index for index, node in enumerate(graph.nodes)}
    for linear, record, site in sorted(insertions, key=lambda insertion: -position[insertion[0].node]):
        _AdapterNodes(graph, linear, record, site).insert()
    return records


def _add_tensors(site: PlannedSite, record: SiteRecord) -> None:
    config, owner = site.config, site.owner
    lora_a, lora_b = new_adapter(
        config, *site.shape, device=device_of(owner, site.weight), dtype=adapter_dtype(site.weight)
    )
    owner.register_parameter(record.attribute("lora_a"), nn.Parameter(lora_a))
    owner.register_parameter(record.attribute("lora_b"), nn.Parameter(lora_b))
    owner.register_buffer(record.attribute("lora_scaling"), scaling_tensor(config, lora_b), persistent=False)
    if config.dropout:
        owner.add_module(record.attribute("lora_dropout"), nn.Dropout(config.dropout).train(owner.training))


def adapter_dtype(weight: torch.Tensor) -> torch.dtype:
    """float32, or float64 beside a float64 weight."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class _AdapterNodes:
    """Inserts one adapter behind one linear node; every inserted node carries the site's tag."""

    def __init__(self, graph: fx.Graph, linear: LinearNode, record: SiteRecord, site: PlannedSite) -> None:
        self.graph, self.linear, self.record, self.config = graph, linear, record, site.config
        self.in_features, self.out_features = site.shape
        parts = site.config.parts(self.out_features)
        self.row_sizes = [size // site.config.num_blocks for size in parts]  # of each part, in one block of B
        self.rank_sizes = [max(site.config.ranks)] * len(parts)
        self.casts = linear.weight_is_cast or site.weight.dtype != adapter_dtype(site.weight)

    def insert(self) -> None:
        base = self.linear.node
        with self.graph.inserting_after(base):
            anchor = self._call("anchor", aten.alias.default, base)  # what the base's users use until the sum is there
        base.replace_all_uses_with(anchor, delete_user_cb=lambda user: user is not anchor)
        with self.graph.inserting_before(anchor):
            total = self._call("adapted", aten.add.Tensor, base, self._delta(base))
        anchor.replace_all_uses_with(total)
        self.graph.erase_node(anchor)
        total.meta = {**base.meta, **total.meta}

    def _delta(self, base: fx.Node) -> fx.Node:
        """The adapter's output, of the base output's shape and dtype."""
        lora_a, lora_b, scaling = (self._get(kind) for kind in ("lora_a", "lora_b", "lora_scaling"))
        scaled = self._call("scaled_b", aten.mul.Tensor, lora_b, scaling)
        delta = self._left(lora_a, scaled) if self.linear.input_is_transposed else self._blockwise(lora_a, scaled, base)
        return self._call("delta", aten.type_as.default, delta, base) if self.casts else delta

    def _blockwise(self, lora_a: fx.Node, scaled: fx.Node, base: fx.Node) -> fx.Node:
        """x Δᵀ by blocks, without Δ."""
        shape = [-1, self.config.num_blocks, self.in_features // self.config.num_blocks]
        blocks = self._swapped(self._call("input_blocks", aten.reshape.default, self._input(lora_a), shape), 0, 1)
        hidden = self._call("hidden", aten.bmm.default, blocks, self._swapped(lora_a, 1, 2))
        hiddens, scaleds = self._parts(hidden, 2, self.rank_sizes), self._parts(scaled, 1, self.row_sizes)
        outputs = []
        for part_hidden, part_b in zip(hiddens, scaleds, strict=True):
            output = self._call("delta_blocks", aten.bmm.default, part_hidden, self._swapped(part_b, 1, 2))
            outputs.append(self._swapped(output, 0, 1))
        if len(outputs) > 1:
            outputs = [self._call("part", aten.flatten.using_ints, output, 1) for output in outputs]
            outputs = [self._call("parts", aten.cat.default, outputs, 1)]
        delta = outputs[0]
        if self.linear.rows is not None:
            start, stop = self.linear.rows
            flat = self._call("delta_flat", aten.reshape.default, delta, [-1, self.out_features])
            delta = self._call("delta_rows", aten.narrow.default, flat, 1, start, stop - start)
        return self._call("delta", aten.reshape_as.default, delta, base)

    def _left(self, lora_a: fx.Node, scaled: fx.Node) -> fx.Node:
        """Δ x, for W x: the rare form, in which x may have any number of dimensions, so Δ is made whole."""
        rows = []
        a_parts, b_parts = self._parts(lora_a, 1, self.rank_sizes), self._parts(scaled, 1, self.row_sizes)
        for part_a, part_b in zip(a_parts, b_parts, strict=True):
            blocks = self._call("delta_blocks", aten.bmm.default, part_b, part_a)
            each = [self._call("block", aten.select.int, blocks, 0, index) for index in range(self.config.num_blocks)]
            rows.append(self._call("block_diagonal", aten.block_diag.default, each))
        matrix = rows[0] if len(rows) == 1 else self._call("rows", aten.cat.default, rows)
        if self.linear.rows is not None:
            start, stop = self.linear.rows
            matrix = self._call("delta_rows", aten.narrow.default, matrix, 0, start, stop - start)
        return self._call("delta", aten.matmul.default, matrix, self._input(lora_a))

    def _input(self, lora_a: fx.Node) -> fx.Node:
        """The linear's input after dropout, in the adapter's dtype."""
        value = self.linear.input
        if self.config.dropout:
            value = self._tagged(self.graph.call_module(self.record.path("lora_dropout"), (value,)))
        return self._call("wide_input", aten.type_as.default, value, lora_a) if self.casts else value

    def _parts(self, value: fx.Node, dim: int, sizes: list[int]) -> list[fx.Node]:
        """The slices along `dim` that belong to the parts of `split`; the value itself without `split`."""
        if len(sizes) == 1:
            return [value]
        name = f"{value.name}_part"
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        return [
            self._call(name, aten.narrow.default, value, dim, start, size)
            for start, size in zip(starts, sizes, strict=True)
        ]

    def _swapped(self, value: fx.Node, first: int, second: int) -> fx.Node:
        return self._call(f"{value.name}_t", aten.transpose.int, value, first, second)

    def _call(self, name: str, operator: Any, *args: Any) -> fx.Node:
        return self._tagged(self.graph.call_function(operator, args, name=name))

    def _get(self, kind: str) -> fx.Node:
        return self._tagged(self.graph.get_attr(self.record.path(kind)))

    def _tagged(self, node: fx.Node) -> fx.Node:
        node.meta[SITE_TAG] = self.record.parameter
        return node
