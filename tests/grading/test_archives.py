"""Submissions are found in what courses export, and nothing leaves its folder."""

from __future__ import annotations

import stat
import zipfile
from itertools import count
from pathlib import Path

import pytest

from eecs598.grading import archives, find_submissions


def pack(path: Path, members: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, text in members.items():
            packed.writestr(name, text)
    return path


@pytest.fixture
def find(tmp_path):
    """Return a function that gives name and files of each submission found in paths."""
    number = count()

    def names_and_files(*paths: Path) -> dict[str, list[str] | str | None]:
        work = tmp_path / f"work {next(number)}"
        work.mkdir()
        return {
            one.name: one.error
            if one.folder is None
            else sorted(str(f.relative_to(one.folder)) for f in one.folder.rglob("*.py"))
            for one in find_submissions([str(path) for path in paths], work)
        }

    return names_and_files


def test_a_folder_and_a_zip_file_are_a_submission(find, tmp_path):
    folder = tmp_path / "alice"
    folder.mkdir()
    (folder / "common.py").touch()
    assert find(folder) == {str(folder): ["common.py"]}
    archive = pack(tmp_path / "bob.zip", {"A4/common.py": "", "A4/fcos.pt": "x" * 99})
    assert find(archive) == {str(archive): ["common.py"]}


def test_folders_beside_zip_files_are_submissions_too(find, tmp_path):
    pack(tmp_path / "class/ann.zip", {"common.py": "", "one_stage_detector.py": ""})
    for name in ("bob/common.py", "pictures/a.png"):
        (tmp_path / "class" / name).parent.mkdir(parents=True)
        (tmp_path / "class" / name).write_text("")
    assert find(tmp_path / "class") == {
        "ann": ["common.py", "one_stage_detector.py"],
        "bob": ["common.py"],
    }


def test_exports_of_gradescope(find, tmp_path):
    members = {f"export/submission_{n}/common.py": "" for n in (12, 34)}
    archive = pack(tmp_path / "export.zip", {**members, "export/submission_metadata.yml": ":x"})
    assert find(archive) == {"submission_12": ["common.py"], "submission_34": ["common.py"]}


def test_exports_of_canvas(find, tmp_path):
    pack(tmp_path / "in/anna_11_22_A4.zip", {"common.py": ""})
    pack(tmp_path / "in/ben_LATE_33_44_A4-1.zip", {"A4\\common.py": ""})
    assert find(tmp_path / "in") == {
        "anna_11_22_A4": ["common.py"],
        "ben_LATE_33_44_A4-1": ["common.py"],
    }
    files = ("anna_11_22_common.py", "anna_11_23_x.txt", "ben_LATE_33_44_common-2.py")
    found = find(pack(tmp_path / "files.zip", dict.fromkeys(files, "")))
    assert found == {"anna_11_22": ["common.py"], "ben_LATE_33_44": ["common.py"]}


@pytest.mark.parametrize("name", ["../evil.py", "/tmp/evil.py", "a/../../evil.py", "C:\\evil.py"])
def test_no_member_leaves_its_folder(find, tmp_path, name):
    archive = pack(tmp_path / "in" / "evil.zip", {"common.py": "", name: ""})
    (problem,) = find(archive).values()
    assert problem.startswith("can't be unpacked: ") and "leads out of its folder" in problem
    assert not list(tmp_path.rglob("evil.py"))


def test_links_are_left_out(find, tmp_path):
    archive = tmp_path / "links.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        link = zipfile.ZipInfo("common.py")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(link, "/etc/passwd")
        packed.writestr("one_stage_detector.py", "")
    assert find(archive) == {str(archive): ["one_stage_detector.py"]}


def test_damaged_archives_are_named(find, tmp_path):
    """Their errors have many kinds, and the others are graded nevertheless."""
    whole = pack(tmp_path / "whole.zip", {"common.py": "x = 1\n" * 300}).read_bytes()
    start = whole.index(b"common.py") + len("common.py")
    damaged = tmp_path / "damaged.zip"
    for content in (whole[:-30], whole[:start] + b"\xff" * 6 + whole[start + 6 :]):
        damaged.write_bytes(content)
        assert str(find(damaged)[str(damaged)]).startswith("can't be unpacked: ")


def test_bombs_are_limited(find, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_TOTAL_BYTES", 2**20)
    monkeypatch.setattr(archives, "MAX_TOTAL_FILES", 50)
    large = find(pack(tmp_path / "large.zip", {"common.py": "0" * 2**21}))
    many = find(pack(tmp_path / "many.zip", {f"{n}.py": "" for n in range(60)}))
    (tmp_path / "broken.zip").write_bytes(b"PK")
    broken = find(tmp_path / "broken.zip")
    assert "unpacked" in str(large) and "more than 50 files" in str(many)
    assert "not a zip" in str(broken)
    deep = tmp_path / "0.zip"
    pack(deep, {"common.py": ""})
    for n in range(1, 8):
        with zipfile.ZipFile(tmp_path / f"{n}.zip", "w") as packed:
            packed.write(deep, "inner.zip")
        deep = tmp_path / f"{n}.zip"
    assert find(deep) == {str(deep): []}  # archives in archives are opened a few times only


def test_all_archives_in_an_archive_share_one_limit(find, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_TOTAL_BYTES", 3 * 2**20)
    monkeypatch.setattr(archives, "MAX_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "class.zip", "w") as packed:
        for name, size in {"ada": 900, "bob": 1100, "cy": 900, "dan": 900, "eve": 900}.items():
            inner = pack(tmp_path / f"{name}.zip", {"common.py": "0" * size * 2**10})
            packed.write(inner, f"{name}.zip")
    found = find(tmp_path / "class.zip")
    refused = [name for name, files in found.items() if "unpacked" in str(files)]
    assert refused == ["bob", "eve"]  # one too large, one too many


def test_a_class_may_have_more_files_than_a_student(find, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILES", 2)
    flat = {f"submission_{n}/{file}": "" for n in range(3) for file in ("common.py", "picture.png")}
    pack(tmp_path / "flat.zip", flat)
    assert list(find(tmp_path / "flat.zip").values()) == [["common.py"]] * 3
    with zipfile.ZipFile(tmp_path / "class.zip", "w") as packed:
        for name, modules in {"ada": 2, "bob": 3}.items():
            files = {f"{n}.py": "" for n in range(modules)} | {f"{n}.png": "" for n in range(9)}
            packed.write(pack(tmp_path / f"{name}.zip", files), f"{name}.zip")
    found = find(tmp_path / "class.zip")
    assert found["ada"] == ["0.py", "1.py"] and "more than 2 files" in str(found["bob"])


def test_two_submissions_of_one_name_stay_two(find, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        pack(tmp_path / folder / "ada.zip", {f"{folder}.py": ""})
        pack(tmp_path / folder / "bob.zip", {"common.py": ""})
    found = find(tmp_path / "a", tmp_path / "b")
    assert sorted(found) == ["ada", "ada (2)", "bob", "bob (2)"]
    assert found["ada"] == ["a.py"] and found["ada (2)"] == ["b.py"]
