"""The two kinds of worker: dense layers on one side of the cut, KV cache and attention on the other.

A row's random number is a hash of (seed, sample index, position). It depends on nothing else, so neither the rest of
the batch nor a preemption, a rerun or another placement changes a seeded text. In float32 the texts are equal wherever
the two likeliest tokens are further apart than rounding.

The engine's thread loads the model too, and makes every torch call: OpenMP keeps a team of threads for each thread that
ever computed. Teams with more threads than cores sleep after each operation, which is slow; so one thread makes all
calls. torch's CPU build brings its own OpenMP. The CPU kernels are launched on that same team through `GOMP_parallel`
(`kernels/lamina_kernels/compile/launch.py`): two pools on the same cores would spin against each other. A launch costs
1.3 us. An attention worker has one thread for all of its computing too, which reads its socket itself. Where engine and
workers share few cores, both ask OpenMP for short spinning before torch is imported
(`workers/lamina_workers/devices/openmp.py`): so import `lamina` before `torch`.
"""
