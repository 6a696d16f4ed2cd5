"""Every claim about the gap: run it over seeds, draw it, and write the gallery.

    python figures/reproduce.py                      # all claims, three seeds, on all cores
    python figures/reproduce.py points losses        # some of them
    python figures/reproduce.py losses --seeds 5     # with more seeds
    python figures/reproduce.py --list               # what there is

Runs that are finished are not run again, and equal runs of two claims are one. Writes a picture for
each claim, results.json and README.md (the gallery) beside this file. The claims are data, below;
this is a client of cgap.train and cgap.smallest_gap, as a script of yours would be.
"""
import argparse
import ast
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import torch

import cgap
from claims import CLAIMS, INTRO

FIRST_SEED = 3  # nothing was chosen by looking at seeds 3 and above
NAMES = {"linear_separability": "separability", "linear_separability_c100": "sep. C = 100",
         "centroid_distance": "centroids", "uniformity_image": "uniformity", "i2t_r1": "R@1",
         "zero_shot": "zero-shot", "zero_shot_unseen": "unseen", "effective_temperature": "T_eff",
         "temperature": "T", "clip": "CLIP loss"}


# ---- one run ----
def make_model(kind, cfg, source):
    """The TwoEncoders to start from: None for fresh ones, else as the claim's `model` says."""
    if kind is None:
        return None
    vocab = len(cgap.load_data(cfg).vocab)  # leaves a random state that no run has started from
    model = cgap.TwoEncoders(cfg, vocab)
    if kind in ("kept", "fresh"):  # the encoders of `source`, with or without their projections
        weights = {name: weight for name, weight in cgap.load_run(source).model.items()
                   if name != "log_scale" and not (kind == "fresh" and "projection" in name)}
        model.load_state_dict(weights, strict=False)
    for encoder in (model.image, model.text):
        for name, p in encoder.named_parameters():
            if kind == "no biases" and name.endswith("bias") or (
                    kind == "projection without bias" and name == "projection.bias"):
                p.data.zero_()
                p.requires_grad_(False)
    return model


def temperature(spec):
    """A number, or [from, to, steps]: a geometric ramp over so many steps."""
    if isinstance(spec, list):
        high, low, steps = spec
        return lambda step: low * (high / low) ** max(0, 1 - step / steps)
    return spec


def run(job):
    """Do one job in a process of its own; its history is then in <folder>.json."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    settings = dict(job["settings"])
    if job["points"]:
        settings["temperature"] = temperature(settings.get("temperature", 0.01))
        history = cgap.smallest_gap(seed=job["seed"], **settings)
    else:
        shutil.rmtree(job["folder"], ignore_errors=True)
        cfg = cgap.Config(**{"eval_every": 10 ** 6, "checkpoint_every": 10 ** 6, "device": "cpu",
                             **settings}, seed=job["seed"], out=job["folder"])
        model = make_model(job["model"], cfg, job["source"])
        history = cgap.train(cfg, model=model, quiet=True)
    Path(job["folder"] + ".json").write_text(json.dumps(history))


# ---- all of them ----
def code(text):
    """What of cgap.py decides the numbers of a run: all up to its figures, but for imports, comments
    and docstrings."""
    tree = ast.parse(text.split("\n# 7. Figures")[0])
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:]
    tree.body = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    return ast.dump(tree)


CODE = code((HERE.parent / "cgap.py").read_text(encoding="utf-8"))


def job_of(claim, label, seed, known):
    """The job of a row of a claim: equal jobs have the same folder, whatever claim they are of."""
    row = dict(claim.runs[label])
    model, source = row.pop("model", None), row.pop("source", None)
    source = source and job_of(claim, source, seed, known)["folder"]
    what = json.dumps([CODE, claim.points, sorted(row.items()), model, source, seed])
    folder = "runs/reproduce/" + hashlib.sha256(what.encode()).hexdigest()[:12]
    job = {"points": claim.points, "settings": row, "seed": seed, "folder": folder, "model": model,
           "source": source}
    known[folder] = job
    return job


def run_all(jobs):
    """Run those that are not finished, each on one core; those that start from others last."""
    from tqdm import tqdm
    todo = [job for job in jobs.values() if not Path(job["folder"] + ".json").exists()]
    Path("runs/reproduce").mkdir(parents=True, exist_ok=True)
    with (ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool,
          tqdm(total=len(todo), unit="run") as bar):
        for later in (False, True):
            futures = [pool.submit(run, job) for job in todo if bool(job["source"]) == later]
            for future in as_completed(futures):
                future.result()
                bar.update()


def seeds_of(claim, label, n):
    return range(FIRST_SEED, FIRST_SEED + max(n, claim.seeds.get(label, 0)))


# ---- results: tables, verdicts, pictures ----
def values(result, what, metric):
    """A metric of a row for each seed; of "row, at the start" at its start; of a number, itself."""
    if isinstance(what, (int, float)):
        return torch.tensor([float(what)], dtype=torch.double)
    label, start, _ = what.partition(", at the start")
    return torch.tensor([history[0 if start else -1][metric] for history in result["runs"][label]],
                        dtype=torch.double)


def mean_std(numbers):
    if len(numbers) > 1:
        return f"{numbers.mean():.3f}±{numbers.std():.3f}"
    return f"{numbers.mean():.3f}"


def verdict(result, metric, more, less, by=0.0):
    """(text, verdict): is the metric of `more` above that of `less`? If the difference, paired by
    seed, is on average more than `by`, and more than its standard deviation above 0 (or above `by`,
    where that is negative)."""
    a, b = values(result, more, metric), values(result, less, metric)
    n = min(len(z) for z, what in ((a, more), (b, less)) if not isinstance(what, (int, float)))
    difference = (a[:n] if len(a) > 1 else a) - (b[:n] if len(b) > 1 else b)
    floor = min(by, 0.0)
    spread = difference.std() if n > 1 else 0.0
    holds = bool(difference.mean() > by and difference.mean() - floor > spread)
    word = "**does not hold**"
    if holds:
        word = "holds at every seed" if bool((difference > floor).all()) else "holds on average"
        word = "holds (one seed)" if n == 1 else word
    margin = f" by {by:g} on average" if by > 0 else f" - {-by:g}" if by else ""
    return f"{NAMES.get(metric, metric)} {more} > {less}{margin} ({mean_std(difference)})", word


def table(claim, result):
    shown = claim.shown
    lines = ["||" + "|".join(NAMES.get(m, m) for m in shown) + "|", "|---" * (len(shown) + 1) + "|"]
    for label, histories in result["runs"].items():
        for at in (claim.starts * [", at the start"] + [""]):
            cells = [mean_std(values(result, label + at, m)) if m in histories[0][-1] else "-" for m in shown]
            lines.append(f"|{label}{at}|" + "|".join(cells) + "|")
    return "\n".join(lines)


def draw(name, claim, result, path):
    """A picture of a claim: curves over steps, lines over T, or a dot for each seed of each row."""
    title = f"{name}: {claim.title}"
    if claim.picture == "curves":
        mean = {label: [{k: sum(h[i][k] for h in histories) / len(histories) for k in ("step", *claim.shown)}
                        for i in range(len(histories[0]))] for label, histories in result["runs"].items()}
        ideal = {"linear_separability": 0.5, "effective_temperature": 0.01}
        panels = {metric: ideal.get(metric, 0) for metric in claim.shown[:4]}
        return cgap.plot_histories(mean, panels, title, path, "symlog")
    if claim.picture == "thermostat":
        return draw_thermostat(result, title, path)
    shown = [metric for metric in claim.shown if metric != "linear_separability_c100"][:8]
    labels = list(result["runs"])
    rows = (len(shown) + 3) // 4
    figure, axes = cgap.canvas(rows, -(-len(shown) // rows), title, 11, 1 + rows * (0.8 + 0.26 * len(labels)))
    for axis in axes[len(shown):]:
        axis.axis("off")
    for k, (axis, metric) in enumerate(zip(axes, shown)):
        for row, label in enumerate(labels):
            if metric in result["runs"][label][0][-1]:
                numbers = values(result, label, metric)
                axis.plot(numbers, [row] * len(numbers), "o", color="0.6", ms=4)
                axis.plot([numbers.mean()] * 2, [row - 0.3, row + 0.3], color="black", linewidth=2)
        first = k % (-(-len(shown) // rows)) == 0
        axis.set(xlabel=NAMES.get(metric, metric), yticks=range(len(labels)),
                 yticklabels=labels if first else [], ylim=(len(labels) - 0.5, -0.5))
        axis.grid(axis="y", color="0.9")
    figure.savefig(path)


def draw_thermostat(result, title, path):
    """T_eff against T, a line for each share of permuted captions; and the gap against T / T_eff."""
    figure, axes = cgap.canvas(1, 2, title, 11, 4.4)
    groups = itertools.groupby(result["runs"], key=lambda label: label.split(",")[0])
    for (group, labels), color in zip(groups, cgap.COLORS):
        labels = list(labels)
        T = [values(result, label, "temperature").mean() for label in labels]
        warm = [values(result, label, "effective_temperature").mean() for label in labels]
        gap = [values(result, label, "centroid_distance").mean() for label in labels]
        frozen = [k for k, label in enumerate(labels) if "learned" not in label]
        axes[0].plot([T[k] for k in frozen], [warm[k] for k in frozen], "o-", color=color, label=group)
        learned = [k for k in range(len(labels)) if k not in frozen]
        axes[0].plot([T[k] for k in learned], [warm[k] for k in learned], "*", color=color, ms=12)
        axes[1].plot([t / w for t, w in zip(T, warm)], gap, "o", color=color, label=group)
    ends = [0.008, 0.25]
    axes[0].plot(ends, ends, ":", color="0.5", label="T_eff = T: no gap")
    axes[0].set(xscale="log", yscale="log", xlabel="T (stars: learned, where it ended)", ylabel="T_eff")
    axes[1].set(xlabel="T / T_eff, what is left of the spread", ylabel="distance of the centroids")
    for axis in axes:
        axis.legend(fontsize=8)
    figure.savefig(path)


def thermostat_table(result):
    """T_eff for each share of permuted captions and each T, and how much it differs over the T
    that are colder; where T is learned, the T that it came to as well."""
    rows = {}
    for label in result["runs"]:
        share, T = label.split(", ")
        ends = [values(result, label, metric) for metric in ("effective_temperature", "temperature")]
        rows.setdefault(share, {})[T] = ends
    lines = ["||" + "|".join(rows[share]) + "|factor|", "|---" * (len(rows[share]) + 2) + "|"]
    for share, cells in rows.items():
        colder = [warm.mean() for warm, T in cells.values() if T.mean() < 0.9 * warm.mean()]
        texts = [mean_std(warm) + f" (T={T.mean():.3f})" * (name == "learned") for name, (warm, T) in cells.items()]
        factor = f"{max(colder) / min(colder):.2f}" if len(colder) > 1 else "-"
        lines.append(f"|{share}|" + "|".join(texts) + f"|{factor}|")
    return "\n".join(lines + ["", "*Factor*: largest over smallest T_eff where T is below T_eff / 1.1."])


def section(name, claim, result):
    """The part of the gallery on a claim."""
    lines = [f'<a id="{name}"></a>', f"## {claim.title}", "", f"![{name}]({name}.png)", "", claim.reading, ""]
    if claim.published:
        lines += [f"*Published:* {claim.published}", ""]
    lines += [thermostat_table(result) if claim.picture == "thermostat" else table(claim, result), ""]
    verdicts = {}
    for text, word in (verdict(result, *check) for check in claim.checks):
        verdicts.setdefault(word, []).append(text)
    lines += [f"- {word}: {'; '.join(texts)}" for word, texts in verdicts.items()] + [""] * bool(verdicts)
    return "\n".join(lines + [f"`{result['command']}`", ""])


def gallery(results):
    """The text of README.md."""
    machines = [result["machine"] for result in results.values()]
    lines = [INTRO]
    lines += [f"Run on {'; '.join(sorted(set(machines)))}.\n"]
    lines += [section(name, claim, results[name]) for name, claim in CLAIMS.items() if name in results]
    return "\n".join(lines)


def slim(history, claim):
    """Of a history what is drawn or printed, to four digits more than are shown."""
    def rounded(record, names):
        return {name: round(record[name], 7) for name in names if name in record}

    ends = [rounded(record, [k for k in record if k not in ("seconds", "images_per_second")])
            for record in (history[0], history[-1])]
    curve = history[1:-1] if claim.picture == "curves" else []
    return ends[:1] + [rounded(record, ("step", *claim.shown)) for record in curve] + ends[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=", ".join(CLAIMS))
    parser.add_argument("--seeds", type=int, default=3, help="so many, from seed 3 on")
    parser.add_argument("--list", action="store_true", help="print the claims and stop")
    parser.add_argument("--write", action="store_true", help="only draw and write results.json again")
    args = parser.parse_args()
    if unknown := set(args.claims) - set(CLAIMS):
        parser.error(f"no claim is called {', '.join(unknown)}; there are {', '.join(CLAIMS)}")
    if args.list:
        return print("\n".join(f"{name:22}{claim.title}" for name, claim in CLAIMS.items()))
    path = HERE / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not args.write:
        results |= measured(args.claims or CLAIMS, args.seeds)
        path.write_text(json.dumps(results) + "\n", encoding="utf-8")
    for name in set(args.claims or CLAIMS) & set(results):
        draw(name, CLAIMS[name], results[name], HERE / f"{name}.png")
    (HERE / "README.md").write_text(gallery(results), encoding="utf-8")
    print(HERE / "README.md")


def measured(names, seeds):
    """{claim: its results}, run where they have not been."""
    jobs, rows, results = {}, {}, {}
    for name in names:
        for label in CLAIMS[name].runs:
            rows[name, label] = [job_of(CLAIMS[name], label, seed, jobs)["folder"]
                                 for seed in seeds_of(CLAIMS[name], label, seeds)]
    run_all(jobs)
    for name in names:
        claim = CLAIMS[name]
        results[name] = {
            "seeds": ", ".join(map(str, seeds_of(claim, "", seeds))),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
                       f"torch {torch.__version__}, one thread a run",
            "command": f"python figures/reproduce.py {name} --seeds {seeds}",
            "runs": {label: [slim(json.loads(Path(folder + ".json").read_text()), claim)
                             for folder in rows[name, label]] for label in claim.runs}}
        if name == "losses":  # the animation at the top of the README, and its companions
            shown = [cgap.load_run(rows[name, label][0]) for label in ("CLIP", "CUA", "CUA, centred")]
            for picture in ("gap.gif", "embeddings.png", "spectrum.png", "samples.png"):
                cgap.FIGURES[picture](shown, HERE / picture)
    return results


if __name__ == "__main__":
    main()
