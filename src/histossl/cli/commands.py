"""The commands: where each is, what it does in a line, and an example."""

from __future__ import annotations

# Command -> (module, function, one line of help). Modules are imported when their command is called. No function has a
# name of the package's front door: jsonargparse would ask the package for it, which imports what computes.
COMMANDS = {
    "run": ("histossl.cli.study_commands", "run", "slides in; vectors, a probe and a report out: all stages in order"),
    "inspect": ("histossl.cli.inspect_command", "inspect", "a table of the slides and what is wrong with them"),
    "encoder pretrain": (
        "histossl.cli.encoder_commands",
        "pretrain_encoder",
        "train a tile encoder, without labels",
    ),
    "encode": ("histossl.cli.study_commands", "encode_command", "tiles to features and augmented views"),
    "features convert": ("histossl.cli.features_command", "convert", "features to and from TRIDENT, CLAM and STAMP"),
    "pretrain": ("histossl.cli.study_commands", "pretrain_command", "train the slide encoder, without labels"),
    "embed": ("histossl.cli.study_commands", "embed_command", "one vector per slide: embeddings.h5ad"),
    "probe": (
        "histossl.cli.evaluate_commands",
        "probe_vectors",
        "a linear classifier on the vectors, and on those of the baselines",
    ),
    "predict": (
        "histossl.cli.model_commands",
        "predict_command",
        "what a probe says of new slides, and whether to trust it",
    ),
    "export": ("histossl.cli.model_commands", "export", "a model as a folder for others, with a model card"),
    "heatmap": ("histossl.cli.results_commands", "heatmap", "every tile's exact share of a probe's score, for QuPath"),
    "search": (
        "histossl.cli.evaluate_commands",
        "search_command",
        "the slides most like one slide, and how often they share labels",
    ),
    "audit": (
        "histossl.cli.evaluate_commands",
        "audit",
        "what a split has on both of its sides: patients, sites, duplicates",
    ),
    "sites": ("histossl.cli.evaluate_commands", "sites", "how much the vectors know of the site, and what remedies do"),
    "status": ("histossl.study.status", "status", "what is done, which runs work on it, how fast, and the time left"),
    "report": ("histossl.cli.results_commands", "report", "one self-contained page with all results"),
    "view": ("histossl.cli.view_command", "view", "look at the cohort, its slides and their overlays, in a browser"),
    "nuclei train": ("histossl.cli.nuclei_commands", "train", "learn nuclei from images or slides, without labels"),
    "nuclei segment": ("histossl.cli.nuclei_commands", "segment", "find the nuclei of images and slides, for QuPath"),
    "nuclei score": ("histossl.cli.nuclei_score", "score", "Dice, AJI, PQ against ground truth"),
    "synth": ("histossl.wsi.synth", "synth", "paint slides with known truth"),
    "demo": ("histossl.cli.demo", "demo", "all stages on synthetic slides, in minutes"),
    "config": ("histossl.cli.config_command", "config", "all settings of a command as YAML, each explained"),
    "completion": ("histossl.cli.completion", "completion", "complete commands and flags in bash, zsh or fish"),
    "doctor": ("histossl.cli.doctor", "doctor", "what is installed, what is missing, GPU, disk, memory"),
}
# Commands that take --json.
ANSWERS = ("inspect", "probe", "predict", "search", "audit", "status", "doctor", "nuclei score")
EXAMPLES = {
    "run": "histossl run SLIDES --out STUDY --labels labels.csv",
    "inspect": "histossl inspect SLIDES --mpp-default 0.5",
    "encoder pretrain": "histossl encoder pretrain SLIDES --out tile-encoder",
    "encode": "histossl encode STUDY --workers 4",
    "features convert": "histossl features convert FEATURES --out FOLDER --to trident",
    "pretrain": "histossl pretrain FEATURES --out STUDY",
    "embed": "histossl embed NEW_STUDY --weights STUDY/slide-encoder",
    "probe": "histossl probe STUDY --labels labels.csv --probe.shots 10,25,50",
    "predict": "histossl predict STUDY NEW_SLIDES --out NEW",
    "export": "histossl export STUDY MODEL --what probe",
    "heatmap": "histossl heatmap STUDY --labels labels.csv --slides slide-1,slide-2",
    "search": "histossl search STUDY slide-1 --labels labels.csv",
    "sites": "histossl sites STUDY --labels labels.csv",
    "audit": "histossl audit split.csv labels.csv --vectors STUDY",
    "status": "histossl status STUDY",
    "report": "histossl report STUDY",
    "view": "histossl view STUDY",
    "nuclei train": "histossl nuclei train IMAGES --out MODEL",
    "nuclei segment": "histossl nuclei segment SLIDES --out FOUND",
    "nuclei score": "histossl nuclei score FOUND TRUTH",
    "synth": "histossl synth COHORT --slides 12",
    "demo": "histossl demo --out out/demo",
    "config": "histossl config run --dump run.yaml",
    "completion": "histossl completion bash",
    "doctor": "histossl doctor",
}
