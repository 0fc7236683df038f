"""The README shows what runs."""

import re
import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "quickstart.py"


def test_the_readme_shows_the_quickstart() -> None:
    code = EXAMPLE.read_text().split('"""', 2)[2].strip()
    assert f"```python\n{code}\n```" in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, from compiling
def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE))
    assert {"adapter", "unmerged.onnx", "merged.onnx"} <= {path.name for path in tmp_path.iterdir()}


def test_contributing_names_every_room() -> None:
    named = set(re.findall(r"`((?:melora_fx|exporters)/\w+)/`", (ROOT / "CONTRIBUTING.md").read_text()))
    inits = [path for package in ("melora_fx", "exporters") for path in (ROOT / package).glob("*/__init__.py")]
    assert named == {str(path.parent.relative_to(ROOT)) for path in inits}
