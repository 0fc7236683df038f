"""The README shows what runs."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "quickstart.py"


def test_the_readme_shows_the_quickstart() -> None:
    code = EXAMPLE.read_text().split('"""', 2)[2].strip()
    assert f"```python\n{code}\n```" in (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, from compiling
def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE))
    assert {"adapter", "unmerged.onnx", "merged.onnx"} <= {path.name for path in tmp_path.iterdir()}


def test_the_readme_names_every_file() -> None:
    named = set(re.findall(r"`((?:melora_fx|exporters)/\w+\.py)`", (ROOT / "README.md").read_text()))
    files = {
        str(path.relative_to(ROOT)) for folder in ("melora_fx", "exporters") for path in (ROOT / folder).glob("*.py")
    }
    assert named == {name for name in files if not name.endswith("__init__.py")}
