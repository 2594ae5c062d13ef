# SPDX-License-Identifier: BSD-3-Clause
"""One self-contained picture of a profile: a roofline, and a before/after ribbon."""

from resnet_fused.profile.svg.picture import picture

__all__ = ["picture"]
