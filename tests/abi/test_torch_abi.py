# SPDX-License-Identifier: BSD-3-Clause
"""csrc/torch_abi.h repeats torch's declarations by hand; here the compiler compares them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
TORCH_HEADERS = Path(torch.__file__).parent / "include"


def syntax_errors(source: Path, *include: Path) -> str:
    """What the C++ compiler says about ``source``; empty if nothing."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    # USE_CUDA shows the declarations of libtorch_cuda; they need no CUDA headers.
    command = [*compiler, "-std=c++20", "-fsyntax-only", "-w", "-DUSE_CUDA", str(source)]
    command += [f"-I{folder}" for folder in (*include, TORCH_HEADERS)]
    return subprocess.run(command, capture_output=True, text=True).stderr


def declared() -> list[str]:
    """The torch functions that torch_abi.h declares."""
    text = (CSRC / "torch_abi.h").read_text()
    block = text[text.index('extern "C" {') : text.index('}  // extern "C"')]
    return re.findall(r"\b((?:aoti_)?torch_\w+)\(", block)


def test_declarations_agree_with_torch() -> None:
    """A wrong parameter or return type in torch_abi.h."""
    assert syntax_errors(HERE / "torch_abi_check.cpp", CSRC) == ""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("int64_t* ret_dim", "int32_t* ret_dim"),
        ("AOTITorchError torch_delete_list", "void torch_delete_list"),
        ("int32_t non_blocking", "int32_t non_blocking, int32_t extra"),
    ],
)
def test_a_wrong_declaration_is_rejected(tmp_path: Path, right: str, wrong: str) -> None:
    """A check that accepts anything, for example because the headers are not found."""
    text = (CSRC / "torch_abi.h").read_text()
    assert text.count(right) == 1
    (tmp_path / "torch_abi.h").write_text(text.replace(right, wrong))
    errors = syntax_errors(HERE / "torch_abi_check.cpp", tmp_path)
    assert "conflicting declaration" in errors or "conflicting types" in errors  # gcc, clang


def test_torch_declares_every_function(tmp_path: Path) -> None:
    """A misspelt name, which conflicts with nothing and shows only when the library is loaded."""
    names = declared()
    assert len(names) > 20 and "torch_call_dispatcher" in names
    # Weak, and newer than the oldest torch.
    for name, since in (
        ("torch_from_blob", "2.11"),
        ("torch_exception_get_what_without_backtrace", "2.13"),
    ):
        if torch.__version__ < since:
            names.remove(name)
    includes = [
        line for line in (HERE / "torch_abi_check.cpp").read_text().splitlines() if "<" in line
    ]
    source = tmp_path / "names.cpp"
    uses = [f"auto* use_{i} = &{name};" for i, name in enumerate(names)]
    source.write_text("\n".join(includes + uses))
    assert syntax_errors(source) == ""
    source.write_text("\n".join([*includes, "auto* use = &aoti_torch_get_dimm;"]))
    assert "aoti_torch_get_dimm" in syntax_errors(source)
