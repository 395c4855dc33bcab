"""README's recipes, "How to add", followed in a copy of the tree: with all places of a recipe's own list the copy's
tests pass, and without any one of them they fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("lamina", "workers", "kernels", "protocols", "tests", "scripts", "docs", "README.md", "pyproject.toml")
PATHS = ("", "workers", "kernels", "protocols")

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Place:
    """A place of a recipe: the words in backticks by which README names it, a file, and what is written there: after
    each of these lines, or as a new file."""

    names: tuple[str, ...]
    path: str
    lines: dict[str, str]


@dataclass(frozen=True)
class Recipe:
    """A recipe's places in README's order, and the tests that follow them, as pytest takes them."""

    places: tuple[Place, ...]
    tests: tuple[str, ...]


ROOT_POLICY = '''"""`root`: a window that grows with the square root of the position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

from lamina_workers.policies.policy import LONGEST, Policy, View


@dataclass(frozen=True)
class Root(Policy):
    """A query at p sees key k <= p where p - k < recent + floor(sqrt(p))."""

    name: ClassVar[str] = "root"
    recent: int = 256

    def __post_init__(self) -> None:
        self.check("recent", 1, LONGEST)

    def seen_from(self, start: int) -> int:
        return max(0, start - self.recent - isqrt(start) + 1)

    def views(self, start: int, count: int) -> Iterator[View]:
        first, end = start, start + count
        while first < end:
            last = min(end, (isqrt(first) + 1) ** 2)
            yield View(first, last - first, self.recent + isqrt(first))
            first = last
'''
PLAIN_KERNELS = '''"""Those of `decode` by another name."""

from lamina_kernels.attention.decode import append, attend, attend_lists, grown, layout, merge_into, plan, plan_append
from lamina_kernels.attention.decode import plan_lists, prepare
'''
PLAIN_BRANCH = """\
    elif name == "plain":
        from lamina_kernels.attention import plain

        chosen = plain"""
PING = '''@dataclass(frozen=True, slots=True)
class Ping:
    """Asks whether a holder is there."""

    epoch: int
    batch: int
    note: str


'''
BENCH, DECODE_TEST = "tests/support/policy_bench.py", "tests/kernels/test_cpu_decode.py"
SELECT, MESSAGES = "kernels/lamina_kernels/select.py", "protocols/lamina_protocols/messages/messages.py"
CODEC, FUZZ = "protocols/lamina_protocols/frames/codec.py", "tests/protocols/test_codec_fuzz.py"
RAISED = '        raise ProtocolError(f"{value:g} seconds, allowed: 0 or more")'
NATIVE, MODEL_TEST = "workers/lamina_workers/model_config/families.py", "tests/workers/decoder/test_model.py"
DOCUMENT_TEST = "tests/workers/checkpoints/test_models_document.py"
SEEN = "lambda h, p, k: p - k < 40 + p.float().sqrt().long()"
RECIPES = {
    "a policy": Recipe(
        (
            Place(("workers/lamina_workers/policies/",), "workers/lamina_workers/policies/root.py", {"": ROOT_POLICY}),
            Place(("catalogue.py",), "workers/lamina_workers/policies/catalogue.py", {
                "from lamina_workers.policies.retrieval import Retrieval":
                    "from lamina_workers.policies.root import Root",
                "    for policy in (": "Root,",
            }),
            Place(("TIGHT",), BENCH, {"TIGHT = {": '    "root": "root(recent=40)",'}),
            Place(("LOOSE",), BENCH, {"LOOSE = {": '    "root": "root(recent=10000)",'}),
            Place(("STATIC", BENCH), BENCH, {"    \"full\": lambda h, p, k: k >= 0,": f'    "root": {SEEN},'}),
        ),
        ("tests/workers/policies/test_policies.py", "-k", "root or matrix"),
    ),
    "a kernel": Recipe(
        (
            Place(("Kernels", SELECT), "kernels/lamina_kernels/attention/plain.py", {"": PLAIN_KERNELS}),
            Place(("CHOICES",), SELECT, {'CHOICES = {"cpu": (': '"plain", '}),
            Place(("kernels()",), SELECT, {
                "        chosen = cpu_decode": PLAIN_BRANCH,
            }),
            Place(("IMPLEMENTATIONS", DECODE_TEST), DECODE_TEST, {
                "from lamina_kernels.attention import decode as cpu_decode":
                    "from lamina_kernels.attention import plain",
                "IMPLEMENTATIONS: dict[str, Any] = {": '"plain": plain, ',
            }),
        ),
        ("tests/kernels/test_select.py", DECODE_TEST, "-k", "own_with_all or for_a_cpu or plain-float32-channels"),
    ),
    "a message": Recipe(
        (
            Place((MESSAGES,), MESSAGES, {RAISED: PING}),
            Place(("Request", "Reply"), MESSAGES, {"Request = (": "    Ping |"}),
            Place((CODEC,), CODEC, {"    21: m.BlockTables,": "    24: m.Ping,"}),
            Place(("MESSAGES", FUZZ), FUZZ, {
                "MESSAGES = {": "m.Ping: st.builds(m.Ping, _int, _int, st.text()), ",
            }),
        ),
        (FUZZ, "-k", "drawn or comes_back"),
    ),
    "a model": Recipe(
        (
            Place(("FAMILIES", NATIVE), NATIVE, {
                "FAMILIES = {": '    "HeliumForCausalLM": Family("helium", {"head_dim": 128}, interleaved=True),',
            }),
            Place(("FAMILIES", MODEL_TEST), MODEL_TEST, {
                "FAMILIES = {": '    "helium": ("helium", {"head_dim": 16}),',
            }),
            Place(("docs/models.md", "scripts/evaluate/converted_models.py"), "docs/models.md", {
                "| --- | --- | --- | --- | --- |": "| helium | no |  |  | 2e-06 |",
            }),
        ),
        (MODEL_TEST, DOCUMENT_TEST, "-k", "helium or tiny_checkpoint or native_type"),
    ),
}  # fmt: skip
WITHOUT = [(name, place) for name, recipe in RECIPES.items() for place in recipe.places]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the tests need."""
    tree = tmp_path_factory.mktemp("recipes")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(ROOT / name, tree / name)
    return tree


def write(tree: Path, place: Place) -> None:
    """What the recipe says of a place: after each line, within it where it goes on, or as a new file."""
    path = tree / place.path
    for line, text in place.lines.items():
        if not line:
            path.write_text(text)
            continue
        before = path.read_text()
        assert before.count(line) == 1 or line in before.splitlines(), (place.path, line)
        end = before.index(f"\n{line}") + 1 + len(line)
        path.write_text(before[:end] + ("\n" if before[end] == "\n" else "") + text + before[end:])


def outcome(tree: Path, recipe: Recipe, places: Sequence[Place]) -> tuple[int, str]:
    """How the copy's tests end with these places written, and what they print. The copy is as it was, then."""
    kept = {place.path: (tree / place.path).read_bytes() for place in places if (tree / place.path).exists()}
    try:
        for place in places:
            write(tree, place)
        path = os.pathsep.join(str(tree / part) for part in PATHS)
        command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", *recipe.tests]
        run = subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
        return run.returncode, run.stdout + run.stderr
    finally:
        for place in places:
            (tree / place.path).unlink(missing_ok=True)
        for name, content in kept.items():
            (tree / name).write_bytes(content)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_the_places_that_this_test_follows(name: str) -> None:
    text = (ROOT / "README.md").read_text()
    [bullet] = re.findall(rf"^- \*\*{name}\*\*:(.*?)(?=^- |^$)", text, re.MULTILINE | re.DOTALL)
    assert re.findall("`([^`]+)`", bullet) == [word for place in RECIPES[name].places for word in place.names]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_followed_is_right(tree: Path, name: str) -> None:
    recipe = RECIPES[name]
    status, printed = outcome(tree, recipe, recipe.places)
    assert (status, " passed" in printed) == (0, True), printed


@pytest.mark.parametrize(("name", "place"), WITHOUT, ids=[f"{name}: {place.names[0]}" for name, place in WITHOUT])
def test_a_recipe_without_one_of_its_places_fails(tree: Path, name: str, place: Place) -> None:
    recipe = RECIPES[name]
    status, printed = outcome(tree, recipe, [other for other in recipe.places if other is not place])
    assert status in (1, 2, 3, 4), printed  # 3: kernels are compiled before the first test
