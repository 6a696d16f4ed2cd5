"""How fast the loss is: `python figures/speed.py` prints a table, on an idle machine in some minutes.

A ratio is that of the medians of two sides that take turns in one process, so that a busy machine
slows both. Nothing is asserted.
"""
import itertools
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F

import cgap


def in_turns(rounds, **sides):
    """{name: median seconds} of functions that take turns, after one call of each to warm up."""
    times = {name: [] for name in sides}
    for _, (name, side) in itertools.product(range(rounds + 1), sides.items()):
        start = time.perf_counter()
        side()
        times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def formulas(x, y, T, unif, align, xunif):
    """The paper's loss as one writes it down, with pdist, cdist and masked_select."""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    pair, logits, others = torch.arange(len(x)), x @ y.T / T, ~torch.eye(len(x), dtype=torch.bool)
    terms = [torch.pdist(x), torch.pdist(y), torch.cdist(x, y).masked_select(others)]
    a, b, c = (z.pow(2).mul(-2).exp().mean().log() for z in terms)
    clip = (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2
    return clip + unif * (a + b) / 2 + align * (x - y).norm(dim=1).pow(2).mean() + xunif * c, {}


def of_the_loss():
    compiled = torch.compile(cgap.cgap_loss, dynamic=False)
    for N, rounds in ((64, 200), (1024, 15), (4096, 5)):
        x = torch.randn(N, 128).requires_grad_()
        y = (x.detach() + torch.randn(N, 128)).requires_grad_()
        losses = {"formulas": formulas, "eager": cgap.cgap_loss, "compiled": compiled}
        t = in_turns(rounds, **{name: lambda loss=loss: torch.autograd.grad(loss(x, y, 0.01, 1.0, 1.0, 1.0)[0], (x, y))
                                for name, loss in losses.items()})
        yield f"loss and gradients, N = {N:,}: times as fast as the formulas", t["formulas"] / t["eager"]
        yield "the same, compiled", t["formulas"] / t["compiled"]


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count())
    print("| what | measured |\n|---|---|")
    for what, value in of_the_loss():
        print(f"| {what} | {value:.3g} |", flush=True)
