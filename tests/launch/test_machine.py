from __future__ import annotations

from lamina.system.machine import Machine, native_dtype, parse_cpuinfo, parse_meminfo, this_machine


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


def test_this_machine_has_a_core() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_available <= machine.memory
