"""The claims, as data: what each says, the runs that test it, and what must come out."""
from dataclasses import dataclass, field


@dataclass
class Claim:
    """A claim. runs: {label: settings other than cgap.Config's, or cgap.smallest_gap's if `points`};
    `model` names what to start from (see reproduce.make_model), `source` the row whose run that is.
    checks: (metric, more, less[, by]): rows, "row, at the start", or numbers; a check holds if the
    difference, paired by seed, exceeds `by` on average, and that by more than its standard deviation.
    `data` is "real" for the CSV file or COCO folder that reproduce.py's --data names.
    seeds: rows that get more seeds than the others."""
    title: str
    runs: dict
    checks: list = field(default_factory=list)
    shown: tuple = ("linear_separability", "centroid_distance", "uniformity_image", "alignment", "i2t_r1")
    reading: str = ""
    published: str = ""
    points: bool = False
    picture: str = "dots"
    starts: bool = False
    seeds: dict = field(default_factory=dict)


SEP, CENTROIDS, UNIF, T_EFF = ("linear_separability", "centroid_distance", "uniformity_image",
                               "effective_temperature")
MIXED = ("mixed_i2t", "mixed_t2i")
TASKS = ("i2t_r1", "t2i_r1", *MIXED, "zero_shot", "zero_shot_unseen", "arithmetic_attribute", "arithmetic_relation",
         "arithmetic_caption")
CLIP, CUA, CUAXU = {}, {"unif": 1.0, "align": 1.0}, {"unif": 1.0, "align": 1.0, "xunif": 1.0}
CENTER = {"center": True}
CENTRED = {**CUA, **CENTER}
FOUR = {"CLIP": CLIP, "CUA": CUA, "CLIP centred": CENTER, "CUA centred": CENTRED}
SHORT = {"steps": 400}
LEARNED = {"temperature": 0.07, "learn_temperature": True}
ZERO = {"init_gap": "remove"}
TUNED = {"steps": 400, "lr": 3e-4, "single": 0.0, "limit": 8000, "source": "pretrained"}
WRONG = (0.0, 0.1, 0.2, 0.5)
BEST = "best CLIP"  # in a check: of the rows with plain CLIP, that with the highest mean


def at(*temperatures):
    """{name: settings} of frozen temperatures and, last, a learned one if 0 is among them."""
    return {f"T = {T:g}" if T else "T learned": {"temperature": T} if T else LEARNED for T in temperatures}


def grid(losses, temperatures, **settings):
    """{"loss, T = ...": settings} for each loss at each temperature."""
    return {f"{loss}, {T}": {**row, **values, **settings}
            for loss, row in losses.items() for T, values in temperatures.items()}


def wrong(share, rows):
    """The rows with this share of the captions permuted."""
    return {f"{round(100 * share)} % wrong, {label}": {**row, "mismatch": share} for label, row in rows.items()}


def from_zero(**settings):
    """CLIP cold and warm, CUA, and CLIP centred, from a gap of zero."""
    rows = {"CLIP": CLIP, "CLIP, T = 0.07": {"temperature": 0.07}, "CUA": CUA, "CLIP centred": CENTER}
    return {label: {**row, **ZERO, **settings} for label, row in rows.items()}


CLAIMS = {
    "points": Claim(
        "Between free points no gap opens; with one shared vector a side it does, if that is fast",
        {"CLIP, no offset": {"offset": 0.0}, "CLIP, offset at 1/64 of the rate": {"offset": 1 / 64},
         "CLIP, offset at 1/8 of the rate": {"offset": 1 / 8}, "CLIP, offset": {},
         "CUA, no offset": {**CUA, "offset": 0.0}, "CUA, offset": CUA,
         **{f"CLIP, offset, T = {T}": {"temperature": T} for T in (.03, .07, .2)},
         **{f"CLIP, offset, d = {d}": {"dim": d} for d in (2, 3, 8, 32)},
         "T from 1 to .01": {"temperature": [1.0, 0.01, 300]},
         "T from .07 to .01": {"temperature": [0.07, 0.01, 300]},
         "20 % wrong": {"mismatch": 0.2},
         "20 % wrong, T from 1 to .01": {"mismatch": 0.2, "temperature": [1.0, 0.01, 300]}},
        [(SEP, 0.62, "CLIP, no offset"), (SEP, "CLIP, offset", 0.98), (SEP, 0.62, "CUA, offset"),
         (SEP, "CLIP, offset", "CLIP, offset at 1/64 of the rate"),
         (SEP, "CLIP, offset", "CLIP, offset, T = 0.2"), (SEP, "CLIP, offset", "T from 1 to .01"),
         (SEP, "20 % wrong, T from 1 to .01", "T from 1 to .01")],
        (SEP, CENTROIDS, UNIF, T_EFF), points=True),
    "losses": Claim(
        "Four losses, cold and warm: what closes the gap, and what that is good for",
        {**grid(FOUR, at(0.01, 0.07)), "CLIP, T learned": LEARNED, "CUAXU, T = 0.01": CUAXU,
         "CUA centred once, T = 0.07": {**CUA, "temperature": 0.07, "model": "centred once"},
         **{f"CLIP, T = {T}, means subtracted": {"temperature": T, "steps": 1, "lr": 0.0, "model": "centred once",
                                                 "source": f"CLIP, T = {T}"} for T in (0.01, 0.07)}},
        [(SEP, "CLIP, T = 0.01", "CUA, T = 0.01"), (UNIF, "CLIP, T = 0.01", "CUA, T = 0.01"),
         *((metric, "CUA, T = 0.01", "CLIP, T = 0.01") for metric in TASKS),
         (SEP, 0.56, "CUA centred, T = 0.07"),
         *((metric, "CUA centred, T = 0.07", BEST) for metric in TASKS)],
        (SEP, "linear_separability_c100", CENTROIDS, UNIF, "alignment", *TASKS, T_EFF),
        seeds={row: 5 for row in grid({"CLIP": CLIP, "CUA centred": CENTRED}, at(0.01, 0.07))}),
    "temperature": Claim(
        "The gap tells the temperature to give",
        {label: row for share in WRONG for label, row in wrong(share, {
            **grid({"CLIP": CLIP}, at(0.01, 0.05, 0.1, 0.2, 0), **SHORT),
            **grid({"CUA centred": CENTRED}, at(0.02, 0.05, 0.1, 0.15, 0.2, 0.3), **SHORT)}).items()},
        [], ("temperature", T_EFF, SEP, "i2t_r1", "t2i_r1", *MIXED), picture="law"),
    "thermostat": Claim(
        "The gap is a thermostat: T_eff is what the pairs want, whatever T is",
        {label: row for share in WRONG for label, row in wrong(share, grid(
            {"CLIP": CLIP}, at(0.01, 0.05, 0.1, 0.2, 0), **SHORT)).items()},
        [], ("temperature", T_EFF), picture="thermostat"),
    "real": Claim(
        "Real pictures with human titles",
        {label: {**row, "data": "real", "image_size": 32, "steps": 800} for label, row in {
            **grid({"CLIP": CLIP}, at(0.01, 0.05, 0.1, 0.2, 0)), **grid({"CUA": CUA}, at(0.01, 0.1, 0)),
            **grid({"CUA centred": CENTRED}, at(0.01, 0.05, 0.1, 0.2, 0))}.items()},
        [(metric, loss, BEST) for metric in ("i2t_r1", "t2i_r1", *MIXED)
         for loss in ("CUA, T = 0.1", "CUA centred, T = 0.1")],
        (SEP, "linear_separability_c100", "i2t_r1", "t2i_r1", *MIXED, T_EFF)),
    "noise": Claim(
        "Where the recipe helps, and where not: clean pairs, wrong captions, little data",
        {**{label: row for share in (0.0, 0.2, 0.5) for label, row in wrong(share, grid(
            {"CLIP": CLIP, "CUA": CUA, "CUA centred": CENTRED}, at(0.01, 0.1), **SHORT)).items()},
         **{f"2,000 images, {label}": row for label, row in grid(
             {"CLIP": CLIP, "CUA": CUA, "CUA centred": CENTRED}, at(0.01, 0.1), limit=2000, **SHORT).items()}},
        [(metric, f"{where}, CUA centred, T = 0.1", f"{where}, {BEST}")
         for where in ("0 % wrong", "20 % wrong", "50 % wrong", "2,000 images")
         for metric in ("i2t_r1", "t2i_r1", *MIXED, "zero_shot")],
        (SEP, "i2t_r1", "t2i_r1", *MIXED, "zero_shot", "arithmetic_attribute", T_EFF)),
    "steps": Claim(
        "How many steps it takes",
        {**{f"CLIP, T = 0.07, {n} steps": {"temperature": 0.07, "steps": n} for n in (400, 800, 1500)},
         **{f"CLIP, T learned, {n} steps": {**LEARNED, "steps": n} for n in (400, 800, 1500)},
         **{f"CUA centred, T = 0.07, {n} steps": {**CENTRED, "temperature": 0.07, "steps": n}
            for n in (200, 400, 800, 1500)}},
        [(metric, "CUA centred, T = 0.07, 400 steps", f"CLIP, T learned, {n} steps")
         for n in (400, 800, 1500) for metric in ("i2t_r1", "zero_shot")],
        (SEP, "i2t_r1", "t2i_r1", *MIXED, "zero_shot", "zero_shot_unseen")),
    "zero-shot": Claim(
        "The authors' protocol in miniature: pretrain with a learned T, then fine-tune",
        {"pretrained": {**LEARNED, "steps": 800, "single": 0.5},
         **{f"{label}, projections {kind}": {**row, **TUNED, "model": kind} for kind in ("kept", "fresh")
            for label, row in {**grid({"CLIP": CLIP, "CUA centred": CENTRED}, at(0.01, 0.07)),
                               "CUA, T = 0.01": CUA}.items()}},
        [(metric, f"{row}, projections {kind}", f"CLIP, T = {T}, projections {kind}")
         for kind in ("kept", "fresh") for row, T in (("CUA, T = 0.01", 0.01), ("CUA centred, T = 0.07", 0.07))
         for metric in ("zero_shot", "arithmetic_attribute", "mixed_i2t")],
        (SEP, UNIF, *TASKS),
        published="d = 128, CLIP / CUA / CUAXU: ImageNet .133 / .138 / .148, CIFAR-100 .318 / .335 / .345, Caltech .417 / .483 "
                  "/ .486, SIMAT .356 / .425 / .417"),
    "same-modality": Claim(
        "The same images in both encoders, and no gap to begin with: the loss makes one",
        from_zero(**SHORT, same_modality=True),
        [(SEP, "CLIP", "CLIP, at the start"), (CENTROIDS, "CLIP", "CLIP, at the start"), (SEP, "CLIP", "CUA"),
         (SEP, "CLIP", "CLIP centred"), (SEP, "CLIP", "CLIP, T = 0.07")],
        (SEP, CENTROIDS, UNIF, "alignment", "i2t_r1", "clip"),
        published="separability near 1 after training to convergence", starts=True),
    "image-text-from-zero": Claim(
        "Images and texts without a gap at the start: it is not the cone effect",
        from_zero(**SHORT),
        [(SEP, "CLIP", "CLIP, at the start"), (SEP, "CLIP", "CUA"), (SEP, "CLIP", "CLIP centred")],
        (SEP, CENTROIDS, UNIF, "alignment", "i2t_r1", "mixed_i2t"), starts=True),
    "opening": Claim(
        "It opens within the first steps",
        from_zero(steps=100, eval_every=4),
        [(SEP, "CLIP", "CLIP, at the start"), (SEP, "CLIP", "CLIP centred"), (SEP, "CLIP", "CLIP, T = 0.07")],
        (SEP, CENTROIDS, T_EFF, "alignment"), picture="curves", starts=True),
    "terms": Claim(
        "Which term does what",
        {label: {**row, **SHORT} for label, row in {
            "CLIP": CLIP, "unif alone": {"unif": 1.0}, "align alone": {"align": 1.0}, "xunif alone": {"xunif": 1.0},
            "CUA": CUA, **{f"{name}, centred, T = 0.07": {**row, **CENTER, "temperature": 0.07} for name, row in
                           (("unif", {"unif": 1.0}), ("align", {"align": 1.0}), ("CUA", CUA))}}.items()},
        [(UNIF, "CLIP", "unif alone"), ("alignment", "CLIP", "align alone"), (SEP, "unif alone", "CUA"),
         (SEP, "align alone", "CUA"), (CENTROIDS, "xunif alone", "CLIP")],
        (SEP, "linear_separability_c100", CENTROIDS, UNIF, "alignment", "i2t_r1", "mixed_i2t")),
    "dimension": Claim(
        "In three dimensions it mostly closes by itself",
        {**{f"CLIP, d = {d}": {**SHORT, "dim": d} for d in (3, 8, 32, 128)},
         **{f"CUA, d = {d}": {**SHORT, **CUA, "dim": d} for d in (3, 128)},
         "CUA centred, T = 0.07, d = 3": {**SHORT, **CENTRED, "temperature": 0.07, "dim": 3},
         "CLIP, T = 0.07, d = 3": {**SHORT, "temperature": 0.07, "dim": 3}},
        [(SEP, "CLIP, d = 128", "CLIP, d = 3"), (SEP, "CLIP, d = 32", "CLIP, d = 8"),
         (UNIF, "CLIP, d = 3", "CUA, d = 3"), ("i2t_r1", "CUA centred, T = 0.07, d = 3", "CLIP, T = 0.07, d = 3")],
        (SEP, CENTROIDS, UNIF, "i2t_r1", T_EFF),
        published="separability with CLIP .50 at d = 3 and 16 (one seed), .782 at 32, .999 at 64, 1.000 at 128"),
    "batch-size": Claim(
        "Small batches: it depends on what is kept equal",
        {"B = 16, same samples": {"batch": 16, "steps": 1600}, "B = 64": SHORT,
         "B = 256, same samples": {"batch": 256, "steps": 100}, "B = 16, same steps": {**SHORT, "batch": 16}},
        [(metric, "B = 16, same samples", "B = 256, same samples") for metric in (CENTROIDS, UNIF)]
        + [(metric, "B = 16, same steps", "B = 64") for metric in (CENTROIDS, UNIF)],
        (SEP, CENTROIDS, UNIF, "i2t_r1", T_EFF)),
    "controls": Claim(
        "Taking single biases away does not do what centring does",
        {f"{name}, {kind}": {**loss, **SHORT, "model": kind} for name, loss in (("CLIP", CLIP), ("CUA", CUA))
         for kind in ("projection without bias", "no biases")},
        [], (SEP, CENTROIDS, UNIF, "i2t_r1")),
}
INTRO = """# Gallery

Every claim with its picture, table, verdicts and command; `python figures/reproduce.py` makes this page, the
pictures and `results.json`. Numbers are mean±standard deviation over seeds 3, 4, 5, at which nothing was chosen. A
verdict compares two rows, paired by seed, and prints the difference. It *holds* if its mean is above zero (and
above the margin that is named) and above its standard deviation; *at every seed* if it is above zero at each, too.
With three seeds that is a low bar, so read the size. Rows of a claim differ in what their names say alone; steps
are 1,500 in *losses*, 400 in sweeps, each run annealed to 0. Columns are explained in the
[README](../README.md#run-it).
"""
READINGS = {}
for _name, _text in READINGS.items():
    CLAIMS[_name].reading = _text.replace("\n\n", "@@").replace("\n", " ").replace("@@", "\n\n")
