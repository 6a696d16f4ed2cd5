"""What a run's cosines are, and how many pairs a mean takes: python figures/means.py runs/RUN

Prints the mean cosine of pairs, of strangers across, and within each side, on held-out pairs; and
mixed search there once the mean of so many training pairs is subtracted from each side.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

import cgap


def embed(model, batch):
    """Unit embeddings (N, D) of images and of texts."""
    encoders = model.image, model.text
    return [cgap.unit(cgap.encode(encoder, z)) for encoder, z in zip(encoders, batch)]


def main(folder):
    model, _ = cgap.load_model(folder)
    data = cgap.load_data(cgap.load_run(folder)["cfg"])
    x, y = embed(model, data.val.batch(slice(2000)))
    group = data.val.group[:2000, 0]
    others = ~torch.eye(len(x), dtype=torch.bool)
    cosines = {"pairs": (x * y).sum(1), "strangers": (x @ y.T)[others],
               "images": (x @ x.T)[others], "texts": (y @ y.T)[others]}
    for name, values in cosines.items():
        print(f"mean cosine of {name:10}{values.mean():6.2f}")
    train_x, train_y = embed(model, data.train.batch(slice(4096)))
    print("pairs in the mean   mixed search, image asks, text asks")
    for n in (0, 4, 16, 64, 256, 1024, 4096):
        mean_x, mean_y = (z[:n].sum(0) / max(n, 1) for z in (train_x, train_y))
        found = cgap.mixed_recall(x - mean_x, y - mean_y, group)
        print(f"{n:17}   {found[0]:.3f}, {found[1]:.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1])
    except cgap.UserError as error:
        sys.exit(str(error))
