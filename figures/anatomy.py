"""A close look at a trained model: what its loss sees of a gap, and which pairs carry the loss.

    python figures/anatomy.py runs/RUN

It prints, on 2,048 training pairs and 2,000 held-out pairs of the run:
- the mean cosines of true pairs, of other pairs, and within each modality;
- how much images vary along the line between the means, compared with an average direction;
- how far a true pair's cosine is above that of the hardest caption of its batch, in units of T,
  and what share of the loss the worst twentieth of the pairs carries;
- the length of the gradient of each term of the loss, for one batch of embeddings;
- the loss after the embeddings are made narrow or are turned, until the margin is a few T.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F

import cgap
from cgap import normalize


def print_cosines(x, y):
    """Mean cosines of unit vectors x, y (N, D)."""
    others = ~torch.eye(len(x), dtype=torch.bool)
    for name, cosines in (("true pairs", (x * y).sum(1)), ("other pairs", (x @ y.T)[others]),
                          ("two images", (x @ x.T)[others]), ("two captions", (y @ y.T)[others])):
        print(f"mean cosine of {name:14}{cosines.mean():8.2f}")


def print_variances(x, y):
    """How much images and captions vary along the line between the means."""
    line = normalize((y.mean(0) - x.mean(0))[None])[0]
    for name, z in (("images", x), ("captions", y)):
        average = z.T.cov().trace() / z.shape[1]
        share = (z @ line).var() / average
        print(f"variance of {name} along the line between the means: {share:.2f} of the average")
    directions = torch.linalg.eigvalsh(x.T.cov())
    few = (directions < 0.01 * directions.mean()).sum()
    print(f"directions along which images have less than 0.01 of the average variance: {few}")
    least = directions[0] / directions.mean()
    print(f"least variance of images along any direction: {least:.5f} of the average")


def print_leads(x, y, T, batch):
    """How a true pair compares with the hardest caption of its batch, and who carries the loss."""
    leads, losses = [], []
    for a, b in zip(x.split(batch), y.split(batch)):
        cosines = a @ b.T
        match = torch.arange(len(a))
        losses.append(F.cross_entropy(cosines / T, match, reduction="none"))
        hardest = cosines.clone().fill_diagonal_(-2).amax(1)
        leads.append((cosines.diagonal() - hardest) / T)
    leads, losses = torch.cat(leads), torch.cat(losses).sort(descending=True).values
    quantiles = torch.quantile(leads, torch.tensor([0.05, 0.25, 0.5, 0.75], dtype=leads.dtype))
    print("cosine of a true pair minus that of the hardest caption, in T; quantiles 0.05, 0.25, "
          "0.5, 0.75: " + ", ".join(f"{q:.1f}" for q in quantiles))
    print(f"share of the loss in the worst twentieth of the pairs: "
          f"{losses[:len(losses) // 20].sum() / losses.sum():.2f}")


def print_gradients(x, y, T):
    """The length of each term's gradient with respect to a batch of embeddings."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    terms = {"CLIP's loss": lambda a, b: cgap.clip_loss(a, b, T),
             "uniformity": lambda a, b: (cgap.uniformity(a, a) + cgap.uniformity(b, b)) / 2,
             "alignment": cgap.alignment}
    for name, term in terms.items():
        gradients = torch.autograd.grad(term(normalize(x), normalize(y)), (x, y))
        print(f"length of the gradient of {name:12}{torch.cat(gradients).norm():8.2f}")


@torch.no_grad()
def print_narrow_or_turned(x, y, T, batch):
    """The loss at this T after one offset for both modalities, and after a random rotation of the
    captions, each of a growing size."""
    generator = torch.Generator().manual_seed(0)
    dim = x.shape[1]
    offset = normalize(torch.randn(1, dim, dtype=x.dtype, generator=generator))
    turn = torch.randn(dim, dim, dtype=x.dtype, generator=generator) / dim ** 0.5

    def show(name, a, b):
        margin = ((a - a.mean(0)) * (b - b.mean(0))).sum(1).mean() / T
        losses = [cgap.clip_loss(p, q, T) for p, q in zip(a.split(batch), b.split(batch))]
        print(f"{name:24} margin {margin:6.1f} T   loss {torch.stack(losses).mean():7.3f}")

    for size in (0, 1, 2, 3, 4):
        show(f"one offset of length {size}", normalize(x + size * offset),
             normalize(y + size * offset))
    for size in (0.25, 0.5, 0.75, 1, 1.25):
        show(f"turned by {size:g}", x, y @ torch.matrix_exp(size * (turn - turn.T)))


def main(folder):
    model, _ = cgap.load_model(folder)
    cfg = cgap.load_run(folder)["cfg"]
    data = cgap.prepare(cgap.load_data(cfg), cfg)
    T = torch.exp(-model.log_scale).item()
    order = torch.randperm(len(data.training.images), generator=torch.Generator().manual_seed(0))
    x, y = (z.double() for z in cgap.embed(model, *data.training.take(order[:2048])))
    held_x, held_y = (z.double() for z in cgap.embed(model, *data.held_out.take(slice(2000))))
    print_cosines(held_x, held_y)
    print_variances(x, y)
    print_leads(x, y, T, cfg.batch)
    print_gradients(x[:cfg.batch], y[:cfg.batch], T)
    print("at T = 0.01, with the captions that it was trained on:")
    print_narrow_or_turned(x, y, 0.01, cfg.batch)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1])
    except cgap.UserError as error:
        sys.exit(str(error))
