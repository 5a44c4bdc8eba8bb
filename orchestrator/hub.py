"""The model hub: what its names look like, whether it is there at all, and which commit it gives."""

from __future__ import annotations

import re
from functools import cache
from typing import Literal

from orchestrator.trial import BadInput

Kind = Literal["model", "dataset"]
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


def commit_of(name: str, *, kind: Kind, revision: str | None, what: str) -> str:
    """The commit that a branch, tag or commit (None: the main branch) stands for.

    Raises `BadInput`, with `what` named the repository.
    """
    from huggingface_hub import HfApi

    try:
        found = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=PATIENCE_S)
    except Exception as error:  # the classes of its network library differ between versions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise BadInput([f"{what}: the hub does not give {name}: {reason}."]) from error
    return str(found.sha)
