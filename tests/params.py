"""Cases of a test of which some are soon done, and all run where there is time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], *soon: Any) -> list[Any]:
    """All cases, marked slow except for those named after them."""
    return [case if case in soon else pytest.param(case, marks=pytest.mark.slow) for case in cases]
