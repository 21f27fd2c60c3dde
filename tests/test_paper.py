"""``docs/paper.md`` names functions and tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    line
    for line in (ROOT / "docs/paper.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and "](../" in line
]
LINK = re.compile(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)")


@cache
def names_in(file: str) -> set[str]:
    """Functions, classes and methods of a file."""
    names = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return names


def test_the_page_has_rows():
    assert len(ROWS) > 20


@pytest.mark.parametrize("row", ROWS, ids=[row.split(" | ")[0].strip("| ") for row in ROWS])
def test_each_row_names_a_function_and_a_test_that_exist(row):
    links = LINK.findall(row)
    assert len(links) == row.count("](")  # no link is spelled in another way
    missing = [f"{file}: {name}" for name, file in links if name not in names_in(file)]
    assert missing == []
    _, _, _, functions, tests, _ = re.split(r"\s*\|\s*", row)
    assert LINK.findall(functions) and not any(
        f.startswith("tests") for _, f in LINK.findall(functions)
    )
    assert all(name.startswith("test_") for name, _ in LINK.findall(tests)) and LINK.search(tests)
