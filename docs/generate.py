"""Write the pages from docs/ and from what other files of the repository already say, before the site is built:

    python docs/generate.py && mkdocs build --strict

Every Markdown file of docs/ is a page. In it a line of its own ``{{ word … }}`` stands for what is quoted, so that no
page can say other things than the code does:

    {{ code rlopt/agents/sac.py critic_loss }}     the lines of a function, class or Class.method, without its docstring
    {{ options sac }}                              the options of an agent, from its class and its presets
    {{ presets c51 rainbow }}                      what agents of one class set beforehand
    {{ sampler prioritized }}                      those of a sampler
    {{ settings rlopt.nn:OptimiserConfig }}        those of any class of options
    {{ section README.md Train/Resume }}           a section, or what stands below one of its bold words
    {{ measured }}                                 what the benchmarks of results/ have measured, as one table

To these come a page per example and a page per folder of results/. Links between files become links between pages; a
link to a file that is no page becomes its text. No hook of a site builder is needed.
"""

import argparse
import ast
import base64
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from os.path import normpath, relpath
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
COPIED = (".png", ".csv", ".md", ".json", ".yaml")  # what a page of results may link to beside itself
FENCE = re.compile(r"(^ *```.*?^ *```[^\n]*$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
QUOTE = re.compile(r"^\{\{ (\w+) ?(.*?) \}\}$", re.MULTILINE)
LEAD = re.compile(r"^\*\*([^*]+)\.\*\*", re.MULTILINE)  # the bold words with which a part of a section begins
RATIO = re.compile(r"^- (.+) / (.+?)(?:: | = )(\d+\.\d+)(?: \(target (?:at least )?([\d.]+)[^)]*\))?$", re.MULTILINE)
HARDWARE = re.compile(r"(?:[Oo]ne|[Tt]wo|[a-z]*\s?2-core|[Hh]ardware:)[^.;:,]*x86-64[^.;:,]*|[^.;:,]*H200[^.;:,]*")
SHARED = ("AgentConfig", "LearnerConfig", "ReplayAgentConfig", "NetworkConfig", "OptimiserConfig")


def sections(text: str) -> dict[str, str]:
    """Return what stands under each heading of the second level, up to the first bold words that begin a paragraph, and
    under ``heading/bold words`` what stands there; a # inside a code block is no heading."""
    found: dict[str, str] = {}
    name = ""
    for piece in FENCE.split(text):
        if piece.startswith("```"):
            found[name] = found.get(name, "") + piece
            continue
        for line in piece.splitlines(keepends=True):
            if line.startswith("## "):
                name, line = line[3:].strip(), ""
            elif lead := LEAD.match(line):
                name = f"{name.partition('/')[0]}/{lead[1]}"
            found[name] = found.get(name, "") + line
    return found


def quoted(path: str, name: str) -> str:
    """Return the lines of what ``name`` (``function``, ``Class`` or ``Class.method``) is in a file, without its
    docstring."""
    text = (ROOT / path).read_text("utf-8")
    node: ast.AST = ast.parse(text)
    for word in name.split("."):
        found = [n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == word]
        if not found:
            raise SystemExit(f"{path} has no {name}; put the name right in the page that quotes it")
        node = found[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    first, lines = node.lineno, text.splitlines()
    last = node.end_lineno or first
    gone: range = range(0)
    if ast.get_docstring(node) is not None:
        doc = node.body[0]
        gone = range(doc.lineno, (doc.end_lineno or doc.lineno) + 1)
    kept = "\n".join(line for i, line in enumerate(lines[first - 1 : last], first) if i not in gone)
    return f'```python title="{path}"\n{textwrap.dedent(kept)}\n```'


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def option_table(rows: Iterable[tuple[str, str, str]]) -> str:
    lines = ["| option | default | what it does |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | `{cell(value)}` | {cell(text)} |" for name, value, text in rows)])


def options(name: str) -> str:
    """Return the options of the agent called ``name``: its own, and folded away those that many agents have."""
    from rlopt.cli.options import option_rows
    from rlopt.config import build
    from rlopt.registry import agent_presets, get_agent

    cls = get_agent(name).config_class
    presets = agent_presets(name)
    rows = list(option_rows(build(cls, presets.get("agent", {})), "agent", skip=("name",)))
    owner = {}
    for base in reversed(cls.__mro__):
        owner |= dict.fromkeys(inspect.get_annotations(base), base.__name__)
    shared = [row for row in rows if "." in row[0][6:] or owner[row[0][6:]] in SHARED]
    text = option_table(row for row in rows if row not in shared)
    if "buffer" in presets:
        given = " ".join(f"buffer.{key}={value}" for key, value in presets["buffer"].items())
        text += f"\n\nWith it comes `{given.replace('buffer.name', 'buffer')}`."
    folded = textwrap.indent(option_table(shared), "    ")
    return f'{text}\n\n??? note "Options that many agents have, with the defaults of agent={name}"\n\n{folded}'


def presets(names: str) -> str:
    """Return what the agents of these ``names`` set beforehand."""
    from rlopt.registry import agent_presets

    lines = ["| agent | sets |", "|---|---|"]
    for name in names.split():
        words = []
        for group, given in agent_presets(name).items():
            words += [f"{group}.{key}={value}" for key, value in flat(given)]
        told = " ".join(f"`{word.replace('buffer.name', 'buffer')}`" for word in words)
        lines.append(f"| `{name}` | {told} |")
    return "\n".join(lines)


def flat(given: Mapping[str, object], where: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted names and values of nested options, as a command line has them."""
    for key, value in given.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{where}{key}.")
        else:
            yield where + key, str(value).lower() if isinstance(value, bool) else str(value)


def settings(target: str) -> str:
    """Return the options of the dataclass ``module:Class``."""
    from rlopt.cli.options import option_rows

    module, _, name = target.partition(":")
    return option_table(option_rows(getattr(importlib.import_module(module), name)(), ""))


def sampler(name: str) -> str:
    """Return the options of the sampler called ``name``."""
    from rlopt.cli.options import option_rows
    from rlopt.config import with_arguments
    from rlopt.loops.configuration import BufferConfig
    from rlopt.registry import get_sampler

    made = with_arguments(BufferConfig, get_sampler(name))
    own = {f for f in made.__dataclass_fields__ if f not in BufferConfig.__dataclass_fields__}
    return option_table(row for row in option_rows(made(name=name), "buffer") if row[0][7:] in own)


def measured() -> str:
    """Return one table of what the folders of results/ measured as a ratio."""
    lines = ["| measured | ratio | asked | on | date |", "|---|---|---|---|---|"]
    for path in sorted((ROOT / "results").glob("*/README.md")):
        text = path.read_text("utf-8")
        title = text.splitlines()[0].removeprefix("# ")
        where = HARDWARE.search(" ".join(text.split()))
        hardware = "" if where is None else re.sub(r"^(Hardware: )?(on )?(a |an )?", "", where[0].strip())
        for left, right, ratio, target in RATIO.findall(text):
            what = cell(f"[{title}](../results/{path.parent.name}/README.md): {left} / {right}")
            lines.append(f"| {what} | {ratio} | {target} | {hardware} | {changed(path)} |")
    return "\n".join(lines)


def changed(path: Path) -> str:
    """Return the day of the last commit that changed the table beside ``path``; nothing outside of a checkout."""
    files = [str(file) for file in path.parent.glob("*.csv")] or [str(path)]
    command = ["git", "log", "-1", "--format=%cs", "--", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


class Site:
    """Writes pages below ``out`` and knows which file of the repository became which page."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.pages = {"results": "results/index.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
        self.pages |= {"CONTRIBUTING.md": "jobs/own_agent.md", "examples": "examples/index.md"}
        self.results = sorted(path.parent.name for path in (ROOT / "results").glob("*/README.md"))
        for name in self.results:
            self.pages |= dict.fromkeys((f"results/{name}", f"results/{name}/README.md"), f"results/{name}/index.md")
        self.examples = sorted((ROOT / "examples").glob("*.py"))
        self.notebooks = sorted((ROOT / "examples").glob("*.ipynb"))
        self.pages |= {f"examples/{path.name}": f"examples/{path.stem}.md" for path in self.examples + self.notebooks}

    def write(self, page: str, text: str, source: str) -> None:
        """Write ``text``, which stood in the file ``source``, as ``page``."""
        path = self.out / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.linked(text, page, source), encoding="utf-8")

    def linked(self, text: str, page: str, source: str) -> str:
        """Return text of ``source`` with the links that it must have in ``page``, and what it quotes."""
        pieces = []
        for piece in FENCE.split(text):
            if re.match(" *```", piece):
                pieces.append(piece)
                continue
            linked = LINK.sub(lambda m: self.link(m, page, source), piece)
            pieces.append(QUOTE.sub(lambda m: self.quote(m, page), linked))
        return "".join(pieces)

    def quote(self, match: re.Match[str], page: str) -> str:
        word, rest = match.groups()
        if word == "code":
            return quoted(*rest.split())
        if word == "section":
            source, _, name = rest.partition(" ")
            found = sections((ROOT / source).read_text("utf-8"))
            if name not in found:
                raise SystemExit(f"{source} has no section {name}, which {page} quotes")
            told = LEAD.sub("", found[name].strip(), count=1).strip()  # a heading of the page says those bold words
            return self.linked(told, page, source)
        makers = {"options": options, "presets": presets, "sampler": sampler, "settings": settings}
        if word in makers:
            return makers[word](rest)
        if word == "measured":
            return self.linked(measured(), page, "docs/index.md")
        raise SystemExit(f"{page}: there is no {{{{ {word} }}}}")

    def link(self, match: re.Match[str], page: str, source: str) -> str:
        """Return a link of ``source`` as it must be in ``page``."""
        picture, label, target = match.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        file, _, anchor = target.partition("#")
        name = normpath(PurePosixPath(source).parent / file)
        if picture and not (ROOT / name).exists() and (self.out / page).with_name(file).is_file():
            return match[0]  # out of a notebook
        if name.startswith("docs/"):
            there: str | None = name.removeprefix("docs/")
        elif not (ROOT / name).exists():
            raise SystemExit(f"{source} links to {target}, which is not there")
        else:
            there = self.pages.get(name)
            if there is None and name.startswith("results/") and Path(name).suffix in COPIED:
                there = name
                (self.out / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.out / name)
        if there is None:
            return label
        return f"{picture}[{label}]({relpath(there, PurePosixPath(page).parent)}{'#' + anchor if anchor else ''})"

    def own_pages(self) -> None:
        for path in sorted(DOCS.rglob("*")):
            name = path.relative_to(DOCS).as_posix()
            if path.suffix == ".md":
                self.write(name, path.read_text("utf-8"), f"docs/{name}")
            elif path.is_file() and path.suffix in (".png", ".css"):
                (self.out / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, self.out / name)

    def example_pages(self) -> None:
        listed = ""
        for path in self.examples:
            code = path.read_text("utf-8").rstrip()
            told = (ast.get_docstring(ast.parse(code)) or "").partition("\n\n")[0].replace("\n", " ")
            self.write(f"examples/{path.stem}.md", f"# {path.name}\n\n```python\n{code}\n```\n", "README.md")
            listed += f"- [{path.name}](examples/{path.name}): {told}\n"
        books = [f"- [{path.name}](examples/{path.name}): {self.notebook_page(path)}\n" for path in self.notebooks]
        notebooks = f"## Notebooks\n\nWith what they print and draw.\n\n{''.join(books)}" if books else ""
        self.write("examples/index.md", f"# Examples\n\nShort programs to copy.\n\n{listed}\n{notebooks}", "README.md")

    def notebook_page(self, path: Path) -> str:
        """Write an executed notebook as a page, its pictures beside it, and return its first sentence."""
        cells = json.loads(path.read_text("utf-8"))["cells"]
        text, pictures = "", 0
        for cell in cells:
            source = "".join(cell["source"])
            text += f"{source}\n\n" if cell["cell_type"] == "markdown" else f"```python\n{source}\n```\n\n"
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if "image/png" in data:
                    name, pictures = f"{path.stem}-{pictures}.png", pictures + 1
                    (self.out / "examples").mkdir(parents=True, exist_ok=True)
                    (self.out / "examples" / name).write_bytes(base64.b64decode(data["image/png"]))
                    text += f"![what the cell draws]({name})\n\n"
                elif output.get("name") != "stderr":
                    said = "".join(output.get("text") or data.get("text/plain", []))
                    text += f"```text\n{said.rstrip()}\n```\n\n"
        self.write(f"examples/{path.stem}.md", text, f"examples/{path.name}")
        return "".join(cells[0]["source"]).split("\n\n")[1].partition(". ")[0] + "."

    def result_pages(self) -> None:
        for name in self.results:
            source = f"results/{name}/README.md"
            self.write(f"results/{name}/index.md", (ROOT / source).read_text("utf-8"), source)

    def build(self) -> None:
        if DOCS.resolve().is_relative_to(self.out.resolve()):
            raise SystemExit(f"{self.out} holds what the pages are made from; give another folder")
        shutil.rmtree(self.out, ignore_errors=True)
        self.own_pages()
        self.example_pages()
        self.result_pages()
        self.write("changelog.md", (ROOT / "CHANGELOG.md").read_text("utf-8"), "CHANGELOG.md")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # a checkout that is not installed
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = ROOT / "build" / "pages"
    parser.add_argument("--out", type=Path, default=where, help="folder to write pages into; emptied before")
    Site(parser.parse_args().out).build()
