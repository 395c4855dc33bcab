#!/usr/bin/env python
"""Refuse variables that are no nouns: pronouns, participles, prepositions. They say that something was found, not what.

    scripts/check_names.py [FILES]     every assignment in the packages, or in FILES; exits with 1 where one is refused
    scripts/check_names.py --count     how many there are in each folder

An assignment is what binds a name in a function, class or module: `=`, `:=`, `for`, `with ... as`, a comprehension, and
a private attribute of `self`. Parameters and public fields are not looked at: callers use them by name.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lamina", "workers/lamina_workers", "kernels/lamina_kernels", "protocols/lamina_protocols")
_WORDS = """
each found at left whole own most kept known said held given asked begun rest there those these this that here such same
both some any none nobody somebody whoever gone made taken wanted meant missed told shown seen heard spent by of to
without beside among between"""
REFUSED = frozenset(_WORDS.split())


def bound(node: ast.AST) -> Iterator[tuple[str, int]]:
    """The names that a target binds, with their lines."""
    if isinstance(node, ast.Name):
        yield node.id, node.lineno
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        if node.attr.startswith("_"):  # a public one is read by name elsewhere
            yield node.attr.lstrip("_"), node.lineno
    elif isinstance(node, (ast.Tuple, ast.List)):
        for item in node.elts:
            yield from bound(item)
    elif isinstance(node, ast.Starred):
        yield from bound(node.value)


def assignments(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that is bound anywhere in a module, with its line, but for fields of classes."""
    fields = {id(item) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for item in node.body}
    for node in ast.walk(tree):
        targets: list[ast.AST] = []
        if id(node) in fields:
            continue
        if isinstance(node, ast.Assign):
            targets = list(node.targets)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr, ast.For, ast.AsyncFor, ast.comprehension)):
            targets = [node.target]
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            targets = [node.optional_vars]
        for target in targets:
            yield from bound(target)


def refused(path: Path) -> list[tuple[str, int]]:
    names = assignments(ast.parse(path.read_text(encoding="utf-8")))
    return sorted({(name, line) for name, line in names if name in REFUSED}, key=lambda item: item[1])


def main(arguments: list[str]) -> int:
    count = "--count" in arguments
    paths = [Path(name).resolve() for name in arguments if name != "--count"]
    paths = paths or [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    folders: Counter[str] = Counter()
    status = 0
    for path in paths:
        place = path.relative_to(ROOT).as_posix()
        for name, line in refused(path):
            folders[place.rpartition("/")[0]] += 1
            if not count:
                print(f"{place}:{line}: {name!r} is no noun; say what it holds")
                status = 1
    for folder, number in sorted(folders.items()) if count else ():
        print(f"{number:5} {folder}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
