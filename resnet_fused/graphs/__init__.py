# SPDX-License-Identifier: BSD-3-Clause
"""What ``graphed`` is made of: which calls may share a graph (``calls``), whether the model is the
same (``snapshot``), which graphs to make and keep (``shelf``), and CUDA (``capture``).
"""
