"""The cluster YAML that `ray-slurm deploy` writes: a template with the site's node types in it, as text.

Text is edited line by line at the places that the YAML parser names, for every comment of the template must stay.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ray_slurm_provider.errors import DeployError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ray_slurm_provider.deployment.proposal import Proposal, TypeProposal, Wishes
    from ray_slurm_provider.deployment.survey import Survey

_COMMENT_COLUMN = 40
_TEMPLATE_COLUMN = 32
_WIDTH = 118
# Keys of the site's own that a type of the template does not keep.
_OF_THE_SITE = frozenset({"partition", "account", "qos", "cpus_per_task", "mem", "mem_per_cpu", "gres", "time"})


# What of a type of the template is kept, each with one line on it.
_KEPT = {
    "idle_timeout_s": "seconds without work after which such a job is cancelled",
    "labels": "tasks choose it by these, with label_selector",
}


def template_directory() -> Path:
    """Return where the templates are: in the installed package, or in the clone."""
    installed = Path(__file__).parents[1] / "cluster_configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "cluster_configs"


def template_names() -> list[str]:
    """Return the names of the templates that come with the package."""
    return sorted(path.stem for path in template_directory().glob("*.yaml"))


def read_template(name: str) -> str:
    """Return a template by its name, or the file of that path.

    Raises:
        DeployError: There is none.
    """
    path = template_directory() / f"{name}.yaml"
    path = path if path.is_file() else Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise DeployError(
            f"there is no template {name}; a path of your own, or one of {', '.join(template_names())}"
        ) from None


class _Lines:
    """The lines of a block-style YAML, changed key by key.

    Args:
        text: The YAML.
    """

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()

    def keys(self, *path: str) -> dict[str, tuple[int, int]]:
        """Return the keys of the mapping at a path, each with its first line and the line after its last."""
        node = self._node(path)
        if node is None:
            return {}
        starts = [(str(key.value), key.start_mark.line) for key, _ in node.value]
        indent = node.value[0][0].start_mark.column if node.value else 0
        ends = [line for _, line in starts[1:]] + [self._end(node, indent)]
        return {
            name: (start, self._without_comments(start, end, indent))
            for (name, start), end in zip(starts, ends, strict=True)
        }

    def set_line(self, path: Sequence[str], value: str, why: str) -> None:
        """Give the key at a path a one-line value; a new key comes last in its mapping."""
        *parents, key = path
        if parents and parents[-1] not in self.keys(*parents[:-1]):
            self.set_line(parents, "", "")
        found = self.keys(*parents)
        new = f"{key}: {value}".rstrip()
        if key in found:
            start, end = found[key]
            self.lines[start:end] = [self._indented(new, why, self.lines[start])]
        elif found:
            like = self.lines[next(iter(found.values()))[0]]
            self.lines.insert(max(end for _, end in found.values()), self._indented(new, why, like))
        else:
            start, end = self.keys(*parents[:-1])[parents[-1]]
            parent = re.sub(r":.*", ":", self.lines[start], count=1)
            self.lines[start:end] = [parent, self._indented(new, why, f"  {parent}")]

    @staticmethod
    def _indented(text: str, why: str, like: str) -> str:
        indent = like[: len(like) - len(like.lstrip())]
        return commented(f"{indent}{text}", why, _TEMPLATE_COLUMN)

    def replace(self, key: str, lines: Sequence[str]) -> None:
        """Put lines in place of a key of the top level."""
        start, end = self.keys()[key]
        self.lines[start:end] = lines

    def set_header(self, lines: Sequence[str]) -> None:
        """Put lines in place of all that stands before the first key."""
        first = min(start for start, _ in self.keys().values())
        self.lines[:first] = [*lines, ""]

    def text(self) -> str:
        """Return the YAML."""
        return "\n".join(self.lines) + "\n"

    def _node(self, path: Sequence[str]) -> yaml.MappingNode | None:
        node = yaml.compose("\n".join(self.lines), Loader=yaml.SafeLoader)
        for name in path:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            node = next((value for key, value in pairs if key.value == name), None)
        if isinstance(node, yaml.MappingNode) and node.flow_style and node.value:
            raise DeployError(f"the template's section {'.'.join(path)} must be written one key to a line")
        return node if isinstance(node, yaml.MappingNode) else None

    def _end(self, node: yaml.MappingNode, indent: int) -> int:
        last = node.value[-1][0].start_mark.line if node.value else node.start_mark.line
        for number in range(last + 1, len(self.lines)):
            line = self.lines[number]
            if line.strip() and len(line) - len(line.lstrip()) < max(indent, 1) and indent:
                return number
        return len(self.lines)

    def _without_comments(self, start: int, end: int, indent: int) -> int:
        """Leave what introduces the next key to that key."""
        while end - 1 > start:
            line = self.lines[end - 1]
            if line.strip() and not (line.lstrip().startswith("#") and len(line) - len(line.lstrip()) <= indent):
                break
            end -= 1
        return end


def commented(text: str, why: str, column: int = _COMMENT_COLUMN) -> str:
    """Return a line with its comment in a column of its own."""
    return f"{text.ljust(column - 2)}  # {why}" if why else text


def scalar(value: str | int) -> str:
    """Return a value as YAML, in quotes where YAML would take it for something else."""
    if isinstance(value, int):
        return str(value)
    plain = re.fullmatch(r"[A-Za-z0-9_./~$][A-Za-z0-9_./~$ -]*", value) and yaml.safe_load(value) == value
    return value if plain else json.dumps(value, ensure_ascii=False)


def write_document(
    template: str,
    survey: Survey,
    wishes: Wishes,
    proposal: Proposal,
    *,
    file_name: str,
    settings: Mapping[str, tuple[Any, str]],
    types: Sequence[str],
) -> str:
    """Return the YAML.

    Args:
        template: A cluster YAML whose settings and comments are kept; its node types make room.
        survey: The site.
        wishes: What was wanted.
        proposal: The node types; the first of its heads is taken.
        file_name: What the file will be called.
        settings: Keys of ``provider.slurm`` to set, each with one line on it.
        types: The lines of ``available_node_types``.

    Raises:
        DeployError: The template is no cluster YAML in block style.
    """
    try:
        provider = (yaml.safe_load(template) or {}).get("provider")
    except (yaml.YAMLError, AttributeError):
        provider = None
    if not isinstance(provider, dict) or provider.get("type") != "external" or "module" not in provider:
        raise DeployError("the template is no cluster YAML of this provider: see its section provider")
    document = _Lines(template)
    for key in ("cluster_name", "max_workers", "provider", "head_node_type"):
        if key not in document.keys():  # noqa: SIM118 not a mapping
            raise DeployError(f"the template lacks the key {key}")
    document.set_line(
        ["cluster_name"], scalar(wishes.cluster_name), "names its jobs, and its directory below state_dir"
    )
    document.set_line(["max_workers"], str(proposal.max_workers), "jobs of workers at the most, all types together")
    for name, (value, why) in settings.items():
        shown = scalar(value) if isinstance(value, str) else json.dumps(value)
        document.set_line(["provider", "slurm", name], shown, why)
    if wishes.setup:
        document.set_line(["setup_commands"], json.dumps(list(wishes.setup)), "on every node, before Ray starts")
    document.replace("head_node_type", ["head_node_type: head"])
    document.replace("available_node_types", types)
    document.set_header(_header(survey, file_name, proposal.notes))
    return document.text()


def _header(survey: Survey, file_name: str, notes: Sequence[str]) -> list[str]:
    where = f"{survey.cluster} (SLURM {survey.version})"
    schema = template_directory() / "schema.json"
    text = [
        f"A Ray cluster for {where}, made by `ray-slurm deploy` from what SLURM says of the site. To start it:",
        "",
        f"    ray up {file_name} --no-config-cache",
        "",
        f"`ray-slurm check {file_name}` tells beforehand whether it will work.",
        "Change what you like; `ray-slurm schema` prints every key with its meaning.",
        *(["", *(f"* {note}" for note in notes)] if notes else []),
    ]
    wrapped = [
        part for line in text for part in (textwrap.wrap(line, _WIDTH - 2) if line[:1] != " " else [line]) or [""]
    ]
    return [f"# yaml-language-server: $schema={schema}", *(f"# {line}".rstrip() for line in wrapped)]


def node_type_lines(template: str, proposal: Proposal, *, knows_priority: bool) -> Iterator[str]:
    """Yield the lines of ``available_node_types``.

    Args:
        template: A cluster YAML: what its types say besides their size and place is kept.
        proposal: The node types; the first of its heads is taken.
        knows_priority: Whether Ray knows the key ``priority``.

    Raises:
        DeployError: The template is no cluster YAML.
    """
    try:
        old = yaml.safe_load(template)
    except yaml.YAMLError as error:
        raise DeployError(f"the template is not YAML: {error}") from None
    if not isinstance(old, dict) or not isinstance(old.get("available_node_types"), dict):
        raise DeployError("the template is no cluster YAML: it has no available_node_types")
    yield "available_node_types:"
    head = proposal.heads[0]
    yield commented(f"  {head.name}:", head.about)
    yield commented("    resources: {CPU: 0}", "no tasks on the head: it has the others to look after")
    yield "    node_config:"
    if head.sbatch:
        yield from _sbatch(head, {})
    else:
        yield commented("      placement: login_node", "no sbatch options: it is no job")
    for worker in proposal.workers:
        kept = _kept(old, has_gpus=worker.has_gpus)
        yield f"  # {worker.about}"
        yield f"  {worker.name}:"
        yield commented(f"    max_workers: {worker.max_workers}", "jobs of this type at the most")
        if worker.priority and knows_priority:
            yield commented(f"    priority: {worker.priority}", "the same nodes are in a partition that comes first")
        for key, value in kept.items():
            if key != "node_config":
                yield commented(f"    {key}: {_flow(value)}", _KEPT[key])
        yield "    node_config:"
        yield from _sbatch(worker, kept.get("node_config", {}))


def _sbatch(proposed: TypeProposal, kept: Mapping[str, Any]) -> Iterator[str]:
    yield "      sbatch:"
    for name, option in proposed.sbatch.items():
        yield commented(f"        {name}: {scalar(option.value)}", option.why)
    for name, value in kept.get("sbatch", {}).items():
        if name not in proposed.sbatch:
            yield f"        {name}: {_flow(value)}"
    if proposed.skip:
        yield commented(f"      sbatch_skip: {_flow(list(proposed.skip))}", "the site refuses these directives")
    for name, value in kept.items():
        if name not in {"sbatch", "placement"}:
            yield f"      {name}: {_flow(value)}"


def _kept(old: Mapping[str, Any], *, has_gpus: bool) -> dict[str, Any]:
    """Return what the template's first worker of that kind says besides its size and place."""
    for name, entry in old["available_node_types"].items():
        config = (entry or {}).get("node_config") or {}
        options = config.get("sbatch") or {}
        if name == old.get("head_node_type") or ("gres" in options or "gpus_per_node" in options) != has_gpus:
            continue
        kept = {key: value for key, value in entry.items() if key in _KEPT}
        inner = {key: value for key, value in config.items() if value not in ([], {}, "slurm")}
        inner["sbatch"] = {key: value for key, value in options.items() if key not in _OF_THE_SITE}
        return {**kept, "node_config": inner}
    return {}


def _flow(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
