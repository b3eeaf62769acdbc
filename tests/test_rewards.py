"""Each scorer against a plain computation, and what it does with what it cannot use."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import three_weights_run, tiny_config

from raftdiff.checkpoint import Checkpoints
from raftdiff.errors import ConfigError, DataError, WeightsError
from raftdiff.evaluation import diversity
from raftdiff.pipelines import shapes_scorers
from raftdiff.pipelines.shapes import build_tokenizer
from raftdiff.protocols import Reward
from raftdiff.reward_models.aesthetic import AestheticReward, load_head
from raftdiff.reward_models.clip import ClipReward
from raftdiff.reward_models.encoders import clip_encoder
from raftdiff.reward_models.function import FunctionReward
from raftdiff.reward_models.image_stats import ImageStatsReward
from raftdiff.reward_models.jpeg import JpegReward
from raftdiff.reward_models.shapes_oracle import ShapesOracleReward, ShapesRatingReward
from raftdiff.rounds import run_rounds
from raftdiff.shapes import WEIGHTS
from raftdiff.shapes.captions import BACKGROUNDS, COLORS, parse, random_caption
from raftdiff.shapes.oracle import judge_reading, read
from raftdiff.shapes.scenes import Object, Scene, random_scene, render
from raftdiff.store import SampleStore
from raftdiff.types import Prompt, Sample


def sample(image: np.ndarray, prompt: str = "a red circle", id: str = "0000-00") -> Sample:
    """From uint8 [height, width, 3]."""
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return Sample(id=id, prompt=Prompt(text=prompt), seed=0, image=tensor)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def circle(color: str = "red", background: str = "white") -> np.ndarray:
    """In the center, with a radius of a quarter of the canvas, 32 x 32."""
    one = Object(shape="circle", rgb=COLORS[color], x=32, y=32, radius=16)
    return render(Scene(objects=(one,), background_rgb=BACKGROUNDS[background]))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """An open_clip folder: 16 x 16 pixels, 8 numbers in an embedding, random weights, the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "clip"
    tokenizer = build_tokenizer()
    model_cfg = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
        "text_cfg": {
            "context_length": 20,
            "vocab_size": len(tokenizer),
            "width": 16,
            "heads": 2,
            "layers": 1,
            "hf_tokenizer_name": "local",
        },
    }
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**model_cfg)
    tokenizer.save_pretrained(folder)
    preprocess_cfg = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    )
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def plain_clip_score(folder: Path, image: np.ndarray, prompt: str) -> float:
    """By open_clip's own PIL preprocessing and the cosine, written out."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        u = model.eval().encode_image(preprocess(Image.fromarray(image))[None])[0].numpy().astype(np.float64)
        v = model.encode_text(tokenizer([prompt]))[0].numpy().astype(np.float64)
    return float(u @ v / math.sqrt((u @ u) * (v @ v)))


REWARDS = {
    "clip": lambda clip, head: ClipReward(clip),
    "aesthetic": lambda clip, head: AestheticReward(head, clip),
    "jpeg": lambda clip, head: JpegReward(),
    "sharpness": lambda clip, head: ImageStatsReward("sharpness"),
    "saturation": lambda clip, head: ImageStatsReward("saturation"),
    "color-entropy": lambda clip, head: ImageStatsReward("color-entropy"),
    "shapes-oracle": lambda clip, head: ShapesOracleReward(),
    "shapes-rating": lambda clip, head: ShapesRatingReward(),
    "function": lambda clip, head: FunctionReward(lambda images, prompts: [1.0] * len(images), "one"),
}


@pytest.fixture(scope="session")
def tiny_head(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file({"weight": torch.arange(8.0)[None], "bias": torch.tensor([2.0])}, path)
    return path


class TestEveryReward:
    @pytest.fixture(params=REWARDS)
    def reward(self, request, tiny_clip, tiny_head):
        return REWARDS[request.param](tiny_clip, tiny_head)

    def test_keeps_the_contract(self, reward):
        assert isinstance(reward, Reward)
        assert reward.modality in ("image", None)
        value_B = reward.score([sample(noise(16, 16)), sample(circle())])
        assert value_B.dtype == torch.float32 and value_B.shape == (2,) and not value_B.requires_grad
        assert reward.score([]).shape == (0,)

    def test_says_in_one_line_what_it_rewards(self, reward):
        assert re.fullmatch(r"[A-Z].{30,110}\.", (reward.__doc__ or "").strip().split("\n")[0])

    def test_judges_a_sample_alike_alone_and_in_a_batch(self, reward):
        first, second = sample(noise(16, 16)), sample(noise(40, 24, seed=1), "a blue square")
        together = reward.score([first, second, first])
        alone = torch.cat([reward.score([first]), reward.score([second]), reward.score([first])])
        assert together.numpy() == pytest.approx(alone.numpy(), rel=1e-5, abs=1e-5)

    def test_refuses_a_sample_without_an_image(self, reward):
        with pytest.raises(DataError, match="0000-07 holds no image"):
            reward.score([Sample(id="0000-07", prompt=Prompt(text="a red circle"), seed=0)])


class TestClip:
    @pytest.mark.parametrize(("height", "width"), [(16, 16), (40, 24), (33, 100), (10, 12)])
    def test_is_the_cosine_under_the_models_own_preprocessing(self, tiny_clip, height, width):
        image = noise(height, width)
        value = ClipReward(tiny_clip, scale=100.0).score([sample(image, "two blue crosses")]).item()
        assert value == pytest.approx(100 * plain_clip_score(tiny_clip, image, "two blue crosses"), abs=0.05)

    def test_scale_multiplies_the_cosine(self, tiny_clip):
        judged = [sample(noise(16, 16))]
        cosine = ClipReward(tiny_clip, scale=1.0).score(judged).item()
        assert ClipReward(tiny_clip).score(judged).item() == pytest.approx(100 * cosine, rel=1e-5)

    def test_a_picture_of_the_models_size_is_normalised_and_nothing_else(self, tiny_clip):
        image = noise(16, 16)
        seen = clip_encoder(tiny_clip).preprocess(sample(image).image)
        expected = (image / 255 - np.array([0.4, 0.5, 0.6])) / np.array([0.2, 0.25, 0.3])
        assert seen.numpy().transpose(1, 2, 0) == pytest.approx(expected, abs=1e-5)

    def test_squash_keeps_no_proportions(self, tiny_clip, tmp_path):
        folder = shutil.copytree(tiny_clip, tmp_path / "squash")
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["preprocess_cfg"]["resize_mode"] = "squash"
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        image = noise(16, 48)
        value = ClipReward(folder).score([sample(image)]).item()
        assert value == pytest.approx(100 * plain_clip_score(folder, image, "a red circle"), abs=0.05)
        assert value != pytest.approx(ClipReward(tiny_clip).score([sample(image)]).item(), abs=0.05)

    def test_no_prompt_is_encoded_twice(self, tiny_clip, tmp_path):
        reward = ClipReward(shutil.copytree(tiny_clip, tmp_path / "fresh"))
        encoded = []
        hook = reward.encoder.model.token_embedding.register_forward_hook(
            lambda module, inputs, output: encoded.append(len(output))
        )
        pictures = [noise(16, 16, seed) for seed in range(4)]
        first = reward.score([sample(p, t) for p, t in zip(pictures, "abab", strict=True)])
        second = reward.score([sample(p, t) for p, t in zip(pictures, "abca", strict=True)])
        hook.remove()
        assert sum(encoded) == 3
        assert first[:2].tolist() == second[:2].tolist()

    def test_half_precision_stays_near_full_precision(self, tiny_clip):
        judged = [sample(noise(16, 16, seed)) for seed in range(4)]
        full = ClipReward(tiny_clip).score(judged)
        assert ClipReward(tiny_clip, dtype="bf16").score(judged).numpy() == pytest.approx(full.numpy(), abs=2.0)

    def test_a_folder_without_weights_is_an_error_and_no_random_model(self, tiny_clip, tmp_path):
        folder = shutil.copytree(tiny_clip, tmp_path / "empty")
        (folder / "open_clip_model.safetensors").unlink()
        with pytest.raises(WeightsError, match="empty.*could not be loaded") as raised:
            ClipReward(folder)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("damage", ["another model", "cut short"])
    def test_weights_that_do_not_fit_are_an_error_in_one_line(self, tiny_clip, tmp_path, damage):
        folder = shutil.copytree(tiny_clip, tmp_path / "damaged")
        weights = folder / "open_clip_model.safetensors"
        if damage == "another model":
            save_file({k: v for k, v in load_file(weights).items() if "ln_final" not in k}, weights)
        else:
            weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(WeightsError, match="cannot load the CLIP model local-dir:.*damaged") as raised:
            ClipReward(folder)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(
        ("model", "pretrained", "error", "message"),
        [
            ("ViT-B-32", None, WeightsError, "needs weights"),
            ("ViT-B-32", "laion9b", WeightsError, "neither a file nor a tag .known: .*openai"),
            ("ViT-B-23", "openai", ConfigError, "no model 'ViT-B-23'; did you mean"),
            ("./no/such/folder", None, WeightsError, "folder does not exist"),
            ("local-dir:nowhere", None, WeightsError, "no open_clip_config.json"),
        ],
    )
    def test_a_wrong_name_says_what_is_wrong_with_it(self, model, pretrained, error, message):
        with pytest.raises(error, match=message):
            ClipReward(model, pretrained)

    def test_an_unknown_dtype_names_the_known_ones(self, tiny_clip):
        with pytest.raises(ConfigError, match="'int8' .there are fp32, bf16, fp16"):
            ClipReward(tiny_clip, dtype="int8")

    def test_has_embeddings_for_diversity_where_it_is_asked_to(self, tiny_clip):
        judged = [sample(noise(16, 16, seed)) for seed in (0, 1, 0)]
        embed = ClipReward(tiny_clip, diversity=True).embed
        same, other = (diversity([[judged[0], judged[i]]], embed)[0] for i in (2, 1))
        u, v = ClipReward(tiny_clip).encoder.image_features([judged[0].image, judged[1].image]).double().numpy()
        assert same == pytest.approx(0, abs=1e-6)
        assert other == pytest.approx(1 - u @ v, abs=1e-6) and other > 1e-3
        assert ClipReward(tiny_clip).embed is None

    def test_its_own_scale_is_the_learned_one(self, tiny_clip):
        judged = [sample(noise(16, 16))]
        learned = math.exp(load_file(tiny_clip / "open_clip_model.safetensors")["logit_scale"].item())
        cosine = ClipReward(tiny_clip, scale=1.0).score(judged).item()
        assert ClipReward(tiny_clip, scale=None).score(judged).item() == pytest.approx(learned * cosine, rel=1e-5)

    def test_a_run_measures_diversity_on_its_embeddings_where_it_is_asked_to(self, tiny_clip, tmp_path):
        reward = ClipReward(tiny_clip, diversity=True)
        config = tiny_config(tmp_path, rounds=1, evaluation={"seeds_per_prompt": 2})
        result = run_rounds(three_weights_run(config, watched=[reward]))
        groups: dict[str, list[Sample]] = {}
        for one in SampleStore(config.folder / "evaluation" / "guidance-1").read_samples(0):
            groups.setdefault(one.prompt.id, []).append(one)
        expected = []
        for first, second in groups.values():
            u, v = reward.encoder.image_features([first.image, second.image]).double().numpy()
            expected.append(1 - u @ v)
        assert result.base[0].metrics["diversity"].mean == pytest.approx(np.mean(expected), abs=1e-6)

    def test_a_run_records_where_the_weights_come_from(self, tiny_clip, tmp_path):
        reward = ClipReward(tiny_clip, name="clip")
        run = three_weights_run(tiny_config(tmp_path, rounds=1), watched=[reward])
        run_rounds(run)
        found, _ = Checkpoints(run.config.folder / "checkpoints").newest()
        assert found.meta["rewards"] == {"redness": None, "clip": f"local-dir:{tiny_clip}"}


class TestAesthetic:
    def test_linear_head_is_a_dot_product_on_the_normalised_embedding(self, tiny_clip, tiny_head):
        image = noise(16, 16)
        model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tiny_clip}")
        with torch.no_grad():
            u = model.eval().encode_image(preprocess(Image.fromarray(image))[None])[0].numpy()
        expected = sum(i * x for i, x in enumerate(u / np.linalg.norm(u))) + 2
        assert AestheticReward(tiny_head, tiny_clip).score([sample(image)]).item() == pytest.approx(expected, abs=1e-4)

    def test_second_versions_layers_apply_one_after_the_other(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        widths = [8, 5, 4, 3, 2, 1]
        state, layers = {}, []
        for layer, n, m in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
            weight, bias = torch.randn(m, n, generator=generator), torch.randn(m, generator=generator)
            state |= {f"layers.{layer}.weight": weight, f"layers.{layer}.bias": bias}
            layers.append((weight, bias))
        save_file(state, tmp_path / "v2.safetensors")
        x_BD = torch.randn(3, 8, generator=generator)
        expected = x_BD
        for weight, bias in layers:
            expected = expected @ weight.T + bias
        head = load_head(tmp_path / "v2.safetensors")
        assert head(x_BD).numpy() == pytest.approx(expected[:, 0].numpy(), rel=1e-4, abs=1e-4)

    def test_published_head_gives_published_ratings(self, published_data, tmp_path):
        folder = published_data / "laion_aesthetic_v1"
        head = load_head(Path(shutil.copy(folder / "sa_0_4_vit_b_32_linear.pth", tmp_path)))
        embeddings = [np.load(folder / "vit_b_32_embeddings" / f"rating{i}.npy").reshape(-1) for i in range(10)]
        ratings = head(torch.from_numpy(np.stack(embeddings)).float())
        published = [-1.47, 0.273, 1.99, 3.611, 5.087, 6.393, 7.668, 8.915, 9.917, 11.006]
        assert ratings.tolist() == pytest.approx(published, abs=2e-3)

    def pickled_head(self, path: Path, bias: float) -> Path:
        torch.save({"weight": torch.ones(1, 8), "bias": torch.tensor([bias])}, path)
        return path

    def test_a_pickle_is_converted_once_and_again_when_it_changes(self, tmp_path):
        path = self.pickled_head(tmp_path / "head.pth", bias=3.0)
        assert load_head(path).bias == 3
        copy = tmp_path / "head.pth.safetensors"
        assert set(load_file(copy)) == {"weight", "bias"}
        written = copy.stat().st_mtime_ns
        assert load_head(path).bias == 3 and copy.stat().st_mtime_ns == written
        self.pickled_head(path, bias=4.0)
        assert load_head(path).bias == 4
        assert [p.name for p in sorted(tmp_path.iterdir())] == ["head.pth", "head.pth.safetensors"]

    def test_the_copy_goes_to_the_cache_folder_where_it_cannot_lie_beside_the_pickle(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        path = self.pickled_head(tmp_path / "head.pth", bias=3.0)
        (tmp_path / "head.pth.safetensors").mkdir()  # in the way of the copy, also for a user whom no mode stops
        assert load_head(path).bias == 3
        (copy,) = (tmp_path / "cache" / "raftdiff" / "heads").iterdir()
        assert load_file(copy)["bias"].tolist() == [3]
        assert load_head(path).bias == 3

    def test_a_pickle_that_holds_code_is_refused_and_not_run(self, tmp_path):
        class Touch:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        path = tmp_path / "head.pth"
        path.write_bytes(pickle.dumps({"weight": Touch()}, protocol=2))
        with pytest.raises(WeightsError, match="cannot read the aesthetic head"):
            load_head(path)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"fc.weight": torch.ones(1, 8)}, "it holds fc.weight; expected weight"),
            ({"weight": torch.ones(2, 8), "bias": torch.ones(2)}, "do not give one number"),
            ({f"layers.{i}.{p}": torch.ones(3, 2) for i in (0, 2, 4, 6, 7) for p in ("weight", "bias")}, "layers"),
        ],
    )
    def test_tensors_of_another_model_are_refused(self, tmp_path, state, message):
        save_file(state, tmp_path / "other.safetensors")
        with pytest.raises(WeightsError, match=f"other.safetensors is no aesthetic head.*{message}"):
            load_head(tmp_path / "other.safetensors")

    def test_a_missing_head_is_named(self, tmp_path):
        with pytest.raises(WeightsError, match="no aesthetic head at .*absent.pth"):
            load_head(tmp_path / "absent.pth")

    def test_a_head_for_another_clip_is_refused_before_any_image(self, tiny_clip, tmp_path):
        save_file({"weight": torch.ones(1, 5), "bias": torch.ones(1)}, tmp_path / "head.safetensors")
        with pytest.raises(WeightsError, match=r"reads embeddings of 5 numbers, .* gives 8"):
            AestheticReward(tmp_path / "head.safetensors", tiny_clip)

    def test_shares_its_encoder_with_the_clip_reward(self, tiny_clip, tiny_head):
        assert AestheticReward(tiny_head, str(tiny_clip)).encoder is ClipReward(f"local-dir:{tiny_clip}").encoder


class TestJpeg:
    def test_is_the_size_of_the_file_in_kilobytes(self, tmp_path):
        image = noise(48, 32)
        Image.fromarray(image).save(tmp_path / "image.jpg", quality=95)
        kilobytes = (tmp_path / "image.jpg").stat().st_size / 1000
        assert JpegReward().score([sample(image)]).item() == pytest.approx(-kilobytes)
        assert JpegReward(sign=1).score([sample(image)]).item() == pytest.approx(kilobytes)

    def test_the_two_directions_are_two_rewards(self):
        assert JpegReward().name != JpegReward(sign=1).name

    @pytest.mark.parametrize("options", [{"sign": 0}, {"quality": 0}, {"quality": 101}])
    def test_settings_out_of_range_are_refused(self, options):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} of the JPEG reward is"):
            JpegReward(**options)


class TestImageStats:
    """Pictures of 4 x 4 pixels."""

    def value(self, metric: str, image: np.ndarray) -> float:
        return ImageStatsReward(metric).score([sample(image)]).item()

    def gray(self, rows: list[list[int]]) -> np.ndarray:
        return np.repeat(np.array(rows, dtype=np.uint8)[:, :, None], 3, axis=2)

    def test_sharpness_is_the_variance_of_the_laplacian(self):
        flat, ramp = self.gray([[7] * 4] * 4), self.gray([[0, 10, 20, 30]] * 4)
        assert [self.value("sharpness", image) for image in (flat, ramp)] == pytest.approx([0, 0], abs=1e-6)
        # A point of 100 in the inner 2 x 2: its own Laplacian is -400, that of its two neighbors there 100, and of the
        # fourth pixel, across the corner, 0. The mean is -50.
        point = self.gray([[0, 0, 0, 0], [0, 100, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
        assert self.value("sharpness", point) == pytest.approx((350**2 + 150**2 * 2 + 50**2) / 4, rel=1e-5)

    def test_saturation_is_that_of_hsv(self):
        image = np.zeros((4, 4, 3), dtype=np.uint8)  # half of it black, which has none
        image[:2] = (200, 50, 100)
        assert self.value("saturation", image) == pytest.approx(0.5 * 150 / 200)
        assert self.value("saturation", self.gray([[90] * 4] * 4)) == 0

    def test_color_entropy_counts_colors_in_eight_levels_a_channel(self):
        image = np.zeros((4, 4, 3), dtype=np.uint8)
        image[:2], image[2] = (255, 0, 0), (0, 0, 255)
        image[3] = (3, 3, 3)  # of the same level as (0, 0, 0)
        assert self.value("color-entropy", image) == pytest.approx(0.5 * 1 + 2 * 0.25 * 2)
        image[:] = (31, 0, 0)
        image[0] = (32, 0, 0)
        share = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
        assert self.value("color-entropy", image) == pytest.approx(share)

    def test_an_unknown_metric_names_the_nearest(self):
        with pytest.raises(ConfigError, match="'sharpnes'; did you mean 'sharpness'.*saturation, color-entropy"):
            ImageStatsReward("sharpnes")


class TestShapesOracle:
    def test_counts_what_is_true_of_what_is_asked(self):
        judged = [sample(circle(), "a red circle"), sample(circle(), "a blue circle on a black background")]
        assert ShapesOracleReward().score(judged).tolist() == pytest.approx([1.0, 3 / 5])  # not colour, background
        assert ShapesOracleReward(strict=True).score(judged).tolist() == [1.0, 0.0]

    def test_cannot_judge_a_prompt_that_is_no_caption(self):
        value_B = ShapesOracleReward().score([sample(circle(), "a dog"), sample(circle())])
        assert value_B.isnan().tolist() == [True, False]

    def test_rating_adds_contrast_coverage_and_closeness(self):
        def square(y):  # 8 x 8 of the 32 x 32 pixels: 1/16 of the canvas, of the .2 that count
            one = Object(shape="square", rgb=COLORS["red"], x=32, y=y, radius=8)
            return sample(render(Scene(objects=(one,), background_rgb=BACKGROUNDS["white"])))

        nothing = sample(np.full((32, 32, 3), 245, dtype=np.uint8))
        # Red (220, 40, 40) on white (245, 245, 245) has a contrast of .66, above the .6 that count in full. At y = 16
        # of 64 the square is .25 of the canvas from the middle, and .3 is where closeness ends.
        centered, above = 1 + 3 * (1 + 0.3125 + 1), 1 + 3 * (1 + 0.3125 + (1 - 0.25 / 0.3))
        value_B = ShapesRatingReward().score([nothing, square(32), square(16)])
        assert value_B.tolist() == pytest.approx([1, centered, above], abs=1e-4)


class TestFunction:
    def test_sees_pictures_and_prompts(self):
        def length_and_redness(images, prompts):
            assert all(image.mode == "RGB" and image.size == (24, 16) for image in images)
            return [image.getpixel((3, 2))[0] + len(prompt) for image, prompt in zip(images, prompts, strict=True)]

        picture = noise(16, 24)
        value = FunctionReward(length_and_redness, "mine").score([sample(picture, "abc")])
        assert value.tolist() == [picture[2, 3, 0] + 3.0]

    @pytest.mark.parametrize(
        "returned", [[1, 2.5], (1, np.float64(2.5)), np.array([1, 2.5]), torch.tensor([1, 2.5], requires_grad=True)]
    )
    def test_takes_numbers_in_any_container(self, returned):
        reward = FunctionReward(lambda images, prompts: returned, "mine")
        assert reward.score([sample(circle())] * 2).tolist() == [1.0, 2.5]

    def test_none_is_a_missing_value(self):
        reward = FunctionReward(lambda images, prompts: [None, 1], "mine")
        assert reward.score([sample(circle())] * 2).isnan().tolist() == [True, False]

    def test_judges_texts_too(self):
        reward = FunctionReward(lambda texts, prompts: [len(t) for t in texts], "length")
        assert reward.score([Sample(id="a", prompt=Prompt(text="p"), seed=0, text="four")]).tolist() == [4.0]

    @pytest.mark.parametrize(
        ("returned", "message"),
        [([1.0], "returned 1 for 2 samples"), (3.0, "a single number for 2"), (np.ones((2, 1)), "2x1 for 2")],
    )
    def test_the_wrong_number_of_values_is_refused(self, returned, message):
        with pytest.raises(ConfigError, match=f"'mine'.*{message}"):
            FunctionReward(lambda images, prompts: returned, "mine").score([sample(circle())] * 2)

    @pytest.mark.parametrize("returned", [["good", "bad"], None])
    def test_what_is_no_number_is_refused(self, returned):
        with pytest.raises(ConfigError, match="'mine'.*does not read as numbers"):
            FunctionReward(lambda images, prompts: returned, "mine").score([sample(circle())] * 2)


@pytest.fixture(scope="session")
def scenes():
    """Fresh ones of the training mixture."""
    return shapes_scorers.labelled_scenes(300, seed=77)


class TestEmbeddedScorers:
    """Those that ship with the package, and the labels they are trained by."""

    def test_labels_agree_with_the_exact_judge(self, scenes):
        captions = scenes.captions
        rng = np.random.default_rng(5)
        others = [random_caption(rng) for _ in range(100)]
        asked = torch.tensor([shapes_scorers.asks(c) for c in [*captions, *others]])
        true_BT = shapes_scorers.truth(asked, scenes.shown_N2)
        assert true_BT[:, : len(captions)].diagonal().all()
        agreed = []
        for i, image in enumerate(scenes.pixels.permute(0, 2, 3, 1).numpy()):
            reading = read(image)
            for j, other in enumerate(others):
                judged = all(judge_reading(reading, other).values())
                agreed.append(judged == bool(true_BT[i, len(captions) + j]))
        assert np.mean(agreed) > 0.998

    def test_a_relation_is_true_from_both_ends(self):
        caption = parse("a red circle above a blue square")
        shown = torch.tensor([shapes_scorers.shows(caption, random_scene(caption, np.random.default_rng(0)))])
        same = ["a blue square below a red circle"]
        other = ["a blue square above a red circle", "a blue circle below a red square", "a red circle"]
        asked = torch.tensor([shapes_scorers.asks(parse(text)) for text in [*same, *other]])
        assert shapes_scorers.truth(asked, shown).tolist() == [[True, False, False, False]]

    def test_places_are_those_of_each_color(self):
        caption = parse("a red circle above a blue square")
        red = Object(shape="circle", rgb=COLORS["red"], x=32, y=16, radius=8)
        blue = Object(shape="square", rgb=COLORS["blue"], x=48, y=48, radius=8)
        found = shapes_scorers.places(caption, Scene(objects=(red, blue), background_rgb=BACKGROUNDS["gray"]))
        place_of = dict(zip(COLORS, found, strict=True))
        assert (place_of["red"], place_of["blue"]) == ((0, -0.5), (0.5, 0.5))
        assert all(math.isnan(x) for color in ("green", "orange") for x in place_of[color])

    def test_contrastive_loss_leaves_true_pairs_out(self):
        # Of three texts the first is picture 0's own, the second picture 1's; the third is true of picture 0 too.
        similarity = torch.tensor([[2.0, 1.0, 5.0], [0.0, 3.0, 1.0]])
        true = torch.tensor([[True, False, True], [False, True, False]])
        to_text = (math.log(1 + math.exp(1 - 2)) + math.log(1 + math.exp(0 - 3) + math.exp(1 - 3))) / 2
        to_image = (math.log(1 + math.exp(0 - 2)) + math.log(1 + math.exp(1 - 3))) / 2
        loss = shapes_scorers.contrastive_loss(similarity, torch.tensor([0, 1]), true)
        assert loss.item() == pytest.approx((to_text + to_image) / 2, abs=1e-6)

    def test_saved_clip_loads_in_open_clip_with_its_tokenizer(self, tmp_path):
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        model = shapes_scorers.build_clip(tokenizer).eval()
        assert sum(p.numel() for p in model.parameters()) < 850_000
        shapes_scorers.save_clip(model, tokenizer, tmp_path)
        encoder = clip_encoder(tmp_path)
        texts = ["two red crosses on a cyan background", "a blue square"]
        with torch.no_grad():
            text_TD = shapes_scorers.embed_texts(model, tokenizer, texts)
            image_BD = shapes_scorers.embed_images(model, sample(circle()).image[None] / 255)
        assert encoder.text_features(texts).numpy() == pytest.approx(text_TD.numpy(), abs=5e-3)
        assert encoder.image_features([sample(circle()).image]).numpy() == pytest.approx(image_BD.numpy(), abs=5e-3)

    def test_shipped_clip_tells_captions_from_hard_negatives(self, scenes):
        encoder = ClipReward(WEIGHTS / "clip").encoder
        rng = np.random.default_rng(6)
        asked, won = [], []
        for i, caption in enumerate(scenes.captions):
            for wrong in shapes_scorers.hard_negatives(caption, rng):
                asked_1 = torch.tensor([shapes_scorers.asks(wrong)])
                if not shapes_scorers.truth(asked_1, scenes.shown_N2[i : i + 1]).item():
                    asked.append((i, str(caption), str(wrong)))
        image_BD = encoder.image_features(scenes.pixels)
        for i, right, wrong in asked:
            right_and_wrong = encoder.text_features([right, wrong]) @ image_BD[i]
            won.append(bool(right_and_wrong[0] > right_and_wrong[1]))
        assert len(won) > 500 and np.mean(won) > 0.9

    def test_shipped_aesthetic_head_follows_the_true_rating(self, scenes):
        judged = [Sample(id=str(i), prompt=Prompt(text=""), seed=0, image=x) for i, x in enumerate(scenes.pixels)]
        reward = AestheticReward(WEIGHTS / "aesthetic" / "aesthetic.safetensors", WEIGHTS / "clip")
        predicted, true = reward.score(judged), ShapesRatingReward().score(judged)
        assert torch.corrcoef(torch.stack([predicted, true]))[0, 1] > 0.85
        assert (predicted - true).abs().mean() < 1
