"""Runs the parts one after another, each in its share of the minutes and in its own processes, which may crash."""

import argparse
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from benchmarks.common.checkout import DONE, LEFT_OUT, MISUSED, ROOT
from benchmarks.common.checkout import FAILED as A_CASE_FAILED

from .options import OUT, RESULTS
from .parts import PARTS, Part
from .recorder import Recorder
from .rows import BEGUN, FAILED, LACKING, append, latest, read
from .worker import NOT_BEGUN

GRACE_S = 15
"""How long a case may continue after its part's share of the time."""
OUT_OF_TIME = 124
"""The exit code of a process that was ended after its time, as that of `timeout`."""
WORTHWHILE_S = 30
"""The least time for which processes are started again: each takes some ten seconds for its imports."""
WORKER = ["-m", "benchmarks.gpu.worker"]
DRY_RUN_VARIABLE = "MELORA_FX_DRY_RUN"
"""Tells the tests of part *correct* to run on the CPU."""

Say = Callable[[str], None]


def run(options: argparse.Namespace) -> int:
    """Returns an exit status: 0, or 1 if a case failed, 2 for arguments, 3 if something is missing or not begun."""
    if options.report:
        from .report import write_report  # draws, so it is slow to import

        return write_report(options.report, options.out or RESULTS)
    if not options.dry_run and not _has_device():
        print("there is no CUDA device: pass --dry-run to build every case on the CPU", file=sys.stderr)
        return LEFT_OUT
    folder = options.out or OUT
    log = _open_log(folder)
    if log is None:
        return MISUSED
    end = time.time() + 60 * options.minutes
    records = {part: _recorder(part, folder, options) for part in PARTS if options.part in (None, part.name)}
    with log:

        def say(text: str) -> None:
            print(text, flush=True)
            print(text, file=log, flush=True)

        statuses = _run_parts(records, end, say)
        late = {part: record for part, record in records.items() if record.num_not_begun}
        if late and end - time.time() > WORTHWHILE_S:
            say("again, in the time that the shares left over:")
            statuses |= _run_parts(late, end, say)
        say(f"see {folder}")
    if set(statuses.values()) == {DONE} and not any(map(_is_named, records.values())):
        print(f"`--only {options.only}` matches no case", file=sys.stderr)
        return MISUSED
    return max(statuses.values(), key=(DONE, LEFT_OUT, A_CASE_FAILED).index)


def _open_log(folder: Path) -> TextIO | None:
    """Returns the log of `folder`, locked as long as this process runs; returns None and prints why if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / "log.txt").open("a", encoding="utf-8")
    except OSError as error:
        print(f"`{folder}` cannot be written: {error.strerror}", file=sys.stderr)
        return None
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another run writes into `{folder}`", file=sys.stderr)
        log.close()
        return None
    except OSError:  # a file system without locks
        pass
    return log


def _recorder(part: Part, folder: Path, options: argparse.Namespace) -> Recorder:
    num_before = len(read(part.file(folder)))
    options_of_cases = {"dry": options.dry_run, "again": options.again, "only": options.only}
    return Recorder(part.name, folder, deadline=0, num_before=num_before, **options_of_cases)


def _is_named(record: Recorder) -> bool:
    """Returns whether a case that has been run, now or before, has the value of `--only` in its name."""
    return not record.only or any(record.only in case for case in latest(read(record.path)))


def _run_parts(records: Mapping[Part, Recorder], end: float, say: Say) -> dict[Part, int]:
    """Runs each part in its share of the time until `end`; returns the exit status of each."""
    statuses = {}
    for index, (part, record) in enumerate(records.items()):
        left = max(end - time.time(), 0)
        share = left * part.minutes / sum(each.minutes for each in [*records][index:])
        say(f"{part.name}: {part.question} ({share:.0f} s of {left:.0f} s)")
        record.deadline = time.time() + share
        statuses[part] = _run_part(part, record, say)
    return statuses


def _has_device() -> bool:
    import torch  # slow to import, so only here

    return torch.cuda.is_available()


def _run_part(part: Part, record: Recorder, say: Say) -> int:
    """Runs a part until all its cases have been tried or its time is over; returns an exit status."""
    if part.missing:
        say(f"  left out: {part.missing}")
        return LEFT_OUT
    while True:
        code = _work(record, say)
        tried = latest(read(record.path)[record.num_before :])
        for case, line in tried.items():
            if line["outcome"] == BEGUN:  # and never ended
                is_late = code == OUT_OF_TIME
                reason = "its part's time was over" if is_late else f"its process ended with {code}, see the log"
                append(record.path, line | {"outcome": FAILED, "reason": reason})
                say(f"  {case}: failed, {reason}")
        has_gone_on = len(tried) > len(record.tried)
        record.tried = list(tried)
        if code in (0, NOT_BEGUN) or not has_gone_on or time.time() > record.deadline:
            break
    record.num_not_begun = int(code in (NOT_BEGUN, OUT_OF_TIME))  # at least one: only the process has counted them
    outcomes = Counter(line["outcome"] for line in latest(read(record.path)[record.num_before :]).values())
    say(f"  {', '.join(f'{count} {outcome}' for outcome, count in sorted(outcomes.items())) or 'nothing run'}")
    if outcomes[FAILED] or code not in (0, NOT_BEGUN):
        return A_CASE_FAILED
    return LEFT_OUT if code or outcomes[LACKING] else DONE


def _work(record: Recorder, say: Say) -> int:
    """Runs one process of a part and returns its exit code; when its time is over, ends it and all its children."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    if record.dry:
        environment |= {DRY_RUN_VARIABLE: "1"}
    command = [sys.executable, *WORKER, record.to_json()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as process:

        def watch() -> None:
            try:
                process.wait(max(record.deadline - time.time(), 0) + GRACE_S)
            except subprocess.TimeoutExpired:
                say(f"  stopped {GRACE_S} s after the part's time")
                is_late.set()
            _end_group(process)  # also the children of a crashed process, which keep the output open

        is_late = threading.Event()
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for text in process.stdout:
                say(text.rstrip("\n"))
        except BaseException:  # this process is being stopped
            _end_group(process)
            raise
        finally:
            watcher.join()
        return OUT_OF_TIME if is_late.is_set() else process.wait()


def _end_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
