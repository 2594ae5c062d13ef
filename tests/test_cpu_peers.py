# SPDX-License-Identifier: BSD-3-Clause
"""benchmarks/cpu_peers.py and cpu_stages.py: what they are told, compare, compute and write."""

from __future__ import annotations

import csv
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fused import models
from resnet_fused.bench import subjects
from resnet_fused.bench.contenders import Contender
from resnet_fused.bench.results import Setting
from resnet_fused.timing import Ratio
from source_tree import benchmarks

common = benchmarks("cpu_common")
contenders = benchmarks("cpu_contenders")
cold = benchmarks("cpu_cold")
peers = benchmarks("cpu_peers")

SETTING = Setting("resnet18", "bf16", 2, 32)
QUICK = [
    "--model",
    "resnet18",
    "--size",
    "32",
    "--batch",
    "2",
    "--budget-s",
    "0.3",
    "--rounds",
    "3",
]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small calls of several threads are slow on a machine that is busy with other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products that take no time: 2 TFLOP/s for everything."""
    monkeypatch.setattr(common, "matmul_rate", lambda dtype, count: 2.0)


# ------------------------------------------------------------------------------------ arguments
def test_lists_are_read_in_order_and_once() -> None:
    """Breaks if a setting is measured twice or the order that was asked for is lost."""
    args = peers.parser().parse_args(["--batch", "16,1,16", "--dtype", "fp32-high, bf16"])
    assert args.batch == [16, 1] and args.dtype == ["fp32-high", "bf16"]
    defaults = peers.parser().parse_args([])
    assert defaults.batch == [1, 16] and defaults.dtype == ["bf16"]
    assert defaults.model == ["resnet50"] and defaults.peers == list(contenders.PEERS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--batch", "0"], "--batch: must be whole numbers of 1 or more"),
        (["--batch", "1,x"], "got '1,x'"),
        (["--size", "1,2"], "--size: must be a whole number of 1 or more, got '1,2'"),
        (["--dtype", "fp16"], "of fp32, fp32-high, bf16, got fp16"),
        (["--model", "vgg16"], "got vgg16"),
        (["--peers", ","], "--peers must be of channels_last, compile, openvino, onnxruntime"),
        (["--peers", "tvm,openvino"], "got tvm"),
        (["--budget-s", "nan"], "must be a positive number of seconds, got 'nan'"),
        (["--cold-runs", "-1"], "--cold-runs: must be a whole number of 0 or more, got '-1'"),
        (["--output", "no/such/folder/a.csv"], "make no/such/folder first"),
    ],
)
def test_a_wrong_argument_is_named(
    wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if a mistake is found out after minutes of measuring, or without its name."""
    with pytest.raises(SystemExit) as stopped:
        peers.main(wrong)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_precision_is_put_back() -> None:
    """Breaks if a setting that failed leaves the whole process in another precision."""
    asked = []
    for dtype in common.DTYPES:
        with pytest.raises(KeyError), common.precision(dtype):
            asked.append(torch.get_float32_matmul_precision())
            raise KeyError
        assert torch.get_float32_matmul_precision() == "highest"
    assert asked == ["highest", "high", "highest"]


# ------------------------------------------------------------------------------------ peers
def test_missing_peers_are_left_out_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a peer that is not there ends the run, or is missing without a word."""
    found = {"onnx"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in found else None)
    kept, lines = contenders.present(contenders.PEERS, "fp32")
    assert kept == ["channels_last", "compile"]
    assert lines == [
        "openvino is left out in fp32: not installed; pip install openvino",
        "onnxruntime is left out in fp32: not installed; pip install onnxruntime",
    ]
    found |= {"openvino", "onnxruntime"}
    assert contenders.present(contenders.PEERS, "fp32-high") == (list(contenders.PEERS), [])
    kept, lines = contenders.present(contenders.PEERS, "bf16")
    assert "onnxruntime" not in kept and "does not compute convolutions in bfloat16" in lines[0]


def _contender(name: str, logits: torch.Tensor | None) -> Contender:
    call = None if logits is None else lambda: logits
    return Contender(name, "nhwc", "test", call, "no luck" if logits is None else "")


def test_other_logits_end_the_run() -> None:
    """Breaks if a time is taken of a peer that computes another network, or NaN."""
    ours = torch.tensor([[1.0, -4.0, 2.0]])
    first = _contender("resnet_fused", ours)
    near = _contender("near", ours + 0.002)
    broken = _contender("broken", None)
    errors = contenders.differences([first, near, broken], "fp32")
    assert errors == {"resnet_fused": 0.0, "near": pytest.approx(0.0005, rel=1e-3)}
    for wrong in (ours + 0.005, ours * math.nan, ours[:, :2], ours.flip(1)):
        with pytest.raises(contenders.DisagreementError, match="other computes something else"):
            contenders.differences([first, _contender("other", wrong)], "fp32")
    for nothing in (_contender("resnet_fused", None), near):
        with pytest.raises(contenders.DisagreementError, match="nothing to compare with"):
            contenders.differences([nothing, near], "fp32")


def test_a_lost_layer_is_beyond_every_limit(tmp_path: Path) -> None:
    """Breaks if the limits are so loose that a network with a block less passes."""
    model = subjects.make_model("resnet18")
    less: Any = subjects.make_model("resnet18")
    del less.layer3[1]
    for dtype in common.DTYPES:
        setting = Setting("resnet18", dtype, 2, 64)
        right, wrong = (
            contenders.Field(setting, net, tmp_path).make("resnet_fused", 0)
            for net in (model, less)
        )
        eager = contenders.Field(setting, model, tmp_path).make("channels_last", 0)
        assert contenders.differences([right, eager], dtype)["channels_last"] > 0
        with pytest.raises(contenders.DisagreementError):
            contenders.differences([wrong, eager], dtype)


def test_a_peer_that_cannot_be_built_has_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if one peer's failure hides the times of the others."""
    field = contenders.Field(SETTING, subjects.make_model("resnet18"), tmp_path)

    def fails(self: object) -> Contender:
        raise OSError("no room\nat all")

    monkeypatch.setattr(contenders.Field, "_openvino", fails)
    made = list(contenders.contenders(field, ["openvino", "channels_last"], 1.0))
    assert [c.name for c in made] == ["resnet_fused", "openvino", "channels_last"]
    assert made[1].call is None and made[1].note == "OSError: no room"


@pytest.mark.parametrize(("peer", "dtype"), [("openvino", "bf16"), ("onnxruntime", "fp32")])
def test_a_peer_runs_the_same_network(peer: str, dtype: str, tmp_path: Path) -> None:
    """Breaks if a conversion fails or loses something; needs the peer's packages."""
    for package in contenders.PACKAGES[peer]:
        pytest.importorskip(package)
    setting = Setting("resnet18", dtype, 2, 64)
    field = contenders.Field(setting, subjects.make_model("resnet18"), tmp_path)
    made = list(contenders.contenders(field, [peer], 1.0))
    assert made[1].call is not None, made[1].note
    assert contenders.differences(made, dtype)[peer] > 0


# ------------------------------------------------------------------------------------ rows
def _row(peer: str, ratio: Ratio | None, samples: tuple[float, ...], **more: Any) -> Any:
    return peers.Row(SETTING, peer, "path", samples, ratio, 0.25, 2.0, **more)


def test_the_table_names_everything() -> None:
    """Breaks if a figure lands in another column or a missing peer has no reason."""
    rows = [
        _row("resnet_fused", None, (4.0, 2.0, 3.0), cold={"first_ms": 70.0, "peak_mib": 99.0}),
        _row("channels_last", Ratio(1.5, 1.4, 1.6, 0.1, 9), (6.0,)),
        _row("compile", None, (), note="no compiler"),
    ]
    head, ours, eager, missing, note = peers.table(rows).splitlines()
    assert head.split()[:4] == ["model", "dtype", "batch", "peer"]
    share = 2 * subjects.gmacs("resnet18", 32) * 2 / 3.0 / 2.0
    cells = ["resnet18", "bf16", "2", "resnet_fused", "3.00", "2.00", "666.7", "base", "-"]
    assert ours.split() == [*cells, f"{share:.0%}", "base", "70", "99"]
    assert eager.split()[:5] == ["channels_last", "6.00", "6.00", "333.3", "1.50x"]
    assert missing.split()[:3] == ["compile", "-", "-"]
    assert note == "no times for compile in resnet18 bf16 batch 2: no compiler"
    assert len({len(line) for line in (head, ours, eager)}) == 1


def test_csv_rows_must_be_alike(tmp_path: Path) -> None:
    """Breaks if a column is lost or shifted."""
    common.save_csv([{"a": 1 / 3, "b": None}], tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == "a,b\n0.333333,\n"
    for wrong in ([], [{"a": 1}, {"b": 1}]):
        with pytest.raises(ValueError, match="the same keys"):
            common.save_csv(wrong, tmp_path / "x.csv")


def test_peers_are_measured_from_end_to_end(
    quick_rate: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if the script does not run, or its CSV does not say what was measured where."""
    place = tmp_path / "peers.csv"
    options = ["--peers", "channels_last", "--cold-runs", "0", "--dtype", "fp32-high,bf16"]
    assert peers.main([*QUICK, *options, "--output", str(place)]) == 0
    out = capsys.readouterr().out
    assert "channels_last differs from resnet_fused by" in out and "matmul rate in TFLOP/s" in out
    rows = list(csv.DictReader(place.open()))
    assert [(r["dtype"], r["peer"]) for r in rows] == [
        (dtype, peer)
        for dtype in ("fp32-high", "bf16")
        for peer in ("resnet_fused", "channels_last")
    ]
    for row in rows:
        assert row["torch"] == torch.__version__ and row["threads"] == "1" and row["cpu"]
        assert len(row["date"].split("-")) == 3
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"])
        assert (row["ratio"] == "") == (row["peer"] == "resnet_fused")
    assert rows[0]["matmul_bf16_tflops"] == "2" and rows[2]["matmul_fp32_tflops"] == ""


def test_a_disagreement_is_the_exit_status(
    quick_rate: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if a run that compared two different networks looks like a success."""
    monkeypatch.setitem(common.LIMITS, "bf16", 0.0)
    assert peers.main([*QUICK, "--peers", "channels_last", "--cold-runs", "0"]) == 1
    assert "error: resnet18 bf16 batch 2: channels_last computes" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ cold starts
def test_cold_starts_take_turns_and_give_medians(capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks if runs are mixed up, a failure ends the run, or `compile` is started cold."""
    asked = []

    def ask(what: dict[str, Any]) -> dict[str, float]:
        asked.append(what["peer"])
        if what["peer"] == "openvino":
            raise RuntimeError("the cold start of openvino failed: x")
        return {"first_ms": [9.0, 1.0, 2.0][asked.count(what["peer"]) - 1]}

    names = ["resnet_fused", "compile", "openvino", "channels_last"]
    found = peers.cold_starts(SETTING, names, 3, Path("model.xml"), ask)
    assert found == {"resnet_fused": {"first_ms": 2.0}, "channels_last": {"first_ms": 2.0}}
    assert asked[:5] == [
        "resnet_fused",
        "openvino",
        "channels_last",
        "resnet_fused",
        "channels_last",
    ]
    assert capsys.readouterr().err == "the cold start of openvino failed: x\n"
    assert peers.cold_starts(SETTING, names, 0, Path("model.xml"), ask) == {}


def test_a_cold_start_counts_the_model_only() -> None:
    """Breaks if this process's memory or the imports count as the model's, or the model does not.

    ru_maxrss of a child is at least its parent's memory, which is 1 GiB here.
    """
    ballast = torch.ones(2**28)
    what = {"model": "resnet18", "dtype": "fp32", "batch": 1, "size": 32, "threads": 1}
    found = cold.ask_child({**what, "peer": "resnet_fused"})
    weights = 4 * sum(p.numel() for p in models.resnet18().parameters()) / 2**20
    assert weights < found["peak_mib"] < 600 and ballast[-1] == 1
    assert found["first_ms"] > 0 and found["second_ms"] > 0
    with pytest.raises(RuntimeError, match="cold start of resnet_fused failed: .*resnet9"):
        cold.ask_child({**what, "peer": "resnet_fused", "model": "resnet9"})


def test_the_matmul_rate_is_that_of_so_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the unit, the thread count or the precision is mixed up, or not put back."""
    seen = []

    def rate(dtype: torch.dtype, **how: object) -> float:
        seen.append((dtype, torch.get_num_threads(), torch.get_float32_matmul_precision()))
        return 3e12

    monkeypatch.setattr(common.peaks, "matmul_rate", rate)
    with common.precision("fp32-high"):
        assert common.matmul_rate(torch.bfloat16, 2) == 3.0
        assert torch.get_float32_matmul_precision() == "high"
    assert seen == [(torch.bfloat16, 2, "highest")]
    assert torch.get_num_threads() == 1
