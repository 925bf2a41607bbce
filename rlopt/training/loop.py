"""What the trainer drives. A new kind of agent gets a loop, never a special case in the trainer."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from rlopt.policy import Policy
from rlopt.types import Episode, State


class Progress(NamedTuple):
    """What one ``advance`` did."""

    episodes: list[Episode]
    """Training episodes that ended (a solver has none)."""
    metrics: dict[str, tuple[Tensor, int]]
    """Sums of 0-d tensors and how many each sums; empty where nothing was learnt."""
    updates: int
    """Updates applied."""
    env_seconds: float
    """Wall-clock time spent in environments, acting and storing."""
    learn_seconds: float
    """Wall-clock time spent drawing batches and updating."""


class RowLog(Protocol):
    """Data that only grows at its end, such as a replay buffer: saved as append-only segments."""

    capacity_rows: int
    """Rows kept; row r lies at slot ``r % capacity_rows``."""
    rows_written: int
    """Rows ever written."""

    def read_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Rows ``start`` … ``stop-1``, each tensor (stop-start, …), on the CPU."""
        ...

    def write_rows(self, start: int, rows: dict[str, Tensor]) -> None:
        """Put back rows read by ``read_rows``; ``rows_written`` itself is restored by ``load_state_dict``."""
        ...


class Loop(Protocol):
    """One way of turning computation into a policy."""

    unit: str
    """What ``step`` counts: ``environment steps`` or ``iterations``."""
    step: int
    total_steps: int
    """Reached exactly; ``advance`` never goes past it."""

    def advance(self) -> Progress:
        """Do the smallest indivisible piece of work: a vector step and its updates, a group rollout, an iteration."""
        ...

    def evaluate(self, episodes: int) -> list[Episode]:
        """Run evaluation episodes with the deterministic policy; touches nothing that training uses."""
        ...

    def policy(self) -> Policy:
        """The part one deploys, with its frozen observation statistics."""
        ...

    def first_bad(self) -> str | None:
        """Which tensor was non-finite first, or None: the sticky code of the learner's guard, read when logging."""
        ...

    def bad_now(self) -> bool:
        """Whether something non-finite is known of without waiting for the device; asked after every ``advance``."""
        ...

    def clear_bad(self) -> None:
        """Forget what ``first_bad`` reported, once it has been told."""
        ...

    def state_dict(self) -> State:
        """Everything a bit-exact continuation needs, row logs excepted."""
        ...

    def load_state_dict(self, state: State) -> None: ...

    def after_logs(self) -> None:
        """Called after ``load_state_dict`` once the row logs hold their rows again."""
        ...

    def agent_state(self) -> State:
        """The agent alone (what the best checkpoint holds)."""
        ...

    def row_logs(self) -> dict[str, RowLog]:
        """Append-only data, by name."""
        ...

    def close(self) -> None: ...
