"""Linear maps whose weights stay packed in 4 to 8 bits.

A matrix that stays in 4, 5, 6 or 8 bits, or in e2m1, is a `PackedMatrix` (`kernels/lamina_kernels/packed/matrix.py`).
While weights are loaded, the blocks of a file are put into tiles of 16 rows (`pack.py`, `quantize.py`), 64-byte
aligned, one group of columns behind the other: what a thread reads is one stream. `layout.py` beside them says where
each number stands. The codes are not changed, and scales stay in 16 bits or as the K kinds have them. A checkpoint
gives a tensor as floats or, by `packed`, as it lies in the file
(`workers/lamina_workers/checkpoints/packed_tensors.py`; GGUF in `gguf_checkpoint.py`, all others in
`quantized_tensors.py` there). Rows that a family wants in another order are put in order as raw blocks, and ranks cut
at the borders of blocks. Pages of the file that were repacked are given back, so that file and tiles are not both
resident.

To multiply, x is rounded to int8 in blocks of 32 with a scale each (`activations.py`), once for all matrices that take
the same x. A vector register holds one quad of columns of 16 rows; four products of an unsigned code and an int8 are
summed exactly in int32 (VPDPBUSD, or what AVX2 and NEON have: `micro.py`), and once a block the sum meets both scales
in float32. The order of sums depends on the number of columns alone, so a row of y depends on no other row and on no
thread. Codes are unpacked once for up to 8 rows of x. Many rows go the same way on CPUs with AVX512_VNNI, where it
beats oneDNN's (docs/internals/log.md). With AMX, or without VNNI, blocks of rows are unpacked into a buffer for
oneDNN. `dense.Linear` takes one packed matrix or several side by side (Q4_K_M has Q4_K and Q6_K in one of q, k, v), and
a span's steps do too, so a decode step stays one compiled call between two attentions.

A tied table is one matrix, for the head and for looking up rows.
"""
