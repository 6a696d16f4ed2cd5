"""The claims, as data: what each says, the runs that test it, and what must come out."""
from dataclasses import dataclass


@dataclass
class Claim:
    """A claim. runs: {label: settings other than cgap.Config's, or cgap.smallest_gap's if `points`};
    `model` names what to start from (reproduce.make_model), `source` the row whose run that is.
    checks: (metric, more, less), each a row, "row, at the start", or a number. seeds: how many, for
    rows that get more than the others. data "real": what reproduce.py's --data names."""
    title: str
    runs: dict
    checks: list
    shown: tuple
    reading: str = ""
    published: str = ""
    points: bool = False
    picture: str = "dots"
    starts: bool = False
    seeds: tuple = (0, ())


SEP, SEP100, CENTROIDS, UNIF, T_EFF = ("linear_separability", "linear_separability_c100", "centroid_distance",
                                       "uniformity_image", "effective_temperature")
SEARCH = ("i2t_r1", "t2i_r1", "mixed_i2t", "mixed_t2i")
TASKS = (*SEARCH, "zero_shot", "zero_shot_unseen", "arithmetic_attribute", "arithmetic_relation", "arithmetic_caption")
CLIP, CUA, CENTER = {}, {"unif": 1.0, "align": 1.0}, {"center": True}
CENTRED = CUA | CENTER
SHORT = {"steps": 400}
LEARNED = {"temperature": 0.07, "learn_temperature": True}
TUNED = {"steps": 400, "lr": 3e-4, "single": 0.0, "limit": 8000, "source": "pretrained"}
WRONG = ("0 % wrong", "10 % wrong", "20 % wrong", "50 % wrong")
BEST = "best CLIP"  # in a check: of the rows with plain CLIP, that with the highest mean


def grid(losses, *temperatures, where="", **settings):
    """{"where, loss, T = ...": settings} for each loss at each temperature, 0 for a learned one."""
    rows = {}
    for loss, weights in losses.items():
        for T in temperatures:
            label = f"{loss}, T = {T:g}" if T else f"{loss}, T learned"
            rows[where + label] = weights | ({"temperature": T} if T else LEARNED) | settings
    return rows


def wrong(share, losses, *temperatures, **settings):
    """The same with this share of the captions permuted."""
    return grid(losses, *temperatures, where=share + ", ", mismatch=int(share[:2]) / 100, **{**SHORT, **settings})


def from_zero(**settings):
    """CLIP cold and warm, CUA, and CLIP centred, from a gap of zero."""
    rows = grid({"CLIP": CLIP}, 0.01, 0.07) | grid({"CUA": CUA, "CLIP centred": CENTER}, 0.01)
    return {label: row | settings | {"remove_gap": True} for label, row in rows.items()}


def better(row, than, metrics):
    return [(metric, row, than) for metric in metrics]


LAW = {label: row for share in WRONG for label, row in {
    **wrong(share, {"CLIP": CLIP}, 0.01, 0.05, 0.1, 0.2, 0),
    **wrong(share, {"CUA centred": CENTRED}, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)}.items()}
CLAIMS = {
    "points": Claim(
        "Between free points no gap opens; with one shared vector a side it does, if that is fast",
        {"CLIP, no offset": {"offset": 0.0}, "CLIP, offset at 1/64 of the rate": {"offset": 1 / 64},
         "CLIP, offset at 1/8 of the rate": {"offset": 1 / 8}, "CLIP, offset": {},
         "CUA, no offset": {**CUA, "offset": 0.0}, "CUA, offset": CUA,
         **{f"CLIP, offset, T = {T}": {"temperature": T} for T in (.03, .07, .2)},
         **{f"CLIP, offset, d = {d}": {"dim": d} for d in (2, 3, 8, 32)},
         "T from 1 to .01": {"temperature": [1.0, 0.01, 300]}, "T from .07 to .01": {"temperature": [0.07, 0.01, 300]},
         "20 % wrong": {"mismatch": 0.2}, "20 % wrong, T from 1 to .01": {"mismatch": 0.2, "temperature": [1.0, 0.01, 300]}},
        [(SEP, 0.62, "CLIP, no offset"), (SEP, "CLIP, offset", 0.98), (SEP, 0.62, "CUA, offset"),
         *(( SEP, "CLIP, offset", less) for less in ("CLIP, offset at 1/64 of the rate", "CLIP, offset, T = 0.2",
                                                     "T from 1 to .01")),
         (SEP, "20 % wrong, T from 1 to .01", "T from 1 to .01")],
        (SEP, CENTROIDS, UNIF, T_EFF), points=True),
    "losses": Claim(
        "Four losses, cold and warm: what closes the gap, and what that is good for",
        {**grid({"CLIP": CLIP, "CUA": CUA, "CLIP centred": CENTER, "CUA centred": CENTRED}, 0.01, 0.07),
         **grid({"CLIP": CLIP}, 0), **grid({"CUAXU": CUA | {"xunif": 1.0}}, 0.01),
         "CUA centred once, T = 0.07": {**CUA, "temperature": 0.07, "model": "centred once"},
         **{f"CLIP, T = {T}, means subtracted": {"temperature": T, "steps": 1, "lr": 0.0, "model": "centred once",
                                                 "source": f"CLIP, T = {T}"} for T in (0.01, 0.07)}},
        [(SEP, "CLIP, T = 0.01", "CUA, T = 0.01"), (UNIF, "CLIP, T = 0.01", "CUA, T = 0.01"),
         *better("CUA, T = 0.01", "CLIP, T = 0.01", TASKS), (SEP, 0.56, "CUA centred, T = 0.07"),
         *better("CUA centred, T = 0.07", BEST, TASKS)],
        (SEP, SEP100, CENTROIDS, UNIF, "alignment", *TASKS, T_EFF),
        seeds=(5, tuple(grid({"CLIP": CLIP, "CUA centred": CENTRED}, 0.01, 0.07)))),
    "law": Claim(
        "The gap tells the temperature to give", LAW, [], ("temperature", T_EFF, SEP, *SEARCH), picture="law"),
    "thermostat": Claim(
        "The gap is a thermostat: T_eff is what the pairs want, whatever T is",
        {label: row for label, row in LAW.items() if "centred" not in label}, [],
        ("temperature", T_EFF, CENTROIDS), picture="thermostat"),
    "noise": Claim(
        "Where the recipe helps, and where not: wrong captions, little data",
        {**{label: row for share in WRONG[2:] for label, row in {
            **wrong(share, {"CLIP": CLIP}, 0.01, 0.05, 0.1, 0.2, 0), **wrong(share, {"CUA": CUA}, 0.01, 0.1),
            **wrong(share, {"CUA centred": CENTRED}, 0.01, 0.1, 0.2)}.items()},
         **grid({"CLIP": CLIP}, 0.1, 0, where="20 % wrong, 1500 steps, ", mismatch=0.2),
         **grid({"CUA centred": CENTRED}, 0.1, where="20 % wrong, 1500 steps, ", mismatch=0.2),
         **grid({"CLIP": CLIP}, 0.01, 0.1, 0, where="2000 images, ", limit=2000, **SHORT),
         **grid({"CUA": CUA, "CUA centred": CENTRED}, 0.01, 0.1, where="2000 images, ", limit=2000, **SHORT)},
        [check for where in ("20 % wrong, ", "50 % wrong, ", "20 % wrong, 1500 steps, ", "2000 images, ")
         for check in better(where + "CUA centred, T = 0.1", where + BEST, TASKS[:6])],
        (SEP, *TASKS[:7], T_EFF)),
    "real": Claim(
        "Real pictures with human titles",
        {**grid({"CLIP": CLIP}, 0.01, 0.05, 0.1, 0.2, 0, data="real", image_size=32, steps=1200),
         **grid({"CUA": CUA}, 0.1, 0, data="real", image_size=32, steps=1200),
         **grid({"CUA centred": CENTRED}, 0.01, 0.05, 0.1, 0.2, 0, data="real", image_size=32, steps=1200)},
        better("CUA centred, T = 0.1", BEST, SEARCH) + better("CUA centred, T = 0.1", "CUA, T = 0.1", SEARCH),
        (SEP, SEP100, *SEARCH, T_EFF)),
    "steps": Claim(
        "How many steps it takes",
        {label: row for n in (200, 400, 800, 1500) for label, row in {
            **(grid({"CLIP": CLIP}, 0.07, 0, where=f"{n} steps, ", steps=n) if n > 200 else {}),
            **grid({"CUA centred": CENTRED}, 0.07, where=f"{n} steps, ", steps=n)}.items()},
        [check for a, b in ((400, 400), (800, 800), (400, 800))
         for check in better(f"{a} steps, CUA centred, T = 0.07", f"{b} steps, " + BEST, ("i2t_r1", "zero_shot"))],
        (SEP, *TASKS[:6])),
    "zero-shot": Claim(
        "The authors' protocol in miniature: pretrain with a learned T, then fine-tune",
        {"pretrained": {**LEARNED, "steps": 800, "single": 0.5},
         **{f"{label}, projections {kind}": {**row, **TUNED, "model": kind} for kind in ("kept", "fresh")
            for label, row in {**grid({"CLIP": CLIP, "CUA centred": CENTRED}, 0.01, 0.07), **grid({"CUA": CUA}, 0.01)}.items()}},
        [check for kind in ("kept", "fresh") for row, T in (("CUA, T = 0.01", 0.01), ("CUA centred, T = 0.07", 0.07))
         for check in better(f"{row}, projections {kind}", f"CLIP, T = {T}, projections {kind}",
                             ("zero_shot", "arithmetic_attribute", "mixed_i2t"))],
        (SEP, UNIF, *TASKS),
        published="d = 128, CLIP / CUA / CUAXU: ImageNet .133 / .138 / .148, CIFAR-100 .318 / .335 / .345, Caltech .417 / .483 "
                  "/ .486, SIMAT .356 / .425 / .417"),
    "same-modality": Claim(
        "The same images in both encoders, and no gap to begin with: the loss makes one",
        from_zero(**SHORT, same_modality=True),
        [(metric, "CLIP, T = 0.01", "CLIP, T = 0.01, at the start") for metric in (SEP, CENTROIDS)]
        + [(SEP, "CLIP, T = 0.01", less) for less in ("CUA, T = 0.01", "CLIP centred, T = 0.01", "CLIP, T = 0.07")],
        (SEP, CENTROIDS, UNIF, "alignment", "i2t_r1", "clip"),
        published="separability near 1 after training to convergence", starts=True),
    "opening": Claim(
        "It opens within the first steps", from_zero(steps=100, eval_every=4),
        [(SEP, "CLIP, T = 0.01", less) for less in ("CLIP, T = 0.01, at the start", "CLIP centred, T = 0.01",
                                                    "CLIP, T = 0.07")],
        (SEP, CENTROIDS, T_EFF, "alignment"), picture="curves", starts=True),
    "terms": Claim(
        "Which term does what",
        {**grid({"CLIP": CLIP, "unif alone": {"unif": 1.0}, "align alone": {"align": 1.0}, "xunif alone": {"xunif": 1.0},
                 "CUA": CUA}, 0.01, **SHORT),
         **grid({"CLIP": CLIP, "unif alone, centred": CENTER | {"unif": 1.0}, "align alone, centred": CENTER | {"align": 1.0},
                 "CUA centred": CENTRED}, 0.07, **SHORT)},
        [(UNIF, "CLIP, T = 0.01", "unif alone, T = 0.01"), ("alignment", "CLIP, T = 0.01", "align alone, T = 0.01"),
         (SEP, "unif alone, T = 0.01", "CUA, T = 0.01"), (CENTROIDS, "xunif alone, T = 0.01", "CLIP, T = 0.01")],
        (SEP, SEP100, CENTROIDS, UNIF, "alignment", "i2t_r1", "mixed_i2t")),
    "dimension": Claim(
        "In three dimensions it mostly closes by itself",
        {f"{label}, d = {d}": {**row, **SHORT, "dim": d} for d in (3, 8, 32, 128) for label, row in {
            **grid({"CLIP": CLIP}, 0.01), **(grid({"CUA": CUA}, 0.01) if d in (3, 128) else {}),
            **(grid({"CLIP": CLIP, "CUA centred": CENTRED}, 0.07) if d == 3 else {})}.items()},
        [(SEP, "CLIP, T = 0.01, d = 128", "CLIP, T = 0.01, d = 3"), (SEP, "CLIP, T = 0.01, d = 32", "CLIP, T = 0.01, d = 8"),
         (UNIF, "CLIP, T = 0.01, d = 3", "CUA, T = 0.01, d = 3"),
         ("i2t_r1", "CUA centred, T = 0.07, d = 3", "CLIP, T = 0.07, d = 3")],
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
        "Taking biases away does not do what centring does",
        {"CLIP": SHORT, **{f"CLIP, {kind}": {**SHORT, "model": kind} for kind in ("projection without bias", "no biases")}},
        [], (SEP, CENTROIDS, UNIF, "i2t_r1")),
}
NAMES = {SEP: "separability", SEP100: "separability, C = 100", CENTROIDS: "centroids", UNIF: "uniformity", "alignment": "alignment",
         "i2t_r1": "R@1 i2t", "t2i_r1": "R@1 t2i", "mixed_i2t": "mixed i2t", "mixed_t2i": "mixed t2i", "zero_shot": "zero-shot",
         "zero_shot_unseen": "unseen", "arithmetic_attribute": "attributes", "arithmetic_relation": "relations",
         "arithmetic_caption": "captions", T_EFF: "T_eff"}
INTRO = ""
