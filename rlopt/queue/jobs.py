"""The jobs of a file: which trainings, with which seeds, and what each needs of a machine.

A jobs file is YAML::

    defaults: {seeds: [0, 1, 2], overrides: [total_steps=110000], needs: {hours: 4}}
    jobs:
      - experiment: sac_hopper_v4
      - {experiment: sac_ant_v4, seeds: [0], overrides: [total_steps=500000]}  # own seeds; more overrides, which win
      - {name: hopper_rr, experiment: sac_hopper_v4, overrides: [buffer=reshuffled]}  # name: default is experiment
      - {name: walker, overrides: [agent=td3, env=Walker2d-v5], needs: {cpus: 2}}  # without an experiment

Each seed of each job is a training with the run folder ``ROOT/<name>/seed<seed>``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from rlopt.config import build, hint, option
from rlopt.errors import RloptError

KEYS = ("name", "experiment", "seeds", "overrides", "needs")
OWN = {"seed": "seeds: [0, 1]", "experiment": "experiment: NAME", "run_dir": "name: NAME", "resume": "the same --root"}
"""Words that the queue itself gives to a training, and what is written in a jobs file instead."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a training needs of the machine that it runs on."""

    cpus: int = option(1, "cores, and the training's threads= unless overrides say otherwise", low=1)
    gpus: int = option(0, "GPUs of its own", low=0)
    memory_gb: float | None = option(None, "main memory", above=0)
    hours: float | None = option(None, "time limit, after which it goes on in a further stretch", above=0)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in asdict(self).items() if value)


@dataclass(frozen=True)
class Job:
    """One training of a jobs file."""

    folder_name: str
    experiment: str | None
    seed: int
    overrides: tuple[str, ...]
    needs: Needs = Needs()

    @property
    def name(self) -> str:
        return f"{self.folder_name}/seed{self.seed}"

    @property
    def total_steps(self) -> int | None:
        """As overridden here; None leaves it to the experiment."""
        given = [o.split("=", 1)[1] for o in self.overrides if o.startswith("total_steps=")]
        return int(float(given[-1].replace("_", ""))) if given else None

    @property
    def setting(self) -> tuple[str, ...]:
        """What describes the training, without its seed and folder."""
        own = [] if self.experiment is None else [f"experiment={self.experiment}"]
        return (*own, *self.overrides)

    def folder(self, root: Path) -> Path:
        """Return the run folder."""
        return root / self.folder_name / f"seed{self.seed}"

    def log(self, root: Path) -> Path:
        """Return the file of the training's output."""
        return root / "logs" / f"{self.name.replace('/', '_')}.log"

    def words(self, root: Path) -> tuple[list[str], list[str]]:
        """Return the words of a new run, and those that continue the one that is there (whose configuration only
        total_steps may change)."""
        folder = _quoted(str(self.folder(root)))
        own = [] if self.experiment is None else [f"experiment={self.experiment}"]
        new = [*own, f"seed={self.seed}", f"threads={self.needs.cpus}", f"run_dir={folder}", *self.overrides]
        more = [] if self.total_steps is None else [f"total_steps={self.total_steps}"]
        return new, [f"resume={folder}", *more]


def _quoted(path: str) -> str:
    """``path`` as a value in Hydra's grammar."""
    if re.fullmatch(r"[\w./+-]+", path):
        return path
    return "'" + path.replace("\\", "\\\\").replace("'", "\\'") + "'"


def load_jobs(path: Path) -> list[Job]:
    """Return the jobs of a file, seed by seed.

    Raises:
        RloptError: the file cannot be read, holds an unknown key or a value of the wrong kind, or names one run twice.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise RloptError(f"{path} cannot be read: {' '.join(str(e).split())}") from e
    if not isinstance(tree, dict) or not isinstance(tree.get("jobs"), list):
        raise RloptError(f"{path} has no list of jobs; write jobs: and below it lines such as - experiment: NAME")
    _refuse_unknown(path, tree, ("defaults", "jobs"), "a jobs file")
    defaults = _checked(path, "defaults", tree.get("defaults") or {})
    jobs: list[Job] = []
    for number, entry in enumerate(tree["jobs"], start=1):
        jobs += _of_entry(path, f"job {number}", defaults, entry)
    if not jobs:
        raise RloptError(f"{path} has no jobs; write below jobs: lines such as - experiment: NAME")
    jobs.sort(key=lambda job: job.seed)
    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RloptError(
            f"{path}: {twice[0]} is there twice; both would write to one run folder: give one a name: of its own"
        )
    return jobs


def _of_entry(path: Path, where: str, defaults: Mapping[str, Any], entry: object) -> list[Job]:
    own = _checked(path, where, entry)
    job = {"seeds": [0], **defaults, **own}
    if "experiment" not in job and "name" not in own:
        raise RloptError(f"{path}, {where} lacks its experiment, or a name beside its overrides")
    name = str(job["name"] if "name" in own else job["experiment"])
    if not re.fullmatch(r"[\w.+,-]+(/[\w.+,-]+)*", name) or {".", ".."} & set(name.split("/")):
        raise RloptError(f"{path}, {where}: name {name!r} is a folder's; use letters, digits, _ and -")
    overrides = (*defaults.get("overrides", ()), *own.get("overrides", ()))
    merged = {**defaults.get("needs", {}), **own.get("needs", {})}
    try:
        needs = build(Needs, merged, "needs")
    except RloptError as e:
        raise RloptError(f"{path}, {where}: {e}") from e
    return [Job(name, job.get("experiment"), seed, tuple(overrides), needs) for seed in job["seeds"]]


def _checked(path: Path, where: str, entry: object) -> dict[str, Any]:
    """Return an entry, or the defaults, whose every key is known and of the right kind."""
    if not isinstance(entry, dict):
        raise RloptError(f"{path}, {where}: expected keys such as experiment: NAME, got {entry!r}")
    _refuse_unknown(path, entry, KEYS, "a job")
    kinds = {"name": (str, int), "experiment": (str,), "seeds": (list,), "overrides": (list,), "needs": (dict,)}
    for key, value in entry.items():
        if not isinstance(value, kinds[key]):
            raise RloptError(f"{path}, {where}: {key} is {value!r}; write {_EXAMPLES[key]}")
    for seed in entry.get("seeds", ()):
        if type(seed) is not int or seed < 0:
            raise RloptError(f"{path}, {where}: seed {seed!r} is no whole number from 0; write {_EXAMPLES['seeds']}")
    for word in entry.get("overrides", ()):
        if not isinstance(word, str):
            raise RloptError(f"{path}, {where}: override {word!r} is no text; write {_EXAMPLES['overrides']}")
        key = word.partition("=")[0].lstrip("+~")
        if key in OWN:
            raise RloptError(f"{path}, {where}: {word} is the queue's to say; write {OWN[key]}")
        if key == "total_steps":
            _check_steps(f"{path}, {where}", word)
    return entry


def _check_steps(where: str, word: str) -> None:
    """The queue itself must know how far a run goes, so that it can be extended."""
    try:
        float(word.partition("=")[2].replace("_", ""))
    except ValueError:
        raise RloptError(f"{where}: {word} is no number; write total_steps=100000") from None


_EXAMPLES = {
    "name": "name: NAME", "experiment": "experiment: NAME", "seeds": "seeds: [0, 1, 2]",
    "overrides": "overrides: [total_steps=100000, 'agent.network.hidden=[64,64]']",
    "needs": "needs: {gpus: 1, hours: 12}",
}  # fmt: skip


def _refuse_unknown(path: Path, tree: Mapping[Any, Any], known: tuple[str, ...], what: str) -> None:
    for key in tree:
        if key not in known:
            raise RloptError(f"{path}: {key} is no key of {what}; {hint(str(key), known)}")
