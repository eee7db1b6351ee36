"""How much samples help each other: the utility of one as the example in the prompt of another.

Source: arXiv 2411.04425.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparseft.data.blocks import Blocks
from sparseft.data.likelihood import Measure, Reader, check_causal, context_length, evaluation, vocabulary_size
from sparseft.data.prompts import Encoder, Prompts, Target, checked
from sparseft.fisher.resume import fingerprint


def utility_kernel(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[tuple[str, str]],
    targets: Sequence[tuple[str, str]] | None = None,
    *,
    measure: Measure = "distance",
    prompts: Prompts | None = None,
    chat: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    cache: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Tensor:
    """Return the utility of each example for each target: how much nearer to its response the model is with it.

    U[c, r] = d(response r | prompt r) - d(response r | example c, prompt r), teacher-forced: each token of the
    response, the end token too, is predicted after those before it; if the tokenizer has no end token, and no chat
    template is used, none is counted. Positive where the example helps. An example that equals the target gives the
    response away, and so is worth the most, and so is its duplicate.

    The model reads each example once and keeps its keys and values for all targets. A prompt that is too long with
    its example has the end of the example cut off, for this target alone; neither the query nor the response is cut.

    Args:
        model: a causal language model of transformers, or one that is called alike; left as it was found.
        tokenizer: its tokenizer.
        examples: pairs (prompt, response).
        targets: pairs; by default the examples.
        measure: of d. "distance", the paper's: the root of the mean of (1 - p)^2 over the tokens, in [0, 1].
            "likelihood": the mean of -log p, in nats a token.
        prompts: the words around samples.
        chat: whether to use the tokenizer's chat template; None does if there is one.
        max_length: the most tokens of example, query and response; by default what the model's configuration says.
        batch_tokens: the most tokens read at once, which bounds memory: logits of as many tokens are held, and their
            keys and values. One response is always read whole.
        cache: keep keys and values of an example. False is for models whose state cannot be repeated for a batch.
        checkpoint: a folder for finished rows. They are read from it if it has them, so that a call that was
            interrupted goes on; model, samples and options must be the same.
        progress: show a bar, if it takes longer than two seconds.

    Returns:
        fp32 [examples, targets], on the CPU.

    Raises:
        TypeError: samples that are not pairs of texts; a model or a tokenizer that is none.
        ValueError: no samples; an empty response; a target that leaves no room for an example; a token that the model
            does not know; a model that is not causal; a utility that is not finite; a checkpoint of something else.
        RuntimeError: the model's cache cannot be reused.
    """
    given = checked("examples", examples)
    wanted = given if targets is None else checked("targets", targets)
    check_causal(model)
    encoder = Encoder(tokenizer, Prompts() if prompts is None else prompts, chat)
    limit = context_length(model)
    if max_length is not None and not 1 <= max_length <= limit:
        raise ValueError(f"max_length must be from 1 to the model's {limit} tokens, got {max_length}")
    limit = limit if max_length is None else max_length
    bodies, ends = [encoder.example(sample) for sample in given], [encoder.target(sample) for sample in wanted]
    _check_tokens(model, encoder, bodies, ends)
    room = _room(encoder, ends, limit)
    reader = Reader(model, measure, batch_tokens, cache)
    done = Blocks(checkpoint, len(bodies), len(ends), _identity(model, encoder, bodies, ends, measure, limit))
    bar = tqdm(total=len(bodies), desc="Utility", unit="example", delay=2, disable=not progress)
    with evaluation(model), bar:
        bar.update(done.finished)
        if done.finished < len(bodies):
            place = max(range(len(ends)), key=lambda place: room[place])
            longest = max(bodies, key=len)[: int(min(room[place], 2**31))]
            reader.check([*encoder.guided, *longest], ends[place])
            alone = reader.distances(encoder.alone, ends)
        for row in done.missing():
            utility = alone - _guided(reader, encoder.guided, bodies[row], ends, room)
            if not bool(utility.isfinite().all()):
                bad = int(utility.isfinite().int().argmin())
                raise ValueError(
                    f"utilities must be finite, got {float(utility[bad])} of example {row} for target {bad}; check "
                    "the model's weights and its dtype"
                )
            done.add(row, utility.float())
            bar.update()
    return done.kernel


def _check_tokens(model: nn.Module, encoder: Encoder, bodies: list[list[int]], targets: list[Target]) -> None:
    """Raise if a token lies outside the model's vocabulary, which a GPU would say late and unclearly."""
    size = vocabulary_size(model)
    texts = [("prompts.alone", encoder.alone), ("prompts.guided", encoder.guided)]
    texts += [(f"example {place}", ids) for place, ids in enumerate(bodies)]
    texts += [(f"target {place}", [*target.tail, *target.response]) for place, target in enumerate(targets)]
    for name, ids in texts:
        bad = next((token for token in ids if not 0 <= token < size), None)
        if bad is not None:
            raise ValueError(
                f"token ids must be from 0 to {size - 1}, of the model's vocabulary of {size}, got {bad} in {name}; "
                "use the model's own tokenizer, or model.resize_token_embeddings for tokens that were added"
            )


def _room(encoder: Encoder, targets: list[Target], limit: float) -> list[float]:
    """Return how many tokens of an example fit before each target."""
    room = [limit - len(encoder.guided) - target.length for target in targets]
    tailless = [place for place, target in enumerate(targets) if not target.tail or not target.response]
    if tailless:
        raise ValueError(f"query and response must have tokens, got none of target {tailless[0]}; see prompts.query")
    tight = [place for place, tokens in enumerate(room) if tokens < 1]
    if tight:
        place = tight[0]
        raise ValueError(
            f"{len(tight)} of {len(targets)} targets leave no room for an example within {limit} tokens: target "
            f"{place} has {len(targets[place].tail)} in its query and {len(targets[place].response)} in its response; "
            "leave these out or shorten them, or raise max_length if the model takes more"
        )
    tight = [place for place, target in enumerate(targets) if len(encoder.alone) + target.length > limit]
    if tight:
        raise ValueError(f"target {tight[0]} is longer than {limit} tokens without an example; shorten prompts.alone")
    return room


def _guided(reader: Reader, head: list[int], body: list[int], targets: list[Target], room: list[float]) -> Tensor:
    """Return the distances after an example, fp64 [targets]; the targets that cut it alike are read together."""
    groups: dict[int, list[int]] = {}
    for place, tokens in enumerate(room):
        groups.setdefault(int(min(tokens, len(body))), []).append(place)
    found = torch.empty(len(targets), dtype=torch.float64)
    for kept, places in groups.items():
        found[places] = reader.distances([*head, *body[:kept]], [targets[place] for place in places])
    return found


def _identity(
    model: nn.Module, encoder: Encoder, bodies: list[list[int]], targets: list[Target], measure: str, limit: float
) -> str:
    """Return a hash of all that decides on the utilities."""
    read = json.dumps([encoder.alone, encoder.guided, bodies, targets, measure, limit])
    return hashlib.blake2b((fingerprint(model) + read).encode(), digest_size=16).hexdigest()
