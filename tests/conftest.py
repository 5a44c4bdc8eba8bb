"""What several test files share."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from hosts import Hosts, NoHosts

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets; tests that ask for it are skipped where it is absent."""
    folder = Path(os.environ.get("SLIMTUNE_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no public data sets in {folder} (SLIMTUNE_SHARED_DATA names the folder)")
    return folder


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Three hosts with nothing running on them; a module may start what it needs there."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(Hosts(3))
        except NoHosts as reason:
            pytest.skip(str(reason))
        yield made


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of torch come out the same each time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str

    @property
    def problems(self) -> list[str]:
        return [line.removeprefix("✗ ") for line in self.err.splitlines() if line.startswith("✗ ")]


class Here:
    """The command, in this process: `Here(…)("run", recipe)`."""

    def __init__(self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.capsys, self.patch = capsys, patch

    def __call__(self, *arguments: object) -> Ended:
        from orchestrator import cli

        self.patch.setattr(sys, "argv", ["slimtune", *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = self.capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)


@pytest.fixture
def slimtune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """The command in this process; what it starts finds the package too."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return Here(capsys, monkeypatch)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests were skipped, and for which reasons."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    terminalreporter.write_line(f"skipped: {len(skipped)}")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"  {count} × {reason}")
