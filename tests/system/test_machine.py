from __future__ import annotations

import pytest

from lamina.system.machine import (
    Machine,
    control_groups,
    kv_share,
    native_dtype,
    parse_cpuinfo,
    parse_meminfo,
    quota_of,
    this_machine,
)


def test_cpuinfo_of_x86_and_of_arm() -> None:
    x86 = "processor\t: 0\nmodel name\t: Some CPU @ 2:1\nflags\t\t: avx2 amx_bf16\n\nprocessor\t: 1\nflags\t\t: other\n"
    assert parse_cpuinfo(x86) == ("Some CPU @ 2:1", frozenset({"avx2", "amx_bf16"}))
    assert parse_cpuinfo("processor\t: 0\nFeatures\t: asimd bf16\n") == ("", frozenset({"asimd", "bf16"}))
    assert parse_cpuinfo("") == ("", frozenset())


def test_meminfo_is_in_bytes_and_may_lack_anything() -> None:
    assert parse_meminfo("MemTotal:       7 kB\nHugePages_Total: 0\nMemAvailable:  3 kB\n") == (7168, 3072)
    assert parse_meminfo("MemTotal: many\n\nnonsense") == (0, 0)


def test_bfloat16_only_with_instructions_for_it() -> None:
    def dtype(*flags: str) -> str:
        return native_dtype(Machine("", 1, frozenset(flags), 0, 0))[0]

    assert dtype("avx512f", "avx512_bf16") == dtype("amx_bf16") == dtype("bf16") == "bfloat16"
    assert dtype() == dtype("avx512f", "avx2") == "float32"


@pytest.mark.parametrize(
    ("text", "cores"),
    [("200000 100000\n", 2), ("150000 100000", 1), ("50000 100000", 1), ("max 100000", None), ("-1\n 100000\n", None),
     ("", None), ("1 0", None)],
)  # fmt: skip
def test_a_quota_of_processor_time_is_whole_cores(text: str, cores: int | None) -> None:
    assert quota_of(text) == cores


def test_the_limits_of_all_control_groups_around_a_process_count(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = "/sys/fs/cgroup"
    files = {
        "/proc/self/cgroup": "4:cpu:/x\n0::/pods/one\n",
        "/proc/meminfo": "MemTotal: 4096 kB\nMemAvailable: 4096 kB\n",
        f"{groups}/pods/cpu.max": "100000 100000\n",
        f"{groups}/pods/one/memory.max": "2097152\n",
        f"{groups}/pods/one/memory.current": "1572864\n",
        f"{groups}/pods/one/memory.stat": "anon 1\nfile 524288\ninactive_file 393216\nactive_file 131072\nslab 7 7\n",
    }
    monkeypatch.setattr("lamina.system.machine._text_of", lambda path: files.get(path, ""))
    machine = this_machine()
    assert (machine.cores, machine.memory, machine.memory_available) == (1, 2 << 20, 1 << 20)
    assert control_groups("0::/../a\n") == [groups, f"{groups}/a"]
    assert control_groups("") == [groups]


def test_kv_gets_a_quarter_or_half_of_what_weights_leave() -> None:
    machine = Machine("", 1, frozenset(), 64 << 30, 32 << 30)
    assert [kv_share(machine, 2, weights << 30) >> 30 for weights in (0, 16, 24)] == [4, 4, 2]
    assert kv_share(machine, 1, 33 << 30) == 1 << 28  # which does not fit: it is refused


def test_this_machine_has_a_core() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_available <= machine.memory
