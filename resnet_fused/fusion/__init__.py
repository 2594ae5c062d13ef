# SPDX-License-Identifier: BSD-3-Clause
"""How fuse() works, in the order in which it happens.

units      which modules are looked at on their own, and which count as one operation
standins   what a forward sees of its module while it is read
tracing    reads the forward of one module into a graph
effects    which values of the graph share memory, and what changes it
nodes      what one operation of the graph is
matching   the groups of operations that one fused call can replace
plan       the new forward, and what must hold for it to run
steps      the calls that the new forward makes
"""
