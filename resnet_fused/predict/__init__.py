# SPDX-License-Identifier: BSD-3-Clause
"""Classifying image files in bulk: find, decode, preprocess, run the model, write rows."""
