"""``rlopt train``: compose, train, say how it ended."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import yaml

import rlopt
from rlopt.cli import raise_if_interrupted
from rlopt.cli.compose import compose, resume_request, split
from rlopt.config import to_dict

if TYPE_CHECKING:  # these import torch, which no mistake in a word has to wait for
    from rlopt.loops.configuration import TrainConfig
    from rlopt.training.result import Result


def run(arguments: argparse.Namespace) -> int:
    """Train, resume, run through the jobs of a multirun, or show the configuration."""
    if arguments.multirun:
        return _multirun(arguments)
    request = resume_request(arguments.overrides)
    if request is None:
        config = compose(arguments.overrides, arguments.config_dir)
    else:
        from rlopt.runs.run_folder import RunFolder
        from rlopt.training.saved import resumed_config

        word = {"trust": arguments.trust, "env_id": request.env}
        config = resumed_config(RunFolder(request.folder), request.changes, **word)
    if arguments.options:
        from rlopt.cli.options import print_options

        print_options(config)
        return 0
    from rlopt.training.setup import begin, describe, resolve_config, resume

    if arguments.print_config:
        print(yaml.safe_dump(to_dict(resolve_config(config)), sort_keys=False, allow_unicode=True), end="")
        return 0
    from rlopt.cli.log import log_shown
    from rlopt.runs.display import Display

    display = Display(config.total_steps)
    with log_shown(display.message):
        try:
            if request is None:
                trainer = begin(config, display=display)
            else:
                trainer = resume(
                    request.folder,
                    request.changes,
                    display=display,
                    without_lost_rows=arguments.without_lost_rows,
                    **word,
                )
        except BaseException:
            display.close()
            raise
        try:
            for line in describe(trainer, config):
                display.message(line)
            raise_if_interrupted()
            result = trainer.run()
        except KeyboardInterrupt:  # before the first step, or a second time while the run was being saved
            print("interrupted; what was saved last is intact", file=sys.stderr)
            print(f"go on        rlopt train resume={shlex.quote(str(trainer.folder.path))}")
            return 128 + signal.SIGINT
        finally:
            trainer.close()
    return _ended(result, config)


def _ended(result: Result, config: TrainConfig) -> int:
    """Say how the run ended and what can be done next; returns the exit code."""
    from rlopt.loops.configuration import schedule_end
    from rlopt.training.evaluate import Evaluation
    from rlopt.training.evaluate import describe as summary
    from rlopt.training.result import FINISHED, INTERRUPTED, NONFINITE

    where = shlex.quote(str(result.folder))
    if result.evaluation:
        print(f"evaluation   {summary(Evaluation(result.evaluation, config.env.id, config.seed, result.mode))}")
    print(f"run folder   {result.folder} ({result.status} at step {result.step} of {config.total_steps})")
    twice = 2 * config.total_steps
    if result.status == NONFINITE and config.on_nonfinite == "stop":
        print(f"go on        rlopt train resume={where} on_nonfinite=skip")
    elif result.status != FINISHED:
        print(f"go on        rlopt train resume={where}")
    # A solver may have found its answer before, and a schedule may have ended all learning.
    elif result.step == config.total_steps and (schedule_end(config) or twice) >= twice:
        print(f"train on     rlopt train resume={where} total_steps={twice}")
    print(f"evaluate     rlopt evaluate {where} --episodes 20")
    print(f"draw         rlopt plot {where} --out curve.png")
    if not result.saved:
        print(
            f"error: the last checkpoint could not be written to {result.folder}; the warning above says why",
            file=sys.stderr,
        )
        return 1
    if result.status == NONFINITE:
        print(f"error: stopped because the {result.first_bad} was not finite; the weights are sound", file=sys.stderr)
        return 1
    if result.status == INTERRUPTED:
        return 128 + (result.signal or 0)
    return 0


def _multirun(arguments: argparse.Namespace) -> int:
    """Run each job in a process of its own, so that it equals the same run alone, whatever the others do."""
    jobs = split(arguments.overrides)
    for job in jobs:  # a mistake in the last job is told before the first one has run for hours
        if resume_request(job) is None:
            compose(job, arguments.config_dir)
    flags = [part for folder in arguments.config_dir for part in ("--config-dir", folder)]
    flags += [
        flag
        for flag in ("--print-config", "--options", "--trust", "--without-lost-rows")
        if getattr(arguments, flag[2:].replace("-", "_"))
    ]
    environment = _child_environment()
    codes = []
    for i, job in enumerate(jobs):
        print(f"job {i + 1} of {len(jobs)}: {_shell(job)}", flush=True)
        command = [sys.executable, "-m", "rlopt", "train", *flags, *job]
        code, stop = _wait(subprocess.Popen(command, env=environment))
        codes.append(code)
        if stop or code >= 128:  # a signal: the user wants all of it to end
            break
    print(f"\n{len(jobs)} jobs:")
    shared = Counter(word for job in jobs for word in job)
    for i, job in enumerate(jobs):
        ended = "not started" if i >= len(codes) else "done" if codes[i] == 0 else f"ended with code {codes[i]}"
        own = [word for word in job if shared[word] < len(jobs)] or job
        print(f"  {ended:<18} {_shell(own)}")
    return max(codes, default=0)


def _wait(child: subprocess.Popen[bytes]) -> tuple[int, bool]:
    """Return the exit code of a child, and whether a signal came meanwhile: it gets Ctrl-C by itself and SIGTERM from
    here, and is given the time to save; one that was at its last step ends as if nothing had been."""
    stops: list[int] = []

    def terminate(signum: int, frame: FrameType | None) -> None:
        stops.append(signum)
        child.terminate()

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        while True:
            try:
                code = child.wait()
                return 128 - code if code < 0 else code, bool(stops)
            except KeyboardInterrupt:
                stops.append(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _shell(words: list[str]) -> str:
    """``words`` as one would type them: ``shlex.join`` writes a ' inside a word as '"'"'."""
    return " ".join(
        f'"{word}"' if "'" in word and not set('"$`\\!') & set(word) else shlex.quote(word) for word in words
    )


def _child_environment() -> dict[str, str]:
    """This process's environment, in which the child finds the same rlopt."""
    root = str(Path(next(iter(rlopt.__path__))).resolve().parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
