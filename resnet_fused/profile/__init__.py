# SPDX-License-Identifier: BSD-3-Clause
"""Profile a model layer by layer: each fused call beside the eager layers that it replaces."""

from resnet_fused.profile.measure import profile
from resnet_fused.profile.result import Layer, Profile, Row

__all__ = ["Layer", "Profile", "Row", "profile"]
