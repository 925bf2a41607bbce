"""The template of agents that learn one after the other (MEHAML: Liu et al. 2024, "Maximum Entropy Heterogeneous-Agent
Reinforcement Learning", arXiv 2306.10715; without entropies HAML, Kuba et al. 2022, arXiv 2208.01682).

In an order drawn anew for each update every agent climbs the team's value, given what those before it have *become* and
what those after it still are; a member of the family is told by four words:

* **order**: a random permutation, without which the guarantee of monotone improvement does not hold (``Order``);
* **drift**: what keeps an agent near its present policy: nothing (HASAC, HATD3), a clipped ratio (HAPPO);
* **neighbourhood**: where it may go: as far as one optimiser step leads (off-policy), some epochs (on-policy);
* **temperature**: what a nat of entropy is worth: learned or fixed (HASAC), 0 (HATD3, HAPPO).

``losses`` holds drift, neighbourhood and temperature; ``refresh`` is what makes the order matter. Without it all agents
learn against what the others were, which is what MASAC, MATD3 and MAPPO do: each step may help while all of them
together harm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlopt.agents.base import Agent
from rlopt.agents.replay_agent import join_updates
from rlopt.random import numpy_generator
from rlopt.types import RloptError, Update

ORDERS = ("random", "fixed")


def update_in_order(
    order: Sequence[int], losses: Callable[[int], Update], refresh: Callable[[int], None] | None
) -> Update:
    """Let the agents in ``order`` learn one after the other; return what all of them report.

    Args:
        order: numbers of the agents.
        losses: ``losses(i)`` takes agent i's step, or steps, down its own loss.
        refresh: ``refresh(i)`` puts agent i's new policy where the losses of those after it look; None for simultaneous
            updates, in which nobody sees what the others have become.
    """
    done = []
    for i in order:
        done.append(losses(i))
        if refresh is not None:
            refresh(i)
    return join_updates(done)


class Order:
    """The order in which a team's agents are updated next.

    It is drawn from the agent's seed and the number of updates made so far: it has no state, and a resumed run goes on
    with the same orders. Several runs side by side use one order, that of the first's seed.

    Args:
        agent: whose seed and clock are read.
        count: n.
        kind: ``random`` or ``fixed``.

    Raises:
        RloptError: an order was asked for where there is none.
    """

    def __init__(self, agent: Agent, count: int, kind: str) -> None:
        if kind != "random" and count == 1:
            raise RloptError(f"agent.order={kind} has no effect: {agent.spec.id} has one agent; leave it out")
        self.agent, self.count, self.random = agent, count, kind == "random" and count > 1

    def __call__(self) -> list[int]:
        """Return the agents' numbers in the order of the next update."""
        if not self.random:
            return list(range(self.count))
        generator = numpy_generator(self.agent.seed, "order", self.agent.clock.updates)
        return [int(i) for i in generator.permutation(self.count)]
