"""What commands refuse: one line that names the value, before a model is loaded or anything is sent."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from cli_runner import Lamina


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate fine --temperature nan", "nan"),
        ("generate fine --top-p 2", "2"),
        ("generate fine --n 1000000000", "1000000000"),
        ("generate fine --seed 1180591620717411303424", str(2**70)),
        ("generate fine --stop ''", "''"),
        ("generate fine --max-tokens many", "'many'"),
        ("generate fine --file no/such/file", "'no/such/file'"),
        ("generate fine \udcff", "0xff at position 0"),
        ("generate fine ''", "prompt 2 of 2"),
        ("generate --treads 1", "No such option: --treads"),
        ("--wrong", "No such option: --wrong"),
        ("nothing", "No such command 'nothing'"),
        ("models show", "Missing argument 'MODEL'; see `"),
        ("plan --hardware no.toml", "no.toml: there is no such file"),
        ("plan --rate often", "rate is 'often'; allowed are trace, max"),
        ("plan --out plan.json", "--out is 'plan.json'; allowed are names that end in .toml"),
        ("plan --html x.html --no-verify", "a report needs at least one run"),
        ("plan --out absent/plan.toml", "--out is 'absent/plan.toml', in 'absent', which is no folder"),
        ("plan --html absent/x.html", "--html is 'absent/x.html', in 'absent', which is no folder"),
        ("calibrate-hardware --out absent/x.toml", "--out is 'absent/x.toml', in 'absent'"),
        ("simulate --out /dev/null/runs", "--out is '/dev/null/runs': Not a directory"),
        ("plan --check no.toml", "no.toml: there is no such file"),
        ("simulate --system magic", "system is 'magic'; allowed are colocated"),
        ("simulate --system chunked,,lamina", "system is 'chunked,,lamina'"),
        ("simulate --system lamina:h100x2", "takes two kinds of device"),
        ("simulate --system chunked:h100x2+h20x2", "takes one kind of device"),
        ("simulate --system lamina:h100x2+epyc-genoax1", "there is lamina-cpu"),
        ("simulate --system chunked:tpu-v9x1", "unknown device 'tpu-v9'"),
        ("simulate --system chunked:h100x9999", "allowed are 1 to 1024"),
        ("simulate --policy auto=2,1", "read of policy 'auto' is 2.0"),
        ("simulate --json --csv", "--json and --csv"),
        ("simulate --speculate ngram", "it needs --acceptance"),
        ("simulate --acceptance 0.5", "it needs --speculate"),
        ("bench serve --endpoint x", "endpoint"),
        ("bench serve --dataset x", "dataset"),
        ("bench serve --num-prompts 0", "num-prompts"),
        ("bench serve --max-concurrency 0", "max-concurrency"),
        ("bench serve --request-rate -1", "request-rate"),
        ("bench serve --request-rate nan --dataset trace", "request-rate"),
        ("bench serve ttft:5", "ttft:5"),
        ("bench serve --timeout 0", "timeout"),
        ("bench serve --seed -1", "seed"),
        ("bench serve --speed 2", "speed"),
        ("bench serve --dataset trace --trace x", "trace"),
        ("bench serve --range-ratio 1", "range-ratio"),
        ("bench serve --save-detailed", "save-result"),
        ("bench serve --save-result x.txt", "save-result"),
        ("bench serve --save-result absent/x.json", "folder"),
        ("bench serve --plot x.svg", "plot"),
        ("bench decode absent --batch 0", "batch"),
        ("bench decode absent --batch 1,x", "batch"),
        ("bench decode absent --context ''", "context"),
        ("bench decode absent --steps 1", "steps"),
        ("bench decode absent --rounds 0", "rounds"),
        ("bench decode absent --save-result x", "save-result"),
        ("join --memory lots", "memory is 'lots'"),
        ("join --memory 900000GB", "this machine has"),
        ("join --name 'a b'", "letters, digits and hyphens"),
        ("join --port 70000", "port is 70000"),
        ("join --server a:99999", "server is 'a:99999'"),
        ("serve --allow-join --join-address here", "join_address is 'here'"),
        ("serve --join-address 0.0.0.0:7", "allowed is one beside --allow-join"),
        ("serve --allow-join --host 0.0.0.0 --open", "would let everybody accept machines"),
        ("serve --allow-join --local-share 0", "local_share is 0 with allow_join"),
        ("serve --allow-join --model-workers 2", "model_workers is 2 with allow_join"),
        ("serve --allow-join --attention-workers a:1", "beside addresses of attention_workers"),
        ("serve --allow-join --autoscale 1:3", "allow_join beside autoscale of 1 to 3"),
        ("serve --autoscale 3:1", "autoscale is (3, 1)"),
        ("serve --allow-join --cluster auto", "beside cluster"),
        ("serve a=b c=d --allow-join --max-loaded 2", "max_loaded is 2"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    lamina = Lamina()
    result = lamina(*shlex.split(words))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
    assert lamina.llm is None
