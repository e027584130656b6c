"""Worker processes for a stream of items: what corpus.py parses, prepare.py cleans and encodes with."""

import itertools
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from scripts import InputError

WORKERS = min(8, os.cpu_count())  # more would wait for the process that reads and writes


def chunks(items: Iterable, most: int, size: Callable) -> Iterator[list]:
    """Items in lists that are full as soon as their sizes add up to `most`."""
    chunk, total = [], 0
    for item in items:
        chunk.append(item)
        total += size(item)
        if total >= most:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def start_worker(setup: Callable | None = None, *arguments):
    """A worker leaves Ctrl-C to its parent and dies with it, even if that is killed; then its own setup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (multiprocessing.connection.wait([parent]), os._exit(1)), daemon=True).start()
    if setup:
        setup(*arguments)


@contextmanager
def ctrl_c_afterwards():
    """Ctrl-C waits for the end of the block: in the middle of a fork Python would print its KeyboardInterrupt and go on as if nothing had
    been pressed, and a new worker would die of it before start_worker()."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Ctrl-C is the main thread's
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))  # another thread may still receive it
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a new worker inherits, however it is started
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def ordered_map(function: Callable, items: Iterable, workers: int, *setup) -> Iterator:
    """map() over worker processes, in order, with only a few items under way; without processes for a single item. `setup`, a function
    and its arguments, is called first in every process that maps. Raises InputError if a worker is killed."""
    items = iter(items)
    ahead = list(itertools.islice(items, 2))
    if workers == 1 or len(ahead) < 2:
        if setup:
            setup[0](*setup[1:])
        yield from map(function, itertools.chain(ahead, items))
        return
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=setup) as pool:
        pending = deque()
        try:
            for item in itertools.chain(ahead, items):
                with ctrl_c_afterwards():  # the first item starts the workers
                    pending.append(pool.submit(function, item))
                if len(pending) > workers + 2:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise InputError("a worker process was killed, perhaps because memory ran out: free some of it, then start again") from None
        finally:
            pool.shutdown(cancel_futures=True)
