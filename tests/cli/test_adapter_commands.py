"""`melora-fx adapter scale | add | average | compress`, as they are typed."""

import json
import re
from pathlib import Path

import pytest
import torch
from support.command_line import run
from support.made_adapters import made_adapter, updates_of

from melora_fx import MELoRAConfig


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    config = MELoRAConfig(rank=2, num_blocks=3)
    return made_adapter(tmp_path / "a", {"up": config}), made_adapter(tmp_path / "b", {"up": config}, seed=1)


def test_sums_means_and_multiples(folders: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = (updates_of(folder)["up"] for folder in folders)
    out = tmp_path / "out"
    for arguments, printed, expected in (
        (("add", *folders, "--weights", "-1,0.5"), f"-1 × {folders[0]} + 0.5 × {folders[1]}", 0.5 * b - a),
        (("add", *folders), f"1 × {folders[0]} + 1 × {folders[1]}", a + b),
        (("average", *folders), f"the mean of {folders[0]}, {folders[1]}", (a + b) / 2),
        (("scale", folders[0], "--factor", "-0.5"), f"-0.5 × {folders[0]}", -0.5 * a),
    ):
        result = run("adapter", *arguments, "-o", out)
        assert (result.returncode, result.stderr) == (0, "")
        assert re.fullmatch(rf"{out}: \d+ KiB, {re.escape(printed)}\n", result.stdout)
        torch.testing.assert_close(updates_of(out)["up"], expected, rtol=0, atol=1e-6)


def test_json_says_what_was_written(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("adapter", "average", *folders, "-o", out, "--json")
    size = sum(file.stat().st_size for file in out.iterdir())
    content = f"the mean of {folders[0]}, {folders[1]}"
    assert json.loads(result.stdout) == {"out": str(out), "bytes": size, "content": content}


def test_compress_prints_a_table_or_json(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("adapter", "compress", folders[0], "--rank", 1, "-o", out)
    assert result.returncode == 0, result.stderr
    assert f"{out}: the largest relative error is 0." in result.stdout
    report = json.loads(run("adapter", "compress", folders[0], "--rank", 1, "-o", out, "--json").stdout)
    assert report["sites"][0]["ranks_before"] == [2, 2, 2]
    assert report["sites"][0]["ranks_after"] == [1, 1, 1]
    error = torch.linalg.matrix_norm(updates_of(folders[0])["up"] - updates_of(out)["up"])
    assert report["largest_error"] == pytest.approx(
        float(error / torch.linalg.matrix_norm(updates_of(folders[0])["up"])), rel=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("add", "A", "B", "--weights", "1"), "`--weights` has 1 for 2 adapters: pass one for each"),
        (("add", "A", "A"), "a folder is listed twice: list it once, with the sum of its weights"),
        (("add", "A", "B", "--weights", "nan,1"), "(=nan) must be finite"),
        (("average", "A", "/nowhere"), "`/nowhere` is not an adapter folder"),
        (("scale", "A", "--factor", "inf"), "`factor` (=inf) must be finite"),
        (("compress", "A", "--rank", "0"), "`rank` (=0) must be at least 1"),
    ],
    ids=["weights", "twice", "nan", "missing", "inf", "rank"],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], text: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    places = dict(zip("AB", folders, strict=True))
    result = run("adapter", *(places.get(argument, argument) for argument in arguments), "-o", tmp_path / "out")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith("error: ")
    assert text in result.stderr
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_are_a_wrong_option(folders: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("adapter", "add", *folders, "--weights", "0.7;0.3", "-o", tmp_path / "out")
    assert result.returncode == 2
    assert "'0.7;0.3' must be numbers, as in 0.7,0.3" in result.stderr
