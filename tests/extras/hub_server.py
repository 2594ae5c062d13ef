# SPDX-License-Identifier: BSD-3-Clause
"""A small stand-in for the Hugging Face Hub on this machine, and repositories to put there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from safetensors.torch import save
from torch import Tensor

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"
Files = dict[str, bytes]


def timm_files(state: dict[str, Tensor], architecture: str = "resnet18", **changes: Any) -> Files:
    """A repository as timm writes it; ``changes`` go into config.json, None removes a key."""
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": 7,
        "num_features": 512,
        "global_pool": "avg",
        "model_args": {"num_classes": 7, "in_chans": 3, "global_pool": "avg"},
        "label_names": [f"class {i}" for i in range(7)],
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "test_input_size": [3, 64, 64],
            "interpolation": "bicubic",
            "crop_pct": 0.95,
            "test_crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.3, 0.4],
        },
    }
    config = {k: v for k, v in {**config, **changes}.items() if v is not None}
    weights = save({k: v.contiguous() for k, v in state.items()})
    return {"config.json": json.dumps(config).encode(), "model.safetensors": weights}


def cached(cache: Path, repo: str, files: Files, commit: str = COMMIT) -> None:
    """Lay out ``files`` as the client's cache does after downloads of ``main``."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for name, data in files.items():
        (snapshot / name).write_bytes(data)


class Hub:
    """What is served, and what was asked for."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Files]] = {}  # by name, then by commit
        self.names = {"main": COMMIT, "v1": OLDER}  # branches and tags of every repository
        self.gated: set[str] = set()
        self.asked: list[tuple[str, str]] = []  # method, path
        self.agents: set[str] = set()
        self.url = ""

    def answer(self, path: str) -> tuple[int, str, str, bytes]:
        """Status, error code, commit and content for ``/org/name/resolve/revision/file``."""
        repo, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        commit = self.names.get(revision, revision)
        if repo in self.gated:
            return 403, "GatedRepo", "", b""
        if repo not in self.repos:
            return 401, "RepoNotFound", "", b""
        if commit not in self.repos[repo]:
            return 404, "RevisionNotFound", "", b""
        if file not in self.repos[repo][commit]:
            return 404, "EntryNotFound", commit, b""
        return 200, "", commit, self.repos[repo][commit][file]


@contextmanager
def serve() -> Iterator[Hub]:
    """Answer on a free port of this machine until the end of the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            status, error, commit, content = hub.answer(self.path)
            hub.asked.append((self.command, self.path))
            hub.agents.add(self.headers["user-agent"])
            self.send_response(status)
            if error:
                self.send_header("X-Error-Code", error)
                self.send_header("X-Error-Message", error)
            if commit:
                self.send_header("X-Repo-Commit", commit)
                self.send_header("ETag", f'"{hash((self.path, commit)):x}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(hub.answer(self.path)[3])

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
