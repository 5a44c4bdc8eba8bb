"""Nodes on which work after work is lost while it is done elsewhere, and where a lost one goes next."""

from __future__ import annotations

from collections import Counter, defaultdict

IN_A_ROW = 3


class Suspects:
    """What became of works on each node. Those `set_aside` are given no more of them.

    One work that is lost wherever it goes is not a node's fault: its losses count once a node.
    """

    def __init__(self) -> None:
        self.set_aside: set[str] = set()
        self._lost: defaultdict[str, list[str]] = defaultdict(list)
        self._where_lost: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._good: set[str] = set()

    def avoided(self, work: str, *, others_are_full: bool = False) -> set[str]:
        """Nodes that a work should not go to, where there are others.

        While these are full, it may go once more to one that lost it once.
        """
        lost = self._where_lost.get(work, Counter())
        return self.set_aside | {n for n, times in lost.items() if times > others_are_full}

    def done(self, node: str, work: str) -> None:
        """A work came to its end there."""
        self._good.add(node)
        self._where_lost.pop(work, None)
        self._lost.pop(node, None)

    def lost(self, node: str, work: str) -> bool:
        """A worker died, hung or fell silent there; whether the node is set aside for that."""
        self._where_lost[work][node] += 1
        lost = self._lost[node]
        if work not in lost:
            lost.append(work)
        blameless = self._good - self._lost.keys() - self.set_aside
        if len(lost) < IN_A_ROW or self._lost.keys() != {node} or not blameless:
            return False
        del self._lost[node]
        self.set_aside.add(node)
        return True
