"""How fast the loss is, and how much memory it takes: python figures/speed.py [--device cuda]

Several ways to compute the same loss take turns in one process, so that a busy machine slows all of
them. A ratio is that of their median times. Times in milliseconds and memory are printed for GPUs
only. This only measures: no number makes it fail.
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


def time_in_turns(rounds, device, ways):
    """{name: median seconds} of functions that take turns, after two calls of each to warm up."""
    times = {name: [] for name in ways}
    for _, (name, function) in itertools.product(range(rounds + 2), ways.items()):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[2:]) for name, seconds in times.items()}


def peak_memory(function):
    """MB that a function takes on a GPU, beyond what was taken before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def formulas(x, y, T, unif, align, xunif):
    """The paper's loss as one writes it down from its formulas, with pdist and cdist."""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    is_other = ~torch.eye(len(x), dtype=torch.bool, device=x.device)

    def spread_out(distances):
        return distances.pow(2).mul(-2).exp().mean().log()

    uniformity = (spread_out(torch.pdist(x)) + spread_out(torch.pdist(y))) / 2
    alignment = (x - y).norm(dim=1).pow(2).mean()
    cross = spread_out(torch.cdist(x, y).masked_select(is_other))
    return three_lines(x, y, T) + unif * uniformity + align * alignment + xunif * cross


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
    weights = 1.0, 1.0, 1.0  # CUAXU: of unif, align and xunif
    for N, rounds in sizes[device].items():
        x = torch.randn(N, 128, device=device).requires_grad_()
        y = (x.detach() + torch.randn(N, 128, device=device)).requires_grad_()
        ways = {"formulas": with_gradients(formulas, x, y, *weights),
                "cgap_loss": with_gradients(cgap.cgap_loss, x, y, *weights),
                "compiled": with_gradients(compiled, x, y, *weights),
                "CLIP in three lines": with_gradients(three_lines, x, y),
                "cgap_loss, CLIP": with_gradients(cgap.cgap_loss, x, y)}
        seconds, name = time_in_turns(rounds, device, ways), f"N = {N:,}"
        slowest = seconds["formulas"]
        yield f"{name}: CUAXU, times as fast as the formulas", slowest / seconds["cgap_loss"]
        yield f"{name}: the same, compiled", slowest / seconds["compiled"]
        plain = seconds["cgap_loss, CLIP"] / seconds["CLIP in three lines"]
        yield f"{name}: CLIP, its time over that of three lines", plain
        if device == "cuda":
            for way, function in ways.items():
                yield f"{name}: {way}, ms", 1000 * seconds[way]
                yield f"{name}: {way}, MB", peak_memory(function)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"],
                        help="The device to measure on. The default is cpu.")
    device = parser.parse_args().device
    torch.set_num_threads(os.cpu_count())
    print("| what | measured |\n|---|---|")
    for what, value in measure(device):
        print(f"| {what} | {value:.3g} |", flush=True)
