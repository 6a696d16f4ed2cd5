"""Every claim about the gap: run it over seeds, draw it, and write the gallery.

    python figures/reproduce.py                      # all claims, on all cores
    python figures/reproduce.py points losses        # some of them
    python figures/reproduce.py real --data pairs.csv  # your pictures, or those of clipart.py
    python figures/reproduce.py --write              # only draw and write the gallery again

Runs that are finished are not run again, and equal runs of two claims are one. Writes a picture for
each claim, results.json and README.md (the gallery) beside this file. The claims are data, in
claims.py; this is a client of cgap.train and cgap.smallest_gap, as a script of yours would be.
"""
import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import torch
from tqdm import tqdm

import cgap
from claims import BEST, CLAIMS, INTRO, READINGS, SEP


# ---- one run ----
OF_DATA = ("data", "limit", "mismatch", "single", "image_size", "same_modality", "batch", "seed")


@functools.lru_cache(6)
def data_of(**settings):
    """The cgap.Data that these settings ask for: most runs share theirs with others."""
    return cgap.load_data(cgap.Config(**settings))


def make_model(kind, cfg, data, source):
    """The TwoEncoders to start from: None for fresh ones, else as the claim's `model` says."""
    if kind is None:
        return None
    torch.manual_seed(cfg.seed + 1000 * bool(source))  # those that any run starts from, or new ones
    model = cgap.TwoEncoders(cfg, len(data.vocab))
    if source:  # its encoders, with or without their projections
        weights = {name: weight for name, weight in cgap.load_run(source)["model"].items()
                   if name != "log_scale" and not (kind == "fresh" and "projection" in name)}
        model.load_state_dict(weights, strict=False)
    if kind == "centred once":
        cgap.fold_means(model, *data.train.batch(slice(2048)))
    return model


def run(job):
    """Do one job in a process of its own; its history is then in <folder>.json."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    began = time.perf_counter()
    settings = dict(job["settings"])
    if job["points"]:
        if isinstance(settings.get("temperature"), list):  # from, to, steps: a geometric ramp
            high, low, steps = settings["temperature"]
            settings["temperature"] = lambda step: low * (high / low) ** max(0, 1 - step / steps)
        history = cgap.smallest_gap(seed=job["seed"], **settings)
    else:
        shutil.rmtree(job["folder"], ignore_errors=True)
        cfg = cgap.Config(**{"eval_every": 10 ** 6, "device": "cpu", **settings}, seed=job["seed"], out=job["folder"])
        data = data_of(**{name: getattr(cfg, name) for name in OF_DATA})
        history = cgap.train(cfg, model=make_model(job["model"], cfg, data, job["source"]), data=data, quiet=True)
    history[-1]["seconds"] = time.perf_counter() - began
    Path(job["folder"] + ".json").write_text(json.dumps(history))


# ---- all of them ----
# What decides the numbers of a run: all of cgap.py up to its figures
CODE = (HERE.parent / "cgap.py").read_text(encoding="utf-8").split("\n# -- 8. Figures")[0]


def job_of(claim, label, seed, known):
    """The job of a row of a claim: equal jobs have the same folder, whatever claim they are of."""
    row = dict(claim.runs[label])
    model, source = row.pop("model", None), row.pop("source", None)
    source = source and job_of(claim, source, seed, known)["folder"]
    if not claim.points:
        row = {name: value for name, value in row.items() if value != getattr(cgap.Config, name)}
    what = json.dumps([CODE, claim.points, sorted(row.items()), model, source, seed])
    folder = "runs/reproduce/" + hashlib.sha256(what.encode()).hexdigest()[:12]
    known[folder] = {"points": claim.points, "settings": row, "seed": seed, "folder": folder, "model": model,
                     "source": source}
    return known[folder]


def measured(names):
    """{claim: its results}. What has not been run is run, each on one core; what starts from others
    last."""
    jobs, rows = {}, {}
    for name in names:
        claim = CLAIMS[name]
        for label in claim.runs:
            seeds = range(6, 11 if label in claim.five else 9)  # fresh: no setting was chosen at these
            rows[name, label] = [job_of(claim, label, seed, jobs)["folder"] for seed in seeds]
    Path("runs/reproduce").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for later in (False, True):
            todo = [job for job in jobs.values() if bool(job["source"]) == later
                    and not Path(job["folder"] + ".json").exists()]
            list(tqdm(pool.map(run, todo), "runs", len(todo)))
    if "losses" in names:
        shown = [rows["losses", label][0] for label in ("CLIP, T=0.01", "CUA, T=0.01", "CUA centred, T=0.07")]
        cgap.animate([cgap.load_run(folder) for folder in shown], HERE / "embeddings")
        draw_scenes(HERE / "scenes.png")
    return {name: {"runs": {
        label: [history if CLAIMS[name].picture == "curves" else [history[0], history[-1]] for history in (
            json.loads(Path(folder + ".json").read_text(), parse_float=lambda text: round(float(text), 6))
            for folder in rows[name, label])] for label in CLAIMS[name].runs}} for name in names}


# ---- results: tables and verdicts ----
def values(result, what, metric):
    """A metric of a row for each seed; of "row, at the start" at its start; of a number, itself."""
    if isinstance(what, float):
        return torch.tensor([what])
    label, start, _ = what.partition(", at the start")
    return torch.tensor([history[0 if start else -1][metric] for history in result["runs"][label]])


def spelled(metric):
    return {"i2t_r1": "R@1 i2t", "t2i_r1": "R@1 t2i", "effective_temperature": "T_eff"}.get(metric, metric.replace("_", " "))


def mean_std(numbers):
    return f"{numbers.mean():.3f}±{numbers.std():.3f}"


def best(result, labels, metric):
    """The row with the highest mean."""
    return max(labels, key=lambda label: values(result, label, metric).mean())


def verdict(result, metric, more, less):
    """(text, verdict): is the metric of `more` above that of `less`, by more than the standard
    deviation of the difference, paired by seed?"""
    where = ""
    if str(less).endswith(BEST):
        where = less.removesuffix(BEST)
        less = best(result, [label for label in result["runs"] if label.startswith(where + "CLIP, ")], metric)
    a, b = values(result, more, metric), values(result, less, metric)
    n = min(len(z) for z in (a, b) if len(z) > 1)
    difference = a[:n] - b[:n]  # a number has one value for all seeds
    word = "**does not hold**"
    if difference.mean() > difference.std():
        word = "holds at every seed" if (difference > 0).all() else "holds on average"
    return f"{spelled(metric)} {more} > {str(less).removeprefix(where)} ({mean_std(difference)})", word


def markdown(heads, rows):
    return "\n".join("|" + "|".join(row) + "|" for row in [["", *heads], ["---"] * (len(heads) + 1), *rows])


def table(claim, result):
    """Mean±standard deviation of what the claim shows; each seed where separability differs."""
    rows = []
    for label in result["runs"]:
        for row in [label + ", at the start"] * claim.starts + [label]:
            apart = SEP in claim.shown and values(result, row, SEP).std() > 0.1
            cells = [values(result, row, metric) for metric in claim.shown]
            rows.append([row, *(", ".join(f"{v:.2f}" for v in z) if apart else mean_std(z) for z in cells)])
    return markdown([*map(spelled, claim.shown)], rows)


def by_share(result):
    """{share of wrong captions: labels}."""
    shares = {}
    for label in result["runs"]:
        shares.setdefault(label.split(", ")[0], []).append(label)
    return shares


def law_table(result):
    """For each share of wrong captions, the recipe at the T of its best R@1, and beside it the best
    of plain CLIP, at whatever T."""
    rows = []
    for share, labels in by_share(result).items():
        T_eff = values(result, f"{share}, CLIP, T=0.01", "effective_temperature")
        plain, ours = ([label for label in labels if kind in label] for kind in (", CLIP", "CUA centred"))
        top = best(result, ours, "i2t_r1")
        T = values(result, top, "temperature").mean()
        cells = [mean_std(values(result, label, metric)) for metric in ("i2t_r1", "mixed_i2t")
                 for label in (top, best(result, plain, metric))]
        rows.append([share, mean_std(T_eff), f"{T:g}", mean_std(T / T_eff), *cells])
    return markdown(["T_eff of CLIP, T=0.01", "recipe's best T (R@1)", "factor", "R@1 i2t", "best CLIP", "mixed i2t",
                     "best CLIP"], rows)


# ---- pictures ----
def draw(name, claim, result):
    """A picture of a claim: curves over steps, lines over T, or a dot for each seed of each row."""
    path, rows = HERE / f"{name}.png", result["runs"]
    if claim.picture == "curves":
        return cgap.plot_histories({label: row[0] for label, row in rows.items()}, claim.shown, 128, path, "symlog")
    if claim.picture == "lines":
        return draw_lines(claim, result, path)
    figure, axes = cgap.canvas(len(claim.shown), 5)
    figure.set_size_inches(14, (1 + 0.24 * len(rows)) * -(-len(axes) // 5))
    for k, (axis, metric) in enumerate(zip(axes, claim.shown)):
        for height, label in enumerate(rows):
            numbers = values(result, label, metric)
            axis.plot(numbers, [height] * len(numbers), "o", color="0.6", ms=4)
            axis.plot(numbers.mean(), height, "|k", ms=12)
        axis.set(xlabel=spelled(metric), ylim=(len(rows) - 0.5, -0.5))
        axis.set_yticks(range(len(rows)), rows if k % 5 == 0 else [""] * len(rows))
        axis.grid(axis="y", color="0.9")
    figure.savefig(path)


def draw_lines(claim, result, path):
    """Metrics against T for the recipe and plain CLIP: a line for each share of wrong captions, dots
    for seeds, dotted where plain CLIP's T_eff ended."""
    panels = [(metric, kind) for metric in claim.drawn for kind in ("CUA centred", "CLIP") if kind in str(result["runs"].keys())]
    figure, axes = cgap.canvas(len(panels), len(panels))
    ticks = [.01, .02, .05, .1, .2, .3]
    for axis, (metric, kind) in zip(axes, panels):
        axis.sharey(axes[panels.index((metric, panels[0][1]))])
        for k, (share, labels) in enumerate(by_share(result).items()):
            shown = [label for label in labels if f", {kind}, T=" in label]
            T = [values(result, label, "temperature").mean() for label in shown]
            seeds = torch.stack([values(result, label, metric) for label in shown])
            axis.plot(T, seeds.mean(1), color=f"C{k}", label=share)
            axis.plot(T, seeds, "o", color=f"C{k}", ms=3)
            axis.axvline(values(result, f"{share}, CLIP, T=0.01", "effective_temperature").mean(), color=f"C{k}", linestyle=":")
        axis.set(xscale="log", xlabel="T", ylabel=spelled(metric), title=kind)
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path)


def draw_scenes(path):
    """A contact sheet of validation scenes, larger than the encoders see them."""
    data = cgap.load_data(cgap.Config(limit=200, image_size=96))
    words = list(data.vocab)
    figure, axes = cgap.canvas(10, 5)
    figure.set_size_inches(11, 5)
    for axis, image, tokens in zip(axes, *data.val.batch(slice(10))):
        axis.axis("off")
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(textwrap.fill(" ".join(words[k] for k in tokens if k), 20), fontsize=9)
    figure.savefig(path)


# ---- the gallery ----
def section(name, claim, result):
    """The part of the gallery on a claim."""
    lines = [f'<a id="{name}"></a>', f"## {claim.title}", "", f"![{name}]({name}.png)", "", READINGS[name], ""]
    lines += [law_table(result) if name == "law" else table(claim, result), ""]
    verdicts = {}
    for text, word in (verdict(result, *check) for check in claim.checks):
        verdicts.setdefault(word, []).append(text)
    lines += [f"- {word}: {'; '.join(texts)}" for word, texts in verdicts.items()]
    histories = [history for row in result["runs"].values() for history in row]
    minutes = sum(history[-1]["seconds"] for history in histories) / 60
    data = " --data pairs.csv" * name.startswith("real")
    return "\n".join([*lines, "", f"`python figures/reproduce.py {name}{data}`: {len(histories)} runs, {minutes:.0f} core min.", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("claims", nargs="*", default="all", choices=["all", *CLAIMS])
    parser.add_argument("--data", help="CSV file or COCO folder for the claim `real`; figures/clipart.py makes one")
    parser.add_argument("--write", action="store_true", help="only draw and write the gallery again")
    args = parser.parse_args()
    names = list(CLAIMS) if "all" in args.claims else args.claims
    if not (args.data or args.write):
        print("without --data FILE real pictures are left out; figures/clipart.py says how to get some")
        names = [name for name in names if not name.startswith("real")]
    for row in chain(*(claim.runs.values() for claim in CLAIMS.values())):
        if "data" in row and args.data:
            row["data"] = os.path.abspath(args.data)
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if not args.write:
        results |= measured(names)
        path.write_text(json.dumps(results) + "\n")
    for name in set(names) & set(results):
        draw(name, CLAIMS[name], results[name])
    sections = [section(name, claim, results[name]) for name, claim in CLAIMS.items() if name in results]
    (HERE / "README.md").write_text("\n".join([INTRO, *sections]), encoding="utf-8")
    print(HERE / "README.md")


if __name__ == "__main__":
    main()
