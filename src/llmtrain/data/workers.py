"""Work that is independent piece by piece, done by several processes, with a display of how far it is."""

import logging
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from llmtrain.config.errors import DataError
from llmtrain.config.interrupts import interrupts_held_back

log = logging.getLogger(__name__)

SMALL_BYTES = 8_000_000  # less is done before other processes have started
LOG_SECONDS = 30.0

Work = Callable[[Any, int], None]

# In a worker: what all tasks share, and how many bytes of text have been worked on, over all processes.
_shared: Sequence[Any] = ()
_bytes_done: Any = None


def advance(num_bytes: int) -> None:
    """Called by the work: so many more bytes of text are done."""
    if _bytes_done is not None:
        with _bytes_done.get_lock():
            _bytes_done.value += num_bytes


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    what: str, work: Work, shared: Sequence[Any], tasks: Sequence[tuple[int, int]], sizes: Sequence[int],
    processes: int | None,
) -> None:  # fmt: skip
    """Call `work(shared[index], number)` for every task (index, number), of about `sizes` bytes, in any order.

    In this process where there is little to do or `processes` is 1. The first exception ends all of it and is raised
    here; raises DataError where a process was killed.
    """
    global _bytes_done
    workers = min(len(tasks), processes or num_cores())
    context = multiprocessing.get_context("spawn")
    _bytes_done = context.Value("q", 0)
    with _display(what, sum(sizes)) as show:
        if workers <= 1 or sum(sizes) < SMALL_BYTES:
            for (index, number), size in zip(tasks, sizes, strict=True):
                work(shared[index], number)
                show(size)
            return
        threads = max(1, (processes or num_cores()) // workers)
        others = multiprocessing.active_children()
        # by a file: what is sent to a process that has died while starting is waited for, for ever, beyond 64 kB
        with tempfile.NamedTemporaryFile(delete=False) as file:
            pickle.dump(shared, file)
        pool = ProcessPoolExecutor(workers, context, _begin, (file.name, _bytes_done, threads))
        try:
            with interrupts_held_back():  # a terminal sends Ctrl-C to all: this process alone answers it
                futures = {
                    pool.submit(_call, work, *task): size for task, size in zip(tasks, sizes, strict=True)
                }  # fmt: skip
            _wait_for(futures, show)
        except KeyboardInterrupt:
            for worker in set(multiprocessing.active_children()).difference(others):
                worker.terminate()  # a portion may take a minute, and what is unfinished is done again anyway
            raise
        except BrokenProcessPool:
            raise DataError(
                f"{what}: a process was killed, perhaps for want of memory. What is finished is kept: run the command "
                "again, with fewer processes if need be."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            os.unlink(file.name)


def _wait_for(futures: dict[Future[None], int], show: Callable[[int], None]) -> None:
    left = set(futures)
    while left:
        done, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        show(sum(futures[future] for future in done))


def _begin(shared: str, bytes_done: Any, threads: int) -> None:
    global _shared, _bytes_done
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    with open(shared, "rb") as file:
        _shared = pickle.load(file)
    _bytes_done = bytes_done
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(work: Work, index: int, number: int) -> None:
    work(_shared[index], number)


@contextmanager
def _display(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else a line now and then; yields what is called with the bytes of finished tasks."""
    counter, start, last = _bytes_done, time.monotonic(), time.monotonic()
    console = Console(stderr=True)
    done = 0

    def said() -> str:
        megabytes, seconds = counter.value / 1e6, max(time.monotonic() - start, 1e-3)
        return f"{megabytes:,.0f} MB of text, {megabytes / seconds:.1f} MB/s"

    if not console.is_terminal:

        def show(size: int) -> None:
            nonlocal done, last
            done += size
            if time.monotonic() - last > LOG_SECONDS:
                last = time.monotonic()
                print(f"{what}: {done / max(total, 1):.0%} of the files, {said()}", file=sys.stderr, flush=True)

        yield show
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=max(total, 1))
        yield lambda size: progress.update(task, advance=size, description=f"{what}: {said()}")
