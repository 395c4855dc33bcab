"""README.md, CONTRIBUTING.md, docs/**/*.md and docstrings of rooms against the tree: files, folders, tests, headings
and import order that they name exist. docs/internals/log.md keeps the names of its time."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from bench import figures
from fault_tests import fault_tests

from lamina.system.text_files import read_toml

ROOT = Path(__file__).parents[2]
PACKAGES = ("lamina", "workers/lamina_workers", "kernels/lamina_kernels", "protocols/lamina_protocols")
TOP = ("lamina", "workers", "kernels", "protocols", "scripts", "tests", "docs")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
DOCUMENTS += [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "log.md"]
ROOMS = [init for package in PACKAGES for init in sorted((ROOT / package).rglob("__init__.py"))]
NAMED = [
    re.compile(rf"(?<![\w/.-])(?:{'|'.join(TOP)})/[\w./-]*[\w/]"),  # from the top: files and folders
    re.compile(r"(?<![\w/.-])[\w/-]+\.py\b"),  # beside what was named before: the end of a file's path
]
TEST = re.compile(r"([\w/-]+\.py)::(\w+)")
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@cache
def existing() -> frozenset[str]:
    """Every file and folder of the repository's own folders, without a slash at the end: the whole path, and each part
    of it that ends it."""
    paths = [(top,) for top in TOP]
    for top in TOP:
        paths += [p.relative_to(ROOT).parts for p in (ROOT / top).rglob("*") if "__pycache__" not in p.parts]
    return frozenset("/".join(parts[at:]) for parts in paths for at in range(len(parts)))


def headings(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub names them."""
    lines = FENCE.sub("", path.read_text()).splitlines()
    texts = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in texts}


def section(text: str, heading: str) -> str:
    """The first code block under a heading."""
    block = FENCE.search(text, text.index(f"\n## {heading}\n"))
    assert block is not None
    return block[1]


@pytest.mark.parametrize("document", [*DOCUMENTS, *ROOMS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_document_names_files_that_exist(document: Path) -> None:
    named = {name.rstrip("/.") for pattern in NAMED for name in pattern.findall(document.read_text())}
    assert sorted(named - existing()) == []


@cache
def defined(file: str) -> frozenset[str]:
    """The names of all tests in the files of tests/ whose paths end so."""
    files = [path for path in (ROOT / "tests").rglob(Path(file).name) if path.as_posix().endswith(f"/{file}")]
    return frozenset(re.findall(r"^ *(?:async )?def (test_\w+)", "\n".join(map(Path.read_text, files)), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_document_names_tests_that_exist(document: Path) -> None:
    named = TEST.findall(document.read_text())
    assert [f"{file}::{test}" for file, test in named if test not in defined(file)] == []


def test_reliability_has_a_row_and_tests_for_each_group_of_faults() -> None:
    rows = re.findall(r"^\| (F\d\d) \|", (ROOT / "docs" / "internals" / "reliability.md").read_text(), re.MULTILINE)
    assert rows == [f"F{number:02}" for number in range(1, 33)]
    assert sorted(fault_tests()) == rows


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_document_links_to_files_and_headings_that_exist(document: Path) -> None:
    for target, heading in LINK.findall(document.read_text()):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path = document.parent / target if target else document
        assert path.exists(), f"{document.name} links to {target}"
        if heading:
            assert heading in headings(path), f"{document.name} links to {target}#{heading}"


def test_documents_together_are_read_in_a_day_and_those_for_users_in_half_a_day() -> None:
    documents = list((ROOT / "docs").rglob("*.md"))
    assert sum(path.stat().st_size for path in documents) <= 220_000
    assert sum(path.stat().st_size for path in documents if path.parent.name == "docs") <= 110_000


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_readme_lists_every_room_once() -> None:
    folders: set[str] = set()
    stack: list[tuple[int, str]] = []  # indentation and path of the folders around a line
    for line in filter(str.strip, section((ROOT / "README.md").read_text(), "The rooms").splitlines()):
        indent, name = len(line) - len(line.lstrip()), line.split()[0].rstrip("/")
        stack = [around for around in stack if around[0] < indent]
        stack.append((indent, f"{stack[-1][1]}/{name}" if stack else name))
        assert stack[-1][1] not in folders or stack[-1][1] == "lamina"  # in the core and in the annexes
        folders.add(stack[-1][1])
    listed = [folder for folder in folders if folder.startswith(tuple(f"{package}/" for package in PACKAGES))]
    rooms = [init.parent for package in PACKAGES for init in (ROOT / package).rglob("*/__init__.py")]
    assert sorted(listed) == sorted(room.relative_to(ROOT).as_posix() for room in rooms)


def test_every_figure_of_the_performance_page_was_printed_by_a_command_at_its_commit() -> None:
    text = (ROOT / "docs" / "internals" / "performance.md").read_text()
    blocks = list(figures.BLOCK.finditer(text))
    assert len(blocks) == len(FENCE.findall(text)) >= 5
    assert not [block["command"] for block in blocks if not block["output"] or block["output"].startswith("(")]
    assert re.search(r"^Machine: .+ commit [0-9a-f]{7,}; .+ 20\d\d\.$", text, re.MULTILINE)


WALKS = {"A request's life": (50, 20), "A head's policy, from TOML to a list of pages": (29, 2)}
WALKS["When an attention worker dies"] = (32, 15)


def items(walk: str) -> list[str]:
    """The numbered items of a walk of docs/internals/design.md."""
    text = (ROOT / "docs" / "internals" / "design.md").read_text()
    body = re.split(r"^## ", text[text.index(f"\n## {walk}\n") + 4 :], maxsplit=1, flags=re.MULTILINE)[0]
    return re.split(r"^\d+\. ", body, flags=re.MULTILINE)[1:]


def steps(walk: str) -> list[str]:
    """The files that a walk names, in order: the paths in backticks, each whole, or a bare name in the folder of the
    one before it."""
    files: list[str] = []
    for name in re.findall(r"`([\w/]+\.py)`", "".join(items(walk))):
        path = name if "/" in name else f"{files[-1].rpartition('/')[0]}/{name}"
        if not files or files[-1] != path:
            files.append(path)
    return files


def first_of_items(walk: str) -> set[str]:
    """The first file of each item, where it is named whole."""
    return {name for item in items(walk) for name in re.findall(r"`([\w/]+\.py)`", item)[:1] if "/" in name}


@cache
def imported_by(file: str) -> frozenset[str]:
    """The modules that a file imports anywhere, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def module(file: str) -> str:
    return re.sub(r"^(workers|kernels|protocols)/", "", file).removesuffix(".py").replace("/", ".")


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_is_as_short_as_it_should_be(walk: str) -> None:
    files = steps(walk)
    returns = sum(file in files[:index] for index, file in enumerate(files))
    assert (len(set(files)), returns) <= WALKS[walk], f"{len(set(files))} files, {returns} returns"
    assert returns <= WALKS[walk][1], f"{returns} returns"


@pytest.mark.parametrize("walk", WALKS)
def test_each_step_of_a_walk_is_an_import(walk: str) -> None:
    """A file of a walk is imported by one before it, or imports one. A numbered item may begin anywhere: there the walk
    goes on by a message, on another thread or in another process."""
    files, begins = steps(walk), first_of_items(walk)
    for index, file in enumerate(files[1:], 1):
        before = set(files[:index])
        known = any(module(file) in imported_by(other) for other in before)
        connected = known or imported_by(file) & {module(other) for other in before}
        assert connected or file in begins, f"no file before it knows {file}"


def test_design_shows_the_import_order_of_the_contracts() -> None:
    contracts = read_toml(ROOT / "scripts" / "layers.toml")["tool"]["importlinter"]["contracts"]
    expected = {c.get("containers", ["packages"])[0]: c["layers"] for c in contracts if c["type"] == "layers"}
    shown: dict[str, str] = {}
    design = (ROOT / "docs" / "internals" / "design.md").read_text()
    for line in filter(str.strip, section(design, "Import order").splitlines()):
        name, order = ("", line) if line.startswith(" ") else line.split(maxsplit=1)
        name = name or list(shown)[-1]
        shown[name] = f"{shown.get(name, '')} {order.strip()}"
    assert {name: [layer.strip() for layer in order.split(">")] for name, order in shown.items()} == expected


def test_every_room_is_of_the_core_or_an_annex() -> None:
    configs = (read_toml(ROOT / name)["tool"]["importlinter"] for name in ("pyproject.toml", "scripts/layers.toml"))
    loaded, read = (
        next(contract for contract in config["contracts"] if contract["name"].startswith("the core stands"))
        for config in configs
    )
    assert loaded == read
    rooms = [path for path in (ROOT / "lamina").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    names = {f"lamina.{room.stem}" for room in rooms} - {"lamina.__init__"}
    listed = [*loaded["source_modules"], *loaded["forbidden_modules"]]
    assert sorted(listed) == sorted(names | {"lamina_workers", "lamina_kernels", "lamina_protocols"})
