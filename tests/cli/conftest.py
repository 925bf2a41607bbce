"""A short run for the commands to work on."""

from pathlib import Path

import pytest

from rlopt.cli import main
from tests.cli.command_line import SHORT


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", *SHORT, f"run_dir={folder}"]) == 0
    return folder
