"""README.md and docs/: their figures are those of the CSV files, and only in generated blocks."""

import re
from typing import NamedTuple

import pytest

from benchmarks.common.checkout import ROOT
from benchmarks.pages.block import Block, blocks_in, lines_of, with_blocks, without_blocks
from benchmarks.pages.blocks import BLOCKS
from benchmarks.pages.results import table
from benchmarks.pages.words import duration, listed, machine, origin, paragraph, span, times
from benchmarks.report_rows import rows_of

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
_TABLES = re.compile(
    r"<!-- ([\w ]+): PYTHONPATH=tests python -m support\.(?:capture|conversion|export)_table -->\n"
    r".*?<!-- end of (?:table|whole captures) -->",
    re.DOTALL,
)
_PAGE = "<!-- page: PYTHONPATH=tests python -m support."
"""Tables and pages that tests/support writes; their own tests compare them with the code."""

_WORDS = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty|fifty|sixty|ninety"
_NUMBER = rf"(?:\d[\d.,]*|(?i:\b(?:{_WORDS}|hundred|thousand|some|few)))"
_UNITS = (
    *("ns", "µs", "us", "ms", "s", "secs?", "seconds?", "milliseconds?", "microseconds?", "min", "minutes?", "hours?"),
    *("[kKMGT]i?B(?:/s)?", "bytes", "tokens/s", "tokens a second", "%", "percent", "per cent", "points?", "nats"),
    *("times", "fold", "x", r"×(?!\s?\d)"),
)
_FIGURES = (
    re.compile(rf"{_NUMBER}\**(?:[ -]|&nbsp;)?(?:{'|'.join(_UNITS)})(?!\w)"),
    re.compile(r"(?<![\w.])\d+\.\d+(?![.\d])"),
    re.compile(r"\b\d(?:\.\d+)?e[-+]?\d+\b"),  # an error
    re.compile(r"\b(?:a|one|two|three) (?:third|quarter|fifth|sixth|seventh|eighth|ninth|tenth|twentieth)s?\b"),
    re.compile(r"\b(?i:twice|thrice|half|double) (?:as|the time|the memory)\b"),
)
_VERSIONS = re.compile(
    r"(?:PEFT 0\.21|vLLM 0\.33|xllamacpp 2026\.10|mlx_lm 0\.32|ONNX Runtime 1\.(?:24 to 1\.32|30|31|32)|TRL 1\.16|"
    r"DeepSpeed 0\.19|TensorRT 10\.15|Python 3\.1[13](?: and 3\.13)?|torch 2\.1[13](?: and 2\.15)?|"
    r"transformers 5\.2[34]|Llama 3\.2|"
    r"arXiv \d{4}\.\d{4,5}|arxiv\.org/abs/\d{4}\.\d{4,5})(?![\d.]*\d)"
)
"""Listed one by one, as "PEFT 24 ms" is not a version."""


class Allowed(NamedTuple):
    """A passage with a number that is not a measurement."""

    page: str
    text: str
    reason: str


_BOUND = "a bound that we observe"
_OPTION = "an option, or its default"
_TESTED = "a tolerance that tests compare with"
_COUNT = "a count of operations or bytes, not a measurement"
_ESTIMATE = "an estimate, marked as one"
_VERSION = "a version"
ALLOWED = (
    Allowed("README.md", "Four minutes at most.", _BOUND),
    Allowed("README.md", "At most five minutes on two cores.", _BOUND),
    Allowed("docs/QUICKSTART.md", "lr=5e-3", _OPTION),
    Allowed("docs/ADAPTERS.md", "(0.19 or later)", _VERSION),
    Allowed("docs/ADAPTERS.md", '"style": 0.7, "domain": 0.3', _OPTION),
    Allowed("docs/ADAPTERS.md", "exactly 0.7 Δ₁ + 0.3 Δ₂", _OPTION),
    Allowed("docs/ADAPTERS.md", 'scale_adapter("style", 1.5', _OPTION),
    Allowed("docs/CAPTURES.md", "`load_adapter` refused 112 times", "by hand, from the report of tests/outside/run.py"),
    Allowed("docs/DECODERS.md", "temperature=0.8, top_p=0.9", _OPTION),
    Allowed("docs/EXPORT.md", "four times the example", "a size that is tried"),
    Allowed("docs/EXPORT.md", "ONNX Runtime's CPU provider (1.32)", _VERSION),
    Allowed("docs/EXPORT.md", "may be 1e-4 in fp32 and 2e-2 in fp16, or 4e-2", _TESTED),
    Allowed("docs/EXPORT.md", "eight times what the last bits", _TESTED),
    Allowed("docs/EXPORT.md", "at most ten times the largest bound", _TESTED),
    Allowed("docs/EXPORT.md", "three quarters of the last layer", _COUNT),
    Allowed("docs/FOLD.md", "more than a quarter", "the limit of a warning"),
    Allowed("docs/GPU.md", "fits into nine minutes", _OPTION),
    Allowed("docs/GPU.md", "By estimate, all parts take twenty minutes", _ESTIMATE),
    Allowed("docs/GPU.md", "about 45 GB of its memory", _ESTIMATE),
    Allowed("docs/GPU.md", "1.31 is built for CUDA 13", _VERSION),
    Allowed("docs/SCALE.md", "two averages, 16 bytes each", _COUNT),
    Allowed("docs/TRAINING.md", "(`--validation 0.1`", _OPTION),
    Allowed("docs/LOWERINGS.md", "compute capability below 8.0", _VERSION),
    Allowed("docs/TRAINING.md", "13.5 GB in bfloat16", _COUNT),
    Allowed("docs/TRAINING.md", "8 × 8 takes 67 MB", _COUNT),
    Allowed("docs/TRAINING.md", "lr=1e-3", _OPTION),
    Allowed("docs/TRAINING.md", "learning rate 3e-4", _OPTION),
    Allowed("docs/TRAINING.md", "alpha 16 and dropout 0.05", _OPTION),
    Allowed("docs/TRAINING.md", "20 % of each label's texts are held out", _OPTION),
    Allowed("docs/TRAINING.md", "every three minutes", _OPTION),
    Allowed("docs/TRAINING.md", "falls linearly to a twentieth", _OPTION),
    Allowed("docs/LOWERINGS.md", "(3 % of MiniLM's", _COUNT),
    Allowed("docs/LOWERINGS.md", "about 0.58", "the mean of a formula"),
    Allowed("docs/LOWERINGS.md", "1e-4 over a training", _TESTED),
    Allowed("docs/TRAINING.md", "to 1e-5, in bfloat16 to 2e-3", _TESTED),
)


def prose(page: str) -> str:
    """Returns a page on one line, without its generated parts and without versions."""
    text = (ROOT / page).read_text()
    if text.startswith(_PAGE):
        return ""
    return _VERSIONS.sub("", " ".join(_TABLES.sub("", without_blocks(text)).split()))


def figures_in(text: str) -> list[str]:
    return [found[0] for pattern in _FIGURES for found in pattern.finditer(text)]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}, {block.name}")
def test_a_block_is_what_the_rows_make(block: Block) -> None:
    found = blocks_in((ROOT / block.page).read_text())[block.name]
    assert found == lines_of(block), "run: python -m benchmarks.pages"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_the_blocks_of_the_list(page: str) -> None:
    assert set(blocks_in((ROOT / page).read_text())) == {block.name for block in BLOCKS if block.page == page}


@pytest.mark.parametrize("page", PAGES)
def test_no_figure_stands_outside_of_blocks(page: str) -> None:
    text = prose(page)
    for allowed in ALLOWED:
        if allowed.page == page:
            text = text.replace(allowed.text, "")
    assert figures_in(text) == []


@pytest.mark.parametrize("allowed", ALLOWED, ids=lambda allowed: f"{allowed.page}, {allowed.text}")
def test_what_is_allowed_is_there_and_looks_like_a_figure(allowed: Allowed) -> None:
    assert allowed.text in prose(allowed.page)
    assert figures_in(allowed.text)


@pytest.mark.parametrize(
    "text",
    [
        "Folding takes 24 ms.",
        "It takes 24ms",
        "a few milliseconds: 5 µs",
        "3 s more",
        "three to four minutes",
        "54 MiB above",
        "20 to 45 times faster",
        "1.29 × the base graph",
        "| 1.15 |",
        "0.9 of the time",
        "71.8 % of the texts",
        "two to four per cent",
        "an error of 3.5e-06",
        "a fifth of PEFT's time",
        "2.1 points better",
        "accuracy 0.784",
        "| 0.7843 | 98.6 |",
        "2.405 nats",
        "24 milliseconds",
        "100 KiB",
        "3x faster",
        "twice as fast",
        "71.8 percent",
        "4-fold",
        "**24** ms",
        "24&nbsp;ms",
        "1234 tokens/s",
        "3 min",
        "ninety per cent",
    ],
)
def test_what_is_a_figure(text: str) -> None:
    assert figures_in(text)


@pytest.mark.parametrize(
    "text",
    ["8 × 64 tokens", "rank 8, 8 blocks", "arXiv 2402.17263", "n times fewer", "2 processes", "4.20.1", "PEFT 0.21"],
)
def test_what_is_none(text: str) -> None:
    assert figures_in(_VERSIONS.sub("", text)) == []


@pytest.mark.parametrize(
    "text", ["PEFT 24 ms", "PEFT 63 MiB", "takes PEFT 2.5 times as long", "torch 1.29", "PEFT 0.215"]
)
def test_what_is_no_version(text: str) -> None:
    assert figures_in(_VERSIONS.sub("", text))


def test_tables_of_the_tests_are_made_by_modules_that_are_there() -> None:
    found = {name for page in PAGES for name in re.findall(r"python -m support\.(\w+)", (ROOT / page).read_text())}
    assert all((ROOT / "tests" / "support" / f"{name}.py").is_file() for name in found)


def test_a_figure_that_somebody_writes_into_a_page_is_found(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(text.replace("## Guides\n", "## Guides\n\nIt takes 24 ms.\n"))
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    with pytest.raises(AssertionError, match="24 ms"):
        test_no_figure_stands_outside_of_blocks("README.md")


def page_with(*blocks: tuple[str, str]) -> str:
    """Returns a page with these blocks, each a name and its lines."""
    made = [f"<!-- figures {name}: python -m benchmarks.pages -->\n{lines}<!-- end -->\n" for name, lines in blocks]
    return "# Title\n\n" + "\nWords.\n\n".join(made) + "\nMore words.\n"


def test_blocks_are_written_and_the_rest_stays() -> None:
    page = page_with(("first", "old\n"), ("second", ""))
    new = with_blocks(page, {"first": ["| 1 |", "| 2 |"], "second": ["3"]})
    assert new == page_with(("first", "| 1 |\n| 2 |\n"), ("second", "3\n"))
    assert blocks_in(new) == {"first": ["| 1 |", "| 2 |"], "second": ["3"]}
    assert without_blocks(new) == "# Title\n\n\n\nWords.\n\n\n\nMore words.\n"


@pytest.mark.parametrize("made", [{}, {"other": []}, {"first": [], "other": []}])
def test_blocks_that_the_page_or_the_list_lacks(made: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="only in the page or only in the list"):
        with_blocks(page_with(("first", "old\n")), made)


@pytest.mark.parametrize(
    "page",
    [
        page_with(("first", "1\n"), ("first", "2\n")),
        page_with(("first", "1\n")).replace("<!-- end -->", ""),
        page_with(("first", "1\n"), ("second", "2\n")).replace("<!-- end -->", "", 1),
        page_with(("first", "1\n")).replace("python -m benchmarks.pages", "python -m pages"),
    ],
    ids=["twice", "no end", "no end before the next", "another command"],
)
def test_blocks_that_are_not_well_formed(page: str) -> None:
    with pytest.raises(ValueError, match="a block without"):
        blocks_in(page)


def test_a_block_without_rows_says_so() -> None:
    block = Block("README.md", "nothing", "nothing", lambda rows: [str(rows)])
    assert lines_of(block) == ["*`python -m benchmarks nothing` has not been measured yet.*"]


TWO_ROWS = "case,side,ratio\na,ours,1.0\na,PEFT,2.0\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (TWO_ROWS.replace("2.0", "nan"), r"line 3: ratio is nan"),
        (TWO_ROWS.replace("PEFT", "ours"), r"line 3: same row as line 2: a, ours"),
        (TWO_ROWS.replace(",2.0", ""), r"line 3: other columns"),
        (TWO_ROWS.replace("2.0", "2.0,3"), r"line 3: other columns"),
        (TWO_ROWS.replace("2.0", ""), r"numbers\.csv lacks what the block `ratio` of README\.md needs: ValueError"),
        (TWO_ROWS.replace("ratio", "ratios"), r"numbers\.csv lacks .* KeyError\('ratio'\)"),
    ],
    ids=["not finite", "twice", "short", "long", "empty", "no column"],
)
def test_rows_that_would_make_a_false_page(tmp_path, monkeypatch: pytest.MonkeyPatch, text: str, told: str) -> None:
    monkeypatch.setattr("benchmarks.pages.block.RESULTS", tmp_path)
    block = Block("README.md", "ratio", "numbers", lambda rows: [f"{float(row['ratio'])}" for row in rows])
    (tmp_path / "numbers.csv").write_text(TWO_ROWS)
    assert lines_of(block) == ["1.0", "2.0"]
    (tmp_path / "numbers.csv").write_text(text)
    with pytest.raises(ValueError, match=told):
        lines_of(block)


def test_results_has_every_table_and_picture() -> None:
    page = (ROOT / "docs" / "RESULTS.md").read_text()
    results = ROOT / "benchmarks" / "results"
    listed_there = blocks_in(page)
    assert {path.stem for path in results.glob("*.csv")} <= set(listed_there)
    assert [path.name for path in results.glob("*.png") if f"(../benchmarks/results/{path.name})" not in page] == []


def test_rows_without_a_time_are_shown_too() -> None:
    columns = dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "ratio", "reference"), "")
    timed = {"case": "a", "side": "ours", **columns, "median_ms": "2.0", "nodes": ""}
    lines = table([timed, {"case": "b", "side": "ours", **columns, "nodes": "7"}])
    assert lines[-1] == "| b | ours | 7 |"
    assert len([line for line in lines if line.startswith("| a |")]) == 1


def test_words() -> None:
    versions = "melora_fx 0.1.0; torch 2.13.0+cpu; peft 0.21.2"
    rows = [
        {"device": "A, 2 cores", "versions": versions},
        {"device": "A, 2 cores", "versions": versions.replace("0.1", "0.2")},
    ]
    assert origin(rows, "torch", "onnxruntime") == "A, 2 cores (melora_fx 0.1.0 and 0.2.0, torch 2.13.0)"
    assert origin([{"device": "", "versions": ""}]) == "an unknown machine"
    assert machine([*rows, {"device": "B"}]) == "A, 2 cores and B"
    assert [span(values, ".2f") for values in ([0.5, 0.25, 1], [0.501, 0.499])] == ["0.25 to 1.00", "0.50"]
    assert [listed(texts) for texts in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
    given = ("0.108", "23.8", "996", "999.6", "14866.3")
    assert [duration({"median_ms": text}) for text in given] == ["0.11 ms", "23.8 ms", "996 ms", "1.00 s", "14.9 s"]
    assert [times(value) for value in (0.512, 9.994, 9.996, 45.2)] == ["0.51", "9.99", "10", "45"]
    assert paragraph("a " * 58 + "[two words](page)")[-1] == "[two words](page)", "the name of a link is on one line"


@pytest.mark.parametrize("benchmark", ["demo", "train_command"])
def test_rows_of_a_report(benchmark: str) -> None:
    report = {
        "model": "models/all-MiniLM-L6-v2",
        "majority_baseline": 0.22,
        "evaluations": [[0, 0.1], [10, 0.6], [20, 0.7]],
        "trainable_parameters": 80,
        "adapter_parameters": 70,
        "lora_equal_rank_parameters": 560,
        "num_train": 30,
        "num_held_out": 6,
        "arguments": {"epochs": 2, "config": {"rank": 8, "num_blocks": 8}},
        "versions": {"melora_fx": "0.2.0", "torch": "2.13.0"},
    }
    if benchmark == "demo":
        names = ("onnx base", "onnx merged", "onnx unmerged", "torch eager")
        report["latency"] = {name: {"median_ms": 2.0, "ratio": 1.0} for name in names}
        report |= {f"{name}_max_abs_error": 1e-6 for name in ("fold", "merged", "unmerged")} | {"label_agreement": 0.5}
    rows = [{name: str(value) for name, value in row.items()} for row in rows_of(benchmark, report, "A", "now")]
    block = next(block for block in BLOCKS if block.csv == benchmark)
    text = " ".join(block.write(rows))
    assert all(part in text for part in ("10.0 %", "70.0 %", "22.0 %", " 80 ", "on A"))
    assert ("the same label on 50 %" in text) == (benchmark == "demo")
    assert rows[0]["versions"] == "melora_fx 0.2.0; torch 2.13.0"
