"""Run every claim about the gap over its seeds, draw its picture, and write the gallery.

    python figures/reproduce.py                          # all claims, on all cores
    python figures/reproduce.py points losses            # some of them
    python figures/reproduce.py --device cuda --at-a-time 12
    python figures/reproduce.py photographs --features IMAGES.pt TEXTS.pt      # see heads.py
    python figures/reproduce.py --write                  # only draw, and write the gallery again

Runs that are finished are not run again, and equal runs of two claims are one. All are kept in
runs/reproduce. Writes a picture for each claim, results.json and README.md (gallery.md with its
tables) beside this file. The claims are data, in claims.py; what a run is called stands in
records.py, and tables.py and pictures.py show results. This file is a client of cgap.train and
cgap.smallest_gap, as a script of yours would be.
"""
import argparse
import functools
import json
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import torch
from tqdm import tqdm

import cgap
import heads
import pictures
import records
import repairs
import tables
from claims import CLAIMS

# Fields of a row that are no fields of cgap.Config
OWN_FIELDS = ("fold", "captions", "projections", "photographs", "start")


# ---- runs of each kind ----
@functools.lru_cache(1)
def data_of(captions=None, features=None, **settings):
    """The cgap.Data that a job asks for: those that come one after the other often share theirs."""
    if features:
        return heads.load_features(*features)
    data = cgap.load_data(cgap.Config(**settings))
    images, texts = data.training.images, data.training.texts
    if captions == "replaced by random words":
        texts = texts.clone()
        chosen = torch.randperm(len(texts))[:len(texts) // 5]
        noise = torch.randint(2, len(data.vocab), texts[chosen].shape, dtype=texts.dtype)
        texts[chosen] = torch.where(texts[chosen] > 0, noise, 0)
        data = data._replace(training=cgap.Pairs(images, texts))
    if captions == "swapped within the batch":
        data = data._replace(training=SwappedInBatch(images, texts))
    return data


class SwappedInBatch(cgap.Pairs):
    """Pairs of which a fifth swap their captions within each batch."""

    def take(self, i, epoch=0):
        images, texts = super().take(i, epoch)
        seed = int(i.sum()) if torch.is_tensor(i) else 0  # another for each batch
        return images, texts[cgap.mismatch_captions(len(texts), 0.2, seed)]


def start_from(model, cfg, folder, projections):
    """Give a model the encoders of the run in a folder, with its own projections or new ones."""
    run = cgap.load_run(folder)
    weights = {name: weight for name, weight in run["model"].items()
               if name != "log_scale" and not (projections == "new" and "projection" in name)}
    torch.manual_seed(cfg.seed + 1000)  # new ones are not those that the other run began with
    new = cgap.TwoEncoders(cfg, len(run["vocab"]))
    model.load_state_dict(new.state_dict() | weights)


def train_encoders(job):
    """The history of a run of cgap.train."""
    settings = dict(job["settings"])
    own = {name: settings.pop(name, None) for name in OWN_FIELDS}
    cfg = cgap.Config(**{"eval_every": 10 ** 6, **settings}, seed=job["seed"],
                      device=job["device"], out=job["folder"])
    data = data_of(captions=own["captions"], limit=cfg.limit, seed=cfg.seed)
    torch.manual_seed(cfg.seed)
    model = cgap.TwoEncoders(cfg, len(data.vocab))
    if own["start"]:
        start_from(model, cfg, own["start"], own["projections"])
    fold_means = cgap.fold_means
    try:
        if own["fold"] is False:  # the means are then measured where the encoders left them
            cgap.fold_means = lambda *args: None
        history = cgap.train(cfg, model=model, data=data, quiet=True)
    finally:
        cgap.fold_means = fold_means
    if not cfg.same_modality:
        history[-1] |= heads.measure_further(model, data)
    return history


def train_heads(job):
    """The history of two heads on features."""
    data = data_of(features=tuple(job["features"]))
    return heads.train_heads(data, job["folder"], seed=job["seed"], device=job["device"],
                             **job["settings"])


def offset_gradient_of(kind):
    """What to use as the gradient of the two offsets (2, 1, dim): None, or a function."""
    generator = torch.Generator().manual_seed(1)

    def offset_gradient(step, gradient):
        if kind == "one modality":
            return gradient * torch.tensor([1.0, 0.0]).view(2, 1, 1)
        if kind == "one gradient":
            return gradient.mean(0, keepdim=True).expand_as(gradient)
        if kind == "random" or step < 20:
            return torch.randn(gradient.shape, generator=generator)
        return None if kind == "random, then nothing" else gradient  # None: they stay

    return offset_gradient if kind else None


def train_points(job):
    """The history of free points."""
    settings = dict(job["settings"])
    offset_gradient = offset_gradient_of(settings.pop("offset_gradient", None))
    history, _ = cgap.smallest_gap(seed=job["seed"], offset_gradient=offset_gradient, **settings)
    return history


# ---- what is measured of a finished run ----
def load_base(job):
    """The model of the run that a job examines, on the CPU; its data, as they were before
    cgap.train prepared them; its cgap.Config."""
    if "features" in job:
        data = data_of(features=tuple(job["features"]))
        model, cfg = heads.load_heads(job["base"], data)
    else:
        model, _ = cgap.load_model(job["base"])
        cfg = cgap.load_run(job["base"])["cfg"]
        data = data_of(captions=None, limit=cfg.limit, seed=cfg.seed)
    return model, data, cfg


def examine_landscape(job):
    """{which pairs: the curve of the loss over the distance of the means, and four numbers}."""
    model, data, cfg = load_base(job)
    points, parts = repairs.landscape(model, cgap.prepare(data, cfg), cfg), {}
    for which in ("training", "held-out"):
        curve = sorted((p["g"], p["loss"], p["trained_g"]) for p in points if p["set"] == which)
        distances, losses, (trained, *_) = map(list, zip(*curve))
        least = min(losses)
        parts[f"{which} pairs"] = {
            "curve": {"g": distances, "loss": losses},
            "end": {"trained_g": trained, "least_g": distances[losses.index(least)],
                    "rise_at_0": losses[0] - least,
                    "rise_as_trained": losses[distances.index(trained)] - least}}
    return parts


def examine_repairs(job):
    """{the repair: what was measured after it}."""
    return {name: {"end": metrics} for name, metrics in repairs.repair_all(*load_base(job)).items()}


# ---- one job ----
RUN = {"train": train_encoders, "heads": train_heads, "points": train_points}
EXAMINE = {"landscape": examine_landscape, "repairs": examine_repairs}


def run_job(job):
    """Do one job in a process of its own. <folder>.json then has its history or, of a job that
    examines a run, its parts."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    began = time.perf_counter()
    shutil.rmtree(job["folder"], ignore_errors=True)
    if job["kind"] in RUN:
        content = RUN[job["kind"]](job)
        content[-1]["seconds"] = time.perf_counter() - began
    else:
        content = EXAMINE[job["kind"]](job)
        seconds = (time.perf_counter() - began) / len(content)  # unless a repair says its own
        for part in content.values():
            part["end"] = {"seconds": seconds} | part["end"]
    draft = Path(job["folder"] + ".tmp")
    draft.write_text(json.dumps(content))
    draft.replace(job["folder"] + ".json")  # whoever finds it finds all of it


# ---- all jobs ----
def job_of(kind, settings, seed, options, jobs, pretrained=None):
    """The job of a row, noted in `jobs` by its folder, which equal jobs share; so are the jobs that
    it needs to be done before."""
    settings = dict(settings)
    job = {"kind": kind, "settings": settings, "seed": seed}
    if kind in EXAMINE:
        base_kind = "heads" if settings.pop("photographs", False) else "train"
        base = job_of(base_kind, settings, seed, options, jobs)
        job |= {"settings": base["settings"], "base": base["folder"]}
        if base_kind == "heads":
            job["features"] = base["features"]
    elif kind == "heads":
        job["features"] = options["features"]
    elif kind == "train":
        if "projections" in settings:
            start = job_of("train", pretrained, seed, options, jobs)
            settings["start"] = start["folder"]
        job["settings"] = records.without_defaults(settings)
    job["folder"] = records.folder_of(job)
    job["device"] = options["device"]
    jobs[job["folder"]] = job
    return job


def needs_another(job):
    """Whether a job starts from another's run."""
    return "base" in job or "start" in job["settings"]


def do_all(jobs, at_a_time):
    """Do what has not been done, each job on one core; those that need others last."""
    Path("runs/reproduce").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(at_a_time, multiprocessing.get_context("spawn")) as pool:
        for later in (False, True):
            todo = [job for job in jobs if needs_another(job) == later
                    and not Path(job["folder"] + ".json").exists()]
            list(tqdm(pool.map(run_job, todo), "runs", len(todo)))


def records_of(name, claim, settings, job):
    """The records of a finished job of a claim."""
    content = json.loads(Path(job["folder"] + ".json").read_text())
    head = {"claim": name, "kind": claim.kind, "settings": settings, "seed": job["seed"]}
    if claim.kind in RUN:
        first, last = dict(content[0]), dict(content[-1])
        seconds = round(last.pop("seconds"), 2)
        return [head | {"start": records.rounded(first), "end": records.rounded(last),
                        "seconds": seconds}]
    found = []
    for part, measured in content.items():
        end = records.rounded(measured["end"])
        record = head | {"part": part, "end": end, "seconds": end["seconds"]}
        if "curve" in measured:
            record["curve"] = {axis: [float(f"{value:.5g}") for value in numbers]
                               for axis, numbers in measured["curve"].items()}
        found.append(record)
    return found


def measure(names, options):
    """The records of these claims; what has not been run is run."""
    jobs, rows = {}, []
    for name in names:
        claim = CLAIMS[name]
        for settings in claim.rows:
            if settings.get("photographs") and not options["features"]:
                continue
            for seed in claim.seeds_of(settings):
                job = job_of(claim.kind, settings, seed, options, jobs, claim.pretrained)
                rows.append((name, claim, settings, job))
    do_all(jobs.values(), options["at_a_time"])
    return [record for row in rows for record in records_of(*row)]


def merge(old, new, names):
    """The records of other claims, and the new ones. Without features the rows of photographs are
    not run; what is known of them stays."""
    measured = {(record["claim"], json.dumps(record["settings"])) for record in new}
    def is_kept(record):
        is_photograph = record["settings"].get("photographs", False)
        key = record["claim"], json.dumps(record["settings"])
        return record["claim"] not in names or is_photograph and key not in measured
    return [record for record in old if is_kept(record)] + new


# ---- the command line ----
def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", default="all", choices=["all", *CLAIMS],
                        help="The claims to run. The default is all.")
    parser.add_argument("--features", nargs=2, metavar=("IMAGES.pt", "TEXTS.pt"),
                        help="Two files for photographs. heads.py says what is in them.")
    parser.add_argument("--device", default="cpu", help="The device, as cgap.py's.")
    parser.add_argument("--at-a-time", type=int, default=os.cpu_count(),
                        help="How many runs to do at a time. The default is one on each core.")
    parser.add_argument("--write", action="store_true",
                        help="Run nothing: only draw the pictures and write the gallery again.")
    return parser.parse_args()


def main():
    args = parse_arguments()
    names = list(CLAIMS) if "all" in args.claims else args.claims
    if not args.features and not args.write and {"photographs", "repairs"} & set(names):
        print("without --features, photographs are left out; heads.py says what is needed")
        names = [name for name in names if name != "photographs"]
    found = records.read_results(HERE / "results.json")
    if not args.write:
        found = merge(found, measure(names, vars(args)), names)
        records.write_results(HERE / "results.json", found)
    rows = {name: records.rows_of(claim, name, found) for name, claim in CLAIMS.items()}
    for name in names:
        if rows[name]:
            CLAIMS[name].draw(HERE, name, rows)
    pictures.draw_verdict(HERE, rows)
    pictures.draw_scenes(HERE)
    (HERE / "README.md").write_text(tables.gallery(HERE / "gallery.md", CLAIMS, rows),
                                    encoding="utf-8")
    print(HERE / "README.md")


if __name__ == "__main__":
    main()
