"""The types of values in our sections of the YAML, each with its own sentence for a mistake."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ray_slurm_provider.agent.ports import port_range
from ray_slurm_provider.slurm import parse


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line of printable characters")
    if not text.strip():
        raise ValueError("must not be empty")
    return text


def _shell_line(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain a NUL character")
    if not text.strip():
        raise ValueError("must not be empty")
    return text


def _memory(value: int | str) -> int | str:
    parse.parse_mem_mib(value)
    return value


def _time(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(  # noqa: TRY004 pydantic turns a ValueError into its own error
            f"must be in quotes: YAML reads 01:30:00 without them as the number 5400; this one is now {value}"
        )
    return value


def _time_form(text: str) -> str:
    parse.parse_time_s(text)
    return text


def _gres(text: str) -> str:
    parse.parse_gres(text)
    return text


def _gpus(value: int | str) -> int | str:
    parse.parse_gpus(value)
    return value


def _port_range(text: str) -> str:
    port_range(text)
    return text.replace(" ", "")


def not_bool(value: Any) -> Any:
    """Refuse true and false where Python would take them for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("must be a text or a number")  # noqa: TRY004 as above
    return value


Line = Annotated[str, AfterValidator(_one_line)]
ShellLine = Annotated[str, AfterValidator(_shell_line)]
PortRange = Annotated[str, AfterValidator(_port_range)]
Count = Annotated[int, Field(ge=1)]
Memory = Annotated[int | str, BeforeValidator(not_bool), AfterValidator(_memory)]
TimeLimit = Annotated[str, BeforeValidator(_time), AfterValidator(_one_line), AfterValidator(_time_form)]
Gres = Annotated[str, AfterValidator(_one_line), AfterValidator(_gres)]
Gpus = Annotated[int | str, BeforeValidator(not_bool), AfterValidator(_gpus)]
LineOrCount = Annotated[int | Line, BeforeValidator(not_bool)]


class Section(BaseModel):
    """A mapping of the YAML: unknown keys are refused, types are not converted, docstrings are the documentation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)
