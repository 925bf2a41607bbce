"""Command lines: overrides in Hydra's grammar, the run that they describe, resume or list."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.override_parser.types import Override

from rlopt.config import nearest
from rlopt.errors import RloptError
from rlopt.registry import load_extensions
from rlopt.training import presets
from rlopt.training.presets import parse

if TYPE_CHECKING:
    from rlopt.loops.configuration import TrainConfig

EXAMPLE = "sac_pendulum"
"""The experiment that runs when neither an environment nor an experiment is named."""


def compose(overrides: Sequence[str], extra_dirs: Sequence[str] = ()) -> TrainConfig:
    """Return the configuration that ``overrides`` describe; ``extra_dirs`` are further folders of config groups.

    Raises RloptError in one line for whatever cannot be read, found or accepted.
    """
    parsed = _single(overrides)
    given = {o.key_or_group: o for o in parsed}
    if "resume" in given and given["resume"].value() is None:
        parsed = [o for o in parsed if o.key_or_group != "resume"]
    load_extensions()
    agents = [str(given[key].value()) for key in ("agent", "agent.name") if key in given]
    if not given.keys() & {"experiment", "env", "env.id"} and set(agents) <= {"sac"}:
        parsed = [*parse([f"experiment={EXAMPLE}"]), *parsed]
    return presets.compose(parsed, extra_dirs)


def check_words(overrides: Sequence[str], extra_dirs: Sequence[str] = ()) -> None:
    """Raise RloptError in one line where ``overrides`` cannot be read, or name an agent, a buffer or an experiment that
    is not there. Imports no torch, and does not look at options."""
    presets.check_words(_single(overrides), extra_dirs)


class ResumeRequest(NamedTuple):
    """What ``resume=`` asks for."""

    folder: Path
    changes: dict[str, Any]
    env: str | None
    """The environment, where it was named: the user's word that it may be imported."""


def resume_request(overrides: Sequence[str]) -> ResumeRequest | None:
    """Return what ``resume=`` and the options beside it ask for, or None where no run is resumed.

    Raises RloptError for an option that a resumed run keeps, and for a folder that holds no run.
    """
    parsed = _single(overrides)
    run = next((o.value() for o in reversed(parsed) if o.key_or_group == "resume"), None)
    if run is None:
        return None
    folder = Path(os.path.expanduser(str(run)))
    if not (folder / "config.yaml").is_file():
        near = nearest(folder.name, [p.parent.name for p in folder.parent.glob("*/config.yaml")])
        advice = f"; did you mean {folder.parent / near}?" if near else ""
        raise RloptError(f"resume={run}: no run lies there (no config.yaml){advice}")
    from rlopt.runs.run_folder import RunFolder
    from rlopt.training.saved import KEPT, refuse_changes

    changes = {o.key_or_group: o for o in parsed if o.key_or_group != "resume"}
    env = RunFolder(folder).config().get("env")
    own = env.get("id") if isinstance(env, dict) else None
    named = {key for key in ("env", "env.id") if key in changes and own is not None and changes[key].value() == own}
    changes = {key: override for key, override in changes.items() if key not in named}
    refuse_changes(changes)
    for key, override in changes.items():
        if override.is_delete():
            raise RloptError(f"{key}: {KEPT}")
    return ResumeRequest(folder, {key: o.value() for key, o in changes.items()}, own if named else None)


def split(overrides: Sequence[str]) -> list[list[str]]:
    """Return the jobs of a multirun: the product of all overrides that list several values, the last one varying
    fastest.

    ``run_dir=D`` becomes ``D/0``, ``D/1`` and so on.
    """
    choices: dict[str, list[str]] = {}
    for override in parse(overrides):
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices[key] = [override.input_line or ""]
        elif override.is_discrete_sweep():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise RloptError(f"{override.input_line}: an interval cannot be run through; list its values")
    jobs = [list(job) for job in itertools.product(*choices.values())]
    if len(choices.get("run_dir", [])) == 1:
        folder = Path(str(parse(choices["run_dir"])[0].value()))
        jobs = [[_run_dir(folder / str(i)) if t.startswith("run_dir=") else t for t in job]
                for i, job in enumerate(jobs)]  # fmt: skip
    return jobs


def _run_dir(folder: Path) -> str:
    """``run_dir=…``, in quotes only where Hydra would read something else without them."""
    plain = f"run_dir={folder}"
    try:
        if parse([plain])[0].value() == str(folder):
            return plain
    except RloptError:
        pass
    return f"run_dir={presets.quote(str(folder))}"


def _single(overrides: Sequence[str]) -> list[Override]:
    parsed = parse(overrides)
    for override in parsed:
        if override.is_sweep_override():
            key = override.get_key_element()
            raise RloptError(f"{override.input_line}: several values; add --multirun to run each, or write {key}='…'")
    return parsed
