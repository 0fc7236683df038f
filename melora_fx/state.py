"""Adapter folders: `adapter.safetensors`, whose header holds the configuration that is read, and a readable copy.

`<site>.lora_a` (N, P·R, I/N) and `<site>.lora_b` (N, O/N, R), small ranks padded with zeros, and the tensors of the
modules kept trainable under their own names. The header's `melora` entry is JSON: format_version, versions, and for
each site its configuration and the fingerprint of its base weight. One rename decides; nothing is ever unpickled.
"""

import dataclasses
import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .adapter import AdapterSite, refuse_folded, require_sites, sites
from .config import MELoRAConfig
from .errors import MELoRAError
from .match import ExampleInputs
from .rewrite import STATE, rewrite
from .rewritten import class_name, unwrap
from .targets import nearest

FORMAT_VERSION = 1
TENSORS_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter_config.json"
_HEADER_KEY = "melora"
_FINGERPRINT_VALUES = 64


@dataclass(frozen=True)
class Adapter:
    """An adapter folder as read: everything that any consumer of it needs, without a model.

    Attributes:
        directory: where it came from, for error texts.
        configs: configuration of each site.
        fingerprints: of each site's base weight; a site without one is not checked.
        kept: names of the modules that were kept trainable.
        model: class of the model that it was trained in and its number of labels, as far as known.
        tensors: `<site>.lora_a`, `<site>.lora_b` and the kept tensors.
    """

    directory: Path
    configs: dict[str, MELoRAConfig]
    fingerprints: dict[str, dict[str, Any]]
    kept: tuple[str, ...]
    model: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(repr=False)

    def kept_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are not an adapter's: trained heads."""
        own = {f"{name}.{kind}" for name in self.configs for kind in ("lora_a", "lora_b")}
        return {name: tensor for name, tensor in self.tensors.items() if name not in own}


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes the adapters of `model`, and the modules kept trainable, to a folder; made where there is none.

    A crash leaves the old files or the new ones.

    Raises:
        MELoRAError: for a plain model, or a folder that cannot be written.
    """
    found = require_sites(model, "save_adapter")
    refuse_folded(model, "save_adapter")
    directory = Path(directory)
    kept = _kept(model)
    tensors = {name: tensor.detach() for name, tensor in _kept_tensors(model, kept).items()}
    for name, site in found.items():
        rank = max(site.config.ranks)
        tensors[f"{name}.lora_b"] = site.lora_b.detach()[:, :, :rank]
        num_parts = len(site.config.parts(site.out_features))
        tensors[f"{name}.lora_a"] = site.lora_a.detach().unflatten(1, (num_parts, -1))[:, :, :rank].flatten(1, 2)
    header = {
        "format_version": FORMAT_VERSION,
        "versions": {"torch": torch.__version__, "melora_fx": _version()},
        "sites": {
            name: {"config": site.config.to_dict(), "base": fingerprint(site.weight, name)}
            for name, site in found.items()
        },
        "kept": list(kept),
        "model": {
            "class": class_name(model),
            "num_labels": getattr(getattr(model, "config", None), "num_labels", None),
        },
    }
    text = json.dumps(header, indent=2)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / CONFIG_FILE, lambda path: path.write_text(text + "\n"))
        contiguous = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
        metadata = {"format": "pt", _HEADER_KEY: text}
        write_atomically(directory / TENSORS_FILE, lambda path: save_file(contiguous, path, metadata))
    except OSError as error:
        raise MELoRAError(f"`{directory}` cannot be written: {error.strerror or error}") from error


def write_atomically(path: Path, write: Any) -> None:
    """Calls `write` with a temporary path beside `path`, flushes it to the disk, and renames it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_adapter(directory: str | os.PathLike[str]) -> Adapter:
    """An adapter folder, checked.

    Raises:
        MELoRAError: where the folder or its file is missing, truncated, corrupt, or of another format.
    """
    path = Path(directory) / TENSORS_FILE
    if not path.is_file():
        raise MELoRAError(f"`{directory}` is not an adapter folder: it has no {TENSORS_FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise MELoRAError(f"`{path}` cannot be read, it is truncated or corrupt: {error}") from error
    if text is None:
        raise MELoRAError(f"`{path}` was not written by `save_adapter`: its header has no `{_HEADER_KEY}` entry")
    try:
        header = json.loads(text)
        version = header["format_version"]
        if version > FORMAT_VERSION:
            raise MELoRAError(f"`{path}` has format_version {version}; this melora_fx reads up to {FORMAT_VERSION}")
        configs = {name: MELoRAConfig.from_dict(entry["config"]) for name, entry in header["sites"].items()}
        fingerprints = {name: entry["base"] for name, entry in header["sites"].items() if entry.get("base")}
        adapter = Adapter(Path(directory), configs, fingerprints, tuple(header["kept"]), header["model"], tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MELoRAError(f"the header of `{path}` cannot be read: {type(error).__name__}: {error}") from error
    missing = [f"{name}.{kind}" for name in configs for kind in ("lora_a", "lora_b") if f"{name}.{kind}" not in tensors]
    if missing:
        raise MELoRAError(f"`{path}` lacks the tensors {', '.join(map(repr, missing))}")
    return adapter


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str], *, example_inputs: ExampleInputs | None = None
) -> nn.Module:
    """The model with the adapter of a folder.

    A plain model is rewritten as the adapter says; in a rewritten one values and scaling are exchanged in place,
    without a recompile: smaller ranks are padded with zeros.

    Args:
        model: a plain or a rewritten model.
        directory: a folder written by `save_adapter`.
        example_inputs: as in `rewrite`, for a plain model.

    Raises:
        MELoRAError: for a folder that cannot be read, an adapter of another model (each key is named) or with another
            base weight, or one whose blocks or ranks do not fit a rewritten model; nothing is changed then.
    """
    adapter = read_adapter(directory)
    if not sites(model):
        return _load_into_plain(model, adapter, example_inputs)
    _load_into_rewritten(model, adapter)
    return model


def _load_into_plain(model: nn.Module, adapter: Adapter, example_inputs: ExampleInputs | None) -> nn.Module:
    plain = _plain_weights(model)
    unknown = [name for name in adapter.configs if name not in plain]
    if unknown:
        raise _another_model(adapter, unknown, list(plain))
    _check_shapes(adapter, plain)
    _check_fingerprints(adapter, plain)
    _check_kept(adapter, model)
    targets: dict[str, MELoRAConfig | None] = {f"re:{re.escape(name)}": c for name, c in adapter.configs.items()}
    rewritten = rewrite(
        model, targets, example_inputs=example_inputs, keep_trainable=[f"re:{re.escape(name)}" for name in adapter.kept]
    )
    _copy_values(rewritten, adapter)
    return rewritten


def _load_into_rewritten(model: nn.Module, adapter: Adapter) -> None:
    found = sites(model)
    wrong = [name for name in adapter.configs if name not in found]
    if wrong:
        raise _another_model(adapter, wrong, list(found))
    absent = [name for name in found if name not in adapter.configs]
    if absent:
        raise MELoRAError(f"`{adapter.directory}` has nothing for these sites of the model: {', '.join(absent)}")
    for name, site in found.items():
        config, saved = site.config, adapter.configs[name]
        for key in ("num_blocks", "split"):
            if getattr(config, key) != getattr(saved, key):
                raise MELoRAError(
                    f"`{name}`: the adapter's `{key}` (={getattr(saved, key)}) is not the model's "
                    f"(={getattr(config, key)}): `fold` or rebuild the model, then load into the plain one"
                )
        if max(saved.ranks) > site.lora_b.size(2):
            raise MELoRAError(
                f"`{name}`: the adapter's rank {max(saved.ranks)} is above the {site.lora_b.size(2)} that the model "
                "was rewritten with: load into a plain model"
            )
    weights = {name: site.weight for name, site in found.items()}
    _check_shapes(adapter, weights)
    _check_fingerprints(adapter, weights)
    _check_kept(adapter, model)
    _copy_values(model, adapter)


def _copy_values(model: nn.Module, adapter: Adapter) -> None:
    with torch.no_grad():
        for name, site in sites(model).items():
            _copy_site(
                site, adapter.configs[name], adapter.tensors[f"{name}.lora_a"], adapter.tensors[f"{name}.lora_b"]
            )
        own = unwrap(model).state_dict(keep_vars=True)
        for name, tensor in adapter.kept_tensors().items():
            own[name].copy_(tensor)


def _copy_site(site: AdapterSite, config: MELoRAConfig, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
    rank, num_parts = lora_b.size(2), len(config.parts(site.out_features))
    site.lora_a.zero_().unflatten(1, (num_parts, -1))[:, :, :rank].copy_(lora_a.unflatten(1, (num_parts, -1)))
    site.lora_b.zero_()[:, :, :rank].copy_(lora_b)
    site.scaling.copy_(torch.tensor(config.scalings).view(-1, 1, 1))
    dropout = getattr(site.owner, site.record.attribute("lora_dropout"), None)
    if dropout is not None:
        dropout.p = config.dropout
    else:  # the graph has no dropout node, and values are exchanged without touching it
        config = dataclasses.replace(config, dropout=0.0)
    site.record.config = config


# ---- checks ----------------------------------------------------------------------------------------------------------


def fingerprint(weight: torch.Tensor, name: str) -> dict[str, Any]:
    """What a base weight is recognised by: its shape, and 64 of its values in float32 unless it is quantised."""
    shape, dtype = list(weight.shape), str(weight.dtype).removeprefix("torch.")
    if weight.is_meta or type(weight.detach()) is not torch.Tensor or not weight.is_floating_point():
        warnings.warn(f"`{name}`: only the shape of its weight is recorded: it is quantised or on meta", stacklevel=3)
        return {"shape": shape, "dtype": dtype}
    return {"shape": shape, "dtype": dtype, "values": _sample(weight).tolist()}


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """64 values at even distances over the flattened weight, in float32."""
    index = torch.linspace(0, weight.numel() - 1, _FINGERPRINT_VALUES, dtype=torch.float64).long()
    rows, columns = index // weight.size(1), index % weight.size(1)
    return weight.detach()[rows.to(weight.device), columns.to(weight.device)].float().cpu()


def fingerprint_misfit(weight: torch.Tensor, expected: dict[str, Any]) -> str | None:
    """Why `weight` is not the one with this fingerprint, or None; values may differ by the coarser dtype's rounding."""
    if list(weight.shape) != expected["shape"]:
        return f"its shape is {list(weight.shape)}, the adapter's base had {expected['shape']}"
    if "values" not in expected or weight.is_meta or type(weight.detach()) is not torch.Tensor:
        return None
    values, sample = torch.tensor(expected["values"]), _sample(weight)
    coarser = max(torch.finfo(weight.dtype).eps, torch.finfo(getattr(torch, expected["dtype"])).eps)
    tiny = max(
        torch.finfo(weight.dtype).smallest_normal, torch.finfo(getattr(torch, expected["dtype"])).smallest_normal
    )
    wrong = int((~((values - sample).abs() <= coarser * values.abs() + tiny)).sum())
    return f"{wrong} of {len(values)} sampled values differ from the adapter's base" if wrong else None


def _check_fingerprints(adapter: Adapter, weights: Mapping[str, torch.Tensor]) -> None:
    lines = []
    for name, expected in adapter.fingerprints.items():
        if reason := fingerprint_misfit(weights[name], expected):
            lines.append(f"`{name}`: {reason}")
    if lines:
        raise MELoRAError(f"`{adapter.directory}` was trained on another base model:\n" + "\n".join(lines))


def _check_shapes(adapter: Adapter, weights: Mapping[str, torch.Tensor]) -> None:
    lines = []
    for name, config in adapter.configs.items():
        shapes = [tuple(adapter.tensors[f"{name}.{kind}"].shape) for kind in ("lora_a", "lora_b")]
        out_features, in_features = weights[name].shape
        fitting = [config.adapter_shapes(in_features, out_features), config.adapter_shapes(out_features, in_features)]
        if tuple(shapes) not in fitting:
            lines.append(
                f"`{name}`: lora_a is {shapes[0]} and lora_b {shapes[1]}, which does not fit a weight of shape "
                f"{tuple(weights[name].shape)} and the adapter's own configuration {config}"
            )
    if lines:
        raise MELoRAError(f"`{adapter.directory}` does not fit the model:\n" + "\n".join(lines))


def _check_kept(adapter: Adapter, model: nn.Module) -> None:
    own = unwrap(model).state_dict()
    lines = []
    for name, tensor in adapter.kept_tensors().items():
        if name not in own:
            lines.append(f"`{name}`: the model has no such tensor")
        elif own[name].shape != tensor.shape:
            lines.append(f"`{name}`: saved as {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}")
    if lines:
        raise MELoRAError(f"the trained modules of `{adapter.directory}` do not fit the model:\n" + "\n".join(lines))


def _another_model(adapter: Adapter, wrong: list[str], known: list[str]) -> MELoRAError:
    lines = [f"`{name}`; nearest: {nearest(name, known)}" for name in wrong]
    return MELoRAError(
        f"`{adapter.directory}` is for another model; it has sites that this one lacks:\n" + "\n".join(lines)
    )


def _plain_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every matrix of the model by the name that a site on it would have."""
    return {
        name.removesuffix(".weight"): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.dim() == 2
    }


def _kept(model: nn.Module) -> tuple[str, ...]:
    names: list[str] = []
    for path, module in unwrap(model).named_modules():
        state = module.__dict__.get(STATE)
        if state is not None:
            names += [f"{path}.{name}" if path else name for name in state.kept]
    return tuple(names)


def _kept_tensors(model: nn.Module, kept: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in unwrap(model).state_dict().items()
        if any(name.startswith(f"{module}.") for module in kept)
    }


def _version() -> str:
    return importlib.metadata.version("melora_fx")
