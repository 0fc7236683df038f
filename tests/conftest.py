"""Fixtures: tiny random models, captures that are built once and copied, and graphs exported once per run."""

import fnmatch
import gc
import os
from collections import Counter

import pytest
import rich.style  # noqa: F401 (its first import draws one of Python's random numbers)
import support.cores  # before torch
import support.interpreter  # noqa: F401 (before the imports of triton)
import torch
import transformers
from hypothesis import settings
from support.cases import _CASES, Case
from support.exports import Exports
from support.situation_table import Collector

transformers.logging.set_verbosity_error()
settings.register_profile("suite", deadline=None, database=None, max_examples=40, derandomize=True)
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Collector(), "situations")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the cases of a parametrized test: those of its `default_cases` not at all, those of its `slow_cases` slow,
    and the rest full, or slow if it has no `slow_cases`. Raises an error for a pattern that matches no case.
    """
    num_cases: Counter[tuple[str, str, str]] = Counter()

    def is_among(item: pytest.Item, name: str) -> bool | None:
        marker = item.get_closest_marker(name)
        if marker is None:
            return None
        test = item.nodeid.partition("[")[0]
        hits = {pattern: fnmatch.fnmatchcase(item.callspec.id, pattern) for pattern in marker.args}
        num_cases.update({(test, name, pattern): int(hit) for pattern, hit in hits.items()})
        return any(hits.values())

    for item in items:
        by_default, slowly = is_among(item, "default_cases"), is_among(item, "slow_cases")
        if not by_default and (by_default, slowly) != (None, None):
            item.add_marker(pytest.mark.full if slowly is False else pytest.mark.slow)
    unmatched = sorted(key for key, number in num_cases.items() if number == 0)
    if unmatched and not any("::" in argument for argument in config.args):  # such an argument may select a few cases
        lines = [f"{test}: `{name}` {pattern!r}" for test, name, pattern in unmatched]
        raise pytest.UsageError("patterns that match no case:\n" + "\n".join(lines))


def pytest_collection_finish() -> None:
    """Exempts imported objects from garbage collection: a second in each full collection, and a Trainer runs many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo():
    """Clears compiled code, so that none counts in another test; files that compile use it in all of their tests."""
    yield
    torch._dynamo.reset()


@pytest.fixture
def fresh_accelerator():
    """Resets accelerate's process-wide state before and after a test."""
    from accelerate.state import AcceleratorState  # takes a second to import, so only here

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=list(_CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Each of three models in each of two captures, copied for each test."""
    return Case(request.param)


@pytest.fixture(params=["tower-in_place", "tower-whole"])
def tower_case(request: pytest.FixtureRequest) -> Case:
    """The hand-written model in both captures."""
    return Case(request.param)


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Graphs that are exported once; pytest-xdist's workers share them."""
    folder = tmp_path_factory.getbasetemp()
    return Exports((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "exports")
