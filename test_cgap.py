# SPDX-License-Identifier: MIT
"""Tests of cgap.py: `python -m pytest -q`. First closed forms and slow independent references, then
the real script, run as a user runs it."""

import csv
import functools
import importlib
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # threads that share so little work only wait for each other
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import cgap
from cgap import Config, Pairs, cgap_loss, gap_metrics

TERMS = {"clip", "align", "unif", "xunif"}
GAP = ("centroid_distance linear_separability linear_separability_c100 alignment uniformity_image uniformity_text "
       "cross_uniformity effective_rank").split()
TASKS = "zero_shot zero_shot_unseen arithmetic_attribute arithmetic_relation arithmetic_caption".split()
OTHERS = ["step", "loss", "temperature", "effective_temperature", "i2t_r1", "t2i_r1", "mixed_i2t", "mixed_t2i", *TASKS]
README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
PATIENCE = 300  # seconds at most, for what takes a few on an idle machine


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clouds(N, D, apart):
    """Two clouds of pairs, `apart` along the first axis."""
    x = draw(N, D)
    shift = apart / 2 * F.one_hot(torch.tensor(0), D)
    return x - shift, x + draw(N, D, seed=1) + shift


def directions(N, D, apart):
    return [F.normalize(z, dim=1) for z in clouds(N, D, apart)]


def with_gradients(loss, x, y, T, *args):
    """[total, its gradients for x, y and T, the terms] as float64."""
    inputs = [z.detach().clone().requires_grad_() for z in (x, y, torch.tensor(T, dtype=x.dtype))]
    total, terms = loss(*inputs, *args)
    gradients = torch.autograd.grad(total, inputs)
    return [z.detach().double() for z in (total, *gradients, *(terms[name] for name in sorted(terms)))]


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
    monkeypatch.setenv("HOME", f"{tmp_path}-home")


# ==================================================================================================
# 1. Closed forms and slow independent references
# ==================================================================================================
def mean_exp(distances):
    return distances.pow(2).mul(-2).exp().mean().log()


def paper_loss(x, y, T, unif=0.0, align=0.0, xunif=0.0, center=False):
    """The paper's definitions as one writes them down, by distances between pairs, in float64."""
    x, y = (F.normalize(z - center * z.mean(0), dim=1) for z in (x.double(), y.double()))
    pair, others = torch.arange(len(x)), ~torch.eye(len(x), dtype=torch.bool)
    terms = {"clip": (F.cross_entropy(x @ y.T / T, pair) + F.cross_entropy(y @ x.T / T, pair)) / 2,
             "align": (x - y).norm(dim=1).pow(2).mean(),
             "unif": (mean_exp(F.pdist(x)) + mean_exp(F.pdist(y))) / 2,
             "xunif": mean_exp(torch.cdist(x, y).masked_select(others))}
    return terms["clip"] + unif * terms["unif"] + align * terms["align"] + xunif * terms["xunif"], terms


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-5), (torch.float64, 1e-9), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("weights", [(0, 0, 0, False), (1, 1, 0, True), (0.3, 0, 2, False)])
@pytest.mark.parametrize("N, copies", [(3, 0), (64, 9)])
def test_loss_terms_and_gradients_equal_the_definitions(N, copies, weights, dtype, tolerance):
    x, y = (z.to(dtype) for z in clouds(N, 16, 2))
    x[:copies], y[:copies] = x[N - 1], y[N - 1]  # duplicate rows
    assert_close(with_gradients(cgap_loss, x, y, 0.05, *weights), with_gradients(paper_loss, x, y, 0.05, *weights),
                 tolerance)
    total, terms = cgap_loss(x.requires_grad_(), y, 0.05, *weights)
    assert not any(term.requires_grad for term in terms.values())  # or each keeps its matrix
    assert {z.dtype for z in (total, *terms.values())} == {torch.promote_types(dtype, torch.float32)}


exec(re.split(r"^# -- \d.*$", Path(cgap.__file__).read_text(), flags=re.M)[1], PASTED := {})


@pytest.mark.parametrize("loss", [PASTED["cgap_loss"], torch.autocast("cpu", torch.bfloat16)(cgap_loss),
                                  torch.compile(cgap_loss, backend="aot_eager")])  # traced, but not built in C++
def test_the_loss_is_the_same_pasted_elsewhere_under_autocast_and_compiled(loss):
    args = *(z.float() for z in clouds(40, 8, 1)), 0.05, 1, 2, 3, True
    assert_close(with_gradients(loss, *args), with_gradients(cgap_loss, *args), 1e-5)


def test_uniformity_is_exact_where_exponentials_vanish():
    opposite = torch.tensor([[1.0], [-1.0]])
    assert cgap.uniformity(opposite, opposite, t=50).item() == pytest.approx(-200)


ONES = torch.ones(6, 3)


@pytest.mark.parametrize("function, x", [
    (cgap_loss, ONES[:1]), (cgap_loss, ONES[0]), (gap_metrics, ONES[:4]), (gap_metrics, ONES[0]),
    (gap_metrics, ONES[:, :1]), (gap_metrics, torch.eye(6, 3)), (gap_metrics, ONES * math.nan)])
def test_inputs_without_a_meaning_raise_value_error(function, x):
    for pair in (x, x), (ONES, ONES[1:]):
        with pytest.raises(ValueError, match="x and y must be"):
            function(*pair)


def test_gap_metrics_equal_their_definitions():
    x, y = directions(60, 6, 1)
    terms = paper_loss(x, y, 1)[1]
    shares = torch.distributions.Categorical(torch.linalg.svdvals(x - x.mean(0)).pow(2))
    expected = {"centroid_distance": math.dist(x.mean(0), y.mean(0)),
                "linear_separability": cgap.linear_separability(x, y),
                "linear_separability_c100": cgap.linear_separability(x, y, C=100),
                "alignment": terms["align"], "cross_uniformity": terms["xunif"], "uniformity_image": mean_exp(F.pdist(x)),
                "uniformity_text": mean_exp(F.pdist(y)), "effective_rank": shares.entropy().exp()}
    got = gap_metrics(7 * x.float(), y.float() / 3)
    assert got == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-5)


@pytest.mark.parametrize("C", [1, 100])
def test_the_classifier_is_at_its_minimum(C):
    z = F.pad(torch.cat(clouds(200, 5, 1)), (0, 1), value=1.0)
    labels = torch.arange(2).repeat_interleave(200).double()
    w = cgap.fit_logistic(z, labels, C).requires_grad_()
    objective = w[:-1] @ w[:-1] / 2 + C * F.binary_cross_entropy_with_logits(z @ w, labels, reduction="sum")
    assert torch.autograd.grad(objective, w)[0].abs().max() < 1e-6 * C  # convex: this is its minimum


@pytest.mark.parametrize("N, D, apart, C, low, high", [
    (500, 5, 20, 1, 1, 1), (500, 5, 0, 1, .4, .6),
    (100, 300, 0, 100, .2, .7)])  # fit without an error: only pairs that are held out tell
def test_separability_is_the_accuracy_on_held_out_pairs(N, D, apart, C, low, high):
    assert low <= cgap.linear_separability(*directions(N, D, apart), C) <= high


@pytest.mark.parametrize("d, optimum", [(3, -2.080), (16, -3.513), (128, -3.938)])
def test_ideals_are_those_of_the_uniform_distribution(d, optimum):
    terms = [4 ** k / math.factorial(k) / math.prod(d / 2 + j for j in range(k)) for k in range(40)]
    assert math.log(sum(terms)) - 4 == pytest.approx(optimum, abs=6e-4)  # the paper's, 0F1
    expected = dict(zip(GAP, [0, 0.5, 0.5, 0, optimum, optimum, optimum, d]))
    assert cgap.ideals(d) == pytest.approx(expected, rel=0.04, abs=1e-6)


def test_the_effective_temperature_is_what_is_left_without_the_means():
    x, y = directions(300, 5, 3)
    left = [(z - z.mean(0)).square().sum(1).mean() for z in (x, y)]  # its mean square, by definition
    expected = 0.01 / math.sqrt(left[0] * left[1])
    assert cgap.effective_temperature(7 * x, y, 0.01) == pytest.approx(expected) and expected > 0.011


def warm(step):
    return 0.2 if step else 0.01


@pytest.mark.parametrize("settings, low, high", [
    ({}, .9, 1), ({"offset": 0.0}, .35, .65), ({"offset": 1 / 64}, .35, .65), ({"unif": 1.0, "align": 1.0}, .35, .65),
    ({"temperature": warm}, .35, .65), ({"temperature": warm, "mismatch": 0.9}, .9, 1)])
def test_the_smallest_gap_takes_a_fast_offset_and_a_cold_loss_or_wrong_pairs(settings, low, high):
    start, *_, end = cgap.smallest_gap(n=256, steps=60, **settings)
    assert start["linear_separability"] < 0.6 and low <= end["linear_separability"] <= high
    assert list(end) == ["step", *GAP, "effective_temperature"]


def encoders(**settings):
    torch.manual_seed(0)
    return cgap.TwoEncoders(Config(dim=8, **settings), vocab=20)


def inputs(n):
    return torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8), torch.randint(1, 20, (n, 6), dtype=torch.int32)


def test_an_embedding_does_not_depend_on_its_batch_or_padding_but_on_the_order_of_words():
    model, (images, texts) = encoders(), inputs(5)
    texts[0, 4:] = 0
    for encoder, batch, alone in (model.image, images, images[:1]), (model.text, texts, texts[:1, :4]):
        assert_close(encoder(batch)[:1], encoder(alone), 1e-5)
    assert not torch.allclose(model.text(texts[1:].flip(1)), model.text(texts[1:]), atol=1e-2)


def test_removing_the_initial_gap_moves_the_second_cloud_onto_the_first():
    model, (images, texts) = encoders(), inputs(90)
    x, y = cgap.encode(model.image, images), cgap.encode(model.text, texts)
    cgap.remove_initial_gap(model, images, texts)
    moved = cgap.encode(model.text, texts)
    a, b = x - x.mean(0), moved - moved.mean(0)
    assert_close([cgap.encode(model.image, images), moved.mean(0), b.norm()], [x, x.mean(0), a.norm()], 1e-5)
    ratio = F.pdist(moved) / F.pdist(y)  # it moves as a whole
    assert ratio.max() / ratio.min() < 1.001
    assert_close(b.T @ a, a.T @ b, 1e-4)  # symmetric, positive if the rotation is best
    assert torch.linalg.eigvalsh(b.T @ a).min() > -1e-4


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="a PyTorch without CUDA has no fake of it")
def test_nothing_is_made_on_another_device():
    with FakeTensorMode():  # CUDA tensors without data, on any computer
        with torch.device("cuda"):
            model, batch = encoders(), inputs(4)
        x, y, T = model(*batch)
        total, terms = cgap_loss(x, y, T, 1, 1, 1, True)
    assert {z.device.type for z in (x, y, T, total, *terms.values())} == {"cuda"}


def test_a_gpu_that_has_bfloat16_computes_in_it(monkeypatch):
    monkeypatch.setattr(torch, "autocast", Mock())
    for device, native, enabled in ("cuda", True, True), ("cuda", False, False), ("cpu", True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        cgap.autocast(torch.device(device))
        torch.autocast.assert_called_with(device, torch.bfloat16, enabled=enabled)


def test_weights_decay_in_matrices_only():
    model = encoders()
    groups = cgap.make_optimizer(model, Config()).param_groups
    assert {p: group["weight_decay"] for group in groups for p in group["params"]} == {
        p: 0.1 * (p.ndim > 1) for p in model.parameters()}


def test_the_learning_rate_warms_up_over_a_tenth_and_falls_as_a_cosine():
    rates = [cgap.learning_rate(step, Config(steps=1000, lr=2.0)) for step in range(1000)]
    assert rates[:90] == pytest.approx([0.02 * (step + 1) for step in range(90)])
    assert rates[100:] == pytest.approx([1 + math.cos(math.pi * step / 1000) for step in range(100, 1000)])


def test_each_epoch_holds_each_pair_once_in_an_order_of_its_own():
    batches = [cgap.batch_of(step, 14, Config(batch=4, seed=seed)) for seed in (0, 1) for step in range(6)]
    assert [epoch for _, epoch in batches] == [0, 0, 0, 1, 1, 1] * 2
    orders = torch.cat([rows for rows, _ in batches]).view(4, 12)  # what is left of an epoch is dropped
    assert len(orders.unique(dim=0)) == 4 and all(len(order.unique()) == 12 for order in orders)


def test_another_seed_draws_other_scenes():
    images = [cgap.scene_data(Config(limit=50, image_size=8, seed=seed)).train.images for seed in (1, 2)]
    assert not torch.equal(*images)


@pytest.mark.parametrize("shape, name", list(enumerate(cgap.SHAPES)))
@pytest.mark.parametrize("relation, spelled, axis", [(0, "left of", 3), (1, "above", 2)])
def test_pictures_show_what_their_captions_say(shape, name, relation, spelled, axis):
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
    assert cgap.describe(tasks.images) == [prompts[k] for k in tasks.labels] and len(set(prompts)) == 48
    assert len(tasks.old) == len(tasks.new) == len(tasks.query) == len(tasks.correct) == 500
    for q, (query, correct, *edit) in enumerate(zip(tasks.query, tasks.correct, tasks.old, tasks.new)):
        slot, source, target = q % 250 // 50, tasks.pool[query], tasks.pool[correct][0]
        assert (source != target).nonzero().tolist() == [[slot]] and torch.equal(correct, (tasks.pool == target).all(1))
        by_word = [cgap.WORDS[slot][scene[slot]] for scene in (source, target)]
        by_caption = cgap.describe(torch.stack([source, target]))
        assert [words(row, vocab) for row in edit] == (by_word if q < 250 else by_caption)


def test_tokens_are_numbers_of_frequent_words_cut_and_padded():
    assert cgap.WORD.findall("a dog's\tbowl... überzug!") == "a dog ' s bowl . . . überzug !".split()
    vocab = cgap.make_vocab(["the cat the cat", " ".join(f"w{k}" for k in range(9_999))])
    assert list(vocab)[:3] == ["<pad>", "<unk>", "cat"] and len(vocab) == 10_002
    tokens = cgap.tokenize(["The CAT", "zebra " + "the " * 40], {"cat": 2, "the": 3})
    assert tokens.tolist() == [[3, 2] + [0] * 30, [1] + [3] * 31] and tokens.dtype == torch.int32


def test_a_share_of_the_pairs_is_mismatched():
    clean, spoilt = (cgap.load_data(Config(limit=64, image_size=8, mismatch=share, same_modality=True)) for share in (0, 0.25))
    changed = (clean.train.texts != spoilt.train.texts).flatten(1).any(1)
    assert changed.sum() == 16 and torch.equal(clean.val.texts, spoilt.val.texts)


def slow_search(x, y, group):
    """For x_i among all y: R@1 by group; and the same among all y and the x of other groups."""
    hits = torch.zeros(2)
    for i, own in enumerate(group):
        cosine, right = max(zip((y @ x[i]).tolist(), (group == own).tolist()))
        hits += torch.tensor([right, right and cosine > (x @ x[i])[group != own].max()])
    return (hits / len(x)).tolist()


def test_search_in_both_modalities_at_once_feels_a_gap_that_search_across_does_not():
    x, y = directions(40, 4, 0)
    group = torch.arange(40)
    assert cgap.mixed_recall(7 * x, y) == pytest.approx((slow_search(x, y, group)[1], slow_search(y, x, group)[1]))
    x, y = F.pad(x, (0, 1), value=3.0), F.pad(x, (0, 1), value=-3.0)
    assert cgap.recall(x, y, group) == 1 and cgap.mixed_recall(x, y) == [0, 0]


def test_an_evaluation_measures_each_thing_where_it_belongs(monkeypatch):
    monkeypatch.setattr(cgap, "encode", lambda encoder, z: z)
    monkeypatch.setattr(cgap, "WORDS", [1, 2, 3, 4, 5])
    asked = spy(monkeypatch, Pairs, "batch", lambda self, i: i)
    group = torch.arange(30) % 9  # equal captions
    y = F.normalize(draw(9, 4), dim=1)[group]
    x = F.normalize(y + 0.8 * draw(30, 4, seed=2) + 0.3, dim=1)
    e = torch.eye(4)
    old = (0.6 * e[[1]] + 0.8 * e[[3]]).expand(10, 4)  # e0 + e1 - old is nearest to e0, the query itself, and then to e1
    new = e[[1, 2, 2, 2, 1, 1, 1, 2, 1, 2]]
    tasks = cgap.Tasks(e[[0, 1, 2, 3, 1]], torch.tensor([0, 1, 2, 3, 0]), e, e, torch.tensor([0] * 10), old, new,
                       e[[1] * 10].bool())
    data = cgap.Data(Pairs(-x, y[:, None]), Pairs(x, y[:, None]), {}, tasks)
    loss, terms = cgap_loss(-x[:6], y[:6], 0.02, 3)
    searches = "i2t_r1 mixed_i2t t2i_r1 mixed_t2i".split()
    expected = {"loss": loss, **terms, **gap_metrics(x, y), "temperature": 0.02,
                "effective_temperature": cgap.effective_temperature(x, y, 0.02),
                **dict(zip(searches, slow_search(x, y, group) + slow_search(y, x, group))),
                **dict(zip(TASKS, [4 / 5, 1 / 2, 1 / 4, 1, 3 / 5]))}
    record = cgap.evaluate(encoders(temperature=0.02), data, Config(batch=6, unif=3.0))
    assert record == pytest.approx({name: float(value) for name, value in expected.items()})
    assert asked == [slice(6), slice(5000)]


def test_every_step_is_as_the_settings_say_and_means_are_over_many_pairs(monkeypatch):
    cfg = Config(**RUN | dict(limit=2100, batch=1050, steps=5, eval_every=5, compile=True, out="out"))
    rates = spy(monkeypatch, torch.optim.AdamW, "step", lambda self: {group["lr"] for group in self.param_groups})
    epochs = spy(monkeypatch, Pairs, "batch", lambda self, i, epoch=0: epoch)
    weights = spy(monkeypatch, cgap, "cgap_loss", lambda x, y, T, **weights: weights)
    folded = spy(monkeypatch, cgap, "fold_means", lambda model, images, texts: len(images))
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda real: lambda *args, **named: compiled.append(real) or real(*args, **named))
    cgap.train(cfg, quiet=True)
    assert rates == [{cgap.learning_rate(step, cfg)} for step in range(5)]
    assert [epoch for epoch in epochs if epoch] == [1, 1, 2]
    assert weights == [{"unif": 1, "align": 1, "xunif": 1, "center": True}] * 7  # five steps, two evaluations
    assert folded == [2048, 256, 256, 256, 256, 2048]
    assert len(compiled) == 10 and compiled.count(cgap.cgap_loss) == 5  # the encoders and the loss


def test_a_weight_without_a_term_shows_its_traceback(monkeypatch):
    monkeypatch.setattr(Config, "forgotten", 1.0, raising=False)
    monkeypatch.setattr(cgap, "cgap_loss", lambda x, y, T, forgotten=0.0, center=False: cgap_loss(x, y, T))
    with pytest.raises(KeyError, match="forgotten"):
        cgap.main(flags(**RUN, out="out"))


def test_the_gap_closes():
    """The paper in ten seconds: with CLIP a gap stays, with uniformity and alignment it goes."""
    clip, cua = (cgap.train(Config(steps=80, limit=300, image_size=8, device="cpu", unif=weight, align=weight, out=f"{weight}"),
                            quiet=True)[-1]["centroid_distance"] for weight in (0, 1))
    assert clip > 0.5 and cua < 0.25


# ==================================================================================================
# 2. Photographs
# ==================================================================================================
RED, BLUE = (200, 40, 40), (40, 40, 200)


def banner(mode="RGB", top=RED, bottom=BLUE):
    """A picture of two colours, one above the other."""
    image = Image.new(mode, (64, 64), top)
    image.paste(bottom, (0, 32, 64, 64))
    return image


TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize("name, image, top, bottom", [
    ("wide.png", banner().crop((-64, 0, 128, 64)), RED, BLUE),  # black on both sides
    ("rgba.png", banner("RGBA", (*RED, 128), (*BLUE, 0)), (227, 147, 147), (255,) * 3),
    ("cmyk6.jpg", banner().convert("CMYK").transpose(Image.Transpose.ROTATE_90), RED, BLUE)])
def test_photos_load_as_people_see_them(name, image, top, bottom):
    image.save(name, exif=TURNED if "6" in name else None, quality=95)
    photo = cgap.load_photo(name, 16)
    assert photo.dtype == torch.uint8 and photo.shape == (3, 16, 16)
    for part, colour in (photo[:, :6, 2:-2], top), (photo[:, -6:, 2:-2], bottom):
        assert (part - torch.tensor(colour)[:, None, None]).abs().max() < 12


def photos(folder, n):
    """Write n plain pictures of six shades: [(name, caption that ends with the shade)], one to three each."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        Image.new("L", (8, 8), 40 * (k % 6)).save(folder / f"{k}.png")
    return [(f"{k}.png", f"{'very ' * j}shade {40 * (k % 6)}") for k in range(n) for j in range(k % 3 + 1)]


def write_csv():
    with open("pairs.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("image", "caption"), *((f"photos/{name}", text) for name, text in photos(Path("photos"), 50))])
    return Path("pairs.csv")


def write_coco(**splits):
    """A folder with so many images in each split; returns the last one's annotations."""
    for split, n in splits.items():
        pairs = photos(Path("coco", split), n)
        content = {"images": [{"id": f"id {name}", "file_name": name} for name, _ in pairs],
                   "annotations": [{"image_id": f"id {name}", "caption": text} for name, text in pairs]}
        file = Path(f"coco/annotations/captions_{split}.json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return file


def load(source, **settings):
    return cgap.load_data(Config(data=source, batch=4, image_size=8, **settings))


def assert_captions_fit(data, *sizes):
    """So many images, and each, alone a shade, has its own captions and no others."""
    seen = set()
    for part, n in zip((data.train, data.val), sizes, strict=True):
        assert len(part.images) == n
        for turn in range(5):
            images, tokens = part.batch(slice(None), turn)
            captions = [words(row, data.vocab) for row in tokens]
            assert [int(text.split()[-1]) for text in captions] == images.float().mean((1, 2, 3)).tolist()
            seen |= set(captions)
    assert len(seen) == 12  # shades 0 and 3 have one caption, 1 and 4 two, 2 and 5 three


@pytest.mark.parametrize("splits, sizes, named", [
    ({"train2014": 50, "val2014": 10}, (50, 10), 0), ({"train2017": 50, "val2014": 10}, (45, 5), 0),
    ({"train2014": 30, "val2014": 20, "train2017": 50, "val2017": 10}, (50, 10), 1)])
def test_coco_folders_load_their_latest_year(splits, sizes, named, capsys):
    write_coco(**splits)
    assert_captions_fit(load("coco"), *sizes)
    assert capsys.readouterr().err.count("captions_train2017.json\n") == named


def test_a_csv_is_decoded_once_and_again_when_a_picture_or_the_limit_is_another(monkeypatch):
    source = write_csv()
    for limit, n in (20, 20), (0, 45):
        assert_captions_fit(load(source, limit=limit, cache="here"), n, 5)
    with monkeypatch.context() as patch:
        patch.setattr(cgap, "load_photo", None)  # the second time from the cache
        assert_captions_fit(load(source, cache="here"), 45, 5)
    for cache in Path("here").iterdir():
        cache.write_bytes(b"")
    with pytest.raises(cgap.UserError, match="damaged"):
        load(source, cache="here")
    Image.new("L", (8, 8), 250).save("photos/7.png")
    assert 250 in load(source, cache="here").train.images


def test_what_cannot_be_used_is_named_and_left_out(capsys):
    file = write_coco(val2017=10, train2017=60)
    text = file.read_text()
    for old, new in ('"shade 0"', "null"), ('"shade 80"', "7"), ('"very shade 80"', '"..."'):
        text = text.replace(old, new, 1)  # all captions of the first image, two of three of the third
    file.write_text(text)
    Path("coco/train2017/13.png").unlink()
    Path("coco/train2017/21.png").write_bytes(b"not a picture")
    for _ in range(2):  # the second time from the cache
        data = load("coco")
        assert_captions_fit(data, 57, 10)
        assert {words(row, data.vocab) for row in data.train.texts[1]} == {"very very shade 80"}
        assert set(re.findall(r"train2017/(\d+).png", capsys.readouterr().err)) == {"0", "2", "13", "21"}
    for k in range(10):
        Path(f"coco/val2017/{k}.png").write_bytes(b"")
    with pytest.raises(cgap.UserError, match="none of 10 images.*0.png"):
        load("coco")


# ==================================================================================================
# 3. The real script, run as a user runs it
# ==================================================================================================
RUN = dict(limit=200, batch=12, steps=16, dim=8, image_size=8, unif=1.0, align=1.0, xunif=1.0, center=True,
           temperature=0.07, learn_temperature=True, eval_every=2, device="cpu")
FIGURES = {"gap.png", "embeddings.png", "embeddings.gif"}
PROCESSES = multiprocessing.get_context("forkserver")  # forks one that has imported torch: saves seconds
PROCESSES.set_forkserver_preload(["cgap", "torch._dynamo"])


def flags(**settings):
    return [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in settings.items()]


@pytest.fixture(scope="session", autouse=True)
def finished(tmp_path_factory):
    """Two commands, at work from the beginning while other tests run: a function that waits for one and
    returns its folder, not to be written to, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    commands = {name: subprocess.Popen([sys.executable, *launcher, cgap.__file__, *flags(**RUN, out=name)], cwd=folder,
                                       text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                for name, launcher in (("one", []), ("two", torchrun))}

    @functools.cache
    def finish(name):
        printed, error = commands[name].communicate(timeout=PATIENCE)
        assert commands[name].returncode == 0, error
        return folder / name, printed, error

    yield finish
    for process in commands.values():  # where only some tests were run
        process.terminate()


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
    assert steps == [int(step) for step in re.findall(r"^step +(\d+) ", printed, re.M)] == list(range(0, 17, 2))
    for record in history:
        assert record.keys() == {*TERMS, *GAP, *OTHERS}
        assert record["loss"] == pytest.approx(sum(record[term] for term in TERMS), abs=1e-5)
    assert last["loss"] < first["loss"] and last["temperature"] != first["temperature"]
    assert_figures(folder)
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "metrics.jsonl", *FIGURES}
    rows = [line.split()[:3] for line in printed.splitlines()]
    assert all([name, f"{first[name]:.3f}", f"{last[name]:.3f}"] in rows for name in last)
    assert printed.endswith("one: gap.png, embeddings.gif, embeddings.png\n")


def test_a_centred_run_saves_ordinary_encoders_with_a_mean_of_zero(finished):
    run = cgap.load_run(finished("one")[0])
    model = cgap.TwoEncoders(run["cfg"], len(run["vocab"]))
    model.load_state_dict(run["model"])
    images, texts = cgap.load_data(run["cfg"]).train.batch(slice(None))
    for z in cgap.encode(model.image, images), cgap.encode(model.text, texts):
        assert z.mean(0).norm() < 1e-3 * z.norm(dim=1).mean()


def test_a_learned_temperature_stops_at_a_hundredth_with_data_of_ones_own(capfd):
    cfg = Config(**RUN | dict(steps=1))
    model = cgap.TwoEncoders(cfg, 50)
    model.log_scale.data.fill_(math.log(1000))
    history = cgap.train(cfg, model=model, data=cgap.load_data(cfg)._replace(tasks=None), quiet=True)
    assert [record["temperature"] for record in history if "zero_shot" not in record] == pytest.approx([0.001, 0.01])
    assert capfd.readouterr() == ("", "")


def test_runs_start_with_or_without_a_gap_and_are_plotted_together():
    gaps = {}
    for gap, dim in ("kept", 8), ("removed", 16):
        settings = dict(steps=2, same_modality=True, remove_gap=gap == "removed", dim=dim, center=False, image_size=16, out=gap)
        gaps[gap] = cgap.train(Config(**RUN | settings), quiet=True)[0]["centroid_distance"]
    assert gaps["removed"] < gaps["kept"] / 2
    cgap.main(["--plot", "kept", "removed", "--out", "both"])
    assert_figures(Path("both"))


def test_pictures_show_the_gap_in_full():
    both = torch.stack(directions(40, 8, 3))
    _, (axis,) = cgap.canvas(1, 1)
    cgap.draw_pairs(axis, {"cfg": Config(), "snapshots": {0: -both, 5: both, 9: -both}}, 2)
    left, right = (torch.tensor(line.get_xydata()).mean(0) for line in axis.lines[-2:])
    assert (right - left).tolist() == pytest.approx([math.dist(*both.mean(1)), 0], abs=1e-4) and "step 5" in axis.get_title()


def test_each_metric_has_a_panel_with_the_histories_that_know_it(monkeypatch):
    figure, axes = cgap.canvas(5, 4)
    monkeypatch.setattr(cgap, "canvas", lambda n, columns: (figure, axes))
    less, known = ([dict.fromkeys(["step", *names], 0.5)] for names in (GAP[:4], GAP))
    cgap.plot_histories({"less": less, "known": known}, GAP[:5], 3, "histories.png")
    drawn = [[0.5 in line.get_ydata() for line in axis.lines[:2]] for axis in figure.axes]
    assert drawn == [[True, True]] * 4 + [[False, True]] and Path("histories.png").exists()


def test_points_print_a_table_and_draw_a_picture(capsys):
    cgap.main(["--points", "--steps", "30", "--dim", "16"])
    assert capsys.readouterr().out.count("an offset") == 2 and Path("runs/points/points.png").stat().st_size > 10_000


def test_import_and_help_are_quiet_and_light():
    code = ("import cgap, sys, contextlib, inspect\nprint('imported', flush=True)\n"
            "source = inspect.getsource\ninspect.getsource = lambda a: source(a).replace('  # ', '  # 9 % of ')\n"
            "with contextlib.suppress(SystemExit): cgap.main(['--help'])\n"
            "print(sorted({'matplotlib', 'torchvision', 'PIL'} & set(sys.modules)))")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             env={"PYTHONPATH": str(Path(cgap.__file__).parent), "RANK": "", "WORLD_SIZE": ""})
    first, *helped, last = process.stdout.splitlines()
    assert (first, last, process.stderr) == ("imported", "[]", "") and not list(Path(".").iterdir())
    assert all(flag in "\n".join(helped) for flag in flags(**dict.fromkeys(Config.__annotations__, True)))


def test_a_folder_is_named_after_the_time_the_loss_and_the_seed():
    assert re.fullmatch(r"runs/\d{8}-\d{6}-CUA-centred-seed7", Config(unif=1, align=1, center=True, seed=7).out)


# ---- bad input ----
def tree():
    return {p: p.is_file() and p.read_bytes() for p in Path(".").rglob("*")}


def refused(capsys, argv, *named):
    """Exit status 2, one line of error that names what is wrong, and nothing written."""
    before = tree()
    with pytest.raises(SystemExit) as end:
        cgap.main(argv)
    error = re.sub(r"[^\r\n]*\d%\|[^\r\n]*|\r", "", capsys.readouterr().err).strip()  # but progress bars
    assert end.value.code == 2 and error.startswith("cgap.py: error: ") and len(error.splitlines()) == 1, error
    assert all(name in error for name in named), error
    assert tree() == before


@pytest.mark.parametrize("bad, named", [
    ("--batch 1", "batch must"), ("--unif nan", "unif must"), ("--steps many", "--steps"), ("--stpes 5", "--stpes"),
    ("--device meta", "meta"), ("--device cuda:99", "--device cpu"), ("--temperature .005", "temperature must"),
    ("--limit 64 --batch 65", "65"),
    ("--limit 4 --batch 2", "4 to measure"), ("--data nowhere", "nowhere"), ("--data file", "header"),
    ("--limit 64 --steps 1 --out folder", "folder exists"), ("--limit 64 --steps 1 --out file/below", "file"),
    ("--plot folder --steps 5", "steps does nothing"), ("--resume folder", "checkpoint"),
    ("--points --unif 1", "unif does nothing")])
def test_a_bad_flag_is_one_line_of_error_and_nothing_is_written(capsys, bad, named):
    Path("folder").mkdir()
    Path("folder/checkpoint.pt").write_bytes(b"precious")
    Path("file").write_text("precious\nthing")
    refused(capsys, bad.split(), named)


@pytest.mark.parametrize("data, old, new, named", [
    ("coco", '"images"', "", "JSONDecodeError"), ("coco", "file_name", "path", "file_name"),
    ("pairs.csv", ",very", ",a,very", "more than two fields")])
def test_a_bad_list_of_captions_is_refused(capsys, data, old, new, named):
    file = {"coco": write_coco(train2017=50), "pairs.csv": write_csv()}[data]
    file.write_text(file.read_text().replace(old, new))
    refused(capsys, ["--data", data], named)


def test_a_run_that_diverges_says_so_and_keeps_finite_weights():
    with pytest.raises(cgap.UserError, match="not finite"):
        cgap.train(Config(**RUN | dict(lr=1e9, eval_every=1, out="out")), quiet=True)
    assert all(weight.isfinite().all() for weight in cgap.load_run("out")["model"].values())


def test_a_full_disk_is_an_error_and_leaves_the_old_file(monkeypatch):
    def save(content, file):
        file.write(b"half")
        raise OSError("no space left")

    Path("file").write_text("whole")
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="no space"):
        cgap.save_whole({}, Path("file"))
    assert tree() == {Path("file"): b"whole"}


def test_a_run_is_not_resumed_on_data_with_other_words(capsys):
    file = write_csv()
    cgap.train(Config(**RUN | dict(data=file, steps=1, out="run")), quiet=True)
    file.write_text(file.read_text().replace("shade", "hue"))
    refused(capsys, ["--resume", "run"], "other words")


# ---- interruption and resumption ----
def struck(argv, number, n, log):
    """In a process of its own: the command, which gets this signal just before its n-th checkpoint takes
    the place of the last one; what it says goes into the file `log`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    replace, left = os.replace, iter(range(1, n))
    os.replace = lambda *paths: replace(*paths) if next(left, None) else os.kill(os.getpid(), number)
    sys.exit(cgap.main(argv))


def exit_code(target, *args):
    process = PROCESSES.Process(target=target, args=args, daemon=True)
    process.start()
    process.join(PATIENCE)
    return process.exitcode


def result(run):
    """metrics.jsonl, and the bytes of the weights."""
    return records(run), {k: v.numpy().tobytes() for k, v in cgap.load_run(run)["model"].items()}


def test_a_run_killed_as_it_writes_ends_as_one_never_interrupted(tmp_path, finished):
    run = tmp_path / "run"
    for argv, n, kept in (flags(**RUN, out=run), 3, 2), (["--resume", str(run)], 4, 8):
        assert exit_code(struck, argv, signal.SIGKILL, n, tmp_path / "log") == -signal.SIGKILL
        assert cgap.load_run(run)["history"][-1]["step"] == kept
    expected = result(finished("one")[0])
    for _ in range(2):  # also where nothing is left to do
        cgap.train(cgap.load_run(run)["cfg"], True, quiet=True)
        assert result(run) == expected


def test_ctrl_c_ends_a_run_with_advice(tmp_path):
    assert exit_code(struck, flags(**RUN, out=tmp_path / "run"), signal.SIGINT, 2, tmp_path / "log") == 130
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log and f"--resume {tmp_path / 'run'}" in log.splitlines()[-1]


# ---- several processes ----
def gradients(rank, world, folder):
    """The gradients of one step as train takes it, saved by the first process."""
    cgap.RANK, cgap.WORLD_SIZE = rank, world
    model, (images, texts) = encoders(learn_temperature=True, temperature=0.07), inputs(18)
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/sync", rank=rank, world_size=world)
    forward = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    x, y, T = forward(images[rank::world], texts[rank::world])
    cgap_loss(cgap.gather(x), cgap.gather(y), T, 1, 1, 1, True)[0].backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{world}.pt")


def test_gradients_do_not_depend_on_the_number_of_processes(tmp_path):
    gradients(0, 1, tmp_path)
    torch.multiprocessing.start_processes(gradients, (3, tmp_path), nprocs=3, start_method="forkserver")
    assert_close(torch.load("3.pt"), torch.load("1.pt"), 1e-5)


def test_torchrun_on_two_processes_gives_the_curve_of_one(finished):
    (one, *_), (two, _, error) = finished("one"), finished("two")
    one, two = ([record["loss"] for record in records(folder)] for folder in (one, two))
    assert two == pytest.approx(one, abs=1e-3)
    assert "deprecat" not in error and "FutureWarning" not in error


def test_a_batch_that_cannot_be_split_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(cgap, "WORLD_SIZE", 5)
    refused(capsys, flags(**RUN, out="out"), "batch of 12", "5 processes")


# ==================================================================================================
# 4. The claims and what is quoted of them
# ==================================================================================================
@pytest.fixture
def reproduce(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(cgap.__file__).parent / "figures"))
    return importlib.import_module("reproduce")


def test_the_gallery_is_made_of_the_results_and_the_readme_quotes_it(reproduce):
    results = json.loads((reproduce.HERE / "results.json").read_text(encoding="utf-8"))
    assert results.keys() == reproduce.CLAIMS.keys() == reproduce.READINGS.keys()
    sections = [reproduce.section(name, claim, results[name]) for name, claim in reproduce.CLAIMS.items()]
    gallery = "\n".join([reproduce.INTRO, *sections])
    assert gallery == (reproduce.HERE / "README.md").read_text(encoding="utf-8")
    assert all((reproduce.HERE / f"{name}.png").stat().st_size > 10_000 for name in reproduce.CLAIMS)
    rows = {*re.findall(r"^\|.*\|-?\d\.\d{3}\|.*", README, re.M)}
    for metric in reproduce.CLAIMS["losses"].shown:
        means = [f"{reproduce.values(results['losses'], label, metric).mean():.3f}" for label in (
            "CLIP, T=0.01", "CUA, T=0.01", "CLIP, T=0.1", "CUA centred, T=0.07")]
        rows.remove(f"|{reproduce.spelled(metric)}|{'|'.join(means)}|")
    for row in rows:  # the other tables quote rows of the gallery, without spreads and some columns
        cells = map(re.escape, row.strip("|").split("|"))
        assert re.search(r"^\|" + r"[|±](.*\|)?".join(cells), gallery, re.M), row


def test_the_exercise_of_the_readme_computes_the_loss_in_strips():
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, flags=re.S) if "def loss_in_strips" in block]
    exec(textwrap.dedent("    " + code.lstrip()), solution := {})
    x, y = (z.requires_grad_() for z in clouds(100, 8, 1))
    strips = solution["loss_in_strips"](x, y, 0.05, 1, 2, 3, True, 30)
    gradients = torch.autograd.grad(strips, (x, y))
    assert_close([strips, *gradients], with_gradients(cgap_loss, x, y, 0.05, 1, 2, 3, True)[:3], 1e-9)


def test_claims_run_once(reproduce, tmp_path, monkeypatch):
    tiny = {"steps": 2, "limit": 64, "batch": 16, "image_size": 8}
    claim = type(reproduce.CLAIMS["losses"])("title", {"CLIP": tiny, "tuned": {**tiny, "model": "kept", "source": "CLIP"}},
                                             [("alignment", "CLIP", "tuned")], ("alignment", "zero_shot"))
    monkeypatch.setattr(reproduce, "CLAIMS", {"tiny": claim, "real": claim})
    monkeypatch.setattr(reproduce, "READINGS", {"tiny": "text"})
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "tiny"])
    reproduce.main()
    first = {path: path.stat().st_mtime_ns for path in Path("runs/reproduce").glob("*.json")}
    made = json.loads(Path("results.json").read_text())
    reproduce.main()
    assert len(first) == 6 and first == {path: path.stat().st_mtime_ns for path in first}
    assert json.loads(Path("results.json").read_text()) == made and Path("tiny.png").exists()
    assert "python figures/reproduce.py tiny" in Path("README.md").read_text(encoding="utf-8")


def test_a_check_holds_if_the_paired_difference_exceeds_its_spread(reproduce):
    result = {"runs": {"a": [[{"m": 0.0}, {"m": v}] for v in (.4, .7, 1.0)], "CLIP, b": [[{"m": 0}, {"m": v}] for v in (.3, .6, .9)],
                       "CLIP, c": [[{"m": 0}, {"m": v}] for v in (.1, .2, .3)]}}
    for check, word in ((("m", "a", "CLIP, b"), "holds at every seed"), (("m", "CLIP, b", "a"), "**does not hold**"),
                        (("m", "a", "best CLIP"), "holds at every seed"), (("m", "a", 0.5), "**does not hold**"),
                        (("m", "a", "a, at the start"), "holds at every seed")):
        text, found = reproduce.verdict(result, *check)
        assert found == word and ("CLIP, b" in text) == ("CLIP" in str(check)), check
