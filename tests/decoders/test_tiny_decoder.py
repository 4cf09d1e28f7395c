"""The tiny decoder: the layout of the TAEHV checkpoints, and a stream that equals the whole clip."""

from __future__ import annotations

import pytest
import torch
from peak import peak_bytes
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from memflow import MemFlowError, MemFlowPipeline
from memflow.cli import main
from memflow.decoders import stream_decoder, use_decoder
from memflow.decoders.taehv import TinyVideoDecoder
from memflow_bench.untrained import noise_pipeline

SMALL = {"latent_channels": 4, "channels": (8, 6, 4, 4)}
LATENTS = torch.randn(2, 4, 7, 3, 5, generator=torch.Generator().manual_seed(0))


def built(**sizes) -> TinyVideoDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return TinyVideoDecoder(**sizes).eval()


@pytest.fixture(scope="module", params=[{}, {"patch_size": 2}], ids=["taew2_1", "patches"])
def decoder(request) -> TinyVideoDecoder:
    return built(**SMALL, **request.param)


def write_checkpoint(model: TinyVideoDecoder, path) -> None:
    """As the files of that project are: the encoder beside the decoder."""
    tensors = dict(model.state_dict()) | {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)


def test_layout_is_that_of_taew2_1():
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in TinyVideoDecoder().state_dict().items()}
    # The file has 128 tensors, half of them the encoder's, and 22,642,902 bytes in float16; 1,470,928 numbers are the
    # encoder's, and its header takes less than 100 bytes per tensor.
    assert len(shapes) == 64
    decoder_bytes = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    assert 0 < 22_642_902 - 2 * 1_470_928 - decoder_bytes < 128 * 100
    assert shapes["decoder.1.weight"] == (256, 16, 3, 3)
    assert shapes["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    assert shapes["decoder.5.conv.4.bias"] == (256,)
    assert shapes["decoder.7.conv.weight"] == (256, 256, 1, 1)
    assert shapes["decoder.13.conv.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.20.weight"] == (64, 64, 3, 3)
    assert shapes["decoder.22.weight"] == (3, 64, 3, 3)


@torch.no_grad()
def frame_by_frame(weights: dict, latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Told again, one frame at a time: layers by number, each remembering the frame that it saw last."""
    seen: dict[int, torch.Tensor] = {}

    def weighted(x, name, padding=1):
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding=padding)

    def run(x, layer):
        if layer == 23:
            return [F.pixel_shuffle(x, patch_size).clamp(0, 1)]
        name = f"decoder.{layer}"
        if layer == 0:
            return run(3 * torch.tanh(x / 3), 1)
        if layer in (2, 21):
            return run(x.relu(), layer + 1)
        if layer in (6, 12, 18):
            return run(x.repeat_interleave(2, -1).repeat_interleave(2, -2), layer + 1)
        if layer in (7, 13, 19):
            made = weighted(x, f"{name}.conv", padding=0)
            return [frame for part in made.split(x.shape[1], dim=1) for frame in run(part, layer + 1)]
        if f"{name}.conv.0.weight" in weights:
            out = torch.cat([x, seen.get(layer, torch.zeros_like(x))], dim=1)
            seen[layer] = x
            out = weighted(weighted(weighted(out, f"{name}.conv.0").relu(), f"{name}.conv.2").relu(), f"{name}.conv.4")
            return run((out + x).relu(), layer + 1)
        return run(weighted(x, name), layer + 1)

    frames = [frame for latent in latents.unbind(2) for frame in run(latent, 0)]
    return torch.stack(frames[3:], dim=2) * 2 - 1


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_chunks_equal_the_whole_clip(decoder, size):
    expected = frame_by_frame(decoder.state_dict(), LATENTS, decoder.config.patch_size)
    stream = stream_decoder(decoder)
    video = torch.cat([part for chunk in LATENTS.split(size, dim=2) for part in stream._parts(chunk)], dim=2)
    assert expected.std() > 0.01
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-5)


def test_pixels_and_factors(decoder):
    stream, made = stream_decoder(decoder), []
    exact = frame_by_frame(decoder.state_dict(), LATENTS, decoder.config.patch_size)
    for chunk in LATENTS.split(3, dim=2):
        video = stream.decode(chunk)
        assert video.dtype == torch.uint8
        assert video.shape[1] == 4 * chunk.shape[2] - (0 if made else 3)  # one frame of the first latent frame
        assert video.shape[2:] == (3 * stream.spatial_factor, 5 * stream.spatial_factor, 3)
        made.append(video)
    assert stream.temporal_factor == 4
    levels = (exact / 2 + 0.5).permute(0, 2, 3, 4, 1) * 255
    assert (torch.cat(made, dim=1) - levels).abs().max() < 0.501


@pytest.mark.parametrize("done", [0, 1, 5])
def test_state_continues_in_a_new_decoder(decoder, done, tmp_path):
    stream = stream_decoder(decoder)
    if done:
        stream.decode(LATENTS[:, :, :done])
    save_file(stream.state_dict(), tmp_path / "state.safetensors")
    expected = stream.decode(LATENTS[:, :, done:])
    resumed = stream_decoder(decoder)
    resumed.decode(LATENTS[:, :, :2] + 1)  # what it held before is forgotten
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(resumed.decode(LATENTS[:, :, done:]), expected)
    with pytest.raises(ValueError, match="does not fit a TinyVideoDecoder"):
        resumed.load_state_dict({"frames": torch.tensor(1), "repeat": torch.zeros(0)})


def test_memory_does_not_grow_with_the_video(decoder):
    stream = stream_decoder(decoder)
    peaks = [peak_bytes(lambda: stream.decode(LATENTS[:, :, :2])) for _ in range(6)]
    assert max(peaks[2:]) <= 1.02 * peaks[1]
    assert len({sum(x.nbytes for x in stream.state_dict().values())}) == 1
    whole = [peak_bytes(lambda n=n: stream_decoder(decoder).decode(LATENTS.repeat(1, 1, n, 1, 1))) for n in (1, 4)]
    assert whole[1] > 2 * whole[0], "the counter sees growth"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_loads(decoder, tmp_path, suffix):
    path = tmp_path / f"taew2_1{suffix}"
    write_checkpoint(decoder, path)
    loaded = TinyVideoDecoder.from_original(path, dtype=torch.float64)
    for size in ("latent_channels", "channels", "grow", "patch_size"):
        assert loaded.config[size] == decoder.config[size]
    for name, weight in decoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.double())


def test_other_files_are_refused_by_name(tmp_path):
    tensors = dict(built(**SMALL).state_dict())
    for change, complaint in (
        (
            {"decoder.9.conv.2.weight": torch.zeros(6, 5, 3, 3)},
            r"1 parameters .* decoder.9.conv.2.weight: \(6, 5, 3, 3\)",
        ),
        ({"decoder.4.conv.4.bias": None}, "decoder.4.conv.4.bias: None where"),
        ({"decoder.3.skip.weight": torch.zeros(8, 8, 1, 1)}, r"decoder.3.skip.weight: \(8, 8, 1, 1\) where None"),
        ({"decoder.13.conv.weight": None}, "no usable decoder.13.conv.weight"),
    ):
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, tmp_path / "x.safetensors")
        with pytest.raises(MemFlowError, match=complaint):
            TinyVideoDecoder.from_original(tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(MemFlowError, match="not a TAEHV decoder"):
        TinyVideoDecoder.from_original(tmp_path / "x.safetensors")
    (tmp_path / "x.pth").write_text("hello")
    for name in ("x.pth", "missing.pth", "missing.safetensors"):
        with pytest.raises(MemFlowError, match="cannot be read as a checkpoint"):
            TinyVideoDecoder.from_original(tmp_path / name)
    for content in ([1], torch.zeros(2), {1: torch.zeros(2)}, {"decoder.1.weight": "x"}):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(MemFlowError, match=r"cannot be read as a checkpoint|not a TAEHV decoder"):
            TinyVideoDecoder.from_original(tmp_path / "x.pth")


# -- in the pipeline ---------------------------------------------------------------------------------------------------

FOR_THE_TOY = {"latent_channels": 192, "channels": (8, 8, 8), "grow": (2, 2)}


def test_in_the_pipeline(tmp_path):
    pipeline = noise_pipeline()
    write_checkpoint(built(**FOR_THE_TOY), tmp_path / "tiny.pth")
    use_decoder(pipeline, tmp_path / "tiny.pth")
    chunks = list(pipeline.stream(["a red boat"], seconds_per_prompt=1.5, height=32, width=32))
    assert [chunk.frames.shape for chunk in chunks] == [(1, 9, 32, 32, 3), (1, 12, 32, 32, 3)]
    pipeline.save_pretrained(tmp_path / "saved")
    again = MemFlowPipeline.from_pretrained(tmp_path / "saved")
    assert isinstance(again.vae, TinyVideoDecoder)
    latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
    frames = torch.cat([chunk.frames for chunk in chunks], dim=1)
    assert (stream_decoder(again.vae).decode(latents).int() - frames).abs().max() <= 1

    replaced = MemFlowPipeline.from_pretrained(
        tmp_path / "saved", vae=TinyVideoDecoder.from_original(tmp_path / "tiny.pth", torch.bfloat16)
    )
    assert replaced.vae.dtype == torch.bfloat16

    write_checkpoint(built(**FOR_THE_TOY | {"latent_channels": 16}), tmp_path / "other.pth")
    with pytest.raises(MemFlowError, match="latents of 16 channels, this model makes 192"):
        use_decoder(pipeline, tmp_path / "other.pth")
    write_checkpoint(built(**FOR_THE_TOY | {"grow": (2, 1)}), tmp_path / "other.pth")
    with pytest.raises(MemFlowError, match="makes 2 frames and 4 pixels of a latent one, the model's VAE 4 and 4"):
        use_decoder(pipeline, tmp_path / "other.pth")


def test_on_the_command_line(tmp_path, capfd):
    write_checkpoint(built(**FOR_THE_TOY), tmp_path / "tiny.pth")
    noise_pipeline().save_pretrained(tmp_path / "noise")
    model = ["--model", str(tmp_path / "noise")]
    short = [*model, "--height", "32", "--width", "32", "--device", "cpu", "--seconds-per-prompt", "1.5"]
    state, video = str(tmp_path / "state"), str(tmp_path / "a.mp4")
    begin = ["generate", "-p", "a red boat", "-p", "an owl", *short, "--decoder", str(tmp_path / "tiny.pth")]
    assert main([*begin, "-o", video, "--chunks", "3", "--save-state", state]) == 0
    assert main(["generate", "--resume", state, "-o", video, *model]) == 0
    assert "45 frames" in capfd.readouterr().out
    assert main(["generate", "--resume", state, "-o", video, *model, "--decoder", str(tmp_path / "tiny.pth")]) == 2
    assert "leave out --decoder" in capfd.readouterr().err
    assert main([*begin[:-1], str(tmp_path / "none.pth"), "-o", video]) == 2
    assert "none.pth: cannot be read: No such file" in capfd.readouterr().err
