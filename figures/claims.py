"""The claims, as data: what each says, the runs that test it, and what must come out."""
from dataclasses import dataclass, field


@dataclass
class Claim:
    """A claim. runs: {label: settings other than cgap.Config's, or cgap.smallest_gap's if `points`};
    `model` names what to start from (see reproduce.make_model), `source` the row whose run that is.
    checks: (metric, more, less[, by]): rows, "row, at the start", or numbers; a check holds if the
    difference, paired by seed, exceeds `by` on average, and that by more than its standard deviation.
    seeds: rows that get more seeds than the others."""
    title: str
    runs: dict
    checks: list = field(default_factory=list)
    shown: tuple = ("linear_separability", "linear_separability_c100", "centroid_distance",
                    "uniformity_image", "alignment", "i2t_r1")
    reading: str = ""
    published: str = ""
    points: bool = False
    picture: str = "dots"
    starts: bool = False
    rows: bool = True
    seeds: dict = field(default_factory=dict)


SEP, CENTROIDS, UNIF, WARM = ("linear_separability", "centroid_distance", "uniformity_image",
                              "effective_temperature")
TASKS = ("i2t_r1", "zero_shot", "zero_shot_unseen", "arithmetic")
ALL = (SEP, "linear_separability_c100", CENTROIDS, UNIF, "alignment", *TASKS)
CLIP, CUA, CUAXU = {}, {"unif": 1.0, "align": 1.0}, {"unif": 1.0, "align": 1.0, "xunif": 1.0}
LOSSES = {"CLIP": CLIP, "CUA": CUA, "CUAXU": CUAXU}
CENTER = {"center": True}
CENTRED = {f"{name}, centred": {**loss, **CENTER} for name, loss in LOSSES.items()}
FOUR = {"CLIP": CLIP, "CUA": CUA, "CLIP, centred": CENTER, "CUA, centred": {**CUA, **CENTER}}
SHORT = {"steps": 400}
LEARNED = {"temperature": 0.07, "learn_temperature": True}
ZERO = {"init_gap": "remove"}
TUNED = {"steps": 400, "lr": 3e-4, "single": 0.0, "limit": 8000, "source": "pretrained"}
TEMPERATURES = {"T = .01": {}, "T = .03": {"temperature": 0.03}, "T = .07": {"temperature": 0.07},
                "T = .2": {"temperature": 0.2}, "learned": LEARNED}


def each(rows, **settings):
    """The rows with these settings too."""
    return {label: {**row, **settings} for label, row in rows.items()}


CLAIMS = {
    "points": Claim(
        "Between free points no gap opens; with one shared vector a side it does",
        {"CLIP, no offset": {"offset": False}, "CLIP, offset": {},
         "CUA, no offset": {**CUA, "offset": False}, "CUA, offset": CUA,
         **{f"CLIP, offset, T = {T}": {"temperature": T} for T in (.03, .07, .2)},
         **{f"CLIP, offset, d = {d}": {"dim": d} for d in (2, 3, 8, 32)},
         "T from 1 to .01": {"temperature": [1.0, 0.01, 300]},
         "T from .07 to .01": {"temperature": [0.07, 0.01, 300]},
         "20 % permuted": {"mismatch": 0.2},
         "20 % permuted, T from 1 to .01": {"mismatch": 0.2, "temperature": [1.0, 0.01, 300]}},
        [(SEP, 0.62, "CLIP, no offset"), (SEP, "CLIP, offset", 0.98), (SEP, 0.62, "CUA, offset"),
         (SEP, "CLIP, offset", "CLIP, offset, T = 0.2"), (SEP, "CLIP, offset", "T from 1 to .01"),
         (SEP, "20 % permuted, T from 1 to .01", "T from 1 to .01")],
        (SEP, "linear_separability_c100", CENTROIDS, UNIF, "alignment", WARM), points=True),
    "losses": Claim(
        "Two encoders, six losses: what closes the gap, and what that is good for",
        {**LOSSES, **CENTRED},
        [(SEP, "CLIP", "CUA"), (CENTROIDS, "CLIP", "CUA"), (UNIF, "CLIP", "CUA"), (SEP, "CLIP", "CUAXU"),
         (SEP, 0.60, "CUA, centred"), (UNIF, -3.4, "CUA, centred"),
         ("i2t_r1", "CUA", "CLIP", -0.03), ("zero_shot", "CUA", "CLIP"), ("arithmetic", "CUA", "CLIP"),
         ("i2t_r1", "CUA, centred", "CLIP", 0.04), ("zero_shot", "CUA, centred", "CLIP", 0.05),
         ("zero_shot_unseen", "CUA, centred", "CLIP", 0.10), ("arithmetic", "CUA, centred", "CLIP", 0.03),
         ("i2t_r1", "CUA, centred", "CUA"), ("zero_shot", "CUA, centred", "CUA")],
        (*ALL, WARM), seeds={"CLIP": 5, "CUA, centred": 5}),
    "opening": Claim(
        "It opens within the first steps",
        {label: {**row, **ZERO, "steps": 100, "eval_every": 4}
         for label, row in (("CLIP", CLIP), ("CUA", CUA), ("CLIP, centred", CENTER))},
        [(SEP, "CLIP", "CLIP, at the start"), (SEP, "CLIP", "CLIP, centred")],
        (SEP, CENTROIDS, WARM, "alignment"), picture="curves", starts=True),
    "thermostat": Claim(
        "The gap is a thermostat: T_eff is what the pairs want, whatever T is",
        {f"{round(100 * share)} % permuted, {label}": {**SHORT, "mismatch": share, **T}
         for share in (0.0, 0.1, 0.2, 0.5) for label, T in TEMPERATURES.items()},
        [], ("temperature", WARM, SEP, CENTROIDS, UNIF, "i2t_r1"), picture="thermostat"),
    "same-modality": Claim(
        "The same images in both encoders, and no gap to begin with: the loss makes one",
        {label: {**row, **ZERO, **SHORT, "same_modality": True}
         for label, row in (("CLIP", CLIP), ("CUA", CUA), ("CLIP, centred", CENTER))},
        [(SEP, "CLIP", "CLIP, at the start"), (CENTROIDS, "CLIP", "CLIP, at the start"),
         (SEP, "CLIP", "CUA"), (SEP, "CLIP", "CLIP, centred")],
        (SEP, "linear_separability_c100", CENTROIDS, UNIF, "alignment", "i2t_r1", "clip"),
        published="separability near 1 after training to convergence", starts=True),
    "image-text-from-zero": Claim(
        "Images and texts without a gap at the start: it is not the cone effect",
        {label: {**row, **ZERO, **SHORT}
         for label, row in (("CLIP", CLIP), ("CUA", CUA), ("CLIP, centred", CENTER))},
        [(SEP, "CLIP", "CLIP, at the start"), (SEP, "CLIP", "CUA"), (SEP, "CLIP", "CLIP, centred")],
        starts=True),
    "noise": Claim(
        "Where centring helps, and where not: clean pairs, permuted captions, little data",
        {**each({f"clean, {name}": row for name, row in FOUR.items()}, **SHORT),
         **each({f"20 % permuted, {name}": row for name, row in FOUR.items()}, **SHORT, mismatch=0.2),
         **each({f"2,000 images, {name}": row for name, row in FOUR.items()}, **SHORT, limit=2000)},
        [(metric, f"{where}, CUA, centred", f"{where}, CLIP")
         for where in ("clean", "20 % permuted", "2,000 images") for metric in ("i2t_r1", "zero_shot")],
        (SEP, CENTROIDS, UNIF, "alignment", *TASKS, WARM)),
    "controls": Claim(
        "Taking single biases away does not do what centring does",
        {f"{name}, {kind}": {**loss, **SHORT, "model": kind}
         for name, loss in (("CLIP", CLIP), ("CUA", CUA))
         for kind in ("projection without bias", "no biases")},
        [], ALL),
    "zero-shot": Claim(
        "The authors' protocol in miniature: pretrain with a learned T, then fine-tune at T = .01",
        {"pretrained": {**LEARNED, "steps": 800, "single": 0.5},
         **{f"{name}, projections {kind}": {**TUNED, **row, "model": kind}
            for kind in ("kept", "fresh") for name, row in
            (("CLIP", CLIP), ("CUA", CUA), ("CUA, centred", {**CUA, **CENTER}))}},
        [(metric, f"{name}, projections {kind}", f"CLIP, projections {kind}")
         for kind in ("kept", "fresh") for metric in ("zero_shot", "arithmetic") for name in ("CUA", "CUA, centred")],
        (SEP, CENTROIDS, UNIF, "alignment", *TASKS),
        published="d = 128, CLIP / CUA / CUAXU: ImageNet .133 / .138 / .148, CIFAR-100 .318 / .335 / .345, Caltech .417 / .483 "
                  "/ .486, SIMAT .356 / .425 / .417"),
    "terms": Claim(
        "Which term does what",
        each({"CLIP": CLIP, "unif alone": {"unif": 1.0}, "align alone": {"align": 1.0},
              "xunif alone": {"xunif": 1.0}, "CUA": CUA}, **SHORT),
        [(UNIF, "CLIP", "unif alone"), ("alignment", "CLIP", "align alone"), (SEP, "unif alone", "CUA"),
         (SEP, "align alone", "CUA"), (CENTROIDS, "xunif alone", "CLIP")],
        (SEP, "linear_separability_c100", CENTROIDS, UNIF, "matched_cosine", "alignment", "i2t_r1")),
    "dimension": Claim(
        "In three dimensions it mostly closes by itself",
        {**{f"CLIP, d = {d}": {**SHORT, "dim": d} for d in (3, 8, 32)}, "CLIP, d = 128": SHORT,
         "CUA, d = 3": {**SHORT, **CUA, "dim": 3}, "CUA, d = 128": {**SHORT, **CUA}},
        [(SEP, "CLIP, d = 128", "CLIP, d = 3"), (SEP, "CLIP, d = 32", "CLIP, d = 8"),
         (UNIF, "CLIP, d = 3", "CUA, d = 3")],
        (SEP, CENTROIDS, UNIF, "alignment", "i2t_r1", WARM),
        published="separability with CLIP .50 at d = 3 and 16 (one seed), .782 at 32, .999 at 64, 1.000 at 128"),
    "batch-size": Claim(
        "Small batches: it depends on what is kept equal",
        {"B = 16, same samples": {"batch": 16, "steps": 1600}, "B = 64": SHORT,
         "B = 256, same samples": {"batch": 256, "steps": 100}, "B = 16, same steps": {**SHORT, "batch": 16}},
        [(metric, "B = 16, same samples", "B = 256, same samples") for metric in (CENTROIDS, UNIF)]
        + [(metric, "B = 16, same steps", "B = 64") for metric in (CENTROIDS, UNIF)],
        (SEP, CENTROIDS, UNIF, "alignment", "i2t_r1", WARM)),
    "longer": Claim(
        "Three times the steps",
        {name: {**row, "steps": 4500} for name, row in FOUR.items() if name in ("CLIP", "CUA, centred")},
        [(metric, "CUA, centred", "CLIP") for metric in TASKS], ALL),
}
INTRO = """# Gallery

Every claim with its picture, table, verdicts and command. `python figures/reproduce.py` makes this page, the pictures and
`results.json`; runs that are finished are not made again, and equal rows of two claims are one run.

Numbers are means ± standard deviations over seeds 3, 4, 5: nothing was chosen by looking at them (a row may have two seeds
more). A check *holds* if the difference, paired by seed, is on average above zero (or above the margin it names) and by
more than its standard deviation; with three seeds that is a low bar, so read the size too. Within a claim all rows have the
same settings but for what their names say; steps are 1,500 in *losses*, 400 in the sweeps. Each run anneals its learning
rate to 0. What the columns mean stands in the [README](../README.md#run-it); for uniformity, lower is more spread.
"""
READINGS = {
    "points": """The loss neither opens nor closes a gap between free points. Let each side learn one vector that its points
share, and the gap is there at once. It needs a cold softmax (at T = .07 hardly a gap, at .2 none) and many dimensions (none at
d = 2, 3, 8; a part at 32). Annealed from T = 1 to .01 the points end at the same T **without** a gap: pairs that fit need no
warmth. From .07 it does not suffice. And if a fifth of the partners is permuted anew at each step, annealing does not help: the space stays narrow
and the gap is there, at T_eff = .107, the very value that encoders reach with a fifth of their captions permuted (*thermostat*, below). So the gap is a
property neither of encoders nor of the cold loss as such, but of a cold loss on pairs that do not fit.""",
    "losses": """CUA and CUAXU close the gap and spread the embeddings, and retrieval is kept. At the uses that the paper promises
CUA from scratch is *not* better: zero-shot is level or worse, arithmetic level. With the shared vector taken away (*centred*) it is
better at all four, at every seed. Centring alone (CLIP, centred) leaves no shared vector, but matched pairs far apart
(alignment .77) and the tasks about where they were. The tests alone are noisy: ± .035 for arithmetic (200 questions), ± .04
for unseen combinations (160 pictures). At C = 100 the classifier finds a little more than at the authors' C = 1.

*Subtracting the means afterwards* is not the same. If the means of 2,048 training pairs are subtracted from the validation
embeddings of the plain CLIP runs (exercise 5 in the README), separability falls from 1.00 to .536 ± .020 and uniformity from -1.86 to -3.27, but R@1
stays, .888 before and .884 after: a constant offset is nearly all of the gap, and retrieval never saw it. What centring changes is what training spends on the offset.

Batch norm without parameters on the embeddings (the trainable variant of I0T, An et al.) also removes the mean, and scales each dimension besides.""",
    "opening": """From a removed gap: within four steps the gap is complete, with CLIP and with CUA. Before anything is learned, the
space *warms*: T_eff rises from .085 to .11 in eight steps, then cools as pairs begin to fit. CUA closes the gap again in the
hundreds of steps that follow; centred encoders never open one (their separability starts at .67, as the gap was removed between
clouds that then lose their means, and falls).""",
    "thermostat": """A common offset makes all cosines more alike, and so does for the softmax what a higher temperature does. Plain CLIP
shrinks its space until the *effective* temperature is what the pairs want: with a tenth, a fifth, a half of the captions
permuted about .08, .10, .18, whether T is .01, .03, .07 or learned. Where T is hotter than that, T_eff is T and there is
hardly a gap (lines meet the dotted one). And the gap is nearly a function of T / T_eff alone, whatever made it. So
mismatched pairs, low temperature and early training are one explanation, not three. It says why a learned T (which OpenAI's CLIP
has) leaves less of a gap, and why Yaras et al. (2412.07909) see mismatched pairs and temperature keep it.

Where it stops: the clean pairs at T = .01 want .02 here (400 steps do not fit them all), at d = 32 as at 128; in fewer dimensions it varies (*dimension*). With other
forces on the space it is another temperature: CUA, which pays for narrowness, ends at .07 with a fifth permuted (*noise*), and centred encoders
are held at T and pay with pairs far apart instead. The batch size changes nothing (*batch-size*).""",
    "same-modality": """The centrepiece. Two image encoders get the same images; the projection of one is moved, turned and scaled
so that its cloud lies on the other's. They end with R@1 .98 and a loss near 0, and with a complete gap. Neither modality, nor wrong
pairs, nor the cone of the initialisation, nor too little training is left to explain it. With CUA a trace is left after 400 steps
(.585; it started at .525), and centred CLIP never opens one.""",
    "image-text-from-zero": """Images and texts now: CLIP opens a complete gap in 400 steps. CUA needs longer to close it (.66 here, .55 after the
1,500 steps of *losses*): it has to move the offset back by gradient.""",
    "noise": """With pairs that fit, centred CUA retrieves better than CLIP, already after 400 steps. With a fifth of the captions
permuted it does not: CLIP is ahead in zero-shot and level or ahead in retrieval. The thermostat says why: the pairs then want T = .10, the offset is what
would warm the softmax to that, and centring takes it away. What is left is to pull matched pairs apart: their alignment is 1.85, a
cosine of .08. CUA without centring keeps its narrow space (uniformity -.37) and so its gap, .99 to the classifier. So wrong pairs want a warmer T first. No real data
was run here; real captions are noisy.""",
    "longer": """After 4,500 steps (one seed only) centred CUA is still ahead of CLIP in retrieval, zero-shot and above all in unseen
combinations, but behind in arithmetic. So arithmetic is the use that does not follow the gap: plain CLIP, trained longer, does
it as well with a gap.""",
    "zero-shot": """800 steps with a learned T, half of the scenes with one object; then 400 steps at T = .01 on scenes of two, tested on
single ones. *Kept* projections: CUA names shapes better than CLIP (.015 at every seed, a small lead) and calculates clearly better; *fresh* ones, which is
what the authors trained: arithmetic better at every seed, zero-shot within the spread. Centring adds to arithmetic and retrieval. In
this protocol the encoders are already good, so the offset costs less; but it is the one in which CUA without centring gains, as the authors found.
Fine-tuning itself costs zero-shot accuracy here (.950 before).""",
    "terms": """Uniformity alone spreads the embeddings and leaves pairs far apart. Alignment alone closes the gap best (C = 1) and
retrieves best, in a space narrower than CLIP's. So it does **not** take both to close the gap; it takes both to close it *and* spread the
embeddings. xunif alone drives images and texts to opposite sides. After 400 steps C = 100 still finds most of the gaps that C = 1 calls small.""",
    "dimension": """At d = 32 and 128 plain CLIP has a complete gap. At d = 3 and 8 two of three seeds have none and the third keeps the one
of its start, images and texts far apart (centroids 1.6 and .9): in few dimensions a wide gap has no way around (the authors' d = 3 has one seed, without a gap). With CUA there is none at
any seed. And no gap is not a uniform space: -2.08 would be uniform at d = 3. T_eff is .021 at d = 32 and 128, and
.015 to .036 at d = 3, where the seed that keeps its gap is the warmest.""",
    "batch-size": """At equal steps B = 16 has a wider gap and a less uniform space than B = 64, but it has seen a quarter of the samples. At
equal samples its centroids are *nearer* than those of B = 256, and uniformity is the same. So "small batches make it worse" holds at equal
steps only. T_eff is .021 at all three sizes, at equal samples.""",
    "controls": """400 steps, to be compared with the *clean* rows of *noise*. With the projections' biases, or all biases of both encoders, frozen at 0
the gap is as complete as before: GELU's outputs have a mean of their own, and any weight matrix turns it into an offset. So biases are not
the cause; freedom to move the mean is, and centring the outputs is what takes it away.""",
}
for _name, _text in READINGS.items():
    CLAIMS[_name].reading = _text.replace("\n\n", "@@").replace("\n", " ").replace("@@", "\n\n")
