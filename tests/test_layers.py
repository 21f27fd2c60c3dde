"""The layout: imports point down only, name packages and form no circle; no file is too long.

The three modules that the assignment fixes may have any length.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the top down. Parts of one layer do not import each other, apart from the lowest layer.
LAYERS = (
    ("benchmarks",),
    ("fcos", "notebook"),
    ("one_stage_detector", "a4_helper"),
    ("common",),
    ("eecs598.report", "eecs598.grading", "eecs598.deploy"),
    ("eecs598.training",),
    ("eecs598.data", "eecs598.metrics"),
    ("eecs598", "eecs598.utils", "eecs598.grad", "eecs598.runtime"),
)
BOTTOM = len(LAYERS) - 1
LAYER_OF = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}


class Import(NamedTuple):
    """An import statement of this project's own code."""

    place: str  # file and line
    importer: str  # module with the statement
    module: str  # what it names after "from" or "import"
    names: tuple[str, ...]  # what it takes from there


def part_of(module: str) -> str:
    """The part that a module belongs to: a top-level name, or a package or module of eecs598."""
    names = module.split(".")
    return ".".join(names[:2]) if names[0] == "eecs598" else names[0]


def modules(root: Path) -> dict[str, Path]:
    """All modules of the project by their dotted name."""
    files = [root / f"{name}.py" for name in ("common", "one_stage_detector", "a4_helper")]
    files += [
        file
        for folder in ("eecs598", "fcos", "benchmarks")
        for file in (root / folder).rglob("*.py")
    ]
    found = {}
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_in(tree: ast.AST, importer: str, file: str) -> Iterator[Import]:
    """The imports of this project's modules in a file, wherever they stand in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            found = [(node.module or "", tuple(alias.name for alias in node.names))]
        else:
            continue
        for module, names in found:
            if part_of(module) in LAYER_OF or module.split(".")[0] == "eecs598":
                yield Import(f"{file}:{node.lineno}", importer, module, names)


def all_imports(root: Path) -> list[Import]:
    """The imports of the modules and of the notebook's cells."""
    found: list[Import] = []
    for name, path in modules(root).items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += imports_in(tree, name, str(path.relative_to(root)))
    notebook = root / "one_stage_detector.ipynb"
    if notebook.is_file():
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                lines = (line for line in cell["source"] if not line.lstrip().startswith("%"))
                code = "".join(lines).replace("try:\nexcept", "try:\n    pass\nexcept")
                found += imports_in(ast.parse(code), "notebook", f"{notebook.name}, cell {number}")
    return found


def targets(found: Import, known: dict[str, Path]) -> set[str]:
    """The modules that an import statement names."""
    offered = names_offered(known[found.module]) if found.module in known else set()
    modules = {f"{found.module}.{name}" for name in found.names if name not in offered} & set(known)
    return modules if len(modules) == len(found.names) > 0 else {found.module, *modules}


def names_offered(file: Path) -> set[str]:
    """The names in ``__all__`` of a module, some of which may also be those of its own modules."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def broken_rules(root: Path) -> list[str]:
    """A sentence for each import that points up, sideways, or into a package."""
    known, sentences = modules(root), []
    for found in all_imports(root):
        own = part_of(found.importer)
        for target in sorted(targets(found, known)):
            part = part_of(target)
            sentence = f"{found.place}: {found.importer} imports {target}"
            if part == own:
                continue
            if unknown := {own, part} - set(LAYER_OF):
                sentences.append(f"{sentence}, but {min(unknown)} is not among the layers")
            elif LAYER_OF[part] < LAYER_OF[own]:
                sentences.append(f"{sentence}, which is above it")
            elif LAYER_OF[part] == LAYER_OF[own] != BOTTOM:
                sentences.append(f"{sentence}, which is beside it")
            elif target != part:
                sentences.append(f"{sentence}; expected an import from {part} itself")
    return sentences


def circle(root: Path) -> list[str]:
    """Modules that import each other in a circle; empty where there is none."""
    known = modules(root)
    graph: dict[str, set[str]] = {name: set() for name in known}
    for found in all_imports(root):
        if found.importer in graph:
            graph[found.importer] |= {name for name in targets(found, known) if name in known}
            graph[found.importer].discard(found.importer)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_point_down_and_name_packages():
    assert broken_rules(ROOT) == []


def test_there_is_no_circle():
    assert circle(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        (
            "eecs598/data/a.py",
            "from eecs598.training import x",
            "eecs598.training, which is above it",
        ),
        ("eecs598/data/a.py", "def f():\n    import common", "common, which is above it"),
        ("eecs598/data/a.py", "from eecs598.metrics import x", "which is beside it"),
        (
            "common.py",
            "from eecs598.data.b import x",
            "expected an import from eecs598.data itself",
        ),
        ("common.py", "from eecs598.data import b", "expected an import from eecs598.data itself"),
        ("a4_helper.py", "import one_stage_detector", "which is beside it"),
        ("eecs598/new/a.py", "import common", "but eecs598.new is not among the layers"),
    ],
)
def test_each_rule_is_seen_to_be_broken(tmp_path, file, line, complaint):
    for name in ("common.py", "one_stage_detector.py", "a4_helper.py"):
        (tmp_path / name).touch()
    for folder in ("data", "metrics", "training", "new"):
        (tmp_path / "eecs598" / folder).mkdir(parents=True)
        for name in ("__init__.py", "b.py"):
            (tmp_path / "eecs598" / folder / name).touch()
    (tmp_path / file).write_text(line + "\n", encoding="utf-8")
    (sentence,) = broken_rules(tmp_path)
    assert sentence.startswith(f"{file}:") and complaint in sentence


def test_a_circle_is_seen(tmp_path):
    for name in ("common.py", "one_stage_detector.py", "a4_helper.py"):
        (tmp_path / name).touch()
    (tmp_path / "eecs598/data").mkdir(parents=True)
    for one, other in ("ab", "bc", "ca"):
        text = f"from eecs598.data.{other} import x\n"
        (tmp_path / f"eecs598/data/{one}.py").write_text(text, encoding="utf-8")
    assert set(circle(tmp_path)) == {f"eecs598.data.{name}" for name in "abc"}


def too_long(root: Path) -> list[str]:
    """Files of more than 600 lines, or 250 for a command."""
    names = [
        file.relative_to(root).as_posix()
        for folder in ("eecs598", "fcos", "benchmarks", "tests")
        for file in sorted((root / folder).rglob("*.py"))
    ]
    lengths = {name: len((root / name).read_text(encoding="utf-8").splitlines()) for name in names}
    return [
        name
        for name, length in lengths.items()
        if length > (250 if name.startswith("fcos/") else 600)
    ]


def test_no_file_is_too_long():
    assert too_long(ROOT) == []


def test_long_files_are_seen(tmp_path):
    for name, length in (("fcos/a.py", 251), ("fcos/b.py", 250), ("eecs598/a.py", 601)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n" * length, encoding="utf-8")
    assert too_long(tmp_path) == ["eecs598/a.py", "fcos/a.py"]
