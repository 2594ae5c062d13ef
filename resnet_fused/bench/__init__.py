# SPDX-License-Identifier: BSD-3-Clause
"""What `resnet-fused bench`, `resnet-fused check` and benchmarks/ share: models, rivals, rows."""
