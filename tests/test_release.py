"""What a release and a stranger's checkout rest on: tag and changelog, metadata, workflows, tests without real data."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import jinja2
import pytest
import yaml

import histossl

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def module(path: Path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def release():
    return module(ROOT / ".ci" / "check_release.py")


def tree(folder: Path, changelog: str, version: str = "1.2.3") -> Path:
    """A project with nothing but a version and a changelog."""
    (folder / "src" / "histossl").mkdir(parents=True)
    (folder / "src" / "histossl" / "__init__.py").write_text(f'"""Text."""\n\n__version__ = "{version}"\n')
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\nText.\n\n{changelog}", encoding="utf-8")
    return folder


DATED = "## [1.2.3] - 2026-12-01\n\n### Added\n\n- A.\n\n## [1.2.2] - 2026-11-01\n\n- B.\n"


@pytest.mark.parametrize("before", ["", "## [Unreleased]\n\n"])
def test_a_tag_that_equals_version_and_changelog_may_be_released(release, tmp_path, before):
    assert release.problems("v1.2.3", tree(tmp_path, before + DATED)) == []


@pytest.mark.parametrize(
    ("tag", "changelog", "said"),
    [
        ("v1.2.4", DATED, "the tag v1.2.4 is not v1.2.3"),
        ("1.2.3", DATED, "the tag 1.2.3 is not v1.2.3"),
        ("v1.2.3", "## [Unreleased]\n\n- C.\n\n" + DATED, r"entries under \[Unreleased\]"),
        ("v1.2.3", "## [1.3.0] - 2026-12-02\n\n" + DATED, "section is of 1.3.0, the package is 1.2.3"),
        ("v1.2.3", "## [1.2.3] - unreleased\n", r"not '\[1.2.3\] - YYYY-MM-DD'"),
        ("v1.2.3", "", "newest section is ''"),
    ],
)
def test_any_other_tag_may_not(release, tmp_path, tag, changelog, said):
    (problem,) = release.problems(tag, tree(tmp_path, changelog))
    assert re.search(said, problem)


def test_the_command_of_the_release_says_why_not():
    command = [sys.executable, str(ROOT / ".ci" / "check_release.py"), "v0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"is not v{histossl.__version__}" in done.stderr


def test_the_changelog_has_the_sections_of_keep_a_changelog(release):
    found = release.sections((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for heading, text in found:
        assert heading == "[Unreleased]" or release.RELEASE.fullmatch(heading), heading
        named = re.findall(r"^### (.+)$", text, re.MULTILINE)
        assert set(named) <= kinds, heading
        assert len(named) == len(set(named)), heading


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["dynamic"]
    assert "version" not in PROJECT
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_citation_names_the_software_and_both_papers():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type"} <= set(cited)
    assert cited["license"] == PROJECT["license"]
    assert cited["repository-code"] == PROJECT["urls"]["Repository"]
    assert [work["authors"][0]["family-names"] for work in cited["references"]] == ["Lazard", "Boserup"]
    for work in cited["references"]:
        assert {"type", "title", "authors", "year"} <= set(work)


def test_the_conda_recipe_needs_what_the_package_needs():
    text = (ROOT / "recipe" / "meta.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(jinja2.Template(text).render(PYTHON="python"))
    assert list(recipe) == ["package", "source", "build", "requirements", "test", "about", "extra"]  # in linters' order
    assert recipe["package"] == {"name": "histossl", "version": histossl.__version__}
    assert recipe["build"]["entry_points"] == [f"{name} = {what}" for name, what in PROJECT["scripts"].items()]
    least = PROJECT["requires-python"].removeprefix(">=")
    assert recipe["test"]["requires"] == recipe["requirements"]["host"][:1] == [f"python {least}.*"]
    assert all((ROOT / name).is_file() for name in recipe["about"]["license_file"])
    assert recipe["about"]["license"] == PROJECT["license"]
    needed = dict(line.split(" >=") for line in recipe["requirements"]["run"])
    assert needed.pop("python") == least
    assert needed.pop("openslide")
    others = {"torch": "pytorch", "matplotlib": "matplotlib-base", "docstring-parser": "docstring_parser"}
    wanted = dict(re.match(r"([\w-]+)>=([^;\s]+)", line).groups() for line in PROJECT["dependencies"])
    wanted.pop("openslide-bin")
    assert needed == {others.get(name, name).lower(): least for name, least in wanted.items()}


def test_the_image_is_built_from_what_it_copies():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = " ".join(re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE)).split()
    assert all((ROOT / name).exists() for name in copied)
    needed = {*PROJECT["license-files"], "pyproject.toml", "README.md", ".ci", "src", "constraints.txt"}
    assert needed <= set(copied)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_have_jobs_with_the_least_permissions(path):
    flow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert flow["permissions"] == {"contents": "read"}
    # YAML 1.1 reads the key `on` as true.
    assert flow[True]
    for job in (job for job in flow["jobs"].values() if "uses" not in job):
        assert job["timeout-minutes"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert "@" in step.get("uses", "@")


def test_the_tests_run_on_the_versions_and_systems_that_the_metadata_names():
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    rows = flow["jobs"]["test"]["strategy"]["matrix"]["include"]
    named = {re.search(r"3\.\d+$", line)[0] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert {row["python"] for row in rows if row["os"].startswith("ubuntu")} == named
    assert {row["os"].split("-")[0] for row in rows} == {"ubuntu", "macos", "windows"}
    assert PROJECT["requires-python"] == f">={min(named)}"


def test_issue_forms_have_what_the_forge_asks_for():
    assert {path.stem for path in FORMS} == {"bug", "config", "feature"}
    for path in FORMS:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.stem == "config":
            continue
        assert {"name", "description", "body"} <= set(form)
        parts = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert parts
        assert len(parts) == len(set(parts))
        assert all(part["attributes"].get("label") for part in form["body"] if part["type"] != "markdown")


def test_the_hooks_use_the_pinned_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    pinned = re.search(r"^ruff==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[0]
    for hook in hooks["repos"][0]["hooks"]:
        assert hook["additional_dependencies"] == [pinned]


def test_links_of_the_readme_are_addresses_on_a_package_index():
    pytest.importorskip("hatchling", reason="no hatchling (pip install hatchling)")
    script = module(ROOT / ".ci" / "package_readme.py")
    text = "![a](docs/a.jpg) [b](docs/b.md#c) [d](https://e.org) [f](#g)"
    assert script.with_addresses(text, "https://r", "1.2.3") == (
        "![a](https://r/raw/v1.2.3/docs/a.jpg) [b](https://r/blob/v1.2.3/docs/b.md#c) [d](https://e.org) [f](#g)"
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for _, _, target in script.LINK.findall(readme):
        assert (ROOT / target.partition("#")[0]).exists(), target
    sent = script.with_addresses(readme, PROJECT["urls"]["Repository"], histossl.__version__)
    assert script.LINK.findall(sent) == []


@pytest.fixture(scope="module")
def shared():
    """tests/conftest.py as a module."""
    return module(ROOT / "tests" / "conftest.py")


@pytest.mark.parametrize("variables", [{}, {"CI": "true"}, {"HISTOSSL_REQUIRE_DATA": "0"}])
def test_without_real_data_tests_skip_and_say_why(shared, tmp_path, variables):
    with pytest.raises(pytest.skip.Exception, match=r"no real data at .*nowhere \(set HISTOSSL_DATA"):
        shared.real_data(variables | {"HISTOSSL_DATA": str(tmp_path / "nowhere")})


def test_where_real_data_is_required_tests_fail_without_it(shared, tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"no real data at .*nowhere .*insists on it"):
        shared.real_data({"HISTOSSL_REQUIRE_DATA": "1", "HISTOSSL_DATA": str(tmp_path / "nowhere")})


@pytest.mark.parametrize("variables", [{}, {"HISTOSSL_REQUIRE_DATA": "1"}])
def test_real_data_is_used_where_it_lies(shared, tmp_path, variables):
    assert shared.real_data(variables | {"HISTOSSL_DATA": str(tmp_path)}) == tmp_path


def test_files_that_fork_and_kill_are_left_out_on_windows_only(shared, monkeypatch):
    names = {path.stem for path in shared.posix_files()}
    assert {"test_killed", "test_run"} <= names
    assert Path(__file__).stem not in names
    assert len(names) < 13, "most tests run on Windows"
    first = shared.posix_files()[0]
    monkeypatch.setattr(sys, "platform", "linux")
    assert shared.pytest_ignore_collect(first) is None
    monkeypatch.setattr(sys, "platform", "win32")
    assert shared.pytest_ignore_collect(first)
    assert shared.pytest_ignore_collect(Path(__file__)) is None
    assert first.name in shared.pytest_report_header()


@pytest.mark.slow
def test_the_sdist_passes_tests_of_its_own(tmp_path):
    pytest.importorskip("hatchling", reason="no hatchling (pip install hatchling)")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    place = tmp_path / packed.name.removesuffix(".tar.gz")
    folders = ("src", "tests", "examples", "benchmarks", "docs", ".ci", ".github")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    here = {path.relative_to(ROOT) for path in paths if "__pycache__" not in path.parts}
    assert here <= {path.relative_to(place) for path in place.rglob("*")}
    # The release runs all of them from there; here it is those that read files outside of src and tests.
    files = [str(next(place.rglob(name))) for name in ("test_results.py", "test_examples.py")]
    run = [sys.executable, "-m", "pytest", "-q", "-k", "not example_of and not tutorials", *files]
    environment = os.environ | {"PYTHONPATH": str(place / "src")}
    done = subprocess.run(run, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
