"""Call functions on a stranger's data in processes of their own, which are killed if a call takes too long.

    processes = LimitedProcesses(2, seconds=10, megabytes=2000)
    image = processes.call(decode, data)        # blocks; raises what `decode` raises, or LimitExceeded
"""
import contextlib
import multiprocessing.connection
import queue
import signal
from pathlib import Path
from typing import NamedTuple


class LimitExceeded(Exception):
    """A call that took too much time or memory, and was ended."""


class Worker(NamedTuple):
    """A process that answers calls."""

    process: multiprocessing.process.BaseProcess
    pipe: multiprocessing.connection.Connection  # our end


class LimitedProcesses:
    """Processes that call functions, each started by its first call and kept; threads may share them.

    Args:
        count: calls at the same time.
        seconds: of a call.
        megabytes: of a call, beside what the process holds before; where the system can limit it.
    """

    def __init__(self, count: int, seconds: float, megabytes: int):
        self.seconds, self.megabytes = seconds, megabytes
        self.idle = queue.LifoQueue()
        for _ in range(count):
            self.idle.put(None)  # not started

    def call(self, function, *args):
        """Call a function that a process can import; waits for a process that is free."""
        worker, is_valid = self.idle.get(), False
        try:
            worker = worker or self.start(function)
            worker.pipe.send((function, args))
            if not worker.pipe.poll(self.seconds):
                raise LimitExceeded(f'it takes more than {self.seconds} seconds')
            result = worker.pipe.recv()
            is_valid = True
        except (BrokenPipeError, ConnectionResetError, EOFError):
            raise LimitExceeded('its process has died, as when memory runs out') from None
        finally:
            if not is_valid and worker is not None:
                worker.process.kill()
            self.idle.put(worker if is_valid else None)
        if isinstance(result, Exception):
            raise result
        return result

    def start(self, function) -> Worker:
        """Start a process that has imported a function, which may take longer than a call."""
        # Forked from a process without threads, which has imported what the script imports.
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context('forkserver' if 'forkserver' in methods else 'spawn')
        ours, theirs = context.Pipe()
        process = context.Process(target=answer_calls, args=(theirs, self.megabytes, function), daemon=True)
        process.start()
        theirs.close()
        ours.recv()  # it is ready
        return Worker(process, ours)


def answer_calls(pipe, megabytes: int, _imported) -> None:
    """Call what is sent through a pipe, until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends this process
    limit_memory(megabytes)
    with contextlib.suppress(EOFError, OSError):
        pipe.send('ready')
        while True:
            function, args = pipe.recv()
            try:
                result = function(*args)
            except Exception as error:
                result = error
            pipe.send(result)


def limit_memory(megabytes: int) -> None:
    """Let this process take so much memory beside what it has; no-op where the system has no such limit."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path('/proc/self/statm').read_text().split()[0])
        limit = pages * resource.getpagesize() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
