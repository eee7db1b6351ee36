"""Tiny random models of the architectures the library is for, and batches for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY, CLASSES = 61, 3
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_WORDS = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}


def _bert(**options: object) -> nn.Module:
    return tf.BertForSequenceClassification(
        tf.BertConfig(**_SMALL, vocab_size=VOCABULARY, max_position_embeddings=64, num_labels=CLASSES, **options)
    )


def _bert_masked() -> nn.Module:
    return tf.BertForMaskedLM(tf.BertConfig(**_SMALL, vocab_size=VOCABULARY, max_position_embeddings=64))


def _bert_tokens() -> nn.Module:
    config = tf.BertConfig(**_SMALL, vocab_size=VOCABULARY, max_position_embeddings=64, num_labels=CLASSES)
    return tf.BertForTokenClassification(config)


def _roberta() -> nn.Module:
    # padding id 1, positions counted from the padding id
    return tf.RobertaForSequenceClassification(
        tf.RobertaConfig(
            **_SMALL, vocab_size=VOCABULARY, max_position_embeddings=66, type_vocab_size=1, num_labels=CLASSES
        )
    )


def _gpt2_config(**options: object) -> tf.GPT2Config:
    return tf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCABULARY, pad_token_id=0, **options
    )


def _llama_config(**options: object) -> tf.LlamaConfig:
    return tf.LlamaConfig(
        **_SMALL, num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0, **options
    )


def _albert() -> nn.Module:
    # both layers are the same one
    return tf.AlbertForSequenceClassification(
        tf.AlbertConfig(**_SMALL, embedding_size=16, **_WORDS, num_labels=CLASSES, inner_group_num=1)
    )


def _deberta(**options: object) -> nn.Module:
    # as published: relative positions only, their table normalised and sent through the tokens' own projections
    published = {
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "pooler_hidden_size": 32,
    }
    config = tf.DebertaV2Config(**_SMALL, **_WORDS, num_labels=CLASSES, **{**published, **options})
    return tf.DebertaV2ForSequenceClassification(config)


def _t5(**options: object) -> nn.Module:
    # the head, both embeddings and nothing else are one matrix; eight buckets, so that near positions share one
    config = tf.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        decoder_start_token_id=0,
        initializer_factor=0.3,  # attention is not scaled: sharper than this, it leaves little but rounding
        **options,
    )
    return tf.T5ForConditionalGeneration(config)


def _gemma() -> nn.Module:
    # norms scale by 1 + weight; a head width of its own
    config = tf.GemmaConfig(**_SMALL, **_WORDS, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    return tf.GemmaForCausalLM(config)


def _gemma2() -> nn.Module:
    config = tf.Gemma2Config(
        **_SMALL, **_WORDS, num_key_value_heads=2, head_dim=8, pad_token_id=0, query_pre_attn_scalar=8
    )
    return tf.Gemma2ForCausalLM(config)


def _qwen3() -> nn.Module:
    config = tf.Qwen3Config(**_SMALL, **_WORDS, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    return tf.Qwen3ForCausalLM(config)


def _vit(**options: object) -> nn.Module:
    config = tf.ViTConfig(**_SMALL, image_size=8, patch_size=4, num_labels=CLASSES, **options)
    return tf.ViTForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": _bert,
    "bert regression": lambda: tf.BertForSequenceClassification(
        tf.BertConfig(**_SMALL, vocab_size=VOCABULARY, max_position_embeddings=64, num_labels=1)
    ),
    "bert multilabel": lambda: _bert(problem_type="multi_label_classification"),
    "bert masked": _bert_masked,
    "bert tokens": _bert_tokens,
    "roberta": _roberta,
    "gpt2": lambda: tf.GPT2LMHeadModel(_gpt2_config()),
    "gpt2 classification": lambda: tf.GPT2ForSequenceClassification(_gpt2_config(num_labels=CLASSES)),
    "llama": lambda: tf.LlamaForCausalLM(_llama_config(tie_word_embeddings=False)),
    "llama tied": lambda: tf.LlamaForCausalLM(_llama_config(tie_word_embeddings=True)),
    "llama classification": lambda: tf.LlamaForSequenceClassification(_llama_config(num_labels=CLASSES)),
    "albert": _albert,
    "deberta": _deberta,
    "deberta with projections": lambda: _deberta(share_att_key=False, norm_rel_ebd="none"),
    "t5": _t5,
    "t5 untied": lambda: _t5(tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "gemma": _gemma,
    "gemma2": _gemma2,
    "qwen3": _qwen3,
    "vit": _vit,
    "bert eager": lambda: _bert(attn_implementation="eager"),
    "gpt2 eager": lambda: tf.GPT2LMHeadModel(_gpt2_config(attn_implementation="eager")),
    "t5 eager": lambda: _t5(attn_implementation="eager"),
    "vit eager": lambda: _vit(attn_implementation="eager"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread: for tensors this small, threads cost far more than they give. Import it into a test file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep convolutions on a GPU from multiplying in TF32, which has three digits. Import it into a test file."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


CAUSAL = ("gpt2", "gpt2 eager", "llama", "llama tied", "gemma", "gemma2", "qwen3")
TOKEN_LEVEL = ("bert masked", "bert tokens", *CAUSAL)


def make(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a model with weights far from their initial ones: unit norms and zero biases hide mistakes."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device, dtype).train()


def batch(name: str, samples: int = 5, length: int = 9, left: bool = False, seed: int = 1) -> dict[str, Tensor]:
    """Make a ragged batch: padding, tokens repeated within and across samples, some token labels ignored."""
    generator = torch.Generator().manual_seed(seed)
    if name.startswith("vit"):
        pixels = torch.randn(samples, 3, 8, 8, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(0, CLASSES, (samples,), generator=generator)}
    pad = 1 if name == "roberta" else 0
    # few distinct tokens, so that they repeat; one sample is as long as it may be
    ids = torch.randint(2, 20, (samples, length), generator=generator)
    lengths = torch.randint(3, length + 1, (samples,), generator=generator)
    lengths[0] = length
    kept = torch.arange(length) < lengths[:, None]
    mask = kept.flip(1) if left else kept
    ids = ids.masked_fill(~mask, pad)
    made = {"input_ids": ids, "attention_mask": mask.long()}
    if name.startswith("bert"):
        made["token_type_ids"] = (torch.arange(length) >= 4).long().expand(samples, length) * mask
    made["labels"] = _labels(name, ids, mask, generator)
    return made


def _labels(name: str, ids: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    samples = len(ids)
    if name == "bert regression":
        return torch.randn(samples, generator=generator)
    if name == "bert multilabel":
        return torch.randint(0, 2, (samples, CLASSES), generator=generator).float()
    if name.startswith("t5"):
        # of another length than the inputs
        ids, mask = ids[:, :-2].flip(1), mask[:, :-2]
    elif name not in TOKEN_LEVEL:
        return torch.randint(0, CLASSES, (samples,), generator=generator)
    if name == "bert tokens":
        labels = torch.randint(0, CLASSES, ids.shape, generator=generator)
    else:
        labels = ids.clone()
    ignored = torch.rand(ids.shape, generator=generator) < 0.2
    return labels.masked_fill(~mask | ignored, -100)
