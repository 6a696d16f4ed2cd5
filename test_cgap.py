# SPDX-License-Identifier: MIT
"""Tests of cgap.py: `python -m pytest -q`. `python test_cgap.py` prints how fast it is instead."""

import contextlib
import csv
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # threads that share so little work only wait for each other
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import cgap
from cgap import Config, cgap_loss, gap_metrics

TERMS = {"clip", "align", "unif", "xunif"}
GAP = ("centroid_distance linear_separability matched_cosine alignment uniformity_image uniformity_text "
       "cross_uniformity effective_rank_image effective_rank_text").split()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def clouds(N, D, apart):
    """Two clouds of pairs, `apart` along the first axis."""
    x, shift = draw(N, D), apart / 2 * F.one_hot(torch.tensor(0), D)
    return x - shift, x + draw(N, D, seed=1) + shift


def with_gradients(loss, x, y, *args, **options):
    """[total, its gradient for x, for y] as float64."""
    x, y = (z.detach().clone().requires_grad_() for z in (x, y))
    total = loss(x, y, *args, **options)[0]
    return [z.double() for z in (total.detach(), *torch.autograd.grad(total, (x, y)))]


def assert_close(got, expected, tolerance):
    """To `tolerance` of the largest element of each tensor, or of 1 if that is more."""
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


# ============================================================================================================
# 1. Closed forms and slow independent references
# ============================================================================================================
def paper_loss(x, y, T=0.01, unif=0.0, align=0.0, xunif=0.0):
    """The paper's definitions as one writes them down, by distances between pairs, in the precision of x and y."""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    pair, logits, others = torch.arange(len(x)), x @ y.T / T, ~torch.eye(len(x), dtype=torch.bool)
    terms = {"clip": (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2,
             "align": (x - y).norm(dim=1).pow(2).mean(),
             "unif": sum(torch.pdist(z).pow(2).mul(-2).exp().mean().log() for z in (x, y)) / 2,
             "xunif": torch.cdist(x, y).masked_select(others).pow(2).mul(-2).exp().mean().log()}
    return terms["clip"] + unif * terms["unif"] + align * terms["align"] + xunif * terms["xunif"], terms


def slow_loss(x, y, *args, **options):
    """The same in float64."""
    return paper_loss(x.double(), y.double(), *args, **options)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("weights", [(0, 0, 0), (1, 1, 0), (1, 1, 1), (0.3, 0, 2)])
@pytest.mark.parametrize("N, copies, block", [
    (2, 0, None), (3, 0, None), (64, 0, None), (64, 9, None), (257, 0, None),
    (2, 0, 1), (3, 0, 99), (64, 9, 16), (257, 0, 100)])
def test_loss_and_gradients_equal_the_definitions(N, copies, block, weights, dtype, tolerance):
    x, y = (z.to(dtype) for z in clouds(N, 16, 2))
    x[:copies], y[:copies] = x[N - 1], y[N - 1]  # duplicate rows
    total, terms = cgap_loss(x.requires_grad_(), y, 0.05, *weights, block=block)
    assert total.dtype == dtype and terms.keys() == TERMS
    assert total.requires_grad and not any(term.requires_grad for term in terms.values())  # nor keep their matrices
    for name, value in slow_loss(x, y, 0.05)[1].items():
        assert terms[name].item() == pytest.approx(value.item(), rel=tolerance, abs=tolerance)
    assert_close(with_gradients(cgap_loss, x, y, 0.05, *weights, block=block),
                 with_gradients(slow_loss, x, y, 0.05, *weights), tolerance)


@pytest.mark.parametrize("N, T", [(2, 0.01), (5, 0.5), (64, 1.0)])
def test_closed_forms(N, T):
    eye = torch.eye(2 * N, dtype=torch.float64)
    _, same = cgap_loss(eye[:N], eye[:N], T)
    assert same["clip"].item() == pytest.approx(math.log1p((N - 1) * math.exp(-1 / T)), abs=1e-12)
    assert same["unif"].item() == pytest.approx(-4) and same["xunif"].item() == pytest.approx(-4)
    _, orthogonal = cgap_loss(eye[:N], eye[N:], T)
    assert orthogonal["align"].item() == pytest.approx(2)
    assert orthogonal["clip"].item() == pytest.approx(math.log(N))  # it knows nothing


@pytest.mark.parametrize("block", [None, 3])
def test_gradcheck(block):
    inputs = [z.requires_grad_() for z in (draw(4, 3), draw(4, 3, seed=1), torch.tensor(0.3).double())]
    assert torch.autograd.gradcheck(lambda x, y, T: cgap_loss(x, y, T, 1, 0.5, 2, block=block)[0], inputs)


@pytest.mark.parametrize("change", [lambda z: z[torch.randperm(50, generator=seeded())], lambda z: 37 * z,
                                    lambda z: z * torch.linspace(.01, 9, 50)[:, None]])
def test_loss_ignores_the_order_of_pairs_and_the_scale_of_inputs(change):
    x, y = clouds(50, 8, 1)
    assert_close([cgap_loss(change(x), change(y), 0.1, 1, 1, 1)[0]], [cgap_loss(x, y, 0.1, 1, 1, 1)[0]], 1e-9)


def test_the_temperature_is_the_papers_or_learned():
    (x, y), T = clouds(20, 8, 1), torch.tensor(0.1).double().requires_grad_()
    assert cgap_loss(x, y)[0].item() == pytest.approx(slow_loss(x, y, T=0.01)[0].item(), rel=1e-9)
    cgap_loss(x, y, T, 1, 1, 1)[0].backward()
    slope = (slow_loss(x, y, 0.1 + 1e-6)[0] - slow_loss(x, y, 0.1 - 1e-6)[0]) / 2e-6
    assert abs(slope) > 0.1 and T.grad.item() == pytest.approx(slope.item(), rel=1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_and_autocast_compute_in_float32(half):
    def under_autocast(*args):
        with torch.autocast("cpu", half):
            return cgap_loss(*args)

    x, y = (z.to(half) for z in clouds(40, 8, 1))
    exact = with_gradients(cgap_loss, x.float(), y.float(), 0.01, 1, 1, 1)
    assert_close(with_gradients(under_autocast, x.float(), y.float(), 0.01, 1, 1, 1), exact, 0)
    assert_close(with_gradients(under_autocast, x, y, 0.01, 1, 1, 1), exact, torch.finfo(half).eps)
    total, terms = cgap_loss(x, y, 0.01, 1, 1, 1)
    assert {z.dtype for z in (total, *terms.values())} == {torch.float32} and total == exact[0]


@pytest.mark.parametrize("function", [cgap_loss, gap_metrics])
@pytest.mark.parametrize("x, y", [(torch.ones(1, 3),) * 2, (torch.ones(0, 3),) * 2, (torch.ones(6),) * 2,
                                  (torch.ones(6, 3, 1),) * 2, (torch.ones(6, 3), torch.ones(6, 2)),
                                  (torch.ones(6, 3), torch.ones(7, 3)), (torch.ones(6, 3).long(),) * 2,
                                  (torch.ones(6, 3), torch.ones(6, 3).int())])
def test_inputs_without_a_meaning_raise_value_error(function, x, y):
    with pytest.raises(ValueError):
        function(x, y)


def test_what_is_not_finite_has_no_gap():
    for bad in math.nan, math.inf:
        with pytest.raises(ValueError, match="finite"):
            gap_metrics(torch.ones(6, 3), torch.full((6, 3), bad))


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_the_compiled_loss_is_the_same():
    args = *(z.float() for z in clouds(16, 8, 1)), 0.05, 1, 1, 1
    assert_close(with_gradients(torch.compile(cgap_loss), *args), with_gradients(cgap_loss, *args), 1e-5)


def test_the_loss_section_works_where_it_is_pasted():
    _, title, body, *_ = Path(cgap.__file__).read_text().split("# " + "=" * 108 + "\n")
    assert title.startswith("# 1. The loss")
    exec(body, pasted := {})
    args = *clouds(20, 8, 1), 0.1, 1, 2, 3, 7
    assert_close(with_gradients(pasted["cgap_loss"], *args), with_gradients(cgap_loss, *args), 0)


def slow_rank(z):
    share = torch.linalg.svdvals(z - z.mean(0)).pow(2)
    return torch.exp(-sum(p * p.log() for p in share / share.sum()))


def test_gap_metrics_equal_their_definitions():
    x, y = (F.normalize(z, dim=1) for z in clouds(60, 6, 1))
    terms = slow_loss(x, y)[1]
    expected = {"centroid_distance": math.dist(x.mean(0), y.mean(0)), "matched_cosine": (x * y).sum(1).mean(),
                "alignment": terms["align"], "cross_uniformity": terms["xunif"],
                "uniformity_image": F.pdist(x).pow(2).mul(-2).exp().mean().log(),
                "uniformity_text": F.pdist(y).pow(2).mul(-2).exp().mean().log(),
                "effective_rank_image": slow_rank(x), "effective_rank_text": slow_rank(y)}
    got = gap_metrics(7 * x.float(), y.float() / 3)
    assert list(got) == GAP and {type(value) for value in got.values()} == {float}
    for name, value in expected.items():
        assert got[name] == pytest.approx(float(value), abs=2e-6), name


def halves(x, y):
    """The split that gap_metrics makes: unit vectors and labels -1, 1, to fit on and to test on."""
    order, cut = torch.randperm(len(x), generator=seeded(0)), int(0.8 * len(x))
    sides = torch.tensor([-1., 1.], dtype=torch.float64)
    return [(F.normalize(torch.cat([x[i], y[i]]), dim=1), sides.repeat_interleave(len(i)))
            for i in (order[:cut], order[cut:])]


def newton_logistic(z, s):
    """The minimum of |w|^2 / 2 + sum log(1 + exp(-s (w z + b))), by Newton's method: (w, b)."""
    z, w = F.pad(z, (0, 1), value=1), torch.zeros(z.shape[1] + 1).double()
    ridge = torch.eye(len(w)).double() * (torch.arange(len(w)) < len(w) - 1)  # the bias is free
    for _ in range(30):
        p = torch.sigmoid(-s * (z @ w))
        w = w - torch.linalg.solve(z.T @ (z * (p * (1 - p))[:, None]) + ridge, ridge @ w - z.T @ (s * p))
    return w


@pytest.mark.parametrize("apart, low, high", [(20, 1, 1), (1.5, .65, .9), (0, .4, .6)])
def test_separability_is_the_held_out_accuracy_of_logistic_regression(apart, low, high):
    x, y = clouds(500, 5, apart)
    (z, s), (z_test, s_test) = halves(x, y)
    *w, b = newton_logistic(z, s)
    accuracy = ((z_test @ torch.stack(w) + b).sign() == s_test).double().mean().item()
    assert low <= accuracy <= high
    assert gap_metrics(x, y)["linear_separability"] == pytest.approx(accuracy, abs=0.01)
    assert_close(cgap.fit_logistic(z, (s + 1) / 2), (torch.stack(w), b), 1e-3)


@pytest.mark.parametrize("apart", [20, 1.5, 0])
def test_separability_is_that_of_scikit_learn(apart):
    linear_model = pytest.importorskip("sklearn.linear_model")
    fit, test = halves(*clouds(500, 5, apart))
    accuracy = linear_model.LogisticRegression().fit(*fit).score(*test)
    assert gap_metrics(*clouds(500, 5, apart))["linear_separability"] == pytest.approx(accuracy, abs=0.01)


@pytest.mark.parametrize("other", [lambda x: x, lambda x: x + 1e-9 * draw(400, 8), lambda x: x.roll(1, 0)])
def test_clouds_that_coincide_have_no_gap(other):
    x = draw(400, 8)
    got = gap_metrics(x, other(x))
    assert got["centroid_distance"] < 1e-6 and 0.4 < got["linear_separability"] < 0.6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gap_metrics_leave_no_trace_in_any_grad_mode(mode):
    expected = gap_metrics(*clouds(60, 4, 1))
    state = torch.get_rng_state()
    with mode():
        x, y = clouds(60, 4, 1)
        assert gap_metrics(x, y) == expected
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        assert_close(cgap.gap_terms(x, y, block=7).values(), cgap.gap_terms(x, y).values(), 1e-9)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("d, optimum", [(2, -1.575), (3, -2.080), (8, -3.083), (16, -3.513), (32, -3.752),
                                        (64, -3.875), (128, -3.938), (256, -3.969)])
def test_uniform_optimum_is_the_papers_and_that_of_a_uniform_sample(d, optimum):
    assert cgap.uniform_optimum(d) == pytest.approx(optimum, abs=6e-4)
    x, y = (F.normalize(draw(1000, d, seed=seed), dim=1) for seed in (0, 1))
    for name in "unif_x", "xunif":
        assert cgap.gap_terms(x, y)[name].item() == pytest.approx(optimum, abs=0.03)


def test_effective_rank_counts_the_dimensions_in_use():
    got = gap_metrics(draw(400, 8), draw(400, 1).sign() * draw(1, 8, seed=1))  # all over the sphere; v or -v
    assert 7.8 < got["effective_rank_image"] <= 8 and got["effective_rank_text"] == pytest.approx(1, abs=1e-6)


def encoders(**settings):
    torch.manual_seed(0)
    return cgap.TwoEncoders(Config(dim=8, context=12, **settings), vocab=20)


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_an_image_embedding_does_not_depend_on_its_batch(size):
    images = torch.randint(256, (5, 3, size, size), generator=seeded(), dtype=torch.uint8)
    for encoder in encoders(same_modality=True).children():
        assert_close([encoder(images)], [torch.cat([encoder(image[None]) for image in images])], 1e-5)


@pytest.mark.parametrize("length", [1, 2, 7, 12])
def test_a_text_embedding_depends_on_the_words_and_not_on_batch_or_padding(length):
    encoder, caption = encoders().text, torch.arange(1, length + 1, dtype=torch.int32)[None]
    for width in range(length, 13):
        batch = torch.cat([F.pad(caption, (0, width - length)), torch.full((3, width), 9)])
        assert_close([encoder(batch)[:1]], [encoder(caption)], 1e-5)
    turned = encoder(caption.flip(1))
    assert torch.allclose(turned, encoder(caption), atol=1e-2) == (length == 1)  # their order matters


@pytest.mark.parametrize("learned", [False, True])
def test_temperature_is_frozen_or_learned_down_to_a_hundredth(learned):
    model = encoders(temperature=0.05, learn_temperature=learned)
    assert model.temperature().item() == pytest.approx(0.05) and model.log_scale.requires_grad == learned
    model.log_scale.data.fill_(math.log(1000))
    model.limit_temperature()
    assert model.temperature().item() == pytest.approx(0.01 if learned else 0.001)
    assert learned == bool(model.temperature().requires_grad) and not encoders().log_scale.requires_grad


@pytest.mark.parametrize("same", [False, True])
def test_removing_the_initial_gap_moves_the_second_cloud_onto_the_first(same):
    hw, model = cgap.hardware(Config(device="cpu")), encoders(same_modality=same)
    images = torch.randint(256, (90, 3, 16, 16), generator=seeded(), dtype=torch.uint8)
    texts = images if same else torch.randint(1, 20, (90, 6), generator=seeded())
    x, y = cgap.encode(model.image, images, hw), cgap.encode(model.text, texts, hw)
    cgap.remove_initial_gap(model, images, texts, hw)
    assert torch.equal(cgap.encode(model.image, images, hw), x)
    moved = cgap.encode(model.text, texts, hw)
    assert_close([moved.mean(0)], [x.mean(0)], 1e-5)
    assert (x - moved).pow(2).sum(1).mean() < (x - y).pow(2).sum(1).mean()
    ratio = F.pdist(moved) / F.pdist(y)  # it moves as a whole
    assert ratio.max() / ratio.min() < 1.001
    cross = (moved - moved.mean(0)).T @ (x - x.mean(0))  # symmetric and positive if the rotation is the best
    assert_close([cross], [cross.T], 1e-4)
    assert torch.linalg.eigvalsh(cross).min() > -1e-4


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="a PyTorch without CUDA has no fake of it either")
def test_nothing_is_made_on_another_device():
    model = encoders()
    with FakeTensorMode():  # CUDA tensors without data, on any computer
        weights = {name: torch.empty(p.shape, device="cuda") for name, p in model.named_parameters()}
        inputs = torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.ones(4, 6, dtype=torch.int32)
        x, y, T = torch.func.functional_call(model, weights, tuple(z.cuda() for z in inputs))
        total, terms = cgap_loss(x, y, T, 1, 1, 1, block=3)
        assert {z.device.type for z in (x, y, T, total, *terms.values())} == {"cuda"}
        with pytest.raises(RuntimeError, match="device"):
            torch.func.functional_call(model, weights, inputs)
        with pytest.raises(RuntimeError, match="device"):
            cgap_loss(x, y.cpu())


def words(row, vocab):
    return " ".join(vocab[k] for k in row if k)


def test_scenes_are_a_function_of_the_seed():
    one, again, other = (cgap.scene_data(Config(limit=50, image_size=8, seed=seed)) for seed in (1, 1, 2))
    for part in "train", "val", "zero_shot", "arithmetic":
        images, same, others = (getattr(data, part).images for data in (one, again, other))
        assert torch.equal(images, same) and not torch.equal(images, others)
    assert torch.equal(one.train.tokens, again.train.tokens)


@pytest.mark.parametrize("shape, name", list(enumerate(cgap.SHAPES)))
@pytest.mark.parametrize("relation, axis", [("left of", 3), ("above", 2)])
def test_pictures_show_what_their_captions_say(shape, name, relation, axis):
    scenes = torch.tensor([[0, shape, 2, shape, cgap.RELATIONS.index(relation)]]).expand(20, 5)
    assert cgap.describe(scenes) == [f"a red {name} {relation} a blue {name}"] * 20
    near, far = cgap.draw_scenes(scenes, 32, seeded()).float().split(16, axis)
    assert all((half[:, 0] - half[:, 2]).mean() * sign > 10 for half, sign in ((near, 1), (far, -1)))


def test_captions_are_unique_and_unseen_combinations_do_not_occur():
    objects = list(itertools.product(range(8), range(6)))
    scenes = [[*a, *b, relation] for a in objects for b in objects for relation in (0, 1)]
    captions = cgap.describe(torch.tensor(scenes + [[*a, 0, 0, -1] for a in objects]))
    assert len(set(captions)) == len(captions) == 2 * 48 * 48 + 48
    for single in 0.0, 0.3:
        scenes = cgap.random_scenes(20_000, single, seeded())
        assert (scenes[:, 4] < 0).double().mean().item() == pytest.approx(single, abs=0.02)
        combinations = torch.cat([scenes[:, :2], scenes[:, 2:4]]).unique(dim=0)
        assert len(combinations) == 40 and not any(cgap.unseen(c, s) for c, s in combinations.tolist())


def test_zero_shot_labels_match_prompts_and_pictures():
    vocab = cgap.make_vocab(cgap.describe(cgap.random_scenes(500, 0.1, seeded())), 100)
    task = cgap.scene_classes(16, vocab, 32, seeded(), per_class=30)
    prompts = [words(row, vocab) for row in task.prompts.tolist()]
    assert prompts == [f"a {colour} {shape}" for colour in cgap.COLOURS for shape in cgap.SHAPES]
    assert [k for k, hidden in enumerate(task.unseen) if hidden] == [6 * c + c % 6 for c in range(8)]
    for k, prompt in enumerate(prompts[:-12]):  # all but white and black
        colour = torch.tensor(cgap.COLOURS[prompt.split()[1]])
        shown = task.images[task.labels == k].float().mean((0, 2, 3))
        assert F.cosine_similarity(shown - shown.mean(), colour - colour.mean(), 0) > 0.9


def test_arithmetic_asks_for_the_scene_with_one_thing_changed(monkeypatch):
    monkeypatch.setattr(cgap, "draw_scenes", lambda scenes, size, g: scenes)  # the pool: scenes, not pictures
    names = [*(list(cgap.COLOURS), list(cgap.SHAPES)) * 2, list(cgap.RELATIONS)]
    vocab = cgap.make_vocab(itertools.chain(*names), 100)
    task = cgap.scene_edits(16, vocab, 32, seeded(), queries=100)
    assert task.correct.shape == (100, len(task.images)) and task.correct.any(1).all()
    for query, old, new, correct in zip(task.query, task.old.tolist(), task.new.tolist(), task.correct):
        source, (target,) = task.images[query], task.images[correct].unique(dim=0)
        (slot,) = (source != target).nonzero()[:, 0].tolist()
        named = [names[slot][scene[slot]] for scene in (source, target)]
        assert named == [words(old, vocab), words(new, vocab)]
        assert not correct[query] and torch.equal(correct, (task.images == target).all(1))


def test_tokens_are_words_cut_and_padded():
    assert cgap.split_words("  A dog's\tbowl... Überzug!") == "a dog ' s bowl . . . überzug !".split()
    vocab = cgap.make_vocab(["the cat", "the dog the cat", "a mat"], 2)
    assert vocab == ["<pad>", "<unk>", "cat", "the"]
    tokens = cgap.tokenize(["The CAT", "cat zebra the the the cat", "the"], vocab, 4)
    assert tokens.tolist() == [[3, 2, 0, 0], [2, 1, 3, 3], [3, 0, 0, 0]] and tokens.dtype == torch.int32


@pytest.mark.parametrize("N, groups", [(40, 40), (40, 9), (4, 4)])
def test_recall_equals_a_slow_double_loop(N, groups):
    group = torch.arange(N) % groups
    y = F.normalize(draw(groups, 4), dim=1)[group]  # identical captions
    x = F.normalize(y + draw(N, 4, seed=2), dim=1)
    ranked = [sorted(range(N), key=lambda j: -float(x[i] @ y[j])) for i in range(N)]
    expected = [sum(any(group[j] == group[i] for j in ranked[i][:k]) for i in range(N)) / N for k in (1, 5)]
    assert 0 < expected[0] < 1 and cgap.recall(x, y, group) == pytest.approx(expected)


def test_chance_counts_identical_captions_as_one_answer():
    tokens = torch.tensor([7, 7, 8, 9, 7]).int()[:, None]
    val = cgap.Pairs(torch.zeros(5, 3, 8, 8).byte(), tokens, torch.arange(6))
    n, captions, *_ = cgap.chance(cgap.Data(None, val, [], None, None))
    guesses = [tokens[i] == tokens[j] for i in range(5) for j in range(5)]
    assert n == 5 and 1 / captions == pytest.approx(sum(guesses).item() / 25)
    assert cgap.references(8, 0.1, n, captions, 1, 1)["i2t_r1"] == ("1", "0.4400 by chance")


def test_evaluate_scores_tasks_made_by_hand():
    as_is = SimpleNamespace(image=lambda z: z, text=lambda z: z, temperature=lambda: torch.tensor(0.5))
    pairs, e = cgap.Pairs(draw(9, 4).float(), None, torch.arange(10)), torch.eye(4)
    labels, unseen = torch.tensor([0, 1, 2, 3, 0, 1]), torch.arange(4) == 1
    zero_shot = cgap.ZeroShot(e[[0, 1, 2, 3, 0, 0]], labels, e, unseen)
    # e0 + e1 - (.8 e1 + .6 e3) is nearest to e0, which is the query itself, and then to e1
    arithmetic = cgap.Arithmetic(e, torch.tensor([0]), (.8 * e[1] + .6 * e[3])[None], e[1:2], e[1:2].bool())
    data, cfg = cgap.Data(pairs, pairs, [], zero_shot, arithmetic), Config(batch=2, unif=1.0)
    record = cgap.evaluate(as_is, data, cfg, cgap.hardware(Config(device="cpu")))
    losses = [cgap_loss(z, z, 0.5, 1)[0] for z in pairs.images[:8].split(2)]
    assert record["loss"] == pytest.approx(sum(losses).item() / 4, abs=1e-6)
    assert [record[name] for name in ("zero_shot", "zero_shot_unseen")] == pytest.approx([5 / 6, 1 / 2])
    assert record["arithmetic"] == record["i2t_r1"] == record["t2i_r5"] == 1


def test_batches_hold_each_index_once_an_epoch_and_can_start_anywhere():
    def run(n, size, seed, start=0):
        steps = itertools.islice(cgap.batches(n, size, seed, start), 9 - start)
        return [torch.stack(pair).tolist() for pair in steps]

    whole = run(12, 4, 0)
    epochs = [[i for indices, _ in whole[k:k + 3] for i in indices] for k in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs) and epochs[0] != epochs[1]
    assert whole == run(12, 4, 0) != run(12, 4, 1)
    assert all(run(12, 4, 0, start) == whole[start:] for start in range(9))
    assert all(len(set(indices)) == 5 for indices, _ in run(12, 5, 0))  # what is left of an epoch is dropped


RED, BLUE, WHITE, GREY, DARK = (200, 40, 40), (40, 40, 200), (255,) * 3, (128,) * 3, (32,) * 3


def banner(mode="RGB", top=RED, bottom=BLUE, palette=None):
    """A picture of two colours, one above the other."""
    image = Image.new(mode, (64, 64), top)
    image.paste(bottom, (0, 32, 64, 64))
    if palette:
        image.putpalette(palette)
    return image


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("name, image, options, top, bottom", [
    ("rgb.jpg", banner(), {"quality": 95}, RED, BLUE),
    ("cmyk.jpg", banner().convert("CMYK"), {"quality": 95}, RED, BLUE),
    ("wide.png", banner().crop((-64, 0, 128, 64)), {}, RED, BLUE),  # black on both sides
    ("grey.png", banner("L", 128, 32), {}, GREY, DARK),
    ("grey16.png", Image.frombytes("I;16", (64, 64), b"\0\x80" * 2048 + b"\0\x20" * 2048), {}, GREY, DARK),
    ("palette.png", banner("P", 0, 1, RED + BLUE), {}, RED, BLUE),
    ("palette_transparent.png", banner("P", 0, 1, RED + BLUE), {"transparency": 1}, RED, WHITE),
    ("palette.gif", banner("P", 0, 1, RED + BLUE), {"transparency": 0}, WHITE, BLUE),
    ("rgba.png", banner("RGBA", (*RED, 128), (*BLUE, 0)), {}, (227, 147, 147), WHITE),
    ("la.png", banner("LA", (32, 255), (32, 0)), {}, DARK, WHITE),
    ("turned3.jpg", banner().transpose(Image.Transpose.ROTATE_180), {"exif": exif(3)}, RED, BLUE),
    ("turned6.jpg", banner().transpose(Image.Transpose.ROTATE_90), {"exif": exif(6)}, RED, BLUE),
    ("turned8.jpg", banner().transpose(Image.Transpose.ROTATE_270), {"exif": exif(8)}, RED, BLUE)])
def test_photos_load_as_people_see_them(tmp_path, name, image, options, top, bottom):
    image.save(tmp_path / name, **options)
    photo = cgap.load_photo(tmp_path / name, 16)
    assert photo.dtype == torch.uint8 and photo.shape == (3, 16, 16)
    for part, colour in (photo[:, :6, 2:-2], top), (photo[:, -6:, 2:-2], bottom):
        assert_close([part.float()], [torch.tensor(colour).view(3, 1, 1)], 0.05)


def photos(folder, numbers):
    """Write plain pictures of six shades: [(name, [one to three captions that end with the shade])]."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in numbers:
        Image.new("L", (8, 8), 40 * (k % 6)).save(folder / f"{k}.png")
    return [(f"{k}.png", [f"{'very ' * j}shade {40 * (k % 6)}" for j in range(k % 3 + 1)]) for k in numbers]


def write_csv(folder, n=50):
    rows = [(f"photos/{name}", text) for name, texts in photos(folder / "photos", range(n)) for text in texts]
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return folder / "pairs.csv"


def write_coco(folder, train, val):
    (folder / "annotations").mkdir(parents=True)
    for split, numbers in ((train, range(50)), (val, range(50, 60))):
        if split:
            pairs = list(enumerate(photos(folder / split, numbers)))
            images = [{"id": 7 * i, "file_name": name} for i, (name, _) in pairs]
            notes = [{"image_id": 7 * i, "caption": text} for i, (_, texts) in pairs for text in texts]
            content = json.dumps({"images": images, "annotations": notes})
            (folder / "annotations" / f"captions_{split}.json").write_text(content)
    return folder


def load(source):
    return cgap.load_data(Config(data=str(source), batch=4, image_size=8, cache=str(source.parent / "cache")))


def assert_captions_fit(data, sizes):
    """So many images, and each, alone a shade, has its own captions and no others."""
    assert (len(data.train), len(data.val)) == sizes and data.zero_shot is data.arithmetic is None
    seen = set()
    for part, dice in itertools.product((data.train, data.val), range(3)):
        images, tokens = part.pairs(torch.arange(len(part)), torch.full((len(part),), dice))
        captions = [words(row, data.vocab) for row in tokens.tolist()]
        assert [int(text.split()[-1]) for text in captions] == images.float().mean((1, 2, 3)).tolist()
        seen |= set(captions)
    assert len(seen) == 12  # shades 0 and 3 have one caption, 1 and 4 two, 2 and 5 three


@pytest.mark.parametrize("year", ["2014", "2017"])
@pytest.mark.parametrize("val, sizes", [("val", (50, 10)), ("", (45, 5))])
def test_coco_folders_load(tmp_path, year, val, sizes):
    assert_captions_fit(load(write_coco(tmp_path / "coco", f"train{year}", val and f"val{year}")), sizes)


def test_a_csv_is_decoded_once_and_again_when_it_changes(tmp_path, capsys):
    source = write_csv(tmp_path)
    assert_captions_fit(load(source), (45, 5))
    (cache,) = (tmp_path / "cache").iterdir()
    made, _ = cache.stat().st_mtime_ns, capsys.readouterr()
    assert_captions_fit(load(source), (45, 5))
    assert cache.stat().st_mtime_ns == made and capsys.readouterr() == ("", "")
    write_csv(tmp_path, 60)
    assert_captions_fit(load(source), (54, 6))
    assert cache.stat().st_mtime_ns > made and "made anew" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-500]),
                                    lambda path: path.write_bytes(b""), lambda path: torch.save({}, path)])
def test_a_broken_cache_is_made_anew(tmp_path, capsys, damage):
    source = write_csv(tmp_path)
    load(source)
    (cache,) = (tmp_path / "cache").iterdir()
    damage(cache)
    assert_captions_fit(load(source), (45, 5))
    assert "made anew" in capsys.readouterr().out and list((tmp_path / "cache").iterdir()) == [cache]


def test_unreadable_images_are_named_and_left_out(tmp_path, capsys):
    source = write_csv(tmp_path, 60)
    (tmp_path / "photos/13.png").unlink()
    (tmp_path / "photos/20.png").write_bytes(b"not a picture")
    for _ in range(2):  # the second time from the cache
        assert_captions_fit(load(source), (53, 5))
        error = capsys.readouterr().err
        assert "warning: 2 images" in error and "13.png" in error and "20.png" in error


def test_an_image_is_read_again_once_it_is_mended(tmp_path):
    source = write_csv(tmp_path, 60)
    (tmp_path / "photos/13.png").write_bytes(b"not a picture")
    assert_captions_fit(load(source), (53, 6))
    photos(tmp_path / "photos", [13])
    assert_captions_fit(load(source), (54, 6))


def test_more_than_a_tenth_unreadable_is_a_problem(tmp_path):
    source = write_csv(tmp_path)
    for k in range(6):
        (tmp_path / f"photos/{k}.png").unlink()
    with pytest.raises(cgap.Problem, match=r"6 of 50 images.*/1\.png"):
        load(source)
    assert not list((tmp_path / "cache").iterdir())  # nothing half done is left


@pytest.mark.parametrize("row", ["photos/3.png,\n", "photos/3.png,  \n", "photos/3.png\n"])
def test_a_row_without_a_caption_is_left_out_or_a_problem(tmp_path, row):
    source = write_csv(tmp_path)
    source.write_text(source.read_text() + row)
    try:
        assert (load(source).train.tokens != 0).any(1).all()  # of no words the text encoder makes NaN
    except cgap.Problem as problem:
        assert "caption" in str(problem)


# ============================================================================================================
# 2. The real script, run as a user runs it
# ============================================================================================================
TINY = ["--limit", "200", "--batch", "16", "--eval-every", "4", "--image-size", "16", "--device", "cpu"]
TASKS = {"i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5", "zero_shot", "zero_shot_unseen", "arithmetic"}
FIGURES = ["gap.png", "embeddings.png", "spectrum.png", "samples.png", "gap.gif"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder, finished process) of a run of 8 steps."""
    out = tmp_path_factory.mktemp("script") / "run"
    flags = ["--steps", "8", "--unif", "1", "--align", "1", *TINY, "--out", out]
    return out, subprocess.run([sys.executable, cgap.__file__, *flags], capture_output=True, text=True)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(history):
    return [{**record, "seconds": None, "images_per_second": None} for record in history]


def assert_figures(folder):
    for name in FIGURES:
        with Image.open(folder / name) as image:
            darkest, brightest = image.convert("L").getextrema()
            assert darkest < 100 < brightest and (name != "gap.gif" or image.n_frames > 2)


def test_a_run_leaves_config_metrics_checkpoint_and_figures(ran):
    out, process = ran
    assert process.returncode == 0, process.stderr
    config, history = json.loads((out / "config.json").read_text()), records(out)
    assert config == asdict(Config(unif=1, align=1, steps=8, limit=200, batch=16, eval_every=4, image_size=16,
                                   device="cpu", out=str(out)))
    assert [record["step"] for record in history] == [0, 4, 8]
    for record in history:
        assert record.keys() == {"step", "loss", *TERMS, *GAP, *TASKS, "temperature", "seconds",
                                 "images_per_second"}
        assert record["loss"] == pytest.approx(record["clip"] + record["unif"] + record["align"], abs=1e-5)
    assert history[2]["loss"] < history[0]["loss"] and history[2]["images_per_second"] > 0
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert (saved["step"], saved["config"], saved["history"]) == (8, config, history)
    assert_figures(out)
    files = {path.name for path in out.iterdir()}
    assert files == {"checkpoint.pt", "config.json", "metrics.jsonl", *FIGURES}


def test_a_run_prints_a_table_of_start_and_end_and_its_files(ran):
    out, process = ran
    rows = [line.split() for line in process.stdout.splitlines()]
    first, *_, last = records(out)
    for name in *GAP, *TASKS:
        assert [name, f"{first[name]:.3f}", f"{last[name]:.3f}"] in [row[:3] for row in rows]
    for name in (*FIGURES, "metrics.jsonl", "checkpoint.pt"):
        assert [str(out / name)] in rows


def test_no_run_is_written_over(ran, capsys):
    before = {path: path.read_bytes() for path in ran[0].iterdir()}
    assert cgap.main([*TINY, "--out", str(ran[0])]) == 2
    assert "exists already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in ran[0].iterdir()} == before


def test_train_from_python_returns_the_history_and_repeats_it_for_the_same_seed(ran, tmp_path, capfd):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    cfg = Config(**{**json.loads((ran[0] / "config.json").read_text()), "out": str(tmp_path / "again")})
    history = cgap.train(cfg, quiet=True)
    assert history == records(tmp_path / "again") and timeless(history) == timeless(records(ran[0]))
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert torch.is_grad_enabled() and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("steps", [[0], [0, 1], [0, 1, 2]])
def test_pictures_show_the_gap_in_full_at_every_step(steps):
    apart = torch.tensor([-1, 1])[:, None, None] * draw(8, seed=9)
    frames = {k: F.normalize(draw(2, 40, 8, seed=k) + apart, dim=2).half() for k in steps}
    run = cgap.Run(Config(dim=8), [], {"frames": frames})
    for step, (images, texts) in frames.items():
        _, (axis,) = cgap.canvas(1, 1, "", 4, 4)
        cgap.draw_pairs(axis, run, step)
        left, right = (torch.tensor(points.get_offsets().data).mean(0) for points in axis.collections)
        across, upward = right - left
        assert across == pytest.approx((texts.float() - images.float()).mean(0).norm().item(), rel=1e-4)
        assert abs(upward) < 1e-4


def test_same_modality_runs_start_with_or_without_a_gap_and_are_plotted_together(tmp_path, capsys):
    runs = [tmp_path / "keep", tmp_path / "remove"]
    for run in runs:
        flags = ["--steps", "2", "--same-modality", "--init-gap", run.name, "--out", str(run)]
        assert cgap.main([*TINY, *flags]) == 0
    keep, remove = (records(run)[0] for run in runs)
    assert remove["centroid_distance"] < keep["centroid_distance"] / 2
    assert remove["linear_separability"] < keep["linear_separability"]
    assert cgap.main(["--plot", *map(str, runs), "--out", str(tmp_path / "both")]) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == [str(tmp_path / "both" / name) for name in FIGURES]
    assert_figures(tmp_path / "both")


def test_three_dimensions_are_drawn_on_the_sphere_and_not_beside_others(ran, tmp_path, capsys):
    assert cgap.main(["--steps", "2", "--dim", "3", *TINY, "--out", str(tmp_path / "run")]) == 0
    assert_figures(tmp_path / "run")
    assert cgap.main(["--plot", str(ran[0]), str(tmp_path / "run"), "--out", str(tmp_path / "both")]) == 2
    assert "same --dim" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--steps 4", "--steps 1", "--steps 4 --checkpoint-every 1"])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_good_weights(tmp_path, capsys, flags):
    assert cgap.main([*TINY, *flags.split(), "--lr", "1e30", "--out", str(tmp_path / "run")]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "step 1" in error and all(term in error for term in TERMS)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 0 and max(weight.abs().max() for weight in saved["model"].values()) < 100


def test_any_number_of_images_trains(tmp_path):
    cfg = Config(steps=1, limit=33, batch=16, image_size=8, device="cpu", out=str(tmp_path / "run"))
    assert len(cgap.train(cfg, quiet=True)) == 2  # 33: two batches and a rest of one


@pytest.mark.parametrize("flags", ["--dim 1", "--seed 100000000000000"])
def test_settings_that_cannot_work_are_problems(tmp_path, capsys, flags):
    assert cgap.main([*TINY, *flags.split(), "--steps", "1", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("cgap.py: error: ") and not list(tmp_path.iterdir())


def test_import_and_help_are_quiet_and_light(tmp_path):
    code = ("import cgap, sys, contextlib\nprint('imported', flush=True)\n"
            "with contextlib.suppress(SystemExit): cgap.main(['--help'])\n"
            "print(sorted({'matplotlib', 'torchvision', 'PIL'} & set(sys.modules)))")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                             env={"PYTHONPATH": str(Path(cgap.__file__).parent)})
    first, *helped, last = process.stdout.splitlines()
    assert (first, last, process.stderr) == ("imported", "[]", "") and not list(tmp_path.iterdir())
    assert all(f"--{name.replace('_', '-')}" in "\n".join(helped) for name in asdict(Config()))


# ==========================================================================================================
# Bad input, interruption and resumption, several processes
# ==========================================================================================================
RUN = dict(limit=200, batch=16, steps=48, dim=8, image_size=8, unif=1., align=1., xunif=1., temperature=.07,
           learn_temperature=True, eval_every=16, checkpoint_every=4)
PROCESSES = multiprocessing.get_context("forkserver")  # forks one that has imported torch: saves 4 s each
PATIENCE = 300  # seconds at most, for what takes 2 on an idle machine
PROCESSES.set_forkserver_preload(["torch._dynamo", "torch.distributed", "matplotlib.backends.backend_agg"])


def flags(**settings):
    return [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in settings.items()]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """In tmp_path, caches too; on one thread, as two are slow where other processes want the cores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three finished runs, the first never interrupted; not to be written to."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    for name, new in ("run", {}), ("dim", dict(dim=16, steps=1)), ("same", dict(same_modality=True, steps=1)):
        cgap.train(cgap.Config(**RUN | new, out=str(folder / name)), quiet=True)
    return folder


def tree():
    return {p: p.is_file() and p.read_bytes() for p in Path(".").rglob("*") if p.parts[0] != "cache"}


def refused(capsys, argv, *named, written=False):
    """Exit status 2, one line of error that names what is wrong, and (unless `written`) nothing written."""
    before = tree()
    assert cgap.main(argv) == 2
    error = re.sub(r"[^\r\n]*\d%\|[^\r\n]*|\r", "", capsys.readouterr().err).strip()  # but progress bars
    assert error.startswith("cgap.py: error: ") and len(error.splitlines()) == 1, error
    assert all(name in error for name in named), error
    assert written or tree() == before


# ---- bad input ----
@pytest.mark.parametrize("bad, named", [*((bad, bad.split()[0]) for bad in (
    "--batch 0", "--batch 1", "--batch 201", "--unif -1", "--align -.5", "--xunif -1", "--unif inf",
    "--steps 0", "--steps", "--steps many", "--steps 1.5", "--step 5", "--stpes 5", "--dim 0", "--dim 1",
    "--lr 0", "--lr nan", "--lr x", "--temperature nan", "--temperature 0", "--weight-decay inf",
    "--image-size 12", "--vocab 0", "--context 0", "--single 2", "--eval-every 0", "--checkpoint-every 0",
    "--seed -1", "--seed " + "9" * 20, "--fresh-projection", "--plot",
    "--seeds 0 --reproduce losses")),
    ("--device tpu", "tpu"), ("--device cuda:x", "cuda:x"), ("--device cpu:", "cpu:"),
    pytest.param("--device cuda", "cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="")),
    ("--device mps:0", "mps:0"), ("stray", "stray"), ("--temperature .009", "--learn-temperature"),
    ("--limit 4 --batch 2", "4 validation"), ("--init-gap close", "close"), ("--reproduce luck", "luck"),
    ("--init nowhere", "nowhere"), ("--resume ", "checkpoint"), ("--resume nowhere", "nowhere"),
    ("--resume {runs}/run", "leave out --unif"),
    ("--plot nowhere", "nowhere"), ("--resume file/below", "file/below"),
    ("--out file/below", "file/below"), ("--out file", "file"), ("--out folder", "folder"),
    ("--data nowhere", "nowhere"), ("--data folder", "annotations"),
    ("--data file", "header"), ("--data folder/empty", "header"), ("--data folder/no_rows", "no images"),
    ("--plot {runs}/run {runs}/dim", "--dim"), ("--init {runs}/dim", "--dim"),
    ("--init {runs}/same", "--same-modality"), ("--init {runs}/run --same-modality", "--same-modality"),
    ("--init {runs}/run --vocab 3", "words")])
def test_a_bad_flag_is_one_line_of_error_and_nothing_is_written(capsys, runs, bad, named):
    Path("folder").mkdir()
    for name, content in ("file", "precious"), ("folder/empty", ""), ("folder/no_rows", "image,caption\n"):
        Path(name).write_text(content)
    refused(capsys, [*flags(**RUN), "--steps", "1", "--out", "out", *bad.format(runs=runs).split(" ")], named)


def test_a_programming_error_shows_its_traceback(monkeypatch):
    def load_data(cfg):
        raise KeyError("bug")
    monkeypatch.setattr(cgap, "load_data", load_data)
    with pytest.raises(KeyError, match="bug"):
        cgap.main(["--out", "out"])


@pytest.mark.parametrize("flag", ["--resume", "--plot", "--init"])
@pytest.mark.parametrize("change", [
    lambda good: None, lambda good: b"", lambda good: b"hello\n", lambda good: good.read_bytes()[:-5000],
    lambda good: [1, 2], lambda good: {"state_dict": {}}, lambda good: torch.load(good) | {"version": "0.0"},
    lambda good: torch.load(good) | {"config": {"depth": 3}}, lambda good: {"version": Path("not mere data")},
    lambda good: {k: v for k, v in torch.load(good).items() if k not in ("model", "frames")}],
    ids="none empty text truncated list foreign version settings pickle keys".split())
def test_a_broken_checkpoint_is_refused_and_left_alone(capsys, runs, change, flag):
    Path("broken").mkdir()
    content = change(runs / "run/checkpoint.pt")
    if isinstance(content, bytes):
        Path("broken/checkpoint.pt").write_bytes(content)
    elif content:
        torch.save(content, "broken/checkpoint.pt")
    refused(capsys, [*flags(**RUN), "--steps", "1", "--out", "out", flag, "broken"], "broken")


def picture(form="PNG", **options):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, form, **options)
    return file.getvalue()


HEADER = b"IHDR" + (20_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"    # of a PNG, 20,000 x 20,000 pixels
EXIF = Image.Exif()
EXIF[0x112], EXIF[0x110] = 6, "camera"  # turned on its side; and, below, its width is a word
BAD = {"missing": None, "empty": b"", "text": b"text", "truncated": picture()[:45],
       "bomb": picture()[:12] + HEADER + zlib.crc32(HEADER).to_bytes(4, "big") + picture()[33:],
       "EXIF": picture("JPEG", exif=EXIF).replace(b"\x01\x10\x00\x02", b"\x01\x00\x00\x02")}
ON_DATA = "--batch 16 --steps 1 --dim 8 --image-size 8 --out out --data".split()


def bad_photos(folder, bad="empty", count=0):
    """60 images 0.jpg, 1.jpg, ... (PNG, in fact), the first `count` of which are bad."""
    Path(folder).mkdir(parents=True)
    for i in range(60):
        content = BAD[bad] if i < count else picture()
        if content is not None:
            Path(folder, f"{i}.jpg").write_bytes(content)


def table(*more, header="image,caption", encoding="utf-8", **options):
    """A CSV file of 60 pairs and `more` lines."""
    bad_photos("in", **options)
    rows = [header, *(f"{i}.jpg,photo number {i}" for i in range(60)), *more]
    Path("in/data.csv").write_bytes("\n".join(rows).encode(encoding))
    return "in/data.csv"


def change(part, *drop, **new):
    """An edit of the first image or annotation."""
    return lambda content: content | {part: [
        {k: v for k, v in (content[part][0] | new).items() if k not in drop}, *content[part][1:]]}


@pytest.mark.parametrize("edit, named", [*((edit, "captions_train2017.json") for edit in (
    lambda content: b"\x89PNG", lambda content: b"", lambda content: json.dumps(content).encode()[:900],
    lambda content: b"[" * 100_000, lambda content: [content], lambda content: {"annotations": []},
    lambda content: content | {"images": 7}, lambda content: content | {"images": None},
    lambda content: content | {"images": []}, lambda content: content | {"annotations": {"a": 1}},
    lambda content: {"images": content["images"]}, change("images", "id"), change("images", "file_name"),
    change("images", file_name=5), change("images", id=[]), change("annotations", "image_id"),
    change("annotations", image_id=99), change("annotations", "caption"))),
    *((change("annotations", caption=caption), "caption") for caption in ("", " \n", 5, None, ["a"])),
    (lambda content: content | {"annotations": []}, "coco"),
    (change("images", file_name="../../out.jpg"), "out.jpg"),
    (lambda content: change("images", file_name=str(Path("out.jpg").absolute()))(content), "out.jpg")])
def test_bad_coco_annotations_are_refused(capsys, edit, named):
    bad_photos("coco/train2017")
    Path("out.jpg").write_bytes(picture())                            # readable, but outside the folder
    content = edit({"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(60)],
                    "annotations": [{"image_id": i, "caption": f"photo number {i}"} for i in range(60)]})
    Path("coco/annotations").mkdir()
    Path("coco/annotations/captions_train2017.json").write_bytes(
        content if isinstance(content, bytes) else json.dumps(content).encode())
    refused(capsys, [*ON_DATA, "coco"], named)


@pytest.mark.parametrize("more, options, named", [
    ([], dict(header=""), "header"), ([], dict(header="0.jpg,photo"), "header"),
    ([], dict(header="image,text"), "header"), (["photo"], dict(header="caption,image"), "image"),
    (["0.jpg,café"], dict(encoding="latin-1"), "UTF-8"), ([], dict(encoding="utf-16"), "UTF-8"),
    (["7.jpg,"], {}, "caption"), (["7.jpg, "], {}, "caption"), (["7.jpg"], {}, "caption"),
    (["7.jpg," + "x" * 200_000], {}, "data.csv"), ([f'"\n{i}.jpg",photo' for i in range(9)], {}, "9 of 69"),
    *(([], dict(bad=bad, count=7), "7 of 60") for bad in BAD if bad != "EXIF")])
def test_a_bad_csv_file_and_too_many_bad_images_are_refused(capsys, more, options, named):
    refused(capsys, [*ON_DATA, table(*more, **options)], named)


@pytest.mark.parametrize("bad", BAD)
def test_a_few_bad_images_are_left_out_with_a_warning(capsys, bad):
    data = cgap.load_data(cgap.Config(data=table(bad=bad, count=6), batch=16, image_size=8))
    read = len(data.train) + len(data.val)
    assert read == 54 and "1.jpg" in capsys.readouterr().err or read == 60 and bad == "EXIF"


def test_unusual_images_and_captions_that_are_valid_are_read():
    file = table('1.jpg,"two\nlines, one ""caption"""', "2.jpg,ein schöner Tag", encoding="utf-8-sig")
    Image.new("RGB", (1, 1), "blue").save("in/1.jpg", "PNG")
    black = Image.new("RGB", (9, 9))
    Image.new("RGB", (9, 9), "blue").save("in/2.jpg", "GIF", save_all=True, append_images=[black])
    data = cgap.load_data(cgap.Config(data=file, batch=16, image_size=8))
    assert len(data.train) + len(data.val) == 60 and {"two", "lines", '"', "schöner"} <= set(data.vocab)
    assert (data.train.images[:2, 2] > 200).all() and (data.train.images[:2, 0] < 50).all()  # both are blue


@pytest.mark.parametrize("file, content, flag, named", [
    ("other/0.png", b"", "--zero-shot", "classes"), ("classes/notes.txt", b"", "--zero-shot", "classes"),
    ("classes", b"a file", "--zero-shot", "classes"), ("classes/cat/notes.txt", b"", "--zero-shot", "cat"),
    *(("classes/cat/0.png", BAD[bad], "--zero-shot", "cat/0.png") for bad in ("empty", "truncated", "bomb")),
    ("classes", b"a file", "--cache", "classes")])
def test_a_bad_zero_shot_or_cache_folder_is_refused(capsys, file, content, flag, named):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_bytes(content)
    refused(capsys, [*ON_DATA, table(), flag, "classes"], named)


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond 100 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_too_full_for_the_cache_is_an_error_and_leaves_nothing(capsys):
    argv = [*ON_DATA, table(), "--image-size", "64"]
    with full_disk():
        refused(capsys, argv)
    assert not any(path.is_file() for path in Path("cache").rglob("*"))


def test_a_run_that_diverges_says_so_and_keeps_finite_weights(capsys):
    diverging = RUN | dict(lr=1e30, steps=9, eval_every=1, checkpoint_every=1, out="out")
    refused(capsys, flags(**diverging), "not finite", written=True)
    assert all(weight.isfinite().all() for weight in cgap.load_run("out").saved["model"].values())


# ---- interruption and resumption ----
def result(run):
    """The bytes of the weights, and metrics.jsonl without what time decides."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]
    return metrics, {k: v.numpy().tobytes() for k, v in cgap.load_run(run).saved["model"].items()}


def resume(run):
    cgap.train(cgap.replace(cgap.load_run(run).cfg, out=str(run)), resume=True, quiet=True)


def command(argv, log, environment=()):
    """In a process of its own: the command line on one thread, its words into the file `log`."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    sys.exit(cgap.main(argv))


def start(target, *args):
    process = PROCESSES.Process(target=target, args=args)
    process.start()
    return process


def wait_for_checkpoint(process, run, other_than=0):
    """Wait until the run has a checkpoint, and another than that inode; returns its inode."""
    end = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(FileNotFoundError):
            if (inode := (run / "checkpoint.pt").stat().st_ino) != other_than:
                return inode
        assert process.is_alive() and time.monotonic() < end
        time.sleep(.002)


def test_a_run_killed_at_random_moments_ends_as_one_never_interrupted(tmp_path, runs):
    run, dice, inode = tmp_path / "run", random.Random(0), 0
    for argv in flags(**RUN, out=run), ["--resume", str(run)], ["--resume", str(run)]:
        process = start(command, argv, tmp_path / "log")
        for _ in range(dice.randint(1, 3)):
            inode = wait_for_checkpoint(process, run, inode)
        time.sleep(.05 * dice.random())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and cgap.load_run(run).saved["step"] < RUN["steps"]
        with open(run / "metrics.jsonl", "a") as metrics:
            metrics.write('{"step": 12, "lo')                         # torn, as a crash may leave it
    resume(run)
    assert result(run) == result(runs / "run")
    temperature = [record["temperature"] for record in cgap.load_run(run).history]
    assert temperature[0] == pytest.approx(.07) and temperature[-1] != temperature[0]


def test_a_draft_that_a_killed_run_has_left_is_removed_when_it_is_resumed(runs):
    shutil.copytree(runs / "run", "run")
    Path("run/checkpoint.pt.1234.tmp").write_bytes(b"half a checkpoint")
    resume("run")
    assert not list(Path("run").glob("*.tmp"))


def test_a_save_that_fails_leaves_the_run_as_it_was(capsys, runs, monkeypatch):
    def fsync(file):
        raise OSError(28, "No space left on device")

    shutil.copytree(runs / "run", "run")
    with full_disk():
        refused(capsys, ["--resume", "run"], "run/checkpoint.pt", written=True)
    monkeypatch.setattr(os, "fsync", fsync)
    refused(capsys, ["--resume", "run"], "run/checkpoint.pt", "No space left")
    assert result("run") == result(runs / "run") and not list(Path("run").glob("*.tmp"))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_checkpoint_figures_and_advice(tmp_path, number, status):
    run, log = tmp_path / "run", tmp_path / "log"
    endless = RUN | dict(steps=10**6, eval_every=10**6, checkpoint_every=10**6, out=run)
    process = start(command, flags(**endless), log)
    wait_for_checkpoint(process, run)
    os.kill(process.pid, number)
    process.join(PATIENCE)
    assert process.exitcode == status and "Traceback" not in log.read_text()
    assert f"--resume {run}" in log.read_text().splitlines()[-1] and cgap.load_run(run).saved["step"] > 0
    assert {"gap.png", "embeddings.png", "spectrum.png", "samples.png", "gap.gif"} <= set(os.listdir(run))


def test_a_finished_run_is_not_changed_by_resuming_it(capsys, runs):
    shutil.copytree(runs / "run", "run")
    assert cgap.main(["--resume", "run"]) == 0 and "run is finished" in capsys.readouterr().out
    assert Path("run/metrics.jsonl").read_bytes() == (runs / "run/metrics.jsonl").read_bytes()
    assert result("run") == result(runs / "run")


@pytest.mark.parametrize("old, new", [("number 7", "number 7 of mine"), ("photo", "print")])
def test_a_run_is_not_resumed_on_data_with_other_words(capsys, old, new):
    file = Path(table())
    cgap.train(cgap.Config(data=str(file), batch=16, steps=1, dim=8, image_size=8, out="run"), quiet=True)
    file.write_text(file.read_text().replace(old, new))
    refused(capsys, ["--resume", "run"], "run")


# ---- several processes ----
def gradients(rank, world, folder):
    """The gradients of one step as train takes it, in float64, saved by the first process."""
    torch.set_num_threads(1)
    cfg, g = cgap.Config(dim=8, context=6, learn_temperature=True, temperature=.07), torch.Generator()
    images = torch.randint(256, (16, 3, 8, 8), generator=g, dtype=torch.uint8)
    texts = torch.randint(1, 20, (16, 6), generator=g)
    torch.manual_seed(0)
    model = net = cgap.TwoEncoders(cfg, 20).double()
    model.image.body.register_forward_pre_hook(lambda module, args: args[0].double())
    gather = lambda rows: rows  # noqa: E731
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/sync{world}", rank=rank, world_size=world)
        net, gather = torch.nn.parallel.DistributedDataParallel(model), cgap.Gather.apply
    mine = slice(rank * 16 // world, (rank + 1) * 16 // world)
    x, y, T = net(images[mine], texts[mine])
    cgap.cgap_loss(gather(x), gather(y), T, 1, 1, 1)[0].backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{world}.pt")
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_do_not_depend_on_the_number_of_processes(tmp_path, world):
    processes = [start(gradients, rank, world, tmp_path) for rank in range(world)]
    gradients(0, 1, tmp_path)
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    one, several = torch.load("1.pt"), torch.load(f"{world}.pt")
    worst = max(((several[name] - grad).norm() / grad.norm()).item() for name, grad in one.items())
    print(f"{world} processes: largest relative difference {worst:.1e}")
    assert one.keys() == several.keys() and "log_scale" in one and worst < 1e-6


def test_torchrun_on_two_processes_gives_the_curve_of_one(tmp_path):
    settings = RUN | dict(steps=16, eval_every=4)
    launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
    with open("log", "w") as log:
        two = subprocess.Popen([*launch, cgap.__file__, *flags(**settings, out="two")], stdout=log,
                               stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    one = cgap.train(cgap.Config(**settings, out="one"), quiet=True)
    assert two.wait(PATIENCE) == 0, Path("log").read_text()
    curves = [[record["loss"] for record in history] for history in (one, cgap.load_run("two").history)]
    assert len(curves[0]) == 5 and curves[1] == pytest.approx(curves[0], abs=1e-3)


def test_a_batch_that_cannot_be_split_is_an_error(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(capsys, flags(**RUN, out="out"), "--batch 16", "3 processes")


@pytest.mark.parametrize("killed", [True, False])
def test_a_process_that_fails_takes_the_other_with_it(tmp_path, killed):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    processes = []
    for rank, data in (0, "synthetic"), (1, "synthetic" if killed else "nowhere"):
        argv = flags(**RUN | dict(steps=10**6, out=tmp_path / "run", data=data))
        ranked = where | dict(RANK=str(rank), LOCAL_RANK=str(rank))
        processes.append(start(command, argv, tmp_path / f"log{rank}", ranked))
    if killed:
        wait_for_checkpoint(processes[0], tmp_path / "run")
        processes[1].kill()
    for process in processes:
        process.join(PATIENCE)
    status = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert status[0] not in (0, None) and status[1] == (-signal.SIGKILL if killed else 2)


# ==========================================================================================================
# Claims: the data are consistent, runs are shared and found again, and no number in the README can drift
# ==========================================================================================================
def test_every_claim_checks_runs_that_it_has():
    for name, claim in cgap.CLAIMS.items():
        configs = cgap.claim_configs(claim, 0)
        assert all(cfg.check() for cfg in configs.values())
        for metric, more, less, factor in claim.checks:
            assert {more.removesuffix(", at the start"), less.removesuffix(", at the start")} <= set(configs), name


def test_all_losses_of_a_claim_get_the_same_settings_otherwise():
    for name in ("losses", "same-modality", "image-text-from-zero"):
        configs = cgap.claim_configs(cgap.CLAIMS[name], 0).values()
        plain = {json.dumps({**asdict(cfg), "unif": 0, "align": 0, "xunif": 0, "out": ""}) for cfg in configs}
        assert len(plain) == 1, name


def test_equal_runs_of_two_claims_are_one_run():
    terms, temperature = (cgap.claim_configs(cgap.CLAIMS[name], 1) for name in ("terms", "temperature"))
    assert terms["CLIP"].out == temperature["CLIP, T = 0.01"].out != terms["CUA"].out


def fake_result(values):
    return {"seeds": len(values), "machine": "m", "runs": {
        "CLIP": [{"start": {"a": 0.5}, "end": {"a": value}} for value in values],
        "CUA": [{"start": {"a": 0.5}, "end": {"a": value - 0.1}} for value in values]}}


@pytest.mark.parametrize("check, verdict", [
    (("a", "CLIP", "CUA", 1), "a, CLIP > CUA: holds (0.100 ± 0.000)"),          # paired: every seed by the same
    (("a", "CUA", "CLIP", 1), "a, CUA > CLIP: **does not hold** (-0.100 ± 0.000)"),
    (("a", "CLIP", "CLIP, at the start", 1), "**does not hold** (0.200 ± 0.300)"),   # positive, but within the spread
    (("a", "CLIP", "CUA", 2), "a, CLIP > 2 x CUA: **does not hold** (-0.500 ± 0.300)")])
def test_a_check_holds_if_the_paired_difference_exceeds_its_spread(check, verdict, monkeypatch):
    monkeypatch.setitem(cgap.CLAIMS, "fake", cgap.Claim("text", "published", {"CLIP": {}, "CUA": {}}, [check], ("a",)))
    table = cgap.claim_table("fake", fake_result([0.4, 0.7, 1.0]))
    assert verdict in table and "| CLIP | 0.700 ± 0.300 |" in table


def test_reproduce_runs_each_run_once_and_goes_on_where_it_was(tmp_path, monkeypatch):
    tiny = {"steps": 2, "limit": 64, "batch": 16}
    claim = cgap.Claim("text", "published", {"CLIP": tiny, "tuned": {**tiny, "init": "CLIP", "steps": 3}},
                       [("alignment", "CLIP", "tuned", 1)], ("alignment", "zero_shot"))
    monkeypatch.setattr(cgap, "CLAIMS", {"tiny": claim})
    monkeypatch.chdir(tmp_path)
    cgap.reproduce(["tiny"], 2, "figures")
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/reproduce/*/checkpoint.pt")}
    results = json.loads((tmp_path / "figures/results.json").read_text())
    assert len(first) == 4 and len(results["tiny"]["runs"]["tuned"]) == 2
    assert (tmp_path / "figures/tiny.png").stat().st_size > 1000
    cgap.reproduce(["tiny"], 2, "figures")
    assert first == {path: path.stat().st_mtime_ns for path in first}
    assert json.loads((tmp_path / "figures/results.json").read_text()) == results


def test_broken_results_are_refused_before_any_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("results.json").write_text('{"losses": {')
    refused(capsys, ["--reproduce", "losses", "--out", "."], "results.json")


@pytest.mark.parametrize("name", cgap.CLAIMS)
def test_the_tables_of_the_readme_are_those_of_the_results(name):
    here = Path(__file__).parent
    results = json.loads((here / "figures/results.json").read_text())
    assert cgap.claim_table(name, results[name]).strip() in (here / "README.md").read_text()
    assert (here / "figures" / f"{name}.png").stat().st_size > 1000


# ============================================================================================================
# 3. Speed: `python test_cgap.py` prints a table. A ratio is that of the medians of two sides that take turns in one
# process, so that a busy machine slows both; nothing is asserted, and pytest does not run it.
# ============================================================================================================
def in_turns(rounds, **sides):
    """{name: median seconds} of functions that take turns, after one call of each to warm up."""
    times = {name: [] for name in sides}
    for _, (name, side) in itertools.product(range(rounds + 1), sides.items()):
        start = time.perf_counter()
        side()
        times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def resident(name):
    """VmRSS, VmHWM (its peak) or RssAnon of this process, in MB. Linux only."""
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1024


def in_fresh_process(function, *args):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def all_terms(x, y, loss=cgap_loss, **options):
    """[value, gradients] with all weights 1."""
    total = loss(x, y, 0.01, 1.0, 1.0, 1.0, **options)[0]
    return total.detach(), *torch.autograd.grad(total, (x, y))


def noisy_pairs(N):
    x, noise = torch.randn(2, N, 128, generator=seeded())
    return x.clone().requires_grad_(), (x + noise).requires_grad_()


def nine_products(x, y):
    """Three matrices of cosines, and for each two products to go back through it."""
    for a, b in (x, x), (y, y), (x, y):
        cosines = a @ b.T
        cosines @ b, cosines.T @ a


def peak(N, loss, block):
    """MB above the inputs for a loss and its gradients, in a process that has not needed more before."""
    options = {"block": block} if block else {}
    all_terms(*noisy_pairs(64), loss, **options)
    x, y = noisy_pairs(N)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = resident("VmRSS")
    all_terms(x, y, loss, **options)
    return resident("VmHWM") - before


def speed_of_the_loss():
    compiled = torch.compile(cgap_loss, dynamic=False)
    for N, rounds in (256, 40), (1024, 15), (4096, 5):
        x, y = noisy_pairs(N)
        sides = {"paper": lambda: all_terms(x, y, paper_loss), "eager": lambda: all_terms(x, y),
                 "compiled": lambda: all_terms(x, y, compiled)}
        if N == 4096:
            sides |= {"products": lambda: nine_products(x.detach(), y.detach()),
                      "blocks": lambda: all_terms(x, y, block=1024)}
        t = in_turns(rounds, **sides)
        yield f"loss and gradients, N = {N:,}: times as fast as the formulas", ">= 1.7", t["paper"] / t["eager"]
        yield "the same, compiled", ">= 3.5" if N >= 1024 else "-", t["paper"] / t["compiled"]
    full, blocks = all_terms(x, y), all_terms(x, y, block=1024)
    yield "memory, share of that of the formulas", "<= 0.4", (
        in_fresh_process(peak, 4096, cgap_loss, None) / in_fresh_process(peak, 4096, paper_loss, None))
    yield "compiled, time over that of the nine bare products", "<= 1.5", t["compiled"] / t["products"]
    yield "in blocks of 1,024, time over that of whole matrices", "<= 1.3", t["blocks"] / t["eager"]
    yield "in blocks, largest relative difference", "<= 1e-5", max(
        (a - b).abs().max().item() / b.abs().max().item() for a, b in zip(blocks, full))
    yield "in blocks, N = 16,384: memory above the inputs, MB", "<= 1000", in_fresh_process(
        peak, 16384, cgap_loss, 1024)


def speed_of_a_step(steps=240):
    """train's own loop, from one batch to the next, and in turn with it the bare encoders on a fixed batch."""
    cfg = Config(unif=1.0, align=1.0, steps=steps, eval_every=steps, device="cpu")
    data, batches, loop, bare = cgap.load_data(cfg), cgap.batches, [], []
    images, texts = data.train.pairs(torch.arange(cfg.batch))
    model = cgap.TwoEncoders(cfg, len(data.vocab))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def timed(*args):
        source = batches(*args)
        while True:
            start = time.perf_counter()
            yield next(source)
            middle = time.perf_counter()
            x, y, _ = model(images, texts)
            optimizer.zero_grad()
            (x.sum() + y.sum()).backward()
            optimizer.step()
            loop.append(middle - start)
            bare.append(time.perf_counter() - middle)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(cgap, "batches", timed):
        cgap.train(cgap.replace(cfg, out=f"{folder}/run"), quiet=True)
    plain = [k for k in range(10, steps) if k % (steps // 40) and k % cfg.checkpoint_every]
    ratio = statistics.median(loop[k] for k in plain) / statistics.median(bare[k] for k in plain)
    yield "training step, time over that of the bare encoders and optimiser", "<= 1.05", ratio


def speed_of_a_run():
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as folder:
        start, out = time.perf_counter(), Path(folder) / "run"
        subprocess.run([sys.executable, cgap.__file__, "--unif", "1", "--align", "1", "--out", str(out)],
                       check=True, capture_output=True, env=environment)
        wall = time.perf_counter() - start
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    steps = last["step"] * Config.batch / last["images_per_second"]
    yield "evaluation, snapshots and checkpoints, share of a default run", "<= 0.1", (last["seconds"] - steps) / wall
    yield "default run with --unif 1 --align 1, prompt to prompt, s", "<= 60", wall
    scenes = cgap.random_scenes(20_000, 0.1, seeded())
    yield "drawing 20,000 scenes, s", "<= 2", in_turns(3, draw=lambda: cgap.draw_scenes(scenes, 32, seeded()))["draw"]


def coco_sized(cache, key, train, val, cfg, size, n=118_287, captions=591_753):
    """In place of build_cache: as many black images and random captions as MS-COCO has, 5,000 images to validate on."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cfg.cache) as file:
        images = torch.from_file(file.name, shared=True, size=n * 3 * size * size, dtype=torch.uint8)
        cgap.save({"key": key, "images": images.view(n, 3, size, size), "train": n - 5000, "faults": {},
                   "vocab": [str(k) for k in range(10_002)], "first": torch.linspace(0, captions, n + 1).long(),
                   "tokens": torch.randint(2, 10_002, (captions, 20), dtype=torch.int32)}, cache)


def open_and_train(cfg):
    start = time.perf_counter()
    cgap.photo_data(cfg)
    seconds = time.perf_counter() - start
    cgap.train(cfg, quiet=True)
    return seconds, resident("VmRSS")


def speed_of_the_cache(n=5000):
    with tempfile.TemporaryDirectory() as folder:
        noise = torch.rand(40, 3, 30, 40, generator=seeded())
        for k, image in enumerate(F.interpolate(noise, (480, 640), mode="bicubic").clamp(0, 1).mul(255).byte()):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{folder}/{k}.jpg", quality=85)
        rows = "".join(f"{k}.jpg,picture {k}\n" for k in range(n))
        for k in range(40, n):
            shutil.copy(f"{folder}/{k % 40}.jpg", f"{folder}/{k}.jpg")
        Path(folder, "pairs.csv").write_text("image,caption\n" + rows)
        cfg = Config(data=f"{folder}/pairs.csv", cache=f"{folder}/cache", steps=200, device="cpu", out=f"{folder}/run")

        def build(workers):
            with mock.patch("os.cpu_count", return_value=workers), contextlib.redirect_stderr(io.StringIO()):
                cgap.photo_data(cfg)
            shutil.rmtree(cfg.cache)

        t = in_turns(2, one=lambda: build(1), two=lambda: build(2))
        yield f"decoding {n:,} photographs, 2 workers: times as fast as 1", ">= 1.8", t["one"] / t["two"]
        Path(cfg.cache).mkdir()
        with mock.patch.object(cgap, "build_cache", coco_sized):
            cgap.photo_data(cfg)
        seconds, memory = in_fresh_process(open_and_train, cfg)
        yield "opening a cache of MS-COCO's size, s", "<= 1", seconds
        yield "resident memory after 200 steps from it, MB", "< 1500", memory


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count())
    print("| what | mark | measured |\n|---|---|---|")
    for part in speed_of_the_loss, speed_of_a_step, speed_of_a_run, speed_of_the_cache:
        for what, mark, value in part():
            print(f"| {what} | {mark} | {value:.3g} |", flush=True)
