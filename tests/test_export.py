"""What a run leaves for other programs: that it loads in one line, draws the same, and says where it came from."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from test_families import CALLS, PROMPTS, SEEDS, drawn, fresh, move
from tiny_runs import ADAPTER_FILE, tiny_config, tiny_pipeline

import raftdiff
from raftdiff.card import HERE
from raftdiff.checkpoint import verify
from raftdiff.cli import main
from raftdiff.config import AdapterConfig, RunConfig
from raftdiff.errors import ConfigError, StorageError, WeightsError
from raftdiff.export import export_run, push_to_hub
from raftdiff.pipelines.diffusion import DiffusionPolicy
from raftdiff.pipelines.kohya import kohya_state
from raftdiff.pipelines.loading import load_lora
from raftdiff.pipelines.lora import load_line, read_header
from raftdiff.pipelines.shapes import build_pipeline
from raftdiff.rounds import run_rounds

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers

WITHOUT_LORA_METHODS = ["pixart-sigma", "hunyuan-dit"]


def trained(family: str, pipeline: Any = None, **adapter: Any) -> DiffusionPolicy:
    """A policy whose LoRA has moved away from the base."""
    adapter = {"rank": 2} | adapter
    pipeline = pipeline or fresh(family)
    policy = DiffusionPolicy(
        pipeline, AdapterConfig(**adapter), num_inference_steps=2, guidance_scale=1.0, call=CALLS[family]
    )
    move(policy)
    return policy


# -- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["attention", "linear", "all"])
@pytest.mark.parametrize("family", ["sd-eps", "sdxl", "sd3", "flux"])
def test_a_kohya_file_draws_the_same_pictures_as_the_diffusers_folder(family, targets, tmp_path: Path):
    policy = trained(family, alpha=5, targets=targets)
    policy.export(tmp_path / "lora")
    policy.export(tmp_path / "kohya.safetensors", format="kohya")
    plain, loaded, other = (fresh(family) for _ in range(3))
    loaded.load_lora_weights(tmp_path / "lora")
    other.load_lora_weights(tmp_path / "kohya.safetensors")
    expected = drawn(loaded, family)
    torch.testing.assert_close(drawn(other, family), expected, atol=1e-4, rtol=0)
    assert (drawn(plain, family) - expected).abs().max() > 0.01


def test_kohya_names_are_those_that_other_programs_look_for():
    state = {
        f"{layer}.lora_{part}.weight": torch.ones(shape)
        for layer in ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", "add_embedding.linear_2")
        for part, shape in (("A", (2, 3)), ("B", (5, 2)))
    }
    named = kohya_state("StableDiffusionXLPipeline", state, rank=2, alpha=5)
    attention = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {name: tuple(tensor.shape) for name, tensor in named.items()} == {
        f"{attention}.lora_down.weight": (2, 3),
        f"{attention}.lora_up.weight": (5, 2),
        f"{attention}.alpha": (),
        "lora_unet_label_emb_0_2.lora_down.weight": (2, 3),
        "lora_unet_label_emb_0_2.lora_up.weight": (5, 2),
        "lora_unet_label_emb_0_2.alpha": (),
    }
    assert named[f"{attention}.alpha"] == 5
    layer = "transformer_blocks.0.attn.to_q"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 3), f"{layer}.lora_B.weight": torch.ones(5, 2)}
    named = kohya_state("FluxPipeline", state, rank=2, alpha=5)
    assert torch.equal(named[f"transformer.{layer}.lora_A.weight"], torch.ones(2, 3))
    assert torch.equal(named[f"transformer.{layer}.lora_B.weight"], torch.full((5, 2), 2.5))


def test_a_family_without_kohya_names_is_told_so_in_one_line(tmp_path: Path):
    policy = trained("kolors")
    with pytest.raises(ConfigError, match=r"\Athere is no kohya format for KolorsPipeline, only for .*\Z"):
        policy.export(tmp_path / "kohya.safetensors", format="kohya")


def test_layers_without_a_kohya_name_are_named_before_anything_is_written(tmp_path: Path):
    policy = DiffusionPolicy(build_pipeline(), AdapterConfig(rank=2, targets="all"), num_inference_steps=2)
    names = "add_embedding.pool.k_proj, add_embedding.pool.q_proj, add_embedding.pool.v_proj, add_embedding.proj"
    with pytest.raises(ConfigError, match=rf"\Athese layers have no kohya name: {names}; train with adapter.targets"):
        policy.export(tmp_path / "kohya.safetensors", format="kohya")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", WITHOUT_LORA_METHODS)
def test_a_pipeline_without_lora_methods_gets_its_lora_in_the_format_of_peft(family, tmp_path: Path):
    policy = trained(family, alpha=5)
    with policy.reference():
        base = policy.sample(PROMPTS, SEEDS)
    after = policy.sample(PROMPTS, SEEDS)
    assert not torch.equal(base[0].latents, after[0].latents)
    policy.export(tmp_path)
    expected = drawn(policy.pipeline, family)
    pipe, folded = fresh(family), fresh(family)
    torch.testing.assert_close(torch.stack([s.latents for s in base]), latents(folded, family))
    exec(load_line(pipe, policy.denoiser_name, str(tmp_path)), {"pipe": pipe})
    assert torch.equal(drawn(pipe, family), expected)
    raftdiff.load_lora(folded, str(tmp_path))
    torch.testing.assert_close(drawn(folded, family), expected, atol=1e-4, rtol=0)
    assert not any("lora" in name for name, _ in folded.transformer.named_parameters())


def latents(pipeline: Any, family: str) -> torch.Tensor:
    """What a pipeline draws alone, by a policy whose LoRA changes nothing yet and comes off again."""
    policy = DiffusionPolicy(
        pipeline, AdapterConfig(rank=2), num_inference_steps=2, guidance_scale=1.0, call=CALLS[family]
    )
    samples = policy.sample(PROMPTS, SEEDS)
    assert raftdiff.pipelines.lora.take_off(pipeline)
    return torch.stack([sample.latents for sample in samples])


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_weights_in_half_precision_are_half_as_large_and_pass_the_check(format, tmp_path: Path):
    policy = trained("sd-eps", alpha=5)
    path = tmp_path / "lora.safetensors" if format == "kohya" else tmp_path
    policy.export(path, format=format, dtype="fp16")
    state = load_file(path if format == "kohya" else path / ADAPTER_FILE)
    assert {t.dtype for name, t in state.items() if not name.endswith(".alpha")} == {torch.float16}
    assert {t.item() for name, t in state.items() if name.endswith(".alpha")} == ({5.0} if format == "kohya" else set())


def test_a_bf16_base_passes_the_check_and_says_its_precision(tmp_path: Path):
    policy = trained("flux", fresh("flux").to(torch.bfloat16), alpha=5)
    policy.export(tmp_path)
    assert read_header(tmp_path / ADAPTER_FILE)["raftdiff.base_dtype"] == "bfloat16"


# -- the check ---------------------------------------------------------------------------------------------------------


def spoiled(*, scale: float = 1.0, without: str | None = None) -> Any:
    """A `save_lora_weights` that multiplies what it writes, or leaves a layer out."""

    def save(path: Path, **parts: Any) -> None:
        parts["unet_lora_layers"] = {
            name: tensor * scale
            for name, tensor in parts["unet_lora_layers"].items()
            if not without or without not in name
        }
        StableDiffusionPipeline.save_lora_weights(path, **parts)

    return save


@pytest.mark.parametrize("save", [spoiled(scale=1.1), spoiled(without="mid_block"), spoiled(scale=float("nan"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_does_not_draw_what_the_policy_draws_is_refused(save, dtype, tmp_path: Path):
    policy = trained("sd-eps", fresh("sd-eps").to(dtype))
    policy.pipeline.save_lora_weights = save
    with pytest.raises(WeightsError, match=r"\Athe exported LoRA does not draw what the trained model draws \(.*\Z"):
        policy.export(tmp_path)


def test_a_file_that_cannot_be_loaded_is_refused(tmp_path: Path):
    policy = trained("sd-eps")
    policy.pipeline.load_lora_weights = functools.partial(refuse, "no such key")
    with pytest.raises(WeightsError, match="does not draw what the trained model draws .*no such key"):
        policy.export(tmp_path)
    assert list(policy.denoiser.peft_config) == ["raftdiff"]


def refuse(reason: str, *args: Any, **kwargs: Any) -> None:
    raise ValueError(reason)


@pytest.mark.parametrize("family", ["sd-eps", "sd3", *WITHOUT_LORA_METHODS])
def test_the_check_leaves_the_policy_as_it_was(family, tmp_path: Path, recwarn, caplog):
    policy = trained(family)
    before = policy.adapter_state()
    names = {name: (p.requires_grad, p.dtype) for name, p in policy.denoiser.named_parameters()}
    expected, chance = policy.sample(PROMPTS, SEEDS), torch.get_rng_state()
    passes = policy.passes
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        policy.export(tmp_path)
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert policy.passes == passes and policy.num_inference_steps == 2 and torch.equal(chance, torch.get_rng_state())
    assert names == {name: (p.requires_grad, p.dtype) for name, p in policy.denoiser.named_parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.adapter_state().items())
    for one, other in zip(policy.sample(PROMPTS, SEEDS), expected, strict=True):
        assert torch.equal(one.latents, other.latents)
    assert not [line for line in caplog.messages if "LoRA" in line]
    assert not [warning for warning in recwarn if "peft_config" in str(warning.message)]


def test_full_fine_tuning_is_checked_weight_by_weight(tmp_path: Path):
    policy = trained("sd-eps", method="full")
    policy.export(tmp_path / "whole")
    policy.denoiser.save_pretrained = functools.partial(save_other, policy.denoiser)
    with pytest.raises(WeightsError, match=r"does not draw what the trained model draws \(unet: its conv_in.weight"):
        policy.export(tmp_path / "other")


def save_other(unet: torch.nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True)
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    state["conv_in.weight"][0] += 1e-6
    save_file(state, folder / "model.safetensors")


# -- where it came from ------------------------------------------------------------------------------------------------


def test_the_header_says_where_the_lora_came_from_and_disturbs_no_loader(tmp_path: Path):
    policy = trained("sd-eps", alpha=5)
    policy.export(tmp_path, {"base_model": "me/model", "rewards": '{"clip": 1.0}'})
    header = read_header(tmp_path / ADAPTER_FILE)
    assert header["raftdiff.base_model"] == "me/model" and header["raftdiff.rewards"] == '{"clip": 1.0}'
    assert header["raftdiff.base_fingerprint"] == policy.fingerprint() and header["format"] == "pt"
    assert json.loads(header["lora_adapter_metadata"])["unet.lora_alpha"] == 5
    pipe = fresh("sd-eps")
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(drawn(pipe, "sd-eps"), drawn(policy.pipeline, "sd-eps"))


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("raftdiff")]


def test_a_lora_on_another_base_of_its_architecture_is_warned_about_in_one_line(tmp_path: Path, caplog):
    trained("sd-eps").export(tmp_path)
    load_lora(fresh("sd-eps"), str(tmp_path))
    load_lora(fresh("sd-eps").to(torch.bfloat16), str(tmp_path))  # it cannot be told
    assert not warnings_of(caplog)
    tuned = fresh("sd-eps")
    tuned.unet.conv_in.weight.data += 0.01
    load_lora(tuned, str(tmp_path))
    [message] = warnings_of(caplog)
    assert message == f"{tmp_path} was trained from other weights than these: it loads, but was not measured on them"


def test_a_lora_trained_on_a_bf16_base_fits_the_same_base_in_fp32(tmp_path: Path, caplog):
    trained("sd-eps", fresh("sd-eps").to(torch.bfloat16)).export(tmp_path)
    load_lora(fresh("sd-eps"), str(tmp_path))
    assert not warnings_of(caplog)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A finished run of the tiny pipeline, whose base lies in a folder and whose rewards the registry knows."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_pipeline().save_pretrained(folder / "base")
    config = tiny_config(
        folder,
        rounds=1,
        model={"path": str(folder / "base")},
        adapter={"rank": 2, "alpha": 5},
        rewards=[{"name": "jpeg"}],
    )
    run_rounds(raftdiff.build.build(config))
    return config.folder


def test_the_command_writes_a_kohya_file_that_draws_what_the_run_s_lora_draws(run_folder, capsys):
    before = (run_folder / "lora" / ADAPTER_FILE).read_bytes()
    assert main(["export", str(run_folder), "--format", "kohya"]) == 0
    file = run_folder / "run-kohya.safetensors"
    assert str(file) in capsys.readouterr().out
    one, other = tiny_pipeline(), tiny_pipeline()
    one.load_lora_weights(run_folder / "lora")
    other.load_lora_weights(file)
    torch.testing.assert_close(drawn(other, "sd-eps"), drawn(one, "sd-eps"), atol=1e-4, rtol=0)
    first = file.read_bytes()
    assert main(["export", str(run_folder), "--format", "kohya"]) == 0
    assert file.read_bytes() == first and (run_folder / "lora" / ADAPTER_FILE).read_bytes() == before


def test_the_command_writes_the_folder_anew_in_half_precision_with_its_card(run_folder, tmp_path: Path):
    assert main(["export", str(run_folder), "--dtype", "bf16", "--output", str(tmp_path / "half")]) == 0
    assert verify(tmp_path / "half") is None
    assert {t.dtype for t in load_file(tmp_path / "half" / ADAPTER_FILE).values()} == {torch.bfloat16}
    for name in ("README.md", "before-after.webp"):
        assert (tmp_path / "half" / name).read_bytes() == (run_folder / "lora" / name).read_bytes()


def test_the_whole_pipeline_is_written_with_the_lora_folded_in(run_folder, tmp_path: Path):
    assert main(["export", str(run_folder), "--merged", "--output", str(tmp_path / "whole")]) == 0
    assert verify(tmp_path / "whole") is None
    one, merged = tiny_pipeline(), StableDiffusionPipeline.from_pretrained(tmp_path / "whole")
    one.load_lora_weights(run_folder / "lora")
    torch.testing.assert_close(drawn(merged, "sd-eps"), drawn(one, "sd-eps"), atol=1e-4, rtol=0)
    assert not torch.allclose(drawn(tiny_pipeline(), "sd-eps"), drawn(one, "sd-eps"), atol=1e-3)
    assert main(["export", str(run_folder), "--merged", "--output", str(run_folder / "samples")]) == 2


def test_a_place_that_is_taken_or_named_otherwise_is_refused(run_folder, tmp_path: Path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["export", str(run_folder), "--output", str(tmp_path)]) == 2
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert main(["export", str(run_folder), "--format", "kohya", "--output", str(tmp_path / "lora.bin")]) == 2
    errors = capsys.readouterr().err
    assert "something else stands there; give a new folder" in errors and "ends in .safetensors" in errors


def test_an_unfinished_run_and_a_damaged_lora_are_refused_in_one_line(run_folder, tmp_path: Path):
    config = RunConfig(name="run", output=str(tmp_path))
    with pytest.raises(
        WeightsError, match=r"\A.* holds no finished LoRA: manifest.json is missing; `raftdiff resume .*\Z"
    ):
        export_run(config)


# -- the hub -----------------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for `huggingface_hub.HfApi`, and keeps what it is given."""

    def __init__(self, error: Exception | None = None):
        self.error, self.made, self.files = error, {}, {}

    def create_repo(self, repo_id: str, **settings: Any) -> str:
        if self.error:
            raise self.error
        self.made[repo_id] = settings
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.files = {p.relative_to(folder_path).as_posix(): p.read_bytes() for p in Path(folder_path).rglob("*")}


def test_what_is_pushed_is_the_lora_with_its_card_and_the_file_that_was_asked_for(run_folder, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr("raftdiff.export.HfApi", lambda: hub)
    assert main(["export", str(run_folder), "--push-to-hub", "me/lora", "--private"]) == 0
    assert "https://huggingface.co/me/lora" in capsys.readouterr().out
    assert hub.made == {"me/lora": {"private": True, "exist_ok": True}}
    assert set(hub.files) == {ADAPTER_FILE, "README.md", "before-after.webp"}
    assert hub.files[ADAPTER_FILE] == (run_folder / "lora" / ADAPTER_FILE).read_bytes()
    assert (
        b"pipe.load_lora_weights('me/lora')" in hub.files["README.md"] and HERE.encode() not in hub.files["README.md"]
    )
    assert main(["export", str(run_folder), "--format", "kohya", "--push-to-hub", "me/lora"]) == 0
    assert set(hub.files) == {ADAPTER_FILE, "README.md", "before-after.webp", "run-kohya.safetensors"}
    assert hub.made == {"me/lora": {"private": None, "exist_ok": True}}


def test_a_hub_that_refuses_is_told_in_one_line_that_says_what_to_do(run_folder, monkeypatch):
    monkeypatch.setattr("raftdiff.export.HfApi", lambda: Hub(PermissionError("403 Forbidden:\nno rights")))
    with pytest.raises(StorageError, match=r"\Acannot upload to 'me/lora': 403 Forbidden: no rights; it takes .*\Z"):
        push_to_hub(run_folder / "lora", "me/lora")


def test_without_a_network_the_upload_says_so(run_folder):
    with pytest.raises(StorageError, match=r"\Acannot upload to 'me/lora': .*HF_HUB_OFFLINE.*\Z"):
        push_to_hub(run_folder / "lora", "me/lora")
