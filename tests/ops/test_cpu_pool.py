import multiprocessing
import threading

import numba as nb
import numpy as np
import pytest
import torch

from milonga.ops import cpu_pool
from milonga.ops.selective_scan import selective_scan

BIG = cpu_pool.INLINE_WORK * 100


@nb.njit(nogil=True)
def count(hits, first, last):
    for job in range(first, last):
        hits[job] += 1


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("jobs", [0, 1, 2, 3, 7, 100])
@pytest.mark.parametrize("work", [0, BIG])
def test_every_job_runs_once(threads, number: int, jobs: int, work: int) -> None:
    threads(number)
    hits = np.zeros(jobs, np.int64)
    cpu_pool.run(count, jobs, work, hits)
    assert (hits == 1).all()


def test_an_error_in_any_job_comes_out(threads) -> None:
    def fail(first: int, last: int) -> None:
        if last == 8:
            raise RuntimeError("job 7")

    threads(2)
    with pytest.raises(RuntimeError, match="job 7"):
        cpu_pool.run(fail, 8, BIG)
    hits = np.zeros(8, np.int64)
    cpu_pool.run(count, 8, BIG, hits)
    assert (hits == 1).all()


def test_several_python_threads_at_once(threads) -> None:
    threads(2)
    hits = [np.zeros(50, np.int64) for _ in range(4)]

    def work(mine: np.ndarray) -> None:
        for _ in range(20):
            cpu_pool.run(count, 50, BIG, mine)

    workers = [threading.Thread(target=work, args=(mine,)) for mine in hits]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all((mine == 20).all() for mine in hits)


INPUTS: dict[str, torch.Tensor] = {}


def in_child(queue) -> None:
    # PyTorch's own parallel loops hang in a child forked after one has run in the parent (OpenMP): none may run here
    torch.utils.deterministic.fill_uninitialized_memory = False
    y, _ = selective_scan(**INPUTS, backend="cpu")
    queue.put(y.numpy().tobytes())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # from Python 3.12 on
def test_kernels_run_after_a_fork(threads) -> None:
    """As in a DataLoader's worker: the parent's pool is alive, the child makes its own."""
    threads(2)
    x, B = torch.randn(2, 300, 200), torch.randn(2, 300, 16)
    INPUTS.update(x=x, dt=x, A=-torch.rand(200, 16), B=B, C=B)
    y, _ = selective_scan(**INPUTS, backend="cpu")
    assert cpu_pool._pool is not None
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue,), daemon=True)
    child.start()
    try:
        assert queue.get(timeout=60) == y.numpy().tobytes()
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
    again, _ = selective_scan(**INPUTS, backend="cpu")
    assert torch.equal(again, y)
