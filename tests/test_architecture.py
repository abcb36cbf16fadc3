"""The house keeps its shape: who imports whom, what needs no other library, and what every part has."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("lib_hires/**/*.py"), *ROOT.glob("scripts/**/*.py")])
STOREYS = (
    {"config"},
    {"schedule", "randomness", "patches", "memory"},
    {"plan"},
    {"unet", "canvas", "guidance", "vae", "upscalers"},
    {"stages"},
    {"methods"},
    {"request"},
    {"__init__"},
    {"engines", "hosts"},
    {"webui", "__main__", "cli"},
    {"scripts"},
)
"""Each part may import what stands before it, and itself."""
HOST_PACKAGES = {"modules", "modules_forge", "backend", "ldm_patched", "gradio"}
SKIPPED = {
    ".git",
    ".venv",
    ".hypothesis",
    ".pytest_cache",
    ".ruff_cache",
    "__pycache__",
    "out",
    "build",
    "node_modules",
}
TEXTS = {".py", ".md", ".toml", ".txt", ".js", ".json", ".yaml", ".yml", ".ini", ".css", ".sh", ".html", ""}


def named(path):
    return str(path.relative_to(ROOT))


def part_of(path):
    """config/errors.py -> config, cli_queue.py -> cli, scripts/hires_lab.py -> scripts."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = parts[1] if parts[0] == "lib_hires" else parts[0]
    return "cli" if name.startswith("cli") else name


def storey(part):
    found = [index for index, parts in enumerate(STOREYS) if part in parts]
    assert found, f"tests/test_architecture.py does not know lib_hires/{part}: give it its storey"
    return found[0]


def imported_by(path):
    """Absolute names of everything that a file imports, wherever in it: `lib_hires.config.errors`, `torch.nn`, ..."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *(node.module.split(".") if node.module else ())])
            if stem == "lib_hires" or not node.module:
                yield from (f"{stem}.{alias.name}" for alias in node.names)
            else:
                yield stem


def parts_imported_by(path):
    """The parts of lib_hires that a file imports; names of the package itself (`lib_hires.Session`) count as __init__."""
    for name in imported_by(path):
        pieces = name.split(".")
        if pieces[0] == "lib_hires":
            part = pieces[1] if len(pieces) > 1 else "__init__"
            is_module = (ROOT / "lib_hires" / part).is_dir() or (ROOT / "lib_hires" / f"{part}.py").is_file()
            yield ("cli" if part.startswith("cli") else part) if is_module else "__init__"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_every_file_imports_only_what_stands_below_it(path):
    own = part_of(path)
    wrong = {part for part in parts_imported_by(path) if part != own and storey(part) >= storey(own)}
    assert wrong - ({"__main__", "cli"} if own in ("__main__", "cli") else set()) == set()


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_hosts_and_their_interface_are_imported_only_where_they_are_known(path):
    allowed = {"hosts": HOST_PACKAGES - {"gradio"}, "webui": HOST_PACKAGES, "scripts": HOST_PACKAGES}.get(
        part_of(path), set()
    )
    assert {name.split(".")[0] for name in imported_by(path)} & HOST_PACKAGES <= allowed


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_diffusers_is_imported_only_by_the_standalone_engine_and_for_sdnext(path):
    may = part_of(path) == "engines" or named(path) == "lib_hires/hosts/sdnext.py"
    assert may or not {name.split(".")[0] for name in imported_by(path)} & {"diffusers", "transformers"}


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if part_of(path) in ("config", "plan", "schedule", "randomness")], ids=named
)
def test_settings_and_plans_need_no_torch(path):
    assert not {name.split(".")[0] for name in imported_by(path)} & {"torch", "numpy", "einops"}


def test_the_checks_above_see_wrong_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for part in ("config", "unet", "engines"):
        (tmp_path / "lib_hires" / part).mkdir(parents=True)
    path = tmp_path / "lib_hires" / "config" / "bad.py"
    path.write_text(
        "def f():\n    from ..unet.session import Session\n    from .. import engines\n    from lib_hires import unet\n    import gradio as gr"
    )
    assert set(parts_imported_by(path)) == {"unet", "engines"}
    assert "gradio" in set(imported_by(path))


# What needs no other library ------------------------------------------------------------------------------------------

ALONE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"diffusers", "transformers", "gradio", "safetensors", "cv2", "PIL.Image"}:
            raise ImportError(f"{name} was asked for")
sys.meta_path.insert(0, Absent())
import lib_hires
from lib_hires import DeepShrink, HiDiffusion, Request, Session
lib_hires.methods.methods()
import torch
from ldm.modules.diffusionmodules.openaimodel import UNetModel
unet = UNetModel(image_size=16, in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1,
                 attention_resolutions=[1, 2, 4], num_heads=1, context_dim=8, use_spatial_transformer=True)
with Session(unet, [HiDiffusion()], Request.from_dict({"method": "none", "native_size": 64}).common) as session, torch.no_grad():
    unet(torch.randn(2, 4, 16, 16), torch.tensor([900.0, 900.0]), context=torch.randn(2, 3, 8))
print(dict(session.ran))
"""


def test_a_session_runs_without_diffusers_transformers_and_gradio():
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "{'stride 4 at 2, windows': 1}"


def test_settings_can_be_read_without_torch():
    code = (
        "import sys, lib_hires, lib_hires.config; print(any(n in sys.modules for n in ('torch', 'diffusers', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr[-2000:]


# What every part has --------------------------------------------------------------------------------------------------


def undocumented(path):
    """Public functions, classes and methods without a docstring; the hooks that a host names need none in scripts/."""

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not child.name.startswith(
                "_"
            ):
                if not ast.get_docstring(child):
                    yield prefix + child.name
                if isinstance(child, ast.ClassDef) and part_of(path) != "scripts":
                    yield from visit(child, f"{prefix}{child.name}.")

    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [*([] if ast.get_docstring(tree) else ["the module itself"]), *visit(tree, "")]


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_every_module_and_every_public_function_and_class_says_what_it_is(path):
    assert undocumented(path) == []


def texts():
    for path in sorted(ROOT.rglob("*")):
        if (
            path.is_file()
            and path.suffix in TEXTS
            and not SKIPPED & {*path.relative_to(ROOT).parts}
            and ".egg-info" not in str(path)
        ):
            yield path


def test_nothing_names_a_place_outside_the_project():
    outside = [
        "/".join(pieces)
        for pieces in (("", "work", ""), ("", "srv", ""), ("..", "shared"), ("", "home", ""), ("", "root", ""))
    ]
    found = [
        f"{named(path)}: {place}"
        for path in texts()
        for place in outside
        if place in path.read_text(encoding="utf-8", errors="replace")
    ]
    assert found == []


def test_no_file_of_the_library_is_longer_than_a_few_screens():
    assert [named(path) for path in SOURCES if len(path.read_text(encoding="utf-8").splitlines()) > 500] == []
