"""What the arithmetic of an implementation adds to its bounds: the constants of theory.md 7.

The reference works in float64 and adds nothing; the CUDA C++ kernels have their constants in
``turn.cuh`` and ``bounds.cuh``.  Score errors e^a_t are multiples of lambda g_t, the softmax
scale times the row scale of the key; so are all bounds of theory.md 3, and none needs more than the
scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignedkv.formats import FP32

#: |x^_i| + |f U_i| over g: a prefix is within 8 g, a dither entry within g / 2 (Theorem 12).
REACH = 8.5


def gamma(n: float) -> float:
    """Higham's constant gamma_n = n u / (1 - n u) of float32."""
    u = FP32.unit_roundoff
    return n * u / (1.0 - n * u)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Theorem 12 for one implementation and one number of channels.

    Attributes
    ----------
    score_norm1 : float
        e^a_t = lambda g_t score_norm1 ||q'||_1, (7.1).
    refined_norm1 : float
        In place of score_norm1 once a second key plane was read.
    weight : float
        e^w_t, (7.2).
    accumulation : float
        c_acc: the sums add up to c_acc sum p^ 8.5 g^V_t to an output.
    """

    score_norm1: float
    refined_norm1: float
    weight: float
    accumulation: float


def cpu(channels: int, *, tile: int) -> Arithmetic:
    """The Numba kernels: q' rounded to float32, first-plane products and tiles of values in it.

    Notes
    -----
    q' is formed in float64 and rounded once: u per channel, for every plane count.  The product
    with the first plane is a float32 sum of C products in any order: C u (Jeannerod and Rump 2013,
    thm 3.1; theory.md 8, S4).  Refined scores, C_s, weights and all other sums are float64; 2^-36
    covers them and the exponential.  Values: a coefficient rounded to float32, a float32 sum over
    at most ``tile`` rows, in any order.
    """
    u = FP32.unit_roundoff
    return Arithmetic(
        score_norm1=REACH * gamma(channels + 1),
        refined_norm1=REACH * u * (1.0 + 2.0**-20),
        weight=2.0**-36,
        accumulation=gamma(tile + 2),
    )


def numba_cuda(*, tile: int) -> Arithmetic:
    """The Numba CUDA kernels: words of digits and tiles of values in float32, all else in float64.

    Notes
    -----
    q' is formed in float64 and rounded once.  A word of the first plane is a float32 sum of eight
    products of up to 7.5 g, which err by gamma_8; one of a later plane has at most 16, but all
    later planes together are within g / 2, so that gamma_8 (7.5 + 1) covers them.  Words, planes,
    C_s and the exponential are float64.  Values: a coefficient rounded to float32, a float32 sum of
    at most ``tile`` products, which are exact but for their rounding.
    """
    return Arithmetic(
        score_norm1=REACH * gamma(10),
        refined_norm1=REACH * gamma(10),
        weight=2.0**-36,
        accumulation=gamma(tile + 2),
    )
