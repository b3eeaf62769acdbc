"""Names of rewards, judges, algorithms and policies, and where each lives. Nothing is imported before it is asked for.

A new unit is one file and one line in a table below. Another package adds one with an entry point:

    [project.entry-points."raftdiff.rewards"]
    my-reward = "my_package.rewards:MyReward"
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from difflib import get_close_matches
from importlib import metadata
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import ConfigError, MissingExtraError


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message about an unknown name, empty where nothing is like it.

    >>> nearest("asthetic", ["clip", "aesthetic"])
    "; did you mean 'aesthetic'?"
    """
    close = get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_choice(option: str, value: Any, choices: Any) -> None:
    """Raise ConfigError unless the value of an option is one of `choices`, a Literal type."""
    known = get_args(choices)
    if value not in known:
        raise ConfigError(f"{option} is {value!r}{nearest(str(value), known)} (there are {', '.join(known)})")


def checked_options(unit: Any, options: Mapping[str, Any], where: str, *, page: str) -> dict[str, Any]:
    """The options of a unit, each as the type of its parameter: to YAML `1e3` is text. A Literal is left to the unit,
    which knows what is like it.

    Args:
        unit: its class.
        where: what the options are of, for error messages.
        page: where they are documented.

    Raises:
        ConfigError: one that the unit does not take, or needs, or cannot read.
    """
    accepted = inspect.signature(unit).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    for name in options:
        if name not in accepted and not takes_any:
            raise ConfigError(
                f"{where} has no option {name!r}{nearest(name, accepted)} (it has {', '.join(accepted) or 'none'})"
            )
    for name, parameter in accepted.items():
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD and name not in options:
            raise ConfigError(f"{where} needs the option {name!r}: {page}")
    hints = get_type_hints(unit if is_dataclass(unit) else unit.__init__)
    return {name: _typed(value, hints.get(name, Any), f"{where}: option {name!r}") for name, value in options.items()}


def _typed(value: Any, hint: Any, where: str) -> Any:
    from pydantic import PydanticUserError, TypeAdapter, ValidationError  # not before anything is built

    if get_origin(hint) is Literal:
        return value
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{where}: {error.errors()[0]['msg']}, found {value!r}") from None
    except PydanticUserError:  # a type that only the unit knows
        return value


class Registry:
    """The units of one kind: name -> "module:Class".

    `kind` is the word for error messages. A built-in name cannot be replaced by an entry point.
    """

    def __init__(self, kind: str, targets: Mapping[str, str], *, entry_point_group: str) -> None:
        self._kind = kind
        self._targets = dict(targets)
        self._entry_point_group = entry_point_group

    def names(self) -> list[str]:
        """Every name that `load` takes, built in or from another package's entry points, sorted."""
        return sorted(self._all_targets())

    def load(self, name: str, *, allow_code: bool = False) -> type[Any]:
        """The class registered as `name`; with `allow_code` also one spelled "module:Class".

        Raises:
            ConfigError: an unknown name, a "module:Class" that is not allowed or does not exist.
            MissingExtraError: the unit needs a package that is not installed.
        """
        if ":" in name:
            if not allow_code:
                raise ConfigError(
                    f"{self._kind} {name!r} names code to be imported, which a file may not ask for by itself: "
                    f"add --allow-code to the command line of this launch, or use one of {self._listing()}"
                )
            return self._import(name, name)
        targets = self._all_targets()
        if name not in targets:
            raise ConfigError(f"unknown {self._kind} {name!r}{nearest(name, targets)} (there are {self._listing()})")
        return self._import(name, targets[name])

    def describe(self, name: str) -> str:
        """One line on the unit: the first of its docstring, or what it needs installed.

        Raises:
            ConfigError: an unknown name.
        """
        try:
            return (self.load(name).__doc__ or "").strip().split("\n")[0]
        except MissingExtraError as error:
            return str(error)

    def _all_targets(self) -> dict[str, str]:
        others = {point.name: point.value for point in metadata.entry_points(group=self._entry_point_group)}
        return others | self._targets

    def _listing(self) -> str:
        return ", ".join(self.names())

    def _import(self, name: str, target: str) -> type[Any]:
        module_name, _, class_name = target.partition(":")
        if not all(part.isidentifier() for part in [*module_name.split("."), class_name]):
            raise ConfigError(f"{self._kind} {name!r}: {target!r} is not of the form package.module:Class")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            missing = error.name or module_name
            if f"{module_name}.".startswith(f"{missing}."):
                raise ConfigError(
                    f"{self._kind} {name!r}: there is no module {missing!r}; install its package or add its folder "
                    "to PYTHONPATH"
                ) from error
            raise MissingExtraError(
                f"{self._kind} {name!r} needs the package {missing!r}, which is not installed: "
                f"{_install_command(missing)}"
            ) from error
        unit = getattr(module, class_name, None)
        if not isinstance(unit, type):
            raise ConfigError(
                f"{self._kind} {name!r}: module {module_name!r} has no class {class_name!r}"
                f"{nearest(class_name, vars(module))}"
            )
        return unit


def _install_command(module: str) -> str:
    """The pip command that brings `module`: an extra of this package where one lists it."""
    package = _normalized(module.partition(".")[0])
    try:
        requirements = metadata.requires("raftdiff") or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        requirements = []
    for requirement in requirements:
        match = re.match(r"([\w.-]+).*\bextra == [\"']([\w.-]+)[\"']", requirement)
        if match and _normalized(match[1]) == package:
            return f"pip install 'raftdiff[{match[2]}]'"
    return f"pip install {package}"


def _normalized(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


REWARDS = Registry(
    "reward",
    {
        "clip": "raftdiff.reward_models.clip:ClipReward",
        "aesthetic": "raftdiff.reward_models.aesthetic:AestheticReward",
        "jpeg": "raftdiff.reward_models.jpeg:JpegReward",
        "image-stats": "raftdiff.reward_models.image_stats:ImageStatsReward",
        "pickscore": "raftdiff.reward_models.clip:PickScoreReward",
        "hpsv2": "raftdiff.reward_models.clip:HpsV2Reward",
        "hpsv2.1": "raftdiff.reward_models.clip:HpsV21Reward",
        "image-reward": "raftdiff.reward_models.image_reward:ImageReward",
        "reward-model": "raftdiff.reward_models.reward_model:RewardModel",
        "length": "raftdiff.reward_models.text_rules:LengthReward",
        "repetition": "raftdiff.reward_models.text_rules:RepetitionReward",
        "regex": "raftdiff.reward_models.text_rules:RegexReward",
        "exact-match": "raftdiff.reward_models.text_rules:ExactMatchReward",
        "pictures": "raftdiff.pictures:PicturesReward",
        "sentiment": "raftdiff.reward_models.sentiment:SentimentReward",
        "judge": "raftdiff.reward_models.judge:JudgeReward",
        "preference": "raftdiff.reward_models.preference:PreferenceReward",
        "shapes-oracle": "raftdiff.reward_models.shapes_oracle:ShapesOracleReward",
        "shapes-rating": "raftdiff.reward_models.shapes_oracle:ShapesRatingReward",
        "shapes-translation": "raftdiff.reward_models.shapes_translation:ShapesTranslationReward",
    },
    entry_point_group="raftdiff.rewards",
)
ALGORITHMS = Registry(
    "algorithm",
    {
        "raft": "raftdiff.algorithms.raft:Raft",
        "dpo": "raftdiff.algorithms.dpo:Dpo",
        "rest": "raftdiff.algorithms.rest:Rest",
        "rwr": "raftdiff.algorithms.rwr:Rwr",
        "sft": "raftdiff.algorithms.sft:Sft",
        "policy-gradient": "raftdiff.algorithms.policy_gradient:PolicyGradient",
        "ppo": "raftdiff.algorithms.ppo:Ppo",
        "nft": "raftdiff.algorithms.nft:Nft",
    },
    entry_point_group="raftdiff.algorithms",
)
JUDGES = Registry(
    "judge",
    {
        "endpoint": "raftdiff.reward_models.judge_endpoint:EndpointJudge",
        "local": "raftdiff.reward_models.judge_local:LocalJudge",
        "oracle": "raftdiff.reward_models.judge_oracle:OracleJudge",
    },
    entry_point_group="raftdiff.judges",
)
POLICIES = Registry(
    "modality",
    {"image": "raftdiff.pipelines.diffusion:DiffusionPolicy", "text": "raftdiff.pipelines.llm:LanguagePolicy"},
    entry_point_group="raftdiff.policies",
)
