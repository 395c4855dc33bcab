"""Attention and dense operations on CPUs: loops compiled by numba, micro-kernels as LLVM IR."""
