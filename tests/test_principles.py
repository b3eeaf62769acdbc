"""Principles: those that ship, those of one's own, and one clear line for a file that is none."""

from __future__ import annotations

import pytest

from raftdiff.errors import ConfigError
from raftdiff.principles import SETS, Principle, load_principles, principle_sets, read_principle
from raftdiff.reward_models.judge_oracle import MEASURES

GOOD = "name: warmth\nmodality: image\ndirection: more\nwording: warm light\n"


def test_every_principle_that_ships_reads_and_is_called_like_its_file():
    files = sorted(SETS.glob("*/*.yaml"))
    assert {file.parent.name for file in files} == set(principle_sets()) == {"image", "text", "shapes", "shapes-text"}
    assert [read_principle(file).name for file in files] == [file.stem for file in files]


def test_the_twelve_of_the_paper_are_there_and_three_of_them_are_to_be_least():
    found = {principle.name: principle.direction for principle in load_principles(["text"])}
    assert len(found) == 13 and "overall" in found
    assert {name for name, direction in found.items() if direction == "less"} == {"toxicity", "sycophancy", "bias"}


@pytest.mark.parametrize("set_name", ["shapes", "shapes-text"])
def test_the_oracle_can_judge_every_principle_of_the_embedded_world(set_name):
    assert {principle.name for principle in load_principles([set_name])} <= MEASURES.keys()


def test_principles_come_from_sets_single_names_files_and_folders(tmp_path):
    (tmp_path / "warmth.yaml").write_text(GOOD)
    own = Principle(name="warmth", modality="image", direction="more", wording="warm light")
    assert load_principles([str(tmp_path)]) == load_principles([str(tmp_path / "warmth.yaml")]) == [own]
    assert [p.name for p in load_principles(["image/detail", str(tmp_path)])] == ["detail", "warmth"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GOOD.replace("wording: warm light\n", ""),
            "warmth.yaml: `wording` is missing; a principle has name, modality",
        ),
        (GOOD + "weight: 2\n", "`weight` is no field of a principle"),
        (GOOD + "directoin: less\n", "did you mean 'direction'?"),
        (GOOD.replace("more", "most"), "`direction` Input should be 'more' or 'less'"),
        (GOOD.replace("warmth", "a/b"), "`name` String should match pattern"),
        ("- a list\n", "is no principle; it needs name, modality"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_principle_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "warmth.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_principles([str(path)])
    assert message in str(refused.value) and str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_an_unknown_name_and_two_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="no principles 'image/compositon'; did you mean 'image/composition'?"):
        load_principles(["image/compositon"])
    with pytest.raises(ConfigError, match="two are called 'overall'"):
        load_principles(["image/overall", "text/overall"])
