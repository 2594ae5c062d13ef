# SPDX-License-Identifier: BSD-3-Clause
"""``resnet-fused predict``: its arguments, and the parts of resnet_fused.predict put together."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

from PIL import Image
from tqdm import tqdm

from resnet_fused.cli import job
from resnet_fused.cli.arguments import count, lacks_memory, positive, reason, three_numbers
from resnet_fused.predict import pipeline, sources, writer
from resnet_fused.predict.predictor import DTYPES, MODELS, Predictor
from resnet_fused.predict.preprocess import FIELDS, INTERPOLATIONS

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

  An --output that ends in / or is a folder gets Parquet files part-00000.parquet, ..., one row per
  image as in JSON lines, and a manifest of all images. Killed at any moment, the same command with
  --resume goes on behind the complete parts; the parts come out as if nothing had happened. The
  model, its options and the images must be the same; without SOURCE they are the manifest's.
  Several processes share a job: torchrun --standalone --nproc-per-node=gpu -m resnet_fused predict
  ... --resume; each takes every WORLD_SIZE-th part from RANK on. Needs
  pip install 'resnet_fused[parquet]'.
  With --engine ray (pip install 'resnet_fused[ray]') the actors of a Ray cluster share it: one per
  GPU, or one per --threads CPUs.

images:
  The first frame, upright according to EXIF, as 8-bit RGB without alpha; resized and cropped in
  uint8, normalised last. The values used are those of the weights where they name some, and are
  printed on stderr with everything else that is not a prediction.

exit code:
  0 every image classified    1 wrong arguments, or stopped early
  2 done, some images failed  130 interrupted

examples:
  resnet-fused predict photos --weights IMAGENET1K_V2 --output preds.csv
  resnet-fused predict photos --weights hf-hub:timm/resnet50.a1_in1k --top 1 > preds.csv
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
    add("sources", nargs="*", metavar="SOURCE", help="file, folder, glob, @list.txt or -")
    add("--model", default="resnet50", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    add(
        "--weights",
        metavar="FILE|NAME",
        help="a .pth or .safetensors file, the name of torchvision weights such as "
        "IMAGENET1K_V2, or hf-hub:org/name[@revision]; 'random' for an untrained model (speed "
        "tests)",
    )
    add(
        "--labels",
        metavar="FILE",
        help="class names: .json with a list or an object from index to name, else one name per "
        "line; default: those of the weights",
    )
    add("--dtype", default="fp32", choices=DTYPES, help="of model and input (default: fp32)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add("--batch-size", type=positive, metavar="N", help="default: 32 on a CPU, 256 on a GPU")
    add(
        "--threads",
        type=positive,
        metavar="N",
        help="that decode, and torch's on a CPU (default: as many as torch uses)",
    )
    add(
        "--top",
        "--topk",
        type=positive,
        default=5,
        metavar="K",
        help="classes per image, at most all (default: 5)",
    )
    add(
        "--output",
        metavar="FILE|FOLDER",
        help="a file ending in .csv or .jsonl, or a folder/ for a job that can be resumed "
        "(default: CSV on stdout)",
    )
    add("--resume", action="store_true", help="go on with the job in the folder, or begin it")
    add("--unit", type=positive, metavar="N", help="images per part of a job (default: 1000)")
    add(
        "--engine",
        default="local",
        choices=("local", "ray"),
        help="ray: parts are made by a Ray cluster's nodes, which see the same files (default: "
        "local)",
    )
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("--max-errors", type=count, metavar="N", help="stop when more than N images have failed")
    add("--quiet", action="store_true", help="only errors on stderr")
    add_preprocessing(parser)


def add_preprocessing(parser: argparse.ArgumentParser) -> None:
    """Add the options that replace what the weights name."""
    add = parser.add_argument_group(
        "preprocessing", "instead of what the weights name"
    ).add_argument
    add("--resize", type=positive, metavar="N", help="length of the shorter side")
    add("--crop", type=positive, metavar="N", help="side of the centre crop")
    add("--interpolation", choices=INTERPOLATIONS)
    add("--mean", type=three_numbers, metavar="R,G,B", help="of values in [0, 1]")
    add("--std", type=three_numbers, metavar="R,G,B", help="of values in [0, 1]")


def run(args: argparse.Namespace) -> int:
    """Classify the images; returns the exit code."""
    ignore_pillow()
    try:
        where = job.place()
        folder = job.folder_of(args, where)
        if args.sources or not args.resume:
            sources.check(args.sources)
        if folder is None:
            writer.check(args.output, args.overwrite)
        predictor = _prepare(args, where)
        out = writer.Writer(args.output) if folder is None else None
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as problem:
        return _fail(str(problem))
    if out is None:
        return _run_job(args, str(folder), predictor, where)
    show = not args.quiet and sys.stderr.isatty()
    bar = tqdm(unit="img", disable=not show)
    try:
        bar.total = sources.count(args.sources) if show else None
        tally = pipeline.run(
            sources.expand(args.sources),
            predictor,
            out,
            batch_size=args.batch_size or pipeline.BATCH_SIZE[predictor.device.type],
            max_errors=args.max_errors,
            progress=lambda tally: _show(bar, tally),
        )
        out.finish()
    except BaseException as problem:
        bar.close()
        part = out.abandon()
        kept = f"; the rows so far are in {part}" if part else ""
        expected = isinstance(problem, pipeline.TooManyErrors | OSError) or lacks_memory(problem)
        if expected and not isinstance(problem, BrokenPipeError):
            return _fail(f"stopped: {reason(problem)}{kept}")
        if kept:
            print(f"resnet-fused predict: stopped{kept}", file=sys.stderr)
        raise
    bar.close()
    if not args.quiet:
        print(tally, file=sys.stderr)
    return SOME_FAILED if tally.failed else OK


def ignore_pillow() -> None:
    """What Pillow warns about is either harmless or becomes an error of the image."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _run_job(args: argparse.Namespace, folder: str, predictor: Predictor, where: job.Place) -> int:
    try:
        failed = job.run(args, folder, predictor, where)
    except (OSError, RuntimeError, ValueError, pipeline.TooManyErrors) as problem:
        if isinstance(problem, RuntimeError) and not lacks_memory(problem):
            raise  # a mistake in the model
        who = "" if where.world == 1 else f"rank {where.rank}: "
        return _fail(f"{who}{reason(problem)}")
    return SOME_FAILED if failed else OK


def _prepare(args: argparse.Namespace, where: job.Place) -> Predictor:
    """Load the model and say on stderr what will be used."""
    predictor = Predictor(
        args.model,
        args.weights,
        preprocessing={name: getattr(args, name) for name in FIELDS},
        dtype=args.dtype,
        device=where.device(args.device),
        threads=where.threads(args.threads),
        top=args.top,
        labels=args.labels,
        progress=not args.quiet and where.rank == 0,
    )
    if not args.quiet and where.rank == 0:
        announce(predictor)
    return predictor


def announce(predictor: Predictor) -> None:
    """Say on stderr what will be used."""
    names = predictor.labels
    dtype = next(name for name, dtype in DTYPES.items() if dtype == predictor.dtype)
    labels = "none known; --labels FILE gives them" if names is None else f"{len(names)} names"
    print(
        f"model: {predictor.name}, weights {predictor.weights}, {dtype} on {predictor.device}\n"
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
