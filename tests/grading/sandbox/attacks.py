"""Submissions that attack the grader or the machine, and how to see that they did no harm."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from eecs598.grading.sandbox import isolation

REPOSITORY = Path(__file__).resolve().parents[3]
PARTS = ("common", "one_stage_detector", "a4_helper")

# Printed right before the attack, so that tests know that it was tried.
BEGIN = "import os as _os\n_os.write(1, b'attack: ')\n"


class Attack(NamedTuple):
    """Code of a common.py.

    ``in_nms`` becomes the body of a wrong ``nms``; ``at_import`` runs at the end of the file. Where
    only the latter is given, ``nms`` is right. ``honest`` is what ``nms`` returns without the
    attack, where that is wrong.
    """

    at_import: str = ""
    in_nms: str = ""
    says: str = ""  # part of what is printed
    fails: str | None = None  # part of why the check of nms fails
    honest: str = ""


DENIED = """
def denied(action, *arguments):
    try:
        _os.write(1, f"got {action(*arguments)!r:.200} ".encode())
    except BaseException as error:
        _os.write(1, f"{type(error).__name__} ".encode())
"""

# An attack takes time, so it is made in one probe only, that without boxes.
ONCE = """if len(boxes):
        return right_nms(boxes, scores, iou_threshold)
    """

ATTACKS = {
    "reads outside its folder": Attack(
        at_import=DENIED
        + """
for path in ("SECRET", "OUTSIDE/submissions/00/common.py", "/proc/self/environ",
             f"/proc/{_os.getppid()}/environ"):
    denied(lambda: open(path).read())
denied(_os.listdir, "OUTSIDE")
denied(_os.listdir, _os.path.expanduser("~root"))
_os.symlink("SECRET", "link")
denied(lambda: open("link").read())
""",
        says="PermissionError " * 7,
    ),
    "writes outside its folder": Attack(
        at_import=DENIED
        + """
import shutil
from pathlib import Path
here = Path(__file__).parent
denied(lambda: (here / "common.py").write_text(""))
denied(lambda: (here / "new.py").write_text(""))
denied(lambda: Path("OUTSIDE/new").write_text(""))
denied(_os.truncate, "SECRET", 0)
denied(_os.remove, "SECRET")
denied(_os.rename, "SECRET", "moved")
denied(_os.link, "SECRET", "linked")
denied(lambda: Path("/tmp/fcos-new").write_text(""))
_os.chmod("SECRET", 0o777)
_os.utime("SECRET", (0, 0))
denied(lambda: Path("mine").write_text("allowed"))
""",
        says="OSError PermissionError got 7",
    ),
    "deletes its folder": Attack(
        at_import="import shutil; shutil.rmtree(_os.path.dirname(__file__), ignore_errors=True)"
    ),
    "opens a socket": Attack(
        at_import=DENIED
        + """
import socket
denied(socket.create_connection, ("127.0.0.1", PORT), 1)
denied(socket.socket, socket.AF_UNIX)
denied(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
""",
        says="PermissionError " * 3,
    ),
    "forks without end": Attack(
        in_nms=ONCE + "while True:\n        _os.fork()", fails="Operation not permitted"
    ),
    "starts programs": Attack(
        at_import=DENIED
        + """
import subprocess
denied(subprocess.run, ["touch", "OUTSIDE/new"])
denied(_os.execv, "/bin/touch", ["touch", "OUTSIDE/new"])
denied(_os.posix_spawn, "/bin/touch", ["touch", "OUTSIDE/new"], {})
_os.system("touch OUTSIDE/new")
""",
        says="PermissionError " * 3,
    ),
    "starts threads without end": Attack(
        in_nms=ONCE
        + """import threading
    threading.stack_size(2**15)
    while True:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()""",
        fails="",
    ),
    "fills memory": Attack(
        in_nms=ONCE + "kept = []\n    while True:\n        kept.append(torch.ones(2**22))",
        fails="allocate",
    ),
    "fills shared memory": Attack(
        in_nms=ONCE
        + """import mmap
    kept = []
    while True:
        kept.append(mmap.mmap(-1, 2**24))
        kept[-1].write(bytes(2**24))""",
        fails="Cannot allocate memory",
    ),
    "fills the disk": Attack(
        in_nms=ONCE
        + """for n in range(10**6):
        with open(f"{n}", "wb") as file:
            file.write(bytes(2**20))""",
        fails="wrote more than 20 MB",
    ),
    "fills the disk with empty files": Attack(
        in_nms=ONCE + "for n in range(10**6):\n        open(f'{n}', 'wb').close()",
        fails="wrote more than 20 MB or 5000 files",
    ),
    "writes a large file": Attack(
        in_nms=ONCE + "with open('large', 'wb') as file:\n        file.truncate(2**40)",
        fails="File too large",
    ),
    "prints gigabytes": Attack(
        at_import="for _ in range(2**12):\n    _os.write(1, b'x' * 2**18)\n",
        says="bytes ...",
    ),
    "loops at import": Attack(at_import="while True:\n    pass"),
    "loops in nms": Attack(
        in_nms=ONCE + "while True:\n        pass", fails="still running after 3 s"
    ),
    "loops and can't be interrupted": Attack(
        in_nms=ONCE
        + """while True:
        try:
            while True:
                pass
        except BaseException:
            pass""",
        fails="still running after 6 s, in nms (common.py, line ",
    ),
    "ends its process with a faked result": Attack(
        in_nms="""print('{"done": "nms", "problem": null, "found": [], "tampered": []}', flush=True)
    _os._exit(0)""",
        fails="ended its process with exit status 0",
    ),
    "exits at import": Attack(at_import="raise SystemExit(0)"),
    "kills the grader": Attack(
        in_nms="""import signal
    for target in (_os.getppid(), -1, 0):
        try:
            _os.kill(target, signal.SIGKILL)
        except PermissionError:
            _os.write(1, b"denied ")""",
        says="denied " * 3,
        fails="",
    ),
    "writes results to all that is open": Attack(
        in_nms="""lines = [{"check": "nms", "label": "no boxes", "problem": None}, {"done": "nms"}]
    for file in range(3, 100):
        try:
            for line in lines:
                _os.write(file, f"{json.dumps(line)}\\n".encode())
        except OSError:
            pass
    _os._exit(0)""",
        fails="wrote to the grader's pipe; its results do not count",
    ),
    "replaces torch.isclose": Attack(
        at_import="torch.isclose = lambda a, *_, **__: torch.ones_like(a).bool()",
        in_nms="return torch.zeros(3)",
        honest="torch.zeros(3)",
        fails="expected",
    ),
    "replaces parts of the grader": Attack(
        at_import="""
import sys
for name, module in list(sys.modules.items()):
    if name.startswith("eecs598.grading"):
        for function in ("expect", "expect_close"):
            if hasattr(module, function):
                setattr(module, function, lambda *_, **__: None)
result = sys.modules["eecs598.grading.result"]
result.CheckResult.ok = True
result.CheckResult.failed = []
result.ProbeResult = lambda label, problem: (label, None)
""",
        in_nms="return torch.zeros(3)",
        honest="torch.zeros(3)",
        fails="expected",
    ),
    "replaces code of the grader": Attack(
        in_nms="""import sys
    result = sys.modules["eecs598.grading.result"]
    result.expect.__code__ = (lambda condition, sentence: None).__code__
    return torch.zeros(3)""",
        honest="torch.zeros(3)",
        fails="replaced what judges it: the code of eecs598.grading.result.expect",
    ),
    "replaces torchvision's nms": Attack(
        in_nms="""import sys
    sys.modules["eecs598.grading.checks.nms"].torchvision_nms = nms
    return torch.zeros(1, dtype=torch.int64)""",
        honest="torch.zeros(1, dtype=torch.int64)",
        fails="replaced what judges it: eecs598.grading.checks.nms.torchvision_nms",
    ),
    "replaces json.dumps and puts it back": Attack(
        in_nms="""global calls, dumps
    calls, dumps = globals().get("calls", 0) + 1, globals().get("dumps", json.dumps)
    json.dumps = lambda message, **_: dumps({**message, "problem": None})
    if boxes.shape == (3, 4) and abs(float(boxes[0, 0]) - 0.3) < 1e-3:  # the last question
        json.dumps = dumps
    return torch.zeros(1)""",
        honest="torch.zeros(1)",
        fails="",
    ),
    "replaces torch.isclose and puts it back": Attack(
        in_nms="""global isclose
    isclose = globals().get("isclose", torch.isclose)
    torch.isclose = lambda a, *_, **__: torch.ones_like(a).bool()
    if boxes.shape == (3, 4) and abs(float(boxes[0, 0]) - 0.3) < 1e-3:  # the last question
        torch.isclose = isclose
    return torch.zeros(3)""",
        honest="torch.zeros(3)",
        fails="replaced what judges it: torch.isclose",
    ),
    "intercepts PyTorch": Attack(
        in_nms="""from torch.overrides import TorchFunctionMode
    class Lies(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            got = func(*args, **(kwargs or {}))
            return torch.ones_like(got) if func is torch.isclose else got
    Lies().__enter__()
    return torch.zeros(3)""",
        honest="torch.zeros(3)",
        fails="replaced what judges it: expect_close, torch.isclose",
    ),
    "returns tensors that lie": Attack(
        at_import="""
class Equal(tuple):
    __eq__ = __ge__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = tuple.__hash__
class Agrees(torch.Tensor):
    shape = property(lambda self: Equal((3,)))
    detach = cpu = double = lambda self: self
    tolist = lambda self: Equal()
    __len__ = lambda self: 1
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.isclose:
            return torch.ones(1, dtype=torch.bool)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
""",
        in_nms="return torch.zeros(3).as_subclass(Agrees)",
        fails="expected",
        honest="torch.zeros(3)",
    ),
    "returns a tensor with methods of its own": Attack(
        in_nms="""got = torch.zeros(3)
    right = right_nms(boxes, scores, iou_threshold)
    got.tolist, got.detach, got.sort = right.tolist, right.detach, right.sort
    return got""",
        fails="expected",
        honest="torch.zeros(3)",
    ),
    "returns an array that lies": Attack(
        at_import="""
class Agrees:
    __eq__ = lambda self, other: True
    __lt__ = lambda self, other: True
""",
        in_nms="""import numpy
    return numpy.array([Agrees()] * 3, dtype=object)""",
        fails="expected",
        honest="[object()] * 3",
    ),
    "returns an object whose class lies": Attack(
        at_import="""
class Lies(type):
    __hash__ = lambda cls: hash(torch.Tensor)
    __eq__ = lambda cls, other: True
class Agrees(metaclass=Lies):
    tolist = sort = detach = lambda self: self
    __eq__ = lambda self, other: True
    __len__ = lambda self: 1
""",
        in_nms="return Agrees()",
        fails="",
        honest="object()",
    ),
    "returns an object that pretends to be a tensor": Attack(
        at_import="""
class Pretends:
    __class__ = property(lambda self: torch.Tensor)
    __eq__ = lambda self, other: True
    __len__ = lambda self: 1
    __getattr__ = lambda self, name: lambda *_: self
    dtype = torch.int64
""",
        in_nms="return Pretends()",
        fails="",
        honest="object()",
    ),
    "makes its arguments lie": Attack(
        at_import="""
class Agrees(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return torch.ones(1, dtype=torch.bool)
""",
        in_nms="""boxes.zero_()
    boxes.__class__ = scores.__class__ = Agrees
    return torch.zeros(3)""",
        fails="boxes after the call",
        honest="torch.zeros(3 + 0 * boxes.zero_().dim())",
    ),
    "rewrites its results": Attack(
        in_nms="""import gc
    for thing in gc.get_objects() if len(boxes) == 0 else ():
        if type(thing).__name__ == "CheckResult":
            for probe in thing.probes:
                object.__setattr__(probe, "problem", None)
    return torch.zeros(3)""",
        honest="torch.zeros(3)",
        fails="expected",
    ),
}


def write_submission(folder: Path, attack: Attack, **names: object) -> Path:
    """This repository's files with an attack in common.py."""
    folder.mkdir(parents=True)
    for part in PARTS:
        source = (REPOSITORY / f"{part}.py").read_text(encoding="utf-8")
        if part == "common":
            source += f"\n\nimport json, time\n{BEGIN}"
            if attack.in_nms:
                source += "\n\nright_nms = nms\n"
                source += f"\n\ndef nms(boxes, scores, iou_threshold=0.5):\n    {attack.in_nms}\n"
            source += f"\n\n{attack.at_import}\n"
        for name, value in names.items():
            source = source.replace(name, str(value))
        (folder / f"{part}.py").write_text(source, encoding="utf-8")
    return folder


@contextlib.contextmanager
def attacked(outside: Path, attacks: Iterable[Attack]) -> Iterator[list[Path]]:
    """Write submissions with attacks, and expect that grading them in the block does no harm.

    Args:
        outside: folder with the submissions and a secret file; nothing in it may change.
        attacks: one per submission.

    Yields:
        The folders of the submissions.
    """
    secret = outside / "secret.txt"
    secret.write_text("the secret")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        temporary_folder() as temporary,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("GRADER_TOKEN", "the secret")
        names = {"SECRET": secret, "OUTSIDE": outside, "PORT": server.getsockname()[1]}
        folders = [
            write_submission(outside / "submissions" / f"{n:02}", attack, **names)
            for n, attack in enumerate(attacks)
        ]
        before, processes = contents(outside), isolation.children()
        yield folders
        assert contents(outside) == before
        assert isolation.children() == processes
        assert list(temporary.iterdir()) == [] and working_folders(temporary) == []
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


def contents(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Text, mode and time of all files below a folder."""
    return {
        str(path.relative_to(folder)): (
            path.read_bytes(),
            path.stat().st_mode,
            path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Use a new folder for temporary files of this process and those that it starts.

    So other programs that grade on this machine do not disturb a test.
    """
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        os.chmod(folder, 0o755)  # the sandbox may run as another user
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def working_folders(parent: Path) -> list[str]:
    """Working directories of all processes that run below a folder."""
    folders = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            folders.append(os.readlink(process / "cwd"))
    return [folder for folder in folders if folder.startswith(str(parent))]
