"""The notebook: what is stored in the file, how it finds the project, and runs of all cells."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

from eecs598.data import SHAPES_CLASSES, class_names, write_shapes
from tests.detectors import make_fcos

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "one_stage_detector.ipynb"
PROJECT_MODULES = ("a4_helper", "common", "eecs598", "one_stage_detector")
NUM_TRAIN, NUM_VAL = 64, 12
MAX_LINES = 40


def read_notebook() -> nbformat.NotebookNode:
    return nbformat.read(PATH, as_version=4)


def python_of(cell: nbformat.NotebookNode) -> str:
    """The source of a code cell with its magics turned into calls."""
    return TransformerManager().transform_cell(cell.source)


def code_cells() -> list[nbformat.NotebookNode]:
    return [cell for cell in read_notebook().cells if cell.cell_type == "code"]


# --------------------------------------------------------------------------------------------
# The file
# --------------------------------------------------------------------------------------------


def test_is_stored_clean():
    notebook = read_notebook()
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in code_cells():
        assert cell.outputs == [] and cell.execution_count is None, cell.id
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert notebook.metadata.language_info == {"name": "python"}  # no version of anybody's Python


def test_cells_are_short():
    lines = {cell.id: len(cell.source.splitlines()) for cell in read_notebook().cells}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}
    assert lines["settings"] <= 12


def test_every_cell_parses_and_imports_what_exists():
    imported = 0
    for cell in code_cells():
        for node in ast.walk(ast.parse(python_of(cell), filename=cell.id)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith(PROJECT_MODULES):
                module = importlib.import_module(node.module)
                # What a folder of the library offers, its __init__ names; nobody reaches past it.
                assert node.module.count(".") <= 1, f"{cell.id}: {node.module}"
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{cell.id}: {node.module}.{alias.name}"
                    imported += 1
    assert imported > 20


def test_takes_the_steps_of_the_assignment_in_order():
    source = "\n".join(cell.source for cell in code_cells())
    steps = (
        "drive.mount(",
        "sys.path.append(",
        "hello_common()",
        "hello_one_stage_detector()",
        "hello_helper()",
        "one_stage_detector.py last edited on",
        "torch.cuda.get_device_name()",
        "NUM_CLASSES = ",
        "VOC2007DetectionTiny(",
        "DataLoader(",
        "next(iter(train_loader))",
        "detection_visualizer(",
        "DetectorBackboneWithFPN(",
        "backbone.fpn_params",
        "FCOSPredictionNetwork(",
        "get_fpn_location_coords(",
        "fcos_match_locations_to_gt(",
        "fcos_apply_deltas_to_locations(",
        "fcos_make_centerness_targets(",
        "sigmoid_focal_loss(",
        "F.l1_loss(",
        "F.binary_cross_entropy_with_logits(",
        "max_iters=settings.overfit_iters",
        "max_iters=settings.max_iters",
        "torch.save(",
        "torchvision.ops.nms(",
        "torch.load(",
        "score_thresh=0.5",
        "output_dir=settings.export_dir",
        "score_folder(",
        "plot_average_precision(",
        "Image(filename=",
    )
    positions = [source.find(step) for step in steps]
    assert -1 not in positions, steps[positions.index(-1)]
    assert positions == sorted(positions)


# --------------------------------------------------------------------------------------------
# The cells that find the project and decide on the settings
# --------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that runs these cells in an empty folder and returns their variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    for name in [name for name in os.environ if name.startswith("FCOS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = "\n".join(cell.source for cell in code_cells() if cell.id in ("project", "settings"))
    source = source.replace("/content/", f"{tmp_path.as_posix()}/content/")

    def run(**replacements: str) -> dict:
        edited = source
        for name, value in replacements.items():
            edited, count = re.subn(rf"(?m)^{name} = [^\n]*?(?=  #)", f"{name} = {value}", edited)
            assert count == 1, name
        variables: dict = {}
        exec(compile(edited, "settings", "exec"), variables)
        return variables

    return run


def install_fake_colab(monkeypatch) -> list[str]:
    """Pretend to be Colab; the list gets the mount points."""
    mounted: list[str] = []
    drive = types.SimpleNamespace(mount=mounted.append)
    google, colab = types.ModuleType("google"), types.ModuleType("google.colab")
    colab.drive, google.colab = drive, colab
    monkeypatch.setitem(sys.modules, "google", google)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    return mounted


def make_project(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "one_stage_detector.py").touch()
    return folder


def test_starts_without_data_or_gpu(start, tmp_path, capsys):
    (tmp_path / "common.py").touch()
    variables = start()
    assert variables["PROJECT_DIR"] == tmp_path and not variables["IN_COLAB"]
    assert variables["settings"].data == "shapes"
    assert variables["settings"].weights is None  # no network needed
    assert Path("runs/notebook").is_dir()
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path}: common.py\n") and "random weights" in printed


def test_takes_the_edited_settings(start, tmp_path):
    (tmp_path / "VOCdevkit").mkdir()
    assert start()["settings"].data_dir == tmp_path
    settings = start(DATA='"shapes"', SCHEDULE='"full"')["settings"]
    assert (settings.data, settings.schedule, settings.max_iters) == ("shapes", "full", 9000)


def test_finds_the_project_in_colab(start, tmp_path, monkeypatch):
    mounted = install_fake_colab(monkeypatch)
    project = make_project(tmp_path / "content" / "drive" / "MyDrive" / "EECS598" / "A4")
    variables = start()
    settings = variables["settings"]
    assert len(mounted) == 1 and mounted[0].endswith("/content/drive")
    assert variables["PROJECT_DIR"] == settings.output_dir == project
    assert not settings.export_dir.is_relative_to(project)
    assert str(project) in sys.path
    # A download goes to the machine's own disk; data that is in Drive already is used there.
    assert settings.download and settings.data_dir == Path("/content/voc2007")
    (project / "VOCdevkit").mkdir()
    settings = start()["settings"]
    assert not settings.download and settings.data_dir == project


def test_says_in_colab_what_to_do(start, tmp_path, monkeypatch):
    install_fake_colab(monkeypatch)
    my_drive = tmp_path / "content" / "drive" / "MyDrive"
    my_drive.mkdir(parents=True)
    with pytest.raises(ValueError, match="found 0 times.*GOOGLE_DRIVE_PATH_AFTER_MYDRIVE"):
        start()
    first, _ = make_project(my_drive / "A4"), make_project(my_drive / "old" / "A4")
    with pytest.raises(ValueError, match="found 2 times.*GOOGLE_DRIVE_PATH_AFTER_MYDRIVE"):
        start()
    assert start(GOOGLE_DRIVE_PATH_AFTER_MYDRIVE='"A4"')["PROJECT_DIR"] == first


def test_takes_a_clone_in_colab(start, tmp_path, monkeypatch):
    mounted = install_fake_colab(monkeypatch)
    make_project(tmp_path / "clone")
    monkeypatch.chdir(tmp_path / "clone")
    assert start()["PROJECT_DIR"] == tmp_path / "clone" and mounted == []


def test_installs_wget_in_colab_where_it_is_missing(start, tmp_path, monkeypatch):
    install_fake_colab(monkeypatch)
    make_project(tmp_path / "content" / "drive" / "MyDrive" / "A4")
    find_spec, commands = importlib.util.find_spec, []
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wget" else find_spec(name)
    )
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    start()
    (command,) = commands
    assert command[:3] == [sys.executable, "-m", "pip"] and command[-1] == "wget"


def test_says_that_the_project_is_not_here(start, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="has no one_stage_detector.py.*start Jupyter there"):
        start()


def test_the_last_cell_offers_the_demo(monkeypatch):
    cell = code_cells()[-1]
    launched = []
    monkeypatch.setattr(
        "eecs598.deploy.launch_demo", lambda *args, **options: launched.append((args, options))
    )
    detector = make_fcos(2)
    variables = {
        "detector": detector,
        "val_dataset": types.SimpleNamespace(idx_to_class={0: "cube", 1: "dice", -1: ""}),
        "NUM_CLASSES": 2,
        "IMAGE_SHAPE": (64, 64),
        "DEVICE": "cpu",
    }
    exec(cell.source, variables)
    assert launched == []
    exec(cell.source.replace("SHOW_DEMO = False", "SHOW_DEMO = True"), variables)
    ((predict, _, names), options) = launched[0]
    assert names == ["cube", "dice"] and options["image_size"] == 64
    assert len(predict(torch.rand(1, 3, 64, 64))) == 1  # the detector is in evaluation mode


# --------------------------------------------------------------------------------------------
# Runs of all cells
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The notebook after a run on a small set, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("notebook")
    data = write_shapes(folder / "data", num_train=NUM_TRAIN, num_val=NUM_VAL)
    notebook = read_notebook()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FCOS_DATA", str(data))
        patch.setenv("FCOS_SCHEDULE", "quick")
        patch.setenv("FCOS_TRAIN_ITERS", "30")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("MPLBACKEND", "agg")  # of the test run; the notebook chooses its own
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        client = NotebookClient(
            notebook,
            timeout=900,  # seconds per cell, so that a hang ends
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute()  # raises CellExecutionError with the traceback of a failing cell
    return notebook, folder


def outputs_of(notebook: nbformat.NotebookNode, cell_id: str) -> tuple[str, int]:
    """What a cell printed, and the number of pictures below it."""
    (cell,) = (cell for cell in notebook.cells if cell.id == cell_id)
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    pictures = sum("image/png" in output.get("data", {}) for output in cell.outputs)
    return text, pictures


def test_runs_top_to_bottom(run):
    notebook, _ = run
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", cell.id
            # A forgotten semicolon shows as the repr of axes or of a tensor.
            assert output.output_type != "execute_result", cell.id
            assert "Warning" not in output.get("text", ""), f"{cell.id}: {output.text}"


@pytest.mark.parametrize(
    ("cell_id", "pictures"),
    [
        ("look", 3),
        ("points", 3),
        ("order", 1),
        ("match", 1),
        ("overfit", 1),
        ("train", 1),
        ("inference", 10),
        ("evaluation", 1),
    ],
)
def test_shows_every_picture_once(run, cell_id, pictures):
    assert outputs_of(run[0], cell_id)[1] == pictures


def test_prints_the_checks(run):
    notebook, _ = run
    assert outputs_of(notebook, "locations")[0].count("rel error: 0.0") == 3
    assert "reconstructed boxes: 0.0" in outputs_of(notebook, "deltas")[0]
    assert "difference 0.0" in outputs_of(notebook, "nms")[0]
    assert "[Iter 30]" in outputs_of(notebook, "train")[0]


def test_leaves_results(run):
    notebook, folder = run
    results = folder / "runs" / "notebook"
    metrics = json.loads((results / "metrics.json").read_text())
    assert 0 <= metrics["mAP"] <= 1 and set(metrics["AP"]) <= set(SHAPES_CLASSES)
    assert f"mAP@0.5: {100 * metrics['mAP']:.2f} %" in outputs_of(notebook, "summary")[0]
    assert (results / "ap.png").stat().st_size > 1000
    assert "Precision and recall" in (results / "report.html").read_text(encoding="utf-8")

    state = torch.load(results / "fcos_detector.pt", weights_only=True)
    assert len(state["pred_net.pred_cls.bias"]) == len(class_names(folder / "data"))

    names = [f"val_{index:05d}.txt" for index in range(NUM_VAL)]
    for kind in ("detection-results", "ground-truth"):
        assert sorted(os.listdir(results / "mAP" / "input" / kind)) == names
    # Nothing lies about outside the results.
    assert sorted(os.listdir(folder)) == ["data", "ipython", "runs"]


def test_runs_as_a_script_without_jupyter(tmp_path):
    """All code cells in one namespace, without their magics, where IPython is not installed."""
    data = write_shapes(tmp_path / "data", num_train=16, num_val=2)
    cells = [
        (cell.id, re.sub(r"(?m)^%.*$", "", cell.source))  # as a script has no magics
        for cell in code_cells()
    ]
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "sys.modules['IPython'] = None  # an import of it fails\n"
        "namespace = {}\n"
        f"for name, source in {cells!r}:\n"
        "    exec(compile(source, name, 'exec'), namespace)\n"
    )
    environment = os.environ | {
        "FCOS_DATA": str(data),
        "FCOS_SCHEDULE": "quick",
        "FCOS_TRAIN_ITERS": "2",
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "agg",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "mAP@0.5:" in done.stdout and "Warning" not in done.stderr, done.stderr
    results = tmp_path / "runs" / "notebook"
    for name in ("fcos_detector.pt", "metrics.json", "ap.png", "report.html"):
        assert (results / name).stat().st_size > 0
