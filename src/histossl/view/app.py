"""Routes of the viewer. An address names a slide by its number, so that no part of a request becomes part of a path."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from weakref import WeakKeyDictionary

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from histossl.core.errors import HistosslError, SlideError
from histossl.study.folder import Study
from histossl.view.answers import NOT_KEPT, absent, as_json, conflict, unless_gone
from histossl.view.cohort import Cohort, read_cohort
from histossl.view.guard import App, Guard
from histossl.view.label_routes import LabelRoutes
from histossl.view.labelling import Labelling
from histossl.view.maps import map_names, slide_places
from histossl.view.overlays import slide_words
from histossl.view.pyramid import NoTile
from histossl.view.reading import PictureCache
from histossl.view.slide_reader import LocalReader, ProcessReader

_WAITING = 256  # requests in progress at most; one page makes fewer
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".txt": "text/plain"}
_DAY = {"cache-control": "private, max-age=86400"}  # safe: the token in the address changes with every start


class Viewer:
    """The web application that shows a study.

    Args:
        study: the study to show.
        nuclei: folder of nuclei, one file per slide.
        threads: number of threads that read slides; None takes two to four, by the cores.
        capacity: bytes of pictures that are kept in memory.
        processes: read in worker processes with limits, as the command does; otherwise in the threads themselves.
        read_only: write no labels.

    Raises:
        StudyError: the study has no slides.
    """

    def __init__(
        self,
        study: Study,
        nuclei: Path,
        threads: int | None = None,
        capacity: int = 64 * 2**20,
        processes: bool = False,
        read_only: bool = False,
    ) -> None:
        self.study = study
        self.cohort: Cohort = read_cohort(study)
        self.labels = LabelRoutes(Labelling(study, self.cohort, read_only))
        self.threads = threads or max(2, min(4, os.cpu_count() or 2))
        local = LocalReader(study, self.cohort, nuclei)
        self.reader = ProcessReader(study, self.cohort, nuclei, self.threads) if processes else local
        self.shelf, self.overlays = local.shelf, local.overlays
        self.kept = PictureCache(capacity)
        self.readers = ThreadPoolExecutor(self.threads, "read")
        # For what takes long or much memory. Threads that wait for processes cost nothing.
        self.alone = ThreadPoolExecutor(4 if processes else 1, "alone")
        self.maps = ThreadPoolExecutor(1, "maps")
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, asyncio.Semaphore]] = WeakKeyDictionary()
        self.waiting = 0
        self.closing = False
        here = Path(__file__).parent / "static"
        self.files = {path.name: path.read_bytes() for path in here.iterdir() if path.suffix in _KINDS}

    def app(self) -> Starlette:
        """The routes, without access control."""
        of = "/slides/{slide:count}"
        routes = {
            "/": self.page("atlas.html"),
            "/static/{name}": self.static,
            "/cohort.json": self.cohort_json,
            "/maps/{name}.json": self.map_json,
            of: self.page("slide.html"),
            f"{of}/words.json": self.words,
            f"{of}/facts.json": self.facts,
            f"{of}/thumbnail.jpg": self.thumbnail,
            f"{of}/tiles/{{level:count}}/{{column:count}}_{{row:count}}.jpg": self.tile,
            f"{of}/tissue.json": self.overlay("tissue", "application/json"),
            f"{of}/areas.json": self.overlay("areas", "application/json"),
            f"{of}/tiles.bin": self.overlay("tiles", "application/octet-stream"),
            f"{of}/heat/{{number:count}}.bin": self.overlay("heat", "application/octet-stream"),
            f"{of}/nuclei.json": self.overlay("nuclei_about", "application/json"),
            f"{of}/nuclei.png": self.overlay("nuclei_density", "image/png"),
            f"{of}/nuclei/{{cell:count}}.bin": self.overlay("nuclei_cell", "application/octet-stream"),
        }

        @asynccontextmanager
        async def lifespan(_: Starlette):
            yield
            self.close()

        app = Starlette(
            routes=[
                *(Route(path, endpoint, methods=["GET"]) for path, endpoint in routes.items()),
                *self.labels.routes(),
            ],
            exception_handlers={HistosslError: conflict, NoTile: absent},
            lifespan=lifespan,
        )
        app.router.redirect_slashes = False  # a redirect would lose the token, which the guard removes from the path
        return app

    def guarded(self, token: str, host: str = "127.0.0.1") -> App:
        """The routes behind `Guard`.

        Args:
            token: the secret that begins every address.
            host: the host that the server listens on.

        Returns:
            An ASGI application.
        """
        return Guard(self.app(), token, host)

    def stop(self) -> None:
        """Answer nothing more: whatever is being read is given up."""
        self.closing = True
        for pool in (self.readers, self.alone, self.maps):
            pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(self.reader, ProcessReader):
            self.reader.close()

    def close(self) -> None:
        """Give back threads, processes and files; waiting requests are dropped."""
        self.stop()
        for pool in (self.readers, self.alone):  # a map that is being computed is not waited for
            pool.shutdown(wait=True)
        self.labels.close()
        self.shelf.close()

    def page(self, name: str) -> Callable:
        """Route of an HTML page.

        Args:
            name: name of the file in `static`.

        Returns:
            The endpoint; it answers 404 where the address names no slide of the study.
        """

        async def answer(request: Request) -> Response:
            if "slide" in request.path_params:
                self._slide(request)
            return Response(self.files[name], media_type="text/html", headers=NOT_KEPT)

        return answer

    async def static(self, request: Request) -> Response:
        """Scripts, styles and licences.

        Args:
            request: with `name`, a file in `static`.

        Returns:
            The file.

        Raises:
            HTTPException: 404, there is no such file.
        """
        name = request.path_params["name"]
        if name not in self.files:
            raise HTTPException(404)
        return Response(self.files[name], media_type=_KINDS[Path(name).suffix], headers=_DAY)

    async def cohort_json(self, _: Request) -> Response:
        """The cohort: names, errors, columns, and the maps that can be drawn."""
        vectors = self.cohort.vectors
        return as_json(
            {
                "title": self.cohort.title,
                "names": [row["slide_id"] for row in self.cohort.rows],
                "failed": {k: row["error"] for k, row in enumerate(self.cohort.rows) if row["status"] == "failed"},
                "columns": self.cohort.columns,
                "maps": map_names(0 if vectors is None else len(vectors)),
                "technical": self.study.columns,
                "reserved": sorted(self.labels.labelling.reserved),
                "readonly": self.labels.labelling.read_only,
            }
        )

    async def map_json(self, request: Request) -> Response:
        """Coordinates of all slides on a map.

        Args:
            request: with `name`, one of `map_names`.

        Returns:
            JSON: `places`, [x, y] of each slide or null, and `told`, a sentence about the map.

        Raises:
            HTTPException: 404, there is no such map; 503, too many requests.
        """
        name, vectors = request.path_params["name"], self.cohort.vectors
        if vectors is None or name not in map_names(len(vectors)):
            raise HTTPException(404)

        def make() -> bytes:
            xy, note = slide_places(name, vectors)
            places: list[list[float] | None] = [None] * len(self.cohort)
            for slide, row in self.cohort.row_of.items():
                places[slide] = [round(float(value), 3) for value in xy[row]]
            return json.dumps({"places": places, "told": note}).encode()

        return await self._made(request, self.maps, ("map", name), lambda _: make(), "application/json")

    async def words(self, request: Request) -> Response:
        """What the study knows of a slide; the slide is not opened.

        Args:
            request: with `slide`, its index.

        Returns:
            JSON of `slide_words`.
        """
        return as_json(slide_words(self.cohort, self._slide(request)))

    async def facts(self, request: Request) -> Response:
        """Size, resolution and overlays of a slide.

        Args:
            request: with `slide`, its index.

        Returns:
            JSON of `slide_facts`, and `side`, the pixels of a tile.
        """
        slide = self._slide(request)
        make = lambda gone: self.reader.answer("facts", slide, gone=gone)  # noqa: E731
        return await self._made(request, self.readers, None, make, "application/json", slide)

    async def thumbnail(self, request: Request) -> Response:
        """A small picture of a slide.

        Args:
            request: with `slide`, its index.

        Returns:
            JPEG; 204 without content where there is no picture.
        """
        slide = self._slide(request)
        make = lambda gone: self.reader.answer("thumbnail", slide, gone=gone)  # noqa: E731
        try:
            return await self._made(request, self.readers, ("thumbnail", slide), make, "image/jpeg", slide)
        except (HTTPException, SlideError) as error:
            if getattr(error, "status_code", 404) != 404:  # a SlideError has no status
                raise
            return Response(status_code=204, headers=NOT_KEPT)  # a missing picture is no error in a list of slides

    async def tile(self, request: Request) -> Response:
        """A tile of a slide.

        Args:
            request: with `slide`, `level`, `column` and `row`.

        Returns:
            JPEG; 404 where there is no such tile.
        """
        slide = self._slide(request)
        place = tuple(request.path_params[name] for name in ("level", "column", "row"))
        make = lambda gone: self.reader.answer("tile", slide, *place, gone=gone)  # noqa: E731
        return await self._made(request, self.readers, (slide, *place), make, "image/jpeg", slide)

    def overlay(self, what: str, kind: str) -> Callable:
        """Route of an overlay.

        Args:
            what: name of a method of `Overlays`.
            kind: media type of its result.

        Returns:
            The endpoint; it answers 404 where the slide has no such overlay.
        """

        async def answer(request: Request) -> Response:
            slide = self._slide(request)
            place = [value for name, value in request.path_params.items() if name != "slide"]
            make = lambda gone: self.reader.answer(what, slide, *place, gone=gone)  # noqa: E731
            return await self._made(request, self.alone, (what, slide, *place), make, kind, slide)

        return answer

    def _slide(self, request: Request) -> int:
        slide = request.path_params["slide"]
        if slide >= len(self.cohort):
            raise HTTPException(404)
        return slide

    async def _made(
        self,
        request: Request,
        pool: ThreadPoolExecutor,
        key: object,
        make: Callable[[threading.Event], bytes | None],
        kind: str,
        slide: int | None = None,
    ) -> Response:
        """What `make` gives, in a thread of the pool; it is told when its client has gone.

        Of one slide (`slide`) not all threads read at once: some are left for the others.
        """
        answer = None if key is None else self.kept.get(key)
        if answer is None:
            if self.waiting >= _WAITING:
                raise HTTPException(503, "too many requests at once", {"retry-after": "1"})
            self.waiting += 1
            gone = threading.Event()
            work = asyncio.ensure_future(self._in_turn(pool, slide, functools.partial(make, gone)))
            try:
                answer = await unless_gone(request, work)
            except asyncio.CancelledError:
                if not self.closing:
                    raise
                raise HTTPException(503, "the viewer is being closed") from None
            finally:
                self.waiting -= 1
                gone.set()
                work.cancel()
            if answer is None:
                raise HTTPException(404)
            if key is not None:
                self.kept.put(key, answer)
        return Response(answer, media_type=kind, headers=_DAY)

    async def _in_turn(
        self, pool: ThreadPoolExecutor, slide: int | None, make: Callable[[], bytes | None]
    ) -> bytes | None:
        async with self._turn(slide):
            return await asyncio.wrap_future(pool.submit(make))

    def _turn(self, slide: int | None) -> AbstractAsyncContextManager[None]:
        if slide is None:
            return nullcontext()
        turns = self._turns.setdefault(asyncio.get_running_loop(), {})
        return turns.setdefault(slide, asyncio.Semaphore(max(1, self.threads - 1)))
