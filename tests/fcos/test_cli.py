"""The command line, run in this process but for its start-up."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch

from eecs598.data.images import annotated_size
from eecs598.data.index import load_instances
from eecs598.data.voc import build_index
from eecs598.training.settings import SETTINGS
from fcos import cli

ROOT = Path(__file__).resolve().parents[2]

SMALL = ["--weights", "none", "--iters", "2", "--batch-size", "4", "--image-size", "64"]
SMALL += ["--fpn-channels", "8", "--stem", "8", "--workers", "0"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A tiny set of shapes, and a run on it."""
    folder = tmp_path_factory.mktemp("fcos")
    shapes = ["data", "shapes", str(folder / "shapes"), "--train", "12", "--val", "6"]
    assert cli.main(shapes) == 0
    train = ["train", "--data", str(folder / "shapes"), "--out", str(folder / "run"), *SMALL]
    assert cli.main(train) == 0
    return folder


@pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS)], ids=" ".join)
def test_help_does_not_import_what_is_heavy(command):
    script = (
        "import sys; from fcos import cli\n"
        f"try: cli.main([*{command}, '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'matplotlib', 'numpy', 'PIL'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("--" if command else "score") in done.stdout


def test_train_leaves_what_it_says(run_folder):
    names = {path.name for path in (run_folder / "run").iterdir()}
    assert names == {
        "best.pt",
        "checkpoint.pt",
        "history.json",
        "history.jsonl",
        "loss.png",
        "metrics.json",
        "run.json",
        "ap.png",
        "detections.png",
        "report.html",
        "detection-results",
        "ground-truth",
    }
    metrics = json.loads((run_folder / "run/metrics.json").read_text())
    assert 0 <= metrics["mAP"] <= 1 and set(metrics["AP"]) <= set(metrics["num_detections"])
    assert metrics["score_thresh"] == 0.05 and metrics["split"] == "val"
    assert len(json.loads((run_folder / "run/history.json").read_text())["loss"]) == 2
    checkpoint = torch.load(run_folder / "run/checkpoint.pt", weights_only=True)
    assert checkpoint["settings"]["data"]["image_size"] == 64 and "ball" in checkpoint["classes"]
    description = json.loads((run_folder / "run/run.json").read_text())
    assert description["settings"] == checkpoint["settings"]
    assert description["recipe"] == "handout"
    contents = description["contents"]
    assert contents["train"]["images"] == 12 and sum(contents["val"]["objects"].values()) > 6
    (environment,) = description["environment"]
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert [environment[n] for n in ("device", "processes", "precision")] == ["cpu", 1, "float32"]
    weights = checkpoint["model"].items()
    buffers = ("running_mean", "running_var", "num_batches_tracked", "loss_normalizer")
    usage = environment["usage"]
    parameters = sum(value.numel() for name, value in weights if not name.endswith(buffers))
    assert usage["parameters"] == parameters and usage["image_size"] == 64
    assert 3e7 < usage["flops_per_image"] < 2e8 and usage["images_per_second"] > 0


def test_a_plain_state_dict_is_evaluated_like_the_checkpoint(run_folder, capsys):
    checkpoint = torch.load(run_folder / "run/checkpoint.pt", weights_only=True)
    torch.save(checkpoint["model"], run_folder / "fcos_detector.pt")
    results = []
    for name, more in (("run/checkpoint.pt", []), ("fcos_detector.pt", ["--image-size", "64"])):
        arguments = ["eval", str(run_folder / name), "--data", str(run_folder / "shapes")]
        arguments += ["--workers", "0", "--json", str(run_folder / "plain.json"), *more]
        assert cli.main(arguments) == 0
        results.append(json.loads((run_folder / "plain.json").read_text()))
        del results[-1]["checkpoint"]
    assert results[0] == results[1]
    del checkpoint["model"]["pred_net.pred_cls.weight"]
    bias = checkpoint["model"]["pred_net.pred_cls.bias"]
    checkpoint["model"]["pred_net.pred_cls.bias"] = bias.repeat(2)
    torch.save(checkpoint["model"], run_folder / "other_classes.pt")
    arguments = ["eval", str(run_folder / "other_classes.pt"), "--data", str(run_folder / "shapes")]
    assert cli.main(arguments) == 2
    assert f"has {2 * len(bias)} classes" in capsys.readouterr().err
    torch.save({"w": torch.ones(2)}, run_folder / "other_net.pt")
    arguments = ["eval", str(run_folder / "other_net.pt"), "--data", str(run_folder / "shapes")]
    assert cli.main(arguments) == 2
    assert "not one of FCOS" in capsys.readouterr().err


@pytest.mark.parametrize(
    "head",
    [
        ["--head-norm", "group", "--level-scales", "--stem", "8,16"],
        ["--head-norm", "group_box", "--stem", "8", "--box-stem", "8,16"],
    ],
)
def test_a_head_with_norm_and_scales_is_recognized(run_folder, tmp_path, head):
    out = tmp_path / "run"
    train = ["train", "--data", str(run_folder / "shapes"), "--out", str(out), *SMALL]
    assert cli.main([*train, *head]) == 0
    model = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    torch.save(model, tmp_path / "plain.pt")
    arguments = ["eval", str(tmp_path / "plain.pt"), "--data", str(run_folder / "shapes")]
    assert cli.main([*arguments, "--workers", "0", "--image-size", "64"]) == 0


def test_resume_keeps_to_the_settings(run_folder, monkeypatch, capsys):
    out = str(run_folder / "run")
    assert cli.main(["train", "--resume", "--out", out, "--lr", "0.5"]) == 2
    message = capsys.readouterr().err
    assert "learning_rate 0.008" in message and "0.5" in message
    assert cli.main(["train", "--resume", "--out", out, "--max-grad-norm", "3"]) == 2
    assert "max_grad_norm None" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--out", out, "--data", "elsewhere"]) == 2
    assert "elsewhere" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--out", str(run_folder / "nowhere")]) == 2
    assert "run.json" in capsys.readouterr().err
    monkeypatch.chdir(run_folder)
    assert cli.main(["train", "--resume"]) == 2
    assert "no unfinished training" in capsys.readouterr().err


def test_resume_finds_the_latest_training(run_folder, monkeypatch, capsys):
    monkeypatch.chdir(run_folder)
    train = ["train", "--data", str(run_folder / "shapes"), *SMALL, "--out", "runs/one"]
    assert cli.main(train) == 0
    before = json.loads(Path("runs/one/metrics.json").read_text())
    Path("runs/one/metrics.json").unlink()  # as if it had been stopped after the last step
    shutil.copytree(run_folder / "shapes", "moved")
    resume = ["train", "--resume", "--workers", "0", "--data", "moved", "--eval-every", "7"]
    assert cli.main(resume) == 0
    assert "going on with runs/one" in capsys.readouterr().out
    after = json.loads(Path("runs/one/metrics.json").read_text())
    assert after == {**before, "data": str(run_folder / "moved"), "environment": ANY}
    description = json.loads(Path("runs/one/run.json").read_text())
    assert description["data"] == str(run_folder / "moved")
    assert description["settings"]["run"]["eval_every"] == 7
    assert description["settings"]["run"]["checkpoint_every"] == 500
    (Path("moved") / "ImageSets/Main/train.txt").write_text("train_00000\n")
    assert cli.main(["train", "--resume", "--out", "runs/one", "--no-check"]) == 2
    assert "has changed" in capsys.readouterr().err


def test_every_setting_is_an_option(run_folder, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for settings in SETTINGS.values():
        for setting in settings.values():
            assert f"--{setting.option} " in text or f"--{setting.option}, " in text


def test_data_check(small_voc, tmp_path, capsys):
    check = ["data", "check", str(small_voc)]
    assert cli.main([*check, "--json", str(tmp_path / "report.json")]) == 0
    assert "objects per class" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["splits"]["train"]["images"] == 8
    (small_voc / "JPEGImages/0000.jpg").write_bytes(b"no image")
    assert cli.main(check) == 1
    assert "ERROR" in capsys.readouterr().out


def test_train_stops_at_what_the_check_finds(small_voc, tmp_path, capsys):
    """Before the first step, with the sentences of the check; --no-check goes on."""
    for path in (small_voc / "Annotations").glob("000[89].xml"):  # of val
        path.write_text(path.read_text().replace("<name>cube", "<name>Cube"))
    assert cli.main(["data", "check", str(small_voc)]) == 1
    found = [line for line in capsys.readouterr().out.splitlines() if "'Cube'" in line]
    assert len(found) == 2  # never in train, and much like cube
    train = ["train", "--data", str(small_voc), "--out", str(tmp_path / "run"), *SMALL]
    assert cli.main(train) == 2
    assert not (tmp_path / "run").exists()
    lines = capsys.readouterr().err.splitlines()
    assert set(found) <= set(lines) and "--no-check" in lines[-1]
    assert f"fcos: error: {small_voc} is not ready for training." in lines
    assert cli.main([*train, "--no-check"]) == 0
    assert set(found) <= set(capsys.readouterr().err.splitlines())
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "run"), "--workers", "0"]) == 2


def test_image_size_of_the_check(small_voc, capsys):
    assert cli.main(["data", "check", str(small_voc)]) == 0
    assert "too small" not in capsys.readouterr().out
    assert cli.main(["data", "check", str(small_voc), "--image-size", "10"]) == 0
    assert "too small to be learned at this image size" in capsys.readouterr().out


def test_train_does_not_write_over_a_run(run_folder, capsys):
    before = (run_folder / "run/checkpoint.pt").read_bytes()
    train = ["train", "--data", str(run_folder / "shapes"), "--out", str(run_folder / "run")]
    assert cli.main(train) == 2
    assert "not empty" in capsys.readouterr().err
    assert (run_folder / "run/checkpoint.pt").read_bytes() == before


def test_eval_export_and_score_agree(run_folder, capsys):
    arguments = ["eval", str(run_folder / "run/checkpoint.pt"), "--workers", "0"]
    arguments += ["--data", str(run_folder / "shapes"), "--score-thresh", "0.01"]
    arguments += ["--export", str(run_folder / "text"), "--json", str(run_folder / "eval.json")]
    assert cli.main(arguments) == 0
    evaluated = json.loads((run_folder / "eval.json").read_text())
    assert sum(evaluated["num_detections"].values()) > 0
    assert cli.main(["score", str(run_folder / "text"), "--json", str(run_folder / "s.json")]) == 0
    scored = json.loads((run_folder / "s.json").read_text())
    assert scored["AP"] == evaluated["AP"] and scored["mAP"] == evaluated["mAP"]
    assert (run_folder / "text/ap.png").is_file()
    assert "mAP@0.5" in capsys.readouterr().out
    assert cli.main(arguments) == 2  # files of two exports would be scored together
    assert "--export" in capsys.readouterr().err


def test_eval_gives_both_rules_for_difficult_objects(run_folder, monkeypatch, capsys):
    """And the text files of each rule score as it does."""
    data, text, results = run_folder / "difficult", run_folder / "text-of", {}
    shutil.copytree(run_folder / "shapes", data)
    for xml in (data / "Annotations").glob("train_*.xml"):
        easy = "<difficult>0</difficult>"
        xml.write_text(xml.read_text().replace(easy, easy.replace("0", "1"), 1))
    classes = torch.load(run_folder / "run/checkpoint.pt", weights_only=True)["classes"]
    instances = load_instances(data, "train", classes)

    def all_found(detector, loader, *args, **kwargs):
        """Find everything, difficult objects first."""
        for (paths, images, _), instance in zip(loader, instances, strict=True):
            assert paths == (str(instance.path),)
            rows = instance.boxes.flip(0)
            height, width = annotated_size(instance.path, None)
            scale = torch.tensor([images.shape[3] / width, images.shape[2] / height]).repeat(2)
            scores = torch.linspace(0.9, 0.8, len(rows))
            found = {"boxes": rows[:, :4] * scale, "labels": rows[:, 4].long(), "scores": scores}
            yield paths[0], images[0], found, {}

    monkeypatch.setattr("a4_helper.iterate_detections", all_found)
    arguments = ["eval", str(run_folder / "run/checkpoint.pt"), "--workers", "0", "--split"]
    arguments += ["train", "--data"]
    for rule in ("keep", "drop"):
        out = [f"--out={text}-{rule}", f"--export={text}-{rule}-files", f"--difficult={rule}"]
        assert cli.main([*arguments, str(data), *out]) == 0
        assert cli.main(["score", f"{text}-{rule}-files", f"--json={text}.json"]) == 0
        results[rule] = json.loads(Path(f"{text}.json").read_text())
    metrics = json.loads(Path(f"{text}-keep/metrics.json").read_text())
    assert metrics["devkit"]["mAP"] == 1 > metrics["mAP"]
    assert metrics["devkit"]["num_difficult"] == 12
    output = capsys.readouterr().out
    assert f"mAP by the course's rule {100 * metrics['mAP']:.2f}" in output
    assert "mAP by the devkit's rule 100.00: a match to one of 12 difficult objects" in output
    assert results["drop"]["mAP"] == metrics["mAP"] and results["keep"]["mAP"] == 1
    assert results["keep"]["num_ground_truth"] == results["drop"]["num_ground_truth"]
    # With the course's index alone it is not known what is difficult.
    index = build_index(data, "train")
    (data / "voc07_train.json").write_text(json.dumps(index))
    shutil.rmtree(data / "Annotations")
    instances = load_instances(data, "train", classes)
    assert cli.main([*arguments, str(data), f"--out={text}-unknown"]) == 0
    assert "mAP by the devkit's rule not known" in capsys.readouterr().out
    assert cli.main([*arguments, str(data), f"--out={text}-5", "--difficult", "keep"]) == 2
    assert "leaves difficult objects out" in capsys.readouterr().err


def test_difficult_objects_and_pixel_edges_are_settings_of_a_run(run_folder, monkeypatch):
    """They reach the training set, and the second one every evaluation of the run."""
    seen = []

    def remember(module: str, name: str) -> None:
        original = getattr(sys.modules[module], name)

        def called(*args, **kwargs):
            seen.append((name, kwargs.get("ignore_difficult"), kwargs["pixel_edges"]))
            return original(*args, **kwargs)

        monkeypatch.setattr(f"{module}.{name}", called)

    remember("eecs598.data", "TrainingSet")
    remember("a4_helper", "evaluate_detector")
    out = run_folder / "edges"
    train = ["train", "--data", str(run_folder / "shapes"), "--out", str(out), *SMALL]
    assert cli.main([*train, "--ignore-difficult", "--pixel-edges"]) == 0
    arguments = ["eval", str(out / "checkpoint.pt"), "--data", str(run_folder / "shapes")]
    assert cli.main([*arguments, "--workers", "0"]) == 0
    evaluated = ("evaluate_detector", None, True)
    assert seen == [("TrainingSet", True, True), evaluated, evaluated]


def test_training_images_are_evaluated_whole(run_folder):
    arguments = ["eval", str(run_folder / "run/checkpoint.pt"), "--workers", "0", "--split"]
    arguments += ["train", "--data", str(run_folder / "shapes"), "--out", str(run_folder / "whole")]
    assert cli.main(arguments) == 0
    counts = json.loads((run_folder / "whole/metrics.json").read_text())["num_ground_truth"]
    contents = json.loads((run_folder / "run/run.json").read_text())["contents"]
    assert counts == contents["train"]["objects"]  # a crop would lose some


def test_eval_writes_a_report_and_compares(run_folder, capsys):
    checkpoint, data = str(run_folder / "run/checkpoint.pt"), str(run_folder / "shapes")
    arguments = ["eval", checkpoint, "--data", data, "--workers", "0"]
    before = set((run_folder / "run").iterdir())
    assert cli.main(arguments) == 0 and cli.main(arguments) == 0
    written = set((run_folder / "run").iterdir()) - before
    assert len(written) == 2  # the second is beside the first
    for folder in written:
        assert folder.name.startswith("eval-val")
        files = {"report.html", "metrics.json", "detection-results", "ground-truth"}
        assert {path.name for path in folder.iterdir()} == files
    capsys.readouterr()
    other = ["--out", str(run_folder / "small"), "--image-size", "48", "--compare"]
    assert cli.main([*arguments, *other, str(run_folder / "run")]) == 0
    assert f"against {run_folder / 'run'}, 95 % interval" in capsys.readouterr().out
    comparison = json.loads((run_folder / "small/metrics.json").read_text())["comparison"]
    assert comparison["with"] == str(run_folder / "run")
    assert comparison["low"] <= comparison["high"]
    report = (run_folder / "small/report.html").read_text(encoding="utf-8")
    assert f"Compared with {run_folder / 'run'}" in report
    assert cli.main([*arguments, "--compare", str(run_folder / "shapes")]) == 2
    assert "ground-truth" in capsys.readouterr().err


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_any_command_with_a_word(monkeypatch, capsys, number):
    before = signal.getsignal(number)
    monkeypatch.setattr("fcos.score.run", lambda args: signal.raise_signal(number))
    assert cli.main(["score", "x"]) == 128 + number
    assert capsys.readouterr().err == "fcos: interrupted\n"
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("options", [[], ["--augment", "flip"]], ids=["plain", "augmented"])
def test_training_is_repeatable_with_images_in_memory_or_not(run_folder, capsys, options):
    histories = []
    for where in ("files", "memory"):
        out = run_folder / "-".join([where, *options])
        train = ["train", "--data", str(run_folder / "shapes"), "--out", str(out), *SMALL, *options]
        assert cli.main([*train, "--seed", "3", *(["--cache"] if where == "memory" else [])]) == 0
        assert ("images in memory: " in capsys.readouterr().out) == (where == "memory")
        histories.append(json.loads((out / "history.json").read_text()))
    assert histories[0] == histories[1]


def test_train_without_data_uses_the_generated_set(tmp_path, monkeypatch):
    written = []

    def write_shapes(folder, **counts):
        written.append(folder)
        raise ValueError("enough seen")

    monkeypatch.setattr("eecs598.data.write_shapes", write_shapes)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["train"]) == 2
    assert written == [tmp_path / "eecs598-fcos/shapes"]


def test_train_refuses_a_start_without_the_pretrained_weights(run_folder, monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(run_folder / "no-cache"))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    out = run_folder / "refused"
    train = ["train", "--data", str(run_folder / "shapes"), "--out", str(out)]
    assert cli.main([*train, "--workers", "0"]) == 2
    assert "--weights none" in capsys.readouterr().err
    assert not (out / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "--data", "/nowhere"], "nowhere"),
        (["eval", "/nowhere.pt", "--data", "/nowhere"], "is not a file"),
        (["score", "/nowhere"], "nowhere"),
        (["data", "shapes", "{}/run"], "run"),
    ],
)
def test_wrong_paths(run_folder, capsys, arguments, words):
    assert cli.main([a.format(run_folder) for a in arguments]) == 2
    assert words in capsys.readouterr().err


def test_eval_of_another_model(run_folder, capsys):
    checkpoint = torch.load(run_folder / "run/checkpoint.pt", weights_only=True)
    checkpoint["settings"]["model"]["fpn_channels"] = 16
    torch.save(checkpoint, run_folder / "other.pt")
    arguments = ["eval", str(run_folder / "other.pt"), "--data", str(run_folder / "shapes")]
    assert cli.main(arguments) == 2
    assert "another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--iters", "0"],
        ["train", "--lr", "-1"],
        ["train", "--stem", "64,x"],
        ["eval", "c.pt", "--data", "d", "--score-thresh", "1.5"],
        ["eval", "c.pt", "--data", "d", "--nms-thresh", "-0.1"],
        ["eval", "c.pt"],
        [],
    ],
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "expected" in capsys.readouterr().err or len(arguments) in (0, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(run_folder, capsys):
    arguments = ["eval", str(run_folder / "run/checkpoint.pt"), "--device", "cuda"]
    assert cli.main([*arguments, "--data", str(run_folder / "shapes")]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_a_download_that_fails_everywhere_is_a_sentence(tmp_path, monkeypatch, capsys):
    from eecs598.data import voc_download

    defaults = {**voc_download.download_voc2007.__kwdefaults__, "sources": ["no url"], "retries": 1}
    monkeypatch.setattr(voc_download.download_voc2007, "__kwdefaults__", defaults)
    assert cli.main(["data", "voc2007", str(tmp_path / "voc")]) == 2
    assert "could not download the VOC 2007 archive" in capsys.readouterr().err
