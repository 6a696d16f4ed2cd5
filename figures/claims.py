"""The claims about the gap, as data: which runs each needs, its picture, and its columns.

    python figures/claims.py        # prints every run of every claim

A row is a dict of settings: fields of cgap.Config, and a few that reproduce.py knows (`fold`,
`captions`, `projections`, `photographs`). Of a claim about points they are those of
cgap.smallest_gap; of one about photographs, those of heads.train_heads. Fields that are not named
have their defaults. The label of a row is made of its fields by records.label. What the runs are
to show is told in gallery.md; reproduce.py runs them.
"""
from dataclasses import dataclass, field
from functools import partial
from typing import Callable

import pictures
import records

CUA = {"unif": 1.0, "align": 1.0}
LOSSES = {"CLIP": {}, "CUA": CUA}
CUAXU = CUA | {"xunif": 1.0}
CENTRED = {"center": True}
LEARNED = {"temperature": 0.07, "learn_temperature": True}
LARGE = {"limit": 200_000, "batch": 256, "steps": 2000}  # ten times the drawings

# Columns that several claims show
GAP = ("linear_separability", "centroid_distance")
SEARCH = ("i2t_r1", "mixed_i2t")
BOTH_WAYS = ("i2t_r1", "t2i_r1", "mixed_i2t", "mixed_t2i")
TASKS = ("zero_shot", "arithmetic_attribute")


@dataclass
class Claim:
    """rows: the settings of each run. shown: the columns that the claim's sentence needs, eight at
    most; a folded table has all columns. draw: draws its picture. kind: train, points, heads,
    landscape or repairs; the last two examine the runs that their rows describe. told: the fields
    that a label names beside the loss and the temperature. seeds: seeds that no setting was chosen
    at. all_seeds: the rows that are run with all of them, the others with the first only; None:
    all rows. starts: the table also has the rows before training. pretrained: the settings of the
    run that rows with `projections` start from. short: which rows and parts the table shows, if
    not all, as a function of a records.Row."""
    rows: list
    shown: tuple
    draw: Callable
    kind: str = "train"
    told: tuple = ()
    seeds: tuple = (6, 7, 8)
    all_seeds: list = None
    starts: bool = False
    pretrained: dict = field(default_factory=dict)
    short: Callable = None

    def __post_init__(self):
        if len(self.shown) > 8:
            raise ValueError(f"{len(self.shown)} columns are too many to read: show eight at most")

    def label(self, settings, part=""):
        """The label of a row."""
        if self.kind == "points":
            return records.points_label(settings)
        return records.label(settings, self.told, part)

    def seeds_of(self, settings):
        """The seeds that a row is run with."""
        is_thrice = self.all_seeds is None or settings in self.all_seeds
        return self.seeds if is_thrice else self.seeds[:1]


def grid(losses, temperatures, **settings):
    """A row for each of the losses (dicts of weights) and temperatures; None is a learned one."""
    return [loss | settings | ({"temperature": T} if T else LEARNED)
            for loss in losses for T in temperatures]


def exact_captions():
    """CLIP's loss and the paper's with exact captions: the default run."""
    thrice = grid(LOSSES.values(), (0.01, 0.1))
    thrice += grid([CUAXU], (0.01,)) + grid([{}], (0.07, None))
    thrice += grid([CENTRED], (0.07,)) + grid([CUA | CENTRED], (0.01, 0.07))
    rows = thrice + grid(LOSSES.values(), (0.05, 0.2))
    rows.sort(key=lambda row: (row.get("center", False), row.get("unif", 0), row.get("xunif", 0),
                               row.get("learn_temperature", False), row["temperature"]))
    return Claim(rows, ("linear_separability", "centroid_distance", "unif", *SEARCH, *TASKS,
                        "arithmetic_relation"), partial(pictures.draw_dots, panels=(
                            "mixed_i2t", "linear_separability", "zero_shot",
                            "arithmetic_attribute")), all_seeds=thrice)


def margin():
    """The share of mismatched captions by the temperature."""
    rows, temperatures = [], (0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
    for share in (0.0, 0.05, 0.2, 0.5):
        higher = (0.3, 0.5) if share == 0.5 else ()
        rows += grid(LOSSES.values(), temperatures + higher, mismatch=share)
    rows += grid([{}], (None,), mismatch=0.2)
    return Claim(rows, ("margin", "margin_in_T", "spread", "agreement", "overlap",
                        "linear_separability", *SEARCH), pictures.draw_margin, told=("mismatch",),
                 all_seeds=grid(LOSSES.values(), (0.01, 0.15), mismatch=0.2))


def kinds():
    """In which way a fifth of the captions is wrong."""
    rows = []
    for T in (0.02, 0.15):
        rows += [{"captions": "swapped within the batch", "temperature": T},
                 {"mismatch": 0.2, "temperature": T},
                 {"captions": "replaced by random words", "temperature": T}]
    return Claim(rows, ("margin_in_T", "spread", "agreement", "overlap", "linear_separability",
                        *SEARCH, "mixed_t2i"), partial(pictures.draw_dots, panels=(
                            "mixed_i2t", "spread", "overlap", "linear_separability")),
                 told=("mismatch",), seeds=(6,))


def scale():
    """Ten times the drawings, five times the samples."""
    rows = grid(LOSSES.values(), (0.01, 0.15), mismatch=0.2, **LARGE)
    rows += grid([{}], (None,), mismatch=0.2, **LARGE)
    for share in (0.05, 0.01):
        rows += grid([{}], (0.01,), mismatch=share, **LARGE)
    rows += grid(LOSSES.values(), (0.01,), **LARGE) + grid([{}], (0.1,), **LARGE)
    return Claim(rows, (*GAP, "spread", "agreement", *SEARCH, *TASKS), partial(
        pictures.draw_dots, panels=("mixed_i2t", "linear_separability", "overlap",
                                    "arithmetic_attribute")), told=("mismatch",), seeds=(6,))


def photographs():
    """Two heads on features that pretrained encoders gave of photographs and their captions."""
    rows = grid(LOSSES.values(), (0.01, 0.02, 0.05, 0.1, 0.2, None))
    rows += grid([CENTRED, CUA | CENTRED], (0.05, 0.1))
    return Claim(rows, (*GAP, "spread", "overlap", *BOTH_WAYS), partial(
        pictures.draw_dots, panels=("mixed_i2t", "linear_separability", "spread", "overlap")),
                 kind="heads")


def points():
    """The smallest gap: free points, with and without offsets."""
    alone, random = {"offset_lr": 0.0}, "random, then the loss"
    rows = [alone, {}, CUA, {"temperature": 0.07}, {"temperature": 0.2},
            {"offset_lr": 1 / 8}, {"offset_lr": 1 / 64},
            {"mismatch": 0.2}, alone | {"mismatch": 0.2},
            {"mismatch": 0.2, "offset_gradient": "one modality"},
            {"dim": 3}, {"dim": 8}, {"dim": 32}, {"offset_gradient": "random"},
            {"offset_gradient": "random, then nothing"}, {"offset_gradient": random},
            {"offset_gradient": random, "temperature": 0.2}, {"offset_gradient": "one gradient"}]
    return Claim(rows, (*GAP, "spread", "agreement", "overlap", "mixed_i2t", "mixed_t2i"),
                 pictures.draw_points, kind="points")


def explanations():
    """What the paper rules out: that two modalities, an initial gap or few steps are needed."""
    short = {"steps": 400, "remove_gap": True}
    same = {"same_modality": True} | short
    rows = grid(LOSSES.values(), (0.01,), **same) + grid([{}], (0.07,), **same)
    rows += grid([*LOSSES.values(), CENTRED, CENTRED | {"fold": False}], (0.01,), **short)
    return Claim(rows, (*GAP, "spread", *SEARCH), partial(pictures.draw_dots, panels=(
        "linear_separability", "centroid_distance", "spread", "mixed_i2t")),
                 told=("same_modality",), starts=True)


def weights():
    """How much of each term is needed."""
    rows, thrice = [], []
    for share in (0.0, 0.2):
        captions = {"temperature": 0.01, "mismatch": share}
        rows.append(captions)
        rows += [captions | {"align": weight} for weight in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)]
        rows += [captions | {"unif": weight} for weight in (0.01, 0.1, 0.3, 1.0)]
        rows += [captions | {"unif": weight, "align": weight} for weight in (0.03, 0.1, 0.3, 1.0)]
        thrice += [captions, captions | {"align": 0.3}, captions | CUA]
    return Claim(rows, (*GAP, "spread", *SEARCH, *TASKS), pictures.draw_weights,
                 told=("mismatch",), all_seeds=thrice)


def landscape():
    """The loss of a trained model while its two clouds are moved together or apart by hand."""
    rows = grid([{}], (0.01, 0.02, 0.05, 0.1, 0.2), mismatch=0.0)
    rows += grid([{}], (0.01, 0.02, 0.05, 0.1, 0.15, 0.2), mismatch=0.2)
    thrice = grid([{}], (0.01, 0.1), mismatch=0.0) + grid([{}], (0.01, 0.15), mismatch=0.2)
    return Claim(rows, ("trained_g", "least_g", "rise_at_0", "rise_as_trained"),
                 pictures.draw_landscape, kind="landscape", told=("mismatch",), all_seeds=thrice)


def repairs():
    """What can be done for a model that was trained at a low temperature."""
    rows, thrice = [], []
    for share in (0.0, 0.05, 0.2, 0.5):
        rows += grid(LOSSES.values(), (0.01,), mismatch=share)
    thrice += grid([{}], (0.01,), mismatch=0.0) + grid(LOSSES.values(), (0.01,), mismatch=0.2)
    photos = grid(LOSSES.values(), (0.01,), photographs=True)
    rows += grid(LOSSES.values(), (0.01,), mismatch=0.2, **LARGE) + photos
    others = [{"same_modality": True}, {"same_modality": True, "mismatch": 0.2},
              {"mismatch": 0.2, "dim": 32}, {"mismatch": 0.2, "dim": 512}]
    rows += [{"temperature": 0.01} | other for other in others]

    def is_shown(row):  # other models, and other numbers of pairs, are in the folded table
        model = {"temperature": 0.01, "mismatch": 0.2}
        _, pairs = pictures.split_repair(row.part)
        return row.settings in (model, CUA | model) and pairs in (None, 1000, 2000)

    return Claim(rows, ("linear_separability", "agreement", "overlap", *BOTH_WAYS, "seconds"),
                 pictures.draw_repairs, kind="repairs", told=("mismatch", "size", "others"),
                 all_seeds=thrice + photos, short=is_shown)


def dimension():
    """Few dimensions."""
    rows = [{"temperature": 0.01, "dim": dim, "steps": 400} for dim in (3, 8, 32, 128)]
    rows += [CUA | {"temperature": 0.01, "dim": dim, "steps": 400} for dim in (3, 128)]
    return Claim(rows, (*GAP, "unif", "spread", *SEARCH), partial(pictures.draw_dots, panels=(
        "linear_separability", "centroid_distance", "spread", "mixed_i2t")), told=("dim",))


def batch_size():
    """Small batches, with as many steps and with as many samples."""
    rows = [{"temperature": 0.01, "batch": batch, "steps": steps}
            for batch, steps in ((64, 400), (16, 400), (16, 1600), (256, 100))]
    return Claim(rows, (*GAP, "unif", "spread", *SEARCH), partial(pictures.draw_dots, panels=(
        "linear_separability", "centroid_distance", "spread", "i2t_r1")), told=("batch", "steps"))


def fine_tuning():
    """The authors' protocol in miniature: pretrain with a learned T, then fine-tune at 0.01."""
    pretrained = LEARNED | {"steps": 800}
    rows = [pretrained]
    for projections in ("own", "new"):
        rows += grid(LOSSES.values(), (0.01,), projections=projections, limit=8000, steps=400,
                     lr=3e-4)
    return Claim(rows, ("linear_separability", "unif", *SEARCH, "zero_shot", "zero_shot_unseen",
                        "arithmetic_attribute", "arithmetic_relation"),
                 partial(pictures.draw_dots, panels=("zero_shot", "arithmetic_attribute",
                                                     "mixed_i2t", "linear_separability")),
                 told=("projections",), pretrained=pretrained)


def embeddings():
    """Three runs that start without a gap, for the animation."""
    rows = grid([{}, CUA], (0.01,), remove_gap=True) + grid([{}], (0.1,), remove_gap=True)
    return Claim(rows, (*GAP, "spread", "agreement", *SEARCH), pictures.draw_embeddings,
                 seeds=(6,), starts=True)


def clouds():
    """Four runs whose clouds have a gap, are narrow, are turned, and are shared."""
    rows = [{"temperature": 0.01, "mismatch": 0.0}, {"temperature": 0.02, "mismatch": 0.2},
            CUA | {"temperature": 0.02, "mismatch": 0.2}, {"temperature": 0.15, "mismatch": 0.2}]
    return Claim(rows, (*GAP, "spread", "agreement", "overlap", *SEARCH), pictures.draw_clouds,
                 told=("mismatch",), seeds=(6,))


CLAIMS = {"embeddings": embeddings(), "clouds": clouds(), "points": points(),
          "explanations": explanations(), "landscape": landscape(), "losses": exact_captions(),
          "weights": weights(), "margin": margin(), "kinds": kinds(), "scale": scale(),
          "photographs": photographs(), "repairs": repairs(), "fine-tuning": fine_tuning(),
          "dimension": dimension(), "batch-size": batch_size()}

if __name__ == "__main__":
    for name, claim in CLAIMS.items():
        print(f"\n{name} ({claim.kind})")
        for settings in claim.rows:
            seeds = ", ".join(map(str, claim.seeds_of(settings)))
            print(f"  {claim.label(settings)} (seeds {seeds}): {settings}")
