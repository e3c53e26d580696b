"""Threads for work on many matrices, also while the interpreter waits for its last threads.

Not handled: how many matrices fit into memory at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import ThreadPool
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def thread_pool(threads: int) -> Iterator[ThreadPool]:
    """Give a pool whose threads have ended afterwards: none may be in torch when the interpreter exits."""
    # That of concurrent.futures takes no work while the interpreter waits for its last threads.
    pool = ThreadPool(threads)
    try:
        yield pool
    finally:
        pool.close()
        pool.join()


def in_threads(function: Callable[[T], R], jobs: Iterable[T]) -> list[R]:
    """Return the results in the order of the jobs, from as many threads as torch has."""
    with thread_pool(max(1, torch.get_num_threads())) as pool:
        return pool.map(function, jobs)
