"""What answers at once: help, listings and mistakes in words import no torch."""

from __future__ import annotations

from pathlib import Path

from tests.cli.command_line import python

WORDS = [
    ["--help"],
    ["train", "--help"],
    ["trian"],
    ["list", "agents"],
    ["train", "--multrun"],
    ["train", "agent=sca"],
    ["train", "buffer=unifrm"],
    ["train", "experiment=sac_hoper_v4"],
    ["train", "seed"],
    ["train", "seed=1,2"],
    ["train", "resume=nowhere"],
    ["train", "--config-dir", "nowhere"],
    ["sweep", "--help"],
    ["sweep", "nowhere.yaml"],
]


def test_help_and_mistakes_in_words_import_no_torch(tmp_path: Path) -> None:
    """One process for all of them, as it is the modules that count."""
    code = (
        "import sys\nfrom rlopt.cli import main\n"
        f"for words in {WORDS!r}:\n"
        "    main(words)\n"
        "    if {'torch', 'gymnasium', 'numpy'} & set(sys.modules):\n"
        "        sys.exit(' '.join(words) + ' imports torch, Gymnasium or NumPy')\n"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == 10
