"""The reward `pictures`: a text is worth what the pictures are worth that a frozen image model draws from it.

It stands with the assembly and not among the reward models, because it is put together of parts that do not know each
other: a policy that draws, and rewards of pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .build import build_policy, build_reward, load_model
from .config import Dtype, parse_config
from .errors import ConfigError
from .prompts import sample_seed
from .protocols import Modality
from .reward_models.texts import completion
from .scoring import score
from .types import Prompt, Sample


class PicturesReward:
    """What rewards of pictures say of those that a frozen image model draws from the text.

    It is the mean over the text's pictures of the weighted sum of their rewards, whose prompt is the text. The noise
    of a picture is a function of the sample's id, so the same sample has the same pictures again.
    """

    modality: Modality = "text"

    def __init__(
        self,
        rewards: Sequence[Mapping[str, Any]],
        *,
        model: str = "shapes",
        steps: int = 25,
        guidance: float | None = None,
        size: int | None = None,
        images_per_text: int = 1,
        batch_size: int = 32,
        dtype: Dtype = "fp32",
        device: str = "cpu",
        name: str = "pictures",
    ) -> None:
        """`rewards` are written as those of a run (`name`, `weight`, `options`), and their raw values are added up;
        `model` is `shapes`, a folder that diffusers saved, or a hub id.

        Args:
            guidance: the pipeline's own default if absent, 1 for none.
            size: height and width of the pictures in pixels; the pipeline's own default if absent.
            batch_size: pictures drawn at once.

        Raises:
            ConfigError: an option out of range; an unknown reward, or one of texts.
            WeightsError: the model cannot be loaded.
        """
        if images_per_text < 1:
            raise ConfigError(f"images_per_text of the reward {name} is {images_per_text}; it must be 1 or more")
        settings = {
            "model": {"path": model, "dtype": dtype, "height": size, "width": size},
            "adapter": {"rank": 1},  # which is never switched on
            "sampling": {"num_inference_steps": steps, "guidance_scale": guidance, "batch_size": batch_size},
            "rewards": list(rewards),
        }
        config = parse_config(settings, where=f"options of the reward {name}")
        self.name = name
        self._images_per_text = images_per_text
        self._rewards = [build_reward(reward, device=device) for reward in config.rewards]
        for weighted in self._rewards:
            if weighted.reward.modality == "text":
                raise ConfigError(
                    f"the reward {name} takes rewards of pictures, and {weighted.reward.name} is of texts"
                )
        self._policy = build_policy(config, load_model(config.model, device))
        self.weights_from = f"pictures of {model}"

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], NaN for a text with a picture that could not be drawn or judged.

        Raises:
            DataError: a sample holds no text.
        """
        rows = [(sample, k) for sample in samples for k in range(self._images_per_text)]
        prompts = [Prompt(text=completion(sample).strip()) for sample, _ in rows]
        seeds = [sample_seed(0, 0, sample.id, k) for sample, k in rows]
        with self._policy.reference():
            pictures = self._policy.sample(prompts, seeds)
        self._policy.forget_prompts()  # few texts come again, and the encodings of all would fill the memory
        scored = score(pictures, self._rewards, combine="sum", max_failed=1.0)
        values = [float("nan") if s.reward is None else s.reward for s in scored]
        return torch.tensor(values).view(len(samples), self._images_per_text).mean(1)
