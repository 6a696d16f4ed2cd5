# SPDX-License-Identifier: MIT
"""Tests of cgap.py: `python -m pytest -q`. First closed forms and slow independent references for
every loss and metric, then the parts of a run one by one, then the real script as a user runs it.
"""
import csv
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import fields, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads that share so little work only wait for each other
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import cgap
from cgap import Config, Data, Pairs, UserError, cgap_loss, gap_metrics, search

GAP = ("linear_separability linear_separability_c100 centroid_distance unif align xunif margin "
       "spread agreement overlap").split()
SEARCHES = "i2t_r1 mixed_i2t t2i_r1 mixed_t2i".split()
TASKS = "zero_shot zero_shot_unseen arithmetic_attribute arithmetic_relation".split()
RECORD = ["step", "train_loss", "temperature", *GAP, *SEARCHES, *TASKS]
PATIENCE = 300  # seconds at most, for what takes a few on an idle machine

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PROCESSES = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":  # forks one that has imported torch: saves seconds
    PROCESSES.set_forkserver_preload(["cgap", "torch._dynamo"])

IS_OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
fake_cuda = pytest.mark.skipif(not torch.backends.cuda.is_built(),
                               reason="a PyTorch without CUDA has no fake of it")

# -- Helpers ---------------------------------------------------------------------------------------
def cases(names, values):
    """pytest.mark.parametrize over {id: value}."""
    return pytest.mark.parametrize(names, list(values.values()), ids=list(values))

# Embeddings and models:
def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def make_clouds(N, D, apart):
    """Two clouds of pairs, `apart` along the first axis."""
    x = draw(N, D)
    shift = apart / 2 * F.one_hot(torch.tensor(0), D)
    return x - shift, x + draw(N, D, seed=1) + shift

def make_directions(N, D, apart):
    return [F.normalize(z, dim=1) for z in make_clouds(N, D, apart)]

def with_gradients(loss, x, y, T, *weights):
    """[the loss, its gradients for x, y and T] as float64."""
    inputs = [z.detach().clone().requires_grad_() for z in (x, y, torch.tensor(T, dtype=x.dtype))]
    value = loss(*inputs, *weights)
    gradients = torch.autograd.grad(value, inputs)
    return [z.detach().double() for z in (value, *gradients)]

def assert_close(got, expected, tolerance):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)

def make_encoders(**settings):
    torch.manual_seed(0)
    return cgap.TwoEncoders(Config(dim=8, **settings), vocab=20)

def make_inputs(n):
    """n images and n texts of six words."""
    images = torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8)
    return images, torch.randint(1, 20, (n, 6), dtype=torch.int32)

class OwnEncoder(nn.Module):
    """One whose result depends on whether it is in train mode."""
    def __init__(self, width, dim):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))
        self.projection = nn.Linear(16, dim)
    def forward(self, rows):
        return self.projection(self.body(rows))

class OwnModel(nn.Module):
    """A model as a user may hand it to cgap.train."""
    def __init__(self, temperature=0.14):
        super().__init__()
        self.image, self.text = OwnEncoder(6, 8), OwnEncoder(4, 8)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
    def forward(self, images, texts):
        return self.image(images), self.text(texts), torch.exp(-self.log_scale)

def own_data(n=40):
    def pairs(seed):
        return Pairs(draw(n, 6, seed=seed).float(), draw(n, 2, 4, seed=seed).float())
    return Data(pairs(0), pairs(1))

# Photographs:
def words(row, vocab):
    """The caption that a row of tokens stands for."""
    return " ".join(list(vocab)[k] for k in row if k)

def write_photos(folder, n):
    """Write n pictures, each of a mean shade out of six: [(name, caption that ends with it)], one
    to three captions each."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = []
    for k in range(n):
        shade = 40 * (k % 6) + 20
        image = Image.new("L", (8, 8), shade - 10)
        image.paste(shade + 10, (0, 4, 8, 8))
        image.save(folder / f"{k}.bmp")
        pairs += [(f"{k}.bmp", f"{'very ' * j}shade {shade}") for j in range(k % 3 + 1)]
    return pairs

def write_csv(pairs=None, n=60, more=()):
    """pairs.csv with these (picture, caption), or with n pictures of six shades; and more."""
    pairs = pairs or [(f"photos/{name}", text) for name, text in write_photos(Path("photos"), n)]
    with open("pairs.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("image", "caption"), *pairs, *more])

def read_csv():
    with open("pairs.csv", newline="", encoding="utf-8-sig") as file:
        return [*csv.reader(file)][1:]

def write_coco(**splits):
    """A folder with so many images in each split; returns the last one's annotations."""
    for split, n in splits.items():
        pairs = write_photos(Path("coco", split), n)
        content = {"images": [{"id": f"id {k}.bmp", "file_name": f"{k}.bmp"} for k in range(n)],
                   "annotations": [{"image_id": f"id {name}", "caption": text}
                                   for name, text in pairs]}
        file = Path(f"coco/annotations/captions_{split}.json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return file

def load(source, **settings):
    return cgap.load_data(Config(data=str(source), batch=4, image_size=8, **settings))

def assert_captions_fit(data, *sizes):
    """So many images, and each, known by its shade, has its own captions and no others."""
    seen = set()
    for pairs, n in zip((data.training, data.held_out), sizes, strict=True):
        assert len(pairs.images) == n
        for epoch in range(5):
            images, tokens = pairs.take(slice(None), epoch)
            captions = [words(row, data.vocab) for row in tokens]
            shades = images.float().mean((1, 2, 3)).tolist()
            assert [int(text.split()[-1]) for text in captions] == shades
            seen |= set(captions)
    assert len(seen) == 12  # of the six shades two have one caption, two have two, two have three

def warnings_of(captured):
    lines = captured.readouterr().err.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith("warning")]

# Runs:
RUN = dict(limit=200, batch=12, steps=16, dim=8, image_size=8, unif=1.0, align=1.0, xunif=1.0,
           center=True, temperature=0.07, learn_temperature=True, eval_every=2, device="cpu")
ONE_STEP = RUN | dict(steps=1, limit=24)
OWN = dict(steps=4, eval_every=2, batch=10, device="cpu")  # with OwnModel
FIGURES = {"gap.png", "embeddings.png", "embeddings.gif"}

def flags(**settings):
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in settings.items()]

def records(run):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]

def assert_figures(folder):
    for name in FIGURES:
        with Image.open(folder / name) as image:
            darkest, brightest = image.convert("L").getextrema()
            assert darkest < 100 < brightest and (name != "embeddings.gif" or image.n_frames > 2)

def tree():
    """{path: bytes} of all that lies in the current folder."""
    return {path: path.is_file() and path.read_bytes() for path in Path(".").rglob("*")}

def refused(capsys, argv, *named):
    """Exit status 2, one line of error, returned, that names what is wrong, nothing written."""
    before = tree()
    with pytest.raises(SystemExit) as end:
        cgap.main(argv)
    error = capsys.readouterr().err
    error = re.sub(r"(?m)^warning.*$|[^\r\n]*(%\||it/s)[^\r\n]*|\r", "", error).strip()
    assert end.value.code == 2 and error.startswith("cgap.py: error: "), error
    assert len(error.splitlines()) == 1 and all(name in error for name in named), error
    assert tree() == before
    return error

def torchrun(n):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]

# Fixtures:
@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """In tmp_path, with caches beside it."""
    monkeypatch.chdir(tmp_path)
    for home in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(home, f"{tmp_path}-home")

@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Two commands, at work while other tests run: a function that waits for one and returns its
    folder, not to be written to, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    notebook = os.environ | {"MPLBACKEND": "inline"}  # where no window can be opened
    commands = {name: subprocess.Popen(
        [sys.executable, *launcher, cgap.__file__, *flags(**RUN, out=name)], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=notebook)
        for name, launcher in (("one", []), ("two", torchrun(2)))}
    @functools.cache
    def finish(name):
        printed, error = commands[name].communicate(timeout=PATIENCE)
        assert commands[name].returncode == 0, error
        return folder / name, printed, error
    yield finish
    for process in commands.values():  # where a test has failed
        process.terminate()

@pytest.fixture(scope="session", autouse=True)
def early(request):
    """Starts the two commands before the first test, if any test of this session needs them."""
    if any("finished" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("finished")

# -- 1. The loss and the measures: closed forms and slow independent references --------------------
WEIGHTS = {"CLIP": (0, 0, 0, False), "CUA": (1, 1, 0, True), "odd": (0.3, 0, 2, False),
           "CUAXU": (1, 1, 1, False)}

def mean_exp(distances):
    return distances.pow(2).mul(-2).exp().mean().log()

def paper_terms(x, y, T, center=False):
    """The paper's definitions as one writes them down, by distances between pairs, in float64."""
    x, y = (F.normalize(z - center * z.mean(0), dim=1) for z in (x.double(), y.double()))
    pair, others = torch.arange(len(x)), ~torch.eye(len(x), dtype=torch.bool)
    return {"clip": (F.cross_entropy(x @ y.T / T, pair) + F.cross_entropy(y @ x.T / T, pair)) / 2,
            "align": (x - y).norm(dim=1).pow(2).mean(),
            "unif": (mean_exp(F.pdist(x)) + mean_exp(F.pdist(y))) / 2,
            "xunif": mean_exp(torch.cdist(x, y).masked_select(others))}

def paper_loss(x, y, T, unif=0.0, align=0.0, xunif=0.0, center=False):
    terms = paper_terms(x, y, T, center)
    return terms["clip"] + unif * terms["unif"] + align * terms["align"] + xunif * terms["xunif"]

@cases("dtype, tolerance", {"float32": (torch.float32, 5e-5), "float64": (torch.float64, 1e-9),
                            "bfloat16": (torch.bfloat16, 0.01)})
@cases("weights", WEIGHTS)
@cases("N, copies", {"three rows": (3, 0), "64 with copies": (64, 9)})
def test_loss_and_gradients_equal_the_definitions(dtype, tolerance, weights, N, copies):
    x, y = (z.to(dtype) for z in make_clouds(N, 16, 2))
    x[:copies], y[:copies] = x[N - 1], y[N - 1]
    got, expected = (with_gradients(loss, x, y, 0.05, *weights) for loss in (cgap_loss, paper_loss))
    assert_close(got, expected, tolerance)
    assert cgap_loss(x, y, 0.05, *weights).dtype == torch.promote_types(dtype, torch.float32)

@cases("rows, expected", {"a guess": (torch.ones(50, 8), math.log(50)),
                          "certain": (torch.eye(50), 0.0)})
def test_clip_loss_at_its_ends(rows, expected):
    assert cgap_loss(rows, rows, 0.01).item() == pytest.approx(expected, abs=1e-5)

def test_uniformity_is_exact_where_exponentials_vanish():
    opposite = torch.tensor([[1.0], [-1.0]])
    assert cgap.uniformity(opposite, opposite, t=50).item() == pytest.approx(-200)

@cases("convert", {"number": float, "tensor": torch.tensor,
                   "learned": lambda T: nn.Parameter(torch.tensor(T)) * 1})
@pytest.mark.parametrize("temperature", [100.0, 1.5, 0.0, -0.1, math.nan])
def test_temperature_must_be_T(temperature, convert):
    with pytest.raises(ValueError, match=rf"1 / T\): it is {temperature:g}"):
        cgap_loss(*make_clouds(9, 4, 1), convert(temperature))

def test_loss_is_the_same_pasted_elsewhere_and_under_autocast():
    text = Path(cgap.__file__).read_text(encoding="utf-8")
    section = text.split("# -- 1. ")[1].split("# -- 2. ")[0].partition("\n")[2]
    Path("pasted.py").write_text(section, encoding="utf-8")
    pasted = runpy.run_path("pasted.py")["cgap_loss"]
    args = *(z.float() for z in make_clouds(40, 8, 1)), 0.05, 1, 2, 3, True
    for loss in pasted, torch.autocast("cpu", torch.bfloat16)(cgap_loss):
        assert_close(with_gradients(loss, *args), with_gradients(cgap_loss, *args), 1e-5)

def test_loss_is_the_same_compiled():
    torch._dynamo.reset()
    args = *(z.float() for z in make_clouds(40, 8, 1)), 0.05, *WEIGHTS["CUAXU"]
    # Traced as one graph, but not built in C++, which takes long
    compiled = torch.compile(cgap_loss, backend="eager", fullgraph=True)
    assert_close(with_gradients(compiled, *args), with_gradients(cgap_loss, *args), 1e-5)

# All that takes embeddings of pairs. Those of MEASURES look at every row.
MEASURES = {"gap_metrics": gap_metrics, "linear_separability": cgap.linear_separability,
            "search": search}
OF_PAIRS = MEASURES | {"cgap_loss": lambda x, y: cgap_loss(x, y, 0.07, 1, 1, 1, True),
                       "uniformity": cgap.uniformity, "alignment": cgap.alignment,
                       "rotation": cgap.rotation}

def numbers(result):
    """What such a function returns, as a tensor."""
    return torch.as_tensor([*result.values()] if isinstance(result, dict) else result).double()

@cases("convert", {"float32": torch.Tensor.float, "float16": torch.Tensor.half,
                   "bfloat16": torch.Tensor.bfloat16, "int32": torch.Tensor.int,
                   "numpy": torch.Tensor.numpy, "list": torch.Tensor.tolist,
                   "list of ints": lambda z: z.int().tolist(),
                   "numpy float16": lambda z: z.numpy().astype(np.float16)})
@cases("measure", OF_PAIRS)
def test_embeddings_may_be_of_any_type(measure, convert):
    x, y = ((9 * z).round() for z in make_directions(60, 6, 1))  # whole numbers, exact in all types
    expected = numbers(measure(x, y))
    assert expected.isfinite().all()
    for pair in (convert(x), convert(y)), (convert(x), y), (x, convert(y)):
        assert_close(numbers(measure(*pair)), expected, 2e-4 if measure is cgap.rotation else 1e-5)

@cases("change", {"five captions each": lambda x: (x, x.repeat_interleave(5, 0)),
                  "a row less": lambda x: (x, x[1:]), "a column less": lambda x: (x, x[:, 1:]),
                  "one row": lambda x: (x, x[:1]), "one column": lambda x: (x, x[:, :1]),
                  "a vector": lambda x: (x, x[0]), "vectors": lambda x: (x[0], x[0]),
                  "one pair": lambda x: (x[:1], x[:1]), "3-D": lambda x: (x[None], x[None])})
@cases("measure", OF_PAIRS)
def test_shapes_that_are_no_pairs_are_refused(measure, change):
    with pytest.raises(ValueError, match="x and y must both be"):
        measure(*change(draw(20, 4)))

@pytest.mark.parametrize("value", [math.nan, math.inf, 0])
@pytest.mark.parametrize("side", ["x", "y"])
@cases("measure", MEASURES)
def test_row_without_direction_is_named(measure, side, value):
    pair = make_clouds(20, 4, 1)
    pair["xy".index(side)][3] = value
    with pytest.raises(ValueError, match=r"row 3 .* \(1 of 20 are"):
        measure(*pair)

@pytest.mark.parametrize("shape", [(4, 3), (6, 1)], ids=["4 rows", "1 dimension"])
@pytest.mark.parametrize("measure", [gap_metrics, cgap.linear_separability])
def test_too_few_rows_or_dimensions_are_refused(measure, shape):
    with pytest.raises(ValueError, match="x and y must be"):
        measure(torch.ones(shape), torch.ones(shape))

@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@cases("measure", MEASURES)
def test_lengths_of_rows_do_not_matter(measure, scale):
    x, y = (z.float() for z in make_clouds(60, 6, 1))
    assert_close(numbers(measure(scale * x, y / scale)), numbers(measure(x, y)), 1e-5)

@cases("mode", {"inference": torch.inference_mode, "with gradients": torch.enable_grad})
@cases("measure", MEASURES)
def test_measures_work_whether_gradients_are_on_or_off(measure, mode):
    x, y = make_clouds(60, 6, 1)
    expected = numbers(measure(x, y))
    with mode():
        assert_close(numbers(measure(2 * x.requires_grad_(), y)), expected, 1e-6)

def test_gap_metrics_equal_their_definitions():
    x, y = make_directions(60, 6, 1)
    terms = {name: term for name, term in paper_terms(x, y, 1).items() if name != "clip"}
    others = sum(x[i] @ y[j] for i in range(60) for j in range(60) if i != j) / (60 * 59)
    margin = (x * y).sum(1).mean() - others
    spread = math.sqrt(x.var(0).sum() * y.var(0).sum())
    both = [np.cov(z.numpy().T).flatten() for z in (x, y)]
    separability = [cgap.linear_separability(x, y, C) for C in (1, 100)]
    assert separability[0] != separability[1]
    expected = {"centroid_distance": math.dist(x.mean(0), y.mean(0)),
                "linear_separability": separability[0], "linear_separability_c100": separability[1],
                **terms, "margin": margin, "spread": spread, "agreement": margin / spread,
                "overlap": both[0] @ both[1] / math.prod(map(np.linalg.norm, both))}
    got = gap_metrics(7 * x.float(), y.float() / 3)
    assert list(got) == GAP and all(type(value) is float for value in got.values())
    assert got == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-5)

ONE, POINT = draw(30, 4), torch.ones(30, 8).double()
NARROW = {"spread": 0, "margin": 0, "agreement": 0, "overlap": 0}

@cases("x, y, expected", {
    "equal": (ONE, ONE, {"agreement": 1, "overlap": 1, "align": 0}),
    "directions of their own": (F.pad(ONE, (0, 4)), F.pad(draw(30, 4, seed=1), (4, 0)),
                                {"overlap": 0, "margin": 0, "align": 2}),
    "opposite": (ONE, -ONE, {"agreement": -1, "overlap": 1, "align": 4}),
    "opposite points": (POINT, -POINT, NARROW | {"centroid_distance": 2, "unif": 0}),
    "a point and a cloud": (POINT, draw(30, 8), NARROW)})
def test_gap_metrics_at_their_ends(x, y, expected):
    got = gap_metrics(x, y)
    assert all(map(math.isfinite, got.values()))
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-6)

@pytest.mark.parametrize("seed", range(12))
def test_margin_is_bounded_by_the_gap(seed):
    """margin <= spread <= 1 - (|mean x|^2 + |mean y|^2) / 2 <= 1 - g^2 / 4, times N / (N - 1)."""
    N, D = 5 + 3 * seed, 2 + seed % 7
    x, y = draw(N, D, seed=seed), draw(N, D, seed=100 + seed)
    y = y + seed % 3 * x + 2 * draw(1, D, seed=200 + seed)  # some agree, and all have a gap
    got, ratio = gap_metrics(x, y), N / (N - 1)
    means = [F.normalize(z, dim=1).mean(0).square().sum().item() for z in (x, y)]
    bounds = [got["margin"], got["spread"], ratio * (1 - sum(means) / 2),
              ratio * (1 - got["centroid_distance"] ** 2 / 4)]
    assert all(low <= high + 1e-9 for low, high in itertools.pairwise(bounds)), bounds
    assert got["spread"] == pytest.approx(ratio * math.sqrt((1 - means[0]) * (1 - means[1])))

@pytest.mark.parametrize("C", [1.0, 100.0])
def test_classifier_is_at_its_minimum(C):
    z = F.pad(torch.cat(make_clouds(200, 5, 1)), (0, 1), value=1.0)
    labels = torch.arange(2).repeat_interleave(200).double()
    w = cgap.fit_logistic(z, labels, C).requires_grad_()
    error = F.binary_cross_entropy_with_logits(z @ w, labels, reduction="sum")
    gradient = torch.autograd.grad(w[:-1] @ w[:-1] / 2 + C * error, w)[0]
    assert gradient.abs().max() < 1e-4 * C  # convex: this is its minimum

@cases("N, D, apart, C, lowest, highest", {
    "apart": (500, 5, 20, 1, 1, 1), "one cloud": (500, 5, 0, 1, 0.4, 0.6),
    # These 80 pairs can be told apart without an error: only those that are held out tell.
    "more dimensions than pairs": (100, 300, 0, 100, 0.2, 0.7)})
def test_separability_is_the_accuracy_on_held_out_pairs(N, D, apart, C, lowest, highest):
    assert lowest <= cgap.linear_separability(*make_directions(N, D, apart), C) <= highest

def test_gap_metrics_of_wide_embeddings_are_quick():
    x = draw(1000, 2048).float()
    began = time.process_time()
    gap_metrics(x + 0.02, x + draw(1000, 2048, seed=1))
    assert time.process_time() - began < 20

def slow_search(x, y, group):
    """For x_i among all y: R@1 by group; and the same among all y and the x of other groups."""
    hits = torch.zeros(2)
    for i, own in enumerate(group):
        cosine, right = max(zip((y @ x[i]).tolist(), (group == own).tolist()))
        rivals = (x @ x[i])[group != own].tolist()
        hits += torch.tensor([right, right and cosine > max(rivals)])
    return (hits / len(x)).tolist()

def slow_searches(x, y, group):
    return dict(zip(SEARCHES, slow_search(x, y, group) + slow_search(y, x, group)))

@cases("convert", {"tensor": torch.Tensor.clone, "list": torch.Tensor.tolist,
                   "numpy": torch.Tensor.numpy})
@cases("group", {"all differ": torch.arange(40), "seven captions": torch.arange(40) % 7})
def test_search_finds_any_caption_of_the_group(group, convert):
    x, y = make_directions(40, 4, 0)
    if group[7] == group[0]:
        y[7:14] = y[:7]  # equal captions are equally right
    got = search(7 * x, y, convert(group))
    assert list(got) == SEARCHES and got == pytest.approx(slow_searches(x, y, group))

@cases("group", {"short": range(39), "long": range(41), "2-D": torch.zeros(40, 1), "number": 0})
def test_search_refuses_other_groups(group):
    with pytest.raises(ValueError, match="group must be"):
        search(*make_directions(40, 4, 0), group)

def test_mixed_search_is_hurt_by_a_gap_and_search_is_not():
    x = F.normalize(draw(40, 4), dim=1)
    got = search(F.pad(x, (0, 1), value=3.0), F.pad(x, (0, 1), value=-3.0))
    assert got == {"i2t_r1": 1, "mixed_i2t": 0, "t2i_r1": 1, "mixed_t2i": 0}

def random_orthogonal(D, seed):
    return torch.linalg.qr(draw(D, D, seed=seed))[0]

def test_rotation_is_orthogonal_and_keeps_the_cosines_within_y():
    x, y = make_clouds(50, 6, 3)
    R = cgap.rotation(x, y)
    assert_close(R.T @ R, torch.eye(6).double(), 1e-9)
    within = [F.normalize(z, dim=1) @ F.normalize(z, dim=1).T for z in (y, y @ R)]
    assert_close(within[1], within[0], 1e-9)

@pytest.mark.parametrize("seed", range(3))
def test_rotation_finds_the_one_that_was_applied(seed):
    y, turn = draw(50, 6), random_orthogonal(6, seed)
    assert_close(cgap.rotation(y @ turn, y), turn, 1e-9)

def test_rotation_is_the_best():
    x, y = make_clouds(50, 6, 3)
    R = cgap.rotation(x, y)
    for seed in range(50):
        other = random_orthogonal(6, seed)
        near = R @ torch.linalg.matrix_exp(0.01 * (other - other.T))  # a small turn away
        assert (x - y @ R).norm() < min((x - y @ other).norm(), (x - y @ near).norm())

# -- 2. The smallest gap, encoders, a step of training ---------------------------------------------
@cases("settings, is_open", {
    "a fast offset": ({}, True), "no offset": ({"offset_lr": 0.0}, False),
    "a slow offset": ({"offset_lr": 1 / 64}, False),
    "both terms": ({"unif": 1.0, "align": 1.0}, False), "high T": ({"temperature": 0.2}, False),
    "high T, mismatched": ({"temperature": 0.2, "mismatch": 0.9}, True)})
def test_smallest_gap_opens_if_and_only_if(settings, is_open):
    history, _ = cgap.smallest_gap(n=256, steps=60, **settings)
    start, *_, end = [record["linear_separability"] for record in history]
    assert start < 0.6 and (0.9 < end if is_open else 0.35 < end < 0.65)

@cases("change, parts", {
    "at random": (lambda step, gradient: torch.randn_like(gradient), True),
    "together": (lambda step, gradient: gradient.mean(0).expand(2, 1, 128).clone(), False)})
def test_offsets_part_the_clouds_without_a_force(change, parts):
    history, _ = cgap.smallest_gap(n=256, steps=20, offset_gradient=change)
    found = [record["linear_separability"] for record in history]
    assert found[0] < 0.65 and (found[2] > 0.95 if parts else max(found) < 0.65)  # after two steps

@pytest.mark.parametrize("n, share, changed", [
    (10, 0.15, 2), (100, 0.29, 29), (10, 0.01, 2), (10, 0, 0), (10, 1, 10)])
def test_mismatch_changes_that_share(n, share, changed):
    caption = cgap.mismatch_captions(n, share)
    assert sorted(caption.tolist()) == list(range(n))
    assert (caption != torch.arange(n)).sum() == changed
    assert torch.equal(caption, cgap.mismatch_captions(n, share))

def test_mismatch_is_spread_over_an_epoch_and_depends_on_the_seed():
    choices = []
    for seed in range(4):
        wrong = cgap.mismatch_captions(1000, 0.2, seed) != torch.arange(1000)
        for part in cgap.epoch_order(0, 1000, seed).split(200):
            assert wrong[part].float().mean().item() == pytest.approx(0.2, abs=0.12)
        choices.append(wrong)
    assert len(torch.stack(choices).unique(dim=0)) == 4

def test_embedding_depends_on_the_order_of_words_not_on_batch_or_padding():
    model, (images, texts) = make_encoders(), make_inputs(5)
    texts[0, 4:] = 0
    for encoder, batch, alone in ((model.image, images, images[:1]),
                                  (model.text, texts, texts[:1, :4])):
        assert_close(encoder(batch)[:1], encoder(alone), 1e-5)
    assert not torch.allclose(model.text(texts[1:].flip(1)), model.text(texts[1:]), atol=1e-2)

def test_float_images_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        cgap.encode(make_encoders().image, make_inputs(5)[0] / 255)

def test_encode_gives_each_module_its_own_mode_back():
    encoder = OwnEncoder(6, 8)
    encoder.body[1].eval()  # a frozen BatchNorm
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    rows = draw(300, 6).float()
    assert torch.equal(cgap.encode(encoder, rows), cgap.encode(encoder, rows))  # no dropout
    assert encoder.training and encoder.body[2].training and not encoder.body[1].training
    assert_close(dict(encoder.state_dict()), before, 0)

def test_removing_the_initial_gap_moves_captions_onto_images():
    model, (images, texts) = make_encoders(), make_inputs(90)
    x, y = cgap.encode(model.image, images), cgap.encode(model.text, texts)
    cgap.remove_initial_gap(model, images, texts)
    moved = cgap.encode(model.text, texts)
    a, b = x - x.mean(0), moved - moved.mean(0)
    assert_close([moved.mean(0), b.norm()], [x.mean(0), a.norm()], 1e-5)
    ratio = F.pdist(moved) / F.pdist(y)  # it moves as a whole
    assert ratio.max() / ratio.min() < 1.001
    assert_close(cgap.rotation(a, b), torch.eye(8), 1e-3)  # no further rotation would help

def test_learning_rate_warms_up_over_a_tenth_and_falls_as_a_cosine():
    rates = [cgap.learning_rate(step, Config(steps=1000, lr=2.0)) for step in range(1000)]
    cosine = [1 + math.cos(math.pi * step / 1000) for step in range(1000)]
    assert rates[:90] == pytest.approx([0.02 * (step + 1) for step in range(90)])
    assert rates[100:] == pytest.approx(cosine[100:])

def test_epochs_have_each_pair_once_with_other_captions():
    images = torch.arange(14)
    texts = images[:, None, None] + torch.tensor([[[0], [100]]])  # (14, 2, 1)
    pairs, orders = Pairs(images[:, None], texts), []
    for seed, step in itertools.product((0, 1), range(6)):  # what is left of an epoch is dropped
        cfg = Config(batch=4, seed=seed)
        batch, captions = cgap.next_batch(pairs, step, cfg, torch.device("cpu"))
        assert torch.equal(captions - batch, torch.full((4, 1), 100 * (step // 3)))
        orders.append(batch)
    orders = torch.cat(orders).view(4, 12)
    assert len(orders.unique(dim=0)) == 4 and all(len(order.unique()) == 12 for order in orders)

def test_evaluation_measures_each_thing_where_it_belongs(monkeypatch):
    monkeypatch.setattr(cgap, "encode", lambda encoder, z: z)
    group = torch.arange(30) % 9  # equal captions
    y = F.normalize(draw(9, 4), dim=1)[group]
    x = F.normalize(y + 0.8 * draw(30, 4, seed=2) + 0.3, dim=1)
    e = torch.eye(4)
    zero_shot = cgap.ZeroShot(images=e[[0, 1, 2, 3, 1]], labels=torch.tensor([0, 1, 2, 3, 0]),
                              unseen=torch.tensor([False] * 3 + [True] * 2), prompts=e)
    # e0 + e1 - old is nearest to e0, the query itself, and then to e1; e0 + e2 - old to e2
    arithmetic = cgap.Arithmetic(
        pool=e, query=torch.tensor([0] * 10), old=(0.6 * e[[1]] + 0.8 * e[[3]]).expand(10, 4),
        new=e[[1, 2, 2, 2, 1, 1, 2, 2, 1, 1]], correct=e[[1] * 10].bool())
    texts = torch.stack([y, -y], 1)  # of several captions, the first is measured
    data = Data(Pairs(-x, y[:, None]), Pairs(x, texts), group, {}, (zero_shot, arithmetic))
    cfg = Config(batch=6, unif=3.0)
    order = cgap.epoch_order(0, 30, cfg.seed)[:6]
    expected = {"train_loss": paper_loss(-x[order], y[order], 0.02, 3), "temperature": 0.02,
                **gap_metrics(x, y), **slow_searches(x, y, group),
                **dict(zip(TASKS, [4 / 5, 1 / 2, 3 / 8, 1]))}
    record = cgap.evaluate(make_encoders(temperature=0.02), data, cfg)
    assert list(record) == RECORD[1:]
    assert record == pytest.approx({name: float(value) for name, value in expected.items()})

# -- 3. Settings, scenes, words, photographs -------------------------------------------------------
@pytest.mark.parametrize("settings", [
    {"temperature": np.float64(0.1)}, {"temperature": np.float32(0.1)}, {"temperature": 1},
    {"temperature": torch.tensor(0.5)}, {"steps": 1e2}, {"batch": 64.0}, {"seed": np.int64(3)},
    {"unif": np.array(1)}, {"center": np.True_}, {"data": Path("pairs.csv")}], ids=str)
def test_settings_become_what_they_are_declared_to_be(settings):
    ((name, given),) = settings.items()
    value = getattr(Config(**settings), name)
    assert type(value) is {f.name: f.type for f in fields(Config)}[name]
    assert value == (str(given) if name == "data" else given)

@pytest.mark.parametrize("settings", [
    {"temperature": "0.1"}, {"temperature": 100}, {"temperature": math.nan}, {"temperature": None},
    {"steps": 0}, {"steps": 1.5}, {"steps": math.inf}, {"batch": 1}, {"seed": -1}, {"center": "no"},
    {"lr": math.inf}, {"unif": [1, 2]}, {"unif": 1j}, {"dim": "many"}, {"data": 7}, {"out": None}],
    ids=str)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(UserError, match=f"--{[*settings][0]} must be"):
        Config(**settings)

def test_run_with_numbers_of_numpy_can_be_loaded():
    T = np.geomspace(0.01, 1, 5)[2]
    cgap.train(Config(**ONE_STEP | dict(temperature=T, steps=1e0, out=Path("run"))), quiet=True)
    cfg = cgap.load_run("run")["cfg"]
    assert (cfg.temperature, cfg.steps, cfg.out) == (pytest.approx(0.1), 1, "run")

@pytest.mark.parametrize("shape", cgap.SHAPES)
@cases("relation, axis", {"left of": (0, 3), "above": (1, 2)})
def test_scenes_show_what_their_captions_say(shape, relation, axis):
    k = cgap.SHAPES.index(shape)
    scenes = torch.tensor([[0, k, 2, k, relation]] * 20)
    caption = f"a red {shape} {cgap.RELATIONS[relation]} a blue {shape}"
    assert cgap.describe(scenes) == [caption] * 20
    halves = cgap.draw_scenes(scenes, 32).float().split(16, axis)
    near, far = ((half[:, 0] - half[:, 2]).mean() for half in halves)
    assert near > 10 and far < -10

def test_scenes_lack_unseen_combinations():
    scenes = cgap.random_scenes(20_000, 0.3)
    assert (scenes[:, 4] < 0).double().mean().item() == pytest.approx(0.3, abs=0.02)
    colours, shapes = scenes[:, :4].reshape(-1, 2).unique(dim=0).T
    assert len(shapes) == 40 and (colours % 6 != shapes).all()

@pytest.fixture
def tasks(monkeypatch):
    """Both tasks, with scenes instead of drawings, and the vocab."""
    monkeypatch.setattr(cgap, "draw_scenes", lambda scenes, size: scenes)
    vocab = cgap.make_vocab([word for names in cgap.WORDS for word in ["a", *names]])
    return *cgap.scene_tasks(16, vocab, n=50), vocab

def test_zero_shot_asks_for_the_object_that_is_drawn(tasks):
    zero_shot, _, vocab = tasks
    prompts = [words(row, vocab) for row in zero_shot.prompts]
    assert cgap.describe(zero_shot.images) == [prompts[k] for k in zero_shot.labels]
    unseen, seen = ({prompts[k] for k in zero_shot.labels[which]}
                    for which in (zero_shot.unseen, ~zero_shot.unseen))
    assert len(unseen) == 8 and len(seen) == 40 and not unseen & seen

def test_arithmetic_asks_for_the_scene_with_one_word_changed(tasks):
    _, questions, vocab = tasks
    assert {len(part) for part in questions[1:]} == {250}
    for q in range(250):
        slot, source, target = q // 50, questions.pool[questions.query[q]], questions.pool[50 + q]
        assert source[0] != source[2] and source[1] != source[3]  # a word names one of them
        assert (source != target).nonzero().tolist() == [[slot]]
        assert torch.equal(questions.correct[q], (questions.pool == target).all(1))
        assert [words(row[q], vocab) for row in (questions.old, questions.new)] == [
            cgap.WORDS[slot][scene[slot]] for scene in (source, target)]

def test_words_are_letters_or_single_signs():
    assert cgap.words_of("A dog's\tbowl... Überzug!") == "a dog ' s bowl . . . überzug !".split()

def test_tokens_are_numbers_of_frequent_words_cut_and_padded():
    vocab = cgap.make_vocab(["the cat the cat", " ".join(f"w{k}" for k in range(9_999))])
    assert list(vocab)[:3] == ["<pad>", "<unk>", "cat"] and len(vocab) == 10_002
    tokens = cgap.tokenize(["The CAT", "zebra " + "the " * 40], {"cat": 2, "the": 3})
    assert tokens.tolist() == [[3, 2] + [0] * 30, [1] + [3] * 31] and tokens.dtype == torch.int32

def test_tokenize_refuses_one_string():
    with pytest.raises(TypeError, match="list of strings"):
        cgap.tokenize("a dog", {"a": 2, "dog": 3})

def test_captions_are_equal_if_their_words_are():
    captions = ["a dog", "A  DOG", "a cow", "a hen", "a dog " * 20 + "a", "a dog " * 20 + "b"]
    assert cgap.number_equal(captions).tolist() == [0, 0, 1, 2, 3, 4]

RED, BLUE, WHITE = (200, 40, 40), (40, 40, 200), (255, 255, 255)

def banner(mode="RGB", top=RED, bottom=BLUE):
    """A picture of two colours, one above the other."""
    image = Image.new(mode, (64, 64), top)
    image.paste(bottom, (0, 32, 64, 64))
    return image

TURNED = Image.Exif()
TURNED[0x0112] = 6
LYING = banner().convert("CMYK").transpose(Image.Transpose.ROTATE_90)
FADED = banner("RGBA", (*RED, 128), (*BLUE, 0))

@cases("name, image, exif, top, bottom", {
    "wide": ("wide.png", banner().crop((-64, 0, 128, 64)), None, RED, BLUE),  # black at both sides
    "transparent": ("rgba.png", FADED, None, (227, 147, 147), WHITE),
    "turned, for print": ("cmyk.jpg", LYING, TURNED, RED, BLUE)})
def test_photo_loads_as_people_see_it(name, image, exif, top, bottom):
    image.save(name, exif=exif, quality=95)
    photo = cgap.load_photo(name, 16)
    assert photo.dtype == torch.uint8 and photo.shape == (3, 16, 16)
    for part, colour in (photo[:, :6, 2:-2], top), (photo[:, -6:, 2:-2], bottom):
        assert (part - torch.tensor(colour)[:, None, None]).abs().max() < 12

@cases("file, image", {
    "16 bits": ("deep.png", Image.fromarray(np.full((8, 8), 3000, np.uint16))),
    "32 bits": ("deep.tiff", Image.new("I", (8, 8), 1000)),
    "floats": ("deep.tiff", Image.new("F", (8, 8), 0.5))})
def test_photo_of_more_than_8_bits_is_left_out_by_name(capsys, file, image):
    write_csv(more=[(file, "shade 20")])
    image.save(file)
    assert_captions_fit(load("pairs.csv"), 54, 6)
    (warning,) = warnings_of(capsys)
    assert "1 of 61" in warning and file in warning and f"mode {image.mode}" in warning

def test_photo_of_a_single_colour_is_named_and_used(capsys):
    write_csv(more=[("plain.png", "shade 20")])
    Image.new("RGBA", (8, 8), (90, 20, 20, 0)).save("plain.png")  # transparent all over
    data = load("pairs.csv")
    assert len(data.training.images) + len(data.held_out.images) == 61
    (warning,) = warnings_of(capsys)
    assert warning.startswith("warning: 1 ") and "plain.png" in warning

@cases("years, sizes", {
    "both": (dict(train2014=50, val2014=10), (50, 10)),
    "another year's validation": (dict(train2014=50, val2014=10, train2017=60), (54, 6)),
    "the latest": (dict(train2014=50, val2014=10, train2017=60, val2017=12), (60, 12))})
def test_coco_is_of_its_latest_year(capsys, years, sizes):
    write_coco(**years)
    assert_captions_fit(load("coco"), *sizes)
    assert warnings_of(capsys) == []

def test_coco_without_pictures_to_validate_holds_out_a_tenth():
    write_coco(train2017=50, val2017=10)
    shutil.rmtree("coco/val2017")
    assert_captions_fit(load("coco"), 45, 5)

@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_coco_without_a_usable_picture_is_refused(split):
    write_coco(train2017=50, val2017=10)
    for path in Path("coco", split).iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="too few images"):
        load("coco")

@cases("old, new, named", {
    "no JSON": ('"images"', "", "JSONDecodeError"),
    "no file_name": ("file_name", "path", "file_name"),
    "the same id twice": ('"id 7.bmp", "file_name"', '"id 6.bmp", "file_name"',
                          "two images have the id 'id 6.bmp'"),
    "ids of another kind": ('"image_id": "id ', '"image_id": "', "are not equal"),
    "no annotation": ('"annotations": [', '"annotations": [7, ', "annotation")})
def test_coco_that_cannot_be_read_is_refused(capsys, old, new, named):
    file = write_coco(train2017=50)
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    refused(capsys, ["--data", "coco"], "captions_train2017.json", named)

def test_coco_leaves_out_what_cannot_be_used(capsys):
    file = write_coco(val2017=10, train2017=60)
    text = file.read_text()
    Image.new("L", (8, 8)).save("coco/train2017/60.bmp")  # listed, but without a caption
    text = text.replace('"images": [', '"images": [{"id": "60", "file_name": "60.bmp"}, ')
    text = text.replace('[{"image_id"', '[{"image_id": "unlisted", "caption": "a"}, {"image_id"')
    for old, new in ('"shade 20"', "null"), ('"shade 100"', "7"), ('"very shade 100"', '"..."'):
        text = text.replace(old, new, 1)  # all captions of image 0, two of three of image 2
    file.write_text(text)
    Path("coco/train2017/13.bmp").unlink()
    Path("coco/train2017/21.bmp").write_bytes(b"not a picture")
    for _ in range(2):  # the second time from the cache
        data = load("coco")
        assert_captions_fit(data, 57, 10)
        assert {words(row, data.vocab) for row in data.training.texts[1]} == {"very very shade 100"}
        (warning,) = warnings_of(capsys)
        assert "4 of 71" in warning and warning.count(".bmp") >= 3

LONG, URI = "a" * 300 + ".png", "data:image/png;base64," + "iVBORw0KGgo/" * 500

@cases("source, name", {
    "too long": ("pairs.csv", LONG), "data URI": ("pairs.csv", URI), "empty": ("pairs.csv", ""),
    "too long, COCO": ("coco", LONG), "data URI, COCO": ("coco", URI),
    "folder": ("coco", "../train2017"),
    "half an emoji": ("coco", "dog \ud83d.png"), "zero": ("coco", "dog \0.png")})
def test_one_bad_name_is_left_out(capfd, source, name):
    write_csv(more=[(name, "shade 20")] * (source == "pairs.csv"))
    file = write_coco(train2017=60)
    content = json.loads(file.read_text())
    content["images"].append({"id": "bad", "file_name": name})
    content["annotations"].append({"image_id": "bad", "caption": "shade 20"})
    file.write_text(json.dumps(content))
    assert_captions_fit(load(source), 54, 6)
    (warning,) = warnings_of(capfd)
    assert "1 of 61" in warning and name[:4] in warning

@pytest.mark.parametrize("size", [0, 999])
def test_damaged_cache_is_refused_by_name(size):
    write_csv()
    load("pairs.csv", cache="here")
    (cache,) = Path("here").iterdir()
    cache.write_bytes(cache.read_bytes()[:size])
    with pytest.raises(UserError, match=f"{cache.name}.*damaged"):
        load("pairs.csv", cache="here")

def test_replaced_pictures_of_the_same_date_and_size_are_decoded_anew():
    write_csv()
    load("pairs.csv")
    for path in Path("photos").iterdir():
        before = path.stat()
        Image.new("L", (8, 8), 251).save(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        after = path.stat()
        assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert (load("pairs.csv").training.images == 251).all()

def test_words_are_read_anew_despite_the_cache(monkeypatch):
    write_csv()
    assert load("pairs.csv").training.texts.shape == (54, 5, 4)
    monkeypatch.setattr(cgap, "words_of", lambda text: text.split()[::-1])
    monkeypatch.setattr(cgap, "CONTEXT", 2)
    monkeypatch.setattr(cgap, "decode", None)
    data = load("pairs.csv")
    assert data.training.texts.shape == (54, 5, 2)
    assert words(data.training.texts[0, 0], data.vocab).endswith(" shade")

@cases("start", {"plain": "", "with a mark": "\ufeff"})
@cases("text", {
    "more columns": 'image,more,caption\r\na.png,1,"one, ""two""\nthree"\r\n\r\nsub/b.png,,très b',
    "rows of commas": 'caption,image\n"one, ""two""\nthree",a.png\ntrès b,sub/b.png\n,\n,\n'})
def test_csv_may_be_written_in_many_ways(text, start):
    Path("pairs.csv").write_bytes((start + text).encode())
    assert cgap.read_csv(Path("pairs.csv")) == {Path("a.png"): ['one, "two"\nthree'],
                                                     Path("sub/b.png"): ["très b"]}

@cases("content, named", {
    "open quote": (b'image,caption\na.png,b\nb.png,"open\nc.png,d\n', ["line 3"]),
    "open quote in the header": (b'image,"caption\na.png,b\n', ["line 1"]),
    "other header": (b"file,text\na.png,b\n", ["image,caption", "file", "text"]),
    "two captions": (b"image,caption,caption\na.png,b,c\n", ["image,caption", "once"]),
    "semicolons": (b"image;caption\na.png;b\n", ["image,caption", "image;caption"]),
    "empty": (b"", ["image,caption"]), "no rows": (b"image,caption\n", ["too few"]),
    "comma in a caption": (b"image,caption\na.png,b\nb.png,c, d\n", ["line 3", "than the header"]),
    "another code": (b"image,caption\na.png,caf\xe9\n", ["utf-8"]),
    "short row": (b"caption,image\na dog\n", ["line 2", "than the header"])})
def test_csv_that_cannot_be_read_is_refused(capsys, content, named):
    Path("pairs.csv").write_bytes(content)
    refused(capsys, ["--data", "pairs.csv"], "pairs.csv", *named)

@cases("order", {"round the classes": lambda k: k % 10, "sorted by class": lambda k: k // 20})
def test_sorted_csv_has_varied_held_out_rows(capsys, order):
    write_photos(Path("photos"), 200)
    write_csv([(f"photos/{k}.bmp", f"a thing of class {order(k)}") for k in range(200)])
    data = load("pairs.csv")
    assert len(data.held_out.images) == 20 and data.group.bincount().max() <= 6
    assert warnings_of(capsys) == []

@cases("caption, expected", {
    "unknown words": (lambda k: f"product {k}", "words outside the vocabulary"),
    "cut words": (lambda k: "very " * 32 + str(k % 6), "more than 32"),
    "nearly equal": (lambda k: "the same" if k % 59 else "another", "caption"),
    "good": (lambda k: f"one of {k % 6}", None)})
def test_held_out_captions_of_no_use_are_warned_of(capsys, caption, expected):
    write_photos(Path("photos"), 60)
    write_csv([(f"photos/{k}.bmp", caption(k)) for k in range(60)])
    load("pairs.csv")
    found = warnings_of(capsys)
    assert len(found) == (expected is not None) and all(expected in line for line in found)

# -- 4. Devices and processes ----------------------------------------------------------------------
@fake_cuda
@pytest.mark.skipif(IS_OLD, reason="its fake CUDA tensors ask for a driver")
def test_nothing_is_made_on_another_device(monkeypatch):
    """CUDA tensors without data, on any computer: what mixes devices fails."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(cgap, "epoch_order", cgap.epoch_order.__wrapped__)  # to keep no fake
    monkeypatch.setattr(cgap, "unit_pairs", lambda *pair: map(cgap.normalize, pair))
    images, texts = make_inputs(40)
    ten = torch.arange(10)
    tasks = (cgap.ZeroShot(images, torch.arange(40) % 5, ten, texts[:5]),
             cgap.Arithmetic(images, ten, texts[:10], texts[:10], torch.ones(10, 40).bool()))
    gpu = torch.device("cuda:0")
    with FakeTensorMode(allow_non_fake_inputs=True):
        with gpu:
            model = make_encoders()
        batch = cgap.next_batch(Pairs(images, texts[:, None]), 0, Config(batch=12), gpu)
        x, y, T = model(*batch)
        made = [*batch, x, y, T, cgap_loss(x, y, T, 1, 1, 1, True), cgap.rotation(x, y),
                cgap.encode(model.image, images), cgap.encode(model.text, texts)]
        assert {z.device for z in made} == {gpu}
        cgap.remove_initial_gap(model, images, texts)
        cgap.fold_means(model, images, texts)
        for measure in search, functools.partial(search, group=torch.arange(12) % 5):
            with pytest.raises(DataDependentOutputException):  # all is done but to give the number
                measure(x.detach(), y.detach())
        with pytest.raises(DataDependentOutputException):
            cgap.do_tasks(model, *tasks)

@fake_cuda
@cases("name, rank, accelerator, found", {
    "auto with a GPU": ("auto", "3", torch.device("cuda"), "cuda:3"),
    "auto without": ("auto", "3", None, "cpu"), "cuda of a process": ("cuda", "3", None, "cuda:3"),
    "cuda alone": ("cuda", "", None, "cuda:0"), "a certain one": ("cuda:1", "3", None, "cuda:1")})
def test_device_is_found_by_name(monkeypatch, name, rank, accelerator, found):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda check_available=False: accelerator)
    with FakeTensorMode():
        assert cgap.find_device(name) == torch.device(found)

@pytest.mark.parametrize("made_by", ["torchrun", "the user"])
def test_only_the_first_process_asks_for_a_new_folder(monkeypatch, made_by):
    Path("run").mkdir()  # the first process has made it
    if made_by == "torchrun":
        monkeypatch.setenv("RANK", "1")
    else:  # by torch.distributed.init_process_group, which takes ranks from anywhere
        monkeypatch.setattr(cgap, "rank_and_world", lambda: (1, 2))
    assert cgap.resolve(Config(out="run"), is_new=True).out == "run"

def save_gradients(rank, world, folder):
    """For one of several processes, or one alone: the first saves the gradients of a step as train
    takes it, but with one more loss of the rows, and also for a frozen text encoder."""
    if world > 1:
        torch.distributed.init_process_group("gloo", (folder / "sync").as_uri(), rank=rank,
                                             world_size=world)
    assert cgap.join_processes(torch.device("cpu")) is False  # these have joined already
    found = []
    for frozen in (False, True):
        model = make_encoders(learn_temperature=True, temperature=0.07)
        model.text.requires_grad_(not frozen)
        images, texts = make_inputs(18)
        forward = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        x, y, T = forward(images[rank::world], texts[rank::world])
        loss = cgap_loss(cgap.gather(x), cgap.gather(y), T, 1, 1, 1, True) + x.square().mean()
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    if rank == 0:
        torch.save(found, folder / f"{world}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()

def test_gradients_do_not_depend_on_the_number_of_processes(tmp_path):
    save_gradients(0, 1, tmp_path)
    torch.multiprocessing.start_processes(save_gradients, (3, tmp_path), nprocs=3,
                                          start_method=METHOD)
    one, three = torch.load("1.pt"), torch.load("3.pt")
    assert_close(three, one, 1e-5)
    assert not any(name.startswith("text") for name in one[1])

def test_batch_that_cannot_be_split_is_refused(monkeypatch):
    monkeypatch.setattr(cgap, "rank_and_world", lambda: (0, 5))
    with pytest.raises(UserError, match="batch 12 .* 5 processes"):
        cgap.train(Config(**RUN, out="out"), quiet=True)
    assert tree() == {}

# -- 5. Runs: the real script as a user runs it, and runs from Python ------------------------------
def test_run_leaves_metrics_checkpoint_and_figures_and_prints_them(finished):
    folder, printed, _ = finished("one")
    first, *_, last = history = records(folder)
    steps = [record["step"] for record in history]
    shown = [int(step) for step in re.findall(r"^step +(\d+) ", printed, re.M)]
    assert steps == shown == list(range(0, 17, 2))
    assert all(list(record) == RECORD for record in history)
    assert last["train_loss"] < first["train_loss"]
    assert last["temperature"] != first["temperature"] == pytest.approx(0.07)
    assert_figures(folder)
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "metrics.jsonl", *FIGURES}
    rows = [line.split() for line in printed.split("held-out pairs")[1].splitlines()[1:] if line]
    assert rows[0] == ["start", "end"] and rows[-1][0] == "one:"
    assert rows[1:-1] == [[name, f"{first[name]:.3f}", f"{last[name]:.3f}"] for name in RECORD[1:]]

def test_run_gives_the_model_that_it_measured(finished):
    folder = finished("one")[0]
    run, (model, vocab) = cgap.load_run(folder), cgap.load_model(folder)
    data = cgap.load_data(run["cfg"])
    assert vocab == data.vocab
    x, y = cgap.embed(model, *data.held_out.take(slice(None)))
    assert_close(run["snapshots"][16].float(), torch.stack([x, y]), 1e-3)
    assert run["history"][-1] == pytest.approx(run["history"][-1] | gap_metrics(x, y), rel=1e-3)
    images, texts = data.training.take(slice(None))  # a centred run has means of 0
    for z in cgap.encode(model.image, images), cgap.encode(model.text, texts):
        assert z.mean(0).norm() < 1e-3 * z.norm(dim=1).mean()

def test_torchrun_on_two_processes_gives_the_curve_of_one(finished):
    (one, *_), (two, printed, error) = finished("one"), finished("two")
    one, two = ([record["train_loss"] for record in records(folder)] for folder in (one, two))
    assert two == pytest.approx(one, abs=1e-3)
    assert printed.count("held-out pairs") == 1  # only the first process prints
    assert not re.search("deprecat|FutureWarning|destroy_process_group", error), error

def test_runs_start_with_or_without_a_gap_and_are_plotted_together(capsys):
    gaps = {}
    for gap, dim in ("kept", 8), ("removed", 16):
        settings = dict(steps=2, same_modality=True, remove_gap=gap == "removed", dim=dim,
                        center=False, image_size=16, out=f"runs/{gap}")
        history = cgap.train(Config(**RUN | settings), quiet=True)
        gaps[gap] = history[0]["centroid_distance"]
    assert gaps["removed"] < gaps["kept"] / 2
    Path("runs/plot").mkdir()  # as the first --plot runs/* leaves it
    cgap.main(["--plot", *map(str, Path("runs").iterdir())])
    assert capsys.readouterr().err == "left out: runs/plot has no checkpoint.pt\n"
    assert_figures(Path("runs/plot"))

def test_plot_labels_runs_by_their_last_temperature(monkeypatch):
    for seed in 3, 4:  # with the model's T, not the settings'
        cgap.train(Config(**OWN, seed=seed, out=f"run{seed}"), OwnModel(0.5), own_data(), True)
    T, labels = records("run4")[-1]["temperature"], []
    monkeypatch.setattr(cgap, "plot_metrics", lambda histories, path: labels.extend(histories))
    cgap.main(["--plot", "run3", "run4", "run4/"])
    assert f"T = {T:.2g}, seed 4" in labels[1] and labels[0].endswith("seed 3") and T > 0.4
    assert len({*labels}) == 3

def test_pictures_need_no_latex(tmp_path):
    import matplotlib
    with matplotlib.rc_context({"text.usetex": True}):
        cgap.plot_metrics({"a run": [dict.fromkeys(RECORD, 1.0)]}, "gap.png")
    assert Path("gap.png").exists()

def test_pictures_show_the_gap_in_full():
    both = torch.stack(make_directions(40, 8, 3))
    axis = cgap.canvas(1, 1)[1][0, 0]
    for shown in -both, both:
        cgap.draw_clouds(axis, shown, "step 5")
    left, right = (torch.tensor(dots.get_xydata()).mean(0) for dots in axis.lines[-2:])
    assert (right - left).tolist() == pytest.approx([math.dist(*both.mean(1)), 0], abs=1e-4)
    assert axis.get_title() == "step 5"

def test_points_print_a_table_and_draw_a_picture(capsys):
    cgap.main(["--points", "--steps", "30", "--dim", "16", "--mismatch", "0.1"])
    *table, last = capsys.readouterr().out.splitlines()
    assert len(table) == 5 and last == "runs/points/points.png"
    assert all(re.search(r"( +-?\d\.\d{3}){5}$", line) for line in table[1:])
    with Image.open(last) as image:
        assert image.convert("L").getextrema()[0] < 100

def test_help_has_all_settings_and_import_is_quiet_and_light():
    code = ("import cgap, sys, contextlib\nprint('imported', flush=True)\n"
            "with contextlib.suppress(SystemExit): cgap.main(['--help'])\n"
            "print(sorted({'matplotlib', 'torchvision', 'PIL'} & set(sys.modules)))")
    process = subprocess.run([sys.executable, "-OO", "-c", code],  # -OO: without docstrings
                             capture_output=True, text=True, timeout=PATIENCE,
                             env=os.environ | {"PYTHONPATH": str(Path(cgap.__file__).parent)})
    first, *helped, last = process.stdout.splitlines()
    assert (first, last, process.stderr, tree()) == ("imported", "[]", "", {})
    text = " ".join(" ".join(helped).split())
    for setting in fields(Config):
        assert setting.metadata["help"] in text and flags(**{setting.name: True})[0] in text

def test_own_model_is_trained_in_its_mode_and_measured_in_eval_mode(capfd):
    torch.manual_seed(0)
    model, data, cfg = OwnModel(), own_data(), Config(**OWN)
    model.text.body[1].eval()  # frozen
    history = cgap.train(cfg, model=model, data=data, quiet=True)
    assert model.image.body[1].num_batches_tracked == 4 and model.image.training  # steps alone
    assert model.text.body[1].num_batches_tracked == 0 and not model.text.body[1].training
    for _ in range(2):
        assert history[-1] == {"step": 4, **cgap.evaluate(model, data, cfg)}
    assert list(history[-1]) == [name for name in RECORD if name not in TASKS]
    assert capfd.readouterr() == ("", "")

@pytest.mark.parametrize("start, end", [(0.001, 0.01), (1.0, 1.0)])
def test_learned_temperature_stays_within_its_bounds(start, end):
    history = cgap.train(Config(**OWN), OwnModel(start), own_data(), quiet=True)
    found = [record["temperature"] for record in history]
    assert found[0] == pytest.approx(start) and found[-1] == pytest.approx(end, rel=0.02)
    assert max(found) <= 1

# What is refused, and what goes wrong:
@pytest.mark.parametrize("bad, named", [
    ("--batch 1", "batch must"), ("--unif nan", "unif must"), ("--steps many", "--steps"),
    ("--stpes 5", "--stpes"), ("--temp .1", "--temp"), ("--device meta", "meta"),
    ("--device cuda:99", "--device cpu"), ("--temperature .005", "temperature must"),
    ("--temperature 100", "temperature must"), ("--out folder", "--resume"),
    ("--out file/below", "--out file/below"), ("--cache file/below", "--cache"),
    ("--plot folder --steps 5", "steps does nothing"), ("--resume folder", "checkpoint"),
    ("--resume nowhere", "checkpoint"), ("--resume folder --steps 5", "steps does nothing"),
    ("--points --unif 1", "unif does nothing"), ("--points --mismatch 2", "mismatch must")])
def test_bad_flag_is_one_line_of_error_before_data_are_read(capsys, monkeypatch, bad, named):
    Path("folder").mkdir()
    Path("folder/checkpoint.pt").write_bytes(b"precious")
    Path("file").write_text("precious\nthing")
    monkeypatch.setattr(cgap, "load_data", lambda cfg: pytest.fail("data were read"))
    refused(capsys, bad.split(), named)

@pytest.mark.parametrize("bad, named", [
    ("--limit 64 --batch 65", "65"), ("--limit 4 --batch 2", "4 held out"),
    ("--data nowhere", "nowhere"), ("--data .", "annotations")])
def test_bad_data_are_one_line_of_error(capsys, bad, named):
    refused(capsys, bad.split(), named)

def test_world_size_without_torchrun_is_one_line_of_error(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused(capsys, flags(**ONE_STEP), "torchrun")

@cases("learn", {"fixed T": False, "learned T": True})
@cases("eval_every", {"measured": 1, "not measured": 100})
def test_run_that_diverges_says_so_and_keeps_finite_weights(learn, eval_every):
    settings = dict(lr=1e9, eval_every=eval_every, learn_temperature=learn, out="run")
    with pytest.raises(UserError, match="not finite"):
        cgap.train(Config(**RUN | settings), quiet=True)
    assert all(weight.isfinite().all() for weight in cgap.load_run("run")["model"].values())

@posix
def test_draft_of_a_dead_process_is_removed():
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    dead.wait()
    names = [f"run.pt.{pid}.tmp" for pid in (dead.pid, os.getppid())]
    for name in names:
        Path(name).write_bytes(b"half")
    cgap.save_whole({}, Path("run.pt"))
    assert tree().keys() == {Path("run.pt"), Path(names[1])}

# Going on with a run:
def lengthen(run, steps):
    """As if the finished run had been interrupted on its way to so many steps."""
    content = torch.load(Path(run, "checkpoint.pt"), weights_only=True, map_location="cpu")
    content["cfg"]["steps"] = steps
    torch.save(content, Path(run, "checkpoint.pt"))

@pytest.fixture
def run_on_csv():
    """A run on pairs.csv, in the folder run, that has a step left to do."""
    write_csv()
    cgap.train(Config(**ONE_STEP | dict(data="pairs.csv", limit=0, seed=5, out="run")), quiet=True)
    lengthen("run", 2)

def test_run_is_resumed_from_another_folder_with_its_own_settings(run_on_csv, monkeypatch):
    before = cgap.load_run("run")["cfg"]
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    monkeypatch.setattr(cgap, "decode", None)  # from the cache
    assert [record["step"] for record in cgap.resume("../run", quiet=True)] == [0, 1, 2]
    assert cgap.load_run("../run")["cfg"] == replace(before, out="../run")

@cases("change", {
    "a row less": lambda: write_csv(read_csv()[:-1]),
    "the first row less": lambda: write_csv(read_csv()[1:]),
    "other order": lambda: write_csv(read_csv()[::-1]),
    "a picture less": lambda: Path("photos/7.bmp").unlink(),
    "other words": lambda: write_csv([(name, f"{text} and") for name, text in read_csv()]),
    "other captions": lambda: write_csv([(name, text.replace("very very", "very"))
                                         for name, text in read_csv()])})
def test_run_is_not_resumed_on_other_data(capsys, run_on_csv, change):
    change()
    refused(capsys, ["--resume", "run"], "trained on other")

@pytest.mark.parametrize("by", ["flag", "moved"])
def test_run_is_resumed_on_moved_pictures(run_on_csv, by):
    Path("elsewhere").mkdir()
    for name in "pairs.csv", "photos":
        shutil.move(name, "elsewhere")
    if by == "flag":
        cgap.main(["--resume", "run", "--data", "elsewhere/pairs.csv"])
    else:
        cgap.resume("run", quiet=True, moved={"data": "elsewhere/pairs.csv"})
    assert records("run")[-1]["step"] == 2
    cgap.resume("run", quiet=True)  # it now knows where they are

def struck(argv, number, n, log):
    """In a process of its own: the command, which gets this signal just before its n-th checkpoint
    takes the place of the last one; what it says goes into the file `log`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    replace_file, drafts = os.replace, []
    def replace_or_die(draft, path):
        drafts.append(draft)
        if len(drafts) == n:
            os.kill(os.getpid(), number)
        replace_file(draft, path)
    os.replace = replace_or_die
    sys.exit(cgap.main(argv))

def exit_code(target, *args):
    process = PROCESSES.Process(target=target, args=args, daemon=True)
    process.start()
    process.join(PATIENCE)
    return process.exitcode

def result(run):
    """metrics.jsonl, and the bytes of the weights."""
    weights = cgap.load_run(run)["model"].items()
    return records(run), {name: weight.numpy().tobytes() for name, weight in weights}

@posix
def test_killed_run_ends_as_one_never_interrupted(tmp_path, finished):
    run, log = tmp_path / "run", tmp_path / "log"
    for argv, n, kept in (flags(**RUN, out=run), 3, 2), (["--resume", str(run)], 4, 8):
        assert exit_code(struck, argv, signal.SIGKILL, n, log) == -signal.SIGKILL
        assert cgap.load_run(run)["history"][-1]["step"] == kept
        assert len([*run.glob("*.tmp")]) == 1  # the draft of the one that was killed
    expected = result(finished("one")[0])
    for _ in range(2):  # also where nothing is left to do
        cgap.resume(run, quiet=True)
        assert result(run) == expected
    assert not [*run.glob("*.tmp")]

@posix
def test_ctrl_c_ends_a_run_with_advice(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    assert exit_code(struck, flags(**RUN, out=run), signal.SIGINT, 2, log) == 130
    text = log.read_text()
    assert "Traceback" not in text and f"--resume {run} " in text.splitlines()[-1]

def test_ctrl_c_while_figures_are_drawn_ends_with_advice(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(cgap, "plot_runs", interrupt)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
        cgap.main(flags(**ONE_STEP, out="run"))
    assert end.type is SystemExit and end.value.code == 130
    assert "--resume run " in capsys.readouterr().err.splitlines()[-1]

# -- 6. Numbers of short runs, kept: what changes them has changed the experiment ------------------
SHORT = dict(steps=3, eval_every=1, limit=64, batch=16, image_size=16, seed=3, device="cpu",
             lr=3e-3)  # a high rate and a strong decay, so that little changes show
SHORT_RUNS = {"CLIP": {}, "CUA": dict(unif=1.0, align=1.0, weight_decay=30.0),
              "CUAXU": dict(unif=1.0, align=1.0, xunif=1.0, center=True, temperature=0.07),
              "learned T": dict(learn_temperature=True, mismatch=0.2, temperature=0.1),
              "images": dict(same_modality=True, remove_gap=True, dim=8)}
ENDS = ["centroid_distance", "margin"]
# train_loss after each of three steps, then both ENDS, then zero_shot
KEPT = {"CLIP": [12.961, 7.7464, 6.5653, 1.1329, 0.0077209, 0.021875],
        "CUA": [13.682, 8.7289, 7.371, 1.0724, 0.0078224, 0.021875],
        "CUAXU": [-5.7971, -5.4262, -5.3863, 0.20294, 0.2011, 0.040625],
        "learned T": [2.1879, 2.1284, 2.1611, 1.2026, 0.017446, 0.025],
        "images": [26.996, 14.716, 13.093, 1.0265, 0.001121, 0.0]}
KEPT_POINTS = {"centroid_distance": 0.47243, "unif": -1.6147, "margin": 0.30447,
               "overlap": 0.77554}
KEPT_PIXELS = 127.70986
KEPT_CAPTIONS = ["a cyan square left of a green cross", "a yellow triangle above a cyan triangle",
                 "a red square left of a red square"]

def test_golden_scenes():
    data = cgap.scene_data(Config(limit=64, image_size=16, seed=3))
    assert data.training.images.double().mean().item() == pytest.approx(KEPT_PIXELS, rel=1e-4)
    assert [words(row[0], data.vocab) for row in data.training.texts[:3]] == KEPT_CAPTIONS

@pytest.mark.parametrize("name", SHORT_RUNS)
def test_golden_runs(name):
    history = cgap.train(Config(**SHORT | SHORT_RUNS[name]), quiet=True)
    *kept, zero_shot = KEPT[name]
    got = [record["train_loss"] for record in history[1:]] + [history[-1][end] for end in ENDS]
    assert got == pytest.approx(kept, rel=1e-3), f"now {got}"
    assert history[-1].get("zero_shot", 0) == pytest.approx(zero_shot, abs=0.005)

def test_golden_points():
    end = cgap.smallest_gap(n=128, steps=20)[0][-1]
    assert {name: end[name] for name in KEPT_POINTS} == pytest.approx(KEPT_POINTS, rel=1e-3)

# -- 7. A GPU, where there is one ------------------------------------------------------------------
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_script_runs_on_a_gpu():
    def script(*argv, launcher=()):
        return subprocess.run([sys.executable, *launcher, cgap.__file__, *argv], timeout=PATIENCE,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    def finish(*argv):
        process = script(*argv)
        assert process.returncode == 0, process.stderr
    settings = RUN | {"device": "cuda"}
    finish(*flags(**settings, out="run"))
    assert records("run")[-1]["train_loss"] < records("run")[0]["train_loss"]
    for steps, device in (20, []), (24, ["--device", "cpu"]):
        lengthen("run", steps)
        finish("--resume", "run", *device)
        assert records("run")[-1]["step"] == steps
        assert_figures(Path("run"))
    process = script(*flags(**settings, out="many"),
                     launcher=torchrun(torch.cuda.device_count() + 1))
    errors = re.findall("^cgap.py: error: device cuda:.*$", process.stderr, re.M)
    assert process.returncode and len(errors) == 1 and not Path("many").exists(), process.stderr

# -- 8. The pages and the claims -------------------------------------------------------------------
HERE = Path(cgap.__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
sys.path.append(str(HERE / "figures"))
TINY = dict(steps=1, limit=64, batch=16, image_size=8, dim=8, device="cpu")

@pytest.mark.parametrize("page", ["README.md", "figures/README.md"])
def test_links_and_pictures_of_the_pages_exist(page):
    path = HERE / page
    for target in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        text = linked.read_text(encoding="utf-8") if anchor else ""
        headings = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
                    for heading in re.findall(r"^#+ (.*)$", text, re.M)]
        assert not anchor or f'id="{anchor}"' in text or anchor in headings, target

def code_blocks(language):
    """The code blocks of the README in a language, without their indentation."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", README, flags=re.M | re.S)
    return [textwrap.dedent(code) for _, code in blocks]

COMMANDS = [line.split("#")[0].removeprefix("python cgap.py").strip() for line
            in "".join(code_blocks("bash")).splitlines() if line.startswith("python cgap.py")]

@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_readme_runs(monkeypatch, capsys, command):
    given = [flag for flag in command.split() if flag not in ("--device", "cuda")]
    write_csv()
    for name in [flag for flag in given if flag.startswith("runs/")]:
        cgap.train(Config(**TINY, out=name), quiet=True)
    for slow in "animate", "plot_clouds", "plot_metrics", "scene_tasks":  # tested elsewhere
        monkeypatch.setattr(cgap, slow, lambda *args: None)
    if "--points" in given:
        given += ["--steps", "2"]
    elif not {"--resume", "--plot"} & {*given}:
        given += flags(**TINY, out="runs/new")
    cgap.main(given)
    assert "error" not in capsys.readouterr().err

@pytest.mark.parametrize("number", range(len(code_blocks("python"))))
def test_python_of_the_readme_runs(monkeypatch, number):
    train = cgap.train
    for out in "runs/RUN", "runs/gap":
        cfg = Config(**TINY, out=out)
        train(cfg, quiet=True)
    for name in "clip_loss", "cgap_loss":
        monkeypatch.setattr(cgap, name, getattr(cgap, name))  # undone, as exercises replace them
    monkeypatch.setattr(cgap, "train", lambda cfg, **own: train(replace(cfg, **TINY), **own))
    Image.new("RGB", (9, 9)).save("photo.jpg")
    for file in "images.pt", "texts.pt":
        torch.save(torch.randn(200, 8), file)
    data = cgap.load_data(cfg)
    names = {"model": cgap.TwoEncoders(cfg, len(data.vocab)), "cgap_loss": cgap_loss,
             "images": data.training.images, "texts": data.training.texts,
             "held_out_images": data.held_out.images, "held_out_texts": data.held_out.texts,
             "image_encoder": lambda images: torch.randn(len(images), 8),
             "text_encoder": lambda texts: torch.randn(len(texts), 8),
             **dict(zip("xy", make_directions(20, 8, 1))), "T": 0.1, "i": torch.arange(20), "F": F}
    exec(code_blocks("python")[number], names)
    if "loss_in_strips" in names:  # the solution of an exercise
        args = *make_clouds(100, 8, 1), 0.05, 1, 2, 3, True
        assert_close(with_gradients(names["loss_in_strips"], *args),
                     with_gradients(cgap_loss, *args), 1e-9)

def test_gallery_is_made_of_its_prose_and_the_results():
    import claims, records, tables
    found = records.read_results(HERE / "figures/results.json")
    rows = {name: records.rows_of(claim, name, found) for name, claim in claims.CLAIMS.items()}
    page = tables.gallery(HERE / "figures/gallery.md", claims.CLAIMS, rows)
    assert page == (HERE / "figures/README.md").read_text(encoding="utf-8")

def slow_best_temperature(x, y, batch):
    """The definition, one batch and one temperature after the other, in the order of the rows."""
    x, y = (F.normalize(z - z.mean(0), dim=1) for z in (x, y))
    losses = {}
    for k in range(47):
        T = 10 ** (-k / 20)
        losses[T] = sum(cgap.clip_loss(x[i:i + batch], y[i:i + batch], T)
                        for i in range(0, len(x) - batch + 1, batch))
    return min(losses, key=losses.get)

@pytest.mark.parametrize("noise", [0.01, 0.3, 1.0, 5.0])
def test_best_temperature_is_that_of_the_least_loss(noise):
    from heads import best_temperature
    x = F.normalize(draw(150, 8), dim=1)
    y = F.normalize(x + noise * draw(150, 8, seed=1), dim=1)
    apart = F.normalize(x - 9 * x[:1], dim=1)
    got = best_temperature(3 * apart, y, batch=200)  # a batch that takes all there are
    assert got == pytest.approx(slow_best_temperature(apart, y, 150))
    ratio = best_temperature(x, y, 30) / slow_best_temperature(x, y, 30)
    assert 0.89 < ratio < 1.13  # a step apart, as the batches are others

def test_best_temperature_does_not_depend_on_the_order_of_rows():
    from heads import best_temperature
    centres = F.normalize(draw(4, 16), dim=1).repeat_interleave(64, 0)  # sorted by class
    x, y = centres + 0.15 * draw(256, 16, seed=1), centres + 0.15 * draw(256, 16, seed=2)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(3))
    assert 0.79 < best_temperature(x, y) / best_temperature(x[order], y[order]) < 1.26
    assert slow_best_temperature(x, y, 64) > 1.5 * slow_best_temperature(x[order], y[order], 64)

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_best_temperature_of_ties_is_the_lowest(dtype):
    import heads
    x = torch.eye(64, dtype=dtype)  # all pairs are found with certainty at low T
    assert heads.best_temperature(x, x) == pytest.approx(10 ** -2.3)

def test_heads_are_trained_on_saved_features(monkeypatch, capsys):
    import heads
    torch.save(draw(400, 12).half(), "images.pt")
    np.save("texts.npy", draw(400, 3, 7, seed=1).half().numpy())
    monkeypatch.setattr(sys, "argv", "heads.py images.pt texts.npy --losses CUA --temperatures 0.1 "
                        "learned --steps 2 --batch 32 --device cpu".split())
    heads.main()
    *_, fixed, learned = capsys.readouterr().out.splitlines()
    assert fixed.startswith("|CUA, T") and fixed.count("|") == learned.count("|") > 9
