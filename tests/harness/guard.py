# SPDX-License-Identifier: BSD-3-Clause
"""Tensors whose memory ends or begins at a page that must not be touched."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE
_NONE, _READ_WRITE, _PRIVATE_ANONYMOUS = 0, 3, 0x22


def guarded(t: Tensor, end: bool) -> Tensor:
    """A copy of dense ``t``, same strides, with a forbidden page right behind it or right before.

    Reading or writing one byte beyond ends the process by a signal, so call this in a subprocess.
    The memory is never freed.
    """
    size = t.numel() * t.element_size()
    pages = (size + PAGE - 1) // PAGE or 1
    total = (pages + 2) * PAGE
    base = _libc.mmap(None, total, _READ_WRITE, _PRIVATE_ANONYMOUS, -1, 0)
    for page in (base, base + (pages + 1) * PAGE):
        if _libc.mprotect(page, PAGE, _NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    start = base + PAGE + (pages * PAGE - size if end else 0)
    memory = (ctypes.c_char * max(size, 1)).from_address(start)
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel()) if size else t.flatten()
    copy = flat.as_strided(t.shape, t.stride())
    return copy.copy_(t)
