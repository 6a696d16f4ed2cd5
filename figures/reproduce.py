"""Every claim about the gap: run it over seeds, draw it, and write the gallery.

    python figures/reproduce.py                          # all claims, on all cores
    python figures/reproduce.py points losses            # some of them
    python figures/reproduce.py --device cuda --at-a-time 12
    python figures/reproduce.py photographs --features IMAGES.pt TEXTS.pt      # see heads.py
    python figures/reproduce.py --write                  # only draw and write the gallery again

Runs that are finished are not run again, and equal runs of two claims are one. Writes a picture for
each claim, results.json and README.md (the gallery: gallery.md with its tables) beside this file.
The claims are data, in claims.py; this is a client of cgap.train and cgap.smallest_gap, as a script
of yours would be.
"""
import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import torch
from tqdm import tqdm

import cgap
import heads
from claims import CLAIMS

# Raise this where a change to cgap.py changes the numbers of its runs, and run the claims again.
# test_cgap.py sees such a change: it has the numbers of short runs on record.
NUMBERS = 4


# ---- one run ----
@functools.lru_cache(1)
def data_of(wrong=None, features=None, **settings):
    """The cgap.Data that a job asks for: those that come one after the other often share theirs."""
    if features:
        return heads.load_features(*features)
    data = cgap.load_data(cgap.Config(**settings))
    if wrong == "nobody's":
        texts = data.train.texts.clone()
        chosen = torch.randperm(len(texts))[:len(texts) // 5]
        noise = torch.randint(2, len(data.vocab), texts[chosen].shape, dtype=texts.dtype)
        texts[chosen] = torch.where(texts[chosen] > 0, noise, 0)
        data = data._replace(train=cgap.Pairs(data.train.images, texts, data.train.group))
    if wrong == "in the batch":
        data = data._replace(train=SwappedInBatch(data.train.images, data.train.texts))
    return data


class SwappedInBatch(cgap.Pairs):
    """Pairs of which a fifth swap their texts within each batch."""

    def batch(self, i, epoch=0):
        images, texts = super().batch(i, epoch)
        seed = int(i.sum()) if torch.is_tensor(i) else 0  # another for each batch
        return images, texts[cgap.mismatched(len(texts), 0.2, seed)]


def start_from(model, cfg, folder, projections):
    """Give a model the encoders of the run in a folder, with its projections `kept` or `fresh`."""
    weights = {name: weight for name, weight in cgap.load_run(folder)["model"].items()
               if name != "log_scale" and not (projections == "fresh" and "projection" in name)}
    torch.manual_seed(cfg.seed + 1000)  # fresh ones are not those that the other run began with
    fresh = cgap.TwoEncoders(cfg, len(cgap.load_run(folder)["vocab"]))
    model.load_state_dict(fresh.state_dict() | weights)


def steering(kind):
    """What to use as the gradient of the two shared vectors (2, 1, dim)."""
    generator = torch.Generator().manual_seed(1)

    def steer(step, gradient):
        if kind == "one side":
            return gradient * torch.tensor([1.0, 0.0]).view(2, 1, 1)
        if kind == "one gradient":
            return gradient.mean(0, keepdim=True).expand_as(gradient)
        if kind == "random" or step < 20:
            return torch.randn(gradient.shape, generator=generator)
        return None if kind == "random, then nothing" else gradient  # None: they stay

    return steer if kind else None


def run_job(job):
    """Do one job in a process of its own; its history is then in <folder>.json."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    began = time.perf_counter()
    settings, folder = dict(job["settings"]), job["folder"]
    shutil.rmtree(folder, ignore_errors=True)
    if job["kind"] == "points":
        steer = steering(settings.pop("steer", None))
        history, _ = cgap.smallest_gap(seed=job["seed"], steer=steer, **settings)
    elif job["kind"] == "heads":
        data = data_of(features=tuple(job["features"]))
        where = {"seed": job["seed"], "device": job["device"]}
        history = heads.train_heads(data, folder, **where, **settings)
    else:
        start, projections = settings.pop("start", None), settings.pop("projections", None)
        wrong = settings.pop("wrong", None)
        cfg = cgap.Config(**{"eval_every": 10 ** 6, **settings}, seed=job["seed"],
                          device=job["device"], out=folder)
        data = data_of(wrong=wrong, limit=cfg.limit, seed=cfg.seed)
        torch.manual_seed(cfg.seed)
        model = cgap.TwoEncoders(cfg, len(data.vocab))
        if start:
            start_from(model, cfg, start, projections)
        history = cgap.train(cfg, model=model, data=data, quiet=True)
        if not cfg.same_modality:
            history[-1] |= heads.search_without_means(model, data)
    history[-1]["seconds"] = time.perf_counter() - began
    Path(folder + ".json").write_text(json.dumps(history))


# ---- all of them ----
def job_of(claim, label, seed, options, jobs):
    """The job of a row of a claim, noted in `jobs` by its folder, which equal jobs share."""
    settings = dict(claim.rows[label])
    if "start" in settings:
        settings["start"] = job_of(claim, settings["start"], seed, options, jobs)["folder"]
    if claim.kind == "train":
        defaults = vars(cgap.Config())
        settings = {name: value for name, value in settings.items()
                    if name not in defaults or value != defaults[name]}
    job = {"kind": claim.kind, "settings": settings, "seed": seed}
    if claim.kind == "heads":
        job["features"] = options["features"]
    what = json.dumps([NUMBERS, job], sort_keys=True)
    job["folder"] = "runs/reproduce/" + hashlib.sha256(what.encode()).hexdigest()[:12]
    job["device"] = options["device"]
    jobs[job["folder"]] = job
    return job


def measure(names, options):
    """{claim: {label: [[first record, last record] of each seed]}}. What has not been run is run,
    each on one core; what starts from others last."""
    jobs, rows = {}, {}
    for name in names:
        claim = CLAIMS[name]
        for label in claim.rows:
            seeds = claim.seeds[:1] if label in claim.once else claim.seeds
            rows[name, label] = [job_of(claim, label, seed, options, jobs) for seed in seeds]
    Path("runs/reproduce").mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options["at_a_time"], spawn) as pool:
        for later in (False, True):
            todo = [job for job in jobs.values() if ("start" in job["settings"]) == later
                    and not Path(job["folder"] + ".json").exists()]
            list(tqdm(pool.map(run_job, todo), "runs", len(todo)))
    results = {name: {} for name in names}
    for (name, label), row in rows.items():
        histories = [json.loads(Path(job["folder"] + ".json").read_text()) for job in row]
        results[name][label] = [[rounded(history[0]), rounded(history[-1])]
                                for history in histories]
    if "losses" in names:
        snapshots = {label: cgap.load_run(rows["losses", label][0]["folder"])["snapshots"]
                     for label in ("CLIP, T = 0.01", "CUA, T = 0.01", "CLIP, T = 0.1")}
        cgap.plot_clouds(snapshots, HERE / "embeddings.png")
        cgap.animate(snapshots, HERE / "embeddings.gif")
    return results


def rounded(record):
    """A record with five digits of each number."""
    return {name: float(f"{value:.5g}") for name, value in record.items()}


# ---- tables ----
def values(row, metric, end=-1):
    """A metric of a row for each seed, at the end or (0) at the start; None if it has none."""
    records = [history[end] for history in row]
    if metric == "margin_in_T":
        return torch.tensor([record["margin"] / record["temperature"] for record in records])
    if any(metric not in record for record in records):
        return None
    return torch.tensor([record[metric] for record in records])


def cell(numbers):
    """Mean±standard deviation, or the only one."""
    if numbers is None:
        return ""
    if len(numbers) == 1:
        return f"{numbers.item():.3f}"
    return f"{numbers.mean():.3f}±{numbers.std():.3f}"


def spelled(metric):
    """A metric's name for the head of a column."""
    known = {"i2t_r1": "R@1 i2t", "t2i_r1": "R@1 t2i", "linear_separability": "separability",
             "linear_separability_c100": "separability C = 100", "centroid_distance": "centroids",
             "unif": "uniformity", "align": "alignment", "margin_in_T": "margin / T",
             "mixed_i2t_subtracted": "mixed i2t, means subtracted",
             "mixed_t2i_subtracted": "mixed t2i, means subtracted"}
    return known.get(metric, metric.replace("_", " "))


def table(name, rows):
    """The rows of a claim as Markdown, and what they cost."""
    claim = CLAIMS[name]
    lines = ["|" + "|".join(["", *map(spelled, claim.shown)]) + "|",
             "|---" * (len(claim.shown) + 1) + "|"]
    for label, row in rows.items():
        for end, suffix in ((0, ", at the start"), (-1, "")) if claim.starts else ((-1, ""),):
            cells = [cell(values(row, metric, end)) for metric in claim.shown]
            lines.append("|" + "|".join([label + suffix, *cells]) + "|")
    seconds = [history[-1]["seconds"] for row in rows.values() for history in row]
    features = " --features IMAGES.pt TEXTS.pt" if claim.kind == "heads" else ""
    lines += ["", f"`python figures/reproduce.py {name}{features}`: {len(seconds)} runs, "
              f"{sum(seconds) / 60:.0f} core minutes; seeds {', '.join(map(str, claim.seeds))}, "
              f"where no spread is given {claim.seeds[0]} only."]
    return "\n".join(lines)


# ---- pictures ----
def draw_dots(name, rows, file=None):
    """A dot for each seed of each row, in panels; the row with the highest first value on top."""
    panels = CLAIMS[name].drawn or CLAIMS[name].shown[:4]
    order = sorted(rows, key=lambda label: values(rows[label], panels[0]).mean())
    figure, (axes,) = cgap.canvas(1, len(panels))
    figure.set_size_inches(3 + 2.6 * len(panels), 1 + 0.26 * len(rows))
    for axis, metric in zip(axes, panels):
        for height, label in enumerate(order):
            numbers = values(rows[label], metric)
            axis.plot(numbers, [height] * len(numbers), "o", color="0.6", ms=4)
            axis.plot(numbers.mean(), height, "|k", ms=12)
        axis.set(xlabel=spelled(metric), ylim=(-0.5, len(rows) - 0.5))
        axis.set_yticks(range(len(rows)), order if axis is axes[0] else [""] * len(rows))
        axis.grid(axis="y", color="0.9")
    figure.savefig(HERE / (file or f"{name}.png"))


def draw_points(name, rows):
    """What `python cgap.py --points` draws, points.png, and the dots of the rows."""
    cgap.run_points(out=HERE)
    draw_dots(name, rows, "points-push.png")


def draw_margin(name, rows):
    """Margin, spread, overlap and mixed search against T: a column for each loss, a line for each
    share of wrong captions, a dot for each run."""
    metrics = ("margin", "spread", "overlap", "mixed_i2t")
    figure, axes = cgap.canvas(len(metrics), 2)
    figure.set_size_inches(8, 10)
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    for k, axis in enumerate(axes.flat):
        metric, loss = metrics[k // 2], ("CLIP", "CUA")[k % 2]
        for color, share in enumerate((0, 5, 20, 50)):
            shown = [row for label, row in rows.items()
                     if label.startswith(f"{share} % wrong, {loss}, T = ")]
            T = [values(row, "temperature").mean() for row in shown]
            means = [values(row, metric).mean() for row in shown]
            axis.plot(T, means, "-", color=f"C{color}", label=f"{share} % wrong")
            for t, row in zip(T, shown):
                numbers = values(row, metric)
                axis.plot([t] * len(numbers), numbers, "o", color=f"C{color}", ms=3)
        axis.set(xscale="log", ylim=(-0.04, 1.04), ylabel=spelled(metric) if k % 2 == 0 else "",
                 title=loss if k < 2 else "", xlabel="T" if k >= 6 else "")
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
        axis.grid(color="0.93")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(HERE / f"{name}.png")


VERDICT = {  # scale: (claim, what stands before the loss in its labels, a warm T)
    "20,000 drawings, exact captions,\n1,500 steps of 64": ("losses", "", 0.1),
    "200,000 drawings, a fifth of the captions wrong,\n2,000 steps of 256":
        ("scale", "20 % wrong, ", 0.15),
    "7,091 photographs, frozen pretrained encoders,\n1,000 steps of 256": ("photographs", "", 0.1)}


def draw_verdict(results):
    """Mixed search at three scales: cold and warm, without and with the two terms."""
    figure, (axes,) = cgap.canvas(1, 3)
    figure.set_size_inches(12, 3.4)
    for axis, (scale, (claim, where, warm)) in zip(axes, VERDICT.items()):
        bars = [("CLIP, cold", f"{where}CLIP, T = 0.01", "mixed_i2t"),
                ("its means subtracted", f"{where}CLIP, T = 0.01", "mixed_i2t_subtracted"),
                ("CUA, cold", f"{where}CUA, T = 0.01", "mixed_i2t"),
                ("CLIP, warm", f"{where}CLIP, T = {warm}", "mixed_i2t"),
                ("CUA, warm", f"{where}CUA, T = {warm}", "mixed_i2t")]
        for height, (bar, label, metric) in enumerate(reversed(bars)):
            numbers = values(results[claim][label], metric)
            color = "C3" if "warm" in bar else "C2" if "CUA" in bar else "C0"
            axis.barh(height, numbers.mean(), color=color, alpha=0.8)
            axis.plot(numbers, [height] * len(numbers), "ok", ms=3)
            axis.text(numbers.max(), height, f"  {numbers.mean():.3f}", va="center")
        names = [bar for bar, *_ in reversed(bars)]
        axis.set_yticks(range(5), names if axis is axes[0] else [""] * 5)
        highest = max(values(results[claim][label], metric).max() for _, label, metric in bars)
        axis.set(title=scale, xlim=(0, 1.3 * highest), xlabel="mixed search, image asks")
        axis.locator_params(axis="x", nbins=4)
        axis.title.set_fontsize(9)
    figure.savefig(HERE / "verdict.png")


def draw_scenes():
    """A contact sheet of held-out scenes, larger than the encoders see them."""
    data = cgap.load_data(cgap.Config(limit=200, image_size=96))
    words = list(data.vocab)
    figure, axes = cgap.canvas(2, 5)
    figure.set_size_inches(11, 5)
    for axis, image, tokens in zip(axes.flat, *data.val.batch(slice(10))):
        axis.axis("off")
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(textwrap.fill(" ".join(words[k] for k in tokens if k), 20), fontsize=9)
    figure.savefig(HERE / "scenes.png", dpi=60)


# ---- the gallery ----
def gallery(results):
    """gallery.md with the table of each claim in the line that names it: {{table NAME}}."""
    text = (HERE / "gallery.md").read_text(encoding="utf-8")

    def fill(match):
        return table(match[1], results[match[1]]) if match[1] in results else "(not run)"

    return re.sub(r"\{\{table ([\w-]+)\}\}", fill, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", default="all", choices=["all", *CLAIMS])
    parser.add_argument("--features", nargs=2, metavar=("IMAGES.pt", "TEXTS.pt"),
                        help="for the claim `photographs`: heads.py says what is in them")
    parser.add_argument("--device", default="cpu", help="as cgap.py's")
    parser.add_argument("--at-a-time", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--write", action="store_true", help="only draw and write again")
    args = parser.parse_args()
    names = list(CLAIMS) if "all" in args.claims else args.claims
    if "photographs" in names and not (args.features or args.write):
        print("without --features photographs are left out: heads.py says what is needed")
        names = [name for name in names if name != "photographs"]
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if not args.write:
        results |= measure(names, vars(args))
        path.write_text(json.dumps(results) + "\n")
    for name in set(names) & set(results):
        globals()[CLAIMS[name].picture](name, results[name])
    if all(claim in results for claim, *_ in VERDICT.values()):
        draw_verdict(results)
    draw_scenes()
    (HERE / "README.md").write_text(gallery(results), encoding="utf-8")
    print(HERE / "README.md")


if __name__ == "__main__":
    main()
