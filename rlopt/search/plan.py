"""What a sweep is: a space, what stays fixed, and how its trials are trained; a trial is a run for each seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlopt.errors import RloptError, needed
from rlopt.search.space import Choices, Params, Range, Space, examples, refuse_fixed, stored, value_at, word

if TYPE_CHECKING:
    from rlopt.loops.configuration import TrainConfig

PRUNERS = ("median", "percentile", "hyperband", "none")


@dataclass(frozen=True)
class Sweep:
    """A search of ``space`` on top of ``overrides``; ``prepare`` checks one.

    Args:
        configure: composes a run from overrides.
        root: folder of the trials, the tables and (by default) the storage.
        trials: how many points of the space are tried.
        seeds: how many seeds each is trained with, one after the other.
        pruner: one of ``PRUNERS``.
        percentile: which fraction the percentile pruner lets pass, in per cent.
        prune_after: steps of the first seed before which nothing is pruned; None takes a third of ``total_steps``.
        startup: trials that are trained to their end before any is pruned.
        storage: a database URL of SQLAlchemy; None takes ``ROOT/study.db``.
    """

    space: Space
    overrides: tuple[str, ...]
    configure: Callable[[Sequence[str]], TrainConfig]
    root: Path
    trials: int = 20
    seeds: int = 1
    pruner: str = "median"
    percentile: float = 25.0
    prune_after: int | None = None
    startup: int = 5
    storage: str | None = None
    keep_checkpoints: bool = False

    def prepare(self) -> Sweep:
        """Return itself once every option's both ends and choices have been composed: what is wrong is told before
        anything begins.

        Raises:
            RloptError: an option is unknown or fixed too, or a value out of range; in one line.
        """
        refuse_fixed(self.space, self.overrides, "the space")
        needed("optuna", "sweep", "rlopt sweep")
        for point in examples(self.space):
            self.configure(self.words(point))
        for key, entry in self.space.items():
            self._distribution(key, entry)
        if self.pruner != "none" and self.base.eval.every is None and self.seeds == 1:
            raise RloptError("eval.every=null: nothing to prune by; set eval.every, or add --pruner none")
        return self

    def words(self, params: Params) -> list[str]:
        """Return the overrides of a trial."""
        return [*self.overrides, *(word(key, value) for key, value in params.items())]

    def searched(self, params: Params) -> list[str]:
        """Return a point of the space as a table shows it, numbers to four digits."""
        return [
            word(key, value) if not isinstance(value, float) else f"{key}={value:.4g}" for key, value in params.items()
        ]

    @cached_property
    def base(self) -> TrainConfig:
        """The configuration at one point of the space; what is not searched is the same at all of them."""
        return self.configure(self.words(examples(self.space)[0]))

    @property
    def run_seeds(self) -> list[int]:
        """The seed of each run of a trial; the same for all trials, which so are compared on the same ground."""
        return [self.base.seed + i * self.base.num_runs for i in range(self.seeds)]

    def folder(self, number: int) -> Path:
        """Return where a trial's runs lie."""
        return self.root / f"trial{number:04d}"

    def runs(self, number: int, params: Params) -> list[TrainConfig]:
        """Return the configuration of each run of a trial: one thread, as trials share the machine, unless told."""
        config = self.configure(self.words(params))
        config = replace(config, threads=1 if config.threads == "auto" else config.threads)
        folders = [(seed, str(self.folder(number) / f"seed{seed}")) for seed in self.run_seeds]
        return [replace(config, seed=seed, run_dir=folder) for seed, folder in folders]

    def defaults(self) -> dict[str, Any] | None:
        """Return the settings without the search, where they lie inside the space: the first trial, which every other
        one has to beat."""
        try:
            config = self.configure(self.overrides)
            found = {key: value_at(config, key) for key in self.space}
        except (RloptError, KeyError):
            return None
        return found if all(found[key] in entry for key, entry in self.space.items()) else None

    @cached_property
    def distributions(self) -> dict[str, Any]:
        """The space as Optuna has it."""
        return {key: self._distribution(key, entry) for key, entry in self.space.items()}

    def _distribution(self, key: str, entry: Range | Choices) -> Any:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if isinstance(entry, Choices):
            return CategoricalDistribution([stored(one) for one in entry.choices])
        value = value_at(self.base, key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RloptError(f"{key}: takes no numbers between {entry.low:g} and {entry.high:g}; give choices: […]")
        if isinstance(value, float):
            return FloatDistribution(float(entry.low), float(entry.high), log=entry.log, step=entry.step)
        if (step := float(entry.step or 1)) % 1:
            raise RloptError(f"{key}.step: takes whole numbers, so its step is one; got {step:g}")
        return IntDistribution(int(entry.low), int(entry.high), log=entry.log, step=int(step))

    def params(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Return the point that Optuna drew, as options take it."""
        choices = {key: one.choices for key, one in self.space.items() if isinstance(one, Choices)}
        return {
            key: next(one for one in choices[key] if stored(one) == value) if key in choices else value
            for key, value in drawn.items()
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What trials of one sweep have in common."""
        return {
            "space": {key: repr(one) for key, one in self.space.items()},
            "overrides": list(self.overrides),
            "seeds": self.seeds,
        }
