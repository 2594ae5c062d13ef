# SPDX-License-Identifier: BSD-3-Clause
"""Times the stages of a ResNet on a CPU inside the whole forward: resnet_fused and eager PyTorch.

    python benchmarks/cpu_stages.py --model resnet50 --dtype bf16 --batch 1,16 [--blocks]

The network is run as the chain of its stages (stem, layer1 to layer4, head; with `--blocks` every
block), and a clock is read between them. So each stage finds its input, weights and caches as the
one before left them, which no loop over a single stage would show. The chains of both take turns
(`resnet_fused.timing`), and so do the two networks called in one, for the row `whole`: if `sum` and
`whole` agree, the clock was not in the way.

`GFLOP` counts a multiplication and an addition as two; `of matmul` puts them, per second, against
the rate of a large matrix product (`cpu_common.matmul_rate`). `MB` are what must be read and
written at least once: input, output, weights; GB/s is all three over the time.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cpu_common
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_fused import models, timing
from resnet_fused.bench import machine, subjects
from resnet_fused.profile.laps import Laps, timed_laps
from resnet_fused.profile.result import Work
from resnet_fused.timing import Measurement, Ratio

OURS, EAGER, WHOLE = "resnet_fused", "channels_last", " whole"
LAYERS = ("layer1", "layer2", "layer3", "layer4")


class Stem(nn.Module):
    """All of a model before its first block."""

    def __init__(self, model: models.ResNet) -> None:
        super().__init__()
        net = copy.copy(model)  # shares its children
        net._modules = dict(model._modules, **{name: nn.Identity() for name in LAYERS})
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise and pool, as the model does."""
        return self.net.forward_features(x)


class Head(nn.Module):
    """All of a model behind its last block."""

    def __init__(self, model: models.ResNet) -> None:
        super().__init__()
        self.net = model

    def forward(self, x: Tensor) -> Tensor:
        """Pool and classify, as the model does."""
        return self.net.forward_head(x)


def pieces(model: models.ResNet, blocks: bool) -> dict[str, nn.Module]:
    """Cut a model into stages, or into blocks, whose chain is the model; weights are shared."""
    stages: dict[str, nn.Sequential] = {name: getattr(model, name) for name in LAYERS}
    middle: dict[str, nn.Module] = dict(stages)
    if blocks:
        middle = {f"{s}.{i}": b for s, stage in stages.items() for i, b in enumerate(stage)}
    return {"stem": Stem(model), **middle, "head": Head(model)}


def plain_pieces(model: models.ResNet, blocks: bool) -> dict[str, nn.Module]:
    """Give the same cut as flat lists of PyTorch modules, as `subjects.plain` does."""
    return {name: subjects.plain(piece) for name, piece in pieces(model, blocks).items()}


class Chain:
    """Runs stages one after the other on one input and notes how long each took."""

    def __init__(
        self,
        stages: Sequence[Callable[[Tensor], Tensor]],
        x: Tensor,
        now: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._stages, self._x, self._now = stages, x, now
        self.laps: list[list[float]] = []

    def __call__(self) -> Tensor:
        """Run all stages; the laps, in milliseconds, are added to `laps`."""
        y, marks = self._x, [self._now()]
        for stage in self._stages:
            y = stage(y)
            marks.append(self._now())
        self.laps.append([(b - a) / 1e6 for a, b in zip(marks, marks[1:], strict=False)])
        return y


def work(stages: Mapping[str, nn.Module], x: Tensor) -> dict[str, Work]:
    """Count each stage's work by running plain modules on a batch."""
    found = {}
    for name, stage in stages.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            y = stage(x)
        held = {t.data_ptr(): t.nbytes for t in (*stage.parameters(), *stage.buffers())}
        weights = sum(held.values()) - _unused_bytes(stage)
        found[name] = Work(counter.get_total_flops(), x.nbytes, y.nbytes, weights)
        x = y
    return found


def _unused_bytes(stage: nn.Module) -> int:
    """Bytes of BatchNorm's counters, which no forward reads."""
    norms = [m for m in stage.modules() if isinstance(m, nn.BatchNorm2d)]
    return sum(n.num_batches_tracked.nbytes for n in norms if n.num_batches_tracked is not None)


@dataclass(frozen=True)
class Row:
    """One stage: its work, both times in milliseconds, their ratio, and the share of the sum."""

    model: str
    dtype: str
    batch: int
    size: int
    stage: str
    work: Work
    ours: float
    eager: float
    ratio: Ratio
    share: float
    rate: float

    def record(self) -> dict[str, Any]:
        """Give the row for CSV, behind the machine's facts."""
        w, tflops = self.work, self.work.flop / self.ours / 1e9
        return {
            "model": self.model,
            "dtype": self.dtype,
            "batch": self.batch,
            "size": self.size,
            "stage": self.stage,
            "gflop": w.flop / 1e9,
            "mb_in": w.read / 1e6,
            "mb_out": w.written / 1e6,
            "mb_weights": w.weights / 1e6,
            "median_ms": self.ours,
            "share_of_time": self.share,
            "tflops": tflops,
            "share_of_matmul": tflops / self.rate,
            "gb_per_s": w.bytes / self.ours / 1e6,
            "channels_last_ms": self.eager,
            "channels_last_tflops": w.flop / self.eager / 1e9,
            "channels_last_share_of_matmul": w.flop / self.eager / 1e9 / self.rate,
            "channels_last_gb_per_s": w.bytes / self.eager / 1e6,
            "ratio": self.ratio.value,
            "noise": self.ratio.noise,
            "rounds": self.ratio.rounds,
        }


WORK = ("GFLOP", "MB in", "MB out", "MB weights")
TIMES = ("ms", "of time", "of matmul", "GB/s")
HEAD = ("stage", *WORK, *TIMES, "eager ms", *TIMES[2:], "resnet_fused is")


def table(rows: Sequence[Row]) -> str:
    """Lay one setting's rows out for a terminal; `resnet_fused is` so many times faster."""
    lines = []
    for row in rows:
        r = row.record()
        figures = [f"{r[name]:.2f}" for name in ("gflop", "mb_in", "mb_out", "mb_weights")]
        for prefix, ms in (("", "median_ms"), ("channels_last_", "channels_last_ms")):
            figures.append(f"{r[ms]:.3f}")
            if not prefix:
                figures.append(f"{r['share_of_time']:.0%}")
            figures.append(f"{r[f'{prefix}share_of_matmul']:.0%}")
            figures.append(f"{r[f'{prefix}gb_per_s']:.1f}")
        lines.append([row.stage, *figures, str(row.ratio)])
    return cpu_common.layout(HEAD, lines, 1)


def stage_times(ours: Laps, eager: Laps, at: slice) -> tuple[float, float, Ratio]:
    """Give both medians of the stages `at`, added up, and how many times faster ours are."""
    visits = {
        who: [[sum(call[at]) for call in visit] for visit in laps]
        for who, laps in ((OURS, ours), (EAGER, eager))
    }
    found = Measurement(visits, {})
    medians = [statistics.median(found.samples(who)) for who in (OURS, EAGER)]
    return medians[0], medians[1], found.ratio(OURS, EAGER)


def check(chained: Tensor, whole: Tensor, dtype: str, name: str) -> None:
    """Compare the chain of stages with the network called in one.

    Raises:
        RuntimeError: the cut has lost or changed something.
    """
    error = subjects.relative_error(chained.double(), whole.double())
    if not error <= cpu_common.LIMITS[dtype]:
        raise RuntimeError(
            f"the stages of {name} do not add up to the network: logits differ by {error:.2g} of "
            f"the largest, and the limit for {dtype} is {cpu_common.LIMITS[dtype]}"
        )


def compare(
    name: str, made: nn.Module, dtype: str, batch: int, rate: float, args: argparse.Namespace
) -> list[Row]:
    """Time one setting stage by stage.

    Args:
        name: of the model.
        made: the float32 model; it is copied.
        dtype: a key of `cpu_common.DTYPES`.
        batch: images.
        rate: TFLOP/s of a matrix product, for the shares.
        args: size, blocks, budget_s, rounds.

    Returns:
        A row per stage, one for their sum and one for the network called in one.
    """
    model: Any = copy.deepcopy(made).to(cpu_common.DTYPES[dtype])
    model = model.to(memory_format=torch.channels_last)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, args.size, args.size, generator=draw).to(cpu_common.DTYPES[dtype])
    x = x.contiguous(memory_format=torch.channels_last)
    cut = {OURS: pieces(model, args.blocks), EAGER: plain_pieces(model, args.blocks)}
    done = work(cut[EAGER], x)
    chains = {who: Chain(list(stages.values()), x) for who, stages in cut.items()}
    nets = {OURS: model, EAGER: subjects.plain(model)}
    with cpu_common.precision(dtype), torch.inference_mode():
        for who, chain in chains.items():
            check(chain(), nets[who](x), dtype, who)
            chain.laps.clear()
        calls: dict[str, Callable[[], object]] = dict(chains)
        calls |= {who + WHOLE: partial(net, x) for who, net in nets.items()}
        measured = timing.measure(calls, budget_s=args.budget_s, min_rounds=args.rounds)
    laps = {who: timed_laps(chain.laps, measured, who) for who, chain in chains.items()}

    laps |= {
        who + WHOLE: [[[ms] for ms in visit] for visit in measured.visits[who + WHOLE]]
        for who in nets
    }
    stages = list(done)
    everything = Work(
        sum(w.flop for w in done.values()),
        x.nbytes,
        done["head"].written,
        sum(w.weights for w in done.values()),
    )
    kinds = [(stage, done[stage], "", slice(i, i + 1)) for i, stage in enumerate(stages)]
    kinds += [("sum", everything, "", slice(None)), ("whole", everything, WHOLE, slice(None))]
    times = [stage_times(laps[OURS + of], laps[EAGER + of], at) for _, _, of, at in kinds]
    total = times[-2][0]
    fixed = (name, dtype, batch, args.size)
    return [
        Row(*fixed, stage, todo, ours, eager, ratio, ours / total, rate)
        for (stage, todo, _, _), (ours, eager, ratio) in zip(kinds, times, strict=True)
    ]


def parser() -> argparse.ArgumentParser:
    """Make the command line's parser."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cpu_common.add_arguments(made, dtype="bf16", batch="1,16")
    made.add_argument("--blocks", action="store_true", help="every block instead of every stage")
    made.add_argument(
        "--budget-s", type=cpu_common.seconds, default=10.0, help="timing of a setting"
    )
    made.add_argument("--rounds", type=cpu_common.count, default=7, help="at least so many")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all settings."""
    args = parser().parse_args(argv)
    cpu_common.begin(args)
    about, meter = cpu_common.facts(), machine.LoadMeter()
    rates = {}
    for dtype in args.dtype:
        rates[dtype] = cpu_common.matmul_rates(dtype)
        print(cpu_common.rates_line(rates[dtype]), flush=True)
    records: list[dict[str, Any]] = []
    for name in args.model:
        model = subjects.make_model(name)
        for dtype in args.dtype:
            rate = rates[dtype][cpu_common.RATES[dtype][0]]
            for batch in args.batch:
                rows = compare(name, model, dtype, batch, rate, args)
                print(f"\n{name} {dtype} batch {batch}\n{table(rows)}", flush=True)
                where = {**about, "load_by_others": meter.others()}
                columns = cpu_common.rate_columns(rates[dtype])
                records += [{**where, **row.record(), **columns} for row in rows]
                if args.output is not None:  # a run that is stopped leaves what it has
                    cpu_common.save_csv(records, args.output)
    print(f"share of the CPUs that other processes used: {meter.others()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
