"""The arguments of `python -m benchmarks gpu`."""

import argparse
from pathlib import Path

from benchmarks.common.checkout import ROOT

from .parts import PARTS

OUT = ROOT / "benchmark-output" / "gpu"
RESULTS = ROOT / "benchmarks" / "results" / "gpu"

QUESTION = "What can only be measured on a machine with a GPU? In parts, as much as the minutes allow."
DESCRIPTION = (
    "Runs everything that can only be measured on a CUDA device, part by part, and writes a JSON line for each case as "
    "soon as it ends. A run that was stopped or ran out of minutes continues when it is started again. A part or case "
    "that lacks a package names it, and the others run."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments to `parser`."""
    names = [part.name for part in PARTS]
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="minutes after which the run ends (%(default)s)")
    parser.add_argument("--part", choices=names, help="only this part: " + ", ".join(names), metavar="NAME")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--out", type=_path, help=f"folder of the results ({OUT}; of a report: {RESULTS})")
    parser.add_argument("--again", action="store_true", help="run again what has been run")
    parser.add_argument(
        "--dry-run", action="store_true", help="build every case on the CPU with small models, and time nothing"
    )
    parser.add_argument(
        "--report", type=_path, metavar="FOLDER", help="write tables and pictures of the results in this folder"
    )


def _path(text: str) -> Path:
    return Path(text).resolve()


def _minutes(text: str) -> float:
    minutes = float(text)
    if not minutes > 0:
        raise argparse.ArgumentTypeError(f"`{text}` must be more than 0")
    return minutes
