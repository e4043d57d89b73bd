"""Conversion on a Spark cluster: tokenised and written by its executors, the same rows in order.

The rows are read and examined here, as ever, and laid down as parquet files beside the output,
which every machine must see under the same name. Executors encode them, once, and then write
shards through Streaming's `dataframe_to_mds`. Documents are packed in the windows of the local
engine, so that samples, their order and the ledger are the same; only more shards end early.
"""

import itertools
import json
import logging
import pickle
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from overture.data.conversion import Conversion
from overture.data.encode import Encoded
from overture.data.shard_writer import REJECTED, Progress, join_shards, seal_split
from overture.data.write import ledger_of, packed, sample_of, tally, windows
from overture.errors import ConfigError, GuardError

FILE_BATCHES, FILE_BYTES = 25, 1 << 26  # of a parquet file, which bound what is held here
TASK_BATCHES = 25  # encoded by a task
PART_BYTES = 1 << 28  # of what a task packs and writes, which is held at once
ENCODED = "batch long, found binary, documents binary, bytes long"
PLACED = "batch long, window long, documents binary"


class Cluster(AbstractContextManager):
    """A Spark session with an encoder: the cluster of `spark-submit`, else `processes` cores here.

    Raises ConfigError: Java is not there, or `processes` are set beside those of `spark-submit`.
    """

    def __init__(self, encoder: Any, processes: int) -> None:
        self.encoder = encoder
        from pyspark import SparkConf, SparkContext
        from pyspark.sql import SparkSession

        options = {
            "app.name": "overture",
            "ui.enabled": "false", "ui.showConsoleProgress": "false",
            "executorEnv.TOKENIZERS_PARALLELISM": "false",
            "executorEnv.PYTHONPATH": str(Path(__file__).parents[2]),
        }  # fmt: skip
        # A part of a split comes to its task at once, which packs it.
        build = SparkSession.builder.config("spark.sql.execution.arrow.maxRecordsPerBatch", "0")
        try:
            SparkContext._ensure_initialized()  # before it the options of spark-submit are unknown
            given = SparkConf()
            here = given.get("spark.master", "local[*]") == "local[*]"  # what it is by itself
            if not here and processes > 1:
                fault = "--processes is for one machine, not for the cluster of spark-submit"
                raise ConfigError(f"{fault}, which has options of its own")
            for name, value in options.items():
                if not given.contains(f"spark.{name}"):
                    build = build.config(f"spark.{name}", value)
            self.session = (build.master(f"local[{processes}]") if here else build).getOrCreate()
        except ConfigError:
            raise
        except Exception as error:  # of the gateway's many kinds
            fault = f"--engine spark: it does not start ({_last_line(error)})"
            raise ConfigError(f"{fault}; it needs Java 8, 11 or 17, and JAVA_HOME") from None
        self.session.sparkContext.setLogLevel("OFF")

    def __exit__(self, *_: Any) -> None:
        with suppress(Exception):  # it may be gone, and what it was that failed is known
            self.session.stop()


def write_split(
    job: Conversion, folder: Path, rows: Any, cluster: Cluster, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write one split into `folder` and return its ledger, as `write.write_split` does.

    Raises ConfigError: no row is left, or one is too long under `--overflow error`. GuardError: a
    task of the cluster failed as often as Spark tries it.
    """
    session, columns, folder = cluster.session, cluster.encoder.columns, folder.resolve()
    place = folder / rows.split
    stage, out = (folder / f".{rows.split}.{what}" for what in ("rows", "parts"))
    for left in (place, stage, out):  # of an interrupted conversion
        shutil.rmtree(left, ignore_errors=True)
    (folder / f"{rows.split}.journal").unlink(missing_ok=True)  # of the local engine
    place.mkdir()
    progress, where, part, filled = Progress(), {}, 0, 0
    count, tags = _lay_down(rows, stage)
    if not count:
        ledger_of(job, rows, columns, facts, progress)  # which refuses it
    with _named(rows.split):
        table = session.read.parquet(f"file://{stage}")
        at_once = session.sparkContext.defaultParallelism
        tasks = max(4 * at_once, count // TASK_BATCHES)
        encode = partial(_encode, encoder=cluster.encoder, labels=facts["labels"])
        encoded = table.repartition(tasks).mapInPandas(encode, ENCODED).persist()
        found = encoded.select("batch", "found", "bytes").orderBy("batch").collect()
    room = min(job.size_limit, PART_BYTES, max(1, sum(row.bytes for row in found) // at_once))
    batches = ((tag, pickle.loads(row.found)) for tag, row in zip(tags, found, strict=True))
    ahead = iter(found)
    with (place / REJECTED).open("w", encoding="utf-8") as rejects:
        for number, window in enumerate(windows(job, rows, batches)):
            rejects.writelines(json.dumps(entry) + "\n" for entry in window.rejected)
            progress.counts.update(window.notes)
            progress.dropped.update(entry["reason"] for entry in window.rejected)
            for row in itertools.islice(ahead, window.batches):
                where[row.batch] = (part, number)
                filled += row.bytes
            if filled >= room:
                part, filled = part + 1, 0
    progress.samples = progress.counts["documents"]  # none, and it is refused before it is written
    ledger_of(job, rows, columns, facts, progress)
    with _named(rows.split):
        lines = encoded.rdd.map(partial(_placed, where=where)).partitionBy(part + 1, int).values()
        parts = session.createDataFrame(lines, PLACED).sortWithinPartitions("batch")
        options = {"compression": job.compression, "size_limit": job.size_limit}
        options |= {"out": str(out), "columns": columns, "hashes": ["sha256", "xxh64"]}
        from streaming.base.converters import dataframe_to_mds

        more = {"job": job, "columns": columns, "facts": facts}
        logging.disable(logging.WARNING)  # it warns of what is meant here
        try:
            dataframe_to_mds(parts, mds_kwargs=options, udf_iterable=_samples, udf_kwargs=more)
        finally:
            logging.disable(logging.NOTSET)
        encoded.unpersist()
    shards = join_shards([out], place)
    progress.samples = sum(shard["samples"] for shard in shards)
    for left in (stage, out):
        shutil.rmtree(left)
    return seal_split(place, shards, ledger_of(job, rows, columns, facts, progress))


def _lay_down(rows: Any, stage: Path) -> tuple[int, Iterator[Any]]:
    """Write the rows of a split as parquet files, a line for each batch.

    Returns how many batches there are, and what came with each, to be read once.
    """
    stage.mkdir()
    count, lines, held = 0, [], 0

    def write() -> None:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), stage / f"{count:08}.parquet")

    with (stage / "_tags").open("wb") as tags:  # a name that Spark passes over
        for tag, records in rows.batches():
            pickle.dump(tag, tags)
            lines.append({"batch": count, "records": pickle.dumps(records)})
            count, held = count + 1, held + len(lines[-1]["records"])
            if len(lines) == FILE_BATCHES or held > FILE_BYTES:
                write()
                lines, held = [], 0
    if lines:
        write()

    def read() -> Iterator[Any]:
        with (stage / "_tags").open("rb") as tags:
            while tags.peek(1):
                yield pickle.load(tags)

    return count, read()


def _encode(tables: Iterable[Any], encoder: Any, labels: Any) -> Iterator[Any]:
    """On an executor: encode batches; what the driver counts goes apart from the documents."""
    import pandas as pd

    names = ["batch", "found", "documents", "bytes"]
    for table in tables:
        for number, records in zip(table["batch"], table["records"], strict=True):
            documents, drops, notes = encoder.encode(pickle.loads(records))
            counted = Encoded([None] * len(documents), drops, notes + tally(documents, labels))
            content = pickle.dumps(documents)
            line = (number, pickle.dumps(counted), content, len(content))
            yield pd.DataFrame([line], columns=names)


def _placed(row: Any, where: dict[int, tuple[int, int]]) -> tuple[int, tuple[int, int, bytes]]:
    part, window = where[row.batch]
    return part, (row.batch, window, row.documents)


def _samples(table: Any, job: Conversion, columns: Any, facts: Any) -> Iterator[dict[str, Any]]:
    """On an executor: yield the samples of a part of a split, window by window."""
    for _, lines in table.groupby("window"):
        documents = [one for content in lines["documents"] for one in pickle.loads(content)]
        for row in packed(job, documents, Progress()):
            yield sample_of(row, columns, facts)


@contextmanager
def _named(split: str) -> Iterator[None]:
    """Raise ConfigError where a worker did, else GuardError with the last line that Spark said."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("pyspark", "py4j"):
            raise
        said = _last_line(error)
        if said.startswith(f"{ConfigError.__module__}.ConfigError: "):
            raise ConfigError(said.partition(": ")[2]) from None
        raise GuardError(f"--engine spark: {split} was not written ({said})") from None


def _last_line(error: Exception) -> str:
    """Return what a Python worker said last, or else the first line of an error."""
    text = str(getattr(error, "java_exception", error))
    said = [line.strip() for line in text.split("\n") if line.strip()]
    errors = [line for line in said if "Error: " in line and not line.startswith(("at ", "org."))]
    return (errors or said or [type(error).__name__])[-1 if errors else 0][:300]
