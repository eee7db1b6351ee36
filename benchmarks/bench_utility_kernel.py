"""Utilities of samples for each other, against a pass for each pair of them, and against batches without a cache."""

import functools

import harness
import pytest
import torch
import workloads
from torch import nn

from sparseft import data

# examples, targets, characters of an example's prompt and response, of a target's
SHAPES = {"cpu": [(6, 24, 200, 40, 40, 24)], "cuda": [(32, 128, 600, 200, 120, 80)]}


class Characters:
    """A tokenizer whose tokens are characters."""

    bos_token_id, eos_token_id = None, 3

    def encode(self, text, add_special_tokens=True):
        """Return the code of each."""
        return [ord(character) for character in text]


@pytest.mark.parametrize(("device", "examples", "targets", *"abcd"), harness.on_devices(SHAPES))
def test_utility_kernel(compare, device, examples, targets, a, b, c, d):
    model = workloads.decoder(
        device, torch.float32, vocab_size=8192, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, initializer_range=0.1,
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    pools = [samples(generator, examples, a, b), samples(generator, targets, c, d)]
    utilities = functools.partial(
        data.utility_kernel, model, Characters(), *pools, measure="likelihood", progress=False
    )
    wanted = one_by_one(model, *pools)
    assert float(wanted.std()) > 0.05
    torch.testing.assert_close(utilities(), wanted, atol=1e-4, rtol=1e-3)
    compare(
        harness.Case("utility_kernel", f"Llama of 4 layers, {examples} examples x {targets} targets", device=device),
        utilities,
        {
            "one pass a pair": lambda: one_by_one(model, *pools),
            "batches, no cache": functools.partial(utilities, cache=False),
        },
        rounds=3,
    )


def samples(generator, count, prompt, response):
    """Return texts of random letters, of three quarters of these lengths and more."""

    def text(most):
        length = int(torch.randint(most * 3 // 4, most + 1, (1,), generator=generator))
        return "".join(map(chr, torch.randint(97, 123, (length,), generator=generator).tolist()))

    return [(text(prompt), text(response)) for _ in range(count)]


@torch.no_grad()
def one_by_one(model, examples, targets):
    """Read each prompt with its response by itself."""
    words = data.Prompts()

    def distance(head, query, response):
        prompt = Characters().encode(head + words.query.format(prompt=query) + words.answer)
        answer = [*Characters().encode(response), Characters.eos_token_id]
        ids = torch.tensor([prompt + answer], device=next(model.parameters()).device)
        return nn.functional.cross_entropy(model(input_ids=ids).logits[0, len(prompt) - 1 : -1], ids[0, len(prompt) :])

    alone = torch.stack([distance(words.alone, *target) for target in targets])
    heads = [words.guided + words.example.format(prompt=x, response=y) for x, y in examples]
    return torch.stack([alone - torch.stack([distance(head, *target) for target in targets]) for head in heads]).cpu()
