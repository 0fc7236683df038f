"""Model repositories: their files, which Triton's own schema accepts and whose graph ONNX Runtime runs."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.exports import Exports, copy_graph
from support.models import tokens

from exporters import OrtRunner, write_triton_repository
from melora_fx import MELoRAError

SHAPES = {"batch": (1, 8, 32), "sequence": (4, 8, 16)}
BATCH = {"batch": (1, 8, 32)}


def parse(path: Path) -> Any:
    """Parses config.pbtxt with NVIDIA's schema; loads only the schema's file, because its package would need grpc."""
    spec = importlib.util.find_spec("tritonclient")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip('Triton\'s schema is not installed: pip install "melora_fx[test]"')
    from google.protobuf import text_format

    file = Path(spec.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    schema = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert schema is not None
    assert schema.loader is not None
    module = importlib.util.module_from_spec(schema)
    schema.loader.exec_module(module)
    return text_format.Parse(path.read_text(), module.ModelConfig())


def write_graph(path: Path, text: str, dtype: type = np.float32) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]>\n{text}')
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((8, 4), dtype), "w"))
    onnx.save(model, path, save_as_external_data=True, location=f"{path.stem}.bin", size_threshold=0)
    return path


PLAIN = "g (float[batch, 8] x) => (float[batch, 4] y) { y = MatMul (x, w) }"


@pytest.fixture(scope="module")
def exported(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a tiny BERT."""
    report = exports("bare bert", target="portable", precision="fp32")
    return copy_graph(report, tmp_path_factory.mktemp("export") / "bert.onnx")


@pytest.mark.slow
def test_the_schema_takes_what_is_written(exported: Path, tmp_path: Path) -> None:
    written = write_triton_repository(
        exported, tmp_path, shapes=SHAPES, max_queue_delay_us=500, preferred_batch_sizes=[8, 16], instances=2
    )
    assert written.files == ("config.pbtxt", "1/model.onnx", "1/bert.onnx.data")
    config = parse(tmp_path / "bert" / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("bert", "onnxruntime", 32)
    assert [(value.name, value.data_type, list(value.dims)) for value in config.input] == [
        ("input_ids", config.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name["TYPE_INT64"].number, [-1]),
        ("attention_mask", config.input[0].data_type, [-1]),
    ]
    assert [(value.name, list(value.dims)) for value in config.output] == [
        ("last_hidden_state", [-1, 24]),
        ("pooler_output", [24]),
    ]
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (2, config.instance_group[0].KIND_GPU)
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert accelerator.parameters["trt_profile_max_shapes"] == "input_ids:32x16,attention_mask:32x16"
    assert accelerator.parameters["trt_engine_cache_path"] == "/tmp/tensorrt-engines/bert"


def test_the_copy_computes_the_same(exported: Path, tmp_path: Path) -> None:
    write_triton_repository(exported, tmp_path, shapes=SHAPES)
    inputs = tokens(3, 7)
    copy = OrtRunner(tmp_path / "bert" / "1" / "model.onnx").run(inputs)
    for name, array in OrtRunner(exported).run(inputs).items():
        np.testing.assert_array_equal(copy[name], array)


def test_half_precision_goes_under_tritons_own_name(tmp_path: Path) -> None:
    path = write_graph(
        tmp_path / "half.onnx", "g (float16[batch, 8] x) => (float16[batch, 4] y) { y = MatMul (x, w) }", np.float16
    )
    write_triton_repository(path, tmp_path / "repo", shapes=BATCH)
    config = parse(tmp_path / "repo" / "half" / "config.pbtxt")
    parameters = config.optimization.execution_accelerators.gpu_execution_accelerator[0].parameters
    assert parameters["precision_mode"] == "FP16"
    assert "trt_fp16_enable" not in parameters
    assert config.input[0].data_type == config.output[0].data_type


def test_other_providers(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "g.onnx", PLAIN)
    write_triton_repository(path, tmp_path, name="on_cpu", shapes=BATCH, provider="cpu")
    config = parse(tmp_path / "on_cpu" / "config.pbtxt")
    assert config.instance_group[0].kind == config.instance_group[0].KIND_CPU
    assert not config.HasField("optimization")
    write_triton_repository(
        path,
        tmp_path,
        name="on_cuda",
        shapes={},
        max_batch_size=4,
        provider="cuda",
        provider_options={"gpu_mem_limit": "1000000"},
    )
    config = parse(tmp_path / "on_cuda" / "config.pbtxt")
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, accelerator.parameters["gpu_mem_limit"]) == ("cuda", "1000000")
    assert config.max_batch_size == 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("g (float[2, 8] x) => (float[2, 4] y) { y = MatMul (x, w) }", "axis 0 of the inputs and outputs is not the"),
        (
            "g (float[batch, 8] x) => (float y) { h = MatMul (x, w)  y = ReduceSum <keepdims = 0> (h) }",
            "axis 0 of the inputs and outputs is not the",
        ),
        (
            "g (float[batch, 8] x) => (float[batch, batch] y)"
            " { h = MatMul (x, w)  t = Transpose (h)  y = MatMul (h, t) }",
            "`batch` also occurs in other axes of y",
        ),
    ],
    ids=["fixed", "no_batch_in_output", "rows_meet"],
)
def test_graphs_that_cannot_be_batched(text: str, reason: str, tmp_path: Path) -> None:
    path = write_graph(tmp_path / "g.onnx", text)
    shapes = BATCH if "batch" in text else {}
    written = write_triton_repository(path, tmp_path / "repo", shapes=shapes)
    assert written.max_batch_size == 0
    assert reason in written.notes[0]
    config = parse(tmp_path / "repo" / "g" / "config.pbtxt")
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [-1 if shapes else 2, 8]
    if "float y" in text:
        assert list(config.output[0].dims) == [1]
        assert config.output[0].HasField("reshape")
    with pytest.raises(ValueError, match=r"`max_batch_size` \(=4\): "):
        write_triton_repository(path, tmp_path / "other", shapes=shapes, max_batch_size=4)
    assert not (tmp_path / "other").exists()


def test_a_vector_of_the_batch_is_one_element_each(tmp_path: Path) -> None:
    text = "g (float[batch, 8] x) => (float[batch] y) <int64[1] a = {1}> { h = MatMul (x, w)"
    path = write_graph(tmp_path / "g.onnx", text + "  y = ReduceSum <keepdims = 0> (h, a) }")
    write_triton_repository(path, tmp_path / "repo", shapes=BATCH)
    (output,) = parse(tmp_path / "repo" / "g" / "config.pbtxt").output
    assert (list(output.dims), list(output.reshape.shape)) == ([1], [])


def test_a_model_that_is_there_is_kept(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "g.onnx", PLAIN)
    repository = tmp_path / "repo"
    write_triton_repository(path, repository, shapes=BATCH, provider="cuda")
    before = (repository / "g" / "config.pbtxt").read_bytes()
    with pytest.raises(MELoRAError, match="already has a version 1"):
        write_triton_repository(path, repository, shapes=BATCH, provider="cuda")
    with pytest.raises(MELoRAError, match=r"already exists with another config\.pbtxt"):
        write_triton_repository(path, repository, shapes=BATCH, provider="cpu", version=2)
    added = write_triton_repository(path, repository, shapes=BATCH, provider="cuda", version=2)
    assert added.files == ("2/model.onnx", "2/g.bin")
    assert sorted(file.name for file in (repository / "g").iterdir()) == ["1", "2", "config.pbtxt"]
    assert (repository / "g" / "config.pbtxt").read_bytes() == before
    assert [file.name for file in repository.iterdir()] == ["g"]  # no temporary folder


def test_other_weights_do_not_meet_cached_engines(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "g.onnx", PLAIN)
    repository = tmp_path / "repo"
    write_triton_repository(path, repository, shapes=BATCH)
    (tmp_path / "g.bin").write_bytes(np.zeros((8, 4), np.float32).tobytes())
    with pytest.raises(MELoRAError, match=r"another config\.pbtxt \(TensorRT's is for one graph and its weights\)"):
        write_triton_repository(path, repository, shapes=BATCH, version=2)


def test_the_name_is_the_files_or_its_folders(tmp_path: Path) -> None:
    (tmp_path / "topics").mkdir()
    path = write_graph(tmp_path / "topics" / "model.onnx", PLAIN)
    assert Path(write_triton_repository(path, tmp_path / "repo", shapes=BATCH).path).name == "topics"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../up"}, r"`name` \(='../up'\)"),
        ({"provider": "openvino"}, "'openvino'.* must be one of 'cpu', 'cuda', 'tensorrt'"),
        ({"version": 0}, r"`version` \(=0\) must be 1 or more"),
        ({"instances": 0}, r"`instances` \(=0\)"),
        ({"max_queue_delay_us": -1}, r"`max_queue_delay_us` \(=-1\)"),
        ({"max_batch_size": 33}, r"`max_batch_size` \(=33\) must be from 0 to the largest `batch`"),
        ({"preferred_batch_sizes": [64]}, r"`preferred_batch_sizes` \(=\[64\]\) must be from 1 to 32"),
        ({"shapes": {"batch": (2, 8, 32)}}, r"`batch` \(=\(2, 8, 32\)\) must start at 1"),
        ({"shapes": {}}, "no range for the axis `batch`"),
        ({"shapes": {}, "provider": "cuda"}, "pass `max_batch_size`, or a range of `batch` in `shapes`"),
        ({"provider_options": {"trt_bogus": "1"}}, "does not know trt_bogus"),
        ({"provider": "cpu", "provider_options": {"a": "1"}}, "the CPU provider has none"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_graph(tmp_path / "g.onnx", PLAIN)
    with pytest.raises(ValueError, match=message):
        write_triton_repository(path, tmp_path / "repo", **{"shapes": BATCH, **options})
    assert not (tmp_path / "repo").exists()


def test_graphs_that_triton_cannot_serve_are_refused(tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    path = write_graph(
        tmp_path / "g.onnx", "g (float[batch, 8] x, float z = {2}) => (float[batch, 8] y) { y = Mul (x, z) }"
    )
    with pytest.raises(MELoRAError, match="has optional inputs, which Triton would leave at their defaults"):
        write_triton_repository(path, repository, shapes=BATCH)
    path = write_graph(tmp_path / "g.onnx", "g (complex64[batch, 8] x) => (complex64[batch, 8] y) { y = Identity (x) }")
    with pytest.raises(MELoRAError, match="`x` is COMPLEX64, which Triton does not accept"):
        write_triton_repository(path, repository, shapes=BATCH)
    path = write_graph(tmp_path / "g.onnx", PLAIN)
    (tmp_path / "g.bin").unlink()
    with pytest.raises(MELoRAError, match=r"g\.bin` does not exist"):
        write_triton_repository(path, repository, shapes=BATCH)
    assert not repository.exists()


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "g.onnx", PLAIN)
    (tmp_path / "file").touch()
    with pytest.raises(MELoRAError, match="cannot be written"):
        write_triton_repository(path, tmp_path / "file", shapes=BATCH)


def test_a_failed_copy_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_graph(tmp_path / "g.onnx", PLAIN)
    repository = tmp_path / "repo"
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
    with pytest.raises(MELoRAError, match="No space left on device"):
        write_triton_repository(path, repository, shapes=BATCH)
    assert not repository.exists()
