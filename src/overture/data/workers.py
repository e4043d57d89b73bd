"""Batches of records encoded in order, by this process or by several."""

import gc
import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from overture.data.encode import Encoded
from overture.errors import GuardError
from overture.launcher import end_with

_encoder: Any = None  # in a worker process: what it encodes with


class Workers(AbstractContextManager):
    """Encodes in `processes` processes; a context manager. GuardError if one of them died.

    One process lets the tokenizer's own threads use all cores. More of them share the cores with
    one thread each (set TOKENIZERS_PARALLELISM=false), which scales better than the threads do.
    """

    def __init__(self, encoder: Any, processes: int) -> None:
        self.encoder, self.processes = encoder, processes
        self._pool = None
        # What the imports have made is here to stay: without this the collector goes through all
        # of it again and again, and forked workers would copy it.
        gc.freeze()
        if processes > 1:
            global _encoder
            _encoder = encoder  # forked workers have it without pickling or importing anything
            # Left alone they would wait for work without end, and hold the lock on the folder.
            fork, ends = multiprocessing.get_context("fork"), (os.getpid(), signal.SIGKILL)
            self._pool = ProcessPoolExecutor(processes, fork, end_with, ends)
            # All workers are forked now, before this process starts threads of its own.
            list(self._pool.map(len, [[]] * processes))

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def encode(self, batches: Iterable[tuple[Any, list[Any]]]) -> Iterator[tuple[Any, Encoded]]:
        """Yield (whatever came with a batch, its encoded records), in order."""
        if self._pool is None:
            yield from ((tag, self.encoder.encode(records)) for tag, records in batches)
            return
        batches = iter(batches)
        waiting: deque[tuple[Any, Future]] = deque()
        try:
            while True:
                ahead = 2 * self.processes - len(waiting)  # bounds memory
                for tag, records in itertools.islice(batches, ahead):
                    waiting.append((tag, self._pool.submit(_encode, records)))
                if not waiting:
                    return
                tag, future = waiting.popleft()
                yield tag, _parted(*future.result())
        except BrokenProcessPool:
            fault = "a worker process of the conversion died (out of memory?)"
            remedy = "run the same command with --resume and fewer --processes"
            raise GuardError(f"{fault}: {remedy}") from None


def _encode(records: list[Any]) -> tuple[Encoded, dict[str, tuple[np.ndarray, list[int]]]]:
    """Return the encoded records with their arrays joined, since each one costs to be sent."""
    encoded = _encoder.encode(records)
    first = encoded.documents[0] if encoded.documents else {}
    joined = {}
    for name in [name for name, value in first.items() if isinstance(value, np.ndarray)]:
        arrays = [document.pop(name) for document in encoded.documents]
        joined[name] = (np.concatenate(arrays), np.cumsum([0, *map(len, arrays)]).tolist())
    return encoded, joined


def _parted(encoded: Encoded, joined: dict[str, tuple[np.ndarray, list[int]]]) -> Encoded:
    for name, (whole, ends) in joined.items():
        for document, start, end in zip(encoded.documents, ends, ends[1:], strict=False):
            document[name] = whole[start:end]
    return encoded
