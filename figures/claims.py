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
    shown: tuple = ("linear_separability", "centroid_distance", "uniformity_image", "alignment", "i2t_r1")
    reading: str = ""
    published: str = ""
    points: bool = False
    picture: str = "dots"
    starts: bool = False
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
        (SEP, CENTROIDS, UNIF, WARM), points=True),
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
        {label: {**row, **ZERO, "steps": 100, "eval_every": 1}
         for label, row in (("CLIP", CLIP), ("CUA", CUA), ("CLIP, centred", CENTER))},
        [(SEP, "CLIP", "CLIP, at the start"), (SEP, "CLIP", "CLIP, centred")],
        (SEP, CENTROIDS, WARM, "alignment"), picture="curves", starts=True),
    "thermostat": Claim(
        "The gap is a thermostat: T_eff is what the pairs want, whatever T is",
        {f"{round(100 * share)} % permuted, {label}": {**SHORT, "mismatch": share, **T}
         for share in (0.0, 0.1, 0.2, 0.5) for label, T in TEMPERATURES.items()},
        [], ("temperature", WARM), picture="thermostat"),
    "same-modality": Claim(
        "The same images in both encoders, and no gap to begin with: the loss makes one",
        {label: {**row, **ZERO, **SHORT, "same_modality": True}
         for label, row in (("CLIP", CLIP), ("CUA", CUA), ("CLIP, centred", CENTER))},
        [(SEP, "CLIP", "CLIP, at the start"), (CENTROIDS, "CLIP", "CLIP, at the start"),
         (SEP, "CLIP", "CUA"), (SEP, "CLIP", "CLIP, centred")],
        (SEP, CENTROIDS, UNIF, "alignment", "i2t_r1", "clip"),
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
        (SEP, UNIF, "alignment", "i2t_r1", "zero_shot", WARM)),
    "controls": Claim(
        "Taking single biases away does not do what centring does",
        {f"{name}, {kind}": {**loss, **SHORT, "model": kind}
         for name, loss in (("CLIP", CLIP), ("CUA", CUA))
         for kind in ("projection without bias", "no biases")},
        [], (SEP, CENTROIDS, UNIF, "i2t_r1")),
    "zero-shot": Claim(
        "The authors' protocol in miniature: pretrain with a learned T, then fine-tune at T = .01",
        {"pretrained": {**LEARNED, "steps": 800, "single": 0.5},
         **{f"{name}, projections {kind}": {**TUNED, **row, "model": kind}
            for kind in ("kept", "fresh") for name, row in
            (("CLIP", CLIP), ("CUA", CUA), ("CUA, centred", {**CUA, **CENTER}))}},
        [(metric, f"{name}, projections {kind}", f"CLIP, projections {kind}")
         for kind in ("kept", "fresh") for metric in ("zero_shot", "arithmetic") for name in ("CUA", "CUA, centred")],
        (SEP, UNIF, *TASKS),
        published="d = 128, CLIP / CUA / CUAXU: ImageNet .133 / .138 / .148, CIFAR-100 .318 / .335 / .345, Caltech .417 / .483 "
                  "/ .486, SIMAT .356 / .425 / .417"),
    "terms": Claim(
        "Which term does what",
        each({"CLIP": CLIP, "unif alone": {"unif": 1.0}, "align alone": {"align": 1.0},
              "xunif alone": {"xunif": 1.0}, "CUA": CUA}, **SHORT),
        [(UNIF, "CLIP", "unif alone"), ("alignment", "CLIP", "align alone"), (SEP, "unif alone", "CUA"),
         (SEP, "align alone", "CUA"), (CENTROIDS, "xunif alone", "CLIP")],
        (SEP, "linear_separability_c100", CENTROIDS, UNIF, "alignment", "i2t_r1")),
    "dimension": Claim(
        "In three dimensions it mostly closes by itself",
        {**{f"CLIP, d = {d}": {**SHORT, "dim": d} for d in (3, 8, 32)}, "CLIP, d = 128": SHORT,
         "CUA, d = 3": {**SHORT, **CUA, "dim": 3}, "CUA, d = 128": {**SHORT, **CUA}},
        [(SEP, "CLIP, d = 128", "CLIP, d = 3"), (SEP, "CLIP, d = 32", "CLIP, d = 8"),
         (UNIF, "CLIP, d = 3", "CUA, d = 3")],
        (SEP, CENTROIDS, UNIF, "i2t_r1", WARM),
        published="separability with CLIP .50 at d = 3 and 16 (one seed), .782 at 32, .999 at 64, 1.000 at 128"),
    "batch-size": Claim(
        "Small batches: it depends on what is kept equal",
        {"B = 16, same samples": {"batch": 16, "steps": 1600}, "B = 64": SHORT,
         "B = 256, same samples": {"batch": 256, "steps": 100}, "B = 16, same steps": {**SHORT, "batch": 16}},
        [(metric, "B = 16, same samples", "B = 256, same samples") for metric in (CENTROIDS, UNIF)]
        + [(metric, "B = 16, same steps", "B = 64") for metric in (CENTROIDS, UNIF)],
        (CENTROIDS, UNIF, "i2t_r1", WARM)),
    "longer": Claim(
        "Three times the steps",
        {name: {**row, "steps": 4500} for name, row in FOUR.items() if name in ("CLIP", "CUA, centred")},
        [(metric, "CUA, centred", "CLIP") for metric in TASKS], (SEP, CENTROIDS, UNIF, *TASKS)),
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
READINGS = {
    "points": """The loss opens no gap between free points. Let each side learn one vector that its points share,
and it is there within a few steps, at any T: nothing ties the two vectors to each other, as their product is the
same in all logits and cancels. Whether it *stays* depends on T: at .01 it does, at .2 it closes again (`python
cgap.py --points --temperature 0.2` draws it). In few dimensions (2, 3, 8) it does not. Annealed from T = 1 the
points end **without** one, at T_eff .010: pairs that fit need no warmth. With a fifth of the partners permuted,
anew at each step, annealing does not help, and T_eff ends near the encoders' (*thermostat*), though with a smaller
gap. So it belongs neither to encoders nor to the cold loss as such, but to a cold loss on pairs that do not fit,
and shared vectors. (Without an offset the points are as narrow, T_eff .027, and together.) Separability is measured
on 206 points: .50±.035 is none.""",
    "losses": """CUA and CUAXU close the gap, spread the embeddings and keep retrieval. At the uses that the paper
promises CUA from scratch is *not* better: zero-shot a little worse, arithmetic ahead within its spread. With the
shared vector taken away (*centred*) it is better at all four, at every seed. Centring alone (CLIP, centred) leaves
matched pairs far apart, and the tasks where they were: it takes both. (CLIP and CUA, centred, have five seeds;
verdicts pair those that both rows have.) The tests themselves are noisy: ±.035 for arithmetic (200 questions), ±.04
for unseen combinations (160 pictures).

*Subtracting the means afterwards* is not the same. Taking the means of 2,048 training pairs from the five finished
CLIP runs lowers separability from 1.00 to .535±.019, but R@1 stays (.885, .883): retrieval never saw the offset.
During training, centring spares CUA the work of moving the offset back. Batch norm on the embeddings (I0T, An et
al.) removes the mean, too, and scales each dimension besides.""",
    "opening": """From a removed gap separability is .92 after one step and 1.00 after four, with CLIP and with CUA.
Before anything is learned the space *warms*: T_eff rises from .085 to .118 in seven steps, then cools as pairs
begin to fit. Centred encoders never open one (they start at .67, as the gap was removed between clouds that then
lose their means).""",
    "thermostat": """T_eff at the end, by the share of permuted captions and T. A common offset makes cosines alike,
and so does for the softmax what a higher temperature does. Plain CLIP shrinks its space until T_eff is what the
pairs want, whatever T is, learned T included. Where T is hotter than that, T_eff is T and there is hardly a gap.
For encoders the gap is nearly a function of T / T_eff alone (right): mismatched pairs, low temperature and early
training are one explanation, not three. It says why a learned T leaves less of a gap, and why Yaras et al.
(2412.07909) see mismatched pairs and temperature keep it.

Clean pairs want warmth at the start only; what they keep (T_eff .021 at T = .01) is left from then, as pairs that
fit hardly pull (*same-modality*: a loss of .007), and shrinks with training (*longer*).

Where it stops: in few dimensions T_eff varies (*dimension*). With other forces on the space it is another
temperature: CUA, which pays for narrowness, ends at .07 with a fifth permuted (*noise*), and centred encoders are
held at T. At equal samples batch size changes nothing (*batch-size*).""",
    "same-modality": """The centrepiece. Two image encoders get the same images; the projection of one is moved,
turned and scaled so that its cloud lies on the other's. They end with a loss near 0, and a complete gap. Neither
modality, nor wrong pairs, nor the cone of the initialisation, nor too little training is left to explain it. CUA
leaves a trace after 400 steps; centred CLIP opens none.""",
    "image-text-from-zero": """Images and texts: CLIP opens a complete gap. CUA needs longer to close it (.55 after
the 1,500 steps of *losses*): it moves the offset back by gradient.""",
    "noise": """With pairs that fit, centred CUA retrieves better than CLIP. With a fifth of the captions permuted
it does not, and CLIP is ahead in zero-shot. The thermostat says why: those pairs want T = .10, the offset would
warm the softmax to that, and centring takes it away; what is left is to pull matched pairs apart (alignment 1.85).
CUA without centring keeps its narrow space, and its gap. So wrong pairs want a warmer T first. No real data was run
here; real captions are noisy.""",
    "longer": """After 4,500 steps (one seed, another processor) centred CUA is ahead of CLIP in retrieval, zero-shot and above all
unseen combinations, but behind in arithmetic: plain CLIP, trained longer, does it as well with a gap.""",
    "zero-shot": """800 steps with a learned T, half of the scenes with one object; then 400 at T = .01 on scenes of
two, tested on single ones. With *kept* projections CUA is far better at arithmetic and a little at zero-shot, at
every seed. With *fresh* ones, which is what the authors trained, neither holds; centred, both do. Fine-tuning
itself costs zero-shot accuracy.""",
    "terms": """Uniformity alone spreads the embeddings and leaves pairs far apart. Alignment alone closes the gap
best at C = 1 and retrieves best, in a space narrower than CLIP's. So it does **not** take both to close the gap; it
takes both to close it *and* spread. xunif alone drives images and texts to opposite sides. At C = 100 most of these
gaps are still found.""",
    "dimension": """At d = 32 and 128 CLIP has a complete gap. At d = 3 and 8 two of three seeds have none and the
third keeps that of its start (centroids 1.6 and .9 apart): in few dimensions a wide gap has no way around. With CUA
there is none at any seed. And no gap is not a uniform space: -2.08 would be uniform at d = 3.""",
    "batch-size": """At equal steps B = 16 has a wider gap and a less uniform space than B = 64, but has seen a
quarter of the samples. At equal samples its centroids are *nearer* than those of B = 256 (retrieval is worse). So
"small batches make the gap worse" holds at equal steps only. At equal samples T_eff is the same.""",
    "controls": """To be compared with the *clean* rows of *noise*. With biases frozen at 0 the gap is as complete:
GELU's outputs have a mean of their own, which any matrix turns into an offset. Not biases are the cause but the
freedom to move the mean, which centring takes away.""",
}
for _name, _text in READINGS.items():
    CLAIMS[_name].reading = _text.replace("\n\n", "@@").replace("\n", " ").replace("@@", "\n\n")
