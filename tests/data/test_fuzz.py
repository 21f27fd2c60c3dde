"""Damaged files: each is read or refused with a sentence that names it; see tests/data/fuzz.py."""

from __future__ import annotations

import pytest

from tests.data import fuzz


@pytest.mark.filterwarnings("ignore")  # Pillow's, about damaged files
def test_mutated_files():
    faults: list[str] = []
    results = fuzz.run_cases(300 * len(fuzz.KINDS), seed=0, report=faults.append)
    assert faults == []
    for kind in fuzz.KINDS:
        # Both happen often, so the cases are neither too tame nor too wild.
        assert results[f"{kind}: read"] >= 15 and results[f"{kind}: refused"] >= 15, results


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("xml", fuzz.XML.replace(b"20.5", b"2_5")),  # which Python reads as 25
        ("coco", fuzz.COCO.replace(b"20.5", b"true")),
        ("list", b"/etc/passwd"),
    ],
)
def test_what_was_wrong_once(tmp_path, kind, data):
    """Each of these was read, or refused with the name of another file."""
    fuzz.make_folder(tmp_path)
    run, *_ = fuzz.KINDS[kind]
    with pytest.raises(ValueError, match=str(tmp_path)):
        run(tmp_path, data)


@pytest.mark.parametrize("kind", ["xml", "coco", "course index"])
def test_a_box_that_is_not_in_the_file_is_found(tmp_path, kind, monkeypatch):
    fuzz.make_folder(tmp_path)
    monkeypatch.setattr(fuzz, "boxes_of", lambda _: [[1.0, 2.0, 20.5, 30.25]])
    run, (original, *_), _ = fuzz.KINDS[kind]
    with pytest.raises(AssertionError, match="is not in the file"):
        run(tmp_path, original)
