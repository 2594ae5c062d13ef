# SPDX-License-Identifier: BSD-3-Clause
"""What an installer gets: sdist, wheel, editable install, the compiled library and its import.

All is built offline, in a virtual environment that has setuptools and ninja but no torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import ninja
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "resnet_fused/_C.abi3.so"
NO_CUDA = {"RESNET_FUSED_CUDA": "0"}
HOOK = (
    "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
)


def run(
    *command: str | Path, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command, without what a developer's shell may add to Python's path."""
    environ = {**os.environ, **(env or {})}
    if "PYTHONPATH" not in (env or {}):
        environ.pop("PYTHONPATH", None)
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environ, capture_output=True, text=True
    )


def python(code: str, cwd: Path, *flags: str, **env: str) -> str:
    """What ``code`` prints under this interpreter; it must not fail."""
    done = run(sys.executable, *flags, "-c", code, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees setuptools and ninja, as in an isolated build, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    packages = run(
        interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    )
    for name in ("setuptools", "ninja"):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}:
            Path(packages.stdout.strip(), top).symlink_to(str(distribution.locate_file(top)))
    (folder / "bin" / "ninja").symlink_to(Path(ninja.BIN_DIR, "ninja"))
    return interpreter


@pytest.fixture(scope="module")
def sdist(bare_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, made from a copy of the working tree without build products."""
    folder = tmp_path_factory.mktemp("tree")
    skip = shutil.ignore_patterns("__pycache__", "*.so", "build", ".git", ".*cache", "*.egg-info")
    for name in ("build_tools", "csrc", "resnet_fused", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, folder)
    done = run(bare_python, "-c", HOOK, "build_sdist", folder / "dist", cwd=folder)
    assert done.returncode == 0, done.stderr
    return next((folder / "dist").iterdir())


@pytest.fixture(scope="module")
def source(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist: whatever is built from it proves that nothing is missing in it."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(bare_python: Path, source: Path) -> Path:
    """The wheel, built where torch cannot be imported."""
    torch = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is not None)"
    assert run(bare_python, "-c", torch, cwd=source).returncode == 0
    done = run(bare_python, "-c", HOOK, "build_wheel", source / "dist", cwd=source, env=NO_CUDA)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CPU only, without CUDA kernels: RESNET_FUSED_CUDA=0" in done.stderr
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, to be put on PYTHONPATH."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_holds_exactly_the_package(wheel: Path, source: Path) -> None:
    """A test or source file that gets into the wheel, or a module that does not."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(source)) for path in (source / "resnet_fused").rglob("*.py")}
    assert names == modules | {LIBRARY, "resnet_fused/py.typed"}


def test_wheel_fits_every_supported_python(wheel: Path) -> None:
    """A wheel tied to the Python that built it."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"resnet_fused-0.1.0-cp310-abi3-{platform}.whl"


def test_metadata(installed: Path) -> None:
    """An upper bound on torch, which would make an installer replace it; a missing command."""
    (folder,) = installed.glob("*.dist-info")
    metadata = importlib.metadata.Distribution.at(folder)
    requires = [line for line in metadata.requires or [] if "extra ==" not in line]
    assert sorted(requires) == ["numpy", "pillow", "safetensors", "torch>=2.10", "tqdm"]
    assert metadata.metadata["Requires-Python"] == ">=3.10"
    assert metadata.metadata["License-Expression"] == "BSD-3-Clause"
    (command,) = metadata.entry_points
    assert (command.name, command.value) == ("resnet-fused", "resnet_fused.cli.main:main")
    version = re.search(r'__version__ = "(.*)"', (ROOT / "resnet_fused/__init__.py").read_text())
    assert version and metadata.version == version[1]


def test_a_module_deleted_since_the_last_build_leaves_the_wheel(
    wheel: Path, bare_python: Path, source: Path, tmp_path: Path
) -> None:
    """Stale files in build/lib, which setuptools keeps."""
    (stale,) = source.glob("build/lib*/resnet_fused")
    (stale / "deleted.py").touch()
    done = run(bare_python, "-c", HOOK, "build_wheel", tmp_path, cwd=source, env=NO_CUDA)
    assert "no work to do" in done.stdout  # and the second build compiles nothing
    names = zipfile.ZipFile(next(tmp_path.iterdir())).namelist()
    assert "resnet_fused/deleted.py" not in names and LIBRARY in names


def test_wheel_works_without_a_warning(installed: Path, tmp_path: Path) -> None:
    """A library that does not load, or loads and computes something else."""
    code = (
        "import torch, resnet_fused; x = torch.randn(3, 37); y = torch.randn(3, 37);"
        "assert torch.equal(torch.ops.resnet_fused.add_relu(x, y), torch.relu(x + y));"
        "print(resnet_fused.__file__); print(resnet_fused.info())"
    )
    output = python(code, tmp_path, "-W", "error", PYTHONPATH=str(installed))
    assert output.startswith(str(installed)) and str(installed / LIBRARY) in output


def test_library_needs_only_torch_and_the_c_libraries(installed: Path) -> None:
    """A dependency on libtorch_cpu or a CUDA library, which ties it to one build of torch."""
    dynamic = run("readelf", "-dW", installed / LIBRARY, cwd=installed).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch.so" in needed
    common = (
        r"(libtorch|libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux.*)\.so[.\d]*"
    )
    assert [name for name in needed if not re.fullmatch(common, name)] == []
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_library_exports_only_its_own_functions(installed: Path) -> None:
    """A symbol that another extension in the process could take for its own."""
    table = run("nm", "-D", "--defined-only", installed / LIBRARY, cwd=installed).stdout
    names = {line.split()[-1] for line in table.splitlines() if line.split()[-2] not in "VWvwu"}
    assert names and all(re.match(r"resnet_fused_|PyInit__C", name) for name in names)


def test_library_names_no_folder_of_the_build(installed: Path, source: Path) -> None:
    """The builder's home folder in a released file."""
    binary = (installed / LIBRARY).read_bytes()
    assert b"csrc/" in binary  # __FILE__ of the registration, relative
    for folder in (source, Path.home(), ROOT):
        assert str(folder).encode() + b"/" not in binary


def test_editable_install_builds_in_place(bare_python: Path, source: Path, tmp_path: Path) -> None:
    """An editable install that builds no library, or overwrites one that is in use."""
    library = source / LIBRARY
    library.write_bytes(b"loaded by a running process")
    with library.open("rb") as mapped:
        done = run(bare_python, "-c", HOOK, "build_editable", tmp_path, cwd=source, env=NO_CUDA)
        assert done.returncode == 0, done.stderr
        assert mapped.read() == b"loaded by a running process"
    assert library.read_bytes()[:4] == b"\x7fELF"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import site; site.addsitedir({str(tmp_path / 'site')!r});"
        "import importlib.util as u; print(u.find_spec('resnet_fused').origin)"
    )
    found = run(bare_python, "-c", code, cwd=tmp_path).stdout.strip()
    assert found == str(source / "resnet_fused" / "__init__.py")
    library.unlink()


@pytest.mark.parametrize(
    "hook", ["prepare_metadata_for_build_wheel", "build_wheel", "build_editable"]
)
@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"CUDA_HOME": "broken", "RESNET_FUSED_CUDA": "1"}, "unset RESNET_FUSED_CUDA"),
        ({"CXX": "no-such-compiler"}, "CXX=no-such-compiler does not run"),
    ],
)
def test_missing_tools_are_one_readable_line(
    bare_python: Path, source: Path, tmp_path: Path, hook: str, env: dict[str, str], message: str
) -> None:
    """A traceback, or an error only after torch has been downloaded (the metadata comes before)."""
    nvcc = source / "broken" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.touch(0o755)
    done = run(bare_python, "-c", HOOK, hook, tmp_path, cwd=source, env=env)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("resnet_fused: error: ") and message in last


WITHOUT_LIBRARY = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import resnet_fused
import torch
x, y = torch.randn(2, 5), torch.randn(2, 5)
assert torch.equal(resnet_fused.add_relu(x, y), torch.relu(x + y))
messages = [str(w.message) for w in caught if "resnet_fused" in str(w.message)]
assert len(messages) == 1, messages
print(messages[0])
print(resnet_fused.info())
"""


@pytest.mark.parametrize(
    ("library", "reason"),
    [(None, "missing"), (b"not a library", "does not load")],
    ids=["missing", "broken"],
)
def test_import_without_the_library(
    installed: Path, tmp_path: Path, library: bytes | None, reason: str
) -> None:
    """An import that fails, or falls back in silence, when the library is missing or broken."""
    shutil.copytree(installed / "resnet_fused", tmp_path / "resnet_fused")
    (tmp_path / LIBRARY).unlink()
    if library is not None:
        (tmp_path / LIBRARY).write_bytes(library)
    warning, info = python(WITHOUT_LIBRARY, tmp_path, PYTHONPATH=str(tmp_path)).splitlines()[:2]
    assert reason in warning and reason in info


def test_import_from_a_source_tree_says_that_it_hides_the_package(source: Path) -> None:
    """Python started in the repository root, the likeliest way to miss the library."""
    (source / LIBRARY).unlink(missing_ok=True)
    assert "source tree" in python(WITHOUT_LIBRARY, source)


QUIET_IMPORT = """
import sys, time
import torch
started, calls = [], []
sys.addaudithook(lambda event, args: started.append(event) if event in (
    "subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.exec") else None)
for name in ("_lazy_init", "is_available", "device_count", "init", "current_device"):
    setattr(torch.cuda, name, lambda *a, name=name, **k: calls.append(name) or 0)
before = time.process_time()  # a busy machine does not slow it
import resnet_fused
print(time.process_time() - before)
assert "torch._dynamo" not in sys.modules  # the compiler is most of a second
assert not started, started
assert not calls, calls
"""


def test_import_is_fast_and_leaves_cuda_alone(installed: Path, tmp_path: Path) -> None:
    """An import that compiles, starts a process, asks for a GPU or takes long beyond torch."""
    times = [float(python(QUIET_IMPORT, tmp_path, PYTHONPATH=str(installed))) for _ in range(3)]
    assert min(times) < 0.5
