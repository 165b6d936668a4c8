"""What others do to the same case: 16-bit and 8-bit caches, KIVI, and the paper's own rule.

A scheme (`scheme.Scheme`) answers for one query position: the output of every head, the bits that
it reads, the bytes that it stores.
"""

from alignedkv.analysis.schemes.paper_rule import PaperRule
from alignedkv.analysis.schemes.quantised import Fp8, Int8, Kivi, SixteenBit
from alignedkv.analysis.schemes.scheme import Scheme, SchemeResult
from alignedkv.formats import BF16, FP8_E4M3, FP8_E5M2, FP16

__all__ = ["Scheme", "SchemeResult", "default_schemes"]


def default_schemes() -> tuple[Scheme, ...]:
    """The schemes that reports compare with, most bits first."""
    return (
        SixteenBit(name="fp16", number_format=FP16),
        SixteenBit(name="bf16", number_format=BF16),
        PaperRule.mended(),
        PaperRule.as_published(),
        Int8(),
        Fp8(name="fp8 e4m3", number_format=FP8_E4M3),
        Fp8(name="fp8 e5m2", number_format=FP8_E5M2),
        Kivi(bits=4),
        Kivi(bits=2),
    )
