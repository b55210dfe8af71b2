"""ONNX graphs give what the networks give, for other numbers and sizes of pictures than those of the export."""

import numpy as np
import pytest
import torch

from histossl.core.errors import FileFormatError, SettingsError
from histossl.encoders.joint import Joint
from histossl.encoders.patch_kmeans import PatchKMeans
from histossl.encoders.resnet import ResNet18
from histossl.encoders.tile_encoder import load_encoder, save_encoder
from histossl.nuclei.network import NucleusNet
from histossl.nuclei.patch_contrast import Choice, PatchContrast
from histossl.nuclei.patch_sampling import ConfidenceNet, PatchContrastSettings
from histossl.nuclei.self_training import SelfTraining
from histossl.nuclei.settings import SelfTrainingSettings
from histossl.study import onnx_models
from histossl.study.export_model import export_model

runtime = pytest.importorskip("onnxruntime", reason="needs histossl[onnx]")
pytest.importorskip("onnxscript", reason="needs histossl[onnx]")


def words(network: PatchKMeans) -> PatchKMeans:
    generator = torch.Generator().manual_seed(1)
    for buffer in (network.filters, network.shifts, network.centres):
        buffer.normal_(generator=generator)
    network.filters -= network.filters.mean((3, 4), keepdim=True)
    network.filters /= 7
    network.floors.fill_(0.1)
    return network


def joint() -> Joint:
    network = Joint(8, 2)
    words(network.words)
    network.scale.fill_(0.1)
    network.stain.copy_(torch.linalg.qr(torch.randn(network.dim, 2, generator=torch.Generator().manual_seed(2)))[0])
    return network.eval()


def run(path, name, x):
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {name: x})[0]


def pictures(rng, count, height, width):
    """Coarse spots, as tissue has, so that words have something to tell."""
    coarse = rng.random((count, 3, height // 4, width // 4), np.float32)
    return np.clip(
        np.kron(coarse, np.ones((4, 4), np.float32)) + 0.05 * rng.standard_normal((count, 3, height, width)), 0, 1
    ).astype(np.float32)


def half_minute(make):
    return pytest.param(make, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "make", [half_minute(joint), half_minute(lambda: words(PatchKMeans(8)).eval()), lambda: ResNet18(3).eval()]
)
def test_a_tile_encoder_gives_the_same(make, tmp_path):
    save_encoder(make(), tmp_path / "study" / "tile-encoder", {"tile": {"px": 32, "mpp": 1.0}})
    export_model(tmp_path / "study", "tile-encoder", tmp_path / "out", onnx=True)
    encoder = load_encoder(tmp_path / "out", precision="float32")  # the folder is still an encoder
    for count in (1, 7):
        x = pictures(np.random.default_rng(count), count, 32, 32)
        found = run(tmp_path / "out" / "model.onnx", "tiles", x)
        assert found.std() > 0.01
        np.testing.assert_allclose(found, encoder(torch.from_numpy(x)).numpy(), atol=1e-4)
    assert "model.onnx" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("turns", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_nuclei_model_gives_the_same(turns, tmp_path):
    model = SelfTraining(SelfTrainingSettings(turns=turns, precision="float32"), NucleusNet(seed=3), "cpu")
    model.save(tmp_path / "model")
    export_model(tmp_path / "model", "nuclei", tmp_path / "out", onnx=True)
    x = np.random.default_rng(0).random((1, 3, 48, 80), np.float32)
    found = run(tmp_path / "out" / "model.onnx", "density", x)
    assert found.shape == (1, 2, 48, 80)
    np.testing.assert_allclose(found, model.confidence_torch(torch.from_numpy(x)).numpy(), atol=1e-4)


@pytest.mark.slow
def test_patch_contrast_gives_the_same(tmp_path):
    settings = PatchContrastSettings()
    model = PatchContrast(settings, ConfidenceNet(settings.channels, seed=3), Choice(1, True), "cpu")
    model.save(tmp_path / "model")
    export_model(tmp_path / "model", "nuclei", tmp_path / "out", onnx=True)
    x = np.random.default_rng(0).random((3, 3, 40, 64), np.float32)
    with torch.inference_mode():
        wanted = model.network(settings.lowest + (1 - settings.lowest) * torch.from_numpy(x))
    np.testing.assert_allclose(run(tmp_path / "out" / "model.onnx", "image", x), wanted.numpy(), atol=1e-4)


@pytest.mark.slow
def test_a_graph_that_differs_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    save_encoder(ResNet18(3).eval(), tmp_path / "study" / "tile-encoder", {"tile": {"px": 32, "mpp": 1.0}})
    monkeypatch.setattr(onnx_models, "TOLERANCE", -1.0)
    with pytest.raises(FileFormatError, match="else than the network"):
        export_model(tmp_path / "study", "tile-encoder", tmp_path / "out", onnx=True)
    assert not (tmp_path / "out").exists()


def test_there_is_no_graph_of_a_probe(tmp_path):
    with pytest.raises(SettingsError, match="tile-encoder and of nuclei"):
        onnx_models.write_onnx("probe", tmp_path / "study", tmp_path / "x.onnx")
