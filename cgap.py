# SPDX-License-Identifier: MIT
"""The contrastive gap in one file: make it, measure it, find its cause, close it.

CLIP maps a picture and its caption to nearby points of one sphere. Yet pictures end up in one
region of it and captions in another. "It's Not a Modality Gap" (Fahim, Murphy, Fyshe, arXiv
2405.18570) shows that the contrastive loss itself makes this gap, and that two more terms,
uniformity and alignment, close it:

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
# To copy into your own project; it needs nothing else. x_i, y_i: embeddings of pair i.
#   clip    x_i should be more similar to its own y_i than to any other y_j, and the other way round
#   unif    pictures should be far from other pictures, captions from other captions
#   align   x_i and y_i should be close
#   xunif   pictures should be far from the captions of others
# The paper's losses are rows of weights: CLIP; CUA = CLIP + unif + align; CUAXU = CUA + xunif.
import math
import torch
import torch.nn.functional as F


def unit(z, center=False):
    """The rows of z (N, D), without their mean if `center`, at length 1, in float32 or better."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return F.normalize(z - z.mean(0) if center else z, dim=1)


def uniformity(x, y, t=2.0):
    """log mean_{i != j} exp(-t |x_i - y_j|^2) of unit vectors (N, D): a scalar, -4t to 0, lower the
    farther apart they are. Pairs i = j are left out: their distance is 0, or should be. For one
    modality: uniformity(x, x). Source: Wang & Isola, arXiv 2005.10242."""
    N = len(x)
    exponents = 2 * t * (x @ y.T - 1)  # (N, N); on the sphere |a - b|^2 = 2 - 2 a.b
    return exponents.fill_diagonal_(-math.inf).flatten().logsumexp(0) - math.log(N * (N - 1))


def cgap_loss(x, y, temperature=0.01, unif=0.0, align=0.0, xunif=0.0, center=False):
    """CLIP + unif * uniformity + align * alignment + xunif * cross-modal uniformity: the total, a
    scalar to minimise (with unif, often negative), and a dict of its unweighted terms, detached.

    x, y: (N, D) raw embeddings, row i of x paired with row i of y; they are normalised here.
    temperature: a number or, to learn it, a scalar tensor. center: subtract the batch's means first
    (section 3 says why); to use the encoders, subtract means over training pairs (`fold_means`).
    With several processes, x and y must be those of all, with gradients (`gather`): the log of a
    mean is not the mean of logs. Raises ValueError for other shapes. Source: paper's L_CUAXU."""
    if x.shape != y.shape or x.ndim != 2 or len(x) < 2:
        raise ValueError(f"x and y must be (N, D), N > 1, not {(*x.shape,)} and {(*y.shape,)}")
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 errs by .2 at 1 / T = 100
        x, y = unit(x, center), unit(y, center)
        logits = x @ y.T / temperature  # (N, N)
        matched = torch.arange(len(x), device=x.device)
        clip = (F.cross_entropy(logits, matched) + F.cross_entropy(logits.T, matched)) / 2
        terms = {  # name: (weight, value); those of weight 0 are for the log
            "clip": (1.0, clip),
            "unif": (unif, (uniformity(x, x) + uniformity(y, y)) / 2),
            "align": (align, (x - y).square().sum(1).mean()),
            "xunif": (xunif, uniformity(x, y))}
    total = sum(weight * value for weight, value in terms.values() if weight)
    return total, {name: value.detach() for name, (_, value) in terms.items()}


# -- 2. Measuring the gap --------------------------------------------------------------------------
# One number is not enough: clouds with one centre can be told apart; clouds that nobody can tell
# apart can sit in a corner, where all pairs are close.
def fit_logistic(z, labels, C):
    """The w (D,) that minimises |w'|^2 / 2 + C sum_i log(1 + exp(-s_i z_i.w)), by Newton's method.
    z: (N, D), its last column 1, for the bias, which w' lacks. labels: 0 or 1 for s = -1 or 1."""
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
    """Accuracy of a logistic regression that tells x from y, unit vectors (N, D), on a fifth of the
    pairs, held out. 1 is a complete gap, 0.5 none. The authors' C = 1 misses tiny gaps."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    z = F.pad(torch.stack([x, y], 1)[order], (0, 1), value=1.0)  # (N, 2, D + 1)
    labels = torch.arange(2.0, dtype=z.dtype)
    k = int(0.8 * len(x))
    w = fit_logistic(z[:k].flatten(0, 1), labels.repeat(k), C)
    return ((z[k:] @ w > 0) == labels).double().mean()


@torch.no_grad()
def gap_metrics(x, y):
    """All measures of the gap between paired embeddings x, y (N, D), as a dict of floats.

    centroid_distance     |mean x - mean y|, 0 to 2
    linear_separability   can a classifier tell them apart? 0.5 never, 1 always; _c100: C = 100
    alignment             mean |x_i - y_i|^2, 0 to 4; the pairs' mean cosine is 1 - alignment / 2
    uniformity_image, uniformity_text, cross_uniformity   -8 to 0
    effective_rank        dimensions that x uses, 1 to D: exp of the entropy of its variances
    x, y are normalised here; about 30 N^2 bytes. Raises ValueError for other shapes, N < 5, D < 2,
    a row that is zero or not finite. Source: the paper; the last, Roy & Vetterli 2007."""
    x, y = x.cpu().double(), y.cpu().double()  # the CPU first: MPS has no float64
    if (x.shape != y.shape or x.ndim != 2 or len(x) < 5 or x.shape[1] < 2
            or not torch.cat([x, y]).norm(dim=1).log().isfinite().all()):
        raise ValueError("x and y must be (N, D), N > 4, D > 1, without a row that is zero or not "
                         f"finite, not {(*x.shape,)} and {(*y.shape,)}")
    x, y = unit(x), unit(y)
    variances = torch.linalg.eigvalsh(torch.cov(x.T)).clamp(min=0)  # on the principal axes
    shares = variances / variances.sum().clamp(min=1e-30)
    metrics = {
        "centroid_distance": (x.mean(0) - y.mean(0)).norm(),
        "linear_separability": linear_separability(x, y),
        "linear_separability_c100": linear_separability(x, y, C=100.0),
        "alignment": (x - y).square().sum(1).mean(),
        "uniformity_image": uniformity(x, x), "uniformity_text": uniformity(y, y),
        "cross_uniformity": uniformity(x, y),
        "effective_rank": torch.special.entr(shares).sum().exp()}
    return {name: value.item() for name, value in metrics.items()}


def ideals(dim):
    """gap_metrics of 2,000 perfect pairs, uniform on the sphere (uniformity -3.94 at d = 128)."""
    x = torch.randn(2000, dim, generator=torch.Generator().manual_seed(0))
    return gap_metrics(x, x)


@torch.no_grad()
def effective_temperature(x, y, temperature):
    """T / sqrt((1 - |mean x|^2) (1 - |mean y|^2)) of embeddings (N, D), normalised here: about the
    temperature that softmax feels. What tells pairs apart is what remains without the means, of
    mean square 1 - |mean|^2. Their cosines, once renormalised, are divided by this, not by T."""
    x, y = unit(x), unit(y)
    rest = (1 - x.mean(0).square().sum()) * (1 - y.mean(0).square().sum())
    return float(temperature / rest.clamp(min=1e-12).sqrt())


def recall(x, y, group):
    """R@1: how often x_i's nearest y shares its group. Unit vectors (N, D); group: (N,) ints."""
    return (group[(x @ y.T).argmax(1)] == group).float().mean().item()


@torch.no_grad()
def mixed_recall(x, y, group=None):
    """R@1 in one index of images and texts, which unlike `recall` feels a gap: how often the item
    nearest to x_i (or y_i) is a right partner of the other modality; two floats. Excluded: itself
    and others of its modality and group. x, y: (N, D), normalised here; about 25 N^2 bytes.
    group: (N,) integers, equal for equal captions. After arXiv 2507.19054."""
    both = torch.cat([unit(x), unit(y)])  # (2 N, D)
    group = torch.arange(len(x), device=x.device) if group is None else group
    same = group[:, None] == group
    cosines = (both @ both.T).masked_fill_(torch.block_diag(same, same), -math.inf)
    right = group.repeat(2)[cosines.argmax(1)] == group.repeat(2)
    return right.view(2, -1).float().mean(1).tolist()


# -- 3. The smallest gap ---------------------------------------------------------------------------
# No encoders, only points that the loss moves as it likes. Left alone, they open no gap. Give each
# side one vector that all its points share, like an encoder's bias, and within a few steps they are
# two clouds, at any T (in 128 dimensions). What matters most is how fast these vectors move,
# compared with the points: at 1/64 of their learning rate hardly any gap opens.
# Why two directions, not one common corner? What the two vectors add to the logits is largely the
# same for all pairs, and softmax does not see a constant: they need not agree. It is not quite
# constant, and where T is high the gap closes again. At T = 0.01 it stays for thousands of steps:
# while pairs do not fit, shared vectors lower the loss by raising the effective temperature
# (section 2). The recipe: `center` hides them from the loss: no gap opens; T gives the warmth.
def smallest_gap(offset=1.0, temperature=0.01, dim=128, n=512, batch=64, steps=600, seed=0,
                 mismatch=0.0, **weights):
    """Train n pairs of free points, at first in one cone, and an offset for each side, at first 0.
    offset: its learning rate, as a multiple of the points'. temperature: a number or a function of
    the step. mismatch: the share of y permuted, anew at each step. weights: cgap_loss's.
    Returns a list of dicts: `step`, `effective_temperature`, gap_metrics."""
    torch.manual_seed(seed)
    cone = torch.randn(dim) / dim ** 0.5
    points = (cone + 0.3 / dim ** 0.5 * torch.randn(2, n, dim)).requires_grad_()
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
    """The partner of each of n, (n,): itself or, for a random share, another."""
    partner = torch.arange(n)
    chosen = torch.randperm(n)[:int(share * n)]
    partner[chosen] = chosen.roll(1)
    return partner


# -- 4. Two small encoders -------------------------------------------------------------------------
# Neither has a BatchNorm: samples meet in the loss alone.
CONTEXT = 32  # words in a caption; longer ones are cut


class ImageEncoder(nn.Module):
    """A convolutional network: uint8 images (B, 3, S, S) to embeddings (B, dim)."""
    def __init__(self, dim):
        super().__init__()
        layers = []
        for c_in, c_out, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, 1), nn.GroupNorm(8, c_out), nn.GELU()]
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
    """Encoders for images and texts (or, `same_modality`, images again), and a temperature."""
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


@torch.no_grad()
def remove_initial_gap(model, images, texts):
    """Move the second cloud y onto x, in place: mean, spread, direction (orthogonal Procrustes)."""
    x, y = encode(model.image, images), encode(model.text, texts)
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    u, _, vt = torch.linalg.svd(y.T @ x)
    turn = (u @ vt).T * x.norm() / y.norm()
    last = model.text.projection  # W h + b becomes turn (W h + b - mean_y) + mean_x
    last.weight.copy_(turn @ last.weight)
    last.bias.copy_(turn @ (last.bias - mean_y) + mean_x)


def fold_means(model, images, texts):
    """Give both encoders a mean of 0 over these pairs, in place. A centred loss does not see it."""
    for encoder, inputs in ((model.image, images), (model.text, texts)):
        bias = encoder.projection.bias.data
        bias -= encode(encoder, inputs).mean(0).to(bias.device)


# -- 5. Scenes -------------------------------------------------------------------------------------
# One or two coloured shapes and an exact caption: perfect pairs, though a batch may hold one twice.
@dataclass
class Pairs:
    """Images with K texts each: captions, or the image again."""
    images: torch.Tensor  # (N, 3, S, S) uint8
    texts: torch.Tensor  # (N, K, L) int32, padded with 0, or (N, 1, 3, S, S) uint8

    def batch(self, i, epoch=0):
        """Images i (indices or a slice), each with one of its texts, another in each epoch."""
        return self.images[i], self.texts[i, epoch % self.texts.shape[1]]


Data = namedtuple("Data", "train val vocab tasks")  # Pairs, Pairs, {word: number}, Tasks or None
# Zero-shot: prompts[labels[i]] should be nearest to images[i]. Arithmetic: image pool[query[q]] +
# text new[q] - text old[q] (words, then captions) must be nearest to a pool[i] with correct[q, i].
Tasks = namedtuple("Tasks", "images labels prompts pool query old new correct")
WORD = re.compile(r"\w+|[^\w\s]")  # "a dog's bowl." -> a, dog, ', s, bowl, .


def make_vocab(captions):
    """{word: number} of the 10,000 most frequent words, after padding and unknown."""
    counts = Counter(word for text in captions for word in WORD.findall(text.lower()))
    known = sorted(word for word, _ in counts.most_common(10_000))
    return {word: number for number, word in enumerate(["<pad>", "<unk>", *known])}


def tokenize(captions, vocab):
    """Tokens (len(captions), L), int32, of the first CONTEXT words, padded with 0."""
    rows = []
    for text in captions:
        numbers = [vocab.get(word, 1) for word in WORD.findall(text.lower())[:CONTEXT]]
        rows.append(torch.tensor(numbers, dtype=torch.int32))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


PALETTE = {"red": (.85, .10, .10), "green": (.10, .65, .15), "blue": (.15, .25, .90),
           "yellow": (.95, .90, .15), "purple": (.60, .15, .75), "cyan": (.15, .85, .90),
           "white": (1., 1., 1.), "black": (0., 0., 0.)}
SHAPES = ["circle", "square", "triangle", "diamond", "cross", "ring"]
RELATIONS = ["left of", "above"]  # with "right of", too, one scene would have two captions
WORDS = [list(PALETTE), SHAPES, list(PALETTE), SHAPES, RELATIONS]  # of the columns of scenes
OBJECTS = torch.cartesian_prod(torch.arange(len(PALETTE)), torch.arange(len(SHAPES)))  # (48, 2)
UNSEEN = OBJECTS[:, 0] % len(SHAPES) == OBJECTS[:, 1]  # one for each colour: never in training
# Centres (x, y) of both objects: one alone, side by side, one above the other; and +- how much
PLACES = torch.tensor([[[.5, .5], [.5, .5]], [[.25, .5], [.75, .5]], [[.5, .25], [.5, .75]]])
JITTER = torch.tensor([[.2, .2], [.04, .15], [.15, .04]])


def masks(u, v):
    """What is inside each of the SHAPES, for u to the right and v down, -1 to 1: (6, ...)."""
    a, b = u.abs(), v.abs()
    return torch.stack([u * u + v * v < 1, torch.maximum(a, b) < .85,
                        (v < .85) & (2 * a - v < 1), 1.5 * a + b < 1.1,
                        (torch.minimum(a, b) < .3) & (torch.maximum(a, b) < 1),
                        (u * u + v * v - .72).abs() < .28])


def describe(scenes):
    """The captions of scenes (N, 5): colour, shape, colour, shape, relation (-1: one only)."""
    captions = []
    for scene in scenes.tolist():
        words = [names[k] for names, k in zip(WORDS, scene)]
        second = f" {words[4]} a {words[2]} {words[3]}" if scene[4] >= 0 else ""
        captions.append(f"a {words[0]} {words[1]}{second}")
    return captions


def random_scenes(n, single):
    """n scenes (n, 5) without unseen objects, a share `single` of them with one object."""
    seen = OBJECTS[~UNSEEN]
    objects = seen[torch.randint(len(seen), (n, 2))].flatten(1)  # (n, 4)
    relation = torch.randint(len(RELATIONS), (n, 1))
    relation[torch.rand(n) < single] = -1
    return torch.cat([objects, relation], 1)


def draw_scenes(scenes, size):
    """Images (N, 3, size, size), uint8, jittered in position, size and colour, noisy."""
    palette = torch.tensor(list(PALETTE.values()))
    axis = (torch.arange(size) + .5) / size
    images = []
    for part in scenes.split(256):  # small enough to stay in the processor's cache
        n = len(part)
        kind = part[:, 4] + 1  # 0 alone, 1 side by side, 2 one above the other
        centre = PLACES[kind] + JITTER[kind][:, None] * (2 * torch.rand(n, 2, 2) - 1)  # (n, 2, xy)
        radius = .2 + .03 * (2 * torch.rand(n, 2, 1, 1) - 1)
        image = .5 + .15 * (2 * torch.rand(n, 1, 1, 1) - 1)
        for k in (0, 1):
            across, down = ((axis - centre[:, k, :, None]) / radius[:, k]).unbind(1)  # (n, size)
            inside = masks(across[:, None], down[..., None])[part[:, 2 * k + 1], torch.arange(n)]
            inside &= (kind >= k)[:, None, None]  # (n, size, size)
            colour = palette[part[:, 2 * k]] + .08 * torch.randn(n, 3)
            image = torch.where(inside[:, None], colour[..., None, None], image)
        noisy = image + .05 * torch.randn(image.shape)
        images.append((noisy * 255).clamp(0, 255).byte())
    return torch.cat(images)


def scene_tasks(size, vocab, n=200):
    """Zero-shot: single objects. Arithmetic: n scenes, each edited once in each word."""
    single = F.pad(OBJECTS, (0, 3), value=-1)
    labels = torch.arange(len(single)).repeat(20)
    images = draw_scenes(single[labels], size)
    scenes = random_scenes(2 * n, 0.0)
    scenes = scenes[(scenes[:, :2] != scenes[:, 2:4]).all(1)][:n]  # a word then names one object
    query = torch.arange(len(scenes)).repeat(len(WORDS))
    edited = scenes[query]
    old, new = [], []
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
    """20,000 scenes to train on, 2,000 to validate (new drawings, few new captions); both tasks."""
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
    """All settings of a run. Each is a command-line flag; its comment is the help text."""
    unif: float = 0.0  # weight of uniformity; CUA is --unif 1 --align 1
    align: float = 0.0  # weight of alignment
    xunif: float = 0.0  # weight of cross-modal uniformity; CUAXU is all three
    center: bool = False  # the loss sees embeddings without their batch's mean
    temperature: float = 0.01  # T of the CLIP loss; its start, if learned
    learn_temperature: bool = False  # learn T, at 0.01 or above
    data: str = "synthetic"  # or an MS-COCO folder or a CSV file (header image,caption)
    limit: int = 0  # cap on training and validation images each; 0: all
    mismatch: float = 0.0  # share of training images with wrong captions
    single: float = 0.1  # share of scenes with a single object
    image_size: int = 0  # side of the images; 0: 32 (scenes) or 64 (photographs)
    cache: str = "~/.cache/cgap"  # folder for decoded photographs
    dim: int = 128  # dimension of the shared space
    same_modality: bool = False  # a second image encoder instead of the one for texts
    remove_gap: bool = False  # start without the untrained encoders' gap
    steps: int = 1500  # training steps
    batch: int = 64  # pairs in a batch, over all processes
    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.1  # of matrices
    seed: int = 0  # of scenes, weights and batches
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda, cuda:N or mps
    compile: bool = False  # torch.compile the encoders and the loss
    eval_every: int = 250  # steps between evaluations (of 5,000 pairs at most) and checkpoints
    out: str = ""  # new folder of the run; else runs/<time>-<loss>-seed<seed>

    def __post_init__(self):
        self.data = str(self.data)
        now = time.strftime("%Y%m%d-%H%M%S")
        self.out = str(self.out or f"runs/{now}-{self.name()}-seed{self.seed}")

    def weights(self):
        """{argument of cgap_loss between temperature and center: weight}: its terms, and yours."""
        names = [*inspect.signature(cgap_loss).parameters][3:-1]
        return {name: getattr(self, name) for name in names}

    def name(self):
        """The loss in short, for folders and legends."""
        spelled = "+".join(f"{value:g}{name}" for name, value in self.weights().items() if value)
        known = {"": "CLIP", "1unif+1align": "CUA", "1unif+1align+1xunif": "CUAXU"}
        return known.get(spelled, "CLIP+" + spelled) + "-centred" * self.center


# -- 7. Training (gather, autocast, RANK, WORLD_SIZE: section 10) ----------------------------------
def do_tasks(model, tasks):
    """Accuracies in zero-shot and in arithmetic (words for attributes, for relations; captions)."""
    scores = unit(encode(model.image, tasks.images)) @ unit(encode(model.text, tasks.prompts)).T
    named = (scores.argmax(1) == tasks.labels).float()
    pool = unit(encode(model.image, tasks.pool))
    edit = unit(encode(model.text, tasks.new)) - unit(encode(model.text, tasks.old))
    scores = (pool[tasks.query] + edit) @ pool.T
    scores.scatter_(1, tasks.query[:, None], -math.inf)  # the query itself is no answer
    found = tasks.correct.gather(1, scores.argmax(1, keepdim=True)).float()
    words, captions = found.view(2, len(WORDS), -1)
    right = {"zero_shot": named, "zero_shot_unseen": named[UNSEEN[tasks.labels]],
             "arithmetic_attribute": words[:-1], "arithmetic_relation": words[-1],
             "arithmetic_caption": captions}
    return {name: values.mean().item() for name, values in right.items()}


def evaluate(model, data, cfg):
    """The loss on training pairs, the gap and retrieval on validation pairs, the tasks: a dict."""
    T = torch.exp(-model.log_scale).item()
    images, texts = data.train.batch(slice(cfg.batch))
    loss, terms = cgap_loss(encode(model.image, images), encode(model.text, texts), T,
                            **cfg.weights(), center=cfg.center)
    if not loss.isfinite():
        raise UserError("the loss is not finite: lower --lr or raise --temperature")
    images, texts = data.val.batch(slice(5000))
    x, y = unit(encode(model.image, images)), unit(encode(model.text, texts))
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
    """This process's rows of a step's batch, and the epoch: no state, so any step can be next."""
    epoch, k = divmod(step, n // cfg.batch)
    g = torch.Generator().manual_seed(1_000_003 * cfg.seed + epoch)
    return torch.randperm(n, generator=g).split(cfg.batch)[k][RANK::WORLD_SIZE], epoch


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
    """Take a snapshot for the figures and, less often, evaluate and save a checkpoint."""
    cfg = run["cfg"]
    is_last = step == cfg.steps
    evaluation = is_last or step % cfg.eval_every == 0
    snapshot = is_last or step % math.ceil(cfg.steps / 30) == 0
    if cfg.center and (evaluation or snapshot):  # the loss cannot see it
        fold_means(model, *data.train.batch(slice(2048 if evaluation else 256)))
    if snapshot and RANK == 0:
        images, texts = data.val.batch(slice(256))
        both = torch.stack([unit(encode(model.image, images)), unit(encode(model.text, texts))])
        run["snapshots"][step] = both.half()  # (2, 256, dim)
    if evaluation and RANK == 0:
        record = {"step": step, **evaluate(model, data, cfg)}
        run["history"].append(record)
        with open(Path(cfg.out, "metrics.jsonl"), "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in run["history"])
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_whole(run | states | {"cfg": asdict(cfg)}, Path(cfg.out, "checkpoint.pt"))
        if not quiet:
            tqdm.write("step {step:6}   loss {loss:7.3f}   separability {linear_separability:.3f}"
                       "   centroids {centroid_distance:.3f}   R@1 {i2t_r1:.3f}".format(**record))


def train(cfg, resume=False, model=None, data=None, quiet=False):
    """Train two encoders; returns the history, a list of dicts of metrics. resume: go on with the
    run in cfg.out. model, data: your own. Raises UserError for settings that cannot work."""
    check(cfg)
    device = pick_device(cfg.device)
    data = data or load_data(cfg)
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
    """A matplotlib figure of n panels, `columns` a row, and the list of them."""
    from matplotlib.figure import Figure
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(4.2 * columns, 4 * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, k + 1) for k in range(n)]


def plot_histories(histories, metrics, dim, path, xscale="linear"):
    """A panel for each metric, a line for each of {name: history}, the ideal dotted."""
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
        axis.set_xlim(0)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path)


def draw_pairs(axis, run, number):
    """Snapshot `number`, or the last, in the plane of 0 and both means; grey joins pairs."""
    step, both = list(run["snapshots"].items())[:number][-1]
    x, y = both.float().mean(1)  # of (2, n, D)
    Q, R = torch.linalg.qr(torch.stack([y - x, y + x], 1))
    points = both.float() @ (Q * R.diagonal().sign())  # (2, n, 2)
    ends = F.pad(points[:, :100], (0, 0, 0, 0, 0, 1), value=math.nan)  # nan ends a line
    axis.clear()
    axis.plot(*ends.transpose(0, 1).flatten(0, 1).T, color="0.8", linewidth=0.5)
    for cloud, marker, label in zip(points, "o^", ("images", "texts")):
        axis.plot(*cloud.T, marker, markersize=3, label=label)
    axis.axis([-1, 1, -1, 1])
    axis.set(aspect="equal", xlabel="along the gap",
             title=f"{run['cfg'].name()}\nstep {step}: centroids {(y - x).norm():.2f} apart")
    axis.legend(loc="lower right")


def animate(runs, path):
    """All of training, the runs side by side, as path.gif; its end as path.png."""
    from matplotlib.animation import FuncAnimation
    figure, axes = canvas(len(runs), len(runs))

    def frame(k):
        for axis, run in zip(axes, runs):
            draw_pairs(axis, run, k + 1)
    frames = max(len(run["snapshots"]) for run in runs) + 5  # it rests at the end
    FuncAnimation(figure, frame, frames).save(f"{path}.gif", "pillow", dpi=80)
    figure.savefig(f"{path}.png")


def plot(folders, out):
    """All figures of one run or several."""
    runs = [load_run(folder) for folder in folders]
    os.makedirs(out, exist_ok=True)
    histories = {run["cfg"].out: run["history"] for run in runs}
    shown = ["linear_separability", "centroid_distance", "effective_rank", "i2t_r1",
             "mixed_i2t", "loss", "clip", *runs[-1]["cfg"].weights()]
    plot_histories(histories, shown, runs[0]["cfg"].dim, f"{out}/gap.png")
    animate(runs, f"{out}/embeddings")
    print(f"{out}: gap.png, embeddings.gif, embeddings.png")


# PART TWO: THE MACHINERY ==========================================================================
# -- 9. Photographs, decoded once into a cache that later runs map ---------------------------------
class UserError(Exception):
    """A mistake of the user's: the command line prints it as one line and exits with 2."""


def read_captions(file):
    """{path: [captions]} of MS-COCO's JSON file, or of a CSV file, whose paths are relative."""
    captions = defaultdict(list)
    if file.suffix == ".json":
        content = json.loads(file.read_bytes())
        folder = file.parents[1] / file.stem.removeprefix("captions_")
        paths = {image["id"]: folder / image["file_name"] for image in content["images"]}
        for note in content["annotations"]:
            captions[paths[note["image_id"]]].append(note["caption"])
    else:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            for row in csv.DictReader(lines):
                if None in row:
                    raise ValueError(f"more than two fields: {row}")
                captions[file.parent / row["image"]].append(row["caption"])
    return captions


def read_pairs(path):
    """{split: {path: [captions]}} of `train` and `val`; if need be, a tenth is held out."""
    older, file, val = [], path, {}
    try:
        if path.is_dir():
            *older, file = sorted(path.glob("annotations/captions_train20??.json"))
            test = file.with_name(file.name.replace("train", "val"))
            val = read_captions(test) if test.exists() else val
        train = read_captions(file)
    except (ValueError, LookupError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: no annotations/captions_train20xx.json below it, nor a CSV file "
                        f"with header image,caption ({type(error).__name__}: {error})") from None
    if older:  # the splits of different years overlap
        print(f"{path} holds several years: taking {file.name}", file=sys.stderr)
    val = val or {image: train.pop(image) for image in list(train)[::10]}
    return {"train": train, "val": val}


def load_photo(path, size):
    """The image, upright, white where transparent, scaled, cropped: (3, size, size) uint8."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor
    with Image.open(path) as image:
        image.draft(None, (2 * size, 2 * size))  # decodes a JPEG no larger than this needs
        image = ImageOps.exif_transpose(image).convert("RGBA")
    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    white = Image.new("RGBA", image.size, "white")
    return pil_to_tensor(Image.alpha_composite(white, image).convert("RGB"))


def decode(pairs, limit, size):
    """For the cache: (images, tokens) of each split, with five captions an image; vocab; faults."""
    content = {"faults": []}

    def load(item):
        path, captions = item
        texts = [text for text in captions if isinstance(text, str) and re.search(r"\w", text)]
        if len(texts) < len(captions):
            content["faults"].append(f"{path} (a caption without words)")
        try:
            return load_photo(path, size), [texts[k % len(texts)] for k in range(5)]
        except Exception as error:  # a broken file may raise anything
            content["faults"].append(f"{path} ({error})")

    for split, captions in pairs.items():
        items = list(captions.items())[:limit or None]
        with ThreadPoolExecutor() as pool:  # Pillow decodes without the GIL
            loaded = [*filter(None, tqdm(pool.map(load, items), f"decoding {split}", len(items)))]
        if not loaded:
            raise UserError(f"none of {len(items)} images can be used: {content['faults'][:1]}")
        images, texts = zip(*loaded)
        texts = list(chain(*texts))
        if split == "train":
            content["vocab"] = make_vocab(texts)
        tokens = tokenize(texts, content["vocab"])  # (5 N, L)
        content[split] = (torch.stack(images), tokens.unflatten(0, (-1, 5)))
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
    """The Data that cfg asks for. Raises UserError where they cannot be used."""
    data = scene_data(cfg) if cfg.data == "synthetic" else photo_data(cfg)
    train, val = len(data.train.images), len(data.val.images)
    if train < cfg.batch or val < 5:
        raise UserError(f"too few images: {train} for a batch of {cfg.batch}, {val} to measure (5)")
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
    """The rows (n, D) of all processes, (world * n, D), with the gradient of one's own."""
    if WORLD_SIZE == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(WORLD_SIZE)]
    torch.distributed.all_gather(parts, rows.detach())
    parts[RANK] = rows
    rows.register_hook(lambda gradient: WORLD_SIZE * gradient)  # as DDP takes the mean
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
        torch.distributed.init_process_group(timeout=timedelta(days=1))  # the first may decode long
    return device


def autocast(device):
    """bfloat16 where a GPU has it natively, else nothing."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


# -- 11. Runs --------------------------------------------------------------------------------------
# A folder with metrics.jsonl (a line for each evaluation), checkpoint.pt and figures. In memory a
# dict: cfg, vocab, history, snapshots {step: (2, 256, dim) embeddings of images and texts}.
def save_whole(content, path):
    """torch.save, but that name has a whole file at every instant."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            torch.save(content, file)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def load_run(folder):
    """The run in a folder. Raises UserError if there is none."""
    path = Path(folder, "checkpoint.pt")
    try:
        run = torch.load(path, weights_only=True, map_location="cpu")
        return run | {"cfg": Config(**run["cfg"] | {"out": folder})}
    except Exception as error:  # whatever a missing, broken or foreign file may raise
        raise UserError(f"{path} is no checkpoint of this cgap ({type(error).__name__})") from None


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
        if os.path.exists(cfg.out):
            raise UserError(f"--out {cfg.out} exists: name another, or --resume it")
        os.makedirs(cfg.out)  # fails if another run is first
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
    os.makedirs(out, exist_ok=True)
    plot_histories(histories, shown, settings.get("dim", Config.dim), f"{out}/points.png", "symlog")
    print(f"{out}/points.png")


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
        ideal = ideals(cfg.dim)
        print(f"\n{cfg.name()}, T = {cfg.temperature:g}, seed {cfg.seed}")
        print(f"{'start':>34}{'end':>10}{'ideal':>10}")
        for name, end in history[-1].items():
            best = f"{ideal[name]:10.3f}" if name in ideal else ""
            print(f"{name:24}{history[0][name]:10.3f}{end:10.3f}{best}")
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
