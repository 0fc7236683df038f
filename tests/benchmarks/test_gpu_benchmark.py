"""`python -m benchmarks gpu`: its parts, finished and repeated cases, lost processes, the report."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import train_step
from benchmarks.__main__ import main
from benchmarks.common.checkout import DONE, FAILED, LEFT_OUT, MISUSED, ROOT
from benchmarks.gpu import correct, fold, latency, rows, schedule, sessions, train
from benchmarks.gpu.cells import Cell, run_cells
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.rows import append, read
from benchmarks.gpu.worker import NOT_BEGUN

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT reads it
    pytest.mark.filterwarnings("ignore:.*nmerged:UserWarning"),  # PEFT's, about unmerged adapters
]
MEASURING = {"sessions": sessions, "train": train, "latency": latency, "fold": fold}


def make_recorder(folder: Path, part: str = "fold", **options: Any) -> Recorder:
    return Recorder(part, folder, time.time() + 1000, dry=True, **options)


def names_of(part: str) -> list[str]:
    return [cell.name for cell in MEASURING[part].cells()]


def test_every_part_has_its_module_and_its_cells() -> None:
    assert [part.name for part in PARTS] == ["correct", *MEASURING]
    assert all(callable(part.run) for part in PARTS)
    for name, module in MEASURING.items():
        cells = module.cells()
        assert len({cell.name for cell in cells}) == len(cells) > 0, name
        assert all(0 < cell.seconds < 8 * 60 for cell in cells), "each fits into one command of ten minutes"
    assert all((ROOT / path).exists() for path in correct.TESTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_device_it_says_so(tmp_path: Path, capsys) -> None:
    assert main(["gpu", "--out", str(tmp_path)]) == LEFT_OUT
    assert "no CUDA device: pass --dry-run to build every case on the CPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--part", "all"], ["--minutes", "soon"]], ids=str)
def test_arguments_that_are_none(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        main(["gpu", *arguments])
    assert "error: argument" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_what_graphs_lack_here_is_named() -> None:
    cells = [cell for module in (sessions, latency) for cell in module.cells()]
    lacking = [cell for cell in cells if cell.lacks_to_run]
    assert {("cuda" in cell.name, "tensorrt" in cell.name) for cell in lacking} == {(True, False), (False, True)}
    assert all("pip install" in cell.lacks_to_run for cell in lacking)
    assert not any(cell.lacks_to_run for cell in cells if "torch " in cell.name)
    assert not any(cell.lacks for cell in cells), "this environment can make the graphs"


def test_what_a_dry_run_does_without(tmp_path: Path) -> None:
    nothing: list[dict[str, Any]] = []
    cells = [Cell("a", 1, lambda dry: nothing, "this", ""), Cell("b", 1, lambda dry: nothing, "", "that")]
    for dry, outcomes in ((True, [rows.LACKING, rows.PASSED]), (False, [rows.LACKING, rows.LACKING])):
        record = Recorder("fold", tmp_path / str(dry), time.time() + 99, dry=dry)
        record.folder.mkdir()
        run_cells(cells, record)
        assert [line["outcome"] for line in rows.latest(read(record.path)).values()] == outcomes


def test_a_part_that_lacks_a_package_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    absent = PARTS[0].needs[0]._replace(is_there=lambda cache: False)
    monkeypatch.setattr(schedule, "PARTS", (PARTS[4]._replace(needs=(absent,)),))
    assert main(["gpu", "--dry-run", "--out", str(tmp_path)]) == LEFT_OUT
    assert "left out: pytest is missing: pip install pytest" in capsys.readouterr().out
    assert "left out" in (tmp_path / "log.txt").read_text()


def test_a_side_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, setting: Any) -> None:
        raise OSError("no memory")

    monkeypatch.setitem(train_step.make_side.__globals__["SIDES"], "ours", broken)
    (cell,) = [
        cell for cell in train.cells() if cell.name.startswith("Llama-shaped, 1B, eager") and "Triton" not in cell.name
    ]
    record = make_recorder(tmp_path, "train")
    run_cells([cell], record)
    line = read(record.path)[-1]
    assert (line["outcome"], line["reason"]) == (rows.FAILED, "ours: OSError: no memory")
    assert [side["side"] for side in line["sides"]] == [side for side in train.SIDES if side != "ours"] + ["ours"]
    assert all(side["parameters"] for side in line["sides"][1:-1])


def test_lines_that_were_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "fold.jsonl"
    assert read(path) == []
    append(path, {"case": "a"})
    path.write_text(path.read_text() + '{"case": "b", "outc')
    append(path, {"case": "é"})
    assert [line["case"] for line in read(path)] == ["a", "é"]
    path.write_bytes(path.read_bytes() + b'[1]\nnull\n{"other": 1}\n\xff\n')
    append(path, {"case": "of\u2028two lines"})
    assert [line["case"] for line in read(path)] == ["a", "é", "of\u2028two lines"], (
        "lines that are not ours are left out"
    )


def test_what_is_named_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "file").touch()
    assert main(["gpu", "--dry-run", "--out", str(tmp_path / "file")]) == MISUSED
    assert f"`{tmp_path / 'file'}` cannot be written" in capsys.readouterr().err
    arguments = ["gpu", "--dry-run", "--part", "fold", "--out", str(tmp_path), "--only"]
    monkeypatch.setattr(schedule, "_work", Processes((["a"], 0), ([], 0), ([], 0)))
    assert main([*arguments, "a"]) == main([*arguments, "a"]) == DONE
    assert main([*arguments, "b"]) == MISUSED
    assert "`--only b` matches no case" in capsys.readouterr().err


def test_one_run_at_a_time_writes_into_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    arguments = ["gpu", "--dry-run", "--part", "fold", "--out", str(tmp_path)]
    statuses = []

    def work(record: Recorder, say: schedule.Say) -> int:
        statuses.append(main(arguments))
        return 0

    monkeypatch.setattr(schedule, "_work", work)
    assert main(arguments) == DONE
    assert statuses == [MISUSED]
    assert f"another run writes into `{tmp_path}`" in capsys.readouterr().err


def test_what_is_run_and_in_which_order(tmp_path: Path) -> None:
    record = make_recorder(tmp_path)
    for case, outcome in (("done", rows.PASSED), ("no", rows.SKIPPED), ("bad", rows.FAILED), ("lacks", rows.LACKING)):
        assert record.begins(case)
        record.ends(case, outcome)
    record.begins("lost")
    cases = ["bad", "lost", "done", "new", "no", "lacks"]
    assert record.in_order(cases) == ["new", "bad", "lost", "lacks"], "cases that were tried come last"
    assert make_recorder(tmp_path, again=True).in_order(cases) == cases
    assert make_recorder(tmp_path, only="ne").in_order(cases) == ["new"]
    assert make_recorder(tmp_path, again=True, tried=["bad", "new"]).in_order(cases) == ["lost", "done", "no", "lacks"]
    line = read(record.path)[-1]
    assert {"device", "driver", "versions", "commit", "source", "time"} <= set(line)
    append(record.path, line | {"case": "done", "outcome": rows.PASSED, "source": "of other code"})
    assert "done" in record.in_order(cases)


def test_no_case_begins_without_time_for_it(tmp_path: Path, capsys) -> None:
    record = Recorder("fold", tmp_path, time.time() + 30, dry=True)
    assert not record.begins("long", 40)
    assert record.begins("short", 20)
    assert record.num_not_begun == 1
    assert "long: not begun, takes about 40 s" in capsys.readouterr().out
    assert Recorder.from_json(record.to_json()) == record


class Processes:
    """Replaces a part's processes: each begins the cases of one list, ends all but perhaps the last, and exits."""

    def __init__(self, *scripts: tuple[list[str], int]) -> None:
        self.scripts = list(scripts)
        self.tried: list[list[str]] = []

    def __call__(self, record: Recorder, say: schedule.Say) -> int:
        self.tried.append(list(record.tried))
        cases, code = self.scripts.pop(0)
        for case in cases:
            append(record.path, {"case": case, "outcome": rows.BEGUN})
            if case != cases[-1] or code in (0, NOT_BEGUN):
                append(record.path, {"case": case, "outcome": rows.PASSED})
        return code


@pytest.mark.parametrize(
    ("scripts", "status", "tried"),
    [
        ([(["a", "b"], 0)], DONE, [[]]),
        ([(["a"], NOT_BEGUN), (["b"], 0)], DONE, [[], ["a"]]),
        ([(["a"], NOT_BEGUN), ([], NOT_BEGUN)], LEFT_OUT, [[], ["a"]]),
        ([(["a", "b"], -11), (["c"], 0)], FAILED, [[], ["a", "b"]]),
        ([(["a"], -11), (["b"], -9), ([], 0)], FAILED, [[], ["a"], ["a", "b"]]),
        ([([], 1)], FAILED, [[]]),
    ],
    ids=["done", "no time at first", "no time", "lost", "lost twice", "nothing begun"],
)
def test_a_lost_process_costs_its_case_alone(
    scripts: Any, status: int, tried: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = Processes(*scripts)
    monkeypatch.setattr(schedule, "_work", processes)
    assert main(["gpu", "--dry-run", "--part", "fold", "--out", str(tmp_path)]) == status
    assert processes.tried == tried
    assert processes.scripts == []
    last = rows.latest(read(tmp_path / "fold.jsonl"))
    lost = [cases[-1] for cases, code in scripts if code < 0]
    assert [case for case, line in last.items() if line["outcome"] == rows.FAILED] == lost
    assert all("its process ended with -" in last[case]["reason"] for case in lost)


def test_a_process_ends_with_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(schedule, "GRACE_S", 0)
    assert main(["gpu", "--dry-run", "--part", "fold", "--minutes", "0.005", "--out", str(tmp_path)]) == FAILED
    assert "stopped 0 s after the part's time" in capsys.readouterr().out


def test_a_case_that_its_process_was_stopped_in_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_work", Processes((["a", "b"], schedule.OUT_OF_TIME), ([], 0)))
    assert main(["gpu", "--dry-run", "--part", "fold", "--out", str(tmp_path)]) == FAILED
    assert read(tmp_path / "fold.jsonl")[-1]["reason"] == "its part's time was over"


def write_script(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["import os, subprocess, sys, time", *lines]))


def has_ended(file: Path) -> bool:
    """Returns whether the process whose number is in the file ends within half a minute."""
    end = time.time() + 30
    while time.time() < end:
        try:
            state = (Path("/proc") / file.read_text() / "stat").read_text()
        except OSError:
            return True
        if state.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_nothing_is_left_of_a_process_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that it has started keeps its output open."""
    write_script(
        tmp_path / "lost.py",
        "sleeper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])",
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(sleeper.pid))",
        "sys.stdout.buffer.write(b'no text: \\xff\\n'), sys.stdout.flush()",
        "os.kill(os.getpid(), 9)",
    )
    monkeypatch.setattr(schedule, "WORKER", [str(tmp_path / "lost.py")])
    said: list[str] = []
    start = time.time()
    assert schedule._work(make_recorder(tmp_path), said.append) == -9
    assert time.time() - start < 60
    assert said == ["no text: \ufffd"]
    assert has_ended(tmp_path / "pid")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_process_ends_when_the_command_is_killed(tmp_path: Path) -> None:
    write_script(
        tmp_path / "worker.py",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "from benchmarks.gpu.worker import end_with",
        f"open({str(tmp_path / 'new')!r}, 'w').write(str(os.getpid()))",
        f"os.replace({str(tmp_path / 'new')!r}, {str(tmp_path / 'pid')!r})",
        "end_with(os.getppid())",
    )
    write_script(
        tmp_path / "command.py",
        f"subprocess.Popen([sys.executable, {str(tmp_path / 'worker.py')!r}], start_new_session=True)",
        f"while not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.01)",
    )
    subprocess.run([sys.executable, tmp_path / "command.py"], check=True)
    assert has_ended(tmp_path / "pid")


TESTS = """
import pytest

def test_right(): pass

def test_wrong():
    assert 1 + 1 == 3, "no sum"

@pytest.mark.skip(reason="needs nothing")
def test_skipped(): pass

@pytest.fixture
def broken():
    raise OSError("no fixture")

def test_set_up(broken): pass
"""


def test_each_test_is_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_none.py").write_text("import nothing_of_this_name")
    monkeypatch.setattr(correct, "TESTS", (str(tmp_path),))
    record = make_recorder(tmp_path, "correct")
    correct.run(record)
    last = {case.rpartition("::")[2]: line for case, line in rows.latest(read(record.path)).items()}
    outcomes = {case.rpartition("/")[2]: line["outcome"] for case, line in last.items()}
    assert outcomes.pop("test_none.py") == rows.FAILED
    assert outcomes == {
        "test_right": rows.PASSED,
        "test_wrong": rows.FAILED,
        "test_skipped": rows.SKIPPED,
        "test_set_up": rows.FAILED,
    }
    assert "no sum" in last["test_wrong"]["reason"]
    assert last["test_skipped"]["reason"] == "needs nothing"
    assert "no fixture" in last["test_set_up"]["reason"]


def test_no_test_begins_without_time_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "test_late.py").write_text("def test_one(): pass\ndef test_other(): pass\n")
    monkeypatch.setattr(correct, "TESTS", (str(tmp_path),))
    record = Recorder("correct", tmp_path, time.time() + correct.SECONDS - 1)
    correct.run(record)
    assert record.num_not_begun == 2
    assert read(record.path) == []


def test_a_part_runs_dry(tmp_path: Path, capsys) -> None:
    record = make_recorder(tmp_path)
    fold.run(record)
    last = rows.latest(read(record.path))
    assert list(last) == names_of("fold")
    assert all(line["outcome"] == rows.PASSED and len(line["sides"]) == 5 for line in last.values()), last
    assert not any("median_ms" in side for line in last.values() for side in line["sides"]), "nothing is timed"
    capsys.readouterr()
    fold.run(record)
    assert capsys.readouterr().out == "", "all is done"


@pytest.mark.slow_cases("fold", "correct")
@pytest.mark.parametrize("part", [part.name for part in PARTS])
def test_everything_runs_dry(part: str, tmp_path: Path) -> None:
    """The command as it is typed: every cell of a part, its files, and their report. The tests are those of tests/cuda,
    which run here in no other way.
    """
    only = "tests/cuda" if part == "correct" else ""
    options = ["--dry-run", "--minutes", "20", "--part", part, "--only", only, "--out", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == DONE, result.stdout[-4000:]
    last = rows.latest(read(tmp_path / f"{part}.jsonl"))
    outcomes = {case: line["outcome"] for case, line in last.items()}
    if part == "correct":
        assert len(outcomes) > 50
        assert set(outcomes.values()) <= {rows.PASSED, rows.SKIPPED}
    else:
        assert outcomes == dict.fromkeys(names_of(part), rows.PASSED)
    assert {file.name for file in tmp_path.iterdir()} == {"log.txt", f"{part}.jsonl"}
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2**20
    assert main(["gpu", "--report", str(tmp_path), "--out", str(tmp_path / "report")]) == DONE
    assert "a dry run: nothing is timed" in (tmp_path / "report" / "gpu.md").read_text()


TIMES = {"median_ms": 2.0, "p20_ms": 1.5, "p80_ms": 2.5, "ratio": 1.0, "reference": "frozen", "rounds": 9}
ORIGIN = {
    "settings": "",
    "source": "0123456789ab",
    "device": "NVIDIA H100 80GB HBM3, 79 GiB, compute capability 9.0",
    "driver": "580.1, CUDA 13.0",
    "versions": "torch 2.11.0",
    "commit": "",
    "time": "2026-11-26T12:00:00.000+00:00",
}
STEP = TIMES | {
    **{"model": "MiniLM-shaped", "mode": "eager", "targets": "centre", "num_blocks": 8, "rank": 8, "threads": 1},
    **{"dtype": "bfloat16", "dropout": 0.0, "memory": "", "tokens": 8192, "saved_mib": 3.0, "peak_memory_mib": 4.0},
    **{"parameters": 1000, "compile_s": None, "graph_breaks": None, "recompiles": None},
}
RUN = TIMES | {"model": "MiniLM-shaped", "threads": 1, "file_size_mib": None, "peak_memory_mib": None}
SIDES: dict[str, list[dict[str, Any]]] = {
    "sessions": [{"side": "8 × 128, adapter, beside torch", "difference": 1.2e-3, "tolerance": 0.02, "nodes": {}}],
    "train": [{"side": "frozen"} | STEP, {"side": "ours"} | STEP | {"median_ms": 2.2, "ratio": 1.1}],
    "latency": [{"side": "base"} | RUN, {"side": "merged"} | RUN],
    "fold": [{"side": "fold", "gib_per_s": 900.5} | TIMES, {"side": "PEFT merge_adapter", "gib_per_s": None} | TIMES],
}


def write_lines(folder: Path, **changes: str) -> None:
    """Writes a run's results: one case per part, and tests of every outcome."""
    for part, sides in SIDES.items():
        facts = {"part": part, "case": f"a case of {part}"}
        append(folder / f"{part}.jsonl", facts | {"outcome": rows.BEGUN} | ORIGIN | changes)
        append(folder / f"{part}.jsonl", facts | {"outcome": rows.PASSED, "sides": sides} | ORIGIN | changes)
    for case, outcome, reason in (("test_a", rows.PASSED, ""), ("test_b", rows.FAILED, "1 | 2 are not equal")):
        line = {"part": "correct", "case": case, "outcome": outcome, "reason": reason}
        append(folder / "correct.jsonl", line | ORIGIN | changes)


def test_the_report_of_a_run(tmp_path: Path, capsys) -> None:
    found, out = tmp_path / "found", tmp_path / "out"
    assert main(["gpu", "--report", str(found), "--out", str(out)]) == MISUSED
    found.mkdir()
    write_lines(found)
    assert main(["gpu", "--report", str(found), "--out", str(out)]) == DONE
    text = (out / "gpu.md").read_text()
    assert "## NVIDIA H100 80GB HBM3, 79 GiB" in text
    assert "driver 580.1, CUDA 13.0; torch 2.11.0; source 0123456789ab" in text
    assert "1 failed, 1 passed." in text
    assert "| test_b | failed | 1 \\| 2 are not equal |" in text
    assert "| a case of sessions | 8 × 128, adapter, beside torch | 1.2e-03 | 0.02 |" in text
    assert "| MiniLM-shaped | eager | every dense layer, 8192 tokens, bfloat16 | ours | 2.2 |" in text
    assert "| a case of fold | fold | 2.00 | 1.50–2.50 | 1.000 | 900.5 |" in text
    pictures = [path.name for path in out.glob("*.png")]
    assert sorted(pictures) == ["latency-nvidia-h100-80gb-hbm3.png", "train-nvidia-h100-80gb-hbm3.png"]
    assert all(f"]({name})" in text for name in pictures)
    assert all(len(read(out / f"{part.name}.jsonl")) == (2 if part.name == "correct" else 1) for part in PARTS)
    assert main(["gpu", "--report", str(out), "--out", str(out)]) == DONE
    assert (out / "gpu.md").read_text() == text, "made again from the kept files"


def test_results_of_another_hour_join_the_earlier_ones(tmp_path: Path, capsys) -> None:
    first, second, out = (tmp_path / name for name in ("first", "second", "out"))
    for folder in (first, second):
        folder.mkdir()
    write_lines(first)
    write_lines(first, device="NVIDIA L4, 22 GiB, compute capability 8.9")
    line = {"part": "correct", "case": "test_b", "outcome": rows.PASSED} | ORIGIN | {"commit": "abc1234"}
    append(second / "correct.jsonl", line)
    for folder in (first, second):
        assert main(["gpu", "--report", str(folder), "--out", str(out)]) == DONE
    h100, l4 = (out / "gpu.md").read_text().split("## NVIDIA L4")
    assert "2 passed." in h100
    assert "commit abc1234" in h100
    assert "1 failed, 1 passed." in l4


def test_options_are_those_of_the_documentation() -> None:
    from benchmarks.gpu.options import add_options

    parser = argparse.ArgumentParser()
    add_options(parser)
    options = parser.parse_args(["--minutes", "9", "--part", "train", "--out", "there"])
    assert (options.minutes, options.part, options.out) == (9.0, "train", Path("there").resolve())
    assert json.dumps(parser.parse_args([]).minutes) == "9.0"
