"""The journal of predictions: nothing is lost, nothing is done twice, nothing stays in memory."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from eecs598.deploy import Journal

FACTS = {"checkpoint": "best.pt", "score_thresh": 0.4}


def result(index: int) -> dict:
    return {"path": f"{index}.jpg", "detections": [{"score": 0.5}] * (index % 3)}


def started(folder, num_images: int) -> Journal:
    journal = Journal(folder, num_images)
    journal.begin(FACTS)
    return journal


def test_results_of_several_processes_are_merged_in_order(tmp_path):
    journal = started(tmp_path, 7)
    for process in (1, 0):
        with journal.appending(process) as file:
            for index in range(process, 7, 2):
                entry = {"path": "5.jpg", "error": "broken"} if index == 5 else result(index)
                journal.write(file, index, entry)
    totals = journal.merge(tmp_path / "all.json", FACTS)
    assert totals == (6, 1, 4)
    merged = json.loads((tmp_path / "all.json").read_text())
    assert merged == {
        **FACTS,
        "images": [result(index) for index in range(7) if index != 5],
        "skipped": [{"path": "5.jpg", "error": "broken"}],
    }
    journal.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["all.json"]


def test_after_a_crash_the_half_line_is_done_again(tmp_path):
    journal = started(tmp_path, 4)
    with journal.appending(0) as file:
        for index in (0, 2):
            journal.write(file, index, result(index))
        file.write(b'{"index": 1, "path": "1.j')
    again = Journal(tmp_path, 4)
    assert again.read().tolist() == [1, 3]
    with pytest.raises(ValueError, match="2 of 4 images have no result"):
        again.merge(tmp_path / "all.json", FACTS)
    assert not (tmp_path / "all.json").exists()
    with again.appending(0) as file:
        for index in (1, 3):
            again.write(file, index, result(index))
    again.merge(tmp_path / "all.json", FACTS)
    merged = json.loads((tmp_path / "all.json").read_text())
    assert merged["images"] == [result(index) for index in range(4)] and merged["skipped"] == []


def test_no_image_at_all_is_valid_json(tmp_path):
    journal = started(tmp_path, 1)
    with journal.appending(0) as file:
        journal.write(file, 0, {"path": "a", "error": "broken"})
    journal.merge(tmp_path / "all.json", FACTS)
    assert json.loads((tmp_path / "all.json").read_text())["images"] == []


def test_other_facts_are_refused(tmp_path):
    journal = started(tmp_path, 1)
    journal.check(FACTS)
    with pytest.raises(ValueError, match="score_thresh differ.*--out"):
        journal.check({**FACTS, "score_thresh": 0.5})


def test_memory_does_not_grow_with_the_results(tmp_path):
    count, long = 2000, {"path": "a.jpg", "detections": [{"label": "x" * 500}] * 4}
    journal = started(tmp_path, count)
    tracemalloc.start()
    try:
        with journal.appending(0) as file:
            for index in range(count):
                journal.write(file, index, long)
        journal.merge(tmp_path / "all.json", FACTS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "all.json").stat().st_size > 4_000_000
    assert peak < 400_000
