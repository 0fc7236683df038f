"""pytest plugin: rewrites in place every Hugging Face model that a test creates, with an adapter that is not zero.

    python -m pytest -p melora_outside tests/models/bert/test_modeling_bert.py

A test creates models by calling a class and with `from_pretrained`; the plugin wraps both. Models that are created as
parts of another are not rewritten: the outermost model is rewritten once, as a whole. `--models plain` rewrites nothing
and uses the same seeds, for the comparison; with `--models unfrozen` the base is trained too.
"""

import functools
import math
import re
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import melora_fx

RANK = 2
MAX_BLOCKS = 4
UPDATE_STD = 0.02
"""Standard deviation of the update's elements, like that of the initial weights of most of these models."""

ADAPTER = "melora_adapter"
"""The folder of the adapter in that of `save_pretrained`."""

_counts: Counter[str] = Counter()
"""Counts of what happened in the current test."""

_targets: dict[Any, dict[str, melora_fx.MELoRAConfig | None]] = {}
"""Targets by class and shapes, because tests create the same models again and again."""

_inits: set[Any] = set()
"""The `__init__` functions that are wrapped."""


class _State:
    depth = 0
    models = "rewritten"


@contextmanager
def _making() -> Iterator[bool]:
    """Yields whether the block creates an outermost model, which must be rewritten."""
    _State.depth += 1
    try:
        yield _State.depth == 1 and _State.models != "plain"
    finally:
        _State.depth -= 1


def _init_subclass(cls: type, **kwargs: Any) -> None:
    _own_init_subclass(cls, **kwargs)
    _wrap_init(cls)


def _wrap_init(cls: Any) -> None:
    """Wraps `__init__` of this class: if it is the outermost, it rewrites the model."""
    own_init = cls.__init__
    if own_init in _inits:  # inherited
        return

    @functools.wraps(own_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        with _making() as outermost:
            own_init(self, *args, **kwargs)
            if outermost:
                _adapted(self)

    cls.__init__ = init
    _inits.add(init)


def _subclasses(cls: type) -> Iterator[type]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _from_pretrained(cls: type, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Returns the model with the adapter that `save_pretrained` wrote next to it, or with the one for its names."""
    with _making() as outermost:
        loaded = _own_from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if outermost:
            _adapted(model, Path(str(pretrained_model_name_or_path)) / ADAPTER)
        return loaded


def _save_pretrained(model: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    saved = _own_save_pretrained(model, save_directory, *args, **kwargs)
    if melora_fx.sites(model):
        melora_fx.save_adapter(model, Path(save_directory) / ADAPTER)
        _counts["saved"] += 1
    return saved


def _adapted(model: PreTrainedModel, directory: Path | None = None) -> PreTrainedModel:
    """Rewrites `model` in place and returns it. The test draws the same random numbers as without this."""
    _counts["made"] += 1
    if melora_fx.sites(model):
        return model  # its parts are rewritten
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[]):
        if not (directory and directory.is_dir() and _loaded(model, directory)):
            _rewrite(model)
    for parameter in trainable if _State.models == "unfrozen" else ():
        parameter.requires_grad_(True)
    return model


def _rewrite(model: PreTrainedModel) -> None:
    key = type(model), tuple((name, parameter.shape) for name, parameter in model.named_parameters())
    if key not in _targets:
        _targets[key] = _find_targets(model)
    if _targets[key]:
        _fill(melora_fx.rewrite(model, _targets[key]), model.base_model_prefix)
        _counts["rewritten"] += 1


def _loaded(model: PreTrainedModel, directory: Path) -> bool:
    """Loads the adapter in `directory` and returns whether it belongs to this model. Tests also load other classes,
    shapes and weights than they have saved.
    """
    try:
        melora_fx.load_adapter(model, directory)
    except melora_fx.MELoRAError as error:
        _counts[f"not loaded: {error}".replace(str(directory), "").splitlines()[0]] += 1
        return False
    _counts["loaded"] += 1
    return True


def _find_targets(model: PreTrainedModel) -> dict[str, melora_fx.MELoRAConfig | None]:
    """Returns a configuration for each site: as many blocks as fit, at most four."""
    try:
        report = melora_fx.match(model, "all-linear", melora_fx.MELoRAConfig(num_blocks=1))
    except ValueError as error:
        _counts[f"left plain: {error}".splitlines()[0]] += 1
        return {}
    for name, reason in report.skipped:
        _counts[f"site left plain: {name}: {reason}"] += 1
    sites = sorted(report.sites, key=lambda site: -len(site.name))  # a name also matches its longer forms
    blocks = [math.gcd(site.in_features, site.out_features, MAX_BLOCKS) for site in sites]
    configs = [melora_fx.MELoRAConfig(rank=RANK, num_blocks=number, alpha=RANK) for number in blocks]
    return {site.name: config for site, config in zip(sites, configs, strict=True)}


@torch.no_grad()
def _fill(model: torch.nn.Module, base_model_prefix: str) -> None:
    """Fills each site with values that depend on its name, so that they are equal in all models that have the site."""
    for name, site in melora_fx.sites(model).items():
        name = name.removeprefix(f"{base_model_prefix}.")
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        for factor, std in ((site.lora_a, 1.0), (site.lora_b, UPDATE_STD / math.sqrt(RANK))):
            factor.copy_(torch.randn(factor.shape, generator=generator) * std)


def _count_error(error: melora_fx.MELoRAError, *args: Any) -> None:
    """Counts the library's errors by text, including those that a test catches."""
    text = re.sub(rf"{tempfile.gettempdir()}/\w+", "", " ".join(map(str, args)))
    _counts[f"refused: {' '.join(text.split())}"] += 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--models", choices=("plain", "rewritten", "unfrozen"), default=_State.models)


def pytest_configure(config: pytest.Config) -> None:
    _State.models = config.getoption("--models")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Seeds the test, including its models' inputs, and writes the counts into the JUnit file."""
    _counts.clear()
    transformers.set_seed(0)
    common = sys.modules.get("tests.test_modeling_common")
    if common:
        common.global_rng.seed(0)
    try:
        return (yield)
    finally:
        item.user_properties += [(name, str(number)) for name, number in sorted(_counts.items())]


_own_init_subclass = PreTrainedModel.__init_subclass__.__func__
_own_from_pretrained = PreTrainedModel.from_pretrained.__func__
_own_save_pretrained = PreTrainedModel.save_pretrained
for _class in _subclasses(PreTrainedModel):  # classes that are already imported
    _wrap_init(_class)
PreTrainedModel.__init_subclass__ = classmethod(_init_subclass)
PreTrainedModel.from_pretrained = classmethod(_from_pretrained)
PreTrainedModel.save_pretrained = _save_pretrained
melora_fx.MELoRAError.__init__ = _count_error
