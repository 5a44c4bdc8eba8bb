"""The model hub: what its names look like, and whether it is there at all."""

from __future__ import annotations

import re
from functools import cache

ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
PATIENCE_S = 5.0


@cache
def is_reachable() -> bool:
    """Whether the hub answers. Where it does not, its libraries are told to look into their caches alone.

    Left to themselves they try again and again, for most of a minute, before they give up.
    """
    import datasets
    from huggingface_hub import constants, get_session

    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE_S)
        except Exception:  # the classes of its network library differ between versions
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE
