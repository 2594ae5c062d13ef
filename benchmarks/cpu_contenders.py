# SPDX-License-Identifier: BSD-3-Clause
"""The contenders of cpu_peers.py: resnet_fused and what else runs a ResNet on a CPU."""

from __future__ import annotations

import copy
import importlib.util
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from cpu_cold import openvino_config
from cpu_common import DTYPES, LIMITS, version
from torch import Tensor, nn

from resnet_fused.bench import subjects
from resnet_fused.bench.contenders import COMPILE, FUSED, Contender, Rivals, first_line
from resnet_fused.bench.results import Setting

EAGER, OPENVINO, ONNXRUNTIME = "channels_last", "openvino", "onnxruntime"
PEERS = (EAGER, COMPILE, OPENVINO, ONNXRUNTIME)
PACKAGES = {OPENVINO: ("openvino",), ONNXRUNTIME: ("onnxruntime", "onnx")}
"""What pip must have installed for a peer."""


class DisagreementError(Exception):
    """Two contenders gave different logits: they did not compute the same network."""


def missing(peer: str) -> list[str]:
    """Name the packages that a peer needs and that are not installed."""
    return [name for name in PACKAGES.get(peer, ()) if importlib.util.find_spec(name) is None]


def why_left_out(peer: str, dtype: str) -> str:
    """Say why a peer cannot run in this dtype here; empty if it can."""
    if peer == ONNXRUNTIME and dtype == "bf16":
        return "its CPU provider does not compute convolutions in bfloat16"
    packages = missing(peer)
    return f"not installed; pip install {' '.join(packages)}" if packages else ""


def present(peers: Sequence[str], dtype: str) -> tuple[list[str], list[str]]:
    """Split `peers` into those that can run in `dtype` and lines about those that cannot."""
    reasons = {peer: why_left_out(peer, dtype) for peer in peers}
    lines = [f"{peer} is left out in {dtype}: {why}" for peer, why in reasons.items() if why]
    return [peer for peer, why in reasons.items() if not why], lines


class Field:
    """One setting's model and input, in the forms that the contenders want.

    All have the same numbers: where weights and images are bfloat16, the float32 copies for
    OpenVINO and onnxruntime hold the rounded values. These two get float32 images in NCHW, as their
    users feed them, and the plain modules, which their converters know from torchvision's models.

    Args:
        setting: what is measured.
        model: the float32 model by that name; it is copied.
        folder: for the converted models; OpenVINO's is kept there for cold starts.
    """

    def __init__(self, setting: Setting, model: nn.Module, folder: Path) -> None:
        dtype = DTYPES[setting.dtype]
        rounded = copy.deepcopy(model).to(dtype)
        draw = torch.Generator().manual_seed(setting.seed + 1)
        shape = (setting.batch, 3, setting.size, setting.size)
        x = torch.randn(shape, generator=draw).to(dtype)
        self.setting, self._folder = setting, folder
        self.openvino_file = folder / "model.xml"
        self._rivals = Rivals.of(rounded, x)
        self._net = subjects.plain(copy.deepcopy(rounded).float())
        self._x = x.float()

    def make(self, name: str, compile_s: float) -> Contender:
        """Prepare a contender; one that fails has no call and a note.

        Args:
            name: `resnet_fused` or one of `PEERS`.
            compile_s: seconds that torch.compile may take.
        """
        try:
            if name == OPENVINO:
                return self._openvino()
            if name == ONNXRUNTIME:
                return self._onnxruntime()
            if name == COMPILE:
                return self._compile(compile_s)
            return self._rivals.make(name)
        except Exception as error:  # a peer that cannot be built must not hide the others' times
            return Contender(name, "", "", None, first_line(error))

    def _compile(self, compile_s: float) -> Contender:
        """Compile with the weights as constants: BatchNorms folded, weights packed beforehand."""
        from torch._inductor import config

        with config.patch(freezing=True):
            return self._rivals.make(COMPILE, compile_s)

    def _openvino(self) -> Contender:
        import openvino as ov

        start = time.perf_counter()
        with torch.no_grad():
            graph = ov.convert_model(self._net, example_input=self._x, input=[tuple(self._x.shape)])
        ov.save_model(graph, self.openvino_file, compress_to_fp16=False)
        asked = openvino_config(self.setting.dtype, torch.get_num_threads())
        compiled = ov.Core().compile_model(graph, "CPU", asked)
        took = time.perf_counter() - start
        got = compiled.get_property("INFERENCE_PRECISION_HINT")
        hint = asked["INFERENCE_PRECISION_HINT"]
        if got != getattr(ov.Type, hint):
            note = f"it computes in {got} on this CPU though asked for {hint}"
            return Contender(OPENVINO, "nchw", "", None, note, took)
        request, x = compiled.create_infer_request(), self._x.numpy()

        def call() -> Tensor:
            found = request.infer({0: x}, share_inputs=True, share_outputs=True)
            return torch.from_numpy(found[0])

        return Contender(OPENVINO, "nchw", f"openvino {version('openvino')} {hint}", call, "", took)

    def _onnxruntime(self) -> Contender:
        import onnxruntime as ort

        start, file = time.perf_counter(), self._folder / "model.onnx"
        with warnings.catch_warnings(), torch.no_grad():
            # The exporter that needs no further package says at each call that there is a newer.
            warnings.simplefilter("ignore")
            torch.onnx.export(self._net, (self._x,), file, dynamo=False)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads spin while it runs, but not on into the next contender's time.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        inputs = {session.get_inputs()[0].name: self._x.numpy()}
        took = time.perf_counter() - start
        path = f"onnxruntime {version('onnxruntime')} f32"

        def call() -> Tensor:
            return torch.from_numpy(session.run(None, inputs)[0])

        return Contender(ONNXRUNTIME, "nchw", path, call, "", took)


def contenders(field: Field, peers: Sequence[str], compile_s: float) -> Iterator[Contender]:
    """Prepare resnet_fused and then each of `peers`."""
    for name in (FUSED, *peers):
        yield field.make(name, compile_s)


def differences(found: Sequence[Contender], dtype: str) -> dict[str, float]:
    """Compare each contender's logits with those of resnet_fused, which comes first.

    Returns:
        max |theirs - ours| / max |ours| by name; 0 for resnet_fused.

    Raises:
        DisagreementError: one is above `LIMITS[dtype]`, or resnet_fused did not run.
    """
    first, limit = found[0], LIMITS[dtype]
    if first.name != FUSED or first.call is None:
        raise DisagreementError(f"{first.name} gave nothing to compare with: {first.note}")
    with torch.inference_mode():
        ours = first.call().double()
        errors = {c.name: subjects.relative_error(c.call().double(), ours) for c in found if c.call}
    for name, error in errors.items():
        if not error <= limit:
            raise DisagreementError(
                f"{name} computes something else than resnet_fused: its logits differ by "
                f"{error:.2g} of the largest, and the limit for {dtype} is {limit}; this is a "
                f"mistake in one of the two, so that no time was taken"
            )
    return errors
