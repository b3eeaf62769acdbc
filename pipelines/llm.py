"""Any causal language model of transformers as a policy, with no code per model family.

Sampling is transformers' own `generate`, with its cache and its stopping. It is told to take the most likely token,
and one logits processor leaves it only the token that is drawn: by the inverse of the cumulative distribution, at a
number that each row draws of its own seed, so that a prompt and a seed give the same text in any batch. The processor
keeps the log-probabilities, which are therefore those of the pass that sampled.

Training runs prompts and completions through the model at once: prompts padded on the left, completions on the right,
so that the logits of all completions are the last columns, and no others are computed.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, load_peft_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from raftdiff.batches import Batches
from raftdiff.config import AdapterConfig, Dtype, ModelConfig, RunConfig
from raftdiff.data import load_completions, load_text_preferences
from raftdiff.errors import ConfigError, DataError, MissingExtraError, WeightsError
from raftdiff.shapes import WEIGHTS
from raftdiff.types import Completion, Draw, Prompt, Sample, padded

from .loading import DTYPES
from .lora import ADAPTER, PEFT_PREFIX, Format, Lora, adapters_on, check_state, fingerprint

logger = logging.getLogger(__name__)

ATTENTION = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj"),
    *("c_attn", "attn.c_proj", "query_key_value", "attention.dense", "self_attention.dense", "Wqkv"),
]
KERNELS = {"sdpa": "sdpa", "flash": "flash_attention_2"}
LARGE_LOGIT = 32
TAIL = 256  # tokens at the end of a text in which a stop string must lie
VALUE = "value_head."  # before the names of its weights in the state


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A causal language model and its tokenizer, under the names that pipelines of diffusers give to theirs."""

    transformer: Any
    tokenizer: Any

    def save_pretrained(self, folder: Path) -> None:
        """Write both, as `AutoModelForCausalLM` and `AutoTokenizer` load them."""
        self.transformer.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_language_model(model: ModelConfig, device: str = "cpu") -> LanguageModel:
    """The model that `model` names with its tokenizer, on its device.

    Raises:
        WeightsError: it is missing, incomplete, no causal language model, or not in safetensors.
    """
    tokenizer = load_tokenizer(model)
    loaded, found = _loaded(
        model,
        AutoModelForCausalLM.from_pretrained,
        dtype=DTYPES[model.dtype],
        use_safetensors=True,
        output_loading_info=True,
    )
    if found["missing_keys"]:
        raise WeightsError(
            f"the language model {model.path!r}: {len(found['missing_keys'])} weights are missing, such as "
            f"{min(found['missing_keys'])}; download or save it again"
        )
    return LanguageModel(transformer=loaded.to(device if model.device == "auto" else model.device), tokenizer=tokenizer)


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer of the model that `model` names. Raises WeightsError where it cannot be loaded."""
    return _loaded(model, AutoTokenizer.from_pretrained)


def check_language_model(config: RunConfig, prompts: Sequence[Prompt], lora: str | None = None) -> None:
    """As far as it can be known without the weights: whether `config` names a causal language model which takes these
    prompts, and which the LoRA in the folder `lora` fits.

    Raises:
        WeightsError, ConfigError: it does not.
    """
    tokenizer = load_tokenizer(config.model)
    with torch.device("meta"):
        empty = _loaded(
            config.model,
            lambda path, **hub: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, **hub)),
        )
    tokens = PromptTokens(
        tokenizer,
        context=_context(empty),
        max_new_tokens=config.sampling.max_new_tokens,
        chat=config.model.chat_template,
    )
    for prompt in prompts:
        tokens(prompt)
    if lora is not None:
        _check_lora(empty, lora)


def _check_lora(empty: Any, folder: str) -> None:
    """Raise WeightsError unless the tensors of a LoRA in peft's format are those that this model, on the device `meta`,
    would have."""
    try:
        inject_adapter_in_model(PeftConfig.from_pretrained(folder), empty, ADAPTER)
        state = load_peft_weights(folder, "cpu")
    except Exception as error:  # the hub, peft and safetensors each raise their own
        raise WeightsError(
            f"{folder} holds no LoRA in peft's format for {type(empty).__name__}: "
            f"{' '.join(str(error).split())[:300]}; a finished run of a language model has one in its folder `lora`"
        ) from error
    own = get_peft_model_state_dict(empty, adapter_name=ADAPTER)
    check_state(own, {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in state.items()})


def _loaded(model: ModelConfig, load: Callable[..., Any], **options: Any) -> Any:
    path = str(WEIGHTS / "text") if model.path == "shapes" else model.path
    try:
        return load(path, revision=model.revision, **options)
    except Exception as error:  # the hub, safetensors and transformers each raise their own
        raise WeightsError(
            f"the language model {model.path!r} cannot be loaded: {' '.join(str(error).split())[:300]}; give `shapes`, "
            "a folder with a causal language model and its tokenizer as transformers saves them, or a hub id (a "
            "download that broke off resumes when repeated)"
        ) from error


class PromptTokens:
    """Prompts as a language model takes them: in the chat template of its tokenizer, where it has one, as tokens.

    Args:
        context: most tokens of a prompt with its completion; None where the model does not say.
        max_new_tokens: of a completion.
        chat: whether to use the chat template.
    """

    def __init__(self, tokenizer: Any, *, context: int | None, max_new_tokens: int, chat: bool):
        self._tokenizer, self._context, self._max_new_tokens = tokenizer, context, max_new_tokens
        self._chat = chat and bool(getattr(tokenizer, "chat_template", None))
        self._known: dict[str, list[int]] = {}

    def __call__(self, prompt: Prompt) -> list[int]:
        """Raises ConfigError for a prompt without tokens, or one that leaves no room for its completion."""
        if prompt.text not in self._known:
            self._known[prompt.text] = self._encode(prompt.text)
        return self._known[prompt.text]

    def templated(self, text: str) -> str:
        """The text in the chat template, as the turn of a user; as it is where there is none."""
        if not self._chat:
            return text
        turns = [{"role": "user", "content": text}]
        return self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer(self.templated(text), add_special_tokens=not self._chat).input_ids
        self.check_length(text, len(ids), self._max_new_tokens, "lower max_new_tokens or shorten the prompt")
        if not ids:
            raise ConfigError(f"the prompt {text!r} has no tokens, and this tokenizer adds none; give another one")
        return ids

    def check_length(self, text: str, prompt: int, completion: int, remedy: str) -> None:
        """Raise ConfigError unless so many tokens of a prompt and of its completion fit into the context."""
        if self._context is not None and prompt + completion > self._context:
            shown = text if len(text) <= 60 else f"{text[:60]}..."
            raise ConfigError(
                f"the prompt {shown!r} has {prompt} tokens, and with {completion} more it does not fit into the "
                f"{self._context} of this model; {remedy}"
            )


class LanguagePolicy:
    """A causal language model being aligned.

    Args:
        language_model: the model, on its device, and its tokenizer. A chat template of the tokenizer is applied.
        adapter: the LoRA to train.
        temperature, top_p, max_new_tokens, stop, batch_size: of sampling. A text ends before the first of the `stop`
            strings; its tokens are kept up to the end of it.
        chat: whether prompts are put into the tokenizer's chat template, where it has one.
        gradient_checkpointing: recompute activations in the backward pass.
        precision: arithmetic of sampling and training.
        value: whether to add a value head, for algorithms that need `log_prob_and_value`.

    Raises:
        ConfigError: the model or a setting does not fit.
    """

    modality: Literal["text"] = "text"

    def __init__(
        self,
        language_model: LanguageModel,
        adapter: AdapterConfig | None = None,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
        batch_size: int = 8,
        chat: bool = True,
        gradient_checkpointing: bool = False,
        precision: Dtype = "fp32",
        value: bool = False,
    ):
        self.pipeline = language_model
        self.model, self.tokenizer = language_model.transformer, language_model.tokenizer
        self.adapter = adapter or AdapterConfig()
        self._check()
        self.temperature, self.top_p, self.max_new_tokens, self.stop = temperature, top_p, max_new_tokens, list(stop)
        self.batch_size = batch_size
        self.precision = DTYPES[precision]
        self.passes = 0
        self.prompt_tokens = PromptTokens(
            self.tokenizer, context=_context(self.model), max_new_tokens=max_new_tokens, chat=chat
        )
        self._ends = _end_tokens(self.model, self.tokenizer)
        self._pad = _pad_token(self.tokenizer, self._ends)
        self._fingerprint = fingerprint(self.model)
        self._takes = inspect.signature(self.model.forward).parameters.keys()
        self.model.requires_grad_(False).eval()
        if gradient_checkpointing:
            self._checkpoint_gradients()
        self._lora = Lora(language_model, "transformer", self.adapter, attention=ATTENTION, task_type="CAUSAL_LM")
        self._value_head = _value_head(self.model) if value else None
        self._switched = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, GradientCheckpointingLayer) or name.split(".")[-2:-1] == ["lora_dropout"]
        ]

    load = staticmethod(load_language_model)

    @classmethod
    def from_config(cls, config: RunConfig, language_model: LanguageModel, *, needs: Sequence[str] = ()) -> Any:
        """The policy of a run whose algorithm `needs` these.

        Raises:
            ConfigError: attention kernels that this model or this device does not have.
        """
        if not isinstance(language_model, LanguageModel):
            raise ConfigError(f"{type(language_model).__name__} is no language model: set model.modality to image")
        sampling, model = config.sampling, config.model
        if model.attention != "sdpa":
            _set_attention(language_model.transformer, model.attention)
        return cls(
            language_model,
            config.adapter,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
            stop=sampling.stop,
            batch_size=sampling.batch_size,
            chat=model.chat_template,
            gradient_checkpointing=model.gradient_checkpointing,
            precision=config.training.precision,
            value="log_prob_and_value" in needs,
        )

    def _check(self) -> None:
        kind = type(self.model).__name__
        if not hasattr(self.model, "generate") or getattr(self.model.config, "is_encoder_decoder", False):
            raise ConfigError(f"{kind} is not a causal language model; give one that AutoModelForCausalLM loads")
        if carried := adapters_on(self.model):
            raise ConfigError(
                f"this {kind} already carries the LoRA {carried[0]!r}: fold it in with peft's merge_and_unload(), or "
                "load the model again"
            )
        if self.adapter.method == "full":
            raise ConfigError("adapter.method: full is for images; language models are trained by a lora")

    def _checkpoint_gradients(self) -> None:
        newer = getattr(self.model, "activation_checkpointing_enable", None)
        enable = newer or self.model.gradient_checkpointing_enable  # which newer transformers warn of
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(
                f"model.gradient_checkpointing: {type(self.model).__name__} does not have it; leave it out"
            ) from error
        for module in self.model.modules():  # checkpointing needs training mode, in which some would drop
            for name, value in vars(module).items():
                if isinstance(value, float) and (isinstance(module, torch.nn.Dropout) or "drop" in name):
                    setattr(module, name, 0.0)

    # -- what is trained ------------------------------------------------------------------------------------------

    def parameters(self) -> list[torch.nn.Parameter]:
        head = [] if self._value_head is None else [*self._value_head.parameters()]
        return [p for p in self.model.parameters() if p.requires_grad] + head

    def reference(self) -> AbstractContextManager[None]:
        """The base model: the LoRA switched off."""
        return self._lora.off()

    def adapter_state(self) -> dict[str, torch.Tensor]:
        state = self._lora.state()
        if self._value_head is not None:
            state = state | self._value_head.state_dict(prefix=VALUE)
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def load_adapter(self, state: Mapping[str, torch.Tensor]) -> None:
        check_state(self.adapter_state(), state)
        self._lora.load_state({name: tensor for name, tensor in state.items() if not name.startswith(VALUE)})
        if self._value_head is not None:
            head = {name.removeprefix(VALUE): tensor for name, tensor in state.items() if name.startswith(VALUE)}
            self._value_head.load_state_dict(head)

    def export(
        self,
        path: Path,
        metadata: Mapping[str, str] | None = None,
        *,
        format: Format = "diffusers",
        dtype: Dtype = "fp32",
    ) -> None:
        """Write the LoRA, without a value head, to the folder `path` as `peft.PeftModel.from_pretrained` loads it, and
        load it again to see that it says the same.

        Raises:
            ConfigError: another format than that of peft, which here goes by `diffusers` as well.
            WeightsError: what was written says something else.
        """
        if format != "diffusers":
            raise ConfigError(f"the format {format} is for pictures; a language model's LoRA has that of peft alone")
        path = Path(path)
        self._lora.save(path, metadata or {}, format=format, dtype=DTYPES[dtype])
        self._lora.check(path, self._said)

    def read_adapter(self, folder: Path) -> dict[str, torch.Tensor]:
        """The `adapter_state` that `export` wrote to a folder."""
        return self._lora.read(folder)

    def load_line(self, path: str) -> str:
        """The Python that puts what was exported to `path` on `model`."""
        return f"import peft; model = peft.PeftModel.from_pretrained(model, {path!r})"

    def _said(self) -> torch.Tensor:
        """The logits of the first tokens of the vocabulary, one after the other."""
        ids = torch.arange(min(16, self.model.get_input_embeddings().num_embeddings), device=self.device)[None]
        self._set_training()
        with self._arithmetic():
            return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def fingerprint(self) -> str:
        return self._fingerprint

    # -- prompts and texts ----------------------------------------------------------------------------------------

    def check_run(
        self, prompts: Sequence[Prompt], *, noise_level: float | None = None, teacher: LanguagePolicy | None = None
    ) -> None:
        """Raise ConfigError for a prompt that leaves no room for its completion, or a teacher of other tokens."""
        for prompt in prompts:
            self.prompt_tokens(prompt)
        if teacher and teacher.tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise ConfigError("algorithm.teacher: its tokens are not those of model.path; give one of the same family")

    def read_own(self, path: str | Path, *, pairs: bool) -> Iterator[tuple[str, ...]]:
        """As `load_text_preferences`, or `load_completions`."""
        return (load_text_preferences if pairs else load_completions)(path)

    def encode_outputs(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Sample]:
        """A user's own completions as training samples, each with the end token after it.

        Raises:
            ConfigError: one is with its prompt longer than the model can take.
            DataError: one has no tokens.
        """
        return [self._own(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]

    def _own(self, prompt: Prompt, text: str) -> Sample:
        digest = hashlib.sha256(f"{prompt.text}\0{text}".encode()).hexdigest()[:16]
        completion = self.encode_completion(prompt, text)
        return Sample(id=f"data-{digest}", prompt=prompt, seed=0, text=text, completion=completion)

    def encode_completion(self, prompt: Prompt, text: str, *, finished: bool = True) -> Completion:
        """A text that this model has not sampled, with the end token after it where it is `finished`; its
        log-probabilities are NaN.

        Raises:
            ConfigError: it is with its prompt longer than the model can take.
            DataError: it has no tokens.
        """
        tokens = self.tokenizer(text, add_special_tokens=False).input_ids
        if not tokens:
            raise DataError(f"the completion {text!r} of the prompt {prompt.text!r} has no tokens; leave it out")
        tokens = [*tokens, *(self._ends[:1] if finished else [])]
        length = len(self.prompt_tokens(prompt))
        self.prompt_tokens.check_length(prompt.text, length, len(tokens), "shorten the completion")
        unsampled_T = torch.full((len(tokens),), torch.nan)
        return Completion(tokens_T=torch.tensor(tokens), log_prob_T=unsampled_T, finished=finished)

    # -- sampling -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        guidance_scale: float | None = None,
        noise_level: float | None = None,
    ) -> list[Sample]:
        """A completion for each prompt and seed, with its log-probabilities and, where there is a value head, what it
        and the base model say of the tokens. `guidance_scale` and `noise_level` are without effect."""
        batches = Batches(
            self.batch_size,
            "texts at once (sampling.batch_size)",
            "set model.dtype: bf16 or a smaller sampling.max_new_tokens",
        )
        samples = batches.run(len(prompts), lambda rows: self._sample_batch(prompts[rows], seeds[rows]))
        self.batch_size = batches.size  # what fits is remembered
        return samples

    def _sample_batch(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Sample]:
        ids, mask = self._left(prompts)
        drawing = _Drawing(seeds, self.max_new_tokens, self.temperature, self.top_p)
        self._set_training()
        with self._generating() as settings, self._arithmetic():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([drawing]),
                stopping_criteria=StoppingCriteriaList([_Stopping(self._stops, ids.shape[1])] if self.stop else []),
            )
        tokens_BT, log_prob_BT = output[:, ids.shape[1] :].cpu(), torch.stack(drawing.log_probs, 1).cpu()
        samples = [
            self._completed(prompt, seed, tokens_BT[i], log_prob_BT[i])
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        self._count(samples)
        return samples if self._value_head is None else self._judged(samples)

    @contextmanager
    def _generating(self) -> Iterator[GenerationConfig]:
        """The settings for `generate`; while open, the model has none of its own, which would be mixed into them."""
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self._ends or None,
            pad_token_id=self._pad,
        )
        own, self.model.generation_config = self.model.generation_config, settings
        try:
            yield settings
        finally:
            self.model.generation_config = own

    def _completed(self, prompt: Prompt, seed: int, tokens_T: torch.Tensor, log_prob_T: torch.Tensor) -> Sample:
        """The sample that ends where the text does: the batch goes on until its last row has ended."""
        tokens = tokens_T.tolist()
        length = next((i + 1 for i, token in enumerate(tokens) if token in self._ends), len(tokens))
        finished = length < len(tokens) or tokens[-1] in self._ends
        text = self._decode(tokens[:length])
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if found:
            finished, text = True, text[: min(found)]
            length = bisect_left(range(1, length), True, key=lambda n: self._stops(tokens[:n])) + 1
        completion = Completion(
            tokens_T=tokens_T[:length].clone(),
            log_prob_T=log_prob_T[:length].clone(),
            temperature=self.temperature,
            finished=finished,
        )
        return Sample(
            id=f"{prompt.id}-{seed:016x}",
            prompt=prompt,
            seed=seed,
            text=text,
            completion=completion,
            flaw=_flaw(text, completion),
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _stops(self, tokens: Sequence[int]) -> bool:
        text = self._decode(tokens)
        return any(stop in text for stop in self.stop)

    def _judged(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with the values and the base model's log-probabilities of their tokens."""
        value_BT = self.log_prob_and_value(samples)[1].cpu()
        with self.reference():
            reference_BT = self.log_prob(samples, [None] * len(samples)).cpu()
        judged = []
        for sample, value_T, log_prob_T in zip(samples, value_BT, reference_BT, strict=True):
            completion = _completion(sample)
            own = slice(len(completion.tokens_T))
            completion = replace(completion, value_T=value_T[own].clone(), reference_log_prob_T=log_prob_T[own].clone())
            judged.append(replace(sample, completion=completion))
        return judged

    # -- training -------------------------------------------------------------------------------------------------

    def draw(self, samples: Sequence[Sample], generator: torch.Generator) -> Draw:
        """Nothing: the likelihood of a text needs no chance."""
        rows = len(samples)
        return Draw(
            noise=torch.zeros(rows, 0), quantile_B=torch.zeros(rows), dropped_B=torch.zeros(rows, dtype=torch.bool)
        )

    def error(self, samples: Sequence[Sample], draw: Draw) -> torch.Tensor:
        """The negative log-likelihood of each completion at temperature 1, the sum over its tokens, float32 [B]."""
        return -self.token_log_prob(samples).sum(1)

    def token_log_prob(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Log-probabilities of the tokens at temperature 1, over the whole vocabulary, float32 [B, T]; 0 beyond the end
        of a completion."""
        return self._log_prob(samples, torch.ones(len(samples)))

    def log_prob(self, samples: Sequence[Sample], steps: Sequence[int | None]) -> torch.Tensor:
        """Log-probabilities of the tokens at the temperature of each sample, over the whole vocabulary, float32 [B, T];
        0 beyond the end of a completion."""
        return self._log_prob(samples, _temperatures(samples))

    @property
    def log_prob_rounding(self) -> float:
        """How far by rounding alone the ratio of likelihoods may be from 1 right after sampling, which goes token by
        token: where a likelihood comes of logits of some tens. On a GPU fp32 may have the 10 bits of TF32."""
        kinds = {self.model.dtype, self.precision} | ({torch.float16} if self.device.type == "cuda" else set())
        return max(1e-4, *(LARGE_LOGIT * torch.finfo(kind).eps for kind in kinds))

    def log_prob_and_value(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """`log_prob` and, of the same pass, what the value head expects before each token, float32 [B, T]; 0 beyond the
        end of a completion."""
        assert self._value_head is not None
        output, tokens_BT, mask_BT = self._forward(samples, output_hidden_states=True)
        hidden_BTD = output.hidden_states[-1][:, -mask_BT.shape[1] - 1 : -1]
        value_BT = self._value_head(hidden_BTD.float())[..., 0] * mask_BT
        return self._read(output, tokens_BT, mask_BT, _temperatures(samples)), value_BT

    def _log_prob(self, samples: Sequence[Sample], temperature_B: torch.Tensor) -> torch.Tensor:
        return self._read(*self._forward(samples), temperature_B)

    def _read(
        self, output: Any, tokens_BT: torch.Tensor, mask_BT: torch.Tensor, temperature_B: torch.Tensor
    ) -> torch.Tensor:
        """The log-probabilities of the tokens in what the model says of them."""
        logits_BTV = output.logits[:, -mask_BT.shape[1] - 1 : -1].float() / temperature_B.to(self.device)[:, None, None]
        log_prob_BT = logits_BTV.log_softmax(-1).gather(-1, tokens_BT[..., None])[..., 0]
        return log_prob_BT.masked_fill(~mask_BT, 0.0)

    def _forward(self, samples: Sequence[Sample], **options: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """What the model says of prompts and completions, and the completions' tokens and their mask [B, T], of which
        the last T + 1 columns of the output are, one place early."""
        ids, mask = self._left([sample.prompt for sample in samples])
        tokens_BT, mask_BT = (t.to(self.device) for t in padded([_completion(sample).tokens_T for sample in samples]))
        mask = torch.cat([mask, mask_BT.long()], 1)
        known = {
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            # Their places, not their number: of that transformers makes a view, on which a CPU's product copies the
            # output layer's weights for each row.
            "logits_to_keep": torch.arange(ids.shape[1] - 1, mask.shape[1], device=self.device),
            "use_cache": False,
        }
        self._set_training()
        with self._arithmetic():
            output = self.model(
                input_ids=torch.cat([ids, tokens_BT], 1),
                attention_mask=mask,
                **{name: value for name, value in known.items() if name in self._takes},
                **options,
            )
        self._count(samples)
        return output, tokens_BT, mask_BT

    def _left(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of the prompts and their mask, int64 [B, P], padded on the left."""
        reversed_rows = [torch.tensor(self.prompt_tokens(prompt)[::-1]) for prompt in prompts]
        ids, mask = (tensor.flip(1).to(self.device) for tensor in padded(reversed_rows))
        return ids.masked_fill(~mask, self._pad), mask.long()

    def _count(self, samples: Sequence[Sample]) -> None:
        tokens = sum(len(self.prompt_tokens(sample.prompt)) + len(_completion(sample).tokens_T) for sample in samples)
        self.passes += tokens * (3 if torch.is_grad_enabled() else 1)  # a backward pass costs about two forward

    def _arithmetic(self) -> AbstractContextManager[Any]:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def _set_training(self) -> None:
        """Switch to what differs in training, where there are gradients: layers are checkpointed, and the LoRA drops.
        The model itself stays in evaluation. It lasts until the next pass, as the backward pass computes some again."""
        for module in self._switched:
            module.training = torch.is_grad_enabled()


class _Stopping(StoppingCriteria):
    """Whether the end of each row, beyond its prompt, `stops`. Of rows that have ended it does not matter."""

    def __init__(self, stops: Callable[[Sequence[int]], bool], prompt: int):
        self._stops, self._prompt = stops, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = input_ids[:, self._prompt :][:, -TAIL:].tolist()
        return torch.tensor([self._stops(row) for row in rows], device=input_ids.device)


class _Drawing(LogitsProcessor):
    """Leaves each row the one token that is drawn for it, and keeps its log-probability."""

    def __init__(self, seeds: Sequence[int], steps: int, temperature: float, top_p: float):
        # From CPU generators: the same seed is the same text on every device, but for the rounding of its arithmetic.
        rows = [torch.rand(steps, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        self._uniform_BT = torch.stack(rows)
        self._temperature, self._top_p = temperature, top_p
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        log_prob_BV = (scores.float() / self._temperature).log_softmax(-1)
        drawn_B1 = drawn(log_prob_BV, self._uniform_BT[:, len(self.log_probs)], self._top_p)[:, None]
        self.log_probs.append(log_prob_BV.gather(1, drawn_B1)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, drawn_B1, 0.0)


def drawn(log_prob_BV: torch.Tensor, uniform_B: torch.Tensor, top_p: float) -> torch.Tensor:
    """The tokens, int64 [B], at which the cumulative distribution passes `uniform_B`, in [0, 1). With `top_p` below 1
    it is that of the fewest most likely tokens which together have that probability (nucleus sampling)."""
    finest = torch.float32 if log_prob_BV.device.type == "mps" else torch.float64
    prob_BV = log_prob_BV.to(finest).exp()
    order_BV = None
    if top_p < 1:
        prob_BV, order_BV = prob_BV.sort(dim=-1, descending=True)
        prob_BV = prob_BV.where(prob_BV.cumsum(-1) - prob_BV < top_p, 0.0)
    cumulative_BV = prob_BV.cumsum(-1)
    wanted_B1 = uniform_B.to(cumulative_BV)[:, None] * cumulative_BV[:, -1:]
    place_B1 = torch.searchsorted(cumulative_BV, wanted_B1, right=True).clamp(max=prob_BV.shape[-1] - 1)
    return (place_B1 if order_BV is None else order_BV.gather(1, place_B1))[:, 0]


def _temperatures(samples: Sequence[Sample]) -> torch.Tensor:
    return torch.tensor([_completion(sample).temperature for sample in samples])


def _completion(sample: Sample) -> Completion:
    if sample.completion is None:
        raise DataError(f"sample {sample.id} has no tokens to train on")
    return sample.completion


def _flaw(text: str, completion: Completion) -> str | None:
    if not completion.log_prob_T.isfinite().all():
        return "log-probabilities that are not finite"
    return None if text.strip() else "empty completion"


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text, the tokenizer's own first."""
    of_model = getattr(model.generation_config, "eos_token_id", None)
    several = of_model if isinstance(of_model, list) else [of_model]
    ends = [token for token in dict.fromkeys([tokenizer.eos_token_id, *several]) if token is not None]
    if not ends:
        logger.warning("the tokenizer has no end token: every text is as long as sampling.max_new_tokens")
    return ends


def _context(model: Any) -> int | None:
    """Most tokens that the model takes at once, where it says."""
    return getattr(model.config, "max_position_embeddings", None)


def _pad_token(tokenizer: Any, ends: Sequence[int]) -> int:
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    logger.info("the tokenizer has no padding token: texts are padded with its end token, which a mask hides")
    return next(iter(ends), 0)


def _value_head(model: Any) -> torch.nn.Linear:
    """It expects 0 of everything at first."""
    head = torch.nn.Linear(model.config.get_text_config().hidden_size, 1, device=next(model.parameters()).device)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    return head


def _set_attention(model: Any, kernels: str) -> None:
    where = f"model.attention: {kernels}"
    if kernels not in KERNELS:
        raise ConfigError(f"{where} is for pictures; for a language model set it to sdpa or flash")
    if next(model.parameters()).device.type != "cuda" or model.dtype == torch.float32:
        raise ConfigError(f"{where} needs an NVIDIA GPU and model.dtype bf16 or fp16; set it to sdpa")
    try:
        model.set_attn_implementation(KERNELS[kernels])
    except Exception as error:  # import errors, missing kernels, models without it
        raise MissingExtraError(
            f"{where} cannot be used here ({' '.join(str(error).split())[:200]}); pip install flash-attn, or set it to "
            "sdpa"
        ) from error
