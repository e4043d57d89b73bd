"""Finished splits to object stores (s3://, gs://, ...), through Streaming's own uploaders."""

import tempfile
from pathlib import Path

from streaming.base.storage.download import CloudDownloader
from streaming.base.storage.upload import CloudUploader

from overture.data.schema import INDEX, LEDGER
from overture.errors import ConfigError

# Seconds that a store may keep silent. Its client asks up to five times itself, so that an answer
# comes within a minute, where Streaming's own would take six.
SILENCE = 10


def holds_split(remote: str) -> bool:
    """Return whether a ledger is at `remote`, which is what makes a split whole there."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            there, here = f"{remote}/{LEDGER}", f"{folder}/{LEDGER}"
            CloudDownloader.direct_download(there, here, timeout=SILENCE)
        except Exception:  # each store's client has its own way to say no such object
            return False
    return True


def upload_split(folder: Path, remote: str) -> None:
    """Upload a finished split, its ledger last, which makes it whole; ConfigError if refused."""
    names = [p.name for p in sorted(folder.iterdir()) if p.name not in (INDEX, LEDGER)]
    try:
        uploader = CloudUploader.get((str(folder), remote), keep_local=True, exist_ok=True)
        for name in [*names, INDEX, LEDGER]:
            uploader.upload_file(name)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{remote}: cannot be written to ({reason}); the finished split is in {folder}: give "
            "--resume to upload it without converting again"
        ) from None
