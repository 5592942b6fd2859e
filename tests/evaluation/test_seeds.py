"""Several seeds in one table: values averaged per image, intervals over images, and the seeds' own means."""

import json

import pytest
import torch
from castream.evaluation import EvaluationSettings, evaluate_saliency
from castream.evaluation.seeds import combine_seeds, main
from castream.evaluation.store import TABLE_NAME, SavedPart

from tests.evaluation.small import mean_interval, small_examples, small_model, small_processor

SETTINGS = EvaluationSettings(methods=("grad_cam", "raw_attention"), metrics=("average_drop", "average_gain"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Evaluations of one network with three different streams."""
    folders = []
    for seed in range(3):
        model = small_model()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.castream.stream.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path_factory.mktemp("seeds") / str(seed)
        evaluate_saliency(model, small_processor(), small_examples(6), SETTINGS, folder, dataset_name="small")
        folders.append(folder)
    return folders


def per_image(folder, method, pooling):
    table = SavedPart(folder / TABLE_NAME).table.to_pandas()
    chosen = table[(table["method"] == method) & (table["pooling"] == pooling) & (table["control"] == "")]
    return chosen.groupby("index")["average_drop"].mean().to_numpy()


def test_intervals_are_of_the_mean_over_seeds_and_each_figure_has_the_seeds_own(folders):
    combined = combine_seeds(folders)
    [pair] = [row for row in combined["ca_minus_gap"] if row["method"] == "grad_cam" and row["control"] == ""]
    figure = pair["metrics"]["average_drop"]
    ca, gap = (sum(per_image(folder, "grad_cam", pooling) for folder in folders) / 3 for pooling in ("ca", "gap"))
    expected = mean_interval(ca - gap)
    assert (figure["mean"], figure["low"], figure["high"]) == pytest.approx(tuple(expected), abs=1e-9)
    own = [(per_image(f, "grad_cam", "ca") - per_image(f, "grad_cam", "gap")).mean() for f in folders]
    assert figure["by_seed"] == pytest.approx(own, abs=1e-9)
    assert len(set(figure["by_seed"])) == 3


def test_the_command_writes_both_files(folders, tmp_path, capsys):
    assert main([*map(str, folders), "--output", str(tmp_path / "all")]) == 0
    results = json.loads((tmp_path / "all" / "results.json").read_text())
    figure = results["ca_minus_gap"][0]["metrics"]["average_drop"]
    low, high = min(figure["by_seed"]), max(figure["by_seed"])
    text = (tmp_path / "all" / "results.md").read_text()
    assert f"({low:.2f} to {high:.2f})" in text and "Mean over 3 seeds" in text
    assert text in capsys.readouterr().out


def test_other_images_settings_or_a_missing_table_are_refused(folders, tmp_path, capsys):
    for name, count, settings in (
        ("fewer", 5, SETTINGS),
        ("other", 6, EvaluationSettings(methods=("grad_cam",), metrics=("average_drop",))),
    ):
        evaluate_saliency(small_model(), small_processor(), small_examples(count), settings, tmp_path / name)
    for folder, words in (("fewer", "dataset|sample"), ("other", "settings"), ("none", "no results.json")):
        with pytest.raises(ValueError, match=words):
            combine_seeds([folders[0], tmp_path / folder])
    capsys.readouterr()
    assert main([str(folders[0]), "--output", str(tmp_path / "one")]) == 1
    assert capsys.readouterr().err == "evaluation: name at least two folders of results, one per seed.\n"
