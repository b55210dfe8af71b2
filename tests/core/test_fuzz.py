"""Whatever a stranger's file holds, its reader reads it or refuses it by an error of ours; never a traceback."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from histossl.core.errors import FileFormatError
from histossl.core.npy import read_npy
from histossl.wsi.safe_xml import ome_images
from support.fuzz import CORPUS, READERS, TOKENS, WAYS, changed, tried

FILES = sorted(path.name for path in CORPUS.iterdir())
EDITS = st.lists(
    st.tuples(
        st.sampled_from(WAYS), st.floats(0, 1, exclude_max=True), st.sampled_from(TOKENS) | st.binary(max_size=9)
    ),
    min_size=1,
    max_size=5,
)
QUIET = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def test_the_corpus_has_files_of_every_kind_that_can_be_read(tmp_path):
    assert {name.partition("-")[0] for name in FILES} == set(READERS)
    for name in FILES:
        assert tried(name, (CORPUS / name).read_bytes(), tmp_path) == "read", name


@settings(QUIET, max_examples=200, derandomize=True)
@given(st.sampled_from(FILES), EDITS)
def test_changed_files_are_read_or_refused(tmp_path_factory, name, edits):
    data = changed((CORPUS / name).read_bytes(), edits)
    tried(name, data, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_thousand_changed_files(tmp_path):
    rng, found = random.Random(0), Counter()
    for _ in range(20_000):
        name = rng.choice(FILES)
        count = rng.randint(1, 5)
        edits = [(rng.choice(WAYS), rng.random(), rng.choice([*TOKENS, rng.randbytes(4)])) for _ in range(count)]
        found[tried(name, changed((CORPUS / name).read_bytes(), edits), tmp_path)] += 1
    assert min(found["read"], found["refused"]) > 1000, found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["Polygon", "Feature", "cell", ""]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["type", "features", "geometry", "properties", "coordinates", "objectType", "nucleusGeometry"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(QUIET, max_examples=100, derandomize=True)
@given(JSON)
@example({"features": [{"geometry": {"type": "Polygon", "coordinates": [[[float("nan")] * 2] * 4]}}]})
@example({"features": [{"geometry": {"type": "Polygon", "coordinates": []}}]})
def test_any_json_is_outlines_or_refused(tmp_path_factory, value):
    tried("nuclei-any.geojson", json.dumps(value).encode(), tmp_path_factory.getbasetemp())


HEADER = "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}"


@pytest.mark.parametrize(
    "header",
    [
        HEADER.format("'<f4'", False, (2**40, 8)),
        HEADER.format("'<f4'", False, (-1, -8)),
        HEADER.format("'<f4'", True, (2**62, 2**62)),
        HEADER.format("'|O'", False, (2,)),
        HEADER.format("'<U1000000000'", False, (4,)),
        HEADER.format("'<f4'", False, "(" * 3000),
        HEADER.format([("a", "<f4")] * 2, False, (1,)),
        HEADER.format("'<f4'", False, 3),
        "__import__('os').abort()",
        "",
    ],
)
def test_arrays_whose_header_lies_are_refused(tmp_path, header):
    text = header.ljust(117) + "\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode() + bytes(64))
    with pytest.raises(FileFormatError, match=r"a\.npy"):
        read_npy(tmp_path / "a.npy", "make it anew")


def test_an_archive_is_no_array(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with pytest.raises(FileFormatError, match="an archive"):
        read_npy(tmp_path / "a.npz", "make it anew")


@pytest.mark.parametrize("count", ["999999999999", "²", "-1", "", "1" * 5000])
def test_a_mad_number_of_planes_takes_no_memory(count):
    [image] = ome_images(f'<OME><Image Name="a"><Pixels/><TiffData IFD="0" PlaneCount="{count}"/></Image></OME>')
    assert 0 in image.ifds[0]


def test_entities_of_xml_are_never_expanded():
    bomb = '<!DOCTYPE OME [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]><OME><Image Name="&b;"/></OME>'
    file = '<!DOCTYPE OME [<!ENTITY a SYSTEM "file:///etc/passwd">]><OME><Image Name="&a;"/></OME>'
    assert ome_images(bomb) == ome_images(file) == []
