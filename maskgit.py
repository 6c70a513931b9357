"""Stage 2 of MaskGIT (§3.2 to §3.4): the bidirectional transformer, masked training, iterative
parallel decoding.

Read it beside the paper:
    gamma, mask_counts        the mask scheduling functions (§3.4, Table 3)
    mask_tokens, mvtm_loss    masked visual token modelling (§3.2, Eq. 1)
    decode                    iterative parallel decoding, the four steps of §3.3

The transformer is the released one, number for number: BERT with a LayerNorm after each residual
sum. The class is the first of N + 1 positions. One table embeds codes, then classes, then [MASK];
its code rows are also the output layer. This file needs nothing but torch: it can be copied out and
used elsewhere."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class MaskGITConfig:
    """The defaults are the paper's ImageNet 256x256 model (the paper says 8 heads, the released
    weights have 16)."""
    codebook_size: int = 1024
    num_classes: int = 1000
    num_tokens: int = 256       # N: 16 x 16 tokens of an image
    dim: int = 768
    depth: int = 24
    heads: int = 8
    mlp_dim: int = 3072
    dropout: float = 0.1
    null_class: bool = False    # an extra embedding for "no class" (guidance; not in the paper)

    @property
    def default_steps(self) -> int:
        """Returns T of the paper: 8, and 12 for 32 x 32 tokens (§4.2)."""
        return 12 if self.num_tokens > 256 else 8


# ---------------------------------------------------------------------------------- the transformer

class Attention(nn.Module):
    """Multi-head self-attention over all positions: (B, L, dim) -> (B, L, dim)."""

    def __init__(self, config: MaskGITConfig):
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        query = self.split_heads(self.query(x))                                 # (B, H, L, dim / H)
        key = self.split_heads(self.key(x))
        value = self.split_heads(self.value(x))
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.out(x.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, L, dim) -> (B, H, L, dim / H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Attention, then a two-layer perceptron; each with dropout, a residual sum, and a LayerNorm
    after the sum."""

    def __init__(self, config: MaskGITConfig):
        super().__init__()
        self.attention = Attention(config)
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-12)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, config.mlp_dim),
            nn.GELU("tanh"),
            nn.Linear(config.mlp_dim, config.dim),
        )
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attention(x)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class MaskGIT(nn.Module):
    """The bidirectional transformer: p(each token | the tokens that are not masked, the class).

    Raises ValueError if the heads do not divide the width."""
    Config = MaskGITConfig
    Block = Block

    def __init__(self, config: MaskGITConfig):
        super().__init__()
        if config.dim % config.heads:
            raise ValueError(f"the width {config.dim} is not divisible by the {config.heads} heads")
        self.config = config
        self.mask_id = config.codebook_size + config.num_classes            # the row of [MASK]
        rows = self.mask_id + 1                                             # codes, classes, [MASK]
        self.null_label = None
        if config.null_class:
            self.null_label = rows - config.codebook_size         # as a label: the row after [MASK]
            rows += 1
        self.token_embedding = nn.Embedding(rows, config.dim)
        self.position_embedding = nn.Embedding(config.num_tokens + 1, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([self.Block(config) for _ in range(config.depth)])
        self.head = nn.Sequential(
            nn.Linear(config.dim, config.dim),
            nn.GELU("tanh"),
            nn.LayerNorm(config.dim, eps=1e-12),
        )
        self.head_bias = nn.Parameter(torch.zeros(rows))
        self.apply(init_weights)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns logits of the codebook entries at every position, (B, N, codebook_size).

        tokens: (B, N) int64, each a code or mask_id.
        labels: (B,) int64 in [0, num_classes), or null_label if the model has one."""
        x = self.embed(tokens, labels)                                             # (B, N + 1, dim)
        for block in self.blocks:
            x = block(x)
        return self.logits(x[:, 1:])                                    # the class predicts nothing

    def embed(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """(B, n) tokens and (B,) labels -> (B, n + 1, dim): the class, then the tokens, each with
        its position."""
        rows = torch.cat([labels[:, None] + self.config.codebook_size, tokens], dim=1)
        positions = self.position_embedding.weight[:rows.shape[1]]
        return self.dropout(self.norm(self.token_embedding(rows) + positions))

    def logits(self, x: Tensor) -> Tensor:
        """(B, n, dim) -> (B, n, codebook_size).

        The output is tied to the embedding of codes alone: no other row is ever a target or a
        sample."""
        codes = self.config.codebook_size
        return F.linear(self.head(x), self.token_embedding.weight[:codes], self.head_bias[:codes])


def init_weights(module: nn.Module) -> None:
    """Initialises as released: normal with std 0.02, cut at 2 std; biases zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, 0, 0.02, -0.04, 0.04)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


# ------------------------------------------------------------------- mask schedules (§3.4, Table 3)

# γ(r), with N, the number of tokens, which two schedules need in order to reach from one token to
# all of them.
GAMMAS = {
    "cosine": lambda r, N: torch.cos(r * (math.pi / 2)),
    "linear": lambda r, N: 1 - r,
    "square": lambda r, N: 1 - r ** 2,
    "cubic": lambda r, N: 1 - r ** 3,
    "exponential": lambda r, N: 1 - 2 ** (-torch.log2(N) * (1 - r)),
    "sqrt": lambda r, N: 1 - r ** 0.5,
    "logarithmic": lambda r, N: -torch.log2(r) / torch.log2(N.clamp(min=2)),
}
SCHEDULES = list(GAMMAS)


def gamma(r: float | Tensor, schedule: str, total: int | Tensor) -> Tensor:
    """Returns the mask scheduling function γ(r), from 1 at r = 0 (all masked) to almost 0 at r = 1.

    r: in [0, 1]. schedule: one of SCHEDULES. total: the number of tokens. Raises ValueError for an
    unknown schedule. Source: §3.4; base 2, the cut at 1e-6 and float32 arithmetic as released."""
    if schedule not in GAMMAS:
        raise ValueError(f"unknown schedule '{schedule}'; choose one of: {', '.join(SCHEDULES)}")
    r = torch.as_tensor(r, dtype=torch.float32)
    total = torch.as_tensor(total, dtype=torch.float32)
    return GAMMAS[schedule](r, total.clamp(min=1)).clamp(1e-6, 1)


def masked_after(t: int, steps: int, schedule: str, total: Tensor, masked: Tensor) -> Tensor:
    """Returns how many tokens stay masked after step t of T = `steps`, int64 as `total`.

    floor(γ(t / T) · total), but fewer than before and at least 1, as released; the paper writes a
    ceiling. total: how many were masked at the start. masked: how many are masked now."""
    if t == steps:
        return torch.zeros_like(masked)
    scheduled = (gamma(t / steps, schedule, total) * total).floor().long()
    return torch.minimum(scheduled, masked - 1).clamp(min=1).minimum(total)      # none stay of none


def mask_counts(schedule: str, steps: int, total: int, start_step: int = 0) -> list[int]:
    """Returns how many of `total` tokens stay masked after each of steps start_step + 1 .. T."""
    total = torch.tensor(total)
    counts = [total]
    for t in range(start_step + 1, steps + 1):
        counts.append(masked_after(t, steps, schedule, total, counts[-1]))
    return [count.item() for count in counts[1:]]


# ---------------------------------------------------------------------------- training (§3.2, MVTM)

def mask_tokens(
    tokens: Tensor, schedule: str, mask_id: int, generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ⌈γ(r)·N⌉ random tokens of each row by [MASK], r uniform in [0, 1) for each row.

    tokens: (B, N) int64. generator: of the CPU. Returns (masked tokens, mask), both (B, N); the
    mask is true where a token was replaced. Shapes do not depend on r, so that one compiled graph
    serves every step."""
    B, N = tokens.shape
    r = uniform(B, 1, generator=generator, device=tokens.device)
    noise = uniform(B, N, generator=generator, device=tokens.device)
    count = (gamma(r, schedule, N) * N).ceil()              # (B, 1)
    mask = rank_in_row(noise) < count                       # the first of a random permutation
    return torch.where(mask, mask_id, tokens), mask


def drop_labels(
    labels: Tensor, fraction: float, null_label: int, generator: torch.Generator | None = None,
) -> Tensor:
    """Replaces a random fraction of the labels (B,) by the null class, so that the model learns to
    draw without a class, which guidance needs (Ho & Salimans 2022; not in the paper)."""
    dropped = uniform(*labels.shape, generator=generator, device=labels.device) < fraction
    return torch.where(dropped, null_label, labels)


def mvtm_loss(
    logits: Tensor, targets: Tensor, mask: Tensor, label_smoothing: float = 0.1,
) -> Tensor:
    """Returns the masked visual token modelling loss (Eq. 1): the cross-entropy of masked tokens
    and of no others.

    logits: (B, N, codebook_size); targets, mask: (B, N). Returns a scalar: the mean over images of
    the mean over each image's masked tokens (released code)."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                           label_smoothing=label_smoothing, reduction="none")
    loss = loss.view_as(targets)                                                    # (B, N)
    return ((loss * mask).sum(1) / (mask.sum(1) + 1e-8)).mean()


def masked_accuracy(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Returns the share of the masked tokens whose likeliest prediction is right, a scalar. Shapes
    as in mvtm_loss."""
    right = (logits.detach().argmax(-1) == targets) & mask
    return right.sum() / mask.sum()


def rank_in_row(values: Tensor) -> Tensor:
    """(B, N) -> (B, N) int64: how many values of its row are smaller than each."""
    return values.argsort(1).argsort(1)


def uniform(*shape: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Returns uniform numbers drawn on the CPU, so that every device gets the same masks."""
    values = torch.rand(*shape, generator=generator)
    if device.type == "cuda":
        values = values.pin_memory()                # or the copy would wait for all work on the GPU
    return values.to(device, non_blocking=True)


# ------------------------------------------------------------ what is revealed first (§3.3, step 4)

# An order is a function (log_p (B, N), t / T, generator) -> confidence (B, N). log_p is the
# log-probability of each sampled token. The tokens of the lowest confidence are masked again.
Order = Callable[[Tensor, float, torch.Generator | None], Tensor]


def by_confidence(choice_temperature: float = 4.5) -> Order:
    """Returns the order of the paper: the likeliest tokens first.

    choice_temperature: the scale of Gumbel noise in that choice, annealed to 0 over the steps
    (released code; the paper has none, and without it samples turn flat and monochrome)."""
    def order(log_p: Tensor, progress: float, generator: torch.Generator | None) -> Tensor:
        noise = choice_temperature * (1 - progress)
        if noise == 0:
            return log_p
        return log_p + noise * gumbel_noise(log_p, generator)
    return order


# ------------------------------------------------------------------------- parallel decoding (§3.3)

@torch.no_grad()
def decode(
    model: MaskGIT, labels: Tensor, steps: int = 8, schedule: str = "cosine",
    known: Tensor | None = None, order: Order = by_confidence(4.5),  # noqa: B008 (it has no state)
    temperature: float = 1.0, top_k: int | None = None, cfg: float = 0.0, start_step: int = 0,
    generator: torch.Generator | None = None,
    on_step: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Decodes all tokens of an image in `steps` parallel forward passes (§3.3). Returns tokens (B,
    N) int64.

    labels: (B,) int64. steps: T, from 1 to N. known: (B, N) tokens to keep, mask_id where unknown
    (None: all unknown); the schedule counts only the unknown ones. order: what is revealed first.
    temperature: of the token samples, 0 for the likeliest. top_k: sample among the k likeliest.
    cfg: weight of classifier-free guidance, which grows linearly with t; needs a model with a null
    class. start_step: steps to skip, if much is known (the released demo: 2 of 12). on_step(t,
    sampled, masked, confidence) is called after each step: the tokens (B, N) that were predicted,
    which of them are masked again, and the confidence of each, infinite where known. Raises
    ValueError for a bad argument."""
    check_decoding(model, steps, start_step, cfg)
    tokens = known
    if known is None:
        shape = len(labels), model.config.num_tokens
        tokens = torch.full(shape, model.mask_id, device=labels.device)
    masked = tokens == model.mask_id                                            # (B, N)
    unknown = masked.sum(1)                                                  # (B,): M of each image

    for t in range(start_step + 1, steps + 1):
        # 1. Predict: the probabilities of all masked tokens, in parallel.
        logits = guided_logits(model, tokens, labels, cfg * t / steps)       # (B, N, codebook_size)

        # 2. Sample a token at every masked position; its log-probability is the confidence. Known
        # tokens stay.
        sampled = torch.where(masked, sample_tokens(logits, temperature, top_k, generator), tokens)
        confidence = order(log_probability(logits, sampled), t / steps, generator)
        confidence = confidence.masked_fill(~masked, math.inf)

        # 3. Mask schedule: n = γ(t / T)·M tokens stay masked.
        n = masked_after(t, steps, schedule, unknown, masked.sum(1))            # (B,)

        # 4. Mask the n least confident tokens again.
        masked = rank_in_row(confidence) < n[:, None]
        tokens = torch.where(masked, model.mask_id, sampled)
        if on_step is not None:
            on_step(t, sampled, masked, confidence)
    return tokens


def check_decoding(model: MaskGIT, steps: int, start_step: int = 0, cfg: float = 0.0) -> None:
    """Raises ValueError for what decode() cannot do with this model."""
    N = model.config.num_tokens
    if not 1 <= steps <= N:
        raise ValueError(f"steps must be from 1 to the number of tokens, {N}, not {steps}")
    if not 0 <= start_step < steps:
        raise ValueError(f"the start step must be from 0 to {steps - 1}, not {start_step}")
    if cfg and model.null_label is None:
        raise ValueError("guidance needs a null class: train a model with --class-dropout 0.1")


def guided_logits(model: MaskGIT, tokens: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Returns the model's logits in float32, pushed away from those without a class (Ho & Salimans
    2022)."""
    if weight == 0:
        return model(tokens, labels).float()
    no_class = torch.full_like(labels, model.null_label)
    both = model(torch.cat([tokens, tokens]), torch.cat([labels, no_class])).float()
    conditional, unconditional = both.chunk(2)
    return conditional + weight * (conditional - unconditional)


def sample_tokens(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None = None,
) -> Tensor:
    """(..., codebook_size) -> (...): a sample at each position, or the likeliest token at
    temperature 0."""
    if top_k:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if temperature > 0:
        logits = logits / temperature + gumbel_noise(logits, generator)
    return logits.argmax(-1)


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Returns standard Gumbel noise of the shape of `like`; argmax(logits + noise) is a sample of
    softmax(logits)."""
    values = torch.rand(like.shape, device=like.device, generator=generator)
    return -torch.log(-torch.log(values.clamp(1e-20, 1 - 1e-7)))


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """(B, N, codebook_size), (B, N) -> (B, N): log p of each token. Of a known token that is no
    code, some number."""
    codes = tokens.clamp(max=logits.shape[-1] - 1)
    return logits.log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1)
