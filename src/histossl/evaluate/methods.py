"""The method section of a paper, written from the settings of the probe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import histossl
from histossl.evaluate.settings import METHODS, TRAINED, Recipe

if TYPE_CHECKING:
    from histossl.evaluate.settings import ProbeSettings


SCALED = {
    "whole": "brought to one scale, at which vectors have a mean square length of 1",
    "columns": "brought to variance 1, and divided by the root of their number",
}
REMEDIED = {
    "centre": "From the vectors of each site the mean of its training patients was subtracted, without labels; a site "
    "that no training patient is of was centred by its own slides.",
    "scale": "The vectors of each site were centred and scaled to the cohort by its training patients, without labels; "
    "those of a site that no training patient is of by its own slides.",
}


STEADY = (
    "Before survival is learned, the covariance of the slides of a patient about their mean, averaged with one alike "
    "in all directions, is made the same in every direction (within-class covariance normalisation), without labels."
)
NEW_SITES = (
    "Beside it stands the same model with whole sites held out, and with them whole patients, in as many folds, or as "
    "there are sites where these are fewer."
)


def describe(
    settings: ProbeSettings,
    classes: bool = True,
    numbers: bool = False,
    survival: bool = False,
    new_sites: bool = False,
) -> str:
    """Write a paragraph on the method for a paper, with every setting.

    Args:
        settings: of the probe.
        classes: whether some target has classes.
        numbers: whether some target has numbers.
        survival: whether some target is survival.
        new_sites: whether whole sites are held out beside.

    Returns:
        One paragraph, without line breaks.
    """
    parts = [_classes(settings)] if classes else []
    parts += [_numbers(settings)] if numbers else []
    parts += [_survival(settings)] if survival else []
    parts += [
        f"Features are centred and {SCALED[settings.scale]}, by the training slides alone "
        f"(histossl {histossl.__version__}).",
        *([REMEDIED[settings.site_remedy]] if settings.site_remedy != "none" else []),
        *([f"Of slides with several areas only {settings.area} counts."] if settings.area else []),
        *([_unit(settings)] if settings.unit == "patient" else []),
        *([STEADY] if survival and settings.unit == "patient" and settings.steady else []),
        _splits(settings),
        *([NEW_SITES] if new_sites else []),
        _figures(settings, classes, numbers, survival),
        *([f"The parts of the vectors ({', '.join(settings.parts)}) are also judged alone."] if settings.parts else []),
        *(METHODS[name] for name in dict.fromkeys(settings.rivals)),
        *([_recipe(Recipe())] if set(settings.rivals) & set(TRAINED) else []),
    ]
    return " ".join(parts)


def _unit(settings: ProbeSettings) -> str:
    known = {"mean": "equally", "tiles": "in proportion to their numbers of tiles"}
    how = known.get(settings.combine, f"by the column {settings.combine}")
    of = "its slides" if settings.combine not in known else "all of its slides"
    if "=" in settings.combine:
        of, how = f"those of its slides whose {settings.combine.replace('=', ' is ', 1)}", "equally"
    return f"A patient has one label, and as vector the mean of the vectors of {of}, weighted {how}."


def _classes(settings: ProbeSettings) -> str:
    grid = ", ".join(f"{C:g}" for C in settings.choose_C)
    chosen = f"C of {grid} by 3 folds of the training patients, {settings.C:g} where they are too few"
    weights = "classes weighted by their inverse frequency" if settings.balanced else "slides weighted equally"
    targets = f" of {', '.join(settings.targets)}" if settings.targets else ""
    return f"Logistic regression{targets} (L2 penalty, {chosen if grid else f'C = {settings.C:g}'}, {weights})."


def _numbers(settings: ProbeSettings) -> str:
    grid = ", ".join(f"{alpha:g}" for alpha in settings.alphas)
    targets = f" of {', '.join(settings.targets)}" if settings.targets else ""
    return (
        f"Ridge regression{targets}, the target standardised by the training slides, the penalty the one of {grid} "
        "with the least squared error in 3 folds of the training patients."
    )


def _survival(settings: ProbeSettings) -> str:
    grid = ", ".join(f"{alpha:g}" for alpha in settings.alphas)
    columns = f" of {settings.time} and {settings.event}" if any(settings.outcome) else ""
    times = ", ".join(f"{time:g}" for time in settings.horizons) or "the quartiles of the times of the events"
    return (
        f"Cox's proportional hazards regression{columns} (Efron's ties, L2 penalty, the one of {grid} with the largest "
        "cross-validated partial likelihood in 3 folds of the training patients; Breslow's baseline hazard), with "
        f"survival asked for at {times}."
    )


def _splits(settings: ProbeSettings) -> str:
    whole = {
        "patients": "whole patients",
        "sites": "whole sites, and with them whole patients",
    }[settings.hold_out]
    mixed = " Patients may have slides of several classes and stay together." if settings.mixed_patients else ""
    kinds = {
        "auto": "",
        "classes": " Targets are taken as classes.",
        "numbers": " Targets are taken as numbers.",
    }[settings.task]
    shots = ", ".join(map(str, sorted(set(settings.shots))))
    unit = "patients" if settings.unit == "patient" else settings.shots_of
    drawn = f" From the training folds {shots} {unit}, where there are as many, are drawn in the proportions of the "
    dealt = f"{settings.repeats} times" if settings.repeats > 1 else "once"
    few = f"{drawn}classes, anew in each fold." if shots else ""
    return (
        f"{settings.folds} folds of {whole}, stratified by class, fifth of the values or event, dealt "
        f"{dealt} with seed {settings.seed}.{mixed}{kinds}{few}"
    )


def _figures(settings: ProbeSettings, classes: bool, numbers: bool, survival: bool) -> str:
    parts = []
    if classes:
        parts.append(
            "AUROC (of several classes the mean of one against the rest) compares slides within a test fold; average "
            "precision is a mean over folds. Balanced accuracy and F1 are of the most probable class. Calibration is "
            "measured by the Brier score and by the expected calibration error over tenths of the probability."
        )
    if numbers:
        parts.append(
            "Spearman's correlation is of predictions from which the mean of their test fold was taken; R² and mean "
            "absolute error are of all slides."
        )
    if survival:
        parts.append(
            "Harrell's C compares slides within a test fold. Uno's C weights its pairs, AUROC (cumulative, dynamic) "
            "its cases and the Brier score its slides by the inverse probability of not being censored. Uno's C and the"
            " integrated Brier score end where a tenth of the slides is still followed."
        )
    parts.append(
        "All are averaged over the repeats. Their intervals and those of the differences are the 2.5 and 97.5 "
        f"percentiles of {settings.bootstraps} bootstrap resamples of the patients, the same for all methods. They "
        "show the effect of other patients, not that of other labelled slides."
    )
    return " ".join(parts)


def _recipe(recipe: Recipe) -> str:
    return (
        f"Networks are trained on the labels by one recipe fixed beforehand: {recipe.steps} steps of AdamW with "
        f"{recipe.batch} slides and {recipe.tiles} of each slide's tiles, rate {recipe.rate:g} after a linear rise in "
        f"the first twentieth and a cosine to zero, weight decay {recipe.weight_decay:g}, dropout {recipe.dropout:g}, "
        f"slide vectors of {recipe.dim} numbers (those of the pretrained encoder where it is fine-tuned), at most "
        f"{recipe.kept} tiles of a slide; tested on all of these."
    )
