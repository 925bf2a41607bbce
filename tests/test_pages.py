"""The pages: made from the files of the repository, without a dead link, and built."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType

import pytest

from rlopt.registry import AGENTS, SAMPLERS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """docs/generate.py."""
    spec = importlib.util.spec_from_file_location("generate_pages", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages as Markdown, apart from the checkout."""
    out: Path = tmp_path_factory.mktemp("site") / "build" / "pages"
    maker.Site(out).build()
    return out


@pytest.fixture(scope="module")
def site(pages: Path) -> Path:
    """The site, as ``mkdocs build --strict`` makes it of them."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    folder = pages.parents[1]
    config = (ROOT / "mkdocs.yml").read_text().replace("paths: [.]", f"paths: [{ROOT}]")
    (folder / "mkdocs.yml").write_text(config)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder / "site"],
        cwd=folder, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_every_result_and_example_has_a_page_and_every_link_leads_somewhere(pages: Path) -> None:
    results = {path.parent.name for path in (ROOT / "results").glob("*/README.md")}
    assert {path.parent.name for path in pages.glob("results/*/index.md")} == results
    assert {path.stem for path in pages.glob("examples/*.md")} >= {
        path.stem for ending in ("py", "ipynb") for path in ROOT.glob(f"examples/*.{ending}")
    }
    for page in pages.rglob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        assert "{{" not in text, page
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
            assert "://" in target or (page.parent / target).exists(), f"{page.relative_to(pages)}: {target}"


def test_every_agent_and_sampler_is_on_a_page(pages: Path) -> None:
    told = "".join(page.read_text() for page in (*pages.glob("algorithms/*.md"), *pages.glob("*.md")))
    assert {name for name in AGENTS if not re.search(rf"\b{name}\b", told)} == set()
    replay = (pages / "replay.md").read_text()
    assert {name for name in SAMPLERS if f"`{name}`" not in replay} == set()


def test_what_is_quoted_is_what_the_file_says_without_its_docstring(maker: ModuleType) -> None:
    shown = maker.quoted("rlopt/agents/sac.py", "actor_loss").splitlines()
    source = (ROOT / "rlopt" / "agents" / "sac.py").read_text()
    assert shown[0] == '```python title="rlopt/agents/sac.py"'
    assert "\n".join(shown[-5:-1]) in source
    assert "Return the reparameterised" not in "".join(shown)
    with pytest.raises(SystemExit, match="has no of_no_one"):
        maker.quoted("rlopt/agents/sac.py", "of_no_one")


def test_what_the_pages_are_made_of_is_not_overwritten(maker: ModuleType) -> None:
    with pytest.raises(SystemExit, match="another folder"):
        maker.Site(ROOT / "docs").build()
    assert (ROOT / "docs" / "index.md").is_file()


def test_the_site_builds_without_a_warning(site: Path) -> None:
    assert "fonts.googleapis" not in (site / "index.html").read_text()
    assert "next_log_prob" in (site / "algorithms" / "sac.html").read_text()


PROBE = """<!doctype html><body><script>
(async () => {
  const found = {};
  for (const page of PAGES) {
    const frame = document.createElement("iframe");
    frame.style.cssText = "width: 390px; height: 800px; border: 0";
    frame.src = page;
    await new Promise(done => { frame.onload = done; document.body.append(frame); });
    found[page] = frame.contentDocument.documentElement.scrollWidth;
    frame.remove();
  }
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


class Served(http.server.ThreadingHTTPServer):
    """A folder on the loopback interface, to which a page reports what it found."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
        self.answer = ""
        self.answered = threading.Event()


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Served)
        self.server.answer = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.send_response(204)
        self.end_headers()
        self.server.answered.set()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.slow
def test_no_page_scrolls_sideways_on_a_phone(site: Path) -> None:
    """In headless Chromium, every page in a frame of 390 pixels; one that is made too wide is told."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium")
    (site / "wide.html").write_text("<!doctype html><body><div style='width: 900px'>wide</div>")
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if path.name != "404.html")
    (site / "probe.html").write_text(PROBE.replace("PAGES", json.dumps(pages)))
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    with Served(site) as server, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words += [f"--user-data-dir={profile}", f"http://127.0.0.1:{server.server_port}/probe.html"]
        running = subprocess.Popen([browser, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        answered = server.answered.wait(300)
        running.terminate()
        running.wait(30)
        server.shutdown()
    assert answered, "the browser did not come to an end"
    widths = json.loads(server.answer)
    assert widths.pop("wide.html") > 390
    assert len(widths) > 60
    assert {page: width for page, width in widths.items() if width > 390} == {}
