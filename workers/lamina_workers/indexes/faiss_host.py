"""FAISS: exact neighbours, and a graph that was made elsewhere. The only file that imports it.

FAISS is imported at the first call, so that all else works without it. Everything here takes and returns numpy arrays.
FAISS counts the keys whose inner products were computed in one place for all threads and without a lock: a count is
exact only while one thread searches.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lamina_workers.errors import KernelsUnavailable
from lamina_workers.indexes.key_index import Floats


@cache
def module() -> Any:
    """The FAISS module. Raises KernelsUnavailable where it is not installed."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise KernelsUnavailable("an index over keys needs FAISS; install it with: pip install faiss-cpu") from error


def set_threads(threads: int) -> None:
    """Set how many threads FAISS uses for calls of this thread. Other threads keep their own number."""
    module().omp_set_num_threads(threads)


def nearest(queries: Floats, keys: Floats, k: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """Exactly the k keys with the largest inner products: indices `[m, k]`, best first, and the products.

    queries: float32 `[m, d]`. keys: float32 `[n, d]`, n at least k. On a GPU where FAISS was built for one.
    """
    faiss = module()
    if faiss.get_num_gpus() > 0:
        scores, indices = faiss.knn_gpu(_resources(), queries, keys, k, metric=faiss.METRIC_INNER_PRODUCT)
    else:
        scores, indices = faiss.knn(queries, keys, k, faiss.METRIC_INNER_PRODUCT)
    return indices, scores


@cache
def _resources() -> Any:
    return module().StandardGpuResources()


def graph(keys: Floats, neighbours: npt.NDArray[np.int32], entry: int) -> Any:
    """An `IndexHNSW` with one level, whose links are `neighbours`: int32 `[n, slots]`, slots even, -1 ends a list.

    FAISS keeps a copy of the keys in bfloat16. Under inner products it needs no negated distances since 1.14.3.
    """
    faiss = module()
    n, slots = neighbours.shape
    storage = faiss.IndexScalarQuantizer(keys.shape[1], faiss.ScalarQuantizer.QT_bf16, faiss.METRIC_INNER_PRODUCT)
    storage.add(keys)
    index = faiss.IndexHNSW(storage, slots // 2)  # level 0 has 2 M slots; faiss's Python keeps a reference to `storage`
    index.ntotal = n
    for name, values in (
        ("levels", np.ones(n, np.int32)),
        ("offsets", np.arange(n + 1, dtype=np.uint64) * np.uint64(slots)),
        ("neighbors", np.ascontiguousarray(neighbours).ravel()),
    ):
        faiss.copy_array_to_vector(values, getattr(index.hnsw, name))
    index.hnsw.entry_point = entry
    index.hnsw.max_level = 0
    return index


@cache
def graph_effort(effort: int) -> Any:
    """The search parameters with which a graph keeps `effort` candidates."""
    return module().SearchParametersHNSW(efSearch=effort)


def search(index: Any, q: Floats, k: int, params: Any) -> tuple[npt.NDArray[np.int64], Floats]:
    """Indices `[group, k]`, -1 where fewer were found, and inner products. q: contiguous float32 `[group, d]`.

    Query by query: FAISS then opens no team of OpenMP threads. Other Python threads run meanwhile. FAISS's own wrapper,
    which is left out, costs some 10 us a call, and more where threads wait for each other.
    """
    pointer = module().swig_ptr
    indices, scores = np.empty((len(q), k), np.int64), np.empty((len(q), k), np.float32)
    for i in range(len(q)):
        index.search_c(1, pointer(q[i]), k, pointer(scores[i]), pointer(indices[i]), params)
    return indices, scores


def graph_distances() -> int:
    """How many inner products searches of graphs have computed in this process."""
    return int(_statistics().hnsw_stats.ndis)


@cache
def _statistics() -> Any:
    return module().cvar


def code_bytes(d: int) -> int:
    """Bytes of one key in an index."""
    return 2 * d
