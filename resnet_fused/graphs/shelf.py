# SPDX-License-Identifier: BSD-3-Clause
"""Which graphs to capture and which to keep. Pure policy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

G = TypeVar("G")

# A capture costs some hundred calls. A graph that was replayed as often has paid for itself; the
# shape of one that was dropped sooner waits twice as long for the next.
PAID = 1000
_LONGEST_WAIT = 1024
_CANDIDATES = 16  # remembered for every graph kept


@dataclass
class _Candidate:
    """A shape without a graph.

    Args:
        calls: plain calls since it was last captured.
        setbacks: how often in a row its graph was dropped, or none could be made yet.
        refused: it is never captured.
    """

    calls: int = 0
    setbacks: int = 0
    refused: bool = False


@dataclass
class _Kept(Generic[G]):
    graph: G
    setbacks: int
    replays: int = 0


class Shelf(Generic[G]):
    """Graphs by key, the least recently used first to go.

    Args:
        most: the largest number of graphs.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: OrderedDict[Hashable, _Kept[G]] = OrderedDict()
        self._candidates: OrderedDict[Hashable, _Candidate] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def take(self, key: Hashable) -> G | None:
        """The graph for a call that is about to be replayed, if there is one."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        self._kept.move_to_end(key)
        kept.replays += 1
        return kept.graph

    def any(self) -> G | None:
        """Some graph."""
        return next((kept.graph for kept in self._kept.values()), None)

    def due(self, key: Hashable) -> bool:
        """Count a plain call; true if the graph is to be captured behind it.

        Never behind the first one: many shapes come only once.
        """
        candidate = self._candidate(key)
        candidate.calls += 1
        wait = min(2**candidate.setbacks, _LONGEST_WAIT)
        return not candidate.refused and key not in self._kept and candidate.calls > wait

    def defer(self, key: Hashable) -> None:
        """No graph can be made now; try again after more calls."""
        candidate = self._candidate(key)
        candidate.calls, candidate.setbacks = 0, candidate.setbacks + 1

    def refuse(self, key: Hashable) -> None:
        """No graph can be made, ever."""
        self._candidate(key).refused = True

    def make_room(self) -> list[G]:
        """Take off what must go before another graph is put."""
        gone = []
        while len(self._kept) >= self.most:
            gone.append(self._drop(next(iter(self._kept))))
        return gone

    def put(self, key: Hashable, graph: G) -> None:
        """Keep a new graph; there must be room."""
        setbacks = self._candidates.pop(key, _Candidate()).setbacks
        self._kept[key] = _Kept(graph, setbacks)

    def clear(self) -> list[G]:
        """Take everything off, and what was refused may be tried again."""
        for candidate in self._candidates.values():
            candidate.refused = False
        return [self._drop(key) for key in list(self._kept)]

    def _drop(self, key: Hashable) -> G:
        kept = self._kept.pop(key)
        paid = kept.replays >= PAID
        self._candidate(key).setbacks = 0 if paid else kept.setbacks + 1
        return kept.graph

    def _candidate(self, key: Hashable) -> _Candidate:
        candidate = self._candidates.setdefault(key, _Candidate())
        self._candidates.move_to_end(key)
        while len(self._candidates) > _CANDIDATES * self.most:
            self._candidates.popitem(last=False)
        return candidate
