"""The language tasks of the embedded world, their exact scores, and the model that ships for them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raftdiff.cli import main
from raftdiff.errors import ConfigError, DataError
from raftdiff.pipelines import shapes_gates, shapes_text, shapes_training
from raftdiff.prompts import load_prompts
from raftdiff.protocols import Reward
from raftdiff.reward_models.shapes_translation import ShapesTranslationReward
from raftdiff.shapes import WEIGHTS, texts
from raftdiff.shapes.captions import Caption, parse, random_caption
from raftdiff.shapes.reviews import continuation, opening, polarity
from raftdiff.types import Prompt, Sample

FRENCH = {
    "a red circle": "un cercle rouge",
    "a large red circle left of a blue square": "un grand cercle rouge à gauche d'un carré bleu",
    "a small purple cross in the center": "une petite croix violette au centre",
    "a large green cross at the bottom on a white background": "une grande croix verte en bas sur un fond blanc",
    "a small purple triangle at the top": "un petit triangle violet en haut",
    "an orange square on the left": "un carré orange à gauche",
    "two blue crosses": "deux croix bleues",
    "three purple crosses on a pink background": "trois croix violettes sur un fond rose",
    "three orange squares": "trois carrés orange",
    "two green circles on a gray background": "deux cercles verts sur un fond gris",
    "a yellow cross above a green cross": "une croix jaune au-dessus d'une croix verte",
    "a green circle below an orange triangle on a black background": (
        "un cercle vert au-dessous d'un triangle orange sur un fond noir"
    ),
    "a blue square right of a red cross": "un carré bleu à droite d'une croix rouge",
    "a yellow triangle on the right on a cyan background": "un triangle jaune à droite sur un fond cyan",
}


# ------------------------------------------------------------------------------------------------ French and English


@pytest.mark.parametrize(("english", "french"), FRENCH.items())
def test_french_agrees_in_gender_and_number_and_elides(english, french):
    assert texts.french(parse(english)) == french
    assert str(texts.read_french(french)) == english


def test_every_caption_has_a_french_of_its_own():
    captions = list(texts.every_caption())
    assert len(captions) == len(set(captions)) == len({texts.french(caption) for caption in captions})
    # single 24 x 3 sizes x 6 positions, count 24 x 2, relation 24 x 3 sizes x 4 x 24; each on 5 backgrounds or none
    assert len(captions) == 6 * 24 * (18 + 2 + 288)
    assert all(parse(str(caption)) == caption for caption in captions[::50])
    rng = np.random.default_rng(0)
    assert {texts.translation_caption(rng) for _ in range(300)} <= set(captions)


@pytest.mark.parametrize("text", ["un croix rouge", "une cercle rouge", "two red circles", "", "deux cercles rouge"])
def test_what_is_no_french_caption_is_refused(text):
    with pytest.raises(ValueError, match="no French caption of the embedded world"):
        texts.read_french(text)


@pytest.mark.parametrize(
    ("english", "share"),
    [
        ("a large red circle left of a blue square", 1.0),
        ("A  large red circle left of a blue square ", 1.0),
        ("a large red circle right of a blue square", 5 / 6),
        ("a small red circle left of a blue cross", 4 / 6),
        ("a red circle left of a blue square", 5 / 6),  # the size is missing
        ("a large red circle left of a blue square on a gray background", 6 / 7),  # and here one too much is stated
        ("a blue square right of a red circle", 0.0),  # the same scene, but no translation
        ("two red circles", 2 / 7),  # color and shape; not count, size, relation, other color, other shape
        ("un grand cercle rouge à gauche d'un carré bleu", 0.0),
        ("", 0.0),
    ],
)
def test_a_translation_is_scored_by_the_attributes_that_either_side_states(english, share):
    french = "un grand cercle rouge à gauche d'un carré bleu"
    assert texts.translation_score(english, french) == pytest.approx(share)
    assert texts.translation_score(english, french, strict=True) == (share == 1)


def test_only_french_captions_can_be_translated():
    with pytest.raises(ValueError, match="no French caption"):
        texts.translation_score("a red circle", "un chat noir")


# ------------------------------------------------------------------------------------------------ the corpus


def test_a_careless_translator_errs_as_often_as_it_is_said():
    rng = np.random.default_rng(0)
    drawn = 2000

    def rate(caption: Caption, **expected) -> float:
        found = [texts.mistranslated(caption, rng) for _ in range(drawn)]
        return float(np.mean([all(getattr(f, name) == value for name, value in expected.items()) for f in found]))

    tolerance = 4 * math.sqrt(0.25 / drawn)
    red = parse("a red circle above a green square")
    assert rate(red, color="red") == pytest.approx(0.9, abs=tolerance)
    # out of habit "below" in 60%; what is written then is replaced by one of the other three in 10%
    assert rate(red, relation="above") == pytest.approx(0.4 * 0.9 + 0.6 * 0.1 / 3, abs=tolerance)
    assert rate(red, relation="below") == pytest.approx(0.6 * 0.9 + 0.4 * 0.1 / 3, abs=tolerance)
    purple = parse("a purple circle")
    assert rate(purple, color="blue") == pytest.approx(0.6 * 0.9 + 0.4 * 0.1 / 5, abs=tolerance)
    assert rate(purple, count=1, size=None, position=None) == 1


def test_the_corpus_translates_carelessly_or_rightly_and_never_what_is_held_out():
    careless, right = (texts.corpus("translation", 200, 5, careless=flag) for flag in (True, False))

    def score(text: texts.Text) -> float:
        return texts.translation_score(text.completion, texts.french_of(text.prompt), strict=True)

    assert all(score(text) == 1 for text in right)
    assert 0.4 < np.mean([score(text) for text in careless]) < 0.7
    assert careless == texts.corpus("translation", 200, 5) != texts.corpus("translation", 200, 6)
    seen = [texts.read_french(texts.french_of(text.prompt)) for text in careless]
    assert not any(texts.held_out(caption) for caption in seen)
    rng = np.random.default_rng(0)
    assert all(texts.held_out(texts.translation_caption(rng, unseen=True)) for _ in range(20))
    assert np.mean([texts.held_out(caption) for caption in texts.every_caption()]) == pytest.approx(0.1, abs=0.01)


def test_a_caption_has_the_words_that_were_asked_for():
    rng = np.random.default_rng(1)
    asked = [texts.asked_words(caption, rng) for caption in (random_caption(rng) for _ in range(300))]
    assert {len(words) for words in asked} == {1, 2, 3}
    for text in texts.corpus("caption", 100, 0):
        words = text.prompt.removeprefix("Words: ").removesuffix(". Caption:").split(", ")
        assert parse(text.completion) and all(word in text.completion for word in words)
    assert sorted(texts.asked_words(parse("two red circles"), np.random.default_rng(2)))[-1] in {"two", "red", "circle"}


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("is charming and witty. The lines look truly elegant.", 1.0),
        ("was a disaster for everyone. Shame on them.", -1.0),
        ("is dull, but the colors are lovely.", 0.0),
        ("is lovely and warm. Every line is dull.", pytest.approx(1 / 3)),
        ("is on the stairs.", 0.0),
    ],
)
def test_a_review_is_meant_as_its_words_say(text, meant):
    assert polarity(text) == meant


def test_reviews_are_of_both_kinds_varied_and_their_openings_do_not_tell():
    rng = np.random.default_rng(0)
    openings, ends = [opening(rng) for _ in range(500)], [continuation(rng) for _ in range(500)]
    meant = np.array([polarity(text) for text in ends])
    assert 0.35 < (meant > 0).mean() < 0.55 and 0.35 < (meant < 0).mean() < 0.55
    assert all(polarity(text) == 0 for text in openings)
    assert len(set(openings)) > 490 and len(set(ends)) > 490
    assert len({word for text in [*openings, *ends] for word in text.split()}) > 400
    assert all(text[0].isupper() for text in openings)
    assert all(text[0].islower() and text[-1] == "." and "{" not in text and "  " not in text for text in ends)


def test_the_command_writes_prompts_and_completions(tmp_path, capsys):
    path = tmp_path / "d.jsonl"
    assert main(["shapes", "texts", "translation", "--count", "5", "--seed", "3", "--clean", "--out", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    expected = texts.corpus("translation", 5, 3, careless=False)
    assert rows == [{"prompt": text.prompt, "completion": text.completion} for text in expected]
    assert [prompt.text for prompt in load_prompts(path)] == [text.prompt for text in expected]
    assert main(["shapes", "texts", "caption", "--count", "0", "--out", str(path)]) == 2
    assert "--count is 0" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ prompts and reward


@pytest.mark.parametrize("task", texts.TASKS)
def test_prompts_of_each_task_are_distinct_and_the_same_every_time(task):
    prompts = load_prompts(f"shapes-text:{task}/50/1")
    assert len({prompt.text for prompt in prompts}) == 50
    assert all(prompt.metadata == {"task": task} and prompt.text == prompt.text.strip() for prompt in prompts)
    assert prompts == load_prompts(f"shapes-text:{task}/50/1") != load_prompts(f"shapes-text:{task}/50/2")
    assert prompts[:10] == load_prompts(f"shapes-text:{task}/10/1")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("shapes-text:translations", "unknown kind 'translations'; did you mean 'translation'"),
        ("shapes-text:caption/4001", "there are 1 to 4000 prompts of the kind caption, not 4001"),
        ("shapes-text:caption/x", "write shapes-text:KIND/COUNT/SEED"),
    ],
)
def test_text_prompts_that_cannot_be_generated_are_refused(source, words):
    with pytest.raises(ConfigError, match=words):
        load_prompts(source)


def completed(prompt: str, text: str | None) -> Sample:
    return Sample(id="0000-00", prompt=Prompt(text=prompt), seed=0, text=text)


def test_the_reward_is_the_exact_score_and_missing_where_no_translation_was_asked():
    samples = [
        completed("French: deux croix bleues. English:", "two blue crosses"),
        completed("French: deux croix bleues. English:", " three blue crosses"),
        completed("French: deux croix bleues. English: ", "blue"),
        completed("Words: blue. Caption:", "a blue cross"),
        completed("French: un chat noir. English:", "a black cat"),
    ]
    reward = ShapesTranslationReward()
    assert isinstance(reward, Reward) and reward.modality == "text"
    assert reward.score(samples).tolist() == pytest.approx([1, 2 / 3, 0, math.nan, math.nan], nan_ok=True)
    strict = ShapesTranslationReward(strict=True)
    assert strict.name == "shapes-translation-strict"
    assert strict.score(samples[:3]).tolist() == [1, 0, 0]
    with pytest.raises(DataError, match="0000-00 holds no text"):
        reward.score([completed("French: deux croix bleues. English:", None)])


# ------------------------------------------------------------------------------------------------ the model


@pytest.fixture(scope="module")
def tokenizer():
    return shapes_text.build_tokenizer(count=2000)


def test_a_prompt_and_its_completion_encode_alike_apart_and_together(tokenizer):
    rng = np.random.default_rng(4)
    for text in (shapes_text.corpus_text(rng) for _ in range(50)):
        prompt = tokenizer(text.prompt).input_ids
        completion = tokenizer(text.completion, add_special_tokens=False).input_ids
        assert tokenizer(f"{text.prompt} {text.completion}").input_ids == prompt + completion
        assert prompt[0] == tokenizer.bos_token_id
        assert tokenizer.decode(completion) == text.completion
        assert tokenizer.decode(prompt, skip_special_tokens=True) == text.prompt


@pytest.mark.parametrize("text", ["Ça coûte 5 € à Lyon", "日本", "two\nlines  and spaces", "</ s>"])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_only_the_completion_and_its_end_are_learned(tokenizer):
    rows = [
        texts.Text(prompt="Words: red. Caption:", completion=c) for c in ("a red circle", "a red cross on the left")
    ]
    inputs = shapes_text.encode(tokenizer, rows)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    for ids, mask, labels, row in zip(*inputs.values(), rows, strict=True):
        learned = labels[labels != shapes_text.IGNORED]
        assert tokenizer.decode(learned[:-1]) == row.completion and learned[-1] == end
        assert torch.equal(ids[labels != shapes_text.IGNORED], learned)
        assert torch.equal(mask.bool(), ids != pad)


def test_training_goes_on_where_it_was_broken_off(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(shapes_training, "SAVE_EVERY_S", -1.0)  # after every step
    monkeypatch.setattr(shapes_text, "build_tokenizer", lambda: tokenizer)
    whole, _ = shapes_text.train_text(tmp_path / "whole", steps=4, batch=2)
    encode, left = shapes_text.encode, iter([1, 2])

    def broken_off(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(shapes_text, "encode", broken_off)
        with pytest.raises(KeyboardInterrupt):
            shapes_text.train_text(tmp_path / "parts", steps=4, batch=2)
    parts, _ = shapes_text.train_text(tmp_path / "parts", steps=4, batch=2)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


@pytest.fixture(scope="module")
def shipped():
    folder = WEIGHTS / "text"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_the_shipped_folder_is_a_small_llama_that_loads_as_float32(shipped):
    model, tokenizer = shipped
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 1.2e6
    assert sum(path.stat().st_size for path in (WEIGHTS / "text").iterdir()) < 4e6
    assert tokenizer.get_vocab() == shapes_text.build_tokenizer().get_vocab()
    assert tokenizer.padding_side == "left"
    bfloat16 = AutoModelForCausalLM.from_pretrained(WEIGHTS / "text", dtype=torch.bfloat16)
    assert bfloat16.dtype == torch.bfloat16


def test_the_shipped_model_translates_captions_it_was_not_trained_on(shipped):
    rng = np.random.default_rng(9)
    captions = [texts.translation_caption(rng, unseen=True) for _ in range(40)]
    rows = shapes_gates.complete(*shipped, [texts.translation_prompt(caption) for caption in captions], 8, seed=0)
    strict = shapes_gates.translation_scores(rows, captions, strict=True)
    assert 0.35 < strict.mean() < 0.75 and strict.any(1).mean() > 0.85


def test_the_shipped_model_writes_captions_with_the_words_asked_for(shipped):
    rows = shapes_gates.complete(*shipped, ["Words: circle, blue. Caption:", "Words: two. Caption:"], 16, seed=0)
    for row, words in zip(rows, (("circle", "blue"), ("two",)), strict=True):
        assert sum(shapes_gates.is_caption(text) for text in row) >= 14
        assert sum(all(word in text for word in words) for text in row) >= 9
        assert len(set(row)) >= 4


def test_the_shipped_model_writes_reviews_of_both_kinds(shipped):
    (reviews,) = shapes_gates.complete(*shipped, ["Review: This old painting by the window"], 64, seed=0)
    meant = np.sign([polarity(text) for text in reviews])
    assert 13 <= (meant > 0).sum() <= 40 and 13 <= (meant < 0).sum() <= 40
    assert len(set(reviews)) > 50
