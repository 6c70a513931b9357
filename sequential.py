"""The paper's baseline (§2.1; "VQGAN" in Table 1): decoding token by token, in raster order.

The transformer is MaskGIT's with one change: a position sees only itself and the positions before
it. It is trained to predict the next token, and decodes N tokens in N passes."""
from collections.abc import Callable

import torch
from torch import Tensor

from maskgit import Attention, Block, MaskGIT, MaskGITConfig, Rand, sample_tokens


class KeyValueCache:
    """The keys and values of earlier positions, so that each pass computes only one new position.

    Its shapes never change (positions still to come are hidden by a mask), so one compiled graph
    serves every pass."""

    def __init__(self, config: MaskGITConfig, batch: int, device: torch.device, dtype: torch.dtype):
        shape = config.depth, batch, config.heads, config.num_tokens, config.dim // config.heads
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.all_positions = torch.arange(config.num_tokens, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)     # of the next pass

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stores a layer's key and value of one position, (B, H, 1, dim / H).

        Returns the keys and values of all N positions, (B, H, N, dim / H), and a mask (1, N) of
        those to attend to."""
        self.keys[layer].index_copy_(2, self.position, key)
        self.values[layer].index_copy_(2, self.position, value)
        visible = (self.all_positions <= self.position)[None]
        return self.keys[layer], self.values[layer], visible

    def advance(self) -> None:
        """Moves on to the next position, once all layers have stored this one."""
        self.position += 1


class CausalAttention(Attention):
    """Self-attention over a position and those before it: (B, L, dim) -> (B, L, dim)."""

    def forward(self, x: Tensor, layer: int = 0, cache: KeyValueCache | None = None) -> Tensor:
        query = self.split_heads(self.query(x))                             # (B, H, L, dim / H)
        key = self.split_heads(self.key(x))
        value = self.split_heads(self.value(x))
        if cache is None:
            return self.attend(query, key, value, causal=True)
        keys, values, visible = cache.update(layer, key, value)
        return self.attend(query, keys, values, mask=visible)


class CausalBlock(Block):
    """A block of the transformer with causal attention."""

    def __init__(self, config: MaskGITConfig):
        super().__init__(config)
        self.attention = CausalAttention(config)

    def forward(self, x: Tensor, layer: int = 0, cache: KeyValueCache | None = None) -> Tensor:
        x = self.norm1(x + self.dropout(self.attention(x, layer, cache)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class CausalTransformer(MaskGIT):
    """The autoregressive transformer: p(each token | the tokens before it, the class)."""
    block_class = CausalBlock

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns the logits of every token given those before it, (B, n, codebook_size).

        tokens: (B, n) codes, n <= N; the last one is predicted but never seen.
        labels: (B,) int64 in [0, num_classes)."""
        # Position i sees the class and the first i tokens, and predicts token i.
        x = self.embed(tokens[:, :-1], labels)
        for block in self.blocks:
            x = block(x)
        return self.logits(x)

    def next_logits(self, rows: Tensor, cache: KeyValueCache) -> Tensor:
        """Returns the next token's logits, (B, codebook_size), and caches this position.

        rows: (B, 1) int64, a row of the embedding: of the class, or of the token decoded last."""
        x = self.embed_rows(rows, self.position_embedding(cache.position))
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, cache)
        return self.logits(x)[:, -1]


def product_dtype(model: CausalTransformer, device: torch.device) -> torch.dtype:
    """Returns the type of the model's keys and values: autocast's where it is on."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return model.head[0].weight.dtype


@torch.no_grad()
def decode_sequential(
    model: CausalTransformer,
    labels: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    rand: Rand = torch.rand,
    cached: bool = True,
    on_step: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Decodes N tokens in raster order in N forward passes: (B,) int64 -> (B, N) int64.

    temperature, top_k, rand: as for maskgit.decode.
    cached: keep the keys and values of earlier positions; otherwise each pass computes them again.
    on_step(t, tokens, masked, confidence) is called after each token with tensors (B, N), as in
    maskgit.decode. `masked` is true where no token has been decoded yet; `tokens` is arbitrary
    there. The confidence is log p of the token just decoded, infinite for earlier ones and minus
    infinity for later ones."""
    B = len(labels)
    N = model.config.num_tokens
    tokens = torch.zeros(B, N, dtype=torch.long, device=labels.device)
    masked = torch.ones(B, N, dtype=torch.bool, device=labels.device)
    rows = labels[:, None] + model.config.codebook_size                     # the class comes first
    if cached:
        cache = KeyValueCache(model.config, B, labels.device, product_dtype(model, labels.device))

    for i in range(N):
        if cached:
            logits = model.next_logits(rows, cache).float()                 # (B, codebook_size)
            cache.advance()
        else:
            logits = model(tokens[:, :i + 1], labels)[:, -1].float()
        tokens[:, i] = sample_tokens(logits, temperature, top_k, rand)
        rows = tokens[:, i:i + 1]
        masked[:, i] = False
        if on_step is not None:
            log_p = logits.log_softmax(-1).gather(1, rows)                  # (B, 1)
            confidence = torch.full((B, N), torch.inf, device=labels.device)
            confidence[masked] = -torch.inf
            confidence[:, i:i + 1] = log_p
            on_step(i + 1, tokens.clone(), masked.clone(), confidence)
    return tokens
