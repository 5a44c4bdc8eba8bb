"""The processes that train one model together, as one of them sees them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch


NUM_RECORDED = 2000  # calls of NCCL that a rank remembers


def watch_nccl(folder: Path) -> None:
    """Let a rank on a GPU end when NCCL fails or waits for too long, and say where it stood.

    It then writes its last calls to `folder`, for torch's `torchfrtrace` to read. What the
    environment says already stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = str(folder / "rank-")  # its number follows
    settings = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": str(NUM_RECORDED),
        "TORCH_FR_DUMP_TEMP_FILE": where,
        "TORCH_NCCL_TRACE_BUFFER_SIZE": str(NUM_RECORDED),  # older names of the last two
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": where,
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `size`. Every rank has to call what is done together."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Self:
        """Those of torch's process group; where there is none, this process alone."""
        import torch

        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls()
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' values, in place. Together."""
        import torch

        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def extremes(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The least of all `low` and the greatest of all `high`, scalars. Together."""
        import torch

        if self.size == 1:
            return low, high
        both = torch.stack([-low, high])
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
        return -both[0], both[1]

    def told(self, text: str | None = None, *, group: object = None) -> str:
        """The text that rank 0 has; the others give none. Together."""
        import torch

        if self.size == 1:
            assert text is not None
            return text
        said = (
            torch.frombuffer(bytearray((text or "").encode()), dtype=torch.uint8) if text else None
        )
        length = torch.tensor([0 if said is None else len(said)])
        torch.distributed.broadcast(length, 0, group=group)
        if said is None:
            said = torch.empty(int(length), dtype=torch.uint8)
        if len(said):
            torch.distributed.broadcast(said, 0, group=group)
        return bytes(said.tolist()).decode()
