"""The report: verdict, notes, profile, command and options."""

import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.exports import Exports

from exporters import check_tensorrt
from melora_fx import MELoRAError

SHAPES = {"batch": (1, 8, 32), "sequence": (4, 8, 16)}


def write_graph(path: Path, text: str, dtype: type = np.float32) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]>\n{text}')
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((8, 4), dtype), "w"))
    onnx.save(model, path)
    return path


PLAIN = "g (float[batch, 8] x) => (float[batch, 4] y) { y = MatMul (x, w) }"


@pytest.fixture(scope="module")
def exported(exports: Exports) -> Path:
    """A merged export of a tiny BERT."""
    return Path(exports("adapted bert", adapter="fold").path)


def test_an_export_builds_and_the_report_says_how(exported: Path) -> None:
    report = check_tensorrt(exported, shapes=SHAPES)
    assert report.ok, str(report)
    assert report.profile == {
        "min": "input_ids:1x4,attention_mask:1x4",
        "opt": "input_ids:8x8,attention_mask:8x8",
        "max": "input_ids:32x16,attention_mask:32x16",
    }
    assert report.trtexec[0] == "trtexec"
    assert {
        f"--onnx={exported}",
        "--minShapes=input_ids:1x4,attention_mask:1x4",
        "--optShapes=input_ids:8x8,attention_mask:8x8",
        "--maxShapes=input_ids:32x16,attention_mask:32x16",
        f"--saveEngine={exported.with_suffix('.plan')}",
        "--stronglyTyped",
    } <= {*report.trtexec}
    assert report.provider_options["trt_profile_opt_shapes"] == report.profile["opt"]
    assert any(note.startswith("INT64 (input_ids, attention_mask): a type of TensorRT 10") for note in report.notes)


def test_the_report_prints_well_and_its_command_can_be_pasted(exported: Path) -> None:
    text = str(check_tensorrt(exported, shapes=SHAPES))
    assert "TensorRT builds all of it, per onnx-tensorrt's operator table for TensorRT 10.15 (2026-02-02)" in text
    lines = text.replace(str(exported.parent), "").splitlines()
    assert max(map(len, lines)) <= 100
    command = text[text.index("trtexec \\") : text.index("\n\n  TensorrtExecutionProvider")]
    assert tuple(shlex.split(command.replace("\\\n", ""))) == check_tensorrt(exported, shapes=SHAPES).trtexec


def test_obstacles_are_grouped_in_print_and_single_in_the_report(tmp_path: Path) -> None:
    text = "g (float[batch, 8] x) => (float[batch, 4] y) { a = MatMul (x, w)  b = Det (a)  c = Det (a)  d = Det (a)"
    path = write_graph(tmp_path / "bad.onnx", text + "  y = Add (a, b) }")
    report = check_tensorrt(path, shapes={"batch": (1, 2, 3)})
    assert [obstacle.node for obstacle in report.obstacles] == ["Det 1", "Det 2", "Det 3"]
    assert not report.ok
    assert "TensorRT would not build all of it" in str(report)
    assert "no    Det `Det 1`, `Det 2` and 1 more: not among the operators of" in str(report)


def test_half_precision_is_seen_in_the_weights(tmp_path: Path) -> None:
    path = write_graph(
        tmp_path / "half.onnx", "g (float16[batch, 8] x) => (float16[batch, 4] y) { y = MatMul (x, w) }", np.float16
    )
    report = check_tensorrt(path, shapes={"batch": (1, 2, 3)})
    assert report.ok
    assert report.provider_options["trt_fp16_enable"] == "True"
    assert any(note.startswith("float16:") for note in report.notes)
    assert "--fp16" not in report.trtexec


def test_bool_inputs_and_unchecked_restrictions_are_noted(tmp_path: Path) -> None:
    path = write_graph(
        tmp_path / "if.onnx",
        "g (bool keep, float[batch, 8] x) => (float[batch, 4] y) { m = MatMul (x, w)  y = If (keep) <"
        "then_branch = t () => (float[batch, 4] a) { a = Identity (m) },"
        "else_branch = e () => (float[batch, 4] b) { b = Neg (m) }> }",
    )
    notes = check_tensorrt(path, shapes={"batch": (1, 2, 3)}).notes
    assert any(note.startswith("BOOL (keep)") for note in notes)
    assert any(note.startswith("If: both branches must return") for note in notes)


def test_fixed_shapes_need_no_profile(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "fixed.onnx", "g (float[2, 8] x) => (float[2, 4] y) { y = MatMul (x, w) }")
    report = check_tensorrt(path, shapes={})
    assert report.profile == {}
    assert not any("Shapes=" in argument for argument in report.trtexec)


def test_engines_of_other_weights_are_cached_apart(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "g.onnx", PLAIN)
    before = check_tensorrt(path, shapes={"batch": (1, 2, 3)}).provider_options["trt_engine_cache_prefix"]
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.zeros((8, 4), np.float32), "w"))
    onnx.save(model, path)
    assert check_tensorrt(path, shapes={"batch": (1, 2, 3)}).provider_options["trt_engine_cache_prefix"] != before


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "no range for the axis `batch` of x"),
        ({"batch": (1, 2, 3), "sequence": (1, 2, 3)}, "no input has an axis `sequence`: the dynamic axes are batch"),
        ({"batch": (3, 2, 1)}, r"`batch` \(=\(3, 2, 1\)\) must be"),
    ],
    ids=["missing", "unknown", "order"],
)
def test_shapes_that_do_not_fit_are_refused(
    shapes: dict[str, tuple[int, int, int]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        check_tensorrt(write_graph(tmp_path / "g.onnx", PLAIN), shapes=shapes)


def test_files_that_cannot_be_checked_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MELoRAError, match="it does not exist"):
        check_tensorrt(tmp_path / "absent.onnx", shapes={})
    path = write_graph(tmp_path / "g.onnx", "g (float[?, 8] x) => (float[?, 4] y) { y = MatMul (x, w) }")
    with pytest.raises(MELoRAError, match="x has a dynamic axis without a name"):
        check_tensorrt(path, shapes={})
