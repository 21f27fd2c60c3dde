"""Find submissions whose own code is nearly identical, token by token.

It compares the functions that students write: not those of the handout, no comments and no
docstrings, and names of variables count as equal. What most submissions have is taken out. A high
share accuses nobody; it says where to look.
"""

from __future__ import annotations

import ast
import builtins
import io
import keyword
import os
import tokenize
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from eecs598.grading.source import index_modules, parse_file
from eecs598.grading.submission import PUBLIC_NAMES

__all__ = ["SimilarPair", "similar_pairs"]

LENGTH = 12  # tokens that are compared together
ALIKE = 0.7  # share from which a pair is listed
MIN_SHINGLES = 60  # of a submission; less says nothing
MAX_PAIRS = 200

# Written by students; fcos_match_locations_to_gt and a4_helper.py are handed out.
OWN_NAMES = {
    name
    for part in ("common", "one_stage_detector")
    for name in PUBLIC_NAMES[part]
    if name != "fcos_match_locations_to_gt"
}

Shingle = tuple[str, ...]


@dataclass(frozen=True)
class SimilarPair:
    """Two submissions with nearly the same code.

    Attributes:
        first: name of one.
        second: name of the other.
        share: of the smaller one's sequences of tokens that the other has, too.
        functions: the functions and classes that are most alike.
    """

    first: str
    second: str
    share: float
    functions: tuple[str, ...]


def similar_pairs(folders: Mapping[str, str | os.PathLike[str]]) -> list[SimilarPair]:
    """List pairs of nearly identical submissions, the most similar first.

    Args:
        folders: name -> folder of each submission.
    """
    texts = {name: _shingles_by_function(Path(folder)) for name, folder in folders.items()}
    whole = {name: frozenset().union(*parts.values()) for name, parts in texts.items()}
    counts = Counter(shingle for shingles in whole.values() for shingle in shingles)
    # Of few submissions, what two have need not be what all have.
    common = {s for s, number in counts.items() if number > max(2, len(folders) / 2)}
    pairs = []
    for one, other in combinations(folders, 2):
        if min(len(whole[one]), len(whole[other])) < MIN_SHINGLES:
            continue
        if whole[one] == whole[other]:
            share = 1.0
        else:
            share = _share(whole[one] - common, whole[other] - common)
        if share >= ALIKE:
            alike = [
                name
                for name in texts[one].keys() & texts[other].keys()
                if _share(texts[one][name], texts[other][name], at_least=1) >= ALIKE
            ]
            pairs.append(SimilarPair(one, other, round(share, 3), tuple(sorted(alike))))
    return sorted(pairs, key=lambda pair: -pair.share)[:MAX_PAIRS]


def _share(one: frozenset[Shingle], other: frozenset[Shingle], at_least: int = 60) -> float:
    smaller = min(len(one), len(other))
    return len(one & other) / smaller if smaller >= at_least else 0.0


def _shingles_by_function(folder: Path) -> dict[str, frozenset[Shingle]]:
    found: dict[str, set[Shingle]] = {}
    try:
        files = index_modules(folder)
    except OSError:
        return {}
    for name, path in files.items():
        if name.startswith("eecs598."):
            continue
        try:
            tree, _ = parse_file(path, path.name)
        except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
            continue
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in OWN_NAMES:
                try:
                    tokens = _tokens(node)
                except (ValueError, RecursionError):  # too deep to be written as text
                    continue
                starts = range(max(len(tokens) - LENGTH + 1, 0))
                shingles = {tuple(tokens[n : n + LENGTH]) for n in starts}
                found.setdefault(node.name, set()).update(shingles)
    return {name: frozenset(shingles) for name, shingles in found.items()}


def _tokens(node: ast.AST) -> Sequence[str]:
    """Return the tokens of a function or class, without docstrings; variables as "v"."""
    for inner in ast.walk(node):
        body = getattr(inner, "body", None)
        if isinstance(body, list) and len(body) > 1:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                inner.body = body[1:]  # type: ignore[attr-defined]
    tokens, after_dot = [], False
    for token in tokenize.generate_tokens(io.StringIO(ast.unparse(node)).readline):
        if token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER, tokenize.COMMENT):
            continue
        text = token.string
        is_variable = token.type == tokenize.NAME and not (
            after_dot or keyword.iskeyword(text) or hasattr(builtins, text) or text == "torch"
        )
        tokens.append("v" if is_variable else text.strip() or tokenize.tok_name[token.type])
        after_dot = text == "."
    return tokens
