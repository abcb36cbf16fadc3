"""Loading: what is computed stays what it was, and what cannot be loaded is named."""

import sys
import types

import pytest
import torch
from diffusers import UNet2DConditionModel
from original_layout import original_checkpoint, original_unet
from safetensors.torch import save_file

from lib_hires.engines import checkpoint, structure
from lib_hires.engines.files import CheckpointError
from lib_hires.unet.layout import read_layout

FAMILIES = ("sd1", "sd2", "sdxl")


def inputs(unet, seed=0):
    made = torch.Generator().manual_seed(seed)
    config = unet.config
    x = torch.randn(2, config.in_channels, 9, 12, generator=made)
    context = torch.randn(2, 77, config.cross_attention_dim, generator=made)
    added = None
    if config.addition_embed_type:
        added = {
            "text_embeds": torch.randn(2, 64, generator=made),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
        }
    return (x, torch.tensor(500)), {"encoder_hidden_states": context, "added_cond_kwargs": added}


@torch.no_grad()
def answer(unet, seed=0):
    args, named = inputs(unet, seed)
    return unet(*args, **named).sample


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_computes_what_the_networks_in_it_did(tiny, family):
    path, _, parts = tiny(family)
    loaded = checkpoint.load(path)
    assert loaded.family == family
    assert torch.equal(answer(loaded.unet), answer(parts["unet"]))
    picture = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latent = parts["vae"].encode(picture).latent_dist.mode()
        assert torch.equal(loaded.vae.encode(picture).latent_dist.mode(), latent)
        assert torch.equal(loaded.vae.decode(latent).sample, parts["vae"].decode(latent).sample)


@pytest.mark.parametrize(
    "family, scaling, prediction",
    [
        ("sd1", 0.18215, "epsilon"),
        ("sd2", 0.18215, "v_prediction"),
        ("sdxl", 0.13025, "epsilon"),
    ],
)
def test_what_shapes_cannot_tell_follows_the_family(tiny, family, scaling, prediction):
    loaded = checkpoint.load(tiny(family)[0])
    assert (loaded.scaling_factor, loaded.prediction_type) == (scaling, prediction)
    assert loaded.native_resolution == 64
    assert len(loaded.tokenizers) == len(loaded.text_encoders) == (2 if family == "sdxl" else 1)


CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
PUBLISHED = {  # from the unet/config.json of the diffusers releases
    "sd1": {
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (8, 8, 8, 8),
        "cross_attention_dim": 768,
        "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
        "use_linear_projection": False,
        "transformer_layers_per_block": (1, 1, 1, 1),
    },
    "sd2": {
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 1, 1, 1),
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "down_block_types": (PLAIN, CROSS, CROSS),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_size_networks_are_read_from_their_shapes(family):
    ups = tuple(kind.replace("Down", "Up") for kind in reversed(PUBLISHED[family]["down_block_types"]))
    with torch.device("meta"):
        unet = UNet2DConditionModel(**PUBLISHED[family], up_block_types=ups)
    prefix = len("model.diffusion_model.")
    shapes = {name[prefix:]: tuple(value.shape) for name, value in original_unet(unet).items()}
    config = structure.unet_config(shapes, family, {}, pooled_width=1280)
    assert {name: config[name] for name in PUBLISHED[family]} == PUBLISHED[family]
    assert config["up_block_types"] == ups


def test_an_inpainting_unet_is_told_by_its_input_channels(tiny):
    path, _, parts = tiny("sd1", in_channels=9)
    loaded = checkpoint.load(path)
    assert loaded.is_inpainting
    assert torch.equal(answer(loaded.unet), answer(parts["unet"]))


@pytest.mark.parametrize("linear, heads", [(False, {"num_heads": 8}), (True, {"num_head_channels": 64})])
def test_ldms_own_unet_gives_the_same_answer(tiny, tmp_path, monkeypatch, linear, heads):
    openaimodel = ldm_module("openaimodel", monkeypatch)
    torch.manual_seed(5)
    theirs = openaimodel.UNetModel(
        image_size=8,
        in_channels=4,
        out_channels=4,
        model_channels=64,
        attention_resolutions=[4, 2, 1],
        num_res_blocks=2,
        channel_mult=[1, 2],
        use_spatial_transformer=True,
        transformer_depth=1,
        context_dim=64,
        use_checkpoint=False,
        legacy=False,
        use_linear_in_transformer=linear,
        **heads,
    ).eval()
    with torch.no_grad():
        for weight in theirs.parameters():  # ldm starts some layers at zero, which would hide what they do
            weight.add_(torch.randn_like(weight) * 0.02)
    _, tensors, _ = tiny("sd2" if linear else "sd1")
    others = {name: value for name, value in tensors.items() if not name.startswith("model.diffusion_model.")}
    mine = {f"model.diffusion_model.{name}": value for name, value in theirs.state_dict().items()}
    save_file(others | mine, tmp_path / "real.safetensors")
    loaded = checkpoint.load(tmp_path / "real.safetensors")
    (x, t), named = inputs(loaded.unet)
    x = x[..., :8, :]
    with torch.no_grad():
        wanted = theirs(x, t.repeat(2), context=named["encoder_hidden_states"])
        got = loaded.unet(x, t, encoder_hidden_states=named["encoder_hidden_states"]).sample
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


def test_ldms_own_autoencoder_gives_the_same_picture(tiny, tmp_path, monkeypatch):
    model = ldm_module("model", monkeypatch)
    torch.manual_seed(6)
    shape = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 2, 2],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    encoder, decoder = model.Encoder(**shape).eval(), model.Decoder(**shape).eval()
    quant, post = torch.nn.Conv2d(8, 8, 1), torch.nn.Conv2d(4, 4, 1)
    parts = {"encoder": encoder, "decoder": decoder, "quant_conv": quant, "post_quant_conv": post}
    tensors = {name: value for name, value in tiny("sd1")[1].items() if not name.startswith("first_stage_model.")}
    for part, module in parts.items():
        tensors |= {f"first_stage_model.{part}.{name}": value for name, value in module.state_dict().items()}
    save_file(tensors, tmp_path / "real.safetensors")
    vae = checkpoint.load(tmp_path / "real.safetensors").vae
    picture = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latent = quant(encoder(picture)).chunk(2, dim=1)[0]
        torch.testing.assert_close(vae.encode(picture).latent_dist.mode(), latent, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(vae.decode(latent).sample, decoder(post(latent)), atol=1e-5, rtol=1e-4)


def ldm_module(name, monkeypatch):
    """A module of the real ldm package; its only wish for omegaconf is one class."""
    pytest.importorskip("ldm")
    if "omegaconf" not in sys.modules:
        stub, inner = types.ModuleType("omegaconf"), types.ModuleType("omegaconf.listconfig")
        stub.listconfig, inner.ListConfig = inner, type("ListConfig", (list,), {})
        monkeypatch.setitem(sys.modules, "omegaconf", stub)
        monkeypatch.setitem(sys.modules, "omegaconf.listconfig", inner)
    return __import__(f"ldm.modules.diffusionmodules.{name}", fromlist=[name])


def test_the_bundled_model_loads_with_what_its_yaml_says(components):
    assert components.family == "sd1"
    assert components.native_resolution == 256
    assert components.factor == 8
    assert components.unet.config.in_channels == 4
    assert not any(parameter.is_meta for parameter in components.unet.parameters())


def test_the_bundled_sdxl_model_has_its_autoencoder_beside_it_and_is_built_like_sdxl(components):
    loaded = checkpoint.load(checkpoint.BUNDLED.with_name("scenes-sdxl.safetensors"))
    assert (loaded.family, loaded.native_resolution, loaded.prediction_type) == ("sdxl", 256, "epsilon")
    assert len(loaded.text_encoders) == 2 and loaded.scaling_factor == components.scaling_factor
    ours, theirs = loaded.vae.state_dict(), components.vae.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    found = read_layout(loaded.unet).structure
    assert found.levels == 3 and found.top_attention_level == 1 and found.vector_width


def test_what_is_bundled_is_small_and_told_of():
    files = [path for path in checkpoint.BUNDLED.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 41e6
    card = (checkpoint.BUNDLED.parent / "README.md").read_text(encoding="utf-8")
    assert all(path.name in card or path.parent.name in card or path.suffix in (".yaml", ".md") for path in files)


def test_a_yaml_beside_the_file_overrides_heads_prediction_scale_and_schedule(tiny, tmp_path):
    _, tensors, _ = tiny("sd1")
    save_file(tensors, tmp_path / "a.safetensors")
    (tmp_path / "a.yaml").write_text(
        "model:\n  params:\n    parameterization: v\n    scale_factor: 0.5\n    linear_start: 0.001\n    linear_end: 0.02\n"
        "    unet_config:\n      params:\n        num_heads: -1\n        num_head_channels: 16\n"
    )
    loaded = checkpoint.load(tmp_path / "a.safetensors")
    assert (loaded.prediction_type, loaded.scaling_factor) == ("v_prediction", 0.5)
    assert (loaded.beta_start, loaded.beta_end) == (0.001, 0.02)
    assert loaded.unet.down_blocks[2].attentions[0].transformer_blocks[0].attn1.heads == 64 // 16
    given = checkpoint.load(tmp_path / "a.safetensors", config={"model": {"params": {"parameterization": "eps"}}})
    assert given.prediction_type == "epsilon"


def test_sgms_yaml_tells_a_v_model(tiny):
    scaling = {"target": "sgm.modules.diffusionmodules.denoiser_scaling.VScaling"}
    config = {"model": {"params": {"denoiser_config": {"params": {"scaling_config": scaling}}}}}
    assert checkpoint.load(tiny("sdxl")[0], config=config).prediction_type == "v_prediction"


def test_metadata_and_marker_keys_tell_a_v_model(tiny, tmp_path):
    _, tensors, _ = tiny("sdxl")
    save_file(tensors, tmp_path / "told.safetensors", {"modelspec.prediction_type": "v"})
    save_file(tensors | {"v_pred": torch.ones(()), "ztsnr": torch.ones(())}, tmp_path / "marked.safetensors")
    assert checkpoint.load(tmp_path / "told.safetensors").prediction_type == "v_prediction"
    marked = checkpoint.load(tmp_path / "marked.safetensors")
    assert (marked.prediction_type, marked.zero_terminal_snr) == ("v_prediction", True)


def test_a_unet_that_answers_with_its_input_is_taken_for_an_eps_model(components):
    assert checkpoint.probe_prediction(components.unet) == "epsilon"


def test_half_precision_files_are_computed_in_fp32_on_a_cpu(tiny, tmp_path):
    _, tensors, parts = tiny("sd1")
    save_file(
        {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()},
        tmp_path / "half.safetensors",
    )
    loaded = checkpoint.load(tmp_path / "half.safetensors", dtype=torch.float16)
    assert loaded.dtype is torch.float32
    assert {parameter.dtype for parameter in loaded.unet.parameters()} == {torch.float32}
    torch.testing.assert_close(answer(loaded.unet), answer(parts["unet"]), atol=5e-3, rtol=5e-2)


def test_a_ckpt_file_loads_like_safetensors(tiny, tmp_path):
    _, tensors, parts = tiny("sd1")
    torch.save({"state_dict": tensors, "global_step": 7}, tmp_path / "old.ckpt")
    torch.save({"state_dict": tensors}, tmp_path / "older.ckpt", _use_new_zipfile_serialization=False)
    for name in ("old.ckpt", "older.ckpt"):
        assert torch.equal(answer(checkpoint.load(tmp_path / name).unet), answer(parts["unet"]))


def test_a_diffusers_folder_computes_the_same(tiny, tmp_path):
    path, _, parts = tiny("sd1")
    parts["unet"].save_pretrained(tmp_path / "unet")
    parts["vae"].save_pretrained(tmp_path / "vae", variant="fp16")
    parts["clip"].save_pretrained(tmp_path / "text_encoder")
    loaded, single = checkpoint.load(tmp_path), checkpoint.load(path)
    assert (loaded.family, loaded.scaling_factor) == ("sd1", 0.18215)
    assert torch.equal(answer(loaded.unet), answer(single.unet))
    ids = torch.arange(77)[None]
    assert torch.equal(*[each.text_encoders[0](ids).last_hidden_state for each in (loaded, single)])


def test_loading_leaves_the_global_generator_alone(tiny):
    path = tiny("sd2")[0]
    before = torch.random.get_rng_state()
    checkpoint.load(path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_extra_weights_beside_the_networks_do_no_harm(tiny, tmp_path):
    _, tensors, parts = tiny("sd1")
    more = {"model_ema.decay": torch.ones(()), "first_stage_model.loss.logvar": torch.ones(()), "betas": torch.ones(9)}
    save_file(tensors | more, tmp_path / "more.safetensors")
    assert torch.equal(answer(checkpoint.load(tmp_path / "more.safetensors").unet), answer(parts["unet"]))


class Anything:
    pass


def without(start):
    return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(start)}


@pytest.mark.parametrize(
    "change, words",
    [
        (without("first_stage_model."), "has no autoencoder"),
        (without("cond_stage_model."), "has no text encoder"),
        (
            without("model.diffusion_model.middle_block.0.in_layers.0."),
            "does not fit: missing mid_block.resnets.0.norm1",
        ),
        (without("first_stage_model.quant_conv.bias"), "the autoencoder of 'bad.safetensors' does not fit"),
        (lambda tensors: {"lora_unet_down_blocks_0.lora_down.weight": torch.ones(1)}, "is a LoRA"),
        (
            lambda tensors: {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.ones(1)},
            "diffusion transformer",
        ),
        (
            lambda tensors: {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.ones(1)},
            "diffusion transformer",
        ),
        (lambda tensors: {"weight": torch.ones(1)}, "is not a Stable Diffusion checkpoint"),
    ],
)
def test_a_file_that_is_no_complete_checkpoint_is_named_for_what_it_is(tiny, tmp_path, change, words):
    save_file(change(tiny("sd1")[1]), tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint.load(tmp_path / "bad.safetensors")
    assert str(caught.value).startswith("Hires Lab: ")


def test_a_missing_a_cut_and_a_foreign_file_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path / "cut.safetensors")
    (tmp_path / "cut.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path / "cut.ckpt")
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is no checkpoint file"):
        checkpoint.load(tmp_path / "picture.png")
    with pytest.raises(CheckpointError, match=r"has no 'unet/config\.json'"):
        checkpoint.load(tmp_path)


def test_a_pickle_that_holds_more_than_tensors_is_refused(tmp_path):
    torch.save({"state_dict": {}, "callbacks": Anything()}, tmp_path / "unsafe.ckpt")
    with pytest.raises(CheckpointError, match="was refused"):
        checkpoint.load(tmp_path / "unsafe.ckpt")


def test_channels_that_do_not_divide_into_heads_ask_for_a_yaml(tmp_path):
    tensors, _ = original_checkpoint("sd2")
    save_file(tensors, tmp_path / "odd.safetensors")
    config = {"model": {"params": {"unet_config": {"params": {"num_head_channels": 48}}}}}
    with pytest.raises(CheckpointError, match="heads of 48"):
        checkpoint.load(tmp_path / "odd.safetensors", config=config)
