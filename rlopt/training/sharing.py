"""Policies on a model hub: what is pushed, and the push."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from rlopt import hub
from rlopt.files import refuse_links
from rlopt.policy import Policy, load_policy, run_policies, save_policy
from rlopt.runs.run_folder import RunFolder
from rlopt.training.evaluate import Evaluation, environment_of, evaluate_path, run_of
from rlopt.training.model_card import Card, model_card
from rlopt.training.saved import saved_settings
from rlopt.types import RloptError

log = logging.getLogger(__name__)

EPISODES = 20
"""What ``rlopt evaluate`` of a policy folder runs, so that without options it repeats what the card says."""
OTHER_EPISODES = 1_000_000
"""Added to the seed where a policy was chosen by its own evaluation, so that it is measured in others."""
FILM = "replay.mp4"
"""The film that a hub shows on top of a page."""


@dataclass(frozen=True)
class Pushed:
    """What was pushed, or would have been."""

    files: dict[str, int]
    """Bytes of each file, by its name in the repository."""
    evaluations: list[Evaluation]
    """One for each policy; empty where none was asked for."""
    page: str | None
    """Where it can be looked at; None where nothing was pushed."""


def push(
    path: Path | str,
    address: str,
    *,
    episodes: int = EPISODES,
    video: Path | str | bool = False,
    private: bool = False,
    message: str | None = None,
    dry_run: Path | str | None = None,
    device: str | torch.device = "cpu",
    trust: bool = False,
) -> Pushed:
    """Evaluate the policy of a run folder (its last one) or of a policy folder as whoever loads it will, and put it on
    a model hub with a card that says so.

    A repository holds ``policy/``, the card (``README.md``), ``evaluation.json``, and of a run ``curve.png`` and
    ``run/`` with its configuration, versions and evaluations. A policy that was chosen by its evaluations
    (``policy_best/``) is measured in episodes of other seeds: those that chose it flatter it.

    Args:
        address: ``hub:user/name``, or ``hub:user/name@branch``. What is missing is made.
        episodes: to evaluate; with 0 the card tells no score.
        video: an mp4 file to show, or True to film the first episode.
        private: make a new repository one that only its owner sees.
        message: of the commit.
        dry_run: an empty or new folder to write what would be pushed into; nothing is pushed.
        device: where the policy is evaluated.
        trust: whether what a run or policy from elsewhere names may be imported.

    Raises:
        RloptError: no policy there, a link in the run folder, an environment that may not be imported or drawn, or the
            hub refuses or does not answer.
    """
    target = hub.parse_address(address)
    if target.folder:
        raise RloptError(f"{address}: a policy is pushed to a whole repository, {target._replace(folder='')}")
    if video is True and not episodes:
        raise RloptError("a film is of an evaluation's first episode; give episodes, or leave video out")
    if not isinstance(video, bool) and not (Path(video).suffix == ".mp4" and Path(video).is_file()):
        raise RloptError(f"video {video}: there is no such mp4 file")
    if dry_run is not None:
        folder = Path(dry_run)
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise RloptError(f"dry run: {folder} is there and not empty; name a new folder")
        found = _write(folder, hub.local(path), target, episodes, video, device, trust)
        return Pushed(_files(folder), found, None)
    hub.refuse_strangers(target)
    with tempfile.TemporaryDirectory(prefix="rlopt-push-") as staged:
        folder = Path(staged)
        found = _write(folder, hub.local(path), target, episodes, video, device, trust)
        files = _files(folder)
        message = message or f"rlopt: {found[0].meta.get('agent', 'policy')} on {found[0].env_id}" if found else message
        page = hub.upload(folder, target, message=message or "rlopt: a policy", private=private)
    return Pushed(files, found, page)


def _files(folder: Path) -> dict[str, int]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _write(
    folder: Path,
    path: Path,
    target: hub.Address,
    episodes: int,
    video: Path | str | bool,
    device: str | torch.device,
    trust: bool,
) -> list[Evaluation]:
    """Write everything that is pushed into ``folder``, and return what was measured."""
    several = run_policies(path)
    policies = [load_policy(each) for each in several or [path]]
    for policy in policies:  # what the copies, which lie in no run of this user's, may name
        environment_of(path, policy, trust=trust)
    home = run_of(path)
    settings = None if home is None else _run_files(home, folder / "run")
    copies = [folder / hub.FOLDER / f"run{r}" if several else folder / hub.FOLDER for r in range(len(policies))]
    for policy, copy in zip(policies, copies, strict=True):
        save_policy(policy, copy)
    film = folder / FILM if video else None
    if not isinstance(video, bool):
        shutil.copyfile(video, folder / FILM)
    seed = _seed(policies)
    measured = [
        evaluate_path(
            copies[r], episodes, seed=seed, device=device, trust=True, video=film if video is True and r == 0 else None
        )
        for r in range(len(policies) if episodes else 0)
    ]
    if measured:
        found = [evaluation.to_json() for evaluation in measured]
        text = json.dumps(found if several else found[0], indent=1)
        (folder / "evaluation.json").write_text(f"{text}\n", encoding="utf-8")
    if home is not None and home.curve.is_file():
        shutil.copyfile(home.curve, folder / "curve.png")
    card = Card(
        target,
        policies,
        measured,
        given_seed=seed,
        run=None if settings is None else folder / "run",
        settings=settings or {},
        curve=(folder / "curve.png").is_file(),
        film=FILM if film else None,
    )
    (folder / "README.md").write_text(model_card(card), encoding="utf-8")
    return measured


def _seed(policies: Sequence[Policy]) -> int | None:
    """Return the seed of the episodes, None for each policy's own."""
    if all(policy.meta.get("selected") != "best" for policy in policies):
        return None
    first = policies[0].meta.get("seed", 0)
    return OTHER_EPISODES + (first if isinstance(first, int) else 0)


def _run_files(home: RunFolder, folder: Path) -> dict[str, Any]:
    """Copy what is told of a run into ``folder``, and return its settings."""
    refuse_links(home.path, ())
    folder.mkdir(parents=True)
    settings = {key: value for key, value in saved_settings(home).values.items() if key != "run_dir"}
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    for path in (home.versions_path, home.evaluations):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    return settings
