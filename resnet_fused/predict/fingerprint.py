# SPDX-License-Identifier: BSD-3-Clause
"""What a prediction depends on, in words and hashes."""

from __future__ import annotations

import hashlib
import importlib
import os
from typing import TYPE_CHECKING, Any

import PIL
import torch
from torch import nn

import resnet_fused
from resnet_fused import _extension, dispatch
from resnet_fused.predict.decode import torchvision_decoder
from resnet_fused.predict.preprocess import Preprocessing
from resnet_fused.report import report

ONEDNN = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")

if TYPE_CHECKING:
    from resnet_fused.predict.predictor import Predictor


def of(predictor: Predictor) -> dict[str, str]:
    """The fingerprint of a predictor, see ``Predictor.fingerprint``."""
    return {
        "model": predictor.name,
        "weights_sha256": weights_sha256(predictor.model),
        "preprocessing": _preprocessing(predictor.prep),
        "decoder": _decoder(),
        "dtype": str(predictor.dtype).removeprefix("torch."),
        "top": str(predictor.top),
        "labels": "none" if predictor.labels is None else _short("\n".join(predictor.labels)),
        "kernels": f"{' '.join(paths(predictor.model))} on {_machine(predictor.device)}"
        + _settings(predictor),
        "version": resnet_fused.__version__,
    }


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a model's tensors, in order of the names.

    BatchNorm's counters (``num_batches_tracked``) are left out, because nothing depends on them.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if not key.endswith("num_batches_tracked"):
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def name_of(model: nn.Module) -> str:
    """A module's class, and a hash of the classes and options below it."""
    return f"{type(model).__qualname__} {_short(repr(model))}"


def paths(model: nn.Module) -> list[str]:
    """The kernel paths that the model's convolutions take now."""
    return sorted({row.path for row in report(model)} or {"plain"})


def _preprocessing(prep: Preprocessing) -> str:
    """Every digit, unlike str(), and not where the values came from."""
    mean, std = (",".join(map(repr, map(float, values))) for values in (prep.mean, prep.std))
    return f"resize {prep.resize} crop {prep.crop} {prep.interpolation} mean {mean} std {std}"


def _decoder() -> str:
    pillow = f"Pillow {PIL.__version__}"
    if torchvision_decoder() is None:
        return pillow
    return f"{pillow}, torchvision {importlib.import_module('torchvision').__version__} for JPEG"


def _machine(device: torch.device) -> str:
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability() + (" AMX" if _extension.amx() else "")
    )
    invariant = ", batch invariant" if dispatch.batch_invariant() else ""
    hopper = _extension.hopper() if device.type == "cuda" else ""
    kernels = f", RESNET_FUSED_HOPPER={hopper}" if hopper else ""
    return f"{where}, torch {torch.__version__}{invariant}{kernels}"


def _settings(predictor: Predictor) -> str:
    """What else changes the bits of PyTorch's own operations."""
    backends: Any = torch.backends  # torch's annotations lack what it has
    found = []
    if predictor.dtype == torch.float32:
        cuda = predictor.device.type == "cuda"
        conv, matmul = (
            (backends.cudnn.conv, backends.cuda.matmul)
            if cuda
            else (backends.mkldnn.conv, backends.mkldnn.matmul)
        )
        precisions = {"conv": conv.fp32_precision, "matmul": matmul.fp32_precision}
        found += [f"{op} {p}" for op, p in precisions.items() if p not in ("none", "ieee")]
    found += [f"{name}={os.environ[name]}" for name in ONEDNN if os.environ.get(name)]
    return "".join(f", {text}" for text in found)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
