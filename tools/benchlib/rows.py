"""Rows of the table of `bench.py decode`: a case, what we did in it, and what peers did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchlib.peers import PeerResult, fastest
from benchlib.problem import DecodeShape

if TYPE_CHECKING:
    from benchlib.ours import OurResult

__all__ = ["BF16_ATTENTION", "Case", "print_row", "row"]

BF16_ATTENTION = "sdpa-flash-bf16"
"""The peer whose error is quoted beside ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table, before it is measured."""

    shape: DecodeShape
    data: str
    tolerance: float


def row(
    case: Case, ours: OurResult, peers: Sequence[PeerResult], bandwidth: float, card: str
) -> dict[str, Any]:
    """The facts of one case as JSON values; times in microseconds, errors relative."""
    best16, best8 = fastest(peers, 16), fastest(peers, 8)
    by_name = {peer.name: peer for peer in peers if peer.error is not None}
    bf16 = by_name.get(BF16_ATTENTION)
    return {
        "T": case.shape.tokens,
        "batch": case.shape.batch,
        "head_dim": case.shape.head_dim,
        "group": case.shape.group,
        "kv_heads": case.shape.kv_heads,
        "tolerance": case.tolerance,
        "data": case.data,
        "ours_us": ours.attend.median_us,
        "ours_p10_us": ours.attend.p10_us,
        "ours_p90_us": ours.attend.p90_us,
        "ours_step_us": ours.step.median_us,
        "best16_us": best16.timing.median_us if best16 and best16.timing else None,
        "best16_name": best16.name if best16 else None,
        "best8_us": best8.timing.median_us if best8 and best8.timing else None,
        "best8_name": best8.name if best8 else None,
        "read_fraction": ours.read_fraction,
        "useful_gb_s": ours.read_fraction * case.shape.kv_bytes(16) / ours.attend.median_us / 1e3,
        "ceiling_us": ours.read_fraction * case.shape.kv_bytes(16) / bandwidth * 1e6,
        "bound_max": ours.bound_max,
        "bound_median": ours.bound_median,
        "misses": ours.misses,
        "error_max": ours.error.max,
        "error_rms": ours.error.rms,
        "error_over_bound": ours.error_over_bound,
        "error_bf16": bf16.error.max if bf16 and bf16.error else None,
        "error_bf16_rms": bf16.error.rms if bf16 and bf16.error else None,
        "error_best8": best8.error.max if best8 and best8.error else None,
        "ours_mj": ours.attend.millijoules,
        "best16_mj": best16.timing.millijoules if best16 and best16.timing else None,
        "best8_mj": best8.timing.millijoules if best8 and best8.timing else None,
        "peers_us": {p.name: p.timing.median_us for p in peers if p.timing is not None},
        "card": card,
    }


def print_row(facts: dict[str, Any]) -> None:
    """One line of the table as soon as it is known."""

    def ratio(peer: str) -> str:
        return f"{facts[peer] / facts['ours_us']:5.2f}x" if facts[peer] else "     -"

    print(
        f"{facts['T']:7d} x {facts['batch']:<2d} {facts['data']:8} {facts['tolerance']:8.5f}"
        f" {facts['ours_us']:7.1f} ({facts['ours_step_us']:6.1f})"
        f" {ratio('best16_us')} {ratio('best8_us')}"
        f" {100 * facts['read_fraction']:5.1f} % {facts['useful_gb_s']:6.0f}"
        f"  {facts['bound_max']:.5f} {facts['error_max']:.5f}"
        f" {facts['error_bf16'] or float('nan'):.5f} {facts['misses']:3d}"
        f"  {facts['error_over_bound']:8.2f}",
        flush=True,
    )
    if facts["error_over_bound"] > 1:
        print(f"{'':22}an error exceeds its bound, which is an estimate and no proof", flush=True)
    if facts["ours_mj"] is not None:
        peers = ", ".join(
            f"{facts[f'{peer}_name']} {facts[f'{peer}_mj']:.2f}"
            for peer in ("best16", "best8")
            if facts[f"{peer}_mj"] is not None
        )
        print(f"{'':22}mJ a step: {facts['ours_mj']:.2f}, {peers}", flush=True)
