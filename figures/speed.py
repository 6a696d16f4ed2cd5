"""How fast the loss is, and what memory it takes: python figures/speed.py [--device cuda]

A ratio is that of the medians of two sides that take turns in one process, so that a busy machine
slows both. Absolute times and memory are printed for GPUs only. Nothing is asserted.
"""
import argparse
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


def in_turns(rounds, device, **sides):
    """{name: median seconds} of functions that take turns, after two calls of each to warm up."""
    times = {name: [] for name in sides}
    for _, (name, side) in itertools.product(range(rounds + 2), sides.items()):
        start = time.perf_counter()
        side()
        if device == "cuda":
            torch.cuda.synchronize()
        times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[2:]) for name, seconds in times.items()}


def peak_memory(side):
    """MB that a function takes on a GPU beyond what is there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def formulas(x, y, T, unif, align, xunif):
    """The paper's loss as one writes it down, with pdist, cdist and masked_select."""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    pair = torch.arange(len(x), device=x.device)
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    logits = x @ y.T / T
    distances = torch.pdist(x), torch.pdist(y), torch.cdist(x, y).masked_select(others)
    a, b, c = (z.pow(2).mul(-2).exp().mean().log() for z in distances)
    clip = (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2
    return clip + unif * (a + b) / 2 + align * (x - y).norm(dim=1).pow(2).mean() + xunif * c


def three_lines(x, y, T):
    """CLIP's loss as one writes it down."""
    logits = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T / T
    pair = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2


def with_gradients(loss, x, y, *args):
    """A function that computes the loss and its gradients."""
    return lambda: torch.autograd.grad(loss(x, y, 0.01, *args), (x, y))


def measure(device):
    """(what, value) of each line of the table."""
    compiled = torch.compile(cgap.cgap_loss, dynamic=False)
    sizes = {"cpu": {64: 200, 1024: 15, 4096: 5}, "cuda": {64: 200, 1024: 100, 4096: 20, 16384: 5}}
    for N, rounds in sizes[device].items():
        x = torch.randn(N, 128, device=device).requires_grad_()
        y = (x.detach() + torch.randn(N, 128, device=device)).requires_grad_()
        weights = 1.0, 1.0, 1.0
        sides = {"formulas": with_gradients(formulas, x, y, *weights),
                 "cgap_loss": with_gradients(cgap.cgap_loss, x, y, *weights),
                 "compiled": with_gradients(compiled, x, y, *weights),
                 "CLIP in three lines": with_gradients(three_lines, x, y),
                 "cgap_loss, CLIP": with_gradients(cgap.cgap_loss, x, y)}
        t = in_turns(rounds, device, **sides)
        name = f"N = {N:,}"
        yield f"{name}: CUAXU, times as fast as the formulas", t["formulas"] / t["cgap_loss"]
        yield f"{name}: the same, compiled", t["formulas"] / t["compiled"]
        plain = t["cgap_loss, CLIP"] / t["CLIP in three lines"]
        yield f"{name}: CLIP, time over that of three lines", plain
        if device == "cuda":
            for side, function in sides.items():
                yield f"{name}: {side}, ms", 1000 * t[side]
                yield f"{name}: {side}, MB", peak_memory(function)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    device = parser.parse_args().device
    torch.set_num_threads(os.cpu_count())
    print("| what | measured |\n|---|---|")
    for what, value in measure(device):
        print(f"| {what} | {value:.3g} |", flush=True)
