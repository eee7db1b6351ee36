"""The utility of examples in prompts, against a loop that reads every whole text by itself."""

import math

import pytest
import torch
import transformers as tf
from models import one_thread  # noqa: F401
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from sparseft import testing
from sparseft.data import Prompts, utility_kernel

CHARACTERS = "abcdefghijklmnopqrstuvwxyzRBEQ .:\n0123456789"
SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<model>"]
VOCABULARY = len(CHARACTERS) + len(SPECIAL)
SHORT = Prompts(alone="r:", guided="e:", example="{prompt}.{response}\n", query="{prompt}", answer=":")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ 'model' if m.role == 'assistant' else 'user' }}>{{ m.content | trim }}"
    "</s>\n{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_LLAMA = {**_SMALL, "num_key_value_heads": 2, "vocab_size": VOCABULARY}


def llama(context):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA, max_position_embeddings=context))


def gpt2(context):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, n_positions=context))


def sliding(context):
    # the window is shorter than most prompts
    return tf.MistralForCausalLM(tf.MistralConfig(**_LLAMA, max_position_embeddings=context, sliding_window=9))


def gemma(context):
    sizes = {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "max_position_embeddings": context}
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**sizes, sliding_window=9))


def mamba(context):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": VOCABULARY}
    return tf.MambaForCausalLM(tf.MambaConfig(**sizes, max_position_embeddings=context))


def mpt(context):
    return tf.MptForCausalLM(
        tf.MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=VOCABULARY, max_seq_len=context)
    )


def bert(context):
    sizes = {**_SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": context}
    return tf.BertForMaskedLM(tf.BertConfig(**sizes))


def make(kind, context=96, device="cpu"):
    """A random model, with weights large enough that its probabilities are far from equal."""
    torch.manual_seed(0)
    model = kind(context)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(device).train()


def characters(chat=False, bos=True):
    """A tokenizer whose tokens are characters, so that a text is its parts joined."""
    names = [*SPECIAL, *CHARACTERS]
    tokenizer = Tokenizer(WordLevel({name: place for place, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
    )  # fmt: skip
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def samples(count=6, seed=0, longest=9):
    generator = torch.Generator().manual_seed(seed)

    def text(least):
        length = int(torch.randint(least, longest + 1, (1,), generator=generator))
        letters = torch.randint(0, 26, (length,), generator=generator).tolist()
        return "".join(CHARACTERS[letter] for letter in letters)

    return [(text(0), text(1)) for _ in range(count)]


def distance(model, ids, response, measure):
    """The definition: -p of each token of the response, given all before it, in one pass over one text."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + response], device=model.device)).logits[0].double()
    p = [float(logits[len(ids) + t - 1].softmax(0)[token]) for t, token in enumerate(response)]
    if measure == "likelihood":
        return -sum(math.log(one) for one in p) / len(p)
    return math.sqrt(sum((1 - one) ** 2 for one in p) / len(p))


def oracle(model, tokenizer, examples, targets, measure="distance", words=SHORT, limit=10**9, chat=False, thought=""):
    """Whole prompts, as texts; what is too long loses the end of its example."""
    model.eval()

    def prompt(head, example, query):
        if not chat:
            return f"{head}{example}{words.query.format(prompt=query)}{words.answer}"
        return f"<s><user>{head}{example}{words.query.format(prompt=query)}</s>\n<model>{thought}"

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=not chat)

    rows = []
    for source, answer in examples:
        row = []
        for query, response in targets:
            ending = tokenizer.encode(response + "</s>", add_special_tokens=False)
            example = words.example.format(prompt=source, response=answer)
            while len(ids(prompt(words.guided, example, query))) + len(ending) > limit:
                example = example[:-1]
            alone = distance(model, ids(prompt(words.alone, "", query)), ending, measure)
            row.append(alone - distance(model, ids(prompt(words.guided, example, query)), ending, measure))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def assert_equal(got, wanted):
    assert got.dtype == torch.float32
    assert float(wanted.std()) > 0.005, "utilities that hardly differ would hide mistakes"
    torch.testing.assert_close(got.double(), wanted, atol=3e-6, rtol=1e-4)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("measure", ["distance", "likelihood"])
@pytest.mark.parametrize("kind", [llama, gpt2, sliding, gemma])
def test_utilities_are_their_definition(kind, measure, cache, device):
    """Texts of many lengths, batches of several and the last one short, examples that are not the targets."""
    model, tokenizer = make(kind, device=device), characters()
    examples, targets = samples(4), samples(7, seed=1)
    got = utility_kernel(
        model, tokenizer, examples, targets, measure=measure, prompts=SHORT, cache=cache, batch_tokens=100
    )
    assert model.training
    assert_equal(got, oracle(model, tokenizer, examples, targets, measure))


def test_the_defaults():
    model, tokenizer, pool = make(llama, 256), characters(), samples(4)
    assert_equal(utility_kernel(model, tokenizer, pool), oracle(model, tokenizer, pool, pool, words=Prompts()))


@pytest.mark.parametrize("batch_tokens", [1, 37, 10**6])
def test_batches_change_nothing(batch_tokens):
    model, tokenizer, pool = make(llama), characters(), samples(5)
    got = utility_kernel(model, tokenizer, pool, prompts=SHORT, batch_tokens=batch_tokens)
    assert_equal(got, oracle(model, tokenizer, pool, pool))


def test_a_tokenizer_that_begins_texts_with_nothing():
    model, tokenizer, pool = make(gpt2), characters(bos=False), samples(4)
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special_tokens=False)
    assert_equal(utility_kernel(model, tokenizer, pool, prompts=SHORT), oracle(model, tokenizer, pool, pool))


def test_a_chat_template_is_used_where_there_is_one():
    model, tokenizer, pool = make(llama), characters(chat=True), samples(4)
    chat = utility_kernel(model, tokenizer, pool, prompts=SHORT)
    assert_equal(chat, oracle(model, tokenizer, pool, pool, chat=True))
    plain = utility_kernel(model, tokenizer, pool, prompts=SHORT, chat=False)
    assert_equal(plain, oracle(model, tokenizer, pool, pool))
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        utility_kernel(model, characters(), pool, chat=True)


def test_what_a_template_puts_before_an_answer_is_read():
    """As Qwen3's does, an empty thought, which is in no prompt to answer."""
    model, tokenizer, pool = make(llama), characters(), samples(4)
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content", "{{ '' if m.role == 'user' else 'BE:' }}{{ m.content")
    got = utility_kernel(model, tokenizer, pool, prompts=SHORT)
    assert_equal(got, oracle(model, tokenizer, pool, pool, chat=True, thought="BE:"))


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_logits_of_an_example_are_not_held(cache):
    """Of a vocabulary of 128,000, those of a long example are gigabytes."""
    model, tokenizer = make(llama), characters()
    tokens = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: tokens.append(output[..., 0].numel()))
    utility_kernel(model, tokenizer, [("a", "b" * 70)], samples(5), prompts=SHORT, cache=cache, batch_tokens=1)
    longest = max(len(prompt) + 1 + len(response) + 1 for prompt, response in samples(5))
    assert max(tokens) <= 2 * longest < 70


@pytest.mark.parametrize("kind", [llama, gpt2, mpt])
def test_what_is_too_long_loses_the_end_of_its_example(kind):
    """By as much as each target needs, so that a long one does not cost the others theirs."""
    model, tokenizer = make(kind, context=30), characters()
    pool = [("ab", "cd"), ("abcdefghij", "klmnopqrst"), ("x" * 8, "yz" * 4), ("q", "r")]
    got = utility_kernel(model, tokenizer, pool, prompts=SHORT)
    wanted = oracle(model, tokenizer, pool, pool, limit=30)
    assert_equal(got, wanted)
    shorter = utility_kernel(make(kind, context=90), tokenizer, pool, prompts=SHORT, max_length=29)
    assert_equal(shorter, oracle(make(kind, context=90), tokenizer, pool, pool, limit=29))


def test_a_target_that_leaves_no_room_is_named():
    tokenizer, pool = characters(), [("a", "b"), ("abcdefghij", "klmnopqrst")]
    with pytest.raises(ValueError, match="1 of 2 targets leave no room for an example within 25 tokens: target 1 has"):
        utility_kernel(make(llama, 25), tokenizer, pool, prompts=SHORT)
    utility_kernel(make(llama, 26), tokenizer, pool, prompts=SHORT)
    with pytest.raises(ValueError, match="max_length must be from 1 to the model's 26"):
        utility_kernel(make(llama, 26), tokenizer, pool, prompts=SHORT, max_length=27)


def test_words_of_a_sample_are_not_read_as_prompts():
    model, tokenizer = make(llama), characters()
    words = Prompts("r:", "e:", "{response}.{prompt}", "{prompt}", ":")
    odd = [("ab", "c {prompt} d"), ("{response}", "e")]
    plain = [("ab", "c <pad>prompt<pad> d"), ("<pad>response<pad>", "e")]
    got = utility_kernel(model, tokenizer, odd, prompts=words)
    torch.testing.assert_close(got, utility_kernel(model, tokenizer, plain, prompts=words))


def test_a_duplicate_helps_as_the_sample_itself_does():
    model, tokenizer, pool = make(llama), characters(), samples(3)
    kernel = utility_kernel(model, tokenizer, [*pool, pool[0]], prompts=SHORT)
    torch.testing.assert_close(kernel[0], kernel[3])
    torch.testing.assert_close(kernel[:, 0], kernel[:, 3])


def test_an_interrupted_call_goes_on(tmp_path, monkeypatch):
    model, tokenizer, pool = make(llama), characters(), samples(7)
    monkeypatch.setattr("sparseft.data.blocks._ROWS", 2)
    options = {"prompts": SHORT, "checkpoint": tmp_path / "rows"}
    whole = utility_kernel(model, tokenizer, pool, prompts=SHORT)
    reads, forward = [], model.forward

    def interrupted(*args, **kwargs):
        reads.append(kwargs)
        if len(reads) == 20:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        utility_kernel(model, tokenizer, pool, **options)
    assert model.training
    there = len(list((tmp_path / "rows").iterdir()))
    assert 0 < there < 4
    reads.clear()
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: reads.append(kwargs) or forward(*args, **kwargs))
    assert torch.equal(utility_kernel(model, tokenizer, pool, **options), whole)
    prefixes = [kwargs for kwargs in reads if kwargs["use_cache"] and "past_key_values" not in kwargs]
    # each missing example once, one to check, the words before a query without an example
    assert len(prefixes) == 7 - 2 * there + 2
    reads.clear()
    assert torch.equal(utility_kernel(model, tokenizer, pool, **options), whole)
    assert not reads
    for other in ({"measure": "likelihood"}, {"max_length": 95}, {"prompts": Prompts("r", "e")}):
        with pytest.raises(ValueError, match="must be of the same model, samples and options"):
            utility_kernel(model, tokenizer, pool, **{**options, **other})
    with torch.no_grad():
        next(model.parameters())[3, 3] += 1
    with pytest.raises(ValueError, match="must be of the same model"):
        utility_kernel(model, tokenizer, pool, **options)
    with pytest.raises(ValueError, match="there is no folder"):
        utility_kernel(model, tokenizer, pool, prompts=SHORT, checkpoint=tmp_path / "none" / "rows")
    (tmp_path / "file").write_text("notes")
    with pytest.raises(ValueError, match=r"checkpoint must be a folder, got .*file, which is a file"):
        utility_kernel(model, tokenizer, pool, prompts=SHORT, checkpoint=tmp_path / "file")


def test_models_that_are_not_causal_are_refused():
    for options in ({}, {"cache": False}):
        with pytest.raises(ValueError, match="but what it says of a token depends on later ones"):
            utility_kernel(make(bert), characters(), samples(3), prompts=SHORT, **options)
    t5 = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration, which has an encoder"):
        utility_kernel(t5, characters(), samples(3), prompts=SHORT)


def test_a_cache_that_is_wrong_is_refused(monkeypatch):
    model, tokenizer, pool = make(llama), characters(), samples(3)
    forward = model.forward

    def forgetful(*args, past_key_values=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forgetful)
    with pytest.raises(RuntimeError, match="pass cache=False"):
        utility_kernel(model, tokenizer, pool, prompts=SHORT)

    def without(*args, **kwargs):
        found = forward(*args, **kwargs)
        found.past_key_values = None
        return found

    monkeypatch.setattr(model, "forward", without)
    with pytest.raises(RuntimeError, match="a cache that can be repeated for a batch, got NoneType; pass cache=False"):
        utility_kernel(model, tokenizer, pool, prompts=SHORT)
    got = utility_kernel(model, tokenizer, pool, prompts=SHORT, cache=False)
    assert_equal(got, oracle(make(llama), tokenizer, pool, pool))


def test_a_model_with_another_kind_of_state_is_read_again():
    """Mamba has no keys and values."""
    model, tokenizer, pool = make(mamba), characters(), samples(4)
    with pytest.raises(RuntimeError, match="pass cache=False"):
        utility_kernel(model, tokenizer, pool, prompts=SHORT)
    got = utility_kernel(model, tokenizer, pool, prompts=SHORT, cache=False)
    assert_equal(got, oracle(model, tokenizer, pool, pool))


def test_bad_samples_and_options_are_refused():
    model, tokenizer = make(llama), characters()
    for bad, error, message in (
        (None, TypeError, r"examples must be a list of pairs .* got a NoneType$"),
        ([], ValueError, "examples must hold at least one sample"),
        ([("a", "b"), ("a", " ")], ValueError, r"empty ones at \[1\]"),
        (["ab"], TypeError, r"examples\[0\] must be a pair .* got a str$"),
        ([{"prompt": "a"}], TypeError, r"examples\[0\] must be a pair .* got a dict$"),
        ([("a", None)], TypeError, r"examples\[0\] must be a pair .* got a tuple of str and NoneType$"),
        ([("a", "b", "c")], TypeError, r"examples\[0\] must be a pair .* got a tuple of 3$"),
    ):
        with pytest.raises(error, match=message):
            utility_kernel(model, tokenizer, bad)
    with pytest.raises(ValueError, match="targets must hold"):
        utility_kernel(model, tokenizer, [("a", "b")], [])
    with pytest.raises(ValueError, match="measure must be one of distance, likelihood"):
        utility_kernel(model, tokenizer, [("a", "b")], prompts=SHORT, measure="rouge")
    with pytest.raises(ValueError, match="batch_tokens must be at least 1"):
        utility_kernel(model, tokenizer, [("a", "b")], prompts=SHORT, batch_tokens=0)
    with pytest.raises(ValueError, match="must begin with something"):
        utility_kernel(model, characters(bos=False), [("a", "b")], prompts=Prompts(alone="", guided=""))
    with pytest.raises(ValueError, match="query and response must have tokens, got none of target 0"):
        utility_kernel(model, tokenizer, [("", "b")], prompts=Prompts("r", "e", query="{prompt}", answer=""))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"example": "{prompt}"}, r"prompts\.example must contain {prompt} and {response}.* without {response}$"),
        ({"example": "Q: A:"}, r"got 'Q: A:' without {prompt} and {response}$"),
        ({"query": "{response}"}, r"prompts\.query must contain {prompt},.* got '{response}' without {prompt}$"),
        ({"query": "{Prompt}"}, r"without {prompt}$"),
    ],
)
def test_words_without_a_place_for_a_sample_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        Prompts(**words)


def test_words_that_are_no_text_are_refused():
    with pytest.raises(TypeError, match=r"prompts\.answer must be a text, got NoneType"):
        Prompts(answer=None)


def test_what_is_no_model_or_tokenizer_is_named():
    model, tokenizer, pool = make(llama), characters(), samples(3)
    with pytest.raises(TypeError, match=r"tokenizer must be .* got NoneType without encode and eos_token_id"):
        utility_kernel(model, None, pool)
    with pytest.raises(TypeError, match=f"model must be a torch module, got {type(tokenizer).__name__}"):
        utility_kernel(tokenizer, model, pool)


@pytest.mark.parametrize("place", ["example 1", "target 2", "prompts.guided"])
def test_a_token_that_the_model_does_not_know_is_named(place, tmp_path, monkeypatch):
    """Before it reads anything, and before a folder is made for what it reads."""
    model, tokenizer, pool, task = make(llama), characters(), samples(3), samples(3, seed=1)
    tokenizer.add_tokens(["#"])
    added = tokenizer.convert_tokens_to_ids("#")
    assert added == VOCABULARY
    monkeypatch.setattr(model, "forward", None)
    words = SHORT
    if place == "example 1":
        pool[1] = ("a#", "b")
    elif place == "target 2":
        task[2] = ("a", "b#")
    else:
        words = Prompts("r:", "e#:", SHORT.example, SHORT.query, ":")
    message = f"vocabulary of {VOCABULARY}, got {added} in {place}; "
    with pytest.raises(ValueError, match=message):
        utility_kernel(model, tokenizer, pool, task, prompts=words, checkpoint=tmp_path / "rows")
    assert not list(tmp_path.iterdir())


class Called(torch.nn.Module):
    """A model that is called as those of transformers are, and says less of itself."""

    def __init__(self, model, config):
        super().__init__()
        self.inner = model
        if config:
            self.config = model.config

    def forward(self, **kwargs):
        return self.inner(**kwargs)


def test_a_model_that_does_not_show_its_embeddings():
    model, tokenizer, pool = make(llama), characters(), samples(3)
    wanted = oracle(model, tokenizer, pool, pool)
    for config in (False, True):
        assert_equal(utility_kernel(Called(model, config), tokenizer, pool, prompts=SHORT), wanted)
    tokenizer.add_tokens(["#"])
    with pytest.raises(ValueError, match=f"vocabulary of {VOCABULARY}, got {VOCABULARY} in example 0"):
        utility_kernel(Called(model, config=True), tokenizer, [("#", "a")], prompts=SHORT)


def test_tokens_that_were_added_to_both_are_read():
    model, tokenizer, pool = make(llama), characters(), [("a#", "b"), ("c", "d#")]
    tokenizer.add_tokens(["#"])
    model.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
    assert_equal(utility_kernel(model, tokenizer, pool, prompts=SHORT), oracle(model, tokenizer, pool, pool))


def test_without_an_end_token_none_is_counted():
    model, tokenizer, pool = make(llama), characters(), samples(4)
    with_end = utility_kernel(model, tokenizer, pool, prompts=SHORT, measure="likelihood")
    tokenizer.eos_token = None
    without = utility_kernel(model, tokenizer, pool, prompts=SHORT, measure="likelihood")
    assert not torch.allclose(without, with_end)
    (source, answer), (query, response) = pool[0], pool[1]
    ending = tokenizer.encode(response, add_special_tokens=False)
    model.eval()
    alone = distance(model, tokenizer.encode(f"r:{query}:"), ending, "likelihood")
    guided = distance(model, tokenizer.encode(f"e:{source}.{answer}\n{query}:"), ending, "likelihood")
    assert float(without[0, 1]) == pytest.approx(alone - guided, abs=1e-5)


def test_utilities_that_are_not_finite_are_named():
    model, tokenizer, pool = make(llama), characters(), [("ab", "c"), ("d", "e"), ("f", "gz")]
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("z")] = torch.nan
    with pytest.raises(ValueError, match="of example 0 for target 2; check the model's weights"):
        utility_kernel(model, tokenizer, pool, prompts=SHORT)
    assert model.training
