"""The plan of a synthetic slide: outline of the tissue, kind of every micro-anatomical patch, stains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import SettingsError

KINDS = ("stroma", "gland", "lymphoid", "adipose", "nest", "lesion")
NUCLEI = ("stromal", "epithelial", "lymphocyte", "tumour", "atypical")
# Factor -> the names of its values 0 and 1, in alphabetical order.
CLASSES = {
    "composition": ("more glands", "more lymphocytes"),
    "lesion": ("absent", "present"),
    "arrangement": ("at random", "clustered"),
}
FACTORS = tuple(CLASSES)
SOFTWARE = "histossl synth"  # the tag of painted TIFFs

# Shares of the first five kinds, without the lesion; one row per value of the factor `composition`.
_SHARES = np.array([[0.16, 0.36, 0.10, 0.10, 0.28], [0.16, 0.24, 0.22, 0.10, 0.28]])
# Of three laboratories: hue of the eosin, optical density of bare glass in the scanner's light, softness in µm.
_LABORATORIES = (
    ((0.12, 0.84, 0.50), (0.045, 0.050, 0.040), 0.55),
    ((0.10, 0.80, 0.58), (0.020, 0.025, 0.030), 0.45),
    ((0.20, 0.85, 0.42), (0.070, 0.075, 0.050), 0.70),
)
_UNIT_UM = 72.0  # size of a gland or a fat lobule, about; larger patches hold several units of one kind
_RIM_UM = 30.0  # patches nearer to the tissue's edge are plain stroma: only whole patches get a kind by the shares
_NODES = 384  # the tissue's outline has at most this many nodes a side, so that its memory is bounded


@dataclass(frozen=True)
class SynthSettings:
    """A synthetic slide. Two slides of equal settings are equal in every byte.

    Args:
        width: level-0 pixels.
        height: level-0 pixels.
        mpp: µm per level-0 pixel.
        patch_um: side of the patches of one kind, in µm, which start as squares of a lattice from pixel (0, 0); the
            cells of tissue in a patch have irregular borders that cross the lattice.
        seed: seed of everything that differs between slides of a patient.
        patient: seed of what the slides of a patient share: most of the stain, and tendencies of the tissue.
        composition: 0 or 1, which differ in the shares of the kinds (1: fewer glands, more lymphocytes).
        lesion: 1 puts one compact focus of `lesion` patches into the tissue.
        arrangement: 1 clusters the patches by kind, 0 scatters them; the number of patches of each kind is the same.
        lesion_share: share of the lesion among the patches that lie in the tissue with all of their area.
        stain_jitter: variation of the stains, 0 = none, 1 = as between laboratories.
        quality: quality of the JPEG tiles, 1 to 100; 0 writes lossless deflate tiles.
        artefacts: kinds of `artefacts.PAINTED` that lie over the tissue, one of each for every 4 mm².
        laboratory: 1, 2 or 3, which stains and scans; 0 draws it from `patient`.

    Raises:
        SettingsError: a value is out of range.
    """

    width: int = 1536
    height: int = 1792
    mpp: float = 1.0
    patch_um: float = 64.0
    seed: int = 0
    patient: int = 0
    composition: int = 0
    lesion: int = 0
    arrangement: int = 0
    lesion_share: float = 0.04
    stain_jitter: float = 1.0
    quality: int = 85
    artefacts: tuple[str, ...] = ()
    laboratory: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "width": (64, 200_000),
            "height": (64, 200_000),
            "mpp": (0.05, 10.0),
            "patch_um": (32.0, 4096.0),
            "seed": (0, 2**63 - 1),
            "patient": (0, 2**63 - 1),
            "composition": (0, 1),
            "lesion": (0, 1),
            "arrangement": (0, 1),
            "lesion_share": (0.0, 0.5),
            "stain_jitter": (0.0, 3.0),
            "quality": (0, 100),
            "laboratory": (0, 3),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise SettingsError(f"{name} is {getattr(self, name)}", f"it must lie in [{low}, {high}]")


HAZARDS = {"composition": 1.2, "lesion": 0.8, "arrangement": 0.0}  # log hazard ratios of the factors


def log_hazard(settings: SynthSettings) -> float:
    """The true log hazard ratio of a slide's patient: the sum of `HAZARDS` over the factors that are 1.

    Args:
        settings: the slide.

    Returns:
        The logarithm, to a patient whose factors are all 0.
    """
    return sum(hazard * getattr(settings, factor) for factor, hazard in HAZARDS.items())


def outcome(settings: SynthSettings) -> tuple[float, int]:
    """The survival of a slide's patient, the same for all slides of the patient.

    Args:
        settings: the slide.

    Returns:
        Months to the event or to the last contact, a tenth or more, and 1 with an event, 0 without.
    """
    rng = np.random.default_rng([settings.patient, 202])
    months, event = draw_outcomes(np.array([log_hazard(settings)]), rng)[0].tolist()
    return max(round(months, 1), 0.1), int(event)


def draw_outcomes(log_hazards: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Exponential survival of patients, each followed for 6 to 120 months.

    Args:
        log_hazards: (n,) log hazard ratio of each patient.
        rng: source of the draw.

    Returns:
        (n, 2) months to the event or to the last contact, and 1 with an event, 0 without.
    """
    event, contact = rng.exponential(60.0 / np.exp(log_hazards)), rng.uniform(6.0, 120.0, len(log_hazards))
    return np.column_stack([np.minimum(event, contact), (event <= contact).astype(np.float64)])


def site_of(settings: SynthSettings) -> str:
    """The laboratory of a slide: hue of the eosin, light and softness; where it was drawn, the patient's alone.

    Args:
        settings: the slide.

    Returns:
        laboratory 1, 2 or 3.
    """
    return f"laboratory {_laboratory(np.random.default_rng([settings.patient, 7]), settings) + 1}"


def _laboratory(patient: np.random.Generator, settings: SynthSettings) -> int:
    drawn = int(patient.integers(3)) if settings.stain_jitter else 0
    return settings.laboratory - 1 if settings.laboratory else drawn


@dataclass(frozen=True, eq=False)
class Plan:
    """What is decided once per slide; its memory is bounded, except for two bytes per patch.

    Args:
        kinds: (rows, columns) int8, index into KINDS of every patch, -1 where there is no tissue.
        whole: (rows, columns) bool, the patches that lie in the tissue with all of their area.
        units: number of units along a side of a patch.
        unit_um: side of a unit in µm.
        depth: (n, m) float32, distance to the tissue's edge in µm, positive inside, at nodes that start at (0, 0).
        node_um: distance of two nodes in µm.
        stain: (3, 3) float64; optical density in R, G, B of unit hematoxylin, unit eosin, and bare glass.
        habit: (4,) float64; scale of nuclear radius, of nuclear hematoxylin, edge softness in µm, sensor noise in grey
            levels.
        cap: upper bound of the number of nuclei in a unit.
    """

    kinds: NDArray[np.int8]
    whole: NDArray[np.bool_]
    units: int
    unit_um: float
    depth: NDArray[np.float32]
    node_um: float
    stain: NDArray[np.float64]
    habit: NDArray[np.float64]
    cap: int


@lru_cache(maxsize=4)
def plan(settings: SynthSettings) -> Plan:
    """The plan of a slide, a pure function of its settings.

    Args:
        settings: the slide.

    Returns:
        The plan.

    Raises:
        SettingsError: the slide has more patches than nucleus ids in int32 allow.
    """
    outline, mixing, staining, lesion = (np.random.default_rng([settings.seed, k]) for k in range(4))
    depth, node_um = _depth(settings, outline)
    inner, any_tissue = _patches(settings, depth, node_um)
    kinds = np.where(any_tissue, 0, -1).astype(np.int8)
    focus = _focus(inner, round(settings.lesion_share * inner.sum()), lesion)
    rest = inner & ~focus if settings.lesion else inner
    shares = _shares(settings, mixing)
    kinds[rest] = _arrange(rest, shares, settings.arrangement, mixing)
    if settings.lesion:
        kinds[focus] = KINDS.index("lesion")
    units = max(1, round(settings.patch_um / _UNIT_UM))
    unit_um = settings.patch_um / units
    cap = int(unit_um**2 / 16) + 64
    if kinds.size * units**2 * cap >= 2**31:
        raise SettingsError(
            f"patches of {settings.patch_um} µm are too many to number their nuclei", "take larger ones"
        )
    return Plan(kinds, inner, units, unit_um, depth, node_um, *_stain(settings, staining), cap)


def _smooth(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> NDArray[np.float64]:
    """Gaussian noise of unit variance and correlation length `sigma`, stationary up to the borders."""
    from scipy.ndimage import gaussian_filter, zoom

    step = max(1, int(sigma / 3))
    pad = math.ceil(4 * sigma / step)
    small = rng.standard_normal([math.ceil(n / step) + 2 * pad + 2 for n in shape])
    small = gaussian_filter(small, sigma / step, mode="wrap")
    small /= small.std() + 1e-12
    small = small[pad:-pad, pad:-pad] if pad else small
    large = zoom(small, step, order=1, grid_mode=True, mode="nearest") if step > 1 else small
    return np.asarray(large)[: shape[0], : shape[1]]


def _depth(settings: SynthSettings, rng: np.random.Generator) -> tuple[NDArray[np.float32], float]:
    """Signed distance to the edge of one to three tissue pieces of irregular outline, with a few tears."""
    from scipy.ndimage import distance_transform_edt

    width, height = settings.width * settings.mpp, settings.height * settings.mpp
    node = max(max(width, height) / _NODES, 6.0)
    shape = (math.ceil(height / node) + 2, math.ceil(width / node) + 2)
    y, x = np.mgrid[: shape[0], : shape[1]] * node
    longest, count = max(shape), int(rng.choice([1, 1, 2, 3]))
    inside = np.full(shape, -9.0)
    for k in range(count):
        cell = np.array([width, height])
        centre = cell / 2
        axis = int(height >= width)
        cell[axis] /= count
        centre[axis] = cell[axis] * (k + 0.5)
        centre = centre + rng.uniform(-0.02, 0.02, 2) * cell
        half = cell * rng.uniform(0.45, 0.5, 2)
        dx, dy = (x - centre[0]) / half[0], (y - centre[1]) / half[1]
        radius, angle = (np.abs(dx) ** 2.6 + np.abs(dy) ** 2.6) ** (1 / 2.6), np.arctan2(dy, dx)
        edge = 1 + sum(rng.normal(0, 0.09 / n) * np.cos(n * angle + rng.uniform(0, 2 * np.pi)) for n in (2, 3, 5, 7))
        inside = np.maximum(inside, 1 - radius / edge)
    rough = [_smooth(rng, shape, longest * s) * a for s, a in ((0.08, 0.05), (0.025, 0.03), (0.008, 0.015))]
    tissue = inside + sum(rough) > 0.03
    tear = np.abs(_smooth(rng, shape, longest * 0.05)) < 0.02
    tissue &= ~(tear & (_smooth(rng, shape, longest * 0.07) > 1.1))
    border = np.minimum(np.minimum(x, y), np.minimum(width - x, height - y))
    tissue &= border > 0.015 * max(width, height)
    inner, outer = (np.asarray(distance_transform_edt(t)) for t in (tissue, ~tissue))
    depth = (inner - outer) * node
    return depth.astype(np.float32), node


def _patches(
    settings: SynthSettings, depth: NDArray[np.float32], node_um: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which patches lie in the tissue with all of their area, and which with any."""
    from scipy.ndimage import map_coordinates

    side = settings.patch_um
    rows, columns = (math.ceil(n * settings.mpp / side) for n in (settings.height, settings.width))
    least, most = np.full((rows, columns), np.inf), np.full((rows, columns), -np.inf)
    for fy in (0, 0.25, 0.5, 0.75, 1):
        for fx in (0, 0.25, 0.5, 0.75, 1):
            y, x = np.mgrid[:rows, :columns].astype(np.float64)
            at = map_coordinates(depth, [(y + fy) * side / node_um, (x + fx) * side / node_um], order=1, mode="nearest")
            least, most = np.minimum(least, at), np.maximum(most, at)
    return least > _RIM_UM, most > -2 * _RIM_UM


def _focus(inner: NDArray[np.bool_], count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """A compact, slightly irregular focus of `count` patches."""
    at = np.argwhere(inner)
    focus = np.zeros_like(inner)
    if len(at) and count:
        away = np.linalg.norm(at - at[rng.integers(len(at))], axis=1) + rng.uniform(0, 0.8, len(at))
        chosen = at[np.argsort(away, kind="stable")[:count]]
        focus[chosen[:, 0], chosen[:, 1]] = True
    return focus


def _shares(settings: SynthSettings, rng: np.random.Generator) -> NDArray[np.float64]:
    """The shares of the kinds: by class, with random variation by patient and by slide."""
    habit = np.random.default_rng([settings.patient, 11]).normal(0, 0.12, 5) + rng.normal(0, 0.08, 5)
    shares = _SHARES[settings.composition] * np.exp(habit)
    return shares / shares.sum()


def _arrange(
    where: NDArray[np.bool_], shares: NDArray[np.float64], clustered: int, rng: np.random.Generator
) -> NDArray[np.int8]:
    """Kinds of the patches `where`: exact counts by `shares`, assigned in the order of a smooth or white field."""
    total = int(where.sum())
    ends = np.round(np.cumsum(shares) * total).astype(int)
    hand = rng.permutation(len(shares))
    counts = np.diff(ends, prepend=0)[hand]
    white = rng.standard_normal(where.shape)
    smooth = _smooth(rng, (where.shape[0], where.shape[1]), 2.2)
    field = (smooth + 0.2 * white if clustered else white)[where]
    kinds = np.empty(total, np.int8)
    kinds[np.argsort(field, kind="stable")] = np.repeat(hand, counts)
    return kinds


def _stain(settings: SynthSettings, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Stain vectors, bare glass and habits: they vary mostly by patient, a little by slide, never by class."""
    patient = np.random.default_rng([settings.patient, 7])

    def jitter(shape: tuple[int, ...], scale: float) -> NDArray[np.float64]:
        return (
            settings.stain_jitter * scale * (0.9 * patient.standard_normal(shape) + 0.45 * rng.standard_normal(shape))
        )

    eosin, glass, sharpness = _LABORATORIES[_laboratory(patient, settings)]
    vectors = np.abs(np.array([[0.62, 0.68, 0.34], eosin]) + jitter((2, 3), 0.025))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    strength = np.exp(jitter((2, 1), 0.12))
    glass = np.abs(np.array(glass) + jitter((3,), 0.008))
    habit = np.array([1.0, 1.0, sharpness, 2.2]) * np.exp(jitter((4,), 1.0) * [0.05, 0.06, 0.15, 0.2])
    return np.concatenate([vectors * strength, glass[None]]), habit
