"""``rlopt train``: compose, train, say how it ended."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from rlopt.cli import raise_if_interrupted
from rlopt.cli.compose import compose, resume_request
from rlopt.cli.multirun import run_all
from rlopt.config import to_dict

if TYPE_CHECKING:  # these import torch, which no mistake in a word has to wait for
    from rlopt.loops.configuration import TrainConfig
    from rlopt.training.result import Result


def run(arguments: argparse.Namespace) -> int:
    """Train, resume, run through the jobs of a multirun, or show the configuration."""
    if arguments.multirun:
        return run_all(arguments)
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
            if arguments.folder_to:
                Path(arguments.folder_to).write_text(str(trainer.folder.path), encoding="utf-8")
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
