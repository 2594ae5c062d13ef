# SPDX-License-Identifier: BSD-3-Clause
"""What cpu_peers.py and cpu_stages.py share: dtypes, the rate of a matrix product, tables, CSV."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from resnet_fused import __version__
from resnet_fused.bench import machine, subjects
from resnet_fused.profile import peaks

DTYPES = {"fp32": torch.float32, "fp32-high": torch.float32, "bf16": torch.bfloat16}
"""`fp32-high` is float32 under `torch.set_float32_matmul_precision("high")`."""

LIMITS = {"fp32": 1e-3, "fp32-high": 2e-2, "bf16": 0.2}
"""Largest relative difference of two logits at which both still compute the same network.

Loose on purpose: more than ten times what rounding makes of ResNet-152, 2e-6 in float32, 1.4e-2 in
bfloat16, and an eighth of the latter for products with 11 bits. A wrong weight or a layer left out
gives far more. Whether resnet_fused is *accurate* is the tests' business.
"""

RATES = {"fp32": ("fp32",), "fp32-high": ("fp32", "bf16"), "bf16": ("bf16",)}
"""The matrix products that are measured for a dtype; times are compared with the first one's."""


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Set torch's float32 matmul precision to what `dtype` asks for, and back.

    It holds for the whole process. Of eager PyTorch it reaches the last layer, the linear one,
    where the CPU can do it; convolutions follow another setting and stay in float32.

    Args:
        dtype: a key of `DTYPES`.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "fp32-high" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def matmul_rate(dtype: torch.dtype, count: int) -> float:
    """Measure `peaks.matmul_rate` in TFLOP/s, on `count` threads and in plain float32."""
    sizes = (1024, 2048) if count <= 8 else (2048, 4096, 8192)
    with threads(count), precision("fp32"):
        return peaks.matmul_rate(dtype, sizes=sizes, budget_s=0.75) / 1e12


def matmul_rates(dtype: str) -> dict[str, float]:
    """Measure `matmul_rate` for a key of `DTYPES`: `{"bf16_1t": 1.2, "bf16": 2.3}`.

    The names are columns of the CSV: with `_1t` one thread, without it all.
    """
    found: dict[str, float] = {}
    for name in RATES[dtype]:
        one = matmul_rate(DTYPES[name], 1)
        every = torch.get_num_threads()
        found |= {
            f"{name}_1t": one,
            name: one if every == 1 else matmul_rate(DTYPES[name], every),
        }
    return found


def rates_line(rates: Mapping[str, float]) -> str:
    """Give `matmul_rates` in one line."""
    every = torch.get_num_threads()
    shown = [
        f"{name} {rates[f'{name}_1t']:.2f} on 1 thread, {rates[name]:.2f} on {every}"
        for name in rates
        if not name.endswith("_1t")
    ]
    return f"matmul rate in TFLOP/s: {'; '.join(shown)}"


def rate_columns(rates: Mapping[str, float]) -> dict[str, float | None]:
    """Give `matmul_rates` as the CSV's columns, the same for every dtype."""
    names = ("fp32_1t", "fp32", "bf16_1t", "bf16")
    return {f"matmul_{name}_tflops": rates.get(name) for name in names}


def version(package: str) -> str:
    """Give an installed package's version; `-` if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def facts(packages: Sequence[str] = ()) -> dict[str, object]:
    """Say when, where and with what was measured: the first columns of every CSV."""
    found = machine.describe("cpu")
    kept = ("cpu", "cpus", "threads", "cpu_capability", "amx", "platform", "python", "torch")
    return {
        "date": datetime.date.today().isoformat(),
        **{name: found[name] for name in kept},
        "resnet_fused": __version__,
        **{package: version(package) for package in packages},
    }


def save_csv(records: Sequence[Mapping[str, Any]], place: Path) -> None:
    """Write records with the same keys as CSV with a header; floats get six digits.

    Raises:
        ValueError: there is nothing to write, or keys differ.
    """
    if not records or any(record.keys() != records[0].keys() for record in records):
        raise ValueError("records must be at least one, all with the same keys")
    with place.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, records[0].keys(), lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in record.items()}
            )


def layout(head: Sequence[str], rows: Sequence[Sequence[str]], labels: int) -> str:
    """Lay cells out in columns, the first `labels` of them to the left, figures to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = enumerate(zip(line, widths, strict=True))
        text.append("  ".join(c.ljust(w) if i < labels else c.rjust(w) for i, (c, w) in cells))
    return "\n".join(line.rstrip() for line in text)


# ------------------------------------------------------------------------------------ arguments
def one_of(allowed: Sequence[str], what: str) -> Callable[[str], list[str]]:
    """Make an argparse type for a list of names, separated by commas, each once."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            raise argparse.ArgumentTypeError(
                f"{what} must be of {', '.join(allowed)}, got {', '.join(unknown) or repr(text)}"
            )
        return list(dict.fromkeys(names))

    return parse


def counts(text: str) -> list[int]:
    """Parse positive whole numbers, separated by commas, each once; an argparse type."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers of 1 or more, separated by commas, got {text!r}"
        )
    return list(dict.fromkeys(found))


def count(text: str, least: int = 1) -> int:
    """Parse one whole number; an argparse type."""
    try:
        found = int(text)
    except ValueError:
        found = least - 1
    if found < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of {least} or more, got {text!r}")
    return found


def seconds(text: str) -> float:
    """Parse a positive number of seconds; an argparse type."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e6:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return found


def output_file(text: str) -> Path:
    """Parse the path of a file to be written, of which the folder exists."""
    place = Path(text)
    if not place.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"must lie in a folder that exists, got {text}; make {place.parent} first"
        )
    return place


def add_arguments(parser: argparse.ArgumentParser, *, dtype: str, batch: str) -> None:
    """Add what both scripts are told: what to measure, on how many threads, and where to write."""
    models = subjects.model_names()
    parser.add_argument("--model", type=one_of(models, "--model"), default="resnet50")
    parser.add_argument(
        "--dtype",
        type=one_of(list(DTYPES), "--dtype"),
        default=dtype,
        help=f"of {', '.join(DTYPES)} (default: {dtype}); fp32-high is float32 under "
        "torch.set_float32_matmul_precision('high')",
    )
    parser.add_argument("--batch", type=counts, default=batch, help=f"default: {batch}")
    parser.add_argument("--size", type=count, default=224, help="height and width of the images")
    parser.add_argument("--threads", type=count, help="default: torch's own choice")
    parser.add_argument(
        "--output", type=output_file, metavar="FILE.csv", help="write the table there too"
    )


def begin(args: argparse.Namespace) -> None:
    """Set the threads and say what machine this is."""
    if args.threads:
        torch.set_num_threads(args.threads)
    print(machine.headline(machine.describe("cpu")))
    for complaint in machine.complaints():
        print(f"warning: {complaint}")
