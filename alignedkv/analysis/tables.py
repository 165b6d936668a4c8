"""What an analysis says in numbers: summaries of its records, and the per-token table's files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import ArrayLike

from alignedkv.analysis.records import (
    TOKEN_SCHEMA,
    ContextRecord,
    OutputRecord,
    PlaneRecord,
    SchemeRecord,
)
from alignedkv.analysis.sweep import PositionAnalysis


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All records of a sweep but those of single tokens.

    Attributes
    ----------
    outputs, schemes, planes, context : DataFrame
        Columns as the classes of `records` say.
    refused : dict of str to str
        Schemes that cannot hold some of the cases, and why.
    """

    outputs: pd.DataFrame
    schemes: pd.DataFrame
    planes: pd.DataFrame
    context: pd.DataFrame
    refused: dict[str, str]

    @property
    def requested(self) -> pd.DataFrame:
        """Outputs at the tolerances that were asked for."""
        return self.outputs[self.outputs["requested"]]


def collect(results: Iterable[PositionAnalysis], tokens: TokenTable) -> Findings:
    """Gather what a sweep yields; rows of tokens go to their files at once."""
    outputs: list[OutputRecord] = []
    schemes: list[SchemeRecord] = []
    planes: list[PlaneRecord] = []
    context: list[ContextRecord] = []
    refused: dict[str, str] = {}
    for result in results:
        outputs += result.outputs
        schemes += result.schemes
        planes += result.planes
        context += result.context
        refused |= dict(result.refused)
        tokens.write(result.tokens)
    return Findings(
        outputs=frame_of(outputs, OutputRecord),
        schemes=frame_of(schemes, SchemeRecord),
        planes=frame_of(planes, PlaneRecord),
        context=frame_of(context, ContextRecord),
        refused=refused,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Outputs of one tolerance, of one layer or of all.

    Attributes
    ----------
    tolerance : float
    read_fraction : float
        Mean bits read of keys and values as a share of 16 bits per element.
    scale_fraction : float
        What the row scales add to `read_fraction`.
    stored_fraction : float
        Bytes stored, scales included, as a share of 16 bits per element.
    bits_k, bits_v : float
        Mean bits read per element.
    bound : str
        Kind of the bound.
    bound_median, bound_max : float
    error_median, error_rms, error_max : float
        Relative to the largest output component, as the bounds are.
    misses : int
        Outputs whose bound is above the tolerance.
    violations : int
        Outputs whose error is above their bound.
    cases : int
        Outputs: query heads times positions.
    """

    tolerance: float
    read_fraction: float
    scale_fraction: float
    stored_fraction: float
    bits_k: float
    bits_v: float
    bound: str
    bound_median: float
    bound_max: float
    error_median: float
    error_rms: float
    error_max: float
    misses: int
    violations: int
    cases: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; None for a number that is not finite, which JSON cannot hold."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeSummary:
    """The same outputs under another scheme; attributes as in `Summary`.

    Attributes
    ----------
    stored_fraction : float
        Bytes stored as a share of 16 bits per element.

    Notes
    -----
    All bits here include the scheme's scales and zero points; those of `Summary` do not.
    """

    scheme: str
    bits_k: float
    bits_v: float
    read_fraction: float
    stored_fraction: float
    error_median: float
    error_rms: float
    error_max: float
    cases: int


def frame_of(records: Sequence[Any], record_type: type) -> pd.DataFrame:
    """Records of one dataclass as a table; its columns are there even if no record is."""
    names = list(record_type.__dataclass_fields__)  # type: ignore[attr-defined]
    columns = {name: [getattr(record, name) for record in records] for name in names}
    return pd.DataFrame(columns)


def summarize(outputs: pd.DataFrame) -> Summary:
    """Summary of outputs of one tolerance.

    Parameters
    ----------
    outputs : DataFrame
        Columns of `records.OutputRecord`, at least one row.
    """
    return Summary(
        tolerance=float(outputs["tolerance"].iloc[0]),
        read_fraction=float(outputs["read_fraction"].mean()),
        scale_fraction=float(outputs["scale_fraction"].mean()),
        stored_fraction=float(outputs["stored_fraction"].mean()),
        bits_k=float(outputs["bits_k"].mean()),
        bits_v=float(outputs["bits_v"].mean()),
        bound=str(outputs["kind"].iloc[0]),
        bound_median=float(outputs["bound"].median()),
        bound_max=float(outputs["bound"].max()),
        error_median=float(outputs["error"].median()),
        error_rms=root_mean_square(outputs["error"]),
        error_max=float(outputs["error"].max()),
        misses=int(outputs["missed"].sum()),
        violations=int(outputs["violated"].sum()),
        cases=len(outputs),
    )


def summarize_tolerances(outputs: pd.DataFrame) -> list[Summary]:
    """One summary for every tolerance, tightest first."""
    return [summarize(part) for _, part in outputs.groupby("tolerance", sort=True)]


def summarize_layers(outputs: pd.DataFrame) -> list[tuple[int, Summary]]:
    """One summary for every layer; outputs of one tolerance."""
    return [(int(layer), summarize(part)) for layer, part in outputs.groupby("layer", sort=True)]


def summarize_schemes(schemes: pd.DataFrame) -> list[SchemeSummary]:
    """One summary for every scheme, in the order in which they came.

    Parameters
    ----------
    schemes : DataFrame
        Columns of `records.SchemeRecord`.
    """
    return [
        SchemeSummary(
            scheme=str(name),
            bits_k=float(part["bits_k"].mean()),
            bits_v=float(part["bits_v"].mean()),
            read_fraction=float(part["read_fraction"].mean()),
            stored_fraction=float(part["stored_fraction"].mean()),
            error_median=float(part["error"].median()),
            error_rms=root_mean_square(part["error"]),
            error_max=float(part["error"].max()),
            cases=len(part),
        )
        for name, part in schemes.groupby("scheme", sort=False)
    ]


def root_mean_square(numbers: ArrayLike) -> float:
    """Root of the mean of the squares."""
    return float(np.sqrt(np.square(np.asarray(numbers, np.float64)).mean()))


def power_of_two(number: float, digits: int = 1) -> str:
    """``0.0078125`` -> ``2^-7``, ``0.001`` -> ``2^-10.0``: how tables and axes write errors."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    exponent = math.log2(number)
    return f"2^{int(exponent)}" if exponent.is_integer() else f"2^{exponent:.{digits}f}"


def tolerance_name(tolerance: float) -> str:
    """``2^-7``, or ``0.01`` where it is no power of two."""
    return power_of_two(tolerance) if math.log2(tolerance).is_integer() else f"{tolerance:g}"


class TokenTable:
    """The per-token table on its way into a parquet and a CSV file, batch by batch.

    Parameters
    ----------
    folder : Path
        Gets `tokens.parquet` and `tokens.csv`.
    """

    def __init__(self, folder: Path) -> None:
        self._open = ExitStack()
        self._parquet = self._open.enter_context(
            pyarrow.parquet.ParquetWriter(
                folder / "tokens.parquet", TOKEN_SCHEMA, compression="zstd"
            )
        )
        self._csv = self._open.enter_context(
            pyarrow.csv.CSVWriter(folder / "tokens.csv", TOKEN_SCHEMA)
        )
        self.rows = 0

    def __enter__(self) -> TokenTable:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Append rows."""
        self._parquet.write_batch(batch)
        self._csv.write_batch(batch)
        self.rows += batch.num_rows
