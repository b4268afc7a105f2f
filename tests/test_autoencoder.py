"""autoencoder: what is loaded, what it computes, and what is none."""

import json
import shutil
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from erd_fast.autoencoder import Autoencoder, open_autoencoder
from erd_fast.data import LatentStore
from erd_fast.errors import ConfigError, DataError
from erd_fast.prepare.encode import encode
from support.encoding import COUNT, OPTIONS, content, encode_given


@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_threads_changes_no_byte_and_stays(given, whole, tmp_path, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        encode_given(given, tmp_path / "s", workers=threads)
        assert torch.get_num_threads() == threads
        assert ThreadPoolExecutor(1).submit(torch.get_num_threads).result() == threads
    finally:
        torch.set_num_threads(before)
    assert content(tmp_path / "s") == whole


def test_shift_and_a_pipelines_folder_are_understood(given, tmp_path):
    shutil.copytree(given / "vae", tmp_path / "pipeline" / "vae")
    config = tmp_path / "pipeline" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift_factor": 0.25, "scaling_factor": 2.0}))
    store = encode(given / "images", tmp_path / "s", str(tmp_path / "pipeline"), OPTIONS)
    assert (store.manifest.scale, store.manifest.shift) == ((2.0,) * 4, (0.25,) * 4)
    assert store.manifest.vae.startswith("pipeline@")


def test_means_and_stds_of_channels_are_understood(given, tmp_path):
    vae = _altered(given, tmp_path / "vae", latents_mean=[1, 2, 3, 0], latents_std=[1, 2, 4, 8], scaling_factor=0.5)
    manifest = encode(given / "images", tmp_path / "s", vae, OPTIONS).manifest
    assert (manifest.scale, manifest.shift) == ((0.5, 0.25, 0.125, 0.0625), (1.0, 2.0, 3.0, 0.0))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precision_changes_digits_and_no_name(given, tmp_path, precision):
    store, known = encode_given(given, tmp_path / "s", precision=precision), LatentStore(given / "whole")
    means, expected = (of.gather(torch.arange(COUNT)).float()[:, :4] for of in (store, known))
    # 18 convolutions, 14 norms, 13 activations and 4 linear layers, each rounded to bfloat16 by half a step, 2^-9.
    assert (means - expected).abs().max() <= 49 * 2**-9 * expected.abs().max()
    assert torch.equal(means, expected) == (precision == "fp32")  # tf32 on a CPU, too
    assert store.manifest.vae == known.manifest.vae


def _altered(given: Path, folder: Path, **config) -> str:
    shutil.copytree(given / "vae", folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return str(folder)


def _not_finite(given: Path, folder: Path) -> str:
    name = _altered(given, folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({key: torch.full_like(value, torch.nan) for key, value in weights.items()}, file)
    return name


def _with_some_weights(given: Path, folder: Path) -> str:
    name = _altered(given, folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = {key: value for key, value in load_file(file).items() if not key.startswith("encoder.conv_in")}
    save_file(weights, file, {"format": "pt"})
    return name


def _without_weights(given: Path, folder: Path) -> str:
    name = _altered(given, folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    return name


VAES = {
    "absent": (
        lambda given, folder: str(folder),
        "vae must be a folder that exists or an ID of the Hugging Face hub .*, got ",
    ),
    "empty": (
        lambda given, folder: folder.mkdir() or str(folder),
        "vae must be the folder of an AutoencoderKL or of a pipeline, got .*, which has no config.json",
    ),
    "another model": (
        lambda given, folder: _altered(given, folder, _class_name="UNet2DModel"),
        "config.json: _class_name: given 'UNet2DModel', allowed 'AutoencoderKL'",
    ),
    "grey": (lambda given, folder: _altered(given, folder, in_channels=1), "in_channels: given 1, allowed 3"),
    "no weights": (_without_weights, "vae cannot be loaded from safetensors: Error no file named"),
    "some weights": (_with_some_weights, "its file lacks 2 weights, first encoder.conv_in.bias; allowed all"),
    "other sizes": (
        lambda given, folder: _altered(given, folder, latent_channels=16),
        "vae cannot be loaded from safetensors: .*size mismatch",
    ),
    "not finite": (
        _not_finite,
        "images: the latents of china/0000.jpg are not finite in float16, made in tf32; allowed finite numbers",
    ),
}


@pytest.mark.parametrize("fault", VAES)
def test_an_autoencoder_that_is_none_is_named(given, tmp_path, fault):
    make, message = VAES[fault]
    vae = make(given, tmp_path / "vae")
    with pytest.raises(DataError, match=message):
        encode(given / "images", tmp_path / "store", vae, OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["vae"])  # nothing to go on from


def test_a_name_that_the_hub_does_not_know_is_named(given, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing is no folder, and the .* hub does not give it: Cannot reach"):
        encode(given / "images", tmp_path / "store", "nobody/nothing", OPTIONS)


def test_without_diffusers_the_extra_is_named(given, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"diffusers is not installed: pip install 'erd-fast\[vae\]'"):
        encode_given(given, tmp_path / "store")


def test_encoding_and_decoding_leave_process_wide_switches_as_they_were(given, monkeypatch):
    cudnn = torch.backends.cudnn
    torch.set_float32_matmul_precision("medium")
    monkeypatch.setattr(cudnn, "allow_tf32", False)
    within: list[tuple[str, bool]] = []
    try:
        autoencoder = Autoencoder(str(given / "vae"), torch.device("cpu"))
        for module in (autoencoder._vae.encoder, autoencoder._vae.decoder):
            module.register_forward_hook(
                lambda *_: within.append((torch.get_float32_matmul_precision(), cudnn.deterministic))
            )
        autoencoder.decode(autoencoder.encode(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).mean)
        assert within == [("highest", True)] * 4  # two images, each way
        assert (torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic) == ("medium", False, False)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_range_of_pixels_is_that_which_was_encoded(given):
    """Latents of pixels from 0 to 1 decode to 0 to 1: half as bright as they would be from -1 to 1, and 127.5 more."""
    autoencoder, latents = Autoencoder(str(given / "vae"), torch.device("cpu")), torch.randn(2, 4, 4, 4)
    usual, half = autoencoder.decode(latents).int(), autoencoder.decode(latents, (0.0, 1.0)).int()
    assert usual.shape == (2, 32, 32, 3) and len(usual.unique()) > 20
    inside = half > 0
    assert inside.any() and (usual[inside] - (half[inside] + 255) / 2).abs().max() <= 1
    assert (usual[~inside] <= 128).all()


def test_the_weights_return_from_another_device_also_after_an_error(given, monkeypatch):
    autoencoder, moves = Autoencoder(str(given / "vae"), torch.device("cpu")), []
    monkeypatch.setattr(autoencoder, "_move", moves.append)
    with autoencoder.on(torch.device("meta")):
        assert moves == [torch.device("meta")]
    with pytest.raises(torch.OutOfMemoryError), autoencoder.on(torch.device("meta")):
        raise torch.OutOfMemoryError
    assert moves == [torch.device("meta"), torch.device("cpu")] * 2


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(given, tmp_path, monkeypatch):
    """A hub on this machine that has the autoencoder as tiny/vae, and an empty cache; gives the requests that come."""
    requests: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            file = given / "vae" / self.path.rpartition("/")[2]
            if self.path.startswith("/api/models/tiny/vae"):
                self._send(200, json.dumps({"id": "tiny/vae", "sha": COMMIT}).encode())
            elif self.path.startswith("/tiny/vae/") and file.is_file():
                self._send(200, file.read_bytes())
            else:
                self._send(404, b"")

        def do_HEAD(self):
            self.do_GET()

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{zlib.crc32(content)}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        yield requests
        server.shutdown()


def _open(given: str, source: str = "", vae: str = "") -> Autoencoder:
    return open_autoencoder(given, vae=vae, vae_source=source, channels=4)


def test_the_hub_is_asked_on_request_alone(given, hub):
    for name in ("tiny/vae", "tiny/v ae"):
        with pytest.raises(DataError, match=f"^vae: {name} is not in the local Hugging Face cache .*fetches it"):
            _open("", source=name)
    assert hub == []
    downloaded = _open("tiny/vae")
    assert downloaded.source == "tiny/vae" and downloaded.name.startswith("tiny/vae@")
    assert any("diffusion_pytorch_model.safetensors" in path for path in hub)
    hub.clear()
    cached = _open("", source="tiny/vae", vae=downloaded.name)
    assert cached.name == downloaded.name and cached.source == "tiny/vae" and hub == []
    assert cached.name.endswith(_open(str(given / "vae")).name.partition("@")[2])


def test_a_part_of_an_autoencoder_in_the_cache_is_none(hub, tmp_path):
    _open("tiny/vae")
    for file in (tmp_path / "hub").rglob("*.safetensors"):
        file.unlink()
    hub.clear()
    with pytest.raises(DataError, match=r"^vae: tiny/vae cannot be loaded from safetensors: Error no file named"):
        _open("", source="tiny/vae")
    assert hub == []
