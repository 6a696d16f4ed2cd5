# SPDX-License-Identifier: MIT
"""The contrastive gap in one file: make it, measure it, find its cause, close it.

CLIP maps a picture and its caption to nearby points of one sphere. Yet pictures end up in one
region of it and captions in another. "It's Not a Modality Gap: Characterizing and Addressing the
Contrastive Gap" (Fahim, Murphy, Fyshe, arXiv 2405.18570) shows that the contrastive loss itself
makes this gap, and that two more terms, uniformity and alignment, close it. See it on a laptop:

    python cgap.py --points                  # the smallest gap: no encoders, a few seconds
    python cgap.py                           # two encoders and the CLIP loss: a gap
    python cgap.py --unif 1 --align 1        # two more terms: it closes
    python cgap.py --unif 1 --align 1 --center --temperature 0.07   # the recipe: section 3

From Python: `history = train(Config(unif=1, align=1))`.
"""
import argparse
import csv
import hashlib
import inspect
import json
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from itertools import chain
from pathlib import Path

from torch import nn
from tqdm import tqdm

__version__ = "3.0"

# PART ONE: THE PAPER ==============================================================================
# -- 1. The loss -----------------------------------------------------------------------------------
# Copy this section into your own project: it needs nothing else.
# x_i and y_i are the embeddings of picture i and of its caption, N pairs in a batch.
#   clip    x_i should be more similar to its own y_i than to any other y_j, and the other way round
#   unif    pictures should be far from other pictures, captions from other captions
#   align   x_i and y_i should be close
#   xunif   pictures should be far from the captions of others
# The paper's losses are rows of weights: CLIP; CUA = CLIP + unif + align; CUAXU = CUA + xunif.
import torch
import torch.nn.functional as F


def unit(z, center=False):
    """The rows of z (N, D), without their mean if `center`, at length 1, in float32 or better."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return F.normalize(z - z.mean(0) if center else z, dim=1)


def uniformity(x, y, t=2.0):
    """log mean_{i != j} exp(-t |x_i - y_j|^2) of unit vectors (N, D): a scalar, -4t to 0, lower the
    farther apart they are. For one modality: uniformity(x, x). Pairs i = j are left out: their
    distance is 0, or should be. Source: Wang & Isola, arXiv 2005.10242."""
    N = len(x)
    exponents = 2 * t * (x @ y.T - 1)  # (N, N); on the sphere |a - b|^2 = 2 - 2 a.b
    return exponents.fill_diagonal_(-math.inf).flatten().logsumexp(0) - math.log(N * (N - 1))


def cgap_loss(x, y, temperature=0.01, unif=0.0, align=0.0, xunif=0.0, center=False):
    """CLIP + unif * uniformity + align * alignment + xunif * cross-modal uniformity: the total, a
    scalar to minimise (often negative), and a dict of its unweighted terms, detached.

    x, y: (N, D) raw embeddings, row i of x paired with row i of y; they are normalised here.
    temperature: a number or, to learn it, a scalar tensor. center: subtract the batch's means first
    (section 3 says why); to use the encoders, subtract means over training pairs (`fold_means`).
    Computes in float32 or better, also under autocast. With several processes, x and y must be
    those of all, with gradients (`gather`): the log of a mean is not the mean of logs. Raises
    ValueError for other shapes and for N < 2. Source: the paper's L_CUAXU.
    """
    if x.shape != y.shape or x.ndim != 2 or len(x) < 2:
        raise ValueError(f"x and y must be (N, D), N > 1, not {(*x.shape,)} and {(*y.shape,)}")
    with torch.autocast(x.device.type, enabled=False):  # bfloat16: logits off by .2
        x = unit(x, center)
        y = unit(y, center)
        logits = x @ y.T / temperature  # (N, N)
        matched = torch.arange(len(x), device=x.device)
        clip = (F.cross_entropy(logits, matched) + F.cross_entropy(logits.T, matched)) / 2
        terms = {  # name: (weight, value)
            "clip": (1.0, clip),
            "unif": (unif, (uniformity(x, x) + uniformity(y, y)) / 2),
            "align": (align, (x - y).square().sum(1).mean()),
            "xunif": (xunif, uniformity(x, y)),
        }
    total = sum(weight * value for weight, value in terms.values() if weight)
    return total, {name: value.detach() for name, (_, value) in terms.items()}


# -- 2. Measuring the gap --------------------------------------------------------------------------
# One number is not enough: two clouds can share a centre and be told apart; two that nobody can
# tell apart can still sit in a corner, where pairs are close for free. Search from one modality in
# the other does not feel an offset between them; search in both at once does (mixed_recall).
def fit_logistic(z, labels, C):
    """The w (D,) that minimises |w'|^2 / 2 + C sum_i log(1 + exp(-s_i z_i.w)), by Newton's method.
    z: (N, D), the last column 1: the last weight is the bias, w' the others. labels: (N,), 0 or 1
    for s = -1 or 1. C: as in scikit-learn, the larger the freer."""
    ridge = torch.ones_like(z[0])
    ridge[-1] = 0
    w = torch.zeros_like(ridge)
    for _ in range(25):
        p = torch.sigmoid(z @ w)
        gradient = ridge * w + C * z.T @ (p - labels)
        hessian = ridge.diag() + C * (z.T * (p * (1 - p))) @ z
        w = w - torch.linalg.solve(hessian, gradient)
    return w


def linear_separability(x, y, C=1.0):
    """Accuracy, 0 to 1, of a logistic regression that tells x from y, unit vectors (N, D): fit on
    80 % of the pairs, tested on the others. 1 is a complete gap, 0.5 is none. The authors use C = 1,
    whose penalty keeps w small and misses tiny gaps; 100 finds them."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    z = F.pad(torch.stack([x, y], 1)[order], (0, 1), value=1.0)  # (N, 2, D + 1)
    labels = torch.arange(2.0, dtype=z.dtype)
    k = int(0.8 * len(x))
    w = fit_logistic(z[:k].flatten(0, 1), labels.repeat(k), C)
    return ((z[k:] @ w > 0) == labels).double().mean()


def effective_rank(x):
    """How many dimensions x (N, D) uses, 1 to D: exp of the entropy of the shares of variance on
    the principal axes (after Roy & Vetterli 2007)."""
    variances = torch.linalg.eigvalsh(torch.cov(x.T)).clamp(min=0)
    return torch.special.entr(variances / variances.sum().clamp(min=1e-30)).sum().exp()


@torch.no_grad()
def gap_metrics(x, y):
    """All measures of the gap between paired embeddings x, y (N, D), as a dict of floats; takes
    about 30 N^2 bytes.

    centroid_distance          |mean x - mean y|, 0 to 2
    linear_separability        can a classifier tell x from y? 0.5 never, 1 always; _c100: C = 100
    alignment                  mean |x_i - y_i|^2, 0 to 4: 2 - 2 * mean cosine of the pairs
    uniformity_image, uniformity_text, cross_uniformity   -8 to 0, of 5,000 pairs at the most
    effective_rank             of x, 1 to D
    They are normalised here. Raises ValueError for other shapes, N < 5, D < 2, and a row that is
    zero or not finite. Source: the paper; the first two as in the authors' code.
    """
    x = x.cpu().double()  # the CPU first: MPS has no float64
    y = y.cpu().double()
    if (x.shape != y.shape or x.ndim != 2 or len(x) < 5 or x.shape[1] < 2
            or not torch.cat([x, y]).norm(dim=1).log().isfinite().all()):
        raise ValueError("x and y must be (N, D), N > 4, D > 1, without a row that is zero or not "
                         f"finite, not {(*x.shape,)} and {(*y.shape,)}")
    x = unit(x)
    y = unit(y)
    metrics = {
        "centroid_distance": (x.mean(0) - y.mean(0)).norm(),
        "linear_separability": linear_separability(x, y),
        "linear_separability_c100": linear_separability(x, y, C=100.0),
        "alignment": (x - y).square().sum(1).mean(),
        "uniformity_image": uniformity(x, x),
        "uniformity_text": uniformity(y, y),
        "cross_uniformity": uniformity(x, y),
        "effective_rank": effective_rank(x),
    }
    return {name: value.item() for name, value in metrics.items()}


def ideals(dim):
    """What gap_metrics are for perfect pairs, uniform on the sphere: of a sample of 5,000. The
    uniformity of the distribution is log 0F1(; d/2; 4) - 4: -2.080 at d = 3, -3.938 at d = 128."""
    x = torch.randn(5000, dim, generator=torch.Generator().manual_seed(0))
    return gap_metrics(x, x)


@torch.no_grad()
def effective_temperature(x, y, temperature):
    """T / sqrt((1 - |mean x|^2) (1 - |mean y|^2)) of embeddings (N, D), normalised here: about the
    temperature that softmax feels. Products with a mean are the same for all who compete, so only
    the rest of the embeddings tells who belongs to whom. Its mean square is 1 - |mean|^2: normalise
    it again, and its cosines are divided by this, not by T. A narrow space is a warm one."""
    x = unit(x)
    y = unit(y)
    rest = (1 - x.mean(0).square().sum()) * (1 - y.mean(0).square().sum())
    return float(temperature / rest.clamp(min=1e-12).sqrt())


def recall(x, y, group):
    """R@1, 0 to 1: how often the nearest y to x_i has x_i's group. x, y: unit vectors (N, D).
    group: (N,) integers; equal captions share one."""
    return (group[(x @ y.T).argmax(1)] == group).float().mean().item()


@torch.no_grad()
def mixed_recall(x, y, group=None):
    """Search in one index of images and texts: how often the nearest item to x_i, and to y_i, is a
    right partner of the other modality; two floats, 0 to 1. The item itself and those of its own
    modality and group are left out. x, y: (N, D), normalised here; takes about 25 N^2 bytes.
    group: (N,) integers; equal captions share one. After arXiv 2507.19054."""
    both = torch.cat([unit(x), unit(y)])  # (2 N, D)
    group = torch.arange(len(x), device=x.device) if group is None else group
    same = group[:, None] == group
    cosines = (both @ both.T).masked_fill_(torch.block_diag(same, same), -math.inf)
    group = group.repeat(2)
    right = group[cosines.argmax(1)] == group
    return tuple(right.view(2, -1).float().mean(1).tolist())


# -- 3. The smallest gap ---------------------------------------------------------------------------
# No encoders, only points that the loss may move as it likes. Left alone, they open no gap. Give
# each side one vector that all its points share, as an encoder's biases are, and a complete gap
# opens within a few steps, at any temperature. What decides is how fast the shared vectors move
# against the points: at 1/64 of the points' learning rate hardly a gap opens.
# Why two directions, not one common corner? Almost nothing ties the two vectors to each other: what
# they add to the logits is nearly the same for all pairs, and softmax does not see a constant. What
# little does tie them closes the gap again where T is high. At T = 0.01 it stays: that softmax is
# too cold for pairs that do not fit, and shared vectors warm it (effective_temperature). So the
# recipe is: subtract the means (`center`), and give the softmax the warmth that they were for.
def smallest_gap(offset=1.0, temperature=0.01, dim=128, n=512, batch=64, steps=600, seed=0,
                 mismatch=0.0, **weights):
    """Train n pairs of free points and, at first 0, an offset that the points of a side share.

    offset: its learning rate, as a multiple of the points'; 0 for none. Both sides start in the
    same cone, so without a gap. temperature: a number, or a function of the step. mismatch: the
    share of y that is permuted, anew at each step. weights: of the loss's terms. Returns a dict for
    each measurement: `step`, `effective_temperature`, gap_metrics. (With dim = 2, on a circle,
    clouds that start far apart cannot pass each other.)"""
    torch.manual_seed(seed)
    cone = torch.randn(dim) / dim ** 0.5
    points = cone + 0.3 / dim ** 0.5 * torch.randn(2, n, dim)
    points.requires_grad_()
    offsets = torch.zeros(2, 1, dim, requires_grad=True)
    groups = [{"params": [points]}, {"params": [offsets], "lr": 0.01 * offset}]
    optimizer = torch.optim.Adam(groups, lr=0.01)
    history = []
    for step in range(steps + 1):
        x, y = points + offsets
        T = temperature(step) if callable(temperature) else temperature
        if step in (0, 1, 2, 5, 10, 20, 50, 100, 200, 400, steps):
            history.append({"step": step, **gap_metrics(x, y),
                            "effective_temperature": effective_temperature(x, y, T)})
        i = torch.randperm(n)[:batch]
        j = mismatched(n, mismatch)[i]
        loss, _ = cgap_loss(x[i], y[j], T, **weights)
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


# -- 4. Two small encoders -------------------------------------------------------------------------
# Neither looks at the rest of its batch (GroupNorm and LayerNorm, no BatchNorm), so the only place
# where samples meet is the loss.
CONTEXT = 32  # words in a caption; longer ones are cut


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
    """A transformer: tokens (B, L), 0 for padding, L up to CONTEXT, to embeddings (B, dim)."""

    def __init__(self, dim, vocab):
        super().__init__()
        self.token = nn.Embedding(vocab, 128)
        self.position = nn.Parameter(torch.randn(CONTEXT, 128))  # as large as word embeddings
        self.body = nn.TransformerEncoderLayer(128, 4, 512, 0.0, "gelu", batch_first=True,
                                               norm_first=True)
        self.norm = nn.LayerNorm(128)
        self.projection = nn.Linear(128, dim)

    def forward(self, tokens):
        is_word = tokens != 0  # (B, L)
        h = self.token(tokens) + self.position[:tokens.shape[1]]  # (B, L, 128)
        h = self.norm(self.body(h, src_key_padding_mask=~is_word))
        is_word = is_word[..., None]  # (B, L, 1)
        return self.projection((h * is_word).sum(1) / is_word.sum(1))  # mean over the words


class TwoEncoders(nn.Module):
    """One encoder for images, one for texts of `vocab` words (or, `same_modality`, for the same
    images), and a temperature."""

    def __init__(self, cfg, vocab):
        super().__init__()
        self.image = ImageEncoder(cfg.dim)
        self.text = ImageEncoder(cfg.dim) if cfg.same_modality else TextEncoder(cfg.dim, vocab)
        # log(1 / T) is what is learned: it moves by factors, and T stays above 0.
        self.log_scale = nn.Parameter(torch.tensor(-math.log(cfg.temperature)),
                                      requires_grad=cfg.learn_temperature)

    def forward(self, images, texts):
        return self.image(images), self.text(texts), torch.exp(-self.log_scale)


@torch.no_grad()
def encode(encoder, inputs):
    """Raw embeddings (N, dim) of images or tokens, float32, on the CPU."""
    device = encoder.projection.bias.device
    with autocast(device):  # bfloat16 where it is fast: section 10
        parts = [encoder(part.to(device)).float().cpu() for part in inputs.split(256)]
    return torch.cat(parts)


def embed(encoder, inputs):
    """The same as unit vectors."""
    return unit(encode(encoder, inputs))


@torch.no_grad()
def remove_initial_gap(model, images, texts):
    """Lay the second encoder's cloud onto the first's, in place: the paper's idealised start. Its
    projection changes so that its embeddings y get the mean and the spread of x, turned by the
    orthogonal R that minimises |(y - mean y) R - (x - mean x)| (Procrustes)."""
    x = encode(model.image, images)
    y = encode(model.text, texts)
    mean_x = x.mean(0)
    mean_y = y.mean(0)
    x -= mean_x
    y -= mean_y
    u, _, vt = torch.linalg.svd(y.T @ x)
    turn = (u @ vt).T * x.norm() / y.norm()
    last = model.text.projection  # W h + b becomes turn (W h + b - mean_y) + mean_x
    last.weight.copy_(turn @ last.weight)
    last.bias.copy_(turn @ (last.bias - mean_y) + mean_x)


def fold_means(model, images, texts):
    """Subtract the mean embedding over these pairs from each projection's bias, in place: ordinary
    encoders with a mean of 0. A centred loss sees no difference: it subtracts biases, too."""
    for encoder, inputs in ((model.image, images), (model.text, texts)):
        bias = encoder.projection.bias.data
        bias -= encode(encoder, inputs).mean(0).to(bias.device)


# -- 5. Scenes -------------------------------------------------------------------------------------
# One or two coloured shapes, and a caption that says exactly what is there: perfect pairs. Two
# tasks show what the space is for: to name what was never seen, and to calculate.
@dataclass
class Pairs:
    """Images with K texts each: captions of L words, or the same image again."""
    images: torch.Tensor  # (N, 3, S, S) uint8
    texts: torch.Tensor  # (N, K, L) int32, padded with 0, or (N, 1, 3, S, S) uint8

    def batch(self, i, epoch=0):
        """Images i (indices or a slice), each with one of its texts, another in each epoch."""
        return self.images[i], self.texts[i, epoch % self.texts.shape[1]]


# Pairs, Pairs, {word: number}, Tasks or None
Data = namedtuple("Data", "train val vocab tasks")
# Zero-shot: the prompt nearest to image i should be number labels[i]. Arithmetic: image query[q] of
# the pool + text(new[q]) - text(old[q]) should be nearest to an i of which correct[q, i] is True.
Tasks = namedtuple("Tasks", "images labels prompts pool query old new correct")


def split_words(text):
    """Lower case, words and single punctuation marks: "A dog's bowl." -> [a, dog, ', s, bowl, .]"""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def make_vocab(captions):
    """{word: number} of the 10,000 most frequent words, after padding (0) and unknown (1)."""
    counts = Counter(word for text in captions for word in split_words(text))
    known = sorted(word for word, _ in counts.most_common(10_000))
    return {word: number for number, word in enumerate(["<pad>", "<unk>", *known])}


def tokenize(captions, vocab):
    """Token numbers (len(captions), L), int32, of the first CONTEXT words, padded with 0."""
    rows = [[vocab.get(word, 1) for word in split_words(text)[:CONTEXT]] for text in captions]
    rows = [torch.tensor(row, dtype=torch.int32) for row in rows]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


PALETTE = {"red": (.85, .10, .10), "green": (.10, .65, .15), "blue": (.15, .25, .90),
           "yellow": (.95, .90, .15), "purple": (.60, .15, .75), "cyan": (.15, .85, .90),
           "white": (1., 1., 1.), "black": (0., 0., 0.)}
SHAPES = ["circle", "square", "triangle", "diamond", "cross", "ring"]
RELATIONS = ["left of", "above"]  # two suffice: with "right of" one scene would have two captions
WORDS = [list(PALETTE), SHAPES, list(PALETTE), SHAPES, RELATIONS]  # of the columns of scenes
OBJECTS = torch.cartesian_prod(torch.arange(len(PALETTE)), torch.arange(len(SHAPES)))  # (48, 2)
UNSEEN = OBJECTS[:, 0] % len(SHAPES) == OBJECTS[:, 1]  # one for each colour: never in training
# Where both objects are, (x, y), for one alone, side by side, one above the other; +- how much
PLACES = torch.tensor([[[.5, .5], [.5, .5]], [[.25, .5], [.75, .5]], [[.5, .25], [.5, .75]]])
JITTER = torch.tensor([[.2, .2], [.04, .15], [.15, .04]])


def masks(u, v):
    """What is inside each of the SHAPES, for u to the right and v down, -1 to 1 across it."""
    a = u.abs()
    b = v.abs()
    return torch.stack([u * u + v * v < 1,
                        torch.maximum(a, b) < .85,
                        (v < .85) & (2 * a - v < 1),
                        1.5 * a + b < 1.1,
                        (torch.minimum(a, b) < .3) & (torch.maximum(a, b) < 1),
                        (u * u + v * v - .72).abs() < .28])


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
    palette = torch.tensor(list(PALETTE.values()))
    axis = (torch.arange(size) + .5) / size
    images = []
    for part in scenes.split(256):  # small enough to stay in the processor's cache
        n = len(part)
        kind = part[:, 4] + 1  # 0 alone, 1 side by side, 2 one above the other
        centre = around(PLACES[kind], JITTER[kind][:, None], n, 2, 2)[..., None]  # (n, 2, xy, 1)
        radius = around(.2, .03, n, 2, 1)
        image = around(.5, .15, n, 1, 1, 1)
        for k in (0, 1):
            across, down = ((axis - centre[:, k]) / radius[:, k, None]).unbind(1)  # (n, size) each
            inside = masks(across[:, None], down[..., None])[part[:, 2 * k + 1], torch.arange(n)]
            inside &= (kind >= k)[:, None, None]  # (n, size, size)
            colour = palette[part[:, 2 * k]] + .08 * torch.randn(n, 3)
            image = torch.where(inside[:, None], colour[..., None, None], image)
        image = image + .05 * torch.randn(image.shape)
        images.append((image * 255).clamp(0, 255).byte())
    return torch.cat(images)


def scene_tasks(size, vocab, n=200):
    """Zero-shot: single objects in all combinations, prompts such as "a red circle". Arithmetic: n
    scenes, each edited in each of its words; the 5 n edits are asked for among all of these, first
    with words as old and new texts, then with captions."""
    single = F.pad(OBJECTS, (0, 3), value=-1)
    labels = torch.arange(len(single)).repeat(20)
    images = draw_scenes(single[labels], size)
    scenes = random_scenes(2 * n, 0.0)
    scenes = scenes[(scenes[:, :2] != scenes[:, 2:4]).all(1)][:n]  # a word then names one object
    query = torch.arange(len(scenes)).repeat(len(WORDS))
    edited = scenes[query]
    old = []
    new = []
    for k, (names, rows) in enumerate(zip(WORDS, edited.split(len(scenes)))):  # rows: views
        old += [names[i] for i in rows[:, k]]
        rows[:, k] = (rows[:, k] + torch.randint(1, len(names), (len(rows),))) % len(names)
        new += [names[i] for i in rows[:, k]]
    pool = torch.cat([scenes, edited])
    correct = (edited[:, None] == pool).all(2)  # equal scenes are equally right
    return Tasks(images, labels, tokenize(describe(single), vocab), draw_scenes(pool, size),
                 query.repeat(2), tokenize(old + describe(scenes[query]), vocab),
                 tokenize(new + describe(edited), vocab), correct.repeat(2, 1))


def scene_data(cfg):
    """20,000 training and 2,000 validation scenes with both tasks; a seed gives the same bytes."""
    torch.manual_seed(cfg.seed)
    size = cfg.image_size or 32
    n = min(20_000, cfg.limit or 20_000)
    scenes = random_scenes(n + min(2_000, n), cfg.single)
    captions = describe(scenes)
    vocab = make_vocab(captions[:n])
    texts = tokenize(captions, vocab)[:, None]  # (N, 1, L)
    images = draw_scenes(scenes, size)
    return Data(Pairs(images[:n], texts[:n]), Pairs(images[n:], texts[n:]), vocab,
                scene_tasks(size, vocab))


# -- 6. Settings -----------------------------------------------------------------------------------
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
    dim: int = 128  # dimension of the shared space
    same_modality: bool = False  # a second image encoder replaces the one for texts
    remove_gap: bool = False  # start without the gap between the untrained encoders
    steps: int = 1500  # training steps
    batch: int = 64  # pairs in a batch, over all processes
    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.1  # AdamW's, on matrices
    seed: int = 0  # seed of the scenes, the weights and the batches
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps; auto is a GPU if there is one
    compile: bool = False  # torch.compile the encoders and the loss
    eval_every: int = 250  # steps between evaluations, of 5,000 pairs at most, with a checkpoint
    out: str = ""  # folder of the run, which must not exist; else runs/<time>-<loss>-seed<seed>

    def __post_init__(self):
        self.data = str(self.data)
        name = f"{self.name()}-seed{self.seed}"
        self.out = str(self.out or time.strftime(f"runs/%Y%m%d-%H%M%S-{name}"))

    def weights(self):
        """The weights of the loss's terms, {argument of cgap_loss: value}; of one you add, too."""
        names = list(inspect.signature(cgap_loss).parameters)[3:-1]
        return {name: getattr(self, name) for name in names}

    def name(self):
        """The loss in short, for folders and legends."""
        spelled = "+".join(f"{value:g}{name}" for name, value in self.weights().items() if value)
        known = {"": "CLIP", "1unif+1align": "CUA", "1unif+1align+1xunif": "CUAXU"}
        return known.get(spelled, "CLIP+" + spelled) + "-centred" * self.center


# -- 7. Training -----------------------------------------------------------------------------------
def do_tasks(model, tasks):
    """Accuracy, 0 to 1, in zero-shot (of all, of the unseen) and in arithmetic (with single words
    for attributes or for relations, with captions): a dict of floats."""
    scores = embed(model.image, tasks.images) @ embed(model.text, tasks.prompts).T
    named = (scores.argmax(1) == tasks.labels).float()
    pool = embed(model.image, tasks.pool)
    edit = embed(model.text, tasks.new) - embed(model.text, tasks.old)
    scores = (pool[tasks.query] + edit) @ pool.T
    scores.scatter_(1, tasks.query[:, None], -math.inf)  # the query itself is no answer
    found = tasks.correct.gather(1, scores.argmax(1, keepdim=True)).float()
    words, captions = found.view(2, len(WORDS), -1)
    right = {"zero_shot": named, "zero_shot_unseen": named[UNSEEN[tasks.labels]],
             "arithmetic_attribute": words[:-1], "arithmetic_relation": words[-1],
             "arithmetic_caption": captions}
    return {name: values.mean().item() for name, values in right.items()}


def evaluate(model, data, cfg):
    """The loss on training pairs; the gap and retrieval on validation pairs; the tasks: a dict."""
    T = torch.exp(-model.log_scale).item()
    images, texts = data.train.batch(slice(cfg.batch))
    loss, terms = cgap_loss(encode(model.image, images), encode(model.text, texts), T,
                            **cfg.weights(), center=cfg.center)
    if not loss.isfinite():
        raise UserError(f"the loss is not finite: lower --lr or raise --temperature; {cfg.out} "
                        "keeps the last good weights")
    images, texts = data.val.batch(slice(5000))
    x = embed(model.image, images)
    y = embed(model.text, texts)
    record = {"loss": loss.item()}
    for name in ("clip", *cfg.weights()):
        record[name] = terms[name].item()  # KeyError: a weight without its term
    record |= gap_metrics(x, y)
    record |= {"temperature": T, "effective_temperature": effective_temperature(x, y, T)}
    group = torch.unique(texts.flatten(1), dim=0, return_inverse=True)[1]
    record |= {"i2t_r1": recall(x, y, group), "t2i_r1": recall(y, x, group)}
    record["mixed_i2t"], record["mixed_t2i"] = mixed_recall(x, y, group)
    return record | (do_tasks(model, data.tasks) if data.tasks else {})


def batch_of(step, n, cfg):
    """This process's rows of a step's batch, of n pairs, and the epoch, in which no pair comes
    twice. Nothing is remembered, so that a run can go on from any step."""
    epoch, k = divmod(step, n // cfg.batch)
    g = torch.Generator().manual_seed(1_000_003 * cfg.seed + epoch)
    rows = torch.randperm(n, generator=g).split(cfg.batch)[k]
    return rows[RANK::WORLD_SIZE], epoch


def make_optimizer(model, cfg):
    """AdamW; weight decay on matrices, not on biases, norms, temperature."""
    groups = [{"params": [p], "weight_decay": cfg.weight_decay if p.ndim > 1 else 0.0}
              for p in model.parameters()]
    return torch.optim.AdamW(groups, cfg.lr, (0.9, 0.98), fused=True)


def learning_rate(step, cfg):
    """The lower of a linear warm-up over a tenth of the steps and a cosine to 0."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / cfg.steps)
    return cfg.lr * min((step + 1) / (0.1 * cfg.steps), cosine)


def track(run, step, model, optimizer, data, quiet):
    """When due, take a snapshot for the figures; when due, evaluate and save a checkpoint."""
    cfg = run["cfg"]
    is_last = step == cfg.steps
    evaluation = is_last or step % cfg.eval_every == 0
    snapshot = is_last or step % math.ceil(cfg.steps / 30) == 0
    if cfg.center and (evaluation or snapshot):  # few pairs will do for a picture
        fold_means(model, *data.train.batch(slice(2048 if evaluation else 256)))
    if snapshot and RANK == 0:
        images, texts = data.val.batch(slice(256))
        both = torch.stack([embed(model.image, images), embed(model.text, texts)])
        run["snapshots"][step] = both.half()  # (2, 256, dim)
    if evaluation and RANK == 0:
        record = {"step": step, **evaluate(model, data, cfg)}
        run["history"].append(record)
        save_run(run, model, optimizer)
        if not quiet:
            tqdm.write("step {step:6}   loss {loss:7.3f}   separability {linear_separability:.3f}"
                       "   centroids {centroid_distance:.3f}   R@1 {i2t_r1:.3f}".format(**record))


def train(cfg, resume=False, model=None, quiet=False):
    """Train two encoders; returns the history, a dict for each evaluation: `step`, the loss and its
    terms, every metric. resume: go on with the run in cfg.out. model: your own
    TwoEncoders to start from. Raises UserError for what cannot work, and for a loss that is not
    finite."""
    check(cfg)
    device = pick_device(cfg.device)
    data = load_data(cfg)
    torch.manual_seed(cfg.seed)
    model = model or TwoEncoders(cfg, len(data.vocab))
    if cfg.remove_gap and not resume:
        remove_initial_gap(model, *data.train.batch(slice(2048)))
    model.to(device)
    optimizer = make_optimizer(model, cfg)
    run = open_run(cfg, data, model, optimizer, resume)
    loss_of = torch.compile(cgap_loss) if cfg.compile else cgap_loss
    if cfg.compile:
        model.compile()
    forward = nn.parallel.DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    if not resume:
        track(run, 0, model, optimizer, data, quiet)
    start = run["history"][-1]["step"] if resume else 0
    bar = tqdm(range(start, cfg.steps), cfg.name(), disable=quiet or RANK != 0)
    for step in bar:
        images, texts = data.train.batch(*batch_of(step, len(data.train.images), cfg))
        with autocast(device):
            x, y, T = forward(images.to(device), texts.to(device))
        loss, _ = loss_of(gather(x), gather(y), T, **cfg.weights(), center=cfg.center)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.log_scale.data.clamp_(max=math.log(100))  # T >= 0.01, as in OpenAI's CLIP
        if step % 10 == 0:  # on a GPU, reading the loss waits for it
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        track(run, step + 1, model, optimizer, data, quiet)
    return run["history"]


# -- 8. Figures, drawn from what runs have kept ----------------------------------------------------
def canvas(n, columns):
    """A matplotlib figure of n panels, so many in a row, and the list of them."""
    from matplotlib.figure import Figure
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(4.2 * columns, 4 * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, k + 1) for k in range(n)]


def plot_histories(histories, metrics, dim, path, xscale="linear"):
    """A panel for each metric with a line for each of {name: history}, and a dotted one for the
    ideal in so many dimensions."""
    figure, axes = canvas(len(metrics), min(4, len(metrics)))
    ideal = ideals(dim)
    for axis, metric in zip(axes, metrics):
        for name, history in histories.items():
            steps = [record["step"] for record in history]
            values = [record.get(metric, math.nan) for record in history]  # nan is not drawn
            axis.plot(steps, values, "o-", markersize=3, label=name)
        axis.axhline(ideal.get(metric, math.nan), color="0.5", linestyle=":")
        axis.set(xlabel="training step", title=metric.replace("_", " "), xscale=xscale)
        axis.xaxis.set_major_formatter("{x:g}")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path)


def draw_pairs(axis, run, number):
    """The last of the first so many snapshots, in the plane of the origin and both means: the gap
    across, in full, and what both sides have in common upward. Lines join a hundred pairs."""
    step, both = list(run["snapshots"].items())[:number][-1]
    both = both.float()  # (2, n, D)
    x, y = both.mean(1)
    Q, R = torch.linalg.qr(torch.stack([y - x, y + x], 1))
    points = (both @ (Q * R.diagonal().sign())).numpy()  # (2, n, 2)
    axis.clear()
    axis.plot(*points[:, :100].T.swapaxes(1, 2), color="0.8", linewidth=0.5)
    for cloud, marker, label in zip(points, "o^", ("images", "texts")):
        axis.plot(*cloud.T, marker, markersize=3, label=label)
    axis.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", xlabel="along the gap",
             ylabel="what both have in common",
             title=f"{run['cfg'].name()}\nstep {step}: centroids {(y - x).norm():.2f} apart")
    axis.legend(loc="lower right")


def animate(runs, path):
    """Images and texts over all of training, the runs side by side: a GIF, its end as a PNG."""
    from matplotlib.animation import FuncAnimation
    figure, axes = canvas(len(runs), len(runs))

    def frame(k):
        for axis, run in zip(axes, runs):
            draw_pairs(axis, run, k + 1)

    FuncAnimation(figure, frame, 36).save(path, "pillow", dpi=80)  # it rests at the end
    figure.savefig(path.with_suffix(".png"))


def plot(folders, out):
    """All figures of one run or several: gap.png with the gap, retrieval and the terms of the
    loss (also one that you add), embeddings.gif and embeddings.png."""
    runs = [load_run(folder) for folder in folders]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    histories = {run["cfg"].out: run["history"] for run in runs}
    shown = ["linear_separability", "centroid_distance", "effective_rank", "i2t_r1",
             "mixed_i2t", "loss", "clip", *runs[-1]["cfg"].weights()]
    plot_histories(histories, shown, runs[0]["cfg"].dim, out / "gap.png")
    animate(runs, out / "embeddings.gif")
    print(f"{out}: gap.png, embeddings.gif, embeddings.png")


# PART TWO: THE MACHINERY ==========================================================================
# -- 9. Photographs, decoded once into a cache that later runs map ---------------------------------
class UserError(Exception):
    """A mistake of the user's: the command line prints it as one line and exits with 2."""


def read_captions(file):
    """{path: [captions]} of one of MS-COCO's JSON files, or of a CSV file with the header
    image,caption, whose paths are relative to it."""
    captions = defaultdict(list)
    if file.suffix == ".json":
        content = json.loads(file.read_bytes())
        folder = file.parents[1] / file.stem.removeprefix("captions_")
        paths = {image["id"]: folder / image["file_name"] for image in content["images"]}
        for note in content["annotations"]:
            captions[paths[note["image_id"]]].append(note["caption"])
        return captions
    with open(file, newline="", encoding="utf-8-sig") as lines:
        for row in csv.DictReader(lines):
            if None in row:
                raise ValueError(f"more than two fields: {row}")
            captions[file.parent / row["image"]].append(row["caption"])
    return captions


def read_pairs(path):
    """{split: {path: [captions]}} of `train` and `val`; a tenth is held out for it if need be."""
    older, file, val = [], path, {}
    try:
        if path.is_dir():
            *older, file = sorted(path.glob("annotations/captions_train20??.json"))
            test = file.with_name(file.name.replace("train", "val"))
            val = read_captions(test) if test.exists() else val
        train = read_captions(file)
    except (ValueError, LookupError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is neither a folder with annotations/captions_train20xx.json nor "
                        "a CSV file in UTF-8 with the header image,caption "
                        f"({type(error).__name__}: {error})") from None
    if older:  # the splits of different years overlap
        print(f"{path} holds several years: taking {file.name}", file=sys.stderr)
    val = val or {image: train.pop(image) for image in list(train)[::10]}
    return {"train": train, "val": val}


def load_photo(path, size):
    """The image as people see it (upright, white where transparent), scaled and centre-cropped:
    (3, size, size) uint8."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor
    with Image.open(path) as image:
        image.draft(None, (2 * size, 2 * size))  # decodes a JPEG no larger than this needs
        image = ImageOps.exif_transpose(image).convert("RGBA")
    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    white = Image.new("RGBA", image.size, "white")
    return pil_to_tensor(Image.alpha_composite(white, image).convert("RGB"))


def decode(pairs, limit, size):
    """What the cache holds: (images, tokens) of each split, five captions an image, repeated if
    there are fewer; the vocabulary; `faults`, what was left out and why."""
    faults = []
    content = {"faults": faults}

    def load(item):
        path, captions = item
        texts = [text for text in captions if isinstance(text, str) and re.search(r"\w", text)]
        if len(texts) < len(captions):
            faults.append(f"{path} (a caption without words)")
        try:
            return load_photo(path, size), [texts[k % len(texts)] for k in range(5)]
        except Exception as error:  # a broken file may raise anything
            faults.append(f"{path} ({error})")

    for split, captions in pairs.items():
        items = list(captions.items())[:limit or None]
        with ThreadPoolExecutor() as pool:  # Pillow decodes without the GIL
            loaded = [*filter(None, tqdm(pool.map(load, items), f"decoding {split}", len(items)))]
        if not loaded:
            raise UserError(f"none of {len(items)} images can be used: {faults[:1]}")
        images, texts = zip(*loaded)
        texts = list(chain(*texts))
        if split == "train":
            content["vocab"] = make_vocab(texts)
        tokens = tokenize(texts, content["vocab"]).unflatten(0, (-1, 5))
        content[split] = (torch.stack(images), tokens)
    return content


def photo_data(cfg):
    """Photographs with their captions, from the cache or decoded into it."""
    path = Path(cfg.data).absolute()
    size = cfg.image_size or 64
    pairs = read_pairs(path)
    # The cache's name is a hash of all that decides what is in it: a stale one is never found.
    dates = [os.path.getmtime(image) for image in chain(*pairs.values()) if os.path.exists(image)]
    facts = repr((__version__, size, cfg.limit, pairs, dates))
    key = hashlib.sha256(facts.encode()).hexdigest()
    cache = Path(cfg.cache).expanduser() / f"{path.stem}-{key}.pt"
    if RANK == 0 and not cache.exists():
        save_whole(decode(pairs, cfg.limit, size), cache)
    if WORLD_SIZE > 1:
        torch.distributed.barrier()  # the first process makes the cache, the others find it
    try:
        found = torch.load(cache, weights_only=True, mmap=True)
    except (RuntimeError, OSError):
        raise UserError(f"{cache} is damaged: delete it") from None
    if found["faults"] and RANK == 0:
        print("warning: left out are", *found["faults"], sep="\n  ", file=sys.stderr)
    return Data(Pairs(*found["train"]), Pairs(*found["val"]), found["vocab"], None)


def load_data(cfg):
    """The Data that cfg names. Raises UserError where it cannot be used."""
    data = scene_data(cfg) if cfg.data == "synthetic" else photo_data(cfg)
    train = len(data.train.images)
    val = len(data.val.images)
    if train < cfg.batch or val < 5:
        raise UserError(f"{train} training and {val} validation images are too few for a batch of "
                        f"{cfg.batch}, or to measure a gap (5)")
    if cfg.same_modality:
        data = data._replace(tasks=None)
        for pairs in (data.train, data.val):
            pairs.texts = pairs.images[:, None]
    if cfg.mismatch:
        torch.manual_seed(cfg.seed)
        data.train.texts = data.train.texts[mismatched(train, cfg.mismatch)]
    return data


# -- 10. Devices and processes ---------------------------------------------------------------------
RANK = int(os.environ.get("RANK") or 0)  # as torchrun sets them, a process each
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)


def gather(rows):
    """The rows (n, D) of every process, (world * n, D), with gradients: the others' rows must not
    be constants, or their part of the gradient is missing. All processes compute the same loss, so
    each has its own rows' part; it is multiplied here, as DDP takes the mean over processes."""
    if WORLD_SIZE == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(WORLD_SIZE)]
    torch.distributed.all_gather(parts, rows.detach())
    parts[RANK] = rows
    rows.register_hook(lambda gradient: WORLD_SIZE * gradient)
    return torch.cat(parts)


def pick_device(name):
    """The torch.device of that name, once this process has joined the others."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"device {name} cannot be used here; try --device cpu") from None
    torch.set_flush_denormal(True)  # most of softmax is below 1e-38, where CPUs are slow
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


# -- 11. Runs --------------------------------------------------------------------------------------
# A folder with metrics.jsonl (a line for each evaluation), checkpoint.pt and figures. In memory a
# run is a dict: cfg, vocab, history, snapshots {step: (2, 256, dim) embeddings of images and texts};
# in the checkpoint with the states of model and optimizer.
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


def save_run(run, model, optimizer):
    """Write metrics.jsonl and checkpoint.pt."""
    folder = Path(run["cfg"].out)
    lines = "".join(json.dumps(record) + "\n" for record in run["history"])
    (folder / "metrics.jsonl").write_text(lines)
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_whole(run | states | {"cfg": asdict(run["cfg"])}, folder / "checkpoint.pt")


def load_run(folder):
    """The run in a folder. Raises UserError if there is none."""
    path = Path(folder, "checkpoint.pt")
    try:
        run = torch.load(path, weights_only=True, map_location="cpu")
        return run | {"cfg": Config(**run["cfg"] | {"out": folder})}
    except Exception as error:  # whatever a missing, broken or foreign file may raise
        raise UserError(f"{path} is not a checkpoint of cgap {__version__}, or is broken "
                        f"({type(error).__name__})") from None


def open_run(cfg, data, model, optimizer, resume):
    """A new run in a new folder or, to resume, that in cfg.out, with its weights put in place."""
    if resume:
        run = load_run(cfg.out)
        if run["vocab"] != data.vocab:
            raise UserError(f"{cfg.out} was trained on other words than {cfg.data} has now")
        model.load_state_dict(run["model"])
        optimizer.load_state_dict(run["optimizer"])
        return run | {"cfg": cfg}
    if RANK == 0:
        try:
            Path(cfg.out).mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"--out {cfg.out} exists: name another, or --resume it") from None
    return {"cfg": cfg, "vocab": data.vocab, "history": [], "snapshots": {}}


# -- 12. The command line --------------------------------------------------------------------------
def check(cfg):
    """Raise UserError for a setting that cannot work."""
    least = {"temperature": 0.01, "dim": 2, "steps": 1, "batch": 2, "eval_every": 1}
    for name, value in vars(cfg).items():
        low = least.get(name, 0)
        high = 1 if name in ("mismatch", "single") else 1e9
        if not isinstance(value, str) and not low <= value <= high:  # nan is not
            raise UserError(f"{name} must be from {low} to {high:g}, not {value}")
    if cfg.batch % WORLD_SIZE:
        raise UserError(f"a batch of {cfg.batch} cannot be split over {WORLD_SIZE} processes")


def print_table(cfg, history):
    """Print each metric at the start and at the end of a run, beside its ideal."""
    ideal = ideals(cfg.dim)
    print(f"\n{cfg.name()}, T = {cfg.temperature:g}, {cfg.steps} steps, seed {cfg.seed}\n"
          f"{'start':>34}{'end':>10}{'ideal':>10}")
    for name, end in history[-1].items():
        best = f"{ideal[name]:10.3f}" if name in ideal else ""
        print(f"{name:24}{history[0][name]:10.3f}{end:10.3f}{best}")


def points(out="runs/points", **settings):
    """Run the smallest gap, print how it ends and draw it."""
    torch.set_num_threads(1)  # so little work is not worth sharing
    torch.set_flush_denormal(True)
    shown = ["linear_separability", "centroid_distance", "effective_temperature"]
    print(f"{'at the end':22}", *shown)
    histories = {}
    for name, offset, weight in (("CLIP", 0, 0), ("CLIP with an offset", 1, 0),
                                 ("CUA", 0, 1), ("CUA with an offset", 1, 1)):
        histories[name] = smallest_gap(offset, unif=weight, align=weight, **settings)
        print(f"{name:22}", *(f"{histories[name][-1][m]:{len(m)}.3f}" for m in shown))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    dim = settings.get("dim", Config.dim)
    plot_histories(histories, shown, dim, out / "points.png", "symlog")
    print(out / "points.png")


def run_command(given):
    """Do what the flags say: a dict of those that were given."""
    useful = {"points": {"temperature", "dim", "seed", "steps", "mismatch", "out"},
              "plot": {"out"}, "resume": {"device"}}
    for mode in useful.keys() & given:
        for name in given.keys() - useful[mode] - {mode}:
            raise UserError(f"--{name} does nothing with --{mode}: leave it out")
    if given.pop("points", False):
        check(Config(**given))
        return points(**given)
    if "plot" in given:
        return plot(given["plot"], given.get("out", "runs/plot"))
    folder = given.pop("resume", None)
    cfg = replace(load_run(folder)["cfg"], **given) if folder else Config(**given)
    try:
        history = train(cfg, resume=bool(folder))
    except KeyboardInterrupt:
        print(f"\ninterrupted: if training had begun, --resume {cfg.out} goes on", file=sys.stderr)
        sys.exit(130)
    if RANK == 0:
        print_table(cfg, history)
        plot([cfg.out], cfg.out)


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser("cgap.py", argparse.SUPPRESS, __doc__.split("\n")[0],
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--points", action="store_true", help="the smallest gap: no encoders")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    parser.add_argument("--plot", metavar="RUN", nargs="+", help="draw a run, or several as one")
    comments = re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", inspect.getsource(Config), re.M)
    for f in fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        text = f"{dict(comments).get(f.name)} (default: {f.default})".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    try:
        run_command(vars(parser.parse_args(argv)))
    except (UserError, OSError) as error:
        parser.error(" ".join(str(error).split()))  # in one line, and exits with 2


if __name__ == "__main__":
    main()
