"""Binary floating-point formats: their few free facts, what follows from them, and rounding.

Every quantity of a format is a dyadic number that float64 holds exactly, so properties and
functions that return float64 are exact, not approximations. Notation of the whole package:
``p`` precision, ``u = 2^-p`` unit roundoff, ``eps = 2 u``, ``ulp(x)`` the spacing at ``x``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignedkv.errors import SpecError

#: What `exponent` says of zero: below the exponent of every float64 number.
EXPONENT_OF_ZERO = -1075
#: What `exponent` says of infinities and NaN: above the exponent of every float64 number.
EXPONENT_OF_NONFINITE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """A binary floating-point format with subnormals, named as `numpy.finfo` names things.

    The exponent bias is that of IEEE 754, ``2^(exponent_bits - 1) - 1``.

    Raises
    ------
    SpecError
        If the format has values that float64 cannot hold, or no fraction or exponent bits.
    """

    #: Name as NumPy or ml_dtypes spells it.
    name: str
    #: Width in bits, sign included.
    bits: int
    #: Significand bits p, the implicit leading bit included.
    precision: int
    #: IEEE 754 style: the largest exponent field means infinity or NaN. False: it holds ordinary
    #: numbers, the all-ones code is the only NaN, and overflow saturates (OCP 8-bit E4M3).
    has_infinity: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.precision <= 53:
            raise SpecError(
                f"{self.name}: precision is {self.precision}; it must lie in 2..53, "
                "so that float64 holds every value"
            )
        if not 2 <= self.exponent_bits <= 11:
            raise SpecError(
                f"{self.name}: {self.bits} bits with precision {self.precision} leave "
                f"{self.exponent_bits} exponent bits; 2..11 are allowed"
            )

    @property
    def exponent_bits(self) -> int:
        """Width of the exponent field."""
        return self.bits - self.precision

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field of a normal number."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number, and of every subnormal one."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite number."""
        return (self.code_of_max >> (self.precision - 1)) - self.bias

    @property
    def unit_roundoff(self) -> float:
        """u = 2^-p: the largest relative error of rounding a number in the normal range."""
        return math.ldexp(1.0, -self.precision)

    @property
    def eps(self) -> float:
        """2u: the distance from 1 to the next larger number."""
        return 2 * self.unit_roundoff

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with a full significand."""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number; all numbers are multiples of it."""
        return math.ldexp(1.0, self.min_exponent - self.precision + 1)

    @property
    def max(self) -> float:
        """The largest finite number."""
        hidden_bit = 1 << (self.precision - 1)
        significand = hidden_bit | (self.code_of_max & (hidden_bit - 1))
        return math.ldexp(significand, self.max_exponent - self.precision + 1)

    @property
    def code_of_smallest_normal(self) -> int:
        """Bit pattern of `smallest_normal`; the positive subnormals have the codes 1 up to it."""
        return 1 << (self.precision - 1)

    @property
    def code_of_max(self) -> int:
        """Bit pattern of `max`; the finite non-negative numbers have the codes 0 to this one."""
        if self.has_infinity:
            all_exponents = (1 << self.exponent_bits) - 1
            return (all_exponents << (self.precision - 1)) - 1
        return (1 << (self.bits - 1)) - 2


FP16 = FloatFormat(name="float16", bits=16, precision=11)
BF16 = FloatFormat(name="bfloat16", bits=16, precision=8)
FP32 = FloatFormat(name="float32", bits=32, precision=24)
FP8_E4M3 = FloatFormat(name="float8_e4m3fn", bits=8, precision=4, has_infinity=False)
FP8_E5M2 = FloatFormat(name="float8_e5m2", bits=8, precision=3)


def exponent(x: ArrayLike) -> NDArray[np.int32]:
    """floor(log2 |x|), exactly.

    Parameters
    ----------
    x : array_like of float, any shape
        Converted to float64.

    Returns
    -------
    ndarray of int32, shape of `x`
        `EXPONENT_OF_ZERO` for zeros, `EXPONENT_OF_NONFINITE` for infinities and NaN: both
        order correctly against the exponents of finite numbers.
    """
    x = np.asarray(x, dtype=np.float64)
    e = np.frexp(x)[1].astype(np.int32) - np.int32(1)  # frexp's significand lies in [1/2, 1)
    e = np.where(x == 0, np.int32(EXPONENT_OF_ZERO), e)
    return np.where(np.isfinite(x), e, np.int32(EXPONENT_OF_NONFINITE))


def ulp(number_format: FloatFormat, x: ArrayLike) -> NDArray[np.float64]:
    """Spacing of the format's numbers in the binade of x, always positive.

    Parameters
    ----------
    number_format : FloatFormat
    x : array_like of float, any shape
        Converted to float64; need not be a number of the format.

    Returns
    -------
    ndarray of float64, shape of `x`
        ``2^(max(e, e_min) - p + 1)`` with e the exponent of x; the smallest subnormal for 0.
        NaN where x is not finite. Above the format's largest number the binades go on.
    """
    x = np.asarray(x, dtype=np.float64)
    quantum = np.ldexp(1.0, _quantum_exponent(number_format, x))
    return np.where(np.isfinite(x), quantum, np.nan)


def round_to(number_format: FloatFormat, x: ArrayLike) -> NDArray[np.float64]:
    """Round to the nearest number of the format, ties to even, subnormals included.

    Parameters
    ----------
    number_format : FloatFormat
    x : array_like of float, any shape
        Converted to float64 (exact for every 8-, 16- and 32-bit float type).

    Returns
    -------
    ndarray of float64, shape of `x`
        Numbers of the format. NaN stays NaN and the sign of zero is kept. Results beyond the
        largest number become infinite; in a format without infinity they saturate, infinite
        `x` included.

    Notes
    -----
    IEEE 754-2019, 4.3.1; saturation: OCP 8-bit floating point specification, revision 1.0, 5.2.1.
    """
    x = np.asarray(x, dtype=np.float64)
    shift = _quantum_exponent(number_format, np.where(np.isfinite(x), x, 0.0))
    # Scaling by a power of two is exact both ways, so `rint` (ties to even) rounds only once.
    # Overflow is dealt with below; "invalid" is raised by signalling NaN only.
    with np.errstate(over="ignore", invalid="ignore"):
        rounded: NDArray[np.float64] = np.ldexp(np.rint(np.ldexp(x, -shift)), shift)
    limit = number_format.max
    beyond = np.copysign(np.inf if number_format.has_infinity else limit, rounded)
    return np.where(np.abs(rounded) > limit, beyond, rounded)


def bf16_to_float32(bits: ArrayLike) -> NDArray[np.float32]:
    """Values of bfloat16 bit patterns, exactly.

    Parameters
    ----------
    bits : array_like of uint16, any shape

    Returns
    -------
    ndarray of float32, shape of `bits`
    """
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bf16_bits(x: ArrayLike) -> NDArray[np.uint16]:
    """Bit patterns of float32 numbers rounded to the nearest bfloat16, ties to even.

    Parameters
    ----------
    x : array_like of float32, any shape

    Returns
    -------
    ndarray of uint16, shape of `x`
        Beyond the largest bfloat16: infinity. NaN stays NaN (quiet, sign and top payload kept).
    """
    x = np.asarray(x, dtype=np.float32)
    word = x.view(np.uint32)
    # Adding half of the last kept bit, less one if that bit is even, carries exactly when nearest,
    # ties to even, rounds up; a carry out of the fraction moves the exponent as it should.
    half = np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
    nearest = (word + half) >> np.uint32(16)
    quiet_nan = (word >> np.uint32(16)) | np.uint32(0x0040)
    return np.where(np.isnan(x), quiet_nan, nearest).astype(np.uint16)


def bf16_bits_round_up(x: ArrayLike) -> NDArray[np.uint16]:
    """Bit patterns of the smallest bfloat16 numbers that are not below x.

    Parameters
    ----------
    x : array_like of float32 or float64, any shape
        From 0 to bfloat16's largest number, 3.39e38. Types other than float32 are taken as float64.

    Returns
    -------
    ndarray of uint16, shape of `x`
        0 only where x is 0; every other x gives a positive number, perhaps subnormal.

    Raises
    ------
    SpecError
        If an element is negative, NaN, infinite or above bfloat16's largest number: no bfloat16
        could serve as its row scale.

    Notes
    -----
    The rounding of the row scale in theory.md (2.1).
    """
    x = np.asarray(x)
    if x.dtype != np.float32:
        x = x.astype(np.float64)
    allowed = (x >= 0) & (x <= BF16.max)
    if not allowed.all():
        culprit = x[~allowed].flat[0]
        raise SpecError(
            f"cannot round {culprit} up to bfloat16: allowed are finite numbers from 0 to "
            f"{BF16.max:.4g}; {np.count_nonzero(~allowed)} of {x.size} elements are outside"
        )
    # bfloat16 is a subset of float32, so rounding up twice is rounding up once.
    with np.errstate(under="ignore"):
        single = np.abs(x).astype(np.float32)  # abs: the bits of -0.0 are not those of 0.0
    single = np.where(single < x, np.nextafter(single, np.float32(np.inf)), single)
    # Codes of non-negative numbers are ordered like the numbers: round the code up.
    word: NDArray[np.uint32] = single.view(np.uint32)
    return ((word + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)


def _quantum_exponent(number_format: FloatFormat, x: NDArray[np.float64]) -> NDArray[np.int32]:
    """Exponent of the spacing of the format's numbers at x."""
    e = np.maximum(exponent(x), np.int32(number_format.min_exponent))
    return e - np.int32(number_format.precision - 1)
