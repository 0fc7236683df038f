"""`OrtRunner` returns the graph's outputs by name, with or without bound memory, and refuses what it cannot run."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from support.exports import Exports, copy_graph
from support.models import assert_equal, attempt, output_of, randn, rewritten_tower, tower

import melora_fx
from exporters import OrtRunner, export_onnx, write_ort_adapter
from exporters.runtime.providers import CPU
from melora_fx import MELoRAConfig, MELoRAError

SHAPES = {"batch": (1, 2, 8), "sequence": (2, 5, 16)}


@pytest.fixture(scope="module")
def path(exports: Exports) -> Path:
    return Path(exports("sequence tower").path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, exports: Exports) -> Path:
    """A swappable graph and two adapters for it, of ranks 2 and 1, as folders and as files."""
    folder = tmp_path_factory.mktemp("swap")
    copy_graph(exports("adapted sequence tower", adapter="swap"), folder / "swap.onnx")
    for rank in (2, 1):
        melora_fx.save_adapter(rewritten_tower(config=MELoRAConfig(rank, 3)), folder / f"rank{rank}")
        write_ort_adapter(folder / f"rank{rank}", folder / "swap.onnx", folder / f"rank{rank}.onnx_adapter")
    return folder


def test_it_takes_arrays_and_tensors(path: Path) -> None:
    runner = OrtRunner(path, threads=1)
    x = randn(3, 5, 24)
    assert runner.threads == 1
    first, *others = (runner.run({"x": value})["output"] for value in (x, x.numpy(), x.clone().requires_grad_()))
    for other in others:
        assert_equal(other, first)
    np.testing.assert_allclose(runner.run({"x": x})["output"], output_of(tower(), x).numpy(), rtol=1e-5, atol=1e-5)


def test_unknown_provider(path: Path) -> None:
    with pytest.raises(ValueError, match="`provider` \\(='npu'\\) must be one of 'cpu'"):
        OrtRunner(path, provider="npu")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MELoRAError, match="does not exist"):
        OrtRunner(tmp_path / "none.onnx")


@pytest.mark.parametrize("io_binding", [False, True], ids=["plain", "bound"])
@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({}, "missing \\['x'\\]"),
        ({"x": randn(2, 5, 24), "y": randn(1)}, "unknown \\['y'\\]"),
        ({"x": randn(2, 5, 7)}, "ONNX Runtime cannot run .*Got: 7 Expected: 24"),
        ({"x": randn(2, 5, 24).double()}, "ONNX Runtime cannot run .*double"),
        ({"x": randn(24)}, "ONNX Runtime cannot run .*rank"),
        ({"x": None}, "ONNX Runtime cannot run"),
    ],
    ids=["missing", "unknown", "size", "type", "rank", "none"],
)
def test_inputs_are_checked(path: Path, inputs: dict[str, torch.Tensor | None], text: str, io_binding: bool) -> None:
    runner = OrtRunner(path, io_binding=io_binding)
    with pytest.raises(MELoRAError, match=f"(?s){text}"):
        runner.run(inputs)


def test_sizes_outside_of_shapes_are_refused(path: Path) -> None:
    runner = OrtRunner(path, shapes=SHAPES)
    assert runner.run({"x": randn(8, 2, 24)})["output"].shape == (8, 2, 6)
    with pytest.raises(MELoRAError, match="`batch` of x is 9, `shapes` says 1 to 8; `sequence` of x is 1"):
        runner.run({"x": randn(9, 1, 24)})


def test_a_range_of_one_size_fixes_the_axis(path: Path) -> None:
    runner = OrtRunner(path, shapes={"batch": (2, 2, 2)})
    assert runner.session.get_inputs()[0].shape == [2, "sequence", 24]
    x = randn(2, 5, 24)
    assert_equal(runner.run({"x": x})["output"], OrtRunner(path).run({"x": x})["output"])
    with pytest.raises(MELoRAError, match="`batch` of x is 3, `shapes` says 2 to 2"):
        runner.run({"x": randn(3, 5, 24)})


@pytest.mark.parametrize(
    "x", [randn(2, 5, 24), randn(1, 3, 24), randn(24, 5, 2).permute(2, 1, 0)], ids=["example", "other", "strided"]
)
def test_bound_memory_changes_no_bit(path: Path, x: torch.Tensor) -> None:
    assert_equal(OrtRunner(path, io_binding=True).run({"x": x}), OrtRunner(path).run({"x": x}))


def test_inputs_and_outputs_stay_on_the_device(path: Path) -> None:
    runner = OrtRunner(path, io_binding=True)
    x = randn(2, 5, 24)
    values = runner.to_device({"x": x})
    outputs = runner.run_on_device(values)
    assert outputs["output"].device_name() == "cpu"
    assert_equal(outputs["output"].numpy(), runner.run({"x": x})["output"])
    with pytest.raises(MELoRAError, match="missing \\['x'\\]"):
        runner.run_on_device({})


@pytest.mark.parametrize("name", ["rank2", "rank1", "rank2.onnx_adapter", "rank1.onnx_adapter"])
def test_bound_adapters_are_the_active_ones_to_the_bit(folder: Path, name: str) -> None:
    """ONNX Runtime's binding ignores an active adapter: it would return the base's output."""
    plain, bound = (OrtRunner(folder / "swap.onnx", io_binding=io_binding) for io_binding in (False, True))
    x = {"x": randn(3, 4, 24)}
    expected = plain.run(x, adapter=folder / name)["output"]
    assert_equal(bound.run(x, adapter=folder / name)["output"], expected)
    assert_equal(bound.run_on_device(bound.to_device(x), folder / name)["output"].numpy(), expected)
    assert_equal(bound.run(x)["output"], plain.run(x)["output"])
    assert np.abs(expected - plain.run(x)["output"]).max() > 0.1


def test_given_tensors_are_bound_too(folder: Path) -> None:
    plain, bound = (OrtRunner(folder / "swap.onnx", io_binding=io_binding) for io_binding in (False, True))
    x = {"x": randn(3, 4, 24)}
    expected = plain.run(x, adapter=folder / "rank2")
    tensors = plain._load(folder / "rank2").tensors
    assert_equal(plain.with_tensors(tensors).run(x), expected)
    assert_equal(bound.with_tensors(tensors).run(x), expected)


def test_bound_runs_from_four_threads_each_get_their_adapter(folder: Path) -> None:
    runner = OrtRunner(folder / "swap.onnx", threads=1, io_binding=True)
    names = [folder / f"rank{rank}{suffix}" for rank in (2, 1) for suffix in ("", ".onnx_adapter")]
    inputs = [{"x": randn(1 + index, 3, 24, seed=index)} for index in range(4)]
    expected = [[runner.run(x, adapter=name)["output"] for name in names] for x in inputs]
    wrong: list[tuple[int, int]] = []

    def work(thread: int) -> None:
        for step in range(250):
            adapter = (thread + step) % len(names)
            output = runner.run(inputs[thread], adapter=names[adapter])["output"]
            if not np.array_equal(output, expected[thread][adapter]):
                wrong.append((thread, step))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", [list, tuple])
def test_two_active_adapters_are_refused(folder: Path, kind: type) -> None:
    runner = OrtRunner(folder / "swap.onnx")
    with pytest.raises(ValueError, match="must be one adapter: a run computes one"):
        runner.run({"x": randn(2, 5, 24)}, adapter=kind([folder / "rank1.onnx_adapter", folder / "rank2.onnx_adapter"]))


def test_an_adapter_that_has_been_read_needs_its_files_no_more(folder: Path, tmp_path: Path) -> None:
    x = {"x": randn(2, 5, 24)}
    for io_binding in (False, True):
        runner = OrtRunner(folder / "swap.onnx", io_binding=io_binding)
        for name in ("rank2", "rank1.onnx_adapter"):
            adapter = tmp_path / name
            (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name, adapter)
            before = runner.run(x, adapter=adapter)
            shutil.rmtree(adapter) if adapter.is_dir() else adapter.unlink()
            assert_equal(runner.run(x, adapter=adapter), before)


def test_a_damaged_adapter_file_is_one_error(folder: Path, tmp_path: Path) -> None:
    """ONNX Runtime maps it into memory: no damage may crash the process."""
    whole = (folder / "rank2.onnx_adapter").read_bytes()
    runner = OrtRunner(folder / "swap.onnx", threads=1)
    refused = 0
    for step in range(40):
        data = bytearray(whole[: len(whole) * (step + 1) // 21])
        data[(step * 97) % min(len(data), 400)] ^= 0x55
        path = tmp_path / f"{step}.onnx_adapter"
        path.write_bytes(data)
        refused += attempt(runner.run, {"x": randn(2, 5, 24)}, adapter=path)[1] != ""
    assert refused >= 20


def write_adapter_file(path: Path, tensors: dict[str, np.ndarray], like: Path) -> None:
    """Writes an .onnx_adapter file that claims to be for the base of the file `like`."""
    import onnxruntime as ort

    adapter_format = ort.AdapterFormat()
    adapter_format.set_model_version(ort.AdapterFormat.read_adapter(str(like)).get_model_version())
    adapter_format.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()})
    adapter_format.export_adapter(str(path))


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"up.lora_a": (3, 7, 2)}, r"`up.lora_a` has the shape \(3, 7, 2\), the graph's is \(3, 8, rank_0\)"),
        ({"up.lora_a": (3, 8)}, r"`up.lora_a` has the shape \(3, 8\)"),
        ({"up.lora_a": (3, 8, 2), "up.lora_b": (3, 1, 12)}, r"`up.lora_[ab]` has the shape"),
        ({"down.lora_a": (3, 8, 2)}, r"has no inputs \['down.lora_a'\]"),
    ],
    ids=["size", "axes", "ranks", "name"],
)
def test_adapter_files_of_another_graph_are_refused(
    folder: Path, tmp_path: Path, tensors: dict[str, tuple[int, ...]], text: str
) -> None:
    arrays = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    write_adapter_file(tmp_path / "a.onnx_adapter", arrays, folder / "rank2.onnx_adapter")
    for io_binding in (False, True):
        with pytest.raises(MELoRAError, match=f"is for another graph.*{text}"):
            OrtRunner(folder / "swap.onnx", io_binding=io_binding).run(
                {"x": randn(2, 5, 24)}, adapter=tmp_path / "a.onnx_adapter"
            )


@pytest.mark.slow
def test_an_adapter_file_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    """Names and shapes are equal, the base's values are not."""
    other = rewritten_tower(seed=1)
    export_onnx(other, (randn(2, 5, 24),), tmp_path / "swap.onnx", adapter="swap", verify=False)
    with pytest.raises(MELoRAError, match="is for another graph or base"):
        OrtRunner(tmp_path / "swap.onnx").run({"x": randn(2, 5, 24)}, adapter=folder / "rank2.onnx_adapter")


def test_swappable_adapters_are_not_for_tensorrt(folder: Path) -> None:
    with pytest.raises(MELoRAError, match=r'\(swappable adapters\), which TensorRT .*`adapter="fold"`'):
        OrtRunner(folder / "swap.onnx", provider="tensorrt")


@pytest.mark.parametrize("io_binding", [False, True], ids=["plain", "bound"])
def test_what_is_chosen_can_be_read(path: Path, io_binding: bool) -> None:
    facts = OrtRunner(path, threads=1, shapes=SHAPES | {"batch": (2, 2, 2)}, io_binding=io_binding).describe()
    assert json.loads(json.dumps(facts)) == facts
    nodes = facts.pop("nodes")
    assert set(nodes) == {CPU}
    assert nodes[CPU] > 5
    assert facts.pop("onnxruntime")
    assert facts == {
        "graph": str(path),
        "provider": "cpu",
        "providers": [CPU],
        "provider_options": {CPU: {}},
        "threads": 1,
        "device": "cpu",
        "io_binding": io_binding,
        "cuda_graph": False,
        "fixed_axes": {"batch": 2},
        "session_config": {},
        "shapes": {"batch": [2, 2, 2], "sequence": [2, 5, 16]},
        "assumed": ["x.shape[0] > 0", "x.shape[1] > 0"],
    }
