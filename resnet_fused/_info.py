# SPDX-License-Identifier: BSD-3-Clause
"""What is installed and what can run here, for bug reports and for people who wonder."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from resnet_fused import _extension, dispatch


def info() -> dict[str, Any]:
    """Versions, the compiled library (or why it is missing), CUDA, CPU features and paths.

    Never initialises CUDA.

    Returns:
        A flat dictionary of strings, numbers, booleans and lists, ready for JSON. ``library`` is
        the loaded file or None; ``why_not`` says why it is None. ``paths`` gives the path of a
        convolution by device and dtype, ``cuda`` being the first GPU.
    """
    import resnet_fused

    build = _extension.build_info()
    paths = {
        f"{device} {str(dtype).removeprefix('torch.')}": dispatch.path_on(
            torch.device(device), dtype, "conv_bn_act"
        ).name
        for device in ("cpu", "cuda")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    return {
        "resnet_fused": resnet_fused.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "library": str(_extension.LIBRARY) if _extension.available() else None,
        "why_not": _extension.why_not(),
        "built_with": build.get("cxx", ""),
        "cuda_built": bool(build.get("nvcc")),
        "nvcc": build.get("nvcc", ""),
        "cuda_archs": build.get("archs", ""),
        "torch_cuda": torch.version.cuda or "",
        "hopper_kernels": _extension.hopper() or "off",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "amx": _extension.amx(),
        "avx512": _extension.avx512(),
        "onednn": _extension.onednn(),
        "cuda_tf32": dispatch.tf32(),
        "cpu_bf16x3": dispatch.bf16x3(),
        "batch_invariant": dispatch.batch_invariant(),
        "threads": torch.get_num_threads(),
        "backend": os.environ.get("RESNET_FUSED_BACKEND", "auto"),
        "paths": paths,
    }
