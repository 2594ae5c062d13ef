# SPDX-License-Identifier: BSD-3-Clause
"""`resnet-fused compare`: what differs between two result files, settings before numbers."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from resnet_fused.bench import timing_files
from resnet_fused.bench.differences import Differences, settings_lines
from resnet_fused.cli.arguments import count, share
from resnet_fused.predict import differences as predictions

OK, WRONG_USE, WORSE = 0, 1, 2

EPILOG = """\
files of times:
  what resnet-fused bench (--json, --csv) and the scripts in benchmarks/ write. Settings come first:
  versions, machine, threads, models, dtypes, sizes. Numbers follow for rows whose model, dtype,
  batch, size, device, threads and contender are the same: how many times as fast B is as A, or
  `1.0 ± noise` where the difference is smaller than the noise that the files carry. Rows that only
  one file has are listed.

files of predictions:
  .csv, .jsonl, .parquet, or a folder with part-*.parquet, as resnet-fused predict writes them:
  settings (model, weights, preprocessing, dtype, ...; only Parquet names them), then images whose
  best class differs, images that failed in one only, and the largest difference of a probability.
  Images are matched by file name.

exit code:
  0 compared, and B is no worse    1 nothing to compare, or wrong use
  2 B is worse: a row slower than --fail-slower allows, or with wrong results, or not there;
    images that fail only in B; with --fail-flips also more flips than it allows, or images that
    are not in B

examples:
  resnet-fused compare before.json after.json
  resnet-fused compare before.json after.json --fail-slower 5%
  resnet-fused compare fp32.csv bf16.csv --fail-flips 10
"""


def add_parser(subparsers: Any) -> None:
    """Add the `compare` command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "compare",
        help="say what differs between two result files",
        description="Say what differs between two files of times, or two of predictions.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("a", type=Path, metavar="A", help="the file to compare with")
    add("b", type=Path, metavar="B", help="the file that is judged")
    add(
        "--fail-slower",
        type=share,
        metavar="PERCENT",
        help="exit code 2 if a row of B is slower by more than this and by more than the noise",
    )
    add(
        "--fail-flips",
        type=count,
        metavar="N",
        help="exit code 2 if more than N images have another best class, or one is not in B",
    )


def is_predictions(path: Path) -> bool:
    """Say what a file holds: predictions, else times.

    Raises:
        ValueError: it is neither.
        OSError: it cannot be read.
    """
    suffix = path.suffix.lower()
    if path.is_dir() or suffix in (".jsonl", ".parquet"):
        return True
    if suffix == ".json":
        return False
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        try:
            header = next(csv.reader(file), [])
        except csv.Error:
            header = []
    if predictions.is_prediction_header(header):
        return True
    if timing_files.is_timing_header(header):
        return False
    raise ValueError(
        f"{path} must be a result file of this package: times or predictions in CSV, JSON, JSON "
        f"lines or Parquet; its first line is {', '.join(header)[:80]!r}"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    try:
        kinds = [is_predictions(path) for path in (args.a, args.b)]
        if kinds[0] != kinds[1]:
            names = ["predictions" if kind else "times" for kind in kinds]
            raise ValueError(f"A holds {names[0]} and B holds {names[1]}: give two of a kind")
        unused = "fail_slower" if kinds[0] else "fail_flips"
        if getattr(args, unused) is not None:
            option = unused.replace("_", "-")
            raise ValueError(f"--{option} does not go with files of this kind; leave it out")
        print(f"A: {args.a}\nB: {args.b}")
        return _predictions(args) if kinds[0] else _times(args)
    except BrokenPipeError:
        raise  # main() knows what to do
    except (OSError, ValueError) as problem:
        sys.stdout.flush()
        print(f"resnet-fused compare: error: {problem}", file=sys.stderr)
        return WRONG_USE


def _times(args: argparse.Namespace) -> int:
    """Compare two files of times."""
    found = Differences(timing_files.read(args.a), timing_files.read(args.b))
    for line in found.lines():
        print(line)
    if not found.pairs:
        raise ValueError(
            "no row of A has its match in B: settings differ as listed above (bench --scenario "
            "server without --rate offers what eager can do at the time; give both runs one rate)"
        )
    worse = [f"{pair.b}: {pair.got_worse}" for pair in found.pairs if pair.got_worse]
    if args.fail_slower is not None:
        if not found.same_machine:
            raise ValueError(
                "--fail-slower needs two files from the same machine and the same versions of all "
                "but resnet_fused, and files that say so (bench --json)"
            )
        limit = f"slower than {args.fail_slower:.1%} allows"
        worse += [f"{p.b}: {limit}" for p in found.pairs if p.slower_than(args.fail_slower)]
        worse += [f"{row}: not in B" for row in found.only["A"]]
        noisy = sum(pair.noise > args.fail_slower for pair in found.pairs)
        if noisy:
            print(f"{noisy} of {len(found.pairs)} rows have more noise than {args.fail_slower:.1%}")
    for line in worse:
        print(f"WORSE: {line}")
    return WORSE if worse else OK


def _predictions(args: argparse.Namespace) -> int:
    """Compare two files of predictions."""
    about = [predictions.settings(path) for path in (args.a, args.b)]
    for line in settings_lines(*about) if any(about) else ["settings: the files name none"]:
        print(line)
    tally = predictions.Tally()
    for a, b in predictions.pairs(predictions.read(args.a), predictions.read(args.b)):
        line = tally.add(a, b)
        if line:
            print(line)
    for line in tally.lines():
        print(line)
    if not tally.images:
        raise ValueError("no image is in both files: they are matched by file name as written")
    lost = tally.only_count["A"]
    strict = args.fail_flips is not None and (tally.flips > args.fail_flips or lost)
    return WORSE if strict or tally.newly_failed else OK
