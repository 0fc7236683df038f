"""Forms of an unmerged update: the same numbers from another graph, and the rule that chooses a form."""

from pathlib import Path

import numpy as np
import pytest
from support.exports import CONFIG, Exports
from support.models import bert_classifier, fill, output_of, randn, rewritten_tower, tokens, tower

import melora_fx
from exporters import OrtRunner, export_onnx
from exporters.graph.forms import choose_form
from melora_fx import MELoRAConfig


@pytest.mark.parametrize(
    ("num_blocks", "rank", "tokens", "form"),
    [
        (8, 8, 512, "block"),
        (8, 2, 512, "dense"),
        (8, 4, 512, "block"),
        (8, 4, 16, "dense"),
        (1, 64, 512, "dense"),
    ],
)
def test_the_rule(num_blocks: int, rank: int, tokens: int, form: str) -> None:
    assert choose_form(num_blocks, rank, tokens) == form


@pytest.mark.slow_cases("portable-block", "ort-cpu-dense")
@pytest.mark.parametrize("form", ["block", "dense"])
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_both_forms_compute_the_model(form: str, target: str, tmp_path: Path) -> None:
    config = MELoRAConfig(rank=(1, 2, 3), num_blocks=3, alpha=(1.0, 2.0, 5.0))
    model = fill(melora_fx.rewrite(bert_classifier(num_layers=1), "all-linear", config))
    report = export_onnx(model, tokens(), tmp_path, adapter="keep", target=target, form=form)
    assert report.forms == {form: 7}
    assert report.max_rel_error is not None
    assert report.max_rel_error <= 1e-5
    dense = {"block": 0, "dense": 2 * 7}[form]
    if target == "portable":  # fusions pack some of them side by side
        assert initializer_names(tmp_path / "model.onnx").count("blockdiag") == dense


@pytest.mark.slow
def test_dense_needs_two_products_and_a_sum_a_site(exports: Exports, tmp_path: Path) -> None:
    base = exports("bert").op_counts
    model = fill(melora_fx.rewrite(bert_classifier(num_layers=1), ["query", "value"], CONFIG))
    dense = export_onnx(model, tokens(), tmp_path / "dense.onnx", adapter="keep", form="dense", verify=False).op_counts
    assert {name: dense[name] - base.get(name, 0) for name in dense if dense[name] != base.get(name)} == {
        "MatMul": 2 * 2,
        "Add": 2,
    }


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_a_zero_update_is_the_base_bit_for_bit_as_onnx_runtime_optimises_it(
    target: str, exports: Exports, tmp_path: Path
) -> None:
    """Biases stay in the fused operators; otherwise these would round in another order."""
    base = exports("bert", target=target)
    model = melora_fx.rewrite(bert_classifier(num_layers=1), "all-linear", CONFIG)
    unmerged = export_onnx(model, tokens(), tmp_path, adapter="swap", target=target, verify=False)
    for name in ("BiasGelu", "SkipLayerNormalization"):
        assert unmerged.op_counts.get(name) == base.op_counts.get(name)
    expected, actual = (OrtRunner(report.path).run(tokens())["logits"] for report in (base, unmerged))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
def test_inputs_of_two_dimensions(tmp_path: Path) -> None:
    model = rewritten_tower()
    report = export_onnx(model, {"x": randn(3, 24)}, tmp_path, adapter="keep", form="dense")
    assert report.forms == {"dense": 5}
    actual = OrtRunner(tmp_path / "model.onnx").run({"x": randn(5, 24)})["output"]
    np.testing.assert_allclose(actual, output_of(model, randn(5, 24)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_parts_of_packed_projections_stay_blocks(tmp_path: Path) -> None:
    config = {"conv": MELoRAConfig(rank=2, num_blocks=3, split=2), "up": MELoRAConfig(rank=2, num_blocks=3)}
    model = fill(melora_fx.rewrite(tower(), config))
    report = export_onnx(model, {"x": randn(2, 24)}, tmp_path, adapter="keep", form="dense")
    assert report.forms == {"block": 1, "dense": 1}


def initializer_names(path: Path) -> str:
    import onnx

    return " ".join(item.name for item in onnx.load(path, load_external_data=False).graph.initializer)
