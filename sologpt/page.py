"""
One page about one or several runs: plotly's interactive panels, tables of settings and results, and samples,
in a single HTML file that asks no network for anything.
"""

import html
import math
import os

import numpy as np

from sologpt.display import warn
from sologpt.errors import UserError, first_line
from sologpt.files import atomic_file
from sologpt.history import EVENTS, number, read_history, shown
from sologpt.panels import make_panels, references

SYMBOLS = dict(
    resume="triangle-right",
    checkpoint="line-ns-open",
    bad_step="x",
    spike="triangle-up",
    smaller_batch="triangle-down",
)
HOVER = {  # how the values of a unit are written, in d3's format
    "nats per token": ".4f",
    "bits per byte": ".4f",
    "tokens per second": ",.0f",
    "%": ".1f",
    "norm": ".4~g",
    "rate": ".4~g",
    "GB": ".2f",
    "tokens": ",.0f",
    "iterations": ",.0f",
    "hours": ".2f",
}
BUTTONS = ["toImage", "zoom2d", "pan2d", "autoScale2d", "resetScale2d"]
NO_SETTINGS = ("out_dir", "init_from", "wandb_run_name")  # differ between any two runs

# nothing that a run's folder holds could load or send anything, even if it got past escaping
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 1200px;
  margin: 1.5em auto; padding: 0 1em; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 2em; }
table { border-collapse: collapse; } thead th { color: #666; }
td, th { padding: .2em .9em .2em 0; text-align: left; vertical-align: top; font-weight: normal;
  border-bottom: 1px solid #e6e6e6; }
td { font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6em .8em; }
pre b { color: #0072b2; font-weight: normal; } summary { cursor: pointer; color: #444; }
"""


def page_of_run(out_dir):
    """Writes out_dir/run.html about the run in out_dir. Returns its path; None if plotly is not installed.

    For the end of a run, which it must not spoil: whatever goes wrong is one line on stderr, and None.
    """
    try:
        import plotly  # noqa: F401, as the page is made elsewhere; here only whether it is there
    except ImportError:
        return None
    path = os.path.join(out_dir, "run.html")
    try:
        write_page([read_history(out_dir)], path)
    except Exception as e:
        warn(f"no {path}: {first_line(e)}")
        return None
    return path


def write_page(histories, path, over="tokens", reference=""):
    """Writes a page about the runs to path. Raises UserError if plotly is not installed."""
    panels, x_range = make_panels(histories, over, reference)
    names = ", ".join(history.name for history in histories)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{html.escape(names)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(names)}</h1>",
        interactive(panels, x_range, over),
        "<p>Pale: every value; dark: smoothed. A double click shows all of a panel; a click on a name hides "
        "that curve, a double click all others.</p>",
        sources(reference),
        results_table(histories),
        settings_table(histories),
        *[all_samples(history) for history in histories],
        "</body></html>\n",
    ]
    with atomic_file(path) as f:
        f.write("\n".join(part for part in parts if part).encode("utf-8", "replace"))


# -----------------------------------------------------------------------------
# the panels


def interactive(panels, x_range, over):
    """Returns the panels as HTML, with plotly's JavaScript in it."""
    try:
        from plotly import graph_objects
        from plotly.subplots import make_subplots
    except ImportError:
        raise UserError("a page needs plotly: pip install '.[plot]'") from None
    rows = 1 + len(panels) // 2
    specs = [[{"colspan": 2}, None]] + [[{}, {}]] * (rows - 1)
    heights = [1.7] + [1.0] * (rows - 1)
    pixels = 180 + 280 * sum(heights)
    figure = make_subplots(
        rows,
        2,
        specs=specs,
        row_heights=heights,
        subplot_titles=[panel.title for panel in panels],
        vertical_spacing=95 / pixels,
        horizontal_spacing=0.07,
    )
    figure.update_xaxes(exponentformat="B", ticks="outside", hoverformat=HOVER[over])
    figure.update_yaxes(exponentformat="B")
    for i, panel in enumerate(panels):
        row, column = 2 + (i - 1) // 2, 1 + (i - 1) % 2
        if i == 0:
            row, column = 1, 1
        for trace in traces(panel, graph_objects):
            figure.add_trace(trace, row, column)
        figure.update_xaxes(title=over, range=x_range, row=row, col=column)
        if panel.unit == "rate":
            figure.update_yaxes(exponentformat="e", row=row, col=column)
        if panel.log:
            figure.update_yaxes(type="log", row=row, col=column)
        if panel.y_range:
            figure.update_yaxes(range=panel.y_range, row=row, col=column)
    figure.update_layout(
        template="plotly_white",
        height=pixels,
        hovermode="x unified",
        hoverlabel_namelength=-1,  # names in full
        margin=dict(l=60, r=20, t=70, b=50),
        legend=dict(orientation="h", x=0, y=1 + 35 / pixels, yanchor="bottom"),
    )
    options = dict(responsive=True, displaylogo=False, modeBarButtons=[BUTTONS])
    return figure.to_html(full_html=False, include_plotlyjs=True, config=options, div_id="panels")


def traces(panel, graph_objects):
    """Yields plotly's traces of a Panel. Names are escaped, as plotly takes them for HTML, but not their
    quotes, which it would show as &quot;"""
    for curve in panel.curves:
        trace = graph_objects.Scatter(
            x=curve.x,
            y=curve.y.astype(np.float32),
            yhoverformat=HOVER[panel.unit],
            name=html.escape(curve.name, quote=False),
            showlegend=curve.legend,
            mode="lines",
            line=dict(color=curve.color, width=curve.width, dash=curve.dash),
            opacity=curve.opacity,
        )
        if curve.markers:
            trace.update(mode="lines+markers", marker_size=5)
        if curve.raw:
            trace.update(hoverinfo="skip")
        yield trace
    named = set()
    for marks in panel.marks:
        border = dict(width=1.5, color=marks.color)
        yield graph_objects.Scatter(
            x=marks.x,
            y=marks.y,
            name=EVENTS[marks.kind],
            legendgroup=marks.kind,
            showlegend=marks.kind not in named,
            mode="markers",
            marker=dict(symbol=SYMBOLS[marks.kind], size=10, color=marks.color, line=border),
            text=[html.escape(text, quote=False) for text in marks.texts],
            hovertemplate="%{text}",
        )
        named.add(marks.kind)


def sources(reference):
    """Returns where the published figures are from, as HTML."""
    if not reference:
        return ""
    text = "<p>Published, on the data that is named; losses on other data do not compare:</p><ul>"
    for result in references(reference):
        text += f'<li><a href="{result["source"]}">{html.escape(result["name"])}</a>, {result["data"]}</li>'
    return text + "</ul>"


# -----------------------------------------------------------------------------
# tables and samples


def results_table(histories):
    """Returns the final figures of the runs as an HTML table, a column for each run."""
    columns = [results(history) for history in histories]
    return "<h2>Results</h2>" + table(histories, columns, same=True)


def results(history):
    """Returns the final figures of a run as text, by their names; those that are not known are left out."""
    h, iters = history, history.iters
    hours = "hours" if h.exact_hours else "hours, without evaluations"
    train_loss, val_loss, val_bpb = h.losses or (math.nan, math.nan, math.nan)
    mean = "tokens per second, mean"
    if h.final.get("resumed"):
        mean += " since it was resumed"
    figures = [
        ("iterations", furthest(h, "iterations"), ",.0f"),
        ("tokens", furthest(h, "tokens"), ",.0f"),
        (hours, furthest(h, "hours"), ",.4g"),
        ("last training loss", train_loss, ".4f"),
        ("last validation loss", val_loss, ".4f"),
        ("last bits per byte", val_bpb, ".4f"),
        ("best validation loss", h.best_val_loss, ".4f"),
        ("its iteration", h.best_iter, ","),
        (mean, number(h.final.get("tokens_per_s")), ",.0f"),
        ("tokens per second, median", median(iters.mean("tokens_per_s")), ",.0f"),
        ("MFU in %, median", median(iters.mean("mfu")), ".1f"),
        ("peak memory in GB", largest(iters.high("peak_memory")) / 1e9, ".2f"),
    ]
    for kind, name in EVENTS.items():
        figures.append((f"{name}, times", h.events[kind].count or math.nan, ","))
    figures.append(("lines left out", h.skipped or math.nan, ","))
    found = {name: format(value, form) for name, value, form in figures if math.isfinite(value)}
    found["finished"] = "yes" if h.final else "no"
    return found


def furthest(history, over):
    """Returns how far a run came; NaN if unknown."""
    ends = [largest(series.high(over)) for series in (history.iters, history.evals)]
    if history.last:
        ends.append(getattr(history.last, over))
    return largest(np.array(ends))


def median(values):
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def largest(values):
    values = values[np.isfinite(values)]
    return float(values.max()) if len(values) else math.nan


def settings_table(histories):
    """Returns the settings in which the runs differ as an HTML table, and all of them behind a click."""
    configs = [history.config for history in histories]
    columns = [
        {str(name): shown(value) for name, value in config.items()} | dict(torch=history.torch)
        for config, history in zip(configs, histories, strict=True)
    ]
    text = ""
    if len(histories) > 1:
        wanted = [{name: v for name, v in column.items() if name not in NO_SETTINGS} for column in columns]
        text = "<h2>Settings that differ</h2>" + table(histories, wanted, same=False)
    return f"{text}<details><summary>all settings</summary>{table(histories, columns, same=True)}</details>"


def table(histories, columns, same):
    """Returns dicts of texts as an HTML table with a column for each. same: rows without a difference too."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = []
    for name in names:
        values = [column.get(name, "-") for column in columns]
        if same or len(set(values)) > 1:
            cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
            rows.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    if not rows:
        return "<p>none</p>"
    heads = "".join(f"<th>{html.escape(history.name)}</th>" for history in histories)
    return f"<table><thead><tr><th></th>{heads}</tr></thead>{''.join(rows)}</table>"


def all_samples(history):
    """Returns what a run wrote along its way as HTML, the newest first."""
    moments = [moment for moment in history.samples if moment.samples]
    if not moments:
        return ""
    parts = [f"<h2>Samples of {html.escape(history.name)}</h2>"]
    for i, moment in enumerate(reversed(moments)):
        texts = "".join(
            f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>" for prompt, text in moment.samples
        )
        opened = " open" if i == 0 else ""
        parts.append(f"<details{opened}><summary>iteration {moment.iterations:,}</summary>{texts}</details>")
    return "\n".join(parts)
