"""Text to conditioning: chunks, padding, which layer is read, SDXL's vector."""

import pytest
import torch

from lib_hires.engines import checkpoint, prompts


@pytest.fixture(scope="module")
def sdxl(tiny):
    return checkpoint.load(tiny("sdxl")[0])


def test_a_long_prompt_takes_as_many_chunks_as_it_needs_and_the_short_one_is_padded_to_it(components):
    pair = prompts.encode_pair(components, "blur", "a red star " * 60)  # 180 tokens
    assert pair.context.shape == (2, 3 * 77, components.unet.config.cross_attention_dim)
    short = prompts.encode_pair(components, "blur", "a red star")
    torch.testing.assert_close(pair.context[0, :77], short.context[0])


@pytest.mark.parametrize("tokens, chunks", [(0, 1), (75, 1), (76, 2)])
def test_a_chunk_holds_75_tokens(components, tokens, chunks):
    assert prompts.encode(components, ["red " * tokens]).context.shape[1] == 77 * chunks


def test_chunks_are_encoded_apart(components):
    whole = prompts.encode(components, ["red " * 75 + "blue star"]).context
    torch.testing.assert_close(whole[:, 77:], prompts.encode(components, ["blue star"]).context)


def test_padding_follows_each_text_encoder(components, tiny, sdxl):
    assert [each.pad_token_id for each in components.tokenizers] == [len(components.tokenizers[0]) - 1]
    assert [each.pad_token_id for each in checkpoint.load(tiny("sd1")[0]).tokenizers] == [49407]
    assert [each.pad_token_id for each in checkpoint.load(tiny("sd2")[0]).tokenizers] == [0]
    assert [each.pad_token_id for each in sdxl.tokenizers] == [49407, 0]


def test_tokens_are_those_of_the_tokenizers_own_call(components):
    tokenizer, text = components.tokenizers[0], "A striped Yellow star, on a blue background!"
    ids = prompts.tokenize(tokenizer, text)
    assert [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] == tokenizer(text).input_ids


def test_sd1_reads_the_last_layer(tiny):
    path, _, parts = tiny("sd1")
    loaded = checkpoint.load(path)
    ids = torch.tensor(prompts.chunked(prompts.tokenize(loaded.tokenizers[0], "a red star"), 1, 49406, 49407, 49407))
    with torch.no_grad():
        assert torch.equal(prompts.encode(loaded, ["a red star"]).context, parts["clip"](ids).last_hidden_state)


def test_sd2_reads_open_clips_last_layer_but_one_through_the_final_norm(tiny):
    path, _, parts = tiny("sd2")
    loaded, theirs = checkpoint.load(path), parts["open_clip"]
    ids = torch.tensor(prompts.chunked(prompts.tokenize(loaded.tokenizers[0], "a red star"), 1, 49406, 49407, 0))
    with torch.no_grad():
        wanted = theirs.ln_final(theirs(ids)[0][-2])
    torch.testing.assert_close(prompts.encode(loaded, ["a red star"]).context, wanted, atol=1e-5, rtol=1e-5)


def test_sdxl_reads_both_towers_last_layer_but_one_and_the_second_ones_projection(tiny, sdxl):
    parts = tiny("sdxl")[2]
    words = prompts.tokenize(sdxl.tokenizers[0], "a red star")
    first, second = (torch.tensor(prompts.chunked(words, 1, 49406, 49407, pad)) for pad in (49407, 0))
    got = prompts.encode(sdxl, ["a red star"])
    with torch.no_grad():
        states, pooled = parts["open_clip"](second)
        hidden = parts["clip"](first, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(got.context, torch.cat([hidden, states[-2]], -1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.pooled, pooled, atol=1e-5, rtol=1e-5)


def test_sdxls_empty_negative_prompt_is_zero_and_its_empty_prompt_is_not(sdxl):
    pair = prompts.encode_pair(sdxl, "", "")
    assert not pair.context[0].any() and not pair.pooled[0].any()
    assert pair.context[1].any() and pair.pooled[1].any()


def test_the_pooled_projection_of_a_long_prompt_is_its_first_chunks(sdxl):
    long, short = "red " * 75 + "blue star", "red " * 75
    torch.testing.assert_close(prompts.encode(sdxl, [long]).pooled, prompts.encode(sdxl, [short]).pooled)


def test_size_numbers_are_height_before_width(sdxl):
    told = prompts.with_size(prompts.encode_pair(sdxl, "", "a star"), width=96, height=64)
    assert told.time_ids.tolist() == [[64, 96, 0, 0, 64, 96]] * 2


def test_conditioning_rows_repeat_as_batches_and_as_views(sdxl):
    told = prompts.with_size(prompts.encode_pair(sdxl, "no", "yes"), 64, 64)
    assert torch.equal(told.repeat(2).context, told.context[[0, 1, 0, 1]])
    assert torch.equal(told.repeat_each(2).pooled, told.pooled[[0, 0, 1, 1]])
    assert len(told[1:]) == 1
