"""A report as one HTML page that needs no network, or as Markdown with its pictures beside it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from rlopt.analysis.figures import save_figure
from rlopt.analysis.reporting import Picture, Report, Section, Table, Verdict
from rlopt.types import RloptError

ENDINGS = (".html", ".md")
_MARKS = {"inside": "✓", "below": "✗", "above": "↑", "open": "\N{EN DASH}", "other": "≠"}
_STYLE = """
:root { color-scheme: light; --ink: #1c2127; --soft: #5b6570; --line: #e1e5ea; --back: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p { max-width: 62rem; margin: .4rem 0 .8rem; } .soft { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .9rem; margin-top: .75rem; }
a { color: #0060a0; }
.verdicts { list-style: none; margin: 0; padding: 0; }
.verdicts li { display: flex; gap: .75rem; align-items: baseline; padding: .5rem .75rem; margin: .35rem 0;
  background: var(--back); border-left: 5px solid #9aa4af; border-radius: 3px; overflow-wrap: anywhere; }
.verdicts b { flex: 0 0 1.1rem; text-align: center; }
.inside { border-color: #009e73 !important; } .inside b { color: #00785a; }
.below { border-color: #d55e00 !important; } .below b { color: #b34f00; }
.above { border-color: #0072b2 !important; } .above b { color: #0072b2; }
.other { border-color: #e69f00 !important; } .other b { color: #8a6000; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 100%; max-width: 46rem; height: auto; display: block; }
.scroll { overflow-x: auto; margin: .6rem 0; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .32rem .8rem .32rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; } td { max-width: 30rem; overflow-wrap: break-word; }
td.tight { white-space: nowrap; }
code { font-size: .92em; background: var(--back); padding: 0 .2em; border-radius: 3px; }
details { margin: .6rem 0; } summary { cursor: pointer; color: #0060a0; }
@media print { nav { display: none; } details > * { display: block; } }
"""


def write_report(found: Report, out: str | Path) -> list[Path]:
    """Write a report to ``out``, and return the files: one ``.html``, or a ``.md`` and its pictures as PNG.

    Raises:
        RloptError: the name ends otherwise.
        OSError: it cannot be written.
    """
    path = Path(out)
    if path.suffix not in ENDINGS:
        raise RloptError(f"{str(out)!r} is no report's name; name an .html or .md file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        path.write_text(as_html(found), encoding="utf-8")
        return [path]
    written = [path]
    for picture in (picture for section in found.sections for picture in section.pictures):
        save_figure(picture.figure, path.with_name(_file(path, picture)))
        written.append(path.with_name(_file(path, picture)))
    path.write_text(as_markdown(found, path), encoding="utf-8")
    return written


def as_html(found: Report) -> str:
    """Return one page. Whatever a run folder says is shown as text, and the page may load nothing from anywhere."""
    links = "".join(f'<a href="#{_anchor(s)}">{escape(s.title)}</a>' for s in found.sections)
    body = "".join(_section(section) for section in found.sections)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(found.title)}</title><style>{_STYLE}</style></head>\n<body><main>"
        f'<h1>{escape(found.title)}</h1><p class="soft">{escape(found.about)}</p><nav>{links}</nav>\n'
        f"{body}</main></body></html>\n"
    )


def as_markdown(found: Report, path: Path) -> str:
    """Return the text of a Markdown file at ``path``, whose pictures lie beside it."""
    parts = [f"# {_plain(found.title)}", _plain(found.about)]
    for section in found.sections:
        parts.append(f"## {section.title}")
        if section.text:
            parts.append(section.text)
        if section.verdicts:
            parts.append("\n".join(f"- {_MARKS[v.status]} {_plain(v.text)}" for v in section.verdicts))
        parts += [f"![{_plain(p.alt)}]({_file(path, p)})" for p in section.pictures]
        parts += [_markdown_table(table) for table in section.tables]
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> str:
    parts = [f'<section id="{_anchor(section)}"><h2>{escape(section.title)}</h2>']
    if section.text:
        parts.append(f"<p>{_inline(section.text)}</p>")
    if section.verdicts:
        parts.append(f'<ul class="verdicts">{"".join(map(_verdict, section.verdicts))}</ul>')
    if section.pictures:
        parts.append(f'<div class="pictures">{"".join(map(_picture, section.pictures))}</div>')
    parts += map(_table, section.tables)
    return "".join(parts) + "</section>\n"


def _verdict(verdict: Verdict) -> str:
    mark = f'<b title="{verdict.status}">{_MARKS[verdict.status]}</b>'
    return f'<li class="{verdict.status}">{mark}<span>{escape(verdict.text)}</span></li>'


def _picture(picture: Picture) -> str:
    data = base64.b64encode(svg(picture.figure)).decode()
    return f'<figure><img alt="{escape(picture.alt)}" src="data:image/svg+xml;base64,{data}"></figure>'


def svg(figure: Figure) -> bytes:
    """Return a picture as SVG, the same bytes every time."""
    stream = io.BytesIO()
    with rc_context({"svg.hashsalt": "rlopt"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    made = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<details><summary>{escape(table.folded)}</summary>{made}</details>" if table.folded else made


def _cell(text: str) -> str:
    return f"<td{'' if len(text) > 34 else ' class=tight'}>{escape(text)}</td>"


def _markdown_table(table: Table) -> str:
    lines = [_row(table.head), "|" + "---|" * len(table.head), *map(_row, table.rows)]
    text = "\n".join(lines)
    return f"<details><summary>{table.folded}</summary>\n\n{text}\n\n</details>" if table.folded else text


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """Return what a run folder says as text of Markdown: no tags, links or line breaks of its own."""
    return re.sub(r"([\[\]`*_\\])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _anchor(section: Section) -> str:
    return section.title.lower().replace(" ", "-")


def _file(path: Path, picture: Picture) -> str:
    return f"{path.stem}-{re.sub(r'[^A-Za-z0-9.]+', '-', picture.name).strip('-')}.png"
