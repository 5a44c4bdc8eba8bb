"""What a worker leaves behind for the next work: nothing."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.gang import Clean, give_memory_back, rss_mb


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
