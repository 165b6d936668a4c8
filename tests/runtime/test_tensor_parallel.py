"""Two ranks, each with half of the heads: the answer of one process, without any code for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alignedkv import runtime
from alignedkv.policy import model_policy
from tiny_models import make_tiny, prompt

TOLERANCE = 2.0**-10
#: As in test_generate.py.
AMPLIFICATION = 4.0
OPTIONS = {
    "max_new_tokens": 6,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}

#: Takes a folder with a model and its input; transformers itself picks nccl where there are GPUs.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from alignedkv import runtime
from alignedkv.policy import model_policy

folder, tolerance, options = Path(sys.argv[1]), float(sys.argv[2]), json.loads(sys.argv[3])
try:
    from transformers.distributed import DistributedConfig
    parallel = {"distributed_config": DistributedConfig(tp_size=2)}
except (ImportError, TypeError):
    parallel = {"tp_plan": "auto"}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **parallel).eval()
tokens = torch.load(folder / "tokens.pt").to(model.device)
with runtime.patched(model, model_policy(tolerance=tolerance), break_even=0):
    answer = model.generate(tokens, **options)
    report = runtime.report(model)
told = {
    "tokens": answer.sequences.cpu(),
    "logits": torch.stack(answer.logits).cpu(),
    "read": report.read_fraction.tolist(),
    "backend": torch.distributed.get_backend(),
}
torch.save(told, folder / f"answer{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "gloo"), pytest.param("cuda", "nccl", marks=pytest.mark.gpu)]
)
def test_two_ranks_give_the_answer_of_one(device: str, backend: str, tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, torch sees {torch.cuda.device_count()}")
    model, tokens = make_tiny("Llama"), prompt(2, 40)
    model.save_pretrained(tmp_path)
    torch.save(tokens, tmp_path / "tokens.pt")
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_port=29617", str(script), str(tmp_path)]
    path = [str(Path(runtime.__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*command, str(TOLERANCE), json.dumps(OPTIONS)],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env={**os.environ, **hidden, "PYTHONPATH": os.pathsep.join(path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]

    model, tokens = model.to(device), tokens.to(device)
    stock = model.generate(tokens, **OPTIONS)
    with runtime.patched(model, model_policy(tolerance=TOLERANCE), break_even=0):
        alone = model.generate(tokens, **OPTIONS)
    exact = torch.stack(stock.logits).cpu()
    for rank in range(2):
        answer = torch.load(tmp_path / f"answer{rank}.pt")
        assert answer["backend"] == backend
        assert torch.equal(answer["tokens"], alone.sequences.cpu())
        error = (answer["logits"] - exact).abs().max() / exact.abs().max()
        assert 0 < error <= AMPLIFICATION * TOLERANCE
        assert all(share > 0 for share in answer["read"])
