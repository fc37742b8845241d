"""A call that takes too long, too much memory, or its process with it, ends alone."""
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from common.limited import LimitedProcesses, LimitExceeded


def fail(text: str) -> None:
    raise ValueError(text)


def take(megabytes: int) -> int:
    return len(bytearray(megabytes * 2**20))


@pytest.fixture(scope='module')
def processes() -> LimitedProcesses:
    return LimitedProcesses(1, 60, 400)


def test_a_call_returns_or_raises_what_the_function_does(processes):
    assert processes.call(os.path.join, 'a', 'b') == 'a/b'
    with pytest.raises(ValueError, match='no'):
        processes.call(fail, 'no')
    assert processes.call(os.getpid) == processes.call(os.getpid) != os.getpid()


def test_memory_is_limited(processes):
    assert processes.call(take, 100) == 100 * 2**20
    with pytest.raises(MemoryError):
        processes.call(take, 800)


def test_a_process_that_dies_or_takes_too_long_is_replaced(processes):
    first = processes.call(os.getpid)
    with pytest.raises(LimitExceeded, match='its process has died'):  # as when the system kills it
        processes.call(os.abort)
    second = processes.call(os.getpid)
    processes.seconds = 0.1
    with pytest.raises(LimitExceeded, match='more than 0.1 seconds'):
        processes.call(time.sleep, 1000)
    processes.seconds = 60
    assert len({first, second, processes.call(os.getpid)}) == 3


class SlowToImport:
    """Takes a second when a process unpickles it."""

    def __reduce__(self):
        return import_slowly, ()


def import_slowly():
    time.sleep(1)
    return abs


def test_the_start_of_a_process_does_not_count():
    worker = LimitedProcesses(1, 60, 400).start(SlowToImport())
    worker.pipe.send((abs, (-1,)))
    assert worker.pipe.poll(60)
    assert worker.pipe.recv() == 1
    worker.process.kill()


def test_more_threads_than_processes_wait(processes):
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda number: processes.call(abs, number), range(-9, 0))) == list(range(9, 0, -1))
