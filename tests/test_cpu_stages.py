# SPDX-License-Identifier: BSD-3-Clause
"""benchmarks/cpu_stages.py: the cut into stages, the laps that count, the table."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resnet_fused import models
from resnet_fused.bench import subjects
from resnet_fused.timing import Ratio
from source_tree import benchmarks

common = benchmarks("cpu_common")
stages = benchmarks("cpu_stages")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small calls of several threads are slow on a machine that is busy with other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("blocks", [False, True])
def test_the_chain_of_stages_is_the_network(blocks: bool) -> None:
    """Breaks if a layer is lost, run twice or changed; 65 is a size that halves unevenly."""
    model: Any = subjects.make_model("resnet50")
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 65, 65)
    cut = stages.pieces(model, blocks)
    names = ["layer1.2", "layer2.0", "layer4.2"] if blocks else list(stages.LAYERS)
    assert len(cut) == (2 + 16 if blocks else 6) and set(names) < set(cut)
    assert next(iter(cut)) == "stem" and list(cut)[-1] == "head"
    plain = stages.plain_pieces(model, blocks)
    with torch.inference_mode():
        for whole, chain in ((model, cut), (subjects.plain(model), plain)):
            torch.testing.assert_close(stages.Chain(list(chain.values()), x)(), whole(x))
    assert isinstance(model.layer1, nn.Sequential) and len(model.layer1) == 3  # left as it was


def test_the_stages_do_the_networks_work() -> None:
    """Breaks if operations or bytes are left out or counted twice."""
    model = models.resnet18().eval()
    x = torch.randn(2, 3, 64, 64)
    done = stages.work(stages.plain_pieces(model, False), x)
    assert sum(w.flop for w in done.values()) == pytest.approx(
        2 * 2 * 1e9 * subjects.gmacs("resnet18", 64), rel=1e-12
    )
    wanted = sum(p.nbytes for p in model.parameters())
    wanted += sum(b.nbytes for b in model.buffers() if b.dim() == 1)  # running mean and variance
    assert sum(w.weights for w in done.values()) == wanted
    assert done["stem"].read == x.nbytes and done["stem"].written == 4 * 2 * 64 * 16 * 16
    assert done["layer2"].read == done["layer1"].written == done["stem"].written
    assert done["layer2"].written == done["layer1"].written / 2
    assert done["head"].written == 4 * 2 * 1000
    head = done["head"]
    assert head.bytes == head.read + head.written + head.weights


def test_every_lap_is_clocked_in_order() -> None:
    """Breaks if a stage's time is given to its neighbour, or a result is lost."""
    clock = iter([0, 1_000_000, 3_000_000, 10, 20, 30])
    one, two = (lambda x: x + 1), (lambda x: x * 2)
    chain = stages.Chain([one, two], torch.tensor(3.0), now=lambda: next(clock))
    assert chain() == 8 and chain() == 8
    assert chain.laps == [[1.0, 2.0], [1e-5, 1e-5]]


def test_stages_are_compared_round_by_round() -> None:
    """Breaks if the ratio is upside down, or a clock that halves between rounds moves it."""
    ours = [[[1.0, 5.0], [1.0, 5.0]], [[2.0, 9.0]], [[4.0, 9.0]]]
    eager = [[[3.0, 1.0]], [[6.0, 1.0]], [[12.0, 1.0]]]
    first = stages.stage_times(ours, eager, slice(0, 1))
    assert first[:2] == (1.5, 6.0)
    assert (first[2].value, first[2].noise) == pytest.approx((3.0, 0.0))
    assert stages.stage_times(ours, eager, slice(None))[:2] == (8.5, 7.0)


def test_a_cut_that_loses_something_is_refused() -> None:
    """Breaks if times are given for stages that are not the network."""
    y = torch.tensor([[1.0, 2.0]])
    stages.check(y + 1e-4, y, "fp32", "eager")
    with pytest.raises(RuntimeError, match="stages of eager do not add up to the network"):
        stages.check(y + 0.1, y, "fp32", "eager")


def test_the_table_holds_every_stage() -> None:
    """Breaks if a figure lands in another column or unit."""
    work = stages.Work(4e9, 1e6, 2e6, 3e6)
    fixed = ("resnet18", "bf16", 1, 32)
    ratio = Ratio(2.5, 2.4, 2.6, 0.1, 9)
    row = stages.Row(*fixed, "layer1", work, 2.0, 5.0, ratio, 0.5, 4.0)
    head, line = stages.table([row]).splitlines()
    assert head.split()[0] == "stage" and len(head) == len(line)
    ours, eager = ["2.000", "50%", "50%", "3.0"], ["5.000", "20%", "1.2"]
    assert line.split() == ["layer1", "4.00", "1.00", "2.00", "3.00", *ours, *eager, "2.50x"]


def test_stages_are_measured_from_end_to_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if the script does not run, or a stage is missing from what it writes or from its sum.

    The stages' clock ticks once a reading: the times of a machine that also does other work would
    prove nothing.
    """
    monkeypatch.setattr(common, "matmul_rate", lambda dtype, count: 2.0)
    ticks = itertools.count(0, 1_000_000)
    monkeypatch.setattr(stages, "Chain", partial(stages.Chain, now=lambda: next(ticks)))
    place = tmp_path / "stages.csv"
    what = ["--model", "resnet18", "--size", "32", "--batch", "2", "--dtype", "bf16,fp32"]
    options = ["--budget-s", "0.3", "--rounds", "3", "--output", str(place)]
    assert stages.main([*what, *options]) == 0
    assert "resnet18 bf16 batch 2" in capsys.readouterr().out
    rows = list(csv.DictReader(place.open()))
    wanted = ["stem", *stages.LAYERS, "head", "sum", "whole"]
    assert [row["stage"] for row in rows] == wanted * 2
    shares = [float(row["share_of_time"]) for row in rows[:7]]
    assert shares == pytest.approx([1 / 6] * 6 + [1], abs=1e-6)  # six digits are written
    for row in rows:
        assert row["torch"] == torch.__version__ and float(row["median_ms"]) > 0
