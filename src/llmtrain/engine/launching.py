"""Starting the processes of a run on this machine, and telling why they ended: the first failure ends all."""

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from llmtrain.config.errors import Preempted, UserError
from llmtrain.config.interrupts import interrupts_held_back, let_interrupt
from llmtrain.engine import rank_logs
from llmtrain.engine.distributed import leave

# Seconds in which processes that were interrupted along with this one end by themselves; and seconds for those that
# this one has to interrupt to write what they have begun to write.
OWN_END, LEAVE = 1.0, 20.0


def launched_by_others() -> bool:
    """Whether a launcher (torchrun, accelerate launch, ours) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def goes_first() -> bool:
    """Whether this process is the run's main one, as its launcher numbered it; known before they have joined."""
    return int(os.environ.get("RANK", "0")) == 0


def launch(function: Callable[..., Any], arguments: tuple[Any, ...], processes: int) -> None:
    """Run `function(*arguments)` in `processes` new processes on this machine; the first failure ends all.

    Raises what ended the process that failed first: its UserError or OSError, else RuntimeError with its traceback.
    """
    # how it stops the others is of no interest
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    failures = multiprocessing.get_context("spawn").SimpleQueue()
    arguments_of_all = (function, arguments, processes, _free_port(), failures)
    with interrupts_held_back():  # while they start, a traceback of theirs would be all that is seen
        running = start_processes(_run_as, arguments_of_all, nprocs=processes, join=False, start_method="spawn")
    try:
        with _handed_on([each.pid for each in running.processes]) as signals:
            while not running.join():
                pass
    except ProcessExitedException as ended:
        failure = None if failures.empty() else failures.get()
        killed = [number for number, each in enumerate(running.processes) if each.exitcode == -signal.SIGKILL]
        if isinstance(failure, UserError) or (failure and not killed):
            raise failure from None
        if signal.SIGTERM in signals:
            raise Preempted(
                "stopped by SIGTERM while no step was being trained. The same command goes on from the last "
                "checkpoint, or begins where there is none."
            ) from None
        # it had no time to say why; what the others said is only that they lost it
        number, reason = (killed[0], "SIGKILL") if killed else (ended.error_index, f"exit code {ended.exit_code}")
        raise UserError(
            f"process {number} of {processes} was ended from outside ({reason}); the others were stopped. "
            "Was there too little memory? The same command goes on from the last checkpoint."
        ) from None
    finally:
        _end(running.processes)


def _end(processes: Sequence[BaseProcess]) -> None:
    """End those that are still there, where this process was interrupted: they would train on in a folder left free."""
    try:
        _join(processes, OWN_END)
        for each in processes:
            if each.is_alive() and each.pid:
                os.kill(each.pid, signal.SIGINT)
        _join(processes, LEAVE)
    finally:  # interrupted once more
        for each in processes:
            each.kill()
            each.join()


def _join(processes: Sequence[BaseProcess], seconds: float) -> None:
    until = time.monotonic() + seconds
    for each in processes:
        each.join(max(0.0, until - time.monotonic()))


# Where a process that `launch` has started puts what ended it.
_failures: Any = None


def tell_launcher(error: UserError) -> None:
    """Say why this process is about to end, from any of its threads: `launch` raises it; without, it is printed."""
    if _failures is not None:
        _failures.put(error)
    else:
        print(f"error: {error}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _handed_on(processes: list[int]) -> Iterator[set[int]]:
    """Within, what a scheduler tells this process is told to all that it started; the signals that came."""
    came: set[int] = set()

    def hand_on(number: int, frame: FrameType | None) -> None:
        came.add(number)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_as(
    rank: int, function: Callable[..., Any], arguments: tuple[Any, ...], processes: int, port: int, failures: Any
) -> None:
    """What a new process does. Failures reach the parent in the order in which they happen: the cause comes first."""
    global _failures
    _failures = failures
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        let_interrupt()
        function(*arguments)
        leave()
    except Exception as error:
        seen = f"in process {rank}:\n{traceback.format_exc()[-20_000:]}"
        rank_logs.note(seen)
        if isinstance(error, OSError):
            error.add_note(seen)
        failures.put(error if isinstance(error, UserError | OSError) else RuntimeError(seen))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: taking leave of the others in good order could wait for them for ever


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def as_launched() -> Iterator[None]:
    """Within, the environment says where this process stands even if no launcher has set it: alone, that is."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    added = {name: value for name, value in alone.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
