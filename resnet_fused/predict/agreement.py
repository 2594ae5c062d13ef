# SPDX-License-Identifier: BSD-3-Clause
"""The fused model beside plain PyTorch on a user's own images: accuracy, flips, errors of logits.

Every batch goes through the predictor as `predict` runs it, with images as bytes where its model
takes them; as floats through eager PyTorch with the same weights in the same dtype; and, if that is
below float32, through eager in float32 with the same rounded weights and images. The last tells
whose fault a difference is. Memory holds counts and two batches.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused import models
from resnet_fused.bench import subjects
from resnet_fused.fuse import unfuse
from resnet_fused.predict import sources
from resnet_fused.predict.loading import Loaded, load
from resnet_fused.predict.pipeline import ahead
from resnet_fused.predict.predictor import Predictor
from resnet_fused.predict.preprocess import normalise
from resnet_fused.predict.sources import Found

FUSED, EAGER, EXACT = "fused", "eager", "eager fp32"
SHOWN = 5


class Labelled(NamedTuple):
    """An image and the class it belongs to; None where that is not known."""

    found: Found
    target: int | None = None


@dataclass(frozen=True)
class ClassFolders:
    """A folder with one folder of images per class, as torchvision's ImageFolder reads it.

    Args:
        root: the folder.
        names: of the class folders, sorted.
        targets: class index of each.
        mapping: how the indices came about, for the user.
    """

    root: str
    names: list[str]
    targets: list[int]
    mapping: str

    def images(self) -> Iterator[Labelled]:
        """All images, class by class."""
        for name, target in zip(self.names, self.targets, strict=True):
            for found in sources.expand([os.path.join(self.root, name)]):
                yield Labelled(found, target)


def class_folders(root: str, classes: int, labels: Sequence[str] | None) -> ClassFolders:
    """Find out which class each folder in `root` is.

    If all names of folders are labels, that decides. Else there must be as many folders as classes,
    and their sorted names are taken in order.

    Args:
        root: the folder.
        classes: outputs of the model.
        labels: names of the classes, or None.

    Raises:
        ValueError: it is no folder, has no folders, or they fit neither labels nor classes.
    """
    if not os.path.isdir(root):
        raise ValueError(f"--data must be a folder with one folder of images per class, got {root}")
    with os.scandir(root) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise ValueError(
            f"--data {root} must hold one folder of images per class, but holds no folder; "
            "--images takes images without labels"
        )
    labels = labels or []
    times = Counter(labels)
    index = {label: i for i, label in enumerate(labels) if times[label] == 1}
    unknown = [name for name in names if name not in index]
    if not unknown:
        mapping = f"{len(names)} class folders, by the names of the {len(labels)} labels"
        return ClassFolders(root, names, [index[name] for name in names], mapping)
    shown = ", ".join(unknown[:SHOWN]) + (" ..." if len(unknown) > SHOWN else "")
    if len(unknown) < len(names):
        raise ValueError(
            f"--data {root} must have class folders that are all labels, or none of them: "
            f"{len(unknown)} of {len(names)} are no label, or one that two classes have: {shown}; "
            "rename them, or give other --labels"
        )
    if len(names) != classes:
        raise ValueError(
            f"--data {root} must have a folder for each of the model's {classes} classes, or "
            f"folders named like its labels, got {len(names)}: {shown}; "
            "--labels FILE names the classes as the folders are named (for ImageNet's synsets, "
            "too)"
        )
    mapping = f"{len(names)} class folders, in the order of their names"
    return ClassFolders(root, names, list(range(classes)), mapping)


class Rivals:
    """The three ways in which a predictor's model is computed.

    Args:
        predictor: has the fused model. One of this package's is traced for eager, with the same
            modules; another is copied and unfused.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        fused: Any = predictor.model
        if isinstance(fused, models.ResNet):
            eager: nn.Module = subjects.plain(fused)
        else:
            eager = unfuse(copy.deepcopy(fused))
        self.calls: dict[str, nn.Module] = {EAGER: eager}
        if predictor.dtype != torch.float32:
            self.calls[EXACT] = copy.deepcopy(eager).float()
        self.judge = EXACT if EXACT in self.calls else EAGER
        self.dtype = predictor.dtype

    @torch.inference_mode()
    def logits(self, pixels: Tensor) -> dict[str, Tensor]:
        """Run a batch as the predictor does, and as floats through the others.

        Args:
            pixels: uint8, shape [N, crop, crop, 3], on the predictor's device.

        Returns:
            float64 logits on the CPU, [N, classes], by name.
        """
        found = {FUSED: self.predictor.logits(pixels)}
        x = normalise(pixels, self.predictor.prep, self.dtype)
        for name, net in self.calls.items():
            found[name] = net(x.float() if name == EXACT else x)
        return {name: y.double().cpu() for name, y in found.items()}

    def bound(self, eager_error: float) -> float:
        """Give the relative error that the fused logits may have.

        Args:
            eager_error: of eager's in the same dtype; infinite where eager itself is the judge,
                which stands for what roundings explain.
        """
        return subjects.error_bound(eager_error, self.calls[EAGER], self.dtype)


@dataclass
class Tally:
    """What has been found so far.

    Args:
        rivals: who took part.
        names: of the classes, or None.
        images: that were classified.
        failed: that were not.
        flips: images whose best class is not eager's.
        same_top5: images whose five best classes are eager's, in any order.
        hits: images whose class is the best, and among the five best, by name.
        largest: largest logit of the judge.
        errors: largest difference of a logit from the judge's, by name.
        worst: the image where fused's is.
    """

    rivals: Rivals
    names: Sequence[str] | None = None
    images: int = 0
    failed: int = 0
    flips: int = 0
    same_top5: int = 0
    hits: dict[str, list[int]] = field(default_factory=dict)
    largest: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    worst: str = ""

    def relative(self, name: str) -> float:
        """Give the largest error of a logit relative to the largest logit."""
        return self.errors.get(name, 0.0) / max(self.largest, torch.finfo(torch.float64).tiny)

    @property
    def bound(self) -> float:
        """The bound on `relative(FUSED)`."""
        judged = self.rivals.judge != EAGER
        return self.rivals.bound(self.relative(EAGER) if judged else math.inf)

    @property
    def ok(self) -> bool:
        """Whether the fused logits are within the bound."""
        return self.relative(FUSED) <= self.bound

    def add(self, path: str, target: int | None, logits: dict[str, Tensor]) -> str:
        """Count one image whose logits, [classes] each, are finite but for fused's.

        Returns:
            What to say of it; empty if nothing.
        """
        self.images += 1
        judge = logits[self.rivals.judge]
        self.largest = max(self.largest, judge.abs().max().item())
        for name, y in logits.items():
            error = (y - judge).abs().max().item()
            error = error if math.isfinite(error) else math.inf
            if name == FUSED and (error > self.errors.get(name, -1.0)):
                self.worst = path
            self.errors[name] = max(error, self.errors.get(name, 0.0))
        top = {name: y.topk(min(5, len(y))).indices.tolist() for name, y in logits.items()}
        finite = bool(torch.isfinite(logits[FUSED]).all())
        best = {name: int(y.argmax()) for name, y in logits.items()}
        if target is not None:
            for name in logits:
                hits = self.hits.setdefault(name, [0, 0])
                hits[0] += best[name] == target and (name != FUSED or finite)
                hits[1] += target in top[name] and (name != FUSED or finite)
        if not finite:
            self.flips += 1
            return f"flip   {path}: fused has logits that are no finite numbers, eager has not"
        self.same_top5 += set(top[FUSED]) == set(top[EAGER])
        return self._flip(path, best[EAGER], best[FUSED], logits)

    def _flip(self, path: str, old: int, new: int, logits: dict[str, Tensor]) -> str:
        if old == new:
            return ""
        self.flips += 1

        def margin(name: str) -> float:
            return (logits[name][old] - logits[name][new]).item()

        text = f"flip   {path}: {self._class(old)} -> {self._class(new)}; eager has the first "
        text += f"ahead by {margin(EAGER):.3g}, fused the second by {-margin(FUSED):.3g}"
        if EXACT in logits:
            side = "first" if margin(EXACT) > 0 else "second"
            text += f"; float32 has the {side} ahead by {abs(margin(EXACT)):.3g}"
        return text

    def _class(self, index: int) -> str:
        return str(index) if self.names is None else f"{index} {self.names[index]}"

    def lines(self) -> Iterator[str]:
        """Give the summary."""
        yield f"{self.images:,} images compared, {self.failed:,} failed"
        if not self.images:
            return
        dtype = str(self.rivals.dtype).removeprefix("torch.")
        if self.hits:
            yield from self._accuracy(dtype)
        share = 100 / self.images
        yield (
            f"agreement with eager {dtype}: best class {share * (self.images - self.flips):.2f} % "
            f"({self.flips:,} flips), five best in any order {share * self.same_top5:.2f} %"
        )
        judge = "eager" if self.rivals.judge == EAGER else "eager in float32"
        yield f"largest error of a logit, against {judge}, whose largest is {self.largest:.4g}:"
        names = [name for name in (EAGER, FUSED) if name != self.rivals.judge]
        for name in names:
            text = f"  {name}  {self.errors[name]:.2e}, relative {self.relative(name):.1e}"
            if name == FUSED:
                text += f", bound {self.bound:.1e}: {'ok' if self.ok else 'FAIL'} ({self.worst})"
            yield text

    def _accuracy(self, dtype: str) -> Iterator[str]:
        share = {n: [100 * hits / self.images for hits in self.hits[n]] for n in self.hits}
        titles = {EAGER: f"eager {dtype}", FUSED: f"fused {dtype}", EXACT: "eager float32"}
        width = max(map(len, titles.values()))
        yield f"{'':{width}}    top-1    top-5"
        for name in (EAGER, FUSED, EXACT):
            if name in share:
                yield f"{titles[name]:{width}}  {share[name][0]:6.2f} % {share[name][1]:6.2f} %"
        change = [new - old for old, new in zip(share[EAGER], share[FUSED], strict=True)]
        yield f"{'fused - eager':{width}}  {change[0]:+6.2f}   {change[1]:+6.2f}"


def run(
    images: Iterable[Labelled],
    predictor: Predictor,
    *,
    batch_size: int,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Compare the fused model with eager, image by image.

    Args:
        images: to compare on.
        predictor: the fused model and its preprocessing.
        batch_size: images per batch; failed ones are left out of theirs.
        say: told of every flip and every failed image.
        progress: called after every batch.
    """
    tally = Tally(Rivals(predictor), predictor.labels)

    def load_one(item: Labelled) -> tuple[Loaded, int | None]:
        return load(item.found, predictor.prep), item.target

    threads = predictor.threads
    with closing(ahead(load_one, images, threads, 2 * batch_size + threads)) as loaded:
        while batch := list(itertools.islice(loaded, batch_size)):
            for text in _compare(batch, predictor, tally):
                say(text)
            progress(tally)
    return tally


def _compare(
    batch: Sequence[tuple[Loaded, int | None]], predictor: Predictor, tally: Tally
) -> Iterator[str]:
    """Run the images that could be loaded, and count all; yields what to say."""
    good = [item.pixels for item, _ in batch if item.pixels is not None]
    logits: dict[str, Tensor] = {}
    if good:
        pixels = torch.stack(good).to(predictor.device)
        logits = tally.rivals.logits(pixels)
    row = 0
    for item, target in batch:
        error = item.error
        if item.pixels is not None:
            own = {name: y[row] for name, y in logits.items()}
            row += 1
            if all(bool(torch.isfinite(own[name]).all()) for name in own if name != FUSED):
                text = tally.add(item.path, target, own)
                if text:
                    yield text
                continue
            error = "eager has logits that are no finite numbers; try --dtype fp32"
        tally.failed += 1
        yield f"failed {item.path}: {error}"
