"""The records of results.json: what a run is called, where it lies, and what was measured.

results.json is a list with one record in each line. A record says which claim a run belongs to,
its settings and its seed, and holds what was measured at the start and at the end of training:

    {"claim": "losses", "kind": "train", "settings": {"temperature": 0.1}, "seed": 6,
     "start": {"linear_separability": 1.0, ...}, "end": {...}, "seconds": 58.1}

Of a repair, and of a curve of the claim `landscape`, `part` says which one it is. Nothing here is
run by itself; reproduce.py, tables.py and pictures.py use it.
"""
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

import cgap

# What decides the numbers of each kind of run. Raise one where a change of the code changes its
# numbers; runs that were finished under the old number are then not found, and run again.
NUMBERS = {"train": 4, "heads": 4, "points": 5, "landscape": 5, "repairs": 5}
DEFAULTS = vars(cgap.Config())

# {metric: (the head of its column, the name of its axis in pictures)}. The order is that of the
# columns of a full table.
METRICS = {
    "linear_separability": ("separability", "separability (0.5 is chance)"),
    "linear_separability_c100": ("separability, C = 100", "separability with C = 100"),
    "centroid_distance": ("centroid distance", "centroid distance"),
    "unif": ("uniformity", "uniformity (lower: more uniform)"),
    "align": ("alignment", "alignment (0: pairs coincide)"),
    "xunif": ("cross-modal uniformity", "cross-modal uniformity"),
    "margin": ("margin", "margin"),
    "margin_in_T": ("margin / T", "margin, in units of T"),
    "cosine_true": ("mean cosine, true pairs", "mean cosine of true pairs"),
    "cosine_other": ("mean cosine, other pairs", "mean cosine of other pairs"),
    "spread": ("spread", "spread (0: a single point)"),
    "agreement": ("agreement", "agreement"),
    "overlap": ("overlap", "overlap of directions"),
    "temperature": ("T at the end", "temperature T at the end"),
    "best_T": ("best T of held-out pairs", "best T of held-out pairs"),
    "i2t_r1": ("R@1", "R@1: image finds its caption"),
    "t2i_r1": ("R@1, caption to image", "R@1: caption finds its image"),
    "mixed_i2t": ("mixed search", "mixed search: image finds its caption"),
    "mixed_t2i": ("mixed search, caption to image", "mixed search: caption finds its image"),
    "mixed_i2t_subtracted": ("mixed search, means subtracted",
                             "mixed search once means are subtracted"),
    "mixed_t2i_subtracted": ("mixed search, caption to image, means subtracted",
                             "mixed search, caption to image, once means are subtracted"),
    "zero_shot": ("zero-shot", "zero-shot classification"),
    "zero_shot_unseen": ("zero-shot, unseen", "zero-shot, unseen combinations"),
    "arithmetic_attribute": ("arithmetic, attributes", "arithmetic with attributes"),
    "arithmetic_relation": ("arithmetic, relations", "arithmetic with relations"),
    "train_loss": ("training loss", "loss of training pairs"),
    "trained_g": ("distance as trained", "centroid distance as trained"),
    "least_g": ("distance of the least loss", "centroid distance of the least loss"),
    "rise_at_0": ("loss at distance 0, minus the least", "loss without a gap, minus the least"),
    "rise_as_trained": ("loss as trained, minus the least", "loss as trained, minus the least"),
    "pairs": ("pairs seen", "pairs seen"),
    "seconds": ("seconds", "seconds"),
}
# Version 4.0 measured two more; runs that it finished are used as they are, but for these.
DROPPED = {"step", "train_clip", "best_temperature"}


# ---- names ----
TERMS = {"unif": "uniformity", "align": "alignment", "xunif": "cross-modal uniformity"}
KNOWN_LOSSES = {(0, 0, 0): "CLIP", (1, 1, 0): "CUA", (1, 1, 1): "CUAXU"}


def loss_name(settings):
    """The loss: "CLIP", "CUA", "CLIP + 0.03 alignment", "CLIP centred, not folded" and so on."""
    weights = {term: settings.get(term, 0) for term in TERMS}
    name = KNOWN_LOSSES.get(tuple(weights.values()))
    if not name:
        added = [f"{weight:g} {TERMS[term]}" for term, weight in weights.items() if weight]
        name = " + ".join(["CLIP", *added])
    if settings.get("center"):
        name += " centred"
    if not settings.get("fold", True):
        name += ", not folded"
    return name


def temperature_name(settings):
    """ "T = 0.01" or "T learned"."""
    if settings.get("learn_temperature"):
        return "T learned"
    return f"T = {settings.get('temperature', DEFAULTS['temperature']):g}"


def captions_name(settings):
    """ "exact captions", "20 % mismatched", or how else a fifth of the captions is wrong."""
    if "captions" in settings:
        return f"20 % {settings['captions']}"
    share = settings.get("mismatch", 0)
    return f"{100 * share:g} % mismatched" if share else "exact captions"


def field_name(field, settings):
    """What a label says of a field beside the loss and the temperature. `size` and `others` stand
    for several fields, `others` for those that are named only if they are not the default."""
    value = settings.get(field, DEFAULTS.get(field))
    if field == "mismatch":
        return captions_name(settings)
    if field == "same_modality":
        return "the same images in both encoders" if value else "images and captions"
    if field == "size":
        if settings.get("photographs"):
            return "photographs"
        return f"{settings.get('limit') or 20_000:,} drawings"
    if field == "projections":
        return f"{value} projections" if value else "before fine-tuning"
    if field == "others":
        names = [field_name(name, settings) for name in ("same_modality", "dim")
                 if settings.get(name, DEFAULTS[name]) != DEFAULTS[name]]
        return ", ".join(names)
    numbers = {"dim": "d = {:,}", "batch": "batches of {:,}", "steps": "{:,} steps"}
    return numbers[field].format(value)


def label(settings, told=(), part=""):
    """The label of a run: "CLIP, T = 0.01, 20 % mismatched". told: fields that the label names
    beside the loss and the temperature. part: which of several results of one run it is."""
    names = [loss_name(settings), temperature_name(settings)]
    names += [field_name(field, settings) for field in told]
    return ", ".join(filter(None, names + [part]))


OFFSETS_AS = {  # what is used as the gradient of the offsets
    "one modality": "an offset for the images only",
    "one gradient": "both offsets get one gradient",
    "random": "random numbers move the offsets",
    "random, then nothing": "random numbers move them for 20 steps, then nothing",
    "random, then the loss": "random numbers move them for 20 steps, then the loss"}


def points_label(settings):
    """The label of a run of free points, which names what differs from the default."""
    rate = settings.get("offset_lr", 1)
    if "offset_gradient" in settings:
        names = [OFFSETS_AS[settings["offset_gradient"]]]
    elif rate == 0:
        names = ["points alone"]
    elif rate == 1:
        names = ["with offsets"]
    else:
        names = [f"with offsets at 1/{1 / rate:.0f} of the points' rate"]
    if loss_name(settings) != "CLIP":
        names.append(loss_name(settings))
    if "temperature" in settings:
        names.append(temperature_name(settings))
    if "mismatch" in settings:
        names.append(captions_name(settings))
    if "dim" in settings:
        names.append(f"d = {settings['dim']}")
    return ", ".join(names)


# ---- where a finished run lies ----
def folder_of(job):
    """The folder of a job's run: its name is a hash of all that decides the run's numbers."""
    deciding = {key: job[key] for key in ("kind", "settings", "seed", "features", "base")
                if key in job}
    text = json.dumps([NUMBERS[job["kind"]], deciding], sort_keys=True)
    return "runs/reproduce/" + hashlib.sha256(text.encode()).hexdigest()[:12]


def without_defaults(settings):
    """The settings of a run of cgap.train, without those that are Config's defaults, so that equal
    runs have one name, however a claim writes them."""
    return {name: value for name, value in settings.items()
            if name not in DEFAULTS or value != DEFAULTS[name]}


# ---- results.json ----
def read_results(path):
    """The records of results.json; none if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def write_results(path, records):
    """Write the records, one in each line, so that a change can be read line by line."""
    def order(record):  # parts of one run keep the order in which they were measured
        return record["claim"], json.dumps(record["settings"], sort_keys=True), record["seed"]

    lines = [json.dumps(record) for record in sorted(records, key=order)]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def rounded(record):
    """A record of metrics with five digits of each number, without what is dropped."""
    return {name: float(f"{value:.5g}") for name, value in record.items() if name not in DROPPED}


@dataclass
class Row:
    """A row of a table: the records of one setting (and part), one for each seed."""
    label: str
    settings: dict
    part: str
    records: list

    def values(self, metric, when="end"):
        """A metric for each seed, as a tensor; None if any of the records has not got it."""
        numbers = [value_of(record[when], metric) for record in self.records if when in record]
        if None in numbers or not numbers:
            return None
        return torch.tensor(numbers)

    def mean(self, metric):
        """The mean of a metric over seeds; NaN, which no picture shows, if it was not measured."""
        numbers = self.values(metric)
        return float("nan") if numbers is None else numbers.mean().item()


def value_of(record, metric):
    """A metric of a record, or one that follows from its metrics; None if it is not there."""
    if metric == "margin_in_T" and "margin" in record and "temperature" in record:
        return record["margin"] / record["temperature"]
    if metric == "cosine_true" and "align" in record:
        return 1 - record["align"] / 2  # |x - y|^2 = 2 - 2 x.y
    if metric == "cosine_other" and "align" in record and "margin" in record:
        return 1 - record["align"] / 2 - record["margin"]
    return record.get(metric)


def rows_of(claim, name, records):
    """The rows of a claim, in its order; of each, the parts in the order of the records."""
    rows = []
    for settings in claim.rows:
        parts = {}
        for record in records:
            if record["claim"] == name and record["settings"] == settings:
                parts.setdefault(record.get("part", ""), []).append(record)
        rows += [Row(claim.label(settings, part), settings, part, found)
                 for part, found in parts.items()]
    return rows


def find(rows, part=None, **wanted):
    """The first row with these settings (others as cgap.Config's defaults), or None."""
    weights = dict.fromkeys(TERMS, 0.0)
    for row in rows:
        settings = DEFAULTS | row.settings
        if part in (None, row.part) and all(settings[name] == value for name, value
                                            in (weights | {"center": False} | wanted).items()):
            return row
    return None
