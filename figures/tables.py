"""The tables of the gallery, as Markdown. reproduce.py uses this."""
import re

from records import METRICS

NOTICE = """<!-- This page is made by `python figures/reproduce.py --write`. Do not edit it: its
text is in figures/gallery.md, its numbers are in figures/results.json. -->
"""


def column_name(metric):
    """The head of a metric's column."""
    return METRICS[metric][0] if metric in METRICS else metric.replace("_", " ")


def cell(numbers):
    """The mean and the standard deviation of a metric over seeds, or its only number."""
    if numbers is None:
        return ""
    if len(numbers) == 1:
        return f"{numbers.item():.3f}"
    return f"{numbers.mean():.3f} ± {numbers.std():.3f}"


def all_columns(rows):
    """Every metric that a row has, in the order of METRICS, then those it does not name."""
    measured = {metric: None for row in rows for record in row.records for metric in record["end"]}
    others = [metric for metric in measured if metric not in METRICS]
    return [metric for metric in [*METRICS, *others]
            if any(row.values(metric) is not None for row in rows)]


def markdown(rows, columns, starts=False):
    """A Markdown table of rows; if starts, each is preceded by its values before training."""
    lines = ["|" + "|".join([" ", *map(column_name, columns)]) + "|",
             "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        for when, suffix in (("start", ", at the start"), ("end", "")):
            if when == "end" or starts:
                cells = [cell(row.values(metric, when)) for metric in columns]
                lines.append("|" + "|".join([row.label + suffix, *cells]) + "|")
    return "\n".join(lines)


def cost(name, claim, rows):
    """The command of a claim, what it takes, and its seeds."""
    seconds = sum(record["seconds"] for row in rows for record in row.records)
    runs = sum(len(row.records) for row in rows)
    features = " --features IMAGES.pt TEXTS.pt" if claim.kind == "heads" else ""
    if claim.kind in ("landscape", "repairs"):
        spent = f"{seconds / 60:.0f} core minutes beside the runs that it starts from"
    else:
        spent = f"{runs} runs, {seconds / 60:.0f} core minutes"
    only = f"; where there is no ±, seed {claim.seeds[0]} only" if len(claim.seeds) > 1 else ""
    seeds = "seeds" if len(claim.seeds) > 1 else "seed"
    return (f"`python figures/reproduce.py {name}{features}`: {spent}; "
            f"{seeds} {', '.join(map(str, claim.seeds))}{only}.")


def table(name, claim, rows):
    """What the gallery has for `{{table NAME}}`: the columns that the claim needs, its command,
    and a folded table of all columns."""
    shown = [row for row in rows if claim.short is None or claim.short(row)]
    return "\n\n".join([
        markdown(shown, claim.shown, claim.starts), cost(name, claim, rows),
        "<details><summary>All columns" + (" and rows" if len(shown) < len(rows) else "")
        + "</summary>", markdown(rows, all_columns(rows), claim.starts), "</details>"])


def gallery(path, claims, rows):
    """gallery.md with the tables of claims in the lines that name them: {{table NAME}}."""
    def fill(match):
        name = match[1]
        return table(name, claims[name], rows[name]) if rows.get(name) else "(not run)"

    return NOTICE + re.sub(r"\{\{table ([\w-]+)\}\}", fill, path.read_text(encoding="utf-8"))
