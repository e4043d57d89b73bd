"""Finished splits to object stores (s3://, gs://, ...), through Streaming's own uploaders."""

import re
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from streaming.base.storage.download import CloudDownloader
from streaming.base.storage.upload import CloudUploader

from overture.data.schema import INDEX, LEDGER
from overture.errors import ConfigError

SILENCE = 15  # seconds in which nothing arrives from S3


def fetch(remote: str, local: Path, download: Callable[[], Any] | None = None) -> None:
    """Download a file, by `download` if given; raises what each store's client raises.

    Also TimeoutError where S3 is silent: its client asks so often, and waits a minute each time,
    that a run would stand still for a quarter of an hour.
    """
    download = download or partial(CloudDownloader.direct_download, remote, str(local))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            download()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    arrived, since = 0, time.monotonic()
    while thread.is_alive():
        thread.join(0.5)
        now = 0
        for part in local.parent.glob(f"{local.name}*"):  # the client's own name begins so
            with suppress(FileNotFoundError):
                now += part.stat().st_size
        if now != arrived:
            arrived, since = now, time.monotonic()
        elif remote.startswith("s3://") and time.monotonic() - since > SILENCE:
            raise TimeoutError(f"nothing arrived for {SILENCE} seconds")
    if failures:
        raise failures[0]


def holds_split(remote: str) -> bool:
    """Return whether a ledger is at `remote`, which is what makes a split whole there.

    ConfigError if that cannot be asked.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            fetch(f"{remote}/{LEDGER}", Path(folder, LEDGER))
        except Exception as error:  # each store's client has its own way to say no such object
            said = " ".join(f"{type(error).__name__}: {error}".split())
            response = getattr(error, "response", None)  # botocore's is a dict
            refused = isinstance(response, dict) and response["Error"]["Code"] == "403"
            if not refused and re.search(r"404|NoSuch|not ?found", said, re.IGNORECASE):
                return False
            fault = f"--out_root: {remote} cannot be asked for what is there ({said[:200]})"
            raise ConfigError(f"{fault}; if nothing is, give --overwrite") from None
    return True


def upload_split(folder: Path, remote: str) -> None:
    """Upload a finished split, its ledger last, which makes it whole; ConfigError if refused."""
    names = [p.name for p in sorted(folder.iterdir()) if p.name not in (INDEX, LEDGER)]
    try:
        uploader = CloudUploader.get((str(folder), remote), keep_local=True, exist_ok=True)
        for name in [*names, INDEX, LEDGER]:
            uploader.upload_file(name)
    except Exception as error:
        fault = f"{remote}: cannot be written to ({' '.join(str(error).split())[:200]})"
        remedy = "give --resume to upload it without converting again"
        raise ConfigError(f"{fault}; the finished split is in {folder}: {remedy}") from None
