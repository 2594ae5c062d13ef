# SPDX-License-Identifier: BSD-3-Clause
"""Makes one Markdown file of a GPU run: what passed, and the tables of what was measured."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_results

from resnet_fused.bench import machine

PARTS = ("models", "compile", "layers")
MODEL_NOTES = """\
Milliseconds per batch, calls back to back, median over interleaved rounds; `graph` replays a CUDA
graph. `vs eager`: fastest eager (either layout, graph or not) over fastest resnet_fused. Share of
floor: time that the roofline of `gpu_roofline.py` demands, with the ceilings above, over the time
taken. MiB: least peak memory of a call beyond weights and input.
"""
LAYER_NOTES = """\
Microseconds in a CUDA graph over inputs rotated beyond the L2 cache. TFLOP/s, GB/s (each tensor
counted once) and share of floor are resnet_fused's.
"""


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Contenders that could not run, and results that were wrong."""
    found = []
    for row in rows:
        name = row["contender"] + (" graph" if row["graph"] else "")
        where = f"{name} in {row['model']} {row['dtype']} batch {row['infer_batch_size']}"
        if row["note"]:
            found.append(f"{where}: {row['note']}")
        if not row["agrees"]:
            found.append(f"WRONG: {where}: error {row['max_err']}, bound {row['err_bound']}")
    return found


def ceilings(facts: Mapping[str, Any]) -> str:
    """The measured ceilings in a sentence."""
    found = [
        f"{name}: {c['TB/s']:.2f} TB/s, {c['TFLOP/s']:.0f} TFLOP/s"
        for name, c in facts.get("ceilings", {}).items()
    ]
    return f"Measured ceilings: {'; '.join(found)}.\n" if found else ""


def listing(title: str, lines: Sequence[str]) -> str:
    """A short list with a title; nothing for none."""
    return f"{title}\n\n" + "".join(f"- {line}\n" for line in lines) + "\n" if lines else ""


def report(
    facts: Mapping[str, Any],
    run: Mapping[str, Mapping[str, Any]],
    parts: Mapping[str, Mapping[str, Any]],
) -> str:
    """The whole text.

    Args:
        facts: as `gpu_results.facts` gives them.
        run: section -> status, detail and seconds.
        parts: of PARTS, what the measuring scripts wrote.
    """
    text = [f"# GPU run: {machine.headline(facts)}\n\n"]
    lines = [
        [name, o["status"], f"{o['seconds']:.0f}", o["detail"].split("\n")[0].replace("|", "/")]
        for name, o in run.items()
    ]
    text.append(gpu_results.markdown(["section", "status", "s", "detail"], lines, left=2) + "\n")
    for name, title in (("models", "Models"), ("compile", "Compiled rivals")):
        if name in parts:
            whole = parts[name]
            text += [f"## {title}\n\n", MODEL_NOTES, ceilings(whole["machine"]), "\n"]
            text += [gpu_results.models_table(whole["results"]), "\n"]
            text.append(listing("Not measured, or wrong:", notes(whole["results"])))
            text.append(listing("No time was left for:", whole["skipped"]))
    if "layers" in parts:
        whole = parts["layers"]
        text += ["## Layers of ResNet-50\n\n", LAYER_NOTES, "\n"]
        text += ["All convolutions behind the stem:\n\n"]
        text += [gpu_results.totals_table(whole["results"]), "\n"]
        text += [gpu_results.layers_table(whole["results"]), "\n"]
        text.append(listing("Not measured:", whole["skipped"]))
    return "".join(text).rstrip("\n") + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and the run's own JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--run", type=Path, required=True, help="JSON of the sections")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="changes nothing here")
    args = parser.parse_args(argv)
    facts = gpu_results.facts(args.device)
    run = json.loads(args.run.read_text())
    parts = {}
    for name in PARTS:
        file = gpu_results.path(args.results, name, args.device)
        if file.is_file():
            parts[name] = json.loads(file.read_text())
    args.results.mkdir(parents=True, exist_ok=True)
    target = gpu_results.path(args.results, "run", args.device)
    target.write_text(json.dumps({"machine": facts, "sections": run}, indent=1) + "\n")
    target.with_suffix(".md").write_text(report(facts, run, parts))
    print(f"written: {target.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
