"""Loading of broken and incomplete submissions: every part that can be used is loaded."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision

import common
import eecs598.utils
from eecs598.grading import run_checks
from eecs598.grading.loading import load_submission, unload
from eecs598.grading.submission import PARTS, PUBLIC_NAMES

OURS = Path(common.__file__).parent


@pytest.fixture(autouse=True)
def no_traces():
    yield
    unload()


@pytest.fixture
def load(tmp_path):
    """Returns a function that writes the files of a submission and loads it."""

    def write_and_load(files: dict[str, str | bytes]):
        folder = tmp_path / "submission"
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_submission(folder, OURS)

    return write_and_load


def notes_with(loaded, *words: str) -> list[str]:
    return [note for note in loaded.notes if all(word in note for word in words)]


def files_replaced(loaded) -> dict[str, str]:
    return {name: why for name, why in loaded.submission.replaced.items() if "." not in name}


# --------------------------------------------------------------------------------------------
# Which files
# --------------------------------------------------------------------------------------------


def test_all_parts_of_a_whole_submission_are_theirs(load):
    loaded = load({f"{part}.py": f"mine = '{part}'" for part in PARTS})
    assert [getattr(loaded.submission, part).mine for part in PARTS] == list(PARTS)
    assert not set(loaded.submission.replaced) & set(PARTS)
    assert loaded.notes[0].startswith(
        "used: common.py and one_stage_detector.py and a4_helper.py of the submission; our "
    )
    assert sys.modules["common"] is common


def test_missing_parts_are_ours_and_fail_their_checks(load):
    loaded = load({"one_stage_detector.py": "from common import nms\nmine = nms"})
    assert files_replaced(loaded) == {"common": "missing", "a4_helper": "missing"}
    assert loaded.submission.common.__file__ == str(OURS / "common.py")
    assert loaded.submission.one_stage_detector.mine is loaded.submission.common.nms
    assert notes_with(loaded, "common.py is missing; found: one_stage_detector.py")
    (deltas, nms) = run_checks(loaded.submission, ["nms", "deltas"])
    assert nms.failed == ["common.py: expected nms, got nothing: missing"]
    assert deltas.failed == [
        "one_stage_detector.py: expected fcos_get_deltas_from_locations, got nothing: "
        "one_stage_detector.py does not define it"
    ]


def test_nothing_of_theirs_is_needed(load):
    loaded = load({"README.txt": "I could not do it"})
    assert set(files_replaced(loaded)) == set(PARTS)
    assert all(result.failed for result in run_checks(loaded.submission, ["head", "dataset"]))


def test_functions_that_a_file_lacks_are_ours_for_others(load):
    loaded = load(
        {
            "common.py": "def nms():\n    return 'mine'",
            "one_stage_detector.py": "from common import class_spec_nms, nms",
        }
    )
    detector, replaced = loaded.submission.one_stage_detector, loaded.submission.replaced
    assert detector.nms() == "mine"
    assert detector.class_spec_nms.__module__ == "ours.common"
    assert "common.class_spec_nms" in replaced and "common.nms" not in replaced
    assert notes_with(loaded, "our a4_helper.py (missing)", "and class_spec_nms and")
    (result,) = run_checks(loaded.submission, ["class_spec_nms"])
    assert result.failed == [
        "common.py: expected class_spec_nms, got nothing: common.py does not define it"
    ]


@pytest.mark.parametrize(
    "source",
    [
        "from ours.{0} import *",
        "import importlib\nglobals().update(vars(importlib.import_module('{0}')))",
        "import importlib\nglobals().update(vars(importlib.import_module('ours.{0}')))",
    ],
)
def test_ours_is_not_theirs(load, source):
    parts = ("common", "one_stage_detector")
    loaded = load({f"{part}.py": source.format(part) for part in parts})
    names = [f"{part}.{name}" for part in parts for name in PUBLIC_NAMES[part]]
    assert set(names) <= set(loaded.submission.replaced)


def test_what_a_star_import_of_ours_brings_is_ours(load):
    loaded = load({"common.py": "from one_stage_detector import *"})
    replaced = loaded.submission.replaced
    assert {f"common.{name}" for name in PUBLIC_NAMES["common"]} <= set(replaced)
    assert "it is ours" in replaced.values()


def test_ours_use_ours(load):
    # The reference detector needs functions of common.py that are not in the assignment.
    loaded = load({"common.py": "def nms(): pass", "a4_helper.py": "1 / 0"})
    assert set(files_replaced(loaded)) == {"one_stage_detector", "a4_helper"}
    assert loaded.submission.one_stage_detector.check_images is not None
    assert notes_with(loaded, "a4_helper.py, line 1: ZeroDivisionError", "can't be imported")


@pytest.mark.parametrize("prefix", ["A4/", "hand in/A4 final/", "A4\\", "a\\b\\"])
def test_files_in_a_folder_inside_are_found(load, prefix):
    loaded = load(
        {
            f"{prefix}common.py": "from eecs598.extra import value",
            f"{prefix}one_stage_detector.py": "",
            f"{prefix}eecs598/extra.py": "value = 7",
            "__MACOSX/A4/._common.py": "1 / 0",
            "old/common.py": "value = 0",
        }
    )
    assert loaded.submission.common.value == 7
    assert set(files_replaced(loaded)) == {"a4_helper"}


def test_a_link_out_of_the_folder_is_not_followed(load, tmp_path):
    (tmp_path / "secret.py").write_text("value = 1")
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission/common.py").symlink_to(tmp_path / "secret.py")
    assert load({}).submission.replaced["common"] == "missing"


def test_the_folders_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        load_submission(tmp_path / "nowhere", OURS)
    with pytest.raises(ValueError, match="has no common.py"):
        load_submission(tmp_path, tmp_path)


# --------------------------------------------------------------------------------------------
# Which import means what
# --------------------------------------------------------------------------------------------


def test_their_eecs598_is_theirs_and_the_graders_the_graders(load):
    loaded = load(
        {
            "common.py": "import eecs598.utils\nfrom eecs598 import utils\n"
            "from eecs598.utils import who\nimport eecs598.utils as short\n"
            "same = utils is eecs598.utils is short\n"
            "def later():\n    from eecs598.utils import who\n    return who()",
            "eecs598/__init__.py": "from . import utils\nfrom .utils import who",
            "eecs598/utils.py": "def who(): return 'theirs'",
        }
    )
    theirs = loaded.submission.common
    assert theirs.who() == theirs.later() == theirs.eecs598.who() == "theirs"
    assert theirs.same
    assert sys.modules["eecs598"] is eecs598
    assert hasattr(eecs598.utils, "tensor_to_image") and not hasattr(eecs598.utils, "who")
    assert "and eecs598 of the submission" in loaded.notes[0]


def test_what_of_their_eecs598_fails_is_ours(load):
    loaded = load(
        {
            "common.py": "from eecs598.utils import tensor_to_image\nfrom eecs598.grad import mine",
            "eecs598/utils.py": "import this_is_nowhere\nthis_is_nowhere.use()",
            "eecs598/grad.py": "mine = 1",
        }
    )
    assert loaded.submission.common.tensor_to_image is eecs598.utils.tensor_to_image
    assert loaded.submission.common.mine == 1
    assert notes_with(loaded, "eecs598/utils.py, line 2", "this_is_nowhere is not installed here")


def test_modules_of_theirs_hide_installed_ones_from_themselves_only(load):
    loaded = load(
        {
            "common.py": "import tqdm, helpers.boxes as b\nfrom .tqdm import name\nvalue = b.area",
            "tqdm.py": "name = 'theirs'",
            "helpers/boxes.py": "area = 3",
        }
    )
    assert loaded.submission.common.tqdm.name == loaded.submission.common.name == "theirs"
    assert loaded.submission.common.value == 3
    assert not hasattr(sys.modules["tqdm"], "name")


def test_parts_may_import_each_other_in_circles(load):
    loaded = load(
        {
            "common.py": "one = 1\nfrom one_stage_detector import two",
            "one_stage_detector.py": "import common\ntwo = common.one + 1",
        }
    )
    assert loaded.submission.common.two == 2


def test_a_star_import_of_our_helper_brings_along_what_it_imports(load):
    source = "from a4_helper import *\nfolder = os.sep, torch.zeros(1), hello_helper"
    assert load({"one_stage_detector.py": source}).submission.one_stage_detector.folder[0] == os.sep


def test_each_submission_is_imported_afresh(load):
    first = load({"common.py": "import eecs598.state as s", "eecs598/state.py": "calls = []"})
    first.submission.common.s.calls.append(1)
    assert load({}).submission.common.s.calls == []


# --------------------------------------------------------------------------------------------
# Broken files
# --------------------------------------------------------------------------------------------

GOOD = "def before():\n    return 1\n\n{}\n\ndef after():\n    return 2\n"


@pytest.mark.parametrize(
    ("broken", "lost", "line"),
    [
        ("def nms(boxes:\n    return boxes", "def nms", 4),
        ("def nms(boxes):\n    # TODO", "def nms", 7),
        ("class FCOS:\n    def forward(self)\n        return 1", "def forward", 5),
        ("class FCOS\n    def forward(self):\n        return 1", "class FCOS", 4),
        ("@staticmethod\n@torch.no_grad()\ndef nms(b):\n    return b +", "def nms", 7),
        ("def nms(b):\n    if b:\n      x = 1\n     y = 2\n    return b", "def nms", 7),
        ("def nms(b):\n    return (b[0]\n", "def nms", 5),
        ("keep = [1, 2", "lines", 4),
        ("return 5", "", 4),
    ],
)
def test_what_a_syntax_error_is_in_is_left_out(load, broken, lost, line):
    loaded = load({"common.py": GOOD.format(broken)})
    module = loaded.submission.common
    assert module.before() == 1 and module.after() == 2
    assert "common" not in loaded.submission.replaced
    assert loaded.submission.replaced["common.nms"] == "common.py does not define it"
    assert notes_with(loaded, f"common.py, line {line}", "Error", lost)


METHODS = """
class Network:
    @property
    def size(self):
        return 1

    @staticmethod
    def broken():
{}

    def other(self):
        return 3
"""


@pytest.mark.parametrize(
    "body",
    ["        if 1:\n\treturn 2", "        return (2", "        return 2 +", "        x = = 2"],
)
def test_a_broken_method_costs_itself_alone(load, body):
    network = load({"common.py": METHODS.format(body)}).submission.common.Network
    assert network().size == 1 and network().other() == 3
    assert not hasattr(network, "broken")


def test_a_class_of_broken_methods_is_empty(load):
    source = "class Empty:\n    def f(self)\n        pass\n    def g(self)\n        pass\nlast = 1"
    loaded = load({"common.py": source})
    assert loaded.submission.common.last == 1
    assert not {"f", "g"} & set(dir(loaded.submission.common.Empty))
    assert len(notes_with(loaded, "can't be judged")) == 2


def test_of_an_unresolved_merge_the_first_side_is_judged(load):
    merge = "def f():\n<<<<<<< HEAD\n    return 1\n=======\n    return 2\n>>>>>>> theirs\n"
    loaded = load({"common.py": merge + "def g():\n    return 3"})
    assert (loaded.submission.common.f(), loaded.submission.common.g()) == (1, 3)
    assert notes_with(loaded, "common.py, line 2: an unresolved merge")


@pytest.mark.parametrize("prefix", ["", "A4/"])
def test_imports_may_name_the_folder(load, tmp_path, prefix):
    name = "A4" if prefix else "submission"  # what the fixture calls its folder
    source = f"from {name}.common import nms\nfrom {name}.a4_helper import *\nmine = nms"
    loaded = load(
        {
            f"{prefix}common.py": "def nms():\n    return 5",
            f"{prefix}a4_helper.py": "value = 6",
            f"{prefix}one_stage_detector.py": source,
        }
    )
    assert loaded.submission.one_stage_detector.mine() == 5
    assert loaded.submission.one_stage_detector.value == 6


def test_lines_for_notebooks_are_left_out(load):
    magic = (
        "%matplotlib inline\n!pip install wget\ndef f():\n    %time\n    return 3 \\\n        % 2"
    )
    loaded = load({"common.py": GOOD.format(magic)})
    assert loaded.submission.common.f() == 1
    assert loaded.submission.common.after() == 2
    assert len(notes_with(loaded, "is for notebooks")) == 3


@pytest.mark.parametrize("content", [b"\x00\x01\x02" * 50, b"'''\n" * 3 + b"\x89PNG \x00"])
def test_a_file_that_is_no_python_is_replaced(load, content):
    loaded = load({"common.py": content})
    assert loaded.submission.replaced["common"] == "theirs can't be imported"
    assert notes_with(loaded, "common.py can't be imported")


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("cp1252"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: b"# -*- coding: latin-1 -*-\n" + text.encode("latin-1"),
    ],
    ids=["BOM", "UTF-16", "Windows-1252", "CRLF", "CR", "declared"],
)
def test_any_editor_will_do(load, encode):
    loaded = load({"common.py": encode("# Größe\nname = 'é'\nvalue = 1\n")})
    assert loaded.submission.common.name == "é" and loaded.submission.common.value == 1


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("weights = open('C:\\\\Users\\\\me\\\\fcos.pt')", "FileNotFoundError"),
        ("from common import there_is_no_such_thing", "ImportError"),
        ("answer = input('Your name: ')", "Error"),
    ],
)
def test_what_fails_at_import_does_not_stop_the_rest(load, statement, error):
    source = GOOD.format(statement)
    loaded = load({"common.py": "", "one_stage_detector.py": source, "a4_helper.py": source})
    module = loaded.submission.one_stage_detector
    assert module.before() == 1 and module.after() == 2
    assert notes_with(loaded, "one_stage_detector.py, line 4", error)
    # The handed out module is replaced as a whole.
    assert files_replaced(loaded) == {"a4_helper": "theirs can't be imported"}


def test_the_place_of_an_error_is_in_the_sentence(load):
    loaded = load(
        {"common.py": "def nms(b, s, t):\n    return helper(b)\ndef helper(b):\n    b.no"}
    )
    (result,) = run_checks(loaded.submission, ["nms"])
    assert all("(common.py, line 4)" in sentence for sentence in result.failed)


# --------------------------------------------------------------------------------------------
# Packages, weights and GPUs that are missing here
# --------------------------------------------------------------------------------------------


def test_absent_packages_fail_when_used(load):
    loaded = load(
        {
            "common.py": "import absent_cv\nimport absent.deep.down as down\n"
            "from google.colab import drive\nfrom absent import *\nimport torch._six\n"
            "def use():\n    return absent_cv.imread('x')\n"
            "def mount():\n    drive.mount('/content')\n"
            "def later():\n    import absent_too.mask\n    return absent_too.mask.area([])\n"
        }
    )
    module = loaded.submission.common
    for function in (module.use, module.mount, module.later):
        with pytest.raises(ModuleNotFoundError, match="was used, and .* is not installed here"):
            function()
    assert module.down.anything is not None
    assert module.torch is torch
    assert notes_with(loaded, "common.py, line 1: absent_cv is not installed here")
    assert files_replaced(loaded).keys() == {"one_stage_detector", "a4_helper"}


def test_a_file_that_looks_for_a_package_finds_it_missing(load):
    guarded = "try:\n    import absent_cv\n    found = True\nexcept ImportError:\n    found = False"
    loaded = load({"common.py": guarded})
    assert loaded.submission.common.found is False
    assert not notes_with(loaded, "absent_cv")


WEIGHTS = """
import torch, torchvision
from torch.hub import load_state_dict_from_url
from torch.utils.model_zoo import load_url

URL = "https://download.pytorch.org/models/resnet18-5c106cde.pth"

def old():
    return torchvision.models.resnet18(pretrained=True)

def new():
    return torchvision.models.resnet18(weights=torchvision.models.ResNet18_Weights.IMAGENET1K_V1)

def by_hand():
    net = torchvision.models.resnet18()
    net.load_state_dict(load_state_dict_from_url(URL, progress=False))
    return net

def zoo():
    net = torchvision.models.resnet18()
    state = load_url(URL)
    del state["fc.weight"], state["fc.bias"]
    assert net.load_state_dict(state, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    return net

def hub():
    return torch.hub.load("pytorch/vision:v0.6.0", "resnet18", pretrained=True)

def unknown():
    return load_state_dict_from_url("https://example.org/fcos-12345678.pth")
"""


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pretrained_weights_are_fixed_and_random(load, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    original = torch.hub.load_state_dict_from_url
    module = load({"common.py": WEIGHTS}).submission.common
    first = module.old().conv1.weight
    assert first.std() > 0
    for network in (module.new(), module.by_hand(), module.zoo()):
        assert torch.equal(network.conv1.weight, first)
    assert isinstance(module.hub(), torchvision.models.ResNet)
    with pytest.raises(ModuleNotFoundError, match="no network here"):
        module.unknown()
    unload()
    assert torch.hub.load_state_dict_from_url is original


CUDA = """
import torch
from torch import nn
DEVICE = "cuda"
table = torch.arange(4.0).cuda()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2).to(torch.device("cuda:0"))

    def forward(self, x):
        torch.cuda.synchronize()
        y = self.layer(x.to("cuda") + table + torch.zeros(4, device="cuda"))
        return y.type(torch.cuda.FloatTensor), torch.ones_like(y, device=DEVICE).pin_memory()
"""


def test_a_gpu_that_is_taken_for_granted_is_the_cpu(load):
    loaded = load({"common.py": CUDA})
    first, second = loaded.submission.common.Net().cuda()(torch.ones(4))
    assert first.device.type == second.device.type == "cpu"
    assert len(notes_with(loaded, "common.py, line 4: asks for a GPU")) == 1
    unload()


def test_asking_whether_there_is_a_gpu_is_right(load):
    source = (
        "import torch\nDEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'\n"
        "def f(x):\n    if x.is_cuda:\n        x = x.cuda()\n    return x\n"
    )
    loaded = load({"common.py": source})
    assert loaded.submission.common.DEVICE == "cpu"
    assert not notes_with(loaded, "GPU")


def test_dropped_names_are_back_for_whoever_uses_them(load):
    source = (
        "import numpy as np\nimport collections\nfrom collections import Mapping\n"
        "from PIL import Image\nvalues = np.zeros(2, dtype=np.float), Image.ANTIALIAS\n"
        "ok = issubclass(dict, Mapping) and issubclass(list, collections.Sequence)"
    )
    loaded = load({"common.py": source})
    assert loaded.submission.common.ok
    assert loaded.submission.common.values[0].dtype == float
    assert notes_with(loaded, "common.py, line 5: numpy.float is gone from newer versions")
    unload()
    assert not hasattr(sys.modules["collections"], "Mapping")


# --------------------------------------------------------------------------------------------
# Undoing changes
# --------------------------------------------------------------------------------------------


def test_importing_leaves_no_traces(load, tmp_path, capsys, recwarn):
    source = (
        "import os, sys, torch, warnings, random\n"
        "print('hello'); print('oh', file=sys.stderr); warnings.warn('old')\n"
        "torch.meshgrid(torch.arange(2), torch.arange(2))\n"
        "torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False)\n"
        "os.chdir('/'); sys.path.append('/content'); random.random(); torch.manual_seed(3)\n"
    )
    before = os.getcwd(), list(sys.path), torch.get_rng_state().tolist(), list(sys.meta_path)
    load({f"{part}.py": source for part in PARTS})
    unload()
    assert before == (
        os.getcwd(),
        list(sys.path),
        torch.get_rng_state().tolist(),
        list(sys.meta_path),
    )
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert capsys.readouterr() == ("", "") and list(recwarn) == []
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(
        ["submission", *(f"{part}.py" for part in PARTS)]
    )
    assert not [name for name in sys.modules if name.split(".")[0] in ("submission", "ours")]


def test_a_zip_of_this_repository(tmp_path):
    # As students pack it: in a folder, and with more files than necessary.
    archive = tmp_path / "A4.zip"
    with zipfile.ZipFile(archive, "w") as pack:
        for path in (*(OURS / f"{part}.py" for part in PARTS), *(OURS / "eecs598").rglob("*.py")):
            pack.write(path, f"A4/{path.relative_to(OURS)}")
    with zipfile.ZipFile(archive) as pack:
        pack.extractall(tmp_path / "in")
    loaded = load_submission(tmp_path / "in", OURS)
    assert files_replaced(loaded) == {}
    assert len(loaded.notes) == 1
    assert loaded.submission.common.nms.__code__.co_filename.startswith(str(tmp_path))
    results = run_checks(loaded.submission, ["hello", "deltas", "dataset", "evaluation_export"])
    assert [result.failed for result in results] == [[], [], [], []]
