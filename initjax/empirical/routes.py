"""The cheapest way to the inner products of a weight's gradients, by a count of its arithmetic and memory.

For n1 x n2 pairs of examples, O outputs, and a weight with groups g, positions T, inputs I and units J:

- "pair": sum_ts (a_t . a'_s)(g_t . g'_s). The gradient is not formed. With one position always the cheapest.
- "explicit": the gradient sum_t a_t g_t^T of each example and output, kept; then inner products.
- "streamed": the same gradients for a few inputs i at a time, multiplied while they are in the cache, for each tile.
- "gradient": what automatic differentiation gives, where the weight does not enter through a product.

Theta of a weight with T > 1 costs n1 n2 O I J for given gradients (O^2 for all pairs of outputs) and (n1 + n2) O T I J
for these, or n1 n2 T^2 (I + O J) in pairs (Novak, Sohl-Dickstein, Schoenholz 2022, arXiv:2206.08720, section 3).
"""

from typing import NamedTuple

from initjax.empirical.taps import Term

# one entry that goes to memory and back costs as much as this many operations in a large matrix product
ENTRY = 16
# a batch of small products, or of products with very long inner axes, runs at this fraction of the rate of a large one
SMALL = 0.25
# bytes of gradients that are formed at a time, so that they are multiplied before they leave the cache
CACHE = 8 * 2**20


class Route(NamedTuple):
    """How a term is contracted.

    name : see the module.
    flops : of the contraction, for the whole kernel.
    entries : numbers held for each example of a block.
    cells : numbers held for each pair of examples of a tile.
    """

    name: str
    flops: float
    entries: int
    cells: int


def sizes(term: Term) -> tuple[int, int, int, int]:
    """g, T, I, J of a term, with the positions of all its uses."""
    use = term.uses[0]
    return use.groups, sum(u.positions for u in term.uses), use.inputs, use.units


def choose(
    term: Term,
    size: int,
    examples: tuple[int, int],
    blocks: tuple[int, int],
    k: int,
    chunk: int,
    outputs: str,
    symmetric: bool,
    itemsize: int,
    resident: bool,
) -> tuple[Route, float]:
    """The cheapest route for a weight of `size` entries and its cost, in operations of a large matrix product.

    `blocks` numbers of the examples (n1, n2), `chunk` of the k outputs are worked on at a time.
    """
    (n1, n2), (b1, b2) = examples, blocks
    pairs = n1 * n2 * (b1 + 1) / (2 * b1) if symmetric else n1 * n2
    # of two blocks that meet, the first is kept and the second computed anew, unless all are kept
    rows = (n1 if resident else n1 * (b1 + 1) / 2) if symmetric else n1 + n2 * b1
    tiled = n1 * b1 if symmetric else n1 * b2 + n2 * b1
    cross = k * k if outputs == "full" else k
    inner = 2 * pairs * cross * size
    block = -(-n1 // b1) * chunk * size * itemsize
    long = inner / SMALL if block > 2 * CACHE and outputs == "trace" else inner
    if not term.uses:
        return Route("gradient", inner, chunk * size, 0), long + ENTRY * rows * k * size
    g, t, i, j = sizes(term)
    lookup = term.uses[0].kind == "lookup"
    form = 2 * k * g * t * j * (1 if lookup else i)
    explicit = Route("explicit", inner + rows * form, chunk * size, 0)
    options = [(explicit, long + rows * form + ENTRY * rows * k * size)]
    aligned = len({(u.layout, u.groups, u.inputs, u.units) for u in term.uses}) == 1
    if aligned and not (lookup and len(term.uses) > 1):
        held = g * t * ((1 if lookup else i) + chunk * j)
        if t > 1 and not lookup:
            options.append((Route("streamed", inner + tiled * form, held, 0), inner + tiled * form))
        meet = 2 * pairs * g * t * t * (1 if lookup else i)
        if outputs != "full" or t == 1:
            flops = meet + 2 * pairs * g * t * t * cross * j
            cells = (
                g * t * t * (2 if outputs == "trace" else 1 + cross // k * chunk * (chunk if outputs == "full" else 1))
            )
            cost = flops + ENTRY * pairs * cells * (1 if t > 1 else 0.1)
        else:
            products = 2 * pairs * g * t * k * j * (t + k)
            flops, cells = meet + products, g * t * (t + chunk * j)
            cost = meet + products / SMALL + ENTRY * pairs * cells
        options.append((Route("pair", flops, held, cells), cost))
    return min(options, key=lambda option: option[1])
