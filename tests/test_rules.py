# SPDX-License-Identifier: BSD-3-Clause
"""The rules of the house, each a function from a repository root to its violations."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 400
MAX_REFERENCE_LINES = 15
CPP = {".cpp", ".h", ".cu", ".cuh"}
Rule = Callable[[Path], list[str]]


def files(root: Path, suffixes: set[str], under: str = ".") -> Iterator[Path]:
    """The source files under a folder, without build products and virtual environments."""
    folder = root / under
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir():
            product = path.name in ("build", "dist", "__pycache__") or path.name.startswith(".")
            if not product and not (path / "pyvenv.cfg").exists():
                yield from files(root, suffixes, str(path.relative_to(root)))
        elif path.suffix in suffixes:
            yield path


def code(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a C++ file with comments blanked; strings stay."""
    text = re.sub(
        r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/',
        lambda match: match[1] or "\n" * match[0].count("\n"),
        path.read_text(),
        flags=re.S,
    )
    yield from enumerate(text.splitlines(), 1)


def search(root: Path, under: str, pattern: str, exempt: tuple[str, ...] = ()) -> list[str]:
    """Lines of C++ code under a folder that match."""
    return [
        f"{name}:{number}: {line.strip()}"
        for path in files(root, CPP, under)
        if not (name := str(path.relative_to(root))).startswith(exempt or ("\0",))
        for number, line in code(path)
        if re.search(pattern, line)
    ]


def no_torch_below_kernels(root: Path) -> list[str]:
    """Kernels are plain C++ and CUDA: no header of torch, nor our own declarations of it."""
    return search(
        root, "csrc/kernels", r'#\s*include\s*[<"](torch|ATen|c10)/|#\s*include.*torch_abi'
    )


def no_raw_asm(root: Path) -> list[str]:
    """PTX is written once, in ptx*.cuh; the CPU folder has its own instructions."""
    exempt = ("csrc/kernels/cuda/ptx.cuh", "csrc/kernels/cuda/ptx_hopper.cuh", "csrc/kernels/cpu/")
    return search(root, "csrc", r"\b(asm|__asm__|__asm)\b", exempt)


def no_exit_or_printf(root: Path) -> list[str]:
    """A library neither ends its host process nor writes to its terminal."""
    return search(root, "csrc", r"\b(exit|_exit|abort|f?printf|puts)\s*\(|std::(cout|cerr)\b")


def no_long_file(root: Path) -> list[str]:
    """A file can be read in one sitting."""
    lengths = {path: len(path.read_text().splitlines()) for path in files(root, CPP | {".py"})}
    return [
        f"{path.relative_to(root)}: {lines} lines, at most {MAX_LINES}"
        for path, lines in lengths.items()
        if lines > MAX_LINES
    ]


def licence_line_first(root: Path) -> list[str]:
    """Every source file names the licence in its first two lines."""
    return [
        f"{path.relative_to(root)}: no SPDX line"
        for path in files(root, CPP | {".py"})
        if "SPDX-License-Identifier: BSD-3-Clause"
        not in "\n".join(path.read_text().splitlines()[:2])
    ]


def ops(root: Path) -> list[str]:
    """The ops whose schemas csrc/library.cpp holds."""
    return re.findall(r'"(\w+)\(Tensor ', (root / "csrc/library.cpp").read_text())


def one_stem_per_op(root: Path) -> list[str]:
    """An op has the same name in every folder."""
    found = []
    for op in ops(root):
        for path in (f"csrc/ops/{op}.cpp", f"resnet_fused/ops/{op}.py", f"tests/test_{op}.py"):
            if not (root / path).is_file():
                found.append(f"{op}: {path} is missing")
    return found


def short_reference_per_op(root: Path) -> list[str]:
    """The specification of an op fits on half a screen."""
    tree = ast.parse((root / "resnet_fused/reference.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found = []
    for op in ops(root):
        if op not in functions:
            found.append(f"{op}: not in reference.py")
            continue
        node = functions[op]
        body = node.body[1:] if ast.get_docstring(node) else node.body
        lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
        if lines > MAX_REFERENCE_LINES:
            found.append(f"reference.{op}: {lines} lines, at most {MAX_REFERENCE_LINES}")
    return found


RULES: list[Rule] = [
    no_torch_below_kernels,
    no_raw_asm,
    no_exit_or_printf,
    no_long_file,
    licence_line_first,
    one_stem_per_op,
    short_reference_per_op,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    """The repository breaks a rule of the house."""
    assert rule(ROOT) == []


def test_the_index_names_the_ops() -> None:
    """A change of library.cpp's wording after which the stem rules look at nothing."""
    assert {"add_relu", "conv_bn_act", "stem", "pool_linear"} <= set(ops(ROOT))


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small repository that keeps every rule."""
    spdx = "SPDX-License-Identifier: BSD-3-Clause\n"
    for name, text in {
        "csrc/library.cpp": '{"twice(Tensor x) -> Tensor", "twice"},  // no exit() here\n',
        "csrc/ops/twice.cpp": '#include "../torch_abi.h"\n',
        "csrc/kernels/twice.h": "/* asm\n printf() */ int snprintf(char*);\n",
        "csrc/kernels/cpu/twice.cpp": 'void f() { asm("nop"); }\n',
        "csrc/kernels/cuda/ptx.cuh": 'void g() { asm volatile("nop;"); }\n',
        "resnet_fused/ops/twice.py": "",
        "resnet_fused/full.py": "\n" * (MAX_LINES - 1),
        "resnet_fused/reference.py": 'def twice(x):\n    """Doc."""\n' + "    x += x\n" * 15,
        "tests/test_twice.py": "",
        "build/generated.py": "\n" * 1000,
        "env/lib/site.py": "\n" * 1000,
        "env/pyvenv.cfg": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(("# " if path.suffix == ".py" else "// ") + spdx + text)
    return tmp_path


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_what_is_right(rule: Rule, house: Path) -> None:
    """A rule that cries wolf over a comment, a build product or an exempt file."""
    assert rule(house) == []


@pytest.mark.parametrize(
    ("rule", "file", "added", "message"),
    [
        (no_torch_below_kernels, "csrc/kernels/twice.h", "#include <ATen/ATen.h>", "twice.h:4"),
        (no_torch_below_kernels, "csrc/kernels/cuda/a.cu", '#include "../../torch_abi.h"', "a.cu"),
        (no_torch_below_kernels, "csrc/kernels/cpu/a.cpp", "# include <c10/x.h>", "cpu/a.cpp"),
        (no_raw_asm, "csrc/kernels/cuda/a.cu", 'asm volatile("ret;");', "a.cu"),
        (no_raw_asm, "csrc/ops/twice.cpp", '__asm__("nop");', "twice.cpp"),
        (no_exit_or_printf, "csrc/ops/twice.cpp", "void f() { std::exit(1); }", "std::exit"),
        (no_exit_or_printf, "csrc/kernels/cuda/a.cu", 'void f() { printf("%d", 1); }', "printf"),
        (no_long_file, "resnet_fused/ops/twice.py", "\n" * 399, "401 lines"),
        (no_long_file, "csrc/kernels/cuda/a.cuh", "\n" * 400, "a.cuh: 401 lines"),
        (short_reference_per_op, "resnet_fused/reference.py", "    return x", "twice: 16 lines"),
        (one_stem_per_op, "csrc/library.cpp", '{"half(Tensor x) -> Tensor"}', "ops/half.cpp"),
        (one_stem_per_op, "csrc/library.cpp", '{"half(Tensor x) -> Tensor"}', "ops/half.py"),
        (one_stem_per_op, "csrc/library.cpp", '{"half(Tensor x) -> Tensor"}', "test_half.py"),
        (
            short_reference_per_op,
            "csrc/library.cpp",
            '{"half(Tensor x)"}',
            "half: not in reference",
        ),
        (licence_line_first, "tests/test_new.py", "import os", "tests/test_new.py: no SPDX"),
        (licence_line_first, "csrc/ops/new.h", "#pragma once", "new.h: no SPDX"),
    ],
)
def test_rule_rejects_a_seeded_violation(
    rule: Rule, file: str, added: str, message: str, house: Path
) -> None:
    """A rule that cannot fail."""
    path = house / file
    path.write_text((path.read_text() if path.exists() else "") + added + "\n")
    assert any(message in violation for violation in rule(house)), rule(house)
