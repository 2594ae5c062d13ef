# SPDX-License-Identifier: BSD-3-Clause
"""Predictor: images in, best classes out, the same in every program that hosts it."""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resnet_fused import models
from resnet_fused.input_norm import InputNorm
from resnet_fused.models.weights import resolve
from resnet_fused.predict import fingerprint
from resnet_fused.predict.decode import torchvision_decoder
from resnet_fused.predict.labels import check_labels, read_labels
from resnet_fused.predict.loading import Loaded, load, load_array, load_bytes
from resnet_fused.predict.preprocess import Preprocessing, normalise, preprocessing_of
from resnet_fused.predict.sources import Found
from resnet_fused.predict.writer import Prediction
from resnet_fused.uint8 import NAME, set_input_norm

MODELS = [name for name in models.__all__ if name.islower() and "resne" in name]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("cpu", "cuda")
INPUTS = ("bytes", "path", "image", "pixels")
OUTPUTS = ("index", "prob", "label", "error")
NO_NUMBER = "the model's output is NaN; try --dtype fp32"


class Predictor:
    """A ResNet behind its preprocessing: a dictionary of arrays in, a dictionary of arrays out.

    It knows no engine: the command line, jobs, Ray, Spark and servers all call it. It can be
    pickled, and called from several threads at once.

    Args:
        model: name of one of this package's models, or a module, which is used as it is, in eval
            mode.
        weights: for a name: a ``.pth`` or ``.safetensors`` file, a torchvision weights enum or the
            name of one, "hf-hub:org/name[@revision]", or "random" (the same untrained model every
            time). For a module: None.
        preprocessing: None for what the weights name; fields of Preprocessing by name are what to
            change in that, None leaves a field as it is.
        dtype: "fp32", "bf16" or "fp16"; that of the module's parameters where a module is given.
        device: "cpu", "cuda" or "cuda:N"; where the module's parameters are.
        threads: that decode and, on a CPU, that torch computes with, in the whole process; None for
            as many as torch uses.
        top: classes per image, at most all.
        labels: names of the classes, or a file of them; None for those of the weights.
        progress: show the progress of a download.

    Raises:
        ValueError, TypeError, RuntimeError, OSError: an argument is wrong; the message names it.
    """

    def __init__(
        self,
        model: str | nn.Module = "resnet50",
        weights: Any = None,
        *,
        preprocessing: Preprocessing | Mapping[str, Any] | None = None,
        dtype: str = "fp32",
        device: str | torch.device = "cpu",
        threads: int | None = None,
        top: int = 5,
        labels: Sequence[str] | str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        for name, number in (("top", top), ("threads", threads)):
            if number is not None and not isinstance(number, numbers.Integral):
                raise ValueError(f"{name} must be an integer, got {number!r}")
            if number is not None and number < 1:
                raise ValueError(f"{name} must be 1 or more, got {number}")
        self.device = _device(device)
        self.dtype = DTYPES[dtype]
        self._threads = threads
        self._set_threads()
        self.model: nn.Module
        if isinstance(model, str):
            weights = _weights(weights, model)
            self.weights = "random" if weights is None else str(weights)
            self.prep = _preprocessing(weights, preprocessing)
            self.name = model
            net: Any = _build(model, weights, progress)  # torch's annotations of to() lack this
            self.model = net.to(self.device, self.dtype, memory_format=torch.channels_last)
        else:
            if weights is not None:
                raise ValueError(
                    "weights must be None where model is a module; load them into it first"
                )
            self.weights = "its own"
            self.prep = _preprocessing(None, preprocessing)
            self.device = _check_module(model, self.dtype, self.device)
            self.name = fingerprint.name_of(model)
            self.model = model.eval()
        if isinstance(model, str):  # its stem reads the bytes; a caller's module stays as it is
            set_input_norm(self.model, self.prep.mean, self.prep.std)
        self.classes = self._count_classes()
        self.top = min(top, self.classes)
        self.labels: list[str] | None
        if isinstance(labels, str | os.PathLike):
            self.labels = read_labels(os.fspath(labels), self.classes)
        elif labels is not None:
            self.labels = check_labels(list(labels), self.classes, "labels")
        else:
            self.labels = models.categories(weights, self.name)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Classify one batch.

        Args:
            batch: exactly one of ``bytes`` (object array of encoded image files), ``path`` (array
                of str), ``image`` (uint8 [N, H, W, 3], or an object array of uint8 [H, W, 3] of any
                sizes, RGB) and ``pixels`` (uint8 [N, crop, crop, 3], resized and cropped already).
                Whatever else it holds is handed through.

        Returns:
            What was handed through, ``path`` where it was given, and ``index`` int64 [N, top],
            ``prob`` float32 [N, top], best first, ``label`` object [N, top], "" where classes have
            no names, and ``error`` object [N], "" where there is none. A broken item has index -1,
            prob NaN and its error.

        Raises:
            ValueError: the batch is wrong as a whole.
        """
        given = [key for key in INPUTS if key in batch]
        if len(given) != 1:
            raise ValueError(
                f"batch must have exactly one of the keys {', '.join(INPUTS)}, "
                f"got {', '.join(batch) or 'none'}"
            )
        (kind,) = given
        if taken := [key for key in OUTPUTS if key in batch]:
            raise ValueError(
                f"batch must not have the key {taken[0]!r}, which is a result's; rename yours"
            )
        values = batch[kind]
        one = values.ndim == 0 if isinstance(values, np.ndarray) else not hasattr(values, "__len__")
        if one or isinstance(values, str | bytes | bytearray | os.PathLike):
            raise ValueError(
                f"{kind} must be an array or a list with one entry per image, got one "
                f"{type(values).__name__}; put it into a list"
            )
        predictions = self.classify(self._load(kind, values))
        n = len(predictions)
        index = np.full((n, self.top), -1, np.int64)
        prob = np.full((n, self.top), np.nan, np.float32)
        label = np.full((n, self.top), "", object)
        error = np.full(n, "", object)
        for i, prediction in enumerate(predictions):
            if prediction.error is not None:
                error[i] = prediction.error
                continue
            index[i], prob[i] = prediction.index, prediction.prob
            if self.labels is not None:
                label[i] = prediction.label
        kept = {key: value for key, value in batch.items() if key != kind or kind == "path"}
        return {**kept, "index": index, "prob": prob, "label": label, "error": error}

    def classify(self, items: Sequence[Loaded]) -> list[Prediction]:
        """Run the images that could be loaded as one batch.

        Returns:
            A prediction for each item; an error where there is no image or the model's output is
            NaN (fp16 overflows where the weights were not trained for it).
        """
        good = [item.pixels for item in items if item.pixels is not None]
        best = iter(zip(*self._run(good), strict=True) if good else ())
        predictions = []
        for item in items:
            error = item.error
            prob, index = ([], []) if item.pixels is None else next(best)
            if any(p != p for p in prob):
                prob, index, error = [], [], NO_NUMBER
            label = [None if self.labels is None else self.labels[i] for i in index]
            predictions.append(Prediction(item.path, index, label, prob, error))
        return predictions

    @property
    def threads(self) -> int:
        """How many threads decode."""
        return self._threads or torch.get_num_threads()

    @property
    def decoder(self) -> str:
        """What decodes image files."""
        return "Pillow" if torchvision_decoder() is None else "torchvision for JPEG, else Pillow"

    @property
    def fingerprint(self) -> dict[str, str]:
        """What results depend on: two predictors with equal ones give equal results.

        Where ``batch_invariant`` is False, results may also depend on the images beside them. It is
        computed anew at each use (0.1 s per 100 MB of weights), so that it follows the weights.
        """
        return fingerprint.of(self)

    @property
    def batch_invariant(self) -> bool:
        """True if no result depends on the images beside it, once ``set_batch_invariant`` is on.

        False for a module of another package, parts of which may be plain PyTorch.
        """
        own = isinstance(self.model, models.ResNet)
        return own and not {"plain", "reference"} & set(fingerprint.paths(self.model))

    def _load(self, kind: str, values: Any) -> list[Loaded]:
        """Bring the items of a batch into memory as the model takes them."""
        if kind == "pixels":
            return self._take_pixels(values)
        if kind == "path":
            return self._map(self._load_path, values)
        if kind == "bytes":
            if isinstance(values, np.ndarray) and values.dtype.kind == "S":
                raise ValueError(
                    "bytes must be an object array, because others cut zeros off the end of a "
                    "file, got dtype S; make it with numpy.array(files, dtype=object)"
                )
            return self._map(lambda data: load_bytes(data, self.prep), values)
        if isinstance(values, np.ndarray) and values.dtype != object:
            _check_images(values)
        return self._map(lambda image: load_array(image, self.prep), values)

    def _load_path(self, path: Any) -> Loaded:
        if isinstance(path, str | os.PathLike):
            return load(Found(os.fspath(path)), self.prep)
        return Loaded("", None, f"path must be a str, got {type(path).__name__}", {})

    def _take_pixels(self, values: Any) -> list[Loaded]:
        array = np.asarray(values)
        shape = (len(array), self.prep.crop, self.prep.crop, 3) if array.ndim else ()
        if array.dtype != np.uint8 or array.shape != shape:
            raise ValueError(
                f"pixels must be uint8 of shape [N, {self.prep.crop}, {self.prep.crop}, 3], "
                f"got {array.dtype} of shape {list(array.shape)}; use image for other sizes"
            )
        tensor = torch.from_numpy(np.array(array))  # a copy: the array may not be writable
        return [Loaded("", image, None, {}) for image in tensor]

    def _map(self, function: Any, values: Any) -> list[Loaded]:
        values = list(values)
        threads = min(self.threads, len(values))
        if threads <= 1:
            return [function(value) for value in values]
        with ThreadPoolExecutor(threads, thread_name_prefix="resnet_fused-load") as pool:
            return list(pool.map(function, values))

    @torch.inference_mode()
    def _run(self, pixels: Sequence[Tensor]) -> tuple[list[list[float]], list[list[int]]]:
        """Softmax probabilities and class indices, best first, of at least one image."""
        logits = self.logits(torch.stack(tuple(pixels)).to(self.device))
        best = logits.float().softmax(1).topk(self.top, dim=1)
        return best.values.tolist(), best.indices.tolist()

    @torch.inference_mode()
    def logits(self, pixels: Tensor) -> Tensor:
        """The model's output for images that are resized and cropped.

        Args:
            pixels: uint8, shape [N, crop, crop, 3], on the model's device. A model that was told
                this preprocessing's mean and std gets the bytes.

        Returns:
            What the model returns: logits, shape [N, classes].
        """
        norm = self.model.__dict__.get(NAME)
        with torch.autocast(self.device.type, enabled=False):  # the caller's: dtype is ours to say
            if norm is not None and norm == InputNorm(self.prep.mean, self.prep.std):
                return self.model(pixels.permute(0, 3, 1, 2))
            return self.model(normalise(pixels, self.prep, self.dtype))

    @torch.inference_mode()
    def _count_classes(self) -> int:
        """Ask the model, which also shows early that it can be run at all."""
        side = self.prep.crop
        black = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=self.device)
        logits = self.logits(black)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != 1:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model must return logits of shape [N, classes], got {got} for N = 1")
        return logits.shape[1]

    def _set_threads(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_threads()  # another process has its own setting


def _device(name: str | torch.device) -> torch.device:
    device = torch.device(name)
    if device.type not in DEVICES:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda needs a GPU, but torch.cuda.is_available() is False")
    return device


def _weights(weights: Any, model: str) -> Any:
    if model not in MODELS:
        raise ValueError(f"model must be a module or one of {', '.join(MODELS)}, got {model!r}")
    if weights is None:
        raise ValueError(
            "weights must be given, because an untrained model predicts nothing: a .pth or "
            ".safetensors file, or a name such as IMAGENET1K_V2; 'random' is accepted for speed "
            "tests"
        )
    return None if weights == "random" else resolve(weights, model)


def _preprocessing(weights: Any, asked: Preprocessing | Mapping[str, Any] | None) -> Preprocessing:
    if isinstance(asked, Preprocessing):
        return asked
    return preprocessing_of(weights, **(asked or {}))


def _build(name: str, weights: Any, progress: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        # "random" gives the same model every time. torch.manual_seed would seed every GPU, too.
        torch.default_generator.manual_seed(0)
        model: nn.Module = getattr(models, name)(weights=weights, progress=progress)
    return model.eval()


def _check_module(model: nn.Module, dtype: torch.dtype, device: torch.device) -> torch.device:
    """The device of a module's parameters, which must be as the caller says."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return device
    if parameter.dtype != dtype:
        raise ValueError(
            f"dtype must be that of the model's parameters ({parameter.dtype}), got {dtype}"
        )
    if parameter.device.type != device.type or device.index not in (None, parameter.device.index):
        raise ValueError(
            f"device must be that of the model's parameters ({parameter.device}), got {device}"
        )
    return parameter.device


def _check_images(array: np.ndarray) -> None:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise ValueError(
            "image must be uint8 of shape [N, H, W, 3] or an object array of uint8 [H, W, 3], "
            f"got {array.dtype} of shape {list(array.shape)}"
        )
