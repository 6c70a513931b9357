"""Stage 2 of MaskGIT (§3.2, §3.3): the bidirectional transformer, masked training, parallel and sequential decoding.

Read it beside the paper:
    gamma, mask_counts        the mask scheduling functions (§3.4, Table 3)
    mask_tokens, mvtm_loss    masked visual token modelling (§3.2, Eq. 1)
    decode                    iterative parallel decoding, the four steps of §3.3
    decode_sequential         the raster-scan decoding that the paper compares with, by a causal transformer of the same size
The transformer is the released one, number for number: BERT with LayerNorm after each residual sum; the class is the
first of N + 1 positions; one table embeds codes, then classes, then [MASK], and its code rows are the output layer.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


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


# ------------------------------------------------------------------------------------------------ the transformer

class Linear(nn.Linear):
    """nn.Linear, and as fast as memory allows for the few rows, on the CPU, of sequential decoding with a cache."""

    def forward(self, x):
        rows = x.numel() // self.in_features
        if rows > 4 or x.device.type != "cpu":
            return super().forward(x)
        # The time is that of reading the weights. MKL's x Wᵀ reads 13 GB/s where memory gives 34; W xᵀ reads 28 to 32, but not
        # for one column, so a single row is doubled.
        x2 = x.reshape(rows, -1)
        x2 = torch.cat([x2, x2]) if rows == 1 else x2
        return F.linear(self.weight, x2).T[:rows].add(self.bias).view(*x.shape[:-1], -1)


class Dropout(nn.Module):
    """nn.Dropout; on the CPU, where drawing the random numbers took a ninth of a training step, seven times as fast."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if x.device.type != "cpu" or not self.training or not self.p:
            return F.dropout(x, self.p, self.training)
        # Each 64-bit random number decides on four elements: 16 bits are below n with a probability of n / 65,536.
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)[:x.numel()]
        n = round(self.p * 65536)
        keep = bits.view(x.shape) >= n - 32768
        return x * keep.to(x.dtype).mul_(65536 / (65536 - n))


class Attention(nn.Module):
    """Multi-head self-attention: over all positions, or those up to each where config.causal. (B, L, dim) -> (B, L, dim)."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout, self.causal = config.heads, Dropout(config.dropout), config.causal
        self.qkv = Linear(config.dim, 3 * config.dim)  # queries, keys and values in one product
        self.out = Linear(config.dim, config.dim)

    def forward(self, x, cache=None, position=None):
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each (B, H, L, D/H)
        if cache is None and x.device.type == "cpu":
            # softmax(q kᵀ / √d) v, written out: torch's kernel for the CPU is slower, and with dropout there is none.
            scores = (q * (D // self.heads) ** -0.5) @ k.transpose(-1, -2)
            if self.causal:
                scores = scores.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -math.inf)
            x = self.dropout(scores.softmax(-1)) @ v
        elif cache is None:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout.p if self.training else 0.0, is_causal=self.causal)
        else:
            # One position (L = 1) sees what those before it left in the cache (2, B, H, N, D/H). All N rows are read and the
            # later ones masked: the shapes are the same at every position, so one compiled graph serves them all.
            keys, values = cache[0].index_copy_(2, position, k), cache[1].index_copy_(2, position, v)
            seen = torch.arange(cache.shape[3], device=x.device) <= position
            x = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[None])
        return self.out(x.transpose(1, 2).reshape(B, L, D))


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each with dropout, a residual sum and a LayerNorm after the sum."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-12)
        self.mlp = nn.Sequential(Linear(config.dim, config.mlp_dim), nn.GELU("tanh"),
                                 Linear(config.mlp_dim, config.dim))
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-12)
        self.dropout = Dropout(config.dropout)

    def forward(self, x, cache=None, position=None):
        x = self.norm1(x + self.dropout(self.attention(x, cache, position)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class MaskGIT(nn.Module):
    """The bidirectional transformer: p(every token | the tokens not masked, the class).

    With config.causal the autoregressive baseline of the same size: p(every token | the tokens before it, the class)."""

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
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.head = nn.Sequential(Linear(config.dim, config.dim), nn.GELU("tanh"),
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

        tokens: (B, N) int64, a code or mask_id (causal: the first n <= N codes, of which the last is not looked at). labels:
        (B,) int64 in [0, num_classes), or null_label where the model has one. Returns (B, N, codebook_size)."""
        rows = torch.cat([labels[:, None] + self.config.codebook_size, tokens], dim=1)      # (B, N + 1)
        # Causal: position i sees the class and the first i tokens, and predicts token i; the last token is only predicted.
        return self.predict(rows[:, :-1] if self.config.causal else rows)

    def predict(self, x, cache=None, position=None):
        """Rows of the embedding (B, L), the class first -> logits of the tokens (B, L or, bidirectional, L - 1, codebook_size).

        cache, position: for decode_sequential, which gives one position at a time (L = 1): the keys and values of those before,
        from empty_cache, where this one's are added; and its number, (1,) int64."""
        places = self.position_embedding.weight[:x.shape[1]] if cache is None else self.position_embedding(position)
        x = self.dropout(self.norm(self.token_embedding(x) + places))
        for i, block in enumerate(self.blocks):
            x = block(x) if cache is None else block(x, cache[i], position)
        if not self.config.causal:
            x = x[:, 1:]                                       # each position predicts its own token; the class has none
        codes = self.config.codebook_size
        # The output is tied to the embedding of codes alone: no other row is ever a target or a sample.
        return F.linear(self.head(x), self.token_embedding.weight[:codes], self.head_bias[:codes])

    def empty_cache(self, batch):
        """Room for the keys and values of every layer and position: (depth, 2, batch, heads, N, dim / heads)."""
        config, weight = self.config, self.position_embedding.weight
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return torch.zeros(config.depth, 2, batch, config.heads, config.num_tokens, config.dim // config.heads, dtype=dtype,
                           device=weight.device)


# --------------------------------------------------------------------------------------- mask schedules (Table 3)

SCHEDULES = "cosine linear square cubic exponential sqrt logarithmic".split()


def gamma(r, schedule, total):
    """The mask scheduling function γ(r), from 1 at r = 0 (all masked) down to 0 at r = 1.

    r: float or tensor in [0, 1]. schedule: one of SCHEDULES. total: the number of tokens, which the exponential and
    the logarithmic schedule need to get from one token to all. Returns a tensor in (0, 1].
    Raises ValueError for an unknown schedule. Source: §3.4; base 2 and the cut at 1e-6 as released."""
    r = torch.as_tensor(r, dtype=torch.float32)  # float32, so that the floor in mask_counts rounds as it did there
    if schedule == "cosine":
        value = torch.cos(r * (math.pi / 2))
    elif schedule == "linear":
        value = 1 - r
    elif schedule == "square":
        value = 1 - r ** 2
    elif schedule == "cubic":
        value = 1 - r ** 3
    elif schedule == "sqrt":
        value = 1 - r ** 0.5
    elif schedule == "exponential":
        value = 1 - 2 ** (-math.log2(max(total, 1)) * (1 - r))
    elif schedule == "logarithmic":
        value = -torch.log2(r) / math.log2(max(total, 2))
    else:
        raise ValueError(f"unknown schedule '{schedule}'; choose one of: {', '.join(SCHEDULES)}")
    return value.clamp(1e-6, 1)


def mask_counts(schedule, steps, total, start_step=0):
    """How many of `total` tokens are still masked after steps start_step + 1 .. steps: a list of ints that ends in 0.

    floor(γ(t / T) · N), but at least 1 and at least one fewer than before (until one is left), as released; the paper
    writes a ceiling. Raises ValueError for steps < 1 or an unknown schedule."""
    if steps < 1:
        raise ValueError(f"decoding needs at least 1 step, not {steps}")
    counts, masked = [], total
    for t in range(start_step + 1, steps):
        scheduled = int(math.floor(gamma(t / steps, schedule, total).item() * total))
        masked = max(min(scheduled, masked - 1), min(1, total))
        counts.append(masked)
    return counts + [0]


# -------------------------------------------------------------------------------------- training (§3.2, MVTM)

def mask_tokens(tokens, schedule, mask_id, generator=None):
    """Replaces ⌈γ(r)·N⌉ random tokens of each row by [MASK], r uniform in [0, 1) and drawn for each row.

    tokens: (B, N) int64. generator: of the CPU, so that the masks are the same on every device. Returns (masked tokens,
    mask), both (B, N); mask is boolean, true where masked. Shapes do not depend on r, so one compiled graph serves every
    step."""
    B, N = tokens.shape
    r = torch.rand(B, 1, generator=generator).to(tokens.device, non_blocking=True)
    noise = torch.rand(B, N, generator=generator).to(tokens.device, non_blocking=True)
    count = (gamma(r, schedule, N) * N).ceil()
    rank = noise.argsort(1).argsort(1)                                                      # a random permutation
    mask = rank < count
    return torch.where(mask, mask_id, tokens), mask


def mvtm_loss(logits, targets, mask, label_smoothing=0.1):
    """Masked visual token modelling (Eq. 1): the cross-entropy of the masked tokens, and of no other.

    logits: (B, N, codebook_size); targets, mask: (B, N). Returns the mean over images of the mean over each image's
    masked tokens (released code), a scalar."""
    loss = F.cross_entropy(logits.transpose(1, 2).float(), targets, label_smoothing=label_smoothing, reduction="none")
    return ((loss * mask).sum(1) / (mask.sum(1) + 1e-8)).mean()


# ------------------------------------------------------------------------------------ parallel decoding (§3.3)

ORDERS = "confidence random halton".split()


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

    order, seen, i = [], set(), 0
    while len(order) < num_tokens:         # every cell is hit in the end; a cell that was hit before is passed over
        i += 1
        cell = int(radical_inverse(i, 2) * side) * side + int(radical_inverse(i, 3) * side)
        if cell not in seen:
            seen.add(cell)
            order.append(cell)
    return torch.tensor(order)


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
    Returns tokens (B, N) int64; with return_steps, also a list of (predicted tokens (B, N), mask (B, N) of those that
    stay masked), one pair a step. Raises ValueError for a bad argument."""
    B, N, mask_id = len(labels), model.config.num_tokens, model.mask_id
    if not 1 <= steps <= N:
        raise ValueError(f"steps must be from 1 to the number of tokens, {N}, not {steps}")
    if not 0 <= start_step < steps:
        raise ValueError(f"the start step must be from 0 to {steps - 1}, one fewer than the steps, not {start_step}")
    if model.config.causal:
        raise ValueError("an autoregressive transformer decodes token by token, not in parallel")
    if order not in ORDERS:
        raise ValueError(f"unknown order '{order}'; choose one of: {', '.join(ORDERS)}")
    if cfg and model.null_label is None:
        raise ValueError("guidance needs a model with a null class: train one with --class-dropout 0.1")
    tokens = torch.full((B, N), mask_id, device=labels.device) if known is None else known
    masked = tokens == mask_id
    unknown = [N] * B if known is None else masked.sum(1).tolist()
    counts = {m: mask_counts(schedule, steps, m, start_step) for m in set(unknown)}
    counts = torch.tensor([counts[m] for m in unknown], device=labels.device)                # (B, T - start_step)
    if order == "halton":
        halton_rank = halton_order(N).argsort().to(labels.device)
    history = []
    for t in range(start_step + 1, steps + 1):
        # 1. Predict: the probabilities of all masked tokens, in parallel.
        if cfg:
            both = model(torch.cat([tokens, tokens]), torch.cat([labels, torch.full_like(labels, model.null_label)]))
            conditional, unconditional = both.float().chunk(2)
            logits = conditional + cfg * t / steps * (conditional - unconditional)
        else:
            logits = model(tokens, labels).float()                                           # (B, N, codebook_size)

        # 2. Sample a token at every masked position; its probability is the confidence. Known tokens stay.
        predicted = torch.where(masked, sample_tokens(logits, temperature, top_k, generator), tokens)
        if order == "confidence":
            log_p = logits.log_softmax(-1).gather(-1, predicted.clamp(max=logits.shape[-1] - 1)[..., None]).squeeze(-1)
            noise = choice_temperature * (1 - t / steps)
            confidence = log_p + noise * gumbel_noise(log_p, generator) if noise > 0 else log_p
        elif order == "random":
            confidence = torch.rand(B, N, device=labels.device, generator=generator)
        else:
            confidence = -halton_rank.float().expand(B, N)
        confidence = confidence.masked_fill(~masked, math.inf)

        # 3. Mask schedule: n = γ(t / T)·M tokens stay masked, M being those unknown at the start.
        n = counts[:, t - 1 - start_step, None]

        # 4. Mask the n least confident tokens again.
        masked = confidence.argsort(1).argsort(1) < n
        tokens = torch.where(masked, mask_id, predicted)
        if return_steps:
            history.append((predicted, masked))
    return (tokens, history) if return_steps else tokens


# ------------------------------------------------------------- sequential decoding, the baseline (§3.1, Table 1: VQGAN)

@torch.no_grad()
def decode_sequential(model, labels, temperature=1.0, top_k=None, generator=None, cached=True):
    """Autoregressive decoding in raster order: N forward passes, each of which samples one token of every image.

    model: a MaskGIT with config.causal. labels: (B,) int64. temperature, top_k: as for decode. cached: keep the keys and
    values of the tokens so far, so that a pass computes one position; else each pass computes all of them so far anew.
    Returns tokens (B, N) int64. Raises ValueError for a model that is not causal."""
    config, B = model.config, len(labels)
    if not config.causal:
        raise ValueError("sequential decoding needs an autoregressive transformer: train one with --decoder autoregressive")
    rows = torch.zeros(B, config.num_tokens + 1, dtype=torch.long, device=labels.device)     # the class, then the tokens
    rows[:, 0] = labels + config.codebook_size
    cache = model.empty_cache(B) if cached else None
    places = torch.arange(config.num_tokens, device=labels.device)
    for i in range(config.num_tokens):
        logits = model.predict(rows[:, i:i + 1], cache, places[i:i + 1]) if cached else model.predict(rows[:, :i + 1])
        rows[:, i + 1] = sample_tokens(logits[:, -1].float(), temperature, top_k, generator)
    return rows[:, 1:]
