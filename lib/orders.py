"""Orders of revealing tokens, by name: the paper's, and two that the paper does not have.

To add an order, write a function that returns one (see maskgit.Order) and name it in MAKERS.
"""
import math

import torch
from torch import Tensor

from maskgit import Order, Rand, by_confidence


def by_chance() -> Order:
    """Returns an order that reveals tokens at random."""
    def order(log_p: Tensor, progress: float, rand: Rand) -> Tensor:
        return rand(*log_p.shape, device=log_p.device)
    return order


def by_halton(num_tokens: int, device: torch.device | str = "cpu") -> Order:
    """Returns an order that covers the image evenly, whatever the tokens are (Besnier et al. 2025).

    Raises ValueError if num_tokens is not a square."""
    ranks = halton_order(num_tokens).argsort()                      # (N,): 0 is revealed first
    confidence = (-ranks).float().to(device)

    def order(log_p: Tensor, progress: float, rand: Rand) -> Tensor:
        return confidence.expand(log_p.shape)
    return order


def halton_order(num_tokens: int) -> Tensor:
    """Returns a permutation of the token grid whose first n positions, for any n, cover it evenly.

    They are the Halton points of bases 2 and 3 (Halton 1964), as raster positions (num_tokens,)
    int64. Raises ValueError if num_tokens is not a square."""
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"the halton order needs a square token grid, not {num_tokens} tokens")
    positions = {}                              # a dict keeps its keys in order, and each only once
    i = 1
    while len(positions) < num_tokens:          # every cell is hit in the end
        row = int(radical_inverse(i, 2) * side)
        column = int(radical_inverse(i, 3) * side)
        positions[row * side + column] = None
        i += 1
    return torch.tensor(list(positions))


def radical_inverse(i: int, base: int) -> float:
    """Mirrors the digits of i at the point: in base 2, 6 = 110 gives 0.011 = 0.375."""
    value = 0.0
    scale = 1.0
    while i:
        i, digit = divmod(i, base)
        scale /= base
        value += digit * scale
    return value


# Each makes an order for a number of tokens, a choice temperature and a device.
MAKERS = {
    "confidence": lambda num_tokens, temperature, device: by_confidence(temperature),
    "random": lambda num_tokens, temperature, device: by_chance(),
    "halton": lambda num_tokens, temperature, device: by_halton(num_tokens, device),
}
ORDERS = list(MAKERS)


def make_order(
    name: str, num_tokens: int, choice_temperature: float, device: torch.device | str,
) -> Order:
    """Returns the order of this name. It is made once for many decodings, so it keeps no state.

    Raises ValueError if it does not suit the number of tokens."""
    return MAKERS[name](num_tokens, choice_temperature, device)
