"""Words of a prompt: CLIP's own tokenizer takes the prompt apart, and what is put together again says the same."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.canvas.words import Word, chunk_columns, join, words_of_tokens
from lib_hires.engines.components import tokenizers

TOKENIZER = tokenizers("sd1")[0]
PROMPTS = [
    "a photo of a dragonfly, on a blue thistle",
    "an axolotl and a chrysanthemum; ukiyo-e, by hokusai!!",
    "the cat's whiskers aren't 1024 pixels (wide), [really] it\\is",
    '"quoted" at the start, ...and dots',
    "'dragon' between quotes",
    "café naïve Zürich, 龍 と 🐉 हिन्दी",
    ", , starts with commas",
    "a_b c-d e/f g:h <i> {j|k}",
    "red ball, red cube, Red RED red",
]


def pieces_of(prompt, tokenizer=TOKENIZER):
    return tokenizer.tokenize(prompt)


def words_of(prompt, **options):
    pieces = pieces_of(prompt)
    return words_of_tokens(pieces, chunk_columns(len(pieces)), **options)


def texts(words):
    return [word.text for word in words]


def read_emphasis(prompt):
    """[(text, weight)] of a prompt in which `(text:1.2)` is emphasised and a backslash escapes what follows it."""
    found, weight_of_group = [], r"\((?P<group>(?:\\.|[^\\()\[\]])*):(?P<weight>[+-]?[.\d]+)\)"
    for match in re.finditer(weight_of_group + r"|(?P<plain>(?:\\.|[^\\()\[\]])+)", prompt):
        text = match["group"] if match["group"] is not None else match["plain"]
        found.append((re.sub(r"\\(.)", r"\1", text).strip(), float(match["weight"] or 1)))
    assert sum(len(match[0]) for match in re.finditer(weight_of_group + r"|(?:\\.|[^\\()\[\]])+", prompt)) == len(
        prompt
    )
    return [each for each in found if each[0]]


# Words out of tokens --------------------------------------------------------------------------------------------------


def test_a_rare_word_is_one_word_with_all_its_pieces():
    pieces = pieces_of("a chrysanthemum axolotl")
    words = words_of("a chrysanthemum axolotl")
    assert len(pieces) > 3 and texts(words) == ["a", "chrysanthemum", "axolotl"]
    assert [column for word in words for column in word.columns] == list(range(1, len(pieces) + 1))
    assert len(words[2].columns) > 1


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("per_token", [False, True])
def test_all_words_together_are_the_prompt_s_own_tokens(prompt, per_token):
    if per_token and len(pieces_of(prompt)) != len(words_of(prompt, per_token=True)):
        pytest.fail("a piece was lost")
    if not per_token:
        assert pieces_of(join(words_of(prompt), emphasis=False)) == pieces_of(prompt)
        assert [text for text, _ in read_emphasis(join(words_of(prompt)))] == [join(words_of(prompt), emphasis=False)]


@given(st.text(alphabet="ab .,!?'()[]\\-é龍9s:", max_size=30))
def test_of_any_text_all_words_are_the_text_s_own_tokens_and_own_each_column_once(prompt):
    pieces = pieces_of(prompt)
    words = words_of(prompt)
    assert pieces_of(join(words, emphasis=False)) == pieces
    assert {column for word in words for column in word.columns} <= set(chunk_columns(len(pieces)))
    assert bool(words) == bool(pieces) and all(word.columns for word in words)


def test_punctuation_goes_with_the_word_before_it_and_says_nothing_about_its_place():
    words = words_of("a dragon, blue (very) sky!")
    assert texts(words) == ["a", "dragon,", "blue(", "very)", "sky!"]
    assert [word.columns for word in words] == [(1,), (2,), (4,), (6,), (8,)]


def test_punctuation_is_kept_only_with_its_word():
    words = words_of("a dragon, blue sky, birds")
    kept = [word for word in words if not word.text.startswith("dragon")]
    assert join(kept) == "a blue sky, birds"


def test_punctuation_at_the_beginning_goes_with_the_first_word():
    assert words_of('" , dragon') == [Word('" , dragon', (3,))]


def test_punctuation_alone_is_one_word():
    assert words_of(", ;") == [Word(", ;", (1, 2))]


def test_endings_stay_with_their_word():
    assert texts(words_of("the cat's toys aren't")) == ["the", "cat's", "toys", "aren't"]


def test_an_emoji_is_a_word():
    words = words_of("a 🐉 , here")
    assert texts(words) == ["a", "🐉 ,", "here"] and words[1].columns[0] == 2


def test_letters_beyond_ascii_are_written_as_they_are():
    assert texts(words_of("café Zürich 龍")) == ["café", "zürich", "龍"]


def test_a_repeated_word_stays_in_place_and_shares_the_columns_of_all_its_places():
    words = words_of("red ball, Red cube")
    assert texts(words) == ["red", "ball,", "red", "cube"]
    assert words[0].columns == words[2].columns == (1, 4)


def test_words_are_the_same_whatever_their_case_and_punctuation():
    pieces = ["Ball</w>", ",</w>", "ball</w>", "!</w>", "BALL</w>"]
    words = words_of_tokens(pieces, range(5))
    assert texts(words) == ["Ball,", "ball!", "BALL"] and {word.columns for word in words} == {(0, 2, 4)}


def test_longer_prompts_have_their_columns_in_the_chunks():
    words = words_of(" ".join(["sun moon"] * 50))
    assert chunk_columns(77) == [*range(1, 76), 78, 79]
    assert words[0].columns == tuple(77 * (i // 75) + 1 + i % 75 for i in range(0, 100, 2))
    assert max(words[1].columns) == 77 + 1 + 24


def test_words_stay_in_their_chunks():
    words = words_of(" ".join(["sun moon"] * 50))
    assert join(words) == " ".join(["sun moon"] * 37 + ["sun BREAK moon"] + ["sun moon"] * 12)
    assert join(words[80:82]) == "BREAK sun moon"
    assert join([replace(words[0], chunk=2), replace(words[1], chunk=3, weight=1.2)]) == "BREAK BREAK sun BREAK (moon:1.2)"
    assert join(words[80:82], emphasis=False) == "sun moon"


def test_a_word_that_the_end_of_a_chunk_cuts_is_one_word():
    pieces = [None, "a</w>", "dragon", None, None, "fly</w>", "sky</w>", None, None]
    assert words_of_tokens(pieces, range(9)) == [Word("a", (1,)), Word("dragonfly", (2, 5)), Word("sky", (6,))]


def test_start_end_and_padding_are_no_words():
    ids = TOKENIZER("a dragonfly", padding="max_length").input_ids
    special = set(TOKENIZER.all_special_ids)
    pieces = [None if each in special else TOKENIZER.convert_ids_to_tokens(each) for each in ids]
    assert texts(words_of_tokens(pieces, range(77))) == ["a", "dragonfly"]


def test_a_word_that_is_cut_off_at_the_end_is_kept():
    assert words_of_tokens(["a</w>", "dragon"], [1, 2]) == [Word("a", (1,)), Word("dragon", (2,))]


def test_an_embedding_stands_as_its_name_over_all_its_vectors():
    words = words_of_tokens(["by</w>", "my-Stil_ß", "", "", "</w>", ",</w>"], range(1, 7))
    assert words == [Word("by", (1,)), Word("my-Stil_ß,", (2, 3, 4, 5))]


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError):
        words_of_tokens(["a</w>"], [1, 2])
    with pytest.raises(ValueError):
        words_of_tokens(["a</w>"], [1], [1.0, 1.0])


# As published ---------------------------------------------------------------------------------------------------------


def test_as_published_each_piece_is_a_word():
    pieces = pieces_of("a dragonfly, a chrysanthemum")
    words = words_of("a dragonfly, a chrysanthemum", per_token=True)
    assert texts(words) == [piece.removesuffix("</w>") for piece in pieces]
    assert [word.columns for word in words] == [(column,) for column in range(1, len(pieces) + 1)]
    assert join(words) == " ".join(piece.removesuffix("</w>") for piece in pieces)


# The window's prompt --------------------------------------------------------------------------------------------------


def test_of_no_words_the_prompt_is_empty():
    assert join([]) == "" and words_of("") == []


def test_neighbours_of_one_weight_stand_in_one_pair_of_parentheses():
    words = [
        Word("a", (1,)),
        Word("red", (2,), 1.2),
        Word("ball,", (3,), 1.2),
        Word("sky", (4,), 0.5),
        Word("x", (5,), -1),
    ]
    assert join(words) == "a (red ball,:1.2) (sky:0.5) (x:-1)"
    assert join(words, emphasis=False) == "a red ball, sky x"


def test_punctuation_has_the_weight_of_its_word():
    words = words_of_tokens(["red</w>", ",</w>", "sky</w>"], [1, 2, 3], [1.3, 1.0, 1.0])
    assert join(words) == "(red,:1.3) sky"


@given(
    st.lists(
        st.tuples(
            st.text(alphabet="ab()[]\\:,1.", min_size=1, max_size=6), st.floats(-3, 3).map(lambda w: round(w, 3))
        ),
        max_size=6,
    )
)
def test_a_reader_of_emphasis_finds_each_text_and_weight_again(parts):
    words = [Word(text, (0,), weight) for text, weight in parts]
    read = read_emphasis(join(words))
    merged = []
    for text, weight in parts:
        if merged and merged[-1][1] == weight:
            merged[-1] = (f"{merged[-1][0]} {text}", weight)
        else:
            merged.append((text, weight))
    assert read == merged


def test_weights_are_written_without_exponents_and_rounding_noise():
    assert join([Word("a", (1,), 1.1 * 1.1)]) == "(a:1.21)"
    assert join([Word("a", (1,), 1e-7)]) == "(a:0)"
    assert join([Word("a", (1,), 1 + 1e-9)]) == "a"
