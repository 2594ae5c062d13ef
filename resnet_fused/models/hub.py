# SPDX-License-Identifier: BSD-3-Clause
"""Weights by name from the Hugging Face Hub: ``hf-hub:org/name@revision``."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from resnet_fused.models import hub_layouts

PREFIX = "hf-hub:"
FORM = f"{PREFIX}org/name or {PREFIX}org/name@revision"
# The first that is there. All but the first hold pickles, of which only tensors are read.
FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


class NotInRepository(ValueError):
    """The repository is there, the file is not."""


@dataclass(frozen=True, eq=False)
class HubWeights:
    """Weights in a repository of the Hub, which answer as torchvision's do.

    Args:
        repo: ``org/name``.
        revision: a commit, so that all files belong together.
        config: the repository's ``config.json``.
    """

    repo: str
    revision: str
    config: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}@{self.revision}"

    @property
    def meta(self) -> dict[str, Any]:
        """``categories``: class names by index, or None where the repository names none."""
        with _sound(self):
            return {"categories": hub_layouts.labels(self.config, str(self))}

    def transforms(self) -> hub_layouts.Preset:
        """The preprocessing that the weights were made for.

        Raises:
            ValueError: it is not one of shorter side, centre crop and normalisation.
        """
        with _sound(self):
            if not hub_layouts.is_transformers(self.config):
                return hub_layouts.timm_preset(self.config, str(self))
            path = _download(self.repo, "preprocessor_config.json", self.revision)
            return hub_layouts.transformers_preset(_parse(path, str(self)), str(self))

    def get_state_dict(self, progress: bool = True, check_hash: bool = False) -> dict[str, Tensor]:
        """Read the weights, downloaded first unless they are in the cache.

        Args:
            progress: show the progress of a download.
            check_hash: without effect, here because torchvision's weights take it.

        Returns:
            Tensors under torchvision's keys.

        Raises:
            ValueError: no file of weights is there, or it holds more than tensors.
            ConnectionError: the file is neither in the cache nor to be had.
        """
        from resnet_fused.models.weights import read  # which imports this module

        state = read(self._file(progress))
        if hub_layouts.is_transformers(self.config):
            return hub_layouts.torchvision_keys(state)
        return state

    def _file(self, progress: bool) -> Path:
        hub = _client(str(self))
        for name in FILES:
            cached = hub.try_to_load_from_cache(self.repo, name, revision=self.revision)
            if isinstance(cached, str):
                return Path(cached)
        for name in FILES:
            try:
                return _download(self.repo, name, self.revision, progress)
            except NotInRepository:
                continue
        raise ValueError(f"weights {self} must have one of the files {', '.join(FILES)}")


def find(name: str, model: str | None) -> HubWeights:
    """Look up ``hf-hub:org/name@revision``; only the small ``config.json`` is fetched.

    Args:
        name: as given by the user.
        model: builder the weights are for, such as "resnet50"; None asks for no model's.

    Raises:
        ValueError: huggingface_hub is missing, the name is malformed, there is no such repository,
            revision or ``config.json``, or the repository holds another network.
        ConnectionError: the file is neither in the cache nor to be had.
    """
    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    if not all(repo.partition("/")) or name.endswith("@"):
        raise ValueError(f"weights must be {FORM}, got {name!r}")
    try:
        path = _download(repo, "config.json", revision or None)
    except NotInRepository as error:
        raise ValueError(
            f"weights {name} must be a repository of timm or transformers, with a config.json that "
            "names architecture and preprocessing; download its file and pass the path instead"
        ) from error
    commit = path.parent.name  # the cache is laid out as snapshots/COMMIT/FILE
    found = HubWeights(repo, commit, _parse(path, name))
    if model is not None:
        with _sound(found):
            hub_layouts.check(found.config, model, str(found))
    return found


@contextmanager
def _sound(weights: HubWeights) -> Iterator[None]:
    """Say which repository it is whose configuration holds values of wrong types."""
    try:
        yield
    except (ArithmeticError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"weights {weights}: a value in the repository's configuration is not what timm or "
            f"transformers write: {_line(error)}"
        ) from error


def _client(name: str) -> Any:
    """huggingface_hub, without its telemetry unless the user has switched that on."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # is read when it is imported
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ValueError(
            f"weights {name} need huggingface_hub: pip install 'resnet_fused[hub]'"
        ) from error


def _download(repo: str, file: str, revision: str | None, progress: bool = False) -> Path:
    """Path of a file in the cache, downloaded first if need be."""
    from tqdm.auto import tqdm

    class Quiet(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    name = f"{PREFIX}{repo}" + (f"@{revision}" if revision else "")
    hub = _client(name)
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        return Path(
            hub.hf_hub_download(
                repo,
                file,
                revision=revision,
                tqdm_class=None if progress else Quiet,
            )
        )
    except errors.LocalEntryNotFoundError as error:
        offline = importlib.import_module("huggingface_hub.constants").HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
        raise ConnectionError(f"weights {name}: {file} is not in the cache, and {why}") from error
    except errors.EntryNotFoundError as error:
        raise NotInRepository(f"weights {name}: there is no {file} in the repository") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"weights {name}: the repository has no branch, tag or commit {revision!r}"
        ) from error
    except errors.GatedRepoError as error:
        raise ValueError(
            f"weights {name}: the repository is gated; ask for access on its page, then set "
            "HF_TOKEN or run 'hf auth login'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"weights {name}: there is no such repository on the Hub, or it is private; for a "
            "private one set HF_TOKEN or run 'hf auth login'"
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(f"weights must be {FORM}, got {name!r}: {_line(error)}") from error
    except Exception as error:  # the client lets the errors of several libraries through
        raise ConnectionError(f"weights {name}: {file} could not be fetched: {_line(error)}") from (
            error
        )


def _parse(path: Path, name: str) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # both not UTF-8 and not JSON
        raise ValueError(f"weights {name}: {path.name} must be JSON: {_line(error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"weights {name}: {path.name} must hold an object, got {content!r:.50}")
    return content


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
