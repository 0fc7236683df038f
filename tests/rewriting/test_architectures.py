"""Every architecture of docs/ARCHITECTURES.md has the properties that its row says."""

import functools

import pytest
import torch
from support.architecture_table import TABLE, counts_of, documented
from support.models import assert_equal, fill
from support.properties import measure, num_compilations, outputs, rewritten
from support.zoo import SIX, ZOO, build

GRADIENT_BOUND = 1e-9  # float64, and float32 relative to the largest output
FOLD_BOUND = 1e-5

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings(  # torch's own
        "ignore::FutureWarning", "ignore:.*lru_cache.*:UserWarning", "ignore:.*torch.jit:DeprecationWarning"
    ),
]


@pytest.mark.slow_cases(
    "BERT", "ALBERT", "DeBERTa-v2", "GPT-2", "Llama", "Gemma 3", "Falcon", "Mixtral", "T5", "ViT", "Whisper", "CLIP"
)
@pytest.mark.default_cases(
    *sorted({*SIX} - {"T5", "Mixtral", "Llama", "GPT-2", "ViT", "BERT"}), "nn.MultiheadAttention, cross", "x @ *"
)  # the others take at least seven seconds
@pytest.mark.parametrize("name", ZOO)
def test_properties(name: str) -> None:
    entry = ZOO[name]
    row = measure(name)
    in_place = entry.sites if entry.in_place is None else entry.in_place
    assert (row.in_place, row.whole, row.refused) == (in_place, entry.sites, entry.refused)
    assert row.effective == (in_place, entry.sites), "the adapter of some site changes nothing"
    assert row.starts_equal
    assert row.gradient_error <= GRADIENT_BOUND
    assert row.fold_error <= FOLD_BOUND
    assert row.restored
    assert row.exports
    assert row.graphs
    assert counts_of(row) == documented()[name], f"run: PYTHONPATH=tests python -m support.architecture_table > {TABLE}"


@pytest.mark.parametrize("name", [name for name in ZOO if name.startswith("nn.")])
def test_torchs_own_attention_in_training(name: str) -> None:
    """In training, without eval mode's fast path and without dropout, the whole capture is bit-equal too."""
    plain, inputs = build(name)
    plain.requires_grad_(False)  # torch computes a product with a strided input differently if the weight is trained
    model = rewritten(name, whole=True).train()
    assert_equal(outputs(model, inputs), outputs(plain.train(), inputs))
    fill(model)
    assert not torch.allclose(outputs(model, inputs)[0], outputs(plain, inputs)[0], atol=1e-3)


@pytest.mark.slow_cases(
    "ALBERT-in_place",
    "DeBERTa-v2-whole",
    "ModernBERT-whole",
    "MPNet-in_place",
    "Llama-in_place",
    "Qwen3-whole",
    "Gemma 3-in_place",
    "GPT-NeoX-in_place",
    "Falcon-whole",
    "Mixtral-in_place",
    "T5-whole",
    "BART-in_place",
    "Whisper-whole",
    "ViT-in_place",
    "CLIP-whole",
    "nn.*",
    "x @ *",
)
@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
@pytest.mark.parametrize("name", ZOO)
def test_compiles_like_the_plain_model(name: str, whole: bool) -> None:
    if not whole and ZOO[name].in_place == 0:
        pytest.skip("refused in place: it needs example_inputs=")
    check_compilation(name, whole, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.inductor])
def test_compiles_with_inductor(name: str) -> None:
    check_compilation(name, False, "inductor")


@functools.cache
def compilations_of_the_plain_model(name: str, backend: str) -> int:
    return num_compilations(*build(name), backend)[0]


def check_compilation(name: str, whole: bool, backend: str) -> None:
    _, inputs = build(name)
    compilations, error = num_compilations(fill(rewritten(name, whole=whole)), inputs, backend)
    assert compilations <= compilations_of_the_plain_model(name, backend)
    assert error <= 1e-4


def test_the_table_lists_every_architecture() -> None:
    assert list(documented()) == list(ZOO)
