# SPDX-License-Identifier: BSD-3-Clause
"""``resnet-fused predict``: its arguments, and the parts of resnet_fused.predict put together."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

from PIL import Image
from tqdm import tqdm

from resnet_fused.models.weights import resolve
from resnet_fused.predict import pipeline, sources, writer
from resnet_fused.predict.predictor import DTYPES, MODELS, Predictor
from resnet_fused.predict.preprocess import INTERPOLATIONS, preprocessing_of

PREPROCESSING = ("resize", "crop", "interpolation", "mean", "std")
BATCH_SIZE = {"cpu": 32, "cuda": 256}
OK, STOPPED, SOME_FAILED = 0, 1, 2

DESCRIPTION = f"""\
Classify images with a ResNet, run through the fused kernels.

SOURCE is a file, a folder, a glob in quotes, @list.txt (a text file with one path per line), or
- (paths on stdin). A folder is searched through all its subfolders for files that end in
{" ".join(sources.SUFFIXES)}.
Put ./ before a file name that begins with @ or -.
"""

EPILOG = """\
output:
  CSV, one row per image and rank, with the columns
    filename,index,label,prob,rank,error
  or, for --output NAME.jsonl, one JSON object per image, where index, label and prob are lists.
  Rows come in the order of the sources, by name within a folder. An image that cannot be read has
  one row with only filename and error. label is empty where class names are not known.
  A file is written under a temporary name (ending in .part) and renamed when it is complete.

images:
  The first frame, upright according to EXIF, as 8-bit RGB without alpha; resized and cropped in
  uint8, normalised last. The values used are those of the weights where they name some, and are
  printed on stderr with everything else that is not a prediction.

exit code:
  0 every image classified    1 wrong arguments, or stopped early
  2 done, some images failed  130 interrupted

examples:
  resnet-fused predict photos --weights IMAGENET1K_V2 --output preds.csv
  resnet-fused predict photos --weights trained.safetensors --labels classes.txt --dtype bf16
  find . -name '*.png' | resnet-fused predict - --weights trained.pth --top 1 > preds.csv
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to what ``ArgumentParser.add_subparsers`` returned."""
    parser = subparsers.add_parser(
        "predict",
        help="classify images with a ResNet",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="file, folder, glob, @list.txt or -")
    add("--model", default="resnet50", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    add(
        "--weights",
        metavar="FILE|NAME",
        help="a .pth or .safetensors file, or the name of torchvision weights such as "
        "IMAGENET1K_V2; 'random' for an untrained model (speed tests)",
    )
    add(
        "--labels",
        metavar="FILE",
        help="class names: .json with a list or an object from index to name, else one name per "
        "line; default: those of the weights",
    )
    add("--dtype", default="fp32", choices=DTYPES, help="of model and input (default: fp32)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add("--batch-size", type=_positive, metavar="N", help="default: 32 on a CPU, 256 on a GPU")
    add(
        "--threads",
        type=_positive,
        metavar="N",
        help="that decode, and torch's on a CPU (default: as many as torch uses)",
    )
    add(
        "--top",
        "--topk",
        type=_positive,
        default=5,
        metavar="K",
        help="classes per image, at most all (default: 5)",
    )
    add("--output", metavar="FILE", help="ending in .csv or .jsonl (default: CSV on stdout)")
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("--max-errors", type=int, metavar="N", help="stop when more than N images have failed")
    add("--quiet", action="store_true", help="only errors on stderr")
    image = parser.add_argument_group("preprocessing", "instead of what the weights name")
    image.add_argument("--resize", type=_positive, metavar="N", help="length of the shorter side")
    image.add_argument("--crop", type=_positive, metavar="N", help="side of the centre crop")
    image.add_argument("--interpolation", choices=INTERPOLATIONS)
    image.add_argument("--mean", type=_numbers, metavar="R,G,B", help="of values in [0, 1]")
    image.add_argument("--std", type=_numbers, metavar="R,G,B", help="of values in [0, 1]")


def run(args: argparse.Namespace) -> int:
    """Classify the images; returns the exit code."""
    # What Pillow warns about is either harmless or becomes an error in the image's row.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    try:
        sources.check(args.sources)
        writer.check(args.output, args.overwrite)
        predictor = _prepare(args)
        out = writer.Writer(args.output)
    except (OSError, RuntimeError, TypeError, ValueError) as problem:
        return _fail(str(problem))
    show = not args.quiet and sys.stderr.isatty()
    total = sources.count(args.sources) if show else None
    bar = tqdm(total=total, unit="img", disable=not show)
    try:
        tally = pipeline.run(
            sources.expand(args.sources),
            predictor,
            out,
            batch_size=args.batch_size or BATCH_SIZE[predictor.device.type],
            max_errors=args.max_errors,
            progress=lambda tally: _show(bar, tally),
        )
        out.finish()
    except BaseException as problem:
        bar.close()
        part = out.abandon()
        kept = f"; the rows so far are in {part}" if part else ""
        if isinstance(problem, pipeline.TooManyErrors | OSError) and not isinstance(
            problem, BrokenPipeError
        ):
            return _fail(f"stopped: {problem}{kept}")
        if kept:
            print(f"resnet-fused predict: stopped{kept}", file=sys.stderr)
        raise
    bar.close()
    if not args.quiet:
        print(tally, file=sys.stderr)
    return SOME_FAILED if tally.failed else OK


def _prepare(args: argparse.Namespace) -> Predictor:
    """Load the model and say on stderr what will be used."""
    changes = {name: getattr(args, name) for name in PREPROCESSING}
    prep = None
    if any(value is not None for value in changes.values()):
        named = args.weights not in (None, "random")
        weights = resolve(args.weights, args.model) if named else None
        prep = preprocessing_of(weights, **changes)
    predictor = Predictor(
        args.model,
        args.weights,
        preprocessing=prep,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        top=args.top,
        labels=args.labels,
        progress=not args.quiet,
    )
    if not args.quiet:
        _announce(args, predictor)
    return predictor


def _announce(args: argparse.Namespace, predictor: Predictor) -> None:
    names = predictor.labels
    labels = "none known; --labels FILE gives them" if names is None else f"{len(names)} names"
    print(
        f"model: {args.model}, weights {args.weights}, {args.dtype} on {args.device}\n"
        f"preprocessing: {predictor.prep}\n"
        f"decoder: {predictor.decoder}\n"
        f"labels: {labels}",
        file=sys.stderr,
    )


def _show(bar: Any, tally: pipeline.Tally) -> None:
    bar.set_postfix(failed=tally.failed, refresh=False)
    bar.update(tally.images - bar.n)


def _fail(message: str) -> int:
    print(f"resnet-fused predict: error: {message}", file=sys.stderr)
    return STOPPED


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return value


def _numbers(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"must be three numbers such as 0.5,0.5,0.5, got {text}")
    return values
