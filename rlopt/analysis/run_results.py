"""Run folders as data: what was trained, how far, and each seed's evaluations."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlopt.analysis.curves import Curve, merge
from rlopt.analysis.statistics import mean_interval
from rlopt.analysis.tables import read_csv
from rlopt.errors import RloptError
from rlopt.settings import read_settings, settings_file

_log = logging.getLogger(__name__)
_DEFINES_AN_EXPERIMENT = ("agent.", "buffer.", "env.", "num_envs")
_SO_DO = {"precision": "float32", "overlap": False}
"""And what they are where an older run does not say."""
_KEYS_IN_A_LABEL = 3


@dataclass(frozen=True)
class EvaluationCurve:
    """One seed's evaluations: ``returns[i]`` are the episodes at ``steps[i]``."""

    seed: int
    steps: list[int] = field(default_factory=list)
    returns: list[list[float]] = field(default_factory=list)

    @property
    def means(self) -> list[float]:
        return [float(np.mean(episodes)) for episodes in self.returns]


@dataclass(frozen=True)
class Run:
    """A run folder; with several runs trained at once it holds several seeds."""

    folder: Path
    config: dict[str, Any]
    """Dotted keys."""
    evaluations: list[EvaluationCurve]
    """One per seed, in their order; empty before the first evaluation."""

    @property
    def env_id(self) -> str:
        return str(self.config["env.id"])

    @property
    def agent(self) -> str:
        return str(self.config["agent.name"])

    @property
    def seed(self) -> int:
        """The first one, where it holds several."""
        return int(self.config["seed"])

    @property
    def protocol(self) -> str | None:
        """How an Atari game was played, with the single numbers that were changed in it: scores of ``dopamine`` without
        its sticky actions are not comparable with those of ``dopamine``."""
        word = self.config.get("env.protocol")
        prefix = "env.kwargs."
        changed = [f"{key.removeprefix(prefix)}={x}" for key, x in self.config.items() if key.startswith(prefix)]
        return f"{word} ({', '.join(sorted(changed))})" if word and changed else word

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that make two runs the same experiment: all of agent, buffer and environment, precision and
        overlap, and not the seed, the length or the machine."""
        own = {
            key: value
            for key, value in self.config.items()
            if key.startswith(_DEFINES_AN_EXPERIMENT) and not key.endswith((".device", ".timeout"))
        }
        return own | {key: self.config.get(key, usual) for key, usual in _SO_DO.items()}


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in nothing but their seed."""

    runs: list[Run]
    """Those whose evaluations ``curve`` has."""
    curve: Curve


def load_run(folder: str | Path) -> Run:
    """Read a run folder's ``config.yaml`` and ``evaluations.csv`` (which may be missing or still growing).

    Raises:
        RloptError: the folder is no run folder, or its configuration lacks ``agent.name``, ``env.id`` or ``seed``.
    """
    folder, path = Path(folder), settings_file(folder)
    found = read_settings(path)
    if found.intact is False:
        _log.warning("%s was changed or damaged after rlopt wrote it", path)
    config = flatten(found.values)
    for key in ("agent.name", "env.id", "seed"):
        if key not in config:
            raise RloptError(f"{path} lacks {key}; give a folder written by rlopt train")
    return Run(folder, config, evaluations(folder, int(config["seed"])))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping with dotted keys; lists stay values."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def curves(runs: Iterable[Run]) -> list[Curve]:
    """Return one curve per experiment, those of ``seed_groups``."""
    return [group.curve for group in seed_groups(runs)]


def seed_groups(runs: Iterable[Run]) -> list[SeedGroup]:
    """Return one curve per experiment: runs that differ in nothing but their seed are its columns.

    A curve is named after its agent, and where one environment has several experiments of one agent also after the
    settings in which they differ. Runs without an evaluation are left out, and of two runs of one experiment and seed
    the one that went less far: counted twice, a seed would make the interval too narrow. What is left out is logged.
    """
    by_env: dict[str, list[list[Run]]] = {}
    for run in runs:
        if not run.evaluations:
            _log.warning("%s is left out: it has no evaluation yet", run.folder)
            continue
        groups = by_env.setdefault(run.env_id, [])
        for group in groups:
            if group[0].identity == run.identity:
                group.append(run)
                break
        else:
            groups.append([run])
    return [
        _seed_group(name, group)
        for groups in by_env.values()
        for name, group in zip(_names([group[0] for group in groups]), groups, strict=True)
    ]


def _seed_group(name: str, group: Sequence[Run]) -> SeedGroup:
    kept = _one_per_seed(group)
    merged = merge(name, group[0].env_id, [(e.steps, e.means) for _, e in kept], group[0].agent)
    spread = np.array([mean_interval(episodes)[1:] for episodes in kept[0][1].returns]) if len(kept) == 1 else None
    runs = list({id(run): run for run, _ in kept}.values())
    return SeedGroup(runs, replace(merged, protocol=group[0].protocol, spread=spread))


def _one_per_seed(group: Sequence[Run]) -> list[tuple[Run, EvaluationCurve]]:
    """Return the evaluations of one experiment's runs, in their order; of each seed those that go furthest."""
    best: dict[int, tuple[Run, EvaluationCurve]] = {}
    for run in group:
        for own in run.evaluations:
            other = best.get(own.seed)
            if other is None:
                best[own.seed] = run, own
                continue
            kept, left = (run, other[0]) if own.steps[-1] > other[1].steps[-1] else (other[0], run)
            _log.warning("%s is left out: %s is the same experiment with seed %d", left.folder, kept.folder, own.seed)
            if kept is run:
                best[own.seed] = run, own
    return list(best.values())


def evaluations(folder: Path, first_seed: int, column: str = "return") -> list[EvaluationCurve]:
    """Return each seed's evaluations in a run folder, of their returns or of another ``column`` (a fact, such as
    ``success``); empty where it has none."""
    path = folder / "evaluations.csv"
    if not path.is_file():
        return []
    table = read_csv(path)
    if not table or not table["step"] or column not in table:
        return []
    steps = np.array(table["step"], dtype=np.int64)
    returns = np.array(table[column], dtype=np.float64)
    slots = np.array(table.get("run", [0] * len(steps)), dtype=np.int64)
    seeds: dict[int, EvaluationCurve] = {}
    for run, step, value in zip(slots.tolist(), steps.tolist(), returns.tolist(), strict=True):
        own = seeds.setdefault(run, EvaluationCurve(first_seed + run))
        if not own.steps or own.steps[-1] != step:
            own.steps.append(step)
            own.returns.append([])
        own.returns[-1].append(value)
    return [seeds[run] for run in sorted(seeds)]


def _names(runs: Sequence[Run]) -> list[str]:
    """Short names, all different, of experiments on one environment."""
    names = []
    for run in runs:
        rivals = [other for other in runs if other.agent == run.agent]
        keys = [k for k in run.identity if any(other.identity.get(k) != run.identity[k] for other in rivals)]
        shown = [f"{_short(key)}={run.identity[key]}" for key in keys[:_KEYS_IN_A_LABEL]]
        names.append(", ".join([run.agent, *shown, *(["…"] if len(keys) > _KEYS_IN_A_LABEL else [])]))
    return [name if names.count(name) == 1 else f"{name} ({runs[i].folder.name})" for i, name in enumerate(names)]


def _short(key: str) -> str:
    return key.removesuffix(".name").removeprefix("agent.")
