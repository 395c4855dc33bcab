"""How kernels of CPUs are compiled, cached and called: numba, its instructions, programs of calls."""
