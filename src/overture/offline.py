"""A hub that cannot be reached: known at once, after which the cache alone is asked."""

import sys
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

TRIES, PATIENCE = 3, 10.0  # seconds in all
AWAY = "the hub is not asked, or cannot be, and the cache has none"


def in_reach(name: str) -> bool:
    """Return whether a name is of a path here, or the hub answers; if not, stay offline from here.

    The hub's client alone would ask six times for each file, in 23 seconds or more, a dozen files a
    model: on nodes without a network, before what they have in their cache is used.
    """
    return Path(name).exists() or _hub_answers()


@cache
def _hub_answers() -> bool:
    from huggingface_hub import configure_http_backend, constants
    from huggingface_hub.utils import get_session

    answered = threading.Event()

    def ask() -> None:
        for pause in range(TRIES):
            time.sleep(pause)
            with suppress(OSError):  # as all errors of requests are
                get_session().head(constants.ENDPOINT, timeout=5)
                return answered.set()

    if not constants.HF_HUB_OFFLINE:
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(PATIENCE)  # a timeout is of each address that a name has
    if not answered.is_set():
        constants.HF_HUB_OFFLINE = True  # what the environment variable would have set
        if copy := sys.modules.get("transformers.utils.hub"):
            copy._is_offline_mode = True
        configure_http_backend()  # sessions that are open would still ask
    return answered.is_set()
