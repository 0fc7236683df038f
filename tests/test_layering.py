"""Rooms import only rooms above them in the list; there are no import cycles."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_ROOMS = {
    "melora_fx": """
        errors config torch_private versions names shared_memory files progress tables load_model
        adapter distributed capture whole_capture patterns lowering live matching rewriting saving folding __init__
    """,
    "exporters": """
        onnx_runtime private hugging_face example_inputs export_report
        onnx_files export_files adapters peft_adapters decoders spelling graph runtime onnx_fold measuring generation
        tensorrt_check triton_server
        verify targets export_checks export training demo cli __init__
    """,
}
ORDER = {package: rooms.split() for package, rooms in _ROOMS.items()}
LIBRARIES = {"torch", "nn", "fx", "transformers", "accelerate", "onnx", "onnx_ir", "onnxruntime", "ort"}
FORBIDDEN = {"melora_fx": {"exporters", "onnx", "onnx_ir", "onnxruntime", "onnxscript"}, "exporters": set[str]()}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    """Returns the dotted name of a file, including `__init__`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_of(path) for package in ORDER for path in files(package)}


def imports(path: Path) -> Iterator[str]:
    """Yields the dotted names that a file imports, also in functions and with `_later`: modules and names in them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            own = module_of(path).split(".")[: -node.level] if node.level else []
            base = ".".join([*own, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "_later":
            yield from (ast.literal_eval(argument) for argument in node.args)


def resolve(name: str) -> str | None:
    """Returns our module that an imported name is, or is in; None for other packages."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        for module in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if module in MODULES:
                return module
    return None


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("package", ORDER)
def test_every_room_stands_in_the_list(package: str) -> None:
    assert {room_of(module_of(path)) for path in files(package)} == set(ORDER[package])


@pytest.mark.parametrize("package", ORDER)
def test_rooms_import_only_what_stands_above_them(package: str) -> None:
    floor = {room: number for number, room in enumerate(ORDER[package])}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(package)
        for name in imports(path)
        if (module := resolve(name)) is not None
        and module.split(".")[0] == package
        and floor[room_of(module)] > floor[room_of(module_of(path))]
    ]
    assert wrong == []


@pytest.mark.parametrize("package", FORBIDDEN)
def test_the_library_needs_no_exporter(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(package)
        for name in imports(path)
        if name.split(".")[0] in FORBIDDEN[package]
    ]
    assert wrong == []


def borrowed(path: Path) -> Iterator[str]:
    """Yields the names that a file uses from other packages."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] in LIBRARIES:
            yield ast.unparse(node)


def test_internals_are_borrowed_in_files_of_their_own() -> None:
    """Attributes of instances are not checked, because syntax cannot distinguish them from our own."""
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for package in ORDER
        for path in files(package)
        if path.stem not in ("torch_private", "private")
        for name in borrowed(path)
        if re.search(r"(^|\.)_[a-zA-Z]", name) and not name.startswith("torch.ops.aten.")
    ]
    assert wrong == []


def test_no_import_circle() -> None:
    """Between files; `graphlib` raises an error that names the cycle."""
    needs = {
        module_of(path): {module for name in imports(path) if (module := resolve(name)) and module != module_of(path)}
        for package in ORDER
        for path in files(package)
    }
    assert len(list(TopologicalSorter(needs).static_order())) == len(MODULES)


def test_no_test_file_imports_another() -> None:
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")} | {"conftest"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "tests").rglob("*.py")
        for name in imports(path)
        if name.split(".")[0] in tests
    ]
    assert wrong == []


def test_sizes() -> None:
    """A file can be read in one sitting, a folder at one glance, except tests and benchmarks."""
    paths = [path for package in ORDER for path in files(package)]
    assert {path: n for path in paths if (n := len(path.read_text().splitlines())) > 300} == {}
    folders = {path.parent for path in paths}
    assert {folder: n for folder in folders if (n := len(list(folder.glob("*.py"))) - 1) > 16} == {}


def test_every_folder_lists_its_files() -> None:
    for init in (path for package in ORDER for path in files(package) if path.name == "__init__.py"):
        if init.parent.name in ORDER:
            continue  # the package's own is a table of public names
        listed = {
            name for line in ast.get_docstring(ast.parse(init.read_text())).splitlines() for name in _listed(line)
        }
        assert listed == {path.stem for path in init.parent.glob("*.py")} - {"__init__", "__main__"}, init


def _listed(line: str) -> list[str]:
    """Returns the files that a line of a folder's docstring describes: the names before two spaces."""
    names, gap, _ = line.partition("  ")
    return names.split(", ") if gap else []
