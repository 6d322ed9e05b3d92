"""The report of a run: one HTML file that needs nothing else and no network."""

import base64
import dataclasses
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from experiments import figures, metrics

# Beyond this an inline drawing slows a phone down: it becomes a picture.
_MAX_SVG = 1_500_000


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the report that the task hands over.

    Attributes:
      title: heading.
      text: plain text; an empty line starts a new paragraph.
      figure: a figure; a transparent one is drawn in the page's own colours, any
        other stands on white.
      table: rows as dicts, whose keys are the columns.
      alt: what the figure shows, for those who cannot see it.
    """

    title: str
    text: str = ""
    figure: Figure | None = None
    table: list[dict] | None = None
    alt: str = ""


def write(workdir: str | os.PathLike, sections: Sequence[Section] = ()) -> Path:
    """Writes `report.html` from what the run left in its workdir.

    Reads `config.json`, `versions.json`, `metrics.jsonl` and `evaluation.json`, each of
    which may be missing. The file appears whole or not at all.

    Args:
      workdir: folder of the run.
      sections: what the task has to show, in this order.

    Returns:
      The path of the report.
    """
    workdir = Path(workdir)
    config = _read_json(workdir / "config.json")
    versions = _read_json(workdir / "versions.json")
    rows = metrics.read_rows(workdir)
    if evaluation := _read_json(workdir / "evaluation.json"):
        row = {"step": evaluation["step"], "split": "test", **evaluation["test"]}
        rows = [*rows, row]
    title = _title(config, workdir)
    body = [
        f"<header><h1>{escape(title)}</h1>{_about(config, versions, rows)}</header>",
        # What is no run has sections alone.
        _key_figures(rows) if rows or not sections else "",
        _curves(rows),
        *(_section(section) for section in sections),
        _details("Config", _flatten(config)),
        _details("Versions", versions.items()),
    ]
    page = _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body))
    path = workdir / "report.html"
    with tempfile.NamedTemporaryFile(
        "w", dir=workdir, suffix=".tmp", delete=False, encoding="utf-8"
    ) as file:
        file.write(page)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _title(config: Mapping, workdir: Path) -> str:
    names = [
        part["name"]
        for part in (config.get("model"), config.get("dataset"))
        if isinstance(part, Mapping) and "name" in part
    ]
    return " on ".join(map(str, names)) or workdir.resolve().name


def _about(config: Mapping, versions: Mapping, rows: Sequence[Mapping]) -> str:
    facts = []
    if steps := max((row["step"] for row in rows), default=0):
        facts.append(f"{steps:,} training steps")
    if source := versions.get("dataset_source"):
        facts.append(f"data: {source}")
    if "seed" in config:
        facts.append(f"seed {config['seed']}")
    if "jax" in versions:
        facts.append(f"jax {versions['jax']} on {versions.get('backend', '?')}")
    return f'<p class="about">{escape(" · ".join(facts))}</p>' if facts else ""


def _key_figures(rows: Sequence[Mapping]) -> str:
    for split in ("test", "validation", "train"):
        of_split = [row for row in rows if row.get("split") == split]
        if of_split:
            break
    else:
        return '<p class="empty">No measures have been written yet.</p>'
    last = of_split[-1]
    tiles = "".join(
        f"<div><dt>{escape(_words(name))}</dt><dd>{_cell(last[name])}</dd></div>"
        for name in figures.metric_names([last])
    )
    return (
        f'<section aria-label="Key figures"><h2>{split.capitalize()}, '
        f"step {last['step']:,}</h2><dl>{tiles}</dl></section>"
    )


def _curves(rows: Sequence[Mapping]) -> str:
    counts = {}
    for row in rows:
        for name in figures.metric_names([row]):
            counts.setdefault(name, set()).add(row["step"])
    names = [name for name in figures.metric_names(rows) if len(counts[name]) > 1]
    if not names:
        return ""
    drawings = "".join(
        _drawing(
            figures.training_curves(rows, [name]),
            f"{_words(name)} by training step",
        )
        for name in names
    )
    return f'<section><h2>Training</h2><div class="grid">{drawings}</div></section>'


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    for paragraph in re.split(r"\n\s*\n", section.text.strip()):
        if paragraph:
            parts.append(f"<p>{escape(paragraph)}</p>")
    if section.figure is not None:
        parts.append(_drawing(section.figure, section.alt or section.title))
    if section.table:
        parts.append(_table(section.table, section.title))
    return f"<section>{''.join(parts)}</section>"


def _drawing(figure: Figure, alt: str) -> str:
    width = figure.get_size_inches()[0]
    transparent = figure.get_facecolor()[3] == 0
    svg = _svg(figure)
    if len(svg) <= _MAX_SVG:
        if transparent:
            svg = svg.replace(figures.INK, "currentColor")
        picture = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ')
    else:
        transparent = False
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, facecolor="white")
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
    paper = "" if transparent else ' class="paper"'
    return f'<figure{paper} style="max-width: {width * 1.2:.2f}in">{picture}</figure>'


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # Equal drawings give equal bytes; and ids differ between drawings, as they are
    # made from the content.
    with matplotlib.rc_context({"svg.hashsalt": "archs"}):
        figure.savefig(
            buffer,
            format="svg",
            dpi=200,
            facecolor=figure.get_facecolor(),
            metadata={"Date": None},
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    # The page scales the drawing by its view box.
    head, tail = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f"{head}>{tail}"


def _table(rows: Sequence[Mapping], label: str) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    # A column of numbers stands to the right, its heading too.
    align = {
        column: ' class="number"'
        if all(_is_number(row.get(column, 0)) or row[column] is None for row in rows)
        else ""
        for column in columns
    }
    head = "".join(
        f'<th scope="col"{align[column]}>{escape(_words(column))}</th>'
        for column in columns
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{align[c]}>{_cell(row.get(c))}</td>" for c in columns)
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _details(title: str, items: Iterable[tuple[str, object]]) -> str:
    lines = "".join(
        f"<tr><th scope=row>{_breakable(name)}</th><td>{escape(_plain(value))}</td>"
        "</tr>"
        for name, value in items
    )
    if not lines:
        return ""
    return (
        f'<details><summary>{title}</summary><table class="fields"><tbody>{lines}'
        "</tbody></table></details>"
    )


def _flatten(config: Mapping, prefix: str = "") -> Iterable[tuple[str, object]]:
    """The fields as the command line names them: `model.head.dropout_rate`."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _breakable(name: str) -> str:
    return re.sub(r"([._])", r"\1<wbr>", escape(str(name)))


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _words(name: str) -> str:
    return str(name).replace("_", " ")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if not _is_number(value):
        return escape(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --page: #ffffff; --card: #f6f8fa;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117; --card: #161b22;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: break-word;
}
main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; }
p { max-width: 42rem; white-space: pre-line; }
.about, .empty, dt { color: var(--soft); }
.about { font-size: .9rem; margin: 0; }
dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr));
  gap: .5rem; margin: 0;
}
.grid > figure { margin: 0; }
dl > div { background: var(--card); border-radius: 8px; padding: .6rem .75rem; }
dt { font-size: .8rem; line-height: 1.3; }
dd { margin: .15rem 0 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.grid {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
  gap: 1rem 1.5rem;
}
figure { margin: 0 0 1rem; }
figure svg, figure img { display: block; width: 100%; height: auto; }
figure.paper { background: #fff; color: #000; padding: .5rem; border-radius: 8px; }
/* A shadow at an edge beyond which there is more of the table. */
.scroll {
  overflow-x: auto; width: fit-content; max-width: 100%; margin: .75rem 0;
  background:
    linear-gradient(to right, var(--page) 30%, transparent) left / 3rem 100% local,
    linear-gradient(to left, var(--page) 30%, transparent) right / 3rem 100% local,
    linear-gradient(to right, var(--line), transparent) left / .75rem 100% scroll,
    linear-gradient(to left, var(--line), transparent) right / .75rem 100% scroll;
  background-repeat: no-repeat;
}
table { border-collapse: collapse; font-size: .9rem; }
th, td {
  text-align: left; padding: .35rem .75rem .35rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line);
}
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td:first-child { min-width: 8rem; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
details { border-top: 1px solid var(--line); padding: .75rem 0; }
details:first-of-type { margin-top: 2.5rem; }
summary { cursor: pointer; font-weight: 600; }
.fields { margin: .5rem 0; width: 100%; table-layout: fixed; }
.fields th { font-weight: 400; color: var(--soft); width: 45%; }
.fields td, .fields th { overflow-wrap: anywhere; font-family: ui-monospace, monospace;
  font-size: .8rem; }
"""
