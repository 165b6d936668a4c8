"""Error bounds of floating-point sums, and of the attention that is made of them.

Two kinds of function that are never mixed:

- ``..._bound``: a theorem. Under the assumptions that its docstring states it is never exceeded.
- ``..._estimate``: a statement with a failure probability (or a root mean square) under a *model*
  of rounding errors as random numbers. Round to nearest is not random: structured data, equal
  addends for one, exceed an estimate at any failure probability. They live in `estimates`.

======================  =========================================  ==========================
module                  what                                       theory.md
======================  =========================================  ==========================
`sums`                  sums in any order, by tree, dot products   S1-S4
`tensor_cores`          sums inside matrix instructions            S7
`addends`               bits of an addend that a sum can use       Lemma 15
`softmax`               total variation, log-sum-exp, softmax      Lemmas 13, 14
`ordinary_attention`    what 16-bit attention commits              section 7.3
`estimates`             random-rounding models of all of these     S5, S6, section 7.3
======================  =========================================  ==========================

``u`` is the unit roundoff of the arithmetic that does the adding (`FloatFormat.unit_roundoff`).
Model of arithmetic: round to nearest, no overflow; fl(x op y) = (x op y)(1 + d), |d| <= u. Sums are
exact under underflow, products are not. Bounds are evaluated in float64 and enlarged by 2^-32 of
themselves, which covers that evaluation for up to 2^20 addends.
"""

from alignedkv.analysis.bounds.addends import AddendBits, addend_bits
from alignedkv.analysis.bounds.estimates import (
    azuma_z,
    ordinary_attention_error_estimate,
    product_error_estimate,
    rounded_inputs_score_error_estimate,
    sum_error_estimate,
    tree_sum_error_estimate,
)
from alignedkv.analysis.bounds.ordinary_attention import (
    ordinary_attention_error_bound,
    ordinary_score_error_bound,
)
from alignedkv.analysis.bounds.softmax import (
    average_change_bound,
    log_sum_exp_error_bound,
    softmax_error_bound,
    total_variation_bound,
)
from alignedkv.analysis.bounds.sums import (
    RunningSum,
    chunked_height,
    dot_error_bound,
    gamma,
    pairwise_height,
    recursive_height,
    running_sum,
    sum_error_bound,
    tree_sum_error_bound,
)
from alignedkv.analysis.bounds.tensor_cores import mma_dot_error_bound, mma_error_bound

__all__ = [
    "AddendBits",
    "RunningSum",
    "addend_bits",
    "average_change_bound",
    "azuma_z",
    "chunked_height",
    "dot_error_bound",
    "gamma",
    "log_sum_exp_error_bound",
    "mma_dot_error_bound",
    "mma_error_bound",
    "ordinary_attention_error_bound",
    "ordinary_attention_error_estimate",
    "ordinary_score_error_bound",
    "pairwise_height",
    "product_error_estimate",
    "recursive_height",
    "rounded_inputs_score_error_estimate",
    "running_sum",
    "softmax_error_bound",
    "sum_error_bound",
    "sum_error_estimate",
    "total_variation_bound",
    "tree_sum_error_bound",
    "tree_sum_error_estimate",
]
