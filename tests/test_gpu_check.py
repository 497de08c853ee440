"""tests/gpu_check.py runs: its smoke part on a CPU, so that it is ready when a GPU is at hand."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import tiny_config


@pytest.mark.slow
def test_the_smoke_check_passes_on_a_cpu():
    done = subprocess.run([sys.executable, Path(__file__).with_name("gpu_check.py"), "smoke"],
                          env=os.environ | {"DEV": "cpu", "MODES": "bf16,int8"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["smoke bf16", "smoke int8"]
    for line in lines:
        out = json.loads(line[line.index("{"):line.rindex("}") + 1])
        assert max(out["error"].values()) < 0.05
        same, of = map(int, out["standard==alone"].split("/"))
        assert of == 6 and same >= 4  # bfloat16: near ties may turn


def test_the_rest_fits_the_code(monkeypatch):
    """Passes and rounds of small shapes on a CPU, with nothing compiled or recorded."""
    monkeypatch.setenv("DEV", "cpu")
    check = importlib.import_module("gpu_check")
    for name, small in (("llama-3.1-70b", {}), ("llama-3.1-8b", {"hidden_size": 32})):
        monkeypatch.setitem(check.PRESETS, name, tiny_config(max_position_embeddings=2048, **small))
    monkeypatch.setattr(check, "compile_engine", lambda engine: None)
    monkeypatch.setattr(check.torch, "compile", lambda f, **settings: f)
    monkeypatch.setattr(check, "recorded", lambda call: call)
    monkeypatch.setattr(check, "ms", lambda call, n=1: (call(), 1.0)[1])
    assert check.one_pass(check.dummy("llama-3.1-70b", "int8")[0], 26) == 1.0
    assert check.whole_rounds("int8", ("int8", None), k=5, accepted=3, rounds=4).keys() == {
        "alone", "draft int8", "draft bf16"}
    assert set(check.kernels((64, 96), "int8")) == {1, 2, 17, 26, 33, 64}
