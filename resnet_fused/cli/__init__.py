# SPDX-License-Identifier: BSD-3-Clause
"""The command ``resnet-fused``; each subcommand is one module."""
