"""Every architecture trains, resumes bit for bit and samples, with labels and without."""

import numpy as np
import pytest
import torch

from erd_fast.data import write_store
from erd_fast.errors import ConfigError
from erd_fast.training.loop import train
from erd_fast.training.sample_run import sample_run
from support.run_folders import events, same_weights, terminate

pytestmark = pytest.mark.slow

# Small versions, and the tiny U-Net as it is: its widths are multiples of 32 already.
ARCHITECTURES = {
    "DiT-tiny/2": {"hidden_size": 32, "depth": 2, "num_heads": 1},
    "U-ViT-tiny": {"hidden_size": 32, "depth": 2, "num_heads": 1},
    "ADM-tiny": {"hidden_size": None, "depth": None, "num_heads": 2},
}


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Unconditional pixels (3, 8, 8) that are mirrored in training."""
    path, generator = tmp_path_factory.mktemp("faces") / "store", torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    write_store(path, [(pixels, torch.zeros(40, dtype=torch.int64))], kind="pixels", num_classes=0, flip="mirror")
    return str(path)


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trains_resumes_and_samples(tmp_path, tiny, training_lines, at_step, faces, name, conditional):
    config = tiny(
        train={"steps": 4, "label_drop": 0.1 if conditional else 0.0},
        model={"name": name, **ARCHITECTURES[name]},
        data={"path": "digits" if conditional else faces},
    )
    train(config, tmp_path / "whole")
    losses = [line["loss"] for line in training_lines(tmp_path / "whole")]
    assert len(losses) == 4 and np.isfinite(losses).all()
    at_step(2, terminate)
    with pytest.raises(SystemExit):
        train(config, tmp_path / "parts")
    train(config, tmp_path / "parts")
    assert events(tmp_path / "parts") == [("resume", 2), ("end", 4)]
    assert training_lines(tmp_path / "parts") == training_lines(tmp_path / "whole")
    assert same_weights(tmp_path / "parts", tmp_path / "whole", 4)
    samples, labels = sample_run(tmp_path / "whole", 3, steps=2, cfg_scale=1.5 if conditional else 1.0)
    assert samples.shape == ((3, 8, 8, 1) if conditional else (3, 8, 8, 3)) and samples.dtype == np.uint8
    assert len(set(labels.tolist())) == 3 if conditional else labels is None


def test_sizes_that_an_architecture_does_not_have_are_refused(tmp_path, tiny):
    with pytest.raises(ConfigError, match="unknown argument of ADM-tiny 'hidden_size'"):
        train(tiny(model={"name": "ADM-tiny"}), tmp_path / "run")
    with pytest.raises(ConfigError, match="UViT: depth: given 1, allowed even numbers"):
        train(tiny(model={"name": "U-ViT-tiny"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
