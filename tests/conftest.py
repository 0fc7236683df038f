"""Fixtures: tiny random models, whole-graph captures that are made once and copied, and graphs made once a run."""

import os

import pytest
import torch
import transformers
from hypothesis import settings
from support.cases import _CASES, Case
from support.exports import Exports

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
settings.register_profile("suite", deadline=None, database=None, max_examples=40, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """No compiled code of one test counts in another."""
    yield
    torch._dynamo.reset()


@pytest.fixture(params=list(_CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Each of three models in each of two captures, a copy of its own for each test."""
    return Case(request.param)


@pytest.fixture(params=["tower-in_place", "tower-whole"])
def tower_case(request: pytest.FixtureRequest) -> Case:
    """The hand-written model in both captures."""
    return Case(request.param)


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Graphs that were exported once; pytest-xdist's workers share them."""
    folder = tmp_path_factory.getbasetemp()
    return Exports((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "exports")
