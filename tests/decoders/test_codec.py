import json

import pytest
import torch
from diffusers import AutoencoderKLWan
from peak import peak_bytes
from safetensors.torch import load_file, save_file

from memflow import MemFlowError, MemFlowPipeline
from memflow.decoders import stream_decoder
from memflow_bench.untrained import PixelShuffleCodec

WAN = {
    "wan2.1": {"dim_mult": [1, 2, 2], "temperal_downsample": [False, True]},
    "wan2.2": {
        "dim_mult": [1, 2, 2, 2],
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
    },
}
MEAN, STD = [0.1, -0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 0.5]
LATENTS = torch.randn(2, 4, 7, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=list(WAN))
def vae(request) -> AutoencoderKLWan:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoencoderKLWan(
            base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=MEAN, latents_std=STD, **WAN[request.param]
        )
    return model.eval()


@pytest.fixture(scope="module")
def whole(vae) -> torch.Tensor:
    per_channel = (1, -1, 1, 1, 1)
    with torch.no_grad():
        return vae.decode(LATENTS * torch.tensor(STD).view(per_channel) + torch.tensor(MEAN).view(per_channel)).sample


@pytest.mark.parametrize(("temporal", "spatial"), [(4, 4), (1, 8), (3, 1)])
def test_pixel_shuffle_gives_back_every_value(temporal, spatial):
    codec = PixelShuffleCodec(temporal, spatial)
    video = torch.randint(0, 256, (2, 2 * temporal, 3 * spatial, 5 * spatial, 3), dtype=torch.uint8)
    video[0, 0, 0, 0] = torch.tensor([0, 128, 255])
    latents = codec.encode(video)
    assert latents.shape == (2, codec.channels, 2, 3, 5)
    assert torch.equal(codec.decode(latents), video)


def test_pixel_shuffle_blocks_lie_where_they_belong():
    codec = PixelShuffleCodec(2, 4)
    latents = torch.zeros(1, codec.channels, 3, 2, 2)
    grey = codec.decode(latents)
    latents[0, 1, 1, 0, 1] = 1.0  # the slowest band of green
    changed = (codec.decode(latents) != grey).nonzero()
    assert grey.unique().tolist() == [128]
    assert changed.amin(0).tolist() == [0, 2, 0, 4, 1]
    assert changed.amax(0).tolist() == [0, 3, 3, 7, 1]


def test_noise_decodes_to_neither_snow_nor_saturation():
    noise = torch.randn(1, 192, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pixels = PixelShuffleCodec().decode(noise).float()
    assert 30 < pixels.std() < 70
    assert ((pixels < 3) | (pixels > 252)).float().mean() < 0.01
    step = (pixels[..., 1:, :] - pixels[..., :-1, :]).square().mean().sqrt()
    assert step < 1.1 * pixels.std()  # white noise: 1.41


def test_pixel_shuffle_survives_saving(tmp_path):
    PixelShuffleCodec(2, 8).save_pretrained(tmp_path)
    codec = PixelShuffleCodec.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (codec.config.temporal, codec.config.spatial, codec.dtype) == (2, 8, torch.bfloat16)
    video = torch.randint(0, 256, (1, 2, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(codec.decode(codec.encode(video)), video)


def test_pixel_shuffle_names_what_does_not_fit():
    codec = PixelShuffleCodec()
    with pytest.raises(ValueError, match=r"latents must be \[B, 192, F, h, w\], got \[1, 16, 3, 2, 2\]"):
        codec.decode(torch.zeros(1, 16, 3, 2, 2))
    with pytest.raises(ValueError, match=r"uint8 \[B, T, H, W, 3\], got torch.float32"):
        codec.encode(torch.zeros(1, 4, 4, 4, 3))
    with pytest.raises(ValueError, match="5 frames of 4x4"):
        codec.encode(torch.zeros(1, 5, 4, 4, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="spatial"):
        PixelShuffleCodec(4, 0)
    with pytest.raises(ValueError, match="no decoder state"):
        stream_decoder(codec).load_state_dict({"frames": torch.tensor(1)})


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_wan_chunks_equal_the_whole_clip(vae, whole, size):
    decoder = stream_decoder(vae)
    video = torch.cat([part for chunk in LATENTS.split(size, dim=2) for part in decoder._parts(chunk)], dim=2)
    torch.testing.assert_close(video, whole, atol=1e-5, rtol=0)


def test_wan_frames_are_the_pixels_of_the_whole_clip(vae, whole):
    decoder = stream_decoder(vae)
    video = torch.cat([decoder.decode(chunk) for chunk in LATENTS.split(3, dim=2)], dim=1)
    assert video.dtype == torch.uint8
    levels = (whole / 2 + 0.5).permute(0, 2, 3, 4, 1) * 255
    assert (video - levels).abs().max() < 0.501


@pytest.mark.parametrize("done", [0, 1, 2, 5])
def test_wan_state_continues_in_a_new_decoder(vae, done, tmp_path):
    decoder = stream_decoder(vae)
    if done:
        decoder.decode(LATENTS[:, :, :done])
    save_file(decoder.state_dict(), tmp_path / "state.safetensors")
    expected = decoder.decode(LATENTS[:, :, done:])
    resumed = stream_decoder(vae)
    resumed.decode(LATENTS[:, :, :3] + 1)  # what it held before is forgotten
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(resumed.decode(LATENTS[:, :, done:]), expected)


def test_wan_memory_does_not_grow_with_the_video(vae):
    decoder, held = stream_decoder(vae), []
    seen = []
    hook = vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[2]))
    try:
        for _ in range(6):
            decoder.decode(LATENTS[:, :, :2])
            held.append(sum(tensor.nbytes for tensor in decoder.state_dict().values()))
    finally:
        hook.remove()
    assert len(set(held[1:])) == 1
    assert set(seen) == {1}  # a pass of the decoder never sees more than one latent frame


def test_two_wan_streams_do_not_disturb_each_other(vae):
    alone = stream_decoder(vae).decode(LATENTS)
    first, second = stream_decoder(vae), stream_decoder(vae)
    frames = []
    for chunk in LATENTS.split(3, dim=2):
        frames.append(first.decode(chunk))
        second.decode(-chunk)
    assert torch.equal(torch.cat(frames, dim=1), alone)


def test_factors_are_those_of_the_decoded_video(vae):
    for model, latents, first in ((vae, LATENTS, 1), (PixelShuffleCodec(4, 2), torch.zeros(1, 48, 7, 4, 6), 4)):
        decoder, made = stream_decoder(model), 0
        for chunk in latents.split(3, dim=2):
            video = decoder.decode(chunk)
            made += video.shape[1]
            assert video.shape[2:4] == (4 * decoder.spatial_factor, 6 * decoder.spatial_factor)
        assert made == first + 6 * decoder.temporal_factor
    assert stream_decoder(PixelShuffleCodec(4, 2)).temporal_factor == 4


def test_decoders_name_what_they_cannot_serve(vae):
    with pytest.raises(TypeError, match="got Linear"):
        stream_decoder(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="does not fit"):
        stream_decoder(vae).load_state_dict({"frames": torch.tensor(1)})
    with pytest.raises(ValueError, match="does not fit"):
        stream_decoder(vae).load_state_dict({"repeat": torch.tensor([999]), "frames": torch.tensor(1)})
    vae.enable_tiling()
    try:
        with pytest.raises(ValueError, match="disable_tiling"):
            stream_decoder(vae)
    finally:
        vae.disable_tiling()


def test_wan_peak_memory_does_not_grow_with_the_video(vae):
    decoder = stream_decoder(vae)
    peaks = [peak_bytes(lambda: decoder.decode(LATENTS[:, :, :2])) for _ in range(6)]
    assert max(peaks[2:]) <= 1.02 * peaks[1]
    with torch.no_grad():
        whole = [peak_bytes(lambda n=n: vae.decode(LATENTS[:, :, :n])) for n in (2, 7)]
    assert whole[1] > 1.1 * whole[0], "the counter sees growth"


OLDER = [["memflow.toy.codec", "StorybookCodec"], ["memflow.decoders.storybook", "StorybookCodec"]]


@pytest.mark.parametrize("vae", OLDER, ids=lambda vae: vae[0])
def test_a_folder_that_names_an_older_module_loads(vae, tmp_path):
    MemFlowPipeline.from_preset().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["memflow.decoders.independent", "StorybookCodec"]
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"vae": vae}))
    pipeline = MemFlowPipeline.from_pretrained(tmp_path)
    assert type(pipeline.vae).__module__ == "memflow.decoders.independent"
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"vae": ["memflow.codec", "PixelShuffleCodec"]}))
    with pytest.raises(MemFlowError, match=r"PixelShuffleCodec.* has left memflow; memflow_bench\.untrained"):
        MemFlowPipeline.from_pretrained(tmp_path)


def test_presets_of_earlier_versions_are_named():
    for name, message in (("toy", "is called 'storybook' now"), ("noise", r"memflow_bench\.untrained"), ("x", "'x'")):
        with pytest.raises(MemFlowError, match=message):
            MemFlowPipeline.from_preset(name)
