# SPDX-License-Identifier: BSD-3-Clause
"""The part of `resnet-fused check` that takes images: its arguments and its run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from tqdm import tqdm

from resnet_fused.cli import predict
from resnet_fused.cli.arguments import positive, reason
from resnet_fused.predict import agreement, pipeline, sources
from resnet_fused.predict.agreement import Labelled
from resnet_fused.predict.predictor import DTYPES, Predictor
from resnet_fused.predict.preprocess import FIELDS

ONLY_HERE = ("weights", "labels", "batch_size", *FIELDS)
OK, WRONG, SOME_FAILED = 0, 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that only images have."""
    add = parser.add_argument_group("images", "compare fused with eager on them").add_argument
    add("--data", metavar="DIR", help="one folder of images per class: accuracy, too")
    add("--images", nargs="+", metavar="SOURCE", help="as predict takes them: without labels")
    add("--weights", metavar="FILE|NAME", help="as predict takes them")
    add("--labels", metavar="FILE", help="class names, as predict takes them")
    add("--batch-size", type=positive, metavar="N", help="as of predict")
    predict.add_preprocessing(parser)


def wanted(args: argparse.Namespace) -> bool:
    """Whether images were given."""
    return args.data is not None or args.images is not None


def why_not(args: argparse.Namespace) -> str:
    """Say which option does nothing beside the others; empty if none."""
    if not wanted(args):
        given = [name for name in ONLY_HERE if getattr(args, name) is not None]
        return f"--{given[0].replace('_', '-')} needs --data or --images" if given else ""
    if args.data is not None and args.images is not None:
        return "--data and --images are two checks: give one of them"
    if args.op:
        return "--op does not go with --data and --images, which run a whole model"
    if len(args.model or []) > 1 or len(args.dtype or []) > 1:
        return "--model and --dtype must be given at most once with --data and --images"
    if args.dtype and args.dtype[0] not in DTYPES:
        return f"--dtype must be one of {', '.join(DTYPES)} with images, got {args.dtype[0]}"
    return ""


def run(args: argparse.Namespace) -> int:
    """Compare on the images.

    Returns:
        1 if the fused logits are too far off or an argument is wrong, else 2 if images failed.
    """
    predict.ignore_pillow()
    images: Iterable[Labelled]
    try:
        if args.images is not None:
            sources.check(args.images)
        predictor = _predictor(args)
        if args.data is None:
            images = map(Labelled, sources.expand(args.images))
        else:
            folders = agreement.class_folders(args.data, predictor.classes, predictor.labels)
            print(f"classes: {folders.mapping}", file=sys.stderr)
            images = folders.images()
        with tqdm(unit="img", disable=not sys.stderr.isatty()) as bar:
            tally = agreement.run(
                images,
                predictor,
                batch_size=args.batch_size or pipeline.BATCH_SIZE[predictor.device.type],
                say=lambda text: tqdm.write(text, file=sys.stdout),
                progress=lambda tally: bar.update(tally.images + tally.failed - bar.n),
            )
    except BrokenPipeError:
        raise  # main() knows what to do
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as problem:
        print(f"resnet-fused check: error: {reason(problem)}", file=sys.stderr)
        return WRONG
    for line in tally.lines():
        print(line)
    if not tally.images and not tally.failed:
        print("resnet-fused check: error: there was no image to compare", file=sys.stderr)
        return WRONG
    if not tally.ok:
        return WRONG
    return SOME_FAILED if tally.failed else OK


def _predictor(args: argparse.Namespace) -> Predictor:
    """Load the model and say on stderr what will be used."""
    predictor = Predictor(
        (args.model or ["resnet50"])[0],
        args.weights,
        preprocessing={name: getattr(args, name) for name in FIELDS},
        dtype=(args.dtype or ["fp32"])[0],
        device=args.device,
        labels=args.labels,
        progress=True,
    )
    predict.announce(predictor)
    return predictor
