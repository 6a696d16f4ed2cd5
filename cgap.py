# SPDX-License-Identifier: MIT
"""The contrastive gap in one file: make it, measure it, close it.

CLIP trains an image encoder and a text encoder to map a picture and its caption to nearby points of one
sphere. Yet the pictures end up in one region of that sphere and the captions in another: a linear classifier
tells them apart without an error. "It's Not a Modality Gap: Characterizing and Addressing the Contrastive
Gap" (Fahim, Murphy, Fyshe, arXiv 2405.18570) shows that the contrastive loss itself makes this gap, and that
two more terms, uniformity and alignment, close it. This file lets you watch both on a laptop:

    python cgap.py                             # the CLIP loss: a gap stays
    python cgap.py --unif 1 --align 1          # two terms more: it closes
    python cgap.py --data path/to/coco         # the same on MS-COCO, or on your own pairs (a CSV file)

Each of the first two takes about a minute on two CPU cores, ends with a table of what changed and writes its
figures to runs/. `python cgap.py --help` lists every setting.

Read on from here: the loss, how a gap is measured, two small encoders, the data, the tasks that a shared space
is for, the training loop, the figures, the claims of the paper, the command line. From Python:

    from cgap import Config, train, gap_metrics
    history = train(Config(unif=1, align=1, steps=300))                # a run in runs/, and its metrics over time
    print(history[0]["linear_separability"], history[-1]["linear_separability"])
"""

import argparse
import csv
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

__version__ = "1.0"

# ============================================================================================================
# 1. The loss. Self-contained: copy all of it, down to section 2, into your own project.
#
# x_i and y_i are the embeddings of picture i and of its caption, unit vectors, N pairs in a batch.
#     CLIP   asks that x_i be more similar to its own y_i than to any other y_j, and the other way round;
#     align  asks that the two be close;   unif  asks that pictures be far from pictures, and texts from texts;
#     xunif  asks that pictures be far from the captions of others.
# The paper's losses are rows of weights: CLIP alone; CUA = CLIP + unif + align; CUAXU = CUA + xunif.
#
# Why does CLIP leave a gap? Its softmax sees cosines divided by the temperature T, here 0.01: a caption that leads
# the others by a cosine of 0.1 has won by a factor of e^10. So small differences in a small region are enough for a
# loss near 0. And an offset that all captions share adds the same to all of a picture's cosines and cancels in its
# softmax, and in the other one if it is orthogonal to the pictures: the loss does not see it. The other terms do.
# (Why a gap even opens where there was none, as it does with --init-gap remove, is still argued about: see the README,
# "Before and after this paper".)
# ============================================================================================================
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def gap_terms(x, y, T=0.01, t=2.0, block=None):
    """The terms of the loss, each a scalar tensor, from unit vectors x and y of shape (N, D).

    Returns a dict with `clip` (>= 0; log N if all cosines are equal, far more for an untrained model), `align` (0 to
    4), `unif_x`, `unif_y` and `xunif` (-4t to 0, lower is more spread). On unit vectors |a - b|^2 = 2 - 2 a.b, so all
    of them follow from three N x N cosine matrices. With `block`, only so many rows of those exist at a time (and are
    recomputed for the gradient): memory is that of `block` x N elements instead of N x N. Source: the paper's CUAXU
    loss; uniformity and alignment are due to Wang & Isola, arXiv 2005.10242.
    """
    N = len(x)

    def log_sum_exp(logits, dim):
        top = logits.detach().amax(dim, keepdim=True)                 # cancels out: it needs no gradient
        below = logits - top
        with torch.no_grad():  # e^-50 is as good as 0; e^-90 is a denormal number, with which a CPU is very slow
            below.clamp_(min=-50)
        return below.exp_().sum(dim).log() + top.squeeze(dim)

    def others(cos, i):  # sum of exp(-t |a - b|^2) over all but the matched pairs; cos: rows i, i+1, ... of a b^T
        exponents = 2 * t * cos - 2 * t
        with torch.no_grad():  # exp(-inf) is 0, and so is its gradient
            exponents.diagonal(i).fill_(-math.inf)
        return exponents.exp_().sum()

    def rows(x, y, i):
        xi, yi = x[i:i + (block or N)], y[i:i + (block or N)]
        xy = xi @ y.T                                                 # (rows, N) cosines
        logits = xy / T
        return (log_sum_exp(logits, 1), log_sum_exp(logits, 0), xy.diagonal(i).clone(),  # a view would keep all of xy
                others(xi @ x.T, i), others(yi @ y.T, i), others(xy, i))

    if block is None or block >= N:
        parts = [rows(x, y, 0)]
    else:
        parts = [checkpoint(rows, x, y, i, use_reentrant=False) for i in range(0, N, block)]
    over_texts, over_images, own, xx, yy, xy = zip(*parts)
    over_texts, own = torch.cat(over_texts), torch.cat(own)           # (N,) each
    over_images = torch.stack(over_images).logsumexp(0)               # sums over rows join as logs of sums
    xx, yy, xy = ((torch.stack(part).sum() / (N * (N - 1))).log() for part in (xx, yy, xy))
    return {
        "clip": ((over_texts + over_images) / 2 - own / T).mean(),    # 1/2 [CE(x y^T / T) + CE(y x^T / T)]
        "align": (2 - 2 * own).mean(),                                # mean_i |x_i - y_i|^2
        "unif_x": xx,                                                 # log mean_{i != j} exp(-t |x_i - x_j|^2)
        "unif_y": yy,                                                 # log mean_{i != j} exp(-t |y_i - y_j|^2)
        "xunif": xy,                                                  # log mean_{i != j} exp(-t |x_i - y_j|^2)
    }


def cgap_loss(x, y, temperature=0.01, unif=0.0, align=0.0, xunif=0.0, block=None):
    """CLIP + unif * uniformity + align * alignment + xunif * cross-modal uniformity.

    x, y: (N, D) raw embeddings, row i of x paired with row i of y; they are normalised here. `temperature` is a
    number or, to learn it, a scalar tensor. Returns the total (a scalar to minimise; it may well be negative, as
    uniformity is) and a dict of its un-weighted terms `clip`, `align`, `unif`, `xunif` to look at, detached: a term
    that is kept and not differentiated would keep its N x N matrix. Computed in float32 at least, under autocast too.
    `block`: rows at a time, see gap_terms: for N whose N x N matrices do not fit. Under data parallelism x and y must
    be those of all processes (Gather, in section 6, brings them with their gradients): the log of a mean is not the
    mean of the logs.
    Raises ValueError for shapes that differ, fewer than two pairs, and tensors that are not floating point.
    Source: the paper's L_CUA and L_CUAXU, whose weights are 1 and whose temperature is 0.01.
    """
    if x.shape != y.shape or x.ndim != 2:
        raise ValueError(f"x and y must have the same shape (N, D), not {tuple(x.shape)} and {tuple(y.shape)}")
    if len(x) < 2:
        raise ValueError("the loss compares a pair with others: it needs at least 2 pairs, not 1 or none")
    if not (x.is_floating_point() and y.is_floating_point()):
        raise ValueError(f"x and y must be floating point, not {x.dtype} and {y.dtype}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 rounds a cosine by .002: at T = 0.01 a logit by .2
        x, y = F.normalize(x.to(dtype), dim=1), F.normalize(y.to(dtype), dim=1)
        terms = gap_terms(x, y, temperature, block=block)
    terms["unif"] = (terms.pop("unif_x") + terms.pop("unif_y")) / 2
    total = terms["clip"]
    for name, weight in (("unif", unif), ("align", align), ("xunif", xunif)):
        if weight:  # so that a term without weight is not differentiated
            total = total + weight * terms[name]
    return total, {name: term.detach() for name, term in terms.items()}


# ============================================================================================================
# 2. Measuring the gap. One number does not do. Two clouds can share a centre and still be told apart by a
# classifier; two clouds that nobody can tell apart can still sit in a corner of the sphere (with alignment alone they
# do); and alignment can get worse while the gap closes, for in a corner pairs are close for free.
# ============================================================================================================
def fit_logistic(x, labels, C=1.0):
    """Weights (D,) and bias of the L2 logistic regression that scikit-learn fits by default: the minimum of
    |w|^2 / 2 + C sum_i log(1 + exp(-s_i (w . x_i + b))), s_i = +-1 for labels 1 and 0 (N,), x (N, D)."""
    with torch.inference_mode(False), torch.enable_grad():
        x, labels = torch.cat([x]), torch.cat([labels])               # copies: autograd takes no inference tensors
        w, b = x.new_zeros(x.shape[1]).requires_grad_(), x.new_zeros(()).requires_grad_()
        solver = torch.optim.LBFGS([w, b], max_iter=200, tolerance_change=1e-8, line_search_fn="strong_wolfe")

        def objective():
            solver.zero_grad()
            loss = w @ w / 2 + C * F.binary_cross_entropy_with_logits(x @ w + b, labels, reduction="sum")
            loss.backward()
            return loss

        solver.step(objective)
    return w.detach(), b.detach()


@torch.no_grad()
def gap_metrics(x, y):
    """All measures of the gap between two sets of paired embeddings (N, D), as a flat dict of floats.

    centroid_distance    |mean x - mean y|, 0 to 2: how far apart the two clouds are
    linear_separability  accuracy of a logistic regression that tells x from y, fit on 80 % of the pairs and
                         tested on the rest: 1 is a complete gap, 0.5 is none
    matched_cosine       mean x_i . y_i, -1 to 1
    alignment            mean |x_i - y_i|^2, 0 to 4
    uniformity_image, uniformity_text, cross_uniformity   the loss's terms, over all N: -8 to 0
    effective_rank_image, effective_rank_text             1 to D: exp of the entropy of the shares of variance on
                         the principal axes (after Roy & Vetterli 2007): how many dimensions are in use
    Embeddings are normalised first. Raises ValueError as cgap_loss does, for fewer than 5 pairs, and for values that
    are not finite. Leaves the global random state alone. Source of the first two: the paper and the authors' code.
    """
    if x.shape != y.shape or x.ndim != 2 or len(x) < 5:
        raise ValueError(f"x and y must share a shape (N, D), N at least 5, not {tuple(x.shape)} and {tuple(y.shape)}")
    if not (x.is_floating_point() and y.is_floating_point() and torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError(f"x and y must be finite and floating point; they are {x.dtype} and {y.dtype}")
    x, y = (F.normalize(z.detach().cpu().double(), dim=1) for z in (x, y))     # on the CPU: MPS has no float64
    N = len(x)
    terms = gap_terms(x.float(), y.float(), block=2048)

    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    train, test = order[:int(0.8 * N)], order[int(0.8 * N):]          # by pair: both halves of a pair on one side
    w, b = fit_logistic(torch.cat([x[train], y[train]]), torch.arange(2.).repeat_interleave(len(train)).double())
    correct = torch.cat([x[test] @ w + b <= 0, y[test] @ w + b > 0])

    def effective_rank(z):
        share = torch.linalg.eigvalsh(torch.cov(z.T)).clamp(min=0)
        share = share / share.sum().clamp(min=1e-30)
        return torch.special.entr(share).sum().exp()

    return {name: float(value) for name, value in {
        "centroid_distance": (x.mean(0) - y.mean(0)).norm(),
        "linear_separability": correct.double().mean(),
        "matched_cosine": (x * y).sum(1).mean(),
        "alignment": terms["align"],
        "uniformity_image": terms["unif_x"],
        "uniformity_text": terms["unif_y"],
        "cross_uniformity": terms["xunif"],
        "effective_rank_image": effective_rank(x),
        "effective_rank_text": effective_rank(y),
    }.items()}


def uniform_optimum(d, t=2.0):
    """Uniformity of the uniform distribution on the sphere in d dimensions, the least that `unif` can reach with many
    points: -2t + log 0F1(; d/2; t^2) (for t = 2: -2.080 at d = 3, -3.938 at d = 128). A few can do better: N points
    equally far from each other, which takes d >= N - 1, have -2t N / (N - 1)."""
    term = total = 1.0
    for k in range(1, 60):
        term *= t * t / ((d / 2 + k - 1) * k)
        total += term
    return math.log(total) - 2 * t


# ============================================================================================================
# 3. Two small encoders. Neither looks at the rest of its batch (GroupNorm and LayerNorm, no BatchNorm), so an
# embedding is a function of its picture or caption alone, and the only place where samples meet is the loss.
# From here on cfg is a Config, all settings of a run, and hw a Hardware, its device and precision. Both, and `save`,
# are in section 6.
# ============================================================================================================
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

STRIDE = 8  # of the image encoder in all: image sizes are multiples of it


class ImageEncoder(nn.Module):
    """A convolutional network: uint8 images (B, 3, S, S), S a multiple of 8, to embeddings (B, dim)."""

    def __init__(self, dim, width=32):
        super().__init__()

        def stage(c_in, c_out, stride):
            return nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.GroupNorm(8, c_out), nn.GELU()

        self.body = nn.Sequential(
            *stage(3, width, 2), *stage(width, 2 * width, 2), *stage(2 * width, 4 * width, 2),
            *stage(4 * width, 4 * width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projection = nn.Linear(4 * width, dim)

    def forward(self, images):
        return self.projection(self.body(images.float() / 64 - 2))    # pixels to about -2 .. 2


class TextEncoder(nn.Module):
    """A transformer: tokens (B, L), 0 for padding, L up to `context`, to embeddings (B, dim)."""

    def __init__(self, dim, vocab, context, width=128, layers=1, heads=4):
        super().__init__()
        self.token = nn.Embedding(vocab, width, padding_idx=0)
        self.position = nn.Parameter(torch.randn(context, width))     # as large as the words: order matters here
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.projection = nn.Linear(width, dim)

    def forward(self, tokens):
        word = tokens != 0                                            # (B, L)
        h = self.token(tokens) + self.position[:tokens.shape[1]]      # (B, L, width)
        h = self.body(h, src_key_padding_mask=~word)
        word = word[..., None].to(h.dtype)
        return self.projection((h * word).sum(1) / word.sum(1))       # mean over the words


class TwoEncoders(nn.Module):
    """An image encoder, a second encoder for texts (or, `same_modality`, for the same images), a temperature."""

    def __init__(self, cfg, vocab):
        super().__init__()
        self.image = ImageEncoder(cfg.dim)
        self.text = ImageEncoder(cfg.dim) if cfg.same_modality else TextEncoder(cfg.dim, vocab, cfg.context)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(cfg.temperature)), requires_grad=cfg.learn_temperature)

    def forward(self, images, texts):
        return self.image(images), self.text(texts), self.temperature()

    def temperature(self):
        """T as a scalar tensor. What is learned is log(1/T): it moves by factors, and T stays above 0."""
        return torch.exp(-self.log_scale)

    def limit_temperature(self):
        """Keep a learned T at 0.01 or above, as OpenAI's CLIP does. To be called after each step: limiting the
        parameter rather than its use leaves it a gradient. A frozen temperature stays as it was given."""
        if self.log_scale.requires_grad:
            self.log_scale.data.clamp_(max=math.log(100))


def encode(encoder, inputs, hw, size=256):
    """Raw embeddings (N, dim), float32 and without gradient, of inputs on any device, in slices of `size`."""
    with torch.no_grad(), hw.autocast:
        return torch.cat([encoder(part.to(hw.device)).float() for part in inputs.split(size)])


def remove_initial_gap(model, images, texts, hw):
    """Fit the projection of the second encoder, in place, so that its cloud lies on the first one's: the centroid and
    the spread become equal, and the orthogonal R minimises |(y - mean y) R - (x - mean x)| (Procrustes), as in the
    paper's idealised start. images, texts: the pairs to do it on. Embeddings are normalised afterwards, and a wider
    cloud around the same centroid then has a shorter mean: hence the scale, which the paper does not mention."""
    x, y = (encode(*z, hw).double().cpu() for z in ((model.image, images), (model.text, texts)))
    x_mean, y_mean, layer = x.mean(0), y.mean(0), model.text.projection
    u, _, vt = torch.linalg.svd((y - y_mean).T @ (x - x_mean))
    # y = W h + b becomes scale R^T (y - mean y) + mean x
    R, scale = u @ vt, (x - x_mean).norm() / (y - y_mean).norm()
    layer.weight.data.copy_(scale * R.T @ layer.weight.data.double().cpu())
    layer.bias.data.copy_(scale * R.T @ (layer.bias.data.double().cpu() - y_mean) + x_mean)


# ============================================================================================================
# 4. The data: three sources, one form. Everything is a tensor before training starts, and a batch is a slice.
# ============================================================================================================
class Problem(Exception):
    """Something that the user can mend; the command line prints it as one line and exits with status 2."""


@dataclass
class Pairs:
    """Images with one caption or more each, or (tokens None) each paired with itself."""
    images: torch.Tensor   # (N, 3, S, S) uint8
    tokens: torch.Tensor   # (M, L) int32, M captions padded with 0, or None
    first: torch.Tensor    # (N + 1,): the captions of image i are the rows first[i] to first[i + 1] - 1

    def __len__(self):
        return len(self.images)

    def pairs(self, i, dice=0):
        """(images, tokens) of the images i (B,), each with its first caption, or with the one that the dice (B,),
        random integers, choose."""
        images = self.images[i.to(self.images.device)]
        if self.tokens is None:
            return images, images
        return images, self.tokens[self.first[i] + dice % (self.first[i + 1] - self.first[i])]


Data = namedtuple("Data", "train val vocab zero_shot arithmetic")     # Pairs, Pairs, words, and two tasks or None:
ZeroShot = namedtuple("ZeroShot", "images labels prompts unseen")     # unseen (classes,): never occur in training
Arithmetic = namedtuple("Arithmetic", "images query old new correct")  # correct (queries, images): right answers


def split_words(text):
    """Lower case, words and single punctuation marks: "A dog's bowl." -> [a, dog, ', s, bowl, .]"""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def make_vocab(captions, size):
    """The `size` most frequent words of the captions, sorted, after padding (0) and unknown (1)."""
    counts = Counter(itertools.chain.from_iterable(map(split_words, captions)))
    return ["<pad>", "<unk>"] + sorted(word for word, _ in counts.most_common(size))


def tokenize(captions, vocab, context):
    """Token numbers (len(captions), L), int32, cut at `context` words; L is what the longest caption needs."""
    number = {word: i for i, word in enumerate(vocab)}
    rows = [torch.tensor([number.get(word, 1) for word in split_words(text)[:context]], dtype=torch.int32)
            for text in captions]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


# ---- scenes: one or two coloured shapes; a caption says exactly what is there, so the pairs are perfect ----
COLOURS = {"red": (.85, .10, .10), "green": (.10, .65, .15), "blue": (.15, .25, .90), "yellow": (.95, .90, .15),
           "purple": (.60, .15, .75), "cyan": (.15, .85, .90), "white": (1., 1., 1.), "black": (0., 0., 0.)}
SHAPES = {  # inside or not, for coordinates u to the right and v down, -1 to 1 across the shape
    "circle": lambda u, v: u * u + v * v < 1,
    "square": lambda u, v: (u.abs() < .85) & (v.abs() < .85),
    "triangle": lambda u, v: (v < .85) & (2 * u.abs() - v < 1),
    "diamond": lambda u, v: 1.5 * u.abs() + v.abs() < 1.1,
    "cross": lambda u, v: (torch.minimum(u.abs(), v.abs()) < .3) & (torch.maximum(u.abs(), v.abs()) < 1),
    "ring": lambda u, v: (u * u + v * v - .72).abs() < .28}
RELATIONS = "left of", "above"  # two suffice: with "right of" as well, one scene would have two captions


def describe(scenes):
    """Captions of scenes (N, 5): colour, shape, colour, shape, relation (-1: the first object alone)."""
    colours, shapes = list(COLOURS), list(SHAPES)
    return [f"a {colours[c]} {shapes[s]}" + (f" {RELATIONS[r]} a {colours[c2]} {shapes[s2]}" if r >= 0 else "")
            for c, s, c2, s2, r in scenes.tolist()]


def unseen(colour, shape):
    """Which combinations never occur in training, one for each colour: the zero-shot classes."""
    return colour % len(SHAPES) == shape


def random_scenes(n, single, g):
    """n scenes (n, 5) without unseen combinations, a share `single` of them with one object."""
    sides = torch.tensor([len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES), len(RELATIONS)])
    scenes = (torch.rand(n, 5, generator=g) * sides).long()
    for c, s in ((0, 1), (2, 3)):  # an unseen combination takes one of the other shapes
        other = (scenes[:, s] + 1 + torch.randint(len(SHAPES) - 1, (n,), generator=g)) % len(SHAPES)
        scenes[:, s] = torch.where(unseen(scenes[:, c], scenes[:, s]), other, scenes[:, s])
    scenes[torch.rand(n, generator=g) < single, 4] = -1
    return scenes


def draw_scenes(scenes, size, g):
    """Images (N, 3, size, size), uint8, with jitter in place, size and colour, a random grey behind, and noise."""
    def around(centre, jitter, *shape):
        return centre + jitter * (2 * torch.rand(*shape, generator=g) - 1)

    palette, axis = torch.tensor(list(COLOURS.values())), (torch.arange(size) + .5) / size
    images = torch.empty(len(scenes), 3, size, size, dtype=torch.uint8)
    for part, out in zip(scenes.split(512), images.split(512)):       # small enough to stay in the cache
        n, two, beside = len(part), part[:, 4] >= 0, part[:, 4:] == 0
        along = torch.stack([around(.25, .04, n), around(.75, .04, n)], 1)      # the first object left or above
        across = around(.5, .15, n, 2)
        cx, cy = torch.where(beside, along, across), torch.where(beside, across, along)
        cx, cy = (torch.where(two[:, None], c, around(.5, .2, n, 1)) for c in (cx, cy))
        radius, image = around(.2, .03, n, 2), around(.5, .15, n, 1, 1, 1).repeat(1, 3, size, size)
        for k in 0, 1:
            colour = palette[part[:, 2 * k]] + .08 * torch.randn(n, 3, generator=g)
            for shape, inside in enumerate(SHAPES.values()):
                i = ((part[:, 2 * k + 1] == shape) & (two | (k == 0))).nonzero()[:, 0]
                u, v = ((axis - c[i, k, None]) / radius[i, k, None] for c in (cx, cy))
                mask = inside(u[:, None, :], v[:, :, None])[:, None]            # (n, 1, size, size)
                image[i] = torch.where(mask, colour[i][:, :, None, None], image[i])
        image += .05 * torch.randn(image.shape, generator=g)
        out.copy_(image.mul_(255).clamp_(0, 255))
    return images


def scene_classes(size, vocab, context, g, per_class=20):
    """The zero-shot task: single objects in all combinations of colour and shape, prompts "a red circle"."""
    classes = torch.cartesian_prod(torch.arange(len(COLOURS)), torch.arange(len(SHAPES)))
    scenes = F.pad(classes, (0, 3))
    scenes[:, 4] = -1
    labels = torch.arange(len(classes)).repeat(per_class)
    return ZeroShot(draw_scenes(scenes[labels], size, g), labels, tokenize(describe(scenes), vocab, context),
                    unseen(classes[:, 0], classes[:, 1]))


def scene_edits(size, vocab, context, g, queries=200):
    """The arithmetic task: picture + text(new word) - text(old word) should find the picture of the edited scene,
    in a pool of all queries, all edited scenes, and for each of those three that differ in one attribute."""
    options = [list(COLOURS), list(SHAPES), list(COLOURS), list(SHAPES), list(RELATIONS)]
    sides = torch.tensor([len(words) for words in options])

    def change(scenes, slot):  # another value in that slot of each scene
        scenes, row = scenes.clone(), torch.arange(len(scenes))
        step = 1 + (torch.rand(len(scenes), generator=g) * (sides[slot] - 1)).long()
        scenes[row, slot] = (scenes[row, slot] + step) % sides[slot]
        return scenes

    source = random_scenes(8 * queries, 0.0, g)
    slot = torch.randint(5, (len(source),), generator=g)
    target = change(source, slot)
    clear = (source[:, :2] != source[:, 2:4]).all(1)                  # a word then names one object, not both
    known = ~unseen(target[:, 0], target[:, 1]) & ~unseen(target[:, 2], target[:, 3])
    source, target, slot = (z[clear & known][:queries] for z in (source, target, slot))
    near = [change(target, torch.full_like(slot, k)) for k in torch.randperm(5, generator=g)[:3]]
    pool = torch.cat([source, target, *near])
    words = [[options[k][scene[k]] for scene, k in zip(scenes.tolist(), slot.tolist())] for scenes in (source, target)]
    return Arithmetic(draw_scenes(pool, size, g), torch.arange(len(source)),
                      *(tokenize(w, vocab, context) for w in words), (target[:, None] == pool).all(2))


def scene_data(cfg):
    """20,000 training and 2,000 validation scenes with both tasks; the same seed gives the same bytes."""
    g, size = torch.Generator().manual_seed(cfg.seed), cfg.image_size or 32
    n, held_out = min(20_000, cfg.limit or 20_000), min(2_000, cfg.limit or 2_000)
    scenes = random_scenes(n + held_out, cfg.single, g)
    captions = describe(scenes)
    vocab = make_vocab(captions[:n], cfg.vocab)
    tokens, images = tokenize(captions, vocab, cfg.context), draw_scenes(scenes, size, g)
    train, val = (Pairs(images[part], tokens[part], torch.arange(len(images[part]) + 1))
                  for part in (slice(n), slice(n, None)))
    return Data(train, val, vocab, scene_classes(size, vocab, cfg.context, g), scene_edits(size, vocab, cfg.context, g))


# ---- photographs: MS-COCO, or a CSV file of one's own; decoded once into a file that later runs map ----
def read_coco(folder):
    """[(image path, [captions])] for training and, or None, for validation, from COCO's 2014 or 2017 layout."""
    splits = []
    for split in "train", "val":
        files = sorted((folder / "annotations").glob(f"captions_{split}20[0-9][0-9].json"))
        if not files:
            splits.append(None)
            continue
        try:
            content, images = json.loads(files[-1].read_bytes()), folder / files[-1].stem.removeprefix("captions_")
            captions = {image["id"]: (images / image["file_name"], []) for image in content["images"]}
            for path, _ in captions.values():
                if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(images)):
                    raise Problem(f"{files[-1]}: {path} is outside of {images}")
            for note in content["annotations"]:
                captions[note["image_id"]][1].append(note["caption"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Problem(f"{files[-1]} is not a COCO caption file ({type(error).__name__}: {error})") from None
        splits.append([pair for pair in captions.values() if pair[1]])
    if splits[0] is None:
        raise Problem(f"{folder} has no annotations/captions_train20xx.json: give COCO's own folder, or a CSV file")
    return splits


def read_csv(file):
    """The same from a CSV file with the header image,caption; rows with the same image are its captions."""
    captions = {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines)
            if not {"image", "caption"} <= set(rows.fieldnames or ()):
                raise Problem(f"{file} needs the header image,caption; its first line has {rows.fieldnames}")
            for row in rows:
                if not row["image"]:
                    raise Problem(f"{file}, line {rows.line_num}: a row without an image")
                captions.setdefault(row["image"], []).append(row["caption"])
    except (UnicodeDecodeError, csv.Error) as error:
        raise Problem(f"{file} is not a CSV file in UTF-8 ({error})") from None
    return [(file.parent / image, texts) for image, texts in captions.items()], None


def load_photo(path, size):
    """The image as people see it (upright, its first frame, on white where it is transparent), scaled and
    centre-cropped: a (3, size, size) uint8 tensor. Raises OSError where it cannot be read."""
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as image:
            image.draft(None, (2 * size, 2 * size))  # decodes a JPEG no larger than this needs
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel
                image = image.point(lambda value: value / 256).convert("L")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except Exception as error:  # a broken file may raise anything: struct.error from EXIF, a bomb's own error, ...
        raise OSError(f"{path} ({getattr(error, 'strerror', None) or str(error) or type(error).__name__})") from None
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def photo_data(cfg):
    """Photographs with their captions, from the cache if these very data are there, else decoded into it."""
    source, size = Path(cfg.data), cfg.image_size or 64
    if not source.exists():
        raise Problem(f"--data {source}: no such folder or file (a COCO folder, a CSV file, or `synthetic`)")
    inputs = [source, *sorted(source.glob("*20[0-9][0-9]")), *sorted(source.glob("annotations/*"))]
    # The settings name the file; the key in it, with the state of the data, tells whether it is still good.
    settings = [__version__, str(source.resolve()), size, cfg.vocab, cfg.context, cfg.limit]
    key = json.dumps(settings + [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in inputs])
    folder = Path(cfg.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cgap")
    cache = folder / f"{source.stem}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}.pt"
    content = None
    if cache.exists():
        try:
            found = torch.load(cache, weights_only=True, mmap=True)
            mended = [path for path in map(Path, found["faults"]) if path.exists()
                      and max(path.stat().st_mtime, path.stat().st_ctime) > cache.stat().st_mtime]
            content = found if found["key"] == key and not mended else None
        except Exception:  # torch.load has many ways to dislike a file, and the answer to all is the same
            pass
        if content is None:
            print(f"{cache} is broken, or the data have changed: it is made anew")
    if content is None:
        build_cache(cache, key, *(read_coco if source.is_dir() else read_csv)(source), cfg, size)
        content = torch.load(cache, weights_only=True, mmap=True)
    if content["faults"]:
        faults = list(content["faults"].values())
        print(f"warning: {len(faults)} images are left out: {', '.join(faults[:20])}", file=sys.stderr)
    images, tokens, first, n, vocab = (content[name] for name in ("images", "tokens", "first", "train", "vocab"))
    return Data(Pairs(images[:n], tokens, first[:n + 1]), Pairs(images[n:], tokens, first[n:]), vocab,
                folder_classes(cfg, size, vocab) if cfg.zero_shot else None, None)


def build_cache(cache, key, train, val, cfg, size):
    """Decode the images of both splits and number the words of their captions, into one file."""
    if val is None:  # hold out a tenth
        train, val = [pair for i, pair in enumerate(train) if i % 10], train[::10]
    train, val = (part[:cfg.limit or None] for part in (train, val))
    pairs = train + val
    if not pairs:
        raise Problem(f"{cfg.data} has no images with captions")
    for path, texts in pairs:
        for text in texts:
            if not isinstance(text, str) or not split_words(text):
                raise Problem(f"{cfg.data}: {path} has a caption without words: {text!r}")
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent, ignore_cleanup_errors=True) as folder:
        # Mapped from the disk, as all of them may not fit into memory; the name can go at once, the mapping stays.
        with open(f"{folder}/images", "wb") as file:  # written, not sparse: a full disk is an error here, not a crash
            for _ in pairs:
                file.write(bytes(3 * size * size))
        images = torch.from_file(f"{folder}/images", shared=True, size=len(pairs) * 3 * size * size, dtype=torch.uint8)
    images = images.view(-1, 3, size, size)

    def decode(i):
        try:
            images[i] = load_photo(pairs[i][0], size)
        except OSError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads do: Pillow decodes without the GIL
        faults = list(tqdm(pool.map(decode, range(len(pairs))), "decoding", len(pairs), unit="image"))
    good = [i for i, fault in enumerate(faults) if not fault]
    faults = {str(path): fault for (path, _), fault in zip(pairs, faults) if fault}
    if len(faults) > len(pairs) / 10:
        raise Problem(f"{len(faults)} of {len(pairs)} images cannot be read, the first: "
                      + ", ".join(list(faults.values())[:3]))
    for to, i in enumerate(good):
        if to < i:
            images[to] = images[i]
    captions, n = [pairs[i][1] for i in good], sum(i < len(train) for i in good)
    vocab = make_vocab(itertools.chain.from_iterable(captions[:n]), cfg.vocab)
    save({"key": key, "images": images[:len(good)], "train": n, "faults": faults, "vocab": vocab,
          "tokens": tokenize(list(itertools.chain.from_iterable(captions)), vocab, cfg.context),
          "first": torch.tensor([0] + [len(texts) for texts in captions]).cumsum(0)}, cache)


def folder_classes(cfg, size, vocab):
    """The zero-shot task from a folder of images per class; prompts "a photo of a <folder name>"."""
    from torchvision.datasets import ImageFolder
    try:
        folder = ImageFolder(cfg.zero_shot, loader=lambda path: load_photo(path, size))
        photos, labels = zip(*folder)
    except OSError as error:
        raise Problem(f"--zero-shot {cfg.zero_shot}: {error}") from None
    prompts = [f"a photo of a {name.replace('_', ' ')}" for name in folder.classes]
    return ZeroShot(torch.stack(photos), torch.tensor(labels), tokenize(prompts, vocab, cfg.context), None)


def load_data(cfg):
    """The Data that cfg.data names, on the CPU. Raises Problem where it cannot be used."""
    data = scene_data(cfg) if cfg.data == "synthetic" else photo_data(cfg)
    if len(data.train) < cfg.batch:
        raise Problem(f"--batch {cfg.batch} is more than the {len(data.train)} training images")
    if len(data.val) < 5:
        raise Problem(f"{len(data.val)} validation images are too few to measure a gap: at least 5")
    if cfg.same_modality:
        data.train.tokens = data.val.tokens = None
        return data._replace(zero_shot=None, arithmetic=None)
    return data


def batches(n, size, seed, start=0):
    """From step `start` on, without end: `size` of the n indices, each at most once an epoch, and as many dice. A
    function of seed and step alone: a resumed run, or another process, needs no random state to go on."""
    for step in itertools.count(start):
        epoch, k = divmod(step, n // size)
        if k == 0 or step == start:  # a new epoch, or the middle of one
            g = torch.Generator().manual_seed(1_000_003 * seed + epoch)
            order, dice = torch.randperm(n, generator=g), torch.randint(2 ** 31, (n,), generator=g)
        yield order[k * size:(k + 1) * size], dice[k * size:(k + 1) * size]


# ============================================================================================================
# 5. What a shared space is for: finding the caption of a picture, naming what was never seen, and arithmetic.
# x and y are unit vectors throughout.
# ============================================================================================================
def recall(x, y, group):
    """How often the nearest of y to x_i (and one of the nearest five) has x_i's group, (N,) integers: R@1 and
    R@5, over all N at once. Pairs with identical captions share a group, since no model can tell them apart."""
    nearest = torch.cat([(part @ y.T).topk(min(5, len(y))).indices for part in x.split(1024)])      # (N, 5)
    right = group[nearest] == group[:, None]
    return right[:, 0].float().mean().item(), right.any(1).float().mean().item()


def evaluate(model, data, cfg, hw):
    """Everything that is measured, as a flat dict of floats: the loss and its terms (on up to four batches of the
    training data, the same each time), the gap and retrieval on the validation pairs, and the data's tasks."""
    def images(x):
        return F.normalize(encode(model.image, x, hw), dim=1)

    def texts(x):
        return F.normalize(encode(model.text, x, hw), dim=1)

    def embeddings(part, n):
        inputs = part.pairs(torch.arange(min(n, len(part))))
        return images(inputs[0]), texts(inputs[1]), inputs[1]

    x, y, _ = embeddings(data.train, min(4, len(data.train) // cfg.batch) * cfg.batch)
    losses = [cgap_loss(*xy, model.temperature().detach(), cfg.unif, cfg.align, cfg.xunif)
              for xy in zip(x.split(cfg.batch), y.split(cfg.batch))]
    record = {"loss": sum(total.item() for total, _ in losses) / len(losses)}
    record |= {name: sum(terms[name].item() for _, terms in losses) / len(losses) for name in losses[0][1]}

    x, y, inputs = embeddings(data.val, len(data.val))
    group = torch.unique(inputs.flatten(1), dim=0, return_inverse=True)[1].to(hw.device)
    record |= gap_metrics(x, y)
    record |= dict(zip(("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5"), (*recall(x, y, group), *recall(y, x, group))))
    if data.zero_shot:
        task = data.zero_shot
        right = ((images(task.images) @ texts(task.prompts).T).argmax(1).cpu() == task.labels).float()
        record["zero_shot"] = right.mean().item()
        if task.unseen is not None:
            record["zero_shot_unseen"] = right[task.unseen[task.labels]].mean().item()
    if data.arithmetic:
        task = data.arithmetic
        pool, query = images(task.images), task.query.to(hw.device)
        scores = (pool[query] + texts(task.new) - texts(task.old)) @ pool.T     # the texts weigh 1
        scores[query, query] = -math.inf                              # the query itself is no answer
        record["arithmetic"] = task.correct[query.cpu(), scores.argmax(1).cpu()].float().mean().item()
    return record | {"temperature": model.temperature().item()}


def snapshot(model, part, hw, n=256):
    """Unit embeddings (2, n, D) of the first pairs, for the figures; in half precision, as they are kept."""
    x, y = part.pairs(torch.arange(min(n, len(part))))
    return F.normalize(torch.stack([encode(model.image, x, hw), encode(model.text, y, hw)]), dim=2).half().cpu()


def chance(data):
    """What chance depends on: the numbers of validation pairs, of captions (that of as many equally frequent ones with
    the same chance that two pairs have the same), of zero-shot classes, and of images in the pool."""
    n = len(data.val)
    equal = torch.unique(data.val.pairs(torch.arange(n))[1].flatten(1), dim=0, return_counts=True)[1].double()
    return (n, n * n / equal.square().sum().item(), len(data.zero_shot.prompts) if data.zero_shot else 1,
            len(data.arithmetic.images) if data.arithmetic else 1)


def references(d, align, n, captions, classes, pool):
    """What to compare a metric with: {name: (its ideal, what it is without a gap or by chance)}, as strings."""
    best = f"{uniform_optimum(d):.3f}"
    return {
        "centroid_distance": ("0", f"{math.sqrt(align / n):.3f} is noise"),
        "linear_separability": ("0.5", f"0.5 +- {0.5 / math.sqrt(0.4 * n):.3f}"),
        "matched_cosine": ("1", "0 if unrelated"),
        "alignment": ("0", "2 if unrelated"),
        "uniformity_image": (best, "0 if all are one point"), "uniformity_text": (best, ""),
        "cross_uniformity": (best, ""),
        "effective_rank_image": (str(d), "1 if on a line"), "effective_rank_text": (str(d), ""),
        **{f"{way}_r{k}": ("1", f"{k / captions:.4f} by chance") for way in ("i2t", "t2i") for k in (1, 5)},
        **{name: ("1", f"{1 / classes:.3f} by chance") for name in ("zero_shot", "zero_shot_unseen")},
        "arithmetic": ("1", f"{1 / pool:.3f} by chance"),
    }


# ============================================================================================================
# 6. Training. A run owns a folder: config.json, metrics.jsonl (a line for each evaluation), checkpoint.pt, figures.
# ============================================================================================================
def flag(default, text):
    """A field of Config: its default and the help of its flag."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """All settings of a run, and the source of the command line's flags and their help."""
    unif: float = flag(0.0, "weight of uniformity; the paper's CUA is --unif 1 --align 1")
    align: float = flag(0.0, "weight of alignment")
    xunif: float = flag(0.0, "weight of cross-modal uniformity; CUAXU is all three at 1")
    temperature: float = flag(0.01, "temperature T of the CLIP loss; where it starts, if it is learned")
    learn_temperature: bool = flag(False, "learn T, at 0.01 or above")
    data: str = flag("synthetic", "`synthetic`, an MS-COCO folder, or a CSV file with the header image,caption")
    limit: int = flag(0, "use at most so many training, and validation, images; 0 for all")
    single: float = flag(0.1, "share of scenes with a single object")
    image_size: int = flag(0, "side of the images, a multiple of 8; 0 for 32 (scenes) or 64 (photographs)")
    cache: str = flag("", "folder for decoded photographs; else cgap/ in the user's cache folder")
    vocab: int = flag(10_000, "size of the vocabulary, the most frequent words of the training captions")
    context: int = flag(32, "words in a caption; longer ones are cut")
    zero_shot: str = flag("", "with photographs: a folder of images per class, to classify without training")
    dim: int = flag(128, "dimension of the shared space")
    same_modality: bool = flag(False, "a second image encoder, on the same images, in place of the text encoder")
    init_gap: str = flag("keep", "`keep` the gap between the untrained encoders, or `remove` it before training")
    init: str = flag("", "folder of a run whose weights to start from")
    fresh_projection: bool = flag(False, "with --init: new projections on the encoders")
    steps: int = flag(1500, "training steps")
    batch: int = flag(64, "pairs in a batch, over all processes")
    lr: float = flag(1e-3, "peak learning rate, between a warm-up over a tenth of the steps and a cosine to 0")
    weight_decay: float = flag(0.1, "AdamW's, on matrices")
    seed: int = flag(0, "seed of the scenes, the weights and the batches")
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps; auto is the first there is of cuda, mps, cpu")
    compile: bool = flag(False, "torch.compile the encoders and the loss")
    eval_every: int = flag(250, "steps between evaluations")
    checkpoint_every: int = flag(250, "steps between checkpoints")
    out: str = flag("", "folder of the run, which must not exist; else runs/<time>-<name>")

    def check(self):
        """Raise Problem for the first setting that cannot work; return self."""
        for f in fields(self):
            value, name = getattr(self, f.name), "--" + f.name.replace("_", "-")
            if not isinstance(value, (int, float) if f.type is float else f.type):
                raise Problem(f"{name} takes a value of type {f.type.__name__}, not {value!r}")
            if f.type in (int, float) and not 0 <= value < math.inf:
                raise Problem(f"{name} must be a finite number and not negative, but is {value}")
            if f.name == "single" and value > 1:
                raise Problem(f"{name} is a share, 0 to 1, not {value}")
            if f.name in "temperature lr steps dim vocab context eval_every checkpoint_every".split() and value == 0:
                raise Problem(f"{name} must be above 0")
        for bad, text in (
                (self.batch < 2, f"--batch {self.batch}: the loss compares pairs, so a batch has at least 2"),
                (self.dim < 2, f"--dim {self.dim}: a sphere needs at least 2 dimensions"),
                (self.seed >= 2 ** 32, f"--seed {self.seed} is not below 2 ** 32"),
                (self.image_size % STRIDE, f"--image-size {self.image_size} is not a multiple of {STRIDE}"),
                (self.init_gap not in ("keep", "remove"), f"--init-gap is `keep` or `remove`, not `{self.init_gap}`"),
                (self.learn_temperature and self.temperature < 0.01, "--learn-temperature needs a --temperature of "
                 "0.01 or above to start from"),
                (self.zero_shot and self.data == "synthetic", "--zero-shot DIR is for photographs (--data)"),
                (self.fresh_projection and not self.init, "--fresh-projection is for --init RUN, which is missing")):
            if bad:
                raise Problem(text)
        return self

    def folder(self):
        """The folder of the run, named after the time and the loss if it has no name yet."""
        return Path(self.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{self.name()}")

    def name(self):
        """The loss in short, for folders and legends."""
        weights = self.unif, self.align, self.xunif
        return {(0, 0, 0): "CLIP", (1, 1, 0): "CUA", (1, 1, 1): "CUAXU"}.get(weights) or "CLIP" + "".join(
            f"+{w:g}{term}" for w, term in zip(weights, ("unif", "align", "xunif")) if w)


Hardware = namedtuple("Hardware", "device autocast scaler rank world")


def hardware(cfg):
    """The one place that knows devices and processes. rank: this process's number of `world`, as torchrun says."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("LOCAL_RANK", "0")
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = f"cuda:{local}" if name == "cuda" else name
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or colon and (kind != "cuda" or not index.isdecimal()):
        raise Problem(f"--device {cfg.device} is not one of auto, cpu, cuda, cuda:N, mps")
    if kind == "cuda" and (not torch.cuda.is_available() or int(index) >= torch.cuda.device_count()):
        raise Problem(f"--device {cfg.device}: PyTorch sees {torch.cuda.device_count()} CUDA devices; try --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise Problem("--device mps: PyTorch sees no Apple GPU; try --device cpu")
    if cfg.batch % world:
        raise Problem(f"--batch {cfg.batch} cannot be split evenly over {world} processes")
    half = torch.bfloat16
    if kind == "cuda":
        torch.cuda.set_device(name)
        torch.set_float32_matmul_precision("high")  # TF32 rounds factors, not sums: at T = 0.01 a logit by about 0.01
        half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Hardware(torch.device(name), torch.autocast(kind, half, enabled=kind == "cuda"),
                    torch.amp.GradScaler(kind, enabled=half == torch.float16),
                    dist.get_rank() if world > 1 else 0, world)


class Gather(torch.autograd.Function):
    """The rows (n, D) of each process to those of all (world * n, D), with their gradients. Every process then has
    the whole loss, and differentiates it: DDP's mean over the processes undoes the sum in `backward`."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def any_process(flag, hw):
    """Whether the flag is set in any process: they must stop at the same step, or would wait for each other."""
    if hw.world == 1:
        return bool(flag)
    total = torch.tensor(float(bool(flag)), device=hw.device)
    dist.all_reduce(total)
    return bool(total)


def save(content, path):
    """torch.save, with a whole file under that name at every instant. Raises Problem if it cannot be written."""
    draft = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise Problem(f"{path} cannot be written; is the disk full? ({str(error)[:80]})") from None
    finally:
        draft.unlink(missing_ok=True)


Run = namedtuple("Run", "cfg history saved")
CHECKPOINT = "version config vocab step seconds model optimizer scaler history frames samples chance".split()


def load_run(folder):
    """The Run in a folder: its Config, its history, and all of its checkpoint. Raises Problem if there is none."""
    path = Path(folder) / "checkpoint.pt"
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        if saved["version"] == __version__ and saved.keys() >= set(CHECKPOINT):
            return Run(Config(**saved["config"]), saved["history"], saved)
        problem = f"{path} was written by version {saved['version']} of cgap, not {__version__}, or lacks a part"
    except FileNotFoundError:
        problem = f"{folder} holds no checkpoint.pt: not a run, or one that ended before its first"
    except Exception as error:  # whatever a broken or a foreign file may raise
        problem = f"{path} is broken, or not a checkpoint of cgap ({type(error).__name__})"
    raise Problem(problem)


def start_from(folder, model, vocab, fresh_projection):
    """Copy a run's weights into the model, except its temperature and, if they are to be fresh, the projections."""
    saved = load_run(folder).saved
    if saved["vocab"] != vocab:
        raise Problem(f"--init {folder} was trained on other words than these data have")
    weights = {name: weight for name, weight in saved["model"].items()
               if name != "log_scale" and not (fresh_projection and "projection" in name)}
    try:
        fits = not model.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError:
        fits = False
    if not fits:
        raise Problem(f"--init {folder} has encoders of another shape: --dim, --context, --same-modality")


class Interrupted(Exception):
    """Raised by train after a signal (`number`), once the checkpoint is written."""

    def __init__(self, number):
        self.number = number


def train(cfg, resume=False, quiet=False):
    """Train on cfg, evaluate, and keep everything in the folder cfg.out; `resume` continues the run that is there.

    Returns the history: a dict for each evaluation with `step`, `loss`, the terms of the loss, every metric,
    `temperature`, `seconds` and `images_per_second`. Raises Problem for settings or data that cannot work and for
    a loss that is not finite, Interrupted after SIGINT or SIGTERM.
    """
    hw = hardware(cfg.check())
    chief = hw.rank == 0  # this process evaluates, writes and shows progress
    out = cfg.folder()
    saved = load_run(out).saved if resume else None
    if chief and out.exists() and not resume:
        raise Problem(f"--out {out} exists already, and no run is written over: name another, or --resume {out}")
    for turn in True, False:  # the first process makes the cache of photographs, the others find it
        if turn == chief:
            data = load_data(cfg)
        if hw.world > 1:
            dist.barrier()

    torch.manual_seed(cfg.seed)
    model = TwoEncoders(cfg, len(data.vocab))
    if cfg.init and not saved:
        start_from(cfg.init, model, data.vocab, cfg.fresh_projection)
    model.to(hw.device, memory_format=torch.channels_last if hw.device.type == "cuda" else torch.preserve_format)
    if cfg.init_gap == "remove" and not saved:
        remove_initial_gap(model, *data.train.pairs(torch.arange(min(2048, len(data.train)))), hw)
    if hw.device.type == "cuda" and data.train.images.nbytes < torch.cuda.mem_get_info(hw.device)[0] / 2:
        data.train.images = data.train.images.to(hw.device)
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learned if p.ndim > 1]},
              {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0}]      # biases, norms, temperature
    optimizer = torch.optim.AdamW(groups, cfg.lr, (0.9, 0.98), weight_decay=cfg.weight_decay, fused=True)
    history, frames, start, seconds = [], {}, 0, 0.0
    if saved:
        if saved["vocab"] != data.vocab:
            raise Problem(f"{out} was trained on other words than {cfg.data} has now")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        hw.scaler.load_state_dict(saved["scaler"])
        history, frames, start, seconds = saved["history"], saved["frames"], saved["step"], saved["seconds"]
    net, loss_of, gather = model, cgap_loss, lambda rows: rows
    if cfg.compile:
        net, loss_of = torch.compile(model), torch.compile(cgap_loss)
    if hw.world > 1:
        net, gather = nn.parallel.DistributedDataParallel(net), Gather.apply

    if chief:
        out.mkdir(parents=True, exist_ok=True)
        for draft in out.glob("checkpoint.pt.*.tmp"):  # of a run that was killed while it wrote
            draft.unlink(missing_ok=True)
        fixed = {"samples": samples(data), "chance": chance(data)}
        (out / "config.json").write_text(json.dumps(asdict(cfg), indent=1) + "\n")
        log = open(out / "metrics.jsonl", "w")  # from the checkpoint: a torn line, or a later one, goes
        log.writelines(json.dumps(record) + "\n" for record in history)
    signals, handlers = [], {}
    if threading.current_thread() is threading.main_thread():
        handlers = {n: signal.signal(n, lambda n, _: signals.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=cfg.steps, initial=start, desc=cfg.name(), unit="step", disable=quiet or not chief)
    began, busy, share = time.perf_counter() - seconds, 0.0, cfg.batch // hw.world
    mine = slice(hw.rank * share, (hw.rank + 1) * share)
    try:
        for step, (i, dice) in zip(range(start, cfg.steps + 1), batches(len(data.train), cfg.batch, cfg.seed, start)):
            # In this order: the loss of the weights as they are, measure them, keep them, and make the step.
            last, stop = step == cfg.steps, any_process(signals, hw)
            tick = time.perf_counter()
            images, texts = (z.to(hw.device, non_blocking=True) for z in data.train.pairs(i[mine], dice[mine]))
            with hw.autocast:
                x, y, T = net(images, texts)
            loss, terms = loss_of(gather(x), gather(y), T, cfg.unif, cfg.align, cfg.xunif)
            if not torch.isfinite(loss):  # looked at before the checkpoint, which so has good weights only
                raise Problem(f"the loss is not finite at step {step} ("
                              + ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
                              + f"): lower --lr or raise --temperature; {out} keeps the last good weights")
            busy += time.perf_counter() - tick
            if chief and (last or step % max(1, cfg.steps // 40) == 0):
                frames[step] = snapshot(model, data.val, hw)
            if chief and (last or step % cfg.eval_every == 0) and not (history and history[-1]["step"] == step):
                history.append({"step": step, **evaluate(model, data, cfg, hw), "seconds": time.perf_counter() - began,
                                "images_per_second": (step - start) * cfg.batch / busy if busy else 0.0})
                print(json.dumps(history[-1]), file=log, flush=True)
                bar.set_postfix({k: f"{history[-1][k]:.3f}" for k in ("loss", "linear_separability", "i2t_r1")})
            if chief and (last or stop or step % cfg.checkpoint_every == 0):
                save({"version": __version__, "config": asdict(cfg), "vocab": data.vocab, "step": step,
                      "seconds": time.perf_counter() - began, "model": model.state_dict(),
                      "optimizer": optimizer.state_dict(), "scaler": hw.scaler.state_dict(), "history": history,
                      "frames": frames, **fixed}, out / "checkpoint.pt")
            if last or stop:
                break
            tick = time.perf_counter()
            warm_up, cosine = (step + 1) / (0.1 * cfg.steps), 0.5 + 0.5 * math.cos(math.pi * step / cfg.steps)
            for group in optimizer.param_groups:  # a function of the step: no schedule to save and restore
                group["lr"] = cfg.lr * min(warm_up, cosine)
            optimizer.zero_grad()
            hw.scaler.scale(loss).backward()
            hw.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(learned, 1.0)
            hw.scaler.step(optimizer)
            hw.scaler.update()
            model.limit_temperature()
            busy += time.perf_counter() - tick
            bar.update()
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if chief:
            log.close()
    if hw.world > 1:
        dist.destroy_process_group()
    if stop and not last:
        raise Interrupted(signals[0] if signals else signal.SIGTERM)
    return history


# ============================================================================================================
# 7. Figures, drawn from what a run has left in its folder
# ============================================================================================================
IMAGE, TEXT = "#0072B2", "#D55E00"                                    # blue and vermilion: safe for colour-blind eyes
LINES = "#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#D55E00"


def canvas(rows, columns, title, width, height, **options):
    """A matplotlib figure, without a window and without touching the caller's settings, and its axes in a list."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def plot_gap(runs, path):
    """The gap over time: four measures against the step, with the value that they have where there is no gap."""
    told = ", ".join(f"{run.history[-1]['linear_separability']:.0%} ({run.cfg.name()})" for run in runs)
    title = f"After training a linear classifier tells images from texts with an accuracy of {told}"
    figure, axes = canvas(2, 2, title, 9.6, 6.4, sharex=True)
    for axis, (metric, name, ideal, meaning) in zip(axes, (
            ("centroid_distance", "distance of the centroids", 0, "no gap"),
            ("linear_separability", "linear separability", 0.5, "no gap"),
            ("uniformity_image", "uniformity (texts dashed)", uniform_optimum(runs[0].cfg.dim), "uniform"),
            ("alignment", "alignment, mean |x - y|$^2$", 0, "pairs coincide"))):
        for run, colour in zip(runs, itertools.cycle(LINES)):
            steps = [record["step"] for record in run.history]
            axis.plot(steps, [record[metric] for record in run.history], "o-", color=colour, ms=3, label=run.cfg.name())
            if metric == "uniformity_image":
                axis.plot(steps, [record["uniformity_text"] for record in run.history], "--", color=colour)
        axis.axhline(ideal, color="0.5", linestyle=":", label=meaning)
        axis.set(ylabel=name, **({"xlabel": "training step"} if axis in axes[2:] else {}))
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def draw_pairs(axis, run, step):
    """Images, texts and lines between pairs at one step: on the sphere if the space has 3 dimensions, else in a plane:
    across, from the images' centroid to the texts', so that the gap is seen in full at any time; upward, what else
    that direction is on average over training."""
    gaps = {k: (frame[1].float() - frame[0].float()).mean(0) for k, frame in run.saved["frames"].items()}     # (D,)
    points, flat = run.saved["frames"][step].float(), run.cfg.dim != 3
    Q, R = torch.linalg.qr(torch.stack([gaps[step], torch.stack(list(gaps.values())).mean(0)], 1))
    Q = Q * torch.ones(2).copysign(R.diagonal())                      # texts to the right
    x, y = (points @ Q if flat else points).tolist()
    axis.clear()
    lift = [[math.nan] * len(x[0])] * len(x)                          # the pen, between one pair and the next
    axis.plot(*zip(*itertools.chain(*zip(x[:100], y[:100], lift))), color="0.8", linewidth=0.5, zorder=1)
    for points, colour, marker, label in (x, IMAGE, "o", "images"), (y, TEXT, "^", "texts"):
        axis.scatter(*zip(*points), s=9, color=colour, marker=marker, label=label, linewidths=0)
    labels = {"xlabel": "along the gap at this step", "ylabel": "along its mean over training"}
    axis.set(xlim=(-1, 1), ylim=(-1, 1), xticks=(-1, 0, 1), yticks=(-1, 0, 1), aspect="equal",
             **(labels if flat else {"zlim": (-1, 1)}))
    axis.set_title(f"{run.cfg.name()}, step {step}: centroids {gaps[step].norm():.2f} apart", fontsize=10)
    axis.legend(loc="lower right", fontsize=8)


def plot_embeddings(runs, path):
    """Images and texts before and after training, a row for each run."""
    figure, axes = canvas(len(runs), 2, "Matched pairs, before and after training", 9, 4.5 * len(runs),
                          subplot_kw={"projection": "3d" if runs[0].cfg.dim == 3 else None})
    for axis, (run, end) in zip(axes, itertools.product(runs, (min, max))):
        draw_pairs(axis, run, end(run.saved["frames"]))
    figure.savefig(path, dpi=130)


def animate(runs, path):
    """The same over all of training, as a GIF, the runs side by side."""
    from PIL import Image
    figure, axes = canvas(1, len(runs), "Images and texts in the space that they share", 4.5 * len(runs), 4.7,
                          subplot_kw={"projection": "3d" if runs[0].cfg.dim == 3 else None})
    figure.set_dpi(80)
    pictures = []
    for step in sorted(set.intersection(*(set(run.saved["frames"]) for run in runs))):
        for axis, run in zip(axes, runs):
            draw_pairs(axis, run, step)
        if not pictures:  # the layout takes two passes to settle; then the axes stand still
            figure.draw_without_rendering()
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        figure.canvas.draw()
        size = figure.canvas.get_width_height()
        pictures.append(Image.frombytes("RGBA", size, bytes(figure.canvas.buffer_rgba())).convert("RGB"))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], loop=0,
                     duration=[160] * (len(pictures) - 1) + [2000])


def plot_spectrum(runs, path):
    """Cumulative explained variance after training: how many dimensions images and texts use."""
    figure, (axis,) = canvas(1, 1, "The nearer to the dotted line, the more evenly the dimensions are used", 6.4, 4.4)
    for run, colour in zip(runs, itertools.cycle(LINES)):
        frames = run.saved["frames"]
        for z, style, name in zip(frames[max(frames)].float(), ("-", "--"), ("images", "texts")):
            variance = torch.linalg.eigvalsh(torch.cov(z.T)).flip(0).cumsum(0)
            axis.plot(range(1, len(variance) + 1), variance / variance[-1], style, color=colour,
                      label=f"{run.cfg.name()}, {name}")
    axis.plot([0, runs[0].cfg.dim], [0, 1], ":", color="0.5")
    axis.set(xlabel="principal components", ylabel="share of the variance that they explain", ylim=(0, 1.02))
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def samples(data, n=12):
    """A few validation images, with their captions as the text encoder sees them."""
    images, tokens = data.val.pairs(torch.arange(min(n, len(data.val))))
    return images, [" ".join(data.vocab[k] for k in row if k) if data.val.tokens is not None else ""
                    for row in tokens.flatten(1).tolist()]


def plot_samples(runs, path):
    """A contact sheet of validation pairs."""
    figure, axes = canvas(3, 4, "Validation pairs", 9, 7.5)
    for axis in axes:
        axis.axis("off")
    for axis, image, caption in zip(axes, *runs[0].saved["samples"]):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title("\n".join(textwrap.wrap(caption, 28)[:3]), fontsize=8)
    figure.savefig(path, dpi=130)


def plot(folders, out):
    """All figures of a run, or of several laid over each other, into the folder `out`; returns their paths."""
    runs = [load_run(folder) for folder in folders]
    if len({run.cfg.dim for run in runs}) > 1:
        raise Problem("--plot lays runs over each other that have the same --dim")
    Path(out).mkdir(parents=True, exist_ok=True)
    drawings = {"gap.png": plot_gap, "embeddings.png": plot_embeddings, "spectrum.png": plot_spectrum,
                "samples.png": plot_samples, "gap.gif": animate}
    for name, draw in drawings.items():
        draw(runs, Path(out) / name)
    return [Path(out) / name for name in drawings]


# ============================================================================================================
# 8. The claims of the paper, each as data: what it says, what its authors published, the runs that test it, and
# what must come out. `--reproduce` runs them with several seeds, each run once, on all cores.
# ============================================================================================================
@dataclass
class Claim:
    """A claim. runs: {label: settings that differ from Config's}, `init` names the label of an earlier run.
    checks: (metric, more, less, factor): the metric of run `more` exceeds `factor` times that of run `less`;
    run "X, at the start" is run X before its first step. A check holds if the difference, paired by seed, is on
    average above 0 by more than its standard deviation."""
    text: str
    published: str  # in the authors' repository, github.com/abrar-fahim/contrastive-gap
    runs: dict
    checks: list
    shown: tuple = ("linear_separability", "centroid_distance", "uniformity_image", "alignment", "i2t_r1", "arithmetic")


CLIP, CUA, CUAXU = {}, {"unif": 1.0, "align": 1.0}, {"unif": 1.0, "align": 1.0, "xunif": 1.0}
BOTH, ALL = {"CLIP": CLIP, "CUA": CUA}, {"CLIP": CLIP, "CUA": CUA, "CUAXU": CUAXU}
SHORT, FROM_ZERO = {"steps": 600}, {"init_gap": "remove", "steps": 1000}
LEARNED = {"temperature": 0.07, "learn_temperature": True}
TUNED = {"steps": 500, "lr": 3e-4, "single": 0.0, "limit": 8000, "init": "pretrained"}
SEPARABILITY, CENTROIDS, UNIFORMITY = "linear_separability", "centroid_distance", "uniformity_image"
CLAIMS = {
    "losses": Claim(
        "CUA and CUAXU close the gap and spread the embeddings; arithmetic improves; retrieval is about kept",
        "d = 128, CLIP / CUA / CUAXU: separability 1.000 / .729 / .826, centroids .661 / .082 / .127, uniformity "
        "-1.91 / -3.65 / -3.75, alignment .866 / .544 / .727, I2T R@1 .275 / .258 / .266, SIMAT .356 / .425 / .417",
        ALL,
        [(metric, "CLIP", loss, factor) for loss in ("CUA", "CUAXU")
         for metric, factor in ((SEPARABILITY, 1), (CENTROIDS, 3), (UNIFORMITY, 1))]
        + [("arithmetic", "CUA", "CLIP", 1), ("arithmetic", "CUAXU", "CLIP", 1), ("arithmetic", "CUA", "CLIP", 2),
           ("i2t_r1", "CUA", "CLIP", 0.97), ("i2t_r1", "CUAXU", "CLIP", 0.97), ("zero_shot", "CUA", "CLIP", 1)],
        (SEPARABILITY, CENTROIDS, UNIFORMITY, "alignment", "i2t_r1", "zero_shot",
         "zero_shot_unseen", "arithmetic")),
    "same-modality": Claim(
        "the loss creates a gap even with the same images in both encoders, no gap at the start and a training loss "
        "near 0; CUA does not", "separability near 1 after training to convergence (E1 of their experiments)",
        {name: {**FROM_ZERO, "same_modality": True, **loss} for name, loss in BOTH.items()},
        [(SEPARABILITY, "CLIP", "CLIP, at the start", 1), (CENTROIDS, "CLIP", "CLIP, at the start", 1),
         (SEPARABILITY, "CLIP", "CUA", 1), (SEPARABILITY, "CLIP, at the start", "CUA", 1)],
        (SEPARABILITY, CENTROIDS, UNIFORMITY, "alignment", "i2t_r1", "clip")),
    "image-text-from-zero": Claim(
        "the same from images and texts whose initial gap was removed: it is not the cone effect", "no figure",
        {name: {**FROM_ZERO, **loss} for name, loss in BOTH.items()},
        [(SEPARABILITY, "CLIP", "CLIP, at the start", 1), (SEPARABILITY, "CLIP", "CUA", 1),
         (CENTROIDS, "CLIP", "CUA", 1), (UNIFORMITY, "CLIP", "CUA", 1)]),
    "dimension": Claim(
        "the gap closes by itself in very low dimension and is there in high dimension",
        "separability with CLIP: .50 at d = 3 and 16 (one seed), .782 at 32, .999 at 64, 1.000 at 128; "
        "with CUA: .589 at 32, .648 at 64, .729 at 128",
        {f"{name}, d = {d}": {**SHORT, "dim": d, **loss} for d in (3, 8, 32, 128) for name, loss in BOTH.items()},
        [(SEPARABILITY, "CLIP, d = 128", "CLIP, d = 3", 1), (SEPARABILITY, "CLIP, d = 32", "CLIP, d = 8", 1),
         (SEPARABILITY, "CLIP, d = 128", "CUA, d = 128", 1), (UNIFORMITY, "CLIP, d = 3", "CUA, d = 3", 1)]),
    "batch-size": Claim(
        "small batches make it worse", "no figure",
        {"B = 16, same samples": {"batch": 16, "steps": 2400}, "B = 64": SHORT,
         "B = 256, same samples": {"batch": 256, "steps": 150},
         "B = 16, same steps": {**SHORT, "batch": 16}, "B = 256, same steps": {**SHORT, "batch": 256}},
        [(metric, f"B = 16, {same}", f"B = 256, {same}", 1) for same in ("same samples", "same steps")
         for metric in (CENTROIDS, UNIFORMITY)]),
    "terms": Claim(
        "uniformity spreads, alignment pulls pairs together, and it takes both", "no figure",
        {"CLIP": SHORT, "unif alone": {**SHORT, "unif": 1.0}, "align alone": {**SHORT, "align": 1.0},
         "xunif alone": {**SHORT, "xunif": 1.0}, "CUA": {**SHORT, **CUA}},
        [(UNIFORMITY, "CLIP", "unif alone", 1), ("alignment", "CLIP", "align alone", 1),
         (SEPARABILITY, "unif alone", "CUA", 1), (SEPARABILITY, "align alone", "CUA", 1),
         (CENTROIDS, "xunif alone", "CLIP", 1)],
        (SEPARABILITY, CENTROIDS, UNIFORMITY, "matched_cosine", "alignment", "i2t_r1")),
    "temperature": Claim(
        "(beyond the paper) a part of the gap belongs to the frozen T = 0.01",
        "no figure; T is 0.01 in their final runs",
        {f"{name}, {label}": {**SHORT, **loss, **settings} for label, settings in (
            ("T = 0.01", {}), ("T = 0.03", {"temperature": 0.03}), ("T = 0.07", {"temperature": 0.07}),
            ("T learned", LEARNED)) for name, loss in BOTH.items()},
        [(SEPARABILITY, "CLIP, T = 0.01", f"CLIP, {label}", 1) for label in ("T = 0.03", "T = 0.07", "T learned")]
        + [(UNIFORMITY, "CLIP, T = 0.01", "CLIP, T = 0.07", 1)],
        (SEPARABILITY, CENTROIDS, UNIFORMITY, "alignment", "i2t_r1", "temperature")),
    "zero-shot": Claim(
        "the closed gap classifies better, in the authors' protocol: pretrain with a learned T, then fine-tune at 0.01",
        "d = 128, CLIP / CUA / CUAXU: ImageNet .133 / .138 / .148, CIFAR-100 .318 / .335 / .345, "
        "Caltech .417 / .483 / .486",
        {"pretrained": {**LEARNED, "steps": 900, "single": 0.5},
         **{f"{name}, projections {kind}": {**TUNED, **loss, "fresh_projection": kind == "fresh"}
            for kind in ("kept", "fresh") for name, loss in ALL.items()}},
        [(metric, f"{loss}, projections {kind}", f"CLIP, projections {kind}", 1) for kind in ("kept", "fresh")
         for metric in ("zero_shot", "zero_shot_unseen") for loss in ("CUA", "CUAXU")],
        (SEPARABILITY, CENTROIDS, UNIFORMITY, "i2t_r1", "zero_shot", "zero_shot_unseen", "arithmetic")),
}


def claim_configs(claim, seed):
    """{label: Config} of a claim's runs. Their folders are named after all that decides their outcome, this file
    included, even its comments: equal runs of two claims are one, and those of an edited file are made anew."""
    configs, code = {}, Path(__file__).read_text()
    for label, settings in claim.runs.items():
        cfg = Config(**{"eval_every": 300, "seed": seed, "device": "cpu", **settings})
        cfg.init = configs[cfg.init].out if cfg.init else ""
        cfg.out = "runs/reproduce/" + hashlib.sha256((code + json.dumps(asdict(cfg))).encode()).hexdigest()[:12]
        configs[label] = cfg
    return configs


def run_once(cfg, threads):
    """Run cfg, go on with it, or find it done; the process's body under reproduce."""
    torch.set_num_threads(threads)
    begun = (Path(cfg.out) / "checkpoint.pt").exists()
    if not begun:
        shutil.rmtree(cfg.out, ignore_errors=True)
    if not begun or load_run(cfg.out).saved["step"] < cfg.steps:
        train(cfg, resume=begun, quiet=True)


def reproduce(names, seeds, folder="figures"):
    """Run the claims of these names (all, if empty) with so many seeds, and write into the folder: results.json, a
    picture for each claim, and the animation; then the tables of the README.md beside the folder, if there is one.
    Runs that are there already are not run again."""
    if unknown := set(names) - set(CLAIMS):
        raise Problem(f"--reproduce knows {', '.join(CLAIMS)}, not {', '.join(unknown)}")
    if seeds < 1:
        raise Problem("--seeds must be above 0")
    runs = {(name, seed): claim_configs(CLAIMS[name], seed) for name in names or CLAIMS for seed in range(seeds)}
    jobs = {cfg.out: cfg for configs in runs.values() for cfg in configs.values()}
    path, out, results = Path(folder) / "results.json", Path(folder), {}
    if path.exists():
        try:
            results = json.loads(path.read_text())
        except ValueError:
            raise Problem(f"{path} is broken: move it away, and all claims are tested anew") from None
    workers = 1 + (os.cpu_count() or 1)  # of one thread each, and one more than there are cores, so that none idles
    pairs = sum(cfg.steps * cfg.batch for cfg in jobs.values())
    with (tqdm(total=pairs, unit="pair", unit_scale=True, smoothing=0) as bar,
          ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool):
        for stage in (False, True):  # those that start from another run come after it
            futures = {pool.submit(run_once, cfg, 1): cfg for cfg in jobs.values() if bool(cfg.init) == stage}
            for future in as_completed(futures):
                future.result()
                bar.update(futures[future].steps * futures[future].batch)
    out.mkdir(parents=True, exist_ok=True)
    for name in names or CLAIMS:
        results[name] = {"seeds": seeds, "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
                         f"{platform.python_version()}, torch {torch.__version__}", "runs": {}}
        for label in CLAIMS[name].runs:
            ran = [load_run(runs[name, seed][label].out) for seed in range(seeds)]
            results[name]["runs"][label] = [{"config": asdict(run.cfg), "start": run.history[0], "end": run.history[-1]}
                                            for run in ran]
        plot_claim(name, results[name], out / f"{name}.png")
        print(f"\n## {name}\n\n{claim_table(name, results[name])}")
    path.write_text(json.dumps(results, indent=0) + "\n")
    readme = out.parent / "README.md"
    if readme.exists():  # its tables stand between two marks
        text = readme.read_text()
        for name, result in results.items():
            table = claim_table(name, result)
            text = re.sub(rf"(<!-- {name} -->\n).*?(?=<!-- end -->)", lambda match: match[1] + table, text, flags=re.S)
        readme.write_text(text)
    if "losses" in (names or CLAIMS):
        plot([runs["losses", 0][label].out for label in ("CLIP", "CUA")], out)


def claim_values(result, label, metric):
    """The metric of a run for each seed, as a tensor: at its end or, for a label "X, at the start", at its start."""
    label, start, _ = label.partition(", at the start")
    return torch.tensor([run["start" if start else "end"][metric] for run in result["runs"][label]], dtype=torch.double)


def spread(values):
    """ "mean +- standard deviation" of the values over seeds."""
    return f"{values.mean():.3f} ± {values.std():.3f}" if len(values) > 1 else f"{values.mean():.3f}"


def check_holds(result, metric, more, less, factor):
    """Whether a check of a Claim holds (never with one seed, which has no spread), and the differences by seed."""
    difference = claim_values(result, more, metric) - factor * claim_values(result, less, metric)
    return len(difference) > 1 and bool(difference.mean() > difference.std()), difference


def claim_table(name, result):
    """The claim, what was published and what was measured, in Markdown."""
    claim = CLAIMS[name]
    lines = [f"**Claim:** {claim.text}. **Published:** {claim.published}.", "",
             "| | " + " | ".join(metric.replace("_", " ") for metric in claim.shown) + " |",
             "|---" * (len(claim.shown) + 1) + "|"]
    for label in claim.runs:
        lines.append(f"| {label} | " + " | ".join(spread(claim_values(result, label, metric))
                                                  if metric in result["runs"][label][0]["end"] else "-"
                                                  for metric in claim.shown) + " |")
    lines.append("")
    for metric, more, less, factor in claim.checks:
        holds, difference = check_holds(result, metric, more, less, factor)
        verdict, times = "holds" if holds else "**does not hold**", f"{factor:g} x " if factor != 1 else ""
        lines.append(f"- {metric.replace('_', ' ')}, {more} > {times}{less}: {verdict} ({spread(difference)})")
    return "\n".join(lines) + f"\n\n{result['seeds']} seeds, {result['machine']}: `python cgap.py --reproduce {name}`\n"


def plot_claim(name, result, path):
    """A claim's runs side by side: a panel for each metric, a dot for each seed, a bar at the mean."""
    claim, labels = CLAIMS[name], list(result["runs"])
    holds, metrics = [check_holds(result, *check)[0] for check in claim.checks], claim.shown
    title = textwrap.fill(f"Claim: {claim.text}. {sum(holds)} of {len(holds)} checks hold", 100)
    rows = math.ceil(len(metrics) / 4)
    height = 1 + rows * (0.8 + 0.3 * len(labels))
    figure, axes = canvas(rows, math.ceil(len(metrics) / rows), title, 10, height, sharey=True)
    for axis in axes[len(metrics):]:
        axis.axis("off")
    for axis, metric in zip(axes, metrics):
        for row, label in enumerate(labels):
            if metric in result["runs"][label][0]["end"]:
                values = claim_values(result, label, metric)
                axis.plot(values, [row] * len(values), "o", color="0.5", ms=5)
                axis.plot([values.mean()] * 2, [row - 0.3, row + 0.3], color="black", linewidth=2)
        axis.set(xlabel=metric.replace("_", " "), yticks=range(len(labels)), yticklabels=labels)
        axis.grid(axis="y", color="0.9")
        axis.locator_params(axis="x", nbins=4)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


# ============================================================================================================
# 9. The command line
# ============================================================================================================
def report(run):
    """Print what a run has changed: each metric at the start and at the end, beside what to compare it with."""
    first, last = run.history[0], run.history[-1]
    print(f"\n{run.cfg.name()}, {last['step']} of {run.cfg.steps} steps, seed {run.cfg.seed}, {last['seconds']:.0f} s, "
          f"loss {last['loss']:.3f}\n{'':22}{'start':>10}{'end':>10}{'ideal':>10}   no gap, or chance")
    for name, (ideal, floor) in references(run.cfg.dim, last["alignment"], *run.saved["chance"]).items():
        if name in last:
            print(f"{name:22}{first[name]:10.3f}{last[name]:10.3f}{ideal:>10}   {floor}")


class Parser(argparse.ArgumentParser):
    """argparse, with errors that end like all others."""

    def error(self, message):
        raise Problem(f"{message}; --help lists the flags")


def parse(argv=None):
    """The flags, as a dict: the fields of Config, and what to do instead of a new run."""
    parser = Parser(prog="cgap.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "metavar": f.type.__name__.upper()}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=f.metadata["help"], **kind)
    parser.add_argument("--resume", metavar="RUN", type=Path, help="go on with the run in this folder, as it was set")
    parser.add_argument("--plot", metavar="RUN", nargs="+", help="redraw a run, or lay several over each other")
    parser.add_argument("--reproduce", metavar="CLAIM", nargs="*",
                        help=f"test claims of the paper: all, or {', '.join(CLAIMS)}")
    parser.add_argument("--seeds", type=int, default=3, help="with --reproduce: so many runs of each kind")
    return vars(parser.parse_args(argv))


def main(argv=None):
    """Run the command line; returns the exit status."""
    chief, go_on = os.environ.get("RANK", "0") == "0", "the same command goes on"
    try:
        flags = parse(argv)
        resume, runs, claims, seeds = (flags.pop(name) for name in ("resume", "plot", "reproduce", "seeds"))
        if claims is not None:
            reproduce(claims, seeds, flags["out"] or "figures")
        elif runs:
            print(*plot(runs, flags["out"] or (runs[0] if len(runs) == 1 else "runs/plot")), sep="\n")
        else:
            run = load_run(resume) if resume else None
            cfg = replace(run.cfg, out=str(resume)) if run else Config(**flags)
            cfg.out = str(cfg.folder())
            changed = [f.name for f in fields(Config) if flags[f.name] != f.default]
            if run and changed:
                raise Problem(f"--resume goes on as the run was set: leave out --{changed[0].replace('_', '-')}")
            if run and run.saved["step"] == cfg.steps and chief:
                print(f"{resume} is finished; its figures are drawn again")
            go_on = f"go on with: python cgap.py --resume {cfg.out}"
            stopped = None
            try:
                train(cfg, resume=bool(resume))
            except Interrupted as stop:
                stopped = stop
            if chief:
                report(load_run(cfg.out))
                print(*plot([cfg.out], cfg.out), *(Path(cfg.out) / name for name in ("metrics.jsonl", "checkpoint.pt")),
                      sep="\n")
            if stopped:
                raise stopped
    except (Interrupted, KeyboardInterrupt) as stop:
        if chief:
            print(f"interrupted; {go_on}", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)
    except (Problem, OSError) as error:
        print("cgap.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
