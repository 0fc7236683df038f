"""Which linears the user asked for: turns `targets` into one configuration per site name."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from melora_fx.config import MELoRAConfig

TargetSpec = str | Sequence[str] | Mapping[str, MELoRAConfig | None] | Callable[[str, nn.Module], bool]

ALL_LINEAR = "all-linear"
_HEADS = ("classifier", "score")


def name_matches(pattern: str, name: str) -> bool:
    """Whether a target pattern names `name`: equal, a dotted suffix, a glob (`* ? [`) or `re:` on the whole name."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if any(wildcard in pattern for wildcard in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def resolve_targets(
    targets: TargetSpec,
    config: MELoRAConfig,
    owners: Mapping[str, nn.Module],
    outputs: frozenset[str],
    model: nn.Module,
) -> dict[str, MELoRAConfig]:
    """The configuration of each name in `owners` that `targets` asks for, in the order of `owners`.

    A target that asks for nothing, alone or together, is an error.

    Args:
        targets: as in `rewrite`.
        config: used wherever `targets` gives no configuration of its own.
        owners: every linear of the model: its name and the module that owns its weight.
        outputs: names that "all-linear" leaves out: output embeddings and classification heads.
        model: asked for what a target names that is no linear, for the text of an error.

    Raises:
        ValueError: where a name matches nothing; the nearest names are listed.
        TypeError: where `targets` is none of the accepted forms.
    """
    if callable(targets):
        chosen = {name: config for name, owner in owners.items() if targets(name, owner)}
        if not chosen:
            raise ValueError(f"the `targets` callable chose none of the {len(owners)} linears: {_some(list(owners))}")
        return chosen
    rules = _rules(targets, config)
    chosen = {}
    matched: set[str] = set()
    for name in owners:
        hits = [pattern for pattern in rules if _rule_matches(pattern, name, outputs)]
        matched.update(hits)
        if hits and (rule := rules[hits[0]]) is not None:
            chosen[name] = rule
    unmatched = [pattern for pattern in rules if pattern not in matched]
    if unmatched:
        raise ValueError("\n".join(_no_match(pattern, list(owners), model) for pattern in unmatched))
    if not chosen:
        raise ValueError(f"`targets` leaves every linear alone: all of {list(rules)} are mapped to None")
    return chosen


def names_one_by_one(targets: TargetSpec, name: str) -> bool:
    """Whether `targets` asks for `name` by a name, a glob or an expression of its own, not as one of all linears."""
    if callable(targets):
        return False
    patterns = [targets] if isinstance(targets, str) else targets
    first = next((pattern for pattern in patterns if _rule_matches(pattern, name, frozenset())), ALL_LINEAR)
    return first != ALL_LINEAR


def is_classification_head(name: str) -> bool:
    """Whether a site of a classification model is its head, or below it."""
    return name.split(".")[0] in _HEADS


def nearest(pattern: str, names: Sequence[str]) -> str:
    """The names most like `pattern`, for an error text."""
    suffixes = {".".join(name.split(".")[start:]): None for name in names for start in range(name.count(".") + 1)}
    return _some(difflib.get_close_matches(pattern, suffixes, n=5, cutoff=0.5) or list(names))


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


def _rule_matches(pattern: str, name: str, outputs: frozenset[str]) -> bool:
    return name not in outputs if pattern == ALL_LINEAR else name_matches(pattern, name)


def _no_match(pattern: str, names: list[str], model: nn.Module) -> str:
    for path, named in (*model.named_modules(), *model.named_parameters()):
        if pattern != ALL_LINEAR and path and name_matches(pattern, path):
            kind = f"parameter {tuple(named.shape)}" if isinstance(named, nn.Parameter) else type(named).__name__
            return f"`targets`: {pattern!r} names `{path}`, a {kind} that is no linear{_nearest(pattern, names)}"
    if not names:
        return f"`targets`: {pattern!r} matches nothing: the model has no linear nodes that can be adapted"
    return f"`targets`: {pattern!r} matches none of the {len(names)} linears{_nearest(pattern, names)}"


def _nearest(pattern: str, names: list[str]) -> str:
    return f"; nearest: {nearest(pattern, names)}" if names else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", … ({len(names) - 5} more)" if len(names) > 5 else "")
