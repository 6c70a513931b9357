"""Stage 2 of MaskGIT (§3.2, §3.3): the bidirectional transformer, masked training, parallel and sequential decoding.

Read it beside the paper:
    gamma, mask_counts        the mask scheduling functions (§3.4, Table 3)
    mask_tokens, mvtm_loss    masked visual token modelling (§3.2, Eq. 1)
    decode                    iterative parallel decoding, the four steps of §3.3
    decode_sequential         the raster-scan decoding that the paper compares with, by a causal transformer
The transformer is the released one, number for number: BERT with LayerNorm after each residual sum; the class is the
first of N + 1 positions; one table embeds codes, then classes, then [MASK], and its code rows are the output layer.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lib.runtime import from_host


@dataclass
class MaskGITConfig:
    """The defaults are the paper's ImageNet 256x256 model (the paper says 8 heads, the released weights have 16)."""
    codebook_size: int = 1024
    num_classes: int = 1000
    num_tokens: int = 256       # N: 16 x 16 tokens of an image
    dim: int = 768
    depth: int = 24
    heads: int = 8
    mlp_dim: int = 3072
    dropout: float = 0.1
    causal: bool = False        # each position sees itself and those before: the autoregressive baseline
    null_class: bool = False    # an extra "no class" embedding, for classifier-free guidance (not in the paper)

    @property
    def default_steps(self):
        """T of the paper: 8, and 12 for 32 x 32 tokens (§4.2)."""
        return 12 if self.num_tokens > 256 else 8


# ------------------------------------------------------------------------------------------------ the transformer

class KeyValueCache:
    """What one layer of a causal transformer remembers of the positions so far, so that each pass computes only one.

    position: (1,) int64, the number of the position that comes next, shared by all layers."""

    def __init__(self, num_tokens, position):
        self.num_tokens, self.position, self.keys, self.values = num_tokens, position, None, None

    def update(self, key, value):
        """Adds one position's (B, H, 1, D/H) -> keys and values of all N positions, and (1, N), which of them are seen.

        Those to come are masked, not cut off: the shapes stay the same, so one compiled graph serves every position."""
        if self.keys is None:
            self.keys, self.values = (key.new_zeros(*key.shape[:2], self.num_tokens, key.shape[3]) for _ in range(2))
        self.keys.index_copy_(2, self.position, key)
        self.values.index_copy_(2, self.position, value)
        seen = torch.arange(self.num_tokens, device=key.device) <= self.position
        return self.keys, self.values, seen[None]


class Attention(nn.Module):
    """Multi-head self-attention over all positions, or (causal) those up to each: (B, L, dim) -> (B, L, dim)."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout, self.causal = config.heads, config.dropout, config.causal
        self.qkv = nn.Linear(config.dim, 3 * config.dim)       # queries, keys and values in one product
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x, cache=None):
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each (B, H, L, D/H)
        k, v, seen = (k, v, None) if cache is None else cache.update(k, v)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=self.dropout if self.training else 0.0,
                                           is_causal=self.causal and cache is None)
        return self.out(x.transpose(1, 2).reshape(B, L, D))


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each with dropout, a residual sum and a LayerNorm after the sum."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-12)
        self.mlp = nn.Sequential(nn.Linear(config.dim, config.mlp_dim), nn.GELU("tanh"),
                                 nn.Linear(config.mlp_dim, config.dim))
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        x = self.norm1(x + self.dropout(self.attention(x, cache)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class MaskGIT(nn.Module):
    """The bidirectional transformer: p(every token | the tokens not masked, the class).

    With config.causal the autoregressive baseline of the same size: p(every token | the tokens before it, the class).
    Raises ValueError where the heads do not divide the width."""
    Config = MaskGITConfig

    def __init__(self, config):
        super().__init__()
        if config.dim % config.heads:
            raise ValueError(f"the width {config.dim} is not divisible by the {config.heads} heads")
        self.config = config
        self.mask_id = config.codebook_size + config.num_classes        # the row of [MASK]
        rows = self.mask_id + 1 + config.null_class                     # codes, classes, [MASK] (, null class)
        self.null_label = config.num_classes + 1 if config.null_class else None   # as a label, the row after [MASK]
        self.token_embedding = nn.Embedding(rows, config.dim)
        self.position_embedding = nn.Embedding(config.num_tokens + 1, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.head = nn.Sequential(nn.Linear(config.dim, config.dim), nn.GELU("tanh"),
                                  nn.LayerNorm(config.dim, eps=1e-12))
        self.head_bias = nn.Parameter(torch.zeros(rows))
        self.apply(self._init)

    @staticmethod
    def _init(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, 0, 0.02, -0.04, 0.04)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, tokens, labels):
        """Logits of the codebook entries at every position.

        tokens: (B, N) int64, a code or mask_id (causal: the first n <= N codes, of which the last is not looked at).
        labels: (B,) int64 in [0, num_classes), or null_label where the model has one. Returns (B, N, codebook_size)."""
        rows = torch.cat([labels[:, None] + self.config.codebook_size, tokens], dim=1)      # (B, N + 1)
        # Causal: position i sees the class and the first i tokens, and predicts token i; the last is only predicted.
        return self.predict(rows[:, :-1] if self.config.causal else rows)

    def predict(self, rows, caches=None):
        """Rows of the embedding (B, L), the class first -> logits of the tokens, (B, L - 1, codebook_size); causal: of
        what follows each, (B, L, codebook_size). caches: from empty_caches, to give one position at a time (L = 1)."""
        if caches is None:
            positions = self.position_embedding.weight[:rows.shape[1]]
        else:
            positions = self.position_embedding(caches[0].position)
        x = self.dropout(self.norm(self.token_embedding(rows) + positions))
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, cache)
        if not self.config.causal:
            x = x[:, 1:]                                      # each position predicts its own token; the class has none
        codes = self.config.codebook_size
        # The output is tied to the embedding of codes alone: no other row is ever a target or a sample.
        return F.linear(self.head(x), self.token_embedding.weight[:codes], self.head_bias[:codes])

    def empty_caches(self):
        """A KeyValueCache for each layer."""
        position = torch.zeros(1, dtype=torch.long, device=self.head_bias.device)
        return [KeyValueCache(self.config.num_tokens, position) for _ in self.blocks]


# --------------------------------------------------------------------------------------- mask schedules (Table 3)

# γ(r) as functions of r and the number of tokens N, which two of them need to get from one token to all.
GAMMAS = {
    "cosine": lambda r, N: torch.cos(r * (math.pi / 2)),
    "linear": lambda r, N: 1 - r,
    "square": lambda r, N: 1 - r ** 2,
    "cubic": lambda r, N: 1 - r ** 3,
    "exponential": lambda r, N: 1 - 2 ** (-math.log2(max(N, 1)) * (1 - r)),
    "sqrt": lambda r, N: 1 - r ** 0.5,
    "logarithmic": lambda r, N: -torch.log2(r) / math.log2(max(N, 2)),
}
SCHEDULES = list(GAMMAS)


def gamma(r, schedule, total):
    """The mask scheduling function γ(r), from 1 at r = 0 (all masked) down to 0 at r = 1.

    r: float or tensor in [0, 1]. schedule: one of SCHEDULES. total: the number of tokens. Returns a tensor in (0, 1].
    Raises ValueError for an unknown schedule. Source: §3.4; base 2 and the cut at 1e-6 as released."""
    if schedule not in GAMMAS:
        raise ValueError(f"unknown schedule '{schedule}'; choose one of: {', '.join(SCHEDULES)}")
    r = torch.as_tensor(r, dtype=torch.float32)  # float32, so that the floor in mask_counts rounds as it did there
    return GAMMAS[schedule](r, total).clamp(1e-6, 1)


def mask_counts(schedule, steps, total, start_step=0):
    """How many of `total` tokens are still masked after steps start_step + 1 .. steps: a list of ints that ends in 0.

    floor(γ(t / T) · N), but at least 1 and at least one fewer than before (until one is left), as released; the paper
    writes a ceiling. Raises ValueError for an unknown schedule."""
    counts, masked = [], total
    for t in range(start_step + 1, steps):
        scheduled = math.floor(gamma(t / steps, schedule, total).item() * total)
        masked = max(min(scheduled, masked - 1), min(1, total))
        counts.append(masked)
    return counts + [0]


# -------------------------------------------------------------------------------------- training (§3.2, MVTM)

def ranks(values):
    """(B, N) -> (B, N) int64, how many values of its row are smaller than each: a permutation of 0 .. N - 1."""
    return values.argsort(1).argsort(1)


def mask_tokens(tokens, schedule, mask_id, generator=None):
    """Replaces ⌈γ(r)·N⌉ random tokens of each row by [MASK], r uniform in [0, 1) and drawn for each row.

    tokens: (B, N) int64. generator: of the CPU, so that the masks are the same on every device. Returns (masked
    tokens, mask), both (B, N); mask is boolean, true where masked. Shapes do not depend on r, so one compiled graph
    serves every step."""
    B, N = tokens.shape
    r, noise = (from_host(torch.rand(B, length, generator=generator), tokens) for length in (1, N))
    mask = ranks(noise) < (gamma(r, schedule, N) * N).ceil()               # the first so many of a random permutation
    return torch.where(mask, mask_id, tokens), mask


def mvtm_loss(logits, targets, mask, label_smoothing=0.1):
    """Masked visual token modelling (Eq. 1): the cross-entropy of the masked tokens, and of no other.

    logits: (B, N, codebook_size); targets, mask: (B, N). Returns the mean over images of the mean over each image's
    masked tokens (released code), a scalar."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), label_smoothing=label_smoothing,
                           reduction="none").view_as(targets)
    return ((loss * mask).sum(1) / (mask.sum(1) + 1e-8)).mean()


# ------------------------------------------------------------------------------------ parallel decoding (§3.3)

@torch.no_grad()
def decode(model, labels, steps=8, schedule="cosine", known=None, choice_temperature=4.5, temperature=1.0, top_k=None,
           cfg=0.0, order="confidence", start_step=0, generator=None, return_steps=False):
    """Iterative parallel decoding (§3.3): all tokens of an image in `steps` forward passes.

    labels: (B,) int64. steps: T, from 1 to N. known: (B, N) tokens to keep, mask_id where unknown (None: all unknown);
    the schedule counts the unknown ones alone. choice_temperature: how much noise chooses among confident tokens,
    annealed to 0 (released code; the paper has none, and samples turn flat and monochrome without it).
    temperature: of the token samples, 0 for the likeliest. top_k: sample among the k likeliest. cfg: weight of
    classifier-free guidance, growing linearly with t; needs a model with a null class. order: one of ORDERS, what is
    revealed first. start_step: steps passed over, for a start from known tokens (the released demo edits with 2 of 12).
    Returns tokens (B, N) int64; with return_steps, also a list of (predicted tokens, mask of those that stay masked,
    confidence, infinite where known), each (B, N), one triple a step. Raises ValueError for a bad argument."""
    check_decoding(model, steps, start_step, cfg, order)
    B, N, mask_id, history = len(labels), model.config.num_tokens, model.mask_id, []
    tokens = torch.full((B, N), mask_id, device=labels.device) if known is None else known
    masked = tokens == mask_id
    unknown = [N] * B if known is None else masked.sum(1).tolist()                           # M of each image
    counts = {M: mask_counts(schedule, steps, M, start_step) for M in set(unknown)}
    counts = torch.tensor([counts[M] for M in unknown], device=labels.device)                # (B, T - start_step)
    for t in range(start_step + 1, steps + 1):
        # 1. Predict: the probabilities of all masked tokens, in parallel.
        logits = guided_logits(model, tokens, labels, cfg * t / steps)                       # (B, N, codebook_size)

        # 2. Sample a token at every masked position; its probability is the confidence. Known tokens stay.
        predicted = torch.where(masked, sample_tokens(logits, temperature, top_k, generator), tokens)
        noise = choice_temperature * (1 - t / steps)
        confidence = CONFIDENCES[order](logits, predicted, noise, generator).masked_fill(~masked, math.inf)

        # 3. Mask schedule: n = γ(t / T)·M tokens stay masked, M being those unknown at the start.
        n = counts[:, t - 1 - start_step, None]

        # 4. Mask the n least confident tokens again.
        masked = ranks(confidence) < n
        tokens = torch.where(masked, mask_id, predicted)
        history.append((predicted, masked, confidence))
    return (tokens, history) if return_steps else tokens


def check_decoding(model, steps, start_step, cfg, order):
    """Raises ValueError for what decode() cannot do."""
    if model.config.causal:
        raise ValueError("an autoregressive transformer decodes token by token, not in parallel")
    if not 1 <= steps <= model.config.num_tokens:
        raise ValueError(f"steps must be from 1 to the number of tokens, {model.config.num_tokens}, not {steps}")
    if not 0 <= start_step < steps:
        raise ValueError(f"the start step must be from 0 to {steps - 1}, one fewer than the steps, not {start_step}")
    if order not in CONFIDENCES:
        raise ValueError(f"unknown order '{order}'; choose one of: {', '.join(CONFIDENCES)}")
    if cfg and model.null_label is None:
        raise ValueError("guidance needs a model with a null class: train one with --class-dropout 0.1")


def guided_logits(model, tokens, labels, weight):
    """The model's logits, float32; with a weight, pushed away from those without a class (Ho & Salimans 2022)."""
    if not weight:
        return model(tokens, labels).float()
    no_class = torch.full_like(labels, model.null_label)
    both = model(torch.cat([tokens, tokens]), torch.cat([labels, no_class])).float()
    conditional, unconditional = both.chunk(2)
    return conditional + weight * (conditional - unconditional)


def gumbel_noise(like, generator=None):
    """Standard Gumbel noise of the shape of `like`; argmax(logits + noise) is a sample of softmax(logits)."""
    uniform = torch.rand(like.shape, device=like.device, generator=generator)
    return -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))


def sample_tokens(logits, temperature, top_k, generator=None):
    """(..., codebook_size) -> tokens (...): a sample at each position, the likeliest at temperature 0.

    Raises ValueError for a top_k above codebook_size."""
    if top_k:
        if top_k > logits.shape[-1]:
            raise ValueError(f"top-k must be at most the size of the codebook, {logits.shape[-1]}, not {top_k}")
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if temperature > 0:
        logits = logits / temperature + gumbel_noise(logits, generator)
    return logits.argmax(-1)


# What is revealed first: each function gives a confidence (B, N) for the tokens that were sampled, the highest first.

def by_confidence(logits, predicted, noise, generator):
    """log p of each sampled token, plus `noise` times Gumbel noise (released code)."""
    codes = predicted.clamp(max=logits.shape[-1] - 1)      # a known token may be no code; its confidence is not used
    log_p = logits.log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1)
    return log_p + noise * gumbel_noise(log_p, generator) if noise > 0 else log_p


def by_chance(logits, predicted, noise, generator):
    return torch.rand(predicted.shape, device=predicted.device, generator=generator)


def by_halton(logits, predicted, noise, generator):
    return -halton_order(predicted.shape[1]).argsort().float().expand(predicted.shape).to(predicted.device)


CONFIDENCES = {"confidence": by_confidence, "random": by_chance, "halton": by_halton}
ORDERS = list(CONFIDENCES)


# ------------------------------------------------------------- sequential decoding, the baseline (§3.1, Table 1: VQGAN)

@torch.no_grad()
def decode_sequential(model, labels, temperature=1.0, top_k=None, generator=None, cached=True):
    """Autoregressive decoding in raster order: N forward passes, each of which samples one token of every image.

    model: a MaskGIT with config.causal. labels: (B,) int64. temperature, top_k: as for decode. cached: keep the keys
    and values of the tokens so far, so that a pass computes one position; else each computes all of them so far anew.
    Returns tokens (B, N) int64. Raises ValueError for a model that is not causal."""
    N, B = model.config.num_tokens, len(labels)
    if not model.config.causal:
        raise ValueError("this transformer is not autoregressive: train one with --decoder autoregressive")
    rows = torch.zeros(B, N + 1, dtype=torch.long, device=labels.device)                    # the class, then the tokens
    rows[:, 0] = labels + model.config.codebook_size
    caches = model.empty_caches() if cached else None
    for i in range(N):
        logits = model.predict(rows[:, i:i + 1], caches) if cached else model.predict(rows[:, :i + 1])
        rows[:, i + 1] = sample_tokens(logits[:, -1].float(), temperature, top_k, generator)
        if cached:
            caches[0].position.add_(1)                                                        # of all layers
    return rows[:, 1:]


# ----------------------------------------------------------------------------------------- what the paper does not have

def halton_order(num_tokens):
    """A permutation of the token grid that covers it evenly at every length: Halton points of bases 2 and 3.

    num_tokens: a square number. Returns (num_tokens,) int64, the raster positions in the order they are revealed.
    Raises ValueError where num_tokens is not a square. Source: Halton 1964; for MaskGIT, Besnier et al. 2025."""
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"the halton order needs a square token grid, not {num_tokens} tokens")

    def radical_inverse(i, base):          # mirrors the digits of i at the point: 6 = 110 in base 2 -> 0.011
        value, scale = 0.0, 1.0
        while i:
            i, digit = divmod(i, base)
            scale /= base
            value += digit * scale
        return value

    order, i = {}, 0                       # a dict keeps its keys in order, and each only once
    while len(order) < num_tokens:         # every cell is hit in the end
        i += 1
        order[int(radical_inverse(i, 2) * side) * side + int(radical_inverse(i, 3) * side)] = None
    return torch.tensor(list(order))
