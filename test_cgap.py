# SPDX-License-Identifier: MIT
"""Tests of cgap.py: `python -m pytest -q`. First closed forms and slow independent references, then
the real script, run as a user runs it."""

import csv
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import fields, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads that share so little work only wait for each other
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import cgap
from cgap import Config, cgap_loss, gap_metrics

TERMS = {"clip", "align", "unif", "xunif"}
GAP = ("centroid_distance linear_separability linear_separability_c100 matched_cosine alignment "
       "uniformity_image uniformity_text cross_uniformity effective_rank_image effective_rank_text").split()
TASKS = {"i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5", "zero_shot", "zero_shot_unseen", "arithmetic"}
PATIENCE = 300  # seconds at most, for what takes a few on an idle machine


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clouds(N, D, apart):
    """Two clouds of pairs, `apart` along the first axis."""
    x = draw(N, D)
    shift = apart / 2 * F.one_hot(torch.tensor(0), D)
    return x - shift, x + draw(N, D, seed=1) + shift


def with_gradients(loss, x, y, T, *args):
    """[total, its gradients for x, y and T] as float64."""
    inputs = [z.detach().clone().requires_grad_() for z in (x, y, torch.tensor(T, dtype=x.dtype))]
    total = loss(*inputs, *args)[0]
    return [z.double() for z in (total.detach(), *torch.autograd.grad(total, inputs))]


def assert_close(got, expected, tolerance):
    """To `tolerance` of the largest element of each tensor, or of 1 if that is more."""
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """In tmp_path, caches too, on one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)


# ==================================================================================================
# 1. Closed forms and slow independent references
# ==================================================================================================
def mean_exp(squares):
    return squares.mul(-2).exp().mean().log()


def paper_loss(x, y, T=0.01, unif=0.0, align=0.0, xunif=0.0, center=False):
    """The paper's definitions as one writes them down, by distances between pairs, in float64."""
    x, y = x.double(), y.double()
    if center:
        x, y = x - x.sum(0) / len(x), y - y.sum(0) / len(y)
    x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    pair = torch.arange(len(x))
    logits = x @ y.T / T
    others = ~torch.eye(len(x), dtype=torch.bool)
    terms = {"clip": (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2,
             "align": (x - y).norm(dim=1).pow(2).mean(),
             "unif": (mean_exp(torch.pdist(x).pow(2)) + mean_exp(torch.pdist(y).pow(2))) / 2,
             "xunif": mean_exp(torch.cdist(x, y).masked_select(others).pow(2))}
    return terms["clip"] + unif * terms["unif"] + align * terms["align"] + xunif * terms["xunif"], terms


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("weights", [(0, 0, 0, False), (1, 1, 0, True), (0.3, 0, 2, False)])
@pytest.mark.parametrize("N, copies", [(3, 0), (64, 9)])
def test_loss_and_gradients_equal_the_definitions(N, copies, weights, dtype, tolerance):
    x, y = (z.to(dtype) for z in clouds(N, 16, 2))
    x[:copies], y[:copies] = x[N - 1], y[N - 1]  # duplicate rows
    total, terms = cgap_loss(x.requires_grad_(), y, 0.05, *weights)
    assert total.dtype == dtype and terms.keys() == TERMS and total.requires_grad
    assert not any(term.requires_grad for term in terms.values())  # a kept one would keep its matrix
    for name, value in paper_loss(x, y, 0.05, center=weights[3])[1].items():
        assert terms[name].item() == pytest.approx(value.item(), rel=tolerance, abs=tolerance)
    assert_close(with_gradients(cgap_loss, x, y, 0.05, *weights), with_gradients(paper_loss, x, y, 0.05, *weights),
                 tolerance)


def test_closed_forms():
    eye = torch.eye(128, dtype=torch.float64)
    same = cgap_loss(eye[:64], eye[:64])[1]  # T is the paper's 0.01
    assert same["clip"].item() == pytest.approx(math.log1p(63 * math.exp(-100)), abs=1e-12)
    assert same["unif"].item() == same["xunif"].item() == pytest.approx(-4)
    orthogonal = cgap_loss(eye[:64], eye[64:])[1]
    assert orthogonal["align"].item() == pytest.approx(2)
    assert orthogonal["clip"].item() == pytest.approx(math.log(64))  # it knows nothing


def test_half_precision_inputs_and_autocast_compute_in_float32():
    def under_autocast(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return cgap_loss(*args)

    x, y = (z.bfloat16() for z in clouds(40, 8, 1))
    exact = with_gradients(cgap_loss, x.float(), y.float(), 0.01, 1, 1, 1)
    assert_close(with_gradients(under_autocast, x.float(), y.float(), 0.01, 1, 1, 1), exact, 0)
    total, terms = under_autocast(x, y, 0.01, 1, 1, 1)
    assert {z.dtype for z in (total, *terms.values())} == {torch.float32} and total == exact[0]


@pytest.mark.parametrize("function", [cgap_loss, gap_metrics])
@pytest.mark.parametrize("x, y", [(torch.ones(1, 3),) * 2, (torch.ones(6),) * 2, (torch.ones(6, 3).long(),) * 2,
                                  (torch.ones(6, 3), torch.ones(7, 3))])
def test_inputs_without_a_meaning_raise_value_error(function, x, y):
    with pytest.raises(ValueError, match="x and y"):
        function(x, y)


def test_what_is_not_finite_has_no_gap():
    with pytest.raises(ValueError, match="finite"):
        gap_metrics(torch.ones(6, 3), torch.full((6, 3), math.nan))


def test_the_compiled_loss_is_the_same():
    args = *(z.float() for z in clouds(16, 8, 1)), 0.05, 1, 1, 1, True
    compiled = torch.compile(cgap_loss, backend="aot_eager")  # traced as by default, not built in C++
    assert_close(with_gradients(compiled, *args), with_gradients(cgap_loss, *args), 1e-5)


def test_the_loss_section_works_where_it_is_pasted():
    body = re.split(r"^# \d+\. .*$", Path(cgap.__file__).read_text(), flags=re.M)[1]
    exec(body, pasted := {})
    args = *clouds(20, 8, 1), 0.1, 1, 2, 3, True
    assert_close(with_gradients(pasted["cgap_loss"], *args), with_gradients(cgap_loss, *args), 0)


def slow_rank(z):
    share = torch.linalg.svdvals(z - z.mean(0)).pow(2)
    return torch.exp(-sum(p * p.log() for p in share / share.sum()))


def test_gap_metrics_equal_their_definitions():
    x, y = (F.normalize(z, dim=1) for z in clouds(60, 6, 1))
    terms = paper_loss(x, y)[1]
    expected = {"centroid_distance": math.dist(x.mean(0), y.mean(0)), "matched_cosine": (x * y).sum(1).mean(),
                "alignment": terms["align"], "cross_uniformity": terms["xunif"],
                "uniformity_image": mean_exp(F.pdist(x).pow(2)), "uniformity_text": mean_exp(F.pdist(y).pow(2)),
                "effective_rank_image": slow_rank(x), "effective_rank_text": slow_rank(y)}
    state = torch.get_rng_state()
    got = gap_metrics(7 * x.float(), y.float() / 3)
    assert list(got) == GAP and {type(value) for value in got.values()} == {float}
    for name, value in expected.items():
        assert got[name] == pytest.approx(float(value), abs=1e-5), name
    assert torch.equal(torch.get_rng_state(), state)


def test_uniformity_of_many_pairs_is_that_of_a_part():
    x = draw(10_001, 4).float()
    expected = mean_exp(F.pdist(F.normalize(x[::3], dim=1)).pow(2)).item()
    assert gap_metrics(x, x)["uniformity_image"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("C", [1, 100])
@pytest.mark.parametrize("apart, low, high", [(20, 1, 1), (1.5, .65, .9), (0, .4, .6)])
def test_separability_is_the_held_out_accuracy_of_logistic_regression(apart, low, high, C):
    x, y = (F.normalize(z, dim=1) for z in clouds(500, 5, apart))
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    fit, held_out = (F.pad(torch.cat([x[part], y[part]]), (0, 1), value=1.0) for part in (order[:400], order[400:]))
    labels = torch.arange(2.).repeat_interleave(400).double()
    w = cgap.fit_logistic(fit, labels, C).requires_grad_()
    objective = w[:-1] @ w[:-1] / 2 + C * F.binary_cross_entropy_with_logits(fit @ w, labels, reduction="sum")
    assert torch.autograd.grad(objective, w)[0].abs().max() < 1e-6 * C  # convex: this is its minimum
    right = ((held_out @ w > 0) == torch.arange(2).repeat_interleave(100)).double().mean().item()
    assert low <= right <= high and cgap.linear_separability(x, y, C).item() == pytest.approx(right)


@pytest.mark.parametrize("d, optimum", [(2, -1.575), (3, -2.080), (16, -3.513), (128, -3.938)])
def test_uniform_optimum_is_the_papers_and_that_of_a_uniform_sample(d, optimum):
    assert cgap.uniform_optimum(d) == pytest.approx(optimum, abs=6e-4)
    x = F.normalize(draw(1000, d), dim=1)
    assert cgap.uniformity(x, x).item() == pytest.approx(optimum, abs=0.03)


def test_the_effective_temperature_is_what_is_left_without_the_means():
    x, y = (F.normalize(z, dim=1) for z in clouds(300, 5, 3))
    left = [(z - z.mean(0)).square().sum(1).mean() for z in (x, y)]  # its mean square, by definition
    expected = 0.01 / math.sqrt(left[0] * left[1])
    assert cgap.effective_temperature(x, y, 0.01) == pytest.approx(expected) and expected > 0.011


def test_points_open_a_gap_with_an_offset_and_not_without():
    ends = {}
    for offset in (False, True):
        start, *_, end = cgap.smallest_gap(offset, steps=60, n=256)
        assert start["linear_separability"] < 0.6 and (start["step"], end["step"]) == (0, 60)
        assert list(end) == ["step", "effective_temperature", *GAP]
        ends[offset] = end["linear_separability"]
    assert ends[True] > 0.95 and ends[False] < 0.65
    closed = cgap.smallest_gap(True, unif=1.0, align=1.0, steps=300, n=256)[-1]
    assert closed["linear_separability"] < 0.65


def encoders(**settings):
    torch.manual_seed(0)
    return cgap.TwoEncoders(Config(dim=8, context=12, **settings), vocab=20)


def inputs(n):
    torch.manual_seed(1)
    return torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8), torch.randint(1, 20, (n, 6), dtype=torch.int32)


def test_an_image_embedding_does_not_depend_on_its_batch():
    encoder, (images, _) = encoders().image, inputs(5)
    assert_close([encoder(images)], [torch.cat([encoder(image[None]) for image in images])], 1e-5)


@pytest.mark.parametrize("length", [1, 7])
def test_a_text_embedding_depends_on_the_words_and_not_on_batch_or_padding(length):
    encoder = encoders().text
    caption = torch.arange(1, length + 1)[None]
    batch = torch.cat([F.pad(caption, (0, 12 - length)), torch.full((3, 12), 9)])
    assert_close([encoder(batch)[:1]], [encoder(caption)], 1e-5)
    turned = encoder(caption.flip(1))
    assert torch.allclose(turned, encoder(caption), atol=1e-2) == (length == 1)  # their order matters


@pytest.mark.parametrize("same", [False, True])
def test_removing_the_initial_gap_moves_the_second_cloud_onto_the_first(same):
    model, (images, texts) = encoders(same_modality=same), inputs(90)
    texts = images if same else texts
    x, y = cgap.encode(model.image, images), cgap.encode(model.text, texts)
    cgap.remove_initial_gap(model, images, texts)
    moved = cgap.encode(model.text, texts)
    assert_close([cgap.encode(model.image, images), moved.mean(0)], [x, x.mean(0)], 1e-5)
    ratio = F.pdist(moved) / F.pdist(y)  # it moves as a whole
    assert ratio.max() / ratio.min() < 1.001
    cross = (moved - moved.mean(0)).T @ (x - x.mean(0))  # symmetric, positive if the rotation is best
    assert_close([cross], [cross.T], 1e-4)
    assert torch.linalg.eigvalsh(cross).min() > -1e-4


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="a PyTorch without CUDA has no fake of it")
def test_nothing_is_made_on_another_device():
    model, batch = encoders(), inputs(4)
    with FakeTensorMode(allow_non_fake_inputs=True):  # CUDA tensors without data, on any computer
        weights = {name: torch.empty(p.shape, device="cuda") for name, p in model.named_parameters()}
        batch = tuple(torch.empty_like(z) for z in batch)
        x, y, T = torch.func.functional_call(model, weights, tuple(z.cuda() for z in batch))
        total, terms = cgap_loss(x, y, T, 1, 1, 1, True)
        assert {z.device.type for z in (x, y, T, total, *terms.values())} == {"cuda"}
        with pytest.raises(RuntimeError, match="device"):
            torch.func.functional_call(model, weights, batch)


def test_metrics_leave_the_gpu_before_they_become_float64(monkeypatch):
    """MPS has no float64: whatever becomes double must be on the CPU by then."""
    calls = []
    cpu, double = torch.Tensor.cpu, torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "cpu", lambda z: calls.append("cpu") or cpu(z))
    monkeypatch.setattr(torch.Tensor, "double", lambda z: calls.append("double") or double(z))
    cgap.remove_initial_gap(encoders(), *inputs(9))
    gap_metrics(*clouds(9, 3, 1))
    assert calls[:12] == ["cpu", "double"] * 6


def words(row, vocab):
    return " ".join(vocab[k] for k in row if k)


def test_scenes_are_a_function_of_the_seed():
    one, again, other = (cgap.scene_data(Config(limit=50, image_size=8, seed=seed)) for seed in (1, 1, 2))
    for part in ("train", "val", "zero_shot", "arithmetic"):
        images, same, others = (getattr(data, part).images for data in (one, again, other))
        assert torch.equal(images, same) and not torch.equal(images, others)


@pytest.mark.parametrize("shape, name", list(enumerate(cgap.SHAPES)))
@pytest.mark.parametrize("relation, axis", [("left of", 3), ("above", 2)])
def test_pictures_show_what_their_captions_say(shape, name, relation, axis):
    scenes = torch.tensor([[0, shape, 2, shape, cgap.RELATIONS.index(relation)]]).expand(20, 5)
    assert cgap.describe(scenes) == [f"a red {name} {relation} a blue {name}"] * 20
    near, far = cgap.draw_scenes(scenes, 32).float().split(16, axis)
    assert all((half[:, 0] - half[:, 2]).mean() * sign > 10 for half, sign in ((near, 1), (far, -1)))


def test_unseen_combinations_do_not_occur():
    scenes = cgap.random_scenes(20_000, 0.3)
    assert (scenes[:, 4] < 0).double().mean().item() == pytest.approx(0.3, abs=0.02)
    combinations = torch.cat([scenes[:, :2], scenes[:, 2:4]]).unique(dim=0)
    assert len(combinations) == 40 and not any(c % 6 == s for c, s in combinations.tolist())


def test_zero_shot_labels_match_prompts_and_pictures():
    vocab = cgap.make_vocab(cgap.describe(cgap.random_scenes(500, 0.1)), 100)
    task = cgap.scene_classes(16, vocab, 32)
    prompts = [words(row, vocab) for row in task.prompts]
    assert prompts == [f"a {colour} {shape}" for colour in cgap.COLOURS for shape in cgap.SHAPES]
    assert task.unseen.nonzero()[:, 0].tolist() == [6 * c + c % 6 for c in range(8)]
    for k, prompt in enumerate(prompts[:-12]):  # all but white and black
        colour = torch.tensor(cgap.COLOURS[prompt.split()[1]])
        shown = task.images[task.labels == k].float().mean((0, 2, 3))
        assert F.cosine_similarity(shown - shown.mean(), colour - colour.mean(), 0) > 0.9


def test_arithmetic_asks_for_the_scene_with_one_thing_changed(monkeypatch):
    monkeypatch.setattr(cgap, "draw_scenes", lambda scenes, size: scenes)  # the pool: scenes, not pictures
    vocab = cgap.make_vocab([word for names in cgap.WORDS for word in names], 100)
    task = cgap.scene_edits(16, vocab, 32, queries=100)
    assert task.correct.shape == (100, len(task.images))
    for query, (old, new, correct) in enumerate(zip(task.old, task.new, task.correct)):
        source = task.images[query]
        (target,) = task.images[correct].unique(dim=0)
        (slot,) = (source != target).nonzero()[:, 0].tolist()
        assert words(old, vocab) == cgap.WORDS[slot][source[slot]] != words(new, vocab) == cgap.WORDS[slot][target[slot]]
        assert not correct[query] and torch.equal(correct, (task.images == target).all(1))


def test_tokens_are_words_cut_and_padded_to_the_longest_of_the_batch():
    assert cgap.split_words("  A dog's\tbowl... Überzug!") == "a dog ' s bowl . . . überzug !".split()
    vocab = cgap.make_vocab(["the cat", "the dog the cat", "a mat"], 2)
    assert vocab == ["<pad>", "<unk>", "cat", "the"]
    tokens = cgap.tokenize(["The CAT", "cat zebra the the the cat", " "], vocab, 4)
    assert tokens.tolist() == [[3, 2, 0, 0], [2, 1, 3, 3], [1, 0, 0, 0]] and tokens.dtype == torch.int32
    pairs = cgap.Pairs(torch.zeros(1, 3, 8, 8), tokens[None])
    in_turn = [pairs.batch(torch.tensor([0]), turn)[1].tolist() for turn in range(4)]
    assert in_turn == [[[3, 2]], [[2, 1, 3, 3]], [[1]], [[3, 2]]]


def test_a_share_of_the_pairs_is_mismatched():
    partner = cgap.mismatched(1000, 0.2)
    assert (partner != torch.arange(1000)).sum() == 200 and len(partner.unique()) == 1000
    clean, spoilt = (cgap.load_data(Config(limit=100, mismatch=share)) for share in (0.0, 0.2))
    changed = (clean.train.tokens != spoilt.train.tokens).any(2).sum()
    assert 15 < changed <= 20 and torch.equal(clean.val.tokens, spoilt.val.tokens)


@pytest.mark.parametrize("N, groups", [(40, 40), (40, 9), (4, 4)])
def test_recall_equals_a_slow_double_loop(N, groups):
    group = torch.arange(N) % groups
    y = F.normalize(draw(groups, 4), dim=1)[group]  # identical captions
    x = F.normalize(y + draw(N, 4, seed=2), dim=1)
    ranked = [sorted(range(N), key=lambda j: -float(x[i] @ y[j])) for i in range(N)]
    expected = [sum(any(group[j] == group[i] for j in ranked[i][:k]) for i in range(N)) / N for k in (1, 5)]
    assert 0 < expected[0] < 1 and cgap.recall(x, y, group) == pytest.approx(expected)


def test_evaluate_scores_tasks_made_by_hand(monkeypatch):
    monkeypatch.setattr(cgap, "encode", lambda encoder, z: z)
    model, e = encoders(), torch.eye(4)
    pairs = cgap.Pairs(draw(9, 4).float(), None)
    zero_shot = cgap.ZeroShot(e[[0, 1, 2, 3, 0, 0]], torch.tensor([0, 1, 2, 3, 0, 1]), e, torch.arange(4) == 1)
    # e0 + e1 - (.8 e1 + .6 e3) is nearest to e0, which is the query itself, and then to e1
    arithmetic = cgap.Arithmetic(e, (.8 * e[1] + .6 * e[3])[None], e[1:2], e[1:2].bool())
    data = cgap.Data(pairs, pairs, [], zero_shot, arithmetic)
    record = cgap.evaluate(model, data)
    assert [record[name] for name in ("zero_shot", "zero_shot_unseen")] == pytest.approx([5 / 6, 1 / 2])
    assert record["arithmetic"] == record["i2t_r1"] == record["t2i_r5"] == 1
    losses = cgap.training_loss(model, data, Config(batch=6, unif=1.0))
    expected = cgap_loss(pairs.images[:6], pairs.images[:6], 0.01, 1)[0].item()
    assert losses["loss"] == pytest.approx(expected) and losses.keys() == {"loss", *TERMS}


def test_batches_hold_each_index_once_an_epoch():
    def run(n, size, seed):
        return [rows.tolist() for rows, _ in itertools.islice(cgap.batches(n, size, seed), 9)]

    epochs = [sum(run(12, 4, 0)[k:k + 3], []) for k in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs) and epochs[0] != epochs[1]
    assert run(12, 4, 0) == run(12, 4, 0) != run(12, 4, 1)
    assert all(len(set(indices)) == 5 for indices in run(12, 5, 0))  # what is left of an epoch is dropped


def final_gap(folder, weight, seed):
    torch.set_num_threads(1)
    cfg = Config(unif=weight, align=weight, steps=80, limit=1000, image_size=16, seed=seed, device="cpu",
                 eval_every=80, checkpoint_every=80, out=f"{folder}/{weight}-{seed}")
    cgap.train(cfg, quiet=True)


def test_the_gap_closes(tmp_path):
    """The paper in ten seconds: with CLIP a gap stays, with uniformity and alignment it goes."""
    for seed in (0, 1):
        together = [start(final_gap, tmp_path, weight, seed) for weight in (0.0, 1.0)]
        for process in together:
            process.join(PATIENCE)
        clip, cua = (cgap.load_run(f"{weight}-{seed}").history[-1]["centroid_distance"] for weight in (0.0, 1.0))
        assert clip > 0.5 and cua < 0.25


# ==================================================================================================
# 2. Photographs
# ==================================================================================================
RED, BLUE, GREY, DARK = (200, 40, 40), (40, 40, 200), (128,) * 3, (32,) * 3


def banner(mode="RGB", top=RED, bottom=BLUE):
    """A picture of two colours, one above the other."""
    image = Image.new(mode, (64, 64), top)
    image.paste(bottom, (0, 32, 64, 64))
    return image


TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize("name, image, options, top, bottom", [
    ("cmyk.jpg", banner().convert("CMYK"), {"quality": 95}, RED, BLUE),
    ("wide.png", banner().crop((-64, 0, 128, 64)), {}, RED, BLUE),  # black on both sides
    ("grey16.png", Image.frombytes("I;16", (64, 64), b"\0\x80" * 2048 + b"\0\x20" * 2048), {}, GREY, DARK),
    ("rgba.png", banner("RGBA", (*RED, 128), (*BLUE, 0)), {}, (227, 147, 147), (255,) * 3),
    ("turned6.jpg", banner().transpose(Image.Transpose.ROTATE_90), {"exif": TURNED}, RED, BLUE)])
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


def write_csv(n=50):
    pairs = photos(Path("photos"), range(n))
    with open("pairs.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerow(("image", "caption"))
        csv.writer(file).writerows((f"photos/{name}", text) for name, texts in pairs for text in texts)
    return "pairs.csv"


def write_coco(train, val):
    Path("coco/annotations").mkdir(parents=True)
    for split, numbers in ((train, range(50)), (val, range(50, 60))):
        if split:
            pairs = list(enumerate(photos(Path("coco", split), numbers)))
            content = {"images": [{"id": 7 * i, "file_name": name} for i, (name, _) in pairs],
                       "annotations": [{"image_id": 7 * i, "caption": text}
                                       for i, (_, texts) in pairs for text in texts]}
            Path(f"coco/annotations/captions_{split}.json").write_text(json.dumps(content))
    return "coco"


def load(source, **settings):
    return cgap.load_data(Config(data=source, batch=4, image_size=8, **settings))


def assert_captions_fit(data, sizes):
    """So many images, and each, alone a shade, has its own captions and no others."""
    assert (len(data.train.images), len(data.val.images)) == sizes and data.arithmetic is None
    seen = set()
    for part, turn in itertools.product((data.train, data.val), range(5)):
        images, tokens = part.batch(torch.arange(len(part.images)), turn)
        captions = [words(row, data.vocab) for row in tokens]
        assert [int(text.split()[-1]) for text in captions] == images.float().mean((1, 2, 3)).tolist()
        seen |= set(captions)
    assert len(seen) == 12  # shades 0 and 3 have one caption, 1 and 4 two, 2 and 5 three


@pytest.mark.parametrize("year, val, sizes", [("2014", "val", (50, 10)), ("2017", "", (45, 5))])
def test_coco_folders_load(year, val, sizes, monkeypatch):
    source = write_coco(f"train{year}", val and f"val{year}")
    assert_captions_fit(load(source, cache="coco/cache"), sizes)
    monkeypatch.setattr(cgap, "load_photo", None)  # the second time from the cache, although that is new here
    assert_captions_fit(load(source, cache="coco/cache"), sizes)


def test_a_csv_is_decoded_once_and_again_when_a_picture_is_replaced(tmp_path, monkeypatch):
    source = write_csv()
    assert_captions_fit(load(source), (45, 5))
    with monkeypatch.context() as patch:
        patch.setattr(cgap, "load_photo", None)  # the second time from the cache
        assert_captions_fit(load(source), (45, 5))
    (cache,) = Path("home/.cache/cgap").iterdir()
    cache.write_bytes(b"")
    with pytest.raises(cgap.UserError, match="damaged"):
        load(source)
    Image.new("L", (8, 8), 250).save("photos/7.png")
    assert 250 in load(source).train.images
    assert_captions_fit(load(write_csv(60)), (54, 6))


def test_unreadable_images_are_named_and_left_out(capsys):
    source = write_csv(60)
    Path("photos/13.png").unlink()
    Path("photos/21.png").write_bytes(b"not a picture")
    for _ in range(2):  # the second time from the cache
        assert_captions_fit(load(source), (52, 6))
        error = capsys.readouterr().err
        assert "left out" in error and "13.png" in error and "21.png" in error


def test_a_folder_of_classes_is_a_zero_shot_task():
    source = write_csv()
    for k in (0, 1):
        photos(Path(f"classes/shade_{40 * k}"), [k])
    data = load(source, zero_shot="classes")
    assert data.zero_shot.images.float().mean((1, 2, 3)).tolist() == [0, 40]
    assert data.zero_shot.labels.tolist() == [0, 1]
    assert [words(row, data.vocab)[-8:].strip() for row in data.zero_shot.prompts] == ["shade 0", "shade 40"]


# ==================================================================================================
# 3. The real script, run as a user runs it
# ==================================================================================================
RUN = dict(limit=200, batch=12, steps=24, dim=8, image_size=8, unif=1., align=1., xunif=1., center=True,
           temperature=.07, learn_temperature=True, eval_every=8, checkpoint_every=2, device="cpu")
FIGURES = {"gap.png", "embeddings.png", "spectrum.png", "samples.png", "gap.gif"}
PROCESSES = multiprocessing.get_context("forkserver")  # forks one that has imported torch: saves seconds
PROCESSES.set_forkserver_preload(["torch.distributed.nn", "tqdm", "torch._dynamo"])


def flags(**settings):
    return [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in settings.items()]


@pytest.fixture(scope="session", autouse=True)
def started(tmp_path_factory):
    """The two slowest commands, at work from the beginning while other tests run."""
    folder = tmp_path_factory.mktemp("runs")
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    commands = {"run": [cgap.__file__, *flags(**RUN, out="run")],
                "two": [*torchrun, cgap.__file__, *flags(**RUN | dict(steps=20, out="two"))]}
    processes = {name: subprocess.Popen([sys.executable, *command], cwd=folder, text=True, stdout=subprocess.PIPE,
                                        stderr=open(folder / f"{name}.log", "w"))
                 for name, command in commands.items()}
    yield folder, processes
    for process in processes.values():  # where only some tests were run
        process.terminate()


def finished(started, name):
    """The folder of a started command, and what it has printed."""
    folder, processes = started
    printed = processes[name].communicate(timeout=PATIENCE)[0]
    assert processes[name].returncode == 0, (folder / f"{name}.log").read_text()
    return folder, printed


@pytest.fixture(scope="module")
def runs(started):
    """Two finished runs, never interrupted, not to be written to: `run`, by the command, and `other`."""
    folder, printed = finished(started, "run")
    (folder / "printed").write_text(printed)
    cgap.train(Config(**RUN | dict(dim=16, steps=1, same_modality=True, center=False, out=str(folder / "other"))),
               quiet=True)
    return folder


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_figures(folder):
    for name in FIGURES:
        with Image.open(folder / name) as image:
            darkest, brightest = image.convert("L").getextrema()
            assert darkest < 100 < brightest and (name != "gap.gif" or image.n_frames > 2)


def test_a_run_leaves_metrics_checkpoint_and_figures_and_prints_a_table(runs):
    out = runs / "run"
    history = records(out)
    assert [record["step"] for record in history] == [0, 8, 16, 24]
    for record in history:
        assert record.keys() == {"step", "loss", *TERMS, *GAP, *TASKS, "temperature", "effective_temperature",
                                 "seconds", "images_per_second"}
        assert record["loss"] == pytest.approx(sum(record[term] for term in TERMS), abs=1e-5)
    assert history[3]["loss"] < history[0]["loss"] and history[3]["images_per_second"] > 0
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert (saved["step"], saved["cfg"]["dim"], saved["history"]) == (24, 8, history)
    assert_figures(out)
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "metrics.jsonl", *FIGURES}
    rows = [line.split() for line in (runs / "printed").read_text().splitlines()]
    for name in (*GAP, *TASKS, "effective_temperature"):
        assert [name, f"{history[0][name]:.3f}", f"{history[3][name]:.3f}"] in [row[:3] for row in rows]
    assert all([f"run/{name}"] in rows for name in FIGURES)


def test_a_centred_run_saves_ordinary_encoders_with_a_mean_of_zero_to_go_on_with(runs):
    run = cgap.load_run(runs / "run")
    model = cgap.TwoEncoders(run.cfg, len(run.vocab))
    model.load_state_dict(run.model)
    images, texts = cgap.load_data(run.cfg).train.head(2048)
    for encoder, batch in ((model.image, images), (model.text, texts)):
        z = cgap.encode(encoder, batch)
        assert z.mean(0).norm() < 1e-3 * z.norm(dim=1).mean()
    history = cgap.train(replace(run.cfg, steps=1, out="mine"), model=model, quiet=True)
    assert history[0]["i2t_r5"] == pytest.approx(run.history[-1]["i2t_r5"], abs=0.02)


def test_a_learned_temperature_stops_at_a_hundredth():
    cfg = Config(**RUN | dict(steps=1, out="cold"))
    model = cgap.TwoEncoders(cfg, vocab=50)
    model.log_scale.data.fill_(math.log(1000))
    history = cgap.train(cfg, model=model, quiet=True)
    assert [record["temperature"] for record in history] == pytest.approx([0.001, 0.01])


def test_runs_start_with_or_without_a_gap_and_are_plotted_together():
    for gap in ("keep", "remove"):
        cgap.train(Config(**RUN | dict(steps=2, same_modality=True, init_gap=gap, center=False, image_size=16, out=gap)),
                   quiet=True)
    keep, remove = (records(Path(gap))[0] for gap in ("keep", "remove"))
    assert remove["centroid_distance"] < keep["centroid_distance"] / 2
    assert cgap.main(["--plot", "keep", "remove", "--out", "both"]) == 0
    assert_figures(Path("both"))


def test_pictures_show_the_gap_in_full_at_every_step():
    apart = torch.tensor([-1, 1])[:, None, None] * draw(8, seed=9)
    snapshots = {k: F.normalize(draw(2, 40, 8, seed=k) + apart, dim=2).half() for k in (0, 1, 2)}
    run = cgap.Run(Config(), "", [], (), 0, 0.0, [], snapshots, {}, {})
    for step, (images, texts) in snapshots.items():
        _, (axis,) = cgap.canvas(1, 1, "", 4, 4)
        cgap.draw_pairs(axis, run, step)
        left, right = (torch.tensor(line.get_xydata()).mean(0) for line in axis.lines)
        expected = (texts.float() - images.float()).mean(0).norm().item()
        assert (right - left).tolist() == pytest.approx([expected, 0], abs=1e-4)


def test_points_print_a_table_and_draw_a_picture(capsys):
    assert cgap.main(["--points", "--steps", "30", "--dim", "16"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("an offset") == 4 and Path("runs/points/points.png").stat().st_size > 10_000


def test_import_and_help_are_quiet_and_light():
    code = ("import cgap, sys, contextlib\nprint('imported', flush=True)\n"
            "with contextlib.suppress(SystemExit): cgap.main(['--help'])\n"
            "print(sorted({'matplotlib', 'torchvision', 'PIL'} & set(sys.modules)))")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             env={"PYTHONPATH": str(Path(cgap.__file__).parent)})
    first, *helped, last = process.stdout.splitlines()
    assert (first, last, process.stderr) == ("imported", "[]", "") and not list(Path(".").iterdir())
    assert all(cgap.option(f.name) in "\n".join(helped) for f in fields(Config))


# ---- bad input ----
def tree():
    return {p: p.is_file() and p.read_bytes() for p in Path(".").rglob("*") if p.parts[0] != "home"}


def refused(capsys, argv, *named, written=False):
    """Exit status 2, one line of error that names what is wrong, and (unless `written`) nothing written."""
    before = tree()
    try:
        status = cgap.main(argv)
    except SystemExit as end:  # argparse's own
        status = end.code
    error = re.sub(r"[^\r\n]*\d%\|[^\r\n]*|\r", "", capsys.readouterr().err).strip()  # but progress bars
    assert status == 2 and error.startswith("cgap.py: error: ") and len(error.splitlines()) == 1, error
    assert all(name in error for name in named), error
    assert written or tree() == before


@pytest.mark.parametrize("bad, named", [
    ("--batch 1", "--batch"), ("--unif nan", "--unif"), ("--steps many", "--steps"), ("--stpes 5", "--stpes"),
    ("--device tpu", "tpu"), ("--init-gap close", "close"), ("--temperature .005", "--temperature"),
    ("--batch 201", "201"), ("--lr inf", "--lr"), ("--seed 99999999999", "--seed"), ("--limit 4 --batch 2", "4 validation"),
    ("--cache here", "--cache does nothing"),
    ("--data file --single 0", "--single does nothing"), ("--data nowhere", "nowhere"), ("--data folder", "folder"),
    ("--data file", "header"), ("--out folder", "folder exists"), ("--out file/below", "file"),
    pytest.param("--device cuda", "--device cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason=""))])
def test_a_bad_flag_is_one_line_of_error_and_nothing_is_written(capsys, bad, named):
    Path("folder").mkdir()
    Path("file").write_text("precious")
    settings = {k: v for k, v in RUN.items() if k != "image_size"}
    refused(capsys, [*flags(**settings), "--steps", "1", "--out", "out", *bad.split(" ")], named)


@pytest.mark.parametrize("bad, named", [
    ("--plot nowhere", "nowhere"), ("--plot {runs}/run --steps 5", "--steps does nothing"),
    ("--plot {runs}/run {runs}/other", "--dim"), ("--resume {runs}", "checkpoint"),
    ("--resume {runs}/run --unif 1", "--unif does nothing"), ("--points --unif 1", "--unif does nothing"),
    ("--points --batch 600", "512")])
def test_what_does_nothing_is_refused(capsys, runs, bad, named):
    refused(capsys, bad.format(runs=runs).split(" "), named)


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"version": Path("not mere data")}])
def test_a_foreign_checkpoint_is_refused_and_left_alone(capsys, content):
    Path("broken").mkdir()
    torch.save(content, "broken/checkpoint.pt")
    refused(capsys, ["--resume", "broken"], "broken")


@pytest.mark.parametrize("old, new, named", [('"images"', "", "JSONDecodeError"), ("file_name", "path", "file_name")])
def test_bad_coco_annotations_are_refused(capsys, old, new, named):
    file = Path(write_coco("train2017", ""), "annotations/captions_train2017.json")
    file.write_text(file.read_text().replace(old, new))
    refused(capsys, ["--data", "coco", "--batch", "4", "--out", "out"], named)


def test_bad_rows_bad_images_and_a_bad_class_are_refused(capsys):
    argv = ["--data", write_csv(), "--batch", "4", "--image-size", "8", "--out", "out"]
    Path("classes/cat").mkdir(parents=True)
    Path("classes/cat/0.png").write_bytes(b"not a picture")
    refused(capsys, [*argv, "--zero-shot", "classes"], "cat/0.png")
    for k in range(6):
        Path(f"photos/{k}.png").write_bytes(b"")
    refused(capsys, argv, "5 of 45 images")
    with open("pairs.csv", "a") as file:
        file.write("photos/3.png,a dog, asleep\n")
    refused(capsys, argv, "not two fields", "photos/3.png")


def test_a_run_that_diverges_says_so_and_keeps_finite_weights(capsys):
    argv = flags(**RUN | dict(lr=1e9, steps=60, checkpoint_every=1, out="out"))
    refused(capsys, argv, "not finite", written=True)
    assert all(weight.isfinite().all() for weight in cgap.load_run("out").model.values())


def test_a_full_disk_is_an_error_and_leaves_the_old_file(capsys, monkeypatch):
    def save(content, file):
        file.write(b"half")
        raise OSError("no space left")

    Path("file").write_text("whole")
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="no space"):
        cgap.save_whole({}, Path("file"))
    assert [(path.name, path.read_text()) for path in Path().iterdir()] == [("file", "whole")]
    refused(capsys, flags(**RUN, out="out"), "no space", written=True)


def test_a_bug_shows_its_traceback(monkeypatch):
    monkeypatch.setattr(cgap, "scene_data", lambda cfg: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        cgap.main(["--out", "out"])


# ---- interruption and resumption ----
def result(run):
    """The bytes of the weights, and metrics.jsonl without what time decides."""
    metrics = [{k: v for k, v in record.items() if k not in ("seconds", "images_per_second")}
               for record in records(Path(run))]
    return metrics, {k: v.numpy().tobytes() for k, v in cgap.load_run(run).model.items()}


def command(argv, log):
    """In a process of its own: the command line on one thread, its words into the file `log`."""
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
        path = run / "checkpoint.pt"
        if path.exists() and (inode := path.stat().st_ino) != other_than:
            return inode
        assert process.is_alive() and time.monotonic() < end
        time.sleep(.002)


def test_a_run_killed_at_random_moments_ends_as_one_never_interrupted(tmp_path, runs):
    run = tmp_path / "run"
    random_source = random.Random(0)
    inode = 0
    for argv in flags(**RUN, out=run), ["--resume", str(run)]:
        process = start(command, argv, tmp_path / "log")
        for _ in range(random_source.randint(1, 3)):
            inode = wait_for_checkpoint(process, run, inode)
        time.sleep(.05 * random_source.random())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and cgap.load_run(run).step < RUN["steps"]
        with open(run / "metrics.jsonl", "a") as metrics:
            metrics.write('{"step": 12, "lo')  # torn, as a crash may leave it
    cgap.train(cgap.load_run(run).cfg, resume=True, quiet=True)
    assert result(run) == result(runs / "run")
    assert cgap.main(["--resume", str(run), "--device", "cpu"]) == 0 and result(run) == result(runs / "run")


def test_ctrl_c_ends_a_run_with_advice(tmp_path):
    process = start(command, flags(**RUN | dict(steps=10 ** 6, out=tmp_path / "run")), tmp_path / "log")
    wait_for_checkpoint(process, tmp_path / "run")
    os.kill(process.pid, signal.SIGINT)
    process.join(PATIENCE)
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 130 and "Traceback" not in log and "--resume" in log.splitlines()[-1]


def test_a_run_is_not_resumed_on_data_with_other_words(capsys):
    file = Path(write_csv())
    cgap.train(Config(data=str(file), batch=16, steps=1, dim=8, image_size=8, out="run", device="cpu"), quiet=True)
    file.write_text(file.read_text().replace("shade", "hue"))
    refused(capsys, ["--resume", "run"], "other words")


# ---- several processes ----
def gradients(rank, world, folder):
    """The gradients of one step as train takes it, in float64, saved by the first process."""
    torch.set_num_threads(1)
    cgap.RANK, cgap.WORLD_SIZE = rank, world
    model, (images, texts) = encoders(learn_temperature=True, temperature=.07).double(), inputs(18)
    model.image.body.register_forward_pre_hook(lambda module, args: args[0].double())
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/sync", rank=rank, world_size=world)
    forward, loss_of = cgap.prepare(model, Config())
    x, y, T = forward(images[rank::world], texts[rank::world])
    loss_of(x, y, T, **Config(unif=1., align=1., xunif=1., center=True).weights())[0].backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{world}.pt")


def test_gradients_do_not_depend_on_the_number_of_processes(tmp_path):
    for process in [start(gradients, rank, n, tmp_path) for n in (1, 3) for rank in range(n)]:
        process.join(PATIENCE)
        assert process.exitcode == 0
    one, several = torch.load("1.pt"), torch.load("3.pt")
    size = max(grad.norm() for grad in one.values())
    assert all((several[name] - grad).norm() < 1e-6 * size for name, grad in one.items()) and "log_scale" in one


def test_torchrun_on_two_processes_gives_the_curve_of_one(started):
    folder, _ = finished(started, "two")
    one = cgap.train(Config(**RUN | dict(steps=20), out="one"), quiet=True)
    curves = [[record["loss"] for record in history] for history in (one, records(folder / "two"))]
    assert len(curves[0]) == 4 and curves[1] == pytest.approx(curves[0], abs=1e-3)


def test_a_batch_that_cannot_be_split_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(cgap, "WORLD_SIZE", 5)
    refused(capsys, flags(**RUN, out="out"), "--batch 12", "5 processes")


# ==================================================================================================
# 4. The claims and what is quoted of them
# ==================================================================================================
@pytest.fixture
def reproduce(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(cgap.__file__).parent / "figures"))
    return importlib.import_module("reproduce")


def test_the_gallery_is_made_of_the_results_and_the_readme_quotes_it(reproduce):
    results = json.loads((reproduce.HERE / "results.json").read_text(encoding="utf-8"))
    gallery = (reproduce.HERE / "README.md").read_text(encoding="utf-8")
    assert reproduce.gallery(results) == gallery and results.keys() == reproduce.CLAIMS.keys()
    assert all((reproduce.HERE / f"{name}.png").stat().st_size > 10_000 for name in reproduce.CLAIMS)
    readme = (reproduce.HERE.parent / "README.md").read_text(encoding="utf-8")
    shown = ("linear_separability", "centroid_distance", "uniformity_image", "alignment", "i2t_r1", "zero_shot",
             "zero_shot_unseen", "arithmetic")
    for label in results["losses"]["runs"]:
        means = [f"{reproduce.values(results['losses'], label, metric).mean():.3f}" for metric in shown]
        assert f"|{label}|{'|'.join(means)}|" in readme


def test_the_exercise_of_the_readme_computes_the_loss_in_strips(reproduce):
    readme = (reproduce.HERE.parent / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", readme, flags=re.S) if "def loss_in_strips" in block]
    exec(textwrap.dedent("    " + code.lstrip()), solution := {})
    x, y = (z.requires_grad_() for z in clouds(100, 8, 1))
    strips = solution["loss_in_strips"](x, y, 0.05, 1, 2, 3, rows=30)
    gradients = torch.autograd.grad(strips, (x, y))
    assert_close([strips, *gradients], with_gradients(cgap_loss, x, y, 0.05, 1, 2, 3)[:3], 1e-9)


def test_claims_run_once_whatever_the_comments_say(reproduce, tmp_path, monkeypatch):
    tiny = {"steps": 2, "limit": 64, "batch": 16, "image_size": 8}
    claim = type(reproduce.CLAIMS["losses"])("title", {"CLIP": tiny, "tuned": {**tiny, "model": "kept", "source": "CLIP"}},
                                             [("alignment", "CLIP", "tuned")], ("alignment", "zero_shot"))
    monkeypatch.setattr(reproduce, "CLAIMS", {"tiny": claim})
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "tiny", "--seeds", "1"])
    reproduce.main()
    first = {path: path.stat().st_mtime_ns for path in Path("runs/reproduce").glob("*.json")}
    made = json.loads(Path("results.json").read_text())
    reproduce.main()
    assert len(first) == 2 and first == {path: path.stat().st_mtime_ns for path in first}
    assert json.loads(Path("results.json").read_text()) == made and Path("tiny.png").exists()
    assert "python figures/reproduce.py tiny --seeds 1" in Path("README.md").read_text(encoding="utf-8")
    text = Path(cgap.__file__).read_text()
    assert reproduce.code(text.replace("# (N, N)", "# N x N").replace('"""All measures', '"""Every measure')) == reproduce.CODE
    assert reproduce.code(text.replace("temperature=0.01, unif", "temperature=0.02, unif")) != reproduce.CODE


def test_a_check_holds_if_the_paired_difference_exceeds_its_spread(reproduce):
    result = {"runs": {"a": [[{"m": 0.0}, {"m": v}] for v in (.4, .7, 1.0)], "b": [[{"m": 0}, {"m": v}] for v in (.3, .6, .9)]}}
    for check, word in ((("m", "a", "b"), "holds at every seed"), (("m", "b", "a"), "**does not hold**"),
                        (("m", "a", "b", .2), "**does not hold**"), (("m", "a", 0.5), "**does not hold**"),
                        (("m", "a", "a, at the start"), "holds at every seed")):
        assert word == reproduce.verdict(result, *check)[1], check
