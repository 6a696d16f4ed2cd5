"""Every claim about the gap: run it over seeds, draw it, and write the gallery.

    python figures/reproduce.py                      # all claims, three seeds, on all cores
    python figures/reproduce.py points losses        # some of them
    python figures/reproduce.py losses --seeds 5     # with more seeds
    python figures/reproduce.py real --data pairs.csv  # your pictures, or those of clipart.py
    python figures/reproduce.py --list               # what there is

Runs that are finished are not run again, and equal runs of two claims are one. Writes a picture for
each claim, results.json and README.md (the gallery) beside this file. The claims are data, in
claims.py; this is a client of cgap.train and cgap.smallest_gap, as a script of yours would be.
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
import textwrap
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import torch
from tqdm import tqdm

import cgap
from claims import BEST, CLAIMS, INTRO, NAMES

FIRST_SEED = 6  # nothing was chosen by looking at seeds 6 and above


# ---- one run ----
def make_model(kind, cfg, source):
    """The TwoEncoders to start from: None for fresh ones, else as the claim's `model` says."""
    if kind is None:
        return None
    data = cgap.load_data(cfg)
    if not source:
        torch.manual_seed(cfg.seed)  # then the encoders are those that any run starts from
    model = cgap.TwoEncoders(cfg, len(data.vocab))
    if source:  # its encoders, with or without their projections
        weights = {name: weight for name, weight in cgap.load_run(source)["model"].items()
                   if name != "log_scale" and not (kind == "fresh" and "projection" in name)}
        model.load_state_dict(weights, strict=False)
    if kind == "centred once":
        cgap.fold_means(model, *data.train.batch(slice(2048)))
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
        cfg = cgap.Config(**{"eval_every": 10 ** 6, "device": "cpu", **settings}, seed=job["seed"], out=job["folder"])
        model = make_model(job["model"], cfg, job["source"])
        history = cgap.train(cfg, model=model, quiet=True)
    Path(job["folder"] + ".json").write_text(json.dumps(history))


# ---- all of them ----
def code(text):
    """What of cgap.py decides the numbers of a run: all up to its figures, but for imports, comments
    and docstrings."""
    tree = ast.parse(text.split("\n# -- 8. Figures")[0])
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
    known[folder] = {"points": claim.points, "settings": row, "seed": seed, "folder": folder, "model": model,
                     "source": source}
    return known[folder]


def run_all(jobs):
    """Run those that are not finished, each on one core; those that start from others last."""
    todo = [job for job in jobs.values() if not Path(job["folder"] + ".json").exists()]
    Path("runs/reproduce").mkdir(parents=True, exist_ok=True)
    with (ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool,
          tqdm(total=len(todo), unit="run") as bar):
        for later in (False, True):
            futures = [pool.submit(run, job) for job in todo if bool(job["source"]) == later]
            for future in as_completed(futures):
                future.result()
                bar.update()


def measured(names, seeds):
    """{claim: its results}, run where they have not been."""
    jobs, rows, results = {}, {}, {}
    for name, claim in ((name, CLAIMS[name]) for name in names):
        for label in claim.runs:
            last = FIRST_SEED + max(seeds, claim.seeds.get(label, 0))
            rows[name, label] = [job_of(claim, label, seed, jobs)["folder"] for seed in range(FIRST_SEED, last)]
    run_all(jobs)
    for name in names:
        results[name] = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
                       f"torch {torch.__version__}, one thread a run",
            "command": f"python figures/reproduce.py {name} --seeds {seeds}" + " --data FILE" * (name == "real"),
            "runs": {label: [slim(json.loads(Path(folder + ".json").read_text()), CLAIMS[name])
                             for folder in rows[name, label]] for label in CLAIMS[name].runs}}
    if "losses" in names:
        shown = ("CLIP, T = 0.01", "CUA, T = 0.01", "CUA centred, T = 0.07")
        cgap.animate([cgap.load_run(rows["losses", label][0]) for label in shown], HERE / "gap.gif")
        draw_scenes(HERE / "scenes.png")
    return results


def slim(history, claim):
    """Of a history what is drawn or printed, to four digits more than are shown."""
    names = {"step", "seconds", *claim.shown}
    kept = history if claim.picture == "curves" else [history[0], history[-1]]
    return [{name: round(record[name], 7) for name in record if name in names} for record in kept]


# ---- results: tables and verdicts ----
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


def strongest(result, where, metric):
    """The row of plain CLIP, among those whose names begin with `where`, with the highest mean."""
    plain = [label for label in result["runs"] if label.startswith(where + "CLIP,")]
    return max(plain, key=lambda label: values(result, label, metric).mean())


def verdict(result, metric, more, less):
    """(text, verdict): is the metric of `more` above that of `less`, by more than the standard
    deviation of the difference, paired by seed?"""
    if str(less).endswith(BEST):
        less = strongest(result, less.removesuffix(BEST), metric)
    a, b = values(result, more, metric), values(result, less, metric)
    n = min(len(z) for z, what in ((a, more), (b, less)) if not isinstance(what, (int, float)))
    difference = (a[:n] if len(a) > 1 else a) - (b[:n] if len(b) > 1 else b)
    word = "**does not hold**"
    if difference.mean() > (difference.std() if n > 1 else 0.0):
        word = "holds at every seed" if bool((difference > 0).all()) else "holds on average"
    return f"{NAMES.get(metric, metric)} {more} > {less} ({mean_std(difference)})", word


def grid_table(heads, rows):
    return "\n".join(["||" + "|".join(heads) + "|", "|---" * (len(heads) + 1) + "|",
                      *("|" + "|".join(row) + "|" for row in rows)])


def table(claim, result):
    """Mean±standard deviation of what the claim shows; where rows fall into two clusters, each seed."""
    rows = []
    for label, histories in result["runs"].items():
        for start in claim.starts * [", at the start"] + [""]:
            shown = [m for m in claim.shown if m in histories[0][-1]]
            numbers = {m: values(result, label + start, m) for m in shown}
            apart = len(histories) > 1 and numbers[shown[0]].std() > 0.1
            cells = {m: ", ".join(f"{v:.2f}" for v in z) if apart else mean_std(z) for m, z in numbers.items()}
            rows.append([label + start, *(cells.get(m, "-") for m in claim.shown)])
    return grid_table([NAMES.get(m, m) for m in claim.shown], rows)


def by_share(result):
    """{share of wrong captions: labels}."""
    groups = itertools.groupby(result["runs"], key=lambda label: label.split(",")[0])
    return {share: list(labels) for share, labels in groups}


def thermostat_table(result):
    """T_eff for each share of wrong captions and each T, and its spread over the T that are colder."""
    rows = []
    for share, labels in by_share(result).items():
        ends = [[values(result, label, m) for m in ("effective_temperature", "temperature")] for label in labels]
        colder = [warm.mean() for warm, T in ends if T.mean() < 0.9 * warm.mean()]
        cells = [mean_std(warm) + f" (T={T.mean():.3f})" * ("learned" in label) for label, (warm, T) in zip(labels, ends)]
        rows.append([share, *cells, f"{max(colder) / min(colder):.2f}" if len(colder) > 1 else "-"])
    return grid_table([label.split(", ")[-1] for label in labels] + ["factor"], rows)


def law(result):
    """For each share of wrong captions: (T_eff of plain CLIP at T = .01 for each seed, T of the best
    recipe, its label, CLIP's best label), best by the mean of R@1 in both directions."""
    def score(label):
        return (values(result, label, "i2t_r1") + values(result, label, "t2i_r1")).mean()

    for share, labels in by_share(result).items():
        recipe = max((label for label in labels if "centred" in label), key=score)
        plain = max((label for label in labels if "centred" not in label), key=score)
        T_eff = values(result, f"{share}, CLIP, T = 0.01", "effective_temperature")
        yield share, T_eff, values(result, recipe, "temperature").mean().item(), recipe, plain


def law_table(result):
    rows = []
    for share, T_eff, T, recipe, plain in law(result):
        cells = [mean_std(values(result, label, m)) for label in (recipe, plain) for m in ("i2t_r1", "mixed_i2t")]
        rows.append([share, mean_std(T_eff), f"{T:g}", mean_std(T / T_eff), *cells, plain.split("CLIP, ")[1]])
    return grid_table(["T_eff of CLIP at .01", "recipe's best T", "factor", "R@1 i2t", "mixed i2t", "CLIP's best R@1 i2t",
                       "mixed i2t", "at"], rows)


# ---- pictures ----
def draw(name, claim, result, path):
    """A picture of a claim: curves over steps, lines over T, or a dot for each seed of each row."""
    if claim.picture == "curves":
        mean = {label: [{k: sum(h[i][k] for h in histories) / len(histories) for k in ("step", *claim.shown)}
                        for i in range(len(histories[0]))] for label, histories in result["runs"].items()}
        return cgap.plot_histories(mean, claim.shown, {128}, path, "symlog")
    if claim.picture == "lines":
        return draw_law(result, path) if name == "temperature" else draw_thermostat(result, path)
    labels = [label for label in result["runs"] if label not in claim.not_drawn]
    figure, axes = cgap.canvas(len(claim.drawn or claim.shown), 5)
    figure.set_size_inches(13, (1 + 0.26 * len(labels)) * -(-len(axes) // 5))
    for k, (axis, metric) in enumerate(zip(axes, claim.drawn or claim.shown)):
        for row, label in enumerate(labels):
            if metric in result["runs"][label][0][-1]:
                numbers = values(result, label, metric)
                axis.plot(numbers, [row] * len(numbers), "o", color="0.6", ms=4)
                axis.plot([numbers.mean()] * 2, [row - 0.3, row + 0.3], color="black", linewidth=2)
        axis.set(xlabel=NAMES.get(metric, metric), yticks=range(len(labels)),
                 yticklabels=labels if k % 5 == 0 else [], ylim=(len(labels) - 0.5, -0.5))
        axis.grid(axis="y", color="0.9")
    figure.savefig(path)


def over_temperatures(axis, ylabel, ticks):
    axis.set(xscale="log", xlabel="T", ylabel=ylabel)
    axis.set_xticks(ticks, [f"{T:g}" for T in ticks])
    axis.minorticks_off()
    axis.legend(fontsize=8)


def draw_law(result, path):
    """R@1 over T, the recipe and plain CLIP, a line for each share of wrong captions; upright lines
    where plain CLIP's T_eff ended."""
    figure, axes = cgap.canvas(2, 2)
    for k, (share, labels) in enumerate(by_share(result).items()):
        for axis, inside in zip(axes, (True, False)):
            rows = [label for label in labels if ("centred" in label) == inside and "learned" not in label]
            T = [values(result, label, "temperature").mean() for label in rows]
            seeds = torch.stack([values(result, label, "i2t_r1") for label in rows])
            axis.plot(T, seeds.mean(1), "-", color=f"C{k}", label=share)
            axis.plot(T, seeds, "o", color=f"C{k}", ms=3)
        axes[0].axvline(values(result, f"{share}, CLIP, T = 0.01", "effective_temperature").mean(), color=f"C{k}",
                        linestyle=":")
    for axis, title in zip(axes, ("CUA centred; dotted: where plain CLIP's T_eff ends", "plain CLIP")):
        axis.set(title=title, ylim=(0.2, 0.95))
        over_temperatures(axis, "R@1, image to text", [.01, .02, .05, .1, .2, .3])
    figure.savefig(path)


def draw_thermostat(result, path):
    """T_eff against T, a line for each share of wrong captions; and the gap against T / T_eff."""
    figure, axes = cgap.canvas(2, 2)
    for k, (share, labels) in enumerate(by_share(result).items()):
        T, T_eff, gap = ([values(result, label, metric).mean() for label in labels]
                         for metric in ("temperature", "effective_temperature", "centroid_distance"))
        axes[0].plot(T[:-1], T_eff[:-1], "o-", color=f"C{k}", label=share)
        axes[0].plot(T[-1:], T_eff[-1:], "*", color=f"C{k}", ms=12)
        axes[0].annotate(f"{T_eff[0]:.2f}", (T[0], T_eff[0]), (0, 5), textcoords="offset points")
        axes[1].plot([t / w for t, w in zip(T, T_eff)], gap, "o", color=f"C{k}", label=share)
    axes[0].plot([0.01, 0.2], [0.01, 0.2], ":", color="0.5", label="T_eff = T: not narrow")
    axes[0].set(yscale="log", title="stars: T learned, where it ended")
    axes[0].set_yticks([.01, .02, .05, .1, .2], ["0.01", "0.02", "0.05", "0.1", "0.2"])
    over_temperatures(axes[0], "T_eff", [.01, .02, .05, .1, .2])
    axes[1].set(xlabel="T / T_eff: 1 is not narrow, 0 is one point", ylabel="distance of the centroids")
    axes[1].legend(fontsize=8)
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
    lines = [f'<a id="{name}"></a>', f"## {claim.title}", "", f"![{name}]({name}.png)", "", claim.reading, ""]
    if claim.published:
        lines += [f"*Published:* {claim.published}", ""]
    tables = {"temperature": law_table, "thermostat": thermostat_table}
    lines += [tables[name](result) if name in tables else table(claim, result), ""]
    verdicts = {}
    for text, word in (verdict(result, *check) for check in claim.checks):
        verdicts.setdefault(word, []).append(text)
    lines += [f"- {word}: {'; '.join(texts)}" for word, texts in verdicts.items()] + [""] * bool(verdicts)
    histories = [history for row in result["runs"].values() for history in row]
    seconds = sum(history[-1].get("seconds", 0) for history in histories)
    cost = f"{len(histories)} runs" + f", {seconds / 60:.0f} core minutes" * bool(seconds)
    return "\n".join([*lines, f"`{result['command']}` ({cost})", ""])


def gallery(results):
    """The text of README.md."""
    machines = sorted({result["machine"] for result in results.values()})
    sections = [section(name, claim, results[name]) for name, claim in CLAIMS.items() if name in results]
    return "\n".join([INTRO, f"Run on {'; '.join(machines)}.\n", *sections])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=", ".join(CLAIMS))
    parser.add_argument("--seeds", type=int, default=3, help=f"so many, from seed {FIRST_SEED} on")
    parser.add_argument("--data", help="CSV file or COCO folder for the claim `real`; figures/clipart.py makes one")
    parser.add_argument("--list", action="store_true", help="print the claims and stop")
    parser.add_argument("--write", action="store_true", help="only draw and write the gallery again")
    args = parser.parse_args()
    if unknown := set(args.claims) - set(CLAIMS):
        parser.error(f"no claim is called {', '.join(unknown)}; there are {', '.join(CLAIMS)}")
    if args.list:
        return print("\n".join(f"{name:22}{claim.title}" for name, claim in CLAIMS.items()))
    names = args.claims or list(CLAIMS)
    if "real" in names and not (args.data or args.write):
        print("`real` is left out: name pictures with --data FILE; figures/clipart.py says how to get some")
        names.remove("real")
    for row in CLAIMS["real"].runs.values() if args.data else ():
        row["data"] = str(Path(args.data).resolve())
    path = HERE / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not args.write:
        results |= measured(names, args.seeds)
        path.write_text(json.dumps(results) + "\n", encoding="utf-8")
    for name in set(names) & set(results):
        draw(name, CLAIMS[name], results[name], HERE / f"{name}.png")
    (HERE / "README.md").write_text(gallery(results), encoding="utf-8")
    print(HERE / "README.md")


if __name__ == "__main__":
    main()
