"""`melora-fx bench`: the table, the files, and what is refused before anything is timed."""

import csv
import shutil
from pathlib import Path

import pytest
from support.command_line import Result, run
from support.exports import Exports, copy_graph


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, exports: Exports) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    copy_graph(exports("adapted bert", adapter="keep"), folder / "keep.onnx")
    shutil.copy(folder / "keep.onnx", folder / "copy.onnx")  # it uses the same data file
    copy_graph(exports("bert"), folder / "other" / "keep.onnx")
    copy_graph(exports("adapted tower", adapter="fold"), folder / "tower.onnx")
    (folder / "broken.onnx").write_bytes(b"nonsense")
    return folder


def bench(folder: Path, *arguments: object) -> Result:
    """Runs the command, with graphs named without their folder."""
    return run("bench", *(folder / word if str(word).endswith(".onnx") else word for word in arguments))


@pytest.mark.slow
def test_all_shapes_of_all_graphs(folder: Path, tmp_path: Path) -> None:
    graphs = ("keep.onnx", "copy.onnx", "other/keep.onnx")
    shapes = ("--batch", "1,2", "--sequence", 4, "--sequence", 6)
    files = ("--csv", tmp_path / "b.csv", "--plot", tmp_path / "b.png")
    result = bench(folder, *graphs, *shapes, "--rounds", 3, *files)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "b.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [f"{folder.name}/keep", "copy", "other/keep"]
    measured = [("1", "4"), ("1", "6"), ("2", "4"), ("2", "6")]
    assert [(row["batch"], row["sequence"], row["form"]) for row in rows] == [
        (*shape, name) for shape in measured for name in names
    ]
    assert {row["model"] for row in rows} == {"BertForSequenceClassification"}
    assert all(float(row["max_rel_difference"]) == 0 for row in rows[1::3]), "the copy"
    assert all(float(row["max_rel_difference"]) > 1e-2 for row in rows[2::3]), "the base"
    assert (tmp_path / "b.png").stat().st_size > 10_000
    assert result.stdout.count(" other/keep ") == 4
    assert "3 rounds, in random order" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_graph_without_sequence_has_no_such_column(folder: Path, tmp_path: Path) -> None:
    result = bench(folder, "tower.onnx", "tower.onnx", "--rounds", 2, "--csv", tmp_path / "b.csv")
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / "b.csv").read_text().splitlines()))
    assert [(row["form"], row["batch"], row["sequence"]) for row in rows] == [
        ("tower", "8", ""),
        ("tower (2)", "8", ""),
    ]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("keep.onnx", "nowhere.onnx", "gone.onnx"), "gone.onnx`: no such file"),
        (("broken.onnx",), "cannot be read as an ONNX graph"),
        (("keep.onnx", "tower.onnx"), "has other inputs than"),
        (("keep.onnx", "--batch", "0"), "`batch` (=0) must be at least 1"),
        (("keep.onnx", "--rounds", "0"), "`rounds` (=0) must be at least 1"),
        (("keep.onnx", "--threads", "0"), "`threads` (=0) must be at least 1"),
        (("keep.onnx", "--provider", "tpu"), "`provider` (='tpu') must be one of"),
        (("tower.onnx", "--sequence", "8"), "has no free sequence axis"),
        (("keep.onnx", "--csv", "/nowhere/b.csv"), "there is no folder `/nowhere`"),
        (("keep.onnx", "--plot", "plot.txt"), "must end in one of .png"),
        (
            ("keep.onnx", "other/keep.onnx", "--sequence", 4, "--max-difference", 1e-3),
            "by more than 0.001 (relative): `other/keep` by",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line(folder: Path, arguments: tuple[object, ...], text: str) -> None:
    result = bench(folder, *arguments)
    assert result.returncode == 1
    assert text in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
