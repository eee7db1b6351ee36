"""Reading rows, understanding them, tokens, metrics: against what the files say and what other libraries compute."""

import copy
import gc
import json
import math
import mmap

import pytest
import torch

from sparseft.integrations import encoding, evaluation, examples, measure, rows, strict_json

transformers = pytest.importorskip("transformers", reason="the extra `train` is not installed")
datasets = pytest.importorskip("datasets", reason="the extra `train` is not installed")

PAIRS = [{"text_a": "a, b", "text_b": 'say "c"', "label": 1}, {"text_a": "d\ne", "text_b": "ü", "label": 0}]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="[SEP]", model_max_length=64, **special
    )


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(path, items):
    return write(path, "".join(json.dumps(item) + "\n" for item in items))


class TestRows:
    def test_every_format_gives_the_same_rows(self, tmp_path):
        lines = jsonl(tmp_path / "a.jsonl", PAIRS)
        table = write(tmp_path / "a.json", json.dumps(PAIRS))
        comma = write(tmp_path / "a.csv", 'text_a,text_b,label\n"a, b","say ""c""",1\n"d\ne",ü,0\n')
        tab = write(tmp_path / "a.tsv", '\ufefftext_a\ttext_b\tlabel\na, b\t"say ""c"""\t1\n"d\ne"\tü\t0\n')
        assert rows.read(lines) == rows.read(table) == PAIRS
        assert rows.read(comma) == rows.read(tab) == [{**row, "label": str(row["label"])} for row in PAIRS]
        assert examples.prepare(rows.read(lines), []) == examples.prepare(rows.read(comma), [])

    def test_blank_lines_and_line_separators_inside_text(self, tmp_path):
        items = [{"text": "one\u2028line"}, {"text": "two"}]
        text = "\n".join(json.dumps(item, ensure_ascii=False) for item in items)
        assert rows.read(write(tmp_path / "a.jsonl", f"\n{text}\n\n")) == items

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.jsonl", "", "must hold at least one row, got none"),
            ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "line 3: is not JSON"),
            ("a.jsonl", '{"text": "a"}\n[1]\n', "line 2: must be an object, got list"),
            ("a.json", '[{"text": "a"},\n oops]', "line 2: is not JSON"),
            ("a.json", '{"text": "a"}', "must hold a list of objects"),
            ("a.csv", "text,label\na,1\nb\n", "line 3: must have 2 fields"),
            ("a.csv", "text,label\na,1,2\n", "line 2: must have 2 fields"),
            ("a.csv", 'text,label\n"a,1\n', "is not CSV"),
            ("a.csv", "text,label\n", "must hold at least one row"),
            ("a.txt", "text", "must end in .jsonl, .json, .csv, .tsv, got '.txt'"),
        ],
    )
    def test_broken_files_say_where(self, tmp_path, name, text, message):
        path = write(tmp_path / name, text)
        with pytest.raises(ValueError, match=message) as caught:
            rows.read(path)
        assert str(path) in str(caught.value)

    def test_missing_and_undecodable_files(self, tmp_path):
        with pytest.raises(ValueError, match=r"no\.jsonl is not a file"):
            rows.read(tmp_path / "no.jsonl")
        (tmp_path / "latin.jsonl").write_bytes('{"text": "ü"}'.encode("latin-1"))
        with pytest.raises(ValueError, match="must be UTF-8"):
            rows.read(tmp_path / "latin.jsonl")

    def test_a_data_set_of_the_datasets_library(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
        )
        (tmp_path / "data").mkdir()
        for split, labels in {"train": [1, 0, 1], "validation": [0, -1]}.items():
            table = datasets.Dataset.from_dict({"text": list("abc")[: len(labels)], "label": labels}, features)
            table.to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
        train = rows.read(tmp_path / "data")
        assert train == [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}, {"text": "c", "label": "yes"}]
        dev = rows.read(f"{tmp_path}/data:validation")
        assert dev == [{"text": "a", "label": "no"}, {"text": "b", "label": None}]
        with pytest.raises(ValueError, match="neither a file nor a data set"):
            rows.read(f"{tmp_path}/data:nosuch")


def texts(labels, column="label"):
    return [{"text": "a", column: label} for label in labels]


class TestExamples:
    @pytest.mark.parametrize(
        ("labels", "task", "classes", "numbers"),
        [
            ([3, 1, 10, 3], "classification", ("1", "3", "10"), [1, 0, 2, 1]),
            (["10", "3", "3"], "classification", ("3", "10"), [1, 0, 0]),
            (["yes", "no"], "classification", ("no", "yes"), [1, 0]),
            (["1", "x"], "classification", ("1", "x"), [0, 1]),
            ([True, False], "classification", ("0", "1"), [1, 0]),
            ([1.0, 2], "regression", (), [1.0, 2.0]),
            (["1.5", "2"], "regression", (), [1.5, 2.0]),
        ],
    )
    def test_labels_decide_the_task(self, labels, task, classes, numbers):
        splits = examples.prepare(texts(labels), texts(labels[:1]))
        assert (splits.task, splits.classes) == (task, classes)
        assert [example.label for example in splits.train] == numbers
        assert splits.dev == splits.train[:1]

    def test_the_task_can_be_asked_for(self):
        assert examples.prepare(texts([1, 2]), [], "regression").train[1].label == 2.0
        assert examples.prepare(texts([1.0, 2.0]), [], "classification").classes == ("1", "2")
        assert examples.prepare(texts([1, 2]), [], "causal-lm").columns == ("text",)

    @pytest.mark.parametrize(
        ("names", "columns", "task"),
        [
            ("text_a text_b label idx", ("text_a", "text_b"), "classification"),
            ("idx sentence2 sentence1 labels", ("sentence1", "sentence2"), "classification"),
            ("premise hypothesis label", ("premise", "hypothesis"), "classification"),
            ("sentence label", ("sentence",), "classification"),
            ("instruction input output", ("instruction", "input", "output"), "causal-lm"),
            ("instruction output", ("instruction", "output"), "causal-lm"),
            ("prompt completion idx", ("prompt", "completion"), "causal-lm"),
            ("text", ("text",), "causal-lm"),
        ],
    )
    def test_columns_are_found(self, names, columns, task):
        row = dict.fromkeys(names.split(), "t")
        splits = examples.prepare([row, {**row, "label": "u", "labels": "u"}], [])
        assert (splits.columns, splits.task) == (columns, task)
        assert splits.train[0].texts == ("t",) * len(columns)

    def test_columns_can_be_named(self):
        items = [
            {"q": "a", "p": "b", "text": "c", "label": 0, "y": 7},
            {"q": "", "p": "e", "text": "f", "label": 1, "y": 8},
        ]
        splits = examples.prepare(items, items, text_columns=["p", "q"], label_column="y")
        assert [example.texts for example in splits.train] == [("b", "a"), ("e", "")]
        assert splits.classes == ("7", "8")

    @pytest.mark.parametrize(
        ("train", "dev", "options", "message"),
        [
            ([], texts([1]), {}, "rows to train on, got none"),
            (texts([0, 1]), texts([2]), {}, "dev, row 1: label 2 is unknown; the classes to train on are 0, 1"),
            (texts(["a", "b"]), texts(["a", "c"]), {}, "dev, row 2: label 'c' is unknown"),
            (texts([1, 1]), [], {}, "at least two classes, got only 1"),
            (texts([0, None]), [], {}, "train, row 2: 'label' must be a name or a number, got None"),
            (texts(["a", ""]), [], {}, "train, row 2: 'label' must be a name or a number, got ''"),
            (texts([0, 1]), [{"text": "a"}], {}, "got a column 'label' in train and none in dev"),
            (texts([0, 1]), [*texts([1]), {"text": "a"}], {}, "dev, row 2: 'label' must be a name or a number"),
            (texts(["a", 1]), [], {}, "row 2: labels must all be names or all numbers, got 1"),
            (texts([0.5, float("nan")]), [], {}, "train, row 2: the label must be a finite number .*got nan"),
            (texts([0.5, 1.0]), texts(["x"]), {}, "dev, row 1: the label must be a finite number"),
            (texts(["a", "b"]), [], {"task": "regression"}, "train, row 1: the label must be a finite number"),
            (
                texts([0.5, 1.0]),
                [],
                {"task": "classification"},
                "row 1: a class must be a name or an integer",
            ),
            (texts([0, 1], "lable"), [], {}, r"must have a column 'label' or 'labels', got \['text', 'lable'\]"),
            ([{"text": "a"}], [], {"task": "classification"}, "must have a column 'label'"),
            (
                [{"body": "a", "label": 1}],
                [],
                {},
                r"columns text_a \+ text_b, .* got \['body', 'label'\]",
            ),
            ([{"body": "a"}], [], {"task": "causal-lm"}, "must have the columns instruction"),
            (texts([0, 1]), [], {"text_columns": ["body"]}, r"no column 'body'; the columns are \['text', 'label'\]"),
            (texts([0, 1]), [], {"label_column": "y"}, "no column 'y'"),
            (texts([0, 1]), [], {"text_columns": ["text"] * 3}, "must have one or two texts"),
            ([{"text": 3, "label": 1}], [], {}, "train, row 1: 'text' must be text, got 3"),
            (texts([0, 1]), [{"label": 0}], {}, "dev, row 1: 'text' must be text, got None"),
            (texts([0, 1]), [], {"task": "sorting"}, "task must be one of auto, classification"),
        ],
    )
    def test_wrong_rows_say_which(self, train, dev, options, message):
        with pytest.raises(ValueError, match=message):
            examples.prepare(train, dev, **options)


class TestEncoding:
    def test_pairs_are_padded_and_cut(self, tokenizer):
        items = [{"text_a": "a b c", "text_b": "d e", "label": 1}, {"text_a": "a", "text_b": "b", "label": 0}]
        encoded = encoding.encode(examples.prepare(items, items[:1]), tokenizer, max_length=6)
        (batch,) = encoded.batches(encoded.train, 2, "cpu")
        assert batch["input_ids"].tolist() == [[2, 4, 5, 3, 7, 3], [2, 4, 3, 5, 3, 0]]
        assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
        assert batch["labels"].tolist() == [1, 0]
        assert [len(features["input_ids"]) for features in encoded.dev] == [6]

    def test_regression_labels_are_floats(self, tokenizer):
        encoded = encoding.encode(examples.prepare(texts([0.25, 1]), []), tokenizer, max_length=8)
        (batch,) = encoded.batches(encoded.train, 2, "cpu")
        assert batch["labels"].dtype == torch.float32
        assert batch["labels"].tolist() == [0.25, 1.0]

    def test_only_the_answer_is_learnt(self, tokenizer):
        items = [{"instruction": "a b", "input": "", "output": "c"}, {"instruction": "a", "input": "d", "output": "e"}]
        encoded = encoding.encode(examples.prepare(items, []), tokenizer, max_length=16)
        (batch,) = encoded.batches(encoded.train, 2, "cpu")
        assert batch["input_ids"].tolist() == [[2, 4, 5, 6, 3], [2, 4, 7, 8, 3]]
        assert batch["labels"].tolist() == [[-100, -100, -100, 6, 3], [-100, -100, -100, 8, 3]]

    def test_a_text_is_learnt_whole_and_cut(self, tokenizer):
        encoded = encoding.encode(examples.prepare([{"text": "a b c"}, {"text": "d"}], []), tokenizer, max_length=4)
        (batch,) = encoded.batches(encoded.train, 2, "cpu")
        assert batch["input_ids"].tolist() == [[2, 4, 5, 6], [2, 7, 3, 0]]
        assert batch["labels"].tolist() == [[2, 4, 5, 6], [2, 7, 3, -100]]

    def test_rows_with_nothing_to_learn_are_left_out(self, tokenizer):
        items = [{"prompt": "a b c d e", "completion": "f"}, {"prompt": "a", "completion": "b"}]
        with pytest.warns(UserWarning, match="left out 1 of 2 rows"):
            encoded = encoding.encode(examples.prepare(items, []), tokenizer, max_length=5)
        assert [features["labels"] for features in encoded.train] == [[-100, -100, 5, 3]]
        with pytest.raises(ValueError, match="no row has anything to learn within 5 tokens"):
            encoding.encode(examples.prepare(items[:1], []), tokenizer, max_length=5)

    def test_length_by_default(self, tokenizer):
        items = [{"text": "a " * 500, "label": i} for i in range(2)]
        assert encoding.encode(examples.prepare(items, []), tokenizer).max_length == 64
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.model_max_length = 10**30
        encoded = encoding.encode(examples.prepare(items, []), tokenizer)
        assert [len(features["input_ids"]) for features in encoded.train] == [128, 128]

    @pytest.mark.parametrize("length", [1, 65])
    def test_length_out_of_range(self, tokenizer, length):
        with pytest.raises(ValueError, match=rf"max_length must lie in \[2, 64\] for this tokenizer, got {length}"):
            encoding.encode(examples.prepare(texts([0, 1]), []), tokenizer, max_length=length)

    def test_batches_are_shuffled_by_their_seed_alone(self, tokenizer):
        items = [{"text": "a", "label": i % 7} for i in range(50)]
        encoded = encoding.encode(examples.prepare(items, []), tokenizer, max_length=8)

        def order(seed):
            return torch.cat([batch["labels"] for batch in encoded.batches(encoded.train, 8, "cpu", seed)]).tolist()

        assert order(None) == [i % 7 for i in range(50)]
        assert order(0) == order(0) != order(1)
        assert sorted(order(0)) == sorted(order(None))


class Fixed(torch.nn.Module):
    """A model that gives the logits it was made with, row after row."""

    device = torch.device("cpu")

    def __init__(self, logits):
        super().__init__()
        self.rows = iter(logits)

    def forward(self, input_ids, **kwargs):
        logits = torch.stack([next(self.rows) for _ in input_ids])
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)


def encoded_as(task, labels):
    features = [{"input_ids": [1], "labels": label} for label in labels]
    collate = transformers.default_data_collator
    return encoding.Encoded(task, 1, [], features, collate)


class TestEvaluation:
    def test_accuracy(self):
        encoded = encoded_as("classification", [0, 2, 1, 1])
        logits = torch.tensor([[2.0, 1, 0], [0, 1, 2], [2, 1, 0], [0, 3, 2]])
        found = evaluation.evaluate(Fixed(logits), encoded, encoded.dev, batch_size=3)
        assert found.metrics == {"accuracy": 0.75}
        assert torch.equal(found.outputs, logits)

    def test_correlations_with_ties(self):
        stats = pytest.importorskip("scipy.stats")
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, 5, (40,), generator=generator).float()
        guesses = (labels + torch.randn(40, generator=generator)).round()
        encoded = encoded_as("regression", labels.tolist())
        found = evaluation.evaluate(Fixed(guesses[:, None]), encoded, encoded.dev, batch_size=7).metrics
        assert found["pearson"] == pytest.approx(stats.pearsonr(guesses, labels).statistic)
        assert found["spearman"] == pytest.approx(stats.spearmanr(guesses, labels).statistic)

    def test_a_constant_has_no_correlation(self):
        encoded = encoded_as("regression", [1.0, 2.0, 3.0])
        found = evaluation.evaluate(Fixed(torch.ones(3, 1)), encoded, encoded.dev).metrics
        assert math.isnan(found["pearson"])
        assert math.isnan(found["spearman"])

    def test_loss_weighs_tokens_not_batches(self):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(3, 6, 11, generator=generator)
        labels = [[-100, -100, 3, 4, 5, 6], [-100, 1, -100, -100, -100, -100], [1, 2, 3, -100, -100, -100]]
        encoded = encoded_as("causal-lm", labels)
        found = evaluation.evaluate(Fixed(logits), encoded, encoded.dev, batch_size=2)
        losses = [
            [-logits[n, t - 1].log_softmax(0)[row[t]] for t in range(1, 6) if row[t] != -100]
            for n, row in enumerate(labels)
        ]
        assert found.outputs[:, 0].tolist() == pytest.approx([float(sum(row)) for row in losses])
        assert found.outputs[:, 1].tolist() == [4, 1, 2]
        assert found.metrics["loss"] == pytest.approx(float(sum(map(sum, losses))) / 7)
        assert found.metrics["perplexity"] == pytest.approx(math.exp(found.metrics["loss"]))


def test_json_is_strict(tmp_path):
    text = strict_json.dumps({"a": float("nan"), "b": [math.inf, 1.5], "c": tmp_path, "d": (1, None)})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5],
        "c": str(tmp_path),
        "d": [1, None],
    }
    assert "\n" not in text


def test_peak_memory_sees_what_was_allocated_since():
    gc.collect()  # what other tests left would be given back in the middle of this one
    measure.reset_peak_memory()
    before = measure.peak_memory()
    if torch.cuda.is_available():
        block = torch.ones(50_000_000, dtype=torch.uint8, device="cuda")
    else:  # pages of its own: an allocator may answer with resident memory that earlier tests freed
        block = torch.frombuffer(mmap.mmap(-1, 50_000_000), dtype=torch.uint8).fill_(1)
    with_block = measure.peak_memory()
    del block
    assert with_block - before > 45_000_000
    measure.reset_peak_memory()
    assert with_block - measure.peak_memory() > 20_000_000
