from dataclasses import asdict
from pathlib import Path

import pytest
from castream.training.arguments import TrainingArguments, parse_arguments

RECIPES = Path(__file__).parents[2] / "recipes"


def refused(words: list[str]) -> str:
    with pytest.raises(ValueError) as error:
        parse_arguments(["--dataset_name", "photos", *words])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_recipe_and_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1e-4\nepochs: 3\nstream_layers: [stage1, stage2]\nmax_steps: null\n")
    args = parse_arguments(["--config", str(recipe), "--epochs", "7", "--freeze_output_projection", "no"])
    assert (args.learning_rate, args.epochs, args.stream_layers) == (1e-4, 7, ["stage1", "stage2"])
    assert args.freeze_output_projection is False and args.max_steps is None


def test_none_is_a_value_where_it_is_a_choice():
    args = parse_arguments(["--tracker", "none", "--augmentation", "none", "--num_workers", "none"])
    assert (args.tracker, args.augmentation, args.num_workers) == ("none", "none", None)
    args = parse_arguments(["--stream_layers", "none", "--evaluation_controls", "none"])
    assert (args.stream_layers, args.evaluation_controls) == (None, [])


def test_unknown_options_suggest_the_closest(tmp_path):
    assert "did you mean --learning_rate?" in refused(["--learning-rte", "1"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epoch: 3\n")
    assert "did you mean epochs?" in refused(["--config", str(recipe)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "nowhere.yaml"], "cannot be read: No such file"),
        (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--epochs", "1.5"], "--epochs: invalid int value: '1.5'"),
        (["--epochs", "0"], "epochs must be positive"),
        (["--learning_rate", "nan"], "learning_rate must be positive"),
        (["--learning_rate", "inf"], "learning_rate must be positive"),
        (["--warmup", "1"], "warmup must be in [0, 1)"),
        (["--objective", "magic"], "--objective: invalid choice: 'magic' (choose from"),
        (["--cache_features", "perhaps"], "Truthy value expected: got perhaps"),
        (["--freeze_backbone", "false"], "cache_features=true needs freeze_backbone=true"),
        (["--views", "none"], "cache_features=true needs a number of views"),
        (["--mixup", "0.2"], "cannot be combined with mixup"),
        (["--objective", "distill", "--label_smoothing", "0.1"], "need objective=cross_entropy"),
        (["--objective", "distill", "--freeze_classifier", "false"], "its teacher must not change"),
        (["--pooling", "gap"], "trains nothing"),
        (["--push_to_hub", "true"], "needs hub_model_id"),
        (["7"], "unexpected argument '7'"),
    ],
)
def test_bad_input_is_one_line(words, said):
    assert said in refused(words)


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "a: [", "just words", "epochs: 2\nseed: 1\nepochs: 3\n", "epochs: {a: 1}"]
)
def test_unreadable_recipes(tmp_path, text):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert str(recipe) in refused(["--config", str(recipe)])


def test_a_recipe_of_the_package_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos_distill", "recipes/photos_distill.yaml"):
        assert parse_arguments(["--config", name]).objective == "masked_distill"


def test_a_key_that_stands_twice_is_named(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 1\nepochs: 2\nseed: 3\n")
    assert "seed stands there twice" in refused(["--config", str(recipe)]) and "line 1" in refused(
        ["--config", str(recipe)]
    )


def test_home_is_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    args = parse_arguments(["--output_dir=~/run", "--dataset_name", "~/photos"])
    assert (args.output_dir, args.dataset_name) == ("/home/someone/run", "/home/someone/photos")


def test_without_dataset_and_recipe_it_is_the_demo():
    demo = asdict(parse_arguments(["--config", str(RECIPES / "demo.yaml")]))
    assert asdict(parse_arguments([])) == demo
    assert asdict(parse_arguments(["--seed", "3"])) == demo | {"seed": 3}
    assert asdict(parse_arguments(["--dataset_name", "photos"])) == asdict(TrainingArguments(dataset_name="photos"))


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid_and_short(recipe):
    parse_arguments(["--config", str(recipe)])
    assert 10 <= len(recipe.read_text().splitlines()) <= 40


def test_help_shows_at_most_25_flags(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert 15 < len(shown) <= 25
