"""Files are whole or as they were, and a folder has one owner at a time."""

from __future__ import annotations

import json
import os
import platform
import re
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


HOLD = """
import os, sys, time
from eecs598.runtime.files import folder_lock
sys.stdin.readline()  # all of them start at the same moment
for _ in range(int(sys.argv[2])):
    try:
        with folder_lock(sys.argv[1]):
            os.mkdir(sys.argv[1] + "/inside")  # fails if another one is inside
            os.rmdir(sys.argv[1] + "/inside")
            if len(sys.argv) > 3:
                print("inside", flush=True)
                time.sleep(60)
    except ValueError as error:
        assert "is working in" in str(error), error
"""


def holder(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_folder_is_locked_until_its_process_ends_however_it_does(tmp_path):
    (tmp_path / ".lock").write_text("left by someone")
    with holder(tmp_path, 1, "wait") as process:
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "inside\n"
        words = f"process {process.pid} on {platform.node()} is working in"
        with pytest.raises(ValueError, match=re.escape(words)), folder_lock(tmp_path):
            pass
        process.kill()
        process.wait()
    assert (tmp_path / ".lock").exists()
    with folder_lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {platform.node()}"
    assert not (tmp_path / ".lock").exists()


def test_two_processes_never_get_a_lock_at_the_same_time(tmp_path):
    """Both enter and leave thousands of times: a lock that is removed is soon made again."""
    processes = [holder(tmp_path, 3000) for _ in range(2)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_write_json(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, None]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": [1, None]} and text.endswith("}\n")
