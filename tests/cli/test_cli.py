"""The command line against a fake model: what goes to stdout, what to stderr, and the exit code."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_runner import FakeLLM, Lamina
from real_workers import write_tiny_model
from typer.main import get_command

from lamina.cli.chat import _spoken_lines
from lamina.cli.main import app
from lamina.cli.options import complete_model
from lamina.cli.terminal import iter_lines
from lamina.errors import EngineError, InvalidRequest, ModelFileError
from lamina.models.cache import cache_folder, folder_name, get_or_create, write_file
from lamina.models.weight_memory import weight_memory
from lamina.sampling_params import SamplingParams
from lamina.system.machine import Machine
from lamina_workers.errors import DiskFullError
from lamina_workers.process.credentials import make_credentials


@pytest.fixture
def lamina() -> Lamina:
    return Lamina()


def test_one_prompt_is_the_answer_on_stdout_and_a_line_of_statistics_on_stderr(lamina: Lamina) -> None:
    result = lamina("generate", "why is it")
    assert (result.exit_code, result.stdout) == (0, "WHY IS IT\n")
    assert result.stderr.startswith("3 tokens")
    assert result.stderr.count("\n") == 1
    assert lamina.llm is not None
    assert lamina.llm.closed


def test_text_is_written_as_it_comes(lamina: Lamina) -> None:
    lamina.fail_after = (2, EngineError("the engine stopped"))
    result = lamina("generate", "why is it")
    assert result.stdout == "WHY IS"
    assert (result.exit_code, result.stderr) == (1, "error: the engine stopped\n")


def test_without_streaming_nothing_is_written_before_the_end(lamina: Lamina) -> None:
    assert lamina("generate", "--no-stream", "why is it").stdout == "WHY IS IT\n"
    lamina.fail_after = (2, EngineError("the engine stopped"))
    assert lamina("generate", "--no-stream", "why is it").stdout == ""


def test_several_prompts_are_printed_as_they_finish(lamina: Lamina, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("short\nauf Wiedersehen, größte Stadt\r\n".encode())
    result = lamina("generate", "a longer one", "--file", str(file))
    assert result.stdout.splitlines() == [
        "[2/3] short", "SHORT", "[1/3] a longer one", "A LONGER ONE",
        "[3/3] auf Wiedersehen, größte Stadt", "AUF WIEDERSEHEN, GRÖSSTE STADT",
    ]  # fmt: skip


def test_json_is_one_object_a_line_and_nothing_else(lamina: Lamina) -> None:
    result = lamina("generate", "--json", "--n", "2", "--logprobs", "0", "one", "dos tres")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["prompt_index"], line["sample_index"], line["text"]) for line in lines] == [
        (0, 0, "ONE"), (0, 1, "ONE"), (1, 0, "DOS TRES"), (1, 1, "DOS TRES"),
    ]  # fmt: skip
    assert lines[3]["prompt"] == "dos tres"
    assert lines[3]["token_ids"] == [0, 1]
    assert lines[3]["finish_reason"] == "stop"
    assert [entry["logprob"] for entry in lines[3]["logprobs"]] == [-0.5, -0.5]
    assert (result.exit_code, result.stderr) == (0, "")


def test_prompts_go_through_the_chat_template_unless_raw(lamina: Lamina) -> None:
    lamina("generate", "hello")
    assert lamina.llm is not None
    assert lamina.llm.asked[0][:2] == ("stream_chat", [[{"role": "user", "content": "hello"}]])
    lamina("generate", "--raw", "hello")
    assert lamina.llm.asked[0][:2] == ("stream", ["hello"])


def test_options_reach_the_model_and_the_sampler(lamina: Lamina) -> None:
    words = ["-m", "there", "--threads", "1", "--kv-memory", "2GiB", "--seed", "7", "--stop", "a", "--stop", "b"]
    lamina("generate", "x", *words)
    assert lamina.llm is not None
    assert lamina.llm.model == "there"
    assert (lamina.llm.options["threads"], lamina.llm.options["kv_memory"]) == (1, "2GiB")
    assert lamina.llm.asked[0][2] == SamplingParams(seed=7, stop=("a", "b"))


def test_stdin_is_one_prompt_where_none_is_given(lamina: Lamina) -> None:
    assert lamina("generate", "--raw", stdin=b"two\nlines\n").stdout == "TWO LINES\n"
    assert lamina.llm is not None
    assert lamina.llm.asked[0][1] == ["two\nlines"]


def test_blank_lines_of_a_file_are_no_prompts(lamina: Lamina) -> None:
    result = lamina("generate", "--file", "-", stdin=b"one\n\n  \ntwo\n")
    assert (result.exit_code, result.stdout.splitlines()[1::2]) == (0, ["ONE", "TWO"])


def test_the_form_of_the_text_comes_from_options_and_files(lamina: Lamina, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "array"}')
    lamina("generate", "x", "--json-schema", f"@{tmp_path}/schema.json")
    assert lamina.llm is not None
    assert lamina.llm.asked[0][2].json_schema == '{"type": "array"}'
    lamina("generate", "x", "--choice", "yes", "--choice", "no")
    assert lamina.llm.asked[0][2].choice == ("yes", "no")
    refused = lamina("generate", "x", "--regex", "a", "--grammar", "@no/such/file")
    assert (refused.exit_code, refused.stderr) == (2, "error: cannot read 'no/such/file': No such file or directory\n")


def test_an_answer_that_was_cut_says_so(lamina: Lamina, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLLM, "reason", "length")
    assert lamina("generate", "a b").stderr.endswith("; cut at the most tokens: --max-tokens allows more\n")
    assert "; 2 of 2 answers cut at the most tokens" in lamina("generate", "a", "b").stderr
    assert "(cut at the context's end (4096 tokens); /reset forgets" in lamina("chat", stdin=b"hello\n").stderr
    assert "(cut at 7 tokens; --max-tokens allows more)" in lamina("chat", "--max-tokens", "7", stdin=b"a\n").stderr


def test_chat_takes_the_model_by_name_and_the_room_of_its_context(lamina: Lamina) -> None:
    assert lamina("chat", "there", stdin=b"hello\n").stdout == "HELLO\n"
    assert lamina.llm is not None
    assert (lamina.llm.model, lamina.llm.asked[0][2]) == ("there", SamplingParams(max_tokens=None))
    assert "allowed is one" in lamina("chat", "there", "-m", "here").stderr


def test_typed_lines_are_kept_and_ctrl_c_throws_one_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter([KeyboardInterrupt(), "hello", EOFError()])

    def read(prompt: str) -> str:
        if isinstance(line := next(typed), BaseException):
            raise line
        return line

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert list(_spoken_lines("a-model")) == ["hello"]
    assert (tmp_path / "lamina" / "chat_history").stat().st_mode & 0o777 == 0o600


def test_help_shows_the_defaults_of_engine_and_sampling(lamina: Lamina) -> None:
    shown = lamina("generate", "--help-all").stdout
    assert "Default: 256" in shown
    assert "[default: (auto)]" in shown


def commands(group: Any) -> Iterator[Any]:
    for command in group.commands.values():
        yield from commands(command) if hasattr(command, "commands") else [command]


def test_help_of_each_command_shows_at_most_25_options_and_help_all_the_rest(
    lamina: Lamina, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    group: Any = get_command(app)
    for command in commands(group):
        options = [option for option in command.params if option.param_type_name == "option"]
        assert sum(not option.hidden for option in options) < 25, command.name  # --help is beside them
    short, long = (set(re.findall(r"--[\w-]+", lamina("serve", word).stdout)) for word in ("--help", "--help-all"))
    every = {option.opts[0] for option in group.commands["serve"].params if option.param_type_name == "option"}
    assert every <= long
    assert len(every) > 55
    assert long - short > {"--lanes", "--query-first", "--sketches", "--kv-events"}
    assert {"--port", "--model", "--kv-memory", "--attention-workers", "--help-all"} <= short
    assert lamina("generate", "x", "--lanes", "2").exit_code == 0


@pytest.mark.parametrize(
    ("word", "here"),
    [("run", "lamina chat MODEL"), ("list", "lamina models ls"), ("stop", "lamina ps"), ("pull", "models pull")],
)
def test_a_word_of_another_tool_is_told_the_one_here(lamina: Lamina, word: str, here: str) -> None:
    result = lamina(word, "smollm2-135m")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith(f"error: there is no `lamina {word}`; it is `")
    assert here in result.stderr
    assert "No such command" in lamina("cluster", word).stderr


def test_no_prompt_is_bad_input(lamina: Lamina) -> None:
    result = lamina("generate")
    assert result.exit_code == 2
    assert "no prompt" in result.stderr


def test_stdin_that_is_not_utf8_names_the_byte_and_its_place(lamina: Lamina) -> None:
    result = lamina("generate", "--file", "-", stdin="größe\nb".encode() + b"\xff\n")
    assert (result.exit_code, result.stderr) == (2, "error: stdin is not UTF-8: byte 0xff at position 9\n")


def test_only_line_feeds_end_a_line() -> None:
    assert list(iter_lines(io.BytesIO("a\u2028b\x0bc\r\n\nd".encode()), "a file")) == ["a\u2028b\x0bc", "", "d"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("the prompt has 9000 tokens; allowed are 8192"), 2),
        (ModelFileError("model.safetensors is cut off"), 2),
        (EngineError("the engine stopped"), 1),
        (DiskFullError("no room to write the model"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(lamina: Lamina, error: Exception, code: int) -> None:
    lamina.fail_after = (0, error)
    result = lamina("generate", "x")
    assert (result.exit_code, result.stderr) == (code, f"error: {error}\n")


def test_an_interrupt_keeps_what_was_finished(lamina: Lamina) -> None:
    lamina.fail_after = (2, KeyboardInterrupt())
    result = lamina("generate", "--json", "one", "two words")
    assert result.exit_code == 130
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == ["ONE"]
    assert lamina.llm is not None
    assert lamina.llm.closed


def test_chat_says_that_a_command_does_not_exist(lamina: Lamina) -> None:
    result = lamina("chat", stdin=b"/exit\n/etc/hosts says\n")
    assert result.stdout == "/ETC/HOSTS SAYS\n"
    assert "no command '/exit'; /help lists them" in result.stderr


def test_chat_remembers_and_forgets(lamina: Lamina) -> None:
    result = lamina("chat", "--system", "be brief", stdin=b"hello\n\n/reset\nagain\nmore\n/quit\nnever\n")
    assert (result.exit_code, result.stdout) == (0, "HELLO\nAGAIN\nMORE\n")
    assert lamina.llm is not None
    system = {"role": "system", "content": "be brief"}
    assert [messages for _, messages, _ in lamina.llm.asked] == [
        [system, {"role": "user", "content": "hello"}],
        [system, {"role": "user", "content": "again"}],
        [
            system,
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "AGAIN"},
            {"role": "user", "content": "more"},
        ],
    ]


def test_doctor_says_what_will_be_used_and_why(lamina: Lamina, tmp_path: Path) -> None:
    report = json.loads(lamina("doctor", "--json").stdout)
    assert report["machine"]["cores"] >= 1
    assert report["choices"]["dtype"] in ("bfloat16", "float32")
    assert report["choices"]["attention_kernels"] in ("cpu", "triton")  # as LAMINA_KERNELS names them
    assert report["storage"]["free_bytes"] > 0
    make_credentials(tmp_path, ["localhost"])
    text = lamina("doctor", "--tls-dir", str(tmp_path)).stdout
    assert f"{report['choices']['dtype']}: " in text  # the reason follows
    assert re.search(r"cert\.pem +in 36\d\d days: good until \d{4}-", text)


def test_models_can_be_listed_and_an_unknown_one_is_refused(lamina: Lamina) -> None:
    listed = [json.loads(line)["model"] for line in lamina("models", "ls", "--json").stdout.splitlines()]
    assert "smollm2-135m" in listed
    result = lamina("models", "show", "no-such-model")
    assert result.exit_code == 2
    assert "'no-such-model'" in result.stderr


def test_a_converted_model_has_a_name_that_shows_fetches_and_removes_it(
    lamina: Lamina, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = write_tiny_model(tmp_path / "made")
    kept = get_or_create(
        cache_folder() / folder_name("mine", "x"),
        lambda target: {
            file.name: write_file(target / file.name, iter([file.read_bytes()])) for file in folder.iterdir()
        },
    )
    rows = [json.loads(line) for line in lamina("models", "ls", "--json").stdout.splitlines()]
    assert [row["model"] for row in rows if row["bytes"]] == ["mine"]
    assert lamina("models", "pull", "mine").stdout == f"{kept}\n"
    assert complete_model("mi") == ["mine"]
    assert lamina("models", "rm", "mine").exit_code == 0
    assert not kept.exists()
    refused = lamina("models", "rm", "../made")
    assert (refused.exit_code, folder.exists()) == (2, True)
    assert "'../made'" in refused.stderr


def test_a_model_is_described_with_what_lives_across_its_attentions(lamina: Lamina, tmp_path: Path) -> None:
    folder = str(write_tiny_model(tmp_path / "tiny"))
    facts = json.loads(lamina("models", "show", folder, "--slices", "--json").stdout)
    assert (facts["kv_bytes_per_token"], facts["state_bytes_per_sequence"]) == (
        facts["layers"] * 2 * facts["kv_heads"] * facts["head_dim"] * 2,
        0,
    )
    assert (facts["runs"], facts["live_across"]) == ("native", ["64 x bfloat16"] * 3)
    assert facts["weight_memory"] == weight_memory(Path(folder)).ways
    assert facts["weight_memory"]["bfloat16"] == 2 * facts["parameters"]
    assert facts["weight_kinds"] == {"F32": facts["weight_bytes"]}
    assert facts["resident_bytes"] in (2 * facts["parameters"], 4 * facts["parameters"])
    assert (facts["fits"], facts["active_parameters"]) == (True, facts["parameters"])
    assert facts["tokens_that_fit"] > facts["context"]
    assert 0 < facts["tokens_per_second"] * facts["step_bytes"] < facts["memory_bytes_per_second"]
    rows = lamina("models", "show", folder, "--slices").stdout.splitlines()
    assert ["weights,", "float32", "0.5", "MiB,", "4", "bytes", "each"] in [row.split() for row in rows]
    assert rows[-1].split("  ")[0] == "live across attention 0-2"
    assert rows[-1].endswith("64 x bfloat16, a token")


def test_a_model_that_does_not_fit_is_described_as_one(
    lamina: Lamina, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Machine("", 1, frozenset(), 1 << 20, 1 << 16)
    monkeypatch.setattr("lamina.cli.doctor.this_machine", lambda: small)
    facts = json.loads(lamina("models", "show", str(write_tiny_model(tmp_path / "tiny")), "--json").stdout)
    assert facts["resident_bytes"] == facts["weight_memory"]["float32"] > facts["memory_available_bytes"] == 1 << 16
    assert (facts["fits"], facts["tokens_that_fit"]) == (False, 0)


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, lamina.cli.main; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    heavy = {"torch", "numpy", "starlette", "fastapi", "tokenizers", "pydantic", "matplotlib"}
    assert heavy.isdisjoint(loaded)
    assert "lamina.simulator.event_loop.simulate" not in loaded


def test_a_reader_that_leaves_is_told_nothing() -> None:
    """As in `lamina generate ... | head`: the pipe is closed before anything is written."""
    code = "from cli_runner import FakeLLM, app; app(['generate', 'a b'], obj=FakeLLM)"
    read, write = os.pipe()
    os.close(read)
    try:
        result = subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            cwd=Path(__file__).parents[1] / "support",
            stdout=write,
            stderr=subprocess.PIPE,
        )
    finally:
        os.close(write)
    assert (result.returncode, result.stderr) == (1, b"")
