"""The notebook: what is stored in the file, how it chooses its settings, and one whole run."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import sys
import types
from pathlib import Path

import nbformat
import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

from eecs598.data.shapes import CLASSES, write_shapes
from eecs598.data.voc import VOC2007_CLASSES, class_names
from eecs598.training.settings import RECIPES

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "one_stage_detector.ipynb"
PROJECT_MODULES = ("a4_helper", "common", "eecs598", "one_stage_detector")
NUM_TRAIN, NUM_VAL = 64, 12


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


def test_every_cell_parses_and_imports_what_exists():
    imported = 0
    for cell in code_cells():
        for node in ast.walk(ast.parse(python_of(cell), filename=cell.id)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith(PROJECT_MODULES):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{cell.id}: {node.module}.{alias.name}"
                    imported += 1
    assert imported > 20


def test_takes_the_steps_of_the_assignment_in_order():
    source = "\n".join(cell.source for cell in code_cells())
    steps = (
        "hello_one_stage_detector()",
        "torch.cuda.get_device_name()",
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
        "max_iters=OVERFIT_ITERS",
        "max_iters=TRAIN_ITERS",
        "torch.save(",
        "torchvision.ops.nms(",
        "torch.load(",
        "output_dir=EXPORT_DIR",
        "score_folder(",
        "plot_average_precision(",
    )
    positions = [source.find(step) for step in steps]
    assert -1 not in positions, steps[positions.index(-1)]
    assert positions == sorted(positions)


# --------------------------------------------------------------------------------------------
# The settings cell
# --------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Run the settings cell in an empty folder; gives a function that returns its variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    for name in [name for name in os.environ if name.startswith("FCOS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (cell,) = (cell for cell in code_cells() if cell.id == "settings")

    def run(cuda: bool = False, **replacements: str) -> dict:
        source = cell.source.replace("/content/", f"{tmp_path.as_posix()}/content/")
        for name, value in replacements.items():
            source, count = re.subn(rf"(?m)^{name} = [^\n]*?(?=  #)", f"{name} = {value}", source)
            assert count == 1, name
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        variables: dict = {}
        exec(compile(source, "settings", "exec"), variables)
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


def test_settings_without_data_or_gpu(settings, tmp_path, capsys):
    chosen = settings()
    assert chosen["DATA"] == "shapes" and chosen["SCHEDULE"] == "quick"
    assert chosen["CLASSES"] == list(CLASSES) and not chosen["DOWNLOAD"]
    assert chosen["DATA_DIR"] == tmp_path / "cache" / "eecs598-fcos" / "shapes"
    assert chosen["WEIGHTS"] is None  # no network needed
    assert chosen["OUTPUT_DIR"] == Path("runs/notebook")
    assert "random weights" in capsys.readouterr().out


def test_settings_with_a_gpu_keep_the_generated_set_quick(settings):
    chosen = settings(cuda=True)
    assert chosen["DEVICE"].type == "cuda"
    assert (chosen["DATA"], chosen["SCHEDULE"]) == ("shapes", "quick")


@pytest.mark.parametrize("marker", ["VOCdevkit", "voc07_train.json"])
def test_settings_with_voc_beside_the_notebook(settings, tmp_path, marker):
    (tmp_path / marker).mkdir() if marker == "VOCdevkit" else (tmp_path / marker).touch()
    chosen = settings(cuda=True)
    assert chosen["DATA"] == "voc2007" and chosen["DATA_DIR"] == tmp_path
    assert not chosen["DOWNLOAD"] and chosen["NUM_CLASSES"] == len(VOC2007_CLASSES)
    # The assignment's numbers.
    assert chosen["SCHEDULE"] == "full"
    assert (chosen["OVERFIT_ITERS"], chosen["OVERFIT_LR"]) == (500, 5e-3)
    assert (chosen["TRAIN_ITERS"], chosen["IMAGE_SIZE"]) == (9000, 224)
    assert chosen["RECIPE"] == RECIPES["handout"] and chosen["WARMUP"] == 0
    assert chosen["SOLVER"]["optimizer"] == "sgd" and chosen["SOLVER"]["max_grad_norm"] is None
    assert (chosen["FPN_CHANNELS"], chosen["STEM_CHANNELS"]) == (128, (128, 128))
    assert chosen["WEIGHTS"] == "DEFAULT"


def test_settings_take_one_variable_for_voc(settings, tmp_path):
    chosen = settings(cuda=True, DATA='"voc2007"')
    assert chosen["DOWNLOAD"] and chosen["DATA_DIR"] == tmp_path
    assert chosen["SCHEDULE"] == "full" and chosen["CLASSES"] == list(VOC2007_CLASSES)


def test_settings_take_a_folder(settings, tmp_path):
    folder = write_shapes(tmp_path / "data", num_train=4, num_val=2)
    chosen = settings(DATA=repr(str(folder)))
    assert chosen["DATA_DIR"] == folder and chosen["GENERATED"]
    assert 1 <= chosen["NUM_CLASSES"] <= len(CLASSES) and chosen["WEIGHTS"] is None

    (folder / "shapes.json").unlink()  # now as good as anybody's photographs
    chosen = settings(DATA=repr(str(folder)))
    assert not chosen["GENERATED"] and chosen["WEIGHTS"] == "DEFAULT"
    with pytest.raises(ValueError, match="SCHEDULE is 'slow'; expected"):
        settings(DATA=repr(str(folder)), SCHEDULE='"slow"')


def test_settings_in_colab_find_the_project(settings, tmp_path, monkeypatch):
    mounted = install_fake_colab(monkeypatch)
    project = make_project(tmp_path / "content" / "drive" / "MyDrive" / "EECS598" / "A4")
    chosen = settings(cuda=True)
    assert len(mounted) == 1 and mounted[0].endswith("/content/drive")
    assert chosen["PROJECT_DIR"] == chosen["OUTPUT_DIR"] == project
    assert not chosen["EXPORT_DIR"].is_relative_to(project)
    assert str(project) in sys.path
    # A download goes to the machine's own disk; data that is in Drive already is used there.
    assert chosen["DOWNLOAD"] and chosen["DATA_DIR"] == tmp_path / "content" / "voc2007"
    (project / "VOCdevkit").mkdir()
    chosen = settings(cuda=True)
    assert not chosen["DOWNLOAD"] and chosen["DATA_DIR"] == project


def test_settings_in_colab_say_what_to_do(settings, tmp_path, monkeypatch):
    install_fake_colab(monkeypatch)
    my_drive = tmp_path / "content" / "drive" / "MyDrive"
    my_drive.mkdir(parents=True)
    with pytest.raises(ValueError, match="found 0 times.*GOOGLE_DRIVE_PATH_AFTER_MYDRIVE"):
        settings()
    first, _ = make_project(my_drive / "A4"), make_project(my_drive / "old" / "A4")
    with pytest.raises(ValueError, match="found 2 times.*GOOGLE_DRIVE_PATH_AFTER_MYDRIVE"):
        settings()
    assert settings(GOOGLE_DRIVE_PATH_AFTER_MYDRIVE='"A4"')["PROJECT_DIR"] == first


def test_settings_in_colab_take_a_clone(settings, tmp_path, monkeypatch):
    mounted = install_fake_colab(monkeypatch)
    (tmp_path / "one_stage_detector.py").touch()
    assert settings()["PROJECT_DIR"] == tmp_path and mounted == []


# --------------------------------------------------------------------------------------------
# One whole run
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
        # Threads that wait for each other crawl where something else holds one of two cores.
        patch.setenv("OMP_NUM_THREADS", "1")
        client = NotebookClient(
            notebook,
            timeout=900,  # seconds a cell, so that a hang ends
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
    assert 0 <= metrics["mAP"] <= 1 and set(metrics["AP"]) <= set(CLASSES)
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
