"""The folder that would be uploaded: exactly what it should hold, and a clear refusal of what cannot be published."""

import json
from pathlib import Path

import pytest
import torch
from castream.artifacts.models import fingerprint_model
from castream.evaluation.markdown import to_card_markdown
from castream.publishing import command, publish, write_model_card
from castream.publishing.folder import Publication, assemble, without_local_paths
from castream.publishing.verify import verify
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTImageProcessor

from modeling_castream import CAStreamForImageClassification
from tests.modeling_castream.tiny import tiny_model
from tests.publishing.models import entry, make_results, save_model

CODE = {path.name for path in (Path(__file__).parents[2] / "modeling_castream").glob("*_castream.py")}


@pytest.fixture
def model_dir(tmp_path):
    save_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def unverified(monkeypatch):
    """The fresh process takes seconds; tests that end before it, or check something else, leave it out."""
    monkeypatch.setattr("castream.publishing.publication.verify", lambda folder, model: 0.0)


def write_results(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(make_results(**changes)))
    for name in ("examples.png", "curves.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "per_image.parquet").write_bytes(b"not for publication")
    return folder


def test_a_dry_run_writes_exactly_what_would_be_uploaded(model_dir, tmp_path, capsys, unverified):
    (model_dir / "checkpoint-10").mkdir()
    (model_dir / "checkpoint-10" / "optimizer.bin").write_bytes(b"0")
    (model_dir / "training_state.bin").write_bytes(b"0")
    results = write_results(tmp_path / "results")
    write_model_card(model_dir, recipe={"objective": "distill", "output_dir": "/home/somebody/secret/model"})
    arguments = ["--model", str(model_dir), "--repo-id", "me/model", "--results", str(results)]
    photo = tmp_path / "photo.png"
    Image.new("RGB", (90, 60), (200, 80, 10)).save(photo)
    assert command.main([*arguments, "--dry-run", str(tmp_path / "out"), "--example", str(photo)]) == 0
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    expected = {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "results.json",
        "recipe.json",
    }
    figures = {"figures/explanation.png", "figures/examples.png", "figures/curves.png"}
    assert files == expected | figures | CODE
    printed = capsys.readouterr().out
    assert all(name in printed for name in files)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}
    assert config["custom_pipelines"]["image-explanation"]["impl"] == "pipeline_castream.ImageExplanationPipeline"
    for name in files:
        assert b"somebody" not in (tmp_path / "out" / name).read_bytes(), name
    assert not list(tmp_path.glob(".out*"))


def test_published_weights_are_the_model_s(model_dir, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    assemble(Publication(model_dir, "me/model"), folder, max_shard_size="30KB")
    shards = [load_file(path) for path in folder.glob("*.safetensors")]
    assert len(shards) > 1
    published = {name: tensor for shard in shards for name, tensor in shard.items()}
    original = load_file(model_dir / "model.safetensors")
    assert published.keys() == original.keys()
    assert all(torch.equal(published[name], original[name]) for name in original)


def test_the_card_s_index_has_the_numbers_of_the_results(model_dir, tmp_path):
    path = write_model_card(
        model_dir, results=make_results(), repo_id="me/model", base_model="some/resnet", license="apache-2.0"
    )
    data = ModelCard.load(path).data
    found = {entry.metric_name: entry.metric_value for entry in data.eval_results}
    assert found == {
        "accuracy (GAP)": 70.125,
        "accuracy (CA)": 71.5,
        "average_drop (grad_cam, GAP)": 20.0,
        "insertion (grad_cam, GAP)": 10.0,
        "average_drop (grad_cam, CA)": 18.0,
        "insertion (grad_cam, CA)": 9.0,
    }
    assert {entry.dataset_type for entry in data.eval_results} == {"some/dataset"}
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-classification")
    assert (data.license, data.base_model, data.metrics) == (
        "apache-2.0",
        ["some/resnet"],
        ["accuracy", "average_drop", "insertion"],
    )
    text = path.read_text()
    assert "| grad_cam | GAP | 20.00 [19.00, 21.00] | 10.00 [9.00, 11.00] |" in text
    assert "| grad_cam | none | -2.00 [-3.00, -1.00] | – |" in text
    assert "| grad_cam | area | -0.25 [-1.25, 0.75] | – |" in text
    assert "| random_map | GAP | 40.00 [39.00, 41.00] | 20.00 [19.00, 21.00] |" in text
    assert "on some/dataset" in text and "40 images, 40 explained classes, protocol `reference`" in text
    assert "Accuracy: GAP 70.12 [69.12, 71.12]; CA 71.50 [70.50, 72.50]" in text
    assert to_card_markdown(make_results()) in text
    assert "{{" not in text.replace("{{CA-Stream", "") and "{%" not in text


def test_the_card_says_what_evidence_shows_where_the_model_has_it(model_dir):
    before = write_model_card(model_dir).read_text()
    assert 'method="evidence"' not in before and 'method="object"' not in before
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"evidence_queries": ["memory"]}))
    text = write_model_card(model_dir).read_text()
    assert 'method="evidence"' in text and 'method="object"' not in text and "\n\nThe model is also" in text
    difference = {"method": "evidence", "reference": "grad_cam", "pooling": "gap", "control": "area"}
    rows = [difference | {"metrics": {"average_drop": entry(-3.0)}}]
    text = write_model_card(model_dir, make_results(method_minus_reference=rows)).read_text()
    assert "### Methods minus grad_cam at equal area, paired over images" in text
    assert "| evidence | GAP | area | -3.00 [-4.00, -2.00] | – |" in text


def test_without_results_the_card_claims_nothing(model_dir):
    path = write_model_card(model_dir)
    card = ModelCard.load(path)
    assert card.data.eval_results is None and card.data.metrics is None and card.data.license is None
    assert "**Not measured.**" in card.text
    assert "licence was not stated" in card.text
    assert "No training recipe" in card.text


def test_a_later_call_keeps_what_an_earlier_one_knew(model_dir):
    write_model_card(model_dir, make_results(), {"steps": 7}, base_model="a/b", license="mit", datasets=["c/d"])
    path = write_model_card(model_dir, repo_id="me/other")
    card = ModelCard.load(path)
    assert (card.data.base_model, card.data.license, card.data.datasets) == (["a/b"], "mit", ["c/d"])
    assert len(card.data.eval_results) == 6 and "| steps | 7 |" in card.text and "me/other" in card.text


def test_a_card_written_by_hand_is_left_alone(model_dir, tmp_path):
    (model_dir / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    write_model_card(model_dir, make_results())
    assert (model_dir / "README.md").read_text().endswith("# Mine\n")
    (tmp_path / "folder").mkdir()
    assemble(Publication(model_dir, "me/model"), tmp_path / "folder")
    assert (tmp_path / "folder" / "README.md").read_text().endswith("# Mine\n")


def refused(capsys, model_dir, *arguments, out="out"):
    """Run the command; returns its one line on stderr, after checking that it failed and wrote nothing."""
    target = model_dir.parent / out
    status = command.main(["--model", str(model_dir), "--repo-id", "me/model", "--dry-run", str(target), *arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("publish: ")]
    assert status == 1 and len(lines) == 1
    assert not target.exists()
    return lines[0]


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_file_is_named(model_dir, capsys, unverified, name):
    (model_dir / name).unlink()
    assert f"lacks {name}" in refused(capsys, model_dir)


def test_no_folder(tmp_path, capsys, unverified):
    assert "is no folder" in refused(capsys, tmp_path / "nothing")


def test_weights_that_are_not_safetensors_are_refused(model_dir, capsys, unverified):
    torch.save({}, model_dir / "pytorch_model.bin")
    assert "weights that are not safetensors (pytorch_model.bin)" in refused(capsys, model_dir)


def test_another_kind_of_model_is_refused(model_dir, capsys, unverified):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"model_type": "resnet"}))
    assert "type 'resnet', not 'castream'" in refused(capsys, model_dir)


def test_missing_weights_are_not_made_up(model_dir, capsys, unverified):
    weights = load_file(model_dir / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    assert "1 missing keys: classifier.weight" in refused(capsys, model_dir)


def test_broken_weights_are_refused(model_dir, capsys, unverified):
    data = (model_dir / "model.safetensors").read_bytes()
    (model_dir / "model.safetensors").write_bytes(data[:1000])
    assert "does not load" in refused(capsys, model_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/somewhere/else"}, "results of another model (/somewhere/else), not of model"),
        ({"weights": "0" * 16}, "results of another model (model), not of model"),
        ({"accuracy": {"gap": {"mean": float("nan"), "low": None, "high": None}}}, "1 figures that are no numbers"),
        ({"rows": [{"method": "grad_cam"}]}, "a row that cannot be read"),
    ],
)
def test_results_that_cannot_stand_are_refused(model_dir, tmp_path, capsys, unverified, changes, message):
    results = write_results(tmp_path / "results", **changes)
    assert message in refused(capsys, model_dir, "--results", str(results))


def test_results_are_recognised_by_the_weights(model_dir, tmp_path, capsys, unverified):
    weights = fingerprint_model(CAStreamForImageClassification.from_pretrained(model_dir))
    results = write_results(tmp_path / "results", model="some other name")
    (results / "evaluation.json").write_text(json.dumps({"weights": weights}))
    publish(model_dir, "me/model", results_dir=results, dry_run=tmp_path / "out")
    published = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (published["model"], published["weights"]) == ("me/model", weights)
    save_model(model_dir, seed=5)
    assert "results of another model (some other name)" in refused(
        capsys, model_dir, "--results", str(results), out="again"
    )


def test_results_that_training_put_into_the_card_stay_with_their_weights(model_dir, tmp_path, capsys, unverified):
    write_model_card(model_dir, make_results(model="CAStreamForImageClassification"))
    publish(model_dir, "me/model", dry_run=tmp_path / "out")
    save_model(model_dir, seed=5)
    assert "results of another model" in refused(capsys, model_dir, out="again")


def test_published_results_tell_no_paths():
    command = (
        "python -m evaluation --model /home/me/net --dataset ~/photos --data-files=/data/x/a.jpg '/home/me/My own/b'"
    )
    assert without_local_paths({"command": [command]}) == {
        "command": ["python -m evaluation --model net --dataset photos --data-files=a.jpg 'My own/b'"]
    }
    for text in (
        "GAP / CA",
        "and/or",
        "https://huggingface.co/a/b",
        "some/dataset (test)",
        "relative/path/x",
        "~3 images",
    ):
        assert without_local_paths(text) == text
    assert without_local_paths(["/home/me/photos (test)", "~/photos (test)", 3]) == ["photos (test)"] * 2 + [3]


def test_results_folder_without_results(model_dir, tmp_path, capsys, unverified):
    (tmp_path / "results").mkdir()
    assert "lacks results.json" in refused(capsys, model_dir, "--results", str(tmp_path / "results"))


def test_an_example_that_is_no_image(model_dir, capsys, unverified):
    assert "is not an image" in refused(capsys, model_dir, "--example", str(model_dir / "config.json"))


def test_a_dry_run_overwrites_nothing(model_dir, tmp_path, capsys, unverified):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    status = command.main(["--model", str(model_dir), "--repo-id", "me/model", "--dry-run", str(tmp_path / "out")])
    assert status == 1 and "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_no_token(model_dir, capsys, monkeypatch):
    monkeypatch.setattr("castream.publishing.hub.get_token", lambda: None)
    assert command.main(["--model", str(model_dir), "--repo-id", "me/model"]) == 1
    assert capsys.readouterr().err == (
        "publish: no Hugging Face token: log in with `hf auth login`, or set HF_TOKEN.\n"
    )


def test_what_does_not_load_elsewhere_is_not_published(model_dir, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    model = assemble(Publication(model_dir, "me/model"), folder)
    (folder / "pipeline_castream.py").unlink()
    with pytest.raises(ValueError, match=r"does not load without castream installed: .*pipeline_castream"):
        verify(folder, model)


def test_what_answers_otherwise_elsewhere_is_not_published(model_dir, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    model = assemble(Publication(model_dir, "me/model"), folder)
    with torch.no_grad():
        model.classifier.bias += 0.1
    with pytest.raises(ValueError, match="answers otherwise than the model"):
        verify(folder, model)


def test_the_card_of_a_source_that_averages_nothing_names_its_own_readout(tmp_path, unverified):
    tiny_model("vit").save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "model")
    results = make_results()
    results["accuracy"]["source"] = results["accuracy"].pop("gap")
    for row in results["rows"]:
        row["pooling"] = row["pooling"].replace("gap", "source")
    write_results(tmp_path / "results", **results)
    Image.effect_noise((90, 60), 90).convert("RGB").save(tmp_path / "photo.png")
    arguments = ["--model", str(tmp_path / "model"), "--repo-id", "me/model", "--results", str(tmp_path / "results")]
    arguments += ["--dry-run", str(tmp_path / "out"), "--example", str(tmp_path / "photo.png")]
    assert command.main(arguments) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "accuracy (SOURCE)" in text and "| grad_cam | SOURCE | 20.00 [19.00, 21.00] |" in text
    assert '`pooling="source"` gives the scores that the network has without it,' in text
    assert "under the network's own readout and under CA" in text and "### CA minus source" in text
    assert "GAP" not in text and '"gap"' not in text
    assert (tmp_path / "out" / "figures" / "explanation.png").is_file()
    (tmp_path / "model" / "README.md").unlink(missing_ok=True)
    unmeasured = write_model_card(tmp_path / "model").read_text()
    assert "--poolings source ca" in unmeasured and "GAP" not in unmeasured
