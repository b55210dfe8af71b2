"""The parts of a slide's vector: one scale for all of them, found without labels, kept with the encoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from histossl.core.errors import SettingsError
from histossl.evaluate.rivals import parts_alone
from histossl.evaluate.sources import Source
from histossl.gigassl.complete import complete
from histossl.gigassl.embed import EmbedSettings, embed_slide, explain_slide
from histossl.gigassl.encoder import UNTRAINED, SlideEncoder
from histossl.gigassl.encoder_settings import EncoderSettings, made_before
from histossl.gigassl.parts import KINDS, LEAST, Kind, Part
from histossl.gigassl.pretrain_settings import NEIGHBOURS
from histossl.gigassl.views import ViewSettings

SMALL = EncoderSettings(in_dim=16, dim=8, prototypes=6)
HOW = ViewSettings(tiles=40), EmbedSettings(views=3)


def cohort(slides: int, side: int = 12, spread: float = 1.0) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Slides of noise, each with a mean of its own; (side * side) tiles."""
    rng = np.random.default_rng(0)
    places = np.argwhere(np.ones((side, side), bool)).astype(np.float32)
    found = []
    for k in range(slides):
        tiles = spread * (rng.standard_normal((side * side, 16)) + rng.standard_normal(16))
        found.append((f"s{k}", tiles.astype(np.float32), places))
    return found


def made(slides: list[tuple[str, np.ndarray, np.ndarray]]) -> tuple[SlideEncoder, SlideEncoder]:
    """A complete encoder and its rival."""
    encoder = SlideEncoder(SMALL, seed=3)
    sample = [(torch.from_numpy(tiles), places) for _, tiles, places in slides]
    return encoder, complete(encoder, sample, lambda: slides, seed=3)


def vectors(encoder: SlideEncoder, slides: list[tuple[str, np.ndarray, np.ndarray]]) -> np.ndarray:
    return np.stack([embed_slide(encoder, tiles, places, *HOW, name) for name, tiles, places in slides])


@pytest.fixture(scope="module")
def both() -> tuple[SlideEncoder, SlideEncoder]:
    return made(cohort(20))


def test_a_part_is_the_affine_map_that_it_says() -> None:
    rows = torch.from_numpy(np.random.default_rng(1).standard_normal((30, 5)) * [9, 3, 1, 0.5, 0.1])
    for power in (0.0, 0.5, 1.0):
        part = Part(5, Kind(weight=2.0, axes=3, power=power, standard=False))
        assert torch.equal(part(rows.float()), rows.float())  # until it is fitted
        part.fit(rows)
        found = part(rows).double()
        torch.testing.assert_close(found.mean(0), torch.zeros(5).double(), atol=1e-4, rtol=0)
        torch.testing.assert_close(found.square().sum(1).mean().sqrt(), torch.tensor(2.0).double(), atol=1e-3, rtol=0)
        own, given = (np.linalg.svd(x - x.mean(0), compute_uv=False)[:3] for x in (found.numpy(), rows.numpy()))
        np.testing.assert_allclose(own / own[0], (given / given[0]) ** (1 - power), atol=1e-3)
        assert np.linalg.matrix_rank(found.numpy(), tol=1e-3) == 3


@pytest.mark.parametrize(("planted", "kept"), [(0, LEAST), (5, 5), (9, 9)])
def test_the_axes_that_differ_more_than_chance_are_kept(planted: int, kept: int) -> None:
    """So many causes, each of which moves twenty columns; all the rest of the columns is noise of their own."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((80, 200)) * rng.uniform(0.1, 3, 200)
    for cause in range(planted):
        rows[:, 20 * cause : 20 * cause + 20] *= 0.7
        rows[:, 20 * cause : 20 * cause + 20] += rng.standard_normal((80, 1)) * rows[
            :, 20 * cause : 20 * cause + 20
        ].std(0)
    part = Part(200, Kind(weight=1.0, axes=32, power=0.0, standard=True, beyond=0.0))
    part.fit(torch.from_numpy(rows))
    assert np.linalg.matrix_rank(part(torch.from_numpy(rows)).numpy(), tol=1e-3) == kept
    lengths = []
    for beyond in (1.0, 0.5):
        part = Part(200, Kind(weight=1.0, axes=12, power=0.0, standard=True, beyond=beyond))
        part.fit(torch.from_numpy(rows))
        lengths.append(np.linalg.svd(part(torch.from_numpy(rows)).numpy(), compute_uv=False)[:12])
    less = lengths[1] / lengths[0]
    np.testing.assert_allclose(less / less[0], [1.0] * kept + [0.5] * (12 - kept), atol=1e-3)


def test_a_part_that_was_made_with_fewer_axes_is_loaded() -> None:
    rows = torch.from_numpy(np.random.default_rng(4).standard_normal((30, 12))).float()
    old, new = (Part(12, Kind(1.0, axes, 0.5, False)) for axes in (3, 8))
    old.fit(rows)
    new.load_state_dict(old.state_dict())
    torch.testing.assert_close(new(rows), old(rows))
    with pytest.raises(RuntimeError, match="size mismatch"):
        new.load_state_dict(Part(11, KINDS["mean"]).state_dict())


def test_scores_of_the_mapped_part_are_scores_of_the_part() -> None:
    rng = np.random.default_rng(2)
    rows, weights = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((12, 6), (6, 2)))
    part = Part(6, Kind(1.0, 4, 0.5, True))
    part.fit(rows)
    back, added = part.directions(weights)
    torch.testing.assert_close(rows @ back + added, part(rows).double() @ weights, atol=1e-5, rtol=1e-5)


def test_no_scale_of_a_part_and_no_shift_changes_the_vector() -> None:
    rows = torch.from_numpy(np.random.default_rng(3).standard_normal((10, 4)))
    one, other = Part(4, KINDS["mean"]), Part(4, KINDS["mean"])
    one.fit(rows)
    other.fit(rows * 7 + 3)
    torch.testing.assert_close(one(rows), other(rows * 7 + 3), atol=1e-4, rtol=1e-4)


def test_shares_of_tiles_add_up_to_the_score_of_the_scaled_vector(both: tuple[SlideEncoder, SlideEncoder]) -> None:
    encoder, (name, tiles, places) = both[0], cohort(20)[4]
    weights = np.random.default_rng(2).standard_normal((encoder.settings.vector_dim, 2))
    found = explain_slide(encoder, tiles, places, *HOW, name, weights)
    np.testing.assert_array_equal(found.vector, embed_slide(encoder, tiles, places, *HOW, name))
    np.testing.assert_allclose(found.shares.sum(0), found.vector @ weights, atol=2e-4)
    np.testing.assert_allclose(found.looked_at.sum(), 1)


def test_a_slide_alone_has_the_bytes_that_it_has_among_others(
    both: tuple[SlideEncoder, SlideEncoder], tmp_path: Path
) -> None:
    encoder, rival = both
    slides = cohort(20)
    encoder.save(tmp_path / "e", {}, rival)
    again = SlideEncoder.load(tmp_path / "e")
    np.testing.assert_array_equal(vectors(again, slides[7:8])[0], vectors(encoder, slides)[7])
    assert (tmp_path / "e" / UNTRAINED).exists()
    (other,) = again.rival
    np.testing.assert_array_equal(vectors(other, slides[:2]), vectors(rival, slides[:2]))


def test_the_rival_differs_in_the_stage_alone(both: tuple[SlideEncoder, SlideEncoder]) -> None:
    encoder, rival = both
    assert encoder.parts is not None
    assert rival.parts is not None
    for name in ("mean", "prototypes"):
        for own, other in zip(
            encoder.parts.maps[name].state_dict().values(), rival.parts.maps[name].state_dict().values(), strict=True
        ):
            torch.testing.assert_close(own, other)


@pytest.mark.parametrize("slides", [cohort(2), cohort(1), cohort(5, side=1), cohort(4, side=3), cohort(4, spread=0)])
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_few_slides_few_tiles_and_constant_features_give_finite_vectors(slides: list) -> None:
    for encoder in made(slides):
        found = vectors(encoder, slides)
        assert np.isfinite(found).all()
        length = np.linalg.norm(found, axis=1)
        assert ((abs(length - 1) < 1e-5) | (length == 0)).all()  # zero: nothing tells the slide from the cohort


def test_features_of_another_length_are_refused(both: tuple[SlideEncoder, SlideEncoder]) -> None:
    with pytest.raises(SettingsError, match="takes tiles of 16 numbers"):
        embed_slide(both[0], np.zeros((4, 9), np.float32), np.zeros((4, 2), np.float32), *HOW, "a")


def test_an_encoder_made_before_opens_and_says_what_is_old(tmp_path: Path) -> None:
    """As a file of that time: no scales, no parts; tiles themselves, 3x3 and 5x5 of them."""
    chosen = EncoderSettings(in_dim=16, dim=8, prototypes=6, scales=(0, 2, 4), stage_scales=(), normalise=False)
    old = SlideEncoder(chosen)
    old.save(tmp_path / "e")
    file = tmp_path / "e" / "config.json"
    config = json.loads(file.read_text())
    for name in ("scales", "stage_scales", "normalise"):
        del config["settings"][name]
    file.write_text(json.dumps(config))
    found = SlideEncoder.load(tmp_path / "e")
    assert found.settings == old.settings
    assert "earlier version" in made_before(tmp_path / "e")
    assert found.settings.part_names == ("stage",) * 8 + ("mean",) * 16 + ("prototypes",) * (3 * 4 * 6)
    SlideEncoder(SMALL).save(tmp_path / "new")
    assert made_before(tmp_path / "new") == made_before(tmp_path / "nothing") == ""


def test_an_encoder_made_before_the_stage_had_prototypes_opens_and_says_so(tmp_path: Path) -> None:
    old = SlideEncoder(replace(NEIGHBOURS, in_dim=16, dim=8, prototypes=6, stage_scales=()))
    old.save(tmp_path / "e")
    file = tmp_path / "e" / "config.json"
    config = json.loads(file.read_text())
    del config["settings"]["stage_scales"]
    file.write_text(json.dumps(config))
    assert set(SlideEncoder.load(tmp_path / "e").settings.part_names) == {"stage", "mean", "prototypes"}
    assert made_before(tmp_path / "e").endswith("no prototypes of what the stage learned")


def test_an_encoder_of_the_former_inlet_opens_and_says_so(tmp_path: Path) -> None:
    for inlet, old in (("standard", True), ("scaled", False)):
        SlideEncoder(replace(NEIGHBOURS, in_dim=16, dim=8, prototypes=6, inlet=inlet)).save(tmp_path / inlet)
        assert SlideEncoder.load(tmp_path / inlet).settings.inlet == inlet
        assert ("variance 1" in made_before(tmp_path / inlet)) == old


def test_the_rival_counts_the_same_tiles_and_has_a_stage_of_its_own() -> None:
    slides = cohort(6)
    encoder = SlideEncoder(replace(NEIGHBOURS, in_dim=16, dim=8, prototypes=6), seed=5)  # as if training had moved it
    rival = complete(encoder, [(torch.from_numpy(xs), at) for _, xs, at in slides], lambda: slides, seed=3)
    assert encoder.prototypes is not None
    assert rival.prototypes is not None
    assert encoder.stage_prototypes is not None
    assert rival.stage_prototypes is not None
    assert torch.equal(encoder.prototypes.centres, rival.prototypes.centres)
    assert not torch.equal(encoder.stage_prototypes.centres, rival.stage_prototypes.centres)
    assert rival.stage_prototypes.centres.abs().amax() < 1e6  # found, as those of the trained


def test_parts_can_be_judged_by_themselves() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    source = Source(("a", "b", "c"), {"giga-ssl": values}, parts=("stage", "mean", "mean", "prototypes"))
    found = parts_alone(source, ("all",))
    assert list(found) == ["giga-ssl: stage", "giga-ssl: mean", "giga-ssl: prototypes"]
    np.testing.assert_array_equal(found["giga-ssl: mean"], values[:, 1:3])
    assert parts_alone(source, ()) == {}
    with pytest.raises(SettingsError, match="no part 'means'; there are stage"):
        parts_alone(source, ("means",))
    with pytest.raises(SettingsError, match="names no parts"):
        parts_alone(Source(("a",), {"x": values[:1]}), ("all",))
