"""What a worker leaves behind for the next work: nothing."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.gang import Clean, give_memory_back, rss_mb
from orchestrator.ranks import watch_nccl


@pytest.fixture(scope="module")
def clean() -> Clean:
    return Clean()


def test_the_environment_is_as_it_was(clean, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("PATH", "elsewhere")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    clean.restore()
    assert dict(os.environ) == clean.environment


def test_torch_and_the_working_folder_are_as_they_were(clean, tmp_path):
    threads, here = torch.get_num_threads(), Path.cwd()
    os.chdir(tmp_path)
    torch.set_num_threads(threads + 1)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    clean.restore()
    assert (Path.cwd(), torch.get_num_threads()) == (here, threads)
    assert torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled()


def test_random_numbers_do_not_go_on_from_the_work_before(clean):
    drawn = []
    for before in (1, 5):
        for _ in range(before):
            torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
        clean.restore()
        drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))  # noqa: NPY002
    assert drawn[0] == drawn[1]


def test_no_process_group_and_no_state_of_accelerate_is_left(clean, tmp_path):
    from accelerate import Accelerator

    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    assert Accelerator(cpu=True, gradient_accumulation_steps=4).gradient_accumulation_steps == 4
    clean.restore()
    assert not torch.distributed.is_initialized()
    assert Accelerator(cpu=True).gradient_accumulation_steps == 1
    clean.restore()


def test_what_a_process_group_was_told_stays_with_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    before, own = Clean(), Clean()
    watch_nccl(tmp_path / "nccl")
    own.keep_group()
    own.restore()
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"  # a user's own
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        assert int(os.environ[name]) > 0
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        assert Path(os.environ[name]).parent == tmp_path / "nccl"
    assert (tmp_path / "nccl").is_dir()
    before.restore()


@pytest.mark.distributed
def test_a_rank_does_not_wait_for_ever(tmp_path):
    """Rank 1 joins, and then is not heard of until rank 0 has given up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    place["PYTHONPATH"] = str(Path(__file__).parents[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WAITS, str(tmp_path)],
            env=os.environ | place | {"RANK": str(rank)},
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    _, told = ranks[0].communicate()
    ranks[1].communicate("go\n")
    assert ranks[0].returncode == 1 and "imed out" in told


WAITS = """
import os, sys
from pathlib import Path
import torch
from orchestrator.ranks import Ranks
from orchestrator.training import join_ranks

join_ranks("cpu", Path(sys.argv[1]), timeout_s=3)
if Ranks.here().rank == 1:
    sys.stdin.readline()
    os._exit(0)
Ranks.here().total(torch.ones(1))
"""


def test_patched_functions_and_methods_are_as_they_were(clean):
    own = torch.nn.functional.gelu, torch.nn.Linear.forward
    torch.nn.functional.gelu = torch.relu
    torch.nn.Linear.forward = lambda self, x: x
    clean.restore()
    assert (torch.nn.functional.gelu, torch.nn.Linear.forward) == own


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells no memory")
def test_memory_of_a_work_is_returned_even_from_a_cycle():
    before = rss_mb()
    cycle: list[object] = [torch.ones(50_000_000)]
    cycle.append(cycle)
    assert rss_mb() > before + 150
    del cycle
    give_memory_back()
    assert rss_mb() < before + 50
