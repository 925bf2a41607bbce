"""Write the pages that say what files of the repository already say, before the site is built:

    python docs/generate.py && mkdocs build --strict

A page per job from the sections of README.md and CONTRIBUTING.md, a page per example, and a page per folder of
results/. Links between those files become links between pages; a link to a file that is no page becomes its text. No
hook of a site builder is needed.
"""

import argparse
import re
import shutil
from os.path import relpath
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent

# page -> its title, and the sections it is made of
JOBS = {
    "train": ("Train and resume", [("README.md", "Train")]),
    "evaluate": ("Evaluate, plot, export", [("README.md", "Evaluate and plot")]),
    "python": ("From Python", [("README.md", "From Python")]),
    "own_loop": ("Your own loop", [("README.md", "Use it in your own loop"), ("CONTRIBUTING.md", "A loop")]),
    "own_environment": ("Your own environment", [("CONTRIBUTING.md", "An environment"), ("CONTRIBUTING.md", "A team")]),
    "own_agent": ("Your own agent", [("CONTRIBUTING.md", "An agent"), ("CONTRIBUTING.md", "From another package")]),
    "own_sampler": ("Your own sampler", [("CONTRIBUTING.md", "A sampler")]),
    "atari_and_teams": ("Atari and teams", [("README.md", "Atari and teams")]),
    "robust": ("Robust MDPs", [("README.md", "Robust MDPs")]),
    "other_libraries": ("For users of SB3 and TorchRL", [("README.md", "In other people's code")]),
}
COPIED = (".png", ".csv", ".md", ".json", ".yaml")  # what a page of results may link to beside itself
FENCE = re.compile(r"(^```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def sections(text: str) -> dict[str, str]:
    """Return what stands under each heading of the second level; a # inside a code block is no heading."""
    found: dict[str, str] = {}
    name = ""
    for piece in FENCE.split(text):
        if piece.startswith("```"):
            found[name] = found.get(name, "") + piece
            continue
        for line in piece.splitlines(keepends=True):
            if line.startswith("## "):
                name, line = line[3:].strip(), ""
            found[name] = found.get(name, "") + line
    return found


class Site:
    """Writes pages below ``out`` and knows which file of the repository became which page."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.pages = {"results": "results/index.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
        self.pages |= {"CONTRIBUTING.md": "jobs/own_agent.md"}
        self.results = sorted(path.parent.name for path in (ROOT / "results").glob("*/README.md"))
        for name in self.results:
            self.pages |= dict.fromkeys((f"results/{name}", f"results/{name}/README.md"), f"results/{name}/index.md")
        self.examples = sorted((ROOT / "examples").glob("*.py"))
        self.pages |= {f"examples/{path.name}": f"examples/{path.stem}.md" for path in self.examples}

    def write(self, page: str, text: str, source: str) -> None:
        """Write ``text``, which stood in the file ``source``, as ``page``."""
        pieces = FENCE.split(text)
        pieces = [p if p.startswith("```") else LINK.sub(lambda m: self.link(m, page, source), p) for p in pieces]
        path = self.out / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(pieces), encoding="utf-8")

    def link(self, match: re.Match[str], page: str, source: str) -> str:
        """Return a link of ``source`` as it must be in ``page``."""
        picture, label, target = match.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        full = (ROOT / source).parent.joinpath(target.split("#")[0]).resolve()
        if not full.exists():
            raise SystemExit(f"{source} links to {target}, which is not there")
        name = full.relative_to(ROOT).as_posix()
        there = self.pages.get(name)
        if there is None and name.startswith("results/") and full.suffix in COPIED:
            there = name
            (self.out / there).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(full, self.out / there)
        if there is None:
            return label
        return f"{picture}[{label}]({relpath(there, PurePosixPath(page).parent)})"

    def jobs(self) -> None:
        texts = {name: sections((ROOT / name).read_text("utf-8")) for name in ("README.md", "CONTRIBUTING.md")}
        for page, (title, parts) in JOBS.items():
            text = f"# {title}\n"
            for source, section in parts:
                text += (f"\n## {section}\n" if len(parts) > 1 else "") + texts[source][section].rstrip() + "\n"
            self.write(f"jobs/{page}.md", text, "README.md")  # both files lie at the root, so links mean the same

    def example_pages(self) -> None:
        listed = ""
        for path in self.examples:
            code = path.read_text("utf-8").rstrip()
            self.write(f"examples/{path.stem}.md", f"# {path.name}\n\n```python\n{code}\n```\n", "README.md")
            listed += f"- [{path.name}](examples/{path.name})\n"
        self.write("examples/index.md", f"# Examples\n\nShort programs to copy.\n\n{listed}", "README.md")

    def result_pages(self) -> None:
        intro = sections((ROOT / "README.md").read_text("utf-8"))["Results"]
        self.write("results/index.md", f"# Results\n{intro}", "README.md")
        for name in self.results:
            source = f"results/{name}/README.md"
            self.write(f"results/{name}/index.md", (ROOT / source).read_text("utf-8"), source)

    def build(self) -> None:
        for folder in ("jobs", "examples", "results"):
            shutil.rmtree(self.out / folder, ignore_errors=True)
        self.jobs()
        self.example_pages()
        self.result_pages()
        self.write("changelog.md", (ROOT / "CHANGELOG.md").read_text("utf-8"), "CHANGELOG.md")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder to write pages into")
    Site(parser.parse_args().out).build()
