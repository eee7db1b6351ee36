"""DPS against a loop over dense tensors with explicit masks; what it freezes, keeps, and resumes."""

import copy
import io
import math

import pytest
import torch
from resuming import assert_resumes
from torch import nn

import sparseft
from sparseft.index_lists import positions
from sparseft.schedules import DPS, DPSMix

STAGES = (3, 4)
LR, DECAY, BETAS, EPS = 1e-2, 0.1, (0.9, 0.999), 1e-8


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.norm = nn.LayerNorm(12)
        self.inner = nn.Linear(12, 30)
        self.head = nn.Linear(30, 4)

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.norm(self.embed(ids))))).mean(1)


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    ids, y = torch.randint(0, 17, (8, 5), generator=generator), torch.randint(0, 4, (8,), generator=generator)
    nn.functional.cross_entropy(model(ids).float(), y).backward()


def adamw(model, **options):
    return sparseft.SparseAdamW(model.parameters(), lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS, **options)


def run(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(one, other):
    for name, weight in one.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)), name


def plain_adamw(weight, grad, state, active, count):
    """One AdamW step of the active entries, as its paper has it; the others' moments wait."""
    mean, square = state
    mean[active] = BETAS[0] * mean[active] + (1 - BETAS[0]) * grad[active]
    square[active] = BETAS[1] * square[active] + (1 - BETAS[1]) * grad[active] ** 2
    step = mean / (1 - BETAS[0] ** count) / ((square / (1 - BETAS[1] ** count)).sqrt() + EPS)
    weight[active] -= LR * DECAY * weight[active] + LR * step[active]


def plain_sgd(weight, grad, state, active, count):
    (buffer,) = state
    total = grad + DECAY * weight
    buffer[active] = total[active] if count == 1 else 0.9 * buffer[active] + total[active]
    weight[active] -= LR * buffer[active]


def largest(scores, density, scope):
    """Exactly k a tensor, or of all; the first of equal ones."""
    if scope == "tensor":
        return {name: largest({name: score}, density, "global")[name] for name, score in scores.items()}
    every = torch.cat([score.flatten() for score in scores.values()])
    order = every.argsort(descending=True, stable=True)[: max(1, math.floor(density * every.numel()))]
    chosen = torch.zeros(every.numel(), dtype=torch.bool).scatter(0, order, True)
    parts = chosen.split([score.numel() for score in scores.values()])
    return {name: part.view_as(score) for part, (name, score) in zip(parts, scores.items(), strict=True)}


def oracle(model, selectable, density, scope, steps, kept, update):
    """DPS Dense over dense tensors: every weight, moment and mask at full size. Yields weights after each step."""
    parameters = dict(model.named_parameters())
    moments = {name: [torch.zeros_like(p.detach()) for _ in range(kept)] for name, p in parameters.items()}
    counts = dict.fromkeys(parameters, 0)
    everything = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    scores, chosen = {name: torch.zeros_like(parameters[name].detach()) for name in selectable}, {}
    for step in range(steps):
        place = step % sum(STAGES)
        backward(model, step)
        active = {**everything, **(chosen if place >= STAGES[0] else {})}
        for name, parameter in parameters.items():
            if place < STAGES[0] and name in selectable:
                scores[name] += parameter.grad**2
            # a parameter's steps count where any of its entries trains
            counts[name] += int(active[name].any())
            update(parameter.data, parameter.grad, moments[name], active[name], counts[name])
            parameter.grad = None
        if place == STAGES[0] - 1:
            chosen = largest(scores, density, scope)
            scores = {name: torch.zeros_like(score) for name, score in scores.items()}
        yield weights(model), chosen


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_three_cycles_are_those_of_a_loop_over_dense_tensors(name, scope):
    model = net()
    if name == "adamw":
        optimizer = adamw(model)
    else:
        optimizer = sparseft.SparseSGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY)
    schedule = DPS(model, optimizer, 0.25, stage_steps=STAGES, dense="head.*", include="*.weight", scope=scope)
    selectable = ["embed.weight", "norm.weight", "inner.weight"]
    update, kept = (plain_adamw, 2) if name == "adamw" else (plain_sgd, 1)
    steps = 3 * sum(STAGES)
    compared = 0
    for step, (expected, chosen) in enumerate(oracle(net(), selectable, 0.25, scope, steps, kept, update)):
        stage = schedule.stage
        assert stage == (1 if step % sum(STAGES) < STAGES[0] else 2)
        run(model, optimizer, [step])
        for key, weight in weights(model).items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-4, atol=2e-6, msg=f"{key} at step {step}")
        if schedule.stage == 2:
            for key in selectable:
                entries = chosen[key].flatten().nonzero().flatten().int()
                assert torch.equal(schedule.mask[key] if key in schedule.mask else entries[:0], entries)
                compared += 1
    assert compared == 3 * 3 * STAGES[1]
    assert schedule.stage == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stage_two_freezes_what_it_did_not_choose(dtype):
    model = net(dtype)
    optimizer = adamw(model)
    schedule = DPS(model, optimizer, 0.25, stage_steps=STAGES)
    assert list(schedule.mask) == ["inner.weight", "head.weight"]
    run(model, optimizer, range(STAGES[0]))
    before, chosen = weights(model), schedule.mask
    run(model, optimizer, range(10, 10 + STAGES[1]))
    for name, weight in weights(model).items():
        moved = (weight != before[name]).view(-1)
        if name in chosen:
            assert chosen[name].numel() == weight.numel() // 4
            assert not moved[~torch.isin(torch.arange(weight.numel()), chosen[name])].any()
            assert moved.sum() > (chosen[name].numel() * 0.9 if dtype == torch.float32 else 0)
        else:
            assert moved.any(), name
    run(model, optimizer, [20])
    assert ((weights(model)["inner.weight"] != before["inner.weight"]).sum()) > before["inner.weight"].numel() * 0.4


def spread(parameter, where, values):
    """Return values by the position of their entries in a parameter, NaN at the others."""
    return torch.full((parameter.numel(),), float("nan")).index_put((where.long(),), values.float())


def left_out(schedule, model):
    return {
        (name, key): spread(model.get_parameter(name), where, values)
        for name, (where, state) in schedule._left_out.items()
        for key, values in state.items()
        if key != "step"
    }


def states(optimizer, model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        (names[parameter], key): spread(parameter, positions(index, parameter.numel()), values)
        for group in optimizer.param_groups
        for parameter, index in zip(group["params"], group["indices"], strict=True)
        for key, values in optimizer.state[parameter].items()
        if key != "step"
    }


def test_states_of_what_was_left_out_come_back_as_they_were():
    model = net(torch.bfloat16)
    optimizer = adamw(model, decay_to="pretrained")
    schedule = DPS(model, optimizer, 0.3, stage_steps=STAGES, scope="global", include=["inner.weight", "norm.bias"])
    for cycle in range(2):
        first = cycle * sum(STAGES)
        run(model, optimizer, range(first, first + STAGES[0]))
        before, chosen = left_out(schedule, model), schedule.mask
        assert {key for _, key in before} == {"exp_avg", "exp_avg_sq", "master", "pretrained"}
        run(model, optimizer, range(first + STAGES[0], first + sum(STAGES)))
        after, kept = states(optimizer, model), 0
        for key, values in before.items():
            out = ~values.isnan()
            assert torch.equal(after[key][out], values[out]), key
            assert not after[key].isnan().any()
            kept += int(out.sum()) if key[1] == "exp_avg" else 0
        assert kept == schedule.mask.n - chosen.k
    # what decay pulls to is what was there at the beginning, whatever was selected in between
    first = net(torch.bfloat16).inner.weight.detach().flatten().float()
    assert torch.equal(states(optimizer, model)["inner.weight", "pretrained"], first)


RESUMED = {
    "fp32": (torch.float32, {}),
    "bf16 with masters": (torch.bfloat16, {}),
    "decay to the pretrained": (torch.float32, {"decay_to": "pretrained"}),
    "states in 8 bits": (torch.float32, {"state_bits": 8}),
}


@pytest.mark.parametrize("until", [2, 3, 5, 7, 9])
@pytest.mark.parametrize(("dtype", "options"), RESUMED.values(), ids=RESUMED)
def test_a_run_resumes_bit_for_bit_in_either_stage(until, dtype, options):
    def make():
        model = net(dtype)
        optimizer = adamw(model, **options)
        return model, optimizer, DPS(model, optimizer, 0.02, stage_steps=STAGES, scope="global", include="*.weight")

    assert_resumes(make, run, until, 9)


def test_accumulated_gradients_are_squared_once_a_step():
    model, other = net(), net()
    optimizer, plain = adamw(model), adamw(other)
    schedules = [DPS(model, optimizer, stage_steps=STAGES), DPS(other, plain, stage_steps=STAGES)]
    for step in range(2):
        for part in range(2):
            backward(model, 10 * step + part)
            backward(other, 10 * step + part)
        model(torch.zeros(1, 2, dtype=torch.int64))
        optimizer.step()
        total = {name: parameter.grad.clone() for name, parameter in other.named_parameters()}
        plain.step()
        if step == 0:
            for name, score in schedules[0]._scores.items():
                torch.testing.assert_close(score, total[name] ** 2)
        optimizer.zero_grad()
        plain.zero_grad()
    assert schedules[0].steps == 2
    assert_same(model, other)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_bad_gradient_in_stage_one_is_left_out_of_weights_and_scores(bad):
    model, other = net(), net()
    optimizer, plain = adamw(model), adamw(other)
    schedule, its = DPS(model, optimizer, stage_steps=STAGES), DPS(other, plain, stage_steps=STAGES)
    run(model, optimizer, [0])
    backward(model, 1)
    model.norm.bias.grad[3] = bad
    optimizer.step()
    optimizer.zero_grad()
    run(model, optimizer, [2, 3])
    run(other, plain, [0, 2, 3])
    assert (schedule.steps, schedule.skipped, schedule.stage) == (3, 1, 2)
    assert schedule.mask == its.mask
    assert schedule.mask.k == 252 + 84
    assert_same(model, other)


def test_scores_are_of_gradients_without_gradscalers_scale():
    model, other = net(), net()
    optimizer, plain = adamw(model), adamw(other)
    schedule, its = DPS(model, optimizer, stage_steps=STAGES), DPS(other, plain, stage_steps=STAGES)
    optimizer.found_inf, steps = torch.zeros(()), [0, 1]
    for step in steps:
        backward(model, step)
        # a power of two, another one each step
        optimizer.grad_scale = torch.tensor(2.0 ** (10 + step))
        for parameter in model.parameters():
            parameter.grad *= optimizer.grad_scale
        optimizer.step()
        optimizer.zero_grad()
    backward(model, 7)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert float(optimizer.found_inf) == 1
    run(other, plain, steps)
    assert (schedule.steps, schedule.skipped) == (2, 1)
    assert_same(model, other)
    for name, score in schedule._scores.items():
        assert torch.equal(score, its._scores[name])


def test_scores_take_one_number_an_entry_in_stage_one_and_none_in_stage_two():
    model = net()
    optimizer = adamw(model)
    schedule = DPS(model, optimizer, stage_steps=STAGES)
    assert {name: (score.dtype, score.numel()) for name, score in schedule._scores.items()} == {
        "inner.weight": (torch.float32, 360),
        "head.weight": (torch.float32, 120),
    }
    run(model, optimizer, range(STAGES[0]))
    assert schedule._scores == {}
    held = sum(left.numel() for left, _ in schedule._left_out.values())
    assert held + schedule.mask.k == schedule.mask.n
    run(model, optimizer, range(STAGES[1]))
    assert schedule._left_out == {}


def test_embeddings_that_are_heads_too_are_not_chosen_from():
    model = net()
    model.tied = nn.Linear(12, 17, bias=False)
    model.tied.weight = model.embed.weight
    schedule = DPS(model, sparseft.SparseSGD(model.parameters(), lr=LR), stage_steps=1)
    assert list(schedule.mask) == ["inner.weight", "head.weight"]
    assert "embed.weight" in schedule.mask.dense


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either stage_steps or total_steps, got None and None"),
        ({"stage_steps": 2, "total_steps": 9}, "give either stage_steps or total_steps, got 2 and 9"),
        ({"stage_steps": 0}, "each stage must have at least one step, got 0 and 0"),
        ({"stage_steps": (3, 0)}, "each stage must have at least one step, got 3 and 0"),
        ({"total_steps": -1}, "for a run counted in epochs give its number of optimizer steps"),
        ({"total_steps": 19}, r"got 0.05 of 19; .* for a short one a larger update_ratio"),
        ({"total_steps": 20, "update_ratio": 0.6}, "so that a run of total_steps has both stages, got 0.6"),
        ({"stage_steps": (3, 2, 1)}, r"one for each of the two stages, got \(3, 2, 1\)"),
        ({"stage_steps": 2, "density": 0.0}, r"density must lie in \(0, 1\]"),
        ({"stage_steps": 2, "scope": "neuron"}, "scope must be one of global, .*, got 'neuron'"),
        ({"stage_steps": 2, "dense": "*weight"}, "there is nothing to choose from"),
        ({"stage_steps": 2, "include": "classifier*"}, r"include pattern 'classifier\*' matches no parameter"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        DPS(model, adamw(model), **options)


def test_none_is_no_pattern():
    model = net()
    schedule = DPS(model, adamw(model), stage_steps=2, dense=None)
    schedule.close()
    assert schedule.mask == DPS(model, adamw(model), stage_steps=2).mask


@pytest.mark.parametrize(("option", "value"), [("stage_steps", 2.5), ("stage_steps", (2, 1.0)), ("total_steps", 1e3)])
def test_steps_are_whole_numbers(option, value):
    model = net()
    with pytest.raises(TypeError, match=f"{option} must be a whole number, got"):
        DPS(model, adamw(model), **{option: value})


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", [DPS, DPSMix])
def test_a_state_that_chooses_from_other_parameters_is_refused(kind, steps):
    model = net()
    optimizer = adamw(model)
    saved = kind(model, optimizer, stage_steps=2, include="inner.weight")
    run(model, optimizer, range(steps))
    other = net()
    schedule = kind(other, adamw(other), stage_steps=2)
    mask = schedule.mask
    with pytest.raises(ValueError, match=r"chooses from 1 \(inner.weight\) and .* in place of 2 \(inner.weight, "):
        schedule.load_state_dict(saved.state_dict())
    assert (schedule.steps, schedule.mask) == (0, mask)


def test_an_optimizer_of_a_mask_or_of_another_model_is_refused():
    model = net()
    mask = sparseft.select("random", model, density=0.1)
    with pytest.raises(
        ValueError, match=r"must train what the schedule begins with, .* other entries of inner.weight"
    ):
        DPS(model, sparseft.SparseAdamW(mask.param_groups(model)), stage_steps=2)
    few = {"params": [model.inner.weight, model.inner.bias], "indices": [torch.arange(360), torch.arange(9)]}
    with pytest.raises(ValueError, match=r"got other entries of inner.bias"):
        DPS(model, sparseft.SparseAdamW([few]), stage_steps=2)
    with pytest.raises(ValueError, match="the optimizer trains no parameter of the model"):
        DPS(model, adamw(net()), stage_steps=2)


def test_total_steps_are_those_of_the_paper():
    model = net()
    assert DPS(model, adamw(model), total_steps=690).stage_steps == (34, 34)


def trainer(folder, schedule, stage_steps, epochs, **arguments):
    """A Trainer of a small encoder with accumulation and checkpointing, and the schedule of its optimizer."""
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(
        tf.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=61)
    )
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(0, 61, (9,), generator=generator), "labels": torch.tensor(i % 2)}
        for i in range(28)
    ]
    optimizer = sparseft.SparseAdamW(model.parameters(), lr=1e-3)
    its = schedule(model, optimizer, 0.5, stage_steps=stage_steps, dense="classifier.*")
    options = tf.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=epochs,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    model.gradient_checkpointing_enable()
    return tf.Trainer(model, options, train_dataset=rows, optimizers=(optimizer, None)), its


@pytest.mark.parametrize("schedule", [DPS, DPSMix])
def test_a_trainer_with_accumulation_and_checkpointing_takes_its_own_steps(tmp_path, schedule):
    runs, its = trainer(tmp_path, schedule, 3, 1, save_strategy="no")
    assert "bert.pooler.dense.weight" in its.mask
    runs.train()
    assert its.steps == runs.state.global_step == 4
    assert (its.stage, its.mask.k) == (2, its.mask.n // 2)


@pytest.mark.parametrize("until", [3, 5])
@pytest.mark.parametrize("schedule", [DPS, DPSMix])
def test_a_trainer_resumes_bit_for_bit(tmp_path, schedule, until):
    """From its own checkpoint, of a step in stage two or in the next stage one, and the state of the schedule."""
    tf, saved = pytest.importorskip("transformers"), {}
    runs, its = trainer(tmp_path, schedule, 2, 2, save_strategy="steps", save_steps=until)

    class Keep(tf.TrainerCallback):
        def on_save(self, arguments, state, control, **rest):
            torch.save(its.state_dict(), saved.setdefault(state.global_step, io.BytesIO()))

    runs.add_callback(Keep())
    runs.train()
    again, other = trainer(tmp_path, schedule, 2, 2, save_strategy="no")
    saved[until].seek(0)
    other.load_state_dict(torch.load(saved[until]))
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{until}"))
    assert other.steps == its.steps == 8
    for name, weight in runs.model.named_parameters():
        assert torch.equal(weight, again.model.get_parameter(name)), name


def test_what_is_no_number_no_model_or_compact_is_named():
    model = net()
    optimizer = adamw(model)
    with pytest.raises(TypeError, match="update_ratio must be a number, got 'a'"):
        DPS(model, optimizer, total_steps=100, update_ratio="a")
    with pytest.raises(TypeError, match=r"density must be a number in \(0, 1\], got None"):
        DPS(model, optimizer, None, stage_steps=2)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got SparseAdamW"):
        DPS(optimizer, model, stage_steps=2)
    mask = sparseft.select("magnitude", model, density=0.1)
    with sparseft.compact_gradients(model, mask), pytest.raises(RuntimeError, match="leave compact_gradients first"):
        DPS(model, sparseft.SparseAdamW(mask.param_groups(model)), stage_steps=2)
    with pytest.raises(TypeError, match="the probability of pretrained weights must be a number, got 'a'"):
        DPSMix(model, optimizer, stage_steps=2, mix="a")
    DPS(model, optimizer, stage_steps=2)


class WithAnEmptyParameter(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.empty = nn.Parameter(torch.empty(0, 3))

    def forward(self, x):
        return self.second(self.first(x).tanh()) + self.empty.sum()


def test_a_run_goes_back_to_a_state_of_stage_two_that_trains_nothing_of_a_parameter():
    model = WithAnEmptyParameter()
    optimizer = sparseft.SparseAdamW(model.parameters(), lr=1e-2)
    schedule = DPS(model, optimizer, 0.01, stage_steps=(2, 3), include="*", scope="global")

    def step(seed):
        optimizer.zero_grad()
        model(torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()

    for seed in range(3):
        step(seed)
    assert schedule.stage == 2
    assert len(schedule.mask) < 4
    saved = copy.deepcopy([part.state_dict() for part in (model, schedule, optimizer)])
    ends = []
    for _ in range(2):
        for part, state in zip((model, schedule, optimizer), copy.deepcopy(saved), strict=True):
            part.load_state_dict(state)
        for seed in range(3, 9):
            step(seed)
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_state_of_stage_one_has_no_scores_of_an_empty_parameter():
    model = WithAnEmptyParameter()
    schedule = DPS(model, sparseft.SparseAdamW(model.parameters(), lr=1e-2), 0.5, stage_steps=2, include="*")
    schedule.load_state_dict(schedule.state_dict())
    assert schedule.stage == 1
