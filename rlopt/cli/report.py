"""``rlopt report``: what run folders come to, judged, on one page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from rlopt.errors import RloptError
from rlopt.settings import settings_file

if TYPE_CHECKING:  # which imports torch, and no mistake in a word has to wait for it
    from rlopt.analysis.reporting import Preset


def run(arguments: argparse.Namespace) -> int:
    """Write the report, and print its verdicts."""
    if not arguments.out.endswith((".html", ".md")):  # before the pictures are drawn
        raise RloptError(f"--out {arguments.out}: a report is an .html or .md file")
    for folder in arguments.runs:
        settings_file(folder)
    from rlopt.analysis.report_page import write_report
    from rlopt.analysis.reporting import report

    dirs = tuple(arguments.config_dir)
    made = report(
        arguments.runs,
        lambda name: preset(name, dirs),
        title=arguments.title,
        steps=arguments.at,
        one_picture=arguments.out.endswith(".md"),
    )
    try:
        written = write_report(made, arguments.out)
    except OSError as error:
        raise RloptError(f"--out {arguments.out} cannot be written: {error}") from error
    for verdict in made.verdicts:
        print(f"{verdict.status:<7} {verdict.text}")
    print(f"written: {written[0]}" + (f" and {len(written) - 1} pictures" if len(written) > 1 else ""))
    return 0


@cache
def preset(name: str, dirs: Sequence[str] = ()) -> Preset | None:
    """Return what the file of an experiment says; None where there is none. Its settings are None where they cannot be
    resolved here, as without the environment's package."""
    from rlopt.analysis.expected import expected_of
    from rlopt.analysis.reporting import Preset
    from rlopt.analysis.run_results import flatten
    from rlopt.config import to_dict
    from rlopt.training.config_files import config_dirs, group_files
    from rlopt.training.presets import train_config
    from rlopt.training.setup import resolve_config

    file = group_files("experiment", config_dirs(dirs)).get(name)
    if file is None:
        return None
    try:
        settings = flatten(to_dict(resolve_config(train_config({"experiment": name}, dirs))))
    except RloptError:
        settings = None
    return Preset(settings, expected_of(file))
