"""A real Slurm for tests, ended with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack

import pytest
from hosts import Hosts
from slurm_cluster import NoSlurm, Slurm, slurm_here, slurm_over


@pytest.fixture(scope="module", name="slurm")
def slurm_on_this_machine() -> Iterator[Slurm]:
    """Two nodes of four CPUs that are both this machine."""
    yield from started(slurm_here())


@pytest.fixture(scope="module", name="slurm")
def slurm_over_hosts(hosts: Hosts) -> Iterator[Slurm]:
    """A node of four CPUs on each of the hosts."""
    yield from started(slurm_over(hosts))


def started(cluster: AbstractContextManager[Slurm]) -> Iterator[Slurm]:
    """Skipped where Slurm is not installed or does not start."""
    with ExitStack() as stack:
        try:
            slurm = stack.enter_context(cluster)
        except NoSlurm as reason:
            pytest.skip(str(reason))
        yield slurm
