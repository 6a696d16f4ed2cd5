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
import time
from concurrent.futures import ProcessPoolExecutor
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
    frozen = {"no biases": "bias", "projection without bias": "projection.bias"}.get(kind, "-")
    for name, p in model.named_parameters():
        if name.endswith(frozen):
            p.data.zero_()
            p.requires_grad_(False)
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
        history = cgap.train(cfg, model=make_model(job["model"], cfg, job["source"]), quiet=True)
    history[-1]["seconds"] = time.perf_counter() - began
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
    if not claim.points:
        row = {name: value for name, value in row.items() if value != getattr(cgap.Config, name)}
    what = json.dumps([CODE, claim.points, sorted(row.items()), model, source, seed])
    folder = "runs/reproduce/" + hashlib.sha256(what.encode()).hexdigest()[:12]
    known[folder] = {"points": claim.points, "settings": row, "seed": seed, "folder": folder, "model": model,
                     "source": source}
    return known[folder]


def run_all(jobs):
    """Run those that are not finished, each on one core; those that start from others last."""
    todo = [job for job in jobs.values() if not Path(job["folder"] + ".json").exists()]
    Path("runs/reproduce").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for later in (False, True):
            now = [job for job in todo if bool(job["source"]) == later]
            list(tqdm(pool.map(run, now), "runs", len(now)))
