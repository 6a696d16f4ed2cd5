"""The pictures of the claims. Each function is given the folder to draw into, the name of its claim
and {claim: its records.Row} of all claims. reproduce.py uses this.

The pictures of clouds need the runs themselves, in runs/reproduce. Where those are not, they are
left as they are.
"""
import re
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F

import cgap
from records import METRICS, find, folder_of, without_defaults

LEAST = {"linear_separability": 0.42}  # where an axis of a share does not begin at 0
UNBOUNDED = ("unif", "align", "xunif", "margin_in_T", "train_loss")


def mark_log_axis(axis, ticks, name):
    """Make the x axis logarithmic, with these ticks written as plain numbers."""
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(name)


# ---- a dot for each run ----
def draw_dots(folder, name, results, panels, file=None):
    """A line for each row and a dot for each of its runs, in a panel for each metric. Where the
    metric is mixed search, a ring shows R@1 of the same run, which it cannot exceed."""
    rows = results[name]
    figure, (axes,) = cgap.canvas(1, len(panels))
    figure.set_size_inches(3.4 + 2.3 * len(panels), 1.3 + 0.27 * len(rows))
    heights = list(range(len(rows), 0, -1))  # the first row is on top
    for axis, metric in zip(axes, panels):
        for height, row in zip(heights, rows):
            numbers = row.values(metric)
            if numbers is None:
                continue
            searched = row.values("i2t_r1") if metric == "mixed_i2t" else None
            if searched is not None:
                axis.plot(searched.mean(), height, "o", color="C3", mfc="none", ms=8)
            axis.plot(numbers, [height] * len(numbers), "o", color="C0", ms=5, alpha=0.7)
        mark_panel(axis, metric, rows)
        axis.set_yticks(heights, [row.label for row in rows] if axis is axes[0] else [])
        axis.set_ylim(0.4, len(rows) + 0.6)
        for height in heights:
            axis.axhline(height, color="0.92", lw=0.8, zorder=0)
    add_dot_legend(figure, panels)
    figure.savefig(folder / (file or f"{name}.png"))


def mark_panel(axis, metric, rows):
    """Name a panel's axis, let it end where the metric does, and draw the level of chance."""
    axis.set_xlabel("\n".join(textwrap.wrap(METRICS[metric][1], 24)), fontsize=9)
    if metric in UNBOUNDED:
        return
    both = [metric, "i2t_r1"] if metric == "mixed_i2t" else [metric]
    largest = max(row.values(m).max().item() for row in rows for m in both
                  if row.values(m) is not None)
    low = LEAST.get(metric, 0)
    high = max(1.0, largest) if largest > 0.5 else 1.15 * largest
    axis.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    if high == 1:
        axis.set_xticks([0.5, 0.75, 1] if low else [0, 0.5, 1])
    if metric == "linear_separability":
        axis.axvline(0.5, color="0.4", ls=":", zorder=0)


def add_dot_legend(figure, panels):
    """Say what dots, rings and lines are."""
    from matplotlib.lines import Line2D
    handles = [Line2D([], [], marker="o", color="C0", ls="", label="a run (one seed)")]
    if "mixed_i2t" in panels:
        handles.append(Line2D([], [], marker="o", color="C3", mfc="none", ls="", ms=8,
                              label="R@1 of the same runs"))
    if "linear_separability" in panels:
        handles.append(Line2D([], [], color="0.4", ls=":", label="chance"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)


def draw_points(folder, name, results):
    """What `python cgap.py --points` draws, points.png, and the dots of all rows."""
    cgap.run_points(out=folder)
    draw_dots(folder, name, results, file="points-push.png", panels=(
        "linear_separability", "centroid_distance", "spread", "mixed_i2t"))


# ---- lines over the temperature or a weight ----
def draw_margin(folder, name, results):
    """Margin and mixed search against T: a column for each loss, a line for each share of
    mismatched captions, a dot for each run."""
    weights = {"CLIP": {}, "CUA": {"unif": 1.0, "align": 1.0}}
    shares = (0.0, 0.05, 0.2, 0.5)
    figure, axes = cgap.canvas(2, 2)
    figure.set_size_inches(9, 6.6)
    for axis, (metric, loss) in zip(axes.flat, [(metric, loss) for metric in ("margin", "mixed_i2t")
                                                for loss in weights]):
        for share, colour in zip(shares, ("C0", "C2", "C1", "C3")):
            found = [find(results[name], mismatch=share, temperature=T, **weights[loss])
                     for T in (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)]
            captions = f"{100 * share:g} % mismatched" if share else "exact captions"
            draw_line(axis, "temperature", metric, [row for row in found if row], color=colour,
                      label=captions)
        is_margin = metric == "margin"
        if is_margin:
            axis.axhline(1, color="0.4", ls=":", label="the largest margin (no gap)")
        axis.set(ylim=(-0.04, 1.08), ylabel=METRICS[metric][1] if loss == "CLIP" else "")
        axis.set_title(f"{loss}: " + ("margin" if is_margin else "mixed search"), fontsize=11)
        mark_log_axis(axis, [0.01, 0.02, 0.05, 0.1, 0.2, 0.5], "temperature T")
        axis.grid(color="0.93")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
                  fontsize=8.5)
    figure.savefig(folder / f"{name}.png")


def draw_line(axis, field, metric, rows, **style):
    """A line through the means of rows over a field of their settings, and a dot for each run."""
    xs = [row.settings[field] for row in rows]
    axis.plot(xs, [row.mean(metric) for row in rows], "-", **style)
    for x, row in zip(xs, rows):
        numbers = row.values(metric)
        if numbers is not None:
            axis.plot([x] * len(numbers), numbers, "o", ms=3.5, color=style["color"])


WEIGHTS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def draw_weights(folder, name, results):
    """Four measures against the weight of one term or of both, with exact captions (above) and
    mismatched ones (below); CLIP, whose weights are 0, as a level."""
    rows, panels = results[name], ("linear_separability", "mixed_i2t", "zero_shot",
                                   "arithmetic_attribute")
    terms = {"alignment": ("align",), "uniformity": ("unif",), "both": ("unif", "align")}
    figure, axes = cgap.canvas(2, len(panels))
    figure.set_size_inches(13, 6.2)
    for share, line in zip((0.0, 0.2), axes):
        for metric, axis in zip(panels, line):
            clip = find(rows, mismatch=share, temperature=0.01)
            if clip:
                axis.axhline(clip.mean(metric), color="0.4", ls="--", label="CLIP (weights 0)")
            for kind, colour in zip(terms, ("C0", "C1", "C2")):
                found = [find(rows, mismatch=share, temperature=0.01,
                              **dict.fromkeys(terms[kind], weight)) for weight in WEIGHTS]
                draw_line(axis, terms[kind][0], metric, [row for row in found if row],
                          color=colour, label={"both": "both terms"}.get(kind, f"{kind} alone"))
            if metric == "linear_separability":
                axis.axhline(0.5, color="0.4", ls=":", label="chance")
            axis.set(ylim=(0.45 if metric == "linear_separability" else -0.04, 1.04),
                     title=METRICS[metric][1])
            axis.title.set_fontsize(9)
            mark_log_axis(axis, WEIGHTS, "weight of the term" if share else "")
            axis.set_xlim(0.0025, 1.2)
            axis.grid(color="0.93")
        line[0].set_ylabel("a fifth mismatched" if share else "exact captions", fontsize=11)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(folder / f"{name}.png")


# ---- the loss as the clouds are moved ----
def draw_landscape(folder, name, results):
    """The loss of training pairs, minus its least, while the means are moved: a line for each T, a
    dot at the distance as trained."""
    figure, (axes,) = cgap.canvas(1, 2)
    figure.set_size_inches(10, 4.4)
    colours = {0.01: "C0", 0.02: "C1", 0.05: "C2", 0.1: "C3", 0.15: "C5", 0.2: "C4"}
    for axis, share in zip(axes, (0.0, 0.2)):
        for T, colour in colours.items():
            row = find(results[name], part="training pairs", mismatch=share, temperature=T)
            if row is None:
                continue
            curve, trained = row.records[0]["curve"], row.records[0]["end"]["trained_g"]
            least = min(curve["loss"])
            rises = [loss - least for loss in curve["loss"]]
            axis.plot(curve["g"], rises, "-", color=colour, label=f"T = {T:g}")
            axis.plot(trained, height_at(curve["g"], rises, trained), "o", color=colour, ms=7)
        axis.set(xlabel="centroid distance (changed by hand)", xlim=(0, 1.4),
                 ylim=(-0.01, 0.3), title="a fifth mismatched" if share else "exact captions")
        axis.grid(color="0.93")
        axis.plot([], [], "o", color="0.3", label="as trained")
    axes[0].set_ylabel("loss, minus its least")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(folder / f"{name}.png")


def height_at(xs, ys, x):
    """The height at x of the line through points (xs, ys), which need not be sorted."""
    points = sorted(zip(xs, ys))
    for (left, low), (right, high) in zip(points, points[1:]):
        if left <= x <= right and left < right:
            return low + (high - low) * (x - left) / (right - left)
    return points[0][1] if x < points[0][0] else points[-1][1]


# ---- repairs ----
def split_repair(part):
    """What a repair does, and how many pairs it saw: "rotated, 1,000 pairs" is ("rotated", 1000),
    and "as it is" is ("as it is", None)."""
    match = re.fullmatch(r"(.*), ([\d,]+) pairs", part)
    return (match[1], int(match[2].replace(",", ""))) if match else (part, None)


PANELS_OF_REPAIRS = (  # title, fields of the model that is repaired, where a better T is looked up
    ("20,000 drawings, exact captions", {}, ("losses", {"temperature": 0.1})),
    ("20,000 drawings, 20 % mismatched", {"mismatch": 0.2},
     ("margin", {"mismatch": 0.2, "temperature": 0.15})),
    ("200,000 drawings, 20 % mismatched", {"mismatch": 0.2, "limit": 200_000},
     ("scale", {"mismatch": 0.2, "temperature": 0.15})),
    ("photographs (larger scale)", {"photographs": True}, ("photographs", {"temperature": 0.1})))


def draw_repairs(folder, name, results):
    """Mixed search against the number of pairs that a repair saw, of models trained at T = 0.01:
    CLIP above, CUA below. Levels: the model as it is, its R@1, and one trained at a higher T."""
    losses = {"CLIP": {}, "CUA": {"unif": 1.0, "align": 1.0}}
    figure, axes = cgap.canvas(2, len(PANELS_OF_REPAIRS))
    figure.set_size_inches(14, 6.6)
    for loss, line in zip(losses, axes):
        for axis, (title, model, (claim, better)) in zip(line, PANELS_OF_REPAIRS):
            rows = [row for row in results[name] if is_of(row.settings, losses[loss] | model)]
            draw_repairs_of(axis, rows)
            trained = find(results[claim], **losses["CLIP"], **better)
            if trained:
                axis.axhline(trained.mean("mixed_i2t"), color="0.2", ls="--", lw=1,
                             label="CLIP trained at a higher T from the start")
            axis.set_title(f"{loss}, T = 0.01\n{title}", fontsize=9)
            axis.set_ylim(bottom=-0.01, top=0.25 if "photographs" in model else 1.04)
            mark_log_axis(axis, [100, 1000, 10_000],
                          "pairs that the repair saw" if loss == "CUA" else "")
            axis.grid(color="0.93")
        line[0].set_ylabel("mixed search: image finds its caption")
    handles = {text: handle for axis in axes.flat
               for handle, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(folder / f"{name}.png")


def is_of(settings, wanted):
    """Whether a row of repairs starts from the model with these fields, all others absent or 0."""
    fields = ("unif", "align", "mismatch", "limit", "photographs", "same_modality", "dim")
    return all((settings.get(name) or 0) == wanted.get(name, 0) for name in fields)


DRAWN_REPAIRS = {"means subtracted": "C0", "rotated": "C3",
                 "means subtracted, then rotated": "C1", "linear layers at a higher T": "C2"}


def draw_repairs_of(axis, rows):
    """One line for each of DRAWN_REPAIRS of one model, and a level for the model as it is."""
    lines = {}
    for row in rows:
        what, pairs = split_repair(row.part)
        if what == "as it is":
            axis.axhline(row.mean("mixed_i2t"), color="0.5", ls=":", label="as it is")
            axis.axhline(row.mean("i2t_r1"), color="C4", ls="-.", lw=1, label="R@1, as it is")
        if what.startswith("linear layers at T = "):
            T = float(what.rpartition(" ")[2])
            what = "linear layers at a higher T" if T >= 0.1 else what  # others repair nothing
        lines.setdefault(what, []).append((pairs, row.mean("mixed_i2t")))
    for what, colour in DRAWN_REPAIRS.items():
        points = sorted(lines.get(what, []))
        axis.plot([pairs for pairs, _ in points], [height for _, height in points], "o-", ms=3.5,
                  color=colour, label=what)


# ---- the verdict ----
VERDICT = {  # a size: (claim, fields of its rows, a higher T)
    "20,000 drawings, exact captions": ("losses", {}, 0.1),
    "200,000 drawings, a fifth mismatched": ("scale", {"mismatch": 0.2}, 0.15),
    "7,091 photographs, frozen encoders": ("photographs", {}, 0.1)}


def draw_verdict(folder, results):
    """Mixed search at three sizes: at a low and at a higher T, with CLIP's loss and with the two
    terms; a ring at R@1 of the same runs, which mixed search cannot exceed."""
    sizes = {size: verdict_lines(results[claim], model, higher)
             for size, (claim, model, higher) in VERDICT.items()}
    if any(row is None for lines in sizes.values() for _, row, _ in lines):
        return  # a size has not been run
    figure, (axes,) = cgap.canvas(1, 3)
    figure.set_size_inches(12.5, 3.2)
    for axis, (size, lines) in zip(axes, sizes.items()):
        for height, (_, row, metric) in enumerate(lines):
            numbers = row.values(metric)
            mean = numbers.mean().item()
            axis.plot([0, mean], [height] * 2, "-", color="0.85", zorder=0)
            axis.plot(row.mean("i2t_r1"), height, "o", color="C3", mfc="none", ms=9)
            axis.plot(numbers, [height] * len(numbers), "o", color="C0", ms=5, alpha=0.8)
            axis.text(mean, height + 0.2, f"{mean:.3f}", fontsize=8,
                      ha="right" if mean > 0.8 else "left")
        axis.set_yticks(range(len(lines)), [text for text, *_ in lines] if axis is axes[0] else [])
        axis.set(xlim=(-0.04, 1.06), ylim=(-0.5, 4.6), xlabel=METRICS["mixed_i2t"][1])
        axis.set_title(f"{size}\n(higher T: {VERDICT[size][2]:g})", fontsize=9)
        axis.grid(axis="x", color="0.93")
    add_dot_legend(figure, ("mixed_i2t",))
    figure.savefig(folder / "verdict.png")


def verdict_lines(rows, model, higher):
    """(name, row, metric) of each line of a panel of the verdict, from below."""
    cua = {"unif": 1.0, "align": 1.0}
    low_clip = find(rows, temperature=0.01, **model)
    return [("CUA, higher T", find(rows, temperature=higher, **cua, **model), "mixed_i2t"),
            ("CLIP, higher T", find(rows, temperature=higher, **model), "mixed_i2t"),
            ("CUA, T = 0.01", find(rows, temperature=0.01, **cua, **model), "mixed_i2t"),
            ("the same, means subtracted", low_clip, "mixed_i2t_subtracted"),
            ("CLIP, T = 0.01", low_clip, "mixed_i2t")]


# ---- clouds ----
def snapshots_of(settings, seed):
    """{step: embeddings (2, 256, D)} of a finished run of cgap.train; None if it is not here."""
    folder = folder_of({"kind": "train", "settings": without_defaults(settings), "seed": seed})
    return cgap.load_run(folder)["snapshots"] if Path(folder, "checkpoint.pt").exists() else None


def draw_embeddings(folder, name, results):
    """The three runs in training: embeddings.png and embeddings.gif."""
    clouds = {row.label: snapshots_of(row.settings, row.records[0]["seed"])
              for row in results[name]}
    if None in clouds.values():
        print(f"{name}.png and {name}.gif are left as they are: the runs are not here")
        return
    cgap.plot_clouds(clouds, folder / "embeddings.png")
    cgap.animate(clouds, folder / "embeddings.gif")


FOUR = {"gap": "CLIP, T = 0.01,\nexact captions", "narrow": "CLIP, T = 0.02,\n20 % mismatched",
        "turned": "CUA, T = 0.02,\n20 % mismatched", "shared": "CLIP, T = 0.15,\n20 % mismatched"}
NUMBERS_BELOW = ("linear_separability", "spread", "agreement", "mixed_i2t")


def draw_clouds(folder, name, results):
    """Four runs, in the order of FOUR, seen twice: in the plane through the centre and both means,
    and in the plane of the two directions, one of images and one of captions, along which pairs
    go together most. Below are four numbers of each."""
    rows = results[name]
    ends = [snapshots_of(row.settings, row.records[0]["seed"]) for row in rows]
    if None in ends or len(rows) < len(FOUR):
        print(f"{name}.png is left as it is: its runs are not here")
        return
    figure, axes = cgap.canvas(2, len(FOUR))
    figure.set_size_inches(11.5, 7.6)
    for row, snapshots, (kind, run), (above, below) in zip(rows, ends, FOUR.items(), axes.T):
        clouds = snapshots[max(snapshots)].float()  # (2, 256, D)
        cgap.draw_clouds(above, clouds, "")
        above.set_title(f"{kind.upper()}\n{run}", fontsize=10)
        draw_in_plane(below, clouds, *leading_directions(clouds))
        numbers = [f"{METRICS[metric][0]} {row.mean(metric):.2f}" for metric in NUMBERS_BELOW]
        below.set_xlabel("\n".join(numbers), fontsize=10)
    axes[0, 0].set_ylabel("seen across the gap\n(plane of both means)")
    axes[1, 0].set_ylabel("seen along the clouds\n(main direction of each)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(folder / f"{name}.png", dpi=90)


def leading_directions(clouds):
    """Two unit vectors (D,): the direction of images and the one of captions along which they have
    the largest covariance."""
    x, y = clouds - clouds.mean(1, keepdim=True)
    u, _, vt = torch.linalg.svd(x.T @ y)
    return u[:, 0], vt[0]


def draw_in_plane(axis, clouds, a, b):
    """Images and captions (2, n, D) in the plane of two unit vectors (D,), which lie at equal
    angles to its horizontal axis, and lines between some pairs."""
    from matplotlib.collections import LineCollection
    across = F.normalize(a + b, dim=0)
    up = F.normalize(b - a, dim=0)  # at right angles to across, as both have length 1
    points = (clouds @ torch.stack([across, up], 1)).numpy()  # (2, n, 2)
    axis.add_collection(LineCollection(points[:, :100].transpose(1, 0, 2), colors="0.8", lw=0.5))
    for cloud, marker in zip(points, "o^"):
        axis.plot(*cloud.T, marker, ms=2.5)
    axis.set(aspect="equal", xlim=(-0.75, 0.75), ylim=(-0.75, 0.75), xticks=[], yticks=[])


def draw_scenes(folder):
    """Five held-out scenes with their captions, larger than the encoders see them."""
    data = cgap.load_data(cgap.Config(limit=200, image_size=96))
    words = list(data.vocab)
    figure, (axes,) = cgap.canvas(1, 5)
    figure.set_size_inches(9, 2.15)
    for axis, image, tokens in zip(axes, *data.held_out.take(slice(5))):
        axis.axis("off")
        axis.imshow(image.permute(1, 2, 0).numpy())
        caption = " ".join(words[k] for k in tokens if k)
        axis.set_title(textwrap.fill(caption, 22), fontsize=9)
    figure.savefig(folder / "scenes.png", dpi=80)
