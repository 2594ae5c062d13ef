# SPDX-License-Identifier: BSD-3-Clause
"""What every op is held against: exact values, derived bounds, guard pages, poisoned memory."""
