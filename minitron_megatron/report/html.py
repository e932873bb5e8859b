"""Pieces of the report pages: sections, tables, figures, and the page itself."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from .plots.charts import CHARTS

__all__ = ["figure", "section", "table", "warning_box", "whole_page"]

SHOWN = 'class="charts"'


def figure(path: Path, caption: str) -> str:
    """Return a PNG with its caption, which is its text for screen readers too; the page needs no other file.

    Where its charts stand beside it (`report/plots/charts.py`), they are shown in its place by a browser that runs
    scripts: with the values under the pointer, and wide enough for a phone.
    """
    told = escape(caption)
    source = f"data:image/png;base64,{b64encode(path.read_bytes()).decode()}"
    image = f'<div class="scroll" tabindex="0"><img src="{source}" alt="{told}"></div>'
    beside = path.with_suffix(CHARTS)
    charts = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else []
    if charts:
        data = json.dumps(charts).replace("<", "\\u003c")
        image = (
            f'<div {SHOWN} role="img" aria-label="{told}"><script type="application/json">{data}</script></div>{image}'
        )
    return f"<figure>{image}<figcaption>{told}</figcaption></figure>"


def section(title: str, body: str) -> str:
    """Return a titled card; empty without a body."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n" if body else ""


def warning_box(sentences: Sequence[str]) -> str:
    """Return a card of warnings; empty without any."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<section class="warning"><h2>Warnings</h2><ul>{items}</ul></section>\n' if items else ""


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with text in the first column and numbers in the others, which scrolls inside its card; empty
    without rows."""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{whole}</div>' if body else ""


def whole_page(name: str, lead: str, body: str) -> str:
    """Return a page. lead: a sentence under its title; empty: none."""
    told = f'<p class="lead">{escape(lead)}</p>\n' if lead else ""
    script = _SCRIPT.substitute(plotly=_plotly()) if SHOWN in body else ""
    return _PAGE.substitute(name=escape(name), lead=told, body=body or "<p>Nothing here yet.</p>", script=script)


def _plotly() -> str:
    """Return Plotly's JavaScript (4.8 MB), without importing its Python."""
    return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name - minitron report</title>
<style>
:root { color-scheme: light dark; --text: #222; --page: #f6f7f8; --card: #fff; --line: #e3e5e8; --soft: #5f6368;
        --warn: #fff8f0; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #16181b; --card: #202327; --line: #363b41; --soft: #a7adb4; --warn: #33270f; }
}
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.5rem 5rem; color: var(--text); background: var(--page);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0 0 1.5rem; font-size: 1.7rem; overflow-wrap: anywhere; }
h1 small { display: block; color: var(--soft); font-size: 0.9rem; font-weight: normal; }
h2 { margin: 0 0 0.9rem; font-size: 1.15rem; }
section { margin: 0 0 1.25rem; padding: 1.25rem 1.5rem;
          background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
section.warning { background: var(--warn); border-color: #e8a35c; }
.lead { margin: -0.75rem 0 1.5rem; font-size: 1.05rem; }
.scroll { overflow-x: auto; }
section.warning ul { margin: 0; padding-left: 1.2rem; }
table { border-collapse: collapse; font-size: 0.93rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 1.6rem 0.35rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
td { white-space: pre; }
tbody tr:last-child td { border-bottom: 0; }
figure { margin: 1.25rem 0 0; }
section > figure:first-of-type:nth-child(2) { margin-top: 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.chart { margin: 0 0 1.5rem; }
.charts p { margin: 0 0 0.4rem; font-weight: 600; }
.still { display: none; }
figcaption { margin-top: 0.4rem; color: var(--soft); font-size: 0.87rem; }
pre { margin: 0; overflow-x: auto; font: 0.85rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
@media (max-width: 40rem) {
  body { padding: 1.25rem 0.75rem 3rem; }
  section { padding: 1rem; }
  img { max-width: none; width: 44rem; }
  th, td { padding-right: 0.9rem; }
  td:first-child { white-space: pre-wrap; min-width: 7rem; }
}
@media print { body { background: #fff; } section { break-inside: avoid; border: 0; padding: 0; } }
</style>
</head>
<body>
<main>
<h1>$name<small>minitron report</small></h1>
$lead$body</main>
$script</body>
</html>
""")

_SCRIPT = Template("""<script>$plotly</script>
<script>
function draw() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--text"), line = style.getPropertyValue("--line");
  document.querySelectorAll(".charts").forEach((charts) => {
    const narrow = charts.clientWidth < 640;
    JSON.parse(charts.querySelector("script").textContent).forEach((chart, place) => {
      if (place >= charts.querySelectorAll(".chart").length) {
        const title = charts.appendChild(document.createElement("p"));
        title.textContent = chart.title;
        charts.appendChild(document.createElement("div")).className = "chart";
      }
      const panel = charts.querySelectorAll(".chart")[place];
      const named = chart.data.filter((trace) => trace.showlegend).length;
      const axis = {gridcolor: line, zeroline: false, linecolor: line, automargin: true};
      const layout = chart.layout;
      if (charts.clientWidth < 800) for (const note of layout.annotations) note.text = note.text.split("  (")[0];
      if (narrow) {
        const across = layout.xaxis;
        across.nticks = 6;
        across.title.text = across.title.text.replace(" (", "<br>(");
        if (across.tickmode === "array" && across.tickvals.length > 5)
          for (const part of ["tickvals", "ticktext"])
            across[part] = across[part].filter((_, place) => place % 2 === 0);
      }
      Object.assign(layout.xaxis, axis);
      Object.assign(layout.yaxis, axis);
      Plotly.react(panel, chart.data, Object.assign(layout, {
        height: 270 + (narrow ? 20 * named : 0),
        margin: {l: 10, r: 10, t: 10, b: 10},
        font: {color: ink, family: style.fontFamily, size: 12},
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        hovermode: "closest", showlegend: named > 0,
        legend: narrow ? {orientation: "h", x: 0, y: -0.3, yanchor: "top"} : {x: 1.02, y: 1},
      }), {displayModeBar: false, responsive: true});
      panel.removeAllListeners("plotly_relayout");
      panel.on("plotly_relayout", (change) => {  // where one zooms in, the page's own ticks are too few
        for (const axis of ["xaxis", "yaxis"])
          if (axis + ".range[0]" in change && layout[axis].tickmode === "array")
            Plotly.relayout(panel, {[axis + ".tickmode"]: "auto"});
      });
    });
    charts.nextElementSibling.className = "still";
  });
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("resize", draw);
</script>
""")
