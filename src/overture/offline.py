"""A hub that cannot be reached: known at once, after which the cache alone is asked."""

import time
from contextlib import suppress
from functools import cache
from pathlib import Path

TRIES = 3
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

    for pause in range(0 if constants.HF_HUB_OFFLINE else TRIES):
        time.sleep(pause)
        with suppress(OSError):  # as all errors of requests are
            get_session().head(constants.ENDPOINT, timeout=5)
            return True
    constants.HF_HUB_OFFLINE = True  # what the environment variable would have set
    configure_http_backend()  # sessions that are open would still ask
    return False
