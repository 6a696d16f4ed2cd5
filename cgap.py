# SPDX-License-Identifier: MIT
"""The contrastive gap in one file: make it, measure it, see why it opens, close it.

CLIP is to map a picture and its caption to nearby points of one sphere. Yet pictures end up in one
region of it and all captions in another. "It's Not a Modality Gap" (Fahim, Murphy, Fyshe, arXiv
2405.18570) shows that the contrastive loss itself makes this gap, and that two more terms,
uniformity and alignment, close it:
    python cgap.py --points                  # the smallest gap: no encoders, some seconds
    python cgap.py                           # two encoders and the CLIP loss: a gap
    python cgap.py --unif 1 --align 1        # two more terms: it closes

Part one, the paper                          Part two, the machinery
  1. The loss, to copy                         7. Scenes: drawn pictures with exact captions
  2. Measuring the gap                         8. Words, and photographs: COCO or a CSV file
  3. The smallest gap: points, no encoders     9. Devices and processes
  4. Two small encoders                       10. Runs: folders, checkpoints, models to use
  5. Settings and pairs                       11. Figures
  6. Training and evaluation                  12. The command line
"""
import argparse, csv, functools, hashlib, json, os, re, sys, unicodedata
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path
from tqdm import tqdm
__version__ = "4.0"

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
from torch import nn

def as_pairs(x, y):
    """x and y, (N, D), row i of x paired with row i of y, as tensors of float32 or better. Raises
    ValueError for other shapes: they may give a number, too, but a wrong one."""
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if x.shape != y.shape or x.ndim != 2 or len(x) < 2:
        raise ValueError("x and y must both be (N, D), N > 1, a row for each pair (of an image's "
                         f"captions, take one), not {tuple(x.shape)} and {tuple(y.shape)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(dtype), y.to(dtype)

def unit(z, center=False):
    """The rows of z (N, D), without their mean if `center`, at length 1."""
    return F.normalize(z - z.mean(0) if center else z, dim=1)

def clip_loss(x, y, temperature):
    """The cross-entropy of finding each one's partner in the batch, both ways, of unit vectors
    (N, D): a scalar, 0 if perfect, ln N for a guess. Source: Radford et al., arXiv 2103.00020."""
    logits = x @ y.T / temperature  # (N, N)
    matched = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, matched) + F.cross_entropy(logits.T, matched)) / 2

def uniformity(x, y, t=2.0):
    """log mean_{i != j} exp(-t |x_i - y_j|^2) of unit vectors (N, D): a scalar, -4t to 0, lower the
    farther apart they are. Pairs i = j are left out: their distance is 0, or should be. For one
    modality: uniformity(x, x). Raises as `as_pairs`. Source: Wang & Isola, arXiv 2005.10242."""
    x, y = as_pairs(x, y)
    N = len(x)
    exponents = 2 * t * (x @ y.T - 1)  # (N, N); on the sphere |a - b|^2 = 2 - 2 a.b
    others = ~torch.eye(N, dtype=torch.bool, device=x.device)
    total = exponents.masked_fill(~others, -math.inf).flatten().logsumexp(0)
    # Their number, not from math.log, to which torch.compile would give N as a constant
    return total - others.sum(dtype=x.dtype).log()

def alignment(x, y):
    """mean_i |x_i - y_i|^2 of unit vectors (N, D), 0 to 4: 2 - 2 mean cosine (Wang & Isola)."""
    return (x - y).square().sum(1).mean()

def cgap_loss(x, y, temperature=0.01, unif=0.0, align=0.0, xunif=0.0, center=False):
    """CLIP + unif * uniformity + align * alignment + xunif * cross-modal uniformity: a scalar to
    minimise, often negative. x, y: (N, D) raw embeddings, row i of x paired with row i of y; they
    are normalised here. temperature: T, not 1 / T: a number up to 1 or, to learn it, a scalar
    tensor. center: subtract the batch's means first (then see `fold_means`, section 4). Of several
    processes, give the rows of all, with gradients (`gather`, section 9): the log of a mean is not
    the mean of logs. Raises ValueError for other shapes or T above 1. Source: paper's L_CUAXU."""
    if isinstance(temperature, (int, float)) and not 0 < temperature <= 1:
        raise ValueError(f"temperature is T, at most 1, not 1 / T: it is {temperature}")
    x, y = as_pairs(x, y)
    with torch.autocast(x.device.type, enabled=False):  # bfloat16's logits err by .2 at T = .01
        x, y = unit(x, center), unit(y, center)
        loss = clip_loss(x, y, temperature)
        if unif:  # what has no weight is not computed: it takes time
            loss = loss + unif * (uniformity(x, x) + uniformity(y, y)) / 2
        if align:
            loss = loss + align * alignment(x, y)
        if xunif:
            loss = loss + xunif * uniformity(x, y)
    return loss

# -- 2. Measuring the gap --------------------------------------------------------------------------
# No number tells all. Clouds with one centre can be told apart; clouds that nobody can tell apart
# can be narrow, or lie in directions of their own. Whatever measures takes tensors or arrays.
def measurable(x, y, least=2):
    """x and y as unit vectors; ValueError if a measure of them would mean nothing."""
    x, y = as_pairs(x, y)
    if len(x) < least or x.shape[1] < 2:
        raise ValueError(f"x and y must be (N, D), N >= {least}, D > 1, not {tuple(x.shape)}")
    lengths = torch.stack([x, y]).norm(dim=2)
    bad = ((lengths == 0) | ~lengths.isfinite()).any(0).nonzero()
    if len(bad):
        raise ValueError(f"row {bad[0].item()} of x or y is zero or not finite, as {len(bad)} of "
                         f"{len(x)} are: leave these pairs out")
    return unit(x), unit(y)

def fit_logistic(z, labels, C):
    """The w (D,) that minimises |w'|^2 / 2 + C sum_i log(1 + exp(-s_i z_i.w)), by Newton's method.
    z: (N, D), its last column 1, for the bias, which w' lacks. labels: 0 or 1 for s = -1 or 1."""
    ridge, w = torch.ones_like(z[0]), torch.zeros_like(z[0])
    ridge[-1] = 0
    for _ in range(25):
        p = torch.sigmoid(z @ w)
        gradient = ridge * w + C * z.T @ (p - labels)
        hessian = ridge.diag() + C * (z.T * (p * (1 - p))) @ z
        w = w - torch.linalg.solve(hessian, gradient)
    return w

def linear_separability(x, y, C=1.0):
    """Accuracy of a logistic regression that tells x from y (N, D), normalised here, on a fifth of
    the pairs, held out. 1 is a complete gap, 0.5 none. The authors' C = 1 misses tiny gaps."""
    x, y = measurable(x, y, least=5)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    z = F.pad(torch.stack([x, y], 1)[order], (0, 1), value=1.0)  # (N, 2, D + 1)
    labels = torch.arange(2.0, dtype=z.dtype, device=z.device)
    k = int(0.8 * len(x))
    w = fit_logistic(z[:k].flatten(0, 1), labels.repeat(k), C)
    return ((z[k:] @ w > 0) == labels).double().mean().item()

@torch.no_grad()
def gap_metrics(x, y):
    """All measures of the gap between paired embeddings x, y (N, D), as a dict of floats:
    linear_separability   can a classifier tell them apart? 0.5 never, 1 always; _c100: C = 100
    centroid_distance     |mean x - mean y|, 0 to 2
    unif, align, xunif    the terms of the loss: uniformity (mean of both), alignment, across
    margin                mean cosine of pairs less that of strangers, -2 to 2: Tr Cov(x, y)
    spread                what is left without the means, sqrt(Tr Cov(x) Tr Cov(y)): 0 is a point
    agreement             margin / spread, -1 to 1: do the two sides vary together?
    overlap               the cosine of Cov(x) and Cov(y): 0 if each side has directions of its own
    x, y are normalised here; about 30 N^2 bytes. Raises ValueError for other shapes, N < 5, D < 2,
    a row that is zero or not finite. Source: the paper; the last four are identities of ours."""
    x, y = measurable(*(torch.as_tensor(z).cpu().double() for z in (x, y)), least=5)
    dx, dy = x - x.mean(0), y - y.mean(0)
    cov_x, cov_y, cov_xy = (a.T @ b / (len(x) - 1) for a, b in ((dx, dx), (dy, dy), (dx, dy)))
    spread = (cov_x.trace() * cov_y.trace()).sqrt()
    metrics = {
        "linear_separability": linear_separability(x, y),
        "linear_separability_c100": linear_separability(x, y, C=100.0),
        "centroid_distance": (x.mean(0) - y.mean(0)).norm(),
        "unif": (uniformity(x, x) + uniformity(y, y)) / 2,
        "align": alignment(x, y), "xunif": uniformity(x, y),
        "margin": cov_xy.trace(), "spread": spread,
        "agreement": cov_xy.trace() / spread.clamp(min=1e-12),  # a point agrees with nothing
        "overlap": (cov_x * cov_y).sum() / (cov_x.norm() * cov_y.norm()).clamp(min=1e-24)}
    return {name: float(value) for name, value in metrics.items()}

@torch.no_grad()
def best_temperature(x, y, batch=64):
    """The T, of .005 to 1 in steps of 12 %, at which the CLIP loss of paired x, y (N, D) in batches
    is least once each side's mean is subtracted. Of pairs that were held out, wrong ones among them
    as in training, it says how sure a softmax may be. Source: Guo et al., arXiv 1706.04599."""
    x, y = (unit(z, center=True) for z in measurable(x, y))
    batch = min(batch, len(x))
    starts = range(0, len(x) - batch + 1, batch)
    cosines = torch.stack([x[i:i + batch] @ y[i:i + batch].T for i in starts])
    matched = torch.arange(batch, device=x.device).expand(len(cosines), -1)
    grid = [10 ** (-k / 20) for k in range(47)]  # of (batches, batch, batch), classes are dim 1
    return min(grid, key=lambda T: sum(F.cross_entropy(z / T, matched)
                                       for z in (cosines, cosines.mT)))

@torch.no_grad()
def recall(x, y, group=None, mixed=False):
    """R@1: how often the y nearest to x_i is a right one, and how often the x nearest to y_i; two
    floats. x, y: (N, D), normalised here, one caption an image. group: (N,) integers, equal for
    equal captions; None: all differ. Raises ValueError as above. mixed: the same in one index of x
    and y, which feels a gap: how often the nearest of all, but for itself and others of its
    modality and group, is a right one of the other modality. After Li et al., arXiv 2507.19054."""
    x, y = measurable(x, y)
    group = torch.as_tensor(range(len(x)) if group is None else group).to(x.device)
    if group.shape != (len(x),):
        raise ValueError(f"group must be ({len(x)},), one for each pair, not {tuple(group.shape)}")
    def asks(x, y):
        cosine, nearest = (x @ y.T).max(1)
        right = group[nearest] == group
        if mixed:  # nothing of one's own modality may be nearer
            own = (x @ x.T).masked_fill_(group[:, None] == group, -math.inf)
            right &= cosine > own.amax(1)
        return right.float().mean().item()
    return [asks(x, y), asks(y, x)]

def mixed_recall(x, y, group=None):
    """`recall` in one index of both modalities. About 10 N^2 bytes."""
    return recall(x, y, group, mixed=True)

# -- 3. The smallest gap ---------------------------------------------------------------------------
# No encoders, only points that the loss moves as it likes. Left alone, they open no gap. Give each
# side an offset, one vector that all its points share, like an encoder's bias, and they are two
# clouds within a few steps. Nothing has to push: two random directions are nearly at right angles,
# so offsets that move freely part the clouds, even if random numbers move them (`steer`). And
# nothing pulls back: a softmax sees differences of cosines over T. Where T is cold, pairs a little
# closer than strangers suffice; where it is warm, pairs must coincide, and the clouds merge.
def smallest_gap(offset=1.0, temperature=0.01, dim=128, n=512, batch=64, steps=600, seed=0,
                 mismatch=0.0, steer=None, **weights):
    """Train n pairs of free points, at first in one cone, and an offset for each side, at first 0.
    offset: its learning rate, as a multiple of the points'. mismatch: the share of wrong pairs,
    different ones in each step. steer: a function of the step and the offsets' gradient (2, 1, dim)
    that returns what to use instead. weights: cgap_loss's. Returns a list of dicts (`step`,
    gap_metrics, `mixed_i2t`, `mixed_t2i`) and {step: the clouds (2, n, dim)}, at a few steps."""
    torch.manual_seed(seed)
    cone = torch.randn(dim) / dim ** 0.5
    points = (cone + 0.3 / dim ** 0.5 * torch.randn(2, n, dim)).requires_grad_()
    offsets = torch.zeros(2, 1, dim, requires_grad=True)
    groups = [{"params": [points]}, {"params": [offsets], "lr": 0.01 * offset}]
    optimizer = torch.optim.Adam(groups, lr=0.01)
    history, clouds = [], {}
    for step in range(steps + 1):
        x, y = points + offsets
        if step in (0, 1, 2, 5, 10, 20, 50, 100, 200, 400, steps):
            clouds[step] = torch.stack([unit(x), unit(y)]).detach()
            mixed = dict(zip(("mixed_i2t", "mixed_t2i"), mixed_recall(x, y)))
            history.append({"step": step, **gap_metrics(x, y), **mixed})
        i = torch.randperm(n)[:batch]
        j = mismatched(n, mismatch, seed=step)[i]
        loss = cgap_loss(x[i], y[j], temperature, **weights)
        optimizer.zero_grad()
        loss.backward()
        if steer:
            offsets.grad = steer(step, offsets.grad)
        optimizer.step()
    return history, clouds

def mismatched(n, share, seed=0):
    """The partner of each of n pairs, (n,): its own or, for a random share, another's."""
    generator = torch.Generator().manual_seed(seed or 2 ** 31)  # 0 draws the first epoch's order
    wrong = max(2, round(share * n)) if share else 0  # one alone has nobody to swap with
    chosen = torch.randperm(n, generator=generator)[:wrong]
    partner = torch.arange(n)
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
        weight = is_word[..., None]  # (B, L, 1)
        return self.projection((h * weight).sum(1) / weight.sum(1))  # mean over the words

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
    """Raw embeddings (N, dim) of images or tokens, where the encoder is, in eval mode."""
    training, device = encoder.training, encoder.projection.weight.device
    encoder.eval()  # else an encoder with BatchNorm or dropout would feel that it is measured
    parts = [encoder(part.to(device)) for part in inputs.split(256)]
    encoder.train(training)
    return torch.cat(parts)

@torch.no_grad()
def remove_initial_gap(model, images, texts):
    """Move the second cloud y onto x, in place: mean, spread, direction (orthogonal Procrustes)."""
    x, y = encode(model.image, images), encode(model.text, texts)
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    u, _, vt = torch.linalg.svd(y.T @ x)
    turn = (u @ vt).T * x.norm() / y.norm()
    last = model.text.projection  # W h + b becomes turn (W h + b - mean_y) + mean_x, h a column
    last.weight.copy_(turn @ last.weight)
    last.bias.copy_(turn @ (last.bias - mean_y) + mean_x)

@torch.no_grad()
def fold_means(model, images, texts):
    """Give both encoders a mean of 0 over these pairs, in place. A centred loss does not see it."""
    for encoder, inputs in ((model.image, images), (model.text, texts)):
        encoder.projection.bias -= encode(encoder, inputs).mean(0)

# -- 5. Settings and pairs -------------------------------------------------------------------------
class UserError(Exception):
    """A mistake of the user's: the command line prints it as one line and exits with 2."""

def require(fact, message):
    """Raise UserError with the message unless the fact holds."""
    if not fact:
        raise UserError(message)

def setting(default, text, low=0, high=1e9):
    """A field of Config: its default, what --help says of it, and the numbers that it may be."""
    return field(default=default, metadata={"help": text, "low": low, "high": high})

@dataclass
class Config:
    """All settings of a run. Each is a command-line flag."""
    unif: float = setting(0.0, "weight of uniformity; the paper's CUA is --unif 1 --align 1")
    align: float = setting(0.0, "weight of alignment")
    xunif: float = setting(0.0, "weight of cross-modal uniformity; CUAXU is CUA with --xunif 1")
    center: bool = setting(False, "the loss sees embeddings without their batch's mean")
    temperature: float = setting(0.01, "T of the CLIP loss (not 1 / T), or its start", 0.01, 1)
    learn_temperature: bool = setting(False, "learn T, down to 0.01")
    data: str = setting("synthetic", "synthetic, an MS-COCO folder or a CSV file: image,caption")
    limit: int = setting(0, "scenes to draw, or photographs to use at most; 0: 20,000, or all")
    mismatch: float = setting(0.0, "share of training images with another one's caption", 0, 1)
    image_size: int = setting(0, "side of the images in pixels; 0: 32 (scenes), 64 (photographs)")
    cache: str = setting("~/.cache/cgap", "folder for decoded photographs")
    dim: int = setting(128, "dimension of the shared space", 2)
    same_modality: bool = setting(False, "a second image encoder instead of the text encoder")
    remove_gap: bool = setting(False, "start without the gap of untrained encoders")
    steps: int = setting(1500, "training steps", 1)
    batch: int = setting(64, "pairs in a batch, over all processes", 2)
    lr: float = setting(1e-3, "peak learning rate")
    weight_decay: float = setting(0.1, "weight decay of matrices")
    seed: int = setting(0, "seed of scenes, weights and batches")
    device: str = setting("auto", "auto (a GPU if there is one), cpu, cuda, cuda:N or mps")
    compile: bool = setting(False, "torch.compile the encoders and the loss")
    eval_every: int = setting(250, "steps between evaluations, with a checkpoint each", 1)
    out: str = setting("", "new folder for the run; default: runs/<time>-<loss>-seed<seed>")
    def check(self):
        """Raise UserError for a number that cannot be meant."""
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            require(f.type is str or low <= value <= high,  # nan is not
                    f"--{f.name.replace('_', '-')} must be {low:g} to {high:g}, not {value}")
    def loss_settings(self):
        """What cgap_loss takes beside embeddings and temperature."""
        return {"unif": self.unif, "align": self.align, "xunif": self.xunif, "center": self.center}
    def name(self):
        """The loss in short, for folders and legends."""
        weights = (self.unif, self.align, self.xunif)
        known = {(0, 0, 0): "CLIP", (1, 1, 0): "CUA", (1, 1, 1): "CUAXU"}
        name = known.get(weights, "CLIP+{:g}unif+{:g}align+{:g}xunif".format(*weights))
        return f"{name}-centred" if self.center else name

@dataclass
class Pairs:
    """Images with K texts each: captions, or the image again; or what your own encoders take."""
    images: torch.Tensor  # (N, 3, S, S) uint8
    texts: torch.Tensor  # (N, K, L) int32, padded with 0, or (N, 1, 3, S, S) uint8
    group: torch.Tensor | None = None  # (N, K): equal numbers for equal texts; None: all differ
    def __post_init__(self):
        shapes = tuple(self.images.shape), tuple(self.texts.shape)
        require(shapes[0][:1] == shapes[1][:1] and len(shapes[1]) > 2,
                f"Pairs are images (N, ...) and texts (N, K, ...), K for each, not {shapes}")
        if self.group is None:
            self.group = torch.arange(math.prod(shapes[1][:2])).view(shapes[1][:2])
    def __getitem__(self, part):
        return replace(self, images=self.images[part], texts=self.texts[part],
                       group=self.group[part])
    def batch(self, i, epoch=0):
        """Images i (indices or a slice), each with one of its texts, another in each epoch."""
        return self.images[i], self.texts[i, epoch % self.texts.shape[1]]

# train, val: Pairs. vocab: {word: number}. tasks: Tasks or None.
Data = namedtuple("Data", "train val vocab tasks")
# Zero-shot: prompts[labels[i]] should be nearest to images[i]; unseen[i]: not met in training.
# Arithmetic: nearest to image pool[query[q]] + word new[q] - word old[q] must be a pool[i] with
# correct[q, i]; q goes over the five words of scenes: colour, shape, colour, shape, relation.
Tasks = namedtuple("Tasks", "images labels unseen prompts pool query old new correct")

def prepare(data, cfg):
    """Data as cfg wants them: limited, of one modality, with wrong captions to train on."""
    train, val, vocab, tasks = data
    if cfg.limit:
        train, val = train[:cfg.limit], val[:cfg.limit]
    n, held_out = len(train.images), len(val.images)
    require(n >= cfg.batch and held_out >= 5,
            f"too few images: {n} for a batch of {cfg.batch}, {held_out} held out (5 at least)")
    if cfg.same_modality:
        train, val = (Pairs(pairs.images, pairs.images[:, None]) for pairs in (train, val))
        tasks = None
    if cfg.mismatch:
        partner = mismatched(n, cfg.mismatch, cfg.seed)
        train = replace(train, texts=train.texts[partner], group=train.group[partner])
    return Data(train, val, vocab, tasks)

# -- 6. Training and evaluation --------------------------------------------------------------------
# With one process rank_and_world() is (0, 1) and gather does nothing (section 9). A run is a dict
# that goes into a folder (section 10).
def do_tasks(model, tasks):
    """Accuracies in zero-shot and in arithmetic."""
    cosines = unit(encode(model.image, tasks.images)) @ unit(encode(model.text, tasks.prompts)).T
    named = (cosines.argmax(1).cpu() == tasks.labels).float()
    pool = unit(encode(model.image, tasks.pool))
    edit = unit(encode(model.text, tasks.new)) - unit(encode(model.text, tasks.old))
    query = tasks.query.to(pool.device)
    scores = (pool[query] + edit) @ pool.T
    scores.scatter_(1, query[:, None], -math.inf)  # the query itself is no answer
    found = tasks.correct.gather(1, scores.argmax(1, keepdim=True).cpu()).float().view(5, -1)
    right = {"zero_shot": named, "zero_shot_unseen": named[tasks.unseen],
             "arithmetic_attribute": found[:4], "arithmetic_relation": found[4]}
    return {name: values.mean().item() for name, values in right.items()}

def evaluate(model, data, cfg):
    """A dict: the loss on a batch of training pairs; the gap and search on held-out pairs (5,000 at
    most, the first caption of each); the tasks."""
    T = torch.exp(-model.log_scale)
    order = epoch_order(0, len(data.train.images), cfg.seed)
    images, texts = data.train.batch(order[:cfg.batch])
    x, y = encode(model.image, images), encode(model.text, texts)
    loss = cgap_loss(x, y, T, **cfg.loss_settings())
    require(loss.isfinite(), "the loss is not finite: lower --lr or raise --temperature")
    clip = clip_loss(unit(x, cfg.center), unit(y, cfg.center), T)
    images, texts = data.val.batch(slice(5000))
    x, y = encode(model.image, images), encode(model.text, texts)
    group = data.val.group[:5000, 0]
    searches = zip(("i2t_r1", "t2i_r1", "mixed_i2t", "mixed_t2i"),
                   recall(x, y, group) + mixed_recall(x, y, group))
    partner = mismatched(len(x), cfg.mismatch, cfg.seed).to(x.device)  # as wrong as in training
    return {"train_loss": loss.item(), "train_clip": clip.item(), "temperature": T.item(),
            "best_temperature": best_temperature(x, y[partner], cfg.batch), **gap_metrics(x, y),
            **dict(searches), **(do_tasks(model, data.tasks) if data.tasks else {})}

@functools.lru_cache(2)  # drawn once an epoch: for COCO it takes milliseconds
def epoch_order(epoch, n, seed, device="cpu"):
    """The order of n pairs in an epoch: without state, so that any step can be the next."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(n, generator=generator).to(device)

def next_batch(pairs, step, cfg, device):
    """This process's share of a step's batch, on the device."""
    n = len(pairs.images)
    epoch, k = divmod(step, n // cfg.batch)
    order = epoch_order(epoch, n, cfg.seed, pairs.images.device)
    rank, world = rank_and_world()
    batch = pairs.batch(order[k * cfg.batch:(k + 1) * cfg.batch][rank::world], epoch)
    if device.type == "cuda" and not batch[0].is_cuda:  # pinned, they are copied without waiting
        batch = [part.pin_memory() for part in batch]
    return [part.to(device, non_blocking=True) for part in batch]

def make_optimizer(model, cfg):
    """AdamW; weight decay on matrices, not on biases, norms, temperature."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": cfg.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, cfg.lr, (0.9, 0.98), fused=True)

def learning_rate(step, cfg):
    """The lower of a linear warm-up over a tenth of the steps and a cosine to 0."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / cfg.steps)
    return cfg.lr * min((step + 1) / (0.1 * cfg.steps), cosine)

def observe(run, step, model, optimizer, data, quiet):
    """At the steps that are due, a snapshot for the figures; an evaluation and a checkpoint."""
    cfg = run["cfg"]
    evaluating = step % cfg.eval_every == 0 or step == cfg.steps
    drawing = step % math.ceil(cfg.steps / 30) == 0 or step == cfg.steps
    if cfg.center and (evaluating or drawing):  # the loss cannot see it
        fold_means(model, *data.train.batch(slice(2048 if evaluating else 256)))
    if rank_and_world()[0] > 0:
        return
    if drawing:
        images, texts = data.val.batch(slice(256))
        both = [unit(encode(model.image, images)), unit(encode(model.text, texts))]
        run["snapshots"][step] = torch.stack(both).half().cpu()
    if evaluating:
        record = {"step": step, **evaluate(model, data, cfg)}
        run["history"].append(record)
        lines = "\n".join(map(json.dumps, run["history"]))
        Path(cfg.out, "metrics.jsonl").write_text(lines + "\n")
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_whole(run | states | {"cfg": asdict(cfg)}, Path(cfg.out, "checkpoint.pt"))
        if not quiet:
            tqdm.write("step {step:6}   loss {train_loss:7.3f}   separability {linear_separability"
                       ":.3f}   R@1 {i2t_r1:.3f}   mixed {mixed_i2t:.3f}".format(**record))

def train(cfg, resume=False, model=None, data=None, quiet=False):
    """Train two encoders; returns the history, a list of dicts of metrics ([] in all but the first
    of several processes). resume: go on with the run in cfg.out. model: your own nn.Module. It has
    encoders `image` and `text`, each with a last nn.Linear `projection`; a parameter `log_scale`,
    log(1 / T), which counts, not cfg.temperature; and model(images, texts) gives raw embeddings x,
    y and T. data: your own Data; vocab, tasks may be None. Raises UserError for what cannot be."""
    cfg = settled(cfg, resume)
    device = find_device(cfg.device)
    torch.set_flush_denormal(True)  # most of softmax is below 1e-38, where CPUs are slow
    with process_group(device):
        data = prepare(data or load_data(cfg), cfg)
        torch.manual_seed(cfg.seed)
        model = (model or TwoEncoders(cfg, len(data.vocab or ()))).to(device)
        check_model(model, data, cfg)
        if cfg.remove_gap and not resume:
            remove_initial_gap(model, *data.train.batch(slice(2048)))
        forward, loss_of = compiled(model, cfg, device)
        optimizer = make_optimizer(model, cfg)
        run = open_run(cfg, data, model, optimizer, resume)
        if not resume:
            observe(run, 0, model, optimizer, data, quiet)
        pairs = at_hand(data.train, device)
        first = run["history"][-1]["step"] if resume else 0
        model.train()
        rank, _ = rank_and_world()
        bar = tqdm(range(first, cfg.steps), cfg.name(), disable=quiet or rank > 0)
        for step in bar:
            x, y, T = forward(*next_batch(pairs, step, cfg, device))
            loss = loss_of(gather(x), gather(y), T, **cfg.loss_settings())
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.log_scale.data.clamp_(max=math.log(100))  # T >= 0.01, as in OpenAI's CLIP
            if step % 10 == 0:  # on a GPU, reading the loss waits for it
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            observe(run, step + 1, model, optimizer, data, quiet)
    return run["history"] if rank == 0 else []

# PART TWO: THE MACHINERY ==========================================================================
# -- 7. Scenes -------------------------------------------------------------------------------------
# One or two coloured shapes and an exact caption: perfect pairs, though a batch may hold one twice.
PALETTE = {"red": (.85, .10, .10), "green": (.10, .65, .15), "blue": (.15, .25, .90),
           "yellow": (.95, .90, .15), "purple": (.60, .15, .75), "cyan": (.15, .85, .90),
           "white": (1., 1., 1.), "black": (0., 0., 0.)}
SHAPES = ["circle", "square", "triangle", "diamond", "cross", "ring"]
RELATIONS = ["left of", "above"]  # with "right of", too, one scene would have two captions
WORDS = [list(PALETTE), SHAPES, list(PALETTE), SHAPES, RELATIONS]  # what a scene's columns index
OBJECTS = torch.cartesian_prod(torch.arange(len(PALETTE)), torch.arange(len(SHAPES)))  # (48, 2)
UNSEEN = OBJECTS[:, 0] % len(SHAPES) == OBJECTS[:, 1]  # one for each colour: never in training
# Centres (x, y) of both objects, by kind: one alone, side by side, above; and how far they move
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
    palette, ticks = torch.tensor(list(PALETTE.values())), (torch.arange(size) + .5) / size
    images = []
    for part in scenes.split(256):  # small enough to stay in the processor's cache
        n = len(part)
        kind = part[:, 4] + 1  # 0 alone, 1 side by side, 2 one above the other
        centre = PLACES[kind] + JITTER[kind][:, None] * (2 * torch.rand(n, 2, 2) - 1)  # (n, 2, xy)
        radius = .2 + .03 * (2 * torch.rand(n, 2, 1, 1) - 1)
        image = .5 + .15 * (2 * torch.rand(n, 1, 1, 1) - 1)
        for k in (0, 1):
            across, down = ((ticks - centre[:, k, :, None]) / radius[:, k]).unbind(1)  # (n, size)
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
    edited, old, new = scenes.repeat(len(WORDS), 1, 1), [], []  # (5, n, 5)
    for k, names in enumerate(WORDS):
        change = torch.randint(1, len(names), (len(scenes),))
        edited[k, :, k] = (scenes[:, k] + change) % len(names)
        old += [names[i] for i in scenes[:, k]]
        new += [names[i] for i in edited[k, :, k]]
    edited = edited.flatten(0, 1)
    pool, query = torch.cat([scenes, edited]), torch.arange(len(scenes)).repeat(len(WORDS))
    correct = (edited[:, None] == pool).all(2)  # equal scenes are equally right
    prompts, old, new = (tokenize(texts, vocab) for texts in (describe(single), old, new))
    return Tasks(images, labels, UNSEEN[labels], prompts, draw_scenes(pool, size), query, old, new,
                 correct)

def scene_data(cfg):
    """Scenes to train on, 2,000 to validate (new drawings, few new captions), and both tasks."""
    torch.manual_seed(cfg.seed)
    n, size = cfg.limit or 20_000, cfg.image_size or 32
    scenes = random_scenes(n + min(2_000, n), single=0.1)
    captions = describe(scenes)
    vocab = make_vocab(captions[:n])
    pairs = Pairs(draw_scenes(scenes, size), *tokens_and_groups(captions, vocab, 1))
    return Data(pairs[:n], pairs[n:], vocab, scene_tasks(size, vocab))

# -- 8. Words, and photographs, decoded once into a cache that later runs map ----------------------
# Python's \w lacks combining marks (most of Hindi's vowels); a Chinese sentence is a word to it.
MARKS = "".join(c for c in map(chr, range(0x300, 0x1e000)) if unicodedata.category(c)[0] == "M")
SINGLE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # Thai ... Kana, Han
WORD = re.compile(rf"[{SINGLE}]|(?:(?![{SINGLE}])[\w{MARKS}\u200c\u200d])+|[^\w\s]")

@functools.lru_cache(2 ** 16)  # captions repeat, and each is read three times
def words_of(text):
    """The words of a text, in lower case, and its signs: "a dog's bowl." -> a dog ' s bowl ."""
    return WORD.findall(unicodedata.normalize("NFC", text.lower()))

def make_vocab(captions):
    """{word: number} of the 10,000 most frequent words, after padding and unknown."""
    counts = Counter(word for text in captions for word in words_of(text))
    known = sorted(word for word, _ in counts.most_common(10_000))
    return {word: number for number, word in enumerate(["<pad>", "<unk>", *known])}

def tokenize(captions, vocab):
    """Tokens (len(captions), L), int32, of the first CONTEXT words, padded with 0."""
    rows = ([vocab.get(word, 1) for word in words_of(text)[:CONTEXT]] for text in captions)
    rows = [torch.tensor(row or [1], dtype=torch.int32) for row in rows]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)

def tokens_and_groups(captions, vocab, K):
    """Of N K captions, tokens (N, K, L) and groups (N, K): numbers, equal for equal texts. (Equal
    tokens do not prove equal texts: words may be unknown, or cut.)"""
    groups = torch.tensor([hash(" ".join(words_of(text))) for text in captions])
    return [part.unflatten(0, (-1, K)) for part in (tokenize(captions, vocab), groups)]

def read_coco(file):
    """[(path, caption)] of MS-COCO's JSON file, the caption None for an image without one."""
    content = json.loads(file.read_bytes())
    folder = file.parents[1] / file.stem.removeprefix("captions_")
    paths = {image["id"]: folder / image["file_name"] for image in content["images"]}
    return [(path, None) for path in paths.values()] + [
        (paths.get(note["image_id"], folder / f"(image {note['image_id']})"), note["caption"])
        for note in content["annotations"]]

def read_csv(file):
    """[(path, caption)] of a CSV file, whose paths are relative to it."""
    rows, line = [], 1
    with open(file, newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines, strict=True)  # a quote that is never closed is an error
        try:
            if not {"image", "caption"} <= set(reader.fieldnames or []):
                raise csv.Error(f"the header must be image,caption, not {reader.fieldnames}")
            line = reader.line_num + 1
            for row in reader:
                if None in row or not row["image"]:
                    raise csv.Error("fields unlike the header's: is a comma not in quotes?")
                rows.append((file.parent / row["image"], row["caption"]))
                line = reader.line_num + 1
        except (csv.Error, UnicodeError) as error:
            raise UserError(f"{file}, in the row that starts in line {line}: {error}") from None
    return rows

def read_pictures(path):
    """{split: {path: [captions]}} of train and val, or a tenth of train; and a list of faults."""
    read, files = read_csv, {"train": path}
    if path.is_dir():  # of several years the latest: their splits overlap
        file = max(path.glob("annotations/captions_train20??.json"), default=None)
        require(file, f"{path} has no annotations/captions_train20xx.json")
        held_out = file.with_name(file.name.replace("train", "val"))
        read, files = read_coco, {"train": file} | ({"val": held_out} if held_out.exists() else {})
    pictures, missing = {"train": {}, "val": {}}, set()
    for split, file in files.items():
        try:
            rows = read(file)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            fault = f"{type(error).__name__}: {error}"
            raise UserError(f"{file} is not like MS-COCO's: {fault}") from None
        captions = defaultdict(list)
        for image, caption in rows:
            captions[image].append(caption)
        missing |= {image for image in captions if not image.exists()}
        pictures[split] = {image: captions[image] for image in captions if image not in missing}
    train, val = pictures.values()
    require(train, f"{path}: no picture exists, such as {min(missing, default='')}")
    val = val or {image: train.pop(image) for image in list(train)[::10]}
    return {"train": train, "val": val}, [f"{image}: no such file" for image in sorted(missing)]

def load_photo(path, size):
    """The picture, upright, on white, cropped to a square: (3, size, size) uint8."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor
    with Image.open(path) as image:
        image.draft(None, (2 * size, 2 * size))  # decodes a JPEG no larger than this needs
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # 0 to 65,535, which `convert` would cut at 255
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range: save it with 8 bits")
    image = ImageOps.fit(image.convert("RGBA"), (size, size), Image.Resampling.BICUBIC)
    white = Image.new("RGBA", image.size, "white")
    return pil_to_tensor(Image.alpha_composite(white, image).convert("RGB"))

def load_pair(path, captions, size):
    """(image, five captions), or a text that says why they are left out."""
    texts = [text for text in captions if isinstance(text, str) and re.search(r"\w", text)]
    if not texts:
        return f"{path}: no caption with a word in it"
    try:
        return load_photo(path, size), [texts[k % len(texts)] for k in range(5)]
    except Exception as error:  # a broken file may raise anything
        return f"{path}: {error}"

def decode(pictures, faults, limit, size):
    """For the cache: {split: (images, tokens, group)}, vocab, faults, and unread, the share of
    held-out captions with unknown words or cut ones."""
    content = {}
    for split, captions in pictures.items():
        items = list(captions.items())[:limit or None]
        with ThreadPoolExecutor() as pool:  # Pillow decodes without the GIL
            loaded = pool.map(lambda item: load_pair(*item, size), items)
            loaded = list(tqdm(loaded, f"decoding {split}", len(items)))
        faults = faults + [fault for fault in loaded if isinstance(fault, str)]
        loaded = [pair for pair in loaded if not isinstance(pair, str)]
        require(loaded, f"none of {len(items)} pictures can be used: {'; '.join(faults[-1:])}")
        images, texts = zip(*loaded)
        texts = list(chain(*texts))
        if split == "train":
            vocab = make_vocab(texts)
        content[split] = (torch.stack(images), *tokens_and_groups(texts, vocab, 5))
    unread = [len(words) > CONTEXT or any(word not in vocab for word in words)
              for words in map(words_of, texts)]  # of val, which comes last
    return content | {"vocab": vocab, "faults": faults, "unread": sum(unread) / len(unread)}

def photo_data(cfg):
    """Photographs with their captions, from the cache or decoded into it."""
    path, size = Path(cfg.data), cfg.image_size or 64
    pictures, faults = read_pictures(path)
    # The cache's name is a hash of all that decides what is in it: a stale one is never found.
    dates = [os.path.getmtime(image) for image in chain(*pictures.values())]
    facts = repr((__version__, size, cfg.limit, pictures, faults, dates)).encode()
    cache = Path(cfg.cache) / f"{path.stem}-{hashlib.sha256(facts).hexdigest()}.pt"
    rank, world = rank_and_world()
    if rank == 0 and not cache.exists():
        save_whole(decode(pictures, faults, cfg.limit, size), cache)
    if world > 1:
        torch.distributed.barrier()  # the first process makes the cache, the others find it
    try:
        found = torch.load(cache, weights_only=True, mmap=True)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{cache} cannot be read; delete it if it is damaged: {error}") from None
    faults, n = found["faults"], sum(map(len, pictures.values()))
    if rank == 0 and faults:
        cache.with_suffix(".txt").write_text("\n".join(faults) + "\n", encoding="utf-8")
        print(f"warning: {len(faults)} left out, with {n} pictures found: {'; '.join(faults[:3])}; "
              f"all in {cache.with_suffix('.txt')}", file=sys.stderr)
    if rank == 0 and found["unread"] > 0.05:
        print(f"warning: {found['unread']:.0%} of held-out captions have words that training has "
              f"not, or more than {CONTEXT}: the model cannot read all of them", file=sys.stderr)
    return Data(Pairs(*found["train"]), Pairs(*found["val"]), found["vocab"], None)

def load_data(cfg):
    """The Data that cfg names. Raises UserError where they cannot be used."""
    return scene_data(cfg) if cfg.data == "synthetic" else photo_data(cfg)

# -- 9. Devices and processes ----------------------------------------------------------------------
def find_device(name):
    """The torch.device of that name; `auto` is a GPU if there is one."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"  # as torchrun numbers its processes
    try:
        return torch.ones(1, device=name).cpu().to(name).device
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"device {name} cannot be used here: {torch.cuda.device_count()} GPUs, and "
                        "each process needs one of its own; try --device cpu") from None

@contextmanager
def process_group(device):
    """Within, this process is one of those that torchrun has started, if it has. (After an error
    it does not leave: the others may be waiting, and torchrun ends them.)"""
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    joining = several and not torch.distributed.is_initialized()
    if joining:  # patiently, as the first may decode for long
        backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        if gpu:
            torch.cuda.set_device(gpu)  # else each process also opens the first GPU
        torch.distributed.init_process_group(backend, timeout=timedelta(days=1), device_id=gpu)
    yield
    if joining:
        torch.distributed.destroy_process_group()

def rank_and_world():
    """This process's number and how many there are: (0, 1) if it is alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1

def gather(rows):
    """The rows (n, D) of all processes, (world * n, D). all_gather gives constants, through which
    nothing trains; here one's own have a gradient, times `world`, as DDP takes the mean of all."""
    rank, world = rank_and_world()
    if world == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world)]
    torch.distributed.all_gather(parts, rows.detach().contiguous())
    parts[rank] = rows + (world - 1) * (rows - rows.detach())  # the value of rows
    return torch.cat(parts)

def at_hand(pairs, device):
    """Pairs in a GPU's memory, for quick batches, if they fill at most half of what is free."""
    size = pairs.images.nbytes + pairs.texts.nbytes
    if device.type != "cuda" or size > torch.cuda.mem_get_info(device)[0] / 2:
        return pairs
    return replace(pairs, images=pairs.images.to(device), texts=pairs.texts.to(device))

def compiled(model, cfg, device):
    """The callable for (images, texts) and the one for the loss: compiled, if cfg says so."""
    one_process, loss_of = rank_and_world()[1] == 1, cgap_loss
    if cfg.compile:
        # On a GPU with recorded graphs: small encoders mostly wait for calls to be issued.
        mode = "reduce-overhead" if device.type == "cuda" and one_process else "default"
        try:
            torch.compile(torch.sin)(torch.ones(2, device=device))
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"--compile finds no working compiler here: {reason}") from None
        model.compile(mode=mode)
        loss_of = torch.compile(cgap_loss, mode=mode)
    return model if one_process else nn.parallel.DistributedDataParallel(model), loss_of

# -- 10. Runs --------------------------------------------------------------------------------------
# A folder with metrics.jsonl (a line for each evaluation), checkpoint.pt and figures. In memory a
# dict: cfg, vocab, history, snapshots {step: (2, 256, dim) embeddings of images and texts}.
def settled(cfg, resume=False):
    """cfg, checked, with a folder, which must be new, and absolute paths to data, so that one can
    resume from anywhere."""
    cfg.check()
    out = str(cfg.out) or f"runs/{datetime.now():%Y%m%d-%H%M%S.%f}-{cfg.name()}-seed{cfg.seed}"
    first = not int(os.environ.get("RANK") or 0)  # of several processes, the one that writes
    require(resume or not first or not os.path.exists(out),
            f"--out {out} exists: name another, or --resume it")
    data = "synthetic" if cfg.data == "synthetic" else os.path.abspath(cfg.data)
    return replace(cfg, data=data, cache=os.path.abspath(os.path.expanduser(cfg.cache)), out=out)

def save_whole(content, path):
    """torch.save, so that path never holds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(f"{path}.{os.getpid()}.tmp")
    try:
        torch.save(content, draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)

def load_run(folder):
    """The run in a folder. Raises UserError if there is none."""
    path = Path(folder, "checkpoint.pt")
    try:
        run = torch.load(path, weights_only=True, map_location="cpu")
        return run | {"cfg": Config(**(run["cfg"] | {"out": str(folder)}))}
    except Exception as error:  # whatever a missing, broken or foreign file may raise
        raise UserError(f"{path} is no checkpoint of this cgap ({type(error).__name__})") from None

def load_model(folder):
    """The TwoEncoders of a run, on the CPU, for `encode`, and its vocab, for `tokenize`."""
    run = load_run(folder)
    require(run["vocab"] and "image.body.0.weight" in run["model"], f"{folder} has other encoders")
    model = TwoEncoders(run["cfg"], len(run["vocab"]))
    model.load_state_dict(run["model"])
    return model, run["vocab"]

def check_model(model, data, cfg):
    """Raise UserError for a model of one's own that train cannot use."""
    encoders = [getattr(model, name, None) for name in ("image", "text")]
    ends = [getattr(encoder, "projection", None) for encoder in encoders]
    require(hasattr(model, "log_scale") and all(isinstance(end, nn.Linear) for end in ends),
            "your model lacks log_scale, image.projection or text.projection: see train.__doc__")
    require(not (cfg.center or cfg.remove_gap) or all(end.bias is not None for end in ends),
            "--center and --remove-gap need projections with a bias")
    shapes = [tuple(encode(encoder, inputs).shape)
              for encoder, inputs in zip(encoders, data.val.batch(slice(2)))]
    require(shapes[0] == shapes[1] and len(shapes[0]) == 2,
            f"encoders must give (B, D), one D for both, not {shapes}")

def open_run(cfg, data, model, optimizer, resume):
    """A new run in a new folder or, to resume, that in cfg.out, with its weights put in place."""
    rank, world = rank_and_world()
    require(cfg.batch % world == 0, f"batch {cfg.batch} cannot be split over {world} processes")
    if resume:
        run = load_run(cfg.out)
        require(run["vocab"] == data.vocab,
                f"{cfg.out} was trained on other words than {cfg.data} has now")
        model.load_state_dict(run["model"])
        optimizer.load_state_dict(run["optimizer"])
        return run | {"cfg": cfg}
    if rank == 0:
        os.makedirs(cfg.out)  # fails if another run is first
    return {"cfg": cfg, "vocab": data.vocab, "history": [], "snapshots": {}}

# -- 11. Figures, drawn from what runs have kept ---------------------------------------------------
def canvas(rows, columns, size=3.8):
    """A matplotlib figure and its panels, an array (rows, columns)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(size * columns, size * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)

def plot_metrics(histories, path):
    """A panel for each of eight metrics, a line for each of {name: history}."""
    shown = ("linear_separability", "spread", "overlap", "i2t_r1", "mixed_i2t",  # of 0 to 1
             "centroid_distance", "unif", "train_loss")
    figure, axes = canvas(2, 4)
    for axis, metric in zip(axes.flat, shown):
        for name, history in histories.items():
            steps = [record["step"] for record in history]
            axis.plot(steps, [record[metric] for record in history], "o-", ms=3, label=name)
        axis.set(xlabel="training step", title=metric.replace("_", " "), xlim=(0, None),
                 ylim=(0, 1.05) if metric in shown[:5] else None)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path)

def draw_clouds(axis, both, title):
    """Images and texts (2, n, D) in the plane of 0 and both means, from one mean to the other
    across, and grey lines between some pairs. Lengths are true: all is in the unit circle."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Circle
    x, y = both.float().mean(1)
    across = F.normalize(y - x, dim=0)
    up = F.normalize(x + y - (x + y) @ across * across, dim=0)
    points = (both.float() @ torch.stack([across, up], 1)).numpy()  # (2, n, 2)
    axis.clear()
    axis.add_patch(Circle((0, 0), 1, fill=False, color="0.7"))
    lines = points[:, :100].transpose(1, 0, 2)  # one collection is drawn quicker than each line
    axis.add_collection(LineCollection(lines, colors="0.8", linewidths=0.5))
    for cloud, marker, name in zip(points, "o^", ("images", "texts")):
        axis.plot(*cloud.T, marker, ms=2.5, label=name)
    axis.set(aspect="equal", xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)

def plot_clouds(rows, path):
    """Five moments of training of each of {name: {step: embeddings (2, n, D)}}, a row each."""
    figure, axes = canvas(len(rows), 5, 2.5)
    for row, (name, clouds) in zip(axes, rows.items()):
        steps = list(clouds)
        early = [steps[min(k, len(steps) - 1)] for k in (0, 3, 5, 7)]  # when most happens
        for axis, step in zip(row, [*early, steps[-1]]):
            separability = linear_separability(*clouds[step])
            draw_clouds(axis, clouds[step], f"step {step}: separability {separability:.2f}")
        row[0].set_ylabel(name)
    figure.savefig(path)

def animate(rows, path):
    """All of training of {name: {step: embeddings (2, n, D)}}, side by side, as a GIF."""
    from matplotlib.animation import FuncAnimation
    figure, axes = canvas(1, len(rows))
    def frame(k):
        for axis, (name, clouds) in zip(axes.flat, rows.items()):
            step, both = list(clouds.items())[min(k, len(clouds) - 1)]
            draw_clouds(axis, both, f"{name}\nstep {step}")
    frame(0)
    legend = axes[0, 0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=2)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not for each frame
    frames = max(map(len, rows.values())) + 5  # it rests at the end
    FuncAnimation(figure, frame, frames).save(path, "pillow", dpi=80)

def plot_runs(folders, out):
    """All figures of one run or several, into the folder `out`."""
    runs = {}
    for run in map(load_run, folders):
        label = f"{run['cfg'].name()}, T = {run['cfg'].temperature:g}, seed {run['cfg'].seed}"
        runs[label if label not in runs else f"{label} ({run['cfg'].out})"] = run
    snapshots = {label: run["snapshots"] for label, run in runs.items()}
    os.makedirs(out, exist_ok=True)
    plot_metrics({label: run["history"] for label, run in runs.items()}, f"{out}/gap.png")
    plot_clouds(snapshots, f"{out}/embeddings.png")
    animate(snapshots, f"{out}/embeddings.gif")
    print(f"{out}: gap.png, embeddings.png, embeddings.gif")

# -- 12. The command line --------------------------------------------------------------------------
POINTS_FLAGS = {"temperature", "dim", "seed", "steps", "mismatch", "out"}

def run_points(out="runs/points", **settings):
    """Run the smallest gap in four ways, print how each ends and draw them."""
    torch.set_num_threads(1)  # so little work is not worth sharing
    torch.set_flush_denormal(True)
    shown = ["linear_separability", "centroid_distance", "spread", "overlap", "mixed_i2t"]
    print(f"{'at the end':22}", *shown)
    rows = {}
    for name, changes in (("points alone", {"offset": 0}), ("with offsets", {}),
                          ("... warm, T = 0.2", {"temperature": 0.2}),
                          ("... with two terms", {"unif": 1, "align": 1})):
        history, rows[name] = smallest_gap(**(settings | changes))
        print(f"{name:22}", *(f"{history[-1][metric]:{len(metric)}.3f}" for metric in shown))
    os.makedirs(out, exist_ok=True)
    plot_clouds(rows, f"{out}/points.png")
    print(f"{out}/points.png")

def run_command(given):
    """Do what the flags say: a dict of those that were given."""
    useful = {"points": POINTS_FLAGS, "plot": {"out"}, "resume": {"device"}}
    for mode in set(useful) & set(given):
        idle = [f"--{name}" for name in given.keys() - useful[mode] - {mode}]
        require(not idle, f"{' '.join(idle)} does nothing with --{mode}: leave it out")
    if given.pop("points", False):
        Config(**given).check()
        return run_points(**given)
    if "plot" in given:
        return plot_runs(given["plot"], given.get("out", "runs/plot"))
    folder = given.pop("resume", None)
    cfg = replace(load_run(folder)["cfg"], **given) if folder else settled(Config(**given))
    try:
        history = train(cfg, resume=bool(folder))
    except KeyboardInterrupt:
        print(f"\ninterrupted: if training had begun, --resume {cfg.out} goes on", file=sys.stderr)
        sys.exit(130)
    if history:  # of several processes, only the first has one
        print(f"\n{cfg.name()}, T = {cfg.temperature:g}, seed {cfg.seed}; all but train_... is of "
              f"held-out pairs\n{'start':>34}{'end':>10}")
        for name in list(history[-1])[1:]:  # all but the step
            print(f"{name:24}{history[0][name]:10.3f}{history[-1][name]:10.3f}")
        plot_runs([cfg.out], cfg.out)

def main(argv=None):
    """Run the command line."""
    example = "example: python cgap.py --unif 1 --align 1 --temperature 0.1 --mismatch 0.2"
    parser = argparse.ArgumentParser(
        prog="cgap.py", usage=argparse.SUPPRESS, description=__doc__.split("\n")[0], epilog=example,
        argument_default=argparse.SUPPRESS, allow_abbrev=False)
    takes = " --".join(sorted(POINTS_FLAGS))
    parser.add_argument("--points", action="store_true",
                        help=f"the smallest gap: no encoders; takes --{takes}")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run; takes --device")
    parser.add_argument("--plot", metavar="RUN", nargs="+", help="draw runs as one; takes --out")
    for f in fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        default = "" if f.type is bool or f.default == "" else f" (default: {f.default})"
        text = (f.metadata["help"] + default).replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    try:
        run_command(vars(parser.parse_args(argv)))
    except (UserError, OSError) as error:
        parser.error(" ".join(str(error).split()))  # in one line, and exits with 2

if __name__ == "__main__":
    main()
