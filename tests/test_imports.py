"""The packages that an import loads in fresh processes: their names, since seconds vary."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.fold_folders import Folders, llama

import exporters
import melora_fx

OURS = {"melora_fx", "exporters"}
TYPER = {
    "typer", "click", "annotated_doc", "shellingham", "pydantic", "pydantic_core", "annotated_types",
    "typing_extensions", "typing_inspection",
}  # fmt: skip
"""typer, and the packages that it imports."""

PACKAGES = [melora_fx, exporters]


def added(tmp_path: Path, first: str, then: str) -> tuple[set[str], str, str]:
    """Returns the names of the packages, except Python's own, that `then` imports after `first`, including Dynamo and
    torch.onnx, and what both print.
    """
    code = f"""
import atexit, pathlib, sys
{first}
before = set(sys.modules)
atexit.register(lambda: pathlib.Path({str(tmp_path / "modules")!r}).write_text("\\n".join({{*sys.modules}} - before)))
{then}
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = (tmp_path / "modules").read_text().splitlines()
    names = {name.partition(".")[0] for name in modules}
    found = {name for name in names - sys.stdlib_module_names if not name.startswith("_")}
    found |= {name for name in ("torch._dynamo", "torch._inductor", "torch.onnx") if name in modules}
    return found, result.stdout, result.stderr


@pytest.mark.parametrize("module", ["melora_fx", "exporters", "melora_fx.errors", "exporters.targets"])
def test_an_import_alone_is_none_of_torch(module: str, tmp_path: Path) -> None:
    found, out, err = added(tmp_path, "", f"import {module}")
    assert found <= OURS
    assert (out, err) == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(("package", "brings"), [("melora_fx", {"melora_fx"}), ("exporters", OURS | {"regex"})])
def test_public_names_bring_little_beside_torch(package: str, brings: set[str], tmp_path: Path) -> None:
    touch = f"""
import {package} as package
for name in package.__all__:
    if name != "AdapterCheckpointCallback":
        getattr(package, name)
"""
    found, out, err = added(tmp_path, "import torch", touch)
    assert found - {"numpy"} == brings | {"safetensors"}
    assert (out, err) == ("", "")


@pytest.mark.slow
def test_a_plain_model_is_adapted_and_trained_without_dynamo(tmp_path: Path) -> None:
    use = """
import melora_fx
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
melora_fx.rewrite(model, "all-linear", melora_fx.MELoRAConfig(num_blocks=2))
model(torch.ones(2, 8)).sum().backward()
melora_fx.fold(model)
"""
    first = "import torch, torch.nested._internal.nested_tensor"  # torch 2.15 imports it in a step
    found, out, err = added(tmp_path, first, use)
    assert found == {"melora_fx"}
    assert (out, err) == ("", "")


@pytest.mark.parametrize("arguments", ["--help", "--version", "export --help", "adapter to-ort --help"])
def test_help_and_versions_need_typer_alone(arguments: str, tmp_path: Path) -> None:
    run = f"sys.argv = ['melora-fx', *{arguments.split()}]\nfrom exporters.cli.commands import main\nmain()"
    found, out, err = added(tmp_path, "", run)
    assert OURS <= found <= OURS | TYPER
    assert "melora-fx" in out
    assert err == ""


@pytest.mark.slow
def test_a_fold_on_disk_needs_no_transformers(tmp_path: Path) -> None:
    folders = Folders(tmp_path / "folders")
    folders.prepare(llama(), ["q_proj", "up_proj"])
    places = [str(folders.base), str(folders.adapter), "-o", str(folders.out)]
    run = f"sys.argv = ['melora-fx', 'fold', *{places}]\nfrom exporters.cli.commands import main\nmain()"
    found, out, err = added(tmp_path, "import torch", run)
    assert OURS <= found <= OURS | TYPER | {"numpy", "rich", "safetensors"}
    assert "contains adapter" in out
    assert err == ""


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_the_table_holds_the_public_names(package: Any) -> None:
    assert sorted(name for names in package._MODULES.values() for name in names) == sorted(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    for module, names in package._MODULES.items():
        for name in names:
            assert getattr(package, name) is getattr(sys.modules[f"{package.__name__}.{module}"], name)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_a_star_brings_the_public_names() -> None:
    names: dict[str, Any] = {}
    exec("from melora_fx import *", names)
    assert [name for name in names if name != "__builtins__"] == melora_fx.__all__


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_no_file_hides_a_public_name(package: Any) -> None:
    beside = {path.stem for path in Path(package.__file__).parent.iterdir()}
    assert beside.isdisjoint(package.__all__)
