"""What language models learn from: whole episodes of text games, step by step as they were seen, said and paid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlopt.envs.text.game import Seen
from rlopt.policy.language import Answer


class TextTurn(NamedTuple):
    """One step."""

    seen: Seen
    """What was acted on."""
    answer: Answer
    reward: float = 0.0
    """Raw."""
    exact: str | None = None
    """The true state that was acted in, where it is asked for."""


class TextEpisode(NamedTuple):
    """One episode."""

    task: int | str
    kind: str
    group: int
    turns: list[TextTurn]
    complete: bool
    """Whether it came to its end; of others nobody knows the return."""
    success: bool

    @property
    def total(self) -> float:
        """Its return, raw."""
        return sum(turn.reward for turn in self.turns)

    def told(self, **more: Any) -> dict[str, Any]:
        """Return a line of ``trajectories.jsonl``."""
        turns = [
            {
                "seen": turn.seen.text,
                "said": turn.answer.text,
                "did": turn.answer.action,
                "valid": turn.answer.valid,
                "possible": turn.answer.action in turn.seen.admissible,
                "paid": turn.reward,
            }
            for turn in self.turns
        ]
        about = {"task": self.task, "kind": self.kind, "group": self.group, "goal": self.turns[0].seen.task}
        return {**more, **about, "return": self.total, "success": self.success, "turns": turns}


def differing(episodes: Sequence[TextEpisode]) -> list[int]:
    """Return the groups in which complete episodes have different returns."""
    returns: dict[int, set[float]] = {}
    for episode in episodes:
        if episode.complete:
            returns.setdefault(episode.group, set()).add(episode.total)
    return [group for group, found in sorted(returns.items()) if len(found) > 1]
