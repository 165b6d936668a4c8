#!/usr/bin/env python
"""Save the attention inputs of a Hugging Face causal LM: what `tools/analyze.py` reads.

One safetensors file a layer: ``k, v`` [KV heads, tokens, D] of the prompt, ``q`` [heads, positions,
D] of its last positions, and with ``--decode`` ``k_dec, v_dec, q_dec`` of greedy decode steps; all
after the rotary embedding and not yet scaled.  The model is used as it is: a function registered
with transformers' public attention registry records its arguments and calls the stock attention.

    python tools/capture.py path/to/model --tokens 4096 --out captured/
    python tools/capture.py folder --gguf model.Q4_1.gguf --layers 0,15,29 --out captured/
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: Name under which the recording attention is known while `recording` is active.
ATTENTION_NAME = "alignedkv_capture"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
#: Rough characters of English text or code per token, with room to spare.
CHARACTERS_PER_TOKEN = 12


class CaptureError(Exception):
    """What the user gave cannot be captured; the message says what to do."""


@dataclass(kw_only=True)
class LayerRecord:
    """Attention inputs of one layer, batch dimension dropped, in the model's dtype."""

    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor
    scaling: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    decoded: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Named tensors as they go into the file."""
        named = {"k": self.k, "v": self.v, "q": self.q}
        if self.decoded:
            stacked = (torch.cat(parts, dim=1) for parts in zip(*self.decoded, strict=True))
            named |= dict(zip(("k_dec", "v_dec", "q_dec"), stacked, strict=True))
        for name, tensor in named.items():
            if tensor.abs().max() > torch.finfo(dtype).max:
                raise CaptureError(
                    f"{name} holds values beyond {dtype}: capture with --dtype bfloat16 or float32"
                )
        if self.sinks is not None:
            named["sinks"] = self.sinks
        return {name: x.to("cpu", dtype).contiguous() for name, x in named.items()}


@contextmanager
def recording(model: Any, layers: set[int], positions: int) -> Iterator[dict[int, LayerRecord]]:
    """Record the attention inputs of ``layers`` while the model runs inside the context.

    The first call of a layer is its prompt: all keys and values, the last ``positions`` queries.
    Every later call is one decode step.  The model's own attention setting returns afterwards.
    """
    records: dict[int, LayerRecord] = {}
    stock_name = model.config._attn_implementation

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        layer = module.layer_idx
        if layer in records:
            records[layer].decoded.append(
                (k[0, :, -1:].clone(), v[0, :, -1:].clone(), q[0].clone())
            )
        elif layer in layers:
            records[layer] = LayerRecord(
                k=k[0].clone(),
                v=v[0].clone(),
                q=q[0, :, -positions:].clone(),
                scaling=kwargs.get("scaling") or q.shape[-1] ** -0.5,
                window=kwargs.get("sliding_window"),
                softcap=kwargs.get("softcap"),
                sinks=kwargs.get("s_aux"),
            )
        eager = sys.modules[type(module).__module__].eager_attention_forward
        stock = ALL_ATTENTION_FUNCTIONS.get_interface(stock_name, eager)
        return stock(module, q, k, v, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME] = attend
    # Masks are looked up in the class's registry only; a name missing there gets no mask at all.
    AttentionMaskInterface.register(ATTENTION_NAME, AttentionMaskInterface()[stock_name])
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        if model.config._attn_implementation != ATTENTION_NAME:
            raise CaptureError(
                f"{type(model).__name__} does not go through transformers' attention interface"
            )
        yield records
    finally:
        model.set_attn_implementation(stock_name)
        del ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME]
        del AttentionMaskInterface._global_mapping[ATTENTION_NAME]


def capture(
    model: Any,
    tokens: torch.Tensor,
    *,
    layers: Sequence[int],
    positions: int,
    decode_steps: int = 0,
    progress: Progress | None = None,
) -> dict[int, LayerRecord]:
    """Run the model on ``tokens`` [T], then greedily for ``decode_steps``; return the records."""
    ids = tokens[None].to(model.device)
    task = (
        progress.add_task("prompt, then decode steps", total=1 + decode_steps) if progress else None
    )
    with torch.no_grad(), recording(model, set(layers), positions) as records:
        cache = DynamicCache(config=model.config) if decode_steps else None
        for _ in range(1 + decode_steps):
            out = model(ids, **_cache_keyword(model, cache), logits_to_keep=1)
            ids = out.logits[:, -1:].argmax(dim=-1)
            if progress is not None and task is not None:
                progress.advance(task)
    return records


def _cache_keyword(model: Any, cache: DynamicCache | None) -> dict[str, Any]:
    """The cache under the name that this version of transformers gives it."""
    if cache is None:
        return {"use_cache": False}
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def save(record: LayerRecord, path: Path, dtype: torch.dtype, facts: dict[str, str]) -> None:
    """Write one layer's file; it appears whole or not at all."""
    heads, _, head_dim = record.q.shape
    metadata = facts | {
        "scaling": repr(float(record.scaling)),
        "num_heads": str(heads),
        "num_kv_heads": str(record.k.shape[0]),
        "head_dim": str(head_dim),
        "tokens": str(record.k.shape[1]),
        "query_positions": f"{record.k.shape[1] - record.q.shape[1]}..{record.k.shape[1] - 1}",
        "sliding_window": str(record.window),
        "softcap": str(record.softcap),
        "post_rope": "true",
    }
    partial = path.with_suffix(".partial")
    try:
        save_file(record.tensors(dtype), partial, metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def bundled_text() -> str:
    """Prose and code that every Python has: its language reference topics and module sources."""
    import heapq
    import pydoc_data.topics as reference
    import statistics
    import textwrap

    topics = ("objects", "naming", "typesseq", "exceptions", "import", "compound", "specialnames")
    prose = [reference.topics[name] for name in topics]
    code = [Path(module.__file__ or "").read_text() for module in (heapq, statistics, textwrap)]
    longest = max(len(prose), len(code))
    parts = [group[i] for i in range(longest) for group in (prose, code) if i < len(group)]
    return "\n\n".join(parts)


def read_text(source: str | None, tokens: int) -> str:
    """The text to run on: a file, or the bundled one, cut where ``tokens`` are surely reached."""
    if source is None:
        return bundled_text()[: tokens * CHARACTERS_PER_TOKEN]
    path = Path(source)
    if not path.is_file():
        raise CaptureError(f"--text {source}: no such file")
    return path.read_text(errors="replace")[: tokens * CHARACTERS_PER_TOKEN]


def chosen_layers(text: str, count: int) -> list[int]:
    """``"all"`` or ``"0,15,29"`` -> layer numbers, checked against the model."""
    if text == "all":
        return list(range(count))
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        raise CaptureError(
            f"--layers {text!r}: give 'all' or numbers separated by commas"
        ) from None
    if wrong := [layer for layer in layers if not 0 <= layer < count]:
        raise CaptureError(f"--layers {wrong}: the model has layers 0..{count - 1}")
    return layers


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="model folder or hub name")
    parser.add_argument("--gguf", help="GGUF file inside the folder; it is dequantised")
    parser.add_argument("--out", type=Path, required=True, help="folder for one file a layer")
    parser.add_argument("--text", help="text file (default: Python's own reference and sources)")
    parser.add_argument("--tokens", type=int, default=4096, help="prompt length")
    parser.add_argument("--positions", type=int, default=24, help="last query positions to keep")
    parser.add_argument(
        "--decode", type=int, default=0, help="greedy decode steps after the prompt"
    )
    parser.add_argument("--layers", default="all", help="'all' or numbers such as 0,15,29")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the saved tensors")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> list[Path]:
    """Do what the options say and return the files written."""
    if options.tokens < 1 or not 1 <= options.positions <= options.tokens or options.decode < 0:
        raise CaptureError(
            "give --tokens of at least 1, --positions of 1 to --tokens, --decode >= 0"
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CaptureError(f"--out {options.out}: {error.strerror}") from None
    gguf = {"gguf_file": options.gguf} if options.gguf else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, **gguf)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, **gguf)
    except (OSError, ValueError) as error:
        raise CaptureError(f"cannot load {options.model}: {str(error).splitlines()[0]}") from None
    model = model.to(options.device).eval()
    layers = chosen_layers(options.layers, model.config.get_text_config().num_hidden_layers)
    ids = tokenizer(read_text(options.text, options.tokens), return_tensors="pt").input_ids[0]
    if len(ids) < options.tokens:
        raise CaptureError(f"the text has {len(ids)} tokens, fewer than --tokens {options.tokens}")
    with Progress() as progress:
        records = capture(
            model,
            ids[: options.tokens],
            layers=layers,
            positions=options.positions,
            decode_steps=options.decode,
            progress=progress,
        )
    facts = {"model": f"{options.model} {options.gguf or ''}".strip(), "text": str(options.text)}
    files = []
    for layer, record in sorted(records.items()):
        path = options.out / f"layer-{layer:03d}.safetensors"
        save(record, path, DTYPES[options.dtype], facts | {"layer": str(layer)})
        files.append(path)
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line that says what was wrong."""
    options = parse(argv)
    try:
        files = run(options)
    except CaptureError as error:
        print(f"capture: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"files": [str(path) for path in files]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
