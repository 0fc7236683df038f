"""An adapter that was saved again is the one that runs, with one system call per run."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from support.exports import Exports
from support.models import assert_equal, randn, rewritten_tower

import melora_fx
from exporters import OrtRunner, write_ort_adapter
from exporters.runtime.adapter_cache import AdapterCache
from melora_fx import MELoRAError

X = {"x": randn(2, 24)}


@pytest.fixture(scope="module")
def graph(exports: Exports) -> Path:
    return Path(exports("adapted tower", adapter="swap").path)


def save(path: Path, graph: Path, sign: float = 1.0) -> None:
    """Saves the adapter of `rewritten_tower`, with B times `sign`, as a folder or file, always of the same size."""
    model = rewritten_tower()
    for site in melora_fx.sites(model).values():
        site.lora_b.data.mul_(sign)
    folder = path.with_suffix("")
    melora_fx.save_adapter(model, folder)
    if path.suffix:
        write_ort_adapter(folder, graph, path)


@pytest.mark.default_cases("adapter-plain", "adapter.onnx_adapter-bound")
@pytest.mark.parametrize("io_binding", [False, True], ids=["plain", "bound"])
@pytest.mark.parametrize("name", ["adapter", "adapter.onnx_adapter"])
def test_what_is_saved_to_the_same_place_runs_next(graph: Path, tmp_path: Path, name: str, io_binding: bool) -> None:
    runner = OrtRunner(graph, io_binding=io_binding)
    outputs = []
    for sign in (1.0, -1.0):
        save(tmp_path / name, graph, sign)
        outputs.append(runner.run(X, adapter=tmp_path / name)["output"])
    assert abs(outputs[1] - outputs[0]).max() > 0.1
    assert_equal(outputs[1], OrtRunner(graph, io_binding=io_binding).run(X, adapter=tmp_path / name)["output"])


def test_a_run_asks_the_system_once(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def counted(name: str) -> Any:
        own = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            asked.append(name)
            return own(*args, **options)

        return call

    save(tmp_path / "a.onnx_adapter", graph)
    runner = OrtRunner(graph)
    for path in (tmp_path / "a", tmp_path / "a.onnx_adapter"):
        runner.run(X, adapter=path)
        asked.clear()
        with monkeypatch.context() as patch:
            for name in ("stat", "lstat", "open", "listdir", "scandir"):
                patch.setattr(os, name, counted(name))
            runner.run(X, adapter=path)
            runner.run(X)
        assert asked == ["stat"]


def test_a_place_without_an_adapter_is_named(graph: Path, tmp_path: Path) -> None:
    runner = OrtRunner(graph)
    for path in (tmp_path / "none", tmp_path / "none.onnx_adapter"):
        with pytest.raises(MELoRAError, match=f"adapter `{path}` does not exist"):
            runner.run(X, adapter=path)
    with pytest.raises(MELoRAError, match=f"`{tmp_path}` is not an adapter folder"):
        runner.run(X, adapter=tmp_path)


def test_a_wrong_adapter_in_the_same_place_is_refused_until_it_is_right(graph: Path, tmp_path: Path) -> None:
    save(tmp_path / "a", graph)
    runner = OrtRunner(graph)
    expected = runner.run(X, adapter=tmp_path / "a")
    melora_fx.save_adapter(rewritten_tower(seed=1), tmp_path / "a")
    for _ in range(2):
        with pytest.raises(MELoRAError, match="sampled values differ"):
            runner.run(X, adapter=tmp_path / "a")
    save(tmp_path / "a", graph)
    assert_equal(runner.run(X, adapter=tmp_path / "a"), expected)


def test_the_least_recently_used_leaves(tmp_path: Path) -> None:
    read: list[str] = []
    cache = AdapterCache[str](2)
    for name in "abc":
        (tmp_path / name).write_text(name)

    def get(name: str) -> str:
        return cache.get(tmp_path / name, lambda path: (read.append(path.name), path.read_text())[1])

    assert [get(name) for name in "abaacabaa"] == list("abaacabaa")
    assert read == ["a", "b", "c", "b"]


def test_a_folder_that_becomes_a_file_is_read(tmp_path: Path) -> None:
    cache = AdapterCache[str](2)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter.safetensors").write_text("")
    assert cache.get(tmp_path / "a", lambda path: "folder") == "folder"
    (tmp_path / "a" / "adapter.safetensors").unlink()
    (tmp_path / "a").rmdir()
    (tmp_path / "a").write_text("")
    assert cache.get(tmp_path / "a", lambda path: "file") == "file"


@pytest.mark.parametrize("max_adapters", [0, -1, None, 1.5])
def test_no_room_for_an_adapter_is_refused(graph: Path, max_adapters: int) -> None:
    with pytest.raises(ValueError, match=r"`max_adapters` \(=.*\) must be a positive integer"):
        OrtRunner(graph, max_adapters=max_adapters)


def test_threads_run_the_old_adapter_or_the_new_one_and_then_the_new_one(graph: Path, tmp_path: Path) -> None:
    """With room for one adapter of two: each thread's run reads one while the others run theirs."""
    runner = OrtRunner(graph, threads=1, max_adapters=1)
    allowed: dict[str, list[bytes]] = {"a": [], "b": []}
    for name in allowed:
        for sign in (-1.0, 1.0):
            save(tmp_path / name, graph, sign if name == "a" else 2 * sign)
            allowed[name].append(runner.run(X, adapter=tmp_path / name)["output"].tobytes())
    assert len({output for outputs in allowed.values() for output in outputs}) == 4
    wrong: list[str] = []

    def work(names: str) -> None:
        for name in names * 5:
            output = runner.run(X, adapter=tmp_path / name)["output"].tobytes()
            if output not in allowed[name]:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(names,)) for names in ("ab", "ba", "aa", "bb")]
    for thread in threads:
        thread.start()
    for sign in (1.0, -1.0):
        save(tmp_path / "a", graph, sign)
    for thread in threads:
        thread.join()
    assert not wrong
    assert runner.run(X, adapter=tmp_path / "a")["output"].tobytes() == allowed["a"][0]
