# SPDX-License-Identifier: BSD-3-Clause
"""Entry point of ``resnet-fused``: picks the subcommand and imports only that one."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from resnet_fused import __version__

# Name and one-line summary of each module of this package that offers
# ``add_parser(subparsers)`` and ``run(args) -> int``.
COMMANDS = {
    "predict": "classify images with a ResNet",
    "bench": "compare the fused models with eager PyTorch on this machine",
    "profile": "show where a model's time goes, each fused call beside what it replaces",
    "info": "show versions, the loaded library and what this machine supports",
    "check": "compare ops, models, or your images, with plain PyTorch on this machine",
    "compare": "say what differs between two result files",
}
WRONG_USE = 1  # not argparse's 2, which means "done, but some images failed"
INTERRUPTED = 130
PIPE_CLOSED = 141


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose exit code for wrong arguments is WRONG_USE."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(WRONG_USE, f"{self.prog}: error: {message}\n")


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """Make the parser with the arguments of ``command`` and the names of the others.

    Args:
        command: subcommand whose module is imported; None or an unknown one imports none.
    """
    parser = Parser(
        prog="resnet-fused",
        description="ResNet inference in PyTorch through fused kernels.",
        epilog="'resnet-fused COMMAND --help' shows the arguments of a command.",
    )
    parser.add_argument("--version", action="version", version=f"resnet-fused {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        if name == command:
            importlib.import_module(f"resnet_fused.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes the process's.

    Returns:
        The exit code: the command's own, 130 after Ctrl-C, 141 when the reader of stdout has gone.
    """
    if sys.stderr is None:  # closed, as by some daemons; else the next file would get its number
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # a file name that is not UTF-8 keeps its bytes
            stream.reconfigure(errors="surrogateescape")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(newline="\n")  # a carriage return may be part of a name
    arguments = sys.argv[1:] if argv is None else list(argv)
    command = next((word for word in arguments if not word.startswith("-")), None)
    try:
        args = build_parser(command).parse_args(arguments)
        code: int = importlib.import_module(f"resnet_fused.cli.{args.command}").run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("resnet-fused: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # What is still buffered has no reader; without this Python complains while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    return code


if __name__ == "__main__":
    sys.exit(main())
