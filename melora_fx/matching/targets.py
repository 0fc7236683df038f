"""Resolves `targets`, the linears that the user names, to one configuration per site name."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

from torch import nn

from melora_fx.config import MELoRAConfig
from melora_fx.names import first_of, site_of, with_parents

TargetSpec = str | Sequence[str] | Mapping[str, MELoRAConfig | None] | Callable[[str, nn.Module], bool]

ALL_LINEAR = "all-linear"


def name_matches(pattern: str, name: str) -> bool:
    """Returns whether a pattern matches `name`: equal, a dotted suffix, or a glob (`* ? [`) or `re:` for all of it."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if any(wildcard in pattern for wildcard in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def resolve_targets(
    targets: TargetSpec,
    config: MELoRAConfig,
    owners: Mapping[str, nn.Module],
    left_out: Collection[str],
    model: nn.Module,
    others: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, MELoRAConfig]:
    """Returns the configuration of each name in `owners` that `targets` selects, in the order of `owners`.

    Args:
        targets: as in `rewrite`; a name that is mapped to None is left out, with everything below it.
        config: used unless `targets` maps names to configurations.
        owners: name of every linear of the model → the module that owns its weight.
        left_out: names that "all-linear" leaves out: heads, and linears that are kept trainable.
        model: searched for modules and parameters that a target names although they are no linears, for the error text.
        others: name → reason of parameters that take part in products and are no linears, for the error text.

    Raises:
        ValueError: if a target matches nothing (the nearest names are listed) or is no regular expression, or if
            `targets` is empty or selects no linear.
        TypeError: if `targets` has none of the accepted forms.
    """
    if callable(targets):
        chosen = {name: config for name, owner in owners.items() if targets(name, owner)}
        if not chosen:
            raise ValueError(
                f"the `targets` callable chose none of the {len(owners)} linears: {first_of(list(owners))}"
            )
        return chosen
    rules = _rules(targets, config)
    chosen = {}
    matched: set[str] = set()
    for name in owners:
        hits = [pattern for pattern, rule in rules.items() if _matches(pattern, name, left_out, or_below=rule is None)]
        matched.update(hits)
        if hits and (rule := rules[hits[0]]) is not None:
            chosen[name] = rule
    unmatched = [pattern for pattern in rules if pattern not in matched]
    if unmatched:
        raise ValueError("\n".join(_no_match(pattern, list(owners), left_out, model, others) for pattern in unmatched))
    if not chosen:
        raise ValueError(f"`targets` leaves every linear alone: all of {list(rules)} are mapped to None")
    return chosen


def names_one_by_one(targets: TargetSpec, name: str, left_out: Collection[str]) -> bool:
    """Returns whether `targets` selects `name` with a name, a glob or an expression, not with "all-linear"."""
    if callable(targets):
        return False
    patterns = [targets] if isinstance(targets, str) else targets
    first = next((pattern for pattern in patterns if _matches(pattern, name, left_out)), ALL_LINEAR)
    return first != ALL_LINEAR


def asks_for_all(targets: TargetSpec) -> bool:
    """Returns whether "all-linear" is one of the `targets`."""
    return not callable(targets) and ALL_LINEAR in ([targets] if isinstance(targets, str) else targets)


def nearest(pattern: str, names: Sequence[str]) -> str:
    """Returns the names most similar to `pattern`, for an error text."""
    suffixes = {".".join(name.split(".")[start:]): None for name in names for start in range(name.count(".") + 1)}
    return first_of(difflib.get_close_matches(pattern, suffixes, n=5, cutoff=0.5) or list(names))


def _rules(targets: object, config: MELoRAConfig) -> dict[str, MELoRAConfig | None]:
    if isinstance(targets, str):
        targets = [targets]
    if isinstance(targets, Mapping):
        rules: dict[str, MELoRAConfig | None] = dict(targets)
        for pattern, rule in rules.items():
            if rule is not None and not isinstance(rule, MELoRAConfig):
                raise TypeError(f"`targets[{pattern!r}]` must be a MELoRAConfig or None, got {rule!r}")
    elif isinstance(targets, Sequence):
        rules = {name: config for name in targets}  # noqa: C420  (keeps the type)
    else:
        raise TypeError(f"`targets` must be a name, a list, a mapping or a callable, got {type(targets).__name__}")
    if not rules:
        raise ValueError('`targets` is empty: name the linears to adapt, or "all-linear"')
    for pattern in rules:
        if not isinstance(pattern, str):
            raise TypeError(f"every name in `targets` must be a str, got {pattern!r}")
        if pattern.startswith("re:"):
            _check_expression(pattern)
    return rules


def _check_expression(pattern: str) -> None:
    try:
        re.compile(pattern[3:])
    except re.error as error:
        raise ValueError(f"`targets`: {pattern!r} is not a regular expression: {error}") from None


def _matches(pattern: str, name: str, left_out: Collection[str], *, or_below: bool = False) -> bool:
    """Returns whether a pattern matches the linear `name` or, with `or_below`, a module above it."""
    if pattern == ALL_LINEAR:
        return name not in left_out
    return any(name_matches(pattern, each) for each in (with_parents(name) if or_below else [name]))


def _no_match(
    pattern: str, names: list[str], left_out: Collection[str], model: nn.Module, others: Mapping[str, str]
) -> str:
    if pattern == ALL_LINEAR and names:
        return f"`targets`: {pattern!r} leaves out all linears, as heads or kept trainable: {first_of(names)}"
    for path, named in (*model.named_modules(), *model.named_parameters()):
        if pattern != ALL_LINEAR and path and name_matches(pattern, path):
            kind = f"parameter {tuple(named.shape)}" if isinstance(named, nn.Parameter) else type(named).__name__
            reason = others.get(path) or others.get(site_of(path))
            why = f" ({reason})" if reason else ""
            return f"`targets`: {pattern!r} names `{path}`, a {kind} that is no linear{why}{_nearest(pattern, names)}"
    if not names:
        reasons = "".join(f"; `{name}`: {reason}" for name, reason in list(others.items())[:5])
        return f"`targets`: {pattern!r} matches nothing: the model has no linear nodes that can be adapted{reasons}"
    return f"`targets`: {pattern!r} matches none of the {len(names)} linears{_nearest(pattern, names)}"


def _nearest(pattern: str, names: list[str]) -> str:
    return f"; nearest: {nearest(pattern, names)}" if names else ""
