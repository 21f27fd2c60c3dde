"""Files are whole or as they were, and a folder has one owner at a time."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

from eecs598.runtime.files import atomic_write, folder_lock, remove_unfinished, write_json


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("before")
    with pytest.raises(RuntimeError), atomic_write(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_a_write_makes_folders_and_keeps_the_suffix(tmp_path):
    path = tmp_path / "new/deep/plot.png"
    with atomic_write(path) as unfinished:
        assert unfinished.suffix == ".png" and not path.exists()
        unfinished.write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and len(list(path.parent.iterdir())) == 1


def test_what_a_killed_process_left_is_removed(tmp_path):
    code = (
        "import os, sys; from eecs598.runtime.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as path: path.write_text('half'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")], check=True)
    (tmp_path / "b.json").write_text("whole")
    assert len(list(tmp_path.iterdir())) == 2 and not (tmp_path / "a.json").exists()
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


def test_a_folder_is_locked_against_a_running_process_only(tmp_path):
    lock = tmp_path / ".lock"
    parent = f"{platform.node()} {os.getppid()}"
    lock.write_text(parent)
    with (
        pytest.raises(ValueError, match=f"process {os.getppid()} is working"),
        folder_lock(tmp_path),
    ):
        pass
    assert lock.read_text() == parent
    for other in (f"{platform.node()} {2**22 + 1}", f"elsewhere {os.getppid()}", "a b", ""):
        lock.write_text(other)
        with folder_lock(tmp_path):
            assert lock.read_text() == f"{platform.node()} {os.getpid()}"
        assert not lock.exists()


def test_write_json(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, None]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": [1, None]} and text.endswith("}\n")
