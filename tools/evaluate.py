#!/usr/bin/env python
"""What a KV cache of bit planes does to a model: predictions, needles, speed and memory.

Next-token predictions along a text, after one exact prompt, beside those of the stock model in the
same dtype: perplexity, KL divergence, agreement of the most probable token; for alignedkv at
several tolerances and for others' caches.  Along the model's own greedy continuation (--greedy),
agreement everywhere means that generating would have given the same tokens.  Where the most
probable token is another one, a second table says how close the two were: ``gap`` is the difference
of their exact logits, ``gap_error`` the root mean square error of such a difference at that
position, ``bf16_gap_error`` the same of bf16 attention, if that is among the rivals.  A gap within
the latter is a tie that bf16 would not have told apart either.

    python tools/evaluate.py path/to/model --text book.txt --context 4096 --positions 128
    python tools/evaluate.py folder --gguf model.gguf --text book.txt --greedy --rivals none
    python tools/evaluate.py path/to/model --text book.txt --needle 1024,4096 --json out.json
    python tools/evaluate.py path/to/model --text book.txt --positions 0 --speed-steps 32
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import DynamicCache

from alignedkv import runtime
from alignedkv.errors import AlignedKVError
from alignedkv.policy import PRESET_EXACT_FIRST, BoundKind, PrecisionPolicy
from evallib import candidates, measures, needle, plot
from evallib.text import CACHE, DTYPES, EvaluationError, Subject, load


def numbers(text: str) -> list[float]:
    """``"3,5,7"`` -> numbers."""
    return [float(part) for part in text.split(",") if part]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="model folder or hub name")
    parser.add_argument("--gguf", help="GGUF file inside the folder; it is dequantised")
    parser.add_argument("--text", type=Path, required=True, help="text file")
    parser.add_argument("--context", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument(
        "--positions", type=int, default=128, help="predictions compared; 0: none (default: 128)"
    )
    parser.add_argument(
        "--greedy", action="store_true", help="follow the model's greedy continuation, not the text"
    )
    parser.add_argument(
        "--bits", type=numbers, default=[3, 4, 5, 6, 7], help="tolerances 2^-bits, e.g. 3,5,7"
    )
    parser.add_argument("--bound", choices=list(BoundKind), default="estimate")
    parser.add_argument(
        "--exact-first",
        type=int,
        default=PRESET_EXACT_FIRST,
        help="first tokens whose rows are kept as they are (default: %(default)s, as in presets)",
    )
    parser.add_argument(
        "--rivals", default="all", help="'all', 'none' or names separated by commas"
    )
    parser.add_argument("--speed-steps", type=int, default=0, help="decode steps to time")
    parser.add_argument("--needle", type=numbers, default=[], help="contexts, e.g. 1024,4096")
    parser.add_argument("--depths", type=numbers, default=[0.1, 0.5, 0.9], help="of the needle")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--plots", type=Path, help="folder for plots")
    options = parser.parse_args(argv)
    if options.context < 1 or (options.positions != 0 and options.positions < 2):
        parser.error("give --context of at least 1 and --positions of at least 2, or 0 for none")
    return options


def planes(options: argparse.Namespace) -> list[candidates.Planes]:
    """alignedkv at every tolerance."""
    policy = {"bound": options.bound, "exact_first": options.exact_first}
    return [candidates.planes_at(bits, **policy) for bits in options.bits]


def greedy(subject: Subject, cache: DynamicCache, first: torch.Tensor) -> Subject:
    """The subject whose text goes on with the model's own greedy continuation."""
    tokens = [first]
    with torch.no_grad():
        for _ in range(subject.following.shape[1] - 1):
            logits = subject.model(tokens[-1], **{CACHE: cache}).logits
            tokens.append(logits[:, -1].argmax(dim=-1, keepdim=True))
    return dataclasses.replace(subject, tokens=torch.cat([subject.prompt, *tokens], dim=1))


def predictions(
    subject: Subject, options: argparse.Namespace
) -> tuple[Subject, dict[str, pd.DataFrame]]:
    """Figures of every candidate, differing tokens, and the subject whose text they followed."""
    chosen: list[Any] = [candidates.Stock(), *planes(options)]
    if options.rivals != "none":
        chosen += candidates.rivals(options.rivals.split(","))
    prompt = DynamicCache(config=subject.model.config)
    with torch.no_grad():
        answer = subject.model(subject.prompt, **{CACHE: prompt}, logits_to_keep=1)
    if options.greedy:
        first = answer.logits[:, -1].argmax(dim=-1, keepdim=True)
        subject = greedy(subject, copy.deepcopy(prompt), first)
    rows, differing, exact = [], [], None
    errors: dict[str, torch.Tensor] = {}
    for candidate in chosen:
        start = time.perf_counter()
        found = candidate.follow(subject, prompt)
        exact = found.logits if exact is None else exact
        figures = measures.fidelity(found.logits, exact, subject.following[0])
        rows.append(
            {
                "name": candidate.name,
                "read_fraction": found.read_fraction,
                **dataclasses.asdict(figures),
                "misses": found.misses,
                "seconds": time.perf_counter() - start,
            }
        )
        print(rows[-1], file=sys.stderr)
        errors[candidate.name] = measures.gap_error(found.logits, exact)
        differing += [
            {"name": candidate.name, **dataclasses.asdict(difference)}
            for difference in measures.differences(found.logits, exact)
        ]
    for row in differing:
        row["gap_error"] = float(errors[row["name"]][row["position"]])
        if candidates.BF16_ATTENTION in errors:
            row["bf16_gap_error"] = float(errors[candidates.BF16_ATTENTION][row["position"]])
    tables = {"predictions": pd.DataFrame(rows)}
    if differing:
        tables["differences"] = pd.DataFrame(differing)
    return subject, tables


def costs(subject: Subject, options: argparse.Namespace) -> pd.DataFrame:
    """Speed and memory of the stock cache and of every tolerance."""
    policies: list[tuple[str, PrecisionPolicy | None]] = [("stock", None)]
    policies += [(ours.name, ours.policy) for ours in planes(options)]
    rows = []
    for name, policy in policies:
        found = measures.cost(subject, policy, steps=options.speed_steps)
        rows.append({"name": name, **dataclasses.asdict(found)})
    return pd.DataFrame(rows)


def needles(subject: Subject, options: argparse.Namespace) -> pd.DataFrame:
    """Whether the needle is found, by candidate, context and depth."""
    rows = []
    contexts = [int(context) for context in options.needle]
    for ours in (None, *planes(options)):
        found = needle.sweep(
            subject,
            None if ours is None else ours.policy,
            contexts=contexts,
            depths=options.depths,
        )
        name = "stock" if ours is None else ours.name
        rows += [
            {"name": name, "context": context, "depth": depth, "found": hit}
            for (context, depth), hit in found.items()
        ]
    return pd.DataFrame(rows)


def run(options: argparse.Namespace) -> dict[str, pd.DataFrame]:
    """All tables that the options ask for."""
    subject = load(
        options.model,
        gguf=options.gguf,
        dtype=options.dtype,
        device=options.device,
        text=options.text,
        context=options.context,
        positions=options.positions,
    )
    print(runtime.forecast(subject.model, context=options.context), file=sys.stderr)
    tables: dict[str, pd.DataFrame] = {}
    if options.positions:
        subject, tables = predictions(subject, options)
    if options.speed_steps:
        tables["costs"] = costs(subject, options)
    if options.needle:
        tables["needles"] = needles(subject, options)
    return tables


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line that says what was wrong."""
    options = parse(argv)
    try:
        tables = run(options)
    except (EvaluationError, AlignedKVError, ValueError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    for title, table in tables.items():
        print(f"\n{title}\n{table.to_string(index=False, float_format='{:.4g}'.format)}")
    if options.json:
        records = {title: table.to_dict("records") for title, table in tables.items()}
        settings = {name: str(value) for name, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": settings, **records}, indent=1))
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
        if "predictions" in tables:
            plot.plot_fidelity(tables["predictions"], options.plots / "fidelity.svg")
        if "needles" in tables:
            plot.plot_needles(tables["needles"], options.plots / "needles.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
