"""From a converted split to the DataSpec that Composer's Trainer takes."""

import faulthandler
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

from composer import DataSpec
from composer.utils import dist
from streaming import StreamingDataLoader

from overture.config.schema import Config, LoaderConfig
from overture.data.collate import count_tokens
from overture.data.leftovers import remove_leftovers
from overture.data.streams import TokenStream
from overture.errors import ConfigError, DataError, GuardError


class GuardedLoader(StreamingDataLoader):
    """A StreamingDataLoader whose workers' DataErrors stay the one sentence that they are.

    Where incomplete batches are dropped, an epoch is as long on any number of ranks: Streaming
    repeats rows until the ranks come out even, which may complete one more batch.
    """

    def __len__(self) -> int:
        return self._batches(self.dataset.epoch_size) if self.drop_last else super().__len__()

    def _batches(self, rows: int) -> int:
        return rows // (self.batch_size * dist.get_world_size())

    def __iter__(self) -> Iterator[Any]:
        most = self._batches(self.dataset.rows_left())
        try:
            for number, batch in enumerate(super().__iter__()):
                if number == most and self.drop_last:
                    return
                yield batch
        except (ConnectionError, EOFError) as error:  # it was sending a batch
            fault = f"a worker of the loader died ({type(error).__name__})"
            raise GuardError(f"{fault}; the same command goes on") from None
        except DataError as error:
            # torch puts the worker's traceback before the message; and its own traceback, which
            # holds itself in a circle, would keep the workers alive for ten seconds.
            error.__traceback__ = None
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None


def build_loader(
    config: Config, loader: LoaderConfig, collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    batch_size: int, stacks: IO[bytes] | None = None,
) -> DataSpec:  # fmt: skip
    """Return one of a config's loaders; `batch_size` is rows per rank, of which `collate` makes a
    batch. On SIGUSR2 workers write what they are doing to `stacks`, an open file, or to the
    terminal.

    The order of samples is fixed by the seed and the same on any number of ranks of one node; an
    incomplete last batch is filled with repeated ones until the ranks come out even. Raises
    ConfigError if every batch would be dropped or a stream gives no row, DataError as TokenStream
    does.
    """
    if dist.get_local_rank() == 0:
        remove_leftovers()
    dist.barrier()  # all ranks must find the same numbers taken
    seed, streams = loader.dataset.shuffle_seed, config.streams(loader)
    seed = config.seed if seed is None else seed
    order = {"shuffle": loader.dataset.shuffle, "shuffle_seed": seed, "num_canonical_nodes": 1}
    dataset = TokenStream(streams=[*streams.values()], **order, batch_size=batch_size)
    rows, full_batch = dataset.epoch_size, batch_size * dist.get_world_size()
    for name, stream in zip(streams, dataset.streams, strict=True):
        if not stream.choose:
            fault = f"streams.{name}: gives none of the {rows:,} rows of an epoch"
            raise ConfigError(f"{fault}; give it more weight, or leave it out")
    if loader.drop_last and rows < full_batch:  # training would wait for a batch for ever
        fault = f"{full_batch} samples make a batch, but {' and '.join(streams)} holds only"
        raise ConfigError(f"drop_last: {fault} {rows:,}; lower the batch size or convert more data")
    batches = GuardedLoader(
        dataset, batch_size, collate_fn=collate, num_workers=loader.num_workers,
        drop_last=loader.drop_last, worker_init_fn=partial(_begin_worker, stacks),
    )  # fmt: skip
    return DataSpec(
        batches, num_samples=rows, get_num_samples_in_batch=lambda batch: len(batch["input_ids"]),
        get_num_tokens_in_batch=count_tokens,
    )  # fmt: skip


def _begin_worker(stacks: IO[bytes] | None, worker: int) -> None:
    """Let a worker write its stacks when the watchdog asks, leave Ctrl-C and the first signal to
    stop to its parent, and say nothing of batches that nobody fetches any more.
    """

    def show(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = show
    faulthandler.register(signal.SIGUSR2, stacks or sys.stderr, all_threads=True)
    for number in (signal.SIGINT, signal.SIGUSR1):  # USR1 comes to all of a job until it has saved
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
