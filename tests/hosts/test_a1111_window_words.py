"""Window prompts from the host's tokens to the network's rows: the right columns, chunks, AND parts, views and rows."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from lib_hires.canvas.canvas import DILATED, LOCAL, Canvas, Tile
from lib_hires.hosts._a1111.views import Views, fitted
from lib_hires.hosts._a1111.window_words import Prompts, words_of_prompt
from lib_hires.hosts.a1111 import _prompts, _rows
from lib_hires.plan.tiling import CanvasPlan, Local, Stage
from lib_hires.schedule import Moment
from lib_hires.stages.progressive import StageRun

START, STOP, CHANNELS = -1, -2, 4
PIECES = {"dragonfly": ["dragon", "fly"], "lighthouse": ["light", "house"], "watercolour": ["water", "col", "our"]}


class Embedder:
    """The host's text encoder up to its tokens: emphasis, BREAK, chunks of 75 between start and end, embeddings."""

    id_start, id_end, id_pad = START, STOP, STOP

    def __init__(self, embeddings=()):
        self.pieces, self.embeddings = [], dict(embeddings)
        self.tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda token: self.pieces[token])

    def token(self, piece):
        if piece not in self.pieces:
            self.pieces.append(piece)
        return self.pieces.index(piece)

    def tokenize_line(self, text):
        chunks, tokens, weights, fixes = [], [], [], []

        def close():
            missing = 75 - len(tokens)
            chunks.append(SimpleNamespace(tokens=[START, *tokens, *[STOP] * (missing + 1)], fixes=fixes[:],
                                          multipliers=[1.0, *weights, *[1.0] * (missing + 1)]))
            for each in (tokens, weights, fixes):
                each.clear()

        for part, weight in parts_of(text):
            if part == "BREAK":
                close()
                continue
            for word in re.findall(r"\w+|[^\w\s]", part):
                count = self.embeddings.get(word)
                if count:
                    fixes.append((len(tokens), SimpleNamespace(name=word, vectors=count)))
                found = [0] * count if count else [self.token(piece) for piece in pieces_of(word)]
                for token in found:
                    if len(tokens) == 75:
                        close()
                    tokens.append(token)
                    weights.append(weight)
        if tokens or not chunks:
            close()
        return chunks, 0


def pieces_of(word):
    *first, last = PIECES.get(word.lower(), [word.lower()])
    return [*first, last + "</w>"]


def parts_of(text):
    """(text, weight) of "a (b:1.3) BREAK c"; brackets that are escaped are letters."""
    for part in re.split(r"((?<!\\)\([^()]*:[\d.]+\)|\bBREAK\b)", text):
        emphasised = re.fullmatch(r"\((.*):([\d.]+)\)", part)
        yield (emphasised[1], float(emphasised[2])) if emphasised else (part.strip(), 1.0)


class SdConditioning(list):
    """The host's list of prompts with the picture's size."""

    def __init__(self, prompts, width=None, height=None):
        super().__init__(prompts)
        self.width, self.height = width, height


def get_multicond_prompt_list(prompts):
    """The AND parts of each prompt as (index, weight) into the different texts."""
    found, texts = [], []
    for prompt in prompts:
        parts = []
        for part in prompt.split("AND"):
            text, weight = re.fullmatch(r"(.*?)(?:\s:([\d.]+)\s*)?", part).groups()
            if text.strip() not in texts:
                texts.append(text.strip())
            parts.append((texts.index(text.strip()), float(weight or 1)))
        found.append(parts)
    return found, texts, {}


def get_learned_conditioning_prompt_schedules(prompts, steps):
    return [[[steps // 2, "a"], [steps, "b"]] if re.search(r"\[.*:.*:", text) else [[steps, text]] for text in prompts]


@pytest.fixture
def texts(host, monkeypatch):
    """The stand-ins with a text encoder; `told` holds each list of texts that was encoded, `code(text)` what a text became."""
    embedder = Embedder({"tinyface": 3})
    parser = SimpleNamespace(SdConditioning=SdConditioning, get_multicond_prompt_list=get_multicond_prompt_list,
                             get_learned_conditioning_prompt_schedules=get_learned_conditioning_prompt_schedules)
    monkeypatch.setitem(sys.modules, "modules.prompt_parser", parser)
    sys.modules["modules"].prompt_parser = parser
    told, known = [], []

    def code(text):
        if text not in known:
            known.append(text)
        return 1.0 + known.index(text)

    def get_learned_conditioning(prompts):
        told.append(prompts)
        columns = 77 * max(len(embedder.tokenize_line(text)[0]) for text in prompts)
        return torch.stack([torch.full((columns, CHANNELS), code(text)) for text in prompts])

    model = host.shared.sd_model
    model.cond_stage_model, model.get_learned_conditioning = embedder, get_learned_conditioning
    model.cond_stage_model_empty_prompt = torch.full((1, 77, CHANNELS), -5.0)
    return SimpleNamespace(embedder=embedder, told=told, code=code, model=model)


def read(text):
    return [(word.text, word.columns, word.weight) for word in words_of_prompt(text)]


# Columns ----------------------------------------------------------------------------------------------------------------


def test_each_word_has_the_columns_of_its_tokens_and_its_weight(texts):
    assert read("a (red dragonfly:1.3), blue (sky:0.8)") == [
        ("a", (1,), 1.0), ("red", (2,), 1.3), ("dragonfly,", (3, 4), 1.3), ("blue", (6,), 1.0), ("sky", (7,), 0.8)]


def test_a_second_chunk_begins_behind_the_end_of_the_first(texts):
    many = " ".join(f"word{number}" for number in range(80))
    columns = [word.columns for word in words_of_prompt(many)]
    assert columns == [(1 + number,) for number in range(75)] + [(78 + number,) for number in range(5)]
    assert [word.chunk for word in words_of_prompt(many)] == [0] * 75 + [1] * 5


def test_a_word_that_chunks_cut_has_columns_in_both(texts):
    many = " ".join(f"word{number}" for number in range(74))
    assert read(f"{many} dragonfly sky")[-2:] == [("dragonfly", (75, 78), 1.0), ("sky", (79,), 1.0)]


def test_break_begins_a_chunk(texts):
    assert read("red star BREAK blue (lighthouse:1.2) BREAK sky") == [
        ("red", (1,), 1.0), ("star", (2,), 1.0), ("blue", (78,), 1.0), ("lighthouse", (79, 80), 1.2), ("sky", (155,), 1.0)]


def test_a_word_that_is_repeated_has_all_its_places(texts):
    assert read("star, blue BREAK Star")[0][1] == read("star, blue BREAK star")[-1][1] == (1, 78)


def test_an_embedding_is_a_word_of_all_its_columns(texts):
    assert read("a tinyface smiling") == [("a", (1,), 1.0), ("tinyface", (2, 3, 4), 1.0), ("smiling", (5,), 1.0)]


@pytest.mark.parametrize("text", ["a (red dragonfly:1.3), blue watercolour tinyface BREAK lighthouse, a star",
                                  " ".join(["red dragonfly,", "watercolour sky."] * 20)])
def test_the_tokens_at_a_words_columns_are_the_words(texts, text):
    chunks, _ = texts.embedder.tokenize_line(text)
    flat = [token for chunk in chunks for token in chunk.tokens]
    for word in words_of_prompt(text):
        said = re.sub(r"\W", "", word.text).lower()
        pieces = "".join("*" if said == "tinyface" else texts.embedder.pieces[flat[column]] for column in word.columns)
        if said == "tinyface":
            assert len(pieces) == 3
        else:
            assert set(pieces.split("</w>")) - {""} == {said}


# Views ------------------------------------------------------------------------------------------------------------------

LEFT, RIGHT = 0, 1
CANVAS = CanvasPlan(Local((8, 8), (8, 8)), window_prompts=0.5)


def maps_of(places, count=77):
    """(4, 8, count): the columns of `places` are high on their side; all others are high on the other side than the last."""
    result = torch.zeros(4, 8, count)
    other = 1 - list(places.values())[-1]
    for column in range(count):
        side = places.get(column, other)
        result[:, 4 * side : 4 * side + 4, column] = 1
    return result


class Maps:
    """Attention maps by number of the prompt."""

    def __init__(self, *found):
        self.result = found.__getitem__


def stage(seeds=(3,)):
    return StageRun(Stage((8, 16), 2.0, canvas=CANVAS), 1, Canvas(CANVAS, (8, 16), seeds))


def prompts(*lines, notes=None, **fields):
    p = SimpleNamespace(prompts=list(lines), steps=20, width=128, height=64, **fields)
    return Prompts(p, (notes if notes is not None else []).append)


def said(texts, conds):
    """The texts whose conds these are."""
    known = {texts.code(text): text for told in texts.told for text in told}
    return [known[float(cond.flatten()[0])] for cond in conds]


def test_a_view_is_told_the_words_that_lie_in_it(texts):
    asked = prompts("red dragonfly, blue lighthouse")
    found = asked.for_views(stage(), Maps(maps_of({1: LEFT, 2: LEFT, 3: LEFT, 5: RIGHT, 6: RIGHT, 7: RIGHT})))
    assert said(texts, found[0]) == ["red dragonfly,", "blue lighthouse"]
    assert all(cond.shape == (77, CHANNELS) for cond in found[0])


def test_words_of_a_second_chunk_are_looked_for_in_its_columns(texts):
    asked = prompts("red (star:1.2) BREAK blue moon")
    found = asked.for_views(stage(), Maps(maps_of({1: LEFT, 2: RIGHT, 78: RIGHT, 79: LEFT}, 154)))
    assert said(texts, found[0]) == ["red BREAK moon", "(star:1.2) BREAK blue"]
    assert all(cond.shape == (154, CHANNELS) for cond in found[0])


def test_each_and_part_of_each_image_has_words_and_views_of_its_own(texts):
    asked = prompts("red star AND blue moon :0.6", "green tree")
    assert asked.images == {0: 0, 1: 0, 2: 1}
    maps = [maps_of({1: LEFT, 2: RIGHT}), maps_of({1: RIGHT, 2: LEFT}), maps_of({1: LEFT, 2: LEFT})]
    found = asked.for_views(stage(seeds=(3, 4)), Maps(*maps))
    assert {number: said(texts, conds) for number, conds in found.items()} == {
        0: ["red", "star"], 1: ["moon", "blue"], 2: ["green tree", ""]}
    batch = [[object(), object()], [object()]]
    denoiser = SimpleNamespace(sampler=SimpleNamespace(sampler_extra_args={"cond": SimpleNamespace(batch=batch)}))
    assert _rows(denoiser, 5) == [0, 0, 1, 0, 1]
    assert _prompts(denoiser, 5) == [0, 1, 2, None, None]


def test_each_different_text_is_encoded_once_beside_the_whole_prompts(texts):
    lines = [f"red star{number}" for number in range(12)]
    asked = prompts(*lines, *lines[:2])
    maps = [maps_of({1: LEFT, 2: RIGHT}) for _ in range(14)]
    found = asked.for_views(stage(seeds=tuple(range(14))), Maps(*maps))
    texts_told = [list(told) for told in texts.told]
    assert all(told[:12] == lines for told in texts_told)
    windows = [text for told in texts_told for text in told[12:]]
    assert sorted(windows) == sorted({"red", *(f"star{number}" for number in range(12))})
    assert all(len(told) <= 12 + 8 for told in texts_told)
    assert said(texts, found[11]) == ["red", "star11"] and said(texts, found[13]) == ["red", "star1"]
    assert all((told.width, told.height) == (128, 64) for told in texts.told)


def test_the_hires_pass_has_its_own_prompts_and_size(texts):
    p = SimpleNamespace(prompts=["red star"], hr_prompts=["blue moon"], is_hr_pass=True, steps=20, width=64, height=64,
                        hr_upscale_to_x=192, hr_upscale_to_y=96)
    found = Prompts(p, print).for_views(stage(), Maps(maps_of({1: LEFT, 2: RIGHT})))
    assert said(texts, found[0]) == ["blue", "moon"]
    assert {(told.width, told.height) for told in texts.told} == {(192, 96)}


def test_prompts_that_change_leave_every_view_the_whole_prompt(texts):
    notes = []
    assert prompts("a [red:green:0.5] star", notes=notes).for_views(stage(), Maps()) is None
    assert len(notes) == 1 and "change during a run" in notes[0] and not texts.told


# Rows -------------------------------------------------------------------------------------------------------------------

PER_VIEW = {number: [torch.full((77, CHANNELS), 10.0 * (number + 1) + view) for view in range(2)] for number in range(3)}
ROWS = ((0, 0), (0, 1), (1, 2), (0, None), (1, None))
"""Two AND parts of image 0, image 1, the uncond rows."""


def views_of(told=None, rows=ROWS):
    run = stage(seeds=(3, 4))
    run.prompts = PER_VIEW if told is None else told
    views = Views(run, print)
    views.at(Moment(500.0, 1.0), rows, 5.0, SimpleNamespace(rows=lambda rows: None))
    return views


def calls(views, context, sizes, key="c_crossattn"):
    """What the network is told in calls of so many rows: for each call and view the first number of each row."""
    heard, first = [], 0

    def network(x, t, cond):
        value = cond[key]
        value = value[0] if isinstance(value, list) else value
        heard.append(value[:, 0, 0].tolist())
        return x

    for size in sizes:
        rows = slice(first, first + size)
        cond = {key: [context[rows]] if key == "c_crossattn" else context[rows]}
        views.over(network)(torch.zeros(size, 4, 8, 16), torch.zeros(size), cond)
        first += size
    return heard


@pytest.mark.parametrize("key", ["c_crossattn", "crossattn"])
def test_each_row_gets_its_own_prompts_text_for_the_view_and_uncond_rows_keep_theirs(texts, key):
    context = -torch.arange(1.0, 6).view(5, 1, 1).expand(5, 77, CHANNELS)
    assert calls(views_of(), context, [5], key) == [[10, 20, 30, -4, -5], [11, 21, 31, -4, -5]]
    assert context[:, 0, 0].tolist() == [-1, -2, -3, -4, -5]


@pytest.mark.parametrize(("sizes", "heard"), [
    ([3], [[10, 20, 30], [11, 21, 31]]),
    ([2, 2, 1], [[10, 20], [11, 21], [30, -4], [31, -4], [-5], [-5]]),
    ([2, 1, 2], [[10, 20], [11, 21], [30], [31], [-4, -5], [-4, -5]]),
], ids=["uncond is skipped", "as many rows as images", "cond and uncond apart"])
def test_calls_of_some_of_the_rows_have_the_texts_of_these(texts, sizes, heard):
    context = -torch.arange(1.0, 6).view(5, 1, 1).expand(5, 77, CHANNELS)
    assert calls(views_of(), context, sizes) == heard


def test_after_a_call_without_uncond_the_next_step_begins_with_the_first_row(texts):
    context, views = -torch.ones(5, 77, CHANNELS), views_of()
    assert calls(views, context, [3])[0] == [10, 20, 30]
    views.at(Moment(400.0, 0.8), ROWS, 5.0, views.session)
    assert calls(views, context, [5])[0] == [10, 20, 30, -1, -1]


def test_grids_are_told_the_whole_prompt(texts):
    cond, views = {"c_crossattn": [torch.zeros(5, 77, CHANNELS)]}, views_of()
    told = views.told(cond, Tile(DILATED, 0, (8, 8)), ROWS)
    assert not told["c_crossattn"][0].any()
    assert views.told(cond, Tile(LOCAL, 1, (8, 8), ((0, 8),) * 2), ROWS)["c_crossattn"][0][2, 0, 0] == 31


def test_sdxls_vector_is_the_windows_too(texts):
    told = {0: [{"crossattn": torch.full((77, CHANNELS), 7.0 + view), "vector": torch.full((6,), 70.0 + view)} for view in range(2)]}
    cond = {"crossattn": torch.zeros(2, 77, CHANNELS), "vector": torch.zeros(2, 6)}
    result = views_of(told).told(cond, Tile(LOCAL, 1, (8, 8), ((0, 8),) * 2), ((0, 0), (0, None)))
    assert result["crossattn"][:, 0, 0].tolist() == [8, 0] and result["vector"][:, 0].tolist() == [71, 0]


@pytest.mark.parametrize(("have", "want"), [(77, 77), (77, 154), (77, 231), (154, 77), (154, 231)])
def test_a_text_is_as_long_as_what_it_replaces_and_the_rest_is_the_empty_prompt(texts, have, want):
    text = torch.rand(have, CHANNELS)
    result = fitted(text, torch.zeros(want, CHANNELS, dtype=torch.float16))
    assert result.shape == (want, CHANNELS) and result.dtype == torch.float16
    assert torch.equal(result[: min(have, want)], text[: min(have, want)].half())
    assert (result[have:] == -5).all()
