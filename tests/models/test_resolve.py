"""Names become folders: aliases, folders, GGUF files, hub ids."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cached_models import verify
from gguf_writing import write_tiny_llama
from model_export import export
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamina.errors import InvalidRequest, ModelFileError
from lamina.models import cache as model_cache
from lamina.models import resolve as models
from lamina.models.aliases import ALIASES
from lamina.models.cache import is_whole
from lamina.models.gguf_files import GgufFile
from lamina.models.hub import HUB_IDS
from lamina.simulator.costs.model_configs import PRESETS
from lamina_workers.checkpoints.model_checkpoint import fingerprint, open_checkpoint
from lamina_workers.checkpoints.weight_loader import packed_kind


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A cache of its own for each test, except where the real model is needed."""
    if request.node.get_closest_marker("data") is None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_second_start_reads_no_contents(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.resolve(tiny_gguf)
    monkeypatch.setattr(model_cache, "hash_file", lambda file: pytest.fail(f"read {file}"))
    monkeypatch.setattr(models, "_convert", lambda *args: pytest.fail("converted again"))
    assert models.resolve(tiny_gguf) == folder


def test_a_changed_gguf_is_converted_again(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_gguf.read_bytes())
    first = models.resolve(path)
    os.utime(path, ns=(0, 0))
    assert models.resolve(path) != first


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_a_damaged_folder_is_made_again(tiny_gguf: Path, damage: str) -> None:
    folder = models.resolve(tiny_gguf)
    record = folder / "gguf.json"
    match damage:
        case "truncate":
            os.truncate(record, 100)
        case "remove":
            record.unlink()
        case "manifest":
            (folder / "manifest.json").write_text("[")
    assert not is_whole(folder)
    assert models.resolve(tiny_gguf) == folder
    verify(folder)


def test_the_folder_of_a_gguf_has_none_of_its_weights(tiny_gguf: Path) -> None:
    folder = models.resolve(tiny_gguf)
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "generation_config.json", "gguf.json", "manifest.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    with open_checkpoint(folder) as checkpoint:
        assert "model.layers.1.mlp.up_proj.weight" in checkpoint.names()


def test_a_gguf_that_became_another_is_named(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_gguf.read_bytes())
    folder = models.resolve(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match=r"x\.gguf has \d+ bytes and is not the file of"):
        models.resolve(folder)
    path.unlink()
    with pytest.raises(ModelFileError, match=r"cannot read .*x\.gguf"):
        models.resolve(folder)


def test_a_fingerprint_does_not_depend_on_the_place(tiny_gguf: Path, tmp_path: Path) -> None:
    first = models.resolve(tiny_gguf)
    path = tmp_path / "elsewhere.gguf"
    path.write_bytes(tiny_gguf.read_bytes())
    second = models.resolve(path)
    assert first != second
    assert fingerprint(first) == fingerprint(second)
    content = bytearray(path.read_bytes())
    content[max(GgufFile(path).tensors.values(), key=lambda tensor: tensor.nbytes).offset] ^= 1
    path.write_bytes(content)
    assert fingerprint(models.resolve(path)) != fingerprint(first)


_RESOLVE = "import sys; from lamina.models.resolve import resolve; sys.stdout.write(str(resolve(sys.argv[1])))"


@pytest.mark.fault("F28")
def test_a_limit_on_file_size_leaves_nothing_half_written(tmp_path: Path, tiny_gguf: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", _RESOLVE, str(tiny_gguf)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000)),  # config fits, not the rest
        capture_output=True,
        text=True,
        check=False,
    )
    assert "DiskFullError" in process.stderr
    assert [file.suffix for file in (tmp_path / "cache" / "lamina" / "models").iterdir()] == [".lock"]


@pytest.mark.fault("F28")
def test_two_processes_at_once_get_one_whole_folder(tiny_gguf: Path) -> None:
    command = [sys.executable, "-c", _RESOLVE, str(tiny_gguf)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    verify(Path(folders.pop()))
    assert not folders


def test_a_folder_is_taken_as_it_is(tiny_gguf: Path) -> None:
    folder = models.resolve(tiny_gguf)
    assert models.resolve(str(folder)) == folder


@pytest.mark.fault("F26")
def test_a_folder_of_others_has_its_gguf_file_in_it(tiny_gguf: Path, tmp_path: Path) -> None:
    """One outside could be any file of this machine, and a pipe would be waited for without end."""
    made, folder = models.resolve(tiny_gguf), tmp_path / "strangers"
    shutil.copytree(made, folder)
    record = json.loads((folder / "gguf.json").read_text())
    (folder / "link.gguf").symlink_to(tiny_gguf)
    os.mkfifo(folder / "pipe.gguf")
    shutil.copy(tiny_gguf, folder / "model.gguf")
    wrong = {
        str(tiny_gguf): "outside of its folder", "../x/tiny.gguf": "cannot read", "link.gguf": "outside of its folder",
        "pipe.gguf": "no regular file", str(folder / "pipe.gguf"): "no regular file", "a\0b": "cannot read",
    }  # fmt: skip
    for file, message in wrong.items():
        (folder / "gguf.json").write_text(json.dumps(record | {"file": file}))
        with pytest.raises(ModelFileError, match=message):
            models.resolve(folder)
    with pytest.raises(ModelFileError, match="cannot read"), open_checkpoint(folder):
        pass
    (made / "gguf.json").write_text(json.dumps(record | {"file": str(folder / "pipe.gguf")}))
    with pytest.raises(ModelFileError, match="no regular file"), open_checkpoint(made):
        pass
    (folder / "gguf.json").write_text(json.dumps(record | {"file": "model.gguf"}))
    assert models.resolve(folder) == folder
    (folder / "gguf.json").unlink()
    os.mkfifo(folder / "gguf.json")
    with pytest.raises(ModelFileError, match="has no weights"):
        models.resolve(folder)


@pytest.mark.parametrize(
    "name", ["no-such-model", "a/b/c", "./missing", "x\0y", "smollm2", "../org/name", "x" * 5000, "~no-such-user/x"]
)
def test_an_unknown_name_says_what_is_allowed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest, match=r"allowed is a name from|is no path"):
        models.resolve(name)


def test_pickles_and_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin.*refused"):
        models.resolve(tmp_path)
    with pytest.raises(ModelFileError, match=r"allowed is a \.gguf file"):
        models.resolve(tmp_path / "pytorch_model.bin")


@pytest.mark.data
def test_smollm2_is_what_its_gguf_says(tmp_path: Path) -> None:
    folder = models.resolve("smollm2-135m")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 100000.0
    assert config["tie_word_embeddings"] is True
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    with open_checkpoint(folder) as checkpoint:
        assert sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names()) == 134_515_008
        assert packed_kind(checkpoint) is not None
    model = AutoModelForCausalLM.from_pretrained(export(folder, tmp_path / "model"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_models_of_the_planner_have_an_alias_or_an_id_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(PRESETS) == set(HUB_IDS) | (set(PRESETS) & set(ALIASES))
    assert not set(HUB_IDS) & set(ALIASES)
    asked: list[str] = []

    def download(hub_id: str, progress: object) -> Path:
        asked.append(hub_id)
        raise ModelFileError("no hub here")

    monkeypatch.setattr(models.hub, "download", download)
    for name in (*HUB_IDS, "Llama-3-70B"):
        with pytest.raises(ModelFileError, match="no hub here"):
            models.resolve(name)
    assert asked == [*HUB_IDS.values(), "meta-llama/Meta-Llama-3-70B-Instruct"]
