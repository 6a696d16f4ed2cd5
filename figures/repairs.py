"""What can be done for a model that is already trained, and how its loss sees a gap.

    python figures/repairs.py runs/RUN ...      # print the repairs of runs, and draw the rotation

`repair_all` measures repairs of a model: subtracting means, rotating captions onto images, linear
layers on its embeddings, and fine-tuning at a higher temperature. Every repair is fitted to
training pairs, with their share of mismatched captions, and measured on held-out pairs.
`landscape` gives the loss of a model while its two clouds are moved together or apart by hand.
"""
import copy
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

import cgap
import heads
import pictures
from cgap import normalize

DISTANCES = [k / 20 for k in range(29)]  # 0 to 1.4
PAIRS = (100, 200, 500, 1000, 4000, 20_000)  # that a closed form is fitted to


# ---- the loss against the distance of the means ----
def move_apart(x, y, g):
    """Unit vectors x, y (N, D), shifted in opposite directions along the line between their means
    and normalised again, until their means are g apart along this line."""
    line = normalize((y.mean(0) - x.mean(0))[None])[0]

    def shifted(s):
        return normalize(x - s / 2 * line), normalize(y + s / 2 * line)

    low, high = -4.0, 40.0
    for _ in range(60):  # bisection: the distance grows with the shift
        middle = (low + high) / 2
        a, b = shifted(middle)
        low, high = (low, middle) if (b.mean(0) - a.mean(0)) @ line > g else (middle, high)
    return shifted(middle)


@torch.no_grad()
def mean_loss(x, y, T, batch):
    """CLIP's loss of unit vectors, the mean over batches."""
    losses = [cgap.clip_loss(a, b, T) for a, b in zip(x.split(batch), y.split(batch))]
    return torch.stack(losses[:len(x) // batch]).mean().item()


@torch.no_grad()
def landscape(model, data, cfg):
    """[{set, trained_g, g, loss}]: CLIP's loss at the model's temperature, on 2,048 training and on
    2,000 held-out pairs, as the means of both modalities are moved until they are g apart."""
    T = torch.exp(-model.log_scale).item()
    rows = []
    for name, pairs in (("training", data.training), ("held-out", data.held_out)):
        order = torch.randperm(len(pairs.images), generator=torch.Generator().manual_seed(0))
        x, y = (z.double() for z in cgap.embed(model, *pairs.take(order[:2048])))
        trained = (x.mean(0) - y.mean(0)).norm().item()
        rows.append({"set": name, "trained_g": trained, "g": trained,
                     "loss": mean_loss(x, y, T, cfg.batch)})
        for g in DISTANCES:
            loss = mean_loss(*move_apart(x, y, g), T, cfg.batch)
            rows.append({"set": name, "trained_g": trained, "g": g, "loss": loss})
    return rows


# ---- repairs in closed form: functions of the pairs they are fitted to and of those to repair ----
def subtract_means(fit_x, fit_y, x, y):
    """Subtract from each modality its mean over the pairs of the fit."""
    return x - fit_x.mean(0), y - fit_y.mean(0)


def rotate(fit_x, fit_y, x, y):
    """Turn the captions onto the images by one orthogonal matrix."""
    return x, y @ cgap.rotation(fit_x, fit_y)


def subtract_means_and_rotate(fit_x, fit_y, x, y):
    """Subtract the means, then turn."""
    x, y = subtract_means(fit_x, fit_y, x, y)
    return rotate(*subtract_means(fit_x, fit_y, fit_x, fit_y), x, y)


def rotate_by_shuffled_pairs(fit_x, fit_y, x, y):
    """A control: a rotation that is fitted to pairs of other images and captions."""
    order = torch.randperm(len(fit_x), generator=torch.Generator().manual_seed(0))
    return rotate(fit_x, fit_y[order], x, y)


def least_squares(fit_x, fit_y, x, y, ridge=0.01):
    """Map the captions to the images by the matrix W that minimises |x - y W|^2 + a ridge. The
    ridge is a share of the captions' mean variance."""
    gram = fit_y.T @ fit_y
    shrink = ridge * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
    return x, y @ torch.linalg.solve(gram + shrink, fit_y.T @ fit_x)


def correlate(fit_x, fit_y, x, y, shrinkage=0.1):
    """Canonical correlation analysis with shrunken covariances: both modalities are whitened, and
    their common directions weighed by their correlation."""
    a, b = fit_x - fit_x.mean(0), fit_y - fit_y.mean(0)

    def whitener(z):
        cov = z.T @ z / len(z)
        cov = (1 - shrinkage) * cov + shrinkage * cov.trace() / len(cov) * torch.eye(
            len(cov), dtype=cov.dtype)
        values, vectors = torch.linalg.eigh(cov)
        return vectors / values.sqrt() @ vectors.T

    wx, wy = whitener(a), whitener(b)
    u, s, vt = torch.linalg.svd(wx @ (a.T @ b / len(a)) @ wy)
    weight = s.clamp(0, 1).sqrt()
    return (x - fit_x.mean(0)) @ wx @ u * weight, (y - fit_y.mean(0)) @ wy @ vt.T * weight


def turn_means(fit_x, fit_y, x, y):
    """A control: the smallest rotation that turns the captions' mean onto the images' mean."""
    a, b = normalize(torch.stack([fit_y.mean(0), fit_x.mean(0)]))
    plane = b[:, None] * a - a[:, None] * b  # antisymmetric
    turn = torch.eye(len(a), dtype=a.dtype) + plane + plane @ plane / (1 + a @ b)
    return x, y @ turn.T


CLOSED_FORMS = {"means subtracted": (subtract_means, (64, *PAIRS)),
                "rotated": (rotate, PAIRS),
                "only the means rotated": (turn_means, (1000, 20_000)),
                "means subtracted, then rotated": (subtract_means_and_rotate, PAIRS),
                "rotated by shuffled pairs": (rotate_by_shuffled_pairs, (1000, 20_000)),
                "least squares": (least_squares, (1000, 20_000)),
                "canonical correlations": (correlate, (1000, 20_000))}


# ---- repairs that train ----
def train_in_temporary_folder(cfg, model, data):
    """Train a model in place."""
    with tempfile.TemporaryDirectory() as folder:
        cgap.train(replace(cfg, eval_every=10 ** 6, out=f"{folder}/run"), model=model, data=data,
                   quiet=True)


def linear_layers(fit_x, fit_y, x, y, temperature, cfg):
    """Train a linear layer for each modality on saved embeddings, 400 steps of 256."""
    pairs = cgap.Pairs(fit_x.float(), fit_y.float()[:, None])
    held_out = cgap.Pairs(x.float(), y.float()[:, None])
    settings = replace(cfg, limit=0, mismatch=0.0, same_modality=False, remove_gap=False,
                       center=False, unif=0.0, align=0.0, learn_temperature=False,
                       temperature=temperature, steps=400, lr=1e-3,
                       batch=min(256, len(fit_x)))
    model = heads.Heads(settings, cgap.Data(pairs, held_out), linear=True)
    train_in_temporary_folder(settings, model, cgap.Data(pairs, held_out))
    with torch.no_grad():
        return model.image(x.float()), model.text(y.float())


def fine_tune(model, data, cfg, temperature, share):
    """A copy of the model, all of it trained on for a share of its steps at another temperature.
    data: as cgap.load_data gives them, not yet prepared."""
    model = copy.deepcopy(model)
    model.log_scale.data.fill_(-torch.tensor(temperature).log())
    settings = replace(cfg, steps=round(share * cfg.steps), temperature=temperature,
                       remove_gap=False)
    train_in_temporary_folder(settings, model, data)
    return model


# ---- all of them ----
def measure(x, y, group):
    """gap_metrics and search of held-out pairs."""
    return cgap.gap_metrics(x, y) | cgap.search(x, y, group)


def higher_temperature(cfg):
    """The temperature that served mixed search best for such a share of mismatched captions."""
    return 0.1 if cfg.mismatch < 0.02 else 0.15 if cfg.mismatch < 0.4 else 0.2


@torch.no_grad()
def embed_pairs(model, data):
    """Unit embeddings in float64 of 20,000 training pairs in random order and of held-out pairs."""
    order = torch.randperm(len(data.training.images), generator=torch.Generator().manual_seed(0))
    parts = [*cgap.embed(model, *data.training.take(order[:20_000])),
             *cgap.embed(model, *data.held_out.take(slice(5000)))]
    return [part.double() for part in parts]


def repair_all(model, data, cfg, temperature=None, layers=(500, 2000), shares=(0.05, 0.1, 0.2)):
    """{repair: record}, a record being gap_metrics, search, the number of `pairs` that the repair
    has seen, and the `seconds` that it took. model: a trained one; data, cfg: what it was trained
    with. temperature: that of the repairs which train. layers: the numbers of pairs that linear
    layers see. shares: of the model's steps, for fine-tuning."""
    temperature = temperature or higher_temperature(cfg)
    prepared = cgap.prepare(data, cfg)
    group = None if prepared.group is None else prepared.group[:5000]
    fit_x, fit_y, x, y = embed_pairs(model, prepared)
    records = {"as it is": measure(x, y, group) | {"pairs": 0, "seconds": 0.0}}

    def note(name, pairs, repair):
        began = time.perf_counter()
        repaired = repair()
        seconds = time.perf_counter() - began
        records[name] = measure(*repaired, group) | {"pairs": pairs, "seconds": seconds}

    for name, (repair, numbers) in CLOSED_FORMS.items():
        for n in sorted({min(n, len(fit_x)) for n in numbers}):
            note(f"{name}, {n:,} pairs", n, lambda: repair(fit_x[:n], fit_y[:n], x, y))
    for T, n in [(temperature / 3, layers[-1]), *((temperature, n) for n in layers)]:
        note(f"linear layers at T = {T:.2g}, {n:,} pairs", n,
             lambda: linear_layers(fit_x[:n], fit_y[:n], x, y, T, cfg))
    for share in shares:
        def tuned():
            new = fine_tune(model, data, cfg, temperature, share)
            return cgap.embed(new, *prepared.held_out.take(slice(5000)))
        note(f"fine-tuned at T = {temperature:g} for {share:.0%} of the steps",
             round(share * cfg.steps) * cfg.batch, tuned)
    return records


def draw_turned(runs, path):
    """For each of {name: (model, data, cfg)} the held-out clouds as trained, and with the captions
    rotated by a fit to 1,000 training pairs, both seen in the plane of the two directions in which
    images and captions vary together most."""
    figure, axes = cgap.canvas(len(runs), 2, 4)
    for (before, after), (name, (model, data, cfg)) in zip(axes, runs.items()):
        fit_x, fit_y, x, y = embed_pairs(model, cgap.prepare(data, cfg))
        x, y = x[:256], y[:256]
        plane = pictures.leading_directions(torch.stack([x, y]))
        _, turned = rotate(fit_x[:1000], fit_y[:1000], x, y)
        for axis, captions, title in ((before, y, "as trained"), (after, turned, "rotated")):
            pictures.draw_in_plane(axis, torch.stack([x, captions]), *plane)
            axis.set_title(title)
        before.set_ylabel(name)
    figure.savefig(path, dpi=80)


def main(folders):
    shown = ("linear_separability", "agreement", "overlap", "i2t_r1", "mixed_i2t", "mixed_t2i")
    runs = {}
    for folder in folders:
        model, _ = cgap.load_model(folder)
        cfg = cgap.load_run(folder)["cfg"]
        data = cgap.load_data(cfg)
        name = f"{cfg.name()}, T = {cfg.temperature:g}, {cfg.mismatch:.0%} mismatched"
        runs[f"{name} ({folder})" if name in runs else name] = model, data, cfg
    draw_turned(runs, Path(folders[0], "turned.png"))
    for name, run in runs.items():
        print(f"{name:52}", *shown)
        for repair, record in repair_all(*run).items():
            print(f"{repair:52}", *(f"{record[metric]:{len(metric)}.3f}" for metric in shown))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1:])
    except cgap.UserError as error:
        sys.exit(str(error))
