"""The docs say what is."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import click
import pytest
import yaml

from ray_slurm_provider.bootstrap import resolve
from ray_slurm_provider.cli import cli
from ray_slurm_provider.deployment.site_document import user_yaml
from ray_slurm_provider.ray_contract import prepare_config
from ray_slurm_provider.sandbox.layout import read_layout
from ray_slurm_provider.site_file import parse_site

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_the_reference_page_is_made_from_the_models():
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert (ROOT / "docs" / "configuration.md").read_text() == maker.page()
    assert (ROOT / "cluster_configs" / "full.yaml").read_text() == maker.full_yaml()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_or_heading_resolves(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if anchor:
            headings = [
                re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in linked.read_text().splitlines()
                if line.startswith("#")
            ]
            assert anchor in headings, target


def _commands(group, prefix="ray-slurm"):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{prefix} {name}")
        elif not command.hidden:
            yield f"{prefix} {name}", command


@pytest.mark.parametrize(
    ("name", "command"), list(_commands(cli)), ids=lambda part: part if isinstance(part, str) else ""
)
def test_every_command_has_help_and_is_in_the_docs(name, command):
    assert command.help
    text = "".join(page.read_text() for page in PAGES)
    group, _, last = name.rpartition(" ")
    assert name in text or re.search(rf"{group} .*`{last}\b", text), name


def test_every_file_that_the_docs_name_exists():
    for page in PAGES:
        for name in re.findall(r"`((?:tests|docs|deploy|examples|cluster_configs|\.ci)/[\w./-]*)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_yaml_of_the_readme_is_short_and_valid():
    text = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert len(text.splitlines()) <= 21
    config = resolve(prepare_config(yaml.safe_load(text)))
    assert config["available_node_types"]["gpu"]["resources"]["accelerator_type:A100"] == 1


def test_the_readmes_two_commands_are_there_and_can_be_run():
    text = (ROOT / "README.md").read_text()
    for command in ("./deploy/quickstart.sh", "./tests/run.sh"):
        assert f"\n{command}\n" in text
        assert (ROOT / command).stat().st_mode & 0o100


def test_the_module_table_names_every_package():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "ray_slurm_provider").iterdir():
        if path.suffix == ".py" and path.stem != "__init__":
            assert f"`{path.stem}`" in text, path.stem


def test_the_quickstart_refuses_what_it_does_not_know():
    done = subprocess.run([ROOT / "deploy" / "quickstart.sh", "--nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--keep" in done.stderr


def _yaml_blocks(name):
    return re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / name).read_text(), re.DOTALL | re.MULTILINE)


def test_the_examples_for_admins_are_right():
    site, five_lines = _yaml_blocks("site.md")
    assert parse_site(site, Path("site.yaml")).limits.max_nodes == 20
    assert five_lines == user_yaml()
    (layout,) = _yaml_blocks("quickstart.md")
    assert read_layout(yaml.safe_load(layout)).node_count == 6
