# SPDX-License-Identifier: BSD-3-Clause
"""Nothing is downloaded and nothing reported unless the user named something on a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

# Every way to the network in Python ends in socket.socket; an audit hook sees C code's, too, as
# long as it goes through Python's module.
OFFLINE = """
import socket, sys

def refuse(event, args):
    if event.startswith("socket.") and event != "socket.gethostname":
        raise RuntimeError(f"the network was used: {event} {args}")

sys.addaudithook(refuse)
"""

EVERYDAY = (
    OFFLINE
    + """
import torch
from PIL import Image
import resnet_fused
from resnet_fused.cli.main import main

folder = sys.argv[1]
torch.save(resnet_fused.resnet18(num_classes=7).state_dict(), folder + "/seven.pth")
Image.new("RGB", (50, 40), (200, 100, 50)).save(folder + "/a.png")

model = resnet_fused.fuse(resnet_fused.resnet18(weights=folder + "/seven.pth").eval())
resnet_fused.report(model)
predict = ["predict", folder, "--model", "resnet18", "--resize", "40", "--crop", "33"]
assert main([*predict, "--weights", folder + "/seven.pth"]) == 0
assert main(["info"]) == 0
bench = ["bench", "--model", "resnet18", "--size", "32", "--batch", "1", "--dtype", "fp32"]
assert main([*bench, "--no-compile", "--budget-s", "1"]) == 0
assert not {"huggingface_hub", "ray", "litserve"} & set(sys.modules)

try:
    socket.socket()
except RuntimeError:
    print("the hook works")
"""
)


def test_everyday_use_opens_no_socket(tmp_path: Path) -> None:
    """A client of some service that is imported along, or telemetry."""
    command = [sys.executable, "-c", EVERYDAY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=HERE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the hook works\n")
