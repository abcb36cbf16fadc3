"""The live host: one process for all tests, where $SDWEBUI_DIR names a checkout of A1111 1.10."""

import os
from pathlib import Path

import pytest

SMALL = {"width": 192, "height": 192, "steps": 3}


@pytest.fixture(scope="session")
def a1111(tmp_path_factory):
    """A running A1111; skipped without $SDWEBUI_DIR ($SDWEBUI_PYTHON: its interpreter, else the checkout's venv)."""
    if "SDWEBUI_DIR" not in os.environ:
        pytest.skip("SDWEBUI_DIR is not set: name a checkout of AUTOMATIC1111 1.10 to run it with the extension")
    from live_a1111 import LiveA1111

    folder = Path(os.environ["SDWEBUI_DIR"])
    python = Path(os.environ.get("SDWEBUI_PYTHON", folder / "venv" / "bin" / "python"))
    host = LiveA1111(tmp_path_factory.mktemp("a1111"), folder, python)
    yield host
    host.stop()


@pytest.fixture(scope="session")
def plain(a1111):
    """The usual picture, drawn before Hires Lab was ever on."""
    return a1111.txt2img().picture


@pytest.fixture(scope="session")
def small(a1111):
    """A small picture, drawn before Hires Lab was ever on."""
    return a1111.txt2img(**SMALL).picture


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """After each test nothing of ours is on the network, and a plain picture is the same to the bit."""
    if "SDWEBUI_DIR" not in os.environ or "a1111" not in request.fixturenames:
        yield
        return
    a1111, before = request.getfixturevalue("a1111"), request.getfixturevalue("small")
    request.getfixturevalue("plain")
    a1111.probe()
    yield
    left = a1111.probe()
    assert (left["hooks"], left["overrides"], left["callbacks"]) == (0, [], [])
    assert (a1111.txt2img(**SMALL).picture == before).all()


@pytest.fixture
def host(monkeypatch):
    """The stand-ins, under the names that the adapter imports."""
    import stand_ins

    return stand_ins.put(monkeypatch)
