import threading

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import ByT5Tokenizer, T5TokenizerFast, UMT5Config, UMT5EncoderModel

from memflow.models.wan.text import PromptCache, clean_prompt, encode_prompts, losses, token_words

PIECES = ["<pad>", "</s>", "<unk>", "▁a", "▁fox", "▁runs"]
TOKENIZERS = {
    "bytes": ByT5Tokenizer,
    "fast": lambda: T5TokenizerFast(vocab=[(piece, -1.0) for piece in PIECES], extra_ids=0),
}


@pytest.fixture(scope="module")
def encoder() -> UMT5EncoderModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = UMT5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
        return UMT5EncoderModel(config).eval()


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def tokenizer(request):
    return TOKENIZERS[request.param]()


def test_padding_is_zero_and_marked(tokenizer, encoder):
    embeds, mask = encode_prompts(tokenizer, encoder, ["a fox runs", "fox"], 32)
    assert embeds.shape == (2, 32, 24)
    assert mask.shape == (2, 32) and mask.dtype == torch.bool
    lengths = [len(tokenizer(text).input_ids) for text in ("a fox runs", "fox")]
    assert mask.sum(1).tolist() == lengths
    for row, length in enumerate(lengths):
        assert mask[row, :length].all()
        assert embeds[row, length:].eq(0).all()
        assert embeds[row, :length].abs().sum(1).min() > 0


def test_padding_does_not_reach_the_tokens(tokenizer, encoder):
    ids = tokenizer("a fox", return_tensors="pt").input_ids
    expected = encoder(ids).last_hidden_state[0]
    embeds, mask = encode_prompts(tokenizer, encoder, ["a fox runs a fox runs", "a fox"], 40)
    torch.testing.assert_close(embeds[1, mask[1]], expected)


def test_whitespace_collapses(tokenizer, encoder):
    plain, _ = encode_prompts(tokenizer, encoder, ["a fox runs"], 16)
    spaced, _ = encode_prompts(tokenizer, encoder, ["  a\tfox \n runs "], 16)
    assert torch.equal(plain, spaced)


MESSY = "  the fox&amp;#39;s caf\u00c3\u00a9 \u201cLe\u00a0Loup\u201d,\n&lt;night&gt; "


@pytest.mark.parametrize("prompt", [MESSY, "a\tfox \n runs", "\ufb01re &eacute;", "\uff1f a \u3000 fox", ""])
def test_prompts_are_cleaned_as_by_wan(prompt):
    assert clean_prompt(prompt) == prompt_clean(prompt)


def test_what_is_cleaned_is_encoded_and_kept(encoder, tmp_path):
    assert clean_prompt(MESSY) == 'the fox\'s caf\u00e9 "Le Loup", <night>'
    bytewise, clean = ByT5Tokenizer(), clean_prompt(MESSY)
    with torch.no_grad():
        messy, _ = encode_prompts(bytewise, encoder, [MESSY], 48)
        assert torch.equal(messy, encode_prompts(bytewise, encoder, [clean], 48)[0])
    cache = PromptCache(bytewise, lambda: encoder, 48, dtype=torch.float32, folder=tmp_path)
    kept, _ = cache([MESSY])
    assert torch.equal(kept, messy) and not kept.requires_grad
    known = PromptCache(bytewise, None, 48, dtype=torch.float32, folder=tmp_path)
    assert torch.equal(known([clean])[0], messy), "kept by its clean text: no encoder is needed"


def test_long_prompts_are_cut(tokenizer, encoder):
    embeds, mask = encode_prompts(tokenizer, encoder, ["a fox runs " * 50], 8)
    assert embeds.shape == (1, 8, 24)
    assert mask.all()


def test_an_empty_prompt_is_a_prompt(tokenizer, encoder):
    embeds, mask = encode_prompts(tokenizer, encoder, [""], 8)
    assert mask.sum() == 1
    assert embeds.isfinite().all()


@pytest.mark.parametrize("prompts", ["a fox", [], [None], ["a", 3]])
def test_prompts_must_be_a_list_of_strings(tokenizer, encoder, prompts):
    with pytest.raises(TypeError, match="prompts must be a list"):
        encode_prompts(tokenizer, encoder, prompts, 8)


def test_max_length_must_be_positive(tokenizer, encoder):
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        encode_prompts(tokenizer, encoder, ["a fox"], 0)


def test_what_a_model_does_not_see_of_a_prompt_is_said():
    words = TOKENIZERS["fast"]()
    assert losses(words, [" a fox  runs"], 4) == []
    unknown = "the model does not know: zebra, lion"
    assert losses(words, ["a fox, runs a zebra.", "a lion", "a (zebra)"], 64) == [unknown]
    cut = "the prompt has 6 tokens, 4 are used: 'a fox' is cut off"
    assert losses(words, ["a fox runs a fox", "a lion", "a fox  runs a fox"], 4) == [
        cut,
        "the model does not know: lion",
    ]
    assert losses(ByT5Tokenizer(), ["a fox"], 5) == ["the prompt has 6 tokens, 5 are used: 'x' is cut off"]
    (long,) = losses(words, ["a fox runs " * 30], 4)
    assert long.endswith("a fox...' is cut off") and len(long) < 130


def test_every_token_has_its_word(tokenizer):
    """However many tokens a word is made of; the end of the text and lone punctuation are no words."""
    text = " A  fox\truns \u2013 \u201ca fox\u201d, runs."
    words = token_words(tokenizer, text, 64)
    assert len(words) == len(tokenizer(clean_prompt(text)).input_ids) and words[-1] is None
    told = [word for index, word in enumerate(words) if word and word != words[index - 1]]
    assert [word.lower() for word in told] == ["a", "fox", "runs", "a", "fox", "runs"]
    assert token_words(tokenizer, "a fox runs", 2) == [*token_words(tokenizer, "a fox runs", 64)[:1], None]


def test_threads_read_one_after_the_other(tokenizer, encoder):
    """`Stream.send` may come from another thread while a prompt is encoded: a fast tokenizer would then pad and cut the
    one as it was told to for the other."""
    inside, most = [], []

    class Watched:
        is_fast, unk_token_id = False, None

        def __call__(self, *arguments, **settings):
            inside.append(arguments)
            most.append(len(inside))
            if len(most) == 1:
                other.start()
                other.join(0.5)  # time enough to come in
            inside.pop()
            return tokenizer(*arguments, **{**settings, "return_offsets_mapping": False})

    watched = Watched()
    other = threading.Thread(target=losses, args=(watched, ["an owl"], 16))
    encode_prompts(watched, encoder, ["a boat"], 16)
    other.join()
    assert most == [1, 1, 1]  # the prompt; the text and the words of the other
