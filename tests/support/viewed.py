"""A study to view, and a way to ask the viewer without a socket."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from histossl.core.embeddings import write_embeddings
from histossl.nuclei.export import write_geojson
from histossl.nuclei.instances import MEASURES, Nuclei
from histossl.study.folder import COLUMNS, Study
from histossl.study.survey import SurveyJob, survey_slide
from histossl.view.app import Viewer
from histossl.wsi.geometry import Size
from histossl.wsi.tile_files import read_tiles_of
from histossl.wsi.tiles import TileSpec
from histossl.wsi.tissue import TissueSettings

TOKEN = "t0ken"
SECRET = "what nobody may read"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self):
        return json.loads(self.body)

    def picture(self):
        return np.asarray(Image.open(io.BytesIO(self.body)))


async def asked(app, address, method="GET", host="127.0.0.1:1", gone=None, body=b"", headers=()) -> Answer:
    """Ask as a server hands a request on; `gone` is an event upon which the client leaves."""
    path, _, query = address.partition("?")
    path = unquote(path, errors="surrogateescape")
    head = [*([(b"host", host.encode())] if host is not None else []), *headers]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode("utf-8", "replace"),
        "headers": head,
        "http_version": "1.1",
    }
    sent, over = [], gone or asyncio.Event()
    first = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive():
        for message in first:
            return message
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    headers = [(name.decode().lower(), value.decode()) for name, value in sent[0].get("headers", ())]
    assert len(dict(headers)) == len(headers), "a header is sent twice"
    return Answer(sent[0]["status"], dict(headers), b"".join(m.get("body", b"") for m in sent[1:]))


def ask(app, address, **more) -> Answer:
    return asyncio.run(asked(app, address, **more))


def squares(n: int, size: Size, seed: int = 0) -> Nuclei:
    """n crooked squares of 6 to 14 pixels, all over a slide."""
    rng = np.random.default_rng(seed)
    corner = np.array([[-1, -1], [1, -1.0], [1.0, 1], [-1, 1]])
    middle = rng.uniform(10, [size.width - 10, size.height - 10], (n, 2))
    points = middle[:, None] + corner * rng.uniform(3, 7, (n, 1, 1)) + rng.uniform(-1, 1, (n, 4, 2))
    measures = np.zeros((n, len(MEASURES)), np.float32)
    measures[:, :2] = middle
    return Nuclei(points.reshape(-1, 2).astype(np.float32), np.arange(n + 1, dtype=np.int64) * 4, measures)


def painted(seed: int) -> np.ndarray:
    """(900, 700, 3) a round pink tissue on bright glass."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:900, :700]
    tissue = ((y - 450) / 360) ** 2 + ((x - 350) / 280) ** 2 < 1
    picture = np.where(tissue[..., None], [200, 120, 170], [243, 242, 244]) + rng.normal(0, 6, (900, 700, 1))
    return picture.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A study of six slides with vectors, predictions and nuclei, one slide that is none, and secrets beside it."""
    root = tmp_path_factory.mktemp("view")
    slides, study = root / "cohort" / "slides", Study(root / "study")
    slides.mkdir(parents=True)
    rows = []
    for k in range(6):
        name = f"slide-{k}"
        path = slides / f"{name}.tiff"
        tifffile.imwrite(path, painted(k), tile=(256, 256), photometric="rgb", resolution=(1e4, 1e4), resolutionunit=3)
        job = SurveyJob(name, path, None, None, TissueSettings(), TileSpec(64), study.tiles(name), study.qc(name))
        rows.append(
            {"slide_id": name, "path": str(path), "status": "inspected"}
            | {n: str(v) for n, v in vars(survey_slide(job)).items()}
        )
    (slides / "zz-no-slide.svs").write_text(SECRET)
    rows.append(
        {"slide_id": "zz-no-slide", "path": str(slides / "zz-no-slide.svs"), "status": "failed", "error": "is none"}
    )
    study.write_slides(rows)
    out = study.folder
    for place in (root, root / "cohort", out):
        for name in ("secret.txt", "secret.geojson", "secret.html", "secret.jpg", "secret.js", "secret.h5"):
            (place / name).write_text(SECRET)
    rows = [dict.fromkeys(COLUMNS, "") | row | {"ward": f"<b>{k % 2}</b>"} for k, row in enumerate(rows)]
    study.write_slides(rows)
    rng = np.random.default_rng(0)
    good = [row for row in rows if row["status"] != "failed"][:5]  # the sixth has no vector
    write_embeddings(study.embeddings, good, {"giga-ssl": rng.normal(size=(5, 8))}, {}, "made")
    with (out / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["target", "embedding", "slide_id", "patient_id", "truth", "predicted", "p(a)", "p(b)"])
        for k, row in enumerate(good):
            writer.writerow(["kind", "giga-ssl", row["slide_id"], "", "ab"[k % 2], "a", "0.75", "0.25"])
            writer.writerow(["kind", "mean pooling", row["slide_id"], "", "ab"[k % 2], "b", "", ""])
    xy = read_tiles_of(study.tiles("slide-0")).xy
    heat = pd.DataFrame(
        {"x": xy[:, 0], "y": xy[:, 1], "looked_at": 1.0, "share(a)": np.arange(len(xy)), "share(b)": 0.5}
    )
    (out / "heatmaps" / "kind").mkdir(parents=True)
    heat.to_csv(out / "heatmaps" / "kind" / "slide-0.csv", index_label="tile")
    (out / "nuclei").mkdir()
    write_geojson(out / "nuclei" / f"{good[0]['slide_id']}.geojson", [squares(300, Size(700, 900))], 1.0)
    return out


@pytest.fixture(scope="module")
def viewer(folder) -> Viewer:
    return Viewer(Study(folder), folder / "nuclei", threads=3)


@pytest.fixture(scope="module")
def app(viewer):
    return viewer.guarded(TOKEN)
