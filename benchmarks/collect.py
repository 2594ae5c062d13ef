# SPDX-License-Identifier: BSD-3-Clause
"""Makes the result files in benchmarks/results and the table in the README, in one run.

    python benchmarks/collect.py

First ResNet-50 at batch 1 and 16 against eager PyTorch and torch.compile, then every depth at
batch 1, 8 and 32 against both eager layouts. About 11 minutes on two cores that have nothing else
to do; the README beside this file says how to get them. Files are rewritten after every setting,
so that a run that is stopped leaves what it has.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from resnet_fused.bench import machine, subjects
from resnet_fused.bench.compare import compare
from resnet_fused.bench.contenders import COMPILE, EAGER, FUSED
from resnet_fused.bench.plot import save_plot
from resnet_fused.bench.results import Row, Setting, file_name, save_csv, table, write_json

HEADLINE = ("resnet50", (1, 16))
GRID = (("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), (1, 8, 32))
COMPILE_S = 90.0
"""For all compilations together."""


def settings(args: argparse.Namespace) -> Iterator[tuple[Setting, bool]]:
    """Give every setting once, and whether it belongs to the headline; model by model."""
    dtypes = args.dtype.split(",")
    for dtype in dtypes:
        for batch in HEADLINE[1]:
            yield Setting(HEADLINE[0], dtype, batch, args.size, args.device), True
    for model in GRID[0]:
        for dtype in dtypes:
            for batch in GRID[1]:
                if (model, batch) not in ((HEADLINE[0], b) for b in HEADLINE[1]):
                    yield Setting(model, dtype, batch, args.size, args.device), False


def markdown(rows: Sequence[Row], facts: dict[str, object]) -> str:
    """Lay the rows out as the README's table: one line per setting, times in milliseconds."""
    lines = [
        f"Measured on {datetime.date.today()} by `python benchmarks/collect.py`: "
        f"{machine.headline(facts)}.",
        f"Images of {rows[0].setting.size} x {rows[0].setting.size}; median milliseconds per "
        "batch; speed-up over the faster eager layout, median of paired rounds.",
        "",
        "| model | dtype | batch | eager | channels_last | compile | resnet_fused | images/s "
        "| speed-up |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    by_setting: dict[Setting, dict[str, Row]] = {}
    for row in rows:
        by_setting.setdefault(row.setting, {})[row.contender] = row
    for s, group in by_setting.items():
        times = [
            f"{row.summary.p50:.1f}" if row and row.summary else "-"
            for row in (group.get(name) for name in (*EAGER, COMPILE, FUSED))
        ]
        fused = group[FUSED]
        rate = fused.images_per_second
        cells = [s.model, s.dtype, str(s.batch), *times]
        cells += [f"{rate:.0f}" if rate else "-", str(fused.versus_best or "-")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _order(s: Setting) -> tuple[int, bool, int]:
    return int(s.model.removeprefix("resnet")), s.dtype != "fp32", s.batch


def save(rows: Sequence[Row], facts: dict[str, object], folder: Path) -> None:
    """Write CSV by dtype, one JSON and the Markdown table."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: _order(row.setting))
    save_csv(rows, folder)
    name = file_name("all", "nhwc", str(rows[0].setting.device))
    with (folder / name).with_suffix(".json").open("w", encoding="utf-8") as file:
        write_json(rows, facts, file)
    (folder / "table.md").write_text(markdown(rows, facts), encoding="utf-8")


def main() -> int:
    """Measure everything; 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32,bf16")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--setting-s", type=float, default=8, help="seconds per setting of the grid"
    )
    parser.add_argument("--headline-s", type=float, default=25, help="the same for the headline")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    args = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("matplotlib is needed for the picture: pip install '.[plot]'")
    if args.threads:
        torch.set_num_threads(args.threads)

    machine.select(args.device)
    facts = machine.describe(args.device)
    print(machine.headline(facts))
    for complaint in machine.complaints():
        print(f"warning: {complaint}")
    start, meter = time.monotonic(), machine.LoadMeter()
    compile_left = COMPILE_S
    rows: list[Row] = []
    model, built = None, ""
    for setting, headline in settings(args):
        if setting.model != built:
            model, built = subjects.make_model(setting.model), setting.model
        assert model is not None
        new = compare(
            setting,
            model,
            budget_s=args.headline_s if headline else args.setting_s,
            compile_s=compile_left if headline else None,
        )
        compile_left -= sum(row.compile_s for row in new)
        rows += new
        others = meter.others()
        facts["load_by_others"] = None if others is None else round(others, 3)
        save(rows, facts, args.results)
        print(f"\nafter {time.monotonic() - start:.0f} s\n{table(new)}", flush=True)

    compiled = {row.setting for row in rows if row.contender == COMPILE}
    picture = args.results / f"{HEADLINE[0]}.png"
    save_plot([r for r in rows if r.setting in compiled], picture, machine.headline(facts))

    ratios = [(r.versus_best, r.setting) for r in rows if r.contender == FUSED and r.versus_best]
    if ratios:
        least, where = min(ratios, key=lambda found: found[0].value)
        print(
            f"\nsmallest ratio to the better eager layout: {least.value:.3f} ({least}) in {where}"
        )
    print(f"share of the CPUs that other processes used: {facts['load_by_others']}")
    wrong = [row for row in rows if not row.agrees]
    for row in wrong:
        print(f"WRONG: {row.setting}: error {row.max_err}, bound {row.bound}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
