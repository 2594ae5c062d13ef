# SPDX-License-Identifier: BSD-3-Clause
"""Fused models in other processes and behind torch's wrappers for several."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import fuse_zoo
from fuse_spy import ALL, calls, close, make
from fuse_zoo import image
from resnet_fused.fuse import fuse, unfuse
from resnet_fused.modules import Fused

one_thread = fuse_zoo.one_thread
__all__ = ["calls", "one_thread"]  # fixtures


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def work(model: nn.Module, x: torch.Tensor, results: Any) -> None:
    """Runs in a spawned process."""
    torch.set_num_threads(1)
    fused = [name for name, m in model.named_modules() if isinstance(m, Fused)]
    with torch.no_grad():
        results.put((fused, model(x).numpy(), unfuse(model)(x).numpy()))


def test_spawn() -> None:
    """A fused model does not get into a new process, is plain there, or has other weights."""
    model = fuse(make())
    context = mp.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=work, args=(model, image(), results))
    process.start()
    try:
        names, got, plain = results.get(timeout=120)
    finally:
        process.join(30)
    assert process.exitcode == 0
    assert names == [name for name, m in model.named_modules() if isinstance(m, Fused)] != []
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(got), model(image()))
        close(torch.from_numpy(plain), model(image()))


def test_state_dict_is_an_ordinary_file(calls: list[str]) -> None:
    """A saved state_dict needs unpickling of classes, or fits only the kind of model it is of."""
    plain = make()
    fused = fuse(plain)
    buffer = io.BytesIO()
    torch.save(fused.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = copy.deepcopy(plain)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    again = fuse(other)
    for m in (other, again):
        assert m.load_state_dict(state).missing_keys == []
    assert torch.equal(again(image()), fused(image())) and calls == ALL * 2
    assert torch.equal(other(image()), plain(image()))


def test_data_parallel_on_the_cpu(calls: list[str]) -> None:
    """The wrapper gets at a module that it cannot call."""
    fused = fuse(make())
    assert torch.equal(nn.DataParallel(fused)(image()), fused(image())) and calls == ALL * 2


def test_distributed_data_parallel(group: None, calls: list[str]) -> None:
    """The wrapper's hooks on parameters, or its buffers' broadcast, see something else; a wrapped
    model trains otherwise, or is not fused again afterwards.
    """
    plain = make()
    wrapped = nn.parallel.DistributedDataParallel(fuse(plain))
    assert torch.equal(wrapped.eval()(image()), fuse(plain)(image())) and calls == ALL * 2
    calls.clear()
    for m in (plain, wrapped):
        m.train()
        step = torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)
        for seed in range(5):
            step.zero_grad()
            m(image(4, seed=seed)).square().mean().backward()
            step.step()
    assert calls == []
    state = wrapped.module.state_dict()
    for name, want in plain.state_dict().items():
        assert torch.equal(state[name], want), name
    close(wrapped.eval()(image()), plain.eval()(image()))
    assert calls == ALL


def test_fully_sharded(group: None, calls: list[str]) -> None:
    """Sharding makes a subclass of a module's class: the fused forward is lost, or runs twice."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fuse(make())
    want = model(image())
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    calls.clear()
    got = model(image())
    assert torch.equal(got, want) and len(calls) == len(ALL)
