"""Attention over sets of keys, and the merge of what comes out.

`kernels/lamina_kernels/select.py` chooses one implementation for each process and device and logs it; `LAMINA_KERNELS`
forces it: `cpu` (`attention/decode.py`, compiled by numba), or `triton` (`gpu/decode.py`, for GPUs; on a CPU with
`TRITON_INTERPRET=1`), which has never run on a GPU. Their definition, in plain torch, is in
`tests/support/kernel_reference.py`. Both take the same two things:

- Pages (`paged/pages.py`): one layer and KV head, K then V (of latents K alone), in float32, bfloat16, float16, int8
  or, on GPUs, float8; the last two with a float32 scale for each token of K and of V. The kernels choose the order
  inside (`Order`): on a CPU K by channels and V by tokens, with as many neighbours together as one instruction
  multiplies and adds (2 of bfloat16; 2 of K and 4 of V in int8); on a GPU token by token.
- Rows (`paged/rows.py`): which keys each query reads. A row is some KV heads of one sequence with a page table for
  each, or a list of tokens; a read range; a window, and sinks that stay visible outside it; a bias for each slot.
  Every policy's choice reaches the kernels as rows or lists.

`plan` checks rows once a batch and cuts their work by the LeanAttention schedule (`paged/schedule.py`): all heads' keys
laid end to end, in equal shares however ragged the batch. An output that was cut has several partials, merged at the
end. `attend` then fills in a block of addresses and launches, which takes 10 us.

On a CPU the queries of a whole group meet the keys in blocks of at most 128 with an online softmax
(`attention/loops.py`). The inner loops are LLVM IR over vectors of 16 floats (`compile/emitter.py`,
`attention/microkernels.py`), which LLVM fits to AVX-512, AVX2 or NEON (never run on Arm). The next block is fetched
line by line between the multiplications, or, where pages follow each other in memory and are read in order, by the
hardware; memory and not arithmetic is the limit up to groups of 8. With AVX512_BF16 bfloat16 is multiplied directly.
int8 is multiplied in whole numbers: K by queries of 16 bits, V by weights of 16 bits in two halves, because with 8 bits
everything beside an attention sink would round to nothing. Compiled code is kept in numba's cache on disk; what a run
needs is loaded, or compiled the first time, before the model is (`Kernels.prepare`).
"""
