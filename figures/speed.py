"""How fast it is: `python figures/speed.py` prints a table, on an idle machine in some minutes.

A ratio is that of the medians of two sides that take turns in one process, so that a busy machine
slows both. Nothing is asserted.
"""
import contextlib
import io
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import torch
import torch.nn.functional as F

import cgap

SCRIPT = str(HERE.parent / "cgap.py")
TIMED = """
import sys, time
sys.path.insert(0, sys.argv[1])
import cgap
measure, spent = cgap.measure, []

def timed(*args):
    start = time.perf_counter()
    measure(*args)
    spent.append(time.perf_counter() - start)

cgap.measure = timed
cgap.main(["--unif", "1", "--align", "1", "--device", "cpu", "--out", sys.argv[2]])
print(sum(spent))
"""


def in_turns(rounds, **sides):
    """{name: median seconds} of functions that take turns, after one call of each to warm up."""
    times = {name: [] for name in sides}
    for _, (name, side) in itertools.product(range(rounds + 1), sides.items()):
        start = time.perf_counter()
        side()
        times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def wall(*argv):
    """Seconds from prompt to prompt."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *argv], check=True, capture_output=True)
    return time.perf_counter() - start


def formulas(x, y, T, *weights):
    """The paper's loss as one writes it down, with pdist, cdist and masked_select."""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    pair, logits, others = torch.arange(len(x)), x @ y.T / T, ~torch.eye(len(x), dtype=torch.bool)
    clip = (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2
    unif = sum(torch.pdist(z).pow(2).mul(-2).exp().mean().log() for z in (x, y)) / 2
    xunif = torch.cdist(x, y).masked_select(others).pow(2).mul(-2).exp().mean().log()
    return clip + weights[0] * unif + weights[1] * (x - y).norm(dim=1).pow(2).mean() + weights[2] * xunif, {}


def gradients(loss, x, y):
    return torch.autograd.grad(loss(x, y, 0.01, 1.0, 1.0, 1.0)[0], (x, y))


def of_the_loss():
    compiled = torch.compile(cgap.cgap_loss, dynamic=False)
    for N, rounds in ((64, 200), (1024, 15), (4096, 5)):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(N, 128, generator=g).requires_grad_()
        y = (x.detach() + torch.randn(N, 128, generator=g)).requires_grad_()
        t = in_turns(rounds, formulas=lambda: gradients(formulas, x, y),
                     eager=lambda: gradients(cgap.cgap_loss, x, y), compiled=lambda: gradients(compiled, x, y))
        yield f"loss and gradients, N = {N:,}: times as fast as the formulas", t["formulas"] / t["eager"]
        yield "the same, compiled", t["formulas"] / t["compiled"]


def of_a_step(steps=200):
    """train's own loop, from one batch to the next, and in turn with it the bare encoders."""
    cfg = cgap.Config(unif=1.0, align=1.0, steps=steps, eval_every=steps, checkpoint_every=steps, device="cpu")
    data, batches, loop, bare = cgap.load_data(cfg), cgap.batches, [], []
    images, texts = data.train.head(cfg.batch)
    model = cgap.TwoEncoders(cfg, len(data.vocab))
    optimizer = cgap.make_optimizer(model, cfg)

    def timed(*args):
        for rows in batches(*args):
            start = time.perf_counter()
            yield rows
            middle = time.perf_counter()
            x, y, _ = model(images, texts)
            optimizer.zero_grad()
            (x.sum() + y.sum()).backward()
            optimizer.step()
            loop.append(middle - start)
            bare.append(time.perf_counter() - middle)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(cgap, "batches", timed):
        cgap.train(cgap.replace(cfg, out=f"{folder}/run"), quiet=True)
    plain = [k for k in range(10, steps - 1) if k % (steps // 30) and (k + 1) % (steps // 30)]
    of_loop, of_bare = (statistics.median(times[k] for k in plain) for times in (loop, bare))
    yield "training step, time over that of the bare encoders and optimiser", of_loop / of_bare
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        printed = subprocess.run([sys.executable, "-c", TIMED, str(HERE.parent), f"{folder}/run"], check=True,
                                 capture_output=True, text=True).stdout
        seconds = time.perf_counter() - start
        last = json.loads(Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()[-1])
    yield "default run, prompt to prompt, s", seconds
    yield "the same over 1,500 steps of the bare encoders", seconds / (1500 * of_bare)
    yield "of that outside of training (imports, data, figures), share", 1 - last["seconds"] / seconds
    yield "of that evaluations, snapshots, checkpoints, share", float(printed.split()[-1]) / seconds


def of_the_rest():
    yield "--points with its picture, s", wall(SCRIPT, "--points", "--out", tempfile.mkdtemp())
    t = in_turns(5, help=lambda: wall(SCRIPT, "--help"), torch=lambda: wall("-c", "import torch"))
    yield "cgap.py --help, time over that of `import torch`", t["help"] / t["torch"]
    scenes = cgap.random_scenes(20_000, 0.1)
    draw = in_turns(3, draw=lambda: cgap.draw_scenes(scenes, 32))["draw"]
    yield "drawing 20,000 scenes, s", draw


def of_photographs(n=2000, coco=118_287):
    from PIL import Image
    with tempfile.TemporaryDirectory() as folder:
        noise = torch.rand(20, 3, 30, 40, generator=torch.Generator().manual_seed(0))
        for k, image in enumerate(F.interpolate(noise, (480, 640), mode="bicubic").clamp(0, 1).mul(255).byte()):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{folder}/{k}.jpg", quality=85)
        for k in range(20, n):
            shutil.copy(f"{folder}/{k % 20}.jpg", f"{folder}/{k}.jpg")
        Path(folder, "pairs.csv").write_text("image,caption\n" + "".join(f"{k}.jpg,picture {k}\n" for k in range(n)))
        cfg = cgap.Config(data=f"{folder}/pairs.csv", cache=f"{folder}/cache", device="cpu")

        def build(workers):
            with mock.patch("os.cpu_count", return_value=workers), contextlib.redirect_stderr(io.StringIO()):
                cgap.photo_data(cfg)
            shutil.rmtree(cfg.cache)

        t = in_turns(2, one=lambda: build(1), two=lambda: build(2))
        yield f"decoding {n:,} photographs, 2 workers: times as fast as 1", t["one"] / t["two"]

    with tempfile.TemporaryDirectory() as folder:  # as many files and captions as MS-COCO has, all empty
        Path(folder, "train2017").mkdir()
        Path(folder, "annotations").mkdir()
        images = [{"id": k, "file_name": f"{k:012}.jpg"} for k in range(coco)]
        for image in images:
            Path(folder, "train2017", image["file_name"]).touch()
        notes = [{"image_id": k, "caption": f"a picture of thing {j} and {k % 9000}"} for k in range(coco) for j in range(5)]
        Path(folder, "annotations/captions_train2017.json").write_text(json.dumps({"images": images, "annotations": notes}))
        command = ["-c", f"import sys; sys.path.insert(0, {str(HERE.parent)!r}); import cgap, resource, time, torch\n"
                   "cgap.load_photo = lambda path, size: torch.zeros(3, size, size, dtype=torch.uint8)\n"
                   f"cfg = cgap.Config(data={folder!r}, cache={folder + '/cache'!r}, steps=100, eval_every=1000, "
                   "checkpoint_every=1000, device='cpu', out=sys.argv[1])\n"
                   "start = time.perf_counter(); cgap.load_data(cfg); print(time.perf_counter() - start)\n"
                   "if sys.argv[1] != 'none':\n    cgap.train(cfg, quiet=True)\n"
                   "    print([l for l in open('/proc/self/status') if 'RssAnon' in l or 'RssFile' in l])"]
        subprocess.run([sys.executable, *command, "none"], check=True, capture_output=True)
        printed = subprocess.run([sys.executable, *command, f"{folder}/run"], check=True, capture_output=True, text=True)
        seconds, memory = printed.stdout.splitlines()
        start = time.perf_counter()
        for image in images:
            os.stat(f"{folder}/train2017/{image['file_name']}")
        yield f"looking at the dates of {coco:,} files alone (os.stat), s", time.perf_counter() - start
        yield "opening the cache of a data set of MS-COCO's size, s", float(seconds)
        yield "resident memory after 100 steps from it, MB", sum(int(w) for w in memory.split() if w.isdecimal()) / 1024


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count())
    torch.set_flush_denormal(True)
    print("| what | measured |\n|---|---|")
    for part in (of_the_loss, of_a_step, of_the_rest, of_photographs):
        for what, value in part():
            print(f"| {what} | {value:.3g} |", flush=True)
