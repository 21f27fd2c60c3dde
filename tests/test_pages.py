"""The pages: length, links, paths, the map of the README, and the commands that they show."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eecs598.data import AUGMENTATIONS
from eecs598.training.settings import SETTINGS
from fcos.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "RESULTS.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMANDS = ("train", "eval", "predict", "export", "demo", "score")
COMMANDS += ("data check", "data shapes", "grade")

# Options in running text that belong to other programs than `fcos`.
OTHER_OPTIONS = {"--nproc-per-node", "--rows", "--seeds", "--table"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.mark.parametrize(
    ("name", "limit"), [("README.md", 1000), ("RESULTS.md", 1800), ("CONTRIBUTING.md", 750)]
)
def test_pages_are_short(name, limit):
    assert len((ROOT / name).read_text(encoding="utf-8").split()) <= limit  # as `wc -w` counts


# --------------------------------------------------------------------------------------------
# Links and paths
# --------------------------------------------------------------------------------------------


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if re.match(r"[a-z]+:", target):  # another site
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}, and there is no such file"
        if anchor and file.suffix == ".md":
            assert anchor in _anchors(file), f"{page.name} links to {target}: no such heading"


@each_page
def test_paths_in_the_text_exist(page):
    folders = {package.relative_to(ROOT).parts[0] for package in _packages()}
    folders |= {"docs", "tests", ".ci", ".github"}
    for code in re.findall(r"`([^`\s]+)`", _prose(page)):
        path = code.split("::")[0]
        looks_like_a_path = path.split("/")[0] in folders and "/" in path
        if looks_like_a_path or re.fullmatch(r"[a-z]\w+\.(py|ipynb|toml)", path):
            places = (ROOT, page.parent, *_packages())
            found = any((place / path).exists() for place in places)
            assert found or page.name == "CHANGELOG.md", f"{page.name} names {path}: not there"


def test_the_map_has_every_folder():
    rows = re.findall(r"^\| (.+?) \|", _section(ROOT / "README.md", "Map"), re.MULTILINE)
    shown = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    missing = [name for name in shown if not (ROOT / name).exists()]
    assert not missing, f"the map shows {missing}, which do not exist"
    packages = {f"{path.relative_to(ROOT).as_posix()}/" for path in _packages()}
    assert packages | {"docs/", "tests/"} == {name for name in shown if name.endswith("/")}


# --------------------------------------------------------------------------------------------
# Commands and code
# --------------------------------------------------------------------------------------------


class _Parsed(Exception):
    """Ends a command whose arguments were accepted, before it does anything."""

    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result


@pytest.fixture
def parse_only(monkeypatch):
    """Make every command line program end as soon as its arguments are parsed."""
    depth = 0  # subcommands are parsed within the program's own call

    def ending(parse):
        def parse_and_end(*args, **kwargs):
            nonlocal depth
            depth += 1
            try:
                result = parse(*args, **kwargs)
            finally:
                depth -= 1
            if depth:
                return result
            raise _Parsed(result)

        return parse_and_end

    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(
            argparse.ArgumentParser, name, ending(getattr(argparse.ArgumentParser, name))
        )


@each_page
def test_fcos_accepts_the_commands(page, parse_only, capsys):
    for line in _shell_lines(page):
        arguments = _arguments_of_fcos(line)
        if arguments is not None:
            _check_fcos(arguments, line, capsys)


@each_page
def test_benchmarks_accept_the_commands(page, parse_only, capsys, monkeypatch):
    for line in _shell_lines(page):
        words = shlex.split(line, comments=True)
        if words[:2] != ["python", "-m"] or words[2].split(".")[0] != "benchmarks":
            continue
        module = importlib.import_module(words[2] if "." in words[2] else f"{words[2]}.__main__")
        monkeypatch.setattr(sys, "argv", [words[2], *words[3:]])
        try:
            module.main()
        except _Parsed as parsed:
            result = parsed.result
        except SystemExit:
            pytest.fail(f"{line}\n{capsys.readouterr().err}")
        if isinstance(result, tuple):  # what the program does not know goes on to `fcos train`
            _check_fcos(["train", *result[1]], line, capsys)


def test_commands_are_found_and_refused(parse_only, capsys):
    """The tests above can fail: a wrong option is refused, wherever the command stands."""
    assert _arguments_of_fcos("exec venv/bin/fcos grade x") == ["grade", "x"]
    assert _arguments_of_fcos("torchrun --nproc-per-node 4 -m fcos train") == ["train"]
    assert _arguments_of_fcos("pip install ./fcos") is None
    with pytest.raises(pytest.fail.Exception):
        _check_fcos(["train", "--no-such-option"], "", capsys)
    assert sum(_arguments_of_fcos(line) is not None for line in _shell_lines(PAGES[0])) > 5


@each_page
def test_options_in_the_text_exist(page, capsys):
    known = set(OTHER_OPTIONS)
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        known |= set(_options(capsys.readouterr().out))
    if page.name == "CHANGELOG.md":
        return  # which names old options, too
    for code in re.findall(r"`([^`]+)`", _prose(page)):
        if not code.startswith(("pip", "python", "git")):
            unknown = set(_options(code)) - known
            assert not unknown, f"{page.name} names {unknown}, which no command has"


def test_every_setting_and_augmentation_is_in_the_tables():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for group, settings in SETTINGS.items():
        (row,) = re.findall(rf"^\| {group} \| (.*) \|$", text, re.MULTILINE)
        assert row.split(", ") == [f"`--{setting.option}`" for setting in settings.values()]
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert [row for row in rows if row in AUGMENTATIONS] == list(AUGMENTATIONS)


@each_page
def test_imports_of_the_examples_work(page):
    for block in _blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page.name}: {ast.unparse(node)}"


# --------------------------------------------------------------------------------------------
# Reading Markdown
# --------------------------------------------------------------------------------------------


def _packages() -> list[Path]:
    """Return the packages of the repository, without those of the tests."""
    tops = {file.parent for file in ROOT.glob("*/__init__.py")} - {ROOT / "tests"}
    return sorted(file.parent for top in tops for file in top.rglob("__init__.py"))


def _prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def _section(page: Path, heading: str) -> str:
    return _prose(page).split(f"\n## {heading}\n")[1].split("\n## ")[0]


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def _blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def _shell_lines(page: Path) -> Iterator[str]:
    """Yield the commands of the bash blocks, one each."""
    for block in _blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield from re.split(r"\s+&&\s+|;\s+", line)


def _arguments_of_fcos(line: str) -> list[str] | None:
    """Return the arguments of a command that runs `fcos`, None for other commands."""
    if "fcos" not in line:
        return None
    words = shlex.split(line, comments=True)
    for place, word in enumerate(words):
        starts = place == 0 or words[place - 1] in ("exec", "-m")
        if starts and Path(word).name == "fcos":
            return words[place + 1 :]
    return None


def _check_fcos(arguments: list[str], line: str, capsys: pytest.CaptureFixture) -> None:
    try:
        main(arguments)
    except _Parsed:
        return
    except SystemExit:
        pytest.fail(f"{line}\n{capsys.readouterr().err}")
    pytest.fail(f"{line}: ran without argparse")


def _options(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)
