# SPDX-License-Identifier: BSD-3-Clause
"""The examples for servers and Spark answer what the Predictor answers."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_fused import Predictor, set_batch_invariant

EXAMPLES = Path(__file__).parents[2] / "examples"
TRITON = EXAMPLES / "triton" / "resnet50"
NO_IMAGE = "no image in a format that Pillow can read"


class Reply(NamedTuple):
    status: int
    content: Any


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """Twelve JPEG files of other sizes and colours."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(12):
        levels = rng.integers(0, 256, (4 + i, 6, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(levels).resize((120 + 9 * i, 100), Image.Resampling.BICUBIC).save(
            buffer, "JPEG", quality=90
        )
        found.append(buffer.getvalue())
    return found


@pytest.fixture
def invariant() -> Iterator[None]:
    """Dynamic batches are of any size; without this oneDNN may round by it."""
    set_batch_invariant(True)
    yield
    set_batch_invariant(False)


def example(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_array(files: list[bytes]) -> np.ndarray:
    return np.array(files, dtype=object)


def assert_equal(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(result) == list(expected)
    for key in expected:
        np.testing.assert_array_equal(result[key], expected[key], err_msg=key)


def post(url: str, data: bytes, kind: str = "image/jpeg") -> Reply:
    request = urllib.request.Request(url, data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return Reply(answer.status, json.load(answer))
    except urllib.error.HTTPError as error:
        return Reply(error.code, json.load(error))


@pytest.fixture
def server(weights: str, tmp_path: Path) -> Iterator[str]:
    """The address of a LitServe server in a process of its own."""
    pytest.importorskip("litserve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(EXAMPLES / "litserve_server.py")
    command = [sys.executable, script, "--weights", weights, "--model", "resnet18"]
    log = tmp_path / "log"
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        cwd=tmp_path,
        env={**os.environ, "RESNET_FUSED_BATCH_INVARIANT": "1"},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,  # its workers are stopped with it, whatever happens
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                pytest.fail(f"the server ended: {log.read_text()}")
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:  # not listening yet, or its worker is not ready
                time.sleep(0.1)
        yield url
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
        process.wait(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "client.py").exists()  # LitServe's habit


def test_litserve(server: str, weights: str, files: list[bytes], invariant: None) -> None:
    """Answers that are swapped within a batch or differ from the Predictor's, and one bad image
    that fails the requests beside it or gives an unexplained 500."""
    sent = [*files[:6], b"no picture", *files[6:], files[0][:-400]]
    with ThreadPoolExecutor(len(sent)) as pool:
        replies = list(pool.map(lambda data: post(f"{server}/predict", data), sent))
    expected = Predictor("resnet18", weights)({"bytes": as_array(sent)})
    for i, reply in enumerate(replies):
        error = expected["error"][i]
        if error:
            assert reply == (400, {"detail": error})
        else:
            assert reply.status == 200
            assert_equal(
                {key: np.array(value) for key, value in reply.content.items()},
                {key: expected[key][i] for key in ("index", "prob", "label")},
            )
    assert [reply.status for reply in replies].count(400) == 2
    assert replies[6].content["detail"] == NO_IMAGE
    assert post(f"{server}/predict", b'{"a": 1}', "application/json").status == 422
    assert post(f"{server}/predict", files[0], "application/octet-stream").status == 200


def test_litserve_example_is_short() -> None:
    """It is shown as what forty lines can do."""
    assert len((EXAMPLES / "litserve_server.py").read_text().splitlines()) <= 40


class Tensor(NamedTuple):
    """As in triton_python_backend_utils."""

    name: str
    values: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.values


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The model's file, with a stand-in for the module that only exists within Triton."""
    utils = ModuleType("triton_python_backend_utils")
    utils.Tensor = Tensor  # type: ignore[attr-defined]
    utils.InferenceResponse = lambda tensors: {t.name: t.values for t in tensors}  # type: ignore[attr-defined]
    utils.get_input_tensor_by_name = lambda request, name: request[name]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    return example(TRITON / "1" / "model.py")


def initialize(module: ModuleType, repository: Path, **parameters: str) -> Any:
    config = {
        "name": "resnet18",
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }
    model = module.TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps(config),
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
            "model_repository": str(repository),
        }
    )
    return model


def request(files: list[bytes]) -> dict[str, Tensor]:
    """One request, which may hold several images: [batch, 1] of bytes."""
    return {"image": Tensor("image", as_array(files).reshape(-1, 1))}


def test_triton(triton: ModuleType, weights: str, files: list[bytes], invariant: None) -> None:
    """Rows that go to another request of the same batch, or shapes that config.pbtxt denies."""
    model = initialize(triton, Path(weights).parent, weights="seven.pth", top="3")
    requests = [files[:1], [files[1], b"no picture", files[2]], files[3:5]]
    responses = model.execute([request(images) for images in requests])
    predictor = Predictor("resnet18", weights, top=3)
    outputs = re.findall(
        r'name: "(\w+)" data_type: (\w+) dims: \[ (-?\d+) \]', (TRITON / "config.pbtxt").read_text()
    )
    kinds = {"TYPE_INT64": np.int64, "TYPE_FP32": np.float32, "TYPE_STRING": np.object_}
    assert [name for name, *_ in outputs] == ["image", "index", "prob", "label", "error"]
    for images, response in zip(requests, responses, strict=True):
        expected = predictor({"bytes": as_array(images)})
        assert_equal(response, {**expected, "error": expected["error"].reshape(-1, 1)})
        for name, kind, width in outputs[1:]:
            assert response[name].dtype == kinds[kind]
            assert response[name].shape == (len(images), 3 if width == "-1" else int(width))
    assert responses[1]["error"].tolist() == [[""], [NO_IMAGE], [""]]


def test_triton_takes_names_of_weights_too(triton: ModuleType, tmp_path: Path) -> None:
    """A path is looked for beside config.pbtxt; what is no file there is left to the Predictor."""
    model = initialize(triton, tmp_path, weights="random", dtype="bf16")
    assert model.predictor.dtype is torch.bfloat16 and model.predictor.top == 5
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        initialize(triton, tmp_path, weights="absent.pth")


def test_triton_config_names_the_parameters_that_the_model_reads() -> None:
    """A parameter of the example configuration with another name would be ignored in silence."""
    text = (TRITON / "config.pbtxt").read_text()
    assert set(re.findall(r'key: "(\w+)"', text)) == {"weights", "dtype", "top"}
    assert TRITON.name == re.search(r'^name: "(\w+)"', text, re.M)[1]  # type: ignore[index]
    assert text.count("{") == text.count("}") and text.count("[") == text.count("]")


def test_spark(weights: str, files: list[bytes], invariant: None) -> None:
    """What predict_batch_udf asks of a dictionary of columns: the fields of the struct and no
    others, arrays of two dimensions, one row per image."""
    predict = example(EXAMPLES / "spark.py").make_predict_fn(weights, "resnet18")()
    threads = torch.get_num_threads()
    try:
        column = as_array([*files[:3], b"no picture"])
        result = predict(column)
        assert_equal(result, Predictor("resnet18", weights)({"bytes": column}))
    finally:
        torch.set_num_threads(threads)
    fields = re.findall(r'add\("(\w+)", (\w+)\(', (EXAMPLES / "spark.py").read_text())
    assert dict(fields) == {
        key: "ArrayType" if value.ndim == 2 else "StringType" for key, value in result.items()
    }
    assert all(len(value) == 4 for value in result.values())
