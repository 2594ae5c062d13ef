# SPDX-License-Identifier: BSD-3-Clause
"""Shows that one built library works under several PyTorch and Python versions, without rebuilding.

    python tests/abi/load_matrix.py [--library FILE] PYTHON [PYTHON ...]

Each PYTHON is an interpreter whose environment has torch. Each loads the library, computes add_relu
with it and compares with torch; one line each. The exit code is 1 if any of them failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, platform, sys
import torch
row = {"python": platform.python_version(), "torch": torch.__version__, "add_relu": "not run"}
try:
    torch.ops.load_library(sys.argv[1])
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x, y = torch.randn(2, 1001).to(dtype), torch.randn(2, 1001).to(dtype)
        z = torch.ops.resnet_fused.add_relu(x, y)
        torch.testing.assert_close(z, torch.relu(x + y), rtol=0, atol=0)
    row["add_relu"] = "ok"
except Exception as error:
    row["add_relu"] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps(row))
"""


def try_interpreter(python: str, library: Path) -> dict[str, str]:
    """Load the library and run the op under ``python``."""
    command = [python, "-c", PROGRAM, str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError as error:
        return {"python": python, "torch": "?", "add_relu": str(error)}
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        return {"python": python, "torch": "?", "add_relu": last}
    row: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", type=Path, default=ROOT / "resnet_fused" / "_C.abi3.so")
    parser.add_argument("python", nargs="+", help="interpreter of an environment with torch")
    args = parser.parse_args()
    if not args.library.exists():
        print(f"{args.library} is missing: pip install -e . builds it there", file=sys.stderr)
        return 1
    rows = [try_interpreter(python, args.library.resolve()) for python in args.python]
    width = max(len(row["python"]) for row in rows) + 2
    for row in [{"python": "python", "torch": "torch", "add_relu": "add_relu"}, *rows]:
        print(f"{row['python']:<{width}}{row['torch']:<16}{row['add_relu']}")
    return 0 if all(row["add_relu"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
