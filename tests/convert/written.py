"""Tiny files in the layouts of the original repositories, with random weights, and the names they get in diffusers.

The names of the transformer come from the recorded parameter list of the published models; those of VAE and UMT5 are
written out here a second time, so that a slip in the product's tables or in a library's mapping cannot hide.
"""

import json
from pathlib import Path

import torch
from transformers import T5TokenizerFast

LISTS = json.loads((Path(__file__).parents[1] / "golden" / "data" / "wan_parameter_names.json").read_text())
SMALL = {1536: 48, 8960: 40, 9216: 6 * 48, 4096: 24, 256: 32}  # sizes of the 1.3B model, and here
HEADS, LAYERS = 4, 2
PIECES = ["<pad>", "</s>", "<unk>", "▁a", "▁fox", "▁runs", "▁sleeps", "▁the", "▁owl"]
VAE_WIDTHS = {96: 4, 192: 8, 384: 16, 768: 32, 576: 24, 1152: 48}


def random(shape, generator):
    return torch.randn(shape, generator=generator) * 0.2


def transformer(seed: int = 0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in LISTS["wan2.1-t2v-1.3b"]["tensors"].items():
        if name.startswith("blocks.") and int(name.split(".")[1]) >= LAYERS:
            continue
        tensors[name] = random([SMALL.get(size, size) for size in shape], generator).to(dtype)
    return tensors


def text_encoder(seed: int = 1, layers: int = 2, vocabulary: int = 12, dim: int = 24) -> dict[str, torch.Tensor]:
    """As published, from wan/modules/t5.py: no bias, one position embedding per block, gated feed-forward."""
    generator = torch.Generator().manual_seed(seed)
    inner, heads, wide = 18, 3, 40
    tensors = {"token_embedding.weight": random([vocabulary, dim], generator)}
    for i in range(layers):
        block = {
            "norm1.weight": [dim],
            "attn.q.weight": [inner, dim],
            "attn.k.weight": [inner, dim],
            "attn.v.weight": [inner, dim],
            "attn.o.weight": [dim, inner],
            "norm2.weight": [dim],
            "ffn.gate.0.weight": [wide, dim],
            "ffn.fc1.weight": [wide, dim],
            "ffn.fc2.weight": [dim, wide],
            "pos_embedding.embedding.weight": [32, heads],
        }
        tensors |= {f"blocks.{i}.{name}": random(shape, generator) for name, shape in block.items()}
    return tensors | {"norm.weight": random([dim], generator)}


UMT5_NAMES = {
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    **{f"attn.{x}": f"layer.0.SelfAttention.{x}" for x in "qkvo"},
}


def umt5_name(original: str) -> str:
    if not original.startswith("blocks."):
        return {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}[original]
    _, i, rest = original.split(".", 2)
    return f"encoder.block.{i}.{UMT5_NAMES[rest.removesuffix('.weight')]}.weight"


def vae_table() -> dict[str, tuple[str, list[int]]]:
    """Original names to diffusers' names and published shapes of the Wan 2.1 VAE."""
    table = {}

    def conv(old, new, out, into, *kernel):
        table[f"{old}.weight"] = f"{new}.weight", [out, into, *kernel]
        table[f"{old}.bias"] = f"{new}.bias", [out]

    def residual(old, new, into, out):
        table[f"{old}.residual.0.gamma"] = f"{new}.norm1.gamma", [into, 1, 1, 1]
        conv(f"{old}.residual.2", f"{new}.conv1", out, into, 3, 3, 3)
        table[f"{old}.residual.3.gamma"] = f"{new}.norm2.gamma", [out, 1, 1, 1]
        conv(f"{old}.residual.6", f"{new}.conv2", out, out, 3, 3, 3)
        if into != out:
            conv(f"{old}.shortcut", f"{new}.conv_shortcut", out, into, 1, 1, 1)

    def ends(side, first, into, last, out):
        conv(f"{side}.conv1", f"{side}.conv_in", first, into, 3, 3, 3)
        for old, new in ((0, 0), (2, 1)):
            residual(f"{side}.middle.{old}", f"{side}.mid_block.resnets.{new}", 384, 384)
        attention = f"{side}.mid_block.attentions.0"
        table[f"{side}.middle.1.norm.gamma"] = f"{attention}.norm.gamma", [384, 1, 1]
        conv(f"{side}.middle.1.to_qkv", f"{attention}.to_qkv", 1152, 384, 1, 1)
        conv(f"{side}.middle.1.proj", f"{attention}.proj", 384, 384, 1, 1)
        table[f"{side}.head.0.gamma"] = f"{side}.norm_out.gamma", [last, 1, 1, 1]
        conv(f"{side}.head.2", f"{side}.conv_out", out, last, 3, 3, 3)

    conv("conv1", "quant_conv", 32, 32, 1, 1, 1)
    conv("conv2", "post_quant_conv", 16, 16, 1, 1, 1)
    ends("encoder", 96, 3, 384, 32)
    ends("decoder", 384, 16, 96, 3)
    down = [(96, 96), (96, 96), 96, (96, 192), (192, 192), 192, (192, 384), (384, 384), 384, (384, 384), (384, 384)]
    for i, step in enumerate(down):
        old, new = f"encoder.downsamples.{i}", f"encoder.down_blocks.{i}"
        if isinstance(step, tuple):
            residual(old, new, *step)
        else:
            conv(f"{old}.resample.1", f"{new}.resample.1", step, step, 3, 3)
            if i > 2:
                conv(f"{old}.time_conv", f"{new}.time_conv", step, step, 3, 1, 1)
    up = [[(384, 384)] * 3 + [384], [(192, 384), (384, 384), (384, 384), 384], [(192, 192)] * 3 + [192], [(96, 96)] * 3]
    for stage, steps in enumerate(up):
        for j, step in enumerate(steps):
            old, new = f"decoder.upsamples.{4 * stage + j}", f"decoder.up_blocks.{stage}"
            if isinstance(step, tuple):
                residual(old, f"{new}.resnets.{j}", *step)
            else:
                conv(f"{old}.resample.1", f"{new}.upsamplers.0.resample.1", step // 2, step, 3, 3)
                if stage < 2:
                    conv(f"{old}.time_conv", f"{new}.upsamplers.0.time_conv", 2 * step, step, 3, 1, 1)
    return table


def vae(seed: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: random([VAE_WIDTHS.get(size, size) for size in shape], generator)
        for name, (_, shape) in vae_table().items()
    }


def vae_2_2_names() -> dict[str, str]:
    """Original names to diffusers' names of the Wan 2.2 VAE: as Wan 2.1's, but for its stages of blocks."""
    names = {old: new for old, (new, _) in vae_table().items() if "samples." not in old}

    def conv(old, new):
        names.update({f"{old}.{part}": f"{new}.{part}" for part in ("weight", "bias")})

    for side, way, blocks, wider, timed in (
        ("encoder", "down", 2, (1, 2), (1, 2)),
        ("decoder", "up", 3, (2, 3), (0, 1)),
    ):
        for stage in range(4):
            old, new = f"{side}.{way}samples.{stage}.{way}samples", f"{side}.{way}_blocks.{stage}"
            for block in range(blocks):
                for at, norm in ((0, "norm1"), (3, "norm2")):
                    names[f"{old}.{block}.residual.{at}.gamma"] = f"{new}.resnets.{block}.{norm}.gamma"
                conv(f"{old}.{block}.residual.2", f"{new}.resnets.{block}.conv1")
                conv(f"{old}.{block}.residual.6", f"{new}.resnets.{block}.conv2")
            if stage in wider:
                conv(f"{old}.0.shortcut", f"{new}.resnets.0.conv_shortcut")
            if stage < 3:
                conv(f"{old}.{blocks}.resample.1", f"{new}.{way}sampler.resample.1")
            if stage in timed:
                conv(f"{old}.{blocks}.time_conv", f"{new}.{way}sampler.time_conv")
    return names


def lora(rank: int = 3, seed: int = 3, modules=("self_attn.q", "self_attn.v", "cross_attn.o", "ffn.0", "ffn.2")):
    """Factors for some modules of `transformer()`, by their plain names."""
    generator, base, tensors = torch.Generator().manual_seed(seed), transformer(), {}
    for i in range(LAYERS):
        for module in modules:
            out, into = base[f"blocks.{i}.{module}.weight"].shape
            tensors[f"blocks.{i}.{module}.lora_A.weight"] = random([rank, into], generator)
            tensors[f"blocks.{i}.{module}.lora_B.weight"] = random([out, rank], generator)
    return tensors


def tokenizer(folder: Path) -> Path:
    """A tokenizer of a few words, where the Wan repository has that of UMT5."""
    T5TokenizerFast(vocab=[(piece, -1.0) for piece in PIECES], extra_ids=0).save_pretrained(folder)
    return folder


def wan_folder(folder: Path) -> Path:
    """A folder with the files of Wan-AI/Wan2.1-T2V-1.3B."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(transformer(), folder / "diffusion_pytorch_model.safetensors")
    torch.save(text_encoder(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(vae(), folder / "Wan2.1_VAE.pth")
    tokenizer(folder / "google" / "umt5-xxl")
    return folder
