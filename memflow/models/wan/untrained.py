"""The preset `noise`: a pipeline of tiny components with random weights, for tests and measurements of the machinery.

Architecture and code path are those of the real models. The weights are random, from a fixed seed, and so arranged that
something can be watched: a cloth of colours that the prompt decides and that remembers what it looked like.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from memflow.decoders.codec import PixelShuffleCodec

DEFAULT_SIZE = (64, 64)  # video height and width, in pixels
MAX_LENGTH = 128  # of a prompt, in bytes
_TEXT_DIM = 64


def build(seed: int = 7) -> dict[str, object]:
    """The components of a pipeline by name, in float32 on the CPU, in eval mode.

    Equal for equal seeds; torch's global random state is left as it was. Of the first ten seeds 7 tells prompts apart
    best by their colours.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = PixelShuffleCodec()
        return {
            "transformer": _transformer(vae),
            "text_encoder": _text_encoder(),
            "tokenizer": ByT5Tokenizer(),
            "vae": vae.eval(),
            "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0),
        }


def _text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=384,  # ByT5: 256 bytes, 3 specials, 125 sentinels
        d_model=_TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        tie_word_embeddings=False,
    )
    return UMT5EncoderModel(config).eval()


def _transformer(vae: PixelShuffleCodec) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=vae.channels,
        out_channels=vae.channels,
        text_dim=_TEXT_DIM,
        ffn_dim=256,
        num_layers=4,
    )
    _make_watchable(model, vae.band_scale)
    return model.eval()


@torch.no_grad()
def _make_watchable(model: WanTransformer3DModel, band_scale: torch.Tensor) -> None:
    """Without this the flow knows nothing of the noise that it should cancel, and every frame is grey snow."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.bias.zero_()  # or all prompts share most of what they show
    softness = _carry_slow_bands(model, band_scale)
    model.scale_shift_table.zero_()
    model.condition_embedder.time_embedder.linear_2.weight.mul_(0.3)
    model.condition_embedder.time_proj.weight.mul_(0.3)
    size = model.config.attention_head_dim
    axis = 2 * (size // 6)  # rotary channels of rows, and of columns, at the end of a head
    slowest_pairs = [size - 2 * axis, size - 2 * axis + 2, size - axis, size - axis + 2]
    for block in model.blocks:
        # What a layer adds goes to the slow bands: the text most of all, then the past, then the nonlinear rest.
        for layer, strength in ((block.attn2.to_out[0], 4.0), (block.attn1.to_out[0], 1.5), (block.ffn.net[2], 0.3)):
            layer.weight.mul_(strength * softness[:, None])
        block.scale_shift_table[:, (2, 5)] += 0.4  # the gates, so that no layer works against its own output
        # Queries of the prompt that hardly see the noise, and sharp: each head and layer picks a few bytes.
        block.attn2.to_q.weight.mul_(0.2)
        nn.init.normal_(block.attn2.to_q.bias)
        block.attn2.norm_q.weight.mul_(8.0)
        # Self-attention looks at its own place in all frames: equal offsets under the rotation of row and column.
        for layer, norm in ((block.attn1.to_q, block.attn1.norm_q), (block.attn1.to_k, block.attn1.norm_k)):
            layer.bias.view(-1, size)[:, slowest_pairs] = 4.0
            norm.weight.mul_(1.5)


def _carry_slow_bands(model: WanTransformer3DModel, band_scale: torch.Tensor) -> torch.Tensor:
    """Lets the residual stream carry the slowest bands of a patch, whose noise the output projection can then cancel.

    Returns how slow each hidden channel is, [dim], with a root mean square of 1.
    """
    dim, channels = model.patch_embedding.weight.shape[:2]
    bands = dim // 4  # of each of the 2 x 2 latent pixels of a patch, mixed to sum and differences
    mix = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
    carry = torch.zeros(4, bands, channels, 4)  # [mixture, band and colour, latent channel, pixel of the patch]
    for channel in range(bands):
        carry[:, channel, channel] = mix
    model.patch_embedding.weight.copy_(carry.reshape(model.patch_embedding.weight.shape))
    model.patch_embedding.bias.zero_()
    # x0 = x - sigma v, and the last sigma is 0.625: a flow of x / 0.625 leaves no noise in the picture.
    model.proj_out.weight.copy_(1.6 * carry.permute(3, 2, 0, 1).reshape(model.proj_out.weight.shape))
    slow = (band_scale / band_scale[0])[:, None].expand(-1, 3).flatten()[:bands]
    softness = torch.stack([slow, *[0.3 * slow] * 3]).flatten() ** 2
    return softness / softness.square().mean().sqrt()
