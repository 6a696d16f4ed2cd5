# SPDX-License-Identifier: MIT
"""Tests of cgap.py: `python -m pytest -q`. First closed forms and slow independent references for
every loss and metric, then the parts of a run one by one, then the real script as a user runs it.
"""
import csv
import functools
import importlib
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
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # threads that share so little work only wait for each other
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cgap
from cgap import Config, Data, Pairs, UserError, cgap_loss, gap_metrics

GAP = ("linear_separability linear_separability_c100 centroid_distance unif align xunif margin "
       "spread agreement overlap").split()
SEARCHES = "i2t_r1 t2i_r1 mixed_i2t mixed_t2i".split()
TASKS = "zero_shot zero_shot_unseen arithmetic_attribute arithmetic_relation".split()
RECORD = ["step", "train_loss", "train_clip", "temperature", "best_temperature", *GAP, *SEARCHES,
          *TASKS]
ROWS = [(0, 0, 0, False), (1, 1, 0, True), (0.3, 0, 2, False), (1, 1, 1, False)]  # of weights
PATIENCE = 300  # seconds at most, for what takes a few on an idle machine

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PROCESSES = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":  # forks one that has imported torch: saves seconds
    PROCESSES.set_forkserver_preload(["cgap", "torch._dynamo"])

IS_OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
fake_cuda = pytest.mark.skipif(not torch.backends.cuda.is_built(),
                               reason="a PyTorch without CUDA has no fake of it")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clouds(N, D, apart):
    """Two clouds of pairs, `apart` along the first axis."""
    x = draw(N, D)
    shift = apart / 2 * F.one_hot(torch.tensor(0), D)
    return x - shift, x + draw(N, D, seed=1) + shift


def directions(N, D, apart):
    return [F.normalize(z, dim=1) for z in clouds(N, D, apart)]


def with_gradients(loss, x, y, T, *weights):
    """[the loss, its gradients for x, y and T] as float64."""
    inputs = [z.detach().clone().requires_grad_() for z in (x, y, torch.tensor(T, dtype=x.dtype))]
    value = loss(*inputs, *weights)
    gradients = torch.autograd.grad(value, inputs)
    return [z.detach().double() for z in (value, *gradients)]


def assert_close(got, expected, tolerance):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def spy(monkeypatch, owner, name, note):
    """From now on owner.name also appends note(*its arguments) to the list that is returned."""
    real, notes = getattr(owner, name), []

    @functools.wraps(real)
    def spied(*args, **settings):
        notes.append(note(*args, **settings))
        return real(*args, **settings)

    monkeypatch.setattr(owner, name, spied)
    return notes


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """In tmp_path, with caches beside it."""
    monkeypatch.chdir(tmp_path)
    for home in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(home, f"{tmp_path}-home")


# ==================================================================================================
# 1. The loss and the measures: closed forms and slow independent references
# ==================================================================================================
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


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 5e-5), (torch.float64, 1e-9), (torch.bfloat16, 0.01)])
def test_the_loss_and_its_gradients_equal_the_definitions(dtype, tolerance):
    for weights, (N, copies) in itertools.product(ROWS, [(3, 0), (64, 9)]):
        x, y = (z.to(dtype) for z in clouds(N, 16, 2))
        x[:copies], y[:copies] = x[N - 1], y[N - 1]  # duplicate rows
        got, expected = (with_gradients(loss, x, y, 0.05, *weights)
                         for loss in (cgap_loss, paper_loss))
        assert_close(got, expected, tolerance)
        assert cgap_loss(x, y, 0.05, *weights).dtype == torch.promote_types(dtype, torch.float32)


def test_the_terms_equal_the_definitions():
    x, y = directions(50, 6, 1)
    unif = (cgap.uniformity(x, x) + cgap.uniformity(y, y)) / 2
    assert_close({"clip": cgap.clip_loss(x, y, 0.05), "align": cgap.alignment(x, y), "unif": unif,
                  "xunif": cgap.uniformity(x, y)}, paper_terms(x, y, 0.05), 1e-9)


def test_uniformity_is_exact_where_exponentials_vanish():
    opposite = torch.tensor([[1.0], [-1.0]])
    assert cgap.uniformity(opposite, opposite, t=50).item() == pytest.approx(-200)


def test_a_term_without_weight_is_not_computed(monkeypatch):
    x, y = clouds(9, 4, 1)
    made = spy(monkeypatch, cgap, "uniformity", lambda a, b: "uniformity")
    made_too = spy(monkeypatch, cgap, "alignment", lambda a, b: "alignment")
    for unif, align, xunif, uniformities in (0, 0, 0, 0), (1, 0, 0, 2), (0, 1, 0, 0), (0, 0, 1, 1):
        made.clear(), made_too.clear()
        cgap_loss(x, y, 0.1, unif, align, xunif)
        assert (len(made), len(made_too)) == (uniformities, align)


def test_a_number_that_is_no_temperature_raises_value_error():
    for temperature in (100, 1.5, 0, 0.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=f"1 / T: it is {temperature}"):
            cgap_loss(*clouds(9, 4, 1), temperature)


@pytest.fixture
def pasted():
    """Section 1 alone, as someone pastes it into a project of theirs."""
    text = Path(cgap.__file__).read_text(encoding="utf-8")
    Path("pasted.py").write_text(text.split("# -- 1. ")[1].split("# -- 2. ")[0].partition("\n")[2])
    return runpy.run_path("pasted.py")


def test_the_loss_is_the_same_pasted_elsewhere_and_under_autocast(pasted):
    args = *(z.float() for z in clouds(40, 8, 1)), 0.05, 1, 2, 3, True
    for loss in pasted["cgap_loss"], torch.autocast("cpu", torch.bfloat16)(cgap_loss):
        assert_close(with_gradients(loss, *args), with_gradients(cgap_loss, *args), 1e-5)


def test_the_loss_is_the_same_traced_for_a_compiler():
    torch._dynamo.reset()
    compiled = torch.compile(cgap_loss, backend="aot_eager")  # traced, but not built in C++
    for weights in ROWS[0], ROWS[3]:  # seconds each
        args = *(z.float() for z in clouds(40, 8, 1)), 0.05, *weights
        assert_close(with_gradients(compiled, *args), with_gradients(cgap_loss, *args), 1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_the_loss_is_the_same_compiled():
    torch._dynamo.reset()
    args = *(z.float() for z in clouds(40, 8, 1)), 0.05
    assert_close(with_gradients(torch.compile(cgap_loss), *args),
                 with_gradients(cgap_loss, *args), 1e-4)


def test_the_loss_is_not_compiled_anew_for_each_size_of_a_batch():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(cgap_loss, backend="eager")
    for N in range(5, 15):
        compiled(*(z.float() for z in clouds(N, 8, 1)), 0.05, 1, 1, 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


# All that takes raw embeddings of pairs; the last five, which measure, look at every row.
MEASURES = {"cgap_loss": lambda x, y: cgap_loss(x, y, 0.07, 1, 1, 1, True),
            "uniformity": cgap.uniformity, "gap_metrics": gap_metrics,
            "linear_separability": cgap.linear_separability,
            "best_temperature": cgap.best_temperature,
            "recall": cgap.recall, "mixed_recall": cgap.mixed_recall}


def numbers(result):
    """What a measure returns, be it a number, a list or a dict, as a tensor."""
    return torch.as_tensor([*result.values()] if isinstance(result, dict) else result).double()


def test_embeddings_may_be_of_any_type():
    types = [torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.int,
             torch.Tensor.numpy, torch.Tensor.tolist, lambda z: z.int().tolist(),
             lambda z: z.numpy().astype(np.float16)]
    x, y = ((9 * z).round() for z in directions(60, 6, 1))  # whole numbers, exact in all types
    for measure, convert in itertools.product(MEASURES.values(), types):
        expected = numbers(measure(x, y))
        assert expected.isfinite().all()
        assert_close(numbers(measure(convert(x), convert(y))), expected, 1e-5)
        assert_close(numbers(measure(convert(x), y)), expected, 1e-5)


def test_what_is_not_a_row_for_each_pair_raises_value_error():
    x = draw(20, 4)
    wrong = [(x, other) for other in (x.repeat_interleave(5, 0), x[1:], x[:, 1:], x[0])]
    wrong += [(same, same) for same in (x[:1], x[0], x[None])]
    for measure, pair in itertools.product(MEASURES.values(), wrong):
        with pytest.raises(ValueError, match="x and y must both be"):
            measure(*pair)


def test_a_row_without_a_direction_is_named():
    for name, side, value in itertools.product([*MEASURES][2:], (0, 1), (math.nan, math.inf, 0)):
        pair = clouds(20, 4, 1)
        pair[side][3] = value
        with pytest.raises(ValueError, match="row 3 .* 1 of 20"):
            MEASURES[name](*pair)


def test_too_few_rows_or_dimensions_to_measure_raise_value_error():
    for measure in gap_metrics, cgap.linear_separability:
        for shape in (4, 3), (6, 1):
            with pytest.raises(ValueError, match="x and y must be"):
                measure(torch.ones(shape), torch.ones(shape))


def test_gap_metrics_equal_their_definitions(monkeypatch):
    x, y = directions(60, 6, 1)
    terms = {name: term for name, term in paper_terms(x, y, 1).items() if name != "clip"}
    strangers = sum(x[i] @ y[j] for i in range(60) for j in range(60) if i != j) / (60 * 59)
    margin = (x * y).sum(1).mean() - strangers
    spread = math.sqrt(x.var(0).sum() * y.var(0).sum())
    both = [np.cov(z.numpy().T).flatten() for z in (x, y)]
    expected = {"centroid_distance": math.dist(x.mean(0), y.mean(0)),
                "linear_separability": cgap.linear_separability(x, y),
                "linear_separability_c100": cgap.linear_separability(x, y, C=100), **terms,
                "margin": margin, "spread": spread, "agreement": margin / spread,
                "overlap": both[0] @ both[1] / math.prod(map(np.linalg.norm, both))}
    strengths = spy(monkeypatch, cgap, "fit_logistic", lambda z, labels, C: C)
    got = gap_metrics(7 * x.float(), y.float() / 3)
    assert strengths == [1, 100]
    assert list(got) == GAP and all(type(value) is float for value in got.values())
    assert got == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-5)


def test_gap_metrics_at_their_ends():
    one, point = draw(30, 4), torch.ones(30, 8).double()
    x, y = F.pad(one, (0, 4)), F.pad(draw(30, 4, seed=1), (4, 0))  # directions of their own
    for pair, expected in (((x, x), {"agreement": 1, "overlap": 1, "align": 0}),
                           ((x, y), {"overlap": 0, "margin": 0, "align": 2}),
                           ((x, -x), {"agreement": -1, "overlap": 1, "align": 4}),
                           ((point, -point), {"spread": 0, "margin": 0, "agreement": 0,
                                              "overlap": 0, "centroid_distance": 2, "unif": 0}),
                           ((point, x), {"spread": 0, "margin": 0, "agreement": 0, "overlap": 0})):
        got = gap_metrics(*pair)
        assert all(map(math.isfinite, got.values()))
        assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_the_classifier_is_at_its_minimum():
    z = F.pad(torch.cat(clouds(200, 5, 1)), (0, 1), value=1.0)
    labels = torch.arange(2).repeat_interleave(200).double()
    for C in 1, 100:
        w = cgap.fit_logistic(z, labels, C).requires_grad_()
        error = F.binary_cross_entropy_with_logits(z @ w, labels, reduction="sum")
        gradient = torch.autograd.grad(w[:-1] @ w[:-1] / 2 + C * error, w)[0]
        assert gradient.abs().max() < 1e-6 * C  # convex: this is its minimum


def test_separability_is_the_accuracy_on_held_out_pairs():
    separability = cgap.linear_separability
    assert separability(*directions(500, 5, 20)) == 1
    assert 0.4 <= separability(*directions(500, 5, 0)) <= 0.6
    # These 80 pairs can be told apart without an error: only those that are held out tell.
    assert 0.2 <= separability(*directions(100, 300, 0), C=100) <= 0.7


def slow_best_temperature(x, y, batch):
    """The definition, one batch and one temperature after the other."""
    x, y = (F.normalize(z - z.mean(0), dim=1) for z in (x, y))
    losses = {}
    for k in range(47):
        T = 10 ** (-k / 20)
        losses[T] = sum(cgap.clip_loss(x[i:i + batch], y[i:i + batch], T)
                        for i in range(0, len(x) - batch + 1, batch))
    return min(losses, key=losses.get)


def test_the_best_temperature_is_that_of_the_least_loss_without_the_means():
    found = []
    for noise in (0.01, 0.3, 1.0, 5.0):
        x = F.normalize(draw(150, 8), dim=1)
        y = F.normalize(x + noise * draw(150, 8, seed=1), dim=1)
        found.append(cgap.best_temperature(3 * x, y, batch=40))
        assert found[-1] == pytest.approx(slow_best_temperature(x, y, 40))
        apart = F.normalize(x - 9 * x[:1], dim=1), y
        expected = slow_best_temperature(*apart, 150)  # a batch of 200 takes all there are
        assert cgap.best_temperature(*apart, batch=200) == pytest.approx(expected)
    assert found == sorted(found) and found[0] < found[2] < found[3] <= 1  # the noisier, the warmer


def slow_search(x, y, group):
    """For x_i among all y: R@1 by group; and the same among all y and the x of other groups."""
    hits = torch.zeros(2)
    for i, own in enumerate(group):
        cosine, right = max(zip((y @ x[i]).tolist(), (group == own).tolist()))
        strangers = (x @ x[i])[group != own].tolist()
        hits += torch.tensor([right, right and cosine > max(strangers)])
    return (hits / len(x)).tolist()


def slow_searches(x, y, group):
    """The four in their order: both R@1, then both mixed."""
    (i2t, mixed_i2t), (t2i, mixed_t2i) = slow_search(x, y, group), slow_search(y, x, group)
    return [i2t, t2i, mixed_i2t, mixed_t2i]


def test_search_finds_any_caption_of_the_group():
    for group in torch.arange(40), torch.arange(40) % 7:
        x, y = directions(40, 4, 0)
        if group[7] == group[0]:
            y[7:14] = y[:7]  # equal captions are equally right
        expected = slow_searches(x, y, group)
        for given in group, group.tolist(), group.numpy():
            got = cgap.recall(7 * x, y, given) + cgap.mixed_recall(7 * x, y, given)
            assert got == pytest.approx(expected)
    assert cgap.recall(x, y) == cgap.recall(x, y, range(40)) != cgap.recall(x, y, torch.zeros(40))
    for search in cgap.recall, cgap.mixed_recall:
        for wrong in range(39), range(41), torch.zeros(40, 1), 0:
            with pytest.raises(ValueError, match="group must be"):
                search(x, y, wrong)


def test_search_in_both_modalities_at_once_feels_a_gap_that_search_across_does_not():
    x = F.normalize(draw(40, 4), dim=1)
    apart = F.pad(x, (0, 1), value=3.0), F.pad(x, (0, 1), value=-3.0)
    assert cgap.recall(*apart) == [1, 1] and cgap.mixed_recall(*apart) == [0, 0]


def test_the_exercise_of_the_readme_computes_the_loss_in_strips():
    readme = Path(cgap.__file__).with_name("README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```", readme, flags=re.S | re.M)
    (code,) = [block for _, block in blocks if "def loss_in_strips" in block]
    Path("solution.py").write_text(textwrap.dedent(code))
    loss_in_strips = runpy.run_path("solution.py")["loss_in_strips"]
    x, y = (z.requires_grad_() for z in clouds(100, 8, 1))
    strips = loss_in_strips(x, y, 0.05, 1, 2, 3, True, 30)
    gradients = torch.autograd.grad(strips, (x, y))
    assert_close([strips.detach(), *gradients],
                 with_gradients(cgap_loss, x, y, 0.05, 1, 2, 3, True)[:3], 1e-9)


# ==================================================================================================
# 2. The smallest gap, encoders, a step of training
# ==================================================================================================
def test_the_smallest_gap_takes_a_fast_offset_and_a_cold_loss_or_wrong_pairs():
    for settings, is_open in (({}, True), ({"offset": 0.0}, False), ({"offset": 1 / 64}, False),
                              ({"unif": 1.0, "align": 1.0}, False), ({"temperature": 0.2}, False),
                              ({"temperature": 0.2, "mismatch": 0.9}, True)):
        history, _ = cgap.smallest_gap(n=256, steps=60, **settings)
        start, *_, end = [record["linear_separability"] for record in history]
        assert start < 0.6 and (0.9 < end if is_open else 0.35 < end < 0.65)
        assert list(history[-1]) == ["step", *GAP, "mixed_i2t", "mixed_t2i"]


def test_the_smallest_gap_keeps_the_clouds_that_it_has_measured():
    history, kept = cgap.smallest_gap(n=64, steps=7, dim=16)
    assert [record["step"] for record in history] == list(kept) == [0, 1, 2, 5, 7]
    for record in history:
        x, y = kept[record["step"]]
        assert_close(kept[record["step"]].norm(dim=2), torch.ones(2, 64), 1e-5)
        expected = {**gap_metrics(x, y), **dict(zip(SEARCHES[2:], cgap.mixed_recall(x, y)))}
        assert record == pytest.approx({"step": record["step"], **expected}, abs=1e-5)


def test_offsets_need_not_be_pushed_apart_to_part_the_clouds():
    def at_random(step, gradient):
        assert gradient.shape == (2, 1, 128)
        return torch.randn_like(gradient)

    def together(step, gradient):
        return gradient.mean(0, keepdim=True).expand_as(gradient).clone()

    parted, alike = ([record["linear_separability"] for record in
                      cgap.smallest_gap(n=256, steps=20, steer=steer)[0]]
                     for steer in (at_random, together))
    assert parted[0] < 0.65 and parted[2] > 0.95  # after two steps
    assert max(alike) < 0.65


def test_a_share_of_the_pairs_is_mismatched():
    for n, share, changed in ((10, .15, 2), (100, .29, 29), (10, .01, 2), (10, 0, 0), (10, 1, 10)):
        partner = cgap.mismatched(n, share)
        assert sorted(partner.tolist()) == list(range(n))
        assert (partner != torch.arange(n)).sum() == changed
        assert torch.equal(partner, cgap.mismatched(n, share))


def test_wrong_pairs_are_spread_over_an_epoch_and_others_for_another_seed():
    choices = []
    for seed in range(4):
        wrong = cgap.mismatched(1000, 0.2, seed) != torch.arange(1000)
        for part in cgap.epoch_order(0, 1000, seed).split(200):
            assert wrong[part].float().mean().item() == pytest.approx(0.2, abs=0.12)
        choices.append(wrong)
    assert len(torch.stack(choices).unique(dim=0)) == 4


def encoders(**settings):
    torch.manual_seed(0)
    return cgap.TwoEncoders(Config(dim=8, **settings), vocab=20)


def inputs(n):
    images = torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8)
    return images, torch.randint(1, 20, (n, 6), dtype=torch.int32)


def test_an_embedding_does_not_depend_on_batch_or_padding_but_on_the_order_of_words():
    model, (images, texts) = encoders(), inputs(5)
    texts[0, 4:] = 0
    for encoder, batch, alone in ((model.image, images, images[:1]),
                                  (model.text, texts, texts[:1, :4])):
        assert_close(encoder(batch)[:1], encoder(alone), 1e-5)
    assert not torch.allclose(model.text(texts[1:].flip(1)), model.text(texts[1:]), atol=1e-2)


def test_removing_the_initial_gap_moves_the_second_cloud_onto_the_first():
    model, (images, texts) = encoders(), inputs(90)
    x, y = cgap.encode(model.image, images), cgap.encode(model.text, texts)
    cgap.remove_initial_gap(model, images, texts)
    moved = cgap.encode(model.text, texts)
    a, b = x - x.mean(0), moved - moved.mean(0)
    assert_close([cgap.encode(model.image, images), moved.mean(0), b.norm()],
                 [x, x.mean(0), a.norm()], 1e-5)
    ratio = F.pdist(moved) / F.pdist(y)  # it moves as a whole
    assert ratio.max() / ratio.min() < 1.001
    assert_close(b.T @ a, a.T @ b, 1e-4)  # symmetric, positive if the rotation is best
    assert torch.linalg.eigvalsh(b.T @ a).min() > -1e-4


def test_the_optimizer_is_fused_and_decays_matrices_only():
    model = encoders()
    optimizer = cgap.make_optimizer(model, Config())
    groups = optimizer.param_groups
    assert optimizer.defaults["fused"] and len(groups) == 2
    assert {p: group["weight_decay"] for group in groups for p in group["params"]} == {
        p: 0.1 * (p.ndim > 1) for p in model.parameters() if p.requires_grad}


def test_the_learning_rate_warms_up_over_a_tenth_and_falls_as_a_cosine():
    rates = [cgap.learning_rate(step, Config(steps=1000, lr=2.0)) for step in range(1000)]
    cosine = [1 + math.cos(math.pi * step / 1000) for step in range(1000)]
    assert rates[:90] == pytest.approx([0.02 * (step + 1) for step in range(90)])
    assert rates[100:] == pytest.approx(cosine[100:])


def test_each_epoch_holds_each_pair_once_in_an_order_of_its_own_with_other_captions():
    images = torch.arange(14)
    texts = images[:, None, None] + torch.tensor([[[0], [100]]])  # (14, 2, 1)
    pairs, orders = Pairs(images[:, None], texts), []
    for seed in (0, 1):
        for step in range(6):  # what is left of an epoch is dropped
            cfg = Config(batch=4, seed=seed)
            batch, captions = cgap.next_batch(pairs, step, cfg, torch.device("cpu"))
            assert torch.equal(captions - batch, torch.full((4, 1), 100 * (step // 3)))
            orders.append(batch)
    orders = torch.cat(orders).view(4, 12)
    assert len(orders.unique(dim=0)) == 4 and all(len(order.unique()) == 12 for order in orders)


class Operations(TorchDispatchMode):
    """Counts what PyTorch is called for, under a name for each part."""
    def __init__(self):
        super().__init__()
        self.counts, self.part = Counter(), ""
    def __torch_dispatch__(self, operation, types, args=(), settings=None):
        self.counts[self.part] += 1
        return operation(*args, **settings or {})


def test_a_step_of_training_calls_for_few_operations():
    cfg, device = Config(unif=1.0, align=1.0, limit=200, image_size=8), torch.device("cpu")
    data = cgap.load_data(cfg)
    model = cgap.TwoEncoders(cfg, len(data.vocab))
    optimizer = cgap.make_optimizer(model, cfg)
    for step in range(2):  # the first also makes the optimizer's state
        with Operations() as operations:
            operations.part = "batch"
            batch = cgap.next_batch(data.train, step, cfg, device)
            operations.part = "forward"
            x, y, T = model(*batch)
            operations.part = "loss"
            loss = cgap_loss(cgap.gather(x), cgap.gather(y), T, **cfg.loss_settings())
            operations.part = "backward"
            optimizer.zero_grad()
            loss.backward()
            operations.part = "step"
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    most = 480 if IS_OLD else 440  # an older backward has more
    assert sum(operations.counts.values()) <= most, operations.counts


def test_an_evaluation_measures_each_thing_where_it_belongs(monkeypatch):
    monkeypatch.setattr(cgap, "encode", lambda encoder, z: z)
    asked = spy(monkeypatch, Pairs, "batch", lambda self, i: i)
    group = torch.arange(30) % 9  # equal captions
    y = F.normalize(draw(9, 4), dim=1)[group]
    x = F.normalize(y + 0.8 * draw(30, 4, seed=2) + 0.3, dim=1)
    e = torch.eye(4)
    # e0 + e1 - old is nearest to e0, the query itself, and then to e1; e0 + e2 - old to e2
    old = (0.6 * e[[1]] + 0.8 * e[[3]]).expand(10, 4)
    new = e[[1, 2, 2, 2, 1, 1, 2, 2, 1, 1]]
    tasks = cgap.Tasks(e[[0, 1, 2, 3, 1]], torch.tensor([0, 1, 2, 3, 0]),
                       torch.tensor([False] * 3 + [True] * 2), e, e, torch.tensor([0] * 10), old,
                       new, e[[1] * 10].bool())
    data = Data(Pairs(-x, y[:, None]), Pairs(x, y[:, None], group[:, None]), {}, tasks)
    cfg = Config(batch=6, unif=3.0, mismatch=0.3)
    order = cgap.epoch_order(0, 30, cfg.seed)[:6]
    partner = cgap.mismatched(30, 0.3, cfg.seed)  # as wrong as in training
    expected = {"train_loss": paper_loss(-x[order], y[order], 0.02, 3), "temperature": 0.02,
                "train_clip": paper_terms(-x[order], y[order], 0.02)["clip"],
                "best_temperature": slow_best_temperature(x, y[partner], 6), **gap_metrics(x, y),
                **dict(zip(SEARCHES, slow_searches(x, y, group))),
                **dict(zip(TASKS, [4 / 5, 1 / 2, 3 / 8, 1]))}
    record = cgap.evaluate(encoders(temperature=0.02), data, cfg)
    assert list(record) == RECORD[1:]
    assert record == pytest.approx({name: float(value) for name, value in expected.items()})
    assert [list(i) if torch.is_tensor(i) else i for i in asked] == [list(order), slice(5000)]


# ==================================================================================================
# 3. Data: scenes, words, photographs
# ==================================================================================================
def test_another_seed_draws_other_scenes():
    images = [cgap.scene_data(Config(limit=50, image_size=8, seed=seed)).train.images
              for seed in (1, 2)]
    assert not torch.equal(*images)


def test_pictures_show_what_their_captions_say():
    for relation, (shape, name) in itertools.product((0, 1), enumerate(cgap.SHAPES)):
        spelled, axis = [("left of", 3), ("above", 2)][relation]
        scenes = torch.tensor([[0, shape, 2, shape, relation]] * 20)
        assert cgap.describe(scenes) == [f"a red {name} {spelled} a blue {name}"] * 20
        halves = cgap.draw_scenes(scenes, 32).float().split(16, axis)
        near, far = ((half[:, 0] - half[:, 2]).mean() for half in halves)
        assert near > 10 and far < -10


def test_unseen_combinations_do_not_occur():
    scenes = cgap.random_scenes(20_000, 0.3)
    assert (scenes[:, 4] < 0).double().mean().item() == pytest.approx(0.3, abs=0.02)
    colours, shapes = scenes[:, :4].reshape(-1, 2).unique(dim=0).T
    assert len(shapes) == 40 and (colours % 6 != shapes).all()


def words(row, vocab):
    return " ".join(list(vocab)[k] for k in row if k)


def test_tasks_ask_for_what_is_there_and_for_the_scene_with_one_word_changed(monkeypatch):
    monkeypatch.setattr(cgap, "draw_scenes", lambda scenes, size: scenes)  # scenes, not pictures
    vocab = cgap.make_vocab([word for names in cgap.WORDS for word in ["a", *names]])
    tasks = cgap.scene_tasks(16, vocab, n=50)
    prompts = [words(row, vocab) for row in tasks.prompts]
    assert cgap.describe(tasks.images) == [prompts[k] for k in tasks.labels]
    assert len(set(prompts)) == 48
    unseen = [prompts[k] for k in tasks.labels[tasks.unseen]]
    assert len(set(unseen)) == 8 and not {*unseen} & {*cgap.describe(tasks.images[~tasks.unseen])}
    assert len(tasks.old) == len(tasks.new) == len(tasks.query) == len(tasks.correct) == 250
    for q in range(250):
        slot, source, target = q // 50, tasks.pool[tasks.query[q]], tasks.pool[50 + q]
        assert source[0] != source[2] and source[1] != source[3]  # a word names one of them
        assert (source != target).nonzero().tolist() == [[slot]]
        assert torch.equal(tasks.correct[q], (tasks.pool == target).all(1))
        assert [words(row[q], vocab) for row in (tasks.old, tasks.new)] == [
            cgap.WORDS[slot][scene[slot]] for scene in (source, target)]


def test_tokens_are_numbers_of_frequent_words_cut_and_padded():
    assert cgap.words_of("A dog's\tbowl... Überzug!") == "a dog ' s bowl . . . überzug !".split()
    vocab = cgap.make_vocab(["the cat the cat", " ".join(f"w{k}" for k in range(9_999))])
    assert list(vocab)[:3] == ["<pad>", "<unk>", "cat"] and len(vocab) == 10_002
    tokens = cgap.tokenize(["The CAT", "zebra " + "the " * 40], {"cat": 2, "the": 3})
    assert tokens.tolist() == [[3, 2] + [0] * 30, [1] + [3] * 31] and tokens.dtype == torch.int32


def test_words_of_other_scripts_stay_whole():
    for text in ("हिन्दी में एक छोटा लड़का", "தமிழ் மொழியில் ஒரு நாய்", "élève à nîmes", "一 只 狗 。"):
        expected = unicodedata.normalize("NFC", text).split()
        written = text.replace(" ", "") if text[0] == "一" else text  # Chinese has no spaces
        for form in "NFC", "NFD":
            given = unicodedata.normalize(form, written.title())
            assert cgap.words_of(given) == expected
            assert cgap.tokenize([given], cgap.make_vocab([text])).tolist() == (
                cgap.tokenize([text], cgap.make_vocab([text])).tolist())


def test_captions_are_equal_if_their_texts_are_not_if_their_tokens_are():
    captions = ["a dog", "A  DOG", "a cow", "a hen", "a dog " * 20 + "a", "a dog " * 20 + "b"]
    tokens, group = cgap.tokens_and_groups(captions, cgap.make_vocab(["a dog"]), 2)
    assert tokens.shape == (3, 2, 32) and group.shape == (3, 2)
    assert torch.equal(tokens[1, 0], tokens[1, 1]) and torch.equal(tokens[2, 0], tokens[2, 1])
    assert group[0, 0] == group[0, 1] and len(group.unique()) == 5


RED, BLUE = (200, 40, 40), (40, 40, 200)


def banner(mode="RGB", top=RED, bottom=BLUE):
    """A picture of two colours, one above the other."""
    image = Image.new(mode, (64, 64), top)
    image.paste(bottom, (0, 32, 64, 64))
    return image


TURNED = Image.Exif()
TURNED[0x0112] = 6


def test_photos_load_as_people_see_them():
    wide = banner().crop((-64, 0, 128, 64))  # black on both sides
    rgba = banner("RGBA", (*RED, 128), (*BLUE, 0))
    lying = banner().convert("CMYK").transpose(Image.Transpose.ROTATE_90)
    for name, image, exif, top, bottom in (("wide.png", wide, None, RED, BLUE),
                                           ("rgba.png", rgba, None, (227, 147, 147), (255,) * 3),
                                           ("cmyk.jpg", lying, TURNED, RED, BLUE)):
        image.save(name, exif=exif, quality=95)
        photo = cgap.load_photo(name, 16)
        assert photo.dtype == torch.uint8 and photo.shape == (3, 16, 16)
        for part, colour in (photo[:, :6, 2:-2], top), (photo[:, -6:, 2:-2], bottom):
            assert (part - torch.tensor(colour)[:, None, None]).abs().max() < 12


def test_photos_of_16_bits_look_as_those_of_8_and_others_are_named():
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp.astype(np.uint8)).save("8.png")
    for name in ("16.png", "16.tiff"):
        Image.fromarray(257 * ramp).save(name)
        assert torch.equal(cgap.load_photo(name, 16), cgap.load_photo("8.png", 16))
    for mode in ("I", "F"):
        Image.new(mode, (8, 8), 1000).save("deep.tiff")
        fault = cgap.load_pair(Path("deep.tiff"), ["a caption"], 16)
        assert fault.startswith("deep.tiff: ") and f"mode {mode} " in fault


def photos(folder, n):
    """Write n plain pictures of six shades: [(name, caption that ends with the shade)], one to
    three each."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        Image.new("L", (8, 8), 40 * (k % 6)).save(folder / f"{k}.png")
    return [(f"{k}.png", f"{'very ' * j}shade {40 * (k % 6)}")
            for k in range(n) for j in range(k % 3 + 1)]


def write_csv(pairs=None):
    """pairs.csv with these (picture, caption), or with pictures of six shades."""
    pairs = pairs or [(f"photos/{name}", text) for name, text in photos(Path("photos"), 50)]
    with open("pairs.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("image", "caption"), *pairs])
    return Path("pairs.csv")


def write_coco(**splits):
    """A folder with so many images in each split; returns the last one's annotations."""
    for split, n in splits.items():
        pairs = photos(Path("coco", split), n)
        content = {"images": [{"id": f"id {k}.png", "file_name": f"{k}.png"} for k in range(n)],
                   "annotations": [{"image_id": f"id {name}", "caption": text}
                                   for name, text in pairs]}
        file = Path(f"coco/annotations/captions_{split}.json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return file


def load(source, **settings):
    return cgap.load_data(Config(data=str(source), batch=4, image_size=8, **settings))


def assert_captions_fit(data, *sizes):
    """So many images, and each, alone a shade, has its own captions and no others."""
    seen = set()
    for part, n in zip((data.train, data.val), sizes, strict=True):
        assert len(part.images) == n
        for turn in range(5):
            images, tokens = part.batch(slice(None), turn)
            captions = [words(row, data.vocab) for row in tokens]
            shades = images.float().mean((1, 2, 3)).tolist()
            assert [int(text.split()[-1]) for text in captions] == shades
            seen |= set(captions)
    assert len(seen) == 12  # shades 0 and 3 have one caption, 1 and 4 two, 2 and 5 three


def test_coco_folders_load_their_latest_year(capsys):
    for splits, sizes in (({"train2014": 50, "val2014": 10}, (50, 10)),
                          ({"train2017": 50}, (45, 5)), ({"val2017": 10}, (50, 10))):
        write_coco(**splits)  # beside those of before
        assert_captions_fit(load("coco"), *sizes)
    assert "warning" not in capsys.readouterr().err


def test_a_csv_is_decoded_once_and_again_when_a_picture_or_the_limit_is_another(monkeypatch):
    source = write_csv()
    for limit, n in (20, 20), (0, 45):
        assert_captions_fit(load(source, limit=limit, cache="here"), n, 5)
    with monkeypatch.context() as patch:
        patch.setattr(cgap, "load_photo", None)  # the second time from the cache
        assert_captions_fit(load(source, cache="here"), 45, 5)
    for cache in Path("here").iterdir():
        cache.write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        load(source, cache="here")
    Image.new("L", (8, 8), 250).save("photos/7.png")
    assert 250 in load(source, cache="here").train.images


def test_a_csv_may_be_written_in_many_ways():
    texts = ['image,more,caption\r\na.png,1,"one, ""two""\nthree"\r\n\r\nsub/b.png,2,très bien',
             'caption,image\n"one, ""two""\nthree",a.png\ntrès bien,sub/b.png\n\n']
    for text, start in itertools.product(texts, ("", "\ufeff")):
        Path("pairs.csv").write_bytes((start + text).encode())
        assert cgap.read_csv(Path("pairs.csv")) == [(Path("a.png"), 'one, "two"\nthree'),
                                                    (Path("sub/b.png"), "très bien")]


def test_a_csv_that_cannot_be_read_is_refused(capsys):
    for content, named in ((b'image,caption\na.png,b\nb.png,"open\nc.png,d\n', ["line 3"]),
                           (b"file,text\na.png,b\n", ["image,caption", "file", "text"]),
                           (b"image;caption\na.png;b\n", ["image,caption", "image;caption"]),
                           (b"", ["image,caption"]), (b"image,caption\n", ["no picture"]),
                           (b"image,caption\na.png,b\nb.png,c, d\n", ["line 3", "fields unlike"]),
                           (b"image,caption\na.png,caf\xe9\n", ["utf-8"]),
                           (b"image,caption\na.png,b,c\n", ["line 2", "fields unlike"]),
                           (b"caption,image\na dog\n", ["line 2"])):  # a row that is too short
        Path("pairs.csv").write_bytes(content)
        assert "COCO" not in refused(capsys, ["--data", "pairs.csv"], "pairs.csv", *named)


def test_what_cannot_be_used_is_counted_named_and_left_out(capsys):
    file = write_coco(val2017=10, train2017=60)
    content = json.loads(file.read_text())
    Image.new("L", (8, 8)).save("coco/train2017/60.png")  # listed, but without a caption
    content["images"].append({"id": "60", "file_name": "60.png"})
    content["annotations"].append({"image_id": "unlisted", "caption": "shade 0"})
    text = json.dumps(content)
    for old, new in ('"shade 0"', "null"), ('"shade 80"', "7"), ('"very shade 80"', '"..."'):
        text = text.replace(old, new, 1)  # all captions of image 0, two of three of image 2
    file.write_text(text)
    Path("coco/train2017/13.png").unlink()
    Path("coco/train2017/21.png").write_bytes(b"not a picture")
    faults = {"0.png", "13.png", "21.png", "60.png", "(image unlisted)"}
    for _ in range(2):  # the second time from the cache
        data = load("coco", cache="here")
        assert_captions_fit(data, 57, 10)
        assert {words(row, data.vocab) for row in data.train.texts[1]} == {"very very shade 80"}
        (listed,) = Path("here").glob("*.txt")
        lines = listed.read_text(encoding="utf-8").splitlines()
        assert {Path(line.split(": ")[0]).name for line in lines} == faults and len(lines) == 5
        (warning,) = [line for line in capsys.readouterr().err.split("\n") if "warning" in line]
        assert re.search(r": 5 left out\b", warning) and str(listed) in warning
        assert all(line in warning for line in lines[:3])


def test_a_split_without_a_usable_picture_is_refused(capsys):
    write_coco(train2017=50, val2017=10)
    for k in range(10):
        Path(f"coco/val2017/{k}.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of 10 pictures.*9.png"):
        load("coco")


def test_without_pictures_to_validate_a_tenth_is_held_out_and_nothing_decoded_in_vain(monkeypatch):
    write_coco(train2017=50, val2017=10)
    shutil.rmtree("coco/val2017")
    decoded = spy(monkeypatch, cgap, "load_photo", lambda path, size: path)
    assert_captions_fit(load("coco"), 45, 5)
    assert len(decoded) == 50


def test_without_pictures_to_train_on_nothing_is_decoded(monkeypatch, capsys):
    write_coco(train2017=50, val2017=10)
    shutil.rmtree("coco/train2017")
    decoded = spy(monkeypatch, cgap, "load_photo", lambda path, size: path)
    refused(capsys, ["--data", "coco"], "train2017", ".png")
    assert decoded == []


@pytest.mark.parametrize("caption, right, warnings", [
    ("product {}", False, 1), ("very " * 32 + "{}", False, 1), ("the same", True, 0)],
    ids=["unknown words", "cut words", "equal texts"])
def test_captions_that_differ_only_where_a_model_cannot_read_them_are_not_equal(
        capsys, caption, right, warnings):
    Path("noise").mkdir()
    for k in range(60):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (8, 8, 3), np.uint8)).save(
            f"noise/{k}.png")
    source = write_csv([(f"noise/{k}.png", caption.format(90_000 + k)) for k in range(60)])
    settings = dict(data=str(source), steps=1, lr=0.0, center=False, xunif=0.0)
    last = cgap.train(Config(**RUN | settings), quiet=True)[-1]
    for search in ("i2t_r1", "t2i_r1"):
        assert last[search] == 1 if right else last[search] < 0.6
    assert capsys.readouterr().err.count("warning: 100% of held-out captions") == warnings


# ==================================================================================================
# 4. Devices, without having them
# ==================================================================================================
@fake_cuda
@pytest.mark.skipif(IS_OLD, reason="its fake CUDA tensors ask for a driver")
def test_nothing_is_made_on_another_device(monkeypatch):
    """CUDA tensors without data, on any computer: what mixes devices fails."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(cgap, "epoch_order", cgap.epoch_order.__wrapped__)  # to keep no fake
    monkeypatch.setattr(cgap, "measurable", lambda x, y, least=2: (cgap.unit(x), cgap.unit(y)))
    images, texts = inputs(40)
    ten = torch.arange(10)
    tasks = cgap.Tasks(images, torch.arange(40) % 5, ten, texts[:5], images, ten, texts[:10],
                       texts[:10], torch.ones(10, 40).bool())
    gpu = torch.device("cuda:0")
    with FakeTensorMode(allow_non_fake_inputs=True):
        with gpu:
            model = encoders()
        batch = cgap.next_batch(Pairs(images, texts[:, None]), 0, Config(batch=12), gpu)
        x, y, T = model(*batch)
        made = [*batch, x, y, T, cgap_loss(x, y, T, 1, 1, 1, True),
                cgap.encode(model.image, images), cgap.encode(model.text, texts)]
        assert {z.device for z in made} == {gpu}
        cgap.remove_initial_gap(model, images, texts)
        cgap.fold_means(model, images, texts)
        for measure in (cgap.linear_separability, cgap.recall, cgap.best_temperature,
                        functools.partial(cgap.mixed_recall, group=torch.arange(12) % 5)):
            with pytest.raises(DataDependentOutputException):  # all is done but to give the number
                measure(x.detach(), y.detach())
        with pytest.raises(DataDependentOutputException):
            cgap.do_tasks(model, tasks)


def test_the_gap_is_measured_in_float64_on_the_cpu_as_not_all_devices_have_it(monkeypatch):
    order = []
    for name in ("cpu", "double"):
        spy(monkeypatch, torch.Tensor, name, lambda z, name=name: order.append(name))
    gap_metrics(*(z.float() for z in clouds(9, 4, 1)))
    assert order[:4] == ["cpu", "double"] * 2


@fake_cuda
def test_auto_is_the_accelerator_and_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    for accelerator, found in (torch.device("cuda"), "cuda:3"), (None, "cpu"):
        monkeypatch.setattr(torch.accelerator, "current_accelerator",
                            lambda check_available=False: accelerator)
        with FakeTensorMode():
            assert cgap.find_device("auto") == torch.device(found)
            assert cgap.find_device("cuda") == torch.device("cuda:3")
            assert cgap.find_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.delenv("LOCAL_RANK")
    with FakeTensorMode():
        assert cgap.find_device("cuda") == torch.device("cuda:0")


def test_a_run_computes_on_the_device_that_was_found(monkeypatch):
    found = torch.device("cpu", 0)  # not "cpu": to be told from what is there by default
    monkeypatch.setattr(cgap, "find_device", lambda name: found)
    moved = spy(monkeypatch, nn.Module, "to", lambda self, device: device)
    batches = spy(monkeypatch, cgap, "next_batch", lambda pairs, step, cfg, device: device)
    cgap.train(Config(**RUN | dict(steps=2, limit=24)), quiet=True)
    assert moved == [found] and batches == [found] * 2


@fake_cuda
def test_pairs_stay_where_they_are_if_they_would_fill_half_the_gpu(monkeypatch):
    with FakeTensorMode():
        pairs = Pairs(torch.zeros(9, 3, 8, 8, dtype=torch.uint8), torch.zeros(9, 5, 4).int())
        size = 9 * 3 * 8 * 8 + 9 * 5 * 4 * 4
        for free, device in (2 * size, "cuda"), (2 * size - 1, "cpu"):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * size))
            moved = cgap.at_hand(pairs, torch.device("cuda:0"))
            assert {moved.images.device.type, moved.texts.device.type} == {device}
        assert cgap.at_hand(pairs, torch.device("cpu")) is pairs


def test_processes_that_torchrun_has_started_join_and_leave(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = torch.device("cuda:1")
    for world, device, expected in (("1", gpu, None), ("", gpu, None), ("2", gpu, ("nccl", gpu)),
                                    ("2", torch.device("cpu"), ("gloo", None))):
        monkeypatch.setenv("WORLD_SIZE", world)
        joins, leaves, takes = Mock(), Mock(), Mock()
        monkeypatch.setattr(torch.cuda, "set_device", takes)
        monkeypatch.setattr(torch.distributed, "init_process_group", joins)
        monkeypatch.setattr(torch.distributed, "destroy_process_group", leaves)
        with cgap.process_group(device):
            assert joins.call_count == (expected is not None) and not leaves.called
        assert leaves.call_count == joins.call_count
        if expected:
            assert (*joins.call_args.args, joins.call_args.kwargs["device_id"]) == expected
            assert takes.call_count == (device == gpu)


# ==================================================================================================
# 5. The real script, run as a user runs it
# ==================================================================================================
RUN = dict(limit=200, batch=12, steps=16, dim=8, image_size=8, unif=1.0, align=1.0, xunif=1.0,
           center=True, temperature=0.07, learn_temperature=True, eval_every=2, device="cpu")
FIGURES = {"gap.png", "embeddings.png", "embeddings.gif"}


def flags(**settings):
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in settings.items()]


def torchrun(n):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Two commands, at work while other tests run: a function that waits for one and returns its
    folder, not to be written to, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    commands = {name: subprocess.Popen(
        [sys.executable, *launcher, cgap.__file__, *flags(**RUN, out=name)], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
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


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_figures(folder):
    for name in FIGURES:
        with Image.open(folder / name) as image:
            darkest, brightest = image.convert("L").getextrema()
            assert darkest < 100 < brightest and (name != "embeddings.gif" or image.n_frames > 2)


def test_a_run_leaves_metrics_checkpoint_and_figures_and_prints_them(finished):
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
    table = printed.split("all but train_... is of held-out pairs")[1].splitlines()
    rows = [line.split() for line in table if line]
    assert rows[0] == ["start", "end"] and rows[-1][0] == "one:"
    assert rows[1:-1] == [[name, f"{first[name]:.3f}", f"{last[name]:.3f}"] for name in RECORD[1:]]
    assert printed.endswith("one: gap.png, embeddings.png, embeddings.gif\n")


def test_a_run_gives_the_model_that_it_has_measured(finished):
    folder = finished("one")[0]
    run, (model, vocab) = cgap.load_run(folder), cgap.load_model(folder)
    data = cgap.load_data(run["cfg"])
    assert vocab == data.vocab
    x, y = (cgap.encode(*two) for two in zip((model.image, model.text),
                                             data.val.batch(slice(None))))
    expected = torch.stack([F.normalize(z, dim=1) for z in (x, y)])
    assert_close(run["snapshots"][16].float(), expected, 1e-3)
    assert run["history"][-1] == pytest.approx(run["history"][-1] | gap_metrics(x, y), rel=1e-3)


def test_a_centred_run_saves_ordinary_encoders_with_a_mean_of_zero(finished):
    folder = finished("one")[0]
    model, _ = cgap.load_model(folder)
    images, texts = cgap.load_data(cgap.load_run(folder)["cfg"]).train.batch(slice(None))
    for z in cgap.encode(model.image, images), cgap.encode(model.text, texts):
        assert z.mean(0).norm() < 1e-3 * z.norm(dim=1).mean()


def test_every_step_is_as_the_settings_say_and_means_are_over_many_pairs(monkeypatch):
    cfg = Config(**RUN | dict(limit=2100, batch=1050, steps=5, eval_every=5, compile=True))
    rates = spy(monkeypatch, torch.optim.AdamW, "step",
                lambda self: {group["lr"] for group in self.param_groups})
    epochs = spy(monkeypatch, Pairs, "batch", lambda self, i, epoch=0: epoch)
    weights = spy(monkeypatch, cgap, "cgap_loss", lambda x, y, T, **weights: weights)
    folded = spy(monkeypatch, cgap, "fold_means", lambda model, images, texts: len(images))
    compiled = []

    def note(function, **settings):
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", note)
    cgap.train(cfg, quiet=True)
    assert rates == [{cgap.learning_rate(step, cfg)} for step in range(5)]
    assert [epoch for epoch in epochs if epoch] == [1, 1, 2]
    assert weights == [cfg.loss_settings()] * 7  # five steps, two evaluations
    assert cfg.loss_settings() == {"unif": 1, "align": 1, "xunif": 1, "center": True}
    assert folded == [2048, 256, 256, 256, 256, 2048]
    assert cgap.cgap_loss in compiled
    assert any(isinstance(getattr(call, "__self__", None), cgap.TwoEncoders) for call in compiled)


def test_the_gap_closes():
    """The paper in ten seconds: with CLIP a gap stays, with uniformity and alignment it goes."""
    clip, cua = (cgap.train(Config(steps=80, limit=300, image_size=8, device="cpu", unif=weight,
                                   align=weight), quiet=True)[-1] for weight in (0, 1))
    assert clip["centroid_distance"] > 0.5 and cua["centroid_distance"] < 0.25
    assert cua["mixed_i2t"] >= clip["mixed_i2t"] and cua["spread"] > clip["spread"]


def test_runs_start_with_or_without_a_gap_and_are_plotted_together(capsys):
    gaps = {}
    for gap, dim in ("kept", 8), ("removed", 16):
        settings = dict(steps=2, same_modality=True, remove_gap=gap == "removed", dim=dim,
                        center=False, image_size=16, out=gap)
        history = cgap.train(Config(**RUN | settings), quiet=True)
        gaps[gap] = history[0]["centroid_distance"]
    assert gaps["removed"] < gaps["kept"] / 2
    cgap.main(["--plot", "kept", "removed", "--out", "both"])
    assert_figures(Path("both"))


def test_pictures_show_the_gap_in_full():
    both = torch.stack(directions(40, 8, 3))
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


def test_import_is_quiet_and_light_and_help_has_it_all():
    code = ("import cgap, sys, contextlib\nprint('imported', flush=True)\n"
            "with contextlib.suppress(SystemExit): cgap.main(['--help'])\n"
            "print(sorted({'matplotlib', 'torchvision', 'PIL'} & set(sys.modules)))")
    folder = str(Path(cgap.__file__).parent)
    here = os.environ | {"PYTHONPATH": folder, "WORLD_SIZE": "", "RANK": ""}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=here)
    first, *helped, last = process.stdout.splitlines()
    assert (first, last, process.stderr) == ("imported", "[]", "")
    assert not list(Path(".").iterdir())
    text = " ".join(" ".join(helped).split())
    for field in fields(Config):
        phrase = field.metadata["help"]
        assert phrase in text and flags(**{field.name: True})[0] in text
        assert phrase[-1] not in ".,:;" and phrase.count("(") == phrase.count(")")
    assert re.search(r"example: python cgap\.py --\w+", text)
    (points,) = re.findall(r"--points the [^()]*? takes ((?:--[a-z-]+ )+)", text)
    assert {flag.removeprefix("--") for flag in points.split()} - {"resume"} == cgap.POINTS_FLAGS


# ---- from Python ----
def test_runs_have_folders_named_after_the_time_the_loss_and_the_seed():
    cfg = Config(**RUN | dict(steps=1, limit=24))
    for cfg in cfg, cfg, replace(cfg, seed=7, xunif=0.0):
        cgap.train(cfg, quiet=True)
        assert cfg.out == ""
    names = sorted(path.name for path in Path("runs").iterdir())
    patterns = [r"-CUAXU-centred-seed0"] * 2 + [r"-CUA-centred-seed7"]
    assert len(names) == 3 and all(re.fullmatch(r"\d{8}-\d{6}\.\d{6}" + pattern, name)
                                   for name, pattern in zip(names, patterns))
    assert cgap.load_run(f"runs/{names[2]}")["cfg"].seed == 7


class OwnEncoder(nn.Module):
    """One that feels whether it is in train mode."""
    def __init__(self, width, dim):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))
        self.projection = nn.Linear(16, dim)
    def forward(self, rows):
        return self.projection(self.body(rows))


class OwnModel(nn.Module):
    def __init__(self, dims=(8, 8)):
        super().__init__()
        self.image, self.text = OwnEncoder(6, dims[0]), OwnEncoder(4, dims[1])
        self.log_scale = nn.Parameter(torch.tensor(2.0))
    def forward(self, images, texts):
        return self.image(images), self.text(texts), torch.exp(-self.log_scale)


def own_data(n=40):
    def pairs(seed):
        return Pairs(draw(n, 6, seed=seed).float(), draw(n, 2, 4, seed=seed).float())

    return Data(pairs(0), pairs(1), None, None)


OWN = dict(steps=4, eval_every=2, batch=10, device="cpu")


def test_a_model_of_ones_own_is_trained_in_train_mode_and_measured_in_eval_mode(capfd):
    torch.manual_seed(0)
    model, data, cfg = OwnModel().eval(), own_data(), Config(**OWN)
    history = cgap.train(cfg, model=model, data=data, quiet=True)
    for encoder in model.image, model.text:
        assert encoder.body[1].num_batches_tracked == 4 and encoder.training  # steps alone
    for _ in range(2):
        assert history[-1] == {"step": 4, **cgap.evaluate(model, data, cfg)}
    assert list(history[-1]) == [name for name in RECORD if name not in TASKS]
    assert capfd.readouterr() == ("", "")


def test_data_of_ones_own_are_limited_and_mismatched_as_any(monkeypatch):
    data = own_data()
    seen = spy(monkeypatch, cgap, "next_batch", lambda pairs, *others: pairs)
    cgap.train(Config(**OWN, limit=20, mismatch=0.25), model=OwnModel(), data=data, quiet=True)
    assert len(seen) == 4 and all(len(seen[0].images) == n for n in (20, len(seen[0].texts)))
    assert torch.equal(seen[0].images, data.train.images[:20])
    assert (seen[0].texts != data.train.texts[:20]).flatten(1).any(1).sum() == 5
    prepared = cgap.prepare(data, Config(batch=10, mismatch=0.25, same_modality=True))
    assert (prepared.train.texts[:, 0] != data.train.images).any(1).sum() == 10
    assert torch.equal(prepared.val.texts[:, 0], data.val.images)


def without(name):
    model = OwnModel()
    delattr(model, name)
    return model


def without_projection():
    model = OwnModel()
    model.text.projection = nn.Identity()
    return model


def test_a_model_of_ones_own_that_cannot_be_trained_is_refused():
    for model, named in ((without("log_scale"), "log_scale"), (without("text"), "text.projection"),
                         (without_projection(), "text.projection"),
                         (OwnModel((8, 9)), r"\(2, 8\).*\(2, 9\)")):
        with pytest.raises(UserError, match=named):
            cgap.train(Config(**OWN), model=model, data=own_data(), quiet=True)
    assert tree() == {}


def test_data_of_ones_own_that_cannot_be_used_are_refused():
    images, texts = inputs(12)
    for wrong in texts, texts[1:, None]:
        with pytest.raises(UserError, match=r"texts \(N, K, "):
            Pairs(images, wrong)
    for n, settings in (9, {}), (40, {"limit": 9}):
        with pytest.raises(UserError, match="too few images: 9 for a batch of 10"):
            cgap.train(Config(**OWN, **settings), model=OwnModel(), data=own_data(n), quiet=True)
    assert tree() == {}


def test_a_learned_temperature_stops_at_a_hundredth():
    model = OwnModel()
    model.log_scale.data.fill_(math.log(1000))
    cfg = Config(**OWN | dict(steps=1))
    history = cgap.train(cfg, model=model, data=own_data(), quiet=True)
    assert [record["temperature"] for record in history] == pytest.approx([0.001, 0.01])


def test_a_learned_temperature_may_rise_above_one():
    model = OwnModel()
    model.log_scale.data.fill_(-0.5)
    history = cgap.train(Config(**OWN), model=model, data=own_data(), quiet=True)
    assert [record["temperature"] > 1 for record in history] == [True] * 3


# ---- bad input ----
def tree():
    return {path: path.is_file() and path.read_bytes() for path in Path(".").rglob("*")}


def refused(capsys, argv, *named):
    """Exit status 2, one line of error, returned, that names what is wrong, nothing written."""
    before = tree()
    with pytest.raises(SystemExit) as end:
        cgap.main(argv)
    error = capsys.readouterr().err
    error = re.sub(r"[^\r\n]*\d%\|[^\r\n]*|\r", "", error).strip()  # but progress bars
    assert end.value.code == 2 and error.startswith("cgap.py: error: "), error
    assert len(error.splitlines()) == 1 and all(name in error for name in named), error
    assert tree() == before
    return error


@pytest.mark.parametrize("bad, named", [
    ("--batch 1", "batch must"), ("--unif nan", "unif must"), ("--steps many", "--steps"),
    ("--stpes 5", "--stpes"), ("--temp .1", "--temp"), ("--device meta", "meta"),
    ("--device cuda:99", "--device cpu"),
    ("--temperature .005", "temperature must"), ("--limit 64 --batch 65", "65"),
    ("--limit 4 --batch 2", "4 held out"), ("--data nowhere", "nowhere"),
    ("--data file", "header"), ("--data folder", "annotations"),
    ("--limit 64 --steps 1 --out file/below", "file"),
    ("--plot folder --steps 5", "steps does nothing"), ("--resume folder", "checkpoint"),
    ("--resume folder --steps 5", "steps does nothing"),
    ("--points --unif 1", "unif does nothing"), ("--points --mismatch 2", "mismatch must")])
def test_a_bad_flag_is_one_line_of_error_and_nothing_is_written(capsys, bad, named):
    Path("folder").mkdir()
    Path("folder/checkpoint.pt").write_bytes(b"precious")
    Path("file").write_text("precious\nthing")
    refused(capsys, bad.split(), named)


def test_a_folder_that_exists_is_refused_before_data_are_read(capsys, monkeypatch):
    Path("folder").mkdir()
    read = spy(monkeypatch, cgap, "load_data", lambda cfg: cfg)
    refused(capsys, ["--out", "folder"], "--out folder exists", "--resume")
    assert read == []


def test_a_list_of_captions_unlike_coco_is_refused(capsys):
    for old, new, named in ('"images"', "", "JSONDecodeError"), ("file_name", "path", "file_name"):
        file = write_coco(train2017=50)
        file.write_text(file.read_text().replace(old, new))
        refused(capsys, ["--data", "coco"], "captions_train2017.json", named)


def test_compile_without_a_compiler_is_refused(capsys, monkeypatch, tmp_path):
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tmp_path}-inductor")
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent")}):
        refused(capsys, flags(**RUN, compile=True), "--compile finds no working compiler")
    torch._dynamo.reset()


def test_a_run_that_diverges_says_so_and_keeps_finite_weights():
    for learn in False, True:
        settings = dict(lr=1e9, eval_every=1, learn_temperature=learn, out=f"learn-{learn}")
        with pytest.raises(UserError, match="not finite"):
            cgap.train(Config(**RUN | settings), quiet=True)
        weights = cgap.load_run(settings["out"])["model"].values()
        assert all(weight.isfinite().all() for weight in weights)


def test_a_full_disk_is_an_error_and_leaves_the_old_file(monkeypatch):
    def save(content, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    Path("file").write_text("whole")
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="no space"):
        cgap.save_whole({}, Path("file"))
    assert tree() == {Path("file"): b"whole"}


# ---- interruption and resumption ----
def test_a_run_is_resumed_from_another_folder(monkeypatch):
    settings = dict(data=write_csv().name, steps=1, out="run", cache="cache")
    cgap.train(Config(**RUN | settings), quiet=True)
    decoded = spy(monkeypatch, cgap, "decode", lambda *args: args)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    run = cgap.load_run("../run")
    assert cgap.train(run["cfg"], resume=True, quiet=True) == run["history"] and decoded == []


def test_a_run_is_not_resumed_on_data_with_other_words(capsys):
    file = write_csv()
    cgap.train(Config(**RUN | dict(data=str(file), steps=1, out="run")), quiet=True)
    file.write_text(file.read_text().replace("shade", "hue"))
    refused(capsys, ["--resume", "run"], "other words")


def test_a_run_is_loaded_on_the_cpu_wherever_it_was_made(finished, monkeypatch):
    folder = finished("one")[0]
    places = spy(monkeypatch, torch, "load", lambda path, **settings: settings["map_location"])
    cgap.load_model(folder)
    assert places == ["cpu"]


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
def test_a_run_killed_as_it_writes_ends_as_one_never_interrupted(tmp_path, finished):
    run, log = tmp_path / "run", tmp_path / "log"
    for argv, n, kept in (flags(**RUN, out=run), 3, 2), (["--resume", str(run)], 4, 8):
        assert exit_code(struck, argv, signal.SIGKILL, n, log) == -signal.SIGKILL
        assert cgap.load_run(run)["history"][-1]["step"] == kept
    expected = result(finished("one")[0])
    for _ in range(2):  # also where nothing is left to do
        cgap.train(cgap.load_run(run)["cfg"], resume=True, quiet=True)
        assert result(run) == expected


@posix
def test_ctrl_c_ends_a_run_with_advice(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    assert exit_code(struck, flags(**RUN, out=run), signal.SIGINT, 2, log) == 130
    text = log.read_text()
    assert "Traceback" not in text and f"--resume {run} " in text.splitlines()[-1]


# ---- several processes ----
def several(rank, world, folder):
    """For one of several processes, or one alone: the gradients of a step as train takes it, but
    with one more loss of the rows, also for a frozen text tower; and a whole run. The first
    process saves them."""
    if world > 1:
        torch.distributed.init_process_group("gloo", (folder / "sync").as_uri(), rank=rank,
                                             world_size=world)
    found = []
    for frozen in (False, True):
        model = encoders(learn_temperature=True, temperature=0.07)
        model.text.requires_grad_(not frozen)
        images, texts = inputs(18)
        forward = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        x, y, T = forward(images[rank::world], texts[rank::world])
        loss = cgap_loss(cgap.gather(x), cgap.gather(y), T, 1, 1, 1, True) + x.square().mean()
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    cfg = Config(**RUN | dict(steps=2, limit=24, out=str(folder / f"run{world}")))
    history = cgap.train(cfg, quiet=True)
    if rank == 0:
        torch.save({"gradients": found, "history": history}, folder / f"{world}.pt")
    if world > 1:
        assert torch.distributed.is_initialized()  # left to those who made it
        torch.distributed.destroy_process_group()


def test_gradients_and_runs_do_not_depend_on_the_number_of_processes(tmp_path):
    several(0, 1, tmp_path)
    torch.multiprocessing.start_processes(several, (3, tmp_path), nprocs=3, start_method=METHOD)
    one, three = (torch.load(f"{world}.pt") for world in (1, 3))
    assert_close(three["gradients"], one["gradients"], 1e-5)
    assert not any(name.startswith("text") for name in one["gradients"][1])
    for alone, together in zip(one["history"], three["history"], strict=True):
        assert together["train_loss"] == pytest.approx(alone["train_loss"], abs=1e-3)


def test_torchrun_on_two_processes_gives_the_curve_of_one(finished):
    (one, *_), (two, printed, error) = finished("one"), finished("two")
    one, two = ([record["train_loss"] for record in records(folder)] for folder in (one, two))
    assert two == pytest.approx(one, abs=1e-3)
    assert printed.count("held-out pairs") == 1  # only the first process prints
    assert not re.search("deprecat|FutureWarning|destroy_process_group", error), error


def test_a_batch_that_cannot_be_split_is_an_error(monkeypatch):
    monkeypatch.setattr(cgap, "rank_and_world", lambda: (0, 5))
    with pytest.raises(UserError, match="batch 12 .* 5 processes"):
        cgap.open_run(Config(**RUN | {"out": "out"}), own_data(), None, None, False)
    assert tree() == {}


# ---- numbers of short runs, kept: what changes them has changed the experiment ----
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


def test_scenes_are_as_they_were():
    data = cgap.scene_data(Config(limit=64, image_size=16, seed=3))
    assert data.train.images.double().mean().item() == pytest.approx(KEPT_PIXELS, rel=1e-4)
    assert [words(row[0], data.vocab) for row in data.train.texts[:3]] == KEPT_CAPTIONS


@pytest.mark.parametrize("name", SHORT_RUNS)
def test_short_runs_give_the_numbers_that_they_gave(name):
    history = cgap.train(Config(**SHORT | SHORT_RUNS[name]), quiet=True)
    *kept, zero_shot = KEPT[name]
    got = [record["train_loss"] for record in history[1:]] + [history[-1][end] for end in ENDS]
    assert got == pytest.approx(kept, rel=1e-3), f"now {got}"
    assert history[-1].get("zero_shot", 0) == pytest.approx(zero_shot, abs=0.005)


def test_the_smallest_gap_gives_the_numbers_that_it_gave():
    end = cgap.smallest_gap(n=128, steps=20)[0][-1]
    assert {name: end[name] for name in KEPT_POINTS} == pytest.approx(KEPT_POINTS, rel=1e-3)


# ---- a GPU, where there is one ----
def lengthen(run, steps):
    """As if the finished run had been interrupted on its way to so many steps."""
    content = torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu")
    content["cfg"]["steps"] = steps
    torch.save(content, run / "checkpoint.pt")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_script_runs_on_a_gpu():
    def script(*argv, launcher=()):
        return subprocess.run([sys.executable, *launcher, cgap.__file__, *argv], timeout=PATIENCE,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(*argv):
        process = script(*argv)
        assert process.returncode == 0, process.stderr

    settings = RUN | {"device": "cuda"}
    finish(*flags(**settings, out="run"))
    finish(*flags(**settings, out="compiled", compile=True))
    runs = [[record["train_loss"] for record in records(Path(run))] for run in ("run", "compiled")]
    assert runs[1] == pytest.approx(runs[0], abs=0.05)
    for steps, device in (20, []), (24, ["--device", "cpu"]):
        lengthen(Path("run"), steps)
        finish("--resume", "run", *device)
        assert records(Path("run"))[-1]["step"] == steps
        assert_figures(Path("run"))
    too_many = torchrun(torch.cuda.device_count() + 1)
    process = script(*flags(**settings, out="many"), launcher=too_many)
    errors = re.findall("^cgap.py: error: device cuda:.*$", process.stderr, re.M)
    assert process.returncode and len(errors) == 1 and not Path("many").exists(), process.stderr


# ==================================================================================================
# 4. The pages and the claims
# ==================================================================================================
FIGURES_FOLDER = Path(cgap.__file__).parent / "figures"
README = Path(cgap.__file__).with_name("README.md").read_text(encoding="utf-8")


@pytest.fixture
def reproduce(monkeypatch):
    monkeypatch.syspath_prepend(str(FIGURES_FOLDER))
    return importlib.import_module("reproduce")


def test_the_gallery_is_made_of_its_prose_and_the_results(reproduce):
    results = json.loads((FIGURES_FOLDER / "results.json").read_text(encoding="utf-8"))
    assert results.keys() == reproduce.CLAIMS.keys()
    page = reproduce.gallery(results)
    assert page == (FIGURES_FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(reproduce.table(name, rows) in page for name, rows in results.items())


def test_links_and_pictures_of_the_pages_exist():
    gallery = (FIGURES_FOLDER / "README.md").read_text(encoding="utf-8")
    anchors = set(re.findall(r'<a id="([\w-]+)">', gallery))
    for page, folder in (README, FIGURES_FOLDER.parent), (gallery, FIGURES_FOLDER):
        for target in re.findall(r"\]\(([^)]+)\)", page):
            file, _, anchor = target.partition("#")
            if not file.startswith("http"):
                assert not file or (folder / file).stat().st_size > 0, target
                assert not anchor or anchor in anchors, target


TINY = "--steps 1 --limit 64 --batch 16 --image-size 8 --dim 8 --device cpu".split()


def code_blocks(language):
    """The code blocks of the README in a language, without their indentation."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", README, flags=re.M | re.S)
    return [textwrap.dedent(code) for _, code in blocks]


def test_each_command_of_the_readme_runs(monkeypatch, capsys):
    write_csv()
    for run in "RUN", "A", "B":
        cgap.main([*TINY, "--out", f"runs/{run}"])
    for slow in "animate", "plot_clouds", "plot_metrics", "scene_tasks":  # tested elsewhere
        monkeypatch.setattr(cgap, slow, lambda *args: None)
    lines = [line.split("#")[0].split() for block in code_blocks("bash")
             for line in block.splitlines() if line.startswith("python cgap.py")]
    assert len(lines) > 7
    for number, (_, _, *flags) in enumerate(lines):
        if "cuda" in flags:  # device and compiler have tests of their own
            flags = [flag for flag in flags if flag not in ("--device", "cuda", "--compile")]
        if not {"--resume", "--plot", "--points"} & {*flags}:
            flags = [*flags, *TINY, "--out", f"runs/{number}"]
        cgap.main(flags + ["--steps", "2"] * ("--points" in flags))
    assert "error" not in capsys.readouterr().err


def test_each_piece_of_python_in_the_readme_runs(monkeypatch):
    train = cgap.train
    monkeypatch.setattr(cgap, "train", lambda cfg, **own: train(
        replace(cfg, steps=1, limit=64, batch=16, dim=8, image_size=8, device="cpu"), **own))
    cfg = Config(steps=1, limit=64, batch=16, dim=8, image_size=8, device="cpu", out="runs/RUN")
    cgap.train(cfg, quiet=True)
    Image.new("RGB", (9, 9)).save("photo.jpg")
    torch.save(torch.randn(200, 8), "images.pt")
    torch.save(torch.randn(200, 8), "texts.pt")
    data = cgap.load_data(cfg)
    names = {"model": cgap.TwoEncoders(cfg, len(data.vocab)), "cgap_loss": cgap_loss,
             "images": data.train.images, "texts": data.train.texts,
             "held_out_images": data.val.images, "held_out_texts": data.val.texts,
             "image_encoder": lambda images: torch.randn(len(images), 8),
             "text_encoder": lambda texts: torch.randn(len(texts), 8)}
    blocks = code_blocks("python")
    assert len(blocks) == 6, len(blocks)
    for block in blocks:
        exec(block, dict(names))


def test_claims_run_once(reproduce, tmp_path, monkeypatch):
    tiny = {"steps": 2, "limit": 64, "batch": 16}
    rows = {"CLIP": tiny, "tuned": tiny | {"start": "CLIP", "projections": "fresh"}}
    shown = ("align", "mixed_i2t_subtracted", "zero_shot")
    claim = type(reproduce.CLAIMS["losses"])(rows, shown, seeds=(6, 7), once=("tuned",))
    monkeypatch.setattr(reproduce, "CLAIMS", {"tiny": claim})
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    monkeypatch.setattr(reproduce, "draw_scenes", lambda: None)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "tiny"])
    # In a thread, as processes would import torch anew
    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", lambda *args: ThreadPoolExecutor(1))
    Path("gallery.md").write_text("before {{table tiny}} after", encoding="utf-8")
    reproduce.main()
    made = {path: path.stat().st_mtime_ns for path in Path("runs/reproduce").glob("*.json")}
    reproduce.main()
    assert len(made) == 3
    assert made == {path: path.stat().st_mtime_ns for path in made}
    page = Path("README.md").read_text(encoding="utf-8")
    assert page.startswith("before |") and page.endswith("after") and Path("tiny.png").exists()
    (row,) = [line for line in page.splitlines() if line.startswith("|CLIP|")]
    assert row.count("±") == 3 and "python figures/reproduce.py tiny" in page


def test_heads_are_trained_on_saved_features(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FIGURES_FOLDER))
    heads = importlib.import_module("heads")
    torch.save(draw(400, 12).half(), "images.pt")
    torch.save(draw(400, 3, 7, seed=1).half(), "texts.pt")
    monkeypatch.setattr(sys, "argv", "heads.py images.pt texts.pt --losses CUA --temperatures 0.1 "
                        "learned --steps 2 --batch 32 --device cpu".split())
    heads.main()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4 and rows[2].startswith("|CUA, T 0.1|") and rows[3].count("|") == 12
    monkeypatch.setattr(sys, "argv", "heads.py images.pt images.pt missing".split())
    with pytest.raises(SystemExit):
        heads.main()
