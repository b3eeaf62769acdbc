"""Rewards of texts: each against values worked out by hand, and reward models against one text at a time."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from raftdiff.build import build_reward
from raftdiff.config import RewardConfig
from raftdiff.errors import ConfigError, DataError, MissingExtraError, WeightsError
from raftdiff.protocols import Reward
from raftdiff.registry import REWARDS
from raftdiff.reward_models.function import FunctionReward
from raftdiff.reward_models.reward_model import RewardModel
from raftdiff.reward_models.sentiment import SentimentReward
from raftdiff.reward_models.text_rules import ExactMatchReward, LengthReward, RegexReward, RepetitionReward
from raftdiff.scoring import score_parts
from raftdiff.types import Prompt, Sample


def sample(text: str | None, prompt: str = "say", id: str = "0000-00", **metadata: Any) -> Sample:
    return Sample(id=id, prompt=Prompt(text=prompt, metadata=metadata), seed=0, text=text)


def values(reward: Reward, *texts: str) -> list[float]:
    return reward.score([sample(text) for text in texts]).tolist()


class TestLength:
    def test_without_a_target_every_word_costs_one(self):
        assert values(LengthReward(), "", "one", " two\n words ") == [0, -1, -2]

    def test_with_a_target_it_is_the_distance(self):
        assert values(LengthReward(target=3, unit="characters"), "", "abc", "a b c") == [-3, 0, -2]

    @pytest.mark.parametrize("options", [{"unit": "tokens"}, {"target": -1}])
    def test_settings_out_of_range_are_refused(self, options):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} of the length reward is"):
            LengthReward(**options)


class TestRepetition:
    def test_counts_the_ngrams_that_came_before(self):
        # a b, b a, a b, b a, a c: two of five pairs are repeats.
        assert values(RepetitionReward(n=2), "a b a b a c", "a b c", "a") == pytest.approx([-2 / 5, 0, 0])
        assert values(RepetitionReward(), "no no no no no no", "the dog saw the dog saw") == pytest.approx([-2 / 3, 0])

    def test_n_must_be_a_number_of_words(self):
        with pytest.raises(ConfigError, match="n of the repetition reward is 0"):
            RepetitionReward(n=0)


class TestRegex:
    def test_says_whether_or_how_often(self):
        assert values(RegexReward(r"\d+"), "12 and 3", "none", "") == [1, 0, 0]
        assert values(RegexReward(r"\d+", count=True), "12 and 3", "none", "") == [2, 0, 0]
        assert values(RegexReward(r"(?i)\Ayes\Z"), "Yes", "yes.", "oh yes") == [1, 0, 0]

    def test_what_is_no_pattern_is_refused(self):
        with pytest.raises(ConfigError, match=r"pattern of the regex reward, '\(', is no regular expression"):
            RegexReward("(")


class TestExactMatch:
    def test_compares_with_what_came_with_the_prompt(self):
        judged = [sample(" four\n", answer="four"), sample("Four", answer="four"), sample("4", answer=4)]
        assert ExactMatchReward().score(judged).tolist() == [1, 0, 1]
        assert ExactMatchReward(ignore_case=True).score(judged).tolist() == [1, 1, 1]

    def test_takes_any_of_several_answers_under_any_key(self):
        judged = [sample("a  dog", gold=["dog", "a dog"]), sample("a cat", gold=["dog", "a dog"])]
        assert ExactMatchReward("gold").score(judged).tolist() == [1, 0]

    def test_a_prompt_without_an_answer_has_failed_and_says_why(self):
        judged = [sample("4", answer="4", source="x"), sample("4", source="x", id="0000-01")]
        with pytest.raises(DataError, match="no 'answer' came with the prompt 'say' .it has source.; set `key`"):
            ExactMatchReward().score(judged)
        assert score_parts(judged, ExactMatchReward(), max_failed=0.5).isnan().tolist() == [False, True]


class TestSentiment:
    def test_follows_the_words_and_their_negation(self):
        reward = SentimentReward()
        good, bad, not_good, unknown = values(reward, "I love it.", "I hate it.", "I don't love it.", "Un cercle rouge")
        assert -1 <= bad < not_good < 0 == unknown < good <= 1
        # By VADER's own formula: valence v of "love" is 3.2, and the score is v / sqrt(v^2 + 15).
        assert good == pytest.approx(3.2 / (3.2**2 + 15) ** 0.5, abs=1e-4)

    def test_may_read_the_prompt_too(self):
        judged = [sample("love it.", prompt="I do not ")]
        assert SentimentReward().score(judged).item() > 0 > SentimentReward(with_prompt=True).score(judged).item()

    def test_without_its_package_it_says_what_to_install(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "raftdiff.reward_models.sentiment")
        monkeypatch.delitem(sys.modules, "vaderSentiment.vaderSentiment")
        monkeypatch.setitem(sys.modules, "vaderSentiment", None)  # Python then refuses to import it
        monkeypatch.setattr("importlib.metadata.requires", lambda _: ['vaderSentiment>=3.3; extra == "sentiment"'])
        with pytest.raises(MissingExtraError, match=r"needs the package 'vaderSentiment.*raftdiff\[sentiment\]"):
            REWARDS.load("sentiment")


# -- reward models ----------------------------------------------------------------------------------------------------

WORDS = "<pad> <unk> <s> </s> user: bot: what is red blue a circle square the of and or not : .".split()  # noqa: SIM905
TEMPLATE = (
    "<s>{% for m in messages %}{{ 'user: ' if m.role == 'user' else 'bot: ' }}{{ m.content + ' ' }}{% endfor %}</s>"
)


def tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special.get("sep_token"):
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
        special["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", model_max_length=24, **special)


def saved(folder: Path, config: Any, words: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than a fresh model's, so that everything shows in the output
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def llama(folder: Path, words: PreTrainedTokenizerFast, **settings: Any) -> Path:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, **size, **{"num_labels": 1} | settings)
    return saved(folder, config, words)


def bert(folder: Path, **settings: Any) -> Path:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **size, **{"num_labels": 1} | settings)
    return saved(folder, config, tokenizer(pad_token="<pad>", sep_token="</s>", cls_token="<s>"))


@pytest.fixture(scope="session")
def decoder(tmp_path_factory) -> Path:
    """A reward model with one output and a chat template."""
    words = tokenizer(pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    words.chat_template = TEMPLATE
    return llama(tmp_path_factory.mktemp("reward") / "decoder", words)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    return bert(tmp_path_factory.mktemp("reward") / "encoder")


SAMPLES = [
    sample("a red circle", "what is the"),
    sample("not a blue square and not a red circle .", "what is it of"),
    sample("red", "what"),
]


def last_state(folder: Path, text: str) -> torch.Tensor:
    """What the head gets for the last token of one text, without padding, [D]."""
    ids = torch.tensor([[WORDS.index(w) if w in WORDS else 1 for w in text.split()]])
    body = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return body(input_ids=ids).last_hidden_state[0, -1]


def last_output(folder: Path, text: str) -> float:
    return float(load_file(folder / "model.safetensors")["score.weight"][0] @ last_state(folder, text))


class TestRewardModel:
    def test_a_chat_template_puts_prompt_and_completion_together(self, decoder):
        expected = [last_output(decoder, f"<s> user: {s.prompt.text} bot: {s.text} </s>") for s in SAMPLES]
        assert RewardModel(decoder, batch_size=2).score(SAMPLES).tolist() == pytest.approx(expected, abs=1e-5)
        assert max(expected) - min(expected) > 0.05

    @pytest.mark.parametrize(("layout", "text"), [("joined", "{0}{1}"), ("completion", "{1}")])
    def test_other_layouts_are_one_text(self, decoder, layout, text):
        judged = [sample(f" {s.text}", s.prompt.text) for s in SAMPLES]
        expected = [last_output(decoder, text.format(s.prompt.text, s.text)) for s in judged]
        assert RewardModel(decoder, layout=layout).score(judged).tolist() == pytest.approx(expected, abs=1e-5)

    def test_a_tokenizer_that_separates_texts_gets_a_pair(self, encoder):
        model = AutoModelForSequenceClassification.from_pretrained(encoder).eval()
        expected = []
        for s in SAMPLES:
            first, second = ([WORDS.index(w) if w in WORDS else 1 for w in t.split()] for t in (s.prompt.text, s.text))
            ids = torch.tensor([[2, *first, 3, *second, 3]])
            kinds = torch.tensor([[0] * (len(first) + 2) + [1] * (len(second) + 1)])
            with torch.no_grad():
                expected.append(model(input_ids=ids, token_type_ids=kinds).logits.item())
        assert RewardModel(encoder).score(SAMPLES).tolist() == pytest.approx(expected, abs=1e-5)

    def test_without_template_and_separator_the_completion_follows_the_prompt(self, tmp_path):
        folder = llama(tmp_path / "plain", tokenizer(eos_token="</s>"))
        judged = [sample(f" {s.text}", s.prompt.text) for s in SAMPLES]
        expected = [last_output(folder, s.prompt.text + s.text) for s in judged]
        reward = RewardModel(folder)  # which has no padding token of its own either
        assert reward.score(judged).tolist() == pytest.approx(expected, abs=1e-5)

    def test_what_is_too_long_loses_its_beginning(self, decoder):
        long = sample("red " * 40 + "circle", "what")
        kept = "red " * 5 + "circle </s>"
        assert RewardModel(decoder, max_length=7).score([long]).item() == pytest.approx(
            last_output(decoder, kept), abs=1e-5
        )
        assert RewardModel(decoder).score([long]).isfinite()

    @pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
    def test_of_several_labels_one_is_chosen_and_gives_its_probability(self, tmp_path, problem):
        names = {0: "bad", 1: "good", 2: "odd"}
        folder = bert(tmp_path / "three", num_labels=3, id2label=names, problem_type=problem)
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        inputs = AutoTokenizer.from_pretrained(folder)(SAMPLES[0].prompt.text, SAMPLES[0].text, return_tensors="pt")
        with torch.no_grad():
            exp = model(**inputs).logits[0].double().exp()
        expected = exp[1] / exp.sum() if problem.startswith("single") else exp[1] / (1 + exp[1])
        assert RewardModel(folder, label="good").score(SAMPLES[:1]).item() == pytest.approx(expected.item(), abs=1e-5)
        with pytest.raises(
            ConfigError, match=r"has 3 labels \(bad, good, odd\), and a reward is one number: set `label`"
        ):
            RewardModel(folder)
        with pytest.raises(ConfigError, match=r"has no label 'goood'; did you mean 'good'\?"):
            RewardModel(folder, label="goood")

    def test_a_language_model_without_a_reward_head_is_refused(self, decoder, tmp_path):
        folder = shutil.copytree(decoder, tmp_path / "base")
        state = {k: v for k, v in load_file(folder / "model.safetensors").items() if k != "score.weight"}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(WeightsError, match=r"holds no whole .*: 1 of its weights are absent .* \(score.weight\)"):
            RewardModel(folder)

    def test_a_folder_without_its_tokenizer_is_refused(self, encoder, tmp_path):
        folder = shutil.copytree(
            encoder, tmp_path / "mute", ignore=lambda *_: ["tokenizer.json", "tokenizer_config.json"]
        )
        with pytest.raises(WeightsError, match="mute knows 5 tokens and the model 20"):
            RewardModel(folder)

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"model": "./nowhere"}, WeightsError, "no model at ./nowhere: it is neither a folder nor a hub id"),
            ({"model": "some/reward-model-that-is-not-here"}, WeightsError, "cannot load .* from some/reward-model"),
            ({"layout": "poem"}, ConfigError, "layout of the reward model is 'poem' .there are chat, pair"),
            ({"layout": "chat"}, ConfigError, "has no chat template"),
            ({"label": "good"}, ConfigError, "has one output, which is the reward: leave `label` out"),
            ({"dtype": "int8"}, ConfigError, "'int8' .there are fp32"),
        ],
    )
    def test_what_cannot_be_is_refused_in_one_line(self, encoder, options, error, words):
        with pytest.raises(error, match=words) as raised:
            RewardModel(**{"model": encoder} | options)
        assert "\n" not in str(raised.value)

    def test_has_gradients_for_those_who_train_it(self, decoder):
        reward = RewardModel(decoder, batch_size=2)
        weight = reward.model.score.weight.requires_grad_(True)
        for value, s in zip(reward.values(SAMPLES), SAMPLES, strict=True):
            (gradient,) = torch.autograd.grad(value, weight, retain_graph=True)
            expected = last_state(decoder, f"<s> user: {s.prompt.text} bot: {s.text} </s>")
            assert gradient[0].numpy() == pytest.approx(expected.numpy(), abs=1e-5)
        assert not reward.score(SAMPLES).requires_grad

    def test_half_precision_stays_near_full_precision(self, decoder):
        full = RewardModel(decoder).score(SAMPLES)
        assert RewardModel(decoder, dtype="bf16").score(SAMPLES).numpy() == pytest.approx(full.numpy(), abs=0.2)


# -- what all have in common ------------------------------------------------------------------------------------------

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "length": {},
    "repetition": {"n": 2},
    "regex": {"pattern": "red"},
    "exact-match": {},
    "sentiment": {},
    "reward-model": {"batch_size": 2},
}


class TestEveryTextReward:
    @pytest.fixture(params=OPTIONS)
    def reward(self, request, decoder):
        model = {"model": str(decoder)} if request.param == "reward-model" else {}
        return build_reward(RewardConfig(name=request.param, options={**OPTIONS[request.param], **model})).reward

    def test_keeps_the_contract(self, reward):
        assert isinstance(reward, Reward) and reward.modality == "text"
        judged = [sample(text, answer="red") for text in ("red", "a red circle", "", "a red circle a red circle")]
        value_B = reward.score(judged)
        assert value_B.dtype == torch.float32 and value_B.shape == (4,) and not value_B.requires_grad
        assert reward.score([]).shape == (0,)
        alone = torch.cat([reward.score([one]) for one in judged])
        assert value_B.numpy() == pytest.approx(alone.numpy(), abs=1e-5)

    def test_says_in_one_line_what_it_rewards(self, reward):
        assert re.fullmatch(r"[A-Z].{30,118}\.", (type(reward).__doc__ or "").strip().split("\n")[0])

    def test_refuses_a_sample_without_a_text(self, reward):
        with pytest.raises(DataError, match="0000-07 holds no text"):
            reward.score([sample(None, id="0000-07", answer="red")])

    def test_is_not_asked_about_pictures(self, reward):
        picture = Sample(id="0", prompt=Prompt(text="p"), seed=0, image=torch.zeros(3, 4, 4, dtype=torch.uint8))
        with pytest.raises(ConfigError, match="judges text, but sample 0 has none"):
            score_parts([picture], reward)


def test_a_function_judges_whatever_the_samples_hold():
    seen = []

    def size(outputs, prompts):
        seen.extend(zip(outputs, prompts, strict=True))
        return [len(output) if isinstance(output, str) else output.width for output in outputs]

    picture = Sample(id="0", prompt=Prompt(text="p"), seed=0, image=torch.zeros(3, 4, 6, dtype=torch.uint8))
    assert score_parts([sample("four", "q")], FunctionReward(size, "size")).tolist() == [4]
    assert score_parts([picture], FunctionReward(size, "size")).tolist() == [6]
    assert seen[0] == ("four", "q") and seen[1][1] == "p"
