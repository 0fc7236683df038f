"""An adapter's header: JSON in which every value is checked before it is used, no matter who has written it.

    {"format_version": 2, "sha256": …, "versions": {…}, "kept": […], "model": {…},
     "sites": {NAME: {"config": {…}, "base": {…}, "is_transposed": …, "row_dims": …, "parameter": …}}}

`base` is the fingerprint of the base weight. If it has no `values`, `without_values` says why. An exported graph
describes its sites in the same form, which is read here too.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from melora_fx.config import MELoRAConfig

from .fingerprint import NUM_VALUES, WITHOUT_VALUES

FORMAT_VERSION = 2
"""The version that is written. In version 1 there is no `sha256`, a configuration may omit default values, and a
fingerprint without values does not say why.
"""
_KEYS = {
    1: {"format_version", "versions", "sites", "kept", "model"},
    2: {"format_version", "versions", "sites", "kept", "model", "sha256"},
}
_OPTIONAL_KEYS = {"versions"}
_SITE_KEYS = {"config", "base", "is_transposed", "row_dims", "parameter"}
_MODEL_KEYS = {"class", "num_labels", "labels", "pad_token_id", "tied", "shared", "layout_sha256"}
_MAX_LABELS = 1 << 20
_MAX_ELEMENTS = 1 << 48
_LARGEST_FLOAT = torch.finfo(torch.float64).max


@dataclass(frozen=True)
class SiteHeader:
    """What a header says about one site.

    Attributes:
        config: its configuration.
        base: the fingerprint of its base weight; empty if a file of format 1 has none.
        is_transposed: whether the base weight is stored as (I, O); None in files of early versions.
        row_dims: as in `adapter.tensors.as_matrices`.
        parameter: the weight's name in its module; None if it is `weight`, or the file does not say.
    """

    config: MELoRAConfig
    base: dict[str, Any]
    is_transposed: bool | None = None
    row_dims: int | None = None
    parameter: str | None = None


@dataclass(frozen=True)
class Header:
    """A header as read; `sha256` is None in format 1."""

    format_version: int
    sites: dict[str, SiteHeader]
    kept: tuple[str, ...]
    model: dict[str, Any]
    versions: dict[str, Any]
    sha256: str | None
    content: dict[str, Any]
    """The whole header as it is in the file."""


def parse_header(text: str) -> Header:
    """Parses the header of an adapter file.

    Raises:
        ValueError, TypeError: if a value is wrong; the text names it and its rule.
    """
    content = _dict("the header", parse_json(text))
    version = content.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version not in _KEYS:
        known = ", ".join(map(str, _KEYS))
        raise ValueError(f"it has format_version {_shown(version)}; this melora_fx reads {known}")
    _check_keys("the header", content, _KEYS[version], optional=_OPTIONAL_KEYS)
    sites = parse_sites(content["sites"])
    if version > 1:
        for name, site in sites.items():
            _check_reason(name, site.base)
            if lost := sorted(site.config.to_dict().keys() - content["sites"][name]["config"].keys()):
                raise ValueError(f"site `{name}`: `config` lacks {_shown(lost)}")
    return Header(
        format_version=version,
        sites=sites,
        kept=_kept(content["kept"]),
        model=_model(content["model"]),
        versions=_dict("`versions`", content.get("versions", {})),
        sha256=_text("`sha256`", content["sha256"], 64) if version > 1 else None,
        content=content,
    )


def parse_json(text: str) -> Any:
    """Parses JSON without extensions (NaN, Infinity), duplicate keys, or nesting that is too deep for Python.

    Raises:
        ValueError: if `text` is not such JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def parse_sites(entries: Any) -> dict[str, SiteHeader]:
    """Parses what a header, or a graph's description, says about each site, by site.

    Raises:
        ValueError, TypeError: if a value is wrong; the text names the site, the value and its rule.
    """
    return {_text("a site's name", name, 4096): _site(name, entry) for name, entry in _dict("`sites`", entries).items()}


def _site(name: str, entry: Any) -> SiteHeader:
    where = f"site `{name}`"
    entry = _dict(where, entry)
    _check_keys(where, entry, _SITE_KEYS, optional=_SITE_KEYS - {"config"})
    try:
        config = MELoRAConfig.from_dict(_dict("`config`", entry["config"]))
        is_transposed, row_dims = entry.get("is_transposed"), entry.get("row_dims")
        if not isinstance(is_transposed, bool | None):
            raise TypeError(f"`is_transposed` must be true or false, got {_shown(is_transposed)}")
        if row_dims is not None and _integer("`row_dims`", row_dims, 1, 2) and len(entry["base"]["shape"]) != 3:
            raise ValueError("`row_dims` needs a weight of three dimensions")
        parameter = entry.get("parameter")
        if parameter is not None and not f".{name}".endswith(f".{_text('`parameter`', parameter, 4096)}"):
            raise ValueError(f"`parameter` (={_shown(parameter)}) is not the end of the site's name")
        return SiteHeader(config, _fingerprint(entry.get("base")), is_transposed, row_dims, parameter)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: {_cut(str(error))}") from error


def _fingerprint(base: Any) -> dict[str, Any]:
    if base is None:
        return {}
    base = _dict("`base`", base)
    _check_keys("`base`", base, {"shape", "dtype", "values", "without_values"}, optional={"values", "without_values"})
    shape = _list("`base.shape`", base["shape"])
    for size in shape:
        _integer("`base.shape`", size, 1, _MAX_ELEMENTS)
    if len(shape) not in (2, 3) or math.prod(shape) > _MAX_ELEMENTS:
        raise ValueError(f"`base.shape` (={_shown(shape)}) must be that of a matrix or a stack of matrices")
    if not isinstance(getattr(torch, _text("`base.dtype`", base["dtype"], 64), None), torch.dtype):
        raise ValueError(f"`base.dtype` (={_shown(base['dtype'])}) must be a dtype of torch")
    if "values" in base:
        values = _list("`base.values`", base["values"])
        if len(values) != NUM_VALUES or not _are_finite(values):
            raise ValueError(f"`base.values` must be {NUM_VALUES} finite numbers")
        if not getattr(torch, base["dtype"]).is_floating_point:
            raise ValueError(f"`base.values` need a floating-point weight, but `base.dtype` is {base['dtype']}")
    return base


def _check_reason(site: str, base: Mapping[str, Any]) -> None:
    """Raises ValueError if a fingerprint has neither values nor a reason for their absence, or has both."""
    if ("values" in base) == (base.get("without_values") in WITHOUT_VALUES):
        raise ValueError(
            f"site `{site}`: `base` must have either `values` or, in `without_values`, the reason why not: "
            f"{', '.join(WITHOUT_VALUES)}"
        )


def _kept(names: Any) -> tuple[str, ...]:
    names = [_text("a name in `kept`", name, 4096) for name in _list("`kept`", names)]
    if len(set(names)) < len(names):
        raise ValueError("`kept` has a name twice")
    return tuple(names)


def _model(facts: Any) -> dict[str, Any]:
    facts = _dict("`model`", facts)
    _check_keys("`model`", facts, _MODEL_KEYS, optional=_MODEL_KEYS)
    if facts.get("class") is not None:
        _text("`model.class`", facts["class"], 256)
    if facts.get("num_labels") is not None:
        _integer("`model.num_labels`", facts["num_labels"], 0, _MAX_LABELS)
    if facts.get("pad_token_id") is not None:
        _integer("`model.pad_token_id`", facts["pad_token_id"], -1, 1 << 31)
    for fact in ("tied", "shared"):
        for name, others in _dict(f"`model.{fact}`", facts.get(fact, {})).items():
            for each in (name, *_list(f"`model.{fact}`", others)):
                _text(f"a name in `model.{fact}`", each, 4096)
    if facts.get("layout_sha256") is not None:
        _text("`model.layout_sha256`", facts["layout_sha256"], 64)
    labels = facts.get("labels")
    if labels is not None:
        for label in _list("`model.labels`", labels):
            _text("a label in `model.labels`", label, 1 << 16, at_least=0)
        if len(labels) != facts.get("num_labels"):
            raise ValueError(
                f"`model.labels` names {len(labels)} labels, but `num_labels` is {facts.get('num_labels')}"
            )
    return facts


def _check_keys(where: str, found: Mapping[str, Any], known: set[str], *, optional: set[str]) -> None:
    missing = sorted(known - optional - found.keys())
    unknown = sorted(found.keys() - known)
    if missing or unknown:
        faults = [f"lacks {_shown(missing)}"] * bool(missing) + [f"has unknown {_shown(unknown)}"] * bool(unknown)
        raise ValueError(f"{where} {' and '.join(faults)}")


def _dict(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{where} must be a JSON object, got {_shown(value)}")
    return value


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{where} must be a list, got {_shown(value)}")
    return value


def _text(where: str, value: Any, at_most: int, *, at_least: int = 1) -> str:
    if not isinstance(value, str) or not at_least <= len(value) <= at_most:
        raise TypeError(f"{where} must be a string of {at_least} to {at_most} characters, got {_shown(value)}")
    return value


def _integer(where: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise TypeError(f"{where} must be an integer from {low} to {high}, got {_shown(value)}")
    return value


def _are_finite(values: list[Any]) -> bool:
    """Returns whether all values are numbers that float64 can represent."""
    return all(type(value) in (float, int) for value in values) and max(map(abs, values)) <= _LARGEST_FLOAT


def _shown(value: Any) -> str:
    """Returns the representation of a value for an error text; a long one is cut."""
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a JSON object has a key twice")
    return found
