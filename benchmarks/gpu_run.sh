#!/bin/sh
# SPDX-License-Identifier: BSD-3-Clause
# Builds, tests and measures on a GPU machine, in under 9 minutes: `gpu_run.sh`, or `gpu_run.sh build
# test` for some sections. PYTHON names the interpreter that has torch. See gpu_run.py --help.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_run.py" "$@"
