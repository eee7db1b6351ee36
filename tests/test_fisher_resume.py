"""Going on: scores saved and loaded, joined with those of more data, and a pass that survives being interrupted."""

import contextlib
import dataclasses
import io
import signal
import threading

import models
import pytest
import torch
import torch.nn.functional as F
from models import one_thread  # noqa: F401
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from sparseft.fisher import FisherScores, engine, estimate_fisher, ledger
from sparseft.fisher.resume import fingerprint
from sparseft.selection import select

SAMPLES = 40
PROBE = 1 + 2 + 2 + 2  # samples that it runs: one, two, and each of these beside its copy


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data(seed=1, size=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, 4, generator=generator)
    labels = torch.randint(0, 3, (SAMPLES,), generator=generator)
    return list(zip(x.split(size), labels.split(size), strict=True))


def scores(model, batches, **options):
    return estimate_fisher(model, batches, progress=False, **options)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7 * float(value.max()))
    assert found.report.positions == expected.report.positions
    assert found.report.dropped == expected.report.dropped
    assert found.report.rules == expected.report.rules
    assert str(found.report) == str(expected.report)


def interrupted(batches, after):
    yield from batches[:after]
    raise KeyboardInterrupt


def counted(model):
    """Note the batch sizes the model runs on."""
    calls = []
    model.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    return calls


@pytest.mark.parametrize("name", ["bert", "llama tied"])
def test_scores_survive_saving(name, tmp_path):
    made = scores(models.make(name), [models.batch(name)])
    made.report.dropped = [7, 9]
    made.save(tmp_path / "scores")
    loaded = FisherScores.load(tmp_path / "scores")
    assert dict(loaded).keys() == dict(made).keys()
    assert all(torch.equal(loaded[key], value) for key, value in made.items())
    assert dataclasses.asdict(loaded.report) == dataclasses.asdict(made.report)
    assert [file.name for file in tmp_path.iterdir()] == ["scores"]


def test_positions_with_gaps_survive_saving(tmp_path):
    made = scores(linear(), data())
    for positions in ([], [3], [0, 1, 2, 5, 6, 9]):
        made.report.positions = positions
        made.save(tmp_path / "scores")
        assert FisherScores.load(tmp_path / "scores").report.positions == positions


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("no scores")
    with pytest.raises(ValueError, match="fisher"):
        FisherScores.load(tmp_path / "text")
    with pytest.raises(ValueError, match="fisher"):
        scores(linear(), data(), checkpoint=tmp_path / "text")
    assert (tmp_path / "text").read_text() == "no scores"
    with pytest.raises(ValueError, match="folder"):
        scores(linear(), data(), checkpoint=tmp_path / "none" / "scores")


@pytest.mark.parametrize("mode", ["empirical", "expected", "sampled"])
@pytest.mark.parametrize("first", [1, 3])
def test_more_data_count_as_one_pass(mode, first, tmp_path):
    batches = data()
    batches[2] = (batches[2][0].masked_fill(torch.arange(4)[:, None] == 1, float("nan")), batches[2][1])
    whole = scores(linear(), batches, mode=mode)
    assert whole.report.dropped == [9]
    earlier = scores(linear(), batches[:first], mode=mode, max_dropped=0.5)
    before = {name: value.clone() for name, value in earlier.items()}
    joined = scores(linear(), batches[first:], mode=mode, resume=earlier)
    assert_same(joined, whole)
    assert all(torch.equal(before[name], value) for name, value in earlier.items())
    earlier.save(tmp_path / "earlier")
    assert_same(scores(linear(), batches[first:], mode=mode, resume=tmp_path / "earlier"), whole)
    more = scores(linear(), batches[first:], mode=mode, resume=earlier, samples=3, max_dropped=0.5)
    assert more.report.seen == 4 * first + 3


def own_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mode": "expected"}, "mode was 'empirical', now 'expected'"),
        ({"label_smoothing": 0.1}, r"label_smoothing was 0.0, now 0.1"),
        ({"token_reduction": "sum"}, "token_reduction"),
        ({"loss": own_loss}, "own_loss"),
        ({"names": ["0.weight"]}, r"same parameters .*'0.bias', '2.bias', '2.weight'"),
        ({"model": nn.Linear(4, 3)}, "same parameters"),
        ({"model": "trained"}, "same weights"),
    ],
)
@pytest.mark.parametrize("how", ["resume", "checkpoint"])
def test_scores_of_something_else_are_refused(how, change, match, tmp_path):
    path = tmp_path / "scores"
    scores(linear(), data(), checkpoint=path)
    options = dict(change)
    model = options.pop("model", None) or linear()
    if model == "trained":
        model = linear()
        with torch.no_grad():
            model[2].weight[0, 0] += 1e-6
    calls = counted(model)
    with pytest.raises(ValueError, match=match):
        scores(model, data(), **{how: path}, **options)
    assert not calls


def cast(model, dtype, inside):
    """Run a function of the model under autocast, which an outer or the model's own context switches on."""
    context = torch.autocast("cpu", dtype, enabled=dtype is not None)
    if inside and dtype is not None:
        model.forward = context(model.forward)
    return contextlib.nullcontext() if inside else context


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("how", ["resume", "checkpoint"])
@pytest.mark.parametrize(
    ("before", "now", "match"),
    [
        (None, torch.bfloat16, "autocast was None, now 'bfloat16'"),
        (torch.bfloat16, None, "autocast was 'bfloat16', now None"),
        (torch.bfloat16, torch.float16, "autocast was 'bfloat16', now 'float16'"),
    ],
)
def test_scores_under_another_autocast_are_refused(before, now, match, how, inside, tmp_path):
    path, model = tmp_path / "scores", linear()
    with cast(model, before, inside):
        made = scores(model, data(), samples=8, checkpoint=path)
    assert made.report.settings.get("autocast") == (None if before is None else "bfloat16")
    assert ("autocast in bfloat16" in str(made.report)) == (before is not None)
    file, model = path.read_bytes(), linear()
    calls = counted(model)
    with cast(model, now, inside), pytest.raises(ValueError, match=match) as raised:
        scores(model, data(), **{how: path}, checkpoint_seconds=0)
    # it shows in the first batch
    assert sum(calls) <= PROBE + 4
    assert raised.value.__context__ is None
    assert path.read_bytes() == file


@pytest.mark.parametrize("inside", [True, False])
def test_scores_under_the_same_autocast_are_joined(inside, tmp_path):
    path, model = tmp_path / "scores", linear()
    with cast(model, torch.bfloat16, inside):
        whole = scores(model, data())
        scores(model, data(), samples=8, checkpoint=path)
        # the second time nothing is left to run
        for _ in range(2):
            assert_same(scores(model, data(), checkpoint=path), whole)
            assert FisherScores.load(path).report.settings["autocast"] == "bfloat16"


def test_another_seed_is_refused_where_it_matters():
    drawn = scores(linear(), data(), mode="sampled", seed=1)
    with pytest.raises(ValueError, match="seed was 1, now 2"):
        scores(linear(), data(), mode="sampled", seed=2, resume=drawn)
    given = scores(linear(), data(), seed=1)
    assert scores(linear(), data(), seed=2, resume=given).report.samples == 2 * SAMPLES


def test_another_kind_of_labels_is_refused():
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="same loss"):
        scores(model, [(torch.randn(5, 4), torch.randn(5, 3))], resume=scores(model, data()))


@pytest.mark.parametrize("bad", [None, 2, 17])
@pytest.mark.parametrize("after", [1, 4, 9])
def test_an_interrupted_pass_goes_on_where_it_stopped(after, bad, tmp_path):
    batches = data()
    if bad is not None:
        batches[bad // 4][0][bad % 4] = float("inf")
    options = {"checkpoint": tmp_path / "scores", "checkpoint_seconds": 0, "max_dropped": 0.5}
    whole = scores(linear(), batches, max_dropped=0.5)
    with pytest.raises(KeyboardInterrupt):
        scores(linear(), interrupted(batches, after), **options)
    assert FisherScores.load(tmp_path / "scores").report.seen == 4 * after
    model = linear()
    calls = counted(model)
    assert_same(scores(model, batches, **options), whole)
    assert sum(calls) <= 4 * (10 - after) + 40 * (bad is not None) + PROBE
    # all is there: nothing is left to run
    model = linear()
    calls = counted(model)
    assert_same(scores(model, batches, **options), whole)
    assert not calls


@pytest.fixture(autouse=True)
def ctrl_c():
    """Let SIGINT interrupt, as it does in a terminal: processes that a shell puts into the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Failing(nn.Module):
    """Calls a function in a forward run, or in the backward run that follows it, after so many others."""

    def __init__(self, fail, run, backward):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.fail, self.run, self.backward = fail, run, backward

    def forward(self, x):
        self.run -= 1
        y = self.first(x)
        if self.run == 0 and self.backward:
            # the sums of the last layer have the batch by then, those of the first have not
            y.register_hook(lambda grad: self.fail())
        elif self.run == 0:
            self.fail()
        return self.last(y.tanh())


def failing(fail=None, batch=SAMPLES, backward=False, kind=Failing):
    torch.manual_seed(0)
    # the probe is four runs
    return kind(fail, 4 + batch, backward)


def broken():
    raise RuntimeError("broken")


def interrupt():
    signal.raise_signal(signal.SIGINT)


def twice():
    interrupt()
    interrupt()


# what ends the pass in batch 4 (or before it), and how many samples are in the file afterwards: where batches go to
# the sums directly, and where they go through a copy, which a part of a batch does not leave
@pytest.mark.parametrize(
    ("fail", "backward", "error", "kept", "kept_by_copy"),
    [
        (None, False, KeyboardInterrupt, 12, 12),
        (broken, False, RuntimeError, 12, 12),
        (broken, True, RuntimeError, 0, 12),
        # the batch is finished
        (interrupt, False, KeyboardInterrupt, 16, 16),
        (interrupt, True, KeyboardInterrupt, 16, 16),
        # a second one is not waited for
        (twice, False, KeyboardInterrupt, 12, 12),
        (twice, True, KeyboardInterrupt, 0, 12),
    ],
)
@pytest.mark.parametrize("earlier", [0, 6])
@pytest.mark.parametrize("copied", [False, True])
def test_whole_batches_are_saved_before_an_error_goes_on(
    fail, backward, error, kept, kept_by_copy, earlier, copied, tmp_path, monkeypatch
):
    monkeypatch.setattr(ledger, "nbytes", lambda batch: 10**6 if copied else 0)
    kept = kept_by_copy if copied else kept
    options = {"checkpoint": tmp_path / "scores"}
    whole = scores(failing(), data())
    if earlier:
        scores(failing(), data(), samples=earlier, **options)
    # one batch is skipped of those that were there, and one is cut
    model = failing(fail, batch=4 - earlier // 4, backward=backward)
    batches = interrupted(data(), 3) if fail is None else data()
    with pytest.raises(error):
        scores(model, batches, **options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    kept = kept or earlier
    assert (tmp_path / "scores").exists() == bool(kept)
    if kept:
        assert FisherScores.load(tmp_path / "scores").report.seen == kept
    model = failing()
    calls = counted(model)
    assert_same(scores(model, data(), **options), whole)
    assert sum(calls) == SAMPLES - kept + PROBE


class Steep(Failing):
    """Has finite losses of large inputs, and gradients whose squares are not finite."""

    def forward(self, x):
        return super().forward(x) * torch.where(x.gt(9).any(1, keepdim=True), 1e20, 1.0)


@pytest.mark.parametrize(("batch", "error"), [(SAMPLES, KeyboardInterrupt), (8 + 4, RuntimeError)])
def test_where_sums_are_not_finite_nothing_is_saved(batch, error, tmp_path, monkeypatch):
    """Before that is found out, and while batches are run again because of it: the sums begin anew then."""
    monkeypatch.setattr(ledger, "nbytes", lambda batch: 0)
    batches = data()
    batches[1][0][0] = 10
    model = failing(broken, batch, kind=Steep)
    with pytest.raises(error):
        scores(model, interrupted(batches, 3) if error is KeyboardInterrupt else batches, checkpoint=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    # eight batches are kept until then, and run through a copy: that of the bad sample, sample by sample
    model = failing(kind=Steep)
    calls = counted(model)
    assert scores(model, batches, checkpoint=tmp_path / "a", max_dropped=0.5).report.dropped == [4]
    assert calls == [1, 2, 2, 2, *[4] * 8, 4, 4, 1, 1, 1, 1, *[4] * 6, 4, 4]


@pytest.mark.parametrize("seconds", [0, 300])
def test_an_interruption_while_samples_are_skipped_leaves_the_checkpoint_alone(seconds, tmp_path):
    options = {"checkpoint": tmp_path / "scores", "checkpoint_seconds": seconds}
    scores(linear(), data(), samples=10, **options)
    before = (tmp_path / "scores").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        scores(linear(), interrupted(data(), 1), **options)
    assert (tmp_path / "scores").read_bytes() == before


def test_an_interruption_of_the_last_save_waits_for_it(tmp_path, monkeypatch):
    save = FisherScores.save

    def interrupting(self, path):
        interrupt()
        save(self, path)

    monkeypatch.setattr(FisherScores, "save", interrupting)
    with pytest.raises(KeyboardInterrupt):
        scores(linear(), data(), checkpoint=tmp_path / "scores")
    assert FisherScores.load(tmp_path / "scores").report.seen == SAMPLES


def test_handlers_of_others_are_called_and_put_back(tmp_path):
    called = []

    def handler(number, frame):
        called.append(number)

    signal.signal(signal.SIGINT, handler)
    try:
        # it does not end the pass
        model = failing(interrupt, 4, backward=True)
        assert_same(scores(model, data(), checkpoint=tmp_path / "scores"), scores(failing(), data()))
        assert called == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        scores(failing(interrupt, 4), data(), checkpoint=tmp_path / "other")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_without_a_checkpoint_an_interruption_is_not_held_back():
    model = failing(interrupt, 4)
    calls = counted(model)
    with pytest.raises(KeyboardInterrupt):
        scores(model, data())
    assert calls == [1, 2, 2, 2, 4, 4, 4]


def test_other_threads_have_no_signals(tmp_path):
    made = []
    thread = threading.Thread(target=lambda: made.append(scores(linear(), data(), checkpoint=tmp_path / "scores")))
    thread.start()
    thread.join()
    assert_same(made[0], scores(linear(), data()))


def test_a_checkpoint_may_be_continued_with_other_batches_and_more_samples(tmp_path):
    options = {"checkpoint": tmp_path / "scores"}
    scores(linear(), data(), samples=10, **options)
    assert_same(scores(linear(), data(size=7), samples=25, **options), scores(linear(), data(), samples=25))
    with pytest.raises(ValueError, match="holds 25 samples, but only 20"):
        scores(linear(), data(), samples=20, **options)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    path = tmp_path / "scores"
    scores(linear(), data(), samples=12, checkpoint=path)
    before = path.read_bytes()
    shuffled = [data()[i] for i in (1, 0, 2, 3)]
    for other in (data(seed=2), shuffled):
        model = linear()
        calls = counted(model)
        with pytest.raises(ValueError, match="begin with the 12 samples"):
            scores(model, other, checkpoint=path)
        assert not calls
    assert path.read_bytes() == before


def test_a_checkpoint_is_kept_even_if_too_many_samples_were_dropped(tmp_path):
    batches = data()
    batches[0][0][:] = float("nan")
    with pytest.raises(ValueError, match="got 4 of 40"):
        scores(linear(), batches, checkpoint=tmp_path / "scores")
    model = linear()
    calls = counted(model)
    assert scores(model, batches, checkpoint=tmp_path / "scores", max_dropped=0.1).report.samples == 36
    assert not calls


def test_checkpoints_are_written_as_often_as_asked(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(FisherScores, "save", lambda self, path: saved.append(self.report.seen))
    scores(linear(), data(), checkpoint=tmp_path / "scores", checkpoint_seconds=0)
    assert saved == [*range(4, 41, 4), 40]
    saved.clear()
    scores(linear(), data(), checkpoint=tmp_path / "scores")
    assert saved == [40]


def test_the_bar_counts_samples_from_where_the_pass_goes_on(tmp_path, monkeypatch):
    bars = []

    class Bar(tqdm):
        def __init__(self, **options):
            super().__init__(**options, file=io.StringIO())
            bars.append((self, options))

    monkeypatch.setattr(engine, "tqdm", Bar)
    x, labels = (torch.cat(parts) for parts in zip(*data(), strict=True))
    loader = DataLoader(TensorDataset(x, labels), batch_size=3)
    for samples, start, end in [(9, 0, 9), (100, 9, 40)]:
        estimate_fisher(linear(), loader, samples=samples, checkpoint=tmp_path / "scores")
        bar, options = bars.pop()
        assert (options["initial"], bar.n, bar.total) == (start, end, end)
        assert (options["unit"], options["delay"], options["disable"]) == (" samples", 2, False)
    estimate_fisher(linear(), loader, progress=False)
    assert bars.pop()[1]["disable"]


def test_selection_goes_on_from_a_checkpoint(tmp_path):
    options = {"label_smoothing": 0.2, "checkpoint": str(tmp_path / "scores")}
    first = select("fish", linear(), data(), k=9, progress=False, **options)
    assert FisherScores.load(tmp_path / "scores").report.settings["label_smoothing"] == 0.2
    model = linear()
    calls = counted(model)
    assert select("fish", model, data(), k=9, progress=False, **options) == first
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fingerprint_sees_every_weight_and_buffer(dtype):
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).to(dtype)
    first = fingerprint(model)
    assert fingerprint(model) == first
    held = [*model.parameters(), *(b for b in model.buffers())]
    for tensor in held:
        with torch.no_grad():
            kept = tensor.clone()
            tensor.view(-1)[-1] += 1
            assert fingerprint(model) != first
            tensor.copy_(kept)
    assert fingerprint(model) == first
    assert fingerprint(model.double()) != first
