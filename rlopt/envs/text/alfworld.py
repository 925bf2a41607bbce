"""ALFWorld (Shridhar et al. 2021, arXiv 2010.03768): its engine, texts and kinds of task; problems by rlopt."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from rlopt.envs.text.game import ChoiceEnv, Moved, Seen, TextGame
from rlopt.envs.text.household import KINDS, problem
from rlopt.types import RloptError
from rlopt.version import install

SIZES = {"train": 3_553, "seen": 140, "unseen": 134}
"""Tasks of each list, as many as in ALFWorld."""
FIRST = {"train": 0, "seen": 10_000, "unseen": 20_000}
_loading = threading.Lock()


class ALFWorld(TextGame):
    """Household tasks in words.

    ``seen`` tasks ask in new rooms for what training asks for too, ``unseen`` ones for other pairs of object and place.
    As in the paper's lists of actions, ``help`` is not offered, and neither are ``look`` and ``inventory`` where
    ``free`` is False: they change nothing.

    Args:
        horizon: actions after which a task is cut off.
        won: what success pays, at the end.
        free: whether actions that only look are offered.

    Raises:
        RloptError: the package is missing.
    """

    id = "alfworld"
    kinds = KINDS
    _logic: ClassVar[Any] = None

    def __init__(self, horizon: int = 50, won: float = 10.0, free: bool = False) -> None:
        try:
            from alfworld.agents.utils.misc import Demangler
            from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
            from textworld import EnvInfos
            from textworld.envs.pddl import PddlEnv
            from textworld.envs.pddl import logic as pddl
            from textworld.logic import Placeholder, Variable
        except ImportError as e:
            raise RloptError(f"ALFWorld is not installed; {install('text')}") from e
        self.horizon, self.won, self.free, self._taken = horizon, won, free, 0
        self._pddl, self._placeholder, self._variable = pddl, Placeholder, Variable
        with _loading:
            if ALFWorld._logic is None:  # parsed once in a process: it takes longer than a task does
                domain, grammar = (Path(x).read_text("utf-8") for x in (ALFRED_PDDL_PATH, ALFRED_TWL2_PATH))
                ALFWorld._logic = pddl.GameLogic(domain=domain, grammar=grammar)
        self._demangler, self._engine = Demangler, PddlEnv(EnvInfos())
        self._engine._logic = ALFWorld._logic
        self._task: int | str | None = None
        self._words = ""

    def tasks(self, split: str) -> Sequence[int | str]:
        if split not in SIZES:
            raise RloptError(f"{self.id} has no list {split!r} of tasks; it has {', '.join(SIZES)}")
        return list(range(FIRST[split], FIRST[split] + SIZES[split]))

    def kind(self, task: int | str) -> str:
        return KINDS[int(task) % len(KINDS)]

    def begin(self, task: int | str) -> Seen:
        if task != self._task:
            made = problem(int(task), unseen=int(task) >= FIRST["unseen"])
            engine = self._engine  # loaded as its own ``load`` does, but for the logic
            engine._game_data = {"pddl_problem": made.pddl}
            engine._pddl_state = self._pddl.PddlState(engine.downward_lib, made.pddl, engine._logic)
            engine._entity_infos = engine._get_entity_infos()
            names = self._demangler(game_infos=engine._entity_infos)
            for info in engine._entity_infos.values():
                info.name = names.demangle_alfred_name(info.id).strip()
            self._task, self._words = task, made.words
        self._taken = 0
        seen = self._seen(self._engine.reset())
        return seen._replace(text=seen.text.replace("UNKNOWN GOAL", self._words))

    def act(self, words: str) -> Moved:
        state, _, _ = self._engine.step(words)
        self._taken += 1
        won = bool(state["won"])
        return Moved(self._seen(state), self.won * won, won, not won and self._taken >= self.horizon, won)

    def exact(self) -> str:
        """Return every fact that is true now and may change."""
        facts = self._engine.state["_facts"]
        return "\n".join(sorted(str(fact) for fact in facts if fact.name not in ("checked", "cancontain")))

    def plan(self) -> list[str]:
        """Return actions that lead from here to the goal, by the planner of the engine."""
        return [str(words) for words in self._engine._pddl_state.replan(self._engine._entity_infos)]

    def solution(self, task: int | str) -> Sequence[str] | None:
        self.begin(task)
        return self.plan()

    def _seen(self, state: Any) -> Seen:
        offered = [words for words in state["admissible_commands"] if words != "help"]
        if not self.free:
            offered = [words for words in offered if words not in ("look", "inventory") and words[:7] != "examine"]
        task = f"Your task is to: {self._words}."
        return Seen(state.feedback, task, "\n".join((task, *self._around())), tuple(offered))

    def _around(self) -> list[str]:
        """Return what one sees and carries, in the engine's words: where one stands, what lies there, the inventory."""
        engine = self._engine
        facts = list(engine._pddl_state.facts)
        here = {f.arguments[1].name for f in facts if f.name == "atlocation"}
        there = sorted(
            f.arguments[0].name for f in facts if f.name == "receptacleatlocation" and f.arguments[1].name in here
        )
        rules = [("look", None), *(("examineReceptacle", name) for name in there), ("inventory", None)]
        found = []
        for rule, name in rules:
            kind = self._placeholder("r", "receptacle")
            context = {
                "state": engine._pddl_state,
                "facts": facts,
                "variables": {} if name is None else {"r": engine._entity_infos[name]},
                "mapping": {} if name is None else {kind: self._variable(name, "receptacle")},
                "entity_infos": engine._entity_infos,
            }
            found.append(str(engine._logic.grammar.derive(f"#{rule}.feedback#", context)))
        return found


class ALFWorldEnv(ChoiceEnv):
    """ALFWorld as an environment of choices; the arguments are those of both."""

    def __init__(
        self,
        horizon: int = 50,
        won: float = 10.0,
        free: bool = False,
        split: str = "train",
        tasks: int | None = None,
        choices: int = 64,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(ALFWorld(horizon, won, free), split, tasks, choices, render_mode)
