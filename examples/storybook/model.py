"""The parts of the storybook model before training, and its settings: the real architecture, as small as possible."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from examples.storybook.world import FPS, Frame, render, words
from memflow.decoders.independent import StorybookCodec

TEXT_LENGTH = 16  # tokens that a prompt is padded to; the longest of the world has 13
TEXT_DIM = 64
GRID = (4, 4)  # token rows and columns of a frame
SHIFT = 3.0  # of the noise levels, in training and in the scheduler
# Six: the model is not distilled, and what it makes up itself is clearer than with four.
DENOISING_STEPS = (1000, 850, 700, 500, 350, 200)
MEMORY = {
    "sink_frames": 3,
    "window_frames": 9,
    "bank_frames": 6,
    "held_frames": 24,
    "policy": "original",
    "layers": "mean",
    "positions": "relative",
    "recache": False,
    "recall": "originals",
}
_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"


def build(seed: int) -> dict[str, object]:
    """The components of an untrained pipeline by name, float32 on the CPU; equal for equal seeds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        return {
            "vae": StorybookCodec(),
            "transformer": WanTransformer3DModel(
                num_attention_heads=4,
                attention_head_dim=32,
                in_channels=16,
                out_channels=16,
                text_dim=TEXT_DIM,
                ffn_dim=512,
                num_layers=4,
                freq_dim=64,
            ),
            "text_encoder": T5EncoderModel(
                T5Config(
                    vocab_size=len(tokenizer),
                    d_model=TEXT_DIM,
                    d_kv=16,
                    d_ff=128,
                    num_layers=2,
                    num_heads=4,
                    relative_attention_num_buckets=16,
                    relative_attention_max_distance=32,
                    dropout_rate=0.0,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
            ),
            "tokenizer": tokenizer,
            "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT),
        }


def settings() -> dict[str, object]:
    """How a pipeline of these components is set up: arguments of `MemFlowPipeline`."""
    return {
        "denoising_steps": DENOISING_STEPS,
        "fps": FPS,
        "text_length": TEXT_LENGTH,
        "height": 512,
        "width": 512,
        "memory": MEMORY,
    }


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word of the world is a token; case does not matter; other words are all the same, unknown token."""
    vocabulary = {token: i for i, token in enumerate([_PAD, _END, _UNKNOWN, *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", special_tokens=[(_END, vocabulary[_END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END, unk_token=_UNKNOWN, padding_side="right"
    )


@torch.no_grad()
def encode_frames(codec: StorybookCodec, numbers: Tensor) -> Tensor:
    """Latents of frames given by `Frame.number`: numbers [...] on the CPU -> [..., channels, 8, 8] on its device."""
    different, where = numbers.unique(return_inverse=True)
    return codec.encode(render(Frame.of(different)).to(codec.device))[where.to(codec.device)]
