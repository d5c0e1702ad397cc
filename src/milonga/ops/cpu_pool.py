"""A small pool of threads for Numba kernels that release the GIL.

A kernel is a `nogil` function over a range of jobs, `kernel(*arguments, first, last)`; each job writes its own part of the
output and no reduction is split between jobs, so the result does not depend on the number of threads. Numba's own
`parallel=True` is not used: with its OpenMP layer a later fork kills the process, with `workqueue` two Python threads
abort it.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

# Below this much estimated work (in kernel operations, about 0.3 ms on one core) waking a thread costs more than it gives.
INLINE_WORK = 600_000

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_key: tuple[int, int] | None = None


def _executor(threads: int) -> ThreadPoolExecutor:
    """The pool of this process with `threads` workers; made anew after a fork or when torch's thread count changes."""
    global _pool, _pool_key
    key = (os.getpid(), threads)
    with _lock:
        if _pool is None or _pool_key != key:
            if _pool is not None and _pool_key is not None and _pool_key[0] == os.getpid():
                _pool.shutdown(wait=False)
            _pool = ThreadPoolExecutor(threads, thread_name_prefix="milonga-cpu")
            _pool_key = key
        return _pool


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def run(kernel: Callable[..., None], jobs: int, work: int, *arguments: object) -> None:
    """Call `kernel(*arguments, first, last)` so that all of `range(jobs)` is covered, on as many threads as torch uses.

    Args:
        kernel: a compiled `nogil` function whose last two arguments are the range of jobs.
        jobs: number of independent jobs.
        work: rough number of elementary operations in all jobs together; small work runs on the calling thread.
        arguments: passed on unchanged.
    """
    threads = min(torch.get_num_threads(), jobs)
    if threads <= 1 or work < INLINE_WORK:
        kernel(*arguments, 0, jobs)
        return
    pool = _executor(torch.get_num_threads() - 1 or 1)
    edges = [jobs * i // threads for i in range(threads + 1)]
    futures = [pool.submit(kernel, *arguments, edges[i], edges[i + 1]) for i in range(1, threads)]
    try:
        kernel(*arguments, 0, edges[1])
    finally:
        wait(futures)
    for future in futures:
        future.result()
