"""Which temperature, and which terms, for your own encoders? Train two small heads on features that
they gave of paired images and texts, for a list of losses and temperatures, and print a table:

    python figures/heads.py IMAGES.pt TEXTS.pt
    python figures/heads.py IMAGES.pt TEXTS.pt --temperatures 0.05 0.1 learned --steps 2000

IMAGES.pt: a saved tensor (N, D), a row for each image. TEXTS.pt: (N, E), or (N, K, E) for K
captions of each image. Row i of one belongs to row i of the other. The encoders stay as they are;
each head is LayerNorm, a hidden layer and a projection. An eighth of the pairs, 1,000 at most, is
held out. A row takes half a minute on a CPU for 8,000 images.

Mixed search: in one index of images and texts, is the nearest of all the right partner? The last
columns are that after subtracting from each side the mean of training pairs.
"""
import argparse
import itertools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn

import cgap

LOSSES = {"CLIP": {}, "CUA": {"unif": 1.0, "align": 1.0}}
SHOWN = ("linear_separability", "spread", "overlap", "best_temperature", "i2t_r1", "t2i_r1",
         "mixed_i2t", "mixed_t2i", "mixed_i2t_subtracted", "mixed_t2i_subtracted")


class Head(nn.Module):
    """Features (B, inputs) to embeddings (B, dim)."""
    def __init__(self, inputs, dim):
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, 512), nn.GELU())
        self.projection = nn.Linear(512, dim)

    def forward(self, features):
        return self.projection(self.body(features.float()))


class Heads(nn.Module):
    """A head for images, one for texts, and a temperature: what cgap.train asks of a model."""
    def __init__(self, cfg, data):
        super().__init__()
        self.image = Head(data.train.images.shape[-1], cfg.dim)
        self.text = Head(data.train.texts.shape[-1], cfg.dim)
        self.log_scale = nn.Parameter(-torch.tensor(cfg.temperature).log(),
                                      requires_grad=cfg.learn_temperature)

    def forward(self, images, texts):
        return self.image(images), self.text(texts), torch.exp(-self.log_scale)


def load_features(images, texts):
    """The cgap.Data of two files of features."""
    images, texts = (torch.load(file, weights_only=True) for file in (images, texts))
    texts = texts[:, None] if texts.ndim == 2 else texts
    if images.ndim != 2 or texts.ndim != 3 or len(images) != len(texts):
        raise cgap.UserError("features must be (N, D) of images and (N, E) or (N, K, E) of texts, "
                             f"not {(*images.shape,)} and {(*texts.shape,)}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out = min(1000, len(images) // 8)
    train, val = (cgap.Pairs(images[i], texts[i]) for i in (order[held_out:], order[:held_out]))
    return cgap.Data(train, val, None, None)


@torch.no_grad()
def search_without_means(model, data):
    """Mixed search once the mean of training pairs is subtracted on each side."""
    sides = []
    for encoder, k in ((model.image, 0), (model.text, 1)):
        mean = cgap.unit(cgap.encode(encoder, data.train.batch(slice(4000))[k])).mean(0)
        sides.append(cgap.unit(cgap.encode(encoder, data.val.batch(slice(5000))[k])) - mean)
    group = None if data.val.group is None else data.val.group[:5000, 0]
    names = ("mixed_i2t_subtracted", "mixed_t2i_subtracted")
    return dict(zip(names, cgap.mixed_recall(*sides, group)))


def train_heads(data, out, **settings):
    """The history of cgap.train of two heads; its last record also has search_without_means."""
    cfg = cgap.Config(**{"steps": 1000, "batch": 256, "eval_every": 10 ** 6, **settings}, out=out)
    torch.manual_seed(cfg.seed)
    model = Heads(cfg, data)
    history = cgap.train(cfg, model=model, data=data, quiet=True)
    history[-1] |= search_without_means(model, data)
    return history


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="a saved tensor (N, D)")
    parser.add_argument("texts", help="a saved tensor (N, E) or (N, K, E)")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--temperatures", nargs="+", default=["0.01", "0.05", "0.1", "0.2"],
                        help="numbers, or learned")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    try:
        data = load_features(args.images, args.texts)
        print("|loss|" + "|".join(name.replace("_", " ") for name in SHOWN) + "|")
        print("|---" * (len(SHOWN) + 1) + "|")
        for loss, T in itertools.product(args.losses, args.temperatures):
            learned = {"temperature": 0.07, "learn_temperature": True}
            settings = LOSSES[loss] | (learned if T == "learned" else {"temperature": float(T)})
            with tempfile.TemporaryDirectory() as folder:
                history = train_heads(data, f"{folder}/run", steps=args.steps, batch=args.batch,
                                      seed=args.seed, device=args.device, **settings)
            cells = [f"{history[-1][name]:.3f}" for name in SHOWN]
            print(f"|{loss}, T {T}|" + "|".join(cells) + "|", flush=True)
    except (cgap.UserError, OSError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
