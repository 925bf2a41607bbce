"""The pages: generated from the files of the repository, without a dead link, and built."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """What is written by hand and what is generated, apart from the checkout."""
    out = tmp_path / "docs"
    generated = shutil.ignore_patterns("jobs", "examples", "results", "changelog.md")
    shutil.copytree(ROOT / "docs", out, ignore=generated)
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--out", out],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def test_every_result_and_example_has_a_page_and_every_link_leads_somewhere(pages: Path) -> None:
    results = {path.parent.name for path in (ROOT / "results").glob("*/README.md")}
    assert {path.parent.name for path in pages.glob("results/*/index.md")} == results
    assert {path.stem for path in pages.glob("examples/*.md")} >= {path.stem for path in ROOT.glob("examples/*.py")}
    for page in pages.rglob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
            assert "://" in target or (page.parent / target).exists(), f"{page.relative_to(pages)}: {target}"


def test_the_site_builds_without_a_warning(pages: Path, tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    config = (ROOT / "mkdocs.yml").read_text().replace("paths: [.]", f"paths: [{ROOT}]")
    (tmp_path / "mkdocs.yml").write_text(config)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=tmp_path, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    start = (tmp_path / "site" / "index.html").read_text()
    assert "fonts.googleapis" not in start
    assert "critic_loss" in (tmp_path / "site" / "algorithms" / "sac.html").read_text()
