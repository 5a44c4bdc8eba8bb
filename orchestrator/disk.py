"""Room on the disk that a study is written to."""

from __future__ import annotations

import shutil
from pathlib import Path

SPARE_MB = 200.0  # for the ledger, logs and the report
COPIES = 3.0  # of a trial's largest artifact: its checkpoint, its graph and itself


class Disk:
    """Watches the free space below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def nearly_full(self, largest_mb: float) -> str | None:
        """Why another trial may not fit, None while it does; the largest artifact so far counts."""
        free = shutil.disk_usage(self.folder).free / 1e6
        needed = SPARE_MB + COPIES * largest_mb
        if free < needed:
            return f"{free:.0f} MB are free on the disk, another trial may need {needed:.0f}"
        return None
