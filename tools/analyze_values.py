"""Values on the command line of `tools/analyze.py`: how each kind is written, and read."""

from __future__ import annotations

import argparse
import re
from typing import Any

from alignedkv.analysis.schemes import default_schemes
from alignedkv.errors import SpecError
from alignedkv.planes import PlaneLayout


class Several(argparse.Action):
    """Values that may be separated by spaces or commas, or given by repeating the option.

    argparse hands an option of several values all that follows it, files among them: what does not
    look like a value is one of the sources.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        """Take the values that there are; at least one."""
        taken = list(getattr(namespace, self.dest) or [])
        for i, text in enumerate(values):
            try:
                taken += self._values(text)
            except ValueError as error:
                if i == 0:
                    raise argparse.ArgumentError(self, str(error)) from None
                namespace.more_sources = [*namespace.more_sources, *values[i:]]
                break
        setattr(namespace, self.dest, taken)

    def _values(self, text: str) -> list[Any]:
        """One value, a comma in it or not, or several with commas between."""
        try:
            return list(self.const(text))
        except ValueError:
            if "," not in text:
                raise
            return [value for piece in text.split(",") for value in self.const(piece)]


def parse_tolerance(text: str) -> list[float]:
    """``2^-7``, ``1/128`` or ``0.0078`` -> a number."""
    try:
        if match := re.fullmatch(r"2(?:\^|\*\*)(-?\d+(?:\.\d+)?)", text.strip()):
            return [2.0 ** float(match[1])]
        numerator, slash, denominator = text.partition("/")
        return [float(numerator) / (float(denominator) if slash else 1.0)]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{text!r}: give a number such as 2^-7, 1/128 or 0.0078") from None


def parse_numbers(text: str) -> list[int]:
    """``15`` or ``0..5`` -> whole numbers."""
    match = re.fullmatch(r"\s*(-?\d+)(?:\.\.(-?\d+))?\s*", text)
    if match is None:
        raise ValueError(f"{text!r}: give whole numbers, or a range such as 0..5")
    first = int(match[1])
    return list(range(first, int(match[2]) + 1)) if match[2] else [first]


def parse_positions(text: str) -> list[int | str]:
    """As `parse_numbers`, or ``all``."""
    return ["all"] if text == "all" else list(parse_numbers(text))


def parse_schemes(text: str) -> list[str]:
    """Names as `scheme_names` lists them, ``all`` or ``none``."""
    name = slug(text)
    known = ("all", "none", *scheme_names())
    if name not in known:
        raise ValueError(f"{text!r}: give {', '.join(known)}")
    return [name]


def parse_jobs(text: str) -> int | str:
    """A number of processes, or ``tcp://host:port``."""
    if re.fullmatch(r"\w+://\S+", text):
        return text
    if not re.fullmatch(r"-?\d+", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a number of processes, -1 for all cores, or a Dask scheduler's address"
        )
    return int(text)


def parse_layouts(text: str) -> tuple[PlaneLayout, PlaneLayout]:
    """``4|4|8`` for both, or keys and values: ``4|2|2|8,4|4|8``; ``-`` may stand for ``|``."""
    parts = [PlaneLayout.parse(part) for part in text.replace("-", "|").split(",")]
    if len(parts) > 2:
        raise SpecError(f"--layout {text!r}: give one layout, or one of keys and one of values")
    return parts[0], parts[-1]


def slug(name: str) -> str:
    """``"paper, as published"`` -> ``"paper-as-published"``: a name that needs no quotes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def scheme_names() -> list[str]:
    """Schemes as the command line calls them."""
    return [slug(scheme.name) for scheme in default_schemes()]
