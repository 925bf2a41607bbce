"""``rlopt queue``: the trainings of a file, on this machine or on a cluster."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rlopt.errors import RloptError
from rlopt.queue.jobs import Job, load_jobs


def run(arguments: argparse.Namespace) -> int:
    """Check every command line, and work through the jobs; or tell how far they are."""
    if os.name == "nt":
        raise RloptError("rlopt queue needs Linux or macOS; rlopt train -m runs several trainings one after the other")
    jobs = load_jobs(Path(arguments.jobs))
    if arguments.check:
        print(f"{check(jobs, arguments.config_dir)} settings, {len(jobs)} trainings: no mistake found")
        return 0
    if arguments.root is None:
        raise RloptError("--root is missing; name the folder for run folders and logs, as in --root runs/mine")
    root = Path(arguments.root).expanduser().resolve()
    if arguments.status:
        from rlopt.queue.progress import status

        print(status(jobs, root))
        return 0
    from rlopt.queue.executors import make_executor
    from rlopt.queue.work import Queue

    options = _options(arguments.executor_options)
    executor = make_executor(arguments.executor, options, root)
    flags = [part for folder in arguments.config_dir for part in ("--config-dir", str(Path(folder).resolve()))]
    if arguments.script is None:
        _check_apart(arguments.jobs, flags)
        program = [sys.executable, "-m", "rlopt", "train", *flags]
    elif not Path(arguments.script).is_file():
        raise RloptError(f"--script {arguments.script}: there is no such file")
    else:
        program = [sys.executable, str(Path(arguments.script).resolve()), *flags]
    return Queue(jobs, root, executor, arguments.workers, program).run()


def check(jobs: Sequence[Job], extra_dirs: Sequence[str] = ()) -> int:
    """Compose every setting once, and return how many there are.

    Raises:
        RloptError: the first mistake, and whose it is. Those in names are found before torch is imported.
    """
    from rlopt.cli.compose import check_words, compose

    settings = {job.setting: job for job in reversed(jobs)}
    for look in (check_words, compose):
        for job in sorted(settings.values(), key=lambda job: job.seed):
            try:
                config = look([*job.setting, f"seed={job.seed}"], extra_dirs)
                if config is not None:
                    from rlopt.training.setup import loop_class

                    loop_class(config).resolve(
                        config
                    )  # the environment too; not the device, which is another machine's
            except RloptError as e:
                raise RloptError(f"{job.name}: {e}") from e
    return len(settings)


def _check_apart(jobs: str, flags: Sequence[str]) -> None:
    """``check`` in a process of its own: this one waits for days, and torch needs memory."""
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "rlopt", "queue", jobs, "--check", *flags],
        env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode == 2 and done.stderr.startswith("error: "):
        raise RloptError(done.stderr.removeprefix("error: ").strip())
    if done.returncode < 0 or done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise RuntimeError(f"the check of {jobs} broke:\n{done.stderr}")


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Return ``KEY=VALUE`` words as options, values as YAML reads them."""
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise RloptError(f"--executor-options {word}: expected KEY=VALUE, such as partition=gpu")
        try:
            # YAML reads 12:00:00 as a number in base 60.
            options[key] = value if value.replace(":", "").isdecimal() and ":" in value else yaml.safe_load(value)
        except yaml.YAMLError as e:
            raise RloptError(f"--executor-options {word}: the value cannot be read") from e
    return options
