"""The text of generation parameters: what is written is read back, by us and by the WebUIs' own grammar."""

import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lib_hires.config.infotext import read_parameters, write_parameters

WEBUI_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
KEYS = {"Steps": "20", "Sampler": "euler", "Size": "512x512"}
texts = st.text(alphabet=st.sampled_from('ab ,:."\\()<>\n1é'), max_size=30).map(str.strip)
keys = st.dictionaries(
    st.from_regex(r"[A-Z][a-z]{1,5}( [0-9A-Z]{1,3})?", fullmatch=True), texts.filter(bool), max_size=5
)


@example(prompt="", negative="", extra={"Note": '"quoted"', "Path": 'C:\\new, "x"'})
@given(prompt=texts, negative=texts, extra=keys)
def test_prompts_and_values_are_read_back_as_they_were_written(prompt, negative, extra):
    assume("Negative prompt: " not in prompt)
    wanted = {**KEYS, **extra}
    assert read_parameters(write_parameters(prompt, negative, wanted)) == (prompt, negative, wanted)


@given(extra=keys)
def test_the_webuis_grammar_finds_every_key(extra):
    wanted = {**KEYS, **extra}
    last = write_parameters("a cat", "", wanted).split("\n")[-1]
    assert [key for key, _ in WEBUI_PARAMETER.findall(last)] == list(wanted)


def test_a_text_without_keys_is_a_prompt():
    assert read_parameters("a cat: sitting\non a mat") == ("a cat: sitting\non a mat", "", {})


@pytest.mark.parametrize("text", ["", "\n", "Negative prompt: dogs"])
def test_a_text_without_prompt_has_an_empty_one(text):
    assert read_parameters(text)[0] == ""


def test_a_text_that_the_webui_wrote_is_read():
    text = (
        "a castle, sunset\nby the lake\nNegative prompt: blurry,\ncars\n"
        'Steps: 20, Sampler: Euler a, Size: 1024x768, Lora hashes: "x: 12, y: 34", HL Method: HiDiffusion'
    )
    prompt, negative, found = read_parameters(text)
    assert (prompt, negative) == ("a castle, sunset\nby the lake", "blurry,\ncars")
    assert (
        found["Lora hashes"] == "x: 12, y: 34" and found["HL Method"] == "HiDiffusion" and found["Size"] == "1024x768"
    )


def test_a_long_line_without_keys_is_read_in_one_pass():
    text = "x\n" + "a" * 200_000
    assert read_parameters(text) == (text, "", {})


def test_the_last_negative_prompt_counts():
    text = write_parameters("a\nNegative prompt: b", "c", {"Steps": 2, "Seed": 1, "Size": "8x8"})
    assert read_parameters(text)[:2] == ("a\nNegative prompt: b", "c")
