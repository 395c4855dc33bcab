"""`lamina` with the arguments of this process, which ends when its parent does, however that dies."""

from __future__ import annotations

import runpy

from lamina_workers.process.exit import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    runpy.run_module("lamina", run_name="__main__", alter_sys=True)
