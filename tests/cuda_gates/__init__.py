# SPDX-License-Identifier: BSD-3-Clause
"""What can be said of the CUDA kernels without a GPU: ptxas's report and the machine code."""
