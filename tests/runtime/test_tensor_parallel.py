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
from alignedkv.policy import PrecisionPolicy
from tiny_models import make_tiny, prompt

SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from alignedkv import runtime
from alignedkv.policy import PrecisionPolicy

folder, tokens = sys.argv[1], json.loads(sys.argv[2])
try:
    from transformers.distributed import DistributedConfig
    parallel = {"distributed_config": DistributedConfig(tp_size=2)}
except (ImportError, TypeError):
    parallel = {"tp_plan": "auto"}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **parallel).eval()
with runtime.patched(model, PrecisionPolicy(tolerance=2.0**-10)):
    answer = model.generate(torch.tensor(tokens), max_new_tokens=6, do_sample=False)
    report = runtime.report(model)
if torch.distributed.get_rank() == 0:
    told = {"tokens": answer.tolist(), "read": report.read_fraction.tolist()}
    print("ANSWER" + json.dumps(told))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_give_the_answer_of_one(tmp_path: Path) -> None:
    model = make_tiny("Llama")
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT)
    tokens = prompt(2, 20)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_port=29617", str(script), str(tmp_path / "model")]
    done = subprocess.run(
        [*command, json.dumps(tokens.tolist())],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(runtime.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.split("ANSWER")[1].splitlines()[0])
    with runtime.patched(model, PrecisionPolicy(tolerance=2.0**-10)):
        alone = model.generate(tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(torch.tensor(answer["tokens"]), alone)
    assert all(share > 0 for share in answer["read"])
