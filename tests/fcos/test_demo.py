"""`fcos demo`: the command around the page for photos."""

from __future__ import annotations

import socket
import urllib.request

import pytest

from eecs598.deploy import write_weights
from eecs598.training.settings import ModelSettings, Settings
from fcos import cli
from tests.detectors import make_fcos

pytest.importorskip("gradio")

SETTINGS = Settings(model=ModelSettings(weights="none", fpn_channels=8, stem_channels=(8,)))


@pytest.fixture
def weights(tmp_path) -> str:
    path = tmp_path / "tiny.safetensors"
    model = make_fcos(2).state_dict()
    write_weights(path, model, settings=SETTINGS.to_dict(), classes=["cube", "dice"])
    return str(path)


def test_serves_until_it_is_interrupted(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pages = []

    def interrupted() -> None:
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith("PyTorch")  # few photos are not worth an export
        url = line.split()[-4]
        pages.append(urllib.request.urlopen(url, timeout=20).read().decode())
        raise KeyboardInterrupt

    monkeypatch.setattr("fcos.demo.wait_for_signal", interrupted)
    assert cli.main(["demo", weights, "--device", "cpu"]) == 130
    assert "FCOS: tiny" in pages[0] and "cube, dice" in pages[0]
    assert "cat.jpg" in pages[0]  # the examples of the repository


def test_what_ends_with_status_2(weights, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, words in (
            ([weights, "--port", port], port),
            ([weights, "--examples", str(tmp_path / "none.jpg")], "no such file"),
            ([str(tmp_path / "none.pt")], "none.pt is not a file"),
        ):
            assert cli.main(["demo", *arguments]) == 2
            assert words in capsys.readouterr().err.splitlines()[-1]
