# SPDX-License-Identifier: BSD-3-Clause
"""What setup.py needs to compile resnet_fused's library; never installed."""
