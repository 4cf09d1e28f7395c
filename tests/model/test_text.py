import pytest
import torch
from transformers import ByT5Tokenizer, T5TokenizerFast, UMT5Config, UMT5EncoderModel

from memflow.text import encode_prompts

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
