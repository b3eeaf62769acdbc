"""Language models as policies: what is sampled is what is trained on, whatever the family, the batch, the padding."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_text import CONTEXT, END, FAMILIES, PROMPTS, WORDS, tiny_language_model, tiny_tokenizer
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from raftdiff.config import AdapterConfig, ModelConfig, RunConfig
from raftdiff.errors import ConfigError, DataError, WeightsError
from raftdiff.pipelines.llm import LanguageModel, LanguagePolicy, drawn, load_language_model
from raftdiff.pipelines.loading import load_lora
from raftdiff.pipelines.lora import take_off
from raftdiff.types import Prompt, Sample, padded

GOOD, RED = (3 + WORDS.index(word) for word in ("good", "red"))
ASKED = [Prompt(text=text) for text in PROMPTS]
SEEDS = [11, 12, 13, 14]
GENERATOR = torch.Generator()

every_family = pytest.mark.parametrize("family", FAMILIES)


def policy_of(family: str = "llama", *, model: LanguageModel | None = None, **settings: Any) -> LanguagePolicy:
    """At a little distance from its base."""
    settings = {"max_new_tokens": 8, "temperature": 0.8} | settings
    adapter = settings.pop("adapter", AdapterConfig(rank=2))
    return moved(LanguagePolicy(model or tiny_language_model(family), adapter, **settings))


def moved(policy: LanguagePolicy, size: float = 0.2) -> LanguagePolicy:
    generator = torch.Generator().manual_seed(5)
    for p in policy.parameters():
        p.data += size * torch.randn(p.shape, generator=generator)
    return policy


def recorded(samples: list[Sample], name: str = "log_prob_T") -> torch.Tensor:
    return padded([getattr(s.completion, name) for s in samples])[0]


def tokens(samples: list[Sample]) -> list[list[int]]:
    return [s.completion.tokens_T.tolist() for s in samples if s.completion is not None]


def alone(policy: LanguagePolicy, sample: Sample) -> torch.Tensor:
    """The log-probabilities of a completion by the model's plain forward pass: one row, no padding, temperature 1."""
    prompt, [completion] = policy.tokenizer(sample.prompt.text).input_ids, tokens([sample])
    with torch.no_grad():
        logits = policy.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(completion)), completion]


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_a_token_is_drawn_where_the_cumulative_distribution_passes_the_number():
    log_prob_BV = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).log().expand(6, -1)
    uniform_B = torch.tensor([0.0, 0.4999, 0.5001, 0.7999, 0.8001, 0.99999], dtype=torch.float64)
    assert drawn(log_prob_BV, uniform_B, 1.0).tolist() == [0, 0, 2, 2, 3, 3]


def test_top_p_leaves_the_fewest_most_likely_tokens():
    log_prob_BV = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log().expand(4, -1)
    uniform_B = torch.tensor([0.0, 0.66, 0.67, 0.999], dtype=torch.float64)  # of 0.5 and 0.25, 2/3 and 1/3
    assert drawn(log_prob_BV, uniform_B, 0.74).tolist() == [1, 1, 3, 3]
    assert drawn(log_prob_BV, uniform_B, 0.1).tolist() == [1, 1, 1, 1]  # the first always is
    assert drawn(log_prob_BV, uniform_B, 0.76).tolist() == [1, 3, 3, 2]


def test_tokens_come_as_often_as_they_are_likely():
    uniform_B = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs = torch.tensor([0.05, 0.6, 0.35])
    counts = drawn(probs.log().expand(20_000, -1), uniform_B, 1.0).bincount(minlength=3)
    assert (counts / 20_000 - probs).abs().max() < 0.01


# -- sampling ----------------------------------------------------------------------------------------------------------


@every_family
def test_the_same_prompt_and_seed_give_the_same_text_in_any_batch(family: str):
    policy = policy_of(family, batch_size=5, max_new_tokens=24)
    asked, seeds = ASKED * 3, range(12)
    together = policy.sample(asked, seeds)
    assert family == "gpt2" or len({len(row) for row in tokens(together)}) > 1  # some end before others
    for i, sample in enumerate(together):
        [single] = policy.sample(asked[i : i + 1], seeds[i : i + 1])
        assert tokens([single]) == tokens([sample]) and single.text == sample.text
        torch.testing.assert_close(single.completion.log_prob_T, sample.completion.log_prob_T, atol=1e-5, rtol=0)
    again = policy.sample(asked[::-1], seeds[::-1])[::-1]
    assert tokens(again) == tokens(together)
    assert tokens(policy.sample(asked, [seed + 100 for seed in seeds])) != tokens(together)


@every_family
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probabilities_of_sampling_are_those_of_a_full_forward_pass(family: str, temperature: float):
    policy = policy_of(family, temperature=temperature)
    samples = policy.sample(ASKED, SEEDS)
    log_prob_BT = policy.log_prob(samples, [None] * 4)
    torch.testing.assert_close(log_prob_BT.detach(), recorded(samples), atol=1e-5, rtol=0)
    for sample, row_T in zip(samples, log_prob_BT, strict=True):
        [row], length = tokens([sample]), len(sample.completion.tokens_T)
        prompt = policy.tokenizer(sample.prompt.text).input_ids
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1)[range(length), row]
        torch.testing.assert_close(row_T[:length].detach(), expected, atol=1e-5, rtol=0)
        assert not row_T[length:].any()


@every_family
def test_the_error_is_the_negative_log_likelihood_of_the_completion_alone(family: str):
    policy = policy_of(family)
    samples = policy.sample(ASKED, SEEDS)
    error_B = policy.error(samples, policy.draw(samples, GENERATOR))
    torch.testing.assert_close(error_B.detach(), torch.stack([-alone(policy, s).sum() for s in samples]))
    with torch.no_grad():
        for i, sample in enumerate(samples):
            [single] = policy.error([sample], policy.draw([sample], GENERATOR))
            torch.testing.assert_close(single, error_B[i].detach())


@every_family
def test_logits_are_made_of_completions_alone_and_of_states_that_lie_together(family: str):
    policy, seen = policy_of(family), []
    samples = policy.sample(ASKED, SEEDS)
    policy.model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    policy.log_prob(samples, [None] * len(samples))
    (states_BTD,) = seen
    assert states_BTD.shape[:2] == (len(samples), 1 + max(map(len, tokens(samples))))
    assert states_BTD.is_contiguous()  # of a view, a CPU's product copies the weights for each row


def test_what_a_model_is_set_to_generate_by_does_not_bend_the_samples():
    model = tiny_language_model()
    bent = GenerationConfig(repetition_penalty=5.0, min_new_tokens=6, do_sample=True, top_k=1, eos_token_id=1)
    model.transformer.generation_config = bent
    samples = policy_of(model=model).sample(ASKED, SEEDS)
    assert tokens(samples) == tokens(policy_of().sample(ASKED, SEEDS))
    assert model.transformer.generation_config is bent


def test_all_end_tokens_of_the_model_end_a_text():
    model = tiny_language_model()
    model.transformer.generation_config.eos_token_id = [1, GOOD]
    rows = tokens(policy_of(model=model, max_new_tokens=30).sample(ASKED * 4, range(16)))
    assert {row[-1] for row in rows if len(row) < 30} == {1, GOOD}
    assert not any({1, GOOD} & {*row[:-1]} for row in rows)


def test_a_text_that_ends_by_itself_has_its_end_token_and_one_that_is_cut_off_has_not():
    samples = policy_of(max_new_tokens=4).sample(ASKED * 8, range(32))
    assert {s.completion.finished for s in samples} == {True, False}
    for sample in samples:
        row = sample.completion.tokens_T.tolist()
        assert sample.completion.finished == (row[-1] == 1) and len(row) <= 4
        assert END not in sample.text
        assert sample.text == " ".join(policy_of().tokenizer.convert_ids_to_tokens([t for t in row if t > 2]))


def test_a_text_ends_before_the_first_stop_string_and_its_tokens_after_it():
    policy = policy_of(max_new_tokens=12)
    free = policy.sample(ASKED * 8, range(32))
    policy.stop = ["good bad", "red"]
    for sample, longer in zip(policy.sample(ASKED * 8, range(32)), free, strict=True):
        places = [place for stop in policy.stop if (place := longer.text.find(stop)) >= 0]
        assert sample.text == (longer.text[: min(places)] if places else longer.text)
        length = len(sample.completion.tokens_T)
        assert torch.equal(sample.completion.tokens_T, longer.completion.tokens_T[:length])
        torch.testing.assert_close(sample.completion.log_prob_T, longer.completion.log_prob_T[:length])
        if places:
            assert sample.completion.finished
            said = policy.tokenizer.decode(sample.completion.tokens_T, skip_special_tokens=True)
            assert any(said.endswith(stop) for stop in policy.stop)
    assert any("red" in s.text for s in free) and any("good bad" in s.text for s in free)


def test_without_a_padding_token_texts_are_padded_with_the_end_token(caplog):
    with caplog.at_level("INFO", logger="raftdiff"):
        bare = policy_of(model=tiny_language_model(pad=None))
    assert "no padding token" in caplog.text
    bare.stop = ["red"]
    whole = policy_of(stop=["red"])
    assert tokens(bare.sample(ASKED, SEEDS)) == tokens(whole.sample(ASKED, SEEDS))


def test_without_an_end_token_every_text_is_as_long_as_it_may_be(caplog):
    model = tiny_language_model()
    model.tokenizer.eos_token = model.transformer.generation_config.eos_token_id = None
    policy = policy_of(model=model, max_new_tokens=30)
    assert "the tokenizer has no end token" in caplog.text
    samples = policy.sample(ASKED * 4, range(16))
    assert {len(row) for row in tokens(samples)} == {30} and not any(s.completion.finished for s in samples)
    (own,) = policy.encode_outputs(ASKED[:1], ["good"])
    assert tokens([own]) == [[GOOD]]


def test_a_chat_template_is_applied_where_there_is_one():
    template = "{% for m in messages %}one {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} two{% endif %}"
    chatting = policy_of(model=tiny_language_model(template=template))
    plain = policy_of()
    wrapped = [Prompt(text=f"one {prompt.text} two") for prompt in ASKED]
    assert tokens(chatting.sample(ASKED, SEEDS)) == tokens(plain.sample(wrapped, SEEDS))
    silent = policy_of(model=tiny_language_model(template=template), chat=False)
    assert tokens(silent.sample(ASKED, SEEDS)) == tokens(plain.sample(ASKED, SEEDS))


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_sampled():
    policy = policy_of()
    policy.check_run([Prompt(text="a " * (CONTEXT - 8))])
    long = Prompt(text="a " * (CONTEXT - 7))
    with pytest.raises(
        ConfigError, match=rf"has {CONTEXT - 7} tokens, and with 8 more .* {CONTEXT} of this model.*lower"
    ):
        policy.check_run([*ASKED, long])
    with pytest.raises(ConfigError, match="has no tokens"):
        policy.check_run([Prompt(text=" ")])


def test_a_text_without_words_is_flawed_and_one_without_numbers_too():
    policy = policy_of(max_new_tokens=2)
    flaws = {(s.text == "", s.flaw) for s in policy.sample(ASKED * 8, range(32))}
    assert flaws == {(True, "empty completion"), (False, None)}
    policy.model.lm_head.weight.data[3] = math.nan
    assert {s.flaw for s in policy.sample(ASKED, SEEDS)} == {"log-probabilities that are not finite"}


def test_tokens_are_counted_however_they_are_batched():
    policy = policy_of()
    samples = policy.sample(ASKED, SEEDS)
    count = sum(len(p.text.split()) for p in ASKED) + sum(map(len, tokens(samples)))
    assert policy.passes == count
    with torch.no_grad():
        policy.log_prob(samples, [None] * 4)
    assert policy.passes == 2 * count
    policy.error(samples[:2], policy.draw(samples[:2], GENERATOR))
    policy.error(samples[2:], policy.draw(samples[2:], GENERATOR))
    assert policy.passes == 5 * count


def test_a_batch_that_does_not_fit_into_the_memory_is_halved(monkeypatch):
    policy = policy_of(batch_size=4)
    expected = tokens(policy.sample(ASKED, SEEDS))
    generate, asked = policy.model.generate, []

    def short_of_memory(**arguments: Any) -> Any:
        asked.append(len(arguments["input_ids"]))
        if asked[-1] > 1:
            raise torch.OutOfMemoryError("full")
        return generate(**arguments)

    monkeypatch.setattr(policy.model, "generate", short_of_memory)
    assert tokens(policy.sample(ASKED, SEEDS)) == expected
    assert asked == [4, 2, 1, 1, 1, 1] and policy.batch_size == 1


# -- training ----------------------------------------------------------------------------------------------------------


@every_family
def test_gradients_reach_the_adapter_and_nothing_else(family: str):
    policy = policy_of(family)
    samples = policy.sample(ASKED, SEEDS)
    policy.error(samples, policy.draw(samples, GENERATOR)).sum().backward()
    own = {id(p) for p in policy.parameters()}
    for name, parameter in policy.model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (id(parameter) in own), name
    assert all(p.dtype == torch.float32 for p in policy.parameters())


@every_family
def test_the_reference_is_the_model_as_it_came(family: str):
    plain, policy = tiny_language_model(family).transformer, policy_of(family)
    ids = torch.tensor([[2, 3, 4]])
    with torch.no_grad(), policy.reference():
        assert torch.equal(policy.model(ids).logits, plain(ids).logits)
    assert not torch.allclose(policy.model(ids).logits, plain(ids).logits, atol=1e-2)
    with pytest.raises(RuntimeError), policy.reference():
        raise RuntimeError
    assert not torch.allclose(policy.model(ids).logits, plain(ids).logits, atol=1e-2)


def test_a_fresh_adapter_changes_nothing_and_is_the_same_in_every_run():
    one, other = (LanguagePolicy(tiny_language_model(), AdapterConfig(rank=2)) for _ in range(2))
    ids = torch.tensor([[2, 3, 4]])
    assert torch.equal(one.model(ids).logits, tiny_language_model().transformer(ids).logits)
    state = other.adapter_state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.adapter_state().items())


@every_family
def test_an_adapter_comes_back_and_one_of_another_shape_is_refused(family: str):
    policy, fresh = policy_of(family), LanguagePolicy(tiny_language_model(family), AdapterConfig(rank=2))
    fresh.load_adapter(policy.adapter_state())
    ids = torch.tensor([[2, 3, 4]])
    assert torch.equal(fresh.model(ids).logits, policy.model(ids).logits)
    with pytest.raises(WeightsError, match="another rank or base"):
        policy_of(family, adapter=AdapterConfig(rank=3)).load_adapter(policy.adapter_state())
    other = policy_of("gpt2" if family != "gpt2" else "llama")
    with pytest.raises(WeightsError, match="is only on one side"):
        other.load_adapter(policy.adapter_state())


@pytest.mark.parametrize(
    ("family", "targets", "layers"),
    [
        ("llama", "attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("llama", "linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("llama", ["v_proj"], {"v_proj"}),
        ("gpt2", "attention", {"c_attn", "attn.c_proj"}),
        ("gpt2", "linear", {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"}),
        ("qwen2", "all", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_the_lora_lies_on_the_layers_that_are_asked_for(family: str, targets: Any, layers: set[str]):
    policy = policy_of(family, adapter=AdapterConfig(rank=2, targets=targets))
    carrying = {name.split(".lora_")[0] for name in policy.adapter_state()}
    assert {layer for layer in layers if any(n.endswith(f".{layer}") for n in carrying)} == layers
    assert all(any(name.endswith(f".{layer}") for layer in layers) for name in carrying)


def test_layers_that_are_not_there_are_named():
    with pytest.raises(ConfigError, match=r"no layer is called \['to_q'\]; linear layers here: c_attn, c_fc, c_proj"):
        policy_of("gpt2", adapter=AdapterConfig(targets=["to_q"]))


@every_family
def test_checkpointed_gradients_are_the_same_and_nothing_drops(family: str):
    def gradients(**settings: Any) -> list[torch.Tensor]:
        policy = policy_of(family, **settings)
        samples = policy.sample(ASKED, SEEDS)
        policy.error(samples, policy.draw(samples, GENERATOR)).sum().backward()
        assert tokens(policy.sample(ASKED, SEEDS)) == tokens(samples)
        return [p.grad for p in policy.parameters() if p.grad is not None]

    plain, checkpointed = gradients(), gradients(gradient_checkpointing=True)
    assert len(plain) == len(checkpointed)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, checkpointed, strict=True))


def test_checkpointing_computes_the_layers_again_in_the_backward_pass():
    policy = policy_of(gradient_checkpointing=True)
    samples = policy.sample(ASKED, SEEDS)
    calls: list[int] = []
    policy.model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    error = policy.error(samples, policy.draw(samples, GENERATOR)).sum()
    assert len(calls) == 1
    error.backward()
    assert len(calls) == 2


def test_the_lora_drops_in_training_alone():
    policy = policy_of(adapter=AdapterConfig(rank=2, dropout=0.5))
    samples = policy.sample(ASKED, SEEDS)
    draw = policy.draw(samples, GENERATOR)
    assert not torch.equal(policy.error(samples, draw), policy.error(samples, draw))
    with torch.no_grad():
        assert torch.equal(policy.error(samples, draw), policy.error(samples, draw))
    assert tokens(policy.sample(ASKED, SEEDS)) == tokens(samples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_samples_and_trains_in_one_arithmetic(dtype: torch.dtype):
    model = tiny_language_model()
    policy = policy_of(model=replace(model, transformer=model.transformer.to(dtype)), precision="bf16")
    samples = policy.sample(ASKED, SEEDS)
    log_prob_BT = policy.log_prob(samples, [None] * 4)
    off = float(((log_prob_BT.detach() - recorded(samples)).exp() - 1).abs().max())
    assert off <= policy.log_prob_rounding == 0.25
    assert policy_of().log_prob_rounding == 1e-4
    log_prob_BT.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


# -- the value head ----------------------------------------------------------------------------------------------------


def test_a_value_head_judges_every_token_before_it_is_said():
    policy = policy_of(value=True)
    samples = policy.sample(ASKED, SEEDS)
    log_prob_BT, value_BT = policy.log_prob_and_value(samples)
    torch.testing.assert_close(log_prob_BT.detach(), recorded(samples), atol=1e-5, rtol=0)
    torch.testing.assert_close(value_BT.detach(), recorded(samples, "value_T"), atol=1e-5, rtol=0)
    with torch.no_grad(), policy.reference():
        reference_BT = policy.log_prob(samples, [None] * 4)
    torch.testing.assert_close(reference_BT, recorded(samples, "reference_log_prob_T"), atol=1e-5, rtol=0)
    assert not torch.allclose(reference_BT, recorded(samples), atol=1e-2)
    first = replace(samples[0].completion, tokens_T=samples[0].completion.tokens_T[:1])
    _, alone_BT = policy.log_prob_and_value([replace(samples[0], completion=first)])
    torch.testing.assert_close(alone_BT[0], value_BT[0, :1])  # what follows is not known to it


def test_a_value_head_expects_nothing_at_first_and_is_trained_saved_and_not_exported(tmp_path):
    policy = LanguagePolicy(tiny_language_model(), AdapterConfig(rank=2), max_new_tokens=8, value=True)
    samples = policy.sample(ASKED, SEEDS)
    assert not policy.log_prob_and_value(samples)[1].any()
    moved(policy)
    (policy.log_prob_and_value(samples)[1] - 1).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.parameters())
    state = policy.adapter_state()
    assert {name for name in state if "value" in name} == {"value_head.weight", "value_head.bias"}
    again = LanguagePolicy(tiny_language_model(), AdapterConfig(rank=2), max_new_tokens=8, value=True)
    again.load_adapter(state)
    assert torch.equal(again.log_prob_and_value(samples)[1], policy.log_prob_and_value(samples)[1])
    policy.export(tmp_path, {})
    assert policy.read_adapter(tmp_path).keys() == {name for name in state if "value" not in name}
    with pytest.raises(WeightsError, match="value_head"):
        policy_of().load_adapter(state)


def test_without_a_value_head_there_are_no_values():
    [sample] = policy_of().sample(ASKED[:1], SEEDS[:1])
    assert sample.completion.value_T is None and sample.completion.reference_log_prob_T is None


# -- export ------------------------------------------------------------------------------------------------------------

RELOAD = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
for folder in map(Path, sys.argv[1:]):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "lora").eval()
    torch.save(model(torch.tensor([[2, 3, 4, 5]])).logits, folder / "logits.pt")
assert "raftdiff" not in sys.modules
"""


def test_exported_adapters_say_the_same_bit_for_bit_in_a_fresh_process(tmp_path):
    policies = {tmp_path / family: policy_of(family) for family in FAMILIES}
    for folder, policy in policies.items():
        tiny_language_model(folder.name).save_pretrained(folder / "base")
        policy.export(folder / "lora", {"base_model": "some/base"})
        settings = json.loads((folder / "lora" / "adapter_config.json").read_text())
        assert settings["task_type"] == "CAUSAL_LM" and settings["base_model_name_or_path"] == "some/base"
    subprocess.run([sys.executable, "-c", RELOAD, *policies], check=True)
    for folder, policy in policies.items():
        with torch.no_grad():
            assert torch.equal(torch.load(folder / "logits.pt"), policy.model(torch.tensor([[2, 3, 4, 5]])).logits)


def test_exporting_leaves_the_policy_as_it_was(tmp_path):
    policy = policy_of()
    before, passes = policy.sample(ASKED, SEEDS), policy.passes
    policy.export(tmp_path, {})
    assert policy.passes == passes and tokens(policy.sample(ASKED, SEEDS)) == tokens(before)
    samples = policy.sample(ASKED, SEEDS)
    policy.error(samples, policy.draw(samples, GENERATOR)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.parameters())


def test_an_export_that_says_something_else_is_refused(tmp_path, monkeypatch):
    policy = policy_of()
    load = policy._lora._load

    def damaged(path: Path) -> None:
        load(path)
        policy.model.model.layers[0].self_attn.q_proj.lora_B["check"].weight.data[0] += 1

    monkeypatch.setattr(policy._lora, "_load", damaged)
    with pytest.raises(WeightsError, match="q_proj is another one"):
        policy.export(tmp_path, {})


def test_an_adapter_is_folded_in_and_taken_off(tmp_path):
    policy = policy_of()
    policy.export(tmp_path, {})
    ids = torch.tensor([[2, 3, 4]])
    aligned = policy.model(ids).logits
    fresh = tiny_language_model()
    base = fresh.transformer(ids).logits
    load_lora(fresh, str(tmp_path))
    torch.testing.assert_close(fresh.transformer(ids).logits, aligned, atol=1e-5, rtol=1e-5)
    LanguagePolicy(fresh, AdapterConfig(rank=2))  # and can carry another
    with pytest.raises(WeightsError, match="does not fit"):
        load_lora(tiny_language_model("gpt2"), str(tmp_path))
    assert take_off(policy.pipeline)
    assert torch.equal(policy.model(ids).logits, base)


@every_family
def test_a_model_that_carries_an_adapter_is_refused_and_can_be_freed_of_it(family: str):
    model = tiny_language_model(family)
    LanguagePolicy(model, AdapterConfig(rank=2))
    with pytest.raises(ConfigError, match="already carries the LoRA 'raftdiff'"):
        LanguagePolicy(model, AdapterConfig(rank=2))
    assert take_off(model)
    LanguagePolicy(model, AdapterConfig(rank=2))


# -- own texts ---------------------------------------------------------------------------------------------------------


def test_own_texts_end_with_the_end_token_and_have_an_error():
    policy = policy_of()
    [sample, other] = policy.encode_outputs(ASKED[:2], ["good red", "good"])
    assert tokens([sample, other]) == [[GOOD, RED, 1], [GOOD, 1]]
    assert sample.id != other.id and sample.text == "good red"
    error_B = policy.error([sample, other], policy.draw([sample, other], GENERATOR))
    torch.testing.assert_close(error_B.detach(), torch.stack([-alone(policy, s).sum() for s in (sample, other)]))
    with pytest.raises(DataError, match="has no tokens"):
        policy.encode_outputs(ASKED[:1], [" "])
    with pytest.raises(ConfigError, match="shorten the completion"):
        policy.encode_outputs(ASKED[:1], ["a " * CONTEXT])


def test_a_picture_is_no_sample_of_a_language_model():
    picture = Sample(id="x", prompt=ASKED[0], seed=0, latents=torch.zeros(1, 2, 2))
    with pytest.raises(DataError, match="sample x has no tokens"):
        policy_of().error([picture], policy_of().draw([picture], GENERATOR))


# -- loading and settings ----------------------------------------------------------------------------------------------


@every_family
def test_a_saved_model_loads_with_its_tokenizer(tmp_path, family: str):
    tiny_language_model(family).save_pretrained(tmp_path)
    loaded = load_language_model(ModelConfig(modality="text", path=str(tmp_path)))
    saved = tiny_language_model(family)
    ids = loaded.tokenizer("a b c", return_tensors="pt").input_ids
    assert torch.equal(loaded.transformer(ids).logits, saved.transformer(ids).logits)
    half = load_language_model(ModelConfig(modality="text", path=str(tmp_path), dtype="bf16"))
    assert half.transformer.dtype == torch.bfloat16


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path):
    def refusal(path: Path) -> str:
        with pytest.raises(WeightsError) as caught:
            load_language_model(ModelConfig(modality="text", path=str(path)))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "cannot be loaded" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in refusal(tmp_path / "empty")
    folder = tmp_path / "whole"
    tiny_language_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "weights are missing, such as model.layers.2" in refusal(folder)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "cannot be loaded" in refusal(folder)
    sizes = {"vocab_size": 12, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    t5 = tmp_path / "t5"
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(t5)
    tiny_tokenizer().save_pretrained(t5)
    assert "cannot be loaded" in refusal(t5)


def test_an_encoder_and_decoder_is_refused():
    sizes = {"vocab_size": 12, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration is not a causal language model"):
        LanguagePolicy(LanguageModel(transformer=model, tokenizer=tiny_tokenizer()))


def test_full_fine_tuning_and_kernels_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match="adapter.method: full is for images"):
        policy_of(adapter=AdapterConfig(method="full"))
    for attention, words in (("xformers", "is for pictures"), ("flash", "needs an NVIDIA GPU")):
        config = RunConfig.model_validate({"model": {"modality": "text", "attention": attention}})
        with pytest.raises(ConfigError, match=words):
            LanguagePolicy.from_config(config, tiny_language_model())


@pytest.mark.parametrize(
    ("modality", "settings", "key"),
    [
        ("text", {"model": {"scheduler": "DDIMScheduler"}}, "model.scheduler"),
        ("text", {"model": {"height": 64}}, "model.height"),
        ("text", {"model": {"compile": True}}, "model.compile"),
        ("text", {"sampling": {"num_inference_steps": 10}}, "sampling.num_inference_steps"),
        ("text", {"sampling": {"guidance_scale": 2.0}}, "sampling.guidance_scale"),
        ("text", {"training": {"snr_gamma": 5.0}}, "training.snr_gamma"),
        ("text", {"evaluation": {"guidance_scales": [1.0]}}, "evaluation.guidance_scales"),
        ("image", {"sampling": {"temperature": 0.5}}, "sampling.temperature"),
        ("image", {"sampling": {"stop": ["x"]}}, "sampling.stop"),
        ("image", {"model": {"chat_template": False}}, "model.chat_template"),
    ],
)
def test_settings_of_the_other_modality_are_refused(modality: str, settings: dict, key: str):
    model = {"modality": modality} | settings.pop("model", {})
    with pytest.raises(ValueError, match=f"{key}: not for model.modality: {modality}; leave it out"):
        RunConfig.model_validate({"model": model} | settings)
