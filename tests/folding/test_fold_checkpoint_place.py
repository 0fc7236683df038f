"""Places that a fold on disk must refuse to write to."""

import os
from typing import Any

import pytest
from support.fold_folders import (
    CONFIG,
    SINGLE,
    Folders,
    names,
)
from support.models import (
    bert,
)

import melora_fx
from melora_fx import MELoRAError
from melora_fx.folding import fold_checkpoint as module


@pytest.mark.parametrize("out", ["base", "base/out", "base/a/b", "base/../base/out", "link", "link/out"])
def test_place_in_the_base(out: str, folders: Folders) -> None:
    folders.prepare(bert(), "query")
    (folders.parent / "link").symlink_to(folders.base)
    folders.assert_refused("is the folder that is read, or in it: name another place", folders.parent / out)


def test_place_that_is_taken(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    folders.out.mkdir()
    (folders.out / "mine").write_text("mine")
    (folders.parent / "file").write_text("mine")
    text = "exists already: remove it, or name another folder"
    folders.assert_refused(f"out` {text}")
    folders.assert_refused(f"file` {text}", folders.parent / "file")
    folders.assert_refused(f"adapter` {text}", folders.adapter)


def test_empty_folder_is_a_place(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    folders.out.mkdir()
    folders.fold()
    assert names(folders.out) == {SINGLE, CONFIG}


def test_place_that_is_made_with_the_folders_above(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    melora_fx.fold_checkpoint(str(folders.base), str(folders.adapter), str(folders.parent / "a b" / "mö ∂" / "v1.2"))
    assert names(folders.parent / "a b" / "mö ∂") == {"v1.2"}
    assert names(folders.parent / "a b" / "mö ∂" / "v1.2") == {SINGLE, CONFIG}


def test_relative_paths(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.prepare(bert(), "query")
    monkeypatch.chdir(folders.parent)
    melora_fx.fold_checkpoint("base", "adapter", "out")
    assert names(folders.parent) == {"base", "adapter", "out"}
    monkeypatch.chdir(folders.base)
    folders.assert_refused("is the folder that is read, or in it", "x")


@pytest.mark.parametrize("out", ["file/out", "n" * 300, "n" * 250], ids=["below_a_file", "name_too_long", "almost"])
def test_place_that_cannot_be_made(out: str, folders: Folders) -> None:
    folders.prepare(bert(), "query")
    (folders.parent / "file").write_text("mine")
    folders.assert_refused("cannot be written", folders.parent / out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the previous test covers it")
def test_place_without_permission(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    folders.parent.chmod(0o500)
    try:
        folders.assert_refused("cannot be written: Permission denied")
    finally:
        folders.parent.chmod(0o700)


def test_place_that_another_has_taken_meanwhile(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.prepare(bert(), "query")
    write_config = module._write_config

    def taken(*args: Any) -> None:
        write_config(*args)
        folders.out.mkdir()
        (folders.out / "theirs").write_text("theirs")

    monkeypatch.setattr(module, "_write_config", taken)
    with pytest.raises(MELoRAError, match="out` exists already"):
        melora_fx.fold_checkpoint(folders.base, folders.adapter, folders.out)
    assert names(folders.parent) == {"base", "adapter", "out"}
    assert names(folders.out) == {"theirs"}


def test_file_of_the_base_that_cannot_be_read_is_named(folders: Folders) -> None:
    folders.prepare(bert(), "query")
    (folders.base / "vocab.txt").symlink_to("nowhere")
    with folders.refused(r"base.*vocab\.txt` cannot be read"):
        melora_fx.fold_checkpoint(folders.base, folders.adapter, folders.out)
