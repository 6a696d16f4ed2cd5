"""Which temperature, and which loss, for encoders of your own? This measures what they gave of
paired images and captions, trains two small heads on it for a list of losses and temperatures,
and prints a table:

    python figures/heads.py IMAGES.pt TEXTS.pt
    python figures/heads.py IMAGES.npy TEXTS.npy --temperatures 0.05 0.1 learned --steps 2000
    python figures/heads.py IMAGES.pt TEXTS.pt --linear      # embeddings of one space, as of CLIP

IMAGES holds a tensor or array (N, D) with one row for each image. TEXTS holds (N, E), or (N, K, E)
for K captions of each image. Row i of one belongs to row i of the other. Both may be .pt files of
torch.save or .npy files, float16 too. An eighth of the pairs, at most 1,000, is held out. The
encoders are not changed. A row of the table takes half a minute on a CPU for 8,000 images.

The first three rows train nothing. They are printed if both files have the same number of columns,
so that the rows may be embeddings of one space. They measure the embeddings as they are; with the
mean of the training pairs subtracted from each modality; and with the captions rotated onto the
images by the orthogonal matrix that fits the training pairs best. The other rows train a head for
each modality. A head is LayerNorm, a hidden layer and a projection. With --linear it is one linear
layer, which starts as the identity.

Mixed search is R@1 in one index of all images and captions. The column "best T" is the temperature
at which held-out pairs have the least CLIP loss, once means are subtracted.
"""
import argparse
import itertools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from torch import nn

import cgap

LOSSES = {"CLIP": {}, "CUA": {"unif": 1.0, "align": 1.0}}
COLUMNS = {"linear_separability": "separability", "spread": "spread", "overlap": "overlap",
           "best_T": "best T", "i2t_r1": "R@1", "t2i_r1": "R@1, caption to image",
           "mixed_i2t": "mixed search", "mixed_t2i": "mixed search, caption to image",
           "mixed_i2t_subtracted": "mixed search, means subtracted",
           "mixed_t2i_subtracted": "the same, caption to image"}


# ---- two heads ----
class Head(nn.Module):
    """Features (B, inputs) to raw embeddings (B, dim)."""

    def __init__(self, inputs, dim):
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, 512), nn.GELU())
        self.projection = nn.Linear(512, dim)

    def forward(self, features):
        return self.projection(self.body(features.float()))


class LinearHead(nn.Module):
    """Embeddings (B, dim), scaled to length 1, to raw embeddings (B, dim); first the identity."""

    def __init__(self, dim):
        super().__init__()
        self.projection = nn.Linear(dim, dim)
        nn.init.eye_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, embeddings):
        return self.projection(cgap.normalize(embeddings.float()))


class Heads(nn.Module):
    """A head for images, one for captions, and a temperature: what cgap.train asks of a model."""

    def __init__(self, cfg, data, linear=False):
        super().__init__()
        inputs = data.training.images.shape[-1], data.training.texts.shape[-1]
        if linear and inputs[0] != inputs[1]:
            raise cgap.UserError("--linear is for embeddings of one space, but those of images "
                                 f"have {inputs[0]} columns and those of captions {inputs[1]}")
        self.image, self.text = (LinearHead(n) if linear else Head(n, cfg.dim) for n in inputs)
        # What is learned is log(1 / T), as in cgap.TwoEncoders.
        self.log_scale = nn.Parameter(-torch.tensor(cfg.temperature).log(),
                                      requires_grad=cfg.learn_temperature)

    def forward(self, images, texts):
        return self.image(images), self.text(texts), torch.exp(-self.log_scale)


def train_heads(data, out, linear=False, **settings):
    """Train two heads with cgap.train into the folder `out`. Returns the history; its last record
    also has search_without_means and best_T."""
    cfg = cgap.Config(**{"steps": 1000, "batch": 256, "eval_every": 10 ** 6, **settings}, out=out)
    torch.manual_seed(cfg.seed)
    model = Heads(cfg, data, linear)
    history = cgap.train(cfg, model=model, data=data, quiet=True)
    history[-1] |= measure_further(model, data)
    return history


def load_heads(folder, data):
    """The Heads of a run of train_heads, and its cgap.Config."""
    run = cgap.load_run(folder)
    model = Heads(run["cfg"], data)
    model.load_state_dict(run["model"])
    return model, run["cfg"]


# ---- measures ----
@torch.no_grad()
def best_temperature(x, y, batch=64):
    """The T from 0.005 to 1, in steps of 12 %, at which the CLIP loss of held-out pairs x, y (N, D)
    in batches is least, once means are subtracted. If a share of the held-out captions is
    mismatched as in training, it says at which T the softmax is calibrated. Of temperatures with
    an equal loss it is the lowest. Source: Guo et al., arXiv 1706.04599."""
    x, y = cgap.unit_pairs(x.double(), y.double())
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    x, y = cgap.normalize(x[order], center=True), cgap.normalize(y[order], center=True)
    batch = min(batch, len(x))
    whole = len(x) // batch * batch  # pairs in whole batches
    best, least = None, float("inf")
    for k in range(46, -1, -1):  # from the lowest T to the highest
        T = 10 ** (-k / 20)
        loss = 0.0
        for some_x, some_y in zip(x[:whole].split(batch), y[:whole].split(batch)):
            loss += cgap.clip_loss(some_x, some_y, T).item()
        if loss < least * (1 - 1e-9):  # a smaller difference is one of rounding
            best, least = T, loss
    return best


def embed_both(model, data):
    """Unit embeddings of 4,000 training pairs and of 5,000 held-out pairs, at most of each."""
    training = cgap.embed(model, *data.training.take(slice(4000)))
    held_out = cgap.embed(model, *data.held_out.take(slice(5000)))
    return training, held_out


def search_without_means(training, held_out, group=None):
    """cgap.search of held-out pairs once the means of training pairs are subtracted; both are pairs
    of unit embeddings (N, D). The names of its metrics end in `_subtracted`."""
    x, y = (z - means.mean(0) for z, means in zip(held_out, training))
    found = cgap.search(x, y, group)
    return {f"{name}_subtracted": value for name, value in found.items() if "mixed" in name}


def measure_further(model, data):
    """What cgap.evaluate does not measure: search_without_means and best_temperature."""
    training, held_out = embed_both(model, data)
    group = None if data.group is None else data.group[:5000]
    return search_without_means(training, held_out, group) | {"best_T": best_temperature(*held_out)}


def measure_as_they_are(data):
    """{what is done to the embeddings: metrics of held-out pairs}, without training anything."""
    x, y = (cgap.normalize(z.float()) for z in data.training.take(slice(None)))
    held_out = [cgap.normalize(z.float()) for z in data.held_out.take(slice(None))]
    means = x.mean(0), y.mean(0)
    ways = {"as they are": held_out,
            "means subtracted": [z - mean for z, mean in zip(held_out, means)],
            "rotated": [held_out[0], held_out[1] @ cgap.rotation(x, y)]}
    return {name: cgap.gap_metrics(*pair) | cgap.search(*pair) | {"best_T": best_temperature(*pair)}
            for name, pair in ways.items()}


# ---- files ----
def read_tensor(file):
    """The tensor or array in a .pt or .npy file, on the CPU. Raises UserError if it is none."""
    try:
        if str(file).endswith(".npy"):
            content = np.load(file, allow_pickle=False)
        else:
            content = torch.load(file, weights_only=True, map_location="cpu")
    except OSError:
        raise  # its own message names the file
    except Exception as error:  # whatever a foreign file may raise
        raise cgap.UserError(f"{file} is neither a .npy file nor a tensor that torch.save wrote "
                             f"({type(error).__name__})") from None
    if not isinstance(content, (torch.Tensor, np.ndarray)):
        raise cgap.UserError(f"{file} holds a {type(content).__name__}, but a tensor is needed, "
                             "with a row for each image: save that alone")
    try:
        return torch.as_tensor(content).detach().float()
    except TypeError:
        raise cgap.UserError(f"{file} holds no numbers, but {content.dtype}") from None


def check_rows(file, rows):
    """Raise UserError if a row of features (N, ...) is zero or not finite: it has no direction."""
    largest = rows.abs().amax(-1)  # (N,) or (N, K)
    bad = ((largest == 0) | ~largest.isfinite()).reshape(len(rows), -1).any(1).nonzero()
    if len(bad):
        raise cgap.UserError(f"{file}: row {bad[0].item()} is zero or not finite, as {len(bad)} of "
                             f"{len(rows)} rows are: leave them out of both files")


def load_features(image_file, text_file):
    """The cgap.Data of two files of features. Raises UserError for what they may not hold."""
    images, texts = read_tensor(image_file), read_tensor(text_file)
    texts = texts[:, None] if texts.ndim == 2 else texts  # (N, K, E)
    if images.ndim != 2 or texts.ndim != 3:
        raise cgap.UserError(f"{image_file} must be (N, D), and it is {tuple(images.shape)}; "
                             f"{text_file} must be (N, E) or (N, K, E), and it is "
                             f"{tuple(texts.shape)}")
    if len(images) != len(texts):
        raise cgap.UserError(f"{image_file} has {len(images)} rows, but {text_file} has "
                             f"{len(texts)}: there must be one for each pair")
    if len(images) < 40:
        raise cgap.UserError(f"{image_file} has {len(images)} rows, but 40 are needed: an eighth "
                             "is held out, and five pairs are the fewest to measure")
    check_rows(image_file, images)
    check_rows(text_file, texts)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    count = min(1000, len(images) // 8)
    held_out, training = order[:count], order[count:]
    return cgap.Data(cgap.Pairs(images[training], texts[training]),
                     cgap.Pairs(images[held_out], texts[held_out]))


# ---- the command line ----
def print_row(name, metrics):
    """Print a line of the table; metrics that were not measured are left empty."""
    cells = [f"{metrics[column]:.3f}" if column in metrics else "" for column in COLUMNS]
    print(f"|{name}|" + "|".join(cells) + "|", flush=True)


def print_table(args):
    """Print the table that the command line asks for."""
    data = load_features(args.images, args.texts)
    print("| |" + "|".join(COLUMNS.values()) + "|\n" + "|---" * (len(COLUMNS) + 1) + "|")
    if data.training.images.shape[-1] == data.training.texts.shape[-1]:
        for name, metrics in measure_as_they_are(data).items():
            print_row(name, metrics)
    for loss, T in itertools.product(args.losses, args.temperatures):
        learned = {"temperature": 0.07, "learn_temperature": True}
        settings = LOSSES[loss] | (learned if T == "learned" else {"temperature": T})
        with tempfile.TemporaryDirectory() as folder:
            history = train_heads(data, f"{folder}/run", args.linear, steps=args.steps,
                                  batch=args.batch, seed=args.seed, device=args.device, **settings)
        name = "T learned" if T == "learned" else f"T = {T:g}"
        print_row(f"{loss}, {name}", history[-1])


def temperature(text):
    """A number, or the word learned."""
    return text if text == "learned" else float(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="The file of images, (N, D).")
    parser.add_argument("texts", help="The file of captions, (N, E) or (N, K, E).")
    parser.add_argument("--linear", action="store_true",
                        help="Train linear layers on embeddings that already share a space.")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES),
                        help="The losses to train with. The default is both.")
    parser.add_argument("--temperatures", nargs="+", type=temperature,
                        default=[0.01, 0.05, 0.1, 0.2], metavar="T",
                        help="Temperatures, or the word learned. The default is 0.01 0.05 0.1 0.2.")
    parser.add_argument("--steps", type=int, default=1000,
                        help="Training steps of each row. The default is 1000.")
    parser.add_argument("--batch", type=int, default=256,
                        help="Pairs in a batch. The default is 256.")
    parser.add_argument("--seed", type=int, default=0,
                        help="The seed of weights and batches. The default is 0.")
    parser.add_argument("--device", default="auto", help="The device, as cgap.py's.")
    try:
        print_table(parser.parse_args())
    except (cgap.UserError, OSError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
