# SPDX-License-Identifier: MIT
"""The contrastive gap in one file: make it, measure it, find its cause, close it.

CLIP maps a picture and its caption to nearby points of one sphere. Yet pictures end up in one
region of it and captions in another. "It's Not a Modality Gap: Characterizing and Addressing the
Contrastive Gap" (Fahim, Murphy, Fyshe, arXiv 2405.18570) shows that the contrastive loss itself
makes this gap, and that two more terms, uniformity and alignment, close it. See it on a laptop:

    python cgap.py --points                 # the smallest gap: no encoders, a few seconds
    python cgap.py                          # two encoders and the CLIP loss: a gap
    python cgap.py --unif 1 --align 1       # two terms more: it closes
    python cgap.py --center                 # its cause taken away: it does not open

From Python: `history = train(Config(unif=1, align=1))`.
"""
import argparse
import csv
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import sys
import textwrap
import time
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

from torch import nn
from tqdm import tqdm

__version__ = "2.1"

# ==================================================================================================
# PART ONE: THE PAPER (of part two it uses the settings `cfg`, and a few names that speak)
# ==================================================================================================
# 1. The loss. Copy this section into your own project: it needs nothing else.
#
# x_i and y_i are the embeddings of picture i and of its caption, N pairs in a batch.
#   clip    x_i is to be more similar to its own y_i than to any other y_j, and the other way round
#   align   the two are to be close
#   unif    pictures are to be far from other pictures, captions from other captions
#   xunif   pictures are to be far from the captions of others
# The paper's losses are rows of weights: CLIP; CUA = CLIP + unif + align; CUAXU = CUA + xunif.
# --------------------------------------------------------------------------------------------------
import torch
import torch.nn.functional as F


def check_pairs(x, y, least):
    """Raise ValueError unless x and y are floating point, of one shape (N, D), with N >= least."""
    paired = x.shape == y.shape and x.ndim == 2 and len(x) >= least
    if not (paired and x.is_floating_point() and y.is_floating_point()):
        raise ValueError(f"x and y must be floating point and of one shape (N, D), N >= {least}, "
                         f"not {x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}")


def uniformity(x, y, t=2.0):
    """log mean_{i != j} exp(-t |x_i - y_j|^2) of unit vectors (N, D): a scalar, -4t to 0.

    0 if all are one point, lower the farther apart they are; the larger t, the more do near pairs
    count. Of one modality: uniformity(x, x). Pairs i = j are left out: they are to be near.
    Source: Wang & Isola, arXiv 2005.10242.
    """
    N = len(x)
    e = torch.exp(2 * t * (x @ y.T - 1))  # (N, N); on the sphere |a - b|^2 = 2 - 2 a.b
    return torch.log((e.sum() - e.diagonal().sum()) / (N * (N - 1)))


def cgap_loss(x, y, temperature=0.01, unif=0.0, align=0.0, xunif=0.0, center=False):
    """CLIP + unif * uniformity + align * alignment + xunif * cross-modal uniformity.

    x, y: (N, D) raw embeddings, row i of x paired with row i of y; they are normalised here.
    temperature: a number or, to learn it, a scalar tensor. center: subtract the batch's means first
    (why: section 3); to use the encoders, subtract those of training data, as `fold_means` does.
    Returns the total, a scalar to minimise (often negative, as uniformity is), and a dict of its
    unweighted terms, detached. In float32 or better, also under autocast. With several processes x
    and y must be those of all, with gradients (`gather`): a log of means is no mean of logs. It is
    faster on a CPU after torch.set_flush_denormal(True): most of softmax is below 1e-38.
    Raises ValueError for other shapes, fewer than 2 pairs, integers. Source: the paper's L_CUAXU.
    """
    check_pairs(x, y, least=2)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):  # bfloat16: logits off by .2
        x = x.to(dtype)
        y = y.to(dtype)
        if center:
            x = x - x.mean(0)
            y = y - y.mean(0)
        x = F.normalize(x, dim=1)
        y = F.normalize(y, dim=1)
        logits = x @ y.T / temperature  # (N, N)
        matched = torch.arange(len(x), device=x.device)
        terms = {
            "clip": (F.cross_entropy(logits, matched) + F.cross_entropy(logits.T, matched)) / 2,
            "align": (x - y).square().sum(1).mean(),
            "unif": (uniformity(x, x) + uniformity(y, y)) / 2,
            "xunif": uniformity(x, y),
        }
    weights = {"clip": 1.0, "unif": unif, "align": align, "xunif": xunif}
    assert weights.keys() == terms.keys(), weights.keys() ^ terms.keys()  # none is forgotten
    total = sum(weight * terms[name] for name, weight in weights.items() if weight)
    return total, {name: term.detach() for name, term in terms.items()}


# --------------------------------------------------------------------------------------------------
# 2. Measuring the gap. One number is not enough: two clouds can share a centre and be told apart;
# two that nobody can tell apart can still sit in a corner, where pairs are close for free.
# --------------------------------------------------------------------------------------------------
def fit_logistic(z, labels, C):
    """The w (D,) that minimises |w'|^2 / 2 + C sum_i log(1 + exp(-s_i z_i.w)), by Newton's method.

    z: (N, D), the last column 1: the last weight is the bias, w' the others. labels: (N,), 0 or 1
    for s = -1 or 1. C: as in scikit-learn, the larger the freer.
    """
    ridge = torch.eye(z.shape[1], dtype=z.dtype)
    ridge[-1, -1] = 0
    w = z.new_zeros(z.shape[1])
    for _ in range(50):
        p = torch.sigmoid(z @ w)
        gradient = ridge @ w + C * z.T @ (p - labels)
        hessian = ridge + C * (z.T * (p * (1 - p))) @ z
        step = torch.linalg.solve(hessian, gradient)
        w = w - step
        if step.norm() < 1e-6 * w.norm():
            break
    return w


def linear_separability(x, y, C=1.0):
    """Accuracy, 0 to 1, of a logistic regression that tells x from y, unit vectors (N, D), float64:
    fit on 80 % of the pairs, tested on the others. 1 is a complete gap, 0.5 is none. The authors
    use C = 1, whose penalty keeps w small and misses tiny gaps; 100 finds them."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    z = F.pad(torch.stack([x, y]), (0, 1), value=1.0)[:, order]  # (2, N, D + 1)
    cut = int(0.8 * len(x))  # by pair: both halves of a pair are on one side
    labels = torch.arange(2).repeat_interleave(cut).to(z.dtype)
    says_y = z[:, cut:] @ fit_logistic(z[:, :cut].flatten(0, 1), labels, C) > 0
    return (says_y == torch.tensor([[False], [True]])).double().mean()


def effective_rank(x):
    """How many dimensions x (N, D) uses, 1 to D: exp of the entropy of the shares of variance on
    the principal axes (after Roy & Vetterli 2007)."""
    variances = torch.linalg.eigvalsh(torch.cov(x.T)).clamp(min=0)
    return torch.special.entr(variances / variances.sum().clamp(min=1e-30)).sum().exp()


def effective_temperature(x, y, temperature):
    """T / sqrt((1 - |mean x|^2) (1 - |mean y|^2)) of unit vectors (N, D): the T that softmax feels.

    What the means add to a cosine does not say who belongs to whom. What does is the product of two
    vectors without their means, of mean squares 1 - |mean|^2: where these are small, all cosines
    are alike, as if T were higher. A narrow space is a warm one.
    """
    left = (1 - x.mean(0).square().sum()) * (1 - y.mean(0).square().sum())
    return float(temperature / left.detach().clamp(min=1e-12).sqrt())


@torch.no_grad()
def gap_metrics(x, y):
    """All measures of the gap between paired embeddings x, y (N, D), as a dict of floats.

    centroid_distance          |mean x - mean y|, 0 to 2
    linear_separability        can a classifier tell x from y? 0.5 never, 1 always; _c100: C = 100
    matched_cosine, alignment  mean x_i . y_i, -1 to 1; mean |x_i - y_i|^2, 0 to 4
    uniformity_image, uniformity_text, cross_uniformity   -8 to 0, of 5,000 pairs at the most
    effective_rank_image, effective_rank_text             1 to D
    x and y are normalised here. Raises ValueError as cgap_loss does, for fewer than 5 pairs, and
    for values that are not finite. Source: the paper; the first two as in the authors' code.
    """
    check_pairs(x, y, least=5)
    x = F.normalize(x.detach().cpu().double(), dim=1)  # the CPU first: MPS has no float64
    y = F.normalize(y.detach().cpu().double(), dim=1)
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("x and y must be finite")
    every = math.ceil(len(x) / 5000)
    x_some = x[::every].float()
    y_some = y[::every].float()
    metrics = {
        "centroid_distance": (x.mean(0) - y.mean(0)).norm(),
        "linear_separability": linear_separability(x, y),
        "linear_separability_c100": linear_separability(x, y, C=100.0),
        "matched_cosine": (x * y).sum(1).mean(),
        "alignment": (x - y).square().sum(1).mean(),
        "uniformity_image": uniformity(x_some, x_some),
        "uniformity_text": uniformity(y_some, y_some),
        "cross_uniformity": uniformity(x_some, y_some),
        "effective_rank_image": effective_rank(x),
        "effective_rank_text": effective_rank(y),
    }
    return {name: float(value) for name, value in metrics.items()}


def uniform_optimum(d):
    """Uniformity of the uniform distribution on the sphere in d dimensions, the least in the limit
    of many points: log 0F1(; d/2; 4) - 4, -2.080 at d = 3 and -3.938 at d = 128."""
    term = total = 1.0
    for k in range(1, 60):
        term *= 4 / ((d / 2 + k - 1) * k)
        total += term
    return math.log(total) - 4


# --------------------------------------------------------------------------------------------------
# 3. The smallest gap: no encoders, only points that the loss may move as it likes. Left alone, they
# open none. Let each side learn one vector that its points share, as an encoder's biases are. The
# gradients of all points add up in it, so it moves first; and nothing ties the two sides' vectors
# to each other, since their product is the same in all logits and cancels. Within a few steps there
# is a complete gap, at any temperature. Where T is high it closes again. At T = 0.01 it stays: the
# softmax is too cold for pairs that do not fit, and shared vectors warm it (effective_temperature).
# --------------------------------------------------------------------------------------------------
def smallest_gap(offset=True, unif=0.0, align=0.0, xunif=0.0, temperature=0.01, dim=128, n=512,
                 batch=64, steps=600, seed=0, mismatch=0.0):
    """Train n pairs of free points, with or without an offset, at first 0, that a side shares.

    Both sides start in the same cone, so without a gap. temperature: a number, or a function of the
    step. mismatch: the share of y that is permuted, anew at each step. Returns a dict for each
    measurement: `step`, `effective_temperature`, gap_metrics. Beware of d = 2: on a circle, clouds
    that start far apart cannot pass each other.
    """
    torch.manual_seed(seed)
    cone = torch.randn(dim) / dim ** 0.5
    points = cone + 0.3 / dim ** 0.5 * torch.randn(2, n, dim)
    points.requires_grad_()
    offsets = torch.zeros(2, 1, dim, requires_grad=offset)
    optimizer = torch.optim.Adam([points, offsets], lr=0.01)
    history = []
    for step in range(steps + 1):
        x, y = points + offsets
        T = temperature(step) if callable(temperature) else temperature
        if step in (0, 1, 2, 5, 10, 20, 50, 100, 200, 400, steps):
            warm = effective_temperature(F.normalize(x, dim=1), F.normalize(y, dim=1), T)
            history.append({"step": step, "effective_temperature": warm, **gap_metrics(x, y)})
        i = torch.randperm(n)[:batch]
        j = mismatched(n, mismatch)[i]
        loss, _ = cgap_loss(x[i], y[j], T, unif=unif, align=align, xunif=xunif)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return history


def mismatched(n, share):
    """(n,): the partner of each: itself but for a random share, who get the next one's."""
    partner = torch.arange(n)
    chosen = torch.randperm(n)[:int(share * n)]
    partner[chosen] = chosen.roll(1)
    return partner


# --------------------------------------------------------------------------------------------------
# 4. Two small encoders. Neither looks at the rest of its batch (GroupNorm and LayerNorm, no
# BatchNorm), so the only place where samples meet is the loss.
# --------------------------------------------------------------------------------------------------
class ImageEncoder(nn.Module):
    """A convolutional network: uint8 images (B, 3, S, S) to embeddings (B, dim)."""

    def __init__(self, dim):
        super().__init__()
        layers = []
        for c_in, c_out, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1)):
            conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1)
            layers += [conv, nn.GroupNorm(8, c_out), nn.GELU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())  # (B, 128)
        self.projection = nn.Linear(128, dim)

    def forward(self, images):
        return self.projection(self.body(images.float() / 64 - 2))  # pixels to about -2 .. 2


class TextEncoder(nn.Module):
    """A transformer: tokens (B, L), 0 for padding, L up to `context`, to embeddings (B, dim)."""

    def __init__(self, dim, vocab, context, width=128, heads=4):
        super().__init__()
        self.token = nn.Embedding(vocab, width, padding_idx=0)
        self.position = nn.Parameter(torch.randn(context, width))  # as large as word embeddings
        self.body = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu",
                                               batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, dim)

    def forward(self, tokens):
        is_word = tokens != 0  # (B, L)
        h = self.token(tokens) + self.position[:tokens.shape[1]]  # (B, L, width)
        h = self.norm(self.body(h, src_key_padding_mask=~is_word))
        weight = is_word[..., None].to(h.dtype)
        return self.projection((h * weight).sum(1) / weight.sum(1))  # mean over the words


class TwoEncoders(nn.Module):
    """An image encoder, one for texts of `vocab` words (or, `same_modality`, for the same images),
    and a temperature."""

    def __init__(self, cfg, vocab):
        super().__init__()
        self.image = ImageEncoder(cfg.dim)
        self.text = (ImageEncoder(cfg.dim) if cfg.same_modality
                     else TextEncoder(cfg.dim, vocab, cfg.context))
        # log(1 / T) is what is learned: it moves by factors, and T stays above 0.
        self.log_scale = nn.Parameter(torch.tensor(-math.log(cfg.temperature)),
                                      requires_grad=cfg.learn_temperature)

    def forward(self, images, texts):
        return self.image(images), self.text(texts), self.temperature()

    def temperature(self):
        """T, a scalar tensor."""
        return torch.exp(-self.log_scale)


@torch.no_grad()
def encode(encoder, inputs):
    """Raw embeddings (N, dim) of images or tokens, float32, on the CPU."""
    device = encoder.projection.bias.device
    with autocast(device):
        parts = [encoder(part.to(device)).float().cpu() for part in inputs.split(256)]
    return torch.cat(parts)


def remove_initial_gap(model, images, texts):
    """Lay the second encoder's cloud onto the first's, in place, to see whether training opens a
    gap where there is none: the paper's idealised start.

    Its projection is changed so that mean and spread of its embeddings y of these pairs become
    those of x, turned by the orthogonal R that minimises |(y - mean y) R - (x - mean x)|
    (Procrustes). The paper does not mention the spread: it matters as embeddings are normalised.
    """
    x = encode(model.image, images).double()
    y = encode(model.text, texts).double()
    mean_x = x.mean(0)
    mean_y = y.mean(0)
    x -= mean_x
    y -= mean_y
    u, _, vt = torch.linalg.svd(y.T @ x)
    turn = (u @ vt).T * x.norm() / y.norm()
    weight = model.text.projection.weight.data
    bias = model.text.projection.bias.data  # W h + b becomes turn (W h + b - mean_y) + mean_x
    bias.copy_((turn @ (bias.cpu().double() - mean_y) + mean_x).float())
    weight.copy_((turn @ weight.cpu().double()).float())


def fold_means(model, images, texts):
    """Subtract the mean embedding over these pairs from each projection's bias, in place: ordinary
    encoders with a mean of 0. A centred loss sees no difference: it subtracts biases, too."""
    for encoder, inputs in ((model.image, images), (model.text, texts)):
        bias = encoder.projection.bias.data
        bias -= encode(encoder, inputs).mean(0).to(bias.device)


# --------------------------------------------------------------------------------------------------
# 5. Scenes: one or two coloured shapes, and a caption that says exactly what is there. So the pairs
# are perfect. Two tasks show what the space is for: to name what was never seen, and to calculate.
# --------------------------------------------------------------------------------------------------
@dataclass
class Pairs:
    """Images, each with its captions or, tokens None, with itself."""
    images: torch.Tensor  # (N, 3, S, S) uint8
    tokens: torch.Tensor  # (N, K, L) int32, K captions of L words padded with 0, or None

    def batch(self, i, turn=0):
        """Images i (B,), each with one of its captions, in turn, no wider than the longest."""
        images = self.images[i]
        if self.tokens is None:
            return images, images
        tokens = self.tokens[i, turn % self.tokens.shape[1]]
        return images, tokens[:, tokens.any(0)]

    def head(self, n):
        """The first n pairs, or all."""
        return self.batch(torch.arange(min(n, len(self.images))))


# Pairs, Pairs, list of words, two tasks or None
Data = namedtuple("Data", "train val vocab zero_shot arithmetic")
# The nearest prompt should be the label; unseen (bool): the classes that are not in training.
ZeroShot = namedtuple("ZeroShot", "images labels prompts unseen")
# Image q + text(new) - text(old) should be nearest to an image i of which correct[q, i] is True.
Arithmetic = namedtuple("Arithmetic", "images old new correct")


def split_words(text):
    """Lower case, words and single punctuation marks: "A dog's bowl." -> [a, dog, ', s, bowl, .]"""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def make_vocab(captions, size):
    """The `size` most frequent words of the captions, sorted, after padding (0) and unknown (1)."""
    counts = Counter(word for text in captions for word in split_words(text))
    return ["<pad>", "<unk>"] + sorted(word for word, _ in counts.most_common(size))


def tokenize(captions, vocab, context):
    """Token numbers (len(captions), L), int32, of the first `context` words, padded with 0."""
    number = {word: i for i, word in enumerate(vocab)}
    rows = []
    for text in captions:
        words = split_words(text)[:context] or ["<unk>"]
        rows.append(torch.tensor([number.get(word, 1) for word in words], dtype=torch.int32))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


COLOURS = {"red": (.85, .10, .10), "green": (.10, .65, .15), "blue": (.15, .25, .90),
           "yellow": (.95, .90, .15), "purple": (.60, .15, .75), "cyan": (.15, .85, .90),
           "white": (1., 1., 1.), "black": (0., 0., 0.)}
SHAPES = {  # inside or not, for u to the right and v down, -1 to 1 across the shape
    "circle": lambda u, v: u * u + v * v < 1,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) < .85,
    "triangle": lambda u, v: (v < .85) & (2 * u.abs() - v < 1),
    "diamond": lambda u, v: 1.5 * u.abs() + v.abs() < 1.1,
    "cross": lambda u, v: ((u.abs() < .3) | (v.abs() < .3)) & (u.abs() < 1) & (v.abs() < 1),
    "ring": lambda u, v: (u * u + v * v - .72).abs() < .28}
RELATIONS = ["left of", "above"]  # two suffice: with "right of" one scene would have two captions
WORDS = [list(COLOURS), list(SHAPES), list(COLOURS), list(SHAPES), RELATIONS]  # of scenes
OBJECTS = torch.cartesian_prod(torch.arange(len(COLOURS)), torch.arange(len(SHAPES)))  # (48, 2)
UNSEEN = OBJECTS[:, 0] % len(SHAPES) == OBJECTS[:, 1]  # one for each colour: never in training
# Where both objects are, (x, y), for one alone, side by side, one above the other; +- how much
PLACES = torch.tensor([[[.5, .5], [.5, .5]], [[.25, .5], [.75, .5]], [[.5, .25], [.5, .75]]])
JITTER = torch.tensor([[.2, .2], [.04, .15], [.15, .04]])


def describe(scenes):
    """The captions of scenes (N, 5): colour, shape, colour, shape, relation (-1: one only)."""
    captions = []
    for scene in scenes.tolist():
        words = [names[k] for names, k in zip(WORDS, scene)]
        second = f" {words[4]} a {words[2]} {words[3]}" if scene[4] >= 0 else ""
        captions.append(f"a {words[0]} {words[1]}" + second)
    return captions


def random_scenes(n, single):
    """n scenes (n, 5) without unseen objects, a share `single` of them with one object."""
    seen = OBJECTS[~UNSEEN]
    objects = seen[torch.randint(len(seen), (n, 2))].flatten(1)  # (n, 4)
    relation = torch.randint(len(RELATIONS), (n, 1))
    relation[torch.rand(n) < single] = -1
    return torch.cat([objects, relation], 1)


def around(centre, jitter, *shape):
    """Uniform between centre - jitter and centre + jitter."""
    return centre + jitter * (2 * torch.rand(shape) - 1)


def draw_scenes(scenes, size):
    """Images (N, 3, size, size), uint8: jitter in place, size and colour, a grey behind, noise."""
    palette = torch.tensor(list(COLOURS.values()))
    axis = (torch.arange(size) + .5) / size
    images = []
    for part in scenes.split(256):  # small enough to stay in the processor's cache
        n = len(part)
        kind = part[:, 4] + 1  # 0 alone, 1 side by side, 2 one above the other
        centre = around(PLACES[kind], JITTER[kind][:, None], n, 2, 2)[..., None]  # (n, 2, xy, 1)
        radius = around(.2, .03, n, 2, 1)
        image = around(.5, .15, n, 1, 1, 1).repeat(1, 3, size, size)
        for k in (0, 1):
            place = (axis - centre[:, k]) / radius[:, k, None]  # (n, 2, size): across, down
            colour = palette[part[:, 2 * k]] + .08 * torch.randn(n, 3)
            for shape, inside in enumerate(SHAPES.values()):
                i = ((part[:, 2 * k + 1] == shape) & (kind >= k)).nonzero()[:, 0]
                mask = inside(place[i, :1], place[i, 1, :, None])[:, None]  # (., 1, size, size)
                image[i] = torch.where(mask, colour[i, :, None, None], image[i])
        image += .05 * torch.randn(image.shape)
        images.append((image * 255).clamp(0, 255).byte())
    return torch.cat(images)


def change(scenes, slot):
    """The scenes, each with another random value in its column slot (N,); perhaps an unseen one."""
    row = torch.arange(len(scenes))
    choices = torch.tensor([len(words) for words in WORDS])[slot]
    shift = 1 + (torch.rand(len(scenes)) * (choices - 1)).long()
    changed = scenes.clone()
    changed[row, slot] = (scenes[row, slot] + shift) % choices
    return changed


def scene_classes(size, vocab, context):
    """The zero-shot task: single objects in all combinations, prompts such as "a red circle"."""
    scenes = F.pad(OBJECTS, (0, 3), value=-1)
    labels = torch.arange(len(scenes)).repeat(20)
    return ZeroShot(draw_scenes(scenes[labels], size), labels,
                    tokenize(describe(scenes), vocab, context), UNSEEN)


def scene_edits(size, vocab, context, queries=200):
    """The arithmetic task: picture + text(new word) - text(old word) should find the edited scene
    among all queries, all edited scenes, and three near misses of each of the latter."""
    source = random_scenes(2 * queries, 0.0)
    source = source[(source[:, :2] != source[:, 2:4]).all(1)][:queries]  # a word names one object
    slot = torch.randint(5, (len(source),))
    target = change(source, slot)
    near = [change(target, torch.full_like(slot, k)) for k in (0, 1, 4)]
    pool = torch.cat([source, target, *near])  # the queries come first

    def words(scenes):
        named = [WORDS[k][scene[k]] for k, scene in zip(slot, scenes)]
        return tokenize(named, vocab, context)

    return Arithmetic(draw_scenes(pool, size), words(source), words(target),
                      (target[:, None] == pool).all(2))


def scene_data(cfg):
    """20,000 training and 2,000 validation scenes with both tasks; a seed gives the same bytes."""
    torch.manual_seed(cfg.seed)
    size = cfg.image_size or 32
    n = min(20_000, cfg.limit or 20_000)
    scenes = random_scenes(n + min(2_000, n), cfg.single)
    captions = describe(scenes)
    vocab = make_vocab(captions[:n], cfg.vocab)
    tokens = tokenize(captions, vocab, cfg.context)[:, None]  # (N, 1, L)
    images = draw_scenes(scenes, size)
    return Data(Pairs(images[:n], tokens[:n]), Pairs(images[n:], tokens[n:]), vocab,
                scene_classes(size, vocab, cfg.context), scene_edits(size, vocab, cfg.context))


# --------------------------------------------------------------------------------------------------
# 6. Training: measure, then step.
# --------------------------------------------------------------------------------------------------
def embed(encoder, inputs):
    """Unit embeddings (N, dim) of images or tokens, on the CPU."""
    return F.normalize(encode(encoder, inputs), dim=1)


def recall(x, y, group):
    """How often the nearest y to x_i, and one of the nearest five, has x_i's group: (R@1, R@5).
    x, y: unit vectors (N, D). group: (N,) integers; equal captions share one."""
    nearest = torch.cat([(part @ y.T).topk(min(5, len(y))).indices for part in x.split(1024)])
    right = group[nearest] == group[:, None]  # (N, 5)
    return right[:, 0].float().mean().item(), right.any(1).float().mean().item()


def training_loss(model, data, cfg):
    """The loss and its terms on the first training pairs, one batch, as a dict of floats."""
    images, texts = data.train.head(cfg.batch)
    loss, terms = cgap_loss(encode(model.image, images), encode(model.text, texts),
                            model.temperature().item(), **cfg.weights())
    return {name: value.item() for name, value in {"loss": loss, **terms}.items()}


def evaluate(model, data):
    """The gap and retrieval on the validation pairs, the tasks of the data: a dict of floats."""
    images, texts = data.val.head(10 ** 9)
    x = embed(model.image, images)
    y = embed(model.text, texts)
    T = model.temperature().item()
    record = gap_metrics(x, y)
    record |= {"temperature": T, "effective_temperature": effective_temperature(x, y, T)}
    group = torch.unique(texts.flatten(1), dim=0, return_inverse=True)[1]
    record["i2t_r1"], record["i2t_r5"] = recall(x, y, group)
    record["t2i_r1"], record["t2i_r5"] = recall(y, x, group)
    if data.zero_shot:
        task = data.zero_shot
        scores = embed(model.image, task.images) @ embed(model.text, task.prompts).T
        right = (scores.argmax(1) == task.labels).float()
        record["zero_shot"] = right.mean().item()
        if task.unseen is not None:
            record["zero_shot_unseen"] = right[task.unseen[task.labels]].mean().item()
    if data.arithmetic:
        task = data.arithmetic
        pool = embed(model.image, task.images)
        query = torch.arange(len(task.old))
        edit = embed(model.text, task.new) - embed(model.text, task.old)
        scores = (pool[:len(query)] + edit) @ pool.T
        scores[query, query] = -math.inf  # the query itself is no answer
        record["arithmetic"] = task.correct[query, scores.argmax(1)].float().mean().item()
    return record


def batches(n, size, seed):
    """Without end: this process's share of `size` of n indices, none twice an epoch; the epoch."""
    for epoch in itertools.count():
        g = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        for rows in torch.randperm(n, generator=g).split(size)[:n // size]:
            yield rows[RANK::WORLD_SIZE], epoch


def make_optimizer(model, cfg):
    """AdamW; weight decay on matrices, not on biases, norms, temperature."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, cfg.lr, (0.9, 0.98), weight_decay=cfg.weight_decay, fused=True)


def learning_rate(step, cfg):
    """The lower of a linear warm-up over a tenth of the steps and a cosine to 0."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / cfg.steps)
    return cfg.lr * min((step + 1) / (0.1 * cfg.steps), cosine)


def measure(run, step, model, optimizer, data):
    """Do what is due: a snapshot for the figures, an evaluation, a checkpoint."""
    cfg = run.cfg

    def due(every):
        return step == cfg.steps or step % every == 0

    important = due(cfg.eval_every) or due(cfg.checkpoint_every)
    snapshot = due(max(1, cfg.steps // 30))
    if cfg.center and (important or snapshot):  # few pairs will do for a picture
        fold_means(model, *data.train.head(2048 if important else 256))
    if important:
        losses = training_loss(model, data, cfg)
        if not math.isfinite(losses["loss"]):
            raise UserError(f"the loss is not finite at step {step}: lower --lr or raise "
                            f"--temperature; {cfg.out} keeps the last good weights")
    if RANK != 0:
        return
    if snapshot:
        images, texts = data.val.head(256)
        both = torch.stack([embed(model.image, images), embed(model.text, texts)])
        run.snapshots[step] = both.half()  # (2, 256, dim)
    if due(cfg.eval_every):
        run.log(step, losses | evaluate(model, data))
    if due(cfg.checkpoint_every):
        run.save(step, model, optimizer)


def train(cfg, resume=False, model=None, quiet=False):
    """Train two encoders; returns the history, a dict for each evaluation: `step`, the loss and its
    terms, every metric, `seconds`, `images_per_second`. resume: go on with the run in cfg.out.
    model: your own TwoEncoders to start from. Raises UserError for settings and data that cannot
    work, and for a loss that is not finite."""
    cfg = cfg.named()
    cfg.check()
    device = pick_device(cfg)
    data = load_data(cfg)
    torch.manual_seed(cfg.seed)
    model = (model or TwoEncoders(cfg, len(data.vocab))).to(device)
    optimizer = make_optimizer(model, cfg)
    run = open_run(cfg, data, model, optimizer, resume)
    if cfg.init_gap == "remove" and not resume:
        remove_initial_gap(model, *data.train.head(2048))
    forward, loss_of = prepare(model, cfg)
    start = run.step
    weights = cfg.weights()
    source = itertools.islice(batches(len(data.train.images), cfg.batch, cfg.seed), start, None)
    for step in tqdm(range(start, cfg.steps + 1), cfg.name(), disable=quiet or RANK != 0):
        if step > start or not resume:  # measure the weights as they are ...
            measure(run, step, model, optimizer, data)
        if step == cfg.steps:
            break
        # ... then make a step
        images, texts = data.train.batch(*next(source))
        with autocast(device):
            x, y, T = forward(images.to(device), texts.to(device))
        loss, _ = loss_of(x, y, T, **weights)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.log_scale.data.clamp_(max=math.log(100))  # T >= 0.01, as in OpenAI's CLIP
    return run.history


# --------------------------------------------------------------------------------------------------
# 7. Figures, drawn from what runs have kept
# --------------------------------------------------------------------------------------------------
COLORS = ["#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#D55E00"]


def canvas(rows, columns, title, width, height):
    """A matplotlib figure and the list of its axes."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def plot_histories(histories, panels, title, path, xscale="linear"):
    """A panel for each metric of {metric: ideal}, a line for each history of {name: history}."""
    rows = len(panels) // 2
    figure, axes = canvas(rows, 2, title, 9.6, 0.6 + 3.2 * rows)
    for axis, (metric, ideal) in zip(axes, panels.items()):
        for (name, history), color in zip(histories.items(), itertools.cycle(COLORS)):
            steps = [record["step"] for record in history]
            values = [record[metric] for record in history]
            axis.plot(steps, values, "o-", color=color, markersize=3, label=name)
        axis.axhline(ideal, color="0.5", linestyle=":", label="ideal")
        axis.set(xlabel="training step", ylabel=metric.replace("_", " "), xscale=xscale)
        axis.set_xlim(left=0)
        axis.legend(fontsize=8)
    figure.savefig(path)


def plot_gap(runs, path):
    """The gap over time."""
    histories = {run.cfg.out: run.history for run in runs}
    panels = {"centroid_distance": 0, "linear_separability": 0.5, "alignment": 0,
              "uniformity_image": uniform_optimum(runs[0].cfg.dim)}
    plot_histories(histories, panels, "The gap over time", path)


def draw_pairs(axis, run, step):
    """Images, texts and lines between a hundred pairs at one step, in a plane: across the gap now,
    so that it is seen in full, upward what is left of its mean over training."""
    from matplotlib.collections import LineCollection
    gaps = {k: (both[1].float() - both[0].float()).mean(0) for k, both in run.snapshots.items()}
    mean = torch.stack(list(gaps.values())).mean(0)  # (D,)
    Q, R = torch.linalg.qr(torch.stack([gaps[step], mean], 1))
    points = (run.snapshots[step].float() @ (Q * R.diagonal().sign())).numpy()  # (2, n, 2)
    axis.clear()
    axis.add_collection(LineCollection(points[:, :100].swapaxes(0, 1), color="0.8", linewidth=0.5))
    axis.plot(*points[0].T, "o", color="#0072B2", markersize=3, label="images")
    axis.plot(*points[1].T, "^", color="#D55E00", markersize=3, label="texts")
    axis.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", xlabel="along the gap at this step",
             ylabel="along its mean over training")
    axis.locator_params(nbins=2)
    apart = gaps[step].norm()
    axis.set_title(f"{run.cfg.name()}, step {step}: centroids {apart:.2f} apart", fontsize=10)
    axis.legend(loc="lower right", fontsize=8)


def plot_embeddings(runs, path):
    """Images and texts before and after training, a row for each run."""
    figure, axes = canvas(len(runs), 2, "Matched pairs, before and after", 9, 4.5 * len(runs))
    for k, run in enumerate(runs):
        draw_pairs(axes[2 * k], run, min(run.snapshots))
        draw_pairs(axes[2 * k + 1], run, max(run.snapshots))
    figure.savefig(path)


def animate(runs, path):
    """The same over all of training, as a GIF, the runs side by side."""
    from matplotlib.animation import FuncAnimation
    title = "Images and texts in the space that they share"
    figure, axes = canvas(1, len(runs), title, 4.5 * len(runs), 4.8)

    def frame(step):
        for axis, run in zip(axes, runs):
            draw_pairs(axis, run, min(run.snapshots, key=lambda other: abs(other - step)))

    steps = sorted(runs[0].snapshots)
    frame(steps[0])
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, the axes stand still
    animation = FuncAnimation(figure, frame, steps + steps[-1:] * 5)  # it rests at the end
    animation.save(path, "pillow", fps=6, dpi=80)


def plot_spectrum(runs, path):
    """Cumulative explained variance after training."""
    figure, (axis,) = canvas(1, 1, "How evenly the dimensions are used", 6.4, 4.4)
    for run, color in zip(runs, itertools.cycle(COLORS)):
        for z, style in zip(run.snapshots[max(run.snapshots)], ("-", "--")):
            variance = torch.linalg.eigvalsh(torch.cov(z.float().T)).flip(0).cumsum(0)
            components = range(1, len(variance) + 1)
            axis.plot(components, (variance / variance[-1]).numpy(), style, color=color)
        axis.plot([], color=color, label=f"{run.cfg.name()} (texts dashed)")
    axis.set(xlabel="principal components", ylabel="share of the variance")
    axis.legend(fontsize=8)
    figure.savefig(path)


def plot_samples(runs, path):
    """A contact sheet of validation pairs."""
    figure, axes = canvas(3, 4, "Validation pairs", 9, 7.5)
    images, tokens = runs[0].samples
    for axis in axes:
        axis.axis("off")
    for axis, image, row in zip(axes, images, tokens):
        axis.imshow(image.permute(1, 2, 0).numpy())
        if row.ndim == 1:  # not, with the same modality, an image
            words = " ".join(runs[0].vocab[k] for k in row if k)
            axis.set_title(textwrap.fill(words, 28, max_lines=3), fontsize=8)
    figure.savefig(path)


FIGURES = {"gap.png": plot_gap, "embeddings.png": plot_embeddings, "spectrum.png": plot_spectrum,
           "samples.png": plot_samples, "gap.gif": animate}


# ==================================================================================================
# PART TWO: THE MACHINERY
# ==================================================================================================
# 8. Settings
# --------------------------------------------------------------------------------------------------
class UserError(Exception):
    """What the user can mend: the command line prints it as one line and exits with 2."""


@dataclass
class Config:
    """All settings of a run; the command line's flags, with these comments for their help."""
    unif: float = 0.0  # weight of uniformity; the paper's CUA is --unif 1 --align 1
    align: float = 0.0  # weight of alignment
    xunif: float = 0.0  # weight of cross-modal uniformity; CUAXU is all three at 1
    center: bool = False  # the loss sees embeddings without their batch's mean
    temperature: float = 0.01  # T of the CLIP loss, where OpenAI's ended; its start, if learned
    learn_temperature: bool = False  # learn T, at 0.01 or above
    data: str = "synthetic"  # or an MS-COCO folder, or a CSV file with the header image,caption
    limit: int = 0  # at most so many training, and validation, images; 0 for all
    mismatch: float = 0.0  # share of the training images that get each other's captions
    single: float = 0.1  # share of scenes with a single object
    image_size: int = 0  # side of the images; 0 for 32 (scenes) or 64 (photographs)
    cache: str = "~/.cache/cgap"  # folder for decoded photographs
    vocab: int = 10_000  # how many words are known, the most frequent in training
    context: int = 32  # words in a caption; longer ones are cut
    zero_shot: str = ""  # with photographs: a folder of images per class, to classify
    dim: int = 128  # dimension of the shared space
    same_modality: bool = False  # a second image encoder replaces the one for texts
    init_gap: str = "keep"  # or `remove` the gap between the untrained encoders
    steps: int = 1500  # training steps
    batch: int = 64  # pairs in a batch, over all processes
    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.1  # AdamW's, on matrices
    seed: int = 0  # seed of the scenes, the weights and the batches
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps; auto is a GPU if there is one
    compile: bool = False  # torch.compile the encoders and the loss
    eval_every: int = 250  # steps between evaluations
    checkpoint_every: int = 250  # steps between checkpoints
    out: str = ""  # folder of the run, which must not exist; else runs/<time>-<name>

    def check(self):
        """Raise UserError for a setting that cannot work, or does nothing."""
        scenes = self.data == "synthetic"
        least = {"temperature": 0.01, "vocab": 1, "context": 1, "dim": 2, "steps": 1, "batch": 2,
                 "eval_every": 1, "checkpoint_every": 1}
        idle = {"single": not scenes, "cache": scenes, "mismatch": self.same_modality,
                "zero_shot": scenes or self.same_modality}
        for name, value in vars(self).items():
            low = least.get(name, 0)
            high = 1 if name in ("mismatch", "single") else 1e9
            if isinstance(value, (int, float)) and not low <= value <= high:  # nan is not
                raise UserError(f"{option(name)} must be from {low} to {high:g}, not {value}")
            if idle.get(name) and value != getattr(Config, name):
                raise UserError(f"{option(name)} does nothing with these data: leave it out")
        if self.init_gap not in ("keep", "remove"):
            raise UserError(f"--init-gap is `keep` or `remove`, not `{self.init_gap}`")
        if self.batch % WORLD_SIZE:
            raise UserError(f"--batch {self.batch} cannot be split over {WORLD_SIZE} processes")

    def weights(self):
        """The settings that are arguments of cgap_loss, a new term's weight as well."""
        names = list(inspect.signature(cgap_loss).parameters)[3:]
        return {name: getattr(self, name) for name in names}

    def name(self):
        """The loss in short, for folders and legends."""
        terms = {name: weight for name, weight in self.weights().items() if weight}
        terms.pop("center", None)
        spelled = "+".join(f"{weight:g}{name}" for name, weight in terms.items())
        known = {"": "CLIP", "1unif+1align": "CUA", "1unif+1align+1xunif": "CUAXU"}
        return known.get(spelled, "CLIP+" + spelled) + ", centred" * self.center

    def named(self):
        """The same with a folder, by default named after the time and the loss."""
        name = self.name().replace(", ", "-")
        out = self.out or time.strftime(f"runs/%Y%m%d-%H%M%S-{name}")
        return replace(self, data=str(self.data), out=str(out))


def option(name):
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


# --------------------------------------------------------------------------------------------------
# 9. Photographs, decoded once into a cache that later runs map
# --------------------------------------------------------------------------------------------------
def read_coco(folder, split):
    """{image path: [captions]} of `train` or `val` in COCO's 2014 or 2017 layout, or {}."""
    captions = defaultdict(list)
    for file in folder.glob(f"annotations/captions_{split}20[0-9][0-9].json"):
        content = json.loads(file.read_bytes())
        images = folder / file.stem.removeprefix("captions_")
        paths = {image["id"]: images / image["file_name"] for image in content["images"]}
        for note in content["annotations"]:
            captions[paths[note["image_id"]]].append(note["caption"])
    return captions


def read_csv(file):
    """{image path: [captions]} of a file with the header image,caption; paths relative to it."""
    captions = defaultdict(list)
    with open(file, newline="", encoding="utf-8-sig") as lines:
        for row in csv.DictReader(lines):
            if None in row or None in row.values():
                raise ValueError(f"not two fields: {row}")
            captions[file.parent / row["image"]].append(row["caption"])
    return captions


def read_pairs(source):
    """(training, validation), {image path: [captions]} each; a tenth is held out if need be."""
    try:
        train = read_csv(source) if source.is_file() else read_coco(source, "train")
        val = read_coco(source, "val") or {path: train.pop(path) for path in list(train)[::10]}
        if not train:
            raise ValueError("no annotations/captions_train20xx.json, no rows to train on")
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{source} is neither COCO's folder nor a CSV file in UTF-8 with the "
                        f"header image,caption ({type(error).__name__}: {error})") from None
    return train, val


def load_photo(path, size):
    """The image as people see it (upright, white where transparent), scaled and centre-cropped:
    (3, size, size) uint8. Raises OSError where it cannot be read."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor
    try:
        with Image.open(path) as image:
            image.draft(None, (2 * size, 2 * size))  # decodes a JPEG no larger than this needs
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel
                image = image.point(lambda value: value / 256).convert("L")
            image = ImageOps.fit(image.convert("RGBA"), (size, size), Image.Resampling.BICUBIC)
    except Exception as error:  # a broken file may raise anything
        raise OSError(f"{path} ({error or type(error).__name__})") from None
    white = Image.new("RGBA", image.size, "white")
    return pil_to_tensor(Image.alpha_composite(white, image).convert("RGB"))


def decode(source, cfg, size):
    """What the cache holds: {split: (images, tokens)} with five captions an image, repeated if
    there are fewer, the vocabulary, and why images were left out that cannot be read."""
    faults = []
    content = {"faults": faults}

    def load(path):
        try:
            return load_photo(path, size)
        except OSError as error:
            faults.append(str(error))

    total = 0
    for split, captions in zip(("train", "val"), read_pairs(source)):
        paths = list(captions)[:cfg.limit or None]
        total += len(paths)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without the GIL
            images = list(tqdm(pool.map(load, paths), "decoding", len(paths), unit="image"))
        texts = [captions[path] for path, image in zip(paths, images) if image is not None]
        images = [image for image in images if image is not None]
        if not images or len(faults) > 0.1 * total:
            raise UserError(f"{len(faults)} of {total} images cannot be read, as {faults[0]}")
        five = [captions[k % len(captions)] for captions in texts for k in range(5)]
        if split == "train":
            content["vocab"] = make_vocab(five, cfg.vocab)
        tokens = tokenize(five, content["vocab"], cfg.context).unflatten(0, (-1, 5))
        content[split] = (torch.stack(images), tokens)
    return content


def photo_data(cfg):
    """Photographs with their captions, from the cache or decoded into it."""
    source = Path(cfg.data).absolute()
    size = cfg.image_size or 64
    if source.is_file():
        files = [source, *itertools.chain(*read_pairs(source))]
    else:
        folders = [f for f in source.glob("*/") if re.match("annotations|train|val", f.name)]
        files = itertools.chain.from_iterable(map(os.scandir, folders))
    # The name is a hash of all that decides the content, so that a stale cache is never found.
    state = [__version__, size, cfg.vocab, cfg.context, cfg.limit]
    for file in sorted(filter(os.path.exists, map(os.fspath, files))):
        status = os.stat(file)
        state += [file, status.st_size, status.st_mtime_ns]
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    cache = Path(cfg.cache).expanduser() / f"{source.stem}-{key}.pt"
    if RANK == 0 and not cache.exists():
        save_whole(decode(source, cfg, size), cache)
    if WORLD_SIZE > 1:
        torch.distributed.barrier()  # the first process makes the cache, the others find it
    try:
        found = torch.load(cache, weights_only=True, mmap=True)
    except (RuntimeError, OSError):
        raise UserError(f"{cache} is damaged: delete it") from None
    if found["faults"] and RANK == 0:
        print("warning: left out are", *found["faults"], sep="\n  ", file=sys.stderr)
    return Data(Pairs(*found["train"]), Pairs(*found["val"]), found["vocab"],
                cfg.zero_shot and folder_classes(cfg, size, found["vocab"]), None)


def folder_classes(cfg, size, vocab):
    """The zero-shot task from a folder of images per class: "a photo of a <folder name>"."""
    from torchvision.datasets import ImageFolder
    folder = ImageFolder(cfg.zero_shot, loader=lambda path: load_photo(path, size))
    prompts = [f"a photo of a {name.replace('_', ' ')}" for name in folder.classes]
    return ZeroShot(torch.stack([image for image, _ in folder]), torch.tensor(folder.targets),
                    tokenize(prompts, vocab, cfg.context), None)


def load_data(cfg):
    """The Data that cfg names. Raises UserError where it cannot be used."""
    data = scene_data(cfg) if cfg.data == "synthetic" else photo_data(cfg)
    train = len(data.train.images)
    val = len(data.val.images)
    if train < cfg.batch or val < 5:
        raise UserError(f"{train} training and {val} validation images are too few for --batch "
                        f"{cfg.batch}, or to measure a gap (5)")
    if cfg.mismatch:
        torch.manual_seed(cfg.seed)
        data.train.tokens = data.train.tokens[mismatched(train, cfg.mismatch)]
    if cfg.same_modality:
        data.train.tokens = data.val.tokens = None
        data = data._replace(zero_shot=None, arithmetic=None)
    return data


# --------------------------------------------------------------------------------------------------
# 10. Devices and processes
# --------------------------------------------------------------------------------------------------
RANK = int(os.environ.get("RANK", 0))  # as torchrun sets them, a process each
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def gather(rows):
    """The rows (n, D) of every process, (world * n, D), with gradients: each then has the whole
    loss, and DDP's mean of their gradients is the gradient of that. Without, others' rows would be
    constants, and their part of the gradient missing."""
    from torch.distributed.nn.functional import all_gather
    return torch.cat(all_gather(rows))


def pick_device(cfg):
    """The torch.device that cfg names, once this process has joined the others."""
    name = cfg.device
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} cannot be used here; try --device cpu") from None
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # before any parallel work, or only this thread does
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1 and not torch.distributed.is_initialized():
        # A day: the others wait while the first decodes photographs, or evaluates.
        torch.distributed.init_process_group(timeout=timedelta(days=1))
    return device


def autocast(device):
    """bfloat16 where a GPU has it natively, else nothing."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


def prepare(model, cfg):
    """(model, cgap_loss) as cfg wants them: compiled, and over all processes."""
    loss_of = cgap_loss
    if cfg.compile:
        model = torch.compile(model)
        loss_of = torch.compile(loss_of)
    if WORLD_SIZE == 1:
        return model, loss_of
    model = nn.parallel.DistributedDataParallel(model)
    return model, lambda x, y, T, **weights: loss_of(gather(x), gather(y), T, **weights)


# --------------------------------------------------------------------------------------------------
# 11. Runs: a folder with metrics.jsonl (a line for each evaluation), checkpoint.pt and figures
# --------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """What a checkpoint holds."""
    cfg: Config
    version: str
    vocab: list
    samples: tuple  # a few validation images, and their captions
    step: int
    seconds: float
    history: list
    snapshots: dict  # step: (2, n, dim) embeddings of images and texts
    model: dict
    optimizer: dict

    def log(self, step, measured):
        """Add an evaluation to the history, and write it down."""
        seconds = time.perf_counter() - self.began
        measured |= {"seconds": seconds, "images_per_second": step * self.cfg.batch / seconds}
        self.history.append({"step": step, **measured})
        lines = [json.dumps(record) + "\n" for record in self.history]
        Path(self.cfg.out).mkdir(parents=True, exist_ok=True)
        Path(self.cfg.out, "metrics.jsonl").write_text("".join(lines))

    def save(self, step, model, optimizer):
        """Write the checkpoint."""
        self.step = step
        self.seconds = time.perf_counter() - self.began
        self.model = model.state_dict()
        self.optimizer = optimizer.state_dict()
        save_whole(asdict(self), Path(self.cfg.out, "checkpoint.pt"))


def save_whole(content, path):
    """torch.save, with a whole file under that name at every instant."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            torch.save(content, file)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def load_run(folder):
    """The Run in a folder. Raises UserError if there is none."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise UserError(f"{folder} holds no checkpoint.pt: no run, or too short to go on with")
    try:
        run = Run(**torch.load(path, weights_only=True, map_location="cpu"))
        assert run.version == __version__
        run.cfg = Config(**run.cfg | {"out": str(folder)})
    except Exception as error:  # whatever a broken or a foreign file may raise
        raise UserError(f"{path} is broken, or not a checkpoint of cgap {__version__} "
                        f"({type(error).__name__})") from None
    return run


def open_run(cfg, data, model, optimizer, resume):
    """A new Run or, to resume, that in cfg.out, its weights put into model and optimizer."""
    if resume:
        run = replace(load_run(cfg.out), cfg=cfg)
        if run.vocab != data.vocab:
            raise UserError(f"{cfg.out} was trained on other words than {cfg.data} has now")
        model.load_state_dict(run.model)
        optimizer.load_state_dict(run.optimizer)
    elif Path(cfg.out).exists():
        raise UserError(f"--out {cfg.out} exists already: name another, or --resume {cfg.out}")
    else:
        run = Run(cfg, __version__, data.vocab, data.val.head(12), 0, 0.0, [], {}, {}, {})
    run.began = time.perf_counter() - run.seconds
    return run


# --------------------------------------------------------------------------------------------------
# 12. The command line
# --------------------------------------------------------------------------------------------------
def report(run):
    """Print each metric at the start and at the end of a run, beside its ideal."""
    dim = run.cfg.dim
    ideal = {"centroid_distance": 0, "linear_separability": 0.5, "linear_separability_c100": 0.5,
             "alignment": 0, "uniformity_image": uniform_optimum(dim),
             "uniformity_text": uniform_optimum(dim), "cross_uniformity": uniform_optimum(dim),
             "effective_rank_image": dim, "effective_rank_text": dim}
    first = run.history[0]
    last = run.history[-1]
    print(f"\n{run.cfg.name()}, {last['step']} of {run.cfg.steps} steps, seed {run.cfg.seed}, "
          f"{last['seconds']:.0f} s\n{'start':>34}{'end':>10}{'ideal':>10}")
    names = list(last)
    for name in names[names.index("centroid_distance"):-2]:  # after the loss, before the seconds
        best = "" if "temperature" in name else f"{ideal.get(name, 1):10.3f}"
        print(f"{name:24}{first[name]:10.3f}{last[name]:10.3f}{best}")


def points(out="runs/points", **settings):
    """Run the smallest gap, print its table and draw it."""
    torch.set_num_threads(1)  # so little work is not worth sharing
    torch.set_flush_denormal(True)
    histories = {}
    print(f"{'separability':>40}\n{'start':>32}{'end':>8}   uniformity  effective T")
    for loss, weight in (("CLIP", 0.0), ("CUA", 1.0)):
        for offset in (False, True):
            name = f"{loss}, {'with' if offset else 'without'} an offset"
            histories[name] = smallest_gap(offset, unif=weight, align=weight, **settings)
            start, *_, end = histories[name]
            print(f"{name:24}{start['linear_separability']:8.2f}{end['linear_separability']:8.2f}"
                  f"{end['uniformity_image']:13.2f}{end['effective_temperature']:13.3f}")
    Path(out).mkdir(parents=True, exist_ok=True)
    plot_histories(histories, {"linear_separability": 0.5, "centroid_distance": 0},
                   "Free points: does a gap open?", Path(out, "points.png"), "symlog")
    print(Path(out, "points.png"))


def plot(folders, out):
    """All figures of one run or several."""
    runs = [load_run(folder) for folder in folders]
    if len({run.cfg.dim for run in runs}) > 1:
        raise UserError("--plot lays runs over each other that have the same --dim")
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(runs, Path(out, name))
        print(Path(out, name))


def parse(argv):
    """The flags that were given, as a dict."""
    parser = argparse.ArgumentParser("cgap.py", argparse.SUPPRESS, __doc__.split("\n")[0],
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--points", action="store_true", help="the smallest gap: no encoders")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    parser.add_argument("--plot", metavar="RUN", nargs="+", help="draw a run, or several as one")
    comments = re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", inspect.getsource(Config), re.M)
    for f in fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        text = f"{dict(comments).get(f.name)} (default: {f.default})"
        parser.add_argument(option(f.name), help=text, **kind)
    return vars(parser.parse_args(argv))


def run_command(given):
    """Do what the flags say."""
    useful = {"points": {"temperature", "dim", "seed", "steps", "batch", "mismatch", "out"},
              "plot": {"out"}, "resume": {"device"}}
    mode = next((name for name in useful if name in given), None)
    for name in given.keys() - useful.get(mode, given.keys()) - {mode}:
        raise UserError(f"{option(name)} does nothing with {option(mode)}: leave it out")
    what = given.pop(mode, None)
    if mode == "points":
        Config(**given).check()
        if given.get("batch", 64) > 512:
            raise UserError("--points has 512 pairs: --batch is at most that")
        return points(**given)
    if mode == "plot":
        return plot(what, given.get("out", what[0] if len(what) == 1 else "runs/plot"))
    cfg = replace(load_run(what).cfg, **given) if mode else Config(**given)
    cfg = cfg.named()
    train(cfg, resume=mode == "resume")
    if RANK == 0:
        report(load_run(cfg.out))
        plot([cfg.out], cfg.out)


def main(argv=None):
    """Run the command line; returns the exit status."""
    try:
        run_command(parse(argv))
    except KeyboardInterrupt:
        print("interrupted; a run goes on from its last checkpoint with --resume", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print("cgap.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
