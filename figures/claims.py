"""The claims about the gap, as data: which runs each needs, and which columns its table has.

    python figures/claims.py        # print every run of every claim

A row is a label and the settings in which it differs from cgap.Config's defaults (of a claim about
points: from cgap.smallest_gap's; of one about photographs: from heads.train_heads's). What the runs
are to show is told in gallery.md; reproduce.py runs them.
"""
from dataclasses import dataclass

CUA = {"unif": 1.0, "align": 1.0}
LOSSES = {"CLIP": {}, "CUA": CUA}
LEARNED = {"temperature": 0.07, "learn_temperature": True}
GAP = ("linear_separability", "linear_separability_c100", "centroid_distance", "unif", "align")
SHARED = ("margin_in_T", "spread", "agreement", "overlap")
SEARCH = ("i2t_r1", "t2i_r1", "mixed_i2t", "mixed_t2i")
TASKS = ("zero_shot", "zero_shot_unseen", "arithmetic_attribute", "arithmetic_relation")
ANSWER = ("mixed_i2t", "i2t_r1", "linear_separability", "overlap")  # the panels of a dot plot
SUBTRACTED = ("mixed_i2t_subtracted", "mixed_t2i_subtracted")


@dataclass
class Claim:
    """rows: {label: settings}. shown: columns. seeds: seeds that no setting was chosen at; `once`:
    labels that have the first seed only. kind: train, points or heads. starts: the table also has
    the rows before training. picture: dots, or the name of a function of reproduce.py."""
    rows: dict
    shown: tuple
    kind: str = "train"
    seeds: tuple = (6, 7, 8)
    once: tuple = ()
    starts: bool = False
    picture: str = "draw_dots"
    drawn: tuple = ()


def grid(losses, temperatures, where="", **settings):
    """{"where, loss, T = ...": settings} for each loss and temperature; None is a learned one."""
    rows = {}
    for loss, weights in losses.items():
        for T in temperatures:
            name = f"{where}{loss}, T = {T:g}" if T else f"{where}{loss}, T learned"
            rows[name] = weights | settings | ({"temperature": T} if T else LEARNED)
    return rows


def losses():
    """Clean pairs, the default run."""
    rows = grid(LOSSES, (0.01, 0.05, 0.1, 0.2))
    rows |= grid({"CUAXU": CUA | {"xunif": 1.0}}, (0.01,))
    rows |= grid({"CLIP": {}}, (0.07, None))
    rows |= grid({"CLIP centred": {"center": True}}, (0.07,))
    rows |= grid({"CUA centred": CUA | {"center": True}}, (0.01, 0.07))
    once = ("CLIP, T = 0.05", "CUA, T = 0.05", "CLIP, T = 0.2", "CUA, T = 0.2")
    return Claim(rows, (*GAP, *SHARED, *SEARCH, *SUBTRACTED, *TASKS), once=once, drawn=ANSWER)


def margin():
    """The share of wrong captions by the temperature."""
    rows = {}
    for share in (0, 5, 20, 50):
        temperatures = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2) + (0.3, 0.5) * (share == 50)
        rows |= grid(LOSSES, temperatures, f"{share} % wrong, ", mismatch=share / 100)
    rows |= grid({"CLIP": {}}, (None,), "20 % wrong, ", mismatch=0.2)
    thrice = [f"20 % wrong, {loss}, T = {T}" for loss in LOSSES for T in (0.01, 0.15)]
    once = tuple(row for row in rows if row not in thrice)
    return Claim(rows, ("margin", *SHARED, "linear_separability", "best_temperature", *SEARCH,
                        *SUBTRACTED), once=once, picture="draw_margin")


def kinds():
    """What kind of caption the wrong fifth is."""
    rows = {}
    for T in (0.02, 0.15):
        rows[f"swapped within the batch, T = {T}"] = {"wrong": "in the batch", "temperature": T}
        rows[f"permuted over all pairs, T = {T}"] = {"mismatch": 0.2, "temperature": T}
        rows[f"nobody's: random words, T = {T}"] = {"wrong": "nobody's", "temperature": T}
    return Claim(rows, (*SHARED, "linear_separability", "i2t_r1", "mixed_i2t", "mixed_t2i"),
                 seeds=(6,), drawn=("mixed_i2t", "spread", "overlap", "linear_separability"))


def scale():
    """Ten times the scenes, five times the samples."""
    size = {"limit": 200_000, "batch": 256, "steps": 2000}
    rows = grid(LOSSES, (0.01, 0.15), "20 % wrong, ", mismatch=0.2, **size)
    rows |= grid({"CLIP": {}}, (None,), "20 % wrong, ", mismatch=0.2, **size)
    for share in (5, 1):
        rows |= grid({"CLIP": {}}, (0.01,), f"{share} % wrong, ", mismatch=share / 100, **size)
    rows |= grid(LOSSES, (0.01,), "exact captions, ", **size)
    rows |= grid({"CLIP": {}}, (0.1,), "exact captions, ", **size)
    return Claim(rows, (*GAP, *SHARED, *SEARCH, *SUBTRACTED, *TASKS), seeds=(6,), drawn=ANSWER)


def photographs():
    """Two heads on features that pretrained encoders gave of photographs and their captions."""
    rows = grid(LOSSES, (0.01, 0.02, 0.05, 0.1, 0.2, None))
    rows |= grid({"CLIP centred": {"center": True}, "CUA centred": CUA | {"center": True}},
                 (0.05, 0.1))
    shown = (*GAP, "best_temperature", *SHARED, *SEARCH, *SUBTRACTED)
    return Claim(rows, shown, kind="heads", drawn=ANSWER)


def points():
    """The smallest gap."""
    rows = {"points alone": {"offset": 0.0}, "with offsets": {},
            "with offsets, CUA": CUA,
            "with offsets, T = 0.07": {"temperature": 0.07},
            "with offsets, T = 0.2": {"temperature": 0.2},
            "with offsets at 1/8 of the points' rate": {"offset": 1 / 8},
            "with offsets at 1/64 of the points' rate": {"offset": 1 / 64},
            "with offsets, 20 % wrong": {"mismatch": 0.2},
            "points alone, 20 % wrong": {"offset": 0.0, "mismatch": 0.2},
            "an offset on one side only, 20 % wrong": {"mismatch": 0.2, "steer": "one side"}}
    rows |= {f"with offsets, d = {dim}": {"dim": dim} for dim in (3, 8, 32)}
    rows |= {"random numbers move them": {"steer": "random"},
             "random for 20 steps, then nothing": {"steer": "random, then nothing"},
             "random for 20 steps, then the loss": {"steer": "random, then the loss"},
             "random for 20 steps, then the loss, T = 0.2": {"steer": "random, then the loss",
                                                             "temperature": 0.2},
             "both get one gradient": {"steer": "one gradient"}}
    shown = ("linear_separability", "centroid_distance", "unif", "spread", "agreement", "overlap",
             "mixed_i2t", "mixed_t2i")
    return Claim(rows, shown, kind="points", picture="draw_points",
                 drawn=("linear_separability", "spread", "overlap", "mixed_i2t"))


def explanations():
    """What the paper rules out: same images in both encoders, no gap at first, enough steps."""
    size = {"steps": 400, "remove_gap": True}
    rows = grid(LOSSES, (0.01,), "same images, ", same_modality=True, **size)
    rows |= grid({"CLIP": {}}, (0.07,), "same images, ", same_modality=True, **size)
    rows |= grid(LOSSES | {"CLIP centred": {"center": True}}, (0.01,), "images and texts, ", **size)
    return Claim(rows, ("linear_separability", "centroid_distance", "spread", "i2t_r1",
                        "mixed_i2t", "train_clip"), starts=True)


def terms():
    """Which term does what."""
    each = {"CLIP": {}, "uniformity": {"unif": 1.0}, "alignment": {"align": 1.0},
            "cross-modal uniformity": {"xunif": 1.0}, "CUA": CUA}
    return Claim(grid(each, (0.01,), steps=400), (*GAP, "overlap", "i2t_r1", "mixed_i2t"))


def dimension():
    """Few dimensions."""
    rows = {}
    for dim in (3, 8, 32, 128):
        rows |= grid({"CLIP": {}}, (0.01,), f"d = {dim}, ", dim=dim, steps=400)
    for dim in (3, 128):
        rows |= grid({"CUA": CUA}, (0.01,), f"d = {dim}, ", dim=dim, steps=400)
    return Claim(rows, ("linear_separability", "centroid_distance", "unif", "spread", "i2t_r1",
                        "mixed_i2t"))


def batch_size():
    """Small batches, with as many steps and with as many samples."""
    rows = {"B = 64": {"steps": 400}, "B = 16, same steps": {"batch": 16, "steps": 400},
            "B = 16, same samples": {"batch": 16, "steps": 1600},
            "B = 256, same samples": {"batch": 256, "steps": 100}}
    return Claim(rows, ("linear_separability", "centroid_distance", "unif", "spread", "i2t_r1"))


def fine_tuning():
    """The authors' protocol in miniature: pretrain with a learned T, then fine-tune at .01."""
    rows = {"pretrained": LEARNED | {"steps": 800}}
    for kind in ("kept", "fresh"):
        start = {"start": "pretrained", "projections": kind, "limit": 8000}
        rows |= grid(LOSSES, (0.01,), f"{kind} projections, ", steps=400, lr=3e-4, **start)
    return Claim(rows, ("linear_separability", "unif", *SEARCH, *TASKS),
                 drawn=("zero_shot", "arithmetic_attribute", "mixed_i2t", "linear_separability"))


CLAIMS = {"points": points(), "explanations": explanations(), "losses": losses(),
          "margin": margin(), "kinds": kinds(), "scale": scale(), "photographs": photographs(),
          "fine-tuning": fine_tuning(), "terms": terms(), "dimension": dimension(),
          "batch-size": batch_size()}

if __name__ == "__main__":
    for name, claim in CLAIMS.items():
        print(f"\n{name}: seeds {', '.join(map(str, claim.seeds))}")
        for label, settings in claim.rows.items():
            once = f" (seed {claim.seeds[0]} only)" if label in claim.once else ""
            print(f"  {label}{once}: {settings}")
