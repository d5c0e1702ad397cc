"""A small pool of threads for Numba kernels that release the GIL.

A kernel is a `nogil` function over a range of jobs, `kernel(*arguments, first, last)`; each job writes its own part of
the output and no reduction is split between jobs, so the result does not depend on the number of threads. Numba's own
`parallel=True` is not used: with its OpenMP layer a later fork kills the process, with `workqueue` two Python threads
abort it.
"""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import count

import torch

# Below this much estimated work (in kernel operations, about 0.3 ms on one core) waking a thread costs more than it
# gives.
INLINE_WORK = 600_000
# The same for kernels that share their work out themselves, which wait for no thread to wake.
INLINE_SHARED = 200_000
# Pieces a thread in large work.
PIECES = 4

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_key: tuple[int, int] | None = None


def _executor(threads: int) -> ThreadPoolExecutor:
    """The pool of this process with `threads` workers; made anew after a fork or when torch's thread count changes."""
    global _pool, _pool_key
    key = (os.getpid(), threads)
    with _lock:
        if _pool is None or _pool_key != key:
            # The old pool's threads leave when nobody holds it any more; another Python thread may be about to use it.
            _pool = ThreadPoolExecutor(threads, thread_name_prefix="milonga-cpu")
            _pool_key = key
        return _pool


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if sys.platform != "win32":  # which has no fork
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
    # Large work is cut finer than there are threads, and each takes the next piece when it is free: jobs may be of
    # unequal length, and a core may be busy with something else.
    pieces = min(jobs, threads * PIECES) if work > INLINE_WORK * PIECES else threads
    turns = count()

    def serve() -> None:
        while (piece := next(turns)) < pieces:
            kernel(*arguments, jobs * piece // pieces, jobs * (piece + 1) // pieces)

    pool = _executor(torch.get_num_threads() - 1 or 1)
    futures = [pool.submit(serve) for _ in range(threads - 1)]
    try:
        serve()
    finally:
        started = [future for future in futures if not future.cancel()]
        wait(started)
    for future in started:
        future.result()


def share(kernel: Callable[..., None], work: int, *arguments: object) -> None:
    """Call `kernel(*arguments)` here and on the other threads that torch uses, for a kernel that shares its work out.

    It returns when the call here does. A call on another thread may come later, or never: it must find everything done,
    and touch nothing but its arguments, which live as long as it does.

    Args:
        kernel: a compiled `nogil` function.
        work: rough number of elementary operations; small work is done by the call here alone.
        arguments: passed on unchanged.
    """
    threads = torch.get_num_threads()
    if threads <= 1 or work < INLINE_SHARED:
        kernel(*arguments)
        return
    pool = _executor(threads - 1)
    futures = [pool.submit(kernel, *arguments) for _ in range(threads - 1)]
    kernel(*arguments)
    for future in futures:
        future.cancel()
