"""Runs transformers' own model tests twice, with plain and with rewritten models, and lists the differences.

    python tests/outside/run.py --tests ../transformers --out outside-output [--only bert,gpt2] [--slow]

It runs one process at a time, and does not repeat a run whose JUnit file is in `--out`.
"""

import argparse
import contextlib
import fnmatch
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).resolve().parent
ARCHITECTURES = (
    *("bert", "roberta", "modernbert", "gpt2", "llama", "qwen2", "bloom"),
    *("t5", "bart", "vit", "clip", "whisper"),
)
LIMIT_S = 7200
"""The time limit of one run of one architecture."""

WIDTH = 200
"""The width, in characters, of the texts that the plugin counts."""

SLOW = "(torch_export or onnx_export or matches_sdpa_generate) and not static_cache"
"""Tests that transformers marks slow and that need neither a network nor a GPU. The export of Llama with a static
cache has hung, also with a plain model.
"""

FINISHED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)

RANKING = ("passed", "skipped", "failed")
"""If a test has several outcomes, those of its subtests, the last in this order counts."""

KINDS = ("plain", "rewritten", "unfrozen")

COLUMNS = (
    *("architecture", "plain passed, failed", "rewritten passed, failed", "of these adapted", "skipped"),
    *("differences", "new"),
)

NEW = "NEW: "
FROZEN = "passes if the base is not frozen"
EXPLAINED = {
    ("*::test_model_weights_reload_no_missing_tied_weights", "*Items in the first set but not the second*"): (
        "each parameter must be reported missing from an empty checkpoint, but those of adapters are not expected in it"
    ),
    ("*::test_keep_in_fp32_modules", "*.lora_a was upcasted but it should NOT be"): (
        "each tensor must be float16, except some that it names, but adapters of float16 weights are float32"
    ),
    ("*::test_can_load_ignoring_mismatched_shapes", "*AssertionError: 2 != 42"): (
        "each parameter of a head for 42 labels must have 42 rows; this head is adapted, and its lora_a has 2 blocks"
    ),
}
"""Maps (test, message), as globs, to an assumption of the test that no adapted model can meet."""


class Run(NamedTuple):
    """The results of one architecture's tests, by `class::name`.

    Attributes:
        outcomes: one of RANKING for each test.
        messages: the first line of the message of each test that failed or was skipped.
        adapted: the tests in which a model had an adapter.
        counts: what the plugin counted, over all tests.
    """

    outcomes: dict[str, str]
    messages: dict[str, str]
    adapted: set[str]
    counts: Counter[str]


def run_tests(tests: Path, selection: list[str], kind: str, result: Path, *, slow: bool) -> bool:
    """Runs tests unless the JUnit file `result` exists; returns whether it exists now. A log is next to it."""
    if result.exists():
        return True
    print(f"{result.stem} …", file=sys.stderr, flush=True)
    partial = result.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *selection, "-p", "melora_outside", f"--models={kind}"]
    command += ["-q", "-W", "ignore", "-o", "log_cli=false", "-p", "no:cacheprovider", f"--junitxml={partial}"]
    command += ["-k", SLOW] if slow else []
    paths = [str(HERE), str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    settings["RUN_SLOW"] = "yes" if slow else "no"
    with result.with_suffix(".log").open("w") as log, contextlib.suppress(subprocess.TimeoutExpired):
        output = {"stdout": log, "stderr": subprocess.STDOUT}
        ended = subprocess.run(command, cwd=tests, env=os.environ | settings, timeout=LIMIT_S, **output)
        if ended.returncode in FINISHED:
            partial.rename(result)
    return result.exists()


def run_architecture(tests: Path, architecture: str, out: Path, *, slow: bool) -> bool:
    """Runs plain and rewritten models, and what differs again with a trained base; returns whether all have results."""
    path = f"tests/models/{architecture}/test_modeling_{architecture}.py"
    results = {kind: out / f"{architecture}.{kind}.xml" for kind in KINDS}
    if not run_tests(tests, [path], "plain", results["plain"], slow=slow):
        return False
    if not run_tests(tests, [path], "rewritten", results["rewritten"], slow=slow):
        return False
    differing = differing_tests(read(results["plain"]), read(results["rewritten"]))
    selection = [f"{path}::{name}" for name in differing]
    return not selection or run_tests(tests, selection, "unfrozen", results["unfrozen"], slow=slow)


def read(result: Path) -> Run:
    """Reads a JUnit file; the result is empty without a file."""
    run = Run({}, {}, set(), Counter())
    if not result.exists():
        return run
    for case in ElementTree.parse(result).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        run.outcomes.setdefault(name, RANKING[0])
        for child in case:
            outcome = {"failure": "failed", "error": "failed", "skipped": "skipped"}.get(child.tag, RANKING[0])
            if RANKING.index(outcome) > RANKING.index(run.outcomes[name]):
                run.outcomes[name] = outcome
                run.messages[name] = (child.get("message") or "").partition("\n")[0]
        for entry in case.iter("property"):
            run.counts[entry.get("name", "")[:WIDTH]] += int(entry.get("value", "0"))
            if entry.get("name") in ("rewritten", "loaded"):
                run.adapted.add(name)
    return run


def differing_tests(plain: Run, rewritten: Run) -> dict[str, str]:
    """Returns each test that a plain model does not fail and a rewritten one fails, or skips, with its outcomes."""
    changes = {name: (outcome, rewritten.outcomes.get(name, "gone")) for name, outcome in plain.outcomes.items()}
    return {
        name: f"{before} → {after}"
        for name, (before, after) in changes.items()
        if before != "failed" and after not in (before, "passed")
    }


def explained(name: str, plain: Run, rewritten: Run, unfrozen: Run) -> str:
    """Returns why a test differs: the frozen base, as a run with an unfrozen one shows, or a reason in EXPLAINED."""
    if unfrozen.outcomes.get(name) == plain.outcomes[name]:
        return FROZEN
    message = rewritten.messages.get(name, "")
    for (test, start), why in EXPLAINED.items():
        if fnmatch.fnmatchcase(name, test) and fnmatch.fnmatchcase(message, start):
            return why
    return NEW + message[:200]


def report(architectures: list[str], out: Path) -> str:
    """Returns the table, then the differences, then counts of models and linears that were rewritten or not."""
    rows = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    details = []
    counts: Counter[str] = Counter()
    for architecture in architectures:
        plain, rewritten, unfrozen = (read(out / f"{architecture}.{kind}.xml") for kind in KINDS)
        number, number_now = Counter(plain.outcomes.values()), Counter(rewritten.outcomes.values())
        differing = differing_tests(plain, rewritten)
        reasons = [explained(name, plain, rewritten, unfrozen) for name in differing]
        cells = [architecture, f"{number['passed']}, {number['failed']}"]
        cells += [f"{number_now['passed']}, {number_now['failed']}"]
        cells += [str(sum(rewritten.outcomes[name] == "passed" for name in rewritten.adapted))]
        cells += [str(number_now["skipped"]), str(len(differing)), str(sum(why.startswith(NEW) for why in reasons))]
        rows.append(" | ".join(cells))
        details += [f"{name}: {differing[name]}: {why}" for name, why in zip(differing, reasons, strict=True)]
        counts += rewritten.counts
    done = [f"{number} × {what}" for what, number in counts.most_common()]
    return "\n".join([*rows, "", *(details or ["no differences"]), "", *done])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, required=True, help="a checkout of transformers")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", default=",".join(ARCHITECTURES), help="architectures, separated by commas")
    parser.add_argument("--slow", action="store_true", help="the tests of torch.export and ONNX export instead")
    options = parser.parse_args()
    out = options.out.resolve() / ("slow" if options.slow else "")
    out.mkdir(parents=True, exist_ok=True)
    architectures = options.only.split(",")
    done = [name for name in architectures if run_architecture(options.tests, name, out, slow=options.slow)]
    failed = [f"{name}: no result; see the last log in {out}" for name in architectures if name not in done]
    text = "\n".join([report(done, out), *failed])
    (out / "report.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
