"""Reading a .onnx file from outside: what is not a graph, and weights that are elsewhere, missing or cut off."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from exporters.onnx_file import axes_by_name, data_files, hash_content, read_onnx, required_inputs
from melora_fx import MELoRAError


def write_graph(path: Path, location: str = "weights.bin", value: float = 1.0) -> onnx.ModelProto:
    """A product with a weight kept in another file; IO axes named, sized and unnamed."""
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[batch, 8] x, float z = {2}) => (float[batch, ?] y)'
        "{ h = MatMul (x, w)  y = Mul (h, z) }"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full((8, 4), value, np.float32), "w"))
    path.with_name("weights.bin").unlink(missing_ok=True)  # it would be appended to
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    if location != "weights.bin":
        moved = onnx.load(path, load_external_data=False)
        for tensor in moved.graph.initializer:
            for entry in tensor.external_data:
                entry.value = location if entry.key == "location" else entry.value
        onnx.save(moved, path)
    return onnx.load(path, load_external_data=False)


def test_axes_and_inputs(tmp_path: Path) -> None:
    model = write_graph(tmp_path / "g.onnx")
    assert axes_by_name(model.graph.output) == {"y": ("batch", "?")}
    assert axes_by_name(required_inputs(model)) == {"x": ("batch", 8)}


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MELoRAError, match=r"`.*absent\.onnx` cannot be read: No such file"):
        read_onnx(tmp_path / "absent.onnx")
    with pytest.raises(MELoRAError, match="cannot be read: Is a directory"):
        read_onnx(tmp_path)
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(MELoRAError, match="is not an ONNX graph"):
        read_onnx(tmp_path / "text.onnx")
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(MELoRAError, match="is not an ONNX graph: it has no outputs"):
        read_onnx(tmp_path / "empty.onnx")


def test_weight_files_are_found_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    model = write_graph(path)
    assert data_files(path, model) == {"weights.bin": (tmp_path / "weights.bin").resolve()}
    data = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(data[:-1])
    with pytest.raises(MELoRAError, match=rf"is cut off: {len(data) - 1} bytes, the graph refers to {len(data)}"):
        data_files(path, model)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(MELoRAError, match=r"has its weights in `weights\.bin`, which is not beside it"):
        data_files(path, model)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname"])
def test_weight_files_outside_of_the_folder_are_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "g.onnx"
    model = write_graph(path, location)
    with pytest.raises(MELoRAError, match="refers to weights outside of its folder"):
        data_files(path, model)


def test_the_hash_is_of_the_weights_too(tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    hashes = [hash_content(path, write_graph(path, value=value)) for value in (1.0, 1.0, 2.0)]
    assert hashes[0] == hashes[1] != hashes[2]
