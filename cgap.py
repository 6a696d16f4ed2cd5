# SPDX-License-Identifier: MIT
"""The contrastive gap in one file: watch it open, measure it, explain it, close it.

CLIP trains two encoders so that an image and its caption become nearby points of one sphere. In a
trained model, however, all images lie in one region of the sphere and all captions in another.
"It's Not a Modality Gap" (Fahim, Murphy, Fyshe, arXiv 2405.18570) finds this gap under the
contrastive loss even if both encoders see the same images, and closes it with two more terms.
README.md has the commands. Sections 1 to 6 are for reading, 7 to 12 are the machinery.
"""
import argparse, csv, functools, hashlib, inspect, json, os, re, sys
from collections import Counter, defaultdict, namedtuple
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from pathlib import Path
from tqdm import tqdm
__version__ = "5.0"

# PART ONE: THE PAPER ==============================================================================
# -- 1. The loss -----------------------------------------------------------------------------------
# To copy into your own project: this section needs nothing else. x[i] and y[i] are the embeddings
# of image i and of its caption. Together they are a true pair; x[i] and y[j] are another pair.
#   clip    the cosine of a true pair should be higher than that of any other pair in the batch
#   unif    images should be far from other images, and captions from other captions
#   align   an image should be close to its caption
#   xunif   an image should be far from the captions of other images
# The paper's losses, with weights of 1: CLIP; CUA = CLIP + unif + align; CUAXU = CUA + xunif.
import math
import torch
import torch.nn.functional as F
from torch import nn

def check_pairs(x, y):
    """x and y as tensors of float32 or better. Raises ValueError unless both are (N, D), N > 1:
    other shapes could silently give a wrong number."""
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if x.shape != y.shape or x.ndim != 2 or len(x) < 2:
        raise ValueError(f"x and y must both be (N, D), N > 1, not {(*x.shape,)}, {(*y.shape,)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(dtype), y.to(dtype)

def normalize(z, center=False):
    """Rows of z (N, D) scaled to length 1, after subtracting their mean if center."""
    return F.normalize(z - z.mean(0) if center else z, dim=1)

def clip_loss(x, y, temperature):
    """For unit vectors (N, D): cross-entropy of picking each item's match from the batch, averaged
    over both directions. A scalar, ln N at chance. Source: Radford et al., arXiv 2103.00020."""
    logits = x @ y.T / temperature  # (N, N)
    match = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)) / 2

def uniformity(x, y, t=2.0):
    """log mean_{i != j} exp(-t |x_i - y_j|^2) of unit vectors (N, D): a scalar from -4t to 0, lower
    if they are farther apart. For one modality: uniformity(x, x). Raises as check_pairs. Source:
    Wang & Isola, arXiv 2005.10242."""
    x, y = check_pairs(x, y)
    N = len(x)
    exponents = 2 * t * (x @ y.T - 1)  # (N, N); for unit vectors, |a - b|^2 = 2 - 2 a.b
    itself = torch.eye(N, dtype=torch.bool, device=x.device)
    return exponents.masked_fill(itself, -math.inf).flatten().logsumexp(0) - math.log(N * (N - 1))

def alignment(x, y):
    """mean_i |x_i - y_i|^2 of unit vectors (N, D): a scalar from 0 to 4, equal to 2 - 2 * (mean
    cosine of true pairs). Raises as check_pairs. Source: Wang & Isola."""
    x, y = check_pairs(x, y)
    return (x - y).square().sum(1).mean()

def cgap_loss(x, y, temperature=0.01, unif=0.0, align=0.0, xunif=0.0, center=False):
    """CLIP + unif * uniformity + align * alignment + xunif * cross-modal uniformity: a scalar to
    minimise, negative if uniformity outweighs the rest. Source: the paper's L_CUAXU.
    x, y: (N, D) raw embeddings, row i of x paired with row i of y; they are normalised here. Give
    one caption for each image. With several processes, give the rows of all (`gather`, section 9).
    temperature: T, not 1 / T. It is a number or, if it is learned, a scalar tensor.
    center: subtract the batch's mean of each modality first. You then have to subtract the means of
    raw training embeddings from the finished model's, too (`fold_means`, section 4, does so).
    Raises ValueError for other shapes, and unless 0 < T <= 1. A tensor T on a GPU is not checked,
    because that would stall the GPU; nor is any T during compilation."""
    readable = not torch.is_tensor(temperature) or temperature.device.type == "cpu"
    if readable and not torch.compiler.is_compiling():
        T = temperature.item() if torch.is_tensor(temperature) else temperature
        if not 0 < T <= 1:
            raise ValueError(f"temperature must be above 0, at most 1 (T, not 1 / T): it is {T:g}")
    x, y = check_pairs(x, y)
    with torch.autocast(x.device.type, enabled=False):  # in bfloat16, logits err by 0.2 at T = 0.01
        x, y = normalize(x, center), normalize(y, center)
        loss = clip_loss(x, y, temperature)
        if unif:  # terms with weight 0 are skipped
            loss = loss + unif * (uniformity(x, x) + uniformity(y, y)) / 2
        if align:
            loss = loss + align * alignment(x, y)
        if xunif:
            loss = loss + xunif * uniformity(x, y)
    return loss

# -- 2. Measuring the gap --------------------------------------------------------------------------
# A gap is complete if a linear classifier tells images from captions every time, and closed if it
# can only guess and the two means nearly coincide. Even then an image may not find its caption in a
# joint index of both; mixed search measures that. Embeddings are tensors or arrays, not normalised.
def unit_pairs(x, y):
    """x and y (N, D) with rows of length 1. Raises ValueError as check_pairs, for N < 5 or D < 2,
    and for a row that is zero or not finite, as it has no direction."""
    x, y = check_pairs(x, y)
    if len(x) < 5 or x.shape[1] < 2:
        raise ValueError(f"x and y must be (N, D), N >= 5, D > 1, not {tuple(x.shape)}")
    largest = torch.stack([x, y]).abs().amax(2)  # (2, N)
    bad = ((largest == 0) | ~largest.isfinite()).any(0).nonzero()
    if len(bad):
        raise ValueError(f"row {bad[0].item()} of x or y is zero or not finite ({len(bad)} of "
                         f"{len(x)} are): leave these pairs out")
    x, y = x / largest[0][:, None], y / largest[1][:, None]  # squares of tiny numbers would be 0
    return normalize(x), normalize(y)

def fit_logistic(z, labels, C):
    """The w (D,) that minimises C * (sum of log losses) + |w[:-1]|^2 / 2, as in scikit-learn. z:
    (N, D), its last column 1 for the bias w[-1]. labels: (N,), 0 or 1. The gradient is by hand."""
    w = torch.zeros_like(z[0])
    optimizer = torch.optim.LBFGS([w], max_iter=3000, tolerance_grad=1e-7 * C, tolerance_change=0,
                                  history_size=20, line_search_fn="strong_wolfe")
    def objective():
        w.grad = F.pad(w[:-1], (0, 1)) + C * z.T @ (torch.sigmoid(z @ w) - labels)
        log_losses = F.binary_cross_entropy_with_logits(z @ w, labels, reduction="sum")
        return w[:-1].square().sum() / 2 + C * log_losses
    optimizer.step(objective)
    return w

@torch.no_grad()
def linear_separability(x, y, C=1.0):
    """How often a logistic regression, fitted to four fifths of the pairs, tells x from y (N, D) on
    the others: 0.5 is chance, 1 a complete gap. C = 1, as in the authors' code, misses small gaps,
    which C = 100 finds. Computed on the CPU in float64. Raises ValueError as unit_pairs."""
    x, y = unit_pairs(torch.as_tensor(x).cpu().double(), torch.as_tensor(y).cpu().double())
    N = len(x)
    rows = F.pad(torch.cat([x, y]), (0, 1), value=1.0)  # (2 N, D + 1), a column of 1 for the bias
    is_y = (torch.arange(2 * N) >= N).double()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    fitted, tested = order[:int(0.8 * N)], order[int(0.8 * N):]  # pairs
    fitted, tested = torch.cat([fitted, fitted + N]), torch.cat([tested, tested + N])  # rows
    w = fit_logistic(rows[fitted], is_y[fitted], C)
    return ((rows[tested] @ w > 0) == is_y[tested]).double().mean().item()

@torch.no_grad()
def gap_metrics(x, y):
    """Measures of the gap between paired embeddings x, y (N, D), as a dict of floats:
    linear_separability   the function of that name; linear_separability_c100: with C = 100
    centroid_distance     |mean x - mean y|, 0 to 2
    unif, align, xunif    the terms of the loss; unif is the mean of both modalities
    margin      mean cosine of true pairs minus that of all other pairs, equal to Tr Cov(x, y)
    spread      sqrt(Tr Cov(x) Tr Cov(y)): how much embeddings vary about the mean of their
                modality, from 0 (a single point) to about 1
    agreement   margin / spread, the correlation of x and y, -1 to 1
    overlap     the cosine of Cov(x) and Cov(y), 0 to 1: do both vary in the same directions?
    A gap bounds the margin: margin <= spread <= 1 - (|mean x|^2 + |mean y|^2) / 2 <= 1 - g^2 / 4,
    g being the centroid distance (the last two times N / (N - 1), as these are samples).
    Computed on the CPU in float64, in about 30 N^2 bytes. Raises ValueError as unit_pairs. Source:
    the paper and its code; the last four are ours."""
    x, y = unit_pairs(torch.as_tensor(x).cpu().double(), torch.as_tensor(y).cpu().double())
    cov_x, cov_y = x.T.cov(), y.T.cov()  # (D, D)
    margin = ((x - x.mean(0)) * (y - y.mean(0))).sum() / (len(x) - 1)
    spread = (cov_x.trace() * cov_y.trace()).sqrt()
    metrics = {
        "linear_separability": linear_separability(x, y),
        "linear_separability_c100": linear_separability(x, y, C=100.0),
        "centroid_distance": (x.mean(0) - y.mean(0)).norm(),
        "unif": (uniformity(x, x) + uniformity(y, y)) / 2,
        "align": alignment(x, y), "xunif": uniformity(x, y),
        "margin": margin, "spread": spread,
        "agreement": margin / spread.clamp(min=1e-12),  # avoids 0 / 0 if a cloud is a single point
        "overlap": (cov_x * cov_y).sum() / (cov_x.norm() * cov_y.norm()).clamp(min=1e-24)}
    return {name: float(value) for name, value in metrics.items()}

@torch.no_grad()
def search(x, y, group=None):
    """How often the nearest item is a right one, as a dict of four floats from 0 to 1:
    i2t_r1      R@1: a hit if the y nearest to x_i is y_i, or another with an equal caption
    mixed_i2t   the same in one joint index of x and y: a hit if the item nearest to x_i, leaving
                out x_i and other x with an equal caption, is a y with an equal caption
    t2i_r1, mixed_t2i   the same two with x and y exchanged
    x, y: (N, D). group: (N,) integers, equal for equal captions; None: all captions differ. Takes
    about 10 N^2 bytes. Raises ValueError as unit_pairs. Source: Li et al., arXiv 2507.19054."""
    x, y = unit_pairs(x, y)
    group = torch.arange(len(x)) if group is None else torch.as_tensor(group)
    if group.shape != (len(x),):
        raise ValueError(f"group must be ({len(x)},), one for each pair, not {tuple(group.shape)}")
    group = group.to(x.device)
    same = group[:, None] == group  # (N, N)
    cosines = x @ y.T  # (N, N)
    hits = {}
    for way, own, table in (("i2t", x, cosines), ("t2i", y, cosines.T)):
        highest, nearest = table.max(1)
        rival = (own @ own.T).masked_fill_(same, -math.inf).amax(1)  # in the query's own modality
        hits[f"{way}_r1"] = group[nearest] == group
        hits[f"mixed_{way}"] = hits[f"{way}_r1"] & (highest > rival)
    return {name: hit.float().mean().item() for name, hit in hits.items()}

def rotation(x, y):
    """The orthogonal matrix R (D, D) that minimises |x - y R|^2 over paired rows x, y (N, D). y @ R
    turns y, its mean included, onto x, and changes no cosine within y. Nothing is normalised or
    centred here. Raises as check_pairs. Source: orthogonal Procrustes, Schönemann 1966."""
    x, y = check_pairs(x, y)
    u, _, vt = torch.linalg.svd(y.T @ x)
    return u @ vt

# -- 3. The smallest gap ---------------------------------------------------------------------------
# There are no encoders here, only vectors that the loss moves as it likes. Trained freely, they
# form no gap. Now give each modality an offset, one vector that is added to all of its points, like
# the bias of an encoder's last layer. The two clouds part within a few steps. No force is needed,
# because two random directions in 128 dimensions are almost orthogonal: the offsets carry the
# clouds apart even if random numbers replace their gradient (`offset_gradient`).
#     Whether they come back depends on the temperature. In a batch of 64, a true pair whose cosine
# is 10 T above all others has a loss of ln(1 + 63 exp(-10)) = 0.003. At T = 0.01 a lead of 0.1 is
# enough, gap or no gap: the loss and its pull are almost zero. At T = 0.2 only a lead of 2 would
# be, but leads average 1 at most (the margin), so there is always something to gain. A gap lowers
# that limit (see gap_metrics), so the loss can fall as the gap closes.
def smallest_gap(offset_lr=1.0, temperature=0.01, dim=128, n=512, batch=64, steps=600, seed=0,
                 mismatch=0.0, offset_gradient=None, **weights):
    """Train n pairs of free points, which start in one cone, and an offset for each modality, which
    starts at 0. Returns a list of dicts (`step`, gap_metrics, search) and {step: clouds (2, n,
    dim)}, both for a few steps. offset_lr: learning rate of the offsets, as a multiple of the
    points'. mismatch: share of mismatched pairs, drawn anew in each step. offset_gradient: a
    function of the step and the offsets' gradient (2, 1, dim) that returns what to use instead.
    weights: cgap_loss's."""
    torch.manual_seed(seed)
    cone = torch.randn(dim) / dim ** 0.5
    points = (cone + 0.3 / dim ** 0.5 * torch.randn(2, n, dim)).requires_grad_()
    offsets = torch.zeros(2, 1, dim, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [points], "lr": 0.01},
                                  {"params": [offsets], "lr": 0.01 * offset_lr}])
    history, clouds = [], {}
    for step in range(steps + 1):
        x, y = points + offsets  # unpacks the first dimension: (n, dim) each
        if step in (0, 1, 2, 5, 10, 20, 50, 100, 200, 400, steps):
            clouds[step] = torch.stack([normalize(x), normalize(y)]).detach()
            history.append({"step": step, **gap_metrics(*clouds[step]), **search(*clouds[step])})
        i = torch.randperm(n)[:batch]
        j = mismatch_captions(n, mismatch, seed=(steps + 1) * seed + step)[i]  # anew in each step
        loss = cgap_loss(x[i], y[j], temperature, **weights)
        optimizer.zero_grad()
        loss.backward()
        if offset_gradient:
            offsets.grad = offset_gradient(step, offsets.grad)
        optimizer.step()
    return history, clouds

def mismatch_captions(n, share, seed=0):
    """Which caption each of n images gets, (n,): its own, or another's for `share` of them."""
    generator = torch.Generator().manual_seed(seed or 2 ** 31)  # 0 would be epoch_order's
    count = max(2, round(share * n)) if share else 0  # one caption alone has none to swap with
    chosen = torch.randperm(n, generator=generator)[:count]
    caption = torch.arange(n)
    caption[chosen] = chosen.roll(1)
    return caption

# -- 4. Two small encoders -------------------------------------------------------------------------
# Neither has a BatchNorm, so the pairs of a batch meet in the loss alone.
CONTEXT = 32  # words of a caption that the text encoder reads; the rest is cut

class ImageEncoder(nn.Module):
    """A convolutional network: uint8 images (B, 3, S, S) to raw embeddings (B, dim). Raises
    ValueError for images of another type, such as floats from 0 to 1, which would look black."""
    def __init__(self, dim):
        super().__init__()
        layers = []
        for c_in, c_out, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, 1), nn.GroupNorm(8, c_out), nn.GELU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())  # (B, 128)
        self.projection = nn.Linear(128, dim)
    def forward(self, images):
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, from 0 to 255, not {images.dtype}")
        return self.projection(self.body(images.float() / 64 - 2))  # pixels from -2 to about 2

class TextEncoder(nn.Module):
    """A transformer: tokens (B, L), 0 for padding, L <= CONTEXT, to raw embeddings (B, dim)."""
    def __init__(self, dim, vocab):
        super().__init__()
        self.token = nn.Embedding(vocab, 128)
        self.position = nn.Parameter(torch.randn(CONTEXT, 128))  # values as large as those of words
        self.body = nn.TransformerEncoderLayer(128, 4, 512, 0.0, "gelu", norm_first=True,
                                               batch_first=True)
        self.norm = nn.LayerNorm(128)
        self.projection = nn.Linear(128, dim)
    def forward(self, tokens):
        is_word = tokens != 0  # (B, L)
        h = self.token(tokens) + self.position[:tokens.shape[1]]  # (B, L, 128)
        h = self.norm(self.body(h, src_key_padding_mask=~is_word))
        weight = is_word[..., None]  # (B, L, 1)
        return self.projection((h * weight).sum(1) / weight.sum(1))  # mean over the words

class TwoEncoders(nn.Module):
    """Encoders for images and texts (or, with same_modality, images again), and a temperature."""
    def __init__(self, cfg, vocab):
        super().__init__()
        self.image = ImageEncoder(cfg.dim)
        self.text = ImageEncoder(cfg.dim) if cfg.same_modality else TextEncoder(cfg.dim, vocab)
        # What is learned is log(1 / T): steps then change T by factors, and T stays above 0.
        self.log_scale = nn.Parameter(torch.tensor(-math.log(cfg.temperature)),
                                      requires_grad=cfg.learn_temperature)
    def forward(self, images, texts):
        return self.image(images), self.text(texts), torch.exp(-self.log_scale)

@torch.no_grad()
def encode(encoder, inputs):
    """Raw embeddings (N, dim) of uint8 images or tokens, on the encoder's device. Meanwhile it is
    in eval mode, as yours may have BatchNorm or dropout."""
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    device = encoder.projection.weight.device
    parts = [encoder(part.to(device)) for part in inputs.split(256)]
    for module, mode in modes.items():  # parts of it may have been in eval mode before
        module.training = mode
    return torch.cat(parts)

def embed(model, images, texts):
    """Unit embeddings (N, dim) of images and of texts."""
    return normalize(encode(model.image, images)), normalize(encode(model.text, texts))

@torch.no_grad()
def remove_initial_gap(model, images, texts):
    """Change the text encoder's last layer: shift, scale and rotate its cloud onto the images'."""
    x, y = encode(model.image, images), encode(model.text, texts)
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    turn = rotation(x, y).T * x.norm() / y.norm()  # (dim, dim)
    last = model.text.projection  # W h + b becomes turn (W h + b - mean_y) + mean_x, h a column
    last.weight.copy_(turn @ last.weight)
    last.bias.copy_(turn @ (last.bias - mean_y) + mean_x)

@torch.no_grad()
def fold_means(model, images, texts):
    """Change the last biases of both encoders, in place, so that the means of these pairs become 0.
    A centred loss can neither push nor pull the means, and they drift apart in training. If a run
    with --center shows no gap between the means, this function has removed it before measuring."""
    for encoder, inputs in ((model.image, images), (model.text, texts)):
        encoder.projection.bias -= encode(encoder, inputs).mean(0)

# -- 5. Settings and data --------------------------------------------------------------------------
class UserError(Exception):
    """A mistake of the user's: the command line prints it as one line and exits with 2."""

def require(fact, message):
    """Raise UserError with the message unless the fact holds."""
    if not fact:
        raise UserError(message)

def setting(default, text, low=0, high=1e9):
    """A field of Config: its default, its text in --help, and its lowest and highest number."""
    return field(default=default, metadata={"help": text, "low": low, "high": high})

@dataclass
class Config:
    """All settings of a run; each is a flag of the command line. Numbers of other types, such as
    NumPy's, become those declared here. Raises UserError for a value that does not fit."""
    unif: float = setting(0.0, "weight of uniformity; the paper's CUA is --unif 1 --align 1")
    align: float = setting(0.0, "weight of alignment")
    xunif: float = setting(0.0, "weight of cross-modal uniformity; CUAXU is CUA with --xunif 1")
    center: bool = setting(False, "hide the means from the loss, and set them to 0 when measuring")
    temperature: float = setting(0.01, "T of CLIP's loss (not 1 / T), or its start", 0.01, 1)
    learn_temperature: bool = setting(False, "learn T, between 0.01 and 1")
    data: str = setting("synthetic", "synthetic, an MS-COCO folder, or a CSV file: image,caption")
    limit: int = setting(0, "training images at most; 0: 20,000 scenes, or all photographs")
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
    eval_every: int = setting(250, "steps between evaluations, which save checkpoints", 1)
    out: str = setting("", "new folder; default: runs/<time>-<loss>-seed<seed>")
    def __post_init__(self):
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            try:
                if f.type is str:
                    converted, fits = os.fspath(value), True
                else:
                    converted = f.type(value)  # NumPy's numbers become Python's
                    fits = converted == value and low <= value <= high
            except (TypeError, ValueError, OverflowError):
                fits = False
            kind = {str: "text", bool: "True or False", int: "a whole number", float: "a number"}
            between = f" from {low:g} to {high:g}" if f.type in (int, float) else ""
            require(fits, f"--{f.name.replace('_', '-')} must be {kind[f.type]}"
                          f"{between}, not {value!r}")
            setattr(self, f.name, converted)
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
    """Images with K texts each. A text is a caption or, with same_modality, the image again. Your
    own encoders may take other tensors."""
    images: torch.Tensor  # (N, 3, S, S) uint8
    texts: torch.Tensor  # (N, K, L) int32 tokens, padded with 0, or (N, 1, 3, S, S) uint8
    def take(self, i, epoch=0):
        """Images i (indices or a slice), each with one of its texts, another in each epoch."""
        return self.images[i], self.texts[i, epoch % self.texts.shape[1]]

# training, held_out: Pairs. group: (N,) integers, equal for held-out images whose first captions
# are equal, or None. vocab: {word: token}. tasks: (ZeroShot, Arithmetic). source: a hash of file
# names and captions, by which a resumed run knows its data. Your own model needs only two Pairs.
Data = namedtuple("Data", "training held_out group vocab tasks source",
                  defaults=(None, None, None, ""))
# Zero-shot classification: of all prompts (48, L), the right one, prompts[labels[i]], should be
# nearest to images[i]. unseen (n,): is this a colour and shape that training never combines?
ZeroShot = namedtuple("ZeroShot", "images labels unseen prompts")
# Arithmetic: pool[query[q]] + text(new[q]) - text(old[q]) should be nearest to a pool[i] for which
# correct[q, i] holds. Example: an image of "a red ring above a white cross", new "blue", old "red";
# the images that show "a blue ring above a white cross" are correct.
Arithmetic = namedtuple("Arithmetic", "pool query old new correct")

def prepare(data, cfg):
    """Data as cfg wants them: limited, of one modality, with mismatched training captions."""
    n, held_out = min(cfg.limit or math.inf, len(data.training.images)), data.held_out
    images, texts = data.training.images[:n], data.training.texts[:n]
    require(n >= cfg.batch and len(held_out.images) >= 5, f"too few images: {n} for a batch of "
            f"{cfg.batch}, {len(held_out.images)} held out (5 at least)")
    if cfg.same_modality:
        texts, held_out = images[:, None], Pairs(held_out.images, held_out.images[:, None])
        data = data._replace(group=None, tasks=None)
    if cfg.mismatch:
        texts = texts[mismatch_captions(n, cfg.mismatch, cfg.seed)]
    return data._replace(training=Pairs(images, texts), held_out=held_out)

# -- 6. Training and evaluation --------------------------------------------------------------------
# With one process, rank_and_world() is (0, 1) and gather does nothing (section 9). A run is a dict
# that is saved into a folder (section 10).
def evaluate(model, data, cfg):
    """A dict of floats: the loss on a batch of training pairs; gap_metrics and search on held-out
    pairs (5,000 at most, the first caption of each); the tasks, if there are any."""
    T = torch.exp(-model.log_scale)
    order = epoch_order(0, len(data.training.images), cfg.seed)
    images, texts = data.training.take(order[:cfg.batch])
    x, y = encode(model.image, images), encode(model.text, texts)
    loss = cgap_loss(x, y, T, **cfg.loss_settings())
    require(loss.isfinite(), "the loss is not finite: lower --lr or raise --temperature")
    metrics = {"train_loss": loss.item(), "temperature": T.item()}
    x, y = embed(model, *data.held_out.take(slice(5000)))
    group = None if data.group is None else data.group[:5000]
    metrics |= gap_metrics(x, y) | search(x, y, group)
    return metrics | do_tasks(model, *data.tasks) if data.tasks else metrics

def do_tasks(model, zero_shot, arithmetic):
    """Accuracies of both tasks, as a dict of floats from 0 to 1. Arithmetic has one for words that
    are attributes of an object, and one for words that are relations."""
    images, prompts = embed(model, zero_shot.images, zero_shot.prompts)
    named = ((images @ prompts.T).argmax(1).cpu() == zero_shot.labels).float()
    pool, new = embed(model, arithmetic.pool, arithmetic.new)
    old = normalize(encode(model.text, arithmetic.old))
    query = arithmetic.query.to(pool.device)
    scores = (pool[query] + new - old) @ pool.T  # (Q, m)
    scores.scatter_(1, query[:, None], -math.inf)  # the question's own image is no answer
    answer = scores.argmax(1, keepdim=True).cpu()
    found = arithmetic.correct.gather(1, answer).float().view(5, -1)  # the last fifth: relations
    right = {"zero_shot": named, "zero_shot_unseen": named[zero_shot.unseen],
             "arithmetic_attribute": found[:4], "arithmetic_relation": found[4]}
    return {name: values.mean().item() for name, values in right.items()}

@functools.lru_cache(2)  # drawn once an epoch, not at each step: for COCO it takes milliseconds
def epoch_order(epoch, n, seed):
    """The order of n pairs in an epoch. It needs no state, so a run can go on at any step."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(n, generator=generator)

def next_batch(pairs, step, cfg, device):
    """This process's share of a step's batch, on the device."""
    n = len(pairs.images)
    epoch, k = divmod(step, n // cfg.batch)
    rank, world = rank_and_world()
    share = epoch_order(epoch, n, cfg.seed)[k * cfg.batch:(k + 1) * cfg.batch][rank::world]
    return [part.to(device) for part in pairs.take(share, epoch)]

def make_optimizer(model, cfg):
    """AdamW, with weight decay for matrices, not for biases, norms and the temperature."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": cfg.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, cfg.lr, (0.9, 0.98), fused=True)

def learning_rate(step, cfg):
    """The lower of a linear warm-up over a tenth of the steps and a cosine that ends at 0."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / cfg.steps)
    return cfg.lr * min((step + 1) / (0.1 * cfg.steps), cosine)

def record(run, step, model, optimizer, data, quiet):
    """At some steps: keep a snapshot for the figures. At fewer: evaluate, save the run, print a
    line. If the loss is centred, fold_means comes first (with fewer pairs for a snapshot)."""
    cfg = run["cfg"]
    evaluating = step % cfg.eval_every == 0 or step == cfg.steps
    drawing = step % math.ceil(cfg.steps / 30) == 0 or step == cfg.steps
    if cfg.center and (evaluating or drawing):
        fold_means(model, *data.training.take(slice(2048 if evaluating else 256)))
    if rank_and_world()[0] > 0:
        return
    if drawing:
        x, y = embed(model, *data.held_out.take(slice(256)))
        run["snapshots"][step] = torch.stack([x, y]).half().cpu()
    if evaluating:
        run["history"].append({"step": step, **evaluate(model, data, cfg)})
        save_run(run, model, optimizer)
        if not quiet:
            line = ("step {step:6}  loss {train_loss:7.3f}  separability {linear_separability:.3f}"
                    "  R@1 {i2t_r1:.3f}  mixed search {mixed_i2t:.3f}")
            tqdm.write(line.format(**run["history"][-1]))

def train(cfg, model=None, data=None, quiet=False, run=None):
    """Train two encoders; returns the history, a list of dicts of metrics, one for each evaluation
    ([] in all but the first of several processes). It is also in cfg.out, or a new folder in runs/.
    model: your own nn.Module. It has encoders `image` and `text`, each ending in an nn.Linear
    `projection` with a bias, and a parameter `log_scale`: log(1 / T), kept between 0 and log 100,
    instead of cfg.temperature. model(images, texts) returns raw embeddings x, y and T. Its parts
    keep their mode, train or eval. data: your own Data. run: set by `resume`. Raises UserError."""
    cfg = resolve(cfg, is_new=run is None)
    device = find_device(cfg.device)
    torch.set_flush_denormal(True)  # many softmax values are below 1e-38, where CPUs are slow
    joined = join_processes(device)
    rank, world = rank_and_world()
    require(cfg.batch % world == 0, f"--batch {cfg.batch} is no multiple of {world} processes")
    data = prepare(data or load_data(cfg), cfg)
    torch.manual_seed(cfg.seed)  # global: two trainings in two threads would disturb each other
    model = (model or TwoEncoders(cfg, len(data.vocab or ()))).to(device)
    optimizer = make_optimizer(model, cfg)
    if run:
        restore(run, cfg, data, model, optimizer)
    else:
        run = dict(cfg=cfg, vocab=data.vocab, source=data.source, history=[], snapshots={})
        if cfg.remove_gap:
            remove_initial_gap(model, *data.training.take(slice(2048)))
        record(run, 0, model, optimizer, data, quiet)
    forward = model if world == 1 else nn.parallel.DistributedDataParallel(model)
    start = run["history"][-1]["step"] if run["history"] else 0
    for step in tqdm(range(start, cfg.steps), cfg.name(), disable=quiet or rank > 0):
        x, y, T = forward(*next_batch(data.training, step, cfg, device))
        loss = cgap_loss(gather(x), gather(y), T, **cfg.loss_settings())
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(step, cfg)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.log_scale.data.nan_to_num_(0).clamp_(0, math.log(100))  # 0.01 <= T <= 1; if NaN, 1
        record(run, step + 1, model, optimizer, data, quiet)
    if joined:  # after an error, torchrun ends the waiting processes
        torch.distributed.destroy_process_group()
    return run["history"] if rank == 0 else []

# PART TWO: THE MACHINERY ==========================================================================
# -- 7. Scenes -------------------------------------------------------------------------------------
# One or two coloured shapes with an exact caption. A scene is a row of five numbers: colour and
# shape of the first object, of the second, and the relation, which is -1 if there is no second.
PALETTE = {"red": (.85, .10, .10), "green": (.10, .65, .15), "blue": (.15, .25, .90),
           "yellow": (.95, .90, .15), "purple": (.60, .15, .75), "cyan": (.15, .85, .90),
           "white": (1., 1., 1.), "black": (0., 0., 0.)}
SHAPES = ["circle", "square", "triangle", "diamond", "cross", "ring"]
RELATIONS = ["left of", "above"]  # with "right of", too, one scene would have two captions
WORDS = [list(PALETTE), SHAPES, list(PALETTE), SHAPES, RELATIONS]  # what each number stands for
OBJECTS = torch.cartesian_prod(torch.arange(len(PALETTE)), torch.arange(len(SHAPES)))  # (48, 2)
# Colour k never has shape k % 6 in training: no red circle, green square, ..., black square.
UNSEEN = OBJECTS[:, 0] % len(SHAPES) == OBJECTS[:, 1]
# Centres (x, y) of both objects if the first is alone, side by side, one above the other; and the
# largest shift of each.
PLACES = torch.tensor([[[.5, .5], [.5, .5]], [[.25, .5], [.75, .5]], [[.5, .25], [.5, .75]]])
JITTER = torch.tensor([[.2, .2], [.04, .15], [.15, .04]])

def shape_masks(right, down):
    """Where each of the SHAPES is, (6, ...), at these coordinates from its centre, in radii."""
    a, b = right.abs(), down.abs()
    return torch.stack([right ** 2 + down ** 2 < 1, torch.maximum(a, b) < .85,
                        (down < .85) & (2 * a - down < 1), 1.5 * a + b < 1.1,
                        (torch.minimum(a, b) < .3) & (torch.maximum(a, b) < 1),
                        (right ** 2 + down ** 2 - .72).abs() < .28])

def describe(scenes):
    """The captions of scenes (N, 5)."""
    captions = []
    for colour, shape, colour2, shape2, relation in scenes.tolist():
        caption = f"a {WORDS[0][colour]} {SHAPES[shape]}"
        if relation >= 0:
            caption += f" {RELATIONS[relation]} a {WORDS[2][colour2]} {SHAPES[shape2]}"
        captions.append(caption)
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
        n, kind = len(part), part[:, 4] + 1  # 0: alone, 1: side by side, 2: one above the other
        centre = PLACES[kind] + JITTER[kind][:, None] * (2 * torch.rand(n, 2, 2) - 1)  # (n, 2, xy)
        radius = .2 + .03 * (2 * torch.rand(n, 2, 1, 1) - 1)
        image = .5 + .15 * (2 * torch.rand(n, 1, 1, 1) - 1)
        for k in (0, 1):
            offset = (ticks - centre[:, k, :, None]) / radius[:, k]  # (n, xy, size)
            masks = shape_masks(offset[:, 0, None, :], offset[:, 1, :, None])  # (6, n, size, size)
            inside = masks[part[:, 2 * k + 1], torch.arange(n)]
            inside &= (kind >= k)[:, None, None]  # an object alone has no second
            colour = palette[part[:, 2 * k]] + .08 * torch.randn(n, 3)
            image = torch.where(inside[:, None], colour[..., None, None], image)
        noisy = image + .05 * torch.randn(image.shape)
        images.append((noisy * 255).clamp(0, 255).byte())
    return torch.cat(images)

def scene_tasks(size, vocab, n=200):
    """Zero-shot: 20 drawings of each object. Arithmetic: n scenes, each word of each exchanged."""
    alone = torch.cat([OBJECTS, torch.tensor([[0, 0, -1]]).expand(len(OBJECTS), 3)], 1)  # (48, 5)
    labels = torch.arange(len(alone)).repeat(20)
    zero_shot = ZeroShot(draw_scenes(alone[labels], size), labels, UNSEEN[labels],
                         tokenize(describe(alone), vocab))
    scenes = random_scenes(2 * n, 0.0)
    scenes = scenes[(scenes[:, :2] != scenes[:, 2:4]).all(1)][:n]  # each word names one object only
    edited, old, new = [], [], []
    for k, names in enumerate(WORDS):
        change = torch.randint(1, len(names), (len(scenes),))
        target = scenes.clone()
        target[:, k] = (scenes[:, k] + change) % len(names)
        edited.append(target)
        old += [names[i] for i in scenes[:, k]]
        new += [names[i] for i in target[:, k]]
    edited = torch.cat(edited)  # (5 n, 5)
    pool, query = torch.cat([scenes, edited]), torch.arange(len(scenes)).repeat(len(WORDS))
    correct = (edited[:, None] == pool).all(2)  # equal scenes are equally right
    return zero_shot, Arithmetic(draw_scenes(pool, size), query, tokenize(old, vocab),
                                 tokenize(new, vocab), correct)

def scene_data(cfg):
    """Scenes to train on, 2,000 at most held out (new drawings, few new captions), both tasks."""
    torch.manual_seed(cfg.seed)
    n, size = cfg.limit or 20_000, cfg.image_size or 32
    scenes = random_scenes(n + min(2_000, n), single=0.1)
    captions = describe(scenes)
    vocab = make_vocab(captions[:n])
    images, texts = draw_scenes(scenes, size), tokenize(captions, vocab)[:, None]  # K = 1
    return Data(Pairs(images[:n], texts[:n]), Pairs(images[n:], texts[n:]),
                number_equal(captions[n:]), vocab, scene_tasks(size, vocab))

# -- 8. Words, and photographs ---------------------------------------------------------------------
def words_of(caption):
    """Words and signs in lower case: "A dog's bowl." gives a dog ' s bowl ."""
    return re.findall(r"\w+|[^\w\s]", caption.lower())

def make_vocab(captions):
    """{word: token} of the 10,000 most frequent words; tokens 0 and 1 are padding and unknown."""
    counts = Counter(word for caption in captions for word in words_of(caption))
    known = sorted(word for word, _ in counts.most_common(10_000))
    return {word: token for token, word in enumerate(["<pad>", "<unk>", *known])}

def tokenize(captions, vocab):
    """Tokens (N, L), int32, of the first CONTEXT words of N captions, padded with 0."""
    if isinstance(captions, str):
        raise TypeError("captions must be a list of strings, not one string")
    rows = [[vocab.get(word, 1) for word in words_of(text)[:CONTEXT]] or [1] for text in captions]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int32)

def number_equal(captions):
    """A number for each caption, (N,), equal for captions with the same words."""
    numbers = {}
    return torch.tensor([numbers.setdefault(" ".join(words_of(text)), len(numbers))
                         for text in captions])

def read_coco(file):
    """{path: captions} of the pictures in MS-COCO's JSON file."""
    content = json.loads(file.read_bytes())
    folder, paths, captions = file.parents[1] / file.stem.removeprefix("captions_"), {}, {}
    for image in content["images"]:
        require(image["id"] not in paths, f"{file}: two images have the id {image['id']!r}")
        paths[image["id"]] = folder / image["file_name"]
        captions[paths[image["id"]]] = []
    for note in content["annotations"]:
        if note["image_id"] in paths:  # a part of COCO may have kept the annotations of all
            captions[paths[note["image_id"]]].append(note["caption"])
    require(any(captions.values()), f"{file}: no annotation's image_id is an image's id (5, a "
                                    'number, and "5", a text, are not equal)')
    return captions

def read_csv(file):
    """{path: captions} of a CSV file, whose paths are relative to it."""
    captions = defaultdict(list)
    csv.field_size_limit(2 ** 30)
    with open(file, newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines, strict=True)  # a quote that is never closed is an error
        try:
            header = reader.fieldnames or []
            require(header.count("image") == header.count("caption") == 1,
                    f"{file}: the header must be image,caption, each once, not {header}")
            for row in reader:
                require(None not in row and None not in row.values(), f"{file}, line "
                        f"{reader.line_num}: more or fewer fields than the header; is a comma not "
                        "in quotes?")
                if any(row.values()):  # spreadsheets may end in rows of commas
                    captions[file.parent / row["image"]].append(row["caption"])
        except csv.Error as error:  # in the row after the last one that was read
            raise UserError(f"{file}, from line {reader.line_num + 1} on: {error}") from None
    return captions

def read_pictures(cfg, faults):
    """[images to train on, images held out], each {path: five captions}; fewer than five captions
    are repeated. faults gets {path: why} of the images that cannot be used."""
    path, read, splits = Path(cfg.data), read_csv, [{}, {}]
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("annotations/captions_train20??.json"))[-1:]  # the latest year
        require(files, f"{path} has no annotations/captions_train20xx.json")
        validation = files[0].with_name(files[0].name.replace("train", "val"))
        files, read = files + [validation] * validation.exists(), read_coco
    for usable, file in zip(splits, files):
        try:
            pictures = read(file)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from None
        for image, captions in pictures.items():
            texts = [text for text in captions if isinstance(text, str) and re.search(r"\w", text)]
            if texts and os.path.exists(image):
                usable[image] = [texts[k % len(texts)] for k in range(5)]
            else:
                faults[image] = "no such file" if texts else "no caption with a word"
    training, held_out = splits
    if not held_out:  # a tenth, drawn at random, since lists are often sorted
        paths = list(training)
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
        held_out = {paths[k]: training.pop(paths[k]) for k in order[:len(paths) // 10]}
    return [training, held_out]

def load_photo(path, size):
    """The picture, upright, on white, cropped to a square: (3, size, size) uint8. Raises ValueError
    for channels of more than 8 bits, as it is not known which value is white."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor
    with Image.open(path) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"mode {image.mode} has no known range: save it with 8 bits")
        image.draft(None, (2 * size, 2 * size))  # decodes a JPEG no larger than this needs
        image = ImageOps.exif_transpose(image)
    image = ImageOps.fit(image.convert("RGBA"), (size, size), Image.Resampling.BICUBIC)
    white = Image.new("RGBA", image.size, "white")
    return pil_to_tensor(Image.alpha_composite(white, image).convert("RGB"))

def decode(paths, size):
    """For the cache: the images (n, 3, size, size) that can be read; {place in paths: why not} of
    the others; and the places in paths of images of a single colour."""
    from tqdm.contrib.concurrent import thread_map  # Pillow decodes without the GIL
    images, faults = torch.zeros(len(paths), 3, size, size, dtype=torch.uint8), {}
    def load(k):
        try:
            images[k] = load_photo(paths[k], size)
        except Exception as error:  # a broken file may raise anything
            faults[k] = f"{type(error).__name__}: {error}"
    thread_map(load, range(len(paths)), desc="decoding")
    good = [k for k in range(len(paths)) if k not in faults]
    plain = [k for k in good if (images[k] == images[k, :, :1, :1]).all()]
    return {"images": images[good] if faults else images, "faults": faults, "plain": plain}

def hash_of(*facts):
    """A short hash of what repr says of the facts."""
    return hashlib.sha256(repr(facts).encode(errors="backslashreplace")).hexdigest()[:16]

def load_decoded(paths, cfg):
    """What decode makes of these pictures, from the cache or into it. The cache's name is a hash of
    all that decides its content, so that an outdated one is not found."""
    size, stats = cfg.image_size or 64, [path.stat() for path in paths]
    files = [(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
             for path, stat in zip(paths, stats)]
    name = f"{Path(cfg.data).stem}-{hash_of(size, inspect.getsource(load_photo), files)}.pt"
    cache, (rank, world) = Path(cfg.cache, name), rank_and_world()
    if rank == 0 and not cache.exists():
        save_whole(decode(paths, size), cache)
    if world > 1:
        torch.distributed.barrier()  # the first process makes the cache, the others find it
    try:
        return torch.load(cache, weights_only=True, mmap=True)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{cache} cannot be read; delete it if it is damaged: {error}") from None

def photo_data(cfg):
    """Photographs with five captions each. Their pixels come from the cache; their captions are
    read anew, so that a change of words_of or make_vocab counts."""
    faults = {}
    splits = read_pictures(cfg, faults)
    n = sum(map(len, splits)) + len(faults)
    splits = [dict(list(split.items())[:cfg.limit or None]) for split in splits]
    paths = [path for split in splits for path in split]
    stored = load_decoded(paths, cfg) if all(splits) else {"faults": {}, "plain": []}
    faults |= {paths[k]: why for k, why in stored["faults"].items()}
    named = [f"{path}: {why}"[:200] for path, why in faults.items()]
    splits = [{path: split[path] for path in split if path not in faults} for split in splits]
    require(all(splits), f"{cfg.data} has too few images; {len(named)} of {n} cannot be used"
                         + "".join(f": {fault}" for fault in named[:1]))
    warn(named, f"{len(named)} of {n} images are left out: " + "; ".join(named[:3]))
    plain = [str(paths[k]) for k in stored["plain"]]
    warn(plain, f"{len(plain)} of {n} images are of a single colour: " + "; ".join(plain[:3]))
    training, held_out = ([text for texts in split.values() for text in texts] for split in splits)
    vocab, group = make_vocab(training), number_equal(held_out[::5])
    unread = sum(len(words) > CONTEXT or any(word not in vocab for word in words)
                 for words in map(words_of, held_out)) / len(held_out)
    warn(unread > 0.05, f"{unread:.0%} of held-out captions have words outside the vocabulary, or "
                        f"more than {CONTEXT} words: the model does not read those")
    equal = group.bincount().max().item() / len(group)
    warn(equal > 0.5, f"{equal:.0%} of held-out images share one caption, which any model finds")
    m = len(splits[0])
    texts = [tokenize(captions, vocab).unflatten(0, (-1, 5)) for captions in (training, held_out)]
    source = hash_of([(path.name, texts) for split in splits for path, texts in split.items()])
    return Data(Pairs(stored["images"][:m], texts[0]), Pairs(stored["images"][m:], texts[1]),
                group, vocab, None, source)

def warn(fact, message):
    """If the fact holds, the first process prints a line about it."""
    if fact and rank_and_world()[0] == 0:
        print(f"warning: {message}", file=sys.stderr)

def load_data(cfg):
    """The Data that cfg names. Raises UserError if they cannot be used."""
    return scene_data(cfg) if cfg.data == "synthetic" else photo_data(cfg)

# -- 9. Devices and processes ----------------------------------------------------------------------
def find_device(name):
    """The torch.device of that name; `auto` is a GPU if there is one."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"  # as torchrun numbers its processes
    try:
        torch.ones(1, device=name).cpu()
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"device {name} cannot be used: {torch.cuda.device_count()} GPUs here, one "
                        "needed for each process; try --device cpu") from None

def join_processes(device):
    """Become one of the processes that torchrun has started. Returns False if there is no need."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or torch.distributed.is_initialized():
        return False
    require("RANK" in os.environ and "MASTER_ADDR" in os.environ,
            "WORLD_SIZE is set, but not by torchrun: start with torchrun, or unset it")
    backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    if gpu:
        torch.cuda.set_device(gpu)  # else each process also opens the first GPU
    patience = timedelta(days=1)  # the first process may decode for long
    torch.distributed.init_process_group(backend, timeout=patience, device_id=gpu)
    return True

def rank_and_world():
    """This process's number and how many there are: (0, 1) if it is alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1

def gather(rows):
    """The rows (n, D) of all processes, (world * n, D); n must be the same in all, unchecked. As
    all_gather gives constants, one's own rows are put back, with a gradient that is `world` times
    as large, because DistributedDataParallel takes the mean over processes."""
    rank, world = rank_and_world()
    if world == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world)]
    torch.distributed.all_gather(parts, rows.detach().contiguous())
    parts[rank] = rows + (world - 1) * (rows - rows.detach())  # value: rows; gradient: world times
    return torch.cat(parts)

# -- 10. Runs --------------------------------------------------------------------------------------
# A folder with metrics.jsonl (a line for each evaluation), checkpoint.pt and figures. In memory a
# dict: cfg, vocab, source, history, snapshots {step: (2, 256, dim) embeddings of held-out pairs}.
def default_out(cfg):
    """A new name of a folder for a run."""
    return f"runs/{datetime.now():%Y%m%d-%H%M%S.%f}-{cfg.name()}-seed{cfg.seed}"

def resolve(cfg, is_new):
    """cfg with a folder, which must be new, and absolute paths, so that one can resume anywhere."""
    out, data, cache = map(os.path.expanduser, (cfg.out or default_out(cfg), cfg.data, cfg.cache))
    is_first = not (rank_and_world()[0] or int(os.environ.get("RANK") or 0))  # it alone writes
    require(not (is_new and is_first and os.path.exists(out)),
            f"--out {out} exists: name another, or --resume it")
    for flag, folder in (("--out", out), ("--cache", cache)):  # here, before any long work
        nearest = Path(folder).absolute()
        while not os.path.exists(nearest):
            nearest = nearest.parent
        require(nearest.is_dir() and os.access(nearest, os.W_OK) and not folder.startswith("~"),
                f"{flag} {folder} cannot be made: is {nearest} a folder that can be written to?")
    data = data if data == "synthetic" else os.path.abspath(data)
    return replace(cfg, data=data, cache=os.path.abspath(cache), out=out)

def save_whole(content, path):
    """torch.save, so that path never holds half a file. If this process is killed, its draft is
    removed by the next one that saves to the same path (on Linux)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for draft in path.parent.glob(f"{path.name}.*.tmp"):
        if Path("/proc/self").exists() and not Path("/proc", draft.suffixes[-2][1:]).exists():
            draft.unlink(missing_ok=True)
    draft = Path(f"{path}.{os.getpid()}.tmp")
    try:
        torch.save(content, draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)

def save_run(run, model, optimizer):
    """Write metrics.jsonl and checkpoint.pt into the run's folder, which its first save makes."""
    folder = Path(run["cfg"].out)
    folder.mkdir(parents=True, exist_ok=len(run["history"]) > 1)  # fails if another run was first
    lines = "\n".join(map(json.dumps, run["history"]))
    Path(folder, "metrics.jsonl").write_text(lines + "\n")
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_whole(run | states | {"cfg": asdict(run["cfg"])}, Path(folder, "checkpoint.pt"))

def load_run(folder):
    """The run in a folder. Raises UserError if there is none."""
    path = Path(folder, "checkpoint.pt")
    try:
        run = torch.load(path, weights_only=True, map_location="cpu")
        return run | {"cfg": Config(**(run["cfg"] | {"out": str(folder)}))}
    except Exception as error:  # whatever a missing, broken or foreign file may raise
        raise UserError(f"{path} cannot be read by this cgap: {type(error).__name__}") from None

def restore(run, cfg, data, model, optimizer):
    """Put a loaded run's weights in place. Raises UserError if it was trained on other data."""
    require((run["vocab"], run.get("source")) == (data.vocab, data.source),
            f"{cfg.out} was trained on other images or captions than {cfg.data} has now")
    model.load_state_dict(run.pop("model"))
    optimizer.load_state_dict(run.pop("optimizer"))
    run["cfg"] = cfg

def resume(folder, model=None, data=None, quiet=False, moved=None):
    """Go on with the run in a folder from its last evaluation, with its own settings; returns the
    whole history. moved: what may have changed: {"device": ...}, or "data" and "cache" if the same
    pictures lie elsewhere. Data with other file names or captions are refused with a UserError;
    other pixels under the same names are not noticed, nor other data or models of your own."""
    run = load_run(folder)
    return train(replace(run["cfg"], **moved or {}), model, data, quiet, run)

def load_model(folder):
    """The TwoEncoders of a run, on the CPU, for `encode`, and its vocab, for `tokenize`."""
    run = load_run(folder)
    require(run["vocab"] and "image.body.0.weight" in run["model"], f"{folder}: other encoders")
    model = TwoEncoders(run["cfg"], len(run["vocab"]))
    model.load_state_dict(run["model"])
    return model, run["vocab"]

# -- 11. Figures -----------------------------------------------------------------------------------
# {metric: (what it says, in a few words; the ends of its axis)}
PANELS = {"linear_separability": ("separability (0.5: no gap)", (0.4, 1.02)),
          "centroid_distance": ("centroid distance", (0, None)),
          "spread": ("spread (0: a point)", (0, 1.05)),
          "overlap": ("overlap of directions", (0, 1.05)),
          "i2t_r1": ("R@1: image finds its caption", (0, 1.05)),
          "mixed_i2t": ("mixed search: the same in a joint index", (0, 1.05)),
          "unif": ("uniformity (lower: more uniform)", (None, 0)),
          "train_loss": ("loss of training pairs", (None, None))}

def canvas(rows, columns, size=3.8):
    """A matplotlib figure and its panels, an array (rows, columns). No window is opened."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams["text.usetex"] = False  # it needs a LaTeX, which may be missing
    figure = Figure(figsize=(size * columns, size * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)

def plot_metrics(histories, path):
    """A panel for each of PANELS, a line for each of {name: history}, as train returns it."""
    figure, axes = canvas(2, 4)
    for axis, (metric, (title, ends)) in zip(axes.flat, PANELS.items()):
        for name, history in histories.items():
            steps = [record["step"] for record in history]
            axis.plot(steps, [record[metric] for record in history], "o-", ms=3, label=name)
        axis.set(xlabel="training step", title=title, xlim=(0, None), ylim=ends)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path)

def draw_clouds(axis, clouds, title):
    """Images and captions (2, n, D) in the plane through 0 and both means, with lines between some
    pairs. The line between the means is horizontal. All vectors have length 1: a point near the
    centre points out of the plane."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Circle
    x, y = clouds.float().mean(1)
    across = F.normalize(y - x, dim=0)
    up = F.normalize(x + y - (x + y) @ across * across, dim=0)
    points = (clouds.float() @ torch.stack([across, up], 1)).numpy()  # (2, n, 2)
    axis.clear()
    axis.add_patch(Circle((0, 0), 1, fill=False, color="0.7"))
    lines = points[:, :100].transpose(1, 0, 2)  # one collection is drawn quicker than each line
    axis.add_collection(LineCollection(lines, colors="0.8", linewidths=0.5))
    for cloud, marker, name in zip(points, "o^", ("images", "captions")):
        axis.plot(*cloud.T, marker, ms=2.5, label=name)
    axis.set(aspect="equal", xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("centre: pointing out of this plane", fontsize=7)

def plot_clouds(rows, path):
    """Five moments of training of each of {name: {step: clouds (2, n, D)}}, a row each."""
    figure, axes = canvas(len(rows), 5, 2.5)
    for row, (name, clouds) in zip(axes, rows.items()):
        last = len(clouds) - 1
        for axis, k in zip(row, (0, last // 10, last // 4, last // 2, last)):  # denser at the start
            step, both = list(clouds.items())[k]
            draw_clouds(axis, both, f"step {step}: separability {linear_separability(*both):.2f}")
        row[0].set_ylabel(name)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path)

def animate(rows, path):
    """All of training of {name: {step: clouds (2, n, D)}}, side by side, as a GIF."""
    from matplotlib.animation import FuncAnimation
    figure, axes = canvas(1, len(rows))
    def frame(k):
        for axis, (name, clouds) in zip(axes.flat, rows.items()):
            step, both = list(clouds.items())[min(k, len(clouds) - 1)]
            draw_clouds(axis, both, f"{name}\nstep {step}")
    frame(0)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not for each frame
    frames = max(map(len, rows.values())) + 5  # it rests at the end
    FuncAnimation(figure, frame, frames).save(path, "pillow", dpi=80)

def plot_runs(folders, out):
    """All figures of one run or several, into the folder `out`; clouds of the first six only."""
    runs = {}
    for folder in folders:
        run = load_run(folder)
        T = run["history"][-1]["temperature"]
        label = f"{run['cfg'].name()}, T = {T:.2g}, seed {run['cfg'].seed}"
        runs[label if label not in runs else f"{label} ({folder})"] = run
    clouds = {label: run["snapshots"] for label, run in list(runs.items())[:6]}
    os.makedirs(out, exist_ok=True)
    plot_metrics({label: run["history"] for label, run in runs.items()}, f"{out}/gap.png")
    plot_clouds(clouds, f"{out}/embeddings.png")
    animate(clouds, f"{out}/embeddings.gif")
    print(f"{out}: gap.png, embeddings.png, embeddings.gif")

# -- 12. The command line --------------------------------------------------------------------------
# What the three modes take beside their own flag
MODES = {"points": {"temperature", "dim", "seed", "steps", "mismatch", "out"},
         "plot": {"out"}, "resume": {"device", "data", "cache"}}

def run_points(out="runs/points", **settings):
    """Run the smallest gap in four ways, print how each ends and draw them."""
    os.makedirs(out, exist_ok=True)
    torch.set_num_threads(1)  # so little work is not worth sharing
    torch.set_flush_denormal(True)
    shown = ["linear_separability", "centroid_distance", "spread", "overlap", "mixed_i2t"]
    ways = {"points alone": {"offset_lr": 0}, "with offsets": {},
            "with offsets, T = 0.2": {"temperature": 0.2},
            "with offsets, both terms": {"unif": 1, "align": 1}}
    rows = {}
    print(f"{'at the end':26}", *shown)
    for name, changes in ways.items():
        history, rows[name] = smallest_gap(**(settings | changes))
        print(f"{name:26}", *(f"{history[-1][metric]:{len(metric)}.3f}" for metric in shown))
    plot_clouds(rows, f"{out}/points.png")
    print(f"{out}/points.png")

def train_command(folder, settings):
    """Train a new run or, if a folder is given, resume it; print how it began and how it ended, and
    draw its figures."""
    out = folder or settings.setdefault("out", default_out(Config(**settings)))
    try:
        history = resume(folder, moved=settings) if folder else train(Config(**settings))
        if history:  # of several processes, only the first has one
            print(f"\nmeasured on held-out pairs, except train_loss\n{'start':>34}{'end':>10}")
            for name, value in list(history[-1].items())[1:]:  # all but the step
                print(f"{name:24}{history[0][name]:10.3f}{value:10.3f}")
            plot_runs([out], out)
    except KeyboardInterrupt:
        print(f"\ninterrupted: if training had begun, --resume {out} goes on", file=sys.stderr)
        sys.exit(130)

def run_command(given):
    """Do what the flags say: a dict of those that were given."""
    require("" not in given.values(), "a flag has an empty value")
    for mode, takes in MODES.items():
        others = sorted(f"--{name.replace('_', '-')}" for name in given.keys() - takes - {mode})
        require(mode not in given or not others,
                f"{' '.join(others)} does nothing with --{mode}: leave it out")
    if given.pop("points", False):
        Config(**given)  # checks the settings
        run_points(**given)
    elif "plot" in given:
        runs = [folder for folder in given["plot"] if Path(folder, "checkpoint.pt").exists()]
        for folder in sorted(set(given["plot"]) - set(runs)):
            print(f"left out: {folder} has no checkpoint.pt", file=sys.stderr)
        require(runs, "--plot: none of these is a run")
        plot_runs(runs, given.get("out", "runs/plot"))
    else:
        train_command(given.pop("resume", None), given)

def main(argv=None):
    """Run the command line."""
    os.environ["MPLBACKEND"] = "agg"  # no window is opened, whatever a notebook has set
    parser = argparse.ArgumentParser(
        prog="cgap.py", usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS,
        allow_abbrev=False, description="The contrastive gap: watch it open, and close it.",
        epilog="example: python cgap.py --unif 1 --align 1 --temperature 0.1 --mismatch 0.2")
    takes = {mode: "takes --" + " --".join(sorted(flags)) for mode, flags in MODES.items()}
    parser.add_argument("--points", action="store_true",
                        help="the smallest gap: no encoders; " + takes["points"])
    parser.add_argument("--resume", metavar="RUN", help="go on with a run; " + takes["resume"])
    parser.add_argument("--plot", metavar="RUN", nargs="+", help="draw runs; " + takes["plot"])
    for f in fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        default = "" if f.type is bool or f.default == "" else f" (default: {f.default})"
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, help=f.metadata["help"] + default, **kind)
    try:
        run_command(vars(parser.parse_args(argv)))
    except (UserError, OSError) as error:
        parser.error(" ".join(str(error).split()))  # in one line, and exits with 2

if __name__ == "__main__":
    main()
