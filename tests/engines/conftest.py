"""What the engine's tests share: the bundled model, loaded once, and tiny checkpoints written once."""

import pytest
from original_layout import original_checkpoint
from safetensors.torch import save_file

from lib_hires.engines import checkpoint
from lib_hires.engines.standalone import Engine


@pytest.fixture(scope="session")
def components():
    return checkpoint.load()


@pytest.fixture(scope="session")
def engine(components):
    return Engine(components)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(family, in_channels=4) -> (path of a single file, its tensors, the modules behind them)."""
    folder, made = tmp_path_factory.mktemp("tiny"), {}

    def make(family, in_channels=4):
        key = f"{family}-{in_channels}"
        if key not in made:
            tensors, parts = original_checkpoint(family, in_channels)
            save_file(tensors, folder / f"{key}.safetensors", {"modelspec.resolution": "64x64"})
            made[key] = folder / f"{key}.safetensors", tensors, parts
        return made[key]

    return make
