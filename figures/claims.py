"""The claims, as data: what each says, the runs that test it, and what must come out."""
from dataclasses import dataclass


@dataclass
class Claim:
    """A claim. runs: {label: settings other than cgap.Config's, or cgap.smallest_gap's if `points`};
    `model` names what to start from (reproduce.make_model), `source` the row whose run that is.
    checks: (metric, more, less), each a row, "row, at the start", or a number. five: rows with
    five seeds instead of three. data "real": what reproduce.py's --data names."""
    title: str
    runs: dict
    checks: list
    shown: tuple
    points: bool = False
    picture: str = "dots"
    drawn: tuple = ()
    starts: bool = False
    five: tuple = ()


SEP, SEP100, CENTROIDS, UNIF, T_EFF = ("linear_separability", "linear_separability_c100", "centroid_distance",
                                       "uniformity_image", "effective_temperature")
SEARCH = ("i2t_r1", "t2i_r1", "mixed_i2t", "mixed_t2i")
TASKS = (*SEARCH, "zero_shot", "zero_shot_unseen", "arithmetic_attribute", "arithmetic_relation", "arithmetic_caption")
USES = ("i2t_r1", "mixed_i2t", "zero_shot", "zero_shot_unseen")
CUA = {"unif": 1.0, "align": 1.0}
CENTRED = CUA | {"center": True}
PLAIN, RECIPE = {"CLIP": {}}, {"CUA centred": CENTRED}
FOUR = PLAIN | {"CUA": CUA, "CLIP centred": {"center": True}} | RECIPE
TERMS = PLAIN | {"unif alone": {"unif": 1.0}, "align alone": {"align": 1.0}, "CUA": CUA}
SHORT = {"steps": 400}
ALL = (0.01, 0.07, 0.1, 0.2, 0.3)  # temperatures that plain CLIP is given
LEARNED = {"temperature": 0.07, "learn_temperature": True}
REAL = {"data": "real", "image_size": 32, "steps": 1200}
WRONG = {f"{share}% wrong, ": {"mismatch": share / 100} for share in (0, 10, 20, 50)}
HARD = {where: WRONG[where] for where in list(WRONG)[2:]}
LONG = {"20% wrong, 1500 steps, ": {"mismatch": 0.2, "steps": 1500}}
TUNED = {f"{kind} projections, ": {"steps": 400, "lr": 3e-4, "single": 0.0, "limit": 8000, "source": "pretrained", "model": kind}
         for kind in ("kept", "fresh")}
BEST = "best CLIP"  # in a check: of the rows with plain CLIP, that with the highest mean


def grid(losses, *temperatures, over={"": {}}, **settings):
    """{"where, loss, T=...": settings} for each of `over`, loss and temperature, 0 for a learned one."""
    rows = {}
    for where, extra in over.items():
        for loss, weights in losses.items():
            for T in temperatures:
                label = where + loss + (f", T={T:g}" if T else ", T learned")
                rows[label] = weights | ({"temperature": T} if T else LEARNED) | settings | extra
    return rows


def from_zero(**settings):
    """CLIP, with and without centring, cold and warm, and CUA, from a gap of zero."""
    start = settings | {"remove_gap": True}
    return grid({name: FOUR[name] for name in ("CLIP", "CLIP centred")}, 0.01, 0.07, **start) | grid({"CUA": CUA}, 0.01, **start)


def checks(metrics, row, *others):
    """That a row has more of each metric than each of the others."""
    return [(metric, row, other) for other in others for metric in metrics]


LAW = grid(PLAIN, *ALL, over=WRONG, **SHORT)
CLAIMS = {
    "losses": Claim(
        "Four losses, cold and warm: what closes the gap, and what that is good for",
        grid(FOUR, 0.01, 0.07) | grid(PLAIN, 0.1, 0) | grid({"CUAXU": CUA | {"xunif": 1.0}}, 0.01)
        | grid({"CUA centred once": CUA | {"model": "centred once"}}, 0.07)
        | {f"CLIP, T={T}, means subtracted": {"temperature": T, "steps": 1, "lr": 0.0, "model": "centred once",
                                                "source": f"CLIP, T={T}"} for T in (0.01, 0.07)},
        checks([SEP, UNIF], "CLIP, T=0.01", "CUA, T=0.01") + checks(TASKS, "CUA, T=0.01", "CLIP, T=0.01")
        + checks([SEP], 0.56, "CUA centred, T=0.07") + checks(TASKS, "CUA centred, T=0.07", BEST),
        (SEP, SEP100, CENTROIDS, UNIF, "alignment", *TASKS, T_EFF), five=tuple(grid(PLAIN | RECIPE, 0.01, 0.07))),
    "law": Claim(
        "Plain CLIP's T_eff tells the temperature to give",
        LAW | grid(RECIPE, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, over=WRONG, **SHORT), [],
        ("temperature", T_EFF, SEP, *SEARCH), picture="lines", drawn=("i2t_r1", "mixed_i2t")),
    "noise": Claim(
        "Wrong captions: where the recipe helps, and where not",
        dict(sorted((grid(PLAIN, *ALL, over=HARD, **SHORT) | grid({"CUA": CUA} | RECIPE, 0.01, 0.07, 0.1, over=HARD, **SHORT)
                     | grid(RECIPE, 0.15, 0.3, over=HARD, **SHORT) | grid(PLAIN, 0.1, 0.15, 0.2, over=LONG)
                     | grid(RECIPE, 0.15, over=LONG)).items())),
        [check for where, T in zip((*HARD, *LONG), (0.15, 0.3, 0.15))  # 1.5 times plain CLIP's T_eff
         for check in checks(USES, f"{where}CUA centred, T={T}", where + BEST)],
        (SEP, *TASKS[:7], T_EFF)),
    "little": Claim(
        "Little data: 2,000 images",
        grid(PLAIN, *ALL[:4], limit=2000, **SHORT) | grid({"CUA": CUA} | RECIPE, 0.01, 0.07, limit=2000, **SHORT),
        checks(USES, "CUA centred, T=0.07", BEST), (SEP, *TASKS[:7], T_EFF)),
    "real": Claim(
        "Real pictures with human titles",
        grid(PLAIN, 0.01, 0.05, 0.1, 0.2, 0, **REAL) | grid({"CUA": CUA} | RECIPE, 0.2, **REAL),
        checks(SEARCH, "CUA centred, T=0.2", BEST, "CUA, T=0.2"), (SEP, SEP100, *SEARCH, T_EFF)),
    "real-terms": Claim(
        "Real pictures: which ingredient does what",
        grid({"CUA": CUA} | RECIPE, 0.01, 0.05, 0.1, 0.2, 0, **REAL), [], (SEP, SEP100, *SEARCH, T_EFF)),
    "points": Claim(
        "Between free points no gap opens; with one shared vector a side it does, if that is fast",
        {"CLIP, no offset": {"offset": 0.0}, "CLIP, offset at 1/64 of the rate": {"offset": 1 / 64},
         "CLIP, offset at 1/8 of the rate": {"offset": 1 / 8}, "CLIP, offset": {},
         "CUA, no offset": CUA | {"offset": 0.0}, "CUA, offset": CUA,
         **{f"CLIP, offset, T={T}": {"temperature": T} for T in (.03, .07, .2)},
         **{f"CLIP, offset, d = {d}": {"dim": d} for d in (2, 3, 8, 32)},
         "T from 1 to .01": {"temperature": [1.0, 0.01, 300]}, "T from .07 to .01": {"temperature": [0.07, 0.01, 300]},
         "20% wrong": {"mismatch": 0.2}, "20% wrong, T from 1 to .01": {"mismatch": 0.2, "temperature": [1.0, 0.01, 300]}},
        checks([SEP], 0.62, "CLIP, no offset", "CUA, offset") + checks(
            [SEP], "CLIP, offset", 0.98, "CLIP, offset at 1/64 of the rate", "CLIP, offset, T=0.2", "T from 1 to .01")
        + checks([SEP], "20% wrong, T from 1 to .01", "T from 1 to .01"),
        (SEP, SEP100, CENTROIDS, UNIF, T_EFF), points=True),
    "thermostat": Claim(
        "Narrowness is a thermostat: from a colder T, T_eff ends at what the pairs want", LAW, [],
        ("temperature", T_EFF, CENTROIDS, SEP), picture="lines", drawn=(T_EFF, CENTROIDS)),
    "same-modality": Claim(
        "The same images in both encoders, and no gap to begin with: the loss makes one",
        from_zero(**SHORT, same_modality=True),
        checks([SEP, CENTROIDS], "CLIP, T=0.01", "CLIP, T=0.01, at the start")
        + checks([SEP], "CLIP, T=0.01", "CUA, T=0.01", "CLIP centred, T=0.01", "CLIP, T=0.07"),
        (SEP, CENTROIDS, UNIF, "alignment", "i2t_r1", "clip"),
        starts=True),
    "opening": Claim(
        "Images and texts without a gap at the start: it opens within the first steps", from_zero(steps=100, eval_every=5),
        checks([SEP], "CLIP, T=0.01", "CLIP, T=0.01, at the start", "CLIP centred, T=0.01", "CLIP, T=0.07"),
        (SEP, CENTROIDS, T_EFF, "alignment"), picture="curves", starts=True),
    "steps": Claim(
        "How many steps it takes",
        grid(RECIPE, 0.07, over={f"{n} steps, ": {"steps": n} for n in (400, 800, 1500)})
        | grid(PLAIN, 0.07, over={f"{n} steps, ": {"steps": n} for n in (400, 800, 1500)}),
        [check for a, b in ((400, 400), (800, 800), (400, 800))
         for check in checks(["i2t_r1", "zero_shot"], f"{a} steps, CUA centred, T=0.07", f"{b} steps, CLIP, T=0.07")],
        (SEP, *TASKS[:6])),
    "zero-shot": Claim(
        "The authors' protocol in miniature: pretrain with a learned T, then fine-tune",
        {"pretrained": LEARNED | {"steps": 800, "single": 0.5}} | grid(PLAIN | {"CUA": CUA}, 0.01, over=TUNED)
        | grid(PLAIN | RECIPE, 0.07, over=TUNED),
        [check for kind in TUNED for row in ("CUA, T=0.01", "CUA centred, T=0.07")
         for check in checks(["zero_shot", "arithmetic_attribute"], kind + row, f"{kind}CLIP, T={row[-4:]}")],
        (SEP, UNIF, *TASKS)),
    "terms": Claim(
        "Which term does what",
        grid(TERMS, 0.01, **SHORT)
        | grid({f"{name} centred": row | {"center": True} for name, row in TERMS.items()}, 0.07, **SHORT),
        [(UNIF, "CLIP, T=0.01", "unif alone, T=0.01"), ("alignment", "CLIP, T=0.01", "align alone, T=0.01"),
         (SEP, "unif alone, T=0.01", "CUA, T=0.01")],
        (SEP, SEP100, CENTROIDS, UNIF, "alignment", "i2t_r1", "mixed_i2t")),
    "dimension": Claim(
        "In three dimensions it closes by itself",
        grid(PLAIN, 0.01, over={f"d = {d}, ": {"dim": d} for d in (3, 8, 32, 128)}, **SHORT)
        | grid({"CUA": CUA}, 0.01, over={f"d = {d}, ": {"dim": d} for d in (3, 128)}, **SHORT)
        | grid(PLAIN | RECIPE, 0.07, over={"d = 3, ": {"dim": 3}}, **SHORT),
        [(SEP, "d = 128, CLIP, T=0.01", "d = 3, CLIP, T=0.01"),
         (UNIF, "d = 3, CLIP, T=0.01", "d = 3, CUA, T=0.01"), ("i2t_r1", "d = 3, CUA centred, T=0.07", "d = 3, " + BEST)],
        (SEP, CENTROIDS, UNIF, "i2t_r1", T_EFF)),
    "batch-size": Claim(
        "Small batches: it depends on what is kept equal",
        {"B = 16, same samples": {"batch": 16, "steps": 1600}, "B = 64": SHORT,
         "B = 256, same samples": {"batch": 256, "steps": 100}, "B = 16, same steps": SHORT | {"batch": 16}},
        checks([CENTROIDS, UNIF], "B = 16, same samples", "B = 256, same samples")
        + checks([CENTROIDS, UNIF], "B = 16, same steps", "B = 64"),
        (SEP, CENTROIDS, UNIF, "i2t_r1", T_EFF)),
}
INTRO = """# Gallery

`python figures/reproduce.py` makes this page, the pictures and `results.json` (with *losses* the animation, the scenes, too). Dots are seeds (6 to 8; in *losses* CLIP and CUA centred, T=.01 and .07, to 10), bars their means (*opening*: evaluations); numbers are mean±standard
deviation, or each seed's where separability spreads by over .1. Only each loss's best T was chosen at these seeds. All ran on two cores of an AMD EPYC, Python 3.11.7, torch 2.14.1, one thread a run. Verdicts name CLIP's best row; a bare number is a threshold. Columns: [README](../README.md#run-it).

<a id="credit"></a>
## Before and after this paper

- Liang et al. ([2203.02053](https://arxiv.org/abs/2203.02053)): the cone of untrained encoders; the temperature.
- Eslami & de Melo ([2406.17639](https://arxiv.org/abs/2406.17639)): shared parameters shrink it.
- Yaras et al. ([2412.07909](https://arxiv.org/abs/2412.07909)): mismatched pairs and a learned temperature keep it.
- Levi & Gilboa ([2411.14517](https://arxiv.org/abs/2411.14517)): two ellipsoids off the origin, which serve uncertainty from false negatives.
- Zhou et al. ([2302.11084](https://arxiv.org/abs/2302.11084)): subtracting means at test time, for the negatives of training.
- Liu et al. ([2604.00279](https://arxiv.org/abs/2604.00279)): repairs after training mainly close the centroids' gap, not that of the distributions.
- Inherent or not? Yi et al. ([2510.03268](https://arxiv.org/abs/2510.03268)): no: dimension collapse causes it. Cai et al. ([2601.19597](https://arxiv.org/abs/2601.19597)): it can be, at large batches.
- Chowers et al. ([2603.29080](https://arxiv.org/abs/2603.29080)): the gap vector is orthogonal to embeddings; closing it raises robustness, not accuracy.
- Bangachev et al. ([2509.18552](https://arxiv.org/abs/2509.18552)): in SigLIP, a learned temperature and bias explain a gap.
- Sun ([2209.02127](https://arxiv.org/abs/2209.02127)): the learned temperature indicates the noise of the data.

"""
READINGS = {
    "losses": """1,500 steps. At T=.01, the authors' setting, CUA closes the gap and keeps retrieval, and is no better at naming. But T=.01 is far from CLIP's best: at .07 or .1 it has hardly a gap, and all is better. Warmth helps CUA, too, and more with centring. Centring without the terms does as much for zero-shot; the terms add R@1, mixed i2t, attributes, captions. Relations alone fall.
"Centred once" folds the means into the untrained encoders only: the same as no centring. "Means subtracted" is the cure after training. *Holds*: mean difference, paired by seed, above its standard deviation; *at every seed*: all above zero.""",
    "law": """400 steps. Plain CLIP's T_eff (dotted) is a little colder than the recipe's best T, and much colder on clean pairs, where warmth is wanted at the start only.""",
    "noise": """400 steps where none are named; CLIP is compared at its best, with the recipe at 1.5 times the T_eff of plain CLIP. There it leads in search and zero-shot, in unseen combinations at 1,500 steps only. The T of clean pairs, .07,
is too cold for mixed search; centring at T=.01 fails.""",
    "little": """A tenth of the scenes, 400 steps: the recipe leads in all but unseen combinations.""",
    "real": """7,685 pictures of Debian's Open Clip Art and Tux Paint packages with human titles ([clipart.py](clipart.py) says how to get them), 1,200 steps. Retrieval is level. Mixed search gains from warmth, the two terms and centring.
T_eff does not tell the best T: these pairs can be learned by heart.""",
    "real-terms": """The same pictures, 1,200 steps. With a warm T centring adds .02 to .04 for images asking; texts asking gain at .05 and .2, lose at .1. At T=.01 it ruins mixed search.""",
    "points": """512 pairs of free vectors, 600 steps of Adam; T=.01, d = 128 and an offset unless named. Where T is high, the gap closes again. Annealing T from 1 leaves no gap, unless pairs are wrong.""",
    "thermostat": """Plain CLIP, 400 steps. Where T is colder than what the pairs want, training narrows the space until T_eff is about that; a T hotter than it is left alone. At T=.1 with a fifth
wrong the space is hardly narrow, the modalities still separable. Dotted: T_eff from T=.01.""",
    "same-modality": """400 steps. At T=.01 the loss ends near zero, the gap complete; at .07 little is left of it; with centring or CUA hardly any stays. *Published:* separability near 1 after training to convergence.""",
    "opening": """100 steps; curves: seed 6. Within five steps all but the centred have a complete gap; at T=.07 and with CUA it is closing again. Dotted: the ideal.""",
    "steps": """The recipe at 400 steps is ahead of CLIP at 400, and behind CLIP at 800.""",
    "zero-shot": """Pretrained for 800 steps on scenes of one and two objects with T learned, then 400 steps on 8,000 scenes of two. With the model's projections CUA gains at T=.01; with fresh ones, as the authors had, it does not. T=.07 alone gives about as much. *Published*, d = 128, CLIP / CUA / CUAXU: ImageNet .133/.138/.148, CIFAR-100 .318/.335/.345, Caltech .417/.483/.486.""",
    "terms": """400 steps. Alignment alone closes the gap in a narrow space; uniformity alone drives pairs apart; warm and centred, both together are best.""",
    "dimension": """400 steps. At d = 3 a space without a gap is still far from uniform; at d = 8 one of three seeds has a gap. *Published:* separability with CLIP .50 at d = 3 and 16 (one seed), .782 at 32, .999 at 64, 1.000 at 128.""",
    "batch-size": """At equal steps small batches have the wider gap; at equal samples it is otherwise (400 steps of 64, 1,600 of 16, 100 of 256). All are separable.""",
}
