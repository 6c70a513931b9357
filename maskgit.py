"""Stage 2 of MaskGIT (§3.1 to §3.3): the bidirectional transformer, masked training and decoding.

Read it beside the paper:
    gamma                     the mask scheduling functions (§3.3, Table 3)
    mask_tokens, mvtm_loss    masked visual token modelling (§3.1, Eq. 1)
    decode                    iterative parallel decoding, the four steps of §3.2

The transformer computes what the released one does: BERT, with a LayerNorm after each residual sum.
The class is the first of N + 1 positions. One table embeds codes, then classes, then [MASK]; its
code rows are also the output layer. This file needs nothing but torch: it can be copied out."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class MaskGITConfig:
    """Sizes of the transformer. The defaults are the paper's, for ImageNet 256x256."""
    codebook_size: int = 1024
    num_classes: int = 1000
    num_tokens: int = 256       # N: 16 x 16 tokens of an image
    dim: int = 768
    depth: int = 24
    heads: int = 8              # in the paper; the released weights have 16
    mlp_dim: int = 3072
    dropout: float = 0.1
    null_class: bool = False    # an extra embedding for "no class" (guidance; not in the paper)
    choice_temperature: float = 4.5     # the default of sampling; see by_confidence()

    @property
    def default_steps(self) -> int:
        """Returns the paper's T: 8 steps, or 12 for 32 x 32 tokens (§4.2); but at most N."""
        steps = 12 if self.num_tokens > 256 else 8
        return min(steps, self.num_tokens)


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
        return self.attend(query, key, value)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor,
        mask: Tensor | None = None, causal: bool = False,
    ) -> Tensor:
        """Returns the attention of all heads, joined and through the last layer: (B, L, dim).

        mask: (L, S) boolean, true where a query may look; None: everywhere. causal: a query looks
        only at its own position and those before it. MaskGIT needs neither; sequential.py does."""
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.out(x.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, L, dim) -> (B, H, L, dim / H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Attention, then an MLP; each is followed by dropout, a residual sum and a LayerNorm."""

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
    Config = MaskGITConfig                          # a checkpoint is rebuilt from the class alone
    block_class = Block                             # sequential.py has a causal one

    def __init__(self, config: MaskGITConfig):
        super().__init__()
        if config.dim % config.heads:
            raise ValueError(f"the width {config.dim} is not divisible by the {config.heads} heads")
        self.config = config
        self.mask_id = config.codebook_size + config.num_classes            # the row of [MASK]
        num_rows = self.mask_id + 1                                         # codes, classes, [MASK]
        self.null_label = None
        if config.null_class:                       # its row comes last: released weights have none
            self.null_label = config.num_classes + 1        # label num_classes would be [MASK]'s
            num_rows += 1
        self.token_embedding = nn.Embedding(num_rows, config.dim)
        self.position_embedding = nn.Embedding(config.num_tokens + 1, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([self.block_class(config) for _ in range(config.depth)])
        self.head = nn.Sequential(
            nn.Linear(config.dim, config.dim),
            nn.GELU("tanh"),
            nn.LayerNorm(config.dim, eps=1e-12),
        )
        self.head_bias = nn.Parameter(torch.zeros(num_rows))
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
        """Embeds the class, then the tokens: (B, n), (B,) -> (B, n + 1, dim)."""
        rows = torch.cat([labels[:, None] + self.config.codebook_size, tokens], dim=1)
        return self.embed_rows(rows, self.position_embedding.weight[:rows.shape[1]])

    def embed_rows(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Embeds rows of the table, (B, L), at positions of these embeddings, (L, dim)."""
        return self.dropout(self.norm(self.token_embedding(rows) + positions))

    def logits(self, x: Tensor) -> Tensor:
        """Compares x with the embedding of each code: (B, n, dim) -> (B, n, codebook_size).

        Classes and [MASK] are left out: they are never a target or a sample."""
        codes = self.config.codebook_size
        return F.linear(self.head(x), self.token_embedding.weight[:codes], self.head_bias[:codes])


def init_weights(module: nn.Module) -> None:
    """Initialises as released: normal with std 0.02, cut at 2 std; biases zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


# ------------------------------------------------------------------- mask schedules (§3.3, Table 3)

# γ(r), for tensors r and N, the number of tokens. The exponential starts at 1 - 1 / N; the
# logarithmic one would exceed 1 below r = 1 / N, and gamma() cuts it there.
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
    """Returns the mask scheduling function γ(r), from about 1 at r = 0 (all masked) to almost 0 at
    r = 1.

    r: in [0, 1]. schedule: one of SCHEDULES. total: the number of tokens N in training; in decoding
    M, those that were unknown at its start. Raises ValueError for an unknown schedule. Base 2, the
    cut at 1e-6 and float32 are as in the released code."""
    check_schedule(schedule)
    r = torch.as_tensor(r, dtype=torch.float32)
    total = torch.as_tensor(total, dtype=torch.float32)
    return GAMMAS[schedule](r, total.clamp(min=1)).clamp(1e-6, 1)


def check_schedule(schedule: str) -> None:
    """Raises ValueError for an unknown schedule."""
    if schedule not in GAMMAS:
        raise ValueError(f"unknown schedule '{schedule}'; choose one of: {', '.join(SCHEDULES)}")


def masked_after(
    t: int, steps: int, schedule: str, unknown: Tensor, still_masked: Tensor,
) -> Tensor:
    """Returns how many tokens of each image stay masked after step t of T = `steps`: (B,) int64.

    unknown: M, how many were masked at the start, (B,). still_masked: how many are now, (B,).
    It is ⌊γ(t / T)·M⌋, but fewer than now and at least 1 (released code; the paper rounds up)."""
    if t == steps:
        return torch.zeros_like(still_masked)
    n = (gamma(t / steps, schedule, unknown) * unknown).floor().long()
    n = torch.minimum(n, still_masked - 1)                      # fewer than now,
    n = n.clamp(min=1)                                          # but at least 1,
    return torch.minimum(n, unknown)                            # or 0 if nothing was unknown


def mask_counts(schedule: str, steps: int, unknown: int, start_step: int = 0) -> list[int]:
    """Returns how many of M = `unknown` tokens decode() leaves masked after each of its steps.

    Decoding itself does not need it: it explains the schedule (demo.py)."""
    unknown = torch.tensor(unknown)
    counts = [unknown]
    for t in range(start_step + 1, steps + 1):
        counts.append(masked_after(t, steps, schedule, unknown, counts[-1]))
    return [count.item() for count in counts[1:]]


# ---------------------------------------------------------------------------- training (§3.1, MVTM)

def mask_tokens(
    tokens: Tensor, schedule: str, mask_id: int, generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ⌈γ(r)·N⌉ random tokens of each image by [MASK], r uniform in [0, 1) for each.

    tokens: (B, N) int64. generator: a CPU generator. Returns (masked tokens, mask), both (B, N);
    the mask is true where a token was replaced. Masked tokens stay in the sequence, so shapes never
    change and the model is compiled only once."""
    B, N = tokens.shape
    r = uniform(B, 1, generator=generator, device=tokens.device)
    noise = uniform(B, N, generator=generator, device=tokens.device)
    count = (gamma(r, schedule, N) * N).ceil()              # (B, 1)
    mask = rank_in_row(noise) < count                       # `count` random places of each image
    return torch.where(mask, mask_id, tokens), mask


def drop_labels(
    labels: Tensor, fraction: float, null_label: int, generator: torch.Generator | None = None,
) -> Tensor:
    """Replaces a random fraction of the labels (B,) by the null class.

    So the model learns to draw without a class as well, which guidance needs (Ho & Salimans 2022;
    not in the paper)."""
    dropped = uniform(*labels.shape, generator=generator, device=labels.device) < fraction
    return torch.where(dropped, null_label, labels)


def mvtm_loss(
    logits: Tensor, targets: Tensor, mask: Tensor, label_smoothing: float = 0.1,
) -> Tensor:
    """Returns Eq. 1, a scalar: the cross-entropy of the masked tokens and of no others.

    It is averaged over the masked tokens of each image, and then over images (released code).
    logits: (B, N, codebook_size). targets, mask: (B, N)."""
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(),
        label_smoothing=label_smoothing, reduction="none",
    ).view_as(targets)                                                              # (B, N)
    return ((loss * mask).sum(1) / (mask.sum(1) + 1e-8)).mean()


def masked_accuracy(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Returns the fraction of all masked tokens of the batch whose likeliest code is right.

    The arguments are those of mvtm_loss()."""
    right = (logits.detach().argmax(-1) == targets) & mask
    return right.sum() / mask.sum()


def rank_in_row(values: Tensor) -> Tensor:
    """Returns each value's rank in its row, 0 for the smallest: (B, N) -> (B, N) int64."""
    return values.argsort(1).argsort(1)


def uniform(*shape: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Returns uniform numbers drawn on the CPU, so that every device gets the same masks."""
    values = torch.rand(*shape, generator=generator)
    if device.type == "cuda":
        values = values.pin_memory()                # or the copy would wait for all work on the GPU
    return values.to(device, non_blocking=True)


# ------------------------------------------------------------ what is revealed first (§3.2, step 4)

# rand(B, ..., device=...) draws uniform numbers in [0, 1), as torch.rand does. An order is a
# function (log_p (B, N), t / T, rand) -> confidence (B, N). log_p is the log-probability of each
# sampled token. The tokens with the lowest confidence are masked again.
Rand = Callable[..., Tensor]
Order = Callable[[Tensor, float, Rand], Tensor]


def by_confidence(choice_temperature: float = 4.5) -> Order:
    """Returns the order of the paper: the likeliest tokens first.

    choice_temperature: scales Gumbel noise that is added to log p, annealed to 0 over the steps
    (released code; the paper does not mention it, but without it samples turn flat)."""
    def order(log_p: Tensor, progress: float, rand: Rand) -> Tensor:
        scale = choice_temperature * (1 - progress)
        if scale == 0:
            return log_p
        return log_p + scale * gumbel_noise(log_p, rand)
    return order


# ------------------------------------------------------------------------- parallel decoding (§3.2)

@torch.no_grad()
def decode(
    model: MaskGIT,
    labels: Tensor,
    steps: int = 8,
    schedule: str = "cosine",
    known: Tensor | None = None,
    order: Order = by_confidence(),  # noqa: B008 (it has no state)
    temperature: float = 1.0,
    top_k: int | None = None,
    cfg: float = 0.0,
    start_step: int = 0,
    rand: Rand = torch.rand,
    on_step: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Decodes all tokens of each image in T parallel forward passes (§3.2): (B,) -> (B, N) int64.

    labels        the class of each image, (B,) int64
    steps         T, from 1 to N
    schedule      the mask scheduling function, one of SCHEDULES
    known         tokens (B, N) to keep, mask_id where unknown; None: all are unknown. The schedule
                  counts only the unknown ones
    order         which tokens are revealed first
    temperature   of the token samples; 0 takes the likeliest
    top_k         sample among the k likeliest codes; None: among all
    cfg           weight of classifier-free guidance, which grows linearly with t; needs a null
                  class
    start_step    how many steps to skip if much is known (released demo: 2 of 12)
    rand          draws uniform numbers, as torch.rand does
    on_step       on_step(t, sampled, masked, confidence), all (B, N), is called after each step:
                  the predicted tokens, which of them are masked again, and the confidence of each,
                  infinite where known

    Raises ValueError for arguments that do not suit the model."""
    check_decoding(model, steps, schedule, start_step, cfg)
    tokens = all_masked(model, labels) if known is None else known
    masked = tokens == model.mask_id                                            # (B, N)
    unknown = masked.sum(1)                                                  # (B,): M of each image

    for t in range(start_step + 1, steps + 1):                                  # t = 1 .. T
        # 1. Predict: the probabilities of all masked tokens, in parallel.
        logits = guided_logits(model, tokens, labels, cfg * t / steps)       # (B, N, codebook_size)

        # 2. Sample a token at every masked position. Known tokens stay.
        candidates = sample_tokens(logits, temperature, top_k, rand)
        sampled = torch.where(masked, candidates, tokens)

        # 3. Mask schedule: n = ⌊γ(t / T)·M⌋ tokens stay masked, but fewer than before.
        n = masked_after(t, steps, schedule, unknown, masked.sum(1))            # (B,)

        # 4. Mask the n least confident tokens again. With the default order the confidence is log p
        # of the sampled token, plus noise that fades out. A known token is never masked again.
        confidence = order(log_probability(logits, sampled), t / steps, rand)
        confidence = confidence.masked_fill(~masked, math.inf)
        masked = rank_in_row(confidence) < n[:, None]
        tokens = torch.where(masked, model.mask_id, sampled)
        if on_step is not None:
            on_step(t, sampled, masked, confidence)
    return tokens


def all_masked(model: MaskGIT, labels: Tensor) -> Tensor:
    """Returns the tokens (B, N) that decoding starts from, all of them [MASK]."""
    return torch.full((len(labels), model.config.num_tokens), model.mask_id, device=labels.device)


def check_decoding(
    model: MaskGIT, steps: int, schedule: str, start_step: int = 0, cfg: float = 0.0,
) -> None:
    """Raises ValueError for arguments that decode() cannot serve with this model."""
    check_schedule(schedule)
    N = model.config.num_tokens
    if not 1 <= steps <= N:
        raise ValueError(f"steps must be from 1 to the number of tokens, {N}, not {steps}")
    if not 0 <= start_step < steps:
        raise ValueError(f"the start step must be from 0 to {steps - 1}, not {start_step}")
    if cfg and model.null_label is None:
        raise ValueError("guidance needs a null class: train a model with --class-dropout 0.1")


def guided_logits(model: MaskGIT, tokens: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Returns float32 logits, pushed away from those without a class (Ho & Salimans 2022)."""
    if weight == 0:
        return model(tokens, labels).float()
    no_class = torch.full_like(labels, model.null_label)
    both = model(torch.cat([tokens, tokens]), torch.cat([labels, no_class])).float()
    conditional, unconditional = both.chunk(2)
    return conditional + weight * (conditional - unconditional)


def sample_tokens(
    logits: Tensor, temperature: float, top_k: int | None, rand: Rand = torch.rand,
) -> Tensor:
    """Samples a token at each position; temperature 0 takes the likeliest: (..., K) -> (...)."""
    if top_k:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if temperature > 0:
        logits = logits / temperature + gumbel_noise(logits, rand)
    return logits.argmax(-1)


def gumbel_noise(like: Tensor, rand: Rand = torch.rand) -> Tensor:
    """Returns standard Gumbel noise; argmax(logits + noise) is a sample of softmax(logits)."""
    values = rand(*like.shape, device=like.device)
    return -torch.log(-torch.log(values.clamp(1e-20, 1 - 1e-7)))


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Returns log p of each token: (B, N, K), (B, N) -> (B, N)."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
