"""The page of `gap-ds report`: HTML that needs no network, no script and no other file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from gap_ds._version import __version__


@dataclass(frozen=True)
class Picture:
    """A drawn picture of one run, or of all (`run` is None), and its file beside the page."""

    run: str | None
    title: str
    caption: str
    file: str
    png: bytes


def html(runs: Sequence[Mapping[str, Any]], scores: Mapping[str, str], pictures: Sequence[Picture]) -> str:
    """The page, from the figures of the runs, the names of the scores that any has, and the pictures."""
    title = f"gap_ds report: {len(runs)} runs" if len(runs) > 1 else f"gap_ds report: {runs[0]['name']}"
    parts = [f"<h1>{escape(title)}</h1>", _table(runs, scores)]
    if len(runs) > 1:
        parts.append('<section id="all"><h2>All runs</h2>')
        parts += [_figure(picture) for picture in pictures if picture.run is None]
        parts.append("</section>")
    for i, run in enumerate(runs):
        parts.append(f'<section id="run-{i}"><h2>{escape(run["name"])}</h2>')
        parts.append(f"<p>{_sentence(run)}</p>")
        if run["signature"]:
            parts.append(f'<p class="signature"><code>{escape(run["signature"])}</code></p>')
        parts += [_figure(picture) for picture in pictures if picture.run == run["name"]]
        if run["missing"]:
            rows = "".join(f"<li>{escape(text)}</li>" for text in run["missing"])
            parts.append(f'<p>Not shown:</p><ul class="missing">{rows}</ul>')
        parts.append("</section>")
    body = "\n".join(parts)
    # The policy holds even where a run's name or signature should get something past the escaping.
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer>gap_ds {__version__}</footer>\n</main>\n</body>\n</html>\n"
    )


def _table(runs: Sequence[Mapping[str, Any]], scores: Mapping[str, str]) -> str:
    headings = ["run", "method", "steps", "entries pruned", "model pruned", "mean density", "training FLOPs"]
    headings += ["validation loss", *scores.values(), "training time"]
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    rows = []
    for i, run in enumerate(runs):
        cells = [
            run["method"] or "",
            "" if run["steps"] is None else f"{run['steps']:,}{'' if run['finished'] else ' so far'}",
            _percent(run["entry_sparsity"]),
            _percent(run["model_sparsity"]),
            _number(run["mean_density"], 3),
            _number(run["training_flops"], 2),
            _number(run["validation_loss"], 3),
            *(_number(run["scores"].get(key), 2) for key in scores),
            _duration(run["train_seconds"]),
        ]
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row"><a href="#run-{i}">{escape(run["name"])}</a></th>{row}</tr>')
    caption = "FLOPs are of products with weights, relative to dense training of the same length."
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f'<p class="note">{caption}</p>'
    )


def _sentence(run: Mapping[str, Any]) -> str:
    """The run's main figures in words."""
    if run["steps"] is None:
        return "Nothing has been recorded yet."
    text = f"{run['steps']:,} applied steps" + ("." if run["finished"] else " so far; the run is not over.")
    if run["validation_loss"] is not None:
        text += f" Last validation loss {run['validation_loss']:.3f}."
    if run["density_of_entries"] is not None:
        lowest, highest = run["density_of_entries"]
        same = f"{lowest:.3f}" == f"{highest:.3f}"
        text += (
            f" Every entry ends with density {lowest:.3f}."
            if same
            else (f" The entries end with densities from {lowest:.3f} to {highest:.3f}.")
        )
    return escape(text)


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    whose = f" of {picture.run}" if picture.run else ""
    alt = escape(f"{picture.title}{whose}", quote=True)
    return (
        f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(picture.caption)} <span>{escape(picture.file)}</span></figcaption></figure>"
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _duration(seconds: float | None) -> str:
    """Seconds as people say them.

    >>> _duration(None), _duration(42.4), _duration(897.4), _duration(7265)
    ('', '42 s', '15 min', '2 h 1 min')
    """
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1f2328; font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid #d8dce0;
  overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .55rem; text-align: right; border-bottom: 1px solid #e4e6e8; }
thead th { vertical-align: bottom; font-weight: 600; border-bottom: 2px solid #9aa0a6; }
th:first-child { text-align: left; }
tbody th { font-weight: 500; white-space: nowrap; }
td:nth-child(2) { text-align: left; }
a { color: #0b4f8a; }
.signature { overflow-wrap: anywhere; font-size: .8rem; color: #57606a; margin: .25rem 0 1rem; }
figure { margin: 1.25rem 0 1.75rem; }
img { display: block; width: 100%; height: auto; }
figcaption, .note, footer { font-size: .85rem; color: #57606a; }
figcaption span { font-family: ui-monospace, monospace; font-size: .78rem; margin-left: .4rem; }
.missing { color: #57606a; font-size: .9rem; }
footer { margin-top: 3rem; }
@media print { figure { break-inside: avoid; } }
"""
