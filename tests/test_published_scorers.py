"""Scorers in their published formats, on tiny random checkpoints, against the arithmetic written out in NumPy."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.special import erf, softmax
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessor, CLIPTokenizer

from raftdiff.errors import ConfigError, WeightsError
from raftdiff.protocols import Reward
from raftdiff.reward_models.aesthetic import AestheticReward
from raftdiff.reward_models.clip import ClipReward, HpsV2Reward, HpsV21Reward, PickScoreReward
from raftdiff.reward_models.encoders import Preprocessing, clip_encoder
from raftdiff.reward_models.image_reward import ImageReward
from raftdiff.types import Prompt, Sample

ARCHITECTURE = "tiny-vit-of-the-tests"
SIZE, PATCH, WIDTH, LAYERS, HEADS, VOCABULARY = 16, 8, 8, 2, 2, 49408
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
PROMPTS = ["a red circle", "two blue crosses, and a very long story about how they came to be where they are now", ""]
State = Mapping[str, np.ndarray]


def picture(seed: int, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def samples() -> list[Sample]:
    return [Sample(id=str(i), prompt=Prompt(text=text), seed=0, image=picture(i)) for i, text in enumerate(PROMPTS)]


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def linear(x: np.ndarray, state: State, name: str) -> np.ndarray:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(x: np.ndarray, state: State, name: str, eps: float) -> np.ndarray:
    centered = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centered**2).mean(-1, keepdims=True) + eps)
    return centered / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / math.sqrt(2))) / 2


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """Of [T, D] queries to [S, D] keys and values; `allowed` is [T, S] or [S]."""
    parts = []
    for one_q, one_k, one_v in zip(*(np.split(x, heads, axis=1) for x in (q, k, v)), strict=True):
        score = one_q @ one_k.T / math.sqrt(one_q.shape[1])
        if allowed is not None:
            score = np.where(allowed, score, -np.inf)
        parts.append(softmax(score, axis=-1) @ one_v)
    return np.concatenate(parts, axis=1)


def patches(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """A convolution of [3, H, W] whose stride is its width, row by row: [patches, D]."""
    side = kernel.shape[-1]
    corners = [(i, j) for i in range(0, x.shape[1], side) for j in range(0, x.shape[2], side)]
    return np.stack([np.einsum("dcij,cij->d", kernel, x[:, i : i + side, j : j + side]) for i, j in corners])


def normalized_pixels(image: torch.Tensor) -> np.ndarray:
    return (image.numpy() / 255 - MEAN[:, None, None]) / STD[:, None, None]


def clip_blocks(x: np.ndarray, state: State, tower: str, allowed: np.ndarray | None = None) -> np.ndarray:
    for layer in range(LAYERS):
        name = f"{tower}.resblocks.{layer}"
        inner = norm(x, state, f"{name}.ln_1", 1e-5)
        qkv = inner @ state[f"{name}.attn.in_proj_weight"].T + state[f"{name}.attn.in_proj_bias"]
        x = x + linear(attend(*np.split(qkv, 3, axis=1), HEADS, allowed), state, f"{name}.attn.out_proj")
        inner = gelu(linear(norm(x, state, f"{name}.ln_2", 1e-5), state, f"{name}.mlp.c_fc"))
        x = x + linear(inner, state, f"{name}.mlp.c_proj")
    return x


def clip_cosine(state: State, sample: Sample) -> float:
    x = np.concatenate(
        [
            state["visual.class_embedding"][None],
            patches(normalized_pixels(sample.image), state["visual.conv1.weight"]),
        ]
    )
    x = norm(x + state["visual.positional_embedding"], state, "visual.ln_pre", 1e-5)
    x = clip_blocks(x, state, "visual.transformer")
    u = norm(x[0], state, "visual.ln_post", 1e-5) @ state["visual.proj"]

    tokens = open_clip.SimpleTokenizer()([sample.prompt.text])[0].numpy()
    y = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    y = clip_blocks(y, state, "transformer", np.tri(len(tokens), dtype=bool))
    v = norm(y, state, "ln_final", 1e-5)[tokens.argmax()] @ state["text_projection"]
    return float(u @ v / math.sqrt((u @ u) * (v @ v)))


def image_reward(state: State, sample: Sample, words: Mapping[str, int], heads: tuple[int, int]) -> float:
    """In the names and the order of the authors' code: a ViT that normalises first, a BERT that normalises after."""
    see = {k.removeprefix("blip.visual_encoder."): v for k, v in state.items()}
    x = patches(normalized_pixels(sample.image), see["patch_embed.proj.weight"]) + see["patch_embed.proj.bias"]
    x = np.concatenate([see["cls_token"][0], x]) + see["pos_embed"][0]
    for layer in range(LAYERS):
        name = f"blocks.{layer}"
        qkv = np.split(linear(norm(x, see, f"{name}.norm1", 1e-6), see, f"{name}.attn.qkv"), 3, axis=1)
        x = x + linear(attend(*qkv, heads[0]), see, f"{name}.attn.proj")
        inner = gelu(linear(norm(x, see, f"{name}.norm2", 1e-6), see, f"{name}.mlp.fc1"))
        x = x + linear(inner, see, f"{name}.mlp.fc2")
    x = norm(x, see, "norm", 1e-6)

    say = {k.removeprefix("blip.text_encoder."): v for k, v in state.items()}
    known = [words.get(word, words["[UNK]"]) for word in sample.prompt.text.replace(",", " ,").split()][:33]
    ids = [words["[CLS]"], *known, words["[SEP]"]]
    present = np.arange(35) < len(ids)
    ids += [words["[PAD]"]] * (35 - len(ids))
    y = say["embeddings.word_embeddings.weight"][ids] + say["embeddings.position_embeddings.weight"][:35]
    y = norm(y, say, "embeddings.LayerNorm", 1e-12)
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}"
        for attention, others, allowed in (("attention", None, present), ("crossattention", x, None)):
            source = y if others is None else others
            q = linear(y, say, f"{name}.{attention}.self.query")
            k, v = (linear(source, say, f"{name}.{attention}.self.{part}") for part in ("key", "value"))
            inner = linear(attend(q, k, v, heads[1], allowed), say, f"{name}.{attention}.output.dense")
            y = norm(inner + y, say, f"{name}.{attention}.output.LayerNorm", 1e-12)
        inner = linear(gelu(linear(y, say, f"{name}.intermediate.dense")), say, f"{name}.output.dense")
        y = norm(inner + y, say, f"{name}.output.LayerNorm", 1e-12)
    value = y[0]
    for layer in (0, 2, 4, 6, 7):
        value = linear(value, state, f"mlp.layers.{layer}")
    return float((value[0] - 0.16717362830052426) / 1.0333394966054072)


# -- tiny checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def clip_state() -> dict[str, torch.Tensor]:
    """Of the tiny CLIP, in open_clip's names."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (1 + (SIZE // PATCH) ** 2, WIDTH),
        "visual.proj": (WIDTH, WIDTH),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "positional_embedding": (77, WIDTH),
        "text_projection": (WIDTH, WIDTH),
        "token_embedding.weight": (VOCABULARY, WIDTH),
        "logit_scale": (),
    }
    for name in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    for tower in ("visual.transformer", "transformer"):
        for layer in range(LAYERS):
            name = f"{tower}.resblocks.{layer}"
            shapes |= {f"{name}.attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{name}.attn.in_proj_bias": (3 * WIDTH,)}
            for part, (n, m) in {
                "attn.out_proj": (WIDTH, WIDTH), "mlp.c_fc": (4 * WIDTH, WIDTH), "mlp.c_proj": (WIDTH, 4 * WIDTH)
            }.items():  # fmt: skip
                shapes |= {f"{name}.{part}.weight": (n, m), f"{name}.{part}.bias": (n,)}
            for part in ("ln_1", "ln_2"):
                shapes |= {f"{name}.{part}.weight": (WIDTH,), f"{name}.{part}.bias": (WIDTH,)}
    return random_state(shapes, seed=0)


@pytest.fixture(scope="session")
def clip_arrays(clip_state) -> State:
    return {name: value.double().numpy() for name, value in clip_state.items()}


@pytest.fixture(scope="session")
def hps(tmp_path_factory, clip_state) -> Path:
    """A folder with the two files of HPS, which differ in one tensor, for an architecture that open_clip now knows."""
    folder = tmp_path_factory.mktemp("hps")
    tower = {"width": WIDTH, "layers": LAYERS}
    (folder / f"{ARCHITECTURE}.json").write_text(
        json.dumps(
            {
                "embed_dim": WIDTH,
                "vision_cfg": tower | {"image_size": SIZE, "patch_size": PATCH, "head_width": WIDTH // HEADS},
                "text_cfg": tower | {"context_length": 77, "vocab_size": VOCABULARY, "heads": HEADS},
            }
        )
    )
    open_clip.add_model_config(folder / f"{ARCHITECTURE}.json")
    torch.save({"state_dict": clip_state, "epoch": 1}, folder / "HPS_v2_compressed.pt")
    later = clip_state | {"text_projection": clip_state["text_projection"].flip(0)}
    torch.save({"state_dict": later}, folder / "HPS_v2.1_compressed.pt")
    return folder


def in_transformers_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = {
        "logit_scale": state["logit_scale"],
        "visual_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
    }
    renamed = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    for theirs, tower in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for layer in range(LAYERS):
            old, new = f"{theirs}.resblocks.{layer}", f"{tower}.encoder.layers.{layer}"
            for kind in ("weight", "bias"):
                for part, value in zip("qkv", state[f"{old}.attn.in_proj_{kind}"].chunk(3), strict=True):
                    named[f"{new}.self_attn.{part}_proj.{kind}"] = value
            renamed |= {f"{old}.ln_1": f"{new}.layer_norm1", f"{old}.ln_2": f"{new}.layer_norm2"}
            renamed |= {f"{old}.mlp.c_fc": f"{new}.mlp.fc1", f"{old}.mlp.c_proj": f"{new}.mlp.fc2"}
            renamed |= {f"{old}.attn.out_proj": f"{new}.self_attn.out_proj"}
    for old, new in renamed.items():
        named |= {f"{new}.{kind}": state[f"{old}.{kind}"] for kind in ("weight", "bias")}
    return {name: value.contiguous() for name, value in named.items()}


@pytest.fixture(scope="session")
def pickscore(tmp_path_factory, clip_state) -> Path:
    """The tiny CLIP in the format of transformers, without tokenizer and image processor, like the published one."""
    folder = tmp_path_factory.mktemp("pickscore")
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
    tower |= {"num_attention_heads": HEADS, "hidden_act": "gelu"}
    config = CLIPConfig(
        projection_dim=WIDTH,
        vision_config=tower | {"image_size": SIZE, "patch_size": PATCH},
        text_config=tower | {"vocab_size": VOCABULARY, "bos_token_id": 49406, "eos_token_id": 49407},
    )
    config.architectures = ["CLIPModel"]
    config.save_pretrained(folder)
    save_file(in_transformers_names(clip_state), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def processor(tmp_path_factory) -> Path:
    """CLIP's own tokenizer, and an image processor for the tiny model."""
    folder = tmp_path_factory.mktemp("processor")
    merges = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[1 : VOCABULARY - 256 - 2 - 256 + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{x}</w>" for x in letters), *(m.replace(" ", "") for m in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=[tuple(m.split()) for m in merges]).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circle", "two", "blue", "crosses", ",", "and", "very", "long"]
SEE, SAY = 128, 64  # the widths of ImageReward's parts: two attention heads and one


@pytest.fixture(scope="session")
def image_reward_state() -> dict[str, torch.Tensor]:
    """Of a tiny ImageReward, in the authors' names, with a few of the tensors that their file has and does not use."""
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, SEE),
        "blip.visual_encoder.pos_embed": (1, 1 + (SIZE // PATCH) ** 2, SEE),
        "blip.visual_encoder.patch_embed.proj.weight": (SEE, 3, PATCH, PATCH),
        "blip.visual_encoder.patch_embed.proj.bias": (SEE,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (len(WORDS) + 2, SAY),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, SAY),
        "blip.vision_proj.weight": (4, SEE),
    }

    def layer(name: str, outputs: int, inputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def layer_norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    layer_norm("blip.visual_encoder.norm", SEE)
    layer_norm("blip.text_encoder.embeddings.LayerNorm", SAY)
    for i in range(LAYERS):
        see, say = f"blip.visual_encoder.blocks.{i}", f"blip.text_encoder.encoder.layer.{i}"
        layer_norm(f"{see}.norm1", SEE)
        layer_norm(f"{see}.norm2", SEE)
        layer(f"{see}.attn.qkv", 3 * SEE, SEE)
        layer(f"{see}.attn.proj", SEE, SEE)
        layer(f"{see}.mlp.fc1", 32, SEE)
        layer(f"{see}.mlp.fc2", SEE, 32)
        for attention, width in (("attention", SAY), ("crossattention", SEE)):
            layer(f"{say}.{attention}.self.query", SAY, SAY)
            layer(f"{say}.{attention}.self.key", SAY, width)
            layer(f"{say}.{attention}.self.value", SAY, width)
            layer(f"{say}.{attention}.output.dense", SAY, SAY)
            layer_norm(f"{say}.{attention}.output.LayerNorm", SAY)
        layer(f"{say}.intermediate.dense", 48, SAY)
        layer(f"{say}.output.dense", SAY, 48)
        layer_norm(f"{say}.output.LayerNorm", SAY)
    for i, inputs, outputs in ((0, SAY, 12), (2, 12, 10), (4, 10, 8), (6, 8, 4), (7, 4, 1)):
        layer(f"mlp.layers.{i}", outputs, inputs)
    state = random_state(shapes, seed=1)
    return state | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


@pytest.fixture(scope="session")
def image_reward_folder(tmp_path_factory, image_reward_state) -> Path:
    folder = tmp_path_factory.mktemp("image-reward")
    torch.save(image_reward_state, folder / "ImageReward.pt")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder / "tokenizer")
    return folder


# -- the tests --------------------------------------------------------------------------------------------------------


class TestParity:
    def test_pickscore_is_the_cosine_times_the_learned_scale(self, pickscore, processor, clip_arrays):
        reward = PickScoreReward(pickscore, processor=processor)
        scale = math.exp(clip_arrays["logit_scale"])
        expected = [scale * clip_cosine(clip_arrays, sample) for sample in samples()]
        assert reward.score(samples()).tolist() == pytest.approx(expected, abs=2e-6)
        assert max(expected) - min(expected) > 0.02

    def test_hps_is_the_cosine(self, hps, clip_arrays):
        expected = [clip_cosine(clip_arrays, sample) for sample in samples()]
        value_B = HpsV2Reward(hps, architecture=ARCHITECTURE).score(samples())
        assert value_B.tolist() == pytest.approx(expected, abs=2e-6)

    def test_the_two_versions_of_hps_take_their_own_file(self, hps, clip_arrays):
        later = {**clip_arrays, "text_projection": clip_arrays["text_projection"][::-1]}
        expected = [clip_cosine(later, sample) for sample in samples()]
        reward = HpsV21Reward(hps, architecture=ARCHITECTURE)
        assert reward.score(samples()).tolist() == pytest.approx(expected, abs=2e-6)
        assert (reward.name, HpsV2Reward(hps, architecture=ARCHITECTURE).name) == ("hpsv2.1", "hpsv2")
        named = HpsV2Reward(hps / "HPS_v2.1_compressed.pt", architecture=ARCHITECTURE)
        assert named.score(samples()).tolist() == pytest.approx(expected, abs=2e-6)

    def test_clip_scores_alike_in_both_formats(self, pickscore, processor, hps):
        ours = ClipReward(pickscore, processor=processor).score(samples())
        theirs = ClipReward(ARCHITECTURE, hps / "HPS_v2_compressed.pt").score(samples())
        assert ours.numpy() == pytest.approx(theirs.numpy(), abs=1e-4)

    def test_image_reward_is_the_normalised_number_of_the_first_token(self, image_reward_folder, image_reward_state):
        reward = ImageReward(image_reward_folder, tokenizer=image_reward_folder / "tokenizer")
        arrays = {name: value.double().numpy() for name, value in image_reward_state.items()}
        words = {word: i for i, word in enumerate(WORDS)}
        longer = Sample(id="3", prompt=Prompt(text="a red circle , " * 20), seed=0, image=picture(3))
        expected = [image_reward(arrays, one, words, (2, 1)) for one in [*samples(), longer]]
        assert reward.score([*samples(), longer]).tolist() == pytest.approx(expected, abs=2e-5)
        assert max(expected) - min(expected) > 0.02


class TestPreprocessing:
    @pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (31, 30), (12, 9)])
    def test_differs_from_pillows_by_a_rounding_of_the_pixels(self, height, width):
        image = picture(0, height, width)
        shrunk = Image.fromarray(image.permute(1, 2, 0).numpy())
        factor = SIZE / min(height, width)
        size = (int(width * factor), int(height * factor))  # torchvision's
        shrunk = shrunk.resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - SIZE) / 2), round((size[1] - SIZE) / 2)
        theirs = np.asarray(shrunk.crop((left, top, left + SIZE, top + SIZE))).transpose(2, 0, 1)
        ours = Preprocessing(height=SIZE, width=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)(image) * 255
        assert np.abs(ours.numpy() - theirs).max() <= 1

    def test_is_what_the_image_processor_of_the_checkpoint_says(self, pickscore, processor, tmp_path):
        folder = shutil.copytree(processor, tmp_path / "other")
        CLIPImageProcessor(
            size={"shortest_edge": SIZE},
            crop_size={"height": SIZE, "width": SIZE},
            image_mean=[0.1, 0.2, 0.3],
            image_std=[0.5, 0.6, 0.7],
        ).save_pretrained(folder)
        seen = clip_encoder(pickscore, processor=folder).preprocess(picture(0))
        expected = (picture(0) / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
            [0.5, 0.6, 0.7]
        ).view(3, 1, 1)
        assert seen.numpy() == pytest.approx(expected.numpy(), abs=1e-6)


REWARDS = {
    "pickscore": lambda f, **o: PickScoreReward(f("pickscore"), processor=f("processor"), batch_size=2, **o),
    "hpsv2": lambda f, **o: HpsV2Reward(f("hps"), architecture=ARCHITECTURE, batch_size=2, **o),
    "image-reward": lambda f, **o: ImageReward(
        f("image_reward_folder"), tokenizer=f("image_reward_folder") / "tokenizer", batch_size=2, **o
    ),
}


class TestEveryPublishedScorer:
    @pytest.fixture(params=REWARDS)
    def reward(self, request):
        return REWARDS[request.param](request.getfixturevalue)

    def test_keeps_the_contract(self, reward):
        assert isinstance(reward, Reward) and reward.modality == "image"
        value_B = reward.score(samples())
        assert value_B.dtype == torch.float32 and value_B.shape == (3,) and not value_B.requires_grad
        assert reward.score([]).shape == (0,)

    def test_judges_a_sample_alike_alone_and_in_a_batch_of_any_sizes(self, reward):
        other = Sample(id="9", prompt=Prompt(text="a red circle"), seed=0, image=picture(9, 40, 24))
        mixed = [*samples(), other]
        alone = torch.cat([reward.score([one]) for one in mixed])
        assert reward.score(mixed).numpy() == pytest.approx(alone.numpy(), abs=1e-5)

    def test_half_precision_stays_near_full_precision(self, request, reward):
        half = REWARDS[request.node.callspec.params["reward"]](request.getfixturevalue, dtype="bf16").score(samples())
        assert half.dtype == torch.float32
        assert half.numpy() == pytest.approx(reward.score(samples()).numpy(), abs=0.05)

    def test_says_where_its_weights_come_from(self, reward):
        assert Path(reward.weights_from).exists()


class TestBadCheckpoints:
    def refused(self, words: str, make) -> None:
        with pytest.raises(WeightsError, match=words) as raised:
            make()
        assert "\n" not in str(raised.value)

    def test_a_clip_whose_weights_are_not_all_there_is_no_random_one(self, pickscore, processor, tmp_path):
        folder = shutil.copytree(pickscore, tmp_path / "half")
        state = load_file(folder / "model.safetensors")
        save_file({k: v for k, v in state.items() if "fc2" not in k}, folder / "model.safetensors", {"format": "pt"})
        make = lambda: PickScoreReward(folder, processor=processor)  # noqa: E731
        self.refused("half holds no whole CLIPModel: 8 of its weights are absent", make)

    def test_a_tensor_of_another_shape_is_refused(self, pickscore, processor, tmp_path):
        folder = shutil.copytree(pickscore, tmp_path / "wide")
        state = load_file(folder / "model.safetensors")
        state["text_projection.weight"] = torch.zeros(WIDTH, WIDTH + 1)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        self.refused("wide.*text_projection", lambda: PickScoreReward(folder, processor=processor))

    def test_a_folder_without_a_tokenizer_says_so(self, pickscore):
        self.refused(
            "tokenizer of .* knows 2 tokens and the model 49408", lambda: PickScoreReward(pickscore, processor=None)
        )

    def test_a_folder_without_an_image_processor_says_so(self, pickscore, processor, tmp_path):
        folder = shutil.copytree(processor, tmp_path / "words", ignore=lambda *_: ["preprocessor_config.json"])
        self.refused("cannot load AutoImageProcessor from", lambda: PickScoreReward(pickscore, processor=folder))

    def test_a_processor_of_another_size_is_refused(self, pickscore, processor, tmp_path):
        folder = shutil.copytree(processor, tmp_path / "large")
        CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ).save_pretrained(folder)  # fmt: skip
        self.refused("gives 32x32 pixels, and .* reads 16x16", lambda: PickScoreReward(pickscore, processor=folder))

    @pytest.mark.parametrize("make", [PickScoreReward, HpsV2Reward, ImageReward])
    def test_a_place_that_does_not_exist_is_named(self, make):
        self.refused("no (CLIP model|weights) at ./no/such/place", lambda: make("./no/such/place"))

    @pytest.mark.parametrize("make", [PickScoreReward, HpsV2Reward, HpsV21Reward, ImageReward])
    def test_without_a_network_the_hub_id_is_named(self, make):
        self.refused("(THUDM/ImageReward|xswu/HPSv2|yuvalkirstain/PickScore_v1)", make)

    def test_an_hps_checkpoint_of_another_architecture_is_refused(self, hps):
        self.refused("cannot load the CLIP model ViT-B-32 with", lambda: HpsV2Reward(hps, architecture="ViT-B-32"))

    def test_a_folder_without_the_file_names_the_file(self, tmp_path):
        self.refused("has no HPS_v2.1_compressed.pt", lambda: HpsV21Reward(tmp_path))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"mlp.layers.0.weight": torch.zeros(12, 7)}, "its head makes 1 of 7 numbers, and must make 1 of the 64"),
            ({"mlp.layers.7.weight": torch.zeros(2, 4), "mlp.layers.7.bias": torch.zeros(2)}, "its head makes 2 of 64"),
            ({"blip.visual_encoder.norm.weight": torch.zeros(5)}, ".*size mismatch for post_layernorm.weight"),
            ({"blip.text_encoder.encoder.layer.1.output.dense.bias": None}, ".*Missing key.*layer.1.output.dense.bias"),
            ({"blip.visual_encoder.cls_token": None}, "it has no 'embeddings.class_embedding'"),
        ],
    )
    def test_an_image_reward_with_other_tensors_is_refused(self, image_reward_state, tmp_path, change, words):
        state = {k: v for k, v in (image_reward_state | change).items() if v is not None}
        torch.save(state, tmp_path / "ImageReward.pt")
        self.refused(f"is no checkpoint of ImageReward: {words}", lambda: ImageReward(tmp_path))

    def test_an_image_reward_that_is_no_table_of_tensors_is_refused(self, tmp_path):
        torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "ImageReward.pt")
        self.refused("holds no table of tensors", lambda: ImageReward(tmp_path))
        (tmp_path / "ImageReward.pt").write_bytes(b"not a pickle")
        self.refused("cannot read the weights", lambda: ImageReward(tmp_path))

    def test_an_unknown_dtype_is_refused(self, image_reward_folder):
        with pytest.raises(ConfigError, match="'int8' .there are fp32, bf16, fp16"):
            ImageReward(image_reward_folder, dtype="int8")

    def test_an_aesthetic_head_for_another_clip_is_refused(self, pickscore, processor, tmp_path):
        save_file({"weight": torch.ones(1, 5), "bias": torch.ones(1)}, tmp_path / "head.safetensors")
        with_processor = shutil.copytree(processor, tmp_path / "clip")
        shutil.copytree(pickscore, with_processor, dirs_exist_ok=True)
        self.refused(
            r"reads embeddings of 5 numbers, .* gives 8",
            lambda: AestheticReward(tmp_path / "head.safetensors", with_processor),
        )
