"""The commands, their options and their help."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import rlopt

TOP = """\
usage: rlopt COMMAND ...

  train      train an agent, or resume a run           rlopt train agent=sac env=HalfCheetah-v5 seed=3
  sweep      search options, and rank what was found   rlopt sweep SPACE.yaml env=Hopper-v5 --trials 40 --seeds 3
  queue      the trainings of a file, resumably        rlopt queue jobs.yaml --root runs/mine --executor slurm
  evaluate   evaluate a run or an exported policy      rlopt evaluate RUN --episodes 20
  plot       draw learning curves of runs              rlopt plot runs/* --out curves.png
  export     a policy as ONNX or torch.export          rlopt export RUN --to onnx
  push       put a policy on a model hub               rlopt push RUN hub:user/name
  report     judge runs on one page                    rlopt report runs/* --out report.html
  list       what there is to choose from              rlopt list agents

`rlopt COMMAND --help` tells more; `rlopt --version` says which rlopt this is.
"""

TRAIN = """\
Trains an agent in an environment. Every option is KEY=VALUE; without any, SAC learns Pendulum-v1 in about a minute.

  rlopt train agent=sac env=HalfCheetah-v5 seed=3 total_steps=100_000
  rlopt train experiment=sac_hopper_v4               a published result, with its settings
  rlopt train agent.learning_rate=1e-3 env.kwargs.render_mode=null
  rlopt train resume=RUN                             goes on exactly where the run stopped
  rlopt train resume=RUN total_steps=500_000         and further than it was meant to
  rlopt train -m env=Hopper-v5,Ant-v5 seed=0,1,2     six runs, one after the other

`env=` takes any registered Gymnasium id, ALE/Name-v5, or module:Name-v0 (the module is imported first).
`rlopt list` shows the names that agent=, env=, buffer= and experiment= take.
"""

SWEEP = """\
Searches options: trials, each trained with the same seeds, are drawn by TPE (the first one is the settings without a
search), those that lie behind are pruned, and all are ranked by the last evaluations of their seeds. SPACE is a YAML
file of options and where to look for them; what is given beside it is the same for all trials, as in `rlopt train`.

  agent.learning_rate: {low: 1e-4, high: 1e-2, log: true}
  agent.batch_size: {low: 64, high: 256, step: 64}
  agent.network.hidden: {choices: [[64, 64], [256, 256]]}

  rlopt sweep SPACE.yaml experiment=sac_pendulum --trials 40 --seeds 3 --workers 2 --root sweeps/x

The same command goes on where the sweep was stopped or killed, also with more --trials, and joins it from another
machine that sees the folder. Trials are ordinary runs in --root, for `rlopt plot`, `rlopt report`, `rlopt evaluate`;
trials.csv, ranking.md and importance.png lie beside them.
"""

QUEUE = """\
Works through the trainings of a YAML file: experiments with seeds, each in a run folder ROOT/<name>/seed<seed>, its
output in ROOT/logs, as processes of this machine, as jobs of Slurm or as tasks of Ray.

  defaults: {seeds: [0, 1, 2], overrides: [total_steps=100000]}
  jobs:
    - experiment: sac_hopper_v4
    - {name: hopper_rr, experiment: sac_hopper_v4, overrides: [buffer=reshuffled], needs: {gpus: 1, hours: 12}}

  rlopt queue jobs.yaml --root runs/mine --workers 2
  rlopt queue jobs.yaml --root runs/mine --status
  rlopt queue jobs.yaml --root runs/mine --executor slurm --executor-options partition=gpu

All command lines are checked before anything starts. The same command again skips what is finished, goes on with what
was cut off and extends what now asks for more total_steps; a training whose machine or worker is lost goes on elsewhere
from its last checkpoint. Ctrl-C and SIGTERM are passed on: all trainings save and end.
"""

EVALUATE = """\
Evaluates the policy of a run folder or an exported policy folder: mean return over episodes, with its interval.
Without options it repeats the run's last evaluation exactly.
"""

PLOT = """\
Draws learning curves from run folders: runs that differ only in their seed become one curve with an interval, each
environment a panel, with published curves beside them where they are known. Prints the table behind the picture.
"""

EXPORT = """\
Writes the policy of a run folder or a policy folder for programs without rlopt: raw observations in, the most likely
actions out, for any number of rows. torch.export.load(FILE).module() reads what --to torch wrote.
"""

PUSH = """\
Puts the policy of a run folder or a policy folder on a model hub (Hugging Face's, or the one of HF_ENDPOINT): weights,
configuration, curve, and a card with its evaluation, which is measured first, as whoever loads it will measure it.
rlopt.load_policy("hub:user/name") and `rlopt evaluate hub:user/name` take it from there. Needs the extra hub.
"""

REPORT = """\
Writes one page about run folders: whether each experiment= came to what its file expects, interquartile means with
intervals, probability of improvement, performance profiles, learning curves with published ones beside, wall-clock,
versions and the options in which runs differ. An .html file holds everything and loads nothing; .md has its pictures
beside it. Prints the verdicts.
"""

LIST = """\
Shows what can be named: agents, buffers, experiments, environments, networks. A word after the kind filters,
as in `rlopt list envs cheetah`.
"""

TRUST = "import what a run or policy from elsewhere names; your own runs need no such word"

MOST = 10**15
"""The largest number of steps, episodes or points that is taken for one."""
KINDS = ("agents", "buffers", "envs", "experiments", "networks")


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line, with the nearest right word."""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        wrong = message.removeprefix("unrecognized arguments: ").split()[0]
        if message.startswith("unrecognized arguments") and wrong.startswith("-"):
            from rlopt.config import nearest

            near = nearest(wrong, known)
            message = f"{wrong}: no such option; " + (f"did you mean {near}?" if near else f"see `{self.prog} --help`")
        self.exit(2, f"error: {message}\n")


def _command(name: str, module: str, description: str) -> Parser:
    parser = Parser(
        prog=f"rlopt {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="show this help")

    parser.set_defaults(module=module)
    return parser


def _config_dir(parser: Parser, what: str = "(agent/, env/, ...)") -> None:
    parser.add_argument(
        "--config-dir", action="append", default=[], metavar="DIR", help=f"a further folder of config groups {what}"
    )


def train_parser() -> Parser:
    parser = _command("train", "rlopt.cli.train", TRAIN)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options; `rlopt train --options` lists them")
    parser.add_argument(
        "--options", action="store_true", help="list every option of the chosen agent, with help and value"
    )
    parser.add_argument("--print-config", action="store_true", help="print the complete configuration and stop")
    _config_dir(parser)
    parser.add_argument("--trust", action="store_true", help=TRUST)
    parser.add_argument(
        "--without-lost-rows", action="store_true", help="resume although rows of the replay buffer are damaged or gone"
    )
    parser.add_argument("-m", "--multirun", action="store_true", help="run every combination of KEY=A,B,C in turn")
    parser.add_argument("--folder-to", help=argparse.SUPPRESS)  # a file that tells a multirun where its job is
    return parser


def sweep_parser() -> Parser:
    parser = _command("sweep", "rlopt.cli.sweep", SWEEP)
    parser.add_argument("space", metavar="SPACE.yaml", help="the options to search")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options that are the same for all trials")
    parser.add_argument("--trials", type=_at_least_one, default=20, metavar="N", help="trials in all (default: 20)")
    parser.add_argument("--seeds", type=_at_least_one, default=1, metavar="N", help="seeds per trial (default: 1)")
    parser.add_argument(
        "--workers", type=_at_least_one, default=1, metavar="N", help="processes, each with one thread (default: 1)"
    )
    parser.add_argument("--root", metavar="DIR", help="the sweep's folder (default: sweeps/<name of SPACE>)")
    parser.add_argument(
        "--pruner", choices=("median", "percentile", "hyperband", "none"), default="median", help="default: median"
    )
    parser.add_argument(
        "--percentile", type=_per_cent, metavar="P", help="--pruner percentile lets the best P per cent pass (25)"
    )
    parser.add_argument(
        "--prune-after", type=_none_or_more, metavar="STEP", help="of the first seed (default: a third of total_steps)"
    )
    parser.add_argument(
        "--startup",
        type=_none_or_more,
        metavar="N",
        help="whole trials before any is pruned (default: 5)",
    )
    parser.add_argument("--storage", metavar="URL", help="a database of SQLAlchemy (default: sqlite, ROOT/study.db)")
    parser.add_argument(
        "--keep-checkpoints", action="store_true", help="keep replay buffers of trials that are over (default: best/)"
    )
    parser.add_argument("--print", action="store_true", help="print the first trials' commands and stop")
    _config_dir(parser)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # a process of --workers
    return parser


def queue_parser() -> Parser:
    parser = _command("queue", "rlopt.cli.queue", QUEUE)
    parser.add_argument("jobs", metavar="JOBS.yaml", help="the trainings")
    parser.add_argument("--root", metavar="DIR", help="folder of the run folders and logs; all machines must see it")
    parser.add_argument(
        "--workers",
        type=_at_least_one,
        metavar="N",
        help="trainings at a time (default: 2 processes; all with a cluster)",
    )
    parser.add_argument(
        "--executor", choices=("local", "slurm", "ray", "submitit-local"), default="local",
        help="where they run (default: local); submitit-local tries here what slurm would do",
    )  # fmt: skip
    parser.add_argument(
        "--executor-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="slurm: partition, account, qos, time (minutes), mem, gpus_per_node, ... as sbatch; ray: address",
    )  # fmt: skip
    parser.add_argument("--status", action="store_true", help="print how far each training is, and stop")
    parser.add_argument("--check", action="store_true", help="check every command line, and stop")
    parser.add_argument("--script", metavar="FILE.py", help="what trains instead of rlopt train, given the same words")
    _config_dir(parser)
    return parser


def evaluate_parser() -> Parser:
    parser = _command("evaluate", "rlopt.cli.evaluate", EVALUATE)
    parser.add_argument(
        "path",
        metavar="RUN|POLICY",
        help="a run folder (its last policy), a policy folder such as RUN/policy_best, or hub:user/name",
    )
    parser.add_argument(
        "--episodes", type=_at_least_one, metavar="N", help="episodes (default: as many as the run, or 20)"
    )
    parser.add_argument("--env", metavar="ID", help="another environment with the same spaces")
    parser.add_argument("--trust", action="store_true", help=TRUST)
    parser.add_argument(
        "--mode",
        choices=("agent", "deterministic", "sample"),
        default="agent",
        help="take the most likely actions, or samples (default: as in training)",
    )
    parser.add_argument(
        "--epsilon", type=float, metavar="E", help="fraction of actions that are random all the same (default: so too)"
    )
    parser.add_argument(
        "--max-steps", type=_at_least_one, metavar="N", help="cut episodes off after so many steps (default: the run's)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="of the episodes (default: the run's)")
    parser.add_argument("--device", default="cpu", metavar="D", help="where the policy runs (default: cpu)")
    parser.add_argument("--video", metavar="FILE.mp4", help="film the first episode")
    parser.add_argument(
        "--grid",
        nargs="*",
        metavar="NAME=LOW:HIGH",
        help="over a grid of simulator parameters: worst case and mean (default: the run's agent.box)",
    )
    parser.add_argument("--points", type=_at_least_one, metavar="N", help="grid points per parameter (default: 10)")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the returns over the grid")
    parser.add_argument("--json", metavar="FILE.json", help="write the result (-: to the terminal)")
    return parser


def plot_parser() -> Parser:
    parser = _command("plot", "rlopt.cli.plot", PLOT)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", default="curves.png", metavar="FILE", help="png, pdf or svg (default: curves.png)")
    parser.add_argument("--title", metavar="TEXT", help="of the picture")
    parser.add_argument(
        "--at", type=_steps, action="append", metavar="STEP", help="a step to tabulate; may be repeated"
    )
    parser.add_argument("--frames", action="store_true", help="the axis is an Atari game's frames, not steps")
    return parser


def export_parser() -> Parser:
    parser = _command("export", "rlopt.cli.export", EXPORT)
    parser.add_argument("path", metavar="RUN|POLICY", help="a run folder (its last policy), or a policy folder")
    parser.add_argument("--to", choices=("onnx", "torch"), required=True, help="onnx needs the extra export")
    parser.add_argument("--out", metavar="FILE", help="the file (default: policy.onnx or policy.pt2)")
    return parser


def push_parser() -> Parser:
    parser = _command("push", "rlopt.cli.push", PUSH)
    parser.add_argument("path", metavar="RUN|POLICY", help="a run folder (its last policy), or a policy folder")
    parser.add_argument(
        "to", metavar="hub:USER/NAME[@BRANCH]", help="the repository, and a branch of it; made if need be"
    )
    parser.add_argument("--policy", choices=("last", "best"), default="last", help="of a run folder (default: last)")
    parser.add_argument(
        "--episodes", type=_none_or_more, default=20, metavar="N", help="to evaluate (default: 20; 0: no score)"
    )
    parser.add_argument(
        "--video", nargs="?", const=True, default=False, metavar="FILE.mp4", help="show a film; without FILE, make it"
    )
    parser.add_argument("--private", action="store_true", help="a new repository is seen by its owner only")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--dry-run", metavar="FOLDER", help="write what would be pushed into it, and push nothing")
    parser.add_argument("--device", default="cpu", metavar="D", help="where the policy is evaluated (default: cpu)")
    parser.add_argument("--trust", action="store_true", help=TRUST)
    return parser


def report_parser() -> Parser:
    parser = _command("report", "rlopt.cli.report", REPORT)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="html or md (default: report.html)")
    parser.add_argument("--title", metavar="TEXT", help="of the page")
    parser.add_argument(
        "--at", type=_steps, action="append", metavar="STEP", help="a step to compare at; may be repeated"
    )
    _config_dir(parser, "where experiments of your own lie")
    return parser


def list_parser() -> Parser:
    parser = _command("list", "rlopt.cli.listing", LIST)
    parser.add_argument("kind", nargs="?", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("filter", nargs="?", metavar="WORD", help="only names that contain it")
    _config_dir(parser)
    return parser


COMMANDS: dict[str, Callable[[], Parser]] = {
    "train": train_parser,
    "sweep": sweep_parser,
    "queue": queue_parser,
    "evaluate": evaluate_parser,
    "plot": plot_parser,
    "export": export_parser,
    "push": push_parser,
    "report": report_parser,
    "list": list_parser,
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the chosen command's arguments, with ``module``, whose ``run`` is called with them."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(TOP, end="")
        sys.exit(0)
    if argv[0] in ("-V", "--version"):
        print(f"rlopt {rlopt.__version__}")
        sys.exit(0)
    if argv[0] not in COMMANDS:
        from rlopt.config import hint

        advice = f"write rlopt train {argv[0]}" if "=" in argv[0] else hint(argv[0], list(COMMANDS))
        sys.exit(_say(f"error: {argv[0]}: no such command; {advice}"))
    return COMMANDS[argv[0]]().parse_intermixed_args(argv[1:])


def _say(line: str) -> int:
    print(line, file=sys.stderr)
    return 2


def _at_least_one(text: str) -> int:
    number = _steps(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _none_or_more(text: str) -> int:
    if (number := _steps(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return number


def _per_cent(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < 100:
            return number
    raise argparse.ArgumentTypeError(f"must be a number between 0 and 100, got {text}")


def _steps(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (number := float(text)).is_integer():
            if abs(number) > MOST:
                raise argparse.ArgumentTypeError(f"must be at most {MOST:,}, got {text}")
            return int(number)
    raise argparse.ArgumentTypeError(f"expected a whole number, got {text}")
