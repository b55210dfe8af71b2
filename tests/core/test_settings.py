"""Settings refuse wrong values when they are made, and those of former names still load."""

from __future__ import annotations

import dataclasses
import json

import pytest

from histossl.cli.main import main
from histossl.core.config import fingerprint, from_dict, to_dict
from histossl.core.errors import SettingsError
from histossl.encoders.encode import EncodeSettings
from histossl.encoders.moco import MocoSettings
from histossl.encoders.patch_kmeans import PatchKMeansSettings
from histossl.gigassl.pretrain_settings import PretrainSettings
from histossl.nuclei.settings import SelfTrainingSettings


@pytest.mark.parametrize("kind", [EncodeSettings, MocoSettings, PretrainSettings, SelfTrainingSettings])
def test_a_precision_that_does_not_exist_is_refused_at_once(kind):
    with pytest.raises(SettingsError, match=r"float16.*did you mean (float32|bfloat16)"):
        kind(precision="float16")


@pytest.mark.parametrize("flag", ["--pretrain.precision=fp16", "--pretrain.start=tile_encoder", "--encode.precision=x"])
def test_settings_of_later_stages_are_refused_before_the_first(tmp_path, capsys, flag):
    (tmp_path / "slides").mkdir()
    assert main(["run", str(tmp_path / "slides"), "--out", str(tmp_path / "study"), flag]) == 2
    assert flag.split("=")[0].removeprefix("--") in capsys.readouterr().err.replace("_", "-")
    assert not (tmp_path / "study").exists()


def test_weights_to_start_from_are_looked_for_before_the_first_stage(tmp_path, capsys):
    flags = ["--out", str(tmp_path / "study"), "--pretrain.start=nosuch.safetensors"]
    assert main(["run", str(tmp_path), *flags]) == 2
    assert "nosuch.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("settings", "former"), [(SelfTrainingSettings(), "ContrastSettings"), (PatchKMeansSettings(), "WordSettings")]
)
def test_a_renamed_class_keeps_its_fingerprint(settings, former):
    twin = dataclasses.make_dataclass(former, [(f.name, object, None) for f in dataclasses.fields(settings)])
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    assert fingerprint(settings) == fingerprint(twin(**values))


def test_a_renamed_field_is_read_by_its_former_name():
    old = json.loads(json.dumps(to_dict(SelfTrainingSettings(steps=7))))
    old["lessons"] = old.pop("pseudo_labels") | {"doubt": 0.25}
    old["agreement"] = {"sure": 0.7}  # a field that is gone
    found = from_dict(SelfTrainingSettings, old)
    assert found.steps == 7
    assert found.pseudo_labels.doubt == 0.25
