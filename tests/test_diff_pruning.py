"""Diff pruning against autograd over dense tensors, written from its paper's formulas; gates against integration."""

import math

import pytest
import torch
from resuming import assert_resumes
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import sparseft
from sparseft.schedules import DiffPruning
from sparseft.schedules.draws import generator_at
from sparseft.schedules.gates import Gates, HardConcrete
from sparseft.testing import devices

STEPS, LR, GATE_LR, PENALTY = 5, 1e-2, 0.1, 1e-4


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 30), nn.LayerNorm(30), nn.Tanh(), nn.Linear(30, 4)).to(dtype)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 16, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def loss(model, step):
    x, y = batch(step)
    weight = next(model.parameters())
    return nn.functional.cross_entropy(model(x.to(weight)).float(), y.to(weight.device))


def run(model, optimizer, steps):
    for step in steps:
        loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def start(model, density=0.1, steps=STEPS, **options):
    optimizer = sparseft.SparseAdamW(model.parameters(), lr=LR, weight_decay=0.0)
    options = {"penalty": PENALTY, "log_alpha": 0.5, **options}
    return optimizer, DiffPruning(model, optimizer, density, steps, **options)


def make(dtype=torch.float32, **options):
    model = net(dtype)
    return model, *start(model, **options)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one, other):
    for name, weight in one.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)), name


def hard_concrete(u, log_alpha, low, high):
    """The paper's gate, differentiable."""
    s = torch.sigmoid(u.log() - (1 - u).log() + log_alpha)
    return (s * (high - low) + low).clamp(min=0).clamp(max=1)


@pytest.mark.parametrize(("low", "high"), [(-1.5, 1.5), (-0.1, 1.1), (-0.3, 2.0)])
@pytest.mark.parametrize("log_alpha", [-4.0, -0.7, 0.0, 2.5, 6.0])
def test_gates_and_their_expected_number_are_those_of_an_integral(low, high, log_alpha):
    concrete = HardConcrete(low, high)
    points = 2_000_000
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    alpha = torch.full_like(u, log_alpha).requires_grad_()
    expected = hard_concrete(u, alpha, low, high)
    gates = concrete.gate(alpha.detach(), u)
    torch.testing.assert_close(gates, expected.detach(), rtol=0, atol=1e-12)
    (slopes,) = torch.autograd.grad(expected.sum(), alpha)
    inside = (gates > 1e-9) & (gates < 1 - 1e-9)
    torch.testing.assert_close(concrete.slope(gates)[inside], slopes[inside])
    assert not concrete.slope(gates)[(gates == 0) | (gates == 1)].any()
    opened = float((expected > 0).double().mean())
    one = torch.tensor(log_alpha, dtype=torch.float64)
    assert float(concrete.probability(one)) == pytest.approx(opened, abs=2 / points)
    # the median
    assert float(concrete.settled(one)) == pytest.approx(float(expected.detach().median()), abs=1e-5)


@pytest.mark.parametrize("structured", [False, True])
def test_the_expected_number_of_entries_is_the_mean_over_draws(structured):
    parameters = {"a": torch.zeros(40, 50), "b": torch.zeros(30)}
    gates = Gates(parameters, HardConcrete(), log_alpha=0.0, structured=structured, penalty=0.0, lr=0.1, seed=5)
    for place, log_alphas in enumerate((*gates.entries.values(), *gates.tensors.values())):
        log_alphas.add_(torch.randn(log_alphas.shape, generator=torch.Generator().manual_seed(place)))
    draws = 3000
    counts = torch.tensor(
        [sum(int((gates.drawn(name, step).product() != 0).sum()) for name in parameters) for step in range(draws)]
    ).double()
    assert gates.expected() == pytest.approx(float(counts.mean()), abs=4 * float(counts.std()) / math.sqrt(draws))


def test_draws_differ_by_step_and_tensor_and_gates_open_as_often_as_they_should():
    parameters = {"a": torch.zeros(200, 100), "b": torch.zeros(200, 100)}
    gates = Gates(parameters, HardConcrete(), log_alpha=1.0, structured=True, penalty=0.0, lr=0.1, seed=0)
    opened = [gates.drawn(name, step).entries > 0 for name in parameters for step in range(3)]
    share = 1 / (1 + math.exp(-1.0))
    for i, one in enumerate(opened):
        assert abs(float(one.float().mean()) - share) < 4 * math.sqrt(share * (1 - share) / 20_000)
        for other in opened[:i]:
            both = float((one & other).float().mean())
            assert abs(both - share**2) < 4 * math.sqrt(share**2 * (1 - share**2) / 20_000)


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("stretch", [(-1.5, 1.5), (-0.2, 1.1)])
@pytest.mark.parametrize("device", devices())
def test_phase_one_is_autograd_through_the_papers_formulas(structured, stretch, device):
    model, other = net().to(device), net().to(device)
    low, high = stretch
    optimizer, schedule = start(model, steps=9, structured=structured, stretch=stretch, dense="3.*", seed=7)
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    first = weights(other)
    delta = {name: torch.zeros_like(p).requires_grad_() for name, p in first.items()}
    alpha = {name: torch.full_like(first[name], 0.5).requires_grad_() for name in names}
    whole = {name: torch.tensor(0.5, device=device).requires_grad_() for name in names}
    plain = torch.optim.Adam(delta.values(), lr=LR)
    of_gates = torch.optim.Adam([*alpha.values(), *whole.values()], lr=GATE_LR)
    shift = math.log(-low / high)
    for step in range(6):
        used, penalty = {}, 0.0
        for i, name in enumerate(names):
            u, its_u = (
                torch.rand(shape, generator=generator_at(7, step, place, first[name].device), device=device)
                for place, shape in ((2 * i, first[name].shape), (2 * i + 1, ()))
            )
            z, p = hard_concrete(u, alpha[name], low, high), torch.sigmoid(alpha[name] - shift)
            if structured:
                z = z * hard_concrete(its_u, whole[name], low, high)
                p = p * torch.sigmoid(whole[name] - shift)
            used[name] = first[name] + z * delta[name]
            penalty = penalty + PENALTY * p.sum()
        used |= {name: first[name] + delta[name] for name in first if name not in names}
        x, y = (t.to(device) for t in batch(step))
        (nn.functional.cross_entropy(functional_call(other, used, (x,)), y) + penalty).backward()
        for each in (plain, of_gates):
            each.step()
            each.zero_grad()
        run(model, optimizer, [step])
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight.detach(), (first[name] + delta[name]).detach(), rtol=1e-4, atol=2e-5)
        for name in names:
            torch.testing.assert_close(schedule._gates.entries[name], alpha[name].detach(), rtol=1e-3, atol=2e-3)
            if structured:
                torch.testing.assert_close(schedule._gates.tensors[name], whole[name].detach(), rtol=1e-3, atol=2e-3)
    moved = torch.cat([(alpha[name].detach() - 0.5).flatten() for name in names])
    assert (moved.abs() > 0.05).float().mean() > 0.9
    with torch.no_grad():
        wholes = {name: torch.sigmoid(whole[name] - shift) if structured else 1 for name in names}
        total = sum(float((torch.sigmoid(alpha[name] - shift) * wholes[name]).sum()) for name in names)
    assert schedule.expected_entries == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("structured", [False, True])
def test_exactly_k_of_the_largest_gated_differences_stay_and_the_rest_is_pretrained(dtype, structured):
    model, optimizer, schedule = make(dtype, density=0.13, structured=structured, dense="3.bias")
    first = weights(model)
    run(model, optimizer, range(STEPS - 1))
    assert not schedule.chosen
    seen = {}
    step = schedule._gates.step

    def watched():
        step()
        for name in first:
            if name != "3.bias":
                entries = hard_concrete(torch.tensor(0.5), schedule._gates.entries[name], -1.5, 1.5)
                tensor = (
                    hard_concrete(torch.tensor(0.5), schedule._gates.tensors[name], -1.5, 1.5) if structured else 1
                )
                seen[name] = (model.get_parameter(name).detach().float().clone(), entries * tensor)

    schedule._gates.step = watched
    run(model, optimizer, [STEPS - 1])
    assert schedule.chosen
    assert not optimizer.state
    n = sum(weight.numel() for name, weight in first.items() if name != "3.bias")
    assert schedule.mask.k == math.floor(0.13 * n)
    smallest, largest_left = math.inf, 0.0
    for name, (weight, gate) in seen.items():
        now, base = model.get_parameter(name).detach().flatten(), first[name].flatten()
        kept = torch.zeros(now.numel(), dtype=torch.bool)
        if name in schedule.mask:
            kept[schedule.mask[name].long()] = True
        assert torch.equal(now[~kept], base[~kept]), name
        difference = (gate * (weight - first[name].float())).flatten()
        # of the gate and of the sum
        allowed = torch.finfo(dtype).eps * (base.float().abs() + 2 * difference.abs()) + 1e-9
        assert ((now.float() - base.float() - difference).abs() <= allowed)[kept].all(), name
        smallest = min(smallest, float((now[kept] - base[kept]).float().abs().min())) if kept.any() else smallest
        largest_left = max(largest_left, float(difference[~kept].abs().max()))
    if dtype == torch.float32:
        assert smallest >= largest_left - 1e-6


def test_ties_go_to_the_first_entries():
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(2, 3))
    model.forward = lambda: (model.a.sum() + model.b.sum()) * 1.0
    optimizer = sparseft.SparseSGD(model.parameters(), lr=0.5)
    # at log-alpha 50 every gate is 1
    schedule = DiffPruning(model, optimizer, 9.5 / 13, 1, log_alpha=50.0)
    model().backward()
    optimizer.step()
    assert {name: index.tolist() for name, index in schedule.mask.items()} == {"a": [*range(7)], "b": [0, 1]}
    assert model.b.flatten().tolist() == [-0.5, -0.5, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_phase_two_is_ordinary_training_of_the_mask(dtype):
    model, optimizer, schedule = make(dtype, dense="3.bias")
    run(model, optimizer, range(STEPS))
    other = net(dtype)
    other.load_state_dict(model.state_dict())
    plain = sparseft.SparseAdamW(schedule.mask.param_groups(other), lr=LR, weight_decay=0.0)
    run(model, optimizer, range(10, 16))
    run(other, plain, range(10, 16))
    assert_same(model, other)
    assert schedule.expected_entries == schedule.mask.k


def test_the_delta_is_of_the_pretrained_model(tmp_path):
    model, optimizer, schedule = make(dense="3.*")
    run(model, optimizer, range(STEPS + 3))
    base = net()
    sparseft.save_delta(model, schedule.mask, tmp_path / "delta.safetensors")
    sparseft.load_delta(base, tmp_path / "delta.safetensors")
    assert_same(model, base)


def test_accumulation_and_recomputation_draw_once_a_step():
    (model, optimizer, schedule), (other, plain, _) = make(structured=True), make(structured=True)
    for step in range(STEPS + 2):
        for part in range(3):
            x, y = batch(10 * step + part)
            nn.functional.cross_entropy(checkpoint(model, x, use_reentrant=False), y).backward()
        x, y = (torch.cat(both) for both in zip(*(batch(10 * step + part) for part in range(3)), strict=True))
        (3 * nn.functional.cross_entropy(other(x), y)).backward()
        for each in (optimizer, plain):
            each.step()
            each.zero_grad()
        if step < STEPS - 1:
            for name, log_alphas in schedule._gates.entries.items():
                assert (log_alphas != 0.5).any(), name
    assert schedule.steps == STEPS + 2
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, other.get_parameter(name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("unscale", [False, True])
def test_gradscaler_changes_nothing_but_the_steps_it_leaves_out(unscale):
    (model, optimizer, schedule), (other, plain, its) = make(steps=7), make(steps=7)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        scaler.scale(loss(model, step) * (float("inf") if step == 2 else 1.0)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step != 2:
            run(other, plain, [step])
    assert (schedule.steps, schedule.skipped) == (5, 1)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, other.get_parameter(name), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(schedule._gates.entries[name], its._gates.entries[name], rtol=1e-3, atol=1e-3)


def test_a_bad_gradient_changes_neither_weights_nor_gates():
    (model, optimizer, schedule), (other, plain, its) = make(), make()
    run(model, optimizer, [0])
    loss(model, 1).backward()
    model[0].bias.grad[3] = float("nan")
    optimizer.step()
    optimizer.zero_grad()
    run(model, optimizer, [2, 3])
    run(other, plain, [0, 2, 3])
    assert (schedule.steps, schedule.skipped) == (3, 1)
    assert_same(model, other)
    for name, log_alphas in schedule._gates.entries.items():
        assert torch.equal(log_alphas, its._gates.entries[name])


@pytest.mark.filterwarnings("ignore:some selected entries score zero")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("until", [2, 5, 7])
def test_a_run_resumes_bit_for_bit(until, structured, dtype):
    def spoil(model, schedule):
        # what the pretrained weights are is part of the state
        for weight in schedule._pretrained.values():
            weight.zero_()

    assert_resumes(lambda: make(dtype, structured=structured, dense="3.*"), run, until, 5, spoil)


def test_a_parameter_that_the_loss_does_not_depend_on_feels_the_penalty():
    model = net()
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: nn.Sequential.forward(model[:4], x)
    optimizer, schedule = start(model)
    run(model, optimizer, [0])
    assert (schedule._gates.entries["unused.weight"] < 0.5).all()


def test_a_large_penalty_shuts_gates():
    model, optimizer, schedule = make(steps=40, penalty=10.0)
    before = schedule.expected_entries
    assert before == pytest.approx(schedule.mask.n / (1 + math.exp(-0.5)), rel=1e-5)
    run(model, optimizer, range(30))
    assert schedule.expected_entries < 0.2 * before


def test_evaluation_has_gates_without_a_draw_and_closing_ends_them():
    model, optimizer, schedule = make()
    run(model, optimizer, range(3))
    x, _ = batch(9)
    base = weights(net())
    gated = {
        name: base[name]
        + hard_concrete(torch.tensor(0.5), schedule._gates.entries[name], -1.5, 1.5) * (weight.detach() - base[name])
        for name, weight in model.named_parameters()
    }
    torch.testing.assert_close(model.eval()(x), functional_call(net(), gated, (x,)))
    assert not torch.equal(model.train()(x), model.eval()(x))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in net().named_parameters()]
    with pytest.warns(match="ended after 3 steps, before its choice at step 5"):
        schedule.close()
    assert torch.equal(model(x), functional_call(net(), dict(model.named_parameters()), (x,)))


class Tied(nn.Module):
    """Reads its embedding's weight where no gate is."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 30)

    def forward(self, ids):
        return nn.functional.linear(self.embed(ids).mean(1), self.embed.weight)


def test_evaluation_without_gradients_has_gates_in_encoders_with_a_fast_path():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    _, schedule = start(model, include=["linear*.weight"], log_alpha=-0.5)
    with torch.no_grad():
        for name in ("linear1.weight", "linear2.weight"):
            model.get_parameter(name).mul_(3)
    model.eval()
    x = torch.randn(3, 5, 16)
    gated = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), gated)
    schedule.close()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gradients_past_the_gates_are_refused_and_nothing_is_changed():
    def assert_refused(model, optimizer, schedule):
        before, gates = weights(model), {name: a.clone() for name, a in schedule._gates.entries.items()}
        with pytest.raises(RuntimeError, match="gradients must come through the gates of this step, got some of"):
            optimizer.step()
        assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
        assert all(torch.equal(alpha, gates[name]) for name, alpha in schedule._gates.entries.items())

    torch.manual_seed(0)
    model = Tied()
    optimizer, schedule = start(model)
    nn.functional.cross_entropy(model(torch.arange(40).view(8, 5)), torch.arange(8)).backward()
    assert_refused(model, optimizer, schedule)

    attention = nn.MultiheadAttention(12, 3)
    optimizer, schedule = start(attention)
    x = torch.randn(5, 2, 12)
    attention(x, x, x)[0].square().sum().backward()
    assert_refused(attention, optimizer, schedule)

    model, optimizer, schedule = make()
    loss(model.eval(), 0).backward()
    assert_refused(model, optimizer, schedule)
    optimizer.zero_grad()
    loss(model.train(), 0).backward()
    optimizer.step()
    loss(model, 1).backward()
    # of the step before, too
    assert_refused(model, optimizer, schedule)


@pytest.mark.parametrize(("lr", "log_alpha"), [(0.0, 5.0), (0.1, -5.0)], ids=["differences", "gates"])
def test_differences_or_gates_that_are_all_zero_are_no_choice(lr, log_alpha):
    model = net()
    optimizer = sparseft.SparseSGD(model.parameters(), lr=lr)
    schedule = DiffPruning(model, optimizer, 0.1, 1, log_alpha=log_alpha)
    with pytest.raises(ValueError, match="after 1 steps every difference or its gate is zero"):
        run(model, optimizer, [0])
    assert not schedule.chosen
    assert schedule.mask.k == schedule.mask.n


def transformer(name):
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "bert":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=61, **sizes))
    if name == "gpt2":
        tokens = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0}
        return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=20, **tokens))
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=61, decoder_start_token_id=0, **sizes))


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_transformers_with_tied_weights_and_checkpointing_have_gates_everywhere(name):
    model = transformer(name)
    model.gradient_checkpointing_enable()
    base = weights(model)
    optimizer, schedule = start(model, 0.05, 3, structured=True, log_alpha=3.0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 61, (4, 9), generator=generator)
    for _ in range(5):
        model(input_ids=ids, labels=ids[:, 0] % 2 if name == "bert" else ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(schedule.mask.shapes) == set(base)
    changed = {
        key: (weight.detach() != base[key]).flatten().nonzero().flatten() for key, weight in model.named_parameters()
    }
    assert sum(index.numel() for index in changed.values()) == schedule.mask.k
    for key, index in changed.items():
        assert torch.equal(index, schedule.mask[key].long() if key in schedule.mask else index[:0]), key


def test_a_trainer_takes_its_own_steps(tmp_path):
    tf = pytest.importorskip("transformers")
    model = transformer("bert")
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 61, (9,), generator=generator) for _ in range(28)]
    rows = [{"input_ids": each, "labels": torch.tensor(i % 2)} for i, each in enumerate(ids)]
    optimizer, schedule = start(model, 0.1, 3, dense="classifier.*")
    arguments = tf.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = tf.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    assert schedule.steps == trainer.state.global_step == 4
    assert schedule.chosen
    assert schedule.mask.k == schedule.mask.n // 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "gates must learn for at least one step before the choice, got 0"),
        ({"penalty": -1.0}, "penalty must be at least 0 and gate_lr above it, got -1.0 and 0.1"),
        ({"gate_lr": 0.0}, "got 0.0001 and 0.0"),
        ({"gate_lr": math.inf}, "gate_lr must be finite, got inf"),
        ({"penalty": math.nan}, "penalty must be finite, got nan"),
        ({"log_alpha": math.inf}, "log_alpha must be finite, got inf"),
        ({"stretch": (0.0, 1.5)}, "gates must be stretched from below 0 to above 1, got 0.0 and 1.5"),
        ({"density": 1.5}, r"density must lie in \(0, 1\]"),
        ({"scope": "neuron"}, "scope must be one of global"),
        ({"include": "head*"}, r"include pattern 'head\*' matches no parameter"),
        ({"dense": "*"}, "there is nothing to choose from"),
    ],
)
def test_options_that_make_no_sense_are_refused_and_the_optimizer_stays_free(options, message):
    model = net()
    optimizer = sparseft.SparseAdamW(model.parameters())
    with pytest.raises(ValueError, match=message):
        DiffPruning(model, optimizer, **{"density": 0.1, "steps": 2, "penalty": PENALTY, **options})
    DiffPruning(model, optimizer, 0.1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": None}, r"density must be a number in \(0, 1\], got None"),
        ({"penalty": "1"}, "penalty must be a number, got '1'"),
        ({"log_alpha": "x"}, "log_alpha must be a number, got 'x'"),
        ({"stretch": 1.5}, "stretch must be two numbers, the lowest and the highest of a gate, got 1.5"),
        ({"stretch": (-1, "2")}, "stretch must be a number, got '2'"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
    ],
)
def test_arguments_of_the_wrong_type_are_named_and_the_optimizer_stays_free(options, message):
    model = net()
    optimizer = sparseft.SparseAdamW(model.parameters())
    with pytest.raises(TypeError, match=message):
        DiffPruning(model, optimizer, **{"density": 0.1, "steps": 2, **options})
    DiffPruning(model, optimizer, 0.1, 2)


@pytest.mark.parametrize("steps", [2.5, 2.0, "2", True])
def test_steps_are_a_whole_number(steps):
    model = net()
    with pytest.raises(TypeError, match="steps must be a whole number, got"):
        DiffPruning(model, sparseft.SparseAdamW(model.parameters()), 0.1, steps)


def test_a_state_of_other_options_is_refused():
    _, _, schedule = make()
    _, _, other = make(penalty=1.0)
    with pytest.raises(ValueError, match=r"must be of a DiffPruning with .*'penalty': 0.0001.* got .*'penalty': 1.0"):
        schedule.load_state_dict(other.state_dict())
