# SPDX-License-Identifier: BSD-3-Clause
"""What ``weights=`` accepts, and how it becomes a state_dict without running code from a file."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from resnet_fused.models import hub

SUFFIXES = (".pth", ".pt", ".safetensors", ".tar", ".bin", ".ckpt")
# Where training scripts put the state_dict in a checkpoint, and what wrappers put before its keys.
NESTED = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.")
SHOWN = 5

M = TypeVar("M", bound=nn.Module)


def resolve(weights: Any, model: str) -> Any:
    """Turn what ``weights=`` may be into None, a Path, or an object with ``get_state_dict``.

    Args:
        weights: None, a file (str or Path), a torchvision weights enum, the name of one ("DEFAULT",
            "IMAGENET1K_V2", "ResNet50_Weights.IMAGENET1K_V2"), a repository of the Hugging Face
            Hub ("hf-hub:org/name" or "hf-hub:org/name@revision"), or an object with
            ``get_state_dict`` that takes torchvision's arguments.
        model: builder the weights are for, such as "resnet50".

    Raises:
        ValueError: a string is neither a file nor a name that ``model`` has, or see ``hub.find``.
        TypeError: the object is nothing of the above, or a torchvision enum of another model.
        FileNotFoundError: a file is not there.
        ConnectionError: the Hub has what is asked for, but cannot be reached.
    """
    if weights is None:
        return None
    if isinstance(weights, str) and weights.startswith(hub.PREFIX):
        return hub.find(weights, model)
    if isinstance(weights, os.PathLike) or (isinstance(weights, str) and _is_file(weights)):
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(f"weights file {path} does not exist or is no file")
        return path
    if isinstance(weights, str):
        return _by_name(weights, model)
    if not hasattr(weights, "get_state_dict"):
        raise TypeError(
            "weights must be None, a file, the name of torchvision weights, hf-hub:org/name or an "
            f"object with get_state_dict, got {type(weights).__name__}; "
            "to use a state_dict, call model.load_state_dict"
        )
    if isinstance(weights, Enum) and type(weights).__module__.startswith("torchvision."):
        expected = _enum(model)
        if not isinstance(weights, expected):
            raise TypeError(
                f"weights of {model} must be of {expected.__name__}, got {weights!r}; "
                "call the builder these weights belong to"
            )
    return weights


def categories(weights: Any, model: str | None = None) -> list[str] | None:
    """The class names that come with ``weights``; None for a file and where nothing is said.

    Args:
        weights: as for ``resolve``.
        model: builder the weights are for; needed for a bare name such as "DEFAULT".
    """
    source = weights
    if isinstance(weights, str) and weights.startswith(hub.PREFIX):
        source = hub.find(weights, model)
    elif isinstance(weights, str):
        kind = weights.partition(".")[0]
        source = resolve(weights, model or kind.removesuffix("_Weights").lower())
    names = _meta(source).get("categories")
    return None if names is None else list(names)


def read(path: Path) -> dict[str, Tensor]:
    """Read the state_dict in a .safetensors file or one written by ``torch.save``.

    Objects are never unpickled, so nothing in the file can run.

    Args:
        path: the file. A checkpoint that keeps its state_dict under "state_dict", "model" or
            "model_state_dict" is opened; a "module." (DataParallel) or "_orig_mod."
            (torch.compile) before every key is removed.

    Returns:
        Tensors on the CPU by key.

    Raises:
        ValueError: the file is damaged, holds something else than tensors, or is no state_dict.
    """
    try:
        content: Any
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file  # here, because nothing else needs it

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it holds a Python object ({found[1]}), and objects are never loaded"
            if found
            else f"it is damaged or no weights file ({type(error).__name__})"
        )
        raise ValueError(
            f"weights file {path} must hold a state_dict of tensors: {reason}; "
            "write it again with torch.save(model.state_dict(), path)"
        ) from error
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"weights file {path} must hold a state_dict, got {type(content).__name__}"
        )
    odd = [f"{k!r} ({type(v).__name__})" for k, v in content.items() if not isinstance(v, Tensor)]
    if odd:
        raise ValueError(
            f"weights file {path} must hold a state_dict of tensors or keep one under "
            f"{_list(NESTED)}, but these are no tensors: {_list(odd)}"
        )
    state = {str(key): tensor for key, tensor in content.items()}
    for prefix in PREFIXES * 2:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def load(model: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Copy ``state`` into ``model``, every key and shape of it.

    BatchNorm counters (``num_batches_tracked``) may be absent, as in files of old PyTorch versions.

    Raises:
        RuntimeError: keys are missing, unexpected or of another shape; the message lists them.
    """
    own = model.state_dict()
    wrong = {k for k, v in state.items() if k in own and own[k].shape != v.shape}
    left = model.load_state_dict({k: v for k, v in state.items() if k not in wrong}, strict=False)
    problems = {
        "missing": [k for k in left.missing_keys if k not in wrong],
        "unexpected": left.unexpected_keys,
        "of another shape": [
            f"{k} {list(state[k].shape)} instead of {list(own[k].shape)}"
            for k in state
            if k in wrong
        ],
    }
    if any(problems.values()):
        lines = [
            f"\n  {len(keys)} {what}: {_list(keys)}" for what, keys in problems.items() if keys
        ]
        raise RuntimeError(
            f"weights {source} do not fit this {type(model).__name__} "
            f"({len(state)} keys given, {len(own)} wanted):{''.join(lines)}\n"
            "Call the builder, and with the arguments, that the weights were made with."
        )


def build(
    make: Callable[..., M], model: str, weights: Any, progress: bool, kwargs: dict[str, Any]
) -> M:
    """Make a model with ``make(**kwargs)`` and load ``weights`` into it.

    ``num_classes`` follows from the weights.

    Args:
        make: the model's class or builder.
        model: builder the weights are for, such as "resnet50".
        weights: as for ``resolve``.
        progress: show the progress of a download.
        kwargs: arguments of ``make``.

    Raises:
        ValueError: ``num_classes`` is given and differs from the weights'; or see ``resolve`` and
            ``read``.
        RuntimeError: the weights do not fit the model.
    """
    source = resolve(weights, model)
    if source is None:
        return make(**kwargs)
    try:
        names = _meta(source).get("categories")
    except ValueError:  # who wants the names is told, see categories()
        names = None
    if names is not None:
        fix(kwargs, "num_classes", len(names))
    state = read(source) if isinstance(source, Path) else _fetch(source, progress)
    fc = state.get("fc.weight")
    if fc is not None and fc.dim() == 2:
        if names is not None and len(names) != fc.shape[0]:
            raise ValueError(
                f"weights {source} name {len(names)} classes and have a last layer of "
                f"{fc.shape[0]}; pass the path of their file instead, with labels of your own"
            )
        fix(kwargs, "num_classes", fc.shape[0])
    net = make(**kwargs)
    load(net, state, source)
    return net


def fix(kwargs: dict[str, Any], name: str, value: int) -> None:
    """Set ``kwargs[name] = value``; raises ValueError if the caller gave another value."""
    if kwargs.setdefault(name, value) != value:
        raise ValueError(
            f"{name} must be {value} for this model and these weights, got {kwargs[name]}; "
            f"leave {name} out, or replace the layer after the model is built"
        )


def _is_file(text: str) -> bool:
    return text.lower().endswith(SUFFIXES) or os.path.isfile(text)


def _torchvision_models(why: str) -> Any:
    try:
        return importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise ValueError(
            f"weights {why} is no file, and names of weights need torchvision: "
            "install torchvision, or pass a .pth or .safetensors file"
        ) from error


def _enum(model: str) -> Any:
    return _torchvision_models(repr(model)).get_model_weights(model)


def _by_name(name: str, model: str) -> Any:
    members = _torchvision_models(repr(name)).get_model_weights(model).__members__
    short = name.rpartition(".")[2]
    enum_name = type(next(iter(members.values()))).__name__
    if short not in members or name not in (short, f"{enum_name}.{short}"):
        raise ValueError(
            f"weights must be a file, {hub.FORM}, or one of {model}'s ({', '.join(members)}), "
            f"got {name!r}"
        )
    return members[short]


def _meta(source: Any) -> Mapping[str, Any]:
    meta: Mapping[str, Any] | None = getattr(source, "meta", None)
    return meta or {}


def _fetch(source: Any, progress: bool) -> Mapping[str, Tensor]:
    """Ask ``source`` as torchvision does; its weights are also told to unpickle only tensors."""
    options = {"progress": progress, "check_hash": True}
    if type(source).__module__.startswith("torchvision."):
        options["weights_only"] = True
    state: Mapping[str, Tensor] = source.get_state_dict(**options)
    return state


def _list(items: Iterable[str]) -> str:
    """The first items, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more
